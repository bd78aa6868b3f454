"""LADMIM: logical anomaly detection with masked image modeling, in one file.

Trained on photos of good products only, two detectors share one set of frozen features:

  HVQ-Trans  rebuilds the features from discrete codes; what it cannot rebuild is broken
             (structural anomalies)
  ViT        predicts the histogram of codes in a masked region from what is around it; where the
             actual histogram differs, the arrangement is wrong (logical anomalies)

Read it top to bottom: settings, transformer blocks, HVQ-Trans, masks, ViT, both trainings, scores,
the command `train`; `predict` is in predict.py. Equation numbers are the paper's. B images,
N = 24*24 = 576 tokens, d0 = 384 channels, L = 4 levels, K = 512 codes a level, M = 64 masks.

    python ladmim.py train --category breakfast_box
    python ladmim.py predict IMAGE_OR_FOLDER... --run RUN"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import eval as evaluation
import options
import runs
from backbone import PATCH, Features, load_data_set, load_pdn, look, pdn_from_state, positions
from data import InputError
from kernels import histogram_l1, nearest_code, nearest_own_code
from predict import add_options, next_step, predict
from published import PublishedHVQ, of_own
from runs import Job, Progress, Run, add_up, in_precision, processes, seeded, share
from scores import HVQ_SCORES, MIM_SCORES, histograms


# Settings

@dataclass
class Config:
    """Every setting of a run; each is an option of `train`. The defaults are the `paper` preset.
    In brackets, where a value comes from, if it is not the paper's text: LADMIM's published code
    (SkyShunsuke/LADMIM), HVQ-Trans's (TSTB-dev/HVQ-Trans), or ours, where all are silent."""
    image_size: int = 224              # pixels a side, whatever shape a photo has
    grid: int = 24                     # tokens a side; N = grid ** 2
    pdn: str = options.SHIPPED         # file of PDN weights, or "random" as the control [ours]
    precision: str = "fp32"            # of most products; codes are searched in fp32 [ours]

    tokenizer: str = "paper"           # or "published": `published.PublishedHVQ`
    levels: int = 4                    # L
    codes: int = 512                   # K
    code_dim: int = 64                 # dq [published code]
    hvq_width: int = 256               # d [RuiyingLu/HVQ-Trans; TSTB-dev's: 64]
    hvq_heads: int = 8                 # [HVQ-Trans]
    hvq_dropout: float = 0.1           # [HVQ-Trans]
    codebook: str = "gradient"         # equation 7; "ema" [HVQ-Trans]
    ema_decay: float = 0.99            # [HVQ-Trans]
    category_codes: str = "shared"     # "own": codebooks, output layer each [HVQ-Trans]
    commitment: float = 0.25           # weight of equation 7's commitment term [HVQ-Trans]
    hvq_epochs: int = 1000
    hvq_batch: int = 16
    hvq_lr: float = 1e-4
    hvq_weight_decay: float = 1e-4
    hvq_clip: float = 0.1              # of the gradient's norm [HVQ-Trans]
    hvq_drop: float = 0.1              # factor of the learning rate ... [HVQ-Trans]
    hvq_drop_at: float = 0.8           # ... after this share of the epochs [HVQ-Trans]
    hvq_score: str = "mean"            # [HVQ-Trans: "norm"]

    mim_width: int = 512
    mim_blocks: int = 4
    mim_heads: int = 8
    mim_dropout: float = 0.1           # [published code: of the attention weights]
    mim_layer_scale: float = 0.0       # [published code: 1e-4]
    mim_epochs: int = 500
    mim_warmup: int = 40               # epochs
    mim_batch: int = 32
    mim_lr: float = 1e-4
    mim_last_lr: float = 1e-6          # where the cosine ends
    mim_weight_decay: float = 1e-6
    mim_clip: float = 1.0              # [published code: of the gradient of a batch's sum]
    mim_score: str = "mean"

    mask: str = "block"                # in training
    train_ratio: float = 130 / 576     # share of the tokens that a training mask hides
    train_block: float = 46 / 576      # least share of one block [published code]
    score_ratio: float = 230 / 576     # [published code]
    score_block: float = 92 / 576      # [published code]
    masks: int = 64                    # M [ours]
    target: str = "histogram"          # what the ViT predicts (Table 8)


PRESETS = {
    "paper": {},
    "authors": dict(                   # their tokenizer (`published.py`), widths and schedule
        tokenizer="published", codebook="ema", hvq_width=64, hvq_batch=8, hvq_score="norm",
        category_codes="own", mim_epochs=1000, mim_layer_scale=1e-4, mim_clip=1 / 32),
    "fast": dict(                      # one GPU: fewer epochs, higher rates, another S_HVQ
        hvq_epochs=200, hvq_lr=4e-4, hvq_score="max", mim_epochs=150, mim_warmup=10, mim_lr=3e-4),
    "tiny": dict(                      # two CPU cores, minutes: a smaller model, other scores
        grid=12, codes=32, code_dim=32, codebook="ema", hvq_width=128, hvq_heads=4, hvq_dropout=0.0,
        hvq_epochs=120, hvq_batch=4, hvq_lr=1e-3, hvq_score="deviations", mim_width=192,
        mim_blocks=3, mim_heads=4, mim_dropout=0.0, mim_epochs=50, mim_warmup=3, mim_batch=8,
        mim_lr=1e-3, mim_score="whitened", masks=32, score_ratio=130 / 576, score_block=46 / 576),
}

