"""EfficientAD-S, Batzner et al. 2024, and PUAD, Sugawara and Imamura 2024.

The student learns to predict the features of the frozen teacher (our PDN), each from the same 33
pixels. The autoencoder learns to predict them from 64 numbers for the whole photo. The student's
second half learns to predict the autoencoder's output. Where student and teacher differ, a part is
broken; where student and autoencoder differ, the arrangement is wrong. PUAD adds how far the
photo's mean feature is from the training photos'.

Cut, so that two cores suffice: the penalty on ImageNet's photos (there are none here) and the
colour jitter of the autoencoder's input, so the teacher's features are computed once. The
autoencoder has one convolution and three upsamplings less, 3x3 kernels, and one dropout more; the
optimiser is AdamW, not Adam. A step shows the student one of 3x3 tiles of two photos, not one whole
photo. The PDN pads nothing, so a student's output for a tile at a multiple of 4 pixels is its
output for the photo there. Steps: until the validation loss has settled, or until the student has
seen as much as in the paper's 70,000."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import CHANNELS, STRIDE, build_pdn, look as see, positions
from eval import standardise
from scores import distances, whitening
from bench.rival import Photos, Plan, as_input, fit, megabytes, milliseconds

PLAN = Plan(steps=70_000 * 9 // 2, every=500, batch=2, lr=1e-4, weight_decay=1e-5)
CROP = 96                               # pixels
LATENT = 64                             # numbers that the autoencoder keeps of a photo
HARD = 1000                             # one value in so many, the worst, is learned from
LOW, HIGH = 0.9, 0.995                  # quantiles of the validation maps that become 0 and 0.1


class Autoencoder(nn.Sequential):
    """(B, 3, S, S) -> (B, d0, P, P)."""

    def __init__(self, side: int):
        def down(channels, to):
            return [nn.Conv2d(channels, to, 4, 2, 1), nn.ReLU()]

        def up(size):
            return [nn.Upsample((size, size), mode="bilinear"),
                    nn.Conv2d(LATENT, LATENT, 3, padding=1), nn.ReLU(), nn.Dropout(0.2)]

        super().__init__(*down(3, 32), *down(32, 32), *down(32, 64), *down(64, 64),
                         nn.AdaptiveAvgPool2d(8), nn.Conv2d(64, LATENT, 8), *up(3), *up(8),
                         *up(max(1, side // 2)), *up(side),
                         nn.Conv2d(LATENT, CHANNELS, 3, padding=1))


def build_student(width: float) -> nn.Sequential:
    """A PDN small with `width` times its channels inside; half of what it gives is for the teacher,
    half for the autoencoder."""
    student, sizes = build_pdn("small"), [3, *(int(width * n) for n in (128, 256, 256))]
    layers = [i for i, layer in enumerate(student) if isinstance(layer, nn.Conv2d)]
    for i, channels, to in zip(layers, sizes, [*sizes[1:], 2 * CHANNELS]):
        student[i] = nn.Conv2d(channels, to, student[i].kernel_size)
    return student


class EfficientAD(nn.Module):
    def __init__(self, image_size: int, width: float = 1):
        super().__init__()
        self.student = build_student(width)
        self.autoencoder = Autoencoder(positions(image_size))

    def loss(self, x, teacher, rng):
        """x (B, 3, S, S), teacher (B, d0, P, P)."""
        size = min(CROP, x.shape[-1])
        side, most = positions(size), teacher.shape[-1]
        tiles = -(-most // side)                     # a side; together they cover the photo
        top, left = (int(torch.randint(tiles, (), generator=rng)) * (most - side)
                     // max(1, tiles - 1) for _ in range(2))
        crop = x[..., STRIDE * top:STRIDE * top + size, STRIDE * left:STRIDE * left + size]
        here = (..., slice(top, top + side), slice(left, left + side))
        local, wide = self.student(crop).chunk(2, 1)
        rebuilt = self.autoencoder(x)
        return (hardest(teacher[here] - local) + F.mse_loss(rebuilt, teacher)
                + F.mse_loss(wide, rebuilt[here]))

    def look(self, x, teacher):
        """-> local and global map (B, P, P), PUAD's vector (B, d0): the student's mean, and the
        autoencoder's error (B,)."""
        (local, wide), rebuilt = self.student(x).chunk(2, 1), self.autoencoder(x)
        return ((teacher - local).square().mean(1), (rebuilt - wide).square().mean(1),
                local.mean((2, 3)), (teacher - rebuilt).square().mean((1, 2, 3)))


