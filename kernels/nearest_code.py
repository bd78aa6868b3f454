import torch


@torch.no_grad()
def nearest_code(x, codebook):
    """x (T, D), codebook (K, D) -> (index (T,) int64, squared_distance (T,) float32)."""
    codes = codebook.double()
    index = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for i in range(0, len(x), 4096):
        row = x[i:i + 4096].double()
        index[i:i + 4096] = (codes.square().sum(1) - 2 * row @ codes.T).argmin(1)
    index[~x.isfinite().all(1)] = -1
    return index, (x.float() - codebook.float()[index]).square().sum(1)
