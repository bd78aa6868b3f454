"""Distillation of the backbone: geometry, teachers, corpora, resume, digests."""
import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from test_data import refused

import backbone
import runs
from weights import distill


class Toy(nn.Module):
    """A teacher with three channels at stride 4 and five at stride 8."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Conv2d(3, 3, 4, 4), nn.Conv2d(3, 5, 8, 8)

    def forward(self, x: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        return [(self.a(x), 4), (self.b(x), 8)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    (root / "photos").mkdir()
    for i in range(20):
        coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((90, 80), Image.Resampling.BICUBIC)
        photo.save(root / "photos" / f"{i:02}.png")
    with tarfile.open(root / "photos.tar", "w") as tar:
        tar.add(root / "photos", "photos")
    with tarfile.open(root / "photos.tar.gz", "w:gz") as tar:
        tar.add(root / "photos", "photos")
    torch.jit.script(Toy().eval()).save(root / "toy.pt")
    return root


def command(capsys, *args):
    """-> exit code, stdout, stderr."""
    code = distill.main([str(argument) for argument in args])
    return code, *capsys.readouterr()


def small(corpus, out, *more, images="photos", teacher="toy.pt"):
    return ("--images", corpus / images, "--teacher", corpus / teacher, "--out", out, "--steps", 4,
            "--batch", 2, "--crop", 64, "--device", "cpu", *more)


def same_weights(one, other):
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Geometry

@pytest.mark.parametrize("stride, centre", [(2, 1.5), (4, 2.0), (8, 7.5), (16, 15.5)])
def test_a_map_is_read_where_the_student_looks(stride, centre):
    """Closed form: a map that holds each position's own pixel coordinate reads as the student's
    centres, 4i + 16.5, where the map reaches that far."""
    size, positions = 224, 48
    own = centre + stride * torch.arange(size // stride, dtype=torch.float32)
    coordinates = torch.stack(torch.meshgrid(own, own, indexing="xy"))[None]     # (1, 2, m, m)
    read = distill.at_student(coordinates, stride, centre, positions)[0]
    expected = (4 * torch.arange(positions) + 16.5).clamp(float(own[0]), float(own[-1]))
    expected = torch.stack(torch.meshgrid(expected, expected, indexing="xy"))
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-3)


def test_the_students_position_is_centred_where_the_teacher_is_read():
    """The pixels whose change moves output 5 of a PDN: their middle is 4 * 5 + 16.5, pixel i
    reaching from i to i + 1."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64, dtype=torch.double, requires_grad=True)
    y = backbone.build_pdn("small").double()(x)
    assert y.shape[-1] == (64 - 29) // 4
    y[0, :, 5, 5].sum().backward()
    seen = x.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert (seen.min() + seen.max() + 1).item() / 2 == 4 * 5 + 16.5


# Targets

@pytest.mark.parametrize("channels", [(16, 24, 40, 112), (7, 300), (5,)])
def test_target_has_384_channels_whatever_the_teacher(channels):
    def teacher(x):
        return [(torch.randn(len(x), c, 8, 8), 16.0, 8.0) for c in channels]

    parts = distill.teacher_target(teacher, torch.zeros(2, 3, 128, 128))
    assert torch.cat(parts, 1).shape == (2, 384, 24, 24) and len(parts) == len(channels)


def test_explained_variance_of_the_truth_the_mean_and_in_between():
    torch.manual_seed(0)
    table = {}

    def teacher(x):
        key = float(x.sum())
        table.setdefault(key, [torch.randn(len(x), c, 16, 16) for c in (64, 128)])
        return [(block, 4.0, 16.5) for block in table[key]]

    held_out = torch.rand(10, 3, 93, 93)
    target = [distill.teacher_target(teacher, x) for x in held_out.split(8)]
    truth = torch.cat([torch.cat(parts, 1) for parts in target])
    mean, std = truth.mean((0, 2, 3))[:, None, None], truth.std((0, 2, 3))[:, None, None]

    def student(missed):             # wrong by this share of every deviation: explains the rest
        answers = iter(((torch.cat(parts, 1) - mean) / std) * (1 - missed) for parts in target)
        return lambda x: next(answers)

    for missed in (0.0, 0.5, 1.0):
        lines = distill.explained_variance(student(missed), teacher, mean, std, held_out, "cpu")
        assert [share for share, _ in lines] == pytest.approx([1 - missed ** 2] * 2, abs=1e-4)


# The command

def test_folder_and_tar_train_the_same_weights_that_load_and_learn(corpus, tmp_path, capsys):
    for images, name in (("photos", "folder.pt"), ("photos.tar", "tar.pt")):
        args = small(corpus, tmp_path / name, "--steps", 6, "--lr", "3e-3", images=images)
        code, out, err = command(capsys, *args)
        assert code == 0 and "teacher map 2" in out and "warning" not in err
        assert not (tmp_path / (name + ".part")).exists()
    assert same_weights(tmp_path / "folder.pt", tmp_path / "tar.pt")
    weights = torch.load(tmp_path / "tar.pt", weights_only=True)
    assert weights["0.weight"].dtype == torch.float16
    pdn, description = backbone.load_pdn(str(tmp_path / "tar.pt"), 0)
    assert description == f"PDN small, from {tmp_path / 'tar.pt'}"
    assert all(value.dtype == torch.float32 for value in pdn.state_dict().values())

    shares = []
    for start in ([], ["--start", tmp_path / "tar.pt"]):
        args = small(corpus, tmp_path / "measured.pt", *start, "--steps", 0)
        out = command(capsys, *args)[1]
        shares.append([float(line.split()[-1]) for line in out.splitlines() if "explained" in line])
    assert len(shares[0]) == 2 and all(after > before for before, after in zip(*shares))


