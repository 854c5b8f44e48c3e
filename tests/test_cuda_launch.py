"""How CUDA kernels are called: argument structs, attributes, errors.

Without a GPU, a driver of ours takes the calls and prints them (Linux, with a compiler).
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading

import pytest
import torch

from s1kernels.backends.cuda import driver, dtypes, launch, providers, sources
from s1kernels.backends.cuda.launch import Kernel, current_stream
from s1kernels.registry import BackendError

try:
    from s1kernels import _C
except ImportError:
    _C = None

CUDA = torch.device("cuda", 0)
NO_GPU = providers.unavailable()
needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=f"no GPU: {NO_GPU}")
LAUNCHERS = [
    pytest.param(driver.Launch, id="ctypes"),
    pytest.param(_C and _C.Launch, id="_C", marks=pytest.mark.skipif(_C is None, reason="s1kernels._C was not built")),
]

SCALE = """
#include "device/convert.cuh"
namespace s1 {
struct ScaleArgs {
  const void* x;  // [n]
  void* out;      // [n]
  int n;
  float factor;
};
template <class T>
__device__ void scale(const ScaleArgs& a) {
  extern __shared__ __align__(16) unsigned char shared[];
  launch_next();
  wait_for_inputs();
  T* held = reinterpret_cast<T*>(shared);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= a.n) return;
  held[threadIdx.x] = static_cast<const T*>(a.x)[i];
  static_cast<T*>(a.out)[i] = from_float<T>(to_float(held[threadIdx.x]) * a.factor);
}
S1_KERNEL(scale, ScaleArgs, 256, 1, scale)
}  // namespace s1
"""

# A driver that prints its calls. FAKE_VERSION and FAKE_RESULT are its CUDA version and what a launch returns.
FAKE_DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long long u64;
typedef struct { int id; int pad; int value; int rest[15]; } Attribute;
typedef struct { unsigned grid[3], block[3], shared; void* stream; Attribute* attributes; unsigned count; } Config;
static __thread u64 stack[8], depth;
static int from(const char* name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
int cuInit(unsigned flags) { return from("FAKE_INIT", 0); }
int cuDriverGetVersion(int* version) { *version = from("FAKE_VERSION", 13000); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) { *value = which == 97 ? 100000 : 0; return 0; }
int cuDevicePrimaryCtxRetain(u64* context, int device) { *context = 1000 + device; return 0; }
int cuCtxGetCurrent(u64* context) { *context = depth ? stack[depth - 1] : 0; return 0; }
int cuCtxPushCurrent_v2(u64 context) { stack[depth++] = context; return 0; }
int cuCtxPopCurrent_v2(u64* context) { *context = stack[--depth]; return 0; }
int cuModuleLoadData(u64* module, const char* image) {
  printf("{\"load\": \"%.3s\", \"context\": %llu}\n", image + 1, stack[depth - 1]);
  *module = 1;
  return 0;
}
int cuModuleGetFunction(u64* function, u64 module, const char* name) {
  *function = 77;
  return strcmp(name, "scale_float16") ? 500 : 0;
}
int cuFuncLoad(u64 function) { return depth ? 0 : 201; }
int cuFuncGetParamInfo(u64 function, size_t index, size_t* offset, size_t* size) { *size = 24; return 0; }
int cuFuncSetAttribute(u64 function, int which, int value) {
  printf("{\"attribute\": [%d, %d]}\n", which, value);
  return value > 100000;
}
int cuGetErrorName(int error, const char** name) { *name = error == 9999 ? NULL : "FAKE_ERROR"; return 0; }
int cuGetErrorString(int error, const char** text) { *text = error == 9999 ? NULL : "a fake error"; return 0; }
int cuLaunchKernelEx(const Config* c, u64 function, void** params, void** extra) {
  const unsigned char* args = (const unsigned char*)params[0];
  printf("{\"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %llu, \"function\": %llu, ",
         c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, (u64)c->stream,
         function);
  printf("\"context\": %llu, \"depth\": %llu, \"attributes\": [", stack[depth - 1], depth);
  const Attribute* a = c->attributes;
  for (unsigned i = 0; i < c->count; ++i) printf("%s[%d, %d]", i ? ", " : "", a[i].id, a[i].value);
  printf("], \"args\": \"");
  for (int i = 0; i < 24; ++i) printf("%02x", args[i]);
  printf("\"}\n");
  return from("FAKE_RESULT", 0);
}
"""

