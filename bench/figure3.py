"""Figure 3: AUROC against the size of a model, as a PNG: python bench/figure3.py --category a,b

One model of all categories: LADMIM with ViTs, EfficientAD-S with students of four widths. Trains
what is missing, as bench/ablations.py and bench/baselines.py do."""
import io
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import ladmim  # noqa: E402
import options  # noqa: E402
import runs  # noqa: E402
from bench import ablations, baselines, efficientad, rival  # noqa: E402

MARK = "LADMIM figure"                  # of an earlier one, which may be replaced
WIDTHS = (0.25, 0.5, 1, 2)
COLOURS = ((30, 90, 200), (220, 110, 20))
SIZE, LEFT, TOP, RIGHT, BOTTOM = (720, 480), 70, 50, 20, 60          # pixels


def mean_auroc(figures: list[dict]) -> float:
    """Percent, the mean over the categories of the widest figure that each has."""
    return 100 * float(np.mean([one.get("average", next(iter(one.values()))) for one in figures]))


def points(args) -> tuple[dict[str, list[tuple[float, float]]], str]:
    """Each system's (megabytes, AUROC in percent), narrowest first, and whose photos these are."""
    rows, ours, theirs = ablations.ablate("width", args), [], []
    for records in rows.values():
        detector = ladmim.load_detector(Path(records[0]["run"]), records[0]["category"],
                                        runs.pick_device(None))
        size = rival.ladmim_megabytes(detector)
        ours.append((size, mean_auroc([record["both"] for record in records])))
    ordinary = Path(rows["1 times the preset's mim_width"][0]["run"])
    with runs.lock(ordinary / "rivals", "wait until it ends"):
        photos = rival.Photos(evaluation.read_run(ordinary), args.cache)
        for width in WIDTHS:
            name = "efficientad" if width == 1 else f"efficientad-{width:g}"
            kept = baselines.keep(photos, name, lambda photos, steps:
                                  efficientad.run(photos, steps, width, name), args.steps)
            figures = photos.aurocs(kept["scores"]["EfficientAD-S"])
            theirs.append((kept["megabytes"], mean_auroc(list(figures.values()))))
    return {"LADMIM": ours, "EfficientAD-S": theirs}, evaluation.data_title(records[0])


def draw(curves: dict[str, list[tuple[float, float]]], title: str, about: str) -> Image.Image:
    """Megabytes, on a logarithmic axis, against AUROC; a line a system."""
    sheet, font = Image.new("RGB", SIZE, "white"), ImageFont.load_default(14)
    pen, found = ImageDraw.Draw(sheet), [point for curve in curves.values() for point in curve]
    sizes, heights = [math.log2(mb) for mb, _ in found], [y for _, y in found]
    first, last = math.floor(min(sizes)), max(math.ceil(max(sizes)), math.floor(min(sizes)) + 1)
    high = min(100, 5 * math.ceil((max(heights) + 0.1) / 5))
    low = min(5 * math.floor(min(heights) / 5), high - 5)

    def at(mb: float, auroc: float) -> tuple[float, float]:
        return (LEFT + (math.log2(mb) - first) / (last - first) * (SIZE[0] - LEFT - RIGHT),
                SIZE[1] - BOTTOM - (auroc - low) / (high - low) * (SIZE[1] - TOP - BOTTOM))

    for power in range(first, last + 1):
        x, y = at(2 ** power, low)
        pen.line([(x, y), (x, TOP)], (225, 225, 225))
        pen.text((x, y + 6), f"{2 ** power:g}", "black", font, "ma")
    for auroc in range(low, high + 1, 5):
        x, y = at(2 ** first, auroc)
        pen.line([(x, y), (SIZE[0] - RIGHT, y)], (225, 225, 225))
        pen.text((x - 8, y), str(auroc), "black", font, "rm")
    pen.text((SIZE[0] // 2, 6), title, "black", font, "ma")
    pen.text((SIZE[0] // 2, SIZE[1] - 24), f"model, MB ({about})", "black", font, "ma")
    for (name, curve), colour in zip(curves.items(), COLOURS):
        line = [at(*point) for point in curve]
        pen.line(line, colour, 3)
        for x, y in line:
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], colour)
        pen.text((line[-1][0] + 5, line[-1][1] - 8), name, colour, font, "rb")
    return sheet


def write(argv) -> int:
    parser = data.Parser(prog="bench/figure3.py", description="The paper's Figure 3 as a PNG.")
    add = parser.add_argument
    add("--category", default="all", help="a comma list or all: one model for all of them")
    add("--data", help="the folder that holds the category folders")
    add("--preset", choices=ladmim.PRESETS, default="tiny", help="default: tiny")
    add("--steps", type=options.count, help="at most so many steps of EfficientAD's training")
    add("--runs", type=Path, default=Path("runs"), help="default: runs")
    add("--cache", type=Path, default=Path("cache"), help="default: cache")
    add("--out", type=Path, help="default: figure3.png in the runs' folder")
    parser.set_defaults(together=True, mim_epochs=None, seeds=[0])
    args = parser.parse_args(argv)
    out = args.out or args.runs / "figure3.png"
    evaluation.write_report(out, None, MARK)         # what cannot be written is best said now
    (curves, photos), mark, content = points(args), PngImagePlugin.PngInfo(), io.BytesIO()
    mark.add_text("Software", MARK)
    about = f"{args.preset}, one model of {args.category}"
    about += f", EfficientAD-S {args.steps:,} steps at most" if args.steps else ""
    draw(curves, f"{photos}: AUROC %", about).save(content, "png", pnginfo=mark)
    evaluation.write_report(out, content.getvalue(), MARK)
    rows = [[name, f"{mb:.1f}", evaluation.Spread(auroc / 100)]
            for name, curve in curves.items() for mb, auroc in curve]
    print(evaluation.markdown(f"{photos}, {about}: {out}", ["system", "MB", "AUROC %"], rows))
    return 0


def main(argv=None) -> int:
    return data.run_command(lambda: write(argv))


if __name__ == "__main__":
    sys.exit(main())
