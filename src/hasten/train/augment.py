"""Random changes to a batch of images that leave what they show alone.

Shapes: images (batch, channels, height, width).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def shift(images: torch.Tensor, *, most: int, generator: torch.Generator) -> torch.Tensor:
    """Moves each image by its own whole number of pixels in [−most, most] along both axes, all 2·most + 1 equally likely.

    The edge is repeated into the room that opens, so a background keeps its value whatever the normalisation.

    >>> import torch
    >>> image = torch.arange(9.0).reshape(1, 1, 3, 3)
    >>> shift(image, most=0, generator=torch.Generator()).equal(image)
    True
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (batch, channels, places, places, height, width)
    down, right = torch.randint(2 * most + 1, (2, batch), generator=generator)
    return windows[torch.arange(batch), :, down, right]
