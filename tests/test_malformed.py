"""More than 300 malformed inputs: images, data sets, checkpoints, options. Each ends in exit code 1 or 2 with one line that
says what to do, or is read right; never in a traceback, and nothing that was there is changed."""
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
from PIL import Image
from test_ladmim import QUICK, command, errors_of, make_photos

import data
import eval as evaluation
import ladmim

TRAIN = ("train", "--data", "photos", "--category", "widgets", *QUICK)


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
            found[f"cut{i}.{kind}"] = whole[:max(1, int(share * len(whole)))], True if kind != "jpeg" or share < 0.1 else None
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
    found |= {"one.png": (encoded("png", size=(1, 1)), False), "long.png": (encoded("png", size=(30_000, 10)), False),
              "16 bit.png": (file.getvalue(), False), "cmyk.jpg": (encoded("jpeg", "CMYK"), False),
              "grey.png": (encoded("png", "L"), False), "palette.png": (encoded("png", "P"), False),
              "bit.png": (encoded("png", "1"), False), "alpha.png": (encoded("png", "RGBA"), False),
              "bomb.ppm": (b"P6 100000 100000 255\n" + bytes(100), True), "none.ppm": (b"P6 0 0 255\n", True),
              "many.pgm": (b"P5 2147483647 2147483647 255\n", True)}
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photos, and a run trained on them."""
    folder = tmp_path_factory.mktemp("malformed")
    make_photos(folder / "photos")
    result = command(*TRAIN, "--out", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def contents(folder):
    """Every file's bytes, but for the caches and locks that a refused command may have made."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"
            and "cache" not in path.parts}


def one_line(result, code=2):
    assert result.returncode == code, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error:") and "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_two_hundred_photos_most_of_them_damaged(place, tmp_path):
    """One command over all: a line for each bad one, a verdict for each good one."""
    images = damaged_images()
    assert len(images) > 150
    for name, (content, _) in images.items():
        (tmp_path / name).write_bytes(content)
    result = command("predict", tmp_path, "--run", place / "run")
    refused = {line.split(f"{tmp_path}{os.sep}")[1].split(":")[0] for line in result.stderr.splitlines()}
    read = {line.split(f"{tmp_path}{os.sep}")[1] for line in result.stdout.splitlines()}
    assert result.returncode == 1 and len(result.stderr.splitlines()) == len(refused) and "Traceback" not in result.stderr
    assert refused | read == set(images) and not refused & read
    for name, (_, bad) in images.items():
        assert bad is None or (name in refused) == bad, name
    for name, (content, _) in images.items():
        assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("name", ["two words.png", "line\nbreak.png", "tab\t.png", "quote'\".png", "-dash.png", "ünï.png",
                                  "%s{0}.png", b"bytes\xff\xfe.png", "\x1b[31mred.png", "a" * 240 + ".png"])
def test_strange_names_are_read_and_reported_in_one_line(place, tmp_path, name):
    """In a process of its own: what a terminal would be sent."""
    good, bad = os.fsencode(tmp_path / "good"), os.fsencode(tmp_path / "bad")
    for folder, content in ((good, encoded("png")), (bad, b"")):
        os.mkdir(folder)
        with open(os.path.join(folder, os.fsencode(name)), "wb") as file:
            file.write(content)
    done = subprocess.run([sys.executable, ladmim.__file__, "predict", good, bad, "--run", place / "run", "--heatmap",
                           tmp_path / "heat"], capture_output=True)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1 and len(done.stderr.splitlines()) == 1, done
    assert b"the file is empty" in done.stderr and b"Traceback" not in done.stderr and b"\x1b" not in done.stdout + done.stderr
    assert len(list((tmp_path / "heat").iterdir())) == 1


def test_links_and_folders_in_place_of_photos(place, tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "again").symlink_to(tmp_path)
    for name in ("loop.png", "gone.png", "folder.png", "nothing"):
        one_line(command("predict", tmp_path / name, "--run", place / "run"), code=2 if name == "folder.png" else 1)
    (tmp_path / "good.png").write_bytes(encoded("png"))
    result = command("predict", tmp_path, "--run", place / "run")
    assert "Traceback" not in result.stderr and result.stdout.count("good.png") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_photo_that_may_not_be_read(place, tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded("png"))
    (tmp_path / "secret.png").chmod(0)
    assert "secret.png" in one_line(command("predict", tmp_path / "secret.png", "--run", place / "run"), code=1)


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
        (root / "ground_truth/logical_anomalies/000").mkdir(parents=True)
        Image.fromarray(np.full((64, 64), 7, np.uint8)).save(root / "ground_truth/logical_anomalies/000/000.png")
    return change


