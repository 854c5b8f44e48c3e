"""A CUDA source of the project as C++ for the emulator: includes expanded, asm statements as calls of ptx.h.

Lines keep their numbers, so that compiler and reports speak of the CUDA source.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUALIFIERS = {
    "relaxed", "acquire", "release", "acq_rel", "volatile", "gpu", "sys", "cta", "cluster", "nc", "ca", "cg",
    "L1::no_allocate", "L1::evict_last", "L2::cache_hint", "L2::128B", "L2::256B",
}  # fmt: skip
"""What a mnemonic says of ordering, scope and caches: the emulator has one order and no cache."""
TYPES = {f"{kind}{bits}": f"uint{bits}_t" for kind in "usb" for bits in (8, 16, 32, 64)} | {"f32": "float"}
PTX = (HERE / "ptx.h").read_text()
INSTRUCTIONS = set(re.findall(r"PTX\((\w+)\)", PTX))
REGISTERS = set(re.findall(r"\breg_(\w+)\(\)", PTX))
ASM = re.compile(r"(?<!\w)asm\s*(?:volatile\s*)?\(")


class Unknown(Exception):
    """Something that the emulator has no equal of."""


def translate(source: Path) -> str:
    """The C++ text of source's kernels for 16-bit dtypes, with library.h's functions."""
    text = translate_asm(expand(source, set()))
    text = re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulator::current->block->shared);",
        text,
    )
    text = re.sub(
        r"\b__shared__\s+([\w:]+)\s+(\w+)((?:\[[^\]]+\])*);",
        r"static char \2_key; auto& \2 = emulator::static_shared<\1\3>(&\2_key);",
        text,
    )
    kernels = [f"EMULATOR_KERNEL({name})" for name in re.findall(r"^S1_KERNEL_HALVES\((\w+),", text, re.M)]
    return "\n".join([f'#include "{HERE}/ptx.h"', text, f'#include "{HERE}/library.h"', *kernels, ""])


def expand(path: Path, seen: set[Path]) -> str:
    """The file with what it includes, each once."""
    seen.add(path)
    lines = [f'#line 1 "{path}"']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if include := re.match(r'#include "([^"]+)"$', line):
            header = (path.parent / include[1]).resolve()
            if header not in seen:
                lines.append(expand(header, seen))
            lines.append(f'#line {number + 1} "{path}"')
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join([*lines, ""])


def skip(text: str, i: int) -> int:
    """The end of a string, character or comment that begins at i, else i."""
    if text[i] in "\"'":
        j = i + 1
        while text[j] != text[i]:
            j += 2 if text[j] == "\\" else 1
        return j + 1
    return text.index("\n", i) if text.startswith("//", i) else i


def closing(text: str, i: int) -> int:
    """The index behind the bracket that closes the one at i."""
    depth = 0
    while True:
        if (j := skip(text, i)) != i:
            i = j
            continue
        depth += (text[i] in "([{") - (text[i] in ")]}")
        i += 1
        if depth == 0:
            return i


def split(text: str, separator: str) -> list[str]:
    """At the separators outside brackets and strings."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        if (j := skip(text, i)) != i:
            i = j
            continue
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if text[i] == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    return [*parts, text[start:]]


def translate_asm(text: str) -> str:
    """The text with a block of calls for each asm statement, on as many lines."""
    out, i, start = [], 0, 0
    while i < len(text):
        if (j := skip(text, i)) != i:
            i = j
        elif text[i] == "a" and (found := ASM.match(text, i)):
            end = closing(text, found.end() - 1)
            try:
                code = statement(text[found.end() : end - 1])
            except Unknown as error:
                code = f'static_assert(sizeof(int) == 0, "the emulator does not know {error}");'
            out += [text[start:i], "{ ", code, " }", "\n" * text.count("\n", i, end)]
            i = start = end
        else:
            i += 1
    return "".join([*out, text[start:]])


def statement(body: str) -> str:
    """The calls for what stands in an asm statement's parentheses."""
    template, *sections = split(body, ":")
    code = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template)).replace("\\n", " ").replace("\\t", " ").strip()
    operands = [
        " ".join(operand[operand.index("(") + 1 : operand.rindex(")")].split())
        for section in sections[:2]
        if section.strip()
        for operand in split(section, ",")
    ]
    declared: set[str] = set()
    if code.startswith("{"):
        code = code[1 : code.rindex("}")]
    return " ".join(instruction(part.strip(), operands, declared) for part in code.split(";") if part.strip())


def instruction(text: str, operands: list[str], declared: set[str]) -> str:
    mnemonic, _, rest = text.partition(" ")
    if mnemonic == ".reg":
        kind, names = rest.strip().split(maxsplit=1)
        declared.update(n.strip() for n in names.split(","))
        return f"{'bool' if kind == '.pred' else TYPES[kind[1:]]} {names};"
    parts = mnemonic.split(".")
    args = arguments(rest, operands, declared)
    if "L2::cache_hint" in parts:
        del args[-1]  # the policy
    shared = any(part.startswith("shared") for part in parts)
    if parts[0] in ("ld", "st") and parts[-1] in TYPES:
        flags = [str(shared).lower()]
        if parts[0] == "ld":
            flags.append(str(not shared and not {"relaxed", "acquire", "volatile"}.isdisjoint(parts)).lower())
            args = [args[-1], *args[:-1]]
        name = f"{'load' if parts[0] == 'ld' else 'store'}<{TYPES[parts[-1]]}>"
        return f"emulator::ptx::{name}({', '.join([*flags, 'emulator::here()', *args])});"
    kept = [part for part in parts if part not in QUALIFIERS]
    name = re.sub(r"\W+", "_", ".".join(kept).replace("shared::cluster", "shared").replace("shared::cta", "shared"))
    if name not in INSTRUCTIONS:
        raise Unknown(f"{mnemonic}: give ptx.h a PTX({name})")
    return f"emulator::ptx::{name}({', '.join([*args, 'emulator::here()'])});"


def arguments(text: str, operands: list[str], declared: set[str]) -> list[str]:
    out = []
    for part in (p.strip() for p in split(text, ",") if p.strip()):
        if part.startswith("{"):
            out += arguments(part[1:-1], operands, declared)
        elif part.startswith("["):
            base, plus, bytes_after = part[1:-1].partition("+")
            address = value(base.strip(), operands, declared)
            out.append(f"emulator::ptx::offset({address}, {bytes_after.strip()})" if plus else address)
        elif part != "_":
            out.append(value(part, operands, declared))
    return out


def value(text: str, operands: list[str], declared: set[str]) -> str:
    if found := re.fullmatch(r"%(\d+)", text):
        return f"({operands[int(found[1])]})"
    if found := re.fullmatch(r"%%([\w.]+)", text):
        name = found[1].replace(".", "_")
        if name not in REGISTERS:
            raise Unknown(f"the register {found[1]}: give ptx.h a reg_{name}()")
        return f"emulator::ptx::reg_{name}()"
    if text in declared or re.fullmatch(r"-?\d[\w.]*", text):
        return text
    raise Unknown(f"the operand {text}")
