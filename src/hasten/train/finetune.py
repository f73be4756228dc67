"""Fine-tuning: gives back accuracy that other steps have cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import nn

from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Loss, Space, Stage
from hasten.train.loop import AfterStep, fit, go_on, trainable
from hasten.train.objective import Known
from hasten.train.settings import Fit

_SHORT = 0.25  # share of the epochs that a comparison takes


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Trains the network further, on labels and on what the original says (distillation).

    loss = (1 − distil)·loss(labels) + distil·distance(original), or the distance to the original's outputs alone where the
    data has no labels; AdamW without weight decay, the learning rate rising over a fifth of the steps and falling to 0 at
    the end. With `Context.fidelity` "short" it takes a quarter of the epochs.

    Args:
        epochs: passes over *train*, > 0.
        learning_rate: at its highest, > 0.
        batch: examples per step, >= 2; a network with a fixed batch size is trained at that size.
        distil: weight of the original's outputs against the labels, in [0, 1]. Outputs that the labels say nothing of are held to the
            original's whatever it is, but for 0: then nothing holds them.
        temperature: at which class probabilities are compared, > 0.

    Raises:
        UsageError: on a value outside its range.

    References:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.TRAIN
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"score"})
    reads_profile: ClassVar[bool] = False

    epochs: float = 6.0
    learning_rate: float = 1e-3
    batch: int = 64
    distil: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        training(self, "classes")  # its checks are ours

    def apply(self, network: Network, context: Context) -> Network:
        """The network with weights trained further on `context.train`. Raises Unsupported where nothing can be trained."""
        return self.train(network, context, after_step=go_on)

    def train(self, network: Network, context: Context, *, after_step: AfterStep) -> Network:
        """As `apply`, with `after_step` looking on (see `fit`): how a step holds weights in a form while they learn."""
        return train_further(network, context, training(self, context.loss), after_step=after_step)

    @classmethod
    def space(cls, network: Network) -> Space:
        """Learning rates and epochs. Raises Unsupported where nothing can be trained."""
        treatable(network)
        return {"learning_rate": (1e-3, 3e-4, 3e-3, 1e-4, 1e-2), "epochs": (6.0, 2.0, 15.0)}


class Training(Protocol):
    """The fields that every step has that trains further."""

    @property
    def epochs(self) -> float: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def batch(self) -> int: ...
    @property
    def distil(self) -> float: ...
    @property
    def temperature(self) -> float: ...


def training(step: Training, loss: Loss, **more: Any) -> Fit:
    """How such a step trains. With the loss "original" there are no labels to weigh. Raises UsageError on a bad field."""
    if step.batch < 2:
        raise UsageError(f"batch must be at least 2, got {step.batch}")
    return Fit(
        loss=loss,
        epochs=step.epochs,
        batch=step.batch,
        learning_rate=step.learning_rate,
        weight_decay=0.0,
        distil=0.0 if loss == "original" else step.distil,
        temperature=step.temperature,
        **more,
    )


def train_further(network: Network, context: Context, settings: Fit, *, after_step: AfterStep = go_on) -> Network:
    """The network with weights trained on `context.train`, as a step does it.

    Of `settings`, the seed is the context's, the batch the network's where it takes one size only, and with
    `Context.fidelity` "short" a quarter of the epochs is run.

    Raises:
        Unsupported: where nothing can be trained, where the data has less than one batch of a fixed size, and where the
            settings need the original and there is none as a module.
    """
    treatable(network)
    batch = network.fixed_batch or settings.batch
    if network.fixed_batch and len(context.train) < network.fixed_batch:
        raise Unsupported(f"this network takes {batch} examples at once, the training data has {len(context.train)}")
    epochs = settings.epochs * (_SHORT if context.fidelity == "short" else 1.0)
    settings = replace(settings, epochs=epochs, batch=batch, seed=context.seed)
    teacher = _teacher(context, inside=settings.hints is not None) if settings.needs_teacher else None
    fitted = fit(
        network.module,
        context.train,
        settings=settings,
        teacher=teacher,
        device=context.device,
        progress=context.progress,
        after_step=after_step,
    )
    return network.with_body(fitted.module)


def treatable(network: Network) -> None:
    """Raises Unsupported where the network cannot be trained: it is a graph, takes no batches, or has nothing to train."""
    if network.kind != "module":
        raise Unsupported("fine-tuning needs a torch module, this network is an ONNX graph")
    if network.fixed_batch == 1:
        raise Unsupported("fine-tuning needs batches, this network takes one example at a time; re-export with a dynamic batch")
    trainable(network.module)


def _teacher(context: Context, *, inside: bool) -> nn.Module:
    if context.original is None or context.original.kind != "module":
        way = "there is no other way without labels" if context.loss == "original" else "set distil=0 to learn from labels alone"
        raise Unsupported(f"distillation needs the original as a torch module, it has none; {way}")
    module = context.original.module
    return module if inside or context.answers is None else Known(module, context.answers)
