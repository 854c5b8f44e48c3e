"""Time upstream's own generate(), unpatched against patched, on one model in one run, and check that they agree.

Needs no download: the model has the shape of S1-mini and seeded random weights, so what it says is noise. With
--checkpoint it is a real one. --wav writes what it says, through a codec.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

import s1kernels
from s1kernels import fish_speech
from s1kernels.cli import demo_wav, gpu
from s1kernels.cli.info import platform_facts
from s1kernels.speech.audio import Writer
from s1kernels.speech.codec import seeded
from s1kernels.testing import rel_error

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

FRAMES_PER_SECOND = 44100 / 2048  # the codec's hop
ROUNDS = 5  # unpatched and patched in turn; the median counts
FRAMES = {"cpu": 16, "cuda": 100}  # of a measurement
NEED = 6e9  # bytes, for S1-mini and its copy in float32
TRIES = 3  # of a measurement that another program on the machine spoils
SEEDS = range(2, 7)  # tried in turn until the model speaks as long as it is to

S1_MINI = dict(
    vocab_size=155776, n_layer=28, dim=1024, n_head=16, n_local_heads=8, head_dim=128, intermediate_size=3072,
    codebook_size=4096, num_codebooks=10, n_fast_layer=4, fast_dim=1024, fast_n_head=16, fast_n_local_heads=8,
    fast_head_dim=64,
    fast_intermediate_size=3072, attention_qk_norm=True, fast_attention_qk_norm=False, tie_word_embeddings=False,
    rope_base=1e6, norm_eps=1e-6, use_gradient_checkpointing=False,
)  # fmt: skip
SMALL = S1_MINI | dict(vocab_size=9728, n_layer=6)
"""The same layers, fewer of them, and a smaller vocabulary: for machines without the memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="an S1-mini checkpoint directory instead of random weights")
    parser.add_argument("--small", action="store_true", help="a small model even if the full shape fits")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", help="torch device (default: a GPU if there is one)")
    parser.add_argument("--context", type=int, default=128, help="prompt length in frames (default: 128)")
    parser.add_argument("--frames", type=int, help="frames of a measurement (default: 16, on a GPU 100)")
    parser.add_argument(
        "--cache",
        type=int,
        default=512,
        help="positions of upstream's cache, all of which it attends over (default: 512)",
    )
    parser.add_argument(
        "--wav", type=Path, help="write some seconds of sound there, too (.wav, .flac, .ogg); random weights make noise"
    )
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")


