"""Pruning of single weights: against the formulas, against torch.nn.utils.prune, on every kind of layer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from hasten.compress import PruneWeights
from hasten.compress.prune import weight_masks as masks
from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, part_from_json, part_to_json
from networks import network


def built(*parts: nn.Module, shape: tuple[int, ...]) -> Network:
    torch.manual_seed(0)
    for part in parts:
        for p in part.parameters():
            nn.init.normal_(p)
    return Network(kind="module", body=nn.Sequential(*parts).eval(), example=(torch.randn(4, *shape).numpy(),))


def dense() -> Network:
    return built(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3), shape=(12,))


def conv() -> Network:
    return built(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 4), nn.Flatten(), shape=(4, 6, 6))


def context(of: Network, *, rows: int = 96, fidelity: str = "long") -> Context:
    """Inputs like the example's, whose features differ in size, with three classes."""
    random = np.random.default_rng(0)
    shape = of.example[0].shape[1:]
    scale = np.linspace(0.2, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = (random.standard_normal((rows, *shape)) * scale).astype(np.float32)
    labels = x.reshape(rows, -1)[:, :3].argmax(1)
    return Context(train=View(inputs=(x,), labels=labels), calibrate=View(inputs=(x[:40],)), fidelity=fidelity)  # type: ignore[arg-type]


def pruned(step: PruneWeights, of: Network) -> nn.Module:
    return step.apply(of, context(of)).module


def kept(module: nn.Module, name: str = "0") -> Tensor:
    return module.get_submodule(name).weight.detach() != 0  # type: ignore[operator, return-value]


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("make", [dense, conv])
def test_the_masks_of_torch(make, amount: float) -> None:  # type: ignore[no-untyped-def]
    of = make()
    made = pruned(PruneWeights(amount=amount), of)
    for name in ("0", "2"):
        theirs = prune.l1_unstructured(copy.deepcopy(of.module.get_submodule(name)), "weight", amount=amount)
        assert torch.equal(kept(made, name), theirs.weight_mask.bool())
        assert torch.equal(made.get_submodule(name).weight, theirs.weight), "what stays is not changed"
        assert torch.equal(made.get_submodule(name).bias, of.module.get_submodule(name).bias)


@pytest.mark.parametrize("amount", [0.3, 0.8])
def test_the_global_masks_of_torch(amount: float) -> None:
    of = dense()
    with torch.no_grad():
        of.module[2].weight.mul_(3)
    theirs = copy.deepcopy(of.module)
    prune.global_unstructured([(theirs[0], "weight"), (theirs[2], "weight")], pruning_method=prune.L1Unstructured, amount=amount)
    made = pruned(PruneWeights(amount=amount, scope="global"), of)
    for name in ("0", "2"):
        assert torch.equal(kept(made, name), theirs.get_submodule(name).weight_mask.bool())
    layerwise = pruned(PruneWeights(amount=amount), of)
    assert not torch.equal(kept(made, "2"), kept(layerwise, "2"))


def test_random_takes_as_many_and_zeros_first() -> None:
    of = dense()
    theirs = prune.random_unstructured(copy.deepcopy(of.module[0]), "weight", amount=0.4)
    made = pruned(PruneWeights(amount=0.4, saliency="random"), of)
    assert kept(made).sum() == theirs.weight_mask.sum()
    assert not torch.equal(kept(made), kept(pruned(PruneWeights(amount=0.4), of)))
    twice = pruned(PruneWeights(amount=0.4, saliency="random"), of.with_body(made))
    assert torch.equal(kept(twice), kept(made)), "zeros that are there count"


def test_threshold() -> None:
    of = dense()
    made = pruned(PruneWeights(threshold=0.7), of)
    assert torch.equal(kept(made), of.module[0].weight.abs() >= 0.7)
    assert 0 < kept(made).float().mean() < 1


def naive_pattern(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """Of every m along the second axis the n highest, written with loops."""
    stay = np.zeros(scores.shape, bool)
    for out in range(scores.shape[0]):
        for place in np.ndindex(scores.shape[2:]):
            for start in range(0, scores.shape[1], m):
                group = [float(scores[(out, start + i, *place)]) for i in range(m)]
                for i in sorted(range(m), key=lambda i: -group[i])[:n]:
                    stay[(out, start + i, *place)] = True
    return stay


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 4)])
def test_n_of_m(n: int, m: int) -> None:
    of = conv()
    step = PruneWeights(pattern=(n, m), only=("2",))
    assert np.array_equal(kept(pruned(step, of), "2").numpy(), naive_pattern(of.module[2].weight.abs().detach().numpy(), n, m))
    wide = built(nn.ConvTranspose1d(8, 3, 2), shape=(8, 5))
    made = pruned(PruneWeights(pattern=(n, m)), wide)
    inputs_second = wide.module[0].weight.abs().detach().numpy().swapaxes(0, 1)
    assert np.array_equal(kept(made).numpy().swapaxes(0, 1), naive_pattern(inputs_second, n, m))


