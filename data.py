"""Photos for LADMIM: where the datasets keep them, how they are read, and their frozen features, computed once.

    python data.py render --out DIR      draws the rendered twin of MVTec LOCO, in exactly its layout
"""
from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageDraw, ImageFilter, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pbm")
SPLITS = ("train", "validation", "test")
VALIDATION = ("validation", "valid", "val")          # MVTec LOCO's name first, then BMAD's
RENDERED_MARK = "rendered.json"                      # in a category folder: drawn by this program, not photographed
COUNTS = {"train": 100, "validation": 30, "test_good": 40, "test_logical": 40, "test_structural": 40}  # of the twin
FOLDERS = {"train": "train/good", "validation": "validation/good", "test_good": "test/good",
           "test_logical": "test/logical_anomalies", "test_structural": "test/structural_anomalies"}
REPORTED = Path(__file__).resolve().parent / "bench" / "reported_results.json"
CACHE_FORMAT = 1                                     # raise it when load_image reads anything differently
Turn = Image.Transpose
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_270,
         7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}      # what undoes an EXIF orientation

warnings.filterwarnings("ignore", module=r"PIL\.")   # a file that cannot be read is reported by name instead


def printable(text: str) -> str:
    """The text with line breaks, terminal codes and bytes that are no UTF-8 escaped: file names may hold all of these."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that names it and says what to do."""
    def __str__(self):
        return printable(super().__str__())


class BadPhotos(InputError):
    """Photos that could not be read. reasons: path -> message."""
    def __init__(self, reasons: dict[Path, str]):
        more = f" (and {len(reasons) - 1} more unreadable photos)" if len(reasons) > 1 else ""
        super().__init__(next(iter(reasons.values())) + more)
        self.reasons = reasons


# Layouts

@dataclass(frozen=True)
class Photo:
    """One photo of a dataset. masks: its ground truth, none for a good photo."""
    path: Path
    category: str
    split: str                                       # "train", "validation" or "test"
    kind: str = "good"                               # or "logical_anomalies", "structural_anomalies", any defect's name
    masks: tuple[Path, ...] = ()

    @property
    def label(self) -> int:
        """0 good, 1 anomaly."""
        return int(self.kind != "good")


def as_process(main) -> int:
    """main()'s exit code; 141, as a shell has it, if whoever read the output has closed it, as in `predict ... | head`."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())            # nor is there a complaint at exit
        return 141


@contextmanager
def readable():
    """A folder or file that cannot be read is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check name and permissions") from None


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def images_in(folder: Path) -> list[Path]:
    """The images of a folder or, as BMAD has it, of its img folder, by name."""
    folder = folder / "img" if (folder / "img").is_dir() else folder
    return sorted(path for path in folder.iterdir() if is_image(path)) if folder.is_dir() else []


def good_folder(split: Path) -> Path:
    """split/good, also where it is written Good."""
    found = [path for path in split.iterdir() if path.name.lower() == "good"] if split.is_dir() else []
    return max(found, default=split / "good")


def find_masks(folder: Path, kind: str, name: str) -> tuple[Path, ...]:
    """Ground truth of a test photo (name without suffix): MVTec LOCO's folder of PNGs, MVTec AD's NAME_mask.png, or a
    file of the photo's own name in ground_truth/KIND or, as BMAD has it, in test/KIND/label."""
    truth = folder / "ground_truth" / kind
    if (truth / name).is_dir():
        return tuple(images_in(truth / name))
    places = (truth / f"{name}_mask", truth / name, folder / "test" / kind / "label" / name)
    files = (Path(f"{place}{suffix}") for place in places for suffix in (".png", ".bmp", ".tif", ".tiff"))
    return tuple(islice((path for path in files if path.is_file()), 1))


def hold_out(paths: list[Path], tag: str) -> tuple[list[Path], list[Path]]:
    """-> the paths that stay, and a tenth (at least two; one of two) drawn at random; the same tag draws the same."""
    order = np.random.default_rng(zlib.crc32(os.fsencode(tag))).permutation(len(paths))
    drawn = {paths[i] for i in order[:min(len(paths) - 1, max(2, round(len(paths) / 10)))]}
    return [path for path in paths if path not in drawn], sorted(drawn)


def folder_layout(folder: Path, category: str) -> list[Photo]:
    """MVTec LOCO, MVTec AD, BMAD and own photos: train/good, validation/good where there is one, test/KIND."""
    train, test = good_folder(folder / "train"), folder / "test"
    if not images_in(train):
        raise InputError(f"{train}: no training photos; put photos of good products there (PNG, JPEG, TIFF, BMP, ...)")
    photos = [Photo(path, category, "train") for path in images_in(train)]
    for name in VALIDATION:
        photos += [Photo(path, category, "validation") for path in images_in(good_folder(folder / name))]
    if images_in(test):
        raise InputError(f"{test}: photos lie in it directly; move them into its folders good and NAME_OF_DEFECT")
    for kind in sorted(path for path in test.iterdir() if path.is_dir()) if test.is_dir() else []:
        good, found = kind.name.lower() == "good", images_in(kind)
        if not found and any(not path.name.startswith(".") for path in kind.iterdir()):
            raise InputError(f"{kind}: holds files or folders, but no photos; put the photos directly into it")
        photos += [Photo(path, category, "test", "good" if good else kind.name,
                         () if good else find_masks(folder, kind.name, path.stem)) for path in found]
    return photos


def visa_layout(root: Path, category: str, table: Path, seed: int) -> list[Photo]:
    """VisA, by split_csv/1cls.csv (object, split, label, image, mask) or, without it, by the category's image_anno.csv
    (image, label, mask). That one has no splits: as in VisA's own table, a tenth of the normal photos, here drawn with
    the seed, is for testing, with all the anomalies."""
    split_given, photos = table.name == "1cls.csv", {}
    columns = {"image", "label", "mask"} | ({"object", "split"} if split_given else set())
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        rows = []
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise InputError(f"{table}: not VisA's table of {', '.join(sorted(columns))}; unpack VisA again")
    for row in rows:
        if row.get("object", category) != category:
            continue
        name, good = Path(row["image"]), row["label"] == "normal"
        path, mask, split = root / name, root / row["mask"], row.get("split", "test")
        if name.parts[:1] != (category,) or ".." in name.parts or not path.is_file() or path in photos:
            raise InputError(f"{table}: lists {name}, which is missing under {root} or listed twice; unpack VisA again")
        if split not in ("train", "test") or (split == "train" and not good):
            raise InputError(f"{table}: {name} is neither a normal training photo nor a test photo; unpack VisA again")
        photos[path] = Photo(path, category, split, "good" if good else row["label"],
                             (mask,) if not good and mask.is_file() else ())
    if not split_given:
        normal = sorted(path for path, photo in photos.items() if not photo.label)
        train, _ = hold_out(normal, f"test {category} {seed}")
        photos |= {path: Photo(path, category, "train") for path in train}
    return list(photos.values())


def list_categories(root: Path) -> list[str]:
    """Names of the category folders under root. Raises InputError where there is none."""
    with readable():
        if not root.is_dir():
            raise InputError(f"--data {root}: no such folder; name the folder that holds the category folders")
        names = sorted(path.name for path in root.iterdir() if not path.name.startswith(".")
                       and ((path / "train").is_dir() or (path / "image_anno.csv").is_file()))
        if not names and (root / "train").is_dir():
            raise InputError(f"--data {root}: is a category; name its parent and --category {root.resolve().name}")
    if not names:
        raise InputError(f"--data {root}: holds no category folder, that is one with photos in CATEGORY/train/good")
    return names


def find_photos(root: Path, category: str, seed: int) -> list[Photo]:
    """Photos of root/category by split, kind and name, whichever dataset's layout they are in.

    Where there are no validation photos, a tenth of the training photos (at least two; one of two), drawn with the seed, is held
    out for it. Anomalies in a validation folder (BMAD's valid/Ungood) are left out: only normals standardise scores.
    Raises InputError where a folder is missing or holds no photos.
    """
    with readable():
        folder = root / category
        if Path(category).name != category or category == ".." or not folder.is_dir():
            names = list_categories(root)
            near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(category, names, 1))
            raise InputError(f"--category {category}: not in {root}{near or ';'} found: {', '.join(names)}")
        photos = []
        if not (folder / "train").is_dir():
            tables = (root / "split_csv" / "1cls.csv", folder / "image_anno.csv")
            listed = (visa_layout(root, category, table, seed) for table in tables if table.is_file())
            photos = next(filter(None, listed), [])
        photos = photos or folder_layout(folder, category)
    train = sorted(photo.path for photo in photos if photo.split == "train")
    if not any(photo.split == "validation" for photo in photos):
        if len(train) < 2:
            raise InputError(f"{folder}: {len(train)} training photos; add more, one in ten is held out for validation")
        held = set(hold_out(train, f"validation {category} {seed}")[1])
        photos = [Photo(photo.path, category, "validation") if photo.path in held else photo for photo in photos]
    return sorted(photos, key=lambda photo: (SPLITS.index(photo.split), photo.label, photo.kind, photo.path))


def by_category(photos: list[Photo]) -> dict[str, list[Photo]]:
    found = {}
    for photo in photos:
        found.setdefault(photo.category, []).append(photo)
    return found


def count_table(photos: list[Photo]) -> str:
    """Counts of every category and split, as text."""
    rows = [("category", "train", "validation", "test good", "test anomalies", "with mask", "")]
    for category, mine in by_category(photos).items():
        splits = Counter((photo.split, photo.label) for photo in mine)
        kinds = Counter(photo.kind for photo in mine if photo.label)
        rows.append((category, splits["train", 0], splits["validation", 0], splits["test", 0], kinds.total(),
                     sum(bool(photo.masks) for photo in mine), ", ".join(f"{kind} {n}" for kind, n in kinds.items())))
    widths = [max(len(str(row[i])) for row in rows) for i in range(6)]
    lines = [[f"{row[0]:{widths[0]}}", *(f"{row[i]:>{widths[i]}}" for i in range(1, 6)), row[6]] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def check_photos(photos: list[Photo], root: Path) -> list[str]:
    """What is odd about a dataset, a line each: other counts than MVTec LOCO's, test splits that give no AUROC, missing
    masks, photos that sit in two splits."""
    return count_mismatch(photos, root) + no_auroc(photos) + missing_masks(photos) + duplicates(photos)


def count_mismatch(photos: list[Photo], root: Path) -> list[str]:
    """The categories of MVTec LOCO that have not its counts, and the splits that differ."""
    expected, found = json.loads(REPORTED.read_text(encoding="utf-8"))["table1_images"], []
    for category, mine in by_category(photos).items():
        counts = Counter(photo.split if photo.split != "test" else "test_" + photo.kind.removesuffix("_anomalies")
                         for photo in mine)
        loco = expected.get(category, {})
        wrong = ", ".join(f"{split} {counts[split]} (not {n})" for split, n in loco.items() if counts[split] != n)
        real = counts["test_logical"] + counts["test_structural"] and not (root / category / RENDERED_MARK).exists()
        if wrong and real and set(counts) <= set(loco):
            found.append(f"{category}: other counts than MVTec LOCO's: {wrong}; compare no figures with the paper's")
    return found


def no_auroc(photos: list[Photo]) -> list[str]:
    """The categories whose test split gives no AUROC, and why."""
    found = []
    for category, mine in by_category(photos).items():
        labels = {photo.label for photo in mine if photo.split == "test"}
        lacking = [name for label, name in enumerate(("good photos", "anomalies")) if label not in labels]
        if lacking:
            found.append(f"{category}: no {' and no '.join(lacking)} in its test split: it gives scores, but no AUROC")
    return found


def missing_masks(photos: list[Photo]) -> list[str]:
    """How many anomalies have no ground truth."""
    bare = Counter(photo.category for photo in photos if photo.label and not photo.masks)
    if not bare:
        return []
    where, total = ", ".join(f"{name} {n}" for name, n in bare.items()), sum(photo.label for photo in photos)
    return [f"{bare.total()} of {total} anomalies have no ground-truth mask, so no localisation figures ({where})"]


def duplicates(photos: list[Photo]) -> list[str]:
    """Byte-identical photos in two splits. Only files that share their size with another are read."""
    same_size, same = {}, {}
    with readable():
        for photo in photos:
            same_size.setdefault(photo.path.stat().st_size, []).append(photo)
        for group in same_size.values():
            for photo in group if len(group) > 1 else []:
                same.setdefault(hashlib.blake2b(photo.path.read_bytes()).digest(), []).append(photo)
    pairs = [(group[0], other) for group in same.values() for other in group if other.split != group[0].split]
    if not pairs:
        return []
    first = " and ".join(f"{photo.path} ({photo.split})" for photo in pairs[0])
    more = f", and {len(pairs) - 1} more" if len(pairs) > 1 else ""
    return [f"the same photo in two splits: {first}{more}; remove one of the two, or what is measured is memory"]


def find_images(given: list[Path]) -> list[Path]:
    """Files as they are given, and the images of folders and of all folders in them, by name."""
    found = []
    for path in given:
        with readable():
            inside = sorted(p for p in path.rglob("*") if is_image(p)) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path}: no images in this folder or below it")
        found += inside
    return found


