"""PatchCore on the same PDN, photos, seeds and protocol: python bench/baselines.py [RUN ...]

Roth et al. 2022, in its shortest honest form: a photo is as anomalous as its patch that is farthest
from a memory of normal patches. One feature level, the PDN's last, where the paper joins two of a
ResNet.
"""
from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import backbone  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import ladmim  # noqa: E402
import runs  # noqa: E402


def neighbourhoods(x: torch.Tensor) -> torch.Tensor:
    """x (B, N, d0) -> each patch averaged with its 3x3 neighbours."""
    grid = round(x.shape[1] ** 0.5)
    x = x.transpose(1, 2).unflatten(2, (grid, grid))
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False).flatten(2).transpose(1, 2)


def coreset(bank: torch.Tensor, share: float) -> torch.Tensor:
    """`share` of the rows of bank (n, d), chosen greedily: each the farthest from those before it,
    by distances after a random projection to 128 dimensions."""
    project = torch.randn(bank.shape[1], 128, generator=runs.seeded("coreset"))
    near = bank @ (project.to(bank) / 128 ** 0.5)
    chosen, distance = [0], torch.full((len(bank),), torch.inf, device=bank.device)
    for _ in range(int(share * len(bank)) - 1):
        distance = torch.minimum(distance, (near - near[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
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
def patchcore(features, train, test, share: float = 0.1):
    """features(index) -> (B, N, d0) standardised; train, test: numbers of photos. -> the scores of
    the test photos, and the seconds that training and scoring took."""
    began = time.monotonic()
    bank = torch.cat([neighbourhoods(features(index)) for index in train.split(16)])
    memory, trained = coreset(bank.flatten(0, 1), share), time.monotonic()
    scores = [patchcore_score(x, memory) for index in test.split(16)
              for x in neighbourhoods(features(index))]
    return np.array(scores), trained - began, time.monotonic() - trained


def seconds(function, images: np.ndarray) -> float:
    """Of all images, 8 at a time. What the first use costs, nobody pays."""
    function(images[:8])
    began = time.monotonic()
    for batch in data.in_batches(images, 8):
        function(np.stack(batch))
    return time.monotonic() - began


def compare(scored: evaluation.ScoredRun, ours: dict, cache: Path) -> list[dict]:
    """LADMIM's run and PatchCore on its photos: a record each. ours: `eval.evaluate`'s."""
    state = runs.load_finished(scored.folder)
    detector = ladmim.load_detector(scored.folder, ours["category"], runs.pick_device(None))
    cfg, device = detector.cfg, detector.mean.device
    photos = data.find_photos(Path(scored.config.get("root", "")), ours["category"], ours["seed"])
    seen, photos, rows, _ = backbone.find_features(photos, detector.pdn, cfg.image_size, cfg.grid,
                                                   False, device, cache, detector.white)
    features = backbone.Features(seen, detector.mean, detector.std, device, rows)
    train, test = (torch.tensor([i for i, photo in enumerate(photos) if photo.split == split])
                   for split in ("train", "test"))
    images = np.stack(list(data.load_images([photos[i].path for i in test], cfg.image_size,
                                            detector.white)))
    kinds = np.array([photos[i].kind for i in test])

    scores, learning, scoring = patchcore(features.h0, train, test)
    # It read cached features: here it pays for the backbone. `.cpu` waits for a GPU.
    scoring += seconds(lambda batch: detector.look(batch)[0].cpu(), images)
    trained = sum(line.get("seconds", 0) for line in state["metrics"] if line["stage"] != "score")
    systems = {"LADMIM": (ours["both"], trained, seconds(detector, images)),
               "PatchCore": (evaluation.aurocs(kinds, scores), learning, scoring)}
    keys, records = ("category", "seed", "columns", "rendered", "data", *evaluation.GROUP), []
    for system, (figures, training, testing) in systems.items():
        records.append({"system": system, "both": figures, "train": training,
                        "image": 1e3 * testing / len(test), **{key: ours[key] for key in keys}})
    return records


def table(records: list[dict]) -> tuple:
    """-> (title, header, rows): a row a system, the mean over the categories, then each."""
    first, columns, rows = records[0], records[0]["columns"], []
    for (system,), same in evaluation.grouped(records, "system").items():
        by_category = evaluation.grouped(same, "category")
        row = [system, *(evaluation.spread(same, "both", column) for column in columns)]
        row += [f"{np.mean([record[cost] for record in same]):.0f}" for cost in ("train", "image")]
        for one in by_category.values():
            row.append([evaluation.spread(one, "both", column) for column in columns[:2]])
        rows.append(row)
    each = [f"{category}: {' / '.join(columns[:2])}" for category, in by_category]
    about = [evaluation.data_title(first), *(first[key] for key in evaluation.GROUP), "AUROC %"]
    costs = ["training s, features cached", "ms a photo"]
    return ", ".join(about), ["system", *columns, *costs, *each], rows


def parse(argv):
    parser = data.Parser(prog="bench/baselines.py", description="PatchCore beside each run.")
    evaluation.add_runs(parser)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="default: cache")
    return parser.parse_args(argv)


def print_tables(args) -> int:
    rows, problems = evaluation.each_record(
        args, lambda scored, record: compare(scored, record, args.cache))
    groups = evaluation.grouped(rows, "data", "rendered", *evaluation.GROUP, "columns")
    return evaluation.publish("baselines", args, [table(group) for group in groups.values()],
                              rows, problems)


def main(argv=None) -> int:
    return data.run_command(lambda: print_tables(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