@pytest.mark.parametrize("change", [without("train"), without("train/good"), without("."), emptied("train/good"), emptied("."),
                                    all_bad("train/good"), all_bad("validation/good"), loose, nested, as_file("train"),
                                    as_file("train/good"), as_file("."), without("test/good"), emptied("test/good")])
def test_data_sets_that_cannot_be_trained_on(tmp_path, change):
    make_photos(tmp_path / "photos", train=3, validation=2, good=2, bad=2)
    change(tmp_path / "photos/widgets")
    result = command(*TRAIN, "--out", "run", cwd=tmp_path)
    assert result.returncode == 2 and len(errors_of(result)) == 1 and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def defect(value=7, threshold="1", share="true"):
    return f'[{{"pixel_value": {value}, "saturation_threshold": {threshold}, "relative_saturation": {share}}}]'


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", "null", '[{"pixel_value": 7}]', defect(300), defect('"x"'), defect(8),
                                  defect(threshold="-1"), defect(threshold="NaN", share="false"), "\x00\x01"])
def test_a_broken_defects_config_is_named(tmp_path, text):
    make_photos(tmp_path / "photos", train=3, validation=2, good=2, bad=1)
    config(text)(tmp_path / "photos/widgets")
    photo = next(p for p in data.find_photos(tmp_path / "photos", "widgets", 0) if p.masks)
    with pytest.raises(data.InputError, match="defects_config.json"):
        data.load_regions(photo, data.load_defects(tmp_path / "photos", "widgets"))


def test_a_photo_in_two_splits_and_missing_masks_are_warned_of(tmp_path):
    make_photos(tmp_path / "photos", train=3, validation=2, good=2, bad=2)
    shutil.copy(tmp_path / "photos/widgets/train/good/000.png", tmp_path / "photos/widgets/test/good/copy.png")
    result = command(*TRAIN, "--out", "run", cwd=tmp_path)
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert result.returncode == 0 and sum("000.png" in line and "copy.png" in line for line in warnings) == 1
    assert sum("no ground-truth mask" in line for line in warnings) == 1


# Checkpoints

class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoints_that_are_none(place, tmp_path):
    """Truncated at twenty places, with bits flipped, foreign, newer, hostile: each refused by predict and by train."""
    whole, rng = (place / "run" / "checkpoint.pt").read_bytes(), random.Random(0)
    state = torch.load(place / "run" / "checkpoint.pt", weights_only=True)
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    cases = [whole[:int(i / 20 * len(whole))] for i in range(20)]
    cases += [b"text", pickle.dumps({"format": 1}), pickle.dumps(Hostile(tmp_path / "ran"))]
    for value in ([1, 2], {}, {"format": 99}, {"format": None}, {"format": "1"}, state | {"format": ladmim.FORMAT + 1},
                  torch.zeros(3), "text", Hostile(tmp_path / "ran")):
        file = io.BytesIO()
        torch.save(value, file)
        cases.append(file.getvalue())
    for content in cases:
        (run / "checkpoint.pt").write_bytes(content)
        assert "checkpoint.pt" in one_line(command("predict", place / "photos/widgets/test/good", "--run", run))
        result = command(*TRAIN, "--out", run, cwd=place)
        assert result.returncode == 2 and len(errors_of(result)) == 1 and "Traceback" not in result.stderr
        assert (run / "checkpoint.pt").read_bytes() == content and not (tmp_path / "ran").exists()
    for _ in range(20):                              # a flipped bit may lie where nobody reads
        flipped = bytearray(whole)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        (run / "checkpoint.pt").write_bytes(bytes(flipped))
        result = command("predict", place / "photos/widgets/test/good", "--run", run)
        assert result.returncode in (0, 2) and len(errors_of(result)) == (result.returncode == 2)


