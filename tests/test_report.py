"""Thresholds, ablations and the HTML report of eval.py."""
import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.metrics import f1_score
from sklearn.neighbors import NearestNeighbors

import data
import eval as evaluation
import ladmim
from bench import baselines, report
from test_eval import make_run
from test_ladmim import command

SETTINGS = dict(grid=6, codes=8, code_dim=8, hvq_width=32, hvq_heads=2, mim_width=32, mim_heads=2, mim_blocks=2, masks=4,
                hvq_epochs=2, mim_epochs=2, hvq_score="whitened", mim_score="whitened", codebook="ema", hvq_batch=4)


@pytest.mark.parametrize("seed", range(20))
def test_best_f1_against_every_threshold(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    anomaly, scores = rng.random(n) < 0.5, rng.normal(size=n).round(int(rng.integers(0, 3)))
    anomaly[0] = True
    best = max(f1_score(anomaly, scores > t) for t in [-np.inf, *scores])
    assert f1_score(anomaly, scores > evaluation.best_f1(anomaly, scores)) == pytest.approx(best, abs=1e-12)


def test_bootstrap_interval_is_near_the_binomial_one():
    wrong = np.r_[np.ones(30), np.zeros(70)]
    low, high = evaluation.interval(wrong)
    assert (low, high) == pytest.approx(stats.binom.ppf([0.025, 0.975], 100, 0.3) / 100, abs=0.015)
    assert evaluation.interval([0, 0, 0]) == (0, 0)


def test_errors_at_three_thresholds(tmp_path):
    rows = make_run(tmp_path / "run")
    record = evaluation.evaluate(evaluation.read_run(tmp_path / "run"), "breakfast_box")
    s = np.array([row[4:6] for row in rows])
    normal = np.array([row[1] == "validation" for row in rows])
    total = ((s - s[normal].mean(0)) / s[normal].std(0)).sum(1)
    kinds = np.array([row[2] for row in rows])
    for name, percent in (("95th percentile", 95), ("99th percentile", 99)):
        over = total > np.percentile(total[normal], percent, method="weibull")
        assert record["wrong"][name]["good"] == over[~normal & (kinds == "good")].astype(int).tolist()
        assert record["wrong"][name]["logical"] == (~over[kinds == "logical_anomalies"]).astype(int).tolist()
    assert len(record["wrong"]) == 3 and "bound" in list(record["wrong"])[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small twin of one category, in LOCO's layout."""
    folder = tmp_path_factory.mktemp("twin")
    data.render(folder / "twin", "juice_bottle", {**dict.fromkeys(data.COUNTS, 6), "train": 10}, 256, 1)
    return folder


@pytest.fixture
def small(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(ladmim.PRESETS, "tiny", SETTINGS)
    return folder


def ablation(name, *more):
    words = ["--ablation", name, "--data", "twin", "--category", "juice_bottle", "--seeds", "0-1", *more]
    assert evaluation.main(words) == 0
    return json.loads(open(f"runs/ablation-{name}.json").read())


def test_ablations_train_nothing_twice(small, monkeypatch, capsys):
    fitted, fit = [], ladmim.fit
    monkeypatch.setattr(ladmim, "fit", lambda run, stage, *rest, **more: fitted.append((run.folder.name, stage)) or
                        fit(run, stage, *rest, **more))
    found = ablation("target")
    assert [stage for _, stage in fitted].count("hvq") == 2                       # one a seed, for all four targets
    assert [stage for _, stage in fitted].count("mim") == 8
    assert list(found["records"]) == ["pixel", "feature", "code", "histogram"]
    table = found["tables"][0]["rows"]
    for row in table:
        mine = [record["both"]["logical"] for record in found["records"][row[0]]]
        assert row[3]["mean"] == pytest.approx(np.mean(mine)) and row[3]["std"] == pytest.approx(np.std(mine, ddof=1))
    assert len({row[3]["mean"] for row in table}) > 1                             # they are different models
    assert "REFERENCE ONLY" in found["tables"][1]["title"] and len(found["tables"][1]["rows"]) == 4
    fitted.clear()
    assert ablation("target") == found and not fitted
    assert [path.name for path in evaluation.find_runs([small / "runs"])] == [f"juice_bottle-tiny-seed{n}" for n in (0, 1)]
    assert len(evaluation.find_runs([small / "runs" / "ablations"])) == 8
    combined = ablation("combine")
    assert not fitted and [row[0] for row in combined["tables"][0]["rows"]][:2] == ["pixel MIM alone", "pixel and HVQ"]
    assert combined["tables"][0]["rows"][0][3]["mean"] == np.mean([r["mim"]["logical"] for r in found["records"]["pixel"]])
    for name, rows in (("scoring", 3), ("score", 5), ("leak", 6)):
        assert len(ablation(name)["tables"][0]["rows"]) == rows
        assert not fitted                                                         # they only score anew
    capsys.readouterr()


def test_leaks_are_those_of_the_published_code(small):
    found = ablation("leak", "--seeds", "0")["records"]
    plain, leaky = found["HVQ mean, standardised over validation"][0], found["HVQ mean, standardised over test"][0]
    run = evaluation.read_run(small / "runs/ablations/twin/juice_bottle-tiny-hvq_score=mean,mim_score=mean-seed0")
    assert plain["both"] == evaluation.evaluate(run, "juice_bottle")["both"]
    assert leaky["both"] == evaluation.evaluate(run, "juice_bottle", "test")["both"]
    assert "LEAK" in json.loads(open("runs/ablation-leak.json").read())["tables"][0]["banner"]
    turned = found["HVQ mean, standardised over test, flipped"][0]["both"]
    assert turned["logical"] == max(leaky["both"]["logical"], 1 - leaky["both"]["logical"])


def test_a_run_of_other_settings_is_no_row_of_an_ablation(small, tmp_path, monkeypatch, capsys):
    words = ["--ablation", "scoring", "--data", "twin", "--category", "juice_bottle", "--runs", str(tmp_path)]
    assert evaluation.main(words) == 0
    monkeypatch.setitem(ladmim.PRESETS, "tiny", SETTINGS | {"hvq_lr": 0.5})
    assert evaluation.main(words) == 2 and "other hvq_lr" in capsys.readouterr().err


def test_ctrl_c_in_an_ablation_is_no_traceback(small, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ladmim, "train", interrupted)
    assert evaluation.main(["--ablation", "scoring", "--data", "twin", "--category", "juice_bottle", "--runs", str(tmp_path)]) == 130
    assert "goes on" in capsys.readouterr().err


@pytest.mark.parametrize("name, rows", [("masking", 7), ("width", 4), ("multi", 2)])
def test_the_other_ablations(small, monkeypatch, name, rows):
    monkeypatch.setitem(ladmim.PRESETS, "tiny", {**SETTINGS, "grid": 12, "hvq_epochs": 1, "mim_epochs": 1})
    words = ["--ablation", name, "--data", "twin", "--category", "juice_bottle", "--runs", "others"]
    assert evaluation.main(words) == 0
    tables = json.loads(open(f"others/ablation-{name}.json").read())["tables"]
    assert len(tables[0]["rows"]) == rows
    if name == "multi":                              # the paper's averages over the five categories, Tables 2 and 3
        assert [[round(100 * cell["mean"], 1) for cell in row[2:]] for row in tables[1]["rows"]] == [[88.5, 80.9, 84.7],
                                                                                                     [88.9, 81.4, 85.1]]


class Page(HTMLParser):
    """Collects what the page shows and what it asks for."""

    def __init__(self):
        super().__init__()
        self.images, self.words, self.tags, self.asked = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action"):
                (self.images if value.startswith("data:image/") else self.asked).append(value)

    def handle_data(self, text):
        self.words.append(text)


def test_the_report_is_whole_and_asks_for_nothing(small, capsys):
    assert command("train", "--data", "twin", "--category", "juice_bottle", "--preset", "tiny", "--out", "one/run").returncode == 0
    assert evaluation.main(["one", "--json", "one/x.json"]) == 0
    text = open("runs/eval.html").read()
    page = Page()
    page.feed(text)
    assert not page.asked and "script" not in page.tags and "url(" not in text and "@import" not in text
    assert len(page.images) >= 18 * 3                # every test photo and both its maps
    for source in page.images:
        Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))).verify()
    shown = " ".join(page.words)
    verdicts = re.findall(r"(\d+)\. (\w+)/(\d+)\.png: (-?[\d.]+), (anomaly|good)", shown)
    run = evaluation.read_run(small / "one/run")
    record = evaluation.evaluate(run, "juice_bottle")
    assert [int(rank) for rank, *_ in verdicts] == list(range(1, 19))
    values = [float(value) for *_, value, _ in verdicts]
    assert values == sorted(values, reverse=True)
    flagged = [(kind, verdict == "anomaly") for _, kind, _, _, verdict in verdicts]
    for kind, name in (("good", "good"), ("logical_anomalies", "logical"), ("structural_anomalies", "structural")):
        wrong = [flag != (kind != "good") for k, flag in flagged if k == kind]
        assert sum(wrong) == sum(record["wrong"]["95th percentile"][name])
    rows = {row["path"]: row["score"] for row in map(lambda line: dict(zip(evaluation.HEADER, line.split(","))),
                                                     open("one/run/scores.csv").read().splitlines()[1:])}
    for _, kind, name, value, _ in verdicts:
        assert float(rows[f"juice_bottle/test/{kind}/{name}.png"]) == pytest.approx(float(value), abs=0.006)
    assert "AUROC" in shown and "collision" in shown.lower()


