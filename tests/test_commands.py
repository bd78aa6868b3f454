"""train and predict as a user types them."""
import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN, checkpoint, command, make_photos, one_error, score_rows, trains
from PIL import Image

import eval as evaluation
import ladmim


def as_process(file, *args, cwd):
    return subprocess.run([sys.executable, file, *args], cwd=cwd, capture_output=True, text=True)


# train

def test_train_writes_a_whole_run(trained):
    folder, result = trained
    run = folder / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["category"] == "widgets" and config["data"] == "photos"
    assert config["rendered"] is False and config["grid"] == 4 and config["seed"] == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["hvq"] * 3 + ["mim"] * 3 + ["score"]
    assert all(len(line["codes_used"]) == len(line["perplexity"]) == 4 for line in lines[:3])
    rows = score_rows(run)
    assert len(rows) == 16 and sum(row["split"] == "validation" for row in rows) == 4
    assert {row["path"].split("/")[0] for row in rows} == {"widgets"}
    total = np.array([float(row["score"]) for row in rows if row["split"] == "validation"])
    assert abs(total.mean()) < 1e-6                  # standardised on these and on nothing else
    assert "widgets" in result.stdout and "logical" in result.stdout


def test_scores_csv_holds_raw_scores_and_the_standardised_sum(trained):
    run = trained[0] / "run"
    (mean_hvq, std_hvq), (mean_mim, std_mim) = (
        checkpoint(run)["calibration"]["widgets"][name] for name in ("hvq", "mim"))
    rows = score_rows(run)
    validation = [[float(row["s_hvq"]), float(row["s_mim"])] for row in rows
                  if row["split"] == "validation"]
    np.testing.assert_allclose(np.mean(validation, 0), (mean_hvq, mean_mim), rtol=1e-5, atol=1e-6)
    for row in rows:
        expected = ((float(row["s_hvq"]) - mean_hvq) / std_hvq
                    + (float(row["s_mim"]) - mean_mim) / std_mim)
        assert float(row["score"]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("train, validation", [(3, 0), (4, 0), (1, 3), (2, 1)])
def test_hardly_any_photos_give_scores_that_are_numbers(tmp_path, train, validation):
    make_photos(tmp_path / "photos", train=train, validation=validation)
    assert "structural" in trains("--out", "run", cwd=tmp_path).stdout
    rows = score_rows(tmp_path / "run")
    assert max(abs(float(row["score"])) for row in rows if row["kind"] == "good") < 1e6
    predicted = command("predict", "photos/widgets/test", "--run", "run", "--json", cwd=tmp_path)
    scores = [json.loads(line)["score"] for line in predicted.stdout.splitlines()]
    assert len(scores) == 12 and all(map(math.isfinite, scores))


def test_a_test_split_without_anomalies_is_refused_and_none_at_all_is_not(tmp_path):
    make_photos(tmp_path / "photos", bad=0)
    result = command(*TRAIN, "--out", "run", cwd=tmp_path)
    assert "no anomalies" in one_error(result) and len(result.stderr.splitlines()) == 1
    shutil.rmtree(tmp_path / "photos/widgets/test")
    trains("--out", "run", cwd=tmp_path)
    assert len(score_rows(tmp_path / "run")) == 4


def test_a_mistake_in_a_later_run_is_said_before_the_first_is_trained(tmp_path):
    """A category without good test photos, a folder that holds a run with other settings."""
    make_photos(tmp_path / "photos", "bolts")
    make_photos(tmp_path / "photos", "nuts", good=0)
    both = [*TRAIN[:3], "--category", "bolts,nuts", *TRAIN[5:], "--separate", "--out", "both"]
    assert "nuts: its test split has no good photos" in one_error(command(*both, cwd=tmp_path))
    bolts = [*TRAIN[:3], "--category", "bolts", *TRAIN[5:], "--out"]
    trained = command(*bolts, "seeds/bolts-tiny-seed1", "--seed", 1, "--masks", 5, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    error = one_error(command(*bolts, "seeds", "--seeds", "0-1", cwd=tmp_path))
    assert "seed1: holds a run with masks = 5, asked for 4" in error
    assert not (tmp_path / "both").exists()
    assert [path.name for path in (tmp_path / "seeds").iterdir()] == ["bolts-tiny-seed1"]


@pytest.mark.parametrize("args, names", [
    (["--category", "widgit"], "widgets"),
    (["--category", "widgets", "--data", "nowhere"], "nowhere"),
    (["--category", "widgets", "--device", "cuda"], "--device"),
    (["--category", "widgets", "--preset", "huge"], "--preset"),
    (["--category", "widgets", "--pdn", "none.pt"], "--pdn"),
    (["--category", "widgets", "--hvq-epochs", "-1"], "--hvq-epochs"),
    (["--category", "widgets", "--grid", "7"], "--grid"),
    (["--category", "widgets", "--masks", "0"], "--masks"),
    (["--category", "widgets", "--hvq-lr", "nan"], "--hvq-lr"),
    (["--category", "widgets", "--hvq-clip", "0"], "--hvq-clip"),
    (["--category", "widgets", "--mim-clip", "0"], "--mim-clip"),
    (["--category", "widgets", "--hvq-heads", "5"], "--hvq-heads"),
    (["--category", "widgets", "--score-ratio", "1.5"], "--score-ratio"),
    (["--category", "empty"], "empty"),
    (["--category", "widgets", "--seeds", "4-0"], "--seeds"),
    (["--category", "widgets", "--seed", "-1"], "--seed"),
    (["--category", "widgets", "--seed", "1" * 30], "--seed"),
    (["--category", "widgets", "--seeds", "0,x"], "--seeds"),
    (["--category", "widgets", "--out", __file__], "is no folder"),
    ([], "--category"),
])
def test_every_mistake_is_one_line_and_exit_code_2(trained, tmp_path, args, names):
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("this machine has the GPU whose absence is tested")
    (tmp_path / "photos/empty/train/good").mkdir(parents=True)
    (tmp_path / "photos/widgets").symlink_to(trained[0] / "photos/widgets")
    if "--data" not in args:
        args = [*args, "--data", "photos"]
    result = command("train", *args, cwd=tmp_path)
    assert result.returncode == 2 and names in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_wrong_choice_of_kernels_is_one_line(trained, monkeypatch):
    for choice, names in (("fast", "torch or triton"), ("triton", "LADMIM_KERNELS=triton")):
        if choice == "fast" or not torch.cuda.is_available():
            monkeypatch.setenv("LADMIM_KERNELS", choice)
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
            result = command("predict", "photos", "--run", "run", cwd=trained[0])
            assert result.returncode == 2 and names in one_error(result)


# predict

@pytest.mark.parametrize("settings", [(), ("--target", "code", "--mim-score", "deviations")])
def test_predict_agrees_with_scores_csv(trained, tmp_path, settings):
    """Its structural and logical scores are standardised, those of scores.csv are not."""
    folder, _ = trained
    run = tmp_path / "run" if settings else folder / "run"
    if settings:
        trains("--take", "run", "--out", str(run), *settings, cwd=folder)
    result = command("predict", "photos/widgets/test", "--run", str(run), "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    rows = {f"photos/{row['path']}": row for row in score_rows(run)}
    normal = checkpoint(run)["calibration"]["widgets"]
    assert len(lines) == 12
    for line in lines:
        assert list(line) == ["path", "verdict", "score", "threshold", "structural", "logical",
                              "decided"]
        row = rows[line["path"]]
        for key, name in (("structural", "hvq"), ("logical", "mim")):
            mean, std = normal[name]
            expected = (float(row[f"s_{name}"]) - mean) / std
            assert line[key] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert line["score"] == pytest.approx(float(row["score"]), rel=1e-3, abs=1e-3)
        assert line["score"] == pytest.approx(line["structural"] + line["logical"], abs=3e-4,
                                              rel=1e-6)
        assert line["threshold"] == pytest.approx(normal["threshold"], abs=1e-4)
        assert line["verdict"] == ("anomaly" if line["score"] > line["threshold"] else "good")
        larger = max("structural", "logical", key=line.get)
        assert line["decided"] == larger


def test_predicts_lines_say_what_json_says(trained):
    folder, _ = trained
    asked = ("predict", "photos/widgets/test", "--run", "run")
    plain, as_json = (command(*asked, *more, cwd=folder).stdout.splitlines()
                      for more in ((), ("--json",)))
    for text, line in zip(plain, map(json.loads, as_json), strict=True):
        verdict, score = text.split()[:2]
        assert verdict == line["verdict"] and float(score) == pytest.approx(line["score"], abs=0.01)
        assert text.endswith(line["path"])
        assert f"(structural {line['structural']:.2f}, logical {line['logical']:.2f})" in text


def test_heat_maps_show_the_photo_the_map_beside_it_and_the_verdict_below(trained, tmp_path):
    folder, _ = trained
    maps = tmp_path / "maps"
    result = command("predict", "photos/widgets/test", "--run", "run", "--heatmap", maps,
                     cwd=folder)
    assert result.returncode == 0, result.stderr
    names = [f"{kind}_{i:03}" for kind in ("good", "logical_anomalies", "structural_anomalies")
             for i in range(4)]
    assert sorted(path.stem for path in maps.iterdir()) == names
    for name in names:
        kind, number = name.rsplit("_", 1)
        photo = np.asarray(Image.open(folder / f"photos/widgets/test/{kind}/{number}.png"))
        sheet = np.asarray(Image.open(maps / f"{name}.png").convert("RGB"))
        assert sheet.shape == (64 + 2 * 16, 2 * 64 + 8, 3)
        assert np.array_equal(sheet[:64, :64], photo)
        assert (sheet[:64, 64:72] == 255).all() and sheet[64:].min() < 128
    redder = []                                      # the right side, of a structural anomaly
    for i in range(4):
        sheet = np.asarray(Image.open(maps / f"structural_anomalies_{i:03}.png").convert("RGB"))
        redder.append((sheet[:64, 72:, 0].astype(int) - sheet[:64, :64, 0]).max())
    assert max(redder) > 50


def test_heat_maps_are_not_drawn_among_the_photos(trained):
    folder, _ = trained
    result = command("predict", "photos/widgets/test/good", "--run", "run", "--heatmap",
                     "photos/widgets/test/good", cwd=folder)
    assert "holds the photos themselves" in one_error(result)


def test_predict_goes_on_past_a_bad_photo(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    good = folder / "photos/widgets/test/good/000.png"
    result = command("predict", tmp_path / "bad.png", good, "--run", folder / "run")
    assert result.returncode == 1 and "bad.png" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_the_last_line_counts_what_was_flagged_and_a_bad_photo_has_a_record(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    asked = ("predict", tmp_path / "bad.png", "photos/widgets/test", "--run", "run", "--json")
    result = command(*asked, "--csv", tmp_path / "out/all.csv", cwd=folder)
    assert result.returncode == 1
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["verdict"] == "unreadable" for record in records] == [True] + [False] * 12
    assert "cannot be read as an image" in records[0]["error"]
    flagged = sum(record["verdict"] == "anomaly" for record in records)
    assert 0 < flagged < 12
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"{flagged} of 13 photos flagged, 1 unreadable; threshold ")
    assert "the largest of 4 validation photos, so one good photo in 5" in last
    with open(tmp_path / "out/all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13                           # the same as in JSON
    for row, record in zip(rows, records):
        assert {key: value for key, value in row.items() if value} == {
            key: str(value) for key, value in record.items()}


def test_a_table_never_replaces_another_file_and_is_kept_at_ctrl_c(trained, tmp_path, monkeypatch):
    folder, file = trained[0], tmp_path / "mine.csv"
    file.write_text("my,own\n")
    asked = ("predict", "photos/widgets/test", "--run", "run", "--csv", file)
    assert str(file) in one_error(command(*asked, cwd=folder)) and file.read_text() == "my,own\n"
    file.unlink()
    os.mkfifo(file)                                  # of a pipe nothing may be read, or it waits
    assert str(file) in one_error(command(*asked, cwd=folder))
    file.unlink()
    whole, calls = ladmim.Detector.__call__, []

    def interrupted(self, images):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return whole(self, images)

    with monkeypatch.context() as patched:
        patched.setattr(ladmim.Detector, "__call__", interrupted)
        assert command(*asked, cwd=folder).returncode == 130
    assert len(file.read_text().splitlines()) == 1 + 8
    assert command(*asked, cwd=folder).returncode == 0      # its own it replaces
    assert len(file.read_text().splitlines()) == 1 + 12
    with monkeypatch.context() as patched:           # and keeps, where nothing new was judged
        patched.setattr(ladmim.Detector, "__call__", interrupted)
        assert command(*asked, cwd=folder).returncode == 130
    assert len(file.read_text().splitlines()) == 1 + 12


def test_a_photo_that_is_gone_before_its_heat_map_keeps_its_verdict(trained, tmp_path, monkeypatch):
    folder, whole = trained[0], ladmim.Detector.__call__
    shutil.copytree(folder / "photos/widgets/test/good", tmp_path / "good")

    def vanishes(self, images):
        (tmp_path / "good/001.png").unlink()
        return whole(self, images)

    monkeypatch.setattr(ladmim.Detector, "__call__", vanishes)
    result = command("predict", "good", "--run", folder / "run", "--heatmap", "maps", "--csv",
                     "all.csv", cwd=tmp_path)
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 4
    assert "error: good/001.png: no such file" in result.stderr and "0 unreadable" in result.stderr
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [
        "000.png", "002.png", "003.png"]
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["error"]) for row in rows] == [False, True, False, False]
    assert all(row["verdict"] in ("good", "anomaly") for row in rows)


def test_thresholds_as_asked_for(trained):
    """A number as it is; a share of false alarms as NumPy's percentile of the validation scores."""
    folder, _ = trained
    scores = [float(row["score"]) for row in score_rows(folder / "run")
              if row["split"] == "validation"]

    def asked(*more):
        result = command("predict", "photos/widgets/test", "--run", "run", "--json", *more,
                         cwd=folder)
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        for line in lines:
            assert line["verdict"] == ("anomaly" if line["score"] > line["threshold"] else "good")
        return result, {line["threshold"] for line in lines}

    result, thresholds = asked("--threshold", "-1.5")
    assert thresholds == {-1.5} and result.stderr.splitlines()[-1].endswith("-1.50: as given")
    for share, few in ((0.4, False), (0.2, False), (0.1, True), (0.01, True)):
        result, (threshold,) = asked("--false-alarms", share)
        expected = np.percentile(scores, 100 * (1 - share), method="weibull")
        assert threshold == pytest.approx(expected, abs=1e-4)
        warned = result.stderr.startswith(f"warning: --false-alarms {share}: its threshold is the "
                                          "largest of 4 validation photos")
        assert warned == few
        assert few or f"{100 * share:g} % of further good" in result.stderr.splitlines()[-1]
    for wrong in (["--false-alarms", "0"], ["--false-alarms", "0.5"], ["--false-alarms", "nan"],
                  ["--threshold", "nan"], ["--threshold", "1", "--false-alarms", "0.1"]):
        result, thresholds = asked(*wrong)
        assert wrong[-2] in one_error(result) and not thresholds


def test_a_lone_checkpoint_still_predicts(trained, tmp_path):
    folder, _ = trained
    shutil.copy(folder / "run/checkpoint.pt", tmp_path)
    lone, whole = (command("predict", folder / "photos/widgets/test", "--run", run)
                   for run in (tmp_path, folder / "run"))
    assert lone.returncode == 0 and lone.stdout == whole.stdout
    shutil.copy(folder / "run/scores.csv", tmp_path)         # of use beside config.json only
    half = command("predict", folder / "photos/widgets/test", "--run", tmp_path)
    assert half.returncode == 0 and half.stdout == whole.stdout
    asked = ("predict", folder / "photos/widgets/test", "--run", tmp_path, "--false-alarms", "0.1")
    assert str(tmp_path) in one_error(command(*asked))


def test_training_ends_with_the_next_command_and_what_the_threshold_is_worth(trained, tmp_path):
    """The command works as it is printed."""
    folder, result = trained
    worth, following = result.stdout.splitlines()[-2:]
    threshold = checkpoint(folder / "run")["calibration"]["widgets"]["threshold"]
    assert worth.startswith(f"threshold of widgets: {threshold:.2f}; the largest of 4 validation")
    assert "one good photo in 5 is expected above it; 5 % needs 19" in worth
    start, _, rest = following.partition(" PHOTO_OR_FOLDER... ")
    assert start == "next: python ladmim.py predict"
    assert command("predict", "photos/widgets/test", *shlex.split(rest), cwd=folder).returncode == 0


def predicting(folder):
    """`predict` on more photos than a pipe and the buffers hold, once its first line is there."""
    photos = ["photos/widgets/test"] * 40
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # ignored behind a shell's &
    process = subprocess.Popen([sys.executable, "-u", ladmim.__file__, "predict", *photos, "--run",
                                "run"], cwd=folder, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    assert process.stdout.readline().split()[0] in ("good", "anomaly")
    return process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="pipes close in another way")
def test_predict_into_a_pipe_that_closes_ends_quietly(trained):
    """As with `| head`: the first line is read, and nobody reads the others."""
    process = predicting(trained[0])
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_predict_stopped_by_ctrl_c_is_one_line(trained):
    process = predicting(trained[0])
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == (
        "\nstopped; what is printed is done, and the same train command goes on from its last "
        "checkpoint\n")
    assert process.returncode == 130


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_names_that_are_not_utf_8_or_not_in_the_terminals_encoding(tmp_path):
    """A category and a defect with bytes of Latin-1, from training to the tables and verdicts."""
    category, defect = os.fsdecode(b"w\xff\xe9"), os.fsdecode("gr\xf6\xdfe".encode("latin-1"))
    test = make_photos(tmp_path / "photos", category) / category / "test"
    (test / "logical_anomalies").rename(test / defect)
    asked = (*TRAIN, "--category", category, "--out", "run")
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import eval, ladmim; "
            "sys.exit(ladmim.main(sys.argv[1:]) or eval.main(['run', '--json', 'e.json']) or "
            "ladmim.main(['predict', 'photos', '--run', 'run', '--heatmap', 'maps']))")
    done = subprocess.run([sys.executable, "-c", code, Path(ladmim.__file__).parent, *asked],
                          cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "w\\udcff\\udce9" in done.stdout and "gr\\udcf6\\udcdfe" in done.stdout
    kinds = [os.fsencode(row["kind"]) for row in evaluation.csv.DictReader(
        evaluation.read_text(tmp_path / "run/scores.csv").splitlines())]
    assert kinds.count(os.fsencode(defect)) == 4 and len(list((tmp_path / "maps").iterdir())) == 28


# Commands

def test_help_says_that_photos_are_squashed():
    for name in ("train", "predict"):
        assert "squashed to a square" in " ".join(command(name, "--help").stdout.split())


def test_the_command_line_as_a_process(tmp_path):
    result = as_process(ladmim.__file__, "predict", "x.png", "--run", "nowhere", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: --run nowhere")
    assert len(result.stderr.splitlines()) == 1
