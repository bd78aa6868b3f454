"""The rendered twin of MVTec LOCO: its layout, its ground truth, and what sets its photos apart."""
import hashlib
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

import data

COUNTS = {"train": 2, "validation": 1, "test_good": 1, "test_logical": 10, "test_structural": 6}


@pytest.fixture(scope="module", params=data.SCENES)
def twin(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("twin")
    data.render(root, request.param, COUNTS, size=96, seed=3)
    return root, request.param


def contents(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_layout_is_that_of_mvtec_loco(twin):
    root, category = twin
    photos = data.find_photos(root, category, 0)
    found = {}
    for photo in photos:
        found[photo.split, photo.kind] = found.get((photo.split, photo.kind), 0) + 1
        assert data.open_image(photo.path).size == (96, 96)
        assert bool(photo.masks) == bool(photo.label)
    assert found == {("train", "good"): 2, ("validation", "good"): 1, ("test", "good"): 1,
                     ("test", "logical_anomalies"): 10, ("test", "structural_anomalies"): 6}
    mark = json.loads((root / category / data.RENDERED_MARK).read_text())
    assert mark["seed"] == 3 and mark["size"] == 96 and "not photographed" in mark["note"]
    assert data.check_photos(photos, root) == []                                # no word on other counts than LOCO's
    assert {path.name for path in (root / category).iterdir()} == {
        "train", "validation", "test", "ground_truth", "defects_config.json", data.RENDERED_MARK}
    for kind, n in (("logical_anomalies", 10), ("structural_anomalies", 6)):
        names = [f"{i:03}" for i in range(n)]
        assert sorted(path.name for path in (root / category / "ground_truth" / kind).iterdir()) == names
        assert sorted(path.stem for path in (root / category / "test" / kind).iterdir()) == names
    assert [path.name for path in root.iterdir()] == [category]                  # nothing temporary is left


def test_every_mask_holds_one_configured_value_and_every_fault_is_drawn(twin):
    root, category = twin
    config = json.loads((root / category / "defects_config.json").read_text())
    names = {entry["pixel_value"]: entry["defect_name"] for entry in config}
    assert len(names) == len(config) and all(set(entry) == {"defect_name", "pixel_value", "saturation_threshold",
                                                            "relative_saturation"} for entry in config)
    seen, defects = {}, data.load_defects(root, category)
    for photo in data.find_photos(root, category, 0):
        of_photo = set()
        for path in photo.masks:
            mask = Image.open(path)
            values = np.unique(np.asarray(mask))
            assert mask.mode == "L" and mask.size == (96, 96) and len(values) == 2 and values[0] == 0
            of_photo.add(names[int(values[1])])
        assert len(of_photo) == photo.label                                      # one fault, however many regions
        seen.update(dict.fromkeys(of_photo, photo.kind))
        assert all(mask.any() and area > 0 for mask, area in data.load_regions(photo, defects))
    assert seen.keys() == set(names.values())
    for entry in config:                             # a structural fault counts whole, a logical one to its threshold
        whole = entry["relative_saturation"] and entry["saturation_threshold"] == 1
        assert whole == (seen[entry["defect_name"]] == "structural_anomalies")


def test_a_threshold_in_pixels_grows_with_the_photo(tmp_path):
    found = {}
    for size in (64, 128):
        data.render(tmp_path / str(size), "juice_bottle", dict.fromkeys(COUNTS, 0) | {"train": 2}, size)
        config = json.loads((tmp_path / str(size) / "juice_bottle/defects_config.json").read_text())
        found[size] = {entry["defect_name"]: entry["saturation_threshold"] for entry in config}
        assert sum(not entry["relative_saturation"] for entry in config) == 1
    assert found[64].pop("two_icons") == 720 // 16 and found[128].pop("two_icons") == 720 // 4
    assert found[64] == found[128] and set(found[64].values()) == {0.5, 1.0}


@pytest.mark.parametrize("category, fault", [
    ("breakfast_box", "stain"), ("juice_bottle", "damaged_cap"), ("pushpins", "wrong_colour"),
    ("screw_bag", "stained_bag"), ("splicing_connectors", "stain")])
def test_a_fault_changes_the_canvas_there_and_nowhere_else(category, fault):
    """On a draw where the fault takes no random number that a later part of the good photo would get."""
    good, bad = (data.Scene(np.random.default_rng(5), 192) for _ in range(2))
    data.SCENES[category](good)
    data.SCENES[category](bad, fault)
    assert good.regions == [] and len(bad.regions) == 1
    region, reach = np.asarray(bad.regions[0]) > 0, np.asarray(bad.regions[0].filter(ImageFilter.MaxFilter(7))) > 0
    changed = np.abs(good.photo - bad.photo).max(-1) > 0.02
    assert not (changed & ~reach).any() and (changed & region).sum() > 0.8 * region.sum()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    few = dict.fromkeys(COUNTS, 1) | {"train": 3}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        data.render(tmp_path / name, "pushpins", few, size=96, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a.keys() >= {path for path in c if path.parts[1] == "train"}
    assert all(a[path] != c[path] for path in c if path.parts[1] == "train" and path.suffix == ".png")


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "pushpins").mkdir()
    (tmp_path / "pushpins" / "mine.txt").write_text("keep")
    with pytest.raises(data.InputError, match="exists already"):
        data.render(tmp_path, "pushpins", COUNTS, size=96)
    assert [path.name for path in tmp_path.rglob("*")] == ["pushpins", "mine.txt"]


def test_an_unknown_category_is_named(tmp_path):
    with pytest.raises(data.InputError, match="did you mean pushpins"):
        data.render(tmp_path, "pushpin", COUNTS)


def test_colour_counting_does_not_solve_the_arrangements():
    """A Gaussian on the colour histograms of good photos, on a draw that nothing was tuned on."""
    def histogram(kind, i):
        photo, *_ = data.draw("breakfast_box", kind, i, 128, seed=11)
        return np.histogramdd(photo.reshape(-1, 3), bins=(4, 4, 4), range=((0, 256),) * 3)[0].ravel() / 128 ** 2

    fit = LedoitWolf().fit([histogram("train", i) for i in range(40)])
    good, bad = ([histogram(kind, i) for i in range(20)] for kind in ("test_good", "test_logical"))
    assert roc_auc_score([0] * 20 + [1] * 20, fit.mahalanobis(np.stack(good + bad))) < 0.9
