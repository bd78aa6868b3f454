"""What scores learn of normal photos, against its definition in float64."""
import numpy as np
import pytest
import torch

import scores
from runs import in_precision


def test_whitening_against_float64():
    x = np.random.default_rng(0).normal(size=(30, 4, 6)) @ np.diag([5, 1, 1, 1, 0.1, 0])
    normal = scores.whitening(torch.from_numpy(x).float())
    y = np.random.default_rng(1).normal(size=(7, 4, 6))
    found = scores.distances(torch.from_numpy(y).float(), normal)
    for mask in range(4):
        off = x[:, mask] - x[:, mask].mean(0)
        cov = off.T @ off / len(off)
        precision = np.linalg.inv(0.9 * cov + (0.1 * np.trace(cov) / 6 + 1e-9) * np.eye(6))
        gap = y[:, mask] - x[:, mask].mean(0)
        expected = np.einsum("bi,ij,bj->b", gap, precision, gap)
        np.testing.assert_allclose(found[:, mask], expected, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_whitening_of_hardly_any_photos_is_finite(n):
    normal = scores.whitening(torch.randn(n, 4, 6))
    assert all(torch.isfinite(value).all() for value in normal.values())
    assert torch.isfinite(scores.distances(torch.randn(3, 4, 6), normal)).all()


def test_normal_statistics():
    values = np.random.default_rng(0).normal(2, 3, (50, 4))
    mean, std = scores.normal_statistics(torch.from_numpy(values))
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(std, (values.std(0) + values.std(0).mean()) / 2)


def test_a_scratch_counts_more_where_good_photos_hardly_vary():
    rng = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 2, 36)
    train, seen = (1 + spread * torch.rand(n, 36, generator=rng) for n in (60, 2))
    normal = scores.normal_statistics(scores.smoothed(train))
    usual = scores.deviations(seen, normal)[0]
    calm, restless = seen.clone(), seen.clone()
    calm[:, 0] += 2
    restless[:, 35] += 2
    calm, where = scores.deviations(calm, normal)
    assert (calm > usual).all() and (where.argmax(1) < 8).all()      # token 0 or one beside it
    assert (calm > scores.deviations(restless, normal)[0]).all()


@pytest.mark.parametrize("tokens, precision", [(16, "fp32"), (16, "bf16"), (576, "bf16")])
def test_histograms_are_the_shares_of_each_code(tokens, precision):
    """In bfloat16, too: a mask of 40 % of 24 x 24 tokens hides 230."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(7, (3, 2, tokens), generator=rng)
    masks = torch.rand(5, tokens, generator=rng) < 0.4
    with in_precision(precision, torch.device("cpu")):
        found = scores.histograms(codes, masks, 7)
    for photo in range(3):
        for mask in range(5):
            for level in range(2):
                hidden = codes[photo, level][masks[mask]].numpy()
                expected = np.bincount(hidden, minlength=7) / len(hidden)
                np.testing.assert_allclose(found[photo, mask, level], expected, rtol=1e-6)


def test_a_histogram_that_never_varies_counts_most():
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 1.0, 1.0, 0.01])
    train = torch.randn(50, 3, 4, generator=rng) * spread
    normal = {"histograms": scores.whitening(train)}
    seen = torch.zeros(2, 3, 4)
    seen[0, :, 0] = seen[1, :, 3] = 1                # the same L1 distance
    usual, rare = scores.judge_histograms(seen, seen, normal)[0]
    assert rare > 3 * usual
