"""Draws runs as one HTML file: what the detectors saw, and below it the tables of eval.py.

    python bench/report.py                          every run under runs/ -> runs/report.html
    python bench/report.py RUN_OR_FOLDER ... --out FILE

The file has no scripts and loads nothing from the network. Of each category it shows the run with
the lowest seed: the worst mistakes with the mask of the largest error and its histograms (the
paper's Figure 5), and every test photo with both maps."""
import base64
import html
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import ladmim  # noqa: E402
import runs  # noqa: E402
from backbone import overlay  # noqa: E402
from bench.localise import tested_photos  # noqa: E402
from data import InputError  # noqa: E402

MARK = "<!-- made by LADMIM's "
PAGE = Path(__file__).with_suffix(".html")           # the page without its content
BLUE, ORANGE, PAPER = "#6aa5f0", "#f0a850", "#1d2026"
SIDE = 128                                           # pixels of a thumbnail's longer side


# Parts of the page

def picture(image: Image.Image, words: str, kind: str = "jpeg") -> str:
    content = io.BytesIO()
    image.save(content, kind)
    text = base64.b64encode(content.getvalue()).decode()
    return (f'<img loading="lazy" width="{image.width}" height="{image.height}" '
            f'alt="{html.escape(words)}" src="data:image/{kind};base64,{text}">')


def figure(pictures: list[str], caption: str, wrong: bool = False, three: bool = False) -> str:
    return (f'<figure{" class=wrong" if wrong else ""}><div class="row{" three" if three else ""}">'
            f'{"".join(pictures)}</div><figcaption>{html.escape(caption)}</figcaption></figure>')


def html_table(title: str, header: list, rows: list) -> str:
    lines = []
    for row in [header, *rows]:
        tag = "th" if row is header else "td"
        cells = [html.escape(evaluation.cell_text(cell)) for cell in row]
        lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
    return (f'<p class="title">{html.escape(title)}</p>'
            f'<div class="wide"><table>{"".join(lines)}</table></div>')


