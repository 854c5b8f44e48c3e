"""Programmatic dependent launches, where Triton's language has them: a kernel starts before its predecessor ends.

A kernel that has PDL begins with `let_next_start` (a draw: after its wait), loads what no kernel of the frame writes
(weights), and calls `wait_for_inputs` in every program before it reads what earlier kernels wrote, or writes anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    LANGUAGE_HAS_IT = True
except ImportError:
    LANGUAGE_HAS_IT = False

    @triton.jit
    def gdc_wait():
        pass

    @triton.jit
    def gdc_launch_dependents():
        pass


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel may start as soon as all programs of this one are here."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait until all earlier kernels have ended and what they wrote can be seen."""
    if PDL:
        gdc_wait()
