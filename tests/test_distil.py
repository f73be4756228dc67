"""Distil: the hidden distances are their formulas, students of other widths follow, and what cannot be compared is named."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import problems
from hasten.compress import FoldBatchNorm
from hasten.compress.layers import lifted
from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, describe, part_from_json, part_to_json
from hasten.train import Distil, FineTune, Fit, Hints, fit
from hasten.train.hints import Attend, watched
from networks import NETWORKS, network


def conv(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(6, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    ).eval()  # fmt: skip


class Tokens(nn.Module):
    """Reads (batch, time, width)."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix, self.head = nn.Embedding(12, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))[:, 0]


def images(n: int = 40) -> View:
    x = np.random.default_rng(0).normal(size=(n, 1, 8, 8)).astype(np.float32)
    return View(inputs=(x,), labels=np.digitize(x.mean((1, 2, 3)), [-0.05, 0.05]))


def first_loss(student: nn.Module, teacher: nn.Module, view: View, hints: Hints) -> float:
    """The part of the hidden values in the loss of all the data, before any step: all with the hints less all without."""
    plain = Fit(epochs=1, batch=len(view), distil=0.5, freeze_norms=True)
    with_hints = Fit(epochs=1, batch=len(view), distil=0.5, freeze_norms=True, hints=hints)
    return (
        fit(student, view, settings=with_hints, teacher=teacher).curve[0][1]
        - fit(student, view, settings=plain, teacher=teacher).curve[0][1]
    )


def read_by(module: nn.Module, name: str, view: View) -> np.ndarray:
    """What a layer reads, as numpy in 64 bits."""
    seen = []
    hook = module.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().numpy().astype(np.float64)))
    module(torch.from_numpy(view.inputs[0]))
    hook.remove()
    return seen[0]


def test_features_of_one_width_are_compared_as_they_are() -> None:
    student, teacher, view = conv(8, 0), conv(8, 1), images()
    mine, theirs = (read_by(m, "3", view) for m in (student, teacher))
    want = ((mine - theirs) ** 2).mean() / theirs.var(0).mean()
    assert first_loss(student, teacher, view, Hints(only=("3",), weight=2.0)) == pytest.approx(2 * want, rel=1e-4)


def test_features_of_another_width_begin_at_the_least_squares_fit() -> None:
    student, teacher, view = conv(5, 0), conv(8, 1), images()
    mine, theirs = (np.moveaxis(read_by(m, "3", view), 1, -1).reshape(-1, width) for m, width in ((student, 5), (teacher, 8)))
    flat = read_by(teacher, "3", view)
    with_one = np.hstack([mine, np.ones((len(mine), 1))])
    fitted = with_one @ np.linalg.lstsq(with_one, theirs, rcond=None)[0]
    want = ((fitted - theirs) ** 2).mean() / flat.var(0).mean()
    assert first_loss(student, teacher, view, Hints(only=("3",))) == pytest.approx(want, rel=1e-3)


def test_attention_is_the_map_of_squares() -> None:
    student, teacher, view = conv(5, 0), conv(8, 1), images()
    maps = []
    for module in (student, teacher):
        q = (read_by(module, "3", view) ** 2).sum(1).reshape(len(view), -1)
        maps.append(q / np.sqrt((q**2).sum(1, keepdims=True)))
    want = ((maps[0] - maps[1]) ** 2).sum(1).mean()
    assert first_loss(student, teacher, view, Hints(match="attention", only=("3",))) == pytest.approx(want, rel=1e-4)


def test_attention_of_tokens_is_their_cosines() -> None:
    student, teacher = Tokens(4, 0), Tokens(8, 1)
    view = View(inputs=(np.random.default_rng(0).integers(0, 12, (30, 5)),), labels=np.arange(30) % 3)
    tables = []
    for module in (student, teacher):
        h = read_by(module, "head", view)
        unit = h / np.linalg.norm(h, axis=2, keepdims=True)
        tables.append(np.einsum("btc,buc->btu", unit, unit))
    want = ((tables[0] - tables[1]) ** 2).mean()
    assert first_loss(student, teacher, view, Hints(match="attention", only=("head",))) == pytest.approx(want, rel=1e-4)


