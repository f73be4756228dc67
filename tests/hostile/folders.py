"""Hugging Face folders: an index that leads away, links, descriptions that bomb, weights that are pickles, code beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import tensors
from hostile.cases import Make, add, add_all

CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "intermediate_size": 8, "vocab_size": 12,
}  # fmt: skip
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weights() -> bytes:
    return tensors.safetensors({"w": tensors.entry(0, 24)}, bytes(24))


def folder(files: dict[str, bytes | Callable[[Path], object]], config: Any = CONFIG) -> Make:
    """A folder with a secret file of weights beside it, at ../private/secret.safetensors."""

    def make(path: Path) -> None:
        path.mkdir()
        private = path.parent / "private"
        private.mkdir()
        (private / "secret.safetensors").write_bytes(weights())
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        for name, data in {"config.json": text, **files}.items():
            if callable(data):
                data(path / name)
            else:
                (path / name).write_bytes(data)

    return make


def index(home: Any, **more: Any) -> Make:
    """Weights whose index says that they lie at `home`."""
    told = {"metadata": {}, "weight_map": home if isinstance(home, dict) else {"w": home}, **more}
    return folder({INDEX: json.dumps(told).encode(), "part.safetensors": weights()})


def soft(target: str) -> Callable[[Path], object]:
    return lambda file: file.symlink_to(target)


def hard(file: Path) -> None:
    os.link(file.parent.parent / "private" / "secret.safetensors", file)


def trapped(_: Path) -> bytes:
    return b"import os\nos.mkdir(os.environ['HASTEN_TRAP'])\nclass Evil: pass\n"


def remote(path: Path) -> None:
    """A class of transformers, and code of the folder that says it should be taken instead."""
    config = CONFIG | {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}, "custom_generate": "evil"}
    folder({WEIGHTS: weights(), "evil.py": trapped(path)}, config)(path)


AWAY = "plain relative path|none that can be read|a link or no file"
SECRET = "../private/secret.safetensors"
add_all("folder, an index to", "m", {
    "a file above": (index(SECRET), AWAY),
    "a file above, hidden": (index("./" + SECRET), AWAY),
    "a file above, in the middle": (index("a/../" + SECRET), AWAY),
    "an absolute file": (index("/etc/passwd"), AWAY),
    "a home": (index("~/secret.safetensors"), AWAY),
    "backslashes": (index("..\\private\\secret.safetensors"), AWAY),
    "a file that is not there": (index("model-00001-of-00001.safetensors"), AWAY),
    "the folder itself": (index("."), AWAY),
    "a pickle": (index("pytorch_model.bin"), AWAY),
    "itself": (index(INDEX), "no .safetensors file"),
    "the description": (index("config.json"), "no .safetensors file"),
    "a number": (index(7), 'a "weight_map" of names to files'),
    "nothing": (index({}), 'a "weight_map" of names to files'),
    "one honest file and one above": (index({"w": "part.safetensors", "v": SECRET}), AWAY),
})  # fmt: skip
add_all("folder", "m", {
    "weights behind a soft link": (folder({WEIGHTS: soft(SECRET)}), AWAY),
    "weights behind a hard link": (folder({WEIGHTS: hard}), AWAY),
    "weights that are a device": (folder({WEIGHTS: soft("/dev/zero")}), AWAY),
    "weights that are a folder": (folder({WEIGHTS: Path.mkdir}), AWAY),
    "weights that are a pipe": (folder({WEIGHTS: os.mkfifo}), AWAY),
    "an index behind a soft link": (folder({INDEX: soft("../private/secret.safetensors")}), AWAY),
    "a description behind a soft link": (folder({"real.json": json.dumps(CONFIG).encode(), "config.json": soft("real.json"), WEIGHTS: weights()}), AWAY),
    "weights of another name, above": (folder({WEIGHTS: weights()}, CONFIG | {"transformers_weights": SECRET}), AWAY),
    "weights of another name, a pickle": (folder({"adapter_model.bin": b"\x80\x02."}, CONFIG | {"transformers_weights": "adapter_model.bin"}), "as .safetensors"),
    "weights of another name, a list": (folder({WEIGHTS: weights()}, CONFIG | {"transformers_weights": [SECRET]}), "as .safetensors"),
    "a description 5,000 deep": (folder({WEIGHTS: weights()}, b'{"a":' * 5000 + b"1" + b"}" * 5000), "at most 200 levels"),
    "a key twice": (folder({WEIGHTS: weights()}, b'{"architectures": ["BertModel"], "architectures": ["Evil"]}'), "each key once"),
    "a number of 10,000 digits": (folder({WEIGHTS: weights()}, b'{"hidden_size": ' + b"9" * 10_000 + b"}"), "at most 25 digits"),
    "an index 5,000 deep": (folder({INDEX: b'{"weight_map":' * 5000 + b"1" + b"}" * 5000}), "at most 200 levels"),
    "a pickle alone": (folder({"pytorch_model.bin": b"\x80\x02."}), "as .safetensors"),
    "pickles by an index alone": (folder({"pytorch_model.bin.index.json": b'{"weight_map": {"w": "pytorch_model.bin"}}', "pytorch_model.bin": b"\x80\x02."}), "as .safetensors"),
    "an adapter alone": (folder({"adapter_config.json": b'{"base_model_name_or_path": "../private"}', "adapter_model.safetensors": weights()}), "as .safetensors"),
    "no class": (folder({WEIGHTS: weights()}, {"model_type": "bert"}), "must name one class"),
})  # fmt: skip
add("folder: code that should replace the class", "m", remote, "holds no weights that fit", reading=False)
add(
    "folder: layers of 2^40",
    "m",
    folder({WEIGHTS: weights()}, CONFIG | {"hidden_size": 2**40}),
    "cannot be opened as|memory",
    reading=False,
)