# Transformer blocks

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context):
        """Queries from x (B, n, d), keys and values from context (B, m, d) -> (B, n, d)."""
        k, v = self.kv(context).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), k, v))
        if q.device.type == "cpu" and torch.is_grad_enabled():
            # The fused kernel's backward pass is slow there in bfloat16.
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):                   # which would cast back
            y = F.scaled_dot_product_attention(q, k, v)              # (B, heads, n, d / heads)
        return self.out(y.transpose(1, 2).flatten(2))


def feed_forward(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                         nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-norm transformer block. Dropout acts on each residual branch. On attention weights it
    would store all N x N of them for each head, and make HVQ-Trans's step three times as long."""

    def __init__(self, width, heads, dropout, layer_scale=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        # LayerScale: a learned factor of each branch, which starts at this. 0: there is none.
        self.scale = (nn.Parameter(torch.full((2, width), layer_scale)) if layer_scale
                      else (1.0, 1.0))
        self.ffn, self.drop = feed_forward(width), nn.Dropout(dropout)

    def forward(self, x, first: int | None = None):
        """x (B, N, d) -> (B, N, d). With `first` = n, keys and values come from all tokens, but
        only the first n tokens are queries: -> (B, n, d), the same as the full output's first n."""
        y = self.norm(x)
        x = x[:, :first] + self.scale[0] * self.drop(self.attention(y[:, :first], y))
        return x + self.scale[1] * self.drop(self.ffn(x))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the codes of one level, feed-forward; all residual."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.cross_attention = nn.LayerNorm(width), Attention(width, heads)
        self.ffn, self.drop = feed_forward(width), nn.Dropout(dropout)

    def forward(self, x, z):
        """x (B, N, d), z (B, N, d) the level's codes -> (B, N, d)."""
        y = self.norm1(x)
        x = x + self.drop(self.self_attention(y, y))
        x = x + self.drop(self.cross_attention(self.norm2(x), z))
        return x + self.drop(self.ffn(x))


# HVQ-Trans: the tokenizer and the structural detector

class HVQ(nn.Module):
    """Hierarchical vector-quantised transformer. Level l of the paper is index l - 1 here.

    With C `categories` each has K codes and an output layer of its own. Then `own` (B,) is the
    number of each photo's category; code k of category c is number c K + k of its level."""

    def __init__(self, cfg: Config, d0: int, categories: int = 1):
        super().__init__()
        n, d, dq, levels = cfg.grid ** 2, cfg.hvq_width, cfg.code_dim, cfg.levels
        heads, drop = cfg.hvq_heads, cfg.hvq_dropout
        self.levels, self.commitment = levels, cfg.commitment
        self.categories, self.codes, codes = categories, cfg.codes, categories * cfg.codes
        self.ema, self.ema_decay = cfg.codebook == "ema", cfg.ema_decay
        self.embed = nn.Linear(d0, d)
        self.positions = nn.Parameter(0.02 * torch.randn(n, d))
        self.encoder = nn.ModuleList(Block(d, heads, drop) for _ in range(levels))
        # The top level sees h^L, every other one h^l and z^L.
        seen = [d + dq] * (levels - 1) + [d]
        self.psi = nn.ModuleList(nn.Linear(width, dq) for width in seen)
        self.codebooks = nn.Parameter(torch.randn(levels, codes, dq),               # b^l_j
                                      requires_grad=not self.ema)
        self.query = nn.Linear(dq, d)
        self.query_positions = nn.Parameter(0.02 * torch.randn(n, d))
        self.lift = nn.ModuleList(nn.Linear(dq, d) for _ in range(levels))
        self.decoder = nn.ModuleList(DecoderBlock(d, heads, drop) for _ in range(levels))
        self.out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, categories * d0))
        # How often each code was used this epoch, and the running sums of the EMA codebook.
        self.register_buffer("used", torch.zeros(levels, codes))
        self.register_buffer("ema_count", torch.zeros(levels, codes))
        self.register_buffer("ema_sum", torch.zeros(levels, codes, dq))

    def encode(self, h0):
        """h0 (B, N, d0) -> [h^1 .. h^L], each (B, N, d)."""
        h = [self.embed(h0) + self.positions]
        for block in self.encoder:
            h.append(block(h[-1]))
        return h[1:]

    def quantise(self, h, own=None):
        """Equations 3 and 4, the top level first. As printed, 4 takes h^(l-1) and conditions z^l on
        itself; here z^l sees h^l and z^L. -> what each psi^l gives and z^l, which carries
        straight-through gradients, L tensors (B, N, dq) each, and the codes i (B, L, N), those of
        category c from c K on."""
        top = self.levels - 1
        psi, z, codes = [None] * self.levels, [None] * self.levels, [None] * self.levels
        for level in (top, *range(top)):
            seen = h[top] if level == top else torch.cat([h[level], z[top]], -1)
            psi[level] = self.psi[level](seen)
            books = self.codebooks[level].detach().float().split(self.codes)
            # i^l = argmin_j ||psi - b_j||, (B, N)
            codes[level] = nearest_own_code(psi[level].detach().float(), books, own)
            nearest = self.codebooks[level][codes[level]]            # (B, N, dq)
            z[level] = psi[level] + (nearest - psi[level]).detach()
        return psi, z, torch.stack(codes, 1)

    def decode(self, z, own=None):
        """Equation 5: z -> rebuilt h0 (B, N, d0), from deep levels to shallow. Cross-attention
        knows no order, so the codes get positions: without, a token cannot find its own code."""
        x = self.query_positions + self.query(z[-1])
        for level in reversed(range(self.levels)):
            x = self.decoder[level](x, self.lift[level](z[level]) + self.query_positions)
        return of_own(self.out(x), self.categories, own)

    def forward(self, h0, own=None):
        """h0 (B, N, d0) -> rebuilt h0 (B, N, d0), codes (B, L, N), each below K."""
        _, z, codes = self.quantise(self.encode(h0), own)
        return self.decode(z, own), codes.fmod(self.codes)            # -1, for NaN, stays

    def loss(self, h0, own=None):
        """Equation 7: feature error, and for every level the codebook and the commitment term. Also
        counts the codes; with "ema" that moves the codebooks, and stands for the codebook term."""
        psi, z, codes = self.quantise(self.encode(h0), own)
        loss = F.mse_loss(self.decode(z, own), h0)
        for level in range(self.levels):
            nearest = self.codebooks[level][codes[:, level]]
            loss = loss + self.commitment * F.mse_loss(psi[level], nearest.detach())
            if not self.ema:
                loss = loss + F.mse_loss(nearest, psi[level].detach())
        self.count(psi, codes)
        return loss

    @torch.no_grad()
    def count(self, psi, codes):
        """Counts each code's uses; the EMA codebook moves to the running mean of its vectors."""
        count, total = torch.zeros_like(self.used), torch.zeros_like(self.ema_sum)
        for level in range(self.levels):
            index = codes[:, level].flatten().clamp(min=0)           # -1 where the loss is NaN
            count[level].index_add_(0, index, torch.ones_like(index, dtype=torch.float))
            if self.ema:
                total[level].index_add_(0, index, psi[level].flatten(0, 1).float())
        add_up([count, total] if self.ema else [count])
        self.used += count
        if self.ema:
            self.ema_count.lerp_(count, 1 - self.ema_decay)
            self.ema_sum.lerp_(total, 1 - self.ema_decay)
            mean = self.ema_sum / self.ema_count.clamp(min=1e-6)[..., None]
            seen = self.ema_count[..., None] > 1e-4
            self.codebooks.copy_(torch.where(seen, mean, self.codebooks))

    @torch.no_grad()
    def start_codebooks(self, h0, generator, category=0):
        """A category's codebooks start as k-means of the untrained encoder's vectors. h0
        (B, N, d0) of its photos."""
        h, top, codes = self.encode(h0), self.levels - 1, self.codes
        own, span = torch.full((len(h0),), category, device=h0.device), self.span(category)
        for level in (top, *range(top)):
            psi = self.quantise(h, own)[0][level].flatten(0, 1)      # (B*N, dq)
            codebook = psi[torch.randint(len(psi), (codes,), generator=generator).to(psi.device)]
            for _ in range(5):
                index, _ = nearest_code(psi, codebook)
                count = torch.bincount(index, minlength=codes)[:, None]
                total = torch.zeros_like(codebook).index_add_(0, index, psi)
                codebook = torch.where(count > 0, total / count.clamp(min=1), codebook)
            self.codebooks[level, span] = self.ema_sum[level, span] = codebook
            self.ema_count[level, span] = 1

    @torch.no_grad()
    def revive(self, h0, generator, category=0):
        """A category's codes that no token used in this epoch move to random vectors of the
        encoder. h0 (B, N, d0) of its photos."""
        own, span = torch.full((len(h0),), category, device=h0.device), self.span(category)
        psi, _, _ = self.quantise(self.encode(h0), own)
        for level in range(self.levels):
            flat, dead = psi[level].flatten(0, 1), self.used[level, span] == 0
            pick = torch.randint(len(flat), dead.shape, generator=generator).to(flat.device)
            for codes in (self.codebooks[level, span], self.ema_sum[level, span]):
                codes.copy_(torch.where(dead[:, None], flat[pick], codes))
            self.ema_count[level, span].masked_fill_(dead, 1)

    def span(self, category: int) -> slice:
        """Where a category's codes lie in each codebook."""
        return slice(category * self.codes, (category + 1) * self.codes)


