"""Results of one or several machines as one page: report.html, and its plots as PNG files beside it."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from s1kernels import extras
from s1kernels.bench import plots, provenance
from s1kernels.bench.speech import TOKENS_PER_FRAME

Result = dict[str, Any]
Row = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; --ink: #1e2329; --page: #fff; --soft: #5d6673; --grid: #d5dae1; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --page: #14171b; --soft: #9aa4b1; --grid: #3a424d; --card: #1c2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.8rem; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
p { margin: .5rem 0; max-width: 52rem; }
figure { max-width: 66rem; }
.soft, caption, .why { color: var(--soft); }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; }
td.number, th.number { text-align: right; }
td.why { min-width: 14rem; white-space: normal; font-style: italic; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
  margin: 1rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; font-size: .875rem;
  overflow-wrap: anywhere; }
.card b { font-size: 1rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .75rem; margin: .5rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; }
figure { margin: 1rem 0; color: var(--ink); }
figure svg { display: block; width: 100%; height: auto; }
.wide { display: none; }
@media (min-width: 46rem) { .wide { display: block; } .narrow { display: none; } }
"""


def write(results: list[Result], directory: Path) -> Path:
    """Write report.html and the PNG plots; returns the page's path.

    Args:
        results: of `run.Bench`, one a machine.
        directory: made if it is missing.
    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    extras.require("bench", "matplotlib")
    directory.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.PLOTS.items():
        if (figure := plot(results, plots.WIDE)) is not None:
            (directory / f"{name}.png").write_bytes(plots.png(figure))
    path = directory / "report.html"
    path.write_text(page(results), encoding="utf-8")
    return path


def page(results: list[Result]) -> str:
    """The whole page; it refers to nothing outside itself."""
    sections = [section(results) for section in (_systems, _stages, _contexts, _ops, _speech, _stacks)]
    body = "\n".join(filter(None, sections))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>s1kernels, measured</title>
<style>{STYLE}</style>
<h1>s1kernels, measured</h1>
<p class="soft">A frame is 1/21.5 s of audio: times real time is frames a second over 21.5. What is not as near to
float64 as it should be is not timed, and what could not run is a row with its reason. Times are medians of rounds; in
brackets the fastest and the slowest. GB/s are the bytes that a frame must move at least, over its time.</p>
<div class="cards">{"".join(map(_card, results))}</div>
{body}
</html>
"""


