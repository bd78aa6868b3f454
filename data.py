"""Photos for LADMIM: where data sets keep them, and what is odd about them."""
import csv
import hashlib
import json
import os
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from console import (InputError, Parser, printable, readable, run_command, say,  # noqa: F401
                     tell, warn)
from images import (DRAWN, SUFFIXES, UNREAD, ahead, decode, deeper, defect_pixels,  # noqa: F401
                    is_marked, is_image, load_image, load_images, open_image, read, to_levels,
                    to_rgb, walk, warn_of_depth)
from twin.render import RENDERED_MARK, SCENES, render

SPLITS = ("train", "validation", "test")
MASK_NAMES = ("that of test/KIND/NAME is looked for in ground_truth/KIND: NAME_mask.png, NAME.png "
              "(.bmp, .tif, .tiff) or a folder NAME")
VALIDATION = ("validation", "valid", "val")          # MVTec LOCO's name first, then BMAD's
VISA_TABLE = "split_csv/1cls.csv"                    # in the folder of VisA's categories
REPORTED = Path(__file__).resolve().parent / "bench" / "reported_results.json"


# Files

def write_whole(path: Path, content: bytes,
                remedy="free some space or allow writing there, then run the command again"):
    """Written beside, flushed, renamed: a kill or a full disk leaves the last good file. If several
    processes write it at once, each writes a whole file."""
    beside = path.with_name(f".{os.urandom(8).hex()}.new")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"{path}: could not be saved ({error.strerror}); what was saved before "
                         f"is intact: {remedy}") from None
    finally:
        with suppress(OSError):                      # after Ctrl-C or an error it is still there
            beside.unlink()


def make_folder(folder: Path, option: str, photos: list[Path], names: list[str]):
    """Makes a folder for drawings of photos, NAME.png each. Only drawings in it are replaced."""
    if os.path.realpath(folder) in {os.path.dirname(os.path.realpath(path)) for path in photos}:
        raise InputError(f"{option} {folder}: holds the photos themselves; name another folder")
    for file in (folder / f"{name}.png" for name in names):
        if os.path.lexists(file) and not is_marked(file):
            raise InputError(f"{option} {folder}: holds {file.name}, no heat map; name another one")
    folder.mkdir(parents=True, exist_ok=True)


