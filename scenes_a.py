"""Two scenes of the rendered twin: breakfast_box and juice_bottle."""
from __future__ import annotations

from functools import reduce

import numpy as np
from PIL import Image, ImageDraw

from twin import background, box, common, curve, ellipse, minus, noise, polygon, soft, stamp, stroke, turned, union

BREAKFAST_BOX = {           # fault: (kind, saturation threshold, relative to the region or in pixels of a 256 px photo)
    **dict.fromkeys(("missing_fruit", "wrong_fruit", "extra_fruit"), ("logical_anomalies", 2500, False)),
    **dict.fromkeys(("sides_swapped", "wrong_ratio", "missing_chips", "missing_almonds", "cereal_below",
                     "cereal_beside", "cereal_mixed"), ("logical_anomalies", 0.5, True)),
    **dict.fromkeys(("bruised_fruit", "stain", "foreign_body", "torn_tray", "crushed_cereal"),
                    ("structural_anomalies", 1.0, True)),
}
FRUITS = {"missing_fruit": ("TN", "TT"), "wrong_fruit": ("TTT", "TNN"), "extra_fruit": ("TTTN", "TTNN")}
TRAY = (0.5, 0.475), 0.96, 0.985, 0, 0.16                   # centre, width, height, turn, radius of the corners
LEFT = [(0.11, 0.12), (0.27, 0.12), (0.31, 0.3), (0.37, 0.5), (0.4, 0.82), (0.12, 0.82)]     # the compartments without
RIGHT = [(0.44, 0.10), (0.88, 0.10), (0.87, 0.84), (0.53, 0.84), (0.5, 0.5), (0.46, 0.28)]   # their round corners
OAT, CHIP, ALMOND, CRUMB = range(4)
LEAVES = np.array([                  # half length and width, then the colours in the middle, at the rim, in the crease
    (0.0150, 0.0105, 0.78, 0.55, 0.30, 0.52, 0.32, 0.14, 0.58, 0.36, 0.16),
    (0.0480, 0.0370, 0.90, 0.74, 0.45, 0.62, 0.40, 0.15, 0.62, 0.43, 0.20),
    (0.0330, 0.0190, 0.50, 0.22, 0.11, 0.24, 0.09, 0.05, 0.42, 0.18, 0.09),
    (0.0055, 0.0045, 0.84, 0.68, 0.44, 0.72, 0.54, 0.32, 0.70, 0.52, 0.30)])


def rounded(scene, corners, radius):
    """A polygon grown by `radius`, its corners round."""
    return union(polygon(scene, corners), stroke(scene, [*corners, *corners[:2]], 2 * radius))


