"""`s1kernels demo --wav`, and the codec of drawn weights that it speaks through."""

import json
import sys

import codec_models
import numpy as np
import pytest
import soundfile
import torch
from speech_files import save_s1
from tiny_model import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from s1kernels import cli
from s1kernels.cli import demo, demo_wav
from s1kernels.speech.codec import Codec, Settings, seeded
from s1kernels.speech.codec.state import COMPUTED

DEMO = ["demo", "--device", "cpu", "--dtype", "float32", "--context", "12", "--frames", "16"]


@pytest.fixture
def unbuilt(monkeypatch):
    """Nothing is built."""

    def build(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr(demo, "build", build)


def test_noise_is_written_and_called_noise(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "SMALL", demo.SMALL | TINY)
    path = tmp_path / "noise.wav"
    assert cli.main([*DEMO, "--small", "--wav", str(path), "--json"]) == 0
    wav = json.loads(capsys.readouterr().out)["wav"]
    samples, rate = soundfile.read(path)
    assert rate == 44100 and len(samples) == round(rate * wav["sound_seconds"]) > 2048
    assert 0.01 < np.abs(samples).max() <= 1 and samples.std() > 0.01
    assert wav["file"] == "noise.wav" and wav["said"] == demo_wav.NOISE
    assert 0 < wav["first_sound_seconds"] < wav["seconds"]


def test_a_checkpoint_speaks_through_its_own_codec(monkeypatch, capsys, tmp_path):
    folder, path = save_s1(tmp_path / "published", end=0, num_codebooks=4), tmp_path / "said.flac"
    given = [*DEMO, "--checkpoint", str(folder), "--wav", str(path)]
    with monkeypatch.context() as patch:
        patch.setattr(demo, "build", lambda *_: pytest.fail("a model was built"))
        assert cli.main(given) == 2
    assert "codec.pth" in capsys.readouterr().err and not path.exists()
    sizes = dict(n_layer=1, n_head=1, dim=64, intermediate_size=64)
    model = codec_models.lively(codec_models.dac(Settings(), (64, 16, 16, 16), (512, 512), 1, 4, 32, sizes), seed=0)
    torch.save(model.state_dict(), folder / "codec.pth")
    assert cli.main(given) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "said.flac: " in said and "noise" not in said and len(soundfile.read(path)[0]) > 2048
    assert "no end within" in said  # this model draws none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wav", "{}/nowhere/noise.wav"], "No such file or directory"),
        (["--wav", "{}/noise.mp3"], "must end in one of .wav, .flac, .ogg"),
        (["--wav", "{}/noise.wav", "--cache", "64"], "--cache must be at least 384 for --wav, got 64"),
    ],
)
def test_an_output_that_cannot_be_is_found_first(arguments, message, unbuilt, capsys, tmp_path):
    assert cli.main([*DEMO, *(argument.format(tmp_path) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_missing_package_is_found_first(unbuilt, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert cli.main([*DEMO, "--wav", str(tmp_path / "noise.wav")]) == 2
    assert 'pip install "s1kernels[speech]"' in capsys.readouterr().err


def test_drawn_tensors_are_those_of_upstreams_codec():
    with torch.device("meta"):
        published = codec_models.build_full().state_dict()
    directions = {"weight_v": "weight", "parametrizations.weight.original1": "weight"}
    expected = {}
    for key, tensor in published.items():
        if not COMPUTED.search(key) and not key.endswith(("weight_g", "original0")):
            for direction, weight in directions.items():
                key = key.replace(direction, weight)
            expected[key] = tuple(tensor.shape)
    with FakeTensorMode():
        drawn = seeded.Drawn(seeded.Sizes(), torch.device("cpu"), torch.bfloat16)
        codec = Codec(drawn, Settings())
    assert drawn.shapes == expected and codec.frame_samples == 2048


def test_a_drawn_codec_is_the_same_each_time():
    codecs = [seeded.seeded(seeded.SMALL, torch.device("cpu"), torch.float32) for _ in range(2)]
    codes = codec_models.codes(12, sizes=codecs[0].codebook_sizes)
    first, second = (codec.decode(codes) for codec in codecs)
    assert torch.equal(first, second) and first.shape == (12 * 2048,)
    assert first.std() > 0.05 and (first.abs() > 0.99).float().mean() < 0.01  # heard, and not clipped