# A process that forks for each piece of code that it is given, to be run with `kernel`: importing torch takes seconds.
# NVRTC stays out: it calls the driver too.
FORKS = """
import ctypes, json, os, sys, torch
from types import SimpleNamespace
from s1kernels.backends.cuda import device, launch, providers, sources
from s1kernels.backends.cuda.launch import Kernel
capability = 9, 0
if sys.argv[1] != "_C": launch._C = None
device._capability = lambda index: capability
torch.cuda.init = lambda: None
torch.cuda.get_device_name = lambda index: "fake"
sources.source = lambda name: None
providers._nvrtc_refusal = lambda arch: None
providers.nvrtc.nvrtc_for = lambda arch, driver: SimpleNamespace(target=lambda arch: 90)
providers.compile_cubin = lambda *given: b"\\x7fELF"
kernel = Kernel("scale", "scale", block=256, pointers="x out", ints="n", floats="factor")
half, cuda = torch.float16, torch.device("cuda", 1)
values = dict(x=1 << 40, out=None, n=-5, factor=0.5)
def attempt(call):
    try: call()
    except Exception as error: print(repr(f"{type(error).__name__}: {error}"), flush=True)
for line in sys.stdin:
    code, env = json.loads(line)
    if not (child := os.fork()):
        os.environ |= env
        exec(code)
        ctypes.CDLL(None).fflush(None)
        os._exit(0)  # an orderly end takes a second
    print("ended", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def scale_folder(tmp_path_factory):
    """The sources with one more kernel."""
    folder = tmp_path_factory.mktemp("sources") / "cuda"
    shutil.copytree(sources.folder(), folder)
    folder.joinpath("scale.cu").write_text(SCALE)
    return folder


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or not compiler:
        pytest.skip("the driver to print calls is built on Linux, with a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    folder.joinpath("fake.c").write_text(FAKE_DRIVER)
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        folder / "libcuda.so.1",
        folder / "fake.c",
    ]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module", params=["ctypes", "_C"])
def calls(request, fake_driver, tmp_path_factory):
    """Runs Python code; gives what the driver and the code printed."""
    if request.param == "_C" and _C is None:
        pytest.skip("s1kernels._C was not built")
    env = os.environ | {"LD_LIBRARY_PATH": str(fake_driver), "S1KERNELS_CUDA_PROVIDER": "nvrtc"}
    command, folder = [sys.executable, "-c", FORKS, request.param], tmp_path_factory.mktemp("calls")
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
    with subprocess.Popen(command, env=env, cwd=folder, **streams) as process:

        def run(code, **env):
            print(json.dumps([code, env]), file=process.stdin)
            lines = list(iter(lambda: process.stdout.readline().strip(), "ended 0"))
            assert not [line for line in lines if not line or line.startswith("ended")], lines
            return [json.loads(line) if line.startswith("{") else line for line in lines]

        yield run


def test_a_launch_passes_everything_to_the_driver(calls):
    code = 'kernel.bind(half, cuda, grid=(3, 2), cooperative=True, **values).enqueue(4096)\nprint("end", flush=True)'
    loaded, preferred, launched, _ = calls(code)
    assert loaded == {"load": "ELF", "context": 1001}
    assert preferred == {"attribute": [9, 100]}
    assert bytes.fromhex(launched.pop("args")) == struct.pack("<QQif", 1 << 40, 0, -5, 0.5)
    assert launched == {
        "grid": [3, 2, 1], "block": [256, 1, 1], "shared": 0, "stream": 4096, "function": 77, "context": 1001,
        "depth": 1, "attributes": [[6, 1], [2, 1]],
    }  # fmt: skip


@pytest.mark.parametrize(("version", "expected"), [(13000, [[], [[6, 1]], []]), (12020, [[], [], []])])
def test_programmatic_launches_where_gpu_and_driver_can(calls, version, expected):
    code = """
for capability, pdl in ((8, 9), True), ((9, 0), True), ((9, 0), False):
    kernel.bind(half, cuda, grid=1, pdl=pdl, **values).enqueue(0)
