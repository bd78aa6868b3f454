"""Histogram L1: equation 12's distance between predicted and actual code histograms.

For each image, mask and level:
    Q = histogram of the level's codes over the mask's tokens, divided by their number
    P = softmax(logits)
    loss = sum_k |P_k - Q_k|
    d loss / d logits = P (s - sum_k P_k s_k) with s = sign(P - Q)

What moves through memory, in kB a row (one image, mask and level; K = 512 codes, N = 576 tokens):
  naive    scatter_add needs the codes as 64-bit indices and a weight for each (7), and a zeroed
           histogram to add to (6). Softmax, division, difference, absolute value and sum pass over
           K numbers each (18). Backward: 20 more.
  here     The logits are read once (2). Codes (1.2) and mask (0.6) come from cache, since all masks
           of an image share the codes. The histogram lives in shared memory. Where a gradient is
           wanted, the same pass writes it (2), and backward only scales it by what arrives (4).
  floor    The logits themselves: 2 forward, 8 with backward, so 2 and 8 ns a row at 1 TB/s. Below
           some ten thousand rows a launch costs more, and one launch instead of a dozen counts."""

from __future__ import annotations

import torch
from torch.autograd.forward_ad import unpack_dual
from torch.compiler import is_compiling

from .dispatch import jit, on_device, tl, triton, use_triton


