"""Blocks, norms and activations: what changes, what must stay equal, what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hasten.compress import FoldBatchNorm, InsertNorm, PruneBlocks, ReplaceActivation
from hasten.compress.layers import lifted
from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Step
from hasten.load.files import from_module
from hasten.load.lower import forward
from networks import Dilated, equal, network


def told(of: Network, rows: int = 40) -> Context:
    random = np.random.default_rng(0)
    view = View(inputs=tuple(random.standard_normal((rows, *a.shape[1:])).astype(np.float32) + 0.5 for a in of.example))
    return Context(train=view, calibrate=view, original=of, loss="original")


def made(step: Step, of: Network) -> Network:
    return step.apply(of, told(of))


def kinds(of: Network, *which: type[nn.Module]) -> int:
    return sum(isinstance(m, which) for m in of.module.modules())


class Without(nn.Module):
    """Dilated, written by hand with some of its blocks left out."""

    def __init__(self, whole: Dilated, gone: set[int]) -> None:
        super().__init__()
        self.whole, self.gone = whole, gone

    def forward(self, x: Tensor) -> Tensor:
        x = self.whole.first(x)
        for i, (conv, norm) in enumerate(zip(self.whole.convs, self.whole.norms, strict=True)):
            if i not in self.gone:
                x = x + F.relu(norm(conv(x)))
        return self.whole.head(x.mean(-1))


def change(of: Network, gone: set[int]) -> float:
    x = torch.from_numpy(told(of).calibrate.inputs[0])
    with torch.no_grad():
        whole, part = of.module(x), Without(of.module, gone)(x)  # type: ignore[arg-type]
    return float((whole - part).square().sum() / whole.square().sum())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_blocks_that_change_least_go(count: int) -> None:
    of = network("dilated")
    gone: set[int] = set()
    for _ in range(count):  # one at a time, judged again each time
        gone.add(min({0, 1, 2} - gone, key=lambda i: change(of, gone | {i})))
    found = made(PruneBlocks(blocks=count), of)
    assert equal(forward(of.with_body(Without(of.module, gone).eval()), of.example), forward(found, of.example))  # type: ignore[arg-type]
    assert kinds(found, nn.Conv1d) == 4 - count, "what is not used is not kept"
    assert sum(p.numel() for p in found.module.parameters()) < sum(p.numel() for p in of.module.parameters())


def test_a_block_without_effect_goes_first() -> None:
    for silent in range(3):
        of = network("dilated")
        with torch.no_grad():
            of.module.norms[silent].weight.zero_()
            of.module.norms[silent].bias.fill_(-1)  # behind it a ReLU
        found = made(PruneBlocks(), of)
        assert equal(forward(of, of.example), forward(found, of.example))


def test_random_is_the_seed_alone() -> None:
    of = network("dilated")
    seen = set()
    for seed in range(12):
        context = Context(train=told(of).train, calibrate=told(of).calibrate, seed=seed)
        found = PruneBlocks(saliency="random").apply(of, context)
        again = PruneBlocks(saliency="random").apply(of, context)
        assert equal(forward(found, of.example), forward(again, of.example))
        seen.add(tuple(np.round(forward(found, of.example)[0], 4).ravel()))
    assert len(seen) == 3


@pytest.mark.parametrize(("name", "count"), [("resnet", 1), ("mobilenet", 2), ("transformer", 2), ("dilated", 3)])
def test_blocks_in_every_family(name: str, count: int) -> None:
    """A projected shortcut changes the shape and is none; attention and the layers behind it are a block each."""
    of = network(name)
    with pytest.raises(Unsupported, match=r"needs 99 residual blocks that keep their shape, found \d+") as why:
        PruneBlocks(blocks=99).apply(of, Context(train=View(inputs=of.example), calibrate=View(inputs=of.example)))
    assert str(why.value).endswith(f"found {count}")


def test_shares_and_patterns() -> None:
    of = network("dilated")
    assert kinds(made(PruneBlocks(blocks=0.5), of), nn.Conv1d) == 2, "round(1.5) of 3 blocks"
    assert kinds(made(PruneBlocks(blocks=0.1), of), nn.Conv1d) == 3, "at least one"
    one = made(PruneBlocks(only=("convs.1",)), of)
    assert equal(forward(one, of.example), forward(of.with_body(Without(of.module, {1}).eval()), of.example))  # type: ignore[arg-type]
    other = made(PruneBlocks(blocks=2, keep=("norms.1",)), of)
    assert equal(forward(other, of.example), forward(of.with_body(Without(of.module, {0, 2}).eval()), of.example))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"no layer is named 'blocks\.7'"):
        made(PruneBlocks(only=("blocks.7",)), of)


class Leaky(nn.Module):
    """The inside of the first addition is read elsewhere; the second adds two different parts; the third has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.a(x).tanh()
        x = x + inside
        x = self.b(x) + self.c(x)
        return torch.cat([x + x.tanh(), inside], 1)