def flat_names(paths: list[Path]) -> list[str]:
    """A file name without suffix for each path, no two alike: the folders that not all of them share, then its name."""
    parts = [Path(os.path.abspath(path)).with_suffix("").parts[1:] for path in paths]
    shared = len(os.path.commonprefix([folders[:-1] for folders in parts]))
    names, taken = [], set()
    for part in parts:
        name, number = "_".join(part[shared:]), 2
        while name.lower() in taken:                 # some file systems do not tell A from a
            name, number = "_".join((*part[shared:], str(number))), number + 1
        taken.add(name.lower())
        names.append(name)
    return names


# Ground truth

def load_defects(root: Path, category: str) -> dict[int, tuple[float, bool]] | None:
    """defects_config.json of an MVTec LOCO category: pixel value -> (saturation threshold, whether it is a share of the
    defect's area rather than pixels). None where there is no such file."""
    path = root / category / "defects_config.json"
    if not path.exists():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = {int(entry["pixel_value"]): (float(entry["saturation_threshold"]), bool(entry["relative_saturation"]))
                 for entry in entries}
        valid = len(found) == len(entries) and all(1 <= value <= 255 and 0 < threshold <= (1 if share else 1e12)
                                                   for value, (threshold, share) in found.items())
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        valid = False
    if not valid:
        raise InputError(f"{path}: not a list of defects, each with a pixel_value from 1 to 255 of its own, "
                         "saturation_threshold and relative_saturation; unpack the dataset again")
    return found


def load_regions(photo: Photo, defects: dict[int, tuple[float, bool]] | None) -> list[tuple[np.ndarray, float]]:
    """The photo's defects: (mask, bool (H, W) of the photo's own size; saturation area in pixels) a ground-truth file.

    With defects (MVTec LOCO) the saturation area is int(threshold * area) or min(threshold, area); without, the area.
    """
    def to_values(image):                            # one band as it is; of several, the colours without alpha
        return np.asarray(image if len(image.getbands()) == 1 else image.convert("RGB"))

    regions = []
    for path in photo.masks:
        values = decode(read(path), path, to_values)
        values = values.max(-1) if values.ndim == 3 else values                   # (H, W)
        mask, present = values > 0, np.unique(values[values > 0])
        if defects is not None and (len(present) != 1 or int(present[0]) not in defects):
            raise InputError(f"{path}: holds the values {present[:5].tolist()}, not just one of those in "
                             "defects_config.json; unpack the dataset again")
        threshold, share = defects[int(present[0])] if defects else (1.0, True)
        area = int(mask.sum())
        if area:
            regions.append((mask, float(max(1, int(threshold * area)) if share else min(threshold, area))))
            if mask.shape != regions[0][0].shape:
                raise InputError(f"{path}: another size than {photo.masks[0].name}, a mask of the same photo; masks must have "
                                 "their photo's size")
    return regions


# Images

def read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}; check the name")
    with readable():
        content = path.read_bytes()
    if not content:
        raise InputError(f"{path}: the file is empty; replace or remove it")
    return content


def decode(content: bytes, path: Path, use):
    """use(image) of the first frame that content holds; whatever Pillow makes of a bad file is an InputError."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return use(image)
    except UnidentifiedImageError:
        reason = "not an image, cut off at its start, or of a format that Pillow does not know"
    except Image.DecompressionBombError:
        reason = f"more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels: make it smaller"
    except Exception as error:  # noqa: BLE001, Pillow's decoders raise whatever their parsers stumble on
        reason = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path}: cannot be read as an image ({reason}); replace or remove it")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, turned as EXIF says, alpha over black. Integers beyond 8 bits are taken as 0 to 65535, floats as
    0 to 1 or, where they exceed 1, as 0 to 255; other values are refused."""
    orientation = 1
    with suppress(Exception):                        # a broken EXIF block says nothing about the pixels
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in TURNS and image.format != "TIFF":                           # those are turned on loading
        image = image.transpose(TURNS[orientation])
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float32)
        top = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
        if not (values.min() >= 0 and values.max() <= top):                       # NaN too
            raise ValueError(f"values from {values.min():g} to {values.max():g}: save it with 8 or 16 bits")
        return Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
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
    """The photo as uint8 (size, size, 3), RGB, resized bilinearly with antialiasing. Raises InputError."""
    return resized(read(path), path, size)


def resized(content: bytes, path: Path, size: int) -> np.ndarray:
    return decode(content, path, lambda image: np.array(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR)))


def ahead(function, items, waiting: int = 16):
    """Yields function(item) in order, or the InputError it raised, computed by threads up to `waiting` items ahead."""
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
    """Yields load_image(path, size) of each path in order, for a bad file its InputError; decodes ahead in threads."""
    return ahead(lambda path: load_image(path, size), paths)


# Feature cache

def cached_features(paths: list[Path], size: int, backbone_key: str, compute, cache_dir: Path, shape: tuple[int, int],
                    budget_gib: float = 4.0, batch_size: int = 16, progress=lambda done: None):
    """Frozen features of the photos, each computed once and then read from cache_dir -> float16 tensor (n, N, d0).

    compute: uint8 (batch_size, size, size, 3) -> (batch_size, N, d0); shape: (N, d0); progress(number done) is called.
    A file in the cache is named by its photo's bytes, the size, the shape and backbone_key, which must change with the
    weights, so nothing stale is served; it ends in a checksum, so nothing broken is. Features are as the backbone gives
    them: standardising is the caller's. More than budget_gib of them are mapped from a nameless file in cache_dir.
    Raises BadPhotos for photos that cannot be read, after all others are cached: a second call without them is quick.
    """
    import torch  # not at the top: reading and drawing photos is quick without it

    features, writable = torch.from_numpy(allocate(len(paths), shape, budget_gib, cache_dir)), True
    bad, batch, done = {}, [], 0
    settings = hashlib.blake2b(repr((CACHE_FORMAT, backbone_key, size, tuple(shape))).encode()).digest()

    def fetch(path):
        content = read(path)
        key = hashlib.blake2b(content, digest_size=20, key=settings).hexdigest()
        row = read_row(cache_dir / key[:2] / key, key, shape)
        return key, row, resized(content, path, size) if row is None else None

    def flush():
        nonlocal writable, done
        rows, keys, images = zip(*batch)
        images += images[-1:] * (batch_size - len(images))   # one batch size: last bits must not depend on the others
        found = compute(torch.from_numpy(np.stack(images)))[:len(rows)].to(torch.float16).cpu()
        if not found.isfinite().all():
            raise InputError(f"{paths[rows[0]]} or one soon after it: the backbone gives features that are not finite "
                             "or beyond float16's 65504; use other weights")
        features[list(rows)] = found
        for key, row in zip(keys, found.numpy()):
            writable = writable and write_row(cache_dir / key[:2] / key, key, row)
        done += len(rows)
        batch.clear()
        progress(done)

    for i, result in enumerate(ahead(fetch, paths)):
        if isinstance(result, InputError):
            bad[paths[i]] = str(result)
            continue
        key, row, image = result
        if row is None:
            batch.append((i, key, image))
        else:
            features[i] = torch.from_numpy(row)
            done += 1
            progress(done)
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    if bad:
        raise BadPhotos(bad)
    return features


def allocate(n: int, shape: tuple[int, int], budget_gib: float, cache_dir: Path) -> np.ndarray:
    """An empty (n, N, d0) float16 array: in memory or, beyond the budget, in a file that vanishes with the process."""
    row = 2 * shape[0] * shape[1]                    # bytes
    if n * row > budget_gib * 2 ** 30:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache_dir) as file:
                for _ in range(n):                   # takes the room now: mapped pages that find none kill the process
                    file.write(bytes(row))
                file.flush()
                return np.memmap(file, np.float16, "r+", shape=(n, *shape))
        except OSError as error:
            print(f"warning: {cache_dir}: {n * row / 2 ** 30:.1f} GiB of features cannot be written ({error.strerror}) "
                  "and stay in memory", file=sys.stderr)
    return np.empty((n, *shape), np.float16)


def checksum(payload: bytes, key: str) -> bytes:
    return hashlib.blake2b(payload, key=key.encode(), digest_size=16).digest()


