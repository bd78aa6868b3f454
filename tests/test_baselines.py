"""bench/baselines.py: PatchCore against a plain loop, and beside a run."""
import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, command
from sklearn.neighbors import NearestNeighbors

import data
import eval as evaluation
import ladmim
import runs
from bench import baselines, patchcore
from twin.render import COUNTS, render


def test_patchcore_against_a_plain_loop():
    """With the whole memory, where the coreset leaves nothing out: nearest neighbours by
    scikit-learn."""
    rng = np.random.default_rng(0)
    h0 = torch.from_numpy(rng.normal(size=(9, 16, 24))).float()
    scores, *_ = patchcore.patchcore(lambda index: h0[index], torch.arange(5), torch.arange(5, 9),
                                     share=1.0)
    square = h0.view(9, 4, 4, 24).numpy()
    seen = np.empty((9, 4, 4, 24))
    for b, i, j in np.ndindex(9, 4, 4):
        around = square[b, max(0, i - 1):i + 2, max(0, j - 1):j + 2]
        seen[b, i, j] = around.mean((0, 1))
    seen = seen.reshape(9, 16, 24)
    bank = seen[:5].reshape(-1, 24)
    search = NearestNeighbors(n_neighbors=9).fit(bank)
    for b, value in zip((5, 6, 7, 8), scores):
        distance, at = search.kneighbors(seen[b], 1)
        worst = distance[:, 0].argmax()
        near = bank[search.kneighbors(bank[at[worst]], 9)[1][0]]
        others = np.linalg.norm(near - seen[b, worst], axis=1)
        weight = 1 - np.exp(distance[worst, 0]) / np.exp(others).sum()
        assert value == pytest.approx(distance[worst, 0] * weight, rel=1e-4)


def test_the_coreset_covers_the_memory_better_than_chance():
    """Two far-apart clusters, one of them rare: a tenth chosen greedily holds both."""
    h0 = torch.randn(4, 25, 8, generator=torch.Generator().manual_seed(0))
    h0[3, 12] += 100
    scores, *_ = patchcore.patchcore(lambda index: h0[index], torch.arange(4), torch.tensor([3]))
    assert scores[0] < 5


def patchcore_of(run, folder):
    """AUROCs of PatchCore on the run's photos, each looked at anew."""
    detector = ladmim.load_detector(run, None, torch.device("cpu"))
    photos = [photo for photo in data.find_photos(folder, "juice_bottle", 0)
              if photo.split != "validation"]
    photos.sort(key=lambda photo: photo.split == "test")
    images = data.load_images([photo.path for photo in photos], detector.cfg.image_size)
    h0, *_ = detector.look(np.stack(list(images)))
    count = sum(photo.split == "train" for photo in photos)
    scores, *_ = patchcore.patchcore(lambda index: h0[index], torch.arange(count),
                                     torch.arange(count, len(h0)))
    return evaluation.aurocs(np.array([photo.kind for photo in photos[count:]]), scores)


def test_baselines_beside_a_run(tmp_path, monkeypatch, capsys):
    """Two seeds, and a third run whose photos are gone: it costs a line."""
    render(tmp_path / "twin", "juice_bottle", {**dict.fromkeys(COUNTS, 5), "train": 8}, 64, 4)
    for seed in (0, 1):
        command("train", "--data", "twin", "--category", "juice_bottle", *QUICK, "--seed", seed,
                "--out", f"runs/seed{seed}", cwd=tmp_path)
    shutil.copytree(tmp_path / "runs/seed0", tmp_path / "runs/seed2")
    config = json.loads((tmp_path / "runs/seed2/config.json").read_text())
    config |= {"seed": 2, "root": "gone"}
    (tmp_path / "runs/seed2/config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert baselines.main(["--methods", "patchcore"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: ") and "gone" in lines[0]
    result = json.loads(open("runs/baselines.json").read())
    ours = [evaluation.evaluate(evaluation.read_run(tmp_path / f"runs/seed{seed}"),
                                "juice_bottle")["both"] for seed in (0, 1)]
    theirs = patchcore_of(tmp_path / "runs/seed0", tmp_path / "twin")
    records = result["records"]
    assert [r["both"] for r in records if r["system"] == "LADMIM"] == ours
    assert [r["both"] for r in records if r["system"] == "PatchCore"] == [theirs, theirs]
    assert ours[0] != ours[1] != theirs
    for record in records:
        assert record["train"] > 0 and record["image"] > 0
    (one, *of_ours), (other, *of_theirs) = result["tables"][0]["rows"]
    assert (one, other) == ("LADMIM", "PatchCore")
    for i, column in enumerate(("logical", "structural", "average")):
        assert of_ours[i]["mean"] == np.mean([figures[column] for figures in ours])
        assert of_theirs[i]["mean"] == theirs[column]


