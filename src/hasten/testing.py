"""The laws that every step and every engine keeps, to hold your own methods to them as well.

    from hasten import testing

    for law in testing.STEP_LAWS:
        law(MyStep(amount=0.5), network, context)

A law is a function that raises AssertionError, saying what was expected and what came. A step that cannot treat the network
raises Unsupported; that breaks no law.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hasten.core.errors import Unsupported
from hasten.core.network import Arrays, Network
from hasten.core.recipe import Context, Engine, Recipe, Step, part_from_json, part_to_json
from hasten.core.runner import Runner

LOSSLESS = 1e-4  # of the largest output: what folding and another engine may change in float32
_LINES = 10

StepLaw = Callable[[Step, Network, Context], None]
EngineLaw = Callable[[Engine, Network], None]


def leaves_the_network_alone(step: Step, network: Network, context: Context) -> None:
    """`apply` gives a new network: not a byte of the old one changes, nor its mode, nor what hangs on it."""
    before = _fingerprint(network)
    made = _apply(step, network, context)
    assert _fingerprint(network) == before, f"{step} changed the network that it was given"
    assert made is None or made.body is not network.body, f"{step} gave the very object back that it was given"


def same_seed_same_result(step: Step, network: Network, context: Context) -> None:
    """Two applications with one seed give the same outputs, bit for bit."""
    first, second = _apply(step, network, context), _apply(step, network, context)
    if first is None or second is None:
        return
    same = all(np.array_equal(a, b) for a, b in zip(_run(first), _run(second), strict=True))
    assert same, f"{step} gave two results for one seed"


def rebuilds_from_json(step: Step, network: Network, context: Context) -> None:
    """The step is its JSON and back."""
    del network, context
    again = part_from_json(part_to_json(step))
    assert again == step, f"{step} came back from its JSON as {again}"


def lossless_is_lossless(step: Step, network: Network, context: Context) -> None:
    """A step that says so leaves the outputs equal; any step leaves their number and shape."""
    made = _apply(step, network, context)
    if made is None:
        return
    before, after = _run(network), _run(made)
    assert [a.shape for a in before] == [a.shape for a in after], f"{step} changed the shapes of the outputs"
    worst = _difference(before, after)
    assert not step.lossless or worst <= LOSSLESS, f"{step} is called lossless and changes outputs by {worst:.2g} of the largest"


def survives_save_and_load(step: Step, network: Network, context: Context) -> None:
    """What it made gives the same outputs after a trip to the disk."""
    from hasten.load import saved

    made = _apply(step, network, context)
    if made is None:
        return
    with tempfile.TemporaryDirectory() as name:
        saved.save(made, Path(name) / "network")
        again = saved.load(Path(name) / "network")
    same = all(np.array_equal(a, b) for a, b in zip(_run(made), _run(again), strict=True))
    assert same, f"{step} made a network that gives other outputs after saving and loading"


def lowers(step: Step, network: Network, context: Context) -> None:
    """What it made becomes a graph that any later step and engine takes, for any batch size that the network took."""
    from hasten.load import lower

    made = _apply(step, network, context)
    if made is None:
        return
    assert made.fixed_batch == network.fixed_batch, f"{step} fixed the batch size at {made.fixed_batch}"
    worst = _difference(_run(made), _run(lower.lower(made)))
    assert worst <= 10 * LOSSLESS, f"{step} made a network whose graph differs by {worst:.2g} of the largest output"


def tells_its_space(step: Step, network: Network, context: Context) -> None:
    """Every value in `space` is one that the step can be built with."""
    del context
    try:
        space = type(step).space(network)
    except Unsupported:
        return
    for name, values in space.items():
        assert values, f"{type(step).__name__}.space offers no value for {name}"
        for value in values:
            built = type(step)(**{name: value})
            assert getattr(built, name) == value, f"{type(step).__name__}({name}={value!r}) holds another value"


def packs_what_runs_alone(engine: Engine, network: Network) -> None:
    """The folder runs in its own process, by a `load.py` of at most ten lines that knows nothing of hasten."""
    with tempfile.TemporaryDirectory() as name:
        engine.pack(network, Path(name))
        loader = (Path(name) / "load.py").read_text()
        lines = [line for line in loader.splitlines() if line.strip()]
        assert len(lines) <= _LINES, f"{engine} wrote a load.py of {len(lines)} lines, at most {_LINES} are allowed"
        assert "hasten" not in loader, f"{engine} wrote a load.py that needs hasten"
        with Runner(Path(name), fixed_batch=network.fixed_batch) as runner:
            got = runner(*network.example)
    expected = _run(network)
    assert [a.shape for a in expected] == [a.shape for a in got], f"{engine} gives outputs of other shapes"
    worst = _difference(expected, got)
    assert not engine.lossless or worst <= LOSSLESS, f"{engine} is called lossless and changes outputs by {worst:.2g}"


def takes_any_batch(engine: Engine, network: Network) -> None:
    """One example alone and in company gives the same answer."""
    with tempfile.TemporaryDirectory() as name:
        engine.pack(network, Path(name))
        with Runner(Path(name), fixed_batch=network.fixed_batch) as runner:
            together = runner(*network.example)
            alone = runner(*(a[:1] for a in network.example))
    worst = _difference(tuple(a[:1] for a in together), alone)
    assert worst <= (LOSSLESS if engine.lossless else 0.05), f"{engine} answers differently by {worst:.2g} for a batch of one"


def packing_changes_nothing(engine: Engine, network: Network) -> None:
    """`pack` leaves the network alone."""
    before = _fingerprint(network)
    with tempfile.TemporaryDirectory() as name:
        engine.pack(network, Path(name))
    assert _fingerprint(network) == before, f"{engine} changed the network that it packed"


def engine_rebuilds_from_json(engine: Engine, network: Network) -> None:
    """The engine is its JSON and back, alone and in a recipe."""
    del network
    assert part_from_json(part_to_json(engine)) == engine, f"{engine} came back from its JSON as another"
    recipe = Recipe((), engine)
    assert Recipe.from_json(recipe.to_json()) == recipe, f"a recipe of {engine} came back as another"


STEP_LAWS: tuple[StepLaw, ...] = (
    leaves_the_network_alone,
    same_seed_same_result,
    rebuilds_from_json,
    lossless_is_lossless,
    survives_save_and_load,
    lowers,
    tells_its_space,
)
ENGINE_LAWS: tuple[EngineLaw, ...] = (
    packs_what_runs_alone,
    takes_any_batch,
    packing_changes_nothing,
    engine_rebuilds_from_json,
)


def _apply(step: Step, network: Network, context: Context) -> Network | None:
    """What the step makes, or None where it says that it cannot treat this network."""
    try:
        return step.apply(network, context)
    except Unsupported as why:
        assert str(why).strip(), f"{step} refused without a reason"
        return None


def _run(network: Network) -> Arrays:
    from hasten.load.lower import forward

    return forward(network, network.example)


def _difference(expected: Arrays, got: Arrays) -> float:
    pairs = [(a.astype(float), b.astype(float)) for a, b in zip(expected, got, strict=True)]
    return max(float(np.abs(a - b).max(initial=0) / (np.abs(a).max(initial=0) or 1)) for a, b in pairs)


def _fingerprint(network: Network) -> object:
    """Everything of a network that a step could have written on."""
    if network.kind == "graph":
        return network.graph.SerializeToString(deterministic=True)
    state = {k: (v.dtype, tuple(v.shape), v.numpy().tobytes()) for k, v in network.module.state_dict().items()}
    modules = {n: (type(m), m.training, sorted(vars(m))) for n, m in network.module.named_modules()}
    wants = {n: (p.requires_grad, p.grad is None) for n, p in network.module.named_parameters()}
    return copy.deepcopy((state, modules, wants))