def read_row(path: Path, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """A cached (N, d0) float16 array, or None where there is none or the file is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    payload = content[:-16]
    if len(payload) != 2 * shape[0] * shape[1] or checksum(payload, key) != content[-16:]:
        return None
    return np.frombuffer(bytearray(payload), "<f2").reshape(shape)


def write_row(path: Path, key: str, row: np.ndarray) -> bool:
    """Writes a file that read_row reads, whole or not at all. False, and a warning, where it cannot be written."""
    payload, part = row.astype("<f2").tobytes(), path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(payload + checksum(payload, key))
        os.replace(part, path)
        return True
    except OSError as error:
        print(f"warning: {path.parent.parent}: cannot be written ({error.strerror}); going on without", file=sys.stderr)
        with suppress(OSError):
            part.unlink()
        return False


# Rendered twin: how a photo is drawn

@dataclass
class Scene:
    """A photo in the making. Positions and lengths are in units of its side, x right, y down; `pose` (camera shift,
    turn, zoom) takes them to canvas pixels. A shape is a Pillow "L" image of the canvas: 255 inside, 0 outside."""
    rng: np.random.Generator
    side: int                                        # of the canvas in pixels, twice the photo's
    pose: np.ndarray = None                          # (2, 3): points @ pose[:, :2].T + pose[:, 2]
    photo: np.ndarray = None                         # (side, side, 3) float32, 0 to 1, stored as 3 planes
    regions: list = field(default_factory=list)      # the fault's ground truth, shapes

    def aim(self, shift, turn, zoom):
        """Jitters the camera: shift in sides, turn in degrees, zoom relative; standard deviations, cut at two."""
        dx, dy, angle, scale = np.clip(self.rng.normal(size=4), -2, 2) * (shift, shift, math.radians(turn), zoom)
        c, s = math.cos(angle) * (1 + scale), math.sin(angle) * (1 + scale)
        move = np.array([0.5 + dx, 0.5 + dy]) - np.array([[c, -s], [s, c]]) @ (0.5, 0.5)
        self.pose = self.side * np.array([[c, -s, move[0]], [s, c, move[1]]])

    def pixels(self, points):
        """(..., 2) scene units -> (..., 2) canvas pixels."""
        return np.asarray(points, float) @ self.pose[:, :2].T + self.pose[:, 2]


def turned(points, angle, centre=(0, 0), squeeze=1):
    """Points about the origin, turned by `angle` degrees and moved to `centre`. Where LOCO's photo is wider than high,
    `squeeze`, its height / width, shrinks the lengths across, as our photos are square."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return np.asarray(points) @ np.array([[c, s], [-s, c]]) * (squeeze, 1) + centre


def curve(start, control, end):
    """(24, 2) points of a quadratic Bezier curve."""
    t = np.linspace(0, 1, 24)[:, None]
    return (1 - t) ** 2 * np.asarray(start) + 2 * t * (1 - t) * np.asarray(control) + t ** 2 * np.asarray(end)


CIRCLE = np.array([(np.cos(t), np.sin(t)) for t in np.linspace(0, 2 * np.pi, 60, endpoint=False)])   # (60, 2)


def slab(w, h):
    """Outline of a w x h rectangle with round corners, about the origin."""
    return np.sign(CIRCLE) * np.abs(CIRCLE) ** 0.25 * (w / 2, h / 2)


def polygon(scene, points):
    shape = Image.new("L", (scene.side, scene.side))
    ImageDraw.Draw(shape).polygon(scene.pixels(points).ravel().tolist(), fill=255)
    return shape


def stroke(scene, width, *lines, caps=True):
    """Lines of a width, round at their joints and, with caps, at their ends."""
    shape, w = Image.new("L", (scene.side, scene.side)), width * scene.side
    pen = ImageDraw.Draw(shape)
    for line in map(scene.pixels, lines):
        pen.line(line.ravel().tolist(), fill=255, width=max(1, round(w)), joint="curve")
        for x, y in line[[0, -1]] if caps else ():
            pen.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=255)
    return shape


def ellipse(scene, centre, rx, ry, angle=0.0, wobble=0.0):
    """Ellipse, or a natural blob where wobble (relative deviation of the radius) is not 0."""
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    r = np.ones_like(t)
    for k in (2, 3, 5) if wobble else ():
        r += wobble / k * scene.rng.normal() * np.cos(k * t + scene.rng.uniform(0, 2 * math.pi))
    return polygon(scene, turned(np.stack([rx * r * np.cos(t), ry * r * np.sin(t)], 1), angle, centre))


def box(scene, centre, w, h, angle=0.0, radius=0.0):
    """Rectangle of width w and height h, its corners rounded by `radius`."""
    t = np.linspace(0, 2 * math.pi, 32, endpoint=False) if radius else np.radians((225, 315, 45, 135))
    corner = np.stack([np.cos(t), np.sin(t)], 1)
    outline = np.sign(corner) * (w / 2 - radius, h / 2 - radius) + radius * corner
    return polygon(scene, turned(outline, angle, centre))


common = ImageChops.darker


def union(*shapes):
    return reduce(ImageChops.lighter, shapes)


def minus(shape, *others):
    return reduce(ImageChops.subtract, others, shape)


def soft(shape, radius):
    """The shape with its rim blurred over `radius` pixels of a 512 pixel canvas."""
    x0, y0, x1, y1 = shape.getbbox() or (0, 0, 1, 1)
    radius = radius * shape.width / 512
    reach, result = math.ceil(3 * radius), Image.new("L", shape.size)
    bounds = (max(x0 - reach, 0), max(y0 - reach, 0), min(x1 + reach, shape.width), min(y1 + reach, shape.height))
    result.paste(shape.crop(bounds).filter(ImageFilter.GaussianBlur(radius)), bounds[:2])
    return result


def stretched(array, width, height):
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC))


def noise(rng, height, width, scale):
    """Smooth noise (height, width) of standard deviation about 1 whose blobs are `scale` pixels wide."""
    rows, columns = int(height / scale) + 3, int(width / scale) + 3
    coarse = rng.normal(size=(rows, columns)).astype(np.float32)
    return stretched(coarse, math.ceil(columns * scale), math.ceil(rows * scale))[:height, :width]


def soften(height, radius):
    """Blurs a float array (height, width) with three box filters, which is about a Gaussian of deviation `radius`.
    An 8-bit blur would leave its steps of 1/255 as contour rings once shading takes the gradient."""
    half = max(1, round(radius))
    for axis in (0, 1) * 3:
        pad = [(half + 1, half) if a == axis else (0, 0) for a in (0, 1)]
        total, n = np.cumsum(np.pad(height, pad), axis=axis, dtype=np.float32), height.shape[axis]
        total = np.moveaxis(total, axis, 0)
        height = np.moveaxis((total[2 * half + 1:] - total[:n]) / (2 * half + 1), 0, axis)
    return height


def background(scene, colour, grain, scale=3.0, blotch=0.03):
    """Fills the photo with a surface of one colour (three values, 0 to 1), fine grain and slow blotches."""
    n = scene.side
    tone = 1 + grain * noise(scene.rng, n, n, scale * n / 512) + blotch * noise(scene.rng, n, n, n / 5)
    scene.photo = (tone * np.asarray(colour, np.float32)[:, None, None]).transpose(1, 2, 0)


def stamp(scene, shape, colour, grain=0.05, scale=4.0, bulge=0.0, gloss=0.0, shadow=0.0, alpha=1.0):
    """Paints a part into the photo; only its surroundings are touched, so that small parts are cheap.

    colour: three values, 0 to 1. grain: relative deviation of the texture, `scale` its size in pixels of a 512 pixel
    canvas. bulge: how strongly the rim is shaded as of a rounded body lit from the upper left, its width growing with
    the part. gloss: strength of the highlight. shadow: darkness of the drop shadow. alpha: opacity.
    """
    bounds = shape.getbbox()
    if bounds is None:
        return
    unit = scene.side / 512
    pad = round(14 * unit) if shadow or bulge or gloss else 0
    x0, y0 = max(bounds[0] - pad, 0), max(bounds[1] - pad, 0)
    x1, y1 = min(bounds[2] + pad, scene.side), min(bounds[3] + pad, scene.side)
    h, w, part = y1 - y0, x1 - x0, shape.crop((x0, y0, x1, y1))
    cover = np.asarray(part, np.float32) / 255                                    # (h, w)
    here = scene.photo[y0:y1, x0:x1].transpose(2, 0, 1)                           # a view (3, h, w)
    if shadow:
        fallen = ImageChops.offset(part, round(5 * unit), round(6 * unit)).filter(ImageFilter.GaussianBlur(5 * unit))
        here *= 1 - shadow / 255 * np.asarray(fallen, np.float32) * (1 - cover)
    tone = 1 + grain * noise(scene.rng, h, w, scale * unit) if grain else np.ones((h, w), np.float32)
    if bulge or gloss:
        radius = max(1.5, min(bounds[2] - bounds[0], bounds[3] - bounds[1]) / 6)
        step = max(1, int(radius / 4))               # a wide blur needs no more than every step-th pixel
        height = soften(np.asarray(part.reduce(step), np.float32) / 255, radius / step)
        dy, dx = np.gradient(height)
        lit = (dx + 1.2 * dy) * radius / step                                     # > 0: faces the light
        tone *= stretched(1 + bulge * 0.8 * np.tanh(lit / 0.8), w, h)
    paint = tone * np.asarray(colour, np.float32)[:, None, None]
    if gloss:
        shine = np.exp(-((lit / (lit.max() + 1e-6) - 0.6) / 0.25) ** 2)
        paint += stretched(gloss * shine * height, w, h)
    paint -= here
    paint *= alpha * cover
    here += paint


def develop(scene, size):
    """Canvas -> photo: defocus, averaging down, uneven light, exposure and white balance, sensor noise. Returns uint8
    (size, size, 3) and the regions, bool (size, size) each."""
    rng = scene.rng
    canvas = Image.fromarray((np.clip(scene.photo, 0, 1) * 255).astype(np.uint8))
    focus = ImageFilter.GaussianBlur(0.7 * rng.uniform(0.8, 1.4) * size / 512)
    photo = np.asarray(canvas.resize((size, size), Image.Resampling.BOX).filter(focus), np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    tilt, gain = rng.normal(size=2) * 0.06, (1 + rng.normal() * 0.04) * (1 + rng.normal(size=3) * 0.018)
    photo = photo * ((1 + tilt[0] * x + tilt[1] * y)[..., None] * gain) + rng.normal(size=photo.shape) * 255 * 0.012
    masks = [np.asarray(shape.resize((size, size), Image.Resampling.BOX)) > 127 for shape in scene.regions]
    return np.clip(photo + 0.5, 0, 255).astype(np.uint8), masks


# Rendered twin: the faults of each category, as LOCO words and saturates them

LOGICAL = {     # fault: saturation threshold, below 1 a share of the defect's area, else pixels of a 256 px photo
    "breakfast_box": {
        "missing_fruit": 2500, "wrong_fruit": 2500, "extra_fruit": 2500, "sides_swapped": 0.5, "wrong_ratio": 0.5,
        "missing_chips": 0.5, "missing_almonds": 0.5, "cereal_below": 0.5, "cereal_beside": 0.5, "cereal_mixed": 0.5},
    "juice_bottle": {
        "wrong_icon": 0.5, "missing_icon": 0.5, "missing_label": 0.5, "swapped_labels": 0.5, "shifted_label": 0.5,
        "overfilled": 0.5, "underfilled": 0.5, "empty_bottle": 0.5, "two_icons": 720},
    "pushpins": {
        "missing_pushpin": 260, "additional_pushpin": 260, "moved_pushpin": 260, "two_missing_pushpins": 260,
        "two_additional_pushpins": 260, "missing_divider": 0.5},
    "screw_bag": {
        "missing_washer": 220, "additional_washer": 220, "missing_nut": 260, "additional_nut": 260,
        "missing_long_bolt": 800, "missing_short_bolt": 550, "additional_bolt": 550, "two_long_bolts": 800,
        "two_short_bolts": 550},
    "splicing_connectors": {
        "wrong_cable_colour": 0.7, "unequal_connectors": 0.4, "wrong_cable_location": 0.5, "extra_cable": 0.5,
        "missing_cable": 700, "missing_connector": 0.8, "reversed_connector": 0.8, "loose_cable": 0.5}}
STRUCTURAL = {  # these saturate at their whole area
    "breakfast_box": ("bruised_fruit", "stain", "foreign_body", "torn_tray", "crushed_cereal"),
    "juice_bottle": ("damaged_label", "rotated_label", "foreign_body", "unknown_juice", "damaged_cap"),
    "pushpins": ("bent_pushpin", "broken_pushpin", "missing_needle", "wrong_colour", "foreign_body"),
    "screw_bag": ("broken_part", "rusty_part", "wrong_thread_colour", "torn_bag", "stained_bag"),
    "splicing_connectors": ("cut_cable", "frayed_cable", "open_lever", "broken_connector", "stain")}


# Rendered twin: breakfast_box

FRUITS = {"missing_fruit": ("TN", "TT"), "wrong_fruit": ("TTT", "TNN"), "extra_fruit": ("TTTN", "TTNN")}
TRAY = (0.5, 0.475), 0.96, 0.985, 0, 0.16            # centre, width, height, turn, radius of the corners
LEFT = [(0.11, 0.12), (0.27, 0.12), (0.31, 0.3), (0.37, 0.5), (0.4, 0.82), (0.12, 0.82)]     # the compartments without
RIGHT = [(0.44, 0.10), (0.88, 0.10), (0.87, 0.84), (0.53, 0.84), (0.5, 0.5), (0.46, 0.28)]   # their round corners
OAT, CHIP, ALMOND, CRUMB = range(4)
LEAVES = np.array([                  # half length and width, then the colours in the middle, at the rim, in the crease
    (0.0150, 0.0105, 0.78, 0.55, 0.30, 0.52, 0.32, 0.14, 0.58, 0.36, 0.16),
    (0.0480, 0.0370, 0.90, 0.74, 0.45, 0.62, 0.40, 0.15, 0.62, 0.43, 0.20),
    (0.0330, 0.0190, 0.50, 0.22, 0.11, 0.24, 0.09, 0.05, 0.42, 0.18, 0.09),
    (0.0055, 0.0045, 0.84, 0.68, 0.44, 0.72, 0.54, 0.32, 0.70, 0.52, 0.30)])


def scatter(scene, shape, pitch):
    """(n, 2) points inside a shape, about `pitch` apart, in random order."""
    rng, n = scene.rng, int(1.1 / pitch)
    grid = np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2)
    points = rng.permutation(grid + rng.uniform(-0.5, 0.5, grid.shape)) * pitch
    column, row = np.clip(scene.pixels(points), 0, scene.side - 1).astype(int).T
    return points[np.asarray(shape)[row, column] > 0]


