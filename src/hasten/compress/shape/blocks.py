"""Whole residual blocks go."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from hasten.compress import layers
from hasten.compress.passes import batches
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage
from hasten.train.outputs import outputs_of

_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_FEWEST = 1e-30


@dataclass(frozen=True, kw_only=True)
class PruneBlocks:
    """Removes residual blocks: x + f(x) becomes x, for the blocks whose removal changes the outputs least.

    A block is an addition in the lifted form of which one side is an earlier value x and the other a part f of the network that
    leads from x to the addition and nowhere else, has weights, and gives the shape of x. A block may hold others. Blocks with a
    projected shortcut, which change the shape, stay. One block goes at a time, and the others are then judged again. Fine-tuning
    should follow.

    Args:
        blocks: how many go: a whole number >= 1, or a share of all blocks in (0, 1), rounded, at least one.
        saliency: "change": Σ ‖y − y'‖² / Σ ‖y‖² of the outputs over the calibrate view; "random", the control.
        only: names or patterns of layers; blocks that hold one of them may go; empty for all.
        keep: names or patterns of layers; blocks that hold one of them stay.

    Raises:
        ValueError: on a setting outside its range.

    References:
        A. Veit, M. Wilber, S. Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", 2016,
            arXiv:1605.06431.
        X. Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, arXiv:2403.03853.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False

    blocks: int | float = 1
    saliency: Literal["change", "random"] = "change"
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole = isinstance(self.blocks, int) and not isinstance(self.blocks, bool)
        if not (self.blocks >= 1 if whole else isinstance(self.blocks, float) and 0 < self.blocks < 1):
            raise ValueError(f"blocks must be a whole number of at least 1 or a share in (0, 1), got {self.blocks!r}")
        if self.saliency not in ("change", "random"):
            raise ValueError(f"saliency must be 'change' or 'random', got {self.saliency!r}")
        for name in ("only", "keep"):
            layers.patterns(name, getattr(self, name))

    def apply(self, network: Network, context: Context) -> Network:
        """The network in its lifted form with fewer blocks.

        Raises:
            Unsupported: where it has fewer blocks than are to go, cannot be exported, or gives outputs that are not finite.
            UsageError: where `only` or `keep` meets no layer.
            DataRefused: on too few calibration examples for one batch.
        """
        module = layers.lifted(network)
        found = _blocks(module, network, self.only, self.keep)
        count = self.blocks if isinstance(self.blocks, int) else max(1, round(self.blocks * len(found)))
        if len(found) < count:
            raise Unsupported(f"PruneBlocks needs {count} residual blocks that keep their shape, found {len(found)}")
        gone = {block.exit: block.entry for block in self._chosen(module, found, count, network, context)}
        for exit_, entry in gone.items():
            while entry in gone:  # the block before goes as well
                entry = gone[entry]
            exit_.replace_all_uses_with(entry)
        for exit_ in gone:
            module.graph.erase_node(exit_)  # `x += …` is no dead code by itself
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.graph.lint()
        module.recompile()
        return network.with_body(module)

    @classmethod
    def space(cls, network: Network) -> Space:
        """Numbers of blocks: a few, a quarter and a half of them. Raises Unsupported on a network without residual blocks."""
        count = len(_blocks(layers.lifted(network), network, (), ()))
        if not count:
            raise Unsupported("PruneBlocks needs a residual block that keeps its shape, found none")
        return {"blocks": tuple(dict.fromkeys(n for n in (1, 2, 3, round(count / 4), round(count / 2)) if 1 <= n <= count))}

    def _chosen(self, module: fx.GraphModule, found: list[_Block], count: int, network: Network, context: Context) -> Iterable[_Block]:
        if self.saliency == "random":
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(context.seed))
            return [found[i] for i in order[:count]]
        return _least(module, found, count, network, context)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """entry → inside → exit, where exit = entry + f(entry)."""

    entry: fx.Node
    exit: fx.Node
    inside: frozenset[fx.Node]


def _blocks(module: fx.GraphModule, network: Network, only: tuple[str, ...], keep: tuple[str, ...]) -> list[_Block]:
    kinds = tuple({type(m) for m in module.modules()})
    wanted = set(layers.named(module, kinds, only=only, keep=keep)) if only else None
    kept = set(layers.named(module, kinds, only=keep)) if keep else set()
    shapes = _shapes(module, network)
    found = []
    for node in module.graph.nodes:
        block = _block_at(node)
        if block is None or shapes[block.entry] != shapes[block.exit] or not _weighted(module, block) or _overwrites(module, block):
            continue
        names = {str(n.target) for n in block.inside if n.op == "call_module"}
        if not names & kept and (wanted is None or names & wanted):
            found.append(block)
    return found


