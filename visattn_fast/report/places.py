"""Checks, before the work begins, that its results can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path


def make_writable(folder: Path, option: str) -> None:
    """Makes the folder, and a file in it that disappears. Raises ValueError, naming the option, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write into {folder}: {error}") from error
