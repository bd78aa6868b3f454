"""Three scenes of the rendered twin: pushpins, splicing_connectors and screw_bag."""
from __future__ import annotations

import math
from functools import partial, reduce

import numpy as np
from PIL import Image, ImageDraw

from twin import background, box, common, curve, ellipse, minus, noise, polygon, soft, stamp, stroke, turned, union

TURN = np.linspace(0, 2 * np.pi, 60, endpoint=False)
CIRCLE = np.stack([np.cos(TURN), np.sin(TURN)], 1)                                   # (60, 2)


def slab(w, h):
    """Outline of a w x h rectangle with round corners, about the origin."""
    return np.sign(CIRCLE) * np.abs(CIRCLE) ** 0.25 * (w / 2, h / 2)


def lying(points, centre, angle, squeeze):
    """Points about the origin, turned and moved. LOCO's photos are wider than high and ours are square: lengths across
    shrink by `squeeze`, the real photo's height / width."""
    return turned(points, (0, 0), angle) * (squeeze, 1) + centre


def strokes(scene, lines, width):
    """Many square-ended lines as one shape."""
    shape = Image.new("L", (scene.side, scene.side))
    draw = ImageDraw.Draw(shape)
    for line in lines:
        draw.line(scene.pixels(line), fill=255, width=max(1, round(width * scene.side)), joint="curve")
    return shape


PUSHPINS = {                          # fault: (kind, saturation threshold, relative); areas in pixels of a 256 px photo
    "missing_pushpin": ("logical_anomalies", 260, False),
    "additional_pushpin": ("logical_anomalies", 260, False),
    "moved_pushpin": ("logical_anomalies", 260, False),
    "two_missing_pushpins": ("logical_anomalies", 260, False),
    "two_additional_pushpins": ("logical_anomalies", 260, False),
    "missing_divider": ("logical_anomalies", 0.5, True),
    "bent_pushpin": ("structural_anomalies", 1.0, True),
    "broken_pushpin": ("structural_anomalies", 1.0, True),
    "missing_needle": ("structural_anomalies", 1.0, True),
    "wrong_colour": ("structural_anomalies", 1.0, True),
    "foreign_body": ("structural_anomalies", 1.0, True),
}
PINS_OFF = {"missing_pushpin": [-1], "additional_pushpin": [1], "moved_pushpin": [-1, 1],
            "two_missing_pushpins": [-1, -1], "two_additional_pushpins": [1, 1]}     # one number a compartment hit
COLUMNS, ROWS = (0.025, 0.21, 0.40, 0.59, 0.78, 0.97), (0.06, 0.36, 0.655, 0.95)     # where the walls stand
HALF = np.array([(-0.064, 0.036), (-0.05, 0.038), (-0.042, 0.020), (0.022, 0.016), (0.03, 0.036), (0.04, 0.042),
                 (0.05, 0.034), (0.056, 0.012)])                                     # of a pin: (along, across)
PIN = np.concatenate([HALF, HALF[::-1] * (1, -1)])
NEEDLE = np.array([(0.05, 0), (0.10, 0), (0.155, 0)])
NO_YELLOW = [(0.75, 0.10, 0.08), (0.12, 0.50, 0.20), (0.15, 0.25, 0.70), (0.80, 0.80, 0.78)]


