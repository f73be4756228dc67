"""OpenVINO, on the CPU or another of its devices."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Profile, Space
from hasten.engines import settings
from hasten.engines.settings import Precision
from hasten.measure import machine

Device = Literal["CPU", "GPU", "NPU"]
# The precision hint is always said: where the CPU has bfloat16, OpenVINO would take it unasked.
_DYNAMIC = """\
import {imports}

def load(folder):{unpack}
    settings = {settings}
    model = openvino.Core().compile_model({model}, "{device}", settings)
    return lambda *inputs: tuple(model(inputs).values())
"""
_STATIC = """\
import functools, {imports}

def load(folder):{unpack}
    settings = {settings}
    @functools.lru_cache(8)  # one compiled network per batch size
    def compiled(*shapes):
        (model := openvino.Core().read_model({files})).reshape(dict(enumerate(map(list, shapes))))
        return openvino.Core().compile_model(model, "{device}", settings)
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
    """Runs the graph in OpenVINO. Only the CPU was tried.

    Args:
        threads: in all, on the CPU; 0 for all cores.
        precision: "bf16" lets it compute in bfloat16 (on the GPU in float16, which is what it has).
        device: "CPU", or "GPU" and "NPU" where the machine has one. The NPU computes in float16 and takes static shapes.
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
    device: Device = "CPU"

    def __post_init__(self) -> None:
        settings.check(self.threads, self.precision)
        if self.device not in get_args(Device):
            raise ValueError(f"device must be one of {', '.join(get_args(Device))}, got {self.device!r}")
        if self.device == "NPU" and self.shapes != "static":
            raise ValueError("the NPU takes static shapes only; say shapes='static'")
        if self.shapes not in ("dynamic", "static"):
            raise ValueError(f"shapes must be 'dynamic' or 'static', got {self.shapes!r}")

    @property
    def lossless(self) -> bool:
        """Whether it computes in the number format of the network."""
        return self.precision == "fp32" and self.device != "NPU"

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
        if self.device == "CPU":
            return settings.missing("openvino", self.precision)
        if why := settings.missing("openvino"):
            return why
        here = _here()
        return (
            None
            if self.device in here
            else f"OpenVINO finds no {self.device} on this machine, only {', '.join(here)}; is its driver there?"
        )

    def space(self) -> Space:
        """Threads, float formats, shapes and devices worth a try on this machine; the NPU only from static shapes."""
        devices = tuple(name for name in get_args(Device) if name in _here() and (name != "NPU" or self.shapes == "static"))
        return {
            "shapes": ("dynamic", "static"),
            "threads": settings.thread_choices(),
            "precision": settings.precision_choices(),
            "device": devices,
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
            raise Unsupported(f"OpenVINO cannot read this graph: {_last_words(why)}") from why
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
        source.unlink()
        if self.packed:
            settings.compress(folder / "model.xml", folder / "model.bin")
        (folder / "load.py").write_text(self._loader())

    def _loader(self) -> str:
        parts = _PACKED if self.packed else _PLAIN
        if self.shapes == "static":
            return _STATIC.format(settings=self._settings(), device=self.device, **parts)
        model = "openvino.Core().read_model(*files)" if self.packed else parts["files"]
        return _DYNAMIC.format(settings=self._settings(), device=self.device, model=model, **parts)

    def _settings(self) -> str:
        """As Python text. The other devices know no threads, and the NPU no other precision than its own."""
        half = "f16" if self.device == "GPU" else "bf16"
        said = ['"PERFORMANCE_HINT": "LATENCY"']
        if self.device == "CPU":
            said.append(f'"INFERENCE_NUM_THREADS": {settings.resolve(self.threads)}')
        if self.device != "NPU":
            said.append(f'"INFERENCE_PRECISION_HINT": "{half if self.precision == "bf16" else "f32"}"')
        return f"{{{', '.join(said)}}}"


def _last_words(why: Exception) -> str:
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(why).__name__


@functools.cache
def _here() -> tuple[str, ...]:
    """Kinds of devices, without the number behind each."""
    import openvino

    return tuple(dict.fromkeys(name.partition(".")[0] for name in openvino.Core().available_devices))
