"""The benches run end to end on a CPU, on a small model, and say why they leave out what needs a GPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import TINY

from s1kernels import registry
from s1kernels.bench import ops, timing
from s1kernels.cli import demo

BENCH = Path(__file__).resolve().parents[1] / "bench"
SECONDS = {"upstream": 3e-3, "s1kernels": 1e-3}  # a frame, by a clock that is never late


@pytest.fixture
def bench(monkeypatch):
    """A module of bench/, by name, on a model that takes no time."""
    monkeypatch.setattr(demo, "SMALL", demo.SMALL | TINY)
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def run_frame(bench, monkeypatch, tmp_path):
    """bench_frame.py as a command -> its JSON. Runs are real, but their times are exact."""
    frame = bench("bench_frame")
    speak = frame.Bench.speak

    def timed(self, model, prompt, count, step=None):
        assert speak(self, model, prompt, count, step) > 0
        served = hasattr(type(model).forward_generate, "s1kernels")  # one model: it is patched while its class is
        return count * SECONDS["s1kernels" if served else "upstream"]

    def run(*arguments):
        path = tmp_path / "out" / "frame.json"
        small = "bench_frame.py --device cpu --small --skip compiled default-mode --json"
        command = [*small.split(), str(path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(frame.Bench, "speak", timed)
        frame.main()
        return json.loads(path.read_text(encoding="utf-8"))

    return run


def test_bench_frame_side_by_side(run_frame, monkeypatch, capsys):
    monkeypatch.setenv("S1KERNELS_COMMIT", "0123abc")
    result = run_frame("--cache", "64", "32", "--context", "0")
    rows = {(row["name"], row["rows"], row["cache"]): row for row in result["rows"]}
    assert set(rows) == {
        ("upstream eager", "all", 64), ("upstream eager", "all", 32), ("upstream captured", "all", 64),
        ("upstream compiled by default", "all", 64), ("upstream compiled", "all", 64),
        ("s1kernels", "all", 64), ("s1kernels graph", "all", 64), ("s1kernels persistent", "all", 64),
        ("s1kernels persistent", "semantic", 64), ("s1kernels packed", "all", 64), ("s1kernels packed", "semantic", 64),
        ("Triton, graph", "all", 64),
    }  # fmt: skip
    eager, ours = rows["upstream eager", "all", 64], rows["s1kernels", "all", 64]
    for row in (eager, ours, rows["upstream eager", "all", 32]):
        assert "refused" not in row and len(row["rounds"]) == 2
        assert row["fastest"] <= row["seconds_per_frame"] <= row["slowest"]
        assert row["seconds_per_frame"] == pytest.approx(SECONDS[row["name"].partition(" ")[0]])
        assert row["times_real_time"] == pytest.approx(2048 / 44100 / row["seconds_per_frame"])
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes_per_frame"] / row["seconds_per_frame"] / 1e9)
    assert ours["logit_error"] <= ours["upstream_logit_error"] == eager["logit_error"] < 0.05
    assert ours["times_faster_than"] == pytest.approx({f"upstream eager, cache {cache}": 3 for cache in (64, 32)})
    assert "--skip compiled" in rows["upstream compiled", "all", 64]["refused"]
    assert "CUDA" in rows["s1kernels persistent", "semantic", 64]["refused"]
    assert result["patch_to_first_frame"]["cpu"]["patch_to_first_frame"] > 0
    origin = result["provenance"]
    assert origin["commit"] == "0123abc" and origin["torch"] == torch.__version__
    assert origin["command"].endswith("--json frame.json --cache 64 32 --context 0")
    table = capsys.readouterr().out
    for text in ("ms/frame", "upstream eager", "s1kernels graph", "% of reads", "needs a CUDA device"):
        assert text in table


def test_bench_endurance_compares_runs(bench, monkeypatch, tmp_path, capsys):
    endurance, path = bench("bench_endurance"), tmp_path / "endurance.json"
    arguments = [
        "bench_endurance.py",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--small",
        "--frames",
        "5",
        "--run",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(path)])
    assert endurance.main() == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert (result["frames"], result["runs"], result["same"], result["persistent"]) == (6, 3, 3, False)

    generate, seeds = endurance.Engine.generate, iter(range(9))
    monkeypatch.setattr(
        endurance.Engine, "generate", lambda self, *given, seed: generate(self, *given, seed=next(seeds))
    )
    assert endurance.main() == 1
    assert "of 3 runs are the first's" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--beside", "--packed"])
def test_bench_endurance_needs_a_gpu_for(option, bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_endurance.py", "--device", "cpu", option])
    with pytest.raises(SystemExit):
        bench("bench_endurance").main()
    assert f"{option} needs a CUDA device, --device is cpu" in capsys.readouterr().err


def test_readme_has_the_results_numbers():
    done = subprocess.run(
        [sys.executable, str(BENCH / "readme_numbers.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout


def test_readme_that_drifts_is_noticed(bench, monkeypatch):
    numbers = bench("readme_numbers")
    text = "before\n<!-- ops: ops-cpu-2-cores.json -->\nfour times\n<!-- end -->\nafter\n"
    filled = numbers.fill(text)
    assert filled != text and filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    assert "four times" not in filled and numbers.fill(filled) == filled


def test_bench_frame_refuses_what_is_less_accurate(bench, run_frame, monkeypatch):
    """No number for logits that are worse than upstream's."""
    frame = bench("bench_frame")
    honest = frame.forced_logits

    def wrong(model, engine, prompt):
        return honest(model, engine, prompt) * (1 if engine is None else 1.5)

    monkeypatch.setattr(frame, "forced_logits", wrong)
    monkeypatch.setattr(frame.Bench, "startup", lambda self, cache: {})
    row = next(row for row in run_frame()["rows"] if row["name"] == "s1kernels")
    assert "is larger than upstream's" in row["refused"] and "seconds_per_frame" not in row


