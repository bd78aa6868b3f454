"""LADMIM: logical anomaly detection with masked image modeling, in one file.

Trained on photos of good products only, two detectors share one set of frozen features:

  HVQ-Trans  rebuilds the features from discrete codes; what it cannot rebuild is broken      (structural anomalies)
  ViT        predicts the histogram of codes in a masked region from what is around it; where
             the histogram is another, the arrangement is wrong                               (logical anomalies)

Read it top to bottom: configuration, backbone, HVQ-Trans, masks, ViT, training, scoring; then what serves them.
Equation numbers are the paper's. B images, N = 24*24 = 576 tokens, d0 = 384 channels, L = 4 levels, K = 512 codes a
level, M = 64 masks an image at scoring.

    python ladmim.py train --category breakfast_box
    python ladmim.py predict IMAGE_OR_FOLDER... --run RUN
    python ladmim.py distill --images DIR_OR_TAR --out FILE
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

try:
    import fcntl
except ImportError:                                  # Windows: two trainings in one folder are the user's to avoid
    fcntl = None

import data
import eval as evaluation
from data import InputError
from kernels import histogram_l1, nearest_code

FORMAT = 2                                           # of checkpoint.pt
HERE = Path(__file__).resolve().parent


# Configuration

def choice(default, *options):
    return field(default=default, metadata={"options": options})


@dataclass
class Config:
    """Every setting of a run. The defaults are the `paper` preset; each field is an option of `train`."""
    image_size: int = 224
    grid: int = 24                                   # tokens a side; N = grid ** 2
    precision: str = choice("fp32", "fp32", "bf16")  # of both models' products; codes are always searched in fp32
    compile: str = choice("off", "off", "on")        # torch.compile in training; on a GPU, as CUDA graphs, too
    pdn: str = "weights/pdn_small.pt"                # a file of PDN weights, or "random" as the control

    levels: int = 4                                  # L
    codes: int = 512                                 # K
    code_dim: int = 64                               # dq
    hvq_width: int = 256                             # d
    hvq_heads: int = 8
    hvq_dropout: float = 0.1
    codebook: str = choice("gradient", "gradient", "ema")
    commitment: float = 0.25                         # weight of the commitment term in equation 7
    hvq_epochs: int = 1000
    hvq_batch: int = 16
    hvq_lr: float = 1e-4
    hvq_score: str = choice("mean", "mean", "max", "whitened")

    mim_width: int = 512
    mim_blocks: int = 4
    mim_heads: int = 8
    mim_dropout: float = 0.1                         # of the attention weights
    mim_epochs: int = 500
    mim_warmup: int = 40                             # epochs
    mim_batch: int = 32
    mim_lr: float = 1e-4

    mask: str = choice("block", "block", "random", "checkerboard")
    train_ratio: float = 130 / 576                   # share of the tokens that a training mask hides
    train_block: float = 46 / 576                    # least share of one block
    score_ratio: float = 230 / 576
    score_block: float = 92 / 576
    masks: int = 64                                  # M
    mim_score: str = choice("mean", "mean", "whitened")
    target: str = choice("histogram", "histogram", "code", "feature", "pixel")   # what the ViT predicts (Table 8)


PRESETS = {
    "paper": {},
    "fast": dict(hvq_epochs=200, hvq_lr=4e-4, mim_epochs=150, mim_warmup=10, mim_lr=3e-4, hvq_score="max"),
    "tiny": dict(grid=12, codes=32, code_dim=32, hvq_width=128, hvq_heads=4, hvq_dropout=0.0, codebook="ema", hvq_epochs=40,
                 hvq_batch=4, hvq_lr=1e-3, hvq_score="whitened", mim_width=192, mim_heads=4, mim_blocks=3, mim_dropout=0.0,
                 mim_epochs=50, mim_warmup=3, mim_batch=8, mim_lr=1e-3, masks=32, score_ratio=130 / 576, score_block=46 / 576,
                 mim_score="whitened"),
}


def in_precision(cfg: Config, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")


def compiled(cfg: Config, function, device: torch.device):
    """function, compiled if asked for, once for each size of batch. Compiled sums over threads come in any order, so that the
    last bits of a run are its own."""
    if cfg.compile == "off":
        return function
    return torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)


def check_settings(cfg: Config):
    """Raises InputError for a setting that cannot work, naming its option."""
    for f in dataclasses.fields(cfg):
        value, option = getattr(cfg, f.name), "--" + f.name.replace("_", "-")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise InputError(f"{option} {value}: must be a number from 0 up")
        if isinstance(value, int) and value < (0 if f.name in ("hvq_epochs", "mim_epochs", "mim_warmup") else 1):
            raise InputError(f"{option} {value}: too small")
    for name in ("train_ratio", "train_block", "score_ratio", "score_block"):
        if not 0 < getattr(cfg, name) <= 1 or name.endswith("ratio") and not round(getattr(cfg, name) * cfg.grid ** 2):
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: a share of the {cfg.grid ** 2} tokens, above 0 "
                             "and at most 1, that a mask hides; at least one token")
    if cfg.codes > 2 ** 15:
        raise InputError(f"--codes {cfg.codes}: at most {2 ** 15}")
    for name in ("hvq", "mim"):
        if getattr(cfg, f"{name}_width") % getattr(cfg, f"{name}_heads"):
            raise InputError(f"--{name}-heads {getattr(cfg, f'{name}_heads')}: must divide --{name}-width")
        if getattr(cfg, f"{name}_dropout") >= 1:
            raise InputError(f"--{name}-dropout {getattr(cfg, f'{name}_dropout')}: must be below 1")
    side = (cfg.image_size - 29) // 4                # of the PDN's output: 48 for 224 pixels
    if side < 1 or side % cfg.grid:
        raise InputError(f"--grid {cfg.grid}: must divide the backbone's {side} positions a side at --image-size "
                         f"{cfg.image_size}")
    if cfg.mim_score == "whitened" and cfg.target != "histogram":
        raise InputError(f"--mim-score whitened: --target {cfg.target} has no histograms to measure; add --mim-score mean")
    if cfg.mask == "checkerboard" and cfg.grid % 12:
        raise InputError(f"--grid {cfg.grid}: --mask checkerboard needs a multiple of 12")


# Backbone

def build_pdn(size: str) -> nn.Sequential:
    """Patch Description Network of EfficientAD, without padding: (B, 3, 224, 224) -> (B, 384, 48, 48). Receptive field
    33 pixels, stride 4."""
    conv, relu, pool = nn.Conv2d, nn.ReLU, nn.AvgPool2d
    if size == "small":
        return nn.Sequential(conv(3, 128, 4), relu(), pool(2), conv(128, 256, 4), relu(), pool(2),
                             conv(256, 256, 3), relu(), conv(256, 384, 4))
    return nn.Sequential(conv(3, 256, 4), relu(), pool(2), conv(256, 512, 4), relu(), pool(2), conv(512, 512, 1), relu(),
                         conv(512, 512, 3), relu(), conv(512, 384, 4), relu(), conv(384, 384, 1))


def pdn_from_state(state: dict, name: str) -> tuple[nn.Sequential, str]:
    """Builds the PDN whose weights `state` holds, and says which it found. Both published formats are read: the plain
    Sequential keys of EfficientAD's teachers ("0.weight") and named layers ("conv1.weight")."""
    layers = sorted({k.rsplit(".", 1)[0] for k in state if torch.is_tensor(state[k])},
                    key=lambda k: int("".join(filter(str.isdigit, k)) or 0))
    found = [tuple(state[f"{k}.weight"].shape) if f"{k}.weight" in state else None for k in layers]
    for size in ("small", "medium"):
        pdn = build_pdn(size)
        convs = [m for m in pdn if isinstance(m, nn.Conv2d)]
        if found == [tuple(c.weight.shape) for c in convs]:
            for conv, key in zip(convs, layers):
                conv.weight.data.copy_(state[f"{key}.weight"])
                conv.bias.data.copy_(state[f"{key}.bias"])
            kind = "named layers" if layers[0].startswith("conv") else "plain Sequential keys"
            return pdn.eval().requires_grad_(False), f"PDN {size}, {kind}"
    raise InputError(f"--pdn {name}: holds no PDN small or medium (layers found: {', '.join(layers[:8]) or 'none'}); "
                     "give a state dict of EfficientAD's teacher, or leave the option out for the shipped weights")


def digest_file(path: Path) -> Path:
    """Where a file of weights keeps its SHA-256: beside it."""
    return path.with_name(path.name + ".sha256")