def execute(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    options.device = options.device or gpu.default_device()
    device = gpu.require(options.device)
    options.frames = FRAMES.get(device.type, FRAMES["cpu"]) if options.frames is None else options.frames
    if options.context < 1 or options.frames < 2 or options.context + options.frames + 1 > options.cache:
        raise ValueError(
            f"demo: --context >= 1, --frames >= 2 and their sum + 1 must be at most --cache={options.cache}, "
            f"got {options.context} and {options.frames}; raise --cache"
        )
    if options.wav and options.cache < demo_wav.POSITIONS:
        expected = f"--cache must be at least {demo_wav.POSITIONS} for --wav"
        raise ValueError(f"demo: {expected}, got {options.cache}; raise it")
    logging.getLogger("s1kernels").setLevel(logging.WARNING)  # it patches several times
    dtype, console = getattr(torch, options.dtype), Console(stderr=True)
    with Writer(options.wav) if options.wav else nullcontext() as file:
        given = demo_wav.published(options.checkpoint, device, dtype) if file and options.checkpoint else None
        inference = fish_speech.upstream_module()
        with Progress(console=console, transient=True) as progress:
            building = progress.add_task("building the model", total=None)
            model, what = build(options, dtype)
            progress.update(building, total=1, completed=1)
            result = {"model": what} | measure(inference, model, options, progress)
        if file:
            sizes = seeded.Sizes() if model.config.n_layer == S1_MINI["n_layer"] else seeded.SMALL
            parts = given or (demo_wav.of_bytes(), seeded.seeded(sizes, device, dtype))
            result["wav"] = demo_wav.speak(model, *parts, given is None, file)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _show(result, Console())
    return 0 if result["agrees"] else 1


def measure(inference: Any, model: Any, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Time in turn, compare; returns plain values. `inference` is upstream's module."""
    prompt = _prompt(model, options.context)
    timing = progress.add_task("timing", total=2 * ROUNDS)
    seconds: dict[str, list[float]] = {"unpatched": [], "patched": []}
    logits: dict[str, torch.Tensor] = {}
    for _ in range(ROUNDS):
        for name in seconds:
            if name == "patched":
                report = s1kernels.patch(model)
            seconds[name].append(_time_frames(inference, model, prompt, options.frames))
            logits[name] = _next_logits(model, prompt)
            if name == "patched":
                engine = s1kernels.engine_of(model)
                bytes_moved = engine.bytes_per_frame(options.context + options.frames // 2)
                truth = _true_logits(engine, prompt)
                s1kernels.unpatch(model)
            progress.advance(timing)
    errors = {name: rel_error(value.flatten(), truth) for name, value in logits.items()}
    ratios = [a / b for a, b in zip(seconds["unpatched"], seconds["patched"], strict=True)]
    return {
        "dtype": options.dtype,
        "context": options.context,
        "cache": options.cache,
        "frames": options.frames,
        "device": options.device,
        "gpu": gpu.gpu_facts(torch.device(options.device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "s1kernels": s1kernels.__version__,
        "platform": platform_facts(),
        "backends": dict(report.backends),
        "seconds_per_frame": {name: statistics.median(values) for name, values in seconds.items()},
        "speedup": statistics.median(ratios),
        "speedup_rounds": ratios,
        "bytes_per_frame": bytes_moved,
        "logit_error": errors,
        "agrees": errors["patched"] <= max(errors["unpatched"], 1e-5),
    }


def build(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, str]:
    """The model, and a sentence that says which it is."""
    from fish_speech.models.text2semantic.llama import DualARModelArgs, DualARTransformer

    if options.checkpoint:
        if not options.checkpoint.is_dir():
            raise ValueError(f"demo: --checkpoint must be a directory, got {options.checkpoint}; give S1-mini's folder")
        model = DualARTransformer.from_pretrained(str(options.checkpoint), load_weights=True, max_length=options.cache)
        return model.to(options.device, dtype).eval(), f"checkpoint {options.checkpoint}"
    shape, what = S1_MINI, "S1-mini's shape, seeded random weights"
    if options.small or _free_memory(torch.device(options.device)) < NEED:
        shape, what = SMALL, "a small model with S1-mini's layers, seeded random weights"
        what += "" if options.small else f" (the full shape needs {NEED / 1e9:.0f} GB of memory)"
    tokenizer = SimpleNamespace(
        semantic_begin_id=shape["vocab_size"] - 4096,
        semantic_end_id=shape["vocab_size"] - 1,
        semantic_id_to_token_id={0: shape["vocab_size"] - 4096},
        get_token_id=lambda token: 0,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = DualARTransformer(DualARModelArgs(max_seq_len=options.cache, **shape), tokenizer)
    finally:
        torch.set_default_dtype(default)
    return _materialize(model, options.device).eval(), what


def _free_memory(device: torch.device) -> int:
    import psutil

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _materialize(model: Any, device: str) -> Any:
    """Give a model that was built on "meta" its tables and seeded weights, faster than upstream's own way."""
    from fish_speech.models.text2semantic.llama import precompute_freqs_cis

    c = model.config
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02, generator=generator)
        model.freqs_cis.copy_(precompute_freqs_cis(c.max_seq_len, c.head_dim, c.rope_base))
        model.fast_freqs_cis.copy_(precompute_freqs_cis(c.num_codebooks, c.fast_head_dim, c.rope_base))
        model.causal_mask.copy_(torch.ones_like(model.causal_mask).tril())
    return model


def _prompt(model: Any, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(
        0, min(1024, model.config.codebook_size), (model.config.num_codebooks, length), generator=generator
    )
    main = codes[:1] + model.tokenizer.semantic_begin_id
    return torch.cat([main, codes]).to(model.embeddings.weight.device)


def _time_frames(inference: Any, model: Any, prompt: torch.Tensor, frames: int) -> float:
    """Seconds a frame of upstream's decode loop: a long run less a short one, so that the prompt cancels out."""

    def generate(count: int) -> float:
        for seed in SEEDS:
            torch.manual_seed(seed)
            gpu.synchronize(prompt.device)
            start = time.perf_counter()
            tokens = inference.generate(
                model=model, prompt=prompt, max_new_tokens=count, audio_masks=None, audio_parts=None, temperature=0.7,
                top_p=0.7, repetition_penalty=1.2,
            )  # fmt: skip
            gpu.synchronize(prompt.device)
            seconds = time.perf_counter() - start
            if tokens.shape[1] - prompt.shape[1] == count:
                return seconds
        raise RuntimeError(f"the model ended before {count} frames, with {len(SEEDS)} seeds; give fewer --frames")

    bar, inference.tqdm = inference.tqdm, iter  # upstream draws a bar a run; this command has its own
    try:
        generate(2)
        for _ in range(TRIES):
            short, long = generate(2), generate(2 + frames)
            if long > short:
                return (long - short) / frames
    finally:
        inference.tqdm = bar
    raise RuntimeError(f"{frames} frames more took no longer: too few for this machine's noise; raise --frames")


@torch.inference_mode()
def _next_logits(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """The main logits after the prompt, its last frame fed alone as a decode step feeds it."""
    T = prompt.shape[1]
    model.forward_generate(prompt[None, :, :-1], torch.arange(T - 1, device=prompt.device))
    return model.forward_generate(prompt[None, :, -1:], torch.tensor([T - 1], device=prompt.device)).logits


@torch.inference_mode()
def _true_logits(engine: s1kernels.Engine, prompt: torch.Tensor) -> torch.Tensor:
    """The same from the reference in float32 on the same weights."""
    config, weights = engine.config, engine.weights.to(torch.float32)
    truth = s1kernels.Engine(config, weights, backend="reference")
    truth.prefill(prompt[:, :-1])
    return truth.slow_step(prompt[:, -1:], prompt.shape[1] - 1)[0].flatten()


def _show(result: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    where = result["gpu"].get("name") or f"{result['threads']} threads"
    console.print(f"{result['model']}, {result['dtype']}, {result['context']} positions of context, {where}")
    table = Table(box=None)
    for column in ("", "ms/frame", "frames/s", "times real time", "GB/s", "logits' error"):
        table.add_column(column, justify="right")
    for name, seconds in result["seconds_per_frame"].items():
        gigabytes = f"{result['bytes_per_frame'] / seconds / 1e9:.1f}" if name == "patched" else ""
        rate = 1 / seconds
        error = f"{result['logit_error'][name]:.1e}"
        milliseconds = f"{seconds * 1e3:.{1 if seconds > 0.01 else 3}f}"
        table.add_row(name, milliseconds, f"{rate:.2f}", f"{rate / FRAMES_PER_SECOND:.2f}", gigabytes, error)
    console.print(table)
    rounds = ", ".join(f"{ratio:.2f}" for ratio in result["speedup_rounds"])
    console.print(f"{result['speedup']:.2f} times faster (median of {rounds}); served by {result['backends']}")
    if result["gpu"]:
        console.print(f"CUDA kernels by provider: {result['gpu']['provider']}; driver {result['gpu']['driver']}")
    verdict = "agree" if result["agrees"] else "DO NOT AGREE"
    console.print(f"patched and unpatched {verdict}: error against the reference in float32, above")
    if wav := result.get("wav"):
        line = f"{wav['file']}: {wav['sound_seconds']:.1f} s of sound in {wav['seconds']:.2f} s, the first after "
        console.print(line + f"{1e3 * wav['first_sound_seconds']:.0f} ms; {wav['said']}", markup=False, soft_wrap=True)
