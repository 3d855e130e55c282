"""The cases of the report: modules at sizes, in layouts, dtypes and modes, and the contenders that run them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..catalogue import ENTRIES, LAYOUTS, SHAPES
from ..measure.step import DEFAULT_MODES


@dataclass(frozen=True)
class Contender:
    """One way to run a module.

    Attributes:
        about: a description for the reader.
        fused: True if the module is ours; the others are its rivals.
        compiled: the mode of torch.compile; None without it.
        asked: True if the contender runs only when asked for.
        library: the library that the module comes from; empty for our own modules. The contender takes part in the
            cases for which `rivals` has such a module.
    """

    about: str
    fused: bool = False
    compiled: str | None = None
    asked: bool = False
    library: str = ""


# No CUDA graphs: on the device's clock they show only their extra copy of the inputs.
CONTENDERS = {
    "eager": Contender("plain PyTorch"),
    "compile": Contender("torch.compile of it", compiled="default"),
    "compile-max-autotune": Contender(
        "torch.compile of it, mode max-autotune, no CUDA graphs", compiled="max-autotune-no-cudagraphs", asked=True
    ),
    "timm": Contender("timm's module", library="timm"),
    "timm-compile": Contender("torch.compile of timm's module", compiled="default", library="timm"),
    "fused": Contender("visattn_fast", fused=True),
    "fused-compile": Contender("torch.compile of visattn_fast", fused=True, compiled="default", asked=True),
}
DEFAULT_CONTENDERS = tuple(name for name, contender in CONTENDERS.items() if not contender.asked)
DTYPES = ("float32", "float64", "bfloat16", "float16")
QUICK_MODULES = ("se", "eca", "cbam")
MODULES = tuple(name for name, entry in ENTRIES.items() if entry.main)
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """One comparison: module ``op`` of the catalogue on a map ``[N, C, H, W]`` of ``shape``.

    Attributes:
        dtype: the name of a floating-point dtype of torch.
        layout: ``"nchw"`` or ``"channels_last"``.
        mode: one of `measure.step.MODES`; gradients are those of x and of every parameter.
    """

    op: str
    shape: Shape
    dtype: str = "float32"
    layout: str = "nchw"
    mode: str = "forward"

    @property
    def size(self) -> str:
        """The shape in the form ``8x64x112x112``."""
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.op} {self.size} {self.dtype} {self.layout} {self.mode}"


def matrix(
    ops: Iterable[str] = MODULES,
    shapes: Iterable[Shape] = SHAPES,
    layouts: Iterable[str] = tuple(LAYOUTS),
    modes: Iterable[str] = DEFAULT_MODES,
    dtypes: Iterable[str] = ("float32",),
) -> list[Case]:
    """Returns every combination, shape by shape, so that a run cut short has finished its first shapes."""
    rest = tuple(itertools.product(ops, dtypes, layouts, modes))
    return [Case(op, shape, dtype, layout, mode) for shape in shapes for op, dtype, layout, mode in rest]


def parse_shape(text: str) -> Shape:
    """Parses ``8x64x112x112`` into ``(8, 64, 112, 112)``. Raises ValueError for any other form."""
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"a shape is four positive sizes, such as 8x64x112x112, got {text!r}")
    return sizes


def choose(text: str, known: Sequence[str]) -> list[str]:
    """Splits ``"se,cbam"`` into names; ``"all"`` means all. Raises ValueError for a name that is not in ``known``."""
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {name!r}; known are {', '.join(known)}")
    return names