def test_a_killed_distillation_ends_bit_for_bit_like_one_that_was_not(corpus, tmp_path,
                                                                      monkeypatch, capsys):
    assert command(capsys, *small(corpus, tmp_path / "whole.pt"))[0] == 0

    def stopped(*args):
        def progress(done, note=""):
            if done == 3:
                raise KeyboardInterrupt
        return progress

    with monkeypatch.context() as patch:
        patch.setattr(runs, "Progress", stopped)
        patch.setattr(distill.distill, "__defaults__", (-1.0,))     # saves before every step
        code, _, err = command(capsys, *small(corpus, tmp_path / "halted.pt"))
    assert code == 130 and "goes on" in err and (tmp_path / "halted.pt.part").exists()
    code, _, err = command(capsys, *small(corpus, tmp_path / "halted.pt", "--lr", "1e-2"))
    assert code == 2 and "other settings" in err
    assert command(capsys, *small(corpus, tmp_path / "halted.pt"))[0] == 0
    assert same_weights(tmp_path / "whole.pt", tmp_path / "halted.pt")
    assert not (tmp_path / "halted.pt.part").exists()


@pytest.mark.parametrize("size", [64, 160, 224, 320])
def test_a_crop_as_large_as_the_photo_stays_inside(size):
    for short in range(40, 520):
        photo = Image.new("L", (short, short + 7))
        assert distill.crop_of(photo, size, size, 1.0, 1.0, False).shape[:2] == (size, size)


def test_a_bad_photo_costs_one_line(corpus, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (corpus / "photos").iterdir():
        (photos / path.name).write_bytes(path.read_bytes())
    for name in ("00.png", "01.png", "02.png"):
        (photos / name).write_bytes(b"not a picture")
    args = small(corpus, tmp_path / "w.pt", "--steps", 10, images=photos)
    code, _, err = command(capsys, *args)
    warnings = [line for line in err.splitlines() if line.startswith("warning:")]
    assert code == 1 and (tmp_path / "w.pt").exists()
    assert 1 <= len(warnings) == len(set(warnings)) <= 3


def test_a_loss_that_explodes_is_one_line_and_the_last_good_step_is_kept(corpus, tmp_path,
                                                                         monkeypatch, capsys):
    monkeypatch.setattr(distill.distill, "__defaults__", (-1.0,))   # saves before every step
    out = tmp_path / "w.pt"
    code, _, err = command(capsys, *small(corpus, out, "--steps", 60, "--lr", "1e30"))
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and "--lr" in line and not out.exists()
    student = torch.load(f"{out}.part", weights_only=True)["student"]
    assert all(value.isfinite().all() for value in student.values())


def test_mistakes_are_one_line(corpus, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "few" / "a.png")
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    mistakes = [(small(corpus, tmp_path / "w.pt", images="photos.tar.gz"), "unpack it first"),
                (small(corpus, tmp_path / "w.pt", images="nowhere"), "no such folder"),
                (small(corpus, tmp_path / "w.pt", teacher="nothing.pt"), "no such file"),
                (small(corpus, tmp_path / "w.pt", teacher="photos/00.png"), "TorchScript"),
                (small(corpus, tmp_path / "w.pt", "--crop", 100), "--crop 100"),
                (small(corpus, tmp_path / "w.pt", "--batch", 0), "--batch 0"),
                (small(corpus, tmp_path / "w.pt", "--lr", "nan"), "--lr nan"),
                (small(corpus, tmp_path / "w.pt", images=tmp_path / "few"), "too few"),
                (small(corpus, tmp_path / "w.pt", images=tmp_path / "empty.tar"), "no images"),
                (small(corpus, "/dev/null/x/w.pt"), "--out")]
    for args, reason in mistakes:
        code, _, err = command(capsys, *args)
        assert code == 2 and reason in err, (args, err)
        assert err.startswith("error: ") and err.count("\n") == 1, (args, err)
    assert not (tmp_path / "w.pt").exists()


def test_weights_are_written_with_the_digest_that_they_are_checked_by(tmp_path, capsys):
    path = tmp_path / "pdn.pt"
    distill.write_weights(path, backbone.build_pdn("small"))
    backbone.load_pdn(str(path), 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(lambda: backbone.load_pdn(str(path), 0), "SHA-256")


def test_the_shipped_weights_have_a_digest_and_fit_the_repository():
    path = Path(distill.__file__).parent / "pdn_small.pt"
    assert path.stat().st_size < 6_000_000
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == backbone.digest_file(path).read_text().strip()
    assert digest in (path.parent / "README.md").read_text()
