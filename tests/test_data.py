"""Layouts, checks, image reading and the feature cache of data.py."""
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import data
from data import InputError, Photo

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as data.py asks; pytest has filters of its own
ROOT = Path(data.__file__).resolve().parent
LOCO_KINDS = ("good", "logical_anomalies", "structural_anomalies")


def picture(path, number=None, size=(8, 6)):
    """A tiny image of its own content at path, folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(str(path).encode()) if number is None else number)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def pictures(folder, n, suffix=".png"):
    return [picture(folder / f"{i:03}{suffix}") for i in range(n)]


def counts(photos):
    found = {}
    for photo in photos:
        found[photo.split, photo.kind] = found.get((photo.split, photo.kind), 0) + 1
    return found


def loco(root, category="breakfast_box", validation=3, truth=True):
    folder = root / category
    pictures(folder / "train/good", 10)
    if validation:
        pictures(folder / "validation/good", validation)
    for kind, n in zip(LOCO_KINDS, (3, 2, 2)):
        pictures(folder / "test" / kind, n)
        for i in range(n if truth and kind != "good" else 0):
            pictures(folder / "ground_truth" / kind / f"{i:03}", i + 1)
    return folder


# Layouts

def test_mvtec_loco(tmp_path):
    loco(tmp_path)
    photos = data.find_photos(tmp_path, "breakfast_box", 0)
    assert counts(photos) == {("train", "good"): 10, ("validation", "good"): 3, ("test", "good"): 3,
                              ("test", "logical_anomalies"): 2, ("test", "structural_anomalies"): 2}
    masks = {(photo.kind, photo.path.stem): len(photo.masks) for photo in photos if photo.split == "test"}
    assert masks == {("good", "000"): 0, ("good", "001"): 0, ("good", "002"): 0,
                     ("logical_anomalies", "000"): 1, ("logical_anomalies", "001"): 2,
                     ("structural_anomalies", "000"): 1, ("structural_anomalies", "001"): 2}
    assert [photo.label for photo in photos] == [0] * 16 + [1] * 4
    assert photos == data.find_photos(tmp_path, "breakfast_box", 7)               # nothing is drawn, so no seed matters


def test_loco_without_validation_holds_out_a_seeded_tenth(tmp_path):
    folder = loco(tmp_path, validation=0)
    pictures(folder / "train/good", 38)
    drawn = []
    for seed in range(5):
        photos = data.find_photos(tmp_path, "breakfast_box", seed)
        assert photos == data.find_photos(tmp_path, "breakfast_box", seed)
        held = {photo.path for photo in photos if photo.split == "validation"}
        kept = {photo.path for photo in photos if photo.split == "train"}
        assert len(held) == 4 and len(kept) == 34 and not held & kept
        drawn.append(held)
    assert len({frozenset(held) for held in drawn}) > 1


def test_held_out_photos_do_not_depend_on_where_the_data_lies(tmp_path):
    for root in ("a", "b"):
        pictures(tmp_path / root / "nut/train/good", 30)
    a, b = ([(p.path.name, p.split) for p in data.find_photos(tmp_path / root, "nut", 3)] for root in ("a", "b"))
    assert a == b


def test_mvtec_ad(tmp_path):
    folder = tmp_path / "bottle"
    pictures(folder / "train/good", 20)
    pictures(folder / "test/good", 2)
    pictures(folder / "test/broken", 2)
    pictures(folder / "test/contamination", 1)
    for mask in ("broken/000_mask.png", "broken/001_mask.png", "contamination/000_mask.png"):
        picture(folder / "ground_truth" / mask)
    photos = data.find_photos(tmp_path, "bottle", 0)
    assert counts(photos) == {("train", "good"): 18, ("validation", "good"): 2, ("test", "good"): 2,
                              ("test", "broken"): 2, ("test", "contamination"): 1}
    for photo in photos:
        mask = folder / "ground_truth" / photo.kind / f"{photo.path.stem}_mask.png"
        assert photo.masks == ((mask,) if photo.label else ())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("valid", ["valid", "val"])
def test_bmad(tmp_path, nested, valid):
    folder, img = tmp_path / "Brain", "img" if nested else ""
    pictures(folder / "train/good", 5)
    for split, n in ((valid, 2), ("test", 3)):
        pictures(folder / split / "good" / img, n)
        pictures(folder / split / "Ungood" / img, n)
        if nested:
            pictures(folder / split / "good/label", n)
            pictures(folder / split / "Ungood/label", n)
    photos = data.find_photos(tmp_path, "Brain", 0)
    assert counts(photos) == {("train", "good"): 5, ("validation", "good"): 2, ("test", "good"): 3,
                              ("test", "Ungood"): 3}
    masks = [photo.masks for photo in photos if photo.label]
    assert masks == [((folder / f"test/Ungood/label/{i:03}.png",) if nested else ()) for i in range(3)]


def visa(root, category="candle", normal=20, anomalies=3):
    """VisA's files and the rows of both its tables."""
    one, own = [], []
    for i in range(normal):
        name = f"{category}/Data/Images/Normal/{i:04}.JPG"
        one.append((category, "train" if i < normal * 0.9 else "test", "normal", name, ""))
        own.append((name, "normal", ""))
    for i in range(anomalies):
        name, mask = f"{category}/Data/Images/Anomaly/{i:03}.JPG", f"{category}/Data/Masks/Anomaly/{i:03}.png"
        one.append((category, "test", "anomaly", name, mask))
        own.append((name, "chunk of wax missing,other" if i else "damaged corner", mask))
        picture(root / mask)
    for row in own:
        picture(root / row[0])
    return one, own


