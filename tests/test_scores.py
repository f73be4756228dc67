"""The scores: against scikit-learn, against naive loops, and on outputs that no network should give."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.core.errors import DataRefused, UsageError
from hasten.core.score import Score
from hasten.measure import scores
from hasten.measure.scores import AUC, Accuracy, Agreement, Fidelity, MacroF1, SquaredError, TopK

metrics = pytest.importorskip("sklearn.metrics")
N = 200


def example(classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, classes) that are right more often than not, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, N)
    return (rng.normal(size=(N, classes)) + 1.5 * np.eye(classes)[labels]).astype(np.float32), labels


EVERY = {
    "accuracy": (Accuracy(), *example()),
    "accuracy of one logit": (Accuracy(), example(2)[0][:, :1], example(2)[1]),
    "accuracy per position": (Accuracy(per_position=True), example()[0].reshape(50, 4, 4), example()[1].reshape(50, 4)),
    "top 2": (TopK(k=2), *example()),
    "squared error": (SquaredError(), example()[0], example(seed=1)[0]),
    "agreement": (Agreement(), example()[0], example(seed=1)[0]),
    "agreement per position": (Agreement(per_position=True), example()[0].reshape(50, 4, 4), example()[0][::-1].reshape(50, 4, 4)),
    "fidelity": (Fidelity(), example()[0], example(seed=1)[0]),
    "macro F1": (MacroF1(), *example()),
    "AUC": (AUC(), *example()),
}
MEANS = {k: v for k, v in EVERY.items() if k not in ("macro F1", "AUC")}


@pytest.mark.parametrize("case", EVERY)
def test_every_score_is_a_score(case: str) -> None:
    score, outputs, target = EVERY[case]
    assert isinstance(score, Score)
    value = score.value((outputs,), target)
    assert np.isfinite(value)
    assert score.unit in ("pt", "")
    if score.unit == "pt":
        assert 0 <= value <= 1
    assert scores.by_name(score.name) == score


@pytest.mark.parametrize("case", MEANS)
def test_the_value_is_the_mean_of_the_examples(case: str) -> None:
    score, outputs, target = MEANS[case]
    values = score.per_example((outputs,), target)
    assert values is not None
    assert values.dtype == np.float64
    assert values.shape == (len(outputs),)
    assert score.value((outputs,), target) == pytest.approx(values.mean())
    if score.zero_one:
        assert set(np.unique(values)) <= {0.0, 1.0}


@pytest.mark.parametrize("case", EVERY)
def test_the_order_of_the_examples_does_not_matter(case: str) -> None:
    score, outputs, target = EVERY[case]
    order = np.random.default_rng(0).permutation(len(outputs))
    assert score.value((outputs[order],), target[order]) == pytest.approx(score.value((outputs,), target))


@pytest.mark.parametrize("bad", [np.nan, np.inf, "all -inf"])
@pytest.mark.parametrize("case", EVERY)
def test_nan_is_never_right_and_never_a_nan_score(case: str, bad: float | str) -> None:
    score, outputs, target = EVERY[case]
    broken = outputs.copy()
    broken[:10] = -np.inf if bad == "all -inf" else bad
    value = score.value((broken,), target)
    assert np.isfinite(value)
    assert value < score.value((outputs,), target)
    values = score.per_example((broken,), target)
    if values is not None and score.unit == "pt":
        assert (values[:10] == 0).all()
    assert np.isfinite(score.value((np.full_like(outputs, np.nan),), target))


@pytest.mark.parametrize("score", [Accuracy(), TopK(k=2), MacroF1()])
def test_nan_in_another_class_is_wrong_too(score: Score) -> None:
    logits = np.eye(3)
    logits[:, 0] = np.nan
    assert score.value((logits,), np.array([2, 1, 2])) == 0


def test_auc_of_large_logits_does_not_overflow() -> None:
    logits, labels = example()
    assert AUC().value((logits + 1e4,), labels) == pytest.approx(AUC().value((logits,), labels), abs=0.01)


def test_nothing_agrees_with_nan() -> None:
    nothing = np.full((5, 3), np.nan)
    assert Agreement().value((nothing,), nothing) == 0


def test_nan_costs_more_than_any_finite_error() -> None:
    labels = np.linspace(0, 1, 10)
    awful, nan = labels + 1e30, labels.copy()
    nan[0] = np.nan
    worst = SquaredError().per_example((awful,), labels)
    assert SquaredError().per_example((nan,), labels)[0] == worst[0] == -1e6


@pytest.mark.parametrize("classes", [2, 4])
def test_classes_against_scikit_learn(classes: int) -> None:
    logits, labels = example(classes)
    predicted = logits.argmax(1)
    assert Accuracy().value((logits,), labels) == pytest.approx(metrics.accuracy_score(labels, predicted))
    expected = metrics.f1_score(labels, predicted, average="macro", labels=np.unique(labels))
    assert MacroF1().value((logits,), labels) == pytest.approx(expected)
    assert TopK(k=1).value((logits,), labels) == Accuracy().value((logits,), labels)
    if classes > 2:
        expected = metrics.top_k_accuracy_score(labels, logits, k=2, labels=range(classes))
        assert TopK(k=2).value((logits,), labels) == pytest.approx(expected)


def test_macro_f1_counts_a_class_that_is_never_predicted() -> None:
    labels = np.array([0, 0, 1, 2])
    logits = np.eye(4)[[0, 0, 1, 3]]
    assert MacroF1().value((logits,), labels) == pytest.approx((1 + 1 + 0) / 3)


def test_auc_against_scikit_learn() -> None:
    logits, labels = example(2)
    rounded = np.round(logits)  # ties
    difference = rounded[:, 1] - rounded[:, 0]
    assert AUC().value((rounded,), labels) == pytest.approx(metrics.roc_auc_score(labels, difference))
    assert AUC().value((difference[:, None],), labels) == pytest.approx(metrics.roc_auc_score(labels, difference))
    logits, labels = example(5)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = metrics.roc_auc_score(labels, shares, multi_class="ovr")
    assert AUC().value((logits,), labels) == pytest.approx(expected, abs=1e-6)
    assert AUC().value((shares,), labels) == pytest.approx(expected, abs=1e-6)


def test_squared_error_against_scikit_learn() -> None:
    outputs, labels = example()[0], example(seed=1)[0]
    assert SquaredError().value((outputs,), labels) == pytest.approx(-metrics.mean_squared_error(labels, outputs))
    assert SquaredError().value((outputs[:, :1],), labels[:, 0]) == pytest.approx(-metrics.mean_squared_error(labels[:, 0], outputs[:, 0]))


def test_fidelity_is_r2_where_nothing_is_clipped() -> None:
    theirs = example()[0].astype(float)
    ours = theirs + np.random.default_rng(0).normal(0, 0.1, theirs.shape)
    error, variation = ((ours - theirs) ** 2).sum(), ((theirs - theirs.mean(0)) ** 2).sum()
    assert Fidelity().value((ours,), theirs) == pytest.approx(1 - error / variation)
    assert Fidelity().value((theirs,), theirs) == 1
    assert Fidelity().per_example((theirs + 1e9,), theirs).max() == 0
    constant = np.zeros((4, 3))
    assert Fidelity().value((constant,), constant) == 1
    assert Fidelity().value((constant + 1e-3,), constant) == 0
    masked = theirs.copy()
    masked[:, 0] = -np.inf
    assert Fidelity().value((masked,), masked) == 1


def test_one_logit_is_read_by_its_side() -> None:
    labels = np.array([0, 1, 1, 0])
    logits = np.array([-2.0, 3.0, -0.1, 0.2])
    for shape in ((4,), (4, 1)):
        assert Accuracy().per_example((logits.reshape(shape),), labels).tolist() == [1, 1, 0, 0]
        assert Agreement().per_example((logits.reshape(shape),), -logits.reshape(shape)).tolist() == [0, 0, 0, 0]
    shares = 1 / (1 + np.exp(-logits))
    assert Accuracy().per_example((shares,), labels).tolist() == [1, 1, 0, 0]
    assert Accuracy(threshold=0.0).per_example((shares,), labels).tolist() == [0, 1, 1, 0]
    # the original's outputs decide how both are read
    assert Agreement().per_example((shares - 0.2,), shares).tolist() == [1, 1, 1, 0]


def test_a_masked_class_is_no_failure() -> None:
    logits, labels = example()
    masked = logits.copy()
    masked[np.arange(N), (labels + 1) % 4] = -np.inf
    assert Accuracy().value((masked,), labels) >= Accuracy().value((logits,), labels)
    assert Agreement().value((masked,), masked) == 1
    assert TopK(k=3).value((masked,), labels) == 1


def test_positions() -> None:
    labels = np.array([[0, 1], [1, 1]])
    outputs = np.array([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]])  # (example, position, class)
    assert Accuracy(per_position=True).per_example((outputs,), labels).tolist() == [1, 0.5]
    assert Accuracy().per_example((outputs,), labels).tolist() == [1, 0]
    pixels = np.random.default_rng(0).normal(size=(6, 3, 4, 5))  # (example, class, height, width)
    assert Accuracy(per_position=True).value((pixels,), pixels.argmax(1)) == 1
    assert Accuracy().value((labels,), labels) == 1  # predictions themselves


def test_a_dead_network_is_not_always_in_the_top() -> None:
    labels = np.arange(10)
    assert TopK(k=5).value((np.zeros((10, 10)),), labels) == 0.5


CHOICES = [
    (np.array([0, 2, 1]), np.zeros((2, 3), np.float32), Accuracy()),
    (np.array([False, True]), np.zeros((2, 1), np.float32), Accuracy()),
    (np.array([[0], [1]]), np.zeros(2, np.float32), Accuracy()),
    (np.array([30, 65]), np.zeros((2, 1), np.float32), SquaredError()),
    (np.array([0.5, 2.0]), np.zeros((2, 1), np.float32), SquaredError()),
    (np.zeros((9, 7), int), np.zeros((2, 7, 5), np.float32), Accuracy(per_position=True)),
    (None, np.zeros((2, 2), np.float32), Agreement()),
    (None, np.zeros((2, 1), np.float32), Fidelity()),
    (None, np.zeros(2, np.float32), Fidelity()),
    (None, np.zeros((2, 3, 8, 8), np.float32), Fidelity()),
    (None, np.array([[0.6, 0.8], [0.8, -0.6]], np.float32), Fidelity()),  # directions
    (None, np.eye(3, dtype=np.float32), Agreement()),
    (None, np.zeros(2, np.int64), Agreement()),
    (None, np.zeros((2, 7), np.int64), Agreement(per_position=True)),
]


@pytest.mark.parametrize(("labels", "outputs", "expected"), CHOICES)
def test_choose(labels: np.ndarray | None, outputs: np.ndarray, expected: Score) -> None:
    assert scores.choose(labels, (outputs,)) == expected


def test_choose_by_name() -> None:
    logits = (np.zeros((3, 4)),)
    for name, expected in (
        ("accuracy", Accuracy()),
        ("Macro F1", MacroF1()),
        ("top3", TopK(k=3)),
        ("top-10", TopK(k=10)),
        ("squared_error", SquaredError()),
        ("agreement", Agreement()),
        ("AUC", AUC()),
    ):
        assert scores.choose(np.array([0, 1, 2]), logits, name=name) == expected
    assert scores.choose(None, (np.zeros((3, 5, 4)),), name="agreement") == Agreement(per_position=True)


LABELS = np.array([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: scores.choose(None, (np.eye(3),), name="f2"), UsageError, "no score named 'f2'; choose one of accuracy"),
        (lambda: scores.choose(None, (np.eye(3),), name="top0"), UsageError, "no score named"),
        (lambda: scores.choose(None, (np.eye(3),), name="auc"), UsageError, "needs labels"),
        (lambda: TopK(k=0), UsageError, "k must be >= 1"),
        (lambda: Accuracy().value((np.eye(3)[:, :2],), LABELS), DataRefused, "classes 0 to 1, got 0 to 2"),
        (lambda: Accuracy().value((np.zeros(3),), LABELS), DataRefused, "classes 0 to 1"),
        (lambda: Accuracy().value((np.eye(3),), LABELS + 0.5), DataRefused, "integer labels, got float64"),
        (lambda: Accuracy().value((np.zeros((3, 4, 5)),), LABELS), DataRefused, "class scores for labels"),
        (lambda: TopK().value((np.zeros((3, 1)),), LABELS), DataRefused, "outputs \\(n, classes\\)"),
        (lambda: SquaredError().value((np.eye(3),), LABELS), DataRefused, "outputs like the labels"),
        (lambda: SquaredError().value((np.zeros(2),), np.array([0, np.nan])), DataRefused, "must be finite, got 1"),
        (lambda: Agreement().value((np.eye(3),), np.eye(2)), DataRefused, "the original's shape"),
        (lambda: Fidelity().value((np.eye(3),), np.eye(2)), DataRefused, "the original's shape"),
        (lambda: AUC().value((np.eye(3),), np.zeros(3, int)), DataRefused, "at least two classes"),
    ],
)
def test_refusals(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()  # type: ignore[operator]
