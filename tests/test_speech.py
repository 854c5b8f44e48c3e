"""Speech from a checkpoint directory: codes as upstream's, sound as a stand-in for the codec makes it."""

import itertools
import re

import codec_models
import numpy as np
import pytest
import soundfile
import torch
from fish_speech.models.text2semantic import inference
from speech_files import FRAME_SAMPLES, SAMPLE_RATE, StandInCodec, StandInStream, save_s1

from s1kernels import IncompleteSpeech, Sampling, Speech, Voice
from s1kernels.speech import audio, pipeline, speech
from s1kernels.speech.pipeline import CHUNKS
from s1kernels.speech.text import split
from s1kernels.testing import rel_error

GREEDY = Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.25)  # 1.25 is exact in upstream's bfloat16
FREE = Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.0)
CLEAR = re.compile(r"(speech|reference|voice|Speech): .+ must .+, got .*; .+", re.DOTALL)
LONG = "The quick brown fox jumps over the lazy dog, isn't it? " * 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_s1(tmp_path_factory.mktemp("speaks"))


@pytest.fixture
def tts(directory, monkeypatch):
    monkeypatch.setattr(speech, "load_codec", lambda *_: StandInCodec())
    return Speech.from_checkpoint(directory, device="cpu")


@pytest.fixture
def endless(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "load_codec", lambda *_: StandInCodec())
    return Speech.from_checkpoint(save_s1(tmp_path / "endless", end=0.0), device="cpu")


@pytest.fixture(scope="module")
def upstream(directory):
    """Upstream's generate_long on the same directory: codes of a text."""
    model, decode = inference.init_model(str(directory), "cpu", torch.float32)

    def generate(text, said, sampling, seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning):
            patch.setattr(inference, "tqdm", iter)
            responses = inference.generate_long(
                model=model, device="cpu", decode_one_token=decode, text=text, max_new_tokens=400, top_p=sampling.top_p,
                repetition_penalty=sampling.repetition_penalty, temperature=max(sampling.temperature, 1e-5),
                prompt_text=[one for one, _ in said], prompt_tokens=[codes for _, codes in said],
            )  # fmt: skip
            return next(responses).codes

    return generate


def a_voice(frames=20, text="What I say."):
    return Voice(text, torch.randint(0, 40, (3, frames), generator=torch.Generator().manual_seed(frames)))


@pytest.mark.parametrize("sampling", [GREEDY, FREE], ids=["greedy", "sampled"])
@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("text", ["Hello there.", "It's 12:30, isn't it?", "你好，世界！"])
def test_codes_are_upstreams(text, references, sampling, tts, upstream):
    voices = [a_voice(10 + i, f"Voice {i}.") for i in range(references)]
    spoken = tts.say(text, voices, seed=5, sampling=sampling)
    assert spoken.codes.shape[1] > 0 and spoken.codes.dtype == torch.int32
    assert torch.equal(spoken.codes, upstream(text, [(voice.text, voice.codes) for voice in voices], sampling, seed=5))
    assert np.array_equal(spoken.samples, tts.codec.decode(spoken.codes).numpy())
    assert spoken.sample_rate == SAMPLE_RATE and spoken.seconds == spoken.codes.shape[1] * FRAME_SAMPLES / SAMPLE_RATE


def test_parts_of_a_long_text_are_spoken_in_the_context_of_those_before(tts, upstream):
    voice = a_voice()
    parts = split(LONG)
    assert len(parts) > 2
    spoken = tts.say(LONG, voice, sampling=GREEDY)
    said = [(voice.text, voice.codes)]
    for part in parts:
        said.append((part, upstream(part, said, GREEDY)))
    assert torch.equal(spoken.codes, torch.cat([codes for _, codes in said[1:]], dim=1))
    assert np.array_equal(spoken.samples, tts.codec.decode(spoken.codes).numpy())


