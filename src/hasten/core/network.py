"""What steps work on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx
    from torch import nn

Kind = Literal["module", "graph"]
Arrays = tuple[np.ndarray[Any, Any], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A network in one of its two forms: a torch module, or an ONNX graph.

    Args:
        kind: "module" (`body` is a `torch.nn.Module` in eval mode) or "graph" (`body` is an `onnx.ModelProto`).
        body: the module or the graph. Steps return a new one and never write on this one.
        example: one array per input, first axis the batch, at least two rows where the network takes batches.
        fixed_batch: the only batch size that the network takes, or None where it takes any.
        open_axes: for each input the axes besides the batch that it takes in any size, such as the length of a sequence; () where
            all are fixed.
        source: the ONNX model that a module was imported from, while no step has changed it; lowering gives it back as it is.
        notes: what must be said about how it was opened.
    """

    kind: Kind
    body: Any
    example: Arrays
    fixed_batch: int | None = None
    open_axes: tuple[tuple[int, ...], ...] = ()
    source: onnx.ModelProto | None = None
    notes: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The torch module. Raises TypeError on a graph."""
        if self.kind != "module":
            raise TypeError("this network is an ONNX graph; it has no module")
        return self.body  # type: ignore[no-any-return]

    @property
    def graph(self) -> onnx.ModelProto:
        """The ONNX model. Raises TypeError on a module."""
        if self.kind != "graph":
            raise TypeError("this network is a torch module; lower it first")
        return self.body  # type: ignore[no-any-return]

    def with_body(self, body: object, *, kind: Kind | None = None) -> Network:
        """The same inputs around another body."""
        return replace(self, body=body, kind=kind or self.kind, source=None)
