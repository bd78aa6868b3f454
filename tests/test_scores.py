"""Errors, scores and maps against plain loops; what is normal."""
import dataclasses

import numpy as np
import pytest
import torch
from test_ladmim import SMALL, features, models

import ladmim
import scores
from runs import seeded


def scored(cfg, h0, normal=None, **options):
    """What `judge` finds in photos with features h0."""
    hvq, mim = models(cfg)
    masks = ladmim.draw_masks(cfg, 5, seeded(0), scoring=True)
    errors = ladmim.errors(hvq, mim, cfg, h0, masks, **options)
    return ladmim.judge(cfg, ladmim.kept_errors(cfg, errors), normal or {})


def test_scores_do_not_depend_on_the_batch_or_the_memory_budget():
    h0 = features(7)
    whole, tight = scored(SMALL, h0), scored(SMALL, h0, budget=1)
    single = [scored(SMALL, h0[i:i + 1]) for i in range(7)]
    assert set(whole) == {"hvq", "mim", "hvq_map", "mim_map"}
    for name, values in whole.items():
        one_by_one = torch.cat([judged[name] for judged in single])
        torch.testing.assert_close(values, one_by_one, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, tight[name], atol=1e-5, rtol=1e-5)


def test_bf16_scores_stay_near():
    h0 = features(4)
    whole, near = scored(SMALL, h0), scored(dataclasses.replace(SMALL, precision="bf16"), h0)
    for name in ("hvq", "mim"):
        torch.testing.assert_close(whole[name], near[name], rtol=0.03, atol=0.0)
        assert not torch.equal(whole[name], near[name])


def squared_distance(gap, matrix):
    """Of `whitening`'s result, from x less its mean."""
    return (matrix.T @ gap).square().sum()


def means_of_nine(error):
    """error (36,) -> (36,); at the border there are fewer than nine tokens."""
    square, means = error.view(6, 6), []
    for i in range(6):
        for j in range(6):
            means.append(square[max(0, i - 1):i + 2, max(0, j - 1):j + 2].mean())
    return torch.stack(means)


