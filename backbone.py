"""The frozen backbone: EfficientAD's Patch Description Network (PDN), and features from it.

It is not LADMIM's own. A PDN sees 33 pixels, every 4 pixels, and never any padding. Its output is
averaged to grid x grid tokens of d0 = 384 channels. There is no augmentation, so each photo's
features are computed once and kept, as float16, in the cache."""
import hashlib
import io
import math
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import data
from data import InputError
from options import ROOT, SHIPPED
from runs import Job, Progress, first_process_first, in_precision, load_file

FIELD, STRIDE, CHANNELS = 33, 4, 384   # receptive field and stride in pixels, d0
PATCH = 4 * 4 * 3                      # numbers of a token's patch of the photo
CACHE_FORMAT = 2                       # raise it when photos are read in another way


# Where it looks

def positions(image_size: int) -> int:
    """Positions a side of the PDN's output: 48 for 224 pixels."""
    return (image_size - FIELD) // STRIDE + 1


def token_centres(image_size: int, grid: int) -> np.ndarray:
    """(grid,) where each token's receptive field is centred, in pixels of the resized photo."""
    pooled = positions(image_size) // grid           # positions a token, one way
    return FIELD / 2 + STRIDE * ((pooled - 1) / 2 + pooled * np.arange(grid))


def place(tokens, image_size: int, height: int, width: int) -> np.ndarray:
    """tokens (g, g), one value a token of a photo that was squashed to image_size pixels a side ->
    (height, width) float32 of the photo itself, bilinear between the tokens' centres. Beyond the
    outermost centres the outermost values hold."""
    grid = len(tokens)
    first, spacing = token_centres(image_size, grid)[0], STRIDE * (positions(image_size) // grid)
    weights = []
    for n in (height, width):
        at = ((np.arange(n) + 0.5) * image_size / n - first) / spacing              # in tokens
        at = np.clip(at, 0, grid - 1)[:, None]
        weights.append(np.maximum(0, 1 - np.abs(at - np.arange(grid))))             # (n, g)
    return (weights[0] @ np.asarray(tokens, np.float64) @ weights[1].T).astype(np.float32)


def overlay(photo: Image.Image, tokens, image_size: int) -> Image.Image:
    """The photo with unusual places in red: none below 3, full red from 12 on. Each map is in
    standard deviations of the validation normals; the sum of two maps is not."""
    heat = place(tokens, image_size, photo.height, photo.width)
    glow = Image.fromarray((np.clip((heat - 3) / 9, 0, 1) * 180).astype(np.uint8))
    return Image.composite(Image.new("RGB", photo.size, (255, 30, 0)), photo, glow)


def save_heatmap(file: Path, path: Path, tokens: np.ndarray, image_size: int, verdict: str,
                 white: int = 0):
    """Draws the photo at `path`, 1024 pixels a side at most, its heat map (N,) and the verdict."""
    photo, grid = data.open_image(path, white), math.isqrt(tokens.size)
    photo.thumbnail((1024, 1024))
    text = max(16, photo.height // 16)               # pixels
    sheet = Image.new("RGB", (2 * photo.width + 8, photo.height + 2 * text), "white")
    sheet.paste(photo, (0, 0))
    sheet.paste(overlay(photo, tokens.reshape(grid, grid), image_size), (photo.width + 8, 0))
    font = ImageFont.load_default(text * 3 // 4)
    ImageDraw.Draw(sheet).text((text // 2, photo.height + text // 2), verdict, "black", font)
    mark, content = PngImagePlugin.PngInfo(), io.BytesIO()
    mark.add_text("Software", data.DRAWN)
    sheet.save(content, "png", pnginfo=mark)
    data.write_whole(file, content.getvalue(), "free some space or give another --heatmap")


# The network

def build_pdn(size: str) -> nn.Sequential:
    """(B, 3, 224, 224) -> (B, 384, 48, 48). size: "small" or "medium"."""
    conv, relu, pool = nn.Conv2d, nn.ReLU, nn.AvgPool2d
    if size == "small":
        return nn.Sequential(conv(3, 128, 4), relu(), pool(2), conv(128, 256, 4), relu(), pool(2),
                             conv(256, 256, 3), relu(), conv(256, CHANNELS, 4))
    return nn.Sequential(conv(3, 256, 4), relu(), pool(2), conv(256, 512, 4), relu(), pool(2),
                         conv(512, 512, 1), relu(), conv(512, 512, 3), relu(),
                         conv(512, CHANNELS, 4), relu(), conv(CHANNELS, CHANNELS, 1))


def pdn_from_state(state: dict, whose: str) -> tuple[nn.Sequential, str]:
    """The PDN whose weights `state` holds, frozen, and which one it is. Layers may have any names,
    as the published files differ in them: their order and shapes decide."""
    weights = [value for value in state.values() if torch.is_tensor(value)]
    for size in ("small", "medium"):
        pdn = build_pdn(size)
        expected = pdn.state_dict()
        if [w.shape for w in weights] == [value.shape for value in expected.values()]:
            pdn.load_state_dict(dict(zip(expected, weights)))
            return pdn.eval().requires_grad_(False), f"PDN {size}"
    raise InputError(f"{whose}: holds no PDN small or medium (found: "
                     f"{', '.join(map(str, list(state)[:8])) or 'nothing'}); give a state dict of "
                     "EfficientAD's teacher, or leave the option out")


def load_pdn(name: str, seed: int, option="--pdn") -> tuple[nn.Sequential, str]:
    """name: file or "random". Returns the frozen PDN in float32 and its description. A file is
    checked against the SHA-256 beside it, where there is one."""
    if name == "random":
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            pdn = build_pdn("small").eval().requires_grad_(False)
            return pdn, "PDN small, random weights (control)"
    path = ROOT / name if name == SHIPPED else Path(name)
    if not path.is_file():
        raise InputError(f"{option} {name}: no such file; name another, or leave the option out")
    digest = path.with_name(f"{path.name}.sha256")
    if digest.is_file():
        expected = digest.read_text(errors="replace").split()[:1]
        if expected != [hashlib.sha256(path.read_bytes()).hexdigest()]:
            raise InputError(f"{option} {name}: damaged or replaced, its SHA-256 is not the one in "
                             f"{digest.name}; get the file again, or delete the .sha256 if the "
                             "change was meant")
    state = load_file(path, f"{option} {name}")
    pdn, kind = pdn_from_state(state if isinstance(state, dict) else {}, f"{option} {name}")
    return pdn, f"{kind}, from {name}"


# Features

def imagenet(x: torch.Tensor) -> torch.Tensor:
    """x (B, 3, H, W) in [0, 1] -> with ImageNet's mean and std taken out."""
    mean, std = x.new_tensor((0.485, 0.456, 0.406)), x.new_tensor((0.229, 0.224, 0.225))
    return (x - mean[:, None, None]) / std[:, None, None]


@torch.inference_mode()
def extract(pdn: nn.Module, images: torch.Tensor, grid: int) -> torch.Tensor:
    """images (B, H, W, 3) uint8 -> h0 before standardisation (B, N, d0) float32, N = grid ** 2."""
    x, last = imagenet(images.permute(0, 3, 1, 2).float().div_(255)), pdn[-1]
    x = pdn[:-1](x.contiguous(memory_format=torch.channels_last))    # small: (B, 256, 51, 51)
    # The last layer is linear: averaging its input, not its output, costs less.
    size = (x.shape[-1] - last.kernel_size[0] + 1) // grid           # positions a token, one way
    x = F.conv2d(F.avg_pool2d(x, size, 1), last.weight, last.bias, size)
    return x.flatten(2).transpose(1, 2).float()


@torch.inference_mode()
def patches(images: torch.Tensor, grid: int) -> torch.Tensor:
    """images (B, H, W, 3) uint8 -> (B, N, 48), what `--target pixel` predicts: around each token's
    centre 4x4 cells of mean colour, less the patch's mean, divided by its std."""
    cell = positions(images.shape[1]) // grid                        # pixels a side
    first = int(token_centres(images.shape[1], grid)[0] - 2 * cell)  # pixel of the first patch
    inner = slice(first, first + 4 * cell * grid)
    x = F.avg_pool2d(images[:, inner, inner].permute(0, 3, 1, 2).float(), cell)
    x = x.unflatten(3, (grid, 4)).unflatten(2, (grid, 4))            # (B, 3, grid, 4, grid, 4)
    x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    std = x.std(-1, correction=0, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (std + 1)       # + 1 grey level, for flat patches


def look(pdn: nn.Module, images: np.ndarray, grid: int, pixels: bool, device,
         precision: str = "fp32") -> torch.Tensor:
    """images (B, H, W, 3) uint8, as data.load_image gives them -> (B, N, d0) float16 features, with
    pixels also the patches: (B, N, d0 + 48). precision: of the backbone's products."""
    images = torch.from_numpy(images).to(device)
    with in_precision(precision, device):
        seen = extract(pdn, images, grid)
    return (torch.cat([seen, patches(images, grid)], -1) if pixels else seen).half()


class Features:
    """What the models see of n photos. seen: (N, d0), or (N, d0 + 48) with patches, for each photo
    found, as `look` gives it; mean and std (d0,) of the training photos standardise each channel;
    rows (n,): where each photo lies in seen; numbers (n,): of each photo's category, where each of
    the `categories` has codebooks of its own."""

    def __init__(self, seen: torch.Tensor, mean, std, device, rows: torch.Tensor | None = None,
                 numbers: torch.Tensor | None = None, categories: int = 1):
        self.seen, self.device, self.categories = seen, device, categories
        self.numbers = None if numbers is None else numbers.to(device)
        rows = torch.arange(len(seen)) if rows is None else rows
        self.rows, self.mean, self.std = rows.to(seen.device), mean.to(device), std.to(device)

    def h0(self, index: torch.Tensor) -> torch.Tensor:
        """(B, N, d0) of the photos numbered by index."""
        rows = self.rows[index.to(self.seen.device)]
        return (self.seen[rows, :, :CHANNELS].to(self.device).float() - self.mean) / self.std

    def own(self, index: torch.Tensor) -> torch.Tensor | None:
        """(B,), each photo's number of its category, or None where all share the codebooks."""
        return None if self.numbers is None else self.numbers[index.to(self.device)]

    def by_category(self, n: int) -> list[torch.Tensor]:
        """The first n photos' numbers: of each category with codebooks of its own, else of all."""
        if self.numbers is None:
            return [torch.arange(n)]
        return [(self.numbers[:n] == one).nonzero().squeeze(1) for one in range(self.categories)]

    def pixels(self, index: torch.Tensor) -> torch.Tensor | None:
        """(B, N, 48), or None where there are no patches."""
        if self.seen.shape[-1] == CHANNELS:
            return None
        rows = self.rows[index.to(self.seen.device)]
        return self.seen[rows, :, CHANNELS:].to(self.device).float()


def channel_statistics(seen: torch.Tensor, rows: torch.Tensor, batch: int = 64):
    """Mean and std (d0,) of each channel over the tokens of these rows, summed in float64."""
    total = square = count = 0
    for index in rows.to(seen.device).split(batch):
        part = seen[index, :, :CHANNELS].double().flatten(0, 1)      # (B*N, d0)
        total, square = total + part.sum(0), square + part.square().sum(0)
        count += len(part)
    mean = total / count
    variance = (square / count - mean.square()).clamp(min=1e-12)
    return mean.float(), variance.sqrt().float()


# The cache: one file a set of photos

def cached_features(paths: list[Path], size: int, key: str, compute, shape: tuple[int, int],
                    cache: Path, progress=lambda done: None, digests: list[bytes] = (), white=0):
    """-> features (n, N, d0) float16, and why photos could not be read, path -> message: their rows
    are NaN. Computed once, then read from the folder `cache`.

    compute: uint8 (16, size, size, 3) -> (16, N, d0); shape: (N, d0). The file is named by all the
    photos' bytes, the size, the shape, white and `key`, which must change with the backbone's
    weights: so no outdated file is used. It is memory-mapped: features may exceed the memory.
    digests: `photo_digests`, where they are known."""
    about = repr((CACHE_FORMAT, key, size, shape, *([white] if white else []))).encode()
    about = b"".join([about, *(digests or photo_digests(paths))])
    file = cache / f"{hashlib.blake2b(about, digest_size=20).hexdigest()}.features"
    whole, reasons = (len(paths), *shape), {}
    try:
        features = load_features(file, whole)
    except (OSError, ValueError):                  # there is none, or it is damaged
        features = fill_cache(file, whole, lambda: compute_features(paths, size, compute, shape,
                                                                    progress, white))
    for i in np.flatnonzero(np.isnan(features[:, 0, 0])):
        try:
            data.load_image(paths[i], size, white)
            reasons[paths[i]] = (f"{paths[i]}: could not be read when its features were computed; "
                                 f"delete {file} to try again")
        except InputError as error:
            reasons[paths[i]] = str(error)
    return features, reasons


def photo_digests(paths: list[Path]) -> list[bytes]:
    """Of each photo's bytes."""
    found = data.ahead(lambda path: hashlib.blake2b(data.read(path)).digest(), paths)
    return [b"unreadable" if isinstance(digest, InputError) else digest for digest in found]


def load_features(file: Path, shape: tuple) -> np.ndarray:
    """The features in `file`, mapped. Raises OSError or ValueError where they are not whole."""
    features = np.memmap(file, np.float16, "r", shape=shape)   # "c" would count as memory
    with open(file, "rb") as opened:
        opened.seek(features.nbytes)
        if opened.read() != hashlib.blake2b(features, key=file.stem.encode()).digest():
            raise ValueError
    return features


def fill_cache(file: Path, shape: tuple, computed) -> np.ndarray:
    """Writes the batches of features that computed() yields as `file`, whole or not at all. Where
    it cannot be written, they stay in memory."""
    unfinished = file.with_name(f"{file.stem}.{os.urandom(4).hex()}.part")
    digest = hashlib.blake2b(key=file.stem.encode())           # with the name: none is mistaken
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob(f"{'[0-9a-f]' * 40}.{'[0-9a-f]' * 8}.part"):       # by a kill
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > 86_400:
                    left.unlink()
        with open(unfinished, "wb") as opened:
            for values in computed():
                opened.write(values.tobytes())
                digest.update(values)
            opened.write(digest.digest())
        os.replace(unfinished, file)
        return load_features(file, shape)
    except OSError as error:
        data.tell(f"warning: {file.parent}: features cannot be kept there ({error.strerror}); "
                  "going on without")
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return np.concatenate([np.empty((0, *shape[1:]), np.float16), *computed()])


def compute_features(paths, size: int, compute, shape: tuple[int, int], progress, white):
    """Yields features in batches of 16 photos: (16, N, d0) float16."""
    done = 0
    for images in data.in_batches(data.load_images(paths, size, white), 16):
        values = np.full((len(images), *shape), np.nan, np.float16)
        good = [i for i, image in enumerate(images) if not isinstance(image, InputError)]
        if good:
            stack = [images[i] for i in good]
            stack += stack[-1:] * (16 - len(stack))        # last bits may depend on the size
            values[good] = np.asarray(compute(np.stack(stack)))[:len(good)]
            if not np.isfinite(values[good]).all():
                raise InputError(f"{paths[done + good[0]]} or one soon after it: the backbone "
                                 "gives features that are not finite or beyond float16's 65504; "
                                 "use other weights")
        done += len(images)
        progress(done)
        yield values


# A run's photos

def find_features(photos: list, pdn: nn.Module, image_size: int, grid: int, pixels: bool, device,
                  cache: Path, white: int = 0, precision: str = "fp32"):
    """-> what `look` gives of the photos (n, N, d0 or d0 + 48), the photos that can be read, and
    their rows in it, and a fingerprint of the training photos' bytes, the weights and the
    precision. Each photo that cannot be read costs a warning."""
    weights = b"".join(weight.cpu().numpy().tobytes() for weight in pdn.state_dict().values())
    key = hashlib.blake2b(weights, digest_size=16).hexdigest() + precision.removeprefix("fp32")
    pdn = pdn.to(device, memory_format=torch.channels_last)
    # Sorted, so that all seeds share one file, although each holds out other photos.
    paths, shape = sorted(photo.path for photo in photos), (grid ** 2, CHANNELS + PATCH * pixels)
    digests = photo_digests(paths)
    seen, reasons = cached_features(
        paths, image_size, key, lambda images: look(
            pdn, images, grid, pixels, device, precision).cpu().numpy(),
        shape, cache, Progress("features", len(paths), "photos"), digests, white)
    data.warn(reasons.values())
    left = [photo for photo in photos if photo.path not in reasons]
    for name in sorted({photo.category for photo in photos}):
        splits = {photo.split for photo in left if photo.category == name}
        if {"train", "validation"} - splits:
            raise InputError(f"{name}: no training or no validation photo is left that can be "
                             "read; see the warnings above")
    row = {path: number for number, path in enumerate(paths)}
    rows = [row[photo.path] for photo in left]
    trained = b"".join(digests[i] for i, photo in zip(rows, left) if photo.split == "train")
    fingerprint = hashlib.blake2b(f"{CACHE_FORMAT} {key}".encode() + trained, digest_size=20)
    return torch.from_numpy(seen), left, torch.tensor(rows), fingerprint.hexdigest()


def load_data_set(job: Job):
    """Finds, checks and counts a run's photos, and gets their features. -> photos, training ones
    first; how many these are; `Features` of all; what `Run.hold` keeps; how many are unreadable."""
    cfg, root, device = job.cfg, job.root, job.device
    if job.cache.is_file():
        raise InputError(f"--cache {job.cache}: is a file; name a folder")
    pdn, description = load_pdn(cfg.pdn, job.seed)
    photos = [photo for name in job.names for photo in data.find_photos(root, name, job.seed)]
    photos.sort(key=lambda photo: data.SPLITS.index(photo.split))
    data.check_test_split(photos)
    note = " (RENDERED, not photographs)" if job.config()["rendered"] else ""
    data.say(f"data: {data.printable(str(root))}{note}\n{data.count_table(photos)}")
    data.warn(data.check_photos(photos, root))
    data.say(f"backbone: {data.printable(description)}; device: {device}")
    deep = data.deeper([photo.path for photo in photos if photo.split == "train"])
    white = max(deep.values(), default=0)
    if deep:
        data.say(f"depth: {len(deep)} training photos have more than 8 bits, {white} is white (of "
                 "16-bit colour the upper 8 bits are read)")
        tops = {name: top for name in job.names if (top := max(
            deep.get(photo.path, 0) for photo in photos if photo.category == name))}
        if len({*tops.values()}) > 1:
            data.warn(["depth: " + ", ".join(f"{name} ends at {top}" for name, top in tops.items())
                       + "; if their cameras differ, add --separate"])
    data.warn_of_depth([photo.path for photo in photos if photo.split != "train"], white)
    with first_process_first():
        seen, left, rows, fingerprint = find_features(photos, pdn, cfg.image_size, cfg.grid,
                                                      cfg.target == "pixel", device, job.cache,
                                                      white, cfg.precision)
    n = sum(photo.split == "train" for photo in left)
    if device.type == "cuda" and seen.nbytes < torch.cuda.mem_get_info()[0] / 2:
        seen = seen.to(device)                       # more stays here, and travels batch by batch
    mean, std = channel_statistics(seen, rows[:n])
    fixed = {"fingerprint": fingerprint, "pdn": pdn.state_dict(), "mean": mean.cpu(),
             "std": std.cpu(), "white": white}
    own, names = cfg.category_codes == "own" and len(job.names) > 1, sorted(job.names)
    numbers = torch.tensor([names.index(photo.category) for photo in left]) if own else None
    features = Features(seen, mean, std, device, rows, numbers, len(names) if own else 1)
    return left, n, features, fixed, len(photos) - len(left)
