"""The paper's model: HVQ-Trans, masks, ViT, and both trainings."""
import contextlib
import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import (TRAIN, checkpoint, command, errors_of, make_photos, new_run, one_error,
                      score_rows, trains)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ladmim
import options
import runs
from backbone import CHANNELS, Features
from data import InputError
from kernels import histogram_l1, nearest_own_code
from ladmim import HVQ, PRESETS, Config, ViT
from runs import seeded

SMALL = Config(grid=6, codes=16, code_dim=8, hvq_width=32, hvq_heads=2, hvq_dropout=0.0,
               mim_width=32, mim_heads=2, mim_blocks=3, mim_dropout=0.0, masks=5)
EMA, D0 = dataclasses.replace(SMALL, codebook="ema"), 24


def features(n, seed=0, cfg=SMALL):
    return torch.randn(n, cfg.grid ** 2, D0, generator=torch.Generator().manual_seed(seed))


def models(cfg=SMALL, seed=0):
    torch.manual_seed(seed)
    hvq, mim = HVQ(cfg, D0), ViT(cfg, D0)
    nn.init.normal_(mim.e)                           # both start at zero, which would hide them
    nn.init.normal_(mim.p)
    return hvq.eval(), mim.eval()


# HVQ-Trans

def test_paper_preset_shapes():
    cfg = Config(**PRESETS["paper"])
    torch.manual_seed(0)
    hvq, mim = HVQ(cfg, 384).eval(), ViT(cfg, 384).eval()
    h0 = torch.randn(1, 576, 384)
    with torch.no_grad():
        h = hvq.encode(h0)
        psi, z, codes = hvq.quantise(h)
        logits = mim(h0, ladmim.draw_masks(cfg, 3, seeded(0), scoring=True))
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
    seen = torch.cat([h[0], hvq.codebooks[3][codes[:, 3]]], -1)
    torch.testing.assert_close(psi[0], hvq.psi[0](seen))


def test_gradients_pass_straight_through_the_codes():
    hvq, _ = models()
    h = [x.detach().requires_grad_() for x in hvq.encode(features(2))]
    psi, z, _ = hvq.quantise(h)
    weights = torch.randn_like(z[1])
    (z[1] * weights).sum().backward()
    torch.testing.assert_close(h[1].grad, (weights @ hvq.psi[1].weight)[..., :32])
    assert hvq.codebooks.grad is None    # the feature error moves the encoder, equation 7 the codes


def test_loss_is_equation_7():
    hvq, _ = models()
    h0 = features(2)
    psi, z, codes = hvq.quantise(hvq.encode(h0))
    expected = (hvq.decode(z) - h0).square().mean()
    for level in range(4):
        off = psi[level] - hvq.codebooks[level][codes[:, level]]
        expected = expected + 1.25 * off.square().mean()
    torch.testing.assert_close(hvq.loss(h0), expected)


@pytest.mark.parametrize("level", range(3))
def test_the_decoder_knows_where_a_code_lies(level):
    """Cross-attention sees a set of codes: without their positions, exchanging two of them would
    change nothing. The top level's reach their tokens through the first query anyway."""
    hvq, _ = models()
    z = [torch.randn(1, 36, 8, generator=seeded(n)) for n in range(4)]
    swapped = [x.clone() for x in z]
    swapped[level][:, [3, 20]] = z[level][:, [20, 3]]
    assert (hvq.decode(z) - hvq.decode(swapped)).abs().max() > 1e-4


def test_ema_codebook_is_the_running_mean():
    cfg = dataclasses.replace(SMALL, codebook="ema")
    hvq, _ = models(cfg)
    assert not hvq.codebooks.requires_grad
    h0 = features(4)
    hvq.start_codebooks(h0, seeded(0))
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
    hvq.start_codebooks(h0, seeded(0))
    hvq.loss(h0)
    used, perplexity = ladmim.usage(hvq.used)
    assert min(used) >= 12 and all(1 <= p <= 16 for p in perplexity)
    with torch.no_grad():
        hvq.codebooks[1, 3:] = 1e3                   # out of reach
    hvq.used.zero_()
    hvq.loss(h0)
    assert ladmim.usage(hvq.used)[0][1] <= 3
    hvq.revive(h0, seeded(1))
    hvq.used.zero_()
    hvq.loss(h0)
    assert ladmim.usage(hvq.used)[0][1] >= 12


