"""The paper's ablations: python eval.py --ablation NAME

Trains what is missing, goes on with what was stopped, and prints the table, the paper's beside it. A row is trained with the
settings named here; HVQ-Trans, or both models, come from the category's ordinary run wherever the row leaves them alone, so
nothing is trained twice. Rows lie under runs/ablations, ordinary runs where `ladmim.py train` puts them.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import eval as evaluation
import ladmim


def masks(kind: str, share: float) -> dict:
    """A training mask of this kind and share of the tokens; its least block stays the same part of it."""
    return {"mask": kind, "train_ratio": share, "train_block": round(share * 46 / 130, 4)}


# Name -> the paper's table in reported_results.json, and the settings of each row.
TARGETS = {name: {"target": name, "mim_score": "mean"} for name in ("pixel", "feature", "code", "histogram")}
ABLATIONS = {
    "scoring": ("table5_scoring_ablation", {"": {}}),
    "combine": ("table6_combined_with_hvq", TARGETS),
    "masking": ("table7_masking_multi_class_200_epochs", {
        "checkerboard": {"mask": "checkerboard"},
        **{f"{kind}-{share}": masks(kind, share) for kind in ("random", "block") for share in (0.2, 0.4, 0.6)}}),
    "target": ("table8_prediction_target", TARGETS),
    "width": (None, {f"{factor:g} times the preset's mim_width": {"mim_width": factor} for factor in (0.25, 0.5, 1, 2)}),
    "multi": (None, {"each alone": {}, "one model": {}}),
    "score": (None, {
        **{f"HVQ {hvq}, MIM {mim}": {"hvq_score": hvq, "mim_score": mim}
           for hvq, mim in (("mean", "mean"), ("max", "mean"), ("whitened", "mean"), ("whitened", "whitened"))},
        "both whitened, masks of 230 of 576": {"hvq_score": "whitened", "mim_score": "whitened",
                                               "score_ratio": 230 / 576, "score_block": 92 / 576}}),
    "leak": (None, {f"HVQ {score}": {"hvq_score": score, "mim_score": "mean"} for score in ("mean", "max")}),
}


def train(data: str, preset: str, category: str, seed: int, folder: Path, settings: dict, take: Path | None):
    """One run, unless it is there and finished. Raises InputError where the folder holds a run of other settings."""
    if (folder / "checkpoint.pt").exists():
        state = ladmim.load_checkpoint(folder / "checkpoint.pt")
        wanted = dataclasses.asdict(ladmim.Config(**ladmim.PRESETS[preset] | settings))
        held = dataclasses.asdict(ladmim.Config()) | state["config"]              # a setting that came later had its default
        differ = [name for name, value in wanted.items() if held[name] != value]
        if differ:
            raise evaluation.InputError(f"{folder}: was trained with other {', '.join(differ)}; move it away")
        if state["stage"] == "done":
            return
    words = ["train", "--data", data, "--category", category, "--preset", preset, "--seed", str(seed), "--out", str(folder)]
    words += ["--take", str(take)] if take else []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    print(f"{folder}", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):     # standard output is the table's
        ladmim.train(ladmim.build_parser().parse_args(words))


def ablate(name: str, data: str | None, preset: str, category: str, seeds: list[int], runs: Path):
    """-> {row: [records]} of one ablation, `eval.evaluate`'s; leak's rows are named by how scores were standardised, too."""
    root, categories = ladmim.find_data(argparse.Namespace(data=data, category=category))
    data, category = str(root), category if category == "all" else ",".join(categories)      # as `train` names its folder
    home, rows, usual = runs / root.resolve().name, {}, ladmim.Config(**ladmim.PRESETS[preset])
    for label, settings in ABLATIONS[name][1].items():
        if name == "width":
            settings = {"mim_width": int(settings["mim_width"] * usual.mim_width)}
        settings = {key: value for key, value in settings.items() if getattr(usual, key) != value}
        for seed in seeds:
            for group in [category] if label == "one model" else categories:
                base = folder = home / f"{group}-{preset}-seed{seed}"
                train(data, preset, group, seed, base, {}, None)
                if settings:                         # else the row is the ordinary run
                    row = ",".join(f"{key}={value}" for key, value in settings.items())
                    folder = runs / "ablations" / home.name / f"{group}-{preset}-{row}-seed{seed}"
                    train(data, preset, group, seed, folder, settings, base)
                run = evaluation.read_run(folder)
                for one in categories if group == category else [group]:
                    for over in ("validation", "test") if name == "leak" else ("validation",):
                        key = f"{label}, standardised over {over}" if name == "leak" else label
                        rows.setdefault(key, []).append(evaluation.evaluate(run, one, over))
    if name == "leak":                               # the last of the published shortcuts: an AUROC under 50 is turned over
        for label in [label for label in rows if label.endswith("over test")]:
            rows[f"{label}, flipped"] = [record | {"both": flipped(record["both"])} for record in rows[label]]
    return rows


def flipped(figures: dict) -> dict:
    turned = {name: max(value, 1 - value) for name, value in figures.items() if name != "average"}
    return turned | {"average": sum(turned.values()) / len(turned)}


def tables(name: str, rows: dict) -> list[tuple]:
    """-> (title, header, rows) as eval.py prints them: ours, then the paper's. On photos they share a table."""
    records = next(iter(rows.values()))
    columns = ["structural", "logical", "average"] if len(records[0]["columns"]) > 1 else list(records[0]["columns"])
    categories = sorted({record["category"] for record in records})
    ours = []
    for label, found in rows.items():
        parts = {"scoring": evaluation.DETECTORS, "combine": {"mim": "MIM alone", "both": "and HVQ"}}.get(name, {"both": ""})
        for part, words in parts.items():
            each = [[evaluation.spread([r for r in found if r["category"] == one], part, column) for column in columns[:2]]
                    for one in categories]
            ours.append([" ".join(filter(None, (label, words))), evaluation.seeds(found),
                         *(evaluation.spread(found, part, column) for column in columns), *each])
    header = ["row", "seeds", *columns, *(f"{one}: {' / '.join(columns[:2])}" for one in categories)]
    title = f"{evaluation.data_title(records[0])}, {records[0]['preset'].split()[0]}: {name}, AUROC %, mean over categories"
    reported = json.loads(evaluation.REPORTED.read_text(encoding="utf-8"))
    paper = reported.get(ABLATIONS[name][0], {})
    if name == "multi":
        paper = {label: {"structural": table["structural"]["average"]["LADMIM"], "logical": table["logical"]["average"]["LADMIM"],
                         "average": table["overall"]["LADMIM"]} for label, table in (
                 ("each alone (Table 2)", reported["table2_single_class"]), ("one model (Table 3)", reported["table3_multi_class"]))}
    theirs = [[f"{label}, reported", "–", *(evaluation.Spread(figures[column] / 100) for column in columns),
               *[None] * len(categories)] for label, figures in paper.items() if isinstance(figures, dict)
              and set(columns) <= figures.keys()]
    if not theirs or not records[0]["rendered"]:
        return [(title, header, ours + theirs)]
    return [(title, header, ours), (f"REFERENCE ONLY, not comparable with rendered data: {name}, reported on MVTec's photos",
                                    header[:2 + len(columns)], [row[:2 + len(columns)] for row in theirs])]
