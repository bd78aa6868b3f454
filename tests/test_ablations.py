"""bench/ablations.py: what it trains, and its tables."""
import json

import numpy as np
import pytest
from test_report import SETTINGS, folder, small  # noqa: F401

import eval as evaluation
import ladmim
from bench import ablations


def ablation(name, *more):
    words = [name, "--data", "twin", "--category", "juice_bottle", "--seeds", "0-1", *more]
    assert ablations.main(words) == 0
    return json.loads(open(f"runs/ablation-{name}.json").read())


def test_ablations_train_nothing_twice(small, monkeypatch, capsys):  # noqa: F811
    fitted = []
    for stage in ("train_hvq", "train_mim"):
        def noted(run, *rest, stage=stage, train=getattr(ladmim, stage)):
            state = run.state["stage"], run.state["epoch"]
            model = train(run, *rest)
            if (run.state["stage"], run.state["epoch"]) != state:
                fitted.append(stage)
            return model

        monkeypatch.setattr(ladmim, stage, noted)
    found = ablation("target")
    assert fitted.count("train_hvq") == 2            # one a seed, for all four targets
    assert fitted.count("train_mim") == 8
    assert list(found["records"]) == ["pixel", "feature", "code", "histogram"]
    table = found["tables"][0]["rows"]
    for row in table:
        mine = [record["both"]["logical"] for record in found["records"][row[0]]]
        assert row[3]["mean"] == pytest.approx(np.mean(mine))
        assert row[3]["std"] == pytest.approx(np.std(mine, ddof=1))
    assert len({row[3]["mean"] for row in table}) > 1             # they are different models
    assert "REFERENCE ONLY" in found["tables"][1]["title"]
    assert len(found["tables"][1]["rows"]) == 4
    fitted.clear()
    assert ablation("target") == found and not fitted
    assert [path.name for path in evaluation.find_runs([small / "runs"])] == [
        f"juice_bottle-tiny-seed{n}" for n in (0, 1)]
    assert len(evaluation.find_runs([small / "runs" / "ablations"])) == 8
    combined = ablation("combine")
    rows = combined["tables"][0]["rows"]
    assert not fitted and [row[0] for row in rows][:2] == ["pixel MIM alone", "pixel and HVQ"]
    assert rows[0][3]["mean"] == np.mean([r["mim"]["logical"] for r in found["records"]["pixel"]])
    for name, count in (("scoring", 3), ("score", 5), ("leak", 6)):
        assert len(ablation(name)["tables"][0]["rows"]) == count
        assert not fitted                            # they only score anew
    capsys.readouterr()


def test_leaks_are_those_of_the_published_code(small):  # noqa: F811
    found = ablation("leak", "--seeds", "0")["records"]
    plain = found["HVQ mean, standardised over validation"][0]
    leaky = found["HVQ mean, standardised over test"][0]
    name = "juice_bottle-tiny-hvq_score=mean,mim_score=mean-seed0"
    scored = evaluation.read_run(small / "runs/ablations/twin" / name)
    assert plain["both"] == evaluation.evaluate(scored, "juice_bottle")["both"]
    assert leaky["both"] == evaluation.evaluate(scored, "juice_bottle", "test")["both"]
    report = json.loads(open("runs/ablation-leak.json").read())
    assert "LEAK" in report["tables"][0]["banner"]
    turned = found["HVQ mean, standardised over test, flipped"][0]["both"]
    assert turned["logical"] == max(leaky["both"]["logical"], 1 - leaky["both"]["logical"])


def test_a_run_of_other_settings_is_no_row(small, tmp_path, monkeypatch, capsys):  # noqa: F811
    words = ["scoring", "--data", "twin", "--category", "juice_bottle", "--runs", str(tmp_path)]
    assert ablations.main(words) == 0
    monkeypatch.setitem(ladmim.PRESETS, "tiny", SETTINGS | {"hvq_lr": 0.5})
    assert ablations.main(words) == 2 and "other hvq_lr" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(small, tmp_path, monkeypatch, capsys):  # noqa: F811
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ladmim, "train_run", interrupted)
    assert ablations.main(["scoring", "--data", "twin", "--category", "juice_bottle",
                           "--runs", str(tmp_path)]) == 130
    assert "goes on" in capsys.readouterr().err


@pytest.mark.parametrize("name, rows", [("masking", 7), ("width", 4), ("multi", 2)])
def test_the_other_ablations(small, monkeypatch, name, rows):  # noqa: F811
    short = {**SETTINGS, "grid": 12, "hvq_epochs": 1, "mim_epochs": 1}
    monkeypatch.setitem(ladmim.PRESETS, "tiny", short)
    assert ablations.main([name, "--data", "twin", "--category", "juice_bottle",
                           "--runs", "others"]) == 0
    tables = json.loads(open(f"others/ablation-{name}.json").read())["tables"]
    assert len(tables[0]["rows"]) == rows
    if name == "multi":          # the paper's averages over the five categories, Tables 2 and 3
        figures = [[round(100 * cell["mean"], 1) for cell in row[2:]] for row in tables[1]["rows"]]
        assert figures == [[88.5, 80.9, 84.7], [88.9, 81.4, 85.1]]
