"""Programs that run a frame, and the decoder that calls one frame after frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from s1kernels import registry
from s1kernels.cache import KVCache
from s1kernels.contract import Op
from s1kernels.model.config import DualARConfig
from s1kernels.model.dual_ar import DualAR
from s1kernels.ops.embed_frame import check_range
from s1kernels.sampling import Rows, Sampling, remember, repetition_windows


class Decoder(Protocol):
    """Decodes frame after frame from static buffers, for one choice of the head's rows."""

    main_logits: Tensor  # [1, V] float32, of the last frame
    fast_logits: Tensor  # [1, N-1, K'] float32

    def decode(
        self, tokens: Tensor, position: int, count: int, sampling: Sampling, previous: Tensor | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Up to `count` frames after `tokens` ([1, N+1] int32, at `position`), each [N+1] int32 on the host.

        The frame with the end token is the last. `previous` is the window [N+1, W] that repetition control sees, or
        None for none; `generator` the source of randomness, None for torch's own.
        """
        ...


class FrameBuffers:
    """A frame's static buffers, for one choice of the head's rows."""

    def __init__(self, config: DualARConfig, rows: Rows, cache: KVCache) -> None:
        self.config, self.rows, self.cache = config, rows, cache
        head, codes = rows.head, config.codebooks
        floats: dict[str, Any] = {"dtype": torch.promote_types(head.dtype, torch.float32), "device": head.device}
        ints = floats | {"dtype": torch.int32}
        self._tokens, self._codes = (torch.zeros(1, codes + 1, **ints) for _ in range(2))
        self._position = torch.zeros(1, **ints)
        self._scalars = {name: torch.zeros((), **floats) for name in ("temperature", "top_p", "repetition_penalty")}
        self._scalars["top_k"] = torch.zeros((), **ints)
        self.main_logits = torch.zeros(1, head.shape[0], **floats)
        self.fast_logits = torch.zeros(1, codes - 1, config.fast_rows, **floats)

    def arguments(self, previous: Tensor | None, noise: Noise) -> tuple:
        """decode_frame's arguments up to `logit_bias`, for the position last decoded and a window [N+1, W] or None."""
        main_window, fast_window = repetition_windows(self.config.line, previous)
        return (
            self._tokens, self._position, self.cache.k, self.cache.v, main_window, fast_window, noise.main, noise.ras,
            noise.fast, *self._scalars.values(), self.rows.ids, self.rows.bias,
        )  # fmt: skip


class Noise:
    """A frame's noise from torch's generator, in upstream's order and shapes, so that a seed means the same there and
    here.

    main, ras: [1, V] float32, `ras` in the 2.0 line only; fast: [1, N-1, K'].
    """

    def __init__(self, config: DualARConfig, rows: Rows) -> None:
        self._config, self._ids, head = config, rows.ids, rows.head
        self._options: dict[str, Any] = {
            "dtype": torch.promote_types(head.dtype, torch.float32),
            "device": head.device,
        }
        self.main = torch.ones(1, head.shape[0], **self._options)
        self.ras = torch.ones_like(self.main) if config.line == "2.0" else None
        self.fast = torch.ones(1, config.codebooks - 1, config.fast_rows, **self._options)

    def draw(self, generator: torch.Generator | None) -> None:
        """Fill all of it; None draws from torch's own generator."""
        for noise in (self.main, self.ras):
            if noise is not None:
                drawn = noise[0] if self._ids is None else torch.empty(self._config.vocab_size, **self._options)
                self._exponential(drawn, generator)
                if self._ids is not None:
                    noise[0] = drawn[self._ids.long()]
        for noise in self.fast[0]:
            self._exponential(noise, generator)

    def _exponential(self, noise: Tensor, generator: torch.Generator | None) -> None:
        if self._config.line == "s1":
            noise.exponential_(1, generator=generator)
        else:
            noise.uniform_(generator=generator).clamp_(min=1e-38).log_().neg_()


class HostDecoder(FrameBuffers):
    """Calls a program for each frame, and keeps its state on the host."""

    def __init__(self, config: DualARConfig, rows: Rows, cache: KVCache, program: Any) -> None:
        super().__init__(config, rows, cache)
        self.program, self.noise = program, Noise(config, rows)

    def decode(
        self, tokens: Tensor, position: int, count: int, sampling: Sampling, previous: Tensor | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """See `Decoder`."""
        for name, value in vars(sampling).items():
            self._scalars[name].fill_(value)
        for i in range(count):
            self._tokens.copy_(tokens)
            self.cache.reserve(position + i + 1)
            self._position.fill_(position + i)
            self.noise.draw(generator)
            with torch.inference_mode():
                self.program(*self.arguments(previous, self.noise), self.main_logits, self.fast_logits, self._codes)
            codes = self._codes[0].cpu() if self._codes.is_cuda else self._codes[0].clone()
            yield checked(codes, position + i)
            if int(codes[0]) == self.config.end_token:
                return
            tokens = self._codes.clone()
            if previous is not None:
                previous = remember(self.config.line, previous, tokens[0], i)


def check_tokens(tokens: Tensor, config: DualARConfig) -> None:
    """Raise ValueError as embed_frame's reference does for tokens [T, N+1] out of range: kernels on a GPU cannot."""
    main, codes = tokens[:, :1], tokens[:, 1:]
    check_range("token", main, config.vocab_size, 0)
    semantic = (main >= config.semantic_begin) & (main <= config.semantic_end)
    check_range("code", torch.where(semantic, codes, 0), config.codebook_size, 1)


def checked(codes: Tensor, position: int) -> Tensor:
    """`codes` [N+1] of the frame at `position`, unless a draw found NaN: FloatingPointError."""
    if bool((codes < 0).any()):
        raise FloatingPointError(
            f"decode_frame: logits must be finite, got NaN at position {position}; check the weights "
            "(s1kernels.patch names bad ones)"
        )
    return codes


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
        """The slow transformer alone: logits [B, V] float32, hidden (before the last norm) and normed [B, C]."""
        hidden.copy_(self.model.slow_step(tokens, position, k_caches, v_caches))
        results = self.model.ops.rms_norm_logits(hidden, self.model.weights.norm, self.head, self.model.config.norm_eps)
        for destination, value in zip((logits, normed), results, strict=True):
            destination.copy_(value)


class Chosen:
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
