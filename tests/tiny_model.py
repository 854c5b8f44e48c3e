"""A pytest plugin for benches: their small model takes no time."""

from s1kernels.cli import demo

TINY = dict(
    vocab_size=4500, n_layer=2, dim=64, n_head=4, n_local_heads=2, head_dim=16, intermediate_size=96, n_fast_layer=1,
    fast_dim=64, fast_n_head=4, fast_n_local_heads=2, fast_head_dim=16, fast_intermediate_size=96,
)  # fmt: skip


def pytest_configure() -> None:
    demo.SMALL = demo.SMALL | TINY
