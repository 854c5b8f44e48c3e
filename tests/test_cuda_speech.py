"""Speech on a GPU, where sound is made beside the frames or between them; on the CPU, where that is the same."""

import codec_models
import numpy as np
import pytest
import torch
from cuda_models import HALVES, MODELS, SAMPLED, build, needs_gpu, without
from speech_files import StandInCodec, StandInStream

from s1kernels import IncompleteSpeech, Speech
from s1kernels.speech.tokenizer import Tokenizer
from s1kernels.testing import rel_error

CONFIG = MODELS["s1_mini"]  # of the widths that the persistent kernel serves
BYTES = Tokenizer(lambda text: list(text.encode()), {"<|interleave|>": 300, "<|im_end|>": CONFIG.end_token}, "bytes")
SECONDS, FRAMES = 1.5, 32
CASES = [pytest.param("cpu", False, id="cpu")] + [
    pytest.param("cuda", persistent, id=f"cuda-{name}", marks=needs_gpu)
    for persistent, name in ((True, "persistent"), (False, "ops"))
]


class CodecThere(StandInCodec):
    """The stand-in with its samples on a device."""

    def __init__(self, device):
        super().__init__(CONFIG.codebooks)
        self.codebook_sizes, self.device = (CONFIG.codebook_size,) * CONFIG.codebooks, device

    def stream(self, chunks=()):
        return StreamThere(self)


class StreamThere(StandInStream):
    def push(self, codes):
        return super().push(codes).to(self.codec.device)


def speaker(device, persistent, codec=None):
    dtype = HALVES[0] if device == "cuda" else torch.float32
    engine = without(build("s1_mini", device, dtype, persistent=persistent), CONFIG.end_token)
    tts = Speech(engine, BYTES, codec or CodecThere(device))
    assert (tts.pipeline.side is None) == (device == "cpu" or engine.persistent)
    return tts


def said(tts, **options):
    """What the model, which draws no end token, says in a while."""
    with pytest.raises(IncompleteSpeech, match="no end within") as caught:
        tts.say("Hello.", sampling=SAMPLED, max_seconds=SECONDS, **options)
    return caught.value.audio


@pytest.mark.parametrize(("device", "persistent"), CASES)
def test_sound_is_that_of_the_codes(device, persistent):
    tts = speaker(device, persistent)
    tts.warm_up()
    spoken = said(tts, seed=5)
    prompt = torch.cat([tts.prompt.opening(), tts.prompt.turn("Hello.")], dim=1)
    alone = tts.engine.generate(prompt, spoken.codes.shape[1], SAMPLED, seed=5)
    assert torch.equal(spoken.codes, alone[1:].cpu()) and spoken.codes.shape[1] == FRAMES
    assert np.array_equal(spoken.samples, tts.codec.decode(spoken.codes).numpy())


@pytest.mark.parametrize(("device", "persistent"), CASES)
def test_a_stream_that_is_dropped_leaves_no_trace(device, persistent):
    tts = speaker(device, persistent)
    before = said(tts, seed=5)
    for taken in (1, 2):
        chunks = tts.stream("Another text.", seed=6, sampling=SAMPLED, max_seconds=SECONDS)
        for _ in range(taken):
            next(chunks)
        chunks.close()
        after = said(tts, seed=5)
        assert torch.equal(after.codes, before.codes) and np.array_equal(after.samples, before.samples)


@needs_gpu
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "ops"])
def test_the_codec_beside_the_frames(persistent):
    codec = codec_models.ours(codec_models.build(), device="cuda")
    tts = speaker("cuda", persistent, codec)
    spoken = said(tts, seed=5)
    sizes = torch.tensor(codec.codebook_sizes)[:, None]
    whole = codec.decode(torch.minimum(spoken.codes, sizes - 1)).cpu()
    assert rel_error(torch.from_numpy(spoken.samples), whole) < 1e-4
