"""The model, its masks, training, scoring and command line."""
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ladmim
from data import InputError
from ladmim import HVQ, PRESETS, Config, ViT

SMALL = Config(grid=6, codes=16, code_dim=8, hvq_width=32, hvq_heads=2, hvq_dropout=0.0, mim_width=32, mim_heads=2, mim_blocks=3,
               mim_dropout=0.0, masks=5)
D0 = 24


def features(n, seed=0, cfg=SMALL):
    return torch.randn(n, cfg.grid ** 2, D0, generator=torch.Generator().manual_seed(seed))


def models(cfg=SMALL, seed=0):
    torch.manual_seed(seed)
    hvq, mim = HVQ(cfg, D0), ViT(cfg, D0)
    nn.init.normal_(mim.e)                           # both start at zero; a test should not depend on that
    nn.init.normal_(mim.p)
    return hvq.eval(), mim.eval()


# Backbone

@pytest.mark.parametrize("size, layers", [("small", (3, 3)), ("medium", (3, 3))])
def test_pdn_shapes_and_both_published_formats(size, layers):
    pdn = ladmim.build_pdn(size)
    plain = pdn.state_dict()
    order = [m for m in pdn if isinstance(m, nn.Conv2d)]
    named = {f"conv{i + 1}.{part}": getattr(conv, part).data for i, conv in enumerate(order) for part in ("weight", "bias")}
    x = torch.randn(1, 3, 224, 224)
    expected = pdn(x)
    assert expected.shape == (1, 384, 48, 48)
    for state, kind in ((plain, "plain Sequential keys"), (named, "named layers")):
        loaded, found = ladmim.pdn_from_state(state, "x")
        assert found == f"PDN {size}, {kind}"
        torch.testing.assert_close(loaded(x), expected)


def test_pdn_receptive_field_is_33_pixels_at_stride_4():
    pdn = ladmim.build_pdn("small").double()
    x = torch.randn(1, 3, 65, 65, dtype=torch.double, requires_grad=True)
    y = pdn(x)
    assert y.shape[-1] == 9                          # (65 - 33) / 4 + 1
    y[0, :, 2, 3].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert seen.min(0).values.tolist() == [8, 12] and seen.max(0).values.tolist() == [8 + 32, 12 + 32]


@pytest.mark.parametrize("state", [{}, {"0.weight": torch.zeros(3, 3)}, {"conv1.weight": torch.zeros(128, 3, 4, 4)}])
def test_foreign_weights_are_refused(state):
    with pytest.raises(InputError, match="no PDN"):
        ladmim.pdn_from_state(state, "x")


