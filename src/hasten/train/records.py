"""What a training tells while it runs, and what is kept of it: one line of JSON per step, and events for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from hasten.core.errors import BackendMissing, StorageError
from hasten.core.folder import storage


@dataclass(frozen=True, kw_only=True)
class Record:
    """One optimizer step.

    Args:
        step: counted from 1.
        steps: planned: the length of the schedule.
        batch: examples in the step over all parts and machines, the global batch.
        epoch: passes over the data, a fraction.
        loss: of the step, before it.
        rate: the learning rate.
        norm: of the whole gradient before clipping.
        seconds: since the training began.
        validation: loss on the validation data, where they were looked at behind this step.
        accuracy: on the validation data, where the loss is of classes.
        layers: root mean square of each layer's gradient, where it was looked at.
        trial: what is tried out, where this is a step of a search for the learning rate; such steps are in no log.
    """

    step: int
    steps: int
    batch: int
    epoch: float
    loss: float
    rate: float
    norm: float
    seconds: float
    validation: float | None = None
    accuracy: float | None = None
    layers: dict[str, float] = field(default_factory=dict)
    trial: str = ""

    def to_json(self) -> str:
        """One line, without what was not looked at."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps({name: value for name, value in values.items() if value not in (None, {}, "")})

    @property
    def left_s(self) -> float:
        """Seconds until the end, if all steps take as long as those so far."""
        return self.seconds / max(1, self.step) * (self.steps - self.step)


Watcher = Callable[[Record], None]


def silent(record: Record) -> None:
    """Listens and does nothing."""
    del record


def together(*watchers: Watcher) -> Watcher:
    """All of them, in their order."""

    def tell(record: Record) -> None:
        for watcher in watchers:
            watcher(record)

    return tell


class Log:
    """A watcher that writes one line of JSON per step. A training that is taken up again writes over what it does again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = False

    def __call__(self, record: Record) -> None:
        """Writes the record."""
        if record.trial:
            return
        with storage(self._path.parent):
            if not self._begun:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                known = read(self._path) if self._path.exists() else []
                self._path.write_text("".join(one.to_json() + "\n" for one in known if one.step < record.step))
                self._begun = True
            with open(self._path, "a") as file:
                file.write(record.to_json() + "\n")


def read(path: Path) -> list[Record]:
    """The records of a log; a last line that was cut off is left out. Raises StorageError on any other damage."""
    found = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            found.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as why:
            if number < len(lines):
                raise StorageError(f"line {number} of {path} is no record: {why}") from why
    return found


class TensorBoard:
    """A watcher that writes events for TensorBoard into a folder. Raises BackendMissing where its package is not here."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as why:
            raise BackendMissing("events for TensorBoard need its package; pip install 'hasten[tensorboard]'") from why
        self._writer = SummaryWriter(str(folder))

    def __call__(self, record: Record) -> None:
        """Writes the record."""
        if record.trial:
            return
        for name in ("loss", "rate", "norm", "validation", "accuracy"):
            if getattr(record, name) is not None:
                self._writer.add_scalar(name, getattr(record, name), record.step)
        for layer, norm in record.layers.items():
            self._writer.add_scalar(f"gradient/{layer}", norm, record.step)

    def close(self) -> None:
        """Puts the last events on disk; without it they wait up to two minutes, and are lost when the process ends before."""
        self._writer.close()
