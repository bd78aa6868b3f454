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
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
PAPER = {"scoring": "table5_scoring_ablation", "combine": "table6_combined_with_hvq",
         "masking": "table7_masking_multi_class_200_epochs", "target": "table8_prediction_target"}
SHORTCUTS = ("rows \"over test\" LEAK, scores standardised with mean and std of the whole test "
             "set, anomalies included, and rows \"flipped\" turn over an AUROC under 50: what "
             "shortcuts in published code are worth, never to report")


def train(job: ladmim.Job):
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


def ablate(name: str, folder: str | None, preset: str, category: str, seeds: list[int],
           home: Path) -> dict:
    """-> {row: [records]} of one ablation, `eval.evaluate`'s. leak's rows are named by how scores
    were standardised, too. home: the folder of runs."""
    root, categories = data.find_data(folder, category)
    usual, device, rows = ladmim.PRESETS[preset], runs.pick_device(None), {}
    for label, settings in ABLATIONS[name].items():
        if name == "width":
            width = ladmim.Config(**usual).mim_width
            settings = {"mim_width": int(settings["mim_width"] * width)}
        ordinary = vars(ladmim.Config(**usual))
        settings = {key: value for key, value in settings.items() if ordinary[key] != value}
        together = label == "one model"
        for seed in seeds:
            for names in [categories] if together else [[one] for one in categories]:
                called = "all" if together and category == "all" else ",".join(names)
                base = home / root.resolve().name / f"{called}-{preset}-seed{seed}"
                cfg = ladmim.Config(**usual)
                train(ladmim.Job(cfg, preset, root, names, device, seed, called, base))
                run = base
                if settings:                         # else the row is the ordinary run
                    row = ",".join(f"{key}={value}" for key, value in settings.items())
                    run = (home / "ablations" / base.parent.name
                           / f"{called}-{preset}-{row}-seed{seed}")
                    cfg = ladmim.Config(**usual | settings)
                    train(ladmim.Job(cfg, preset, root, names, device, seed, called, run,
                                     take=base))
                for key, record in records_of(name, label, run, names):
                    rows.setdefault(key, []).append(record)
    if name == "leak":                               # HVQ-Trans's code turns AUROCs under 50 over
        for label in [label for label in rows if label.endswith("over test")]:
            rows[f"{label}, flipped"] = [record | {"both": flipped(record["both"])}
                                         for record in rows[label]]
    return rows


def records_of(name: str, label: str, folder: Path, categories: list[str]):
    """Yields (row, record) of one run's categories."""
    scored = evaluation.read_run(folder)
    for one in categories:
        if name != "leak":
            yield label, evaluation.evaluate(scored, one)
            continue
        for over in ("validation", "test"):
            yield f"{label}, standardised over {over}", evaluation.evaluate(scored, one, over)


def flipped(figures: dict) -> dict:
    turned = {name: max(value, 1 - value) for name, value in figures.items() if name != "average"}
    return turned | {"average": sum(turned.values()) / len(turned)}


def reported_rows(name: str, columns: list[str], empty: int) -> list[list]:
    """The paper's rows of this table; `empty` cells where it gives no figure."""
    reported = json.loads(evaluation.REPORTED.read_text(encoding="utf-8"))
    figures = reported.get(PAPER.get(name), {})
    if name == "multi":
        for label, key in (("each alone (Table 2)", "table2_single_class"),
                           ("one model (Table 3)", "table3_multi_class")):
            table = reported[key]
            figures[label] = {kind: table[kind]["average"]["LADMIM"]
                              for kind in ("structural", "logical")}
            figures[label]["average"] = table["overall"]["LADMIM"]
    rows = []
    for label, row in figures.items():
        if isinstance(row, dict) and set(columns) <= row.keys():
            cells = [evaluation.Spread(row[column] / 100) for column in columns]
            rows.append([f"{label}, reported", "–", *cells, *[None] * empty])
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
    ours = []
    for label, records in rows.items():
        for part, words in parts.get(name, {"both": ""}).items():
            row = [f"{label} {words}".strip(), evaluation.seeds(records)]
            row += [evaluation.spread(records, part, column) for column in columns]
            for one in categories:
                of_one = [record for record in records if record["category"] == one]
                row.append([evaluation.spread(of_one, part, column) for column in columns[:2]])
            ours.append(row)
    header = ["row", "seeds", *columns,
              *(f"{one}: {' / '.join(columns[:2])}" for one in categories)]
    title = (f"{evaluation.data_title(first)}, {first['preset'].split()[0]}: {name}, AUROC %, mean "
             "over categories")
    theirs = reported_rows(name, columns, len(categories))
    if not theirs or not first["rendered"]:
        return [(title, header, ours + theirs)]
    width = 2 + len(columns)
    reference = f"REFERENCE ONLY, not comparable with rendered data: {name}, reported for MVTec's"
    return [(title, header, ours), (reference, header[:width], [row[:width] for row in theirs])]


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


def show(args) -> int:
    rows = ablate(args.name, args.data, args.preset, args.category, args.seeds, args.runs)
    found, banner = tables(args.name, rows), SHORTCUTS if args.name == "leak" else ""
    columns = ("banner", "title", "header", "rows")
    evaluation.write_json(args.json or args.runs / f"ablation-{args.name}.json", {
        "records": rows, "tables": [dict(zip(columns, (banner, *table))) for table in found]})
    return evaluation.show(found, [], banner)


def main(argv=None) -> int:
    return data.run_command(lambda: show(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
