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
import os
import sys
import tempfile
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pbm")
SPLITS = ("train", "validation", "test")
VALIDATION = ("validation", "valid", "val")          # MVTec LOCO's name first, then BMAD's
RENDERED_MARK = "rendered.json"                      # in a category folder: drawn by this program, not photographed
SCENES = ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors")
COUNTS = {"train": 100, "validation": 30, "good": 40, "logical_anomalies": 40, "structural_anomalies": 40}
REPORTED = Path(__file__).resolve().parent / "bench" / "reported_results.json"
CACHE_FORMAT = 1                                     # raise it when load_image reads anything differently
Turn = Image.Transpose
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_270,
         7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}      # what undoes an EXIF orientation

warnings.filterwarnings("ignore", module=r"PIL\.")   # a file that cannot be read is reported by name instead


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that names it and says what to do."""


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
    """-> the paths that stay, and a tenth (at least one) drawn at random; the same tag draws the same."""
    order = np.random.default_rng(zlib.crc32(os.fsencode(tag))).permutation(len(paths))
    drawn = {paths[i] for i in order[:max(1, round(len(paths) / 10))]}
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

    Where there are no validation photos, a tenth of the training photos (at least one), drawn with the seed, is held
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
                    budget_gib: float = 4.0, batch_size: int = 16, progress=lambda done: None) -> torch.Tensor:
    """Frozen features of the photos, each computed once and then read from cache_dir -> float16 (n, N, d0).

    compute: uint8 (batch_size, size, size, 3) -> (batch_size, N, d0); shape: (N, d0); progress(number done) is called.
    A file in the cache is named by its photo's bytes, the size, the shape and backbone_key, which must change with the
    weights, so nothing stale is served; it ends in a checksum, so nothing broken is. Features are as the backbone gives
    them: standardising is the caller's. More than budget_gib of them are mapped from a nameless file in cache_dir.
    Raises BadPhotos for photos that cannot be read, after all others are cached: a second call without them is quick.
    """
    features, writable = allocate(len(paths), shape, budget_gib, cache_dir), True
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


def allocate(n: int, shape: tuple[int, int], budget_gib: float, cache_dir: Path) -> torch.Tensor:
    """An empty (n, N, d0) float16 tensor: in memory or, beyond the budget, in a file that vanishes with the process."""
    row = 2 * shape[0] * shape[1]                    # bytes
    if n * row > budget_gib * 2 ** 30:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache_dir) as file:
                for _ in range(n):                   # takes the room now: mapped pages that find none kill the process
                    file.write(bytes(row))
                file.flush()
                return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=(n, *shape)))
        except OSError as error:
            print(f"warning: {cache_dir}: {n * row / 2 ** 30:.1f} GiB of features cannot be written ({error.strerror}) "
                  "and stay in memory", file=sys.stderr)
    return torch.empty(n, *shape, dtype=torch.float16)


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


def render(out: Path, category: str, counts: dict[str, int] = COUNTS, size: int = 256, seed: int = 1):
    import twin
    sys.modules.setdefault("data", sys.modules[__name__])
    twin.render(out, category, counts, size, seed)
    (out / category / RENDERED_MARK).write_text(json.dumps({"counts": counts, "size": size, "seed": seed}) + "\n")


# Command line

def main() -> int:
    parser = argparse.ArgumentParser(prog="data.py", description="The rendered twin of MVTec LOCO.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("render", help="draw it, in MVTec LOCO's layout")
    command.add_argument("--out", required=True, type=Path, help="folder that will hold the category folders")
    command.add_argument("--category", default="all", help=f"all, or some of {','.join(SCENES)}")
    options = ("--train", "--validation", "--test-good", "--test-logical", "--test-structural")
    for option, (kind, n) in zip(options, COUNTS.items()):
        command.add_argument(option, dest=kind, type=int, default=n, help=f"photos (default {n})")
    command.add_argument("--size", type=int, default=256, help="pixels a side (default 256)")
    command.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    try:
        names = list(SCENES) if args.category == "all" else args.category.split(",")
        for name in names:
            if name not in SCENES:
                near = "".join(f"; did you mean {match}?" for match in difflib.get_close_matches(name, SCENES, 1))
                raise InputError(f"--category {name}: not one of {', '.join(SCENES)}{near}")
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
    sys.exit(main())