def usage(used: torch.Tensor):
    """used (n, K), how often each code of n codebooks was used. -> codes in use and perplexity
    exp(entropy) of each: two lists of n."""
    p = used / used.sum(1, keepdim=True).clamp(min=1)
    perplexity = torch.exp(-(p * p.clamp(min=1e-12).log()).sum(1))
    return (used > 0).sum(1).tolist(), [round(v, 1) for v in perplexity.tolist()]


TOKENIZERS = {"paper": HVQ, "published": PublishedHVQ}


# Masks

def block_masks(n: int, grid: int, count: int, least: int, generator) -> torch.Tensor:
    """Blockwise masking, n masks at once -> (n, N) bool, each with exactly `count` tokens:
    rectangles of about `least` tokens or more with log-uniform aspect in [0.3, 1/0.3] are added at
    uniform positions. One too large for the grid is shrunk, the last one cut; BEiT rejects them."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    mask, cells = torch.zeros(n, grid * grid, dtype=torch.bool), torch.arange(grid)
    while (left := count - mask.sum(1)).any():
        area = uniform(least, left.clamp(min=least))
        aspect = uniform(math.log(0.3), -math.log(0.3)).exp()
        h = (area * aspect).sqrt().round().clamp(1, grid)
        w = (area / aspect).sqrt().round().clamp(1, grid)
        top, side = uniform(0, grid + 1 - h).floor(), uniform(0, grid + 1 - w).floor()
        rows = (cells >= top[:, None]) & (cells < (top + h)[:, None])               # (n, grid)
        columns = (cells >= side[:, None]) & (cells < (side + w)[:, None])
        new = (rows[:, :, None] & columns[:, None, :]).flatten(1) & ~mask
        mask |= new & (new.cumsum(1) <= left[:, None])
    return mask


def random_masks(n: int, grid: int, count: int, least: int, generator) -> torch.Tensor:
    """(n, N) bool, each with exactly `count` tokens anywhere."""
    return torch.rand(n, grid * grid, generator=generator).argsort(1).argsort(1) < count


def checkerboard_masks(n: int, grid: int, count: int, least: int, generator) -> torch.Tensor:
    """(n, N) bool: boards with squares of an eighth, a quarter and a half of the side (3, 6 and 12
    of 24 tokens) and their inverses, in random order."""
    row = torch.arange(grid) * torch.tensor([[8], [4], [2]]) // grid                # (3, grid)
    boards = ((row[:, :, None] + row[:, None]) % 2 == 1).flatten(1)                 # (3, N)
    return torch.cat([boards, ~boards])[torch.randperm(n, generator=generator) % 6]


MASKS = {"block": block_masks, "random": random_masks, "checkerboard": checkerboard_masks}


def draw_masks(cfg: Config, n: int, generator, scoring: bool) -> torch.Tensor:
    """n masks (n, N) bool as the settings ask, drawn on the CPU: every device sees the same.
    Scoring always uses blocks, as in the published code."""
    kind, ratio, block = (("block", cfg.score_ratio, cfg.score_block) if scoring else
                          (cfg.mask, cfg.train_ratio, cfg.train_block))
    count, least = round(ratio * cfg.grid ** 2), max(1, round(block * cfg.grid ** 2))
    return MASKS[kind](n, cfg.grid, count, least, generator)


def scoring_masks(cfg: Config, seed: int, device) -> torch.Tensor:
    """The M masks (M, N) that every photo of a run is scored with."""
    return draw_masks(cfg, cfg.masks, seeded(seed, "scoring masks"), scoring=True).to(device)


# ViT: the logical detector

class ViT(nn.Module):
    """Predicts, from the visible tokens, the histogram of every level's codes in the masked region.
    With another target (Table 8) it predicts something of every token instead."""

    def __init__(self, cfg: Config, d0: int):
        super().__init__()
        width, self.levels, self.codes = cfg.mim_width, cfg.levels, cfg.codes
        outputs = {"feature": d0, "pixel": PATCH}.get(cfg.target, cfg.levels * cfg.codes)
        self.embed = nn.Linear(d0, width)
        self.e = nn.Parameter(torch.zeros(width))                    # stands for a masked token
        self.p = nn.Parameter(torch.zeros(width))                    # prediction token
        self.positions = nn.Parameter(0.02 * torch.randn(cfg.grid ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, cfg.mim_heads, cfg.mim_dropout,
                                          cfg.mim_layer_scale) for _ in range(cfg.mim_blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)
        self.target = cfg.target

    def forward(self, h0, mask):
        """Equations 8 and 9. h0 (B, N, d0), mask (M, N) for all images or (B, M, N) bool -> logits
        (B, M, L, K) of the histogram, or with another target (B, M, N, C) for every token."""
        x = self.embed(h0)[:, None]                                  # (B, 1, N, width)
        mask = mask.expand(len(h0), *mask.shape[-2:])                # (B, M, N)
        x = torch.where(mask[..., None], self.e, x)                  # (B, M, N, width)
        p = self.p.expand(*x.shape[:2], 1, -1)
        x = (torch.cat([p, x], 2) + self.positions).flatten(0, 1)    # (B*M, 1 + N, width)
        for block in self.blocks[:-1]:
            x = block(x)
        if self.target != "histogram":
            tokens = self.blocks[-1](x)[:, 1:]
            return self.head(self.norm(tokens)).float().unflatten(0, mask.shape[:2])
        # Nothing but p' is read, so in the last block it is the only query.
        p = self.blocks[-1](x, first=1)[:, 0]                        # (B*M, width)
        logits = self.head(self.norm(p)).float()
        return logits.view(*mask.shape[:2], self.levels, self.codes)


def token_error(target: str, output, h0, codes, pixels):
    """The error of each token (B, M, N) with Table 8's other targets: cross-entropy of its codes,
    summed over the levels, or squared error of its features or of its patch of the photo."""
    if target == "code":
        truth = codes.long().mT[:, None].expand(-1, output.shape[1], -1, -1)    # (B, M, N, L)
        logits = output.unflatten(-1, (truth.shape[-1], -1)).movedim(-1, 1)     # (B, K, M, N, L)
        return F.cross_entropy(logits, truth, reduction="none").sum(-1)
    truth = h0 if target == "feature" else pixels
    return (output - truth[:, None]).square().mean(-1)


def mim_error(mim: ViT, output, h0, mask, codes, pixels=None):
    """Equations 11 and 12: the L1 distance of the predicted histogram P^l from the actual one Q^l,
    summed over the levels, for each mask. With another target the masked tokens' mean error.

    output: mim(h0, mask); h0 (B, N, d0), mask (M, N) or (B, M, N), codes (B, L, N), pixels
    (B, N, 48) where they are the target -> (B, M), and each token's error (B, M, N), 0 where it is
    not masked; with histograms, each token has its mask's error."""
    if mim.target == "histogram":
        error = histogram_l1(output, codes, mask).sum(-1)
        return error, error[..., None] * mask
    tokens = torch.where(mask, token_error(mim.target, output, h0, codes, pixels), 0)
    return tokens.sum(-1) / mask.sum(-1), tokens


