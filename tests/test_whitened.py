"""Whitened scores against their definition, in float64."""
import numpy as np
import pytest
import torch

import whitened


def test_whitening_against_float64():
    x = np.random.default_rng(0).normal(size=(30, 4, 6)) @ np.diag([5, 1, 1, 1, 0.1, 0])
    off = (x - x.mean(0)).reshape(-1, 6)
    cov = off.T @ off / len(off)
    precision = np.linalg.inv(0.9 * cov + (0.1 * np.trace(cov) / 6 + 1e-9) * np.eye(6))
    normal = whitened.whitening(torch.from_numpy(x).float())
    y = np.random.default_rng(1).normal(size=(7, 4, 6))
    expected = np.einsum("bwi,ij,bwj->bw", y - x.mean(0), precision, y - x.mean(0))
    distances = whitened.distances(torch.from_numpy(y).float(), normal)
    np.testing.assert_allclose(distances, expected, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_whitening_of_hardly_any_photos_is_finite(n):
    normal = whitened.whitening(torch.randn(n, 4, 6))
    assert all(torch.isfinite(value).all() for value in normal.values())
    assert torch.isfinite(whitened.distances(torch.randn(3, 4, 6), normal)).all()


def test_normal_statistics():
    values = np.random.default_rng(0).normal(2, 3, (50, 4))
    mean, std = whitened.normal_statistics(torch.from_numpy(values))
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(std, (values.std(0) + values.std(0).mean()) / 2)


@pytest.mark.parametrize("grid, counts", [(6, (36, 25, 1)), (1, (1, 1, 1))])
def test_windows_are_all_squares_of_one_two_and_all_tokens_a_side(grid, counts):
    residual = torch.randn(3, grid * grid, 5)
    windows = whitened.windows(residual)
    assert tuple(x.shape[1] for x in windows) == counts
    square = residual.view(3, grid, grid, 5)
    for side, x in zip((1, min(2, grid), grid), windows):
        last = square[:, -side:, -side:].mean((1, 2))
        torch.testing.assert_close(x[:, -1], last)
        torch.testing.assert_close(x[:, 0], square[:, :side, :side].mean((1, 2)))


def test_validation_normals_scale_the_largest_distances_and_training_normals_the_rest():
    rng = torch.Generator().manual_seed(0)
    train, validation = (torch.randn(n, 16, 5, generator=rng) for n in (40, 30))
    normal = whitened.learn_residuals(train, validation)
    for x, one in zip(whitened.windows(train), normal["windows"]):
        distances = whitened.distances(x, one).numpy()
        np.testing.assert_allclose(one["distance"][0], distances.mean(0), rtol=1e-4)
    scores, tokens = whitened.judge_residuals(validation, normal)
    assert scores.shape == (30,) and tokens.shape == (30, 16)
    largest = [z.amax(1).double().numpy() for z in whitened.abnormal(validation, normal["windows"])]
    expected = np.max([(z - z.mean()) / z.std() for z in largest], axis=0)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    broken = validation.clone()
    broken[:, 5] += 4
    assert (whitened.judge_residuals(broken, normal)[0] > scores).all()
    assert (whitened.judge_residuals(broken, normal)[1].argmax(1) == 5).float().mean() > 0.9


def test_histograms_are_measured_level_by_level():
    train, seen = torch.randn(20, 4, 6), torch.randn(3, 4, 6)
    scores = whitened.judge_histograms(seen, whitened.learn_histograms(train, train[:2]))
    expected = np.zeros(3)
    for level in range(4):
        x, y = train[:, level].double().numpy(), seen[:, level].double().numpy()
        off = x - x.mean(0)
        cov = off.T @ off / len(off)
        cov = 0.9 * cov + (0.1 * np.trace(cov) / 6 + 1e-9) * np.eye(6)
        gap = y - x.mean(0)
        expected += np.einsum("bi,ij,bj->b", gap, np.linalg.inv(cov), gap)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
