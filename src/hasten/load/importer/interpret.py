"""Follows an ONNX graph in torch: every node by its function of the table.

Values that the file fixes stay NumPy arrays; what hangs on them alone is computed once. Sizes of inputs stay integers, symbolic
ones while torch.export looks on. What is left are tensors: the calls that the network makes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from hasten.core.errors import Unsupported
from hasten.load.importer.nodes import Body, Node, Reference, read_function
from hasten.load.importer.table import OPERATORS, SIZES, Array, Call, Operator, Value, sized, to_array, to_tensor

MOST_NODES = 100_000
DEEPEST = 32
MOST_BYTES = 2**29
_MOVES = ("Slice", "Split", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Gather", "Identity", "Expand", "Cast")
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")


@dataclass(frozen=True)
class Scope:
    """Where a body is followed: its path, its operator set, how deep it lies, and the values by name."""

    path: str
    opset: int
    depth: int
    values: dict[str, Value]
    attributes: dict[str, Any]


class Store:
    """The stored tensors of the network, kept in `root` under dotted names."""

    def __init__(self, root: nn.Module, given: dict[str, Array]) -> None:
        self.root = root
        self._given = {_address(a): name for name, a in given.items()}
        self._keys: dict[tuple[Any, ...], str] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._alive: list[Any] = [given]
        self._layers: dict[tuple[Any, ...], str] = {}
        self._taken: set[str] = set()

    def is_given(self, array: Array) -> bool:
        """Whether the array is a weight of the file, and not one that a node holds or gave."""
        return _address(array) in self._given

    def tensor(self, key: tuple[Any, ...], array: Array, *, layer: Node, role: str, trained: bool) -> Tensor:
        """The stored tensor of the request `key`; the first time it is made from `array`, or found where it is stored already."""
        if key not in self._keys:
            same = (_address(array), array.shape, array.strides, array.dtype.name)
            if same not in self._names:
                self._names[same] = self._store(key, array, layer, role, trained)
            self._keys[key] = self._names[same]
        return attrgetter(self._keys[key])(self.root)  # type: ignore[no-any-return]

    def _store(self, key: tuple[Any, ...], array: Array, layer: Node, role: str, trained: bool) -> str:
        self._alive.append(array)
        tensor = to_tensor(array).detach().clone(memory_format=torch.contiguous_format)
        learns = trained and tensor.is_floating_point()
        path = self._path(key[:2], array, layer, role)
        parent, _, name = path.rpartition(".")
        home = self.root
        for part in filter(None, parent.split(".")):
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = getattr(home, part)
        if learns:
            home.register_parameter(name, nn.Parameter(tensor))
        else:
            home.register_buffer(name, tensor)
        return path

    def _path(self, node: tuple[Any, ...], array: Array, layer: Node, role: str) -> str:
        own = self._given.get(_address(array), "")
        if role == "value":
            return self._free(_dotted(own) or _dotted(layer.name) or f"constant_{layer.number}")
        if node not in self._layers:
            named = re.fullmatch(r"(.+)[./](weight|kernel|gamma)", own)
            self._layers[node] = _dotted(named[1] if named else _place(layer)) or f"{layer.op.rpartition('.')[2].lower()}_{layer.number}"
        return self._free(f"{self._layers[node]}.{role}")

    def _free(self, path: str) -> str:
        """`path`, or with a number at its layer: no name stands for two tensors, nor for a tensor and a layer."""
        parent, _, name = path.rpartition(".")
        count, wanted = 0, path
        while self._clashes(wanted):
            count += 1
            wanted = f"{parent}_{count}.{name}" if parent else f"{name}_{count}"
        self._taken.add(wanted)
        return wanted

    def _clashes(self, path: str) -> bool:
        parts = path.split(".")
        inside = any(t.startswith(path + ".") for t in self._taken)
        return path in self._taken or inside or any(".".join(parts[:i]) in self._taken for i in range(1, len(parts)))


def _address(array: Array) -> tuple[int, int]:
    """Where the numbers lie. Zero-sized arrays have no place of their own."""
    return (array.__array_interface__["data"][0], array.size)


def _place(layer: Node) -> str:
    """The layer that a node stands for: its name without the operator at its end."""
    parts = [p for p in layer.name.split("/") if p]
    kind = layer.op.rpartition(".")[2].lower()
    if len(parts) > 1 and re.sub(r"_\d+$", "", parts[-1]).lower() in (kind, "matmul", "gemm", "biasadd", "conv2d", "conv1d"):
        parts = parts[:-1]
    return "/".join(parts)


def _dotted(name: str) -> str:
    """A name that torch takes: letters, digits and underscores between dots."""
    parts = [re.sub(r"\W", "_", p) for p in re.split(r"[./]", name.removeprefix("onnx::"))]
    parts = [p for p in parts if p]
    return ".".join(f"_{p}" if hasattr(nn.Module, p) or p in ("training", "graph", "meta", "_follow") else p for p in parts)


class Followed(nn.Module):
    """An ONNX graph as a module: the weights under the names of their layers, and a `forward` that follows the graph."""

    def __init__(self, body: Body, functions: dict[str, Body]) -> None:
        super().__init__()
        interpreter = Interpreter(body, functions, Store(self, body.constants))
        self.__dict__["_follow"] = interpreter  # no module of torch's, so that no layer's name can meet it

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the graph."""
        return self.__dict__["_follow"].run(*inputs)  # type: ignore[no-any-return]


