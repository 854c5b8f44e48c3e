"""The command line: `s1kernels info | doctor | verify | demo | bench | run | say`. Each command is a module of its
name."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from s1kernels import extras
from s1kernels.cli import bench, demo, doctor, info, run, say, verify

COMMANDS = {
    "info": info, "doctor": doctor, "verify": verify, "demo": demo, "bench": bench, "run": run, "say": say,
}  # fmt: skip

NEEDS = {
    "verify": ("cli", "rich"),
    "demo": ("upstream", "psutil", "rich"),
    "bench": ("bench", "matplotlib", "rich"),
    "say": ("speech", "regex", "rich", "sentencex"),
}
"""Command -> the extra that has what it always needs, and the packages."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors that a user can mend are one line on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="s1kernels", description="Fused kernels for Fish-Speech / OpenAudio S1-mini.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").strip()
        module.add_arguments(commands.add_parser(name, help=text.splitlines()[0], description=text))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if needs := NEEDS.get(options.command):
            extras.require(*needs)
        return COMMANDS[options.command].execute(options)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"s1kernels {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
