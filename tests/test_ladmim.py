"""The model, its masks, training, scoring and command line."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

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


@pytest.mark.parametrize("state, message", [({}, "no PDN"), ({"0.weight": torch.zeros(3, 3)}, "no PDN"), ({"conv1.weight": torch.zeros(128, 3, 4, 4)}, "no PDN")])
def test_foreign_weights_are_refused(state, message):
    with pytest.raises(InputError, match=message):
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


# Masks

@settings(max_examples=60, deadline=None)
@given(grid=st.integers(1, 24), share=st.floats(0.01, 1), least=st.floats(0.0, 1), seed=st.integers(0, 999))
def test_block_masks_hide_exactly_the_count(grid, share, least, seed):
    count = max(1, round(share * grid * grid))
    masks = ladmim.block_masks(7, grid, count, max(1, round(least * count)), ladmim.seeded(seed))
    assert masks.shape == (7, grid * grid) and (masks.sum(1) == count).all()


def test_block_masks_are_blocks_and_cover_the_grid():
    masks = ladmim.block_masks(2000, 24, 230, 92, ladmim.seeded(0)).view(-1, 24, 24).float()
    inner = (masks[:, :, 1:] == masks[:, :, :-1]).float().mean() + (masks[:, 1:] == masks[:, :-1]).float().mean()
    scattered = ladmim.random_masks(2000, 24, 230, ladmim.seeded(0)).view(-1, 24, 24).float()
    broken = (scattered[:, :, 1:] == scattered[:, :, :-1]).float().mean() + (scattered[:, 1:] == scattered[:, :-1]).float().mean()
    assert inner / 2 > 0.9 and 0.5 < broken / 2 < 0.56                            # 1 - 2 * 0.4 * 0.6 = 0.52
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

def test_scores_do_not_depend_on_the_batch_or_the_memory_budget():
    hvq, mim = models()
    h0, masks = features(7), ladmim.draw_masks(SMALL, 5, ladmim.seeded(0), scoring=True)
    whole = ladmim.score(hvq, mim, SMALL, h0, masks)
    single = [torch.cat(parts) for parts in zip(*(ladmim.score(hvq, mim, SMALL, h0[i:i + 1], masks) for i in range(7)))]
    tight = ladmim.score(hvq, mim, SMALL, h0, masks, budget=1)
    for a, b, c in zip(whole, single, tight):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_score_against_a_plain_loop(kind):
    cfg = dataclasses.replace(SMALL, hvq_score=kind)
    hvq, mim = models(cfg)
    h0, masks = features(2), ladmim.draw_masks(cfg, 5, ladmim.seeded(0), scoring=True)
    s_hvq, s_mim, hvq_map, mim_map = ladmim.score(hvq, mim, cfg, h0, masks)
    for b in range(2):
        rebuilt, codes = hvq(h0[b:b + 1])
        error = ((h0[b] - rebuilt[0]) ** 2).mean(-1).view(6, 6)
        torch.testing.assert_close(hvq_map[b], error.flatten())
        smooth = torch.stack([error[max(0, i - 1):i + 2, max(0, j - 1):j + 2].mean() for i in range(6) for j in range(6)])
        torch.testing.assert_close(s_hvq[b], error.mean() if kind == "mean" else smooth.max())
        losses = torch.zeros(5)
        for m in range(5):
            p = mim(h0[b:b + 1], masks[m:m + 1]).softmax(-1)[0, 0]
            for level in range(4):
                q = torch.bincount(codes[0, level][masks[m]], minlength=16) / masks[m].sum()
                losses[m] += (p[level] - q).abs().sum()
        torch.testing.assert_close(s_mim[b], losses.mean())
        for token in range(36):
            cover = masks[:, token]
            torch.testing.assert_close(mim_map[b, token], losses[cover].mean() if cover.any() else torch.zeros(()))


def test_calibration_uses_validation_normals_only_and_survives_one_photo():
    rng = np.random.default_rng(0)
    s_hvq, s_mim = rng.normal(3, 2, 50), rng.normal(-1, 0.1, 50)
    found = ladmim.calibrate(s_hvq, s_mim, rng.normal(size=(50, 9)), rng.normal(size=(50, 9)))
    total = (s_hvq - s_hvq.mean()) / s_hvq.std() + (s_mim - s_mim.mean()) / s_mim.std()
    np.testing.assert_allclose(found.combine(s_hvq, s_mim), total)
    assert (total > found.threshold).mean() == pytest.approx(0.06)               # 3 of 50 lie above the 95th percentile
    lone = ladmim.calibrate(s_hvq[:1], s_mim[:1], np.ones((1, 9)), np.ones((1, 9)))
    assert np.isfinite(lone.combine(5.0, 5.0))
