"""The loops of time_to_accuracy.py: hasten's, the control's, and those that people write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.data import View
from hasten.train import Augment, Fit, Precision, fit

Look = Callable[[Any], None]
BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What tuning may vary: passes over the data and the (highest) learning rate."""

    passes: float
    rate: float


def network(classes: int = 10) -> nn.Module:
    """Three 3×3 convolutions with batch norms, small maps early: (batch, 1, 28, 28) → (batch, classes)."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 24, 2), (24, 64, 1), (64, 64, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2) if len(layers) < 8 else nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, classes))


def recipe(plan: Plan, seed: int, *, clothes: bool) -> Fit:
    """hasten's: Muon, its rate rising over a fifth of the steps and falling to 0, and kernels with their channels together. Clothes that
    are seen four times and more are mirrored every second time, and a tenth of their labels is spread."""
    often = clothes and plan.passes >= 4
    return Fit(
        augmentation=Augment(flip="alternating" if often else "none"),
        label_smoothing=0.1 if often else 0.0,
        epochs=plan.passes,
        batch=BATCH,
        optimizer="muon",
        learning_rate=plan.rate,
        precision=Precision(channels_last=True),
        seed=seed,
    )


def _tensors(view: View) -> tuple[Tensor, Tensor]:
    assert view.labels is not None
    return torch.from_numpy(view.inputs[0]), torch.from_numpy(view.labels)


def _hasten(view: View, plan: Plan, look: Look) -> nn.Module:
    del look
    return fit(network(), view, settings=recipe(plan, torch.initial_seed() % 2**31, clothes=len(view) > 10_000)).module


def _one_cycle(view: View, plan: Plan, look: Look) -> nn.Module:
    del look
    module, (x, y) = network().train().to(memory_format=torch.channels_last), _tensors(view)  # type: ignore[call-overload]
    per_pass = len(x) // BATCH
    steps = round(plan.passes * per_pass)
    optimizer = torch.optim.AdamW(module.parameters(), lr=plan.rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=steps, pct_start=0.2, cycle_momentum=False)
    for step in range(steps):
        if step % per_pass == 0:
            order = torch.randperm(len(x)).split(BATCH)
        index = order[step % per_pass]
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x[index].contiguous(memory_format=torch.channels_last)), y[index]).backward()
        optimizer.step()
        schedule.step()
    return module


def _batches(view: View) -> Any:
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(*_tensors(view)), batch_size=BATCH, shuffle=True)


def _loader(view: View, plan: Plan, look: Look) -> nn.Module:
    module, loader = network().train(), _batches(view)
    optimizer = torch.optim.Adam(module.parameters(), lr=plan.rate)
    for _ in range(round(plan.passes)):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
        look(module)
    return module


def _lightning(view: View, plan: Plan, look: Look) -> nn.Module:
    import logging

    import lightning

    del look
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = network()

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=plan.rate)

    off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(max_epochs=round(plan.passes), accelerator="cpu", **off).fit(Lit(), _batches(view))
    return module


def _keras(view: View, plan: Plan, look: Look) -> Callable[[np.ndarray], np.ndarray]:
    import keras

    del look
    assert view.labels is not None
    first = keras.backend.backend() == "torch"  # each backend gets the layout that it computes in
    keras.config.set_image_data_format("channels_first" if first else "channels_last")
    laid_out = (lambda x: x) if first else (lambda x: x.reshape(-1, 28, 28, 1))
    draw = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")  # what torch draws
    layers: list[Any] = [keras.Input((1, 28, 28) if first else (28, 28, 1))]
    for after, stride in ((24, 2), (64, 1), (64, 1)):
        layers += [keras.layers.ZeroPadding2D(1), keras.layers.Conv2D(after, 3, stride, use_bias=False, kernel_initializer=draw)]
        layers += [keras.layers.BatchNormalization(axis=1 if first else -1, momentum=0.9, epsilon=1e-5), keras.layers.ReLU()]
        layers.append(keras.layers.MaxPooling2D(2) if len(layers) < 11 else keras.layers.GlobalAveragePooling2D())
    model = keras.Sequential([*layers, keras.layers.Dense(10, kernel_initializer=draw)])
    model.compile(keras.optimizers.Adam(plan.rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(laid_out(view.inputs[0]), view.labels, batch_size=BATCH, epochs=round(plan.passes), verbose=0)
    return lambda x: np.asarray(model.predict(laid_out(x), verbose=0))


LOOPS: dict[str, Callable[[View, Plan, Look], Any]] = {
    "hasten": _hasten,
    "one cycle": _one_cycle,
    "DataLoader": _loader,
    "Lightning": _lightning,
    "Keras, torch": _keras,
    "Keras, TensorFlow": _keras,
}
