"""Whether a network is right as often as it says."""

from __future__ import annotations

import numpy as np

from hasten.core.data import Array


def calibration_error(probabilities: Array, labels: Array, *, bins: int = 15) -> float:
    """Expected calibration error: Σ over the bins of n_b/n · |share right − mean confidence|, confidences in `bins` equal widths.

    0 for a network that is right in 70 of 100 answers that it is 70 % sure of. Few examples make it larger than it is: a bin of m
    answers is off by about √(p(1−p)/m) by chance.

    Args:
        probabilities: (n, classes), rows that sum to 1; labels: (n,) classes.

    Reference:
        C. Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599.

    >>> calibration_error(np.array([[0.7, 0.3]] * 10), np.array([0] * 7 + [1] * 3))
    0.0
    """
    sure, right = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels
    at = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(at, weights=right, minlength=bins) - np.bincount(at, weights=sure, minlength=bins)
    return round(float(np.abs(gaps).sum() / len(labels)), 12)