def somewhere(scene, shape):
    """A random point well inside a shape, in scene units."""
    return scatter(scene, soft(shape, 10).point(lambda value: 255 * (value > 225)), 0.01)[0]


def blob(scene, centre, smallest, largest):
    """A natural patch whose mean radius lies between the two."""
    r = scene.rng.uniform(smallest, largest)
    return ellipse(scene, centre, r * scene.rng.uniform(0.9, 1.3), r, scene.rng.uniform(0, 180), 0.25)


def portion(shape, order, share):
    """The part of a shape that holds `share` of its pixels: those lowest in `order` (side, side)."""
    level = np.quantile(order[np.asarray(shape) > 127], share)
    return common(shape, Image.fromarray(np.where(order < level, 255, 0).astype(np.uint8)))


def rounded(scene, corners, radius):
    """A polygon grown by `radius`, its corners round."""
    return union(polygon(scene, corners), stroke(scene, 2 * radius, [*corners, *corners[:2]]))


def tray(scene):
    """The empty tray; returns the shapes of its left and right compartment."""
    white = np.array([0.95, 0.89, 0.86])
    stamp(scene, box(scene, *TRAY), white * 0.93, grain=0, bulge=0.2)
    stamp(scene, box(scene, (0.5, 0.47), 0.91, 0.935, radius=0.14), white * 0.99, 0.01, 6)
    stamp(scene, box(scene, (0.5, 0.955), 0.17, 0.012, scene.rng.normal(), 0.004), (0.2, 0.17, 0.16), 0.3)
    rooms = [rounded(scene, corners, 0.055) for corners in (LEFT, RIGHT)]
    for room, corners in zip(rooms, (LEFT, RIGHT)):
        stamp(scene, room, white * 0.84, 0.01, 8, -0.4)                                            # the walls
        stamp(scene, soft(rounded(scene, corners, 0.02), 9), white * 0.97, 0.012, 8)               # the floor
    return rooms


def tangerine(scene, centre):
    rng, r = scene.rng, scene.rng.normal(0.112, 0.005)
    skin = ellipse(scene, centre, r * rng.uniform(0.95, 1.03), r, rng.uniform(0, 180), 0.02)
    colour = (0.87, 0.38, 0.13) * rng.normal(1, (0.03, 0.06, 0.1))
    stamp(scene, skin, colour, 0.05, 3, bulge=0.75, gloss=0.12, shadow=0.35)
    stem = centre + rng.normal(size=2) * 0.018
    creases = [turned([(0.006, 0), (rng.uniform(0.02, 0.04), 0)], a, stem) for a in rng.uniform(0, 360, 7)]
    stamp(scene, stroke(scene, 0.005, *creases), (0.66, 0.26, 0.08), alpha=0.5)
    stamp(scene, ellipse(scene, stem, 0.009, 0.008, 0, 0.1), (0.22, 0.27, 0.14), 0.2, 2, 0.5)
    return skin


def nectarine(scene, centre):
    rng, r = scene.rng, scene.rng.normal(0.119, 0.006)
    skin = ellipse(scene, centre, r * rng.uniform(0.92, 1.0), r, rng.uniform(0, 180), 0.02)
    colour = (0.50, 0.13, 0.11) * rng.normal(1, (0.12, 0.2, 0.15))
    stamp(scene, skin, colour, 0.12, 8, bulge=0.8, gloss=0.2, shadow=0.35)
    spot = centre + turned([(rng.uniform(0.02, 0.08), 0)], rng.uniform(0, 360))[0]
    blush = common(soft(blob(scene, spot, 0.04, 0.09), 14), soft(skin, 6))
    stamp(scene, blush, (0.82, 0.62, 0.28), 0.1, 6, alpha=rng.uniform(0.2, 1.0))
    return skin


def heap(scene, kinds, centres):
    """A pile of n leaves, later ones on top. kinds: n rows of LEAVES; centres (n, 2). Every leaf has its own size,
    turn, shade and tilt; the gaps are dark. All are drawn as numbers into one plan, then painted at once."""
    rng, n, s = scene.rng, len(centres), scene.side
    radii = LEAVES[kinds, :2] * rng.uniform(0.75, 1.25, (n, 2))
    shade = rng.normal(1, 0.11, (n, 1, 1)).clip(0.7, 1.3) * rng.normal(1, 0.03, (n, 1, 3))
    colours = LEAVES[kinds, 2:].reshape(n, 3, 3) * shade                                           # (n, place, rgb)
    angle, t = rng.uniform(0, np.pi, n), np.linspace(0, 2 * np.pi, 12, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]).transpose(2, 0, 1)                                  # (n, 2, 2)
    rim = np.stack([np.cos(t), np.sin(t)], 1) * (1 + 0.06 * rng.normal(size=(n, 12, 1))) * radii[:, None] @ turn
    corners = scene.pixels(rim + centres[:, None])                                                 # (n, 12, 2)
    plan = Image.new("I", (s, s))
    pen = ImageDraw.Draw(plan)
    for i, points in enumerate(corners.reshape(n, -1).tolist()):
        pen.polygon(points, fill=i + 1, outline=-1)
    x0, y0, x1, y1 = plan.getbbox()
    plan = np.asarray(plan)[y0:y1, x0:x1]
    row, col = np.nonzero(plan)
    leaf = plan[row, col] - 1                                                                      # -2 in a gap
    slope = rng.normal((-0.10, -0.16), 0.16, (n, 2))
    table = np.concatenate([corners.mean(1) - (x0, y0), (turn / radii[..., None] / s).reshape(n, 4), slope,
                            colours.reshape(n, 9)], 1).T.astype(np.float32)                        # (17, n)
    cx, cy, ux, uy, vx, vy, su, sv, *colours = table.take(leaf, axis=1)                            # each (pixels,)
    u, v = ux * (col - cx) + uy * (row - cy), vx * (col - cx) + vy * (row - cy)       # on the leaf: its rim at radius 1
    edge, crease = np.minimum(u * u + v * v, 1) ** 2, np.exp(-(u / 0.55) ** 2 - (v / 0.22) ** 2)
    tone = 1 + 0.10 * noise(rng, y1 - y0, x1 - x0, 3.0 * s / 512)[row, col]
    tone *= (1 + u * su + v * sv) * (leaf >= 0)
    for c, gap in enumerate((0.20, 0.11, 0.04)):
        core, side, middle = colours[c::3]
        paint = tone * (core + edge * (side - core) + crease * (middle - core)) + gap * (leaf < 0)
        scene.photo[row + y0, col + x0, c] = paint


def spoil_box(scene, fault, bowl, floor, granola, skins):
    """Draws a structural fault into the finished box; returns its shape."""
    rng = scene.rng
    if fault == "bruised_fruit":
        skin = skins[rng.integers(len(skins))]
        damage = common(blob(scene, somewhere(scene, skin), 0.03, 0.055), skin)
        stamp(scene, soft(damage, 2), (0.25, 0.13, 0.06), 0.2, 5, -0.4, alpha=rng.uniform(0.6, 0.95))
    elif fault == "stain":
        bare = minus(bowl, *skins)
        damage = common(blob(scene, somewhere(scene, bare), 0.03, 0.06), bare)
        stamp(scene, soft(damage, 1.5), (0.45, 0.25, 0.10), 0.2, 6, alpha=rng.uniform(0.35, 0.8))
    elif fault == "foreign_body":
        colour = [(0.16, 0.28, 0.62), (0.13, 0.13, 0.14), (0.16, 0.45, 0.20), (0.80, 0.80, 0.83)][rng.integers(4)]
        centre, length, width = somewhere(scene, floor), rng.uniform(0.06, 0.12), rng.uniform(0.025, 0.05)
        damage = box(scene, centre, length, width, rng.uniform(0, 180), rng.uniform(0.003, 0.011))
        stamp(scene, damage, colour, 0.05, 3, bulge=0.7, gloss=0.2, shadow=0.5)
    elif fault == "torn_tray":                                             # a ragged wedge from a side, below the food
        along, depth, half = rng.uniform(-0.25, 0.25), rng.uniform(0.09, 0.16), rng.uniform(0.02, 0.045)
        inward = np.concatenate([np.linspace(0, 1, 8), np.linspace(1, 0, 8)])
        flank = half * (1 - inward) * np.repeat((-1, 1), 8) + rng.normal(size=16) * 0.007
        wedge = turned(np.stack([along + flank, 0.5 - depth * inward], 1), rng.choice((0, 90, 180, 270)), TRAY[0])
        damage = minus(common(polygon(scene, wedge), box(scene, *TRAY)), *skins, floor)
        stamp(scene, soft(damage, 1), (0.12, 0.12, 0.14), 0.1)
    else:                                                                  # crushed_cereal
        damage = common(blob(scene, somewhere(scene, granola), 0.045, 0.075), floor)
        stamp(scene, soft(damage, 4), (0.60, 0.44, 0.25), 0.1)
        crumbs = scatter(scene, damage, 0.008)
        heap(scene, [CRUMB] * len(crumbs), crumbs)
    return damage


