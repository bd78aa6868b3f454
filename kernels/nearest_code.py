"""Nearest code: the index of the closest of K codes for each of T vectors (equation 4's argmin), exact and fast.

What moves through memory (T = 36,864 tokens, K = 512 codes, D = 64, float32):
  naive    torch.addmm writes the (T, K) scores, 75 MB, and argmin reads them back: 151 MB, and 9 MB for x.
  here     x is read once, the codebook stays on the chip, an index and a distance leave: 10 MB.
  floor    that is 10 us at an RTX 4090's 1 TB/s; the products, 2TKD = 2.4 GFLOP, take 15 us at its 165 TFLOP/s
           of float16. So the products bound it, and they have to be float16 products.

How float16 products give a float64 argmin. ||x - b||^2 = ||x||^2 - 2 (x.b - ||b||^2/2), and the first term is the
same for every code, so the nearest code has the largest score x.b - ||b||^2/2.
  1. Shift x and all codes by one vector (far clusters would drown the differences), scale by powers of two (exact).
  2. Round both to float16 and measure what that lost. By Cauchy and Schwarz a score is off by at most
     E = |x - x16| |b| + |x16| |b - b16| + what summing loses.
  3. Keep each row's best two scores. If they are more than 2E apart, no rounding has swapped them: the row is done.
  4. List the other rows (none where points lie near codes, 4 % where x and codes are unrelated Gaussians) and do them
     again: codes scored within 2E of the best, two or three a row, are compared by float64 distances.
The torch path does the same with float32 products, where E is so small that one row in thousands is done again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .dispatch import jit, on_device, tl, triton, use_triton

INFINITY = float("inf")


def nearest_code(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, D), codebook (K, D) -> index (T,) int64 and squared distance (T,) float32. No gradient flows through either.

    The index is float64's wherever the two best distances differ by more than 1e-5 relative; ties go to the lowest.
    float32, bfloat16 and float16 in any mix; other dtypes raise TypeError, shapes that do not fit ValueError.
    A row with NaN or inf gets index -1 and distance NaN; a code with NaN or inf is never chosen.
    """
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1] or 0 in codebook.shape:
        shapes = f"{tuple(x.shape)} and {tuple(codebook.shape)}"
        raise ValueError(f"nearest_code needs x (T, D) and codebook (K, D), got {shapes}")
    for tensor in (x, codebook):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"nearest_code needs float32, bfloat16 or float16, got {tensor.dtype}")
    return _nearest_code(x.detach(), codebook.detach())


