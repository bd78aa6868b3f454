"""Triton runs on CUDA tensors, torch on others; LADMIM_KERNELS=torch|triton forces one of them."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no build for macOS or Windows: the torch paths need none of it
    triton = tl = None


def jit(function):
    """triton.jit; without Triton the function itself, which nothing then calls."""
    return function if triton is None else triton.jit(function)


def use_triton(device: torch.device) -> bool:
    """Do the Triton kernels run on `device`? RuntimeError if they are forced and cannot."""
    choice = os.environ.get("LADMIM_KERNELS", "")
    if choice not in ("", "torch", "triton"):
        raise RuntimeError(f"LADMIM_KERNELS={choice}: must be torch or triton, or unset to choose "
                           "by device")
    if choice == "torch" or not choice and device.type == "cpu":
        return False
    reason = _why_not(device)
    if reason and choice == "triton":
        raise RuntimeError(f"LADMIM_KERNELS=triton: {reason}; unset it to choose by device")
    return not reason


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one: Triton launches there, on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _why_not(device: torch.device) -> str:
    """The reason the kernels cannot run on `device`, or nothing."""
    if triton is None:
        return "triton is not installed"
    if device.type == "cuda" and torch.version.cuda:
        # The kernels need asynchronous copies and 99 KiB of shared memory: Ampere, 2020, and later.
        old = torch.cuda.get_device_capability(device) < (8, 0)
        return "the GPU is older than compute capability 8.0" if old else ""
    # Triton's interpreter, slow and for tests, must be asked for before Triton is imported.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"no kernel runs on {device.type} (on a CPU set TRITON_INTERPRET=1 as well, for tests)"
