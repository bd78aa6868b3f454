"""Every step the long way, for comparison: python bench/run.py --naive

Nothing is cached, shared or left out: photos are decoded and sent through the backbone whenever they are needed, scoring
goes one mask of one photo at a time, and histograms and nearest codes are written as the equations read. What is not ours
to improve is the same on both sides: attention is PyTorch's, a training step works on a whole batch. tests/test_bench.py
holds both sides to the same losses, codebooks and scores.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import ladmim


# The long way

def features(detector, paths):
    """h0 (B, N, d0) as a training loop without a cache gets it: each photo decoded and resized, the backbone run, every
    step anew. Rounded to float16 only because our cache is, so that both sides see the same numbers."""
    images = torch.stack([torch.from_numpy(data.load_image(path, detector.cfg.image_size)) for path in paths])
    x = ladmim.imagenet(images.to(detector.mean.device).permute(0, 3, 1, 2).contiguous().float() / 255)
    with torch.no_grad():
        x = detector.pdn(x)
    h0 = F.avg_pool2d(x, x.shape[-1] // detector.cfg.grid).flatten(2).transpose(1, 2)
    return (h0.half().float() - detector.mean) / detector.std


def nearest_code(x, codebook):
    """All distances (T, K), then the smallest: the usual way of vector quantisation."""
    return torch.cdist(x, codebook).argmin(1), None


def count(hvq, psi, codes, decay=0.99):
    """Code counts and EMA sums through a one-hot matrix (T, K), as the common VQ-VAE codebases have it."""
    with torch.no_grad():
        for level in range(hvq.levels):
            one_hot = F.one_hot(codes[:, level].flatten(), hvq.codebooks.shape[1]).float()        # (T, K)
            hvq.used[level] += one_hot.sum(0)
            if hvq.ema:
                hvq.ema_count[level] = decay * hvq.ema_count[level] + (1 - decay) * one_hot.sum(0)
                hvq.ema_sum[level] = decay * hvq.ema_sum[level] + (1 - decay) * one_hot.T @ psi[level].flatten(0, 1)
                seen = hvq.ema_count[level] > 1e-4
                hvq.codebooks[level][seen] = (hvq.ema_sum[level] / hvq.ema_count[level][:, None])[seen]


def hvq_loss(detector, paths):
    with patch.object(ladmim, "nearest_code", nearest_code), patch.object(ladmim.HVQ, "count", count):
        return detector.hvq.loss(features(detector, paths))


def histogram_l1(logits, codes, mask):
    """Equation 12, the histogram summed from one-hot codes. logits (B, L, K), codes (B, L, N), mask (B, N) -> (B,)."""
    one_hot = F.one_hot(codes, logits.shape[-1]).float() * mask[:, None, :, None]                 # (B, L, N, K)
    q = one_hot.sum(2) / mask.sum(1)[:, None, None]
    return (logits.softmax(-1) - q).abs().sum((1, 2))


def vit(mim, h0, mask):
    """h0 (B, N, d0), mask (B, N) -> logits (B, L, K). Every block computes every token, the last one too."""
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
    """Mean feature error and mean L1 distance of one photo, mask by mask. every_mask: each mask is an evaluation pass of its
    own, from the photo's file on; otherwise decoding, backbone and tokenizer run once a photo."""
    distances, h0 = [], None
    for mask in detector.masks:
        if every_mask or h0 is None:
            h0 = features(detector, [path])
            with patch.object(ladmim, "nearest_code", nearest_code):
                rebuilt, codes = detector.hvq(h0)
        distances.append(histogram_l1(vit(detector.mim, h0, mask[None]), codes, mask[None]))
    return (h0 - rebuilt).square().mean(), torch.cat(distances).mean()


# Ours

def our_score(detector, paths):
    """Both means (B,) of photos that were never seen before: decoding and backbone included."""
    images = torch.stack([torch.from_numpy(image) for image in data.load_images(paths, detector.cfg.image_size)])
    h0 = ladmim.extract(detector.pdn_fast, images.to(detector.mean.device), detector.cfg.grid).half().float()
    error, l1, _ = ladmim.errors(detector.hvq, detector.mim, detector.cfg, (h0 - detector.mean) / detector.std, detector.masks)
    return error.mean(1), l1.mean(1)


# Both

def make_detector(cfg, device, seed=0):
    """An untrained detector with the shipped backbone and moments like a training set's: time and agreement need no more."""
    torch.manual_seed(seed)
    cfg = dataclasses.replace(cfg, hvq_score="mean", mim_score="mean")
    pdn = ladmim.load_pdn(cfg.pdn, seed)[0].to(device)
    hvq, mim = ladmim.HVQ(cfg, 384).to(device), ladmim.ViT(cfg, 384).to(device)
    detector = ladmim.Detector(cfg, pdn, hvq, mim, torch.zeros(384, device=device), torch.ones(384, device=device),
                               ladmim.scoring_masks(cfg, seed, device), {})
    detector.pdn_fast = ladmim.load_pdn(cfg.pdn, seed)[0].to(device, memory_format=torch.channels_last)
    return detector


def draw_photos(folder: Path, n: int, size: int) -> list[Path]:
    """n rendered photos of size x size pixels as PNG files."""
    paths = [folder / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.fromarray(data.draw("breakfast_box", "train", i, size, 1)[0]).save(path, compress_level=1)
    return paths


def step(model, loss, clip, fused):
    """One optimiser step as a function without arguments. fused: one kernel for all weights, as ladmim.fit asks for."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=fused)

    def run():
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
    return run


def pairs(detector, paths):
    """-> the step's name: {the way's name: (photos, function)}, the way "ours" among them. paths: photos enough for a batch
    of each stage."""
    cfg, device = detector.cfg, detector.mean.device
    b, m, scored = cfg.hvq_batch, cfg.mim_batch, paths[:8 if cfg.grid < 24 or device.type == "cuda" else 2]
    cached = features(detector, paths)
    with torch.no_grad():
        codes = detector.hvq(cached)[1].to(torch.int16)
    mask = ladmim.draw_masks(cfg, m, ladmim.seeded(0), scoring=False).to(device)

    def our_mim_loss():
        return ladmim.histogram_l1(detector.mim(cached[:m], mask[:, None]), codes[:m], mask[:, None]).sum(-1).mean()

    hvq, mim = detector.hvq, detector.mim
    return {
        "train HVQ-Trans": {"long way": (b, step(hvq, lambda: hvq_loss(detector, paths[:b]), 0.1, fused=False)),
                            "ours": (b, step(hvq, lambda: hvq.loss(cached[:b]), 0.1, fused=True))},
        "train ViT": {"long way": (m, step(mim, lambda: mim_loss(detector, paths[:m], mask), 1.0, fused=False)),
                      "ours": (m, step(mim, our_mim_loss, 1.0, fused=True))},
        f"score, {len(detector.masks)} masks": {
            "long way": (1, lambda: score(detector, paths[0])),
            "long way, photo and tokens once": (1, lambda: score(detector, paths[0], every_mask=False)),
            "ours": (len(scored), lambda: our_score(detector, scored))},
        "of these: one photo": {"decoding": (1, lambda: data.load_image(paths[0], cfg.image_size)),
                                "decoding, backbone": (1, lambda: features(detector, paths[:1]))},
    }