# Options

PREDICT = ("predict", "photos/widgets/test/good", "--run", "run")
RENDER = ("render", "--out", "twin", "--category", "pushpins")
DISTILL = ("distill", "--images", "photos/widgets/train/good", "--out", "d.pt", "--teacher", "run/scores.csv")
WRONG = ["", "x", "-1", "nan", "inf", "1e400", "-0.5", "0x10", "1,5"]


def wrong_options():
    """Each number of `train` with what it cannot be, and each other option with what does not exist."""
    for f in ladmim.dataclasses.fields(ladmim.Config):
        option = "--" + f.name.replace("_", "-")
        if f.metadata:
            yield (*TRAIN, option, "neither")
        elif isinstance(f.default, (int, float)):
            yield from ((*TRAIN, f"{option}={value}") for value in WRONG)
    for more in (("--category", "../widgets"), ("--category", "none"), ("--category", ""), ("--data", "none"),
                 ("--preset", "huge"), ("--pdn", "none.pt"), ("--pdn", "run/scores.csv"), ("--pdn", "photos"),
                 ("--device", "cuda:7"), ("--out", "run/scores.csv"),
                 ("--seed", "x"), ("--seed", "-1"), ("--seed", "4-2"), ("--seed", "1e3"), ("--seed", "0-99999999"),
                 ("--seed", ""), ("--grid", "7"), ("--hvq-heads", "5"), ("--mim-heads", "3"), ("--mask", "checkerboard"),
                 ("--image-size", "30"), ("--train-ratio", "0.001"), ("--score-ratio", "0.001"), ("--codes", "40000"),
                 ("--target", "code"),
                 ("--wrong", "1"), ("--out", "other", "--seeds", "0-1"), ("--cache", "run/scores.csv")):
        yield (*TRAIN, *more)
    yield from (("train",), ("train", "--category"), (), ("nothing",), ("predict",), ("predict", "photos"))
    for more in (("--run", "none"), ("--run", "photos"), ("--category", "other"), ("--heatmap", "run/scores.csv"),
                 ("--heatmap", "photos/widgets/test/good"), ("--device", "x")):
        yield (*PREDICT, *more)
    for more in (("--images", "none"), ("--images", "run/scores.csv"), ("--teacher", "none"), ("--size", "large"),
                 ("--start", "none"), ("--precision", "fp8"),
                 *((f"--{name}={value}",) for name in ("steps", "batch", "crop", "lr") for value in ("x", "-1", "nan", "inf"))):
        yield (*DISTILL, *more)


@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
@pytest.mark.parametrize("arguments", list(wrong_options()), ids=lambda arguments: " ".join(arguments[-1:]) or "none")
def test_a_wrong_option_is_one_line_and_changes_nothing(place, arguments):
    before = contents(place)
    result = command(*arguments, cwd=place)
    assert result.returncode == 2 and len(errors_of(result)) == 1, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr and contents(place) == before


@pytest.mark.parametrize("main, arguments", [
    *((data.main, (*RENDER, f"--{name}={value}")) for name in ("train", "validation", "test-good", "size", "seed")
      for value in ("x", "-1", "nan")),
    (data.main, (*RENDER, "--size", "5")), (data.main, (*RENDER, "--category", "none")), (data.main, ("render",)),
    (data.main, ()), (data.main, ("render", "--out", "photos", "--category", "none")),
    *((evaluation.main, arguments) for arguments in (
        ("none",), ("--runs", "none"), ("photos",), ("--standardise", "all"), ("--json", "run/scores.csv", "run"),
        ("--maps", "run/scores.csv", "run"), ("--maps", "photos", "run"), ("--wrong",), ("run", "--json", "photos")))])
def test_wrong_options_of_the_other_commands(place, monkeypatch, capsys, main, arguments):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    before = contents(place)
    try:
        code = main(list(arguments)) if main is evaluation.main else main()
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code in (1, 2) and sum("error:" in line for line in err.splitlines()) == 1 and "Traceback" not in err, (code, err)
    after = {path: content for path, content in contents(place).items() if path.name != "eval.json"}
    assert after == {path: content for path, content in before.items() if path.name != "eval.json"}
