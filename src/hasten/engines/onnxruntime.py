"""ONNX Runtime on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Profile, Space
from hasten.engines import settings
from hasten.measure import machine

_LOAD = """\
import {imports}

def load(folder):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = {threads}, 3
    session = onnxruntime.InferenceSession({model}, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda *inputs: tuple(session.run(None, dict(zip(names, inputs))))
"""
_PLAIN = ("onnxruntime", 'f"{folder}/model.onnx"')
_PACKED = ("lzma, onnxruntime, pathlib", 'lzma.decompress(pathlib.Path(folder, "model.onnx.xz").read_bytes())')


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """Runs the ONNX graph in ONNX Runtime's CPU provider, with its own graph optimizations.

    It computes in the graph's number format: it has no bfloat16 kernels for x86.

    Args:
        threads: of one operator; 0 for all cores.
        packed: the file is compressed with LZMA and unpacked in memory when it is loaded. Zeros and repeated weights take little
            room then; weights of their own hardly shrink, and loading takes longer. The answers are the same.
    """

    takes: ClassVar[Kind] = "graph"
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    threads: int = 0
    packed: bool = False

    def __post_init__(self) -> None:
        settings.check(self.threads)

    @property
    def lossless(self) -> bool:
        """Always: the graph says the number format."""
        return True

    @property
    def profile(self) -> Profile:
        """Where Q/DQ pairs become integer kernels (QLinearConv, QGemm, …)."""
        return Profile(
            integer_ops=settings.INTEGER_OPS | {"Concat"},
            passing_ops=settings.PASSING_OPS,
            weight_bits=8 if machine.has_int8_dot() else 7,
            dynamic_ops=frozenset({"Gemm", "MatMul", "LSTM"}),
            block_ops=frozenset({"Gemm", "MatMul"}),
        )

    def available(self) -> str | None:
        """None if it runs here, else why not."""
        return settings.missing("onnxruntime")

    def space(self) -> Space:
        """Threads worth a try on this machine."""
        return {"threads": settings.thread_choices()}

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.onnx`, or `model.onnx.xz`, and `load.py`."""
        import onnx

        onnx.save(network.graph, folder / "model.onnx")
        if self.packed:
            settings.compress(folder / "model.onnx")
        imports, model = _PACKED if self.packed else _PLAIN
        (folder / "load.py").write_text(_LOAD.format(threads=settings.resolve(self.threads), imports=imports, model=model))
