"""The rendered twin of MVTec LOCO: its layout, its ground truth, and what sets its photos apart."""
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

import data
from twin import drawing, render

COUNTS = {"train": 2, "validation": 1, "test_good": 1, "test_logical": 10, "test_structural": 6}


@pytest.fixture(scope="module", params=render.SCENES)
def twin(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("twin")
    render.render(root, request.param, COUNTS, size=96, seed=3)
    return root, request.param


def contents(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_layout_is_that_of_mvtec_loco(twin):
    root, category = twin
    photos = data.find_photos(root, category, 0)
    counts = Counter()
    for photo in photos:
        counts[photo.split, photo.kind] += 1
        assert data.open_image(photo.path).size == (96, 96)
        assert bool(photo.masks) == bool(photo.label)
    assert counts == {("train", "good"): 2, ("validation", "good"): 1, ("test", "good"): 1,
                      ("test", "logical_anomalies"): 10, ("test", "structural_anomalies"): 6}
    mark = json.loads((root / category / render.RENDERED_MARK).read_text())
    assert mark["seed"] == 3 and mark["size"] == 96 and "not photographed" in mark["note"]
    assert data.RENDERED_MARK == render.RENDERED_MARK
    assert data.check_photos(photos, root) == []         # no word on other counts than LOCO's
    assert {path.name for path in (root / category).iterdir()} == {
        "train", "validation", "test", "ground_truth", "defects_config.json", render.RENDERED_MARK}
    for kind, n in (("logical_anomalies", 10), ("structural_anomalies", 6)):
        names = [f"{i:03}" for i in range(n)]
        masks, tested = root / category / "ground_truth" / kind, root / category / "test" / kind
        assert sorted(path.name for path in masks.iterdir()) == names
        assert sorted(path.stem for path in tested.iterdir()) == names
    assert [path.name for path in root.iterdir()] == [category]      # nothing temporary is left


def test_every_mask_holds_one_configured_value_and_every_fault_is_drawn(twin):
    root, category = twin
    config = json.loads((root / category / "defects_config.json").read_text())
    names = {entry["pixel_value"]: entry["defect_name"] for entry in config}
    keys = {"defect_name", "pixel_value", "saturation_threshold", "relative_saturation"}
    assert len(names) == len(config) and all(set(entry) == keys for entry in config)
    seen, defects = {}, data.load_defects(root, category)
    for photo in data.find_photos(root, category, 0):
        of_photo = set()
        for path in photo.masks:
            mask = Image.open(path)
            values = np.unique(np.asarray(mask))
            assert mask.mode == "L" and mask.size == (96, 96)
            assert len(values) == 2 and values[0] == 0
            of_photo.add(names[int(values[1])])
        assert len(of_photo) == photo.label              # one fault, however many regions
        seen.update(dict.fromkeys(of_photo, photo.kind))
        assert all(mask.any() and area > 0 for mask, area in data.load_regions(photo, defects))
    assert seen.keys() == set(names.values())
    for entry in config:     # a structural fault counts whole, a logical one to its threshold
        whole = entry["relative_saturation"] and entry["saturation_threshold"] == 1
        assert whole == (seen[entry["defect_name"]] == "structural_anomalies")


def test_a_threshold_in_pixels_grows_with_the_photo(tmp_path):
    counts, thresholds = dict.fromkeys(COUNTS, 0) | {"train": 2}, {}
    for size in (64, 128):
        render.render(tmp_path / str(size), "juice_bottle", counts, size)
        config = json.loads((tmp_path / str(size) / "juice_bottle/defects_config.json").read_text())
        thresholds[size] = {entry["defect_name"]: entry["saturation_threshold"] for entry in config}
        assert sum(not entry["relative_saturation"] for entry in config) == 1
    small, large = thresholds[64], thresholds[128]
    assert small.pop("two_icons") == 720 // 16 and large.pop("two_icons") == 720 // 4
    assert small == large and set(small.values()) == {0.5, 1.0}


@pytest.mark.parametrize("category, fault, seed", [
    ("breakfast_box", "stain", 5), ("juice_bottle", "damaged_cap", 5),
    ("pushpins", "wrong_colour", 6), ("screw_bag", "stained_bag", 5),
    ("splicing_connectors", "stain", 5)])
def test_a_fault_changes_the_canvas_there_and_nowhere_else(category, fault, seed):
    """On a draw where the fault takes no random number that the good photo would get later."""
    good, bad = (drawing.Scene(np.random.default_rng(seed), 192) for _ in range(2))
    render.SCENES[category].paint(good)
    render.SCENES[category].paint(bad, fault)
    assert good.regions == [] and len(bad.regions) == 1
    region = np.asarray(bad.regions[0]) > 0
    reach = np.asarray(bad.regions[0].filter(ImageFilter.MaxFilter(7))) > 0
    changed = np.abs(good.photo - bad.photo).max(0) > 0.02
    assert not (changed & ~reach).any() and (changed & region).sum() > 0.8 * region.sum()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    few = dict.fromkeys(COUNTS, 1) | {"train": 3}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        render.render(tmp_path / name, "pushpins", few, size=96, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a.keys() >= {path for path in c if path.parts[1] == "train"}
    photos = [path for path in c if path.parts[1] == "train" and path.suffix == ".png"]
    assert len(photos) == 3 and all(a[path] != c[path] for path in photos)


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "pushpins").mkdir()
    (tmp_path / "pushpins" / "mine.txt").write_text("keep")
    with pytest.raises(OSError, match="exists already"):
        render.render(tmp_path, "pushpins", COUNTS, size=96)
    assert [path.name for path in tmp_path.rglob("*")] == ["pushpins", "mine.txt"]


def test_what_another_process_has_drawn_meanwhile_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def slower(root, name):
        (root / name / "train").mkdir(parents=True)
        render.render(root, name)                    # finds the other one's folder

    monkeypatch.setattr(data, "render", slower)
    assert data.find_data(None, "pushpins") == (Path("data/rendered"), ["pushpins"])


def test_an_unknown_category_is_named(tmp_path):
    with pytest.raises(ValueError, match="did you mean pushpins"):
        render.render(tmp_path, "pushpin", COUNTS)


def test_colour_counting_does_not_solve_the_arrangements():
    """A Gaussian on the colour histograms of good photos, on a draw that nothing was tuned on."""
    def histogram(kind, i):
        photo, *_ = render.draw("breakfast_box", kind, i, 128, seed=11)
        pixels, limits = photo.reshape(-1, 3), ((0, 256),) * 3
        return np.histogramdd(pixels, bins=(4, 4, 4), range=limits)[0].ravel() / 128 ** 2

    fit = LedoitWolf().fit([histogram("train", i) for i in range(40)])
    good = [histogram("test_good", i) for i in range(20)]
    bad = [histogram("test_logical", i) for i in range(20)]
    assert roc_auc_score([0] * 20 + [1] * 20, fit.mahalanobis(np.stack(good + bad))) < 0.9


# Command line

@pytest.mark.parametrize("arguments, words", [
    (["--category", "juice_botle"], ("--category juice_botle", "did you mean juice_bottle?")),
    (["--category", "a\nb"], ("--category a\\nb",)),
    (["--train", "1"], ("--train must be at least 2",)),
    (["--train", "x"], ("argument --train: invalid int value: 'x' (see twin/render.py --help)",)),
    (["--test-logical", "-1"], ("the other counts 0",)),
    (["--size", "8"], ("--size 64",)),
])
def test_render_refuses_in_one_line(tmp_path, capsys, arguments, words):
    assert render.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out, reason", [
    ("drawn", "it exists already"), ("a\nb\udcff", "it exists already"),
    ("drawn/pushpins", "File exists"), ("drawn/pushpins/deeper", "Not a directory")])