def test_what_is_no_block() -> None:
    of = Network(kind="module", body=Leaky().eval(), example=(torch.randn(3, 6).numpy(),))
    with pytest.raises(Unsupported, match="needs 1 residual blocks that keep their shape, found 0"):
        made(PruneBlocks(), of)
    with pytest.raises(Unsupported, match="needs a residual block that keeps its shape, found none"):
        PruneBlocks.space(of)
    assert PruneBlocks.space(network("mobilenet")) == {"blocks": (1, 2)}


@pytest.mark.parametrize("blocks", [0, -1, True, 0.0, 1.0, 1.5])
def test_numbers_of_blocks_are_checked(blocks: float) -> None:
    with pytest.raises(ValueError, match=r"blocks must be a whole number of at least 1 or a share in \(0, 1\), got"):
        PruneBlocks(blocks=blocks)
    with pytest.raises(ValueError, match="saliency must be 'change' or 'random'"):
        PruneBlocks(saliency="luck")  # type: ignore[arg-type]


class Functional(nn.Module):
    """Activations as layers and as calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid(F.silu(self.b(self.act(self.a(x))))))

    def relu(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid(F.relu(self.b(F.relu(self.a(x))))))


def functional() -> Network:
    torch.manual_seed(0)
    return Network(kind="module", body=Functional().eval(), example=(torch.randn(5, 6).numpy(),))


def test_activations_are_replaced_wherever_they_are_called() -> None:
    of = functional()
    found = made(ReplaceActivation(), of)
    with torch.no_grad():
        expected = of.module.relu(torch.from_numpy(of.example[0])).numpy()  # type: ignore[operator]
    assert equal((expected,), forward(found, of.example))
    assert (kinds(found, nn.ReLU), kinds(found, nn.GELU, nn.SiLU), kinds(found, nn.Sigmoid)) == (2, 0, 1)


def test_activations_by_name() -> None:
    of = functional()
    assert kinds(made(ReplaceActivation(only=("act",)), of), nn.SiLU, nn.GELU) == 1
    assert kinds(made(ReplaceActivation(keep=("act",)), of), nn.GELU) == 1
    gates = made(ReplaceActivation(to="hardsigmoid", of=("sigmoid",)), of)
    assert (kinds(gates, nn.Hardsigmoid), kinds(gates, nn.Sigmoid), kinds(gates, nn.GELU)) == (1, 0, 1)
    mobile = network("mobilenet")
    assert not kinds(made(ReplaceActivation(), mobile), nn.Hardswish)
    with pytest.raises(Unsupported, match="needs one of gelu, silu"):
        made(ReplaceActivation(to="hardswish"), mobile)  # what is hardswish already stays


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"to": "swish"}, "activations must be among elu, gelu, .* got 'swish'"),
        ({"of": ("relu", "exp")}, "activations must be among .* got 'exp'"),
        ({"to": "relu", "of": ("relu",)}, "of must name an activation other than 'relu'"),
    ],
)
def test_activations_are_checked(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReplaceActivation(**settings)


def test_nothing_to_replace() -> None:
    of = network("cnn")
    with pytest.raises(Unsupported, match="ReplaceActivation needs one of gelu"):
        made(ReplaceActivation(), of)
    with pytest.raises(Unsupported, match="ReplaceActivation needs one of gelu"):
        ReplaceActivation.space(of)
    assert ReplaceActivation.space(functional()) == {"to": ("relu", "hardswish")}


def bare() -> Network:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(100, 8), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip
    return Network(kind="module", body=module.eval(), example=(torch.randn(4, 3, 8, 8).numpy(),))


def test_norms_change_nothing_at_first_and_hold_the_statistics() -> None:
    of = bare()
    found = made(InsertNorm(), of)
    names = {n for n, m in found.module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert names == {"0_norm", "3", "4_norm", "7_norm"}, "not before a norm, not on the output"
    fresh = told(of, rows=7)
    assert equal(forward(of, fresh.train.inputs), forward(found, fresh.train.inputs))
    x = torch.from_numpy(told(of).calibrate.inputs[0])
    with torch.no_grad():
        seen = of.module[0](x).double()
    norm = found.module.get_submodule("0_norm")
    torch.testing.assert_close(norm.running_mean.double(), seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), seen.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.weight.double() ** 2, seen.var((0, 2, 3), unbiased=False) + norm.eps, rtol=1e-5, atol=1e-6)


def test_norms_normalise_in_training() -> None:
    """In training mode the first norm's output has the mean β and the deviation γ of each batch."""
    of = bare()
    module = copy.deepcopy(made(InsertNorm(only=("0",)), of).module)
    assert isinstance(module, fx.GraphModule)
    out: list[Tensor] = []
    norm = module.get_submodule("0_norm")
    norm.register_forward_hook(lambda layer, inputs, output: out.append(output))
    module.train()(3 * torch.randn(16, 3, 8, 8) + 2)
    torch.testing.assert_close(out[0].mean((0, 2, 3)), norm.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[0].std((0, 2, 3)), norm.weight, rtol=1e-2, atol=1e-2)


