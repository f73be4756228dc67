"""Every optimizer × every law."""

from __future__ import annotations

import copy
import io
import math
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hasten
from hasten import optim
from hasten.core.errors import BackendMissing, Unsupported, UsageError
from hasten.train import Fit
from hasten.train.layers import optimizer_of
from hasten.train.optim import kernel, launch
from optimizers import ROWS, Row, network, problem, train, weights

every = pytest.mark.parametrize("name", ROWS)
compiled = pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.kernel])


def made(row: Row, module: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return row.make(module.parameters(), **{"lr": row.lr, **row.options, **more})


def trained(name: str, *, steps: int = 8, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = network(dtype)
    optimizer = made(ROWS[name], module, **more)
    train(module, optimizer, steps, gaps=True)
    return module, optimizer


def test_the_table_has_every_optimizer() -> None:
    kinds = {type(made(row, network())).__name__ for row in ROWS.values()}
    assert kinds == set(optim.__all__) - {"missing"}
    assert hasten.optim is optim


@every
def test_gradients_are_left_alone(name: str) -> None:
    if ROWS[name].closure:
        pytest.skip("its closure writes the gradients")
    module = network()
    optimizer = made(ROWS[name], module)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), before, strict=True))  # type: ignore[arg-type]


@every
def test_a_parameter_without_gradient_stays(name: str) -> None:
    module = network()
    optimizer = made(ROWS[name], module)
    held = module[0].weight
    held.requires_grad_(False)
    before = held.clone()
    train(module, optimizer, 3)
    assert torch.equal(held, before)
    assert not optimizer.state[held]


@every
def test_same_seed_same_result(name: str) -> None:
    assert torch.equal(weights(trained(name)[0]), weights(trained(name)[0]))


@every
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
def test_it_goes_on_bit_equal_from_its_state(name: str, dtype: torch.dtype | None) -> None:
    if dtype and dtype not in ROWS[name].small:
        pytest.skip("no such state")
    whole, _ = trained(name, steps=12, state_dtype=dtype)
    module, optimizer = trained(name, steps=5, state_dtype=dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = made(ROWS[name], module, state_dtype=dtype, **({} if ROWS[name].closure else {"maximize": False}))
    again.load_state_dict(torch.load(file, weights_only=True))
    train(module, again, 7, start=5, gaps=True)
    assert torch.equal(weights(whole), weights(module))


@every
def test_it_goes_on_bit_equal_from_a_copy(name: str) -> None:
    whole, _ = trained(name, steps=8)
    module, optimizer = trained(name, steps=3)
    module, optimizer = copy.deepcopy((module, optimizer))
    train(module, optimizer, 5, start=3, gaps=True)
    assert torch.equal(weights(whole), weights(module))


@compiled
@pytest.mark.parametrize("maximize", [False, True], ids=["down", "up"])
def test_the_kernel_equals_the_plain_path(name: str, maximize: bool) -> None:
    """In double precision over many steps, where nothing is amplified; in single precision over few."""
    for dtype, steps, tolerance in ((torch.float64, 15, 1e-9), (torch.float32, 2, 1e-6)):
        ways = ({"fused": True}, {"fused": False}, {"foreach": True})
        results = [weights(trained(name, steps=steps, dtype=dtype, maximize=maximize, **way)[0]) for way in ways]
        assert torch.equal(results[1], results[2])
        torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=2 * tolerance)


@every
def test_each_group_has_its_rate(name: str) -> None:
    row, module = ROWS[name], network()
    if name == "Prodigy":
        pytest.skip("one rate for all groups, or 0")
    first, *rest = list(module.parameters())
    optimizer = row.make([{"params": [first], "lr": 0.0}, {"params": rest}], lr=row.lr, **row.options)
    before = first.detach().clone()
    moved = rest[0].detach().clone()
    train(module, optimizer, 3)
    torch.testing.assert_close(first.detach(), before, rtol=0, atol=0)
    assert not torch.equal(rest[0], moved)


