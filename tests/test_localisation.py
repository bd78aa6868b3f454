"""Localisation: pixel AUROC, AUPRO and sPRO against brute force over every threshold, scikit-learn and scipy."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from test_eval import lines_of
from test_ladmim import QUICK, command

import data
import eval as evaluation
from data import InputError
from eval import SPRO_LIMITS, components, localisation, place

EIGHT = np.ones((3, 3))


def draw(seed, photos=5, size=9, levels=6, channels=2):
    """Photos with scores that tie often; the first is good."""
    rng, found = np.random.default_rng(seed), []
    for i in range(photos):
        height, width = rng.integers(3, size + 1, 2)
        scores = rng.integers(0, levels, (height, width)).astype(np.float32) / 4
        masks = [rng.random((height, width)) < 0.25 for _ in range(rng.integers(1, channels + 1) if i else 0)]
        found.append((scores, [(mask, float(rng.integers(1, mask.sum() + 1))) for mask in masks if mask.any()]))
    return found


def curve_area(found, curves_of, limit):
    """The definition: every score and one below all are thresholds, trapezoids between them, cut at the limit.
    curves_of(scores, channels) -> [(mask, saturation area)]."""
    normal = np.concatenate([s[~np.logical_or.reduce([np.zeros(s.shape, bool), *[m for m, _ in c]])] for s, c in found])
    points = []
    for threshold in [*sorted({float(v) for s, _ in found for v in s.ravel()}, reverse=True), -1.0]:
        overlaps = [min((s[mask] > threshold).sum() / area, 1) for s, c in found for mask, area in curves_of(s, c)]
        points.append(((normal > threshold).mean(), np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0) if x1 > x0 else y0
            x1 = max(limit, x0)
        if x0 < limit:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def labelled(scores, channels):
    union = np.logical_or.reduce([np.zeros(scores.shape, bool), *[mask for mask, _ in channels]])
    regions, count = ndimage.label(union, EIGHT)
    return [(regions == i + 1, (regions == i + 1).sum()) for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 40))
def test_every_figure_equals_brute_force(seed, channels, levels):
    found = draw(seed, channels=channels, levels=levels)
    result = localisation(lambda: iter(found))
    for limit in SPRO_LIMITS:
        assert abs(result[f"sPRO {limit:g}"] - curve_area(found, lambda s, c: c, limit)) < 1e-9
    assert abs(result["AUPRO"] - curve_area(found, labelled, 0.3)) < 1e-9
    truth = np.concatenate([np.logical_or.reduce([np.zeros(s.shape, bool), *[m for m, _ in c]]).ravel() for s, c in found])
    assert abs(result["pixel AUROC"] - roc_auc_score(truth, np.concatenate([s.ravel() for s, _ in found]))) < 1e-9


def test_a_perfect_a_constant_and_a_reversed_map():
    mask = np.zeros((20, 20), bool)
    mask[3:8, 4:9] = True
    figures = [localisation(lambda s=s: iter([(s.astype(np.float32), [(mask, 10.0)]), (np.zeros((20, 20), np.float32), [])]))
               for s in (mask, np.zeros_like(mask), -1.0 * mask)]
    assert all(abs(value - 1) < 1e-12 for value in figures[0].values())
    assert figures[1]["pixel AUROC"] == 0.5 and abs(figures[1]["sPRO 0.05"] - 0.025) < 1e-12       # a straight line to (1, 1)
    assert all(abs(value) < 1e-12 for value in figures[2].values())


def test_a_saturated_region_needs_no_more_pixels():
    """Half of the region found with no false positive: the overlap is 1 at a saturation area of half, 1/2 at the whole."""
    mask, scores = np.zeros((4, 10), bool), np.full((4, 10), 0.5, np.float32)
    mask[0], scores[0, :5], scores[0, 5:] = True, 1, 0
    spro = [localisation(lambda a=a: iter([(scores, [(mask, a)])]))["sPRO 0.3"] for a in (5.0, 10.0)]
    assert abs(spro[0] - 1) < 1e-12 and abs(spro[1] - 0.5) < 1e-12


def test_without_defects_or_without_normal_pixels_there_is_no_figure():
    flat = np.zeros((3, 3), np.float32)
    with pytest.raises(InputError, match="ground-truth masks"):
        localisation(lambda: iter([(flat, [])]))
    with pytest.raises(InputError, match="defect-free"):
        localisation(lambda: iter([(flat, [(flat == 0, 9.0)])]))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 10**6))
def test_components_equal_scipys(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    labels, count = ndimage.label(mask, EIGHT)
    expected = {(labels == i + 1).tobytes() for i in range(count)}
    assert {part.tobytes() for part in components(mask)} == expected and len(components(mask)) == count


@pytest.mark.parametrize("grid, height, width", [(12, 256, 256), (24, 224, 224), (12, 130, 310), (24, 7, 5)])
def test_a_map_lies_where_the_backbone_looked(grid, height, width):
    """Closed form: tokens that hold their own centre's coordinate give each pixel's coordinate back, between the
    outermost centres. Position i of the backbone sees pixels 4i to 4i + 32; a token is the mean of 48 / grid positions."""
    each = 48 // grid
    centre = np.array([np.mean([4 * i + 16.5 for i in range(each * j, each * (j + 1))]) for j in range(grid)])
    across = place(np.broadcast_to(centre, (grid, grid)), 224, height, width)
    down = place(np.broadcast_to(centre[:, None], (grid, grid)), 224, height, width)
    x, y = ((np.arange(n) + 0.5) * 224 / n for n in (width, height))
    assert across.dtype == np.float32 and across.shape == (height, width)
    np.testing.assert_allclose(across, np.broadcast_to(np.clip(x, centre[0], centre[-1]), across.shape), rtol=1e-5)
    np.testing.assert_allclose(down, np.broadcast_to(np.clip(y, centre[0], centre[-1])[:, None], down.shape), rtol=1e-5)


# A run from end to end

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("localise")
    data.render(root / "twin", "juice_bottle", dict.fromkeys(data.COUNTS, 2) | {"train": 6}, size=96)
    result = command("train", "--data", "twin", "--category", "juice_bottle", *QUICK, "--out", "runs/a", cwd=root)
    assert result.returncode == 0, result.stderr
    return root


def evaluate(monkeypatch, capsys, root, *args):
    monkeypatch.chdir(root)
    code = evaluation.main([*map(str, args)])
    return code, *capsys.readouterr()


def test_the_table_and_the_tiffs_agree(run, monkeypatch, capsys):
    """What MVTec's scripts would read from the TIFFs gives the figures of the table."""
    code, out, err = evaluate(monkeypatch, capsys, run, "--localise", "--maps", "maps")
    assert code == 0, err
    rows = lines_of(out, "localisation")
    photos = [p for p in data.find_photos(run / "twin", "juice_bottle", 0) if p.split == "test"]
    defects = data.load_defects(run / "twin", "juice_bottle")

    def stream(kind):
        for photo in photos:
            if photo.kind in ("good", kind):
                with Image.open(run / "maps" / "juice_bottle" / "test" / photo.kind / f"{photo.path.stem}.tiff") as tiff:
                    assert tiff.mode == "F" and tiff.size == (96, 96)
                    yield np.asarray(tiff), data.load_regions(photo, defects)

    mine = evaluation.localise(evaluation.read_run(run / "runs" / "a"), "juice_bottle")["sum"]
    for kind, name in evaluation.LOCO_KINDS.items():
        again = localisation(lambda kind=kind: stream(kind))
        assert all(abs(again[figure] - value) < 1e-9 for figure, value in mine[name].items())
        row = next(row for row in rows[1:] if row[5:7] == [name, "their sum"])
        assert row[7:] == [f"{100 * again[figure]:.1f}" for figure in ("pixel AUROC", "AUPRO", "sPRO 0.05")]


