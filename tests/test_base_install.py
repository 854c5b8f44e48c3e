"""An install without extras: all works but some commands, which say what they need."""

import ctypes
import importlib.metadata
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from s1kernels import Voice, cli, extras, registry
from s1kernels.backends.cuda import cache
from s1kernels.cli import findings, layout
from s1kernels.model import checkpoint

ABSENT = (
    "fish_speech", "matplotlib", "onnx", "onnxruntime", "platformdirs", "psutil", "regex", "rich", "safetensors",
    "sentencex", "soundfile", "soxr", "tiktoken", "tokenizers", "transformers", "triton",
)  # fmt: skip
SAY = "say Hello. -o hello.wav"
PROGRAM = f"""
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys({ABSENT}))  # None: they cannot be imported
sys.path.append({str(Path(__file__).parent)!r})
import test_line_2_0 as line_2
import tiny_model
import torch
import s1kernels
from s1kernels import cli, registry
from s1kernels.cli import selfcheck

torch.set_num_threads(1)
model = line_2.build()
codes = [line_2.generate(model, frames=6)]
s1kernels.patch(model)
codes.append(line_2.generate(model, frames=6))
s1kernels.unpatch(model)

selfcheck.OPS = {{name: registry.OPS[name] for name in ("rms_norm", "linear_residual")}}
selfcheck.SECONDS = 0.05
tiny_model.pytest_configure()
said = {{}}
for command in ("info", "info --json", "doctor", "doctor --json", "verify", "demo", "bench", "{SAY}"):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = cli.main(command.split())
    said[command] = status, out.getvalue(), err.getvalue()
print(json.dumps({{"same": torch.equal(*codes), "said": said}}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What a process says in which no package of an extra can be imported; it leaves no file."""
    folder = tmp_path_factory.mktemp("base")
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return json.loads(done.stdout)


def absent(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)


def test_torch_and_numpy_are_all_that_is_required():
    requirements = map(Requirement, importlib.metadata.requires("s1kernels"))
    assert {r.name for r in requirements if "extra" not in str(r.marker)} == {"torch", "numpy"}


def test_a_model_is_patched(base):
    assert base["same"]


def test_info_and_doctor_report(base):
    status, words, complaint = base["said"]["info"]
    assert status == 0 and not complaint and all(op in words for op in registry.OPS)
    facts = json.loads(base["said"]["info --json"][1])
    assert list(facts["ops"]["cpu"]) == list(registry.OPS)
    status, words, complaint = base["said"]["doctor"]
    assert "paste all of this into an issue" in words and not complaint
    assert base["said"]["doctor --json"][0] == status
    report = json.loads(base["said"]["doctor --json"][1])
    assert list(report) == list(findings.SECTIONS)
    assert not [finding for section in report.values() for finding in section if finding["name"] == "examination"]
    assert max(map(len, words.splitlines())) <= layout.COLUMNS


@pytest.mark.parametrize(
    ("command", "packages", "extra"),
    [
        ("verify", "rich", "cli"),
        ("demo", "psutil and rich", "upstream"),
        ("bench", "matplotlib and rich", "bench"),
        (SAY, "regex and rich and sentencex", "speech"),
    ],
)
def test_other_commands_say_what_they_need(base, command, packages, extra):
    line = f'{packages} must be installed, got no such package; run `pip install "s1kernels[{extra}]"`\n'
    assert base["said"][command] == [2, "", f"s1kernels {command.split()[0]}: {line}"]


def test_the_extras_have_what_commands_need():
    requirements = [Requirement(text) for text in importlib.metadata.requires("s1kernels")]

    def having(extra):
        named = [r for r in requirements if r.marker and r.marker.evaluate({"extra": extra})]
        inner = [having(other) for r in named if r.name == "s1kernels" for other in r.extras]
        return {r.name for r in named}.union(*inner)

    for command, (extra, *packages) in cli.NEEDS.items():
        assert set(packages) <= having(extra), command
    for extra in ("speech", "upstream"):
        assert "safetensors" in having(extra)


def test_files_of_safetensors_name_the_extra(monkeypatch, tmp_path):
    absent(monkeypatch, "safetensors")
    voice, path = Voice("Hello.", torch.zeros(4, 2, dtype=torch.int32)), tmp_path / "voice.safetensors"
    with pytest.raises(ModuleNotFoundError, match=r'safetensors must be installed, .* "s1kernels\[speech\]"'):
        voice.save(path)
    path.write_bytes(b"")
    for read in (Voice.load, checkpoint._read_safetensors):
        with pytest.raises(ModuleNotFoundError, match=r'safetensors must be installed, .* "s1kernels\[speech\]"'):
            read(path)


def test_packages_are_named_only_if_they_are_missing(monkeypatch):
    absent(monkeypatch, "rich")
    assert extras.missing("cli", "torch", "numpy") is None
    assert extras.missing("cli", "torch", "rich").startswith("rich must be installed")
    assert extras.load("cli", "torch") is torch


@pytest.mark.parametrize("caches", [None, "", "relative", "/elsewhere"])
def test_the_cache_is_where_platformdirs_has_it(monkeypatch, caches):
    platformdirs = pytest.importorskip("platformdirs")
    for name in ("S1KERNELS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if caches is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
    assert cache.directory() == platformdirs.user_cache_path("s1kernels", appauthor=False)


def test_the_cache_on_windows_is_where_the_shell_says(monkeypatch, tmp_path):
    freed = []

    def known_folder(identity, flags, token, path):
        assert uuid.UUID(bytes_le=identity) == uuid.UUID("{F1B32785-6FBA-4FCF-9D55-7B8E7F157091}")
        path._obj.value = str(tmp_path)

    monkeypatch.delenv("S1KERNELS_CACHE_DIR", raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    shell32, ole32 = SimpleNamespace(SHGetKnownFolderPath=known_folder), SimpleNamespace(CoTaskMemFree=freed.append)
    monkeypatch.setattr(ctypes, "oledll", SimpleNamespace(shell32=shell32), raising=False)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(ole32=ole32), raising=False)
    assert cache.directory() == tmp_path / "s1kernels/Cache"
    assert [path.value for path in freed] == [str(tmp_path)]


def test_text_is_wrapped_within_its_column(monkeypatch):
    monkeypatch.setenv("COLUMNS", "28")
    assert layout.table(
        "title", [("a", "words that are wrapped"), ("name", "C:\\a\\long\\path\nsecond\n"), ("", "")]
    ) == ("title\n   a     words that are\n         wrapped\n   name  C:\\a\\long\\path\n         second\n")
    monkeypatch.setenv("COLUMNS", "21")
    assert layout.table("", [("name", "C:\\a\\long\\path")]) == "\n   name  C:\\a\\long\\pa\n         th"
