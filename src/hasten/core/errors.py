"""What can go wrong, one class for each exit code of the command line (docs/format.md lists the codes)."""

from __future__ import annotations

import unicodedata

_LONGEST = 2000


class HastenError(Exception):
    """Root of the tree. Its message is one line: what was expected, what came, what to do.

    Names out of a stranger's file stand in messages, so nothing in one moves a cursor, colours a terminal or turns the line round.
    """

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(HastenError, ValueError):
    """The caller's words or data cannot be used."""

    exit_code = 2


class DataRefused(UsageError):
    """The data cannot be used as it is: empty, NaN, one class, labels outside the classes, shapes that differ."""


class ModelRefused(HastenError):
    """The network could not be opened or does not run on its example."""

    exit_code = 4


class BackendMissing(HastenError):
    """An optional package or a processor feature that was asked for is not here."""

    exit_code = 5


class OutOfResources(HastenError):
    """Memory or time ran out in a place where the run cannot go on without."""

    exit_code = 6


class RunLocked(HastenError):
    """Another process holds the run folder."""

    exit_code = 73


class StorageError(HastenError):
    """A file could not be written or read: disk full, no permission, a damaged run folder."""

    exit_code = 74


class Unsupported(HastenError):
    """A step or an engine cannot treat this network. The trial records the reason and the search goes on."""


class ChildFailed(HastenError):
    """Code in a guarded child process raised, crashed, hung or outgrew its memory."""


class ChildRaised(ChildFailed):
    """Code in a guarded child raised what is no error of ours; the child lives on."""


class WorkerLost(ChildFailed):
    """A machine or its worker went away in the middle of its work; another one may do it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a run, with the report so far; the same call goes on from there."""

    def __init__(self, report: object) -> None:
        super().__init__("interrupted")
        self.report = report


def named(name: str, message: str) -> HastenError:
    """The error of class `name` if it is one of this tree, else ChildFailed with the name in front of the message.

    >>> named("Unsupported", "no convolution")
    Unsupported('no convolution')
    >>> named("KeyError", "'w'")
    ChildRaised("KeyError: 'w'")
    """
    found = {cls.__name__: cls for cls in _tree(HastenError)}.get(name)
    return found(message) if found else ChildRaised(f"{name}: {message}")


def one_line(text: str) -> str:
    r"""`text` in one line of at most 2,000 characters, with control, direction and unassigned characters as escapes.

    >>> one_line("cat\x1b[31m\u202e\nx")
    'cat\\x1b[31m\\u202e x'
    """
    kept = "".join(ascii(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in " ".join(text.split()))
    return kept if len(kept) <= _LONGEST else kept[: _LONGEST - 1] + "…"


def _tree(root: type[HastenError]) -> list[type[HastenError]]:
    return [root, *(cls for child in root.__subclasses__() for cls in _tree(child))]