def test_a_report_is_never_written_over_another_file(small, capsys):
    (small / "mine.html").write_text("<p>mine</p>")
    make_run(small / "lone" / "run")
    assert evaluation.main(["lone", "--report", "mine.html", "--json", "lone/x.json"]) == 2
    assert (small / "mine.html").read_text() == "<p>mine</p>"
    assert evaluation.main(["lone", "--report", "lone/x.html", "--json", "lone/x.json"]) == 0
    assert "No pictures" in (small / "lone/x.html").read_text()


def test_roc_plot_draws_the_curve():
    """Perfect separation runs along the left and the upper edge, the reverse along the lower and the right one."""
    labels, scores = np.r_[np.zeros(5), np.ones(5)].astype(int), np.arange(10.0)
    blue = np.array(tuple(int(report.BLUE[i:i + 2], 16) for i in (1, 3, 5)))
    for sign, x, y in ((1, 30, 10), (-1, 330, 310)):
        image = np.array(report.roc_plot({"x": (labels, sign * scores)}))
        assert (image[40:280, x] == blue).all(-1).all() and (image[y, 60:300] == blue).all(-1).all()


def test_patchcore_against_a_plain_loop():
    """With the whole memory, where the coreset leaves nothing out: nearest neighbours by scikit-learn."""
    rng = np.random.default_rng(0)
    h0 = torch.from_numpy(rng.normal(size=(9, 16, 24))).float()
    parts = {"train": torch.arange(5), "validation": torch.arange(5, 7), "test": torch.arange(7, 9)}
    found = baselines.patchcore(lambda index: h0[index], parts, 4, share=1.0)
    square = h0.view(9, 4, 4, 24).numpy()
    seen = np.stack([[[square[b, max(0, i - 1):i + 2, max(0, j - 1):j + 2].mean((0, 1)) for j in range(4)] for i in range(4)]
                     for b in range(9)]).reshape(9, 16, 24)
    bank = seen[:5].reshape(-1, 24)
    search = NearestNeighbors(n_neighbors=9).fit(bank)
    for b, value in zip((5, 6, 7, 8), [*found.validation, *found.test]):
        distance, at = search.kneighbors(seen[b], 1)
        worst = distance[:, 0].argmax()
        others = np.linalg.norm(bank[search.kneighbors(bank[at[worst]], 9)[1][0]] - seen[b, worst], axis=1)
        expected = distance[worst, 0] * (1 - np.exp(distance[worst, 0]) / np.exp(others).sum())
        assert value == pytest.approx(expected, rel=1e-4)


