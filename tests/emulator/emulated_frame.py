"""One frame of the persistent kernel in the emulator, held against float64, plain torch and torch's random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from emulated_kernels import Library
from torch import Tensor

from s1kernels.backends.cuda import l2_halves, persistent_frame
from s1kernels.backends.cuda.l2_halves import Halves
from s1kernels.backends.cuda.launch import Launch
from s1kernels.draws import Draws
from s1kernels.model import torch_ops
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.dual_ar import DualAR
from s1kernels.model.weights import Weights
from s1kernels.ops import references
from s1kernels.sampling import WINDOW, Rows
from s1kernels.testing import rel_error

GPU = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048)  # what torch's draws depend on
CODES, END_TOKEN, TEXT_TOKEN = 1024, 2, 1
SCALARS = {
    "temperature": torch.tensor(0.9), "top_p": torch.tensor(0.95), "repetition_penalty": torch.tensor(1.2),
    "top_k": torch.tensor(0, dtype=torch.int32),
}  # fmt: skip


def config_of(layers: int, fast_layers: int, codebooks: int, intermediate: int, positions: int) -> DualARConfig:
    """S1-mini's widths, and as much of the rest as is asked for."""
    return DualARConfig(
        vocab_size=5000, codebooks=codebooks, codebook_size=CODES, semantic_begin=3000, semantic_end=2999 + CODES,
        max_positions=positions, norm_eps=1e-6, rope_base=1e4, tie_embeddings=False, scale_codebook_embeddings=False,
        norm_fast_input=False, end_token=END_TOKEN, line="s1",
        slow=StackConfig(
            layers=layers, dim=1024, heads=16, kv_heads=8, head_dim=128, intermediate=intermediate, qk_norm=True
        ),
        fast=StackConfig(
            layers=fast_layers, dim=1024, heads=16, kv_heads=8, head_dim=64, intermediate=intermediate
        ),
    )  # fmt: skip


def aligned(t: Tensor) -> Tensor:
    """A copy that begins at a multiple of 256 bytes, as on a GPU."""
    room = torch.empty(t.numel() * t.element_size() + 256, dtype=torch.uint8)
    first = -room.data_ptr() % 256
    return room[first : first + t.numel() * t.element_size()].view(t.dtype).view(t.shape).copy_(t)


class Model:
    """Random weights, and the rows of the head that are sampled: of all tokens with the end token biased away, or, if
    `constrained`, of the semantic tokens and the end token, by their ids."""

    def __init__(self, config: DualARConfig, dtype: torch.dtype, constrained: bool) -> None:
        self.config, self.dtype = config, dtype
        generator = torch.Generator().manual_seed(0)

        def draw(key: str, shape: tuple[int, ...]) -> Tensor:
            noise = torch.randn(shape, generator=generator)
            return aligned((noise * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.1 * noise).to(dtype))

        self.weights = Weights.build(config, draw)
        self.tokens = torch.arange(config.vocab_size)  # of the sampled rows
        ids = bias = None
        if constrained:
            self.tokens = torch.tensor([END_TOKEN, *range(config.semantic_begin, config.semantic_end + 1)])
            ids = self.tokens.int()
        else:
            bias = torch.where(self.tokens == END_TOKEN, -1e4, 0.0)
        self.rows = Rows(aligned(self.weights.head[self.tokens]), ids, bias)
        self.exact, self.exact_head = self.weights.to(torch.float64), self.rows.head.double()
        with mock.patch.object(torch.cuda, "get_device_properties", lambda device: GPU):
            self.draws = Draws(config, self.rows, config.fast_rows)

    def caches(self, position: int, dtype: torch.dtype, past_end: float) -> list[Tensor]:
        """The keys of all layers, then the values: random up to the position, `past_end` from there on."""
        generator = torch.Generator().manual_seed(position)
        made = []
        for _ in range(2 * self.config.slow.layers):
            t = torch.full((1, 8, self.config.max_positions, 128), past_end)
            t[:, :, :position] = torch.randn(1, 8, position, 128, generator=generator)
            made.append(aligned(t.to(self.dtype).to(dtype)))
        return made

    def reference(self, exact: bool, tokens: Tensor, position: int, codes: list[int]) -> tuple[Tensor, ...]:
        """Main logits, fast logits, new keys and values of a frame whose draws come out as `codes`; in float64, or by
        plain torch in the model's dtype."""
        ops, weights, head = (
            (references, self.exact, self.exact_head) if exact else (torch_ops, self.weights, self.rows.head)
        )
        wide = torch.float64 if exact else torch.float32
        caches = self.caches(position, head.dtype, 0.0)
        layers = self.config.slow.layers
        one, none, bias = torch.tensor(1.0, dtype=wide), torch.tensor(0, dtype=torch.int32), self.rows.bias
        main = torch.full((1, len(head)), 1e30, dtype=wide)
        main[0, self.tokens == codes[0]] = 1e-5  # a draw takes the row with the least noise
        fast = torch.full((1, self.config.codebooks - 1, CODES), 1e30, dtype=wide)
        fast[0, torch.arange(len(codes) - 2), codes[2:]] = 1e-5
        _, main_logits, fast_logits = DualAR(self.config, weights, ops).decode_frame(
            tokens, torch.tensor([position], dtype=torch.int32), caches[:layers], caches[layers:], None, None, main,
            None, fast, one, one, one, none, self.rows.ids, None if bias is None else bias.to(wide), head,
        )  # fmt: skip
        return main_logits, fast_logits, torch.stack(caches)[:, 0, :, position]


