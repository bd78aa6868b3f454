"""What must not be lost: kills at any moment, a full disk, two trainings in one folder."""
import json
import math
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from test_ladmim import QUICK, command, errors_of, make_photos, same

import ladmim

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")
ASKED = ("train", "--data", "photos", "--category", "widgets", *QUICK, "--image-size", "125")
EPOCHS = ("--hvq-epochs", "10", "--mim-epochs", "10")

# Imports once, then forks a training for each kill: starting Python and torch anew would be most of the test.
KILLER = """
import json, os, random, signal, sys, time
sys.path.insert(0, {root!r})
import ladmim
ladmim.fit.__defaults__ = (*ladmim.fit.__defaults__[:-1], 0.0)                    # a checkpoint every epoch

def start(out):
    child = os.fork()
    if child:
        return child
    sys.argv = ["ladmim.py", "train", "--data", "photos", "--category", "widgets", *{settings!r}, "--out", out]
    os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    os._exit(ladmim.main())

began = time.monotonic()
assert os.waitpid(start("whole"), 0)[1] == 0
length, chance, kills, runs, moments = time.monotonic() - began, random.Random(0), 0, 0, []
child = start("killed0")
while kills < {kills}:
    end, done = time.monotonic() + chance.uniform(0.02, 0.3) * length, 0
    while time.monotonic() < end and not done:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.0005)
    if done:
        assert status == 0, status
        runs += 1
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        folder = f"killed{{runs}}"
        moments.append(sorted(os.listdir(folder)) if os.path.isdir(folder) else [])
    child = start(f"killed{{runs}}")
assert os.waitpid(child, 0)[1] == 0
print(json.dumps([runs + 1, moments]))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("trust") / "photos").parent


def test_twenty_kills_at_random_moments_change_no_bit(photos):
    script = KILLER.format(root=str(ladmim.HERE), settings=[*QUICK, *EPOCHS], kills=20)
    done = subprocess.run([sys.executable, "-c", script], cwd=photos, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = (photos / "log").read_text()
    assert done.returncode == 0, done.stderr + log
    assert "error:" not in log and "Traceback" not in log
    runs, moments = json.loads(done.stdout)
    assert len(moments) == 20 and sum("checkpoint.pt" in found for found in moments) >= 5
    whole = torch.load(photos / "whole" / "checkpoint.pt", weights_only=True)
    for i in range(runs):
        killed = torch.load(photos / f"killed{i}" / "checkpoint.pt", weights_only=True)
        for part in ("hvq", "mim", "mean", "std", "calibration"):
            assert same(whole[part], killed[part]), (i, part)
        assert (photos / "whole" / "scores.csv").read_text() == (photos / f"killed{i}" / "scores.csv").read_text()


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(photos, tmp_path, monkeypatch):
    """The system refuses to let a file grow past a limit, as it refuses on a full disk."""
    out = tmp_path / "run"
    args = ("train", "--data", "photos", "--category", "widgets", *QUICK, "--out", out)
    real, states = ladmim.Run.save, []

    def save(run, **news):
        if news["stage"] == "mim":
            states.append((out / "checkpoint.pt").read_bytes())
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
            try:
                real(run, **news)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        else:
            real(run, **news)

    with monkeypatch.context() as patch:
        patch.setattr(ladmim.Run, "save", save)
        result = command(*args, cwd=photos)
    assert result.returncode == 2 and len(errors_of(result)) == 1 and "could not be saved" in result.stderr
    assert (out / "checkpoint.pt").read_bytes() == states[0]
    assert not (out / "checkpoint.pt.new").exists()
    assert command(*args, cwd=photos).returncode == 0                             # and goes on from there


def test_the_second_training_in_a_folder_refuses_and_a_dead_one_does_not_block(photos, tmp_path):
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ladmim.HERE)!r}); import ladmim; "
                               f"from pathlib import Path; held = ladmim.lock(Path({str(out)!r})); print('held', flush=True); "
                               "sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    args = ("train", "--data", "photos", "--category", "widgets", *QUICK, "--out", out)
    second = command(*args, cwd=photos)
    assert second.returncode == 2 and errors_of(second) == [f"error: {out}: another process is training in it; wait until it "
                                                            "ends or choose another --out"]
    assert not (out / "checkpoint.pt").exists()
    holder.kill()
    holder.communicate()
    assert command(*args, cwd=photos).returncode == 0


@pytest.mark.parametrize("stage", ["hvq", "mim"])
def test_ctrl_c_finishes_the_epoch_saves_and_goes_on_to_the_same_bits(photos, tmp_path, monkeypatch, stage):
    args = ("train", "--data", "photos", "--category", "widgets", *QUICK)
    assert command(*args, "--out", tmp_path / "whole", cwd=photos).returncode == 0
    calls, real = [], ladmim.draw_masks if stage == "mim" else ladmim.HVQ.count
    before = signal.getsignal(signal.SIGINT)         # ignored where the tests run in the background of a shell

    def press(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:                                                       # in an epoch, never between two
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(*((ladmim, "draw_masks") if stage == "mim" else (ladmim.HVQ, "count")), press)
        stopped = command(*args, "--out", tmp_path / "stopped", cwd=photos)
    assert stopped.returncode == 130 and "stopping after this epoch" in stopped.stderr and "goes on" in stopped.stderr
    state = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    assert state["stage"] == stage and 1 <= state["epoch"] < 3 and state["metrics"][-1]["epoch"] == state["epoch"]
    assert signal.getsignal(signal.SIGINT) is before
    assert command(*args, "--out", tmp_path / "stopped", cwd=photos).returncode == 0
    whole, again = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "stopped"))
    assert all(same(whole[part], again[part]) for part in ("hvq", "mim", "calibration"))


def test_the_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), ladmim.stoppable() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")


def test_same_seed_same_bits_whatever_the_workers_and_the_cache(tmp_path, monkeypatch):
    make_photos(tmp_path / "photos")
    states = []
    for workers, cache in ((1, "a"), (7, "b"), (3, "a")):                         # the third one finds all features cached
        monkeypatch.setattr(os, "cpu_count", lambda workers=workers: workers)
        out = f"run{workers}"
        assert command(*ASKED, "--cache", cache, "--out", out,
                       cwd=tmp_path).returncode == 0
        state = torch.load(tmp_path / out / "checkpoint.pt")
        states.append({name: state[name] for name in ("hvq", "mim", "mean", "std", "calibration")})
        states[-1]["scores"] = (tmp_path / out / "scores.csv").read_bytes()
    assert same(states[0], states[1]) and same(states[0], states[2])
    other = command(*ASKED, "--seed", "1", "--out", "other", cwd=tmp_path)
    assert other.returncode == 0 and (tmp_path / "other" / "scores.csv").read_bytes() != states[0]["scores"]


def test_an_exploding_loss_keeps_the_last_good_checkpoint(tmp_path):
    make_photos(tmp_path / "photos")
    asked = (*ASKED, "--out", "run")
    real, saves = ladmim.HVQ.loss, []

    def explode(self, h0):
        saves.append(1)
        return real(self, h0) * (math.inf if len(saves) > 5 else 1)               # three or four batches an epoch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladmim.HVQ, "loss", explode)
        fit = ladmim.fit
        patch.setattr(ladmim, "fit", lambda *rest: fit(*rest, save_every=0))
        result = command(*asked, cwd=tmp_path)
    assert result.returncode == 2 and len(errors_of(result)) == 1 and "epoch 2" in result.stderr, result.stderr
    state = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["hvq"].values())
    assert command(*asked, cwd=tmp_path).returncode == 0                          # and it can be gone on with


def test_a_dead_codebook_is_caught_in_its_epoch(tmp_path, monkeypatch):
    make_photos(tmp_path / "photos")
    real, calls = ladmim.HVQ.health, []

    def die(self):
        calls.append(1)
        if len(calls) == 2:
            self.used[2, 1:] = 0
            self.used[2, 0] = 7
        return real(self)

    monkeypatch.setattr(ladmim.HVQ, "health", die)
    result = command(*ASKED, "--out", "run", cwd=tmp_path)
    assert result.returncode == 2 and len(errors_of(result)) == 1
    assert "level 3 uses one code of 8 in epoch 2" in result.stderr


def test_features_that_are_not_finite_are_refused(tmp_path):
    make_photos(tmp_path / "photos")
    pdn = ladmim.build_pdn("small")
    with torch.no_grad():
        pdn[-1].bias[5] = math.nan
    torch.save(pdn.state_dict(), tmp_path / "nan.pt")
    result = command(*ASKED, "--pdn", "nan.pt", "--out", "run", cwd=tmp_path)
    assert result.returncode == 2 and len(errors_of(result)) == 1 and "not finite" in result.stderr
    assert not (tmp_path / "run").exists()
