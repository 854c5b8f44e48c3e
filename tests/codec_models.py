"""Small codecs of unmodified upstream code: fish-speech's modded DAC over descript-audio-codec, with lively weights."""

import importlib.util
import sys
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from s1kernels.speech.codec import Codec, Settings

UNUSED = ("argbind", "audiotools", "hydra", "librosa", "omegaconf", "soundfile")
"""What upstream's codec imports for training and for files; its arithmetic needs none of it."""

SETTINGS = Settings(window=8, encoder_window=512, head_dim=32)
CODES = (64, *[16] * 3)


def upstream():
    """Upstream's modules modded_dac and rvq. UNUSED ones that are not installed are stood in for."""
    missing = [name for name in ("dac", "fish_speech", "einops") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"upstream's codec needs {' and '.join(missing)}: see README's test line")
    absent = [name for name in UNUSED if name not in sys.modules and not importlib.util.find_spec(name)]
    for name in absent:
        sys.modules[name] = MagicMock(name=name)
    if "audiotools" in absent:
        tools = sys.modules["audiotools"]
        tools.ml.BaseModel = type("BaseModel", (nn.Module,), {"INTERN": [], "EXTERN": []})
        sys.modules["audiotools.ml"] = tools.ml
    try:
        from fish_speech.models.dac import modded_dac, rvq
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in absent]:
            del sys.modules[name]
    return modded_dac, rvq


def build(seed=0):
    """A DAC of S1-mini's structure, of 2048 samples a frame, a few channels wide."""
    modded_dac, rvq = upstream()
    torch.manual_seed(seed)

    def config(**sizes):
        return modded_dac.ModelArgs(block_size=512, head_dim=SETTINGS.head_dim, rope_base=10000, norm_eps=1e-5, **sizes)

    def transformer():
        sizes = dict(n_layer=2, n_head=2, dim=64, intermediate_size=96)
        return modded_dac.WindowLimitedTransformer(config(**sizes), input_dim=64, window_size=SETTINGS.window)

    quantizer = rvq.DownsampleResidualVectorQuantize(
        input_dim=64, n_codebooks=len(CODES) - 1, codebook_size=CODES[1], semantic_codebook_size=CODES[0],
        downsample_factor=(2, 2), pre_module=transformer(), post_module=transformer(),
    )  # fmt: skip
    codec = modded_dac.DAC(
        encoder_dim=4, encoder_rates=[2, 4, 8, 8], decoder_dim=32, decoder_rates=[8, 8, 4, 2], quantizer=quantizer,
        encoder_transformer_layers=[0, 0, 0, 2],
        transformer_general_config=config,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith("original0"):  # magnitudes that keep the signal's size
                inputs, outputs, taps = codec.get_parameter(name[:-1] + "1").shape
                raises = name.startswith("decoder") and inputs == 2 * outputs
                parameter.uniform_(0.5, 0.9).mul_((taps / 4) ** 0.5 if raises else 1)
            elif name.endswith("gamma"):
                parameter.uniform_(0.1, 0.5)
            elif name.endswith("alpha"):
                parameter.uniform_(0.5, 2.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.02)
    return codec


def ours(model, **options):
    return Codec.from_state(model.state_dict(), settings=SETTINGS, **options)


def codes(frames, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, size, (frames,), generator=generator) for size in CODES])


def audio(samples, seed=2, rate=44100):
    """A tone that rises from 100 Hz to 4 kHz in noise that comes and goes."""
    time = torch.arange(samples) / rate
    rise = 100 * time + 3900 * time.square() / (2 * samples / rate)
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return 0.3 * torch.sin(2 * torch.pi * rise) + 0.3 * noise * torch.sin(9 * time).square()