def test_attention_knows_neither_width_nor_scale() -> None:
    h = torch.randn(2, 4, 3, 3)
    assert torch.allclose(Attend(1)(h), Attend(1)(torch.cat([3 * h, 3 * h], 1)), atol=1e-6)
    t = torch.randn(2, 5, 4)
    assert torch.allclose(Attend(-1)(t), Attend(-1)(torch.cat([3 * t, 3 * t], 2)), atol=1e-6)


def chosen(student: nn.Module, teacher: nn.Module, match: str = "features") -> tuple[str, ...]:
    inputs = (torch.from_numpy(images().inputs[0]),)
    return watched(Hints(match=match), student, teacher, inputs)[0].names  # type: ignore[arg-type]


def test_the_last_layer_of_each_size_is_followed() -> None:
    """Layer 0 reads the input itself, 3 the maps of 8×8, 5 those of 4×4, 9 one value per channel."""
    assert chosen(conv(5, 0), conv(8, 1)) == ("3", "5", "9")
    assert chosen(conv(5, 0), conv(8, 1), "attention") == ("3", "5")
    deep = [nn.Sequential(*(nn.Conv2d(1 if i == 0 else w, w, 3, padding=1) for i in range(4))) for w in (4, 6)]
    assert chosen(*deep) == ("3",)


def test_a_folded_and_lifted_student_reads_what_the_original_reads() -> None:
    """That is why readings are compared and not results: here they are equal, and nothing is left to learn."""
    original = network("cnn")
    view = View(inputs=(np.repeat(original.example[0], 4, 0),))
    context = Context(train=view, calibrate=view)
    folded = FoldBatchNorm().apply(original.with_body(lifted(original)), context)
    for hints in (Hints(), Hints(match="attention")):
        settings = Fit(loss="original", epochs=1, batch=len(view), freeze_norms=True, hints=hints)
        assert fit(folded.module, view, settings=settings, teacher=original.module).curve[0][1] < 1e-6


@pytest.mark.parametrize("match", ["features", "attention"])
def test_a_narrower_student_comes_nearer_inside_than_by_outputs_alone(match: str) -> None:
    data, teacher = problems.data(), problems.trained()
    torch.manual_seed(1)
    narrow = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    ).eval()  # fmt: skip
    given = Network(kind="module", body=narrow, example=(data.train.inputs[0][:4],))
    original = given.with_body(teacher)
    context = Context(train=data.train, calibrate=data.train.take(slice(50)), original=original, seed=0)
    x = torch.from_numpy(data.held_out.inputs[0])

    def inside(module: nn.Module) -> float:
        """How far what layers read is from the teacher's, on images that neither has seen."""
        one, other = watched(Hints(match=match), module, teacher, (x,))  # type: ignore[arg-type]
        with torch.no_grad():
            pairs = zip(one(x)[1:], other(x)[1:], strict=True)
            return float(sum(((a - b).square().mean() / b.square().mean()) for a, b in pairs))

    common = {"epochs": 4, "batch": 32, "learning_rate": 3e-3}
    by_outputs = Distil(**common).apply(given, context).module
    by_hints = Distil(match=match, hints=5.0, **common).apply(given, context).module  # type: ignore[arg-type]
    assert inside(by_hints) < 0.9 * inside(by_outputs)
    with torch.no_grad():
        score = (by_hints(x).argmax(1).numpy() == data.held_out.labels).mean()
    assert score > 0.8
    assert type(by_hints) is nn.Sequential, "the maps are thrown away"
    assert len(by_hints.state_dict()) == len(narrow.state_dict())


