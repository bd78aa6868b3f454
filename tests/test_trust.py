"""What must not be lost: kills at any moment, a full disk, two trainings in one folder, Ctrl-C."""
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (TRAIN, checkpoint, command, errors_of, fork_commands, learned_the_same,
                      new_run, one_error, trains)

import data
import eval as evaluation
import ladmim
import predict
import runs
from data import InputError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

# A process kills itself at the event that KILL names: the n-th step, scoring of a batch, or save of
# a file, "half" where the file beside is only half written, "whole" where it is not yet renamed.
DEADLY = """
import collections, pathlib, shutil, signal
runs.SAVE_EVERY = 0                                  # a checkpoint every epoch
counts, replace = collections.Counter(), os.replace

def happens(event):
    counts[event] += 1
    if os.environ.get("KILL") == f"{event} {counts[event]}":
        if os.path.exists("run/checkpoint.pt"):
            shutil.copy("run/checkpoint.pt", os.environ["SEEN"])
        os.kill(os.getpid(), signal.SIGKILL)

def announced(name):
    real = getattr(ladmim, name)
    def call(*arguments, **named):
        happens(name)
        return real(*arguments, **named)
    setattr(ladmim, name, call)

def deadly_replace(source, target):
    target = pathlib.Path(target)
    name = "features" if target.parent.name == "own" else target.name
    happens(f"whole {name}")
    if os.environ.get("KILL") == f"half {name} {counts[f'half {name}'] + 1}":
        os.truncate(source, os.path.getsize(source) // 2)
    happens(f"half {name}")
    replace(source, target)

announced("descend")
announced("errors")
os.replace = deadly_replace
"""
# Each training goes on where the one before was killed. An epoch has three steps of HVQ-Trans or
# two of the ViT. With it: the stage and epoch that the checkpoint then holds.
KILLS = [
    ("whole features 1", None),                      # the features' cache is not finished
    ("descend 2", None),
    ("descend 5", ("hvq", 1)),
    ("half checkpoint.pt 1", ("hvq", 1)),
    ("whole checkpoint.pt 2", ("hvq", 2)),           # the last one of HVQ-Trans
    ("descend 4", ("hvq", 3)),                       # in the ViT's first epoch
    ("descend 3", ("mim", 1)),
    ("half checkpoint.pt 1", ("mim", 1)),
    ("errors 2", ("mim", 3)),                        # while photos are scored
    ("whole scores.csv 1", ("mim", 3)),              # between maps.npz and scores.csv
    ("half checkpoint.pt 1", ("mim", 3)),            # the one that says "done"
]


def test_kills_in_every_stage_change_no_bit(trained, photos):
    arguments, entries = [*TRAIN, "--out", "run", "--cache", "own"], []
    for i, (event, _) in enumerate(KILLS):
        (photos / f"seen{i}").mkdir()
        entries.append(["log", {"KILL": event, "SEEN": f"seen{i}/checkpoint.pt"}, arguments])
    entries.append(["log", {}, arguments])
    codes = fork_commands(photos, entries, DEADLY, in_turn=True)
    log = (photos / "log.err").read_text()
    assert codes == [-signal.SIGKILL] * len(KILLS) + [0], log
    assert "error:" not in log and "Traceback" not in log
    for i, (event, expected) in enumerate(KILLS):
        held = None
        if (photos / f"seen{i}/checkpoint.pt").exists():
            state = checkpoint(photos / f"seen{i}")
            held = state["stage"], state["epoch"]
        assert held == expected, event
    assert learned_the_same(trained[0] / "run", photos / "run")
    assert not list((photos / "run").glob("*.new"))


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(trained, photos, monkeypatch):
    """The system refuses to let a file grow past a limit, as it refuses on a full disk."""
    file, real, before = photos / "run/checkpoint.pt", runs.Run.save, []

    def save(run, **news):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if news["stage"] == "mim":
            before.append(file.read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        try:
            real(run, **news)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "save", save)
        result = command(*TRAIN, "--out", "run", cwd=photos)
    assert "could not be saved" in one_error(result)
    assert file.read_bytes() == before[0] and not list((photos / "run").glob("*.new"))
    trains("--out", "run", cwd=photos)                               # and goes on from there
    assert learned_the_same(trained[0] / "run", photos / "run")


def test_several_that_write_a_file_at_once_each_write_all_of_it(tmp_path):
    """Whoever reads meanwhile finds one of the texts, whole; nothing else is left."""
    path, texts = tmp_path / "x.json", [bytes([65 + i]) * (1000 + 100_000 * i) for i in range(6)]
    data.write_whole(path, texts[0])
    with ThreadPoolExecutor(6) as pool:
        writing = [pool.submit(data.write_whole, path, text) for text in texts * 5]
        while not all(one.done() for one in writing):
            assert path.read_bytes() in texts
    assert [one.result() for one in writing] == [None] * 30
    assert path.read_bytes() in texts and list(tmp_path.iterdir()) == [path]


