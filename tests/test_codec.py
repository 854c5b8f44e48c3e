"""The codec against upstream's own modules, whole and chunk by chunk, and what it refuses."""

import codec_models
import numpy as np
import pytest
import torch
from codec_models import CODES, SETTINGS
from torch.nn import functional as F

from s1kernels import testing
from s1kernels.speech.codec import Codec, stream
from s1kernels.speech.codec import codec as module

FRAMES = 40  # several times the windows of 8


@pytest.fixture(scope="module")
def model():
    return codec_models.build()


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


@pytest.fixture(scope="module")
def codec(model):
    return codec_models.ours(model)


def streamed(codec, codes, sizes):
    tape = codec.stream()
    return torch.cat([tape.push(part) for part in codes.split(sizes, dim=1)])


def close(value, truth):
    assert value.shape == truth.shape
    error = testing.rel_error(value, truth)
    assert error <= 1e-5, error


# what it computes


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, FRAMES, 150])
def test_decode_is_upstreams(model, codec, frames):
    codes = codec_models.codes(frames)
    truth = model.decode(codes[None].clone(), torch.tensor([frames]))[0][0, 0]
    kept = codes.clone()
    audio = codec.decode(codes)
    assert audio.dtype == torch.float32 and 0.02 < audio.std() < 0.5  # neither silent nor clipped
    close(audio, truth)
    assert torch.equal(codes, kept)
    assert torch.equal(codec.decode(codes.int()), audio)


@torch.no_grad()
@pytest.mark.parametrize("samples", [2048, 20 * 2048 + 1, 150 * 2048])
def test_encode_is_upstreams(model, codec, samples):
    audio = codec_models.audio(samples)
    truth = model.encode(audio[None, None])[0][0]
    codes = codec.encode(audio, 44100)
    assert codes.dtype == torch.int64 and torch.equal(codes, truth)
    stereo = torch.stack([audio * 1.5, audio * 0.5]).double().numpy()
    assert torch.equal(codec.encode(stereo, 44100), truth)


@torch.no_grad()
def test_latents_and_the_search_are_upstreams(model, codec):
    audio = codec_models.audio(10 * 2048)[None, None]
    truth = model.quantizer.pre_module(model.quantizer.downsample(model.encoder(audio)))
    close(codec.encoder(audio[0].T, stream.Past(codec.device)), truth[0].T)
    vectors = torch.randn(1, 64, 300, generator=torch.Generator().manual_seed(3))
    semantic, first, *_ = model.quantizer.semantic_quantizer(vectors)
    _, others, *_ = model.quantizer.quantizer(vectors - semantic)
    codes = codec.quantizers.codes(vectors[0].T)
    assert torch.equal(codes, torch.cat([first, others], dim=1)[0])
    assert all(len(row.unique()) > size / 2 for row, size in zip(codes, CODES, strict=True))