def pushpin(scene, low, high, taken, fault):
    """One pin at any angle between the corners low and high, clear of the centres `taken`. Returns its body's shape."""
    rng = scene.rng
    body, angle = PIN * rng.normal(1, 0.03), rng.uniform(0, 360)
    colour = np.array((0.98, 0.66, 0.04)) * rng.normal(1, 0.04)
    reach = lying(np.concatenate([body, NEEDLE]), (0, 0), angle, 0.59)
    spots = rng.uniform(low + 0.012 - reach.min(0), high - 0.012 - reach.max(0), (20, 2))
    spot = max(spots, key=lambda s: min((np.linalg.norm((s - t) / (0.59, 1)) for t in taken), default=0))
    taken.append(spot)
    put = partial(lying, centre=spot, angle=angle, squeeze=0.59)
    shape, needle = polygon(scene, put(body)), NEEDLE.copy()
    if fault == "wrong_colour":
        colour = np.array(NO_YELLOW[rng.integers(4)])
        scene.regions.append((fault, shape))
    if fault == "bent_pushpin":
        needle[2] = needle[1] + turned([(0.055, 0)], (0, 0), rng.choice((-1, 1)) * rng.uniform(50, 110))[0]
    if fault in ("bent_pushpin", "missing_needle"):
        scene.regions.append((fault, stroke(scene, put(needle), 0.03)))
    if fault == "broken_pushpin":                                                    # the head has snapped off
        cut = rng.uniform(-0.03, 0.02)
        head = [(cut, -0.06), (cut + 0.015, 0), (cut, 0.06), (-0.1, 0.06), (-0.1, -0.06)]
        gone = common(shape, polygon(scene, put(head)))
        shape = minus(shape, gone)
        scene.regions.append((fault, gone))
    if fault != "missing_needle":
        stamp(scene, stroke(scene, put(needle), 0.0065), (0.50, 0.46, 0.42), grain=0.15)
    stamp(scene, shape, colour, bulge=0.45, gloss=0.25)
    flanges = strokes(scene, [put([(along, -0.036), (along, 0.036)]) for along in (-0.057, 0.043)], 0.009)
    stamp(scene, common(flanges, shape), colour * 1.12, alpha=0.8)                   # they catch the light
    return shape


def pushpins(scene, fault=None):
    """A clear box of 3 x 5 compartments with exactly one yellow pin in each, at any angle."""
    rng = scene.rng
    scene.aim(0.008, 0.6, 0.012)
    background(scene, (0.045, 0.045, 0.055), grain=0.06, blotch=0.2)
    walls = [[(COLUMNS[c], ROWS[r]), (COLUMNS[c], ROWS[r + 1])] for c in range(1, 5) for r in range(3)]
    walls += [[(COLUMNS[c], ROWS[r]), (COLUMNS[c + 1], ROWS[r])] for r in (1, 2) for c in range(5)]
    walls = [np.array(wall) + rng.normal(0, 0.0015, (2, 2)) for wall in walls]
    joints = [wall[0] for wall in walls if wall[0].min() > 0.1]
    if fault == "missing_divider":
        scene.regions.append((fault, stroke(scene, walls.pop(rng.integers(len(walls))), 0.02)))
    grey = (0.62, 0.59, 0.57)
    clip = [(0.39, 0.05), (0.4, 0.012), (0.42, 0.03), (0.57, 0.03), (0.59, 0.012), (0.6, 0.05)]
    stamp(scene, polygon(scene, clip), grey, grain=0.2, alpha=0.3)
    stamp(scene, box(scene, (0.495, 0.033), 0.08, 0.034, radius=0.008), (0.3, 0.32, 0.36), bulge=0.6, alpha=0.8)
    stamp(scene, stroke(scene, [(0.1, 0.982), (0.9, 0.982)], 0.014), grey, grain=0.15, scale=25, alpha=0.3)
    frames = [box(scene, (0.4975, 0.505), 0.945 + w, 0.89 + w, radius=0.045 + w / 2)
              for w in (0.022, 0.014, -0.012, -0.02)]
    stamp(scene, minus(frames[0], frames[3]), grey, grain=0, alpha=0.22)
    rims = union(minus(frames[0], frames[1]), minus(frames[2], frames[3]))
    stamp(scene, union(rims, strokes(scene, walls, 0.0095)), grey, grain=0.2, scale=20, alpha=0.6)
    stamp(scene, strokes(scene, [[joint - (0, 0.012), joint + (0, 0.012)] for joint in joints], 0.02), grey, alpha=0.6)

    count, order = np.ones(15, int), rng.permutation(15)                             # a fault hits the first of `order`
    for cell, off in zip(order, PINS_OFF.get(fault, [])):
        count[cell] += off
    for cell in range(15):
        row, column = divmod(cell, 5)
        low, high = np.array((COLUMNS[column], ROWS[row])), np.array((COLUMNS[column + 1], ROWS[row + 1]))
        taken, here = [], fault if cell == order[0] else None
        pins = [pushpin(scene, low, high, taken, here) for _ in range(count[cell])]
        if not pins:
            scene.regions.append((fault, box(scene, (low + high) / 2, 0.175, 0.28)))
        if len(pins) > 1:
            scene.regions.append((fault, union(*pins)))
        if here == "foreign_body":
            spot = (low + high) / 2 + rng.uniform(-0.05, 0.05, 2)
            thing = ellipse(scene, spot, *rng.uniform(0.02, 0.045, 2), wobble=0.25)
            stamp(scene, thing, rng.uniform(0.25, 0.75, 3) * (0.8, 0.8, 1), grain=0.2, bulge=0.5)
            scene.regions.append((fault, thing))


