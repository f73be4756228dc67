"""hasten makes neural networks fast and proves that they still work.

    report = hasten.optimize(model, (x, y), prove=(x_new, y_new), max_drop=0.01)

Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.applying import Applied, apply
    from hasten.core.recipe import Recipe
    from hasten.core.report import Limit, Report
    from hasten.evaluating import evaluate
    from hasten.judging import Evaluated
    from hasten.train import Fit, Trainer, optim
    from hasten.verbs import Options, load_report, optimize

__version__ = "0.1.0"
__all__ = [
    "Applied",
    "Evaluated",
    "Fit",
    "Limit",
    "Options",
    "Recipe",
    "Report",
    "Trainer",
    "apply",
    "evaluate",
    "load_report",
    "optim",
    "optimize",
]

_HOMES = {
    "Applied": "hasten.applying",
    "Evaluated": "hasten.judging",
    "Fit": "hasten.train",
    "Limit": "hasten.core.report",
    "Options": "hasten.verbs",
    "Recipe": "hasten.core.recipe",
    "Report": "hasten.core.report",
    "Trainer": "hasten.train",
    "apply": "hasten.applying",
    "evaluate": "hasten.evaluating",
    "load_report": "hasten.verbs",
    "optim": "hasten.train",
    "optimize": "hasten.verbs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"hasten has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