def in_batches(items, size: int):
    """Yields lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


# Layouts

@dataclass(frozen=True)
class Photo:
    """One photo of a data set. masks: its ground truth, none for a good photo."""
    path: Path
    category: str
    split: str                     # "train", "validation" or "test"
    kind: str = "good"             # or "logical_anomalies", "structural_anomalies", any defect
    masks: tuple[Path, ...] = ()

    @property
    def label(self) -> int:
        """0 good, 1 anomaly."""
        return int(self.kind != "good")


def images_in(folder: Path) -> list[Path]:
    """The images of a folder or, as BMAD has it, of its img folder, by name."""
    folder = folder / "img" if (folder / "img").is_dir() else folder
    return sorted(filter(is_image, folder.iterdir())) if folder.is_dir() else []


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name. A glob would pass over what it may not read."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inside if not path.name.startswith(".") and path.is_dir()]


def find_masks(folder: Path, kind: str, name: str) -> tuple[Path, ...]:
    """Ground truth of a test photo (name without suffix): MVTec LOCO's folder of PNGs, MVTec AD's
    NAME_mask.png, or a file of the photo's own name in ground_truth/KIND or, as BMAD has it, in
    test/KIND/label. Other suffixes do, too."""
    truth = folder / "ground_truth" / kind
    if (truth / name).is_dir():
        return tuple(images_in(truth / name))
    for place in (truth / f"{name}_mask", truth / name, folder / "test" / kind / "label" / name):
        for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES)):
            if (path := Path(f"{place}{suffix}")).is_file():
                return (path,)
    return ()


def good_folder(split: Path) -> Path:
    """split/good, also where it is written Good."""
    inside = [path for path in visible_folders(split) if path.name.lower() == "good"]
    return max(inside, default=split / "good")


def folder_layout(folder: Path) -> list[Photo]:
    """MVTec LOCO, MVTec AD, BMAD and own photos: train/good, validation/good, test/KIND."""
    train, test, category = good_folder(folder / "train"), folder / "test", folder.name
    photos = [Photo(path, category, "train") for path in images_in(train)]
    if not photos:
        raise InputError(f"{train}: no training photos; put photos of good products there")
    photos += [Photo(path, category, "validation") for name in VALIDATION
               for path in images_in(good_folder(folder / name))]
    if images_in(test):
        raise InputError(f"{test}: photos lie in it directly; move them into its folders good and "
                         "NAME_OF_DEFECT")
    for kind in visible_folders(test):
        good, images = kind.name.lower() == "good", images_in(kind)
        if not images and not all(path.name.startswith(".") or is_marked(path)
                                  for path in kind.iterdir()):
            raise InputError(f"{kind}: holds files, but no photos; put photos directly into it")
        for path in images:
            masks = () if good else find_masks(folder, kind.name, path.stem)
            photos.append(Photo(path, category, "test", "good" if good else kind.name, masks))
    return photos


def visa_layout(folder: Path) -> list[Photo]:
    """VisA, by its table."""
    root, category, photos = folder.parent, folder.name, {}
    table, columns = root / VISA_TABLE, ("object", "split", "label", "image", "mask")
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        rows = []
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise InputError(f"{table}: not VisA's table of {', '.join(columns)}; unpack VisA again")
    for row in rows:
        if row["object"] != category:
            continue
        name, good, split = Path(row["image"]), row["label"] == "normal", row["split"]
        path, mask = root / name, root / row["mask"]
        inside = name.parts[:1] == (category,) and ".." not in name.parts
        if not inside or not path.is_file() or path in photos:
            raise InputError(f"{table}: {name} is missing or listed twice; unpack VisA again")
        if split not in ("train", "test") or (split == "train" and not good):
            raise InputError(f"{table}: {name} is neither a normal training photo nor a test "
                             "photo; unpack VisA again")
        masks = (mask,) if not good and mask.is_file() else ()
        photos[path] = Photo(path, category, split, "good" if good else row["label"], masks)
    return list(photos.values())


def layout_of(folder: Path):
    """The function that reads a category's folder; None where it has no layout that is known."""
    if (folder / "train").is_dir():
        return folder_layout
    table = folder.parent / VISA_TABLE
    if (folder / "image_anno.csv").is_file() or (
            table.is_file() and f",{folder.name}/" in table.read_text("utf-8-sig", "replace")):
        return visa_layout
    return None


def list_categories(root: Path) -> list[str]:
    """Names of the category folders under root. Raises InputError where there is none."""
    with readable():
        if not root.is_dir():
            raise InputError(f"--data {root}: no such folder; name the folder that holds the "
                             "category folders")
        names = [path.name for path in visible_folders(root) if layout_of(path)]
        if not names and (root / "train").is_dir():
            raise InputError(f"--data {root}: is a category; name its parent and --category "
                             f"{root.resolve().name}")
    if not names:
        raise InputError(f"--data {root}: holds no category folder, that is one with photos in "
                         "CATEGORY/train/good")
    return names


def find_data(folder: str | None, category: str, several=False) -> tuple[Path, list[str]]:
    """The folder that holds the category folders, and the categories asked for: a name, a comma
    list or "all"; at least two where several are needed. Draws the twin where there is no data."""
    asked = sorted(set(category.split(",")))
    root = Path("data/mvtec_loco_anomaly_detection" if folder is None else folder)
    there = [name for name in asked if (root if name == "all" else root / name).is_dir()]
    if folder is None and there and there != asked:
        raise InputError(f"--category {category}: of these {root} holds {', '.join(there)} only, "
                         "and photos and drawings are not mixed; name --data or fewer categories")
    if folder is None and not there:
        root = Path("data/rendered")
        for name in SCENES if asked == ["all"] else asked:
            if not (root / name).is_dir():
                say(f"data: none given with --data, so the rendered twin of {name} is drawn")
                try:
                    render(root, name)
                except (OSError, ValueError) as error:   # or another process drew it meanwhile
                    if not (root / name).is_dir():
                        raise InputError(f"{error}; if the photos are yours, name the folder above "
                                         "theirs with --data") from None
    names = list_categories(root) if asked == ["all"] else asked
    for path in visible_folders(root) if asked == ["all"] else ():
        if path.name not in names and (path / "test").is_dir():
            warn([f"{path}: has a folder test, but no folder train, and is left out"])
    if several and len(names) < 2:
        raise InputError(f"--category {category}: name several for multi, --multi or --together")
    return root, names


