"""What the options of `train` may be: settings that work together, and that do something."""
import argparse
import dataclasses
import os
import re
from pathlib import Path

from console import InputError

ROOT = Path(__file__).resolve().parent
SHIPPED = "weights/pdn_small.pt"       # this repository's own backbone, from wherever it is called


def seed_list(text: str) -> list[int]:
    """ "3", "0-4" or "0,3,7" -> the seeds."""
    seeds = {}
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + 1000:
            raise argparse.ArgumentTypeError(f"{text!r} is not a seed (0 or more), a range as in "
                                             "0-4 or a list as in 0,3,7")
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)


def count(text: str) -> int:
    """ "3" -> 3; no number below 1."""
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def chosen_settings(args, config_class) -> dict:
    """The settings that were typed. A file of weights has one name, however its path was typed.
    What lies in the working directory or below is named from there: all may be moved together."""
    typed = {field.name: getattr(args, field.name) for field in dataclasses.fields(config_class)}
    if typed["pdn"] not in (None, "random"):
        path = Path(os.path.realpath(typed["pdn"]))
        below = os.path.relpath(path)
        outside = below.startswith("..") or below in (SHIPPED, "random")     # another one
        typed["pdn"] = SHIPPED if path == ROOT / SHIPPED else str(path) if outside else below
    return {name: value for name, value in typed.items() if value is not None}


def check_typed(typed: dict, cfg):
    """Raises InputError for a typed setting that does nothing beside the others."""
    idle = {}                                        # setting -> why
    if cfg.tokenizer == "published":
        idle |= dict.fromkeys(("codebook", "code_dim"), "--tokenizer published")
    elif cfg.codebook == "gradient":
        idle["ema_decay"] = "--codebook gradient"
    if cfg.mask != "block":
        idle["train_block"] = f"--mask {cfg.mask}"   # scoring always uses blocks
    if cfg.mask == "checkerboard":
        idle["train_ratio"] = "--mask checkerboard"
    if cfg.tokenizer == "published" and not cfg.hvq_epochs:
        idle["hvq_dropout"] = "--hvq-epochs 0"       # in ladmim.HVQ it acts where codebooks start
    if cfg.hvq_drop_at * cfg.hvq_epochs > cfg.hvq_epochs - 1:        # no epoch is after it
        idle["hvq_drop"] = f"--hvq-drop-at {cfg.hvq_drop_at:g}"
    if cfg.mim_warmup >= cfg.mim_epochs:
        idle["mim_last_lr"] = f"--mim-warmup {cfg.mim_warmup} and --mim-epochs {cfg.mim_epochs}"
    for model, names in (
            ("hvq", "hvq_lr hvq_weight_decay hvq_clip hvq_drop hvq_drop_at commitment codebook "
                    "ema_decay"),
            ("mim", "mim_lr mim_last_lr mim_weight_decay mim_clip mim_warmup mim_dropout mim_batch "
                    "mask train_ratio train_block")):
        if not getattr(cfg, f"{model}_epochs"):
            idle |= dict.fromkeys(names.split(), f"--{model}-epochs 0")
    for name, value in typed.items():
        if name in idle:
            raise InputError(f"--{name.replace('_', '-')} {value}: does nothing beside "
                             f"{idle[name]}; leave it out")


def check_settings(cfg, options: dict, side: int):
    """Raises InputError for a setting that cannot work, naming its option. side: positions of the
    backbone's output at this image size."""
    def check(name: str, fine: bool, why: str):
        if not fine:
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: {why}")

    tokens = cfg.grid ** 2
    for name, value in dataclasses.asdict(cfg).items():
        if name in options:
            check(name, value in options[name], f"must be one of {', '.join(options[name])}")
        if isinstance(value, float):
            check(name, 0 <= value <= 10**6, "must be a number from 0 to 1000000")
        if isinstance(value, int):
            least = 0 if name.endswith("epochs") or name == "mim_warmup" else 1
            check(name, least <= value <= 10**6, f"must be from {least} to 1000000")
        if name.endswith(("_ratio", "_block")):
            check(name, 0 < value <= 1 and (name.endswith("_block") or round(value * tokens)),
                  f"a share of the {tokens} tokens, above 0 and at most 1; at least one token")
        if name.endswith("clip"):
            check(name, value > 0, "must be above 0: 0 would stop all learning")
        if name.endswith("dropout") or name == "ema_decay":
            check(name, value < 1, "must be below 1")
    for model in ("hvq", "mim"):
        fits = getattr(cfg, f"{model}_width") % getattr(cfg, f"{model}_heads") == 0
        check(f"{model}_heads", fits, f"must divide --{model}-width")
    check("codes", cfg.codes <= 2 ** 15, f"at most {2 ** 15}")
    check("grid", side >= cfg.grid and side % cfg.grid == 0,
          f"must divide the backbone's {max(side, 0)} positions at --image-size {cfg.image_size}")
    check("grid", cfg.mask != "checkerboard" or (cfg.grid >= 8 and cfg.grid % 4 == 0),
          "--mask checkerboard needs a multiple of 4, at least 8")
    check("mim_score", cfg.mim_score != "whitened" or cfg.target == "histogram",
          f"--target {cfg.target} has no histograms to measure; add --mim-score mean or deviations")
    check("mim_score", cfg.mim_score != "whitened" or cfg.levels * cfg.codes <= 512,
          "needs --levels times --codes at most 512 (a matrix a mask); choose fewer, or mean")
