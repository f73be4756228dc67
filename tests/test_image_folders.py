"""Folders of images: a sub-folder is a class, and what cannot be read is refused in one plain line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hasten.core.data import View
from hasten.core.errors import DataRefused
from hasten.load.data import read

N, FEATURES = 37, 5

RNG = np.random.default_rng(0)


def images(folder: Path, arrays: np.ndarray, names: list[str]) -> Path:
    for i, (pixels, name) in enumerate(zip(arrays, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_images(channels: int, tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (5, 4, 6, channels), dtype=np.uint8)
    folder = images(tmp_path / "set", pixels[..., 0] if channels == 1 else pixels, ["b", "b", "a", "a", "c"])
    (folder / ".DS_Store").write_text("hidden")
    (folder / "a" / ".hidden.png").write_text("no image")
    found = read(folder)
    order = [2, 3, 0, 1, 4]
    expected = View(inputs=((pixels[order] / np.float32(255)).transpose(0, 3, 1, 2).astype(np.float32),), labels=np.array([0, 0, 1, 1, 2]))
    assert found.classes == ("a", "b", "c")
    assert found.view.inputs[0].shape == (5, channels, 4, 6)
    assert found.view.fingerprint() == expected.fingerprint()


def test_sixteen_bits_and_palettes(tmp_path: Path) -> None:
    deep = RNG.integers(0, 65536, (4, 3, 3), dtype=np.uint16)
    assert np.array_equal(read(images(tmp_path / "deep", deep, ["a", "a", "b", "b"])).view.inputs[0][:, 0], deep / np.float32(65535))
    for name in "aabb":
        (tmp_path / "palette" / name).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate("aabb"):
        Image.new("RGB", (2, 2), (255, 0, 51)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette" / name / f"{i}.png")
    assert read(tmp_path / "palette").view.inputs[0][0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])


def test_links_out_of_the_folder_are_left_out(tmp_path: Path) -> None:
    pixels = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    folder = images(tmp_path / "set", pixels, ["a", "a", "b", "b", "b"])
    images(tmp_path / "outside", pixels[:2], ["secret", "secret"])
    (folder / "a" / "9.png").symlink_to(tmp_path / "outside" / "secret" / "0.png")
    (folder / "stolen").symlink_to(tmp_path / "outside" / "secret")
    (folder / "a" / "inside.png").symlink_to(folder / "a" / "0.png")
    found = read(folder)
    assert (len(found), found.classes) == (6, ("a", "b"))
    assert "2 links" in found.notes[0]


def broken_folder(tmp_path: Path, change: Callable[[Path], Any]) -> Path:
    folder = images(tmp_path / "set", np.zeros((4, 2, 2), dtype=np.uint8), ["a", "a", "b", "b"])
    change(folder)
    return folder


def cut_short(folder: Path) -> None:
    whole = (folder / "a" / "0.png").read_bytes()
    (folder / "a" / "0.png").write_bytes(whole[:48])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: Image.new("L", (3, 2)).save(f / "b" / "9.png"), r"one size .* got 2×2 gray in .*0\.png and 3×2 .*9\.png"),
        (lambda f: Image.new("RGB", (2, 2)).save(f / "b" / "9.png"), r"2×2 gray in .* and 2×2 colour in .*9\.png"),
        (lambda f: Image.new("RGBA", (2, 2)).save(f / "b" / "9.png"), r"gray or RGB, got RGBA .* in .*9\.png"),
        (lambda f: (f / "b" / "notes.txt").write_text("x"), r"expected images .*notes\.txt"),
        (lambda f: (f / "README").write_text("x"), "one sub-folder for each class, got the file README"),
        (lambda f: (f / "b" / "deeper").mkdir(), "must hold images, got the folder deeper"),
        (cut_short, "must be a whole image"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataRefused, match=message):
        read(broken_folder(tmp_path, change))