"""
    launched = [line for line in calls(code, FAKE_VERSION=str(version)) if "grid" in line]
    assert [line["attributes"] for line in launched] == expected  # the driver must be of CUDA 12.3


def test_shared_memory_beyond_48_kb_is_asked_for_once(calls):
    code = """
for shared in (1000, 60000, 60000, 50000, 70000): kernel.bind(half, cuda, grid=1, shared=shared, **values).enqueue(0)
attempt(lambda: kernel.bind(half, cuda, grid=1, shared=200000, **values))
"""
    said = calls(code)
    assert [line["attribute"] for line in said if "attribute" in line] == [
        [9, 100], [8, 60000], [8, 70000], [8, 200000],
    ]  # fmt: skip
    assert [line["shared"] for line in said if "grid" in line] == [1000, 60000, 60000, 50000, 70000]
    assert "200000 bytes of shared memory, where a block has 100000 at most: FAKE_ERROR (a fake error)" in said[-1]


def test_a_failed_launch_names_kernel_sizes_and_error(calls):
    code = """
for result in "1", "700", "9999":
    os.environ["FAKE_RESULT"] = result
    attempt(lambda: kernel.bind(half, cuda, grid=5, shared=64, **values).enqueue(0))
"""
    said = [line for line in calls(code) if isinstance(line, str)]
    begin = "RuntimeError: kernel scale_float16, grid 5x1x1, block 256x1x1, 64 bytes of shared memory: "
    assert all(begin in line for line in said)
    assert "FAKE_ERROR (a fake error); please report this with the output of `s1kernels info`" in said[0]
    assert "an earlier kernel failed: set CUDA_LAUNCH_BLOCKING=1" in said[1]
    assert "unknown error (9999)" in said[2]


def test_a_kernel_that_is_not_there_or_takes_other_arguments_is_refused(calls):
    code = """
