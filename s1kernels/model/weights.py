"""The tensors of a DualAR model under our names, and their shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from s1kernels.model.config import LAYER_KEYS, MODEL_KEYS, DualARConfig, StackConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer; None where the config has no such weight."""

    attention_norm: Tensor  # [C]
    wqkv: Tensor  # [(H+2G)*D, C], rows q | k | v
    wo: Tensor  # [C, H*D]
    ffn_norm: Tensor  # [C]
    w1: Tensor  # [F, C], gate
    w3: Tensor  # [F, C], up
    w2: Tensor  # [C, F], down
    qkv_bias: Tensor | None = None  # [(H+2G)*D]
    o_bias: Tensor | None = None  # [C]
    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]


@dataclass(frozen=True)
class Weights:
    """A whole model. `head` is `text_embedding` itself when tied."""

    text_embedding: Tensor  # [Vt, C]
    codebook_embedding: Tensor  # [N*K, C], codebook i owns the rows from i*K on
    slow: list[LayerWeights]
    norm: Tensor  # [C]
    head: Tensor  # [Vt, C]
    fast_embedding: Tensor  # [K, Cf]
    fast: list[LayerWeights]
    fast_norm: Tensor  # [Cf]
    fast_head: Tensor  # [K, Cf]
    cos_sin: Tensor  # [P, D/2, 2]
    fast_cos_sin: Tensor  # [N, Df/2, 2]
    project_weight: Tensor | None = None  # [Cf, C]
    project_bias: Tensor | None = None  # [Cf]

    @staticmethod
    def build(config: DualARConfig, get: Callable[[str, tuple[int, ...]], Tensor]) -> Weights:
        """Weights whose every tensor is `get(upstream's key, shape)`; the rotary tables are computed."""

        def stack(prefix: str, stack: StackConfig) -> list[LayerWeights]:
            shapes = layer_shapes(stack)
            return [
                LayerWeights(**{name: get(f"{prefix}.{i}.{LAYER_KEYS[name]}", shape) for name, shape in shapes.items()})
                for i in range(stack.layers)
            ]

        named = {name: get(MODEL_KEYS[name], shape) for name, shape in model_shapes(config).items()}
        like = named["norm"]
        return Weights(
            **{"head": named["text_embedding"]} | named,
            slow=stack("layers", config.slow),
            fast=stack("fast_layers", config.fast),
            cos_sin=rotary_table(config.max_positions, config.slow.head_dim, config.rope_base).to(like),
            fast_cos_sin=rotary_table(config.codebooks, config.fast.head_dim, config.rope_base).to(like),
        )

    @staticmethod
    def from_state_dict(config: DualARConfig, state: Mapping[str, Tensor]) -> Weights:
        """Weights that share the storage of an upstream state dict.

        Raises:
            ValueError: a tensor is missing, has another shape, or is not floating point; the message names its key.
        """

        def get(key: str, shape: tuple[int, ...]) -> Tensor:
            if key not in state:
                raise ValueError(f"weights: {key} must be {list(shape)}, got nothing; is the checkpoint complete?")
            tensor = state[key]
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                got = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                raise ValueError(
                    f"weights: {key} must be {list(shape)} floating point, got {got}; does config.json fit?"
                )
            return tensor.detach().contiguous()

        return Weights.build(config, get)

    def flat(self) -> list[Tensor]:
        """Every tensor in a fixed order, for `decode_frame`'s schema; `unflatten` is the inverse."""
        layers = [t for layer in [*self.slow, *self.fast] for t in _tensors(layer)]
        return [*_tensors(self), *layers]

    @staticmethod
    def unflatten(config: DualARConfig, tensors: list[Tensor]) -> Weights:
        """Inverse of `flat`."""
        rest = iter(tensors)
        absent = set() if config.projects else {"project_weight", "project_bias"}
        named = {f.name: next(rest) for f in fields(Weights) if f.name not in absent | {"slow", "fast"}}

        def stack(stack: StackConfig) -> list[LayerWeights]:
            present = [f.name for f in fields(LayerWeights) if f.name in layer_shapes(stack)]
            return [LayerWeights(**{name: next(rest) for name in present}) for _ in range(stack.layers)]

        return Weights(**named, slow=stack(config.slow), fast=stack(config.fast))

    def require_like(self, head: Tensor) -> None:
        """Raise ValueError unless every weight is contiguous and of head's dtype and device, as a bound frame needs."""
        parts: list[Weights | LayerWeights] = [self, *self.slow, *self.fast]
        for part in parts:
            for field in fields(part):
                tensor = getattr(part, field.name)
                if not isinstance(tensor, Tensor):  # lists of layers, and what a model lacks
                    continue
                if (tensor.dtype, tensor.device) != (head.dtype, head.device) or not tensor.is_contiguous():
                    got = f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
                    raise ValueError(
                        f"decode_frame: {field.name} must be contiguous, {head.dtype} and on {head.device} like head, "
                        f"got {got}; convert it"
                    )

    def to(self, dtype: torch.dtype) -> Weights:
        """A copy in another dtype (the same tensors where it is the same)."""

        def convert(weights: LayerWeights | Weights) -> dict[str, Tensor]:
            return {f.name: t.to(dtype) for f in fields(weights) if isinstance(t := getattr(weights, f.name), Tensor)}

        slow, fast = ([LayerWeights(**convert(layer)) for layer in stack] for stack in (self.slow, self.fast))
        return Weights(**convert(self), slow=slow, fast=fast)


def layer_shapes(stack: StackConfig) -> Shapes:
    """Shape of every weight that a layer has."""
    C, F, D, O, I = stack.dim, stack.intermediate, stack.head_dim, stack.qkv_rows, stack.heads * stack.head_dim  # noqa: E741
    shapes: Shapes = {
        "attention_norm": (C,),
        "wqkv": (O, C),
        "wo": (C, I),
        "ffn_norm": (C,),
        "w1": (F, C),
        "w3": (F, C),
        "w2": (C, F),
    }
    if stack.qkv_bias:
        shapes["qkv_bias"] = (O,)
    if stack.o_bias:
        shapes["o_bias"] = (C,)
    if stack.qk_norm:
        shapes |= {"q_norm": (D,), "k_norm": (D,)}
    return shapes


def model_shapes(config: DualARConfig) -> Shapes:
    """Shape of every weight outside the layers."""
    C, Cf = config.slow.dim, config.fast.dim
    shapes: Shapes = {
        "text_embedding": (config.vocab_size, C),
        "codebook_embedding": (config.codebooks * config.codebook_size, C),
        "norm": (C,),
        "fast_embedding": (config.codebook_size, Cf),
        "fast_norm": (Cf,),
        "fast_head": (config.codebook_size, Cf),
    }
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, C)
    if config.projects:
        shapes |= {"project_weight": (Cf, C), "project_bias": (Cf,)}
    return shapes


@lru_cache(maxsize=16)
def flat_shapes(config: DualARConfig) -> list[tuple[int, ...]]:
    """Shapes of the tensors of `Weights.flat()`."""
    weights = Weights.build(config, lambda key, shape: torch.empty(shape, device="meta"))
    return [tuple(tensor.shape) for tensor in weights.flat()]


def rotary_table(positions: int, head_dim: int, base: float) -> Tensor:
    """[positions, head_dim/2, 2] bfloat16, as upstream rounds it: cos and sin of position * base^(-2i / head_dim)."""
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(positions), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).bfloat16()


def _tensors(weights: LayerWeights | Weights) -> list[Tensor]:
    return [t for f in fields(weights) if isinstance(t := getattr(weights, f.name), Tensor)]