def histogram_plot(p, q) -> Image.Image:
    """p, q (L, K): predicted and actual histogram of a masked region. Of each level the 16 codes
    that differ most: the most frequent ones are often the background's, and predicted well."""
    image = Image.new("RGB", (340, 24 + 62 * len(p)), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    draw.text((6, 3), "predicted", BLUE, font)
    draw.text((80, 3), f"actual: what differs most, levels 1 to {len(p)}", ORANGE, font)
    highest = max(p.max(), q.max())
    for level in range(len(p)):
        bottom, shown = 76 + 62 * level, np.argsort(-abs(p[level] - q[level]))[:16]
        for i, code in enumerate(np.sort(shown)):
            for values, left, colour in ((p, 6 + 21 * i, BLUE), (q, 15 + 21 * i, ORANGE)):
                top = bottom - 48 * values[level, code] / highest
                draw.rectangle((left, top, left + 7, bottom), colour)
    return image


# One category

@dataclass
class Judged:
    """A test photo and what the run says of it."""
    path: Path
    name: str
    label: int
    score: float
    flagged: bool
    maps: dict                                       # this photo's of `read_maps`

    def thumbnail(self, white: int) -> Image.Image:
        photo = data.open_image(self.path, white)
        size = [max(1, round(SIDE * pixels / max(photo.size))) for pixels in photo.size]
        return photo.resize(size, Image.Resampling.BILINEAR)


def judge(scored: evaluation.ScoredRun, category: str) -> tuple[list[Judged], float]:
    """The category's test photos, the highest score first; the threshold."""
    root, photos, maps, _ = tested_photos(scored, category)
    total, _, normals = evaluation.total_scores(scored, category)
    threshold = evaluation.threshold(total[normals])
    score = {root / path: value for path, value in zip(scored.path, total)}
    judged = [Judged(photo.path, f"{photo.kind}/{photo.path.name}", photo.label,
                     score[photo.path], score[photo.path] > threshold, maps[photo.path])
              for photo in sorted(photos, key=lambda photo: -score[photo.path])]
    return judged, threshold


def card(photo: Judged, rank: int, detector: ladmim.Detector) -> str:
    small = photo.thumbnail(detector.white)
    pictures = [picture(small, "photo")]
    for name in ("structural", "logical"):
        heat = overlay(small, photo.maps[name], detector.cfg.image_size)
        pictures.append(picture(heat, f"{name} map"))
    verdict = "anomaly" if photo.flagged else "good"
    return figure(pictures, f"{rank}. {photo.name}: {photo.score:.2f}, {verdict}",
                  photo.flagged != bool(photo.label), three=True)


def mistake(detector: ladmim.Detector, photo: Judged, threshold: float) -> str:
    """The paper's Figure 5: photo, heat map, the mask of the largest error, its histograms."""
    cfg, masks, small = detector.cfg, detector.masks, photo.thumbnail(detector.white)
    image = data.load_image(photo.path, cfg.image_size, detector.white)
    h0, pixels, own = detector.look(image[None])
    _, codes = detector.hvq(h0, own)
    output = detector.mim(h0, masks)
    error = ladmim.mim_error(detector.mim, output, h0, masks, codes.to(torch.int16), pixels)[0][0]
    worst = int(error.argmax())
    mask = masks[worst].numpy()                      # (N,)
    dark = Image.fromarray((mask.reshape(cfg.grid, -1) * 170).astype(np.uint8))
    masked = Image.composite(Image.new("RGB", small.size, "black"), small,
                             dark.resize(small.size, Image.Resampling.NEAREST))
    heat = overlay(small, photo.maps["sum"], cfg.image_size)
    pictures = [picture(small, "photo"), picture(heat, "heat map"),
                picture(masked, "the mask of the largest error")]
    if cfg.target == "histogram":
        p = output[0, worst].softmax(-1).numpy()     # (L, K)
        q = [np.bincount(level[mask], minlength=cfg.codes) for level in codes[0].numpy()]
        plot = histogram_plot(p, np.array(q) / mask.sum())
        pictures.append(picture(plot, "histograms", "png"))
    words = "missed" if photo.label else "false alarm"
    return figure(pictures, f"{words}: {photo.name}, score {photo.score:.2f} against "
                  f"{threshold:.2f}")


@torch.inference_mode()
def category_section(scored: evaluation.ScoredRun, category: str) -> str:
    """The three lowest anomalies that were missed, the three highest false alarms, all photos."""
    judged, threshold = judge(scored, category)
    missed = [photo for photo in reversed(judged) if photo.label and not photo.flagged]
    alarms = [photo for photo in judged if photo.flagged and not photo.label]
    bad = sum(photo.label for photo in judged)
    detector = ladmim.load_detector(scored.folder, category, runs.pick_device("cpu"))
    mistakes = [mistake(detector, photo, threshold) for photo in missed[:3] + alarms[:3]]
    cards = [card(photo, rank, detector) for rank, photo in enumerate(judged, 1)]
    return (f"<p>At the threshold {threshold:.2f}, {len(alarms)} of {len(judged) - bad} good "
            f"photos are flagged, {len(missed)} of {bad} anomalies missed.</p>"
            f'<h3>Worst mistakes</h3><div class="grid">{"".join(mistakes)}</div>'
            f"<details><summary>All {len(judged)} photos by score: photo, structural, logical map; "
            f'wrong verdicts framed</summary><div class="grid">{"".join(cards)}</div></details>')


def page(records: list[dict], problems: list[str]) -> str:
    """A category whose photos or models are gone gets a line instead of pictures, and a problem."""
    body, keys = [], ("data", "rendered", "category", *evaluation.GROUP)
    for members in evaluation.grouped(records, *keys).values():
        first = min(members, key=lambda record: record["seed"])
        try:
            with data.readable():
                scored = evaluation.read_run(Path(first["run"]))
                section = category_section(scored, first["category"])
        except InputError as error:
            problems.append(str(error))
            section = f"<p>No pictures: {html.escape(str(error))}</p>"
        title = (f"{evaluation.data_title(first)}: {first['category']}, {first['preset']}, "
                 f"trained on {first['trained on']}, seed {first['seed']}")
        figures = ", ".join(f"{name} {100 * first['both'][name]:.1f}" for name in first["columns"]
                            if name in first["both"])
        body.append(f"<h2>{html.escape(title)}</h2><p>AUROC %: {html.escape(figures)}</p>{section}")
    body += ["<h2>Tables</h2>", *(html_table(*table) for table in evaluation.all_tables(records))]
    protocol = html.escape(evaluation.PROTOCOL.format(evaluation.STANDARDISED))
    text = PAGE.read_text(encoding="utf-8")
    return text.replace("{protocol}", protocol).replace("{body}", "".join(body))


def write(argv) -> int:
    parser = data.Parser(prog="bench/report.py", description="Draws runs as one HTML file.")
    evaluation.add_runs(parser, "--out")
    args = parser.parse_args(argv)
    folders = evaluation.chosen_runs(args, "report.html", MARK)
    records, problems = evaluation.evaluate_runs(folders)
    file = args.file or args.runs / "report.html"
    evaluation.write_report(file, page(records, problems).encode(errors="replace"), MARK)
    print(file)
    data.warn(problems)
    return 1 if problems else 0


def main(argv=None) -> int:
    return data.run_command(lambda: write(argv))


if __name__ == "__main__":
    sys.exit(main())
