"""Where the pairs of QuantizeLinear and DequantizeLinear go: a pure function of the graph and the engine's profile.

A *layer* (Conv, ConvTranspose, Gemm, MatMul) with constant weights is where integers pay; it calls for integers at its
input. An integer operator without weights (Add, GlobalAveragePool, …) joins where its inputs hold integers anyway. A passing
operator (MaxPool, Reshape, …) carries integers through with one scale on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx import NodeProto, TensorProto

from hasten.compress.quantize.normalise import plain_gemm
from hasten.compress.quantize.wiring import Wiring, attribute
from hasten.core.recipe import Profile

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOAT_RESULTS = ("Gemm", "MatMul")  # integer products that may hand out floats in every engine
_ACTIVATIONS = ("Relu", "Clip")
_EXTREMES = ("ReduceMax", "ReduceMin")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The decision.

    Args:
        layers: names of the nodes whose weights become integers.
        readers: names of all nodes that read their activations through a pair.
        scale_of: for each tensor that holds integers, the one that its scale and zero point are named after.
        pairs: the tensors that get a pair; the others of `scale_of` are made from such by passing operators.
        whole: the tensors of `scale_of` that exist in integers only, so that every reader reads the pair.
        unsigned: the names in `scale_of` whose tensors must be uint8 even in an engine that wants symmetric activations:
            those around a Concat, whose int8 inputs OpenVINO 2026.4 rounds to a wrong step.
    """

    layers: tuple[str, ...]
    readers: frozenset[str]
    scale_of: dict[str, str]
    pairs: tuple[str, ...]
    whole: frozenset[str]
    unsigned: frozenset[str]

    def groups(self) -> dict[str, tuple[str, ...]]:
        """For each name in `scale_of`, the tensors with a pair that share its scale."""
        found: dict[str, list[str]] = {name: [] for name in self.scale_of.values()}
        for tensor in self.pairs:
            found[self.scale_of[tensor]].append(tensor)
        return {name: tuple(tensors) for name, tensors in found.items()}


def place(wiring: Wiring, profile: Profile, *, keep: tuple[str, ...] = ()) -> Placement:
    """The placement for an engine with this profile, leaving the nodes named in `keep` in floats."""
    layers = [n for n in wiring.nodes if n.name not in keep and n.op_type in profile.integer_ops and is_layer(wiring, n)]
    if compiles(profile):
        layers = [n for n in layers if not _behind_extreme(wiring, n)]
    plan = _Plan(wiring=wiring, profile=profile, keep=frozenset(keep))
    for layer in layers:
        plan.join(layer)
    plan.spread()
    joins = [n for n in wiring.nodes if n.op_type == "Concat"]
    return Placement(
        layers=tuple(n.name for n in layers),
        readers=frozenset(plan.members),
        scale_of={t: plan.leader(t) for t in plan.paired},
        pairs=tuple(t for t in plan.paired if not (compiles(profile) and plan.carried(t))),
        whole=frozenset(t for t in plan.paired if plan.made_in_integers(t)),
        unsigned=frozenset(plan.leader(t) for n in joins for t in (*n.input, *n.output) if t in plan.paired),
    )


def is_layer(wiring: Wiring, node: NodeProto) -> bool:
    """Whether the node multiplies an activation with constant float32 weights."""
    if node.op_type not in LAYERS or node.input[0] in wiring.constants or (node.op_type == "Gemm" and not plain_gemm(node)):
        return False
    weight = wiring.constants.get(node.input[1])
    if weight is None or weight.data_type != TensorProto.FLOAT or (node.op_type == "MatMul" and len(weight.dims) != 2):
        return False
    return all(_one_per_channel(wiring, node, name) for name in node.input[2:] if name)


def _behind_extreme(wiring: Wiring, layer: NodeProto) -> bool:
    """Whether a maximum or minimum comes to the layer with no other layer between: OpenVINO 2026.4 computes it wrong before a pair."""
    seen, left = set[str](), [layer.input[0]]
    while left:
        tensor = left.pop()
        maker = None if tensor in seen else wiring.maker(tensor)
        seen.add(tensor)
        if maker is None or is_layer(wiring, maker):
            continue
        if maker.op_type in _EXTREMES:
            return True
        left += [name for name in maker.input if name]
    return False


def channel_axis(node: NodeProto) -> int:
    """The axis of a layer's weights that counts output channels (within a group, for ConvTranspose)."""
    return 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)) else 1


def channels(wiring: Wiring, node: NodeProto) -> int:
    """How many output channels a layer has."""
    within = int(wiring.constants[node.input[1]].dims[channel_axis(node)])
    return within * int(attribute(node, "group", 1)) if node.op_type == "ConvTranspose" else within