def time_of(seconds: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{plots._short(seconds / size)} {unit}"
    return f"{plots._short(seconds * 1e6)} us"


def _card(result: Result) -> str:
    origin, gpu = result["provenance"], result["provenance"]["gpu"]
    facts = {
        "model": f"{result['model']}; {result['options']['dtype']}",
        "reads": f"{result['read_bandwidth']['gigabytes_per_second']:.0f} GB/s ({result['read_bandwidth']['by']})",
        "system": origin["platform"]["system"],
        "driver": " ".join(filter(None, [gpu.get("driver", ""), gpu.get("driver_model.current", "")])),
        "clocks": ", ".join(f"{name} {value}" for name, value in gpu.items() if "clocks" in name or "power" in name),
        "kernels": gpu.get("provider", ""),
        "torch": origin["torch"],
        "s1kernels": f"{origin['s1kernels']} {origin['commit'][:12]}",
        "date": origin["date"],
        "command": origin["command"],
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value)
    return f'<div class="card"><b>{escape(provenance.machine(origin))}</b><dl>{items}</dl></div>'


def _systems(results: list[Result]) -> str:
    found = plots.systems(results)
    rows = []
    for name, of_machines in found.items():
        measured = [(machine, row) for machine, row in of_machines if "refused" not in row]
        rows += [[name, *_frame_cells(row), machine] for machine, row in measured]
        if not measured:
            reasons = dict.fromkeys(row["refused"] for _, row in of_machines)
            rows.append([name, _Why("; ".join(reasons))])
    if not rows:
        return ""
    contexts = sorted({row["context"] for of_machines in found.values() for _, row in of_machines})
    heads = ["system", "#time a frame", "#frames/s", "#x real time", "#GB/s", "#of reads", "#logits' error", "in", "on"]
    return f"""<h2>Every system, at {" or ".join(f"{n:,}" for n in contexts)} positions of context</h2>
{_figure("systems", results)}{_table(heads, rows)}
<p>A frame can be captured in a CUDA graph because no shape depends on the position: tokens, caches and results are
buffers that stay where they are, the length lives on the device, and what lies past it is masked (plain torch) or not
read (s1kernels). The row “CUDA graphs” is the eager model's own calls, captured once and replayed.</p>"""


def _frame_cells(row: Row) -> list[str]:
    return [
        f"{time_of(row['seconds'])} ({time_of(row['fastest'])} – {time_of(row['slowest'])})",
        f"{row['frames_per_second']:.4g}", f"{row['times_real_time']:.3g}", f"{row['gigabytes_per_second']:.4g}",
        f"{row['percent_of_read_bandwidth']:.3g} %", f"{row['error']:.1e}", _numbers(row),
    ]  # fmt: skip


def _numbers(row: Row) -> str:
    """What a system computed in, and who served it."""
    served = row.get("providers", [])[:1] or sorted(set(row.get("backends", {}).values()))
    return ", ".join([row["dtype"], *served])


def _stages(results: list[Result]) -> str:
    rows = []
    for result in results:
        for r in result.get("stages", []):
            start = [r["program"], r["stage"]]
            if "refused" in r:
                rows.append([*start, _Why(r["refused"])])
                continue
            rows.append([
                *start, str(r["calls"]), f"{r['microseconds']:.1f}", f"{r['bytes'] / 1e6:.2f}",
                f"{r['gigabytes_per_second']:.4g}", f"{r['percent_of_read_bandwidth']:.3g} %",
                provenance.where(result, results),
            ])  # fmt: skip
    if not rows:
        return ""
    heads = ["program", "stage", "#calls", "#us", "#MB", "#GB/s", "#of reads", "on"]
    return f"""<h2>One frame by stage</h2>{_figure("stages", results)}
<p>“ops” runs each stage's kernels by themselves: on a GPU as one CUDA graph over memory that no cache holds, on a CPU
call by call, where handing work to the threads counts. A frame does the same work in one program, so that its stages
overlap, and a cache may hold what every fast step reads, so that it can beat its floor. The persistent kernel's stages
are its own clock's: there a draw counts to the phase that reads it, and the fast stack's attention to the projection
behind it.</p>{_table(heads, rows)}"""


def _contexts(results: list[Result]) -> str:
    contexts = sorted({row["context"] for result in results for row in result.get("frames", [])})
    table: list[list[Any]] = []
    for result in results:
        by_system: dict[str, dict[int, Row]] = {}
        for row in result.get("frames", []):
            by_system.setdefault(row["system"], {})[row["context"]] = row
        for name, of in by_system.items():
            if any("refused" not in row for row in of.values()):
                machine = provenance.where(result, results)
                table.append([name, *(_time_or_reason(of.get(context)) for context in contexts), machine])
    if not table:
        return ""
    heads = ["a frame after positions", *(f"#{context:,}" for context in contexts), "on"]
    return f"<h2>Speed by context</h2>{_figure('context', results)}{_table(heads, table)}"


def _time_or_reason(row: Row | None) -> str:
    if row is None:
        return ""
    return _Why(row["refused"], 1) if "refused" in row else time_of(row["seconds"])


def _ops(results: list[Result]) -> str:
    rows = []
    for result in results:
        for r in result.get("ops", []):
            start = [r["op"], r["case"], r["contender"]]
            if "refused" in r:
                rows.append([*start, _Why(r["refused"])])
                continue
            rows.append([
                *start, f"{r['seconds'] * 1e6:.2f}", f"{r['gigabytes_per_second']:.4g}",
                f"{r['percent_of_read_bandwidth']:.3g} %", f"{r['error']:.0e}",
                provenance.where(result, results),
            ])  # fmt: skip
    if not rows:
        return ""
    heads = ["op", "case", "by", "#us", "#GB/s", "#of reads", "#error", "on"]
    return f"""<h2>Op by op</h2>{_figure("ops", results)}
<p>Arguments rotate over more memory than caches hold, as a model's weights do. “library” is torch's own best calls.</p>
{_table(heads, rows)}"""


def _speech(results: list[Result]) -> str:
    def cells(r: Row) -> list[str]:
        return [
            f"{r['characters']}", f"{r['frames']}", f"{r['audio_seconds']:.2f} s", time_of(r["seconds"]),
            f"{r['real_time_factor']:.3g}", f"{r['times_real_time']:.3g}", f"{r['tokens_per_second']:.4g}",
        ]  # fmt: skip

    heads = ["system", "#characters", "#frames", "#audio", "#generated in", "#RTF", "#x real time", "#tokens/s", "on"]
    table = _rows(results, "speech", lambda r: [r["system"]], cells)
    if not table:
        return ""
    return f"""<h2>Texts spoken</h2>
<p>From the prompt's first frame to the speech's last. Characters become frames at 15 characters a second of English;
tokens are counted as in the project's first table, {TOKENS_PER_FRAME} a frame.</p>{_table(heads, table)}"""


def _stacks(results: list[Result]) -> str:
    def name(r: Row) -> list[str]:
        return [f"{r['table']} {r['dim']}/{r['heads']}/{r['layers']}/{r['positions']}", r["mode"], r["system"]]

    def cells(r: Row) -> list[str]:
        return [time_of(r["seconds"]), f"{r['positions_per_second']:.4g}", f"{r['error']:.1e}", _numbers(r)]

    heads = ["width/heads/layers/positions", "mode", "system", "#time", "#positions/s", "#error", "in", "on"]
    table = _rows(results, "stack", name, cells)
    if not table:
        return ""
    return f"""<h2>Plain transformer stacks</h2>
<p>The sizes that the project began with: all positions at once (sequence), and one more behind the others (step).</p>
{_table(heads, table)}"""


def _rows(
    results: list[Result], part: str, name: Callable[[Row], list[str]], cells: Callable[[Row], list[str]]
) -> list[list[Any]]:
    """A table's rows. What no row of a name was measured for is one row with the reasons."""
    by_name: dict[tuple[str, ...], list[tuple[str, Row]]] = {}
    for result in results:
        for row in result.get(part, []):
            by_name.setdefault(tuple(name(row)), []).append((provenance.where(result, results), row))
    table: list[list[Any]] = []
    for title, rows in by_name.items():
        measured = [(machine, row) for machine, row in rows if "refused" not in row]
        table += [[*title, *cells(row), machine] for machine, row in measured]
        if not measured:
            table.append([*title, _Why("; ".join(dict.fromkeys(row["refused"] for _, row in rows)))])
    return table


class _Why(str):
    """A reason, in a cell over so many columns, or over the rest of the row."""

    span: int | None

    def __new__(cls, text: str, span: int | None = None) -> _Why:
        made = super().__new__(cls, text)
        made.span = span
        return made


def _table(heads: list[str], rows: list[list[Any]]) -> str:
    """Columns whose head begins with "#" hold numbers."""
    numeric = [head.startswith("#") for head in heads]
    marks = [' class="number"' if number else "" for number in numeric]
    head = "".join(f"<th{mark}>{escape(text.lstrip('#'))}</th>" for mark, text in zip(marks, heads, strict=True))
    lines = []
    for row in rows:
        cells = [
            f'<td class="why" colspan="{cell.span or len(heads) - i}">{escape(cell)}</td>'
            if isinstance(cell, _Why)
            else f"<td{marks[i]}>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _figure(name: str, results: list[Result]) -> str:
    parts = []
    for kind, width in (("wide", plots.WIDE), ("narrow", plots.NARROW)):
        if (figure := plots.PLOTS[name](results, width)) is None:
            return ""
        parts.append(f'<div class="{kind}">{plots.svg(figure)}</div>')
    return f"<figure>{''.join(parts)}</figure>"
