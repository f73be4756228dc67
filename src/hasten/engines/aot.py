"""AOTInductor: the network compiled ahead of time into one package of machine code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.engines import settings
from hasten.engines.modules import FloatEngine

_LOAD = """\
import torch
from torch.utils._pytree import tree_leaves

def load(folder):
    torch.set_num_threads({threads})
    network = torch._inductor.aoti_load_package(f"{{folder}}/model.pt2")
    @torch.inference_mode()
    def run(*inputs):
        return tuple({output} for o in tree_leaves(network(*({input} for x in inputs))) if isinstance(o, torch.Tensor))
    return run
"""


@dataclass(frozen=True, kw_only=True)
class AotInductor(FloatEngine):
    """Compiles the module to a `.pt2` package of machine code, weights frozen into it; loading compiles nothing.

    The package runs on processors with the instructions of this one.

    Args:
        threads: of one kernel, compiled in; 0 for all cores.
        precision: "bf16" turns weights, inputs and sums into bfloat16.
    """

    def available(self) -> str | None:
        """None if it runs here, else why not: inductor needs a C++ compiler to pack, not to run."""
        return settings.no_compiler("AOTInductor") or super().available()

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.pt2` and `load.py`. Raises Unsupported where torch cannot export or compile the module."""
        from torch._inductor import aoti_compile_and_package

        from hasten.load.lower import quiet, reason
        from hasten.load.program import export_program

        program = export_program(network.with_body(self.in_format(network.module)))
        wanted = {"freezing": True, "cpp.threads": settings.resolve(self.threads)}
        try:
            with quiet():
                aoti_compile_and_package(program, package_path=str(folder / "model.pt2"), inductor_configs=wanted)
        except Exception as why:  # the compiler raises whatever its parts raise
            raise Unsupported(f"AOTInductor cannot compile this network: {reason(why)}") from why
        (folder / "load.py").write_text(self.filled(_LOAD))
