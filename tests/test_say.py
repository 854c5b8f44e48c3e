"""`s1kernels say`: text in, a sound file or a player's samples out."""

import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import codec_models
import numpy as np
import pytest
import soundfile
import torch
from speech_files import FRAME_SAMPLES, SAMPLE_RATE, StandInCodec, StandInStream, save_s1

from s1kernels import Speech, cli
from s1kernels.speech import speech
from s1kernels.speech.codec import Settings

TEXT = "It's 12:30, isn't it?"
CLOSING = re.compile(
    r"(\d+\.\d\d) s of speech in (\S+); first audio after \d+ ms, RTF \d+\.\d+, \d+\.\d+ times real time, "
    r"\d+\.\d frames/s\n"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_s1(tmp_path_factory.mktemp("says"))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(speech, "load_codec", lambda *_: StandInCodec())


@pytest.fixture
def say(directory, capsys):
    """Run the command; returns its status and what it wrote to stderr."""

    def run(*arguments):
        given = ["--checkpoint", directory, "--device", "cpu", "--seed", 3, "--temperature", 1, "--top-p", 1]
        status = cli.main(["say", *map(str, [*given, *arguments])])
        return status, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def expected(directory):
    """The samples of TEXT."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech, "load_codec", lambda *_: StandInCodec())
        tts = Speech.from_checkpoint(directory, device="cpu")
    return tts.say(TEXT, seed=3, temperature=1, top_p=1).samples


def read(path):
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == SAMPLE_RATE and samples.ndim == 1
    return samples


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_a_file(suffix, say, expected, tmp_path):
    path = tmp_path / f"out{suffix}"
    status, told = say(TEXT, "-o", path)
    seconds, where = CLOSING.search(told).groups()
    assert status == 0 and where == str(path) and float(seconds) == round(len(expected) / SAMPLE_RATE, 2)
    samples = read(path)
    assert len(samples) == len(expected)
    assert suffix == ".ogg" or np.abs(samples - expected).max() < 1e-4


def test_what_the_closing_line_says(say, monkeypatch, tmp_path):
    push = StandInStream.push

    def slow(self, codes):
        time.sleep(0.05)
        return push(self, codes)

    monkeypatch.setattr(StandInStream, "push", slow)
    _, told = say(TEXT, "-o", tmp_path / "out.wav")
    numbers = r"([\d.]+) s of .* after (\d+) ms, RTF ([\d.]+), ([\d.]+) times real time, ([\d.]+) frames/s"
    seconds, first, factor, times, rate = map(float, re.search(numbers, told).groups())
    assert 50 <= first < 1000 * factor * seconds - 100  # the other chunks came later
    assert factor * times == pytest.approx(1, rel=0.05) and rate == pytest.approx(times * 21.533, rel=0.05)


def test_text_from_a_file_or_from_standard_input(say, expected, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_bytes(f"\n{TEXT}\r\n".encode())
    assert say("--file", tmp_path / "text.txt", "-o", tmp_path / "a.wav")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert say("-o", tmp_path / "b.wav")[0] == 0
    for name in ("a.wav", "b.wav"):
        assert np.abs(read(tmp_path / name) - expected).max() < 1e-4


def test_samples_for_a_player(directory, expected, capsysbinary):
    given = ["say", TEXT, "--stream", "--checkpoint", str(directory), "--device", "cpu", "--seed", "3"]
    assert cli.main([*given, "--temperature", "1", "--top-p", "1"]) == 0
    played = np.frombuffer(capsysbinary.readouterr().out, "<i2")
    assert len(played) == len(expected) and np.abs(played / 32767 - expected).max() < 1e-4


def test_an_interrupt_leaves_what_was_spoken(say, expected, monkeypatch, tmp_path):
    push, pushed = StandInStream.push, []

    def interrupted(self, codes):
        pushed.append(codes)
        if len(pushed) == 3:
            signal.raise_signal(signal.SIGINT)
        return push(self, codes)

    monkeypatch.setattr(StandInStream, "push", interrupted)
    status, told = say(TEXT, "-o", tmp_path / "out.wav")
    samples = read(tmp_path / "out.wav")
    assert status == 130 and f"interrupted: {len(samples) / SAMPLE_RATE:.2f} s of speech in" in told
    assert len(samples) == (4 + 8) * FRAME_SAMPLES < len(expected)
    assert np.abs(samples - expected[: len(samples)]).max() < 1e-4


def test_an_interrupt_before_the_first_sound_leaves_nothing(say, monkeypatch, tmp_path):
    monkeypatch.setattr(StandInStream, "push", lambda *_: signal.raise_signal(signal.SIGINT))
    status, told = say(TEXT, "-o", tmp_path / "out.wav")
    assert status == 130 and told.endswith("interrupted: 0.00 s of speech\n") and not list(tmp_path.iterdir())


def test_speech_without_an_end_is_told_and_kept(say, tmp_path):
    status, told = say(TEXT, "-o", tmp_path / "out.wav", "--max-seconds", "0.5")
    assert status == 1 and "must speak a text to its end, got no end within 0.5 s" in told and CLOSING.search(told)
    assert len(read(tmp_path / "out.wav")) == 11 * FRAME_SAMPLES


def test_a_voice_is_cloned_saved_and_used_again(say, tmp_path):
    tone = 0.5 * np.sin(np.arange(2 * 22050) / 20)
    soundfile.write(tmp_path / "ref.wav", tone, 22050)
    saved = tmp_path / "voice.safetensors"
    cloning = ("--reference", tmp_path / "ref.wav", "--reference-text", "A tone.", "--save-voice", saved)
    assert say("Hello there.", "-o", tmp_path / "a.wav", *cloning)[0] == 0
    assert say("Hello there.", "-o", tmp_path / "b.wav", "--voice", saved)[0] == 0
    assert say("Hello there.", "-o", tmp_path / "c.wav")[0] == 0
    assert np.array_equal(read(tmp_path / "a.wav"), read(tmp_path / "b.wav"))
    assert not np.array_equal(read(tmp_path / "a.wav"), read(tmp_path / "c.wav"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TEXT], "the speech must go somewhere, got no output; give -o out.wav"),
        ([TEXT, "-o", "out.mp3"], "must end in one of .wav, .flac, .ogg, got '.mp3'"),
        ([TEXT, "-o", "no/out.wav"], "No such file or directory: 'no/out.wav'"),
        ([TEXT, "-o", "folder.wav"], "Is a directory: 'folder.wav'"),
        (["🙂 ", "-o", "out.wav"], "the text must have something to speak, got '🙂 '"),
        ([TEXT, "--file", "latin.txt", "-o", "out.wav"], "the text must come from one place, got two"),
        (["--file", "latin.txt", "-o", "out.wav"], "latin.txt must be UTF-8, got"),
        (["--file", "no.txt", "-o", "out.wav"], "No such file or directory: 'no.txt'"),
        ([TEXT, "-o", "out.wav", "--reference", "a.wav"], "--reference and --reference-text must be given together"),
        ([TEXT, "-o", "out.wav", "--save-voice", "v.safetensors"], "--save-voice must come with --reference"),
        ([TEXT, "-o", "out.wav", "--voice", "no.safetensors"], "no.safetensors must be a file, got none"),
        (
            [TEXT, "-o", "out.wav", "--reference", "a.wav", "--reference-text", "A.", "--voice", "v.safetensors"],
            "the voice must be --reference or --voice, got both",
        ),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_loaded(arguments, message, say, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    monkeypatch.setattr(Speech, "from_checkpoint", lambda *_, **__: pytest.fail("it was loaded"))
    status, told = say(*arguments)
    assert status == 2 and told.startswith("s1kernels say: ") and message in told and told.count("\n") == 1
    assert not (tmp_path / "out.wav").exists()


def test_what_fails_later_leaves_files_as_they_were(say, tmp_path):
    (tmp_path / "old.wav").write_bytes(b"something else")
    for name in ("old.wav", "new.wav"):
        status, told = say(TEXT, "-o", tmp_path / name, "--checkpoint", tmp_path / "no")
        assert status == 2 and "directory must be a folder, got" in told
    assert (tmp_path / "old.wav").read_bytes() == b"something else" and not (tmp_path / "new.wav").exists()
    status, told = say(TEXT, "-o", tmp_path / "new.wav", "--temperature", "-1")
    assert status == 2 and "temperature must be at least 0" in told and not (tmp_path / "new.wav").exists()


def test_a_checkpoint_directory_with_its_codec(capsys, monkeypatch, tmp_path):
    monkeypatch.undo()  # no stand-in
    sizes = dict(n_layer=1, n_head=1, dim=64, intermediate_size=64)
    model = codec_models.lively(codec_models.dac(Settings(), (64, 16, 16, 16), (512, 512), 1, 4, 32, sizes), seed=0)
    folder, out = save_s1(tmp_path / "whole", num_codebooks=4), tmp_path / "out.wav"
    given = ["say", TEXT, "-o", str(out), "--checkpoint", str(folder), "--device", "cpu", "--seed", "3"]
    given += ["--temperature", "1", "--top-p", "1"]
    assert cli.main(given) == 2
    assert re.search("codec.pth .*download it", capsys.readouterr().err) and not out.exists()
    torch.save(model.state_dict(), folder / "codec.pth")
    assert cli.main(given) == 0
    tts = Speech.from_checkpoint(folder, device="cpu")
    spoken = tts.say(TEXT, seed=3, temperature=1, top_p=1)
    known = torch.minimum(spoken.codes, torch.tensor(tts.codec.codebook_sizes)[:, None] - 1)
    with torch.inference_mode():
        theirs = model.decode(known[None], torch.tensor([known.shape[1]]))[0][0, 0].numpy()
    assert np.abs(read(out) - theirs).max() < 1e-4 and np.abs(theirs).max() > 0.01
    other = save_s1(tmp_path / "other", num_codebooks=3)
    torch.save(model.state_dict(), other / "codec.pth")
    with pytest.raises(ValueError, match="codec must have the model's 3 codebooks, got 4; take both from one"):
        Speech.from_checkpoint(other, device="cpu")


def test_a_player_that_stops(directory, expected, tmp_path):
    script = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from speech_files import StandInCodec
from s1kernels import cli
from s1kernels.speech import speech
from s1kernels.speech.codec import Settings
speech.load_codec = lambda *_: StandInCodec()
raise SystemExit(cli.main(["say", {TEXT!r}, "--stream", "-o", {str(tmp_path / "out.wav")!r}, "--device", "cpu",
    "--checkpoint", {str(directory)!r}, "--seed", "3", "--temperature", "1", "--top-p", "1"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    told = process.stderr.read().decode()
    assert process.wait(60) == 0 and "the player stopped: " in told and "Error" not in told, told
    assert 0 < len(read(tmp_path / "out.wav")) < len(expected)
