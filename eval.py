"""AUROC of trained runs, mean and std over seeds, in tables beside the paper's.

    python eval.py                          every run under runs/; of a lone one a short table
    python eval.py RUN_OR_FOLDER ...        these only
    python eval.py --standardise test       repeats the leak of the published code, and says so

Reads each run folder's config.json and scores.csv: one row for each validation and test image; the
first part of its path is the category. Figures are fractions in the code and in the JSON, percent
in the tables. The paper's figures are in bench/reported_results.json."""
import argparse
import csv
import io
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import data
from data import InputError

HEADER = ["path", "split", "kind", "label", "s_hvq", "s_mim", "score"]
CONFIG = dict(data=str, rendered=bool, category=str, preset=str, seed=int, commit=str, root=str)
NOT_SETTINGS = {*CONFIG, "device", "torch"}          # other keys of config.json are settings
LOCO_KINDS = {"logical_anomalies": "logical", "structural_anomalies": "structural"}
KINDS = ("logical", "structural")
ANY = "any defect"                      # a column: data whose defects have other names than LOCO's
DETECTORS = {"hvq": "HVQ alone", "mim": "MIM alone", "both": "both"}
PERCENTILE = 95                         # of the validation normals: a score above it is an anomaly
GROUP = ("preset", "commit", "trained on")    # runs of one data set that agree here differ in seed
RUNS, MADE_BY = Path("runs"), '{\n "made_by": '       # how the JSON of a command begins
STANDARDISED = "scores standardised with mean and population std of the validation normals only"
LEAKS = ("LEAKS: scores standardised with mean and std of the whole test set, anomalies included; "
         "to compare with the published code, never to report")
PROTOCOL = (
    "Our protocol: {}; the last epoch, not the best on the test set; an AUROC under 50 is shown as "
    "it is; ± is the sample std over seeds. LADMIM's published code standardises over the whole "
    "test set; HVQ-Trans's published code flips AUROCs under 50. Reported rows are the paper's.")
MORE = "more: --all adds errors at the threshold, the paper's figures and our protocol"