def load_pdn(name: str, seed: int) -> tuple[nn.Sequential, str]:
    """name: file or "random". Returns the frozen PDN in float32 and its description."""
    if name == "random":
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return build_pdn("small").eval().requires_grad_(False), "PDN small, random weights (control)"
    path = Path(name) if Path(name).exists() else HERE / name
    if not path.is_file():
        raise InputError(f"--pdn {name}: no such file; leave the option out for the shipped weights")
    digest = digest_file(path)
    if digest.is_file() and digest.read_text(errors="replace").split()[:1] != [hashlib.sha256(path.read_bytes()).hexdigest()]:
        raise InputError(f"--pdn {name}: damaged or replaced, its SHA-256 is not the one in {digest.name}; get the file again, "
                         "or delete the .sha256 if the change was meant")
    state = load_file(path, f"--pdn {name}")
    pdn, kind = pdn_from_state(state if isinstance(state, dict) else {}, name)
    return pdn, f"{kind}, from {name}"


def load_file(path: Path, name: str):
    """torch.load of tensors and plain values only, with one line for whatever is wrong with the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from None
    except Exception:                                # torch.load raises a different class for each kind of damage
        raise InputError(f"{name}: not a file of PyTorch weights, or truncated") from None


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet(x: torch.Tensor) -> torch.Tensor:
    """x (B, 3, H, W) in [0, 1] -> with ImageNet's mean and std taken out."""
    return (x - x.new_tensor(IMAGENET_MEAN)[:, None, None]) / x.new_tensor(IMAGENET_STD)[:, None, None]


@torch.inference_mode()
def extract(pdn: nn.Module, images: torch.Tensor, grid: int) -> torch.Tensor:
    """images (B, H, W, 3) uint8 -> h0 before standardisation (B, N, d0) float32, N = grid ** 2."""
    x = imagenet(images.permute(0, 3, 1, 2).float().div_(255))
    x = pdn(x.contiguous(memory_format=torch.channels_last))                      # (B, d0, 48, 48)
    return F.avg_pool2d(x, x.shape[-1] // grid).flatten(2).transpose(1, 2)        # (B, N, d0)


@torch.inference_mode()
def patches(images: torch.Tensor, grid: int) -> torch.Tensor:
    """images (B, H, W, 3) uint8 -> (B, N, 48): where each token's centre lies, 4x4 cells of mean colour, less the patch's mean,
    divided by its std. What the `pixel` target predicts."""
    cell = (images.shape[1] - 29) // 4 // grid       # pixels a side; a token is 4 cells a side
    inner = slice(14, 14 + 4 * cell * grid)          # the outermost tokens' centres lie 14.5 + 2 cells from the photo's edge
    x = F.avg_pool2d(images[:, inner, inner].permute(0, 3, 1, 2).float(), cell)   # (B, 3, 4 * grid, 4 * grid)
    x = x.unflatten(3, (grid, 4)).unflatten(2, (grid, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 1)   # 1 of 255: flat patches hold noise


# Transformer blocks

class Attention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, context):
        """x (B, n, d) asks, context (B, m, d) answers -> (B, n, d)."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)              # (B, heads, n or m, d / heads)
                   for t in (self.q(x), *self.kv(context).chunk(2, -1)))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


def feed_forward(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-norm transformer block. attention_dropout acts on the attention weights, dropout on each residual branch."""

    def __init__(self, width, heads, attention_dropout=0.0, dropout=0.0):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads, attention_dropout)
        self.ffn, self.drop = feed_forward(width), nn.Dropout(dropout)

    def forward(self, x, first: int | None = None):
        """x (B, N, d) -> (B, N, d). With `first` = n, keys and values come from all tokens, but only the first n tokens
        ask and leave the block: (B, n, d), equal to the full output's first n."""
        y = self.norm(x)
        x = x[:, :first] + self.drop(self.attention(y[:, :first], y))
        return x + self.drop(self.ffn(x))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the codes of one level, feed-forward; all residual."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1, self.self_attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.norm2, self.cross_attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.ffn, self.drop = feed_forward(width), nn.Dropout(dropout)

    def forward(self, x, z):
        """x (B, N, d), z (B, N, d) the level's codes -> (B, N, d)."""
        y = self.norm1(x)
        x = x + self.drop(self.self_attention(y, y))
        x = x + self.drop(self.cross_attention(self.norm2(x), z))
        return x + self.drop(self.ffn(x))


# HVQ-Trans

class HVQ(nn.Module):
    """Hierarchical vector-quantised transformer: the tokenizer and the structural detector. Level l of the paper is
    index l - 1 here."""

    def __init__(self, cfg: Config, d0: int):
        super().__init__()
        n, d, dq = cfg.grid ** 2, cfg.hvq_width, cfg.code_dim
        self.levels, self.ema, self.commitment = cfg.levels, cfg.codebook == "ema", cfg.commitment
        self.embed = nn.Linear(d0, d)
        self.positions = nn.Parameter(0.02 * torch.randn(n, d))
        self.encoder = nn.ModuleList(Block(d, cfg.hvq_heads, cfg.hvq_dropout, cfg.hvq_dropout) for _ in range(cfg.levels))
        self.psi = nn.ModuleList(nn.Linear(d if top else d + dq, dq)
                                 for top in [level == cfg.levels - 1 for level in range(cfg.levels)])
        self.codebooks = nn.Parameter(torch.randn(cfg.levels, cfg.codes, dq), requires_grad=not self.ema)  # b^l_j
        self.query, self.query_positions = nn.Linear(dq, d), nn.Parameter(0.02 * torch.randn(n, d))
        self.lift = nn.ModuleList(nn.Linear(dq, d) for _ in range(cfg.levels))
        self.decoder = nn.ModuleList(DecoderBlock(d, cfg.hvq_heads, cfg.hvq_dropout) for _ in range(cfg.levels))
        self.out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d0))
        # How often each code was used since the last look, and the running sums of the EMA codebook.
        self.register_buffer("used", torch.zeros(cfg.levels, cfg.codes))
        self.register_buffer("ema_count", torch.zeros(cfg.levels, cfg.codes))
        self.register_buffer("ema_sum", torch.zeros(cfg.levels, cfg.codes, dq))

    def encode(self, h0):
        """h0 (B, N, d0) -> [h^1 .. h^L], each (B, N, d)."""
        x, h = self.embed(h0) + self.positions, []
        for block in self.encoder:
            x = block(x)
            h.append(x)
        return h

    def quantise(self, h):
        """Equations 3 and 4, the top level first: every other level sees its own h^l and z^L.
        Returns what each psi^l gives, L tensors (B, N, dq), z likewise with straight-through gradients, and the codes i
        (B, L, N)."""
        top = self.levels - 1
        psi, z, codes = [None] * self.levels, [None] * self.levels, [None] * self.levels
        for level in (top, *range(top)):
            psi[level] = self.psi[level](h[level] if level == top else torch.cat([h[level], z[top]], -1))
            flat = psi[level].detach().float().flatten(0, 1)                      # (B*N, dq)
            index, _ = nearest_code(flat, self.codebooks[level].detach().float())
            codes[level] = index.view(psi[level].shape[:2])
            nearest = self.codebooks[level][codes[level]]                         # (B, N, dq)
            z[level] = psi[level] + (nearest - psi[level]).detach()
        return psi, z, torch.stack(codes, 1)

    def decode(self, z):
        """z -> rebuilt h0 (B, N, d0); levels are consumed from deep to shallow. Cross-attention has no order of its own, so the
        positions are added to the codes: otherwise a token could not find its own."""
        x = self.query_positions + self.query(z[-1])
        for level in reversed(range(self.levels)):
            x = self.decoder[level](x, self.lift[level](z[level]) + self.query_positions)
        return self.out(x)

    def forward(self, h0):
        """h0 (B, N, d0) -> rebuilt h0 (B, N, d0), codes (B, L, N)."""
        _, z, codes = self.quantise(self.encode(h0))
        return self.decode(z), codes

    def loss(self, h0):
        """Equation 7: feature error, and for every level the codebook and the commitment term."""
        psi, z, codes = self.quantise(self.encode(h0))
        loss = F.mse_loss(self.decode(z), h0)
        for level in range(self.levels):
            nearest = self.codebooks[level][codes[:, level]]
            loss = loss + self.commitment * F.mse_loss(psi[level], nearest.detach())
            if not self.ema:
                loss = loss + F.mse_loss(nearest, psi[level].detach())
        self.count(psi, codes)
        return loss

    @torch.no_grad()
    def count(self, psi, codes, decay=0.99):
        """Counts the codes in use and, with the EMA codebook, moves each code to the running mean of its vectors."""
        count, total = torch.zeros_like(self.used), torch.zeros_like(self.ema_sum)
        for level in range(self.levels):
            index = codes[:, level].flatten().clamp(min=0)                        # -1 where the loss is NaN: `fit` says so
            count[level].index_add_(0, index, torch.ones_like(index, dtype=torch.float))
            if self.ema:
                total[level].index_add_(0, index, psi[level].flatten(0, 1).float())
        add_up([count, total] if self.ema else [count])
        self.used += count
        if self.ema:
            self.ema_count.lerp_(count, 1 - decay)
            self.ema_sum.lerp_(total, 1 - decay)
            mean = self.ema_sum / self.ema_count.clamp(min=1e-6)[..., None]
            self.codebooks.copy_(torch.where(self.ema_count[..., None] > 1e-4, mean, self.codebooks))

    @torch.no_grad()
    def start_codebooks(self, h0, generator, rounds=5):
        """Codebooks start as k-means of the vectors that the untrained encoder sends them. h0 (B, N, d0)."""
        h, top = self.encode(h0), self.levels - 1
        for level in (top, *range(top)):
            psi = self.quantise(h)[0][level].flatten(0, 1)                        # (B*N, dq)
            codebook = psi[torch.randint(len(psi), (self.codebooks.shape[1],), generator=generator).to(psi.device)].clone()
            for _ in range(rounds):
                index, _ = nearest_code(psi, codebook)
                count = torch.bincount(index, minlength=len(codebook))
                total = torch.zeros_like(codebook).index_add_(0, index, psi)
                codebook = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], codebook)
            self.codebooks[level].copy_(codebook)
            self.ema_count[level] = 1
            self.ema_sum[level] = codebook

    @torch.no_grad()
    def revive(self, h0, generator):
        """Codes that nobody used since the last look take the place of random vectors. h0 (B, N, d0)."""
        psi, _, _ = self.quantise(self.encode(h0))
        for level in range(self.levels):
            flat = psi[level].flatten(0, 1)
            pick = flat[torch.randint(len(flat), (self.codebooks.shape[1],), generator=generator).to(flat.device)]
            dead = (self.used[level] == 0)[:, None]
            self.codebooks[level].copy_(torch.where(dead, pick, self.codebooks[level]))
            self.ema_sum[level] = torch.where(dead, pick, self.ema_sum[level])
            self.ema_count[level] = torch.where(dead[:, 0], torch.ones_like(self.ema_count[level]), self.ema_count[level])

    def health(self):
        """Codes in use and perplexity exp(entropy) of each level since the last look: two lists of L."""
        p = self.used / self.used.sum(1, keepdim=True).clamp(min=1)
        perplexity = torch.exp(-(p * p.clamp(min=1e-12).log()).sum(1))
        return (self.used > 0).sum(1).tolist(), [round(v, 1) for v in perplexity.tolist()]


