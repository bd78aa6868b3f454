"""breakfast_box: a tray. On the left lie two tangerines and one nectarine, in any order. On the
right lies granola above; banana chips and almonds, mixed, lie below it."""
import numpy as np
from PIL import Image, ImageChops, ImageDraw

from twin.drawing import (background, blob, box, circle, common, ellipse, minus, noise, patch,
                          polygon, scatter, soft, somewhere, stamp, stroke, turned, union)

LOGICAL = {"missing_fruit": 2500, "wrong_fruit": 2500, "extra_fruit": 2500, "sides_swapped": 0.5,
           "wrong_ratio": 0.5, "missing_chips": 0.5, "missing_almonds": 0.5, "cereal_below": 0.5,
           "cereal_beside": 0.5, "cereal_mixed": 0.5}
STRUCTURAL = ("bruised_fruit", "stain", "foreign_body", "torn_tray", "crushed_cereal")

FRUITS = {"missing_fruit": ("TN", "TT"), "wrong_fruit": ("TTT", "TNN"),
          "extra_fruit": ("TTTN", "TTNN")}       # T: tangerine, N: nectarine
TRAY = (0.5, 0.475), 0.96, 0.985, 0, 0.16        # centre, width, height, turn, corner radius
# The corners of the two compartments, before rounding.
LEFT = [(0.11, 0.12), (0.27, 0.12), (0.31, 0.3), (0.37, 0.5), (0.4, 0.82), (0.12, 0.82)]
RIGHT = [(0.44, 0.10), (0.88, 0.10), (0.87, 0.84), (0.53, 0.84), (0.5, 0.5), (0.46, 0.28)]
OAT, CHIP, ALMOND, CRUMB = range(4)
# A row each: half length and width, then the colours at the rim and inside.
LEAVES = np.array([
    (0.0150, 0.0105, 0.52, 0.32, 0.14, 0.72, 0.49, 0.25),
    (0.0480, 0.0370, 0.62, 0.40, 0.15, 0.87, 0.70, 0.41),
    (0.0330, 0.0190, 0.24, 0.09, 0.05, 0.46, 0.20, 0.10),
    (0.0055, 0.0045, 0.72, 0.54, 0.32, 0.82, 0.66, 0.42)])
BODIES = [(0.16, 0.28, 0.62), (0.13, 0.13, 0.14), (0.16, 0.45, 0.20), (0.80, 0.80, 0.83)]


def portion(shape, order, share):
    """The pixels of a shape that are lowest in `order` (side, side): a `share` of them."""
    level = np.quantile(order[np.asarray(shape) > 127], share)
    return common(shape, Image.fromarray(np.where(order < level, 255, 0).astype(np.uint8)))


def rounded(scene, corners, radius):
    """A polygon grown by `radius`, its corners round."""
    return union(polygon(scene, corners), stroke(scene, 2 * radius, [*corners, *corners[:2]]))


def tray(scene):
    """The empty tray; returns the shapes of its left and right compartment."""
    white = np.array([0.95, 0.89, 0.86])
    stamp(scene, box(scene, *TRAY), white * 0.93)
    stamp(scene, box(scene, (0.5, 0.47), 0.91, 0.935, radius=0.14), white * 0.99)
    stamp(scene, box(scene, (0.5, 0.955), 0.17, 0.012, radius=0.004), (0.2, 0.17, 0.16))    # latch
    rooms = [rounded(scene, corners, 0.055) for corners in (LEFT, RIGHT)]
    for room, corners in zip(rooms, (LEFT, RIGHT)):
        stamp(scene, room, white * 0.84, bulge=-0.4)      # the walls, then the floor
        stamp(scene, soft(rounded(scene, corners, 0.02), 9), white * 0.97)
    return rooms


