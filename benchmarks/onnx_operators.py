"""How many of ONNX's own backend tests the importer passes: by operator, written into docs/onnx.md.

    python benchmarks/onnx_operators.py [--quick] [--json] [--save] [--only TEXT]

A test passes where the imported network, in lifted form, gives what the test expects within the test's own tolerance. Inputs
that an operator needs to know before the network runs (sizes, axes, …) are written into the graph as constants, and so are the
weights and the conditions of branches. `--quick` takes one test in twenty, `--only` those whose name contains a text; `--save`
writes the page.
"""

from __future__ import annotations

import argparse
import collections
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import onnx
import torch
from onnx import numpy_helper

from hasten.core.errors import HastenError
from hasten.load.importer import import_graph
from hasten.load.importer.interpret import Followed
from hasten.load.importer.nodes import read_model
from hasten.load.importer.table import OPERATORS, to_array, to_tensor

DOCUMENT = Path(__file__).parents[1] / "docs" / "onnx.md"
WEIGHTS = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "BatchNormalization": (1, 2, 3, 4),
}
KNOWN_BODIES = {"AffineGrid": (1,), "CenterCropPad": (1,)}


class Case:
    """A test: a graph, inputs and the outputs expected of it."""

    def __init__(self, name: str, graph: onnx.ModelProto, inputs: list[Any], outputs: list[Any], rtol: float, atol: float) -> None:
        self.name, self.graph, self.inputs, self.outputs = name, graph, inputs, outputs
        self.rtol, self.atol = rtol, max(atol, 1e-6)

    @property
    def operator(self) -> str:
        """What the table counts it under."""
        kinds = {n.op_type for n in self.graph.graph.node} - {"Constant"}
        return next(iter(kinds)) if len(kinds) == 1 else "several operators"


def cases() -> Iterator[Case]:
    """ONNX's node tests without those of the expanded functions, and its model tests that need no download."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for test in found:
        if "_expanded" not in test.name and test.model is not None and test.data_sets:
            inputs, outputs = test.data_sets[0]
            yield Case(test.name, test.model, [_array(v) for v in inputs], [_array(v) for v in outputs], test.rtol, test.atol)
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for kind in ("simple", "pytorch-operator", "pytorch-converted", "light"):
        for folder in sorted((data / kind).glob("test_*")):
            if (folder / "model.onnx").exists() and (folder / "test_data_set_0" / "output_0.pb").exists():
                yield _from_folder(kind, folder)


def _from_folder(kind: str, folder: Path) -> Case:
    graph = onnx.load(folder / "model.onnx")
    values = {}
    for side, protos in (("input", graph.graph.input), ("output", graph.graph.output)):
        files = sorted((folder / "test_data_set_0").glob(f"{side}_*.pb"), key=lambda f: int(f.stem.rpartition("_")[2]))
        values[side] = [_value(f, p) for f, p in zip(files, protos, strict=False)]
    return Case(f"{kind}/{folder.name}", graph, values["input"], values["output"], 1e-3, 1e-5)


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic | int | float) else value


def _value(file: Path, proto: onnx.ValueInfoProto) -> Any:
    if not proto.type.HasField("tensor_type"):
        return None
    return numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))


def attempt(case: Case) -> str:
    """ "" where the imported network gives what is expected, else the reason why not."""
    if not all(isinstance(v, np.ndarray) for v in (*case.inputs, *case.outputs)):
        return "an input or output is no tensor"
    if any(v.dtype == object or v.dtype.kind in "USO" for v in (*case.inputs, *case.outputs)):
        return "texts"
    graph, inputs = _settled(case)
    try:
        # A graph without inputs is a constant, which is computed and not exported.
        module = import_graph(graph, tuple(inputs)) if inputs else Followed(*read_model(graph))
        with torch.no_grad():
            given = module(*(to_tensor(np.array(v)) for v in inputs))
    except HastenError as why:
        return str(why)
    except Exception as why:  # a crash is a reason too
        return f"{type(why).__name__}: {why}"
    given = given if isinstance(given, tuple) else (given,)
    return _difference(case, given)


def _difference(case: Case, given: tuple[torch.Tensor, ...]) -> str:
    if len(given) != len(case.outputs):
        return f"{len(given)} outputs instead of {len(case.outputs)}"
    for a, b in zip(given, case.outputs, strict=True):
        if tuple(a.shape) != b.shape:
            return f"shape {tuple(a.shape)} instead of {b.shape}"
        found = to_array(a)
        if found.dtype != b.dtype:
            return f"{found.dtype} instead of {b.dtype}"
        wide = [v.astype(np.complex128 if v.dtype.kind == "c" else np.float64) for v in (found, b)]
        if not np.allclose(*wide, rtol=case.rtol, atol=case.atol, equal_nan=True):
            return "other values"
    return ""


def _settled(case: Case) -> tuple[onnx.ModelProto, list[Any]]:
    """The graph with the inputs that must be known written into it, and the inputs that are left."""
    graph = onnx.ModelProto()
    graph.CopyFrom(case.graph)
    names = [i.name for i in graph.graph.input]
    weights = {i.name for i in graph.graph.initializer}
    fixed = {name for node in graph.graph.node for name in _needed(node)}
    left = []
    for name, value in zip([n for n in names if n not in weights] if len(case.inputs) < len(names) else names, case.inputs, strict=False):
        if name in fixed and name not in weights:
            graph.graph.initializer.append(numpy_helper.from_array(value, name))
        elif name not in weights:
            left.append(value)
    return graph, left


def _needed(node: onnx.NodeProto) -> Iterator[str]:
    table = OPERATORS.get(node.op_type)
    fixed = set(WEIGHTS.get(node.op_type, ())) | set(KNOWN_BODIES.get(node.op_type, ()))
    for i, name in enumerate(node.input):
        known = table is not None and i < len(table.inputs) and table.inputs[i][1] == "Known"
        if name and (
            known
            or i in fixed
            or (node.op_type in ("Range", "Resize", "Upsample") and (node.op_type == "Range" or i > 0))
            or (node.op_type == "Pad" and i == 2)
        ):
            yield name


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Tries the tests; `--save` writes docs/onnx.md where all of them were tried."""
    warnings.simplefilter("ignore")
    chosen = [c for c in cases() if options.only in c.name]
    results = {case.name: (case.operator, attempt(case)) for case in chosen[:: 20 if options.quick else 1]}
    if options.save and not options.quick and not options.only:
        DOCUMENT.write_text(document(results))
    reasons = {name: why for name, (_, why) in results.items() if why}
    return {"tests": len(results), "passed": len(results) - len(reasons), "reasons": reasons}


