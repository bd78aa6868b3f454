"""The benchmark runs to its end, and what it says holds together."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
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
