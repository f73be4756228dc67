"""Which examples the next step learns from, with a place that can be put down and taken up again."""

from __future__ import annotations

from typing import Any

import torch


class Sampler:
    """Indices without end: one new order per pass, without its incomplete last batch; all at once where there are fewer.

    Args:
        examples: in the data.
        size: of a batch.
        generator: of the orders.
        chances: (examples,) to be drawn, with replacement; None takes each example once per pass.
    """

    def __init__(self, examples: int, size: int, generator: torch.Generator, chances: torch.Tensor | None = None) -> None:
        self.size = min(size, examples)
        self.passes = 0  # begun
        self._examples, self._generator, self._chances = examples, generator, chances
        self._order = torch.empty(0, dtype=torch.long)
        self._at = 0

    @property
    def per_pass(self) -> int:
        """Batches in a pass."""
        return self._examples // self.size

    @property
    def done(self) -> int:
        """Passes that are finished."""
        return self.passes if self._at == len(self._order) else self.passes - 1

    def __next__(self) -> torch.Tensor:
        if self._at == len(self._order):
            self._order, self._at = self._draw(), 0
            self.passes += 1
        self._at += self.size
        return self._order[self._at - self.size : self._at]

    def _draw(self) -> torch.Tensor:
        if self._chances is None:
            order = torch.randperm(self._examples, generator=self._generator)
        else:
            order = torch.multinomial(self._chances, self._examples, replacement=True, generator=self._generator)
        return order[: self.per_pass * self.size]

    def state(self) -> dict[str, Any]:
        """Where it stands; the generator's state is kept by its owner."""
        return {"order": self._order, "at": self._at, "passes": self.passes}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self._order, self._at, self.passes = state["order"], state["at"], state["passes"]