def auroc(labels, scores) -> float:
    """Probability that an anomaly scores above a normal image; a tie counts half. labels (n,): 0
    normal, 1 anomaly; scores (n,): higher is more anomalous. Exact in float64."""
    labels, scores = np.ravel(labels), np.asarray(scores, np.float64).ravel()
    if len(labels) != len(scores):
        raise InputError(f"AUROC: there are {len(labels)} labels, {len(scores)} scores")
    if not np.isin(labels, (0, 1)).all():
        raise InputError("AUROC needs labels of 0 (normal) and 1 (anomaly)")
    if np.isnan(scores).any():
        raise InputError(f"AUROC: {np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    positive = labels.astype(bool)
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        raise InputError(f"AUROC needs both classes: {n0} normal images, {n1} anomalies")
    _, value, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2       # from 1; equal scores share their mean rank
    u = rank[value.ravel()][positive].sum() - n1 * (n1 + 1) / 2     # Mann-Whitney's U
    return float(u / (n1 * n0))


# Reading runs

@dataclass(frozen=True)
class ScoredRun:
    """One run folder: its settings and the scores of n validation and test images."""
    folder: Path
    config: dict
    category: np.ndarray                # (n,) str
    kind: np.ndarray                    # (n,) str
    test: np.ndarray                    # (n,) bool, False: validation
    s_hvq: np.ndarray                   # (n,) float64
    s_mim: np.ndarray                   # (n,) float64
    path: np.ndarray                    # (n,) str, below the folder of the categories


def find_runs(folders: list[Path]) -> list[Path]:
    """Run folders at or under the given ones, unfinished and broken ones too. Rows of ablations
    have tables of their own: they count only where `ablations` or a folder in it is named."""
    runs = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; name a run or a folder of runs")
        for file in data.walk(folder):  # `read_run` says why a folder may not be read
            place = file if file.is_dir() else file.parent
            known = place is file or file.name in ("config.json", "checkpoint.pt", "scores.csv")
            if known and "ablations" not in place.relative_to(folder).parts:
                runs[place.resolve()] = place
    return sorted(runs.values())


def read_text(file: Path) -> str:
    with data.readable(file):           # the name of a photo may hold any bytes
        return file.read_bytes().decode("utf-8", "surrogateescape")


def read_config(file: Path) -> dict:
    try:
        config = {"root": "?"} | json.loads(read_text(file))
        wrong = [key for key, kind in CONFIG.items() if not isinstance(config.get(key), kind)]
    except (ValueError, TypeError) as error:                # no JSON, or no object
        raise InputError(f"{file} is damaged ({error}): train the run again") from None
    if wrong:
        raise InputError(f"{file} has no valid {wrong[0]!r}: train the run again")
    return config


def read_scores(file: Path) -> list[tuple]:
    """scores.csv -> rows (category, kind, is test, s_hvq, s_mim, path), each checked."""
    text, rows = read_text(file), {}
    table = csv.reader(io.StringIO(text))
    try:
        if next(table) != HEADER:
            raise ValueError(f"not {','.join(HEADER)}")
        for path, split, kind, label, *scores in table:
            s_hvq, s_mim, _ = scores = [float(s) for s in scores]
            if not np.isfinite(scores).all():
                raise ValueError("a score is NaN or infinite")
            known = split in ("validation", "test") and label == str(int(kind != "good"))
            if not known or "/" not in path or path in rows:
                raise ValueError("split, kind, label or path is wrong, or the path a repeat")
            rows[path] = (path.split("/")[0], kind, split == "test", s_hvq, s_mim, path)
        if not rows or not text.endswith("\n"):
            raise ValueError("cut off")
    except (ValueError, csv.Error, StopIteration) as error:     # or another number of columns
        raise InputError(f"{file} is damaged, line {table.line_num} ({error}): "
                         "train the run again") from None
    return list(rows.values())


def read_run(folder: Path) -> ScoredRun:
    config = read_config(folder / "config.json")
    with data.readable():
        if not (folder / "scores.csv").exists():
            raise InputError(f"{folder} is unfinished: go on with the command that began it")
    return ScoredRun(folder, config, *map(np.array, zip(*read_scores(folder / "scores.csv"))))


def photos_root(scored: ScoredRun, categories) -> Path:
    """The folder that holds these category folders of a run. InputError where one is gone."""
    root = Path(scored.config["root"])
    for name in categories:
        if not (root / name).is_dir():
            raise InputError(f"{scored.folder}: its photos are no longer at {root / name}; put "
                             "them back, or give its train command their --data")
    return root


def read_maps(scored: ScoredRun) -> dict[str, dict[str, np.ndarray]]:
    """maps.npz: path in scores.csv -> {"structural", "logical", "sum"}, each (g, g). The first two
    are in standard deviations of the validation normals; their sum's own deviation is not 1."""
    file = scored.folder / "maps.npz"
    try:
        with np.load(file, allow_pickle=False) as content:
            paths, pairs = content["path"].tolist(), content["maps"]          # (n,), (n, 2, g, g)
        if not np.isfinite(pairs).all() or pairs.shape != (len(paths), 2, *2 * pairs.shape[-1:]):
            raise ValueError
        return {path: {"structural": structural, "logical": logical, "sum": structural + logical}
                for path, (structural, logical) in zip(paths, pairs)}
    except Exception:                   # numpy raises a different class for each kind of damage
        raise InputError(f"{file}: missing or damaged; train the run again") from None


def write_scores(folder: Path, root: Path, rows: list, maps: np.ndarray):
    """Writes scores.csv and maps.npz. rows: n of (photo, [s_hvq, s_mim, score]); maps (n, 2, g, g)
    their structural and logical maps. root: the folder that holds the category folders."""
    lines = [[photo.path.relative_to(root).as_posix(), photo.split, photo.kind, photo.label,
              *(f"{score:.9g}" for score in scores)] for photo, scores in rows]
    table, arrays = io.StringIO(newline=""), io.BytesIO()
    csv.writer(table).writerows([HEADER, *lines])
    np.savez_compressed(arrays, path=np.array([path for path, *_ in lines]), maps=maps)
    data.write_whole(folder / "maps.npz", arrays.getvalue())
    data.write_whole(folder / "scores.csv", table.getvalue().encode("utf-8", "surrogateescape"))


def scored_paths(folder: Path) -> set[str]:
    """The photos that a run has scored; none where a table is missing or damaged."""
    try:
        scored = read_run(folder)
        read_maps(scored)
    except InputError:
        return set()
    return set(scored.path.tolist())


# Scoring one category of one run

def moments(reference) -> tuple[float, float]:
    """Mean and standard deviation of reference (m,). A lone photo must not divide by 0: the std is
    at least 1 % of the mean, and 1 where both are almost 0."""
    mean, std = float(np.mean(reference)), float(np.std(reference))
    std = max(std, 0.01 * abs(mean))
    return mean, std if std > 1e-6 else 1.0


def standardise(s, reference):
    """s (n,), reference (m,) -> (s − mean) / std, both of the reference."""
    mean, std = moments(reference)
    return (s - mean) / std


def threshold(normals, percent: float = PERCENTILE) -> float:
    """The score that (100 - percent) % of further photos like the n normals will exceed. On average
    k / (n + 1) of them lie above the k-th largest, so "weibull" is the unbiased choice; NumPy's
    default would let 8 % through for n = 30. Never above the largest of the n."""
    return float(np.percentile(np.asarray(normals, np.float64), percent, method="weibull"))


def anomaly_groups(kinds) -> dict[str, list[str]]:
    """The test split's kinds -> the anomalies behind each AUROC: LOCO's two kinds or, where defects
    have other names, all of them and each by its own name."""
    anomalies = sorted(set(kinds) - {"good"})
    if set(anomalies) <= set(LOCO_KINDS):
        return {LOCO_KINDS[kind]: [kind] for kind in anomalies}
    return {ANY: anomalies, **{kind: [kind] for kind in anomalies if kind != ANY}}


def aurocs(kinds, scores) -> dict[str, float]:
    """kinds, scores (n,) of a test split -> AUROC of each of `anomaly_groups`, and LOCO's mean."""
    figures = {}
    for name, members in anomaly_groups(kinds).items():
        anomaly = np.isin(kinds, members)
        pick = anomaly | (kinds == "good")
        figures[name] = auroc(anomaly[pick], scores[pick])
    if set(KINDS) <= figures.keys():
        figures["average"] = (figures["logical"] + figures["structural"]) / 2
    return figures


def total_scores(scored: ScoredRun, category: str, over: str = "validation"):
    """Standardised S_HVQ plus standardised S_MIM, (n,), and which of the n are the category's test
    images and its validation normals. over: whose mean and std; "test" is the leak."""
    mine = scored.category == category
    test, normals = mine & scored.test, mine & ~scored.test & (scored.kind == "good")
    if not normals.any():
        raise InputError(f"{scored.folder}: {category} has no validation normals to standardise by")
    reference = test if over == "test" else normals
    both = sum(standardise(s, s[reference]) for s in (scored.s_hvq, scored.s_mim))
    return both, test, normals


def evaluate(scored: ScoredRun, category: str, over: str = "validation") -> dict:
    """One category of a run -> its record: what it is, AUROCs, error rates at the threshold."""
    kinds, config = scored.kind[(scored.category == category) & scored.test], scored.config
    good, groups = kinds == "good", anomaly_groups(kinds)
    if good.all() or not good.any():
        raise InputError(f"{scored.folder}: no AUROC for {category}, whose test split has "
                         f"{good.sum()} good images and {(~good).sum()} anomalies")
    both, test, normals = total_scores(scored, category, over)
    record = {key: config[key] for key in CONFIG} | {
        "run": str(scored.folder), "category": category, "commit": config["commit"] or "unknown",
        "trained on": "each alone" if config["category"] == category else config["category"],
        "settings": {key: value for key, value in config.items() if key not in NOT_SETTINGS},
        "images": {kind: int((kinds == kind).sum()) for kind in sorted(set(kinds))},
        "columns": (ANY,) if ANY in groups else (*KINDS, "average")}
    flagged = both[test] > threshold(both[normals])
    record["false alarms"] = {"good": float(flagged[good].mean())}
    record["missed"] = {name: float((~flagged[np.isin(kinds, members)]).mean())
                        for name, members in groups.items()}
    s = {"hvq": scored.s_hvq, "mim": scored.s_mim, "both": both}
    return record | {detector: aurocs(kinds, s[detector][test]) for detector in DETECTORS}


# Several runs

def grouped(records: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return dict(sorted(groups.items()))


def tell_apart(records: list[dict]) -> tuple[list[dict], list[str]]:
    """Keeps ablations from passing for seeds: settings that differ between runs of one preset and
    commit join its name, as folders a data set's. -> records without repeats, warnings."""
    for members in grouped(records, "data", "rendered").values():
        roots = {record["root"] for record in members if os.path.isdir(record["root"])}
        for record in members if len(roots) > 1 else ():
            record["data"] += f" in {os.path.dirname(record['root'])}"
    for members in grouped(records, "data", "rendered", *GROUP).values():
        for key in sorted(set().union(*(record["settings"] for record in members))):
            values = [record["settings"].get(key) for record in members]
            if len(set(map(repr, values))) > 1:
                for record, value in zip(members, values):
                    record["preset"] += f" {key}={value}"
    kept, lines = [], []
    for seeds in grouped(records, "data", "rendered", *GROUP, "category").values():
        for first, *repeats in grouped(seeds, "seed").values():
            kept.append(first)
            lines += [f"{r['run']} is left out: it repeats {first['run']}" for r in repeats]
            if first["images"] != seeds[0]["images"]:
                lines.append(f"{first['run']} has scored other test photos than "
                             f"{seeds[0]['run']}, but their mean is shown; train them alike")
    return kept, lines


def evaluate_runs(folders: list[Path], over: str = "validation") -> tuple[list[dict], list[str]]:
    """Run folders -> records, and a line on each run or category that does not count."""
    records, problems = [], []
    for folder in folders:
        try:
            scored = read_run(folder)
        except InputError as error:
            problems.append(str(error))
            continue
        for category in sorted(set(scored.category.tolist())):
            try:
                records.append(evaluate(scored, category, over))
            except InputError as error:
                problems.append(str(error))
    records, repeats = tell_apart(records)
    return records, problems + repeats


@dataclass(frozen=True)
class Spread:
    """A figure in a table."""
    mean: float
    std: float | None = None            # sample std over seeds; None: there is none
    seeds: int | None = None            # how many; None: categories don't share their seeds


def spread(records: list[dict], part: str, name: str) -> Spread | None:
    """Mean of record[part][name] over seeds and categories, std of the seeds' means. No std where
    categories don't share their seeds: it would mix the two. None where a record lacks it."""
    if not records or any(name not in record[part] for record in records):
        return None
    each = [{record["seed"]: record[part][name] for record in members}       # of each category
            for members in grouped(records, "category").values()]
    if any(figures.keys() != each[0].keys() for figures in each):
        return Spread(float(np.mean([np.mean(list(figures.values())) for figures in each])))
    per_seed = [np.mean([figures[seed] for figures in each]) for seed in each[0]]
    std = float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None
    return Spread(float(np.mean(per_seed)), std, len(per_seed))


def seeds(records: list[dict]) -> str:
    return str(spread(records, "false alarms", "good").seeds or "not shared")


# Tables: (title, header, rows). A cell is text, a Spread or None.

def rows_of(records: list[dict]):
    """Yields (category, group, its records), then (mean of n, group, its records)."""
    for (category, *group), members in grouped(records, "category", *GROUP).items():
        yield category, group, members
    for group, members in grouped(records, *GROUP).items():
        count = len(grouped(members, "category"))
        if count > 1:
            yield f"mean of {count}", group, members


def auroc_table(records: list[dict], title: str) -> tuple:
    """Each detector alone and both: a row a category, then the means over the categories."""
    columns, rows = records[0]["columns"], []
    for category, group, members in rows_of(records):
        for detector, label in DETECTORS.items():
            cells = [spread(members, detector, name) for name in columns]
            rows.append([category, label, *group, seeds(members), *cells])
    title += ": AUROC %" if len(columns) > 1 else ": image AUROC %"
    return title, ["category", "scoring", *GROUP, "seeds", *columns], rows


def error_table(records: list[dict], title: str) -> tuple:
    kinds, rows = records[0]["columns"][:2], []
    for category, group, members in rows_of(records):
        missed = [spread(members, "missed", kind) for kind in kinds]
        alarms = spread(members, "false alarms", "good")
        rows.append([category, *group, seeds(members), alarms, *missed])
    return (f"{title}: errors % at the {PERCENTILE}th percentile of the validation normals' scores",
            ["category", *GROUP, "seeds", "false alarms", *(f"missed {kind}" for kind in kinds)],
            rows)


def reported(figures: dict, system: str = "LADMIM") -> Spread:
    std = figures.get(f"{system}_std")
    return Spread(figures[system] / 100, std and std / 100)


def reported_rows(records: list[dict], paper: dict) -> list[list]:
    """The paper's rows for `auroc_table`: LADMIM's for our categories, and its means."""
    known, rows = {r["category"] for r in records} & set(paper["categories"]), []
    for label, figures in zip(DETECTORS.values(), paper["table5_scoring_ablation"].values()):
        cells = [Spread(figures[name] / 100) for name in (*KINDS, "average")]
        rows.append(["mean of 5", label, "Table 5", "reported", "–", "–", *cells])
    for name, trained in (("table2_single_class", "each alone"), ("table3_multi_class", "all")):
        table, about = paper[name], ["both", f"Table {name[5]}", "reported", trained, "–"]
        for category in sorted(known):
            rows.append([category, *about, *(reported(table[k][category]) for k in KINDS), None])
        means = [reported(table[kind]["average"]) for kind in KINDS]
        rows.append(["mean of 5", *about, *means, reported(table["overall"])])
    return rows if known else []


def data_title(record: dict) -> str:
    return record["data"] + (" (rendered twin, not MVTec's photos)" if record["rendered"] else "")


def all_tables(records: list[dict]) -> list[tuple]:
    """Two tables a data set. Rendered data and photos never share one, nor do LOCO's kinds of
    defects and others. The paper's figures stand below ours on LOCO's photos."""
    paper, tables = json.loads(data.REPORTED.read_text(encoding="utf-8")), []
    for (_, rendered, columns), members in grouped(records, "data", "rendered", "columns").items():
        title, header, rows = auroc_table(members, data_title(members[0]))
        if not rendered and len(columns) > 1:
            rows += reported_rows(members, paper)
        tables += [(title, header, rows), error_table(members, data_title(members[0]))]
    return tables


def cell_text(cell) -> str:
    if isinstance(cell, list):              # of ablations' and baselines' tables
        return " / ".join(map(cell_text, cell))
    if isinstance(cell, Spread):
        return f"{100 * cell.mean:.1f}" + ("" if cell.std is None else f" ± {100 * cell.std:.1f}")
    return "–" if cell is None else data.printable(cell)


def markdown(title: str, header: list, rows: list, banner: str = "") -> str:
    lines = [list(map(cell_text, row)) for row in [header, *rows]]
    width = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * w for w in width])
    text = [f"## {data.printable(title)}", ""] + ([f"**{banner}**", ""] if banner else [])
    text += ["| " + " | ".join(map(str.ljust, line, width)) + " |" for line in lines]
    return "\n".join(text)