def heap(scene, kinds, centres):
    """A pile of n leaves, later ones on top. kinds: n rows of LEAVES; centres (n, 2). Every leaf has its own size,
    turn, shade and tilt; the gaps are dark. All are drawn as numbers into one plan, then painted at once."""
    rng, n, s = scene.rng, len(centres), scene.side
    radii = LEAVES[kinds, :2] * rng.uniform(0.75, 1.25, (n, 2))
    shade = rng.normal(1, 0.11, (n, 1, 1)).clip(0.7, 1.3) * rng.normal(1, 0.03, (n, 1, 3))
    colours = LEAVES[kinds, 2:].reshape(n, 3, 3) * shade                                           # (n, place, rgb)
    angle, t = rng.uniform(0, np.pi, n), np.linspace(0, 2 * np.pi, 12, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]).transpose(2, 0, 1)                                  # (n, 2, 2)
    rim = np.stack([np.cos(t), np.sin(t)], 1) * (1 + 0.06 * rng.normal(size=(n, 12, 1))) * radii[:, None] @ turn
    pixels = (rim + centres[:, None]) @ scene.pose[:, :2].T + scene.pose[:, 2]                     # (n, 12, 2)
    plan = Image.new("I", (s, s))
    pen = ImageDraw.Draw(plan)
    for i, points in enumerate(pixels.reshape(n, -1).tolist()):
        pen.polygon(points, fill=i + 1, outline=-1)
    x0, y0, x1, y1 = plan.getbbox()
    plan = np.asarray(plan)[y0:y1, x0:x1]
    row, col = np.nonzero(plan)
    leaf = plan[row, col] - 1                                                                      # -2 in a gap
    slope = rng.normal((-0.10, -0.16), 0.16, (n, 2))
    table = np.concatenate([pixels.mean(1) - (x0, y0), (turn / radii[..., None] / s).reshape(n, 4), slope,
                            colours.reshape(n, 9)], 1).T.astype(np.float32)                        # (17, n)
    cx, cy, ux, uy, vx, vy, su, sv, *colours = table.take(leaf, axis=1)                            # each (pixels,)
    u, v = ux * (col - cx) + uy * (row - cy), vx * (col - cx) + vy * (row - cy)       # on the leaf: its rim at radius 1
    edge, crease = np.minimum(u * u + v * v, 1) ** 2, np.exp(-(u / 0.55) ** 2 - (v / 0.22) ** 2)
    tone = 1 + 0.10 * noise(rng, y1 - y0, x1 - x0, 3.0 * s / 512)[row, col]
    tone *= (1 + u * su + v * sv) * (leaf >= 0)
    for c, gap in enumerate((0.20, 0.11, 0.04)):
        core, side, middle = colours[c::3]
        paint = tone * (core + edge * (side - core) + crease * (middle - core)) + gap * (leaf < 0)
        scene.photo[row + y0, col + x0, c] = paint


def scatter(scene, shape, pitch):
    """(n, 2) points inside a shape, about `pitch` apart, in random order."""
    rng, n = scene.rng, int(1.1 / pitch)
    grid = np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2)
    points = rng.permutation(grid + rng.uniform(-0.5, 0.5, grid.shape)) * pitch
    at = np.clip(points @ scene.pose[:, :2].T + scene.pose[:, 2], 0, scene.side - 1).astype(int)
    return points[np.asarray(shape)[at[:, 1], at[:, 0]] > 0]


def somewhere(scene, shape):
    """A random point well inside a shape, in scene units."""
    return scatter(scene, soft(shape, 10).point(lambda value: 255 * (value > 225)), 0.01)[0]


def blob(scene, centre, smallest, largest):
    """A natural patch whose mean radius lies between the two."""
    r = scene.rng.uniform(smallest, largest)
    return ellipse(scene, centre, r * scene.rng.uniform(0.9, 1.3), r, scene.rng.uniform(0, 180), 0.25)


def portion(shape, order, share):
    """The part of a shape that holds `share` of its pixels: those lowest in `order` (side, side)."""
    level = np.quantile(order[np.asarray(shape) > 127], share)
    return common(shape, Image.fromarray(np.where(order < level, 255, 0).astype(np.uint8)))


def tangerine(scene, centre):
    rng, r = scene.rng, scene.rng.normal(0.112, 0.005)
    skin = ellipse(scene, centre, r * rng.uniform(0.95, 1.03), r, rng.uniform(0, 180), 0.02)
    stamp(scene, skin, (0.87, 0.38, 0.13) * rng.normal(1, (0.03, 0.06, 0.1)), 0.05, 3, 0.75, 0.12, 0.35)
    stem = centre + rng.normal(size=2) * 0.018
    creases = [turned([(0.006, 0), (rng.uniform(0.02, 0.04), 0)], stem, a) for a in rng.uniform(0, 360, 7)]
    stamp(scene, reduce(union, [stroke(scene, line, 0.005) for line in creases]), (0.66, 0.26, 0.08), alpha=0.5)
    stamp(scene, ellipse(scene, stem, 0.009, 0.008, 0, 0.1), (0.22, 0.27, 0.14), 0.2, 2, 0.5)
    return skin


