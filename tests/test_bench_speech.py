"""The benches of whole pipelines run on a CPU, on a small model and codec, and their checks can fail."""

import json
import sys

import bench_speech
import bench_speech_memory
import pytest
import speech_pipelines
import torch
from tiny_model import TINY

from s1kernels.cli import demo
from s1kernels.testing import rel_error


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A bench as a command, with arguments -> what its main returns, its JSON."""
    monkeypatch.setattr(demo, "SMALL", demo.SMALL | TINY)
    monkeypatch.setenv("COLUMNS", "200")

    def run(module, *arguments):
        path = tmp_path / "out" / "result.json"
        command = [f"{module.__name__}.py", "--device", "cpu", "--dtype", "float32", "--small", "--json", str(path)]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        status = module.main()
        return status, json.loads(path.read_text(encoding="utf-8"))

    return run


def test_pipelines_side_by_side(bench, capsys):
    _, result = bench(bench_speech, "--characters", "12", "30", "--rounds", "2", "--skip-compiled")
    rows = {(row["name"], row.get("characters")): row for row in result["rows"]}
    assert set(rows) == {
        *((name, count) for name in ("s1kernels", "upstream eager") for count in (12, 30)), ("upstream compiled", None),
    }  # fmt: skip
    assert "--skip-compiled" in rows.pop(("upstream compiled", None))["refused"]
    for (name, characters), row in rows.items():
        assert row["sound"] == pytest.approx({12: 17, 30: 43}[characters] * 2048 / 44100)
        assert len(row["first"]["rounds"]) == len(row["all"]["rounds"]) == 2
        assert row["times_real_time"] == pytest.approx(row["sound"] / row["all"]["seconds"])
        assert 0 < row["codec_share"] == pytest.approx(row["codec_alone"]["seconds"] / row["all"]["seconds"])
        assert (row["first"] == row["all"]) == (name == "upstream eager")
    ours, theirs = rows["s1kernels", 30], rows["upstream eager", 30]
    ratios = {measure: theirs[measure]["seconds"] / ours[measure]["seconds"] for measure in ("first", "all")}
    assert ours["times_faster_than"] == {"upstream eager": pytest.approx(ratios)}
    assert not theirs["times_faster_than"] and set(result["memory"]) == {"s1kernels", "upstream eager"}
    table = capsys.readouterr().out
    for text in ("first sound ms", "x real time", "codec alone %", "x eager", "left out (--skip-compiled)"):
        assert text in table


def test_speech_that_is_cut_short_has_no_number(bench, monkeypatch):
    speak = speech_pipelines.Ours.speak
    monkeypatch.setattr(
        speech_pipelines.Ours, "speak", lambda self, characters, seed: speak(self, characters - 1, seed)
    )
    _, result = bench(bench_speech, "--characters", "12", "--rounds", "1", "--skip-compiled")
    assert "it must say 17 frames, got" in result["rows"][0]["refused"]


def test_both_pipelines_have_the_same_weights(monkeypatch):
    monkeypatch.setattr(demo, "SMALL", demo.SMALL | TINY)
    given = speech_pipelines.Given(True, torch.device("cpu"), torch.float32)
    ours, theirs = speech_pipelines.Ours(given, False), speech_pipelines.Upstream(given, False)
    codes = torch.arange(50).view(10, 5)
    assert rel_error(ours.sound(codes), theirs.sound(codes)) < 1e-5
    prompt = torch.cat([ours.tts.prompt.opening([given.voice]), ours.tts.prompt.turn("Hello.")], dim=1)
    ours.tts.engine.prefill(prompt[:, :-1])
    T = prompt.shape[1]
    logits = ours.tts.engine.slow_step(prompt[:, -1:], T - 1)[0]
    with torch.inference_mode():
        theirs.model.setup_caches(1, given.shape.max_positions, torch.float32)
        expected = theirs.model.forward_generate(prompt[None], torch.arange(T)).logits
    assert rel_error(logits.flatten(), expected.flatten()) < 1e-4


def test_memory_minute_by_minute(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench_speech_memory, "MINUTE", 4.0)
    monkeypatch.setattr(bench_speech_memory, "PART", 1.5)
    status, result = bench(bench_speech_memory, "--minutes", "3")
    assert [minute["minute"] for minute in result["minutes"]] == [1, 2, 3] and status == 1 - result["flat"]
    assert all(minute["host"] > 1e6 for minute in result["minutes"]) and result["sound_bytes"] == 8 * 44100 * 4

    for growth, flat in ((0.4, True), (0.6, False)):
        sizes = [int(growth * result["sound_bytes"] * look / 2) for look in range(3)]
        looks = iter([dict.fromkeys(bench_speech_memory.USES, size) for size in sizes])
        monkeypatch.setattr(bench_speech_memory, "in_use", lambda _, looks=looks: next(looks))
        status, again = bench(bench_speech_memory, "--minutes", "3")
        assert (status, again["flat"]) == (int(not flat), flat)
    assert "MEMORY GROWS" in capsys.readouterr().out
