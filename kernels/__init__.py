"""The two hot operations of LADMIM: Triton kernels, with a torch path for every other device."""

from .histogram_l1 import histogram_l1
from .nearest_code import nearest_code, nearest_own_code

__all__ = ["histogram_l1", "nearest_code", "nearest_own_code"]
