"""Compiles the Triton kernels for a GPU that need not be here, as every contract case launches them, and names them.

python compile_triton.py 90 5: for compute capability 9.0, up to five cases an op; with more than one, float32 too.
"""

import importlib
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s1kernels import registry, testing
from s1kernels.draws import Randomness
from s1kernels.model.config import DualARConfig
from s1kernels.model.weights import Weights

NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
ARCHITECTURE, MOST_CASES = int(sys.argv[1]), int(sys.argv[2])
DONE = {}


def compile_instead(kernel, grid, device, args, options):
    """As Triton's launcher would: 1 is a constant, and what is a multiple of 16 is known to be one."""
    names, signature, constants, facts = kernel.arg_names, {}, {}, {}
    given = [*zip(names, args, strict=False), *((n, v) for n, v in options.items() if n in names)]
    for name, value in given:
        at = names.index(name)
        special = not kernel.params[at].do_not_specialize
        if value is None or name in options or (special and type(value) is int and value == 1):
            signature[name], constants[(at,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if special and signature[name] not in ("constexpr", "fp32") and number % 16 == 0:
            facts[(at,)] = [["tt.divisibility", 16]]
    key = kernel.fn.__name__, str(signature), str(constants), str(facts)
    if key not in DONE:
        extra = {name: value for name, value in options.items() if name not in names}
        source = ASTSource(kernel, signature, constants, facts)
        DONE[key] = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=extra)


def module_of(name):
    return importlib.import_module(f"s1kernels.backends.triton.{name}")


def compile_graph(args):
    """What the engine captures beyond the op: noise drawn in the kernels, and the step to the next frame."""
    frames, config, out = module_of("decode_frame"), DualARConfig.from_json(args[-1]), op.empty(op.checked(*args))
    head, codes, main_logits, fast_logits = args[15], *out
    frame = frames.Frame(config, Weights.unflatten(config, args[16]), head, args[8].shape[2])
    frame.pdl = ARCHITECTURE >= 90
    state, offsets = torch.zeros(2, dtype=torch.int64), tuple(range(0, 4 * config.codebooks, 4))
    random = Randomness(state=state, ras_offset=4, fast_offsets=offsets, uniform=config.line == "2.0")
    scalars = dict(zip(("temperature", "top_p", "repetition_penalty", "top_k"), args[9:13], strict=True))
    frame.enqueue(
        frames.Buffers(config, 1, head), *args[:4], args[4], [] if args[5] is None else list(args[5].unbind(1)), random,
        scalars, *args[13:15], main_logits, fast_logits, codes,
    )  # fmt: skip
    window = torch.zeros(config.codebooks + 1, 16, dtype=torch.int32)
    given = (args[0], codes, args[1], window, args[1].clone(), state, 40)
    frames.advance(*given, fills_first=config.line == "s1", pdl=frame.pdl)


module_of("support").enqueue = compile_instead
for op in registry.OPS.values():
    module = module_of(op.name)  # there may be no GPU, so that the registry would not have it
    cases = [(case, torch.bfloat16) for case in list(op.cases)[:MOST_CASES]]
    for case, dtype in [*cases, *([(cases[0][0], torch.float32)] if MOST_CASES > 1 else [])]:
        args = op.inputs(testing.Make(dtype, offset=0), **op.cases[case])
        if op.name == "decode_frame" and op.cases[case]["B"] == 1:
            compile_graph(args)
        else:
            getattr(module, op.name)(*args, op.empty(op.checked(*args)))
print(*sorted({name for name, *_ in DONE}))
