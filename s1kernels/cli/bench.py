"""Measure what runs on this machine: frames, stages, ops, texts; write JSON, plots and a report.

Every system is a row, and one that cannot run here says why. Nothing is timed that is not correct.

Example: s1kernels bench --quick --out report
         s1kernels bench --merge linux.json windows.json --out report
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s1kernels import registry
from s1kernels.bench import compare, provenance, report, run
from s1kernels.cli import gpu

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN = 12  # rows of the live table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="less of everything: two minutes on two cores of a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--parts", nargs="+", choices=run.PARTS, help="only these parts")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these ops (and no other part, without --parts)")
    parser.add_argument("--out", type=Path, default=Path("s1kernels-bench"), help="folder of the JSON and the report")
    parser.add_argument("--json", action="store_true", help="print the JSON too")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="exit with 1 if anything got slower")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="report on these, measure nothing")


def execute(options: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(stderr=True)
    old = _read(options.compare) if options.compare else None
    if options.merge:
        results = run.join([_read(path) for path in options.merge])
    else:
        results = [_measure(options, console)]
        provenance.write(options.out / "bench.json", results[0])
    page = report.write(results, options.out)
    console.print(f"report: {page}", highlight=False)
    if options.json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=2))
    return 0 if old is None else _compare(old, results[-1], console)


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run every task under a progress bar and a table of the latest rows."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    unknown = sorted(set(options.ops or []) - set(registry.OPS))
    if unknown:
        raise ValueError(f"bench: --ops must be among {sorted(registry.OPS)}, got {unknown}; see `s1kernels info`")
    device = gpu.require(options.device or gpu.default_device())
    settings = run.SETTINGS[device.type, options.quick]
    parts = options.parts or (["ops"] if options.ops else settings.parts)
    settings = dataclasses.replace(settings, parts=tuple(part for part in run.PARTS if part in parts))
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    table: list[tuple[str, ...]] = []
    started = time.perf_counter()
    with Live(console=console, transient=True, refresh_per_second=4) as live:

        def show(part: str, row: dict[str, Any]) -> None:
            table.append(_cells(part, row))
            live.update(Group(_table(table[-SHOWN:]), progress))

        bench = run.Bench(settings, device, getattr(torch, options.dtype), options.ops, show)
        tasks = bench.tasks()
        bar = progress.add_task("", total=len(tasks))
        for title, work in tasks:
            progress.update(bar, description=title)
            live.update(Group(_table(table[-SHOWN:]), progress))
            work()
            progress.advance(bar)
            provenance.write(options.out / "bench.json", bench.result)  # what was measured stays, whatever comes
    bench.result["seconds"] = time.perf_counter() - started
    console.print(_table(table))
    return bench.result


def _cells(part: str, row: dict[str, Any]) -> tuple[str, ...]:
    names = [str(row[key]) for key in ("program", "stage", "system", "op", "case", "contender", "table") if key in row]
    names += [str(row[key]) for key in ("context", "characters", "layers", "positions", "mode") if key in row]
    if "refused" in row:
        return part, " ".join(names), "-", "-", row["refused"]
    reads = f"{row['percent_of_read_bandwidth']:.0f} %" if "percent_of_read_bandwidth" in row else ""
    speed = f"{row['times_real_time']:.2f} x real time" if "times_real_time" in row else ""
    return part, " ".join(names), report.time_of(row["seconds"]), reads, speed


def _table(rows: list[tuple[str, ...]]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("part", "what", "time", "of reads", ""):
        table.add_column(column, justify="right" if column in ("time", "of reads") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _compare(old: dict[str, Any], new: dict[str, Any], console: Console) -> int:
    """Print what changed; 1 if anything got slower or was lost."""
    from rich.table import Table

    machines = [provenance.machine(result["provenance"]) for result in (old, new)]
    if machines[0] != machines[1]:
        console.print(f"the old result is of another machine ({machines[0]}, not {machines[1]})", markup=False)
    reads = [result["read_bandwidth"]["gigabytes_per_second"] for result in (old, new)]
    console.print(f"memory was read at {reads[0]:.0f} GB/s, and at {reads[1]:.0f} GB/s now", highlight=False)
    changes = compare.compare(old, new)
    if not changes:
        raise ValueError("compare: the results must have rows in common, got none; measure the same --parts")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("", "row", "old", "new", "change", "noise"):
        table.add_column(column, overflow="fold")
    styles = {"slower": "bold red", "lost": "bold red", "faster": "green", "same": ""}
    for change in sorted(changes, key=lambda c: not c.regression):
        now = change.reason if change.new is None else report.time_of(change.new)
        moved = "" if change.new is None else f"{100 * (change.new / change.old - 1):+.1f} %"
        table.add_row(
            change.verdict, change.row, report.time_of(change.old), now, moved, f"{100 * change.noise:.1f} %",
            style=styles[change.verdict],
        )  # fmt: skip
    console.print(table)
    regressions = sum(change.regression for change in changes)
    console.print(f"{regressions} of {len(changes)} rows got slower by more than the noise, or were lost")
    return 1 if regressions else 0


def _read(path: Path) -> dict[str, Any]:
    """A result of this command. Raises ValueError for other files."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        result = None
    if not isinstance(result, dict) or result.get("kind") != run.KIND:
        raise ValueError(f"bench: {path} must be a bench.json of `s1kernels bench`, got another file; measure it again")
    return result