# Training

def adamw(model: nn.Module, lr: float, weight_decay: float, eps=1e-8):
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, eps=eps, weight_decay=weight_decay, fused=True)


def descend(optimizer, loss, mine, batch, clip: float):
    """One step. loss: the mean over `mine`, this process's photos of the batch. -> their sum."""
    weights = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    if len(mine):                                    # a process without photos only takes part
        (loss * (len(mine) / len(batch))).backward()
    runs.sum_gradients(weights)
    nn.utils.clip_grad_norm_(weights, clip)
    optimizer.step()
    return loss.detach() * len(mine) if len(mine) else 0


def train_hvq(run: Run, cfg: Config, features: Features, n: int) -> HVQ:
    """Trains HVQ-Trans on the first n photos, by equation 7."""
    torch.manual_seed(run.seed)
    device = features.device
    hvq = TOKENIZERS[cfg.tokenizer](cfg, len(features.mean), features.categories).to(device)
    if run.has_trained("hvq", hvq):
        return hvq
    revival = cfg.tokenizer == "paper"
    if revival and not run.state["stage"]:
        rng = seeded(run.seed, "codebooks")
        for category, index in enumerate(features.by_category(n)):
            some = index[torch.randperm(len(index), generator=rng)[:64]]
            hvq.start_codebooks(features.h0(some), rng, category)
    optimizer = adamw(hvq, cfg.hvq_lr, cfg.hvq_weight_decay)
    first = run.resume("hvq", cfg.hvq_epochs, hvq, optimizer)
    drop = min(1, cfg.hvq_drop_at) * cfg.hvq_epochs  # from this epoch on, the rate is low

    with run.stoppable():
        for epoch in range(first, cfg.hvq_epochs):
            rng, total = run.begin_epoch("hvq", epoch, hvq), torch.zeros((), device=device)
            optimizer.param_groups[0]["lr"] = cfg.hvq_lr * (cfg.hvq_drop if epoch >= drop else 1.0)
            for batch in torch.randperm(n, generator=rng).to(device).split(cfg.hvq_batch):
                mine = share(batch)                  # may be empty: codes are counted together
                with in_precision(cfg.precision, device):
                    loss = hvq.loss(features.h0(mine), features.own(mine))
                total += descend(optimizer, loss, mine, batch, cfg.hvq_clip)
            loss = run.mean_loss("hvq", epoch, total, n)
            used, perplexity = usage(hvq.used.view(-1, cfg.codes))   # level by level
            if revival and 1 in used and cfg.codes > 1:      # all its histograms are the same
                level = used.index(1) // features.categories + 1
                raise InputError(f"hvq training: level {level} uses one code in epoch {epoch + 1}; "
                                 "the last good checkpoint is kept; try a smaller --hvq-lr, more "
                                 "training photos or, if it is not set, --codebook ema")
            if revival and epoch + 1 < drop:         # a new code needs an epoch at the high rate
                rng = seeded(run.seed, "revive", epoch)
                for category, index in enumerate(features.by_category(n)):
                    some = index[torch.randperm(len(index), generator=rng)[:cfg.hvq_batch]]
                    hvq.revive(features.h0(some), rng, category)
            hvq.used.zero_()
            run.end_epoch("hvq", epoch + 1, loss, hvq, optimizer, codes_used=used,
                          perplexity=perplexity)
    return run.finish("hvq", hvq, optimizer)