def test_the_second_training_in_a_folder_refuses_and_a_dead_one_does_not_block(photos):
    out, root = photos / "run", str(Path(ladmim.__file__).parent)
    hold = (f"import sys; sys.path.insert(0, {root!r}); import runs; from pathlib import Path; "
            f"held = runs.lock(Path({str(out)!r})); print('held', flush=True); sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    second = command(*TRAIN, "--out", out, cwd=photos)
    assert second.returncode == 2
    assert errors_of(second) == [f"error: {out}: another process is training in it; wait until it "
                                 "ends or choose another --out"]
    assert not (out / "checkpoint.pt").exists()
    holder.kill()
    holder.communicate()
    trains("--out", out, cwd=photos)


@pytest.mark.parametrize("stage", ["hvq", "mim"])
def test_ctrl_c_finishes_the_epoch_saves_and_goes_on_to_the_same_bits(trained, photos, monkeypatch,
                                                                      stage):
    owner, name = (ladmim, "draw_masks") if stage == "mim" else (ladmim.HVQ, "count")
    calls, real = [], getattr(owner, name)
    before = signal.getsignal(signal.SIGINT)         # ignored behind a shell's &

    def press(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:                          # in an epoch, never between two
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, press)
        stopped = command(*TRAIN, "--out", "run", cwd=photos)
    assert stopped.returncode == 130
    assert "stopping after this epoch" in stopped.stderr and "goes on" in stopped.stderr
    state = checkpoint(photos / "run")
    assert state["stage"] == stage and 1 <= state["epoch"] < 3
    assert state["metrics"][-1]["epoch"] == state["epoch"]
    assert signal.getsignal(signal.SIGINT) is before
    trains("--out", "run", cwd=photos)
    assert learned_the_same(trained[0] / "run", photos / "run")


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.stoppable():
        os.kill(os.getpid(), signal.SIGINT)
        assert run.asked_to_stop
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")


def test_ctrl_c_while_the_last_epoch_is_saved_is_not_lost(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_run(tmp_path).stoppable():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, value):
    """They may be the last step's, after which no loss is computed any more."""
    run, model = new_run(tmp_path), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    run.save_stage("hvq", 1, model, optimizer)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    with torch.no_grad():
        model.bias[1] = value
    with pytest.raises(InputError, match="smaller --hvq-lr"):
        run.save_stage("hvq", 2, model, optimizer)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before and run.state["epoch"] == 1


def test_a_run_to_take_over_is_looked_at_before_all_else(trained, photos):
    for more, why in ((["--take", "nowhere"], "nowhere"),
                      (["--take", "nowhere", "--seeds", "0-1"], "serves one run")):
        result = command(*TRAIN, *more, "--out", "other", cwd=photos)
        assert why in one_error(result) and "features" not in result.stderr
        assert not (photos / "other").exists()
    shutil.copytree(trained[0] / "run", photos / "x")
    trains("--take", "x", "--out", "other", cwd=photos)
    shutil.rmtree(photos / "x")                      # a run that has begun needs it no more
    trains("--take", "x", "--out", "other", cwd=photos)
    (photos / "moved").mkdir()
    (photos / "other").rename(photos / "moved/other")        # with what lay beside it
    trains("--take", "moved/x", "--out", "moved/other", cwd=photos)
    trains("--seed", "1", "--out", "alone", cwd=photos)
    before = (photos / "alone/checkpoint.pt").read_bytes()
    for out, take, seed in (("alone", "nowhere", 1), ("alone", "alone", 1),
                            ("moved/other", "y", 0)):
        result = command(*TRAIN, "--seed", seed, "--take", take, "--out", out, cwd=photos)
        assert f"--take {take}: the run in {out} was not begun with it" in one_error(result)
    assert (photos / "alone/checkpoint.pt").read_bytes() == before


def test_a_run_does_not_lie_among_the_photos(photos):
    """There it would be a kind of defect without photos, and no command would go on."""
    result = command(*TRAIN, "--out", "photos/widgets/test/run", cwd=photos)
    assert "--out photos/widgets/test/run: lies among the photos" in one_error(result)
    assert not (photos / "photos/widgets/test/run").exists()


def test_scores_of_a_run_whose_checkpoint_is_gone_are_not_those_of_the_next(tmp_path):
    """Another training in the same folder would pass for them until it ends."""
    run = new_run(tmp_path, hvq_epochs=1)
    (run.folder / "scores.csv").write_text("old")
    run.save(stage="done")
    run.lock.close()
    run = new_run(tmp_path, hvq_epochs=1)
    assert (run.folder / "scores.csv").read_text() == "old"      # a finished run keeps them
    run.lock.close()
    (run.folder / "checkpoint.pt").unlink()
    new_run(tmp_path, hvq_epochs=500).lock.close()
    assert not (run.folder / "scores.csv").exists()


@pytest.mark.parametrize("more", [0, 4e-5, -4e-5])
def test_a_verdict_agrees_with_the_numbers_beside_it(more):
    """The threshold may be this photo's own score, read back from scores.csv."""
    found = [[1.0], [2.0], [3.00001], [None]]
    batch = [("a.png", "a", np.zeros(1))]
    (*_, record), = predict.judged(lambda images: found, batch, 3.00001 + more)
    assert record["verdict"] == ("good" if record["score"] <= record["threshold"] else "anomaly")
    assert (record["verdict"] == "anomaly") == (record["threshold"] < 3)


def test_a_report_whose_folder_may_not_be_written_is_named(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    evaluation.write_report(file, None, "x")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)       # root may write
    with pytest.raises(InputError, match=f"{file}: its folder may not be written to"):
        evaluation.write_report(file, None, "x")
    assert not list(tmp_path.iterdir())
