"""The two protocols, Step and Engine, and the Recipe that strings them together.

A method is one frozen, keyword-only dataclass whose fields are its settings; nothing else describes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from hasten.core.data import View
from hasten.core.errors import UsageError
from hasten.core.network import Arrays, Kind, Network

Aim = Literal["speed", "size", "score"]
Loss = Literal["classes", "values", "original"]
Space = Mapping[str, tuple[Any, ...]]
Progress = Callable[[float, str], None]


class Stage(IntEnum):
    """The place of a step in a recipe; a recipe's steps never go backwards."""

    FOLD = 10
    STRUCTURE = 20
    TRAIN = 30
    BALANCE = 35
    NUMBERS = 40


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What an engine does with Q/DQ pairs on this machine: where a quantizer should place them.

    Args:
        integer_ops: ONNX operator types that it runs faster on integers.
        passing_ops: types that carry integers through unchanged, so a pair on both sides costs nothing.
        weight_bits: 8, or 7 where 8-bit products of weights and activations saturate 16-bit sums (CPUs without VNNI).
        fuses_relu: an activation right behind an integer operator disappears into its output range.
        symmetric_activations: the zero point must be 0 (int8 where values go negative, uint8 where not), and the engine compiles
            the whole graph, so that floats may leave an integer operator; else uint8 with any zero point.
        dynamic_ops: types that it runs on integers with ranges found while running (ONNX Runtime's own operators).
        block_ops: types that it runs with weights of 4 bits in blocks (`com.microsoft.MatMulNBits`).
    """

    integer_ops: frozenset[str] = frozenset()
    passing_ops: frozenset[str] = frozenset()
    weight_bits: int = 8
    fuses_relu: bool = True
    symmetric_activations: bool = False
    dynamic_ops: frozenset[str] = frozenset()
    block_ops: frozenset[str] = frozenset()


def _silent(share: float, words: str) -> None:
    del share, words


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """All that a step may see. There is no way from here to the select or prove views.

    Args:
        train: examples for gradients.
        calibrate: a part of *train*, for the ranges of activations.
        original: the network as the user gave it, the teacher of a distillation; None if it has no module form.
        loss: what *train* is learnt with: "classes" (integer labels), "values" (float labels), "original" (no labels:
            the outputs of `original`).
        profile: of the engine at the end of the recipe.
        seed: every random number of a step comes from this and from the step itself.
        fidelity: "short" while the search compares, "long" for what it returns.
        device: a torch device.
        answers: gives the outputs of `original` on *train*, in its order; None where each step asks for itself. A run keeps them, so that
            a short training does not pay for a pass of the original.
        progress: called with the share done, in [0, 1], and a few words.
    """

    train: View
    calibrate: View
    original: Network | None = None
    loss: Loss = "classes"
    profile: Profile = field(default_factory=Profile)
    seed: int = 0
    fidelity: Literal["short", "long"] = "long"
    device: str = "cpu"
    answers: Callable[[], Arrays] | None = None
    progress: Progress = _silent


@runtime_checkable
class Step(Protocol):
    """Turns a network into another one and leaves the first alone.

    Class facts:
        takes: the form of network that it works on; a module is lowered to a graph before the first graph step.
        stage: its place in a recipe.
        lossless: the outputs stay equal up to rounding of the last digits.
        aims: what it can improve; the search tries a step that aims at the score alone only where score was lost.
        reads_profile: its result depends on the engine that follows; a step that aims at the score and reads it makes ready for the
            number format behind it, one that does not wins back what was lost in front of it.
        instead_of: may be missing; the kind that this one is a gentler form of. The search tries it where that one is fast and loses
            too much.
    """

    takes: ClassVar[Kind]
    stage: ClassVar[Stage]
    lossless: ClassVar[bool]
    aims: ClassVar[frozenset[Aim]]
    reads_profile: ClassVar[bool]

    def apply(self, network: Network, context: Context) -> Network:
        """The new network. Raises Unsupported where it cannot treat this one."""
        ...

    @classmethod
    def space(cls, network: Network) -> Space:
        """Field names with the values that the search may try, the usual one first. Raises Unsupported."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Turns a network into a folder that runs without hasten.

    The folder holds the network and `load.py`, at most ten lines, whose `load(folder)` gives a callable on arrays that
    returns a tuple of arrays. A Runner executes that very file, so what is measured is what the user receives.

    Class facts:
        takes: the form of network that it packs.
        aims: as for a step; empty for the engine that runs the network as given.
    """

    takes: ClassVar[Kind]

    @property
    def lossless(self) -> bool:
        """Whether it computes in the number format of the network."""
        ...

    @property
    def profile(self) -> Profile:
        """What it does with Q/DQ pairs on this machine."""
        ...

    def available(self) -> str | None:
        """None if it runs here, else why not and what to install."""
        ...

    def space(self) -> Space:
        """Field names with the values that the search may try on this machine, the usual one first."""
        ...

    def pack(self, network: Network, folder: Path) -> None:
        """Writes the network and `load.py` into the existing `folder`. Raises Unsupported."""
        ...


@dataclass(frozen=True)
class Recipe:
    """Steps from left to right, then the engine. A value: it compares, prints and rebuilds itself from its JSON.

    Args:
        steps: in the order of their stages; no module step behind a graph step.
        engine: what runs the result.

    Raises:
        UsageError: on a wrong order.
    """

    steps: tuple[Step, ...]
    engine: Engine

    def __post_init__(self) -> None:
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if before.stage > after.stage:
                raise UsageError(f"{_name(after)} must come before {_name(before)}: steps follow their stages")
            if before.takes == "graph" and after.takes == "module":
                raise UsageError(f"{_name(after)} needs a module but follows {_name(before)}, which makes a graph")
        if self.steps and self.steps[-1].takes == "graph" and self.engine.takes == "module":
            raise UsageError(f"{_name(self.engine)} needs a module but follows {_name(self.steps[-1])}")

    def __str__(self) -> str:
        return " → ".join(describe(part) for part in self.parts)

    @property
    def parts(self) -> tuple[Step | Engine, ...]:
        """The steps and the engine."""
        return (*self.steps, self.engine)

    @property
    def lossless(self) -> bool:
        """Whether every part is."""
        return all(part.lossless for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the name and the settings of every part."""
        return {"steps": [part_to_json(s) for s in self.steps], "engine": part_to_json(self.engine)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote. Raises UsageError on anything else."""
        try:
            return cls(tuple(part_from_json(s) for s in record["steps"]), part_from_json(record["engine"]))
        except (KeyError, TypeError) as why:
            raise UsageError(f"expected a recipe with `steps` and `engine`, got {str(record)[:200]}") from why

    def key(self) -> str:
        """SHA-256 of its canonical JSON, in hexadecimal."""
        return fingerprint(self.to_json())


def fingerprint(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe(part: Step | Engine) -> str:
    """The part with the settings that differ from its defaults, as a person would type it."""
    shown = ", ".join(f"{f.name}={getattr(part, f.name)!r}" for f in _fields(part) if getattr(part, f.name) != _default(f))
    return f"{_name(part)}({shown})" if shown else _name(part)


def part_to_json(part: Step | Engine) -> dict[str, Any]:
    """{"name": dotted path, setting: value, …}; tuples become lists."""
    return {"name": f"{_home(type(part))}.{_name(part)}"} | {f.name: _plain(getattr(part, f.name)) for f in _fields(part)}


def part_from_json(record: Mapping[str, Any]) -> Any:
    """The step or engine that `part_to_json` wrote.

    Only classes of hasten itself, or of modules that the caller has imported already, are looked up: a recipe from
    outside cannot make Python import anything.
    """
    module_name, _, class_name = str(record["name"]).rpartition(".")
    module = importlib.import_module(module_name) if _ours(module_name) else sys.modules.get(module_name)
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and (hasattr(cls, "apply") or hasattr(cls, "pack"))):
        raise UsageError(f"no step or engine named {record['name']!r}; import the module that defines it first")
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := set(record) - known - {"name"}:
        raise UsageError(f"{class_name} has no setting {sorted(unknown)[0]!r}; it has {sorted(known)}")
    return cls(**{k: _tuples(v) for k, v in record.items() if k != "name"})


def _ours(module_name: str) -> bool:
    return module_name in ("hasten.compress", "hasten.train", "hasten.engines", "hasten.testing")


def _home(cls: type) -> str:
    """The room that shows the class to the public: `hasten.compress`, not the file inside it."""
    parts = cls.__module__.split(".")
    return ".".join(parts[:2]) if parts[0] == "hasten" else cls.__module__


def _name(part: object) -> str:
    return type(part).__name__


def _fields(part: object) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(part)  # type: ignore[arg-type]


def _default(field_: dataclasses.Field[Any]) -> object:
    if field_.default_factory is not dataclasses.MISSING:
        return field_.default_factory()
    return field_.default


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
