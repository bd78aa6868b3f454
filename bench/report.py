"""The HTML report of eval.py: the tables, and what the detectors saw. One file, no scripts, nothing from elsewhere.

For each category the run with the lowest seed is shown: ROC curves, score histograms, every test photo with both maps, the
worst mistakes with the mask that saw most and its histograms (the paper's Figure 5), and the codes of all levels (Figure 4).
"""
from __future__ import annotations

import base64
import colorsys
import html
import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import eval as evaluation
import ladmim
from data import InputError

MARK = "<!-- made by LADMIM's eval.py -->"
PAGE = """<!doctype html>{mark}<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>LADMIM report</title><style>
body{{background:#14161a;color:#d8dce2;font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1200px;padding:0 1rem 4rem}}
h1,h2,h3{{color:#f2f4f7;line-height:1.2;overflow-wrap:anywhere}} h2{{margin-top:3rem}} a{{color:#8ab4f8}}
.wide{{overflow-x:auto}} table{{border-collapse:collapse;font-size:.85rem}} .title{{margin:1.5rem 0 .3rem;font-weight:600}}
td,th{{border-bottom:1px solid #333a44;padding:.25rem .7rem;text-align:left;white-space:nowrap}}
.grid{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.8rem}}
figure{{margin:0;background:#1d2026;border-radius:.5rem;padding:.6rem;overflow:hidden}}
figcaption{{font-size:.85rem;overflow-wrap:anywhere}}
figure img{{max-width:100%;height:auto;border-radius:.2rem}}
.row{{display:flex;gap:.3rem;flex-wrap:wrap}} .three img{{width:32%}}
.wrong{{outline:2px solid #ff6b5e}} .leak{{background:#5e1b14;padding:.6rem}}
summary{{cursor:pointer;padding:.6rem 0;font-weight:600}}
</style><h1>LADMIM report</h1><p>{protocol}</p>{body}</html>
"""
INK, PAPER, LINE, BLUE, ORANGE, RED = "#d8dce2", "#1d2026", "#4a525e", "#6aa5f0", "#f0a850", "#ff6b5e"
SIDE = 128                                           # pixels of a thumbnail


def picture(image: Image.Image, words: str, photo: bool = True) -> str:
    content = io.BytesIO()
    image.save(content, "JPEG" if photo else "PNG", **({"quality": 75} if photo else {"optimize": True}))
    kind, text = "jpeg" if photo else "png", base64.b64encode(content.getvalue()).decode()
    return (f'<img loading="lazy" width="{image.width}" height="{image.height}" alt="{html.escape(words, quote=True)}" '
            f'src="data:image/{kind};base64,{text}">')


def figure(pictures: list[str], caption: str, wrong: bool = False, three: bool = False) -> str:
    return (f'<figure{" class=wrong" if wrong else ""}><div class="row{" three" if three else ""}">{"".join(pictures)}</div>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def html_table(title: str, header: list, rows: list) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(evaluation.cell_text(cell))}</{tag}>" for cell in cells) + "</tr>"
    body = "".join(line(row, "td") for row in rows)
    return f'<p class="title">{html.escape(title)}</p><div class="wide"><table>{line(header, "th")}{body}</table></div>'


# Plots

def canvas(width: int, height: int):
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image), ImageFont.load_default(13)


def roc_plot(curves: dict) -> Image.Image:
    """curves: name -> (labels, scores), labels 1 for anomalies."""
    image, draw, font = canvas(340, 360)
    draw.rectangle((30, 10, 330, 310), outline=LINE)
    draw.line((30, 310, 330, 10), LINE)
    draw.text((120, 316), "false positive rate", INK, font)
    for place, (colour, (name, (labels, scores))) in enumerate(zip((BLUE, ORANGE, RED), curves.items())):
        order = np.argsort(-scores, kind="stable")
        ends = np.append(np.diff(scores[order]) != 0, True)                       # a tie is one step
        hits, alarms = (np.append(0, part[order].cumsum()[ends] / part.sum()) for part in (labels, 1 - labels))
        draw.line([(30 + 300 * x, 310 - 300 * y) for x, y in zip(alarms, hits)], colour, 2)
        draw.text((120, 250 + 18 * place), f"{name} {100 * evaluation.auroc(labels, scores):.1f}", colour, font)
    return image