SPLICING_CONNECTORS = {
    "wrong_cable_colour": ("logical_anomalies", 0.7, True),
    "unequal_connectors": ("logical_anomalies", 0.4, True),
    "wrong_cable_location": ("logical_anomalies", 0.5, True),
    "extra_cable": ("logical_anomalies", 0.5, True),
    "missing_cable": ("logical_anomalies", 700, False),
    "missing_connector": ("logical_anomalies", 0.8, True),
    "reversed_connector": ("logical_anomalies", 0.8, True),
    "loose_cable": ("logical_anomalies", 0.5, True),
    "cut_cable": ("structural_anomalies", 1.0, True),
    "frayed_cable": ("structural_anomalies", 1.0, True),
    "open_lever": ("structural_anomalies", 1.0, True),
    "broken_connector": ("structural_anomalies", 1.0, True),
    "stain": ("structural_anomalies", 1.0, True),
}
CABLES = {2: (0.86, 0.68, 0.16), 3: (0.26, 0.32, 0.72), 5: (0.74, 0.13, 0.11)}       # colour by number of clamps
PITCH = 0.098                                                                        # of the clamps
ORANGE, COPPER = np.array((0.96, 0.31, 0.07)), np.array((0.72, 0.42, 0.22))


def mesh(scene):
    """Cuts the background into expanded metal: rounded wires where |cos u + cos v| is small, and between them staggered
    diamond holes."""
    n, rng = scene.side, scene.rng
    angle, k = rng.normal(0, 0.01), 2 * math.pi / (0.075 * n)
    c, s = k * math.cos(angle), k * math.sin(angle)
    x, y = np.arange(n, dtype=np.float32), np.arange(n, dtype=np.float32)[:, None]
    a, b = np.cos(c * x - s * y + rng.uniform(0, 6.3)), np.cos(s * x + c * y + rng.uniform(0, 6.3))     # (n, n) each
    wire = np.clip(1.2 - np.abs(a + b + 0.08) / 0.52, 0, 1)                          # 1 on a wire, 0 in a hole
    knot = np.square(np.square(np.square((a - b) / 2)))                              # 1 where wires meet: a glint
    scene.photo *= (0.06 + wire * (0.62 + 0.5 * knot * wire) * (1 + 0.25 * (a + b)))[..., None]


