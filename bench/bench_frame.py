"""Side by side in one run: frames of upstream's own generate(), eager, compiled by torch, and patched.

The model has S1-mini's shape and seeded random weights. Every row decodes the same way: upstream's generate() at batch
1, no end token coming, timed as a long run less a short one over the difference of frames. A row whose logits are
farther from a float64 reference than upstream's own is refused, and so is one that fails: it carries the reason and no
number.

    python bench/bench_frame.py --json bench/results/frame.json
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frame_table import CAPTURED, COMPILED, DEFAULT, EAGER, milliseconds, show, title
from rich.console import Console
from torch import Tensor
from upstream_step import AS_UPSTREAM, Captured, compiled
from yardstick import FORCED, Yardstick, forced_logits, forget_caches, memory, patched

from s1kernels import Engine, fish_speech
from s1kernels.backends import triton
from s1kernels.backends.cuda import providers
from s1kernels.bench import provenance, read_bandwidth
from s1kernels.cli import demo, gpu

REPLAYS = 100
PATIENCE = 120  # seconds for a process that speaks its first frame
SAMPLING = {"temperature": 0.7, "top_p": 0.7, "repetition_penalty": 1.2}
END = 0  # what demo's tokenizer calls the end token
ERROR_FLOOR = 1e-5  # what float32 leaves open

SKIPPED = {"compiled": COMPILED, "default-mode": DEFAULT, "captured": CAPTURED}
CONTEXTS = [0, 128, 512, 2048, 4096]
FULL = {"context": CONTEXTS, "frames": 200, "slow_frames": 20, "rounds": 5, "settle": 8, "cache": [8192]}
SMALL = {"context": [16], "frames": 4, "slow_frames": 2, "rounds": 2, "settle": 2, "cache": [64]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    lengths = " ".join(map(str, CONTEXTS))
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        help=f"prompt lengths (default: {lengths}); 0: the shortest that can be checked",
    )
    parser.add_argument("--frames", type=int, help="frames that a measurement decodes (default: 200)")
    parser.add_argument(
        "--slow-frames", type=int, help="the same for what takes tens of milliseconds a frame (default: 20)"
    )
    parser.add_argument("--rounds", type=int, help="measurements a row; the median counts (default: 5)")
    parser.add_argument(
        "--settle", type=int, help="frames of the short run: compiled and captured steps settle in them (default: 8)"
    )
    parser.add_argument(
        "--cache", type=int, nargs="+", help="positions of upstream's cache; eager runs with each (default: 8192)"
    )
    parser.add_argument("--rows", nargs="+", default=["all", "semantic"], choices=("all", "semantic"))
    parser.add_argument("--small", action="store_true", help="a small model and small defaults: does it run at all?")
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        choices=SKIPPED,
        help="upstream compiled as it does itself, by torch's default mode, or captured: each takes minutes",
    )
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    for name, value in (SMALL if options.small else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    counts = options.frames, options.slow_frames, options.rounds
    if any(0 != context <= FORCED for context in options.context) or options.settle < 2 or min(counts) < 1:
        parser.error(f"--context must be 0 or over {FORCED}; --settle at least 2, the other counts at least 1")
    return options


def prompt_length(context: int) -> int:
    return max(context, FORCED + 1)


@dataclass
class Contender:
    """One way to decode. `patch` holds the arguments of s1kernels.patch, or is None for upstream as it is. `step` makes
    what upstream's generate() calls for a frame, where that is not its own function."""

    name: str
    frames: int
    patch: dict[str, Any] | None = None
    step: Callable[[], Callable[..., Any]] | None = None
    rows: str = "all"
    refused: str = ""
    """Why it is not measured at all."""


