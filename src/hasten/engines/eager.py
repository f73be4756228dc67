"""PyTorch as it is: the baseline is an engine like any other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hasten.core.network import Network
from hasten.core.recipe import Aim
from hasten.engines.modules import FloatEngine

if TYPE_CHECKING:
    pass

_LOAD = """\
import pickle, torch
from torch.utils._pytree import tree_leaves

def load(folder):
    torch.set_num_threads({threads})
    network = pickle.load(open(f"{{folder}}/network.pkl", "rb"))
    @torch.inference_mode()
    def run(*inputs):
        return tuple({output} for o in tree_leaves(network(*({input} for x in inputs))) if isinstance(o, torch.Tensor))
    return run
"""


@dataclass(frozen=True, kw_only=True)
class Eager(FloatEngine):
    """Runs the module in PyTorch, operator by operator.

    Packs the module itself (a pickle of the user's own object, so the user's class must be importable where it is read).

    Args:
        threads: of one operator; 0 for all cores.
        precision: "bf16" turns weights, inputs and sums into bfloat16.
    """

    aims: ClassVar[frozenset[Aim]] = frozenset()

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `network.pkl` and `load.py`."""
        import cloudpickle

        body = self.in_format(network.module)
        (folder / "network.pkl").write_bytes(cloudpickle.dumps(body))
        (folder / "load.py").write_text(self.filled(_LOAD))