def connector(scene, place, clamps, used, fault):
    """A connector at place (centre, angle, side: 1 levers to the right, -1 left); the clamps in `used` {clamp: colour}
    show the cable. Returns its shape."""
    rng, (centre, angle, side) = scene.rng, place
    orange, hit, gone = ORANGE * rng.normal(1, 0.05), rng.integers(clamps), None

    def part(x, y, w, h):
        shape = polygon(scene, lying(slab(w, h) + (side * x, y), centre, angle, 0.5))
        return minus(shape, gone) if gone else shape

    whole = part(0, 0, 0.32, clamps * PITCH + 0.03)
    if fault == "broken_connector":                                                  # a corner or an end of it
        spot = (side * rng.uniform(-0.15, 0.12), rng.choice((-1, 1)) * clamps * PITCH / 2)
        gone = ellipse(scene, lying([spot], centre, angle, 0.5)[0], *rng.uniform(0.04, 0.07, 2), wobble=0.4)
        scene.regions.append((fault, common(whole, gone)))
    housing = part(-0.02, 0, 0.28, clamps * PITCH + 0.025)
    stamp(scene, housing, (0.62, 0.56, 0.54), grain=0.06, bulge=0.4, shadow=0.6, alpha=0.7)
    for clamp in range(clamps):
        y, lifted = (clamp - (clamps - 1) / 2) * PITCH, fault == "open_lever" and clamp == hit
        lever = part(0.14 if lifted else 0.055, y, 0.28 if lifted else 0.2, PITCH * 0.92)
        stamp(scene, part(-0.115, y, 0.05, 0.05), (0.78, 0.74, 0.73), grain=0.06, bulge=0.6, alpha=0.6)
        stamp(scene, lever, orange, grain=0.04, bulge=0.45, shadow=0.5)
        stamp(scene, part(-0.02, y - 0.006, 0.085, 0.045), (0.45, 0.35, 0.31), grain=0.25, bulge=0.4)
        stamp(scene, part(-0.03, y - 0.004, 0.045, 0.026), used.get(clamp, (0.55, 0.53, 0.52)), grain=0.2, alpha=0.6)
        if lifted:
            stamp(scene, part(0.03, y, 0.1, PITCH * 0.7), (0.16, 0.12, 0.11), grain=0.3)
            scene.regions.append((fault, lever))
    if fault == "stain":
        spot = (side * rng.uniform(-0.05, 0.13), rng.uniform(-0.5, 0.5) * (clamps - 0.6) * PITCH)
        blot = ellipse(scene, lying([spot], centre, angle, 0.5)[0], *rng.uniform(0.03, 0.06, 2), wobble=0.35)
        stamp(scene, soft(blot, 2), (0.13, 0.10, 0.07), grain=0.3, alpha=rng.uniform(0.7, 0.95))
        scene.regions.append((fault, blot))
    return whole


def cable_path(rng, places, clamps, rows):
    """(40, 2) points from clamp rows[0] of the left connector to clamp rows[1] of the right one, sagging a little."""
    start, end = [lying([(side * 0.14, (row - (n - 1) / 2) * PITCH)], centre, angle, 0.5)[0]
                  for (centre, angle, side), n, row in zip(places, clamps, rows)]
    t = np.linspace(0, 1, 40)[:, None]
    sag = rng.normal(0.02, 0.008) * np.sin(np.pi * t) + rng.normal(0, 0.008) * np.sin(2 * np.pi * t)
    return start + t * (end - start) + (0, 1) * sag


def cable(scene, path, colour, fault):
    rng, i = scene.rng, scene.rng.integers(10, 26)                                   # a fault sits at path[i]
    pieces = [path[:i], path[i + rng.integers(2, 5):] + (0, rng.normal(0, 0.015))] if fault == "cut_cable" else [path]
    for piece in pieces:
        stamp(scene, stroke(scene, piece, 0.025), colour, bulge=0.45, gloss=0.15, shadow=0.5)
    if fault == "frayed_cable":                                                      # bare strands stick out
        bare = path[i:i + rng.integers(4, 7)]
        for _ in range(8):
            strand = bare + np.sin(np.linspace(0, np.pi, len(bare)))[:, None] * rng.normal(0, (0.004, 0.016), 2)
            stamp(scene, stroke(scene, strand, 0.006), COPPER * rng.uniform(0.6, 1.2), grain=0.2)
    if fault in ("cut_cable", "frayed_cable"):
        scene.regions.append((fault, stroke(scene, path[i:i + 4], 0.05)))