def test_what_is_in_the_way_is_named_in_one_line(tmp_path, capsys, monkeypatch, out, reason):
    monkeypatch.chdir(tmp_path)
    for folder in ("drawn", "a\nb\udcff"):
        Path(folder).mkdir()
        Path(folder, "pushpins").touch()
    assert render.main(["--out", out, "--category", "pushpins"]) == 2
    name = out.replace("\n", "\\n").replace("\udcff", "\\udcff")
    assert capsys.readouterr().err == (
        f"error: {name}/pushpins cannot be drawn: {reason}; name another folder\n")


def test_data_turns_a_failure_into_one_line_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").touch()
    for category, words in (("pushpin", "did you mean pushpins"), ("pushpins", "cannot be drawn")):
        with pytest.raises(data.InputError, match=f"{words}.* with --data"):
            data.find_data(None, category)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    counts = ["--train=2", "--validation=0", "--test-good=0", "--test-logical=0",
              "--test-structural=0"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, render.__file__, "--out", tmp_path, "--size=64",
                               "--category=pushpins", *counts], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == (
        "error: standard output: cannot be written (No space left on device)\n")


def test_a_failed_process_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(render, "ROOT", tmp_path)            # the processes find no package twin
    assert render.main(["--out", ".", "--category", "pushpins"]) == 2
    assert capsys.readouterr().err == (
        "error: pushpins cannot be drawn: ModuleNotFoundError: No module named 'twin'; "
        "name another folder\n")
    assert not list(tmp_path.iterdir())


def test_a_stop_leaves_nothing_unfinished(tmp_path, capsys, monkeypatch):
    def stop(*work):
        raise KeyboardInterrupt

    monkeypatch.setattr(render, "draw_all", stop)
    assert render.main(["--out", str(tmp_path), "--category", "pushpins"]) == 130
    assert capsys.readouterr().err == "\nstopped; nothing unfinished was left behind\n"
    assert not list(tmp_path.iterdir())


def test_the_command_runs_from_any_folder_and_counts(tmp_path):
    script = Path(render.__file__)
    counts = ["--train=2", "--validation=1", "--test-good=0", "--test-logical=1",
              "--test-structural=1"]
    done = subprocess.run([sys.executable, script, "--out", "twin", "--category", "screw_bag",
                           "--size=64", *counts], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("screw_bag: train 2, validation 1, test_good 0, test_logical 1, "
                           "test_structural 1\n")
    assert len(data.find_photos(tmp_path / "twin", "screw_bag", 0)) == 5
