"""Single images: which files count, how photos and masks are read, how many bits photos have."""
import io
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from console import InputError, readable, warn

SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".j2c", ".jpc",
            ".jpf", ".jpx", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm",
            ".pbm", ".pnm", ".pfm", ".avif", ".avifs")
# Photos that are not read, most because Pillow needs a plug-in: a warning counts them.
UNREAD = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".tga")
DRAWN = "LADMIM heat map"              # written into each, so that none is taken for a photo


# Files

def walk(folder: Path, seen: set[Path] | None = None):
    """Yields all files below a folder, but none hidden or in a hidden folder. A linked folder is
    followed once. A folder that may not be read is yielded itself."""
    seen = seen or {folder.resolve()}
    try:                                                                         # links last
        inside = sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path))
    except OSError:
        yield folder
        return
    for path in inside:
        if path.name.startswith("."):
            continue
        if not os.path.isdir(path):
            yield path
        elif path.resolve() not in seen:
            seen.add(path.resolve())
            yield from walk(path, seen)


def is_image(path: Path) -> bool:
    return (path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
            and os.path.isfile(path) and not is_marked(path))


def is_marked(path: Path, mark: str = DRAWN) -> bool:
    """Whether the file has the mark near its start; DRAWN: `predict` drew it."""
    with suppress(OSError):            # what cannot be read is named where it is read whole
        if path.is_file():
            with open(path, "rb") as file:
                return mark.encode() in file.read(200)
    return False


def read(path: Path) -> bytes:
    with readable(path):
        if path.is_dir():
            os.listdir(path)                     # where that is forbidden, it is the better reason
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "no such file, or no regular one"
            raise InputError(f"{path}: {what}; check the name")
        content = path.read_bytes()
    if not content:
        raise InputError(f"{path}: the file is empty; replace or remove it")
    return content