SMALL = dict(image_size=64, grid=4, codes=8, code_dim=8, hvq_width=32, hvq_heads=2, mim_width=32,
             mim_heads=2, mim_blocks=2, masks=4, hvq_epochs=2, mim_epochs=2, codebook="ema",
             hvq_batch=4)
SYSTEMS = ["LADMIM", "PatchCore", "PatchCore, single patches", "SMAE", "SMAE + HVQ", "MAEDAY",
           "MAEDAY + HVQ", "EfficientAD-S", "PUAD"]


@pytest.fixture(scope="module")
def rivals(tmp_path_factory):
    """A folder where all rivals stand beside each category alone and one model of both, and the
    arguments that made it."""
    folder = tmp_path_factory.mktemp("rivals")
    for name in ("juice_bottle", "pushpins"):
        render(folder / "twin", name, {**dict.fromkeys(COUNTS, 4), "train": 6}, 64, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(ladmim.PRESETS, "tiny", SMALL)
        patch.setattr(baselines.masked, "MASKS", 3)
        arguments = ["--data", "twin", "--category", "all", "--multi", "--steps", "3"]
        assert baselines.main(arguments) == 0
    return folder, arguments


@pytest.fixture
def beside(rivals, tmp_path, monkeypatch):
    """A copy of it, that may be changed."""
    shutil.copytree(rivals[0] / "runs", tmp_path / "runs")
    for name in ("twin", "cache"):
        (tmp_path / name).symlink_to(rivals[0] / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ladmim.PRESETS, "tiny", SMALL)
    monkeypatch.setattr(baselines.masked, "MASKS", 3)
    return rivals[1]


def test_every_rival_has_a_row_and_its_costs(beside):
    result = json.loads(open("runs/baselines.json").read())
    assert list(dict.fromkeys(record["system"] for record in result["records"])) == SYSTEMS
    for record in result["records"]:
        combined = record["system"].endswith("HVQ")
        assert all((record[cost] is None) == combined for cost in ("train", "image", "megabytes"))
        trains = record["system"] in ("SMAE", "MAEDAY", "EfficientAD-S", "PUAD")
        assert record["steps"] == (3 if trains else None)
        if record["system"] == "LADMIM" and record["trained on"] == "each alone":
            with open(f"runs/twin/{record['category']}-tiny-seed0/metrics.jsonl") as file:
                lines = [json.loads(line) for line in file]
            both = [one["seconds"] for one in lines if one["stage"] in ("hvq", "mim")]
            assert len(both) == 4 and record["train"] == pytest.approx(sum(both))
    titles = [table["title"] for table in result["tables"]]
    assert sum("AUROC % over the steps" in title for title in titles) == 2
    assert sum(title.startswith("REFERENCE ONLY") for title in titles) == 2
    assert all("rivals trained in fp32" in title for title in titles if "each alone" in title
               and "steps" not in title and "REFERENCE" not in title)
    multi = result["tables"][-1]
    assert multi["header"][2:5] == ["each alone", "one model", "Δ_multi"]
    assert [row[0] for row in multi["rows"]] == [s for s in SYSTEMS for _ in range(3)]
    for system, column, alone, together, delta, paper in multi["rows"]:
        assert paper == (column == "average" and {"LADMIM": "+0.4", "PUAD": "-4.9",
                                                  "EfficientAD-S": "-6.1"}.get(system) or None)
        means = [np.mean([r["both"][column] for r in result["records"] if r["system"] == system
                          and (r["trained on"] == "each alone") == one]) for one in (True, False)]
        assert [alone["mean"], together["mean"]] == pytest.approx(means)
        assert float(delta) == pytest.approx(100 * (means[1] - means[0]), abs=0.051)


def test_delta_multi_mixes_no_models_photos_or_commits():
    """Each model of several categories against the runs alone of its own data, commit and seed."""
    def record(trained_on, category, auroc, **other):
        return {"system": "LADMIM", "category": category, "seed": 0, "columns": ("any",),
                "data": "d", "rendered": False, "preset": "tiny", "commit": "1",
                "trained on": trained_on, "both": {"any": auroc}} | other

    alone = [record("each alone", name, auroc) for name, auroc in (("a", 0.9), ("b", 0.7))]
    wholes = [record("a,b,c", "a", 0.6), record("a,b,c", "b", 0.6), record("a,b", "a", 0.8),
              record("a,b", "b", 0.8)]
    others = [record("each alone", "a", 0.1, rendered=True), record("a,b", "a", 0.3, rendered=True),
              record("each alone", "b", 0.2, commit="2")]
    tables = {title: rows for title, _, rows in baselines.multi_table(alone + wholes + others)}
    assert {title: rows[0][4] for title, rows in tables.items()} == {
        "d: one model of a,b, AUROC %": "+0.0", "d: one model of a,b,c, AUROC %": "-20.0",
        "d (rendered twin, not MVTec's photos): one model of a,b, AUROC %": "+20.0"}


def test_what_is_kept_is_of_one_size_and_grid(beside, capsys):
    """A run that was trained again at the same place has other tokens."""
    run = Path("runs/twin/pushpins-tiny-seed0")
    (run / "checkpoint.pt").unlink()
    shutil.rmtree(run / "rivals")
    one, other = (["train", "--data", "twin", "--category", "pushpins", *map(str, QUICK), "--grid",
                   grid, "--out", str(run)] for grid in ("4", "8"))
    for arguments, exit_code in ((one, 0), (other, 1)):
        assert ladmim.main(arguments) == 0
        assert baselines.main([str(run), "--methods", "patchcore"]) == exit_code
        (run / "checkpoint.pt").unlink()
    assert "ladmim.json" in capsys.readouterr().err.splitlines()[-1]


def test_a_photo_that_cannot_be_read_is_no_exit_code_0(beside, tmp_path, capsys):
    shutil.copytree(Path("twin/pushpins").resolve(), tmp_path / "broken/pushpins")
    (tmp_path / "broken/pushpins/test/good/000.png").write_text("no photo")
    assert baselines.main(["--data", "broken", "--category", "pushpins", "--methods",
                           "patchcore"]) == 2
    warning, error = [line for line in capsys.readouterr().err.splitlines()
                      if line.startswith(("warning", "error"))]
    assert "000.png" in warning and "some photos cannot be read" in error


def test_what_is_finished_is_not_done_again(beside, monkeypatch, capsys):
    """With one method's file gone, that one alone is done again, and finds the same."""
    before = json.loads(open("runs/baselines.json").read())
    for method in set(baselines.METHODS) - {"smae"}:
        monkeypatch.setitem(baselines.METHODS, method, None)
    file = next(Path("runs").rglob("rivals/smae.json"))
    file.unlink()
    assert baselines.main(beside) == 0
    after = json.loads(open("runs/baselines.json").read())
    assert [r["both"] for r in after["records"]] == [r["both"] for r in before["records"]]
    assert "features:" not in capsys.readouterr().err and not list(Path("runs").rglob("*.pt.part"))
    assert not list(Path("runs").rglob("rivals/*.pt"))


def test_scores_join_hvqs_by_the_categorys_validation_normals(beside):
    """Against a plain loop over the kept files and scores.csv, in the run of both categories."""
    folder = Path("runs/twin/all-tiny-seed0")
    kept, scored = json.loads((folder / "rivals/maeday.json").read_text()), {}
    for row in csv.DictReader((folder / "scores.csv").open()):
        scored[row["path"]] = row
    paths = list(kept["about"]["tested"])
    mine = dict(zip(paths, kept["scores"]["MAEDAY"]))
    result = json.loads(open("runs/baselines.json").read())
    for name in ("juice_bottle", "pushpins"):
        these = [path for path in paths if path.startswith(name)]
        total = np.zeros(len(these))
        normals = [scored[path]["split"] == "validation" for path in these]
        for values in ([mine[path] for path in these],
                       [float(scored[path]["s_hvq"]) for path in these]):
            values = np.array(values)
            total += ((values - values[normals].mean())
                      / max(values[normals].std(), 0.01 * abs(values[normals].mean())))
        test = ~np.array(normals)
        kinds = np.array([scored[path]["kind"] for path in these])[test]
        record, = (r for r in result["records"] if r["system"] == "MAEDAY + HVQ"
                   and r["category"] == name and r["trained on"] == "all")
        assert record["both"] == pytest.approx(evaluation.aurocs(kinds, total[test]))


def test_a_training_that_is_stopped_ends_130(beside, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(baselines.METHODS, "smae", interrupted)
    next(Path("runs").rglob("rivals/smae.json")).unlink()
    assert baselines.main(beside) == 130 and "goes on" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"about": 1}'])
def test_a_file_that_is_damaged_or_about_others_is_one_line(beside, content, capsys):
    file = Path("runs/twin/pushpins-tiny-seed0/rivals/patchcore.json")
    file.write_text(content)
    assert baselines.main(["runs/twin/pushpins-tiny-seed0", "--methods", "patchcore"]) == 1
    warning, = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning"))
    assert "patchcore.json" in warning and "delete it" in warning


@pytest.mark.parametrize("changed", ["test/good", "train/good"])
def test_photos_that_changed_are_one_line(beside, capsys, changed):
    """Under the same names: what is kept of a rival is about other photos."""
    Path("twin").unlink()
    run = Path("runs/twin/pushpins-tiny-seed0")
    config = json.loads((run / "config.json").read_text())
    shutil.copytree(Path(config["root"]) / "pushpins", "twin/pushpins")
    (run / "config.json").write_text(json.dumps(config | {"root": str(Path("twin").resolve())}))
    assert baselines.main([str(run), "--methods", "patchcore"]) == 0
    first, second, *_ = sorted(Path("twin/pushpins", changed).iterdir())
    shutil.copy(first, second)
    capsys.readouterr()
    assert baselines.main([str(run), "--methods", "patchcore"]) == 1
    warning, = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: runs"))
    assert "changed since it was trained" in warning


def test_photos_that_are_gone_are_one_line(beside, capsys):
    run = Path("runs/twin/pushpins-tiny-seed0")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"root": str(Path("none").resolve())}))
    assert baselines.main([str(run), "--methods", "patchcore"]) == 1
    assert f"{run}: its photos are no longer at" in capsys.readouterr().err