def find_photos(root: Path, category: str, seed: int) -> list[Photo]:
    """Photos of root/category by split, kind and name, whichever data set's layout they are in.

    Where there are no validation photos, a tenth of the training photos (at least two; one of two),
    drawn with the seed, is held out for it. Anomalies in a validation folder (BMAD's valid/Ungood)
    are left out: only normals standardise scores."""
    with readable():
        folder = root / category
        if category in ("", "..") or Path(category).name != category or not folder.is_dir():
            names = list_categories(root)
            raise InputError(f"--category {category}: not in {root}; found: {', '.join(names)}")
        photos = (layout_of(folder) or folder_layout)(folder)
    if not any(photo.split == "validation" for photo in photos):
        train = sorted(photo.path for photo in photos if photo.split == "train")
        if len(train) < 2:
            raise InputError(f"{folder}: {len(train)} training photos are too few; add more")
        tag = zlib.crc32(os.fsencode(f"validation {category} {seed}"))
        order = np.random.default_rng(tag).permutation(len(train))
        count = min(len(train) - 1, max(2, round(len(train) / 10)))
        held = {train[i] for i in order[:count]}
        photos = [replace(photo, split="validation") if photo.path in held else photo
                  for photo in photos]
    return sorted(photos, key=lambda p: (SPLITS.index(p.split), p.label, p.kind, p.path))


def find_images(given: list[Path]) -> list[Path]:
    """Files as they are given, and the images of folders and of all folders in them, by name, but
    no ground truth. `read` says why one of these folders cannot be read."""
    images = []
    for path in given:
        with readable():
            files = list(walk(path)) if os.path.isdir(path) else [path]
            taken = [f for f in files if f == path or os.path.isdir(f) or is_image(f)]
            masks = [file for file in taken if is_mask(file, path)]
        warn(passed_over(path, files, taken))
        if masks:
            tell(f"{path}: ground-truth masks, passed over: {len(masks)}, such as {min(masks)}")
        if len(masks) == len(taken):
            raise InputError(f"{path}: no images in this folder or below it")
        images += sorted({*taken} - {*masks})
    return images


def is_mask(file: Path, folder: Path) -> bool:
    """Whether it is ground truth: below the folder, in a folder of masks that has photos beside."""
    beside = {"ground_truth": ["test"], "Masks": ["Images"], "label": ["img", file.name]}
    return any((above.parent / name).exists() for above in file.parents if folder in above.parents
               for name in beside.get(above.name, ()))


def passed_over(folder: Path, files, taken) -> list[str]:
    """A line on how many photos among the files of a folder were not taken. Masks are none."""
    taken = set(taken)
    left = [path for path in files if path.suffix.lower() in SUFFIXES + UNREAD
            and path not in taken and not is_marked(path) and not is_mask(path, folder)]
    return [f"{folder}: photos passed over: {len(left)}, such as {min(left)}: of another format "
            "or not where this layout has photos"] if left else []


def flat_names(paths: list[Path]) -> list[str]:
    """A name for each path, no two alike: the folders that not all share, its name, no suffix."""
    parts = [Path(os.path.abspath(path)).with_suffix("").parts[1:] for path in paths]
    shared = len(os.path.commonprefix([folders[:-1] for folders in parts]))
    names = {}                                     # by lower case: some file systems ignore case
    for part in parts:
        name = "_".join(part[shared:])
        if len(os.fsencode(name)) > 200:           # more than 255 bytes no file system takes
            name = f"{name[:40]}_{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}"
        while name.lower() in names:
            name += "_2"
        names[name.lower()] = name
    return list(names.values())


