"""LSTM, GRU and RNN. Shapes: x (time, batch, features), states (directions, batch, hidden), output (time, directions, batch, hidden)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import Unsupported
from hasten.load.importer.table import Call, Either, Value, operator

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ORDER = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2], "RNN": [0]}  # from ONNX's iofc and zrh to torch's ifgo and rzn
_USUAL = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_LONGEST = 4096


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The attributes that the three kinds share."""

    hidden_size: int
    direction: str = "forward"
    layout: int = 0
    clip: float = 0.0
    activations: Sequence[str] = ()
    activation_alpha: Sequence[float] = ()
    activation_beta: Sequence[float] = ()
    linear_before_reset: int = 0
    input_forget: int = 0
    output_sequence: int = 0
    functions: tuple[Callable[[Tensor], Tensor], ...] = field(default=())

    @property
    def ways(self) -> int:
        """How many directions."""
        return 2 if self.direction == "bidirectional" else 1


Weights = tuple[Either, Either, Either]
"""W (directions, gates · hidden, features), R (directions, gates · hidden, hidden), B (directions, 2 · gates · hidden) or None."""


@operator("LSTM")
def _lstm(
    x: Tensor, w: Either, r: Either, b: Either = None, lengths: Either = None, h: Either = None, c: Either = None,
    p: Either = None, *, call: Call, hidden_size: int, direction: str = "forward", layout: int = 0, clip: float = 0.0,
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (), activation_beta: Sequence[float] = (), input_forget: int = 0, output_sequence: int = 0,
) -> Value:  # fmt: skip
    given = Settings(
        hidden_size=hidden_size, direction=direction, layout=layout, clip=clip, activations=activations, activation_alpha=activation_alpha,
        activation_beta=activation_beta, input_forget=input_forget,
    )  # fmt: skip
    return _recurrent(call, "LSTM", x, (w, r, b), lengths, [h, c], given, p)


@operator("GRU")
def _gru(
    x: Tensor, w: Either, r: Either, b: Either = None, lengths: Either = None, h: Either = None, *, call: Call, hidden_size: int,
    direction: str = "forward", layout: int = 0, clip: float = 0.0, activations: Sequence[str] = (), activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (), linear_before_reset: int = 0, output_sequence: int = 0,
) -> Value:  # fmt: skip
    given = Settings(
        hidden_size=hidden_size, direction=direction, layout=layout, clip=clip, activations=activations, activation_alpha=activation_alpha,
        activation_beta=activation_beta, linear_before_reset=linear_before_reset,
    )  # fmt: skip
    return _recurrent(call, "GRU", x, (w, r, b), lengths, [h], given)


@operator("RNN")
def _rnn(
    x: Tensor, w: Either, r: Either, b: Either = None, lengths: Either = None, h: Either = None, *, call: Call, hidden_size: int,
    direction: str = "forward", layout: int = 0, clip: float = 0.0, activations: Sequence[str] = (), activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (), output_sequence: int = 0,
) -> Value:  # fmt: skip
    given = Settings(
        hidden_size=hidden_size, direction=direction, layout=layout, clip=clip, activations=activations, activation_alpha=activation_alpha,
        activation_beta=activation_beta,
    )  # fmt: skip
    return _recurrent(call, "RNN", x, (w, r, b), lengths, [h], given)


