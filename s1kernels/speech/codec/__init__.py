"""The audio codec (upstream's modded DAC): codes to audio, whole or chunk by chunk, and audio to codes.

codec.py: what a program calls; stream.py: decodes chunk by chunk. state.py: reads codec.pth. network.py: the encoder,
the quantizers and the decoder, put together from layers.py, whose layers are causal and take their past from a `Past`.
seeded.py: a codec whose weights are drawn.
"""

from s1kernels.speech.codec.codec import Codec
from s1kernels.speech.codec.network import Settings
from s1kernels.speech.codec.stream import Stream

__all__ = ["Codec", "Settings", "Stream"]