class Interpreter:
    """Follows a graph node by node; twice with the same weights: first on numbers, then while torch.export looks on.

    Args:
        body: the graph.
        functions: the model's own functions by operator name.
        store: where the weights are kept.
    """

    def __init__(self, body: Body, functions: dict[str, Body], store: Store) -> None:
        self.body, self.functions, self.store = body, functions, store
        self.folded: dict[tuple[Any, ...], Value] = {}
        self.zeros: dict[int, Tensor] = {}  # tensors of open sizes that are zero whatever the inputs
        self.count = 0
        self.bytes = 0

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the graph."""
        self.count = 0
        self.zeros = {}
        if self.body.opset is None:
            raise Unsupported("expected a graph that names the version of ONNX's operators, got none")
        values = dict(zip(self.body.inputs, inputs, strict=True))
        found = self._follow(self.body, Scope("", self.body.opset, 0, values, {}))
        if any(isinstance(f, list) or f is None for f in found):
            raise Unsupported("expected a graph whose outputs are tensors, got a sequence")
        return tuple(self._output(name, f) for name, f in zip(self.body.outputs, found, strict=True))

    def enter(self, call: Call, body: Body, given: Sequence[Value], step: int) -> list[Value]:
        """The outputs of a subgraph of a node, which sees the values around it."""
        scope = call.scope
        path = f"{scope.path}/{call.node.number}.{step}"
        values = scope.values | dict(zip(body.inputs, given, strict=True))
        return self._follow(body, Scope(path, scope.opset, scope.depth + 1, values, scope.attributes))

    def _output(self, name: str, value: Value) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if value.dtype == object:
            return sized(value)
        node = Node(op="Output", name=name, number=-1, inputs=(), outputs=(), attributes={})
        return self.store.tensor(("output", name), value, layer=node, role="value", trained=False).clone()

    def _follow(self, body: Body, scope: Scope) -> list[Value]:
        self._run(body, scope)
        try:
            return [scope.values[o] for o in body.outputs]
        except KeyError as why:
            raise Unsupported(f"output {why} of the graph is given by no node") from why

    def _run(self, body: Body, scope: Scope) -> None:
        if scope.depth > DEEPEST:
            raise Unsupported(f"expected functions and subgraphs at most {DEEPEST} deep, got more; do they call themselves?")
        scope.values.update(body.constants)
        self._count()  # a body counts as well, for it may have no nodes
        for node in body.nodes:
            self._count()
            results = self._named(node, scope)
            for name, result in zip(node.outputs, results, strict=False):
                if name:
                    scope.values[name] = result

    def _count(self) -> None:
        self.count += 1
        if self.count > MOST_NODES:
            raise Unsupported(f"expected at most {MOST_NODES} calls with loops unrolled, got more")

    def _named(self, node: Node, scope: Scope) -> list[Value]:
        """What a node gives; an error says which one it was."""
        try:
            given = [scope.values[i] if i else None for i in node.inputs]
            return self._results(node, scope, given)
        except Unsupported as why:
            if getattr(why, "placed", False):
                raise
            placed = Unsupported(f"{node}: {why}")
            placed.placed = True  # type: ignore[attr-defined]
            raise placed from why
        except Exception as why:  # a strange file makes torch and NumPy raise anything
            if "GuardOnDataDependent" in type(why).__name__ or "Constraint" in type(why).__name__:
                raise
            placed = Unsupported(f"{node} cannot be imported ({type(why).__name__}: {str(why).splitlines()[0] if str(why) else ''})")
            placed.placed = True  # type: ignore[attr-defined]
            raise placed from why

    def _results(self, node: Node, scope: Scope, given: list[Value]) -> list[Value]:
        attributes = {k: self._attribute(v, scope) for k, v in node.attributes.items()}
        attributes = {k: v for k, v in attributes.items() if v is not None}
        if node.op == "Constant":
            return [constant(attributes)]
        body = self.functions.get(node.op)
        if body is None and node.op not in OPERATORS:
            body = _standard(replace(node, attributes=attributes), scope.opset, given)
        if body is not None:
            return self._function(node, body, scope, given, attributes)
        call = Call(node, scope, self)
        known = all(v is None or isinstance(v, np.ndarray) for v in given)
        sizes = any(isinstance(v, np.ndarray) and v.dtype == object for v in given)
        if known and sizes and node.op in SIZES:
            found = SIZES[node.op](call, *given, **attributes)
            if found is not NotImplemented:
                return _listed(found)
        table = OPERATORS[node.op]
        key = (scope.path, node.number)
        has_body = any(isinstance(v, Body) for v in attributes.values())
        if not (known and table.folds) or sizes or has_body or node.op in _RANDOM:
            results = _listed(self._apply(table, call, given, attributes))
            if node.op in _MOVES and id(given[0]) in self.zeros:
                self.zeros.update({id(r): r for r in results})
            return results
        if key not in self.folded:
            self.folded[key] = self._fold(table, replace(call, folding=True), given, attributes)
        return self.folded[key]  # type: ignore[no-any-return]

    def _attribute(self, value: Any, scope: Scope) -> Any:
        return scope.attributes.get(value.name) if isinstance(value, Reference) else value

    def _function(self, node: Node, body: Body, scope: Scope, given: list[Value], attributes: dict[str, Any]) -> list[Value]:
        values: dict[str, Value] = dict.fromkeys(body.inputs)
        values.update(zip(body.inputs, given, strict=False))
        inner = Scope(f"{scope.path}/{node.number}", body.opset or scope.opset, scope.depth + 1, values, body.defaults | attributes)
        self._run(body, inner)
        return [inner.values.get(o) for o in body.outputs]  # an output that nobody reads may be left out

    def _apply(self, table: Operator, call: Call, given: list[Value], attributes: dict[str, Any]) -> Value:
        """Calls the function of the table with each input as it wants it."""
        arrived = []
        for i, value in enumerate(given):
            name, way = table.inputs[-1] if table.spread and i >= len(table.inputs) else _slot(table, i)
            arrived.append(_arrive(call, name, way, value))
        return table.function(*arrived, **self._keywords(table, call, attributes))

    def _fold(self, table: Operator, call: Call, given: list[Value], attributes: dict[str, Any]) -> list[Value]:
        """A node all of whose inputs are constants, computed now."""
        ways = [table.inputs[-1] if table.spread and i >= len(table.inputs) else _slot(table, i) for i in range(len(given))]
        plain = [to_tensor(v) if v is not None and way in ("Tensor", "Weight") else v for v, (_, way) in zip(given, ways, strict=True)]
        keywords = self._keywords(table, call, attributes)
        with torch.no_grad():
            found = [to_array(v) for v in _listed(table.function(*plain, **keywords))]
        self.bytes += sum(v.nbytes for v in found if isinstance(v, np.ndarray) and v.base is None)
        if self.bytes > MOST_BYTES:
            raise Unsupported(f"expected constants of at most {MOST_BYTES} bytes, got more")
        return found

    def _keywords(self, table: Operator, call: Call, attributes: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(attributes) - table.attributes):
            raise Unsupported(f"its attribute {unknown[0]} is not known here")
        return attributes | ({"call": call} if "call" in table.attributes else {})


def _slot(table: Operator, index: int) -> tuple[str, str]:
    if index >= len(table.inputs):
        raise Unsupported(f"expected at most {len(table.inputs)} inputs, got more")
    return table.inputs[index]


def _arrive(call: Call, name: str, way: str, value: Value) -> Value:
    if value is None or way == "Either" or isinstance(value, list):
        return value
    if way == "Known":
        if isinstance(value, Tensor):
            raise Unsupported(f"its input {name.rstrip('_')} must be known before the network runs, got one that is computed")
        return value
    if way == "Weight" and isinstance(value, np.ndarray) and value.dtype != object:
        return call.weight(name, value, trained=not name.startswith("running"))
    return call.tensor(value)


def _listed(value: Value) -> list[Value]:
    """The results of a call as a list of its outputs. A sequence is one output: functions give it in a tuple."""
    return list(value) if isinstance(value, tuple) else [value]


def constant(attributes: dict[str, Any]) -> Array:
    """The array of a Constant node."""
    name, value = next(iter(attributes.items()))
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if name == "value":
        return value  # type: ignore[no-any-return]
    if name not in kinds:
        raise Unsupported(f"expected a constant of numbers, got {name}")
    return np.asarray(value, kinds[name])


def _standard(node: Node, opset: int, given: list[Value]) -> Body:
    """The body by which ONNX itself defines an operator that the table does not have."""
    domain, _, name = node.op.rpartition(".")
    schema: Any
    try:
        schema = onnx.defs.get_schema(name, opset, domain) if not domain else onnx.defs.get_schema(name, domain=domain)
    except onnx.defs.SchemaError:
        raise Unsupported("this operator is not known here") from None
    function = onnx.FunctionProto()
    if schema.has_function:
        function.CopyFrom(schema.function_body)
    elif schema.has_context_dependent_function:
        function.ParseFromString(schema.get_context_dependent_function(_proto(node, domain, name), [_type(v) for v in given]))
    else:
        raise Unsupported("this operator is not known here")
    if not function.opset_import:
        function.opset_import.add(version=schema.since_version)
    return read_function(function)


def _proto(node: Node, domain: str, name: str) -> bytes:
    attributes = {k: v for k, v in node.attributes.items() if not isinstance(v, (Body, Reference))}
    made = onnx.helper.make_node(name, node.inputs, node.outputs, domain=domain)
    for key, value in attributes.items():
        given = onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        made.attribute.append(onnx.helper.make_attribute(key, given))
    return bytes(made.SerializeToString())


def _type(value: Value) -> bytes:
    if value is None:
        return bytes(onnx.TypeProto().SerializeToString())
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        kind = onnx.TensorProto.BFLOAT16 if name == "bfloat16" else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name))
    else:
        kind = onnx.TensorProto.INT64 if value.dtype == object else onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    shape = [s if isinstance(s, int) else None for s in value.shape]
    return bytes(onnx.helper.make_tensor_type_proto(kind, shape).SerializeToString())