def run_table(folder) -> str:
    """One run's AUROCs in Markdown, and a line on each category that has none."""
    records, problems = evaluate_runs([Path(folder)])
    tables = [markdown(*auroc_table(members, f"{data_title(members[0])}, {Path(folder).name}"))
              for members in grouped(records, "columns").values()]
    return "\n".join(tables + problems)


# Command line

def add_runs(parser: argparse.ArgumentParser, output: str = "--json") -> None:
    """The options that name runs, and the file to write."""
    parser.add_argument("paths", nargs="*", type=Path, metavar="RUN_OR_FOLDER",
                        help="default: every run under --runs")
    parser.add_argument("--runs", type=Path, default=RUNS, help="default: runs")
    parser.add_argument(output, dest="file", type=Path, help="default: in the folder of runs")


def chosen_runs(args, report: str, mark: str = MADE_BY) -> list[Path]:
    """The run folders that the options of `add_runs` name; at least one. report: the file's usual
    name; whether it can be written is checked now."""
    if args.paths and args.file and args.runs != RUNS:
        raise InputError(f"--runs {args.runs}: does nothing beside RUN_OR_FOLDER and {args.file}; "
                         "leave it out")
    folders = find_runs(args.paths or ([args.runs] if args.runs.exists() else []))
    if not folders:
        raise InputError(f"no runs under {', '.join(map(str, args.paths or [args.runs]))}: "
                         "make one with `python ladmim.py train --category breakfast_box`")
    write_report(args.file or args.runs / report, None, mark)
    return folders


