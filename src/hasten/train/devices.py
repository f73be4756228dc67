"""One word for where a network trains: cpu, cuda, cuda:1, mps, xla."""

from __future__ import annotations

import contextlib

import torch

from hasten.core.errors import BackendMissing, UsageError

_KNOWN = ("cpu", "cuda", "mps", "xla")


def device_of(name: str) -> torch.device:
    """The device.

    Raises:
        UsageError: on a name of no kind that is known.
        BackendMissing: where this machine, or this build of torch, does not have it.

    >>> device_of("cpu")
    device(type='cpu')
    """
    kind = name.split(":")[0]
    if kind not in _KNOWN:
        raise UsageError(f"device must be one of {', '.join(_KNOWN)}, with a number behind a colon where there are several, got {name!r}")
    if kind == "xla":
        try:
            import torch_xla
        except ImportError as why:
            raise BackendMissing(
                "the device xla needs the package torch_xla and the torch of its version; see scripts/test_xla.sh"
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
    """The device's and the CPU's random state begin at `seed` for the block and are put back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # dropout draws from the global state
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
