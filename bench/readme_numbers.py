"""Writes README's numbers from bench/results: `python bench/readme_numbers.py`; with --check, fails if they differ.

What stands between `<!-- KIND: FILE ... -->` and `<!-- end -->` is made of those files: frames (bench_frame.py), demos
(`s1kernels demo --json`), ops (bench_ops.py on a CPU), kernels (bench_ops.py on a GPU), systems (`s1kernels bench`),
speech (bench_speech.py).
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from frame_table import CAPTURED, COMPILED, DEFAULT, EAGER

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- (\w+): ([^>]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

NAMES = {
    ("s1kernels per op", "all"): "s1kernels, `graph=False`",
    ("s1kernels graph", "all"): "s1kernels, `persistent=False`",
    ("s1kernels persistent", "all"): "**s1kernels**",
    ("s1kernels persistent", "semantic"): "s1kernels, `constrained=True`",
    ("s1kernels packed", "all"): "s1kernels, `packed=True`",
    ("s1kernels packed", "semantic"): "s1kernels, `packed=True, constrained=True`",
    ("Triton, graph", "all"): 's1kernels, `backend="triton"`',
    (CAPTURED, "all"): "upstream, captured as a CUDA graph",
    (DEFAULT, "all"): "upstream, `torch.compile` in its default mode",
    (COMPILED, "all"): "upstream, `torch.compile`",
}
"""(row, rows of the head) of bench_frame.py -> how a reader asks for it."""
NOISY = 0.2
"""Rounds that differ by more than so much of their median say little: the GPU's own time of replays counts then."""
REPLAYED = "†"
CONTENDERS = {"cuda": "CUDA", "triton": "Triton", "compiled": "`torch.compile`", "library": "torch's calls"}
"""bench_ops.py's contenders on a GPU -> how a table calls them."""
PROJECTIONS = ("linear_residual", "rms_norm_logits", "rms_norm_qkv", "rms_norm_swiglu")


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def frame_time(row: dict[str, Any]) -> str:
    """ms/frame of generate(), or of replays where its rounds say little."""
    noisy = row["slowest"] - row["fastest"] > NOISY * row["seconds_per_frame"]
    if noisy and "gpu_seconds_per_frame" in row:
        return number(row["gpu_seconds_per_frame"] * 1e3) + REPLAYED
    return number(row["seconds_per_frame"] * 1e3)


def faster(than: dict[str, Any], row: dict[str, Any]) -> str:
    return f"{number(than['seconds_per_frame'] / row['seconds_per_frame'])} times faster"


def frames(result: dict[str, Any]) -> str:
    """Every row of bench_frame.py's largest cache; what was refused is named below."""
    contexts, cache = result["options"]["context"], max(result["options"]["cache"])
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for row in result["rows"]:
        if row["cache"] == cache:
            found.setdefault((row["name"], row["rows"]), {})[row["context"]] = row
    first, lines, notes = next(n for n in contexts if n), [], []
    for key, of in found.items():
        title = NAMES.get(key, key[0] if key[1] == "all" else f"{key[0]}, `constrained=True`")
        reasons = dict.fromkeys(row["refused"] for row in of.values() if "refused" in row)
        notes += [f"{title}: {reason}." for reason in reasons]
        if all("refused" in row for row in of.values()):
            continue
        cells = ["–" if "refused" in of[n] else frame_time(of[n]) for n in contexts]
        rates = ["–", "–"]
        if "refused" not in of[first]:
            rates = [number(of[first]["times_real_time"]), f"{of[first]['percent_of_read_bandwidth']:.2g} %"]
        lines.append([title, *cells, *rates])
    eager, compiled, ours = (found[name, "all"][first] for name in (EAGER, COMPILED, "s1kernels persistent"))
    rounds = " to ".join(number(1e3 * eager[end]) for end in ("fastest", "slowest"))
    gains = [f"**{faster(eager, ours)}** than upstream eager (whose rounds took {rounds} ms)"]
    if "refused" not in compiled:
        gains.append(f"**{faster(compiled, ours)}** than upstream compiled")
    ceiling = result["read_bandwidth"]["gigabytes_per_second"]
    said = (
        f"At {first} positions s1kernels is {' and '.join(gains)}. Plain reads reach {ceiling / 1e3:.2f} TB/s there. "
        f"The main logits' distance to float64 is {ours['logit_error']:.2e}, upstream's "
        f"{ours['upstream_logit_error']:.2e}."
    )
    if any(cell.endswith(REPLAYED) for line in lines for cell in line):
        notes.append(f"{REPLAYED} is a replay's own time: the prompt's varied by more than the frames take.")
    heads = ["", *map(str, contexts), f"times real time at {first}", f"of the reads at {first}"]
    return table(heads, lines) + "\n" + wrapped(" ".join([said, *notes]))


