"""Makes models of other libraries fast: which class of which library becomes which op."""

from .accelerate import accelerate, restore
from .outcome import Acceleration

__all__ = ["Acceleration", "accelerate", "restore"]
