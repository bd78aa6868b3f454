"""bench/localise.py: pixel AUROC, AUPRO and sPRO against brute force over every threshold,
scikit-learn and scipy; and its command."""
import json
import shutil
import tracemalloc

import numpy as np
import pytest
from conftest import QUICK, command
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score, roc_curve
from test_eval import lines_of

import data
import eval as evaluation
import images
from backbone import place
from bench import localise
from bench.localise import SPRO_LIMITS, components, localisation
from data import InputError
from twin.render import COUNTS, render

EIGHT = np.ones((3, 3))


def draw(seed, photos=5, size=9, levels=6, channels=2):
    """Photos with scores that tie often; the first is good."""
    rng, drawn = np.random.default_rng(seed), []
    for i in range(photos):
        height, width = rng.integers(3, size + 1, 2)
        scores = rng.integers(0, levels, (height, width)).astype(np.float32) / 4
        masks = [rng.random((height, width)) < 0.25
                 for _ in range(rng.integers(1, channels + 1) if i else 0)]
        drawn.append((scores, [(mask, float(rng.integers(1, mask.sum() + 1)))
                               for mask in masks if mask.any()]))
    return drawn


def union(shape, channels):
    return np.logical_or.reduce([np.zeros(shape, bool), *[mask for mask, _ in channels]])


def curve_area(drawn, curves_of, limit):
    """The definition: every score and one below all are thresholds, trapezoids between them, cut at
    the limit. curves_of(scores, channels) -> [(mask, saturation area)]."""
    normal = np.concatenate([scores[~union(scores.shape, channels)] for scores, channels in drawn])
    every = np.concatenate([scores.ravel() for scores, _ in drawn]).tolist()
    points = []
    for threshold in [*sorted(set(every), reverse=True), -1.0]:
        overlaps = []
        for scores, channels in drawn:
            for mask, area in curves_of(scores, channels):
                overlaps.append(min((scores[mask] > threshold).sum() / area, 1))
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
    regions, count = ndimage.label(union(scores.shape, channels), EIGHT)
    return [(regions == i + 1, (regions == i + 1).sum()) for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 40))
def test_every_figure_equals_brute_force(seed, channels, levels):
    drawn = draw(seed, channels=channels, levels=levels)
    result = localisation(lambda: iter(drawn))
    for limit in SPRO_LIMITS:
        expected = curve_area(drawn, lambda scores, channels: channels, limit)
        assert abs(result[f"sPRO {limit:g}"] - expected) < 1e-9
    assert abs(result["AUPRO"] - curve_area(drawn, labelled, 0.3)) < 1e-9
    truth = np.concatenate([union(scores.shape, masks).ravel() for scores, masks in drawn])
    expected = roc_auc_score(truth, np.concatenate([scores.ravel() for scores, _ in drawn]))
    assert abs(result["pixel AUROC"] - expected) < 1e-9


def test_a_perfect_a_constant_and_a_reversed_map():
    mask = np.zeros((20, 20), bool)
    mask[3:8, 4:9] = True
    zeros, figures = np.zeros((20, 20), np.float32), []
    for scores in (mask, np.zeros_like(mask), -1.0 * mask):
        photos = [(scores.astype(np.float32), [(mask, 10.0)]), (zeros, [])]
        figures.append(localisation(lambda: iter(photos)))
    assert all(abs(value - 1) < 1e-12 for value in figures[0].values())
    assert figures[1]["pixel AUROC"] == 0.5
    assert abs(figures[1]["sPRO 0.05"] - 0.025) < 1e-12             # a straight line to (1, 1)
    assert all(abs(value) < 1e-12 for value in figures[2].values())


def test_a_saturated_region_needs_no_more_pixels():
    """Half of the region found with no false positive: the overlap is 1 at a saturation area of
    half, 1/2 at the whole."""
    mask, scores = np.zeros((4, 10), bool), np.full((4, 10), 0.5, np.float32)
    mask[0], scores[0, :5], scores[0, 5:] = True, 1, 0
    spro = [localisation(lambda: iter([(scores, [(mask, area)])]))["sPRO 0.3"]
            for area in (5.0, 10.0)]
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
    expected, count = ndimage.label(mask, EIGHT)
    found = components(mask)
    assert found.shape == mask.shape and np.array_equal(found > 0, mask)
    pairs = np.unique(np.stack([expected[mask], found[mask]]), axis=1)
    assert pairs.shape[1] == count                   # one number for each of scipy's regions
    assert sorted(pairs[1]) == list(range(1, count + 1))


