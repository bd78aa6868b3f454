"""Distillation of the backbone: a PDN learns to predict teachers' features where it looks.

    python weights/distill.py --images DIR_OR_TAR... --teacher TEACHER... --out FILE

weights/README.md says how the shipped weights were made. The learning rate is constant, then falls
to 0 within --decay steps, so the end need not be known in advance. FILE.part holds the constant
part, so that a larger --steps goes on from there."""
import hashlib
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import runs  # noqa: E402
from backbone import CHANNELS, STRIDE, build_pdn, imagenet, load_pdn, positions  # noqa: E402
from data import InputError  # noqa: E402
from weights.teachers import (CROP, INNER, Corpus, as_photo, linear_fit,  # noqa: E402
                              load_teacher, look)

WINDOW = 125                           # pixels a side that the student learns from
SIDE, SEEN = positions(CROP), positions(WINDOW)      # 48 and 24 positions a side
EDGE = INNER.start
FIRST = 512                            # crops that the first step chooses from
MEASURED = 400                         # crops that the target is standardised on
WARM_UP = 200                          # steps


# Target

def check_shares(shares: list[int] | None, channels: list[int]) -> list[int]:
    """How many of the student's channels each teacher map gets; equal parts by default."""
    count = len(channels)
    if shares is None:
        return [CHANNELS * (n + 1) // count - CHANNELS * n // count for n in range(count)]
    if len(shares) != count or sum(shares) != CHANNELS or min(shares) < 0:
        raise InputError(f"--shares {' '.join(map(str, shares))}: must be {count} numbers from 0 "
                         f"up that sum to {CHANNELS}, one for each teacher map; these have "
                         f"{', '.join(map(str, channels))} channels")
    return shares


def fit_target(seen: list[torch.Tensor], shares: list[int]) -> list[list[torch.Tensor]]:
    """seen: of each map the channels at n positions, (n, c). -> for each a matrix (c, share) and an
    offset (share,). Channels are standardised, rotated at random into their share (unless it has as
    many channels), and standardised again."""
    target = []
    for number, (x, share) in enumerate(zip(seen, shares)):
        mean, std, c = x.mean(0), x.std(0).clamp(min=1e-6), x.shape[1]
        matrix, size = torch.eye(c), max(c, share)
        if share != c:
            square = torch.randn(size, size, generator=runs.seeded("projection", number))
            matrix = torch.linalg.qr(square)[0][:c, :share]
        matrix = matrix / std[:, None]
        matrix = matrix / ((x - mean) @ matrix).square().mean(0).sqrt().clamp(min=1e-6)
        target.append([matrix, -mean @ matrix])
    return target


def target_of(target: list, maps: list[torch.Tensor]) -> torch.Tensor:
    """maps (B, c, P, P) each -> what the student shall predict, (B, 384, P, P)."""
    return torch.cat([torch.einsum("bchw,cs->bshw", block, matrix.to(block))
                      + offset.to(block)[:, None, None]
                      for block, (matrix, offset) in zip(maps, target)], 1)


@torch.no_grad()
def prepare(student: nn.Module, corpus: Corpus, teachers: list, args, device) -> list:
    """-> the target. A --start's last layer predicted another: it is fitted anew to its input."""
    maps, inputs, last = [], [], student[-1]         # of 9x9 positions of each crop
    for number in range(MEASURED):
        x = as_photo(corpus.crop(args.seed, -1 - number)).to(device)
        maps.append([block[0, :, ::5, ::5].flatten(1).T.cpu()
                     for block in look(teachers, x, args.precision)])
        if args.start:
            with runs.in_precision(args.precision, device):
                h = student[:-1](imagenet(x)).float()
            h = F.unfold(h[..., EDGE:-EDGE, EDGE:-EDGE], last.kernel_size, stride=5)
            inputs.append(h[0].T.cpu())                                       # (81, c * k * k)
    maps = [torch.cat(parts) for parts in zip(*maps)]
    target = fit_target(maps, args.shares)
    if args.start:
        y = torch.cat([x @ matrix + offset for x, (matrix, offset) in zip(maps, target)], 1)
        weight, bias = linear_fit(torch.cat(inputs), y, 0.01)
        last.weight.copy_(weight.T.reshape(last.weight.shape))
        last.bias.copy_(bias)
    return target


class Bank:
    """Crops and their targets: step s draws windows of crops s + 512 - size to s + 511. One file is
    their ring buffer; a crop is made when it is first drawn. The file is only a cache: a crop that
    is missing, or was made for another target, is made again, so that a resumed run learns from
    what an uninterrupted one would."""

    def __init__(self, file: Path, corpus: Corpus, teachers: list, target: list, args, device):
        self.corpus, self.teachers, self.target = corpus, teachers, target
        self.args, self.device = args, device
        key = hashlib.blake2b(repr((args.images, corpus.sizes, args.precision,
                                     args.seed)).encode(), digest_size=8)
        key.update(b"".join(part.numpy().tobytes() for block in target for part in block))
        self.key, side = key.hexdigest().encode(), SIDE - 2 * EDGE
        row = np.dtype([("key", "S16"), ("number", "i8"), ("photo", "u1", (CROP, CROP, 3)),
                        ("target", "f2", (side, side, CHANNELS))])
        count = min(args.bank, FIRST + args.steps + args.decay)
        if file.exists() and file.stat().st_size % row.itemsize:
            raise InputError(f"{file}: holds no crops of this command; delete it or name another "
                             "--out")
        try:
            with open(file, "ab") as opened:         # all of it now: a full disk is found here
                os.posix_fallocate(opened.fileno(), 0, count * row.itemsize)
        except OSError as error:
            raise InputError(f"--bank {args.bank}: {count * row.itemsize / 1e9:.1f} GB cannot be "
                             f"kept in {file} ({error.strerror}); choose a smaller one") from None
        self.rows = np.memmap(file, row, "r+", shape=(count,))

    def row(self, number: int):
        row = self.rows[number % self.args.bank]
        if row["key"] != self.key or row["number"] != number:
            row["key"] = b""                         # a kill from here on leaves no half row
            crop = self.corpus.crop(self.args.seed, number)
            maps = look(self.teachers, as_photo(crop).to(self.device), self.args.precision)
            target = target_of(self.target, maps)[0].permute(1, 2, 0)
            row["photo"], row["target"] = crop, target.half().cpu().numpy()
            row["number"], row["key"] = number, self.key
        return row

    def windows(self, step: int):
        """-> photos (B, 3, 125, 125) in [0, 1], targets (B, 384, 24, 24), each of another crop."""
        generator, newest = runs.seeded(self.args.seed, "windows", step), FIRST + step
        back = torch.randperm(min(newest, self.args.bank), generator=generator)[:self.args.batch]
        corners = torch.randint(SIDE - 2 * EDGE - SEEN + 1, (len(back), 2), generator=generator)
        photos, targets = [], []
        for number, (i, j) in zip((newest - 1 - back).tolist(), corners.tolist()):
            row, y, x = self.row(number), STRIDE * (i + EDGE), STRIDE * (j + EDGE)
            photos.append(row["photo"][y:y + WINDOW, x:x + WINDOW])
            targets.append(row["target"][i:i + SEEN, j:j + SEEN])
        photos, targets = (torch.from_numpy(np.stack(part)).to(self.device).permute(0, 3, 1, 2)
                           for part in (photos, targets))
        return photos.float().div_(255), targets.float()


# Learning

@torch.no_grad()
def explained_variance(student: nn.Module, teachers: list, target: list, held_out: torch.Tensor,
                       device, precision: str) -> list[tuple[float, str]]:
    """1 - squared error / variance, over photos (n, 3, 224, 224) that the student never saw -> per
    map (share, name)."""
    error = total = square = 0
    for x in held_out.split(4):
        x = x.to(device)
        truth = target_of(target, look(teachers, x, precision)).double()
        with runs.in_precision(precision, device):
            guess = student(imagenet(x))[..., INNER, INNER]
        error = error + (guess - truth).square().sum((0, 2, 3))
        total, square = total + truth.sum((0, 2, 3)), square + truth.square().sum((0, 2, 3))
    total = square - total.square() / (len(held_out) * truth[0, 0].numel())
    sizes = [matrix.shape[1] for matrix, _ in target]
    parts = enumerate(zip(error.split(sizes), total.split(sizes)), 1)
    return [(1 - float(e.sum() / t.sum()), f"teacher map {n}, {len(e)} of {len(error)} channels")
            for n, (e, t) in parts if len(e)]


def check(args):
    for option in ("steps", "decay", "batch", "bank", "lr", "seed"):
        value = getattr(args, option)
        if not 0 <= value < 2**31 or (value == 0 and option not in ("steps", "seed")):
            raise InputError(f"--{option} {value}: must be above 0 (steps, seed: or 0), below 2^31")
    if args.batch > min(args.bank, FIRST):
        raise InputError(f"--batch {args.batch}: must be at most {FIRST}, and at most --bank")
    if args.size and args.start:
        raise InputError(f"--size {args.size}: does nothing beside --start, which has its own; "
                         "leave it out")
    if args.out.exists() and not args.out.with_name(f"{args.out.name}.sha256").exists():
        raise InputError(f"--out {args.out}: is not this command's; name another file")
    args.size = args.size or "small"
    args.out.parent.mkdir(parents=True, exist_ok=True)


def begin(args, part: Path, corpus: Corpus, teachers: list, device):
    """-> student, optimiser and state, as a stopped distillation left them in `part` or new."""
    names = ("images", "teacher", "shares", "size", "start", "batch", "bank", "lr", "precision",
             "seed")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"sizes": corpus.sizes, "teacher": [
        hashlib.sha256(Path(name).read_bytes()).hexdigest() if Path(name).is_file() else name
        for name in args.teacher]}
    torch.manual_seed(args.seed)
    student = load_pdn(args.start, args.seed, "--start")[0] if args.start else build_pdn(args.size)
    student = student.to(device, memory_format=torch.channels_last).requires_grad_(True)
    student[0].requires_grad_(not args.start)        # its gradient is a fifth of a step
    optimizer = torch.optim.Adam(student.parameters(), lr=args.lr, fused=True)
    if part.exists():
        state = runs.load_checkpoint(part)
        if state.get("settings") != settings:
            raise InputError(f"{part}: holds a distillation with other settings; delete it or "
                             "choose another --out")
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        state = {"format": runs.FORMAT, "settings": settings, "step": 0,
                 "target": prepare(student, corpus, teachers, args, device)}
    return student, optimizer, state


