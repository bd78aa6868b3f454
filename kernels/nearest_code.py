"""Nearest code: for each of T vectors the closest of K codes (equation 4's argmin), exact and fast.

What moves through memory (T = 36,864 tokens, K = 512 codes, D = 64, float32):
  naive    torch.addmm writes the (T, K) scores, 75 MB, and argmin reads them: 151 MB, and 9 for x.
  here     x is read once, the codebook stays on the chip, an index and a distance leave: 10 MB.
  floor    That is 10 us at an RTX 4090's 1 TB/s. The products, 2TKD = 2.4 GFLOP, take 15 us at its
           165 TFLOP/s of float16. So the products bound it, and they have to be float16 products.

How float16 products give a float64 argmin. ||x - b||^2 = ||x||^2 - 2 (x.b - ||b||^2/2), and the
first term is the same for every code, so the nearest code has the largest score x.b - ||b||^2/2.
  1. Shift x and all codes by one vector, since far clusters would drown the differences, and scale
     by powers of two, which is exact.
  2. Round both to float16 and measure what that lost. By Cauchy and Schwarz a score is off by at
     most E = |x - x16| |b| + |x16| |b - b16| + what summing loses.
  3. Keep each row's best two scores. If they are more than 2E apart, no rounding has swapped them:
     the row is done.
  4. List the other rows (none where points lie near codes, 4 % where x and codes are unrelated
     Gaussians) and do them again: the codes scored within 2E of the best, two or three a row, are
     compared by float64 distances.
The torch path does the same with float32 products; few rows take float64 ones, unshifted."""

from __future__ import annotations

import torch

from .dispatch import jit, on_device, tl, triton, use_triton


def nearest_code(x: torch.Tensor, codebook: torch.Tensor, distance: bool = True):
    """x (T, D), codebook (K, D) -> index (T,) int64, squared distance (T,) float32; without
    `distance` it may be None. No gradients.

    The index is float64's wherever the two best distances differ by more than 1e-5 relative; ties
    go to the lowest. float32, bfloat16 and float16 in any mix; other dtypes raise TypeError, shapes
    that do not fit ValueError. A row with NaN or inf gets index -1 and distance NaN. A code with
    NaN or inf is never chosen."""
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1] or 0 in codebook.shape:
        shapes = f"{tuple(x.shape)} and {tuple(codebook.shape)}"
        raise ValueError(f"nearest_code needs x (T, D) and codebook (K, D), got {shapes}")
    for tensor in (x, codebook):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"nearest_code needs float32, bfloat16 or float16, got {tensor.dtype}")
    if x.device.type == "cpu" and not (use_triton(x.device) or torch.compiler.is_compiling()):
        return _on_torch(x.detach(), codebook.detach(), distance)  # dispatch would cost as much
    return _nearest_code(x.detach(), codebook.detach())


def nearest_own_code(x: torch.Tensor, codebooks, own: torch.Tensor | None = None) -> torch.Tensor:
    """`nearest_code` where each photo has one of C codebooks. x (B, N, D), codebooks C of (K, D),
    own (B,): the number of each photo's -> (B, N), own K + index, or -1 for NaN or inf. All C are
    searched: to sort the photos by category, the CPU would have to wait for the GPU."""
    flat = x.flatten(0, 1)
    index, *others = (nearest_code(flat, codes, False)[0].view(x.shape[:2]) for codes in codebooks)
    for number, found in enumerate(others, 1):
        found = torch.where(found < 0, found, found + number * len(codebooks[number]))
        index = torch.where((own == number)[:, None], found, index)
    return index


@torch.library.custom_op("ladmim::nearest_code", mutates_args=())
def _nearest_code(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if use_triton(x.device):
        return _triton_path(x.contiguous(), codebook.contiguous())
    return _on_torch(x, codebook)


@_nearest_code.register_fake
def _outputs(x, codebook):
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=torch.float32)


# ---- torch

def _on_torch(x: torch.Tensor, codebook: torch.Tensor, distance: bool = True):
    if len(x) * len(codebook) <= 2**17:                 # as measured
        return _few_rows(x, codebook, distance)
    with torch.autocast(x.device.type, enabled=False):
        return _torch_path(x, codebook)