def nectarine(scene, centre):
    rng, r = scene.rng, scene.rng.normal(0.119, 0.006)
    skin = ellipse(scene, centre, r * rng.uniform(0.92, 1.0), r, rng.uniform(0, 180), 0.02)
    red = np.array([0.50, 0.13, 0.11]) * rng.normal(1, (0.12, 0.2, 0.15))
    stamp(scene, skin, red, 0.12, 8, 0.8, 0.2, 0.35)
    spot = centre + turned([(rng.uniform(0.02, 0.08), 0)], (0, 0), rng.uniform(0, 360))[0]
    blush = common(soft(blob(scene, spot, 0.04, 0.09), 14), soft(skin, 6))
    stamp(scene, blush, (0.82, 0.62, 0.28), 0.1, 6, alpha=rng.uniform(0.2, 1.0))
    return skin


def tray(scene):
    """The empty tray; returns the shapes of its left and right compartment."""
    white = np.array([0.95, 0.89, 0.86])
    stamp(scene, box(scene, *TRAY), white * 0.93, 0, bulge=0.2)
    stamp(scene, box(scene, (0.5, 0.47), 0.91, 0.935, 0, 0.14), white * 0.99, 0.01, 6)
    stamp(scene, box(scene, (0.5, 0.955), 0.17, 0.012, scene.rng.normal(), 0.004), (0.2, 0.17, 0.16), 0.3)
    rooms = [rounded(scene, corners, 0.055) for corners in (LEFT, RIGHT)]
    for room, corners in zip(rooms, (LEFT, RIGHT)):
        stamp(scene, room, white * 0.84, 0.01, 8, -0.4)                                            # the walls
        stamp(scene, soft(rounded(scene, corners, 0.02), 9), white * 0.97, 0.012, 8)               # the floor
    return rooms


def spoil_box(scene, fault, bowl, field, granola, skins):
    """Draws a structural fault into the finished box; returns its shape."""
    rng = scene.rng
    if fault == "bruised_fruit":
        skin = skins[rng.integers(len(skins))]
        damage = common(blob(scene, somewhere(scene, skin), 0.03, 0.055), skin)
        stamp(scene, soft(damage, 2), (0.25, 0.13, 0.06), 0.2, 5, -0.4, alpha=rng.uniform(0.6, 0.95))
    elif fault == "stain":
        bare = reduce(minus, skins, bowl)
        damage = common(blob(scene, somewhere(scene, bare), 0.03, 0.06), bare)
        stamp(scene, soft(damage, 1.5), (0.45, 0.25, 0.10), 0.2, 6, alpha=rng.uniform(0.35, 0.8))
    elif fault == "foreign_body":
        colour = [(0.16, 0.28, 0.62), (0.13, 0.13, 0.14), (0.16, 0.45, 0.20), (0.80, 0.80, 0.83)][rng.integers(4)]
        centre, length, width = somewhere(scene, field), rng.uniform(0.06, 0.12), rng.uniform(0.025, 0.05)
        damage = box(scene, centre, length, width, rng.uniform(0, 180), rng.uniform(0.003, 0.011))
        stamp(scene, damage, colour, 0.05, 3, 0.7, 0.2, 0.5)
    elif fault == "torn_tray":                                             # a ragged wedge from a side, below the food
        along, depth, half = rng.uniform(-0.25, 0.25), rng.uniform(0.09, 0.16), rng.uniform(0.02, 0.045)
        inward = np.concatenate([np.linspace(0, 1, 8), np.linspace(1, 0, 8)])
        flank = half * (1 - inward) * np.repeat((-1, 1), 8) + rng.normal(size=16) * 0.007
        wedge = np.stack([along + flank, 0.5 - depth * inward], 1)
        torn = common(polygon(scene, turned(wedge, TRAY[0], rng.choice((0, 90, 180, 270)))), box(scene, *TRAY))
        damage = reduce(minus, [*skins, field], torn)
        stamp(scene, soft(damage, 1), (0.12, 0.12, 0.14), 0.1)
    elif fault == "crushed_cereal":
        damage = common(blob(scene, somewhere(scene, granola), 0.045, 0.075), field)
        stamp(scene, soft(damage, 4), (0.60, 0.44, 0.25), 0.1)
        crumbs = scatter(scene, damage, 0.008)
        heap(scene, [CRUMB] * len(crumbs), crumbs)
    return damage