def score_plot(groups: dict, threshold: float) -> Image.Image:
    """groups: name -> scores; a row of bars each, the threshold a line through them. The axis is asinh: even near 0, where
    normals lie, logarithmic beyond, so that anomalies a thousand standard deviations away leave the normals their place."""
    image, draw, font = canvas(340, 30 + 80 * len(groups))
    groups, threshold = {name: np.arcsinh(scores) for name, scores in groups.items()}, np.arcsinh(threshold)
    everything = np.concatenate([*groups.values(), [threshold]])
    edges = np.linspace(everything.min(), everything.max() + 1e-9, 41)
    at = 10 + 320 * (threshold - edges[0]) / (edges[-1] - edges[0])
    for row, (name, scores) in enumerate(groups.items()):
        count, _ = np.histogram(scores, edges)
        bottom = 85 + 80 * row
        for i, n in enumerate(count):
            if n:
                colour = BLUE if "good" in name else ORANGE
                draw.rectangle((10 + 8 * i, bottom - 55 * n / count.max(), 16 + 8 * i, bottom), colour)
        draw.text((10, bottom - 76), name, INK, font)
        draw.line((at, bottom - 57, at, bottom), RED, 2)
    draw.text((min(at + 4, 250), image.height - 18), f"threshold {np.sinh(threshold):.1f}", RED, font)
    return image


def histogram_plot(p, q) -> Image.Image:
    """p, q (L, K): predicted and actual histogram of a masked region; of each level the 16 codes that matter most."""
    image, draw, font = canvas(340, 24 + 62 * len(p))
    draw.text((6, 3), "predicted", BLUE, font)
    draw.text((80, 3), f"actual, codes of levels 1 to {len(p)} downwards", ORANGE, font)
    for level, (predicted, actual) in enumerate(zip(p, q)):
        bottom, shown = 76 + 62 * level, np.argsort(-np.maximum(predicted, actual))[:16]
        for i, code in enumerate(np.sort(shown)):
            for value, left, colour in ((predicted[code], 6 + 21 * i, BLUE), (actual[code], 15 + 21 * i, ORANGE)):
                draw.rectangle((left, bottom - 48 * value / max(p.max(), q.max()), left + 7, bottom), colour)
    return image