class Bench:
    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.cuda = self.device.type == "cuda"
        self.inference = fish_speech.upstream_module()
        self.result: dict[str, Any] = {"provenance": provenance.collect(self.device)}
        self.result["options"] = {name: value for name, value in vars(options).items() if name != "json"}
        self.rows = self.result["rows"] = []

    def run(self) -> None:
        self.result["read_bandwidth"] = read_bandwidth.measure(self.device)
        gpu.free(self.device)
        first, *others = self.options.cache
        model = self.build(first)
        yardsticks = {context: self.yardstick(model, context) for context in self.options.context if context < first}
        *contenders, captured = self.contenders()
        by_torch = [contender for contender in contenders if contender.step]
        for contender in contenders[: -len(by_torch)]:
            self.measure_all(model, contender, first, yardsticks)
        if self.cuda:
            self.attempt("memory", lambda: self.memory_cycle(model, yardsticks[self.options.context[0]].prompt))
        for cache in others:
            self.measure_all(self.build(cache), contenders[0], cache, yardsticks)
        for contender in by_torch:  # compiling takes longest
            self.measure_all(model, contender, first, yardsticks)
        self.startup(first)
        if self.cuda:
            self.count_all(model, contenders, yardsticks[self.options.context[0]].prompt)
        self.measure_all(model, captured, first, yardsticks)  # last: if it fails on the GPU, nothing runs after it

    def contenders(self) -> list[Contender]:
        o = self.options
        per_op = Contender("s1kernels per op" if self.cuda else "s1kernels", o.slow_frames, {"graph": False})
        no_graph = "" if self.cuda else f"a CUDA graph needs a CUDA device, this is {self.device}"
        graphs = [
            Contender(
                "s1kernels packed" if packed else "s1kernels persistent",
                o.frames,
                {"persistent": True, "packed": packed, "constrained": rows == "semantic"},
                rows=rows,
                refused=no_graph,
            )
            for packed in (False, True)
            for rows in o.rows
        ]
        graphs.insert(0, Contender("s1kernels graph", o.frames, {"persistent": False}, refused=no_graph))
        no_triton = no_graph or triton.available() or ""
        graphs.append(Contender("Triton, graph", o.frames, {"backend": "triton"}, refused=no_triton))
        skipped = {SKIPPED[name]: f"left out (--skip {name})" for name in o.skip}
        no_capture = no_graph or skipped.get(CAPTURED, "")
        captured = Contender(CAPTURED, o.slow_frames, step=lambda: Captured(self.inference), refused=no_capture)
        modes = {DEFAULT: None, COMPILED: AS_UPSTREAM}
        steps = {name: functools.partial(compiled, self.inference, self.device, mode) for name, mode in modes.items()}
        by_torch = [
            Contender(name, o.frames, step=functools.cache(s), refused=skipped.get(name, ""))
            for name, s in steps.items()
        ]
        return [Contender(EAGER, o.slow_frames), per_op, *graphs, *by_torch, captured]

    def build(self, cache: int) -> Any:
        """The model, with an end token whose logit is 0: outside the nucleus of these random logits."""
        what = argparse.Namespace(checkpoint=None, small=self.options.small, device=self.options.device, cache=cache)
        model, self.result["model"] = demo.build(what, self.dtype)
        with torch.no_grad():
            model.output.weight[END] = 0
        return model

    def yardstick(self, model: Any, context: int) -> Yardstick:
        """The truth from the reference in float64 on the same weights."""
        prompt = demo._prompt(model, prompt_length(context))
        with patched(model, {"backend": "reference", "graph": False}) as engine:
            config, weights = engine.config, engine.weights
        plain = Engine(config, weights, backend="reference")
        position = context + self.options.settle + self.options.frames // 2
        plain.cache.reserve(position + 1)
        every, rows = {"all": plain.bytes_per_frame(position)}, plain.semantic_rows()
        plain.use_rows(rows)
        every["semantic"] = plain.bytes_per_frame(position)
        with torch.inference_mode():
            reference = Engine(config, weights.to(torch.float64), backend="reference")
            reference.prefill(prompt[:, :-FORCED])
            last = range(prompt.shape[1] - FORCED, prompt.shape[1])
            truth = [reference.slow_step(prompt[:, t : t + 1], t)[0] for t in last]
        forget_caches(model)
        return Yardstick(prompt, torch.cat(truth), rows.ids.long(), every)

    def measure_all(self, model: Any, contender: Contender, cache: int, yardsticks: dict[int, Yardstick]) -> None:
        """A row for every context."""
        for context in self.options.context:
            row: dict[str, Any] = {
                "name": contender.name, "rows": contender.rows, "cache": cache, "context": context,
            }  # fmt: skip
            self.rows.append(row)
            needed = prompt_length(context) + self.options.settle + contender.frames + 1
            if contender.refused:
                row["refused"] = contender.refused
            elif needed > cache:
                row["refused"] = f"needs {needed} positions, the cache has {cache}"
            else:
                try:
                    row.update(self.measure(model, contender, yardsticks[context], context))
                except Exception as error:  # whatever a contender fails by belongs in its row
                    traceback.print_exc()
                    row["refused"] = provenance.reason(error)
                    if contender.step is not None:
                        contender.refused = row["refused"]  # it would fail again, and compiling takes minutes
            self.console.print(f"{title(row)}: {row.get('refused') or milliseconds(row) + ' ms/frame'}")
            self.save()

    def measure(self, model: Any, contender: Contender, yardstick: Yardstick, context: int) -> dict[str, Any]:
        """One row's numbers; raises if its logits are not as good as upstream's."""
        forget_caches(model)
        gpu.free(self.device)
        step = contender.step() if contender.step else None
        few = min(self.options.settle, contender.frames)
        many = few + contender.frames
        before = torch.cuda.memory_allocated(self.device) if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with patched(model, contender.patch) as engine:
            asked = contender.patch or {}
            if engine is not None and asked.get("persistent"):
                frame = engine.decoder.frame
                if reason := frame.persistent or (asked["packed"] and frame.unpacked):
                    raise RuntimeError(reason)
            row: dict[str, Any] = {"first_run_seconds": self.speak(model, yardstick.prompt, few, step)}
            self.speak(model, yardstick.prompt, many, step)
            if self.cuda:
                row["memory"] = memory(model, before, torch.cuda.max_memory_allocated(self.device))
            row |= self.gate(model, engine, contender, yardstick)
            rounds = []
            for _ in range(self.options.rounds):
                short, long = (self.speak(model, yardstick.prompt, count, step) for count in (few, many))
                rounds.append((long - short) / contender.frames)
            if min(rounds) <= 0:
                raise RuntimeError(f"{contender.frames} frames more took no longer: too few for this machine's noise")
            row |= {"frames": contender.frames, "seconds_per_frame": statistics.median(rounds), "rounds": rounds}
            row |= {"fastest": min(rounds), "slowest": max(rounds)}
            if engine is not None:
                row |= self.engine_facts(engine, context + (few + many) // 2)
        row["bytes_per_frame"] = yardstick.bytes[contender.rows]
        seconds = row["seconds_per_frame"]
        row["frames_per_second"] = 1 / seconds
        row["times_real_time"] = 1 / seconds / demo.FRAMES_PER_SECOND
        row["gigabytes_per_second"] = row["bytes_per_frame"] / seconds / 1e9
        ceiling = self.result["read_bandwidth"]["gigabytes_per_second"]
        row["percent_of_read_bandwidth"] = 100 * row["gigabytes_per_second"] / ceiling
        return row

    def engine_facts(self, engine: Engine, position: int) -> dict[str, Any]:
        """Who serves, and what a frame that is a graph tells about itself."""
        facts: dict[str, Any] = {"backends": dict(engine.backends)}
        if self.cuda and "cuda" in facts["backends"].values():
            facts["provider"] = providers.provider("decode_frame", self.dtype, self.device)
        if hasattr(engine.decoder, "time_frames"):
            facts["gpu_seconds_per_frame"] = engine.decoder.time_frames(position, REPLAYS)
        if hasattr(engine.decoder, "kernels"):
            facts["graph_kernels_per_frame"] = engine.decoder.kernels
        return facts

    def gate(self, model: Any, engine: Any, contender: Contender, y: Yardstick) -> dict[str, Any]:
        """Teacher-forced main logits against the truth. Upstream eager is what the others are held to."""
        if contender.step is not None:
            return {"logit_error": None}  # its logits do not leave the step
        logits = forced_logits(model, engine, y.prompt)
        error = y.error(logits, contender.rows)
        if contender.patch is None:
            y.upstream_error = {rows: y.error(logits, rows) for rows in ("all", "semantic")}
        elif not y.upstream_error:
            raise RuntimeError("upstream's own error is not known, so there is nothing to hold the logits to")
        allowed = max(y.upstream_error[contender.rows], ERROR_FLOOR)
        if not error <= allowed:
            raise ArithmeticError(f"its logits' error {error:.2e} is larger than upstream's {allowed:.2e}")
        return {"logit_error": error, "upstream_logit_error": y.upstream_error[contender.rows]}

    def speak(self, model: Any, prompt: Tensor, count: int, step: Callable | None = None) -> float:
        """Seconds of upstream's generate() for `count` frames."""
        arguments = {} if step is None else {"decode_one_token": step}
        bar, self.inference.tqdm = self.inference.tqdm, iter
        try:
            for seed in range(5):
                torch.manual_seed(seed)
                gpu.synchronize(self.device)
                start = time.perf_counter()
                tokens = self.inference.generate(
                    model=model, prompt=prompt, max_new_tokens=count, audio_masks=None, audio_parts=None, **SAMPLING,
                    **arguments,
                )  # fmt: skip
                gpu.synchronize(self.device)
                seconds = time.perf_counter() - start
                if tokens.shape[1] - prompt.shape[1] == count:
                    return seconds
        finally:
            self.inference.tqdm = bar
        raise RuntimeError(f"the end token came before {count} frames, with five seeds")

    def count_all(self, model: Any, contenders: list[Contender], prompt: Tensor) -> None:
        """Kernels of a frame at the first context. After all times are taken: the profiler may slow what follows it,
        and patching may make the compiled step compile again."""
        for contender in reversed(contenders):
            row = next(r for r in self.rows if (r["name"], r["rows"]) == (contender.name, contender.rows))
            if "refused" in row:
                continue
            forget_caches(model)
            step = contender.step() if contender.step else None
            try:
                with patched(model, contender.patch):
                    self.speak(model, prompt, self.options.settle, step)
                    row["kernels_per_frame"] = self.count_kernels(model, prompt, step)
            except Exception as error:
                traceback.print_exc()
                row["kernels_per_frame_refused"] = provenance.reason(error)
            self.save()

    def count_kernels(self, model: Any, prompt: Tensor, step: Callable | None) -> float:
        """Kernels of one frame, by the profiler: those of a longer run less those of a shorter one."""
        counts = []
        for frames in (4, 6):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                self.speak(model, prompt, frames, step)
            on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            counts.append(sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu))
        return (counts[1] - counts[0]) / 2

    def memory_cycle(self, model: Any, prompt: Tensor) -> dict[str, Any]:
        """Bytes in use before patch, while patched, after unpatch; upstream's caches are there already, as after its
        init_model. The second cycle counts: the first loads kernels that stay with the process."""
        forget_caches(model)
        with self.device:
            model.setup_caches(1, model.config.max_seq_len, self.dtype)
        for _ in range(2):
            facts = {"before_patch": self.in_use()}
            with patched(model, {}):
                self.speak(model, prompt, self.options.settle)
                facts["patched"] = self.in_use()
            facts["after_unpatch"] = self.in_use()
        return facts

    def in_use(self) -> dict[str, int]:
        gpu.free(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return {"allocated": torch.cuda.memory_allocated(self.device), "device": total - free}

    def startup(self, cache: int) -> None:
        """Seconds from patch to the first frame, each in a process of its own."""
        command = [sys.executable, str(Path(__file__).with_name("bench_startup.py"))]
        command += ["--device", self.options.device, "--dtype", self.options.dtype, "--cache", str(cache)]
        command += [
            "--context",
            str(prompt_length(self.options.context[0])),
            *(["--small"] if self.options.small else []),
        ]
        times = self.result["patch_to_first_frame"] = {}
        with tempfile.TemporaryDirectory() as empty:
            own = str(Path(empty, "nvrtc"))  # of NVRTC, which keeps what it compiled, too
            cold = {"S1KERNELS_CUDA_PROVIDER": "nvrtc", "S1KERNELS_CACHE_DIR": empty, "CUDA_CACHE_PATH": own}
            ways = {"compiled": {"S1KERNELS_CUDA_PROVIDER": "compiled"}, "nvrtc, cold": cold, "nvrtc, warm": cold}
            if triton.available() is None:
                of_triton = {"S1KERNELS_BACKEND": "triton", "TRITON_CACHE_DIR": str(Path(empty, "triton"))}
                ways |= {"Triton, cold": of_triton, "Triton, warm": of_triton}
            for name, environment in ways.items() if self.cuda else [(self.device.type, {})]:
                try:
                    done = subprocess.run(
                        command, capture_output=True, text=True, env=os.environ | environment, timeout=PATIENCE
                    )
                except subprocess.TimeoutExpired:
                    times[name] = {"refused": f"it took more than {PATIENCE} s"}
                    continue
                lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no output"]
                times[name] = {"refused": lines[-1]} if done.returncode else json.loads(lines[-1])
                self.console.print(f"patch to first frame, {name}: {times[name]}")
                self.save()

    def attempt(self, name: str, call: Callable[[], Any]) -> None:
        try:
            self.result[name] = call()
        except Exception as error:
            traceback.print_exc()
            self.result[name] = {"refused": provenance.reason(error)}

    def save(self) -> None:
        """Compare the rows of a context with upstream's, and write what there is."""
        for row in self.rows:
            if "seconds_per_frame" in row:
                row["times_faster_than"] = {
                    f"{base['name']}, cache {base['cache']}": base["seconds_per_frame"] / row["seconds_per_frame"]
                    for base in self.rows
                    if base["name"] in (EAGER, COMPILED) and base["context"] == row["context"]
                    if "seconds_per_frame" in base and base is not row
                }
        provenance.write(self.options.json, self.result)


def main() -> None:
    options = parse()
    logging.getLogger("s1kernels").setLevel(logging.WARNING)  # it patches several times
    bench = Bench(options, Console(stderr=True, markup=False, highlight=False))
    bench.run()
    bench.save()
    show(bench.result, Console(markup=False, highlight=False))
    if options.json is None:
        bench.console.print("give --json PATH to keep the result")


if __name__ == "__main__":
    main()