def test_weight_files_that_are_none(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickle.pt")                     # a pickled class: weights_only refuses it
    for name in ("text.pt", "empty.pt", "pickle.pt", "missing.pt"):
        with pytest.raises(InputError, match="--pdn"):
            ladmim.load_pdn(str(tmp_path / name), 0)


def test_extract_normalises_and_pools():
    pdn, _ = ladmim.load_pdn("random", 0)
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    x = (images.double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    expected = F.avg_pool2d(pdn.double()(x.permute(0, 3, 1, 2)), 2).flatten(2).transpose(1, 2)
    found = ladmim.extract(pdn.float(), images, 24)
    assert found.shape == (2, 576, 384)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


# HVQ-Trans

def test_paper_preset_shapes():
    cfg = Config(**PRESETS["paper"])
    torch.manual_seed(0)
    hvq, mim = HVQ(cfg, 384).eval(), ViT(cfg, 384).eval()
    h0 = torch.randn(1, 576, 384)
    with torch.no_grad():
        h = hvq.encode(h0)
        psi, z, codes = hvq.quantise(h)
        logits = mim(h0, ladmim.draw_masks(cfg, 3, ladmim.seeded(0), scoring=True))
    assert len(h) == 4 and all(x.shape == (1, 576, 256) for x in h)
    assert hvq.codebooks.shape == (4, 512, 64)
    assert all(x.shape == (1, 576, 64) for x in (*psi, *z))
    assert codes.shape == (1, 4, 576) and codes.min() >= 0 and codes.max() < 512
    assert hvq.decode(z).shape == (1, 576, 384)
    assert logits.shape == (1, 3, 4, 512)


def test_quantise_takes_the_nearest_code_and_conditions_on_the_top_level():
    hvq, _ = models()
    h = hvq.encode(features(3))
    psi, z, codes = hvq.quantise(h)
    for level in range(4):
        distance = torch.cdist(psi[level].double(), hvq.codebooks[level].double())
        assert torch.equal(distance.argmin(-1), codes[:, level])
        torch.testing.assert_close(z[level], hvq.codebooks[level][codes[:, level]])
    torch.testing.assert_close(psi[3], hvq.psi[3](h[3]))
    torch.testing.assert_close(psi[0], hvq.psi[0](torch.cat([h[0], hvq.codebooks[3][codes[:, 3]]], -1)))


def test_gradients_pass_straight_through_the_codes():
    hvq, _ = models()
    h = [x.detach().requires_grad_() for x in hvq.encode(features(2))]
    psi, z, _ = hvq.quantise(h)
    weights = torch.randn_like(z[1])
    (z[1] * weights).sum().backward()
    torch.testing.assert_close(h[1].grad, (weights @ hvq.psi[1].weight)[..., :32])
    assert hvq.codebooks.grad is None                # the feature error moves the encoder; equation 7's terms the codes


def test_loss_is_equation_7():
    hvq, _ = models()
    h0 = features(2)
    psi, z, codes = hvq.quantise(hvq.encode(h0))
    expected = (hvq.decode(z) - h0).square().mean()
    for level in range(4):
        expected = expected + 1.25 * (psi[level] - hvq.codebooks[level][codes[:, level]]).square().mean()
    torch.testing.assert_close(hvq.loss(h0), expected)


@pytest.mark.parametrize("level", range(3))
def test_the_decoder_knows_where_a_code_lies(level):
    """Cross-attention sees a set of codes: without their positions, exchanging two of them would change nothing. The top
    level's reach their tokens through the first query anyway."""
    hvq, _ = models()
    z = [torch.randn(1, 36, 8, generator=ladmim.seeded(n)) for n in range(4)]
    swapped = [x.clone() for x in z]
    swapped[level][:, [3, 20]] = z[level][:, [20, 3]]
    assert (hvq.decode(z) - hvq.decode(swapped)).abs().max() > 1e-4


def test_ema_codebook_is_the_running_mean():
    cfg = dataclasses.replace(SMALL, codebook="ema")
    hvq, _ = models(cfg)
    assert not hvq.codebooks.requires_grad
    h0 = features(4)
    hvq.start_codebooks(h0, ladmim.seeded(0))
    psi, _, codes = hvq.quantise(hvq.encode(h0))
    count, total = torch.ones(16), hvq.codebooks[2].clone()
    for k in range(16):
        chosen = psi[2][codes[:, 2] == k]
        count[k] = 0.99 * count[k] + 0.01 * len(chosen)
        total[k] = 0.99 * total[k] + 0.01 * chosen.sum(0)
    hvq.count(psi, codes)
    torch.testing.assert_close(hvq.codebooks[2], total / count[:, None])


def test_codebooks_start_from_data_and_dead_codes_revive():
    hvq, _ = models()
    h0 = features(8)
    with torch.no_grad():
        hvq.codebooks.fill_(1e3)
    hvq.start_codebooks(h0, ladmim.seeded(0))
    hvq.loss(h0)
    used, perplexity = hvq.health()
    assert min(used) >= 12 and all(1 <= p <= 16 for p in perplexity)
    with torch.no_grad():
        hvq.codebooks[1, 3:] = 1e3                   # out of reach
    hvq.used.zero_()
    hvq.loss(h0)
    assert hvq.health()[0][1] <= 3
    hvq.revive(h0, ladmim.seeded(1))
    hvq.used.zero_()
    hvq.loss(h0)
    assert hvq.health()[0][1] >= 12


def test_perplexity_against_its_definition():
    hvq, _ = models()
    hvq.used[0] = torch.tensor([3.0, 1.0] + [0.0] * 14)
    used, perplexity = hvq.health()
    assert used[0] == 2 and perplexity[0] == round(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), 1)


def test_bf16_searches_codes_in_fp32_and_stays_near(monkeypatch):
    hvq, mim = models()
    cfg, h0, searched = dataclasses.replace(SMALL, precision="bf16"), features(4), []
    monkeypatch.setattr(ladmim, "nearest_code", lambda x, b, real=ladmim.nearest_code: searched.append((x, b)) or real(x, b))
    with ladmim.in_precision(cfg, h0.device):
        psi, _, codes = hvq.quantise(hvq.encode(h0))
        logits = mim(h0, ladmim.draw_masks(cfg, 5, ladmim.seeded(0), scoring=True))
        rough = hvq.loss(h0)
    assert psi[0].dtype == torch.bfloat16 and logits.dtype == torch.float32                       # it is at work
    assert all(x.dtype == b.dtype == torch.float32 for x, b in searched) and len(searched) == 8
    for level in range(4):
        distance = torch.cdist(psi[level].double(), hvq.codebooks[level].double())
        assert torch.equal(distance.argmin(-1), codes[:, level])
    exact = hvq.loss(h0)
    assert 0 < abs(float(rough.detach() - exact.detach())) < 0.02 * float(exact.detach())
    whole, near = scored(SMALL, h0), scored(cfg, h0)
    for a, b in zip(whole[:2], near[:2]):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.0)
        assert not torch.equal(a, b)


# Masks

@settings(max_examples=60, deadline=None)
@given(grid=st.integers(1, 24), share=st.floats(0.01, 1), least=st.floats(0.0, 1), seed=st.integers(0, 999))
def test_block_masks_hide_exactly_the_count(grid, share, least, seed):
    count = max(1, round(share * grid * grid))
    masks = ladmim.block_masks(7, grid, count, max(1, round(least * count)), ladmim.seeded(seed))
    assert masks.shape == (7, grid * grid) and (masks.sum(1) == count).all()


def test_block_masks_are_blocks_and_cover_the_grid():
    masks = ladmim.block_masks(2000, 24, 230, 92, ladmim.seeded(0)).view(-1, 24, 24).float()
    scattered = ladmim.random_masks(2000, 24, 230, ladmim.seeded(0)).view(-1, 24, 24).float()

    def agreement(masks):                            # of a token with its right-hand neighbour
        return (masks[:, :, 1:] == masks[:, :, :-1]).float().mean()

    assert agreement(masks) > 0.9 and 0.5 < agreement(scattered) < 0.56           # 1 - 2 * 0.4 * 0.6 = 0.52
    assert masks.mean(0).min() > 0.005               # corners are rare with uniform positions, but none is left out


def test_random_and_checkerboard_masks():
    masks = ladmim.random_masks(500, 24, 230, ladmim.seeded(0))
    assert (masks.sum(1) == 230).all() and abs(masks.float().mean(0) - 230 / 576).max() < 0.12
    boards = ladmim.checkerboard_masks(24)
    assert boards.shape == (6, 576) and torch.equal(boards[:3], ~boards[3:])
    for board, squares in zip(boards, (3, 6, 12)):
        side = 24 // squares
        tiles = board.view(squares, side, squares, side).permute(0, 2, 1, 3).flatten(2).float().mean(-1)
        i, j = torch.meshgrid(torch.arange(squares), torch.arange(squares), indexing="ij")
        assert torch.equal(tiles, ((i + j) % 2 == 1).float())


