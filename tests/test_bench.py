"""The benchmark runs to its end, and what it says holds together."""
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import kernels
import ladmim
from runs import seeded
from twin.render import render

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import naive  # noqa: E402
import run as bench  # noqa: E402


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    forced = ("TRITON_INTERPRET", "LADMIM_KERNELS")
    done = subprocess.run([sys.executable, ROOT / "bench/run.py", "--quick", "--out", out],
                          env={k: v for k, v in os.environ.items() if k not in forced},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for noise in ("USDT", "CPUAllocator", "Traceback"):
        assert noise not in done.stderr
    results, = out.glob("*-quick.json")              # measurements that count have another name
    return out, json.loads(results.read_text()), done.stdout


def test_wrong_kernels_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LADMIM_KERNELS", "foo")
    assert bench.main(["--quick", "--out", str(tmp_path)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "LADMIM_KERNELS=foo" in line


def test_a_slow_function_leaves_its_turns_to_the_others():
    found = bench.measure({"fast": lambda: None, "slow": lambda: time.sleep(0.01)}, "cpu", 0.3)
    assert found["slow"]["runs"] == 5 and found["fast"]["runs"] > 50
    assert found["fast"]["low"] <= found["fast"]["median"] < 0.01 <= found["slow"]["low"]


def test_writes_numbers_and_tables(quick):
    out, results, printed = quick
    markdown, = out.glob("*.md")
    assert markdown.read_text().strip() == printed.strip()
    assert f"torch {torch.__version__}" in results["versions"]
    assert results["device"] and results["commit"]


def check_steps(rows):
    """Each row's time of an image, and that as a multiple of ours."""
    assert {row["step"].split(",")[0] for row in rows} == {"train HVQ-Trans", "train ViT", "score"}
    ours = {row["step"]: row["an image"] for row in rows if row["variant"] == "ours"}
    for row in rows:
        assert row["an image"] == pytest.approx(row["median"] / row["images"])
        assert row["ratio"] == pytest.approx(row["an image"] / ours[row["step"]])


def test_measured_rows_hold_together(quick):
    _, results, _ = quick
    kernels, steps = results["kernels"], results["steps"]
    assert {row["kernel"] for row in kernels} == {"nearest_code", "histogram_l1"}
    modes = {row["mode"] for row in kernels if row["kernel"] == "histogram_l1"}
    assert modes == {"forward", "backward", "both"}
    for row in kernels + steps:
        assert 0 < row["low"] <= row["median"] <= row["high"] and row["runs"] >= 5
    for shape, mode in {(row["shape"], row["mode"]) for row in kernels}:
        rows = [row for row in kernels if (row["shape"], row["mode"]) == (shape, mode)]
        plain = [row for row in rows if row["variant"] != "kernels"]
        best = min(row["median"] for row in plain)
        assert len(plain) >= 2 and len(rows) == len(plain) + 1
        for row in rows:
            assert row["ratio"] == pytest.approx(best / row["median"])
            assert 0 < row["roofline"] < 1.2
    ours = [row for row in kernels if row["variant"] == "kernels"]
    assert all(row["wrong"] == 0 for row in ours if "wrong" in row)
    assert any("wrong" in row for row in ours)
    assert {row["variant"] for row in steps} == {"plain torch", "ours"}
    check_steps(steps)


def test_plain_torch_stands_in_the_kernels_places(monkeypatch):
    """The steps' plain rows are only worth something if no kernel runs in them."""
    cfg = ladmim.Config(image_size=61, grid=4, codes=8, hvq_width=16, mim_width=16, mim_blocks=1,
                        masks=2, hvq_batch=1, mim_batch=1)
    steps = bench.kernel_steps(naive.make_detector(cfg, torch.device("cpu")), "cpu")
    used = {"train HVQ-Trans": {"nearest_own_code"}, "train ViT": {"histogram_l1"},
            "score": {"nearest_own_code", "histogram_l1"}}
    assert steps.keys() == used.keys()
    for step, ways in steps.items():
        for way, expected in (("plain torch", set()), ("ours", used[step])):
            spies = {name: Mock(wraps=getattr(kernels, name)) for name in used["score"]}
            for name, spy in spies.items():
                monkeypatch.setattr(ladmim, name, spy)
            ways[way][1]()
            assert {name for name, spy in spies.items() if spy.called} == expected


def test_peak_memory_of_a_known_allocation():
    used = bench.peak_memory(lambda: torch.zeros(1000, 1000) + 1, "cpu")
    assert 8_000_000 <= used < 8_100_000             # the zeros and the sum, both alive at once


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_the_long_way_and_ours_agree(tmp_path, codebook):
    """The ratio of --naive is honest only if both sides compute the same: losses, weights after a
    step, codebooks, scores."""
    cfg = ladmim.Config(image_size=80, grid=6, codes=16, code_dim=8, hvq_width=32, hvq_heads=2,
                        hvq_dropout=0.0, codebook=codebook, hvq_batch=3, mim_width=32, mim_heads=2,
                        mim_blocks=2, mim_dropout=0.0, mim_batch=4, masks=3)
    detector = naive.make_detector(cfg, torch.device("cpu"))
    torch.nn.init.normal_(detector.mim.e)
    torch.nn.init.normal_(detector.mim.p)
    render(tmp_path, "breakfast_box", {"train": 4}, 64)
    paths = sorted(tmp_path.glob("*/train/good/*.png"))
    assert len(set(path.read_bytes() for path in paths)) == 4
    h0 = naive.features(detector, paths)
    detector.hvq.start_codebooks(h0, seeded(0))
    both = [detector, copy.deepcopy(detector)]
    for one, way in zip(both, ("long way", "ours")):
        steps = naive.pairs(one, paths)
        for stage in ("train HVQ-Trans", "train ViT"):
            steps[stage][way][1]()
    states = [torch.nn.ModuleList([one.hvq, one.mim]).state_dict() for one in both]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-4, rtol=1e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")
    mask = ladmim.draw_masks(cfg, 4, seeded(0), scoring=False)
    with torch.no_grad():                            # an EMA codebook moves with every loss: one
        long = naive.hvq_loss(both[1], paths)        # on the copy
        assert abs(float(long - both[0].hvq.loss(h0))) < 1e-4
        codes = detector.hvq(h0)[1].to(torch.int16)
        l1 = ladmim.histogram_l1(detector.mim(h0, mask[:, None]), codes, mask[:, None])
        assert abs(float(naive.mim_loss(detector, paths, mask) - l1.sum(-1).mean())) < 1e-4
    ours = torch.stack(naive.our_score(detector, paths), 1)
    assert ours.std(0).min() > 1e-3                  # the photos differ in score: agreement counts
    for every_mask in (True, False):
        scores = torch.tensor([naive.score(detector, path, every_mask) for path in paths])
        torch.testing.assert_close(scores, ours, atol=1e-4, rtol=1e-4)


def test_the_long_way_is_measured(tmp_path, monkeypatch, capsys):
    small = dict(image_size=61, grid=4, codes=8, code_dim=8, hvq_width=16, hvq_heads=2,
                 mim_width=16, mim_heads=2, mim_blocks=1)
    monkeypatch.setitem(ladmim.PRESETS, "tiny", small)
    assert bench.main(["--naive", "--preset", "tiny", "--quick", "--out", str(tmp_path)]) == 0
    results, = tmp_path.glob("*-naive-tiny.json")
    rows = json.loads(results.read_text())["steps"]
    assert results.with_suffix(".md").read_text().strip() == capsys.readouterr().out.strip()
    assert [row["variant"] for row in rows] == [
        "long way", "ours", "long way", "ours", "long way", "long way, tokens once", "ours"]
    check_steps(rows)