def run_benches(tmp_path, *arguments):
    """pytest in bench/ as a command -> what it says, and its JSON."""
    path = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cpu", "--benchmark-json",
         str(path), *arguments],
        capture_output=True, text=True, cwd=tmp_path, timeout=600,
        env={name: value for name, value in os.environ.items() if "XDIST" not in name}  # which would time nothing
        | {"COLUMNS": "200", "PYTHONPATH": os.pathsep.join([*sys.path, str(BENCH.with_name("tests"))])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_bench_ops_side_by_side(tmp_path):
    said, result = run_benches(
        tmp_path, str(BENCH / "bench_ops.py"), "--dtype", "float32", "-k", "s1_prompt or s1_fast_last"
    )
    rows = {(r["op"], r["case"], r["contender"]): r for r in (b["extra_info"] for b in result["benchmarks"])}
    cases = {("swiglu", "s1_prompt"), ("attention_decode", "s1_fast_last"), ("rms_norm", "s1_prompt")}
    native = set() if registry.BACKENDS["cpu"]() else {"cpu"}
    assert set(rows) == {(*case, name) for case in cases for name in {"eager", "library"} | native}
    for row in rows.values():
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / row["microseconds"] / 1e3)
        assert row["percent_of_read_bandwidth"] > 0 and row["error"] < 1e-5 and row["copies"] >= 1
    assert result["machine_info"]["provenance"]["torch"] == torch.__version__
    for text in ("rms_norm", "s1_fast_last", "x library", "% of reads"):
        assert text in said


def test_benches_of_systems(tmp_path):
    files = [str(BENCH / f"bench_{name}.py") for name in ("context", "rtf", "stack")]
    chosen = "not stack or (512/8/4/64 and step)"
    said, result = run_benches(tmp_path, "-p", "tiny_model", "--small", "-k", f"({chosen}) and not ONNX", *files)
    rows = [bench["extra_info"] for bench in result["benchmarks"]]
    measured = {(row["system"], row.get("context", row.get("characters", row.get("mode")))) for row in rows}
    systems = {row["system"] for row in rows}
    assert {"PyTorch eager"} < systems and any(name.startswith("s1kernels") for name in systems)
    assert {key for _, key in measured} == {0, 8, 12, "step"}
    for row in rows:
        assert row["error"] < 0.03 and (row.get("times_real_time") or row["positions_per_second"]) > 0
    reasons = {row["name"]: row["reason"] for row in result["refused"]}
    assert reasons["test_context[0-CUDA_graphs]"] == reasons["test_text[12-CUDA_graphs]"] == "it needs a CUDA device"
    assert reasons["test_stack[Simple_Transformer_512/8/4/64-step-CUDA graph]"] == "it needs a CUDA device"
    assert "a frame after 8 positions" in said


@pytest.mark.parametrize("ours", [True, False], ids=["a back end", "a library's call"])
def test_ops_that_are_wrong_are_not_timed(monkeypatch, ours):
    op = registry.OPS["swiglu"]

    def wrong(gate, up, out):
        out.copy_(torch.nn.functional.silu(gate) * up * 1.001)

    monkeypatch.setitem(registry.BACKENDS, "planted", lambda: None)
    monkeypatch.setitem(op.impls, "planted", registry.Impl("planted", wrong))
    contender = ops.Contender(op, "planted", wrong, ours)
    with pytest.raises(timing.Wrong, match="refused, for it is wrong"):
        ops.gate(contender, "odd", torch.float32, torch.device("cpu"))
    honest = ops.Contender(op, "library", ops.LIBRARY["swiglu"], False)
    assert ops.gate(honest, "odd", torch.float32, torch.device("cpu")) < 1e-6


def test_readme_has_a_gpus_ops_side_by_side(bench):
    def row(contender, us):
        rates = {"microseconds": us, "gigabytes_per_second": 12593.152 / us, "percent_of_read_bandwidth": 285.4 / us}
        return {"extra_info": {"op": "rms_norm_swiglu", "case": "s1_fast_pair", "contender": contender, **rates}}

    measured = [row("cuda", 8.3), row("library", 20.08), row("eager", 99.0)]
    said = bench("readme_numbers").kernels({"benchmarks": measured})
    assert said.splitlines()[2] == "| rms_norm_swiglu, fast pair | 8.30 · 1517 · 34 % | – | – | 20.1 · 627 · 14 % |"


def test_numbers_of_upstreams_step_stay_on_the_device(bench):
    with bench("upstream_step").NumbersStay():
        one, other, x = torch.tensor([1], dtype=torch.long), torch.tensor([2]), torch.ones(2, 2)
        assert torch.tensor([1], dtype=torch.long) is one and other.item() == 2
        x[0] = 3
        x[x < 2] = 0
    assert x.tolist() == [[3, 3], [0, 0]]


def test_compiled_contenders_are_plain_torch_calls(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    for op, case in ops.cases():
        if case in ("s1_fast_last", "s1_fast_pair", "s1_fast"):
            contender = ops._compiled(op)
            assert ops.gate(contender, case, torch.float32, torch.device("cpu")) < 1e-5
