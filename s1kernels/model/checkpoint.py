"""Reads a model from the directory that it is published as. Nothing in it is executed; nothing comes back half-read.

A directory holds config.json, the tokenizer's table, and weights: model.pth (the S1 line) or safetensors, in one file
or in shards (the 2.0 line). Weights stay where they lie on disk, mapped into memory, unless dtype or device change.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s1kernels import extras
from s1kernels.model.config import LAYER_KEYS, MODEL_KEYS, DualARConfig, Line, from_upstream
from s1kernels.model.weights import Weights, layer_shapes, model_shapes

LINES: dict[str, Line] = {"dual_ar": "s1", "fish_qwen3_omni": "2.0"}
"""model_type in config.json -> the code line that decodes it."""

INDEX = "model.safetensors.index.json"
FILES = {"s1": ("model.pth", INDEX, "model.safetensors"), "2.0": (INDEX, "model.safetensors", "model.pth")}
"""Where a line's weights are looked for, in this order."""

PREFIXES = {
    "text_model.model.": "",
    "audio_decoder.codebook_embeddings.": "codebook_embeddings.",
    "audio_decoder.": "fast_",
    "model.": "",
}
"""Prefix of keys in files (the 2.0 line's parts, Lightning's wrapper) -> in upstream's module. First match."""

IGNORED = re.compile(r"audio_|\.kv_cache\.|^(fast_)?freqs_cis$|^causal_mask$")
"""Keys of what decoding does not need: the audio encoder, which upstream drops too, and buffers that are computed."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

END_TOKEN, SEMANTIC_TOKEN = "<|im_end|>", re.compile(r"<\|semantic:(\d+)\|>")
UPSTREAM_TOKENS = {END_TOKEN: 4} | {f"<|semantic:{code}|>": 15 + code for code in range(1024)}
"""Token -> how far behind the last text token upstream numbers it, if no special_tokens.json says otherwise."""

OMNI_IDS = {
    "semantic_begin": "semantic_start_token_id",
    "semantic_end": "semantic_end_token_id",
    "end_token": "eos_token_id",
}
"""Our name of an id -> the 2.0 line's, in config.json."""

OMNI_IDS = {
    "semantic_begin": "semantic_start_token_id",
    "semantic_end": "semantic_end_token_id",
    "end_token": "eos_token_id",
}
"""Our name of an id -> the 2.0 line's, in config.json."""

Ids = dict[str, int]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A model read from disk; `Engine(checkpoint.config, checkpoint.weights)` decodes it."""

    config: DualARConfig
    weights: Weights
    directory: Path


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Read a published model, of the S1 line (OpenAudio S1-mini) or of the 2.0 line.

    Args:
        directory: where config.json, the tokenizer's files and the weights lie.
        dtype: float16, bfloat16, float32 or float64; None keeps the file's.
        device: where the weights go. On the CPU, in the file's dtype, they are the mapped file: leave it as it is.
        progress: called with (bytes done, bytes in all), from (0, total) to (total, total).
    Returns:
        The config, the weights and the directory.
    Raises:
        FileNotFoundError: the directory or a file in it is missing.
        ValueError: a file is damaged or not a DualAR model's, files disagree, or a weight is missing, unknown,
            misshapen or not finite; the message names it.
        TypeError: weights are quantised or of several dtypes, or dtype is none of the four.
        RuntimeError: the device cannot be used. ModuleNotFoundError: safetensors is needed and not installed.

    >>> checkpoint = load("checkpoints/openaudio-s1-mini", dtype=torch.bfloat16)    # doctest: +SKIP
    """
    directory = Path(directory)
    check_request(dtype, device)
    config = read_config(directory)
    state = _read_state(directory, config)
    Weights.from_state_dict(config, state)  # refuses missing and misshapen weights before their data is read
    unknown = sorted(state.keys() - _keys(config))
    if unknown:
        raise _error("the weights must be those of config.json", f"{unknown[0]} too", "merge adapters; does it fit?")
    found = sorted({_name(tensor.dtype) for tensor in state.values()})
    if dtype is None and len(found) > 1:
        raise _error("the weights must be of one dtype", " and ".join(found), "pass dtype=", TypeError)

    done, total = 0, sum(tensor.nbytes for tensor in state.values())
    report = progress or (lambda done, total: None)
    report(done, total)
    for key, tensor in state.items():
        placed = state[key] = tensor.to(device=device, dtype=dtype or tensor.dtype)
        if not all(bound.isfinite() for bound in torch.aminmax(placed)):
            advice = "is the file damaged, or the dtype too narrow?"
            raise _error(f"{key} must be finite in {_name(placed.dtype)}", "NaN or infinity", advice)
        done += tensor.nbytes
        report(done, total)
    return Checkpoint(config, Weights.from_state_dict(config, state), directory)


