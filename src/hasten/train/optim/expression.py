"""A rule is written once, on plain arithmetic; this file lets it be evaluated on symbols, which writes it down as C++.

A rule is a function `rule(x, h)`. `x.p`, `x.g` and `x.NAME` are the elements of the parameter, its gradient and its buffers; what the
rule assigns to them is their next value. `h.NAME` is a number of the group or of the step (a rate, a coefficient), or a bool that
decides which formula it is. Products of numbers are taken before they meet an element, so both ways of evaluation round alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

Rule = Callable[[Any, Any], None]


class Symbol:
    """A value inside the loop (an element) or before it (a number in double precision); an operation writes a line of C++."""

    def __init__(self, text: str, trace: Trace, *, element: bool) -> None:
        self.text, self.trace, self.element = text, trace, element

    def __add__(self, other: Any) -> Symbol:
        return self.trace.write("{} + {}", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return self.trace.write("{} + {}", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return self.trace.write("{} - {}", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return self.trace.write("{} - {}", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return self.trace.write("{} * {}", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return self.trace.write("{} * {}", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return self.trace.write("{} / {}", self, other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self.trace.write("{} / {}", other, self)

    def __neg__(self) -> Symbol:
        return self.trace.write("-{}", self)

    def __bool__(self) -> bool:
        raise TypeError("a rule may branch on bools only: what depends on numbers must be arithmetic")


class Trace:
    """The lines that a rule has written: `numbers` once per call, `elements` once per element."""

    def __init__(self) -> None:
        self.numbers: list[str] = []
        self.elements: list[str] = []

    def write(self, pattern: str, *operands: Any) -> Symbol:
        """One operation, in single precision (`real`) where an element takes part."""
        element = any(isinstance(o, Symbol) and o.element for o in operands)
        lines = self.elements if element else self.numbers
        name = f"{'e' if element else 'n'}{len(lines)}"
        lines.append(f"const {'real' if element else 'double'} {name} = {pattern.format(*(_text(o, element) for o in operands))};")
        return Symbol(name, self, element=element)


def _text(operand: Any, element: bool) -> str:
    if not isinstance(operand, Symbol):
        return f"({'real' if element else 'double'})({float(operand)!r})"
    return f"(real){operand.text}" if element and not operand.element else operand.text


def sqrt(x: Any) -> Any:
    """The root of an element or a number."""
    if isinstance(x, Symbol):
        return x.trace.write("root({})", x)
    return x.sqrt() if isinstance(x, torch.Tensor) else math.sqrt(x)


def sign(x: Any) -> Any:
    """−1, 0 or 1; 0 for NaN, as in torch."""
    if isinstance(x, Symbol):
        return x.trace.write("sign({})", x)
    return x.sign()


def larger(x: Any, y: Any) -> Any:
    """The larger of two elements; NaN where one is."""
    if isinstance(x, Symbol):
        return x.trace.write("larger({}, {})", x, y)
    return torch.maximum(x, y)


def magnitude(x: Any) -> Any:
    """The absolute value of an element."""
    if isinstance(x, Symbol):
        return x.trace.write("magnitude({})", x)
    return x.abs()


def traced(rule: Rule, names: Iterable[str], numbers: Iterable[str], flags: Mapping[str, bool]) -> tuple[Trace, dict[str, str]]:
    """What the rule writes, and the text of the value that each of `names` and of the sums ends with."""
    trace = Trace()
    x = SimpleNamespace(**{name: Symbol(name, trace, element=True) for name in names}, sums={})
    given = {name: x.__dict__[name] for name in names}
    rule(x, SimpleNamespace(**{name: Symbol(name, trace, element=False) for name in numbers}, **flags))
    ends = {name: x.__dict__[name].text for name in names if x.__dict__[name] is not given[name]}
    return trace, ends | {f"sum {name}": value.text for name, value in x.sums.items()}
