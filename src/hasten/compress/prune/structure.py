"""What of a network can go, and taking it out: families of units, the smaller network, and the check that it is the same one.

The check is the definition: the network without some units must give what the whole network gives with every weight of these
units zero. A family that fails it, for whatever reason, is refused; none is ever taken out on trust.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as tree

from hasten.compress import calls
from hasten.compress import layers as lifting
from hasten.compress.fold.constant import multiplies, with_made_weights
from hasten.compress.prune import rewrite
from hasten.compress.prune.operators import sums_over
from hasten.compress.prune.trace import Place, Trace
from hasten.compress.prune.units import Ids
from hasten.core.errors import Unsupported
from hasten.core.names import check_met, meets
from hasten.core.network import Arrays, Network
from hasten.load.lower import forward, relative_difference

EXACT = 1e-4  # of the largest output: float32 sums in another order
SINGLE = "it is a single unit"


@dataclass(frozen=True, eq=False)
class Family:
    """Units that stand side by side in the same layers, of which any may go but the last: the channels of a stage, the heads
    of a layer.

    Args:
        name: of the first layer that makes them.
        layers: names of all layers that make them.
        units: roots, in the order of the first layer.
        width: positions of one unit along the first layer's outputs.
    """

    name: str
    layers: tuple[str, ...]
    units: Ids
    width: int

    def __len__(self) -> int:
        return len(self.units)


@dataclass(eq=False)
class Structure:
    """A lifted network with all that may be taken out of it.

    Args:
        module: in lifted form, stacked recurrent layers one by one.
        trace: how its axes hang together.
        network: the network that it comes from; its example is what everything is checked on.
        families: what may shrink.
        refused: layers whose outputs stay, with the reason.
    """

    module: fx.GraphModule
    trace: Trace
    network: Network
    families: tuple[Family, ...]
    refused: dict[str, str] = field(default_factory=dict)

    def without(self, gone: Ids) -> fx.GraphModule:
        """The network without these units, smaller in every tensor that held them."""
        return rewrite.without(self.module, self.trace, gone)

    def silenced(self, gone: Ids) -> fx.GraphModule:
        """The network with every weight of these units zero."""
        module = copy.deepcopy(self.module)
        tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
        with torch.no_grad():
            for place, ids in self.trace.axes():
                away = np.flatnonzero(np.isin(self.trace.units.find(ids), gone))
                tensors[place.path].index_fill_(place.axis, torch.from_numpy(away), 0)
        return module

    def exact(self, gone: Ids) -> str | None:
        """None where `without` gives what `silenced` gives, else what is wrong."""
        try:
            silent = _Sums(self.silenced(gone), self.trace, gone)
            expected = silent.outputs(self.network.example)
            given = _run(self.without(gone), self.network.example)
        except Exception as why:  # a shape that does not fit any more shows as any error
            return f"it does not run without them: {str(why).splitlines()[0][:120] if str(why) else type(why).__name__}"
        if [a.shape for a in expected] != [a.shape for a in given]:
            return "its outputs change their shapes without them"
        apart = [relative_difference(a, b) for a, b in zip(expected, given, strict=True)]
        worst = next((d for d in apart if not d <= EXACT), None)  # NaN too
        if worst is not None:
            return f"its outputs differ by {worst:.2g} of the largest without them"
        return silent.found

    def positions(self, place: Place) -> Ids:
        """The root of each position along an axis of a stored tensor."""
        ids = self.trace.stored[place.path].plain[place.axis]
        assert ids is not None
        return self.trace.units.find(ids)

    def makers(self, family: Family) -> list[Place]:
        """The output axes that hold the family."""
        inside = set(family.units.tolist())
        return [p for p in _writers(self.trace) if inside & set(self.positions(p).tolist())]


class _Sums(fx.Interpreter):
    """Runs the silenced network and notes a sum or mean over units that are not zero there: only zeros may be missing in it.

    On the example they may come to nearly nothing, as the mean of what was centred does, and to more on other data.
    """

    found: str | None = None

    def __init__(self, silent: fx.GraphModule, trace: Trace, gone: Ids) -> None:
        super().__init__(silent)
        self._trace, self._gone = trace, gone
        self._known = {node.name: node for node in trace.module.graph.nodes}

    def outputs(self, example: Arrays) -> Arrays:
        """What the network gives, flat."""
        with torch.no_grad():
            given = self.run(*calls.inputs(self.module, example))
        return tuple(t.numpy() for t in tree.tree_leaves(given) if isinstance(t, torch.Tensor))

    def run_node(self, n: fx.Node) -> object:
        node = self._known[n.name]
        over = sums_over(self._trace, node)
        x = self.fetch_args_kwargs_from_env(n)[0][0] if over else None
        for axis in over:
            ids = self._trace.of(node.args[0]).plain[axis]
            away = np.flatnonzero(np.isin(self._trace.units.find(ids), self._gone)) if ids is not None else ()
            if len(away) and bool(x.index_select(axis, torch.from_numpy(away)).any()):  # type: ignore[union-attr]
                self.found = f"{self._trace.name(node)} runs over what is not zero without them"
        return super().run_node(n)


def analyse(network: Network) -> Structure:
    """Finds what may be taken out of a module and checks every family by itself.

    Where more can go once weights that are computed from others (as by weight standardization) are made once and for all, they are.

    Raises:
        Unsupported: where torch.export cannot follow the module.
    """
    found = _analysed(network)
    other = with_made_weights(network) if any(map(multiplies, found.module.graph.nodes)) else None
    made = found if other is None else _analysed(other)
    return made if len(made.families) > len(found.families) else found


def _analysed(network: Network) -> Structure:
    module = rewrite.unstack(rewrite.flatten(lifting.lifted(network)))
    trace = Trace(module, network.example)
    structure = Structure(module, trace, network, ())
    families, refused = _families(trace)
    several = [f for f in families if len(f) > 1]
    refused |= {name: SINGLE for f in families if len(f) == 1 for name in f.layers}
    if several and structure.exact(np.concatenate([f.units[1::2] for f in several])) is not None:
        reasons = {f: structure.exact(f.units[1::2]) for f in several}
        refused |= {name: why for f, why in reasons.items() if why for name in f.layers}
        several = [f for f, why in reasons.items() if why is None]
    structure.families, structure.refused = tuple(several), refused
    return structure


def _writers(trace: Trace) -> list[Place]:
    return [p for p in trace.writers if trace.stored[p.path].plain[p.axis] is not None]


def _families(trace: Trace) -> tuple[list[Family], dict[str, str]]:
    together: dict[int, int] = {}  # unit → the first unit of its family, by way of others

    def top(unit: int) -> int:
        while together.setdefault(unit, unit) != unit:
            unit = together[unit]
        return unit

    refused: dict[str, str] = {}
    free: dict[Place, list[int]] = {}
    for place in _writers(trace):
        roots = trace.units.find(trace.stored[place.path].plain[place.axis])  # type: ignore[arg-type]
        free[place] = [u for u in dict.fromkeys(roots.tolist()) if trace.units.why_fixed(u) is None]
        if not free[place]:
            refused[_layer(place)] = trace.units.why_fixed(int(roots[0])) or ""
        for one, other in zip(free[place], free[place][1:], strict=False):
            together[top(other)] = top(one)
    found: dict[int, list[Place]] = {}
    for place, units in free.items():
        if units:
            found.setdefault(top(units[0]), []).append(place)
    return [family for places in found.values() for family in _parted(trace, places, free)], refused


def _parted(trace: Trace, places: Sequence[Place], free: dict[Place, list[int]]) -> list[Family]:
    """The family that some output axes make; several where pieces of it go ways of their own."""
    parts = [list(dict.fromkeys(u for place in places for u in free[place]))]
    for piece in trace.pieces:
        inside = set(trace.units.find(piece).tolist())
        halves = [half for part in parts for half in ([u for u in part if u in inside], [u for u in part if u not in inside])]
        parts = [half for half in halves if half]
    made = []
    for units in parts:
        own = [p for p in places if set(free[p]) & set(units)]
        roots = trace.units.find(trace.stored[own[0].path].plain[own[0].axis])  # type: ignore[arg-type]
        names = tuple(dict.fromkeys(_layer(p) for p in own))
        made.append(Family(names[0], names, np.array(units), int((roots == units[0]).sum())))
    return made


def _layer(place: Place) -> str:
    return place.path.rpartition(".")[0] or place.path


def chosen(structure: Structure, *, only: Sequence[str], keep: Sequence[str]) -> list[Family]:
    """The families that hold a layer named by `only` (all where it is empty) and none named by `keep`.

    Raises:
        UsageError: where a pattern meets no layer.
        Unsupported: where a layer named in full cannot shrink, or nothing is left.
    """
    check_met((*only, *keep), [*(n for n, _ in structure.module.named_modules() if n), *(n for f in structure.families for n in f.layers)])
    for name in only:
        if name in structure.refused:
            raise Unsupported(f"{name} cannot shrink: {structure.refused[name]}")
    meant = [f for f in structure.families if not only or any(meets(name, only) for name in f.layers)]
    found = [f for f in meant if not any(meets(name, keep) for name in f.layers)]
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(structure.refused.items())[:3])
        raise Unsupported(f"nothing in this network can shrink ({reasons or 'it has no layers with weights'})")
    return found


def _run(module: nn.Module, example: Arrays) -> Arrays:
    return forward(Network(kind="module", body=module, example=example), example)
