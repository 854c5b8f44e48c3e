"""The slow stack's keys and values, growing as positions are used."""

from __future__ import annotations

import torch
from torch import Tensor

from s1kernels.model.config import DualARConfig

FIRST_CAPACITY = 512  # positions of a new cache; it doubles when they are used up


class KVCache:
    """The slow stack's keys and values, one [1, G, S, D] tensor a layer; S grows as positions are used.

    What has not been written is zeros: a frame that is timed over it has finite logits.
    """

    def __init__(self, config: DualARConfig, like: Tensor, first: int = FIRST_CAPACITY) -> None:
        self.config, self.first = config, min(first, config.max_positions)
        stack = config.slow
        shape = (1, stack.kv_heads, self.first, stack.head_dim)
        self.k, self.v = ([like.new_zeros(shape) for _ in range(stack.layers)] for _ in range(2))

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
