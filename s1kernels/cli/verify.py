"""Hold every op of every back end to its contract on this machine: against float64, with poison and guard bands."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from s1kernels import registry, testing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=sorted(registry.OPS), help="only this op")
    parser.add_argument("--backend", choices=sorted(registry.BACKENDS), help="only this back end")
    parser.add_argument("--device", default="cpu", choices=sorted(registry.ORDER), help="where to run (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")


def execute(options: argparse.Namespace) -> int:
    backends = [options.backend] if options.backend else list(registry.ORDER[options.device])
    reasons = {name: registry.BACKENDS[name]() for name in backends}
    if options.backend and reasons[options.backend]:
        raise registry.BackendError(f"back end {options.backend!r} cannot run here: {reasons[options.backend]}")
    cases = [
        case
        for case in testing.contract_cases(options.device)
        if reasons.get(case[1], "not asked for") is None and options.op in (None, case[0].name)
    ]
    console = Console(stderr=True)
    outcomes = [testing.check_op(*case, device=options.device) for case in track(cases, "checking", console=console)]
    failures = [outcome for outcome in outcomes if outcome.complaint]
    if options.json:
        print(
            json.dumps(
                {"outcomes": [_plain(o) for o in outcomes], "not run": {n: r for n, r in reasons.items() if r}},
                indent=2,
            )
        )
    else:
        _show(outcomes, reasons)
    for outcome in failures:
        console.print(f"FAILED {outcome.op} by {outcome.backend}, {outcome.case}, {outcome.dtype}: {outcome.complaint}")
    return 1 if failures or not outcomes else 0


def _show(outcomes: list[testing.Outcome], reasons: dict[str, str | None]) -> None:
    table = Table(box=None)
    for column in ("op", "back end", "passed", "worst error / allowed"):
        table.add_column(column)
    pairs = dict.fromkeys((outcome.op, outcome.backend) for outcome in outcomes)
    for pair in pairs:
        mine = [outcome for outcome in outcomes if (outcome.op, outcome.backend) == pair]
        passed = sum(outcome.complaint is None for outcome in mine)
        worst = max(mine, key=lambda outcome: outcome.error / outcome.tolerance)
        table.add_row(*pair, f"{passed}/{len(mine)}", f"{worst.error:.1e} / {worst.tolerance:.0e} ({worst.case})")
    console = Console()
    console.print(table)
    console.print(f"{len(pairs)} (op, back end) pairs ran, {len(outcomes)} checks")
    for name, reason in reasons.items():
        if reason:
            console.print(f"{name} did not run: {reason}")


def _plain(outcome: testing.Outcome) -> dict[str, Any]:
    return {**vars(outcome), "dtype": str(outcome.dtype).removeprefix("torch.")}
