"""A `.pt2` program in plain PyTorch: the file to go on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from hasten.core.network import Network
from hasten.core.recipe import Aim
from hasten.engines import settings
from hasten.engines.modules import ModuleEngine

_LOAD = """\
import {imports}
from torch.utils._pytree import tree_leaves

def load(folder):
    torch.set_num_threads({threads})
    network = torch.export.load(f"{{folder}}/model.pt2").module()
{weights}    @torch.inference_mode()
    def run(*inputs):
        return tuple(o.numpy() for o in tree_leaves(network(*map(torch.from_numpy, inputs))) if isinstance(o, torch.Tensor))
    return run
"""
_READ = '    network.load_state_dict(safetensors.torch.load_file(f"{folder}/model.safetensors"))\n'


@dataclass(frozen=True, kw_only=True)
class Program(ModuleEngine):
    """Runs the module as an exported program, operator by operator; no kernel is fused.

    Args:
        threads: of one operator; 0 for all cores.
        weights: "inside" the program, or "safetensors": also in `model.safetensors`, under the names of the module, which are then
            the ones that run. Tensors that share memory are written one by one.
    """

    aims: ClassVar[frozenset[Aim]] = frozenset()
    weights: Literal["inside", "safetensors"] = "inside"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in ("inside", "safetensors"):
            raise ValueError(f"weights must be 'inside' or 'safetensors', got {self.weights!r}")

    def available(self) -> str | None:
        """None if it runs here, else why not."""
        return settings.missing("torch") or (settings.missing("safetensors") if self.weights == "safetensors" else None)

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.pt2`, `model.safetensors` if asked, and `load.py`. Raises Unsupported where torch.export cannot follow."""
        import torch

        from hasten.load.program import export_program

        program = export_program(network)
        torch.export.save(program, folder / "model.pt2")
        apart = self.weights == "safetensors"
        if apart:
            from safetensors.torch import save_file

            save_file({name: w.detach().clone().contiguous() for name, w in program.state_dict.items()}, folder / "model.safetensors")
        imports, weights = ("safetensors.torch, torch", _READ) if apart else ("torch", "")
        (folder / "load.py").write_text(_LOAD.format(imports=imports, threads=settings.resolve(self.threads), weights=weights))
