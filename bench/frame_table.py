"""A result of bench_frame.py in words: `python bench/frame_table.py RESULT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EAGER, COMPILED = "upstream eager", "upstream compiled"
CAPTURED, DEFAULT = "upstream captured", "upstream compiled by default"
COLUMNS = (
    "context", "", "rows", "cache", "ms/frame", "GPU ms", "x real time", "kernels", "GB/s", "% of reads", "x eager",
    "x compiled", "extra MB", "error",
)  # fmt: skip


def show(result: dict[str, Any], console: Console) -> None:
    options, origin, bandwidth = result["options"], result["provenance"], result["read_bandwidth"]
    machine = origin["gpu"].get("name") or origin["platform"]["processor"]
    console.print(f"{result['model']}, {options['dtype']}, {machine}, torch {origin['torch']}")
    console.print(f"reads at {bandwidth['gigabytes_per_second']:.0f} GB/s at most ({bandwidth['by']})")
    console.print("GB/s: the bytes that a frame must move at least, over its time")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in sorted(result["rows"], key=lambda row: row["context"]):
        start = [str(row["context"]), row["name"], row["rows"], str(row["cache"])]
        table.add_row(*start, *(["-"] if "refused" in row else _cells(row, options["cache"][0])))
    console.print(table)
    for row in result["rows"]:
        if "refused" in row:
            console.print(f"{title(row)}: {row['refused']}")
    for name, times in result.get("patch_to_first_frame", {}).items():
        said = times.get("refused") or f"{times['patch_to_first_frame']:.2f} s"
        console.print(f"patch to first frame, {name}: {said}")
    if "memory" in result:
        console.print("memory: " + (result["memory"].get("refused") or _megabytes(result["memory"])))


def title(row: dict[str, Any]) -> str:
    return f"{row['name']}, {row['rows']} rows, cache {row['cache']}, context {row['context']}"


def milliseconds(row: dict[str, Any]) -> str:
    """The median, and the fastest and the slowest round."""
    return f"{row['seconds_per_frame'] * 1e3:.3f} ({row['fastest'] * 1e3:.3f}-{row['slowest'] * 1e3:.3f})"


def _cells(row: dict[str, Any], cache: int) -> list[str]:
    """A measured row's cells, from ms/frame on."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    gpu, error, faster = row.get("gpu_seconds_per_frame"), row["logit_error"], row["times_faster_than"]
    return [
        milliseconds(row),
        number(gpu and gpu * 1e3, 3),
        number(row["times_real_time"], 2),
        number(row.get("kernels_per_frame"), 0),
        number(row["gigabytes_per_second"], 0),
        number(row["percent_of_read_bandwidth"], 1),
        number(faster.get(f"{EAGER}, cache {cache}"), 2),
        number(faster.get(f"{COMPILED}, cache {cache}"), 2),
        number(row["memory"]["extra"] / 1e6 if "memory" in row else None, 1),
        "" if error is None else f"{error:.1e}",
    ]


def _megabytes(stages: dict[str, dict[str, int]]) -> str:
    return ", ".join(
        f"{stage.replace('_', ' ')} {used['allocated'] / 1e6:.1f} MB of tensors, {used['device'] / 1e6:.0f} of the GPU"
        for stage, used in stages.items()
    )


if __name__ == "__main__":
    show(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Console(markup=False, highlight=False))
