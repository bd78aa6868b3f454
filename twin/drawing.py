"""What every category draws with: a scene, shapes, `stamp` that paints a shape, and `develop`."""
import math
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter


@dataclass
class Scene:
    """A photo in the making. Positions and lengths are in units of its side, x right, y down.
    `pose` (camera shift, turn, zoom) takes them to canvas pixels. A shape is a Pillow "L" image
    of the canvas: 255 inside, 0 outside."""
    rng: np.random.Generator
    side: int                    # of the canvas in pixels, twice the photo's
    pose: np.ndarray = None      # (2, 3): points @ pose[:, :2].T + pose[:, 2]
    photo: np.ndarray = None     # (side, side, 3) float32, 0 to 1, stored as 3 planes
    regions: list = field(default_factory=list)      # the fault's ground truth, shapes

    def aim(self, shift, turn, zoom):
        """Moves the camera at random: shift in sides, turn in degrees, zoom relative. The three
        are standard deviations; the draws are cut at two of them."""
        spread = (shift, shift, math.radians(turn), zoom)
        dx, dy, angle, scale = np.clip(self.rng.normal(size=4), -2, 2) * spread
        c, s = math.cos(angle) * (1 + scale), math.sin(angle) * (1 + scale)
        move = np.array([0.5 + dx, 0.5 + dy]) - np.array([[c, -s], [s, c]]) @ (0.5, 0.5)
        self.pose = self.side * np.array([[c, -s, move[0]], [s, c, move[1]]])

    def pixels(self, points):
        """(..., 2) scene units -> (..., 2) canvas pixels."""
        return np.asarray(points, float) @ self.pose[:, :2].T + self.pose[:, 2]


def turned(points, angle, centre=(0, 0), squeeze=1):
    """Points about the origin, turned by `angle` degrees and moved to `centre`. Our photos are
    square. Where LOCO's is wider than high, `squeeze`, its height / width, shrinks x lengths."""
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
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    r = np.ones_like(t)
    for k in (2, 3, 5) if wobble else ():
        r += wobble / k * scene.rng.normal() * np.cos(k * t + scene.rng.uniform(0, 2 * math.pi))
    outline = np.stack([rx * r, ry * r], 1) * circle(64)
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
    grid = np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2)
    points = rng.permutation(grid + rng.uniform(-0.5, 0.5, grid.shape)) * pitch
    column, row = np.clip(scene.pixels(points), 0, scene.side - 1).astype(int).T
    return points[np.asarray(shape)[row, column] > 0]


def somewhere(scene, shape):
    """A random point well inside a shape, in scene units."""
    return scatter(scene, soft(shape, 10).point(lambda value: 255 * (value > 225)), 0.01)[0]


def stretched(array, width, height):
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC))


def noise(rng, height, width, scale):
    """Smooth noise (height, width), standard deviation about 1, its blobs `scale` pixels wide."""
    rows, columns = int(height / scale) + 3, int(width / scale) + 3
    coarse = rng.normal(size=(rows, columns)).astype(np.float32)
    return stretched(coarse, math.ceil(columns * scale), math.ceil(rows * scale))[:height, :width]


def background(scene, colour, grain, scale=3.0, blotch=0.03):
    """Fills the photo with one colour (three values, 0 to 1), fine grain and slow blotches."""
    n = scene.side
    tone = 1 + grain * noise(scene.rng, n, n, scale * n / 512)
    tone = tone + blotch * noise(scene.rng, n, n, n / 5)
    scene.photo = (tone * np.asarray(colour, np.float32)[:, None, None]).transpose(1, 2, 0)


def soften(height, radius):
    """Blurs a float array (height, width) with three box filters: about a Gaussian of deviation
    `radius`. An 8-bit blur has steps of 1/255, and the gradient would show them as rings."""
    half = max(1, round(radius))
    width = 2 * half + 1
    for _ in range(6):               # along the rows and the columns in turn
        total = np.cumsum(np.pad(height, [(half + 1, half), (0, 0)]), axis=0, dtype=np.float32)
        height = ((total[width:] - total[:-width]) / width).T
    return height


