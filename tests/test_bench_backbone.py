"""bench/backbone.py: its distance and its readout against closed forms, and the command."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import make_photos
from PIL import Image

from backbone import imagenet
from bench import backbone as bench


def test_the_distance_of_the_mean_token_is_mahalanobis_by_numpy():
    """Covariance of the standardised training photos' means, shrunk by a tenth towards the mean
    variance; AUROC by counting pairs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 9, 12)) * np.linspace(0.5, 3, 12) + 4
    x[50:] += 0.5
    photos = [SimpleNamespace(split="train", kind="good")] * 40
    photos += [SimpleNamespace(split="test", kind="good")] * 10
    photos += [SimpleNamespace(split="test", kind="logical_anomalies")] * 10
    judged = bench.judge(torch.from_numpy(x), photos)
    x = (x - x[:40].mean((0, 1))) / x[:40].std((0, 1))
    means = x.mean(1)
    cov = np.cov(means[:40].T, bias=True)
    cov = 0.9 * cov + 0.1 * np.trace(cov) / 12 * np.eye(12)
    off = means[40:] - means[:40].mean(0)
    distance = np.einsum("nd,nd->n", off @ np.linalg.inv(cov), off)
    expected = (distance[10:, None] > distance[:10]).mean()
    assert judged.keys() == {"logical"} and 0.7 < expected < 1
    assert judged["logical"][1] == f"{100 * expected:.1f}"


class Channels(nn.Module):
    """Stands in for a PDN: 384 channels, of which some tell the photo's green where it looks."""

    def __init__(self, green: bool):
        super().__init__()
        self.green = green

    def forward(self, x):
        seen = x[:, 1:2, 16::4, 16::4][..., :48, :48]
        noise = torch.randn(len(x), 384, *seen.shape[2:], generator=torch.manual_seed(len(x)))
        return torch.cat([3 * seen + 1, noise[:, 1:]], 1) if self.green else noise


def test_what_is_a_linear_function_of_the_channels_is_explained(monkeypatch):
    """The teacher's first map is green: one backbone tells it, the other is noise. Its second map
    is not linear in green: neither explains it wholly."""
    monkeypatch.setattr(bench, "CROPS", 12)
    rng = np.random.default_rng(0)
    corpus = SimpleNamespace(
        crop=lambda seed, number: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8),
        measuring_crops=lambda: torch.rand(4, 3, 224, 224))

    def teacher(x):
        green = imagenet(x)[:, 1:2, 16::4, 16::4]
        return [(green, 4.0, 16.5), (green.square(), 4.0, 16.5)]

    good, noise = bench.explained([Channels(True), Channels(False)], [teacher], corpus,
                                  torch.device("cpu"))
    assert good[0] == pytest.approx(1, abs=1e-3) and good[1] < 0.9
    assert max(noise) < 0.2


class Toy(nn.Module):
    def forward(self, x: torch.Tensor) -> list[tuple[torch.Tensor, float, float]]:
        return [(x[:, :, 16::4, 16::4], 4.0, 16.5)]


def test_the_command(tmp_path, monkeypatch, capsys):
    """Two rows of AUROCs, the second the teacher's own, and the variance that is explained."""
    monkeypatch.setattr(bench, "CROPS", 6)
    make_photos(tmp_path, train=6, validation=2, good=3, bad=3)
    torch.jit.script(Toy()).save(tmp_path / "toy.pt")
    options = ["--pdn", "random", "--data", tmp_path, "--category", "widgets", "--cache",
               tmp_path / "cache", "--device", "cpu"]
    images = tmp_path / "widgets"
    words = [*options, "--teacher", tmp_path / "toy.pt", "--images", images]
    assert bench.main(list(map(str, words))) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == ["backbone", "logical", "structural", "average"]
    assert [row[0] for row in rows[2:4]] == ["random", str(tmp_path / "toy.pt")]
    assert all(0 <= float(part) <= 100 for row in rows[2:4] for cell in row[1:]
               for part in cell.split(" / "))
    assert float(rows[3][2].split(" / ")[0]) == 100      # a blue patch: colours see it
    assert rows[-1][0] == "random" and float(rows[-1][1]) > 0.5
    for more, reason in ((["--grid", 7], "--grid 7"), (["--teacher", "toy.pt"], "give both"),
                         (["--pdn", "none.pt"], "none.pt"), (["--category", "none"], "none")):
        assert bench.main(list(map(str, [*options, *more]))) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and reason in err


def test_photos_are_read_at_the_training_photos_depth(tmp_path, monkeypatch, capsys):
    """The same pixels with 8 bits and with 12 in files of 16 give the same AUROCs."""
    make_photos(tmp_path / "8", train=4, validation=2, good=3, bad=3)
    for photo in (tmp_path / "8").rglob("*.png"):
        grey = np.asarray(Image.open(photo).convert("L"))
        Image.fromarray(grey).save(photo)
        deep = tmp_path / "12" / photo.relative_to(tmp_path / "8")
        deep.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((grey * (4095 / 255) + 0.5).astype(np.uint16)).save(deep)
    torch.jit.script(Toy()).save(tmp_path / "toy.pt")
    monkeypatch.setattr(bench, "explained", lambda *args: [[0.0]])
    tables = []
    for bits in ("8", "12"):
        words = ["--pdn", "random", "--data", tmp_path / bits, "--category", "widgets", "--cache",
                 tmp_path / "cache", "--device", "cpu", "--teacher", tmp_path / "toy.pt",
                 "--images", tmp_path / "8" / "widgets"]
        assert bench.main(list(map(str, words))) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
