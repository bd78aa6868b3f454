"""HVQ-Trans as in the published code, for `--preset authors`: TSTB-dev/HVQ-Trans, commit ee24d2e.

`ladmim.HVQ` follows the paper's text. LADMIM's published code imports a tokenizer that it lacks.
This is the one of its authors' HVQ-Trans. It differs in what it quantises, in width, in its
codebooks and in its blocks:

  levels     h^4 is quantised as a condition only. The four levels are [h^3, z^4], [h^2, z^4],
             [h^1, z^4] and [h^0, z^4], where h^0 is the embedded input: the last one is local.
  width      64 in the encoder and of z^4, 128 in the decoder and of the other codes. There is no
             psi between an encoder and its codes.
  codebooks  Random at the start, then running means. A code that nobody uses is not revived, so
             few of the 512 stay in use.
  blocks     Each norm stands after its branch, ReLU, learned positions of row and column on the
             queries and keys of every layer. The decoder starts from the codes of [h^3, z^4].

Four things are not theirs: attention weights are not dropped (that would make a step slow on a
CPU); a codebook moves once a batch of B photos, by 0.99^B, not once a photo (in our trial one or
two codes a level were left); layers start with weights of their own, theirs as copies of one; and
only categories that are trained together have codebooks and an output layer each."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import nearest_own_code
from runs import add_up

FFN = 1024                             # width of each feed-forward's middle


class Layer(nn.Module):
    """Post-norm transformer layer: self-attention, and with two attentions cross-attention to z."""

    def __init__(self, width: int, heads: int, dropout: float, attentions: int):
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True)
                                        for _ in range(attentions))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(attentions + 1))
        self.ffn = nn.Sequential(nn.Linear(width, FFN), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(FFN, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, positions, z=None):
        """x and z (B, N, width), positions (N, width) -> (B, N, width)."""
        for attention, norm, seen in zip(self.attentions, self.norms, (x, z)):
            qkv = (x + positions).float(), (seen + positions).float(), seen.float()
            with torch.autocast("cpu", enabled=False):       # in bfloat16 slow there, see `ladmim`
                y, _ = attention(*qkv, need_weights=False)
            x = norm(x + self.drop(y))
        return self.norms[-1](x + self.drop(self.ffn(x)))


def of_own(x, categories: int, own):
    """x (B, N, C d0), own (B,) the number of each photo's category -> its part (B, N, d0)."""
    x = x.unflatten(-1, (categories, -1))
    return x.squeeze(2) if categories == 1 else x[torch.arange(len(x), device=x.device), :, own]


