"""The rendered twin of MVTec LOCO: a kit that draws parts into a photo, and the folder layout they are written in.

A scene (scenes_a.py, scenes_b.py) draws one category with it, with or without a fault. Nothing here needs torch.
"""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter


@dataclass
class Scene:
    """A photo in the making. Shapes are given in units of the photo's side, x right, y down, and pass through `pose`
    (camera shift, turn, zoom) to canvas pixels. A shape is a Pillow "L" image of the canvas: 255 inside, 0 outside."""
    rng: np.random.Generator
    side: int                                                  # canvas pixels: twice the photo's side
    pose: np.ndarray = None                                    # (2, 3): points @ pose[:, :2].T + pose[:, 2]
    photo: np.ndarray = None                                   # (side, side, 3) float32, 0 to 1, stored as 3 planes
    regions: list = field(default_factory=list)                # (defect name, shape): the ground truth

    def aim(self, shift=0.01, turn=1.5, zoom=0.02):
        """Jitters the camera: shift in sides, turn in degrees, zoom relative; standard deviations, cut at two."""
        dx, dy, angle, scale = np.clip(self.rng.normal(size=4), -2, 2) * (shift, shift, math.radians(turn), zoom)
        c, s = math.cos(angle) * (1 + scale), math.sin(angle) * (1 + scale)
        move = np.array([0.5 + dx, 0.5 + dy]) - np.array([[c, -s], [s, c]]) @ (0.5, 0.5)
        self.pose = self.side * np.array([[c, -s, move[0]], [s, c, move[1]]])

    def pixels(self, points):
        """(n, 2) scene units -> list of canvas pixel pairs."""
        points = np.asarray(points, float).reshape(-1, 2)
        return [tuple(p) for p in points @ self.pose[:, :2].T + self.pose[:, 2]]


def polygon(scene, points):
    shape = Image.new("L", (scene.side, scene.side))
    ImageDraw.Draw(shape).polygon(scene.pixels(points), fill=255)
    return shape