def splicing_connectors(scene, fault=None):
    """Two connectors of 2, 3 or 5 clamps, the same on both sides, and their colour of cable between mirrored clamps."""
    rng = scene.rng
    scene.aim(0.006, 0.6, 0.008)
    background(scene, np.array((0.76, 0.72, 0.70)) * rng.normal(1, 0.04), grain=0.12, scale=6, blotch=0.05)
    mesh(scene)
    n, hit = int(rng.choice((2, 3, 5))), rng.integers(2)                             # hit: the side with the fault
    (row, other), odd = rng.permutation(n)[:2], int(rng.choice([m for m in CABLES if m != n]))
    places = [((0.19 + rng.normal(0, 0.008), 0.48 + rng.normal(0, 0.012)), rng.normal(0, 1.5), 1),
              ((0.80 + rng.normal(0, 0.008), 0.50 + rng.normal(0, 0.012)), rng.normal(0, 1.5), -1)]
    clamps, cables, colour = [n, n], [(row, row)], np.array(CABLES[n]) * rng.normal(1, 0.08)
    if fault == "wrong_cable_colour":
        colour = np.array(CABLES[odd]) * rng.normal(1, 0.08)
    if fault == "unequal_connectors":
        clamps[hit] = odd
        cables = [(min(row, odd - 1),) * 2]
    if fault == "wrong_cable_location":
        cables = [(row, other)]
    if fault == "extra_cable":
        cables.append((other, other))

    paths = [cable_path(rng, places, clamps, rows) for rows in cables]
    shape = reduce(union, [stroke(scene, path, 0.025) for path in paths])
    if fault in ("wrong_cable_colour", "wrong_cable_location", "extra_cable"):
        scene.regions.append((fault, shape))
    if fault == "missing_cable":
        scene.regions.append((fault, stroke(scene, paths.pop(), 0.06)))
        cables = []
    if fault == "loose_cable":                                                       # it ends short of the connector
        gap = np.arange(30, 40) if hit else np.arange(10)
        scene.regions.append((fault, stroke(scene, paths[0][gap], 0.05)))
        paths[0] = np.delete(paths[0], gap, axis=0)
    if fault == "reversed_connector":
        places[hit] = (*places[hit][:2], -places[hit][2])
    for path in paths:
        cable(scene, path, colour, fault)
    bodies = []
    for side in (0, 1):
        if fault == "missing_connector" and side == hit:
            bodies.append(polygon(scene, lying(slab(0.32, n * PITCH + 0.03), *places[side][:2], 0.5)))
            continue
        used = {rows[side]: colour for rows in cables}
        bodies.append(connector(scene, places[side], clamps[side], used, fault if side == hit else None))
    if fault in ("missing_connector", "reversed_connector"):
        scene.regions.append((fault, bodies[hit]))
    if fault == "unequal_connectors":
        scene.regions.append((fault, union(*bodies)))


SCREW_BAG = {
    "missing_washer": ("logical_anomalies", 220, False),
    "additional_washer": ("logical_anomalies", 220, False),
    "missing_nut": ("logical_anomalies", 260, False),
    "additional_nut": ("logical_anomalies", 260, False),
    "missing_long_bolt": ("logical_anomalies", 800, False),
    "missing_short_bolt": ("logical_anomalies", 550, False),
    "additional_bolt": ("logical_anomalies", 550, False),
    "two_long_bolts": ("logical_anomalies", 800, False),
    "two_short_bolts": ("logical_anomalies", 550, False),
    "broken_part": ("structural_anomalies", 1.0, True),
    "rusty_part": ("structural_anomalies", 1.0, True),
    "wrong_thread_colour": ("structural_anomalies", 1.0, True),
    "torn_bag": ("structural_anomalies", 1.0, True),
    "stained_bag": ("structural_anomalies", 1.0, True),
}
KINDS = ["long_bolt", "short_bolt", "washer", "nut"]
# fault: (part out, part in)
SWAPS = {"missing_washer": ("washer", None), "additional_washer": (None, "washer"), "missing_nut": ("nut", None),
         "additional_nut": (None, "nut"), "missing_long_bolt": ("long_bolt", None),
         "missing_short_bolt": ("short_bolt", None), "additional_bolt": (None, "short_bolt"),
         "two_long_bolts": ("short_bolt", "long_bolt"), "two_short_bolts": ("long_bolt", "short_bolt")}
SHANK = {"long_bolt": 0.36, "short_bolt": 0.20}                                      # length in heights of the photo
ROUND = {"washer": (CIRCLE * 0.062, CIRCLE * 0.042), "nut": (CIRCLE[::10] * 0.064, CIRCLE * 0.032)}     # outline, bore
THREADS = [(0.75, 0.50, 0.12), (0.10, 0.10, 0.11), (0.62, 0.28, 0.16)]               # brass, black, copper
DIRT = [(0.36, 0.21, 0.08), (0.42, 0.10, 0.08), (0.10, 0.28, 0.36)]


