"""Built-in real tasks: `names()` lists them, `load(name)` reads one. Small reference networks for them are in `networks`."""

from __future__ import annotations

from hasten.core.errors import UsageError
from hasten.tasks.images import TaskData, digits, fashion_mnist, mnist5k

__all__ = ["TaskData", "load", "names"]

_TASKS = {"digits": digits, "fashion_mnist": fashion_mnist, "mnist5k": mnist5k}


def names() -> tuple[str, ...]:
    """The built-in tasks.

    >>> names()
    ('digits', 'fashion_mnist', 'mnist5k')
    """
    return tuple(_TASKS)


def load(name: str) -> TaskData:
    """Reads a task from where its package has put it.

    Raises:
        UsageError: there is no such task.
        BackendMissing: its data is not on this machine; the message names the one command that installs it.
    """
    if name not in _TASKS:
        raise UsageError(f"expected one of the tasks {', '.join(_TASKS)}, got {name!r}")
    return _TASKS[name]()