def _torch_path(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of rows whose scores fit in cache; memory does not grow with T."""
    (T, D), K, codes = x.shape, len(codebook), codebook.float()
    index, distance = _outputs(x, codebook)
    centre = codes.mean(0)
    centred = codes.double() - centre
    scale = torch.exp2(-centred.abs().amax().clamp_min(1e-40).log2().floor())
    centred *= scale
    # Column j is in group j mod G: a maximum over a group's codes is vectorised, an argmax is not.
    G = 32 * max(1, round(K**0.5 / 32))
    width = -(-K // G) * G
    longest = centred.square().sum(1).max().sqrt().float()
    # The margin would not hold TF32's or bfloat16's errors. The switch is only read.
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    whole = backend.matmul.fp32_precision in ("ieee", "none")
    # One more dimension, 1 in x and -||b||^2/2 in b, makes the score one product.
    weight = centred.new_zeros(D + 1, width, dtype=torch.float32 if whole else torch.float64)
    weight[D] = -torch.inf
    weight[:D, :K], weight[D, :K] = centred.T, -centred.square().sum(1) / 2
    unit = (D + 8) * 2.0**-24  # D + 1 products and sums in any order; x, b and ||b||^2/2 rounded
    R = max(64, min(T, 2**20 // width))
    score, shifted = weight.new_empty(R, width), weight.new_ones(R, D + 1)
    doubtful = torch.empty(T, dtype=torch.bool, device=x.device)
    rows = torch.arange(R, device=x.device)
    for start in range(0, T, R):
        span = slice(start, start + R)
        block, r = x[span].float(), min(R, T - start)
        torch.sub(block, centre, out=shifted[:r, :D]).mul_(scale.float())
        grouped = torch.mm(shifted[:r], weight, out=score[:r]).view(r, width // G, G)
        best, runner, group = _best_two(grouped.amax(1))
        _, inside, member = _best_two(grouped[rows[:r], :, group])  # in the best group, (r, K / G)
        error = unit * longest * (torch.linalg.vector_norm(shifted[:r], dim=1) + longest)
        doubtful[span] = ~(best - torch.maximum(runner, inside) > 2 * error)  # true for NaN, too
        index[span] = (member * G + group).clamp_max_(K - 1)  # inf may find a column of padding
        distance[span] = _squared_distance(block, codes, index[span])
    for again in doubtful.nonzero().squeeze(1).split(R):
        block = x[again].float()
        index[again] = _redo_rows(block, codes)
        distance[again] = _squared_distance(block, codes, index[again])
    return index, distance


def _few_rows(x: torch.Tensor, codebook: torch.Tensor, distance: bool):
    """All in float64: few operators, which here cost more than what they compute."""
    D, wide, codes = x.shape[1], x.double(), codebook.double()
    square = codes.square().sum(1)
    best, runner, index = _best_two(torch.addmm(square, wide, codes.T, beta=-0.5))
    longest = square.max().sqrt()
    error = (D + 8) * 2.0**-52 * longest * (torch.linalg.vector_norm(wide, dim=1) + longest)
    again = (~(best - runner > error)).nonzero().squeeze(1)        # true for NaN, too
    if len(again):
        index[again] = _redo_rows(wide[again], codes)
    return index, _squared_distance(x.float(), codebook.float(), index) if distance else None


def _squared_distance(x, codes, index) -> torch.Tensor:
    """x (R, D), codes (K, D), index (R,) -> (R,) from the differences, NaN for index -1."""
    difference = x - codes.index_select(0, index.clamp_min(0))
    return difference.square_().sum(1).masked_fill_(index < 0, torch.nan)


def _best_two(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values (R, C), overwritten -> largest, second largest, index of the largest, each (R,)."""
    best, index = values.max(1)
    return best, values.scatter_(1, index[:, None], -torch.inf).amax(1), index


def _redo_rows(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """x (R, D), codes (K, D) -> nearest code (R,) in float64; -1: NaN or inf in x or all codes."""
    distance = torch.cdist(x.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    failed = distance.amin(1).isinf() | ~x.isfinite().all(1)
    return distance.argmin(1).masked_fill_(failed, -1)      # of equal ones the first


# ---- Triton: _prepare rounds the codebook, _scan finds the sure rows, _redo does the doubtful ones
#
# D is padded to WIDTH, a multiple of CHUNK, and loaded CHUNK dimensions at a time. K is padded to
# PARTS * 32; a program of _prepare does one part. RAGGED: _scan's last tile of 64 codes isn't full.
# LOW = 2^n - 1: the low bits of a score that hold its tile's number. Handed from kernel to kernel:
#   half      (PARTS * 32, WIDTH) float16  the codes: shifted, scaled and rounded
#   bias      (PARTS * 32,) float32        ||b||^2/2 of the codes, shifted and scaled
#   limits    (2 * PARTS,) float32         the largest |b| of each part, then its largest |b - b16|
#   frame     (WIDTH + 1,) float32         the shift, then the scale
#   doubtful  (1 + T,) int64               how many rows are doubtful, then which, in any order
#   distance  (T,) float32                 a result; until _redo, a doubtful row's best score

# Rows and codes per tile, such that nothing spills and two programs of _scan fit a multiprocessor.
PREPARE = {"num_warps": 4}
SCAN = {"BLOCK_T": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
REDO = {"BLOCK_T": 16, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1, "maxnreg": 255}


def _triton_path(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three launches, their grids by shapes alone: CUDA graphs can hold them, no host waits."""
    (T, D), K = x.shape, len(codebook)
    index, distance = _outputs(x, codebook)
    if not T:
        return index, distance
    sizes = tile_sizes(K, D)
    parts, width, padded = sizes["PARTS"], sizes["WIDTH"], sizes["PARTS"] * 32
    half = torch.empty(padded, width, dtype=torch.float16, device=x.device)
    table = torch.empty(padded + 2 * parts + width + 1, dtype=torch.float32, device=x.device)
    bias, limits, frame = table.split((padded, 2 * parts, width + 1))
    doubtful = torch.empty(T + 1, dtype=torch.int64, device=x.device)
    codes, rest = (codebook, half, bias, limits, frame), (index, distance, doubtful, T, K)
    with on_device(x):
        _prepare[(parts,)](*codes, doubtful, K, **sizes, **PREPARE)
        _scan[(triton.cdiv(T, SCAN["BLOCK_T"]),)](x, *codes, *rest, **sizes, **SCAN)
        _redo[(min(triton.cdiv(T, REDO["BLOCK_T"]), 256),)](x, *codes, *rest, **sizes, **REDO)
    return index, distance


def tile_sizes(K: int, D: int) -> dict[str, int]:
    """What the kernels are compiled for."""
    chunk = max(16, min(64, triton.next_power_of_2(D)))
    return {"D": D, "WIDTH": triton.cdiv(D, chunk) * chunk, "CHUNK": chunk, "RAGGED": K % 64 != 0,
            "PARTS": triton.cdiv(K, 128) * 4, "LOW": triton.next_power_of_2(triton.cdiv(K, 64)) - 1}


@jit
def _power_of_two(largest):
    """The power of two that brings `largest` into [1, 2), kept within 2^-100 and 2^100."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 27), 227)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@jit
def _load(matrix, row, known, start, D: tl.constexpr, CHUNK: tl.constexpr):
    """Columns start .. start + CHUNK - 1 of these rows of a (., D) matrix, zero outside."""
    dim = start + tl.arange(0, CHUNK)
    inside = known[:, None] & (dim < D)[None, :]
    return tl.load(matrix + row[:, None] * D + dim[None, :], inside, 0.0)


@jit
def _prepare(codebook, half, bias, limits, frame, doubtful, K, D: tl.constexpr, WIDTH: tl.constexpr,
             CHUNK: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr, RAGGED: tl.constexpr):
    """One part: its 32 codes shifted, scaled, rounded, and the limits of what that lost."""
    part, few, dim = tl.program_id(0), tl.arange(0, 16), tl.arange(0, CHUNK)
    # Any shift and scale will do: mean and spread of the first 16 codes, in all programs.
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
        sample = _load(codebook, few, few < K, start, D, CHUNK).to(tl.float32)
        centre = tl.sum(sample, 0) / tl.minimum(K, 16)
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
def _scaled(x, frame, row, known, start, rho, D: tl.constexpr, WIDTH: tl.constexpr,
            CHUNK: tl.constexpr):
    """A chunk of rows of x in float32: shifted and scaled as the codes, then by the rows' rho."""
    centre = tl.load(frame + start + tl.arange(0, CHUNK))
    x = _load(x, row, known, start, D, CHUNK).to(tl.float32)
    return (x - centre[None, :]) * tl.load(frame + WIDTH) * rho[:, None]


@jit
def _error(x, limits, frame, row, known, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
           PARTS: tl.constexpr, LOW: tl.constexpr):
    """rho, the power of two that brings a row's numbers to about 1; E, its scores' error bound."""
    one = tl.full(row.shape, 1.0, tl.float32)
    largest, square, lost_square = one * 0, one * 0, one * 0
    for start in range(0, WIDTH, CHUNK):
        scaled = _scaled(x, frame, row, known, start, one, D, WIDTH, CHUNK)
        largest = tl.maximum(largest, tl.max(tl.abs(scaled), 1))
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
    # Tensor cores cut where float32 rounds: at most 2^-22 of the magnitudes a term. 1e-30 is for
    # underflow where all is 0: scores that matter are near 1. The 1 % covers the norms' rounding.
    summed = (D + 16) * 2.0**-22 * (x_norm * b_norm + rho * b_norm * b_norm) + 1e-30
    return rho, 1.01 * (x_lost * b_norm + x_norm * b_lost + summed)


@jit
def _scores(x, x16, frame, half, bias, row, known, rho, code, D: tl.constexpr, WIDTH: tl.constexpr,
            CHUNK: tl.constexpr):
    """rho (x.b - ||b||^2/2) for a tile of codes. x16 is the rows' first chunk, all if D <= 64."""
    b16 = half + code[None, :] * WIDTH + tl.arange(0, CHUNK)[:, None]
    score = tl.dot(x16, tl.load(b16))
    for start in range(CHUNK, WIDTH, CHUNK):
        x16 = _scaled(x, frame, row, known, start, rho, D, WIDTH, CHUNK).to(tl.float16)
        score = tl.dot(x16, tl.load(b16 + start), score)
    return score - rho[:, None] * tl.load(bias + code)[None, :]


@jit
def _distance(x, codebook, row, code, known, D: tl.constexpr, CHUNK: tl.constexpr,
              dtype: tl.constexpr):
    """||x - b||^2 of (row, code) pairs from the original numbers."""
    total = tl.zeros(row.shape, dtype)
    for start in range(0, D, CHUNK):
        b = _load(codebook, code, known, start, D, CHUNK).to(dtype)
        difference = _load(x, row, known, start, D, CHUNK).to(dtype) - b
        total += tl.sum(difference * difference, 1)
    return total


@jit
def _scan(x, codebook, half, bias, limits, frame, index, distance, doubtful, T, K,
          D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
          LOW: tl.constexpr, RAGGED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of rows against all codes: results of the sure rows, a list of the doubtful ones."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    known, column = row < T, tl.arange(0, BLOCK_K)
    rho, error = _error(x, limits, frame, row, known, D, WIDTH, CHUNK, PARTS, LOW)
    x16 = _scaled(x, frame, row, known, 0, rho, D, WIDTH, CHUNK).to(tl.float16)
    # Each column keeps its best two. The tile's number rides in a score's low bits, so one maximum
    # yields value and index. That moves a score by up to 2^-23 (LOW + 1) of itself, see `packing`.
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
    tl.store(distance + row, tl.where(sure, exact, best), known)
    tl.store(index + row, code, known)
    doubt = (known & (sure == 0)).to(tl.int64)
    slot = tl.atomic_add(doubtful, tl.sum(doubt, 0)) + tl.cumsum(doubt, 0)  # from 1 on
    tl.store(doubtful + slot, row, doubt > 0)


@jit
def _redo(x, codebook, half, bias, limits, frame, index, distance, doubtful, T, K,
          D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
          LOW: tl.constexpr, RAGGED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Doubtful rows, 16 at a time: of the codes scored within the margin the nearest by float64."""
    total, column = tl.load(doubtful), tl.arange(0, BLOCK_K)
    for begin in range(tl.program_id(0) * BLOCK_T, total, tl.num_programs(0) * BLOCK_T):
        slot = begin + tl.arange(0, BLOCK_T)
        listed = slot < total
        row = tl.load(doubtful + 1 + slot, listed, 0)
        known = listed
        for start in range(0, WIDTH, CHUNK):  # a row with NaN or inf gets no candidate
            fine = tl.abs(_load(x, row, listed, start, D, CHUNK).to(tl.float32)) < float("inf")
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
            out = (score < lowest[:, None]) | (code >= K)[None, :] | (known == 0)[:, None]
            left = tl.where(out, BLOCK_K, column[None, :])  # the candidates; NaN is not out
            pick = tl.min(left, 1)  # the lowest first: it wins a tie. BLOCK_K: none left
            while tl.min(pick, 0) < BLOCK_K:
                chosen = tile * BLOCK_K + pick
                exact = _distance(x, codebook, row, chosen, pick < BLOCK_K, D, CHUNK, tl.float64)
                closer = (pick < BLOCK_K) & (exact < nearest)
                nearest = tl.where(closer, exact, nearest)
                winner = tl.where(closer, chosen, winner)
                left = tl.where(left == pick[:, None], BLOCK_K, left)
                pick = tl.min(left, 1)
        tl.store(index + row, winner.to(tl.int64), listed)
        tl.store(distance + row, tl.where(winner < 0, float("nan"), nearest.to(tl.float32)), listed)
