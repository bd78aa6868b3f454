"""screw_bag: a clear bag with two washers, two nuts, a long and a short bolt in any pose."""
from functools import partial

import numpy as np
from PIL import Image

from twin.drawing import (background, box, circle, common, ellipse, minus, noise, patch,
                          polygon, soft, stamp, stroke, turned, union)

SWAPS = {        # a logical fault's threshold, the kind that is taken out, the kind that is put in
    "missing_washer": (220, "washer", None), "additional_washer": (220, None, "washer"),
    "missing_nut": (260, "nut", None), "additional_nut": (260, None, "nut"),
    "missing_long_bolt": (800, "long_bolt", None), "missing_short_bolt": (550, "short_bolt", None),
    "additional_bolt": (550, None, "short_bolt"),
    "two_long_bolts": (800, "short_bolt", "long_bolt"),
    "two_short_bolts": (550, "long_bolt", "short_bolt")}
LOGICAL = {fault: threshold for fault, (threshold, _, _) in SWAPS.items()}
STRUCTURAL = ("broken_part", "rusty_part", "wrong_thread_colour", "torn_bag", "stained_bag")

GOOD = ("long_bolt", "short_bolt", "washer", "washer", "nut", "nut")
SQUEEZE = 0.69                                           # LOCO's photo: height / width
SHANK = {"long_bolt": 0.36, "short_bolt": 0.20}          # length in heights of the photo
ROUND = {"washer": (circle(60) * 0.062, circle(60) * 0.042),     # outline, bore
         "nut": (circle(6) * 0.064, circle(60) * 0.032)}
THREADS = [(0.75, 0.50, 0.12), (0.10, 0.10, 0.11), (0.62, 0.28, 0.16)]   # brass, black, copper
DIRT = [(0.36, 0.21, 0.08), (0.42, 0.10, 0.08), (0.10, 0.28, 0.36)]


def room_for(rng, kind, taken):
    """Centre and angle of a part in the middle of the bag, clear of the others or as clear as 60
    tries find. taken: list of (x, y, half width) of points along the parts that lie there."""
    half, width = (SHANK[kind] / 2 + 0.025, 0.04) if kind in SHANK else (0, 0.05)
    spine, others, tries = np.linspace((-half, 0), (half, 0), 9), np.array(taken).reshape(-1, 3), []
    for _ in range(60):
        centre, angle = rng.uniform((0.19, 0.25), (0.67, 0.73)), rng.uniform(0, 360)
        points = turned(spine, angle, centre, SQUEEZE)       # (9, 2)
        apart = np.linalg.norm((points[:, None] - others[:, :2]) / (SQUEEZE, 1), axis=2)
        apart = apart - others[:, 2] - width
        low, high = (points - (0.13, 0.17)).min(), ((0.73, 0.81) - points).min()
        gap = min(low, high, apart.min(initial=1))
        tries.append((gap, centre, angle, points))
        if gap > 0:
            break
    _, centre, angle, points = max(tries, key=lambda one: one[0])
    taken.extend((x, y, width) for x, y in points)
    return centre, angle


def hardware(scene, kind, centre, angle, fault):
    """A bolt, washer or nut. Returns its shape."""
    rng, put = scene.rng, partial(turned, angle=angle, centre=centre, squeeze=SQUEEZE)
    zinc = np.array((0.66, 0.70, 0.74)) * rng.normal(1, 0.03)
    steel = np.array((0.66, 0.66, 0.56)) * rng.normal(1, 0.03)
    end = SHANK.get(kind, 0) / 2     # a bolt's shank reaches from -end to end
    if end:
        shank = box(scene, centre, 2 * end, 0.042, angle, 0.01, SQUEEZE)
        pieces = [shank, box(scene, put((-end, 0)), 0.05, 0.088, angle, 0.015, SQUEEZE)]
    else:
        outline, bore = (polygon(scene, put(points)) for points in ROUND[kind])
        pieces = [minus(outline, bore)]
    if fault == "broken_part":
        cut = rng.uniform(0.0, 0.1) - end if end else rng.uniform(-0.02, 0.02)
        gone = box(scene, put((cut - 0.2, 0)), 0.4, 0.12, angle, 0.01, SQUEEZE)
        scene.regions.append(common(union(*pieces), gone))
        pieces = [minus(piece, gone) for piece in pieces]
    if fault == "wrong_thread_colour":
        steel = np.array(THREADS[rng.integers(3)])
        scene.regions.append(shank)
    for piece, colour in zip(pieces, (steel, zinc) if end else (zinc,)):
        stamp(scene, piece, colour, bulge=0.8, gloss=0.35, shadow=0.4)
    shape = union(*pieces)
    if fault == "rusty_part":
        rust = common(shape, ellipse(scene, centre, 0.09, 0.09, wobble=0.4))
        scene.regions = [rust]
        stamp(scene, rust, (0.42, 0.20, 0.08), grain=0.35, scale=7, alpha=rng.uniform(0.7, 0.95))
    return shape


def bag(scene):
    """A clear bag with its folds and its zip."""
    rng, n = scene.rng, scene.side
    corners = [(0.07, 0.09), (0.925, 0.12), (0.925, 0.90), (0.065, 0.87)]
    film = polygon(scene, corners + rng.normal(0, 0.003, (4, 2)))
    stamp(scene, film, (0.08, 0.08, 0.095), bulge=-1)
    same = np.random.default_rng(0)  # every bag is folded in the same machine
    folds = np.tanh(2.5 * noise(same, n, n, n / 4.5) + 0.6 * noise(same, n, n, n / 14))
    folds = common(film, Image.fromarray(np.uint8(127 + 127 * folds)))
    stamp(scene, folds, (0.12, 0.118, 0.115))
    zipper = stroke(scene, 0.016, [(0.782, 0.115), (0.786, 0.89)])
    stamp(scene, zipper, (0.62, 0.62, 0.64), bulge=0.6, alpha=0.6)


def paint(scene, fault=None):
    """Draws the bag: a good one, or one with a fault of LOGICAL or STRUCTURAL."""
    rng = scene.rng
    background(scene, (0.03, 0.03, 0.032))
    bag(scene)
    _, out, added = SWAPS.get(fault, (None, None, None))
    kinds, taken, shapes = list(GOOD), [], []
    if out:
        kinds.remove(out)
    if added:
        kinds.insert(kinds.index(added), added)
    hit = rng.integers(2 if fault == "wrong_thread_colour" else len(kinds))
    for i, kind in enumerate(kinds):
        here = fault if i == hit else None
        shapes.append(hardware(scene, kind, *room_for(rng, kind, taken), here))
    inside = polygon(scene, [(0.09, 0.11), (0.76, 0.13), (0.76, 0.87), (0.09, 0.85)])
    if added:
        scene.regions = [union(*(s for s, kind in zip(shapes, kinds) if kind == added))]
    elif out:
        scene.regions = [inside]
    elif fault == "stained_bag":
        patch(scene, inside, 0.024, 0.048, DIRT[rng.integers(3)], (0.55, 0.9))
    elif fault == "torn_bag":        # the film curls up, white, about a hole
        patch(scene, minus(inside, *shapes), 0.022, 0.04, (0.62, 0.61, 0.60))
        hole = soft(scene.regions[0], 4).point(lambda value: 255 * (value > 225))
        stamp(scene, hole, (0.025, 0.025, 0.027))
