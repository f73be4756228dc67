"""Quantization-aware training: weights and ranges that know that they will be rounded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from hasten.compress.fold.batchnorm import without_norms
from hasten.compress.layers import lifted, named, patterns
from hasten.compress.passes import batches
from hasten.compress.quantize.rounding import LAYERS, TRANSPOSED, RoundedLayer, RoundedRange
from hasten.compress.settings import whole_numbers
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Profile, Space, Stage
from hasten.train import train_further, training, treatable

# Calls that carry every value on as it is, or drop it: a range in front of them is the range behind them.
_PASSING = frozenset(
    f"aten.{name}"
    for name in (
        "max_pool1d", "max_pool2d", "max_pool3d", "view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "t",
        "squeeze", "unsqueeze", "contiguous", "clone",
    )
)  # fmt: skip
_PASSING_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


@dataclass(frozen=True, kw_only=True)
class QuantizeAware:
    """Trains with rounded weights and activations, so that `QuantizeStatic` behind it loses less.

    Batch norms fold into the layer in front; those that cannot keep their statistics. Then, while training, each layer reads
    activations rounded to 8 bits between learnt bounds, and its weights are rounded with one learnt step for each output
    channel (`rounding` has the formulas); gradients pass straight through. What comes back has no rounding left in it but is
    an ordinary network in floats: its weights lie on the learnt grid, and the bounds are clamps. `QuantizeStatic(observer="minmax")`
    with the same `weight_bits` finds that very grid, integer for integer.

    A layer whose weight is read elsewhere too (tied to an embedding) keeps it as it is. Sums, means and outputs, which
    some engines also round to 8 bits, are not rounded in training. Training is that of `FineTune`.

    Args:
        weight_bits: width of the weights, in [2, 8]; None takes the profile's.
        epochs: passes over *train*, > 0.
        learning_rate: at its highest, > 0; also of the logarithms of steps and bounds.
        batch: examples per step, >= 2; a network with a fixed batch size is trained at that size.
        distil: weight of the original's outputs against the labels, in [0, 1].
        temperature: at which class probabilities are compared, > 0.
        only: patterns of layer names to treat; all where it is empty.
        keep: patterns of layer names to leave as they are; name them to `QuantizeStatic` as well.

    Raises:
        UsageError: on a value outside its range.

    References:
        S. K. Esser et al., "Learned Step Size Quantization", 2019, arXiv:1902.08153.
        S. R. Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of Deep Neural
        Networks", 2019, arXiv:1903.08066 (logarithms of the thresholds).
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.TRAIN
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"score"})
    reads_profile: ClassVar[bool] = True

    weight_bits: int | None = None
    epochs: float = 6.0
    learning_rate: float = 1e-3
    batch: int = 64
    distil: float = 0.5
    temperature: float = 2.0
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole_numbers(self)
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise UsageError(f"weight_bits must be in [2, 8] or None, got {self.weight_bits}")
        patterns("only", self.only)
        patterns("keep", self.keep)
        training(self, "classes")  # its checks are ours

    def apply(self, network: Network, context: Context) -> Network:
        """The trained network in its lifted form, in floats.

        Raises:
            Unsupported: where the engine runs none of the layers on integers, where nothing can be trained, where
                torch.export cannot follow the network, and where activations are not finite.
            UsageError: where `only` or `keep` names no layer.
        """
        treatable(network)
        given = without_norms(network.with_body(lifted(network)))
        module = given.module
        assert isinstance(module, fx.GraphModule)
        names = self._layers(module, context.profile)
        ranges = _place_ranges(module, names, symmetric=context.profile.symmetric_activations)
        context.progress(0.0, "watching the ranges of the activations")
        _watch(module, ranges, given, context)
        bits = context.profile.weight_bits if self.weight_bits is None else self.weight_bits
        for name in names:
            module.set_submodule(name, RoundedLayer(module.get_submodule(name), bits=bits))
        trained = train_further(given, context, training(self, context.loss, freeze_norms=True))
        _plain(trained.module, names, ranges)  # a copy of our own, made by the training
        return trained

    @classmethod
    def space(cls, network: Network) -> Space:
        """Learning rates and epochs. Raises Unsupported where there is nothing to train or to round."""
        treatable(network)
        if not any(type(m) in LAYERS for m in network.module.modules()):
            raise Unsupported("QuantizeAware needs a linear or convolutional layer, found none")
        return {"learning_rate": (1e-3, 3e-4, 3e-3), "epochs": (6.0, 2.0, 15.0)}

    def _layers(self, module: fx.GraphModule, profile: Profile) -> tuple[str, ...]:
        """Names of the layers that run on integers and own their weight."""
        owners = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
        read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
        found = {n: m for n, m in named(module, LAYERS, only=self.only, keep=self.keep).items() if _on_integers(m, profile)}
        names = tuple(n for n, m in found.items() if owners[id(m.weight)] == 1 and f"{n}.weight" not in read)
        if not names:
            wanted = ", ".join(sorted(profile.integer_ops)) or "nothing"
            raise Unsupported(f"QuantizeAware needs a layer with a weight of its own that runs on integers ({wanted}), found none")
        return names


