#!/usr/bin/env bash
# Trains on XLA's CPU backend and holds the result against eager PyTorch. torch_xla needs the torch of its own version, so this
# makes an environment of its own in .venv-xla; the download is large. Not part of .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-xla}
if [ ! -x "$VENV/bin/python" ]; then
    python3 -m venv "$VENV"
    "$VENV/bin/pip" install --quiet "torch==2.9.0" "torch_xla==2.9.0" "numpy<2.4" scipy onnx onnxscript onnxruntime openvino cloudpickle pydantic jinja2 rich typer
fi
PJRT_DEVICE=CPU PYTHONPATH=src "$VENV/bin/python" - <<'PYTHON'
import numpy as np
import torch

from hasten import Fit, Trainer
from hasten.core.data import View

rng = np.random.default_rng(0)
x = rng.normal(size=(256, 6)).astype(np.float32)
view = View(inputs=(x,), labels=x[:, :3].argmax(1))
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
settings = Fit(epochs=5, batch=32, learning_rate=0.01)
there, here = (Trainer(settings=settings, device=device).fit(module, view) for device in ("xla", "cpu"))
worst = max(float((a - b).abs().max()) for a, b in zip(there.module.parameters(), here.module.parameters(), strict=True))
print(f"{len(here.curve)} steps on XLA's CPU backend; largest difference of a weight to eager PyTorch: {worst:.1e}")
assert worst < 1e-6, worst
PYTHON
