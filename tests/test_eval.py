"""eval.py against scikit-learn and hand-made run folders; its AUROC is in test_auroc.py."""
import csv
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import eval as evaluation
from eval import evaluate, evaluate_runs, main, read_run, run_table

LOCO = {"good": 12, "logical_anomalies": 9, "structural_anomalies": 10}
CATEGORIES = ["breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"]


def make_run(folder, category="breakfast_box", seed=0, kinds=LOCO, data="mvtec_loco",
             rendered=False, preset="tiny", commit="abc1234", validation=20, decimals=1, shift=1.0,
             **more):
    """A run folder with random scores, coarse enough to tie. Returns its rows as written."""
    rng = np.random.default_rng([seed, *category.encode()])
    config = dict(data=data, rendered=rendered, category=category, preset=preset, seed=seed,
                  commit=commit, device="cpu", torch="2", mim_epochs=60, **more)
    names = CATEGORIES if category == "all" else category.split(",")
    rows = []
    for name in names:
        for split, counts in (("validation", {"good": validation}), ("test", kinds)):
            for kind, n in counts.items():
                for i in range(n):
                    s = rng.normal(shift * (kind != "good"), 1, 2) * (3, 0.5) + (7, 1)
                    s = np.round(s, decimals)
                    path = f"{name}/{split}/{kind}/{i:03}.png"
                    rows.append([path, split, kind, int(kind != "good"), *map(float, s), 0.0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_rows(folder, rows)
    return rows


def write_rows(folder, rows):
    with open(folder / "scores.csv", "w", newline="") as file:
        csv.writer(file).writerows([evaluation.HEADER, *rows])


def oracle(rows, category, over="validation"):
    """Labels are 1 for anomalies; "both" standardised by hand. -> {kind: {detector: AUROC}} by
    scikit-learn."""
    rows = [r for r in rows if r[0].startswith(f"{category}/")]
    s = np.array([r[4:6] for r in rows])
    test = np.array([r[1] == "test" for r in rows])
    kind = np.array([r[2] for r in rows])
    reference = s[test] if over == "test" else s[~test & (kind == "good")]
    variance = ((reference - reference.mean(0)) ** 2).sum(0) / len(reference)
    z = (s - reference.mean(0)) / np.sqrt(variance)
    found = {}
    for name in set(kind) - {"good"}:
        pick = test & ((kind == "good") | (kind == name))
        found[name] = {d: roc_auc_score(kind[pick] != "good", v[pick])
                       for d, v in (("hvq", s[:, 0]), ("mim", s[:, 1]), ("both", z.sum(1)))}
    return found, z.sum(1), test, kind


def lines_of(output, title):
    """The cells of the table whose title holds `title`: header first."""
    block = next(b for b in re.split(r"(?m)^## ", output)[1:] if title in b.split("\n")[0])
    rows = [[c.strip() for c in line.strip("|").split("|")]
            for line in block.splitlines() if line.startswith("|")]
    return rows[:1] + rows[2:]


def auroc_lines(output, title="mvtec_loco: AUROC %", scoring="both"):
    """Header and our rows of the table of AUROCs for one way of scoring, without that column."""
    header, *rows = lines_of(output, title)
    assert header[1] == "scoring"
    ours = [row for row in rows if row[1] == scoring and row[3] != "reported"]
    return [row[:1] + row[2:] for row in [header, *ours]]


def reported_lines(output, title="mvtec_loco: AUROC %"):
    return [row for row in lines_of(output, title) if row[3] == "reported"]


# One run

@pytest.mark.parametrize("over", ["validation", "test"])
@pytest.mark.parametrize("category", ["breakfast_box", "breakfast_box,pushpins"])
def test_evaluate_equals_scikit_learn(tmp_path, category, over):
    rows = make_run(tmp_path / "run", category)
    for name in category.split(","):
        record = evaluate(read_run(tmp_path / "run"), name, over)
        expected, both, test, kind = oracle(rows, name, over)
        for detector in ("hvq", "mim", "both"):
            logical = expected["logical_anomalies"][detector]
            structural = expected["structural_anomalies"][detector]
            average = (logical + structural) / 2
            assert record[detector] == pytest.approx(
                {"logical": logical, "structural": structural, "average": average}, abs=1e-12)
        threshold = np.percentile(both[~test], 95, method="weibull")
        assert record["false alarms"]["good"] == np.mean(both[test & (kind == "good")] > threshold)
        for k in ("logical", "structural"):
            missed = both[test & (kind == f"{k}_anomalies")] <= threshold
            assert record["missed"][k] == pytest.approx(np.mean(missed))
        assert record["images"] == LOCO
        assert record["settings"] == {"mim_epochs": 60}


def test_threshold_lets_the_share_through_that_it_names():
    """n uniform scores in order have the means k / (n + 1), and a threshold is linear in them: the
    share that exceeds it, on average over draws, is 1 minus the threshold of those means. Where n
    is too small for the percentile it is the largest."""
    for n, percent, rate in ((19, 95, 0.05), (30, 95, 0.05), (57, 95, 0.05), (100, 99, 0.01),
                             (5, 95, 1 / 6), (30, 99, 1 / 31)):
        means = np.random.default_rng(n).permutation(np.arange(1, n + 1) / (n + 1))
        assert 1 - evaluation.threshold(means, percent) == pytest.approx(rate)
    assert evaluation.threshold([3.0, 1, 2]) == 3 and evaluation.threshold([7]) == 7


def test_the_leak_changes_scores_and_validation_anomalies_do_not(tmp_path):
    rows = make_run(tmp_path / "run")
    clean = evaluate(read_run(tmp_path / "run"), "breakfast_box")
    assert evaluate(read_run(tmp_path / "run"), "breakfast_box", "test")["both"] != clean["both"]
    extra = [[f"breakfast_box/validation/bad/{i}.png", "validation", "bad", 1, 900.0, 70.0, 0.0]
             for i in range(5)]
    write_rows(tmp_path / "run", rows + extra)
    assert evaluate(read_run(tmp_path / "run"), "breakfast_box") == clean


def test_auroc_under_a_half_is_not_flipped(tmp_path):
    rows = make_run(tmp_path / "run", shift=-3)
    record = evaluate(read_run(tmp_path / "run"), "breakfast_box")
    assert max(record["both"].values()) < 0.5
    expected = oracle(rows, "breakfast_box")[0]["logical_anomalies"]["both"]
    assert record["both"]["logical"] == pytest.approx(expected)


def test_one_validation_photo_does_not_divide_by_zero(tmp_path):
    make_run(tmp_path / "run", validation=1)
    record = evaluate(read_run(tmp_path / "run"), "breakfast_box")
    assert 0 <= record["both"]["average"] <= 1


def test_photo_names_may_hold_any_bytes(tmp_path):
    make_run(tmp_path / "run")
    clean = evaluate(read_run(tmp_path / "run"), "breakfast_box")
    file = tmp_path / "run/scores.csv"
    file.write_bytes(file.read_bytes().replace(b"good/000.png", b"good/\xff\xe9.png"))
    odd = read_run(tmp_path / "run")
    assert "breakfast_box/test/good/\udcff\udce9.png" in odd.path
    assert evaluate(odd, "breakfast_box") == clean


def test_a_score_at_the_threshold_is_not_flagged(tmp_path):
    rows = make_run(tmp_path / "run")
    write_rows(tmp_path / "run", [[*row[:4], 3.0, 0.5, 0.0] for row in rows])
    record = evaluate(read_run(tmp_path / "run"), "breakfast_box")
    assert record["false alarms"] == {"good": 0}
    assert record["missed"] == {"logical": 1, "structural": 1}
    assert record["both"] == {"logical": 0.5, "structural": 0.5, "average": 0.5}


def test_a_missing_kind_leaves_a_gap(tmp_path, capsys):
    make_run(tmp_path / "runs/a", kinds={"good": 5, "logical_anomalies": 5})
    assert main(["--runs", str(tmp_path / "runs"), "--all"]) == 0
    assert auroc_lines(capsys.readouterr().out)[1][-2:] == ["–", "–"]


# Means over seeds and categories

def test_table_means_and_sample_std(tmp_path, capsys):
    values = {c: [] for c in CATEGORIES}
    for c in CATEGORIES:
        for seed in (0, 1, 2):
            expected = oracle(make_run(tmp_path / f"runs/d/{c}-tiny-seed{seed}", c, seed), c)[0]
            values[c].append([expected[f"{k}_anomalies"]["both"]
                              for k in ("logical", "structural")])
    assert main(["--runs", str(tmp_path / "runs")]) == 0
    header, *rows = auroc_lines(capsys.readouterr().out)
    assert header == ["category", "preset", "commit", "trained on", "seeds", "logical",
                      "structural", "average"]

    def cells(per_seed):
        per_seed = [[*p, sum(p) / 2] for p in per_seed]
        return [f"{100 * statistics.mean(v):.1f} ± {100 * statistics.stdev(v):.1f}"
                for v in zip(*per_seed)]

    for row, c in zip(rows, CATEGORIES):
        assert row == [c, "tiny", "abc1234", "each alone", "3", *cells(values[c])]
    over_categories = [[statistics.mean(values[c][seed][k] for c in CATEGORIES) for k in (0, 1)]
                       for seed in range(3)]
    assert rows[5:] == [["mean of 5", "tiny", "abc1234", "each alone", "3",
                         *cells(over_categories)]]


def test_no_std_with_one_seed_or_unshared_seeds(tmp_path, capsys):
    for c, seed in (("breakfast_box", 0), ("pushpins", 0), ("pushpins", 1)):
        make_run(tmp_path / f"runs/{c}{seed}", c, seed)
    main(["--runs", str(tmp_path / "runs")])
    _, box, pins, mean = auroc_lines(capsys.readouterr().out)
    assert box[4] == "1" and "±" not in box[5]
    assert pins[4] == "2" and "±" in pins[5]
    assert mean[0] == "mean of 2" and mean[4] == "not shared" and "±" not in mean[5]
    expected = (float(box[5]) + float(pins[5].split(" ±")[0])) / 2
    assert float(mean[5]) == pytest.approx(expected, abs=0.11)


def test_presets_commits_and_settings_are_kept_apart(tmp_path, capsys):
    make_run(tmp_path / "runs/a", seed=0)
    make_run(tmp_path / "runs/b", seed=0, preset="paper")
    make_run(tmp_path / "runs/c", seed=0, commit="")
    make_run(tmp_path / "runs/d", seed=1)
    make_run(tmp_path / "runs/e", seed=0, target="code")          # an ablation of a
    make_run(tmp_path / "runs/f", seed=0, category="pushpins")    # its settings join in too
    assert main(["--runs", str(tmp_path / "runs")]) == 0
    rows = auroc_lines(capsys.readouterr().out)[1:]
    assert [row[:5] for row in rows] == [
        ["breakfast_box", "paper", "abc1234", "each alone", "1"],
        ["breakfast_box", "tiny", "unknown", "each alone", "1"],
        ["breakfast_box", "tiny target=None", "abc1234", "each alone", "2"],
        ["breakfast_box", "tiny target=code", "abc1234", "each alone", "1"],
        ["pushpins", "tiny target=None", "abc1234", "each alone", "1"],
        ["mean of 2", "tiny target=None", "abc1234", "each alone", "not shared"]]


def test_categories_of_other_settings_have_no_mean_together():
    about = {"data": "x", "rendered": True, "preset": "tiny", "commit": "abc",
             "trained on": "each alone", "seed": 0, "root": "x", "images": {}}
    records = [about | {"run": name, "category": name, "settings": {"masks": masks}}
               for name, masks in (("a", 32), ("b", 1))]
    kept, repeats = evaluation.tell_apart(records)
    assert {record["preset"] for record in kept} == {"tiny masks=32", "tiny masks=1"}
    assert not repeats


def test_seeds_that_scored_other_test_photos_are_named(tmp_path, capsys):
    for seed, good in ((0, 8), (1, 8), (2, 9)):
        make_run(tmp_path / f"runs/{seed}", "part", seed=seed, kinds={"good": good, "bent": 5})
    assert main(["--runs", str(tmp_path / "runs")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/runs/2 has scored other test photos than {tmp_path}/runs/0" in line


def test_a_repeated_seed_counts_once_and_is_named(tmp_path, capsys):
    make_run(tmp_path / "runs/a")
    make_run(tmp_path / "runs/b")
    assert main(["--runs", str(tmp_path / "runs")]) == 1
    out, err = capsys.readouterr()
    assert auroc_lines(out)[1][4] == "1"
    assert "runs/b is left out" in err and len(err.splitlines()) == 1
    assert len(json.loads((tmp_path / "runs/eval.json").read_text())["records"]) == 1


# Beside the paper's

def test_real_loco_stands_beside_the_paper(tmp_path, capsys):
    for c in CATEGORIES:
        for seed in (0, 1):
            make_run(tmp_path / f"runs/{c}{seed}", c, seed)
    make_run(tmp_path / "runs/own", "my_part")
    main(["--runs", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    rows = reported_lines(out)
    single = [row for row in rows if row[2] == "Table 2"]
    assert {row[4] for row in single} == {"each alone"}
    assert [[row[0], *row[6:]] for row in single] == [
        ["breakfast_box", "86.2 ± 0.8", "81.0 ± 0.8", "–"],
        ["juice_bottle", "99.0 ± 0.2", "98.8 ± 0.3", "–"],
        ["pushpins", "73.5 ± 0.7", "85.9 ± 1.5", "–"],
        ["screw_bag", "58.1 ± 3.8", "86.7 ± 0.8", "–"],
        ["splicing_connectors", "88.0 ± 0.8", "90.0 ± 1.1", "–"],
        ["mean of 5", "80.9 ± 0.7", "88.5 ± 0.5", "84.7 ± 0.6"]]
    multi = [row for row in rows if row[2] == "Table 3"]
    assert len(multi) == 6
    assert multi[0] == ["breakfast_box", "both", "Table 3", "reported", "all", "–", "86.5 ± 0.6",
                        "81.5 ± 1.3", "–"]
    assert "my_part" not in {row[0] for row in rows}
    assert "my_part" in {row[0] for row in auroc_lines(out)}
    assert out.startswith("Our protocol: scores standardised with mean and population std of the "
                          "validation normals")


def test_only_our_categories_of_the_papers_are_shown(tmp_path, capsys):
    make_run(tmp_path / "runs/a")
    main(["--runs", str(tmp_path / "runs"), "--all"])
    names = {row[0] for row in reported_lines(capsys.readouterr().out)}
    assert names == {"breakfast_box", "mean of 5"}


def test_own_categories_get_no_reported_rows(tmp_path, capsys):
    make_run(tmp_path / "runs/a", "my_part")
    assert main(["--runs", str(tmp_path / "runs"), "--all"]) == 0
    assert not reported_lines(capsys.readouterr().out)


def test_each_detector_alone_is_the_mean_over_categories_beside_table_5(tmp_path, capsys):
    expected = [oracle(make_run(tmp_path / f"runs/{c}", c), c)[0] for c in CATEGORIES[:2]]
    main(["--runs", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    for label, detector in (("HVQ alone", "hvq"), ("MIM alone", "mim"), ("both", "both")):
        means = [np.mean([e[f"{k}_anomalies"][detector] for e in expected])
                 for k in ("logical", "structural")]
        rows = auroc_lines(out, scoring=label)
        assert [row[0] for row in rows[1:]] == [*CATEGORIES[:2], "mean of 2"]
        assert rows[3] == ["mean of 2", "tiny", "abc1234", "each alone", "1",
                           *(f"{100 * v:.1f}" for v in (*means, sum(means) / 2))]
    table5 = [row for row in reported_lines(out) if row[2] == "Table 5"]
    assert [row[:2] for row in table5] == [["mean of 5", label]
                                           for label in ("HVQ alone", "MIM alone", "both")]
    assert table5[2][6:] == ["83.1", "90.3", "86.6"]


def test_rendered_data_never_shares_a_table(tmp_path, capsys):
    for category in ("breakfast_box", "all"):
        make_run(tmp_path / f"runs/rendered/{category}", category, data="twin", rendered=True)
    make_run(tmp_path / "runs/real", data="twin")                 # even under the same name
    file = tmp_path / "report.json"
    assert main(["--runs", str(tmp_path / "runs"), "--json", str(file)]) == 0
    titles = [table["title"] for table in json.loads(file.read_text())["tables"]]
    out = capsys.readouterr().out
    assert "twin: AUROC %" in titles and reported_lines(out, "twin: AUROC %")
    rendered = [title for title in titles if not title.startswith("twin:")]
    assert len(rendered) == 2
    for title in rendered:
        assert title.startswith("twin (rendered twin, not MVTec's photos)")
        assert not any("reported" in row for row in lines_of(out, title))


def test_other_defect_names_get_one_image_auroc_and_figures_by_defect(tmp_path, capsys):
    kinds = {"good": 8, "broken_large": 5, "contamination": 6}
    rows = make_run(tmp_path / "runs/bottle", "bottle", data="mvtec_ad", kinds=kinds)
    make_run(tmp_path / "runs/loco", data="mvtec_ad")             # another kind of test split
    main(["--runs", str(tmp_path / "runs")])
    expected, both, test, kind = oracle(rows, "bottle")
    out = capsys.readouterr().out
    image = roc_auc_score(kind[test] != "good", both[test])
    assert [row[0] for row in auroc_lines(out, "mvtec_ad: AUROC %")[1:]] == ["breakfast_box"]
    only = auroc_lines(out, "mvtec_ad: image AUROC %")
    assert [row[5:] for row in only] == [["any defect"], [f"{100 * image:.1f}"]]
    assert not reported_lines(out, "mvtec_ad: image AUROC %")
    threshold = np.percentile(both[~test], 95, method="weibull")
    report = json.loads((tmp_path / "runs/eval.json").read_text())
    record, = (record for record in report["records"] if record["category"] == "bottle")
    for name in ("broken_large", "contamination"):
        assert record["both"][name] == pytest.approx(expected[name]["both"])
        assert record["missed"][name] == np.mean(both[test & (kind == name)] <= threshold)
    errors, = (table for table in report["tables"] if table["header"][-1] == "missed any defect")
    missed = np.mean(both[test & (kind != "good")] <= threshold)
    assert [[row[0], row[-1]["mean"]] for row in errors["rows"]] == [["bottle", missed]]


def test_of_a_lone_run_its_table_comes_alone_and_all_adds_the_rest(tmp_path, capsys):
    make_run(tmp_path / "runs/a")
    assert main(["--runs", str(tmp_path / "runs")]) == 0
    out, in_short = capsys.readouterr().out, json.loads((tmp_path / "runs/eval.json").read_text())
    assert out.startswith(run_table(tmp_path / "runs/a")) and "--all" in out.splitlines()[-1]
    assert "reported" not in out and "false alarms" not in out and "protocol:" not in out
    assert main(["--runs", str(tmp_path / "runs"), "--all"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("reported", "false alarms", "Our protocol: "))
    assert json.loads((tmp_path / "runs/eval.json").read_text()) == in_short   # always whole
    assert len(in_short["tables"]) == 2
    make_run(tmp_path / "runs/b", seed=1)
    assert main(["--runs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.startswith("Our protocol: ")


# Command line

def test_standardise_test_heads_every_table(tmp_path, capsys):
    rows = make_run(tmp_path / "runs/a")
    make_run(tmp_path / "runs/b", "bottle", kinds={"good": 4, "crack": 4}, data="mvtec_ad")
    assert main(["--runs", str(tmp_path / "runs"), "--standardise", "test"]) == 0
    out = capsys.readouterr().out
    blocks = re.split(r"(?m)^## ", out)[1:]
    assert len(blocks) == 4
    assert all(block.split("\n")[2].startswith("**LEAKS: ") for block in blocks)
    expected = oracle(rows, "breakfast_box", "test")[0]["logical_anomalies"]["both"]
    assert auroc_lines(out)[1][5] == f"{100 * expected:.1f}"
    report = json.loads((tmp_path / "runs/eval.json").read_text())
    assert all(table["banner"].startswith("LEAKS") for table in report["tables"])
    main(["--runs", str(tmp_path / "runs")])
    assert "LEAKS" not in capsys.readouterr().out


def test_json_holds_records_and_unrounded_tables(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"runs/{seed}", seed=seed)
    file, runs = tmp_path / "out/x.json", tmp_path / "runs"
    assert main([str(runs / "0"), str(runs), "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    logical = [r["both"]["logical"] for r in report["records"]]
    assert len(logical) == 2                                      # a run named twice counts once
    assert not (runs / "eval.json").exists()
    row = next(row for row in report["tables"][0]["rows"] if row[1] == "both")
    assert row[6] == {"mean": pytest.approx(np.mean(logical)),
                      "std": pytest.approx(np.std(logical, ddof=1)), "seeds": 2}


@pytest.mark.parametrize("arguments, word", [
    (["--runs", "none"], "python ladmim.py train --category"),
    ([], "python ladmim.py train --category"), (["nowhere"], "nowhere: no such folder"),
    (["empty"], "no runs under empty"), (["--standardise", "tset"], "tset"), (["--what"], "--what"),
    (["runs", "--json", "precious.json"], "precious.json"),
    (["runs", "--json", "empty"], "empty")])
def test_bad_usage_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "precious.json").write_text("{}")
    if "runs" in arguments:
        make_run(tmp_path / "runs/a")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1 and word in err
    assert (tmp_path / "precious.json").read_text() == "{}"


def edit(name, change):
    def apply(folder):
        text = (folder / name).read_text()
        (folder / name).write_text(change(text))
    return apply


def only(*keep):
    def apply(folder):
        with open(folder / "scores.csv", newline="") as file:
            rows = list(csv.reader(file))[1:]
        write_rows(folder, [r for r in rows if (r[2] if r[1] == "test" else "validation") in keep])
    return apply


def scores(change, word):
    return edit("scores.csv", change), f"scores.csv is damaged, line {word}"


BROKEN = {
    "unfinished": (lambda f: (f / "scores.csv").unlink(), "is unfinished"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "cut config": (edit("config.json", lambda t: t[:40]), "config.json is damaged"),
    "config without seed": (edit("config.json", lambda t: t.replace('"seed"', '"sead"')),
                            "config.json has no valid 'seed'"),
    "config with a number as root": (edit("config.json", lambda t: '{"root": 5,' + t[1:]),
                                     "config.json has no valid 'root'"),
    "config of another shape": (edit("config.json", lambda t: "[1]"), "config.json is damaged"),
    "empty scores": scores(lambda t: "", "0"),
    "header alone": scores(lambda t: t.split("\n")[0] + "\n", "1 (cut off)"),
    "cut within a number": scores(lambda t: t[:-3], "52 (cut off)"),
    "cut within a row": scores(lambda t: t[:-12] + "\n", "52 ("),
    "other columns": scores(lambda t: t.replace("s_hvq", "hvq", 1), "1 (not path,split"),
    "bytes": (lambda f: (f / "scores.csv").write_bytes(b"\xff\x00\xfe"), "damaged, line 1"),
    "NaN": scores(lambda t: re.sub(r"-?\d+\.\d+,0\.0\n$", "nan,0.0\n", t), "52 (a score is NaN"),
    "wrong label": scores(lambda t: t.replace("good,0", "good,1", 1), "2 (split, kind, label"),
    "repeated row": scores(lambda t: t + t.split("\n")[1] + "\n", "53 (split, kind, label"),
    "no anomalies": (only("validation", "good"), "has 12 good images and 0 anomalies"),
    "no good test images": (only("validation", "logical_anomalies"),
                            "has 0 good images and 9 anomalies"),
    "no validation": (only("good", "logical_anomalies"), "no validation normals"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_costs_one_line(tmp_path, capsys, name):
    harm, word = BROKEN[name]
    make_run(tmp_path / "runs/whole")
    make_run(tmp_path / "runs/broken", "pushpins")
    harm(tmp_path / "runs/broken")
    assert main(["--runs", str(tmp_path / "runs")]) == 1
    out, err = capsys.readouterr()
    assert [row[0] for row in auroc_lines(out)[1:]] == ["breakfast_box"]
    assert err.startswith("warning: ") and len(err.splitlines()) == 1
    assert word in err and "runs/broken" in err
    problems = json.loads((tmp_path / "runs/eval.json").read_text())["problems"]
    assert problems == [err.strip().removeprefix("warning: ")]


def test_a_run_that_may_not_be_read_costs_one_line(tmp_path, monkeypatch, capsys):
    """As a folder's listing and open behave for another user than root."""
    def iterdir(folder):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    make_run(tmp_path / "runs/fine")
    (tmp_path / "runs/closed").mkdir()
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", iterdir)
    (tmp_path / "runs/closed/config.json").symlink_to("/proc/1/mem/x")   # an OSError for anyone
    assert main(["--runs", str(tmp_path / "runs")]) == 1
    out, err = capsys.readouterr()
    assert "breakfast_box" in out and err.count("\n") == 1
    assert err.startswith(f"warning: {tmp_path}/runs/closed/config.json: cannot be read")


def test_nothing_but_broken_runs_prints_no_table(tmp_path, capsys):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/checkpoint.pt").write_bytes(b"x")
    assert main(["--runs", str(tmp_path / "runs")]) == 1
    assert capsys.readouterr().out == ""


def test_a_broken_category_leaves_a_multi_class_runs_others(tmp_path):
    rows = make_run(tmp_path / "run", "all")
    write_rows(tmp_path / "run", [row for row in rows
                                  if not (row[0].startswith("pushpins/test") and row[3])])
    records, problems = evaluate_runs([tmp_path / "run"])
    assert [r["category"] for r in records] == [c for c in CATEGORIES if c != "pushpins"]
    assert len(problems) == 1 and "no AUROC for pushpins" in problems[0]


# The table at the end of a training run

def test_run_table(tmp_path):
    rows = make_run(tmp_path / "one", data="twin", rendered=True)
    table = run_table(tmp_path / "one")
    assert table.startswith("## twin (rendered twin, not MVTec's photos), one: AUROC %")
    expected = oracle(rows, "breakfast_box")[0]
    for label, detector in (("HVQ alone", "hvq"), ("MIM alone", "mim"), ("both", "both")):
        assert auroc_lines(table, "one", label)[1][5:7] == [
            f"{100 * expected[f'{k}_anomalies'][detector]:.1f}" for k in ("logical", "structural")]
    make_run(tmp_path / "many", "all")
    assert [r[0] for r in lines_of(run_table(tmp_path / "many"), "many")[1:]] == \
        [name for name in (*CATEGORIES, "mean of 5") for _ in range(3)]


def test_run_table_without_anomalies_says_so(tmp_path):
    make_run(tmp_path / "own", "part", kinds={"good": 5}, data="own")
    words = "no AUROC for part, whose test split has 5 good images and 0 anomalies"
    assert words in run_table(tmp_path / "own")
    make_run(tmp_path / "bare", "part", kinds={}, data="own")
    assert "0 good images and 0 anomalies" in run_table(tmp_path / "bare")


def test_a_defect_may_be_called_any_defect():
    kinds = np.array(["good"] * 4 + ["any defect"] * 2 + ["bent"] * 3)
    scores = np.random.default_rng(0).normal(size=9)
    figures = evaluation.aurocs(kinds, scores)
    assert figures["any defect"] == pytest.approx(roc_auc_score(kinds != "good", scores))


def test_a_photos_name_may_hold_any_character(tmp_path):
    rows = make_run(tmp_path / "run")
    rows[-1][0] = "breakfast_box/test/structural_anomalies/a\rb\nc,d\"e.png"
    write_rows(tmp_path / "run", rows)
    assert evaluation.read_run(tmp_path / "run").path[-1] == rows[-1][0]
