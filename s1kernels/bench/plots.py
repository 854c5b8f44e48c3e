"""The report's plots, by matplotlib: PNG files, and SVG that takes the colours of the page it stands in."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from s1kernels.bench import provenance
from s1kernels.bench.stages import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]
Row = dict[str, Any]

WIDE, NARROW = 9.0, 4.2  # inches
INK, GRID, PAGE = "#1e2329", "#d5dae1", "#fdfefe"
COLOURS = ["#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#0ea5b7", "#ec4899", "#84a31f", "#a16207", "#7c8798"]
"""Of middling lightness, so that they stand out on white and on black."""
OURS = "#10b981"
FONTS = ["DejaVu Sans", "Verdana", "sans-serif"]


def of_stages(results: list[Result], width: float) -> Figure | None:
    """Time per frame as stacked stages, beside the whole frame and the floor; each machine has axes of its own."""
    machines = [(provenance.where(result, results), bars) for result in results if (bars := _stage_bars(result))]
    if not machines:
        return None
    every = ("embed", *STAGES)
    colour = {stage: (COLOURS[i % 10], "" if i < 10 else "////") for i, stage in enumerate(every)}
    names = [name for name in every if any(name == s for _, bars in machines for _, parts in bars for s, _ in parts)]
    colour |= {"frame": (OURS, ""), "floor": ("#7c8798", "")}
    heights = [1.0 + 0.5 * len(bars) for _, bars in machines]
    with _figure(width, sum(heights) + 0.5 + 0.22 * _lines(names, width), heights) as (figure, every_axes):
        for (machine, bars), axes in zip(machines, every_axes, strict=True):
            for y, (_, parts) in enumerate(bars):
                left = 0.0
                for stage, value in parts:
                    fill, hatch = colour[stage]
                    axes.barh(y, value, 0.62, left=left, color=fill, hatch=hatch, edgecolor="white", linewidth=0.4)
                    left += value
                axes.text(left, y, f" {_short(left)} ms", va="center", color=INK)
            _categories(axes, [label for label, _ in bars], width)
            axes.set_xlim(0, 1.2 * max(sum(value for _, value in parts) for _, parts in bars))
            axes.set_xlabel("ms a frame" + (f" on {machine}" if len(machines) > 1 else ""))
        _legend(figure, [_patch(name, *colour[name]) for name in names], width)
    return figure


def _stage_bars(result: Result) -> list[tuple[str, list[tuple[str, float]]]]:
    """What a bar is, and its parts in ms."""
    rows = [row for row in result.get("stages", []) if "refused" not in row]
    if not rows:
        return []
    bars = [
        (program, [(row["stage"], row["seconds"] * 1e3) for row in rows if row["program"] == program])
        for program in dict.fromkeys(row["program"] for row in rows)
    ]
    context = rows[0]["context"]
    bars += [
        (f"a whole frame, {frame['system']}", [("frame", frame["seconds"] * 1e3)])
        for frame in result.get("frames", [])
        if frame["context"] == context and "seconds" in frame
        and (frame["system"].startswith("s1kernels") or "Triton" in frame["system"])
    ]  # fmt: skip
    ceiling = result["read_bandwidth"]["gigabytes_per_second"]
    return [*bars, ("floor: its bytes, read", [("floor", result["bytes_per_frame"][str(context)] / ceiling / 1e6)])]


def of_systems(results: list[Result], width: float) -> Figure | None:
    """Times real time of every system, log scale."""
    bars, absent = [], []
    for name, rows in systems(results).items():
        measured = [(machine, row) for machine, row in rows if "refused" not in row]
        several = len({machine for machine, _ in measured}) > 1
        for machine, row in measured:
            label = f"{name}, {machine}" if several else name
            bars.append((label, row["times_real_time"], name.startswith("s1kernels") or "Triton" in name))
        if not measured:
            absent.append(name)
    if not bars:
        return None
    with _figure(width, 1.3 + 0.34 * (len(bars) + len(absent))) as (figure, (axes,)):
        values = [value for _, value, _ in bars]
        least = min(0.5, *values) / 2
        for y, (_, value, ours) in enumerate(bars):
            axes.barh(y, value - least, 0.66, left=least, color=OURS if ours else COLOURS[0])
            axes.annotate(
                f"{_short(value)}x", (value, y), (5, 0), textcoords="offset points", va="center", color=INK,
                bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        for y in range(len(bars), len(bars) + len(absent)):
            axes.text(least, y, " not measured", va="center", color=INK, alpha=0.55, style="italic")
        axes.axvline(1, color=INK, linewidth=1, linestyle="--", alpha=0.7)
        axes.set_xscale("log")
        axes.set_xlim(least, max(2, *values) * 3)
        _plain_ticks(axes.xaxis)
        _categories(axes, [*(label for label, *_ in bars), *absent], width)
        axes.set_xlabel("times real time (log scale; dashed: real time)")
    return figure


def of_contexts(results: list[Result], width: float) -> Figure | None:
    """Times real time by positions of context; bars from the slowest to the fastest round."""
    lines: dict[str, list[Row]] = {}
    for result in results:
        for row in result.get("frames", []):
            if "refused" not in row:
                where = f", {provenance.where(result, results)}" if len(results) > 1 else ""
                lines.setdefault(row["system"] + where, []).append(row)
    if not lines:
        return None
    contexts = sorted({row["context"] for rows in lines.values() for row in rows})
    with _figure(width, 3.0 + 0.22 * _lines(list(lines), width)) as (figure, (axes,)):
        for i, (name, rows) in enumerate(lines.items()):
            x = [contexts.index(row["context"]) for row in rows]
            y = [row["times_real_time"] for row in rows]
            scale = [row["times_real_time"] * row["seconds"] for row in rows]
            low = [v - s / row["slowest"] for v, s, row in zip(y, scale, rows, strict=True)]
            high = [s / row["fastest"] - v for v, s, row in zip(y, scale, rows, strict=True)]
            axes.errorbar(
                x, y, [low, high], label=name, color=COLOURS[i % len(COLOURS)], marker="os^Dv<>P*X"[i % 10], capsize=3,
                linewidth=1.6,
            )  # fmt: skip
        axes.axhline(1, color=INK, linewidth=1, linestyle="--", alpha=0.7)
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
        axes.set_xticks(range(len(contexts)), [f"{n:,}" for n in contexts])
        axes.set_xlim(-0.25, len(contexts) - 0.75)
        axes.set_xlabel("positions of context")
        axes.set_ylabel("times real time (log scale)")
        _legend(figure, axes.get_legend_handles_labels()[0], width)
    return figure


def of_ops(results: list[Result], width: float) -> Figure | None:
    """Percent of the read bandwidth by op, of each contender."""
    found = [
        (f"{row['op']} {row['case']}" + (f", {provenance.where(r, results)}" if len(results) > 1 else ""), row)
        for r in results for row in r.get("ops", []) if "refused" not in row
    ]  # fmt: skip
    if not found:
        return None
    labels, names = (
        list(dict.fromkeys(x)) for x in ([label for label, _ in found], [r["contender"] for _, r in found])
    )
    names.sort(key=lambda name: (name == "library", name))
    colour = {name: "#7c8798" if name == "library" else COLOURS[i] for i, name in enumerate(names)}
    thick = 0.8 / len(names)
    with _figure(width, 1.5 + (0.16 + 0.15 * len(names)) * len(labels)) as (figure, (axes,)):
        for label, row in found:
            y = labels.index(label) + (names.index(row["contender"]) - (len(names) - 1) / 2) * thick
            value = row["percent_of_read_bandwidth"]
            axes.barh(y, value, thick, color=colour[row["contender"]])
            axes.text(value, y, f" {value:.0f}", va="center", fontsize=7, color=INK)
        axes.axvline(100, color=INK, linewidth=1, linestyle="--", alpha=0.7)
        axes.set_xlim(0, max(110, *(row["percent_of_read_bandwidth"] for _, row in found)) * 1.1)
        _categories(axes, labels, width, size=7.5)
        axes.set_xlabel("% of the read bandwidth (dashed: plain reads)")
        _legend(figure, [_patch(name, colour[name]) for name in names], width)
    return figure


PLOTS: dict[str, Callable[[list[Result], float], Figure | None]] = {
    "systems": of_systems,
    "stages": of_stages,
    "context": of_contexts,
    "ops": of_ops,
}
"""Name of the PNG -> the plot; None if the results lack what it shows."""


def systems(results: list[Result]) -> dict[str, list[tuple[str, Row]]]:
    """System -> its rows of all machines, each at the first context that has a past."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for result in results:
        contexts = sorted({row["context"] for row in result.get("frames", [])})
        at = next((context for context in contexts if context), 0)
        for row in result.get("frames", []):
            if row["context"] == at:
                found.setdefault(row["system"], []).append((provenance.where(result, results), row))
    return found


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, facecolor="white", pil_kwargs={"optimize": True})
    return out.getvalue()