# Masks

def block_masks(n: int, grid: int, count: int, least: int, generator: torch.Generator) -> torch.Tensor:
    """BEiT's blockwise masking, n masks at once -> (n, N) bool, each with exactly `count` tokens: rectangles of at least
    `least` tokens with log-uniform aspect in [0.3, 1/0.3] are added at uniform positions; the last one is cut to fit."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    mask, cells = torch.zeros(n, grid * grid, dtype=torch.bool), torch.arange(grid)
    while (left := count - mask.sum(1)).any():
        area = uniform(least, left.clamp(min=least))
        aspect = uniform(math.log(0.3), -math.log(0.3)).exp()
        h = (area * aspect).sqrt().round().clamp(1, grid)
        w = (area / aspect).sqrt().round().clamp(1, grid)
        top, side = uniform(0, grid + 1 - h).floor(), uniform(0, grid + 1 - w).floor()
        rows = (cells >= top[:, None]) & (cells < (top + h)[:, None])             # (n, grid)
        columns = (cells >= side[:, None]) & (cells < (side + w)[:, None])
        new = (rows[:, :, None] & columns[:, None, :]).flatten(1) & ~mask
        mask |= new & (new.cumsum(1) <= left[:, None])
    return mask


def random_masks(n: int, grid: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """(n, N) bool, each with exactly `count` tokens anywhere."""
    return torch.rand(n, grid * grid, generator=generator).argsort(1).argsort(1) < count


def checkerboard_masks(grid: int) -> torch.Tensor:
    """(6, N) bool: boards of 3, 6 and 12 squares a side, and their inverses."""
    boards = []
    for squares in (3, 6, 12):
        row = torch.arange(grid) * squares // grid
        boards.append(((row[:, None] + row) % 2 == 1).flatten())
    return torch.cat([torch.stack(boards), ~torch.stack(boards)])


def draw_masks(cfg: Config, n: int, generator: torch.Generator, scoring: bool) -> torch.Tensor:
    """n masks (n, N) bool as the configuration asks, drawn on the CPU so that every device sees the same ones. Checkerboards
    are six, and scoring takes each of them once."""
    ratio, block = (cfg.score_ratio, cfg.score_block) if scoring else (cfg.train_ratio, cfg.train_block)
    tokens = cfg.grid ** 2
    if cfg.mask == "block":
        return block_masks(n, cfg.grid, round(ratio * tokens), max(1, round(block * tokens)), generator)
    if cfg.mask == "random":
        return random_masks(n, cfg.grid, round(ratio * tokens), generator)
    boards = checkerboard_masks(cfg.grid)
    return boards if scoring else boards[torch.randint(len(boards), (n,), generator=generator)]


def seeded(*key) -> torch.Generator:
    """A generator that depends on its key alone. Randomness is never carried from one epoch to the next, which is why a
    resumed run needs nothing but the epoch's number to go on exactly."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


# ViT

class ViT(nn.Module):
    """Predicts, from the visible tokens, the histogram of every level's codes in the masked region: the logical
    detector. With another target (Table 8) it predicts for every token its codes, its features or its pixels."""

    def __init__(self, cfg: Config, d0: int):
        super().__init__()
        width = cfg.mim_width
        self.levels, self.codes = cfg.levels, cfg.codes
        self.embed = nn.Linear(d0, width)
        self.e = nn.Parameter(torch.zeros(width))                                 # stands for a masked token
        self.p = nn.Parameter(torch.zeros(width))                                 # prediction token
        self.positions = nn.Parameter(0.02 * torch.randn(cfg.grid ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, cfg.mim_heads, cfg.mim_dropout) for _ in range(cfg.mim_blocks))
        self.target, outputs = cfg.target, {"feature": d0, "pixel": 48}.get(cfg.target, cfg.levels * cfg.codes)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, h0, mask):
        """h0 (B, N, d0), mask (M, N) for all images or (B, M, N) bool -> logits (B, M, L, K) of the histogram, or with another
        target (B, M, N, C) for every token, C = L * K for codes, d0 for features, 48 for pixels."""
        x = self.embed(h0)[:, None]                                               # (B, 1, N, width)
        mask = mask.expand(len(h0), *mask.shape[-2:])                             # (B, M, N)
        x = torch.where(mask[..., None], self.e, x)                               # (B, M, N, width)
        x = torch.cat([self.p.expand(*x.shape[:2], 1, -1), x], 2) + self.positions
        x = x.flatten(0, 1)                                                       # (B*M, 1 + N, width)
        for block in self.blocks[:-1]:
            x = block(x)
        if self.target != "histogram":
            return self.head(self.norm(self.blocks[-1](x)[:, 1:])).float().unflatten(0, mask.shape[:2])
        # Nothing but p' is read, so in the last block nothing else needs to ask.
        p = self.blocks[-1](x, first=1)[:, 0]                                     # (B*M, width)
        return self.head(self.norm(p)).float().view(*mask.shape[:2], self.levels, self.codes)


def mim_error(mim: ViT, found, h0, mask, codes, pixels=None):
    """Equation 12: the L1 distance of the predicted histogram from the actual one, summed over the levels, for each mask.
    With another target (Table 8), the mean over the mask's tokens of the codes' cross-entropy, summed over the levels, or of
    the squared error of features or pixels.

    found: what mim(h0, mask) predicts; h0 (B, N, d0), mask (M, N) or (B, M, N), codes (B, L, N), pixels (B, N, 48) where they
    are the target -> (B, M)
    """
    if mim.target == "histogram":
        return histogram_l1(found, codes, mask).sum(-1)
    if mim.target == "code":
        found = found.unflatten(-1, (mim.levels, mim.codes)).permute(0, 4, 1, 2, 3)               # (B, K, M, N, L)
        truth = codes.long().transpose(1, 2)[:, None].expand(-1, found.shape[2], -1, -1)          # (B, M, N, L)
        error = F.cross_entropy(found, truth, reduction="none").sum(-1)                           # (B, M, N)
    else:
        error = (found - (pixels if mim.target == "pixel" else h0)[:, None]).square().mean(-1)
    return torch.where(mask, error, 0).sum(-1) / mask.sum(-1)


