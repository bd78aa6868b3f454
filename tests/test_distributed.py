"""Two processes, as torchrun starts them, end where one does."""
import csv
import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_ladmim import QUICK, make_photos, same

import ladmim

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
N = 9                                                # in batches of 4 or 5: 2 + 2, 2 + 2, 1 + 0 photos or 3 + 2, 2 + 2
OPTIONS = (*QUICK, *"--image-size 125 --hvq-epochs 2 --mim-epochs 1 --mim-warmup 0".split())


def start(folder, out, rank, size, port, *options):
    """One process of `size`, with the environment that torchrun gives it."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, ladmim.__file__, "train", "--data", "photos", "--category", "widgets", *OPTIONS,
                             *options, "--out", out, "--cache", f"cache-{out}"], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module", params=[("ema", 4, 5), ("gradient", 5, 4)], ids=lambda param: param[0])
def both(request, tmp_path_factory):
    """-> folder, what the two processes said, checkpoints of one process and of two."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    make_photos(folder / "photos", train=N)
    options = [f"{name}={value}" for name, value in zip(("--codebook", "--hvq-batch", "--mim-batch"), request.param)]
    ranks = ("one", 0, 1), ("two", 0, 2), ("two", 1, 2)
    started = [start(folder, *rank, port, *options) for rank in ranks]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    return folder, said, *(torch.load(folder / out / "checkpoint.pt", weights_only=True) for out in ("one", "two"))


def test_two_processes_train_the_same_weights(both):
    """Every photo, code count and gradient counts once. Left out: biases of keys, whose gradient is zero but for rounding
    (softmax does not see them) and which AdamW still moves by the learning rate."""
    _, _, one, two = both
    assert torch.equal(one["mean"], two["mean"]) and torch.equal(one["std"], two["std"])       # shared features: same bits
    worst = 0.0
    for stage in ("hvq", "mim"):
        for name, a in one[stage].items():
            b = two[stage][name]
            if name.endswith("kv.bias"):
                a, b = a[len(a) // 2:], b[len(b) // 2:]
            worst = max(worst, float((a - b).abs().max()))
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    print(f"largest weight difference {worst:.2e}")
    losses = [[line["loss"] for line in run["metrics"] if "loss" in line] for run in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    used = [[line["codes_used"] for line in run["metrics"] if line["stage"] == "hvq"] for run in (one, two)]
    assert used[0] == used[1]


def test_two_processes_score_the_same(both):
    folder, *_ = both
    rows = [list(csv.DictReader((folder / out / "scores.csv").open())) for out in ("one", "two")]
    assert [row["path"] for row in rows[0]] == [row["path"] for row in rows[1]] and len(rows[0]) == 16
    scores = np.array([[float(row["score"]) for row in part] for part in rows])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-2, rtol=1e-3)
    tested = [row["split"] == "test" for row in rows[0]]
    labels = np.array([int(row["label"]) for row in rows[0]])[tested]
    assert roc_auc_score(labels, scores[0][tested]) == pytest.approx(roc_auc_score(labels, scores[1][tested]), abs=0.04)


def test_the_first_process_alone_speaks_and_writes(both):
    folder, ((one, _), (first, first_errors), (second, second_errors)), *_ = both
    first, second = (re.sub(r"^\[Gloo\] .*\n", "", said, flags=re.M) for said in (first, second))      # older ones say hello
    assert second == "" and not [line for line in second_errors.splitlines() if "training" in line or "error" in line]
    assert len(first.splitlines()) == len(one.splitlines()) and "Traceback" not in first_errors
    assert sorted(path.name for path in (folder / "one").iterdir()) == sorted(path.name for path in (folder / "two").iterdir())
    stages = [json.loads(line)["stage"] for line in (folder / "two" / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["hvq", "hvq", "mim", "score"]


def test_two_processes_agree_on_what_a_finished_run_lacks(both):
    """Process 0 makes config.json anew while the other may be reading: it decides for both that the run is scored again."""
    folder, _, _, two = both
    options = [f"{name}={two['config'][name.strip('-').replace('-', '_')]}" for name in ("--codebook", "--hvq-batch", "--mim-batch")]
    before = {name: (folder / "two" / name).read_bytes() for name in ("config.json", "scores.csv")}
    for name in before:
        (folder / "two" / name).unlink()
    port = free_port()
    started = [start(folder, "two", rank, 2, port, *options) for rank in range(2)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert all((folder / "two" / name).read_bytes() == content for name, content in before.items())


def test_shares_of_a_batch_are_disjoint_and_whole(monkeypatch):
    for length in (0, 1, 3, 8):
        batch, parts = torch.arange(length), []
        for rank in range(3):
            monkeypatch.setattr(ladmim, "processes", lambda rank=rank: (rank, 3))
            parts.append(ladmim.share(batch))
        assert same(torch.cat(parts), batch) and max(map(len, parts)) - min(map(len, parts)) <= 1
