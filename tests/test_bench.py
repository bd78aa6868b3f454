"""The benchmark runs to its end, and what it says holds together."""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ladmim

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import naive  # noqa: E402
import run as bench  # noqa: E402


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    done = subprocess.run([sys.executable, ROOT / "bench/run.py", "--quick", "--out", out], capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LADMIM_KERNELS")})
    assert done.returncode == 0, done.stderr
    assert "USDT" not in done.stderr and "Traceback" not in done.stderr
    results, = out.glob("*.json")
    return out, json.loads(results.read_text()), done.stdout


def test_writes_numbers_tables_and_a_plot(quick):
    out, results, printed = quick
    markdown, = out.glob("*.md")
    picture, = out.glob("*.png")
    assert markdown.read_text().strip() == printed.strip()
    with Image.open(picture) as image:
        assert image.width >= 600
    assert f"torch {torch.__version__}" in results["versions"] and results["device"] and results["commit"]


def test_measured_rows_hold_together(quick):
    _, results, _ = quick
    assert {row["kernel"] for row in results["kernels"]} == {"nearest_code", "histogram_l1"}
    assert {row["mode"] for row in results["kernels"] if row["kernel"] == "histogram_l1"} == {"forward", "backward", "both"}
    for row in results["kernels"] + results["steps"]:
        assert 0 < row["low"] <= row["median"] <= row["high"] and row["runs"] >= 5
    for shape, mode in {(row["shape"], row["mode"]) for row in results["kernels"]}:
        rows = [row for row in results["kernels"] if (row["shape"], row["mode"]) == (shape, mode)]
        plain = [row for row in rows if row["variant"] != "kernels"]
        best = min(row["median"] for row in plain)
        assert len(plain) >= 2 and len(rows) == len(plain) + 1
        for row in rows:
            assert row["ratio"] == pytest.approx(best / row["median"])
            assert 0 < row["roofline"] < 1.2
    assert all(row["wrong"] == 0 for row in results["kernels"] if row["variant"] == "kernels" and "wrong" in row)
    assert {row["step"].split(",")[0] for row in results["steps"]} == {"train HVQ-Trans", "train ViT", "score"}


@pytest.mark.skipif(torch.cuda.is_available() or bench.MODULES["nearest_code"].triton is None,
                    reason="says what a GPU would do")
def test_without_a_gpu_it_interprets_compiles_and_keeps_predictions_apart(quick):
    _, results, printed = quick
    assert all(row["wrong"] == 0 for row in results["interpreted"])
    assert max(row["worst error"] for row in results["interpreted"] if row["worst error"] is not None) < 1e-5
    assert all(row["spills"] == 0 for row in results["compiled"])
    assert all((row["tensor core"] > 0) == (row["kernel"] in ("_scan", "_redo")) for row in results["compiled"])
    measured, predicted = printed.split("**Predicted, not measured.**")
    for row in results["predicted"]:
        assert row["from"] <= row["to"] and row["GPU"] in predicted and row["GPU"] not in measured


def test_wrong_indices_are_counted():
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(300, 8, generator=generator), torch.randn(50, 8, generator=generator)
    right = torch.cdist(x.double(), codebook.double()).argmin(1)
    assert bench.wrong_indices(x, codebook, right) == 0
    right[:7] = (right[:7] + 1) % 50
    assert bench.wrong_indices(x, codebook, right) == 7


def test_peak_memory_of_a_known_allocation():
    used = bench.peak_memory(lambda: torch.zeros(1000, 1000) + 1, "cpu")
    assert 8_000_000 <= used < 8_100_000             # the zeros and the sum, both alive at once


def test_loops_are_read_off_machine_code():
    code = "\n".join(f"        /*{at:04x}*/                   {text} ;" for at, text in [
        (0, "MOV R1, R2"), (16, "HMMA.16816.F32 R4, R4, R6, R8"), (32, "FMNMX R1, R2, R3, !PT"),
        (48, "@P0 BRA 0x10"), (64, "EXIT")])
    assert bench.loop_of(code) == {"HMMA": 1, "FMNMX": 1, "BRA": 1}
    assert bench.loop_of(code.replace("HMMA", "FFMA")) == {}


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_the_long_way_and_ours_agree(tmp_path, codebook):
    """The ratio of --naive is honest only if both sides compute the same: losses, weights after a step, codebooks, scores."""
    cfg = ladmim.Config(image_size=125, grid=6, codes=16, code_dim=8, hvq_width=32, hvq_heads=2, hvq_dropout=0.0,
                        codebook=codebook, hvq_batch=3, mim_width=32, mim_heads=2, mim_blocks=2, mim_dropout=0.0, mim_batch=4, masks=5)
    detector = naive.make_detector(cfg, torch.device("cpu"))
    torch.nn.init.normal_(detector.mim.e)
    torch.nn.init.normal_(detector.mim.p)
    paths = naive.draw_photos(tmp_path, 4, 64)
    assert len(set(path.read_bytes() for path in paths)) == 4
    h0 = naive.features(detector, paths)
    detector.hvq.start_codebooks(h0, ladmim.seeded(0))
    both = [detector, copy.deepcopy(detector)]
    for i, key in ((0, "long way"), (1, "ours")):
        ways = naive.pairs(both[i], paths)
        for name in ("train HVQ-Trans", "train ViT"):
            ways[name][key][1]()
    for a, b in zip(*(torch.nn.ModuleList([d.hvq, d.mim]).state_dict().items() for d in both)):
        assert a[0] == b[0]
        torch.testing.assert_close(a[1], b[1], atol=1e-4, rtol=1e-4, msg=lambda text, name=a[0]: f"{name}: {text}")
    mask = ladmim.draw_masks(cfg, 4, ladmim.seeded(0), scoring=False)
    with torch.no_grad():                            # an EMA codebook moves with every loss: one on the copy
        losses = [naive.hvq_loss(both[1], paths), both[0].hvq.loss(h0)]
        codes = detector.hvq(h0)[1].to(torch.int16)
        losses += [naive.mim_loss(detector, paths, mask),
                   ladmim.histogram_l1(detector.mim(h0, mask[:, None]), codes, mask[:, None]).sum(-1).mean()]
    assert abs(float(losses[0] - losses[1])) < 1e-4 and abs(float(losses[2] - losses[3])) < 1e-4
    ours = torch.stack(naive.our_score(detector, paths), 1)
    assert ours.std(0).min() > 1e-3                  # the photos differ in score, so agreement says something
    for every_mask in (True, False):
        found = torch.tensor([naive.score(detector, path, every_mask) for path in paths])
        torch.testing.assert_close(found, ours, atol=1e-4, rtol=1e-4)


def test_the_long_way_is_measured(tmp_path, monkeypatch, capsys):
    small = dict(image_size=61, grid=4, codes=8, code_dim=8, hvq_width=16, hvq_heads=2, hvq_batch=1, mim_width=16,
                 mim_heads=2, mim_blocks=1, mim_batch=1)
    monkeypatch.setitem(ladmim.PRESETS, "tiny", small)
    monkeypatch.setattr(naive, "score", lambda detector, path, every_mask=True: None)              # 64 backbones, five times
    monkeypatch.setattr(sys, "argv", ["run.py", "--naive", "--seconds", "0", "--photo", "64", "--out", str(tmp_path)])
    assert bench.main() == 0
    results, = tmp_path.glob("*-naive-tiny.json")
    rows = json.loads(results.read_text())["naive"]
    assert results.with_suffix(".md").read_text().strip() == capsys.readouterr().out.strip()
    assert len(rows) == 9
    for row in rows:
        assert row["seconds"] == pytest.approx(row["median"] / row["images"])
    for name in {row["step"] for row in rows if row["ratio"]}:
        ours, = (row for row in rows if row["step"] == name and row["variant"] == "ours")
        assert all(row["ratio"] == pytest.approx(row["seconds"] / ours["seconds"]) for row in rows if row["step"] == name)
