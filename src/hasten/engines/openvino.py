"""OpenVINO on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Profile, Space
from hasten.engines import settings
from hasten.engines.settings import Precision
from hasten.measure import machine

# The precision hint is always said: where the CPU has bfloat16, OpenVINO would take it unasked.
_DYNAMIC = """\
import {imports}

def load(folder):{unpack}
    settings = {{"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": {threads}, "INFERENCE_PRECISION_HINT": "{hint}"}}
    model = openvino.Core().compile_model({model}, "CPU", settings)
    return lambda *inputs: tuple(model(inputs).values())
"""
_STATIC = """\
import functools, {imports}

def load(folder):{unpack}
    settings = {{"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": {threads}, "INFERENCE_PRECISION_HINT": "{hint}"}}
    @functools.lru_cache(8)  # one compiled network per batch size
    def compiled(*shapes):
        (model := openvino.Core().read_model({files})).reshape(dict(enumerate(map(list, shapes))))
        return openvino.Core().compile_model(model, "CPU", settings)
    return lambda *inputs: tuple(compiled(*(x.shape for x in inputs))(inputs).values())
"""
_PLAIN = {"imports": "openvino", "unpack": "", "files": 'f"{folder}/model.xml"'}
_PACKED = {
    "imports": "lzma, openvino, pathlib",
    "unpack": '\n    files = [lzma.decompress(pathlib.Path(folder, f"model.{end}.xz").read_bytes()) for end in ("xml", "bin")]',
    "files": "*files",
}


@dataclass(frozen=True, kw_only=True)
class OpenVINO:
    """Runs the graph in OpenVINO's CPU plugin.

    Args:
        threads: in all; 0 for all cores.
        precision: "bf16" lets it compute in bfloat16.
        shapes: "static" compiles once for every batch size that it meets, "dynamic" once for all.
        packed: the files are compressed with LZMA and unpacked in memory when they are loaded, and weights that the graph
            computes from constants stay computed in the file, so that codebooks stay small (`PackCodebooks`). Zeros and repeated
            weights take little room then; weights of their own hardly shrink, and loading takes longer. The answers are the same.
    """

    takes: ClassVar[Kind] = "graph"
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    threads: int = 0
    precision: Precision = "fp32"
    shapes: Literal["dynamic", "static"] = "dynamic"
    packed: bool = False

    def __post_init__(self) -> None:
        settings.check(self.threads, self.precision)
        if self.shapes not in ("dynamic", "static"):
            raise ValueError(f"shapes must be 'dynamic' or 'static', got {self.shapes!r}")

    @property
    def lossless(self) -> bool:
        """Whether it computes in the number format of the network."""
        return self.precision == "fp32"

    @property
    def profile(self) -> Profile:
        """Where Q/DQ pairs become integer kernels."""
        return Profile(
            integer_ops=settings.INTEGER_OPS | {"ConvTranspose"},
            passing_ops=settings.PASSING_OPS | {"Concat"},
            weight_bits=8 if machine.has_int8_dot() else 7,
            symmetric_activations=True,
            block_ops=frozenset({"Gemm", "MatMul"}),
        )

    def available(self) -> str | None:
        """None if it runs here, else why not."""
        return settings.missing("openvino", self.precision)

    def space(self) -> Space:
        """Threads, float formats and shapes worth a try on this machine."""
        return {
            "shapes": ("dynamic", "static"),
            "threads": settings.thread_choices(),
            "precision": settings.precision_choices(),
        }

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.xml`, `model.bin` (each with `.xz` behind it if packed) and `load.py`.

        Raises:
            Unsupported: where OpenVINO has no such operator.
        """
        import onnx
        import openvino

        source = folder / "model.onnx"
        onnx.save(network.graph, source)
        try:
            # Converting would compute what is constant and widen what is stored in 16 bits; reading leaves it for the loading.
            model = openvino.Core().read_model(source)
        except Exception as why:
            raise Unsupported(f"OpenVINO cannot read this graph: {str(why).splitlines()[-1][:200]}") from why
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
        source.unlink()
        if self.packed:
            settings.compress(folder / "model.xml", folder / "model.bin")
        (folder / "load.py").write_text(self._loader())

    def _loader(self) -> str:
        parts = _PACKED if self.packed else _PLAIN
        hint = "bf16" if self.precision == "bf16" else "f32"
        if self.shapes == "static":
            return _STATIC.format(threads=settings.resolve(self.threads), hint=hint, **parts)
        model = "openvino.Core().read_model(*files)" if self.packed else parts["files"]
        return _DYNAMIC.format(threads=settings.resolve(self.threads), hint=hint, model=model, **parts)
