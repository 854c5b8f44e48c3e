"""Where CUDA kernels come from: the three providers, NVRTC, the disk cache. Nothing here needs a GPU, but where it
says so."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from s1kernels.backends.cuda import cache, device, driver, nvrtc, providers, shipped, sources
from s1kernels.backends.cuda.launch import KERNELS
from s1kernels.backends.cuda.nvrtc import NvrtcError
from s1kernels.build_info import BuildInfo
from s1kernels.registry import BackendError

CUDA = torch.device("cuda", 0)
NO_GPU = providers.unavailable()
needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=f"no GPU: {NO_GPU}")


class FakeNvrtc:
    """An NVRTC of some version; what it "compiles" is told from the outside."""

    def __init__(self, version=(13, 0), archs=(75, 80, 86, 89, 90, 100, 120)):
        self.version, self.archs, self.compiled = version, archs, []

    target, failure = nvrtc.Nvrtc.target, None

    def __str__(self):
        return f"NVRTC {self.version[0]}.{self.version[1]} (a fake)"

    def compile(self, text, name, options):
        self.compiled.append((name, options))
        return nvrtc.Compiled(b"cubin of " + hashlib.sha256(text.encode()).digest(), "")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with one GPU and three providers that all can serve; a test takes from it what it is about."""
    machine = SimpleNamespace(nvrtc=FakeNvrtc(), loaded=[], kernels=["k_float16"])
    machine.info = BuildInfo(True, "", cuda="12.8", architectures=("8.6", "9.0"))

    class Module:
        def __init__(self, cubin, index, *, origin):
            machine.loaded.append((cubin, origin))

        def function(self, name):
            return 7

    stub = SimpleNamespace(cuda_kernels=lambda: machine.kernels, cuda_function=lambda name, index: 8)
    monkeypatch.setattr(device, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(driver, "driver", lambda: SimpleNamespace(version=(13, 0)))
    monkeypatch.setattr(driver, "context", lambda index: 1)
    monkeypatch.setattr(driver, "Module", Module)
    monkeypatch.setattr(driver, "Current", contextlib.nullcontext)
    monkeypatch.setattr(nvrtc, "found", lambda: iter([machine.nvrtc] if machine.nvrtc else []))
    monkeypatch.setattr(providers, "_C", stub)
    monkeypatch.setattr(providers, "build_info", lambda: machine.info)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "cubin")
    monkeypatch.setattr(shipped, "_warned", set())
    for name in ("_functions", "_loaded"):
        monkeypatch.setattr(providers, name, {})
    monkeypatch.setattr(providers, "_said", set())
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Fake GPU")
    monkeypatch.setenv("S1KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("S1KERNELS_CUDA_PROVIDER", raising=False)
    providers._nvrtc_refusal.cache_clear()
    ship(tmp_path / "cubin", dict(arch="9.0"))
    yield machine
    providers._nvrtc_refusal.cache_clear()


def ship(folder: Path, *entries: dict) -> None:
    """Put cubins of linear_residual into the package."""
    folder.mkdir(exist_ok=True)
    listed = []
    for entry in entries:
        arch = entry["arch"]
        code = f"code for {arch}".encode()
        number, ptx = int(arch.removesuffix("+PTX").replace(".", "")), arch.endswith("+PTX")
        file = f"lr.{number}.{'ptx' if ptx else 'cubin'}"
        folder.joinpath(file).write_bytes(code)
        made_from = {"source": "linear_residual", "source_digest": sources.source("linear_residual").digest}
        made_by = {"options": sources.options(number, ptx=ptx), "nvrtc": "12.8"}
        listed.append({"file": file, "digest": hashlib.sha256(code).hexdigest(), **made_from, **made_by, **entry})
    folder.joinpath("manifest.json").write_text(json.dumps(listed))


def serving() -> str:
    return providers.provider("linear_residual", torch.float16, CUDA)


def function() -> int:
    return providers.function("linear_residual", "k", torch.float16, CUDA)


def test_the_order_is_compiled_cubin_nvrtc(machine, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="s1kernels")
    assert serving() == "compiled" and function() == 8
    machine.kernels = []
    assert serving() == "cubin"
    monkeypatch.setattr(providers, "_functions", {})  # what was found is kept
    assert function() == 7 and machine.loaded == [(b"code for 9.0", "lr.90.cubin")]
    shutil.rmtree(shipped.FOLDER)
    monkeypatch.setattr(providers, "_functions", {})
    assert serving() == "nvrtc" and function() == function() == 7
    assert machine.nvrtc.compiled == [
        ("linear_residual.cu", ["--gpu-architecture=sm_90", "--std=c++17", "-DS1_DTYPES=4"])
    ]
    said = [record.message for record in caplog.records]
    assert said == [
        "CUDA kernels for cuda:0 (Fake GPU, sm_90): compiled (s1kernels._C, by CUDA 12.8)",
        "CUDA kernels for cuda:0 (Fake GPU, sm_90): cubin (shipped for 9.0, by NVRTC 12.8)",
        "CUDA kernels for cuda:0 (Fake GPU, sm_90): nvrtc (NVRTC 13.0 (a fake))",
    ]
    machine.nvrtc = None
    providers._nvrtc_refusal.cache_clear()
    with pytest.raises(BackendError, match=r"(?s)linear_residual.*9.0: compiled: not built.*cubin: .*nvrtc: .*install"):
        serving()


@pytest.mark.parametrize("name", ["compiled", "cubin", "nvrtc"])
def test_a_provider_asked_for_serves_or_raises(machine, monkeypatch, name):
    with providers.use_provider(name):
        assert serving() == name
    monkeypatch.setenv("S1KERNELS_CUDA_PROVIDER", name)
    assert serving() == name
    machine.kernels, machine.nvrtc = [], None
    shutil.rmtree(shipped.FOLDER)
    providers._nvrtc_refusal.cache_clear()
    with pytest.raises(BackendError, match=f"linear_residual.*: {name}: ") as error:
        function()
    assert not [other for other in providers.PROVIDERS if other != name and f"{other}:" in str(error.value)]


def test_an_unknown_provider_is_refused(machine, monkeypatch):
    with pytest.raises(ValueError, match="provider must be auto or one of compiled, cubin, nvrtc, got 'ptx'"):
        providers.use_provider("ptx").__enter__()
    monkeypatch.setenv("S1KERNELS_CUDA_PROVIDER", "ptx")
    with pytest.raises(ValueError, match="S1KERNELS_CUDA_PROVIDER must be auto or one of"):
        serving()


@pytest.mark.parametrize(
    ("built", "gpu", "runs"),
    [
        (("8.6",), (8, 6), True),
        (("8.6",), (8, 9), True),
        (("8.9",), (8, 6), False),
        (("8.6",), (9, 0), False),
        (("8.6+PTX",), (12, 0), True),
        (("8.6", "12.0+PTX"), (9, 0), False),
        (("12.0",), (12, 1), True),
        ((), (9, 0), True),  # built by hand with CMake: the driver decides
    ],
)
def test_compiled_kernels_serve_the_architectures_they_were_built_for(machine, monkeypatch, built, gpu, runs):
    machine.info = BuildInfo(True, "", cuda="12.8", architectures=built)
    monkeypatch.setattr(device, "_capability", lambda index: gpu)
    reason = providers.available(CUDA)["compiled"]
    assert (reason is None) == runs
    assert runs or f"not for {gpu[0]}.{gpu[1]}" in reason


def test_compiled_kernels_need_a_driver_as_new(machine):
    machine.info = BuildInfo(True, "", cuda="14.1", architectures=("9.0",))
    assert "built by CUDA 14.1; the driver is for CUDA 13.0" in providers.available(CUDA)["compiled"]


def entry_with(**changed):
    return lambda: ship(shipped.FOLDER, dict(arch="9.0", **changed))


def file_with(name, change):
    def damage():
        path = shipped.FOLDER / name
        path.write_bytes(change(path.read_bytes()))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(entry_with(source_digest="0" * 64), "not made from the linear_residual.cu of this", id="sources"),
        pytest.param(entry_with(options=["-use_fast_math"]), "not made from the linear_residual.cu of", id="options"),
        pytest.param(file_with("lr.90.cubin", lambda code: code[:-1]), "lr.90.cubin is damaged", id="truncated"),
        pytest.param(file_with("lr.90.cubin", lambda code: code[::-1]), "lr.90.cubin is damaged", id="poisoned"),
        pytest.param(lambda: (shipped.FOLDER / "lr.90.cubin").unlink(), "lr.90.cubin cannot be read", id="gone"),
        pytest.param(file_with("manifest.json", lambda text: text[:-9]), "manifest.json cannot be read", id="manifest"),
    ],
)
def test_a_cubin_that_is_not_what_it_says_is_refused(machine, caplog, damage, said):
    """The log tells it, once; the next provider serves; asked for by name, it is an error."""
    machine.kernels = []
    damage()
    assert serving() == "nvrtc" and function() == 7
    assert said in providers.available(CUDA)["cubin"]
    assert caplog.text.count(said) == 1 and "install s1kernels again" in caplog.text
    with providers.use_provider("cubin"), pytest.raises(BackendError, match=said):
        function()
    assert [origin for _, origin in machine.loaded] == ["linear_residual.cu for sm_90 by NVRTC 13.0 (a fake)"]