def breakfast_box(scene, fault=None):
    """A tray: left two tangerines and one nectarine, right granola above, banana chips and almonds below."""
    rng, side = scene.rng, scene.side
    scene.aim(0.006, 1.0, 0.008)
    if fault == "sides_swapped":                                                                   # x becomes 1 - x
        scene.pose[:, 2] += scene.pose[:, 0]
        scene.pose[:, 0] *= -1
    background(scene, (0.12, 0.12, 0.15), 0.05)
    bowl, room = tray(scene)

    fruits = rng.permutation(list(rng.choice(FRUITS.get(fault, ["TTN"]))))
    heights = np.linspace(0.19, 0.76, max(3, len(fruits)))
    lean = rng.choice((-1, 1)) * rng.normal(0.042, 0.005) * (-1.0) ** np.arange(len(heights))      # zigzag
    skins = {"T": [], "N": []}
    for fruit, k in zip(fruits, rng.permutation(len(heights))):
        centre = (0.183 + 0.11 * heights[k] + lean[k], heights[k]) + rng.normal(size=2) * 0.008
        skins[fruit].append((tangerine if fruit == "T" else nectarine)(scene, centre))

    floor = rounded(scene, RIGHT, 0.035)
    stamp(scene, floor, (0.22, 0.12, 0.05), 0.2)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    downward = y + x * rng.normal(0, 0.03)
    order = {"cereal_below": -downward, "cereal_beside": x * rng.choice((-1, 1)) + y * rng.normal(0, 0.1),
             "cereal_mixed": noise(rng, side, side, side / 9)}.get(fault, downward)
    usual = share = rng.normal(0.6, 0.02)
    if fault == "wrong_ratio":
        share += rng.choice((-1, 1)) * rng.uniform(0.15, 0.22)
    granola = portion(floor, order, share)
    rest = minus(floor, granola)
    oats, mix = scatter(scene, granola, 0.0165), scatter(scene, rest, 0.034)
    heap(scene, [OAT] * len(oats), oats)
    almonds = {"missing_chips": 1.0, "missing_almonds": 0.0}.get(fault, rng.normal(0.36, 0.04)) * len(mix)
    heap(scene, np.where(rng.permutation(len(mix)) < almonds, ALMOND, CHIP), mix)

    if fault in STRUCTURAL["breakfast_box"]:
        scene.regions = [spoil_box(scene, fault, bowl, floor, granola, skins["T"] + skins["N"])]
    elif fault in ("wrong_fruit", "extra_fruit"):
        scene.regions = [union(*skins["T" if len(skins["T"]) > 2 else "N"])]
    elif fault == "wrong_ratio":
        less, more = (portion(floor, order, part) for part in sorted((usual, share)))
        scene.regions = [minus(more, less)]
    elif fault:
        scene.regions = {"missing_fruit": [bowl], "sides_swapped": [bowl, room], "missing_chips": [rest],
                         "missing_almonds": [rest]}.get(fault, [granola, rest])


# Rendered twin: juice_bottle

JUICES = {"mango": (0.72, 0.65, 0.24), "cherry": (0.32, 0.09, 0.06), "banana": (0.72, 0.69, 0.57)}
UNKNOWN = ((0.25, 0.45, 0.15), (0.16, 0.30, 0.55), (0.45, 0.22, 0.50), (0.75, 0.38, 0.08), (0.10, 0.08, 0.08))
GLASS = np.array([(0.145, 0.15), (0.145, 0.29), (0.16, 0.325), (0.21, 0.355), (0.238, 0.395), (0.245, 0.45),
                  (0.243, 0.62), (0.236, 0.72), (0.243, 0.82), (0.243, 0.895), (0.232, 0.92)])     # half width, height


def ring(x, y, rx, ry, start=0, end=360):
    """Points along an ellipse, or along its arc between two angles in degrees."""
    return [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in np.radians(np.linspace(start, end, 13))]


GLYPHS = {"1": [[(0.25, 0.2), (0.5, 0), (0.5, 1)], [(0.25, 1), (0.75, 1)]], "0": [ring(0.5, 0.5, 0.36, 0.5)],
          "%": [[(0.9, 0), (0.1, 1)], ring(0.2, 0.2, 0.17, 0.2), ring(0.8, 0.8, 0.17, 0.2)],
          "J": [[(0.7, 0), (0.7, 0.75), *ring(0.45, 0.75, 0.25, 0.25, 30, 180)]],
          "u": [[(0.15, 0.35), *ring(0.5, 0.72, 0.35, 0.28, 180, 0), (0.85, 0.35), (0.85, 1)]],
          "i": [[(0.5, 0.35), (0.5, 1)], [(0.5, 0), (0.5, 0.08)]], "c": [ring(0.5, 0.67, 0.35, 0.33, -45, -315)],
          "e": [[(0.2, 0.67), *ring(0.5, 0.67, 0.35, 0.33, 0, -315)]], " ": []}
TEXT = [np.array(line) * (0.021, 0.036) + (0.0295 * (k - 4.9), -0.018)
        for k, letter in enumerate("100% Juice") for line in GLYPHS[letter]]


def half_width(height):
    return np.interp(height, GLASS[:, 1], GLASS[:, 0])


def bottle_part(scene, inset, top=0.15):
    """The bottle's outline below height `top`, made narrower by `inset` on each side."""
    y = np.array([top, *GLASS[GLASS[:, 1] > top, 1]])
    half, y = half_width(y) - inset, np.minimum(y, GLASS[-1, 1] - inset)
    return polygon(scene, np.concatenate([np.stack([0.5 - half, y], 1), np.stack([0.5 + half, y], 1)[::-1]]))


def icon(scene, fruit, centre, angle):
    """Paints a fruit about 0.12 wide at a centre; returns the area it takes."""
    put = partial(turned, angle=angle, centre=centre)
    if fruit == "mango":
        body = ellipse(scene, put([(0.012, 0.008)])[0], 0.052, 0.03, angle)
        stamp(scene, body, (0.93, 0.55, 0.10), 0.04, 4, bulge=0.5, gloss=0.15)
        tip, stalk = (-0.065, 0), (0.025, -0.02)
        leaf = [*curve(tip, (-0.03, -0.045), stalk), *curve(stalk, (-0.02, -0.015), tip)]
        stamp(scene, polygon(scene, put(leaf)), (0.10, 0.30, 0.12), 0.1)
    elif fruit == "cherry":
        stems = [put(curve((0.005, -0.042), (x / 2, -0.02), (x, 0.012))) for x in (-0.03, 0.032)]
        stamp(scene, stroke(scene, 0.006, *stems), (0.20, 0.42, 0.14))
        for x in (-0.028, 0.03):
            ball = ellipse(scene, put([(x, 0.016)])[0], 0.029, 0.023, angle)
            stamp(scene, ball, (0.62, 0.09, 0.08), 0.04, 4, bulge=0.6, gloss=0.25)
    else:
        for y in (-0.012, 0.002, 0.016):
            finger = put(curve((-0.058, y + 0.008), (0.01, y + 0.03), (0.04, y - 0.03)))
            stamp(scene, stroke(scene, 0.021, finger), (0.30, 0.30, 0.08), 0)
            stamp(scene, stroke(scene, 0.014, finger), (0.80, 0.76, 0.15), bulge=0.3)
        stamp(scene, stroke(scene, 0.013, put([(0.035, -0.042), (0.045, -0.046)])), (0.12, 0.13, 0.08), 0)
    return ellipse(scene, centre, 0.075, 0.045, angle)


def label(scene, paper, centre, width, height, angle, text):
    """Prints a label, the shape `paper` with a frame, and the text where asked for."""
    stamp(scene, paper, (0.93, 0.66, 0.25) * scene.rng.normal(1, 0.02, 3), 0.03, 3)
    shine = common(soft(box(scene, centre, width * 0.7, height * 0.5, angle), 16), paper)
    stamp(scene, shine, (0.96, 0.86, 0.50), 0.03)
    outer, inner = (box(scene, centre, width * 0.92 - d, height * 0.84 - d, angle, 0.02 - d / 2) for d in (0, 0.006))
    stamp(scene, minus(outer, inner), (0.36, 0.30, 0.16))
    if text:
        stamp(scene, stroke(scene, 0.0075, *(turned(line, angle, centre) for line in TEXT)), (0.16, 0.14, 0.11), 0)


def bottle(scene, colour, level):
    """The bottle with juice of a colour up to a level, empty where that is None; returns its screw thread."""
    rng, glass = scene.rng, bottle_part(scene, 0)
    stamp(scene, glass, (0.075, 0.08, 0.085), 0.1, 8)
    stamp(scene, minus(glass, bottle_part(scene, 0.012)), (0.22, 0.22, 0.23), 0.25, 20)
    if level:
        filled = bottle_part(scene, 0.016, level)
        stamp(scene, filled, colour, 0.03, 30, 0.45)
        stamp(scene, common(soft(box(scene, (0.5, 0.72), 0.34, 0.4), 30), filled), colour * 0.82, 0.02, 30, alpha=0.7)
        stamp(scene, ellipse(scene, (0.5, level), half_width(level) - 0.016, 0.007), colour * 0.7 + 0.12, 0.1, 3)
    for sign in (-1, 1):                                                                           # light on the glass
        for x, top, bottom in ((0.228, 0.42, 0.6), (0.212, 0.74, 0.88), (0.136, 0.17, 0.29)):
            gleam = stroke(scene, 0.008, [(0.5 + sign * x, top), (0.5 + sign * (x + 0.003), bottom)])
            stamp(scene, soft(gleam, 2), (0.85, 0.87, 0.9), 0, alpha=rng.uniform(0.25, 0.55))
        shoulder = curve((0.5 + sign * 0.07, 0.40), (0.5 + sign * 0.19, 0.385), (0.5 + sign * 0.215, 0.44))
        stamp(scene, soft(stroke(scene, 0.014, shoulder), 3), (0.95, 0.95, 0.92), 0, alpha=rng.uniform(0.2, 0.4))
    thread = [box(scene, (0.5, y), width, 0.026, rng.normal() * 0.5, 0.011)
              for y, width in ((0.085, 0.336), (0.11, 0.32), (0.135, 0.34), (0.155, 0.332))]
    for turn in thread:
        stamp(scene, turn, (0.17, 0.18, 0.20), 0.3, 14, bulge=0.9, gloss=0.3)
    return union(*thread)


def spoil_bottle(scene, fault, papers, paper, thread, juice):
    """Draws a structural fault onto the finished bottle, a damaged label onto `paper`; returns its shape."""
    rng = scene.rng
    if fault == "damaged_label":                                                # torn down to the juice, or stained
        damage = common(blob(scene, somewhere(scene, paper), 0.03, 0.06), paper)
        colour, alpha = (juice, 1) if rng.random() < 0.5 else ((0.30, 0.18, 0.10), rng.uniform(0.4, 0.8))
        stamp(scene, damage, colour, 0.1, 5, -0.2, alpha=alpha)
    elif fault == "foreign_body":
        clear = minus(bottle_part(scene, 0.03, 0.3), *papers)
        damage = common(blob(scene, somewhere(scene, clear), 0.016, 0.035), clear)
        colour = [(0.10, 0.09, 0.08), (0.66, 0.65, 0.62), (0.15, 0.35, 0.15)][rng.integers(3)]
        stamp(scene, soft(damage, 1), colour, 0.2, 4, 0.5)
    else:                                                                       # damaged_cap: a piece chipped off
        edge = 0.5 + rng.choice((-1, 1)) * rng.uniform(0.08, 0.15), rng.uniform(0.085, 0.15)
        damage = common(blob(scene, edge, 0.025, 0.045), thread)
        stamp(scene, damage, (0.03, 0.03, 0.035), 0.2)
        stamp(scene, minus(damage, blob(scene, edge, 0.02, 0.03)), (0.6, 0.62, 0.66), 0.3, 3, alpha=0.6)
    return damage


