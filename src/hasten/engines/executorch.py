"""ExecuTorch, PyTorch's runtime for devices, with its XNNPACK kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.engines import settings
from hasten.engines.modules import ModuleEngine

_LOAD = """\
import numpy, torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime

def load(folder):
    portable_lib._unsafe_reset_threadpool({threads})
    method = Runtime.get().load_program(f"{{folder}}/model.pte").load_method("forward")
    run = lambda rows: [o.numpy().copy() for o in method.execute([torch.from_numpy(x) for x in rows])]
    cut = lambda inputs: [[x[i:i + {rows}] for x in inputs] for i in range(0, len(inputs[0]), {rows})]
    return lambda *inputs: tuple(map(numpy.concatenate, zip(*map(run, cut(inputs)))))
"""


@dataclass(frozen=True, kw_only=True)
class ExecuTorch(ModuleEngine):
    """Compiles the module to `.pte` and runs it in ExecuTorch, on XNNPACK's kernels where they reach.

    It is made for one row, and a batch runs row by row; a network that is fixed to a batch size is made for that one.

    Args:
        threads: of one operator; 0 for all cores.
    """

    def available(self) -> str | None:
        """None if it runs here, else why not."""
        return "executorch is not installed; run: pip install 'hasten[executorch]'" if settings.missing("executorch") else None

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.pte` and `load.py`. Raises Unsupported where torch cannot export it, or ExecuTorch has no such operator."""
        from dataclasses import replace

        from hasten.load.lower import quiet, reason
        from hasten.load.program import export_program

        rows = network.fixed_batch or 1
        program = export_program(replace(network, example=tuple(a[:rows] for a in network.example), fixed_batch=rows))
        try:
            with quiet():
                from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
                from executorch.exir import to_edge_transform_and_lower

                made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        except Exception as why:  # the compiler raises whatever its parts raise
            raise Unsupported(f"ExecuTorch cannot compile this network: {reason(why)}") from why
        (folder / "model.pte").write_bytes(made.buffer)
        (folder / "load.py").write_text(_LOAD.format(threads=settings.resolve(self.threads), rows=rows))
