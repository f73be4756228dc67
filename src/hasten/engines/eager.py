"""PyTorch as it is: the baseline is an engine like any other."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Profile, Space
from hasten.engines import settings
from hasten.engines.settings import Precision

if TYPE_CHECKING:
    from torch import nn

_LOAD = """\
import pickle, torch
from torch.utils._pytree import tree_leaves

def load(folder):
    torch.set_num_threads({threads})
    network = pickle.load(open(f"{{folder}}/network.pkl", "rb"))
    @torch.inference_mode()
    def run(*inputs):
        return tuple({output} for o in tree_leaves(network(*({input} for x in inputs))))
    return run
"""


@dataclass(frozen=True, kw_only=True)
class Eager:
    """Runs the module in PyTorch, operator by operator.

    Packs the module itself (a pickle of the user's own object, so the user's class must be importable where it is read).

    Args:
        threads: of one operator; 0 for all cores.
        precision: "bf16" turns weights, inputs and sums into bfloat16.
    """

    takes: ClassVar[Kind] = "module"
    aims: ClassVar[frozenset[Aim]] = frozenset()
    threads: int = 0
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        settings.check(self.threads, self.precision)

    @property
    def lossless(self) -> bool:
        """Whether it computes in the number format of the network."""
        return self.precision == "fp32"

    @property
    def profile(self) -> Profile:
        """Eager PyTorch runs no operator on integers."""
        return Profile()

    def available(self) -> str | None:
        """None if it runs here, else why not."""
        return settings.missing("torch", self.precision)

    def space(self) -> Space:
        """Threads and float formats worth a try on this machine."""
        return {"threads": settings.thread_choices(), "precision": settings.precision_choices()}

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `network.pkl` and `load.py`."""
        import cloudpickle

        body = to_format(network.module, self.precision)
        (folder / "network.pkl").write_bytes(cloudpickle.dumps(body))
        (folder / "load.py").write_text(fill(_LOAD, self.threads, self.precision))


def to_format(module: nn.Module, precision: Precision) -> nn.Module:
    """The module, or a copy of it in bfloat16."""
    return copy.deepcopy(module).bfloat16() if precision == "bf16" else module


def fill(template: str, threads: int, precision: Precision) -> str:
    """The text of a `load.py` for PyTorch: how an input goes in and an output comes out depends on the float format."""
    cast = ".bfloat16() if x.dtype.kind == 'f' else torch.from_numpy(x)" if precision == "bf16" else ""
    output = "(o.float() if o.is_floating_point() else o).numpy()" if precision == "bf16" else "o.numpy()"
    return template.format(threads=settings.resolve(threads), input=f"torch.from_numpy(x){cast}", output=output)