def room_for(rng, kind, taken):
    """Centre and angle of a part in the middle of the bag, clear of the others or as clear as 60 tries find.
    taken: list of (x, y, half width) of points along the parts that lie there already."""
    half, width = (SHANK[kind] / 2 + 0.025, 0.04) if kind in SHANK else (0, 0.05)
    spine, others, tries = np.linspace((-half, 0), (half, 0), 9), np.array(taken).reshape(-1, 3), []
    for _ in range(60):
        centre, angle = rng.uniform((0.19, 0.25), (0.67, 0.73)), rng.uniform(0, 360)
        points = lying(spine, centre, angle, 0.69)                                                     # (9, 2)
        apart = np.linalg.norm((points[:, None] - others[:, :2]) / (0.69, 1), axis=2) - others[:, 2] - width
        gap = min((points - (0.13, 0.17)).min(), ((0.73, 0.81) - points).min(), apart.min(initial=1))
        tries.append((gap, centre, angle, points))
        if gap > 0:
            break
    _, centre, angle, points = max(tries, key=lambda one: one[0])
    taken.extend((x, y, width) for x, y in points)
    return centre, angle


def hardware(scene, kind, centre, angle, fault):
    """A bolt, washer or nut. Returns its shape."""
    rng, gone = scene.rng, None
    put = partial(lying, centre=centre, angle=angle, squeeze=0.69)

    def part(outline, bore=None):
        shape = polygon(scene, put(outline))
        if bore is not None:
            shape = minus(shape, polygon(scene, put(bore)))
        return minus(shape, gone) if gone else shape

    def silhouette():
        return union(part(head), part(shank)) if end else part(*ROUND[kind])

    zinc, steel = np.array((0.66, 0.70, 0.74)) * rng.normal(1, 0.03), np.array((0.66, 0.66, 0.56)) * rng.normal(1, 0.03)
    end = SHANK.get(kind, 0) / 2
    head, shank = slab(0.05, 0.088) - (end, 0), slab(2 * end, 0.042)
    if fault == "broken_part":
        cut = rng.uniform(0.0, 0.1) - end if end else rng.uniform(-0.02, 0.02)
        jags = [(cut + rng.uniform(-0.015, 0.015), y) for y in (-0.06, -0.02, 0.02, 0.06)]
        whole, gone = silhouette(), part(jags + [(-0.3, 0.06), (-0.3, -0.06)])
        scene.regions.append((fault, common(whole, gone)))
    shape = silhouette()
    if end:
        if fault == "wrong_thread_colour":
            steel = np.array(THREADS[rng.integers(3)])
            scene.regions.append((fault, part(shank)))
        n = int(end / 0.0035)
        thread = np.stack([np.linspace(0.03 - end, end, n), np.where(np.arange(n) % 2, 0.03, -0.03)], 1)
        stamp(scene, part(shank), steel, grain=0.1, bulge=0.6, gloss=0.3, shadow=0.4)
        stamp(scene, common(stroke(scene, put(thread), 0.004), part(shank)), steel * 0.35, grain=0, alpha=0.5)
        stamp(scene, part(head), zinc * 1.1, grain=0.05, bulge=0.6, gloss=0.3, shadow=0.4)
        for y, tone in ((-0.018, 1.5), (0.012, 0.4)):                                # the round head mirrors the lamps
            band = stroke(scene, put([(-end - 0.03, y), (0.03 - end, y)]), 0.013)
            stamp(scene, common(band, part(head)), zinc * tone, grain=0, alpha=0.6)
    else:
        stamp(scene, shape, zinc, grain=0.1, bulge=0.8, gloss=0.35, shadow=0.4)
        detail = stroke(scene, put([(0.034, 0), (0.054, 0.006)]), 0.006)             # a spring washer's gap
        if kind == "nut":
            detail = part(ROUND[kind][1] * 1.25, ROUND[kind][1])                     # the thread inside
        stamp(scene, common(detail, shape), zinc * 0.4, grain=0.1, alpha=0.75)
    if fault == "rusty_part":
        rust = common(shape, ellipse(scene, centre, 0.09, 0.09, wobble=0.4))
        stamp(scene, rust, (0.42, 0.20, 0.08), grain=0.35, scale=7, alpha=rng.uniform(0.7, 0.95))
        scene.regions.append((fault, rust))
    return shape


