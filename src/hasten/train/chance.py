"""Random states, of torch, its device, Python and NumPy: a training that is taken up again draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_CPU = torch.device("cpu")


def random_states(device: torch.device = _CPU) -> dict[str, Any]:
    """The global states, as tensors, numbers and texts. What the device does not have is left out."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    found = {
        "random": torch.get_rng_state(),
        "python": (version, torch.tensor(words), gauss),
        "numpy": {**numpy, "state": {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in numpy["state"].items()}},
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        found["mps"] = torch.mps.get_rng_state()
    elif device.type == "xla":
        found["xla"] = _xla().get_rng_state()
    return found


def put_random_states(states: Mapping[str, Any], device: torch.device = _CPU) -> None:
    """Takes up what `random_states` gave; what is not in it stays."""
    torch.set_rng_state(states["random"])
    if states.get("python") is not None:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
    if states.get("numpy") is not None:
        inside = {name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in states["numpy"]["state"].items()}
        np.random.set_state({**states["numpy"], "state": inside})
    if device.type == "cuda" and states.get("cuda") is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and states.get("mps") is not None:
        torch.mps.set_rng_state(states["mps"])
    elif device.type == "xla" and states.get("xla") is not None:
        _xla().set_rng_state(states["xla"])


def begin(device: torch.device, seed: int) -> None:
    """Lets every global state begin at `seed`."""
    torch.default_generator.manual_seed(seed)  # dropout draws from the global state
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    elif device.type == "xla":
        _xla().set_rng_state(seed % 2**63)


def _xla() -> Any:
    import torch_xla.core.xla_model

    return torch_xla.core.xla_model
