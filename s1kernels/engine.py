"""The engine: one model bound to the back end that serves it, decoding frame after frame from static buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from s1kernels import registry
from s1kernels.contract import Op
from s1kernels.model.config import DualARConfig, Line
from s1kernels.model.dual_ar import DualAR
from s1kernels.model.weights import Weights

WINDOW = {"s1": 16, "2.0": 10}
"""Frames that repetition control looks back on (upstream's win_size and RAS_WIN_SIZE)."""

FIRST_CAPACITY = 512  # positions of a new cache; it doubles when they are used up


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `s1kernels.ops.sample_token` has the meaning. `top_k` 0 means no limit."""

    temperature: float = 0.8
    top_p: float = 0.8
    repetition_penalty: float = 1.1
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 <= self.top_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
            ("top_k", self.top_k >= 0, "at least 0 (0: no limit)"),
        ):
            if not holds:
                raise ValueError(
                    f"Sampling: {name} must be {expected}, got {getattr(self, name)}; choose another value"
                )


@dataclass(frozen=True)
class Rows:
    """The rows of the head that are sampled: all of them, or those that `ids` names."""

    head: Tensor  # [V, C]
    ids: Tensor | None = None  # [V] int32, ascending
    bias: Tensor | None = None  # [V] float32, added to the logits


class KVCache:
    """The slow stack's keys and values, one [1, G, S, D] tensor a layer; S grows as positions are used."""

    def __init__(self, config: DualARConfig, like: Tensor, first: int = FIRST_CAPACITY) -> None:
        self.config, self.first = config, min(first, config.max_positions)
        stack = config.slow
        shape = (1, stack.kv_heads, self.first, stack.head_dim)
        self.k, self.v = ([like.new_empty(shape) for _ in range(stack.layers)] for _ in range(2))

    @property
    def capacity(self) -> int:
        """S, positions that fit."""
        return self.k[0].shape[2]

    def reset(self) -> None:
        """Shrink to the first size; what lay beyond is gone."""
        if self.capacity > self.first:
            self._resize(self.first)

    def require(self, positions: int) -> None:
        """Raise ValueError if `positions` are more than the model's rotary table has."""
        limit = self.config.max_positions
        if positions > limit:
            raise ValueError(
                f"KVCache: positions must be at most max_positions={limit}, got {positions}; use a shorter prompt"
            )

    def reserve(self, positions: int) -> None:
        """Make room for `positions`; what is stored stays. Raises as `require` does."""
        self.require(positions)
        if positions > self.capacity:
            self._resize(min(self.config.max_positions, max(positions, 2 * self.capacity)))

    def _resize(self, capacity: int) -> None:
        with torch.inference_mode(False):  # ordinary tensors: they outlive a caller's inference mode
            self.k, self.v = ([resized(tensor, capacity) for tensor in tensors] for tensors in (self.k, self.v))


def resized(cache: Tensor, capacity: int) -> Tensor:
    """A copy of a cache [R, G, S, D] with room for `capacity` positions."""
    copy, kept = cache.new_zeros(*cache.shape[:2], capacity, cache.shape[3]), min(capacity, cache.shape[2])
    copy[:, :, :kept] = cache[:, :, :kept]
    return copy


class OpsProgram:
    """Runs a frame op by op: where no back end has the whole frame, or when ops are mixed from several."""

    def __init__(self, model: DualAR, head: Tensor) -> None:
        self.model, self.head = model, head

    def __call__(self, *args: Any) -> None:
        main_logits, fast_logits, out = args[-3:]
        given: tuple = (*args[:-3], self.head)
        results = self.model.decode_frame(*given)
        for destination, value in zip((out, main_logits, fast_logits), results, strict=True):
            destination.copy_(value)

    def slow_step(
        self,
        tokens: Tensor,
        position: Tensor,
        k_caches: list[Tensor],
        v_caches: list[Tensor],
        logits: Tensor,
        hidden: Tensor,
        normed: Tensor,
    ) -> None:
        hidden.copy_(self.model.slow_step(tokens, position, k_caches, v_caches))
        results = self.model.ops.rms_norm_logits(hidden, self.model.weights.norm, self.head, self.model.config.norm_eps)
        for destination, value in zip((logits, normed), results, strict=True):
            destination.copy_(value)


class _Chosen:
    """An op that looks its implementation up once, at the first call."""

    def __init__(self, op: Op, backend: str) -> None:
        self.op, self.backend = op, backend
        self.impl: registry.Impl | None = None

    def __call__(self, *args: Any) -> Any:
        out = self.op.empty(self.op.checked(*args))
        if self.impl is None:
            self.impl = registry.choose(self.op.name, *args, backend=self.backend)
        self.impl.run(*args, out)
        return out


class Engine:
    """Decodes one sequence with one model.

    Args:
        config, weights: the model. The weights are used where they lie; nothing is copied but sampled rows of the head.
        backend: "auto", one back end for everything, or {op: back end} for single ops.
        cache: keys and values to work on; None allocates a growing `KVCache`.
    Raises:
        ValueError: unknown back end or op. BackendError: the back end asked for cannot serve this model here.

    >>> engine = Engine(config, weights)                                        # doctest: +SKIP
    >>> codes = engine.generate(prompt, 200, Sampling(top_p=0.9), seed=7)        # doctest: +SKIP
    """

    def __init__(
        self,
        config: DualARConfig,
        weights: Weights,
        *,
        backend: str | Mapping[str, str] = "auto",
        cache: KVCache | None = None,
    ) -> None:
        self.config, self.weights = config, weights
        self.cache = cache or KVCache(config, weights.norm)
        chosen = {name: backend if isinstance(backend, str) else backend.get(name, "auto") for name in registry.OPS}
        with registry.use_backend(backend):  # refuses unknown names
            self._ops = SimpleNamespace(**{name: _Chosen(op, chosen[name]) for name, op in registry.OPS.items()})
        self._model = DualAR(config, weights, self._ops)
        self._options: dict[str, Any] = {
            "dtype": torch.promote_types(weights.norm.dtype, torch.float32),
            "device": weights.norm.device,
        }
        self._programs: dict[int, Any] = {}
        self._bind_frame: Callable[..., Any] | None = None
        self.all_rows = Rows(weights.head)
        with torch.inference_mode(False), torch.no_grad():  # ordinary buffers: they outlive a caller's inference mode
            self._allocate()
            self.use_rows(self.all_rows)
            self.backends = self._choose_program(backend)
            """Who serves: the whole frame under "decode_frame", or op by op."""
            self.use_rows(self.semantic_rows() if config.line == "2.0" else self.all_rows)

    def reset(self) -> None:
        """Forget what was said: the cache goes back to its first size, and the next prompt starts at position 0."""
        self.cache.reset()

    def semantic_rows(self) -> Rows:
        """The rows that may follow in speech: the semantic tokens and the end token. The 2.0 line samples no others."""
        c = self.config
        semantic = range(c.semantic_begin, c.semantic_end + 1)
        return self.rows(torch.tensor(sorted({c.end_token, *semantic}), dtype=torch.int32))

    def rows(self, ids: Tensor, bias: Tensor | None = None) -> Rows:
        """The rows of the head that `ids` ([V] int32, ascending) names, copied out of it."""
        ids = ids.to(self.weights.head.device)
        return Rows(self.weights.head[ids.long()].contiguous(), ids, bias)

    def use_rows(self, rows: Rows) -> None:
        """Sample from these rows of the head from now on."""
        self.active_rows = rows
        self._main_noise = torch.ones(1, rows.head.shape[0], **self._options)
        self._ras_noise = torch.ones_like(self._main_noise) if self.config.line == "2.0" else None
        self.main_logits = torch.zeros_like(self._main_noise)
        """[1, V] float32: the main logits of the last frame, one a row of `active_rows`."""

    def prefill(self, prompt: Tensor, start: int = 0) -> None:
        """Read a prompt's frames ([N+1, T] tokens) into the cache, at positions start ... start+T-1."""
        tokens = self._frames(prompt)
        self.cache.reserve(start + tokens.shape[0])
        with torch.inference_mode():
            self._model.prefill(tokens, start, self.cache.k, self.cache.v)

    def slow_step(self, frame: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """The slow transformer on one frame ([N+1, 1]): logits [1, Vt] float32 and hidden [1, C] for the fast one."""
        tokens = self._frames(frame)
        self.cache.reserve(position + 1)
        self._position.fill_(position)
        head = self.weights.head
        logits = torch.empty(1, head.shape[0], **self._options)
        hidden, normed = (head.new_empty(1, self.config.slow.dim) for _ in range(2))
        with torch.inference_mode():
            self._program(self.all_rows).slow_step(
                tokens, self._position, self.cache.k, self.cache.v, logits, hidden, normed
            )
        return logits, normed if self.config.norm_fast_input else hidden

    def step(
        self,
        frame: Tensor,
        position: int,
        sampling: Sampling,
        previous: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decode the frame after `frame`.

        Args:
            frame: [N+1, 1] tokens of the last frame, at `position`; earlier ones are in the cache.
            sampling: how to draw.
            previous: [N+1, W] the frames before, as `remember` keeps them, or None for no repetition control.
            generator: source of randomness; None is torch's own, as upstream uses it: same seed, same codes.
        Returns:
            [N+1] int32: the token and its codes.
        Raises:
            ValueError: tokens or position out of range. FloatingPointError: the logits are not finite.
        """
        self._tokens.copy_(self._frames(frame))
        self.cache.reserve(position + 1)
        self._position.fill_(position)
        for name, value in vars(sampling).items():
            self._scalars[name].fill_(value)
        self._draw_noise(generator)
        with torch.inference_mode():
            program = self._program(self.active_rows)
            program(*self._arguments(previous, self.cache), self.main_logits, self.fast_logits, self._codes)
        codes = self._codes[0].clone()
        if bool((codes < 0).any()):
            raise FloatingPointError(
                f"decode_frame: logits must be finite, got NaN at position {position}; check the weights "
                "(s1kernels.patch names bad ones)"
            )
        return codes

    def frames(
        self, frame: Tensor, position: int, count: int, sampling: Sampling, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Up to `count` frames after `frame` ([N+1, 1]), each [N+1] int32; the end token's frame is the last."""
        line = self.config.line
        previous = torch.zeros(self.config.codebooks + 1, WINDOW[line], dtype=torch.int32, device=frame.device)
        for i in range(count):
            codes = self.step(frame, position + i, sampling, previous, generator)
            yield codes
            if int(codes[0]) == self.config.end_token:
                return
            previous = remember(line, previous, codes, i)
            frame = codes[:, None]

    def generate(
        self,
        prompt: Tensor,
        max_frames: int,
        sampling: Sampling | None = None,
        *,
        seed: int | None = None,
        start: int = 0,
    ) -> Tensor:
        """Speak on after a prompt.

        Args:
            prompt: [N+1, T] tokens, T >= 1.
            max_frames: frames at most; 21.533 make a second of audio.
            sampling: how to draw.
            seed: same seed, same codes; None draws from torch's generator.
            start: the prompt's first position; earlier ones are kept from calls before.
        Returns:
            [N+1, n] int32, n <= max_frames; ends with the end token's frame if that came.
        Raises:
            ValueError: an empty or too long prompt, tokens out of range.
        """
        sampling = sampling or Sampling()
        T = prompt.shape[-1]
        if prompt.dim() != 2 or T < 1 or max_frames < 1:
            got = f"{list(prompt.shape)}, {max_frames}"
            raise ValueError(f"Engine.generate: prompt must be [N+1, T >= 1], max_frames >= 1, got {got}; add a frame")
        self.cache.require(start + T + max_frames - 1)
        generator = None if seed is None else torch.Generator(self._codes.device).manual_seed(seed)
        self.prefill(prompt[:, :-1], start)
        last = start + T - 1
        first = self.step(prompt[:, -1:], last, sampling, None, generator)
        codes = [first]
        if int(first[0]) != self.config.end_token:
            codes += self.frames(first[:, None], last + 1, max_frames - 1, sampling, generator)
        return torch.stack(codes, dim=1)

    def bytes_per_frame(self, position: int) -> int:
        """Bytes that a frame at `position` must move at least."""
        op = registry.OPS["decode_frame"]
        self._position.fill_(position)
        model = (self.active_rows.head, self.weights.flat(), self.config.to_json())
        return op.bytes_moved(op.checked(*self._arguments(None, self.cache), *model))

    def _allocate(self) -> None:
        """The static buffers: the same storage for every frame."""
        codes, ints = self.config.codebooks, self._options | {"dtype": torch.int32}
        self._tokens, self._codes = (torch.zeros(1, codes + 1, **ints) for _ in range(2))
        self._position = torch.zeros(1, **ints)
        self._scalars = {
            name: torch.zeros((), **self._options) for name in ("temperature", "top_p", "repetition_penalty")
        }
        self._scalars["top_k"] = torch.zeros((), **ints)
        self._fast_noise = torch.ones(1, codes - 1, self.config.fast_rows, **self._options)
        self.fast_logits = torch.zeros_like(self._fast_noise)
        """[1, N-1, K'] float32: the fast logits of the last frame."""

    def _choose_program(self, backend: str | Mapping[str, str]) -> dict[str, str]:
        """Find who serves the frame, by one trial on a cache of its own: a back end that cannot says so now."""
        scratch = KVCache(self.config, self.weights.norm, first=1)
        arguments = self._arguments(None, scratch)
        if isinstance(backend, str):
            model = (self.weights.head, self.weights.flat(), self.config.to_json())
            frame = registry.choose("decode_frame", *arguments, *model, backend=backend)
            if frame.bind is not None:
                self._bind_frame = frame.bind
                return {"decode_frame": frame.backend}
        self._scalars["repetition_penalty"].fill_(1)
        self._program(self.active_rows)(*arguments, self.main_logits, self.fast_logits, self._codes)
        self._programs.clear()
        return {name: op.impl.backend for name, op in vars(self._ops).items() if op.impl is not None}

    def _arguments(self, previous: Tensor | None, cache: KVCache) -> tuple:
        """decode_frame's arguments up to `logit_bias`."""
        main_window, fast_window = repetition_windows(self.config.line, previous)
        rows = self.active_rows
        return (
            self._tokens, self._position, cache.k, cache.v, main_window, fast_window, self._main_noise, self._ras_noise,
            self._fast_noise, *self._scalars.values(), rows.ids, rows.bias,
        )  # fmt: skip

    def _draw_noise(self, generator: torch.Generator | None) -> None:
        """Exponential noise, drawn in upstream's order and shapes, so that a seed means the same there and here."""
        ids, vocab = self.active_rows.ids, self.config.vocab_size
        for noise in (self._main_noise, self._ras_noise):
            if noise is not None:
                drawn = noise[0] if ids is None else torch.empty(vocab, **self._options)
                self._exponential(drawn, generator)
                if ids is not None:
                    noise[0] = drawn[ids.long()]
        for noise in self._fast_noise[0]:
            self._exponential(noise, generator)

    def _exponential(self, noise: Tensor, generator: torch.Generator | None) -> None:
        if self.config.line == "s1":
            noise.exponential_(1, generator=generator)
        else:
            noise.uniform_(generator=generator).clamp_(min=1e-38).log_().neg_()

    def _frames(self, tokens: Tensor) -> Tensor:
        """[N+1, T] tokens of any integer type, checked for shape and int32's range -> [T, N+1] int32."""
        c = self.config
        fits = tokens.dim() == 2 and tokens.shape[0] == c.codebooks + 1 and not tokens.is_floating_point()
        if not fits or bool((tokens != tokens.int()).any()):
            raise ValueError(
                f"Engine: tokens must be int32 [N+1={c.codebooks + 1}, T], got {list(tokens.shape)} {tokens.dtype}; "
                "row 0 is the text token, row i+1 the code of codebook i"
            )
        return tokens.T.to(self._codes.device, torch.int32).contiguous()

    def _program(self, rows: Rows) -> Any:
        """The program that samples these rows. The one for all rows is kept beside the active one."""
        key = rows.head.data_ptr()
        if key not in self._programs:
            if self._bind_frame is None:
                program = OpsProgram(self._model, rows.head)
            else:
                program = self._bind_frame(self.config, self.weights, rows.head, self.config.fast_rows)
            everything = self.weights.head.data_ptr()
            self._programs = {k: p for k, p in self._programs.items() if k == everything} | {key: program}
        return self._programs[key]


def remember(line: Line, previous: Tensor, codes: Tensor, index: int) -> Tensor:
    """The window after frame number `index`. The S1 line fills it from the left, then shifts; the 2.0 line shifts."""
    if line == "s1" and index < previous.shape[1]:
        previous[:, index] = codes
        return previous
    return torch.cat([previous[:, 1:], codes[:, None]], dim=1)


def repetition_windows(line: Line, previous: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What `sample_token` looks at, from the window [N+1, W] as upstream keeps it: ([1, W'] main, [1, N-1, W] fast).

    The S1 line penalises, for the main token, the window's first column (a whole frame, its codes included), as it
    does upstream. The 2.0 line looks at the main tokens only.
    """
    if previous is None:
        return None, None
    previous = previous.to(torch.int32)
    if line == "s1":
        return previous[None, :, 0].contiguous(), previous[None, 2:].contiguous()
    return previous[None, 0].contiguous(), None