def test_two_at_once_on_one_run_are_one_line(beside, capsys):
    run = "runs/twin/pushpins-tiny-seed0"
    held = runs.lock(Path(run, "rivals"))
    assert baselines.main([run, "--methods", "patchcore"]) == 1
    held.close()
    assert (f"warning: {run}/rivals: another process is training in it; wait until it ends"
            in capsys.readouterr().err.splitlines())


def test_what_is_not_trained_is_kept_in_any_precision(beside, capsys):
    run = "runs/twin/pushpins-tiny-seed0"
    kept = [Path(run, "rivals", f"{name}.json") for name in ("ladmim", "patchcore")]
    before = [file.stat().st_mtime_ns for file in kept]
    assert baselines.main([run, "--methods", "patchcore,smae", "--precision", "bf16"]) == 1
    warning, = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning"))
    assert "smae.json" in warning and "delete it" in warning
    assert [file.stat().st_mtime_ns for file in kept] == before


def test_photos_that_came_later_are_one_line(beside, capsys):
    """They have no S_HVQ, and the rivals would see other photos than LADMIM."""
    Path("twin").unlink()
    run = Path("runs/twin/pushpins-tiny-seed0")
    config = json.loads((run / "config.json").read_text())
    shutil.copytree(Path(config["root"]) / "pushpins", "twin/pushpins")
    shutil.copy(next(Path("twin/pushpins/test/good").iterdir()), "twin/pushpins/test/good/999.png")
    (run / "config.json").write_text(json.dumps(config | {"root": str(Path("twin").resolve())}))
    assert baselines.main([str(run), "--methods", "patchcore"]) == 1
    warning, = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning"))
    assert str(run) in warning and "train command again" in warning


