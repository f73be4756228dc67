"""An ONNX graph with its wires laid open: which node makes a tensor, which nodes read it, which tensors are constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import NodeProto, helper, numpy_helper

from hasten.core.errors import Unsupported

Array = np.ndarray[Any, Any]


class Wiring:
    """A working copy of a model; the model itself stays as it is.

    Every node gets a name of its own: the one it has, or `<type>_<first output>` where that is empty or taken; notes that
    exporters leave on nodes go.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        self._model.ir_version = max(self._model.ir_version, 4)  # from 4 on, constants need not be inputs as well
        graph = self._model.graph
        self.nodes: list[NodeProto] = list(graph.node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = tuple(i.name for i in graph.input if i.name not in self.constants)
        self.outputs = tuple(o.name for o in graph.output)
        kept_inputs = [i for i in graph.input if i.name in self.inputs]
        for held in (graph.node, graph.initializer, graph.value_info, graph.input, graph.quantization_annotation):
            del held[:]
        graph.input.extend(kept_inputs)
        self._tidy_nodes()
        self.rewire()

    def _tidy_nodes(self) -> None:
        taken: set[str] = set()
        for node in self.nodes:
            if not node.name or node.name in taken:
                node.name = f"{node.op_type}_{node.output[0]}"
            taken.add(node.name)
            node.doc_string = ""
            del node.metadata_props[:]  # exporters leave stack traces here

    def rewire(self) -> None:
        """Looks up makers and readers again; call it after any change to `nodes` or to a node."""
        self._maker = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)

    def index(self, node: NodeProto) -> int:
        """Where the very node stands; a list would compare it with all before it, field by field."""
        return next(at for at, other in enumerate(self.nodes) if other is node)

    def maker(self, tensor: str) -> NodeProto | None:
        """The node that makes the tensor; None for an input of the graph and for a constant."""
        return self._maker.get(tensor)

    def readers(self, tensor: str) -> Sequence[NodeProto]:
        """The nodes that read the tensor, in order."""
        return self._readers.get(tensor, ())

    def only_reader(self, tensor: str) -> NodeProto | None:
        """The one node that reads the tensor; None if there are more or fewer, or if the tensor leaves the graph."""
        readers = self.readers(tensor)
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def constant(self, tensor: str) -> Array | None:
        """The value of a constant tensor, else None."""
        found = self.constants.get(tensor)
        return None if found is None else numpy_helper.to_array(found)

    def add_constant(self, name: str, value: Array) -> str:
        """Stores a constant under `name`, or under `name_2`, … where that is taken; gives the name used."""
        free, count = name, 1
        while free in self.constants or free in self._maker or free in self.inputs:
            count += 1
            free = f"{name}_{count}"
        self.constants[free] = numpy_helper.from_array(np.asarray(value, order="C"), free)
        return free

    def share_constant(self, name: str, value: Array) -> str:
        """The name of a constant with this value: the one held under `name` where it is the same, else a new one."""
        held = self.constant(name)
        if held is not None and held.dtype == value.dtype and np.array_equal(held, value):
            return name
        return self.add_constant(name, value)

    def remove(self, node: NodeProto, *, keep: str, drop: str) -> None:
        """Takes a node out; whoever made or read the tensor `drop` makes or reads `keep`."""
        del self.nodes[self.index(node)]
        for other in self.nodes:
            for names in (other.input, other.output):
                if drop in names:
                    names[:] = [keep if name == drop else name for name in names]
        self.rewire()

    def ranks(self) -> dict[str, int]:
        """Rank of each tensor, as far as ONNX's shape inference can tell."""
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model()).graph
        except onnx.shape_inference.InferenceError as why:
            raise Unsupported(f"the shapes of the graph contradict each other: {why}") from why
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}

    def opset(self) -> int:
        """Version of the standard operator set."""
        return next((o.version for o in self._model.opset_import if o.domain in ("", "ai.onnx")), 1)

    def use_domain(self, domain: str, version: int) -> None:
        """Declares an operator set beside the standard one."""
        if all(o.domain != domain for o in self._model.opset_import):
            self._model.opset_import.append(helper.make_opsetid(domain, version))

    def model(self) -> onnx.ModelProto:
        """The graph as it is now, without the constants that nothing reads and without recorded intermediate shapes."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        used = {name for node in self.nodes for name in node.input} | set(self.outputs)
        graph.node.extend(self.nodes)
        graph.initializer.extend(t for name, t in self.constants.items() if name in used)
        return model


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or `default` where it is not given."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Gives the node's attribute a value, or takes it away where the value is None."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept if value is None else [*kept, helper.make_attribute(name, value)])


def split_gemm(wiring: Wiring, node: NodeProto) -> NodeProto:
    """A Gemm x·W + b becomes MatMul and Add; gives the MatMul, under the same name. A MatMul stays as it is."""
    if node.op_type != "Gemm":
        return node
    weight = wiring.constant(node.input[1])
    assert weight is not None
    name, bias, out = node.input[1], node.input[2] if len(node.input) > 2 else "", node.output[0]
    if attribute(node, "transB", 0):
        name = wiring.share_constant(f"{name}_transposed", np.ascontiguousarray(weight.T))
    made = [helper.make_node("MatMul", [node.input[0], name], [f"{out}_product" if bias else out], name=node.name)]
    if bias:
        made.append(helper.make_node("Add", [f"{out}_product", bias], [out], name=f"{node.name}_bias"))
    at = wiring.index(node)
    wiring.nodes[at : at + 1] = made
    wiring.rewire()
    return made[0]
