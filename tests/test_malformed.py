"""More than 300 malformed inputs: images, data sets, checkpoints, options. Each ends in exit code 1
or 2 with one line that says what to do, or is read right. None ends in a traceback, and nothing
that was there is changed."""
import dataclasses
import io
import os
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TRAIN, command, errors_of, make_photos
from PIL import Image

import data
import eval as evaluation
import ladmim
import runs
from bench import localise
from twin import render
from weights import distill


def encoded(kind, mode="RGB", size=(40, 30), **options):
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert("RGB").convert(mode).save(file, kind, **options)
    return file.getvalue()


def damaged_images():
    """name -> (bytes, whether it must be refused: True, False or None where either will do)."""
    found, rng = {}, random.Random(0)
    for kind in ("png", "jpeg", "bmp", "gif", "tiff", "webp"):
        whole = encoded(kind)
        for i, share in enumerate((0.02, 0.1, 0.3, 0.5, 0.8)):
            must = True if kind != "jpeg" or share < 0.1 else None
            found[f"cut{i}.{kind}"] = whole[:max(1, int(share * len(whole)))], must
        for i in range(16):
            flipped = bytearray(whole)
            for _ in range(rng.randint(1, 20)):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            found[f"flipped{i}.{kind}"] = bytes(flipped), None
        found[f"empty.{kind}"] = b"", True
        found[f"text.{kind}"] = b"not an image\n" * 30, True
        found[f"zeros.{kind}"] = bytes(2000), True
        found[f"spliced.{kind}"] = whole[:60] + encoded("png")[60:], None
    frames = [Image.new("RGB", (20, 20), (i * 60, 0, 0)) for i in range(4)]
    for kind in ("gif", "png", "webp"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        found[f"animated.{kind}"] = file.getvalue(), False
    wide = np.arange(1200, dtype=np.uint16).reshape(30, 40)
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "png")
    found |= {"one.png": (encoded("png", size=(1, 1)), False),
              "long.png": (encoded("png", size=(30_000, 10)), False),
              "16 bit.png": (file.getvalue(), False),
              "cmyk.jpg": (encoded("jpeg", "CMYK"), False),
              "grey.png": (encoded("png", "L"), False),
              "palette.png": (encoded("png", "P"), False),
              "bit.png": (encoded("png", "1"), False),
              "alpha.png": (encoded("png", "RGBA"), False),
              "bomb.ppm": (b"P6 100000 100000 255\n" + bytes(100), True),
              "none.ppm": (b"P6 0 0 255\n", True),
              "many.pgm": (b"P5 2147483647 2147483647 255\n", True)}
    return found


@pytest.fixture
def place(trained):
    """A folder with photos, and a run trained on them."""
    return trained[0]