def test_the_cubin_of_the_nearest_architecture_is_taken(machine, monkeypatch):
    machine.kernels = []
    ship(shipped.FOLDER, *(dict(arch=arch) for arch in ("8.0", "8.6", "8.9", "12.0", "12.0+PTX")))
    monkeypatch.setattr(device, "_capability", lambda index: (8, 8))
    function()
    assert machine.loaded[0][1] == "lr.86.cubin"
    monkeypatch.setattr(device, "_capability", lambda index: (12, 1))
    assert shipped.find(None, (12, 1))[0]["file"] == "lr.120.cubin"
    monkeypatch.setattr(device, "_capability", lambda index: (9, 0))
    assert "none for 9.0" in providers.available(CUDA)["cubin"]


def test_ptx_serves_later_gpus_if_the_driver_knows_it(machine, monkeypatch):
    machine.kernels = []
    ship(shipped.FOLDER, dict(arch="12.0"), dict(arch="12.0+PTX"))
    monkeypatch.setattr(device, "_capability", lambda index: (13, 0))
    assert function() == 7 and machine.loaded == [(b"code for 12.0+PTX", "lr.120.ptx")]
    monkeypatch.setattr(driver, "driver", lambda: SimpleNamespace(version=(12, 6)))
    assert "the PTX needs a driver for CUDA 12.8, not for 12.6" in providers.available(CUDA)["cubin"]