# Checks

def by_category(photos: list[Photo]) -> dict[str, list[Photo]]:
    groups = {}
    for photo in photos:
        groups.setdefault(photo.category, []).append(photo)
    return groups


def count_table(photos: list[Photo]) -> str:
    """Counts of every category and split, as text."""
    width = max([8, *(len(printable(photo.category)) for photo in photos)])
    lines = [f"{'category':{width}}  train  validation  test good  test anomalies  with mask"]
    for category, mine in by_category(photos).items():
        n = Counter((photo.split, photo.label) for photo in mine)
        kinds = Counter(photo.kind for photo in mine if photo.label)
        masks = sum(bool(photo.masks) for photo in mine)
        lines.append(f"{printable(category):{width}}  {n['train', 0]:5}  {n['validation', 0]:10}  "
                     f"{n['test', 0]:9}  {kinds.total():14}  {masks:9}  "
                     + ", ".join(f"{printable(kind)} {count}" for kind, count in kinds.items()))
    return "\n".join(line.rstrip() for line in lines)


def check_test_split(photos: list[Photo], needed=False):
    """A test split of one kind only gives no AUROC; better said now than after the training. None
    at all is fine, unless it is needed: own photos are often good ones only."""
    for name, mine in by_category(photos).items():
        labels = {photo.label for photo in mine if photo.split == "test"}
        if len(labels) == 1 or needed and not labels:
            lacks = {(): "photos: put some in test/good and test/NAME_OF_THE_DEFECT",
                     (0,): "anomalies: put some in test/NAME_OF_THE_DEFECT",
                     (1,): "good photos: put some in test/good"}[tuple(labels)]
            rest = "" if needed else ", or take the test folder away to train without figures"
            raise InputError(f"{name}: its test split has no {lacks}{rest}")


def check_photos(photos: list[Photo], root: Path) -> list[str]:
    """What is odd about a data set, a line each."""
    lines = []
    for category, mine in by_category(photos).items():
        if not any(photo.split == "test" for photo in mine):
            lines.append(f"{category}: no test photos: it gives scores, but no AUROC")
        with readable():
            lines += passed_over(root / category, walk(root / category), (p.path for p in mine))
    return (lines + count_mismatch(photos, root) + missing_masks(photos) + odd_masks(photos, root)
            + same(photos))


def count_mismatch(photos: list[Photo], root: Path) -> list[str]:
    """The categories of MVTec LOCO that have not its counts, and the splits that differ."""
    expected, lines = json.loads(REPORTED.read_text(encoding="utf-8"))["table1_images"], []
    for category, mine in by_category(photos).items():
        if (root / category / RENDERED_MARK).exists():
            continue
        counts = Counter(photo.split if photo.split != "test"
                         else "test_" + photo.kind.removesuffix("_anomalies") for photo in mine)
        loco = expected.get(category, {})
        wrong = ", ".join(f"{split} {counts[split]} (not {n})" for split, n in loco.items()
                          if counts[split] != n)
        anomalies = counts["test_logical"] + counts["test_structural"]
        if wrong and anomalies and set(counts) <= set(loco):
            lines.append(f"{category}: other counts than MVTec LOCO's: {wrong}; compare no figures "
                         "with the paper's")
    return lines


def odd_masks(photos: list[Photo], root: Path) -> list[str]:
    """A line on each photo whose masks cannot be read, mark nothing or, but for MVTec LOCO's, which
    mark wherever a missing part may lie, over half of it."""
    lines, masked = [], [photo for photo in photos if photo.masks]
    for photo, regions in zip(masked, ahead(lambda one: load_regions(one, None), masked)):
        if isinstance(regions, InputError):
            lines.append(str(regions))
        elif (max(mask.mean() for mask, _ in regions) > 0.5
              and not (root / photo.category / "defects_config.json").exists()):
            lines.append(f"{photo.masks[0]}: marks over half of the photo; a mask is black where "
                         "the photo has no defect")
    return lines


