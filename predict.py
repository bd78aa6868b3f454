"""The command `predict`: a trained run's verdicts on photos, as lines, JSON, CSV and heat maps.
Only lines and JSON go to standard output; all else goes to standard error."""
import csv
import io
import json
import math
import shlex
from pathlib import Path

import numpy as np

import data
import eval as evaluation
from backbone import save_heatmap
from data import InputError

COLUMNS = ["path", "verdict", "score", "threshold", "structural", "logical", "decided", "error"]
LINE = "{verdict:7} {score:8.2f}  (structural {structural:.2f}, logical {logical:.2f})  "
ALARMS = 1 - evaluation.PERCENTILE / 100             # share of good photos above a run's threshold


def add_options(parser):
    parser.description = "Scores photos, each squashed to a square as in training."
    add, cut = parser.add_argument, parser.add_mutually_exclusive_group()
    add("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    add("--run", type=Path, required=True, help="run folder")
    add("--category", help="where the run knows several")
    cut.add_argument("--threshold", type=float, metavar="X", help="a higher score is an anomaly "
                     "(default: the run's, for 0.05 false alarms)")
    cut.add_argument("--false-alarms", type=float, metavar="SHARE", help="of good photos, as 0.01; "
                     "the threshold that the validation photos give for it")
    add("--csv", type=Path, metavar="FILE", help="a table of all photos")
    add("--heatmap", type=Path, metavar="DIR", help="draw photos and heat maps there")
    add("--json", action="store_true", help="one JSON object a line")


# The threshold

def worth(count: int, alarms: float) -> tuple[bool, str]:
    """Whether the threshold that `count` validation photos give has this share of false alarms, and
    what it is worth in words (see `evaluation.threshold`)."""
    needed = math.ceil(1 / alarms - 1 - 1e-9)
    if count >= needed:
        return True, f"{100 * alarms:g} % of further good photos are expected above it"
    return False, (f"the largest of {count} validation photos, so one good photo in {count + 1} is "
                   f"expected above it; {100 * alarms:.3g} % needs {needed} validation photos")


def pick_threshold(detector, args) -> tuple[float, str]:
    """The score above which a photo is an anomaly, and what it is worth."""
    asked, threshold = args.false_alarms, args.threshold
    if threshold is not None:
        if not math.isfinite(threshold):
            raise InputError(f"--threshold {threshold}: must be a finite number")
        return threshold, "as given"
    if asked is not None and not 1e-6 <= asked < 0.5:
        raise InputError(f"--false-alarms {asked}: must be at least 1e-6 and below 0.5, as 0.01")
    whole = all((args.run / name).exists() for name in ("config.json", "scores.csv"))
    if not (asked or whole):                         # the checkpoint alone is enough to predict
        return detector.normal["threshold"], "the run's own"
    total, _, normals = evaluation.total_scores(evaluation.read_run(args.run), detector.category)
    enough, words = worth(normals.sum(), asked or ALARMS)
    if not asked:
        return detector.normal["threshold"], words
    if not enough:
        data.warn([f"--false-alarms {asked:g}: its threshold is {words}"])
    return evaluation.threshold(total[normals], 100 * (1 - asked)), words


def next_step(folder: Path) -> str:
    """How to go on with a run that was trained, and what its thresholds are worth."""
    scored, lines = evaluation.read_run(folder), []
    for name in (names := sorted(set(scored.category.tolist()))):
        total, _, normals = evaluation.total_scores(scored, name)
        words = worth(normals.sum(), ALARMS)[1]
        lines.append(f"threshold of {name}: {evaluation.threshold(total[normals]):.2f}; {words}")
    which = ["--category", names[0]] if len(names) > 1 else []
    rest = shlex.join(["--run", str(folder), *which])
    lines.append(f"next: python ladmim.py predict PHOTO_OR_FOLDER... {rest}")
    return "\n".join(map(data.printable, lines))


# The verdicts

def predict(detector, args) -> int:
    """Exit code 1 where a photo could not be read or drawn."""
    paths, records = data.find_images(args.images), []
    names, size, white = data.flat_names(paths), detector.cfg.image_size, detector.white
    threshold, meaning = pick_threshold(detector, args)
    if args.heatmap:
        data.make_folder(args.heatmap, "--heatmap", paths, names)
    if args.csv:
        evaluation.write_report(args.csv, None, ",".join(COLUMNS))       # an earlier table stays
    photos = zip(paths, names, data.load_images(paths, size, white))
    try:
        for batch in data.in_batches(photos, 8):
            data.warn_of_depth([path for path, *_ in batch], white)
            for name, heat, record in judged(detector, batch, threshold):
                records.append(record)
                if args.heatmap and heat is not None:
                    words = "{verdict}: score {score:.1f}, threshold {threshold:.1f}"
                    try:
                        save_heatmap(args.heatmap / f"{name}.png", Path(record["path"]), heat, size,
                                     words.format(**record), white)
                    except InputError as error:      # the photo is gone, or the disk is full
                        record["error"] = str(error)
                if "error" in record:
                    data.tell(f"error: {record['error']}")
                if args.json:
                    print(json.dumps(record))
                elif heat is not None:
                    print(LINE.format(**record) + data.printable(record["path"]))
    finally:                                         # Ctrl-C keeps what is done
        if args.csv and records:
            write_table(args.csv, records)
    found = [record["verdict"] for record in records]
    if len(found) > 1:
        data.tell(f"{found.count('anomaly')} of {len(found)} photos flagged, "
                  f"{found.count('unreadable')} unreadable; threshold {threshold:.2f}: {meaning}")
    return int(any("error" in record for record in records))


def judged(detector, batch, threshold: float):
    """batch: of (path, name, image or InputError) -> yields each one's name, heat map, record."""
    images = [image for *_, image in batch if not isinstance(image, InputError)]
    found = zip(*detector(np.stack(images))) if images else iter(())
    for path, name, image in batch:
        if isinstance(image, InputError):
            yield name, None, dict(path=str(path), verdict="unreadable", error=str(image))
            continue
        *numbers, heat = next(found)
        structural, logical, score, limit = (round(float(x), 4) for x in (*numbers, threshold))
        yield name, heat, {
            "path": str(path), "verdict": "good" if score <= limit else "anomaly",      # NaN, too
            "score": score, "threshold": limit, "structural": structural, "logical": logical,
            "decided": "structural" if structural >= logical else "logical"}


def write_table(file: Path, records: list[dict]):
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(records)
    content = table.getvalue().encode(errors="surrogateescape")
    evaluation.write_report(file, content, ",".join(COLUMNS))