def test_a_driver_that_refuses_a_cubin_is_an_error_that_says_what_to_do(machine, monkeypatch):
    def refuse(cubin, index, *, origin):
        raise RuntimeError(f"cannot load {origin}: CUDA_ERROR_INVALID_IMAGE")

    machine.kernels = []
    monkeypatch.setattr(driver, "Module", refuse)
    with pytest.raises(BackendError, match=r"cannot load lr.90.cubin: .*S1KERNELS_CUDA_PROVIDER=nvrtc"):
        function()


def test_what_nvrtc_compiled_is_kept(machine, monkeypatch):
    with providers.use_provider("nvrtc"):
        function()
        monkeypatch.setattr(providers, "_functions", {})
        monkeypatch.setattr(providers, "_loaded", {})
        function()
    assert len(machine.nvrtc.compiled) == 1
    assert machine.loaded[0] == machine.loaded[1]


def test_prepare_compiles_each_source_once(machine):
    with providers.use_provider("nvrtc"):
        providers.prepare(["linear_residual", "rms_norm_qkv"], torch.float16, CUDA)
        function()
    assert sorted(name for name, _ in machine.nvrtc.compiled) == ["linear_residual.cu", "rms_norm_qkv.cu"]


# ---- NVRTC


def test_without_nvrtc_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "candidates", lambda: iter(["libnvrtc-of-nobody.so.13"]))
    with pytest.raises(NvrtcError, match=r"NVRTC is not installed; pip install .*\[nvrtc-cu12\].* or .*nvrtc-cu13"):
        nvrtc.nvrtc_for((9, 0))
    with pytest.raises(NvrtcError, match=r'not installed; pip install --upgrade "s1kernels\[nvrtc-cu12\]"$'):
        nvrtc.nvrtc_for((9, 0), (12, 4))