def histogram_l1(logits: torch.Tensor, codes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """logits (B, M, L, K), codes (B, L, N), mask (M, N) or (B, M, N) bool -> (B, M, L), 0 to 2.

    Differentiable once in logits, backwards; other derivatives are right (on a CPU) or refused.
    Computed and returned in float32, for float64 logits in float64.
    On a CPU a mask without a token and a code outside 0..K-1, masked or not, are ValueErrors.
    On a GPU, where looking would make the host wait, a row with such a mask, or with such a code
    among its masked ones, is NaN, and so is its gradient."""
    (B, M, L, _), N = logits.shape, codes.shape[-1]
    if codes.shape != (B, L, N) or mask.shape not in ((M, N), (B, M, N)):
        raise ValueError("histogram_l1 needs logits (B, M, L, K), codes (B, L, N) and mask (M, N) "
                         f"or (B, M, N), got {tuple(logits.shape)}, {tuple(codes.shape)}, "
                         f"{tuple(mask.shape)}")
    if not logits.is_floating_point() or codes.is_floating_point() or mask.dtype != torch.bool:
        raise TypeError("histogram_l1 needs floating-point logits, integer codes and a bool mask, "
                        f"got {logits.dtype}, {codes.dtype}, {mask.dtype}")
    if logits.device.type == "cpu" and not (use_triton(logits.device) or is_compiling()):
        # An operator's dispatch would take longer than the rows of a step.
        keep = torch.is_grad_enabled()  # inside vmap and jvp requires_grad tells nothing
        difference = _P_and_difference(logits, codes, mask, keep)[1]
        return (difference.abs() if keep else difference.abs_()).sum(-1)
    if unpack_dual(logits).tangent is not None:
        raise RuntimeError("histogram_l1 has no forward-mode derivative here; use backward, or "
                           "histogram_l1_reference")
    differentiate = logits.requires_grad and torch.is_grad_enabled()
    return _histogram_l1(logits, codes, mask, differentiate)[0]


def histogram_l1_reference(logits, codes, mask) -> torch.Tensor:
    """The definition, differentiated by autograd: what tests and benchmark compare with."""
    B, M, L, _ = logits.shape
    index = codes.long()[:, None].expand(B, M, L, -1)
    chosen = mask.expand(B, M, -1)[:, :, None].expand(index.shape).to(logits.dtype)  # (B, M, L, N)
    Q = torch.zeros_like(logits).scatter_add(3, index, chosen) / chosen.sum(-1, keepdim=True)
    return (logits.softmax(-1) - Q).abs().sum(-1)


# ---- custom operator: the loss (B, M, L) and, where asked for, d loss / d logits (B, M, L, K)

@torch.library.custom_op("ladmim::histogram_l1", mutates_args=())
def _histogram_l1(logits: torch.Tensor, codes: torch.Tensor, mask: torch.Tensor,
                  differentiate: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if use_triton(logits.device) and logits.dtype != torch.float64:
        logits, codes, mask = logits.contiguous(), codes.contiguous(), mask.contiguous()
        return _triton_path(logits, codes, mask, differentiate)
    return _torch_path(logits, codes, mask, differentiate)


@_histogram_l1.register_fake
def _outputs(logits, codes, mask, differentiate):
    shape, dtype = logits.shape, torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_empty(shape[:3], dtype=dtype)
    return loss, logits.new_empty(shape if differentiate else (0,), dtype=dtype)


def _save(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)  # no zeros for the second output
    ctx.save_for_backward(output[1])


def _gradient(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("histogram_l1 has no second derivative here; leave create_graph out, "
                           "or use histogram_l1_reference")
    return (grad[..., None] * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None


_histogram_l1.register_autograd(_gradient, setup_context=_save)


# ---- torch

def _torch_path(logits, codes, mask, differentiate):
    P, difference = _P_and_difference(logits, codes, mask, differentiate)
    loss = difference.abs().sum(-1)
    if not differentiate:
        return loss, P.new_empty(0)
    return loss, torch._softmax_backward_data(difference.sign_(), P, -1, P.dtype)


def _P_and_difference(logits, codes, mask, keep):
    """P and P - Q, differentiable in logits; without `keep` P - Q overwrites P. NaN: no token."""
    (B, M, L, K), dtype = logits.shape, torch.promote_types(logits.dtype, torch.float32)
    chosen, index, wrong = mask.to(dtype), codes.long(), None
    tokens = chosen.sum(-1).expand(B, M)[:, :, None, None]
    if logits.device.type == "cpu":
        if not tokens.all():
            raise ValueError("histogram_l1: a mask has no token")
    else:  # a GPU that is too old for the kernel, or float64
        valid = (index >= 0) & (index < K)  # (B, L, N)
        wrong = (mask.expand(B, M, -1)[:, :, None] & ~valid[:, None]).any(-1, keepdim=True)
        wrong |= tokens == 0
        index = index.clamp(0, K - 1)
    index = index[:, None].expand(B, M, L, -1)
    counts = torch.zeros((B, M, L, K), dtype=dtype, device=logits.device)
    try:
        counts.scatter_add_(3, index, chosen.expand(B, M, -1)[:, :, None].expand_as(index))
    except RuntimeError:  # a CPU looks at each index, so no pass of ours has to
        raise ValueError(f"histogram_l1: codes must lie in 0..{K - 1}, got {int(codes.min())}.."
                         f"{int(codes.max())}") from None
    P = logits.softmax(-1, dtype=dtype)
    if wrong is not None:  # in P, as the sign of a difference of NaN is 0
        P.masked_fill_(wrong, torch.nan)
    return P, (P.addcdiv if keep else P.addcdiv_)(counts, tokens, value=-1)


# ---- Triton: one program a row

def _triton_path(logits, codes, mask, differentiate):
    loss, gradient = _outputs(logits, codes, mask, differentiate)
    if loss.numel():
        (_, M, L, K), N = logits.shape, codes.shape[-1]
        sizes = {"M": M, "L": L, "N": N, "K": K, "MASK_B": M * N if mask.ndim == 3 else 0}
        with on_device(logits):
            _rows[(loss.numel(),)](logits, codes, mask, loss, gradient, **sizes, **tile_sizes(K),
                                   DIFFERENTIATE=differentiate)
    return loss, gradient


def tile_sizes(K: int) -> dict[str, int]:
    """Tokens and codes a tile: a histogram of more than 1,024 codes would not fit the registers."""
    codes = min(1024, max(32, triton.next_power_of_2(K)))
    return {"BLOCK_N": 256, "BLOCK_K": codes, "num_warps": 4}


@jit
def _count(codes, mask, row, M, L, N, K, MASK_B, BLOCK_N: tl.constexpr):
    """The row's codes and mask, and 1 / its masked tokens, NaN for none or for a wrong code."""
    level = row % L
    b = row // (M * L)
    codes += (b * L + level) * N
    mask += b * MASK_B + row // L % M * N
    total, wrong = 0, 0
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        chosen = tl.load(mask + n, n < N, 0) != 0
        code = tl.load(codes + n, chosen, 0)
        total += tl.sum(chosen.to(tl.int32), 0)
        wrong += tl.sum((chosen & ((code < 0) | (code >= K))).to(tl.int32), 0)
    share = 1.0 / tl.maximum(total, 1).to(tl.float32)
    return codes, mask, tl.where((total > 0) & (wrong == 0), share, float("nan"))


@jit
def _histogram(codes, mask, first, N, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """How many masked tokens have each of the codes first .. first + BLOCK_K - 1."""
    counts = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        chosen = tl.load(mask + n, n < N, 0) != 0
        code = tl.load(codes + n, chosen, -1).to(tl.int32) - first
        counts += tl.histogram(code, BLOCK_K, mask=chosen & (code >= 0) & (code < BLOCK_K))
    return counts.to(tl.float32)


@jit
def _difference(logits, codes, mask, share, log_sum, first, N, K, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):
    """P and P - Q of the codes first .. first + BLOCK_K - 1, both 0 beyond K."""
    k = first + tl.arange(0, BLOCK_K)
    P = tl.exp(tl.load(logits + k, k < K, float("-inf")).to(tl.float32) - log_sum)
    difference = P - _histogram(codes, mask, first, N, BLOCK_N, BLOCK_K) * share
    return P, tl.where(k < K, difference, 0.0)


@jit
def _sign(difference):
    return tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))  # keeps NaN


@jit
def _rows(logits, codes, mask, loss, gradient, M, L, N, K, MASK_B, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr, DIFFERENTIATE: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    codes, mask, share = _count(codes, mask, row, M, L, N, K, MASK_B, BLOCK_N)
    logits += row * K
    # The softmax: its largest logit, then the logarithm of its sum.
    largest = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    for first in range(0, K, BLOCK_K):
        x = tl.load(logits + first + k, first + k < K, float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 0)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K, BLOCK_K):  # from here on the row comes from cache
        x = tl.load(logits + first + k, first + k < K, float("-inf")).to(tl.float32)
        total += tl.exp(x - top)
    log_sum = top + tl.log(tl.sum(total, 0))
    # The loss and, for the gradient, the signs' mean under P.
    distance, signed = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K, BLOCK_K):
        P, difference = _difference(logits, codes, mask, share, log_sum, first, N, K,
                                    BLOCK_N, BLOCK_K)
        distance += tl.abs(difference)
        signed += P * _sign(difference)
    tl.store(loss + row, tl.sum(distance, 0))
    if DIFFERENTIATE:
        mean = tl.sum(signed, 0)
        for first in range(0, K, BLOCK_K):
            P, difference = _difference(logits, codes, mask, share, log_sum, first, N, K,
                                        BLOCK_N, BLOCK_K)
            tl.store(gradient + row * K + first + k, P * (_sign(difference) - mean), first + k < K)
