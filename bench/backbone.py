"""What a backbone sees: python bench/backbone.py --pdn FILE... --data DIR --category NAME,...

AUROC of two detectors that train no network: PatchCore, for texture and parts, and the Mahalanobis
distance of a photo's mean token, for what is in it. With --teacher and --images also the share of
each teacher map's variance that is a linear function of the backbone's channels, and the teachers'
own AUROC. Exit code 1: a photo could not be read."""
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import backbone  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import runs  # noqa: E402
import scores  # noqa: E402
from bench.patchcore import patchcore  # noqa: E402
from weights.teachers import INNER, Corpus, as_photo, linear_fit, load_teacher, look  # noqa: E402

SIZE, CROPS = 224, 300                 # pixels a side of a photo; crops that a readout is fitted to


@torch.inference_mode()
def judge(tokens: torch.Tensor, photos: list) -> dict[str, list[str]]:
    """tokens (n, N, d) of n photos -> for each kind of anomaly the AUROC in percent of PatchCore
    and of the Mahalanobis distance."""
    train, test = (torch.tensor([i for i, photo in enumerate(photos) if photo.split == split])
                   for split in ("train", "test"))
    kinds, normal = np.array([photos[i].kind for i in test]), tokens[train].float()
    mean, std = normal.mean((0, 1)), normal.std((0, 1)).clamp(min=1e-6)

    def standardised(index):
        return (tokens[index].float() - mean) / std

    nearest, *_ = patchcore(standardised, train, test)
    means = standardised(torch.arange(len(photos))).mean(1, keepdim=True)         # (n, 1, d)
    far = scores.distances(means[test], scores.whitening(means[train]))[:, 0].numpy()
    first, second = evaluation.aurocs(kinds, nearest), evaluation.aurocs(kinds, far)
    return {kind: [f"{100 * first[kind]:.1f}", f"{100 * second[kind]:.1f}"] for kind in first}


def teacher_tokens(teacher, name: str, photos: list, args, device, white: int) -> torch.Tensor:
    """All maps of a teacher at the student's positions, averaged to tokens: (n, N, d)."""
    def see(images):
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
        maps = torch.cat(look([teacher], x, "fp32", slice(None)), 1)
        return F.avg_pool2d(maps, maps.shape[-1] // args.grid).flatten(2).transpose(1, 2)

    key = Path(name).read_bytes() if Path(name).is_file() else name.encode()
    width = see(np.zeros((1, SIZE, SIZE, 3), np.uint8)).shape[2]
    seen, _ = backbone.cached_features(
        [photo.path for photo in photos], SIZE, f"teacher {hashlib.blake2b(key).hexdigest()}",
        lambda images: see(images).half().cpu().numpy(), (args.grid ** 2, width), args.cache,
        runs.Progress(f"features of {name}", len(photos), "photos"), white=white)
    return torch.from_numpy(seen)


@torch.inference_mode()
def explained(pdns, teachers, corpus: Corpus, device) -> list[list[float]]:
    """For each PDN and teacher map: the share of the map's variance, each channel standardised,
    that a linear readout of the PDN's channels explains, on crops of photos it has not seen."""
    def some(block):                                 # (1, c, P, P) -> (81, c)
        return block[0, :, ::5, ::5].flatten(1).T.cpu()

    crops = [as_photo(corpus.crop(0, -1 - number)) for number in range(CROPS)]
    crops += corpus.measuring_crops().split(1)
    truth, seen, progress = [], [[] for _ in pdns], runs.Progress("looking", len(crops), "crops")
    for number, x in enumerate(crops, 1):
        x = x.to(device)
        truth.append([some(block) for block in look(teachers, x, "fp32")])
        for pdn, rows in zip(pdns, seen):
            rows.append(some(pdn(backbone.imagenet(x))[..., INNER, INNER]))
        progress(number)
    cut, shares = CROPS * len(truth[0][0]), []
    for rows in map(torch.cat, seen):
        shares.append([])
        for y in map(torch.cat, zip(*truth)):
            y = (y - y[:cut].mean(0)) / y[:cut].std(0).clamp(min=1e-6)
            weight, bias = linear_fit(rows[:cut].clone(), y[:cut], 1e-4)
            missed = (rows[cut:] @ weight + bias - y[cut:]).square().mean(0).sum()
            shares[-1].append(1 - float(missed / y[cut:].var(0, correction=0).sum()))
    return shares


def measure(args) -> int:
    device = runs.pick_device(args.device)
    if bool(args.teacher) != bool(args.images):
        raise data.InputError("--teacher and --images: give both, or neither")
    if args.grid < 1 or backbone.positions(SIZE) % args.grid:
        raise data.InputError(f"--grid {args.grid}: must divide {backbone.positions(SIZE)}")
    root, names = data.find_data(args.data, args.category)
    pdns = {name: backbone.load_pdn(name, 0)[0].to(device) for name in args.pdn}
    teachers = {name: load_teacher(name, device) for name in args.teacher}
    corpus, bad = Corpus(args.images) if teachers else None, False
    for name in names:
        photos, judged = data.find_photos(root, name, 0), {}
        data.check_test_split(photos, needed=True)
        trained = [photo.path for photo in photos if photo.split == "train"]
        white = max(data.deeper(trained).values(), default=0)
        for file, pdn in pdns.items():
            seen, left, at, _ = backbone.find_features(photos, pdn, SIZE, args.grid, False,
                                                       device, args.cache, white)
            judged[file], bad = judge(seen[at], left), bad or len(left) < len(photos)
        for file, teacher in teachers.items():
            judged[file] = judge(teacher_tokens(teacher, file, left, args, device, white), left)
        rows = [[file, *figures.values()] for file, figures in judged.items()]
        print(evaluation.markdown(f"{name}: AUROC % of PatchCore / Mahalanobis distance",
                                  ["backbone", *judged[file]], rows), flush=True)
    if teachers:
        shares = explained(pdns.values(), teachers.values(), corpus, device)
        rows = [[file, *(f"{share:.3f}" for share in row)] for file, row in zip(pdns, shares)]
        header = [f"map {number}" for number in range(1, len(shares[0]) + 1)]
        print(evaluation.markdown("Explained variance of " + ", ".join(args.teacher),
                                  ["backbone", *header], rows))
    return int(bad or bool(corpus and corpus.bad))


def parse(argv):
    parser = data.Parser(prog="bench/backbone.py", description="What a backbone sees.")
    add = parser.add_argument
    add("--pdn", nargs="+", default=[backbone.SHIPPED], metavar="FILE",
        help='files, or "random" (default: the shipped weights)')
    add("--data", help="folder of the category folders (default: as ladmim.py's)")
    add("--category", required=True, help="a folder's name, a comma list or all")
    add("--grid", type=int, default=12, help="tokens a side (default: 12)")
    add("--teacher", nargs="+", default=[], help="as distill.py's")
    add("--images", nargs="+", default=[], metavar="DIR_OR_TAR", help="as distill.py's")
    add("--cache", type=Path, default=Path("cache"), help="of features (default: cache)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return data.run_command(lambda: measure(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