def show(found: dict[str, Any]) -> None:
    """Prints why tests do not pass, and how many do."""
    for name, why in found["reasons"].items():
        print(f"{name}: {why}")
    print(f"\n{found['passed']} of {found['tests']} pass")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="TEXT")


def document(results: dict[str, tuple[str, str]]) -> str:
    """The page: operator, tests passed of all, and why the others are not."""
    rows = collections.defaultdict(list)
    for kind, why in results.values():
        rows[kind].append(why)
    passed = sum(not why for _, why in results.values())
    lines = [
        "# ONNX operators",
        "",
        "Generated by `python benchmarks/onnx_operators.py --save`; do not edit.",
        "",
        f"The importer turns an `.onnx` file into a network of ordinary layers. Of the {len(results)} backend tests of onnx",
        f"{onnx.__version__} (node tests without their expanded twins, simple, light and PyTorch model tests) it passes **{passed}** with",
        f"torch {torch.__version__}: the network in lifted form gives what the test expects, within the test's tolerance. Inputs that an",
        "operator needs before the network runs (sizes, axes, weights of layers, conditions) are constants in these tests, as they are in",
        "files that exporters write, and a test all of whose inputs are such is computed while importing. An operator that is",
        "not listed or refused leaves the network a graph, and the reason is printed.",
        "",
        "| operator | passes | reasons for the others |",
        "|---|---|---|",
    ]
    for kind in sorted(rows):
        reasons = collections.Counter(_short(why) for why in rows[kind] if why)
        said = "; ".join(f"{why} ({count})" for why, count in reasons.most_common())
        lines.append(f"| {kind} | {sum(not why for why in rows[kind])}/{len(rows[kind])} | {said} |")
    return "\n".join(lines) + "\n"


def _short(why: str) -> str:
    """A reason without the node that it names."""
    why = re.sub(r"^[\w.]+ (\(node \d+\)|'[^']*'): ", "", why)
    why = re.sub(r"^[\w.]+ (\(node \d+\)|'[^']*') cannot be imported", "cannot be imported", why)
    return why.replace("|", "/").splitlines()[0][:110]


if __name__ == "__main__":
    machine.run("onnx_operators", measure, show, _options)