def read_config(directory: str | Path) -> DualARConfig:
    """The shape of a published model: config.json and the tokenizer's ids. Raises as `load` does."""
    directory = Path(directory)
    if not directory.exists():
        got = f"{directory}, which does not exist"
        raise _error("directory must be a folder", got, "download the model", FileNotFoundError)
    if not directory.is_dir():
        raise _error("directory must be a folder", f"the file {directory}", "pass the folder that it is in")
    args = _json(directory, "config.json")
    kind = args.get("model_type")
    line = LINES.get(str(kind))
    if line is None:
        raise _error(f"model_type in config.json must be one of {list(LINES)}", repr(kind), "pass a DualAR model")
    if args.get("is_reward_model"):
        raise _error("config.json must be a speech model's", "a reward model's", "pass the text-to-speech model")
    ids = _s1_ids(directory) if line == "s1" else _omni_ids(directory, args)
    try:
        config = from_upstream(args, **ids, line=line)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        got = f"no {error}" if isinstance(error, KeyError) else f"a value of another kind ({error})"
        raise _error("config.json must be a DualAR model's", got) from error
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}
    for part in (config, config.slow, config.fast):
        for field in fields(part):
            value, expected = getattr(part, field.name), str(field.type)
            if type(value) not in kinds.get(expected, (type(value),)):
                raise _error(f"{field.name} in config.json must be {expected}", repr(value), "correct it")
    return config


def check_request(dtype: torch.dtype | None, device: str | torch.device) -> None:
    """Raise as `load` does for a dtype or a device that cannot be used."""
    if dtype is not None and dtype not in DTYPES:
        raise _error(f"dtype must be {_DTYPES} or None", _name(dtype), "choose one of them", TypeError)
    try:
        torch.empty(0, device=device).cpu()
    except Exception as error:  # torch raises AssertionError, RuntimeError and NotImplementedError here
        got = f"{device}: {_first_line(error)}"
        raise _error("device must be usable here", got, "choose another", RuntimeError) from error


def _s1_ids(directory: Path) -> Ids:
    """special_tokens.json has the ids; upstream counts them anew, from tokenizer.tiktoken's end: both must agree."""
    special, text = directory / "special_tokens.json", directory / "tokenizer.tiktoken"
    if not special.is_file() and not text.is_file():
        raise _missing(directory, f"{special.name} or {text.name}")
    named = _json(directory, special.name) if special.is_file() else {}
    counted = {}
    if text.is_file():
        lines = text.read_bytes().splitlines()
        if not all(re.fullmatch(rb"\S+ \d+|", line) for line in lines):
            raise _error(f"{text.name} must be lines of a token and its rank", "others")
        first = len({line.split()[0] for line in lines if line} - {b"="})  # the empty token does not count
        offsets = {name: i for i, name in enumerate(named)} or UPSTREAM_TOKENS
        counted = {name: first + offset for name, offset in offsets.items()}
    return _agreed(special.name, _speech_ids(special.name, named), text.name, _speech_ids(text.name, counted))


def _omni_ids(directory: Path, args: Mapping[str, Any]) -> Ids:
    """config.json has the ids; tokenizer.json must say the same of the tokens that it adds."""
    given = {name: _id("config.json", key, args[key]) for name, key in OMNI_IDS.items() if args.get(key) is not None}
    file = "tokenizer.json"
    try:
        added = _json(directory, file).get("added_tokens", []) if (directory / file).is_file() else []
        named = {token["content"]: token["id"] for token in added}
    except (KeyError, TypeError) as error:
        raise _error(f"added_tokens in {file} must be a list of content and id", "something else") from error
    return _agreed("config.json", given, file, _speech_ids(file, named))


def _speech_ids(file: str, named: Mapping[Any, Any]) -> Ids:
    """The ids that decoding needs, as far as a table of tokens has them."""
    codes, ids = {}, {}
    for name, value in named.items():
        if match := SEMANTIC_TOKEN.fullmatch(str(name)):
            codes[int(match[1])] = _id(file, name, value)
        elif name == END_TOKEN:
            ids["end_token"] = _id(file, name, value)
    if codes:
        first, last = codes.get(0, -1), codes.get(0, -1) + len(codes) - 1
        if [codes.get(code) for code in range(len(codes))] != list(range(first, last + 1)):
            raise _error(f"<|semantic:i|> in {file} must be consecutive from i=0 on", "gaps")
        ids |= {"semantic_begin": first, "semantic_end": last}
    return ids


def _id(file: str, name: str, value: Any) -> int:
    if type(value) is not int:
        raise _error(f"{name} in {file} must be a token id", repr(value))
    return value


def _agreed(one: str, ids: Ids, other: str, others: Ids) -> Ids:
    """The ids of two files, which must not contradict each other and must together be complete."""
    for name in OMNI_IDS:
        values = {file[name] for file in (ids, others) if name in file}
        if not values:
            raise _error(f"{name} must be in {one} or {other}", "nothing", "download them again")
        if len(values) > 1:
            got = f"{ids[name]} and {others[name]}"
            raise _error(f"{name} must be the same in {one} and {other}", got, "download both from one place")
    return others | ids


