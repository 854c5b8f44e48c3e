"""Run one of upstream's scripts with every model that it loads patched.

Example: s1kernels run tools/api_server.py --listen 0.0.0.0:8080
"""

from __future__ import annotations

import argparse

from s1kernels import fish_speech


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", help="path of the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")


def execute(options: argparse.Namespace) -> int:
    fish_speech.run_script(options.script, options.arguments)
    return 0
