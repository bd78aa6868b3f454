"""pushpins: a clear box of 3 x 5 compartments with exactly one yellow pin in each, at any angle."""
from functools import partial

import numpy as np

from twin.drawing import (background, box, common, minus, patch, polygon, stamp, stroke, turned,
                          union)

# One number for each compartment that a fault hits: by how many its pins differ.
PINS_OFF = {"missing_pushpin": [-1], "additional_pushpin": [1], "moved_pushpin": [-1, 1],
            "two_missing_pushpins": [-1, -1], "two_additional_pushpins": [1, 1]}
LOGICAL = dict.fromkeys(PINS_OFF, 260) | {"missing_divider": 0.5}
STRUCTURAL = ("bent_pushpin", "broken_pushpin", "missing_needle", "wrong_colour", "foreign_body")

COLUMNS = (0.025, 0.21, 0.40, 0.59, 0.78, 0.97)          # where the walls stand
ROWS = (0.06, 0.36, 0.655, 0.95)
SQUEEZE = 0.59                                           # LOCO's photo: height / width
HALF = np.array([                                        # of a pin: (along, across)
    (-0.064, 0.036), (-0.05, 0.038), (-0.042, 0.020), (0.022, 0.016),
    (0.03, 0.038), (0.05, 0.036), (0.056, 0.012)])
PIN = np.concatenate([HALF, HALF[::-1] * (1, -1)])
NEEDLE = np.array([(0.05, 0), (0.10, 0), (0.155, 0)])
NO_YELLOW = [(0.75, 0.10, 0.08), (0.12, 0.50, 0.20), (0.15, 0.25, 0.70), (0.80, 0.80, 0.78)]


def pushpin(scene, low, high, taken, fault):
    """One pin at any angle between the corners low and high, clear of the centres `taken`.
    Returns its body's shape."""
    rng, needle = scene.rng, NEEDLE.copy()
    body, angle = PIN * rng.normal(1, 0.01), rng.uniform(0, 360)
    colour = np.array((0.98, 0.66, 0.04)) * rng.normal(1, 0.02)
    reach = turned(np.concatenate([body, NEEDLE]), angle, squeeze=SQUEEZE)
    spots = rng.uniform(low + 0.012 - reach.min(0), high - 0.012 - reach.max(0), (20, 2))
    apart = [min((np.linalg.norm((spot - t) / (SQUEEZE, 1)) for t in taken), default=0)
             for spot in spots]
    taken.append(spots[np.argmax(apart)])
    put = partial(turned, angle=angle, centre=taken[-1], squeeze=SQUEEZE)
    shape = polygon(scene, put(body))
    if fault == "wrong_colour":
        colour = np.array(NO_YELLOW[rng.integers(4)])
        scene.regions.append(shape)
    if fault == "bent_pushpin":
        bend = rng.choice((-1, 1)) * rng.uniform(50, 110)
        needle[2] = needle[1] + turned((0.055, 0), bend)
    if fault in ("bent_pushpin", "missing_needle"):
        scene.regions.append(stroke(scene, 0.03, put(needle)))
    if fault == "broken_pushpin":    # the head has snapped off
        cut = rng.uniform(-0.03, 0.02)
        head = [(cut, -0.06), (cut + 0.015, 0), (cut, 0.06), (-0.1, 0.06), (-0.1, -0.06)]
        scene.regions.append(common(shape, polygon(scene, put(head))))
        shape = minus(shape, scene.regions[-1])
    if fault != "missing_needle":
        stamp(scene, stroke(scene, 0.0065, put(needle)), (0.50, 0.46, 0.42))
    stamp(scene, shape, colour, bulge=0.45, gloss=0.25)
    return shape


def clear_box(scene, fault):
    """The empty box: its rim and its walls."""
    rng, grey, walls = scene.rng, (0.62, 0.59, 0.57), []
    for x in COLUMNS[1:-1]:
        walls += [[(x, top), (x, bottom)] for top, bottom in zip(ROWS, ROWS[1:])]
    for y in ROWS[1:-1]:
        walls += [[(left, y), (right, y)] for left, right in zip(COLUMNS, COLUMNS[1:])]
    if fault == "missing_divider":
        scene.regions.append(stroke(scene, 0.02, walls.pop(rng.integers(len(walls)))))
    outer = box(scene, (0.4975, 0.505), 0.967, 0.912, radius=0.056)
    inner = box(scene, (0.4975, 0.505), 0.925, 0.870, radius=0.035)
    stamp(scene, minus(outer, inner), grey, bulge=0.5, alpha=0.45)
    stamp(scene, stroke(scene, 0.0095, *walls), grey, alpha=0.6)


def paint(scene, fault=None):
    """Draws the box: a good one, or one with a fault of LOGICAL or STRUCTURAL."""
    rng = scene.rng
    background(scene, (0.045, 0.045, 0.055))
    clear_box(scene, fault)
    order = rng.permutation(15)      # a fault hits the first of these compartments
    off = dict(zip(order, PINS_OFF.get(fault, [])))
    for cell, (row, column) in enumerate(np.ndindex(3, 5)):
        low = np.array((COLUMNS[column], ROWS[row]))
        high = np.array((COLUMNS[column + 1], ROWS[row + 1]))
        taken, here = [], fault if cell == order[0] else None
        pins = [pushpin(scene, low, high, taken, here) for _ in range(1 + off.get(cell, 0))]
        if not pins:
            scene.regions.append(box(scene, (low + high) / 2, 0.175, 0.28))
        if len(pins) > 1:
            scene.regions.append(union(*pins))
        if here == "foreign_body":
            colour = rng.uniform(0.25, 0.75, 3) * (0.8, 0.8, 1)
            patch(scene, box(scene, (low + high) / 2, 0.16, 0.26), 0.02, 0.045, colour, bulge=0.5)