def test_paper_masks_have_the_papers_counts():
    cfg = Config(**PRESETS["paper"])
    assert (ladmim.draw_masks(cfg, 9, ladmim.seeded(1), scoring=False).sum(1) == 130).all()
    assert (ladmim.draw_masks(cfg, 9, ladmim.seeded(1), scoring=True).sum(1) == 230).all()


# ViT

@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_last_block_shortcut_equals_the_full_computation(blocks):
    cfg = dataclasses.replace(SMALL, mim_blocks=blocks)
    _, mim = models(cfg)
    h0, mask = features(3), ladmim.draw_masks(cfg, 3, ladmim.seeded(0), scoring=False)[:, None]

    def full(h0):
        x = torch.where(mask[..., None], mim.e, mim.embed(h0)[:, None])
        x = (torch.cat([mim.p.expand(3, 1, 1, -1), x], 2) + mim.positions).flatten(0, 1)
        for block in mim.blocks:
            x = block(x)
        return mim.head(mim.norm(x))[:, 0].view(3, 1, 4, 16)

    weights = torch.randn(3, 1, 4, 16)
    gradients = []
    for forward in (full, lambda h0: mim(h0, mask)):
        mim.zero_grad()
        logits = forward(h0)
        (logits * weights).sum().backward()
        gradients.append([logits.detach()] + [p.grad.clone() for p in mim.parameters()])
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-5 * max(1, a.abs().max())


def test_masked_tokens_are_unseen():
    _, mim = models()
    h0, mask = features(2), ladmim.draw_masks(SMALL, 4, ladmim.seeded(0), scoring=True)
    for m in range(4):
        other = torch.where(mask[m][None, :, None], features(2, seed=9), h0)      # differs where the mask hides it
        torch.testing.assert_close(mim(h0, mask[m:m + 1]), mim(other, mask[m:m + 1]))
        visible = torch.where(mask[m][None, :, None], h0, features(2, seed=9))
        assert not torch.allclose(mim(h0, mask[m:m + 1]), mim(visible, mask[m:m + 1]), atol=1e-3)


def test_order_of_codes_inside_a_mask_changes_no_loss():
    from kernels import histogram_l1
    _, mim = models()
    h0, mask = features(2), ladmim.draw_masks(SMALL, 5, ladmim.seeded(0), scoring=True)
    codes = torch.randint(0, 16, (2, 4, 36), dtype=torch.int16, generator=ladmim.seeded(1))
    logits = mim(h0, mask)
    for m in range(5):
        where = mask[m].nonzero()[:, 0]
        moved = codes.clone()
        moved[:, :, where] = codes[:, :, where[torch.randperm(len(where), generator=ladmim.seeded(m))]]
        assert not torch.equal(moved, codes)
        a, b = (histogram_l1(logits[:, m:m + 1], c, mask[m:m + 1]) for c in (codes, moved))
        torch.testing.assert_close(a, b)


# Scoring

def scored(cfg, h0, normal=None, **options):
    hvq, mim = models(cfg)
    masks = ladmim.draw_masks(cfg, 5, ladmim.seeded(0), scoring=True)
    return ladmim.detect(cfg, ladmim.errors(hvq, mim, cfg, h0, masks, **options), masks, normal)


def test_scores_do_not_depend_on_the_batch_or_the_memory_budget():
    h0 = features(7)
    whole, tight = scored(SMALL, h0), scored(SMALL, h0, budget=1)
    single = [torch.cat(parts) for parts in zip(*(scored(SMALL, h0[i:i + 1]) for i in range(7)))]
    for a, b, c in zip(whole, single, tight):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [0, 1])
@pytest.mark.parametrize("hvq_score, mim_score", [("mean", "mean"), ("max", "mean"), ("mean", "whitened"),
                                                  ("whitened", "whitened")])
