"""Run as a script in a process of its own: a Keras, SavedModel or TFLite file → an ONNX file. Imports nothing of hasten.

    python conversion.py keras|savedmodel|tflite SOURCE TARGET

The Python that runs it needs tensorflow and tf2onnx only. Ends with 0, with 5 where one of them is missing, else with 4; then the
last line of its output is JSON with the reason.
"""

from __future__ import annotations

import json
import sys
from typing import Any

OPSET = 17
_REFUSED, _MISSING = 4, 5


def from_keras(path: str) -> Any:
    """A `.keras` or `.h5` file; its layers are Keras' own, which the caller has checked."""
    import keras
    import tensorflow as tf
    import tf2onnx

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    given = list(model.inputs)
    specs = [tf.TensorSpec([None, *i.shape[1:]], i.dtype, name=_plain(i.name, at)) for at, i in enumerate(given)]
    shape = model.input if isinstance(model.input, dict) else None

    def call(*tensors: Any) -> Any:
        arguments: Any = tensors[0] if len(tensors) == 1 else list(tensors)
        if shape is not None:
            arguments = {name: tensors[[i is value for i in given].index(True)] for name, value in shape.items()}
        return tf.nest.flatten(model(arguments, training=False))

    return tf2onnx.convert.from_function(tf.function(call), input_signature=specs, opset=OPSET)[0]


def from_saved_model(path: str) -> Any:
    """A SavedModel folder: its signature for serving, or the only one that it has."""
    import tensorflow as tf
    import tf2onnx

    loaded = tf.saved_model.load(path)
    known = dict(loaded.signatures)
    if "serving_default" not in known and len(known) != 1:
        raise ValueError(f"expected a signature called serving_default, got {', '.join(known) or 'none'}; save it with signatures=…")
    function = known.get("serving_default") or next(iter(known.values()))
    named = function.structured_input_signature[1]
    specs = [tf.TensorSpec(spec.shape, spec.dtype, name=_plain(name, at)) for at, (name, spec) in enumerate(named.items())]

    def call(*tensors: Any) -> Any:
        return tf.nest.flatten(function(**dict(zip(named, tensors, strict=True))))

    return tf2onnx.convert.from_function(tf.function(call), input_signature=specs, opset=OPSET)[0]


def from_tflite(path: str) -> Any:
    """A `.tflite` file."""
    import tf2onnx

    return tf2onnx.convert.from_tflite(path, opset=OPSET)[0]


def _plain(name: str, at: int) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name.partition(":")[0]) or f"x{at}"


def _unknown(model: Any) -> list[str]:
    """Operators that ONNX does not have: what tf2onnx could not translate it leaves as it is."""
    import onnx

    nodes = [n for part in (model.graph, *model.functions) for n in part.node]
    own = {(f.domain, f.name) for f in model.functions}
    return sorted({n.op_type for n in nodes if (n.domain, n.op_type) not in own and not onnx.defs.has(n.op_type, n.domain)})


def _main(kind: str, source: str, target: str) -> int:
    try:
        import tensorflow  # noqa: F401
        import tf2onnx  # noqa: F401
    except ImportError as why:
        print(json.dumps({"error": why.name or str(why)}))
        return _MISSING
    try:
        model = {"keras": from_keras, "savedmodel": from_saved_model, "tflite": from_tflite}[kind](source)
        if unknown := _unknown(model):
            raise ValueError(f"ONNX has no operator for {', '.join(unknown[:5])}")
        with open(target, "wb") as file:
            file.write(model.SerializeToString())
    except Exception as why:  # TensorFlow and tf2onnx raise whatever their parts raise
        lines = [line.strip() for line in str(why).splitlines() if line.strip()]
        print(json.dumps({"error": f"{type(why).__name__}: {lines[0][:300] if lines else ''}"}))
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:4]))
