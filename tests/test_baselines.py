"""bench/baselines.py: PatchCore against a plain loop, and beside a run."""
import json

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from test_report import folder, small, train  # noqa: F401

import eval as evaluation
from bench import baselines


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


def test_baselines_beside_a_run(small, capsys):  # noqa: F811
    for seed in (0, 1):
        train(f"two/run{seed}", "--seed", seed, "--image-size", "125")
    assert baselines.main(["two"]) == 0
    found = json.loads(open("runs/baselines.json").read())
    assert [row[0] for row in found["tables"][0]["rows"]] == ["LADMIM", "PatchCore"]
    ours = [evaluation.evaluate(evaluation.read_run(small / f"two/run{seed}"),
                                "juice_bottle")["both"] for seed in (0, 1)]
    records = found["records"]
    assert [r["both"] for r in records if r["system"] == "LADMIM"] == ours
    for record in records:
        assert 0 <= record["both"]["average"] <= 1
        assert record["train"] > 0 and record["image"] > 0
    assert len({json.dumps(record["both"]) for record in records}) > 2
    capsys.readouterr()
