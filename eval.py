"""AUROC of trained runs, mean and std over seeds, in tables beside the paper's.

    python eval.py                          every run under runs/
    python eval.py RUN_OR_FOLDER ...        these only
    python eval.py --standardise test       reproduces the leak of the published code, and says so
    python eval.py --localise               where, too: pixel AUROC, AUPRO, sPRO against the ground-truth masks
    python eval.py --ablation target --category breakfast_box,juice_bottle --seeds 0-1      the paper's Table 8, and others
    python eval.py RUN --baselines          PatchCore, EfficientAD-S and PUAD trained on the same photos and features
    python eval.py RUN --maps DIR           each photo's anomaly map as a TIFF, for MVTec's own evaluation scripts

Reads each run folder's config.json and scores.csv (path,split,kind,label,s_hvq,s_mim,score: one row a validation and a
test image; the path's first part is its category); --localise and --maps read maps.npz, --localise the ground truth too.
Figures are fractions in the code and the JSON, percent in the tables. The paper's figures are in bench/reported_results.json.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import data
from data import InputError

HEADER = ["path", "split", "kind", "label", "s_hvq", "s_mim", "score"]
CONFIG = {"data": str, "rendered": bool, "category": str, "preset": str, "seed": int, "commit": str}
NOT_SETTINGS = {*CONFIG, "root", "device", "torch"}         # every other key of config.json is a setting of model or training
LOCO_KINDS = {"logical_anomalies": "logical", "structural_anomalies": "structural"}
MVTEC_AD = {"bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
            "toothbrush", "transistor", "wood", "zipper"}
ANY = "any defect"                                  # the column of data sets whose defects have other names than LOCO's
DETECTORS = {"hvq": "HVQ alone", "mim": "MIM alone", "both": "both"}
BOUND = "F1-max, chosen on the test set: a bound"
PERCENTILE = 95                                     # of the validation normals' scores: above it, an image is flagged
REPORTED = Path(__file__).parent / "bench" / "reported_results.json"
LEAKS = ("LEAKS: scores standardised with mean and std of the whole test set, anomalies included; to compare with the "
         "published code, never to report")
SHORTCUTS = ("rows \"over test\" LEAK, scores standardised with mean and std of the whole test set, anomalies included, and "
             "rows \"flipped\" turn over an AUROC under 50: what the published code's shortcuts are worth, never to report")
PROTOCOL = ("Our protocol: {}; the last epoch, not the best on the test set; an AUROC under 50 is shown as it is; ± is "
            "the sample std over seeds. LADMIM's published code standardises over the whole test set and flips AUROCs "
            "under 50. Reported rows are the paper's, as printed (EfficientAD's in Table 2: one for both kinds).")
STANDARDISED = "scores standardised with mean and population std of the validation normals only"


def auroc(labels, scores) -> float:
    """Probability that an anomaly scores above a normal image, a tie counting half: Mann-Whitney's U / (n1 · n0).

    labels (n,) 0 normal, 1 anomaly; scores (n,), higher is more anomalous. Exact in float64, O(n log n).
    Raises InputError where there is no such figure: one class only, a NaN, lengths that differ.
    """
    labels, scores = np.ravel(labels), np.asarray(scores, np.float64).ravel()
    if len(labels) != len(scores):
        raise InputError(f"AUROC needs a score for every label: {len(labels)} labels, {len(scores)} scores")
    if not np.isin(labels, (0, 1)).all():
        raise InputError("AUROC needs labels of 0 (normal) and 1 (anomaly)")
    if np.isnan(scores).any():
        raise InputError(f"AUROC is undefined: {np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    positive = labels.astype(bool)
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        raise InputError(f"AUROC needs both classes: {n0} normal images, {n1} anomalies")
    _, value, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2       # of each distinct value, from 1; ties share the mean of their ranks
    u = rank[value.ravel()][positive].sum() - n1 * (n1 + 1) / 2
    return float(u / (n1 * n0))


# Localisation: how well a map of anomaly scores finds the defects' pixels

MAPS = {"structural": "structural map", "logical": "logical map", "sum": "their sum"}
SPRO_LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)


def place(tokens, image_size: int, height: int, width: int) -> np.ndarray:
    """tokens (g, g), one value a token of a photo that was squashed to image_size pixels a side -> (height, width) float32
    of the photo itself, bilinear. A token's centre is where the backbone looked: its position i sees pixels 4i to 4i + 32.
    Beyond the outermost centres the outermost values hold."""
    grid = len(tokens)
    step = (image_size - 29) // 4 // grid            # positions a token
    rows, columns = (((np.arange(n) + 0.5) * image_size / n - 16.5 - 2 * (step - 1)) / (4 * step) for n in (height, width))
    weight = [np.maximum(0, 1 - np.abs(np.clip(at, 0, grid - 1)[:, None] - np.arange(grid))) for at in (rows, columns)]
    return (weight[0] @ np.asarray(tokens, np.float64) @ weight[1].T).astype(np.float32)


def overlay(photo: Image.Image, tokens, image_size: int) -> Image.Image:
    """The photo with what is unlike the validation normals in red: clear from 3 standard deviations, full from 12."""
    heat = place(tokens, image_size, photo.height, photo.width)
    glow = Image.fromarray((np.clip((heat - 3) / 9, 0, 1) * 180).astype(np.uint8))
    return Image.composite(Image.new("RGB", photo.size, (255, 30, 0)), photo, glow)


def components(mask) -> list[np.ndarray]:
    """mask (H, W) bool -> each 8-connected region as a bool mask, by union of the runs of neighbouring rows."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (row, start), end = np.nonzero(edges == 1), np.nonzero(edges == -1)[1]       # runs, row by row
    parent = list(range(len(row)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first = np.searchsorted(row, np.arange(len(mask) + 1))                        # of each row's runs
    for y in range(1, len(mask)):
        above, here = first[y - 1], first[y]
        while above < first[y] and here < first[y + 1]:
            if start[above] <= end[here] and start[here] <= end[above]:           # they touch, corners included
                parent[root(above)] = root(here)
            if end[above] < end[here]:
                above += 1
            else:
                here += 1
    found = {}
    for i in range(len(row)):
        found.setdefault(root(i), np.zeros_like(mask))[row[i], start[i]:end[i]] = True
    return list(found.values())


def localisation(photos) -> dict[str, float]:
    """How well maps find defects: pixel AUROC; AUPRO, the mean overlap of the connected regions of the masks up to a false
    positive rate of 0.3, divided by 0.3 (MVTec AD); sPRO, the mean saturated overlap of the ground-truth channels, likewise
    up to each of SPRO_LIMITS (MVTec LOCO). A pixel is predicted where its score is strictly above the threshold; false
    positives are counted over the defect-free pixels of all photos.

    photos() -> an iterator over (map (H, W), [(mask (H, W) bool, saturation area in pixels)]); called twice, so that memory
    is bounded by the defects' pixels and one photo. Exact, O(n log n): every score is a threshold. Raises InputError where
    there are no defects or no defect-free pixels.

    With regions r of n_r pixels above a threshold, a curve is mean_r min(n_r / saturation_r, 1) over the false positive rate.
    It is a sum of ramps, one a defect pixel: from the rate just above the pixel's score to the rate just below it.
    """
    regions, pixels, parts = [], [], []              # scores of the channels, of all defects, of the connected regions
    for scores, channels in photos():
        defect = np.zeros(scores.shape, bool)
        for mask, saturation in channels:
            regions.append((scores[mask], saturation))
            defect |= mask
        pixels.append(scores[defect])
        parts += [(scores[part], part.sum()) for part in components(defect)]
    values = np.unique(np.concatenate(pixels)) if pixels else np.empty(0)        # (U,) every score of a defect's pixel
    if not len(values):
        raise InputError("localisation needs photos with ground-truth masks")
    below, equal = np.zeros(len(values) + 1, np.int64), np.zeros(len(values), np.int64)
    for scores, channels in photos():
        normal = scores[~np.logical_or.reduce([mask for mask, _ in channels])] if channels else scores.ravel()
        at = np.searchsorted(values, normal)         # values[at - 1] < normal <= values[at]
        below += np.bincount(at, minlength=len(values) + 1)
        same = at[values[np.minimum(at, len(values) - 1)] == normal]
        equal += np.bincount(same[same < len(values)], minlength=len(values))
    total = below.sum()
    if not total:
        raise InputError("localisation needs defect-free pixels")
    above = (total - below.cumsum()[:-1]) / total    # (U,) false positive rate just above each value
    beside = above + equal / total                   # and just below it

    def area(curves, limit):
        """Area under the mean of the curves up to a false positive rate, divided by it."""
        height = np.zeros(len(values))               # of each value's ramp
        for scores, saturation in curves:
            at, count = np.unique(np.searchsorted(values, scores), return_counts=True)
            reached = np.minimum(np.cumsum(count[::-1]) / saturation, 1)          # from the highest score down
            height[at[::-1]] += np.diff(reached, prepend=0) / len(curves)
        ramp = np.where(beside <= limit, limit - (above + beside) / 2,
                        np.maximum(limit - above, 0) ** 2 / (2 * np.maximum(beside - above, 1e-300)))
        return float(height @ ramp / limit)

    return {"pixel AUROC": area([(np.concatenate(pixels), sum(map(len, pixels)))], 1.0), "AUPRO": area(parts, 0.3),
            **{f"sPRO {limit:g}": area(regions, limit) for limit in SPRO_LIMITS}}


# Reading runs

@dataclass(frozen=True)
class Run:
    """One run folder: its settings and the scores of n validation and test images."""
    folder: Path
    config: dict
    category: np.ndarray                            # (n,) str
    kind: np.ndarray                                # (n,) str
    test: np.ndarray                                # (n,) bool, False: validation
    s_hvq: np.ndarray                               # (n,) float64
    s_mim: np.ndarray                               # (n,) float64
    path: np.ndarray                                # (n,) str, below the folder of the categories


def find_runs(folders: list[Path]) -> list[Path]:
    """Run folders at or under the given ones, unfinished and broken ones too. Rows of ablations have tables of their own:
    they count only where `ablations` or a folder in it is named."""
    found = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; name a run or a folder of runs")
        for name in ("config.json", "checkpoint.pt", "scores.csv"):
            found.update({file.parent.resolve(): file.parent for file in folder.rglob(name)
                          if "ablations" not in file.relative_to(folder).parts})
    return sorted(found.values())


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")      # as a photo's name may hold any bytes
    except OSError as error:
        raise InputError(f"{file} can't be read ({error}): train the run again") from None


def read_config(file: Path) -> dict:
    try:
        config = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not JSON ({error}): train the run again") from None
    for key, kind in CONFIG.items():
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise InputError(f"{file} has no valid {key!r}: train the run again")
    return config


def read_scores(file: Path) -> list[tuple]:
    """scores.csv -> rows (category, kind, is test, s_hvq, s_mim, path), each checked."""
    text, rows, paths = read_text(file), [], set()
    try:
        lines = list(csv.reader(io.StringIO(text)))
    except csv.Error:
        lines = []
    if lines[:1] != [HEADER] or len(lines) < 2 or not text.endswith("\n"):
        raise InputError(f"{file} is truncated or no table of {','.join(HEADER)}: train the run again")
    for number, line in enumerate(lines[1:], 2):
        try:
            path, split, kind, label, *scores = line
            s_hvq, s_mim, _ = scores = [float(s) for s in scores]
        except ValueError:
            raise InputError(f"{file}, line {number} is truncated or not {','.join(HEADER)}") from None
        if not all(map(math.isfinite, scores)):
            raise InputError(f"{file}, line {number} holds a score that is NaN or infinite")
        if split not in ("validation", "test") or label != str(int(kind != "good")) or "/" not in path or path in paths:
            raise InputError(f"{file}, line {number}: split, kind, label or path is wrong, or the path a repeat")
        paths.add(path)
        rows.append((path.split("/")[0], kind, split == "test", s_hvq, s_mim, path))
    return rows


def read_run(folder: Path) -> Run:
    config = read_config(folder / "config.json")
    if not (folder / "scores.csv").exists():
        raise InputError(f"{folder} is unfinished, it has no scores.csv yet: finish it with the command that began it")
    return Run(folder, config, *map(np.array, zip(*read_scores(folder / "scores.csv"))))


# Scoring one category of one run

def moments(reference) -> tuple[float, float]:
    """Mean and standard deviation of reference (m,). One lone photo, or several alike, must divide nothing by 0: the std is at
    least 1 % of the mean, and 1 where both are next to nothing, as that of a score which was standardised before is."""
    mean, std = float(np.mean(reference)), float(np.std(reference))
    std = max(std, 0.01 * abs(mean))
    return mean, std if std > 1e-6 else 1.0


def standardise(s, reference):
    """s (n,), reference (m,) -> (s − mean) / std, both of the reference."""
    mean, std = moments(reference)
    return (s - mean) / std


def threshold(normals, percent: int = PERCENTILE) -> float:
    """The score that (100 - percent) % of further photos like the n normals will exceed: the percent·(n + 1)/100-th smallest
    of them, between two interpolated. Expected shares above the order statistics of exchangeable photos are k / (n + 1), so
    that is the unbiased choice; NumPy's default would let 8 % through for n = 30. Never above the largest of the n."""
    return float(np.percentile(np.asarray(normals, np.float64), percent, method="weibull"))


def anomaly_groups(kinds) -> dict[str, list[str]]:
    """The test split's kinds -> the anomalies behind each AUROC: LOCO's two kinds or, where defects have other names,
    all of them and each by its own name."""
    anomalies = sorted(set(kinds) - {"good"})
    if set(anomalies) <= set(LOCO_KINDS):
        return {LOCO_KINDS[kind]: [kind] for kind in anomalies}
    return {ANY: anomalies, **{kind: [kind] for kind in anomalies}}


def best_f1(anomaly, scores) -> float:
    """The threshold of the highest F1 score: its choice needs the labels, so its figures are a bound, not a forecast."""
    anomaly, scores = np.asarray(anomaly, bool), np.asarray(scores, np.float64)
    values = np.unique(scores)                       # flagged is what reaches a value
    hits = anomaly.sum() - np.searchsorted(np.sort(scores[anomaly]), values)
    flagged = len(scores) - np.searchsorted(np.sort(scores), values)
    return float(np.nextafter(values[np.argmax(2 * hits / (flagged + anomaly.sum()))], -np.inf))


def interval(wrong, resamples: int = 2000) -> tuple[float, float]:
    """wrong (n,): how often each of n images was judged wrongly -> 95 % confidence interval of their mean, by bootstrap over
    the images."""
    wrong, rng = np.asarray(wrong, np.float64), np.random.default_rng(0)
    means = wrong[rng.integers(len(wrong), size=(resamples, len(wrong)))].mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def evaluate(run: Run, category: str, over: str = "validation") -> dict:
    """One category of a run -> its record: who it is, each detector's AUROCs, error rates at the threshold.

    over: "validation", or "test" for the leak: the split whose mean and std standardise the two scores.
    """
    test, normals = ((run.category == category) & part for part in (run.test, ~run.test & (run.kind == "good")))
    good = run.kind[test] == "good"
    if not normals.any():
        raise InputError(f"{run.folder}: {category} has no validation normals to standardise scores with")
    if good.all() or not good.any():
        raise InputError(f"{run.folder}: no AUROC for {category}, whose test split has {good.sum()} good images and "
                         f"{(~good).sum()} anomalies")
    reference = test if over == "test" else normals
    both = standardise(run.s_hvq, run.s_hvq[reference]) + standardise(run.s_mim, run.s_mim[reference])
    groups = anomaly_groups(run.kind[test])
    record = {**{key: run.config[key] for key in CONFIG}, "run": str(run.folder), "category": category,
              "commit": run.config["commit"] or "unknown",
              "trained on": "each alone" if run.config["category"] == category else run.config["category"],
              "settings": {key: value for key, value in run.config.items() if key not in NOT_SETTINGS},
              "tested": hashlib.sha256("\n".join(run.path[test]).encode(errors="surrogateescape")).hexdigest()[:16],
              "images": {kind: int((run.kind[test] == kind).sum()) for kind in sorted(set(run.kind[test]))},
              "columns": (ANY,) if ANY in groups else ("logical", "structural", "average"), "missed": {}}
    thresholds = {f"{p}th percentile": threshold(both[normals], p) for p in (PERCENTILE, 99)}
    thresholds[BOUND] = best_f1(~good, both[test])
    record["wrong"] = {name: {kind: (~over if kind != "good" else over).astype(int).tolist() for kind, over in
                              {"good": both[test][good] > t, **{kind: both[test][np.isin(run.kind[test], kinds)] > t
                                                                for kind, kinds in groups.items()}}.items()}
                       for name, t in thresholds.items()}
    flagged = both[test] > thresholds[f"{PERCENTILE}th percentile"]
    record["false alarms"] = {"good": float(flagged[good].mean())}
    for detector, s in {"hvq": run.s_hvq[test], "mim": run.s_mim[test], "both": both[test]}.items():
        record[detector] = {}
        for name, kinds in groups.items():
            anomalies = np.isin(run.kind[test], kinds)
            record["missed"][name] = float((~flagged[anomalies]).mean())
            record[detector][name] = auroc(anomalies[good | anomalies], s[good | anomalies])
        if {"logical", "structural"} <= groups.keys():
            record[detector]["average"] = (record[detector]["logical"] + record[detector]["structural"]) / 2
    return record


def read_maps(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """maps.npz: each photo's path in scores.csv -> {"structural", "logical", "sum"}: (g, g), in standard deviations of the
    validation normals."""
    file = run.folder / "maps.npz"
    try:
        with np.load(file, allow_pickle=False) as found:
            paths, maps = found["path"].tolist(), found["maps"]                   # (n,), (n, 2, g, g)
        return {path: {"structural": a, "logical": b, "sum": a + b} for path, (a, b) in zip(paths, maps)}
    except Exception:                                # numpy raises a different class for each kind of damage
        raise InputError(f"{file}: missing or damaged, so nothing can be localised; train the run again") from None


def tested_photos(run: Run, category: str) -> tuple[Path, list[data.Photo], dict]:
    """The data set's folder, the test photos of a category that the run scored, and its maps, `read_maps`."""
    root = Path(run.config.get("root", ""))
    if not (run.config.get("root") and (root / category).is_dir()):
        raise InputError(f"{run.folder}: its photos are no longer at {root / category}, so {category} is not localised")
    maps, scored = read_maps(run), int(((run.category == category) & run.test).sum())
    photos = [photo for photo in data.find_photos(root, category, run.config["seed"])
              if photo.split == "test" and photo.path.relative_to(root).as_posix() in maps]
    if len(photos) < scored:
        raise InputError(f"{run.folder}: {scored - len(photos)} of the {scored} test photos it scored are no longer in "
                         f"{root / category}; put them back, or train again")
    return root, photos, maps


def photo_size(photo: data.Photo) -> tuple[int, int]:
    """Height and width."""
    return data.open_image(photo.path).size[::-1]


def localise(run: Run, category: str) -> dict:
    """-> {map: {kind: `localisation`}} over each kind's test photos and the good ones. MVTec AD's classes are one kind."""
    root, photos, maps = tested_photos(run, category)
    size, defects = run.config["image_size"], data.load_defects(root, category)
    if any(photo.label and not photo.masks for photo in photos):
        raise InputError(f"{run.folder}: {category} has anomalies without ground-truth masks, so it is not localised")
    found = {}
    for name, kinds in anomaly_groups([photo.kind for photo in photos]).items():
        for part in MAPS if name in (ANY, *LOCO_KINDS.values()) else ():
            def stream(kinds=kinds, part=part):
                for photo in photos:
                    if photo.kind in ("good", *kinds):
                        shape, regions = photo_size(photo), data.load_regions(photo, defects)
                        if any(mask.shape != shape for mask, _ in regions):
                            raise InputError(f"{photo.masks[0]}: {regions[0][0].shape[1]} x {regions[0][0].shape[0]} pixels, its "
                                             f"photo {shape[1]} x {shape[0]}; masks must have their photo's size")
                        yield place(maps[photo.path.relative_to(root).as_posix()][part], size, *shape), regions
            found.setdefault(part, {})[name] = localisation(stream)
    return found


def localisation_tables(records: list[dict]) -> tuple[list[tuple], list[str]]:
    """A table a data set: pixel AUROC, AUPRO and sPRO at 5 % a category, map and kind, mean and std over seeds."""
    groups, problems = {}, []
    for record in records:
        try:
            for part, kinds in localise(read_run(Path(record["run"])), record["category"]).items():
                for kind, figures in kinds.items():
                    key = data_title(record), record["category"], *(record[name] for name in GROUP), part, kind
                    groups.setdefault(key, []).append(figures)
        except InputError as error:
            problems.append(str(error))
    tables, names = {}, ("pixel AUROC", "AUPRO", "sPRO 0.05")
    for (title, category, *group, part, kind), seeds in sorted(groups.items()):
        figures = [[found[name] for found in seeds] for name in names]
        cells = [Spread(float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else None, len(v)) for v in figures]
        tables.setdefault(title, []).append([category, *group, str(len(seeds)), kind, MAPS[part], *cells])
    header = ["category", *GROUP, "seeds", "kind", "map", "pixel AUROC", "AUPRO to 30 % FPR", "sPRO to 5 % FPR"]
    return [(f"{title}: localisation %", header, rows) for title, rows in tables.items()], problems


def write_maps(runs: list[Path], folder: Path) -> None:
    """folder/CATEGORY/test/KIND/NAME.tiff, float32, at the photo's size: what MVTec's evaluation scripts read."""
    written = set()
    for path in runs:
        run = read_run(path)
        for category in sorted(set(run.category.tolist())):
            if category in written:
                raise InputError(f"--maps {folder}: two runs of {category}; name one run")
            written.add(category)
            root, photos, maps = tested_photos(run, category)
            if folder.resolve() == root.resolve():
                raise InputError(f"--maps {folder}: holds the photos themselves; name another folder")
            for photo in photos:
                relative = photo.path.relative_to(root)
                found = place(maps[relative.as_posix()]["sum"], run.config["image_size"], *photo_size(photo))
                out = folder / category / "test" / photo.kind / f"{relative.stem}.tiff"
                try:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(found).save(out)
                except OSError as error:
                    raise InputError(f"--maps {folder}: cannot be written ({error.strerror}); name another folder") from None


def evaluate_runs(folders: list[Path], over: str = "validation") -> tuple[list[dict], list[str]]:
    """Run folders -> records, and a line on each run, or category of one, that could not be scored."""
    records, problems = [], []
    for folder in folders:
        try:
            run = read_run(folder)
        except InputError as error:
            problems.append(str(error))
            continue
        for category in sorted(set(run.category.tolist())):
            try:
                records.append(evaluate(run, category, over))
            except InputError as error:
                problems.append(str(error))
    return records, problems


# Means over seeds and categories

GROUP = ("preset", "commit", "trained on")          # runs of one data set that agree in these differ in seed only


def grouped(records: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return dict(sorted(groups.items()))


def tell_apart(records: list[dict]) -> tuple[list[dict], list[str]]:
    """Keeps ablations from passing for seeds or categories: settings that differ between runs of one preset and commit join
    the preset's name. Returns the records without those that repeat a seed, and a line on each of these."""
    for same in grouped(records, "data", "rendered", *GROUP).values():
        keys = set().union(*(r["settings"] for r in same))
        differ = {key for key in keys if len({repr(r["settings"].get(key)) for r in same}) > 1}
        for record in same:
            record["preset"] += "".join(f" {key}={record['settings'].get(key)}" for key in sorted(differ))
    kept, left_out = [], []
    for first, *repeats in grouped(records, "data", "rendered", *GROUP, "category", "seed").values():
        kept.append(first)
        left_out += [f"{r['run']} is left out: {r['category']}, seed and settings of {first['run']}" for r in repeats]
    return kept, left_out


@dataclass(frozen=True)
class Spread:
    """A figure in a table: mean, sample std over seeds (None: there is none), number of seeds (None: unknown), and a 95 %
    confidence interval where there is one."""
    mean: float
    std: float | None = None
    seeds: int | None = None
    interval: tuple[float, float] | None = None


def spread(records: list[dict], part: str, name: str) -> Spread | None:
    """Mean of record[part][name] over seeds and categories; std of each seed's mean over categories.

    With one seed there is no std, nor where categories don't share their seeds: it would mix the two. Where a record
    lacks the figure there is none at all.
    """
    if not records or any(name not in record[part] for record in records):
        return None
    by_category = [{r["seed"]: r[part][name] for r in rs} for rs in grouped(records, "category").values()]
    if any(values.keys() != by_category[0].keys() for values in by_category):
        return Spread(float(np.mean([np.mean(list(values.values())) for values in by_category])))
    per_seed = np.mean([[values[seed] for seed in by_category[0]] for values in by_category], axis=0)     # (seeds,)
    return Spread(float(per_seed.mean()), float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None, len(per_seed))


def seeds(records: list[dict]) -> str:
    return str(spread(records, "false alarms", "good").seeds or "not shared")


# Tables: (title, header, rows). A cell is text, a Spread, a list of Spreads or None.

def result_rows(records, columns):
    """A row a category and group, a cell a (part, name) of columns; then each group's mean over categories."""
    def row(label, group, rs):
        return [label, *group, seeds(rs), *(spread(rs, *column) for column in columns)]

    means = [(group, rs) for group, rs in grouped(records, *GROUP).items() if len(grouped(rs, "category")) > 1]
    return ([row(category, group, rs) for (category, *group), rs in grouped(records, "category", *GROUP).items()]
            + [row(f"mean of {len(grouped(rs, 'category'))}", group, rs) for group, rs in means])


def threshold_rows(records):
    """A row a category and threshold: the share of images judged wrongly, averaged over seeds image by image where all seeds
    had the same ones."""
    rows = []
    for (category, *group), rs in grouped(records, "category", *GROUP).items():
        for name in rs[0]["wrong"]:
            cells = []
            for kind in ["good", *(column for column in rs[0]["columns"] if column != "average")]:
                found = [r["wrong"][name].get(kind, []) for r in rs]              # (seeds, images)
                wrong = np.mean(found, 0) if len({r["tested"] for r in rs}) == 1 else np.concatenate(found)
                cells.append(None if not len(wrong) else Spread(float(wrong.mean()), seeds=len(rs), interval=interval(wrong)))
            rows.append([category, *group, seeds(rs), name, *cells])
    return rows


def defect_rows(records):
    return [[category, defect, *group, seeds(rs), spread(rs, "both", defect), spread(rs, "missed", defect)]
            for (category, *group), rs in grouped(records, "category", *GROUP).items()
            for defect in rs[0]["missed"] if defect != ANY]


def scoring_rows(records, columns):
    """Table 5: each detector alone and both, mean over the records' categories."""
    return [[label, *(spread(records, detector, name) for name in columns)] for detector, label in DETECTORS.items()]


def reported(figures: dict, system: str) -> Spread:
    std = figures.get(f"{system}_std")
    return Spread(figures[system] / 100, None if std is None else std / 100)


def systems(figures: dict) -> list[str]:
    """The systems that the paper reports, its own first."""
    return sorted((name for name in figures if not name.endswith("_std")), key=lambda name: name != "LADMIM")


def beside_rows(records, table, categories):
    """Table 2 or 3, ours on top: cells [logical, structural] a category and their mean, then overall. Ours has means
    only where it has all categories: fewer don't compare."""
    rows, kinds = [], ("logical", "structural")
    for group, rs in grouped([r for r in records if r["category"] in categories], *GROUP).items():
        cells = [[r for r in rs if r["category"] == category] for category in categories]
        cells.append(rs if all(cells) else [])
        rows.append([f"ours, {', '.join(group)}, seeds: {seeds(rs)}",
                     *([spread(cell, "both", kind) for kind in kinds] if cell else None for cell in cells),
                     spread(cells[-1], "both", "average")])
    return rows + [[f"{system}, reported", *([reported(table[kind][c], system) for kind in kinds]
                                             for c in [*categories, "average"]), reported(table["overall"], system)]
                   for system in systems(table["overall"])]


def loco_tables(records, title, paper):
    """The paper's Tables 5, 2 and 3. Where our data is rendered, not MVTec's, its rows stand in tables of their own."""
    rendered, categories, columns = records[0]["rendered"], paper["categories"], ("structural", "logical", "average")
    header = ["scoring", *GROUP, "seeds", *columns]
    scoring = [[label, *group, seeds(rs), *cells] for group, rs in grouped(records, *GROUP).items()
               for label, *cells in scoring_rows(rs, columns)]
    theirs = [[f"{DETECTORS[detector]}, reported", *"––––", *(reported(figures, name) for name in columns)]
              for detector, figures in zip(DETECTORS, paper["table5_scoring_ablation"].values())]
    ours = f"{title}: AUROC %, detectors alone and together (Table 5), mean over categories"
    if not {r["category"] for r in records} & set(categories):
        return [(ours, header, scoring)]
    reference = "REFERENCE ONLY, not comparable with rendered data: reported on MVTec's photos" if rendered else title
    tables = [(ours, header, scoring), (f"{reference}: Table 5", header, theirs)] if rendered else \
        [(ours, header, scoring + theirs)]
    for name, key, multi in (("Table 2, one model a category", "table2_single_class", False),
                             ("Table 3, one model for all", "table3_multi_class", True)):
        rs = [r for r in records if (r["trained on"] != "each alone") == multi]
        if rs:
            tables.append((f"{reference}: {name}, AUROC % logical / structural",
                           ["system", *categories, "mean", "overall"],
                           beside_rows([] if rendered else rs, paper[key], categories)))
    return tables


def mvtec_ad_tables(records, title, paper):
    """The paper's Table 4, for MVTec AD's categories."""
    if records[0]["rendered"] or not {r["category"] for r in records} <= MVTEC_AD:
        return []
    rows = [[f"ours, {', '.join(group)}, seeds: {seeds(rs)}", f"{len(grouped(rs, 'category'))} of 15",
             spread(rs, "both", ANY)] for group, rs in grouped(records, *GROUP).items()]
    figures = paper["table4_mvtec_ad_average"]
    rows += [[f"{system}, reported", "15 of 15", reported(figures, system)] for system in systems(figures)]
    return [(f"{title}: Table 4, MVTec AD", ["system", "categories", "image AUROC %"], rows)]


def data_title(record: dict) -> str:
    return f"{record['data']} (rendered twin, not MVTec's photos)" if record["rendered"] else record["data"]


def all_tables(records: list[dict]) -> list[tuple]:
    """Every table, data set by data set: rendered data and photos, LOCO's kinds and other defects never share one."""
    paper, tables = json.loads(REPORTED.read_text(encoding="utf-8")), []
    for (_, _, columns), rs in grouped(records, "data", "rendered", "columns").items():
        title, key, loco = data_title(rs[0]), ["category", *GROUP, "seeds"], len(columns) > 1
        missed = [name for name in columns if name != "average"]
        tables.append((f"{title}: {'' if loco else 'image '}AUROC %", key + list(columns),
                       result_rows(rs, [("both", name) for name in columns])))
        if not loco:
            tables.append((f"{title}: by defect", ["category", "defect", *key[1:], "AUROC %", "missed %"],
                           defect_rows(rs)))
        tables.append((f"{title}: errors % at the {PERCENTILE}th percentile of the validation normals' scores",
                       key + ["false alarms", *(f"missed {name}" for name in missed)],
                       result_rows(rs, [("false alarms", "good"), *(("missed", name) for name in missed)])))
        tables.append((f"{title}: errors % at three thresholds, with 95 % confidence intervals (bootstrap over images)",
                       key + ["threshold", "false alarms", *(f"missed {name}" for name in missed)], threshold_rows(rs)))
        tables += (loco_tables if loco else mvtec_ad_tables)(rs, title, paper)
    return tables


def cell_text(cell) -> str:
    if isinstance(cell, list):
        return " / ".join(map(cell_text, cell))
    if isinstance(cell, Spread):
        if cell.interval:
            return f"{100 * cell.mean:.1f} [{100 * cell.interval[0]:.1f}, {100 * cell.interval[1]:.1f}]"
        return f"{100 * cell.mean:.1f}" + ("" if cell.std is None else f" ± {100 * cell.std:.1f}")
    return "–" if cell is None else cell


def markdown(title: str, header: list, rows: list, banner: str = "") -> str:
    lines = [list(map(cell_text, row)) for row in [header, *rows]]
    width = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * w for w in width])
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width)) + " |" for line in lines]
    return "\n".join([f"## {title}", "", *([f"**{banner}**", ""] if banner else []), *lines])