@pytest.mark.parametrize("damage, says", [("photos", "no longer at"), ("maps", "missing or damaged"),
                                          ("masks", "without g"), ("good", "2 of the 6 test photos"),
                                          ("test", "6 of the 6 test photos")])
def test_what_is_missing_is_one_line(run, monkeypatch, capsys, damage, says, tmp_path):
    category = run / "twin/juice_bottle"
    target = {"photos": run / "twin", "maps": run / "runs/a/maps.npz", "masks": category / "ground_truth",
              "good": category / "test/good", "test": category / "test"}[damage]
    target.rename(tmp_path / "away")
    try:
        code, out, err = evaluate(monkeypatch, capsys, run, "--localise")
    finally:
        (tmp_path / "away").rename(target)
    assert code == 1 and says in err and len(err.splitlines()) == 1 and "AUROC %" in out


def test_a_mask_of_another_size_than_its_photo_is_named(run, monkeypatch, capsys):
    file = next((run / "twin/juice_bottle/ground_truth/structural_anomalies").rglob("*.png"))
    before = file.read_bytes()
    with Image.open(file) as mask:
        mask.resize((48, 40), Image.Resampling.NEAREST).save(file)
    code, out, err = evaluate(monkeypatch, capsys, run, "--localise")
    file.write_bytes(before)
    assert code == 1 and "48 x 40 pixels, its photo 96 x 96" in err and len(err.splitlines()) == 1 and "AUROC %" in out


def test_two_runs_of_a_category_cannot_share_a_folder_of_maps(run, monkeypatch, capsys):
    again = command("train", "--data", "twin", "--category", "juice_bottle", *QUICK, "--seed", "1", "--out", "runs/b", cwd=run)
    assert again.returncode == 0
    code, _, err = evaluate(monkeypatch, capsys, run, "--maps", "other")
    assert code == 2 and "two runs of juice_bottle" in err
