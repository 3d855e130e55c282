"""Outside models made fast: which class of which library is which op."""

from .accelerate import accelerate, restore
from .report import Acceleration

__all__ = ["Acceleration", "accelerate", "restore"]