def write_csv(path, head, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head.split(","), *rows])


def test_visa_split_csv(tmp_path):
    rows, _ = visa(tmp_path)
    write_csv(tmp_path / "split_csv/1cls.csv", "object,split,label,image,mask", rows + visa(tmp_path, "pcb1", 10, 2)[0])
    photos = data.find_photos(tmp_path, "candle", 0)
    assert counts(photos) == {("train", "good"): 16, ("validation", "good"): 2, ("test", "good"): 2,
                              ("test", "anomaly"): 3}
    masks = tmp_path / "candle/Data/Masks/Anomaly"
    assert all(photo.masks == (masks / f"{photo.path.stem}.png",) for photo in photos if photo.label)
    assert all(photo.path.is_file() and photo.path.relative_to(tmp_path).parts[0] == "candle" for photo in photos)


def test_visa_image_anno(tmp_path):
    write_csv(tmp_path / "candle/image_anno.csv", "image,label,mask", visa(tmp_path)[1])
    assert data.list_categories(tmp_path) == ["candle"]
    photos = data.find_photos(tmp_path, "candle", 0)
    assert counts(photos) == {("train", "good"): 16, ("validation", "good"): 2, ("test", "good"): 2,
                              ("test", "damaged corner"): 1, ("test", "chunk of wax missing,other"): 2}
    assert all(len(photo.masks) == photo.label for photo in photos)
    drawn = [data.find_photos(tmp_path, "candle", seed) for seed in range(4)]
    assert len({frozenset(photo.path for photo in photos if photo.split == "test") for photos in drawn}) > 1


@pytest.mark.parametrize("change, word", [
    (lambda rows: rows[:-1] + [("candle", "test", "anomaly", "candle/Data/Images/Anomaly/999.JPG", "")], "999.JPG"),
    (lambda rows: rows + rows[:1], "twice"),
    (lambda rows: [("candle", "train", *row[2:]) for row in rows], "neither"),
    (lambda rows: [(row[0], "holdout", *row[2:]) for row in rows], "neither"),
    (lambda rows: rows + [("candle", "test", "anomaly", "../x.JPG", "")], "missing"),
    (lambda rows: rows + [("candle", "test")], "not VisA's table"),
])
def test_visa_damaged_table(tmp_path, change, word):
    write_csv(tmp_path / "split_csv/1cls.csv", "object,split,label,image,mask", change(visa(tmp_path)[0]))
    refused(lambda: data.find_photos(tmp_path, "candle", 0), "1cls.csv", word)


@pytest.mark.parametrize("content", [b"", b"image;label\n1;2\n", b"\xff\xfe\x00\x00,\x80", b'image,label,mask\n"'])
def test_visa_foreign_table(tmp_path, content):
    visa(tmp_path)
    (tmp_path / "candle/image_anno.csv").write_bytes(content)
    refused(lambda: data.find_photos(tmp_path, "candle", 0), "image_anno.csv", "not VisA's table")


def test_own_folder(tmp_path):
    folder = tmp_path / "widget"
    pictures(folder / "train/good", 12, ".JPG")
    (folder / "train/good/.DS_Store").write_bytes(b"x")
    (folder / "train/good/._000.JPG").write_bytes(b"x")                            # a resource fork, not a photo
    (folder / "train/good/notes.txt").write_text("x")
    photos = data.find_photos(tmp_path, "widget", 0)
    assert counts(photos) == {("train", "good"): 10, ("validation", "good"): 2}
    [warning] = data.no_auroc(photos)
    assert warning.startswith("widget: no good photos and no anomalies in its test split") and "no AUROC" in warning
    pictures(folder / "test/Good", 2, ".bmp")
    photos = data.find_photos(tmp_path, "widget", 0)
    assert counts(photos)["test", "good"] == 2
    assert "no anomalies" in data.no_auroc(photos)[0] and "good photos" not in data.no_auroc(photos)[0]
    pictures(folder / "test/scratched twice", 3, ".tif")
    picture(folder / "ground_truth/scratched twice/001.png")
    photos = data.find_photos(tmp_path, "widget", 0)
    assert counts(photos)["test", "scratched twice"] == 3 and not data.no_auroc(photos)
    assert [len(photo.masks) for photo in photos if photo.label] == [0, 1, 0]
    assert photos == sorted(photos, key=lambda p: (data.SPLITS.index(p.split), p.label, p.kind, p.path))


