"""Installing: what `pip install .` makes of an environment, and that it says so.

The tests marked `build` install a copy of the source tree into fresh environments. A fresh environment "has" torch
by a .pth file that points to the torch of this one.
"""

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import s1kernels
from s1kernels.backends.cuda import nvrtc
from s1kernels.build_info import build_info, source_tree_notice

ROOT = Path(__file__).parents[1]
OUTER = str(Path(torch.__file__).parents[1])
STUB = """
#include <pybind11/detail/common.h>
static PyModuleDef stub = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&stub); }
"""  # compiles in a second
CUDA_STUB = """
#include "device/convert.cuh"
struct StubArgs {
  float* out;  // [1]
};
template <class T>
__device__ void stub(const StubArgs& args) {
  *args.out = s1::rounded<T>(1.0f / 3.0f);
}
S1_KERNEL(stub, StubArgs, 1, 1, stub)
"""
MODULE_WITH_CUDA = """
#include "cuda/bindings.cpp"
PYBIND11_MODULE(_C, m) { s1::bind_cuda(m); }
"""
LOAD_ALONE = """
import glob, importlib.util as u
spec = u.spec_from_file_location("_C", glob.glob("s1kernels/_C.*[od]")[0])
spec.loader.exec_module(_C := u.module_from_spec(spec))
""".strip()  # the package is not the one that it was made for
STUBS = ["stub_bfloat16", "stub_float16", "stub_float32"]
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
CALL_BACKEND = "import sys; sys.path.insert(0, '_build'); import backend; backend.build_{}('dist')"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, without what builds and runs leave in them."""
    left = ("build", "dist", "*.egg-info", "__pycache__", "_C.*.so", "_C.*.pyd", "_build_info.json", "results")
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".*", *left)))


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without any trace of this Python environment."""
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME")
    env = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("S1KERNELS_")}
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder]
    env["PATH"] = os.pathsep.join(f for f in folders if not Path(f).parent.joinpath("pyvenv.cfg").exists())
    return env | extra


