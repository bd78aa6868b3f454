"""bench/patchcore.py: the coreset and single patches against plain loops (more: test_baselines)."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from bench import patchcore
from runs import seeded


@pytest.mark.parametrize("rows, share", [(40, 0.25), (7, 1.0), (5, 0.1)])
def test_the_coreset_is_the_greedy_choice(rows, share):
    """Against a loop that measures every distance anew. At least one row is kept."""
    bank = torch.randn(rows, 6, generator=seeded(0)).double()
    near = (bank @ torch.randn(6, 128, generator=seeded("coreset")).double()).numpy()
    chosen = [0]
    while len(chosen) < int(share * rows):
        nearest = [min(np.linalg.norm(row - near[i]) for i in chosen) for row in near]
        chosen.append(int(np.argmax(nearest)))
    assert torch.equal(patchcore.coreset(bank, share), bank[chosen])


def test_single_patches_are_plain_nearest_neighbours():
    h0 = torch.randn(6, 9, 5, generator=seeded(1))
    scores, memory, _ = patchcore.patchcore(lambda index: h0[index], torch.arange(4),
                                            torch.tensor([4, 5]), share=1.0, average=False)
    bank = h0[:4].flatten(0, 1).numpy()
    assert sorted(memory.tolist()) == sorted(bank.tolist())
    search = NearestNeighbors(n_neighbors=9).fit(bank)
    for x, value in zip(h0[4:].numpy(), scores):
        distance, at = search.kneighbors(x, 1)
        worst = distance[:, 0].argmax()
        around = search.kneighbors(bank[at[worst]], 9)[1][0]
        others = np.linalg.norm(bank[around] - x[worst], axis=1)
        weight = 1 - np.exp(distance[worst, 0]) / np.exp(others).sum()
        assert value == pytest.approx(distance[worst, 0] * weight, rel=1e-4)
