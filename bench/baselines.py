"""The paper's rivals on the same PDN, photos, seeds and protocol as LADMIM, in one table.

    python bench/baselines.py --data DIR --category a,b    trains LADMIM and the rivals, each alone
    python bench/baselines.py --category all --multi       one model of all, too (Table 3)
    python bench/baselines.py [RUN ...]                    beside existing runs

What is finished is not done again: each rival keeps its scores in RUN/rivals. Ctrl-C stops; the
same command goes on. Why SSM, SCADN, ComAD, GCAD, CSAD and PSAD are not here: bench/RESULTS.md."""
import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import ladmim  # noqa: E402
import options  # noqa: E402
import runs  # noqa: E402
from bench import ablations, efficientad, masked, patchcore  # noqa: E402
from bench.rival import Photos, ladmim_megabytes, milliseconds  # noqa: E402


def ladmim_costs(photos: Photos, steps: int | None) -> dict:
    """What is kept of LADMIM itself; its scores are in the run."""
    detector, metrics = photos.ladmim, runs.load_finished(photos.scored_run.folder)["metrics"]
    seconds = sum(one.get("seconds", 0) for one in metrics if one["stage"] != "score")
    return {"scores": {}, "train": seconds, "image": milliseconds(detector, photos),
            "megabytes": ladmim_megabytes(detector)}


# Name -> what is kept of it, of (photos, the most steps of its training).
METHODS = {
    "patchcore": lambda photos, steps: patchcore.run(photos, average=True),
    "patches": lambda photos, steps: patchcore.run(photos, average=False),
    "smae": masked.run_smae, "maeday": masked.run_maeday, "efficientad": efficientad.run}
TRAINED = ("smae", "maeday", "efficientad")
COSTS = ("train", "image", "megabytes", "steps", "settled", "curve")


def keep(photos: Photos, name: str, method, steps: int | None) -> dict:
    """The method's results on these photos, read from RUN/rivals or computed now."""
    file, about = photos.scored_run.folder / "rivals" / f"{name}.json", photos.about
    if name.startswith(TRAINED):
        about = about | {"steps asked for": steps, "precision": photos.precision}
    if file.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kept = json.loads(evaluation.read_text(file))
            if kept["about"] == about and kept["scores"] is not None:
                return kept
        raise data.InputError(f"{file}: damaged, of an earlier version, or made with other photos, "
                              "--steps or --precision; type those again, or delete it")
    data.tell(data.printable(f"{photos.scored_run.folder}: {name}"))
    kept = {**method(photos, steps), "about": about}
    data.write_whole(file, json.dumps(kept).encode(), "free some space")
    file.with_suffix(".pt").unlink(missing_ok=True)          # its training is over
    return kept


def with_hvq(photos: Photos, scores) -> dict[str, dict]:
    """Table 6: each category's AUROCs of scores plus S_HVQ, added as `eval` adds S_MIM."""
    run, found = photos.scored_run, {}
    of_path = dict(zip((photos.paths[i] for i in photos.scored), scores))
    run = replace(run, s_mim=np.array([of_path[path] for path in run.path]))
    for name in photos.names:
        total, test, _ = evaluation.total_scores(run, name)
        found[name] = evaluation.aurocs(run.kind[test], total[test])
    return found


def compare(folder: Path, ours: list[dict], args) -> list[dict]:
    """LADMIM and rivals: a record for each system and category. ours: LADMIM's, of `evaluate`."""
    with runs.lock(folder / "rivals", "wait until it ends"):     # a second would train the same
        photos = Photos(evaluation.read_run(folder), args.cache, args.precision)
        costs = keep(photos, "ladmim", ladmim_costs, None)
        found = [("LADMIM", {record["category"]: record["both"] for record in ours}, costs)]
        for name in args.methods:
            kept = keep(photos, name, METHODS[name], args.steps)
            for system, scores in kept["scores"].items():
                found.append((system, photos.aurocs(scores), kept))
                kept = {**kept, "curve": None}       # EfficientAD's is PUAD's, too: shown once
                if name in ("smae", "maeday"):
                    found.append((f"{system} + HVQ", with_hvq(photos, scores), {}))
    keys = ("category", "seed", "columns", "rendered", "data", *evaluation.GROUP)
    return [{"system": system, "both": figures[record["category"]], "precision": args.precision,
             **{key: costs.get(key) for key in COSTS}, **{key: record[key] for key in keys}}
            for system, figures, costs in found for record in ours]


