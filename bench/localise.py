"""How well runs' anomaly maps find the defects' pixels: pixel AUROC, AUPRO and sPRO.

    python bench/localise.py                        every run under runs/
    python bench/localise.py RUN_OR_FOLDER ...      these only

Reads each run's maps.npz and the data set's ground-truth masks."""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import runs  # noqa: E402
from backbone import place  # noqa: E402
from data import InputError  # noqa: E402

MAPS = {"structural": "structural map", "logical": "logical map", "sum": "their sum"}
SPRO_LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)
# The figures shown in the tables, and their names there; all are in the JSON.
SHOWN = {"pixel AUROC": "pixel AUROC", "AUPRO": "AUPRO to 30 % FPR", "sPRO 0.05": "sPRO to 5 % FPR"}


# The figures

def components(mask) -> np.ndarray:
    """mask (H, W) bool -> (H, W) the number of each pixel's 8-connected region, from 1; 0 outside.

    The mask is cut into runs, neighbouring pixels of a row; union-find joins those that touch."""
    padded = np.pad(mask, 1)                        # so that no run goes on in the next row
    width, edges = padded.shape[1], np.diff(padded.ravel().astype(np.int8))
    start, end = np.flatnonzero(edges == 1) + 1, np.flatnonzero(edges == -1) + 1
    first = np.searchsorted(end, start - width)     # of the runs one row above that touch
    last = np.searchsorted(start, end - width, "right")
    parent = list(range(len(start)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for run in range(len(start)):
        for above in range(first[run], last[run]):
            parent[root(above)] = root(run)
    number = np.unique([root(run) for run in range(len(start))], return_inverse=True)[1] + 1
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.repeat(number, end - start)   # both row by row
    return labels


def union(masks, shape) -> np.ndarray:
    """masks: [(mask, saturation area)] -> bool of this shape."""
    found = np.zeros(shape, bool)
    for mask, _ in masks:
        found[mask] = True
    return found


def defect_scores(photos):
    """The maps' values at all defects' pixels, (P,), and [(values, saturation area)] of the
    ground-truth channels and of the connected regions of their union."""
    pixels, channels, regions = [np.empty(0, np.float32)], [], []
    for scores, masks in photos:
        defect = union(masks, scores.shape)
        pixels.append(scores[defect])
        channels += [(scores[mask], saturation) for mask, saturation in masks]
        label = components(defect)[defect]
        order = np.argsort(label)
        starts = np.flatnonzero(np.diff(label[order], prepend=0))
        for values in np.split(pixels[-1][order], starts)[1:]:       # before the first is nothing
            regions.append((values, len(values)))
    return np.concatenate(pixels), channels, regions


def false_positive_rates(photos, values) -> np.ndarray:
    """values (U,), distinct and sorted -> (2, U): the shares of the defect-free pixels that score
    above each of them, and at least as high as each of them."""
    counts = np.zeros((2, len(values) + 1), np.int64)
    for scores, masks in photos:
        normal = scores[~union(masks, scores.shape)]
        for count, side in zip(counts, ("left", "right")):
            count += np.bincount(np.searchsorted(values, normal, side), minlength=len(count))
    total = counts[0].sum()
    if not total:
        raise InputError("localisation needs defect-free pixels")
    return (total - counts.cumsum(1)[:, :-1]) / total


def area(regions, values, above, reached, limit: float) -> float:
    """Area under a curve up to a false positive rate, divided by that rate.

    The curve is the mean over the regions of min(n / saturation area, 1), with n of a region's
    pixels above the threshold; every value is a threshold. So it is a sum of ramps, one a value,
    each from the rate `above` the value to the one `reached` with it."""
    height = np.zeros(len(values))                  # of each value's ramp
    for scores, saturation in regions:
        at, count = np.unique(np.searchsorted(values, scores), return_counts=True)
        overlap = np.minimum(np.cumsum(count[::-1]) / saturation, 1)   # from the highest score down
        height[at[::-1]] += np.diff(overlap, prepend=0) / len(regions)
    whole = limit - (above + reached) / 2           # under a ramp that ends before the limit
    cut = np.maximum(limit - above, 0) ** 2 / (2 * np.maximum(reached - above, 1e-300))
    return float(height @ np.where(reached <= limit, whole, cut) / limit)


def localisation(photos) -> dict[str, float]:
    """Pixel AUROC; AUPRO, the mean overlap of the masks' connected regions, up to a false positive
    rate of 0.3 (MVTec AD); sPRO, the mean saturated overlap of the ground-truth channels, up to
    each of SPRO_LIMITS (MVTec LOCO). A pixel is predicted where its score is above the threshold.

    photos() -> iterator over (map (H, W), [(mask, saturation area in pixels)]), each mask (H, W)
    bool, or where it is true, as np.nonzero has it. It is called twice, so that memory is bounded
    by the defects' pixels and one photo."""
    pixels, channels, regions = defect_scores(photos())
    if not len(pixels):
        raise InputError("localisation needs photos with ground-truth masks")
    values = np.unique(pixels)
    rates = false_positive_rates(photos(), values)
    return {"pixel AUROC": area([(pixels, len(pixels))], values, *rates, 1.0),
            "AUPRO": area(regions, values, *rates, 0.3),
            **{f"sPRO {limit:g}": area(channels, values, *rates, limit) for limit in SPRO_LIMITS}}


# Runs

def tested_photos(scored: evaluation.ScoredRun, category: str):
    """-> the data set's folder, the scored test photos, path -> its maps, their image size."""
    root = evaluation.photos_root(scored, [category])
    maps = {root / path: value for path, value in evaluation.read_maps(scored).items()}
    photos = [photo for photo in data.find_photos(root, category, scored.config["seed"])
              if photo.split == "test" and photo.path in maps]
    expected = int(((scored.category == category) & scored.test).sum())
    if len(photos) < expected:
        raise InputError(f"{scored.folder}: {expected - len(photos)} of the {expected} test photos "
                         f"it scored are no longer in {root / category}; put them back")
    run, now = runs.load_finished(scored.folder, "run"), data.digests(photos, root)
    changed = [name for name in now if run["tested"].get(name) != now[name]]
    if changed:
        raise InputError(f"{scored.folder}: photos that are not those it scored: {len(changed)}, "
                         f"such as {changed[0]}; run its train command again")
    return root, photos, maps, run["config"]["image_size"]


def read_regions(photo: data.Photo, defects) -> tuple:
    """-> the photo's height and width, and [(mask, saturation area)] of its defects. Of a mask only
    where it is true: so those of all photos fit into memory, and each is read once."""
    shape, regions = data.open_image(photo.path).size[::-1], []
    for mask, saturation in data.load_regions(photo, defects):
        if mask.shape != shape:
            raise InputError(f"{photo.masks[0]}: {mask.shape[1]} x {mask.shape[0]} pixels, its "
                             f"photo {shape[1]} x {shape[0]}; they must have the same size")
        regions.append((tuple(np.argwhere(mask).astype(np.int32).T), saturation))
    return shape, regions


def localise(scored: evaluation.ScoredRun, record: dict) -> list[dict]:
    """eval.py's record of a category -> a record a map and kind of defect: `localisation` over the
    test photos of this kind and the good ones. Defects with names that LOCO lacks are one kind."""
    category, found = record["category"], []
    root, photos, maps, size = tested_photos(scored, category)
    defects = data.load_defects(root, category)
    if any(photo.label and not photo.masks for photo in photos):
        raise InputError(f"{scored.folder}: {category} has anomalies without ground-truth masks; "
                         f"{data.MASK_NAMES}")
    regions = [(photo, *read_regions(photo, defects)) for photo in photos]
    groups = evaluation.anomaly_groups([photo.kind for photo in photos])
    keys = ("run", "data", "rendered", "category", "seed", *evaluation.GROUP)
    about = {key: record[key] for key in keys}
    for kind in [evaluation.ANY] if evaluation.ANY in groups else groups:
        shown = [one for one in regions if one[0].kind in ("good", *groups[kind])]
        for name, words in MAPS.items():
            figures = localisation(lambda: ((place(maps[photo.path][name], size, *shape), masks)
                                            for photo, shape, masks in shown))
            found.append(about | {"map": words, "kind": kind, "figures": figures})
    return found


def localisation_tables(found: list[dict]) -> list[tuple]:
    """A table a data set, a row a category, map and kind; mean and std over seeds."""
    tables, keys = [], ("category", *evaluation.GROUP, "map", "kind")
    header = ["category", *evaluation.GROUP, "seeds", "kind", "map", *SHOWN.values()]
    for members in evaluation.grouped(found, "data", "rendered").values():
        rows = []
        for (*about, name, kind), same in evaluation.grouped(members, *keys).items():
            cells = [evaluation.spread(same, "figures", figure) for figure in SHOWN]
            rows.append([*about, str(len(same)), kind, name, *cells])
        tables.append((f"{evaluation.data_title(members[0])}: localisation %", header, rows))
    return tables


def print_tables(argv) -> int:
    parser = data.Parser(prog="bench/localise.py", description="Pixel AUROC, AUPRO and sPRO of "
                         "trained runs, against the ground-truth masks; some seconds a run.")
    evaluation.add_runs(parser)
    args = parser.parse_args(argv)
    records, problems = evaluation.evaluate_runs(evaluation.chosen_runs(args, "localise.json"))
    found = []
    for record in records:
        try:
            with data.readable():
                found += localise(evaluation.read_run(Path(record["run"])), record)
        except InputError as error:
            problems.append(str(error))
    return evaluation.publish("localise", args, localisation_tables(found), found, problems)


def main(argv=None) -> int:
    return data.run_command(lambda: print_tables(argv))


if __name__ == "__main__":
    sys.exit(main())