def svg(figure: Figure) -> str:
    """An <svg> element whose ink, grid and ground are the page's (`currentColor`, `--grid`, `--page`)."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = (
        text[text.index("<svg") :]
        .replace(INK, "currentColor")
        .replace(GRID, "var(--grid)")
        .replace(PAGE, "var(--page)")
    )
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)


@contextmanager
def _figure(width: float, height: float, heights: Sequence[float] = (1,)) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in inches, with axes below one another whose heights are in these proportions."""
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {
        "font.family": FONTS[:1], "font.size": 9 if width > NARROW else 8, "svg.fonttype": "none",
        "svg.hashsalt": f"s1kernels{width}", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID,
        "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
        "hatch.linewidth": 0.6,
    }  # fmt: skip
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(width, height), layout="constrained")
        every = figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))[:, 0].tolist()
        for axes in every:
            axes.grid(True, color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
        yield figure, every


def _categories(axes: Axes, labels: list[str], width: float, size: float = 9) -> None:
    """Rows from the top down, each with its label; on a narrow page the labels are wrapped."""
    import textwrap

    wrapped = ["\n".join(textwrap.wrap(label, 34 if width > NARROW else 17)) for label in labels]
    axes.set_yticks(range(len(labels)), wrapped, fontsize=size if width > NARROW else size - 1.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(False, axis="y")


def _plain_ticks(axis: Any) -> None:
    """1, 10 and 100 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _patch(name: str, colour: str, hatch: str = "") -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=name)


def _legend(figure: Figure, handles: list[Any], width: float) -> None:
    columns = _columns([handle.get_label() for handle in handles], width)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _columns(names: list[str], width: float) -> int:
    """Of a legend: as many as there is room for, in inches of its letters."""
    return max(1, min(5, int(width / (0.5 + 0.065 * max(map(len, names))))))


def _lines(names: list[str], width: float) -> int:
    """Of a legend."""
    return -(-len(names) // _columns(names, width))


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}" if value >= 0.1 else f"{value:.2g}"
