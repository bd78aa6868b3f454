"""SMAE and MAEDAY: what a masked autoencoder cannot guess from the rest of the photo is anomalous.

SMAE (Yao et al. 2022: siamese transition masked autoencoders) guesses the PDN's features. The
tokens are split in two halves at random. Two branches with the same weights each see one half and
guess the other. The original maps the latent codes of one half to the other; here the decoder does.
Loss and score are the squared error alone; a public re-implementation has the cosine in both.

MAEDAY (Schwartz et al. 2022) guesses pixels: patches of 16x16, a quarter of them visible. Error
over 32 masks. The original's autoencoder has learned ImageNet; this one starts from nothing.

Both are scored with the same masks for every photo, drawn from the run's seed: a map of the mean
error over the masks that hide a place, and the photo's score is the map's largest value."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from ladmim import Block
from bench.rival import Photos, Plan, as_input, fit, megabytes, milliseconds
from runs import seeded

SMAE = Plan(steps=20_000, every=250, batch=4, lr=5e-4, weight_decay=0.05)
MAEDAY = Plan(steps=20_000, every=500, batch=8, lr=5e-4, weight_decay=0.05)
PATCH = 16                              # pixels a side, MAEDAY's
VISIBLE = 0.25                          # share of MAEDAY's patches
PAIRS, MASKS = 8, 32                    # at scoring: SMAE's pairs of halves, MAEDAY's masks
BLUR = 1.4                              # pixels, of MAEDAY's map


class MaskedAutoencoder(nn.Module):
    """The encoder sees the visible tokens only; the decoder guesses all of them."""

    def __init__(self, channels: int, tokens: int, width=192, blocks=3, narrow=128, guessing=1):
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.encoder = nn.ModuleList(Block(width, 4, 0.0) for _ in range(blocks))
        self.narrow = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, narrow))
        self.hidden = nn.Parameter(torch.zeros(narrow))              # stands for a hidden token
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(tokens, narrow))
        self.decoder = nn.ModuleList(Block(narrow, 4, 0.0) for _ in range(guessing))
        self.out = nn.Sequential(nn.LayerNorm(narrow), nn.Linear(narrow, channels))

    def forward(self, x, visible):
        """x (B, N, C), visible (B, V) numbers of tokens -> guesses of all tokens (B, N, C)."""
        seen = self.embed(x) + self.positions                        # (B, N, width)
        seen = seen.gather(1, visible[..., None].expand(-1, -1, seen.shape[-1]))
        for block in self.encoder:
            seen = block(seen)
        seen = self.narrow(seen)                                     # (B, V, narrow)
        tokens = self.hidden.to(seen.dtype).expand(*x.shape[:2], -1)
        tokens = tokens.scatter(1, visible[..., None].expand_as(seen), seen)
        tokens = tokens + self.decoder_positions
        for block in self.decoder:
            tokens = block(tokens)
        return self.out(tokens)


def hides(visible, tokens: int) -> torch.Tensor:
    """visible (B, V) numbers of tokens -> (B, N, 1), 1.0 where a token is hidden."""
    hidden = torch.ones(len(visible), tokens, device=visible.device)
    return hidden.scatter(1, visible, 0.0)[..., None]


def token_error(guess: torch.Tensor, x: torch.Tensor, pixels: int = 1) -> torch.Tensor:
    """(B, N, C) -> (B, N, pixels), each token's or pixel's squared error, the channels' mean."""
    return (guess - x).square().unflatten(2, (-1, pixels)).mean(2)


def splits(count: int, tokens: int, share: float, both: bool, generator) -> torch.Tensor:
    """`count` random choices of a share of the tokens, (count, V); with `both`, each half is
    followed by the other, (2 * count, V). Of an odd number of tokens one is in neither."""
    order = torch.rand(count, tokens, generator=generator).argsort(1)
    visible = order[:, :max(1, int(share * tokens))]
    other = order[:, -visible.shape[1]:]
    return torch.stack([visible, other], 1).flatten(0, 1) if both else visible