def breakfast_box(scene, fault=None):
    """A tray: left two tangerines and one nectarine, right granola above, banana chips and almonds below."""
    rng, side = scene.rng, scene.side
    scene.aim(0.006, 1.0, 0.008)
    if fault == "sides_swapped":                                                                   # x becomes 1 - x
        scene.pose[:, 2] += scene.pose[:, 0]
        scene.pose[:, 0] *= -1
    background(scene, (0.12, 0.12, 0.15), 0.05)
    bowl, room = tray(scene)

    fruits = rng.permutation(list(rng.choice(FRUITS.get(fault, ["TTN"]))))
    heights = np.linspace(0.19, 0.76, max(3, len(fruits)))
    lean = rng.choice((-1, 1)) * rng.normal(0.042, 0.005) * (-1.0) ** np.arange(len(heights))      # zigzag
    skins = {"T": [], "N": []}
    for fruit, k in zip(fruits, rng.permutation(len(heights))):
        centre = (0.183 + 0.11 * heights[k] + lean[k], heights[k]) + rng.normal(size=2) * 0.008
        skins[fruit].append((tangerine if fruit == "T" else nectarine)(scene, centre))

    field = rounded(scene, RIGHT, 0.035)
    stamp(scene, field, (0.22, 0.12, 0.05), 0.2)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    downward = y + x * rng.normal(0, 0.03)
    order = {"cereal_below": -downward, "cereal_beside": x * rng.choice((-1, 1)) + y * rng.normal(0, 0.1),
             "cereal_mixed": noise(rng, side, side, side / 9)}.get(fault, downward)
    usual = share = rng.normal(0.6, 0.02)
    if fault == "wrong_ratio":
        share += rng.choice((-1, 1)) * rng.uniform(0.15, 0.22)
    granola = portion(field, order, share)
    rest = minus(field, granola)
    oats, mix = scatter(scene, granola, 0.0165), scatter(scene, rest, 0.034)
    heap(scene, [OAT] * len(oats), oats)
    almonds = {"missing_chips": 1.0, "missing_almonds": 0.0}.get(fault, rng.normal(0.36, 0.04)) * len(mix)
    heap(scene, np.where(rng.permutation(len(mix)) < almonds, ALMOND, CHIP), mix)

    regions = []
    if fault == "missing_fruit":
        regions = [bowl]
    elif fault in FRUITS:
        regions = [reduce(union, skins["T" if len(skins["T"]) > 2 else "N"])]
    elif fault == "wrong_ratio":
        more, less = (portion(field, order, pick(usual, share)) for pick in (max, min))
        regions = [minus(more, less)]
    elif fault == "sides_swapped":
        regions = [bowl, room]
    elif fault in ("cereal_below", "cereal_beside", "cereal_mixed"):
        regions = [granola, rest]
    elif fault in ("missing_chips", "missing_almonds"):
        regions = [rest]
    elif fault:
        regions = [spoil_box(scene, fault, bowl, field, granola, skins["T"] + skins["N"])]
    scene.regions = [(fault, region) for region in regions]


JUICE_BOTTLE = {
    **dict.fromkeys(("wrong_icon", "missing_icon", "missing_label", "swapped_labels", "shifted_label", "overfilled",
                     "underfilled", "empty_bottle"), ("logical_anomalies", 0.5, True)),
    "two_icons": ("logical_anomalies", 720, False),
    **dict.fromkeys(("damaged_label", "rotated_label", "foreign_body", "unknown_juice", "damaged_cap"),
                    ("structural_anomalies", 1.0, True)),
}
JUICES = {"mango": (0.72, 0.65, 0.24), "cherry": (0.32, 0.09, 0.06), "banana": (0.72, 0.69, 0.57)}
UNKNOWN = ((0.25, 0.45, 0.15), (0.16, 0.30, 0.55), (0.45, 0.22, 0.50), (0.75, 0.38, 0.08), (0.10, 0.08, 0.08))
GLASS = np.array([(0.145, 0.15), (0.145, 0.29), (0.16, 0.325), (0.21, 0.355), (0.238, 0.395), (0.245, 0.45),
                  (0.243, 0.62), (0.236, 0.72), (0.243, 0.82), (0.243, 0.895), (0.232, 0.92)])     # half width, height


