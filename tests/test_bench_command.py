"""`s1kernels bench`: its gate, its comparison, its report, and what it says where something is missing."""

import copy
import importlib.util
import json
import re

import pytest
import torch
from tiny_model import TINY

from s1kernels.bench import compare, models, onnx, provenance, report, run, speech, stack, systems, timing
from s1kernels.bench import ops as bench_ops
from s1kernels.bench.runners import SAMPLING, EngineRunner, Model, TorchRunner
from s1kernels.cli import demo, main

CPU = torch.device("cpu")
LEAST = run.Settings(True, (0, 8), 2, 3, 64, (12,), 2, 1.0)

needs_matplotlib = pytest.mark.skipif(
    not importlib.util.find_spec("matplotlib"), reason="no matplotlib; install s1kernels[bench]"
)


@pytest.fixture
def tiny(monkeypatch):
    """A model that takes no time, and few of everything."""
    monkeypatch.setattr(demo, "SMALL", demo.SMALL | TINY)
    monkeypatch.setitem(run.SETTINGS, ("cpu", True), LEAST)
    monkeypatch.setattr(stack, "SIZES", [stack.Size("Simple Transformer", 32, 2, 2, 8)])
    monkeypatch.setattr(bench_ops, "ROTATED", {"cpu": 1 << 16})


@pytest.fixture
def frames(tiny):
    shape = models.config(True, 512)
    given = models.weights(shape, torch.float32, CPU)
    return systems.Frames(shape, given, [0, 8], ceiling=10.0, exported=64, frames=2, count=3, budget=1.0)


def row(seconds=1e-3, noise=0.02, **names):
    rounds = [seconds * (1 - noise), seconds, seconds * (1 + noise)]
    return {**names, **timing.summary(rounds)}


def result(scale=1.0, noise=0.02, **changes):
    """A result as the command writes it, without having measured."""
    at = {"context": 8, "times_real_time": 46.4 / scale, "frames_per_second": 1e3 / scale, "bytes": 10**6}
    shared = {"gigabytes_per_second": 1.0, "percent_of_read_bandwidth": 50.0, "error": 1e-3, "dtype": "bfloat16"}
    op = {"op": "swiglu", "case": "s1_prompt", "contender": "cpu"} | shared
    return {
        "kind": run.KIND, "model": "a model", "options": {"device": "cpu", "dtype": "bfloat16"},
        "provenance": provenance.collect(CPU), "read_bandwidth": {"gigabytes_per_second": 20.0, "by": "sum"},
        "bytes_per_frame": {"8": 10**6},
        "frames": [
            row(1e-3 * scale, noise, system="s1kernels, Linux", **at, **shared),
            {"system": "CUDA graphs", "context": 8, "refused": "it needs a CUDA device"},
        ],
        "ops": [row(1e-5, noise, **op)],
    } | changes  # fmt: skip


def test_a_planted_wrong_kernel_is_not_timed(frames):
    class Wrong(EngineRunner):
        def logits(self, frame, position):
            return super().logits(frame, position) * 1.001

    rows = []
    frames.measure(systems.System("planted", lambda device: None, Wrong), rows.append)
    assert [r["context"] for r in rows] == [0, 8]
    assert all("is larger than 1e-04, so it is not timed" in r["refused"] and "seconds" not in r for r in rows)
    frames.measure(systems.System("honest", lambda device: None, EngineRunner), rows.append)
    assert all(r["seconds"] > 0 and r["error"] < 1e-5 for r in rows[2:])


def test_a_system_that_fails_is_a_row_and_is_made_once(frames):
    tries, rows = [], []

    def fail(model):
        tries.append(model)
        raise OSError("no such library\nand a stack trace")

    frames.measure(systems.System("broken", lambda device: None, fail), rows.append)
    assert [r["refused"] for r in rows] == ["OSError: no such library"] * 2 and len(tries) == 1


