"""Words that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.core.errors import UsageError

__all__ = ["Drop", "Json", "Model", "Pins", "Run", "Seed", "Weights", "rate_of", "source_of"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, progress as JSON lines on standard error.")]
Model = Annotated[
    str, typer.Argument(help=".pt2, .onnx, TorchScript, .keras, .h5, .tflite, a Hugging Face or SavedModel folder, or net.py:Class.")
]
Weights = Annotated[Path | None, typer.Option("--weights", help="For net.py:Class: .pt, .safetensors, or an index of several.")]
Pins = Annotated[list[str], typer.Option("--pin", help="NAME=NUMBER for an input that is no data; may be given more than once.")]
Run = Annotated[Path | None, typer.Option("--run", help="Run folder; the same command goes on there.")]
Drop = Annotated[str, typer.Option("--max-drop", help="What the score may lose: 1pt, 0.01 or 1%rel.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same result.")]


def rate_of(words: str) -> Any:
    """A learning rate, or "auto"."""
    try:
        return words if words == "auto" else float(words)
    except ValueError:
        raise UsageError(f"--lr must be a number or auto, got {words!r}") from None


def source_of(model: str, weights: Path | None, pins: list[str]) -> Any:
    """The network that the words name, a `Source`."""
    from hasten.load.source import Source

    values = {}
    for words in pins:
        name, _, number = words.rpartition("=")
        try:
            values[name] = float(number)
        except ValueError:
            raise UsageError(f"--pin must look like NAME=NUMBER, got {words!r}") from None
    return Source.of(model, weights, values)
