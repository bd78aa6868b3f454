"""Which implementation runs: CUDA tensors go to Triton, all others to torch; LADMIM_KERNELS=torch|triton forces one."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no build for macOS or Windows: the torch paths need none of it
    triton = tl = None


def jit(function):
    """triton.jit where Triton is installed; otherwise the function itself, which nothing then calls."""
    return function if triton is None else triton.jit(function)


def use_triton(tensor: torch.Tensor) -> bool:
    """True if `tensor` goes to the Triton kernels; RuntimeError if the environment forces them where they cannot."""
    choice = os.environ.get("LADMIM_KERNELS", "")
    if choice not in ("", "torch", "triton"):
        raise RuntimeError(f"LADMIM_KERNELS={choice}: must be torch or triton, or unset to choose by device")
    if choice == "torch":
        return False
    reason = _why_not(tensor.device)
    if reason and choice == "triton":
        raise RuntimeError(f"LADMIM_KERNELS=triton: {reason}; unset it to choose by device")
    return not reason


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device and its current stream: this makes the tensor's device the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _why_not(device: torch.device) -> str:
    """The reason the kernels cannot run on `device`, or nothing."""
    if triton is None:
        return "triton is not installed"
    if device.type == "cuda" and torch.version.cuda:
        # The kernels rest on asynchronous copies and 99 KiB of shared memory: Ampere, 2020, and later.
        old = torch.cuda.get_device_capability(device) < (8, 0)
        return "the GPU is older than compute capability 8.0" if old else ""
    # Triton's interpreter runs kernels on the CPU, slowly, for tests. It must be asked for before Triton is imported.
    asked = os.environ.get("LADMIM_KERNELS") == "triton" and device.type == "cpu"
    if asked and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"no kernel runs on {device.type} (on a CPU set TRITON_INTERPRET=1 as well, for tests)"