def test_n_of_m_leaves_odd_layers_alone_and_refuses_where_all_are() -> None:
    of = built(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 2), nn.Flatten(), shape=(3, 6, 6))
    made = pruned(PruneWeights(pattern=(2, 4)), of)
    assert kept(made, "0").all()
    assert masks.zeros([made[2].weight]) == 0.5
    with pytest.raises(Unsupported, match="whose inputs are a multiple of 4; the network's layers with weights are Conv2d"):
        pruned(PruneWeights(pattern=(2, 4), keep=("2",)), of)


def test_activation_is_the_formula_on_linear_layers() -> None:
    of = dense()
    x = torch.from_numpy(context(of).calibrate.inputs[0])
    made = pruned(PruneWeights(amount=0.5, saliency="activation"), of)
    for name, inputs in (("0", x), ("2", F.relu(of.module[0](x)).detach())):
        weight = of.module.get_submodule(name).weight.detach()
        scores = np.array([[abs(float(w)) * float(inputs[:, i].norm()) for i, w in enumerate(row)] for row in weight])
        lowest = np.argsort(scores.ravel())[: round(0.5 * scores.size)]
        assert set(np.flatnonzero(~kept(made, name).numpy().ravel())) == set(lowest)
    assert not torch.equal(kept(made), kept(pruned(PruneWeights(amount=0.5), of)))