def _block_at(node: fx.Node) -> _Block | None:
    """The block that ends in this addition."""
    if node.target not in _ADD or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    for entry, end in (node.args[:2], node.args[1::-1]):
        if isinstance(entry, fx.Node) and isinstance(end, fx.Node) and entry.op != "get_attr":
            inside = _between(entry, end)
            if inside and all(user in inside or user is node for n in inside for user in n.users):
                return _Block(entry=entry, exit=node, inside=inside)
    return None


def _between(entry: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
    """All that lies on a way from `entry` to `end`, with `end`; empty where there is no way."""
    behind, front = {entry}, [entry]
    while front:
        front = [user for user in {u for n in front for u in n.users} if user not in behind]
        behind.update(front)
    if end not in behind or end is entry:
        return frozenset()
    before, front = {end}, [end]
    while front:
        front = [n for n in {a for m in front for a in m.all_input_nodes} if n not in before and n is not entry]
        before.update(front)
    return frozenset(before & behind)


def _weighted(module: fx.GraphModule, block: _Block) -> bool:
    """Whether anything is learnt inside."""
    named = {str(n.target) for n in block.inside if n.op == "call_module"}
    direct = any(a.op == "get_attr" for n in block.inside for a in n.all_input_nodes)
    return direct or any(True for name in named for _ in module.get_submodule(name).parameters())


def _overwrites(module: fx.GraphModule, block: _Block) -> bool:
    """Whether something inside writes on what enters the block, which those behind it would miss."""

    def writes(node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
        return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))

    return any(node.args[:1] == (block.entry,) and writes(node) for node in block.inside)


class _Shapes(fx.Interpreter):
    """Runs a network and notes what each node gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, object] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = (value.shape, value.dtype) if isinstance(value, Tensor) else None
        return value


@torch.no_grad()
def _shapes(module: fx.GraphModule, network: Network) -> dict[fx.Node, object]:
    shapes = _Shapes(module)
    shapes.run(*(torch.from_numpy(a.copy()) for a in network.example))
    return shapes.seen


class _Without(fx.Interpreter):
    """Runs a network as if some blocks were gone."""

    def __init__(self, module: fx.GraphModule, blocks: Iterable[_Block]) -> None:
        super().__init__(module)
        self._gone = {block.exit: block.entry for block in blocks}
        self._skipped = {n for block in blocks for n in block.inside}

    def run_node(self, n: fx.Node) -> Any:
        if n in self._gone:
            return self.env[self._gone[n]]
        return None if n in self._skipped else super().run_node(n)


@torch.no_grad()
def _least(module: fx.GraphModule, found: list[_Block], count: int, network: Network, context: Context) -> list[_Block]:
    """The block that changes least without it, then the next without both, …"""
    examples = list(batches(context.calibrate, fixed_batch=network.fixed_batch))
    whole = [_doubles(outputs_of(module, example)) for example in examples]
    if not all(y.isfinite().all() for outputs in whole for y in outputs):
        raise Unsupported("PruneBlocks needs finite outputs on the calibrate view to compare with, these are not")
    gone: list[_Block] = []
    while len(gone) < count:
        left = [block for block in found if block not in gone]
        changes = [_change(whole, _Without(module, [*gone, block]), examples) for block in left]
        gone.append(left[changes.index(min(changes))])
        context.progress(len(gone) / count, f"{len(gone)} of {count} blocks")
    return gone


def _change(whole: list[list[Tensor]], without: _Without, examples: list[tuple[Tensor, ...]]) -> float:
    """Σ ‖y − y'‖² / Σ ‖y‖², the mean over all outputs; infinite where y' is not finite."""
    parts = list[Tensor]()
    for wanted, example in zip(whole, examples, strict=True):
        given = _doubles(outputs_of(without.run, example))  # type: ignore[arg-type]
        parts.append(torch.tensor([[(a - b).square().sum(), a.square().sum()] for a, b in zip(wanted, given, strict=True)]))
    change, size = torch.stack(parts).sum(0).unbind(1)
    found = float((change / size.clamp_min(_FEWEST)).mean())
    return found if math.isfinite(found) else math.inf


def _doubles(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [y.double() for y in outputs]
