"""UseStudent: the laws, with a file of its own; the digest; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hasten import testing
from hasten.compress import UseStudent
from hasten.core.data import View
from hasten.core.errors import ModelRefused, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, part_from_json, part_to_json
from hasten.load.lower import forward, quiet
from hasten.train import Distil
from networks import network


def write(path: Path, module: nn.Module, x: torch.Tensor, *, any_batch: bool = True) -> Path:
    shapes = ({0: torch.export.Dim.AUTO},) if any_batch else None
    with quiet(), torch.no_grad():
        torch.export.save(torch.export.export(module.eval(), (x,), dynamic_shapes=shapes), path)
    return path


def small(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("student") / "student.pt2", small(), torch.randn(3, 3, 16, 16))


def context(of: Network) -> Context:
    view = View(inputs=tuple(np.repeat(a, 8, 0) for a in of.example))
    return Context(train=view, calibrate=view, original=of, loss="original")


@pytest.mark.parametrize("law", testing.STEP_LAWS, ids=lambda law: law.__name__)
def test_laws(file: Path, law: testing.StepLaw) -> None:
    of = network("cnn")
    law(UseStudent.of(file), of, context(of))


def test_the_student_takes_the_place_and_is_taught(file: Path) -> None:
    of = network("cnn")
    made = UseStudent.of(file).apply(of, context(of))
    with torch.no_grad():
        want = small().eval()(torch.from_numpy(of.example[0])).numpy()
    np.testing.assert_allclose(forward(made, of.example)[0], want, atol=1e-5)
    assert (made.example, made.fixed_batch) == (of.example, None)
    taught = Distil(epochs=30, batch=8, learning_rate=1e-2).apply(made, context(of))
    goal = forward(of, of.example)[0]
    assert np.square(forward(taught, of.example)[0] - goal).mean() < 0.5 * np.square(want - goal).mean()


def test_a_file_that_changed_is_refused(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "student.pt2"
    copy.write_bytes(file.read_bytes())
    step = UseStudent.of(copy)
    assert part_from_json(json.loads(json.dumps(part_to_json(step)))) == step
    copy.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UsageError, match=r"must be the file of the recipe, SHA-256 .*, got"):
        step.apply(network("cnn"), context(network("cnn")))
    copy.unlink()
    with pytest.raises(UsageError, match="no such file"):
        step.apply(network("cnn"), context(network("cnn")))


def refused(path: Path, of: Network, words: str, kind: type[Exception] = Unsupported) -> None:
    with pytest.raises(kind, match=words):
        UseStudent.of(path).apply(of, context(of))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    of, x = network("cnn"), torch.randn(3, 3, 16, 16)
    refused(write(tmp_path / "classes.pt2", small(7), x), of, r"outputs of the network's shapes \(10,\) per example, gives \(7,\)")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    refused(write(tmp_path / "inputs.pt2", flat, torch.randn(3, 3, 2, 2)), of, "must take the inputs of the network: input .* must be")
    mixing = nn.Sequential(nn.Flatten(0), nn.Linear(3 * 4 * 256, 40), nn.Unflatten(0, (4, 10)))
    refused(
        write(tmp_path / "fixed.pt2", mixing, torch.randn(4, 3, 16, 16), any_batch=False),
        of,
        "must take any batch as the network does, it takes batches of 4",
    )
    (tmp_path / "junk.pt2").write_bytes(b"PK nothing")
    refused(tmp_path / "junk.pt2", of, ".", ModelRefused)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"path": "student.onnx"}, r"must be the name of a \.pt2 file, got 'student.onnx'"),
        ({"sha256": "abc"}, "sha256 must be 64 hexadecimal digits in lower case, got 'abc'"),
    ],
    ids=str,
)
def test_settings_out_of_range(wrong: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        UseStudent(**{"path": "student.pt2", "sha256": "0" * 64} | wrong)


def test_the_search_is_told_that_it_has_no_student() -> None:
    with pytest.raises(Unsupported, match="no search can guess"):
        UseStudent.space(network("cnn"))