def run_table(run_dir) -> str:
    """One run in Markdown: each detector alone and both, category by category; a line on each that can't be scored."""
    records, problems = evaluate_runs([Path(run_dir)])
    if not records:
        return "\n".join(problems)
    columns = list(dict.fromkeys(name for r in records for name in r["columns"]))
    rows = [[r["category"], *row] for r in records for row in scoring_rows([r], columns)]
    if len(records) > 1:
        rows += [[f"mean of {len(records)}", *row] for row in scoring_rows(records, columns)]
    title = f"{data_title(records[0])}, {Path(run_dir).name}: AUROC %"
    return "\n".join([markdown(title, ["category", "scoring", *columns], rows), *problems])


# Command line

def write_json(file: Path, report: dict) -> None:
    """Replaces an earlier report; refuses to write over anything else."""
    text = json.dumps({"made_by": "eval.py", **report}, indent=1, default=asdict)
    try:
        if file.exists() and not file.read_bytes().startswith(text[:text.index(",")].encode()):
            raise InputError(f"--json {file} exists and is no report of eval.py: name another file")
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise InputError(f"--json {file} can't be written ({error}): name another file") from None


def refuse(message: str):
    raise InputError(message)


def parse(argv):
    parser = argparse.ArgumentParser(description="AUROC of trained runs beside the paper's, in Markdown and JSON.")
    parser.add_argument("paths", nargs="*", type=Path, metavar="RUN_OR_FOLDER", help="default: every run under --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--standardise", choices=("validation", "test"), default="validation",
                        help="split that standardises the scores; test leaks, and every table says so")
    parser.add_argument("--localise", action="store_true", help="pixel AUROC, AUPRO and sPRO as well, some seconds a run")
    parser.add_argument("--maps", type=Path, metavar="DIR", help="write each test photo's anomaly map there, as a TIFF")
    parser.add_argument("--ablation", choices=("scoring", "combine", "masking", "target", "width", "multi", "score", "leak"),
                        help="train what is missing and print this table; --category, --seeds, --preset and --data as in train")
    parser.add_argument("--baselines", action="store_true", help="train PatchCore, EfficientAD-S and PUAD beside each run")
    parser.add_argument("--category", default="all")
    parser.add_argument("--seeds", default="0", help="as in 0-4")
    parser.add_argument("--preset", choices=("paper", "fast", "tiny"), default="tiny")
    parser.add_argument("--data")
    parser.add_argument("--json", type=Path, help="default: eval.json in the folder of runs")
    parser.add_argument("--report", type=Path, metavar="FILE", help="default: eval.html in the folder of runs")
    parser.error = refuse                           # one line and exit code 2, like every other error
    return parser.parse_args(argv)


