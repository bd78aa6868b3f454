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
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import ladmim  # noqa: E402
import runs  # noqa: E402
from data import InputError  # noqa: E402


def scores(hvq: str, mim: str, **more) -> dict:
    return {"hvq_score": hvq, "mim_score": mim, **more}


TARGETS = {name: {"target": name, "mim_score": "mean"}
           for name in ("pixel", "feature", "code", "histogram")}
MASKS = {"checkerboard": {"mask": "checkerboard"}}
for kind, share in itertools.product(("random", "block"), (0.2, 0.4, 0.6)):
    # Whatever share of the tokens a mask hides, its least block stays the same part of it.
    MASKS[f"{kind}-{share}"] = {"mask": kind, "train_ratio": share,
                                "train_block": round(share * 46 / 130, 4)}
# Name -> the settings of each row. "width" multiplies the preset's own.
ABLATIONS = {
    "scoring": {"": {}}, "combine": TARGETS, "masking": MASKS, "target": TARGETS,
    "width": {f"{factor:g} times the preset's mim_width": {"mim_width": factor}
              for factor in (0.25, 0.5, 1, 2)},
    "multi": {"each alone": {}, "one model": {}},
    "score": {"HVQ mean, MIM mean": scores("mean", "mean"),
              "HVQ max, MIM mean": scores("max", "mean"),
              "HVQ whitened, MIM mean": scores("whitened", "mean"),
              "both whitened": scores("whitened", "whitened"),
              "both whitened, masks of 230 of 576": scores(
                  "whitened", "whitened", score_ratio=230 / 576, score_block=92 / 576)},
    "leak": {"HVQ mean": scores("mean", "mean"), "HVQ max": scores("max", "mean")}}
PAPER = {"scoring": "table5_scoring_ablation", "combine": "table6_combined_with_hvq",
         "masking": "table7_masking_multi_class_200_epochs", "target": "table8_prediction_target"}
SHORTCUTS = ("rows \"over test\" LEAK, scores standardised with mean and std of the whole test "
             "set, anomalies included, and rows \"flipped\" turn over an AUROC under 50: what "
             "shortcuts in published code are worth, never to report")


def train(job: runs.Job) -> Path:
    """The folder of this run, trained unless it is there and finished."""
    if (job.out / "checkpoint.pt").exists():
        state = runs.load_checkpoint(job.out / "checkpoint.pt")
        held = vars(ladmim.Config()) | state["config"]
        differ = [name for name, value in vars(job.cfg).items() if held[name] != value]
        if differ:
            raise InputError(f"{job.out}: was trained with other {', '.join(differ)}; move it away")
        if state["stage"] == "done":
            return job.out
    print(f"{job.out}", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):     # standard output is the table's
        ladmim.train_run(job)
    return job.out


def train_row(job: runs.Job, settings: dict, folder: Path) -> Path:
    """-> the run in `folder` that has these settings and else those of job, an ordinary run. That
    one is trained, too: it gives what the settings leave alone, or is itself the row."""
    ordinary, usual = train(job), vars(job.cfg)
    settings = {key: value for key, value in settings.items() if usual[key] != value}
    if not settings:
        return ordinary
    row = ",".join(f"{key}={value}" for key, value in settings.items())
    out = folder / f"{job.category}-{job.preset}-{row}-seed{job.seed}"
    return train(replace(job, cfg=replace(job.cfg, **settings), out=out, take=ordinary))


def ablate(name: str, root: Path, categories: list[str], args) -> dict:
    """-> {row: [`eval.evaluate`'s records]} of one ablation."""
    usual, device, rows = ladmim.Config(**ladmim.PRESETS[args.preset]), runs.pick_device(None), {}
    home, folder = (args.runs / part / root.resolve().name for part in ("", "ablations"))
    for label, settings in ABLATIONS[name].items():
        if name == "width":
            settings = {"mim_width": int(settings["mim_width"] * usual.mim_width)}
        groups, called = [[one] for one in categories], ""
        if label == "one model":
            groups, called = [categories], "all" if args.category == "all" else ""
        for seed, names in itertools.product(args.seeds, groups):
            job = runs.Job(usual, args.preset, root, names, device, seed, called)
            job.out = home / job.out.name
            scored = evaluation.read_run(train_row(job, settings, folder))
            for one in names:
                for key, record in row_records(name, label, scored, one):
                    rows.setdefault(key, []).append(record)
    return rows


def row_records(name: str, label: str, scored: evaluation.ScoredRun, category: str):
    """Yields (row, record): of "leak", also those by the published shortcuts."""
    record = evaluation.evaluate(scored, category)
    yield f"{label}, standardised over validation" if name == "leak" else label, record
    if name == "leak":
        leaky = evaluation.evaluate(scored, category, "test")
        turned = {key: max(leaky["both"][key], 1 - leaky["both"][key])
                  for key in leaky["both"] if key != "average"}
        turned["average"] = sum(turned.values()) / len(turned)
        yield f"{label}, standardised over test", leaky
        yield f"{label}, standardised over test, flipped", leaky | {"both": turned}


def reported(name: str) -> dict:
    """The paper's rows of this table: label -> figures."""
    paper = json.loads(evaluation.REPORTED.read_text(encoding="utf-8"))
    rows = paper.get(PAPER.get(name), {})
    if name == "multi":
        for label, key in (("each alone (Table 2)", "table2_single_class"),
                           ("one model (Table 3)", "table3_multi_class")):
            rows[label] = {kind: paper[key][kind]["average"]["LADMIM"] for kind in evaluation.KINDS}
            rows[label]["average"] = paper[key]["overall"]["LADMIM"]
    return {label: row for label, row in rows.items() if label != "note"}


def tables(name: str, rows: dict) -> list[tuple]:
    """-> (title, header, rows) as eval.py prints them: ours, then the paper's. On photos they share
    a table."""
    first = next(iter(rows.values()))[0]
    columns = list(first["columns"])
    if len(columns) > 1:
        columns = ["structural", "logical", "average"]
    parts = {"scoring": evaluation.DETECTORS, "combine": {"mim": "MIM alone", "both": "and HVQ"}}
    ours, theirs = [], []
    for label, records in rows.items():
        by_category = evaluation.grouped(records, "category")
        for part, words in parts.get(name, {"both": ""}).items():
            row = [f"{label} {words}".strip(), evaluation.seeds(records)]
            row += [evaluation.spread(records, part, column) for column in columns]
            for same in by_category.values():
                row.append([evaluation.spread(same, part, column) for column in columns[:2]])
            ours.append(row)
    for label, row in reported(name).items():
        if set(columns) <= row.keys():
            cells = [evaluation.Spread(row[column] / 100) for column in columns]
            theirs.append([f"{label}, reported", "–", *cells])
    header = ["row", "seeds", *columns]
    each = [f"{one}: {' / '.join(columns[:2])}" for one, in by_category]
    title = (f"{evaluation.data_title(first)}, {first['preset']}: {name}, AUROC %, mean over "
             "categories")
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