def scripted(tts, monkeypatch, tokens):
    """Let the engine say these semantic tokens, whatever it is asked; returns what it is asked: (prompt, start)."""
    config, asked = tts.engine.config, []

    def stream(prompt, *_, start, **__):
        asked.append((prompt, start))
        frames = [[config.semantic_begin + code, code, 1, 2] for code in tokens] + [[config.end_token, 0, 1, 2]]
        return iter(torch.tensor(frames, dtype=torch.int32))

    monkeypatch.setattr(tts.engine, "stream", stream)
    return asked


@pytest.mark.parametrize(("frames", "kept"), [(100, True), (3600, False)])
def test_a_full_context_starts_anew_with_the_part_before_if_that_fits(frames, kept, tts, monkeypatch):
    voice, limit = a_voice(frames), 100
    asked = scripted(tts, monkeypatch, [5] * 90)
    parts = split(LONG)[:1] * 20
    tts.say(" ".join(parts), voice, max_seconds=limit / tts.frame_rate)
    opening, turn = tts.prompt.opening([voice]), tts.prompt.turn(parts[0])
    end = tts.prompt.spoken("", torch.zeros(3, 0))[:, -1:]
    said = tts.prompt.spoken(parts[0], torch.tensor([[5], [1], [2]]).repeat(1, 90))
    assert len(asked) == len(parts) and torch.equal(asked[0][0], torch.cat([opening, turn], dim=1))
    position, anew = 0, 0
    for i, (prompt, start) in enumerate(asked):
        assert start + prompt.shape[1] + limit <= 4096
        if start:
            assert start == position and torch.equal(prompt[0], torch.cat([end, turn], dim=1)[0])
        elif i:
            anew += 1
            assert torch.equal(prompt, torch.cat([opening, said, turn] if kept else [opening, turn], dim=1))
            assert position + 1 + turn.shape[1] + limit > 4096  # the context was full indeed
        position = start + prompt.shape[1] + 90
    assert anew == (1 if kept else len(parts) - 1)


def test_streaming_is_saying_in_chunks(tts):
    whole = tts.say(LONG, a_voice(), sampling=GREEDY)
    sizes = tts.codec.chunks = []
    chunks = tts.stream(LONG, a_voice(), sampling=GREEDY)
    first = next(chunks)
    assert first.shape == (CHUNKS[0] * FRAME_SAMPLES,) and first.dtype == np.float32
    assert sizes == [CHUNKS[0]]  # nothing else has been decoded to sound
    rest = list(chunks)
    assert np.array_equal(np.concatenate([first, *rest]), whole.samples)
    assert sizes[: len(CHUNKS) + 1] == [*CHUNKS, CHUNKS[-1]] and sum(sizes) == whole.codes.shape[1]


def test_the_codec_itself_speaks(tmp_path, monkeypatch):
    model = codec_models.build()
    monkeypatch.setattr(speech, "load_codec", lambda *_: codec_models.ours(model))
    tts = Speech.from_checkpoint(save_s1(tmp_path, num_codebooks=4), device="cpu")
    spoken = tts.say("It's 12:30, isn't it?", seed=5, sampling=FREE)
    sizes = torch.tensor(codec_models.CODES)[:, None]
    assert spoken.codes.shape[1] > sum(CHUNKS[:2]) and (spoken.codes >= sizes).any()  # upstream clamps those
    with torch.inference_mode():
        theirs = model.decode(torch.minimum(spoken.codes, sizes - 1)[None], torch.tensor([spoken.codes.shape[1]]))[0]
    assert rel_error(torch.from_numpy(spoken.samples), theirs[0, 0]) < 1e-5
    tone(tmp_path / "ref.wav")
    assert tts.clone(tmp_path / "ref.wav", "A tone.").codes.shape == (4, 44)


