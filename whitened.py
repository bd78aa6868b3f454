"""Scores of our own: errors measured in the covariance that they have on good photos.

What HVQ-Trans cannot rebuild, and what the ViT cannot predict, has a covariance over good photos,
known from the training photos. An error is measured in it (Mahalanobis), so what good photos show,
too, does not count. `--hvq-score whitened` and `--mim-score whitened`; test photos play no part.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from eval import moments


def windows(residual: torch.Tensor) -> list[torch.Tensor]:
    """residual (B, N, d0) -> its mean over every window of 1, 2 and all tokens a side, (B, W, d0)
    each. A broken part shows in one token; a wrong count shows in the whole photo's mean, where
    the tokens' noise cancels out."""
    grid = math.isqrt(residual.shape[1])
    square = residual.transpose(1, 2).unflatten(2, (grid, grid))
    return [F.avg_pool2d(square, side, 1).flatten(2).transpose(1, 2)
            for side in (1, min(2, grid), grid)]


def normal_statistics(values: torch.Tensor) -> torch.Tensor:
    """values (n, m) of n training normals -> mean and std of each column, (2, m). Half of a
    column's std is its own, half the average column's, so that a token that hardly varies does not
    shout; at least 1 % of the mean, as in `eval.moments`."""
    mean, std = values.mean(0), values.std(0, correction=0)
    std = ((std + std.mean()) / 2).maximum(0.01 * mean.abs()).clamp(min=1e-6)
    return torch.stack([mean, std])


def whitening(x: torch.Tensor, shrink=0.1) -> dict:
    """What is normal in windows x (n, W, d0) of the training normals: each window's mean (W, d0),
    the matrix (d0, d0) that makes their pooled covariance the identity, and the moments (2, W) of
    the squared distances that result. The covariance is shrunk by a tenth towards a multiple of
    the identity, as there may be fewer photos than channels."""
    mean = x.mean(0)
    off = (x - mean).flatten(0, 1).double()
    cov, eye = off.T @ off / len(off), torch.eye(off.shape[1], dtype=torch.double)
    cov = (1 - shrink) * cov + (shrink * cov.diag().mean() + 1e-9) * eye
    normal = {"mean": mean, "matrix": torch.linalg.inv(torch.linalg.cholesky(cov)).T.float()}
    return normal | {"distance": normal_statistics(distances(x, normal))}


def distances(x: torch.Tensor, normal: dict) -> torch.Tensor:
    """Squared Mahalanobis distance of windows x (B, W, d0) from what is normal there, (B, W)."""
    return ((x - normal["mean"]) @ normal["matrix"]).square().sum(-1)


def abnormal(residual: torch.Tensor, normal: list[dict]) -> list[torch.Tensor]:
    """For each size of window, how many standard deviations its squared distance is above the
    training normals', (B, W)."""
    return [(distances(x, one) - one["distance"][0]) / one["distance"][1]
            for x, one in zip(windows(residual), normal)]


def learn_residuals(train: torch.Tensor, validation: torch.Tensor) -> dict:
    """Residuals (n, N, d0) of the training and the validation normals -> what is normal."""
    normal = [whitening(x) for x in windows(train)]
    largest = [z.amax(1).double().numpy() for z in abnormal(validation, normal)]
    return {"windows": normal, "largest": [moments(values) for values in largest]}


def judge_residuals(residual: torch.Tensor, normal: dict):
    """residual (B, N, d0) -> S_HVQ (B,), the largest distance of a window, each size of window
    standardised by the validation normals; and the tokens' distances (B, N)."""
    far = abnormal(residual, normal["windows"])
    scores = [(z.amax(1) - mean) / std for z, (mean, std) in zip(far, normal["largest"])]
    return torch.stack(scores).amax(0), far[0]


def learn_histograms(train: torch.Tensor, validation: torch.Tensor) -> dict:
    """Histogram errors (n, L, K) of the training normals -> what is normal."""
    return {"histograms": [whitening(level[:, None]) for level in train.unbind(1)]}


def judge_histograms(histogram: torch.Tensor, normal: dict) -> torch.Tensor:
    """histogram (B, L, K), predicted minus actual -> S_MIM (B,), its distance summed over the
    levels."""
    levels = zip(histogram.unbind(1), normal["histograms"])
    return sum(distances(level[:, None], one)[:, 0] for level, one in levels)