def ring(x, y, rx, ry, start=0, end=360):
    """Points along an ellipse, or along its arc between two angles in degrees."""
    return [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in np.radians(np.linspace(start, end, 13))]


GLYPHS = {"1": [[(0.25, 0.2), (0.5, 0), (0.5, 1)], [(0.25, 1), (0.75, 1)]], "0": [ring(0.5, 0.5, 0.36, 0.5)],
          "%": [[(0.9, 0), (0.1, 1)], ring(0.2, 0.2, 0.17, 0.2), ring(0.8, 0.8, 0.17, 0.2)],
          "J": [[(0.7, 0), (0.7, 0.75), *ring(0.45, 0.75, 0.25, 0.25, 30, 180)]],
          "u": [[(0.15, 0.35), *ring(0.5, 0.72, 0.35, 0.28, 180, 0), (0.85, 0.35), (0.85, 1)]],
          "i": [[(0.5, 0.35), (0.5, 1)], [(0.5, 0), (0.5, 0.08)]], "c": [ring(0.5, 0.67, 0.35, 0.33, -45, -315)],
          "e": [[(0.2, 0.67), *ring(0.5, 0.67, 0.35, 0.33, 0, -315)]]}


def half_width(height):
    return np.interp(height, GLASS[:, 1], GLASS[:, 0])


def bottle_part(scene, inset, top=0.15):
    """The bottle's outline below height `top`, made narrower by `inset` on each side."""
    y = np.array([top, *GLASS[GLASS[:, 1] > top, 1]])
    half, y = half_width(y) - inset, np.minimum(y, GLASS[-1, 1] - inset)
    return polygon(scene, np.concatenate([np.stack([0.5 - half, y], 1), np.stack([0.5 + half, y], 1)[::-1]]))


def icon(scene, fruit, centre, angle):
    """Paints a fruit about 0.12 wide at a centre; returns the area it takes."""
    def at(*points):
        return turned(points, centre, angle)

    if fruit == "mango":
        stamp(scene, ellipse(scene, at((0.012, 0.008))[0], 0.052, 0.03, angle), (0.93, 0.55, 0.10), 0.04, 4, 0.5, 0.15)
        tip, stalk = (-0.065, 0), (0.025, -0.02)
        leaf = [*curve(tip, (-0.03, -0.045), stalk), *curve(stalk, (-0.02, -0.015), tip)]
        stamp(scene, polygon(scene, at(*leaf)), (0.10, 0.30, 0.12), 0.1)
    if fruit == "cherry":
        stems = [stroke(scene, at(*curve((0.005, -0.042), (x / 2, -0.02), (x, 0.012))), 0.006) for x in (-0.03, 0.032)]
        stamp(scene, reduce(union, stems), (0.20, 0.42, 0.14), 0.05)
        for x in (-0.028, 0.03):
            stamp(scene, ellipse(scene, at((x, 0.016))[0], 0.029, 0.023, angle), (0.62, 0.09, 0.08), 0.04, 4, 0.6, 0.25)
    if fruit == "banana":
        for y in (-0.012, 0.002, 0.016):
            finger = at(*curve((-0.058, y + 0.008), (0.01, y + 0.03), (0.04, y - 0.03)))
            stamp(scene, stroke(scene, finger, 0.021), (0.30, 0.30, 0.08), 0)
            stamp(scene, stroke(scene, finger, 0.014), (0.80, 0.76, 0.15), 0.05, 4, 0.3)
        stamp(scene, stroke(scene, at((0.035, -0.042), (0.045, -0.046)), 0.013), (0.12, 0.13, 0.08), 0)
    return ellipse(scene, centre, 0.075, 0.045, angle)


