"""Compiles the Triton kernels for a GPU that need not be here, as every contract case launches them, and names them.

python compile_triton.py 90 5: for compute capability 9.0, up to five cases an op.
"""

import importlib
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s1kernels import registry, testing

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
DONE = set()


def compile_instead(kernel, grid, device, *args, **options):
    names, signature, constants = kernel.arg_names, {}, {}
    for name, value in [*zip(names, args, strict=False), *((n, v) for n, v in options.items() if n in names)]:
        if value is None or name in options:
            signature[name], constants[(names.index(name),)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    key = kernel.fn.__name__, str(signature), str(constants)
    if key not in DONE:
        extra = {name: value for name, value in options.items() if name not in names}
        triton.compile(ASTSource(kernel, signature, constants), target=TARGET, options=extra)
        DONE.add(key)


for op in registry.OPS.values():
    if op.name == "decode_frame":
        continue
    # There may be no GPU, so that the registry would not have them.
    module = importlib.import_module(f"s1kernels.backends.triton.{op.name}")
    for other in [module, importlib.import_module("s1kernels.backends.triton.rms_norm")]:
        other.launch = compile_instead
    cases = list(op.cases)[: int(sys.argv[2])]
    for case, dtype in [*((case, torch.bfloat16) for case in cases), (cases[0], torch.float32)]:
        args = op.inputs(testing.Make(dtype), **op.cases[case])
        getattr(module, op.name)(*args, op.empty(op.checked(*args)))
print(*sorted({name for name, *_ in DONE}))