def test_sound_that_is_on_its_way_does_not_hold_up_frames(monkeypatch):
    """As on a GPU: a chunk is handed out once it has arrived, in order, while frames go on."""
    frames, handed, log = [torch.full((3,), i) for i in range(30)], [], []
    monkeypatch.setattr(pipeline.Sound, "ready", lambda self: len(log) >= {4: 14, 8: 20}.get(self.codes.shape[1], 30))

    def decoded():
        for frame in frames:
            log.append(frame)
            yield frame

    codec = StandInCodec()
    for codes, samples in pipeline.Pipeline(codec, torch.device("cpu"), beside=True).sounds(decoded()):
        handed.append((codes, samples, len(log)))
    assert [codes.shape[1] for codes, _, _ in handed] == [4, 8, 16, 2] == codec.chunks
    assert [at for _, _, at in handed] == [14, 20, 30, 30]  # frames went on meanwhile
    assert torch.equal(torch.cat([codes for codes, _, _ in handed], dim=1), torch.stack(frames, dim=1))
    whole = codec.decode(torch.stack(frames, dim=1)).numpy()
    assert np.array_equal(np.concatenate([samples for _, samples, _ in handed]), whole)


def test_an_error_comes_after_the_sound_before_it(tts, monkeypatch):
    def stream(*_, **__):
        for i in range(10):
            yield torch.tensor([tts.engine.config.semantic_begin, i, 1, 2], dtype=torch.int32)
        raise FloatingPointError("decode_frame: logits must be finite")

    monkeypatch.setattr(tts.engine, "stream", stream)
    heard, chunks = [], tts.stream("Hello.")
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        heard.extend(chunks)
    assert sum(map(len, heard)) == 10 * FRAME_SAMPLES

    def full(*_):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(StandInStream, "push", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        tts.say("Hello.")


def test_seeds(tts):
    def say(**options):
        return tts.say("It's 12:30, isn't it?", sampling=FREE, **options).codes

    state = torch.get_rng_state()
    first = say(seed=1)
    tts.warm_up()
    assert torch.equal(torch.get_rng_state(), state)  # a seed leaves torch's own generator alone
    assert torch.equal(say(seed=1), first) and not torch.equal(say(seed=2), first)
    torch.manual_seed(1)
    assert torch.equal(say(), first) and not torch.equal(say(), first)
    assert torch.equal(tts.say("It's.", temperature=0, seed=1).codes, tts.say("It's.", temperature=0, seed=2).codes)
    nucleus = tts.say("It's.", top_p=1e-6, seed=1, sampling=GREEDY).codes
    assert torch.equal(nucleus, tts.say("It's.", seed=2, sampling=GREEDY).codes)


def tone(path, seconds=2.0, rate=44100, channels=1, level=0.5, dtype=None):
    wave = level * np.sin(2 * np.pi * 220 * np.arange(int(seconds * rate)) / rate).astype(np.float32)
    soundfile.write(path, np.stack([wave, 0 * wave], axis=1)[:, :channels], rate, subtype=dtype)
    return wave


@pytest.mark.parametrize(("file", "rate", "channels"), [("a.wav", 44100, 1), ("b.flac", 16000, 2), ("c.ogg", 48000, 2)])
def test_voices_are_cloned_saved_and_reused(file, rate, channels, tts, upstream, tmp_path):
    wave = tone(tmp_path / file, 2.0, rate, channels)
    heard = audio.read(tmp_path / file, SAMPLE_RATE)
    assert heard.shape == (2 * SAMPLE_RATE,) and heard.dtype == np.float32
    expected = 0.5 / channels * np.sin(2 * np.pi * 220 * np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE)
    inner = slice(SAMPLE_RATE // 10, -SAMPLE_RATE // 10)
    assert np.abs(heard - expected)[inner].max() < 0.02 and wave.max() < 0.6
    voice = tts.clone(str(tmp_path / file), "A tone.")
    assert voice.text == "A tone." and torch.equal(voice.codes, tts.codec.encode(heard, SAMPLE_RATE).int())
    voice.save(tmp_path / "voice.safetensors")
    again = Voice.load(tmp_path / "voice.safetensors")
    assert again.text == voice.text and torch.equal(again.codes, voice.codes)
    spoken = tts.say("Hello there.", again, sampling=GREEDY)
    assert torch.equal(spoken.codes, upstream("Hello there.", [("A tone.", voice.codes)], GREEDY))
    assert torch.equal(spoken.codes, tts.say("Hello there.", voice, sampling=GREEDY).codes)
    spoken.save(tmp_path / "out.flac")
    back, found = soundfile.read(tmp_path / "out.flac", dtype="float32")
    assert found == SAMPLE_RATE and np.abs(back - spoken.samples).max() < 1e-4


def refused(kind, message, call, *args, **options):
    with pytest.raises(kind, match=message) as caught:
        call(*args, **options)
    assert CLEAR.fullmatch(str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seconds=0.5), "1 to 60 s long, got 0.50 s; use 10 to 30 s"),
        (dict(seconds=70.0, rate=8000), "1 to 60 s long, got 70.00 s"),
        (dict(level=0.0), "audible, got a peak"),
        (dict(level=np.nan, dtype="FLOAT"), "finite, got NaN"),
    ],
)
def test_recordings_that_cannot_be_used(options, message, tts, tmp_path):
    tone(tmp_path / "ref.wav", **options)
    refused(ValueError, message, tts.clone, tmp_path / "ref.wav", "text")


