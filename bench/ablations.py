"""The paper's ablations: python bench/ablations.py NAME --category a,b --seeds 0-1

    scoring (Table 5), combine (6), masking (7), target (8), multi (2, 3), width (Figure 3);
    score and leak are ours: what each score, and what the published shortcuts are worth

Trains what is missing, goes on with what was stopped, and prints the table, the paper's beside it.
HVQ-Trans, or both models, come from the category's ordinary run wherever a row leaves them alone,
so nothing is trained twice. Rows lie under runs/ablations, ordinary runs where `train` puts them.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import ladmim  # noqa: E402
import runs  # noqa: E402
from data import InputError  # noqa: E402


def masks(kind: str, share: float) -> dict:
    """A training mask of this kind and share of the tokens; its least block stays the same part of
    it."""
    return {"mask": kind, "train_ratio": share, "train_block": round(share * 46 / 130, 4)}


def scores(hvq: str, mim: str, **more) -> dict:
    return {"hvq_score": hvq, "mim_score": mim, **more}


SHARES = (0.2, 0.4, 0.6)
TARGETS = {name: {"target": name, "mim_score": "mean"}
           for name in ("pixel", "feature", "code", "histogram")}
# Name -> the settings of each row. "width" multiplies the preset's own.
ABLATIONS = {
    "scoring": {"": {}},
    "combine": TARGETS,
    "masking": {"checkerboard": {"mask": "checkerboard"},
                **{f"random-{share}": masks("random", share) for share in SHARES},
                **{f"block-{share}": masks("block", share) for share in SHARES}},
    "target": TARGETS,
    "width": {f"{factor:g} times the preset's mim_width": {"mim_width": factor}
              for factor in (0.25, 0.5, 1, 2)},
    "multi": {"each alone": {}, "one model": {}},
    "score": {"HVQ mean, MIM mean": scores("mean", "mean"),
              "HVQ max, MIM mean": scores("max", "mean"),
              "HVQ whitened, MIM mean": scores("whitened", "mean"),
              "both whitened": scores("whitened", "whitened"),
              "both whitened, masks of 230 of 576": scores(
                  "whitened", "whitened", score_ratio=230 / 576, score_block=92 / 576)},
    "leak": {"HVQ mean": scores("mean", "mean"), "HVQ max": scores("max", "mean")},
}
SPLITS = {"leak": ("validation", "test")}            # whose mean and std standardise the scores
PAPER = {"scoring": "table5_scoring_ablation", "combine": "table6_combined_with_hvq",
         "masking": "table7_masking_multi_class_200_epochs", "target": "table8_prediction_target"}
SHORTCUTS = ("rows \"over test\" LEAK, scores standardised with mean and std of the whole test "
             "set, anomalies included, and rows \"flipped\" turn over an AUROC under 50: what "
             "shortcuts in published code are worth, never to report")


def train(job: runs.Job):
    """One run, unless it is there and finished. Standard output is the table's."""
    if (job.out / "checkpoint.pt").exists():
        state = runs.load_checkpoint(job.out / "checkpoint.pt")
        held = vars(ladmim.Config()) | state["config"]
        differ = [name for name, value in vars(job.cfg).items() if held[name] != value]
        if differ:
            raise InputError(f"{job.out}: was trained with other {', '.join(differ)}; move it away")
        if state["stage"] == "done":
            return
    print(f"{job.out}", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        ladmim.train_run(job)


def ablate(name: str, root: Path, categories: list[str], args) -> dict:
    """-> {row: [records]} of one ablation, `eval.evaluate`'s. leak's rows are named by how scores
    were standardised, too."""
    usual, device, rows = ladmim.Config(**ladmim.PRESETS[args.preset]), runs.pick_device(None), {}
    home = args.runs / root.resolve().name
    for label, settings in ABLATIONS[name].items():
        if name == "width":
            settings = {"mim_width": int(settings["mim_width"] * usual.mim_width)}
        settings = {key: value for key, value in settings.items() if getattr(usual, key) != value}
        together = label == "one model"
        groups = [categories] if together else [[one] for one in categories]
        for seed, names in itertools.product(args.seeds, groups):
            called = "all" if together and args.category == "all" else ",".join(names)
            job = runs.Job(usual, args.preset, root, names, device, seed, called,
                           home / f"{called}-{args.preset}-seed{seed}")
            train(job)
            if settings:                             # else the row is the ordinary run
                row = ",".join(f"{key}={value}" for key, value in settings.items())
                out = (args.runs / "ablations" / home.name
                       / f"{called}-{args.preset}-{row}-seed{seed}")
                job = dataclasses.replace(job, cfg=dataclasses.replace(usual, **settings),
                                          out=out, take=job.out)
                train(job)
            scored = evaluation.read_run(job.out)
            for one, over in itertools.product(names, SPLITS.get(name, ("validation",))):
                key = f"{label}, standardised over {over}" if name == "leak" else label
                rows.setdefault(key, []).append(evaluation.evaluate(scored, one, over))
    for label in [label for label in rows if label.endswith("over test")]:
        rows[f"{label}, flipped"] = [record | {"both": flipped(record["both"])}
                                     for record in rows[label]]
    return rows


def flipped(figures: dict) -> dict:
    turned = {name: max(value, 1 - value) for name, value in figures.items() if name != "average"}
    return turned | {"average": sum(turned.values()) / len(turned)}


def reported(name: str) -> dict:
    """The paper's rows of this table: label -> figures."""
    paper = json.loads(evaluation.REPORTED.read_text(encoding="utf-8"))
    if name != "multi":
        return paper.get(PAPER.get(name), {})
    rows = {}
    for label, key in (("each alone (Table 2)", "table2_single_class"),
                       ("one model (Table 3)", "table3_multi_class")):
        rows[label] = {kind: paper[key][kind]["average"]["LADMIM"] for kind in evaluation.KINDS}
        rows[label]["average"] = paper[key]["overall"]["LADMIM"]
    return rows


def tables(name: str, rows: dict) -> list[tuple]:
    """-> (title, header, rows) as eval.py prints them: ours, then the paper's. On photos they share
    a table."""
    first = next(iter(rows.values()))[0]
    columns = list(first["columns"])
    if len(columns) > 1:
        columns = ["structural", "logical", "average"]
    categories = sorted({record["category"] for records in rows.values() for record in records})
    parts = {"scoring": evaluation.DETECTORS, "combine": {"mim": "MIM alone", "both": "and HVQ"}}
    ours, theirs = [], []
    for label, records in rows.items():
        for part, words in parts.get(name, {"both": ""}).items():
            row = [f"{label} {words}".strip(), evaluation.seeds(records)]
            row += [evaluation.spread(records, part, column) for column in columns]
            for one in categories:
                of_one = [record for record in records if record["category"] == one]
                row.append([evaluation.spread(of_one, part, column) for column in columns[:2]])
            ours.append(row)
    for label, row in reported(name).items():
        if isinstance(row, dict) and set(columns) <= row.keys():
            cells = [evaluation.Spread(row[column] / 100) for column in columns]
            theirs.append([f"{label}, reported", "–", *cells])
    header = ["row", "seeds", *columns]
    each = [f"{one}: {' / '.join(columns[:2])}" for one in categories]
    title = (f"{evaluation.data_title(first)}, {first['preset'].split()[0]}: {name}, AUROC %, mean "
             "over categories")
    if theirs and first["rendered"]:
        reference = f"REFERENCE ONLY, not comparable with rendered data: {name}, reported for LOCO"
        return [(title, header + each, ours), (reference, header, theirs)]
    return [(title, header + each, ours + [row + [None] * len(each) for row in theirs])]


def parse(argv=None) -> argparse.Namespace:
    parser = data.Parser(prog="bench/ablations.py", description="The paper's ablations.")
    parser.add_argument("name", choices=ABLATIONS)
    parser.add_argument("--category", default="all")
    parser.add_argument("--seeds", type=runs.seed_list, default=[0], help="as in 0-4 (default 0)")
    parser.add_argument("--preset", choices=ladmim.PRESETS, default="tiny")
    parser.add_argument("--data", help="the folder that holds the category folders")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--json", type=Path, help="default: ablation-NAME.json in the runs' folder")
    return parser.parse_args(argv)


def print_tables(args) -> int:
    root, categories = data.find_data(args.data, args.category)
    rows = ablate(args.name, root, categories, args)
    banner = SHORTCUTS if args.name == "leak" else ""
    return evaluation.publish(f"ablation-{args.name}", args, tables(args.name, rows), rows, [],
                              banner)


def main(argv=None) -> int:
    return data.run_command(lambda: print_tables(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
