"""What is measured: a module at a size, in a layout, forward or forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..catalogue import ENTRIES, LAYOUTS, SHAPES

MODES = {"forward": "inference, no gradients", "both": "training, forward and backward"}
CONTENDERS = {"eager": "plain PyTorch", "compile": "torch.compile of it", "fused": "visattn_fast"}
QUICK_MODULES = ("se", "eca", "cbam")
MODULES = tuple(name for name, entry in ENTRIES.items() if entry.training)
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """One comparison: module ``op`` of the catalogue on a map of ``shape`` ``[N, C, H, W]``.

    Attributes:
        dtype: the name of a floating dtype of torch.
        layout: ``"nchw"`` or ``"channels_last"``.
        mode: ``"forward"`` (under no_grad) or ``"both"`` (forward, then gradients of x and of every parameter).
    """

    op: str
    shape: Shape
    dtype: str = "float32"
    layout: str = "nchw"
    mode: str = "forward"

    @property
    def size(self) -> str:
        """The shape as ``8x64x112x112``."""
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.op} {self.size} {self.dtype} {self.layout} {self.mode}"


def matrix(
    ops: Iterable[str] = MODULES,
    shapes: Iterable[Shape] = SHAPES,
    layouts: Iterable[str] = tuple(LAYOUTS),
    modes: Iterable[str] = tuple(MODES),
    dtype: str = "float32",
) -> list[Case]:
    """Every combination, a whole shape after the other, so that a run cut short has finished its first shapes."""
    ops, layouts, modes = tuple(ops), tuple(layouts), tuple(modes)
    return [Case(op, s, dtype, layout, mode) for s in shapes for op in ops for layout in layouts for mode in modes]


def parse_shape(text: str) -> Shape:
    """``8x64x112x112`` -> ``(8, 64, 112, 112)``. Raises ValueError on anything else."""
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"a shape is four positive sizes, such as 8x64x112x112, got {text!r}")
    return sizes


def choose(text: str, known: Sequence[str]) -> list[str]:
    """``"se,cbam"`` -> ``["se", "cbam"]``. Raises ValueError on a name that is not ``known``."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {name!r}; known are {', '.join(known)}")
    return names
