"""Opening a `.pt2` file without trusting it.

`torch.export.load` unpickles any weight, constant or sample input that the archive marks as pickled, evaluates its size
expressions as Python, imports modules that its trees name, and compiles its guards. So the archive is read by `load.guards`,
checked here, and rewritten in memory with plain tensors only; torch sees nothing but the rewritten copy.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive._package import PT2ArchiveWriter

from hasten.core.errors import ModelRefused
from hasten.load.guards import read_json, read_zip
from hasten.load.lower import quiet, reason

_AGAIN = 'write it with torch.export.save(torch.export.export(model, (x,)), "model.pt2")'
_MODEL = "models/model.json"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_MOST_NODES = 200_000
_LONGEST = 10_000  # characters of a size expression
_HIGHEST = 64  # power that a size may be taken to
_OPERATOR = re.compile(
    r"torch\.ops\.(?:aten|prims|higher_order)\.((?!__)\w+|__i?(?:and|or|xor|lshift|rshift)__)(?:\.(?!__)\w+)?|"
    r"torch\.sym_\w+|math\.(?:ceil|floor|trunc|sqrt)|"
    r"_operator\.(?:add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|ge|gt|le|lt|and_|or_|not_|lshift|rshift|getitem)"
)
_REFUSED = frozenset({"from_file", "save", "load", "while_loop"})  # files, and what need not end
_TREES = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None})
_SYMBOL = re.compile(r"[a-z]+\d+|int_oo|oo")
_FUNCTIONS = frozenset(
    """
    Add Mul Pow Integer Rational Float Symbol Min Max Abs floor ceiling Mod PythonMod FloorDiv CleanDiv CeilDiv ModularIndexing
    Where Identity CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt RoundDecimal ToFloat IntTrueDiv FloatTrueDiv PowByNatural
    FloatPow LShift RShift Eq Ne Ge Gt Le Lt And Or Not Equality Unequality GreaterThan LessThan StrictGreaterThan StrictLessThan
    Relational IsNonOverlappingAndDenseIndicator Infinity NegativeInfinity NegativeOne Zero One Half
    """.split()  # noqa: SIM905
)
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_EXPRESSION = (ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare)
_SIGNS = (ast.operator, ast.unaryop, ast.cmpop)


def open_program(path: Path) -> torch.export.ExportedProgram:
    """The program in a `.pt2` file, its tensors on the CPU. No code from the file runs.

    Raises:
        ModelRefused: if the file is no such archive, is damaged, or holds anything but tensors and PyTorch's own operators.
    """
    try:
        entries = _entries(path)
        copy = _rewritten(entries)
        with quiet():
            return torch.export.load(copy)
    except ModelRefused:
        raise
    except Exception as why:  # torch raises anything on a damaged archive
        raise ModelRefused(f"{path.name} is no exported program that this PyTorch reads ({reason(why)}); {_AGAIN}") from why


def _entries(path: Path) -> dict[str, bytes]:
    """The archive's entries by name below its root folder."""
    entries = read_zip(path)
    found = {name.partition("/")[2]: data for name, data in entries.items()}
    if _MODEL not in found or len(found) < len(entries):
        raise ModelRefused(f"{path.name} holds no program called model of PyTorch 2.8 or later; {_AGAIN}")
    return found


def _rewritten(entries: dict[str, bytes]) -> io.BytesIO:
    if entries.get("archive_format") != b"pt2" or entries.get("byteorder", b"little") != b"little":
        raise ModelRefused(f"expected an archive of format pt2, little-endian; {_AGAIN}")
    program = _json(entries, _MODEL)
    _check_program(program)
    program["guards_code"] = []
    copy = io.BytesIO()
    with PT2ArchiveWriter(copy) as writer:
        for config_name, folder in ((_WEIGHTS, "data/weights/"), (_CONSTANTS, "data/constants/")):
            config = _json(entries, config_name)
            for name in dict.fromkeys(_plain_tensors(config)):
                writer.write_bytes(folder + name, entries[folder + name])
            writer.write_string(config_name, json.dumps(_on_cpu(config)))
        writer.write_string(_MODEL, json.dumps(_on_cpu(program)))
        # Sample inputs are a pickle; an empty one says that there are none.
        writer.write_bytes("data/sample_inputs/model.pt", b"")
    copy.seek(0)
    return copy