def compare(folders: list[Path], args) -> int:
    """bench/baselines.py's table of these runs, printed and written beside them."""
    from bench import baselines

    records, problems = evaluate_runs(folders)
    records, repeats = tell_apart(records)
    rows = []
    for record in records:
        try:
            rows += baselines.compare(read_run(Path(record["run"])), record, Path("cache"))
        except InputError as error:                  # the others' hours are not thrown away
            problems.append(str(error))
    tables = [baselines.table(rs) for rs in grouped(rows, "data", "rendered", *GROUP, "columns").values()]
    write_json(args.json or args.runs / "baselines.json", {
        "records": rows, "tables": [dict(zip(("title", "header", "rows"), table)) for table in tables]})
    return show(tables, problems + repeats)


def show(tables: list[tuple], problems: list[str], banner: str = "") -> int:
    """Prints the tables, then a warning for each problem. -> exit code"""
    if tables:
        print("\n\n".join([PROTOCOL.format(banner or STANDARDISED), *(markdown(*table, banner) for table in tables)]))
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return 1 if problems else 0


def ablate(args) -> int:
    """One of bench/ablations.py's tables, printed and written beside the runs."""
    import ladmim                                    # the model imports this file, so the other way round it must wait
    from bench import ablations

    try:
        seeds = ladmim.seed_list(args.seeds)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"--seeds: {error}") from None
    rows = ablations.ablate(args.ablation, args.data, args.preset, args.category, seeds, args.runs)
    tables = ablations.tables(args.ablation, rows)
    banner = SHORTCUTS if args.ablation == "leak" else ""
    write_json(args.json or args.runs / f"ablation-{args.ablation}.json", {
        "records": rows, "tables": [dict(zip(("banner", "title", "header", "rows"), (banner, *table))) for table in tables]})
    return show(tables, [], banner)