def error_map(errors) -> torch.Tensor:
    """errors: for each mask its error (B, N, ...) and where it hides -> (B, N, ...) the mean error
    of the masks that hide a place; 0 where none does."""
    total = count = 0
    for error, hidden in errors:
        total, count = total + error * hidden, count + hidden
    return total / count.clamp(min=1)


def patches(x: torch.Tensor) -> torch.Tensor:
    """x (B, 3, S, S) -> (B, N, 3 * 16 * 16); what is left over at the right and below is cut."""
    side = x.shape[-1] // PATCH * PATCH
    return F.pixel_unshuffle(x[..., :side, :side], PATCH).flatten(2).transpose(1, 2)


def put_together(pixels: torch.Tensor) -> torch.Tensor:
    """Patches of one value a pixel (B, N, 256) -> (B, 16 g, 16 g)."""
    grid = round(pixels.shape[1] ** 0.5)
    return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, (grid, grid)), PATCH)[:, 0]


def blurred(maps: torch.Tensor) -> torch.Tensor:
    """maps (B, S, S), blurred by a Gaussian of 7x7 pixels."""
    row = torch.exp(-(torch.arange(-3, 4, device=maps.device) / BLUR).square() / 2)
    kernel = (row[:, None] * row) / row.sum().square()
    return F.conv2d(F.pad(maps[:, None], (3, 3, 3, 3), "reflect"), kernel[None, None])[:, 0]


def train_and_score(photos: Photos, label: str, plan: Plan, steps: int | None, inputs, see,
                    share: float, both: bool, count: int, pixels=1, finish=lambda maps: maps):
    """inputs(index), see(images) -> x (B, N, C), of photos by their numbers and of any images;
    share, both, count: of `splits`, count at scoring; pixels: of a token, each with an error of its
    own; finish: `error_map` (B, N, pixels) -> the map whose largest value is the score. -> what
    bench/baselines.py keeps."""
    name, first = label.lower(), len(photos.validation)
    tokens, channels = inputs(photos.train[:1]).shape[1:]
    torch.manual_seed(photos.seed)
    model = MaskedAutoencoder(channels, tokens).to(photos.device)

    def split(n, rng):
        return splits(n, tokens, share, both, rng).to(photos.device)

    masks = split(count, seeded(photos.seed, f"{name} scoring"))

    def loss(batch, rng):
        x, visible = inputs(batch), split(len(batch), rng)
        x = x.repeat_interleave(len(visible) // len(x), 0)           # SMAE: once for each half
        hidden = hides(visible, tokens)
        return (token_error(model(x, visible), x) * hidden).sum() / hidden.sum()

    def maps(x):
        each = (mask.expand(len(x), -1) for mask in masks)
        return finish(error_map((token_error(model(x, visible), x, pixels), hides(visible, tokens))
                                for visible in each)).flatten(1)

    def scored_maps():
        return torch.cat([maps(inputs(some)) for some in photos.scored.split(8)])

    def look():
        found = scored_maps()
        return float(found[:first].mean()), {"aurocs": photos.aurocs(found.amax(1).tolist())}

    trained = fit(photos, name, model, plan, loss, look, steps)
    with torch.inference_mode():
        scores = scored_maps().amax(1).tolist()
    return {"scores": {label: scores}, **trained, "megabytes": megabytes(model),
            "image": milliseconds(lambda images: maps(see(images)).amax(1), photos)}


def run_smae(photos: Photos, steps: int | None = None) -> dict:
    """-> what bench/baselines.py keeps of SMAE."""
    detector = photos.ladmim
    kept = train_and_score(photos, "SMAE", SMAE, steps, photos.features.h0,
                           lambda images: detector.look(images)[0], 0.5, True, PAIRS)
    kept["megabytes"] += megabytes(detector.pdn)
    return kept


def run_maeday(photos: Photos, steps: int | None = None) -> dict:
    """-> what bench/baselines.py keeps of MAEDAY."""
    return train_and_score(
        photos, "MAEDAY", MAEDAY, steps, lambda index: patches(photos.images(index)),
        lambda images: patches(as_input(images, photos.device)), VISIBLE, False, MASKS, PATCH ** 2,
        lambda maps: blurred(put_together(maps)))
