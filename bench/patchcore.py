"""PatchCore, Roth et al. 2022: a photo is as anomalous as its patch farthest from all normal ones.

Simplified: one feature level, the PDN's last; the paper joins two of a ResNet. A patch is a token
of the run, 12x12 of them with `tiny` (a finer grid may be better: bench/RESULTS.md), averaged with
its neighbours; without `average` it is one token, as in plain nearest neighbours."""
import time

import numpy as np
import torch

import runs
from bench.rival import Photos, megabytes, milliseconds
from scores import smoothed


def neighbourhoods(x: torch.Tensor) -> torch.Tensor:
    """x (B, N, d0) -> each patch averaged with its 3x3 neighbours."""
    return smoothed(x.transpose(1, 2).flatten(0, 1)).view(len(x), -1, x.shape[1]).transpose(1, 2)


def coreset(bank: torch.Tensor, share: float) -> torch.Tensor:
    """`share` of the rows of bank (n, d), chosen greedily: each the farthest from those before it,
    by distances after a random projection to 128 dimensions."""
    project = torch.randn(bank.shape[1], 128, generator=runs.seeded("coreset"))
    near, count = bank @ (project.to(bank) / 128 ** 0.5), int(share * len(bank))
    chosen, distance = [0], torch.full((len(bank),), torch.inf, device=bank.device)
    progress = runs.Progress("patchcore", count, "patches")
    for _ in range(count - 1):
        distance = torch.minimum(distance, (near - near[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
        progress(len(chosen))
    return bank[chosen]


def patchcore_score(x: torch.Tensor, memory: torch.Tensor) -> float:
    """x (N, d0), one photo's patches. The distance of the most distant one, weighted as in the
    paper's equation 7 with 9 neighbours."""
    distances, at = torch.cdist(x, memory).min(1)
    worst = distances.argmax()
    to_all = torch.linalg.vector_norm(memory - memory[at[worst]], dim=1)
    around = to_all.topk(min(9, len(memory)), largest=False).indices     # the nearest one's own
    others = torch.linalg.vector_norm(memory[around] - x[worst], dim=1)
    return float(distances[worst] * (1 - torch.softmax(others, 0)[0]))


@torch.inference_mode()
def patchcore(features, train, test, share: float = 0.1, average: bool = True):
    """features(index) -> (B, N, d0) standardised; train, test: numbers of photos. -> the scores of
    the test photos, the memory, and the seconds that training took."""
    began, around = time.monotonic(), neighbourhoods if average else lambda x: x
    bank = torch.cat([around(features(index)) for index in train.split(16)])
    memory, trained = coreset(bank.flatten(0, 1), share), time.monotonic()
    scores = [patchcore_score(x, memory) for index in test.split(16)
              for x in around(features(index))]
    return np.array(scores), memory, trained - began


def run(photos: Photos, average: bool) -> dict:
    """-> what bench/baselines.py keeps of a rival."""
    detector = photos.ladmim
    scores, memory, trained = patchcore(photos.features.h0, photos.train, photos.scored,
                                        average=average)

    def judge(images):
        h0, *_ = detector.look(images)
        return [patchcore_score(x, memory) for x in (neighbourhoods(h0) if average else h0)]

    return {"scores": {"PatchCore" if average else "PatchCore, single patches": scores.tolist()},
            "train": trained, "image": milliseconds(judge, photos),
            "megabytes": megabytes(detector.pdn, memory)}
