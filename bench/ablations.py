"""The paper's ablations: python bench/ablations.py NAME --category a,b --seeds 0-1

    scoring (Table 5), combine (6), masking (7), target (8), multi (2, 3), width (Figure 3);
    score and leak are ours: the scores compared, and what the published shortcuts gain

`masking --together --mim-epochs 200` is Table 7's setting: one model for all categories. Trains
what is missing, goes on with what was stopped, and prints the table, the paper's beside it.
A row takes from the category's ordinary run each model that its settings do not change, so nothing
is trained twice. Rows lie under runs/ablations, ordinary runs where `train` puts them."""
import contextlib
import io
import itertools
import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import backbone  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import ladmim  # noqa: E402
import options  # noqa: E402
import runs  # noqa: E402

# Name -> the settings of each row.
TARGETS = {name: {"target": name, "mim_score": "mean"}
           for name in ("pixel", "feature", "code", "histogram")}
MASKS = {"checkerboard": {"mask": "checkerboard"}}
for kind, share in itertools.product(("random", "block"), (0.2, 0.4, 0.6)):
    # The smallest block is always the same part (46 / 130) of the mask.
    MASKS[f"{kind}-{share}"] = {"mask": kind, "train_ratio": share,
                                "train_block": round(share * 46 / 130, 4)}
FORMS = {f"HVQ {hvq}, MIM {mim}": {"hvq_score": hvq, "mim_score": mim}
         for hvq, mim in (("mean", "mean"), ("max", "mean"), ("norm", "mean"),
                          ("deviations", "mean"), ("deviations", "whitened"))}
ABLATIONS = {
    "scoring": {"": {}}, "combine": TARGETS, "masking": MASKS, "target": TARGETS,
    "width": {f"{factor:g} times the preset's mim_width": {"mim_width": factor}
              for factor in (0.25, 0.5, 1, 2)},
    "multi": {"each alone": {}, "one model": {"category_codes": "shared"},
              "one model, own codes": {"category_codes": "own"}},
    "score": {**FORMS, "HVQ deviations, MIM whitened, masks of 230 of 576": {
        **FORMS["HVQ deviations, MIM whitened"], "score_ratio": 230 / 576,
        "score_block": 92 / 576}},
    "leak": {f"HVQ {hvq}": FORMS[f"HVQ {hvq}, MIM mean"] for hvq in ("mean", "max")}}
# What each row shows: part of eval.py's record -> words behind the row's name.
PARTS = {"scoring": evaluation.DETECTORS, "combine": {"mim": "MIM alone", "both": "and HVQ"}}
PAPER = {"scoring": "table5_scoring_ablation", "combine": "table6_combined_with_hvq",
         "masking": "table7_masking_multi_class_200_epochs", "target": "table8_prediction_target",
         "multi": "tables_2_and_3_ladmim_means"}
SHORTCUT = ('rows "over test" LEAK: standardised over the whole test set, as in published code; '
            "they show what the leak gains; do not report them")


def train(job: runs.Job) -> Path:
    """This run's folder, trained unless it is finished. Photos that changed are scored anew."""
    for name in job.names:
        data.check_test_split(data.find_photos(job.root, name, job.seed), needed=True)
    data.tell(data.printable(str(job.out)))
    with contextlib.redirect_stdout(io.StringIO()):          # standard output is the table's
        if ladmim.train_run(job):
            raise data.InputError(f"{job.out}: some photos cannot be read, see the warnings above; "
                                  "mend or remove them")
    return job.out


def train_row(job: runs.Job, ordinary: Path, settings: dict) -> Path:
    """-> the run with job's settings, changed by `settings`. ordinary: job's own run. Models that
    do not change are taken from it; if nothing changes, it is returned."""
    settings = {name: value for name, value in settings.items() if getattr(job.cfg, name) != value}
    if not settings:
        return ordinary
    row = ",".join(f"{name}={value}" for name, value in settings.items())
    out = (ordinary.parents[1] / "ablations" / ordinary.parent.name
           / f"{job.category}-{job.preset}-{row}-seed{job.seed}")
    take = None if "category_codes" in settings else ordinary        # HVQ-Trans is another one
    return train(replace(job, cfg=replace(job.cfg, **settings), out=out, take=take))