def mim_rate(cfg: Config, epoch: float) -> float:
    """The ViT's learning rate: linear warm-up, then a cosine. epoch may lie within one."""
    if epoch < cfg.mim_warmup:
        return cfg.mim_lr * (epoch + 1) / (cfg.mim_warmup + 1)
    done = (epoch - cfg.mim_warmup) / max(1, cfg.mim_epochs - cfg.mim_warmup)
    return cfg.mim_last_lr + (cfg.mim_lr - cfg.mim_last_lr) * 0.5 * (1 + math.cos(math.pi * done))


def train_mim(run: Run, cfg: Config, hvq: HVQ, features: Features, n: int) -> ViT:
    """Trains the ViT on the first n photos, by `mim_error`. The frozen HVQ-Trans tokenises once."""
    torch.manual_seed(run.seed)
    device, codes = features.device, []
    mim = ViT(cfg, len(features.mean)).to(device)
    if run.has_trained("mim", mim):
        return mim
    with torch.inference_mode(), in_precision(cfg.precision, device):
        for batch in torch.arange(n, device=device).split(cfg.hvq_batch):
            codes.append(hvq(features.h0(batch), features.own(batch))[1].to(torch.int16))
    codes = torch.cat(codes)                                         # (n, L, N)
    if (codes < 0).any():
        raise InputError("mim training: HVQ-Trans gives NaN; train it with a smaller --hvq-lr")
    for index in features.by_category(n) if cfg.target in ("histogram", "code") else ():
        if cfg.codes > 1 and (codes[index] == codes[index[:1], :, :1]).all(0).all(1).any():
            data.warn(["mim training: HVQ-Trans gives all photos one code at some level, so its "
                       "histograms are all the same; try another --hvq-lr or more --hvq-epochs"])
    # With `authors` the mean over 32 photos is to move the weights as the published sum: its
    # gradient is 1/32 of the sum's, and so are the clip and eps.
    optimizer = adamw(mim, cfg.mim_lr, cfg.mim_weight_decay, eps=1e-8 * cfg.mim_clip)
    first = run.resume("mim", cfg.mim_epochs, mim, optimizer)

    with run.stoppable():
        for epoch in range(first, cfg.mim_epochs):
            rng, total = run.begin_epoch("mim", epoch, mim), torch.zeros((), device=device)
            batches = torch.randperm(n, generator=rng).to(device).split(cfg.mim_batch)
            masks = draw_masks(cfg, n, rng, scoring=False)[:, None].to(device)      # (n, 1, N)
            for i, batch in enumerate(batches):
                optimizer.param_groups[0]["lr"] = mim_rate(cfg, epoch + i / len(batches))
                mine = share(batch)
                h0, mask = features.h0(mine), masks[mine]
                with in_precision(cfg.precision, device):
                    loss = mim_error(mim, mim(h0, mask), h0, mask, codes[mine],
                                     features.pixels(mine))[0].mean()
                total += descend(optimizer, loss, mine, batch, cfg.mim_clip)
            loss = run.mean_loss("mim", epoch, total, n)
            run.end_epoch("mim", epoch + 1, loss, mim, optimizer)
    return run.finish("mim", mim, optimizer)