def refused(call, *words):
    """call raises InputError, one line, that holds the words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message
    return message


def test_wrong_folders_are_refused_with_the_remedy(tmp_path):
    refused(lambda: data.find_photos(tmp_path / "nowhere", "bottle", 0), "--data", "nowhere", "no such folder")
    refused(lambda: data.find_photos(tmp_path, "bottle", 0), "--data", "holds no category folder")
    refused(lambda: data.list_categories(tmp_path), "holds no category folder")
    loco(tmp_path, "juice_bottle")
    loco(tmp_path, "pushpins")
    (tmp_path / ".pushpins-tmp/train").mkdir(parents=True)
    assert data.list_categories(tmp_path) == ["juice_bottle", "pushpins"]
    refused(lambda: data.find_photos(tmp_path, "juice_botle", 0), "juice_botle", "did you mean juice_bottle?", "pushpi")
    assert "did you mean" not in refused(lambda: data.find_photos(tmp_path, "xyz", 0), "found: juice_bottle, pushpins")
    for category in ("", ".", "..", "juice_bottle/train", str(tmp_path / "pushpins"), "a\0b", "x" * 300):
        refused(lambda category=category: data.find_photos(tmp_path, category, 0))
    refused(lambda: data.find_photos(tmp_path / "pushpins", "pushpins", 0), "is a category", "--category pushpins")
    (tmp_path / "void").mkdir()
    refused(lambda: data.find_photos(tmp_path, "void", 0), "void/train/good", "no training photos")
    picture(tmp_path / "void/train/000.png")
    refused(lambda: data.find_photos(tmp_path, "void", 0), "void/train/good", "no training photos")
    picture(tmp_path / "void/train/good/000.png")
    refused(lambda: data.find_photos(tmp_path, "void", 0), "1 training photos", "add more")
    pictures(tmp_path / "void/train/good", 3)
    (tmp_path / "void/test/good").mkdir(parents=True)
    assert len(data.find_photos(tmp_path, "void", 0)) == 3                         # an empty kind is no fault
    picture(tmp_path / "void/test/bent/deeper/000.png")
    refused(lambda: data.find_photos(tmp_path, "void", 0), "test/bent", "no photos")
    picture(tmp_path / "void/test/000.png")
    refused(lambda: data.find_photos(tmp_path, "void", 0), "test: photos lie in it directly")


# Checks

def test_counts_of_mvtec_loco(tmp_path):
    loco(tmp_path, "screw_bag")
    photos = data.find_photos(tmp_path, "screw_bag", 0)
    [warning] = data.count_mismatch(photos, tmp_path)
    for part in ("screw_bag", "train 10 (not 360)", "validation 3 (not 60)", "test_good 3 (not 122)",
                 "test_logical 2 (not 137)", "test_structural 2 (not 82)"):
        assert part in warning
    table = (("train", "good", 360), ("validation", "good", 60), ("test", "good", 122),
             ("test", "logical_anomalies", 137), ("test", "structural_anomalies", 82))
    full = [Photo(tmp_path / f"{i}", "screw_bag", split, kind) for split, kind, n in table for i in range(n)]
    assert data.count_mismatch(full, tmp_path) == []
    [warning] = data.count_mismatch(full[1:], tmp_path)
    assert "train 359 (not 360);" in warning and "validation" not in warning and "test" not in warning
    (tmp_path / "screw_bag" / data.RENDERED_MARK).write_text("{}")
    assert data.count_mismatch(photos, tmp_path) == []                             # the rendered twin has its own
    (tmp_path / "screw_bag" / data.RENDERED_MARK).unlink()
    assert data.count_mismatch([Photo(tmp_path, "screw_bag", "test", "bent")], tmp_path) == []   # own, of that name


def test_photos_in_two_splits_are_named(tmp_path):
    folder = loco(tmp_path)
    assert data.duplicates(data.find_photos(tmp_path, "breakfast_box", 0)) == []
    copy = folder / "test/good/zzz.png"
    copy.write_bytes((folder / "train/good/004.png").read_bytes())
    [warning] = data.duplicates(data.find_photos(tmp_path, "breakfast_box", 0))
    assert "more" not in warning
    (folder / "train/good/again.png").write_bytes(copy.read_bytes())               # twice in one split: another matter
    [warning] = data.duplicates(data.find_photos(tmp_path, "breakfast_box", 0))
    assert str(folder / "train/good/004.png") in warning and str(copy) in warning and "(train)" in warning
    changed = bytearray(copy.read_bytes())
    changed[-1] ^= 1                                                               # the same size, other bytes
    copy.write_bytes(changed)
    assert data.duplicates(data.find_photos(tmp_path, "breakfast_box", 0)) == []


def test_missing_masks_are_counted_once(tmp_path):
    loco(tmp_path)
    loco(tmp_path, "pushpins", truth=False)
    (tmp_path / "breakfast_box/ground_truth/logical_anomalies/000/000.png").unlink()
    photos = [p for name in ("breakfast_box", "pushpins") for p in data.find_photos(tmp_path, name, 0)]
    [warning] = data.missing_masks(photos)
    assert warning.startswith("5 of 8 anomalies") and "breakfast_box 1, pushpins 4" in warning
    assert set(data.missing_masks(photos)) <= set(data.check_photos(photos, tmp_path))


def test_count_table(tmp_path):
    loco(tmp_path)
    loco(tmp_path, "own", truth=False)
    photos = [p for name in ("breakfast_box", "own") for p in data.find_photos(tmp_path, name, 0)]
    head, first, second = data.count_table(photos).splitlines()
    assert first.split()[:6] == ["breakfast_box", "10", "3", "3", "4", "4"]
    assert first.endswith("logical_anomalies 2, structural_anomalies 2")
    assert second.split()[:6] == ["own", "10", "3", "3", "4", "0"]
    assert head.index("train") + len("train") == first.index("10") + 2             # columns stand under their heads


# Ground truth

def config(folder, *entries):
    names = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "defects_config.json").write_text(json.dumps([dict(zip(names, entry)) for entry in entries]))


def test_regions_of_mvtec_loco(tmp_path):
    config(tmp_path / "pushpins", ("a", 255, 0.29, True), ("b", 254, 30, False), ("c", 253, 1000, False),
           ("d", 252, 0.001, True))
    defects = data.load_defects(tmp_path, "pushpins")
    assert defects == {255: (0.29, True), 254: (30, False), 253: (1000, False), 252: (0.001, True)}
    paths, truth = [], np.random.default_rng(0).random((4, 20, 30)) < 0.2
    for value, mask in zip((255, 254, 253, 252), truth):
        paths.append(tmp_path / f"{value}.png")
        Image.fromarray(mask * np.uint8(value)).save(paths[-1])
    regions = data.load_regions(Photo(tmp_path, "pushpins", "test", "logical_anomalies", tuple(paths)), defects)
    area = truth.sum((1, 2))
    assert [saturation for _, saturation in regions] == [int(0.29 * area[0]), 30, area[2], 1]
    assert all((mask == expected).all() and mask.dtype == bool for (mask, _), expected in zip(regions, truth))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16"])
def test_regions_without_defects_config_saturate_at_their_area(tmp_path, mode):
    mask = np.random.default_rng(0).random((20, 30)) < 0.3
    image = Image.fromarray(mask * np.uint8(255))
    if mode == "I;16":
        image = Image.fromarray(mask.astype(np.uint16) * 3)
    elif mode == "P":
        image = Image.fromarray(mask.astype(np.uint8), "L").convert("P")
        image.putpalette([0, 0, 0, 200, 0, 0])
    else:
        image = image.convert(mode)
    image.save(tmp_path / "m.png")
    Image.new("L", (30, 20)).save(tmp_path / "empty.png")
    assert data.load_defects(tmp_path, "bottle") is None
    photo = Photo(tmp_path, "bottle", "test", "broken", (tmp_path / "m.png", tmp_path / "empty.png"))
    [(found, saturation)] = data.load_regions(photo, None)
    assert (found == mask).all() and saturation == mask.sum()


@pytest.mark.parametrize("values", [(0, 0), (0, 7), (254, 255)])
def test_masks_that_contradict_the_config_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.uint8)).save(tmp_path / "m.png")
    photo = Photo(tmp_path, "x", "test", "logical_anomalies", (tmp_path / "m.png",))
    refused(lambda: data.load_regions(photo, {255: (1.0, True), 254: (1.0, True)}), "m.png", "defects_config.json")


@pytest.mark.parametrize("text", [
    "", "{}x", "null", '{"a": 1}', "[1]", '[{"pixel_value": 1}]',
    *(json.dumps([{"defect_name": "a", "pixel_value": v, "saturation_threshold": t, "relative_saturation": r}] * n)
      for v, t, r, n in ((0, 1, True, 1), (256, 1, True, 1), (1, 0, True, 1), (1, 1.5, True, 1), (1, 1, True, 2),
                         (1, -3, False, 1), (1, "x", True, 1), (float("inf"), 1, True, 1),
                         (1, float("nan"), False, 1)))])
def test_damaged_defects_config_is_refused(tmp_path, text):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/defects_config.json").write_text(text)
    refused(lambda: data.load_defects(tmp_path, "x"), "defects_config.json", "unpack")


# Images

RNG = np.random.default_rng(1)
GREY, COLOUR, ALPHA = (RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((24, 24), (24, 24, 3), (24, 24)))
DEEP = RNG.integers(0, 65536, (24, 24), dtype=np.uint16)
INDEX = RNG.integers(0, 4, (24, 24), dtype=np.uint8)
PALETTE = RNG.integers(0, 256, (4, 3), dtype=np.uint8)


def of_palette(mode="P"):
    image = Image.fromarray(INDEX)
    image = image.convert("P") if mode == "P" else image
    image.putpalette(PALETTE.tobytes())
    return image


def lab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(COLOUR // 4 + 96), *profiles, outputMode="LAB")


def rgb(values):
    return np.repeat(np.asarray(values)[..., None], 3, 2)


def over_black(colour, alpha):
    return np.rint(colour * (alpha[..., None] / 255.0))


CMYK = RNG.integers(0, 256, (24, 24, 4), dtype=np.uint8)
FLOAT = RNG.random((24, 24), dtype=np.float32)
# name: (image, file suffix, options of save, the RGB it stands for, tolerance)
MODES = {
    "1": (Image.fromarray(GREY > 127), ".png", {}, rgb((GREY > 127) * 255), 0),
    "L": (Image.fromarray(GREY), ".png", {}, rgb(GREY), 0),
    "L bmp": (Image.fromarray(GREY), ".bmp", {}, rgb(GREY), 0),
    "L transparent": (Image.fromarray(GREY), ".png", {"transparency": 7}, rgb(np.where(GREY == 7, 0, GREY)), 0),
    "P": (of_palette(), ".png", {}, PALETTE[INDEX], 0),
    "P gif": (of_palette(), ".gif", {}, PALETTE[INDEX], 0),
    "P transparent": (of_palette(), ".png", {"transparency": 2}, PALETTE[INDEX] * (INDEX != 2)[..., None], 0),
    "P alphas": (of_palette(), ".png", {"transparency": bytes([0, 90, 200, 255])},
                 over_black(PALETTE[INDEX], np.array([0, 90, 200, 255])[INDEX]), 1),
    "RGB": (Image.fromarray(COLOUR), ".png", {}, COLOUR, 0),
    "RGB ppm": (Image.fromarray(COLOUR), ".ppm", {}, COLOUR, 0),
    "RGB webp": (Image.fromarray(COLOUR), ".webp", {"lossless": True}, COLOUR, 0),
    "RGB transparent": (Image.fromarray(COLOUR), ".png", {"transparency": tuple(COLOUR[3, 4].tolist())},
                        COLOUR * (COLOUR != COLOUR[3, 4]).any(-1, keepdims=True), 0),
    "RGBA": (Image.fromarray(np.dstack([COLOUR, ALPHA])), ".png", {}, over_black(COLOUR, ALPHA), 1),
    "RGBA tif": (Image.fromarray(np.dstack([COLOUR, ALPHA])), ".tif", {}, over_black(COLOUR, ALPHA), 1),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA])), ".png", {}, over_black(rgb(GREY), ALPHA), 1),
    "I;16": (Image.fromarray(DEEP), ".png", {}, rgb(np.rint(DEEP / 257.0)), 0),
    "I;16 tif": (Image.fromarray(DEEP), ".tif", {}, rgb(np.rint(DEEP / 257.0)), 0),
    "I;16B tif": (Image.frombytes("I;16B", (24, 24), DEEP.astype(">u2").tobytes()), ".tif", {},
                  rgb(np.rint(DEEP / 257.0)), 0),
    "I tif": (Image.fromarray(DEEP.astype(np.int32)), ".tif", {}, rgb(np.rint(DEEP / 257.0)), 0),
    "I pgm": (Image.fromarray(DEEP.astype(np.int32)), ".pgm", {}, rgb(np.rint(DEEP / 257.0)), 0),
    "F to 1": (Image.fromarray(FLOAT), ".tif", {}, rgb(np.rint(FLOAT * 255.0)), 0),
    "F to 255": (Image.fromarray(GREY.astype(np.float32)), ".tif", {}, rgb(GREY), 0),
    "CMYK": (Image.fromarray(CMYK, "CMYK"), ".tif", {},
             np.rint((255 - CMYK[..., :3].astype(float)) * (255 - CMYK[..., 3:].astype(float)) / 255), 1),
    "LAB": (lab(), ".tif", {}, COLOUR // 4 + 96, 4),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_reads_as_the_colours_it_stands_for(tmp_path, name):
    image, suffix, options, expected, tolerance = MODES[name]
    path = tmp_path / f"x{suffix}"
    image.save(path, **options)
    found = data.load_image(path, 24)
    assert found.shape == (24, 24, 3) and found.dtype == np.uint8 and found.flags.writeable
    assert np.abs(found.astype(float) - expected).max() <= tolerance
    assert (np.asarray(data.open_image(path)) == found).all()


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "RGBX", "HSV", "YCbCr"])
def test_modes_that_need_no_file(mode):
    half = np.full((24, 24), 128, np.uint8)
    if mode == "PA":
        image = of_palette("PA").convert("PA")
        image.putalpha(Image.fromarray(half))
        expected = over_black(PALETTE[INDEX], half)
    elif mode == "La":
        image, expected = Image.fromarray(np.dstack([GREY, half])).convert("La"), over_black(rgb(GREY), half)
    elif mode == "RGBa":
        image, expected = Image.fromarray(np.dstack([COLOUR, half])).convert("RGBa"), over_black(COLOUR, half)
    else:
        image, expected = Image.fromarray(COLOUR).convert(mode), COLOUR
    assert image.mode == mode
    assert np.abs(np.asarray(data.to_rgb(image), float) - expected).max() <= {"HSV": 8, "YCbCr": 3}.get(mode, 2)


def png16(planes):
    """A 16-bit PNG of `planes` bands (Pillow writes none), filter 0."""
    deep = np.random.default_rng(planes).integers(0, 65536, (24, 24, planes), dtype=np.uint16)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    head = (24).to_bytes(4, "big") * 2 + bytes([16, {2: 4, 3: 2, 4: 6}[planes], 0, 0, 0])
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return deep / 257.0, b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_16_bit_colour(tmp_path, planes):
    deep, content = png16(planes)
    (tmp_path / "x.png").write_bytes(content)
    expected = deep if planes == 3 else over_black(deep[..., :-1], deep[..., -1])
    assert np.abs(data.load_image(tmp_path / "x.png", 24) - np.broadcast_to(expected, (24, 24, 3))).max() <= 2


@pytest.mark.parametrize("values", [[[-1, 5]], [[0, 65536]], [[-0.1, 0.5]], [[0.0, 255.5]], [[float("nan"), 0.5]],
                                    [[0.0, float("inf")]]])
def test_values_without_a_known_scale_are_refused(tmp_path, values):
    values = np.array(values)
    Image.fromarray(values.astype(np.int32 if values.dtype.kind == "i" else np.float32)).save(tmp_path / "x.tif")
    refused(lambda: data.load_image(tmp_path / "x.tif", 8), "x.tif", "values from", "8 or 16 bits")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[8:, 16:] = (255, 0, 0), (0, 0, 255)                  # red upper left, blue lower right
    # EXIF 2.3: where the 0th row and column of what is stored lie in the upright photo
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2),
              8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"x{suffix}", exif=exif, **options)
    found = np.asarray(data.open_image(tmp_path / f"x{suffix}")).astype(int)
    assert found.shape == upright.shape and np.abs(found - upright).max() <= 8


def test_a_broken_exif_block_does_not_cost_the_photo(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert (data.load_image(tmp_path / "x.png", 24) == COLOUR).all()


def test_adobe_cmyk_jpeg_is_not_inverted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    assert np.abs(data.load_image(tmp_path / "x.jpg", 8).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"x{suffix}", save_all=True, append_images=frames[1:], **options)
    assert np.abs(data.load_image(tmp_path / f"x{suffix}", 8).astype(int) - (250, 0, 0)).max() <= 2


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 60), height=st.integers(1, 60), size=st.integers(1, 48), seed=st.integers(0, 999))
def test_resizing_is_antialiased_bilinear(tmp_path, width, height, size, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    oracle = torch.nn.functional.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), (size, size),
                                             mode="bilinear", antialias=True, align_corners=False)
    found = data.load_image(tmp_path / "x.png", size)
    assert np.abs(found - oracle[0].permute(1, 2, 0).numpy()).max() <= 1.5         # 8 bits after each of two passes


def encoded(suffix="png", **options):
    file, pixels = io.BytesIO(), np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, suffix, **options)
    return file.getvalue()


BAD = {
    "empty.png": b"",
    "text.png": b"this is not an image\n" * 50,
    "signature.png": encoded()[:8],
    "header.png": encoded()[:40],
    "half.png": encoded()[:len(encoded()) // 2],
    "half.jpg": encoded("jpeg")[:len(encoded("jpeg")) // 2],
    "half.gif": encoded("gif")[:len(encoded("gif")) // 2],
    "half.bmp": encoded("bmp")[:len(encoded("bmp")) // 2],
    "half.webp": encoded("webp")[:len(encoded("webp")) // 2],
    "half.tif": encoded("tiff")[:len(encoded("tiff")) // 2],
    "lzw.tif": encoded("tiff", compression="tiff_lzw")[:-3000],
    "crc.png": encoded()[:20] + b"\xff" + encoded()[21:],
    "bomb.ppm": b"P6 100000 100000 255\n" + bytes(100),
    "bomb.pgm": b"P5 2147483647 2147483647 255\n" + bytes(100),
    "zero.ppm": b"P6 0 0 255\n",
    "nul.jpg": bytes(5000),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name])
    refused(lambda: data.load_image(tmp_path / name, 8), tmp_path / name)
    refused(lambda: data.open_image(tmp_path / name), tmp_path / name)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    refused(lambda: data.load_image(tmp_path / "folder.png", 8), "folder.png", "is a folder")
    refused(lambda: data.load_image(tmp_path / "none.png", 8), "none.png", "no such file")
    refused(lambda: data.load_image(tmp_path / "dangling.png", 8), "dangling.png", "no such file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")                                           # opening it would wait for ever
        refused(lambda: data.load_image(tmp_path / "pipe.png", 8), "pipe.png")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp"]), seed=st.integers(0, 10 ** 6))
def test_damaged_bytes_give_an_image_or_an_input_error(tmp_path, suffix, seed):
    rng, content = random.Random(seed), bytearray(encoded(suffix))
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(min(len(content), rng.choice((60, 10 ** 9))))] = rng.randrange(256)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content[:rng.choice((len(content), rng.randrange(1, len(content))))])
    try:
        assert data.load_image(path, 8).shape == (8, 8, 3)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def python(code, *args):
    """Runs code in a fresh interpreter beside data.py."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, check=True)