def contents(folder):
    """Every file's bytes, but for the caches and locks that a refused command may have made."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "lock" and "cache" not in path.parts}


def one_line(result, code=2):
    assert result.returncode == code, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error:"), result.stderr
    return lines[0]


def one_error(result):
    """Ends in exit code 2 with one error; warnings may stand beside it."""
    assert result.returncode == 2 and len(errors_of(result)) == 1, result
    assert "Traceback" not in result.stderr, result.stderr


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_two_hundred_photos_most_of_them_damaged(place, tmp_path):
    """One command over all: a line for each bad one, a verdict for each good one."""
    images = damaged_images()
    assert len(images) > 150
    for name, (content, _) in images.items():
        (tmp_path / name).write_bytes(content)
    result, before = command("predict", tmp_path, "--run", place / "run"), f"{tmp_path}{os.sep}"
    *lines, counted = result.stderr.splitlines()
    dark = [line for line in lines if "is taken as white" in line]           # read, but dark
    lines = [line for line in lines if line not in dark]
    assert f" of {len(images)} photos flagged, {len(lines)} unreadable; threshold" in counted
    refused = {line.split(before)[1].split(":")[0] for line in lines}
    read = {line.split(before)[1] for line in result.stdout.splitlines()}
    assert result.returncode == 1 and len(lines) == len(refused)
    assert "Traceback" not in result.stderr
    assert refused | read == set(images) and not refused & read
    assert {line.split(before)[1].split(":")[0] for line in dark} <= read
    for name, (_, bad) in images.items():
        assert bad is None or (name in refused) == bad, name
    for name, (content, _) in images.items():
        assert (tmp_path / name).read_bytes() == content


STRANGE = ["two words.png", "line\nbreak.png", "tab\t.png", "quote'\".png", "-dash.png",
           "ünï.png", "%s{0}.png", b"bytes\xff\xfe.png", "\x1b[31mred.png", "a" * 240 + ".png"]


def test_strange_names_are_read_and_reported_in_one_line(place, tmp_path):
    """In a process of its own: what a terminal would be sent."""
    good, bad = os.fsencode(tmp_path / "good"), os.fsencode(tmp_path / "bad")
    for folder, content in ((good, encoded("png")), (bad, b"")):
        os.mkdir(folder)
        for name in STRANGE:
            with open(os.path.join(folder, os.fsencode(name)), "wb") as file:
                file.write(content)
    done = subprocess.run([sys.executable, ladmim.__file__, "predict", good, bad, "--run",
                           place / "run", "--heatmap", tmp_path / "heat"], capture_output=True)
    said, (*wrong, _) = done.stdout.splitlines(), done.stderr.splitlines()
    assert done.returncode == 1 and len(said) == len(wrong) == len(STRANGE), done
    for name in STRANGE:
        shown = data.printable(os.fsdecode(name)).encode()
        assert sum(line.endswith(b"/" + shown) for line in said) == 1, done
        assert sum(b"/" + shown + b": the file is empty" in line for line in wrong) == 1, done
    assert b"Traceback" not in done.stderr and b"\x1b" not in done.stdout + done.stderr
    assert len(list((tmp_path / "heat").iterdir())) == len(STRANGE)


def test_links_and_folders_in_place_of_photos(place, tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "again").symlink_to(tmp_path)
    for name in ("loop.png", "gone.png", "folder.png", "nothing"):
        code = 2 if name == "folder.png" else 1
        one_line(command("predict", tmp_path / name, "--run", place / "run"), code)
    (tmp_path / "good.png").write_bytes(encoded("png"))
    result = command("predict", tmp_path, "--run", place / "run")
    assert "Traceback" not in result.stderr and result.stdout.count("good.png") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0,
                    reason="root may read everything")
def test_a_photo_that_may_not_be_read(place, tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded("png"))
    (tmp_path / "secret.png").chmod(0)
    result = command("predict", tmp_path / "secret.png", "--run", place / "run")
    assert "secret.png" in one_line(result, code=1)


# Data sets

def without(part):
    return lambda root: shutil.rmtree(root / part)


def emptied(part):
    def change(root):
        shutil.rmtree(root / part)
        (root / part).mkdir()
    return change


def all_bad(part):
    def change(root):
        for path in (root / part).iterdir():
            path.write_bytes(b"")
    return change


def loose(root):
    shutil.copy(root / "train/good/000.png", root / "test/000.png")


def nested(root):
    (root / "test/good/deeper").mkdir()
    for path in (root / "test/good").glob("*.png"):
        path.rename(root / "test/good/deeper" / path.name)


def as_file(part):
    def change(root):
        shutil.rmtree(root / part)
        (root / part).write_bytes(b"a file")
    return change


def config(text):
    def change(root):
        (root / "defects_config.json").write_text(text)
        truth = root / "ground_truth/logical_anomalies/000"
        truth.mkdir(parents=True)
        Image.fromarray(np.full((64, 64), 7, np.uint8)).save(truth / "000.png")
    return change


@pytest.mark.parametrize("change", [
    without("train"), without("train/good"), without("."), emptied("train/good"), emptied("."),
    all_bad("train/good"), all_bad("validation/good"), loose, nested, as_file("train"),
    as_file("train/good"), as_file("."), without("test/good"), emptied("test/good")])
def test_data_sets_that_cannot_be_trained_on(tmp_path, change):
    make_photos(tmp_path / "photos", train=3, validation=2, good=2, bad=2)
    change(tmp_path / "photos/widgets")
    one_error(command(*TRAIN, "--out", "run", cwd=tmp_path))
    assert not (tmp_path / "run").exists()


def defect(value=7, threshold="1", share="true"):
    return (f'[{{"pixel_value": {value}, "saturation_threshold": {threshold}, '
            f'"relative_saturation": {share}}}]')


@pytest.mark.parametrize("text", [
    "", "{", "{}", "[1]", "null", '[{"pixel_value": 7}]', defect(300), defect('"x"'), defect(8),
    defect(threshold="-1"), defect(threshold="NaN", share="false"), "\x00\x01"])
def test_a_broken_defects_config_is_named(tmp_path, text):
    make_photos(tmp_path / "photos", train=3, validation=2, good=2, bad=1)
    config(text)(tmp_path / "photos/widgets")
    photo = next(p for p in data.find_photos(tmp_path / "photos", "widgets", 0) if p.masks)
    with pytest.raises(data.InputError, match="defects_config.json"):
        data.load_regions(photo, data.load_defects(tmp_path / "photos", "widgets"))


def test_a_photo_in_two_splits_and_missing_masks_are_warned_of(tmp_path):
    make_photos(tmp_path / "photos", train=3, validation=2, good=2, bad=2)
    folder = tmp_path / "photos/widgets"
    shutil.copy(folder / "train/good/000.png", folder / "test/good/copy.png")
    result = command(*TRAIN, "--out", "run", cwd=tmp_path)
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert result.returncode == 0
    assert sum("000.png" in line and "copy.png" in line for line in warnings) == 1
    assert sum("no ground-truth mask" in line for line in warnings) == 1


# Checkpoints

class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoints_that_are_none(place, tmp_path):
    """Truncated at twenty places, with bits flipped, foreign, newer, hostile: each refused by
    predict and by train."""
    whole, rng = (place / "run" / "checkpoint.pt").read_bytes(), random.Random(0)
    state = torch.load(place / "run" / "checkpoint.pt", weights_only=True)
    run, photos = tmp_path / "run", place / "photos/widgets/test/good"
    shutil.copytree(place / "run", run)
    cases = [whole[:int(i / 20 * len(whole))] for i in range(20)]
    cases += [b"text", pickle.dumps({"format": 1}), pickle.dumps(Hostile(tmp_path / "ran"))]
    for value in ([1, 2], {}, {"format": 99}, {"format": None}, {"format": "1"},
                  state | {"format": runs.FORMAT + 1}, torch.zeros(3), "text",
                  Hostile(tmp_path / "ran")):
        file = io.BytesIO()
        torch.save(value, file)
        cases.append(file.getvalue())
    for content in cases:
        (run / "checkpoint.pt").write_bytes(content)
        assert "checkpoint.pt" in one_line(command("predict", photos, "--run", run))
        one_error(command(*TRAIN, "--out", run, cwd=place))
        assert (run / "checkpoint.pt").read_bytes() == content and not (tmp_path / "ran").exists()
    for _ in range(20):                              # a flipped bit may lie where nobody reads
        flipped = bytearray(whole)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        (run / "checkpoint.pt").write_bytes(bytes(flipped))
        result = command("predict", photos, "--run", run)
        assert result.returncode in (0, 2)
        assert len(errors_of(result)) == (result.returncode == 2)


# Options

PREDICT = ("predict", "photos/widgets/test/good", "--run", "run")
RENDER = ("--out", "twin", "--category", "pushpins")
DISTILL = ("--images", "photos/widgets/train/good", "--out", "d.pt", "--teacher", "run/scores.csv")
WRONG = ["", "x", "-1", "nan", "inf", "1e400", "-0.5", "0x10", "1,5"]


def wrong_options():
    """Each number of `train` with what it cannot be, and each other option with what does not
    exist."""
    for field in dataclasses.fields(ladmim.Config):
        option = "--" + field.name.replace("_", "-")
        if field.name in ladmim.OPTIONS:
            yield (*TRAIN, option, "neither")
        elif isinstance(field.default, (int, float)):
            for value in WRONG:
                yield (*TRAIN, f"{option}={value}")
    for more in (
            ("--category", "../widgets"), ("--category", "none"), ("--category", ""),
            ("--data", "none"), ("--preset", "huge"), ("--pdn", "none.pt"),
            ("--pdn", "run/scores.csv"), ("--pdn", "photos"), ("--device", "cuda:7"),
            ("--out", "run/scores.csv"), ("--seed", "x"), ("--seed", "-1"), ("--seed", "4-2"),
            ("--seed", "1e3"), ("--seed", "0-99999999"), ("--seed", ""), ("--grid", "7"),
            ("--hvq-heads", "5"), ("--mim-heads", "3"), ("--mask", "checkerboard"),
            ("--image-size", "30"), ("--train-ratio", "0.001"), ("--score-ratio", "0.001"),
            ("--codes", "40000"), ("--target", "code"), ("--wrong", "1"),
            ("--cache", "run/scores.csv")):
        yield (*TRAIN, *more)
    yield from (("train",), ("train", "--category"), (), ("nothing",), ("predict",))
    yield "predict", "photos"
    for more in (("--run", "none"), ("--run", "photos"), ("--category", "other"),
                 ("--heatmap", "run/scores.csv"), ("--heatmap", "photos/widgets/test/good"),
                 ("--device", "x")):
        yield (*PREDICT, *more)


@pytest.mark.parametrize("arguments", list(wrong_options()),
                         ids=lambda arguments: " ".join(arguments[-1:]) or "none")
def test_a_wrong_option_is_one_line_and_changes_nothing(place, arguments):
    before = contents(place)
    one_error(command(*arguments, cwd=place))
    assert contents(place) == before


def wrong_options_of_the_other_commands():
    for more in (("--images", "none"), ("--images", "run/scores.csv"), ("--teacher", "none"),
                 ("--size", "large"), ("--start", "none"), ("--precision", "fp8"),
                 ("--size", "small", "--start", "x.pt")):
        yield distill, (*DISTILL, *more)
    for option in ("steps", "decay", "batch", "bank", "shares", "lr"):
        for value in ("x", "-1", "nan", "inf"):
            yield distill, (*DISTILL, f"--{option}={value}")
    for option in ("train", "validation", "test-good", "size", "seed"):
        for value in ("x", "-1", "nan"):
            yield render, (*RENDER, f"--{option}={value}")
    for arguments in ((*RENDER, "--size", "5"), (*RENDER, "--category", "none"), (),
                      ("--out", "photos", "--category", "none")):
        yield render, arguments
    for arguments in (("none",), ("--runs", "none"), ("photos",), ("--standardise", "all"),
                      ("--json", "run/scores.csv", "run"), ("--maps", "maps", "run"),
                      ("--wrong",), ("run", "--json", "photos"),
                      ("run", "--json", "new.json", "--runs", "other")):
        yield evaluation, arguments
    for arguments in (("none",), ("photos",), ("--wrong",)):
        yield localise, arguments


@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
@pytest.mark.parametrize("module, arguments", list(wrong_options_of_the_other_commands()))
def test_wrong_options_of_the_other_commands(place, monkeypatch, capsys, module, arguments):
    monkeypatch.chdir(place)
    before = contents(place)
    code, err = module.main(list(arguments)), capsys.readouterr().err
    assert code in (1, 2) and "Traceback" not in err, (code, err)
    assert sum("error:" in line for line in err.splitlines()) == 1, err
    assert contents(place) == before
