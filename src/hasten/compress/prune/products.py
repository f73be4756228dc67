"""Products of two tensors: what is summed over is tied, what is left over goes through."""

from __future__ import annotations

from torch import fx

from hasten.compress.prune.trace import Trace
from hasten.compress.prune.units import Axes, Ids
from hasten.load.layers import arguments


def product(trace: Trace, node: fx.Node) -> Axes | None:
    """matmul, bmm, mm: (…, m, k) · (…, k, n)."""
    x, y = (trace.whole(n) for n in node.all_input_nodes[:2]) if len(node.all_input_nodes) > 1 else (None, None)
    if x is None or y is None or len(x.shape) < 2 or len(y.shape) < 2:
        return None
    trace.units.tie(x.plain[-1], y.plain[-2], f"{trace.name(node)} multiplies it with what cannot shrink")
    trace.writes(node.all_input_nodes[1], len(y.shape) - 1)
    return Axes.of(trace.shape(node), (*_lots(trace, node, [x, y]), x.plain[-2], y.plain[-1]))


def addmm(trace: Trace, node: fx.Node) -> Axes | None:
    """addmm: bias + x · weight, the weight as (in, out)."""
    given = arguments(node)
    x, weight = trace.whole(given["mat1"]), trace.whole(given["mat2"])
    trace.units.tie(x.plain[1], weight.plain[0], f"{trace.name(node)} multiplies it with what cannot shrink")
    trace.writes(given["mat2"], 1)
    after = weight.plain[1]
    if trace.is_tensor(given["self"]):
        bias = trace.whole(given["self"])
        if bias.shape[-1:] == trace.shape(node)[-1:]:
            after = trace.tie_all([after, bias.plain[-1]], f"{trace.name(node)} adds what cannot shrink")
    return Axes.of(trace.shape(node), (x.plain[0], after))


def convolution(trace: Trace, node: fx.Node) -> Axes | None:
    """A convolution whose weight is computed, in one group."""
    given = arguments(node)
    x, weight = trace.whole(given["input"]), trace.whole(given["weight"])
    if given["groups"] != 1 or given.get("transposed") or len(x.shape) != len(weight.shape):
        return None
    trace.units.tie(x.plain[1], weight.plain[1], f"{trace.name(node)} reads it, and it cannot shrink")
    trace.hold(x, f"{trace.name(node)} slides over it", only=tuple(range(2, len(x.shape))))
    trace.writes(given["weight"], 0)
    if trace.is_tensor(given.get("bias")):
        trace.units.tie(weight.plain[0], trace.whole(given["bias"]).plain[0], f"{trace.name(node)} adds to what cannot shrink")
    return Axes.of(trace.shape(node), (x.plain[0], weight.plain[0], *[None] * (len(x.shape) - 2)))


def _lots(trace: Trace, node: fx.Node, operands: list[Axes]) -> list[Ids | None]:
    """The axes in front of the last two, broadcast."""
    shape = trace.shape(node)
    found: list[Ids | None] = []
    for back in range(len(shape), 2, -1):
        meeting = [a.plain[-back] for a in operands if len(a.shape) >= back and a.shape[-back] == shape[-back]]
        why = f"{trace.name(node)} multiplies it with what cannot shrink"
        found.append(trace.tie_all(meeting, why) if shape[-back] > 1 else None)
    return found


def attention(trace: Trace, node: fx.Node) -> Axes | None:
    """Queries (…, heads, time, width), keys, values: heads are tied; so are the widths of queries and keys."""
    given = arguments(node)
    q, k, v = (trace.whole(given[name]) for name in ("query", "key", "value"))
    if given.get("enable_gqa") or len(q.shape) < 3:
        return None
    why = f"{trace.name(node)} compares it with what cannot shrink"
    trace.units.tie(q.plain[-1], k.plain[-1], why)
    if given.get("scale") is None:
        trace.units.fix(q.plain[-1], f"{trace.name(node)} divides by the root of its size")
    trace.units.tie(k.plain[-2], v.plain[-2], why)
    operands = [q, k, v]
    if trace.is_tensor(given.get("attn_mask")):
        operands.append(trace.whole(given["attn_mask"]))
    return Axes.of(trace.shape(node), (*_lots(trace, node, operands), q.plain[-2], v.plain[-1]))


def linear(trace: Trace, node: fx.Node) -> Axes | None:
    """A linear layer whose weight is computed, or read by others as well."""
    given = arguments(node)
    x, weight = trace.whole(given["input"]), trace.whole(given["weight"])
    if len(weight.shape) != 2:
        return None
    trace.units.tie(x.plain[-1], weight.plain[1], f"{trace.name(node)} multiplies it with what cannot shrink")
    trace.writes(given["weight"], 0)
    if trace.is_tensor(given.get("bias")):
        trace.units.tie(weight.plain[0], trace.whole(given["bias"]).plain[0], f"{trace.name(node)} adds to what cannot shrink")
    return Axes.of(trace.shape(node), (*x.plain[:-1], weight.plain[0]))


def einsum(trace: Trace, node: fx.Node) -> Axes | None:
    """einsum: axes of the same letter are tied; a letter that is summed over alone may shrink, for what is zero adds nothing."""
    given = arguments(node)
    before, _, after = given["equation"].replace(" ", "").partition("->")
    terms = before.split(",")
    if "." in before or not _spelt_out(terms, after):
        return None
    operands = [trace.whole(n) for n in given["tensors"]]
    why = f"{trace.name(node)} multiplies it with what cannot shrink"
    units = {letter: trace.tie_all(_meeting(letter, terms, operands), why) for letter in "".join(terms)}
    for value, term in zip(given["tensors"], terms, strict=True):
        for axis, letter in enumerate(term):
            if letter in after and sum(letter in other for other in terms) == 1:
                trace.writes(value, axis)
    return Axes.of(trace.shape(node), [units[letter] for letter in after])


def _spelt_out(terms: list[str], after: str) -> bool:
    """Whether every letter stands once in a term and the result is named."""
    return bool(after) and all(len(set(term)) == len(term) for term in terms)


def _meeting(letter: str, terms: list[str], operands: list[Axes]) -> list[Ids | None]:
    """The units of a letter in each operand that has it; an axis of size 1 meets nothing where others are longer."""
    held = [(term.index(letter), axes) for term, axes in zip(terms, operands, strict=True) if letter in term]
    longest = max(axes.shape[at] for at, axes in held)
    return [axes.plain[at] for at, axes in held if axes.shape[at] == longest]