def _on_integers(layer: nn.Module, profile: Profile) -> bool:
    if isinstance(layer, nn.Linear):
        return bool(profile.integer_ops & {"Gemm", "MatMul"})
    return ("ConvTranspose" if isinstance(layer, TRANSPOSED) else "Conv") in profile.integer_ops


def _place_ranges(module: fx.GraphModule, names: tuple[str, ...], *, symmetric: bool) -> tuple[str, ...]:
    """Puts a range behind every tensor that one of these layers reads; all its readers but the output read the range."""
    graph = module.graph
    reads = [n.args[0] for n in graph.nodes if n.op == "call_module" and n.target in names]
    origins = dict.fromkeys(_origin(module, r) for r in reads if isinstance(r, fx.Node))
    last_input = [n for n in graph.nodes if n.op == "placeholder"][-1]
    made = []
    for number, origin in enumerate(o for o in origins if not any(_writes(u) for u in o.users)):
        name = f"range_{number}"
        while hasattr(module, name):
            name += "_"
        module.add_submodule(name, RoundedRange(symmetric=symmetric))
        with graph.inserting_after(last_input if origin.op == "placeholder" else origin):
            call = graph.call_module(name, (origin,))
        for user in [u for u in origin.users if u is not call and u.op != "output"]:
            user.replace_input_with(origin, call)
        made.append(name)
    graph.lint()
    module.recompile()
    return tuple(made)


def _origin(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The tensor whose values `node` holds, in front of everything that only moves them or drops some."""
    while node.all_input_nodes and (_call(node) in _PASSING or _kind(module, node) in _PASSING_LAYERS):
        node = node.all_input_nodes[0]
    return node


def _call(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""


def _kind(module: fx.GraphModule, node: fx.Node) -> type[nn.Module] | None:
    return type(module.get_submodule(str(node.target))) if node.op == "call_module" else None


def _writes(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _watch(module: fx.GraphModule, ranges: tuple[str, ...], network: Network, context: Context) -> None:
    """Shows the calibrate view to the ranges, which then begin to round."""
    with torch.no_grad():
        for piece in batches(context.calibrate, fixed_batch=network.fixed_batch):
            module(*piece)
    for name in ranges:
        found = module.get_submodule(name)
        assert isinstance(found, RoundedRange)
        if not all(torch.isfinite(b) for b in (found.low, found.high)):
            raise Unsupported(f"expected finite activations, but one reaches {found.bounds()} on the calibration data")
        found.start()


@torch.no_grad()
def _plain(module: nn.Module, names: tuple[str, ...], ranges: tuple[str, ...]) -> None:
    """Takes the rounding out: weights stay where it put them, ranges become clamps."""
    assert isinstance(module, fx.GraphModule)
    for name in names:
        rounded = module.get_submodule(name)
        assert isinstance(rounded, RoundedLayer)
        rounded.layer.weight.copy_(rounded.weight())  # type: ignore[operator]
        module.set_submodule(name, rounded.layer)
    for node in [n for n in module.graph.nodes if n.op == "call_module" and n.target in ranges]:
        _clamp(module, node)
    for name in ranges:
        module.delete_submodule(name)
    module.graph.lint()
    module.recompile()


def _clamp(module: fx.GraphModule, node: fx.Node) -> None:
    """Replaces a range by a clamp, which takes the place of a ReLU that only this range reads."""
    found = module.get_submodule(str(node.target))
    assert isinstance(found, RoundedRange)
    source, (low, high) = node.all_input_nodes[0], found.bounds()
    if found.watching:  # only zeros came
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        return
    relu = low == 0 and len(source.users) == 1 and (_kind(module, source) is nn.ReLU or _call(source) == "aten.relu")
    with module.graph.inserting_before(node):
        clamp = module.graph.call_function(torch.ops.aten.clamp.default, (source.all_input_nodes[0] if relu else source, low, high))
    node.replace_all_uses_with(clamp)
    module.graph.erase_node(node)
    if relu:
        module.graph.erase_node(source)
        if source.op == "call_module" and not any(n.target == source.target for n in module.graph.nodes):
            module.delete_submodule(str(source.target))