def test_nvrtc_must_know_the_gpu_and_suit_the_driver(monkeypatch):
    old = FakeNvrtc((12, 6), (50, 75, 80, 86, 89, 90))
    monkeypatch.setattr(nvrtc, "found", lambda: iter([old]))
    assert nvrtc.nvrtc_for((8, 9), (12, 4)) is old
    with pytest.raises(NvrtcError, match=r"NVRTC 12.6 .* cannot compile for sm_120; pip install .*nvrtc-cu12\]"):
        nvrtc.nvrtc_for((12, 0), (12, 8))
    new = FakeNvrtc((13, 0))
    monkeypatch.setattr(nvrtc, "found", lambda: iter([old, new]))
    assert nvrtc.nvrtc_for((12, 0), (13, 0)) is new
    with pytest.raises(NvrtcError, match=r"NVRTC 13.0 .* does not load into a driver for CUDA 12"):
        nvrtc.nvrtc_for((12, 0), (12, 8))


def test_an_nvrtc_that_cannot_compile_is_passed_over(monkeypatch):
    broken, whole = FakeNvrtc((13, 0)), FakeNvrtc((13, 0))
    broken.failure = "NVRTC 13.0 cannot compile: no builtins"
    monkeypatch.setattr(nvrtc, "found", lambda: iter(["a.dll does not load (locked)", broken, whole]))
    assert nvrtc.nvrtc_for((9, 0)) is whole
    monkeypatch.setattr(nvrtc, "found", lambda: iter(["a.dll does not load (locked)", broken]))
    with pytest.raises(NvrtcError, match=r"a.dll does not load \(locked\); .*no builtins; pip install"):
        nvrtc.nvrtc_for((9, 0))


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_file_that_is_no_library_is_named(monkeypatch, tmp_path, content):
    path = tmp_path / ("nvrtc64_130_0.dll" if nvrtc.WINDOWS else "libnvrtc.so.13")
    path.write_bytes(content)
    monkeypatch.setattr(nvrtc, "folders", lambda: iter([tmp_path]))
    assert next(nvrtc.found()).startswith(f"{path} does not load (")