@dataclass
class Frame:
    """What the kernel wrote."""

    model: Model
    position: int
    tokens: Tensor
    window: Tensor
    rng: Tensor
    caches: Tensor  # [2 * layers, heads, positions, D]
    main_logits: Tensor
    fast_logits: Tensor
    codes: list[int]
    launch: Launch

    def results(self) -> tuple[Tensor, ...]:
        return self.main_logits, self.fast_logits, self.caches[:, :, self.position]

    def errors(self) -> dict[str, tuple[float, float]]:
        """The distances to float64 of main logits, fast logits, new keys and values: the kernel's, and plain torch's.
        Biased tokens are left out: their bias hides what is wrong."""
        truth, plain = (self.model.reference(e, self.tokens, self.position, self.codes) for e in (True, False))
        free = self.model.rows.bias == 0 if self.model.rows.bias is not None else slice(None)
        return {
            name: (rel_error(value, true), rel_error(other, true))
            for name, value, other, true in zip(
                ("main logits", "fast logits", "new k and v"),
                *((main[:, free], *rest) for main, *rest in (self.results(), plain, truth)), strict=True,
            )
        }  # fmt: skip

    def right_draws(self) -> list[bool]:
        """Whether each draw is what sample_token makes of the kernel's own logits and torch's numbers."""
        model, (seed, offset) = self.model, self.rng.tolist()
        where, right = model.draws.offsets, []
        said = [self.window[:, 0], *self.window[2:]]
        drawn = [self.codes[0], *self.codes[2:]]
        for i, logits in enumerate((self.main_logits[0], *self.fast_logits[0])):
            if i == 0:
                noise = exponential(model.tokens.numpy(), seed, offset, where["main_threads"])
            else:
                at = offset + where["fast_offset"] + (i - 1) * where["fast_step"]
                noise = exponential(np.arange(CODES), seed, at, where["fast_threads"])
            token = references.sample_token(
                logits[None], noise[None], None, said[i][None], model.rows.ids if i == 0 else None,
                *SCALARS.values(), 0, 0,
            )  # fmt: skip
            right.append(int(token) == drawn[i])
        return right

    def faults(self) -> list[str]:
        """All that is wrong."""
        config, position = self.model.config, self.position
        found = [
            f"{name}: {mine:.2e} from float64, plain torch {other:.2e}"
            for name, (mine, other) in self.errors().items()
            if not mine <= 1.5 * other
        ]
        found += [f"draw {i} is not what its logits say" for i, right in enumerate(self.right_draws()) if not right]
        if self.codes[1] != min(max(self.codes[0] - config.semantic_begin, 0), CODES - 1):
            found.append(f"the first code is {self.codes[1]} for the token {self.codes[0]}")
        before = torch.stack(self.model.caches(position, self.model.dtype, 0.0))[:, 0, :, :position]
        if not torch.equal(self.caches[:, :, :position], before):
            found.append("rows of the caches before the position changed")
        if not self.caches[:, :, position + 1 :].isnan().all():
            found.append("rows of the caches past the position were written")
        return found


