"""Three baselines on the same PDN, photos, seeds and protocol: python eval.py --baselines

In their shortest honest form; where one differs from its paper, its text says so.

  PatchCore      Roth et al. 2022: distance of each patch to the nearest one in a memory of normal patches
  EfficientAD-S  Batzner et al. 2024: a student and an autoencoder predict the PDN's features; what they miss is anomalous
  PUAD           Sugawara et al. 2024: EfficientAD and the Mahalanobis distance of the student's mean feature
"""
from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import eval as evaluation
import ladmim

STEPS = {"cpu": 200, "cuda": 10_000}                 # of EfficientAD's training, one photo each; its paper takes 70,000


class Scores:
    """One method's scores of validation and test photos, and what they cost."""

    def __init__(self, validation, test, train_seconds: float, test_seconds: float):
        self.validation, self.test = (np.asarray(part, np.float64) for part in (validation, test))
        self.train_seconds, self.milliseconds = train_seconds, 1e3 * test_seconds / len(test)


def nearest(x: torch.Tensor, memory: torch.Tensor, k: int = 1):
    """The k smallest distances of x (n, d) to memory (m, d), (n, k), and whose they are."""
    return torch.cdist(x, memory).topk(min(k, len(memory)), 1, largest=False)


@torch.inference_mode()
def patchcore(features, parts, grid: int, share: float = 0.1) -> Scores:
    """features(index) -> (B, N, d0) standardised. Patches see their 3x3 neighbours; the memory is a coreset of `share` of
    them, chosen greedily, each the farthest from those before it; a photo's score is its most distant patch, weighted as in
    the paper's equation 7 with 9 neighbours. One feature level, the PDN's last, where the paper joins two of a ResNet."""
    def patches_of(index):
        x = features(index).transpose(1, 2).unflatten(2, (grid, grid))
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False).flatten(2).transpose(1, 2)        # (B, N, d0)

    began = time.monotonic()
    bank = torch.cat([patches_of(index) for index in parts["train"].split(16)]).flatten(0, 1)     # (n * N, d0)
    near = bank @ (torch.randn(bank.shape[1], 128, generator=ladmim.seeded("coreset")).to(bank) / 128 ** 0.5)
    chosen, distance = [0], torch.full((len(bank),), torch.inf, device=bank.device)
    for _ in range(int(share * len(bank)) - 1):
        distance = torch.minimum(distance, (near - near[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
    memory, trained = bank[chosen], time.monotonic()

    def score(index):
        found = []
        for x in patches_of(index):
            distances, at = nearest(x, memory)
            worst = distances[:, 0].argmax()
            around = nearest(memory[at[worst]], memory, 9)[1][0]                  # the memory's own neighbours of the nearest
            others = torch.linalg.vector_norm(memory[around] - x[worst], dim=1)
            found.append(float(distances[worst, 0] * (1 - torch.softmax(others, 0)[0])))
        return found

    validation = score(parts["validation"])
    tested = time.monotonic()
    test = [value for index in parts["test"].split(16) for value in score(index)]
    return Scores(validation, test, trained - began, time.monotonic() - tested)


class Autoencoder(nn.Sequential):
    """(B, 3, S, S) -> (B, 384, P, P) through 64 numbers a photo."""

    def __init__(self, positions: int):
        def down(i, o, kernel=4, stride=2, padding=1):
            return [nn.Conv2d(i, o, kernel, stride, padding), nn.ReLU()]

        def up(size):
            return [nn.Upsample((size, size), mode="bilinear"), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]

        super().__init__(*down(3, 32), *down(32, 32), *down(32, 64), *down(64, 64), *down(64, 64), nn.AdaptiveAvgPool2d(8),
                         nn.Conv2d(64, 64, 8), *up(3), *up(8), *up(positions // 2), *up(positions),
                         nn.Conv2d(64, 384, 3, padding=1))


def efficientad(pdn, images, mean, std, parts, seed: int, device) -> tuple[Scores, Scores]:
    """EfficientAD-S and PUAD. images (n, S, S, 3) uint8. The teacher is the run's PDN, standardised as for LADMIM. Left out:
    the penalty on ImageNet photos, which needs ImageNet; STEPS says how much shorter the training is than the paper's.
    PUAD's covariance is shrunk by a tenth towards a multiple of the identity, as there may be fewer photos than channels."""
    began, generator = time.monotonic(), ladmim.seeded(seed, "efficientad")
    torch.manual_seed(seed)
    mean, std = (moment.to(device)[:, None, None] for moment in (mean, std))
    student = ladmim.build_pdn("small")
    student[-1] = nn.Conv2d(256, 768, 4)             # one half predicts the teacher, the other the autoencoder
    autoencoder = Autoencoder((images.shape[1] - 29) // 4)
    both = nn.ModuleList([student, autoencoder]).to(device)
    optimizer = torch.optim.Adam(both.parameters(), 1e-4, weight_decay=1e-5)

    def photos(index):
        return ladmim.imagenet(images[index].to(device).permute(0, 3, 1, 2).float() / 255)

    def teach(x):
        with torch.no_grad():
            return (pdn(x) - mean) / std

    steps = STEPS[device.type]
    progress = ladmim.Progress("EfficientAD-S", steps, "steps")
    for step in range(steps):
        if step == int(0.95 * steps):
            optimizer.param_groups[0]["lr"] = 1e-5
        x = photos(parts["train"][torch.randint(len(parts["train"]), (1,), generator=generator)])
        jittered = x * (0.8 + 0.4 * float(torch.rand((), generator=generator)))
        wrong = (teach(x) - student(x)[:, :384]).square()
        hard = wrong[wrong >= torch.quantile(wrong.detach().flatten()[::4], 0.999)].mean()        # the hardest thousandth
        truth, rebuilt = teach(jittered), autoencoder(jittered)
        loss = hard + F.mse_loss(rebuilt, truth) + F.mse_loss(student(jittered)[:, 384:], rebuilt.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1)
    both.eval()

    @torch.inference_mode()
    def look(index):
        """-> local and global map (B, P, P), the student's mean feature (B, 384)."""
        found = []
        for part in index.split(8):
            x = photos(part)
            guess = student(x)
            found.append(((teach(x) - guess[:, :384]).square().mean(1), (autoencoder(x) - guess[:, 384:]).square().mean(1),
                          guess[:, :384].mean((2, 3))))
        return [torch.cat(columns).double().cpu() for columns in zip(*found)]

    mine = look(parts["validation"])
    quantiles = [[torch.quantile(m.flatten()[:2 ** 23], q) for q in (0.9, 0.995)] for m in mine[:2]]
    vectors = look(parts["train"])[2]
    centre, cov = vectors.mean(0), torch.cov(vectors.T, correction=0)             # singular: fewer photos than channels
    precision = torch.linalg.inv(0.9 * cov + 0.1 * cov.diag().mean() * torch.eye(len(cov)))

    def score(local, wide, pooled):
        local, wide = ((m - low) * 0.1 / (high - low) for m, (low, high) in zip((local, wide), quantiles))
        off = pooled - centre
        return ((local + wide) / 2).flatten(1).amax(1).numpy(), ((off @ precision) * off).sum(1).clamp(min=0).sqrt().numpy()

    validation, tested = score(*mine), time.monotonic()
    test = score(*look(parts["test"]))
    cost = tested - began, time.monotonic() - tested
    added = [sum(evaluation.standardise(part, normal) for part, normal in zip(found, validation))
             for found in (validation, test)]
    return Scores(validation[0], test[0], *cost), Scores(*added, *cost)


def compare(run: evaluation.Run, ours: dict, cache: Path) -> list[dict]:
    """The baselines beside a finished run of LADMIM, trained on its photos: a record each. ours: `eval.evaluate`'s record
    of one of the run's categories."""
    category = ours["category"]
    state = ladmim.load_checkpoint(run.folder / "checkpoint.pt")
    detector = ladmim.load_detector(run.folder, category, ladmim.pick_device(None))
    cfg, device, root = detector.cfg, detector.mean.device, Path(run.config.get("root", ""))
    if not (root / category).is_dir():
        raise evaluation.InputError(f"{run.folder}: its photos are no longer at {root / category}, so nothing can be compared")
    photos, seed = data.find_photos(root, category, run.config["seed"]), run.config["seed"]
    features, photos, _ = ladmim.find_features(photos, cfg, cache, device, detector.pdn)
    parts = {split: torch.tensor([i for i, photo in enumerate(photos) if photo.split == split])
             for split in ("train", "validation", "test")}
    images = torch.from_numpy(np.stack(list(data.load_images([photo.path for photo in photos], cfg.image_size))))
    h0 = ladmim.standardised(features, detector.mean, detector.std, device)
    kinds = np.array([photo.kind for photo in photos])[parts["test"].numpy()]

    detector(images[parts["test"][:8]].numpy())      # what is compiled or looked up at first use costs nobody
    began = time.monotonic()
    for index in parts["test"].split(8):
        detector(images[index].numpy())
    seconds = time.monotonic() - began
    trained = sum(line.get("seconds", 0) for line in state["metrics"] if line["stage"] in ("hvq", "mim"))
    began = time.monotonic()                         # LADMIM and PatchCore read cached features: everyone pays for the backbone
    for index in parts["test"].split(8):
        ladmim.extract(detector.pdn, images[index].to(device), cfg.grid).cpu()    # waits for a GPU
    backbone = (time.monotonic() - began) / len(kinds)

    memory = patchcore(h0, parts, cfg.grid)
    memory.milliseconds += 1e3 * backbone
    memory.train_seconds += backbone * len(parts["train"])
    student, both = efficientad(detector.pdn, images, detector.mean, detector.std, parts, seed, device)
    records = [{"system": "LADMIM", "both": ours["both"], "train": trained + backbone * len(parts["train"]),
                "image": 1e3 * seconds / len(kinds)}]
    steps = f"{STEPS[device.type]:,} steps"
    for name, found in (("PatchCore", memory), (f"EfficientAD-S, {steps}", student), (f"PUAD, {steps}", both)):
        figures = {}
        for group, members in evaluation.anomaly_groups(kinds).items():
            pick = np.isin(kinds, ["good", *members])
            figures[group] = evaluation.auroc(kinds[pick] != "good", found.test[pick])
        if {"logical", "structural"} <= figures.keys():
            figures["average"] = (figures["logical"] + figures["structural"]) / 2
        records.append({"system": name, "both": figures, "train": found.train_seconds, "image": found.milliseconds})
    about = {key: ours[key] for key in ("category", "seed", "columns", "rendered", "data", *evaluation.GROUP)}
    return [record | about for record in records]


def table(records: list[dict]) -> tuple:
    """-> (title, header, rows): a row a system, mean over categories and, for each category, every column."""
    first = records[0]
    columns, categories = list(first["columns"]), sorted({record["category"] for record in records})
    rows = []
    for (system,), rs in evaluation.grouped(records, "system").items():
        each = [[evaluation.spread([r for r in rs if r["category"] == one], "both", column) for column in columns[:2]]
                for one in categories]
        rows.append([system, *(evaluation.spread(rs, "both", column) for column in columns),
                     f"{np.mean([r['train'] for r in rs]):.0f}", f"{np.mean([r['image'] for r in rs]):.0f}", *each])
    header = ["system", *columns, "training s", "ms an image", *(f"{one}: {' / '.join(columns[:2])}" for one in categories)]
    group = ", ".join(first[key] for key in evaluation.GROUP)
    return f"{evaluation.data_title(first)}, {group}: baselines on the same PDN, AUROC %", header, rows