def _one_per_channel(wiring: Wiring, node: NodeProto, bias: str) -> bool:
    value = wiring.constant(bias)
    return value is not None and value.size in (1, channels(wiring, node))


def compiles(profile: Profile) -> bool:
    """Whether the engine reads a pair as the range of a value and finds the integer kernels itself.

    Such engines (OpenVINO, TensorRT) want symmetric activations, and each range once: an operator may hand out floats, and
    behind a passing operator a second pair would only be in the way. The others (ONNX Runtime) replace a node between pairs by
    its integer kernel, so that all but products need a pair behind them, and passing operators need one on both sides.
    """
    return profile.symmetric_activations


@dataclass(kw_only=True)
class _Plan:
    """The decision while it grows: it only ever adds, so `spread` comes to an end."""

    wiring: Wiring
    profile: Profile
    keep: frozenset[str]
    members: dict[str, NodeProto] = field(default_factory=dict)
    paired: dict[str, None] = field(default_factory=dict)  # an ordered set
    behind: dict[str, NodeProto] = field(default_factory=dict)  # tensor that holds a member's result -> the member
    _leader: dict[str, str] = field(default_factory=dict)

    def join(self, node: NodeProto) -> None:
        """Makes an integer operator a member: pairs on its activations, and behind it where it needs one."""
        self.members[node.name] = node
        result = self._result(node)
        self.behind[result] = node
        activations = node.input[:1] if is_layer(self.wiring, node) else node.input
        for tensor in activations:
            self.paired[tensor] = None
        if not compiles(self.profile) and node.op_type not in _FLOAT_RESULTS:
            self.paired[result] = None

    def spread(self) -> None:
        """Lets passing and weightless operators join until none does."""
        count = -1
        while count != len(self.members) + len(self.paired):
            count = len(self.members) + len(self.paired)
            for node in self.wiring.nodes:
                if node.name in self.members or node.name in self.keep:
                    continue
                if self._passes(node):
                    self._join_passing(node)
                elif self._weightless(node):
                    self.join(node)

    def made_in_integers(self, tensor: str) -> bool:
        """Whether an integer operator, or one that carries integers, makes the tensor."""
        return tensor in self.behind

    def carried(self, tensor: str) -> bool:
        """Whether a passing operator makes the tensor."""
        return self.made_in_integers(tensor) and self.behind[tensor].op_type in self.profile.passing_ops

    def leader(self, tensor: str) -> str:
        """The tensor whose scale this one uses."""
        while tensor in self._leader:
            tensor = self._leader[tensor]
        return tensor

    def _result(self, node: NodeProto) -> str:
        """The tensor behind the node, or behind the activations that disappear into its output range."""
        last = node
        while self.profile.fuses_relu:
            follower = self.wiring.only_reader(last.output[0])
            if follower is None or follower.op_type not in _ACTIVATIONS:
                break
            last = follower
        return str(last.output[0])

    def _passes(self, node: NodeProto) -> bool:
        if node.op_type not in self.profile.passing_ops or (node.op_type == "MaxPool" and len(node.output) > 1):
            return False
        inputs = _data_inputs(node)
        if any(name in self.wiring.constants for name in inputs) or attribute(node, "mode", b"nearest") != b"nearest":
            return False
        wanted = any(name in self.paired for name in node.output)
        return wanted or all(self.made_in_integers(name) and name in self.paired for name in inputs)

    def _join_passing(self, node: NodeProto) -> None:
        self.members[node.name] = node
        made = [name for name in node.output if name]
        tensors: list[str] = [*_data_inputs(node), *made]
        first = tensors[0]
        for tensor in tensors:
            self.paired[tensor] = None
        for tensor in made:
            self.behind[tensor] = node
        for tensor in tensors[1:]:
            mine, theirs = self.leader(first), self.leader(tensor)
            if mine != theirs:
                self._leader[theirs] = mine

    def _weightless(self, node: NodeProto) -> bool:
        if node.op_type not in self.profile.integer_ops or node.op_type in LAYERS:
            return False
        inputs = list(node.input)
        if any(name in self.wiring.constants or not name for name in inputs) or len([o for o in node.output if o]) != 1:
            return False
        made = [self.made_in_integers(name) for name in inputs]
        return any(made) and all(m or name in self.paired for m, name in zip(made, inputs, strict=True))


def _data_inputs(node: NodeProto) -> tuple[str, ...]:
    return tuple(node.input) if node.op_type == "Concat" else (node.input[0],)