class FreshEnvironment:
    def __init__(self, path: Path, *, with_torch: bool) -> None:
        venv.create(path)
        self.python = path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(path)}))
        if with_torch:
            self.site.joinpath("outer.pth").write_text(OUTER + "\n")

    def pip(self, *args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--ignore-installed"]
        return subprocess.run([*pip, *args], env=environment(**env), capture_output=True, text=True)

    def installed_info(self) -> dict:
        return json.loads(self.site.joinpath("s1kernels", "_build_info.json").read_text())

    def run(self, code: str) -> str:
        """Output of Python code, run outside the source tree."""
        command = [self.python, "-c", code]
        result = subprocess.run(command, cwd=self.site, env=environment(), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()


def build(tree: Path, what: str = "wheel", **env: str) -> subprocess.CompletedProcess[str]:
    """As pip would build it, but in this Python environment."""
    command = [sys.executable, "-c", CALL_BACKEND.format(what)]
    return subprocess.run(command, cwd=tree, env=environment(**env), capture_output=True, text=True)


def use_stub(tree: Path, code: str = STUB) -> None:
    """Replace the native sources by one small file, which is not optimised."""
    config = json.loads(tree.joinpath("csrc/build.json").read_text().replace('"-O3"', '"-O0"'))
    config |= {"sources": ["csrc/stub.cpp"], "cuda": config["cuda"] | {"sources": []}}
    tree.joinpath("csrc/stub.cpp").write_text(code)
    tree.joinpath("csrc/build.json").write_text(json.dumps(config))


def use_cuda_stub(tree: Path) -> None:
    """Replace them by one small kernel and what finds and launches it."""
    use_stub(tree, MODULE_WITH_CUDA)
    config = json.loads(tree.joinpath("csrc/build.json").read_text())
    config["sources"] += [f"csrc/cuda/{name}.cpp" for name in ("kernel_table", "launcher")]
    config["cuda"]["sources"] = ["csrc/cuda/stub.cu"]
    tree.joinpath("csrc/cuda/stub.cu").write_text(CUDA_STUB)
    tree.joinpath("csrc/build.json").write_text(json.dumps(config))


def toolkit() -> str | None:
    """A folder with nvcc and CUDA's headers."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return next((home for home in homes if home and Path(home, "include/cuda_runtime_api.h").exists()), None)


needs_toolkit = pytest.mark.skipif(toolkit() is None, reason="there is no CUDA toolkit")


def test_the_installed_package_is_tested() -> None:
    """Else the native kernels would be skipped, or another version of the code be tested, without a word."""
    assert source_tree_notice() == ""
    if build_info().native:
        module = importlib.import_module("s1kernels._C")
        assert Path(module.__file__).parent == Path(s1kernels.__file__).parent
        assert set(module.isa_available()) <= set(build_info().isa)
    else:
        assert build_info().reason


def test_a_source_tree_says_that_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s1kernels.build_info.files", lambda package: tmp_path)
    monkeypatch.setattr("s1kernels.build_info.find_spec", lambda name: None)
    info = build_info.__wrapped__()
    assert not info.native
    assert info.reason == source_tree_notice()
    assert "not the installed package" in info.reason
    assert "pip install ." in info.reason


def test_nothing_swaps_the_users_torch() -> None:
    requirements = [Requirement(text) for text in importlib.metadata.requires("s1kernels") or []]
    torches = [requirement for requirement in requirements if requirement.name.startswith("torch")]
    assert [(str(r.specifier), r.marker) for r in torches] == [(">=2.5", None)]
    build_requires = re.search(r"^requires = \[(.*)\]", ROOT.joinpath("pyproject.toml").read_text(), re.MULTILINE)
    assert build_requires and "torch" not in build_requires[1]


def test_every_native_source_is_listed() -> None:
    listed = json.loads(ROOT.joinpath("csrc/build.json").read_text())["sources"]
    assert sorted(listed) == sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.cpp"))


def test_paths_are_short_enough_for_windows() -> None:
    """ninja takes 260 characters at most. The longest are object files of a build in a temporary folder."""
    temporary = r"C:\Users\somebody with a name\AppData\Local\Temp\pip-install-abcdefgh"
    build = rf"{temporary}\s1kernels_{'0' * 32}\build\temp.win-amd64-cpython-313\Release"
    config = json.loads(ROOT.joinpath("csrc/build.json").read_text())
    longest = max([*config["sources"], *config["cuda"]["sources"]], key=len)
    assert len(rf"{build}\{longest}") < 240


@pytest.mark.build
def test_with_torch_and_compiler_the_module_is_native(tree: Path, tmp_path: Path) -> None:
    """A stub of it: the real one is what all other tests use."""
    use_stub(tree)
    fresh = FreshEnvironment(tmp_path / "venv", with_torch=True)
    result = fresh.pip(tree, S1KERNELS_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    info = fresh.installed_info()
    assert info["native"] and not info["reason"]
    assert not info["cuda"] and info["cuda_reason"] == "left out by S1KERNELS_BUILD=cpu"
    assert info["torch"] == torch.__version__
    assert info["compiler"] and info["flags"] and "scalar" in info["isa"]
    assert fresh.run(f"{LOAD_ALONE}\nprint(_C.__name__)") == "_C"


@pytest.mark.build
@pytest.mark.parametrize(
    ("with_torch", "env", "said"),
    [
        pytest.param(False, {}, "no torch", id="no torch"),
        pytest.param(True, NO_COMPILER, "no working C++17 compiler", id="no compiler"),
        pytest.param(True, {"S1KERNELS_BUILD": "none"}, "S1KERNELS_BUILD=none", id="on request"),
    ],
)
def test_without_it_is_pure_and_says_so(
    tree: Path, tmp_path: Path, with_torch: bool, env: dict[str, str], said: str
) -> None:
    if env is NO_COMPILER and os.name == "nt":
        pytest.skip("on Windows the compiler is not found through CC and CXX")
    fresh = FreshEnvironment(tmp_path / "venv", with_torch=with_torch)
    result = fresh.pip("--verbose", tree, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(f"s1kernels: PURE PYTHON.*{re.escape(said)}", result.stdout + result.stderr)
    info = fresh.installed_info()
    assert not info["native"]
    assert said in info["reason"]
    assert "pip install" in info["reason"]
    assert not list(fresh.site.glob("s1kernels/_C.*[od]"))

    again = build if with_torch else fresh.pip
    result = again(tree, S1KERNELS_REQUIRE_NATIVE="1", **env)
    assert result.returncode != 0
    assert re.search(f"S1KERNELS_REQUIRE_NATIVE=1 cannot be met: .*{re.escape(said)}", result.stdout + result.stderr)


@pytest.mark.build
@needs_toolkit
def test_cuda_kernels_are_compiled_for_the_architectures_asked_for(tree: Path, tmp_path: Path) -> None:
    use_cuda_stub(tree)
    fresh = FreshEnvironment(tmp_path / "venv", with_torch=True)
    env = {"S1KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "7.5 8.6;9.0+PTX", "CUDA_HOME": str(toolkit())}
    result = fresh.pip("--verbose", tree, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    info = fresh.installed_info()
    assert info["architectures"] == ["7.5", "8.6", "9.0+PTX"]
    assert re.fullmatch(r"\d+\.\d+", info["cuda"]) and not info["cuda_reason"]
    said = f"native, built by .*; CUDA kernels compiled by CUDA {info['cuda']} for 7.5, 8.6, 9.0\\+PTX"
    assert re.search(said, result.stdout + result.stderr)
    for code in ("compute_75,code=[sm_75]", "compute_86,code=[sm_86]", "compute_90,code=[sm_90,compute_90]"):
        assert f"-gencode=arch={code}" in result.stdout + result.stderr
    assert fresh.run(f"{LOAD_ALONE}\nprint(_C.cuda_kernels())") == str(STUBS)
    shipped = {path.name for path in fresh.site.glob("s1kernels/csrc/cuda/**/*.*")}
    assert {"stub.cu", "kernel.cuh"} <= shipped and not [name for name in shipped if name.endswith((".cpp", ".h"))]


@pytest.mark.build
@pytest.mark.parametrize(
    ("env", "said"),
    [
        pytest.param(
            {"CUDA_HOME": "/nonexistent"}, "no CUDA toolkit in /nonexistent (install one, or", id="no toolkit"
        ),
        pytest.param(NO_COMPILER, "no working C++17 compiler", id="no compiler"),
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "Ampere 7.0", "CUDA_HOME": str(toolkit())},
            "not for Ampere, 7.0 (see TORCH_CUDA_ARCH_LIST)",
            marks=needs_toolkit,
            id="unknown architectures",
        ),
    ],
)
def test_cuda_that_cannot_be_built_is_an_error_if_asked_for(tree: Path, env: dict[str, str], said: str) -> None:
    result = build(tree, S1KERNELS_BUILD="cuda", **env)
    assert result.returncode != 0
    assert re.search(f"S1KERNELS_BUILD=cuda cannot be met: .*{re.escape(said)}", result.stdout + result.stderr)


@pytest.mark.build
def test_an_unknown_wish_is_an_error(tree: Path) -> None:
    result = build(tree, S1KERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "S1KERNELS_BUILD must be auto, cuda, cpu, none or cubin, got 'gpu'" in result.stdout + result.stderr


@pytest.mark.build
def test_sources_that_do_not_compile_are_an_error(tree: Path) -> None:
    use_stub(tree, "#error the text of the compiler\n")
    result = build(tree)
    assert result.returncode != 0
    assert "the text of the compiler" in result.stdout + result.stderr


ASK_FOR_STUB = """
from s1kernels.backends.cuda import shipped
found = shipped.find("stub", (9, 0))
print(found if isinstance(found, str) else f"{found[0]['file']} {found[1][:4]}")
"""


@pytest.mark.build
def test_the_wheel_for_all_systems(tree: Path, tmp_path: Path) -> None:
    """The same bytes wherever it is built; installed without a compiler; what it ships is used unless it is changed."""
    pytest.importorskip("setuptools", minversion="77")
    use_cuda_stub(tree)
    version = "{}.{}.0".format(*nvrtc.nvrtc_for((9, 0)).version)
    config = json.loads(tree.joinpath("csrc/build.json").read_text())
    config["cuda"] |= {"nvrtc": version, "architectures": ["7.5", "9.0"]}
    tree.joinpath("csrc/build.json").write_text(json.dumps(config))
    elsewhere = Path(shutil.copytree(tree, tmp_path / "else/where", copy_function=shutil.copy))  # new times
    elsewhere.joinpath("build/lib/s1kernels").mkdir(parents=True)
    elsewhere.joinpath("build/lib/s1kernels/old.py").write_text("")
    elsewhere.joinpath("csrc/cuda/stub.cu").chmod(0o600)
    for place in (tree, elsewhere):
        done = build(place, S1KERNELS_BUILD="cubin", **NO_COMPILER)
        assert done.returncode == 0, done.stderr
        assert f"3 CUDA sources compiled by NVRTC {version}" in done.stderr
    (wheel,) = tree.glob("dist/*.whl")
    assert wheel.name == f"s1kernels-{s1kernels.__version__}-py3-none-any.whl"
    assert wheel.read_bytes() == elsewhere.joinpath("dist", wheel.name).read_bytes()

    fresh = FreshEnvironment(tmp_path / "venv", with_torch=True)
    result = fresh.pip("--no-index", wheel, **NO_COMPILER)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the wheel for all systems" in fresh.installed_info()["cuda_reason"]
    package = fresh.site / "s1kernels"
    made = {path.name for path in package.glob("cubin/*")}
    assert made == {"stub.75.cubin", "stub.90.cubin", "stub.90.ptx", "manifest.json"}
    assert fresh.run(ASK_FOR_STUB) == r"stub.90.cubin b'\x7fELF'"
    cubin = package / "cubin/stub.90.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-1])
    assert "stub.90.cubin is damaged" in fresh.run(ASK_FOR_STUB)
    package.joinpath("csrc/cuda/device/convert.cuh").open("a").write("// changed\n")
    assert "stub.90.cubin was not made from the stub.cu of this package" in fresh.run(ASK_FOR_STUB)


@pytest.mark.build
def test_the_wheel_for_all_systems_needs_its_nvrtc(tree: Path) -> None:
    config = tree / "csrc/build.json"
    config.write_text(re.sub(r'"nvrtc": "[\d.]+"', '"nvrtc": "11.1.74"', config.read_text()))
    code = """
import sys; sys.path.insert(0, '_build')
import backend; print(backend.get_requires_for_build_wheel()); backend.build_wheel('dist')
"""
    env = environment(S1KERNELS_BUILD="cubin")
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "['nvidia-cuda-nvrtc-cu12==11.1.74']" in done.stdout
    assert "NVRTC 11.1.74 is needed (pip install nvidia-cuda-nvrtc-cu12==11.1.74); found: NVRTC" in done.stderr


@pytest.mark.build
def test_editable_install_is_native(tree: Path, tmp_path: Path) -> None:
    use_stub(tree)
    fresh = FreshEnvironment(tmp_path / "venv", with_torch=True)
    result = fresh.pip("--editable", tree)
    assert result.returncode == 0, result.stdout + result.stderr
    info = json.loads(tree.joinpath("s1kernels/_build_info.json").read_text())
    assert info["native"]
    if not torch.cuda.is_available():
        assert "torch finds no NVIDIA GPU here" in info["cuda_reason"]
    assert not tree.joinpath("s1kernels/csrc").exists()  # the sources are beside the package
    assert list(tree.glob("s1kernels/_C.*[od]"))
    code = f"import sys, importlib.util as u; sys.path.remove({OUTER!r}); print(u.find_spec('s1kernels').origin)"
    assert Path(fresh.run(code)) == tree / "s1kernels/__init__.py"


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")


def configure(tree: Path, folder: Path, *settings: str, **env: str) -> None:
    command = ["cmake", "-S", tree, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *settings]
    subprocess.run(command, check=True, env=environment(**env))


@needs_cmake
@pytest.mark.skipif(os.name == "nt", reason="Visual Studio's generator does not write its commands down")
def test_cmake_compiles_what_setup_does(tmp_path: Path) -> None:
    configure(ROOT, tmp_path)
    commands = {c["file"]: c["command"] for c in json.loads(tmp_path.joinpath("compile_commands.json").read_text())}
    config = json.loads(ROOT.joinpath("csrc/build.json").read_text())
    assert sorted(commands) == sorted(str(ROOT / source) for source in config["sources"])
    wanted = {*config["flags"]["unix"], *(f"-I{ROOT / folder}" for folder in config["include_dirs"])}
    for command in commands.values():
        assert wanted <= set(command.split())


@pytest.mark.build
@needs_cmake
@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=needs_toolkit)], ids=["cpu", "cuda"])
def test_cmake_builds_a_module(tree: Path, tmp_path: Path, cuda: bool) -> None:
    (use_cuda_stub if cuda else use_stub)(tree)
    settings = ["-DS1KERNELS_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90"] if cuda else []
    configure(tree, tmp_path / "build", "-DCMAKE_BUILD_TYPE=Debug", *settings, CUDACXX=f"{toolkit()}/bin/nvcc")
    subprocess.run(["cmake", "--build", tmp_path / "build", "--parallel", str(os.cpu_count())], check=True)
    code = f"import _C; print({'_C.cuda_kernels()' if cuda else '_C.__name__'})"
    env = environment(PYTHONPATH=str(tmp_path / "build"))
    said = subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip()
    assert said == (str(STUBS) if cuda else "_C")


@pytest.mark.build
def test_sdist_carries_what_a_build_needs(tree: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    done = build(tree, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = tree.glob("dist/*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = ["LICENSE", "README.md", "CMakeLists.txt", "setup.py", "_build/backend.py", "s1kernels/py.typed"]
    sources = {path.relative_to(tree).as_posix() for path in [*tree.glob("csrc/**/*.*"), *tree.glob("bench/**/*.*")]}
    assert sources | set(needed) <= names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc", "_build_info.json"))]