def test_nothing_but_the_error_reaches_the_terminal(tmp_path):
    for name, content in BAD.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(COLOUR).save(tmp_path / "exif.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    of_palette().save(tmp_path / "alphas.png", transparency=bytes([0, 90, 200, 255]))
    (tmp_path / "large.png").write_bytes(encoded())
    done = python("""
        import sys, data
        from pathlib import Path
        data.Image.MAX_IMAGE_PIXELS = 3000                                         # large.png: more, not twice it
        paths = data.find_images([Path(sys.argv[1])])
        for path, image in zip(paths, data.load_images(paths, 8)):
            if not isinstance(image, data.InputError):
                print(path.name)
        """, tmp_path)
    assert done.stderr == "" and done.stdout.split() == ["alphas.png", "exif.png", "large.png"]


def test_load_images_keeps_the_order_and_goes_on_past_bad_files(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(40)]
    for i in (0, 7, 39):
        paths[i].write_bytes(b"broken")
    found = list(data.load_images(iter(paths), 6))
    assert len(found) == 40
    for i, (path, image) in enumerate(zip(paths, found)):
        if i in (0, 7, 39):
            assert isinstance(image, InputError) and str(path) in str(image)
        else:
            assert (image == data.load_image(path, 6)).all()
    assert list(data.load_images([], 6)) == []


def test_decoding_ahead_is_bounded():
    begun = []

    def note(item):
        begun.append(item)
        return item

    results = data.ahead(note, range(10 ** 9), waiting=5)
    assert [next(results) for _ in range(10)] == list(range(10))
    time.sleep(0.05)
    assert len(begun) <= 10 + 5
    results.close()


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        list(data.ahead(lambda item: 1 // item, [1, 0]))


def test_find_images(tmp_path):
    inside = [picture(tmp_path / "a" / name) for name in ("b/1.png", "b/2.JPG", "z.png")]
    (tmp_path / "a/readme.txt").write_text("x")
    odd = tmp_path / "odd.dat"
    odd.write_bytes(b"x")
    assert data.find_images([odd, tmp_path / "a", tmp_path / "gone.png"]) == [odd, *inside, tmp_path / "gone.png"]
    (tmp_path / "void").mkdir()
    refused(lambda: data.find_images([tmp_path / "void"]), "void", "no images")


def test_flat_names():
    names = data.flat_names([Path(p) for p in ("/d/test/good/000.png", "/d/test/bad/000.png", "/d/test/bad/000.jpg")])
    assert names == ["good_000", "bad_000", "bad_000_2"]
    assert data.flat_names([Path("/d/x.png")]) == ["x"] and data.flat_names([]) == []


@given(st.lists(st.lists(st.sampled_from(["a", "A", "b", "a_b", "2", "a_2"]), min_size=1, max_size=3), max_size=12))
def test_flat_names_are_unique_and_hold_no_folder(parts):
    paths = [Path("/r", *part[:-1], part[-1] + ".png") for part in parts]
    names = data.flat_names(paths)
    assert len(names) == len(paths) and len({name.lower() for name in names}) == len(names)
    assert not any(os.sep in name for name in names)


# Feature cache

SHAPE = (4, 3)


class Backbone:
    """Counts what it computes; features that tell photos and weights apart."""
    def __init__(self, weight=1.0):
        self.weight, self.images, self.sizes = weight, 0, []

    def __call__(self, batch):
        assert batch.dtype == torch.uint8 and batch.shape[3] == 3
        self.images += len({image.numpy().tobytes() for image in batch})           # without the padding
        self.sizes.append(len(batch))
        n, size = batch.shape[:2]
        halves = batch.float().reshape(n, 2, size // 2, 2, size // 2, 3)
        return self.weight * halves.mean((2, 4)).reshape(n, *SHAPE)                # (n, 4, 3): means of the quarters


def features(paths, cache, backbone, key="weights-1", size=8, **options):
    return data.cached_features(paths, size, key, backbone, cache, SHAPE, **{"batch_size": 4, **options})


def direct(paths, backbone, size=8):
    return torch.cat([backbone(torch.from_numpy(data.load_image(path, size))[None]) for path in paths]).half()


def test_cache_computes_a_photo_once(tmp_path):
    paths, backbone, cache = pictures(tmp_path / "a", 10), Backbone(), tmp_path / "cache"
    steps = []
    first = features(paths, cache, backbone, progress=steps.append)
    assert first.shape == (10, *SHAPE) and first.dtype == torch.float16
    assert torch.equal(first, direct(paths, Backbone()))
    assert backbone.images == 10 and set(backbone.sizes) == {4} and steps == [4, 8, 10]
    assert torch.equal(features(paths[::-1], cache, backbone), first.flip(0)) and backbone.images == 10
    more = paths[3:5] + pictures(tmp_path / "b", 3) + paths[:1]                    # another category, some known
    assert torch.equal(features(more, cache, backbone), direct(more, Backbone())) and backbone.images == 13
    index = torch.tensor([5, 0, 5])
    assert first[index].shape == (3, *SHAPE) and first[index].dtype == torch.float16


def test_cache_never_serves_what_is_stale(tmp_path):
    paths, cache = pictures(tmp_path / "a", 5), tmp_path / "cache"
    before = features(paths, cache, Backbone())
    picture(paths[2], number=77)                                                   # another photo under the old name
    backbone = Backbone()
    changed = features(paths, cache, backbone)
    assert backbone.images == 1 and torch.equal(changed, direct(paths, Backbone())) and not torch.equal(changed, before)
    backbone = Backbone(weight=2.0)
    assert torch.equal(features(paths, cache, backbone, key="weights-2"), direct(paths, Backbone(2.0)))
    assert backbone.images == 5
    backbone = Backbone()
    assert torch.equal(features(paths, cache, backbone, size=4), direct(paths, Backbone(), 4)) and backbone.images == 5
    renamed = paths[0].rename(tmp_path / "moved.png")
    assert torch.equal(features([renamed], cache, backbone), changed[:1]) and backbone.images == 5


def test_another_shape_is_another_entry(tmp_path):
    paths, cache = pictures(tmp_path / "a", 2), tmp_path / "cache"
    features(paths, cache, Backbone())
    other = data.cached_features(paths, 8, "weights-1", lambda b: b.float().mean((1, 2))[:, None], cache, (1, 3))
    assert other.shape == (2, 1, 3)


def entries(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:-1], lambda content: content[:10], lambda content: content + b"x",
    lambda content: bytes([content[0] ^ 1]) + content[1:], lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    lambda content: bytes(len(content)), None])
def test_damaged_entries_are_computed_again(tmp_path, damage):
    paths, cache = pictures(tmp_path / "a", 6), tmp_path / "cache"
    first, backbone = features(paths, cache, Backbone()), Backbone()
    files = entries(cache)
    assert len(files) == 6
    if damage:
        files[1].write_bytes(damage(files[1].read_bytes()))
    else:
        files[1].write_bytes(files[0].read_bytes())                                # whole, but another photo's
    assert torch.equal(features(paths, cache, backbone), first) and backbone.images == 1
    backbone = Backbone()
    assert torch.equal(features(paths, cache, backbone), first) and backbone.images == 0


def test_mapped_features_equal_those_in_memory(tmp_path, capsys):
    paths, cache, backbone = pictures(tmp_path / "a", 9), tmp_path / "cache", Backbone()
    mapped = features(paths, cache, backbone, budget_gib=8 * 24 / 2 ** 30)         # nine rows of 24 bytes do not fit
    inside = features(paths, cache, backbone, budget_gib=9 * 24 / 2 ** 30)
    assert backbone.images == 9 and mapped.dtype == torch.float16 and mapped.shape == inside.shape
    assert torch.equal(mapped, inside) and mapped.nbytes == inside.nbytes
    index = torch.tensor([8, 1, 1])
    assert torch.equal(mapped[index], inside[index]) and torch.equal(mapped[index + 0][:, 0], inside[index, 0])
    assert len(entries(cache)) == 9 and capsys.readouterr().err == ""              # no file for the map is left behind


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_mapped_features_are_on_disk(tmp_path):
    done = python("""
        import sys, torch, data
        from pathlib import Path
        kept = data.allocate(100, (64, 1024), 0.001, Path(sys.argv[1]))
        print(*(line for line in open("/proc/self/maps") if sys.argv[1] in line))
        """, tmp_path)
    assert "(deleted)" in done.stdout and entries(tmp_path) == []


def test_a_killed_run_is_taken_up_where_it_stopped(tmp_path):
    cache, paths = tmp_path / "cache", pictures(tmp_path / "a", 12)
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent("""
        import sys, time, torch
        from pathlib import Path
        sys.path.insert(0, "tests")
        from test_data import Backbone, features
        class Slow(Backbone):
            def __call__(self, batch):
                if len(self.sizes) == 2:
                    print("two batches", flush=True)
                    time.sleep(60)
                return super().__call__(batch)
        features(sorted(Path(sys.argv[1]).iterdir()), Path(sys.argv[2]), Slow())
        """), str(tmp_path / "a"), str(cache)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().strip() == "two batches"
    finally:
        child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        child.wait()
        child.stdout.close()
    assert len(entries(cache)) == 8
    entries(cache)[0].with_name("f00.123.part").write_bytes(b"left behind by a kill")
    backbone = Backbone()
    assert torch.equal(features(paths, cache, backbone), direct(paths, Backbone())) and backbone.images == 4


def test_two_processes_at_once(tmp_path):
    cache, paths = tmp_path / "cache", pictures(tmp_path / "a", 40)
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        sys.path.insert(0, "tests")
        from test_data import Backbone, features
        features(sorted(Path(sys.argv[1]).iterdir()), Path(sys.argv[2]), Backbone())
        """)
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(cache)]
    children = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    backbone = Backbone()
    assert torch.equal(features(paths, cache, backbone), direct(paths, Backbone())) and backbone.images == 0
    assert len(entries(cache)) == 40


def test_features_do_not_depend_on_what_was_cached(tmp_path):
    """A real convolution, whose last bits may change with the batch size."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 64, 5).eval()
    sizes = []

    @torch.inference_mode()
    def compute(batch):
        sizes.append(len(batch))
        return conv(batch.permute(0, 3, 1, 2).float()).flatten(2).mT

    paths = pictures(tmp_path / "a", 11)
    whole = data.cached_features(paths, 16, "k", compute, tmp_path / "one", (144, 64), batch_size=8)
    data.cached_features(paths[3:6], 16, "k", compute, tmp_path / "two", (144, 64), batch_size=8)
    parts = data.cached_features(paths, 16, "k", compute, tmp_path / "two", (144, 64), batch_size=8)
    assert torch.equal(whole, parts) and set(sizes) == {8}


def test_bad_photos_are_all_named_and_the_others_cached(tmp_path):
    paths, cache, backbone = pictures(tmp_path / "a", 8), tmp_path / "cache", Backbone()
    paths[1].write_bytes(b"")
    paths[6].write_bytes(b"x" * 100)
    with pytest.raises(data.BadPhotos) as caught:
        features(paths, cache, backbone)
    assert list(caught.value.reasons) == [paths[1], paths[6]] and "and 1 more" in str(caught.value)
    assert str(paths[1]) in str(caught.value) and "\n" not in str(caught.value)
    rest = [path for path in paths if path not in caught.value.reasons]
    assert torch.equal(features(rest, cache, backbone), direct(rest, Backbone())) and backbone.images == 6


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_features_beyond_float16_are_refused_and_not_cached(tmp_path, value):
    paths = pictures(tmp_path / "a", 3)
    def backbone(batch):
        return torch.full((len(batch), *SHAPE), value)

    refused(lambda: features(paths, tmp_path / "cache", backbone), paths[0], "65504")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_one_line(tmp_path, capsys):
    paths, backbone = pictures(tmp_path / "a", 6), Backbone()
    (tmp_path / "cache").write_text("a file where the folder should be")
    found = features(paths, tmp_path / "cache", backbone, budget_gib=1e-9)
    assert torch.equal(found, direct(paths, Backbone()))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning", "warning"]
    assert "stay in memory" in lines[0] and "going on without" in lines[1]
    assert (tmp_path / "cache").read_text().startswith("a file")


def test_a_full_disk_costs_one_line_and_leaves_no_rubbish(tmp_path, capsys, monkeypatch):
    paths, cache, written = pictures(tmp_path / "a", 6), tmp_path / "cache", []
    write = Path.write_bytes

    def full(self, content):
        if self.suffix == ".part" and len(written) == 3:
            write(self, content[:5])
            raise OSError(28, "No space left on device")
        written.append(self)
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert torch.equal(features(paths, cache, Backbone()), direct(paths, Backbone()))
    warning = f"warning: {cache}: cannot be written (No space left on device); going on without\n"
    assert capsys.readouterr().err == warning
    assert len(entries(cache)) == 3 and not list(cache.rglob("*.part"))


def test_no_photos(tmp_path):
    assert features([], tmp_path / "cache", Backbone()).shape == (0, *SHAPE)


# Command line

@pytest.mark.parametrize("arguments, words", [
    (["--category", "juice_botle"], ("--category juice_botle", "did you mean juice_bottle?")),
    (["--train", "1"], ("--train must be at least 2",)),
    (["--test-logical", "-1"], ("the other counts 0",)),
    (["--size", "8"], ("--size 64",)),
])
def test_render_refuses_in_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["data.py", "render", "--out", str(tmp_path / "out"), *arguments])
    assert data.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)
    assert not (tmp_path / "out").exists()