@every
def test_a_schedule_drives_it(name: str) -> None:
    module = network()
    optimizer = made(ROWS[name], module)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    start = weights(module)
    train(module, optimizer, 1)
    train(module, optimizer, 1, start=1)
    middle = weights(module)
    schedule.step()
    if name.startswith("ScheduleFree"):
        optimizer.param_groups[0]["lr_max"] = -1.0
        optimizer.param_groups[0]["weight_sum"] = 1.0
    train(module, optimizer, 2, start=2)
    assert not torch.equal(start, middle)
    assert torch.equal(middle, weights(module))


@every
def test_a_group_can_join(name: str) -> None:
    module = network()
    *first, last = list(module.parameters())
    row = ROWS[name]
    optimizer = row.make(first, lr=row.lr, **row.options)
    train(module, optimizer, 2)
    before = last.detach().clone()
    optimizer.add_param_group({"params": [last]})
    train(module, optimizer, 3, start=2)
    assert not torch.equal(last, before)


@every
def test_it_goes_down_a_regression(name: str) -> None:
    """A noisy line, full batch: y = 2x − 1."""
    torch.manual_seed(0)
    row = ROWS[name]
    x = torch.linspace(-1, 1, 32)[:, None]
    y = 2 * x - 1 + 0.05 * torch.randn(32, 1)
    module = nn.Linear(1, 1)
    optimizer = made(row, module)
    rate = row.lr

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        return loss

    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / 300)
        loss = optimizer.step(closure)
    assert loss.item() < 0.01, loss


@every
def test_nothing_finite_is_made_of_nan(name: str) -> None:
    """What is not finite in a gradient shows in the parameter or its state; the other parameters are as torch leaves them."""
    row, module = ROWS[name], network()
    optimizer = made(row, module)
    x, y = problem()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        assert module[3].weight.grad is not None
        module[3].weight.grad[0, 0] = math.nan
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    inside = [module[3].weight.detach(), *(v for v in optimizer.state[module[3].weight].values() if torch.is_tensor(v))]
    assert any(not v.isfinite().all() for v in inside)


