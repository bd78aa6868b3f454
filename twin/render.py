"""Writes the rendered twin of MVTec LOCO as files, in exactly its layout.

    python twin/render.py --out DIR [--category all|NAME,NAME] [--train N ...] [--size] [--seed]"""
import argparse
import difflib
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from twin import breakfast_box, juice_bottle, pushpins, screw_bag, splicing_connectors  # noqa: E402
from twin.drawing import Scene, develop  # noqa: E402

SCENES = {"breakfast_box": breakfast_box, "juice_bottle": juice_bottle, "pushpins": pushpins,
          "screw_bag": screw_bag, "splicing_connectors": splicing_connectors}
COUNTS = {"train": 100, "validation": 30, "test_good": 40, "test_logical": 40,
          "test_structural": 40}             # photos by kind
FOLDERS = {"train": "train/good", "validation": "validation/good", "test_good": "test/good",
           "test_logical": "test/logical_anomalies", "test_structural": "test/structural_anomalies"}
RENDERED_MARK = "rendered.json"              # in a category folder: drawn, not photographed
# Fresh interpreters draw: a pool would fork the caller's threads or import its program again.
WORKER = ("import json, sys; sys.path.insert(0, sys.argv[1]); "
          "from twin.render import draw_share; draw_share(*json.loads(sys.argv[2]))")


def check_category(category: str):
    if category not in SCENES:
        near = difflib.get_close_matches(category, SCENES, 1) or SCENES
        raise ValueError(f"--category {category}: unknown; did you mean {' or '.join(near)}?")


def draw(category: str, kind: str, index: int, size: int, seed: int):
    """One photo of a kind of COUNTS -> uint8 (size, size, 3), its fault's regions, bool
    (size, size) each, and the fault or None. It depends on nothing but the arguments."""
    module = SCENES[category]
    faults = {"test_logical": module.LOGICAL, "test_structural": module.STRUCTURAL}
    faults = list(faults.get(kind, [None]))
    fault = faults[index % len(faults)]          # they take turns
    stream = zlib.crc32((category + FOLDERS[kind].replace("/", "")).encode())
    scene = Scene(np.random.default_rng([seed, stream, index]), 2 * size)
    module.paint(scene, fault)
    return *develop(scene, size), fault


def draw_share(folder: str, category: str, counts: dict[str, int], size: int, seed: int,
               share: int, shares: int):
    """Draws and writes every `shares`-th photo of a category, from number `share` on."""
    faults = [*SCENES[category].LOGICAL, *SCENES[category].STRUCTURAL]
    photos = [(kind, i) for kind, n in counts.items() for i in range(n)]
    for kind, i in photos[share::shares]:
        photo, regions, fault = draw(category, kind, i, size, seed)
        for k, region in enumerate(regions):
            truth = Path(folder, FOLDERS[kind].replace("test", "ground_truth"), f"{i:03}")
            truth.mkdir(parents=True, exist_ok=True)
            mask = Image.fromarray(region * np.uint8(255 - faults.index(fault)))
            mask.save(truth / f"{k:03}.png")
        Image.fromarray(photo).save(Path(folder, FOLDERS[kind], f"{i:03}.png"), compress_level=1)


def draw_all(*work):
    """draw_share(*work, ...) in a process for each core. Raises an OSError where one fails."""
    shares, workers = min(os.cpu_count() or 1, 16), []
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        for share in range(shares):
            command = [sys.executable, "-c", WORKER, str(ROOT), json.dumps([*work, share, shares])]
            workers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=alone))
        for worker in workers:
            lines = worker.communicate()[1].strip().split("\n")
            if worker.returncode:
                raise ChildProcessError(lines[-1] or f"exit code {worker.returncode}")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def defects_config(category: str, size: int) -> list[dict]:
    """LOCO's defects_config.json: a mask's pixel value and where its defect saturates."""
    config, module = [], SCENES[category]
    for name, threshold in (module.LOGICAL | dict.fromkeys(module.STRUCTURAL, 1.0)).items():
        relative = threshold <= 1
        if not relative:                     # pixels of a 256 px photo
            threshold = round(threshold * (size / 256) ** 2)
        config.append({"defect_name": name, "pixel_value": 255 - len(config),
                       "relative_saturation": relative, "saturation_threshold": threshold})
    return config


def render(out: Path, category: str, counts: dict[str, int] = COUNTS, size: int = 256,
           seed: int = 1):
    """Writes the rendered twin of one category, out/category, in MVTec LOCO's layout.

    counts: photos by kind; size: a photo's side in pixels. The same arguments give the same
    pixels. The folder appears once it is complete. Raises ValueError for an unknown category and
    OSError where it cannot be written, with a line that says why. The presets were tuned on seed 0;
    the default and the figures in bench/RESULTS.md are seed 1."""
    check_category(category)
    target = Path(out) / category
    mark = {"seed": seed, "size": size,
            "note": "drawn by LADMIM's twin/render.py, not photographed"}
    try:
        if target.exists():
            raise FileExistsError("it exists already")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{category}-", dir=out) as unfinished:
            folder = Path(unfinished, category)
            for kind in counts:
                (folder / FOLDERS[kind]).mkdir(parents=True)
            config = json.dumps(defects_config(category, size), indent=4)
            (folder / "defects_config.json").write_text(config)
            (folder / RENDERED_MARK).write_text(json.dumps(mark) + "\n")
            draw_all(str(folder), category, counts, size, seed)
            folder.rename(target)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{target} cannot be drawn: {reason}; name another folder") from None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def render_all(argv):
    """The command."""
    parser = Parser(prog="twin/render.py", description="Draws the rendered twin of MVTec LOCO.")
    parser.add_argument("--out", required=True, type=Path, help="will hold the category folders")
    parser.add_argument("--category", default="all", help=f"all, or some of {','.join(SCENES)}")
    for name, default in {**COUNTS, "size": 256, "seed": 1}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default,
                            help="default %(default)s")
    args = parser.parse_args(argv)
    counts = {kind: getattr(args, kind) for kind in COUNTS}
    if args.train < 2 or args.size < 64 or min(args.seed, *counts.values()) < 0:
        raise ValueError("--train must be at least 2, --size 64, --seed and the other counts 0")
    names = list(SCENES) if args.category == "all" else args.category.split(",")
    for name in names:
        check_category(name)
    for name in names:
        render(args.out, name, counts, args.size, args.seed)
        print(f"{name}: " + ", ".join(f"{kind} {n}" for kind, n in counts.items()), flush=True)


def main(argv=None) -> int:
    """The command's exit code; what goes wrong is one line."""
    try:
        render_all(argv)
        return 0
    except KeyboardInterrupt:
        code, line = 130, "\nstopped; nothing unfinished was left behind"
    except (OSError, ValueError) as error:
        code, line = 2, f"error: {error}"
        if getattr(error, "errno", None):        # standard output's: `render`'s have no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)     # else Python tries again at exit
            code = 141 if isinstance(error, BrokenPipeError) else 2
            line = f"error: standard output: cannot be written ({error.strerror})"
        # A name may hold line breaks, or bytes that are no UTF-8.
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