# Several processes: torchrun --nproc-per-node N ladmim.py train ...
#
# Every process holds the whole model and all features, draws the same randomness, and takes its share of each batch. What
# they learn is added up, gradients and code counts alike, so that all of them take one and the same step. Process 0 alone
# writes and prints. DistributedDataParallel would average gradients, which is wrong where shares are uneven, and knows
# nothing of code counts.

def processes() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def share(batch: torch.Tensor) -> torch.Tensor:
    """This process's part of a batch: even parts but for one element, empty where the batch is shorter than that."""
    rank, size = processes()
    return batch.tensor_split(size)[rank]


@torch.no_grad()
def add_up(tensors: list[torch.Tensor]):
    """Replaces each float tensor by its sum over the processes, all of them in one message."""
    if processes()[1] > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def as_first(value):
    """What process 0 has for `value`, in all of them."""
    held = [value]
    if processes()[1] > 1:
        dist.broadcast_object_list(held, 0)
    return held[0]


@contextlib.contextmanager
def first_process_first():
    """What is inside is done by process 0 before the others: they find its files."""
    rank, size = processes()
    if rank:
        dist.barrier()
    yield
    if size > 1 and not rank:
        dist.barrier()


@contextlib.contextmanager
def joined(device: torch.device):
    """Inside, the processes that torchrun started know each other; all but the first are mute."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if "LOCAL_RANK" not in os.environ:
        raise InputError("WORLD_SIZE is set, but not LOCAL_RANK: start several processes with torchrun, or unset it")
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise InputError(f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs; start at most as many")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with contextlib.ExitStack() as muted:
        if dist.get_rank():
            nowhere = muted.enter_context(open(os.devnull, "w"))
            muted.enter_context(contextlib.redirect_stdout(nowhere))
            muted.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        finally:
            dist.destroy_process_group()


# Training

class Progress:
    """One line that says how far the work is, how fast, and how long it will take: rewritten in place on a terminal, a
    new line every ten seconds elsewhere."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.start = self.shown = time.monotonic()

    def __call__(self, done: int, note: str = ""):
        now, tty = time.monotonic(), sys.stderr.isatty()
        if done < self.total and now - self.shown < (0.2 if tty else 10):
            return
        self.shown, rate = now, (done - self.done) / max(now - self.start, 1e-9)
        line = (f"{self.label}: {done}/{self.total} {self.unit}, {rate:.3g}/s, "
                f"{(self.total - done) / max(rate, 1e-9):.0f} s left{note and ', ' + note}")
        end = "" if tty and done < self.total else "\n"
        print(f"\r{line[:118]:<118}" if tty else line, end=end, file=sys.stderr, flush=True)


def write_whole(path: Path, content: bytes):
    """Written beside, flushed, renamed: a kill or a full disk leaves the last good file."""
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{path}: could not be saved ({error.strerror}); what was saved before is intact: free some space "
                         "and run the same command again") from None


def load_checkpoint(path: Path) -> dict:
    state, whole = load_file(path, str(path)), False
    if not isinstance(state, dict) or "format" not in state:
        raise InputError(f"{path}: not a checkpoint of ladmim.py")
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:           # torch writes checksums and reads none
        whole = file.testzip() is None
    if not whole:
        raise InputError(f"{path}: damaged, its checksums do not match; train the run again or restore the file")
    if state["format"] != FORMAT:
        raise InputError(f"{path}: format {state['format']}, this version reads {FORMAT}; use the version that wrote it")
    return state


def lock(folder: Path):
    """Makes the folder and holds it for this process: the system lets go when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror})") from None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is training in it; wait until it ends or choose another --out") from None
    except OSError:                                  # a file system without locks, as some network drives are
        pass
    return file


class Run:
    """A run's folder and what its checkpoint holds."""

    def __init__(self, folder: Path, settings: dict):
        """settings: config.json's content. A folder that already holds a run is gone on with if its settings agree."""
        self.folder, self.seed, self.saved = folder, settings["seed"], time.monotonic()
        self.writes = processes()[0] == 0
        self.lock = lock(folder) if self.writes else None
        self.state = {"format": FORMAT, "config": settings, "stage": "", "epoch": 0, "metrics": []}
        if (folder / "checkpoint.pt").exists():
            self.state = load_checkpoint(folder / "checkpoint.pt")
            about = ("root", "commit", "device", "torch")                         # may differ between the sittings of one run
            held = dataclasses.asdict(Config()) | self.state["config"]           # a setting that came later had its default
            for name, value in settings.items():
                if name not in about and held.get(name) != value:
                    raise InputError(f"{folder}: holds a run with {name} = {held.get(name)}, asked for {value}; "
                                     "choose another --out or delete the folder")
        if self.writes and not ((folder / "checkpoint.pt").exists() and (folder / "config.json").exists()):
            write_whole(folder / "config.json", (json.dumps(self.state["config"], indent=1) + "\n").encode())
        self.write_metrics()

    def save(self, **news):
        self.state.update(news)
        if not self.writes:
            return
        content = io.BytesIO()
        torch.save(self.state, content)
        write_whole(self.folder / "checkpoint.pt", content.getbuffer())
        self.saved = time.monotonic()

    def write_metrics(self):
        if not self.writes:
            return
        lines = "".join(json.dumps(line) + "\n" for line in self.state["metrics"])
        write_whole(self.folder / "metrics.jsonl", lines.encode())

    def tested(self) -> set[str]:
        """Paths of the photos that a finished run has scored; none where it is unfinished or a table is missing or damaged."""
        try:
            evaluation.read_maps(found := evaluation.read_run(self.folder))
        except InputError:
            return set()
        return set(found.path.tolist()) if self.state["stage"] == "done" else set()

    def log(self, **line):
        self.state["metrics"].append(line)
        self.write_metrics()


