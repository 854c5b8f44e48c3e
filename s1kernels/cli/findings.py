"""What `s1kernels doctor` examines: each function is a section of its report."""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import s1kernels
from s1kernels.backends.cuda import cache, driver, nvrtc, providers, shipped, sources
from s1kernels.backends.cuda.arch import dotted
from s1kernels.backends.cuda.driver import Attribute
from s1kernels.backends.cuda.launch import PDL_CAPABILITY, PDL_DRIVER
from s1kernels.backends.triton import available as triton_available
from s1kernels.build_info import build_info
from s1kernels.cli import gpu, selfcheck, toolchain
from s1kernels.cli.info import platform_facts
from s1kernels.registry import BackendError

State = Literal["ok", "note", "problem"]

WINDOWS = sys.platform == "win32"
GET_TORCH = "install a CUDA build of torch (pytorch.org/get-started/locally)"
TDR_KEY = r"SYSTEM\CurrentControlSet\Control\GraphicsDrivers"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` is what to do about it."""

    name: str
    value: str
    state: State = "ok"
    advice: str = ""


def software() -> list[Finding]:
    facts, info = platform_facts(), build_info()
    native = Finding("native module", f"built by {info.compiler}" if info.native else info.reason)
    if not info.native:
        native = Finding("native module", f"none: {info.reason}", "note", "only models on the CPU need it")
    triton = triton_available()
    return [
        Finding("s1kernels", f"{s1kernels.__version__} in {Path(s1kernels.__file__).parent}"),
        Finding("system", f"{facts['system']}{', WSL' if facts['wsl'] else ''}"),
        Finding("python", f"{facts['python']}, {sys.executable}"),
        Finding("processor", f"{facts['processor']}, {facts['cores']} cores"),
        _torch(),
        native,
        Finding("Triton", triton or "can serve", "note" if triton else "ok", "not needed" if triton else ""),
    ]


def _torch() -> Finding:
    cuda = torch.version.cuda
    version = f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'without CUDA'}"
    if cuda and not torch.cuda.is_available():
        if _driver_error():
            return Finding("torch", f"{version}, finds no GPU", "note", "see the driver, below")
        return Finding("torch", f"{version}, finds no GPU", "problem", "run nvidia-smi: does it list the GPU?")
    if not cuda and not _driver_error():
        return Finding("torch", version, "problem", f"there is an NVIDIA driver: {GET_TORCH}")
    return Finding("torch", version)


def gpus() -> list[Finding]:
    if error := _driver_error():
        return [Finding("driver", error, "note", "without an NVIDIA GPU models run on the CPU")]
    version = driver.driver().version
    found = [Finding("driver", f"{gpu.driver_version()}, for CUDA {dotted(version)}")]
    if WINDOWS:
        found.append(_tdr())
    models = _driver_models()
    for index, name in enumerate(driver.gpus()):
        found += _describe(index, name)
        if index in models:
            found.append(Finding(f"cuda:{index} driver model", models[index]))
    return found


def _describe(index: int, name: str) -> list[Finding]:
    """One GPU."""

    def ask(what: Attribute) -> int:
        return driver.attribute(index, what)

    cooperative = "yes" if ask(Attribute.COOPERATIVE_LAUNCH) else "no: no persistent frame"
    arch, here, oldest = _arch(index), f"cuda:{index}", dotted(providers.OLDEST)
    usable = arch >= providers.OLDEST
    limit = "the system ends what takes too long" if ask(Attribute.EXEC_TIMEOUT) else "none"
    overlap = arch >= PDL_CAPABILITY and driver.driver().version >= PDL_DRIVER
    needs = f"no: it needs compute capability {dotted(PDL_CAPABILITY)} and a driver for CUDA {dotted(PDL_DRIVER)}"
    return [
        Finding(
            here, f"{name}, compute capability {dotted(arch)}, {ask(Attribute.MULTIPROCESSORS)} SMs",
            "ok" if usable else "problem", "" if usable else f"kernels need {oldest} or later: use another GPU",
        ),
        Finding(f"{here} time limit of kernels", limit),
        Finding(f"{here} cooperative launch", cooperative),
        Finding(f"{here} programmatic dependent launch", "yes" if overlap else needs),
        Finding(f"{here} bfloat16", "yes" if arch >= (8, 0) else "no: model.half() before patch"),
    ]  # fmt: skip


def kernels() -> list[Finding]:
    """Who provides the CUDA kernels on each GPU, and why the others do not."""
    try:
        chosen = providers.choice()
    except ValueError as error:
        return [Finding("S1KERNELS_CUDA_PROVIDER", str(error), "problem", "unset it, or mend its value")]
    if _driver_error():
        return [Finding("provider", "no driver to load kernels into", "note")]
    found = [Finding("asked for", chosen)]
    names = list(providers.PROVIDERS) if chosen == "auto" else [chosen]
    for index in range(len(driver.gpus())):
        served: dict[str, list[str]] = defaultdict(list)
        refused: dict[str, str] = {}
        for source in sources.names():
            offers = providers.offers(source, _arch(index))
            served[next((name for name in names if offers[name] is None), "nobody")].append(source)
            refused |= {name: why for name, why in offers.items() if why and name in names}
        advice = "; ".join(f"{name}: {why}" for name, why in refused.items())
        for name, these in served.items():
            value = f"{name}: {'every kernel' if len(served) == 1 else ', '.join(these)}"
            missing = name == "nobody"
            found.append(Finding(f"cuda:{index}", value, "problem" if missing else "ok", advice if missing else ""))
        if "nobody" not in served:
            found += [Finding(f"cuda:{index}, not {name}", why, "note") for name, why in refused.items()]
    return found


def compilers() -> list[Finding]:
    """NVRTC, which the provider of that name needs, and what building from the sources needs."""
    found = []
    for compiler in nvrtc.found():
        complaint = compiler if isinstance(compiler, str) else compiler.failure
        found.append(Finding("NVRTC", complaint or str(compiler), "note" if complaint else "ok"))
    if not found:
        needed = "" if shipped.FOLDER.exists() else 'pip install "s1kernels[nvrtc-cu12]"'
        found.append(Finding("NVRTC", "none", "note", needed))
    toolkit = toolchain.nvcc()
    found.append(Finding("nvcc", f"CUDA {dotted(toolkit.version)}, {toolkit.path}" if toolkit else "none"))
    for studio in toolchain.visual_studios():
        wrong = toolkit and toolchain.mismatch(toolkit.version, studio.version[0])
        advice = "to build CUDA kernels, install a CUDA or a Visual Studio that fit each other" if wrong else ""
        value = f"{dotted(studio.version)}, {studio.path}{f'; {wrong}' if wrong else ''}"
        found.append(Finding("Visual Studio", value, "note" if wrong else "ok", advice))
    return found


def disk() -> list[Finding]:
    folder = cache.directory()
    entries = list(folder.glob("*.cubin")) if folder.is_dir() else []
    size = sum(entry.stat().st_size for entry in entries) / 1e6
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "what NVRTC compiles is lost at exit: set S1KERNELS_CACHE_DIR to a folder that can be written"
        return [Finding("cache", f"{folder} cannot be written ({error})", "note", advice)]
    return [Finding("cache", f"{folder}: {len(entries)} compiled sources, {size:.1f} MB")]


def checks() -> list[Finding]:
    """Every op against its reference, and the speed of a frame, on a GPU if one can be used."""
    device, found = torch.device(gpu.default_device()), []
    if device.type == "cuda" and (reason := providers.unavailable()):
        return [Finding("ops", f"not checked: {reason}", "problem", "see above")]
    for outcome in selfcheck.check_ops(device):
        error = f"error {outcome.error:.1e} of {outcome.tolerance:.0e}"
        state: State = "problem" if outcome.complaint else "ok"
        advice = "please report this" if outcome.complaint else ""
        name = f"{outcome.op} by {outcome.backend}"
        found.append(Finding(name, f"{outcome.complaint or 'right'}, {error} ({outcome.case})", state, advice))
    if not found:
        return [Finding("ops", f"only the reference serves on {device.type}", "note", "see above for what is missing")]
    seconds, what = selfcheck.time_frames(device)
    speed = f"{seconds * 1e3:.3g} ms a frame, {selfcheck.times_real_time(seconds):.3g} times real time ({what})"
    return [*found, Finding("speed", speed)]


def unverified() -> list[Finding]:
    """What no report from a native Windows has told yet; docs/windows.md says why it matters."""
    if not WINDOWS:
        return []
    dlls = sorted(path.name for path in Path(torch.__file__).parent.joinpath("lib").glob("nvrtc*.dll"))
    launches = "s1kernels._C" if build_info().native else "ctypes"
    found = [Finding("NVRTC in torch\\lib", ", ".join(dlls) or "none"), Finding("launches go through", launches)]
    for index in [] if _driver_error() else range(len(driver.gpus())):
        cooperative = "yes" if driver.attribute(index, Attribute.COOPERATIVE_LAUNCH) else "no"
        kind = _driver_models().get(index, "unknown")
        found.append(Finding(f"cuda:{index}, cooperative launch under {kind}", cooperative))
        found.append(Finding(f"cuda:{index}, the driver loads a shipped cubin", _loads_shipped(index)))
    return found


SECTIONS: dict[str, Callable[[], list[Finding]]] = {
    "software": software,
    "GPUs": gpus,
    "CUDA kernels": kernels,
    "compilers (not needed where every CUDA kernel is served)": compilers,
    "disk": disk,
    "checks": checks,
    "never verified on a native Windows: your answers": unverified,
}


def _driver_error() -> str | None:
    try:
        driver.driver()
    except BackendError as error:
        return str(error)
    return None


def _arch(index: int) -> tuple[int, int]:
    return driver.attribute(index, Attribute.MAJOR), driver.attribute(index, Attribute.MINOR)


def _driver_models() -> dict[int, str]:
    """GPU -> WDDM, MCDM or TCC, as nvidia-smi says; empty on Linux."""
    said = gpu.nvidia_smi("driver_model.current")
    return {index: kind.strip() for index, kind in enumerate(said) if "N/A" not in kind}


def _tdr() -> Finding:
    """How long a kernel may take before Windows resets the GPU."""
    import winreg

    values = {}
    with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, TDR_KEY) as key:  # type: ignore[attr-defined,unused-ignore]
        for name in ("TdrDelay", "TdrLevel"):
            try:
                values[name] = winreg.QueryValueEx(key, name)[0]  # type: ignore[attr-defined,unused-ignore]
            except OSError:
                continue
    if values.get("TdrLevel") == 0:
        return Finding("TDR", "off")
    delay = values.get("TdrDelay", 2)
    advice = f"set TdrDelay to 2 or more in HKLM\\{TDR_KEY}" if delay < 2 else ""
    return Finding("TDR", f"the GPU is reset after {delay} s", "note" if advice else "ok", advice)


def _loads_shipped(index: int) -> str:
    found = shipped.find("advance", _arch(index))
    if isinstance(found, str):
        return found
    entry, code = found
    try:
        driver.Module(code, index, origin=entry["file"])
    except RuntimeError as error:
        return str(error)
    return f"yes: {entry['file']}"