def main(argv=None) -> int:
    try:
        args = parse(argv)
        if args.ablation:
            return ablate(args)
        folders = find_runs(args.paths or ([args.runs] if args.runs.exists() else []))
        if not folders:
            raise InputError(f"no runs under {', '.join(map(str, args.paths or [args.runs]))}: make one with "
                             "`python ladmim.py train --category breakfast_box`")
        if args.baselines:
            return compare(folders, args)
        records, problems = evaluate_runs(folders, args.standardise)
        records, repeats = tell_apart(records)
        problems, tables = problems + repeats, all_tables(records)
        if args.localise:
            more, failed = localisation_tables(records)
            tables, problems = tables + more, problems + failed
        if args.maps:
            write_maps(folders, args.maps)
        banner = LEAKS if args.standardise == "test" else ""
        write_json(args.json or args.runs / "eval.json", {
            "standardise": args.standardise, "problems": problems, "records": records,
            "tables": [dict(zip(("banner", "title", "header", "rows"), (banner, *table))) for table in tables]})
        from bench import report                     # it needs the model, and the model this file
        report.write(args.report or args.runs / "eval.html", tables, records, banner)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what was finished", file=sys.stderr)
        return 130
    return show(tables, problems, banner)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")        # a terminal that has no "±" still gets its table
    import eval as this                             # one module, under the name that ladmim.py and bench/ know it by
    sys.exit(data.as_process(this.main))
