"""The rendered twin of MVTec LOCO: its layout, its ground truth, and what sets its photos apart."""
import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

import data

COUNTS = {"train": 2, "validation": 1, "good": 1, "logical_anomalies": 10, "structural_anomalies": 6}


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
    assert (root / category / data.RENDERED_MARK).exists()
    assert not [line for line in data.check_photos(photos, root) if "counts" in line]
    assert [path.name for path in root.iterdir()] == [category]                  # nothing temporary is left


def test_every_mask_holds_one_configured_value_and_every_fault_is_drawn(twin):
    root, category = twin
    config = json.loads((root / category / "defects_config.json").read_text())
    names = {entry["pixel_value"]: entry["defect_name"] for entry in config}
    assert len(names) == len(config) and all(set(entry) == {"defect_name", "pixel_value", "saturation_threshold",
                                                            "relative_saturation"} for entry in config)
    seen = set()
    for photo in data.find_photos(root, category, 0):
        for path in photo.masks:
            values = np.unique(np.asarray(Image.open(path)))
            assert len(values) == 2 and values[0] == 0
            seen.add(names[int(values[1])])
        if photo.label:
            assert all(mask.any() and area > 0 for mask, area in data.load_regions(photo, data.load_defects(root, category)))
    assert seen == set(names.values())


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
    assert contents(tmp_path / "pushpins").keys() == {(tmp_path / "pushpins" / "mine.txt").relative_to(tmp_path / "pushpins")}


def test_an_unknown_category_is_named(tmp_path):
    with pytest.raises(data.InputError, match="did you mean pushpins"):
        data.render(tmp_path, "pushpin", COUNTS)


def test_colour_counting_does_not_solve_the_arrangements():
    """A Gaussian on the colour histograms of good photos, on a draw that nothing was tuned on."""
    def histogram(split, kind, i):
        photo, _ = data.draw("breakfast_box", split, kind, i, 128, seed=11)
        return np.histogramdd(photo.reshape(-1, 3), bins=(4, 4, 4), range=((0, 256),) * 3)[0].ravel() / 128 ** 2

    fit = LedoitWolf().fit([histogram("train", "good", i) for i in range(40)])
    good, bad = ([histogram("test", kind, i) for i in range(20)] for kind in ("good", "logical_anomalies"))
    assert roc_auc_score([0] * 20 + [1] * 20, fit.mahalanobis(np.stack(good + bad))) < 0.9
