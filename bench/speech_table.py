"""A result of bench_speech.py in words: `python bench/speech_table.py RESULT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from frame_table import COMPILED, EAGER
from rich.console import Console
from rich.table import Table

from s1kernels.bench import provenance

COLUMNS = (
    "characters", "", "sound s", "first sound ms", "all ms", "x real time", "codec alone %", "x eager", "x compiled",
)  # fmt: skip


def show(result: dict[str, Any], console: Console) -> None:
    origin = result["provenance"]
    where = f"{provenance.machine(origin)}, torch {origin['torch']}"
    console.print(f"{result['model']}, {result['options']['dtype']}, {where}")
    console.print("first sound and all: the median (fastest-slowest); x eager, x compiled: of all / of the first sound")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    timed = [row for row in result["rows"] if "refused" not in row]
    for row in sorted(timed, key=lambda row: row["characters"]):
        faster = row["times_faster_than"]
        table.add_row(
            str(row["characters"]), row["name"], f"{row['sound']:.1f}", _milliseconds(row["first"]),
            _milliseconds(row["all"]), f"{row['times_real_time']:.2f}", f"{100 * row['codec_share']:.0f}",
            *(_ratios(faster.get(base)) for base in (EAGER, COMPILED)),
        )  # fmt: skip
    console.print(table)
    for row in result["rows"]:
        if "refused" in row:
            console.print(f"{row['name']}: {row['refused']}")
    for name, held in result["memory"].items():
        if "peak" in held:
            console.print(f"{name}: model and codec {_mib(held['held'])}, at most {_mib(held['peak'])} with its work")


def _milliseconds(row: dict[str, Any]) -> str:
    return f"{1e3 * row['seconds']:.1f} ({1e3 * row['fastest']:.1f}-{1e3 * row['slowest']:.1f})"


def _ratios(faster: dict[str, float] | None) -> str:
    return "" if faster is None else f"{faster['all']:.2f} / {faster['first']:.2f}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


if __name__ == "__main__":
    show(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Console(markup=False, highlight=False))
