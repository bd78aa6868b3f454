"""splicing_connectors: two connectors of 2, 3 or 5 clamps, the same on both sides. A cable joins
a clamp and its mirrored clamp; its colour goes with the number of clamps."""
from functools import partial

import numpy as np

from twin.drawing import (background, box, common, ellipse, minus, patch, stamp, stroke, turned,
                          union)

LOGICAL = {"wrong_cable_colour": 0.7, "unequal_connectors": 0.4, "wrong_cable_location": 0.5,
           "extra_cable": 0.5, "missing_cable": 700, "missing_connector": 0.8,
           "reversed_connector": 0.8, "loose_cable": 0.5}
STRUCTURAL = ("cut_cable", "frayed_cable", "open_lever", "broken_connector", "stain")

CABLES = {2: (0.86, 0.68, 0.16), 3: (0.26, 0.32, 0.72), 5: (0.74, 0.13, 0.11)}   # clamps: colour
PITCH = 0.098                                            # of the clamps
SQUEEZE = 0.5                                            # LOCO's photo: height / width
ORANGE, COPPER = np.array((0.96, 0.31, 0.07)), (0.66, 0.38, 0.20)


def mesh(scene):
    """Cuts the background into expanded metal: rounded wires where |cos x + cos y| is small, and
    between them staggered diamond holes."""
    n = scene.side
    turns = np.arange(n, dtype=np.float32) / n - scene.shift[:, None]
    x, y = 2 * np.pi / 0.075 * turns                         # (n,) each
    wave = np.cos(x) + np.cos(y)[:, None]
    wire = np.clip(1.2 - np.abs(wave + 0.08) / 0.52, 0, 1)   # (n, n), 1 on a wire, 0 in a hole
    scene.photo *= (0.06 + 0.75 * wire * (1 + 0.25 * wave))


def connector(scene, centre, angle, side, clamps, fault):
    """A connector, side: 1 levers to the right, -1 left. Returns its shape, missing or not."""
    rng, put = scene.rng, partial(turned, angle=angle, centre=centre, squeeze=SQUEEZE)
    orange, hit, gone = ORANGE * rng.normal(1, 0.02), rng.integers(clamps), None

    def piece(x, y, w, h):
        shape = box(scene, put((side * x, y)), w, h, angle, 0.015, SQUEEZE)
        return minus(shape, gone) if gone else shape

    whole = piece(0, 0, 0.32, clamps * PITCH + 0.03)
    if fault == "missing_connector":
        return whole
    if fault == "broken_connector":  # a corner or an end of it
        spot = (side * rng.uniform(-0.15, 0.12), rng.choice((-1, 1)) * clamps * PITCH / 2)
        gone = ellipse(scene, put(spot), *rng.uniform(0.04, 0.07, 2), wobble=0.4)
        scene.regions.append(common(whole, gone))
    housing = piece(-0.02, 0, 0.28, clamps * PITCH + 0.025)
    stamp(scene, housing, (0.62, 0.56, 0.54), bulge=0.4, shadow=0.6, alpha=0.7)
    for clamp in range(clamps):
        y = (clamp - (clamps - 1) / 2) * PITCH
        lever = piece(0.055, y, 0.2, PITCH * 0.92)
        if fault == "open_lever" and clamp == hit:
            lever = piece(0.14, y, 0.28, PITCH * 0.92)
            scene.regions.append(lever)
        stamp(scene, lever, orange, bulge=0.45, shadow=0.5)
        stamp(scene, piece(-0.02, y, 0.085, 0.045), (0.45, 0.35, 0.31), bulge=0.4)
    if fault == "stain":
        patch(scene, whole, 0.03, 0.06, (0.13, 0.10, 0.07), (0.7, 0.95))
    return whole


def cable_path(rng, places, clamps, rows):
    """(40, 2) points from the left clamp rows[0] to the right clamp rows[1], sagging a little."""
    left, right = (turned((side * 0.14, (row - (n - 1) / 2) * PITCH), angle, centre, SQUEEZE)
                   for (centre, angle, side), n, row in zip(places, clamps, rows))
    t = np.linspace(0, 1, 40)[:, None]
    sag = rng.normal(0.02, 0.004) * np.sin(np.pi * t) + rng.normal(0, 0.004) * np.sin(2 * np.pi * t)
    return left + t * (right - left) + (0, 1) * sag


def cable(scene, path, colour, fault):
    """A cable along a path, cut or frayed somewhere in its middle after a fault."""
    rng, i, pieces = scene.rng, scene.rng.integers(10, 26), [path]       # a fault sits at path[i]
    if fault == "cut_cable":
        pieces = [path[:i], path[i + rng.integers(2, 5):] + (0, rng.normal(0, 0.015))]
    stamp(scene, stroke(scene, 0.025, *pieces), colour, bulge=0.45, gloss=0.15, shadow=0.5)
    if fault == "frayed_cable":      # bare strands stick out
        bare = path[i:i + rng.integers(4, 7)]
        bow = np.sin(np.linspace(0, np.pi, len(bare)))[:, None]
        strands = [bare + bow * rng.normal(0, (0.004, 0.016), 2) for _ in range(8)]
        stamp(scene, stroke(scene, 0.006, *strands), COPPER, grain=0.3)
    if fault in ("cut_cable", "frayed_cable"):
        scene.regions.append(stroke(scene, 0.05, path[i:i + 4]))


def paint(scene, fault=None):
    """Draws the connectors: good ones, or with a fault of LOGICAL or STRUCTURAL."""
    rng = scene.rng
    background(scene, (0.76, 0.72, 0.70))
    mesh(scene)
    n, hit = int(rng.choice((2, 3, 5))), rng.integers(2)     # hit: the side with the fault
    row, other = rng.permutation(n)[:2]
    odd = int(rng.choice([m for m in CABLES if m != n]))
    places = [(middle + rng.normal(0, 0.003, 2), rng.normal(0, 0.5), side)
              for middle, side in (((0.19, 0.48), 1), ((0.80, 0.50), -1))]   # centre, angle, side
    clamps = [n, n]
    if fault == "unequal_connectors":
        clamps[hit] = odd
        row = min(row, odd - 1)
    colour = np.array(CABLES[odd if fault == "wrong_cable_colour" else n]) * rng.normal(1, 0.02)
    rows = [(row, other if fault == "wrong_cable_location" else row)]    # a cable's two clamps
    if fault == "extra_cable":
        rows.append((other, other))
    paths = [cable_path(rng, places, clamps, pair) for pair in rows]
    if fault in ("wrong_cable_colour", "wrong_cable_location", "extra_cable"):
        scene.regions = [stroke(scene, 0.025, *paths)]
    elif fault == "missing_cable":
        scene.regions = [stroke(scene, 0.06, paths.pop())]
    elif fault == "loose_cable":     # it ends short of the connector
        gap = np.arange(30, 40) if hit else np.arange(10)
        scene.regions = [stroke(scene, 0.05, paths[0][gap])]
        paths = [np.delete(paths[0], gap, axis=0)]
    for path in paths:
        cable(scene, path, colour, fault)

    if fault == "reversed_connector":
        places[hit] = (*places[hit][:2], -places[hit][2])
    bodies = [connector(scene, *place, clamps[i], fault if i == hit else None)
              for i, place in enumerate(places)]
    if fault in ("missing_connector", "reversed_connector"):
        scene.regions = [bodies[hit]]
    elif fault == "unequal_connectors":
        scene.regions = [union(*bodies)]