def decode(content: bytes, path: Path, use):
    """Returns use(image), image being the first frame in content, not yet decoded. Any error of
    Pillow becomes an InputError."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return use(image)
    except UnidentifiedImageError:
        reason = "not an image, cut off at its start, or of a format that Pillow does not know"
    except MemoryError:
        raise
    except Exception as error:     # Pillow's decoders raise whatever their parsers stumble on
        reason = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path}: cannot be read as an image ({reason}); replace or remove it")


# Photos

def is_deep(image: Image.Image) -> bool:
    """Whether the file has more than 8 bits a value. Of such colours Pillow reads the upper 8."""
    return image.mode.startswith(("I", "F")) or bool(
        re.search(";16[BLN]", str(getattr(image, "tile", ""))))


def load_turned(image: Image.Image):
    """Decodes the image, and turns it as EXIF says. Raises ValueError where Pillow misreads it."""
    tags = getattr(image, "tag_v2", {})                        # of a TIFF
    planes = tags.get(284) == 2 and "raw" in str(image.tile)
    if np.max(tags.get(258, 8)) > 8 and (planes or tags.get(262) == 0):
        raise ValueError("16 bits, each colour by itself or white as 0: save it with 8 bits")
    image.load()
    with suppress(Exception):      # a broken EXIF block says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)


def deep_values(image: Image.Image) -> np.ndarray:
    """Of mode I or F -> (H, W) float32. Raises ValueError where their scale is unknown."""
    values = np.asarray(image).astype(np.float32)
    if not 0 <= values.min() <= values.max() <= (255 if image.mode == "F" else 65535):  # NaN too
        raise ValueError(f"values from {values.min():g} to {values.max():g}: save it with 8 or 16 "
                         "bits")
    return values


def to_rgb(image: Image.Image, white: int = 0) -> Image.Image:
    """Any mode -> RGB, turned as EXIF says, alpha over black. white: the value that is white in
    photos of more than 8 bits. 0: integers are taken as 0 to 65535, floats as 0 to 1 or, where they
    exceed 1, as 0 to 255."""
    deep = is_deep(image)
    load_turned(image)
    if image.mode.startswith(("I", "F")):
        values = deep_values(image)
        if image.mode == "F" and white > 255:        # of integers, which says nothing of floats
            white = 0
        top = white or (65535 if image.mode != "F" else 1 if values.max() <= 1 else 255)
        values = np.minimum(values, top) * (255 / top) + 0.5
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(image, mask=image.getchannel("A"))
        image = black
    image = image.convert("RGB")
    return image.point(lambda v: min(255, v * 65535 / white)) if deep and white else image


def open_image(path: Path, white: int = 0) -> Image.Image:
    """The photo as RGB at its own size. Raises InputError, naming the file and the reason."""
    return decode(read(path), path, lambda image: to_rgb(image, white))


def load_image(path: Path, size: int, white: int = 0) -> np.ndarray:
    """The photo as RGB, uint8 (size, size, 3), resized bilinearly, antialiased. Or InputError."""
    return np.array(open_image(path, white).resize((size, size), Image.Resampling.BILINEAR))


def ahead(function, items, waiting: int = 16):
    """Yields function(item) in order, or the InputError it raised; threads are `waiting` ahead."""
    items, queue = iter(items), deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        queue.extend(pool.submit(function, item) for item in islice(items, waiting))
        while queue:
            try:
                result = queue.popleft().result()
            except InputError as error:
                result = error
            queue.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result


def load_images(paths, size: int, white: int = 0):
    """Yields load_image(path, size, white) of each path in order, for a bad file its InputError."""
    return ahead(lambda path: load_image(path, size, white), paths)


# Depth: a camera's 10 or 12 bits lie in files of 16, and only many photos together show it.

def least_white(image: Image.Image) -> int:
    """The smallest white that no value of the photo exceeds: 2 ** bits - 1 of integers, 1 or 255 of
    floats; 0 where a photo has 8 bits."""
    if not is_deep(image):
        return 0
    image.load()
    is_colour = not image.mode.startswith(("I", "F"))
    top = np.asarray(image.convert("RGB")).max() * 257.0 if is_colour else deep_values(image).max()
    if image.mode == "F":
        return 1 if top <= 1 else 255
    return 2 ** max(8, int(top).bit_length()) - 1


def deeper(paths: list[Path], white: int = 0) -> dict[Path, int]:
    """`least_white` of each photo where it exceeds white."""
    found = dict(zip(paths, ahead(lambda path: decode(read(path), path, least_white), paths)))
    return {path: own for path, own in found.items() if isinstance(own, int) and own > white}


def warn_of_depth(paths: list[Path], white: int):
    """white: of the training photos; where all have 8 bits, a deeper photo is scaled by its
    format's range, and looks dark if it uses only part of that."""
    for path, own in deeper(paths, white).items():
        if white:
            warn([f"{path}: has values above {white}, which is white in the training photos; "
                  "what is brighter is cut off"])
        elif own < 65535 and decode(read(path), path, lambda image: image.mode) != "F":
            warn([f"{path}: has no value above {own} in 16 bits, the training photos have 8 "
                  "bits; 65535 is taken as white, so it is dark; save it with 8 bits"])


# Masks

def to_levels(image: Image.Image) -> np.ndarray:
    """Any mode -> how bright each pixel is, (H, W): the strongest colour channel, alpha over
    black. Integers beyond 8 bits and floats are as they are."""
    if not image.mode.startswith(("I", "F")):
        red, green, blue = to_rgb(image).split()
        return np.asarray(ImageChops.lighter(ImageChops.lighter(red, green), blue))
    load_turned(image)
    levels = np.asarray(image)
    if not (levels.min() >= 0 and np.isfinite(levels).all()):
        raise ValueError("values below 0 or NaN: save it with 8 bits")
    return levels


def defect_pixels(levels: np.ndarray) -> np.ndarray:
    """What a mask marks, bool (H, W); black is background. levels: `to_levels`."""
    top, many = levels.max(), 32
    labels = levels.dtype.kind != "f" and top < many             # 1, 2, ...
    if labels or not ((levels > 0) & (levels < top)).any():
        return levels > 0
    marked = levels > top / 2
    if len(np.unique(levels)) > many:                            # two levels, soft or noisy edges
        return marked
    # A few levels: darker ones are also labels, except pixels on an edge from dark to bright.
    dim, around = (levels > top / 8) & ~marked, np.pad(levels, 1, mode="edge")
    for a, b in ((around[1:-1, :-2], around[1:-1, 2:]), (around[:-2, 1:-1], around[2:, 1:-1])):
        dim &= ~((np.minimum(a, b) < levels) & (levels < np.maximum(a, b)))
    return marked | dim
