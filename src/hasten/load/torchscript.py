"""TorchScript (`torch.jit.save`) → an exported program: its graph is followed node by node while torch.export looks on.

TorchScript itself is used to read the archive and for nothing else; a node runs as one call of a PyTorch operator, so what is left
is the calls that the network makes. Only operators on tensors run: none that reads or writes files.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.core.errors import DataRefused, HastenError, ModelRefused
from hasten.core.network import Arrays
from hasten.load import guards
from hasten.load.lower import quiet, reason
from hasten.load.recurrence import recurrent_by_shape

__all__ = ["open_script"]

_MOST_CALLS = 100_000
_AGAIN = 'in PyTorch write torch.export.save(torch.export.export(model, (x,)), "model.pt2")'
_REACHING = re.compile(rb"\b(torch|ops\.aten)\.(save|load|from_file)\b|\bops\.(?!aten\b|prim\b|quantized\b)\w+")
_FORBIDDEN = frozenset({"save", "load", "from_file", "warn"})
_CONVOLUTIONS: dict[tuple[bool, int], Callable[..., Tensor]] = {
    (False, 3): F.conv1d,
    (False, 4): F.conv2d,
    (False, 5): F.conv3d,
    (True, 3): F.conv_transpose1d,
    (True, 4): F.conv_transpose2d,
    (True, 5): F.conv_transpose3d,
}


def open_script(path: Path, example: Arrays | None, pins: Mapping[str, float] | None = None) -> torch.export.ExportedProgram:
    """The program in a TorchScript file, for batches of any size where its graph allows it.

    Args:
        path: what `torch.jit.save` wrote, traced or scripted.
        example: one array per input that is not pinned.
        pins: values of inputs that are no data, by name.

    Raises:
        ModelRefused: it is damaged, reaches out of the graph, keeps a state between calls, or branches on its data.
        DataRefused: there is no example, for TorchScript does not say the sizes of its inputs.
    """
    entries = guards.read_zip(path)
    for name, code in entries.items():
        if "/code/" in name and (found := _REACHING.search(code)):
            raise ModelRefused(f"expected PyTorch's own operators on tensors, got {found[0].decode()!r} in {name[:100]}: not opened")
    if example is None:
        raise DataRefused(f"{path.name} does not say the sizes of its inputs; give data")
    tensors = tuple(torch.from_numpy(np.array(a)) for a in example)
    try:
        with quiet(), torch.no_grad():
            script: Any = torch.jit.load(guards.packed(entries), map_location="cpu").eval()  # type: ignore[no-untyped-call]
            followed = Followed(script, pins or {})
            followed(*tensors)
            batch = tuple({0: torch.export.Dim.AUTO} for _ in tensors) if len(example[0]) > 1 else None
            with recurrent_by_shape():
                return torch.export.export(followed, tensors, dynamic_shapes=None if batch is None else (batch,), strict=False)
    except HastenError:
        raise
    except Exception as why:  # torch raises anything on a strange program
        raise ModelRefused(f"{path.name} cannot be followed ({reason(why)}); {_AGAIN}") from why


class Followed(nn.Module):
    """A script as a module: its weights under their own names, and a `forward` that follows its graph."""

    def __init__(self, script: Any, pins: Mapping[str, float]) -> None:
        super().__init__()
        names: dict[int, str] = {}
        parameters = dict(script.named_parameters(remove_duplicate=False))
        for name, value in {**parameters, **dict(script.named_buffers(remove_duplicate=False))}.items():
            learns = name in parameters  # they come back as plain tensors
            self._keep(name, nn.Parameter(value.detach(), requires_grad=value.is_floating_point()) if learns else value.detach())
            if value.numel():
                names.setdefault(value.data_ptr(), name)
        self.__dict__["_names"] = names
        self.__dict__["_script"] = script
        self.__dict__["_pins"] = dict(pins)

    def _keep(self, path: str, value: Tensor) -> None:
        home: nn.Module = self
        *parents, name = path.split(".")
        for part in parents:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        if isinstance(value, nn.Parameter):
            home.register_parameter(name, value)
        else:
            home.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        """The outputs of the script."""
        graph = self.__dict__["_script"].inlined_graph
        own, *taken = list(graph.inputs())
        values = {own.debugName(): _Part(())} | self._given(taken, inputs)
        found = _Following(self).block(graph, values)
        return found[0] if len(found) == 1 else tuple(found)

    def _given(self, taken: list[Any], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        """The inputs of the graph by name: pinned, in their order, or None where one may be left out."""
        pins, left, values = dict(self.__dict__["_pins"]), list(inputs), {}
        for value in taken:
            name, kind = value.debugName().partition(".")[0], str(value.type())
            if name in pins:
                number = pins.pop(name)
                values[value.debugName()] = int(number) if kind == "int" else torch.tensor(number) if kind == "Tensor" else number
            elif left:
                values[value.debugName()] = left.pop(0)
            elif kind.startswith("Optional") or kind.endswith("?"):
                values[value.debugName()] = None
            else:
                raise ModelRefused(f"the network takes {name} as well ({kind}); give it, or pin it: --pin {name}=NUMBER")
        if left or pins:
            names = ", ".join(value.debugName().partition(".")[0] for value in taken)
            raise ModelRefused(f"the network takes {names}, got {len(left) or 'pins for ' + ', '.join(pins)} more")
        return values


class _Part:
    """A module of the script, by its path."""

    def __init__(self, path: tuple[str, ...]) -> None:
        self.path = path


class _Following:
    """One pass over the graph."""

    def __init__(self, root: Followed) -> None:
        self.root = root
        self.script = root.__dict__["_script"]
        self.calls = 0

    def block(self, block: Any, values: dict[str, Any]) -> list[Any]:
        """Runs the nodes of a block; `values` takes what they give."""
        for node in block.nodes():
            self.calls += 1
            if self.calls > _MOST_CALLS:
                raise ModelRefused(f"expected at most {_MOST_CALLS} calls with loops unrolled, got more; {_AGAIN}")
            given = [values[i.debugName()] for i in node.inputs()]
            results = self._node(node, given, values)
            names = [o.debugName() for o in node.outputs()]
            values.update(zip(names, results if len(names) != 1 else (results,), strict=True))
        outputs = block.outputs() if hasattr(block, "outputs") else block.returnNode().inputs()
        return [values[o.debugName()] for o in outputs]

    def _node(self, node: Any, given: list[Any], values: dict[str, Any]) -> Any:
        kind = node.kind()
        if kind == "prim::Constant":
            return node.output().toIValue()
        if kind == "prim::GetAttr":
            return self._attribute(given[0], node.s("name"))
        if kind == "prim::If":
            return self._branch(node, given[0], values)
        if kind == "prim::Loop":
            return self._loop(node, given, values)
        if kind == "prim::DictConstruct":
            return dict(zip(given[::2], given[1::2], strict=True))
        if kind == "prim::SetAttr":
            raise ModelRefused(f"expected a network without a state of its own, got one that writes on its {node.s('name')!r}")
        if kind == "prim::RaiseException":
            raise ModelRefused(f"the network raises on this example: {str(given[0])[:200]}")
        if kind in _PLAIN:
            return _PLAIN[kind](*given)
        room, _, name = kind.partition("::")
        if room != "aten" or name in _FORBIDDEN:
            raise ModelRefused(f"expected PyTorch's own operators on tensors, got {kind}; {_AGAIN}")
        if name in _SCALARS and not any(isinstance(g, (Tensor, list)) for g in given):
            return _SCALARS[name](*given)
        return _operator(node, name, given)

    def _attribute(self, owner: Any, name: str) -> Any:
        if not isinstance(owner, _Part):
            return getattr(owner, name)
        path = (*owner.path, name)
        found = attrgetter(".".join(path))(self.script)
        if isinstance(found, torch.jit.ScriptModule):
            return _Part(path)
        return self._own(found)

    def _own(self, value: Any) -> Any:
        """The root's own tensors in the place of the script's: an LSTM keeps a list of its weights besides."""
        if isinstance(value, list):
            return [self._own(v) for v in value]
        name = self.root.__dict__["_names"].get(value.data_ptr()) if isinstance(value, Tensor) else None
        return value if name is None else attrgetter(name)(self.root)

    def _branch(self, node: Any, condition: Any, values: dict[str, Any]) -> Any:
        yes, no = node.blocks()
        found = self.block(yes if condition else no, values)
        return found[0] if len(found) == 1 else found

    def _loop(self, node: Any, given: list[Any], values: dict[str, Any]) -> Any:
        most, going, *carried = given
        (body,) = node.blocks()
        names = [i.debugName() for i in body.inputs()]
        step = 0
        while step < most and going:
            going, *carried = self.block(body, values | dict(zip(names, [step, *carried], strict=True)))
            step += 1
        return carried[0] if len(carried) == 1 else carried


def _operator(node: Any, name: str, given: list[Any]) -> Any:
    """One call of the very operator that the graph names; a traced convolution as the layer's own function."""
    if name == "_convolution":
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, *_ = given
        extra = (output_padding, groups, dilation) if transposed else (dilation, groups)
        return _CONVOLUTIONS[transposed, weight.dim()](x, weight, bias, stride, padding, *extra)
    schema = torch._C.parse_schema(node.schema())
    keywords = {a.name: value for a, value in zip(schema.arguments, given, strict=True) if a.kwarg_only}
    places = [value for a, value in zip(schema.arguments, given, strict=True) if not a.kwarg_only]
    overload = getattr(getattr(torch.ops.aten, name), schema.overload_name or "default")
    return overload(*places, **keywords)


