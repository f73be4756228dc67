"""A training under way: one step at a time, its whole state a value that can be put down and taken up again."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hasten.core.errors import Unsupported, UsageError
from hasten.train import closures
from hasten.train.augment import Augmenter
from hasten.train.average import Averaged, Swapped, moving_norms, recalibrate
from hasten.train.chance import put_random_states, random_states
from hasten.train.clip import penalize
from hasten.train.health import Finding, Norms, birthplace, copied_buffers, kept_buffers, layer_norms, put_buffers
from hasten.train.hints import bare
from hasten.train.layers import optimizer_of, trainable, training_mode
from hasten.train.lesson import Lesson
from hasten.train.outputs import Tensors, outputs_of
from hasten.train.records import Record
from hasten.train.schedules import OfTorch, slow_down
from hasten.train.settings import Fit

_RECALIBRATED = 100  # batches, where the optimizer averages by itself


class Diverged(Unsupported):
    """The loss or its gradient stopped being a finite number."""


class Run:
    """Everything that changes while a network trains.

    Args:
        module: in training mode after construction; its weights change in place.
        forward: what is called in its place.
    """

    def __init__(self, module: nn.Module, forward: Any, lesson: Lesson, settings: Fit, steps: int) -> None:
        training_mode(module, settings)
        self.module, self.settings, self.steps = module, settings, steps
        self.step, self.ended, self.identity = 0, "", ""
        self.curve: list[tuple[int, float]] = []
        self.means: list[float] = []  # loss of each finished pass
        self.looks: list[float] = []
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self._forward, self._lesson = forward, lesson
        self._device = next(module.parameters()).device
        self._weights = trainable(module)
        self._optimizer = optimizer_of(module, settings)
        schedule = settings.scheduled()
        if isinstance(schedule, OfTorch):  # its rates are those of the groups; ours are set before every step
            for group in self._optimizer.param_groups:
                group["lr"] *= group.get("scale", 1.0)
        self._scheduler = schedule.factory(self._optimizer) if isinstance(schedule, OfTorch) else None
        self._scaler = settings.precision.scaler(self._device)
        self._asks = closures.asks(self._optimizer)
        if self._asks and self._scaler.is_enabled():
            raise UsageError(
                f"{type(self._optimizer).__name__} asks for the gradient more than once a step, which the scaled loss of the format "
                "float16 does not allow; take bfloat16"
            )
        self._augment = settings.augment()
        self._augmenter = Augmenter(self._augment, lesson.examples, lesson.generator)
        self._average = Averaged(settings.average, module) if settings.average else None
        self._clip = settings.clipping()
        self._best: dict[str, torch.Tensor] | None = None
        self._in_pass: list[float] = []
        self._slower, self._sick = 1.0, 0
        self._kept: dict[str, Any] | None = None
        self._spent, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """On the clock, over all the times that this training was taken up."""
        return self._spent + time.monotonic() - self._since

    def advance(self) -> Record:
        """One step of the optimizer."""
        health = self.settings.health
        if health.nonfinite == "roll back" and self.step % health.snapshot == 0:
            self._kept = copy.deepcopy({name: value for name, value in self.state().items() if name != "kept"})
        buffers = copied_buffers(self.module) if health.nonfinite != "raise" else None
        self.step += 1
        rate = self._set_rate()
        index, inputs = self._lesson.source.next()
        drawn = self._draws() if self._asks else None
        loss, norm, layers = self._gradient(index, inputs)
        overflow = math.isfinite(loss) and not math.isfinite(norm) and self._scaler.is_enabled() and self._scaler.get_scale() > 1
        if drawn is not None:  # what is not finite is known before the optimizer moves anything
            loss, norm = closures.step(self._optimizer, self._weights, (loss, norm), lambda: self._again(drawn, index, inputs))
        elif math.isfinite(loss + norm) or overflow:
            self._scaler.step(self._optimizer)  # plain `step` where the scaler is off
            self._scaler.update()
        if not (math.isfinite(loss + norm) or overflow):
            self._scaler.update()  # the gradients were unscaled already
            if self._mend(loss, norm, index, inputs, buffers):
                return self._record(rate, loss, norm, {}, len(index))
        if self._device.type == "xla":
            _sync_xla()
        return self._told(rate, loss, norm, layers, len(index))

    def _told(self, rate: float, loss: float, norm: float, layers: dict[str, float], batch: int) -> Record:
        """What follows a step: schedules, averages, the end of a pass, a look at the validation data."""
        if self._scheduler is not None and not _on_looks(self._scheduler):
            self._scheduler.step()
        if math.isfinite(loss):
            self.curve.append((self.step, loss))
            self._in_pass.append(loss)
        source = self._lesson.source
        pass_ended = source.done == source.begun
        if self._average is not None:
            self._average.look(self.step / self.steps, pass_ended=pass_ended)
        if pass_ended and self._in_pass:
            self.means.append(sum(self._in_pass) / len(self._in_pass))
            self._in_pass = []
            self.ended = self.ended or self.settings.stop.after_pass(self.means) or ""
        limit = self.settings.stop.seconds
        if limit is not None and self.seconds >= limit:
            self.ended = self.ended or f"{limit:g} seconds were over"
        validation, accuracy = self._look() if self._due() else (None, None)
        return self._record(rate, loss, norm, layers, batch, validation, accuracy)

    def _record(
        self,
        rate: float,
        loss: float,
        norm: float,
        layers: dict[str, float],
        batch: int,
        validation: float | None = None,
        accuracy: float | None = None,
    ) -> Record:
        source = self._lesson.source
        epoch = self.step / source.per_pass if source.per_pass else float(source.done)
        return Record(
            step=self.step,
            steps=self.steps,
            batch=batch,
            epoch=epoch,
            loss=loss,
            rate=rate,
            norm=norm,
            seconds=self.seconds,
            validation=validation,
            accuracy=accuracy,
            layers=layers,
        )

    def _set_rate(self) -> float:
        if self._scheduler is not None:
            return float(self._optimizer.param_groups[0]["lr"])
        rate = self.settings.rate(self.step, self.steps, epoch=self._lesson.source.done, looks=tuple(self.looks)) * self._slower
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)  # groups that the user made have none
        return rate

    def _gradient(self, index: torch.Tensor, inputs: Tensors) -> tuple[float, float, dict[str, float]]:
        """Leaves the clipped gradient in the weights; loss, the norm before, and the norms of the layers if it is time."""
        value = self._backward(index, inputs)
        every = self.settings.health.every
        norms: dict[str, Norms] = {}
        if every and self.step % every == 0:
            norms = layer_norms(bare(self.module))
            self.findings += self.settings.health.findings(self.step, norms)
        return value, self._clip(self._weights), {name: one.gradient for name, one in norms.items()}

    def _draws(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """Where every generator stands."""
        return self._lesson.generator.get_state(), random_states(self._device)

    def _put_draws(self, drawn: tuple[torch.Tensor, dict[str, Any]]) -> None:
        self._lesson.generator.set_state(drawn[0])
        put_random_states(drawn[1], self._device)

    def _again(self, drawn: tuple[torch.Tensor, dict[str, Any]], index: torch.Tensor, inputs: Tensors) -> tuple[float, float]:
        """Loss and norm of the same batch, changed and dropped as before, at the weights as they are now."""
        self._put_draws(drawn)
        return self._backward(index, inputs), self._clip(self._weights)

    def _backward(self, index: torch.Tensor, inputs: Tensors) -> float:
        """Leaves the gradient in the weights; the loss."""
        for weight in self._weights:  # what zero_grad does, without what torch does around it
            weight.grad = None
        value = 0.0
        for mine, seen, share in self._parts(index, inputs):
            loss = self._loss(mine, seen)
            if not loss.requires_grad:
                raise Unsupported("training needs outputs that depend on the parameters, these do not")
            loss = loss if share == 1 else loss * share
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        self._scaler.unscale_(self._optimizer)
        if any(self.settings.penalty):
            penalize(self._weights, self.settings.penalty)
        return value

    def _parts(self, index: torch.Tensor, inputs: Tensors) -> list[tuple[torch.Tensor, Tensors, float]]:
        """The batch in parts, each with its share of the targets; those without any are left out."""
        count = min(self.settings.accumulate, len(index))
        if count == 1:
            return [(index, inputs, 1.0)]
        aim, parts = self._lesson.aim, torch.tensor_split(torch.arange(len(index)), count)
        whole = aim.count(index)
        if not whole:
            return [(index, inputs, 1.0)]
        found = [(index[part], tuple(a[part] for a in inputs), aim.count(index[part]) / whole) for part in parts]
        return [one for one in found if one[2]]

    def _loss(self, index: torch.Tensor, inputs: Tensors) -> torch.Tensor:
        augment, aim = self._augment, self._lesson.aim
        if augment.needs_images:
            first = self._augmenter.images(inputs[0], index, self._lesson.source.begun, (self.step - 1) / self.steps)
            inputs = (first, *inputs[1:])
        partners, share = self._augmenter.partners(len(index)) if augment.mixup else (None, 1.0)
        if partners is not None:
            inputs = (share * inputs[0] + (1 - share) * inputs[0][partners], *inputs[1:])
        inputs = tuple(self.settings.precision.laid_out(a) for a in inputs)
        outputs = self._outputs(inputs)
        if self.settings.precision.format != "float32":
            outputs = tuple(o.float() if o.is_floating_point() else o for o in outputs)
        loss = aim(outputs, index, inputs)
        return loss if partners is None else share * loss + (1 - share) * aim(outputs, index[partners], inputs)

    def _outputs(self, inputs: Tensors) -> Tensors:
        try:
            with self.settings.precision.cast(self._device):
                return outputs_of(self._forward, inputs)
        except ValueError as why:
            if "more than 1 value per channel" not in str(why):
                raise
            raise Unsupported(
                f"a batch norm of this network needs more than one value per channel, got batch={len(inputs[0])}; take larger batches"
            ) from why

    def _mend(self, loss: float, norm: float, index: torch.Tensor, inputs: Tensors, buffers: dict[str, torch.Tensor] | None) -> bool:
        """What the settings ask for where a value is not finite; whether it went back."""
        health, at = self.settings.health, f"at step {self.step} of {self.steps}"
        if buffers is not None:
            put_buffers(self.module, buffers)
        with torch.enable_grad():
            born = birthplace(bare(self.module), inputs, lambda: self._loss_again(index, inputs))
        told, origin = f"got a loss of {loss} with a gradient of norm {norm} {at}", f"it comes from {born}"
        self._sick += 1
        if health.nonfinite == "raise" or self._sick > health.most:
            raise Diverged(
                f"the loss and its gradient must stay finite, {told}; "
                f"lower learning_rate ({self.settings.highest:g}) or look for NaN in the data: {origin}"
            )
        if health.nonfinite == "skip":
            self.notes.append(f"a step was skipped: {told}; {origin}")
            return False
        assert self._kept is not None
        sick, slower, notes, spent = self._sick, self._slower / 2, self.notes, self.seconds
        self.load(copy.deepcopy(self._kept))
        if self._scheduler is not None:  # ours are taken by `_set_rate`
            slow_down(self._scheduler, self._optimizer, slower / self._slower)
        self._sick, self._slower = sick, slower
        self._spent, self._since = spent, time.monotonic()  # the clock does not go back
        self.notes = [*notes, f"went back to step {self.step} and to {slower:g} of the learning rate: {told}; {origin}"]
        return True

    def _loss_again(self, index: torch.Tensor, inputs: Tensors) -> torch.Tensor:
        inputs = tuple(self.settings.precision.laid_out(a) for a in inputs)
        with self.settings.precision.cast(self._device):
            return self._lesson.aim(outputs_of(self.module, inputs), index, inputs)

    def _due(self) -> bool:
        """Whether it is time to look at the validation data."""
        if self._lesson.look is None:
            return False
        source, every = self._lesson.source, self.settings.stop.every
        if self.ended:  # what is handed over is looked at
            return True
        if not source.per_pass:
            return source.done == source.begun
        return self.step == self.steps or int(self.step / source.per_pass / every) > int((self.step - 1) / source.per_pass / every)

    def _look(self) -> tuple[float, float | None]:
        assert self._lesson.look is not None
        swapped = self._as_result()
        with self._untouched(swapped), swapped:
            self._recalibrate(swapped)
            loss, accuracy = self._lesson.look()
            if self.settings.stop.patience is not None and loss < min(self.looks, default=math.inf):
                self._best = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        training_mode(self.module, self.settings)
        self.looks.append(loss)
        if self._scheduler is not None and _on_looks(self._scheduler):
            self._scheduler.step(loss)
        self.ended = self.ended or self.settings.stop.after_look(self.looks) or ""
        return loss, accuracy

    def _as_result(self) -> Swapped:
        """The network as it would be handed over now, as long as the block lasts."""
        return Swapped(self._optimizer, self._average if self._average is not None and self._average.ready else None)

    @contextlib.contextmanager
    def _untouched(self, swapped: Swapped) -> Iterator[None]:
        """What `_recalibrate` moves is after the block where it was: statistics, the place in the data, the draws."""
        if not (swapped.changes and moving_norms(self.module)):
            yield
            return
        drawn, place = self._draws(), self._lesson.source.state()
        with kept_buffers(self.module):
            yield
        self._put_draws(drawn)
        self._lesson.source.load(place)

    def _recalibrate(self, swapped: Swapped) -> None:
        """Statistics of batch norms that fit the weights in the place of the last ones, from the batches that come next."""
        average, per_pass = self.settings.average, self._lesson.source.per_pass
        count = average.recalibrate if average else _RECALIBRATED
        if swapped.changes and count:
            training_mode(self.module, self.settings)
            recalibrate(self.module, (self._lesson.source.next()[1] for _ in range(min(count, per_pass or count))))

    def finish(self) -> None:
        """Leaves what is handed over: the weights and statistics of the best look, else the average, else the last."""
        self.module.zero_grad()
        if self._best is not None:
            self.module.load_state_dict(self._best)
            return
        swapped = self._as_result()
        swapped.put()
        self._recalibrate(swapped)

    def state(self) -> dict[str, Any]:
        """All of it, as tensors, numbers and texts. The tensors are the live ones: copy or write them before the next step."""
        return {
            "step": self.step,
            "ended": self.ended,
            "curve": ([step for step, _ in self.curve], [loss for _, loss in self.curve]),
            "means": self.means,
            "in_pass": self._in_pass,
            "looks": self.looks,
            "findings": [(f.step, f.layer, f.what, f.size) for f in self.findings],
            "notes": self.notes,
            "weights": dict(self.module.state_dict()),
            "buffers": dict(self.module.named_buffers()),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "augmenter": self._augmenter.state(),
            "average": None if self._average is None else self._average.state(),
            "best": self._best,
            "source": self._lesson.source.state(),
            "generator": self._lesson.generator.get_state(),
            **random_states(self._device),
            "slower": self._slower,
            "sick": self._sick,
            "seconds": self.seconds,
            "kept": self._kept,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.step, self.ended = state["step"], state["ended"]
        self.curve = list(zip(*state["curve"], strict=True))
        self.means, self._in_pass, self.looks = list(state["means"]), list(state["in_pass"]), list(state["looks"])
        self.findings = [Finding(step=s, layer=n, what=w, size=v) for s, n, w, v in state["findings"]]
        self.notes = list(state["notes"])
        self.module.load_state_dict(state["weights"])
        put_buffers(self.module, state["buffers"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self._augmenter.load(state["augmenter"])
        if self._average is not None:
            self._average.load(state["average"])
        self._best = state["best"]
        self._lesson.source.load(state["source"])
        self._lesson.generator.set_state(state["generator"])
        put_random_states(state, self._device)
        self._slower, self._sick = state["slower"], state["sick"]
        self._kept = state.get("kept", self._kept)
        self._spent, self._since = state["seconds"], time.monotonic()


def _on_looks(scheduler: Any) -> bool:
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def _sync_xla() -> None:
    import torch_xla

    torch_xla.sync()