def test_plain_torch_and_the_engine_decode_the_same_frames(frames):
    """Greedy: with noise of ones there is nothing to draw."""
    model, text = Model(frames.shape, frames.given, 512), frames.yardstick.text
    plain = TorchRunner(model, graph=False)
    plain.main_noise.exponential_ = plain.fast_noise.exponential_ = lambda: None
    plain.prefill(text[:, :8])
    assert plain.decode(text[:, 8:9], 8, 3, seed=0) == 3
    engine = EngineRunner(model, "reference").engine
    engine.prefill(text[:, :8])
    engine.decoder.noise.draw = lambda generator: None
    assert torch.equal(plain.tokens[0], list(engine.frames(text[:, 8:9], 8, 3, SAMPLING))[-1])


def test_the_systems_of_the_seed_are_all_rows():
    names = [system.name for system in systems.systems(CPU)]
    assert names == [
        "PyTorch eager", "CUDA graphs", "TensorRT through ONNX", "ONNX Runtime (CUDA)", "ONNX Runtime (CPU)",
        "Linux + Triton", "WSL2 + Triton", "s1kernels, Linux", "s1kernels, WSL2", "s1kernels, native Windows",
    ]  # fmt: skip
    refused = [system.refusal(CPU) for system in systems.systems(CPU) if "Triton" in system.name]
    assert all(refused)


def test_a_slowdown_is_flagged_and_noise_is_not():
    old = result()
    slower = {change.row: change for change in compare.compare(old, result(scale=1.2))}
    assert slower["frames: s1kernels, Linux 8"].verdict == "slower"
    assert slower["ops: swiglu s1_prompt cpu"].verdict == "same"
    assert [c.verdict for c in compare.compare(old, result(scale=1 / 1.2)) if "frames" in c.row] == ["faster"]
    assert not any(change.regression for change in compare.compare(old, result(scale=1.04)))
    assert not any(change.regression for change in compare.compare(old, result(scale=1.2, noise=0.2)))


def test_a_row_that_is_measured_no_more_is_a_regression():
    new = result()
    new["frames"][0] = {"system": "s1kernels, Linux", "context": 8, "refused": "it broke"}
    lost = [change for change in compare.compare(result(), new) if change.regression]
    assert [(change.verdict, change.reason) for change in lost] == [("lost", "it broke")]


def test_results_of_different_models_are_not_compared():
    with pytest.raises(ValueError, match="model must be the same in both results, got a model and another"):
        compare.compare(result(), result(model="another"))


@needs_matplotlib
@pytest.mark.parametrize(("scale", "status"), [(1.0, 0), (1.2, 1)], ids=["the same", "slower"])
def test_the_command_compares(tmp_path, monkeypatch, capsys, scale, status):
    monkeypatch.setenv("COLUMNS", "200")
    for name, value in (("old.json", result()), ("new.json", result(scale=scale))):
        (tmp_path / name).write_text(json.dumps(value))
    command = ["bench", "--merge", str(tmp_path / "new.json"), "--compare", str(tmp_path / "old.json")]
    assert main([*command, "--out", str(tmp_path / "report")]) == status
    assert f"{status} of 2 rows got slower" in capsys.readouterr().err


@needs_matplotlib
def test_a_report_merges_machines(tmp_path):
    windows = copy.deepcopy(result(scale=2.0))
    windows["provenance"]["platform"]["kind"] = "native Windows"
    windows["provenance"]["gpu"] = {"name": "NVIDIA <GPU>", "driver": "581.1", "driver_model.current": "WDDM"}
    windows["frames"][0]["system"] = "s1kernels, native Windows"
    windows["frames"][1] = row(2e-3, system="CUDA graphs", **{k: v for k, v in windows["frames"][0].items()
                               if k not in ("system", "seconds", "rounds", "fastest", "slowest")})  # fmt: skip
    page = report.write([result(), windows], tmp_path).read_text(encoding="utf-8")
    for text in ("NVIDIA &lt;GPU&gt;, native Windows", "581.1 WDDM", "s1kernels, Linux", "prefers-color-scheme: dark"):
        assert text in page
    assert "it needs a CUDA device" not in page  # one of the machines measured it
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href"))  # nothing from outside
    assert {path.name for path in tmp_path.glob("*.png")} == {"systems.png", "context.png", "ops.png"}


