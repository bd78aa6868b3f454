"""What several test files share: a small data set, a small run trained on it, commands."""
import contextlib
import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")        # before torch: these models are small

import numpy as np
import pytest
import torch
from PIL import Image

import ladmim
import runs

# 64 pixels a side are 8x8 positions of the backbone.
QUICK = ("--preset tiny --image-size 64 --grid 4 --codes 8 --code-dim 8 --hvq-width 32 "
         "--hvq-heads 2 --mim-width 32 --mim-heads 2 --mim-blocks 2 --masks 4 --hvq-epochs 3 "
         "--mim-epochs 3 --device cpu").split()
TRAIN = ("train", "--data", "photos", "--category", "widgets", *QUICK)
LEARNED = ("hvq", "mim", "mean", "std", "calibration")      # what a checkpoint has learned


def make_photos(root, category="widgets", train=12, validation=4, good=4, bad=4):
    """A LOCO-shaped category of 64-pixel photos: a bright square on the left of a noisy ground; the
    anomaly has it on the right."""
    rng = np.random.default_rng(0)
    counts = {("train", "good"): train, ("validation", "good"): validation,
              ("test", "good"): good, ("test", "logical_anomalies"): bad,
              ("test", "structural_anomalies"): bad}
    for (split, kind), n in counts.items():
        folder = root / category / split / kind
        folder.mkdir(parents=True)
        for i in range(n):
            photo = rng.integers(40, 70, (64, 64, 3), dtype=np.uint8)
            x = 8 if kind != "logical_anomalies" else 40
            photo[24:40, x:x + 16] = (220, 160, 40)
            if kind == "structural_anomalies":
                photo[50:60, 4:20] = (20, 30, 240)
            Image.fromarray(photo).save(folder / f"{i:03}.png")
    return root


def command(*args, cwd=None):
    """ladmim.py's main() with these arguments, in this process: a traceback fails the test by
    itself."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    try:
        os.chdir(cwd or before)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = ladmim.main([str(argument) for argument in args])
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def trains(*args, cwd):
    """A training that must succeed."""
    result = command(*TRAIN, *args, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def errors_of(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


def one_error(result):
    """The only line on stderr that is an error, of a command that ended in exit code 2."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    line, = errors_of(result)
    return line


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def score_rows(run):
    with (run / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def learned_the_same(one, other):
    """Whether two finished runs have the same bits, in the checkpoint and in the table."""
    a, b = checkpoint(one), checkpoint(other)
    assert (one / "scores.csv").read_bytes() == (other / "scores.csv").read_bytes()
    return all(same(a[part], b[part]) for part in LEARNED)


def small_job(folder, **settings):
    """A job of its own folder, as `train` makes it, whose photos nobody reads."""
    cfg = dataclasses.replace(ladmim.Config(**ladmim.PRESETS["tiny"]), **settings)
    return runs.Job(cfg, "tiny", folder, ["widgets"], torch.device("cpu"), out=folder / "run")


def new_run(folder, **settings):
    return runs.Run(small_job(folder, **settings))


# Imports ladmim.py once and forks a process for each entry of argv[1], [log, environment,
# arguments of main]: starting Python and torch anew would be most of a test. Prints how each ended.
# `prepare` may replace things in ladmim before.
FORKS = """
import json, os, sys
sys.path.insert(0, {root!r})
import ladmim, data, runs
import torch._dynamo                                 # the first optimiser would, in each process
{prepare}
children = []
for log, environment, arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        os.environ.update(environment)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{{log}}.{{name}}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os._exit(ladmim.main(arguments))
    children.append(child)
    if {in_turn}:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


def fork_commands(folder, entries, prepare="", in_turn=False):
    """Runs `entries` (FORKS) in the folder, at once or in turn -> their exit codes; minus a
    signal's number where one was killed."""
    root = str(Path(ladmim.__file__).parent)
    script = FORKS.format(root=root, prepare=prepare, in_turn=in_turn)
    done = subprocess.run([sys.executable, "-c", script, json.dumps(entries)], cwd=folder,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with `photos` and a `run` trained on them, and what the training said. Tests read
    it and write elsewhere."""
    folder = tmp_path_factory.mktemp("trained")
    make_photos(folder / "photos")
    return folder, trains("--out", "run", cwd=folder)


@pytest.fixture
def photos(trained, tmp_path):
    """A test's own folder, where `photos` and `cache` lead to the data set that all read and to its
    features."""
    for name in ("photos", "cache"):
        (tmp_path / name).symlink_to(trained[0] / name)
    return tmp_path