def nearest_code_reference(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64 and with all T K D differences in memory: for tests."""
    distance = (x.double()[:, None] - codebook.double()[None]).square().sum(2)  # (T, K)
    nearest, index = distance.nan_to_num(nan=INFINITY).min(1)
    failed = ~x.isfinite().all(1) | nearest.isinf()
    return index.masked_fill(failed, -1), nearest.masked_fill(failed, torch.nan).float()


@torch.library.custom_op("ladmim::nearest_code", mutates_args=())
def _nearest_code(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, codebook = x.contiguous(), codebook.contiguous()
    if use_triton(x):
        return _triton_path(x, codebook)
    with _float32_products(x.device.type):
        return _torch_path(x, codebook)


@_nearest_code.register_fake
def _(x, codebook):
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=torch.float32)


# ---- torch

@contextmanager
def _float32_products(device: str) -> Iterator[None]:
    """Autocast, TF32 and oneDNN's bfloat16 would be off by more than the float32 margin: off here, then as before."""
    tf32 = torch.backends.cuda.matmul
    before = tf32.fp32_precision
    with torch.autocast(device, enabled=False), torch.backends.mkldnn.flags(False, False, None, None):
        try:
            tf32.fp32_precision = "ieee"
            yield
        finally:
            tf32.fp32_precision = before


def _torch_path(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of rows whose scores fit in cache; memory does not grow with T."""
    (T, D), K = x.shape, len(codebook)
    index = torch.empty(T, dtype=torch.int64, device=x.device)
    distance = torch.empty(T, dtype=torch.float32, device=x.device)
    codes = codebook.float()
    centre = codes.mean(0)
    centred = codes.double() - centre
    scale = torch.exp2(-centred.abs().amax().clamp_min(1e-40).log2().floor())
    centred *= scale
    # Column j belongs to group j mod G. A maximum over the K / G codes of a group is vectorised, an argmax is not.
    G = 32 * max(1, round(K**0.5 / 32))
    width = -(-K // G) * G
    longest = centred.square().sum(1).max().sqrt().float()
    # One more dimension, 1 in x and -||b||^2/2 in b, makes the score one product.
    weight = centred.new_zeros(D + 1, width, dtype=torch.float32)
    weight[D] = -INFINITY
    weight[:D, :K], weight[D, :K] = centred.T, -centred.square().sum(1) / 2
    scale = scale.float()
    unit = (D + 8) * 2.0**-24  # any order of D + 1 products and sums, and the roundings of x, b and ||b||^2/2
    R = max(64, min(T, 2**20 // width))
    score, shifted = weight.new_empty(R, width), weight.new_ones(R, D + 1)
    doubtful, rows = torch.empty(T, dtype=torch.bool, device=x.device), torch.arange(R, device=x.device)
    for start in range(0, T, R):
        part = slice(start, start + R)
        block = x[part].float()
        r = len(block)
        torch.sub(block, centre, out=shifted[:r, :D]).mul_(scale)
        grouped = torch.mm(shifted[:r], weight, out=score[:r]).view(r, width // G, G)
        best, runner, group = _best_two(grouped.amax(1))
        _, inside, member = _best_two(grouped[rows[:r], :, group])  # (r, K / G): the codes of the best group
        error = unit * longest * (torch.linalg.vector_norm(shifted[:r], dim=1) + longest)
        doubtful[part] = ~(best - torch.maximum(runner, inside) > 2 * error)  # NaN and overflow land here too
        index[part] = member * G + group
        distance[part] = _squared_distance(block, codes, index[part])
    for again in doubtful.nonzero().squeeze(1).split(R):
        index[again] = _redo_rows(x[again].double(), codes.double())
        distance[again] = _squared_distance(x[again].float(), codes, index[again])
    return index, distance


def _squared_distance(x: torch.Tensor, codes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (R, D), codes (K, D), index (R,) -> (R,) from the differences, NaN for index -1."""
    difference = x - codes.index_select(0, index.clamp_min(0))
    return difference.square_().sum(1).masked_fill_(index < 0, torch.nan)


def _best_two(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values (R, C) -> the largest and the second largest (R,), and the index of the largest (R,)."""
    best, index = values.max(1)
    return best, values.scatter(1, index[:, None], -INFINITY).amax(1), index


def _redo_rows(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """x (R, D), codes (K, D), both float64 -> the nearest code (R,); -1 where x or every code has NaN or inf."""
    # The same products and margin in float64; what is still in doubt then (ties, mostly) is compared by its differences.
    centre = codes.mean(0)
    shifted, centred = x - centre, codes - centre
    square = centred.square().sum(1)
    score = shifted @ centred.T - square / 2
    longest = square.max().sqrt()
    error = (len(centre) + 8) * 2.0**-53 * longest * (torch.linalg.vector_norm(shifted, dim=1) + longest)
    candidate = ~(score < (score.amax(1) - 2 * error)[:, None]) & x.isfinite().all(1)[:, None]
    row, code = candidate.nonzero(as_tuple=True)
    distance = x.new_empty(len(row))
    step = max(1, 2**16 // len(centre))
    for i in range(0, len(row), step):
        difference = x[row[i:i + step]] - codes[code[i:i + step]]
        distance[i:i + step] = difference.square_().sum(1).nan_to_num_(nan=INFINITY, posinf=INFINITY)
    nearest = distance.new_full((len(x),), INFINITY).scatter_reduce_(0, row, distance, "amin")
    # Sums of the same terms may differ in their last bits: within 1e-12 is a tie, and the lowest index wins it.
    tied = distance.isfinite() & (distance <= nearest[row] * (1 + 1e-12))
    index = code.new_full((len(x),), len(codes)).scatter_reduce_(0, row[tied], code[tied], "amin")
    return index.masked_fill_(index == len(codes), -1)


# ---- Triton

# Rows and codes a tile; warps and stages so that nothing spills and two programs of _scan fit a multiprocessor.
PREPARE = {"num_warps": 4}
SCAN = {"BLOCK_T": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
REDO = {"BLOCK_T": 16, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1, "maxnreg": 255}


def _triton_path(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three launches whose grids depend on shapes alone: no host synchronisation, so CUDA graphs can hold them."""
    (T, D), K = x.shape, len(codebook)
    index = torch.empty(T, dtype=torch.int64, device=x.device)
    distance = torch.empty(T, dtype=torch.float32, device=x.device)
    if not T:
        return index, distance
    sizes = tile_sizes(K, D)
    parts, width, padded = sizes["PARTS"], sizes["WIDTH"], sizes["PARTS"] * 32
    half = torch.empty(padded, width, dtype=torch.float16, device=x.device)
    table = torch.empty(padded + 2 * parts + width + 1, dtype=torch.float32, device=x.device)
    bias, limits, frame = table.split((padded, 2 * parts, width + 1))
    doubtful = torch.empty(T + 1, dtype=torch.int64, device=x.device)  # how many, then which rows
    codes, rest = (codebook, half, bias, limits, frame), (index, distance, doubtful, T, K)
    with on_device(x):
        _prepare[(parts,)](*codes, doubtful, K, **sizes, **PREPARE)
        _scan[(triton.cdiv(T, SCAN["BLOCK_T"]),)](x, *codes, *rest, **sizes, **SCAN)
        _redo[(min(triton.cdiv(T, REDO["BLOCK_T"]), 256),)](x, *codes, *rest, **sizes, **REDO)
    return index, distance


def tile_sizes(K: int, D: int) -> dict[str, int]:
    """What the kernels are compiled for: D is padded to WIDTH and walked in chunks, K is padded to PARTS of 32 codes."""
    chunk = max(16, min(64, triton.next_power_of_2(D)))
    return {"D": D, "WIDTH": triton.cdiv(D, chunk) * chunk, "CHUNK": chunk, "PARTS": triton.cdiv(K, 128) * 4,
            "LOW": triton.next_power_of_2(triton.cdiv(K, 64)) - 1, "RAGGED": K % 64 != 0}


@jit
def _power_of_two(largest):
    """The power of two that brings `largest` into [1, 2), kept within 2^-100 and 2^100."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 27), 227)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@jit
def _load(matrix, row, known, start, D: tl.constexpr, CHUNK: tl.constexpr):
    """Columns start .. start + CHUNK - 1 of these rows of a (., D) matrix; zero where there is none."""
    dim = start + tl.arange(0, CHUNK)
    return tl.load(matrix + row[:, None] * D + dim[None, :], known[:, None] & (dim < D)[None, :], 0.0)


@jit
def _prepare(codebook, half, bias, limits, frame, doubtful, K, D: tl.constexpr, WIDTH: tl.constexpr,
             CHUNK: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr, RAGGED: tl.constexpr):
    """32 codes: shifted, scaled, rounded to float16; their ||b||^2/2, their largest norm and largest rounding loss."""
    part, few, dim = tl.program_id(0), tl.arange(0, 16), tl.arange(0, CHUNK)
    # The shift and the scale may be any: the first 16 codes' mean and spread, which every program finds alike.
    spread = 0.0
    for start in range(0, WIDTH, CHUNK):
        sample = _load(codebook, few, few < K, start, D, CHUNK).to(tl.float32)
        centre = tl.sum(sample, 0) / tl.minimum(K, 16)
        away = tl.where((few < K)[:, None], tl.abs(sample - centre[None, :]), 0.0)
        spread = tl.maximum(spread, tl.max(tl.max(away, 1), 0))
        if part == 0:
            tl.store(frame + start + dim, centre)
    scale = _power_of_two(spread) * 0.25  # room for codes 2^17 times as large as those 16
    code = part * 32 + tl.arange(0, 32)
    square, lost_square = tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        centre = tl.sum(_load(codebook, few, few < K, start, D, CHUNK).to(tl.float32), 0) / tl.minimum(K, 16)
        b = _load(codebook, code, code < K, start, D, CHUNK).to(tl.float32)
        b = tl.where((code < K)[:, None], (b - centre[None, :]) * scale, 0.0)
        b16 = b.to(tl.float16)
        tl.store(half + code[:, None] * WIDTH + (start + dim)[None, :], b16)
        lost = b - b16.to(tl.float32)
        square += tl.sum(b * b, 1)
        lost_square += tl.sum(lost * lost, 1)
    tl.store(bias + code, square / 2)
    tl.store(limits + part, tl.sqrt(tl.max(square, 0)))
    tl.store(limits + PARTS + part, tl.sqrt(tl.max(lost_square, 0)))
    if part == 0:
        tl.store(frame + WIDTH, scale)
        tl.store(doubtful, 0)


@jit
def _scaled(x, frame, row, known, start, rho, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk of rows of x, shifted and scaled as the codes are and then by the rows' own rho, in float32."""
    centre = tl.load(frame + start + tl.arange(0, CHUNK))
    x = _load(x, row, known, start, D, CHUNK).to(tl.float32)
    return (x - centre[None, :]) * tl.load(frame + WIDTH) * rho[:, None]


@jit
def _error(x, limits, frame, row, known, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
           LOW: tl.constexpr):
    """rho, the power of two that makes a row's largest number about 1, and E, the bound on the error of its scores."""
    one = tl.full(row.shape, 1.0, tl.float32)
    largest, square, lost_square = one * 0, one * 0, one * 0
    for start in range(0, WIDTH, CHUNK):
        largest = tl.maximum(largest, tl.max(tl.abs(_scaled(x, frame, row, known, start, one, D, WIDTH, CHUNK)), 1))
    rho = _power_of_two(largest)
    for start in range(0, WIDTH, CHUNK):
        scaled = _scaled(x, frame, row, known, start, rho, D, WIDTH, CHUNK)
        lost = scaled - scaled.to(tl.float16).to(tl.float32)
        square += tl.sum(scaled * scaled, 1)
        lost_square += tl.sum(lost * lost, 1)
    part = tl.arange(0, 4 * LOW + 4)  # a power of two, and no less than PARTS
    b_lost = tl.max(tl.load(limits + PARTS + part, part < PARTS, 0.0), 0)
    b_norm = tl.max(tl.load(limits + part, part < PARTS, 0.0), 0) + b_lost
    x_lost = tl.sqrt(lost_square)
    x_norm = tl.sqrt(square) + x_lost
    # Tensor cores cut where float32 rounds: at most 2^-22 of the magnitudes a term. 1e-30 stands for what underflows
    # where everything is 0, since scores that matter are near 1. The 1 % covers the rounding of the norms.
    summed = (D + 16) * 2.0**-22 * (x_norm * b_norm + rho * b_norm * b_norm) + 1e-30
    return rho, 1.01 * (x_lost * b_norm + x_norm * b_lost + summed)


@jit
def _scores(x, x16, frame, half, bias, row, known, rho, code, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """rho (x.b - ||b||^2/2) of the rows for a tile of codes. x16, the rows' first chunk, is all of them if D <= 64."""
    b16 = half + code[None, :] * WIDTH + tl.arange(0, CHUNK)[:, None]
    score = tl.dot(x16, tl.load(b16))
    for start in range(CHUNK, WIDTH, CHUNK):
        x16 = _scaled(x, frame, row, known, start, rho, D, WIDTH, CHUNK).to(tl.float16)
        score = tl.dot(x16, tl.load(b16 + start), score)
    return score - rho[:, None] * tl.load(bias + code)[None, :]


@jit
def _distance(x, codebook, row, code, known, D: tl.constexpr, CHUNK: tl.constexpr, dtype: tl.constexpr):
    """||x - b||^2 of (row, code) pairs from the original numbers."""
    total = tl.zeros(row.shape, dtype)
    for start in range(0, D, CHUNK):
        b = _load(codebook, code, known, start, D, CHUNK).to(dtype)
        difference = _load(x, row, known, start, D, CHUNK).to(dtype) - b
        total += tl.sum(difference * difference, 1)
    return total


@jit
def _scan(x, codebook, half, bias, limits, frame, index, distance, doubtful, T, K, D: tl.constexpr, WIDTH: tl.constexpr,
          CHUNK: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr, RAGGED: tl.constexpr, BLOCK_T: tl.constexpr,
          BLOCK_K: tl.constexpr):
    """A tile of rows against all codes in float16: index and distance of the sure rows, a list of the doubtful ones."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    known, column = row < T, tl.arange(0, BLOCK_K)
    rho, error = _error(x, limits, frame, row, known, D, WIDTH, CHUNK, PARTS, LOW)
    x16 = _scaled(x, frame, row, known, 0, rho, D, WIDTH, CHUNK).to(tl.float16)
    # Each column keeps the best two it has seen. The tile's number rides in the low bits of the score, so that one
    # maximum yields value and index; it moves a score by 2^-23 (LOW + 1) of itself at most, and the margin pays.
    first = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    second = first
    for tile in range(tl.cdiv(K, BLOCK_K)):
        code = tile * BLOCK_K + column
        score = _scores(x, x16, frame, half, bias, row, known, rho, code, D, WIDTH, CHUNK)
        score = ((score.to(tl.int32, bitcast=True) & ~LOW) | tile).to(tl.float32, bitcast=True)
        if RAGGED:
            score = tl.where((code < K)[None, :], score, float("-inf"))
        second = tl.maximum(second, tl.minimum(first, score))
        first = tl.maximum(first, score)
    best = tl.max(first, 1)
    winner = tl.min(tl.where(first == best[:, None], column[None, :], BLOCK_K - 1), 1)
    runner = tl.max(tl.where(column[None, :] == winner[:, None], second, first), 1)
    packing = (LOW + 1) * 2.0**-23 * (tl.abs(best) + tl.abs(runner))
    sure = best - runner > 2 * error + packing  # false for NaN
    code = tl.minimum((best.to(tl.int32, bitcast=True) & LOW) * BLOCK_K + winner, K - 1)
    exact = _distance(x, codebook, row, code, known, D, 16, tl.float32)
    tl.store(distance + row, tl.where(sure, exact, best), known)  # a doubtful row leaves its score there for _redo
    tl.store(index + row, code, known)
    doubt = (known & (sure == 0)).to(tl.int64)
    slot = tl.atomic_add(doubtful, tl.sum(doubt, 0)) + tl.cumsum(doubt, 0)  # slot 0 is the count itself
    tl.store(doubtful + slot, row, doubt > 0)


@jit
def _redo(x, codebook, half, bias, limits, frame, index, distance, doubtful, T, K, D: tl.constexpr, WIDTH: tl.constexpr,
          CHUNK: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr, RAGGED: tl.constexpr, BLOCK_T: tl.constexpr,
          BLOCK_K: tl.constexpr):
    """Doubtful rows, 16 at a time: of the codes whose score is within the margin of the best the nearest by float64."""
    total, column = tl.load(doubtful), tl.arange(0, BLOCK_K)
    for begin in range(tl.program_id(0) * BLOCK_T, total, tl.num_programs(0) * BLOCK_T):
        slot = begin + tl.arange(0, BLOCK_T)
        row = tl.load(doubtful + 1 + slot, slot < total, 0)
        known = slot < total
        for start in range(0, WIDTH, CHUNK):  # rows with NaN or inf are passed over: no code is a candidate
            fine = tl.abs(_load(x, row, slot < total, start, D, CHUNK).to(tl.float32)) < float("inf")
            known = known & (tl.min(fine.to(tl.int32), 1) > 0)
        rho, error = _error(x, limits, frame, row, known, D, WIDTH, CHUNK, PARTS, LOW)
        x16 = _scaled(x, frame, row, known, 0, rho, D, WIDTH, CHUNK).to(tl.float16)
        best = tl.load(distance + row, known, 0.0)
        lowest = best - 2 * error - (LOW + 1) * 2.0**-23 * tl.abs(best)
        nearest = tl.full((BLOCK_T,), float("inf"), tl.float64)
        winner = tl.full((BLOCK_T,), -1, tl.int32)
        for tile in range(tl.cdiv(K, BLOCK_K)):
            code = tile * BLOCK_K + column
            score = _scores(x, x16, frame, half, bias, row, known, rho, code, D, WIDTH, CHUNK)
            out = (score < lowest[:, None]) | (code >= K)[None, :] | (known == 0)[:, None]  # NaN is not out
            left = tl.where(out, BLOCK_K, column[None, :])  # the columns of the candidates
            pick = tl.min(left, 1)  # lowest first, so that ties go to the lowest index; BLOCK_K: none is left
            while tl.min(pick, 0) < BLOCK_K:
                exact = _distance(x, codebook, row, tile * BLOCK_K + pick, pick < BLOCK_K, D, CHUNK, tl.float64)
                closer = (pick < BLOCK_K) & (exact < nearest)
                nearest = tl.where(closer, exact, nearest)
                winner = tl.where(closer, tile * BLOCK_K + pick, winner)
                left = tl.where(left == pick[:, None], BLOCK_K, left)
                pick = tl.min(left, 1)
        tl.store(index + row, winner.to(tl.int64), slot < total)
        tl.store(distance + row, tl.where(winner < 0, float("nan"), nearest.to(tl.float32)), slot < total)
