"""bench/masked.py: SMAE's and MAEDAY's parts against plain loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import masked
from runs import in_precision, seeded


def small(channels=5, tokens=9):
    torch.manual_seed(0)
    return masked.MaskedAutoencoder(channels, tokens, 16, 2, 8, 1).eval()


def test_hidden_tokens_are_never_seen():
    """Other hidden tokens leave the guesses alone, another visible one changes them all."""
    model, x = small(), torch.randn(2, 9, 5, generator=seeded(0))
    visible = torch.tensor([[0, 4, 7], [8, 1, 2]])
    other = x + torch.randn(x.shape, generator=seeded(1))
    with torch.no_grad():
        before = model(x, visible)
        for b in range(2):
            other[b, visible[b]] = x[b, visible[b]]
        assert torch.equal(model(other, visible), before)
        other[0, 4] += 1
        after = model(other, visible)
        order = torch.tensor([[7, 0, 4], [2, 8, 1]])             # numbers, not places, count
        assert torch.allclose(model(x, order), before, atol=1e-6)
    assert (after[0] != before[0]).any(1).all() and torch.equal(after[1], before[1])


def test_bfloat16_guesses_and_learns_nearly_the_same():
    model, x = small(), torch.randn(2, 9, 5, generator=seeded(0))
    visible, found = torch.tensor([[0, 4, 7], [8, 1, 2]]), []
    for precision in ("fp32", "bf16"):
        model.zero_grad()
        with in_precision(precision, x.device):
            guess = model(x, visible)
        guess.float().square().mean().backward()
        found.append((guess.float(), model.hidden.grad.clone()))
    (guess, gradient), (rough, rough_gradient) = found
    assert not torch.equal(guess, rough) and torch.allclose(guess, rough, atol=0.03)
    assert torch.allclose(gradient, rough_gradient, atol=0.03 * float(gradient.abs().max()))


@pytest.mark.parametrize("tokens", [16, 9, 2])
def test_smaes_halves_are_halves(tokens):
    halves = masked.splits(5, tokens, 0.5, True, seeded(0))
    assert halves.shape == (10, tokens // 2)
    for one, other in halves.view(5, 2, -1).tolist():
        assert len({*one, *other}) == 2 * (tokens // 2)          # of an odd number one is in none
    assert len(set(map(tuple, halves.tolist()))) > (1 if tokens == 2 else 5)


def test_maeday_sees_a_quarter():
    masks = masked.splits(32, 196, 0.25, False, seeded(0))
    assert masks.shape == (32, 49) and all(len(set(mask)) == 49 for mask in masks.tolist())
    assert masked.splits(1, 1, 0.25, False, seeded(0)).tolist() == [[0]]


def test_the_map_is_the_mean_over_the_masks_that_hide_a_place():
    rng = np.random.default_rng(0)
    errors, hides = rng.random((6, 2, 7)), rng.random((6, 2, 7)) < 0.5
    hides[:, 0, 3] = False                                       # no mask hides it
    found = masked.error_map((torch.tensor(e), torch.tensor(h).double())
                             for e, h in zip(errors, hides))
    for b, i in np.ndindex(2, 7):
        mine = errors[hides[:, b, i], b, i]
        assert float(found[b, i]) == pytest.approx(mine.mean() if len(mine) else 0)


def test_patches_and_their_errors_lie_where_the_pixels_are():
    """Against cutting the photo by hand; 37 pixels hold two patches of 16."""
    x = torch.randn(2, 3, 37, 37, generator=seeded(0))
    cut = masked.patches(x)
    for number, (top, left) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)]):
        square = x[:, :, top:top + 16, left:left + 16]
        assert torch.equal(cut[:, number], square.flatten(1))
    guess = torch.zeros_like(cut)
    expected = x[:, :, :32, :32].square().mean(1)
    errors = masked.token_error(guess, cut, 256)
    assert torch.allclose(masked.put_together(errors), expected)


def test_the_blur_is_a_gaussian():
    spot = torch.zeros(1, 15, 15)
    spot[0, 7, 7] = 1
    found = masked.blurred(spot)[0].numpy()
    i, j = np.mgrid[-7:8, -7:8]
    expected = np.exp(-(i ** 2 + j ** 2) / (2 * 1.4 ** 2)) * (abs(i) <= 3) * (abs(j) <= 3)
    assert np.allclose(found, expected / expected.sum(), atol=1e-6)
    assert torch.allclose(masked.blurred(torch.ones(2, 9, 9)), torch.ones(2, 9, 9))


def test_it_learns_to_guess_what_is_always_the_same():
    model, x = small(), torch.randn(1, 9, 5, generator=seeded(2)).expand(4, -1, -1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for step in range(60):
        visible = masked.splits(4, 9, 0.5, False, seeded(step))
        loss = (masked.token_error(model(x, visible), x) * masked.hides(visible, 9)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_smaes_loss_and_scores_against_plain_loops(monkeypatch):
    """The loss is of hidden tokens alone, of both halves. A score is the largest value of the map
    of two pairs of halves, drawn once for all photos."""
    seen, found = torch.randn(6, 16, 5, generator=seeded("photos")), {}

    def fit(photos, name, model, plan, loss, look, steps):
        model.eval()
        with torch.no_grad():
            found.update(loss=float(loss(torch.tensor([0, 2]), seeded("a step"))), look=look()[0])
        return {}

    monkeypatch.setattr(masked, "fit", fit)
    monkeypatch.setattr(masked, "milliseconds", lambda judge, photos: 0.0)
    photos = SimpleNamespace(train=torch.arange(3), validation=torch.tensor([3]), seed=7,
                             scored=torch.arange(3, 6), device=seen.device,
                             aurocs=lambda scores: {})
    kept = masked.train_and_score(photos, "SMAE", masked.SMAE, 1, lambda index: seen[index], None,
                                  0.5, True, 2)
    torch.manual_seed(7)
    model = masked.MaskedAutoencoder(5, 16).eval()

    def errors(x, visible):
        """(16,), None where the token is visible."""
        with torch.no_grad():
            guess = model(x[None], visible[None])[0]
        return [None if i in visible.tolist() else float((guess[i] - x[i]).square().mean())
                for i in range(16)]

    halves = masked.splits(2, 16, 0.5, True, seeded("a step"))
    each = [errors(seen[photo], half) for photo, half in zip((0, 0, 2, 2), halves)]
    hidden = [one for row in each for one in row if one is not None]
    assert len(hidden) == 4 * 8 and found["loss"] == pytest.approx(np.mean(hidden), rel=1e-5)
    masks, maps = masked.splits(2, 16, 0.5, True, seeded(7, "smae scoring")), []
    for x in seen[3:]:
        each = [errors(x, mask) for mask in masks]
        maps.append([np.mean([row[i] for row in each if row[i] is not None]) for i in range(16)])
    assert kept["scores"]["SMAE"] == pytest.approx([max(one) for one in maps], rel=1e-5)
    assert found["look"] == pytest.approx(np.mean(maps[0]), rel=1e-5)