def demos(*results: dict[str, Any]) -> str:
    """Upstream and the same patched, a pair of rows for each machine."""
    lines, said = [], []
    for result in results:
        machine = f"{result['platform']['cores']} cores, torch {result['torch'].partition('+')[0]}"
        for name, title in (("unpatched", "upstream"), ("patched", "upstream, **patched**")):
            seconds = result["seconds_per_frame"][name]
            lines.append([
                machine if name == "unpatched" else "", title, number(seconds * 1e3), number(1 / seconds),
                number(2048 / 44100 / seconds), f"{result['logit_error'][name]:.1e}",
            ])  # fmt: skip
        rounds = f"{min(result['speedup_rounds']):.1f} to {max(result['speedup_rounds']):.1f}"
        said.append(
            f"**{result['speedup']:.1f} times faster** on {result['platform']['cores']} cores (rounds: {rounds})"
        )
    heads = ["machine", "", "ms/frame", "frames/s", "times real time", "error of the logits"]
    return table(heads, lines) + "\n" + wrapped(f"That is {' and '.join(said)}.")


def ops(result: dict[str, Any]) -> str:
    """What the CPU kernels gain over torch's own calls."""
    rows = [bench["extra_info"] for bench in result["benchmarks"]]
    time = {(r["op"], r["case"], r["contender"]): r["microseconds"] for r in rows}
    gain = {
        (op, case): time[op, case, "library"] / us
        for (op, case, by), us in time.items()
        if by == "cpu" and (op, case, "library") in time
    }
    least, most = (f(value for key, value in gain.items() if key[0] in PROJECTIONS) for f in (min, max))
    reads = min(r["percent_of_read_bandwidth"] for r in rows if r["contender"] == "cpu" and r["op"] in PROJECTIONS)
    return wrapped(
        f"The projections at S1-mini's shapes take {least:.1f} to {most:.1f} times less time than torch's own calls "
        f"for them, and read their weights at {reads:.0f} % of what plain reads reach, or more; attention over 512 "
        f"positions takes {gain['attention_decode', 's1_slow_512']:.0f} times less than `scaled_dot_product_attention`."
    )


def kernels(result: dict[str, Any]) -> str:
    """Every op of bench_ops.py by every contender on a GPU: us, GB/s, and percent of the reads."""
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in (bench["extra_info"] for bench in result["benchmarks"]):
        rows.setdefault((row["op"], row["case"]), {})[row["contender"]] = row

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "–"
        rate, part = row["gigabytes_per_second"], row["percent_of_read_bandwidth"]
        return f"{number(row['microseconds'])} · {rate:.0f} · {part:.0f} %"

    lines = [
        [f"{op}, {case.removeprefix('s1_').replace('_', ' ')}", *(cell(by.get(name)) for name in CONTENDERS)]
        for (op, case), by in rows.items()
    ]
    return table(["µs · GB/s · of the reads", *CONTENDERS.values()], lines)


def systems(result: dict[str, Any]) -> str:
    """Every system of `s1kernels bench`, at the first context that has a past."""
    context = next(n for n in sorted({row["context"] for row in result["frames"]}) if n)
    lines = []
    for row in result["frames"]:
        if row["context"] == context:
            cells = [number(row["seconds"] * 1e3), number(row["times_real_time"])] if "seconds" in row else ["–", "–"]
            lines.append([row["system"], *cells, row.get("refused", row.get("dtype", ""))])
    return table(["", f"ms/frame after {context} positions", "times real time", ""], lines)


def speech(result: dict[str, Any]) -> str:
    """Text to sound, by texts' lengths: upstream's pipeline and ours."""
    names = {"s1kernels": "**s1kernels**", "s1kernels, persistent=False": "s1kernels, `persistent=False`"}
    lines, rows = [], [row for row in result["rows"] if "seconds" in row.get("all", {})]
    memory = result["memory"]  # its peak is known on a GPU
    for row in sorted(rows, key=lambda row: row["characters"]):
        title = names.get(row["name"], row["name"].replace("upstream compiled", "upstream, `torch.compile`"))
        lines.append([
            f"{row['characters']} characters, {row['sound']:.1f} s", title, number(row["first"]["seconds"] * 1e3),
            number(row["all"]["seconds"] * 1e3), number(row["times_real_time"]),
            f"{memory[row['name']]['peak'] / 1e9:.2f}" if "peak" in memory[row["name"]] else "–",
        ])  # fmt: skip
    return table(["", "", "first sound, ms", "all of it, ms", "times real time", "GB at most"], lines)


def wrapped(text: str) -> str:
    return textwrap.fill(text, 128, break_long_words=False, break_on_hyphens=False) + "\n"


KINDS: dict[str, Callable[..., str]] = {f.__name__: f for f in (frames, demos, ops, kernels, systems, speech)}


def fill(text: str) -> str:
    """README with its blocks made anew."""

    def block(match: re.Match[str]) -> str:
        head, kind, files, _, end = match.groups()
        results = [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in files.split()]
        return f"{head}{KINDS[kind](*results)}{end}"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if README differs")
    options = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = fill(old)
    if options.check:
        sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "results"))
        return int(old != new)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