def test_perplexity_against_its_definition():
    hvq, _ = models()
    hvq.used[0] = torch.tensor([3.0, 1.0] + [0.0] * 14)
    used, perplexity = ladmim.usage(hvq.used)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert used[0] == 2 and perplexity[0] == round(expected, 1)


def test_bf16_searches_codes_in_fp32_and_stays_near(monkeypatch):
    hvq, mim = models()
    h0, searched, real = features(4), [], ladmim.nearest_own_code

    def watched(x, books, own):
        searched.append((x, *books))
        return real(x, books, own)

    monkeypatch.setattr(ladmim, "nearest_own_code", watched)
    with ladmim.in_precision("bf16", h0.device):
        psi, _, codes = hvq.quantise(hvq.encode(h0))
        logits = mim(h0, ladmim.draw_masks(SMALL, 5, seeded(0), scoring=True))
        rough = hvq.loss(h0)
    assert psi[0].dtype == torch.bfloat16 and logits.dtype == torch.float32         # it is at work
    assert all(x.dtype == b.dtype == torch.float32 for x, b in searched) and len(searched) == 8
    for level in range(4):
        distance = torch.cdist(psi[level].double(), hvq.codebooks[level].double())
        assert torch.equal(distance.argmin(-1), codes[:, level])
    exact = hvq.loss(h0)
    assert 0 < abs(float(rough.detach() - exact.detach())) < 0.02 * float(exact.detach())


@pytest.mark.parametrize("asking, answering", [(1, 1), (1, 37), (37, 37)])
@pytest.mark.parametrize("precision, grad", [("bf16", True), ("bf16", False), ("fp32", True)])
def test_attention_is_the_softmax_of_products(asking, answering, precision, grad):
    torch.manual_seed(0)
    attention, x, context = ladmim.Attention(24, 3), *torch.randn(2, 2, 37, 24)
    x, context = x[:, :asking].requires_grad_(grad), context[:, :answering]
    exact, y = copy.deepcopy(attention).double(), x.detach().double().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        with ladmim.in_precision(precision, x.device):
            found = attention(x, context)
        q, kv = exact.q(y), exact.kv(context.double())
        heads = []
        for one in range(3):
            part, other = slice(8 * one, 8 * one + 8), slice(24 + 8 * one, 32 + 8 * one)
            weight = (q[..., part] @ kv[..., part].transpose(1, 2) / 8 ** 0.5).softmax(-1)
            heads.append(weight @ kv[..., other])
        expected = exact.out(torch.cat(heads, -1))
    near = dict(atol=0.02, rtol=0.02) if precision == "bf16" else dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.double(), expected, **near)
    if grad:
        found.double().square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad.double(), y.grad, **near)
        for low, high in zip(attention.parameters(), exact.parameters()):
            scale = max(0.1, high.grad.abs().max().item())
            torch.testing.assert_close(low.grad.double(), high.grad, rtol=near["rtol"],
                                       atol=near["atol"] * scale)


@pytest.mark.parametrize("categories", [1, 2, 5])
def test_each_photo_is_searched_in_its_own_codebook(categories):
    torch.manual_seed(0)
    x, books = torch.randn(6, 10, 8), torch.randn(categories, 7, 8)
    x[3, 4], x[0, 0, 0] = math.nan, math.inf
    own = torch.tensor([4, 0, 1, 1, 3, 0]) % categories
    index = nearest_own_code(x, books, own if categories > 1 else None)
    for photo, number, found in zip(x.double(), own.tolist(), index):
        nearest = (photo[:, None] - books[number]).square().sum(-1).argmin(-1)
        expected = torch.where(photo.isfinite().all(-1), nearest + 7 * number, -1)
        assert torch.equal(found, expected)
    books[-1] = math.nan                             # no photo gets another category's codes
    lost = nearest_own_code(x, books, own if categories > 1 else None)
    expected = torch.where(own[:, None] == categories - 1, -1, index)
    assert torch.equal(lost, expected)