def hardest(difference: torch.Tensor) -> torch.Tensor:
    """The mean of the largest squares, one in HARD."""
    squares = difference.square().flatten()
    return squares.topk(max(1, len(squares) // HARD)).values.mean()


def quantiles(maps: torch.Tensor) -> list[float]:
    """maps (n, P, P) of the validation photos -> what becomes 0 and what becomes 0.1."""
    return torch.quantile(maps.double().flatten(), torch.tensor([LOW, HIGH]).double()).tolist()


def photo_scores(local, wide, of_local, of_wide) -> torch.Tensor:
    """Maps (B, P, P), `quantiles` of each -> (B,) the largest value of their mean."""
    maps = [0.1 * (m - low) / max(high - low, 1e-12)
            for m, (low, high) in ((local, of_local), (wide, of_wide))]
    return ((maps[0] + maps[1]) / 2).flatten(1).amax(1)


def shrinkage(x: torch.Tensor) -> float:
    """x (n, d) -> by what share Ledoit and Wolf 2004 shrink the covariance of its rows towards a
    multiple of the identity: with fewer photos than channels the plain one has no inverse."""
    x = x.double() - x.double().mean(0)
    covariance = x.T @ x / len(x)
    size = covariance.square().sum()
    off = size - covariance.trace().square() / x.shape[1]
    noise = (x.square().sum(1).square().mean() - size) / len(x)
    return float((noise / off).clamp(0, 1)) if off > 1e-12 * size else 1.0


def run(photos: Photos, steps: int | None = None, width: float = 1, name="efficientad") -> dict:
    """-> what bench/baselines.py keeps of both methods."""
    torch.manual_seed(photos.seed)
    model = EfficientAD(photos.size, width).to(photos.device, memory_format=torch.channels_last)
    features, side, first = photos.everywhere, positions(photos.size), len(photos.validation)

    def square(h0):                                  # (B, P * P, d0) -> (B, d0, P, P)
        return h0.transpose(1, 2).unflatten(2, (side, side))

    def teacher(index):
        return square(features.h0(index))

    def look_at(index):
        found = [model.look(photos.images(some), teacher(some)) for some in index.split(8)]
        return [torch.cat(part).cpu() for part in zip(*found)]

    def scores_of(local, wide):
        normal = quantiles(local[:first]), quantiles(wide[:first])
        return photo_scores(local, wide, *normal), normal

    def look():
        local, wide, _, rebuilt = look_at(photos.scored)
        # All three: the global map alone grows while the autoencoder learns.
        loss = sum(float(part[:first].mean()) for part in (local, wide, rebuilt))
        return loss, {"aurocs": photos.aurocs(scores_of(local, wide)[0].tolist())}

    def loss(batch, rng):
        return model.loss(photos.images(batch), teacher(batch), rng)

    trained = fit(photos, name, model, PLAN, loss, look, steps)
    with torch.inference_mode():
        local, wide, vectors, _ = look_at(photos.scored)
        normals = look_at(photos.train)[2]
    efficientad, normal = scores_of(local, wide)
    far = distances(vectors[:, None], whitening(normals[:, None], shrinkage(normals)))[:, 0].sqrt()
    puad = sum(standardise(part.numpy(), part[:first].numpy()) for part in (efficientad, far))
    pdn = photos.ladmim.pdn

    def judge(images):
        seen = see(pdn, images, side, False, photos.device, photos.ladmim.cfg.precision)
        h0 = (seen.float() - features.mean) / features.std
        local, wide, *_ = model.look(as_input(images, photos.device), square(h0))
        return photo_scores(local, wide, *normal)

    return {"scores": {"EfficientAD-S": efficientad.tolist(), "PUAD": puad.tolist()}, **trained,
            "image": milliseconds(judge, photos), "megabytes": megabytes(pdn, model)}
