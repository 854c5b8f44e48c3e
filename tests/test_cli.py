"""The command line, as a user calls it, and upstream's scripts served through it."""

import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import upstream_models
from fish_speech.models.text2semantic import inference

import s1kernels
from s1kernels import cli, fish_speech, registry
from s1kernels.cli import demo


def call(*arguments, cwd=None):
    """`python -m s1kernels ...` in a fresh process."""
    command = [sys.executable, "-P", "-m", "s1kernels", *arguments] if sys.version_info >= (3, 11) else None
    command = command or [sys.executable, "-c", "from s1kernels.cli import main; raise SystemExit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


def test_info_in_words_and_in_json():
    words = call("info")
    assert words.returncode == 0, words.stderr
    for text in ("platform", "torch", "build", "compiler", "attention back ends", *registry.OPS):
        assert text in words.stdout, text
    facts = json.loads(call("info", "--json").stdout)
    assert facts["s1kernels"] == s1kernels.__version__
    assert facts["platform"]["wsl"] in (True, False)
    assert set(facts["ops"]["cpu"]) == set(registry.OPS)
    assert facts["build"]["native"] or facts["build"]["reason"]
    assert facts["backends"]["reference"] == "available"


def test_verify_runs_the_contract_and_fails_when_it_must(monkeypatch, capsys):
    assert cli.main(["verify", "--op", "linear_residual", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    outcomes, device = result["outcomes"], "cuda" if torch.cuda.is_available() else "cpu"
    backends = {name for name in registry.ORDER[device] if registry.BACKENDS[name]() is None}
    assert result["device"] == device and {o["backend"] for o in outcomes} == backends
    assert bool(result["gpu"]) == (device == "cuda") and len({o["offset"] for o in outcomes}) == 1 + bool(result["gpu"])
    assert all(o["complaint"] is None and o["error"] <= o["tolerance"] for o in outcomes)

    wrong = registry.Impl("reference", lambda *args: args[-1].zero_())
    monkeypatch.setitem(registry.OPS["linear_residual"].impls, "reference", wrong)
    assert cli.main(["verify", "--op", "linear_residual", "--backend", "reference"]) == 1
    printed = capsys.readouterr()
    assert "FAILED linear_residual by reference" in printed.err
    assert "1 (op, back end) pairs ran" in printed.out


def test_verify_of_a_back_end_that_is_not_there_says_why(monkeypatch, capsys):
    monkeypatch.setitem(registry.BACKENDS, "cpu", lambda: "no compiler was found")
    assert cli.main(["verify", "--backend", "cpu"]) == 2
    assert "cannot run here: no compiler was found" in capsys.readouterr().err


def test_verify_names_what_a_back_end_refuses(monkeypatch, capsys):
    impl = registry.OPS["swiglu"].impls["reference"]

    def supports(gate, up):
        return "no half precision" if gate.dtype == torch.float16 else None

    monkeypatch.setitem(registry.OPS["swiglu"].impls, "reference", registry.Impl("reference", impl.run, supports))
    assert cli.main(["verify", "--op", "swiglu", "--backend", "reference", "--device", "cpu"]) == 0
    checks = len(registry.OPS["swiglu"].cases)
    words = " ".join(capsys.readouterr().out.split())
    assert f"on cpu, {2 * checks} checks" in words
    assert f"{checks} checks did not run, swiglu by reference: no half precision" in words


def test_verify_finds_a_device_for_a_back_end(capsys):
    assert cli.main(["verify", "--backend", "cpu", "--device", "cuda"]) == 2
    assert re.search("serves no cuda tensors|needs a GPU", capsys.readouterr().err)
    if registry.BACKENDS["cpu"]() is None:
        assert cli.main(["verify", "--backend", "cpu", "--op", "swiglu"]) == 0
        assert "ran on cpu" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["verify", "demo"])
def test_a_gpu_that_is_not_there_is_an_error(command, capsys):
    assert cli.main([command, "--device", "cuda"]) == 2
    assert f"s1kernels {command}: --device cuda needs a GPU: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_demo_times_upstream_against_patched(dtype, device, monkeypatch, capsys):
    tiny = dict(
        vocab_size=4500, n_layer=2, dim=64, n_head=4, n_local_heads=2, head_dim=16, intermediate_size=96, n_fast_layer=1
    )
    fast = dict(fast_dim=64, fast_n_head=4, fast_n_local_heads=2, fast_head_dim=16, fast_intermediate_size=96)
    monkeypatch.setattr(demo, "SMALL", demo.SMALL | tiny | fast)
    command = ["demo", "--small", "--context", "12", "--frames", "16", "--cache", "64", "--device", device]
    assert cli.main([*command, "--dtype", dtype, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "small model" in result["model"] and result["dtype"] == dtype
    assert result["agrees"] and result["logit_error"]["patched"] <= max(result["logit_error"]["unpatched"], 1e-5)
    assert set(result["seconds_per_frame"]) == {"unpatched", "patched"} and len(result["speedup_rounds"]) == demo.ROUNDS
    assert result["device"] == device and set(result["gpu"]) >= (
        {"name", "driver", "provider"} if device == "cuda" else set()
    )
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    for text in ("ms/frame", "frames/s", "times real time", "GB/s", "unpatched", "patched", "agree"):
        assert text in table


@pytest.mark.parametrize("spoiled", [1, demo.TRIES])
def test_demo_claims_nothing_that_noise_made(spoiled, monkeypatch):
    module, prompt = SimpleNamespace(tqdm=iter), torch.zeros(11, 3)
    module.generate = lambda max_new_tokens, **_: torch.zeros(11, 3 + max_new_tokens)
    taken = [1, *[1, 0.5] * spoiled, 1, 3]  # a long run that takes half as long as the short one is measured again
    clock = iter([time for seconds in taken for time in (0, seconds)])
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    if spoiled < demo.TRIES:
        assert demo._time_frames(module, None, prompt, 4) == 0.5
    else:
        with pytest.raises(RuntimeError, match="raise --frames"):
            demo._time_frames(module, None, prompt, 4)


def test_demo_times_a_run_that_went_to_its_end(monkeypatch):
    """A seed with which the end token comes early is no measurement."""
    module, prompt, seeds = SimpleNamespace(tqdm=iter), torch.zeros(11, 3), []

    def generate(max_new_tokens, **_):
        seeds.append(torch.initial_seed())
        short = seeds[-1] == demo.SEEDS[0] or max_new_tokens > 10
        return torch.zeros(11, 3 + max_new_tokens - int(short))

    module.generate = generate
    clock = itertools.count()
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock) ** 2)
    assert demo._time_frames(module, None, prompt, 4) > 0
    assert seeds == [*demo.SEEDS[:2]] * 3
    with pytest.raises(RuntimeError, match="the model ended before 12 frames"):
        demo._time_frames(module, None, prompt, 10)


def test_demo_refuses_a_context_that_does_not_fit(capsys):
    assert cli.main(["demo", "--context", "600"]) == 2
    assert "must be at most --cache=512" in capsys.readouterr().err


def test_unknown_commands_and_options_are_refused(capsys):
    for arguments in (["sing"], ["verify", "--op", "attention"], []):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 2
    assert "attention_decode" in capsys.readouterr().err


def test_install_patches_what_init_model_returns(monkeypatch):
    """Upstream's worker thread looks init_model up when it starts: what it loads speaks through the engine."""
    original = inference.init_model
    model = upstream_models.build()
    expected = upstream_models.generate(model, frames=12)
    monkeypatch.setattr(inference, "init_model", lambda *args, **kwargs: (model, inference.decode_one_token_ar))
    fish_speech.install()
    fish_speech.install(backend="reference")  # again: the new back end applies, nothing is wrapped twice
    loaded, step = inference.init_model("checkpoint", "cpu", torch.float32)
    assert loaded is model and callable(step)
    assert s1kernels.engine_of(model).backends["attention_decode"] == "reference"
    assert torch.equal(upstream_models.generate(model, frames=12), expected)
    s1kernels.unpatch(model)
    fish_speech.uninstall()
    assert not hasattr(inference.init_model, "__wrapped__")
    monkeypatch.undo()
    assert inference.init_model is original


SCRIPT = """
import sys
import torch
import upstream_models
from fish_speech.models.text2semantic.inference import *

def init_model(path):
    return upstream_models.build(), decode_one_token_ar

def main():
    model, _ = init_model(sys.argv[1])
    codes = upstream_models.generate(model, frames=12, module=sys.modules["fish_speech.models.text2semantic.inference"])
    print(codes.tolist())

if __name__ == "__main__":
    main()
"""


def test_run_serves_a_script_that_defines_its_own_loader(tmp_path, monkeypatch):
    script = tmp_path / "speak.py"
    script.write_text(textwrap.dedent(SCRIPT))
    here = str(Path(upstream_models.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    plain = subprocess.run([sys.executable, script, "x"], capture_output=True, text=True, cwd=tmp_path)
    served = call("run", str(script), "x", cwd=tmp_path)
    assert served.returncode == 0, served.stderr
    assert served.stdout == plain.stdout and "[[" in plain.stdout
    assert "patched DualARTransformer" in served.stderr and "patched" not in plain.stderr


def test_run_serves_upstreams_own_script(tmp_path):
    """Upstream's inference.py as a script: its own --help, and its own error for a missing checkpoint."""
    shown = call("run", inference.__file__, "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "--checkpoint-path" in shown.stdout
    failed = call("run", inference.__file__, "--checkpoint-path", str(tmp_path), "--device", "cpu", cwd=tmp_path)
    assert failed.returncode != 0 and "config.json" in failed.stderr


def test_run_of_a_missing_script_says_so(capsys):
    assert cli.main(["run", "nowhere.py"]) == 2
    assert "script must be a Python file, got nowhere.py" in capsys.readouterr().err


def test_demo_of_a_missing_checkpoint_says_so(capsys):
    assert cli.main(["demo", "--checkpoint", "nowhere"]) == 2
    assert "--checkpoint must be a directory, got nowhere" in capsys.readouterr().err
