"""Fused kernels that make Fish-Speech / OpenAudio S1-mini speak many times faster.

import s1kernels
s1kernels.patch(model)      # an upstream DualAR model, now several times faster
s1kernels.unpatch(model)    # as it was
"""

from s1kernels import backends, ops
from s1kernels.engine import Engine
from s1kernels.patch import PatchReport, engine_of, patch, unpatch
from s1kernels.registry import BackendError, explain, use_backend
from s1kernels.sampling import Sampling
from s1kernels.speech import Audio, IncompleteSpeech, Speech, Voice

__version__ = "0.1.0"

__all__ = [
    "Audio",
    "BackendError",
    "Engine",
    "IncompleteSpeech",
    "PatchReport",
    "Sampling",
    "Speech",
    "Voice",
    "backends",
    "engine_of",
    "explain",
    "ops",
    "patch",
    "unpatch",
    "use_backend",
]