def test_labels_are_not_needed() -> None:
    view = View(inputs=images().inputs)
    teacher = Network(kind="module", body=conv(8, 1), example=(view.inputs[0][:2],))
    student = teacher.with_body(conv(5, 0))
    context = Context(train=view, calibrate=view, original=teacher, loss="original")
    x = torch.from_numpy(view.inputs[0])
    goal = teacher.module(x)
    for match in ("logits", "features", "attention"):
        made = Distil(match=match, epochs=30, batch=20, learning_rate=5e-3).apply(student, context).module  # type: ignore[arg-type]
        assert (made(x) - goal).square().mean() < 0.5 * (student.module(x) - goal).square().mean()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("two inputs", "encoder") else pytest.mark.long) for n in NETWORKS])
@pytest.mark.parametrize("match", ["features", "attention"])
def test_every_network_is_followed_or_refused_by_name(name: str, match: str) -> None:
    """A damaged copy comes nearer to what it was, outside."""
    original = network(name)
    hurt = copy.deepcopy(original.module)
    with torch.no_grad():
        for p in hurt.parameters():
            p.mul_(0.8)
    rows = np.arange(24) % len(original.example[0])
    view = View(inputs=tuple(a[rows] for a in original.example))
    context = Context(train=view, calibrate=view, original=original, loss="original")
    try:
        made = Distil(match=match, epochs=10, batch=8, learning_rate=3e-3).apply(original.with_body(hurt), context).module  # type: ignore[arg-type]
    except Unsupported as why:
        assert match == "attention", name
        assert "needs a layer" in str(why)
        return
    inputs = tuple(torch.from_numpy(a) for a in original.example)
    before, after, goal = (m(*inputs) for m in (hurt, made, original.module))
    first = (lambda o: o[0]) if isinstance(goal, tuple) else (lambda o: o)
    assert (first(after) - first(goal)).square().mean() < 0.8 * (first(before) - first(goal)).square().mean()


@pytest.mark.parametrize("loss", ["classes", "values"])
def test_outputs_without_labels_follow_the_original(loss: str) -> None:
    """Labels tell of the first output; training on them alone moved the second, which nobody asked for."""
    of = network("two outputs")
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = (x.mean((1, 2, 3)) > 0).numpy().astype(int)
    if loss == "values":
        labels = np.repeat(x.mean((2, 3)).numpy(), 2, 1)[:, :5]
    view = View(inputs=(x.numpy(),), labels=labels)
    context = Context(train=view, calibrate=view, original=of, loss=loss)  # type: ignore[arg-type]
    made = FineTune(epochs=30, batch=16, learning_rate=1e-2).apply(of, context).module
    with torch.no_grad():
        goal, box = of.module(x)[1], made(x)[1]
    assert (box - goal).square().mean() < 0.25 * goal.var(0).mean()


def test_the_distance_of_the_other_outputs_is_added() -> None:
    of, other = network("two outputs"), network("two outputs").module
    with torch.no_grad():
        other.box.weight.mul_(-1.0)
    x = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    view = View(inputs=(x.numpy(),), labels=np.arange(32) % 5)

    def first(teacher: nn.Module) -> float:
        settings = Fit(epochs=1, batch=32, distil=0.5, freeze_norms=True)
        return fit(of.module, view, settings=settings, teacher=teacher).curve[0][1]

    with torch.no_grad():
        mine, theirs = of.module(x)[1], other(x)[1]
    want = (mine - theirs).square().mean() / theirs.var(0, correction=0).mean()
    assert first(other) - first(of.module) == pytest.approx(float(want), rel=1e-3)


