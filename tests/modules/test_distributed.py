"""Training in two processes on one machine, which talk by gloo: DistributedDataParallel and fully_shard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import two_processes

WORLD = 2  # processes
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Runs all checks in two processes; returns the failures of each process, by check."""
    folder = tmp_path_factory.mktemp("distributed")
    script = [sys.executable, two_processes.__file__, str(folder / "store")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    reports = [folder / f"{rank}.json" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [*script, str(rank), str(WORLD), str(report)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank, report in enumerate(reports)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return [json.loads(report.read_text()) for report in reports]


@pytest.mark.parametrize("name", two_processes.CHECKS)
def test_two_processes_agree_with_one(failures, name):
    found = [failed[name] for failed in failures if name in failed]
    assert not found, "\n".join(found)
