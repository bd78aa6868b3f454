"""Photos for LADMIM: where data sets keep them, and how they are read.

It opens with what every other file needs: errors, files, commands.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from twin.render import RENDERED_MARK, SCENES, TwinError, render

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".bmp", ".tif", ".tiff", ".webp", ".gif",
            ".ppm", ".pgm", ".pbm")
SPLITS = ("train", "validation", "test")
MASK_NAMES = ("that of test/KIND/NAME is looked for in ground_truth/KIND: NAME_mask.png, NAME.png "
              "(.bmp, .tif, .tiff) or a folder NAME")
VALIDATION = ("validation", "valid", "val")          # MVTec LOCO's name first, then BMAD's
REPORTED = Path(__file__).resolve().parent / "bench" / "reported_results.json"

warnings.filterwarnings("ignore", module=r"PIL\.")   # bad files are reported by name instead


# Errors, files, commands

def printable(text: str) -> str:
    """Escapes line breaks, terminal codes and bytes that are no UTF-8: file names may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text)


class InputError(Exception):
    """What the user gave cannot be used: one line that names it and says what to do."""
    def __str__(self):
        return printable(super().__str__())


@contextmanager
def readable():
    """A folder or file that cannot be read is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check name and "
                         "permissions") from None


def write_whole(path: Path, content: bytes,
                remedy: str = "free some space and run the same command again"):
    """Written beside, flushed, renamed: a kill or a full disk leaves the last good file."""
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise InputError(f"{path}: could not be saved ({error.strerror}); what was saved before "
                         f"is intact: {remedy}") from None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def run_command(command,
                stopped="stopped; the same command goes on with what was finished") -> int:
    """The exit code of command(): what it returns, 2 for an InputError, 130 for Ctrl-C."""
    try:
        try:
            code = command()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print(f"\n{stopped}", file=sys.stderr)
            code = 130
        sys.stdout.flush()
        return code
    except BrokenPipeError:                  # whoever read the output left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # no complaint at exit
        return 141


def make_folder(folder: Path, option: str, photos: list[Path]):
    """Makes a folder for what is drawn of photos; it may not be theirs."""
    if folder.resolve() in {path.resolve().parent for path in photos}:
        raise InputError(f"{option} {folder}: holds the photos themselves; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {folder}: cannot be made ({error.strerror}); name another "
                         "folder") from None


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


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def images_in(folder: Path) -> list[Path]:
    """The images of a folder or, as BMAD has it, of its img folder, by name."""
    folder = folder / "img" if (folder / "img").is_dir() else folder
    return sorted(filter(is_image, folder.iterdir())) if folder.is_dir() else []


def find_masks(folder: Path, kind: str, name: str) -> tuple[Path, ...]:
    """Ground truth of a test photo (name without suffix): MVTec LOCO's folder of PNGs, MVTec AD's
    NAME_mask.png, or a file of the photo's own name in ground_truth/KIND or, as BMAD has it, in
    test/KIND/label."""
    truth = folder / "ground_truth" / kind
    if (truth / name).is_dir():
        return tuple(images_in(truth / name))
    for place in (truth / f"{name}_mask", truth / name, folder / "test" / kind / "label" / name):
        for suffix in (".png", ".bmp", ".tif", ".tiff"):
            if (path := Path(f"{place}{suffix}")).is_file():
                return (path,)
    return ()


def good_folder(split: Path) -> Path:
    """split/good, also where it is written Good."""
    inside = [path for path in split.glob("*") if path.name.lower() == "good"]
    return max(inside, default=split / "good")


def folder_layout(folder: Path) -> list[Photo]:
    """MVTec LOCO, MVTec AD, BMAD and own photos: train/good, validation/good, test/KIND."""
    train, test, category = good_folder(folder / "train"), folder / "test", folder.name
    photos = [Photo(path, category, "train") for path in images_in(train)]
    if not photos:
        raise InputError(f"{train}: no training photos; put photos of good products there")
    for name in VALIDATION:
        validation = images_in(good_folder(folder / name))
        photos += [Photo(path, category, "validation") for path in validation]
    if images_in(test):
        raise InputError(f"{test}: photos lie in it directly; move them into its folders good and "
                         "NAME_OF_DEFECT")
    for kind in sorted(filter(Path.is_dir, test.glob("[!.]*"))):
        good, images = kind.name.lower() == "good", images_in(kind)
        if not images and any(not path.name.startswith(".") for path in kind.iterdir()):
            raise InputError(f"{kind}: holds files, but no photos; put photos directly into it")
        for path in images:
            masks = () if good else find_masks(folder, kind.name, path.stem)
            photos.append(Photo(path, category, "test", "good" if good else kind.name, masks))
    return photos


def visa_layout(folder: Path) -> list[Photo]:
    """VisA, by its table split_csv/1cls.csv."""
    root, category, photos = folder.parent, folder.name, {}
    table, columns = visa_table(folder), ("object", "split", "label", "image", "mask")
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


def visa_table(folder: Path) -> Path:
    return folder.parent / "split_csv" / "1cls.csv"


# Whether a category's folder is in a layout, and the function that reads it; the first one counts.
LAYOUTS = (
    (lambda folder: (folder / "train").is_dir(), folder_layout),
    (lambda folder: (folder / "image_anno.csv").is_file(), visa_layout),
    (lambda folder: visa_table(folder).is_file() and folder != visa_table(folder).parent,
     visa_layout),
)


def list_categories(root: Path) -> list[str]:
    """Names of the category folders under root. Raises InputError where there is none."""
    with readable():
        if not root.is_dir():
            raise InputError(f"--data {root}: no such folder; name the folder that holds the "
                             "category folders")
        names = sorted(path.name for path in root.glob("[!.]*") if path.is_dir()
                       and any(fits(path) for fits, _ in LAYOUTS))
        if not names and (root / "train").is_dir():
            raise InputError(f"--data {root}: is a category; name its parent and --category "
                             f"{root.resolve().name}")
    if not names:
        raise InputError(f"--data {root}: holds no category folder, that is one with photos in "
                         "CATEGORY/train/good")
    return names


def find_data(folder: str | None, category: str) -> tuple[Path, list[str]]:
    """The folder that holds the category folders, and the categories asked for: a name, a comma
    list or "all". Draws the twin where there is no data."""
    asked = sorted(set(category.split(",")))
    root = Path(folder or "data/mvtec_loco_anomaly_detection")
    there = root.is_dir() if asked == ["all"] else all((root / name).is_dir() for name in asked)
    if not folder and not there:
        root = Path("data/rendered")
        for name in SCENES if asked == ["all"] else asked:
            if not (root / name).is_dir():
                print(f"data: none given with --data, so the rendered twin of {name} is drawn",
                      flush=True)
                try:
                    render(root, name)
                except TwinError as error:
                    raise InputError(f"{error}; if the photos are yours, name the folder above "
                                     "theirs with --data") from None
    return root, list_categories(root) if asked == ["all"] else asked


def find_photos(root: Path, category: str, seed: int) -> list[Photo]:
    """Photos of root/category by split, kind and name, whichever data set's layout they are in.

    Where there are no validation photos, a tenth of the training photos (at least two; one of two),
    drawn with the seed, is held out for it. Anomalies in a validation folder (BMAD's valid/Ungood)
    are left out: only normals standardise scores. Raises InputError where a folder is missing or
    holds no photos.
    """
    with readable():
        folder = root / category
        if Path(category).name != category or category == ".." or not folder.is_dir():
            names = list_categories(root)
            raise InputError(f"--category {category}: not in {root}; found: {', '.join(names)}")
        layout = next((layout for fits, layout in LAYOUTS if fits(folder)), folder_layout)
        photos = layout(folder)
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
    """Files as they are given, and the images of folders and of all folders in them, by name."""
    images = []
    for path in given:
        with readable():
            inside = sorted(filter(is_image, path.rglob("*"))) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path}: no images in this folder or below it")
        images += inside
    return images


def flat_names(paths: list[Path]) -> list[str]:
    """A file name without suffix for each path, no two alike: the folders that not all of them
    share, then its name."""
    parts = [Path(os.path.abspath(path)).with_suffix("").parts[1:] for path in paths]
    shared = len(os.path.commonprefix([folders[:-1] for folders in parts]))
    names, taken = [], set()
    for part in parts:
        name = "_".join(part[shared:])
        while name.lower() in taken:               # some file systems do not tell A from a
            name += "_2"
        taken.add(name.lower())
        names.append(name)
    return names


# Checks

def by_category(photos: list[Photo]) -> dict[str, list[Photo]]:
    groups = {}
    for photo in photos:
        groups.setdefault(photo.category, []).append(photo)
    return groups


def count_table(photos: list[Photo]) -> str:
    """Counts of every category and split, as text."""
    width = max([8, *(len(photo.category) for photo in photos)])
    lines = [f"{'category':{width}}  train  validation  test good  test anomalies  with mask"]
    for category, mine in by_category(photos).items():
        n = Counter((photo.split, photo.label) for photo in mine)
        kinds = Counter(photo.kind for photo in mine if photo.label)
        masks = sum(bool(photo.masks) for photo in mine)
        lines.append(f"{category:{width}}  {n['train', 0]:5}  {n['validation', 0]:10}  "
                     f"{n['test', 0]:9}  {kinds.total():14}  {masks:9}  "
                     + ", ".join(f"{kind} {count}" for kind, count in kinds.items()))
    return "\n".join(line.rstrip() for line in lines)


def check_test_split(photos: list[Photo]):
    """A test split of one kind only gives no AUROC; better said now than after the training. None
    at all is fine: own photos are often good ones only."""
    for name, mine in by_category(photos).items():
        labels = {photo.label for photo in mine if photo.split == "test"}
        if len(labels) == 1:
            lacks = ("anomalies: put some in test/NAME_OF_THE_DEFECT" if labels == {0}
                     else "good photos: put some in test/good")
            raise InputError(f"{name}: its test split has no {lacks}, or take the test folder away "
                             "to train without figures")


def check_photos(photos: list[Photo], root: Path) -> list[str]:
    """What is odd about a data set, a line each."""
    lines = []
    for category, mine in by_category(photos).items():
        if not any(photo.split == "test" for photo in mine):
            lines.append(f"{category}: no test photos: it gives scores, but no AUROC")
    return lines + count_mismatch(photos, root) + missing_masks(photos) + same(photos)


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


def missing_masks(photos: list[Photo]) -> list[str]:
    """How many anomalies have no ground truth."""
    bare = Counter(photo.category for photo in photos if photo.label and not photo.masks)
    if not bare:
        return []
    where = ", ".join(f"{name} {n}" for name, n in bare.items())
    return [f"{bare.total()} of {sum(photo.label for photo in photos)} anomalies have no "
            f"ground-truth mask, so no localisation figures ({where}); {MASK_NAMES}"]


def same(photos: list[Photo]) -> list[str]:
    """Byte-identical photos in two splits. Only files that share their size with another are
    read."""
    same_size, firsts, pairs = {}, {}, []
    with readable():
        for photo in photos:
            same_size.setdefault(photo.path.stat().st_size, []).append(photo)
        for group in same_size.values():
            for photo in group if len(group) > 1 else ():
                digest = hashlib.blake2b(photo.path.read_bytes()).digest()
                first = firsts.setdefault(digest, photo)
                if first.split != photo.split:
                    pairs.append((first, photo))
    if not pairs:
        return []
    first = " and ".join(f"{photo.path} ({photo.split})" for photo in pairs[0])
    more = f", and {len(pairs) - 1} more" if len(pairs) > 1 else ""
    return [f"the same photo in two splits: {first}{more}; remove one of the two, or what is "
            "measured is memory"]


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
    def to_values(image):          # one band as it is; of several, the colours without alpha
        return np.asarray(image if len(image.getbands()) == 1 else image.convert("RGB"))

    regions = []
    for path in photo.masks:
        values = decode(read(path), path, to_values)
        values = values.max(-1) if values.ndim == 3 else values                     # (H, W)
        mask, present = values > 0, np.unique(values[values > 0])
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
    return regions


# Images

def read(path: Path) -> bytes:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; check the name")
    with readable():
        content = path.read_bytes()
    if not content:
        raise InputError(f"{path}: the file is empty; replace or remove it")
    return content


def decode(content: bytes, path: Path, use):
    """use(image) of the first frame that content holds; whatever Pillow makes of a bad file is an
    InputError."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return use(image)
    except UnidentifiedImageError:
        reason = "not an image, cut off at its start, or of a format that Pillow does not know"
    except Exception as error:     # Pillow's decoders raise whatever their parsers stumble on
        reason = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path}: cannot be read as an image ({reason}); replace or remove it")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, turned as EXIF says, alpha over black. Integers beyond 8 bits are taken as 0
    to 65535, floats as 0 to 1 or, where they exceed 1, as 0 to 255; other values are refused."""
    with suppress(Exception):      # a broken EXIF block says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float32)
        top = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
        if not (values.min() >= 0 and values.max() <= top):                         # NaN too
            raise ValueError(f"values from {values.min():g} to {values.max():g}: save it with 8 or "
                             "16 bits")
        return Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(image, mask=image.getchannel("A"))
        return black
    return image.convert("RGB")


def open_image(path: Path) -> Image.Image:
    """The photo as RGB at its own size. Raises InputError, naming the file and the reason."""
    return decode(read(path), path, to_rgb)


def load_image(path: Path, size: int) -> np.ndarray:
    """The photo as RGB, uint8 (size, size, 3), resized bilinearly, antialiased. Or InputError."""
    return np.array(open_image(path).resize((size, size), Image.Resampling.BILINEAR))


def ahead(function, items, waiting: int = 16):
    """Yields function(item) in order, or the InputError it raised, computed by threads up to
    `waiting` items ahead."""
    def attempt(item):
        try:
            return function(item)
        except InputError as error:
            return error

    items, queue = iter(items), deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        queue.extend(pool.submit(attempt, item) for item in islice(items, waiting))
        while queue:
            result = queue.popleft().result()
            queue.extend(pool.submit(attempt, item) for item in islice(items, 1))
            yield result


def load_images(paths, size: int):
    """Yields load_image(path, size) of each path in order, for a bad file its InputError."""
    return ahead(lambda path: load_image(path, size), paths)


if __name__ == "__main__":
    print("error: data.py is no command; python twin/render.py draws the twin", file=sys.stderr)
    sys.exit(2)
