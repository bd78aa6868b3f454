"""bench/efficientad.py: its parts against scikit-learn, numpy and plain loops."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from bench import efficientad
from backbone import positions
from runs import in_precision, seeded


@pytest.mark.parametrize("n, d", [(2, 5), (8, 30), (200, 3), (9, 1)])
def test_puads_distance_is_mahalanobis_with_ledoit_and_wolfs_covariance(n, d):
    normal = torch.randn(n, d, generator=seeded(0)) * torch.arange(1, d + 1)
    x = torch.randn(4, d, generator=seeded(1)) + 2
    fitted = LedoitWolf().fit(normal.double().numpy())
    share = efficientad.shrinkage(normal)
    if d > 1:                                        # else it shrinks to itself
        assert share == pytest.approx(fitted.shrinkage_)
    if not share:                                    # two photos: it has no inverse
        return
    inverse = np.linalg.pinv(fitted.covariance_, hermitian=True)
    expected = [off @ inverse @ off for off in x.double().numpy() - normal.double().numpy().mean(0)]
    found = efficientad.distances(x[:, None], efficientad.whitening(normal[:, None], share))[:, 0]
    assert np.allclose(found, expected, rtol=1e-4)


def test_bfloat16_learns_nearly_the_same():
    torch.manual_seed(0)
    model, x = efficientad.EfficientAD(64), torch.randn(1, 3, 64, 64, generator=seeded(0))
    side = positions(64)
    teacher, losses = torch.randn(1, 384, side, side, generator=seeded(1)), []
    for precision in ("fp32", "bf16"):
        with in_precision(precision, x.device):
            losses.append(model.loss(x, teacher, seeded(2)))
            look = model.look(x, teacher)
        assert [part.shape for part in look] == [(1, side, side), (1, side, side), (1, 384), (1,)]
    losses[1].backward()
    assert all(w.grad.isfinite().all() for w in model.parameters())
    full, rough = (float(loss.detach()) for loss in losses)
    assert rough != full and rough == pytest.approx(full, rel=0.02)


def test_photos_that_are_all_alike_have_finite_distances():
    normal = torch.zeros(4, 1, 3)
    normal = efficientad.whitening(normal, efficientad.shrinkage(normal[:, 0]))
    assert efficientad.distances(torch.zeros(2, 1, 3), normal).count_nonzero() == 0
    assert efficientad.distances(torch.ones(2, 1, 3), normal).isfinite().all()


def test_maps_are_normalised_by_the_quantiles_of_the_validation_maps():
    validation, local, wide = (torch.rand(n, 5, 5, generator=seeded(n)) for n in (3, 4, 6))
    wide = wide[:4] * 7
    of_local, of_wide = efficientad.quantiles(validation), efficientad.quantiles(validation * 9)
    scores = efficientad.photo_scores(local, wide, of_local, of_wide)
    for i in range(4):
        both = 0
        for m, normal in ((local[i], validation), (wide[i], validation * 9)):
            low, high = np.quantile(normal.double().numpy(), [0.9, 0.995])
            both = both + 0.1 * (m.numpy() - low) / (high - low)
        assert float(scores[i]) == pytest.approx((both / 2).max(), rel=1e-5)


def test_only_the_worst_thousandth_is_learned_from():
    x = torch.randn(2, 50, 40, generator=seeded(2))
    worst = sorted((x ** 2).flatten().tolist())[-4:]
    assert float(efficientad.hardest(x)) == pytest.approx(sum(worst) / 4)
    few = x[0, 0, :3]
    assert float(efficientad.hardest(few)) == pytest.approx(float(few.square().max()))


def test_a_tile_is_exact():
    """What the student says of a tile at a multiple of 4 pixels it says there of the photo, so the
    loss compares the right places: it is 0 for a teacher that says the same."""
    torch.manual_seed(0)
    model = efficientad.EfficientAD(140).eval()
    x = torch.randn(1, 3, 140, 140, generator=seeded(3))
    side = positions(140)
    with torch.no_grad():
        local, wide = model.student(x).chunk(2, 1)
        assert local.shape[-1] == side
        seen = {}
        for part in range(12):                       # of all four tiles
            rest = (model.loss(x, local, seeded(part))
                    - torch.nn.functional.mse_loss(model.autoencoder(x), local))
            top, left = corner(seeded(part), side)
            here = (..., slice(top, top + 16), slice(left, left + 16))
            expected = (model.autoencoder(x)[here] - wide[here]).square().mean()
            assert float(rest) == pytest.approx(float(expected), abs=1e-6)
            seen[top, left] = True
    assert len(seen) == 4


def corner(rng, side: int):
    """Of one of the tiles: as many a side as cover the photo, the first and the last at its rim."""
    starts = [round(start) for start in np.linspace(0, side - 16, math.ceil(side / 16)) - 1e-9]
    return [starts[int(torch.randint(len(starts), (), generator=rng))] for _ in range(2)]


def test_every_place_of_the_photo_is_learned_as_often():
    """The score is the largest value of the whole map: a rim that is hardly trained hides all."""
    counts, where = torch.zeros(48 * 48), torch.arange(48 * 48.).reshape(48, 48)
    x = where.repeat_interleave(4, 0).repeat_interleave(4, 1)        # a photo that says where it is
    x = torch.nn.functional.pad(x, (0, 32, 0, 32)).expand(1, 3, 224, 224)

    def student(crop):
        counts[crop[0, 0, :64:4, :64:4].flatten().long()] += 1
        return torch.zeros(1, 768, 16, 16)

    model = SimpleNamespace(student=student, autoencoder=lambda x: torch.zeros(1, 384, 48, 48))
    for step in range(450):
        efficientad.EfficientAD.loss(model, x, torch.zeros(1, 384, 48, 48), seeded(step))
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


def test_it_learns_what_the_teacher_says():
    torch.manual_seed(0)
    model, x = efficientad.EfficientAD(64), torch.randn(2, 3, 64, 64, generator=seeded(4))
    teacher = torch.randn(2, 384, 8, 8, generator=seeded(5))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for step in range(12):
        loss = model.loss(x, teacher, seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    local, wide, vector, rebuilt = model.eval().look(x, teacher)
    assert local.shape == wide.shape == (2, 8, 8) and vector.shape == (2, 384)
    for b in range(2):
        expected = (model.autoencoder(x)[b] - teacher[b]).square().mean()
        assert float(rebuilt[b].detach()) == pytest.approx(float(expected.detach()))


def scores_of(folder, monkeypatch, others: dict) -> dict:
    """`efficientad.run` on 5 training, 4 validation and 3 test photos of noise, some of them others
    than usual: number -> seed."""
    photos = 12
    pixels, seen = (torch.stack([torch.randn(shape, generator=seeded("photo", others.get(i, i)))
                                 for i in range(photos)]) for shape in ((3, 64, 64), (64, 384)))
    monkeypatch.setattr(efficientad, "milliseconds", lambda judge, photos: 0.0)
    folder.mkdir()
    return efficientad.run(SimpleNamespace(
        seed=0, size=64, device=torch.device("cpu"), precision="fp32", about={},
        train=torch.arange(5), validation=torch.arange(5, 9), scored=torch.arange(5, 12),
        images=pixels.__getitem__, everywhere=SimpleNamespace(h0=seen.__getitem__),
        aurocs=lambda scores: {}, ladmim=SimpleNamespace(pdn=torch.nn.Linear(1, 1)),
        scored_run=SimpleNamespace(folder=folder)), 2)["scores"]


def test_a_photos_scores_know_nothing_of_the_test_photos(tmp_path, monkeypatch):
    """Quantiles, standardisation and PUAD's covariance are of training and validation photos."""
    usual = scores_of(tmp_path / "usual", monkeypatch, {})
    other = scores_of(tmp_path / "other", monkeypatch, {9: 109, 10: 110})
    assert usual.keys() == {"EfficientAD-S", "PUAD"}
    for name, scores in usual.items():
        assert scores[:4] == other[name][:4] and scores[6] == other[name][6]
        assert scores[4] != other[name][4] and scores[5] != other[name][5]
