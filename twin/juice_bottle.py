"""juice_bottle: a bottle of mango, cherry or banana juice before black. The fruit on its upper
label is the juice's, the lower label reads 100% Juice, and the juice reaches the neck."""
from functools import partial

import numpy as np

from twin.drawing import (background, blob, box, common, curve, ellipse, minus, polygon, soft,
                          somewhere, stamp, stroke, turned, union)

# Fault: saturation threshold, up to 1 a share of the defect's area, else pixels of a 256 px photo.
LOGICAL = {"wrong_icon": 0.5, "missing_icon": 0.5, "missing_label": 0.5, "swapped_labels": 0.5,
           "shifted_label": 0.5, "overfilled": 0.5, "underfilled": 0.5, "empty_bottle": 0.5,
           "two_icons": 720}
STRUCTURAL = ("damaged_label", "rotated_label", "foreign_body", "unknown_juice", "damaged_cap")

JUICES = {"mango": (0.72, 0.65, 0.24), "cherry": (0.32, 0.09, 0.06), "banana": (0.72, 0.69, 0.57)}
UNKNOWN = ((0.25, 0.45, 0.15), (0.16, 0.30, 0.55), (0.45, 0.22, 0.50), (0.75, 0.38, 0.08),
           (0.10, 0.08, 0.08))
BODIES = [(0.10, 0.09, 0.08), (0.66, 0.65, 0.62), (0.15, 0.35, 0.15)]
GLASS = np.array([                   # half width of the bottle, at a height
    (0.145, 0.15), (0.145, 0.29), (0.16, 0.325), (0.21, 0.355), (0.238, 0.395), (0.245, 0.45),
    (0.243, 0.62), (0.236, 0.72), (0.243, 0.82), (0.243, 0.895), (0.232, 0.92)])
LABELS = ((0.345, 0.165), (0.33, 0.082))         # width and height of the upper and the lower one
ICON = 0.075, 0.045                              # half width and height of its area


def ring(x, y, rx, ry, start=0, end=360):
    """Points along an ellipse, or along its arc between two angles in degrees."""
    angles = np.radians(np.linspace(start, end, 13))
    return [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in angles]


GLYPHS = {                           # a letter's lines, in a box of side 1
    "1": [[(0.25, 0.2), (0.5, 0), (0.5, 1)], [(0.25, 1), (0.75, 1)]],
    "0": [ring(0.5, 0.5, 0.36, 0.5)],
    "%": [[(0.9, 0), (0.1, 1)], ring(0.2, 0.2, 0.17, 0.2), ring(0.8, 0.8, 0.17, 0.2)],
    " ": [],
    "J": [[(0.7, 0), (0.7, 0.75), *ring(0.45, 0.75, 0.25, 0.25, 30, 180)]],
    "u": [[(0.15, 0.35), *ring(0.5, 0.72, 0.35, 0.28, 180, 0), (0.85, 0.35), (0.85, 1)]],
    "i": [[(0.5, 0.35), (0.5, 1)], [(0.5, 0), (0.5, 0.08)]],
    "c": [ring(0.5, 0.67, 0.35, 0.33, -45, -315)],
    "e": [[(0.2, 0.67), *ring(0.5, 0.67, 0.35, 0.33, 0, -315)]]}
TEXT = []                            # lines about the label's centre
for k, letter in enumerate("100% Juice"):
    for line in GLYPHS[letter]:
        TEXT.append(np.array(line) * (0.021, 0.036) + (0.0295 * (k - 4.9), -0.018))


def half_width(height):
    return np.interp(height, GLASS[:, 1], GLASS[:, 0])


def bottle_part(scene, inset, top=0.15):
    """The bottle's outline below height `top`, made narrower by `inset` on each side."""
    y = np.array([top, *GLASS[GLASS[:, 1] > top, 1]])
    half, y = half_width(y) - inset, np.minimum(y, GLASS[-1, 1] - inset)
    left, right = np.stack([0.5 - half, y], 1), np.stack([0.5 + half, y], 1)
    return polygon(scene, [*left, *right[::-1]])


