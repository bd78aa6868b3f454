"""Every step the long way, for comparison: python bench/run.py --naive

Nothing is cached, shared or left out: photos are decoded and sent through the backbone whenever
they are needed, scoring goes one mask of one photo at a time, and histograms and nearest codes are
written as the equations read. What is not ours to improve is the same on both sides: attention is
PyTorch's, a training step works on a whole batch. tests/test_bench.py holds both sides to the same
losses, codebooks and scores.
"""
from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import backbone  # noqa: E402
import data  # noqa: E402
import ladmim  # noqa: E402
from runs import seeded  # noqa: E402
from twin.render import draw  # noqa: E402


# The long way

def features(detector, paths):
    """h0 (B, N, d0) as a training loop without a cache gets it: each photo decoded and resized, the
    backbone run, every step anew. Rounded to float16 only because our cache is, so that both sides
    see the same numbers."""
    size = detector.cfg.image_size
    images = torch.stack([torch.from_numpy(data.load_image(path, size)) for path in paths])
    images = images.to(detector.mean.device).permute(0, 3, 1, 2).contiguous().float() / 255
    with torch.no_grad():
        x = detector.plain_pdn(backbone.imagenet(images))
    h0 = F.avg_pool2d(x, x.shape[-1] // detector.cfg.grid).flatten(2).transpose(1, 2)
    return (h0.half().float() - detector.mean) / detector.std


def nearest_code(x, codebook):
    """All distances (T, K), then the smallest: the usual way of vector quantisation."""
    return torch.cdist(x, codebook).argmin(1), None


@torch.no_grad()
def count(hvq, psi, codes):
    """Code counts and EMA sums through a one-hot matrix, as the common VQ-VAE codebases have it."""
    for level in range(hvq.levels):
        index = codes[:, level].flatten()
        one_hot = F.one_hot(index, hvq.codebooks.shape[1]).float()                  # (T, K)
        hvq.used[level] += one_hot.sum(0)
        if hvq.ema:
            decay, counts, sums = hvq.ema_decay, hvq.ema_count[level], hvq.ema_sum[level]
            counts.copy_(decay * counts + (1 - decay) * one_hot.sum(0))
            sums.copy_(decay * sums + (1 - decay) * one_hot.T @ psi[level].flatten(0, 1))
            seen = counts > 1e-4
            hvq.codebooks[level][seen] = (sums / counts[:, None])[seen]


def hvq_loss(detector, paths):
    with (patch.object(ladmim, "nearest_code", nearest_code),
          patch.object(ladmim.HVQ, "count", count)):
        return detector.hvq.loss(features(detector, paths))


def histogram_l1(logits, codes, mask):
    """Equation 12 with one-hot codes. logits (B, L, K), codes (B, L, N), mask (B, N) -> (B,)."""
    one_hot = F.one_hot(codes, logits.shape[-1]).float() * mask[:, None, :, None]   # (B, L, N, K)
    q = one_hot.sum(2) / mask.sum(1)[:, None, None]
    return (logits.softmax(-1) - q).abs().sum((1, 2))


def vit(mim, h0, mask):
    """h0 (B, N, d0), mask (B, N) -> logits (B, L, K). Every block computes every token, the last
    one too."""
    x = torch.where(mask[..., None], mim.e, mim.embed(h0))
    x = torch.cat([mim.p.expand(len(x), 1, -1), x], 1) + mim.positions
    for block in mim.blocks:
        x = block(x)
    return mim.head(mim.norm(x)[:, 0]).unflatten(-1, (mim.levels, -1))


def mim_loss(detector, paths, mask):
    """mask (B, N): one a photo. The frozen tokenizer is asked for the codes in every step."""
    h0 = features(detector, paths)
    with torch.no_grad(), patch.object(ladmim, "nearest_code", nearest_code):
        codes = detector.hvq(h0)[1]
    return histogram_l1(vit(detector.mim, h0, mask), codes, mask).mean()


@torch.no_grad()
def score(detector, path, every_mask=True):
    """Mean feature error and mean L1 distance of one photo, mask by mask. every_mask: each mask is
    an evaluation pass of its own, from the photo's file on; otherwise decoding, backbone and
    tokenizer run once a photo."""
    distances, h0 = [], None
    for mask in detector.masks:
        if every_mask or h0 is None:
            h0 = features(detector, [path])
            with patch.object(ladmim, "nearest_code", nearest_code):
                rebuilt, codes = detector.hvq(h0)
        distances.append(histogram_l1(vit(detector.mim, h0, mask[None]), codes, mask[None]))
    return (h0 - rebuilt).square().mean(), torch.cat(distances).mean()


# Ours

def our_losses(detector, h0):
    """Training on cached features h0, codes and masks. -> for HVQ-Trans and for the ViT: the model,
    its loss, the inputs of a batch, the clip."""
    cfg, hvq, mim, m = detector.cfg, detector.hvq, detector.mim, detector.cfg.mim_batch
    with torch.no_grad():
        codes = hvq(h0[:m])[1].to(torch.int16)
    masks = ladmim.draw_masks(cfg, m, seeded(0), scoring=False)[:, None].to(h0.device)

    def equation12(h0, masks, codes):
        return ladmim.mim_error(mim, mim(h0, masks), h0, masks, codes).mean()

    return ((hvq, hvq.loss, (h0[:cfg.hvq_batch],), cfg.hvq_clip),
            (mim, equation12, (h0[:m], masks, codes), cfg.mim_clip))


def our_score(detector, paths):
    """Both means (B,) of photos that were never seen before: decoding and backbone included."""
    h0, _ = detector.look(np.stack(list(data.load_images(paths, detector.cfg.image_size))))
    errors = ladmim.errors(detector.hvq, detector.mim, detector.cfg, h0, detector.masks)
    return ladmim.squared_error(errors).mean(1), errors.l1.mean(1)


# Both

def make_detector(cfg, device, seed=0):
    """An untrained detector with the shipped backbone and moments like a training set's: time and
    agreement need no more."""
    torch.manual_seed(seed)
    pdn, _ = backbone.load_pdn(cfg.pdn, seed)
    hvq, mim = ladmim.HVQ(cfg, backbone.CHANNELS), ladmim.ViT(cfg, backbone.CHANNELS)
    mean, masks = torch.zeros(backbone.CHANNELS), ladmim.scoring_masks(cfg, seed, device)
    detector = ladmim.Detector(cfg, pdn.to(device, memory_format=torch.channels_last),
                               hvq.to(device), mim.to(device), mean.to(device),
                               mean.to(device) + 1, masks, {})
    detector.plain_pdn = backbone.load_pdn(cfg.pdn, seed)[0].to(device)
    return detector


def draw_photos(folder: Path, n: int, size: int) -> list[Path]:
    """n rendered photos of size x size pixels as PNG files."""
    paths = [folder / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        photo = draw("breakfast_box", "train", i, size, 1)[0]
        Image.fromarray(photo).save(path, compress_level=1)
    return paths


def step(model, loss, inputs, clip, fused):
    """One optimiser step as a function without arguments. fused: one kernel for all weights, as
    `ladmim.adamw` asks for."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=fused)
    batch = [0]                                      # this process has all of it
    return lambda: ladmim.descend(optimizer, loss(*inputs), batch, batch, clip)


def pairs(detector, paths):
    """-> the step's name: {the way's name: (photos, function)}, the way "ours" among them. paths:
    photos enough for a batch of each stage."""
    cfg, b, m = detector.cfg, detector.cfg.hvq_batch, detector.cfg.mim_batch
    slow = cfg.grid >= 24 and detector.mean.device.type == "cpu"
    scored = paths[:2 if slow else 8]
    hvq, mim = our_losses(detector, features(detector, paths))
    masks = mim[2][1][:, 0]
    long_hvq = detector.hvq, hvq_loss, (detector, paths[:b]), cfg.hvq_clip
    long_mim = detector.mim, mim_loss, (detector, paths[:m], masks), cfg.mim_clip
    return {
        "train HVQ-Trans": {"long way": (b, step(*long_hvq, fused=False)),
                            "ours": (b, step(*hvq, fused=True))},
        "train ViT": {"long way": (m, step(*long_mim, fused=False)),
                      "ours": (m, step(*mim, fused=True))},
        f"score, {len(detector.masks)} masks": {
            "long way": (1, lambda: score(detector, paths[0])),
            "long way, photo and tokens once": (
                1, lambda: score(detector, paths[0], every_mask=False)),
            "ours": (len(scored), lambda: our_score(detector, scored))},
        "of these: one photo": {
            "decoding": (1, lambda: data.load_image(paths[0], cfg.image_size)),
            "decoding, backbone": (1, lambda: features(detector, paths[:1]))}}