def _recurrent(
    call: Call,
    kind: str,
    x: Tensor,
    weights: Weights,
    lengths: Either,
    states: list[Tensor | None],
    given: Settings,
    peepholes: Either = None,
) -> Value:
    """torch's own layer where it computes the same, else step by step."""
    states = [None if s is None or call.is_zero(s) else call.tensor(s) for s in states]
    if given.layout:
        x, states = x.transpose(0, 1), [s if s is None else s.transpose(0, 1) for s in states]
    if isinstance(lengths, np.ndarray) and isinstance(x.shape[0], int) and all(n == x.shape[0] for n in lengths.tolist()):
        lengths = None
    usual = not given.activations or [a.lower() for a in given.activations] == [a.lower() for a in _USUAL[kind] * given.ways]
    plain = usual and not given.clip and not given.input_forget and peepholes is None and lengths is None
    plain = plain and (kind != "GRU" or given.linear_before_reset == 1) and x.is_floating_point()
    whole = [torch.zeros(given.ways, x.shape[1], given.hidden_size, dtype=x.dtype) if s is None else s for s in states]
    known = all(isinstance(w, np.ndarray) for w in weights if w is not None)
    if plain and known:
        output, ends = _layer(call, kind, x, weights, whole, given)
    else:
        output, ends = _by_steps(call, kind, x, weights, whole, given, lengths, peepholes)
    if given.layout:
        return (output.permute(2, 0, 1, 3), *(e.transpose(0, 1) for e in ends))
    return (output, *ends)


def _layer(call: Call, kind: str, x: Tensor, weights: Weights, states: list[Tensor], given: Settings) -> tuple[Tensor, list[Tensor]]:
    back = given.direction == "reverse"
    parameters = [p for way in range(given.ways) for p in _parameters(call, kind, weights, way)]
    x = torch.flip(x, [0]) if back else x
    function: Any = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": torch.rnn_tanh}[kind]
    hx: Any = tuple(states) if kind == "LSTM" else states[0]
    output, *ends = function(x, hx, parameters, weights[2] is not None, 1, 0.0, False, given.ways == 2, False)
    output = torch.flip(output, [0]) if back else output
    if given.ways == 1:
        return output.unsqueeze(1), ends
    return output.reshape(x.shape[0], x.shape[1], 2, given.hidden_size).transpose(1, 2), ends


def _parameters(call: Call, kind: str, weights: Weights, way: int) -> list[Tensor]:
    """The weights of one direction, gates in torch's order."""
    w, r, b = weights
    end = "_l0_reverse" if way else "_l0"
    found = [call.weight(f"weight_ih{end}", _gates(w[way], kind)), call.weight(f"weight_hh{end}", _gates(r[way], kind))]
    if b is not None:
        halves = np.split(b[way], 2)
        found += [call.weight(f"bias_{name}{end}", _gates(half, kind)) for name, half in zip(("ih", "hh"), halves, strict=True)]
    return found


def _gates(array: Any, kind: str) -> Any:
    parts = np.split(array, _GATES[kind])
    return np.concatenate([parts[i] for i in _ORDER[kind]])


def _by_steps(
    call: Call, kind: str, x: Tensor, weights: Weights, states: list[Tensor], given: Settings, lengths: Either, peepholes: Either
) -> tuple[Tensor, list[Tensor]]:
    """One call of the cell after the other: for lengths, other activations, clipping and peepholes."""
    steps = x.shape[0]
    if not isinstance(steps, int) or steps > _LONGEST:
        raise Unsupported(f"expected a constant number of steps of at most {_LONGEST} for this form of {kind}, got {steps}")
    w, r, b, p, length = (call.tensor(v) for v in (*weights, peepholes, lengths))
    outputs, ends = [], []
    for way in range(given.ways):
        back = way == 1 or given.direction == "reverse"
        rows = x if not back else torch.flip(x, [0]) if length is None else _turned(x, length)
        state = [s[way] for s in states]
        cell = _Cell(kind, w[way], r[way], None if b is None else b[way], None if p is None else p[way], given, way)
        found = []
        for t in range(steps):
            new = cell(rows[t], state)
            if length is not None:
                on = (t < length).unsqueeze(1)
                state = [torch.where(on, n, s) for n, s in zip(new, state, strict=True)]
                found.append(torch.where(on, new[0], torch.zeros_like(new[0])))
            else:
                state = new
                found.append(new[0])
        output = torch.stack(found)
        outputs.append(output if not back else torch.flip(output, [0]) if length is None else _turned(output, length))
        ends.append(state)
    return torch.stack(outputs, 1), [torch.stack(parts) for parts in zip(*ends, strict=True)]


