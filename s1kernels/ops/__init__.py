"""The ops: one file each, and each file is the whole contract: documents, reference, check, cases, bytes moved.

Sizes have one letter everywhere (kernels, docstrings, tests):

    B rows (sequences, or consecutive positions of one)     D  head_dim          N  codebooks
    T new positions of one sequence, or samples             H  query heads       K  codebook size
    R caches, one a sequence                                G  key/value heads   K' codes that are sampled
    S positions that a cache can hold                       L  layers            V  rows of the head that are sampled
    C hidden width, or channels                             F  feed-forward      W  tokens of the repetition window
"""

from types import SimpleNamespace

from s1kernels import registry
from s1kernels.ops.attention_decode import attention_decode
from s1kernels.ops.decode_frame import decode_frame
from s1kernels.ops.embed_frame import embed_frame
from s1kernels.ops.linear_residual import linear_residual
from s1kernels.ops.qk_norm_rotary_append import qk_norm_rotary_append
from s1kernels.ops.rms_norm import rms_norm
from s1kernels.ops.rms_norm_logits import rms_norm_logits
from s1kernels.ops.rms_norm_qkv import rms_norm_qkv
from s1kernels.ops.rms_norm_swiglu import rms_norm_swiglu
from s1kernels.ops.sample_token import sample_token
from s1kernels.ops.snake import snake
from s1kernels.ops.swiglu import swiglu

references = SimpleNamespace(**{name: op.reference for name, op in registry.OPS.items()})
"""The ops' references by name: what `model.dual_ar.DualAR` is made of when it serves as the truth."""

__all__ = [
    "attention_decode",
    "decode_frame",
    "embed_frame",
    "linear_residual",
    "qk_norm_rotary_append",
    "references",
    "rms_norm",
    "rms_norm_logits",
    "rms_norm_qkv",
    "rms_norm_swiglu",
    "sample_token",
    "snake",
    "swiglu",
]
