"""bench/baselines.py: PatchCore against a plain loop, and beside a run."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import QUICK, command
from sklearn.neighbors import NearestNeighbors

import data
import eval as evaluation
import ladmim
from bench import baselines
from twin.render import COUNTS, render


def test_patchcore_against_a_plain_loop():
    """With the whole memory, where the coreset leaves nothing out: nearest neighbours by
    scikit-learn."""
    rng = np.random.default_rng(0)
    h0 = torch.from_numpy(rng.normal(size=(9, 16, 24))).float()
    scores, *_ = baselines.patchcore(lambda index: h0[index], torch.arange(5), torch.arange(5, 9),
                                     share=1.0)
    square = h0.view(9, 4, 4, 24).numpy()
    seen = np.empty((9, 4, 4, 24))
    for b, i, j in np.ndindex(9, 4, 4):
        around = square[b, max(0, i - 1):i + 2, max(0, j - 1):j + 2]
        seen[b, i, j] = around.mean((0, 1))
    seen = seen.reshape(9, 16, 24)
    bank = seen[:5].reshape(-1, 24)
    search = NearestNeighbors(n_neighbors=9).fit(bank)
    for b, value in zip((5, 6, 7, 8), scores):
        distance, at = search.kneighbors(seen[b], 1)
        worst = distance[:, 0].argmax()
        near = bank[search.kneighbors(bank[at[worst]], 9)[1][0]]
        others = np.linalg.norm(near - seen[b, worst], axis=1)
        weight = 1 - np.exp(distance[worst, 0]) / np.exp(others).sum()
        assert value == pytest.approx(distance[worst, 0] * weight, rel=1e-4)


def test_the_coreset_covers_the_memory_better_than_chance():
    """Two far-apart clusters, one of them rare: a tenth chosen greedily holds both."""
    h0 = torch.randn(4, 25, 8, generator=torch.Generator().manual_seed(0))
    h0[3, 12] += 100
    scores, *_ = baselines.patchcore(lambda index: h0[index], torch.arange(4), torch.tensor([3]))
    assert scores[0] < 5


def patchcore_of(run, folder):
    """AUROCs of PatchCore on the run's photos, each looked at anew."""
    detector = ladmim.load_detector(run, None, torch.device("cpu"))
    photos = [photo for photo in data.find_photos(folder, "juice_bottle", 0)
              if photo.split != "validation"]
    photos.sort(key=lambda photo: photo.split == "test")
    images = data.load_images([photo.path for photo in photos], detector.cfg.image_size)
    h0, _ = detector.look(np.stack(list(images)))
    count = sum(photo.split == "train" for photo in photos)
    scores, *_ = baselines.patchcore(lambda index: h0[index], torch.arange(count),
                                     torch.arange(count, len(h0)))
    return evaluation.aurocs(np.array([photo.kind for photo in photos[count:]]), scores)


def test_baselines_beside_a_run(tmp_path, monkeypatch, capsys):
    """Two seeds, and a third run whose photos are gone: it costs a line."""
    render(tmp_path / "twin", "juice_bottle", {**dict.fromkeys(COUNTS, 5), "train": 8}, 64, 1)
    for seed in (0, 1):
        command("train", "--data", "twin", "--category", "juice_bottle", *QUICK, "--seed", seed,
                "--out", f"runs/seed{seed}", cwd=tmp_path)
    shutil.copytree(tmp_path / "runs/seed0", tmp_path / "runs/seed2")
    config = json.loads((tmp_path / "runs/seed2/config.json").read_text())
    config |= {"seed": 2, "root": "gone"}
    (tmp_path / "runs/seed2/config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert baselines.main(["--methods", "patchcore"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: ") and "gone" in lines[0]
    result = json.loads(open("runs/baselines.json").read())
    ours = [evaluation.evaluate(evaluation.read_run(tmp_path / f"runs/seed{seed}"),
                                "juice_bottle")["both"] for seed in (0, 1)]
    theirs = patchcore_of(tmp_path / "runs/seed0", tmp_path / "twin")
    records = result["records"]
    assert [r["both"] for r in records if r["system"] == "LADMIM"] == ours
    assert [r["both"] for r in records if r["system"] == "PatchCore"] == [theirs, theirs]
    assert ours[0] != ours[1] != theirs
    for record in records:
        assert record["train"] > 0 and record["image"] > 0
    (one, *of_ours), (other, *of_theirs) = result["tables"][0]["rows"]
    assert (one, other) == ("LADMIM", "PatchCore")
    for i, column in enumerate(("logical", "structural", "average")):
        assert of_ours[i]["mean"] == np.mean([figures[column] for figures in ours])
        assert of_theirs[i]["mean"] == theirs[column]