# Tables

def table(records: list[dict]) -> tuple:
    """-> (title, header, rows): a row a system, the mean over the categories, then each."""
    first, columns, rows = records[0], records[0]["columns"], []
    for system in dict.fromkeys(record["system"] for record in records):
        same = [record for record in records if record["system"] == system]
        by_category = evaluation.grouped(same, "category")
        row = [system, *(evaluation.spread(same, "both", column) for column in columns)]
        row.append(" ".join(sorted({f"{one['steps']:,}{'' if one['settled'] else ' (not settled)'}"
                                    if one["steps"] else "–" for one in same})))
        for cost in ("train", "image", "megabytes"):
            known = [record[cost] for record in same if record[cost] is not None]
            row.append(f"{np.mean(known):.0f}" if known else None)
        for one in by_category.values():
            row.append([evaluation.spread(one, "both", column) for column in columns[:2]])
        rows.append(row)
    each = [f"{category}: {' / '.join(columns[:2])}" for category, in by_category]
    about = [evaluation.data_title(first), *(first[key] for key in evaluation.GROUP),
             f"rivals trained in {first['precision']}, AUROC %"]
    costs = ["steps", "training s, features cached", "ms a photo", "MB"]
    return ", ".join(about), ["system", *columns, *costs, *each], rows


def curve_table(records: list[dict], most: int = 8) -> list[tuple]:
    """AUROC over the steps of each training, at most so many of its looks; all are in the JSON."""
    first, rows = records[0], []
    for record in records:
        curve = record["curve"] or []
        for at in sorted({round(i) for i in np.linspace(0, len(curve) - 1, most)} if curve else ()):
            figures = curve[at]["aurocs"][record["category"]]
            rows.append([record["system"], record["category"], str(record["seed"]),
                         f"{curve[at]['step']:,}", f"{curve[at]['loss']:.4g}",
                         *(evaluation.Spread(figures[c]) if c in figures else None
                           for c in first["columns"])])
    title = f"{evaluation.data_title(first)}, {first['trained on']}: AUROC % over the steps"
    header = ["system", "category", "seed", "step", "validation loss", *first["columns"]]
    return [(title, header, rows)] if rows else []


def multi_table(records: list[dict]) -> list[tuple]:
    """Table 3: trained on each category alone, on all at once, the difference, and the paper's."""
    tables, keys = [], ("data", "rendered", "preset", "commit", "columns")
    paper = json.loads(data.REPORTED.read_text(encoding="utf-8"))["table3_multi_class"]
    for members in evaluation.grouped(records, *keys).values():
        for whole in sorted({record["trained on"] for record in members} - {"each alone"}):
            rows = []
            for system in dict.fromkeys(record["system"] for record in members):
                same = [record for record in members if record["system"] == system]
                alone, all_ = ({(r["category"], r["seed"]): r for r in same
                                if r["trained on"] == one} for one in ("each alone", whole))
                shared = alone.keys() & all_.keys()
                for column in same[0]["columns"]:
                    pair = [evaluation.spread([of[key] for key in shared], "both", column)
                            for of in (alone, all_)]
                    if None not in pair:
                        theirs = paper["delta_multi"].get(system.removesuffix("-S"))
                        delta = f"{100 * (pair[1].mean - pair[0].mean):+.1f}"
                        rows.append([system, column, *pair, delta, f"{theirs:+.1f}"
                                     if theirs and column == "average" else None])
            title = f"{evaluation.data_title(members[0])}: one model of {whole}, AUROC %"
            header = ["system", "", "each alone", "one model", "Δ_multi", "the paper's, on LOCO"]
            tables += [(title, header, rows)] if rows else []
    return tables


