"""LiteRT, the runtime of `.tflite` files: phones, and the parts that take nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.engines import settings
from hasten.engines.modules import ModuleEngine

if TYPE_CHECKING:
    from torch import nn

_LOAD = """\
import numpy
from ai_edge_litert.interpreter import Interpreter

def whole(x, told):
    step, zero = told["quantization"]
    return (numpy.clip(numpy.rint(x / step) + zero, -128, 127) if step and x.dtype.kind == "f" else x).astype(told["dtype"])

def real(y, told):
    step, zero = told["quantization"]
    return ((y.astype("float32") - zero) * step).astype("float32") if step else y

def load(folder):
    model = Interpreter(f"{{folder}}/model.tflite", num_threads={threads}).get_signature_runner()
    number = lambda name: int(name.rpartition("_")[2])
    inputs, outputs = model.get_input_details(), model.get_output_details()
    names, results = sorted(inputs, key=number), sorted(outputs, key=number)
    def run(rows):
        given = model(**{{name: whole(x, inputs[name]) for name, x in zip(names, rows)}})
        return [real(given[name], outputs[name]) for name in results]
    cut = lambda inputs: [[x[i:i + {rows}] for x in inputs] for i in range(0, len(inputs[0]), {rows})]
    return lambda *inputs: tuple(map(numpy.concatenate, zip(*map(run, cut(inputs)))))
"""
_MISSING = "{} is not installed; run: pip install 'hasten[litert]'"


@dataclass(frozen=True, kw_only=True)
class LiteRT(ModuleEngine):
    """Converts the module to `.tflite` and runs it in LiteRT with its XNNPACK kernels.

    A `.tflite` file has fixed sizes: it is made for one row, and a batch runs row by row; a network that is fixed to a batch size is
    made for that one. The pairs of a Q/DQ graph become integers of the file. Converting needs `litert-torch`, running
    `ai-edge-litert`.

    Args:
        threads: of one operator; 0 for all cores.
    """

    def available(self) -> str | None:
        """None if it converts and runs here, else why not."""
        return next((_MISSING.format(p) for p in ("ai_edge_litert", "litert_torch") if settings.missing(p)), None)

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.tflite` and `load.py`. Raises Unsupported where the converter has no such operator."""
        import numpy as np
        import torch

        from hasten.load.lower import quiet, reason

        rows = network.fixed_batch or 1
        example = tuple(torch.from_numpy(np.ascontiguousarray(a[:rows])) for a in network.example)
        try:
            with quiet():
                import litert_torch

                module, how = _prepared(network, rows)
                litert_torch.convert(module, example, quant_config=how).export(str(folder / "model.tflite"))
        except Exception as why:  # the converter raises whatever its parts raise
            raise Unsupported(f"litert-torch cannot convert this network: {reason(why)}") from why
        (folder / "load.py").write_text(_LOAD.format(threads=settings.resolve(self.threads), rows=rows))


def _prepared(network: Network, rows: int) -> tuple[nn.Module, Any]:
    """The module, and how integers in it are to be taken; None where there are none."""
    from hasten.load.importer.integers import has_integers, with_integers

    graph = network.graph if network.kind == "graph" else network.source
    if graph is not None and has_integers(graph):
        from litert_torch.quantize import pt2e_quantizer, quant_config

        told = pt2e_quantizer.PT2EQuantizer().set_global(pt2e_quantizer.get_symmetric_quantization_config(is_dynamic=False))
        return with_integers(graph, tuple(a[:rows] for a in network.example)), quant_config.QuantConfig(pt2e_quantizer=told)
    return network.module, None
