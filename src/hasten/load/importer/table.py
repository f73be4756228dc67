"""The table of operators: how an ONNX operator becomes torch calls.

One function is one operator. Its signature is the operator's schema: positional parameters are the inputs in their order (None
where one is left out), keyword-only parameters are the attributes with their defaults. How an input arrives is its annotation:

- `Tensor`: as a tensor, whatever it is in the file;
- `Known`: as a NumPy array; an input whose values depend on the network's inputs is refused. Entries made from sizes of
  the network's inputs are symbolic integers in an array of objects;
- `Weight`: as a parameter of the layer, named after the parameter of the function;
- `Either`: as an array where it is known, else as a tensor.

A keyword-only parameter `call` is the `Call`: operator set, number of outputs that are read, and the layer's weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hasten.core.errors import Unsupported

if TYPE_CHECKING:
    from hasten.load.importer.interpret import Interpreter, Scope
    from hasten.load.importer.nodes import Body, Node

Array: TypeAlias = np.ndarray[Any, Any]
Known: TypeAlias = Array
Weight: TypeAlias = Tensor
Either: TypeAlias = Any
Value: TypeAlias = Any
"""What passes along an edge: a tensor, a known array, a list of values (a sequence), or None (left out)."""

MOST_ELEMENTS = 2**26

sym_int: Callable[[Any], Any] = torch.sym_int
sym_max: Callable[[Any, Any], Any] = torch.sym_max
sym_min: Callable[[Any, Any], Any] = torch.sym_min
sym_not: Callable[[Any], Any] = torch.sym_not


@dataclass(frozen=True)
class Operator:
    """A function of the table with its signature taken apart: the way that each input arrives, and the attributes.

    `folds`: whether it is computed once where all its inputs are constants.
    """

    function: Callable[..., Value]
    inputs: tuple[tuple[str, str], ...]
    spread: bool
    attributes: frozenset[str]
    folds: bool = True

    @classmethod
    def of(cls, function: Callable[..., Value], *, folds: bool = True) -> Operator:
        """Reads the signature of `function`."""
        inputs, attributes, spread = [], set(), False
        for p in inspect.signature(function).parameters.values():
            if p.kind is p.KEYWORD_ONLY:
                attributes.add(p.name)
            else:
                spread |= p.kind is p.VAR_POSITIONAL
                inputs.append((p.name, str(p.annotation).split(" ")[0]))
        return cls(function, tuple(inputs), spread, frozenset(attributes), folds)


OPERATORS: dict[str, Operator] = {}
SIZES: dict[str, Callable[..., Any]] = {}
"""The same operators on arrays of sizes, in NumPy."""


def operator(*names: str, folds: bool = True) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Enters a function into the table, under each of the names ("Relu", or "com.microsoft.Gelu" outside ONNX's own domain)."""

    def enter(function: Callable[..., Value]) -> Callable[..., Value]:
        for name in names:
            assert name not in OPERATORS, name
            OPERATORS[name] = Operator.of(function, folds=folds)
        return function

    return enter


