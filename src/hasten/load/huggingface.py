"""A Hugging Face folder (config.json and .safetensors) → the network that its configuration names.

Nothing is fetched and no code of the folder runs: the class must be one of `transformers` itself. That library is shown a folder with
the checked description and links to the checked weights, so it finds nothing else: no adapter, no pickle, no settings of generation.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hasten.core.errors import BackendMissing, DataRefused, ModelRefused
from hasten.core.network import Arrays, Network
from hasten.load import guards
from hasten.load.calling import called
from hasten.load.lower import quiet, reason

__all__ = ["open_folder"]

_DATA = ("input_ids", "pixel_values", "input_values", "input_features", "attention_mask", "token_type_ids", "bbox", "pixel_mask")
_OPEN = ("input_ids", "attention_mask", "token_type_ids", "input_values")  # of any length
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ROWS, _TOKENS, _SAMPLES = 2, 16, 16_000


def open_folder(path: Path, example: Arrays | None = None, names: Sequence[str] = ()) -> Network:
    """The network in a Hugging Face folder, which takes arrays in the order input_ids (or pixel_values, …), attention_mask, token_type_ids.

    Args:
        path: the folder.
        example: one array per input; without it one is made up.
        names: of the arrays, where the data has names: then they are given by these.

    Raises:
        ModelRefused: the configuration names no class of `transformers`, or the weights are no .safetensors or do not fit.
        BackendMissing: without `transformers`.
        DataRefused: the arrays are more than the network takes.
    """
    with tempfile.TemporaryDirectory(prefix="hasten-") as name, _offline():
        config = _checked(path, Path(name))
        module = _module(path, Path(name), config)
    taken = _inputs(module)
    if example is None:
        example = _made_up(module, taken)
        taken = taken[: len(example)]
    elif names and set(names) <= set(inspect.signature(module.forward).parameters):
        taken = list(names)
    elif len(example) > len(taken):
        raise DataRefused(f"{type(module).__name__} takes {', '.join(taken)}, got {len(example)} arrays; name them in the data")
    taken = taken[: len(example)]
    body = called(module, (), dict(zip(taken, example, strict=True)))
    open_axes = tuple((1,) if name in _OPEN and array.ndim > 1 else () for name, array in zip(taken, example, strict=True))
    return Network(kind="module", body=body, example=example, open_axes=open_axes if any(open_axes) else ())


def _checked(path: Path, place: Path) -> dict[str, Any]:
    """The configuration; it lies in `place` afterwards, with links to the weights that it names and nothing else."""
    file = guards.plain_file(path, "config.json")
    text = file.read_bytes()
    config = guards.read_json(text, str(file))
    named = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ModelRefused(f'{file} must name one class under "architectures", got {str(named)[:100]}')
    (place / "config.json").write_bytes(text)
    for held in _weights(path, config):
        link = place / held.relative_to(path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(held.resolve())
    return config  # type: ignore[no-any-return]


def _weights(path: Path, config: dict[str, Any]) -> list[Path]:
    """The files of weights that transformers would read, all of them checked."""
    told = config.get("transformers_weights")
    first = next((name for name in (_WEIGHTS, _INDEX) if os.path.lexists(path / name)), None) if told is None else told
    if not isinstance(first, str) or not first.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelRefused(f"{path} must hold its weights as .safetensors; write them with model.save_pretrained(folder)")
    held = guards.plain_file(path, first)
    if first.endswith(".index.json"):
        return [held, *sorted(set(guards.check_index(held).values()))]
    guards.check_safetensors(held)
    return [held]


def _module(path: Path, place: Path, config: dict[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as why:
        raise BackendMissing("a Hugging Face folder needs transformers; pip install 'hasten[architectures]'") from why
    name = config["architectures"][0]
    found: Any = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ModelRefused(
            f"{path.name} names the class {name[:100]!r}, which transformers {transformers.__version__} does not have; "
            "code of the folder is not run: open it in Python and give the module"
        )
    try:
        with quiet():
            opened: Any = found.from_pretrained(
                str(place),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation=_attention(found),
                dtype="float32",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, by name
            )
    except Exception as why:  # transformers raises whatever its parts raise
        raise ModelRefused(f"{path.name} cannot be opened as {name}: {reason(why)}") from why
    module, said = opened
    wrong = {*said["missing_keys"], *(m[0] if isinstance(m, tuple) else m for m in said["mismatched_keys"])}
    if wrong:
        shown = ", ".join(sorted(map(str, wrong))[:4])
        raise ModelRefused(
            f"{path.name} holds no weights that fit for {len(wrong)} parameters of {name}: {shown}; was it trained as this class?"
        )
    module.config.use_cache = False
    return module.eval()  # type: ignore[no-any-return]


def _attention(kind: Any) -> str:
    """PyTorch's fused attention where the class has it: a configuration may name kernels that would be fetched."""
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def _inputs(module: nn.Module) -> list[str]:
    """What the network takes as data, the main input first."""
    main = str(getattr(module, "main_input_name", "input_ids"))
    known = inspect.signature(module.forward).parameters
    return [main, *(n for n in _DATA if n in known and n != main and n not in _DATA[:4])]


def _made_up(module: nn.Module, taken: list[str]) -> Arrays:
    """Random tokens and a mask of ones, or random pixels or samples, of the sizes in the configuration."""
    config: Any = module.config
    draw = np.random.default_rng(0)
    main = taken[0]
    if main == "input_ids":
        ids = draw.integers(0, config.get_text_config().vocab_size, (_ROWS, _TOKENS))
        return (ids, np.ones_like(ids))[: 1 + ("attention_mask" in taken)]
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return (draw.standard_normal((_ROWS, getattr(config, "num_channels", 3), height, width), np.float32),)
    if main == "input_values":
        return (draw.standard_normal((_ROWS, _SAMPLES), np.float32),)
    raise DataRefused(f"{type(module).__name__} takes {', '.join(taken)}, whose sizes must come from data; give some")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Any attempt of the libraries to reach the hub fails inside."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