def relief(shape, radius):
    """A shape as a rounded body, its rim about `radius` pixels wide -> how much each place faces
    the light from the upper left, and its height. Both are smaller than the shape."""
    step = max(1, int(radius / 4))               # a wide blur needs only every step-th pixel
    height = soften(np.asarray(shape.reduce(step), np.float32) / 255, radius / step)
    dy, dx = np.gradient(height)
    return (dx + 1.2 * dy) * radius / step, height


def stamp(scene, shape, colour, grain=0.05, scale=4.0, bulge=0.0, gloss=0.0, shadow=0.0, alpha=1.0):
    """Paints a shape into the photo. Only its surroundings are touched: small shapes are cheap.

    colour: three values, 0 to 1. grain: relative deviation of the texture. scale: the texture's
    size in pixels of a 512 pixel canvas. bulge: how strongly the rim is shaded; the rim is wider
    on a larger shape. gloss: strength of the highlight. shadow: darkness of the drop shadow.
    alpha: opacity.
    """
    bounds = shape.getbbox()
    if bounds is None:
        return
    unit = scene.side / 512
    pad = round(14 * unit) if shadow or bulge or gloss else 0
    x0, y0 = max(bounds[0] - pad, 0), max(bounds[1] - pad, 0)
    x1, y1 = min(bounds[2] + pad, scene.side), min(bounds[3] + pad, scene.side)
    h, w, shape = y1 - y0, x1 - x0, shape.crop((x0, y0, x1, y1))
    cover = np.asarray(shape, np.float32) / 255                      # (h, w)
    here = scene.photo[y0:y1, x0:x1].transpose(2, 0, 1)              # (3, h, w), a view
    if shadow:
        fallen = ImageChops.offset(shape, round(5 * unit), round(6 * unit))
        fallen = fallen.filter(ImageFilter.GaussianBlur(5 * unit))
        here *= 1 - shadow / 255 * np.asarray(fallen, np.float32) * (1 - cover)
    tone = 1 + grain * noise(scene.rng, h, w, scale * unit) if grain else np.ones((h, w), "f4")
    if bulge or gloss:
        rim = max(1.5, min(bounds[2] - bounds[0], bounds[3] - bounds[1]) / 6)
        lit, height = relief(shape, rim)
        tone *= stretched(1 + bulge * 0.8 * np.tanh(lit / 0.8), w, h)
    paint = tone * np.asarray(colour, np.float32)[:, None, None]
    if gloss:
        shine = np.exp(-((lit / (lit.max() + 1e-6) - 0.6) / 0.25) ** 2)
        paint += stretched(gloss * shine * height, w, h)
    here += alpha * cover * (paint - here)


def patch(scene, area, smallest, largest, colour, opacity=(1, 1), blur=2.0, **texture):
    """Paints dirt or damage at a random place in an area: the fault's region."""
    shape = common(blob(scene, somewhere(scene, area), smallest, largest), area)
    alpha = scene.rng.uniform(*opacity)
    stamp(scene, soft(shape, blur), colour, 0.2, alpha=alpha, **texture)
    scene.regions = [shape]


def develop(scene, size):
    """Canvas -> photo: defocus, averaging down, uneven light, exposure and white balance, sensor
    noise. Returns uint8 (size, size, 3) and the regions, bool (size, size) each."""
    rng = scene.rng
    canvas = Image.fromarray((np.clip(scene.photo, 0, 1) * 255).astype(np.uint8))
    focus = ImageFilter.GaussianBlur(0.7 * rng.uniform(0.8, 1.4) * size / 512)
    small = canvas.resize((size, size), Image.Resampling.BOX)
    photo = np.asarray(small.filter(focus), np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    tilt = rng.normal(size=2) * 0.06
    gain = (1 + rng.normal() * 0.04) * (1 + rng.normal(size=3) * 0.018)
    photo = photo * ((1 + tilt[0] * x + tilt[1] * y)[..., None] * gain)
    photo = photo + rng.normal(size=photo.shape) * 255 * 0.012
    masks = [np.asarray(shape.resize((size, size), Image.Resampling.BOX)) > 127
             for shape in scene.regions]
    return np.clip(photo + 0.5, 0, 255).astype(np.uint8), masks