def _json(entries: dict[str, bytes], name: str) -> dict[str, Any]:
    found = read_json(entries[name], name)
    if not isinstance(found, dict):
        raise ModelRefused(f"expected an object in {name}, got {type(found).__name__}")
    return found


def _plain_tensors(config: dict[str, Any]) -> Iterator[str]:
    """The entries that the config names; refuses what torch would unpickle."""
    for name, payload in config["config"].items():
        entry = payload["path_name"]
        if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry):
            raise ModelRefused(f"expected plain tensors only, got {name} as pickled data, which could run code: not opened; {_AGAIN}")
        yield entry


def _check_program(program: Any) -> None:
    """Walks the whole description and refuses what torch would evaluate, import or call."""
    for key, value in _walk(program):
        if key in ("target", "as_operator") and isinstance(value, str):
            _check_operator(value)
        elif key == "expr_str":
            _check_expression(str(value))
        elif key in ("in_spec", "out_spec") and isinstance(value, str):
            _check_tree(read_json(value.encode(), key)[1])
        elif key == "metadata" and isinstance(value, dict):
            kept = {k: v for k, v in value.items() if k == "nn_module_stack"}
            value.clear()
            value.update(kept)
        elif key == "nodes" and len(value) > _MOST_NODES:
            raise ModelRefused(f"expected at most {_MOST_NODES} nodes, got {len(value)}: not opened")
        elif key in ("as_custom_obj", "custom_obj") and value:
            raise ModelRefused(f"expected a network of tensors, got one with an object of a custom class: not opened; {_AGAIN}")


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            yield from value.items()
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)


def _check_operator(name: str) -> None:
    found = _OPERATOR.fullmatch(name)
    if not found or found.group(1) in _REFUSED:
        raise ModelRefused(f"expected PyTorch's own operators only, got {name[:100]!r}: not opened")


def _check_expression(text: str) -> None:
    """A size expression is evaluated by torch: only arithmetic on sizes may stand in it, with powers of small numbers."""
    if len(text) > _LONGEST:
        raise ModelRefused(f"expected sizes of at most {_LONGEST} characters, got {len(text)}: not opened")
    for node in ast.walk(ast.parse(text, mode="eval")):
        allowed = isinstance(node, (*_EXPRESSION, *_SIGNS)) and _small_power(node)
        if isinstance(node, ast.Call):
            allowed = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and allowed
        elif isinstance(node, ast.Name):
            allowed = node.id in _FUNCTIONS or bool(_SYMBOL.fullmatch(node.id))
        elif isinstance(node, ast.Constant):
            allowed = isinstance(node.value, (int, float)) or (isinstance(node.value, str) and bool(_SYMBOL.fullmatch(node.value)))
        if not allowed:
            raise ModelRefused(f"expected arithmetic on sizes, got {text[:100]!r}: not opened")


def _small_power(node: ast.AST) -> bool:
    """Whether a power or a shift, if this is one, is by a small constant: sympy computes 9 ** 9 ** 9 to its last digit."""
    powers = [node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)) else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POWERS:
        powers = node.args[1:]
    plain = [p.operand if isinstance(p, ast.UnaryOp) else p.args[0] if isinstance(p, ast.Call) and len(p.args) == 1 else p for p in powers]
    return all(isinstance(p, ast.Constant) and isinstance(p.value, (int, float)) and abs(p.value) <= _HIGHEST for p in plain)


def _check_tree(tree: Any) -> None:
    if tree["type"] not in _TREES:
        raise ModelRefused(f"expected inputs and outputs in tuples, lists or dicts, got {tree['type']}: let forward give a tuple")
    keys = read_json(tree["context"].encode(), "the keys of a dict") if tree["context"] else None
    if keys is not None and not (isinstance(keys, list) and all(isinstance(k, (str, int)) for k in keys)):
        raise ModelRefused(f"expected dicts with plain keys, got {str(keys)[:100]}: not opened")
    for child in tree["children_spec"]:
        _check_tree(child)


def _on_cpu(value: Any) -> Any:
    """The same description with every device replaced by the CPU."""
    if isinstance(value, dict):
        if set(value) == {"type", "index"} and isinstance(value["type"], str):
            return {"type": "cpu", "index": None}
        return {k: _on_cpu(v) for k, v in value.items()}
    return [_on_cpu(v) for v in value] if isinstance(value, list) else value