def one_categorys(hvq, number):
    """An HVQ of one category with what hvq, of several, has for category `number`."""
    single, state = HVQ(EMA, D0), hvq.state_dict()
    for name in ("codebooks", "used", "ema_count", "ema_sum"):
        state[name] = state[name][:, hvq.span(number)]
    for name in ("out.1.weight", "out.1.bias"):
        state[name] = state[name].view(hvq.categories, D0, -1)[number].view(
            single.state_dict()[name].shape)
    single.load_state_dict(state)
    return single


def test_categories_with_codes_of_their_own_are_models_of_one_category():
    """Codes, rebuilt features, loss, running means, the k-means start and revival."""
    torch.manual_seed(0)
    hvq, h0, own = HVQ(EMA, D0, 3), features(6), torch.tensor([2, 0, 1, 0, 2, 2])
    for number in range(3):
        single = one_categorys(hvq, number)
        for model, category in ((single, 0), (hvq, number)):
            model.start_codebooks(h0[own == number], seeded(1, "start"), category)
        torch.testing.assert_close(hvq.codebooks[:, hvq.span(number)], single.codebooks)
    rebuilt, codes = hvq(h0, own)
    singles = [one_categorys(hvq, number) for number in range(3)]
    assert rebuilt.shape == h0.shape and codes.max() < EMA.codes
    for number, single in enumerate(singles):
        expected = single(h0[own == number])
        torch.testing.assert_close((rebuilt[own == number], codes[own == number]), expected)
    for number in (1, 2):                            # in the batch, and not
        single = one_categorys(hvq, number)
        mine, others = h0[own == number], torch.full((int((own == number).sum()),), number)
        before = hvq.codebooks.clone()
        torch.testing.assert_close(hvq.loss(mine, others), single.loss(mine))
        torch.testing.assert_close(hvq.codebooks[:, hvq.span(number)], single.codebooks)
        torch.testing.assert_close(hvq.used[:, hvq.span(number)], single.used)
        torch.testing.assert_close(hvq.codebooks[:, hvq.span(0)], before[:, hvq.span(0)])
        for model, category in ((single, 0), (hvq, number)):
            model.revive(mine, seeded(2, "revive"), category)
        torch.testing.assert_close(hvq.codebooks[:, hvq.span(number)], single.codebooks)
        torch.testing.assert_close(hvq.codebooks[:, hvq.span(0)], before[:, hvq.span(0)])


def test_nan_has_no_code_in_any_category():
    hvq, h0 = HVQ(SMALL, D0, 2), features(2)
    h0[1, 3] = math.nan
    codes = hvq(h0, torch.tensor([0, 1]))[1]
    assert (codes[0] >= 0).all() and (codes[1] == -1).all()


# Masks

@settings(max_examples=60, deadline=None)
@given(grid=st.integers(1, 24), share=st.floats(0.01, 1), least=st.floats(0.0, 1),
       seed=st.integers(0, 999))
def test_block_masks_hide_exactly_the_count(grid, share, least, seed):
    count = max(1, round(share * grid * grid))
    masks = ladmim.block_masks(7, grid, count, max(1, round(least * count)), seeded(seed))
    assert masks.shape == (7, grid * grid) and (masks.sum(1) == count).all()