attempt(lambda: kernel.bind(torch.float32, cuda, grid=1, **values))
other = Kernel("scale", "scale", block=256, pointers="x out scratch", ints="n", floats="factor")
attempt(lambda: other.bind(half, cuda, grid=1, scratch=None, **values))
"""
    said = [line for line in calls(code) if isinstance(line, str)]
    assert "no kernel scale_float32 in scale.cu for sm_90" in said[0] and "FAKE_ERROR" in said[0]
    assert "kernel scale takes 24 bytes of arguments, not 32: " in said[1]


def test_an_old_driver_and_one_that_cannot_start_say_so(calls):
    code = "attempt(providers.driver.driver)"
    (said,) = calls(code, FAKE_VERSION="11080")
    assert "the NVIDIA driver is for CUDA 11.8; CUDA 12.0 is needed: install a newer driver" in said
    (said,) = calls(code, FAKE_INIT="100")
    assert "BackendError: the NVIDIA driver cannot start: FAKE_ERROR" in said


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_a_driver_a_launch_says_so(launcher, monkeypatch):
    if launcher is driver.Launch:
        monkeypatch.setattr(driver, "driver", driver.Driver)  # not the one that is loaded
        monkeypatch.setattr(driver, "_LIBRARY", "libcuda.so.none")
    elif not _C.driver_error():
        pytest.skip("there is a driver")
    with pytest.raises((BackendError, RuntimeError), match=r"no NVIDIA driver: \S+ cannot be loaded .*install"):
        launcher("k_float32", 1, 1, (1, 1, 1), (1, 1, 1), 0, False, False, b"")


def test_without_cuda_the_module_has_no_kernels():
    if _C is None or _C.cuda_kernels():
        pytest.skip("not built without CUDA")
    with pytest.raises(RuntimeError, match=r"kernel k was not compiled into s1kernels._C"):
        _C.cuda_function("k", 0)


# ---- Argument structs


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "KERNELS", [])
    return Kernel("scale", "scale", block=256, pointers="x out", ints="n", floats="factor")


@pytest.mark.parametrize(
    ("pointers", "ints", "floats", "size"),
    [("a", "", "", 8), ("a b", "n", "", 24), ("a", "n", "f", 16), ("", "n", "", 4), ("a", "n m", "f", 24)],
)
def test_the_struct_is_as_long_as_in_c(monkeypatch, pointers, ints, floats, size):
    monkeypatch.setattr(launch, "KERNELS", [])
    kernel = Kernel("k", "k", block=32, pointers=pointers, ints=ints, floats=floats)
    args, _ = kernel._pack(dict.fromkeys(kernel.fields, 0), CUDA)
    assert kernel.argument_bytes == len(args) == size


def test_missing_and_unknown_fields_are_named(kernel):
    with pytest.raises(TypeError, match=r"kernel scale: missing fields \['n'\], unknown fields \['m'\]"):
        kernel.bind(torch.float16, CUDA, grid=1, x=None, out=None, m=1, factor=1.0)


@pytest.mark.parametrize("wrong", [{"n": 1 << 31}, {"n": 0.5}, {"factor": "x"}, {"x": -1}])
def test_a_value_that_does_not_fit_is_refused(kernel, wrong):
    values = dict(x=None, out=None, n=1, factor=1.0) | wrong
    with pytest.raises(ValueError, match=r"kernel scale: .*the fields are"):
        kernel.bind(torch.float16, CUDA, grid=1, **values)


def test_a_tensor_of_another_device_is_refused(kernel):
    with pytest.raises(ValueError, match="kernel scale: x must be on cuda:0, got cpu"):
        kernel.bind(torch.float16, CUDA, grid=1, x=torch.zeros(1), out=None, n=1, factor=1.0)


# ---- With a GPU


@pytest.fixture
def scale(kernel, scale_folder, monkeypatch):
    """The kernel, compiled here by NVRTC."""
    monkeypatch.setattr(sources, "folder", lambda: scale_folder)
    with providers.use_provider("nvrtc"):
        yield kernel


def arguments(dtype=torch.float16):
    x = torch.randn(1000, dtype=dtype, device=CUDA)
    out = torch.full_like(x, torch.nan)
    return dict(x=x, out=out, n=x.numel(), factor=2.0)


@needs_gpu
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shared", [1024, 64 * 1024])
def test_a_kernel_runs(scale, monkeypatch, native, shared):
    if native and _C is None:
        pytest.skip("s1kernels._C was not built")
    monkeypatch.setattr(launch, "_C", _C if native else None)
    for dtype in dtypes.NAMES if launch.capability(CUDA) >= (8, 0) else (torch.float32, torch.float16):
        values = arguments(dtype)
        scale(dtype, CUDA, grid=4, shared=shared, **values)
        assert torch.equal(values["out"], values["x"] * 2)


@needs_gpu
def test_launches_are_captured_and_depend_on_each_other(scale):
    first = arguments()
    second = first | {"x": first["out"], "out": torch.empty_like(first["out"])}
    launches = [scale.bind(torch.float16, CUDA, grid=4, shared=1024, **values) for values in (first, second)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for bound in launches:
            bound.enqueue(current_stream(CUDA))
    for _ in range(3):
        first["x"].normal_()
        graph.replay()
        assert torch.equal(second["out"], first["x"] * 4)


@needs_gpu
def test_a_launch_needs_no_current_context_and_leaves_none(scale):
    values = arguments()
    torch.cuda.synchronize()
    bound = scale.bind(torch.float16, CUDA, grid=4, shared=1024, **values)
    stream, failed = torch.cuda.Stream(CUDA), []

    def run():
        try:
            bound.enqueue(0)  # the default stream is the one that asks for a current context
            bound.enqueue(stream.cuda_stream)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failed
    assert torch.equal(values["out"], values["x"] * 2)


@needs_gpu
def test_more_shared_memory_than_there_is_is_refused(scale):
    with pytest.raises(RuntimeError, match=r"kernel scale: 1000000 bytes of shared memory, where a block has"):
        scale.bind(torch.float16, CUDA, grid=4, shared=1_000_000, **arguments())


@needs_gpu
def test_a_cooperative_launch_of_too_many_blocks_is_refused(scale):
    launched = scale.bind(torch.float16, CUDA, grid=1 << 20, shared=1024, cooperative=True, **arguments())
    with pytest.raises(RuntimeError, match=r"kernel scale_float16, grid 1048576x1x1.*COOPERATIVE_LAUNCH_TOO_LARGE"):
        launched.enqueue(current_stream(CUDA))