def label(scene, paper, centre, width, height, angle, text):
    """Prints a label, the shape `paper` with a frame, and the text where asked for."""
    stamp(scene, paper, (0.93, 0.66, 0.25) * scene.rng.normal(1, 0.02, 3), 0.03, 3)
    shine = common(soft(box(scene, centre, width * 0.7, height * 0.5, angle), 16), paper)
    stamp(scene, shine, (0.96, 0.86, 0.50), 0.03)
    outer, inner = (box(scene, centre, width * 0.92 - d, height * 0.84 - d, angle, 0.02 - d / 2) for d in (0, 0.006))
    stamp(scene, minus(outer, inner), (0.36, 0.30, 0.16), 0.05)
    if text:
        lines = [np.array(line) * (0.021, 0.036) + (0.0295 * (k - 4.9), -0.018)
                 for k, letter in enumerate("100% Juice") for line in GLYPHS.get(letter, [])]
        print_ = [stroke(scene, turned(line, centre, angle), 0.0075) for line in lines]
        stamp(scene, reduce(union, print_), (0.16, 0.14, 0.11), 0)


def spoil_bottle(scene, fault, papers, paper, thread, juice):
    """Draws a structural fault onto the finished bottle, a damaged label onto `paper`; returns its shape."""
    rng = scene.rng
    if fault == "damaged_label":                                                # torn down to the juice, or stained
        damage = common(blob(scene, somewhere(scene, paper), 0.03, 0.06), paper)
        colour, alpha = (juice, 1) if rng.random() < 0.5 else ((0.30, 0.18, 0.10), rng.uniform(0.4, 0.8))
        stamp(scene, damage, colour, 0.1, 5, -0.2, alpha=alpha)
    elif fault == "foreign_body":
        clear = reduce(minus, papers, bottle_part(scene, 0.03, 0.3))
        damage = common(blob(scene, somewhere(scene, clear), 0.016, 0.035), clear)
        colour = [(0.10, 0.09, 0.08), (0.66, 0.65, 0.62), (0.15, 0.35, 0.15)][rng.integers(3)]
        stamp(scene, soft(damage, 1), colour, 0.2, 4, 0.5)
    elif fault == "damaged_cap":                                                # a piece chipped off the screw thread
        edge = 0.5 + rng.choice((-1, 1)) * rng.uniform(0.08, 0.15), rng.uniform(0.085, 0.15)
        damage = common(blob(scene, edge, 0.025, 0.045), thread)
        stamp(scene, damage, (0.03, 0.03, 0.035), 0.2, 4)
        stamp(scene, minus(damage, blob(scene, edge, 0.02, 0.03)), (0.6, 0.62, 0.66), 0.3, 3, alpha=0.6)
    return damage


