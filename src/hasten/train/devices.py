"""One word for where a network trains: cpu, cuda, cuda:1, mps, tpu, xla."""

from __future__ import annotations

import contextlib

import torch

from hasten.core.errors import BackendMissing, UsageError
from hasten.train import chance

_KNOWN = ("cpu", "cuda", "mps", "tpu", "xla")


def device_of(name: str) -> torch.device:
    """The device. "tpu" is another word for "xla": what torch_xla runs on, a TPU where there is one.

    Raises:
        UsageError: on a name of no kind that is known.
        BackendMissing: where this machine, or this build of torch, does not have it.

    >>> device_of("cpu")
    device(type='cpu')
    """
    kind = name.split(":")[0]
    if kind not in _KNOWN:
        raise UsageError(f"device must be one of {', '.join(_KNOWN)}, with a number behind a colon where there are several, got {name!r}")
    if kind in ("tpu", "xla"):
        try:
            import torch_xla
        except ImportError as why:
            raise BackendMissing(
                f"the device {name} needs the package torch_xla and the torch of its version; pip install torch_xla==2.9.0 torch==2.9.0 "
                "in an environment of its own, as scripts/test_xla.sh does, or take cpu"
            ) from why
        found: torch.device = torch_xla.device()
        return found
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendMissing(f"the device {name} is not here: torch {torch.__version__} sees no CUDA device; use cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise BackendMissing(f"the device mps is not here: torch {torch.__version__} sees no Apple GPU; use cpu")
    return torch.device(name)


@contextlib.contextmanager
def seeded(device: torch.device, seed: int):  # type: ignore[no-untyped-def]
    """The random states of the device, the CPU, Python and NumPy begin at `seed` for the block and are put back after."""
    kept = chance.random_states(device)
    try:
        chance.begin(device, seed)
        yield
    finally:
        chance.put_random_states(kept, device)
