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
    import onnx
    import tensorflow as tf
    import tf2onnx

    keras.src.backend.gru = _gru  # Keras' own would become a loop
    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    given = list(model.inputs)
    specs = [tf.TensorSpec([None, *i.shape[1:]], i.dtype, name=_plain(i.name, at)) for at, i in enumerate(given)]
    # A sequence of layers has one input, and no word of its own for it.
    shape = model.input if not isinstance(model, keras.Sequential) and isinstance(model.input, dict) else None

    def call(*tensors: Any) -> Any:
        arguments: Any = tensors[0] if len(tensors) == 1 else list(tensors)
        if shape is not None:
            arguments = {name: tensors[[i is value for i in given].index(True)] for name, value in shape.items()}
        return tf.nest.flatten(model(arguments, training=False))

    made = tf2onnx.convert.from_function(tf.function(call), input_signature=specs, opset=OPSET)[0]
    for node in made.graph.node:
        if node.op_type == "GRU" and any("_YH_" in name for name in node.output):  # from `_gru`, whose reset comes behind the product
            node.attribute.append(onnx.helper.make_attribute("linear_before_reset", 1))
    return made


def _gru(
    inputs: Any,
    initial_state: Any,
    mask: Any,
    *,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    activation: Any,
    recurrent_activation: Any,
    return_sequences: bool = False,
    go_backwards: bool = False,
    reset_after: bool = True,
    **others: Any,
) -> tuple[Any, Any, list[Any]]:
    """A GRU as the one operator of TensorFlow that tf2onnx takes for one; NotImplementedError lets Keras write out its loop."""
    import tensorflow as tf
    from keras import activations

    plain = activation is activations.tanh and recurrent_activation is activations.sigmoid and bias is not None
    if mask is not None or not plain or not reset_after or others.get("time_major"):
        raise NotImplementedError
    gates = [*tf.split(kernel, 3, axis=1), *tf.split(recurrent_kernel, 3, axis=1)]
    flat = [tf.reshape(tf.transpose(g), [-1]) for g in gates]
    x = tf.transpose(inputs, [1, 0, 2])
    x = tf.reverse(x, [0]) if go_backwards else x
    weights = tf.concat([*flat, tf.reshape(bias, [-1])], 0)
    outputs, last, _, _ = tf.raw_ops.CudnnRNN(
        input=x, input_h=tf.expand_dims(initial_state, 0), input_c=0.0, params=weights, rnn_mode="gru", is_training=False
    )
    state = tf.squeeze(last, 0)
    return state, tf.transpose(outputs, [1, 0, 2]) if return_sequences else tf.expand_dims(state, 1), [state]


def from_saved_model(path: str) -> Any:
    """A SavedModel folder: its signature for serving, or the only one that it has.

    Objects that belong to training, such as the state of an optimizer, may be of a class that this TensorFlow no longer restores;
    then the graph is loaded without them.
    """
    try:
        return _from_objects(path)
    except Exception as why:  # TensorFlow raises whatever its parts raise
        try:
            return _from_graph(path)
        except Exception:
            raise why from None


def _from_graph(path: str) -> Any:
    import tensorflow as tf
    import tf2onnx

    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        signature = tf.compat.v1.saved_model.load(session, ["serve"], path).signature_def["serving_default"]
        inputs, outputs = ([held.name for _, held in sorted(part.items())] for part in (signature.inputs, signature.outputs))
        wanted = [name.partition(":")[0] for name in outputs]
        frozen = tf.compat.v1.graph_util.convert_variables_to_constants(session, session.graph_def, wanted)
    return tf2onnx.convert.from_graph_def(frozen, input_names=inputs, output_names=outputs, opset=OPSET)[0]


def _from_objects(path: str) -> Any:
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
