"""S_HVQ and S_MIM: the paper's "mean" of both, HVQ-Trans's "norm", and scores of our own.

`--hvq-score` and `--mim-score` name them. What is normal they learn of training normals alone."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Score:
    """One way to make a score of `ladmim.Errors`. `kept` is what it needs of them, `normal` a dict
    learned of normal photos. S_MIM's `judge` takes (kept, the tokens' errors (B, N), normal)."""
    keep: Callable                     # Errors -> kept (B, ...)
    judge: Callable                    # kept, normal -> score (B,), map (B, N)
    learn: Callable | None = None      # kept of the training normals -> normal


def normal_statistics(values: torch.Tensor) -> torch.Tensor:
    """values (n, m) of n training normals -> mean and std of each column, (2, m). Half of a
    column's std is its own, half the average column's, so that a token that hardly varies does not
    get huge scores; at least 1 % of the mean, as in `eval.moments`."""
    mean, std = values.mean(0), values.std(0, correction=0)
    std = ((std + std.mean()) / 2).maximum(0.01 * mean.abs()).clamp(min=1e-6)
    return torch.stack([mean, std])


# S_HVQ

def squared_error(errors) -> torch.Tensor:
    return errors.residual.square().mean(-1)                         # (B, N)


def square_of(tokens: torch.Tensor) -> torch.Tensor:
    """tokens (B, N) -> (B, 1, grid, grid)."""
    return tokens.unflatten(1, (math.isqrt(tokens.shape[1]), -1))[:, None]


def smoothed(error: torch.Tensor) -> torch.Tensor:
    """error (B, N) -> its mean over the 3x3 tokens around each, (B, N)."""
    return F.avg_pool2d(square_of(error), 3, 1, 1, count_include_pad=False).flatten(1)


def largest_3x3(error: torch.Tensor, normal: dict):
    """The largest mean over 3x3 tokens: a broken part is not diluted by all that is whole."""
    return smoothed(error).amax(1), error


def largest_16_pixels(norm: torch.Tensor, normal: dict):
    """The largest mean over 16x16 of 224x224 pixels, as HVQ-Trans's code has it."""
    pixels = F.interpolate(square_of(norm), size=224, mode="bilinear", align_corners=True)
    return F.avg_pool2d(pixels, 16, 1).flatten(1).amax(1), norm


def deviations(error: torch.Tensor, statistics: torch.Tensor):
    """The largest 3x3 mean, each standardised by its mean and std on the training normals: an edge
    that is never rebuilt well does not hide a scratch elsewhere."""
    mean, std = statistics                           # (2, N)
    z = (smoothed(error) - mean) / std
    return z.amax(1), z


HVQ_SCORES = {
    "mean": Score(squared_error, lambda error, normal: (error.mean(1), error)),
    "max": Score(squared_error, largest_3x3),
    "norm": Score(lambda errors: errors.residual.norm(dim=-1), largest_16_pixels),
    "deviations": Score(squared_error,
                        lambda error, normal: deviations(error, normal["deviations"]),
                        lambda error: {"deviations": normal_statistics(smoothed(error))})}


# S_MIM

def histograms(codes: torch.Tensor, masks: torch.Tensor, count: int) -> torch.Tensor:
    """codes (B, L, N), masks (M, N) -> each mask's histogram Q^l (B, M, L, count)."""
    counts = torch.einsum("mn,blnk->bmlk", masks.float(), F.one_hot(codes.long(), count).float())
    return counts / masks.float().sum(1)[:, None, None]    # to 256 exact in bfloat16, too


def whitening(x: torch.Tensor, shrink=0.1) -> dict:
    """What is normal in x (n, M, D) of the training normals, for each of the M masks: the mean
    (M, D), the matrix (M, D, D) that makes the covariance the identity, and the moments (2, M) of
    the squared distances that result. The covariance is shrunk by `shrink` towards a multiple of
    the identity, as there may be fewer photos than D."""
    mean, matrices = x.mean(0), []
    for one in (x - mean).double().unbind(1):                        # (n, D)
        cov, eye = one.T @ one / len(one), torch.eye(one.shape[1], dtype=torch.double)
        cov = (1 - shrink) * cov + (shrink * cov.diag().mean() + 1e-9) * eye
        matrices.append(torch.linalg.inv(torch.linalg.cholesky(cov)).T.float())
    normal = {"mean": mean, "matrix": torch.stack(matrices)}
    return normal | {"distance": normal_statistics(distances(x, normal))}


def distances(x: torch.Tensor, normal: dict) -> torch.Tensor:
    """Squared Mahalanobis distance of x (B, M, D) from what is normal there, (B, M)."""
    return torch.einsum("bmd,mde->bme", x - normal["mean"], normal["matrix"]).square().sum(-1)


def judge_histograms(residual: torch.Tensor, tokens: torch.Tensor, normal: dict):
    """residual (B, M, L * K), predicted minus actual histogram -> (B,), the mean over the masks of
    its squared Mahalanobis distance, in the deviations that it has on the training normals, and the
    map. The L1 distance adds up what good photos vary in, too; here that counts little."""
    mean, std = normal["histograms"]["distance"]
    return ((distances(residual, normal["histograms"]) - mean) / std).mean(1), tokens


MIM_SCORES = {
    "mean": Score(lambda errors: errors.of_masks, lambda error, tokens, _: (error.mean(1), tokens)),
    "whitened": Score(lambda errors: errors.histogram.flatten(2), judge_histograms,
                      lambda residual: {"histograms": whitening(residual)}),
    "deviations": Score(lambda errors: errors.of_tokens,
                        lambda _, tokens, normal: deviations(tokens, normal["mim_deviations"]),
                        lambda tokens: {"mim_deviations": normal_statistics(smoothed(tokens))})}