@contextlib.contextmanager
def stoppable():
    """Inside, the first Ctrl-C only fills the list that this yields: whoever works stops where nothing is lost. The second
    one stops at once."""
    asked = []

    def interrupted(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this epoch; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def fit(run: Run, stage: str, model: nn.Module, epoch_loss, n: int, epochs: int, batch: int, lr, weight_decay: float,
        clip: float, end_epoch=lambda epoch: {}, save_every=60.0):
    """Trains one stage from where the run's checkpoint left it.

    epoch_loss(generator) -> loss(index): called once an epoch, so that an epoch's masks are drawn together; index is a
    batch of photo numbers, or this process's share of it. lr(epoch): the learning rate at a fractional epoch.
    end_epoch(epoch) -> what else to log.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=lr(0.0), weight_decay=weight_decay, fused=True)
    state, start = run.state, 0
    if state["stage"] == stage:
        model.load_state_dict(state[stage])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]

    def save(epoch):
        run.save(**{"stage": stage, "epoch": epoch, stage: model.state_dict(), "optimizer": optimizer.state_dict()})

    model.train()
    progress = Progress(f"{stage} training", epochs, "epochs", start)
    with stoppable() as asked:
        for epoch in range(start, epochs):
            generator, began = seeded(run.seed, stage, epoch), time.monotonic()
            torch.manual_seed(generator.initial_seed() + processes()[0])          # dropout, other for other photos
            several = processes()[1] > 1
            for value in model.state_dict().values() if several else ():          # equal but for what GPUs round at random
                dist.broadcast(value, 0)
            batches = torch.randperm(n, generator=generator).to(device).split(batch)              # no step waits for a copy
            loss, total = epoch_loss(generator), torch.zeros((), device=device)
            for i, index in enumerate(batches):
                for group in optimizer.param_groups:
                    group["lr"] = lr(epoch + i / len(batches))
                part = share(index)
                optimizer.zero_grad()
                value = loss(part)                                                # asked even of no photos: it counts codes
                if len(part):                                                     # losses are means, so they are weighted
                    (value * (len(part) / len(index)) if several else value).backward()
                    total = total + value.detach() * len(part)
                if several:
                    for p in trained:
                        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    add_up([p.grad for p in trained])
                nn.utils.clip_grad_norm_(trained, clip)
                optimizer.step()
            stop = torch.full_like(total, bool(asked))                            # one process asked is all asked
            add_up([total, stop])
            mean, stop = float(total) / n, bool(stop)                             # here an epoch waits for the GPU, no step does
            if not math.isfinite(mean):
                raise InputError(f"{stage} training: the loss is {mean} in epoch {epoch + 1}; the last good checkpoint is "
                                 f"kept; try a smaller --{stage}-lr")
            run.log(stage=stage, epoch=epoch + 1, loss=round(mean, 6), seconds=round(time.monotonic() - began, 3),
                    **end_epoch(epoch))
            progress(epoch + 1, f"loss {mean:.4f}")
            if time.monotonic() - run.saved > save_every or epoch + 1 == epochs or stop:
                save(epoch + 1)
            if stop:
                raise KeyboardInterrupt
    if not epochs:
        save(0)
    model.eval()


def train_hvq(run: Run, cfg: Config, h0, n: int, device) -> HVQ:
    """h0(index) -> (B, N, d0) standardised features of the training photos with those numbers; n photos."""
    torch.manual_seed(run.seed)
    hvq = HVQ(cfg, h0(torch.tensor([0])).shape[-1]).to(device)
    if run.state["stage"] in ("hvq taken", "taken whole", "mim", "done"):
        hvq.load_state_dict(run.state["hvq"])
        return hvq.eval().requires_grad_(False)
    sample = seeded(run.seed, "codebooks")
    if not run.state["stage"]:
        hvq.start_codebooks(h0(torch.randperm(n, generator=sample)[:64]), sample)

    equation7 = compiled(cfg, hvq.loss, device)

    def loss(index):
        with in_precision(cfg, device):
            return (equation7 if len(index) else hvq.loss)(h0(index))             # nothing is compiled for no photos

    def end_epoch(epoch):
        used, perplexity = hvq.health()
        dead = [level for level, codes in enumerate(used, 1) if codes == 1 < cfg.codes]
        if dead:                                     # its histogram is always the same, so nothing can be learned from it
            raise InputError(f"hvq training: level {dead[0]} uses one code of {cfg.codes} in epoch {epoch + 1}; the last good "
                             "checkpoint is kept; try --codebook ema, a smaller --hvq-lr or more training photos")
        if epoch < 0.8 * cfg.hvq_epochs - 1:         # later, a new code could not settle any more
            generator = seeded(run.seed, "revive", epoch)
            hvq.revive(h0(torch.randperm(n, generator=generator)[:cfg.hvq_batch]), generator)
        hvq.used.zero_()
        return {"codes_used": used, "perplexity": perplexity}

    fit(run, "hvq", hvq, lambda generator: loss, n, cfg.hvq_epochs, cfg.hvq_batch,
        lambda epoch: cfg.hvq_lr * (0.1 if epoch >= 0.8 * cfg.hvq_epochs else 1.0), 1e-4, 0.1, end_epoch)
    return hvq.eval().requires_grad_(False)


def train_mim(run: Run, cfg: Config, hvq: HVQ, h0, n: int, device, pixels=None) -> ViT:
    """pixels(index) -> (B, N, 48), where they are the target; the rest as in `train_hvq`."""
    torch.manual_seed(run.seed)
    mim = ViT(cfg, h0(torch.tensor([0])).shape[-1]).to(device)
    if run.state["stage"] in ("taken whole", "done"):
        mim.load_state_dict(run.state["mim"])
        return mim.eval().requires_grad_(False)
    with torch.inference_mode(), in_precision(cfg, device):                       # HVQ-Trans is frozen: tokenise once
        codes = torch.cat([hvq(h0(index))[1].to(torch.int16) for index in torch.arange(n, device=device).split(cfg.hvq_batch)])

    def mean_error(x, hidden, *truth):
        return mim_error(mim, mim(x, hidden), x, hidden, *truth).mean()

    equation12 = compiled(cfg, mean_error, device)

    def epoch_loss(generator):
        mask = draw_masks(cfg, n, generator, scoring=False)[:, None].to(device)   # (n, 1, N)

        def loss(index):
            with in_precision(cfg, device):
                return (equation12 if len(index) else mean_error)(h0(index), mask[index], codes[index], pixels and pixels(index))
        return loss

    def lr(epoch):                                   # linear warm-up, then cosine to 1e-6
        if epoch < cfg.mim_warmup:
            return cfg.mim_lr * (epoch + 1) / (cfg.mim_warmup + 1)
        done = (epoch - cfg.mim_warmup) / max(1, cfg.mim_epochs - cfg.mim_warmup)
        return 1e-6 + (cfg.mim_lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * done))

    fit(run, "mim", mim, epoch_loss, n, cfg.mim_epochs, cfg.mim_batch, lr, 1e-6, 1.0)
    return mim.eval().requires_grad_(False)


# Scoring

@torch.inference_mode()
def errors(hvq: HVQ, mim: ViT, cfg: Config, h0: torch.Tensor, masks: torch.Tensor, budget: int = 0, pixels=None):
    """What the detectors fail at. h0 (B, N, d0), masks (M, N) -> each token's squared error (B, N), or for the whitened score
    its residual (B, N, d0); each mask's error (B, M), `mim_error`; and for the whitened score predicted minus actual histogram,
    the mean over the masks (B, L, K), otherwise nothing (B, 0). budget: bytes that one activation of the ViT may take; by
    default what a CPU's cache holds, or what fills a GPU."""
    budget = budget or (2 ** 27 if h0.is_cuda else 2 ** 23)
    widest = cfg.mim_width if cfg.target == "histogram" else max(cfg.mim_width, mim.head.out_features)
    step = max(1, budget // (len(h0) * h0.shape[1] * widest * 4))
    with in_precision(cfg, h0.device):
        rebuilt, codes = hvq(h0)
        codes, l1, histogram = codes.to(torch.int16), [], h0.new_zeros(len(h0), 0)
        if cfg.mim_score == "whitened":              # a token's share in the mean of the actual histograms
            share = (masks / masks.sum(1, keepdim=True)).mean(0).expand(codes.shape)
            histogram = h0.new_zeros(len(h0), cfg.levels, cfg.codes).scatter_add_(2, codes.long(), -share)
        for part in masks.split(step):
            found = mim(h0, part)
            l1.append(mim_error(mim, found, h0, part, codes, pixels))
            if cfg.mim_score == "whitened":
                histogram += found.softmax(-1).sum(1) / len(masks)
    residual = h0 - rebuilt
    return residual if cfg.hvq_score == "whitened" else residual.square().mean(-1), torch.cat(l1, 1), histogram


def normal_statistics(values: torch.Tensor) -> torch.Tensor:
    """values (n, m) of n training normals -> mean and std of each column, (2, m). Half of a column's std is its own, half
    the average column's, so that a token that hardly varies does not shout; at least 1 % of the mean, as in `eval.moments`."""
    mean, std = values.mean(0), values.std(0, correction=0)
    return torch.stack([mean, ((std + std.mean()) / 2).maximum(0.01 * mean.abs()).clamp(min=1e-6)])


def windows(residual: torch.Tensor, grid: int) -> list[torch.Tensor]:
    """residual (B, N, d0) -> its mean over every window of 1, 2 and `grid` tokens a side, each (B, W, d0). A broken part
    shows in one token; a wrong count shows in the whole photo's mean, where the tokens' noise cancels out."""
    square = residual.transpose(1, 2).unflatten(2, (grid, grid))
    return [F.avg_pool2d(square, side, 1).flatten(2).transpose(1, 2) for side in (1, min(2, grid), grid)]


def whitening(x: torch.Tensor, shrink=0.1) -> dict:
    """What is normal in windows x (n, W, d0) of the training normals: each window's mean (W, d0), the matrix (d0, d0) that
    makes their pooled covariance the identity, and the moments (2, W) of the squared distances that result. The covariance
    is shrunk by a tenth towards a multiple of the identity, as there may be fewer photos than channels."""
    mean = x.mean(0)
    off = (x - mean).flatten(0, 1).double()
    cov, eye = off.T @ off / len(off), torch.eye(off.shape[1], dtype=torch.double)
    cov = (1 - shrink) * cov + (shrink * cov.diag().mean() + 1e-9) * eye
    found = {"mean": mean, "matrix": torch.linalg.inv(torch.linalg.cholesky(cov)).T.float()}
    return found | {"distance": normal_statistics(distances(x, found))}


def distances(x: torch.Tensor, normal: dict) -> torch.Tensor:
    """Squared Mahalanobis distance of windows x (B, W, d0) from what is normal there, (B, W)."""
    return ((x - normal["mean"]) @ normal["matrix"]).square().sum(-1)


def abnormal(residual: torch.Tensor, grid: int, normal: list[dict]) -> list[torch.Tensor]:
    """For each size of window, how many standard deviations its squared distance is above the training normals', (B, W)."""
    return [(distances(x, one) - one["distance"][0]) / one["distance"][1] for x, one in zip(windows(residual, grid), normal)]


def learn_normal(cfg: Config, train, validation) -> dict:
    """What the whitened scores need to know of one category's normals; train, validation: what `errors` found there."""
    normal = {}
    if cfg.hvq_score == "whitened":
        normal["windows"] = [whitening(x) for x in windows(train[0], cfg.grid)]
        normal["largest"] = [evaluation.moments(z.amax(1).double().numpy())
                             for z in abnormal(validation[0], cfg.grid, normal["windows"])]
    if cfg.mim_score == "whitened":
        normal["histograms"] = [whitening(x[:, None]) for x in train[2].unbind(1)]
    return normal


def detect(cfg: Config, found, masks: torch.Tensor, normal: dict):
    """found: what `errors` returns, masks (M, N), normal: `learn_normal`'s.
    -> S_HVQ (B,), S_MIM (B,), and where they come from, each (B, N).

    S_HVQ is the mean over the tokens, the largest 3x3 mean, or (whitened) the largest distance of a window's mean residual,
    each size of window standardised by the validation normals. S_MIM is the mean over the masks or (whitened) the distance of
    the mean histogram residual, summed over the levels: what normals miss, too, does not count.
    """
    error, l1, histogram = found
    if cfg.hvq_score == "whitened":
        far = abnormal(error, cfg.grid, normal["windows"])
        s_hvq = torch.stack([(z.amax(1) - mean) / std for z, (mean, std) in zip(far, normal["largest"])]).amax(0)
        error = far[0]
    elif cfg.hvq_score == "max":
        smooth = F.avg_pool2d(error.unflatten(1, (cfg.grid, -1))[:, None], 3, 1, 1, count_include_pad=False)
        s_hvq = smooth.flatten(1).amax(1)
    else:
        s_hvq = error.mean(1)
    s_mim = l1.mean(1)
    if cfg.mim_score == "whitened":
        s_mim = sum(distances(x[:, None], one)[:, 0] for x, one in zip(histogram.unbind(1), normal["histograms"]))
    seen = masks.to(l1.dtype)                        # a token that no mask hides is as abnormal as its photo
    return s_hvq, s_mim, error, torch.where(masks.any(0), l1 @ seen / seen.sum(0).clamp(min=1), l1.mean(1, keepdim=True))


def calibrate(s_hvq, s_mim, hvq_map, mim_map) -> dict:
    """Mean and standard deviation of scores and maps over the validation normals of one category, never over test
    photos, and the 95th percentile of the final score."""
    found = {name: evaluation.moments(values.double().numpy()) for name, values in
             (("hvq", s_hvq), ("mim", s_mim), ("hvq_map", hvq_map), ("mim_map", mim_map))}
    found["threshold"] = evaluation.threshold(combine(found, s_hvq, s_mim))
    return found


def combine(calibration: dict, s_hvq, s_mim, part=""):
    """S = S'_HVQ + S'_MIM, each standardised; with part = "_map" the same of the maps."""
    (m1, d1), (m2, d2) = calibration["hvq" + part], calibration["mim" + part]
    return (s_hvq - m1) / d1 + (s_mim - m2) / d2


def scoring_masks(cfg: Config, seed: int, device) -> torch.Tensor:
    """The M masks (M, N) that every photo of a run is scored with; checkerboards are six, whatever --masks says."""
    return draw_masks(cfg, cfg.masks, seeded(seed, "scoring masks"), scoring=True).to(device)


def all_errors(hvq: HVQ, mim: ViT, cfg: Config, h0, index: torch.Tensor, masks, pixels=None, batch: int = 8):
    """`errors` of the photos numbered by index, h0(index) and pixels(index) as in training, on the CPU."""
    progress, (rank, size), starts = Progress("scoring", len(index), "photos"), processes(), range(0, len(index), batch)
    tokens = (cfg.grid ** 2, hvq.embed.in_features) if cfg.hvq_score == "whitened" else (cfg.grid ** 2,)
    histogram = (cfg.levels, cfg.codes) if cfg.mim_score == "whitened" else (0,)
    found = [torch.zeros(len(index), *columns, device=masks.device) for columns in (tokens, (len(masks),), histogram)]
    for start in starts[rank::size]:                 # the others' rows stay zero until all are added up
        part = index[start:start + batch].to(masks.device)
        for all_values, values in zip(found, errors(hvq, mim, cfg, h0(part), masks, pixels=pixels and pixels(part))):
            all_values[start:start + batch] = values
        progress(min(len(index), start + size * batch))
    add_up(found)
    return [values.cpu() for values in found]


# Command line

def git_commit() -> str:
    """The commit of this code, "-dirty" behind it where the files differ, or "" outside git."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    except OSError:                                  # no git on this machine
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def pick_device(name: str | None) -> torch.device:
    if name in (None, "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        raise InputError("--device cuda: this machine has no CUDA GPU that torch can use; leave the option out for the CPU")
    return torch.device("cpu")


def standardised(features: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, device):
    """-> h0(index): the features (B, N, d0) of the photos numbered by index, each channel by the training set's
    statistics."""
    mean, std = mean.to(device), std.to(device)
    return lambda index: (features[index.to(features.device)].to(device).float() - mean) / std


def channel_statistics(features, n: int, batch: int = 64):
    """Mean and standard deviation (d0,) of each channel over the first n photos' tokens, summed in float64."""
    total = square = count = 0
    for index in torch.arange(n, device=features.device).split(batch):
        part = features[index].double().flatten(0, 1)                             # (B*N, d0)
        total, square, count = total + part.sum(0), square + part.square().sum(0), count + len(part)
    mean = total / count
    return mean.float(), (square / count - mean.square()).clamp(min=1e-12).sqrt().float()


def seed_list(text: str) -> list[int]:
    """ "3", "0-4" or "0,3,7" -> the seeds."""
    seeds = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and len(last) < 19 and int(first) <= int(last) < int(first) + 1000):
            raise argparse.ArgumentTypeError(f"{text!r} is not a seed (0 or more), a range as in 0-4 or a list as in 0,3,7")
        seeds += range(int(first), int(last) + 1)
    return list(dict.fromkeys(seeds))


def find_data(args) -> tuple[Path, list[str]]:
    """The folder that holds the category folders, and the categories asked for. Renders the twin where there is no
    data."""
    asked = sorted(set(args.category.split(",")))
    root = Path(args.data or "data/mvtec_loco_anomaly_detection")
    if not args.data and not (root.is_dir() if asked == ["all"] else all((root / name).is_dir() for name in asked)):
        root = Path("data/rendered")
        missing = [name for name in (data.SCENES if asked == ["all"] else asked) if not (root / name).is_dir()]
        if missing:
            print("data: none given, so the rendered twin of MVTec LOCO is drawn", flush=True)
        for name in missing:
            data.render(root, name)
    return root, data.list_categories(root) if asked == ["all"] else asked


def find_features(photos, cfg: Config, cache: Path, device, pdn: nn.Module | None = None):
    """-> features (n, N, d0) float16 of the photos that can be read, these photos, and how many could not. Without a PDN,
    the photos' `patches` (n, N, 48) instead."""
    key = hashlib.blake2b(digest_size=16)
    for weight in pdn.state_dict().values() if pdn else ():
        key.update(weight.cpu().contiguous().numpy().tobytes())
    key, shape = (f"{key.hexdigest()}-{cfg.grid}", pdn[-1].out_channels) if pdn else (f"patches-{cfg.grid}", 48)
    pdn = pdn and pdn.to(device, memory_format=torch.channels_last)

    def look(images):
        return (extract(pdn, images.to(device), cfg.grid) if pdn else patches(images, cfg.grid)).cpu()

    def compute(photos):
        return data.cached_features([photo.path for photo in photos], cfg.image_size, key, look, cache,
                                    (cfg.grid ** 2, shape),
                                    progress=Progress("features" if pdn else "patches", len(photos), "photos"))

    rank, size = processes()
    if size > 1:                                     # each puts its share into the cache, then all read all of it
        with contextlib.suppress(data.BadPhotos):
            compute(photos[rank::size])
        dist.barrier()
    try:
        return compute(photos), photos, 0
    except data.BadPhotos as error:                  # every bad photo costs a line, not the run
        for reason in error.reasons.values():
            print(f"warning: {reason}", file=sys.stderr)
        good = [photo for photo in photos if photo.path not in error.reasons]
        for name in sorted({photo.category for photo in photos}):
            if {"train", "validation"} - {photo.split for photo in good if photo.category == name}:
                raise InputError(f"{name}: no training or no validation photo is left that can be read; see the warnings "
                                 "above") from None
        return compute(good), good, len(error.reasons)


def train(args) -> int:
    """Every run asked for, in turn. Exit code 1 where a photo could not be read."""
    device = pick_device(args.device)
    args.preset = args.preset or ("fast" if device.type == "cuda" else "tiny")
    cfg = Config(**PRESETS[args.preset] | {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)
                                           if getattr(args, f.name) is not None})
    check_settings(cfg)
    if Path(args.cache).exists() and not Path(args.cache).is_dir():
        raise InputError(f"--cache {args.cache}: is a file; name a folder")
    load_pdn(cfg.pdn, args.seeds[0])                 # a wrong file is better named before the twin is drawn
    with joined(device):
        if cfg.compile == "on":
            try:
                compiled(cfg, torch.neg, device)(torch.ones(2, device=device))
            except Exception as error:               # no compiler, or one that does not fit: each fails in its own way
                why = " ".join(str(error).split())[:120]
                raise InputError(f"--compile on: torch.compile does not work here ({why}); leave the option out") from None
        with first_process_first():
            root, names = find_data(args)
        runs = [(group, seed) for group in ([[name] for name in names] if args.separate else [names]) for seed in args.seeds]
        if args.out and len(runs) > 1:
            raise InputError(f"--out {args.out}: is the folder of one run, and {len(runs)} are asked for; leave it out")
        code = max([train_run(args, cfg, root, group, seed, device, len(runs) > 1) for group, seed in runs])
        if len(runs) > 1:
            print(f"{len(runs)} runs are done. `python eval.py` takes those that differ in the seed alone as one row, mean ± "
                  "std, and adds the mean over the categories")
    return code