def _turned(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence backwards within its length."""
    step = torch.arange(x.shape[0]).reshape(-1, 1)
    where = torch.where(step < lengths, lengths - 1 - step, step)
    return torch.gather(x, 0, where.long().unsqueeze(-1).expand(x.shape))


class _Cell:
    """One step of one direction."""

    def __init__(self, kind: str, w: Tensor, r: Tensor, b: Tensor | None, p: Tensor | None, given: Settings, way: int) -> None:
        self.kind, self.w, self.r, self.p, self.given = kind, w, r, p, given
        halves: Sequence[Tensor | None] = (None, None) if b is None else b.chunk(2)
        self.wb, self.rb = halves
        count = len(_USUAL[kind])
        names = list(given.activations or _USUAL[kind] * given.ways)[way * count : (way + 1) * count]
        self.functions = [_activation(n, given, way * count + i) for i, n in enumerate(names)]

    def _cut(self, x: Tensor) -> Tensor:
        return x.clamp(-self.given.clip, self.given.clip) if self.given.clip else x

    def __call__(self, x: Tensor, state: list[Tensor]) -> list[Tensor]:
        h = state[0]
        if self.kind == "GRU":
            return [self._gru(x, h)]
        total = F.linear(x, self.w, self.wb) + F.linear(h, self.r, self.rb)
        return [self.functions[0](self._cut(total))] if self.kind == "RNN" else self._lstm(total, state[1])

    def _lstm(self, total: Tensor, c: Tensor) -> list[Tensor]:
        f, g, last = self.functions
        i, o, forget, new = total.chunk(4, -1)
        pi, po, pf = (0, 0, 0) if self.p is None else tuple(part * 1 for part in self.p.chunk(3))
        i = f(self._cut(i + pi * c))
        forget = 1 - i if self.given.input_forget else f(self._cut(forget + pf * c))
        c = forget * c + i * g(self._cut(new))
        return [f(self._cut(o + po * c)) * last(c), c]

    def _gru(self, x: Tensor, h: Tensor) -> Tensor:
        f, g = self.functions
        xz, xr, xh = F.linear(x, self.w, self.wb).chunk(3, -1)
        rz, rr, rh = self.r.chunk(3)
        bz, br, bh = (None, None, None) if self.rb is None else self.rb.chunk(3)
        z, r = f(self._cut(xz + F.linear(h, rz, bz))), f(self._cut(xr + F.linear(h, rr, br)))
        inner = r * F.linear(h, rh, bh) if self.given.linear_before_reset else F.linear(r * h, rh, bh)
        return (1 - z) * g(self._cut(xh + inner)) + z * h


def _activation(name: str, given: Settings, index: int) -> Callable[[Tensor], Tensor]:
    alpha = given.activation_alpha[index] if index < len(given.activation_alpha) else None
    beta = given.activation_beta[index] if index < len(given.activation_beta) else None
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "softsign": F.softsign, "softplus": F.softplus,
        "leakyrelu": lambda v: F.leaky_relu(v, 0.01 if alpha is None else alpha),
        "elu": lambda v: F.elu(v, 1.0 if alpha is None else alpha),
        "hardsigmoid": lambda v: torch.clamp((0.2 if alpha is None else alpha) * v + (0.5 if beta is None else beta), 0, 1),
        "affine": lambda v: (1.0 if alpha is None else alpha) * v + (beta or 0.0),
        "scaledtanh": lambda v: (1.0 if alpha is None else alpha) * torch.tanh((1.0 if beta is None else beta) * v),
        "thresholdedrelu": lambda v: F.threshold(v, 1.0 if alpha is None else alpha, 0.0),
    }  # fmt: skip
    if name.lower() not in plain:
        raise Unsupported(f"expected an activation that hasten knows, got {name}")
    return plain[name.lower()]