def _read_state(directory: Path, config: DualARConfig) -> State:
    """Every weight under upstream's key, mapped rather than read."""
    file = next((name for name in FILES[config.line] if (directory / name).is_file()), None)
    if file is None:
        raise _missing(directory, " or ".join(FILES[config.line]))
    read = _read_shards if file == INDEX else read_pickle if file.endswith(".pth") else _read_safetensors
    state: State = {}
    for key, tensor in read(directory / file).items():
        name = _upstream_key(key)
        if IGNORED.search(name):
            continue
        if name in state:
            raise _error(f"{name} must be in {file} once", f"it twice (as {key} too)", "save the state dict again")
        if not isinstance(tensor, Tensor):
            got = type(tensor).__name__
            raise _error(f"{key} in {file} must be a tensor", got, "save model.state_dict()", TypeError)
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            got = f"{_name(tensor.dtype)} ({_name(tensor.layout)}, {tensor.device})"
            advice = "quantised models are not read: use the original"
            raise _error(f"{key} in {file} must be a plain tensor of {_DTYPES}", got, advice, TypeError)
        state[name] = tensor
    _join_qkv(state, config)
    return state


def read_pickle(path: Path) -> Mapping[str, Any]:
    """torch.save's file, without executing what it may ask for."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:  # its text advises to execute the file: not passed on
        asked = re.search(r"GLOBAL (\S+)", str(error))
        got = f"{asked[1] if asked else 'something else'}, which was not executed"
        raise _error(f"{path.name} must be a plain checkpoint", got, "use one that holds tensors only") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged(path, error) from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise _error(f"{path.name} must be a state dict", type(found).__name__, "save model.state_dict()", TypeError)
    return found


def _read_shards(index: Path) -> State:
    shards = _json(index.parent, index.name).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(file)).name != file for file in shards.values()):
        raise _error(f"weight_map in {index.name} must be keys and file names", "something else")
    state: State = {}
    for file in sorted(set(shards.values())):
        if not (index.parent / file).is_file():
            raise _missing(index.parent, f"{file} (which {index.name} names)")
        state |= _read_safetensors(index.parent / file, {key for key in shards if shards[key] == file})
    return state


def _read_safetensors(path: Path, expected: set[str] | None = None) -> State:
    """The tensors of a file that are needed; `expected` is all that it holds, by the index."""
    extras.require("speech", "safetensors")
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            state = {key: file.get_tensor(key) for key in keys if not IGNORED.search(_upstream_key(key))}
    except Exception as error:  # SafetensorError, or torch's about a tensor
        raise _damaged(path, error) from error
    differing = sorted(expected.symmetric_difference(keys)) if expected is not None else []
    if differing:
        got = f"a file {'with' if differing[0] in keys else 'without'} {differing[0]}"
        raise _error(f"{path.name} must be as {INDEX} says", got, "download both again")
    return state


def _join_qkv(state: State, config: DualARConfig) -> None:
    """Older files hold the rows of wqkv as wq, wk and wv."""
    for first in [key for key in state if ".attention.wq." in key]:
        stack = config.fast if first.startswith("fast_") else config.slow
        heads = {"wq": stack.heads, "wk": stack.kv_heads, "wv": stack.kv_heads}
        parts = {first.replace(".wq.", f".{part}."): heads[part] * stack.head_dim for part in heads}
        for key, rows in parts.items():
            shape = [rows] if key.endswith("bias") else [rows, stack.dim]
            got = list(state[key].shape) if key in state else None
            if got != shape:
                raise _error(f"{key} must be {shape}", str(got), "does config.json fit?")
        state[first.replace(".wq.", ".wqkv.")] = torch.cat([state.pop(key) for key in parts])


def _keys(config: DualARConfig) -> set[str]:
    """The key of every weight that the model has."""
    keys = {MODEL_KEYS[name] for name in model_shapes(config)}
    for prefix, stack in (("layers", config.slow), ("fast_layers", config.fast)):
        keys |= {f"{prefix}.{i}.{LAYER_KEYS[name]}" for i in range(stack.layers) for name in layer_shapes(stack)}
    return keys


def _upstream_key(key: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    return PREFIXES.get(prefix, "") + key.removeprefix(prefix)


def _json(directory: Path, file: str) -> dict[str, Any]:
    if not (directory / file).is_file():
        raise _missing(directory, file)
    try:
        value = json.loads((directory / file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _error(f"{file} must be JSON", _first_line(error)) from error
    if not isinstance(value, dict):
        raise _error(f"{file} must be a JSON object", type(value).__name__)
    return value


def _missing(directory: Path, what: str) -> Exception:
    return _error(f"{what} must be in {directory}", "no such file", "download it", FileNotFoundError)


def _damaged(path: Path, error: Exception) -> Exception:
    return _error(f"{path.name} must be whole and readable", _first_line(error))


def _error(claim: str, got: str, advice: str = "download it again", kind: type[Exception] = ValueError) -> Exception:
    return kind(f"checkpoint: {claim}, got {got}; {advice}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


_DTYPES = ", ".join(map(_name, DTYPES))