def test_files_that_are_no_recordings_or_no_voices(tts, tmp_path):
    refused(FileNotFoundError, "must be an audio file, got none", tts.clone, tmp_path / "no.wav", "text")
    (tmp_path / "text.wav").write_text("not a sound")
    refused(ValueError, "a WAV, FLAC, OGG or MP3 file, got", tts.clone, tmp_path / "text.wav", "text")
    tone(tmp_path / "cut.flac")
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    refused(ValueError, "cut.flac must be", tts.clone, tmp_path / "cut.flac", "text")
    tone(tmp_path / "ref.wav")
    refused(ValueError, "text must be what is said in", tts.clone, tmp_path / "ref.wav", " \x00")
    refused(FileNotFoundError, "must be a file, got none", Voice.load, tmp_path / "no.safetensors")
    refused(ValueError, "must be a voice that was saved", Voice.load, tmp_path / "ref.wav")
    with pytest.raises(OSError):
        a_voice().save(tmp_path / "no" / "voice.safetensors")


def test_voices_that_do_not_fit(tts):
    refused(ValueError, "text must be what is said", Voice, "", torch.zeros(3, 4, dtype=torch.int32))
    for codes in (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32), torch.zeros(3, 0, dtype=torch.int32), [[1]]):
        refused(TypeError, "codes must be integers", Voice, "a", codes)
    refused(ValueError, "codes must be at least 0", Voice, "a", torch.tensor([[-1]]))
    refused(
        ValueError, "codes must be .N=3, T. below", tts.say, "Hi.", Voice("a", torch.zeros(4, 2, dtype=torch.int32))
    )
    refused(ValueError, "up to .40, 40, 40.; clone", tts.say, "Hi.", Voice("a", torch.full((3, 2), 40)))
    refused(TypeError, "reference must be a Voice, got str", tts.say, "Hi.", ["ref.wav"])
    refused(ValueError, "must fit the model's 4096 positions", tts.say, "Hi.", a_voice(4090))


@pytest.mark.parametrize("text", ["", " \n", "\x00\x07", "🙂🚀", "\ud800"])
def test_texts_with_nothing_to_speak(text, tts):
    refused(ValueError, "text must have something to speak", tts.say, text)
    refused(ValueError, "text must have something to speak", tts.stream, text)  # at once, not at the first chunk


def test_other_arguments(tts):
    refused(TypeError, "text must be a str, got bytes", tts.say, b"Hi.")
    refused(ValueError, "max_seconds must be positive", tts.say, "Hi.", max_seconds=0)
    refused(ValueError, "must fit the model's 4096 positions", tts.say, "Hi.", max_seconds=200)
    with pytest.raises(ValueError, match="temperature must be"):
        tts.stream("Hi.", temperature=-1)
    with pytest.raises(ValueError, match="top_p must be"):
        tts.say("Hi.", top_p=2)
    refused(ValueError, "the model's 3 codebooks, got 4", Speech, tts.engine, tts.prompt.tokenizer, StandInCodec(4))


