"""`evaluate`: the scores of networks as they are, on all examples, and refusals in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import hasten
import problems
from hasten import judging
from hasten.applying import Columns
from hasten.compress import QuantizeStatic
from hasten.core import folder
from hasten.core.data import View
from hasten.core.errors import DataRefused, StorageError, UsageError
from hasten.core.recipe import Recipe
from hasten.engines import OnnxRuntime
from hasten.judging import Asked, Evaluated
from hasten.measure import scores
from test_cli import call

Files = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return problems.write_files(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def artifact(files: Files) -> Path:
    out = files[0].parent / "run" / "artifact"
    hasten.apply(Recipe((QuantizeStatic(),), OnnxRuntime(threads=1)), files[0], files[1], out=out)
    return out


@pytest.fixture(scope="module")
def both(files: Files, artifact: Path) -> Evaluated:
    return hasten.evaluate(artifact, files[2], against=files[0])


def right() -> np.ndarray:
    held = problems.data().held_out
    with torch.no_grad():
        return problems.trained()(torch.from_numpy(held.inputs[0])).argmax(1).numpy() == held.labels


def test_a_file_scores_what_torch_says(files: Files) -> None:
    found = hasten.evaluate(files[0], files[2])
    exact = stats.binomtest(int(right().sum()), len(right())).proportion_ci(0.95, "exact")
    assert (found.score_name, found.score, found.examples) == ("accuracy", right().mean(), len(right()))
    assert (found.low, found.high) == (pytest.approx(exact.low), pytest.approx(exact.high))
    assert found.drop is None
    labels = problems.data().held_out.labels
    assert {c.name: (c.examples, c.score) for c in found.classes} == {
        str(k): ((labels == k).sum(), right()[labels == k].mean()) for k in range(10)
    }


def test_a_result_against_what_it_came_from(both: Evaluated) -> None:
    assert both.score_against == right().mean()
    assert both.drop == pytest.approx(both.score_against - both.score)
    assert both.lost is not None
    assert both.won is not None
    assert both.drop == pytest.approx((both.lost - both.won) / both.examples)
    assert both.drop < both.drop_upper < both.drop + 0.05  # type: ignore[operator]
    assert [c.against for c in both.classes] == [pytest.approx(right()[problems.data().held_out.labels == k].mean()) for k in range(10)]


def test_a_run_folder_stands_for_its_artifact(files: Files, artifact: Path, both: Evaluated) -> None:
    found = hasten.evaluate(artifact.parent, files[2], against=artifact)
    assert (found.score, found.drop, found.lost, found.won) == (both.score, 0.0, 0, 0)


def test_modules_and_arrays_without_labels(artifact: Path) -> None:
    held = problems.data().held_out
    other = copy.deepcopy(problems.trained())
    with torch.no_grad():
        other[-1].bias += torch.linspace(0, 3, 10)
        agree = (
            other(torch.from_numpy(held.inputs[0])).argmax(1) == problems.trained()(torch.from_numpy(held.inputs[0])).argmax(1)
        ).numpy()
    found = hasten.evaluate(other, held.inputs[0], against=problems.trained())
    assert (found.score_name, found.score, found.score_against) == ("agreement with the original", agree.mean(), 1.0)
    with pytest.raises(UsageError, match="say with --target where the labels are, or give the other network with --against"):
        hasten.evaluate(other, held.inputs[0])
    with pytest.raises(UsageError, match="agreement with the original holds one network against another: give the other one"):
        hasten.evaluate(other, held, asked=Asked(columns=Columns(score="agreement")))


def test_values_have_an_interval_of_the_bootstrap() -> None:
    x = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    module = torch.nn.Linear(3, 1)
    with torch.no_grad():
        errors = (module(torch.from_numpy(x))[:, 0].numpy() - x[:, 0]) ** 2
    found = hasten.evaluate(module, (x, x[:, 0]))
    spread = errors.std() / np.sqrt(len(errors))
    assert found.score == pytest.approx(-errors.mean(), rel=1e-5)
    assert found.low is not None
    assert found.high is not None
    assert -errors.mean() - 8 * spread < found.low < -errors.mean() - 1.5 * spread
    assert -errors.mean() + 1.5 * spread < found.high <= 0
    assert found.classes == ()
    assert found.calibration is None


class Seven(torch.nn.Module):
    """A network that takes seven examples at once and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = problems.trained()
        self.register_buffer("nothing", torch.zeros(7, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x + self.nothing)  # type: ignore[no-any-return]


def test_a_result_of_a_fixed_batch(files: Files, tmp_path: Path) -> None:
    example = (torch.from_numpy(problems.data().held_out.inputs[0][:7]),)
    torch.export.save(torch.export.export(Seven().eval(), example), tmp_path / "seven.pt2")
    applied = hasten.apply(Recipe((), OnnxRuntime(threads=1)), tmp_path / "seven.pt2", files[1], out=tmp_path / "result")
    assert applied.fixed_batch == 7
    assert hasten.evaluate(tmp_path / "result", files[2]).score == right().mean()
    assert hasten.evaluate(tmp_path / "seven.pt2", files[2]).score == right().mean()
    held = problems.data().held_out.take(slice(0, 5))
    assert hasten.evaluate(tmp_path / "seven.pt2", held).score == right()[:5].mean(), "fewer than the network takes at once"


def test_names_of_classes_have_the_numbers_of_the_report(files: Files, artifact: Path, tmp_path: Path, both: Evaluated) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]  # another order than that of the letters
    with folder.new_folder(tmp_path / "named") as fresh:
        for file in artifact.iterdir():
            if file.name != folder.MANIFEST:
                (fresh / file.name).write_bytes(file.read_bytes())
        (fresh / "report.json").write_text(json.dumps({"class_names": words}))
    held = problems.data().held_out
    named = np.array(words)[held.labels]
    whole = hasten.evaluate(tmp_path / "named", (held.inputs[0], named))
    assert whole.score == both.score
    assert hasten.evaluate(tmp_path / "named", held).score == both.score, "numbers need no names"
    few = held.labels < 9
    assert hasten.evaluate(tmp_path / "named", (held.inputs[0][few], named[few])).classes == whole.classes[:9], "a class that is not there"
    with pytest.raises(DataRefused, match="name 9 classes and the network has 10"):
        hasten.evaluate(artifact, (held.inputs[0][few], named[few]))


