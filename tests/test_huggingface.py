"""Hugging Face folders: the common tasks, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.core.errors import DataRefused, ModelRefused
from hasten.load import saved
from hasten.load.files import open_network
from hasten.load.lower import forward, lower
from hasten.load.program import export_program
from hostile import folders
from networks import equal

transformers = pytest.importorskip("transformers")

INDEX = "model.safetensors.index.json"
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IDS = np.array([[2, 3, 4, 5, 1], [6, 7, 1, 0, 0], [3, 3, 9, 1, 0]])
MASK = (IDS > 0).astype(np.int64)
KINDS = {
    "text": ("BertForSequenceClassification", "BertConfig", {**SMALL, "vocab_size": 12, "num_labels": 3}),
    "tokens": (
        "DistilBertForTokenClassification",
        "DistilBertConfig",
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 12},
    ),
    "features": ("RobertaModel", "RobertaConfig", {**SMALL, "vocab_size": 12, "max_position_embeddings": 12}),
    "images": ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 3}),
    "convolutions": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 3},
    ),
}


def write(folder: Path, kind: str) -> Any:
    name, config, settings = KINDS[kind]
    torch.manual_seed(0)
    module = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    module.save_pretrained(folder)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_opens_and_gives_what_transformers_gives(kind: str, tmp_path: Path) -> None:
    module = write(tmp_path, kind)
    images = kind in ("images", "convolutions")
    example = (np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32),) if images else (IDS, MASK)
    network = open_network(tmp_path, example)
    assert network.fixed_batch is None
    with torch.no_grad():
        tensors = [torch.from_numpy(a) for a in example]
        wanted = module(tensors[0]) if images else module(input_ids=tensors[0], attention_mask=tensors[1])
    assert equal(forward(network, example)[:1], (wanted[0].numpy(),))


def test_another_process_can_read_it(tmp_path: Path) -> None:
    write(tmp_path / "model", "text")
    network = open_network(tmp_path / "model", (IDS, MASK))
    saved.save(network, tmp_path / "saved")
    again = saved.load(tmp_path / "saved")
    assert again.open_axes == ((1,), (1,))
    assert equal(forward(again, (IDS, MASK)), forward(network, (IDS, MASK)))


def test_its_program_is_read_without_transformers(tmp_path: Path) -> None:
    write(tmp_path / "model", "features")
    network = open_network(tmp_path / "model", (IDS, MASK))
    torch.export.save(export_program(network), tmp_path / "model.pt2")
    np.save(tmp_path / "wanted.npy", forward(network, (IDS, MASK))[0])
    code = (
        "import sys, torch, numpy as np; "
        f"made = torch.export.load(r'{tmp_path}/model.pt2').module()(*map(torch.tensor, ({IDS.tolist()}, {MASK.tolist()}))); "
        f"assert 'transformers' not in sys.modules; np.testing.assert_allclose(made[0].detach(), np.load(r'{tmp_path}/wanted.npy'), atol=1e-5)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_data_an_example_is_made_up(tmp_path: Path) -> None:
    write(tmp_path, "text")
    assert [a.shape for a in open_network(tmp_path).example] == [(2, 16), (2, 16)]


def test_arrays_with_names_are_given_by_them(tmp_path: Path) -> None:
    write(tmp_path, "text")
    plain = open_network(tmp_path, (IDS, MASK))
    turned = open_network(tmp_path, (MASK, IDS), ("attention_mask", "input_ids"))
    assert equal(forward(plain, plain.example), forward(turned, turned.example))
    assert len(open_network(tmp_path, (IDS,)).example) == 1
    with pytest.raises(DataRefused, match=r"takes input_ids, attention_mask, token_type_ids, got 4 arrays"):
        open_network(tmp_path, (IDS, MASK, MASK, MASK))


@pytest.mark.long
def test_lowers_with_the_mask(tmp_path: Path) -> None:
    write(tmp_path, "text")
    network = open_network(tmp_path, (IDS, MASK))
    assert network.open_axes == ((1,), (1,))
    graph = lower(network)
    for example in (network.example, (IDS[:2, :3], MASK[:2, :3])):
        assert equal(forward(graph, example), forward(network, example))


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}},
            r"names the class 'Evil', which transformers .* does not have; code of the folder is not run",
        ),
        ({"architectures": ["os.system"]}, "names the class 'os.system'"),
        ({"architectures": ["AutoTokenizer"]}, "names the class 'AutoTokenizer'"),
        ({"architectures": []}, "must name one class"),
        ({"hidden_size": 18}, "holds no weights that fit"),
        ({"num_hidden_layers": 2}, r"holds no weights that fit for 16 parameters"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(tmp_path, "text")
    edited(tmp_path, **changes)
    with pytest.raises(ModelRefused, match=words):
        open_network(tmp_path, (IDS, MASK))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="expected a folder of Hugging Face"):
        open_network(tmp_path)
    (tmp_path / "m.mlpackage").mkdir()
    with pytest.raises(ModelRefused, match="is of CoreML, which runs on Apple's systems alone"):
        open_network(tmp_path / "m.mlpackage")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelRefused, match="expected JSON in"):
        open_network(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelRefused, match=r"must hold its weights as .safetensors; write them with model.save_pretrained"):
        open_network(tmp_path)


def sharded(folder: Path) -> dict[str, str]:
    """A network whose weights lie in several files; the files by the names of the weights."""
    name, config, settings = KINDS["text"]
    module = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    module.save_pretrained(folder, max_shard_size="4KB")
    homes: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(set(homes.values())) > 1
    return homes


def test_weights_in_several_files_are_opened(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"none of the network's")
    told = json.loads((tmp_path / INDEX).read_text())
    first = next(iter(told["weight_map"].values()))
    (tmp_path / "part").mkdir()
    (tmp_path / first).rename(tmp_path / "part" / first)
    told["weight_map"] = {n: f"part/{f}" if f == first else f for n, f in told["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(told))
    assert open_network(tmp_path, (IDS, MASK)).open_axes == ((1,), (1,))


def test_an_index_leads_to_no_file_outside(tmp_path: Path) -> None:
    homes = sharded(tmp_path / "given")
    (tmp_path / "private").mkdir()
    moved = next(iter(homes.values()))
    (tmp_path / "given" / moved).rename(tmp_path / "private" / moved)
    told = {"metadata": {}, "weight_map": {n: f"../private/{f}" if f == moved else f for n, f in homes.items()}}
    (tmp_path / "given" / INDEX).write_text(json.dumps(told))
    with pytest.raises(ModelRefused, match="named by a plain relative path"):
        open_network(tmp_path / "given", (IDS, MASK))


def test_transformers_sees_the_checked_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = write(tmp_path, "text")
    for name in ("adapter_config.json", "generation_config.json", "pytorch_model.bin", "evil.py"):
        (tmp_path / name).write_text("{}")
    seen: list[set[str]] = []
    opened = type(module).from_pretrained.__func__

    def spy(kind: Any, place: str, **how: Any) -> Any:
        seen.append({p.name for p in Path(place).iterdir()})
        return opened(kind, place, **how)

    monkeypatch.setattr(type(module), "from_pretrained", classmethod(spy))
    network = open_network(tmp_path, (IDS, MASK))
    assert seen == [{"config.json", "model.safetensors"}]
    assert network.module


def test_code_of_a_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "given", "text")
    monkeypatch.setenv("HASTEN_TRAP", str(tmp_path / "trap"))
    (tmp_path / "given" / "evil.py").write_bytes(folders.trapped(tmp_path))
    edited(tmp_path / "given", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    assert open_network(tmp_path / "given", (IDS, MASK)).module
    assert not (tmp_path / "trap").exists()


def test_weights_of_another_name_are_found(tmp_path: Path) -> None:
    write(tmp_path, "text")
    (tmp_path / "model.safetensors").rename(tmp_path / "mine.safetensors")
    edited(tmp_path, transformers_weights="mine.safetensors")
    assert open_network(tmp_path, (IDS, MASK)).module
