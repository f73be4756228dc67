"""AOTInductor: the network compiled ahead of time into one package of machine code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Profile, Space
from hasten.engines import settings
from hasten.engines.eager import fill, to_format
from hasten.engines.settings import Precision

_LOAD = """\
import torch
from torch.utils._pytree import tree_leaves

def load(folder):
    torch.set_num_threads({threads})
    network = torch._inductor.aoti_load_package(f"{{folder}}/model.pt2")
    @torch.inference_mode()
    def run(*inputs):
        return tuple({output} for o in tree_leaves(network(*({input} for x in inputs))))
    return run
"""


@dataclass(frozen=True, kw_only=True)
class AotInductor:
    """Compiles the module to a `.pt2` package of machine code, weights frozen into it; loading compiles nothing.

    The package runs on processors with the instructions of this one.

    Args:
        threads: of one kernel, compiled in; 0 for all cores.
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
        """None if it runs here, else why not: inductor needs a C++ compiler to pack, not to run."""
        return settings.no_compiler("AOTInductor") or settings.missing("torch", self.precision)

    def space(self) -> Space:
        """Threads and float formats worth a try on this machine."""
        return {"threads": settings.thread_choices(), "precision": settings.precision_choices()}

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.pt2` and `load.py`. Raises Unsupported where torch cannot export or compile the module."""
        from torch._inductor import aoti_compile_and_package

        from hasten.load.lower import quiet, reason
        from hasten.load.program import export_program

        program = export_program(network.with_body(to_format(network.module, self.precision)))
        wanted = {"freezing": True, "cpp.threads": settings.resolve(self.threads)}
        try:
            with quiet():
                aoti_compile_and_package(program, package_path=str(folder / "model.pt2"), inductor_configs=wanted)
        except Exception as why:  # the compiler raises whatever its parts raise
            raise Unsupported(f"AOTInductor cannot compile this network: {reason(why)}") from why
        (folder / "load.py").write_text(fill(_LOAD, self.threads, self.precision))
