"""Checks from Linux what else only a Windows would show; prints a summary, and exits with 1 if anything differs.

* Every CUDA source that the wheel for all systems ships, compiled by NVRTC's Windows DLLs under Wine, gives the shipped
  bytes. There `long` has 4 bytes, which is asserted in device code.
* The C++ sources, but for those that need Python's headers, compile for Windows (x86_64-windows-gnu) without a warning.

    python .ci/windows/check.py [FOLDER]

What is downloaded and compiled is kept in FOLDER, build/windows by default. Needs pip and Wine (apt-get install
--no-install-recommends wine wine64); without Wine the first check is skipped. It takes ten minutes on 2 cores, and
seconds when nothing has changed.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CORES = os.cpu_count() or 1
CONFIG = json.loads(ROOT.joinpath("csrc/build.json").read_text())
TARGET = "x86_64-windows-gnu"
ASSERTION = '\nstatic_assert(sizeof(long) == 4, "this is the data model of Windows");\n'
PYTHON_HEADERS = ("csrc/module.cpp", "csrc/cuda/bindings.cpp")
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-command-line-argument"]


def install(folder: Path, package: str, *options: str) -> Path:
    """A package from PyPI, unpacked into a folder of its own."""
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *options]
        subprocess.run([*command, package], check=True)
    return folder


def zig(work: Path) -> list[str]:
    return [sys.executable, str(install(work / "zig", "ziglang") / "ziglang/__main__.py")]


def shipped(work: Path) -> list[dict]:
    """The manifest of what the wheel ships, made by NVRTC on Linux."""
    package = f"nvidia-cuda-nvrtc-cu12=={CONFIG['cuda']['nvrtc']}"
    sys.path[:0] = [str(install(work / "nvrtc-linux", package)), str(ROOT / "_build")]
    import cubins

    sources = cubins.load("sources")
    manifest, made = work / "linux/manifest.json", []
    if manifest.exists():
        made = json.loads(manifest.read_text())
    if {e["source"]: e["source_digest"] for e in made} != {s: sources.source(s).digest for s in sources.names()}:
        for folder in ("linux", "windows"):
            shutil.rmtree(work / folder, ignore_errors=True)
        cubins.write(work / "linux", CONFIG["cuda"])
        made = json.loads(manifest.read_text())
    for name in sources.names():
        work.joinpath(f"{name}.cu").write_text(sources.source(name).text + ASSERTION)
    return made


def check_cubins(work: Path) -> str:
    entries = shipped(work)
    package = f"nvidia-cuda-nvrtc-cu12=={CONFIG['cuda']['nvrtc']}"
    windows = install(work / "nvrtc-windows", package, "--platform", "win_amd64", "--only-binary", ":all:")
    dlls = windows / "nvidia/cuda_nvrtc/bin"
    (dll,) = dlls.glob("nvrtc64_*_0.dll")
    program, out = work / "compile.exe", work / "windows"
    subprocess.run(
        [*zig(work), "cc", "-target", "x86_64-windows-gnu", str(HERE / "compile.c"), "-o", program], check=True
    )
    out.mkdir(exist_ok=True)
    left = [entry for entry in entries if not out.joinpath(entry["file"]).exists()]
    env = os.environ | {"WINEPREFIX": str(work / "wine"), "WINEDEBUG": "-all"}
    subprocess.run(["wine", "wineboot", "--init"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def compile_share(first: int) -> None:
        jobs = work / f"jobs{first}.txt"
        lines = [
            "\t".join([f"Z:{work}/{e['source']}.cu", f"Z:{out}/{e['file']}", *e["options"]]) for e in left[first::CORES]
        ]
        jobs.write_text("\n".join(lines))
        subprocess.run(["wine", str(program), f"Z:{dlls}", dll.name, f"Z:{jobs}"], env=env)

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(compile_share, range(CORES)))
    different = [
        entry["file"]
        for entry in entries
        if not (made := out / entry["file"]).exists()
        or made.read_bytes() != work.joinpath("linux", entry["file"]).read_bytes()
    ]
    if different:
        sys.exit(f"not the same as on Linux: {', '.join(different)}")
    archs = {entry["arch"] for entry in entries}
    sources = {entry["source"] for entry in entries}
    return f"{len(sources)} CUDA sources x {len(archs)} architectures = {len(entries)} files identical with Linux's"


def check_cpp(work: Path) -> str:
    sources = [source for source in CONFIG["sources"] if source not in PYTHON_HEADERS]
    target = ["c++", "-target", TARGET, "-c", *(f"-I{folder}" for folder in CONFIG["include_dirs"])]

    def compile_one(source: str) -> str:
        command = [*zig(work), *target, *FLAGS, source, "-o", str(work / f"{Path(source).stem}.obj")]
        done = subprocess.run(command, capture_output=True, text=True)
        return f"{source}:\n{done.stdout}{done.stderr}" if done.returncode else ""

    zig(work)
    with ThreadPoolExecutor(CORES) as pool:
        if complaints := "\n".join(filter(None, pool.map(compile_one, sources))):
            sys.exit(complaints)
    return f"{len(sources)} of {len(CONFIG['sources'])} C++ sources compile for Windows without a warning"


def main() -> None:
    os.chdir(ROOT)
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "build/windows").resolve()
    work.mkdir(parents=True, exist_ok=True)
    print(f"C++: {check_cpp(work)}", flush=True)
    if shutil.which("wine"):
        print(f"NVRTC {CONFIG['cuda']['nvrtc']} under Wine: {check_cubins(work)}")
    else:
        print("NVRTC under Wine: SKIPPED, there is no wine; apt-get install --no-install-recommends wine wine64")


if __name__ == "__main__":
    main()