class Masked(nn.Module):
    """Gives a mask of infinities beside its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(x), torch.where(x > 0, 0.0, -torch.inf)


def test_a_mask_beside_the_scores_is_not_followed() -> None:
    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    of = Network(kind="module", body=Masked().eval(), example=(x[:4],))
    view = View(inputs=(x,), labels=np.arange(32) % 3)
    made = FineTune(epochs=1, batch=16).apply(of, Context(train=view, calibrate=view, original=of))
    assert made.module.head.weight.isfinite().all()  # type: ignore[operator]


def apply(step: Distil, student: nn.Module, teacher: nn.Module | None) -> Network:
    view = images()
    given = Network(kind="module", body=student, example=(view.inputs[0][:2],))
    original = None if teacher is None else given.with_body(teacher)
    return step.apply(given, Context(train=view, calibrate=view, original=original))


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.again(x)).flatten(1))


REFUSALS = [
    (Distil(), conv(5, 0), None, Unsupported, "the original as a torch module"),
    (
        Distil(match="features", only=("block.*",)),
        conv(5, 0),
        conv(8, 1),
        UsageError,
        r"no linear, .* layer 'block\.\*'; the nearest are 0, 3, 5$",
    ),
    (Distil(match="features", only=("0",)), conv(5, 0), conv(8, 1), Unsupported, "'0' cannot be matched: no weight comes before it"),
    (Distil(match="attention", only=("9",)), conv(5, 0), conv(8, 1), Unsupported, "'9' cannot be matched: it reads no places"),
    (Distil(match="features", only=("again",)), Twice(), Twice(), Unsupported, "'again' cannot be matched: it is called more than once"),
    (Distil(match="features", only=("3",)), Twice(), conv(8, 1), Unsupported, "'3' cannot be matched: this network calls no layer of that"),
    (
        Distil(match="features", only=("head",)),
        nn.Sequential(),
        Twice(),
        Unsupported,
        "the network has none",
    ),
    (Distil(match="attention"), Twice(), Twice(), Unsupported, "matching attention needs a layer of one name"),
]


@pytest.mark.parametrize(("step", "student", "teacher", "kind", "words"), REFUSALS, ids=lambda v: v if isinstance(v, str) else "")
def test_refusals(step: Distil, student: nn.Module, teacher: nn.Module | None, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        apply(step, student, teacher)


def test_another_number_of_places_is_refused_by_name() -> None:
    torch.manual_seed(0)
    coarse = conv(5, 0)
    coarse[0].stride = (2, 2)
    with pytest.raises(Unsupported, match=r"'3' cannot be matched: it reads \(40, 5, 4, 4\) here and \(40, 8, 8, 8\) in the original"):
        apply(Distil(match="features", only=("3",)), coarse, conv(8, 1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"match": "weights"}, "match must be one of"),
        ({"match": "features", "hints": 0.0}, "weight must be a finite number above 0, got 0.0"),
        ({"only": ("a",)}, "only and hints speak of hidden values"),
        ({"hints": 2.0}, "only and hints speak of hidden values"),
        ({"match": "features", "only": "fc"}, "only must be a tuple of layer names"),
        ({"distil": 0.0}, "distil must be above 0"),
        ({"distil": 1.5}, r"distil must be in \[0, 1\], got 1.5"),
        ({"temperature": 0}, "temperature must be a finite number above 0"),
        ({"batch": 1}, "batch must be at least 2"),
    ],
    ids=str,
)
def test_settings_out_of_range(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Distil(**wrong)  # type: ignore[arg-type]


def test_it_is_its_json() -> None:
    step = Distil(match="attention", only=("layer*",), hints=0.5)
    assert part_from_json(json.loads(json.dumps(part_to_json(step)))) == step
    assert part_to_json(step)["name"] == "hasten.train.Distil"
    assert describe(Distil(match="features")) == "Distil(match='features')"


def test_outputs_alone_are_what_finetune_learns() -> None:
    """One loop: the same settings give the same weights."""
    given, teacher = conv(5, 0), conv(8, 1)
    common = {"epochs": 2, "batch": 20, "learning_rate": 1e-3, "distil": 0.7, "temperature": 3.0}
    by_distil, by_finetune = (apply(step, given, teacher).module for step in (Distil(**common), FineTune(**common)))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(by_distil.parameters(), by_finetune.parameters(), strict=True))


def test_frozen_norms_keep_their_statistics() -> None:
    view, module = images(), conv(8, 0)
    free, frozen = (fit(module, view, settings=Fit(epochs=1, batch=20, freeze_norms=f)).module for f in (False, True))
    assert torch.equal(frozen[1].running_mean, module[1].running_mean)
    assert not torch.equal(free[1].running_mean, module[1].running_mean)
    assert not torch.equal(frozen[1].weight, module[1].weight), "its gain and shift are trained"
    assert not frozen[1].training
