"""Errors and files, layouts of data sets, their checks and ground truth."""
import csv
import errno
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import InputError, Photo

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


def refused(call, *words):
    """call raises InputError, one line, that holds the words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message
    return message


# Errors, files, commands

@pytest.mark.parametrize("text, shown", [
    ("plain ünï", "plain ünï"), ("line\nbreak", "line\\nbreak"),
    ("\x1b[31mred", "\\x1b[31mred"),
    (os.fsdecode(b"bytes\xff"), "bytes\\udcff")])
def test_an_error_is_one_line_whatever_a_name_holds(text, shown):
    assert data.printable(text) == shown == str(InputError(text))


def test_a_saved_file_is_whole_or_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    data.write_whole(path, b"first")
    data.write_whole(path, b"second")
    assert path.read_bytes() == b"second"

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    words = ("x.json: could not be saved", "No space left", "before is intact", "free some space")
    refused(lambda: data.write_whole(path, b"third"), *words)
    refused(lambda: data.write_whole(path, b"third", "name another file"), "name another file")
    assert path.read_bytes() == b"second" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_its_folder_is_one_line(tmp_path):
    (tmp_path / "folder").write_text("a file")
    refused(lambda: data.write_whole(tmp_path / "folder" / "x.json", b"x"), "could not be saved")


def raises(error):
    raise error


@pytest.mark.parametrize("command, code, said", [
    (lambda: 0, 0, ""), (lambda: 1, 1, ""),
    (lambda: raises(InputError("x: no\nfile")), 2, "error: x: no\\nfile\n"),
    (lambda: data.Parser(prog="p.py").parse_args(["--wrong"]), 2,
     "error: unrecognized arguments: --wrong (see p.py --help)\n"),
    (lambda: raises(KeyboardInterrupt), 130, "\nhalted\n")])
def test_exit_codes(capsys, command, code, said):
    assert data.run_command(command, "halted") == code
    assert capsys.readouterr() == ("", said)


def test_a_reader_that_left_is_no_error():
    code = ("import sys, data\n"
            "sys.exit(data.run_command(lambda: [print('x' * 99) for _ in range(99_999)] and 0))")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 141
    child.stderr.close()


def test_a_folder_for_drawings_is_not_the_photos_own(tmp_path):
    path = picture(tmp_path / "photos/000.png")
    data.make_folder(tmp_path / "a/b", "--heatmap", [path], [])
    assert (tmp_path / "a/b").is_dir()
    own = tmp_path / "a/../photos"
    refused(lambda: data.make_folder(own, "--heatmap", [path], []), "--heatmap", "themselves")
    other = picture(tmp_path / "a/b/x.png")
    refused(lambda: data.make_folder(tmp_path / "a/b", "--heatmap", [path], ["x"]), "x.png",
            "no heat map")
    assert other.exists()


def test_batches():
    assert list(data.in_batches(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(data.in_batches([], 3)) == []


# Layouts

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


def test_mvtec_loco(tmp_path):
    loco(tmp_path)
    photos = data.find_photos(tmp_path, "breakfast_box", 0)
    assert counts(photos) == {
        ("train", "good"): 10, ("validation", "good"): 3, ("test", "good"): 3,
        ("test", "logical_anomalies"): 2, ("test", "structural_anomalies"): 2}
    masks = {(photo.kind, photo.path.stem): len(photo.masks) for photo in photos
             if photo.split == "test"}
    assert masks == {("good", "000"): 0, ("good", "001"): 0, ("good", "002"): 0,
                     ("logical_anomalies", "000"): 1, ("logical_anomalies", "001"): 2,
                     ("structural_anomalies", "000"): 1, ("structural_anomalies", "001"): 2}
    assert [photo.label for photo in photos] == [0] * 16 + [1] * 4
    assert photos == data.find_photos(tmp_path, "breakfast_box", 7)     # nothing is drawn


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
    splits = []
    for root in (tmp_path / "a", tmp_path / "b"):
        pictures(root / "nut/train/good", 30)
        splits.append([(p.path.name, p.split) for p in data.find_photos(root, "nut", 3)])
    assert splits[0] == splits[1]


def test_held_out_photos_stay_the_same_over_versions(tmp_path):
    pictures(tmp_path / "nut/train/good", 30)
    held = [photo.path.stem for photo in data.find_photos(tmp_path, "nut", 0)
            if photo.split == "validation"]
    assert held == ["021", "025", "029"]


def test_mvtec_ad(tmp_path):
    folder = tmp_path / "bottle"
    pictures(folder / "train/good", 20)
    pictures(folder / "test/good", 2)
    pictures(folder / "test/broken", 2)
    pictures(folder / "test/contamination", 1)
    for mask in ("broken/000_mask.png", "broken/001_mask.png", "contamination/000_mask.png"):
        picture(folder / "ground_truth" / mask)
    photos = data.find_photos(tmp_path, "bottle", 0)
    assert counts(photos) == {("train", "good"): 18, ("validation", "good"): 2,
                              ("test", "good"): 2, ("test", "broken"): 2,
                              ("test", "contamination"): 1}
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
    assert counts(photos) == {("train", "good"): 5, ("validation", "good"): 2,
                              ("test", "good"): 3, ("test", "Ungood"): 3}
    label = folder / "test/Ungood/label"
    masks = [photo.masks for photo in photos if photo.label]
    assert masks == [((label / f"{i:03}.png",) if nested else ()) for i in range(3)]


def visa(root, category="candle", normal=20, anomalies=3):
    """VisA's files and the rows of its table."""
    rows = []
    for i in range(normal):
        split = "train" if i < normal * 0.9 else "test"
        name = f"{category}/Data/Images/Normal/{i:04}.JPG"
        rows.append((category, split, "normal", name, ""))
    for i in range(anomalies):
        name = f"{category}/Data/Images/Anomaly/{i:03}.JPG"
        mask = f"{category}/Data/Masks/Anomaly/{i:03}.png"
        rows.append((category, "test", "anomaly", name, mask))
        picture(root / mask)
    for row in rows:
        picture(root / row[3])
    (root / category / "image_anno.csv").write_text("image,label,mask\n")
    return rows


