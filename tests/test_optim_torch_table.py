"""torch's own table of optimizers, its settings and its errors, with our classes in the place of torch's."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from hasten import optim
from hasten.core.errors import HastenError

pytest.importorskip("expecttest", reason="torch's table needs expecttest; pip install hasten[dev]")
with warnings.catch_warnings(action="ignore"):  # that hypothesis, which the table does not use, is not installed
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFOS = {info.optim_cls.__name__: info for info in optim_db if hasattr(optim, info.optim_cls.__name__)}
ELSEWHERE = {
    "lr as a Tensor is not supported": "a tensor lr is supported on every path",
    r"betas\[0\] as a Tensor is not supported": "tensor betas are supported on every path",
    "Muon only supports 2D": "filters are matrices and vectors take AdamW's step",
    "betas must be either both floats or both Tensors": "each is read as a number",
}
ERRORS = [
    (name, case)
    for name, info in INFOS.items()
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    if case.error_regex not in ELSEWHERE and not any(case.error_regex.startswith(words) for words in ELSEWHERE)
]
INPUTS = [(name, case) for name, info in INFOS.items() for case in info.optim_inputs_func(device="cpu", dtype=torch.float32)]


def test_the_table_is_there() -> None:
    assert set(INFOS) == {"SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "NAdam", "Adafactor", "Muon"}


@pytest.mark.parametrize(("name", "case"), ERRORS, ids=lambda v: v if isinstance(v, str) else v.optimizer_error_input.desc)
def test_its_errors_are_raised(name: str, case: Any) -> None:
    given, make = case.optimizer_error_input, getattr(optim, name)
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(2, 3))]
    if case.error_type is UserWarning:
        with pytest.warns(UserWarning, match=case.error_regex):
            make(params, **given.kwargs)
        return
    ours: tuple[type[Exception], ...] = (case.error_type, HastenError)
    if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(ours, match=case.error_regex):
            make(params, **given.kwargs)
        return
    optimizer = make(params, **given.kwargs)
    for p in params:
        p.grad = torch.zeros_like(p)
    with pytest.raises(ours, match=re.sub("parameters?$", "", case.error_regex)):
        optimizer.step()


@pytest.mark.parametrize(("name", "case"), INPUTS, ids=lambda v: v if isinstance(v, str) else v.desc)
@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
def test_its_settings_give_torchs_steps(name: str, case: Any, way: dict[str, bool]) -> None:
    if name in ("Muon", "Adafactor") and "fused" in way:
        pytest.skip("no part of torch's or no fused")
    if name == "Muon":
        pytest.skip("torch rounds to bfloat16; see test_optim_parity.py")
    ends = []
    for room, more in ((optim, way), (torch.optim, {})):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
        optimizer = getattr(room, name)([{"params": params[:1], "lr": 0.01}, {"params": params[1:]}], **{**case.kwargs, **more})
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)
