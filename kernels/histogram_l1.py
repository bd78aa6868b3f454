import torch


def histogram_l1(logits, codes, mask):
    """logits (B, M, L, K), codes (B, L, N), mask (M, N) or (B, M, N) bool -> (B, M, L)."""
    B, M, L, K = logits.shape
    mask = mask.expand(B, -1, -1)
    if not mask.any(-1).all():
        raise ValueError("histogram_l1: a mask has no tokens")
    index = codes.long()[:, None].expand(B, M, L, -1)
    count = torch.zeros_like(logits).scatter_add_(3, index, mask[:, :, None].expand_as(index).to(logits.dtype))
    return (logits.softmax(-1) - count / mask.sum(-1)[:, :, None, None]).abs().sum(-1)
