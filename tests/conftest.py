"""What every test relies on: the installed package is under test, and its native module loads if it was built."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run in Python; before they are defined

import s1kernels
from s1kernels import registry
from s1kernels.build_info import build_info

torch.set_num_threads(1)  # small models; test_ops.py sets what it needs
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: there are as many workers as cores

LONGEST = ["cuda_compile", "triton", "build", "cuda_emulated", "patch_upstream", "bench", "cli"]
"""Files of tests that take longest, for which xdist's workers then do not wait at the end."""


def pytest_configure(config: pytest.Config) -> None:
    reason = registry.BACKENDS["cpu"]()
    if build_info().native and reason:
        raise pytest.UsageError(f"s1kernels was built with native code, which does not load: {reason}")
    config.option.loadscopereorder = False  # xdist would begin with the files of the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_report_header() -> str:
    backends = ", ".join(f"{name}: {available() or 'available'}" for name, available in registry.BACKENDS.items())
    return f"s1kernels {s1kernels.__version__} from {s1kernels.__path__[0]}; {backends}"


@pytest.fixture
def exact_float32():
    """Matrix products in float32 are just that on a GPU, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """One checkpoint directory of each kind, not to be changed."""
    from checkpoint_files import publish  # needs fish-speech

    return publish(tmp_path_factory.mktemp("published"))


@pytest.fixture
def copy(published, tmp_path):
    """A copy of one of them, by name."""
    return lambda name: Path(shutil.copytree(published / name, tmp_path / name))