# Settings that say how a trained run scores, and those of its ViT: other runs may take over what does not depend on them.
SCORING = {"hvq_score", "mim_score", "masks", "score_ratio", "score_block"}
MIM = {"mim_width", "mim_blocks", "mim_heads", "mim_dropout", "mim_epochs", "mim_warmup", "mim_batch", "mim_lr", "mask",
       "train_ratio", "train_block", "target"}


def take_over(run: Run, cfg: Config, source: Path):
    """Starts a run with what a finished one has learned, as far as their settings agree: HVQ-Trans, or both models."""
    if not (source / "checkpoint.pt").exists():
        raise InputError(f"--take {source}: holds no checkpoint.pt; name a finished run")
    state = load_checkpoint(source / "checkpoint.pt")
    held = dataclasses.asdict(Config()) | state["config"]
    differ = {name for name, value in dataclasses.asdict(cfg).items() if held[name] != value}
    if state["stage"] != "done" or held["seed"] != run.seed or differ - SCORING - MIM or not (
            torch.equal(state["mean"], run.state["mean"]) and torch.equal(state["std"], run.state["std"])):
        why = ", ".join(sorted(differ - SCORING - MIM)) or "its photos, backbone or seed, or that it is not finished"
        raise InputError(f"--take {source}: differs from this run in {why}; leave the option out")
    whole = not differ - SCORING
    run.state.update(stage="taken whole" if whole else "hvq taken", hvq=state["hvq"],
                     metrics=[line for line in state["metrics"] if line["stage"] in ("hvq", "mim" if whole else "hvq")])
    if whole:
        run.state["mim"] = state["mim"]
    run.write_metrics()


