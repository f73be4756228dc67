"""An exported program becomes a network of ordinary modules: lifting.

The exported graph calls aten operators on weights that are inputs of the graph. Lifting turns each such call back into the
layer it came from, under the name that its weights had, so that a step sees the same network whatever the door.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from hasten.core.errors import ModelRefused
from hasten.load.batch import free_batch
from hasten.load.layers import Layer, arguments, read, unpacked

_CHECKS = ("_assert", "sym_constrain", "_check", "assert_", "sym_constrain_range")
_ATEN = torch.ops.aten
_FILLED = {
    _ATEN.zeros.default: _ATEN.new_zeros.default,
    _ATEN.ones.default: _ATEN.new_ones.default,
    _ATEN.full.default: _ATEN.new_full.default,
    _ATEN.empty.memory_format: _ATEN.new_empty.default,
}
_OWN = frozenset(dir(fx.GraphModule)) | {"graph", "meta", "training"}


def lift(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module in eval mode whose layers are `nn.Conv2d`, `nn.Linear`, `nn.BatchNorm2d`, `nn.LSTM`, ….

    Weights keep their values and names ("features.0.weight" lies in the layer `features.0`), a weight that two calls share stays
    one parameter, and BatchNorm and Dropout train again in `.train()`. Dropout inside a fused attention stays off. Calls that
    are no layer stay calls; weights that no call uses are left out. The program itself is not changed.

    A program that was exported for one batch size is rewritten for any where running it shows that each example's result stays
    the same; `meta["fixed_batch"]` of the result is that size where this fails, else None. `meta["notes"]` says what was
    changed about the outputs.

    Raises:
        ModelRefused: if the program keeps a state of its own between calls, or changes its inputs.
    """
    graph, tensors, notes = _flatten(program)
    batch = _static_batch(graph)
    root = nn.Module()
    _Lifting(graph, tensors, root, taken=set(tensors)).run()
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.users]:
        _refuse_state(node, tensors)
        _place(root, node.target, tensors[str(node.target)])
    _fill_by_example(graph)
    graph.lint()
    lifted = fx.GraphModule(root, graph, "Lifted")
    for parameter in lifted.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    lifted.eval()
    lifted.meta["notes"] = tuple(notes)
    lifted.meta["fixed_batch"] = None if batch is None or free_batch(lifted, batch) else batch
    for node in lifted.graph.nodes:
        node.meta = {}  # shapes of the export, no longer true
    return lifted


def _fill_by_example(graph: fx.Graph) -> None:
    """Makes tensors of a size that hangs on an input by way of that input: a saved module is traced again when it is read, and
    `zeros([1, n])` with an n of its own cannot be traced."""
    first = next(n for n in graph.nodes if n.op == "placeholder")
    for node in [n for n in graph.nodes if n.target in _FILLED and any(isinstance(size, fx.Node) for size in n.args[0])]:
        kept = {name: value for name, value in node.kwargs.items() if name in ("dtype", "layout", "device", "pin_memory")}
        value = node.meta.get("val")
        kept["dtype"] = kept.get("dtype") or (value.dtype if isinstance(value, Tensor) else torch.float32)
        with graph.inserting_before(node):
            made = graph.call_function(_FILLED[node.target], (first, *node.args), kept)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _static_batch(graph: fx.Graph) -> int | None:
    """The batch size that every input was fixed to, or None."""
    inputs = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
    sizes = [v.shape[0] for v in inputs if isinstance(v, Tensor) and v.dim()]
    fixed = all(isinstance(size, int) for size in sizes) and len(set(sizes)) == 1
    return sizes[0] if fixed else None