def juice_bottle(scene, fault=None):
    """A bottle of one of three juices before black; the fruit on its upper label is the juice's, the lower one reads
    100% Juice, and it is filled up to the neck."""
    rng = scene.rng
    scene.aim(0.008, 0.7, 0.008)
    background(scene, (0.022, 0.022, 0.028), 0.1)
    stamp(scene, soft(box(scene, (0.5, 0.99), 1.4, 0.16), 5), (0.05, 0.05, 0.055), 0.2)            # the table

    juice = list(JUICES)[rng.integers(3)]
    others = [name for name in JUICES if name != juice]
    colour = UNKNOWN[rng.integers(len(UNKNOWN))] if fault == "unknown_juice" else JUICES[juice]
    colour = colour * rng.normal(1, (0.015, 0.015, 0.015)) * rng.normal(1, 0.05)
    usual = level = rng.normal(0.228, 0.005)
    if fault == "overfilled":
        level = rng.uniform(0.155, 0.18)
    elif fault == "underfilled":
        level = rng.uniform(0.33, 0.48)
    thread = bottle(scene, colour, None if fault == "empty_bottle" else level)

    fruit = others[rng.integers(2)] if fault == "wrong_icon" else juice
    spots = {"missing_icon": (), "two_icons": (-0.075, 0.075)}.get(fault, (0,))
    heights = [0.545, 0.80][::-1 if fault == "swapped_labels" else 1] + rng.normal(size=2) * 0.003
    odd = rng.integers(2)                                                                          # the label at fault
    papers, icons = [], []
    for k, (width, height) in enumerate(((0.345, 0.165), (0.33, 0.082))):
        centre, angle = np.array([0.5 + rng.normal() * 0.005, heights[k]]), rng.normal() * 0.7
        if fault == "shifted_label" and k == odd:
            centre += [(rng.choice((-1, 1)) * 0.06, 0), (0, (0.09, -0.09)[k])][rng.integers(2)]
        if fault == "rotated_label" and k == odd:
            angle += rng.choice((-1, 1)) * rng.uniform(6, 15)
        papers.append(box(scene, centre, width, height, angle))
        if fault != "missing_label" or k != odd:
            label(scene, papers[k], centre, width, height, angle, text=k == 1)
            icons += [icon(scene, fruit, turned((x, 0.004), angle, centre), angle) for x in spots if k == 0]

    if fault in ("wrong_icon", "two_icons"):
        scene.regions = [union(*icons)]
    elif fault == "missing_icon":
        scene.regions = [ellipse(scene, (0.5, heights[0]), 0.075, 0.045)]
    elif fault == "swapped_labels":
        scene.regions = papers
    elif fault in ("missing_label", "shifted_label", "rotated_label"):
        scene.regions = [papers[odd]]
    elif fault in ("overfilled", "underfilled"):
        more, less = (bottle_part(scene, 0.016, top) for top in sorted((usual, level)))
        scene.regions = [minus(more, less)]
    elif fault in ("empty_bottle", "unknown_juice"):
        scene.regions = [minus(bottle_part(scene, 0.016, level), *papers)]
    elif fault:
        scene.regions = [spoil_bottle(scene, fault, papers, papers[odd], thread, colour)]


# Rendered twin: pushpins

PINS_OFF = {"missing_pushpin": [-1], "additional_pushpin": [1], "moved_pushpin": [-1, 1],
            "two_missing_pushpins": [-1, -1], "two_additional_pushpins": [1, 1]}     # one number a compartment hit
COLUMNS, ROWS = (0.025, 0.21, 0.40, 0.59, 0.78, 0.97), (0.06, 0.36, 0.655, 0.95)     # where the walls stand
HALF = np.array([(-0.064, 0.036), (-0.05, 0.038), (-0.042, 0.020), (0.022, 0.016), (0.03, 0.036), (0.04, 0.042),
                 (0.05, 0.034), (0.056, 0.012)])                                     # of a pin: (along, across)
PIN = np.concatenate([HALF, HALF[::-1] * (1, -1)])
NEEDLE = np.array([(0.05, 0), (0.10, 0), (0.155, 0)])
NO_YELLOW = [(0.75, 0.10, 0.08), (0.12, 0.50, 0.20), (0.15, 0.25, 0.70), (0.80, 0.80, 0.78)]


def pushpin(scene, low, high, taken, fault):
    """One pin at any angle between the corners low and high, clear of the centres `taken`. Returns its body's shape."""
    rng = scene.rng
    body, angle = PIN * rng.normal(1, 0.03), rng.uniform(0, 360)
    colour = np.array((0.98, 0.66, 0.04)) * rng.normal(1, 0.04)
    reach = turned(np.concatenate([body, NEEDLE]), angle, squeeze=0.59)
    spots = rng.uniform(low + 0.012 - reach.min(0), high - 0.012 - reach.max(0), (20, 2))
    spot = max(spots, key=lambda s: min((np.linalg.norm((s - t) / (0.59, 1)) for t in taken), default=0))
    taken.append(spot)
    put = partial(turned, angle=angle, centre=spot, squeeze=0.59)
    shape, needle = polygon(scene, put(body)), NEEDLE.copy()
    if fault == "wrong_colour":
        colour = np.array(NO_YELLOW[rng.integers(4)])
        scene.regions.append(shape)
    if fault == "bent_pushpin":
        needle[2] = needle[1] + turned([(0.055, 0)], rng.choice((-1, 1)) * rng.uniform(50, 110))[0]
    if fault in ("bent_pushpin", "missing_needle"):
        scene.regions.append(stroke(scene, 0.03, put(needle)))
    if fault == "broken_pushpin":                                                    # the head has snapped off
        cut = rng.uniform(-0.03, 0.02)
        head = [(cut, -0.06), (cut + 0.015, 0), (cut, 0.06), (-0.1, 0.06), (-0.1, -0.06)]
        scene.regions.append(common(shape, polygon(scene, put(head))))
        shape = minus(shape, scene.regions[-1])
    if fault != "missing_needle":
        stamp(scene, stroke(scene, 0.0065, put(needle)), (0.50, 0.46, 0.42), grain=0.15)
    stamp(scene, shape, colour, bulge=0.45, gloss=0.25)
    flanges = stroke(scene, 0.009, *(put([(x, -0.036), (x, 0.036)]) for x in (-0.057, 0.043)), caps=False)
    stamp(scene, common(flanges, shape), colour * 1.12, alpha=0.8)                   # they catch the light
    return shape


def clear_box(scene, fault):
    """The empty box with its clip, rims and walls."""
    rng, grey = scene.rng, (0.62, 0.59, 0.57)
    walls = [[(COLUMNS[c], ROWS[r]), (COLUMNS[c], ROWS[r + 1])] for c in range(1, 5) for r in range(3)]
    walls += [[(COLUMNS[c], ROWS[r]), (COLUMNS[c + 1], ROWS[r])] for r in (1, 2) for c in range(5)]
    walls = [np.array(wall) + rng.normal(0, 0.0015, (2, 2)) for wall in walls]
    joints = [wall[0] + [(0, -0.012), (0, 0.012)] for wall in walls if wall[0].min() > 0.1]
    if fault == "missing_divider":
        scene.regions.append(stroke(scene, 0.02, walls.pop(rng.integers(len(walls)))))
    clip = [(0.39, 0.05), (0.4, 0.012), (0.42, 0.03), (0.57, 0.03), (0.59, 0.012), (0.6, 0.05)]
    stamp(scene, polygon(scene, clip), grey, grain=0.2, alpha=0.3)
    stamp(scene, box(scene, (0.495, 0.033), 0.08, 0.034, radius=0.008), (0.3, 0.32, 0.36), bulge=0.6, alpha=0.8)
    stamp(scene, stroke(scene, 0.014, [(0.1, 0.982), (0.9, 0.982)]), grey, grain=0.15, scale=25, alpha=0.3)
    frames = [box(scene, (0.4975, 0.505), 0.945 + w, 0.89 + w, radius=0.045 + w / 2)
              for w in (0.022, 0.014, -0.012, -0.02)]
    stamp(scene, minus(frames[0], frames[3]), grey, grain=0, alpha=0.22)
    rims = union(minus(frames[0], frames[1]), minus(frames[2], frames[3]))
    stamp(scene, union(rims, stroke(scene, 0.0095, *walls, caps=False)), grey, grain=0.2, scale=20, alpha=0.6)
    stamp(scene, stroke(scene, 0.02, *joints, caps=False), grey, alpha=0.6)


def pushpins(scene, fault=None):
    """A clear box of 3 x 5 compartments with exactly one yellow pin in each, at any angle."""
    rng = scene.rng
    scene.aim(0.008, 0.6, 0.012)
    background(scene, (0.045, 0.045, 0.055), grain=0.06, blotch=0.2)
    clear_box(scene, fault)
    count, order = np.ones(15, int), rng.permutation(15)                             # a fault hits the first of `order`
    for cell, off in zip(order, PINS_OFF.get(fault, [])):
        count[cell] += off
    for cell in range(15):
        row, column = divmod(cell, 5)
        low, high = np.array((COLUMNS[column], ROWS[row])), np.array((COLUMNS[column + 1], ROWS[row + 1]))
        taken, here = [], fault if cell == order[0] else None
        pins = [pushpin(scene, low, high, taken, here) for _ in range(count[cell])]
        if not pins:
            scene.regions.append(box(scene, (low + high) / 2, 0.175, 0.28))
        if len(pins) > 1:
            scene.regions.append(union(*pins))
        if here == "foreign_body":
            spot = (low + high) / 2 + rng.uniform(-0.05, 0.05, 2)
            scene.regions.append(ellipse(scene, spot, *rng.uniform(0.02, 0.045, 2), wobble=0.25))
            stamp(scene, scene.regions[-1], rng.uniform(0.25, 0.75, 3) * (0.8, 0.8, 1), grain=0.2, bulge=0.5)


# Rendered twin: screw_bag

PARTS = {"long_bolt": 1, "short_bolt": 1, "washer": 2, "nut": 2}
SWAPS = {"missing_washer": ("washer", None), "additional_washer": (None, "washer"), "missing_nut": ("nut", None),
         "additional_nut": (None, "nut"), "missing_long_bolt": ("long_bolt", None),
         "missing_short_bolt": ("short_bolt", None), "additional_bolt": (None, "short_bolt"),
         "two_long_bolts": ("short_bolt", "long_bolt"), "two_short_bolts": ("long_bolt", "short_bolt")}  # part out, in
SHANK = {"long_bolt": 0.36, "short_bolt": 0.20}                                      # length in heights of the photo
ROUND = {"washer": (CIRCLE * 0.062, CIRCLE * 0.042), "nut": (CIRCLE[::10] * 0.064, CIRCLE * 0.032)}     # outline, bore
THREADS = [(0.75, 0.50, 0.12), (0.10, 0.10, 0.11), (0.62, 0.28, 0.16)]               # brass, black, copper
DIRT = [(0.36, 0.21, 0.08), (0.42, 0.10, 0.08), (0.10, 0.28, 0.36)]


