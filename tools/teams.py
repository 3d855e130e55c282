"""Runs kernels whose programs wait for each other under Triton's interpreter, which runs one program after the other.

Within `together` the programs of such a kernel take turns: each runs until an atomic operation, and then a random one
of the unfinished programs goes on. So orders of events that only a GPU's timing produces occur here, too.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.runtime import interpreter

import visattn_fast as vf
from visattn_fast.kernels.experimental import resident as switch

WAITS_AT = "meet_ptr"  # the parameter that tells that a kernel waits
PATIENCE = 2000  # turns that a program may take; one that waits for what never comes takes more


@contextmanager
def resident(device: str) -> Iterator[None]:
    """Within the context, SE and ECA on this type of device keep images on the chip, if Triton serves the device."""
    if not vf.backends(device)["triton"].available:  # registers Triton's kernels
        yield
        return
    with switch.resident(device.upper()):
        yield


@contextmanager
def together(seed: int = 0) -> Iterator[None]:
    """Within the context, kernels that wait at ``meet_ptr`` run as teams, in an order that ``seed`` decides.

    Raises:
        RuntimeError: a program waits for what never comes.
    """
    call = interpreter.GridExecutor.__call__
    chance = random.Random(seed)

    def run(executor: Any, *args: Any, **kwargs: Any) -> None:
        if WAITS_AT in executor.arg_names:
            executor.fn = _Turns(executor.fn, chance)
        call(executor, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", run):
        yield


class _Program(threading.Thread):
    """One program, which runs only between `go` and the next `pause`."""

    def __init__(self, program: tuple[int, ...], run: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.program, self.work = program, run
        self.mine, self.others = threading.Semaphore(0), threading.Semaphore(0)
        self.turns, self.done, self.fault = 0, False, None

    def run(self) -> None:
        self.mine.acquire()
        try:
            self._select()
            self.work()
        except BaseException as fault:  # raised by the thread that waits for this one
            self.fault = fault
        self.done = True
        self.others.release()

    def go(self) -> None:
        self.turns += 1
        self.mine.release()
        self.others.acquire()
        if self.fault:
            raise self.fault
        if self.turns > PATIENCE:
            raise RuntimeError(f"program {self.program} waits for what never comes")

    def pause(self) -> None:
        self.others.release()
        self.mine.acquire()
        self._select()

    def _select(self) -> None:
        interpreter.interpreter_builder.set_grid_idx(*self.program)


class _Turns:
    """Stands for a kernel's function: the interpreter calls it for each program; all programs run at the last call."""

    def __init__(self, fn: Any, chance: random.Random) -> None:
        self.fn, self.chance = fn, chance
        self.__name__, self.__globals__, self.__signature__ = fn.__name__, fn.__globals__, inspect.signature(fn)
        self.programs: list[_Program] = []

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        self.programs.append(_Program(builder.grid_idx, lambda: self.fn(**arguments)))
        columns, rows, layers = builder.grid_dim
        if len(self.programs) == columns * rows * layers:
            with _pausing():
                self._run()

    def _run(self) -> None:
        for program in self.programs:
            program.start()
        while waiting := [program for program in self.programs if not program.done]:
            self.chance.choice(waiting).go()


@contextmanager
def _pausing() -> Iterator[None]:
    atomic = interpreter.InterpreterBuilder.create_atomic_rmw

    def then_pause(*args: Any) -> Any:
        result = atomic(*args)
        program = threading.current_thread()
        assert isinstance(program, _Program)
        program.pause()
        return result

    with mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_rmw", then_pause):
        yield