@needs_matplotlib
def test_results_of_a_machine_are_told_apart_by_their_commits(tmp_path):
    before, after = copy.deepcopy(result()), copy.deepcopy(result())
    before["provenance"]["commit"], after["provenance"]["commit"] = "a" * 40, "b" * 40
    machine = provenance.machine(before["provenance"])
    assert provenance.where(before, [before, before]) == machine
    assert provenance.where(before, [before, after]) == f"{machine}, commit aaaaaaa"
    page = report.write([before, after], tmp_path).read_text(encoding="utf-8")
    assert "commit aaaaaaa" in page and "commit bbbbbbb" in page


def test_parts_that_were_measured_one_by_one_become_one_result():
    first, second = result(), result()
    del first["ops"], second["frames"]
    second["provenance"]["command"] = "again"
    other = result(model="another")
    joined = run.join([first, other, second, result()])
    assert [r["model"] for r in joined] == ["a model", "another", "a model"]
    assert joined[0]["ops"] == second["ops"] and joined[0]["frames"] == first["frames"]
    assert joined[0]["provenance"]["command"].endswith("; again") and "ops" not in first


@needs_matplotlib
def test_the_command_measures_every_part(tiny, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["bench", "--quick", "--device", "cpu", "--ops", "swiglu", "rms_norm_qkv", "--json", "--out", str(out),
                 "--parts", *run.PARTS]) == 0  # fmt: skip
    found = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    assert found == json.loads(capsys.readouterr().out)
    assert {r["op"] for r in found["ops"]} == {"swiglu", "rms_norm_qkv"}
    assert {r["system"] for r in found["stack"]} == set(stack.SYSTEMS)
    assert len(found["frames"]) == 2 * len(list(systems.systems(CPU)))
    spoken = next(r for r in found["speech"] if r["system"] == "PyTorch eager")
    assert spoken["frames"] == speech.lengths(12)[1] == 18
    assert spoken["tokens_per_second"] == pytest.approx(4 * 18 / spoken["seconds"])
    measured = [r for part in run.PARTS for r in found[part] if "refused" not in r]
    assert all(r["fastest"] <= r["seconds"] <= r["slowest"] for r in measured)
    refused = [r for part in run.PARTS for r in found[part] if "refused" in r]
    assert refused and all(r["refused"] and "seconds" not in r for r in refused)
    stages = [r for r in found["stages"] if "refused" not in r]
    if stages:  # the native module is there
        whole = found["bytes_per_frame"]["8"]
        assert sum(r["bytes"] for r in stages) == pytest.approx(whole, rel=0.15)
    assert (out / "stages.png").exists() == bool(stages) and (out / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("matplotlib", [], r'matplotlib must be installed, .*; run `pip install "s1kernels\[bench\]"`'),
        ("", ["--ops", "nonsense"], r"--ops must be among .*got \['nonsense'\]"),
        ("", ["--merge", "{other}"], "other.json must be a bench.json of `s1kernels bench`"),
    ],
    ids=["no matplotlib", "an unknown op", "another file"],
)
def test_errors_say_what_to_do(monkeypatch, tmp_path, capsys, package, arguments, message):
    found = importlib.util.find_spec
    if not package and not found("matplotlib"):
        pytest.skip("no matplotlib; install s1kernels[bench]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name))
    other = tmp_path / "other.json"
    other.write_text("[]")
    given = [argument.format(other=other) for argument in arguments]
    assert main(["bench", "--device", "cpu", "--out", str(tmp_path / "report"), *given]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "report").exists()


def test_without_onnx_its_rows_name_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    reasons = [system.refusal(CPU) for system in systems.systems(CPU) if "ONNX" in system.name]
    assert len(reasons) == 3 and all('pip install "s1kernels[onnx]"' in reason for reason in reasons)


def test_a_provider_that_is_listed_but_does_not_load_is_passed_over(monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    if set(listed[:2]) & set(runtime.get_available_providers()):
        pytest.skip("this ONNX Runtime has it")
    monkeypatch.setattr(runtime, "get_available_providers", lambda: listed)
    refused = onnx.refusal("TensorrtExecutionProvider", torch.device("cuda"))
    assert refused == "TensorrtExecutionProvider does not load: ONNX Runtime fell back to CPUExecutionProvider"
    assert onnx.best(CPU) == "CPUExecutionProvider"
