"""Look for what is missing or wrong on this machine, say what to do about it, and check that ops are right and fast.

Paste what it prints into an issue: it has all that a report needs, and nothing private but paths.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable

from s1kernels.cli import findings, layout
from s1kernels.cli.findings import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")


def execute(options: argparse.Namespace) -> int:
    sections = {name: _examine(examine) for name, examine in findings.SECTIONS.items()}
    problems = [found for section in sections.values() for found in section if found.state == "problem"]
    if options.json:
        print(json.dumps({name: [dataclasses.asdict(f) for f in found] for name, found in sections.items()}, indent=2))
    else:
        _show(sections, len(problems))
    return 1 if problems else 0


def _examine(section: Callable[[], list[Finding]]) -> list[Finding]:
    """A section's findings. One that fails is a finding itself: whoever runs this has trouble already."""
    try:
        return section()
    except Exception as error:
        return [Finding("examination", f"{type(error).__name__}: {error}", "problem", "please report this")]


def _show(sections: dict[str, list[Finding]], problems: int) -> None:
    for title, section in sections.items():
        if section:
            print(layout.table(title, [(f.state, f.name, _text(f)) for f in section]))
    verdict = f"{problems} problem{'s' * (problems != 1)}" if problems else "no problem found"
    print(f"\n{verdict}; for help, paste all of this into an issue")


def _text(found: Finding) -> str:
    return f"{found.value}\n-> {found.advice}" if found.advice else found.value
