"""What every step on a module starts from: an own copy to work on, its layers by name, and its lifted form.

The lifted form is an `fx.GraphModule` whose layers are ordinary modules under the user's names and whose other calls are aten
operators (see `load.lift`); a step that must know how layers hang together works on that.
"""

from __future__ import annotations

import copy
import weakref
import zlib
from collections.abc import Sequence

import torch
from torch import fx, nn

from hasten.core.names import check_met, meets
from hasten.core.names import nearest as nearest
from hasten.core.names import patterns as patterns
from hasten.core.network import Network
from hasten.load.lift import lift
from hasten.load.lower import quiet
from hasten.load.plain import with_plain_weights
from hasten.load.program import export_program


def own_copy(network: Network) -> nn.Module:
    """A deep copy of the module, in eval mode, for a step to write on."""
    return copy.deepcopy(network.module).eval()


# An export takes seconds, and a search asks for that of the original again and again. With a digest of the weights that it was made of.
_LIFTED: weakref.WeakKeyDictionary[Network, tuple[int, fx.GraphModule]] = weakref.WeakKeyDictionary()


def lifted(network: Network) -> fx.GraphModule:
    """The module of `network` in its lifted form, in eval mode: an own copy, exported first where it has not that form already.

    Weights that are computed from others (weight norm, spectral norm, `torch.nn.utils.parametrize`) are what they come to.

    Raises:
        Unsupported: naming why torch.export cannot follow the module.
    """
    if is_lifted(network.module):
        made = copy.deepcopy(network.module)
        assert isinstance(made, fx.GraphModule)
        return made.eval()
    weights = _digest(network.module)
    known = _LIFTED.get(network)
    if known is None or known[0] != weights:
        with quiet():
            known = _LIFTED[network] = weights, _as_frozen(network.module, lift(export_program(with_plain_weights(network)[0])))
    return copy.deepcopy(known[1])


def _as_frozen(module: nn.Module, made: fx.GraphModule) -> fx.GraphModule:
    """What does not train stays so, but where nothing does: that is a network made ready to be used."""
    learns = {name: p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)}
    if any(learns.values()):
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and learns.get(name, True))
    return made


def _digest(module: nn.Module) -> int:
    """Of all its numbers, so that a network whose weights were written on after all is exported again."""
    found = 0
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        name = f"{name}{value.requires_grad}"
        plain = value.detach().to_dense() if value.is_sparse else value.detach()
        found = zlib.crc32(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), found))
    return found


def is_lifted(module: nn.Module) -> bool:
    """Whether every call in the module is a layer, an aten operator or plain Python on sizes."""
    if not isinstance(module, fx.GraphModule):
        return False
    return all(
        n.op != "call_method" and (n.op != "call_function" or isinstance(n.target, torch._ops.OpOverload) or _on_sizes(n))
        for n in module.graph.nodes
    )


def _on_sizes(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")


def named(
    module: nn.Module, kinds: tuple[type[nn.Module], ...], *, only: Sequence[str] = (), keep: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The layers of exactly these kinds by name, each object once.

    Args:
        only: patterns of names ("features.*") to take; all where it is empty.
        keep: patterns of names to leave out.

    Raises:
        UsageError: where a pattern meets no layer; it names the nearest.
    """
    known = {name: layer for name, layer in module.named_modules() if type(layer) in kinds}
    check_met((*only, *keep), [name for name, _ in module.named_modules() if name])
    wanted = {name for name in known if not only or meets(name, only)}
    return {name: layer for name, layer in known.items() if name in wanted and not meets(name, keep)}