def test_the_coreset_covers_the_memory_better_than_chance():
    """Two far-apart clusters, one of them rare: a tenth chosen greedily holds both."""
    h0 = torch.randn(4, 25, 8, generator=torch.Generator().manual_seed(0))
    h0[3, 12] += 100
    parts = {"train": torch.arange(4), "validation": torch.tensor([3]), "test": torch.tensor([3])}
    assert baselines.patchcore(lambda index: h0[index], parts, 5).test[0] < 5


def test_baselines_beside_a_run(small, monkeypatch, capsys):
    monkeypatch.setattr(baselines, "STEPS", {"cpu": 2, "cuda": 2})
    for seed in (0, 1):
        assert command("train", "--data", "twin", "--category", "juice_bottle", "--preset", "tiny", "--seed", seed, "--image-size", "125",
                       "--out", f"two/run{seed}").returncode == 0
    assert evaluation.main(["two", "--baselines"]) == 0
    found = json.loads(open("runs/baselines.json").read())
    assert [row[0].split(",")[0] for row in found["tables"][0]["rows"]] == ["EfficientAD-S", "LADMIM", "PUAD", "PatchCore"]
    ours = [evaluation.evaluate(evaluation.read_run(small / f"two/run{seed}"), "juice_bottle")["both"] for seed in (0, 1)]
    assert [r["both"] for r in found["records"] if r["system"] == "LADMIM"] == ours
    assert all(0 <= r["both"]["average"] <= 1 and r["train"] > 0 and r["image"] > 0 for r in found["records"])
    assert len({r["both"]["average"] for r in found["records"]}) > 4
    capsys.readouterr()
