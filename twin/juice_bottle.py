"""juice_bottle: a bottle of mango, cherry or banana juice before black. The upper label shows the
juice's fruit, the lower one a line of print, and the juice reaches the neck."""
from functools import partial

import numpy as np

from twin.drawing import (background, blob, box, circle, common, ellipse, minus, polygon, soft,
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
LETTERS = (-0.13, -0.1, -0.07, -0.035, 0.025, 0.05, 0.075, 0.1, 0.125)       # of "100% Juice"


def bottle_part(scene, inset, top=0.15):
    """The bottle's outline below height `top`, made narrower by `inset` on each side."""
    y = np.array([top, *GLASS[GLASS[:, 1] > top, 1]])
    half, y = np.interp(y, GLASS[:, 1], GLASS[:, 0]) - inset, np.minimum(y, GLASS[-1, 1] - inset)
    left, right = np.stack([0.5 - half, y], 1), np.stack([0.5 + half, y], 1)
    return polygon(scene, [*left, *right[::-1]])


def bottle(scene, colour, level):
    """The bottle with juice of a colour up to a level, empty where that is None; returns its
    screw thread."""
    glass = bottle_part(scene, 0)
    stamp(scene, glass, (0.075, 0.08, 0.085), 0.1, 8)
    stamp(scene, minus(glass, bottle_part(scene, 0.012)), (0.22, 0.22, 0.23), 0.25, 20)
    if level:
        stamp(scene, bottle_part(scene, 0.016, level), colour, 0.03, 30, 0.45)
    turns = [box(scene, (0.5, y), 0.335, 0.026, scene.rng.normal() * 0.5, 0.011)
             for y in (0.085, 0.11, 0.135, 0.155)]
    for turn in turns:
        stamp(scene, turn, (0.17, 0.18, 0.20), 0.3, 14, bulge=0.9, gloss=0.3)
    return union(*turns)


def icon(scene, fruit, centre, angle):
    """Paints a fruit about 0.12 wide at a centre; returns the area it takes."""
    put = partial(turned, angle=angle, centre=centre)
    if fruit == "mango":
        body = ellipse(scene, put([(0.012, 0.008)])[0], 0.052, 0.03, angle)
        stamp(scene, body, (0.93, 0.55, 0.10), bulge=0.5, gloss=0.15)
        leaf = ellipse(scene, put([(-0.02, -0.02)])[0], 0.042, 0.01, angle)
        stamp(scene, leaf, (0.10, 0.30, 0.12), 0.1)
    elif fruit == "cherry":
        stems = put([(-0.03, 0.012), (0.005, -0.042), (0.032, 0.012)])
        stamp(scene, stroke(scene, 0.006, stems), (0.20, 0.42, 0.14))
        for x in (-0.028, 0.03):
            ball = ellipse(scene, put([(x, 0.016)])[0], 0.029, 0.023, angle)
            stamp(scene, ball, (0.62, 0.09, 0.08), bulge=0.6, gloss=0.25)
    else:
        arc = circle(24)[1:11] * (0.055, 0.035)      # its lower half
        for y in (-0.03, -0.016, -0.002):
            finger = put(arc + (0, y))
            stamp(scene, stroke(scene, 0.021, finger), (0.30, 0.30, 0.08), 0)
            stamp(scene, stroke(scene, 0.014, finger), (0.80, 0.76, 0.15), bulge=0.3)
    return ellipse(scene, centre, *ICON, angle)


def print_label(scene, paper, centre, width, height, angle, text):
    """Prints a label, the shape `paper`, with a frame and, with text, a bar for each letter."""
    stamp(scene, paper, (0.93, 0.66, 0.25) * scene.rng.normal(1, 0.02, 3), 0.03, 3)
    outer = box(scene, centre, width * 0.92, height * 0.84, angle, 0.02)
    inner = box(scene, centre, width * 0.92 - 0.006, height * 0.84 - 0.006, angle, 0.017)
    stamp(scene, minus(outer, inner), (0.36, 0.30, 0.16))
    if text:
        bars = [turned([(x, -0.014), (x, 0.014)], angle, centre) for x in LETTERS]
        stamp(scene, stroke(scene, 0.012, *bars, caps=False), (0.16, 0.14, 0.11), 0)


def labels(scene, fault, fruit):
    """Puts both labels on, with their faults; returns their shapes and the number of the one
    that a fault of a single label hits."""
    rng, papers, icons = scene.rng, [], []
    if fault == "wrong_icon":
        fruit = [name for name in JUICES if name != fruit][rng.integers(2)]
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
        print_label(scene, papers[k], centre, width, height, angle, text=k == 1)
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
    return damage


def paint(scene, fault=None):
    """Draws the bottle: a good one, or one with a fault of LOGICAL or STRUCTURAL."""
    rng = scene.rng
    scene.aim(0.008, 0.7, 0.008)
    background(scene, (0.022, 0.022, 0.028), 0.1)
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