class Codebook(nn.Module):
    """K codes a category that follow the running mean of the vectors nearest to them."""

    def __init__(self, codes: int, width: int, decay: float, categories: int = 1):
        super().__init__()
        self.decay, self.size = decay, codes
        self.codes = nn.Parameter(torch.randn(categories * codes, width), requires_grad=False)
        self.register_buffer("count", torch.zeros(categories * codes))
        self.register_buffer("total", self.codes.clone())

    def forward(self, x, own=None):
        """x (B, N, width) -> z (B, N, width) with straight-through gradients, and codes (B, N)."""
        index = nearest_own_code(x.detach().float(), self.codes.split(self.size), own)
        return x + (self.codes[index] - x).detach(), index

    @torch.no_grad()
    def follow(self, x, index, own=None):
        """Moves the codes towards x (B, N, width), whose codes are index (B, N). -> how often each
        code was used, (C K,)."""
        flat = index.flatten().clamp(min=0)                          # -1 where the loss is NaN
        count = torch.zeros_like(self.count).index_add_(0, flat, torch.ones_like(flat).float())
        total = torch.zeros_like(self.total).index_add_(0, flat, x.flatten(0, 1).float())
        own = index.new_zeros(len(x)) if own is None else own
        photos = torch.zeros(len(count) // self.size, device=x.device)               # (C,)
        photos.index_add_(0, own, torch.ones_like(own, dtype=torch.float))
        add_up([count, total, photos])
        keep, photos = (part.repeat_interleave(self.size) for part in
                         (self.decay ** photos, photos.clamp(min=1)))
        self.count.mul_(keep).add_(count * (1 - keep) / photos)
        self.total.mul_(keep[:, None]).add_(total * (1 - keep)[:, None] / photos[:, None])
        n, eps = self.count.view(-1, self.size).sum(1).repeat_interleave(self.size), 1e-5
        smooth = (self.count + eps) / (n + self.size * eps) * n      # no code's count is zero
        seen = (n > 0)[:, None]                      # of a category that had a photo
        self.codes.copy_(torch.where(seen, self.total / smooth[:, None], self.codes))
        return count


class PublishedHVQ(nn.Module):
    """Made and used like `ladmim.HVQ`. cfg: `ladmim.Config`, where hvq_width is d = 64."""

    def __init__(self, cfg, d0: int, categories: int = 1):
        super().__init__()
        self.categories, self.size = categories, cfg.codes
        d, levels, heads, drop = cfg.hvq_width, cfg.levels, cfg.hvq_heads, cfg.hvq_dropout
        self.commitment = cfg.commitment
        self.embed = nn.Linear(d0, d)
        self.rows = nn.Parameter(torch.rand(cfg.grid, d // 2))
        self.columns = nn.Parameter(torch.rand(cfg.grid, d - d // 2))
        self.encoder = nn.ModuleList(Layer(d, heads, drop, 1) for _ in range(levels))
        # The condition's codebook is the last one.
        self.books = nn.ModuleList(Codebook(cfg.codes, width, cfg.ema_decay, categories)
                                   for width in [2 * d] * levels + [d])
        self.decoder = nn.ModuleList(Layer(2 * d, heads, drop, 2) for _ in range(levels))
        self.norm, self.out = nn.LayerNorm(2 * d), nn.Linear(2 * d, categories * d0)
        self.register_buffer("used", torch.zeros(levels + 1, categories * cfg.codes))  # this epoch

    def positions(self):
        """(N, d): a token's column, then its row."""
        grid = len(self.rows)
        return torch.cat([self.columns.repeat(grid, 1), self.rows.repeat_interleave(grid, 0)], -1)

    def quantise(self, h0, own=None):
        """h0 (B, N, d0) -> x what each codebook sees, z and codes: L of the levels [h^0, z^L] ..
        [h^(L-1), z^L], then the condition's."""
        h, positions = [self.embed(h0)], self.positions()
        for layer in self.encoder:
            h.append(layer(h[-1], positions))
        condition, index = self.books[-1](h[-1], own)
        x = [torch.cat([one, condition], -1) for one in h[:-1]]
        z, codes = zip(*(book(seen, own) for book, seen in zip(self.books, x)))
        return [*x, h[-1]], [*z, condition], [*codes, index]

    def decode(self, z, own=None):
        """z: L tensors (B, N, 2 d) -> rebuilt h0 (B, N, d0), from the deep level to the local."""
        x, positions = z[-1], self.positions().repeat(1, 2)
        for layer, codes in zip(self.decoder, reversed(z)):
            x = layer(x, positions, codes)
        return of_own(self.out(self.norm(x)), self.categories, own)

    def forward(self, h0, own=None):
        """h0 (B, N, d0) -> rebuilt h0 (B, N, d0), codes (B, L, N); level 1 is [h^0, z^L]."""
        _, z, codes = self.quantise(h0, own)
        return self.decode(z[:-1], own), torch.stack(codes[:-1], 1).fmod(self.size)

    def loss(self, h0, own=None):
        """Feature error, and the commitment of what every codebook sees. Moves the codebooks."""
        x, z, codes = self.quantise(h0, own)
        loss = F.mse_loss(self.decode(z[:-1], own), h0)
        for used, seen, book, index in zip(self.used, x, self.books, codes):
            loss = loss + self.commitment * F.mse_loss(seen, book.codes[index])
            used += book.follow(seen, index, own)
        return loss