def ablate(name: str, args) -> dict:
    """-> {row: [`eval.evaluate`'s records]} of one ablation."""
    root, categories = data.find_data(args.data, args.category, args.together or name == "multi")
    usual, device = ladmim.Config(**ladmim.PRESETS[args.preset]), runs.pick_device(None)
    rows, whole = defaultdict(list), "all" if args.category == "all" else ",".join(categories)
    ordinary = {}                                    # (seed, categories) -> the run
    more = {"mim_epochs": args.mim_epochs} if args.mim_epochs else {}
    of_row = {label: settings | more for label, settings in ABLATIONS[name].items()}
    for settings in of_row.values():
        if name == "width":
            settings["mim_width"] = int(settings["mim_width"] * usual.mim_width)
        options.check_settings(replace(usual, **settings), ladmim.OPTIONS,
                               backbone.positions(usual.image_size))
    for label, settings in of_row.items():
        alone = {one: [one] for one in categories}
        groups = {whole: categories} if args.together or label.startswith("one model") else alone
        for seed, called in itertools.product(args.seeds, groups):
            job = runs.Job(usual, args.preset, root, groups[called], device, seed, called,
                           cache=args.cache, runs=args.runs)
            if (seed, called) not in ordinary:
                ordinary[seed, called] = train(job)
            scored = evaluation.read_run(train_row(job, ordinary[seed, called], settings))
            for one in groups[called]:
                rows[label].append(evaluation.evaluate(scored, one))
                if name == "leak":
                    rows[f"{label}, over test"].append(evaluation.evaluate(scored, one, "test"))
    return rows


def tables(name: str, rows: dict, args) -> list[tuple]:
    """-> (title, header, rows) as eval.py prints them: ours, and the paper's."""
    first, ours, theirs = next(iter(rows.values()))[0], [], []
    columns = list(first["columns"])
    for label, records in rows.items():
        by_category = evaluation.grouped(records, "category")
        for part, words in PARTS.get(name, {"both": ""}).items():
            row = [f"{label} {words}".strip(), evaluation.seeds(records)]
            row += [evaluation.spread(records, part, column) for column in columns]
            for same in by_category.values():
                row.append([evaluation.spread(same, part, column) for column in columns[:2]])
            ours.append(row)
    paper = json.loads(data.REPORTED.read_text(encoding="utf-8")).get(PAPER.get(name), {})
    for label, figures in paper.items():
        if label != "note" and set(columns) <= figures.keys():
            theirs.append([label, *(evaluation.Spread(figures[one] / 100) for one in columns)])
    each = [f"{category}: {' / '.join(columns[:2])}" for category, in by_category]
    about = [evaluation.data_title(first), args.preset, *["one model of all"] * args.together]
    about += [f"ViT {args.mim_epochs} epochs"] if args.mim_epochs else []
    about += sorted({record["commit"] for records in rows.values() for record in records})
    title = f"{', '.join(about)}: {name}, AUROC %"
    reference = "REFERENCE ONLY, not comparable with rendered data: " if first["rendered"] else ""
    found = [(title, ["row", "seeds", *columns, *each], ours),
             (f"{reference}{name}, the paper's figures for LOCO", ["row", *columns], theirs)]
    return found if theirs else found[:1]


def print_tables(argv) -> int:
    parser = data.Parser(prog="bench/ablations.py", description="The paper's ablations.")
    add = parser.add_argument
    add("name", choices=ABLATIONS)
    add("--category", default="all")
    add("--seeds", type=options.seed_list, default=[0], help="as in 0-4 (default 0)")
    add("--preset", choices=ladmim.PRESETS, default="tiny")
    add("--together", action="store_true", help="one model for all categories")
    add("--mim-epochs", type=options.count, help="of the rows' ViT (default: the preset's)")
    add("--data", help="the folder that holds the category folders")
    add("--runs", type=Path, default=Path("runs"), help="default: runs")
    add("--cache", type=Path, default=Path("cache"), help="of features (default: cache)")
    add("--json", dest="file", type=Path, help="default: ablation-NAME.json in the runs' folder")
    args = parser.parse_args(argv)
    if args.together and args.name == "multi":
        raise data.InputError("--together: multi has a row for that; leave it out")
    name = f"ablation-{args.name}"
    evaluation.write_report(args.file or args.runs / f"{name}.json", None, evaluation.MADE_BY)
    rows = ablate(args.name, args)
    return evaluation.publish(name, args, tables(args.name, rows, args), rows, [],
                              SHORTCUT if args.name == "leak" else "")


def main(argv=None) -> int:
    return data.run_command(lambda: print_tables(argv))


if __name__ == "__main__":
    sys.exit(main())
