"""What the wheel for all systems ships of csrc/cuda: a cubin of every source for every architecture of csrc/build.json,
PTX for GPUs that come later, and manifest.json, which says what each was made from.

The reader, and the meaning of the manifest: s1kernels/backends/cuda/shipped.py.
"""

import hashlib
import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def load(name: str):
    """A module of s1kernels/backends/cuda alone, without the package and its torch."""
    spec = importlib.util.spec_from_file_location(name, Path("s1kernels/backends/cuda", f"{name}.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_nvrtc(version: str):
    """The NVRTC of this version: a later one's cubins would not load into drivers of that time."""
    nvrtc, others = load("nvrtc"), []
    for found in nvrtc.found():
        if isinstance(found, nvrtc.Nvrtc) and list(found.version) == [int(n) for n in version.split(".")[:2]]:
            return found
        others.append(str(found))
    advice = f"pip install nvidia-cuda-nvrtc-cu12=={version}"
    raise RuntimeError(f"NVRTC {version} is needed ({advice}); found: {'; '.join(others) or 'none'}")


def write(folder: Path, config: dict) -> int:
    """Compile everything into `folder`; returns how many files were made. `config` is "cuda" of csrc/build.json."""
    compiler, sources = find_nvrtc(config["nvrtc"]), load("sources")
    texts = [sources.read(Path(path)) for path in config["sources"]]
    archs = [*config["architectures"], config["architectures"][-1] + "+PTX"]
    version = "{}.{}".format(*compiler.version)
    folder.mkdir(parents=True)

    def make(job) -> dict:
        source, arch = job
        ptx = arch.endswith("+PTX")
        number = int(arch.removesuffix("+PTX").replace(".", ""))
        options = sources.options(number, ptx=ptx)
        code = compiler.compile(source.text, f"{source.name}.cu", options).code
        file = f"{source.name}.{number}.{'ptx' if ptx else 'cubin'}"
        folder.joinpath(file).write_bytes(code)
        made_from = {"source": source.name, "source_digest": source.digest, "arch": arch, "options": options}
        return {"file": file, "digest": hashlib.sha256(code).hexdigest(), **made_from, "nvrtc": version}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        entries = list(pool.map(make, [(source, arch) for source in texts for arch in archs]))
    folder.joinpath("manifest.json").write_text(json.dumps(entries, indent=1) + "\n", newline="\n")
    return len(entries)
