"""bench/rival.py: a training that settles, stops, and goes on to the same bits."""
from types import SimpleNamespace

import pytest
import torch

import data
from bench import rival
from published import Codebook


@pytest.mark.parametrize("losses, expected", [
    ([], False), ([1] * 4, False), ([1] * 5, True), ([5, 4, 3, 2, 1, 0.9], False),
    ([1, 0.995, 0.993, 0.992, 0.991], True), ([1, 0.98, 2, 2, 2], False), ([1, 2, 2, 2, 2], True)])
def test_settled_means_four_looks_in_turn_gained_less_than_a_percent(losses, expected):
    assert rival.settled(losses) is expected


def test_the_last_twentieth_follows_where_it_settled():
    plan = rival.Plan(1000, 10, 1, 1e-3, 0.0)
    assert [rival.last_step(plan, since) for since in (None, 95, 500)] == [1000, 100, 527]


def start(folder, steps=40, every=10, precision="fp32"):
    """A linear model that learns to double its input, and how to train it."""
    (folder / "rivals").mkdir(exist_ok=True)
    photos = SimpleNamespace(train=torch.arange(8), seed=3, about={"photos": "ab"},
                             precision=precision, device=torch.device("cpu"),
                             scored_run=SimpleNamespace(folder=folder))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.2))

    def loss(batch, rng):
        x = batch[:, None] + torch.rand(len(batch), 1, generator=rng)
        return (model(x / 8) - 2 * x / 8).square().mean()

    def look():
        x = torch.ones(1, 1)
        return float((model(x) - 2 * x).square()), {"aurocs": {}}

    plan = rival.Plan(steps, every, 4, 0.05, 0.0)
    return model, lambda f=loss: rival.fit(photos, "toy", model, plan, f, look), loss


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    model, fit, _ = start(whole)
    record = fit()
    assert record["steps"] == 40 and [one["step"] for one in record["curve"]] == [10, 20, 30, 40]
    assert not record["settled"] and record["curve"][-1]["loss"] < record["curve"][0]["loss"]

    now = iter(range(0, 10 ** 6, 20))                            # a clock that leaps: saves often
    monkeypatch.setattr(rival.time, "monotonic", lambda: next(now))
    _, fit, loss = start(stopped)
    calls = []

    def interrupted(batch, rng):
        calls.append(batch)
        if len(calls) > 23:
            raise KeyboardInterrupt
        return loss(batch, rng)

    with pytest.raises(KeyboardInterrupt):
        fit(interrupted)
    assert 10 < torch.load(stopped / "rivals/toy.pt")["step"] <= 23
    other, fit, _ = start(stopped)
    resumed = fit()
    assert resumed["curve"] == record["curve"]
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_the_last_twentieth_has_a_tenth_of_the_rate(tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **more):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    start(tmp_path)[1]()
    assert rates == [0.05] * 38 + [pytest.approx(0.005)] * 2


def test_it_ends_where_the_loss_has_settled(tmp_path):
    model, fit, loss = start(tmp_path, steps=1000, every=2)
    constant = next(model.parameters())
    record = fit(lambda batch, rng: 0 * loss(batch, rng) + 0 * constant.sum())
    assert record["settled"] and record["steps"] == 11       # looks at 2 .. 10, then a twentieth
    assert record["curve"][-1]["step"] == 11


@pytest.mark.parametrize("held", [{"plan": {"steps": 7}, "about": {"photos": "ab"}}, [1, 2], {}])
def test_a_training_of_other_settings_is_no_start(tmp_path, held):
    start(tmp_path)
    torch.save(held, tmp_path / "rivals/toy.pt")
    _, fit, _ = start(tmp_path)
    with pytest.raises(data.InputError, match="toy.pt.*delete it"):
        fit()


def test_a_training_in_another_precision_is_no_start(tmp_path, monkeypatch):
    now = iter(range(0, 10 ** 6, 100))                           # each step saves
    monkeypatch.setattr(rival.time, "monotonic", lambda: next(now))
    start(tmp_path)[1]()
    _, fit, _ = start(tmp_path, precision="bf16")
    with pytest.raises(data.InputError, match="toy.pt.*delete it"):
        fit()


def test_products_are_in_the_precision_asked_for(tmp_path):
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        (tmp_path / precision).mkdir()
        model, fit, loss = start(tmp_path / precision, steps=20, precision=precision)
        seen = []
        model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        assert fit()["steps"] == 20
        assert set(seen) == {kind}                               # in steps and in looks
        assert all(w.dtype == torch.float32 for w in model.parameters())


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    _, fit, loss = start(tmp_path)
    with pytest.raises(data.InputError, match="toy: at step 10 the validation loss is nan; delete"):
        fit(lambda batch, rng: loss(batch, rng) * float("nan"))


def test_a_state_is_saved_only_behind_a_finite_look(tmp_path, monkeypatch):
    now = iter(range(0, 10 ** 6, 20))                # saves as often as it may
    monkeypatch.setattr(rival.time, "monotonic", lambda: next(now))
    model, fit, loss = start(tmp_path)
    calls = []

    def breaks(batch, rng):
        calls.append(1)
        return loss(batch, rng) * (float("nan") if len(calls) > 12 else 1)

    with pytest.raises(data.InputError, match="at step 20"):
        fit(breaks)
    assert torch.load(tmp_path / "rivals/toy.pt")["step"] == 10
    _, fit, _ = start(tmp_path)
    assert fit()["steps"] == 40


def test_megabytes_are_four_bytes_a_number():
    assert rival.megabytes(torch.nn.Linear(3, 2), torch.zeros(5)) == pytest.approx(13 * 4e-6)
    assert rival.megabytes(Codebook(7, 3, 0.9, 2)) == pytest.approx(42 * 4e-6)
    models = dict.fromkeys(("pdn", "hvq", "mim"), torch.nn.Linear(3, 2))
    for kept, count in (({}, 24), ({"histograms": {"matrix": torch.zeros(2, 5, 5)}}, 74)):
        detector = SimpleNamespace(**models, normal={"hvq": (0, 1)} | kept)
        assert rival.ladmim_megabytes(detector) == pytest.approx(count * 4e-6)
