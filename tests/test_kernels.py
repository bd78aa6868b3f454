"""The kernels against float64 and brute force: the torch paths, Triton in its interpreter and, if
there is one, on the GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import histogram_l1, nearest_code
from kernels.histogram_l1 import _histogram_l1, histogram_l1_reference
from kernels.nearest_code import _few_rows, _nearest_code, _torch_path

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("LADMIM_KERNELS") == "triton" and not torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="says nothing about the kernels, or is "
                                                         "too slow in the interpreter")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest_code_reference(x, codebook):
    """The definition, in float64 and with all T K D differences in memory."""
    distance = (x.double()[:, None] - codebook.double()[None]).square().sum(2)  # (T, K)
    nearest, index = distance.nan_to_num(nan=torch.inf).min(1)
    failed = ~x.isfinite().all(1) | nearest.isinf()
    return index.masked_fill(failed, -1), nearest.masked_fill(failed, torch.nan).float()


def found(x, codebook):
    """Index and distance by nearest_code, and by both torch paths: it takes one by the size."""
    small = DEVICE == "cpu" and not INTERPRETED and len(x) * len(codebook) <= 2**20
    for path in [nearest_code] + small * [lambda *of: _few_rows(*of, True), _torch_path]:
        yield [t.cpu() for t in path(x.to(DEVICE), codebook.to(DEVICE))]


def check(x, codebook):
    """The chosen code's distance is within 1e-5 of the smallest, so the index is float64's where
    the two best differ by more."""
    rows = max(1, 2**24 // max(1, codebook.numel()))
    for index, squared in found(x, codebook):
        assert index.shape == squared.shape == (len(x),) and squared.dtype == torch.float32
        assert index.dtype == torch.int64 and ((index >= 0) & (index < len(codebook))).all()
        for block, chosen, distance in zip(x.split(rows), index.split(rows), squared.split(rows)):
            exact = (block.double()[:, None] - codebook.double()).square().sum(2)  # (T, K)
            mine = exact.gather(1, chosen[:, None])[:, 0]
            assert (mine <= exact.amin(1) * (1 + 1e-5)).all()
            torch.testing.assert_close(distance, mine.float(), rtol=1e-5, atol=1e-37)


def check_ties(x, codebook, lowest):
    """lowest: `codebook` without what comes again later."""
    right = nearest_code_reference(x, lowest)[0]
    assert all(torch.equal(index, right) for index, _ in found(x, codebook))


# ---- nearest_code

@pytest.mark.parametrize("T, K, D", [
    (1, 1, 1), (1, 2, 1), (2, 1, 3), (63, 31, 2), (64, 32, 16), (65, 33, 17), (100, 64, 64),
    (129, 65, 65), (77, 100, 7), (40, 130, 384), (20, 70, 1024), (300, 512, 64), (50, 1000, 33)])
def test_shapes(T, K, D):
    check(normal(T, D), normal(K, D, seed=1))


@not_interpreted
@pytest.mark.parametrize("T, K, D", [
    (5001, 512, 64), (3, 65_536, 16), (1100, 4096, 32), (999, 777, 129)])
def test_large_shapes(T, K, D):
    check(normal(T, D), normal(K, D, seed=1))


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20])
def test_magnitudes(scale):
    # Most of these rows are done again, which the interpreter does slowly, 16 rows at a time.
    T, step = (16, 5) if INTERPRETED else (30, 2)
    x, codebook = normal(T, 8), normal(66, 8, seed=1)
    check(x * scale, codebook * scale)
    check(x * scale, codebook)
    check(x, codebook * scale)
    mixed = torch.logspace(-20, 20, 66)[:, None] * codebook
    check(x * scale, mixed)
    check(mixed[::step] * 1.3, mixed)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_far_away_clusters(offset):
    """||x||^2 is up to 1e12 times the distances that have to be compared."""
    x, codebook = normal(60, 16), normal(70, 16, seed=1)
    check(x + offset, codebook + offset)
    side, other = torch.sign(x[:, :1]), torch.sign(codebook[:, :1])
    check(x + offset * side, codebook + offset * other)


@pytest.mark.parametrize("gap", [1.1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("D", [2, 64, 300])
def test_near_ties(gap, D):
    """Points all but half way between two codes, where low-precision products would pick either."""
    codebook = normal(96, D, seed=1)
    a, b = codebook[:48].double(), codebook[48:].double()
    share = 0.5 - gap / 2 * normal(48, 1).sign().double()
    check((a + (b - a) * share).float(), codebook)


def test_codes_closer_than_float16_can_tell():
    """The margin has to hold what rounding the codes loses. float16 keeps x, multiples of 1/8."""
    codes = (normal(1, 4) * 8).round() / 8 + 1e-3 * normal(100, 4, seed=1)
    # So that the first 16 have mean 0 and nothing is shifted off the grid.
    pairs = (codes[:8] * 8).round() / 8
    check((normal(100, 4, seed=2) * 8).round() / 8, torch.cat([pairs, -pairs, codes]))


def test_points_closer_to_a_bisector_than_float16_can_tell():
    """The margin has to hold what rounding x loses: of four sums of two coordinates the best two
    are 2e-4 apart."""
    codes = torch.eye(4).repeat_interleave(2, 1)  # (1, 1, 0, ...), (0, 0, 1, 1, 0, ...), ...
    x = 1 + torch.rand(300, 5, 2, generator=torch.Generator().manual_seed(0)) / 2
    x[:, :2, 1] = x[:, 4:].sum(2) / 4 + 2 - x[:, :2, 0]
    x[:, 1, 1] += 2e-4
    x = x[:, :4] - torch.tensor([0.0, 0, 0.5, 0.5])[:, None]
    check(x.flatten(1), torch.cat([codes, -codes]))


@needs_gpu  # half a minute in the interpreter
def test_tile_numbers_in_the_low_bits_change_no_index():
    """65,536 codes need ten low bits of the score, which move it by more than neighbours differ."""
    axis = torch.arange(-1020.0, 1024.0, 8)
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    codebook = torch.cartesian_prod(axis, axis)[order]
    # The first 16 have mean 0, as above.
    codebook = torch.cat([codebook[:8], -codebook[:8], codebook[:-16]])
    x = torch.randint(900, 1000, (64, 2), generator=torch.Generator().manual_seed(1)).float()
    check_ties(x, codebook, codebook)


def test_exact_ties_go_to_the_lowest_index():
    codebook = normal(60, 20)
    twice = torch.cat([codebook, codebook, codebook[:30]])
    check_ties(torch.cat([normal(50, 20, seed=1), codebook]), twice, codebook)
    # A point at .5 has up to eight nearest codes, exactly.
    grid = torch.cartesian_prod(*[torch.arange(-2.0, 3.0)] * 3)
    x = torch.cartesian_prod(*[torch.arange(-1.5, 2.0, 0.5)] * 3)
    check_ties(x[::4] if INTERPRETED else x, grid, grid)
    zeros = torch.zeros(70, 5)
    check_ties(normal(9, 5), zeros, zeros)
    check_ties(zeros[:16], zeros, zeros)


@pytest.mark.parametrize("dtype, other", [
    (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16)])
def test_low_precision_input(dtype, other):
    check(normal(130, 40).to(dtype), normal(90, 40, seed=1).to(other))


def test_views_need_not_be_contiguous():
    x, codebook = normal(3, 40, 50), normal(60, 80, seed=1)
    check(x[1].T, codebook[:, ::2])
    check(x[:, :, 7], codebook[:, :40])
    check(x[0, :1].expand(9, -1), codebook[:, 5:55])


def test_rows_and_codes_that_are_not_finite():
    x, codebook = normal(80, 10).to(DEVICE), normal(70, 10, seed=1).to(DEVICE)
    x[3, 2], x[7, 1], x[70, 9] = torch.nan, torch.inf, -torch.inf
    some = codebook.index_fill(0, torch.tensor([0, 69], device=DEVICE), torch.nan)
    broken = codebook.clone()
    broken[5, 5] = some[5, 5] = torch.inf
    for codes in (codebook, broken, some):
        expected = nearest_code_reference(x.cpu(), codes.cpu())
        for index, squared in found(x, codes):
            assert torch.equal(index, expected[0])
            assert index[[3, 7, 70]].eq(-1).all() and index.eq(-1).sum() == 3
            torch.testing.assert_close(squared, expected[1], equal_nan=True)
    assert all((index == -1).all() for index, _ in found(x[:16], torch.nan * codebook))


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="of the Triton kernels")
@pytest.mark.parametrize("near, most", [(True, 0), (False, 0.08)])
def test_few_rows_are_done_again(near, most):
    """What makes the kernel fast: float16 settles the other rows."""
    x, codebook = normal(512, 64), normal(512, 64, seed=1)
    if near:
        x = codebook + 0.5 * x
    empty, doubtful = torch.empty, []

    def spy(*args, **kwargs):  # the list of doubtful rows is the one allocation of T + 1 int64
        tensor = empty(*args, **kwargs)
        if args == (513,) and kwargs["dtype"] == torch.int64:
            doubtful.append(tensor)
        return tensor

    with patch("torch.empty", spy):
        nearest_code(x.to(DEVICE), codebook.to(DEVICE))
    assert doubtful[0][0] <= most * len(x)


def test_nothing_in_gives_nothing_out():
    for index, squared in found(torch.empty(0, 4), torch.ones(3, 4)):
        assert index.shape == squared.shape == (0,)


@pytest.mark.parametrize("x, codebook, error", [
    (torch.ones(4), torch.ones(3, 4), ValueError), (torch.ones(2, 4), torch.ones(3, 5), ValueError),
    (torch.ones(2, 4), torch.ones(0, 4), ValueError),
    (torch.ones(2, 0), torch.ones(3, 0), ValueError),
    (torch.ones(2, 4).double(), torch.ones(3, 4), TypeError),
    (torch.ones(2, 4), torch.ones(3, 4).int(), TypeError)])
def test_wrong_arguments(x, codebook, error):
    with pytest.raises(error, match="nearest_code needs"):
        nearest_code(x, codebook)


@settings(max_examples=15 if INTERPRETED else 60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 140), st.integers(1, 80), st.integers(-12, 12),
       st.integers(-12, 12), st.integers(-6, 6), st.integers(0, 99))
def test_any_shape_scale_and_offset(T, K, D, x_power, code_power, offset_power, seed):
    offset = 10.0**offset_power
    check(normal(T, D, seed=seed) * 10.0**x_power + offset,
          normal(K, D, seed=seed + 1) * 10.0**code_power + offset)


def test_no_gradient_flows():
    x = normal(5, 3).to(DEVICE).requires_grad_()
    index, squared = nearest_code(x, normal(4, 3).to(DEVICE).requires_grad_())
    assert not squared.requires_grad and not index.requires_grad


@not_interpreted
def test_lowered_matmul_precision_changes_nothing():
    x, codebook = normal(2000, 64), normal(512, 64, seed=1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        check(x, codebook)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            check(x, codebook)
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.mkldnn.enabled
    finally:
        torch.set_float32_matmul_precision(before)


@not_interpreted
def test_memory_does_not_grow_with_the_number_of_rows():
    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    size = tensor.untyped_storage().nbytes()
                    Largest.largest = max(Largest.largest, size)
            return out

    x, codebook = normal(300_000, 4), normal(512, 4, seed=1)
    with Largest():
        _torch_path(x, codebook)
    # An index and a distance a row, and one block of scores.
    assert Largest.largest <= max(8 * 2**20, x.numel() * 4)


# ---- histogram_l1

def draw(B, M, L, K, N, seed=0, masks=3, dtype=torch.float32, scale=3.0):
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random((B, M, N) if masks == 3 else (M, N)) < 0.4)
    mask[..., rng.integers(N)] = True
    codes = torch.from_numpy(rng.integers(0, K, (B, L, N))).to(torch.int16)
    return (normal(B, M, L, K, seed=seed) * scale).to(dtype), codes, mask


def check_histogram(logits, codes, mask, tolerance=2e-6):
    """Value and gradient against float64."""
    mine = logits.detach().to(DEVICE).requires_grad_()
    out = histogram_l1(mine, codes.to(DEVICE), mask.to(DEVICE))
    weight = normal(*out.shape, seed=5)
    out.backward(weight.to(out))
    exact = logits.detach().double().requires_grad_()
    expected = histogram_l1_reference(exact, codes, mask)
    expected.backward(weight.double())
    assert out.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert mine.grad.dtype == logits.dtype
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(logits.dtype, 0)
    torch.testing.assert_close(mine.grad.cpu().double(), exact.grad, rtol=tolerance + rounding,
                               atol=tolerance)


def test_the_reference_is_the_definition():
    logits, codes, mask = draw(2, 3, 2, 11, 20, dtype=torch.float64)
    out = histogram_l1_reference(logits, codes, mask)
    for b, m, level in np.ndindex(2, 3, 2):
        p = np.exp(logits[b, m, level].numpy())
        chosen = codes[b, level][mask[b, m]].numpy()
        q = np.bincount(chosen, minlength=11) / len(chosen)
        assert abs(out[b, m, level].item() - np.abs(p / p.sum() - q).sum()) < 1e-12


@pytest.mark.parametrize("B, M, L, K, N", [
    (1, 1, 1, 1, 1), (2, 3, 2, 512, 576), (1, 2, 3, 33, 50), (3, 1, 1, 2, 7), (1, 2, 1, 1025, 300),
    (1, 1, 2, 3000, 257)])
@pytest.mark.parametrize("masks", [2, 3])
def test_histogram_shapes(B, M, L, K, N, masks):
    check_histogram(*draw(B, M, L, K, N, masks=masks))


def test_histogram_of_one_token_all_tokens_and_one_code():
    logits, codes, mask = draw(1, 3, 2, 40, 30)
    mask[0, 0] = False
    mask[0, 0, 29] = True
    mask[0, 1] = True
    check_histogram(logits, codes, mask)
    check_histogram(logits, torch.full_like(codes, 39), mask)
    check_histogram(logits, torch.zeros_like(codes), mask)


def test_histogram_with_extreme_logits():
    logits, codes, mask = draw(1, 2, 2, 40, 30)
    check_histogram(logits * 1e4, codes, mask)
    # float32 keeps three digits of the differences.
    check_histogram(logits - 1e4, codes, mask, tolerance=1e-3)
    certain = torch.full_like(logits, -1e30)
    certain[..., 7] = 0
    check_histogram(certain, torch.full_like(codes, 7), mask)
    certain, codes, mask = certain.to(DEVICE), codes.to(DEVICE), mask.to(DEVICE)
    assert histogram_l1(certain, torch.full_like(codes, 7), mask).eq(0).all()
    assert histogram_l1(certain, torch.full_like(codes, 6), mask).eq(2).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("integer", [torch.int16, torch.int32, torch.int64])
def test_histogram_dtypes(dtype, integer):
    logits, codes, mask = draw(2, 2, 1, 60, 40, dtype=dtype)
    check_histogram(logits, codes.to(integer), mask)


def test_histogram_of_views():
    logits, codes, mask = draw(2, 4, 3, 20, 30)
    check_histogram(logits.transpose(1, 2), codes[:, :1].expand(2, 4, 30), mask[:, :3])
    check_histogram(logits[..., ::2], codes[:, :, ::3] // 2, mask[..., ::3] | True)


def test_where_prediction_and_histogram_agree_the_gradient_is_zero():
    logits = torch.zeros(1, 1, 1, 4, device=DEVICE, requires_grad=True)
    codes = torch.arange(4, device=DEVICE).repeat(2).view(1, 1, 8)
    out = histogram_l1(logits, codes, torch.ones(1, 8, dtype=torch.bool, device=DEVICE))
    out.sum().backward()
    assert out.item() == 0 and logits.grad.eq(0).all()


def test_histogram_gradcheck():
    logits, codes, mask = (t.to(DEVICE) for t in draw(2, 2, 2, 6, 9, dtype=torch.float64))
    logits.requires_grad_()
    for function in (histogram_l1, histogram_l1_reference):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, codes, mask), logits)


@settings(max_examples=10 if INTERPRETED else 40, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 70),
       st.integers(1, 60), st.integers(2, 3), st.integers(0, 99))
def test_any_histogram(B, M, L, K, N, masks, seed):
    logits, codes, mask = draw(B, M, L, K, N, seed=seed, masks=masks)
    check_histogram(logits, codes, mask)
    logits, codes, mask = logits.to(DEVICE), codes.to(DEVICE), mask.to(DEVICE)
    out = histogram_l1(logits, codes, mask)
    assert out.min() >= 0 and out.max() <= 2 + 1e-6
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    torch.testing.assert_close(out, histogram_l1(logits, codes[..., order], mask[..., order]))


def test_an_empty_mask_and_a_wrong_code_are_errors():
    """Errors on the CPU. On a GPU the host would have to wait to raise: that row alone is NaN."""
    logits, codes, mask = draw(1, 3, 2, 8, 10)
    mask[0, 1] = False
    codes[0, 1, 0], mask[0, 2, 0], mask[0, 0, :2] = -1, True, torch.tensor([False, True])
    if DEVICE == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match="a mask has no token"):
            histogram_l1(logits, codes, mask)
        mask[0, 1, 3] = True
        for wrong in (-1, 8):
            codes[0, 1, 0] = wrong
            with pytest.raises(ValueError, match=r"codes must lie in 0\.\.7"):
                histogram_l1(logits, codes, mask)
        return
    logits = logits.to(DEVICE).requires_grad_()
    codes = codes.long().masked_fill(codes < 0, 2 ** 32)         # in 32 bits it would be code 0
    out = histogram_l1(logits, codes.to(DEVICE), mask.to(DEVICE))
    out.sum().backward()
    expected = torch.tensor([[[0, 0], [1, 1], [0, 1]]], dtype=torch.bool)
    assert torch.equal(out.isnan().cpu(), expected)
    assert torch.equal(logits.grad.isnan().all(-1).cpu(), expected)


@pytest.mark.parametrize("change, error", [
    ({"codes": torch.zeros(1, 3, 10, dtype=torch.int16)}, ValueError),
    ({"mask": torch.ones(2, 10, dtype=torch.bool)}, ValueError),
    ({"codes": torch.zeros(1, 2, 10)}, TypeError), ({"mask": torch.ones(3, 10)}, TypeError),
    ({"logits": torch.zeros(1, 3, 2, 8, dtype=torch.int64)}, TypeError)])
def test_wrong_histogram_arguments(change, error):
    arguments = dict(zip(("logits", "codes", "mask"), draw(1, 3, 2, 8, 10), strict=True))
    with pytest.raises(error, match="histogram_l1 needs"):
        histogram_l1(**arguments | change)


# ---- as torch operators

def test_operators_are_well_behaved():
    torch.library.opcheck(_nearest_code, (normal(9, 5).to(DEVICE), normal(7, 5).to(DEVICE)))
    logits, codes, mask = (t.to(DEVICE) for t in draw(1, 2, 2, 5, 8))
    torch.library.opcheck(_histogram_l1, (logits, codes, mask, False))
    torch.library.opcheck(_histogram_l1, (logits.requires_grad_(), codes, mask, True))


def test_under_torch_compile():
    x, codebook = normal(70, 8).to(DEVICE), normal(40, 8).to(DEVICE)
    logits, codes, mask = (t.to(DEVICE) for t in draw(1, 2, 2, 5, 8))

    def step(x, codebook, logits):
        index, squared = nearest_code(x * 2, codebook)
        return codebook[index].sum() + squared.sum() + histogram_l1(logits * 2, codes, mask).sum()

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        loss = function(x, codebook, leaf)
        loss.backward()
        results += [loss, leaf.grad]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    logits, codes, mask = draw(1, 2, 2, 30, 20)
    with torch.autocast(DEVICE, dtype=dtype):
        check(normal(60, 12), normal(50, 12, seed=1))
        check_histogram(logits, codes, mask)


@needs_gpu
def test_no_host_synchronisation_inside_a_cuda_graph_on_a_side_stream():
    x, codebook = normal(1000, 64).cuda(), normal(512, 64).cuda()
    logits, codes, mask = (t.cuda() for t in draw(4, 2, 4, 512, 576))
    logits.requires_grad_()

    def step():
        loss = histogram_l1(logits, codes, mask)
        return *nearest_code(x, codebook), loss, *torch.autograd.grad(loss.sum(), logits)

    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            other = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(expected, other, captured, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@needs_gpu
def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of GPU memory")
    D = 64
    T = 2**31 // D + 1000
    x = torch.zeros(T, D, dtype=torch.float16, device="cuda")
    codebook, last = normal(100, D).half(), normal(1000, D, seed=1).half()
    x[-1000:] = last.cuda()
    index, _ = nearest_code(x, codebook.cuda())
    assert torch.equal(index[-1000:].cpu(), nearest_code_reference(last, codebook)[0])
    del x
    logits, codes, mask = draw(1, 2, 1, 512, 50)
    many = torch.zeros(2**22 + 1, 1, 1, 512, dtype=torch.float16, device="cuda")
    many[-1] = logits[0, 0]
    out = histogram_l1(many, codes.expand(len(many), 1, 50).cuda(), mask[0, :1].cuda())
    expected = histogram_l1_reference(logits[:, :1].double(), codes, mask[0, :1])
    torch.testing.assert_close(out[-1:].cpu().double(), expected, rtol=1e-3, atol=1e-3)


# ---- which path runs

USE = """
import os, sys
sys.modules["triton"] = None
import torch
from kernels import nearest_code
print(nearest_code(torch.eye(3), torch.eye(3).flip(0))[0].tolist())
os.environ["LADMIM_KERNELS"] = "triton"
nearest_code(torch.eye(3), torch.eye(3))
"""


@not_interpreted
def test_without_triton_the_torch_paths_run():
    clean = {k: v for k, v in os.environ.items() if k not in ("LADMIM_KERNELS", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, "-c", USE], cwd=ROOT, env=clean, capture_output=True,
                          text=True)
    assert done.stdout == "[2, 1, 0]\n"
    assert done.returncode and "LADMIM_KERNELS=triton: triton is not installed" in done.stderr


@not_interpreted
def test_the_environment_chooses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("LADMIM_KERNELS", "torch")
    assert nearest_code(torch.eye(3), torch.eye(3).flip(0))[0].tolist() == [2, 1, 0]
    for choice, message in (
            ("cuda", "LADMIM_KERNELS=cuda: must be torch or triton"),
            ("triton", "LADMIM_KERNELS=triton: no kernel runs on cpu (on a CPU set "
                       "TRITON_INTERPRET=1 as well")):
        monkeypatch.setenv("LADMIM_KERNELS", choice)
        with pytest.raises(RuntimeError, match=re.escape(message)):
            nearest_code(torch.eye(3), torch.eye(3))


@not_interpreted
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels themselves were just tested")
def test_kernels_in_the_interpreter():
    """This file again, with every tensor going to the Triton kernels."""
    pytest.importorskip("triton")
    environment = os.environ | {"LADMIM_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-W", "ignore",
                           "-p", "no:cacheprovider", __file__], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
