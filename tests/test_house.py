"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hasten"
FILES = sorted(SOURCE.rglob("*.py"))

DOOR = {"__init__", "testing", "verbs", "applying", "demo", "racing", "prepare", "live", "training"}
DOOR |= {"inspecting", "advice", "doctor", "evaluating", "judging", "exporting"}
# From the top down; a room imports from the rows below its own, and from itself.
ROWS = [
    {"cli", "__main__", "words"},
    DOOR,
    {"presets"},
    {"search", "report"},
    {"compress", "engines", "explain", "privacy", "federated"},
    {"train"},
    {"measure", "load", "tasks", "distributed"},
    {"core"},
]
# The door's files are one room; so are the two of the command line.
TOGETHER = [DOOR, {"cli", "__main__", "words"}]
LONGEST_FILE, LONGEST_FUNCTION, DEEPEST, MOST_PARAMETERS = 400, 60, 3, 7


def room(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def row(name: str) -> int:
    return next(i for i, names in enumerate(ROWS) if name in names)


def imported(tree: ast.AST) -> set[str]:
    """The rooms that a file imports, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hasten":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
            found |= {n if any(n in names_ for names_ in ROWS) else "__init__" for n in names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hasten.")}
    return found


def strangers(file: str, source: str) -> set[str]:
    """The rooms that `file` must not import and does."""
    home = room(SOURCE / file)
    family = next((names for names in TOGETHER if home in names), {home})
    return {r for r in imported(ast.parse(source)) if r not in family and row(r) <= row(home) and r != "__init__"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_rooms_import_downwards(file: Path) -> None:
    assert not strangers(str(file.relative_to(SOURCE)), file.read_text())


def test_the_import_rule_catches_a_fault() -> None:
    assert strangers("core/x.py", "def f():\n    from hasten.measure import timing") == {"measure"}
    assert strangers("load/x.py", "import hasten.measure.timing") == {"measure"}
    assert strangers("search/x.py", "from hasten.report import html") == {"report"}
    assert not strangers("search/x.py", "from hasten.core import folder")


def oversized(source: str) -> list[str]:
    """What is longer, deeper or wider than the house allows."""
    found = []
    lines = len(source.splitlines())
    if lines > LONGEST_FILE:
        found.append(f"file of {lines} lines")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = (node.end_lineno or 0) - node.lineno + 1
        if length > LONGEST_FUNCTION:
            found.append(f"{node.name}: {length} lines")
        if (depth := _depth(node)) > DEEPEST:
            found.append(f"{node.name}: nested {depth} deep")
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([a for a in arguments if a not in ("self", "cls")])
        if not node.name.startswith("_") and count > MOST_PARAMETERS:
            found.append(f"{node.name}: {count} parameters")
    return found


def _depth(node: ast.AST) -> int:
    """How deep control flow is nested inside a function; an elif is no deeper than its if."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
                continue
            flat = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            step = isinstance(child, (ast.For, ast.While, ast.If, ast.With, ast.Try)) and not flat
            deepest = max(deepest, _depth(child) + step)
    return deepest


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_size_limits(file: Path) -> None:
    found = oversized(file.read_text())
    if file.name in ("cli.py", "prepare.py", "recurrence.py"):  # commands, what they hand to a child as JSON, what an exporter calls
        found = [f for f in found if "parameters" not in f]
    assert not found


def test_the_size_rule_catches_a_fault() -> None:
    assert oversized("x = 1\n" * 401) == ["file of 401 lines"]
    assert oversized("def f(a, b, c, d, e, f, g, h): ...") == ["f: 8 parameters"]
    assert oversized("def f():\n" + "    x = 1\n" * 60) == ["f: 61 lines"]
    deep = "def f():\n for a in b:\n  if a:\n   while a:\n    if b: pass"
    assert oversized(deep) == ["f: nested 4 deep"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_all_is_sorted_and_exists(file: Path) -> None:
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(names)


def test_every_public_file_and_function_says_what_it_does() -> None:
    bare = []
    for file in FILES:
        tree = ast.parse(file.read_text())
        if not ast.get_docstring(tree):
            bare.append(str(file.relative_to(SOURCE)))
        public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
        bare += [f"{file.relative_to(SOURCE)}:{n.name}" for n in public if not ast.get_docstring(n)]
    assert not bare


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(chr(10).join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {line.split(".")[0] for line in done.stdout.splitlines()}


HELP = "from hasten.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
OPTIONAL = {"pandas", "pyarrow", "PIL", "mlxtend", "nncf", "sklearn", "optuna", "ray", "captum", "keras", "tensorflow"}
HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "scipy"}


@pytest.mark.parametrize("code", ["import hasten", HELP], ids=["import", "help"])
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    assert not modules_after(code) & (HEAVY | OPTIONAL)


def test_the_import_check_sees_an_import() -> None:
    assert "scipy" in modules_after("import scipy")


@pytest.mark.parametrize("name", ["core", "compress", "engines", "load", "measure", "search", "report", "train", "tasks"])
def test_no_room_needs_an_optional_package(name: str) -> None:
    assert not modules_after(f"import hasten.{name}") & OPTIONAL


def test_no_file_is_named_for_nothing() -> None:
    for file in FILES:
        assert not {"utils", "helpers", "misc", "common", "manager", "handler"} & set(file.stem.split("_")), file
