"""`s1kernels doctor`: what it finds on machines of every kind, and what it says to do. Nothing here needs a GPU."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from s1kernels import cli, registry
from s1kernels.backends.cuda import driver, nvrtc, providers, shipped
from s1kernels.backends.cuda.driver import Attribute
from s1kernels.cli import demo, findings, selfcheck, toolchain
from s1kernels.registry import BackendError

SMALL = dict(
    demo.SMALL, vocab_size=4500, n_layer=1, dim=64, n_head=4, n_local_heads=2, head_dim=16, intermediate_size=96,
    n_fast_layer=1, fast_dim=64, fast_n_head=4, fast_n_local_heads=2, fast_head_dim=16, fast_intermediate_size=96,
)  # fmt: skip
ADA = {Attribute.MAJOR: 8, Attribute.MINOR: 9, Attribute.MULTIPROCESSORS: 128, Attribute.COOPERATIVE_LAUNCH: 1}


def named(section):
    return {found.name: found for found in section}


@pytest.fixture
def quick(monkeypatch):
    """Checks that take a moment."""
    monkeypatch.setattr(selfcheck, "OPS", {name: registry.OPS[name] for name in ("rms_norm", "linear_residual")})
    monkeypatch.setattr(demo, "SMALL", SMALL)
    monkeypatch.setattr(selfcheck, "SECONDS", 0.05)


@pytest.fixture
def machine(monkeypatch):
    """A machine with one RTX 4090, whose kernels the cubins serve; a test takes from it what it is about."""
    machine = SimpleNamespace(attributes=dict(ADA), offers={"compiled": "not built", "cubin": None, "nvrtc": None})
    monkeypatch.delenv("S1KERNELS_CUDA_PROVIDER", raising=False)
    monkeypatch.setattr(driver, "driver", lambda: SimpleNamespace(version=(12, 8)))
    monkeypatch.setattr(driver, "gpus", lambda: ["RTX 4090"])
    monkeypatch.setattr(driver, "attribute", lambda index, which: machine.attributes.get(which, 0))
    monkeypatch.setattr(providers, "offers", lambda source, arch: machine.offers)
    monkeypatch.setattr(findings.gpu, "driver_version", lambda: "572.16")
    monkeypatch.setattr(findings, "_driver_models", lambda: {0: "WDDM"})
    return machine


@pytest.fixture
def no_driver(monkeypatch):
    def fail():
        raise BackendError("no NVIDIA driver: nvcuda.dll cannot be loaded")

    monkeypatch.setattr(driver, "driver", fail)


def test_it_reports_in_words_and_in_json(quick, capsys):
    status = cli.main(["doctor"])
    words = capsys.readouterr().out
    for title in ("software", "GPUs", "CUDA kernels", "compilers", "disk", "checks", "paste all of this into an issue"):
        assert title in words, title
    assert cli.main(["doctor", "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert list(report) == list(findings.SECTIONS)
    flat = [finding for section in report.values() for finding in section]
    assert status == any(finding["state"] == "problem" for finding in flat)
    assert all(finding["advice"] for finding in flat if finding["state"] == "problem")
    if registry.BACKENDS["cpu"]() is None and not torch.cuda.is_available():
        checks = {finding["name"]: finding["value"] for finding in report["checks"]}
        assert set(checks) == {"rms_norm by cpu", "linear_residual by cpu", "speed"}
        assert "times real time" in checks["speed"] and "right, error" in checks["rms_norm by cpu"]


def test_an_op_that_is_wrong_is_a_problem(quick, monkeypatch, capsys):
    name = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setitem(registry.OPS["rms_norm"].impls, name, registry.Impl(name, lambda *args: args[-1].zero_()))
    monkeypatch.setitem(registry.BACKENDS, name, lambda: None)
    monkeypatch.setattr(selfcheck, "time_frames", lambda device: (0.001, "a model"))
    assert cli.main(["doctor"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert f"problem rms_norm by {name} relative error" in words and "please report this" in words


def test_a_section_that_fails_is_a_finding(quick, monkeypatch, capsys):
    def fail():
        raise KeyError("surprise")

    monkeypatch.setattr(findings, "SECTIONS", {"disk": fail, "GPUs": lambda: [findings.Finding("a", "b [c]")]})
    assert cli.main(["doctor"]) == 1
    words = capsys.readouterr().out
    assert "KeyError: 'surprise'" in words and "b [c]" in words and "1 problem;" in words


def test_without_a_driver_nothing_is_a_problem(no_driver):
    assert [f.state for f in (*findings.gpus(), *findings.kernels())] == ["note", "note"]
    assert "nvcuda.dll" in findings.gpus()[0].value


def test_a_gpu_and_its_kernels(machine):
    found = named(findings.gpus())
    assert found["driver"].value == "572.16, for CUDA 12.8"
    assert found["cuda:0"].value == "RTX 4090, compute capability 8.9, 128 SMs"
    assert found["cuda:0 driver model"].value == "WDDM"
    assert found["cuda:0 time limit of kernels"].value == "none"
    assert found["cuda:0 cooperative launch"].value == "yes"
    assert found["cuda:0 programmatic dependent launch"].value.startswith("no: it needs compute capability 9.0")
    served = named(findings.kernels())
    assert served["cuda:0"].value == "cubin: every kernel"
    assert served["cuda:0, not compiled"].value == "not built"
    assert {f.state for f in [*found.values(), *served.values()]} == {"ok", "note"}


def test_kernels_of_several_providers_and_of_none(machine, monkeypatch):
    refusing = {"compiled": "not built", "cubin": "advance.89.cubin is damaged", "nvrtc": None}
    monkeypatch.setattr(providers, "offers", lambda source, arch: refusing if source == "advance" else machine.offers)
    values = [found.value for found in findings.kernels()]
    assert "nvrtc: advance" in values and any(value.startswith("cubin: attention_decode, ") for value in values)
    monkeypatch.setattr(providers, "offers", lambda source, arch: refusing | {"nvrtc": "NVRTC is not installed"})
    nobody = named(findings.kernels())["cuda:0"]
    assert nobody.value == "nobody: every kernel" and nobody.state == "problem"
    assert "advance.89.cubin is damaged; nvrtc: NVRTC is not installed" in nobody.advice
    monkeypatch.setenv("S1KERNELS_CUDA_PROVIDER", "ptx")
    assert findings.kernels()[0].state == "problem" and "got 'ptx'" in findings.kernels()[0].value


def test_a_provider_asked_for_that_cannot_serve_is_a_problem(machine, monkeypatch):
    monkeypatch.setenv("S1KERNELS_CUDA_PROVIDER", "compiled")
    nobody = named(findings.kernels())["cuda:0"]
    assert nobody.state == "problem" and nobody.advice == "compiled: not built"


def test_an_old_gpu_is_a_problem(machine):
    machine.attributes |= {Attribute.MAJOR: 6, Attribute.MINOR: 1}
    found = named(findings.gpus())["cuda:0"]
    assert found.state == "problem" and "7.5 or later" in found.advice


def test_a_torch_that_does_not_see_the_gpu_is_a_problem(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    found = named(findings.software())["torch"]
    assert found.state == "problem" and "without CUDA" in found.value and "a CUDA build of torch" in found.advice
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = named(findings.software())["torch"]
    assert found.state == "problem" and "finds no GPU" in found.value and "nvidia-smi" in found.advice


def test_a_torch_without_cuda_is_right_where_there_is_no_driver(no_driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert named(findings.software())["torch"].state == "ok"


@pytest.mark.parametrize(
    ("registry_values", "said", "state"),
    [
        ({}, "the GPU is reset after 2 s", "ok"),
        ({"TdrDelay": 10}, "the GPU is reset after 10 s", "ok"),
        ({"TdrDelay": 1}, "the GPU is reset after 1 s", "note"),
        ({"TdrLevel": 0}, "off", "ok"),
    ],
)
def test_windows_time_limit_and_open_questions(machine, monkeypatch, registry_values, said, state):
    class Key:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def query(key, name):
        if name not in registry_values:
            raise FileNotFoundError(name)
        return registry_values[name], 4

    fake = SimpleNamespace(HKEY_LOCAL_MACHINE=0, OpenKey=lambda root, path: Key(), QueryValueEx=query)
    monkeypatch.setitem(sys.modules, "winreg", fake)
    monkeypatch.setattr(findings, "WINDOWS", True)
    monkeypatch.setattr(shipped, "find", lambda source, arch: ({"file": "advance.89.cubin"}, b"code"))
    monkeypatch.setattr(driver, "Module", lambda code, index, origin: None)
    limit = named(findings.gpus())["TDR"]
    assert (limit.value, limit.state) == (said, state) and bool(limit.advice) == (state != "ok")
    answers = named(findings.unverified())
    assert answers["cuda:0, cooperative launch under WDDM"].value == "yes"
    assert answers["cuda:0, the driver loads a shipped cubin"].value == "yes: advance.89.cubin"
    assert answers["launches go through"].value in ("ctypes", "s1kernels._C")

    def refuse(code, index, origin):
        raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    monkeypatch.setattr(driver, "Module", refuse)
    assert "NO_BINARY" in named(findings.unverified())["cuda:0, the driver loads a shipped cubin"].value


def test_open_questions_are_windows_own(monkeypatch):
    monkeypatch.setattr(findings, "WINDOWS", False)
    assert findings.unverified() == []


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("S1KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    assert findings.disk()[0].value == f"{tmp_path / 'cache'}: 0 compiled sources, 0.0 MB"
    tmp_path.joinpath("file").write_text("")
    monkeypatch.setenv("S1KERNELS_CACHE_DIR", str(tmp_path / "file/cache"))
    (found,) = findings.disk()
    assert found.state == "note" and "cannot be written" in found.value and "S1KERNELS_CACHE_DIR" in found.advice


def test_every_nvrtc_is_listed_with_what_is_wrong_with_it(monkeypatch, machine):
    class Broken(nvrtc.Nvrtc):
        failure = "NVRTC 12.8 cannot compile: no builtins"

        def __init__(self):
            pass

    monkeypatch.setattr(nvrtc, "found", lambda: iter(["a.dll does not load (locked)", Broken()]))
    found = [f for f in findings.compilers() if f.name == "NVRTC"]
    assert [f.value for f in found] == ["a.dll does not load (locked)", Broken.failure]
    assert {f.state for f in found} == {"note"}
    monkeypatch.setattr(nvrtc, "found", lambda: iter([]))
    monkeypatch.setattr(shipped, "FOLDER", Path("nowhere"))
    assert "nvrtc-cu12" in named(findings.compilers())["NVRTC"].advice


@pytest.mark.parametrize(
    ("cuda", "studio", "fits"),
    [
        ((12, 8), 17, True), ((12, 8), 15, True), ((12, 8), 18, False), ((13, 0), 15, False), ((13, 0), 16, True),
        ((13, 1), 18, False), ((13, 2), 18, True), ((13, 5), 17, True),
    ],
)  # fmt: skip
def test_which_visual_studio_a_cuda_takes(cuda, studio, fits):
    wrong = toolchain.mismatch(cuda, studio)
    assert (wrong is None) == fits
    assert fits or f"CUDA {cuda[0]}.{cuda[1]} takes Visual Studio 20" in wrong


def test_visual_studio_and_nvcc_that_do_not_fit_are_told(monkeypatch, tmp_path):
    installer = tmp_path / "Microsoft Visual Studio/Installer"
    installer.mkdir(parents=True)
    installer.joinpath("vswhere.exe").write_text("")
    bin_folder = tmp_path / "cuda/bin"
    bin_folder.mkdir(parents=True)
    nvcc = bin_folder / ("nvcc.exe" if sys.platform == "win32" else "nvcc")
    nvcc.write_text("")
    nvcc.chmod(0o755)
    installed = [
        {"installationPath": "C:/VS/2022", "installationVersion": "17.14.36310.24"},
        {"installationPath": "C:/VS/2026", "installationVersion": "18.0.1"},
    ]

    def output(command):
        said = "Cuda compilation tools, release 13.1, V13.1.80"
        return json.dumps(installed) if command[0].endswith("vswhere.exe") else said

    monkeypatch.setattr(toolchain, "WINDOWS", True)
    monkeypatch.setattr(toolchain, "_output", output)
    monkeypatch.setenv("ProgramFiles(x86)", str(tmp_path))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    studios = toolchain.visual_studios()
    assert [(s.path, s.version[0]) for s in studios] == [("C:/VS/2026", 18), ("C:/VS/2022", 17)]
    found = [f for f in findings.compilers() if f.name == "Visual Studio"]
    assert [f.state for f in found] == ["note", "ok"]
    assert "CUDA 13.1 takes Visual Studio 2019 to 2022, not 2026" in found[0].value and found[0].advice


def test_without_a_toolkit_nothing_is_wrong(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    found = named(findings.compilers())["nvcc"]
    assert (found.value, found.state) == ("none", "ok")