def test_missing_files_are_found_before_the_weights_are_read(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"directory must be a folder, got .*no, which does not exist"):
        Speech.from_checkpoint(tmp_path / "no")
    with pytest.raises(RuntimeError, match="device must be usable here, got xpu"):
        Speech.from_checkpoint(directory, device="xpu")
    for file in ("config.json", "special_tokens.json"):
        (tmp_path / file).write_bytes((directory / file).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"tokenizer.tiktoken must be in .*, got no such file; download it"):
        Speech.from_checkpoint(tmp_path)


def test_a_hundred_thousand_characters(tts):
    text = "A sentence, \x1b[1mof\x00 <|im_end|> words. " * 3000
    assert len(text) > 100_000
    chunks = tts.stream(text, seed=1, sampling=FREE)
    assert sum(len(chunk) for chunk in itertools.islice(chunks, 5)) > 0
    chunks.close()


def test_one_text_at_a_time(tts):
    chunks = tts.stream(LONG, seed=1, sampling=FREE)
    next(chunks)
    refused(RuntimeError, "one text must be spoken at a time", tts.say, "Hi.")
    chunks.close()
    assert tts.say("Hello there.", sampling=GREEDY).seconds > 0
    next(tts.stream(LONG, sampling=FREE))  # dropped, not closed
    assert tts.say("Hello there.", sampling=GREEDY).seconds > 0


def test_speech_without_an_end_is_reported_and_kept(endless):
    refused(IncompleteSpeech, "no end within 1.0 s in 'Hello.'", endless.say, "Hello.", sampling=FREE, max_seconds=1)
    with pytest.raises(IncompleteSpeech) as caught:
        endless.say("Hello.", seed=1, sampling=FREE, max_seconds=1)
    kept = caught.value.audio
    assert kept.codes.shape[1] == 22 and len(kept.samples) == 22 * FRAME_SAMPLES and caught.value.text == "Hello."
    chunks, heard = endless.stream("Hello.", seed=1, sampling=FREE, max_seconds=1), []
    with pytest.raises(IncompleteSpeech, match="no end") as caught:
        heard.extend(chunks)
    assert np.array_equal(np.concatenate(heard), kept.samples) and caught.value.audio is None
    with pytest.raises(IncompleteSpeech, match=r"no end within (5|6)\.\d s"):  # by the text alone
        endless.say("Hello.", seed=1, sampling=FREE)


def test_going_round_in_circles_is_reported(tts, monkeypatch):
    scripted(tts, monkeypatch, [1, 2, 3, 4] * 100)
    assert tts.say("Hello.").codes.shape[1] == 400
    scripted(tts, monkeypatch, [*range(20), *[1, 2, 3] * 100])
    with pytest.raises(IncompleteSpeech, match=r"the same sound for 6 s in .Hello\..") as caught:
        tts.say("Hello.")
    assert caught.value.audio.codes.shape[1] == 20 + 130


def test_hasty_speech_is_logged(tts, monkeypatch, caplog):
    scripted(tts, monkeypatch, range(30))  # 1.4 s
    with caplog.at_level("WARNING", "s1kernels"):
        tts.say("Some thirty letters of a text.")
        assert not caplog.records
        tts.say("Some ninety letters of a text, three times as many. " * 2)
    assert re.fullmatch(r"1.4 s are little for 'Some ninety letters .*': were words left out\?", caplog.messages[0])


def test_no_speech_at_all_is_reported(tts, monkeypatch):
    scripted(tts, monkeypatch, [])
    refused(IncompleteSpeech, "no speech at all in 'Hello.'", tts.say, "Hello.")
    with pytest.raises(IncompleteSpeech) as caught:
        tts.say("Hello.")
    assert caught.value.audio.seconds == 0 and caught.value.audio.codes.shape == (3, 0)