@every
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0; expected a number of at least 0"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ({"lr": math.nan}, "Invalid learning rate: nan"),
        ({"weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
        ({"differentiable": True}, "does not support `differentiable`"),
        ({"capturable": True}, "capturable must be False"),
        ({"fused": True, "foreach": True}, "cannot be `True` together"),
        ({"state_dtype": torch.float16}, "state_dtype must be one of"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_settings_are_refused(name: str, bad: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        made(ROWS[name], network(), **bad)


@every
def test_unknown_settings_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="momentun"):
        made(ROWS[name], network(), momentun=0.9)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_small_state_is_small_and_learns(name: str, dtype: torch.dtype) -> None:
    if dtype not in ROWS[name].small:
        pytest.skip("no such state")
    torch.manual_seed(0)
    row = ROWS[name]
    target, p = torch.randn(40, 30), nn.Parameter(torch.zeros(40, 30))
    optimizer = row.make([p], lr=row.lr, state_dtype=dtype, **row.options)

    def closure() -> torch.Tensor:
        p.grad = p.detach() - target
        return p.grad.square().mean()

    first = closure()
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = row.lr * (1 - step / 150)
        optimizer.step(closure)
    kinds = {v.dtype for v in optimizer.state[p].values() if v.ndim}
    assert kinds & {dtype, torch.uint8 if dtype == torch.int8 else dtype}
    assert closure() < 0.05 * first


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_equal_dense_ones(name: str) -> None:
    row, found = ROWS[name], []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(20, 3, sparse=sparse)
        optimizer = made(row, table)
        for step in range(10):
            optimizer.zero_grad()
            table(torch.tensor([step, step + 3, step])).square().sum().backward()
            optimizer.step()
        found.append(weights(table))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


@every
def test_sparse_gradients_are_refused_elsewhere(name: str) -> None:
    if name in ("SGD", "Adagrad", "SAM", "ScheduleFreeSGD"):
        pytest.skip("taken, or the base's affair")
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(Unsupported, match="sparse"):
        ROWS[name].make([p], lr=0.1, **ROWS[name].options).step()


def test_without_a_compiler_the_plain_path_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(form: object) -> None:
        raise BackendMissing("no compiler here")

    monkeypatch.setattr(launch, "kernel", none)
    launch._say.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain path of the optimizers is taken.*no compiler here"):
        trained("AdamW")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("AdamW")
    with pytest.raises(BackendMissing, match="no compiler here"):
        trained("AdamW", fused=True)


def test_code_of_others_is_not_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = kernel.folder()
    folder.chmod(0o777)
    with pytest.raises(BackendMissing, match="writable by nobody else"):
        kernel.folder()


def test_a_damaged_kernel_is_built_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" int run() { return 7; }'
    kernel._loaded(source)
    file = next(kernel.folder().glob("*.so"))
    file.unlink()
    file.write_bytes(b"torn")
    file.chmod(0o700)
    assert kernel._loaded(source).run() == 7


def test_a_compiler_that_fails_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BackendMissing, match="failed"):
        kernel._loaded("this is no C++")


def test_the_example_shows_a_rate_for_each_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    """Adagrad's rates only fall; Adam's grow again when the gradients have become small."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "effective_steps.py"))
    found = script["main"](steps=150)
    assert "step  100" in capsys.readouterr().out
    first, last = found["Adagrad"][0], found["Adagrad"][-1]
    assert first[1] == pytest.approx(100 * first[0], rel=1e-5)
    assert all(later <= earlier for later, earlier in zip(last, first, strict=True))
    assert found["Adam"][-1][0] > found["Adam"][0][0]


def test_a_scaler_scales_and_skips() -> None:
    """torch.amp.GradScaler: the scaled loss gives the same step; a gradient that overflowed gives none."""
    ends = []
    for scale in (1.0, 1024.0):
        module = network()
        optimizer = optim.AdamW(module.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            optimizer.zero_grad()
            x, y = problem(step)
            scaler.scale((module(x) - y).square().mean()).backward()
            if step == 1:
                assert module[3].weight.grad is not None
                module[3].weight.grad[0, 0] = math.inf
            before = weights(module)
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, weights(module)) == (step == 1)
        ends.append(weights(module))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


def test_the_loop_takes_ours_where_it_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours on a CPU with a compiler, else torch's fused one; both mean the same."""
    for kind, name in (("adamw", "AdamW"), ("sgd", "SGD")):
        monkeypatch.undo()
        ours = optimizer_of(nn.Linear(10, 10), Fit(optimizer=kind))
        monkeypatch.setattr(optim, "missing", lambda: "no compiler")
        theirs = optimizer_of(nn.Linear(10, 10), Fit(optimizer=kind))
        assert type(ours) is getattr(optim, name)
        assert type(theirs) is getattr(torch.optim, name)
        shared = set(ours.param_groups[0]) & set(theirs.param_groups[0]) - {"params", "fused"}
        assert all(ours.param_groups[0][key] == theirs.param_groups[0][key] for key in shared)


def test_the_loop_takes_muon_for_matrices_and_adamw_for_the_rest() -> None:
    module = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(3, 5, 4), nn.BatchNorm1d(5), nn.Linear(1, 2))
    optimizer = optimizer_of(module, Fit(optimizer="muon", learning_rate=0.3, weight_decay=0.1, rates=(("3", 2.0),)))
    assert type(optimizer) is optim.Muon
    table, kernel, scale, shift, bias, last, last_bias = (module.get_parameter(n) for n in (
        "0.weight", "1.weight", "2.weight", "2.bias", "1.bias", "3.weight", "3.bias"
    ))  # fmt: skip
    found = {id(p): (g["use_muon"], g["weight_decay"], g["scale"]) for g in optimizer.param_groups for p in g["params"]}
    wanted = {id(table): (False, 0.1, 1.0), id(kernel): (True, 0.1, 1.0), id(last): (True, 0.1, 2.0), id(last_bias): (True, 0.0, 2.0)}
    assert found == wanted | {id(p): (True, 0.0, 1.0) for p in (scale, shift, bias)}
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before = kernel.detach().clone()
    optimizer.step()
    assert {"exp_avg", "exp_avg_sq"} <= set(optimizer.state[table]) & set(optimizer.state[scale])
    step = (before * (1 - 0.3 * 0.1) - kernel.detach()) / 0.3
    singular = torch.linalg.svdvals(step.flatten(1))[0] / (0.2 * 12**0.5)
    assert 0.6 < singular < 1.3  # near 1 by five steps of the quintic
