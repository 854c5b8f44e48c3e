"""Seconds from `s1kernels.patch` to the first frame, on a fresh model in this fresh process; prints JSON.

S1KERNELS_CUDA_PROVIDER chooses where the kernels come from, S1KERNELS_CACHE_DIR where compiled ones are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import time

import torch

import s1kernels
from s1kernels import fish_speech
from s1kernels.cli import demo, gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--small", action="store_true", help="fewer layers and a smaller vocabulary")
    parser.add_argument("--context", type=int, default=128, help="prompt length in frames (default: 128)")
    parser.add_argument("--cache", type=int, default=8192, help="the model's max_seq_len (default: 8192)")
    options = parser.parse_args()
    options.checkpoint, device = None, torch.device(options.device)
    logging.getLogger("s1kernels").setLevel(logging.WARNING)
    inference = fish_speech.upstream_module()
    inference.tqdm = iter
    model, _ = demo.build(options, getattr(torch, options.dtype))
    prompt = demo._prompt(model, options.context)
    gpu.synchronize(device)

    start = time.perf_counter()
    report = s1kernels.patch(model)
    gpu.synchronize(device)
    patched = time.perf_counter()
    # Two frames are the fewest that upstream's generate() makes: one by its prefill, one by its decode loop.
    inference.generate(
        model=model, prompt=prompt, max_new_tokens=2, audio_masks=None, audio_parts=None, temperature=0.7, top_p=0.7,
        repetition_penalty=1.2,
    )  # fmt: skip
    gpu.synchronize(device)
    spoken = time.perf_counter()
    facts = {"patch": patched - start, "patch_to_first_frame": spoken - start, "backends": dict(report.backends)}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