def reported_table(records: list[dict]) -> list[tuple]:
    """The paper's figures for LOCO, below ours."""
    first, paper = records[0], json.loads(data.REPORTED.read_text(encoding="utf-8"))
    if len(first["columns"]) == 1:
        return []
    alone = first["trained on"] == "each alone"
    known = sorted({record["category"] for record in records} & set(paper["categories"]))
    rows, figures = [], paper["table2_single_class" if alone else "table3_multi_class"]
    kinds = [figures[kind] for kind in evaluation.KINDS]
    for system in figures["overall"]:
        if not system.endswith("_std"):
            means = [evaluation.reported(kind["average"], system) for kind in kinds]
            each = [[evaluation.reported(kind[one], system) for kind in kinds] for one in known]
            rows.append([system, *means, evaluation.reported(figures["overall"], system), *each])
    for name, row in paper["table6_combined_with_hvq"].items() if alone else ():
        if name != "note":
            cells = [evaluation.reported(row, column) for column in first["columns"]]
            rows.append([f"{name} (Table 6)", *cells, *[None] * len(known)])
    note = "REFERENCE ONLY, not comparable with rendered data: " if first["rendered"] else ""
    return [(f"{note}the paper's Table {2 if alone else 3}, means of LOCO's five categories",
             ["system", *first["columns"], *known], rows)]


def parse(argv):
    parser = data.Parser(prog="bench/baselines.py", description="The paper's rivals beside LADMIM.")
    evaluation.add_runs(parser)
    add = parser.add_argument
    add("--category", help="a folder's name, a comma list or all: train LADMIM there, if need be")
    add("--data", help="the folder that holds the category folders")
    add("--multi", action="store_true", help="one model of all these categories, too (Table 3)")
    add("--seeds", type=runs.seed_list, help="as in 0-4 (default 0)")
    add("--preset", choices=ladmim.PRESETS, help="LADMIM's (default tiny)")
    add("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}; default: all")
    add("--steps", type=options.count, help="at most so many steps of each training")
    add("--precision", choices=("fp32", "bf16"), help="of the rivals' trainings (default fp32)")
    add("--cache", type=Path, default=Path("cache"), help="default: cache")
    args = parser.parse_args(argv)
    if not args.category and (args.data or args.multi or args.seeds or args.preset):
        raise data.InputError("--data, --multi, --seeds and --preset need --category")
    if args.category and args.paths:
        raise data.InputError(f"--category {args.category} beside {args.paths[0]}: leave one out")
    args.seeds, args.preset = args.seeds or [0], args.preset or "tiny"
    asked, args.methods = args.methods, args.methods.split(",")
    if set(args.methods) - METHODS.keys():
        raise data.InputError(f"--methods {asked}: choose from {', '.join(METHODS)}")
    if (args.steps or args.precision) and not {*args.methods} & {*TRAINED}:
        raise data.InputError(f"--steps, --precision: {asked} trains nothing; leave them out")
    args.precision = args.precision or "fp32"
    return args


def trained_runs(args) -> list[Path]:
    """The runs of LADMIM that --category asks for, trained where they are missing."""
    evaluation.write_report(args.file or args.runs / "baselines.json", None, evaluation.MADE_BY)
    root, categories = data.find_data(args.data, args.category, several=args.multi)
    whole = {"all" if args.category == "all" else ",".join(categories): categories}
    groups = {one: [one] for one in categories} | (whole if args.multi else {})
    cfg, device = ladmim.Config(**ladmim.PRESETS[args.preset]), runs.pick_device(None)
    return [ablations.train(runs.Job(cfg, args.preset, root, names, device, seed, called,
                                     cache=args.cache, runs=args.runs))
            for seed in args.seeds for called, names in groups.items()]


def print_tables(args) -> int:
    folders = (trained_runs(args) if args.category
               else evaluation.chosen_runs(args, "baselines.json"))
    found, problems = evaluation.evaluate_runs(folders)
    records = []
    for (run,), ours in evaluation.grouped(found, "run").items():
        try:
            records += compare(Path(run), ours, args)
        except data.InputError as error:
            problems.append(str(error))
    tables = []
    for group in evaluation.grouped(records, "data", "rendered", *evaluation.GROUP,
                                    "columns").values():
        tables += [table(group), *curve_table(group), *reported_table(group)]
    tables += multi_table(records)
    return evaluation.publish("baselines", args, tables, records, problems)


def main(argv=None) -> int:
    return data.run_command(lambda: print_tables(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