def test_long_audio_goes_in_parts(codec, monkeypatch):
    codes, audio = codec_models.codes(FRAMES), codec_models.audio(FRAMES * 2048)
    whole, encoded = codec.decode(codes), codec.encode(audio, 44100)
    monkeypatch.setattr(module, "FRAMES", 7)
    monkeypatch.setattr(stream, "FRAMES", 7)
    close(codec.decode(codes), whole)
    assert torch.equal(codec.encode(audio, 44100), encoded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(model, codec, dtype):
    half = codec_models.ours(model, dtype=dtype)
    codes = codec_models.codes(FRAMES)
    truth, audio = codec.decode(codes), half.decode(codes)
    assert half.dtype == dtype and audio.dtype == torch.float32
    # some 60 layers, each of which rounds its weights and its result once
    assert testing.rel_error(audio, truth) <= 60**0.5 * testing.ONE_ROUNDING[dtype]
    assert half.encode(codec_models.audio(4096), 44100).shape == (len(CODES), 2)


# streaming


@pytest.mark.parametrize("sizes", [1, 4, 25, [1, 2, 4, 8, 25]])
def test_chunks_joined_are_the_whole(codec, sizes):
    codes = codec_models.codes(FRAMES)
    whole, joined = codec.decode(codes), streamed(codec, codes, sizes)
    close(joined, whole)
    assert (joined - whole).abs().max() <= 1e-5


def test_no_click_at_the_joins(codec):
    """The energy above 12 kHz round a join is that of the whole decode there; without its past it would not be."""
    codes = codec_models.codes(FRAMES)
    joins = torch.arange(4, FRAMES, 4) * codec.frame_samples
    whole = clicks(codec.decode(codes), joins)
    torch.testing.assert_close(clicks(streamed(codec, codes, 4), joins), whole, rtol=1e-3, atol=0)
    forgetful = torch.cat([codec.decode(part) for part in codes.split(4, dim=1)])
    assert (clicks(forgetful, joins) / whole - 1).abs().min() > 0.05


def clicks(audio, joins, rate=44100, width=256):
    """Energy above 12 kHz in windows of `width` samples round each join."""
    windows = torch.stack([audio[at - width // 2 : at + width // 2] for at in joins.tolist()])
    spectrum = torch.fft.rfft(windows * torch.hann_window(width)).abs().square()
    return spectrum[:, torch.fft.rfftfreq(width, 1 / rate) > 12000].sum(dim=1)


def test_a_stream_keeps_the_same_memory(codec):
    tape, sizes = codec.stream(), []
    for part in codec_models.codes(30).split(3, dim=1):
        tape.push(part)
        sizes.append(tape.nbytes)
    assert len(set(sizes)) == 1 and 0 < sizes[0] < 100_000


def test_a_stream_can_begin_anew(codec):
    codes = codec_models.codes(5)
    tape = codec.stream()
    first = tape.push(codes)
    tape.reset()
    assert torch.equal(tape.push(codes), first)


def test_streams_do_not_disturb_each_other(codec):
    codes, others = codec_models.codes(6), codec_models.codes(6, seed=9)
    one, two = codec.stream(), codec.stream()
    parts = [(one.push(codes[:, i : i + 2]), two.push(others[:, i : i + 2])) for i in (0, 2, 4)]
    close(torch.cat([a for a, _ in parts]), codec.decode(codes))
    close(torch.cat([b for _, b in parts]), codec.decode(others))


def test_later_positions_are_upstreams(model, codec):
    """Far from the start the rotary table is still upstream's, and past the end of upstream's it goes on."""
    post = model.quantizer.post_module
    place = codec.decoder.transformer.place
    later, far, first = place(500, 12), place(100_000, 3), place(0, 20)
    assert torch.equal(later.cos_sin[later.slots], post.freqs_cis[500:512].float())
    assert far.cos_sin[far.slots].isfinite().all() and not far.mask.isinf().all(dim=1).any()
    assert torch.equal(first.mask == 0, F.pad(post.make_window_limited_mask(20)[0, 0], (0, far.mask.shape[1] - 20)))


# files


def test_reads_what_is_published(state, codec, tmp_path):
    """In a folder or by name; from a training run's checkpoint; with the weight norm's older names, or folded."""
    codes = codec_models.codes(3)
    truth = codec.decode(codes)
    older = {key.replace("parametrizations.weight.original0", "weight_g"): tensor for key, tensor in state.items()}
    older = {key.replace("parametrizations.weight.original1", "weight_v"): tensor for key, tensor in older.items()}
    trained = {"state_dict": {f"generator.{key}": t for key, t in older.items()} | {"discriminator.x": torch.zeros(1)}}
    for name, content in {"plain": state, "older": older, "trained": trained}.items():
        folder = tmp_path / name
        folder.mkdir()
        torch.save(content, folder / "codec.pth")
        for path in (folder, folder / "codec.pth"):
            close(Codec.from_checkpoint(path, settings=SETTINGS).decode(codes), truth)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^codec: path must be codec\.pth or .*, got .*nowhere; download it"):
        Codec.from_checkpoint(tmp_path / "nowhere")
    (tmp_path / "codec.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(ValueError, match=r"codec\.pth must be whole and readable"):
        Codec.from_checkpoint(tmp_path)


KEY = "decoder.model.2.block.1.conv.parametrizations.weight.original1"
LAYER = "quantizer.pre_module.layers.0"


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({KEY: None}, ValueError, r"decoder\.model\.2\.block\.1\.conv\.weight must be in the codec's file"),
        ({KEY: torch.zeros(3, 4, 5)}, ValueError, rf"{KEY} must be \[16, any, any\], got \[3, 4, 5\]; pass the codec"),
        ({KEY: torch.zeros(1, 1, 1).int()}, TypeError, rf"{KEY} must be a floating tensor, got torch\.int32"),
        ({KEY: "text"}, TypeError, rf"{KEY} must be a floating tensor, got str"),
        ({"quantizer.post_module.norm.weight": torch.full((64,), torch.nan)}, ValueError, "must be finite"),
        ({"encoder.block.9.alpha": torch.zeros(1)}, ValueError, r"must be those of .*, got encoder\.block\.9"),
        ({f"{LAYER}.attention.wqkv.weight": torch.zeros(100, 64)}, ValueError, r"got 100; pass the Settings that fit"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(state, change, kind, match):
    changed = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
    with pytest.raises(kind, match=f"^codec: .*{match}"):
        Codec.from_state(changed, settings=SETTINGS)


def test_dead_masks_stay_unread(state, codec):
    """Neither upstream's masks nor its tables are needed, nor what only training uses."""
    needed = {key: t for key, t in state.items() if not key.endswith(("causal_mask", "freqs_cis"))}
    assert len(needed) < len(state)
    lean = Codec.from_state(needed | {"quantizer.semantic_predictor_module.x": torch.ones(1)}, settings=SETTINGS)
    assert torch.equal(lean.decode(codec_models.codes(3)), codec.decode(codec_models.codes(3)))


# arguments


@pytest.mark.parametrize(
    ("codes", "kind", "match"),
    [
        (torch.zeros(4), TypeError, r"codes must be an int32 or int64 tensor, got torch\.float32; convert"),
        ([[0]], TypeError, r"codes must be an int32 or int64 tensor, got list"),
        (torch.zeros(5, 2).long(), ValueError, r"codes must be \[N=4, T >= 1\], got \[5, 2\]; pass one row a codebook"),
        (torch.zeros(4, 0).long(), ValueError, r"codes must be \[N=4, T >= 1\], got \[4, 0\]"),
        (torch.tensor([[0], [16], [0], [0]]), ValueError, r"codes\[1\] must be in \[0, 16\), got 16; pass the codes"),
        (torch.tensor([[0], [0], [0], [-1]]), ValueError, r"codes\[3\] must be in \[0, 16\), got -1"),
    ],
)
def test_bad_codes_are_refused(codec, codes, kind, match):
    tape, good = codec.stream(), codec_models.codes(4)
    first = tape.push(good[:, :2])
    for call in (codec.decode, tape.push):
        with pytest.raises(kind, match=f"^codec: {match}"):
            call(codes)
    close(torch.cat([first, tape.push(good[:, 2:])]), codec.decode(good))  # the stream goes on


@pytest.mark.parametrize(
    ("audio", "rate", "kind", "match"),
    [
        (torch.zeros(4096), 16000, ValueError, "sample_rate must be 44100 Hz, got 16000; resample"),
        (torch.zeros(2047), 44100, ValueError, r"audio must be .*, 2048 samples or more, got \[2047\]; pass a longer"),
        (torch.zeros(0), 44100, ValueError, r"audio must be .* got \[0\]"),
        (torch.zeros(4096, 2), 44100, ValueError, r"audio must be \[channels, samples\], got \[4096, 2\]; transpose"),
        (torch.zeros(1, 1, 4096), 44100, ValueError, r"audio must be .* got \[1, 1, 4096\]"),
        (np.zeros(4096, np.int16), 44100, TypeError, "audio must be a floating .*, got torch.int16; scale it"),
        ("ref.wav", 44100, TypeError, "audio must be a floating tensor or array, got str"),
        (torch.full((4096,), torch.inf), 44100, ValueError, "audio must be finite, got NaN or infinity"),
    ],
)
def test_bad_audio_is_refused(codec, audio, rate, kind, match):
    with pytest.raises(kind, match=f"^codec: {match}"):
        codec.encode(audio, rate)


def test_other_dtypes_are_refused(state):
    with pytest.raises(TypeError, match=r"^codec: dtype must be float32, bfloat16 or float16, got torch\.float64"):
        Codec.from_state(state, dtype=torch.float64, settings=SETTINGS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same(model, codec, exact_float32):
    there, codes = codec_models.ours(model, device="cuda"), codec_models.codes(FRAMES)
    audio = codec_models.audio(5 * 2048)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for frames in (3, FRAMES, 3, 1, 33):  # op by op, then as a graph
            close(there.decode(codes[:, :frames]).cpu(), codec.decode(codes[:, :frames]))
        close(streamed(there, codes.cuda(), 4).cpu(), codec.decode(codes))
        tape = there.stream(chunks=(1, 4))  # as graphs; 3 and 2 go op by op between them
        for _ in range(2):
            parts = [tape.push(part).cpu() for part in codes.split([1, 4, 4, 3, 4, 1, 4, 4, 4, 4, 4, 1, 2], dim=1)]
            close(torch.cat(parts), codec.decode(codes))
            tape.reset()
        assert torch.equal(there.encode(audio, 44100).cpu(), codec.encode(audio, 44100))
