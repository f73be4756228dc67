"""Two processes, each with half of every weight (FSDP2 over gloo), against one."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from hasten import optim
from hasten.core.errors import Unsupported

KINDS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adagrad": {"lr": 0.1},
    "AdamW": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "Lion": {"lr": 0.01},
    "ScheduleFreeAdamW": {"lr": 0.05},
}
WHOLE = ("Adafactor", "Muon", "SOAP", "Prodigy")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def steps(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def work(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for name, arguments in KINDS.items():
            module = network()
            mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
            fully_shard(module, mesh=mesh)
            optimizer = getattr(optim, name)(module.parameters(), fused=True, **arguments)
            steps(module, optimizer)
            assert all(isinstance(p, DTensor) for p in module.parameters())
            ends = {key: value.full_tensor() for key, value in module.state_dict().items()}
            if rank == 0:
                torch.save(ends, f"{folder}/{name}.pt")
        for name in WHOLE:
            module = network()
            fully_shard(module, mesh=mesh)
            with pytest.raises(Unsupported, match="distributed"):
                steps(module, getattr(optim, name)(module.parameters()))
        with pytest.raises(Unsupported, match="int8"):
            steps(module, optim.AdamW(module.parameters(), state_dtype=torch.int8))
    finally:
        dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over fork-free processes, tried on Linux")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    for name, arguments in KINDS.items():
        module = network()
        steps(module, getattr(optim, name)(module.parameters(), **arguments))
        ends = torch.load(tmp_path / f"{name}.pt")
        for key, value in module.state_dict().items():
            torch.testing.assert_close(ends[key], value, rtol=1e-5, atol=1e-6)