@pytest.mark.parametrize("arguments, named", [
    (["--methods", "gcad"], "--methods gcad"), (["--steps", "0"], "--steps: '0'"),
    (["--multi"], "--category"),
    (["runs", "--category", "pushpins"], "--category pushpins"), (["--data", "twin"], "--category"),
    (["--seeds", "0-4"], "--seeds"), (["--preset", "paper"], "--preset"),
    (["--data", "twin", "--category", "pushpins", "--multi"], "--multi"),
    (["--methods", "patchcore", "--steps", "5"], "patchcore trains nothing"),
    (["--methods", "patches", "--precision", "fp32"], "patches trains nothing")])
def test_wrong_options_are_one_line(beside, arguments, named, capsys):
    assert baselines.main(arguments) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line


def test_reported_results_hold_together():
    """Δ_multi is the difference of Tables 3 and 2, and every contradiction has a note."""
    paper = json.loads(data.REPORTED.read_text())
    single, multi = paper["table2_single_class"], paper["table3_multi_class"]
    for system, delta in multi["delta_multi"].items():
        assert multi["overall"][system] - single["overall"][system] == pytest.approx(delta)
    for system, overall in single["overall"].items():
        means = [single[kind]["average"].get(system, 0) for kind in evaluation.KINDS]
        if not system.endswith("_std") and abs(np.mean(means) - overall) > 0.11:
            assert system in single["note"]
    for table, kind in itertools.product((single, multi), evaluation.KINDS):
        for system, average in table[kind]["average"].items():
            of_each = [table[kind][name][system] for name in paper["categories"]]
            if not system.endswith("_std") and abs(np.mean(of_each) - average) > 0.11:
                assert f"{system}'s" in single["note"] and str(average) in single["note"]
    for table, row in (("table5_scoring_ablation", "both"), ("table6_combined_with_hvq", "LADMIM"),
                       ("table8_prediction_target", "histogram")):
        assert paper[table][row]["average"] != single["overall"]["LADMIM"]
        note = paper[table]["note"]
        assert str(single["overall"]["LADMIM"]) in note and row in note


def test_an_auroc_of_zero_and_a_missing_one_have_cells():
    record = {"system": "SMAE", "category": "x", "seed": 0, "data": "d", "rendered": False,
              "trained on": "each alone", "columns": ("logical", "structural", "average"),
              "curve": [{"step": 9, "loss": 0.5, "aurocs": {"x": {"logical": 0.0}}}]}
    (_, header, (row,)), = baselines.curve_table([record])
    assert len(header) == len(row) == 8 and [evaluation.cell_text(c) for c in row[5:]] == [
        "0.0", "–", "–"]
