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


def build(seed=0, settings=SETTINGS, codes=CODES):
    """A DAC of S1-mini's structure, of 2048 samples a frame, a few channels wide."""
    sizes = dict(n_layer=2, n_head=2, dim=64, intermediate_size=96)
    return lively(dac(settings, codes, (1024, 512), 2, 4, 32, sizes), seed)


def build_full(seed=0):
    """A DAC of S1-mini's shape, as modded_dac_vq.yaml has it."""
    sizes = dict(n_layer=8, n_head=16, dim=1024, intermediate_size=3072)
    return lively(dac(Settings(), (4096, *[1024] * 9), (16384, 4096), 4, 64, 1536, sizes), seed)


def dac(settings, codes, positions, layers, encoder_dim, decoder_dim, sizes):
    modded_dac, rvq = upstream()

    def config(block_size=positions[0], **sizes):
        base, eps = settings.rope_base, settings.norm_eps
        return modded_dac.ModelArgs(
            block_size=block_size, head_dim=settings.head_dim, rope_base=base, norm_eps=eps, **sizes
        )

    def transformer():
        width, window = sizes["dim"], settings.window
        return modded_dac.WindowLimitedTransformer(config(positions[1], **sizes), input_dim=width, window_size=window)

    quantizer = rvq.DownsampleResidualVectorQuantize(
        input_dim=sizes["dim"], n_codebooks=len(codes) - 1, codebook_size=codes[1], semantic_codebook_size=codes[0],
        downsample_factor=(2, 2), pre_module=transformer(), post_module=transformer(),
    )  # fmt: skip
    return modded_dac.DAC(
        encoder_dim=encoder_dim, encoder_rates=[2, 4, 8, 8], decoder_dim=decoder_dim, decoder_rates=[8, 8, 4, 2],
        quantizer=quantizer, encoder_transformer_layers=[0, 0, 0, layers], transformer_general_config=config,
    ).eval()  # fmt: skip


def lively(codec, seed):
    """Seeded weights under which the signal keeps its size and every term counts."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if parameter.dim() > 1 and "alpha" not in name:
                parameter.normal_(0, 0.6 * parameter[0].numel() ** -0.5)
            if name.endswith("original0"):  # magnitudes
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


def codes(frames, seed=1, sizes=CODES):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, size, (frames,), generator=generator) for size in sizes])


def audio(samples, seed=2, rate=44100):
    """A tone that rises from 100 Hz to 4 kHz in noise that comes and goes."""
    time = torch.arange(samples) / rate
    rise = 100 * time + 3900 * time.square() / (2 * samples / rate)
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return 0.3 * torch.sin(2 * torch.pi * rise) + 0.3 * noise * torch.sin(9 * time).square()
