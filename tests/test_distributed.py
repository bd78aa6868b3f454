"""Two processes, as torchrun starts them, end where one does."""
import json
import os
import re
import socket

import numpy as np
import pytest
import torch
from conftest import TRAIN, checkpoint, fork_commands, make_photos, score_rows
from sklearn.metrics import roc_auc_score

import runs

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not hasattr(os, "fork"),
                                reason="needs fork and a torch with torch.distributed")
N = 9                # in batches of 4 or 5: 2 + 2, 2 + 2, 1 + 0 photos or 3 + 2, 2 + 2
OPTIONS = "--hvq-epochs 2 --mim-epochs 1 --mim-warmup 0".split()
CASES = {"ema": ("--codebook=ema", "--hvq-batch=4", "--mim-batch=5"),
         "gradient": ("--codebook=gradient", "--hvq-batch=5", "--mim-batch=4")}


def processes(log, out, size, options):
    """`size` processes that train into `out`, each with the environment that torchrun gives it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*TRAIN, *OPTIONS, *options, "--out", out, "--cache", f"cache-{out}"]
    entries = []
    for rank in range(size):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port,
                       "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        environment = {name: str(value) for name, value in environment.items()}
        entries.append([f"{log}{rank}", environment, arguments])
    return entries


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """A folder with two runs: `one` of one process, `two` of two; and its options."""
    folder, options = tmp_path_factory.mktemp("two"), CASES[request.param]
    make_photos(folder / "photos", train=N)
    entries = processes("one", "one", 1, options) + processes("two", "two", 2, options)
    codes = fork_commands(folder, entries)
    assert codes == [0] * 3, [file.read_text() for file in folder.glob("*.err")]
    return folder, options


def test_two_processes_train_the_same_weights(both):
    """Every photo, code count and gradient counts once. Left out: biases of keys, whose gradient is
    zero but for rounding (softmax does not see them) and which AdamW still moves by the learning
    rate."""
    one, two = (checkpoint(both[0] / out) for out in ("one", "two"))
    for name in ("mean", "std"):                     # shared features: same bits
        assert torch.equal(one[name], two[name])
    for stage in ("hvq", "mim"):
        for name, a in one[stage].items():
            b = two[stage][name]
            if name.endswith("kv.bias"):
                a, b = a[len(a) // 2:], b[len(b) // 2:]
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4,
                                       msg=lambda text, name=name: f"{name}: {text}")
    losses = [[line["loss"] for line in run["metrics"] if "loss" in line] for run in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    used = [[line["codes_used"] for line in run["metrics"] if line["stage"] == "hvq"]
            for run in (one, two)]
    assert used[0] == used[1]


def test_two_processes_score_the_same(both):
    one, two = (score_rows(both[0] / out) for out in ("one", "two"))
    assert [row["path"] for row in one] == [row["path"] for row in two] and len(one) == 16
    scores = np.array([[float(row["score"]) for row in rows] for rows in (one, two)])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-2, rtol=1e-3)
    tested = [row["split"] == "test" for row in one]
    labels = np.array([int(row["label"]) for row in one])[tested]
    aurocs = [roc_auc_score(labels, values[tested]) for values in scores]
    assert aurocs[0] == pytest.approx(aurocs[1], abs=0.04)


def test_a_process_without_a_batch_to_score_takes_part(tmp_path):
    """`mean` scores learn nothing from training photos: 4 + 1 + 1 photos are one batch of 8."""
    make_photos(tmp_path / "photos", train=4, good=1, bad=1, validation=2)
    scored = "--hvq-score=mean", "--mim-score=mean"
    entries = processes("one", "one", 1, scored) + processes("two", "two", 2, scored)
    codes = fork_commands(tmp_path, entries)
    assert codes == [0] * 3, [file.read_text() for file in tmp_path.glob("*.err")]
    one, two = ([float(row["score"]) for row in score_rows(tmp_path / out)]
                for out in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-2, rtol=1e-3)


def test_the_first_process_alone_speaks_and_writes(both):
    folder, _ = both

    def said(name):
        """Without what older versions of Gloo say."""
        return re.sub(r"^\[Gloo\] .*\n", "", (folder / name).read_text(), flags=re.M)

    assert said("two1.out") == ""
    assert not re.search("training|error", (folder / "two1.err").read_text())
    assert len(said("two0.out").splitlines()) == len(said("one0.out").splitlines()) > 5
    assert "Traceback" not in (folder / "two0.err").read_text()
    assert (sorted(path.name for path in (folder / "one").iterdir())
            == sorted(path.name for path in (folder / "two").iterdir()))
    lines = (folder / "two/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["hvq", "hvq", "mim", "score"]


def test_two_processes_agree_on_what_a_finished_run_lacks(both):
    """Process 0 makes config.json anew while the other may be reading: it decides for both that the
    run is scored again."""
    folder, options = both
    names = "config.json", "scores.csv"
    before = [(folder / "two" / name).read_bytes() for name in names]
    for name in names:
        (folder / "two" / name).unlink()
    codes = fork_commands(folder, processes("again", "two", 2, options))
    assert codes == [0, 0], [file.read_text() for file in folder.glob("again*.err")]
    assert [(folder / "two" / name).read_bytes() for name in names] == before


def test_processes_wait_for_photos_but_not_for_one_that_failed(monkeypatch):
    """For photos longer than the 10 or 30 minutes after which PyTorch ends processes that wait. To
    destroy NCCL's group waits for all processes: one that failed would never say why."""
    given, destroyed = {}, []
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                        "MASTER_PORT": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(runs.dist, "init_process_group", lambda _, **options: given.update(options))
    monkeypatch.setattr(runs.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(runs.dist, "destroy_process_group", lambda: destroyed.append(True))
    with pytest.raises(runs.InputError), runs.joined(torch.device("cpu")):
        raise runs.InputError("another training holds this folder")
    assert not destroyed
    with runs.joined(torch.device("cpu")):
        pass
    assert destroyed == [True] and given["timeout"].total_seconds() >= 24 * 3600