def test_what_cannot_be_evaluated(files: Files, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file: .*gone\.pt2"):
        hasten.evaluate(tmp_path / "gone.pt2", files[2])
    with pytest.raises(UsageError, match=r"no such file: .*gone\.npz"):
        hasten.evaluate(files[0], tmp_path / "gone.npz")
    with pytest.raises(UsageError, match="model must be a torch module"):
        hasten.evaluate(7, files[2])
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "run.sqlite").touch()
    with pytest.raises(UsageError, match="the folder of a search without a result yet"):
        hasten.evaluate(tmp_path / "running", files[2])
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "model.pt2").touch()
    with pytest.raises(UsageError, match=r"give .*model\.pt2"):
        hasten.evaluate(tmp_path / "trained", files[2])
    spoilt = tmp_path / "spoilt"
    with folder.new_folder(spoilt) as fresh:
        (fresh / "load.py").write_text("def load(folder): return lambda *x: x\n")
    (spoilt / "load.py").write_text("raise SystemExit\n")
    with pytest.raises(StorageError, match="is not what its manifest says"):
        hasten.evaluate(spoilt, files[2])


def test_calibration_and_noise(both: Evaluated, files: Files) -> None:
    held = problems.data().held_out
    with torch.no_grad():
        sure, said = problems.trained()(torch.from_numpy(held.inputs[0])).softmax(1).max(1)
    hit = said.numpy() == held.labels
    edges = [(sure.numpy() > k / 15) & (sure.numpy() <= (k + 1) / 15) for k in range(15)]
    wanted = sum(abs(hit[b].mean() - sure.numpy()[b].mean()) * b.mean() for b in edges if b.any())
    assert both.calibration_against == pytest.approx(wanted, abs=1e-6)
    assert both.calibration == pytest.approx(wanted, abs=0.02)
    assert (both.noise, both.score_in_noise) == (None, None)
    loud = hasten.evaluate(files[0], files[2], asked=Asked(noise=3.0))
    still = hasten.evaluate(files[0], files[2], asked=Asked(noise=1e-4))
    assert still.score == still.score_in_noise == loud.score == right().mean()
    assert loud.score_in_noise is not None
    assert loud.score_in_noise < loud.score - 0.1
    assert "accuracy with noise of 3: 0." in str(loud)