def tangerine(scene, centre):
    rng, r = scene.rng, scene.rng.normal(0.112, 0.002)
    skin = ellipse(scene, centre, r * rng.uniform(0.97, 1.01), r, rng.uniform(0, 180), 0.02)
    colour = (0.87, 0.38, 0.13) * rng.normal(1, (0.01, 0.02, 0.03))
    stamp(scene, skin, colour, 0.02, 3, bulge=0.75, gloss=0.12, shadow=0.35)
    stem, angles = centre + rng.normal(size=2) * 0.006, rng.uniform(0, 360, 7)
    creases = [turned([(0.006, 0), (rng.uniform(0.02, 0.04), 0)], a, stem) for a in angles]
    stamp(scene, stroke(scene, 0.005, *creases), (0.66, 0.26, 0.08), alpha=0.5)
    stamp(scene, ellipse(scene, stem, 0.009, 0.008, 0, 0.1), (0.22, 0.27, 0.14), 0.2, 2, 0.5)
    return skin


def nectarine(scene, centre):
    rng, r = scene.rng, scene.rng.normal(0.119, 0.002)
    skin = ellipse(scene, centre, r * rng.uniform(0.95, 1.0), r, rng.uniform(0, 180), 0.02)
    colour = (0.50, 0.13, 0.11) * rng.normal(1, 0.04, 3)
    stamp(scene, skin, colour, 0.04, 8, bulge=0.8, gloss=0.2, shadow=0.35)
    spot = turned((rng.uniform(0.02, 0.08), 0), rng.uniform(0, 360), centre)
    blush = common(soft(blob(scene, spot, 0.04, 0.09), 14), soft(skin, 6))
    stamp(scene, blush, (0.82, 0.62, 0.28), 0.1, 6, alpha=rng.uniform(0.2, 0.4))
    return skin


def heap(scene, kinds, centres):
    """A pile of n leaves, later ones on top. kinds: n rows of LEAVES; centres (n, 2). Every leaf
    has its own size, turn and shade."""
    rng, n, leaves = scene.rng, len(centres), LEAVES[kinds]
    angle = rng.uniform(0, np.pi, n)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    radii = leaves[:, None, :2] * rng.uniform(0.75, 1.25, (n, 1, 2))
    rim = circle(12) * radii @ turn.transpose(2, 0, 1)               # (n, 12, 2)
    shade = 255 * rng.normal(1, 0.05, (n, 1))
    colours = np.clip(shade * leaves[:, 2:], 0, 255).astype(int).reshape(n, 2, 3)
    outlines = [scene.pixels(centres[:, None] + share * rim).reshape(n, -1).tolist()
                for share in (1, 0.75)]
    layer = Image.new("RGBA", (scene.side, scene.side))
    pen = ImageDraw.Draw(layer)
    for rim, inside, (dark, light) in zip(*outlines, colours.tolist()):
        pen.polygon(rim, fill=tuple(dark))
        pen.polygon(inside, fill=tuple(light))
    layer = np.asarray(layer)
    painted = layer[..., 3] > 0
    scene.photo[:, painted] = layer[painted, :3].T / np.float32(255)


def spoil(scene, fault, bowl, floor, granola, skins):
    """Draws a structural fault into the finished box."""
    rng = scene.rng
    if fault == "bruised_fruit":
        skin = skins[rng.integers(len(skins))]
        patch(scene, skin, 0.03, 0.055, (0.25, 0.13, 0.06), (0.6, 0.95), scale=5, bulge=-0.4)
    elif fault == "stain":
        patch(scene, minus(bowl, *skins), 0.03, 0.06, (0.45, 0.25, 0.10), (0.35, 0.8), 1.5, scale=6)
    elif fault == "foreign_body":
        colour, centre = BODIES[rng.integers(4)], somewhere(scene, floor)
        length, width = rng.uniform(0.06, 0.12), rng.uniform(0.025, 0.05)
        damage = box(scene, centre, length, width, rng.uniform(0, 180), rng.uniform(0.003, 0.011))
        stamp(scene, damage, colour, 0.05, 3, bulge=0.7, gloss=0.2, shadow=0.5)
        scene.regions = [damage]
    elif fault == "torn_tray":       # a ragged wedge from a side, below the food
        along, depth = rng.uniform(-0.25, 0.25), rng.uniform(0.09, 0.16)
        half = rng.uniform(0.02, 0.045)
        inward = np.concatenate([np.linspace(0, 1, 8), np.linspace(1, 0, 8)])
        flank = half * (1 - inward) * np.repeat((-1, 1), 8) + rng.normal(size=16) * 0.007
        wedge = np.stack([along + flank, 0.5 - depth * inward], 1)
        wedge = turned(wedge, rng.choice((0, 90, 180, 270)), TRAY[0])
        damage = minus(common(polygon(scene, wedge), box(scene, *TRAY)), *skins, floor)
        stamp(scene, soft(damage, 1), (0.12, 0.12, 0.14), 0.1)
        scene.regions = [damage]
    else:                            # crushed_cereal
        damage = common(blob(scene, somewhere(scene, granola), 0.045, 0.075), floor)
        stamp(scene, soft(damage, 4), (0.60, 0.44, 0.25), 0.1)
        crumbs = scatter(scene, damage, 0.008)
        heap(scene, [CRUMB] * len(crumbs), crumbs)
        scene.regions = [damage]