def train_run(args, cfg: Config, root: Path, names: list[str], seed: int, device, one_of_many: bool) -> int:
    """One run: photos, features, both stages, scores, table. one_of_many: if it was finished before, only the table."""
    category = "all" if args.category == "all" and not args.separate else ",".join(names)
    rendered = any((root / name / data.RENDERED_MARK).exists() for name in names)
    settings = {"data": root.resolve().name, "root": str(root.resolve()), "rendered": rendered, "category": category,
                "preset": args.preset, "seed": seed, "commit": git_commit(), "device": device.type,
                "torch": str(torch.__version__), **dataclasses.asdict(cfg)}
    folder = Path(args.out or f"runs/{settings['data']}/{category}-{args.preset}-seed{seed}")
    run = Run(folder, settings) if (folder / "checkpoint.pt").exists() else None
    if run and one_of_many and as_first(run.state["config"]["root"] == settings["root"] and bool(run.tested())):
        report(run)
        return 0
    pdn, backbone = load_pdn(cfg.pdn, seed)
    photos = [photo for name in names for photo in data.find_photos(root, name, seed)]
    photos.sort(key=lambda photo: ("train", "validation", "test").index(photo.split))
    check_test_split(photos)
    print(f"data: {root}{' (RENDERED, not photographs)' if rendered else ''}\n{data.count_table(photos)}")
    for warning in data.check_photos(photos, root):
        print(f"warning: {data.printable(warning)}", file=sys.stderr)
    print(f"backbone: {backbone}; device: {device}", flush=True)
    features, photos, bad = find_features(photos, cfg, Path(args.cache), device, pdn)
    n = sum(photo.split == "train" for photo in photos)
    if features.nbytes < 2 ** 33:                    # more stays where it is, and travels batch by batch
        features = features.to(device)
    mean, std = channel_statistics(features, n)

    run = run or Run(folder, settings)               # no folder before the photos are known to be readable
    if "mean" in run.state and not (torch.equal(run.state["mean"], mean.cpu()) and torch.equal(run.state["std"], std.cpu())):
        raise InputError(f"{run.folder}: the training photos or the backbone changed since this run began, or another version "
                         "held out other photos for validation; choose another --out or delete the folder")
    run.state.update(pdn=pdn.state_dict(), mean=mean.cpu(), std=std.cpu())
    h0 = standardised(features, mean, std, device)
    pixels = None
    if cfg.target == "pixel":
        cells, _, _ = find_features(photos, cfg, Path(args.cache), device)
        cells = cells.to(features.device)
        pixels = standardised(cells, torch.zeros(1), torch.ones(1), device)
    if args.take and not run.state["stage"]:
        take_over(run, cfg, Path(args.take))
    hvq = train_hvq(run, cfg, h0, n, device)
    mim = train_mim(run, cfg, hvq, h0, n, device, pixels)
    if as_first(run.tested() != {photo.path.relative_to(root).as_posix() for photo in photos if photo.split != "train"}):
        write_scores(run, cfg, root, photos, hvq, mim, h0, device, pixels)
    report(run)
    return 1 if bad else 0


def check_test_split(photos):
    """A test split of one kind only gives no AUROC; better said now than after the training. None at all is fine: own
    photos are often good ones only."""
    for name in sorted({photo.category for photo in photos}):
        labels = {photo.label for photo in photos if photo.category == name and photo.split == "test"}
        if len(labels) == 1:
            lacks = "anomalies: put some in test/NAME_OF_THE_DEFECT" if labels == {0} else "good photos: put some in test/good"
            raise InputError(f"{name}: its test split has no {lacks}, or take the test folder away to train without figures")


def write_scores(run: Run, cfg: Config, root: Path, photos, hvq: HVQ, mim: ViT, h0, device, pixels=None):
    """Scores the photos, calibrates each category on its own normals, writes scores.csv and the final checkpoint."""
    began, masks, rows = time.monotonic(), scoring_masks(cfg, run.seed, device), []
    learns = "whitened" in (cfg.hvq_score, cfg.mim_score)
    maps, index = [], torch.tensor([i for i, photo in enumerate(photos) if learns or photo.split != "train"])
    found = all_errors(hvq, mim, cfg, h0, index, masks, pixels)
    scored = [photos[i] for i in index]
    run.state["calibration"] = {}
    for name in sorted({photo.category for photo in photos}):
        train, validation, tested = (torch.tensor([i for i, photo in enumerate(scored) if photo.category == name and
                                                   photo.split in splits], dtype=torch.long)
                                     for splits in (("train",), ("validation",), ("validation", "test")))
        normal = learn_normal(cfg, *([part[split] for part in found] for split in (train, validation)))
        normal |= calibrate(*detect(cfg, [part[validation] for part in found], masks.cpu(), normal))
        s_hvq, s_mim, *where = detect(cfg, [part[tested] for part in found], masks.cpu(), normal)
        maps += zip(*((part - normal[key][0]) / normal[key][1] for part, key in zip(where, ("hvq_map", "mim_map"))))
        for i, *scores in zip(tested, s_hvq, s_mim, combine(normal, s_hvq.double(), s_mim.double())):
            photo = scored[i]
            rows.append([photo.path.relative_to(root).as_posix(), photo.split, photo.kind, photo.label,
                         *(f"{float(value):.9g}" for value in scores)])
        run.state["calibration"][name] = normal
    table = io.StringIO(newline="")
    csv.writer(table).writerows([evaluation.HEADER, *rows])
    maps = np.array([torch.stack(pair).numpy() for pair in maps], np.float32).reshape(-1, 2, cfg.grid, cfg.grid)
    content = io.BytesIO()                           # each photo's structural and logical map, for eval.py
    np.savez_compressed(content, path=np.array([row[0] for row in rows]), maps=maps)
    if run.writes:
        write_whole(run.folder / "maps.npz", content.getvalue())
        write_whole(run.folder / "scores.csv", table.getvalue().encode("utf-8", "surrogateescape"))
    run.log(stage="score", photos=len(index), seconds=round(time.monotonic() - began, 3))
    run.save(stage="done", optimizer=None)


