"""Weights in a file of their own → a network of the user's class, with every name that does not fit told.

A state dict is read with `weights_only`, `.safetensors` by its own reader; nothing here unpickles objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hasten.core.errors import ModelRefused, UsageError
from hasten.core.names import nearest
from hasten.load import guards
from hasten.load.lower import reason

__all__ = ["fill", "read_weights"]

_INDEX = ".index.json"
_TOLD = 4
_DEEPEST = 3


def read_weights(path: Path) -> dict[str, Any]:
    """What a file of weights holds: tensors by name, for a checkpoint of PyTorch nested as it was saved.

    Args:
        path: .safetensors, the index of several such files, or what `torch.save` wrote.

    Raises:
        UsageError: there is no such file.
        ModelRefused: it is damaged, or holds objects whose reading would run code.
    """
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    if path.name.endswith(_INDEX):
        return _sharded(path)
    return _safetensors(path) if path.suffix == ".safetensors" else _checkpoint(path)


def fill(module: nn.Module, held: Mapping[str, Any], words: str) -> tuple[str, ...]:
    """Loads the weights into `module`; in a checkpoint of several parts, the part that fits best.

    Args:
        module: is written on.
        held: what `read_weights` gave.
        words: the file's name, for messages.

    Returns:
        Notes: which part of the file it was, a beginning common to all its names that was left out, weights that the network
        has no place for.

    Raises:
        ModelRefused: naming the weights that are missing or of another shape, with the nearest names in the file.
    """
    wanted = module.state_dict()
    fits = [(len(wanted.keys() & names.keys()), -len(at), at, start, names) for at, start, names in _readings(held)]
    if not fits:
        raise ModelRefused(f"expected tensors by name in {words}, got {_kinds(held)}")
    _, _, at, start, names = max(fits, key=lambda f: f[:2])
    if faults := _faults(wanted, names):
        raise ModelRefused(f"the weights in {words} do not fit {type(module).__name__}: {'; '.join(faults)}")
    module.load_state_dict({k: v for k, v in names.items() if k in wanted}, strict=False)
    unknown = [n for n in names if n not in wanted]
    said = ([f"the weights are the part {'.'.join(at)!r} of {words}"] if at else []) + (
        [f"their names in {words} begin with {start!r}, which was left out"] if start else []
    )
    said += [f"{len(unknown)} weights in {words} are none of the network's and were left out: {_listed(unknown)}"] if unknown else []
    return tuple(said)


def _faults(wanted: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> list[str]:
    missing = [n for n in wanted if n not in names and not n.endswith("num_batches_tracked")]
    unknown = [n for n in names if n not in wanted and missing]  # what is too much is told as a note, unless something is missing
    reshaped = [n for n in names if n in wanted and names[n].shape != wanted[n].shape]
    found = []
    if missing:
        hints = [f"{n} ({nearest(n, unknown)} in the file)" if unknown else n for n in missing]
        found.append(f"{len(missing)} of {len(wanted)} are missing: {_listed(hints)}")
    if unknown:
        hints = [f"{n} ({nearest(n, wanted)})" for n in unknown]
        found.append(f"{len(unknown)} are unknown to the network: {_listed(hints)}")
    if reshaped:
        told = [f"{n} must be {tuple(wanted[n].shape)}, got {tuple(names[n].shape)}" for n in reshaped]
        found.append(f"shapes differ: {_listed(told)}")
    return found


def _listed(words: list[str]) -> str:
    rest = len(words) - _TOLD
    return ", ".join(words[:_TOLD]) + (f" and {rest} more" if rest > 0 else "")


def _readings(held: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str, dict[str, Tensor]]]:
    """Every part of a checkpoint that is tensors by name: where it lies, the beginning left out of its names, the tensors."""
    for at, names in _parts(held, ()):
        yield at, "", names
        first = next(iter(names)).split(".")
        for length in range(1, min(len(first), _DEEPEST + 1)):
            start = ".".join(first[:length]) + "."
            if not all(n.startswith(start) for n in names):
                break
            yield at, start, {n.removeprefix(start): v for n, v in names.items()}


def _parts(held: Any, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    if not isinstance(held, Mapping) or len(at) > _DEEPEST:
        return
    tensors = {k: v for k, v in held.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield at, tensors
    for key, value in held.items():
        yield from _parts(value, (*at, str(key)))


def _kinds(held: Mapping[str, Any]) -> str:
    return ", ".join(f"{k!r} ({type(v).__name__})" for k, v in list(held.items())[:_TOLD]) or "nothing"


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    guards.check_safetensors(path)
    try:
        return load_file(path)
    except Exception as why:  # a type that this PyTorch has not, a file that changed meanwhile
        raise ModelRefused(f"{path.name} is no .safetensors file that can be read: {reason(why)}") from why


def _sharded(path: Path) -> dict[str, Tensor]:
    """The tensors of all files that the index names, each from its own file of the same folder."""
    homes = guards.check_index(path)
    found: dict[str, Tensor] = {}
    for file in sorted(set(homes.values())):
        found |= {n: t for n, t in _safetensors(file).items() if homes.get(n) == file}
    if lost := sorted(set(homes) - set(found)):
        raise ModelRefused(f"{path.name} promises {len(lost)} tensors that its files do not hold: {_listed(lost)}")
    return found


def _checkpoint(path: Path) -> dict[str, Any]:
    held = guards.open_checkpoint(path)
    if not isinstance(held, Mapping):
        raise ModelRefused(f"expected tensors by name in {path.name}, got {type(held).__name__}")
    return dict(held)