def fruit_side(scene, fault):
    """The left side's fruits; returns their shapes, T: the tangerines', N: the nectarines'."""
    rng = scene.rng
    fruits = rng.permutation(list(rng.choice(FRUITS.get(fault, ["TTN"]))))
    heights, shapes = np.linspace(0.19, 0.76, max(3, len(fruits))), {"T": [], "N": []}
    lean = 0.042 * (-1.0) ** np.arange(len(heights))                 # zigzag
    for fruit, k in zip(fruits, rng.permutation(len(heights))):
        centre = (0.183 + 0.11 * heights[k] + lean[k], heights[k]) + rng.normal(size=2) * 0.003
        painter = tangerine if fruit == "T" else nectarine
        shapes[fruit].append(painter(scene, centre))
    return shapes


def paint(scene, fault=None):
    """Draws the box: a good one, or one with a fault of LOGICAL or STRUCTURAL."""
    rng, side = scene.rng, scene.side
    scene.mirrored = fault == "sides_swapped"        # x becomes 1 - x
    background(scene, (0.12, 0.12, 0.15))
    bowl, room = tray(scene)
    fruits = fruit_side(scene, fault)

    floor = rounded(scene, RIGHT, 0.035)
    stamp(scene, floor, (0.22, 0.12, 0.05))
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    downward = y + x * rng.normal(0, 0.03)
    order = {"cereal_below": -downward,
             "cereal_beside": x * rng.choice((-1, 1)) + y * rng.normal(0, 0.1),
             "cereal_mixed": noise(rng, side, side, side / 9)}.get(fault, downward)
    share = rng.normal(0.6, 0.02)
    granola = portion(floor, order, share)       # the floor's pixels lowest in `order`
    if fault == "wrong_ratio":
        usual, off = granola, rng.choice((-1, 1)) * rng.uniform(0.15, 0.22)
        granola = portion(floor, order, share + off)
        scene.regions = [ImageChops.difference(usual, granola)]
    rest = minus(floor, granola)
    oats, mix = scatter(scene, granola, 0.0165), scatter(scene, rest, 0.034)
    heap(scene, [OAT] * len(oats), oats)
    almonds = {"missing_chips": 1.0, "missing_almonds": 0.0}.get(fault, rng.normal(0.36, 0.04))
    kinds = np.where(rng.permutation(len(mix)) < almonds * len(mix), ALMOND, CHIP)
    heap(scene, kinds, mix)

    if fault in STRUCTURAL:
        spoil(scene, fault, bowl, floor, granola, fruits["T"] + fruits["N"])
    elif fault in ("wrong_fruit", "extra_fruit"):
        scene.regions = [union(*fruits["T" if len(fruits["T"]) > 2 else "N"])]
    elif fault and fault != "wrong_ratio":
        regions = {"missing_fruit": [bowl], "sides_swapped": [bowl, room],
                   "missing_chips": [rest], "missing_almonds": [rest]}
        scene.regions = regions.get(fault, [granola, rest])
