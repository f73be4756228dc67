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
from hasten.load.lower import lower
from networks import network
from test_laws import STEPS, context

PAIRS = [(a, b) for a in STEPS for b in STEPS if a.stage <= b.stage and a != b]


@functools.cache
def alone(step: Step) -> Network | None:
    """What a step makes of the small CNN; None where it cannot treat it."""
    of = network("cnn")
    try:
        return step.apply(lower(of) if step.takes == "graph" else of, context(of, of))
    except Unsupported:
        return None


@pytest.mark.long(share=25)
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda step: type(step).__name__)
def test_pair(first: Step, second: Step) -> None:
    begun = alone(first)
    if begun is None or (begun.kind == "graph" and second.takes == "module"):
        pytest.skip("the first step has nothing to do here, or leaves a graph to a step on modules")
    of = network("cnn")
    try:
        made = second.apply(lower(begun) if second.takes == "graph" else begun, context(of, of))
    except Unsupported as why:
        assert str(why).strip()
        return
    assert all(np.isfinite(a).all() for a in made.example)
    testing.packs_what_runs_alone(OnnxRuntime(threads=1), lower(made))
