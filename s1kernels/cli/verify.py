"""Hold every op of every back end to its contract on this machine: against float64, with poison and guard bands."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

from s1kernels import registry, testing
from s1kernels.cli import gpu

OFFSETS = {"cpu": (testing.OFFSET,), "cuda": (testing.OFFSET, 0)}
"""Device -> how many elements off any alignment the inputs lie. On a GPU aligned inputs have kernels of their own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=sorted(registry.OPS), help="only this op")
    parser.add_argument("--backend", choices=sorted(registry.BACKENDS), help="only this back end")
    parser.add_argument(
        "--device", choices=sorted(registry.ORDER), help="where to run (default: a GPU if there is one)"
    )
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")


def execute(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    name = options.device or _default_device(options.backend)
    device = gpu.require(name)
    backends = [options.backend] if options.backend else list(registry.ORDER[name])
    if not set(backends) <= set(registry.ORDER[name]):
        raise registry.BackendError(f"back end {options.backend!r} serves no {name} tensors; choose another --device")
    reasons = {backend: registry.BACKENDS[backend]() for backend in backends}
    if options.backend and reasons[options.backend]:
        raise registry.BackendError(f"back end {options.backend!r} cannot run here: {reasons[options.backend]}")
    cases = [
        (*case, offset)
        for case in testing.contract_cases(name)
        if reasons.get(case[1], "not asked for") is None and options.op in (None, case[0].name)
        for offset in OFFSETS.get(name, (testing.OFFSET,))
    ]
    console = Console(stderr=True)
    outcomes, refused = [], Counter[str]()
    for op, backend, case, dtype, offset in track(cases, "checking", console=console):
        given = testing.expected(op.name, case, dtype, name, 0)[0]
        if reason := op.impls[backend].refusal(*given):
            refused[f"{op.name} by {backend}: {reason}"] += 1
            continue
        outcome = testing.check_op(op, backend, case, dtype, device=name, offset=offset)
        outcomes.append({**vars(outcome), "dtype": str(dtype).removeprefix("torch."), "offset": offset})
    result = {
        "device": name,
        "gpu": gpu.gpu_facts(device),
        "outcomes": outcomes,
        "not run": {backend: reason for backend, reason in reasons.items() if reason},
        "refused": dict(refused),
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _show(result)
    failures = [o for o in outcomes if o["complaint"]]
    for o in failures:
        place = f"{o['op']} by {o['backend']}, {o['case']}, {o['dtype']}, offset {o['offset']}"
        console.print(f"FAILED {place}: {o['complaint']}")
    return 1 if failures or not outcomes else 0


def _default_device(backend: str | None) -> str:
    """A GPU if there is one, unless the back end serves other devices only."""
    devices = [gpu.default_device(), *registry.ORDER]
    return next(device for device in devices if backend is None or backend in registry.ORDER[device])


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    outcomes = result["outcomes"]
    table = Table(box=None)
    for column in ("op", "back end", "passed", "worst error / allowed"):
        table.add_column(column)
    pairs = dict.fromkeys((o["op"], o["backend"]) for o in outcomes)
    for pair in pairs:
        mine = [o for o in outcomes if (o["op"], o["backend"]) == pair]
        passed = sum(o["complaint"] is None for o in mine)
        worst = max(mine, key=lambda o: o["error"] / o["tolerance"])
        table.add_row(
            *pair, f"{passed}/{len(mine)}", f"{worst['error']:.1e} / {worst['tolerance']:.0e} ({worst['case']})"
        )
    console = Console()
    console.print(table)
    console.print(f"{len(pairs)} (op, back end) pairs ran on {result['device']}, {len(outcomes)} checks")
    if facts := result["gpu"]:
        name, driver, provider = facts["name"], facts["driver"], facts["provider"]
        console.print(f"{name}, driver {driver}, CUDA kernels by provider: {provider}")
    for name, reason in result["not run"].items():
        console.print(f"{name} did not run: {reason}")
    for what, count in result["refused"].items():
        console.print(f"{count} checks did not run, {what}")