def test_folding_takes_the_norms_away_again() -> None:
    of = bare()
    folded = made(FoldBatchNorm(), made(InsertNorm(), of))
    assert kinds(folded, nn.modules.batchnorm._BatchNorm) == 0
    assert equal(forward(of, of.example), forward(folded, of.example))


def test_where_no_norm_goes() -> None:
    of = bare()
    assert kinds(made(InsertNorm(keep=("4",)), of), nn.modules.batchnorm._BatchNorm) == 3
    twice = network("shared")
    names = {n for n, _ in made(InsertNorm(), twice).module.named_modules() if n.endswith("_norm")}
    assert names == {"first_norm"}, "a layer that is called twice has two statistics"
    with pytest.raises(Unsupported, match="needs a convolution or linear layer without a norm behind it, found none"):
        made(InsertNorm(only=("9",)), of)
    for name in ("transformer", "lstm"):
        with pytest.raises(Unsupported, match="without a norm behind it, found none"):
            InsertNorm().apply(
                network(name), Context(train=View(inputs=network(name).example), calibrate=View(inputs=network(name).example))
            )
    x = torch.randn(4, 6)
    squares = from_module(nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.ReLU(), nn.Linear(8, 3)), x)
    with pytest.raises(Unsupported, match="without a norm behind it, found none"):
        InsertNorm().apply(squares, Context(train=View(inputs=squares.example), calibrate=View(inputs=squares.example)))
    empty = View(inputs=(np.zeros((0, 3, 8, 8), np.float32),))
    with pytest.raises(DataRefused, match="calibration needs at least 1 examples"):
        InsertNorm().apply(of, Context(train=empty, calibrate=empty))


def test_infinite_outputs_are_refused() -> None:
    of = bare()
    with torch.no_grad():
        of.module[0].weight[0] = float("inf")
    with pytest.raises(Unsupported, match="finite outputs, those of '0' are not"):
        made(InsertNorm(), of)


def test_blocks_cannot_be_judged_by_outputs_that_are_not_finite() -> None:
    of = network("dilated")
    with torch.no_grad():
        of.module.head.bias[0] = float("nan")
    with pytest.raises(Unsupported, match="PruneBlocks needs finite outputs"):
        made(PruneBlocks(), of)


def test_a_norm_takes_a_free_name() -> None:
    of = bare()
    once = lifted(made(InsertNorm(only=("0",)), of))
    once.add_submodule("7_norm", nn.Identity())
    found = made(InsertNorm(only=("7",)), of.with_body(once))
    assert isinstance(found.module.get_submodule("7_norm_1"), nn.BatchNorm1d)
