"""bench/figure3.py: the curves lie where their numbers say, and are those of the runs."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import ablations
from bench import figure3

import eval as evaluation
import ladmim
from twin.render import COUNTS, render


def test_points_lie_where_their_numbers_say():
    """From 8 to 32 megabytes and 80 to 90 percent: the corners and the middle. A system's name
    stands at its own last point, on no other curve."""
    curves = {"LADMIM": [(8, 80), (16, 84.9)], "EfficientAD-S": [(32, 89.9)]}
    sheet = figure3.draw(curves, "title", "preset")
    assert sheet.size == (720, 480)
    for colour, points in zip(figure3.COLOURS, [[(70, 420), (385, 239)], [(700, 54)]]):
        blue = np.all(np.array(sheet) == colour, -1)
        for x, y in points:
            assert blue[y - 2:y + 7, x - 3:x + 4].any()
    assert not np.all(np.array(sheet) == figure3.COLOURS[1], -1)[:, :590].any()
    figure3.draw({"LADMIM": [(8, 70)]}, "one point", "preset")
    top = np.array(figure3.draw({"LADMIM": [(8, 100)]}, "the best", "preset"))
    assert np.all(top[50:60, 60:80] == figure3.COLOURS[0], -1).any()     # 100 is the axis's end


def test_the_figure_of_two_small_categories(tmp_path, monkeypatch, capsys):
    for name in ("juice_bottle", "pushpins"):
        render(tmp_path / "twin", name, {**dict.fromkeys(COUNTS, 3), "train": 4}, 64, 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ladmim.PRESETS, "tiny", dict(
        image_size=64, grid=4, codes=8, code_dim=8, hvq_width=32, hvq_heads=2, mim_width=32,
        mim_heads=2, mim_blocks=1, masks=2, hvq_epochs=1, mim_epochs=1, codebook="ema"))
    rows = ablations.ABLATIONS["width"]
    monkeypatch.setitem(ablations.ABLATIONS, "width", dict(list(rows.items())[1:3]))
    monkeypatch.setattr(figure3, "WIDTHS", (0.25, 1))
    drawn, draw = [], figure3.draw
    monkeypatch.setattr(figure3, "draw", lambda *args: drawn.append(args[1:]) or draw(*args))
    assert figure3.main(["--data", "twin", "--steps", "2"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    (photos, about), = drawn
    assert photos == "twin (rendered twin, not MVTec's photos): AUROC %"
    assert about == "tiny, one model of all, EfficientAD-S 2 steps at most"
    assert photos.removesuffix(": AUROC %") in title and about in title
    table = [line.split("|")[1:4] for line in lines[3:]]
    assert [row[0].strip() for row in table] == ["LADMIM"] * 2 + ["EfficientAD-S"] * 2
    sizes = [float(row[1]) for row in table]
    assert sizes[0] < sizes[1] and sizes[2] < sizes[3]
    records, _ = evaluation.evaluate_runs([tmp_path / "runs/twin/all-tiny-seed0"])
    mean = 100 * np.mean([record["both"]["average"] for record in records])
    assert float(table[1][2]) == pytest.approx(mean, abs=0.051)
    assert Image.open("runs/figure3.png").size == (720, 480)
    assert {path.stem for path in Path("runs").rglob("rivals/*.json")} == {
        "efficientad", "efficientad-0.25"}