def report(run: Run):
    """What the run's codebooks and scores look like."""
    if not run.writes:
        return
    for line in [line for line in run.state["metrics"] if line["stage"] == "hvq"][-1:]:
        health = enumerate(zip(line["codes_used"], line["perplexity"]), 1)
        print("codebooks: " + "; ".join(f"level {level}: {used} codes in use, perplexity {perplexity}"
                                        for level, (used, perplexity) in health))
    print(f"run: {run.folder}\n{evaluation.run_table(run.folder)}")


# Prediction

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
    calibration: dict

    @torch.inference_mode()
    def look(self, images: np.ndarray):
        """images (B, H, W, 3) uint8, as data.load_image gives them -> h0 (B, N, d0), pixels (B, N, 48) if they are the
        target; both halved as in the cache."""
        images = torch.from_numpy(images).to(self.mean.device)
        h0 = (extract(self.pdn, images, self.cfg.grid).half().float() - self.mean) / self.std
        return h0, patches(images, self.cfg.grid).half().float() if self.cfg.target == "pixel" else None

    @torch.inference_mode()
    def __call__(self, images: np.ndarray):
        """images as for `look` -> S'_HVQ (B,), S'_MIM (B,), their sum, and the heat map (B, N), the sum of both standardised
        maps."""
        c, (h0, pixels) = self.calibration, self.look(images)
        found = [part.cpu() for part in errors(self.hvq, self.mim, self.cfg, h0, self.masks, pixels=pixels)]
        s_hvq, s_mim, *maps = detect(self.cfg, found, self.masks.cpu(), c)
        return ((s_hvq - c["hvq"][0]) / c["hvq"][1], (s_mim - c["mim"][0]) / c["mim"][1], combine(c, s_hvq, s_mim),
                combine(c, *maps, part="_map").numpy())


def load_detector(folder: Path, category: str | None, device: torch.device) -> Detector:
    if not (folder / "checkpoint.pt").exists():
        raise InputError(f"--run {folder}: holds no checkpoint.pt; train one with `python ladmim.py train`")
    state = load_checkpoint(folder / "checkpoint.pt")
    if state["stage"] != "done":
        raise InputError(f"--run {folder}: its training is not finished; run the same train command again, it goes on")
    known = sorted(state["calibration"])
    if category not in known and (category or len(known) > 1):
        raise InputError(f"--category {category or '(not given)'}: this run knows {', '.join(known)}; name one")
    cfg = Config(**{f.name: state["config"][f.name] for f in dataclasses.fields(Config) if f.name in state["config"]})
    pdn, _ = pdn_from_state(state["pdn"], str(folder))
    hvq, mim = HVQ(cfg, len(state["mean"])), ViT(cfg, len(state["mean"]))
    hvq.load_state_dict(state["hvq"])
    mim.load_state_dict(state["mim"])
    for model in (pdn, hvq, mim):
        model.to(device).eval().requires_grad_(False)
    return Detector(cfg, pdn, hvq, mim, state["mean"].to(device), state["std"].to(device),
                    scoring_masks(cfg, state["config"]["seed"], device), state["calibration"][category or known[0]])


def predict(args) -> int:
    """One line a photo: score, verdict, and which detector saw more. Exit code 1 where a photo could not be read."""
    detector = load_detector(Path(args.run), args.category, pick_device(args.device))
    paths, bad = data.find_images([Path(p) for p in args.images]), 0
    threshold = detector.calibration["threshold"]
    names = data.flat_names(paths)
    if args.heatmap:
        if Path(args.heatmap).resolve() in {path.resolve().parent for path in paths}:
            raise InputError(f"--heatmap {args.heatmap}: holds the photos themselves; name another folder")
        try:
            Path(args.heatmap).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--heatmap {args.heatmap}: cannot be made ({error.strerror}); name another folder") from None
    batch = []

    def flush():
        for (path, name, image), hvq, mim, total, heat in zip(batch, *detector(np.stack([b[2] for b in batch]))):
            verdict = "good" if total <= threshold else "anomaly"         # NaN, too
            detail = {"path": str(path), "score": round(float(total), 4), "threshold": round(threshold, 4), "verdict": verdict,
                      "s_hvq": round(float(hvq), 4), "s_mim": round(float(mim), 4),
                      "decided": "structural" if hvq >= mim else "logical"}
            print(json.dumps(detail) if args.json else
                  f"{verdict:7} {total:8.2f}  (structural {hvq:.2f}, logical {mim:.2f})  {data.printable(str(path))}")
            if args.heatmap:
                picture = draw_heat(path, heat, detector.cfg)
                try:
                    picture.save(Path(args.heatmap) / f"{name}.png")
                except OSError as error:
                    raise InputError(f"--heatmap {args.heatmap}: {name}.png cannot be saved ({error.strerror}); free some "
                                     "space or name another folder") from None
        batch.clear()

    for path, name, image in zip(paths, names, data.load_images(paths, detector.cfg.image_size)):
        if isinstance(image, InputError):
            print(f"error: {image}", file=sys.stderr)
            bad += 1
            continue
        batch.append((path, name, image))
        if len(batch) == 8:
            flush()
    if batch:
        flush()
    return 1 if bad else 0


def draw_heat(path: Path, heat: np.ndarray, cfg: Config) -> Image.Image:
    """The photo, at most 1024 pixels a side, under its heat map (N,)."""
    photo = data.open_image(path)
    photo.thumbnail((1024, 1024))
    return evaluation.overlay(photo, heat.reshape(cfg.grid, cfg.grid), cfg.image_size)


# The options

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ladmim.py", description="Logical anomaly detection with masked image modeling.")
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("train", help="train both detectors on good photos, score validation and test photos")
    p.add_argument("--category", required=True, help="a category's folder name, a comma list or all: one model for all of them")
    p.add_argument("--separate", action="store_true", help="a run for each of these categories instead")
    p.add_argument("--data", help="the folder that holds the category folders (default: data/mvtec_loco_anomaly_detection, "
                                  "or the rendered twin where there is none)")
    p.add_argument("--preset", choices=PRESETS, help="default: fast with a GPU, tiny without")
    p.add_argument("--seed", "--seeds", dest="seeds", type=seed_list, default=[0], metavar="SEED",
                   help="a number, or several as in 0-4 or 0,3,7: a run for each, one after the other; finished ones are "
                        "skipped. Runs are independent: a scheduler (xargs -P, a SLURM array) can start each with its own "
                        "--category and --seed")
    p.add_argument("--out", help="run folder (default: runs/DATA/CATEGORY-PRESET-seedN)")
    p.add_argument("--take", metavar="RUN", help="take over what this finished run has learned, as far as the settings agree")
    p.add_argument("--cache", default="cache", help="folder of cached features (default: cache)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    settings = p.add_argument_group("settings (default: the preset's)")
    for f in dataclasses.fields(Config):
        settings.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), choices=f.metadata.get("options"))

    p = commands.add_parser("predict", help="score photos with a trained run")
    p.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    p.add_argument("--run", required=True, help="run folder")
    p.add_argument("--category", help="where the run knows several")
    p.add_argument("--heatmap", metavar="DIR", help="write heat maps there")
    p.add_argument("--json", action="store_true", help="one JSON object a line")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")

    p = commands.add_parser("distill", help="train a PDN backbone to predict a teacher's features")
    p.add_argument("--images", required=True, metavar="DIR_OR_TAR", help="photos of anything, thousands of them")
    p.add_argument("--teacher", default="efficientnet-lite0", help="efficientnet-lite0 (default) or a TorchScript file that "
                                                                   "maps a batch to a list of (feature map, stride)")
    p.add_argument("--out", required=True, metavar="FILE", help="weights to write; while training, FILE.part beside it")
    p.add_argument("--size", choices=("small", "medium"), default="small")
    p.add_argument("--start", metavar="FILE", help="weights to start from (default: random)")
    p.add_argument("--steps", type=int, default=20_000, help="0 only measures --start")
    p.add_argument("--batch", type=int, default=8, help="crops a step")
    p.add_argument("--crop", type=int, default=160, help="pixels a side, a multiple of 32")
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 with a GPU, fp32 without")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    try:
        if args.command == "distill":
            from weights.distill import distill
            return distill(args)
        return (train if args.command == "train" else predict)(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(data.as_process(main))
