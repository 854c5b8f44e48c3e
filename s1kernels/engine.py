"""The engine: one model bound to the back end that serves it, decoding frame after frame from static buffers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from s1kernels import registry
from s1kernels.cache import KVCache
from s1kernels.decoder import Chosen, Decoder, HostDecoder, OpsProgram, check_tokens
from s1kernels.frame_graph import OpsGraph
from s1kernels.model.config import DualARConfig
from s1kernels.model.dual_ar import DualAR
from s1kernels.model.weights import Weights
from s1kernels.sampling import WINDOW, Rows, Sampling
from s1kernels.surfacing import surfacing

logger = logging.getLogger("s1kernels")

PREFILL_FRAMES = 512
"""Frames of a prompt that are read at a time, which bounds the memory that a long one takes."""


class Engine:
    """Decodes one sequence with one model.

    Args:
        config, weights: the model. The weights are used where they lie; nothing is copied but sampled rows of the head,
            and what `packed` asks for.
        backend: "auto", one back end for everything, or {op: back end} for single ops.
        graph: on a GPU, capture a whole frame as one CUDA graph, whichever back ends serve; False runs it op by op. So
            do ops of the reference, which look at the GPU from the host.
        persistent: let that graph be a single kernel where GPU and model allow it (`decoder.frame.persistent` says why
            not); False makes it of the ops' kernels.
        packed: let that kernel stream a copy of the matrices, whose parts are in the half of L2 that is near whoever
            reads them: a faster frame for 1.3 GB more, of S1-mini. Later changes of the weights are not seen.
        constrained: sample only the semantic tokens and the end token, as the 2.0 line always does. The S1 line samples
            the whole vocabulary otherwise, as upstream does.
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
        graph: bool = True,
        persistent: bool = True,
        packed: bool = False,
        constrained: bool = False,
        cache: KVCache | None = None,
    ) -> None:
        self.config, self.weights = config, weights
        self.cache = cache or KVCache(config, weights.norm)
        chosen = {name: backend if isinstance(backend, str) else backend.get(name, "auto") for name in registry.OPS}
        with registry.use_backend(backend):  # refuses unknown names
            self._ops = SimpleNamespace(**{name: Chosen(op, chosen[name]) for name, op in registry.OPS.items()})
        self._model = DualAR(config, weights, self._ops)
        self._programs: dict[int, Any] = {}
        self._bind_frame: Callable[..., Any] | None = None
        self._graph, self._persistent = graph and weights.norm.device.type == "cuda", persistent
        self._packed = packed
        self.all_rows = Rows(weights.head)
        whole = isinstance(backend, str) and (graph or weights.norm.device.type == "cpu")
        with torch.inference_mode(False), torch.no_grad():  # ordinary buffers: they outlive a caller's inference mode
            self.backends = self._choose_program(backend, whole)
            """Who serves: the whole frame under "decode_frame", or op by op."""
            self.use_rows(self.semantic_rows() if constrained or config.line == "2.0" else self.all_rows)

    def reset(self) -> None:
        """Forget what was said: the cache goes back to its first size, and the next prompt starts at position 0."""
        if drop := getattr(self.decoder, "drop", None):  # what holds the cache that goes
            drop()
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
        program = self._program(rows)
        with torch.inference_mode(False), torch.no_grad():
            self.decoder: Decoder = self._decoder(program, rows)

    @property
    def main_logits(self) -> Tensor:
        """[1, V] float32: the main logits of the last frame, one a row of `active_rows`."""
        return self.decoder.main_logits

    @property
    def fast_logits(self) -> Tensor:
        """[1, N-1, K'] float32: the fast logits of the last frame."""
        return self.decoder.fast_logits

    def prefill(self, prompt: Tensor, start: int = 0) -> None:
        """Read a prompt's frames ([N+1, T] tokens) into the cache, at positions start ... start+T-1."""
        tokens = self._frames(prompt)
        check_tokens(tokens, self.config)
        self.cache.reserve(start + tokens.shape[0])
        with torch.inference_mode():
            for done in range(0, tokens.shape[0], PREFILL_FRAMES):
                part = tokens[done : done + PREFILL_FRAMES]
                self._model.prefill(part, start + done, self.cache.k, self.cache.v)

    def slow_step(self, frame: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """The slow transformer on one frame ([N+1, 1]): logits [1, Vt] float32 and hidden [1, C] for the fast one."""
        tokens = self._frames(frame)
        self.cache.reserve(position + 1)
        head = self.weights.head
        at = torch.tensor([position], dtype=torch.int32, device=head.device)
        logits = head.new_empty(1, head.shape[0], dtype=torch.promote_types(head.dtype, torch.float32))
        hidden, normed = (head.new_empty(1, self.config.slow.dim) for _ in range(2))
        with torch.inference_mode():
            self._program(self.all_rows).slow_step(tokens, at, self.cache.k, self.cache.v, logits, hidden, normed)
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
            [N+1] int32: the token and its codes, on the model's device.
        Raises:
            ValueError: tokens or position out of range. FloatingPointError: the logits are not finite.
        """
        with surfacing("start"):
            tokens = self._frames(frame)
        decoded = self.decoder.decode(tokens, position, 1, sampling, previous, generator)
        return next(iter(decoded)).to(self.weights.head.device)

    def frames(
        self, frame: Tensor, position: int, count: int, sampling: Sampling, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Up to `count` frames after `frame` ([N+1, 1]), each [N+1] int32 in host memory; the end token's frame is the
        last."""
        shape = (self.config.codebooks + 1, WINDOW[self.config.line])
        with surfacing("start"):
            tokens = self._frames(frame)
            previous = torch.zeros(shape, dtype=torch.int32, device=self.weights.head.device)
        return self.decoder.decode(tokens, position, count, sampling, previous, generator)

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
        device = self.weights.head.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        frames = self.stream(prompt, max_frames, sampling, generator=generator, start=start)
        return torch.stack(list(frames), dim=1).to(device)

    def stream(
        self,
        prompt: Tensor,
        max_frames: int,
        sampling: Sampling | None = None,
        *,
        generator: torch.Generator | None = None,
        start: int = 0,
    ) -> Iterator[Tensor]:
        """As `generate`, frame by frame: each [N+1] int32 in host memory, as soon as it is there.

        `generator` is the source of randomness, on the model's device; None is torch's own.
        """
        T = prompt.shape[-1]
        if prompt.dim() != 2 or T < 1 or max_frames < 1:
            got = f"{list(prompt.shape)}, {max_frames}"
            raise ValueError(f"Engine.generate: prompt must be [N+1, T >= 1], max_frames >= 1, got {got}; add a frame")
        self.cache.require(start + T + max_frames - 1)
        return self._stream(prompt, max_frames, sampling or Sampling(), generator, start)

    def _stream(
        self, prompt: Tensor, max_frames: int, sampling: Sampling, generator: torch.Generator | None, start: int
    ) -> Iterator[Tensor]:
        last = start + prompt.shape[1] - 1
        self.prefill(prompt[:, :-1], start)
        first = self.step(prompt[:, -1:], last, sampling, None, generator)
        codes = first.cpu()
        yield codes
        if int(codes[0]) != self.config.end_token:
            yield from self.frames(first[:, None], last + 1, max_frames - 1, sampling, generator)

    @property
    def persistent(self) -> bool:
        """Whether a frame is one persistent kernel, whose blocks wait for each other: let nothing run beside it."""
        return getattr(getattr(self.decoder, "frame", None), "persistent", "") is None

    def bytes_per_frame(self, position: int) -> int:
        """Bytes that a frame at `position` must move at least."""
        op = registry.OPS["decode_frame"]
        buffers = HostDecoder(self.config, self.active_rows, self.cache, None)
        arguments = list(buffers.arguments(None, buffers.noise))
        arguments[1].fill_(position)
        return op.bytes_moved(op.checked(*arguments, self.active_rows.head, self.weights.flat(), self.config.to_json()))

    def _choose_program(self, backend: str | Mapping[str, str], whole: bool) -> dict[str, str]:
        """Find who serves the frame, by one trial on a cache of its own: a back end that cannot says so now."""
        cache = KVCache(self.config, self.weights.norm, first=1)
        program = OpsProgram(self._model, self.weights.head)
        trial = HostDecoder(self.config, self.all_rows, cache, program)
        if whole and (backend == "auto" or backend in registry.OPS["decode_frame"].impls):
            model = (self.weights.head, self.weights.flat(), self.config.to_json())
            frame = registry.choose("decode_frame", *trial.arguments(None, trial.noise), *model, backend=str(backend))
            if frame.bind is not None:
                self._bind_frame = frame.bind
                return {"decode_frame": frame.backend}
        with torch.inference_mode():
            program(
                *trial.arguments(None, trial.noise), trial.main_logits, trial.fast_logits,
                torch.zeros(1, self.config.codebooks + 1, dtype=torch.int32, device=self.weights.head.device),
            )  # fmt: skip
        return {name: op.impl.backend for name, op in vars(self._ops).items() if op.impl is not None}

    def _decoder(self, program: Any, rows: Rows) -> Decoder:
        if hasattr(program, "decoder"):  # it keeps a frame's state on the device
            return program.decoder(rows, self.cache)
        if not self._graph:
            return HostDecoder(self.config, rows, self.cache, program)
        if by_reference := [op for op, backend in self.backends.items() if backend == "reference"]:
            logger.info("a frame is run op by op, for the reference serves %s", ", ".join(by_reference))
            return HostDecoder(self.config, rows, self.cache, program)
        return OpsGraph(self.config, rows, self.cache, program)

    def _frames(self, tokens: Tensor) -> Tensor:
        """[N+1, T] tokens of any integer type, checked for shape and int32's range -> [T, N+1] int32."""
        c = self.config
        fits = tokens.dim() == 2 and tokens.shape[0] == c.codebooks + 1 and not tokens.is_floating_point()
        if not fits or (tokens.dtype != torch.int32 and bool((tokens != tokens.int()).any())):
            raise ValueError(
                f"Engine: tokens must be int32 [N+1={c.codebooks + 1}, T], got {list(tokens.shape)} {tokens.dtype}; "
                "row 0 is the text token, row i+1 the code of codebook i"
            )
        return tokens.T.to(self.weights.head.device, torch.int32).contiguous()

    def _program(self, rows: Rows) -> Any:
        """The program that samples these rows. The one for all rows is kept beside the active one."""
        key = rows.head.data_ptr()
        if key not in self._programs:
            if self._bind_frame is None:
                program = OpsProgram(self._model, rows.head)
            else:
                program = self._bind_frame(self.config, self.weights, rows.head, self.config.fast_rows)
                if self._persistent and hasattr(program, "use_persistent"):
                    program.use_persistent(self._packed)
            everything = self.weights.head.data_ptr()
            self._programs = {k: p for k, p in self._programs.items() if k == everything} | {key: program}
        return self._programs[key]
