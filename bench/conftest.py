"""What the benches for pytest-benchmark share: options, the read bandwidth of this run, and where it was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from s1kernels.bench import provenance, read_bandwidth
from s1kernels.bench.timing import Refused, Wrong

REFUSED = pytest.StashKey[list[dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("s1kernels")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", default=default, help=f"torch device (default here: {default})")
    group.addoption("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    group.addoption("--every-case", action="store_true", help="all cases of the contracts, not only S1-mini's shapes")
    group.addoption("--small", action="store_true", help="a small model: does it run at all?")
    group.addoption("--compiled", action="store_true", help="torch.compile too, which takes a while")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture(scope="session")
def ceiling(device: torch.device) -> float:
    """GB/s that plain reads reach."""
    return float(read_bandwidth.measure(device)["gigabytes_per_second"])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a machine's name is nobody's business
    machine_info["provenance"] = provenance.collect(torch.device(config.getoption("--device")))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """What cannot run here is skipped, what is wrong fails; both are rows of the result, with their reasons."""
    try:
        return (yield)
    except Refused as error:
        row = {"name": pyfuncitem.name, "reason": str(error)}
        pyfuncitem.config.stash.setdefault(REFUSED, []).append(row)
        if isinstance(error, Wrong):
            raise
        pytest.skip(str(error))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Adds what was refused, and keeps a result small: without single rounds, texts of parameters, and what the
    processor can do."""
    output_json["refused"] = config.stash.get(REFUSED, [])
    output_json["machine_info"].get("cpu", {}).pop("flags", None)
    for bench in output_json["benchmarks"]:
        bench["stats"].pop("data", None)
        bench.pop("params", None)


def pytest_terminal_summary(config: pytest.Config) -> None:
    """One line a contender: what counts is the time of one call, and how much of the read bandwidth it is."""
    rows = [bench.extra_info for bench in config._benchmarksession.benchmarks if "contender" in bench.extra_info]
    if not rows:
        return
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("op", "case", "contender", "us", "GB/s", "% of reads", "x library", "error"):
        table.add_column(name, justify="left" if name in ("op", "case", "contender") else "right")
    library = {(r["op"], r["case"]): r["microseconds"] for r in rows if r["contender"] == "library"}
    last = None
    for row in sorted(rows, key=lambda r: (r["op"], r["case"], r["microseconds"])):
        here = row["op"], row["case"]
        if last not in (None, here):
            table.add_row()
        table.add_row(
            *(here if here != last else ("", "")), row["contender"], f"{row['microseconds']:.1f}",
            f"{row['gigabytes_per_second']:.1f}", f"{row['percent_of_read_bandwidth']:.0f}",
            f"{library[here] / row['microseconds']:.2f}" if here in library else "", f"{row['error']:.0e}",
        )  # fmt: skip
        last = here
    console = Console()
    console.print("One call, its arguments read from memory:")
    console.print(table)