def run_frame(
    model: Model,
    library: Library,
    position: int,
    *,
    text: bool = False,
    seed: int = 0,
    times: int = 1,
    packed: bool = False,
) -> Frame:
    """Runs the kernel at a position, from random tokens (or a token of text) and a random window. Caches past the
    position and the outputs begin as NaN. The same frame so many times: the kernel keeps state from call to
    call. `packed`: weights in halves of L2."""
    config, head = model.config, model.rows.head
    g = torch.Generator().manual_seed(position)
    begin, end, layers = config.semantic_begin, config.semantic_end + 1, config.slow.layers
    codes = torch.randint(0, CODES, (1, config.codebooks), generator=g)
    first = torch.full((1, 1), TEXT_TOKEN) if text else torch.randint(begin, end, (1, 1), generator=g)
    window = torch.randint(0, CODES, (config.codebooks + 1, WINDOW[config.line]), generator=g, dtype=torch.int32)
    window[0] = torch.randint(begin, end, window[0].shape, generator=g)
    caches = model.caches(position, model.dtype, float("nan"))
    given = {
        "tokens": torch.cat([first, codes], dim=1).int(), "position": torch.tensor([position], dtype=torch.int32),
        "window": window, "rng": torch.tensor([12345 + position, 8]),
        "main_logits": torch.full((1, len(head)), float("nan")),
        "fast_logits": torch.full((1, config.codebooks - 1, CODES), float("nan")),
        "out": torch.full((1, config.codebooks + 1), -9, dtype=torch.int32),
    }  # fmt: skip
    weights = Weights(
        **{**vars(model.weights), **{n: aligned(getattr(model.weights, n)) for n in ("cos_sin", "fast_cos_sin")}}
    )
    with mock.patch.object(l2_halves, "measure", lambda memory, dtype: Halves.at_random(memory, seed)):
        copy = persistent_frame.Phases(config, weights, head).pack() if packed else None
    gpu = {"l2_bytes": lambda device: 50 << 20, "memory_bandwidth": lambda device: (3.4e12, 4.8e12)[seed % 2]}
    with library.bound(seed), mock.patch.multiple(persistent_frame, **gpu):
        launches = persistent_frame.launches(
            config, weights, head, copy, k_caches=caches[:layers], v_caches=caches[layers:], ids=model.rows.ids,
            logit_bias=model.rows.bias, scalars=SCALARS, **model.draws.offsets, **given,
        )  # fmt: skip
        for one in launches * times:
            one.enqueue(0)
    return Frame(
        model, position, given["tokens"], window, given["rng"], torch.stack(caches)[:, 0], given["main_logits"],
        given["fast_logits"], given["out"][0].tolist(), launches[-1],
    )  # fmt: skip


def exponential(elements: np.ndarray, seed: int, offset: int, threads: int) -> Tensor:
    """torch's `exponential_` on a GPU, for these elements of a tensor: Philox4x32-10 in a grid of so many threads."""
    e = elements.astype(np.uint64)
    turn, thread, low, half_word = e // threads, e % threads, np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = np.uint64(offset // 4) + turn // 4
    x = [counter & low, counter >> half_word, thread & low, thread >> half_word]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [(q >> half_word) ^ x[1] ^ key[0], q & low, (p >> half_word) ^ x[3] ^ key[1], p & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    word = np.select([turn % 4 == i for i in range(4)], x)
    unit, half = np.float32(2.3283064e-10), np.float32(2.0**-24)
    u = word.astype(np.float32) * unit + unit / np.float32(2)
    return torch.from_numpy(np.where(u >= 1 - half, half, -np.log(u.astype(np.float64))).astype(np.float32))
