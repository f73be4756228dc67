"""`.pt2` files: pickles, size expressions, imports and operators that torch.export.load would follow."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.cases import Make, Trap, add_all
from hostile.checkpoints import archive, parts
from networks import program_file

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
Parts = dict[str, bytes]


def spoilt(change: Callable[[Parts], object]) -> Make:
    def make(_: Path) -> bytes:
        entries = parts(program_file("shared"))
        change(entries)
        return archive(entries, "model/")

    return make


def config(name: str, change: Callable[[dict[str, Any]], object]) -> Make:
    """A file with one of its descriptions changed."""

    def edit(entries: Parts) -> None:
        record = json.loads(entries[name])
        change(record)
        entries[name] = json.dumps(record).encode()

    return spoilt(edit)


def program(change: Callable[[dict[str, Any]], object]) -> Make:
    return config(MODEL, change)


def pickled_weight(entries: Parts) -> None:
    record = json.loads(entries[WEIGHTS])
    first = next(iter(record["config"].values()))
    first["use_pickle"] = True
    entries[WEIGHTS] = json.dumps(record).encode()
    entries["data/weights/" + first["path_name"]] = pickle.dumps(Trap(), 2)


def pickled_constant(entries: Parts) -> None:
    record = json.loads(entries[CONSTANTS])
    record["config"]["c"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    entries[CONSTANTS] = json.dumps(record).encode()
    entries["data/constants/opaque_obj_0"] = pickle.dumps(Trap(), 2)


def evaluated(code: str) -> Callable[[Parts], None]:
    """A size that is Python code."""

    def change(entries: Parts) -> None:
        text = entries[MODEL].decode()
        symbol = text[text.index("Symbol('") : text.index(")", text.index("Symbol('")) + 1]
        entries[MODEL] = text.replace(f'"expr_str": "{symbol}"', f'"expr_str": {json.dumps(code)}').encode()

    return change


def first_weight(change: Callable[[dict[str, Any]], object]) -> Make:
    return config(WEIGHTS, lambda record: change(next(iter(record["config"].values()))))


def first_node(record: dict[str, Any]) -> dict[str, Any]:
    return record["graph_module"]["graph"]["nodes"][0]


def aimed(target: str) -> Make:
    return program(lambda p: first_node(p).update(target=target))


def signature(record: dict[str, Any]) -> dict[str, Any]:
    return record["graph_module"]["module_call_graph"][0]["signature"]


def treed(kind: str, context: str = "null") -> Make:
    tree = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
    return program(lambda p: signature(p).update(in_spec=tree))


def sized(value: int) -> Make:
    """Every fixed size of the weights becomes `value`."""
    return first_weight(lambda w: [s.update(as_int=value) for s in w["tensor_meta"]["sizes"]])


CALL = "__import__('os').mkdir('trap')"
SIZES = "expected arithmetic on sizes, got"
OWN = "own operators only"
TREES = "tuples, lists or dicts, got"
READ = "no exported program|expected"
add_all("program", "m.pt2", {
    "a pickled weight": (spoilt(pickled_weight), "as pickled data, which could run code: not opened"),
    "a pickled constant": (spoilt(pickled_constant), "as pickled data, which could run code: not opened"),
    "code as a size": (spoilt(evaluated(CALL)), SIZES),
    "code in a lambda": (spoilt(evaluated("(lambda: 1)()")), SIZES),
    "code by attributes": (spoilt(evaluated("Symbol('s77').__class__")), SIZES),
    "code by subscripts": (spoilt(evaluated("[Symbol('s77')][0]")), SIZES),
    "code in a walrus": (spoilt(evaluated("(s77 := 1)")), SIZES),
    "a size of 9 ** 9 ** 9": (spoilt(evaluated("Pow(9, Pow(9, 9))")), SIZES + "|small numbers"),
    "a size 10,000 deep": (spoilt(evaluated("(" * 10_000 + "s77" + ")" * 10_000)), READ),
    "a size of 1 << 2^40": (spoilt(evaluated("1 << 1099511627776")), SIZES + "|small numbers"),
    "a shell": (aimed("torch.os.system"), OWN),
    "a file": (aimed("torch.ops.aten.from_file.default"), OWN),
    "a library": (aimed("torch.ops.load_library"), OWN),
    "another package": (aimed("torch.ops.evil.run.default"), OWN),
    "a builtin": (aimed("builtins.eval"), OWN),
    "an attribute of an operator": (aimed("torch.ops.aten.add.__globals__"), OWN),
    "a loop": (aimed("torch.ops.higher_order.while_loop"), OWN),
    "escape codes": (aimed("\x1b[2J"), OWN),
    "an import": (treed("collections.defaultdict"), TREES),
    "an import of os": (treed("os.system"), TREES),
    "an enum": (treed("builtins.dict", '{"__enum__": true}'), "plain keys"),
    "a tree 5,000 deep": (program(lambda p: signature(p).update(in_spec='[1, {"type": "builtins.tuple", "context": "null", "children_spec": [' + '{"type": "builtins.tuple", "context": "null", "children_spec": [' * 5000 + "]}" * 5000 + "]}]")), "at most 200 levels|no exported program"),
    "a custom object": (program(lambda p: first_node(p)["inputs"][0].update(arg={"as_custom_obj": {"name": "x", "class_fqn": "a"}})), "a custom class"),
    "weights elsewhere": (first_weight(lambda w: w.update(path_name="../../etc/passwd")), "could run code|own operators|expected plain"),
    "weights by a path": (first_weight(lambda w: w.update(path_name="/etc/passwd")), "expected plain"),
    "weights of 2^40": (sized(2**40), READ),
    "weights of −1": (sized(-1), READ),
    "strides of 2^40": (first_weight(lambda w: [s.update(as_int=2**40) for s in w["tensor_meta"]["strides"]]), READ),
    "negative strides": (first_weight(lambda w: [s.update(as_int=-1) for s in w["tensor_meta"]["strides"]]), READ),
    "a start far outside": (first_weight(lambda w: w["tensor_meta"].update(storage_offset={"as_int": 2**40})), READ),
    "a type that is none": (first_weight(lambda w: w["tensor_meta"].update(dtype=10**6)), READ),
    "short weights": (spoilt(lambda e: e.update({"data/weights/weight_0": b"1234"})), READ),
    "no weights": (spoilt(lambda e: e.pop("data/weights/weight_0")), READ),
    "another format": (spoilt(lambda e: e.update(archive_format=b"pt9")), "format pt2"),
    "a list": (spoilt(lambda e: e.update({MODEL: b"[]"})), "expected an object"),
    "a key twice": (spoilt(lambda e: e.update({MODEL: e[MODEL][:-1] + b', "graph_module": 1}'})), "each key once"),
    "JSON 100,000 deep": (spoilt(lambda e: e.update({MODEL: b'{"a":' * 100_000 + b"1" + b"}" * 100_000})), "at most 200 levels"),
    "a number of 4,000 digits": (program(lambda p: p.update(schema_version={"major": 10**4000})), "at most 25 digits"),
    "2^20 nodes": (program(lambda p: p["graph_module"]["graph"].update(nodes=[{}] * 2**20)), "at most 200000 nodes"),
    "empty": (lambda _: b"", "no zip archive"),
    "garbage": (lambda _: bytes(range(256)) * 40, "no zip archive"),
    "a pickle": (lambda _: pickle.dumps({"a": 1}), "no zip archive"),
    "another zip": (lambda _: archive({"a": b"1"}, "model/"), "holds no program called model"),
})  # fmt: skip
add_all("program", "m.pt2", {
    "pickled samples": (spoilt(lambda e: e.update({SAMPLES: pickle.dumps(Trap(), 2)})), ""),
    "old weights": (spoilt(lambda e: e.update({"data/weights/model.pt": pickle.dumps(Trap(), 2)})), ""),
    "guards": (program(lambda p: p.update(guards_code=[CALL])), ""),
    "code as metadata": (program(lambda p: first_node(p).update(metadata={"stack_trace": "\x1b[2J", "torch_fn": CALL, "custom": CALL})), ""),
}, reading=False)  # fmt: skip
