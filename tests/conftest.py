"""Shared set-up: long tests behind --long, a ledger of openings that is not the user's, small packed networks."""

from __future__ import annotations

import os
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    """The ledger of openings of the user who runs the tests stays as it is."""
    state = tempfile.TemporaryDirectory()
    os.environ["XDG_STATE_HOME"] = state.name
    config.add_cleanup(state.cleanup)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked long")
    parser.addoption(
        "--sample", action="store_true", help="also run some of the tests marked long, always the same: one in ten, or in its `share`"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    sample = config.getoption("--sample")
    skip = pytest.mark.skip(reason="long; run with --long, or some of them with --sample")
    for item in items:
        mark = item.get_closest_marker("long")
        if mark and not (sample and zlib.crc32(item.nodeid.encode()) % mark.kwargs.get("share", 10) == 0):
            item.add_marker(skip)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A packed "network" of NumPy alone: y = 2x; a batch of 7 sleeps, 13 dies, 17 raises."""
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "load.py").write_text(
        "import os, time\n\n"
        "def load(folder):\n"
        "    def run(x):\n"
        "        if len(x) == 7: time.sleep(60)\n"
        "        if len(x) == 13: os.abort()\n"
        "        if len(x) == 17: raise RuntimeError('seventeen')\n"
        "        return (x * 2,)\n"
        "    return run\n"
    )
    return folder