def bag(scene):
    """A clear bag with its folds, zip and print."""
    rng, n = scene.rng, scene.side
    corners = np.array([(0.07, 0.09), (0.925, 0.12), (0.925, 0.90), (0.065, 0.87)]) + rng.normal(0, 0.006, (4, 2))
    film = polygon(scene, corners)
    folds = np.tanh(2.5 * noise(rng, n, n, n / 4.5) + 0.6 * noise(rng, n, n, n / 14))
    stamp(scene, film, (0.08, 0.08, 0.095), grain=0)
    stamp(scene, common(film, Image.fromarray(np.uint8(127 + 127 * folds))), (0.12, 0.118, 0.115), grain=0.03)
    for corner in corners[[0, 0, 1, 2, 3, 3]]:                                       # creases run in from the corners
        end = rng.uniform(0.25, 0.7, 2)
        crease = curve(corner, (corner + end) / 2 + rng.normal(0, 0.06, 2), end)
        crease = common(film, stroke(scene, crease, rng.uniform(0.004, 0.012)))
        stamp(scene, crease, (0.45, 0.44, 0.42), grain=0, alpha=rng.uniform(0.05, 0.2))
    rim = np.linspace(corners, np.roll(corners, -1, 0), 12, axis=1) + rng.normal(0, 0.001, (4, 12, 2))
    stamp(scene, strokes(scene, rim, 0.005), (0.40, 0.39, 0.38), grain=0, alpha=0.5)
    stamp(scene, stroke(scene, [(0.782, 0.115), (0.786, 0.89)], 0.016), (0.62, 0.62, 0.64), bulge=0.6, alpha=0.6)
    marks = [[(0.835, 0), (0.885, -0.035), (0.885, 0.035), (0.835, 0)], [(0.86, 0.06), (0.86, 0.088)],
             [(0.817, -0.025), (0.817, 0.03)]]                                       # the recycling sign, over and over
    marks = [mark + np.array((0, y)) for y in np.arange(rng.uniform(-0.1, 0.05), 1, 0.152) for mark in marks]
    stamp(scene, common(strokes(scene, marks, 0.008), film), (0.85, 0.85, 0.85), grain=0.1)


def screw_bag(scene, fault=None):
    """A clear bag with two washers, two nuts, a long and a short bolt in any pose."""
    rng = scene.rng
    scene.aim(0.01, 1.0, 0.012)
    background(scene, (0.03, 0.03, 0.032), grain=0.1, blotch=0.1)
    bag(scene)
    out, added = SWAPS.get(fault, (None, None))
    count = {"long_bolt": 1, "short_bolt": 1, "washer": 2, "nut": 2}
    parts = [kind for kind in KINDS for _ in range(count[kind] - (kind == out) + (kind == added))]
    hit, taken, shapes = rng.integers(2 if fault == "wrong_thread_colour" else len(parts)), [], []
    for i, kind in enumerate(parts):
        shapes.append(hardware(scene, kind, *room_for(rng, kind, taken), fault if i == hit else None))
    if added:
        scene.regions.append((fault, reduce(union, [shape for shape, kind in zip(shapes, parts) if kind == added])))
    elif out:
        scene.regions.append((fault, polygon(scene, [(0.09, 0.11), (0.76, 0.13), (0.76, 0.87), (0.09, 0.85)])))
    if fault in ("torn_bag", "stained_bag"):
        outline = CIRCLE[::6] * rng.uniform(0.5, 1.2, (10, 1)) * rng.uniform(0.032, 0.06, 2)
        centre = rng.uniform((0.14, 0.17), (0.7, 0.8))
        spot, hole = polygon(scene, outline + centre), polygon(scene, outline * 0.75 + centre)
        if fault == "torn_bag":                                                      # the torn film curls up, white
            spot, hole = [minus(shape, reduce(union, shapes)) for shape in (spot, hole)]
            stamp(scene, spot, (0.62, 0.61, 0.60), grain=0.25)
            stamp(scene, hole, (0.025, 0.025, 0.027))
        else:
            stamp(scene, soft(spot, 2), DIRT[rng.integers(3)], grain=0.25, alpha=rng.uniform(0.55, 0.9))
        scene.regions.append((fault, spot))
