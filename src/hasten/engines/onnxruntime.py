"""ONNX Runtime, on the CPU or through another of its providers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Profile, Space
from hasten.engines import settings
from hasten.measure import machine

_LOAD = """\
import {imports}

def load(folder):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = {threads}, 3
    session = onnxruntime.InferenceSession({model}, options, providers={providers})
{check}    names = [i.name for i in session.get_inputs()]
    return lambda *inputs: tuple(session.run(None, dict(zip(names, inputs))))
"""
# ONNX Runtime goes on with the CPU, and says so in its log only, where a provider cannot be used.
_CHECK = """\
    if session.get_providers()[0] != "{name}": raise RuntimeError("ONNX Runtime cannot use its {name} here")
"""
Provider = Literal["cpu", "cuda", "tensorrt", "coreml", "qnn"]
_CPU = "CPUExecutionProvider"
_NAMES: dict[Provider, str] = {
    "cpu": _CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
_WHEELS: dict[Provider, str] = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "qnn": "onnxruntime-qnn"}
_PLAIN = ("onnxruntime", 'f"{folder}/model.onnx"')
_PACKED = ("lzma, onnxruntime, pathlib", 'lzma.decompress(pathlib.Path(folder, "model.onnx.xz").read_bytes())')


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """Runs the ONNX graph in ONNX Runtime, with its own graph optimizations.

    On the CPU and with CUDA it computes in the graph's number format: it has no bfloat16 kernels for x86, and TF32 is switched off.
    What a provider cannot run falls to the CPU, node by node; where it cannot be used at all, loading fails. Only the CPU was tried.

    Args:
        threads: of one operator; 0 for all cores.
        packed: the file is compressed with LZMA and unpacked in memory when it is loaded. Zeros and repeated weights take little
            room then; weights of their own hardly shrink, and loading takes longer. The answers are the same.
        provider: "cpu", or "cuda", "tensorrt", "coreml", "qnn" where the installed onnxruntime has it.
    """

    takes: ClassVar[Kind] = "graph"
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    threads: int = 0
    packed: bool = False
    provider: Provider = "cpu"

    def __post_init__(self) -> None:
        settings.check(self.threads)
        if self.provider not in _NAMES:
            raise ValueError(f"provider must be one of {', '.join(_NAMES)}, got {self.provider!r}")

    @property
    def lossless(self) -> bool:
        """On the CPU and with CUDA the graph says the number format; the others may compute in 16 bits."""
        return self.provider in ("cpu", "cuda")

    @property
    def profile(self) -> Profile:
        """Where Q/DQ pairs become integer kernels (QLinearConv, QGemm, …); CUDA and CoreML have none for them."""
        if self.provider in ("cuda", "coreml"):
            return Profile()
        if self.provider in ("tensorrt", "qnn"):
            return Profile(integer_ops=settings.INTEGER_OPS, passing_ops=settings.PASSING_OPS, symmetric_activations=True)
        return Profile(
            integer_ops=settings.INTEGER_OPS | {"Concat"},
            passing_ops=settings.PASSING_OPS,
            weight_bits=8 if machine.has_int8_dot() else 7,
            dynamic_ops=frozenset({"Gemm", "MatMul", "LSTM"}),
            block_ops=frozenset({"Gemm", "MatMul"}),
        )

    def available(self) -> str | None:
        """None if it runs here, else why not."""
        if (why := settings.missing("onnxruntime")) or self.provider == "cpu":
            return why
        here = _here()
        if _NAMES[self.provider] in here:
            return None
        wheel = f"; run: pip install {_WHEELS[self.provider]}" if self.provider in _WHEELS else ""
        return f"the onnxruntime that is installed has no {_NAMES[self.provider]}, only {', '.join(here)}{wheel}"

    def space(self) -> Space:
        """Threads and providers worth a try on this machine."""
        here = _here()
        return {"threads": settings.thread_choices(), "provider": tuple(name for name in get_args(Provider) if _NAMES[name] in here)}

    def pack(self, network: Network, folder: Path) -> None:
        """Writes `model.onnx`, or `model.onnx.xz`, and `load.py`."""
        import onnx

        onnx.save(network.graph, folder / "model.onnx")
        if self.packed:
            settings.compress(folder / "model.onnx")
        imports, model = _PACKED if self.packed else _PLAIN
        text = _LOAD.format(
            threads=settings.resolve(self.threads), imports=imports, model=model, providers=self._providers(), check=self._check()
        )
        (folder / "load.py").write_text(text)

    def _providers(self) -> str:
        """As Python text, the CPU last."""
        cuda = f'("{_NAMES["cuda"]}", {{"use_tf32": 0}})'
        others = {"cpu": [], "cuda": [cuda], "tensorrt": [f'"{_NAMES["tensorrt"]}"', cuda]}.get(
            self.provider, [f'"{_NAMES[self.provider]}"']
        )
        return f"[{', '.join([*others, repr(_CPU).replace(chr(39), chr(34))])}]"

    def _check(self) -> str:
        return "" if self.provider == "cpu" else _CHECK.format(name=_NAMES[self.provider])


@functools.cache
def _here() -> tuple[str, ...]:
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())
