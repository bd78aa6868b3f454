"""juice_bottle: a bottle of mango, cherry or banana juice before black. The upper label shows the
juice's fruit, the lower one a line of print, and the juice reaches the neck."""
from functools import partial

import numpy as np

from twin.drawing import (background, box, circle, ellipse, minus, patch, polygon, stamp, stroke,
                          turned, union)

LOGICAL = {"wrong_icon": 0.5, "missing_icon": 0.5, "missing_label": 0.5, "swapped_labels": 0.5,
           "shifted_label": 0.5, "overfilled": 0.5, "underfilled": 0.5, "empty_bottle": 0.5,
           "two_icons": 720}
STRUCTURAL = ("damaged_label", "rotated_label", "foreign_body", "unknown_juice", "damaged_cap")

JUICES = {"mango": (0.72, 0.65, 0.24), "cherry": (0.32, 0.09, 0.06), "banana": (0.72, 0.69, 0.57)}
FRUITS = {"mango": (0.93, 0.50, 0.10), "cherry": (0.62, 0.09, 0.08), "banana": (0.72, 0.74, 0.12)}
CHERRIES = [(-0.028, 0.016), (0.03, 0.016)], 0.029, 0.023        # centres and radii
UNKNOWN = ((0.25, 0.45, 0.15), (0.16, 0.30, 0.55), (0.45, 0.22, 0.50), (0.75, 0.38, 0.08),
           (0.10, 0.08, 0.08))
BODIES = [(0.10, 0.09, 0.08), (0.66, 0.65, 0.62), (0.15, 0.35, 0.15)]
GLASS = np.array([                   # half width of the bottle, at a height
    (0.145, 0.15), (0.145, 0.29), (0.16, 0.325), (0.21, 0.355), (0.238, 0.395), (0.245, 0.45),
    (0.243, 0.62), (0.236, 0.72), (0.243, 0.82), (0.243, 0.895), (0.232, 0.92)])
LABELS = ((0.345, 0.165), (0.33, 0.082))         # width and height of the upper and the lower one
ICON = 0.075, 0.045                              # half width and height of its area
ICONS = {"missing_icon": [], "two_icons": [-0.075, 0.075]}       # where they are, instead of 0
LEVELS = {"overfilled": (0.155, 0.18), "underfilled": (0.33, 0.48)}      # heights of the surface
LETTERS = (-0.13, -0.1, -0.07, -0.035, 0.025, 0.05, 0.075, 0.1, 0.125)       # of "100% Juice"


def bottle_part(scene, inset, top=0.15):
    """The bottle's outline below height `top`, made narrower by `inset` on each side."""
    y = np.array([top, *GLASS[GLASS[:, 1] > top, 1]])
    half, y = np.interp(y, GLASS[:, 1], GLASS[:, 0]) - inset, np.minimum(y, GLASS[-1, 1] - inset)
    left, right = np.stack([0.5 - half, y], 1), np.stack([0.5 + half, y], 1)
    return polygon(scene, [*left, *right[::-1]])


def icon(scene, fruit, centre, angle):
    """Paints a fruit about 0.12 wide at a centre; returns the area it takes."""
    put = partial(turned, angle=angle, centre=centre)
    if fruit == "banana":            # the lower halves of ellipses
        arcs = [put(circle(24)[1:11] * (0.055, 0.035) + (0, y)) for y in (-0.028, -0.01)]
        bodies = [stroke(scene, 0.018, arc) for arc in arcs]
    else:
        spots, rx, ry = ([(0, 0.01)], 0.052, 0.03) if fruit == "mango" else CHERRIES
        stalks = [put([spot, (0.01, -0.035)]) for spot in spots]
        stamp(scene, stroke(scene, 0.008, *stalks), (0.15, 0.38, 0.12))
        bodies = [ellipse(scene, spot, rx, ry, angle) for spot in put(spots)]
    for body in bodies:
        stamp(scene, body, FRUITS[fruit], bulge=0.6, gloss=0.2)
    return ellipse(scene, centre, *ICON, angle)


def labels(scene, fault, fruit):
    """Puts both labels on, with their faults; returns their shapes and the number of the one
    that a fault of a single label hits."""
    rng, papers = scene.rng, []
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
        stamp(scene, papers[k], (0.93, 0.66, 0.25), bulge=-0.4)
        if k == 0:
            icons = [icon(scene, fruit, turned((x, 0.004), angle, centre), angle)
                     for x in ICONS.get(fault, [0])]
        else:
            bars = [turned([(x, -0.012), (x, 0.012)], angle, centre) for x in LETTERS]
            stamp(scene, stroke(scene, 0.01, *bars), (0.16, 0.14, 0.11))
    if fault in ("wrong_icon", "two_icons"):
        scene.regions = [union(*icons)]
    elif fault == "missing_icon":
        scene.regions = [ellipse(scene, (0.5, heights[0]), *ICON)]
    elif fault == "swapped_labels":
        scene.regions = papers
    elif fault in ("missing_label", "shifted_label", "rotated_label"):
        scene.regions = [papers[odd]]
    return papers, odd


def paint(scene, fault=None):
    """Draws the bottle: a good one, or one with a fault of LOGICAL or STRUCTURAL."""
    rng = scene.rng
    background(scene, (0.022, 0.022, 0.028))
    juice = list(JUICES)[rng.integers(3)]
    colour = UNKNOWN[rng.integers(len(UNKNOWN))] if fault == "unknown_juice" else JUICES[juice]
    colour = colour * rng.normal(1, 0.015, 3)
    usual = level = rng.normal(0.228, 0.005)
    if fault in LEVELS:
        level = rng.uniform(*LEVELS[fault])
    stamp(scene, bottle_part(scene, 0), (0.22, 0.22, 0.23))          # the glass
    stamp(scene, bottle_part(scene, 0.012), (0.075, 0.08, 0.085))
    if fault != "empty_bottle":
        stamp(scene, bottle_part(scene, 0.016, level), colour, bulge=0.45)
    thread = union(*(box(scene, (0.5, y), 0.335, 0.026, radius=0.011)
                     for y in (0.085, 0.11, 0.135, 0.155)))
    stamp(scene, thread, (0.17, 0.18, 0.20), bulge=0.5)
    papers, odd = labels(scene, fault, juice)

    if fault in LEVELS:
        high, low = sorted((usual, level))
        scene.regions = [minus(bottle_part(scene, 0.016, high), bottle_part(scene, 0.016, low))]
    elif fault in ("empty_bottle", "unknown_juice"):
        scene.regions = [minus(bottle_part(scene, 0.016, level), *papers)]
    elif fault == "damaged_label":   # torn down to the juice, or stained
        patch(scene, papers[odd], 0.03, 0.06, (colour, (0.30, 0.18, 0.10))[rng.integers(2)])
    elif fault == "foreign_body":
        clear = minus(bottle_part(scene, 0.03, 0.3), *papers)
        patch(scene, clear, 0.016, 0.035, BODIES[rng.integers(3)], bulge=0.5)
    elif fault == "damaged_cap":
        patch(scene, thread, 0.025, 0.045, (0.03, 0.03, 0.035))
