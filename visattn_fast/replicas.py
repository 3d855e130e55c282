"""Recognises the threads that DataParallel starts: one for each replica of a module, for the time of one call.

Such a thread shares no context with the thread that called. PyTorch hands over its modes of gradients and autocast
alone.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

_STARTED_BY = "torch.nn.parallel.parallel_apply"


def _worker() -> tuple[Any, tuple[Any, ...]]:
    """Returns the function that DataParallel made this thread run, and its arguments; ``(None, ())`` elsewhere."""
    thread: Any = threading.current_thread()
    target = getattr(thread, "_target", None)
    return (target, thread._args) if getattr(target, "__module__", "") == _STARTED_BY else (None, ())


def place() -> int:
    """Returns the number of the replica that this thread runs; 0 in threads that run none."""
    _, arguments = _worker()
    return arguments[0] if arguments else 0


def caller() -> int | None:
    """Returns the identifier of the thread that called DataParallel and waits for this one; None if none does."""
    target, _ = _worker()
    if target is None:
        return None
    for thread, innermost in sys._current_frames().items():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code.co_name == "parallel_apply" and frame.f_locals.get("_worker") is target:
                return thread
            frame = frame.f_back
    return None
