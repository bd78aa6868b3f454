"""Every step the long way, for comparison: python bench/run.py --naive

Nothing is cached, shared or left out: photos are decoded and sent through the backbone whenever
they are needed, scoring goes one mask of one photo at a time, and histograms and nearest codes are
written as the equations read. What is not ours to improve is the same on both sides: the backbone,
attention and the optimiser are PyTorch's, a training step works on a whole batch.
tests/test_bench.py holds both sides to the same losses, codebooks and scores."""
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import backbone
import data
import ladmim
import scores
from runs import seeded


# The long way

def features(detector, paths):
    """h0 (B, N, d0) without a cache: photos are decoded and resized, the backbone runs."""
    images = [data.load_image(path, detector.cfg.image_size) for path in paths]
    return detector.look(np.stack(images))[0]


def nearest_own_code(x, codebooks, own):
    """All distances (B, N, K), then the smallest: the usual way of vector quantisation."""
    return torch.cdist(x, codebooks[0]).argmin(2)


def hvq_loss(detector, paths):
    with patch.object(ladmim, "nearest_own_code", nearest_own_code):
        return detector.hvq.loss(features(detector, paths))


def histogram_l1(logits, codes, mask):
    """Equation 12 with one-hot codes. logits (B, L, K), codes (B, L, N), mask (B, N) -> (B,)."""
    one_hot = F.one_hot(codes, logits.shape[-1]).float() * mask[:, None, :, None]   # (B, L, N, K)
    q = one_hot.sum(2) / mask.sum(1)[:, None, None]
    return (logits.softmax(-1) - q).abs().sum((1, 2))


def vit(mim, h0, mask):
    """h0 (B, N, d0), mask (B, N) -> logits (B, L, K). Every block computes every token."""
    x = torch.where(mask[..., None], mim.e, mim.embed(h0))
    x = torch.cat([mim.p.expand(len(x), 1, -1), x], 1) + mim.positions
    for block in mim.blocks:
        x = block(x)
    return mim.head(mim.norm(x)[:, 0]).unflatten(-1, (mim.levels, -1))


def mim_loss(detector, paths, mask):
    """mask (B, N): one a photo. The frozen tokenizer is asked for the codes in every step."""
    h0 = features(detector, paths)
    with torch.no_grad(), patch.object(ladmim, "nearest_own_code", nearest_own_code):
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
            with patch.object(ladmim, "nearest_own_code", nearest_own_code):
                rebuilt, codes = detector.hvq(h0)
        distances.append(histogram_l1(vit(detector.mim, h0, mask[None]), codes, mask[None]))
    return (h0 - rebuilt).square().mean(), torch.cat(distances).mean()


# Ours

def our_losses(detector, h0, masks):
    """-> the losses of HVQ-Trans and of the ViT, as functions. Training keeps features h0
    (B, N, d0) and codes; masks (B, N), one a photo of the ViT's batch."""
    hvq, mim, seen, masks = detector.hvq, detector.mim, h0[:len(masks)], masks[:, None]
    with torch.no_grad():
        codes = hvq(seen)[1].to(torch.int16)
    return (lambda: hvq.loss(h0[:detector.cfg.hvq_batch]),
            lambda: ladmim.mim_error(mim, mim(seen, masks), seen, masks, codes)[0].mean())


def our_score(detector, paths):
    """Both means (B,) of photos that were never seen before: decoding and backbone included."""
    h0, *_ = detector.look(np.stack(list(data.load_images(paths, detector.cfg.image_size))))
    errors = ladmim.errors(detector.hvq, detector.mim, detector.cfg, h0, detector.masks)
    return scores.squared_error(errors).mean(1), errors.of_masks.mean(1)


def make_detector(cfg, device):
    """An untrained detector with the shipped backbone: time and agreement need no more."""
    torch.manual_seed(0)
    pdn = backbone.load_pdn(cfg.pdn, 0)[0].to(device, memory_format=torch.channels_last)
    hvq, mim = (model(cfg, backbone.CHANNELS).to(device) for model in (ladmim.HVQ, ladmim.ViT))
    mean = torch.zeros(backbone.CHANNELS, device=device)
    masks = ladmim.scoring_masks(cfg, 0, device)
    return ladmim.Detector(cfg, pdn, hvq, mim, mean, mean + 1, masks, {}, "", 0)


def step(model, loss):
    """One optimiser step as a function without arguments."""
    optimizer, batch = ladmim.adamw(model, 1e-5, 0.01), [0]      # this process has all of the batch
    return lambda: ladmim.descend(optimizer, loss(), batch, batch, clip=1.0)


def pairs(detector, paths):
    """-> the step's name: {the way's name: (photos, function)}, the way "ours" among them. paths:
    photos enough for a batch of each stage; 8 are scored at once."""
    cfg, hvq, mim = detector.cfg, detector.hvq, detector.mim
    b, m, scored = cfg.hvq_batch, cfg.mim_batch, paths[:8]
    masks = ladmim.draw_masks(cfg, m, seeded(0), scoring=False).to(detector.mean.device)
    our_hvq_loss, our_mim_loss = our_losses(detector, features(detector, paths), masks)
    return {
        "train HVQ-Trans": {"long way": (b, step(hvq, lambda: hvq_loss(detector, paths[:b]))),
                            "ours": (b, step(hvq, our_hvq_loss))},
        "train ViT": {"long way": (m, step(mim, lambda: mim_loss(detector, paths[:m], masks))),
                      "ours": (m, step(mim, our_mim_loss))},
        f"score, {len(detector.masks)} masks": {
            "long way": (1, lambda: score(detector, paths[0])),
            "long way, tokens once": (1, lambda: score(detector, paths[0], every_mask=False)),
            "ours": (len(scored), lambda: our_score(detector, scored))}}
