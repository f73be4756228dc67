"""Changes to batches of images: each equals its formula, draws nothing when off, and gives what it promises over passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.errors import UsageError
from hasten.train import Augment, Fit, fit
from hasten.train.augment import Augmenter, cutout, flip, resized
from lessons import image, pictures, plain, points, seeded


def generator():
    return torch.Generator().manual_seed(0)


def test_flip_turns_those_that_are_named():
    images = torch.arange(12.0).reshape(2, 1, 2, 3)
    turned = flip(images, torch.tensor([True, False]))
    assert turned[0].equal(images[0].flip(2))
    assert turned[1].equal(images[1])


def test_alternating_flip_shows_both_sides_in_two_passes():
    images = torch.randn(20, 1, 4, 4)
    augmenter, index = Augmenter(Augment(flip="alternating"), 20, generator()), torch.arange(20)
    one, two, three = (augmenter.images(images, index, passes, 0.0) for passes in (1, 2, 3))
    assert one.equal(two.flip(3))
    assert one.equal(three)
    sides = [a.equal(b) for a, b in zip(one, images, strict=True)]
    assert 4 < sum(sides) < 16, "it begins by chance"


def test_random_flip_turns_half():
    images = torch.randn(400, 1, 2, 3)
    turned = Augmenter(Augment(flip="random"), 400, generator()).images(images, torch.arange(400), 1, 0.0)
    share = sum(a.equal(b) for a, b in zip(turned, images, strict=True)) / 400
    assert share == pytest.approx(0.5, abs=0.1)


def test_cutout_equals_the_loop():
    images = torch.randn(50, 2, 7, 9)
    cut = cutout(images, side=3, generator=generator())
    draw = generator()
    down, right = torch.randint(7, (50, 1), generator=draw), torch.randint(9, (50, 1), generator=draw)
    want = images.clone()
    for i in range(50):
        top, left = down[i].item() - 1, right[i].item() - 1
        for c in range(2):
            want[i, c, max(0, top) : top + 3, max(0, left) : left + 3] = images[i, c].mean()
    assert torch.allclose(cut, want)


def test_resized_images_grow_to_their_size():
    images = torch.randn(3, 1, 8, 8)
    augmenter = Augmenter(Augment(resize=0.5), 3, generator())
    sizes = [augmenter.images(images, torch.arange(3), 1, share).shape[2] for share in (0.0, 0.375, 0.75, 1.0)]
    assert sizes == [4, 6, 8, 8]
    assert resized(images, 1.0) is images
    assert resized(torch.full((1, 1, 8, 8), 3.0), 0.5).allclose(torch.full((1, 1, 4, 4), 3.0))


def test_mixup_mixes_inputs_and_losses():
    seen = []

    class Noting(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(x)
            return super().forward(x)

    view, module = points(40), seeded(lambda: Noting(6, 3))
    loss = fit(module, view, settings=Fit(epochs=1, batch=None, augmentation=Augment(mixup=1.0))).curve[0][1]
    torch.manual_seed(0)
    share = torch.distributions.Beta(1.0, 1.0).sample().item()
    draw = generator()
    order = torch.randperm(40, generator=draw)
    partners = torch.randperm(40, generator=draw)
    x, y = torch.from_numpy(view.inputs[0])[order], torch.from_numpy(view.labels)[order]
    mixed = share * x + (1 - share) * x[partners]
    outputs = F.linear(mixed, module.weight, module.bias)
    want = share * F.cross_entropy(outputs, y) + (1 - share) * F.cross_entropy(outputs, y[partners])
    assert torch.allclose(seen[0], mixed, atol=1e-6)
    assert loss == pytest.approx(want.item(), rel=1e-5)


def test_what_is_off_draws_nothing():
    draw = generator()
    state = draw.get_state()
    images = torch.randn(3, 1, 8, 8)
    assert Augmenter(Augment(), 3, draw).images(images, torch.arange(3), 1, 0.5) is images
    assert draw.get_state().equal(state)


def test_every_change_trains():
    settings = Fit(epochs=2, batch=32, augmentation=Augment(resize=0.75, shift=1, flip="random", cutout=2, mixup=0.2))
    assert len(fit(seeded(image), pictures(), settings=settings).curve) == 8


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"resize": 0}, r"resize must be in \(0, 1\], got 0"),
        ({"flip": "up"}, "flip must be one of"),
        ({"shift": -1}, "shift must be at least 0 pixels, got -1"),
        ({"cutout": -2}, "cutout must be at least 0 pixels, got -2"),
        ({"mixup": -0.1}, "mixup must be a finite number of at least 0, got -0.1"),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(UsageError, match=words):
        Augment(**wrong)


def test_images_are_needed():
    with pytest.raises(UsageError, match=r"this augmentation needs images .*, got \(150, 6\)"):
        fit(seeded(plain), points(), settings=Fit(augmentation=Augment(cutout=2)))
