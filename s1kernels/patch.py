"""patch(model): upstream's decode loop runs on the engine, for this model alone; unpatch(model) takes it back.

Upstream's functions are replaced by dispatchers that know the patched models by identity and pass everything else on to
the original. What is dispatched: `decode_n_tokens` and `decode_one_token_ar` of every module that decodes the model's
class, and the class's `forward_generate` (one-token calls) and `setup_caches`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from s1kernels.cache import FIRST_CAPACITY
from s1kernels.engine import Engine
from s1kernels.model.config import Line
from s1kernels.sampling import Sampling
from s1kernels.upstream import UpstreamCache, read_config, read_weights, require_dual_ar, storage

logger = logging.getLogger("s1kernels")

LOOP, STEP = "decode_n_tokens", "decode_one_token_ar"
METHODS = ("forward_generate", "setup_caches")

_LOCK = threading.RLock()
_PATCHED: weakref.WeakKeyDictionary[Any, _Patched] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did: what now runs where, and what was left alone and why."""

    model: str
    line: Line
    dtype: str
    device: str
    backends: Mapping[str, str]
    replaced: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        served = ", ".join(f"{op} by {backend}" for op, backend in self.backends.items())
        lines = [f"s1kernels: patched {self.model} ({self.line} line, {self.dtype}, {self.device}): {served}"]
        lines += [f"  replaced {name}" for name in self.replaced]
        lines += [f"  left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


@dataclass
class _Patched:
    """One patched model's engine, rebuilt when its weights have moved."""

    line: Line
    options: Mapping[str, Any]
    cache: UpstreamCache
    engine: Engine
    storage: list[Any]
    modules: tuple[ModuleType, ...]
    result: type | None

    def current(self, model: nn.Module) -> Engine:
        """The engine, on the weights that the model has now."""
        now = list(storage(model))
        if now != self.storage:
            config = read_config(model, self.line)
            self.engine = Engine(config, read_weights(model, config), cache=self.cache, **self.options)
            self.storage = now
        return self.engine


def patch(
    model: Any, *, backend: str | Mapping[str, str] = "auto", graph: bool = True, persistent: bool = True,
    packed: bool = False, constrained: bool = False,
) -> PatchReport:  # fmt: skip
    """Make an upstream DualAR model decode on s1kernels.

    Parameters, state-dict keys and the caches stay the model's own, and weights are not held twice unless `packed` says
    so. Prefill by upstream, training and other models in the process are untouched. Patching again applies the new
    options.

    Args:
        model: upstream's DualARTransformer of the S1 or the 2.0 line, on its device, in its final dtype.
        backend: "auto", one back end, or {op: back end}; `s1kernels info` lists them.
        graph: on a GPU, replay a whole frame as one CUDA graph; False runs it op by op.
        persistent: let that graph be a single kernel where GPU and model allow it; False makes it of the ops' kernels.
        packed: let that kernel stream a copy of the matrices, whose parts are in the half of L2 that is near whoever
            reads them: a faster frame for 1.3 GB more, of S1-mini. It is made anew when a parameter changes.
        constrained: let the S1 line sample only semantic tokens and the end token (the 2.0 line always does). That
            reads 8 MB of S1-mini's head instead of 319 MB a frame, and no text token can be drawn by accident.
    Returns:
        What was replaced, what was not and why.
    Raises:
        TypeError: not a DualAR model; quantised or LoRA layers; mixed dtypes.
        ValueError: weights that are missing or not finite (named); an unknown back end or op.
        BackendError: the back end asked for cannot serve this model here.
        In every case nothing has been changed.
    """
    require_dual_ar(model)
    with _LOCK:
        modules, left = _decoding_modules(model)
        line = _line(model, modules)
        config = read_config(model, line)
        weights = read_weights(model, config)
        cache = _PATCHED[model].cache if model in _PATCHED else UpstreamCache(config, model, FIRST_CAPACITY)
        options: dict[str, Any] = {
            "backend": backend,
            "graph": graph,
            "persistent": persistent,
            "packed": packed,
            "constrained": constrained,
        }
        engine = Engine(config, weights, cache=cache, **options)
        result = _result_class(model)
        _PATCHED[model] = _Patched(line, options, cache, engine, list(storage(model)), modules, result)
        replaced = _install(model, modules)
        if result is None:
            left["forward_generate"] = (
                "its result class BaseTransformerForwardResult was not found; one-token calls run upstream"
            )
    left["forward_generate (prompts), forward"] = "prefill and training by the caller run upstream's code"
    norm = weights.norm
    report = PatchReport(
        model=type(model).__name__,
        line=line,
        dtype=str(norm.dtype).removeprefix("torch."),
        device=str(norm.device),
        backends=engine.backends,
        replaced=tuple(replaced),
        left=left,
    )
    logger.info("%s", report)
    return report


def unpatch(model: nn.Module) -> None:
    """Give the model its own decode loop back; with the last patched model, upstream's functions.

    Raises:
        ValueError: the model is not patched.
    """
    with _LOCK:
        patched = _PATCHED.pop(model, None)
        if patched is None:
            raise ValueError(
                f"unpatch: model must be patched, got an unpatched {type(model).__name__}; call s1kernels.patch first"
            )
        others = list(_PATCHED.items())
        cache, modules = patched.cache, patched.modules
        del patched  # the engine, and what its graph holds of the cache
        for module in modules:
            if not any(module in other.modules for _, other in others):
                for name in (LOOP, STEP):
                    setattr(module, name, getattr(module, name).__wrapped__)
        if not any(type(other) is type(model) for other, _ in others):
            for name in METHODS:
                original = getattr(type(model), name).__wrapped__
                delattr(type(model), name)
                if getattr(type(model), name, None) is not original:
                    setattr(type(model), name, original)
        if cache.capacity and cache.capacity < cache.limit:
            cache.reserve(cache.limit)


def engine_of(model: nn.Module) -> Engine:
    """The engine that serves a patched model; its `main_logits` and `fast_logits` are those of the last frame.

    Raises:
        ValueError: the model is not patched.
    """
    if model not in _PATCHED:
        raise ValueError(
            f"engine_of: model must be patched, got an unpatched {type(model).__name__}; call s1kernels.patch first"
        )
    return _PATCHED[model].current(model)


def _decoding_modules(model: nn.Module) -> tuple[tuple[ModuleType, ...], dict[str, str]]:
    """Modules that hold a decode loop for the model's class; upstream's own is imported if nobody has yet."""
    left = {}
    found = _loaded(model)
    if not found:
        package = type(model).__module__.rpartition(".")[0]
        try:
            importlib.import_module(f"{package}.inference")
        except ImportError as error:
            left[LOOP] = (
                f"{package}.inference cannot be imported ({error}); a caller's own loop is served one token at a time"
            )
        found = _loaded(model)
    if not found:
        left.setdefault(
            LOOP, "no loaded module has one for this class; a caller's own loop is served one token at a time"
        )
    return found, left


def _loaded(model: nn.Module) -> tuple[ModuleType, ...]:
    classes = set(type(model).__mro__) - {nn.Module, object}
    return tuple(
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        and callable(vars(module).get(LOOP))
        and callable(vars(module).get(STEP))
        and any(isinstance(value, type) and value in classes for value in list(vars(module).values()))
    )


def _line(model: nn.Module, modules: tuple[ModuleType, ...]) -> Line:
    for module in modules:
        return "2.0" if "semantic_logit_bias" in inspect.signature(getattr(module, STEP)).parameters else "s1"
    return "2.0" if hasattr(getattr(model, "config", None), "semantic_begin_id") else "s1"


def _result_class(model: nn.Module) -> type | None:
    for cls in type(model).__mro__:
        function = inspect.unwrap(vars(cls)["forward_generate"]) if "forward_generate" in vars(cls) else None
        if function is not None and "BaseTransformerForwardResult" in function.__globals__:
            return function.__globals__["BaseTransformerForwardResult"]
    return None


def _install(model: nn.Module, modules: tuple[ModuleType, ...]) -> list[str]:
    """Put the dispatchers in place where they are not yet; returns the names of all of them."""
    replaced = []
    makers: dict[str, Callable] = {
        LOOP: _serve_loop,
        STEP: _serve_step,
        "forward_generate": _serve_forward,
        "setup_caches": _serve_setup,
    }
    holders: list[tuple[Any, tuple[str, ...]]] = [(module, (LOOP, STEP)) for module in modules]
    for holder, names in [*holders, (type(model), METHODS)]:
        for name in names:
            if not hasattr(getattr(holder, name), "s1kernels"):
                setattr(holder, name, _dispatcher(getattr(holder, name), makers[name]))
            replaced.append(f"{holder.__name__}.{name}")
    return replaced


def _dispatcher(original: Callable, serve: Callable[..., Any]) -> Callable:
    """A function that lets `serve(patched, model, arguments)` answer for patched models, and `original` otherwise."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        model = arguments.get("model", arguments.get("self"))
        patched = _PATCHED.get(model)
        answer = NotImplemented if patched is None else serve(patched, model, arguments)
        return original(*args, **kwargs) if answer is NotImplemented else answer

    dispatch.s1kernels = True  # type: ignore[attr-defined]
    return dispatch


def _serve_loop(patched: _Patched, model: Any, a: Mapping[str, Any]) -> Any:
    """decode_n_tokens: [N+1, n] int32 frames after cur_token; input_pos moves on in place, as upstream's does."""
    step = getattr(a["decode_one_token"], "_torchdynamo_orig_callable", a["decode_one_token"])
    known = {inspect.unwrap(getattr(module, STEP)) for module in patched.modules}
    if inspect.unwrap(step) not in known or a["audio_parts"] is not None or a["cur_token"].shape[0] != 1:
        return NotImplemented
    engine, count, first = patched.current(model), a["num_new_tokens"], a["cur_token"][0]
    _use_bias(engine, a.get("semantic_logit_bias"))
    frames = engine.frames(first, int(a["input_pos"]), count, _sampling(a))
    progress = next((vars(module)["tqdm"] for module in patched.modules if "tqdm" in vars(module)), iter)
    codes = [frame for frame, _ in zip(frames, progress(range(count)), strict=False)]
    a["input_pos"].add_(len(codes))
    empty = torch.empty(first.shape[0], 0, dtype=torch.int32)
    return (torch.stack(codes, dim=1) if codes else empty).to(first.device)


def _serve_step(patched: _Patched, model: Any, a: Mapping[str, Any]) -> Any:
    """decode_one_token_ar: [N+1, 1] int32, the frame after x [1, N+1, T] at input_pos [T]."""
    x, positions = a["x"], a["input_pos"].tolist()
    consecutive = positions == list(range(positions[0], positions[0] + len(positions)))
    if a["audio_parts"] is not None or x.shape[0] != 1 or not consecutive:
        return NotImplemented
    engine = patched.current(model)
    _use_bias(engine, a.get("semantic_logit_bias"))
    engine.prefill(x[0, :, :-1], positions[0])
    return engine.step(x[0, :, -1:], positions[-1], _sampling(a), a["previous_tokens"])[:, None]


def _serve_forward(patched: _Patched, model: Any, a: Mapping[str, Any]) -> Any:
    """forward_generate for one token: logits [1, 1, Vt] and hidden_states [1, 1, Cf] in the model's dtype."""
    tokens, position = list(a.values())[1], a.get("input_pos")
    if position is None:
        return NotImplemented
    if patched.result is None or tokens.shape[0] != 1 or tokens.shape[2] != 1 or a.get("audio_parts") is not None:
        patched.cache.reserve(int(position.max()) + 1)
        return NotImplemented
    logits, hidden = patched.current(model).slow_step(tokens[0], int(position))
    with torch.no_grad():
        hidden = model.fast_project_in(hidden)
    return patched.result(logits=logits.to(hidden.dtype)[None], hidden_states=hidden[None])


def _serve_setup(patched: _Patched, model: Any, a: Mapping[str, Any]) -> None:
    """setup_caches: a first part now, the rest as it is needed."""
    patched.cache.setup(a["max_batch_size"], a["max_seq_len"], a["dtype"])


def _sampling(a: Mapping[str, Any]) -> Sampling:
    """Upstream's sampling arguments, numbers or 0-dim tensors. The S1 line has no top_k; the other keeps a row at
    least."""
    return Sampling(
        temperature=float(a["temperature"]),
        top_p=float(a["top_p"]),
        repetition_penalty=float(a.get("repetition_penalty", 1.0)),
        top_k=max(1, int(a["top_k"])) if "top_k" in a else 0,
    )


def _use_bias(engine: Engine, bias: Tensor | None) -> None:
    """Sample from the rows that the 2.0 line's semantic_logit_bias ([1, 1, Vt], -inf forbids) allows."""
    if bias is None:
        return
    every = bias.flatten().float()
    ids = every.isfinite().nonzero().flatten()
    values = every[ids] if every[ids].any() else None
    now = engine.active_rows
    if not (_same(now.ids, ids.int()) and _same(now.bias, values)):
        engine.use_rows(engine.rows(ids.int(), values))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