def test_noise_is_that_of_each_feature() -> None:
    x = np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32) * np.array([1, 1e4], np.float32)
    view = View(inputs=(x, np.arange(3000)), labels=None)
    found, untouched = judging.noisy(view, Asked(noise=0.5))
    assert (found - x).std(0) == pytest.approx([0.5, 5e3], rel=0.05)
    assert (found.min(0) >= x.min(0)).all()
    assert (found.max(0) <= x.max(0)).all()
    assert np.array_equal(untouched, np.arange(3000))
    with pytest.raises(UsageError, match="noise is for inputs of floats, the data has int64"):
        judging.noisy(View(inputs=(np.arange(8),), labels=None), Asked(noise=0.5))


def test_what_is_no_number_has_no_calibration() -> None:
    labels = np.array([0, 1, 1, 0])
    masked = np.array([[3.0, 1.0, -np.inf]] * 4)
    assert 0 < judging._calibration(masked, labels) < 1  # type: ignore[operator]
    assert judging._calibration(np.full((4, 3), np.nan), labels) is None


def test_intervals_allow_for_what_was_not_seen() -> None:
    score = scores.Accuracy(per_position=True)
    low, high = judging._interval(np.ones(10), score, Asked())
    assert low is not None
    assert 0.5 < low < 0.9
    assert high == pytest.approx(1.0)


def test_two_names_stand_for_one_logit() -> None:
    x = np.array([[-1.0], [2.0], [3.0], [-4.0]] * 5, np.float32)
    found = hasten.evaluate(torch.nn.Identity(), (x, np.array(["cat", "dog", "dog", "dog"] * 5)))
    assert (found.score, [(c.name, c.score) for c in found.classes]) == (0.75, [("cat", 1.0), ("dog", pytest.approx(2 / 3))])


@pytest.mark.parametrize(
    "words",
    [{"batch": 0}, {"noise": -0.1}, {"confidence": 1.0}, {"confidence": 0.4}, {"workers": 2}, {"workers": 0, "ray": "auto"}],
    ids=str,
)
def test_bad_settings(words: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(words))):
        Asked(**words)


def test_the_command(files: Files, artifact: Path, both: Evaluated, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "evaluate", artifact, "--data", files[2], "--against", files[0], "--json")
    told = json.loads(out)
    assert code == 0
    assert {**told, "seconds": 0, "network": "", "against": ""} == {
        **json.loads(json.dumps(both.to_json())),
        "seconds": 0,
        "network": "",
        "against": "",
    }
    assert all(json.loads(line)["stage"] in ("load", "score") for line in err.splitlines())
    code, out, err = call(capsys, "evaluate", files[0], "--data", files[2], "--score", "macro-f1")
    assert (code, out.splitlines()[1].startswith("macro F1 0.9")) == (0, True), out
    assert " to " not in out.splitlines()[1]
    code, out, err = call(capsys, "evaluate", files[0], "--data", files[2], "--ray", "127.0.0.1:1")
    assert code != 0
    assert "\n" not in err.strip().splitlines()[-1]


def test_columns(tmp_path: Path) -> None:
    held = problems.data().held_out
    np.savez(tmp_path / "odd.npz", picture=held.inputs[0], answer=held.labels)
    found = hasten.evaluate(problems.trained(), tmp_path / "odd.npz", asked=Asked(columns=Columns(target="answer")))
    assert found.score == right().mean()