def juice_bottle(scene, fault=None):
    """A bottle of one of three juices before black; the fruit on its upper label is the juice's, the lower one reads
    100% Juice, and it is filled up to the neck."""
    rng = scene.rng
    scene.aim(0.008, 0.7, 0.008)
    background(scene, (0.022, 0.022, 0.028), 0.1)
    stamp(scene, soft(box(scene, (0.5, 0.99), 1.4, 0.16), 5), (0.05, 0.05, 0.055), 0.2)            # the table

    juice = list(JUICES)[rng.integers(3)]
    others = [name for name in JUICES if name != juice]
    colour = UNKNOWN[rng.integers(len(UNKNOWN))] if fault == "unknown_juice" else JUICES[juice]
    colour = colour * rng.normal(1, (0.015, 0.015, 0.015)) * rng.normal(1, 0.05)
    usual = level = rng.normal(0.228, 0.005)
    if fault == "overfilled":
        level = rng.uniform(0.155, 0.18)
    elif fault == "underfilled":
        level = rng.uniform(0.33, 0.48)
    glass = bottle_part(scene, 0)
    stamp(scene, glass, (0.075, 0.08, 0.085), 0.1, 8)
    stamp(scene, minus(glass, bottle_part(scene, 0.012)), (0.22, 0.22, 0.23), 0.25, 20)
    filled = bottle_part(scene, 0.016, level)
    if fault != "empty_bottle":
        stamp(scene, filled, colour, 0.03, 30, 0.45)
        stamp(scene, common(soft(box(scene, (0.5, 0.72), 0.34, 0.4), 30), filled), colour * 0.82, 0.02, 30, alpha=0.7)
        stamp(scene, ellipse(scene, (0.5, level), half_width(level) - 0.016, 0.007), colour * 0.7 + 0.12, 0.1, 3)
    for sign in (-1, 1):                                                                           # light on the glass
        for x, top, bottom in ((0.228, 0.42, 0.6), (0.212, 0.74, 0.88), (0.136, 0.17, 0.29)):
            gleam = stroke(scene, [(0.5 + sign * x, top), (0.5 + sign * (x + 0.003), bottom)], 0.008)
            stamp(scene, soft(gleam, 2), (0.85, 0.87, 0.9), 0, alpha=rng.uniform(0.25, 0.55))
        shoulder = curve((0.5 + sign * 0.07, 0.40), (0.5 + sign * 0.19, 0.385), (0.5 + sign * 0.215, 0.44))
        stamp(scene, soft(stroke(scene, shoulder, 0.014), 3), (0.95, 0.95, 0.92), 0, alpha=rng.uniform(0.2, 0.4))
    rings = [box(scene, (0.5, y), width, 0.026, rng.normal() * 0.5, 0.011)
             for y, width in ((0.085, 0.336), (0.11, 0.32), (0.135, 0.34), (0.155, 0.332))]
    for turn in rings:
        stamp(scene, turn, (0.17, 0.18, 0.20), 0.3, 14, 0.9, 0.3)

    fruit = others[rng.integers(2)] if fault == "wrong_icon" else juice
    spots = {"missing_icon": (), "two_icons": (-0.075, 0.075)}.get(fault, (0,))
    heights = [0.545, 0.80][::-1 if fault == "swapped_labels" else 1] + rng.normal(size=2) * 0.003
    odd = rng.integers(2)                                                                          # the label at fault
    papers, icons = [], []
    for k, (width, height) in enumerate(((0.345, 0.165), (0.33, 0.082))):
        centre, angle = np.array([0.5 + rng.normal() * 0.005, heights[k]]), rng.normal() * 0.7
        if fault == "shifted_label" and k == odd:
            centre += [(rng.choice((-1, 1)) * 0.06, 0), (0, (0.09, -0.09)[k])][rng.integers(2)]
        if fault == "rotated_label" and k == odd:
            angle += rng.choice((-1, 1)) * rng.uniform(6, 15)
        papers.append(box(scene, centre, width, height, angle))
        if fault == "missing_label" and k == odd:
            continue
        label(scene, papers[k], centre, width, height, angle, text=k == 1)
        for x in spots if k == 0 else ():
            icons.append(icon(scene, fruit, turned((x, 0.004), centre, angle), angle))

    regions = []
    if fault in ("wrong_icon", "two_icons"):
        regions = [reduce(union, icons)]
    elif fault == "missing_icon":
        regions = [ellipse(scene, (0.5, heights[0]), 0.075, 0.045)]
    elif fault == "swapped_labels":
        regions = papers
    elif fault in ("missing_label", "shifted_label", "rotated_label"):
        regions = [papers[odd]]
    elif fault in ("overfilled", "underfilled"):
        more, less = (bottle_part(scene, 0.016, pick(usual, level)) for pick in (min, max))
        regions = [minus(more, less)]
    elif fault in ("empty_bottle", "unknown_juice"):
        regions = [reduce(minus, papers, filled)]
    elif fault:
        regions = [spoil_bottle(scene, fault, papers, papers[odd], reduce(union, rings), colour)]
    scene.regions = [(fault, region) for region in regions]