def icon(scene, fruit, centre, angle):
    """Paints a fruit about 0.12 wide at a centre; returns the area it takes."""
    put = partial(turned, angle=angle, centre=centre)
    if fruit == "mango":
        body = ellipse(scene, put([(0.012, 0.008)])[0], 0.052, 0.03, angle)
        stamp(scene, body, (0.93, 0.55, 0.10), 0.04, 4, bulge=0.5, gloss=0.15)
        tip, stalk = (-0.065, 0), (0.025, -0.02)
        leaf = [*curve(tip, (-0.03, -0.045), stalk), *curve(stalk, (-0.02, -0.015), tip)]
        stamp(scene, polygon(scene, put(leaf)), (0.10, 0.30, 0.12), 0.1)
    elif fruit == "cherry":
        stems = [put(curve((0.005, -0.042), (x / 2, -0.02), (x, 0.012))) for x in (-0.03, 0.032)]
        stamp(scene, stroke(scene, 0.006, *stems), (0.20, 0.42, 0.14))
        for x in (-0.028, 0.03):
            ball = ellipse(scene, put([(x, 0.016)])[0], 0.029, 0.023, angle)
            stamp(scene, ball, (0.62, 0.09, 0.08), 0.04, 4, bulge=0.6, gloss=0.25)
    else:
        for y in (-0.012, 0.002, 0.016):
            finger = put(curve((-0.058, y + 0.008), (0.01, y + 0.03), (0.04, y - 0.03)))
            stamp(scene, stroke(scene, 0.021, finger), (0.30, 0.30, 0.08), 0)
            stamp(scene, stroke(scene, 0.014, finger), (0.80, 0.76, 0.15), bulge=0.3)
        stem = put([(0.035, -0.042), (0.045, -0.046)])
        stamp(scene, stroke(scene, 0.013, stem), (0.12, 0.13, 0.08), 0)
    return ellipse(scene, centre, *ICON, angle)


def label(scene, paper, centre, width, height, angle, text):
    """Prints a label, the shape `paper` with a frame, and the text where asked for."""
    stamp(scene, paper, (0.93, 0.66, 0.25) * scene.rng.normal(1, 0.02, 3), 0.03, 3)
    shine = common(soft(box(scene, centre, width * 0.7, height * 0.5, angle), 16), paper)
    stamp(scene, shine, (0.96, 0.86, 0.50), 0.03)
    outer, inner = (box(scene, centre, width * 0.92 - d, height * 0.84 - d, angle, 0.02 - d / 2)
                    for d in (0, 0.006))
    stamp(scene, minus(outer, inner), (0.36, 0.30, 0.16))
    if text:
        lines = (turned(line, angle, centre) for line in TEXT)
        stamp(scene, stroke(scene, 0.0075, *lines), (0.16, 0.14, 0.11), 0)


def bottle(scene, colour, level):
    """The bottle with juice of a colour up to a level, empty where that is None; returns its
    screw thread."""
    rng, glass = scene.rng, bottle_part(scene, 0)
    stamp(scene, glass, (0.075, 0.08, 0.085), 0.1, 8)
    stamp(scene, minus(glass, bottle_part(scene, 0.012)), (0.22, 0.22, 0.23), 0.25, 20)
    if level:
        filled = bottle_part(scene, 0.016, level)
        stamp(scene, filled, colour, 0.03, 30, 0.45)
        core = common(soft(box(scene, (0.5, 0.72), 0.34, 0.4), 30), filled)
        stamp(scene, core, colour * 0.82, 0.02, 30, alpha=0.7)
        surface = ellipse(scene, (0.5, level), half_width(level) - 0.016, 0.007)
        stamp(scene, surface, colour * 0.7 + 0.12, 0.1, 3)
    for sign in (-1, 1):             # light on the glass
        for x, top, bottom in ((0.228, 0.42, 0.6), (0.212, 0.74, 0.88), (0.136, 0.17, 0.29)):
            line = [(0.5 + sign * x, top), (0.5 + sign * (x + 0.003), bottom)]
            gleam = soft(stroke(scene, 0.008, line), 2)
            stamp(scene, gleam, (0.85, 0.87, 0.9), 0, alpha=rng.uniform(0.25, 0.55))
        inside, middle, outside = 0.5 + sign * 0.07, 0.5 + sign * 0.19, 0.5 + sign * 0.215
        shoulder = curve((inside, 0.40), (middle, 0.385), (outside, 0.44))
        gleam = soft(stroke(scene, 0.014, shoulder), 3)
        stamp(scene, gleam, (0.95, 0.95, 0.92), 0, alpha=rng.uniform(0.2, 0.4))
    turns = [box(scene, (0.5, y), width, 0.026, rng.normal() * 0.5, 0.011)
             for y, width in ((0.085, 0.336), (0.11, 0.32), (0.135, 0.34), (0.155, 0.332))]
    for turn in turns:
        stamp(scene, turn, (0.17, 0.18, 0.20), 0.3, 14, bulge=0.9, gloss=0.3)
    return union(*turns)


