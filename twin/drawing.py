"""What every category draws with: a scene, shapes, `stamp` that paints a shape, and `develop`."""
import math
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter


@dataclass
class Scene:
    """A photo in the making. Positions and lengths are in units of its side, x right, y down.
    A shape is a Pillow "L" image of the canvas: 255 inside, 0 outside."""
    rng: np.random.Generator
    side: int                    # of the canvas in pixels, twice the photo's
    mirrored: bool = False       # left is right
    photo: np.ndarray = None     # (3, side, side) float32, 0 to 1
    regions: list = field(default_factory=list)      # the fault's ground truth, shapes

    def __post_init__(self):     # the camera is fixed, but for a pixel or two
        self.shift = np.clip(self.rng.normal(size=2), -2, 2) * 0.002

    def pixels(self, points):
        """(..., 2) scene units -> (..., 2) canvas pixels."""
        points = np.array(points, float)
        if self.mirrored:
            points[..., 0] = 1 - points[..., 0]
        return self.side * (points + self.shift)


def turned(points, angle, centre=(0, 0), squeeze=1):
    """(..., 2) points about the origin, turned by `angle` degrees and moved to `centre`. Our photos
    are square: where LOCO's is wide, `squeeze`, its height / width, shrinks x lengths."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return np.asarray(points) @ np.array([[c, s], [-s, c]]) * (squeeze, 1) + centre


def circle(n):
    """(n, 2) points of the unit circle."""
    t = np.linspace(0, 2 * math.pi, n, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], 1)


def polygon(scene, points):
    shape = Image.new("L", (scene.side, scene.side))
    ImageDraw.Draw(shape).polygon(scene.pixels(points).ravel().tolist(), fill=255)
    return shape


def stroke(scene, width, *lines):
    """Lines of a width, round at their joints and ends."""
    shape, w = Image.new("L", (scene.side, scene.side)), width * scene.side
    pen = ImageDraw.Draw(shape)
    for line in map(scene.pixels, lines):
        pen.line(line.ravel().tolist(), fill=255, width=max(1, round(w)), joint="curve")
        for x, y in line[[0, -1]]:
            pen.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=255)
    return shape


def ellipse(scene, centre, rx, ry, angle=0.0, wobble=0.0):
    """Ellipse, or a natural blob where wobble (relative deviation of the radius) is not 0."""
    t, r = np.linspace(0, 2 * math.pi, 64, endpoint=False), np.ones(64)
    for k in (2, 3, 5) if wobble else ():
        r += wobble / k * scene.rng.normal() * np.cos(k * t + scene.rng.uniform(0, 2 * math.pi))
    outline = np.outer(r, (rx, ry)) * circle(64)
    return polygon(scene, turned(outline, angle, centre))


def box(scene, centre, w, h, angle=0.0, radius=0.0, squeeze=1.0):
    """Rectangle of width w and height h, its corners rounded by `radius`."""
    corner = circle(32)
    outline = np.sign(corner) * (w / 2 - radius, h / 2 - radius) + radius * corner
    return polygon(scene, turned(outline, angle, centre, squeeze))


def blob(scene, centre, smallest, largest):
    """A natural patch whose mean radius lies between the two."""
    rng, r = scene.rng, scene.rng.uniform(smallest, largest)
    return ellipse(scene, centre, r * rng.uniform(0.9, 1.3), r, rng.uniform(0, 180), 0.25)


common = ImageChops.darker


def union(*shapes):
    return reduce(ImageChops.lighter, shapes)


def minus(shape, *others):
    return reduce(ImageChops.subtract, others, shape)


def soft(shape, radius):
    """The shape with its rim blurred over `radius` pixels of a 512 pixel canvas."""
    return shape.filter(ImageFilter.GaussianBlur(radius * shape.width / 512))


def scatter(scene, shape, pitch):
    """(n, 2) points inside a shape, about `pitch` apart, in random order."""
    rng, n = scene.rng, int(1.1 / pitch)
    grid = np.indices((n, n)).T.reshape(-1, 2)
    points = rng.permutation(grid + rng.uniform(-0.5, 0.5, grid.shape)) * pitch
    column, row = np.clip(scene.pixels(points), 0, scene.side - 1).astype(int).T
    return points[np.asarray(shape)[row, column] > 0]


def somewhere(scene, shape):
    """A random point well inside a shape, in scene units."""
    return scatter(scene, soft(shape, 10).point(lambda value: 255 * (value > 225)), 0.01)[0]


def noise(rng, height, width, scale):
    """Smooth noise (height, width), standard deviation about 1, its blobs `scale` pixels wide."""
    rows, columns = int(height / scale) + 3, int(width / scale) + 3
    coarse = Image.fromarray(rng.normal(size=(rows, columns)).astype(np.float32))
    fine = coarse.resize((math.ceil(columns * scale), math.ceil(rows * scale)), Image.BICUBIC)
    return np.asarray(fine)[:height, :width]


def background(scene, colour):
    """Fills the photo with one colour, three values, 0 to 1."""
    scene.photo = np.full((3, scene.side, scene.side), np.reshape(colour, (3, 1, 1)), np.float32)


def stamp(scene, shape, colour, grain=0.0, scale=4.0, bulge=0.0, gloss=0.0, shadow=0.0, alpha=1.0):
    """Paints a shape into the photo. Only its surroundings are touched: small shapes are cheap.

    colour: three values, 0 to 1. grain: relative deviation of the texture. scale: the texture's
    size in pixels of a 512 pixel canvas. bulge: how strongly the rim is shaded; the rim is wider
    on a larger shape. gloss: strength of the highlight. shadow: darkness of the drop shadow.
    alpha: opacity."""
    bounds = shape.getbbox()
    if bounds is None:
        return
    unit = scene.side / 512
    pad = round(14 * unit) if shadow or bulge or gloss else 0
    x0, y0 = max(bounds[0] - pad, 0), max(bounds[1] - pad, 0)
    x1, y1 = min(bounds[2] + pad, scene.side), min(bounds[3] + pad, scene.side)
    h, w, shape = y1 - y0, x1 - x0, shape.crop((x0, y0, x1, y1))
    cover = np.asarray(shape, np.float32) / 255                      # (h, w)
    here = scene.photo[:, y0:y1, x0:x1]                              # (3, h, w), a view
    if shadow:
        fallen = ImageChops.offset(shape, round(5 * unit), round(6 * unit))
        fallen = fallen.filter(ImageFilter.GaussianBlur(5 * unit))
        here *= 1 - shadow / 255 * np.asarray(fallen, np.float32) * (1 - cover)
    tone = 1 + grain * noise(scene.rng, h, w, scale * unit) if grain else np.ones((h, w), "f4")
    if bulge or gloss:               # a rounded body; `lit`: how much it faces the upper left
        rim = max(1.5, min(bounds[2] - bounds[0], bounds[3] - bounds[1]) / 6)
        height = np.asarray(shape.filter(ImageFilter.GaussianBlur(rim)), np.float32) / 255
        step = math.ceil(rim / 2)    # a wide one: the blur has only 256 heights
        around = np.pad(height, step, "edge")
        lit = 1.1 * (around[2 * step:, 2 * step:] - around[:-2 * step, :-2 * step])
        tone *= 1 + bulge * 0.8 * np.tanh(lit / 0.8)
    paint = tone * np.asarray(colour, np.float32)[:, None, None]
    if gloss:
        shine = np.exp(-((lit / (lit.max() + 1e-6) - 0.6) / 0.25) ** 2)
        paint += gloss * shine * height
    here += alpha * cover * (paint - here)


def patch(scene, area, smallest, largest, colour, opacity=(1, 1), blur=2.0, **texture):
    """Paints dirt or damage at a random place in an area: the fault's region."""
    shape = common(blob(scene, somewhere(scene, area), smallest, largest), area)
    stamp(scene, soft(shape, blur), colour, 0.2, alpha=scene.rng.uniform(*opacity), **texture)
    scene.regions = [shape]


def develop(scene, size):
    """Canvas -> photo: averaging down, the lens's blur, exposure and white balance about 1 % off,
    sensor noise. Returns uint8 (size, size, 3) and the regions, bool (size, size) each."""
    rng = scene.rng
    canvas = (np.clip(np.moveaxis(scene.photo, 0, -1), 0, 1) * 255).astype(np.uint8)
    small = Image.fromarray(canvas).resize((size, size), Image.Resampling.BOX)
    photo = np.asarray(small.filter(ImageFilter.GaussianBlur(0.75 * size / 512)), np.float32)
    photo = photo * rng.normal(1, 0.01) * rng.normal(1, 0.005, 3)
    photo += rng.normal(0, 1, photo.shape)
    masks = [np.asarray(shape.resize((size, size), Image.Resampling.BOX)) > 127
             for shape in scene.regions]
    return np.clip(photo + 0.5, 0, 255).astype(np.uint8), masks
