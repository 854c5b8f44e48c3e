"""Where a result was measured and with what: every JSON under bench/results carries it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import s1kernels
from s1kernels.build_info import build_info
from s1kernels.cli.gpu import gpu_facts, nvidia_smi
from s1kernels.cli.info import platform_facts

CHOICES = ("S1KERNELS_BACKEND", "S1KERNELS_CUDA_PROVIDER")
"""Environment variables that change what is measured."""


def collect(device: torch.device) -> dict[str, Any]:
    """The machine, the software and the command, as plain values. Unknown texts are empty."""
    build = build_info()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([_program(), *_arguments()]),
        "commit": commit(),
        "s1kernels": s1kernels.__version__,
        "build": {
            "native": build.native,
            "compiler": build.compiler,
            "cuda": build.cuda,
            "architectures": list(build.architectures),
        },
        "environment": {name: os.environ[name] for name in CHOICES if name in os.environ},
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "platform": platform_facts() | {"kind": kind()},
        "threads": torch.get_num_threads(),
        "gpu": gpu_facts(device) | clocks(device),
    }


def kind() -> str:
    """The kind of system that the GPU is driven by: "Linux", "WSL2", "native Windows" or "macOS"."""
    if "microsoft" in platform.uname().release.lower():
        return "WSL2"
    return {"Windows": "native Windows", "Darwin": "macOS"}.get(platform.system(), platform.system())


def clocks(device: torch.device) -> dict[str, str]:
    """A GPU's clocks (now and at most), power limit and driver model (WDDM or TCC, on Windows), as nvidia-smi says."""
    if device.type != "cuda":
        return {}
    fields = ["clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "driver_model.current"]
    identity = str(torch.cuda.get_device_properties(device).uuid)
    said = nvidia_smi(",".join(fields), f"--id=GPU-{identity}")
    values = [value.strip() for value in "".join(said[:1]).split(",")]
    if len(values) != len(fields):
        return {}
    return {name: value for name, value in zip(fields, values, strict=True) if not value.startswith("[N/A")}


def machine(origin: dict[str, Any]) -> str:
    """The machine of a result in a few words: its GPU or processor, and its kind of system."""
    facts = origin["platform"]
    name = origin["gpu"].get("name") or f"{facts['processor'] or facts['machine']}, {origin['threads']} threads"
    return f"{name}, {facts.get('kind', 'WSL2' if facts['wsl'] else facts['system'].partition('-')[0])}"


def where(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """The machine of one of several results, with the commit if they have several of that machine."""
    name = machine(result["provenance"])
    commits = {other["provenance"]["commit"] for other in results if machine(other["provenance"]) == name}
    return name if len(commits) == 1 else f"{name}, commit {result['provenance']['commit'][:7]}"


def _program() -> str:
    path = Path(sys.argv[0])
    if path.parent.name == "s1kernels" or path.stem == "s1kernels":
        return "python -m s1kernels"
    return "pytest" if "pytest" in (path.name, path.parent.name) else f"python bench/{path.name}"


def commit() -> str:
    """$S1KERNELS_COMMIT, for copies without a history, else git's; "+" marks changes since. Empty if unknown."""
    if "S1KERNELS_COMMIT" in os.environ:
        return os.environ["S1KERNELS_COMMIT"]
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    top = _first_line([*git, "rev-parse", "--show-toplevel"])
    if not (top and (Path(top) / "csrc" / "build.json").exists()):  # installed, perhaps within another project
        return ""
    head = _first_line([*git, "rev-parse", "HEAD"])
    return head + "+" * bool(head and _first_line([*git, "status", "--porcelain", "--untracked-files=no"]))


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all. A bench that is cut short leaves what it had measured."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def reason(error: BaseException) -> str:
    """One line that says why something was not measured."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _arguments() -> list[str]:
    """The command's arguments, files by their names alone."""
    return [Path(argument).name if os.sep in argument else argument for argument in sys.argv[1:]]


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
