"""Recipes and names: what a JSON file of strangers may make Python do, and what may reach the terminal."""

from __future__ import annotations

import json
from typing import Any

from hostile.cases import Make, add_all

ENGINE = {"name": "hasten.engines.OnnxRuntime"}


def recipe(*steps: Any, engine: Any = ENGINE) -> Make:
    return lambda _: json.dumps({"steps": list(steps), "engine": engine}).encode()


def raw(text: bytes) -> Make:
    return lambda _: text


NAMED = "no step or engine named|is no step|is no engine|expected an object"
MODULES = {
    "os.system": "os.system", "subprocess.Popen": "subprocess.Popen", "a module that is not imported": "antigravity.Step", "a private room": "hasten.load.saved.load",
    "a room of ours": "hasten.core.child.Child", "a builtin": "builtins.eval", "dots": "...", "nothing": "", "a path": "../../evil.Step", "escape codes": "os\x1b[2J.system",
    "an attribute": "hasten.compress.FoldBatchNorm.__init__", "main": "__main__.Step", "an ending": "hasten.compress.FoldBatchNorm\0", "a network": "hasten.core.network.Network", "a value of ours": "hasten.core.recipe.Context",
}  # fmt: skip
add_all("recipe naming", "r.json", {n: (recipe({"name": m}), NAMED) for n, m in MODULES.items()}, door="recipe")
add_all("recipe", "r.json", {
    "a name by a list": (recipe({"name": ["os"]}), "expected an object with a `name`"),
    "a name by a number": (recipe({"name": 1}), "expected an object with a `name`"),
    "a setting that is none": (recipe({"name": "hasten.compress.FoldBatchNorm", "__class__": "os"}), "has no setting"),
    "a setting of another kind": (recipe({"name": "hasten.compress.QuantizeStatic", "weight_bits": {"a": 1}}), "must|expected|not"),
    "2^1000 bits": (recipe({"name": "hasten.compress.QuantizeStatic", "weight_bits": 2**1000}), "digits|must|bits"),
    "an engine as a step": (recipe(ENGINE), "is no step"),
    "a step as the engine": (recipe(engine={"name": "hasten.compress.FoldBatchNorm"}), "is no engine"),
    "an engine with code": (recipe(engine=ENGINE | {"provider": "__import__('os')", "code": 1}), "has no setting"),
    "100,000 deep": (raw(b'{"steps":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "JSON|recipe"),
    "a number of 10,000 digits": (raw(b'{"steps": [' + b"9" * 10_000 + b'], "engine": {}}'), "JSON|digits"),
    "a list": (raw(b"[]"), "must be a JSON object"),
    "no text": (raw(b"\xff\xfe\x00"), "JSON"),
    "empty": (raw(b""), "JSON"),
    "a key twice": (raw(b'{"steps": [], "steps": [{"name": "os.system"}], "engine": {}}'), "each key once"),
}, door="recipe")  # fmt: skip
