"""A network from a Python file of the user's: the file is run, and what its classes need travels with them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
from torch import nn

from hasten.core.errors import ModelRefused, UsageError
from hasten.core.names import nearest
from hasten.load.lower import reason

__all__ = ["from_script"]


def from_script(path: Path, name: str) -> nn.Module:
    """The network called `name` in a script, or what a class or function of that name gives. The script is run.

    Its classes, and those of files beside it that it imports, are pickled with their code, so that another process needs
    neither the script nor its folder.

    Raises:
        UsageError: there is no such file or name.
        ModelRefused: it is no network, or the script fails.
    """
    script = _run(path)
    if not hasattr(script, name):
        known = [n for n, value in vars(script).items() if _gives_network(value, script)]
        raise UsageError(f"{path} has no {name!r}; {nearest(name, known)}" if known else f"{path} has no {name!r}")
    found = getattr(script, name)
    if not isinstance(found, nn.Module):
        found = _called(found, f"{path}:{name}")
    if not isinstance(found, nn.Module):
        raise ModelRefused(f"{path}:{name} must be a torch module, or a class or function that gives one, got {type(found).__name__}")
    return found


def _run(path: Path) -> ModuleType:
    """The script as a module that pickles by value, and so do the modules of its folder that it imports."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[path.stem] = script  # pickling looks classes up there
    folder = path.resolve().parent
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(script)
    except Exception as why:  # a user's script can raise anything
        raise ModelRefused(f"{path} cannot be run: {reason(why)}") from why
    finally:
        sys.path.remove(str(folder))
    for name in {path.stem, *sys.modules} - before | {path.stem}:
        if _lies_in(sys.modules[name], folder):
            cloudpickle.register_pickle_by_value(sys.modules[name])
    return script


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return bool(file) and folder in Path(file or "").resolve().parents and "site-packages" not in Path(file or "").parts


def _gives_network(value: Any, script: ModuleType) -> bool:
    if isinstance(value, nn.Module):
        return True
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == script.__name__


def _called(make: Any, words: str) -> Any:
    if not callable(make):
        raise ModelRefused(f"{words} must be a torch module, or a class or function that gives one, got {type(make).__name__}")
    try:
        return make()
    except Exception as why:  # a user's class can raise anything
        hint = "; give a function without arguments that makes it" if isinstance(why, TypeError) else ""
        raise ModelRefused(f"{words}() fails: {reason(why)}{hint}") from why