def room_for(rng, kind, taken):
    """Centre and angle of a part in the middle of the bag, clear of the others or as clear as 60 tries find.
    taken: list of (x, y, half width) of points along the parts that lie there already."""
    half, width = (SHANK[kind] / 2 + 0.025, 0.04) if kind in SHANK else (0, 0.05)
    spine, others, tries = np.linspace((-half, 0), (half, 0), 9), np.array(taken).reshape(-1, 3), []
    for _ in range(60):
        centre, angle = rng.uniform((0.19, 0.25), (0.67, 0.73)), rng.uniform(0, 360)
        points = turned(spine, angle, centre, 0.69)                                  # (9, 2)
        apart = np.linalg.norm((points[:, None] - others[:, :2]) / (0.69, 1), axis=2) - others[:, 2] - width
        gap = min((points - (0.13, 0.17)).min(), ((0.73, 0.81) - points).min(), apart.min(initial=1))
        tries.append((gap, centre, angle, points))
        if gap > 0:
            break
    _, centre, angle, points = max(tries, key=lambda one: one[0])
    taken.extend((x, y, width) for x, y in points)
    return centre, angle


def hardware(scene, kind, centre, angle, fault):
    """A bolt, washer or nut. Returns its shape."""
    rng, gone = scene.rng, None
    put = partial(turned, angle=angle, centre=centre, squeeze=0.69)

    def part(outline, *holes):
        shape = minus(polygon(scene, put(outline)), *(polygon(scene, put(hole)) for hole in holes))
        return minus(shape, gone) if gone else shape

    def silhouette():
        return union(part(head), part(shank)) if end else part(*ROUND[kind])

    zinc, steel = np.array((0.66, 0.70, 0.74)) * rng.normal(1, 0.03), np.array((0.66, 0.66, 0.56)) * rng.normal(1, 0.03)
    end = SHANK.get(kind, 0) / 2
    head, shank = slab(0.05, 0.088) - (end, 0), slab(2 * end, 0.042)
    if fault == "broken_part":
        cut = rng.uniform(0.0, 0.1) - end if end else rng.uniform(-0.02, 0.02)
        jags = [(cut + rng.uniform(-0.015, 0.015), y) for y in (-0.06, -0.02, 0.02, 0.06)]
        whole, gone = silhouette(), part(jags + [(-0.3, 0.06), (-0.3, -0.06)])
        scene.regions.append(common(whole, gone))
    shape = silhouette()
    if end:
        if fault == "wrong_thread_colour":
            steel = np.array(THREADS[rng.integers(3)])
            scene.regions.append(part(shank))
        n = int(end / 0.0035)
        thread = np.stack([np.linspace(0.03 - end, end, n), np.where(np.arange(n) % 2, 0.03, -0.03)], 1)
        stamp(scene, part(shank), steel, grain=0.1, bulge=0.6, gloss=0.3, shadow=0.4)
        stamp(scene, common(stroke(scene, 0.004, put(thread)), part(shank)), steel * 0.35, grain=0, alpha=0.5)
        stamp(scene, part(head), zinc * 1.1, grain=0.05, bulge=0.6, gloss=0.3, shadow=0.4)
        for y, tone in ((-0.018, 1.5), (0.012, 0.4)):                                # the round head mirrors the lamps
            band = stroke(scene, 0.013, put([(-end - 0.03, y), (0.03 - end, y)]))
            stamp(scene, common(band, part(head)), zinc * tone, grain=0, alpha=0.6)
    else:
        stamp(scene, shape, zinc, grain=0.1, bulge=0.8, gloss=0.35, shadow=0.4)
        detail = stroke(scene, 0.006, put([(0.034, 0), (0.054, 0.006)]))             # a spring washer's gap
        if kind == "nut":
            detail = part(ROUND[kind][1] * 1.25, ROUND[kind][1])                     # the thread inside
        stamp(scene, common(detail, shape), zinc * 0.4, grain=0.1, alpha=0.75)
    if fault == "rusty_part":
        scene.regions.append(common(shape, ellipse(scene, centre, 0.09, 0.09, wobble=0.4)))
        stamp(scene, scene.regions[-1], (0.42, 0.20, 0.08), grain=0.35, scale=7, alpha=rng.uniform(0.7, 0.95))
    return shape


def bag(scene):
    """A clear bag with its folds, zip and print."""
    rng, n = scene.rng, scene.side
    corners = np.array([(0.07, 0.09), (0.925, 0.12), (0.925, 0.90), (0.065, 0.87)]) + rng.normal(0, 0.006, (4, 2))
    film = polygon(scene, corners)
    folds = np.tanh(2.5 * noise(rng, n, n, n / 4.5) + 0.6 * noise(rng, n, n, n / 14))
    stamp(scene, film, (0.08, 0.08, 0.095), grain=0)
    stamp(scene, common(film, Image.fromarray(np.uint8(127 + 127 * folds))), (0.12, 0.118, 0.115), grain=0.03)
    for corner in corners[[0, 0, 1, 2, 3, 3]]:                                       # creases run in from the corners
        end = rng.uniform(0.25, 0.7, 2)
        crease = curve(corner, (corner + end) / 2 + rng.normal(0, 0.06, 2), end)
        crease = common(film, stroke(scene, rng.uniform(0.004, 0.012), crease))
        stamp(scene, crease, (0.45, 0.44, 0.42), grain=0, alpha=rng.uniform(0.05, 0.2))
    rim = np.linspace(corners, np.roll(corners, -1, 0), 12, axis=1) + rng.normal(0, 0.001, (4, 12, 2))
    stamp(scene, stroke(scene, 0.005, *rim, caps=False), (0.40, 0.39, 0.38), grain=0, alpha=0.5)
    stamp(scene, stroke(scene, 0.016, [(0.782, 0.115), (0.786, 0.89)]), (0.62, 0.62, 0.64), bulge=0.6, alpha=0.6)
    sign = ([(0.835, 0), (0.885, -0.035), (0.885, 0.035), (0.835, 0)], [(0.86, 0.06), (0.86, 0.088)],
            [(0.817, -0.025), (0.817, 0.03)])                                        # of recycling, over and over
    signs = [line + np.array((0, y)) for y in np.arange(rng.uniform(-0.1, 0.05), 1, 0.152) for line in sign]
    stamp(scene, common(stroke(scene, 0.008, *signs, caps=False), film), (0.85, 0.85, 0.85), grain=0.1)


def screw_bag(scene, fault=None):
    """A clear bag with two washers, two nuts, a long and a short bolt in any pose."""
    rng = scene.rng
    scene.aim(0.01, 1.0, 0.012)
    background(scene, (0.03, 0.03, 0.032), grain=0.1, blotch=0.1)
    bag(scene)
    out, added = SWAPS.get(fault, (None, None))
    parts = [kind for kind, n in PARTS.items() for _ in range(n - (kind == out) + (kind == added))]
    hit, taken, shapes = rng.integers(2 if fault == "wrong_thread_colour" else len(parts)), [], []
    for i, kind in enumerate(parts):
        shapes.append(hardware(scene, kind, *room_for(rng, kind, taken), fault if i == hit else None))
    if added:
        scene.regions.append(union(*(shape for shape, kind in zip(shapes, parts) if kind == added)))
    elif out:
        scene.regions.append(polygon(scene, [(0.09, 0.11), (0.76, 0.13), (0.76, 0.87), (0.09, 0.85)]))
    if fault in ("torn_bag", "stained_bag"):
        outline = CIRCLE[::6] * rng.uniform(0.5, 1.2, (10, 1)) * rng.uniform(0.032, 0.06, 2)
        centre = rng.uniform((0.14, 0.17), (0.7, 0.8))
        spot = polygon(scene, outline + centre)
        if fault == "torn_bag":                                                      # the torn film curls up, white
            spot, hole = (minus(shape, *shapes) for shape in (spot, polygon(scene, outline * 0.75 + centre)))
            stamp(scene, spot, (0.62, 0.61, 0.60), grain=0.25)
            stamp(scene, hole, (0.025, 0.025, 0.027))
        else:
            stamp(scene, soft(spot, 2), DIRT[rng.integers(3)], grain=0.25, alpha=rng.uniform(0.55, 0.9))
        scene.regions.append(spot)


# Rendered twin: splicing_connectors

CABLES = {2: (0.86, 0.68, 0.16), 3: (0.26, 0.32, 0.72), 5: (0.74, 0.13, 0.11)}       # colour by number of clamps
PITCH = 0.098                                                                        # of the clamps
ORANGE, COPPER = np.array((0.96, 0.31, 0.07)), np.array((0.72, 0.42, 0.22))


def mesh(scene):
    """Cuts the background into expanded metal: rounded wires where |cos u + cos v| is small, and between them staggered
    diamond holes."""
    n, rng = scene.side, scene.rng
    angle, k = rng.normal(0, 0.01), 2 * math.pi / (0.075 * n)
    c, s = k * math.cos(angle), k * math.sin(angle)
    x, y = np.arange(n, dtype=np.float32), np.arange(n, dtype=np.float32)[:, None]
    a, b = np.cos(c * x - s * y + rng.uniform(0, 6.3)), np.cos(s * x + c * y + rng.uniform(0, 6.3))     # (n, n) each
    wire = np.clip(1.2 - np.abs(a + b + 0.08) / 0.52, 0, 1)                          # 1 on a wire, 0 in a hole
    knot = np.square(np.square(np.square((a - b) / 2)))                              # 1 where wires meet: a glint
    scene.photo *= (0.06 + wire * (0.62 + 0.5 * knot * wire) * (1 + 0.25 * (a + b)))[..., None]


def connector(scene, centre, angle, side, clamps, used, fault):
    """A connector, side: 1 levers to the right, -1 left; the clamps in `used` {clamp: colour} show the cable. Returns
    its shape."""
    rng, put = scene.rng, partial(turned, angle=angle, centre=centre, squeeze=0.5)
    orange, hit, gone = ORANGE * rng.normal(1, 0.05), rng.integers(clamps), None

    def part(x, y, w, h):
        shape = polygon(scene, put(slab(w, h) + (side * x, y)))
        return minus(shape, gone) if gone else shape

    whole = part(0, 0, 0.32, clamps * PITCH + 0.03)
    if fault == "broken_connector":                                                  # a corner or an end of it
        spot = put([(side * rng.uniform(-0.15, 0.12), rng.choice((-1, 1)) * clamps * PITCH / 2)])[0]
        gone = ellipse(scene, spot, *rng.uniform(0.04, 0.07, 2), wobble=0.4)
        scene.regions.append(common(whole, gone))
    housing = part(-0.02, 0, 0.28, clamps * PITCH + 0.025)
    stamp(scene, housing, (0.62, 0.56, 0.54), grain=0.06, bulge=0.4, shadow=0.6, alpha=0.7)
    for clamp in range(clamps):
        y, lifted = (clamp - (clamps - 1) / 2) * PITCH, fault == "open_lever" and clamp == hit
        lever = part(0.14 if lifted else 0.055, y, 0.28 if lifted else 0.2, PITCH * 0.92)
        stamp(scene, part(-0.115, y, 0.05, 0.05), (0.78, 0.74, 0.73), grain=0.06, bulge=0.6, alpha=0.6)
        stamp(scene, lever, orange, grain=0.04, bulge=0.45, shadow=0.5)
        stamp(scene, part(-0.02, y - 0.006, 0.085, 0.045), (0.45, 0.35, 0.31), grain=0.25, bulge=0.4)
        stamp(scene, part(-0.03, y - 0.004, 0.045, 0.026), used.get(clamp, (0.55, 0.53, 0.52)), grain=0.2, alpha=0.6)
        if lifted:
            stamp(scene, part(0.03, y, 0.1, PITCH * 0.7), (0.16, 0.12, 0.11), grain=0.3)
            scene.regions.append(lever)
    if fault == "stain":
        spot = put([(side * rng.uniform(-0.05, 0.13), rng.uniform(-0.5, 0.5) * (clamps - 0.6) * PITCH)])[0]
        scene.regions.append(ellipse(scene, spot, *rng.uniform(0.03, 0.06, 2), wobble=0.35))
        stamp(scene, soft(scene.regions[-1], 2), (0.13, 0.10, 0.07), grain=0.3, alpha=rng.uniform(0.7, 0.95))
    return whole