def write_weights(out: Path, student: nn.Module):
    """In half precision, and the SHA-256 beside it."""
    runs.save_tensors(out, {name: value.half().cpu().contiguous()
                            for name, value in student.state_dict().items()})
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    data.write_whole(out.with_name(f"{out.name}.sha256"), f"{digest}\n".encode())
    data.say(data.printable(f"weights: {out}"))


def distill(args) -> int:
    """Trains a PDN to predict teachers' features. Exit code 1: a photo could not be read."""
    check(args)
    device = runs.pick_device(args.device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    teachers = [load_teacher(name, device) for name in args.teacher]
    blank = torch.zeros(1, 3, CROP, CROP, device=device)
    args.shares = check_shares(args.shares, [block.shape[1] for block in look(teachers, blank,
                                                                             args.precision)])
    corpus = Corpus(args.images)
    held_out = corpus.measuring_crops()
    data.say(f"corpus: {len(corpus.learn)} photos to learn from, {len(held_out)} to measure; "
             f"teachers: {data.printable(', '.join(args.teacher))}; device: {device}")
    part, crops = (args.out.with_name(args.out.name + end) for end in (".part", ".bank"))
    student, optimizer, state = begin(args, part, corpus, teachers, device)
    first = state["step"]
    args.steps = max(args.steps, first)              # what is learned stays
    bank = Bank(crops, corpus, teachers, state["target"], args, device)

    last = args.steps + args.decay
    progress = runs.Progress("distilling", last, "steps", first)
    saved, running = time.monotonic(), None
    for step in range(first, last):
        x, truth = bank.windows(step)
        rate = min(1, (step + 1) / WARM_UP, (last - step) / args.decay)
        optimizer.param_groups[0]["lr"] = args.lr * rate
        with runs.in_precision(args.precision, device):
            guess = student(imagenet(x))
        loss = F.mse_loss(guess.float(), truth)
        due = time.monotonic() - saved > runs.SAVE_EVERY
        save = step == args.steps or (due and step < args.steps)
        if step % 20 == 0 or save or step + 1 == last:       # a look at the loss waits for the GPU
            now = float(loss.detach())
            running = now if running is None else 0.9 * running + 0.1 * now
            if not math.isfinite(running):
                raise InputError(f"distilling: the loss is {running} at step {step}; try a smaller "
                                 "--lr and another --out")
        if save:                                     # what has just given a finite loss
            state |= {"step": step, "student": student.state_dict(),
                      "optimizer": optimizer.state_dict()}
            runs.save_tensors(part, state)
            saved = time.monotonic()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, f"unexplained {running or 1:.3f}")

    student.eval().requires_grad_(False)
    write_weights(args.out, student)
    for share, line in explained_variance(student, teachers, state["target"], held_out, device,
                                          args.precision):
        data.say(f"{line}: explained variance {share:.3f}")
    crops.unlink(missing_ok=True)
    return 1 if corpus.bad else 0


