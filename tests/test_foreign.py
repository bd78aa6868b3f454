"""What is not ours is left alone: files of the user's that lie where a command writes."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TRAIN, command, make_photos, one_error, trains
from PIL import Image
from test_data import picture

import predict
from bench import figure3, localise, report
from data import flat_names
from weights import distill

ROOT = Path(predict.__file__).parent


def test_a_cache_folder_may_hold_unfinished_files_of_others(photos):
    (photos / "own").mkdir()
    names = ("pdn.pt.part", "x.part", "a" * 40 + ".part", f"{'a' * 40}.{'b' * 8}.part")
    for name in names:
        (photos / "own" / name).write_text("days of work")
        os.utime(photos / "own" / name, (time.time() - 200_000,) * 2)
    trains("--out", "run", "--cache", "own", cwd=photos)
    assert {file.name for file in (photos / "own").glob("*.part")} == set(names[:3])


def test_a_heat_map_replaces_no_photo(trained, tmp_path):
    shutil.copytree(trained[0] / "photos/widgets", tmp_path / "widgets")
    (tmp_path / "run").symlink_to(trained[0] / "run")
    train = tmp_path / "widgets/train/good"
    before = [file.read_bytes() for file in sorted(train.iterdir())]
    asked = ("predict", "widgets/test/good", "--run", "run", "--heatmap")
    assert "000.png" in one_error(command(*asked, "widgets/train/good", cwd=tmp_path))
    assert [file.read_bytes() for file in sorted(train.iterdir())] == before
    for _ in range(2):                               # earlier heat maps are replaced
        assert command(*asked, "maps", cwd=tmp_path).returncode == 0


def test_heat_maps_of_photos_with_very_long_names(trained, tmp_path):
    (tmp_path / "run").symlink_to(trained[0] / "run")
    names = ["a" * 250 + ".png", "a" * 249 + "b.png"]
    for name in names:
        picture(tmp_path / "shots" / name)
    assert command("predict", "shots", "--run", "run", "--heatmap", "maps",
                   cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "maps").iterdir())) == 2
    assert flat_names([tmp_path / "a.png", tmp_path / ("ä" * 99 + ".png")])[1] == "ä" * 99


def test_hidden_files_in_a_run_folder_stay(photos):
    (photos / "run/.folder.new").mkdir(parents=True)
    for name in (".notes.new", f".{'a' * 16}.new"):
        (photos / "run" / name).write_text("mine")
    trains("--out", "run", cwd=photos)
    left = {file.name for file in (photos / "run").glob(".*")}
    assert left == {".folder.new", ".notes.new"}     # the other has a name as `train` gives


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "scores.csv", "maps.npz"])
def test_a_folder_of_others_is_no_run_folder(photos, name):
    (photos / "own").mkdir()
    for mine in (name, "lock"):
        (photos / "own" / mine).write_text('{"mine": 1, "preset": "ts-jest"}')
    line = one_error(command(*TRAIN, "--out", "own", cwd=photos))
    assert name in line and "name another" in line
    assert sorted(file.name for file in (photos / "own").iterdir()) == sorted((name, "lock"))
    assert all("mine" in file.read_text() for file in (photos / "own").iterdir())


def test_a_figure_replaces_figures_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figure3, "points", lambda args: ({"LADMIM": [(8, 70)]}, "twin"))
    picture(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    assert figure3.main(["--out", "mine.png"]) == 2 and "mine.png" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == before
    for _ in range(2):
        assert figure3.main(["--out", "new/figure.png"]) == 0
    assert Image.open("new/figure.png").size == (720, 480)


@pytest.mark.parametrize("folder", [False, True])
def test_distilled_weights_replace_weights_only(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir() if folder else (tmp_path / "mine").write_text("mine")
    assert distill.main(["--images", ".", "--out", "mine"]) == 2
    assert "--out mine" in capsys.readouterr().err
    assert folder or (tmp_path / "mine").read_text() == "mine"


def test_a_data_set_that_moved_is_found_again(photos, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    (photos / "photos").unlink()
    make_photos(photos / "photos")
    trains("--out", "run", cwd=photos)
    (photos / "photos").rename(photos / "moved")
    assert localise.main(["run"]) == 1
    assert "put them back, or give its train command their --data" in capsys.readouterr().err
    (photos / "elsewhere").mkdir()                   # its own name is a setting
    (photos / "moved").rename(photos / "elsewhere/photos")
    again = [part if part != "photos" else "elsewhere/photos" for part in TRAIN]
    assert command(*again, "--out", "run", cwd=photos).returncode == 0
    capsys.readouterr()
    assert report.main(["run", "--out", "report.html"]) == 0
    assert "No pictures" not in (photos / "report.html").read_text()


def test_thresholds_need_no_infinite_number_of_photos():
    assert predict.worth(20, 1e-6)[0] is False


@pytest.mark.parametrize("share", ["1e-320", "0", "nan", "1"])
def test_a_share_that_no_photos_can_give_is_one_line(trained, share):
    line = one_error(command("predict", "photos/widgets/test", "--run", "run", "--false-alarms",
                             share, cwd=trained[0]))
    assert "--false-alarms" in line


@pytest.mark.parametrize("options", [("--seconds", "nan"), ("--seconds", "-1"),
                                     ("--preset", "authors")])
def test_a_benchmark_of_nothing_is_one_line(options, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "bench/run.py", *options, "--out", tmp_path],
                          capture_output=True, text=True)
    line, = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert done.returncode == 2 and options[0] in line and not list(tmp_path.iterdir())