def cable_path(rng, places, clamps, rows):
    """(40, 2) points from clamp rows[0] of the left connector to clamp rows[1] of the right one, sagging a little."""
    start, end = [turned([(side * 0.14, (row - (n - 1) / 2) * PITCH)], angle, centre, 0.5)[0]
                  for (centre, angle, side), n, row in zip(places, clamps, rows)]
    t = np.linspace(0, 1, 40)[:, None]
    sag = rng.normal(0.02, 0.008) * np.sin(np.pi * t) + rng.normal(0, 0.008) * np.sin(2 * np.pi * t)
    return start + t * (end - start) + (0, 1) * sag


def cable(scene, path, colour, fault):
    rng, i = scene.rng, scene.rng.integers(10, 26)                                   # a fault sits at path[i]
    pieces = [path[:i], path[i + rng.integers(2, 5):] + (0, rng.normal(0, 0.015))] if fault == "cut_cable" else [path]
    for piece in pieces:
        stamp(scene, stroke(scene, 0.025, piece), colour, bulge=0.45, gloss=0.15, shadow=0.5)
    if fault == "frayed_cable":                                                      # bare strands stick out
        bare = path[i:i + rng.integers(4, 7)]
        for _ in range(8):
            strand = bare + np.sin(np.linspace(0, np.pi, len(bare)))[:, None] * rng.normal(0, (0.004, 0.016), 2)
            stamp(scene, stroke(scene, 0.006, strand), COPPER * rng.uniform(0.6, 1.2), grain=0.2)
    if fault in ("cut_cable", "frayed_cable"):
        scene.regions.append(stroke(scene, 0.05, path[i:i + 4]))


def splicing_connectors(scene, fault=None):
    """Two connectors of 2, 3 or 5 clamps, the same on both sides, and their colour of cable between mirrored clamps."""
    rng = scene.rng
    scene.aim(0.006, 0.6, 0.008)
    background(scene, np.array((0.76, 0.72, 0.70)) * rng.normal(1, 0.04), grain=0.12, scale=6, blotch=0.05)
    mesh(scene)
    n, hit = int(rng.choice((2, 3, 5))), rng.integers(2)                             # hit: the side with the fault
    (row, other), odd = rng.permutation(n)[:2], int(rng.choice([m for m in CABLES if m != n]))
    places = [((0.19 + rng.normal(0, 0.008), 0.48 + rng.normal(0, 0.012)), rng.normal(0, 1.5), 1),
              ((0.80 + rng.normal(0, 0.008), 0.50 + rng.normal(0, 0.012)), rng.normal(0, 1.5), -1)]
    clamps, colour = [n, n], np.array(CABLES[n]) * rng.normal(1, 0.08)
    if fault == "wrong_cable_colour":
        colour = np.array(CABLES[odd]) * rng.normal(1, 0.08)
    if fault == "unequal_connectors":
        clamps[hit] = odd
        row = min(row, odd - 1)
    cables = {"wrong_cable_location": [(row, other)], "extra_cable": [(row, row), (other, other)]}
    cables = cables.get(fault, [(row, row)])                                         # clamps on the left and the right

    paths = [cable_path(rng, places, clamps, rows) for rows in cables]
    if fault in ("wrong_cable_colour", "wrong_cable_location", "extra_cable"):
        scene.regions.append(stroke(scene, 0.025, *paths))
    if fault == "missing_cable":
        scene.regions.append(stroke(scene, 0.06, paths.pop()))
        cables = []
    if fault == "loose_cable":                                                       # it ends short of the connector
        gap = np.arange(30, 40) if hit else np.arange(10)
        scene.regions.append(stroke(scene, 0.05, paths[0][gap]))
        paths[0] = np.delete(paths[0], gap, axis=0)
    if fault == "reversed_connector":
        places[hit] = (*places[hit][:2], -places[hit][2])
    for path in paths:
        cable(scene, path, colour, fault)
    bodies = []
    for side, (centre, angle, facing) in enumerate(places):
        if fault == "missing_connector" and side == hit:
            bodies.append(polygon(scene, turned(slab(0.32, n * PITCH + 0.03), angle, centre, 0.5)))
            continue
        used = {rows[side]: colour for rows in cables}
        bodies.append(connector(scene, centre, angle, facing, clamps[side], used, fault if side == hit else None))
    if fault in ("missing_connector", "reversed_connector"):
        scene.regions.append(bodies[hit])
    if fault == "unequal_connectors":
        scene.regions.append(union(*bodies))


# Rendered twin: LOCO's folders

SCENES = {scene.__name__: scene for scene in (breakfast_box, juice_bottle, pushpins, screw_bag, splicing_connectors)}


def scene_of(category: str):
    """The function that draws a category. Raises InputError where there is none."""
    if category not in SCENES:
        near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(category, SCENES, 1))
        raise InputError(f"--category {category}: not one of the rendered {', '.join(SCENES)}{near}")
    return SCENES[category]


def draw(category: str, kind: str, index: int, size: int, seed: int) -> tuple[np.ndarray, list[np.ndarray], str | None]:
    """One photo of a kind of COUNTS -> uint8 (size, size, 3), its fault's regions, bool (size, size) each, and the
    fault. The faults of a kind take turns; the photo depends on nothing but the arguments."""
    names = list({"test_logical": LOGICAL, "test_structural": STRUCTURAL}.get(kind, {}).get(category, ()))
    fault = names[index % len(names)] if names else None
    stream = zlib.crc32((category + FOLDERS[kind].replace("/", "")).encode())
    scene = Scene(np.random.default_rng([seed, stream, index]), 2 * size)
    scene_of(category)(scene, fault)
    return *develop(scene, size), fault


def draw_share(folder: str, category: str, counts: dict[str, int], size: int, seed: int, share: int, shares: int):
    """Draws and writes every `shares`-th photo of a category, from number `share` on: the work of one process."""
    faults = [*LOGICAL[category], *STRUCTURAL[category]]
    for kind, i in [(kind, i) for kind, n in counts.items() for i in range(n)][share::shares]:
        photo, regions, fault = draw(category, kind, i, size, seed)
        for k, region in enumerate(regions):
            truth = Path(folder, FOLDERS[kind].replace("test", "ground_truth"), f"{i:03}")
            truth.mkdir(parents=True, exist_ok=True)
            Image.fromarray(region * np.uint8(255 - faults.index(fault))).save(truth / f"{k:03}.png")
        Image.fromarray(photo).save(Path(folder, FOLDERS[kind], f"{i:03}.png"), compress_level=1)


def render(out: Path, category: str, counts: dict[str, int] = COUNTS, size: int = 256, seed: int = 1):
    """Writes the rendered twin of one category, out/category, in MVTec LOCO's layout.

    counts: photos by kind, as in COUNTS; size: the photo's side in pixels. The same arguments give the same pixels on
    any number of processes. The folder appears once it is complete. Draw 0 is the one that the presets were tuned on;
    the default and the README's figures are draw 1. Raises InputError where the folder exists already or cannot be
    written.
    """
    scene_of(category)
    out, total, shares = Path(out), sum(counts.values()), min(os.cpu_count() or 1, 16)
    if (out / category).exists():
        raise InputError(f"{out / category} exists already; remove it or give another --out")
    thresholds = LOGICAL[category] | dict.fromkeys(STRUCTURAL[category], 1.0)
    config = [{"defect_name": name, "pixel_value": 255 - i, "relative_saturation": threshold <= 1,
               "saturation_threshold": threshold if threshold <= 1 else round(threshold * (size / 256) ** 2)}
              for i, (name, threshold) in enumerate(thresholds.items())]
    mark = {"seed": seed, "size": size, "note": "drawn by LADMIM's data.py, not photographed"}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{category}-", dir=out) as unfinished:
            folder = Path(unfinished, category)
            for kind in counts:
                (folder / FOLDERS[kind]).mkdir(parents=True)
            (folder / "defects_config.json").write_text(json.dumps(config, indent=4))
            (folder / RENDERED_MARK).write_text(json.dumps(mark) + "\n")
            # Fresh interpreters, not a pool: that would fork the caller's threads or import its program again.
            start = ("import json, sys; sys.path.insert(0, sys.argv[1]); import data; "
                     "data.draw_share(*json.loads(sys.argv[2]))")
            here, work = str(Path(__file__).parent), [str(folder), category, counts, size, seed]
            workers = [subprocess.Popen([sys.executable, "-c", start, here, json.dumps([*work, share, shares])],
                                        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                       for share in range(shares)]
            try:
                said = [worker.communicate()[1].split("\n") for worker in workers]
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()
            for worker, lines in zip(workers, said):
                if worker.returncode:
                    reason = next(filter(str.strip, reversed(lines)), f"exit code {worker.returncode}")
                    raise InputError(f"rendering {out / category} failed ({reason}); nothing was written")
            folder.rename(out / category)
    except OSError as error:
        raise InputError(f"cannot write {out / category}: {error.strerror}; choose another --out") from error
    print(f"rendered {category}: {total} photos of {size} x {size} pixels in {out / category}", file=sys.stderr)


# Command line

def main() -> int:
    parser = argparse.ArgumentParser(prog="data.py", description="The rendered twin of MVTec LOCO.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("render", help="draw it, in MVTec LOCO's layout")
    command.add_argument("--out", required=True, type=Path, help="folder that will hold the category folders")
    command.add_argument("--category", default="all", help=f"all, or some of {','.join(SCENES)}")
    for kind, n in COUNTS.items():
        command.add_argument(f"--{kind.replace('_', '-')}", type=int, default=n, help=f"photos (default {n})")
    command.add_argument("--size", type=int, default=256, help="pixels a side (default 256)")
    command.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    try:
        names = list(SCENES) if args.category == "all" else args.category.split(",")
        for name in names:
            scene_of(name)
        counts = {kind: getattr(args, kind) for kind in COUNTS}
        if args.train < 2 or args.size < 64 or min(args.seed, *counts.values()) < 0:
            raise InputError("--train must be at least 2, --size 64, --seed and the other counts 0")
        for name in names:
            render(args.out, name, counts, args.size, args.seed)
            print(count_table(find_photos(args.out, name, args.seed)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(as_process(main))
