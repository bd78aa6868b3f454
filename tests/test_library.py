"""A program that uses the kernels keeps its own switches, and asks for what it needs."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import nearest_code
from kernels.nearest_code import _torch_path


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_no_switch_of_the_process_is_touched():
    """Threads that turn one off and on again may leave it off."""
    def switches():
        return (torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic,
                torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision())

    class Within(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(switches())
            return function(*args, **(kwargs or {}))

    seen, before = set(), switches()
    with Within():
        _torch_path(normal(100, 8), normal(16, 8))
        nearest_code(normal(100, 8), normal(16, 8))
    assert seen == {before} == {switches()}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: nearest_code(normal(64, 8, seed=seed), normal(16, 8)),
                      range(200)))
    assert switches() == before


@pytest.mark.parametrize("T, K", [(0, 5), (1, 1), (40, 33), (300, 512)])
def test_the_index_is_the_same_without_the_distance(T, K):
    x, codebook = normal(T, 8), normal(K, 8, seed=1)
    x[::7] = torch.nan
    x[1::7] = codebook[K // 2]
    distance = (x.double()[:, None] - codebook.double()).square().sum(2)
    expected = distance.nan_to_num(nan=torch.inf).argmin(1).masked_fill(x.isnan().any(1), -1)
    twice = torch.cat([codebook, codebook])                              # of ties the lowest
    assert torch.equal(nearest_code(x, twice, distance=False)[0], expected)