def turned(points, centre, angle):
    """Points about the origin, turned by `angle` degrees, moved to `centre`."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return np.asarray(points) @ np.array([[c, s], [-s, c]]) + centre


def ellipse(scene, centre, rx, ry, angle=0.0, wobble=0.0):
    """Ellipse, or a natural blob where wobble (relative deviation of the radius) is not 0."""
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    r = np.ones_like(t)
    for k in (2, 3, 5) if wobble else ():
        r += wobble / k * scene.rng.normal() * np.cos(k * t + scene.rng.uniform(0, 2 * math.pi))
    return polygon(scene, turned(np.stack([rx * r * np.cos(t), ry * r * np.sin(t)], 1), centre, angle))


def box(scene, centre, w, h, angle=0.0, radius=0.0):
    """Rectangle of width w and height h with rounded corners."""
    if not radius:
        corners = [(-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2)]
    else:
        t = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        corner = np.sign(np.stack([np.cos(t), np.sin(t)], 1)) * (w / 2 - radius, h / 2 - radius)
        corners = corner + radius * np.stack([np.cos(t), np.sin(t)], 1)
    return polygon(scene, turned(corners, centre, angle))


def stroke(scene, points, width):
    """A line of given width (scene units) with round joints and ends."""
    shape, pixels, w = Image.new("L", (scene.side, scene.side)), scene.pixels(points), width * scene.side
    draw = ImageDraw.Draw(shape)
    draw.line(pixels, fill=255, width=max(1, round(w)), joint="curve")
    for x, y in (pixels[0], pixels[-1]):
        draw.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=255)
    return shape


union, minus, common = ImageChops.lighter, ImageChops.subtract, ImageChops.darker


def curve(start, control, end, n=24):
    """(n, 2) points of a quadratic Bezier curve."""
    t = np.linspace(0, 1, n)[:, None]
    return (1 - t) ** 2 * np.asarray(start) + 2 * t * (1 - t) * np.asarray(control) + t ** 2 * np.asarray(end)


def soft(shape, radius):
    """The shape with its rim blurred over `radius` canvas pixels of a 512 pixel canvas."""
    x0, y0, x1, y1 = shape.getbbox() or (0, 0, 1, 1)
    radius = radius * shape.width / 512
    reach = math.ceil(3 * radius)
    bounds = (max(x0 - reach, 0), max(y0 - reach, 0), min(x1 + reach, shape.width), min(y1 + reach, shape.height))
    result = Image.new("L", shape.size)
    result.paste(shape.crop(bounds).filter(ImageFilter.GaussianBlur(radius)), bounds[:2])
    return result


def noise(rng, height, width, scale):
    """Smooth noise (height, width) of standard deviation about 1 whose blobs are `scale` pixels wide."""
    rows, columns = int(height / scale) + 3, int(width / scale) + 3
    coarse = Image.fromarray(rng.normal(size=(rows, columns)).astype(np.float32))
    grown = coarse.resize((math.ceil(columns * scale), math.ceil(rows * scale)), Image.BICUBIC)
    return np.asarray(grown)[:height, :width]


def soften(height, radius):
    """Blurs a float array (height, width) with three box filters, which is about a Gaussian of deviation `radius`.
    An 8-bit blur would leave its steps of 1/255 as contour rings once shading takes the gradient."""
    half = max(1, round(radius))
    for axis in (0, 1) * 3:
        pad = [(half + 1, half) if a == axis else (0, 0) for a in (0, 1)]
        total, n = np.cumsum(np.pad(height, pad), axis=axis, dtype=np.float32), height.shape[axis]
        total = np.moveaxis(total, axis, 0)
        height = np.moveaxis((total[2 * half + 1:] - total[:n]) / (2 * half + 1), 0, axis)
    return height


def background(scene, colour, grain=0.02, scale=3.0, blotch=0.03):
    """Fills the photo with a surface of one colour (three values, 0 to 1), fine grain and slow blotches."""
    n = scene.side
    tone = 1 + grain * noise(scene.rng, n, n, scale * n / 512) + blotch * noise(scene.rng, n, n, n / 5)
    scene.photo = (tone * np.asarray(colour, np.float32)[:, None, None]).transpose(1, 2, 0)


def stamp(scene, shape, colour, grain=0.05, scale=4.0, bulge=0.0, gloss=0.0, shadow=0.0, alpha=1.0):
    """Paints a part into the photo.

    colour: three values, 0 to 1. grain: relative deviation of the
    texture, `scale` its size in pixels of a 512 pixel canvas. bulge: how strongly the rim is shaded as of a rounded
    body lit from the upper left, its width growing with the part. gloss: strength of the highlight. shadow: darkness
    of the drop shadow. alpha: opacity. Only the part's surroundings are touched, so that small parts are cheap.
    """
    bounds = shape.getbbox()
    if bounds is None:
        return
    unit = scene.side / 512
    pad = round(14 * unit) if shadow or bulge or gloss else 0
    x0, y0 = max(bounds[0] - pad, 0), max(bounds[1] - pad, 0)
    x1, y1 = min(bounds[2] + pad, scene.side), min(bounds[3] + pad, scene.side)
    h, w = y1 - y0, x1 - x0
    part = shape.crop((x0, y0, x1, y1))
    cover = np.asarray(part, np.float32) / 255                                                    # (h, w)
    here = scene.photo[y0:y1, x0:x1].transpose(2, 0, 1)                                           # a view (3, h, w)
    if shadow:
        fallen = ImageChops.offset(part, round(5 * unit), round(6 * unit)).filter(ImageFilter.GaussianBlur(5 * unit))
        here *= 1 - shadow / 255 * np.asarray(fallen, np.float32) * (1 - cover)
    tone = 1 + grain * noise(scene.rng, h, w, scale * unit) if grain else np.ones((h, w), np.float32)
    if bulge or gloss:
        radius = max(1.5, min(bounds[2] - bounds[0], bounds[3] - bounds[1]) / 6)
        step = max(1, int(radius / 4))                             # a wide blur needs no more than every step-th pixel
        height = soften(np.asarray(part.reduce(step), np.float32) / 255, radius / step)
        dy, dx = np.gradient(height)
        lit = (dx + 1.2 * dy) * radius / step                                                     # > 0: faces the light
        grown = lambda a: np.asarray(Image.fromarray(a).resize((w, h), Image.BICUBIC))
        tone *= grown(1 + bulge * 0.8 * np.tanh(lit / 0.8))
    paint = tone * np.asarray(colour, np.float32)[:, None, None]
    if gloss:
        bright = lit.max() + 1e-6
        paint += grown(gloss * np.exp(-((lit / bright - 0.6) / 0.25) ** 2) * height)
    paint -= here
    paint *= alpha * cover
    here += paint


def develop(scene, size, blur=0.7, light=0.06, grain=0.012):
    """Canvas -> photo: defocus, averaging down, uneven light, exposure and white balance, sensor noise.
    Returns uint8 (size, size, 3) and the regions as (name, bool (size, size))."""
    rng = scene.rng
    canvas = Image.fromarray((np.clip(scene.photo, 0, 1) * 255).astype(np.uint8))
    focus = ImageFilter.GaussianBlur(blur * rng.uniform(0.8, 1.4) * size / 512)
    photo = np.asarray(canvas.resize((size, size), Image.BOX).filter(focus), np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    tilt, gain = rng.normal(size=2) * light, (1 + rng.normal() * 0.04) * (1 + rng.normal(size=3) * 0.018)
    photo = photo * ((1 + tilt[0] * x + tilt[1] * y)[..., None] * gain) + rng.normal(size=photo.shape) * 255 * grain
    masks = [(name, np.asarray(shape.resize((size, size), Image.BOX)) > 127) for name, shape in scene.regions]
    return np.clip(photo + 0.5, 0, 255).astype(np.uint8), masks


def scenes():
    """{category: (function drawing it, {fault: (kind, saturation_threshold, relative_saturation)})}"""
    # Not at the top: they import this file.
    import scenes_a as a
    import scenes_b as b

    return {"breakfast_box": (a.breakfast_box, a.BREAKFAST_BOX),
            "juice_bottle": (a.juice_bottle, a.JUICE_BOTTLE),
            "pushpins": (b.pushpins, b.PUSHPINS),
            "screw_bag": (b.screw_bag, b.SCREW_BAG),
            "splicing_connectors": (b.splicing_connectors, b.SPLICING_CONNECTORS)}


def draw(category, split, kind, index, size, seed):
    """One photo of a category: uint8 (size, size, 3) and its regions [(fault, bool (size, size))]. The faults of a kind
    take turns; the photo depends on nothing but the arguments."""
    scene_of, faults = scenes()[category]
    names = [name for name, (its_kind, _, _) in faults.items() if its_kind == kind]
    scene = Scene(np.random.default_rng([seed, zlib.crc32(f"{category}{split}{kind}".encode()), index]), 2 * size)
    scene_of(scene, names[index % len(names)] if names else None)
    return develop(scene, size)


def draw_share(folder, category, counts, size, seed, share, shares):
    """Draws and writes every `shares`-th photo of a category, from number `share` on: the work of one process."""
    pixel_value = {name: 255 - i for i, name in enumerate(scenes()[category][1])}
    photos = [(split, kind, i) for (split, kind), n in folders_of(counts).items() for i in range(n)]
    for split, kind, i in photos[share::shares]:
        photo, regions = draw(category, split, kind, i, size, seed)
        truth = Path(folder, "ground_truth", kind, f"{i:03}")
        for k, (name, region) in enumerate(regions):
            truth.mkdir(parents=True, exist_ok=True)
            Image.fromarray(region * np.uint8(pixel_value[name])).save(truth / f"{k:03}.png")
        Image.fromarray(photo).save(Path(folder, split, kind, f"{i:03}.png"), compress_level=1)


def folders_of(counts):
    """{(split, kind): number of photos}"""
    return {("train", "good"): counts["train"], ("validation", "good"): counts["validation"],
            **{("test", kind): counts[kind] for kind in ("good", "logical_anomalies", "structural_anomalies")}}


def refusal(message):
    # Not at the top: data.py imports this file.
    from data import InputError

    return InputError(message)


COUNTS = {"train": 100, "validation": 30, "good": 40, "logical_anomalies": 40, "structural_anomalies": 40}


def render(out: Path, category: str, counts: dict, size: int = 256, seed: int = 1):
    """Writes the rendered twin of one category, out/category, in MVTec LOCO's layout.

    counts: photos by "train", "validation", "good", "logical_anomalies", "structural_anomalies" (COUNTS where left
    out); size: the photo's side in pixels. The same arguments give the same pixels on any number of processes. The
    folder appears once it is complete. Raises InputError where it exists already or cannot be written.
    """
    out, counts = Path(out), {**COUNTS, **counts}
    if category not in scenes():
        raise refusal(f"category {category!r} cannot be rendered; choose from {', '.join(scenes())}")
    if (out / category).exists():
        raise refusal(f"{out / category} exists already; remove it or give another --out")
    total, shares = sum(folders_of(counts).values()), min(os.cpu_count() or 1, 16)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{category}-", dir=out) as unfinished:
            folder = Path(unfinished, category)
            for split, kind in folders_of(counts):
                Path(folder, split, kind).mkdir(parents=True)
            config = [{"defect_name": name, "pixel_value": 255 - i, "relative_saturation": relative,
                       "saturation_threshold": threshold if relative else round(threshold * (size / 256) ** 2)}
                      for i, (name, (_, threshold, relative)) in enumerate(scenes()[category][1].items())]
            (folder / "defects_config.json").write_text(json.dumps(config, indent=4))
            # Fresh interpreters, not a pool: nothing of the caller (torch, its threads) is forked or imported again.
            start = ("import json, sys; sys.path.insert(0, sys.argv[1]); import twin; "
                     "twin.draw_share(*json.loads(sys.argv[2]))")
            here, work = str(Path(__file__).parent), [str(folder), category, counts, size, seed]
            workers = [subprocess.Popen([sys.executable, "-c", start, here, json.dumps([*work, share, shares])],
                                        stderr=subprocess.PIPE, text=True) for share in range(shares)]
            try:
                while any(w.poll() is None for w in workers):
                    time.sleep(0.2)
                    if sys.stderr.isatty():
                        done = sum(1 for split, kind in folders_of(counts) for _ in (folder / split / kind).iterdir())
                        print(f"\rrendering {category}: {done}/{total} photos", end="", file=sys.stderr)
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()
            said = [worker.communicate()[1].strip() or f"exit code {worker.returncode}" for worker in workers]
            for worker, text in zip(workers, said):
                if worker.returncode:
                    raise refusal(f"rendering {out / category} failed ({text.splitlines()[-1]}); nothing was written")
            folder.rename(out / category)
    except OSError as error:
        raise refusal(f"cannot write {out / category}: {error.strerror}; choose another --out") from error
    print(f"\rrendered {category}: {total} photos of {size} x {size} pixels in {out / category}", file=sys.stderr)