def write_report(file: Path, content: bytes | None, mark: str) -> None:
    """Replaces only an earlier report, known by its mark. None: only checks that it could."""
    with data.readable():
        if file.exists() and not data.is_marked(file, mark):             # nor a folder or a pipe
            raise InputError(f"{file} exists and was not written by this command: name another")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"{file}: its folder may not be written to; name another file")
    if content is not None:
        data.write_whole(file, content, "name another file")


def publish(name: str, args, tables: list[tuple], records, problems: list[str], banner="",
            shown="") -> int:
    """Prints tables, or the text `shown` in their place, and problems, and writes tables, records
    and problems as JSON. -> exit code"""
    keys = ("banner", "title", "header", "rows")
    report = {"made_by": "LADMIM", "problems": problems, "records": records,
              "tables": [dict(zip(keys, (banner, *table))) for table in tables]}
    write_report(args.file or args.runs / f"{name}.json",
                 json.dumps(report, indent=1, default=asdict).encode(), MADE_BY)
    if tables and not shown:
        texts = [markdown(*table, banner) for table in tables]
        shown = "\n\n".join([PROTOCOL.format(banner or STANDARDISED), *texts]) + "\n"
    print(shown, end="")
    data.warn(problems)
    return 1 if problems else 0


def print_tables(argv) -> int:
    parser = data.Parser(prog="eval.py", description="AUROC of trained runs beside the paper's. "
                         "More on the same runs: bench/localise.py, baselines.py and report.py.")
    add_runs(parser)
    parser.add_argument("--all", action="store_true", help="also of a single run: errors at the "
                        "threshold, the paper's figures and our protocol")
    parser.add_argument("--standardise", choices=("validation", "test"), default="validation",
                        help="split that standardises scores; test leaks, as every table says")
    args = parser.parse_args(argv)
    folders = chosen_runs(args, "eval.json")
    banner = LEAKS if args.standardise == "test" else ""
    records, problems = evaluate_runs(folders, args.standardise)
    short = len(folders) == 1 and records and not (args.all or banner)
    shown = f"{run_table(folders[0])}\n\n{MORE}\n" if short else ""
    return publish("eval", args, all_tables(records), records, problems, banner, shown)


def main(argv=None) -> int:
    return data.run_command(lambda: print_tables(argv))


if __name__ == "__main__":
    sys.exit(main())