def _flatten(program: torch.export.ExportedProgram) -> tuple[fx.Graph, dict[str, Any], list[str]]:
    """One flat graph whose weights are get_attr nodes, the weights by name, and what must be said about the outputs."""
    signature = program.graph_signature
    tensors = _weights(program)
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for spec in signature.input_specs:
        node = nodes[spec.arg.name] if not isinstance(spec.arg, ConstantArgument) else None
        if spec.kind == InputKind.USER_INPUT and node is not None:
            values[node] = graph.node_copy(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and node is not None:
            values[node] = graph.get_attr(spec.target or node.name)
            values[node].meta["val"] = node.meta["val"]
        elif spec.kind != InputKind.USER_INPUT:
            raise ModelRefused(f"expected a network of tensors, got an input of kind {spec.kind.name.lower()} named {spec.target}")
    for name in (n for n in program.graph.nodes if n.op == "placeholder" and n not in values):
        values[name] = None
    outputs = _copy(program.graph_module, graph, values, tensors)
    kept, notes = _outputs(program, outputs)
    graph.output(kept)
    _drop_checks(graph)
    return graph, tensors, notes


def _weights(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """Own copies by name; names of one and the same storage share one copy."""
    copies: dict[Any, Tensor] = {}
    found: dict[str, Any] = {}
    parameters = set(program.graph_signature.parameters)
    for name, tensor in {**program.constants, **program.state_dict}.items():
        if not isinstance(tensor, Tensor):
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key not in copies:
            copy = tensor.detach().clone(memory_format=torch.contiguous_format)
            trained = name in parameters or isinstance(tensor, nn.Parameter)
            copies[key] = nn.Parameter(copy, requires_grad=False) if trained else copy
        found[name] = copies[key]
    return found


def _copy(source: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any], tensors: dict[str, Any]) -> Any:
    """Copies the nodes of `source` into `graph`, with the bodies of regions without gradients in their place."""
    outputs: Any = None
    for node in source.graph.nodes:
        if node.op == "output":
            outputs = fx.map_arg(node.args[0], values.__getitem__)
        elif node.op == "get_attr":
            values[node] = _attribute(source, node, graph, tensors)
        elif at := _region(node):
            body = getattr(source, node.args[at].target)
            inner = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), node.args[at + 1 :], strict=True))
            values[node] = _copy(body, graph, {p: values[a] for p, a in inner.items()}, tensors)
        elif node.target is operator.getitem and isinstance(values[node.args[0]], (tuple, list)):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            values[node] = graph.node_copy(node, values.__getitem__)
    return outputs


def _region(node: fx.Node) -> int:
    """Where a call that only switches gradients, or autocast off, keeps its body among its arguments; 0 for another call."""
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_autocast":
        return 0 if node.args[2] else 4
    return 1 if name == "wrap_with_set_grad_enabled" else 0


def _attribute(source: fx.GraphModule, node: fx.Node, graph: fx.Graph, tensors: dict[str, Any]) -> fx.Node | None:
    target = str(node.target)
    value = operator.attrgetter(target)(source)
    if isinstance(value, fx.GraphModule) and all(_region(user) for user in node.users):
        return None
    tensors.setdefault(target, value.clone() if isinstance(value, Tensor) else value)
    copied = graph.get_attr(target)
    copied.meta.update(node.meta)
    return copied


