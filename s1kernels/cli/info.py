"""Show what is built, what each back end can do here and why not, and the platform."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import s1kernels
from s1kernels import registry
from s1kernels.backends.cuda import cache, driver, nvrtc, providers, sources
from s1kernels.backends.cuda.device import capability
from s1kernels.build_info import build_info
from s1kernels.cli import layout
from s1kernels.registry import BackendError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")


def execute(options: argparse.Namespace) -> int:
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for title in ("platform", "torch", "build", "cuda"):
        print(layout.table(title, [(name, _text(value)) for name, value in facts[title].items()]))
    rows = [("device", "op", *registry.BACKENDS)]
    for device, ops in facts["ops"].items():
        for op, backends in ops.items():
            cells = ("-" if b not in backends else backends[b] or "yes" for b in registry.BACKENDS)
            rows.append((device, op, *cells))
    print(layout.table("ops (first that can serves)", rows))
    return 0


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def collect() -> dict[str, Any]:
    """Everything that `info` shows, as plain values."""
    return {
        "s1kernels": s1kernels.__version__,
        "platform": platform_facts(),
        "torch": torch_facts(),
        "build": dataclasses.asdict(build_info()),
        "cuda": cuda_facts(),
        "backends": {name: available() or "available" for name, available in registry.BACKENDS.items()},
        "ops": {device: {op: _refusals(op, device) for op in registry.OPS} for device in registry.ORDER},
    }


def platform_facts() -> dict[str, Any]:
    release = platform.uname().release
    return {
        "system": platform.platform(),
        "wsl": "microsoft" in release.lower(),
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    """The processor's name; Linux tells it in /proc/cpuinfo alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def torch_facts() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    attention = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or "this torch has no CUDA",
        "gpus": gpus or ["none"],
        "attention back ends": [name for name, enabled in attention.items() if enabled],
    }


def cuda_facts() -> dict[str, Any]:
    """The NVIDIA driver, every NVRTC, and who serves the CUDA kernels on each GPU."""
    facts: dict[str, Any] = {"kernels": providers.unavailable() or "available", "provider": providers.choice()}
    try:
        facts["driver"] = "for CUDA {}.{}".format(*driver.driver().version)
    except BackendError as error:
        facts["driver"] = str(error)
    facts["nvrtc"] = list(map(str, nvrtc.found())) or ["none"]
    facts["sources"], facts["cache"] = str(sources.folder()), str(cache.directory())
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        name = "{} {}: compute capability {}.{}".format(device, torch.cuda.get_device_name(index), *capability(device))
        facts[name] = [f"{provider}: {why or 'yes'}" for provider, why in providers.available(device).items()]
    return facts


def _refusals(op_name: str, device: str) -> dict[str, str | None]:
    """Back end -> why this machine cannot use it for an op, or None; back ends without the op are absent."""
    return {impl.backend: registry.BACKENDS[impl.backend]() for impl in registry.candidates(op_name, device)}