def largest_mean_of_16_pixels(norm):
    """norm (36,) of 6x6 tokens, stretched to 224x224 pixels, corner on corner."""
    at = np.linspace(0, 5, 224)
    square = norm.detach().view(6, 6).numpy()
    rows = np.stack([np.interp(at, range(6), column) for column in square.T])
    pixels = np.stack([np.interp(at, range(6), row) for row in rows.T])
    total = np.pad(pixels, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    means = (total[16:, 16:] - total[:-16, 16:] - total[16:, :-16] + total[:-16, :-16]) / 256
    return torch.tensor(means.max(), dtype=torch.float)


def means_over_masks(errors, masks):
    """errors (M, 36) of each token under each mask -> (36,): over the masks that hide it; a token
    that none hides has the mean over the masks of their own means."""
    of_masks = torch.stack([errors[m][masks[m]].mean() for m in range(len(masks))])
    return torch.stack([errors[masks[:, token], token].mean() if masks[:, token].any()
                        else of_masks.mean() for token in range(36)])


@pytest.mark.parametrize("budget", [0, 1])
@pytest.mark.parametrize("hvq_score, mim_score", [
    ("mean", "mean"), ("max", "mean"), ("norm", "mean"), ("mean", "whitened"),
    ("deviations", "whitened"), ("deviations", "deviations")])
def test_score_against_a_plain_loop(hvq_score, mim_score, budget):
    cfg = dataclasses.replace(SMALL, hvq_score=hvq_score, mim_score=mim_score)
    hvq, mim = models(cfg)
    h0, masks = features(2), ladmim.draw_masks(cfg, 5, seeded(0), scoring=True)
    normal = {"deviations": torch.rand(2, 36) + 0.5, "mim_deviations": torch.rand(2, 36) + 0.5,
              "histograms": scores.whitening(torch.randn(20, 5, 64))}
    judged = scored(cfg, h0, normal, budget=budget)
    for b in range(2):
        rebuilt, codes = hvq(h0[b:b + 1])
        residual = h0[b] - rebuilt[0]
        error = (residual ** 2).mean(-1)
        losses, off = torch.zeros(5), torch.zeros(5, 4, 16)
        for m in range(5):
            p = mim(h0[b:b + 1], masks[m:m + 1]).softmax(-1)[0, 0]
            for level in range(4):
                q = torch.bincount(codes[0, level][masks[m]], minlength=16) / masks[m].sum()
                losses[m] += (p[level] - q).abs().sum()
                off[m, level] = p[level] - q
        expected_mim, expected_hvq = losses.mean(), error.mean()
        if mim_score == "whitened":
            at, far = normal["histograms"], []
            for m in range(5):
                distance = squared_distance(off[m].flatten() - at["mean"][m], at["matrix"][m])
                far.append((distance - at["distance"][0, m]) / at["distance"][1, m])
            expected_mim = sum(far) / 5
        if hvq_score == "max":
            expected_hvq = means_of_nine(error).max()
        if hvq_score == "norm":
            error = (residual ** 2).sum(-1).sqrt()
            expected_hvq = largest_mean_of_16_pixels(error)
        if hvq_score == "deviations":
            error = (means_of_nine(error) - normal["deviations"][0]) / normal["deviations"][1]
            expected_hvq = error.max()
        logical = means_over_masks(losses[:, None].expand(5, 36), masks)
        if mim_score == "deviations":
            mean, std = normal["mim_deviations"]
            logical = (means_of_nine(logical) - mean) / std
            expected_mim = logical.max()
        expected = {"hvq": expected_hvq, "mim": expected_mim, "hvq_map": error, "mim_map": logical}
        for name, values in expected.items():
            torch.testing.assert_close(judged[name][b], values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["code", "feature", "pixel"])
def test_other_targets_against_a_plain_loop(target):
    cfg = dataclasses.replace(SMALL, target=target)
    hvq, mim = models(cfg)
    h0, pixels = features(2), torch.randn(2, 36, 48)
    masks = ladmim.draw_masks(cfg, 5, seeded(0), scoring=True)
    assert not masks.any(0).all()
    _, codes = hvq(h0)
    errors = ladmim.errors(hvq, mim, cfg, h0, masks, pixels, budget=1)
    assert not errors.histogram.any()
    for b in range(2):
        expected = torch.full((5, 36), torch.nan, dtype=torch.double)
        for m in range(5):
            output = mim(h0[b:b + 1], masks[m:m + 1])[0, 0]          # (N, L * K, d0 or 48)
            for token in masks[m].nonzero()[:, 0]:
                if target == "code":
                    p = output[token].double().view(4, 16).softmax(-1)
                    right = [p[level, codes[b, level, token]] for level in range(4)]
                    expected[m, token] = -torch.stack(right).log().sum()
                else:
                    truth = (h0 if target == "feature" else pixels)[b, token]
                    expected[m, token] = (output[token] - truth).double().pow(2).mean()
            torch.testing.assert_close(errors.of_masks[b, m].double(), expected[m].nanmean(),
                                       atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(errors.of_tokens[b].double(), means_over_masks(expected, masks),
                                   atol=1e-5, rtol=1e-5)


def photos_with_scores(s_hvq, s_mim, seed=0):
    """`kept_errors` of photos with these scores, as the means of their errors: (n, 9), (n, 5) of
    the masks, (n, 9) of the tokens."""
    rng, kept = torch.Generator().manual_seed(seed), []
    for values, width in ((s_hvq, 9), (s_mim, 5), (s_mim, 9)):
        errors = torch.randn(len(values), width, generator=rng).double()
        kept.append(errors - errors.mean(1, keepdim=True) + values[:, None])
    return kept


def test_normal_is_what_the_validation_photos_show_and_survives_one_photo():
    rng, cfg = torch.Generator().manual_seed(0), dataclasses.replace(SMALL, grid=3)
    s_hvq = 3 + 2 * torch.randn(50, generator=rng).double()
    s_mim = torch.randn(50, generator=rng).double() / 10 - 1
    kept, train = photos_with_scores(s_hvq, s_mim), photos_with_scores(s_hvq + 9, s_mim + 9)
    normal = ladmim.learn_normal(cfg, train, kept)
    judged = ladmim.judge(cfg, kept, normal)
    s = ladmim.final_scores(normal, judged)
    a, b = s_hvq.numpy(), s_mim.numpy()
    total = (a - a.mean()) / a.std() + (b - b.mean()) / b.std()
    np.testing.assert_allclose(s["score"], total)
    for name in ("hvq_map", "mim_map"):
        mean, std = judged[name].mean(), judged[name].std(correction=0)
        np.testing.assert_allclose(normal[name], (mean, std))
        torch.testing.assert_close(s[name], (judged[name] - mean) / std)
    torch.testing.assert_close(s["heat"], s["hvq_map"] + s["mim_map"])
    expected = np.interp(0.95 * 51, range(1, 51), np.sort(total))
    assert normal["threshold"] == pytest.approx(expected)


def test_one_validation_photo_is_enough():
    lone = photos_with_scores(torch.zeros(1), torch.ones(1))         # 0: what a whitened score is
    cfg = dataclasses.replace(SMALL, grid=3)
    normal = ladmim.learn_normal(cfg, lone, lone)
    odd = ladmim.judge(cfg, photos_with_scores(torch.full((1,), 5.0), torch.ones(1)), normal)
    assert float(ladmim.final_scores(normal, odd)["score"]) == pytest.approx(5)
    odd = ladmim.judge(cfg, photos_with_scores(*torch.full((2, 1), 5.0)), normal)
    assert all(abs(s).max() < 1e4 for s in ladmim.final_scores(normal, odd).values())
