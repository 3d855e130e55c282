"""The machine and the versions, as `info` prints them and every report holds them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import visattn_fast


@dataclass(frozen=True)
class Machine:
    """A machine and the versions on it.

    Attributes:
        package: version of visattn_fast.
        commit: commit of visattn_fast if it runs from a checkout, with "-dirty" if files were edited; else None.
        cores: number of cores that this process may use.
        threads: number of threads that torch uses.
        compiler: C++ compiler that torch.compile would find for the CPU; None if there is none.
    """

    package: str
    commit: str | None
    python: str
    torch: str
    triton: str | None
    system: str
    cpu: str
    cores: int
    threads: int
    compiler: str | None
    device: str
    device_name: str


def describe(device: torch.device) -> Machine:
    """Describes this machine and ``device``."""
    return Machine(
        package=visattn_fast.__version__,
        commit=_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version_of("triton"),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        compiler=_compiler(),
        device=str(device),
        device_name=_cpu_model() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device),
    )


def version_of(package: str) -> str | None:
    """Returns the version of an installed package without importing it; None if it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    return found and (_first_line(found, "--version") or found)


def _commit() -> str | None:
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    if not shutil.which("git") or _first_line(*git, "ls-files", here.name) != here.name:
        return None  # installed, perhaps beneath another repository
    commit = _first_line(*git, "rev-parse", "--short=12", "HEAD")
    dirty = _first_line(*git, "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("-dirty" if dirty else "")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "")
