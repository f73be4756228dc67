"""Which weights learn, and how fast: frozen layers, learning rates layer by layer, the optimizer that is built of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hasten.core.errors import Unsupported, UsageError
from hasten.core.names import check_met, meets
from hasten.train import optim
from hasten.train.hints import bare
from hasten.train.settings import Fit, OptimizerFactory


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for a gradient. Raises Unsupported where there are none."""
    if found := [p for p in module.parameters() if p.requires_grad]:
        return found
    raise Unsupported("training needs parameters with requires_grad=True, the network has none")


def freeze(module: nn.Module, settings: Fit) -> Callable[[], None]:
    """Takes the layers named in `freeze` out of training; what is returned gives their parameters back what they had.

    Raises:
        UsageError: a pattern meets no layer; the message names the nearest.
    """
    names = [name for name, _ in module.named_modules() if name]
    check_met((*settings.freeze, *(pattern for pattern, _ in settings.rates)), names)
    layers = [layer for name, layer in module.named_modules() if name and meets(name, settings.freeze)]
    held = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)

    def thaw() -> None:
        for parameter in held:
            parameter.requires_grad_(True)

    return thaw


def training_mode(module: nn.Module, settings: Fit) -> None:
    """Training mode, but for norms and layers that stay as they are."""
    module.train()
    for name, layer in bare(module).named_modules():
        norm = settings.freeze_norms and isinstance(layer, nn.modules.batchnorm._NormBase)
        if norm or (name and meets(name, settings.freeze)):
            layer.eval()


def optimizer_of(module: nn.Module, settings: Fit) -> torch.optim.Optimizer:
    """The optimizer, without decay on biases and norms. Each group holds in "scale" its factor on the learning rate."""
    groups = _groups(module, settings)
    return _muon(module, groups, settings) if settings.optimizer == "muon" else _optimizer(groups, settings)


def _groups(module: nn.Module, settings: Fit) -> list[dict[str, Any]]:
    scales = {id(p): 1.0 for p in module.parameters()}
    for pattern, factor in reversed(settings.rates):  # the first that meets has the last word
        for name, layer in bare(module).named_modules():
            if name and meets(name, (pattern,)):
                scales |= {id(p): factor for p in layer.parameters()}
    groups = []
    for scale in sorted(set(scales.values())):
        weights = [p for p in trainable(module) if scales[id(p)] == scale]
        parts = ([p for p in weights if p.ndim >= 2], settings.weight_decay), ([p for p in weights if p.ndim < 2], 0.0)
        groups += [{"params": part, "weight_decay": decay, "scale": scale} for part, decay in parts]
    filled = [g for g in groups if g["params"]]
    return groups if len(groups) == 2 else filled


def _optimizer(groups: Sequence[dict[str, Any]], settings: Fit) -> torch.optim.Optimizer:
    if not isinstance(settings.optimizer, str):
        return _made(settings.optimizer, groups, settings)
    if settings.optimizer not in ("adamw", "sgd"):
        return optim.BY_NAME[settings.optimizer]([g for g in groups if g["params"]], lr=settings.highest)
    weights = [p for g in groups for p in g["params"]]
    places = {p.device.type for p in weights}
    ours = places == {"cpu"} and optim.missing() is None
    sgd, adamw = (optim.SGD, optim.AdamW) if ours else (torch.optim.SGD, torch.optim.AdamW)
    fused = None if ours else "xla" not in places  # ours take their kernel by themselves; XLA fuses by itself and refuses torch's
    if settings.optimizer == "sgd":
        return sgd(groups, lr=settings.highest, momentum=0.9, nesterov=True, fused=fused)
    return adamw(groups, lr=settings.highest, fused=fused)


def _made(factory: OptimizerFactory, groups: Sequence[dict[str, Any]], settings: Fit) -> torch.optim.Optimizer:
    try:
        made = factory([g for g in groups if g["params"]], lr=settings.highest)
    except ValueError as why:
        if "per-parameter options" not in str(why):  # as LBFGS says it
            raise
        raise UsageError(f"{why}; join them: lambda groups, lr: LBFGS([p for g in groups for p in g['params']], lr=lr)") from why
    if not isinstance(made, torch.optim.Optimizer):
        raise UsageError(f"optimizer must make a torch.optim.Optimizer, got {type(made).__name__}")
    return made


def _muon(module: nn.Module, groups: Sequence[dict[str, Any]], settings: Fit) -> torch.optim.Optimizer:
    """Muon with steps of AdamW's size; a row of an embedding is a vector of its own, so embeddings take AdamW's."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    parts = []
    for group in groups:
        for matrices in (True, False):
            part = [p for p in group["params"] if matrices == (id(p) not in tables)]
            parts += [{**group, "params": part, "use_muon": matrices}] if part else []
    return optim.Muon(parts, lr=settings.highest, adjust_lr_fn="match_rms_adamw")
