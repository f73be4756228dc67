"""torch.compile with its weights frozen into the generated code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hasten.core.network import Network
from hasten.engines import settings
from hasten.engines.modules import FloatEngine

# `options={"freezing": True}` does not freeze in torch 2.13; the flag must be set before the first call.
_LOAD = """\
import torch, torch._inductor.config
from torch.utils._pytree import tree_leaves

def load(folder):
    torch.set_num_threads({threads}); torch._inductor.config.freezing = True
    network = torch.compile(torch.export.load(f"{{folder}}/model.pt2").module())
    @torch.inference_mode()
    def run(*inputs):
        return tuple({output} for o in tree_leaves(network(*({input} for x in inputs))) if isinstance(o, torch.Tensor))
    return run
"""


@dataclass(frozen=True, kw_only=True)
class TorchCompile(FloatEngine):
    """Runs the module through torch.compile (inductor), frozen: weights become constants and are packed for the kernels.

    The first call of a process at a batch size compiles for seconds.

    Args:
        threads: of one kernel; 0 for all cores.
        precision: "bf16" turns weights, inputs and sums into bfloat16.
    """

    def available(self) -> str | None:
        """None if it runs here, else why not: inductor needs a C++ compiler."""
        return settings.no_compiler("torch.compile") or super().available()

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.pt2` and `load.py`. Raises Unsupported where torch.export cannot follow the module."""
        import torch

        from hasten.load.program import export_program

        program = export_program(network.with_body(self.in_format(network.module)))
        torch.export.save(program, folder / "model.pt2")
        (folder / "load.py").write_text(self.filled(_LOAD))
