"""Every step behind every other one composes, or is refused with a reason."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from hasten import testing
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Step
from hasten.engines import OnnxRuntime
from hasten.load.lower import forward, lower
from networks import network
from test_laws import STEPS, context

# A step on modules cannot follow one that leaves a graph: a recipe of the two is refused when it is built.
PAIRS = [(a, b) for a in STEPS for b in STEPS if a.stage <= b.stage and a != b and not (a.takes == "graph" and b.takes == "module")]


@functools.cache
def alone(step: Step) -> Network | str:
    """What a step makes of the small CNN, or its reason why it makes nothing."""
    of = network("cnn")
    try:
        return step.apply(lower(of) if step.takes == "graph" else of, context(of, of))
    except Unsupported as why:
        return str(why)


@pytest.mark.long(share=25)
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda step: type(step).__name__)
def test_pair(first: Step, second: Step) -> None:
    of, begun = network("cnn"), alone(first)
    if isinstance(begun, str):
        assert begun.strip()
        return
    try:
        made = second.apply(lower(begun) if second.takes == "graph" else begun, context(of, of))
    except Unsupported as why:
        assert str(why).strip()
        return
    ready = lower(made)
    given = forward(ready, ready.example)
    assert [a.shape for a in given] == [a.shape for a in forward(of, of.example)]
    assert all(np.isfinite(a).all() for a in given)
    testing.packs_what_runs_alone(OnnxRuntime(threads=1), ready)