def missing_masks(photos: list[Photo]) -> list[str]:
    """How many anomalies have no ground truth."""
    bare = Counter(photo.category for photo in photos if photo.label and not photo.masks)
    if not bare:
        return []
    where = ", ".join(f"{name} {n}" for name, n in bare.items())
    return [f"{bare.total()} of {sum(photo.label for photo in photos)} anomalies have no "
            f"ground-truth mask, so no localisation figures ({where}); {MASK_NAMES}"]


def same(photos: list[Photo]) -> list[str]:
    """Byte-identical photos in two splits, or of two kinds in one. Only files that share their size
    with another are read."""
    with readable():
        sizes = [photo.path.stat().st_size for photo in photos]
    count, firsts, pairs = Counter(sizes), {}, []
    for photo in (photo for photo, size in zip(photos, sizes) if count[size] > 1):
        with suppress(OSError):                      # named where features are computed
            digest = hashlib.blake2b(photo.path.read_bytes()).digest()
            first = firsts.setdefault(digest, photo)
            if (first.split, first.kind) != (photo.split, photo.kind):
                pairs.append((first, photo))
    if not pairs:
        return []
    first = " and ".join(f"{photo.path} ({photo.split})" for photo in pairs[0])
    more = f", and {len(pairs) - 1} more" if len(pairs) > 1 else ""
    return [f"the same photo in two splits or kinds: {first}{more}; remove one of the two, or what "
            "is measured is memory"]


def digests(photos: list[Photo], root: Path) -> dict[str, str]:
    """Each photo's name below root -> a digest of its split, kind and bytes."""
    def digest(photo):
        about = os.fsencode(f"{photo.split}/{photo.kind}/")
        return hashlib.blake2b(about + read(photo.path), digest_size=16).hexdigest()

    names = [photo.path.relative_to(root).as_posix() for photo in photos]
    return dict(zip(names, map(str, ahead(digest, photos))))         # or why it cannot be read


# Ground truth

def load_defects(root: Path, category: str) -> dict[int, tuple[float, bool]] | None:
    """defects_config.json of an MVTec LOCO category: pixel value -> (saturation threshold, whether
    it is a share of the defect's area rather than pixels). None where there is no such file."""
    path, defects = root / category / "defects_config.json", {}
    if not path.exists():
        return None
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            value, share = int(entry["pixel_value"]), bool(entry["relative_saturation"])
            threshold, largest = float(entry["saturation_threshold"]), 1 if share else 1e12
            if value in defects or not (1 <= value <= 255 and 0 < threshold <= largest):
                raise ValueError
            defects[value] = threshold, share
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{path}: not a list of defects, each with a pixel_value from 1 to 255 of "
                         "its own, saturation_threshold and relative_saturation; unpack the data "
                         "set again") from None
    return defects


def load_regions(photo: Photo, defects: dict[int, tuple[float, bool]] | None) -> list[tuple]:
    """The photo's defects, one a ground-truth file: (mask, saturation area). The mask is bool
    (H, W) of the photo's own size. The saturation area, in pixels, is int(threshold * area) or
    min(threshold, area), by `defects` (MVTec LOCO); without them, the area."""
    regions = []
    for path in photo.masks:
        values = decode(read(path), path, to_levels)
        mask = defect_pixels(values)
        present = np.unique(values[values > 0]) if defects is not None else []
        if defects is not None and (len(present) != 1 or int(present[0]) not in defects):
            raise InputError(f"{path}: holds the values {present[:5].tolist()}, not just one of "
                             "those in defects_config.json; unpack the data set again")
        threshold, share = defects[int(present[0])] if defects else (1.0, True)
        area = int(mask.sum())
        if not area:
            continue
        regions.append((mask, float(max(1, int(threshold * area)) if share
                                    else min(threshold, area))))
        if mask.shape != regions[0][0].shape:
            raise InputError(f"{path}: another size than {photo.masks[0].name}, a mask of the same "
                             "photo; masks must have their photo's size")
    if photo.masks and not regions:
        raise InputError(f"{photo.masks[0]}: all black, so the ground truth of {photo.path} is "
                         "missing; mark its defect in white")
    return regions