# Scores

@dataclass
class Errors:
    """Where both models fail on B photos."""
    residual: torch.Tensor             # (B, N, d0) h0 minus what HVQ-Trans rebuilds
    of_masks: torch.Tensor             # (B, M) `mim_error`
    of_tokens: torch.Tensor            # (B, N) mean over the masks that hide it; if none, over all
    histogram: torch.Tensor            # (B, M, L, K) predicted minus actual, for `whitened` alone


@torch.inference_mode()
def errors(hvq: HVQ, mim: ViT, cfg: Config, h0, masks, pixels=None, own=None,
           budget: int = 0) -> Errors:
    """h0 (B, N, d0), masks (M, N), pixels (B, N, 48) where they are the target, own (B,) as HVQ has
    it. budget: bytes for one (B, M, N, width) of the ViT; 0: a CPU's cache, or what fills a GPU."""
    budget = budget or (2 ** 27 if h0.is_cuda else 2 ** 23)
    width = max(cfg.mim_width, 0 if cfg.target == "histogram" else mim.head.out_features)
    step = max(1, budget // max(1, len(h0) * h0.shape[1] * width * 4))     # masks at once
    histogram = []                                   # only `whitened` needs them
    with in_precision(cfg.precision, h0.device):
        rebuilt, codes = hvq(h0, own)
        codes, of_masks, of_tokens = codes.to(torch.int16), [], 0
        for some in masks.split(step):
            output = mim(h0, some)
            error, tokens = mim_error(mim, output, h0, some, codes, pixels)
            of_masks, of_tokens = of_masks + [error], of_tokens + tokens.sum(1)
            if cfg.mim_score == "whitened":
                histogram.append(output.softmax(-1) - histograms(codes, some, cfg.codes))
    histogram = torch.cat(histogram, 1) if histogram else h0.new_zeros(0)
    of_masks, hides = torch.cat(of_masks, 1), masks.sum(0)
    of_tokens = torch.where(hides > 0, of_tokens / hides, of_masks.mean(1, keepdim=True))
    return Errors(h0 - rebuilt, of_masks, of_tokens, histogram)


def kept_errors(cfg: Config, found: Errors) -> list[torch.Tensor]:
    """What S_HVQ, S_MIM and the logical map need of them: three tensors (B, ...)."""
    return [HVQ_SCORES[cfg.hvq_score].keep(found), MIM_SCORES[cfg.mim_score].keep(found),
            found.of_tokens]


def judge(cfg: Config, kept: list[torch.Tensor], normal: dict) -> dict:
    """-> S_HVQ "hvq" and S_MIM "mim" (B,), their maps "hvq_map", "mim_map" (B, N)."""
    of_hvq, of_mim, of_tokens = kept                 # in the order of `kept_errors`
    s_hvq, hvq_map = HVQ_SCORES[cfg.hvq_score].judge(of_hvq, normal)
    s_mim, mim_map = MIM_SCORES[cfg.mim_score].judge(of_mim, of_tokens, normal)
    return {"hvq": s_hvq, "mim": s_mim, "hvq_map": hvq_map, "mim_map": mim_map}


def final_scores(normal: dict, judged: dict) -> dict:
    """S'_HVQ, S'_MIM and their maps, by the validation normals' mean and std; the final score
    S = S'_HVQ + S'_MIM as "score", and the sum of the maps as "heat"."""
    s = {name: (values - normal[name][0]) / normal[name][1] for name, values in judged.items()}
    return s | {"score": s["hvq"] + s["mim"], "heat": s["hvq_map"] + s["mim_map"]}


def learn_normal(cfg: Config, train, validation) -> dict:
    """What is normal in one category. train, validation: `kept_errors` of its normal photos; test
    photos play no part. Mean and std of both scores and maps, the threshold of the final score,
    and what the scores themselves learn."""
    normal, scores = {}, (HVQ_SCORES[cfg.hvq_score], MIM_SCORES[cfg.mim_score])
    for score, of_train in zip(scores, train[:2]):   # the tokens' errors only make the map
        normal |= score.learn(of_train) if score.learn else {}
    judged = judge(cfg, validation, normal)
    normal |= {name: evaluation.moments(values.double().numpy()) for name, values in judged.items()}
    return normal | {"threshold": evaluation.threshold(final_scores(normal, judged)["score"])}


# The command `train`

# The settings that are one of a few values.
OPTIONS = {"tokenizer": TOKENIZERS, "precision": ("fp32", "bf16"), "codebook": ("gradient", "ema"),
           "category_codes": ("shared", "own"), "mask": MASKS, "hvq_score": HVQ_SCORES,
           "target": ("histogram", "code", "feature", "pixel"), "mim_score": MIM_SCORES}


def train_run(job: Job) -> int:
    """Photos, features, both trainings, scores, table. Exit code 1: a photo could not be read."""
    cfg = job.cfg
    runs.begun_state(job)                            # another run's folder is refused at once
    photos, n, features, fixed, bad = load_data_set(job)
    tested = data.digests(photos[n:], job.root)      # now: photos may change in training
    run = Run(job)                                   # no folder before the photos can be read
    run.hold(**fixed)
    if job.take and not run.state["stage"]:
        run.take_over(job)
    # A begun run keeps the moments it began with; with --take they are the other run's.
    features.mean, features.std = (run.state[name].to(job.device) for name in ("mean", "std"))
    hvq = train_hvq(run, cfg, features, n)
    mim = train_mim(run, cfg, hvq, features, n)
    if runs.as_first(run.state["stage"] != "done" or run.state.get("tested") != tested
                     or evaluation.scored_paths(job.out) != tested.keys()):
        run.state["tested"] = tested                 # otherwise these photos have their scores
        score_photos(run, job, photos, hvq, mim, features)
    if run.writes:
        data.say(f"run: {data.printable(str(run.folder))}\n{evaluation.run_table(run.folder)}\n"
                 f"{next_step(run.folder)}")
    return 1 if bad else 0


def score_photos(run: Run, job: Job, photos: list, hvq: HVQ, mim: ViT, features: Features):
    """Scores validation and test photos, each category by its own normals, and writes scores.csv,
    maps.npz and the final checkpoint."""
    cfg, began, masks = job.cfg, time.monotonic(), scoring_masks(job.cfg, job.seed, job.device)
    learns = HVQ_SCORES[cfg.hvq_score].learn or MIM_SCORES[cfg.mim_score].learn
    chosen = [i for i, photo in enumerate(photos) if learns or photo.split != "train"]
    kept = all_errors(hvq, mim, cfg, features, torch.tensor(chosen), masks)
    photos = [photos[i] for i in chosen]

    rows, maps, run.state["calibration"] = [], [], {}
    for name in sorted({photo.category for photo in photos}):
        train, validation, test = ([i for i, photo in enumerate(photos) if photo.category == name
                                    and photo.split == split] for split in data.SPLITS)
        normal = run.state["calibration"][name] = learn_normal(
            cfg, [part[train] for part in kept], [part[validation] for part in kept])
        tested = validation + test
        judged = judge(cfg, [part[tested] for part in kept], normal)
        judged = {key: values.double() for key, values in judged.items()}
        s = final_scores(normal, judged)
        scores = torch.stack([judged["hvq"], judged["mim"], s["score"]], 1).tolist()
        rows += [(photos[i], values) for i, values in zip(tested, scores)]
        maps.append(torch.stack([s["hvq_map"], s["mim_map"]], 1))    # (n, 2, N)
    if run.writes:
        maps = torch.cat(maps).unflatten(2, (cfg.grid, cfg.grid)).float().numpy()
        evaluation.write_scores(run.folder, job.root, rows, maps)
    run.log(stage="score", photos=len(photos), seconds=round(time.monotonic() - began, 3))
    run.save(stage="done", optimizer=None)


def all_errors(hvq: HVQ, mim: ViT, cfg: Config, features: Features, index, masks, batch: int = 8):
    """`kept_errors` of the photos numbered by index, on the CPU."""
    progress, (rank, size) = Progress("scoring", len(index), "photos"), processes()
    kept, starts = None, range(0, len(index), batch)[rank::size]
    for start in starts or [len(index)]:             # a process without photos only takes part
        some = index[start:start + batch].to(masks.device)
        found = errors(hvq, mim, cfg, features.h0(some), masks, features.pixels(some),
                       features.own(some))
        new = kept_errors(cfg, found)
        kept = kept or [part.new_zeros(len(index), *part.shape[1:]) for part in new]
        for part, values in zip(kept, new):
            part[start:start + batch] = values
        progress(min(len(index), start + size * batch))
    add_up(kept)                                     # the others' rows are zero until here
    return [part.cpu() for part in kept]


def train(args) -> int:
    """Every run asked for, in turn. Exit code 1 where a photo could not be read."""
    device = runs.pick_device(args.device)
    preset = args.preset or ("fast" if device.type == "cuda" else "tiny")
    typed = options.chosen_settings(args, Config)
    cfg = Config(**PRESETS[preset] | typed)
    options.check_settings(cfg, OPTIONS, positions(cfg.image_size))
    options.check_typed(typed, cfg)
    load_pdn(cfg.pdn, args.seeds[0])                 # a wrong file is reported first
    with runs.joined(device):
        with runs.first_process_first():
            root, names = data.find_data(args.data, args.category)
        jobs = runs.asked_jobs(args, cfg, preset, root, names, device)
        if "category_codes" in typed and len(jobs[0].names) == 1:
            raise InputError(f"--category-codes {cfg.category_codes}: does nothing beside one "
                             "category a run; leave it out")
        return runs.as_first(max([train_run(job) for job in jobs]))     # all wait for the first


# A trained run on new photos: predict.py and bench/ use it

@dataclass
class Detector:
    """A trained run, ready to look at photos of one category."""
    cfg: Config
    pdn: nn.Module
    hvq: HVQ
    mim: ViT
    mean: torch.Tensor
    std: torch.Tensor
    masks: torch.Tensor
    normal: dict                       # `learn_normal` of the category
    category: str
    white: int                         # level of photos with more than 8 bits, as in training
    number: int = 0                    # of the category among those with codebooks of their own

    def look(self, images: np.ndarray):
        """images (B, H, W, 3) uint8, as data.load_image gives them -> h0 (B, N, d0), pixels
        (B, N, 48) where they are the target, and `own` (B,) as HVQ has it."""
        device, index = self.mean.device, torch.arange(len(images))
        seen = look(self.pdn, images, self.cfg.grid, self.cfg.target == "pixel", device,
                    self.cfg.precision)
        features = Features(seen, self.mean, self.std, device,
                            numbers=torch.full_like(index, self.number))
        return features.h0(index), features.pixels(index), features.own(index)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray):
        """images as for `look` -> S'_HVQ (B,), S'_MIM (B,), their sum, and the heat map (B, N), the
        sum of both standardised maps."""
        h0, pixels, own = self.look(images)
        found = errors(self.hvq, self.mim, self.cfg, h0, self.masks, pixels, own)
        kept = [part.cpu() for part in kept_errors(self.cfg, found)]
        s = final_scores(self.normal, judge(self.cfg, kept, self.normal))
        return s["hvq"], s["mim"], s["score"], s["heat"].numpy()