def test_score_against_a_plain_loop(hvq_score, mim_score, budget):
    cfg = dataclasses.replace(SMALL, hvq_score=hvq_score, mim_score=mim_score)
    hvq, mim = models(cfg)
    h0, masks = features(2), ladmim.draw_masks(cfg, 5, ladmim.seeded(0), scoring=True)
    normal = {"windows": [ladmim.whitening(torch.randn(20, count, h0.shape[-1])) for count in (36, 25, 1)],
              "histograms": [ladmim.whitening(torch.randn(20, 1, 16)) for _ in range(4)],
              "largest": [[1.0, 2.0], [3.0, 1.0], [0.0, 5.0]]}
    s_hvq, s_mim, hvq_map, mim_map = scored(cfg, h0, normal, budget=budget)
    for b in range(2):
        rebuilt, codes = hvq(h0[b:b + 1])
        residual = h0[b] - rebuilt[0]
        error = (residual ** 2).mean(-1)
        losses, off = torch.zeros(5), torch.zeros(4, 16)
        for m in range(5):
            p = mim(h0[b:b + 1], masks[m:m + 1]).softmax(-1)[0, 0]
            for level in range(4):
                q = torch.bincount(codes[0, level][masks[m]], minlength=16) / masks[m].sum()
                losses[m] += (p[level] - q).abs().sum()
                off[level] += (p[level] - q) / 5
        largest, wrong = [], losses.mean()
        if mim_score == "whitened":
            wrong = sum((at["matrix"].T @ (x - at["mean"][0])).square().sum() for x, at in zip(off, normal["histograms"]))
        if hvq_score == "whitened":
            for side, at, (mean, std) in zip((1, 2, 6), normal["windows"], normal["largest"]):
                square, far = residual.view(6, 6, -1), []
                for w, (i, j) in enumerate((i, j) for i in range(7 - side) for j in range(7 - side)):
                    gap = square[i:i + side, j:j + side].mean((0, 1)) - at["mean"][w]
                    far.append(((at["matrix"].T @ gap).square().sum() - at["distance"][0, w]) / at["distance"][1, w])
                largest.append((max(far) - mean) / std)
                error = torch.stack(far) if side == 1 else error
        torch.testing.assert_close(hvq_map[b], error, atol=1e-4, rtol=1e-4)
        square = error.view(6, 6)
        smooth = [square[max(0, i - 1):i + 2, max(0, j - 1):j + 2].mean() for i in range(6) for j in range(6)]
        expected = {"mean": error.mean(), "max": max(smooth), "whitened": max(largest, default=None)}[hvq_score]
        torch.testing.assert_close(s_hvq[b], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(s_mim[b], wrong, atol=1e-4, rtol=1e-4)
        for token in range(36):
            cover = masks[:, token]
            torch.testing.assert_close(mim_map[b, token], (losses[cover] if cover.any() else losses).mean())


@pytest.mark.parametrize("target", ["code", "feature", "pixel"])
def test_other_targets_against_a_plain_loop(target):
    cfg = dataclasses.replace(SMALL, target=target)
    hvq, mim = models(cfg)
    h0, pixels, masks = features(2), torch.randn(2, 36, 48), ladmim.draw_masks(cfg, 5, ladmim.seeded(0), scoring=True)
    _, codes = hvq(h0)
    error, found, _ = ladmim.errors(hvq, mim, cfg, h0, masks, budget=1, pixels=pixels)
    for b in range(2):
        for m in range(5):
            output = mim(h0[b:b + 1], masks[m:m + 1])[0, 0]                       # (N, L * K, d0 or 48)
            expected = []
            for token in masks[m].nonzero()[:, 0]:
                if target == "code":
                    p = output[token].double().view(4, 16).softmax(-1)
                    expected.append(-sum(p[level, codes[b, level, token]].log() for level in range(4)))
                else:
                    truth = (h0 if target == "feature" else pixels)[b, token]
                    expected.append((output[token] - truth).double().pow(2).mean())
            torch.testing.assert_close(found[b, m].double(), torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [6, 12, 24])
def test_patches_lie_where_the_tokens_look(grid):
    image = np.random.default_rng(grid).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    found = ladmim.patches(torch.from_numpy(image)[None], grid)[0].view(grid, grid, 48)
    side = 192 // grid                               # of a token in pixels: 4 for each of its positions
    for row, column in ((0, 0), (1, grid - 1), (grid - 1, 2)):
        part = image[14 + row * side:14 + (row + 1) * side, 14 + column * side:14 + (column + 1) * side].astype(float)
        cells = part.reshape(4, side // 4, 4, side // 4, 3).mean((1, 3)).ravel()
        expected = (cells - cells.mean()) / (cells.std() + 1)
        np.testing.assert_allclose(found[row, column].numpy(), expected, atol=1e-4)


def test_whitening_against_float64():
    x = np.random.default_rng(0).normal(size=(30, 4, 6)) @ np.diag([5, 1, 1, 1, 0.1, 0])
    off = (x - x.mean(0)).reshape(-1, 6)
    cov = off.T @ off / len(off)
    precision = np.linalg.inv(0.9 * cov + (0.1 * np.trace(cov) / 6 + 1e-9) * np.eye(6))
    found = ladmim.whitening(torch.from_numpy(x).float())
    y = np.random.default_rng(1).normal(size=(7, 4, 6))
    expected = np.einsum("bwi,ij,bwj->bw", y - x.mean(0), precision, y - x.mean(0))
    np.testing.assert_allclose(ladmim.distances(torch.from_numpy(y).float(), found), expected, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_whitening_of_hardly_any_photos_is_finite(n):
    x = torch.randn(n, 4, 6)
    found = ladmim.whitening(x)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert torch.isfinite(ladmim.distances(torch.randn(3, 4, 6), found)).all()


def test_normal_statistics():
    values = np.random.default_rng(0).normal(2, 3, (50, 4))
    mean, std = ladmim.normal_statistics(torch.from_numpy(values))
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(std, (values.std(0) + values.std(0).mean()) / 2)


def test_calibration_is_that_of_the_validation_normals_and_survives_one_photo():
    rng = torch.Generator().manual_seed(0)
    s_hvq, s_mim = 3 + 2 * torch.randn(50, generator=rng).double(), torch.randn(50, generator=rng).double() / 10 - 1
    maps = torch.randn(2, 50, 9, generator=rng)
    found = ladmim.calibrate(s_hvq, s_mim, *maps)
    a, b = s_hvq.numpy(), s_mim.numpy()
    total = (a - a.mean()) / a.std() + (b - b.mean()) / b.std()
    np.testing.assert_allclose(ladmim.combine(found, s_hvq, s_mim), total)
    assert found["threshold"] == pytest.approx(np.interp(0.95 * 51, range(1, 51), np.sort(total)))
    lone = ladmim.calibrate(0 * s_hvq[:1], s_mim[:1], *maps[:, :1])               # 0: what a whitened score is then
    assert ladmim.combine(lone, 5.0, s_mim[0]) == 5 and abs(ladmim.combine(lone, 5.0, 5.0)) < 1e4


# Training and the command line

def make_photos(root, category="widgets", train=12, validation=4, good=4, bad=4):
    """A LOCO-shaped category of 64-pixel photos: a bright square on the left of a noisy ground; the anomaly has it on the
    right."""
    rng = np.random.default_rng(0)
    for split, kind, n in (("train", "good", train), ("validation", "good", validation), ("test", "good", good),
                           ("test", "logical_anomalies", bad), ("test", "structural_anomalies", bad)):
        folder = root / category / split / kind
        folder.mkdir(parents=True)
        for i in range(n):
            photo = rng.integers(40, 70, (64, 64, 3), dtype=np.uint8)
            x = 8 if kind != "logical_anomalies" else 40
            photo[24:40, x:x + 16] = (220, 160, 40)
            if kind == "structural_anomalies":
                photo[50:60, 4:20] = (20, 30, 240)
            Image.fromarray(photo).save(folder / f"{i:03}.png")
    return root


QUICK = ("--preset tiny --grid 6 --codes 8 --code-dim 8 --hvq-width 32 --hvq-heads 2 --mim-width 32 --mim-heads 2 --mim-blocks 2 "
         "--masks 4 --hvq-epochs 3 --mim-epochs 3 --device cpu").split()


def command(*args, cwd=None):
    """ladmim.py's main() with these arguments, in this process: a traceback fails the test by itself."""
    out, err, before, argv = io.StringIO(), io.StringIO(), os.getcwd(), sys.argv
    try:
        os.chdir(cwd or before)
        sys.argv = ["ladmim.py", *map(str, args)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = ladmim.main()
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
        sys.argv = argv
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def errors_of(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    make_photos(folder / "photos")
    result = command("train", "--data", "photos", "--category", "widgets", *QUICK, "--out", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_category_without_a_readable_validation_photo_is_named(tmp_path):
    for name in ("widgets", "gadgets"):
        make_photos(tmp_path / "made")
        (tmp_path / "made" / "widgets").rename(tmp_path / name)
    for path in (tmp_path / "gadgets" / "validation" / "good").iterdir():
        path.write_bytes(b"no photo")
    result = command("train", "--data", tmp_path, "--category", "widgets,gadgets", *QUICK, "--out", "run", cwd=tmp_path)
    assert result.returncode == 2 and errors_of(result)[0].startswith("error: gadgets: no training or no validation photo")
    assert len(errors_of(result)) == 1 and not (tmp_path / "run").exists()


def test_a_machine_without_git_trains_too(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert ladmim.git_commit() == ""


def test_train_writes_a_whole_run(trained):
    folder, result = trained
    run = folder / "run"
    settings = json.loads((run / "config.json").read_text())
    assert settings["category"] == "widgets" and settings["data"] == "photos" and settings["rendered"] is False
    assert settings["grid"] == 6 and settings["seed"] == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["hvq"] * 3 + ["mim"] * 3 + ["score"]
    assert all(len(line["codes_used"]) == len(line["perplexity"]) == 4 for line in lines[:3])
    rows = list(csv.DictReader((run / "scores.csv").open()))
    assert len(rows) == 16 and sum(row["split"] == "validation" for row in rows) == 4
    assert {row["path"].split("/")[0] for row in rows} == {"widgets"}
    total = np.array([float(row["score"]) for row in rows if row["split"] == "validation"])
    assert abs(total.mean()) < 1e-6                  # standardised on these and on nothing else
    assert "codes in use" in result.stdout and "logical" in result.stdout


def test_the_command_line_as_a_process(tmp_path):
    result = subprocess.run([sys.executable, ladmim.__file__, "predict", "x.png", "--run", "nowhere"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: --run nowhere") and len(result.stderr.splitlines()) == 1


def test_a_second_train_only_reports(trained):
    folder, first = trained
    before = (folder / "run" / "checkpoint.pt").read_bytes()
    again = command("train", "--data", "photos", "--category", "widgets", *QUICK, "--out", "run", cwd=folder)
    assert again.returncode == 0 and (folder / "run" / "checkpoint.pt").read_bytes() == before
    assert again.stdout.splitlines()[-4:] == first.stdout.splitlines()[-4:]


def test_taking_over_what_a_finished_run_has_learned(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "photos", tmp_path / "photos")
    def take(*more, out):
        return command("train", "--data", "photos", "--category", "widgets", *QUICK, "--take", folder / "run", *more, "--out", out,
                       cwd=tmp_path)

    state = torch.load(folder / "run" / "checkpoint.pt")
    for out, more, kept, changed in (("pixels", ["--target", "pixel", "--mim-score", "mean"], ["hvq"], ["mim"]),
                                     ("mean", ["--hvq-score", "mean", "--masks", "7"], ["hvq", "mim"], [])):
        result = take(*more, out=out)
        assert result.returncode == 0, result.stderr
        found = torch.load(tmp_path / out / "checkpoint.pt")
        assert all(same(found[name], state[name]) for name in kept) and not any(same(found[n], state[n]) for n in changed)
        assert [line["stage"] for line in found["metrics"]] == ["hvq"] * 3 + ["mim"] * 3 + ["score"]
        assert (tmp_path / out / "scores.csv").read_bytes() != (folder / "run" / "scores.csv").read_bytes()
    rows = {row["path"]: float(row["score"]) for row in csv.DictReader((tmp_path / "pixels" / "scores.csv").open())}
    asked = command("predict", "photos/widgets/test", "--run", "pixels", "--json", cwd=tmp_path)
    for line in map(json.loads, asked.stdout.splitlines()):
        assert abs(line["score"] - rows[line["path"].removeprefix("photos/")]) < 2e-3
    refused = take("--commitment", "0.5", out="other")
    assert refused.returncode == 2 and "commitment" in refused.stderr and len(errors_of(refused)) == 1
    assert command("train", "--data", "photos", "--category", "widgets", *QUICK, "--take", "nowhere", "--out", "x",
                   cwd=tmp_path).returncode == 2


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("stage", ["hvq", "mim"])
def test_a_killed_run_ends_bit_identical(trained, tmp_path, stage, monkeypatch):
    """Stops in the middle of a stage, at an epoch whose checkpoint was written, and goes on."""
    folder, _ = trained
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ladmim.py", "train", "--data", "photos", "--category", "widgets", *QUICK,
                                      "--out", str(tmp_path / "run")])
    real = ladmim.Run.save

    def save_then_die(run, **news):
        real(run, **news)
        if news["stage"] == stage and news["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ladmim.fit, "__defaults__", (*ladmim.fit.__defaults__[:-1], 0.0))          # save every epoch
    monkeypatch.setattr(ladmim.Run, "save", save_then_die)
    assert ladmim.main() == 130
    monkeypatch.setattr(ladmim.Run, "save", real)
    assert ladmim.main() == 0
    whole, resumed = (torch.load(path / "run" / "checkpoint.pt", weights_only=True) for path in (folder, tmp_path))
    for part in ("hvq", "mim", "mean", "std", "calibration"):
        assert same(whole[part], resumed[part]), part
    assert (folder / "run" / "scores.csv").read_text() == (tmp_path / "run" / "scores.csv").read_text()


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number read from it, a tensor that crosses, and an index on the other
    side, which is copied over. Numbers read are 0."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        reads = func is torch.ops.aten._local_scalar_dense.default and inputs[0].device.type != "cpu"
        found = 0.0 if reads else func(*args, **kwargs or {})
        tensors = [t for t in inputs if t.dim()] + [t for t in tree_leaves(found) if torch.is_tensor(t)]
        self.count += reads or len({t.device.type for t in tensors}) > 1
        return found


@pytest.mark.parametrize("codebook, target", [("ema", "histogram"), ("gradient", "code"), ("gradient", "pixel")])
def test_no_training_step_waits_for_a_gpu(codebook, target, tmp_path, monkeypatch):
    """Tensors that hold no numbers stand for a GPU's: an epoch of three steps waits as often as one of one."""
    adam, meta = torch.optim.AdamW, torch.device("meta")
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, fused, **others: adam(weights, foreach=True, **others))
    monkeypatch.setattr(ladmim, "in_precision", lambda cfg, device: contextlib.nullcontext())
    monkeypatch.setattr(HVQ, "start_codebooks", lambda *args: None)               # once a run, and it may wait
    monkeypatch.setattr(HVQ, "health", lambda hvq: ([2], [1.0]))
    monkeypatch.setattr(ladmim.Run, "save", lambda run, **news: None)
    cfg, counts = dataclasses.replace(SMALL, levels=2, mim_blocks=2, codebook=codebook, target=target, hvq_batch=4, mim_batch=4,
                                      hvq_epochs=2, mim_epochs=1), []
    for n in (4, 12):
        h0, pixels = (ladmim.standardised(torch.empty(n, 36, size, device=meta), torch.zeros(1), torch.ones(1), meta)
                      for size in (D0, 48))
        run = ladmim.Run(tmp_path / str(n), {"seed": 0})
        with Waits() as waits:
            hvq = ladmim.train_hvq(run, cfg, h0, n, meta)
            hvq_waits = waits.count
            ladmim.train_mim(run, cfg, hvq, h0, n, meta, pixels if target == "pixel" else None)
        counts.append((hvq_waits, waits.count))
    assert counts[0] == counts[1] and min(counts[0]) > 0


def test_other_settings_do_not_overwrite_a_run(trained):
    folder, _ = trained
    result = command("train", "--data", "photos", "--category", "widgets", *QUICK, "--codes", "16", "--out", "run", cwd=folder)
    assert result.returncode == 2 and len(errors_of(result)) == 1 and "codes = 8, asked for 16" in errors_of(result)[0]


def test_several_processes_without_torchrun_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    result = command("train", "--category", "widgets", *QUICK, cwd=tmp_path)
    assert result.returncode == 2 and len(errors_of(result)) == 1 and "torchrun" in errors_of(result)[0]


def test_precision_is_a_setting_of_the_run(tmp_path):
    make_photos(tmp_path / "photos")
    train = ("train", "--data", "photos", "--category", "widgets", *QUICK, "--image-size", "125", "--out", "run")
    assert command(*train, "--precision", "bf16", cwd=tmp_path).returncode == 0
    result = command(*train, cwd=tmp_path)
    assert result.returncode == 2 and "precision = bf16, asked for fp32" in result.stderr
    predicted = command("predict", "photos/widgets/test", "--run", "run", "--json", cwd=tmp_path)
    expected = {row["path"]: float(row["score"]) for row in csv.DictReader((tmp_path / "run" / "scores.csv").open())}
    for line in map(json.loads, predicted.stdout.splitlines()):
        assert line["score"] == pytest.approx(expected[Path(line["path"]).relative_to("photos").as_posix()], rel=0.05, abs=0.05)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    del state["config"]["precision"]                 # as a run from before the option
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    assert command(*train, cwd=tmp_path).returncode == 0


def test_compiled_training_is_training(trained, tmp_path, monkeypatch):
    """Traced and run as graphs, but without the code generator, which takes half a minute and is PyTorch's own."""
    folder, real = trained[0], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: real(function, backend="aot_eager", **options))
    train = ("train", "--data", "photos", "--category", "widgets", *QUICK, *"--hvq-batch 5 --hvq-epochs 2 --mim-epochs 2".split())
    logged = []
    for choice in ("off", "on"):
        result = command(*train, "--compile", choice, "--out", tmp_path / choice, cwd=folder)
        assert result.returncode == 0, result.stderr
        lines = map(json.loads, (tmp_path / choice / "metrics.jsonl").read_text().splitlines())
        logged.append([line for line in lines if line["stage"] != "score"])
    for eager, compiled in zip(*logged):
        assert eager.get("codes_used") == compiled.get("codes_used")
        assert eager["loss"] == pytest.approx(compiled["loss"], rel=1e-4)
    assert len(logged[0]) == len(logged[1]) == 4
    assert "compile = on, asked for off" in command(*train, "--out", tmp_path / "on", cwd=folder).stderr


def test_without_a_compiler_compile_is_refused(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("No working C++ compiler\n\nfound here")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    result = command("train", "--category", "widgets", "--compile", "on", *QUICK, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: --compile on: torch.compile does not work here (No work")
    assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_multi_class_scores_category_by_category(tmp_path):
    for name in ("gadgets", "widgets"):
        make_photos(tmp_path / "photos", name, train=6)
    result = command("train", "--data", "photos", "--category", "all", *QUICK, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "run" / "scores.csv").open()))
    for name in ("gadgets", "widgets"):
        total = [float(row["score"]) for row in rows if row["path"].startswith(name) and row["split"] == "validation"]
        assert len(total) == 4 and abs(np.mean(total)) < 1e-6
    asked = command("predict", "photos/gadgets/test/good", "--run", "run", cwd=tmp_path)
    assert asked.returncode == 2 and "gadgets, widgets" in asked.stderr


def test_categories_and_seeds_in_turn(tmp_path, monkeypatch):
    for name in ("gadgets", "widgets"):
        make_photos(tmp_path / "photos", name, train=6)
    several = ("train", "--data", "photos", "--category", "gadgets,widgets", "--separate", "--seeds", "0,3-4", *QUICK)
    real, folders, cached = ladmim.write_scores, [], []

    def stop_in_the_fourth(run, *rest):
        if len(folders) == 3:
            raise KeyboardInterrupt
        folders.append(run.folder.name)
        real(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ladmim, "write_scores", stop_in_the_fourth)
        assert command(*several, cwd=tmp_path).returncode == 130
    assert folders == ["gadgets-tiny-seed0", "gadgets-tiny-seed3", "gadgets-tiny-seed4"]
    finished = (tmp_path / "runs/photos/gadgets-tiny-seed3/checkpoint.pt").read_bytes()
    find = ladmim.find_features
    monkeypatch.setattr(ladmim, "find_features", lambda photos, *rest: cached.append(photos[0].category) or find(photos, *rest))
    result = command(*several, cwd=tmp_path)
    assert result.returncode == 0 and cached == ["widgets"] * 3                   # finished runs are not even looked at
    assert (tmp_path / "runs/photos/gadgets-tiny-seed3/checkpoint.pt").read_bytes() == finished
    assert result.stdout.count("run: runs/photos/") == 6 and "6 runs are done" in result.stdout
    assert command("train", "--data", "photos", "--category", "widgets", "--seed", "3", *QUICK, "--out", "alone",
                   cwd=tmp_path).returncode == 0
    alone, one_of_six = (torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)
                         for folder in ("alone", "runs/photos/widgets-tiny-seed3"))
    assert alone["config"]["seed"] == 3 and all(same(alone[part], one_of_six[part]) for part in ("hvq", "mim", "calibration"))
    other = torch.load(tmp_path / "runs/photos/widgets-tiny-seed4/checkpoint.pt", weights_only=True)
    assert not same(alone["mim"], other["mim"])


@pytest.mark.parametrize("text, seeds", [("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("7,0-2,1", [7, 0, 1, 2])])
def test_seeds_are_read(text, seeds):
    assert ladmim.seed_list(text) == seeds


def test_training_learns_the_arrangement(tmp_path):
    """The square's place is the rule. Labels shuffled at random score about a half."""
    make_photos(tmp_path / "photos", train=24, good=12, bad=12)
    quick = [*QUICK, *("--hvq-epochs 30 --mim-epochs 60 --hvq-lr 0.002 --mim-lr 0.002 --mim-warmup 2 --masks 16".split())]
    result = command("train", "--data", "photos", "--category", "widgets", *quick, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [row for row in csv.DictReader((tmp_path / "run" / "scores.csv").open()) if row["split"] == "test"]
    label, total = np.array([int(row["label"]) for row in rows]), np.array([float(row["score"]) for row in rows])
    assert roc_auc_score(label, total) > 0.9
    rng = np.random.default_rng(0)
    assert np.mean([roc_auc_score(rng.permutation(label), total) for _ in range(200)]) == pytest.approx(0.5, abs=0.02)


def test_predict_agrees_with_scores_csv(trained):
    folder, _ = trained
    result = command("predict", "photos/widgets/test", "--run", "run", "--json", "--heatmap", "maps", cwd=folder)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    expected = {row["path"]: float(row["score"]) for row in csv.DictReader((folder / "run" / "scores.csv").open())}
    assert len(lines) == 12
    for line in lines:
        score = expected[Path(line["path"]).relative_to("photos").as_posix()]
        assert line["score"] == pytest.approx(score, rel=1e-3, abs=1e-3)
        assert line["verdict"] == ("anomaly" if line["score"] > line["threshold"] else "good")
    maps = list((folder / "maps").glob("*.png"))
    assert len(maps) == 12 and all(Image.open(path).size == (64, 64) for path in maps)


def test_predict_goes_on_past_a_bad_photo(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    good = folder / "photos" / "widgets" / "test" / "good" / "000.png"
    result = command("predict", tmp_path / "bad.png", good, "--run", folder / "run")
    assert result.returncode == 1 and "bad.png" in result.stderr and len(result.stdout.splitlines()) == 1


def test_predict_into_a_pipe_that_closes_ends_quietly(trained):
    """As with `| head`: the first line is read, and nobody reads the others."""
    folder, _ = trained
    photos = ["photos/widgets/test"] * 40            # more than the pipe and the buffers hold
    process = subprocess.Popen([sys.executable, "-u", ladmim.__file__, "predict", *photos, "--run", "run"], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().split()[0] in ("good", "anomaly")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


@pytest.mark.parametrize("train, validation", [(3, 0), (4, 0), (1, 3), (2, 1)])
def test_hardly_any_photos_give_scores_that_are_numbers(tmp_path, train, validation):
    make_photos(tmp_path / "photos", train=train, validation=validation)
    result = command("train", "--data", "photos", "--category", "widgets", *QUICK, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0 and "structural" in result.stdout, result.stderr
    rows = list(csv.DictReader((tmp_path / "run" / "scores.csv").open()))
    assert max(abs(float(row["score"])) for row in rows if row["kind"] == "good") < 1e6
    predicted = command("predict", "photos/widgets/test", "--run", "run", "--json", cwd=tmp_path)
    assert all(math.isfinite(json.loads(line)["score"]) for line in predicted.stdout.splitlines())


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_loss_that_explodes_is_one_line_and_the_remedy_works_in_the_same_folder(tmp_path, codebook):
    make_photos(tmp_path / "photos")
    train = ("train", "--data", "photos", "--category", "widgets", *QUICK, "--codebook", codebook, "--out", "run", "--hvq-lr")
    result = command(*train, "1e30", cwd=tmp_path)
    assert result.returncode == 2 and len(errors_of(result)) == 1 and "try a smaller --hvq-lr" in errors_of(result)[0]
    assert command(*train, "1e-3", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hvq_lr"] == 1e-3


@pytest.mark.parametrize("lost", ["scores.csv", "maps.npz", "config.json", "bytes of maps.npz"])
def test_a_finished_run_is_scored_again_where_a_table_is_lost(trained, tmp_path, lost):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "run" / lost.split()[-1]
    content = file.read_bytes()
    if lost.startswith("bytes"):
        file.write_bytes(content[:60] + bytes(100) + content[160:])
    else:
        file.unlink()
    result = command("train", "--data", "photos", "--category", "widgets", *QUICK, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0 and file.read_bytes() == content, result.stderr


def test_a_finished_run_is_scored_again_where_photos_came(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    good = tmp_path / "photos" / "widgets" / "test" / "good"
    shutil.copy(good / "000.png", good / "later.png")
    assert command("train", "--data", "photos", "--category", "widgets", *QUICK, "--out", "run", cwd=tmp_path).returncode == 0
    assert "good/later.png" in (tmp_path / "run" / "scores.csv").read_text()


def test_a_data_set_of_the_same_name_elsewhere_is_not_taken_for_the_finished_one(tmp_path):
    for place, n in (("a", 12), ("b", 10)):
        make_photos(tmp_path / place / "photos", train=n)
    several = ("train", "--category", "widgets", *QUICK, "--seeds", "0-1")
    assert command(*several, "--data", "a/photos", cwd=tmp_path).returncode == 0
    result = command(*several, "--data", "b/photos", cwd=tmp_path)
    assert result.returncode == 2 and "changed since this run began" in errors_of(result)[0]


def test_a_bad_training_photo_costs_one_line(tmp_path):
    make_photos(tmp_path / "photos")
    (tmp_path / "photos" / "widgets" / "train" / "good" / "bad.png").write_bytes(b"not a picture")
    result = command("train", "--data", "photos", "--category", "widgets", *QUICK, "--out", "run", cwd=tmp_path)
    assert result.returncode == 1
    assert len([line for line in result.stderr.splitlines() if "bad.png" in line]) == 1
    assert (tmp_path / "run" / "scores.csv").exists()


@pytest.mark.parametrize("args, names", [
    (["--category", "widgit"], "widgets"),
    (["--category", "widgets", "--data", "nowhere"], "nowhere"),
    (["--category", "widgets", "--device", "cuda"], "--device"),
    (["--category", "widgets", "--preset", "huge"], "--preset"),
    (["--category", "widgets", "--pdn", "none.pt"], "--pdn"),
    (["--category", "widgets", "--hvq-epochs", "-1"], "--hvq-epochs"),
    (["--category", "widgets", "--grid", "7"], "--grid"),
    (["--category", "widgets", "--masks", "0"], "--masks"),
    (["--category", "widgets", "--hvq-lr", "nan"], "--hvq-lr"),
    (["--category", "widgets", "--hvq-heads", "5"], "--hvq-heads"),
    (["--category", "widgets", "--score-ratio", "1.5"], "--score-ratio"),
    (["--category", "empty"], "empty"),
    (["--category", "widgets", "--seeds", "4-0"], "--seeds"),
    (["--category", "widgets", "--seed", "-1"], "--seed"),
    (["--category", "widgets", "--seed", "1" * 30], "--seed"),
    (["--category", "widgets", "--seeds", "0,x"], "--seeds"),
    (["--category", "widgets", "--seeds", "0-1", "--out", "one"], "--out"),
    ([], "--category"),
])
def test_every_mistake_is_one_line_and_exit_code_2(tmp_path, args, names):
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("this machine has the GPU whose absence is tested")
    make_photos(tmp_path / "photos", train=3)
    (tmp_path / "photos" / "empty" / "train" / "good").mkdir(parents=True)
    if "--data" not in args:
        args = [*args, "--data", "photos"]
    result = command("train", *args, cwd=tmp_path)
    assert result.returncode == 2 and names in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_test_split_without_anomalies_is_refused_and_none_at_all_is_not(tmp_path):
    make_photos(tmp_path / "photos", bad=0)
    train = ("train", "--data", "photos", "--category", "widgets", *QUICK, "--out", "run")
    result = command(*train, cwd=tmp_path)
    assert result.returncode == 2 and "no anomalies" in result.stderr and len(result.stderr.splitlines()) == 1
    shutil.rmtree(tmp_path / "photos" / "widgets" / "test")
    result = command(*train, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list(csv.DictReader((tmp_path / "run" / "scores.csv").open()))) == 4


@pytest.mark.parametrize("damage, reason", [("truncated", "truncated"), ("foreign", "not a checkpoint"), ("newer", "format 99")])
def test_damaged_checkpoints_are_refused(trained, tmp_path, damage, reason):
    folder, _ = trained
    state = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    content = (folder / "run" / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes(content[:len(content) // 2])
    else:
        torch.save([1, 2] if damage == "foreign" else state | {"format": 99}, path)
    result = command("predict", folder / "photos" / "widgets" / "test" / "good", "--run", tmp_path)
    assert result.returncode == 2 and reason in result.stderr and len(result.stderr.splitlines()) == 1
