"""Drawing kit of the rendered twin (to be merged into data.py by the lead)."""
from __future__ import annotations

import json
import math
import os
import shutil
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
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
    pose: np.ndarray = None                                    # (2, 3)
    photo: np.ndarray = None                                   # (side, side, 3) float32, 0 to 1
    regions: list = field(default_factory=list)                # (defect name, shape): the ground truth

    def aim(self, shift=0.01, turn=1.5, zoom=0.02):
        """Jitters the camera: shift in sides, turn in degrees, zoom relative; each the standard deviation, cut at two."""
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


def noise(rng, height, width, scale):
    """Smooth noise (height, width) of standard deviation about 1 whose blobs are `scale` pixels wide."""
    coarse = rng.normal(size=(int(height / scale) + 3, int(width / scale) + 3)).astype(np.float32)
    grown = Image.fromarray(coarse).resize((math.ceil(coarse.shape[1] * scale), math.ceil(coarse.shape[0] * scale)), Image.BICUBIC)
    return np.asarray(grown)[:height, :width]


def background(scene, colour, grain=0.02, scale=3.0, blotch=0.03):
    """Fills the photo with a surface of one colour (three values, 0 to 1), fine grain and slow blotches."""
    n = scene.side
    tone = 1 + grain * noise(scene.rng, n, n, scale) + blotch * noise(scene.rng, n, n, n / 5)
    scene.photo = np.asarray(colour, np.float32) * tone[..., None]


def stamp(scene, shape, colour, grain=0.05, scale=4.0, bulge=0.0, gloss=0.0, shadow=0.0, alpha=1.0):
    """Paints a part into the photo.

    colour: three values, or an (side, side, 3) array for a pattern of one's own. grain: relative deviation of the
    texture, `scale` its size in pixels. bulge: how strongly the rim is shaded as of a rounded body lit from the upper
    left, its width growing with the part. gloss: strength of the highlight. shadow: darkness of the drop shadow.
    alpha: opacity. Only the part's surroundings are touched, so that small parts are cheap.
    """
    bounds = shape.getbbox()
    if bounds is None:
        return
    pad = 14
    x0, y0 = max(bounds[0] - pad, 0), max(bounds[1] - pad, 0)
    x1, y1 = min(bounds[2] + pad, scene.side), min(bounds[3] + pad, scene.side)
    part = shape.crop((x0, y0, x1, y1))
    cover = np.asarray(part, np.float32)[..., None] / 255                                         # (h, w, 1)
    here = scene.photo[y0:y1, x0:x1]                                                              # a view
    if shadow:
        fallen = ImageChops.offset(part, 5, 6).filter(ImageFilter.GaussianBlur(5))
        here *= 1 - shadow * np.asarray(fallen, np.float32)[..., None] / 255 * (1 - cover)
    paint = np.asarray(colour, np.float32)
    paint = paint[y0:y1, x0:x1] if paint.ndim == 3 else paint
    h, w = cover.shape[:2]
    tone = np.ones((h, w), np.float32)
    if grain:
        tone += grain * noise(scene.rng, h, w, scale)
    if bulge or gloss:
        radius = max(1.5, min(h - 2 * pad, w - 2 * pad) / 6)
        height = np.asarray(part.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255
        dy, dx = np.gradient(height)
        lit = (dx + 1.2 * dy) * radius                                                            # > 0: faces the light
        tone *= 1 + bulge * np.clip(lit, -0.8, 0.8)
    paint = paint * tone[..., None]
    if gloss:
        spot = np.exp(-((lit - lit.max() * 0.6) / (0.25 * lit.max() + 1e-6)) ** 2) * height
        paint = paint + gloss * spot[..., None]
    here += alpha * cover * (paint - here)


def texture(scene, colours, scale, edge=0.0):
    """A (side, side, 3) pattern of grains of about `scale` pixels in the given colours, each grain shaded at its rim:
    cereal, wood, stains."""
    n = scene.side
    field_ = noise(scene.rng, n, n, scale)
    pick = np.clip((noise(scene.rng, n, n, scale) * 0.35 + 0.5) * len(colours), 0, len(colours) - 1e-3).astype(int)
    paint = np.asarray(colours, np.float32)[pick]
    return paint * (1 + edge * np.tanh(field_ * 1.5))[..., None]


def develop(scene, size, blur=0.7, light=0.06, grain=0.012):
    """Canvas -> photo: uneven light, exposure and white balance, defocus, averaging down, sensor noise.
    Returns uint8 (size, size, 3) and the regions as (name, bool (size, size))."""
    rng, n = scene.rng, scene.side
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / n - 0.5
    tilt = rng.normal(size=2) * light
    scene.photo *= (1 + tilt[0] * x + tilt[1] * y)[..., None] * (1 + rng.normal() * 0.03) * (1 + rng.normal(size=3) * 0.012).astype(np.float32)
    image = Image.fromarray((np.clip(scene.photo, 0, 1) * 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(blur * rng.uniform(0.8, 1.4))).resize((size, size), Image.BOX)
    photo = np.asarray(image, np.float32) + rng.normal(size=(size, size, 3)).astype(np.float32) * 255 * grain
    masks = [(name, np.asarray(shape.resize((size, size), Image.BOX)) > 127) for name, shape in scene.regions]
    return np.clip(photo + 0.5, 0, 255).astype(np.uint8), masks
