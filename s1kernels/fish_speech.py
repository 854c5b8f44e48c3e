"""Serves upstream's own command line, API server and web UI: every model that its init_model loads is patched."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from s1kernels.patch import patch

LOADER = "init_model"
UPSTREAM = "fish_speech.models.text2semantic.inference"


def install(module: ModuleType | None = None, *, backend: str | Mapping[str, str] = "auto") -> None:
    """Wrap a module's `init_model`, so that what it returns is patched. Installing again applies the new `backend`.

    Upstream looks `init_model` up when its worker thread starts, so this serves the API server and the web UI too.

    Args:
        module: the module that defines `init_model`; None means upstream's inference module.
        backend: as for `s1kernels.patch`.
    Raises:
        ModuleNotFoundError: fish-speech is not installed. AttributeError: the module has no init_model.
    """
    module = module or upstream_module()
    if not hasattr(module, LOADER):
        raise AttributeError(
            f"install: module must define {LOADER}, got {module.__name__}; pass upstream's inference module"
        )
    original = getattr(module, LOADER)
    original = getattr(original, "__wrapped__", original)

    @functools.wraps(original)
    def init_model(*args: Any, **kwargs: Any) -> Any:
        model, decode_one_token = original(*args, **kwargs)
        patch(model, backend=backend)
        return model, decode_one_token

    setattr(module, LOADER, init_model)


def uninstall(module: ModuleType | None = None) -> None:
    """Give a module its own `init_model` back. Models that were loaded stay patched."""
    module = module or upstream_module()
    setattr(module, LOADER, getattr(getattr(module, LOADER), "__wrapped__", getattr(module, LOADER)))


def run_script(path: str | Path, arguments: Sequence[str]) -> None:
    """Run a Python script as `python path arguments...` would, with every model that it loads patched.

    The hook is set between the script's definitions and its `if __name__ == "__main__"` block: on the `init_model`
    that the script defines (upstream's inference.py does), else on upstream's module. Without such a block it is set
    at once.

    Raises:
        FileNotFoundError: there is no such script. ModuleNotFoundError: fish-speech is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"run: script must be a Python file, got {path}; give the path of upstream's script")
    main = ModuleType("__main__")
    main.__file__ = str(path)
    sys.modules["__main__"], sys.argv = main, [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    body = ast.parse(path.read_text(encoding="utf-8"), str(path)).body
    guard = next((i for i, node in enumerate(body) if _is_main_guard(node)), 0)
    _execute(body[:guard], path, main)
    install(main if hasattr(main, LOADER) else None)
    _execute(body[guard:], path, main)


def _execute(body: list[ast.stmt], path: Path, module: ModuleType) -> None:
    exec(compile(ast.Module(body, []), str(path), "exec"), vars(module))


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "'__main__' == __name__")


def upstream_module() -> ModuleType:
    """Upstream's inference module.

    Raises:
        ModuleNotFoundError: fish-speech, or something that it imports, is not installed; the message says what to type.
    """
    try:
        return importlib.import_module(UPSTREAM)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"fish-speech must be installed, got: {error}; run `pip install 's1kernels[upstream]'` and "
            "`pip install --no-deps fish-speech==0.1.0`"
        ) from error