def test_block_masks_are_blocks_and_cover_the_grid():
    masks = ladmim.block_masks(2000, 24, 230, 92, seeded(0)).view(-1, 24, 24).float()
    scattered = ladmim.random_masks(2000, 24, 230, 92, seeded(0)).view(-1, 24, 24).float()

    def agreement(masks):                            # of a token with its right-hand neighbour
        return (masks[:, :, 1:] == masks[:, :, :-1]).float().mean()

    assert agreement(masks) > 0.9 and 0.5 < agreement(scattered) < 0.56     # 1 - 2 * 0.4 * 0.6
    assert masks.mean(0).min() > 0.005               # corners are rare, but none is left out


def test_random_masks_hide_every_token_equally_often():
    masks = ladmim.random_masks(500, 24, 230, 92, seeded(0))
    assert (masks.sum(1) == 230).all() and abs(masks.float().mean(0) - 230 / 576).max() < 0.12


def test_checkerboards_are_the_six_and_each_is_drawn_once_in_six():
    boards = ladmim.checkerboard_masks(12, 24, 230, 92, seeded(0))
    assert boards.shape == (12, 576)
    i, j = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    expected = set()
    for side in (3, 6, 12):                          # tokens of a square, as in the published code
        board = ((i // side + j // side) % 2 == 1).flatten()
        expected |= {tuple(board.tolist()), tuple((~board).tolist())}
    drawn = [tuple(board.tolist()) for board in boards]
    assert set(drawn) == expected and all(drawn.count(board) == 2 for board in expected)
    small = ladmim.checkerboard_masks(6, 12, 0, 0, seeded(0)).view(6, 12, 12)
    halves = {tuple(board[0].tolist()) for board in small}       # first rows: squares of 6, of 3
    assert {(True,) * 6 + (False,) * 6, ((True,) * 3 + (False,) * 3) * 2} <= halves


@pytest.mark.parametrize("mask", ladmim.MASKS)
def test_scoring_masks_are_blocks_whatever_the_training_masks_are(mask):
    """As in the published code: 230 of 576 tokens."""
    cfg = Config(**PRESETS["paper"] | {"mask": mask})
    scoring = ladmim.scoring_masks(cfg, 0, torch.device("cpu"))
    assert torch.equal(scoring, ladmim.block_masks(64, 24, 230, 92, seeded(0, "scoring masks")))


def test_paper_masks_have_the_papers_counts():
    cfg = Config(**PRESETS["paper"])
    assert (ladmim.draw_masks(cfg, 9, seeded(1), scoring=False).sum(1) == 130).all()
    assert (ladmim.draw_masks(cfg, 9, seeded(1), scoring=True).sum(1) == 230).all()
    scoring = ladmim.scoring_masks(cfg, 3, torch.device("cpu"))
    assert scoring.shape == (64, 576) and (scoring.sum(1) == 230).all()


# ViT

@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_last_block_shortcut_equals_the_full_computation(blocks):
    cfg = dataclasses.replace(SMALL, mim_blocks=blocks)
    _, mim = models(cfg)
    h0, mask = features(3), ladmim.draw_masks(cfg, 3, seeded(0), scoring=False)[:, None]

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
    h0, mask = features(2), ladmim.draw_masks(SMALL, 4, seeded(0), scoring=True)
    for one in mask.split(1):
        hidden = torch.where(one[0][None, :, None], features(2, seed=9), h0)
        torch.testing.assert_close(mim(h0, one), mim(hidden, one))
        visible = torch.where(one[0][None, :, None], h0, features(2, seed=9))
        assert not torch.allclose(mim(h0, one), mim(visible, one), atol=1e-3)


def test_order_of_codes_inside_a_mask_changes_no_loss():
    _, mim = models()
    h0, mask = features(2), ladmim.draw_masks(SMALL, 5, seeded(0), scoring=True)
    codes = torch.randint(0, 16, (2, 4, 36), dtype=torch.int16, generator=seeded(1))
    logits = mim(h0, mask)
    for m in range(5):
        where = mask[m].nonzero()[:, 0]
        moved, order = codes.clone(), torch.randperm(len(where), generator=seeded(m))
        moved[:, :, where] = codes[:, :, where[order]]
        assert not torch.equal(moved, codes)
        a, b = (histogram_l1(logits[:, m:m + 1], c, mask[m:m + 1]) for c in (codes, moved))
        torch.testing.assert_close(a, b)


# Training

class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number read from it, a tensor that crosses,
    and an index on the other side, which is copied over. Numbers read are 0."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        number = func is torch.ops.aten._local_scalar_dense.default
        reads = number and inputs[0].device.type != "cpu"
        output = 0.0 if reads else func(*args, **kwargs or {})
        tensors = [t for t in inputs if t.dim()]
        tensors += [t for t in tree_leaves(output) if torch.is_tensor(t)]
        self.count += reads or len({t.device.type for t in tensors}) > 1
        return output


@pytest.mark.parametrize("tokenizer, codebook, target", [
    ("paper", "ema", "histogram"), ("paper", "gradient", "code"), ("paper", "gradient", "pixel"),
    ("published", "ema", "histogram")])
def test_no_training_step_waits_for_a_gpu(tokenizer, codebook, target, tmp_path, monkeypatch):
    """Tensors that hold no numbers stand for a GPU's: an epoch of three steps waits as often as one
    of one."""
    adam, meta, counts = torch.optim.AdamW, torch.device("meta"), []
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda weights, fused, **others: adam(weights, foreach=True, **others))
    monkeypatch.setattr(ladmim, "in_precision", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(HVQ, "start_codebooks", lambda *args: None)      # once a run: it may wait
    monkeypatch.setattr(ladmim, "usage", lambda used: ([2], [1.0]))
    monkeypatch.setattr(runs.Run, "save_stage", lambda *args: None)      # once a minute
    cfg = dataclasses.replace(SMALL, levels=2, mim_blocks=2, tokenizer=tokenizer,
                              codebook=codebook, target=target, hvq_batch=4, mim_batch=4,
                              hvq_epochs=2, mim_epochs=1)
    for n in (4, 12):
        seen = torch.empty(n, 36, CHANNELS + 48 * (target == "pixel"), device=meta)
        photos = Features(seen, torch.zeros(CHANNELS), torch.ones(CHANNELS), meta)
        run = new_run(tmp_path / str(n))
        with Waits() as waits:
            hvq = ladmim.train_hvq(run, cfg, photos, n)
            hvq_waits = waits.count
            ladmim.train_mim(run, cfg, hvq, photos, n)
        counts.append((hvq_waits, waits.count))
    assert counts[0] == counts[1] and min(counts[0]) > 0


def test_a_tokenizer_that_gives_nan_trains_no_vit(tmp_path):
    def broken(h0, own):
        return h0, torch.full((len(h0), SMALL.levels, 36), -1)

    photos = Features(torch.randn(4, 36, CHANNELS), torch.zeros(CHANNELS), torch.ones(CHANNELS),
                      torch.device("cpu"))
    with pytest.raises(InputError, match="HVQ-Trans gives NaN.*smaller --hvq-lr"):
        ladmim.train_mim(new_run(tmp_path), SMALL, broken, photos, 4)


def test_a_last_rate_that_a_warm_up_never_reaches_is_refused():
    typed = {"mim_epochs": 40, "mim_last_lr": 1e-5}
    with pytest.raises(InputError, match="last-lr 1e-05: .*--mim-warmup 40 and --mim-epochs 40;"):
        options.check_typed(typed, Config(**typed))
    typed["mim_epochs"] = 41
    options.check_typed(typed, Config(**typed))


def test_the_learning_rate_rises_then_follows_a_cosine():
    cfg = Config(mim_epochs=500, mim_warmup=40)
    rates = [ladmim.mim_rate(cfg, epoch) for epoch in range(501)]
    assert rates[0] == cfg.mim_lr / 41 and rates[40] == cfg.mim_lr == max(rates)
    assert np.allclose(np.diff(rates[:41]), cfg.mim_lr / 41)
    assert rates[270] == pytest.approx((cfg.mim_lr + cfg.mim_last_lr) / 2)
    assert rates[500] == pytest.approx(cfg.mim_last_lr) and np.all(np.diff(rates[40:]) < 0)


def test_training_learns_the_arrangement(tmp_path):
    """The square's place is the rule. Labels shuffled at random score about a half."""
    make_photos(tmp_path / "photos", train=24, good=12, bad=12)
    trains(*("--hvq-epochs 12 --mim-epochs 24 --hvq-lr 0.002 --mim-lr 0.002 --mim-warmup 2 "
             "--masks 16").split(), "--out", "run", cwd=tmp_path)
    for stage in ("hvq", "mim"):
        losses = [line["loss"] for line in checkpoint(tmp_path / "run")["metrics"]
                  if line["stage"] == stage]
        assert losses[-1] < 0.7 * losses[0]
    rows = [row for row in score_rows(tmp_path / "run") if row["split"] == "test"]
    label = np.array([int(row["label"]) for row in rows])
    total = np.array([float(row["score"]) for row in rows])
    assert roc_auc_score(label, total) > 0.9
    rng = np.random.default_rng(0)
    by_chance = [roc_auc_score(rng.permutation(label), total) for _ in range(200)]
    assert np.mean(by_chance) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_loss_that_explodes_is_one_line_and_the_remedy_works_there(photos, codebook):
    wrong = command(*TRAIN, "--codebook", codebook, "--out", "run", "--hvq-lr", "1e6", cwd=photos)
    assert "try a smaller --hvq-lr" in one_error(wrong)
    trains("--codebook", codebook, "--out", "run", "--hvq-lr", "1e-3", cwd=photos)
    assert checkpoint(photos / "run")["config"]["hvq_lr"] == 1e-3


def test_an_exploding_loss_keeps_the_last_good_checkpoint(photos, monkeypatch):
    real, calls = HVQ.loss, []

    def explode(self, h0, own):
        calls.append(1)
        return real(self, h0, own) * (math.inf if len(calls) > 5 else 1)  # three batches an epoch

    with monkeypatch.context() as patch:
        patch.setattr(HVQ, "loss", explode)
        patch.setattr(runs, "SAVE_EVERY", 0)         # a checkpoint every epoch
        result = command(*TRAIN, "--out", "run", cwd=photos)
    assert "epoch 2" in one_error(result)
    state = checkpoint(photos / "run")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["hvq"].values())
    trains("--out", "run", cwd=photos)                               # and it can be gone on with


def test_a_dead_codebook_is_caught_in_its_epoch(photos, monkeypatch):
    real, calls = ladmim.usage, []

    def die(used):
        calls.append(1)
        if len(calls) == 2:
            used[2, 1:] = 0
            used[2, 0] = 7
        return real(used)

    monkeypatch.setattr(ladmim, "usage", die)
    result = command(*TRAIN, "--out", "run", cwd=photos)
    assert "level 3 uses one code in epoch 2" in one_error(result)
    assert len(errors_of(result)) == 1


def test_a_process_without_photos_of_a_batch_takes_part_in_the_step(monkeypatch):
    """It has no loss of its own, and adds zeros."""
    hvq, _ = models()
    optimizer, summed = ladmim.adamw(hvq, 1e-3, 0.0), []
    monkeypatch.setattr(runs, "sum_gradients", summed.append)
    loss = SimpleNamespace()                         # nothing of it is looked at
    assert ladmim.descend(optimizer, loss, torch.arange(0), torch.arange(4), 1.0) == 0
    assert len(summed) == 1


def test_a_late_drop_revives_no_code_after_the_last_epoch(tmp_path):
    """Of a rate that never drops it does not matter how far beyond the end the drop is."""
    make_photos(tmp_path / "photos")
    ends = []
    for at in ("1", "2"):
        options = ["--codebook", "gradient", "--hvq-drop-at", at, "--mim-epochs", "0", "--out", at]
        assert command(*TRAIN, *options, cwd=tmp_path).returncode == 0
        ends.append(checkpoint(tmp_path / at)["hvq"])
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
