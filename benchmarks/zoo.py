"""Architectures for `benchmarks/architectures.py`: small, with random weights, from `transformers` and written out here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Built = tuple[nn.Module, Tensor]


class Taken(nn.Module):
    """A model of `transformers` that gives one of its outputs."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(x), self.key)  # type: ignore[no-any-return]


class Apply(nn.Module):
    """A function of some modules: a block in one line."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


def conv(before: int, after: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


def image_net(*body: nn.Module, width: int) -> Built:
    """A stem, the body, and a head, for images of 32 × 32."""
    return nn.Sequential(conv(3, 16), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)), torch.randn(2, 3, 32, 32)


def shuffle(x: Tensor) -> Tensor:
    """Channels of two groups, interleaved."""
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffled_halves(x: Tensor, branch: nn.Module) -> Tensor:
    """ShuffleNet v2: one half goes through, both are interleaved."""
    left, right = x.chunk(2, 1)
    return shuffle(torch.cat([left, branch(right)], 1))


def hierarchical(x: Tensor, *convs: nn.Module) -> Tensor:
    """Res2Net: each part adds to the next one."""
    parts = list(x.chunk(len(convs) + 1, 1))
    for i, layer in enumerate(convs):
        parts[i + 1] = layer(parts[i + 1] + (parts[i] if i else 0))
    return torch.cat(parts, 1) + x


def gated(x: Tensor, reduce: nn.Module, expand: nn.Module) -> Tensor:
    """Squeeze and excite."""
    return x * torch.sigmoid(expand(F.relu(reduce(F.adaptive_avg_pool2d(x, 1)))))


def mixed(x: Tensor, tokens: nn.Module, channels: nn.Module) -> Tensor:
    """MLP-Mixer: over places, then over channels."""
    x = x + tokens(x.transpose(1, 2)).transpose(1, 2)
    return x + channels(x)


def ghost(x: Tensor, main: nn.Module, cheap: nn.Module) -> Tensor:
    """GhostNet: half of the channels from the other half."""
    made = main(x)
    return torch.cat([made, cheap(made)], 1)


def stepwise(x: Tensor, cell: nn.LSTMCell) -> Tensor:
    """The last state of a cell that is called step by step."""
    state = cells = x.new_zeros(len(x), cell.hidden_size)
    for t in range(x.shape[1]):
        state, cells = cell(x[:, t], (state, cells))
    return state


def last_of(x: Tensor, layer: nn.Module) -> Tensor:
    """The last step of a recurrent layer."""
    return layer(x)[0][:, -1]  # type: ignore[no-any-return]


def dense_block(before: int, growth: int, layers: int) -> nn.Sequential:
    """DenseNet: each layer reads all before it."""
    return nn.Sequential(
        *(Apply(lambda x, f: torch.cat([x, f(x)], 1), conv(before + i * growth, growth)) for i in range(layers)),
    )


def residual(*layers: nn.Module) -> Apply:
    """x + f(x)."""
    return Apply(lambda x, f: F.relu(x + f(x)), nn.Sequential(*layers))


def mixer(width: int = 32, places: int = 16) -> Built:
    """Patches and two mixing blocks."""

    def mlp(size: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

    blocks = [Apply(mixed, mlp(places, 64), mlp(width, 96)) for _ in range(2)]
    stem = nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.Flatten(2))
    net = nn.Sequential(stem, Apply(lambda x: x.transpose(1, 2)), *blocks, Apply(lambda x: x.mean(1)), nn.Linear(width, 10))
    return net, torch.randn(2, 3, 32, 32)


def unet() -> Built:
    """Down twice, up twice, with skips."""

    def forward(
        x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, up: nn.Module, d: nn.Module, up2: nn.Module, last: nn.Module
    ) -> Tensor:
        one = a(x)
        two = b(F.max_pool2d(one, 2))
        deep = c(F.max_pool2d(two, 2))
        middle = d(torch.cat([two, up(deep)], 1))
        return last(torch.cat([one, up2(middle)], 1))  # type: ignore[no-any-return]

    ups = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
    parts = conv(3, 16), conv(16, 32), conv(32, 64), ups[0], conv(64, 32), ups[1], nn.Conv2d(32, 2, 1)
    return Apply(forward, *parts), torch.randn(2, 3, 32, 32)


def temporal() -> Built:
    """Dilated 1-D convolutions with residuals."""

    def layer(dilation: int) -> nn.Module:
        inner = nn.Sequential(nn.Conv1d(32, 64, 3, padding=dilation, dilation=dilation), nn.ReLU(), nn.Conv1d(64, 32, 1))
        return Apply(lambda x, f: x + f(x), inner)

    net = nn.Sequential(nn.Conv1d(8, 32, 1), *(layer(2**i) for i in range(4)), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5))
    return net, torch.randn(2, 8, 50)


def own() -> dict[str, Callable[[], Built]]:
    """The architectures written out here."""
    se = lambda c: Apply(gated, nn.Conv2d(c, c // 4, 1), nn.Conv2d(c // 4, c, 1))  # noqa: E731
    inception = lambda x, *branches: torch.cat([b(x) for b in branches], 1)  # noqa: E731
    attention = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return {
        "MLP": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(2, 1, 28, 28)),
        "VGG": lambda: (nn.Sequential(conv(3, 16), conv(16, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)), torch.randn(2, 3, 32, 32)),
        "ResNeXt": lambda: image_net(residual(conv(16, 32, 1), conv(32, 32, groups=4), nn.Conv2d(32, 16, 1)), width=16),
        "SE-ResNet": lambda: image_net(residual(conv(16, 32), nn.Conv2d(32, 16, 3, padding=1), se(16)), width=16),
        "ShuffleNet": lambda: image_net(Apply(shuffled_halves, nn.Sequential(conv(8, 8, 1), conv(8, 8, 3, groups=8), conv(8, 8, 1))), conv(16, 32), width=32),
        "Res2Net": lambda: image_net(conv(16, 32, 1), Apply(hierarchical, *(conv(8, 8) for _ in range(3))), width=32),
        "Inception": lambda: image_net(Apply(inception, conv(16, 8, 1), nn.Sequential(conv(16, 8, 1), conv(8, 16, 3)), nn.Sequential(conv(16, 8, 1), conv(8, 8, 5))), conv(32, 32), width=32),
        "SqueezeNet": lambda: image_net(conv(16, 8, 1), Apply(inception, conv(8, 16, 1), conv(8, 16, 3)), width=32),
        "DenseNet": lambda: image_net(dense_block(16, 8, 4), conv(48, 24, 1), dense_block(24, 8, 3), width=48),
        "GhostNet": lambda: image_net(Apply(ghost, conv(16, 16, 1), conv(16, 16, 3, groups=16)), conv(32, 32, 1), width=32),
        "RepVGG": lambda: image_net(Apply(lambda x, a, b, c: F.relu(a(x) + b(x) + c(x)), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)), width=16),
        "U-Net": unet,
        "MLP-Mixer": mixer,
        "dilated 1-D ResNet": temporal,
        "PReLU and GroupNorm": lambda: image_net(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.PReLU(32), width=32),
        "nn.TransformerEncoder": lambda: (nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(attention, 2, enable_nested_tensor=False), Apply(lambda x: x.mean(1)), nn.Linear(32, 4)), torch.randn(2, 9, 8)),
        "LSTM, 2 layers": lambda: (nn.Sequential(Apply(last_of, nn.LSTM(8, 32, 2, batch_first=True)), nn.Linear(32, 4)), torch.randn(2, 12, 8)),
        "RNN, two layers": lambda: (nn.Sequential(Apply(last_of, nn.RNN(8, 32, 2, batch_first=True)), nn.Linear(32, 4)), torch.randn(2, 12, 8)),
        "LSTMCell": lambda: (nn.Sequential(Apply(stepwise, nn.LSTMCell(8, 32)), nn.Linear(32, 4)), torch.randn(2, 6, 8)),
        "GRU, two ways": lambda: (nn.Sequential(Apply(last_of, nn.GRU(8, 32, batch_first=True, bidirectional=True)), nn.Linear(64, 4)), torch.randn(2, 12, 8)),
    }  # fmt: skip


def transformers() -> dict[str, Callable[[], Built]]:
    """The architectures of `transformers`, each made small by its configuration."""
    import transformers as t

    text: dict[str, Any] = {"vocab_size": 99, "max_position_embeddings": 32}
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    patches = {**wide, "image_size": 64, "patch_size": 16}
    four = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
    sound = {**wide, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_conv_pos_embeddings": 16,
             "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16}  # fmt: skip
    windows = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    uncached = {"use_cache": False}
    plan: dict[str, tuple[str, str, dict[str, Any]]] = {
        "BERT": ("Bert", "ForSequenceClassification", text | wide),
        "DistilBERT": ("DistilBert", "ForSequenceClassification", text | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
        "RoBERTa": ("Roberta", "ForSequenceClassification", text | wide),
        "ALBERT": ("Albert", "ForSequenceClassification", text | wide | {"embedding_size": 16}),
        "ELECTRA": ("Electra", "ForSequenceClassification", text | wide | {"embedding_size": 16}),
        "MPNet": ("MPNet", "ForSequenceClassification", text | wide),
        "DeBERTa v2": ("DebertaV2", "ForSequenceClassification", text | wide),
        "GPT-2": ("GPT2", "LMHeadModel", {"vocab_size": 99, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4} | uncached),
        "Llama": ("Llama", "ForCausalLM", text | wide | {"num_key_value_heads": 2} | uncached),
        "OPT": ("OPT", "ForCausalLM", text | {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32} | uncached),
        "T5 encoder": ("T5", "EncoderModel", {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
        "FNet": ("FNet", "ForSequenceClassification", text | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "type_vocab_size": 2}),
        "ViT": ("ViT", "ForImageClassification", patches),
        "DeiT": ("DeiT", "ForImageClassification", patches),
        "BEiT": ("Beit", "ForImageClassification", patches),
        "DINOv2": ("Dinov2", "ForImageClassification", {k: v for k, v in patches.items() if k != "intermediate_size"}),
        "I-JEPA": ("IJepa", "ForImageClassification", patches),
        "Swin": ("Swin", "ForImageClassification", windows),
        "Swin v2": ("Swinv2", "ForImageClassification", windows),
        "ConvNeXt": ("ConvNext", "ForImageClassification", {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}),
        "ConvNeXt v2": ("ConvNextV2", "ForImageClassification", {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}),
        "ResNet": ("ResNet", "ForImageClassification", {"embedding_size": 16, "layer_type": "bottleneck"} | four),
        "RegNet": ("RegNet", "ForImageClassification", {"embedding_size": 16, "groups_width": 8} | four),
        "BiT": ("Bit", "ForImageClassification", {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 8}),
        "MobileNet v1": ("MobileNetV1", "ForImageClassification", {"image_size": 64, "depth_multiplier": 0.25}),
        "MobileNet v2": ("MobileNetV2", "ForImageClassification", {"image_size": 64, "depth_multiplier": 0.35}),
        "MobileViT": ("MobileViT", "ForImageClassification", {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]}),
        "SegFormer": ("Segformer", "ForImageClassification", four | {"num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32}),
        "PVT": ("Pvt", "ForImageClassification", four | {"image_size": 64, "num_attention_heads": [1, 2, 2, 4]}),
        "PoolFormer": ("PoolFormer", "ForImageClassification", four),
        "LeViT": ("Levit", "ForImageClassification", {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}),
        "FocalNet": ("FocalNet", "ForImageClassification", {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [2, 2], "focal_windows": [3, 3]}),
        "wav2vec 2.0": ("Wav2Vec2", "ForSequenceClassification", sound),
        "HuBERT": ("Hubert", "ForSequenceClassification", sound),
        "AST": ("AST", "ForAudioClassification", wide | {"max_length": 64, "num_mel_bins": 32}),
        "Mamba": ("Mamba", "ForCausalLM", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4} | uncached),
    }  # fmt: skip

    def built(stem: str, task: str, settings: dict[str, Any]) -> Built:
        model = getattr(t, stem + task)(getattr(t, f"{stem}Config")(**settings))
        key = "last_hidden_state" if task == "EncoderModel" else "logits"
        if stem in ("Wav2Vec2", "Hubert"):
            return Taken(model, key), torch.randn(2, 800)
        if stem == "AST":
            return Taken(model, key), torch.randn(2, 64, 32)
        return Taken(model, key), torch.randn(2, 3, 64, 64) if "Image" in task else torch.randint(0, 90, (2, 12))

    return {name: lambda p=p: built(*p) for name, p in plan.items()}  # type: ignore[misc]