def _append(found: list[Any], value: Any) -> list[Any]:
    found.append(value)
    return found


_PLAIN: dict[str, Callable[..., Any]] = {
    "prim::ListConstruct": lambda *given: list(given),
    "prim::TupleConstruct": lambda *given: given,
    "prim::TupleUnpack": lambda given: given if len(given) > 1 else given[0],
    "prim::ListUnpack": lambda given: given if len(given) > 1 else given[0],
    "prim::TupleIndex": operator.getitem,
    "prim::NumToTensor": lambda number: number,
    "prim::unchecked_cast": lambda value: value,
    "prim::unchecked_unwrap_optional": lambda value: value,
    "prim::Uninitialized": lambda: None,
    "prim::Print": lambda *_: None,
    "prim::device": lambda x: x.device,
    "prim::dtype": lambda x: x.dtype,
    "prim::layout": lambda x: x.layout,
    "prim::is_cuda": lambda _: False,
    "prim::min": min,
    "prim::max": max,
    "aten::warn": lambda *_: None,
    "aten::size": lambda x, axis=None: list(x.shape) if axis is None else x.shape[axis],
    "aten::dim": lambda x: x.dim(),
    "aten::len": len,
    "aten::numel": lambda x: x.numel(),
    "aten::append": _append,
    "aten::format": lambda text, *given: text.format(*given),
    "aten::__getitem__": operator.getitem,
    "aten::__contains__": lambda known, value: value in known,
    "aten::__is__": lambda a, b: a is b,
    "aten::__isnot__": lambda a, b: a is not b,
    "aten::__not__": lambda value: not value,
    "aten::Int": lambda value: value if not isinstance(value, (Tensor, float)) else int(value),
    "aten::Float": float,
    "aten::Bool": bool,
    "aten::ScalarImplicit": lambda value: value if not isinstance(value, Tensor) else value.item(),
    "aten::IntImplicit": lambda value: value if not isinstance(value, Tensor) else int(value),
}
_SCALARS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, alpha=1: a + b * alpha,
    "sub": lambda a, b, alpha=1: a - b * alpha,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "neg": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "__and__": lambda a, b: a and b,
    "__or__": lambda a, b: a or b,
}
