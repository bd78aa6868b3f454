"""bench/report.py's HTML file, and where reports of eval.py's kind may be written."""
import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from conftest import command
from test_eval import make_run

import eval as evaluation
import ladmim
from bench import baselines, localise, report
from twin.render import COUNTS, render

SETTINGS = dict(grid=6, codes=8, code_dim=8, hvq_width=32, hvq_heads=2, mim_width=32, mim_heads=2,
                mim_blocks=2, masks=4, hvq_epochs=2, mim_epochs=2, hvq_score="deviations",
                mim_score="whitened", codebook="ema", hvq_batch=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small twin of one category, in LOCO's layout."""
    folder = tmp_path_factory.mktemp("twin")
    render(folder / "twin", "juice_bottle", {**dict.fromkeys(COUNTS, 6), "train": 10}, 256, 1)
    return folder


@pytest.fixture
def small(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(ladmim.PRESETS, "tiny", SETTINGS)
    return folder


def train(out, *more):
    words = ["--data", "twin", "--category", "juice_bottle", "--preset", "tiny", "--out", out]
    result = command("train", *words, *more)
    assert result.returncode == 0, result.stderr


class Page(HTMLParser):
    """Collects what the page shows and what it asks for."""

    def __init__(self):
        super().__init__()
        self.images, self.words, self.tags, self.asked = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action"):
                inside = value.startswith("data:image/")
                (self.images if inside else self.asked).append(value)

    def handle_data(self, text):
        self.words.append(text)


def test_the_report_is_whole_and_asks_for_nothing(small, capsys):
    train("one/run")
    assert report.main(["one"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "runs/report.html"
    text = open("runs/report.html").read()
    page = Page()
    page.feed(text)
    assert not page.asked and "script" not in page.tags
    assert "url(" not in text and "@import" not in text
    assert len(page.images) >= 18 * 3                # every test photo and both its maps
    for source in page.images:
        Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))).verify()
    shown = " ".join(page.words)
    verdicts = re.findall(r"(\d+)\. (\w+)/(\d+)\.png: (-?[\d.]+), (anomaly|good)", shown)
    record = evaluation.evaluate(evaluation.read_run(small / "one/run"), "juice_bottle")
    assert [int(rank) for rank, *_ in verdicts] == list(range(1, 19))
    values = [float(value) for *_, value, _ in verdicts]
    assert values == sorted(values, reverse=True)
    for kind, rate in (("good", record["false alarms"]["good"]),
                       ("logical_anomalies", record["missed"]["logical"]),
                       ("structural_anomalies", record["missed"]["structural"])):
        wrong = [(verdict == "anomaly") != (kind != "good")
                 for _, k, _, _, verdict in verdicts if k == kind]
        assert len(wrong) == 6 and np.mean(wrong) == pytest.approx(rate)
    lines = open("one/run/scores.csv").read().splitlines()[1:]
    rows = {path: float(score) for path, *_, score in (line.split(",") for line in lines)}
    for _, kind, name, value, _ in verdicts:
        path = f"juice_bottle/test/{kind}/{name}.png"
        assert rows[path] == pytest.approx(float(value), abs=0.006)
    table = evaluation.all_tables([record])[0]
    for cell in [table[0], *table[1], *map(evaluation.cell_text, table[2][0])]:
        assert cell in page.words


def test_pictures_come_before_tables_and_a_summary_before_both(small, capsys):
    train("one/run")
    assert report.main(["one", "--out", "order.html"]) == 0
    text, record = open("order.html").read(), evaluation.evaluate(
        evaluation.read_run(small / "one/run"), "juice_bottle")
    missed = sum(round(6 * rate) for rate in record["missed"].values())
    counts = (f"{round(6 * record['false alarms']['good'])} of 6 good photos are flagged, "
              f"{missed} of 12 anomalies missed")
    average = f"average {100 * record['both']['average']:.1f}"
    order = [text.index(part) for part in (average, counts, "Worst mistakes", "<img", "<table")]
    assert order == sorted(order)


@pytest.mark.parametrize("width, height, size", [
    (300, 150, (128, 64)), (100, 200, (64, 128)), (40, 20, (128, 64)), (2000, 3, (128, 1))])
def test_thumbnails_keep_the_photos_shape(tmp_path, width, height, size):
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    judged = report.Judged(tmp_path / "a.png", "a", 0, 0.0, False, {"structural": np.ones((4, 4)),
                                                                   "logical": np.ones((4, 4))})
    assert judged.thumbnail(0).size == size
    detector = SimpleNamespace(white=0, cfg=SimpleNamespace(image_size=64))
    for source in re.findall(r"base64,([^\"]*)", report.card(judged, 1, detector)):
        assert Image.open(io.BytesIO(base64.b64decode(source))).size == size


def test_histograms_show_the_codes_that_differ(monkeypatch):
    """The ground's code is by far the most frequent and as predicted: it leaves its place."""
    p, q = np.full((1, 20), 0.01), np.full((1, 20), 0.01)
    p[0, :4] = q[0, :4] = 0.2                        # the ground
    q[0, 4:] += np.linspace(-0.005, 0.005, 16)       # all others differ, if by little
    image = np.asarray(report.histogram_plot(p, q))
    bars = (image == np.array([0x6a, 0xa5, 0xf0])).all(-1)[40:77]
    assert bars.any() and bars.sum(0).max() <= 3 + 48 * 0.015 / 0.2


def test_a_report_is_never_written_over_another_file(small, capsys):
    (small / "mine.html").write_text("<p>mine</p>")
    make_run(small / "lone" / "run")
    assert report.main(["lone", "--out", "mine.html"]) == 2
    assert "mine.html" in capsys.readouterr().err
    assert (small / "mine.html").read_text() == "<p>mine</p>"
    for _ in range(2):                               # its own it replaces
        assert report.main(["lone", "--out", "lone/x.html"]) == 1    # its photos are not there
        assert "photos are no longer" in capsys.readouterr().err
        assert "No pictures" in (small / "lone/x.html").read_text()


@pytest.mark.parametrize("tool, option", [(report, "--out"), (localise, "--json"),
                                          (baselines, "--json"), (evaluation, "--json")])
def test_a_file_that_is_not_ours_is_named_before_the_work(small, monkeypatch, capsys, tool, option):
    (small / "mine.txt").write_text("mine")
    make_run(small / "lone" / "run")
    monkeypatch.setattr(evaluation, "evaluate_runs", lambda *_: pytest.fail("it began the work"))
    assert tool.main(["lone", option, "mine.txt"]) == 2
    assert "mine.txt exists and was not written by" in capsys.readouterr().err
    assert (small / "mine.txt").read_text() == "mine"


def test_a_broken_run_costs_one_line(small, capsys):
    make_run(small / "broken" / "run")
    make_run(small / "broken" / "other", category="pushpins")
    (small / "broken/run/scores.csv").unlink()
    assert report.main(["broken", "--out", "broken/x.html"]) == 1
    err = capsys.readouterr().err
    unfinished, no_photos = err.splitlines()
    assert unfinished.startswith("warning: ") and "broken/run" in unfinished
    assert "broken/other" in no_photos and "no longer" in no_photos
    assert "pushpins" in (small / "broken/x.html").read_text()


def test_wrong_kernels_are_one_line(small, monkeypatch, capsys):
    train("kernels/run")
    monkeypatch.setenv("LADMIM_KERNELS", "foo")
    assert report.main(["kernels", "--out", "kernels/x.html"]) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "LADMIM_KERNELS=foo" in line


@pytest.mark.parametrize("arguments, word", [
    (["none"], "none: no such folder"), (["--what"], "--what"), (["--runs", "none"], "no runs"),
    (["lone", "--out", "twin"], "twin"), (["--standardise", "test"], "--standardise")])
def test_a_wrong_option_is_one_line(small, capsys, arguments, word):
    make_run(small / "lone" / "run")
    assert report.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and word in err and len(err.splitlines()) == 1


def test_a_report_below_a_file_is_one_line(tmp_path, capsys):
    make_run(tmp_path / "runs/a")
    (tmp_path / "file").write_text("x")
    file = str(tmp_path / "file/x.json")
    assert evaluation.main(["--runs", str(tmp_path / "runs"), "--json", file]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {tmp_path / 'file'}: cannot be used")


def test_data_sets_of_one_name_in_two_folders_are_two(tmp_path, capsys):
    """Where both are there; a data set that has moved is one."""
    for number, place in enumerate(("here", "there", "gone")):
        (tmp_path / place / "mvtec_loco").mkdir(parents=True)
        root = str(tmp_path / place / "mvtec_loco")
        make_run(tmp_path / f"runs/{place}", seed=number, root=root)
    (tmp_path / "gone/mvtec_loco").rmdir()
    assert evaluation.main(["--runs", str(tmp_path / "runs"), "--all"]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": AUROC %")]
    assert titles == [f"## mvtec_loco in {tmp_path / 'gone'}: AUROC %",
                      f"## mvtec_loco in {tmp_path / 'here'}: AUROC %",
                      f"## mvtec_loco in {tmp_path / 'there'}: AUROC %"]
    (tmp_path / "there/mvtec_loco").rmdir()
    assert evaluation.main(["--runs", str(tmp_path / "runs"), "--all"]) == 0
    assert "## mvtec_loco: AUROC %" in capsys.readouterr().out.splitlines()
