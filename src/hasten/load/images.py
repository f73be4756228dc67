"""A folder of images, one sub-folder per class → float32 in [0, 1].

Shapes: images (n, channels, height, width), 1 channel for gray, 3 for colour.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core.data import Array
from hasten.core.errors import BackendMissing, DataRefused, UsageError
from hasten.load.examples import Loaded, Naming, check_growth, check_room, checked, encode, listed

_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MODES = {"1": ("L", 255), "L": ("L", 255), "P": ("RGB", 255), "RGB": ("RGB", 255), "I;16": ("I;16", 65535)}


@dataclass(frozen=True)
class _Frame:
    """What all images of a folder must have in common."""

    mode: str
    top: int
    width: int
    height: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3 if self.mode == "RGB" else 1, self.height, self.width

    def __str__(self) -> str:
        depth = ", 16 bits" if self.top > 255 else ""
        return f"{self.width}×{self.height} {'colour' if self.mode == 'RGB' else 'gray'}{depth}"


def read_folder(folder: Path, naming: Naming) -> Loaded:
    """The images below `folder`; the class of an image is the name of its sub-folder, and classes are sorted by name.

    Hidden files are passed over, and so are links that lead out of the folder, which a note counts. Palettes become colour.
    Rotation tags are not followed.

    Raises:
        DataRefused: images of several sizes or kinds (naming two of them), files that are no images, transparency.
        BackendMissing: without Pillow.
    """
    if naming.target is not None or naming.group is not None:
        raise UsageError(f"a folder of images has no columns: leave out `target` and `group` for {folder}")
    files, left_out = _find(folder)
    if not files:
        raise DataRefused(f"{folder} must hold one sub-folder with images for each class, got no images")
    frame = _frame_of(files[0])
    for path in files[1:]:
        other = _frame_of(path)
        if other != frame:
            raise DataRefused(f"all images must have one size and kind, got {frame} in {files[0]} and {other} in {path}")
    names = np.array([path.parent.name for path in files])
    codes, classes = encode(names, naming.classes)
    size = 4 * len(files) * math.prod(frame.shape)
    check_growth(size, sum(path.stat().st_size for path in files), f"{folder}, decoded,")
    check_room(size, f"{folder}, decoded,")
    images = np.empty((len(files), *frame.shape), dtype=np.float32)
    for i, path in enumerate(files):
        images[i] = _decode(path, frame)
    notes = (f"{left_out} links that lead out of {folder} were not followed",) if left_out else ()
    return checked([images], codes, classes=classes, notes=notes)


def _find(folder: Path) -> tuple[list[Path], int]:
    """The image files sorted by class and name, and how many links were left out."""
    root, files, left_out = folder.resolve(), [], 0
    for entry in _shown(folder):
        if not entry.resolve().is_relative_to(root):
            left_out += 1
            continue
        if not entry.is_dir():
            raise DataRefused(f"{folder} must hold one sub-folder for each class, got the file {entry.name}")
        for path in _shown(entry):
            if not path.resolve().is_relative_to(root):
                left_out += 1
            elif path.is_dir():
                raise DataRefused(
                    f"{entry} must hold images, got the folder {path.name}; give the folder whose sub-folders are the classes"
                )
            else:
                files.append(path)
    return files, left_out


def _shown(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))


def _frame_of(path: Path) -> _Frame:
    """From the header alone: nothing is decoded yet."""
    with _opened(path) as image:
        if image.mode not in _MODES or "transparency" in image.info:
            raise DataRefused(f"images must be gray or RGB, got {image.mode} with transparency or other channels in {path}; convert it")
        mode, top = _MODES[image.mode]
        return _Frame(mode, top, *image.size)


def _decode(path: Path, frame: _Frame) -> Array:
    with _opened(path) as image:
        try:
            pixels = np.asarray(image if frame.top > 255 else image.convert(frame.mode), dtype=np.float32)
        except (OSError, ValueError, SyntaxError) as why:
            raise DataRefused(f"{path} must be a whole image: {why}") from why
    pixels = pixels.reshape(frame.height, frame.width, frame.shape[0]) / np.float32(frame.top)
    return pixels.transpose(2, 0, 1)


def _opened(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as why:
        raise BackendMissing("reading images needs Pillow; pip install 'hasten[images]'") from why
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path, formats=_FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as why:
        raise DataRefused(f"expected images ({listed(_FORMATS)}), got {path}: {type(why).__name__}") from why