def _outputs(program: torch.export.ExportedProgram, outputs: Any) -> tuple[Any, list[str]]:
    """What the user's forward returned, as one tensor or a flat tuple."""
    specs = program.graph_signature.output_specs
    for spec in specs:
        if spec.kind == OutputKind.USER_INPUT_MUTATION:
            raise ModelRefused(f"expected a network that leaves its inputs alone, got one that writes on {spec.target}")
        if spec.kind == OutputKind.BUFFER_MUTATION and not re.search(r"(running_(mean|var)|num_batches_tracked)$", spec.target or ""):
            raise ModelRefused(f"expected a network without a state of its own, got one that writes on its buffer {spec.target}")
    given = [o for o, spec in zip(outputs, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
    kept = tuple(o for o in given if isinstance(o, fx.Node))
    if not kept:
        raise ModelRefused("expected a network that gives at least one tensor, got none")
    tree = program.call_spec.out_spec
    if tree is None or tree.is_leaf():
        return kept[0], []
    notes = [] if tree.type is tuple and tree.num_leaves == tree.num_children else ["its nested outputs became a flat tuple"]
    if len(kept) < len(given):
        notes.append(f"{len(given) - len(kept)} of its {len(given)} outputs are no tensors and were left out")
    return kept, notes


def _drop_checks(graph: fx.Graph) -> None:
    """Removes assertions, guards and copies that change nothing."""
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", str(node.target)).rpartition("::")[2]
        if node.op == "call_function" and name.startswith(_CHECKS) and not node.users:
            graph.erase_node(node)
        elif node.op == "call_function" and name.startswith(("lift_fresh_copy", "detach_.", "alias.")):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif name.startswith("add_.") and str(getattr(node.args[0], "target", "")).endswith("num_batches_tracked"):
            graph.erase_node(node)  # BatchNorm counts for itself again
    graph.eliminate_dead_code(_must_stay)


def _refuse_state(node: fx.Node, tensors: dict[str, Any]) -> None:
    for user in node.users:
        if not isinstance(user.target, torch._ops.OpOverload) or not isinstance(tensors[str(node.target)], Tensor):
            continue
        written = {a.name for a in user.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        if any(arguments(user)[name] is node for name in written):
            raise ModelRefused(f"expected a network without a state of its own, got one that writes on its buffer {node.target}")


def _place(root: nn.Module, path: str, value: Any) -> None:
    """Sets `value` at the dotted path, with empty modules on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)


class _Lifting:
    """One pass over a graph that replaces calls by layers."""

    def __init__(self, graph: fx.Graph, tensors: dict[str, Any], root: nn.Module, taken: set[str]) -> None:
        self.graph = graph
        self.tensors = tensors
        self.root = root
        self.taken = taken
        self.made: dict[str, tuple[str, nn.Module]] = {}
        self.uses = Counter[str]()

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._functional(node)
                layer = read(node)
                if layer is not None and self._can_replace(layer, node):
                    self._replace(layer, node)
        self.graph.eliminate_dead_code(_must_stay)

    def _functional(self, node: fx.Node) -> None:
        """An in-place call on a value that nothing else reads becomes the plain one: `add_` is `add`."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.name.endswith("_") or not _fresh(node.args[0]):
            return
        packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").rstrip("_"), None)
        if packet is not None and target._overloadname in packet.overloads():
            node.target = getattr(packet, target._overloadname)

    def _can_replace(self, layer: Layer, node: fx.Node) -> bool:
        """Only what trains is a layer: fixed filters stay calls, and so do calls whose other results are read."""
        weights = [self.tensors[str(w.target)] for name, w in layer.weights.items() if not name.startswith("running_")]
        trained = all(isinstance(w, nn.Parameter) for w in weights)
        readable = layer.gives == "tensor" or all(not u.users or unpacked(layer, u) is not None for u in node.users)
        return trained and readable and not layer.inplace

    def _replace(self, layer: Layer, node: fx.Node) -> None:
        key = repr((layer.kind, sorted(layer.settings.items()), [(n, id(self.tensors[str(w.target)])) for n, w in layer.weights.items()]))
        path, called = self._path(layer, node)
        key += "" if layer.weights else path if called else node.name
        if key not in self.made:
            path = self._free(path, layer)
            module = self._build(layer, path)
            self.made[key] = (path, module)
            self.taken.add(path)
            _place(self.root, path, module)
        path, _ = self.made[key]
        with self.graph.inserting_before(node):
            call = self.graph.call_module(path, layer.inputs)
        call.meta = dict(node.meta)
        if layer.gives == "tensor":
            node.replace_all_uses_with(call)
        else:
            self._unpack(layer, node, call)
        self.graph.erase_node(node)

    def _unpack(self, layer: Layer, node: fx.Node, call: fx.Node) -> None:
        for user in list(node.users):
            if user.users:
                user.replace_all_uses_with(self._taken(call, unpacked(layer, user) or (), user))
            if layer.gives == "first" and user.args[1] == 0:
                call.meta = dict(user.meta)
            self.graph.erase_node(user)

    def _taken(self, call: fx.Node, path: tuple[int, ...], user: fx.Node) -> fx.Node:
        with self.graph.inserting_before(user):
            for index in path:
                call = self.graph.call_function(operator.getitem, (call, index))
                call.meta = dict(user.meta)
        return call

    def _build(self, layer: Layer, path: str) -> nn.Module:
        with torch.device("meta"):
            module = layer.kind(**layer.settings)
        for name, node in layer.weights.items():
            value = self.tensors[str(node.target)]
            setattr(module, name, value)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            seen = self.tensors.get(f"{path}.num_batches_tracked")
            module.num_batches_tracked = torch.tensor(0) if seen is None else seen
        return module.eval()

    def _path(self, layer: Layer, node: fx.Node) -> tuple[str, bool]:
        """The user's name of the layer, and whether it was a module of theirs: from where it was called, else from its weights."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path, kind = stack[-1] if stack else ("", "")
        path = re.sub(r"@\d+$", "", path)
        kind = kind if isinstance(kind, str) else kind.__name__
        if path and kind.rpartition(".")[2] == layer.kind.__name__:
            return path, True
        if layer.weights:
            inner, weight = next(iter(layer.weights.items()))
            name = str(weight.target)
            return (name.removesuffix("." + inner) if name.endswith("." + inner) else re.sub(r"_weight$", "", name)), True
        return f"{path}.{layer.kind.__name__.lower()}".lstrip("."), False

    def _free(self, path: str, layer: Layer) -> str:
        """`path`, or the next free name near it: a layer never hides another attribute, nor holds one."""
        own = {id(self.tensors[str(w.target)]) for w in layer.weights.values()}
        others = {t for t in self.taken if id(self.tensors.get(t)) not in own or t == path} - {f"{path}.num_batches_tracked"}
        kind = layer.kind.__name__.lower()
        if any(t == path or t.startswith(path + ".") for t in others) or path.split(".")[0] in _OWN:
            path = path if path.endswith(kind) and path not in _OWN else f"{path}_{kind}"
        base = path
        while path in self.taken:
            self.uses[base] += 1
            path = f"{base}_{self.uses[base]}"
        return path


def _must_stay(node: fx.Node) -> bool:
    """Inputs, the output, and calls that write on something."""
    return node.op in ("placeholder", "output") or bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _fresh(node: Any) -> bool:
    """Whether nothing but its one user can see the value of this node."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if node.op == "call_module":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return all(r.alias_info is None for r in node.target._schema.returns)