def labels(scene, fault, juice):
    """Puts both labels on, with their faults; returns their shapes and the number of the one
    that a fault of a single label hits."""
    rng, papers, icons, fruit = scene.rng, [], [], juice
    if fault == "wrong_icon":
        fruit = [name for name in JUICES if name != juice][rng.integers(2)]
    heights = [0.545, 0.80][::-1 if fault == "swapped_labels" else 1] + rng.normal(size=2) * 0.003
    odd = rng.integers(2)
    for k, (width, height) in enumerate(LABELS):
        centre, angle = np.array([0.5 + rng.normal() * 0.005, heights[k]]), rng.normal() * 0.7
        if fault == "shifted_label" and k == odd:
            aside = rng.choice((-1, 1)) * 0.06
            centre += [(aside, 0), (0, (0.09, -0.09)[k])][rng.integers(2)]
        if fault == "rotated_label" and k == odd:
            angle += rng.choice((-1, 1)) * rng.uniform(6, 15)
        papers.append(box(scene, centre, width, height, angle))
        if fault == "missing_label" and k == odd:
            continue
        label(scene, papers[k], centre, width, height, angle, text=k == 1)
        if k == 0:
            for x in {"missing_icon": (), "two_icons": (-0.075, 0.075)}.get(fault, (0,)):
                icons.append(icon(scene, fruit, turned((x, 0.004), angle, centre), angle))
    if fault in ("wrong_icon", "two_icons"):
        scene.regions = [union(*icons)]
    elif fault == "missing_icon":
        scene.regions = [ellipse(scene, (0.5, heights[0]), *ICON)]
    elif fault == "swapped_labels":
        scene.regions = papers
    elif fault in ("missing_label", "shifted_label", "rotated_label"):
        scene.regions = [papers[odd]]
    return papers, odd


def spoil(scene, fault, papers, paper, thread, juice):
    """Draws a structural fault onto the finished bottle, a damaged label onto `paper`; returns
    its shape."""
    rng = scene.rng
    if fault == "damaged_label":     # torn down to the juice, or stained
        damage = common(blob(scene, somewhere(scene, paper), 0.03, 0.06), paper)
        colour, alpha = juice, 1
        if rng.random() >= 0.5:
            colour, alpha = (0.30, 0.18, 0.10), rng.uniform(0.4, 0.8)
        stamp(scene, damage, colour, 0.1, 5, -0.2, alpha=alpha)
    elif fault == "foreign_body":
        clear = minus(bottle_part(scene, 0.03, 0.3), *papers)
        damage = common(blob(scene, somewhere(scene, clear), 0.016, 0.035), clear)
        stamp(scene, soft(damage, 1), BODIES[rng.integers(3)], 0.2, 4, 0.5)
    else:                            # damaged_cap: a piece chipped off
        edge = 0.5 + rng.choice((-1, 1)) * rng.uniform(0.08, 0.15), rng.uniform(0.085, 0.15)
        damage = common(blob(scene, edge, 0.025, 0.045), thread)
        stamp(scene, damage, (0.03, 0.03, 0.035), 0.2)
        rim = minus(damage, blob(scene, edge, 0.02, 0.03))
        stamp(scene, rim, (0.6, 0.62, 0.66), 0.3, 3, alpha=0.6)
    return damage


def paint(scene, fault=None):
    """Draws the bottle: a good one, or one with a fault of LOGICAL or STRUCTURAL."""
    rng = scene.rng
    scene.aim(0.008, 0.7, 0.008)
    background(scene, (0.022, 0.022, 0.028), 0.1)
    stamp(scene, soft(box(scene, (0.5, 0.99), 1.4, 0.16), 5), (0.05, 0.05, 0.055), 0.2)  # the table

    juice = list(JUICES)[rng.integers(3)]
    colour = UNKNOWN[rng.integers(len(UNKNOWN))] if fault == "unknown_juice" else JUICES[juice]
    colour = colour * rng.normal(1, (0.015, 0.015, 0.015)) * rng.normal(1, 0.05)
    usual = level = rng.normal(0.228, 0.005)
    if fault == "overfilled":
        level = rng.uniform(0.155, 0.18)
    elif fault == "underfilled":
        level = rng.uniform(0.33, 0.48)
    thread = bottle(scene, colour, None if fault == "empty_bottle" else level)
    papers, odd = labels(scene, fault, juice)

    if fault in ("overfilled", "underfilled"):
        high, low = sorted((usual, level))
        scene.regions = [minus(bottle_part(scene, 0.016, high), bottle_part(scene, 0.016, low))]
    elif fault in ("empty_bottle", "unknown_juice"):
        scene.regions = [minus(bottle_part(scene, 0.016, level), *papers)]
    elif fault in ("damaged_label", "foreign_body", "damaged_cap"):
        scene.regions = [spoil(scene, fault, papers, papers[odd], thread, colour)]