def parse(argv):
    parser = data.Parser(prog="weights/distill.py",
                         description="Train a PDN backbone to predict teachers' features.")
    add = parser.add_argument
    add("--images", required=True, nargs="+", metavar="DIR_OR_TAR", help="photos of anything, "
        "thousands")
    add("--teacher", nargs="+", default=["efficientnet-lite0"], help="efficientnet-lite0 (default) "
        "or TorchScript files that map a batch to a list of (feature map, stride) or (.., centre)")
    add("--shares", nargs="+", type=int, metavar="N", help="how many of the 384 channels each "
        "teacher map gets (default: equal parts)")
    add("--out", required=True, type=Path, metavar="FILE", help="weights; FILE.part is what a "
        "larger --steps goes on from, FILE.bank holds crops until the end")
    add("--size", choices=("small", "medium"), help="default: small")
    add("--start", metavar="FILE", help="weights to start from (default: random); their first "
        "layer stays, their last is fitted anew")
    add("--steps", type=int, default=20_000, help="at a constant rate; 0: what FILE.part has had")
    add("--decay", type=int, default=600, help="further steps, in which the rate falls to 0")
    add("--batch", type=int, default=8, help="windows a step")
    add("--bank", type=int, default=4096, help="crops kept on disk, 1.5 MB each")
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
