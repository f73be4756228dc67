"""Small seeded networks of every family that hasten treats, each with an example batch. The law tests run over all of them.

BatchNorm statistics and affine parameters are random, so that a fold which forgets one of them is seen; so are all other scales and shifts.
Shapes: images (batch, 3, 16, 16), sequences (batch, time, features), tokens (batch, time).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.core.network import Arrays, Network
from hasten.load.lower import lower, quiet

Built = tuple[nn.Module, tuple[Tensor, ...]]


class Residual(nn.Module):
    """Two convolutions and a shortcut, projected where the width or the stride changes."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or before != after
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """Expand, depthwise, squeeze-excite, project, add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = channels * 3
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6())
        self.gate = SqueezeExcite(wide)
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.gate(self.depthwise(self.expand(x))))


class Dense(nn.Module):
    """A DenseNet block: every layer reads all the layers before it."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        widths = range(channels, channels + growth * layers, growth)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, growth, 3, padding=1, bias=False) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return x


class UNet(nn.Module):
    """One level down, one up, with a skip. One map per image."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.last(torch.cat([skip, self.up(self.middle(F.max_pool2d(skip, 2)))], 1))


class Recurrent(nn.Module):
    """A recurrent layer, read at its last step."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.layer(x)
        return self.head(states[:, -1])


class Attention(nn.Module):
    """Multi-head self-attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.query_key_value(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, time, width))


class Transformer(nn.Module):
    """Tokens, learnt positions, a class token, one hand-written block; the head is tied to the embedding."""

    def __init__(self, words: int = 20, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(1, 7, width) * 0.1)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, width))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(tokens.shape[0], -1, -1), self.words(tokens)], 1) + self.places
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class Encoder(nn.Module):
    """`nn.TransformerEncoderLayer`, averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class Dilated(nn.Module):
    """One-dimensional residual blocks with growing dilation."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, channels, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv1d(channels, channels, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(3))
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.relu(norm(conv(x)))
        return self.head(x.mean(-1))


class Shared(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))))


class TwoInputs(nn.Module):
    """An image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.PReLU(8))
        self.read = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.1))
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.head(torch.cat([self.see(image).mean((2, 3)), self.read(vector)], 1))


class TwoOutputs(nn.Module):
    """A class and a box."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.label, self.box = nn.Linear(32, 5), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.label(x), self.box(x).sigmoid()


class Taken(nn.Module):
    """A model of `transformers` that gives its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def _from_transformers(kind: str, task: str, **settings: int) -> nn.Module:
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return Taken(getattr(transformers, kind + task)(getattr(transformers, f"{kind}Config")(**size | settings)))


def _images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 16, 16)


def _built(make: Callable[[], nn.Module], example: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Built]:
    def build() -> Built:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = make().eval()
            with torch.no_grad():
                _randomise(module)
            return module, example()

    return build


def _randomise(module: nn.Module) -> None:
    """Statistics, scales and shifts that are neither 0 nor 1, and differ from layer to layer."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(layer.running_mean, 0.0, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24 * 16, 10),
    )  # fmt: skip


def _pooled(channels: int, *body: nn.Module) -> nn.Module:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


NETWORKS: dict[str, Callable[[], Built]] = {
    "mlp": _built(_mlp, lambda: (torch.randn(4, 1, 8, 8),)),
    "cnn": _built(_cnn, lambda: (_images(),)),
    "resnet": _built(lambda: _pooled(16, nn.Conv2d(3, 8, 3, 1, 1), Residual(8, 8), Residual(8, 16, 2)), lambda: (_images(),)),
    "mobilenet": _built(
        lambda: _pooled(8, nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(), Inverted(8), Inverted(8)), lambda: (_images(),)
    ),
    "densenet": _built(lambda: _pooled(20, nn.Conv2d(3, 8, 3, padding=1), Dense(8, 4, 3), nn.BatchNorm2d(20)), lambda: (_images(),)),
    "unet": _built(UNet, lambda: (_images(),)),
    "lstm": _built(
        lambda: Recurrent(nn.LSTM(6, 8, 2, batch_first=True, dropout=0.1, bidirectional=True), 16), lambda: (torch.randn(4, 9, 6),)
    ),
    "gru": _built(lambda: Recurrent(nn.GRU(6, 8, batch_first=True), 8), lambda: (torch.randn(4, 9, 6),)),
    "rnn": _built(lambda: Recurrent(nn.RNN(6, 8, 2, batch_first=True, bidirectional=True), 16), lambda: (torch.randn(4, 9, 6),)),
    "encoder": _built(Encoder, lambda: (torch.randn(4, 7, 16),)),
    "transformer": _built(Transformer, lambda: (torch.randint(0, 20, (4, 6)),)),
    "dilated": _built(Dilated, lambda: (torch.randn(4, 4, 20),)),
    "shared": _built(Shared, lambda: (torch.randn(4, 12),)),
    "bert": _built(
        lambda: _from_transformers("Bert", "ForSequenceClassification", vocab_size=20, max_position_embeddings=16),
        lambda: (torch.randint(0, 20, (4, 6)),),
    ),
    "albert": _built(
        lambda: _from_transformers("Albert", "ForSequenceClassification", vocab_size=20, max_position_embeddings=16, embedding_size=8),
        lambda: (torch.randint(0, 20, (4, 6)),),
    ),
    "vit": _built(lambda: _from_transformers("ViT", "ForImageClassification", image_size=16, patch_size=4), lambda: (_images(),)),
    "two inputs": _built(TwoInputs, lambda: (_images(), torch.randn(4, 6))),
    "two outputs": _built(TwoOutputs, lambda: (_images(),)),
}

# Exporting takes seconds; these stand for the others in the short run.
QUICK = ("cnn", "lstm", "two outputs")


def network(name: str) -> Network:
    """One of them, ready for steps."""
    module, example = NETWORKS[name]()
    return Network(kind="module", body=module, example=tuple(x.numpy() for x in example))


@functools.cache
def lowered(name: str) -> Network:
    """Its graph, made once for all tests; do not write on it."""
    return lower(network(name))


@functools.cache
def program_file(name: str, rows: int | None = None) -> bytes:
    """Its `.pt2` file, for any batch or exported with `rows` examples."""
    module, example = NETWORKS[name]()
    shapes = None if rows else tuple({0: torch.export.Dim.AUTO} for _ in example)
    file = io.BytesIO()
    with quiet(), torch.no_grad():
        torch.export.save(torch.export.export(module, tuple(x[:rows] for x in example), dynamic_shapes=shapes), file)
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    """`path`, with `data` in it."""
    path.write_bytes(data)
    return path


def equal(a: Arrays, b: Arrays) -> bool:
    """Whether two networks gave the same, up to 1e-5."""
    return len(a) == len(b) and all(np.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))
