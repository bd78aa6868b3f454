"""Damages images at random and feeds them to the loaders, as a photo of 8 and of 12 bits, as a mask
and as one of MVTec LOCO's in a folder: a result or an InputError of one line, nothing else.

    python tests/fuzz.py --minutes 10 --seed 0
"""
import argparse
import collections
import io
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

FORMATS = {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"),
           "BMP": ("RGB", "L", "P"), "GIF": ("P", "L"),
           "TIFF": ("RGB", "L", "F", "I;16", "CMYK", "LAB"), "WEBP": ("RGB", "RGBA"),
           "PPM": ("RGB", "L"), "TGA": ("RGB", "RGBA"), "ICO": ("RGBA",), "SGI": ("RGB",),
           "DDS": ("RGB",), "JPEG2000": ("RGB", "L"), "PCX": ("RGB",)}
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"


def variants(image):
    """Options of save: plain, turned by EXIF, of three frames, compressed."""
    return ({}, {"exif": TURNED}, {"save_all": True, "append_images": [image, image]},
            {"compression": "tiff_lzw"})


def image_of(mode, rng):
    values = rng.integers(0, 256, (24, 31, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(values)
    return image if mode == "RGBA" else image.convert("RGB")


def whole_files(rng) -> list[bytes]:
    """One file a format and mode, some with EXIF, palettes, several frames or compression."""
    found = []
    for name, modes in FORMATS.items():
        for mode in modes:
            image = image_of(mode, rng)
            for options in variants(image):
                file = io.BytesIO()
                try:
                    saved = image if mode in ("I;16", "LAB") else image.convert(mode)
                    saved.save(file, name, **options)
                except (OSError, ValueError, KeyError, TypeError):      # not in this format
                    continue
                found.append(file.getvalue())
    return found


def damage(whole: list[bytes], rng: random.Random) -> bytes:
    content = bytearray(rng.choice(whole))
    for _ in range(rng.randint(1, 3)):
        at, end = rng.randrange(len(content)), rng.choice((40, 200, len(content)))
        kind = rng.randrange(6)
        if kind == 0:
            content[rng.randrange(min(end, len(content)))] = rng.randrange(256)
        elif kind == 1:
            content[rng.randrange(min(end, len(content)))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[at:at + rng.randint(1, 50)]
        elif kind == 3:
            content[at:at] = rng.randbytes(rng.randint(1, 50))
        elif kind == 4:
            other = rng.choice(whole)
            content[at:] = other[rng.randrange(len(other)):]
        else:
            del content[max(1, at):]
        if not content:
            return b"x"
    return bytes(content)


def as_photo(path: Path, white: int = 0):
    assert data.open_image(path, white).mode == "RGB"
    assert data.load_image(path, 16, white).shape == (16, 16, 3)
    [found] = data.find_images([path.parent])        # nothing in a folder stops the others
    assert found == path and data.deeper([path], white).keys() <= {path}


def as_mask(path: Path, defects=None):
    for mask, area in data.load_regions(data.Photo(path, "c", "test", "bad", (path,)), defects):
        assert mask.dtype == bool and mask.any() and 1 <= area <= mask.sum()


USES = {"photo": as_photo, "12-bit photo": lambda path: as_photo(path, 4095), "mask": as_mask,
        "LOCO mask": lambda path: as_mask(path, {255: (1.0, True), 128: (40, False)})}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, counts, start = random.Random(args.seed), collections.Counter(), time.monotonic()
    whole = whole_files(np.random.default_rng(args.seed))
    print(f"{len(whole)} whole files", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        while time.monotonic() - start < 60 * args.minutes:
            content = damage(whole, rng)
            path.write_bytes(content)
            counts["files"] += 1
            for name, use in USES.items():
                try:
                    use(path)
                    counts[f"{name}: read"] += 1
                except data.InputError as error:
                    assert str(path) in str(error) and len(str(error).splitlines()) == 1, str(error)
                    counts[f"{name}: refused"] += 1
                except Exception:
                    Path("fuzz-failure.bin").write_bytes(content)
                    print(f"{name}: failed after {counts['files']} files; the file is "
                          "fuzz-failure.bin", flush=True)
                    raise
    print(f"{args.minutes:g} minutes; " + ", ".join(f"{name} {counts[name]:,}" for name in counts))


if __name__ == "__main__":
    main()
