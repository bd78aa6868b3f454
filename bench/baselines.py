"""PatchCore on the same PDN, photos, seeds and protocol: python bench/baselines.py [RUN ...]

Roth et al. 2022, in its shortest honest form: a photo is as anomalous as its patch that is farthest
from a memory of normal patches. One feature level, the PDN's last, where the paper joins two of a
ResNet.
"""
from __future__ import annotations

import argparse
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


def nearest(x: torch.Tensor, memory: torch.Tensor, k: int = 1):
    """The k smallest distances of x (n, d) to memory (m, d), (n, k), and whose they are."""
    return torch.cdist(x, memory).topk(min(k, len(memory)), 1, largest=False)


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
    distances, at = nearest(x, memory)
    worst = distances[:, 0].argmax()
    around = nearest(memory[at[worst]], memory, 9)[1][0]     # neighbours of the nearest
    others = torch.linalg.vector_norm(memory[around] - x[worst], dim=1)
    return float(distances[worst, 0] * (1 - torch.softmax(others, 0)[0]))


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


def compare(scored: evaluation.ScoredRun, ours: dict, cache: Path) -> list[dict]:
    """LADMIM's run and PatchCore on its photos: a record each. ours: `eval.evaluate`'s record of
    one of the run's categories."""
    category, seed = ours["category"], scored.config["seed"]
    state = runs.load_finished(scored.folder)
    detector = ladmim.load_detector(scored.folder, category, runs.pick_device(None))
    cfg, device, root = detector.cfg, detector.mean.device, Path(scored.config.get("root", ""))
    if not (root / category).is_dir():
        raise data.InputError(f"{scored.folder}: its photos are no longer at {root / category}")
    photos = data.find_photos(root, category, seed)
    seen, photos, rows = backbone.find_features(photos, detector.pdn, cfg.image_size, cfg.grid,
                                                False, device, cache)
    features = backbone.Features(seen, detector.mean, detector.std, device, rows)
    train, test = (torch.tensor([i for i, photo in enumerate(photos) if photo.split == split])
                   for split in ("train", "test"))
    paths = [photos[i].path for i in test]
    images = np.stack(list(data.load_images(paths, cfg.image_size)))

    def seconds(function) -> float:
        """Of all test photos; what the first use costs, nobody pays."""
        function(images[:8])
        began = time.monotonic()
        for batch in data.in_batches(images, 8):
            function(np.stack(batch))
        return time.monotonic() - began

    # Cached features are read, so both pay for the backbone. `.cpu` waits for a GPU.
    reading = seconds(lambda batch: backbone.look(detector.pdn, batch, cfg.grid, False,
                                                  device).cpu())
    trained = sum(line.get("seconds", 0) for line in state["metrics"]
                  if line["stage"] in ("hvq", "mim"))
    scores, learning, scoring = patchcore(features.h0, train, test)
    kinds = np.array([photos[i].kind for i in test])
    about = {key: ours[key] for key in ("category", "seed", "columns", "rendered", "data",
                                        *evaluation.GROUP)}
    systems = (("LADMIM", ours["both"], trained, seconds(detector)),
               ("PatchCore", evaluation.aurocs(kinds, scores), learning, scoring + reading))
    records = []
    for name, figures, training, testing in systems:
        training += reading * len(train) / len(test)
        records.append({"system": name, "both": figures, "train": training,
                        "image": 1e3 * testing / len(test), **about})
    return records


def table(records: list[dict]) -> tuple:
    """-> (title, header, rows): a row a system, the mean over the categories, then each."""
    first, rows = records[0], []
    columns, categories = list(first["columns"]), sorted({r["category"] for r in records})
    for (system,), same in evaluation.grouped(records, "system").items():
        row = [system, *(evaluation.spread(same, "both", column) for column in columns)]
        row += [f"{np.mean([r[cost] for r in same]):.0f}" for cost in ("train", "image")]
        for one in categories:
            of_one = [r for r in same if r["category"] == one]
            row.append([evaluation.spread(of_one, "both", column) for column in columns[:2]])
        rows.append(row)
    header = ["system", *columns, "training s", "ms an image",
              *(f"{one}: {' / '.join(columns[:2])}" for one in categories)]
    group = ", ".join(first[key] for key in evaluation.GROUP)
    title = f"{evaluation.data_title(first)}, {group}: the same PDN, AUROC %"
    return title, header, rows


def parse(argv) -> argparse.Namespace:
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