def test_many_specks_take_little_memory():
    """One mask a region would be 1,024 MiB here."""
    mask = np.zeros((512, 512), bool)
    mask[::8, ::8] = True                            # 4,096 regions of a pixel
    scores = np.random.default_rng(0).random(mask.shape).astype(np.float32)
    tracemalloc.start()
    figures = localisation(lambda: iter([(scores, [(mask, 1.0)])]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2 ** 20
    assert figures["AUPRO"] == pytest.approx(curve_area_of_pixels(scores, mask, 0.3), abs=1e-9)


def curve_area_of_pixels(scores, mask, limit):
    """Regions of one pixel each: their overlap is the true positive rate."""
    above, found, _ = roc_curve(mask.ravel(), scores.ravel(), drop_intermediate=False)
    inside = above < limit
    at_limit = np.interp(limit, above, found)
    x, y = np.array([*above[inside], limit]), np.array([*found[inside], at_limit])
    return np.diff(x) @ (y[1:] + y[:-1]) / 2 / limit


@pytest.mark.parametrize("grid, height, width", [(12, 256, 256), (24, 224, 224), (12, 130, 310),
                                                 (24, 7, 5)])
def test_a_map_lies_where_the_backbone_looked(grid, height, width):
    """Closed form: tokens that hold their own centre's coordinate give each pixel's coordinate
    back, between the outermost centres. Position i of the backbone sees pixels 4i to 4i + 32; a
    token is the mean of 48 / grid positions."""
    each = 48 // grid
    centre = np.array([np.mean([4 * i + 16.5 for i in range(each * j, each * (j + 1))])
                       for j in range(grid)])
    across = place(np.broadcast_to(centre, (grid, grid)), 224, height, width)
    down = place(np.broadcast_to(centre[:, None], (grid, grid)), 224, height, width)
    x, y = ((np.arange(n) + 0.5) * 224 / n for n in (width, height))
    assert across.dtype == np.float32 and across.shape == (height, width)
    x, y = np.clip(x, centre[0], centre[-1]), np.clip(y, centre[0], centre[-1])[:, None]
    np.testing.assert_allclose(across, np.broadcast_to(x, across.shape), rtol=1e-5)
    np.testing.assert_allclose(down, np.broadcast_to(y, down.shape), rtol=1e-5)


# A run from end to end

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("localise")
    render(root / "twin", "juice_bottle", dict.fromkeys(COUNTS, 2) | {"train": 6}, size=96)
    result = command("train", "--data", "twin", "--category", "juice_bottle", *QUICK,
                     "--out", "runs/a", cwd=root)
    assert result.returncode == 0, result.stderr
    return root


def call(monkeypatch, capsys, root, *args):
    monkeypatch.chdir(root)
    code = localise.main([*map(str, args)])
    return code, *capsys.readouterr()


def test_the_table_and_the_maps_agree(run, monkeypatch, capsys):
    """Both maps' sum, at the photos' size, gives the figures of the table."""
    code, out, err = call(monkeypatch, capsys, run)
    assert code == 0, err
    rows = lines_of(out, "localisation")
    photos = [p for p in data.find_photos(run / "twin", "juice_bottle", 0) if p.split == "test"]
    defects = data.load_defects(run / "twin", "juice_bottle")

    def stream(kind):
        for photo in photos:
            if photo.kind in ("good", kind):
                tokens = maps[photo.path.relative_to(run / "twin").as_posix()]["sum"]
                yield place(tokens, 64, 96, 96), data.load_regions(photo, defects)

    scored = evaluation.read_run(run / "runs" / "a")
    maps = evaluation.read_maps(scored)
    mine = {(record["map"], record["kind"]): record["figures"] for record in
            localise.localise(scored, evaluation.evaluate(scored, "juice_bottle"))}
    records = json.loads((run / "runs/localise.json").read_text())["records"]
    for kind, name in evaluation.LOCO_KINDS.items():
        again = localisation(lambda: stream(kind))
        assert again == pytest.approx(mine["their sum", name], abs=1e-9)
        row = next(row for row in rows[1:] if row[5:7] == [name, "their sum"])
        assert row[7:] == [f"{100 * again[figure]:.1f}"
                           for figure in ("pixel AUROC", "AUPRO", "sPRO 0.05")]
        record, = (r for r in records if (r["map"], r["kind"]) == ("their sum", name))
        assert record["figures"] == pytest.approx(again, abs=1e-9)


def test_every_photo_and_mask_is_decoded_once(run, monkeypatch):
    scored, decoded = evaluation.read_run(run / "runs" / "a"), []
    decode = data.decode

    def counted(content, path, use):
        decoded.append(path)
        return decode(content, path, use)

    for module in (data, images):                    # each calls it by its own name
        monkeypatch.setattr(module, "decode", counted)
    localise.localise(scored, evaluation.evaluate(scored, "juice_bottle"))
    photos = [p for p in data.find_photos(run / "twin", "juice_bottle", 0) if p.split == "test"]
    assert sorted(decoded) == sorted(path for p in photos for path in (p.path, *p.masks))


@pytest.fixture
def two(run, tmp_path):
    """A folder of two runs, a copy of each with a copy of its photos."""
    for name, seed in (("a", 0), ("b", 1)):
        shutil.copytree(run / "twin", tmp_path / f"twin-{name}")
        shutil.copytree(run / "runs/a", tmp_path / "runs" / name)
        file = tmp_path / "runs" / name / "config.json"
        config = json.loads(file.read_text())
        config |= {"root": str(tmp_path / f"twin-{name}"), "seed": seed}
        file.write_text(json.dumps(config))
    return tmp_path


def without(path):
    """Takes a file or folder away."""
    path.rename(path.with_name("away"))


def other_size(category):
    file = next((category / "ground_truth/structural_anomalies").rglob("*.png"))
    with Image.open(file) as mask:
        mask.resize((48, 40), Image.Resampling.NEAREST).save(file)


def all_black(category):
    (category / "defects_config.json").unlink()      # which would refuse it for its values
    for file in (category / "ground_truth/structural_anomalies/000").glob("*.png"):
        Image.new("L", (96, 96)).save(file)


def replaced(category):
    test = category / "test"
    shutil.copy(test / "structural_anomalies/000.png", test / "good/001.png")


def holes(run):
    """A NaN among the maps' values."""
    with np.load(run / "maps.npz") as content:
        arrays = dict(content)
    arrays["maps"][2, 1, 3, 3] = np.nan
    np.savez_compressed(run / "maps.npz", **arrays)


DAMAGE = {
    "black": (lambda root: all_black(root / "twin-a/juice_bottle"),
              "structural_anomalies/000/000.png: all black"),
    "NaN": (lambda root: holes(root / "runs/a"), "missing or damaged"),
    "photos": (lambda root: without(root / "twin-a"), "no longer at"),
    "replaced": (lambda root: replaced(root / "twin-a/juice_bottle"),
                 "not those it scored: 1, such as juice_bottle/test/good/001.png"),
    "maps": (lambda root: without(root / "runs/a/maps.npz"), "missing or damaged"),
    "masks": (lambda root: without(root / "twin-a/juice_bottle/ground_truth"), "without g"),
    "good": (lambda root: without(root / "twin-a/juice_bottle/test/good"),
             "2 of the 6 test photos"),
    "test": (lambda root: without(root / "twin-a/juice_bottle/test"), "6 of the 6 test photos"),
    "size": (lambda root: other_size(root / "twin-a/juice_bottle"),
             "48 x 40 pixels, its photo 96 x 96"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_missing_costs_one_line_and_no_other_run(two, monkeypatch, capsys, damage):
    harm, says = DAMAGE[damage]
    harm(two)
    code, out, err = call(monkeypatch, capsys, two)
    assert code == 1 and err.startswith("warning: ") and says in err
    assert len(err.splitlines()) == 1
    rows = lines_of(out, "localisation %")[1:]
    assert len(rows) == 6 and {row[4] for row in rows} == {"1"}
    problems = json.loads((two / "runs/localise.json").read_text())["problems"]
    assert problems == [err.strip().removeprefix("warning: ")]


def test_seeds_are_one_row(two, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, two, "--json", "x.json")
    rows = lines_of(out, "localisation %")[1:]
    assert code == 0 and len(rows) == 6 and {row[4] for row in rows} == {"2"}
    assert all(cell.endswith("± 0.0") for row in rows for cell in row[7:])        # they are equal
    assert (two / "x.json").exists() and not (two / "runs/localise.json").exists()


@pytest.mark.parametrize("arguments, word", [
    (["none"], "no such folder"), (["--json", "runs/a/config.json"], "config.json"),
    (["--localise"], "--localise")])
def test_a_wrong_option_is_one_line(two, monkeypatch, capsys, arguments, word):
    before = sorted(two.rglob("*"))
    code, out, err = call(monkeypatch, capsys, two, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and word in err
    assert len(err.splitlines()) == 1 and sorted(two.rglob("*")) == before