def code_map(codes, count: int) -> Image.Image:
    """codes (g, g) -> a colour for each of `count` codes, neighbours in number far apart in hue."""
    colours = np.array([colorsys.hsv_to_rgb(i * 0.618 % 1, 0.55 + 0.45 * (i % 3) / 2, 0.95 - 0.4 * (i % 2))
                        for i in range(count)])
    return Image.fromarray((255 * colours[codes]).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


# One category

def thumbnail(path: Path) -> Image.Image:
    return data.open_image(path).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def masked(photo: Image.Image, mask) -> Image.Image:
    """photo (SIDE, SIDE) with the mask's tokens (g, g) darkened."""
    dark = Image.fromarray((mask * 170).astype(np.uint8)).resize(photo.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", photo.size, "black"), photo, dark)


@torch.inference_mode()
def mistake(detector: ladmim.Detector, path: Path, heat, caption: str) -> str:
    """The paper's Figure 5: a photo, its heat map (g, g), the mask that saw most, and the histograms it compared."""
    cfg = detector.cfg
    h0, pixels = detector.look(data.load_image(path, cfg.image_size)[None])
    _, codes = detector.hvq(h0)
    output = detector.mim(h0, detector.masks)
    error = ladmim.mim_error(detector.mim, output, h0, detector.masks, codes.to(torch.int16), pixels)[0]
    worst = int(error.argmax())
    mask = detector.masks[worst]
    photo = thumbnail(path)
    pictures = [picture(photo, "photo"), picture(evaluation.overlay(photo, heat, cfg.image_size), "heat map"),
                picture(masked(photo, mask.view(cfg.grid, -1).numpy()), "the mask that saw most")]
    if cfg.target == "histogram":
        p = output[0, worst].softmax(-1).numpy()     # (L, K)
        q = np.array([np.bincount(level[mask], minlength=cfg.codes) for level in codes[0].numpy()]) / int(mask.sum())
        pictures.append(picture(histogram_plot(p, q), "histograms", False))
    return figure(pictures, caption)


@torch.inference_mode()
def code_section(detector: ladmim.Detector, photos: list, root: Path, category: str) -> str:
    """The paper's Figure 4 over some of the photos: code maps, patches that share a code, and how codes meet defects."""
    cfg, defects = detector.cfg, data.load_defects(root, category)
    good, bad = ([photo for photo in photos if bool(photo.label) is label] for label in (False, True))
    good, bad = good[:8], [photo for photo in bad if photo.masks][::max(1, len(bad) // 12)][:12]
    images = np.stack([data.load_image(photo.path, cfg.image_size) for photo in good + bad])
    codes = torch.cat([detector.hvq(detector.look(part)[0])[1] for part in np.array_split(images, max(1, len(images) // 8))])
    codes = codes.view(len(images), cfg.levels, cfg.grid, cfg.grid).numpy()
    parts, rows = [], []
    for name, i in (("a good photo", 0), ("an anomaly", len(good))):
        if i < len(images):
            maps = [picture(code_map(level, cfg.codes), f"codes of level {n}", False) for n, level in enumerate(codes[i], 1)]
            parts.append(figure([picture(Image.fromarray(images[i]).resize((SIDE, SIDE)), name), *maps],
                                f"{name}: codes of levels 1 to {cfg.levels}"))
    step = (cfg.image_size - 29) // 4 // cfg.grid
    for level in range(cfg.levels):
        found = codes[:len(good), level]
        code = np.bincount(found.ravel()).argmax()
        places = np.argwhere(found == code)
        crops = []
        for i, row, column in places[np.random.default_rng(0).permutation(len(places))[:12]]:
            y, x = (4 * step * at + 2 * (step - 1) for at in (row, column))       # what the token's middle position sees
            crops.append(picture(Image.fromarray(images[i, y:y + 33, x:x + 33]).resize((64, 64)), "patch"))
        parts.append(figure(crops, f"level {level + 1}: patches that carry code {code}, its most frequent one"))
        # A token belongs to a defect where the middle of what it sees does.
        known, collisions, tokens, kinds = set(found.ravel().tolist()), 0, 0, []
        for photo, photo_codes in zip(bad, codes[len(good):, level]):
            regions = data.load_regions(photo, defects)
            mask = np.any([mask for mask, _ in regions], 0) if regions else np.zeros((1, 1), bool)
            at = (16.5 + 2 * (step - 1) + 4 * step * np.arange(cfg.grid)) / cfg.image_size
            rows_at, columns_at = ((at * n).astype(int) for n in mask.shape)
            inside = photo_codes[mask[rows_at][:, columns_at]].tolist()
            tokens, collisions = tokens + len(inside), collisions + sum(code in known for code in inside)
            kinds += [len(set(inside))] if inside else []
        rows.append([str(level + 1), f"{100 * collisions / tokens:.0f} %" if tokens else "–",
                     f"{np.mean(kinds):.1f}" if kinds else "–", str(len(known))])
    parts.append("</div>" + html_table(
        f"Codes against ground truth, {len(good)} good photos and {len(bad)} anomalies. Collision: defect tokens whose code "
        "good photos carry too. Redundancy: different codes within one photo's defects.",
        ["level", "collision", "redundancy", "codes in good photos"], rows) + "<div>")
    return f'<h3>Codes</h3><div class="grid">{"".join(parts)}</div>'


def category_section(run: evaluation.Run, category: str) -> str:
    root, photos, maps = evaluation.tested_photos(run, category)
    size = run.config["image_size"]
    own = run.category == category
    normals = own & ~run.test & (run.kind == "good")
    both = sum(evaluation.standardise(s, s[normals]) for s in (run.s_hvq, run.s_mim))
    threshold, kind = evaluation.threshold(both[normals]), run.kind[own & run.test]
    tested, curves = both[own & run.test], {}
    groups = evaluation.anomaly_groups(kind)
    for name, kinds in groups.items() if evaluation.ANY not in groups else [(evaluation.ANY, groups[evaluation.ANY])]:
        pick = np.isin(kind, ["good", *kinds])
        curves[name] = (kind != "good")[pick].astype(int), tested[pick]
    plots = [figure([picture(roc_plot(curves), "ROC curves", False)], "ROC curves, AUROC %"),
             figure([picture(score_plot({"validation, good": both[normals],
                                         **{f"test, {name}": tested[kind == name] for name in sorted(set(kind))}},
                                        threshold), "scores", False)],
                    f"scores, asinh scale; the threshold is the {evaluation.PERCENTILE}th percentile of the validation normals")]
    score = {root / path: value for path, value in zip(maps, both)}               # maps.npz has scores.csv's order
    ranked, cards = sorted(photos, key=lambda photo: -score[photo.path]), []
    for rank, photo in enumerate(ranked, 1):
        found, flagged = maps[photo.path.relative_to(root).as_posix()], score[photo.path] > threshold
        small = thumbnail(photo.path)
        cards.append(figure([picture(small, "photo"), *(picture(evaluation.overlay(small, found[part], size), f"{part} map")
                                                        for part in ("structural", "logical"))],
                            f"{rank}. {photo.kind}/{photo.path.name}: {score[photo.path]:.2f}, "
                            f"{'anomaly' if flagged else 'good'}", flagged != bool(photo.label), three=True))
    detector = ladmim.load_detector(run.folder, category, torch.device("cpu"))
    alarms = [photo for photo in ranked if not photo.label and score[photo.path] > threshold][:3]
    misses = [photo for photo in reversed(ranked) if photo.label and score[photo.path] <= threshold][:3]
    wrong = [mistake(detector, photo.path, maps[photo.path.relative_to(root).as_posix()]["sum"],
                     f"{words}: {photo.kind}/{photo.path.name}, score {score[photo.path]:.2f} against {threshold:.2f}")
             for words, found in (("missed", misses), ("false alarm", alarms)) for photo in found]
    return (f'<h3>Scores</h3><div class="grid">{"".join(plots)}</div>'
            f'<h3>Worst mistakes</h3><div class="grid">{"".join(wrong)}</div>'
            f"{code_section(detector, photos, root, category)}"
            f"<details><summary>All {len(photos)} test photos by score: photo, structural map, logical map; wrong verdicts "
            f'framed</summary><div class="grid">{"".join(cards)}</div></details>')


def write(file: Path, tables: list[tuple], records: list[dict], banner: str) -> None:
    """Replaces an earlier report; refuses to write over anything else. A category whose photos or models are no longer there
    gets a line instead of pictures."""
    try:
        if file.exists() and MARK.encode() not in file.read_bytes()[:200]:
            raise InputError(f"--report {file} exists and is no report of eval.py: name another file")
    except OSError as error:
        raise InputError(f"--report {file} can't be read ({error.strerror}): name another file") from None
    body = [f'<p class="leak">{html.escape(banner)}</p>'] if banner else []
    body += [html_table(*table) for table in tables]
    for (_, _, category, preset, _, trained), rs in evaluation.grouped(records, "data", "rendered", "category",
                                                                      *evaluation.GROUP).items():
        first = min(rs, key=lambda record: record["seed"])
        try:
            section = category_section(evaluation.read_run(Path(first["run"])), category)
        except InputError as error:
            section = f"<p>No pictures: {html.escape(str(error))}</p>"
        body.append(f"<h2>{html.escape(evaluation.data_title(first))}: {html.escape(category)}, {html.escape(preset)}, "
                    f"trained on {html.escape(trained)}, seed {first['seed']}</h2>{section}")
    protocol = html.escape(evaluation.PROTOCOL.format(banner or evaluation.STANDARDISED))
    text = PAGE.format(mark=MARK, protocol=protocol, body="".join(body))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, file)
    except OSError as error:
        raise InputError(f"--report {file} can't be written ({error.strerror}): name another file") from None