def load_detector(folder: Path, category: str | None, device: torch.device) -> Detector:
    """category: needed where the run knows several."""
    state = runs.load_finished(folder)
    known = sorted(state["calibration"])
    if category not in known and (category or len(known) > 1):
        raise InputError(f"--category {category or '(not given)'}: this run knows "
                         f"{', '.join(known)}; name one")
    cfg = Config(**{key: value for key, value in state["config"].items() if hasattr(Config, key)})
    pdn, _ = pdn_from_state(state["pdn"], str(folder))
    category, d0 = category or known[0], len(state["mean"])
    categories = len(known) if cfg.category_codes == "own" else 1
    hvq, mim = TOKENIZERS[cfg.tokenizer](cfg, d0, categories), ViT(cfg, d0)
    hvq.load_state_dict(state["hvq"])
    mim.load_state_dict(state["mim"])
    for model in (pdn, hvq, mim):
        model.to(device).eval().requires_grad_(False)
    return Detector(cfg, pdn, hvq, mim, state["mean"].to(device), state["std"].to(device),
                    scoring_masks(cfg, state["config"]["seed"], device),
                    state["calibration"][category], category, state["white"], known.index(category))


def main(argv=None) -> int:
    def command() -> int:
        args = runs.parse(argv, Config, PRESETS, OPTIONS, add_options)
        if args.command == "train":
            return train(args)
        return predict(load_detector(args.run, args.category, runs.pick_device(args.device)), args)
    return data.run_command(command, "stopped; what is printed is done, and the same train command "
                            "goes on from its last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
