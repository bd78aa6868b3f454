"""bench/ablations.py: what it trains, and its tables."""
import json
import shutil

import numpy as np
import pytest

import data
import eval as evaluation
import ladmim
from bench import ablations
from twin.render import COUNTS, render

# 80 pixels a side are 12x12 positions of the backbone: enough for checkerboards.
SETTINGS = dict(image_size=80, grid=4, codes=8, code_dim=8, hvq_width=32, hvq_heads=2,
                mim_width=32, mim_heads=2, mim_blocks=2, masks=4, hvq_epochs=2, mim_epochs=2,
                hvq_score="deviations", mim_score="whitened", codebook="ema", hvq_batch=4)
DATA = ["--data", "twin", "--category", "juice_bottle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small twin of one category."""
    folder = tmp_path_factory.mktemp("twin")
    render(folder / "twin", "juice_bottle", {**dict.fromkeys(COUNTS, 5), "train": 8}, 80, 1)
    return folder


@pytest.fixture
def small(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(ladmim.PRESETS, "tiny", SETTINGS)
    return folder


def ablation(name, *more, folder="runs"):
    assert ablations.main([name, *DATA, "--runs", folder, *more]) == 0
    return json.loads(open(f"{folder}/ablation-{name}.json").read())


def test_ablations_train_nothing_twice(small, monkeypatch, capsys):
    fitted = []
    for stage in ("train_hvq", "train_mim"):
        def noted(run, *rest, stage=stage, train=getattr(ladmim, stage)):
            state = run.state["stage"], run.state["epoch"]
            model = train(run, *rest)
            if (run.state["stage"], run.state["epoch"]) != state:
                fitted.append(stage)
            return model

        monkeypatch.setattr(ladmim, stage, noted)
    seeds = "--seeds", "0-1"
    result = ablation("target", *seeds)
    assert fitted.count("train_hvq") == 2            # one a seed, for all four targets
    assert fitted.count("train_mim") == 8
    assert list(result["records"]) == ["pixel", "feature", "code", "histogram"]
    ours, paper = result["tables"]
    assert ours["header"][:5] == ["row", "seeds", "logical", "structural", "average"]
    for row in ours["rows"]:
        mine = [record["both"]["logical"] for record in result["records"][row[0]]]
        assert row[2]["mean"] == row[5][0]["mean"] == pytest.approx(np.mean(mine))
        assert row[2]["std"] == pytest.approx(np.std(mine, ddof=1))
    assert len({row[2]["mean"] for row in ours["rows"]}) > 1      # they are different models
    assert "REFERENCE ONLY" in paper["title"] and len(paper["rows"]) == 4
    fitted.clear()
    assert ablation("target", *seeds) == result and not fitted
    assert [path.name for path in evaluation.find_runs([small / "runs"])] == [
        f"juice_bottle-tiny-seed{n}" for n in (0, 1)]
    assert len(evaluation.find_runs([small / "runs" / "ablations"])) == 8
    combined = ablation("combine", *seeds)
    rows = combined["tables"][0]["rows"]
    assert not fitted and [row[0] for row in rows][:2] == ["pixel MIM alone", "pixel and HVQ"]
    assert rows[0][2]["mean"] == np.mean([r["mim"]["logical"] for r in result["records"]["pixel"]])
    for name, count in (("scoring", 3), ("score", 6), ("leak", 4)):
        assert len(ablation(name)["tables"][0]["rows"]) == count
        assert not fitted                            # they only score anew
    capsys.readouterr()


def test_leaks_are_those_of_the_published_code(small):
    result = ablation("leak")
    records = {name: records[0] for name, records in result["records"].items()}
    name = "juice_bottle-tiny-hvq_score=mean,mim_score=mean-seed0"
    scored = evaluation.read_run(small / "runs/ablations/twin" / name)
    plain, leaky = records["HVQ mean"], records["HVQ mean, over test"]
    assert plain["both"] == evaluation.evaluate(scored, "juice_bottle")["both"]
    assert leaky["both"] == evaluation.evaluate(scored, "juice_bottle", "test")["both"]
    assert "LEAK" in result["tables"][0]["banner"]


def test_a_run_of_other_settings_is_no_row(small, monkeypatch, capsys):
    ablation("scoring")
    monkeypatch.setitem(ladmim.PRESETS, "tiny", SETTINGS | {"hvq_lr": 0.5})
    assert ablations.main(["scoring", *DATA]) == 2
    assert "hvq_lr" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(small, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ladmim, "train_run", interrupted)
    assert ablations.main(["scoring", *DATA, "--runs", "stopped"]) == 130
    assert "goes on" in capsys.readouterr().err


@pytest.mark.parametrize("name, rows", [("masking", 7), ("width", 4)])
def test_the_other_ablations(small, monkeypatch, name, rows):
    short = {**SETTINGS, "grid": 12, "hvq_epochs": 1, "mim_epochs": 1}
    monkeypatch.setitem(ladmim.PRESETS, "tiny", short)
    tables = ablation(name, folder="others")["tables"]
    assert len(tables[0]["rows"]) == rows and len(tables) == (1 if name == "width" else 2)


def test_one_model_of_several_categories(small, tmp_path, monkeypatch):
    """It is the run that `train` would make, and has a column for each category."""
    for name in ("juice_bottle", "pushpins"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).symlink_to(small / "twin/juice_bottle")
    monkeypatch.setitem(ladmim.PRESETS, "tiny", {**SETTINGS, "hvq_epochs": 1, "mim_epochs": 1})
    assert ablations.main(["multi", "--data", str(tmp_path / "two"), "--runs", "several"]) == 0
    assert sorted(path.name for path in (small / "several/two").iterdir()) == [
        f"{called}-tiny-seed0" for called in ("all", "juice_bottle", "pushpins")]
    result = json.loads(open("several/ablation-multi.json").read())
    assert [record["category"] for record in result["records"]["one model"]] == [
        "juice_bottle", "pushpins"]
    assert {record["trained on"] for record in result["records"]["one model"]} == {"all"}
    ours, theirs = result["tables"]
    assert len(ours["header"]) == 7 and len(ours["rows"]) == 3
    # The paper's averages over the five categories, Tables 2 and 3.
    figures = [[round(100 * cell["mean"], 1) for cell in row[1:]] for row in theirs["rows"]]
    assert figures == [[80.9, 88.5, 84.7], [81.4, 88.9, 85.1]]
    paper = json.loads(data.REPORTED.read_text())
    for table, row in zip(("table2_single_class", "table3_multi_class"), figures):
        means = [paper[table][kind]["average"] for kind in evaluation.KINDS]
        assert row == [cell["LADMIM"] for cell in (*means, paper[table]["overall"])]


def test_table_7s_setting_is_one_model_with_a_shorter_training(small, tmp_path, monkeypatch):
    """Every row is a run of both categories, of so many epochs, scored with blocks."""
    for name in ("juice_bottle", "pushpins"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).symlink_to(small / "twin/juice_bottle")
    monkeypatch.setitem(ladmim.PRESETS, "tiny", {**SETTINGS, "grid": 12, "hvq_epochs": 1})
    monkeypatch.setitem(ablations.ABLATIONS, "masking", {"board": {"mask": "checkerboard"}})
    arguments = ["--data", str(tmp_path / "two"), "--runs", "seven", "--together"]
    assert ablations.main(["masking", *arguments, "--mim-epochs", "1"]) == 0
    records = json.loads(open("seven/ablation-masking.json").read())["records"]["board"]
    assert [(r["category"], r["trained on"]) for r in records] == [
        ("juice_bottle", "all"), ("pushpins", "all")]
    for record in records:
        assert record["settings"]["mim_epochs"] == 1
        assert record["settings"]["mask"] == "checkerboard"
    assert ablations.main(["multi", *arguments]) == 2
    one = ["--category", "pushpins", *arguments]     # else a model would be compared with itself
    assert ablations.main(["masking", *one]) == ablations.main(["multi", *one[:-1]]) == 2
    title = json.loads(open("seven/ablation-masking.json").read())["tables"][0]["title"]
    commit, = {record["commit"] for record in records}
    assert f", tiny, one model of all, ViT 1 epochs, {commit}: masking" in title


def test_photos_that_changed_are_scored_anew(small, tmp_path, monkeypatch, capsys):
    """Good and faulty test photos change places under the same names: AUROC 100 - what it was."""
    shutil.copytree(small / "twin", tmp_path / "twin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ladmim.PRESETS, "tiny", SETTINGS)
    before, = ablation("scoring")["records"][""]
    test = tmp_path / "twin/juice_bottle/test"
    shutil.rmtree(test / "structural_anomalies")
    (test / "good").rename(test / "x")
    (test / "logical_anomalies").rename(test / "good")
    (test / "x").rename(test / "logical_anomalies")
    for folder in ("logical_anomalies", "structural_anomalies"):
        shutil.rmtree(tmp_path / "twin/juice_bottle/ground_truth" / folder, ignore_errors=True)
    after, = ablation("scoring")["records"][""]
    for part in ("hvq", "mim"):
        assert after[part]["logical"] == pytest.approx(1 - before[part]["logical"])


def test_one_model_shares_its_codes_whatever_the_preset(small, tmp_path, monkeypatch):
    for name in ("juice_bottle", "pushpins"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).symlink_to(small / "twin/juice_bottle")
    monkeypatch.setitem(ladmim.PRESETS, "tiny", {**SETTINGS, "hvq_epochs": 1, "mim_epochs": 1,
                                                 "category_codes": "own"})
    assert ablations.main(["multi", "--data", str(tmp_path / "two"), "--runs", "codes"]) == 0
    records = json.loads(open("codes/ablation-multi.json").read())["records"]
    assert {label: records[label][0]["settings"]["category_codes"] for label in records} == {
        "each alone": "own", "one model": "shared", "one model, own codes": "own"}


def test_rows_that_cannot_work_are_refused_before_any_training(small, monkeypatch, capsys):
    monkeypatch.setitem(ladmim.PRESETS, "tiny", {**SETTINGS, "codes": 512, "mim_score": "mean"})
    assert ablations.main(["score", *DATA, "--runs", "early"]) == 2
    assert "--mim-score whitened" in capsys.readouterr().err and not (small / "early/twin").exists()


@pytest.mark.parametrize("more, word", [
    (["--mim-epochs", "-1"], "--mim-epochs: '-1'"), (["--mim-epochs", "0"], "--mim-epochs: '0'"),
    (["--json", "twin/juice_bottle/defects_config.json"], "defects_config.json")])
def test_what_cannot_work_is_said_before_the_training(small, capsys, more, word):
    assert ablations.main(["scoring", *DATA, "--runs", "early", *more]) == 2
    assert word in capsys.readouterr().err and not (small / "early/twin").exists()


def test_a_category_without_test_photos_is_not_trained(small, tmp_path, capsys):
    shutil.copytree(small / "twin", tmp_path / "twin")
    shutil.rmtree(tmp_path / "twin/juice_bottle/test")
    data_set = ["--data", str(tmp_path / "twin"), "--category", "juice_bottle"]
    assert ablations.main(["scoring", *data_set, "--runs", "none"]) == 2
    assert "test split" in capsys.readouterr().err and not (small / "none/twin").exists()