LAYOUTS = {
    "torch on Windows": (True, "torch/lib", "nvrtc64_120_0.dll", "nvrtc-builtins64_128.dll"),
    "wheel of 12 on Windows": (True, "nvidia/cuda_nvrtc/bin", "nvrtc64_120_0.dll", "nvrtc-builtins64_128.dll"),
    "wheel of 13 on Windows": (True, "nvidia/cu13/bin/x86_64", "nvrtc64_130_0.dll", "nvrtc-builtins64_130.dll"),
    "toolkit 12 on Windows": (True, "toolkit/bin", "nvrtc64_120_0.dll", "nvrtc-builtins64_126.dll"),
    "toolkit 13 on Windows": (True, "toolkit/bin/x64", "nvrtc64_130_0.dll", "nvrtc-builtins64_131.dll"),
    "PATH on Windows": (True, "on_path", "nvrtc64_120_0.dll", "nvrtc-builtins64_128.dll"),
    "conda on Windows": (True, "prefix/Library/bin", "nvrtc64_120_0.dll", "nvrtc-builtins64_124.dll"),
    "wheel of 12 on Linux": (False, "nvidia/cuda_nvrtc/lib", "libnvrtc.so.12", "libnvrtc-builtins.so.12.8"),
    "wheel of 13 on Linux": (False, "nvidia/cu13/lib", "libnvrtc.so.13", "libnvrtc-builtins.so.13.0"),
    "toolkit on Linux": (False, "toolkit/lib64", "libnvrtc.so.12", "libnvrtc-builtins.so.12.8"),
    "conda on Linux": (False, "prefix/lib", "libnvrtc.so.12", "libnvrtc-builtins.so.12.4"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nvrtc_is_found_where_packages_and_toolkits_put_it(monkeypatch, tmp_path, layout):
    """Its builtins are loaded first, and on Windows its folder is made known to the loader."""
    windows, folder, library, builtins = LAYOUTS[layout]
    (tmp_path / folder).mkdir(parents=True)
    for name in (library, builtins, library.replace("_0.dll", "_0.alt.dll").replace("nvrtc.so", "nvrtc.alt.so")):
        (tmp_path / folder / name).write_bytes(b"")
    specs = {
        "torch": SimpleNamespace(origin=str(tmp_path / "torch/__init__.py")),
        "nvidia": SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")]),
    }
    loaded, added = [], []

    def library_at(path):
        loaded.append(path)
        return SimpleNamespace(
            nvrtcVersion=lambda *_: 0, nvrtcGetNumSupportedArchs=lambda *_: 0, nvrtcGetSupportedArchs=lambda *_: 0
        )

    monkeypatch.setattr(nvrtc, "find_spec", specs.get)
    monkeypatch.setattr(nvrtc, "WINDOWS", windows)
    monkeypatch.setattr(nvrtc.sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(nvrtc.os, "add_dll_directory", added.append, raising=False)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", library_at)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join(["relative", str(tmp_path / "on_path")]))
    nvrtc.load.cache_clear()
    first = next(nvrtc.found())
    nvrtc.load.cache_clear()
    assert first.path == str(tmp_path / folder / library)
    assert loaded == [str(tmp_path / folder / name) for name in (builtins, library)]
    assert added == [str(tmp_path / folder)] * windows


def test_nvrtc_compiles_for_the_nearest_architecture_below():
    compiler = FakeNvrtc(archs=(75, 80, 86, 90, 100, 120))
    assert [compiler.target(gpu) for gpu in ((8, 9), (8, 6), (12, 1), (7, 0), (11, 0))] == [86, 86, 120, None, None]


def test_a_missing_builtins_library_is_named(tmp_path):
    real = nvrtc.nvrtc_for((9, 0))
    alone = tmp_path / Path(real.path).name
    alone.symlink_to(Path(real.path).resolve()) if os.name != "nt" else shutil.copy(real.path, alone)
    code = f"""
from s1kernels.backends.cuda import nvrtc
print(nvrtc.Nvrtc({str(alone)!r}).failure or "it found them all the same")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    if "all the same" in said:
        pytest.skip("this NVRTC finds its builtins elsewhere")
    assert "nvrtc-builtins library is missing" in said


def test_a_source_that_does_not_compile_shows_the_messages_of_the_compiler(tmp_path):
    tmp_path.joinpath("head.cuh").write_text("#pragma once\n\nint one;\nint two() { return three; }\n")
    tmp_path.joinpath("main.cu").write_text('#include "head.cuh"\n#include "head.cuh"\nint four() { return five; }\n')
    source = sources.read(tmp_path / "main.cu")
    with pytest.raises(RuntimeError, match=r"(?s)cannot compile main.cu .*head.cuh\(4\).*three.*main.cu\(3\).*five"):
        nvrtc.nvrtc_for((9, 0)).compile(source.text, "main.cu", ["--gpu-architecture=sm_90"])


def test_a_digest_changes_with_every_header(tmp_path):
    copy = Path(shutil.copytree(sources.folder(), tmp_path / "cuda"))
    before = sources.read(copy / "linear_residual.cu").digest
    assert before == sources.source("linear_residual").digest
    header = copy / "device/convert.cuh"  # included by a header of a header
    header.write_text(header.read_text() + "// changed\n")
    assert sources.read(copy / "linear_residual.cu").digest != before


def test_a_digest_is_the_same_with_windows_line_ends(tmp_path):
    copy = Path(shutil.copytree(sources.folder(), tmp_path / "cuda"))
    for path in (copy / "linear_residual.cu", *copy.glob("device/*.cuh")):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert sources.read(copy / "linear_residual.cu").digest == sources.source("linear_residual").digest


# ---- The disk cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("S1KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_gives_back_what_was_stored(folder):
    assert cache.load("k") is None
    cache.store("k", b"data")
    assert cache.load("k") == b"data"
    assert [path.name for path in folder.iterdir()] == ["k.cubin"]
    assert cache.key("a", "b") == cache.key("a", "b") != cache.key("ab", "")


def test_more_options_for_nvrtc_make_other_code(folder, monkeypatch):
    compiler, source = FakeNvrtc(), sources.source("swiglu")
    for given in ("", "-lineinfo -DS1_RACECHECK=1", ""):
        monkeypatch.setenv("S1KERNELS_NVRTC_OPTIONS", given)
        providers.compile_cubin(source, 2, compiler, 90)
    (_, plain), (_, more) = compiler.compiled  # the third was kept on disk
    assert more == [*plain, "-lineinfo", "-DS1_RACECHECK=1"]


@pytest.mark.parametrize("damage", [lambda entry: entry[:-1], lambda entry: entry[:10], lambda entry: entry + b"x"])
def test_a_damaged_entry_is_deleted_and_made_anew(folder, damage, caplog):
    cache.store("k", b"data")
    path = folder / "k.cubin"
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load("k") is None
    assert not path.exists()
    assert "k.cubin is damaged" in caplog.text
    cache.store("k", b"data")
    assert cache.load("k") == b"data"


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, monkeypatch, caplog):
    tmp_path.joinpath("file").write_text("")
    monkeypatch.setenv("S1KERNELS_CACHE_DIR", str(tmp_path / "file/cache"))
    for _ in range(3):
        cache.store("k", b"data")
        assert cache.load("k") is None
    assert caplog.text.count("kernels are compiled at every start") == 1
    assert "S1KERNELS_CACHE_DIR" in caplog.text


@pytest.mark.parametrize(("locked", "kept"), [(2, True), (100, False)])
def test_an_entry_that_is_being_read_on_windows_is_replaced_later(folder, monkeypatch, locked, kept):
    real, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if len(calls) <= locked:
            raise PermissionError("in use")
        real(*paths)

    monkeypatch.setattr(cache.os, "replace", replace)
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: None)
    cache.store("k", b"data")
    assert (cache.load("k") == b"data") == kept
    assert [path.suffix for path in folder.iterdir()] == [".cubin"] * kept


@pytest.mark.parametrize(("locked", "found"), [(2, True), (100, False)])
def test_an_entry_that_a_virus_scanner_holds_is_read_later(folder, monkeypatch, locked, found):
    cache.store("k", b"data")
    real, calls = Path.read_bytes, []

    def read(path):
        calls.append(path)
        if len(calls) <= locked:
            raise PermissionError("in use")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: None)
    assert (cache.load("k") == b"data") == found


def test_what_cannot_be_put_in_place_nor_deleted_is_no_error(folder, monkeypatch, caplog):
    """A virus scanner may hold the new file."""

    def refuse(*paths, **options):
        raise PermissionError("in use")

    monkeypatch.setattr(cache.os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: None)
    cache.store("k", b"data")
    assert cache.load("k") is None and "in use" in caplog.text


def test_processes_compile_at_once(folder):
    code = """
from s1kernels.backends.cuda import nvrtc, providers, sources
compiler = nvrtc.nvrtc_for((9, 0))
source = sources.source("rms_norm")
first = providers.compile_cubin(source, 4, compiler, 90)
assert first[:4] == bytes([127]) + b"ELF" and providers.compile_cubin(source, 4, compiler, 90) == first
"""
    running = [subprocess.Popen([sys.executable, "-W", "error::UserWarning", "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]


def test_processes_share_the_cache(folder):
    code = """
import sys
from s1kernels.backends.cuda import cache
for turn in range(200):
    data = bytes([turn]) * 100_000
    cache.store("k", data)
    found = cache.load("k")
    assert found is not None and len(set(found)) == 1 and len(found) == 100_000
"""
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert [path.name for path in folder.iterdir()] == ["k.cubin"]


# ---- With a GPU


@needs_gpu
@pytest.mark.parametrize("name", providers.PROVIDERS)
def test_every_provider_has_every_kernel(name):
    if reason := providers.available(CUDA)[name]:
        pytest.skip(f"{name} cannot serve here: {reason}")
    with providers.use_provider(name):
        for kernel in KERNELS:
            if kernel.source not in sources.names():
                continue  # another test's
            found = providers.function(kernel.source, kernel.name, torch.float16, CUDA)
            assert found
            assert driver.load_function(found, 0) in (None, kernel.argument_bytes), kernel.name