def elementwise(functions: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Enters functions of one tensor."""
    for name, function in functions.items():

        def one(x: Tensor, *, function: Callable[[Tensor], Tensor] = function) -> Tensor:
            return function(x)

        OPERATORS[name] = Operator(one, (("x", "Tensor"),), False, frozenset())


@dataclass
class Call:
    """One call of an operator while the graph is followed."""

    node: Node
    scope: Scope
    interpreter: Interpreter
    folding: bool = False
    weights: int = 0

    @property
    def opset(self) -> int:
        """The operator set of the graph or function that the node stands in."""
        return self.scope.opset

    @property
    def outputs(self) -> int:
        """How many outputs are read."""
        return sum(bool(o) for o in self.node.outputs)

    def reads(self, output: int) -> bool:
        """Whether an output is read."""
        return output < len(self.node.outputs) and bool(self.node.outputs[output])

    def weight(self, role: str, array: Array, *, trained: bool = True) -> Tensor:
        """A weight of the layer that this node is, called `role` in it; the same array gives the same parameter."""
        if self.folding:
            return to_tensor(array)
        self.weights += 1
        key = (self.scope.path, self.node.number, self.weights)
        return self.interpreter.store.tensor(key, array, layer=self.node, role=role, trained=trained)

    def tensor(self, value: Value) -> Tensor:
        """A value as a tensor: an array of the file becomes a stored one."""
        if not isinstance(value, np.ndarray):
            return value  # type: ignore[no-any-return]
        if value.dtype == object:
            return sized(value)
        return self.weight("value", value, trained=value.ndim > 0 and value.size > 1 and self.interpreter.store.is_given(value))

    def zero(self, value: Tensor) -> Tensor:
        """The value, noted as zeros whatever the inputs are."""
        self.interpreter.zeros[id(value)] = value
        return value

    def is_zero(self, value: Value) -> bool:
        """Whether a value is zeros whatever the inputs are."""
        if isinstance(value, np.ndarray):
            return value.dtype != object and not value.any()
        return id(value) in self.interpreter.zeros

    def body(self, body: Body, given: Sequence[Value], step: int = 0) -> list[Value]:
        """The outputs of a subgraph (of If, Loop or Scan) for these inputs."""
        return self.interpreter.enter(self, body, given, step)


def sized(value: Array) -> Tensor:
    """An array of sizes as a tensor."""
    flat = value.reshape(-1).tolist()
    kinds = (bool, torch.SymBool), (float, torch.SymFloat)
    dtype = torch.bool if any(isinstance(v, kinds[0]) for v in flat) else torch.int64
    dtype = torch.float32 if any(isinstance(v, kinds[1]) for v in flat) else dtype
    if any(isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) for v in flat):
        return torch.stack([torch.scalar_tensor(v, dtype=dtype) for v in flat]).reshape(value.shape)
    return torch.tensor(flat, dtype=dtype).reshape(value.shape)


def scalar(value: Either) -> Either:
    """An array without axes as a number, which torch takes as it is; another value unchanged."""
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iufbO" else value


def ints(value: Known) -> list[Any]:
    """Known integers as a list; one number as a list of one."""
    return value.reshape(-1).tolist()


def constants(value: Known, what: str) -> list[int]:
    """Integers that must not hang on sizes that the file leaves open."""
    found = ints(value)
    if any(not isinstance(v, (int, float)) for v in found):
        raise Unsupported(f"expected {what} that are constant, got some that hang on the size of an input")
    return [int(v) for v in found]


def bounded(sizes: Sequence[Any]) -> Sequence[Any]:
    """The sizes, refused where a tensor of them would be larger than 2^26 elements without need."""
    total = 1
    for size in sizes:
        total *= size if isinstance(size, int) else 1
    if total > MOST_ELEMENTS:
        raise Unsupported(f"expected a constant of at most {MOST_ELEMENTS} elements, got one of {total}")
    return sizes


def to_tensor(array: Array) -> Tensor:
    """A constant as a tensor that shares its memory where it can; 4-bit integers are widened."""
    name = array.dtype.name
    if name == "bfloat16" or name.startswith("float8"):
        return torch.from_numpy(array.view(np.int16 if name == "bfloat16" else np.uint8)).view(getattr(torch, name))
    if name in ("int4", "uint4", "int2", "uint2"):
        array = array.astype(np.int8 if name[0] == "i" else np.uint8)
    if array.dtype.kind not in "biufc":
        raise Unsupported(f"expected numbers, got a tensor of {name}")
    if any(s < 0 for s in array.strides) or not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


def to_array(value: Value) -> Value:
    """A folded result as an array; what is none stays."""
    if isinstance(value, (list, tuple)):
        return [to_array(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        import ml_dtypes

        raw = value.contiguous().view(torch.int16 if value.dtype == torch.bfloat16 else torch.uint8).numpy()
        return raw.view(getattr(ml_dtypes, str(value.dtype).removeprefix("torch.")))
    return value.numpy()
