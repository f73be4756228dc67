"""torch.compile with its weights frozen into the generated code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Profile, Space
from hasten.engines import settings
from hasten.engines.eager import fill, to_format
from hasten.engines.settings import Precision

# `options={"freezing": True}` does not freeze in torch 2.13; the flag must be set before the first call.
_LOAD = """\
import torch, torch._inductor.config
from torch.utils._pytree import tree_leaves

def load(folder):
    torch.set_num_threads({threads}); torch._inductor.config.freezing = True
    network = torch.compile(torch.export.load(f"{{folder}}/model.pt2").module())
    @torch.inference_mode()
    def run(*inputs):
        return tuple({output} for o in tree_leaves(network(*({input} for x in inputs))))
    return run
"""


@dataclass(frozen=True, kw_only=True)
class TorchCompile:
    """Runs the module through torch.compile (inductor), frozen: weights become constants and are packed for the kernels.

    The first call of a process at a batch size compiles for seconds.

    Args:
        threads: of one kernel; 0 for all cores.
        precision: "bf16" turns weights, inputs and sums into bfloat16.
    """

    takes: ClassVar[Kind] = "module"
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
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
        """It takes modules; Q/DQ graphs do not reach it."""
        return Profile()

    def available(self) -> str | None:
        """None if it runs here, else why not: inductor needs a C++ compiler."""
        return settings.no_compiler("torch.compile") or settings.missing("torch", self.precision)

    def space(self) -> Space:
        """Threads and float formats worth a try on this machine."""
        return {"threads": settings.thread_choices(), "precision": settings.precision_choices()}

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.pt2` and `load.py`. Raises Unsupported where torch.export cannot follow the module."""
        import torch

        from hasten.load.program import export_program

        program = export_program(network.with_body(to_format(network.module, self.precision)))
        torch.export.save(program, folder / "model.pt2")
        (folder / "load.py").write_text(fill(_LOAD, self.threads, self.precision))