def write_table(root, rows):
    (root / "split_csv").mkdir()
    with open(root / "split_csv/1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])


def test_visa(tmp_path):
    write_table(tmp_path, visa(tmp_path) + visa(tmp_path, "pcb1", 10, 2))
    assert data.list_categories(tmp_path) == ["candle", "pcb1"]
    photos = data.find_photos(tmp_path, "candle", 0)
    assert counts(photos) == {("train", "good"): 16, ("validation", "good"): 2,
                              ("test", "good"): 2, ("test", "anomaly"): 3}
    masks = tmp_path / "candle/Data/Masks/Anomaly"
    for photo in photos:
        assert photo.masks == ((masks / f"{photo.path.stem}.png",) if photo.label else ())
        assert photo.path.is_file() and photo.path.is_relative_to(tmp_path / "candle")


def test_visa_without_its_table_names_the_table(tmp_path):
    visa(tmp_path)
    refused(lambda: data.find_photos(tmp_path, "candle", 0), "1cls.csv")


@pytest.mark.parametrize("change, word", [
    (lambda rows: rows[:-1] + [(*rows[-1][:3], "candle/Data/Images/Anomaly/999.JPG", "")],
     "999.JPG"),
    (lambda rows: rows + rows[:1], "twice"),
    (lambda rows: [("candle", "train", *row[2:]) for row in rows], "neither"),
    (lambda rows: [(row[0], "holdout", *row[2:]) for row in rows], "neither"),
    (lambda rows: rows + [("candle", "test", "anomaly", "../x.JPG", "")], "missing"),
    (lambda rows: rows + [("candle", "test")], "not VisA's table"),
])
def test_visa_damaged_table(tmp_path, change, word):
    write_table(tmp_path, change(visa(tmp_path)))
    refused(lambda: data.find_photos(tmp_path, "candle", 0), "1cls.csv", word)


@pytest.mark.parametrize("content", [b"", b"image;label\n1;2\n", b"\xff\xfe\x00\x00,\x80",
                                     b'object,split,label,image,mask\n"'])
def test_visa_foreign_table(tmp_path, content):
    write_table(tmp_path, visa(tmp_path))
    (tmp_path / "split_csv/1cls.csv").write_bytes(content)
    refused(lambda: data.find_photos(tmp_path, "candle", 0), "1cls.csv", "not VisA's table")


def test_own_folder(tmp_path):
    folder = tmp_path / "widget"
    pictures(folder / "train/good", 12, ".JPG")
    (folder / "train/good/.DS_Store").write_bytes(b"x")
    (folder / "train/good/._000.JPG").write_bytes(b"x")                 # a resource fork
    (folder / "train/good/notes.txt").write_text("x")
    photos = data.find_photos(tmp_path, "widget", 0)
    assert counts(photos) == {("train", "good"): 10, ("validation", "good"): 2}
    pictures(folder / "test/Good", 2, ".bmp")
    photos = data.find_photos(tmp_path, "widget", 0)
    assert counts(photos)["test", "good"] == 2
    pictures(folder / "test/.thumbnails", 2)         # hidden: no kind of defect
    pictures(folder / "test/scratched twice", 3, ".tif")
    picture(folder / "ground_truth/scratched twice/001.png")
    photos = data.find_photos(tmp_path, "widget", 0)
    assert counts(photos)["test", "scratched twice"] == 3
    assert {photo.kind for photo in photos} == {"good", "scratched twice"}
    assert [len(photo.masks) for photo in photos if photo.label] == [0, 1, 0]
    order = [(data.SPLITS.index(p.split), p.label, p.kind, p.path) for p in photos]
    assert order == sorted(order)


def test_wrong_folders_are_refused_with_the_remedy(tmp_path, capsys):
    def finding(category, root=tmp_path):
        return lambda: data.find_photos(root, category, 0)

    refused(finding("bottle", tmp_path / "nowhere"), "--data", "nowhere", "no such folder")
    refused(finding("bottle"), "--data", "holds no category folder")
    refused(lambda: data.list_categories(tmp_path), "holds no category folder")
    loco(tmp_path, "juice_bottle")
    loco(tmp_path, "pushpins")
    (tmp_path / ".pushpins-tmp/train").mkdir(parents=True)
    (tmp_path / "Upper/Train").mkdir(parents=True)
    (tmp_path / "Upper/test").mkdir()
    (tmp_path / "notes").mkdir()
    assert data.find_data(str(tmp_path), "all") == (tmp_path, ["juice_bottle", "pushpins"])
    assert capsys.readouterr().err == (f"warning: {tmp_path}/Upper: has a folder test, but no "
                                       "folder train, and is left out\n")
    refused(finding("juice_botle"), "--category juice_botle", "found: juice_bottle, pushpins")
    pushpins = tmp_path / "pushpins"
    for category in ("", ".", "..", "juice_bottle/train", str(pushpins), "a\0b", "x" * 300):
        refused(finding(category))
    refused(finding("pushpins", pushpins), "is a category", "--category pushpins")


def test_a_category_that_cannot_be_used_is_refused_with_the_remedy(tmp_path):
    def finding():
        return data.find_photos(tmp_path, "void", 0)

    folder = tmp_path / "void"
    folder.mkdir()
    refused(finding, "void/train/good", "no training photos")
    picture(folder / "train/000.png")
    refused(finding, "void/train/good", "no training photos")
    picture(folder / "train/good/000.png")
    refused(finding, "1 training photos", "add more")
    pictures(folder / "train/good", 3)
    (folder / "test/good").mkdir(parents=True)
    assert len(finding()) == 3                       # an empty kind is no fault
    picture(folder / "test/bent/deeper/000.png")
    refused(finding, "test/bent", "no photos")
    picture(folder / "test/000.png")
    refused(finding, "test: photos lie in it directly")


def test_without_data_the_twin_is_drawn_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def render(root, name):
        drawn.append(name)
        if name == "nut":
            raise ValueError("--category nut: not one of the rendered")
        (root / name / "train").mkdir(parents=True)

    monkeypatch.setattr(data, "render", render)
    rendered = Path("data/rendered")
    assert data.find_data(None, "pushpins,screw_bag,pushpins") == (
        rendered, ["pushpins", "screw_bag"])
    assert drawn == ["pushpins", "screw_bag"]
    assert "none given with --data" in capsys.readouterr().out
    assert data.find_data(None, "all") == (rendered, sorted(data.SCENES))
    assert sorted(drawn) == sorted(data.SCENES)
    refused(lambda: data.find_data(None, "nut"), "--category nut", "--data")
    assert data.find_data(str(rendered), "all") == (rendered, sorted(data.SCENES))
    assert data.find_data("photos", "b,a") == (Path("photos"), ["a", "b"])
    loco(Path("data/mvtec_loco_anomaly_detection"), "pushpins")
    real = Path("data/mvtec_loco_anomaly_detection")
    assert data.find_data(None, "pushpins") == (real, ["pushpins"])
    assert data.find_data(None, "all") == (real, ["pushpins"])
    assert data.find_data(None, "screw_bag") == (rendered, ["screw_bag"])
    refused(lambda: data.find_data(None, "pushpins,screw_bag"), "--category pushpins,screw_bag",
            "holds pushpins only")


# Checks

def test_counts_of_mvtec_loco(tmp_path):
    loco(tmp_path, "screw_bag")
    photos = data.find_photos(tmp_path, "screw_bag", 0)
    [warning] = data.count_mismatch(photos, tmp_path)
    for words in ("screw_bag", "train 10 (not 360)", "validation 3 (not 60)",
                  "test_good 3 (not 122)", "test_logical 2 (not 137)",
                  "test_structural 2 (not 82)"):
        assert words in warning
    table = (("train", "good", 360), ("validation", "good", 60), ("test", "good", 122),
             ("test", "logical_anomalies", 137), ("test", "structural_anomalies", 82))
    full = [Photo(tmp_path / f"{i}", "screw_bag", split, kind)
            for split, kind, n in table for i in range(n)]
    assert data.count_mismatch(full, tmp_path) == []
    [warning] = data.count_mismatch(full[1:], tmp_path)
    assert "train 359 (not 360);" in warning
    assert "validation" not in warning and "test" not in warning
    mark = tmp_path / "screw_bag" / data.RENDERED_MARK
    mark.write_text("{}")
    assert data.count_mismatch(photos, tmp_path) == []                  # the twin has its own
    mark.unlink()
    own = [Photo(tmp_path, "screw_bag", "test", "bent")]                # of LOCO's name
    assert data.count_mismatch(own, tmp_path) == []


def test_a_test_split_of_one_kind_is_refused_and_none_is_warned_of(tmp_path):
    folder = tmp_path / "widget"
    pictures(folder / "train/good", 12)

    def photos():
        return data.find_photos(tmp_path, "widget", 0)

    data.check_test_split(photos())
    refused(lambda: data.check_test_split(photos(), needed=True), "no photos", "good and test/NAME")
    [warning] = data.check_photos(photos(), tmp_path)
    assert warning.startswith("widget: no test photos") and "no AUROC" in warning
    pictures(folder / "test/good", 2)
    refused(lambda: data.check_test_split(photos()), "widget", "no anomalies", "test/NAME_OF")
    pictures(folder / "test/bent", 2)
    data.check_test_split(photos())
    [warning] = data.check_photos(photos(), tmp_path)
    assert "no ground-truth mask" in warning
    for path in (folder / "test/good").iterdir():
        path.unlink()
    refused(lambda: data.check_test_split(photos()), "widget", "no good photos", "test/good")


def test_photos_in_two_splits_are_named(tmp_path):
    folder = loco(tmp_path)

    def warnings():
        return data.check_photos(data.find_photos(tmp_path, "breakfast_box", 0), tmp_path)

    before = warnings()
    copy, first = folder / "test/good/zzz.png", folder / "train/good/004.png"
    copy.write_bytes(first.read_bytes())
    warning = warnings()[-1]
    assert "the same photo in two splits" in warning and "more" not in warning
    (folder / "train/good/again.png").write_bytes(copy.read_bytes())    # twice in one split
    warning = warnings()[-1]
    assert str(first) in warning and str(copy) in warning and "(train)" in warning
    (folder / "train/good/again.png").unlink()
    changed = bytearray(copy.read_bytes())
    changed[-1] ^= 1                                                    # as long, other bytes
    copy.write_bytes(changed)
    assert len(warnings()) == len(before) and "two splits" not in warnings()[-1]


def test_missing_masks_are_counted_once(tmp_path):
    loco(tmp_path)
    loco(tmp_path, "pushpins", truth=False)
    (tmp_path / "breakfast_box/ground_truth/logical_anomalies/000/000.png").unlink()
    photos = []
    for name in ("breakfast_box", "pushpins"):
        photos += data.find_photos(tmp_path, name, 0)
    [warning] = data.missing_masks(photos)
    assert warning.startswith("5 of 8 anomalies") and "breakfast_box 1, pushpins 4" in warning
    assert warning in data.check_photos(photos, tmp_path)
    for name in ("ground_truth/KIND", " NAME_mask.png", " NAME.png", ".bmp", "a folder NAME"):
        assert name in warning


def test_count_table(tmp_path):
    loco(tmp_path)
    loco(tmp_path, "own", truth=False)
    photos = []
    for name in ("breakfast_box", "own"):
        photos += data.find_photos(tmp_path, name, 0)
    head, first, second = data.count_table(photos).splitlines()
    assert first.split()[:6] == ["breakfast_box", "10", "3", "3", "4", "4"]
    assert first.endswith("logical_anomalies 2, structural_anomalies 2")
    assert second.split()[:6] == ["own", "10", "3", "3", "4", "0"]
    assert head.index("train") + len("train") == first.index("10") + 2  # columns stand below


# Ground truth

def config(folder, *entries):
    names = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([dict(zip(names, entry)) for entry in entries])
    (folder / "defects_config.json").write_text(text)


def test_regions_of_mvtec_loco(tmp_path):
    config(tmp_path / "pushpins", ("a", 255, 0.29, True), ("b", 254, 30, False),
           ("c", 253, 1000, False), ("d", 252, 0.001, True))
    defects = data.load_defects(tmp_path, "pushpins")
    assert defects == {255: (0.29, True), 254: (30, False), 253: (1000, False), 252: (0.001, True)}
    paths, truth = [], np.random.default_rng(0).random((4, 20, 30)) < 0.2
    for value, mask in zip((255, 254, 253, 252), truth):
        paths.append(tmp_path / f"{value}.png")
        Image.fromarray(mask * np.uint8(value)).save(paths[-1])
    photo = Photo(tmp_path, "pushpins", "test", "logical_anomalies", tuple(paths))
    regions = data.load_regions(photo, defects)
    area = truth.sum((1, 2))
    assert [saturation for _, saturation in regions] == [int(0.29 * area[0]), 30, area[2], 1]
    for (mask, _), expected in zip(regions, truth):
        assert (mask == expected).all() and mask.dtype == bool


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
    masks = tmp_path / "m.png", tmp_path / "empty.png"
    [(found, saturation)] = data.load_regions(
        Photo(tmp_path, "bottle", "test", "broken", masks), None)
    assert (found == mask).all() and saturation == mask.sum()


@pytest.mark.parametrize("values", [(0, 0), (0, 7), (254, 255)])
def test_masks_that_contradict_the_config_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.uint8)).save(tmp_path / "m.png")
    photo = Photo(tmp_path, "x", "test", "logical_anomalies", (tmp_path / "m.png",))
    defects = {255: (1.0, True), 254: (1.0, True)}
    refused(lambda: data.load_regions(photo, defects), "m.png", "defects_config.json")


def test_masks_of_two_sizes_are_refused(tmp_path):
    for name, size in (("a.png", (9, 9)), ("b.png", (9, 8))):
        Image.new("L", size, 255).save(tmp_path / name)
    photo = Photo(tmp_path, "x", "test", "bent", (tmp_path / "a.png", tmp_path / "b.png"))
    refused(lambda: data.load_regions(photo, None), "b.png", "another size than a.png")


def entry(value=1, threshold=1, share=True):
    return {"defect_name": "a", "pixel_value": value, "saturation_threshold": threshold,
            "relative_saturation": share}


@pytest.mark.parametrize("text", [
    "", "{}x", "null", '{"a": 1}', "[1]", '[{"pixel_value": 1}]',
    *map(json.dumps, (
        [entry(0)], [entry(256)], [entry(threshold=0)], [entry(threshold=1.5)], [entry()] * 2,
        [entry(threshold=-3, share=False)], [entry(threshold="x")], [entry(float("inf"))],
        [entry(threshold=float("nan"), share=False)]))])
def test_damaged_defects_config_is_refused(tmp_path, text):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/defects_config.json").write_text(text)
    refused(lambda: data.load_defects(tmp_path, "x"), "defects_config.json", "unpack")