def test_activation_is_the_formula_on_convolutions_in_groups() -> None:
    of = conv()
    x = torch.from_numpy(context(of).calibrate.inputs[0])
    weight = of.module[0].weight.detach()  # (8, 2, 3, 3): outputs 0–3 read channels 0 and 1, outputs 4–7 channels 2 and 3
    scores = np.zeros(weight.shape)
    for o, i, h, w in np.ndindex(weight.shape):
        scores[o, i, h, w] = abs(float(weight[o, i, h, w])) * float(x[:, (o // 4) * 2 + i].norm())
    lowest = np.argsort(scores.ravel())[: scores.size // 2]
    made = pruned(PruneWeights(saliency="activation"), of)
    assert set(np.flatnonzero(~kept(made).numpy().ravel())) == set(lowest)


def test_taylor_is_the_formula() -> None:
    of = dense()
    told = context(of)
    module = copy.deepcopy(of.module)
    x, y = torch.from_numpy(told.train.inputs[0]), torch.from_numpy(told.train.labels)
    scores = torch.zeros_like(module[0].weight)
    for part in (slice(0, 64), slice(64, 96)):
        module.zero_grad()
        F.cross_entropy(module(x[part]), y[part]).backward()
        scores += (module[0].weight * module[0].weight.grad).abs().detach()
    made = pruned(PruneWeights(amount=0.5, saliency="taylor"), of)
    assert torch.equal(~kept(made), masks.lowest(scores, 0.5))


def test_taylor_without_labels_says_why() -> None:
    of = network("cnn")
    view = View(inputs=of.example)
    told = Context(train=view, calibrate=view, original=of, loss="original")
    with pytest.raises(Unsupported, match="gradients need labels"):
        PruneWeights(saliency="taylor").apply(of, told)


@pytest.mark.parametrize("how", [{"amount": 0.75}, {"pattern": (1, 4)}, {"amount": 0.75, "saliency": "activation"}])
@pytest.mark.parametrize("schedule", ["once", "gradual"])
def test_training_moves_the_others_and_leaves_permanent_zeros(how: dict, schedule: str) -> None:
    of = dense()
    made = pruned(PruneWeights(**how, schedule=schedule, epochs=8), of)
    assert masks.zeros([made[0].weight, made[2].weight]) == 0.75
    stayed = kept(made)
    assert (made[0].weight != of.module[0].weight)[stayed].any(), "the others learn"
    assert {n for n, _ in made.named_parameters()} == {n for n, _ in of.module.named_parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())
    assert not nn.utils.parametrize.is_parametrized(made)
    assert not any(hasattr(m, "weight_mask") for m in made.modules())


def test_training_learns() -> None:
    torch.manual_seed(0)
    of = dense().with_body(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).eval())
    told = context(of, rows=512)
    x, y = told.train.inputs[0], told.train.labels

    def right(module: nn.Module) -> float:
        return float((module(torch.from_numpy(x)).argmax(1).numpy() == y).mean())

    cold = right(PruneWeights(amount=0.7).apply(of, told).module)
    warm = right(PruneWeights(amount=0.7, schedule="gradual", epochs=40).apply(of, told).module)
    assert warm > cold + 0.1


def test_the_gradual_schedule_is_cubic(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    whole = masks.by_layer

    def noted(scores: masks.Scores, share: float) -> masks.Masks:
        shares.append(share)
        return whole(scores, share)

    monkeypatch.setattr(masks, "by_layer", noted)
    of = dense()
    step = PruneWeights(amount=0.8, schedule="gradual", epochs=64)
    step.apply(of, context(of, rows=128))  # 128 steps of 64 examples, the zeros grow in 64 of them
    expected = [0.8 - 0.8 * (1 - t / 64) ** 3 for t in range(4, 65, 4)]
    assert shares == pytest.approx(expected)
    shares.clear()
    step.apply(of, context(of, rows=128, fidelity="short"))
    assert shares == pytest.approx([0.8 - 0.8 * (1 - t / 16) ** 3 for t in range(1, 17)])


def test_recurrent_and_attention_weights() -> None:
    of = network("lstm")
    made = PruneWeights(amount=0.5).apply(of, context(of)).module
    for name, p in made.named_parameters():
        zeros = masks.zeros([p])
        assert zeros == pytest.approx(0.5, abs=0.02) if "weight" in name else zeros == 0, name
    assert all(p is q for p, q in zip(made.layer.all_weights[0], made.layer._flat_weights, strict=False))
    encoder = network("encoder")
    touched = PruneWeights(amount=0.5).apply(encoder, context(encoder)).module
    assert any("in_proj_weight" in n and masks.zeros([p]) == 0.5 for n, p in touched.named_parameters())
    assert all(masks.zeros([p]) == 0 for n, p in touched.named_parameters() if "norm" in n or "bias" in n)


@pytest.mark.parametrize(("name", "layer"), [("lstm", r"'layer' \(LSTM\)"), ("encoder", r"\(MultiheadAttention\)")])
def test_activation_refuses_what_it_cannot_see(name: str, layer: str) -> None:
    of = network(name)
    with pytest.raises(Unsupported, match=f"activation saliency needs to see a layer's input.*{layer}.*name it in keep"):
        PruneWeights(saliency="activation").apply(of, context(of))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.head.weight = self.words.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.normed(self.hidden(self.words(x))))


def test_embeddings_and_computed_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    of = Network(kind="module", body=Tied().eval(), example=(np.arange(8).reshape(2, 4),))
    view = View(inputs=of.example)
    made = PruneWeights().apply(of, Context(train=view, calibrate=view)).module
    assert masks.zeros([made.words.weight, made.normed.weight]) == 0
    assert masks.zeros([made.hidden.weight]) == 0.5
    assert made.head.weight is made.words.weight


def test_what_is_not_a_number_is_refused() -> None:
    of = dense()
    with torch.no_grad():
        of.module[2].weight[0, 0] = float("nan")
    with pytest.raises(Unsupported, match=r"what each weight matters, for '2\.weight' it is not a number"):
        pruned(PruneWeights(), of)


def test_only_and_keep() -> None:
    of = dense()
    assert kept(pruned(PruneWeights(only=("2",)), of), "0").all()
    assert kept(pruned(PruneWeights(keep=("2",)), of), "2").all()
    with pytest.raises(UsageError, match="no layer is named '7'"):
        pruned(PruneWeights(only=("7",)), of)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"amount": 1.0}, r"amount must be in \[0, 1\), got 1.0"),
        ({"threshold": -1.0}, "threshold must be a finite number of at least 0, got -1.0"),
        ({"pattern": (4, 4)}, r"pattern must be \(n, m\) with 0 < n < m, got \(4, 4\)"),
        ({"epochs": float("nan")}, "epochs must be a finite number"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0, got 0.0"),
        ({"scope": "all"}, "scope must be one of layer, global, got 'all'"),
        ({"saliency": "luck"}, "saliency must be one of activation, magnitude, random, taylor, got 'luck'"),
        ({"schedule": "twice"}, "schedule must be one of once, gradual"),
        ({"amount": 0.5, "pattern": (2, 4)}, "only one of amount, threshold and pattern says how much, got amount and pattern"),
        ({"pattern": (2, 4), "scope": "global"}, "scope must be 'layer' with pattern"),
        ({"threshold": 0.1, "saliency": "random"}, "threshold must go with the saliency 'magnitude'"),
        ({"schedule": "gradual"}, "epochs must be above 0 with the schedule 'gradual'"),
    ],
)
def test_settings_are_checked(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PruneWeights(**settings)


def test_refusals_and_json() -> None:
    bare = built(nn.BatchNorm1d(5), shape=(5,))
    with pytest.raises(Unsupported, match=r"needs a linear, convolutional, recurrent or attention layer; .* BatchNorm1d"):
        pruned(PruneWeights(), bare)
    with pytest.raises(Unsupported, match="BatchNorm1d"):
        PruneWeights.space(bare)
    with pytest.raises(TypeError, match="only must be a tuple"):
        PruneWeights(only="0")  # type: ignore[arg-type]
    of = dense()
    empty = View(inputs=(np.zeros((0, 12), np.float32),))
    with pytest.raises(DataRefused, match="calibration needs at least 1 examples, got 0"):
        PruneWeights(saliency="activation").apply(of, Context(train=empty, calibrate=empty))
    step = PruneWeights(pattern=(2, 4), keep=("0",))
    assert part_from_json(part_to_json(step)) == step
