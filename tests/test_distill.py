"""Distillation of the backbone: geometry, teachers, target, corpora, resume, digests."""
import base64
import hashlib
import io
import json
import shutil
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
from weights import convert_inception, distill, teachers


class Toy(nn.Module):
    """A teacher with three channels at stride 4 and five at stride 8."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Conv2d(3, 3, 4, 4), nn.Conv2d(3, 5, 8, 8)

    def forward(self, x: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        return [(self.a(x), 4), (self.b(x), 8)]


class Late(nn.Module):
    """Its one map tells the photo's green; position 0 is centred on pixel 16.5, stride 4."""

    def forward(self, x: torch.Tensor) -> list[tuple[torch.Tensor, float, float]]:
        return [(x[:, 1:2, 16::4, 16::4], 4.0, 16.5)]


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    (root / "photos").mkdir()
    (root / "tars").mkdir()
    for i in range(20):
        coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((90, 80), Image.Resampling.BICUBIC)
        photo.save(root / "photos" / f"{i:02}.png")
    with tarfile.open(root / "tars" / "photos", "w") as tar:    # the name draws the held-out ones
        tar.add(root / "photos", "photos")
    with tarfile.open(root / "photos.tar.gz", "w:gz") as tar:
        tar.add(root / "photos", "photos")
    for network in (Toy(), Late(), Wrong()):
        torch.jit.script(network.eval()).save(root / f"{type(network).__name__.lower()}.pt")
    return root


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few crops: each photo of 224 pixels costs tenths of a second."""
    monkeypatch.setattr(distill, "FIRST", 4)
    monkeypatch.setattr(distill, "MEASURED", 4)


def command(capsys, *args):
    """-> exit code, stdout, stderr."""
    code = distill.main([str(argument) for argument in args])
    return code, *capsys.readouterr()


def small(corpus, out, *more, images="photos", teacher="toy.pt"):
    return ("--images", corpus / images, "--teacher", corpus / teacher, "--out", out, "--steps", 3,
            "--decay", 2, "--batch", 2, "--bank", 3, "--device", "cpu", *more)


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
    read = teachers.at_student(coordinates, stride, centre, positions)[0]
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


def test_a_window_shows_what_its_targets_were_read_from(corpus, tmp_path):
    """The teacher tells each position's green: so does the pixel at its centre, wherever in the
    crop the window lies."""
    words = small(corpus, tmp_path / "w.pt", "--precision", "fp32", teacher="late.pt")
    args = distill.parse([str(word) for word in words])
    teacher = teachers.load_teacher(str(corpus / "late.pt"), torch.device("cpu"))
    target = [[torch.full((1, 384), 2.0), torch.full((384,), 1.0)]]
    bank = distill.Bank(tmp_path / "w.bank", teachers.Corpus(args.images), [teacher], target, args,
                        torch.device("cpu"))
    seen = set()
    for step in range(6):
        x, y = bank.windows(step)
        assert x.shape == (2, 3, 125, 125) and y.shape == (2, 384, 24, 24)
        green = backbone.imagenet(x)[:, 1, 16::4, 16::4][:, :24, :24]
        torch.testing.assert_close(y[:, 5], 2 * green + 1, rtol=2e-3, atol=2e-3)
        seen |= {float(window.sum()) for window in x}
    assert len(seen) == 12


# Targets

def test_the_target_is_standardised_and_each_map_fills_its_share():
    """Whatever a map's scale, each of its target channels has mean 0 and deviation 1 where it was
    fitted; a map with as many channels as its share stays as it is, one with none is left out."""
    generator = torch.Generator().manual_seed(0)
    maps = [10 ** n * (torch.randn(4, c, 20, 20, generator=generator) + 3)
            for n, c in enumerate((5, 40, 300, 7))]
    seen = [block.permute(0, 2, 3, 1).flatten(0, 2) for block in maps]
    target = distill.fit_target(seen, [0, 40, 244, 100])
    found = distill.target_of(target, maps)
    assert found.shape == (4, 384, 20, 20)
    assert found.mean((0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(384), rtol=1e-3, atol=0)
    own = (maps[1] - maps[1].mean((0, 2, 3), keepdim=True)) / maps[1].std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(found[:, :40], own, rtol=1e-3, atol=1e-3)
    rank = torch.linalg.matrix_rank(found[:, 40:284].permute(1, 0, 2, 3).flatten(1))
    assert rank == 244


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_shares_are_equal_by_default_and_sum_to_384(count):
    shares = distill.check_shares(None, [5] * count)
    assert sum(shares) == 384 and len(shares) == count and max(shares) - min(shares) <= 1


@pytest.mark.parametrize("shares", [[384], [200, 200], [-1, 385]])
def test_shares_that_do_not_fit_the_maps_are_refused(shares):
    refused(lambda: distill.check_shares(shares, [16, 24]), "--shares", "16, 24 channels")


def test_explained_variance_of_the_truth_the_mean_and_in_between():
    torch.manual_seed(0)
    table, sizes = {}, (64, 320)

    def teacher(x):
        key = float(x.sum())
        table.setdefault(key, [torch.randn(len(x), c, 48, 48) for c in sizes])
        return [(block, 4.0, 16.5) for block in table[key]]

    held_out = torch.rand(6, 3, 224, 224)
    target = [[torch.eye(c), torch.zeros(c)] for c in sizes]
    for x in held_out.split(4):
        teacher(x)
    truths = [torch.cat(blocks, 1) for blocks in table.values()]
    mean = torch.cat(truths)[..., 3:-3, 3:-3].mean((0, 2, 3))[:, None, None]

    def student(missed):             # wrong by this share of every deviation: explains the rest
        answers = iter((truth - mean) * (1 - missed) + mean for truth in truths)
        return lambda x: next(answers)

    for missed in (0.0, 0.5, 1.0):
        lines = distill.explained_variance(student(missed), [teacher], target, held_out,
                                           torch.device("cpu"), "fp32")
        assert [share for share, _ in lines] == pytest.approx([1 - missed ** 2] * 2, abs=1e-4)


def test_weights_are_there_before_they_are_measured(corpus, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "explained_variance", interrupted)
    assert command(capsys, *small(corpus, tmp_path / "w.pt"))[0] == 130
    assert (tmp_path / "w.pt").exists() and (tmp_path / "w.pt.sha256").exists()


def test_linear_fit_finds_the_plane_and_ridge_shrinks_it():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) + 2
    weight, bias = torch.randn(6, 3), torch.randn(3)
    found = teachers.linear_fit(x.clone(), x @ weight + bias, 0)
    torch.testing.assert_close(found[0], weight, rtol=0, atol=1e-3)
    torch.testing.assert_close(found[1], bias, rtol=0, atol=1e-3)
    shrunk, _ = teachers.linear_fit(x.clone(), x @ weight + bias, 1.0)
    assert 0.2 < shrunk.norm() / weight.norm() < 0.8


# The command

def test_folder_and_tar_train_the_same_weights_that_load_and_learn(corpus, tmp_path, capsys):
    for images, name in (("photos", "folder.pt"), ("tars/photos", "tar.pt")):
        code, out, err = command(capsys, *small(corpus, tmp_path / name, images=images))
        assert code == 0 and "teacher map 2" in out and "warning" not in err
        assert not (tmp_path / (name + ".bank")).exists()
    assert same_weights(tmp_path / "folder.pt", tmp_path / "tar.pt")
    weights = torch.load(tmp_path / "tar.pt", weights_only=True)
    assert weights["0.weight"].dtype == torch.float16
    pdn, description = backbone.load_pdn(str(tmp_path / "tar.pt"), 0)
    assert description == f"PDN small, from {tmp_path / 'tar.pt'}"
    assert all(value.dtype == torch.float32 for value in pdn.state_dict().values())


def figures(out):
    return [float(line.split()[-1]) for line in out.splitlines() if "explained" in line]


def test_a_start_keeps_its_first_layer_and_reads_the_new_target_at_once(corpus, tmp_path, capsys,
                                                                        monkeypatch):
    """One step at next to no rate: what is explained is the fitted last layer's. From random
    weights that is nothing."""
    monkeypatch.setattr(distill, "MEASURED", 12)
    shares = []
    for start in ([], ["--start", "weights/pdn_small.pt"]):
        args = small(corpus, tmp_path / "w.pt", *start, "--steps", 0, "--decay", 1, "--lr", 1e-9)
        code, out, err = command(capsys, *args)
        shares.append(figures(out))
        assert code == 0, err
        (tmp_path / "w.pt.part").unlink()
    assert max(shares[0]) < 0.1 and min(shares[1]) > 0.5, shares
    old = torch.load(Path(distill.__file__).parent / "pdn_small.pt", weights_only=True)
    new = torch.load(tmp_path / "w.pt", weights_only=True)
    assert torch.equal(old["0.weight"], new["0.weight"])
    assert not torch.equal(old["8.weight"], new["8.weight"])


def test_several_sources_and_teachers(corpus, tmp_path, capsys):
    """Each source keeps its own held-out photos, in whatever order the sources come."""
    one, other = (teachers.Corpus([corpus / name]) for name in ("photos", "tars/photos"))
    both = teachers.Corpus([corpus / "tars/photos", corpus / "photos"])
    assert both.held_out == other.held_out + one.held_out and len(both.learn) == 36
    assert not set(one.held_out) & set(one.learn)
    args = small(corpus, tmp_path / "w.pt", "--images", corpus / "photos", corpus / "tars/photos",
                 "--teacher", corpus / "late.pt", corpus / "toy.pt", "--shares", 1, 0, 383)
    code, out, _ = command(capsys, *args)
    assert code == 0 and "4 to measure" in out
    assert "map 1, 1 of 384" in out and "map 2," not in out and "map 3, 383 of 384" in out


def test_more_steps_go_on_from_the_constant_part(corpus, tmp_path, capsys):
    """The decay is a branch: 2 steps and a decay, then 4 and a decay, are 4 and a decay."""
    for steps in (2, 4):
        assert command(capsys, *small(corpus, tmp_path / "w.pt", "--steps", steps))[0] == 0
    assert command(capsys, *small(corpus, tmp_path / "at_once.pt", "--steps", 4))[0] == 0
    assert same_weights(tmp_path / "w.pt", tmp_path / "at_once.pt")
    assert command(capsys, *small(corpus, tmp_path / "w.pt", "--steps", 0))[0] == 0
    assert same_weights(tmp_path / "w.pt", tmp_path / "at_once.pt")      # nothing is undone


@pytest.mark.parametrize("bank", ["kept", "lost", "foreign"])
def test_a_killed_distillation_ends_bit_for_bit_like_one_that_was_not(bank, corpus, tmp_path,
                                                                      monkeypatch, capsys):
    assert command(capsys, *small(corpus, tmp_path / "whole.pt"))[0] == 0

    def stopped(*args):
        def progress(done, note=""):
            if done == 3:                            # of 5; the ring of 3 crops has wrapped
                raise KeyboardInterrupt
        return progress

    with monkeypatch.context() as patch:
        patch.setattr(runs, "Progress", stopped)
        patch.setattr(runs, "SAVE_EVERY", -1)                # saves before every step
        code, _, err = command(capsys, *small(corpus, tmp_path / "halted.pt"))
    assert code == 130 and "goes on" in err and (tmp_path / "halted.pt.part").exists()
    code, _, err = command(capsys, *small(corpus, tmp_path / "halted.pt", "--lr", "1e-2"))
    assert code == 2 and "other settings" in err
    if bank == "foreign":                            # as large, made for other targets
        content = (tmp_path / "halted.pt.bank").read_bytes()
        (tmp_path / "halted.pt.bank").write_bytes(bytes(byte ^ 1 for byte in content))
    elif bank == "lost":
        (tmp_path / "halted.pt.bank").unlink()
    assert command(capsys, *small(corpus, tmp_path / "halted.pt"))[0] == 0
    assert same_weights(tmp_path / "whole.pt", tmp_path / "halted.pt")


@pytest.mark.parametrize("changed", ["teacher", "photos"])
def test_what_it_learns_from_must_be_what_it_was(changed, corpus, tmp_path, capsys):
    """Another teacher, or other photos, under the same names."""
    shutil.copy(corpus / "toy.pt", tmp_path / "toy.pt")
    shutil.copytree(corpus / "photos", tmp_path / "photos")
    args = small(tmp_path, tmp_path / "w.pt")
    assert command(capsys, *args)[0] == 0
    if changed == "teacher":
        shutil.copy(corpus / "late.pt", tmp_path / "toy.pt")
    else:
        Image.new("RGB", (90, 80)).save(tmp_path / "photos/07.png")
    code, _, err = command(capsys, *args, "--steps", 4)
    assert code == 2 and "other settings" in err


@pytest.mark.parametrize("size", [64, 160, 224, 320])
def test_a_crop_as_large_as_the_photo_stays_inside(size):
    for short in range(40, 520):
        photo = Image.new("L", (short, short + 7))
        assert teachers.crop_of(photo, size, size, 1.0, 1.0, False).shape[:2] == (size, size)


def test_a_bad_photo_costs_one_line(corpus, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (corpus / "photos").iterdir():
        (photos / path.name).write_bytes(path.read_bytes())
    for name in ("00.png", "01.png", "02.png"):
        (photos / name).write_bytes(b"not a picture")
    args = small(corpus, tmp_path / "w.pt", images=photos)
    code, _, err = command(capsys, *args)
    warnings = [line for line in err.splitlines() if line.startswith("warning:")]
    assert code == 1 and (tmp_path / "w.pt").exists()
    assert 1 <= len(warnings) == len(set(warnings)) <= 3


def test_a_loss_that_explodes_is_one_line_and_the_last_good_step_is_kept(corpus, tmp_path,
                                                                         monkeypatch, capsys):
    monkeypatch.setattr(runs, "SAVE_EVERY", -1)                    # saves before every step
    out = tmp_path / "w.pt"
    code, _, err = command(capsys, *small(corpus, out, "--steps", 60, "--lr", "1e9"))
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and "--lr" in line and not out.exists()
    student = torch.load(f"{out}.part", weights_only=True)["student"]
    assert all(value.isfinite().all() for value in student.values())


def test_a_loss_that_explodes_in_a_short_decay_writes_no_weights(corpus, tmp_path, capsys):
    out = tmp_path / "w.pt"
    code, _, err = command(capsys, *small(corpus, out, "--steps", 0, "--decay", 6, "--lr", "1e9"))
    assert code == 2 and "--lr" in err.splitlines()[-1] and not out.exists()


def test_a_bank_of_others_is_not_overwritten(corpus, tmp_path, capsys):
    out, crops = tmp_path / "w.pt", tmp_path / "w.pt.bank"
    crops.write_bytes(b"precious")
    code, _, err = command(capsys, *small(corpus, out))
    assert code == 2 and f"{crops}: holds no crops of this command" in err.splitlines()[-1]
    assert crops.read_bytes() == b"precious" and not out.exists()


def test_mistakes_are_one_line(corpus, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "few" / "a.png")
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    mistakes = [(small(corpus, tmp_path / "w.pt", images="photos.tar.gz"), "unpack it first"),
                (small(corpus, tmp_path / "w.pt", images="nowhere"), "no such folder"),
                (small(corpus, tmp_path / "w.pt", teacher="nothing.pt"), "no such file"),
                (small(corpus, tmp_path / "w.pt", teacher="photos/00.png"), "TorchScript"),
                (small(corpus, tmp_path / "w.pt", teacher="wrong.pt"), "feature map, stride"),
                (small(corpus, tmp_path / "w.pt", "--shares", 384), "--shares 384"),
                (small(corpus, tmp_path / "w.pt", "--batch", 4), "--batch 4"),
                (small(corpus, tmp_path / "w.pt", "--decay", 0), "--decay 0"),
                (small(corpus, tmp_path / "w.pt", "--batch", 0), "--batch 0"),
                (small(corpus, tmp_path / "w.pt", "--lr", "nan"), "--lr nan"),
                (small(corpus, tmp_path / "w.pt", "--seed", 2**70), f"--seed {2**70}"),
                (small(corpus, tmp_path / "w.pt", "--seed", -1), "--seed -1"),
                (small(corpus, tmp_path / "w.pt", "--start", "none.pt"), "error: --start none.pt"),
                (small(corpus, tmp_path / "w.pt", images=tmp_path / "few"), "too few"),
                (small(corpus, tmp_path / "w.pt", images=tmp_path / "empty.tar"), "no images"),
                (small(corpus, "/dev/null/x/w.pt"), "/dev/null/x")]
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
    assert digest == path.with_name(path.name + ".sha256").read_text().strip()
    assert digest in (path.parent / "README.md").read_text()


# InceptionV3 out of its package

def keras(kind, name, *inputs, **config):
    return {"class_name": kind, "name": name, "config": {"trainable": False, **config},
            "inbound_nodes": [[[source, 0, 0, {}] for source in inputs]] if inputs else []}


def package(file, layers, weights):
    """A package as nsfwjs has it: minified JavaScript, weights in 8 bits, in base64."""
    manifest, content = [], b""
    for name, (values, scale, least) in weights.items():
        manifest.append({"name": name, "shape": list(values.shape), "dtype": "float32",
                         "quantization": {"scale": scale, "min": least, "dtype": "uint8"}})
        content += values.tobytes()
    model = {"modelTopology": {"model_config": {"config": {"layers": layers}}},
             "weightsManifest": [{"paths": ["group1"], "weights": manifest}]}
    text = json.dumps(model, separators=(",", ":")).replace("true", "!0").replace("false", "!1")
    for key in ("class_name", "config", "trainable"):       # keys lose their quotes
        text = text.replace(f'"{key}":', f"{key}:")
    text = text.replace("0.5", ".5")
    parts = {"model": "!function(){1:[function(e,n,t){n.exports=" + text + "},{}]},{},[1])});",
             "group1": f'n.exports="{base64.b64encode(content).decode()}"' + "},{}]},{},[1])});"}
    with tarfile.open(file, "w:gz") as tar:
        for name, part in parts.items():
            info = tarfile.TarInfo(f"{convert_inception.FOLDER}{name}.min.js")
            info.size = len(part)
            tar.addfile(info, io.BytesIO(part.encode()))


def test_a_keras_network_is_converted_as_numpy_computes_it(tmp_path):
    """conv 3x3 of stride 2 without padding, batch norm, relu, then two branches joined: means of
    3x3 without the padding, and the largest of 3x3. By plain loops, at two sizes, 8-bit weights
    taken apart by hand; strides and centres by hand, too."""
    rng = np.random.default_rng(0)
    bits = {name: (rng.integers(0, 256, shape, dtype=np.uint8), scale, least)
            for name, shape, scale, least in (("c/kernel", (3, 3, 3, 4), 0.01, -1.2),
                                              ("n/beta", (4,), 0.004, -0.5),
                                              ("n/moving_mean", (4,), 0.004, -0.5),
                                              ("n/moving_variance", (4,), 0.01, 0.1))}
    pool = {"pool_size": [3, 3], "strides": [1, 1], "padding": "same"}
    layers = [keras("InputLayer", "i"),
              keras("Conv2D", "c", "i", kernel_size=[3, 3], strides=[2, 2], padding="valid",
                    use_bias=False, activation="linear"),
              keras("BatchNormalization", "n", "c", scale=False, epsilon=1e-3),
              keras("Activation", "mixed2", "n", activation="relu"),
              keras("AveragePooling2D", "a", "mixed2", **pool),
              keras("MaxPooling2D", "m", "mixed2", **pool),
              keras("Concatenate", "mixed5", "a", "m", axis=3),
              keras("Dense", "unused", "mixed5")]
    package(tmp_path / "p.tgz", layers, bits)
    graph = convert_inception.Graph(*convert_inception.read_package(tmp_path / "p.tgz"),
                                    ("mixed2", "mixed5")).eval()
    assert graph.geometry["mixed2"] == graph.geometry["mixed5"] == (2, 1.5)
    kernel, beta, mean, variance = (values * scale + least for values, scale, least in
                                    bits.values())
    for height, width in ((11, 11), (8, 13)):
        x = rng.random((height, width, 3))
        rows, columns = (height - 3) // 2 + 1, (width - 3) // 2 + 1
        first, second = np.empty((4, rows, columns)), np.empty((8, rows, columns))
        for i, j in np.ndindex(rows, columns):
            seen = np.einsum("hwc,hwcd->d", x[2 * i:2 * i + 3, 2 * j:2 * j + 3], kernel)
            first[:, i, j] = np.maximum(0, (seen - mean) / np.sqrt(variance + 1e-3) + beta)
        for i, j in np.ndindex(rows, columns):
            around = first[:, max(0, i - 1):i + 2, max(0, j - 1):j + 2]
            second[:, i, j] = [*around.mean((1, 2)), *around.max((1, 2))]
        with torch.no_grad():
            found = graph(torch.from_numpy(x).permute(2, 0, 1)[None].float())
        np.testing.assert_allclose(found[0][0], first, atol=1e-5)
        np.testing.assert_allclose(found[1][0], second, atol=1e-5)

    assert convert_inception.main([str(tmp_path / "p.tgz"), "--out", str(tmp_path / "t.pt")]) == 0
    teacher = teachers.load_teacher(str(tmp_path / "t.pt"), torch.device("cpu"))
    zoom, x = 299 / 224, torch.rand(2, 3, 112, 112)
    large = nn.functional.interpolate(x, size=150, mode="bilinear")
    with torch.no_grad():
        for (block, stride, centre), expected in zip(teacher(x), graph(large)):
            torch.testing.assert_close(block, expected, rtol=0, atol=1e-4)
            assert (stride, centre) == pytest.approx((2 / zoom, 1.5 / zoom))


def test_what_is_not_the_package_is_one_line(tmp_path, capsys):
    trainable = keras("Conv2D", "mixed5", "mixed2", kernel_size=[1, 1], strides=[1, 1],
                      padding="valid", use_bias=False, activation="linear")
    trainable["config"]["trainable"] = True
    package(tmp_path / "other.tgz", [keras("InputLayer", "mixed2"), trainable], {})
    (tmp_path / "text.tgz").write_text("not a package")
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    whole = (tmp_path / "other.tgz").read_bytes()
    (tmp_path / "cut.tgz").write_bytes(whole[:len(whole) // 2])
    layers = [keras("InputLayer", "mixed2"), keras("Activation", "mixed5", "mixed2",
                                                   activation="relu")]
    package(tmp_path / "short.tgz", layers, {"w": (np.zeros((2, 2), np.uint8), 1, 0)})
    parts = tarfile.open(tmp_path / "short.tgz")
    texts = {name.name: parts.extractfile(name).read() for name in parts}
    for name, before, after in (("short", b'"shape":[2,2]', b'"shape":[9,9]'),
                                ("scale", b'"quantization"', b'"quantisation"'),
                                ("maps", b'"mixed5"', b'"mixed9"')):
        with tarfile.open(tmp_path / f"{name}.tgz", "w:gz") as tar:
            for path, text in texts.items():
                info = tarfile.TarInfo(path)
                changed = text.replace(before, after)
                info.size = len(changed)
                tar.addfile(info, io.BytesIO(changed))
    for name in ("other", "text", "empty", "cut", "none", "short", "scale", "maps"):
        assert convert_inception.main([str(tmp_path / f"{name}.tgz")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and "nsfwjs 4.3.0" in err
    assert convert_inception.main(["other.tgz", "--out", str(tmp_path / "text.tgz")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "text.tgz").read_text() == "not a package"
