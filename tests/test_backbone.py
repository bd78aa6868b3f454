"""The frozen backbone: the network, its weights, what it sees of a photo and where."""
import argparse
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TRAIN, command, make_photos, one_error
from PIL import Image

import backbone
import data
import options
from backbone import CHANNELS, Features
from data import InputError


# The network and its weights

@pytest.mark.parametrize("size", ["small", "medium"])
def test_pdn_shapes_and_both_published_formats(size):
    pdn = backbone.build_pdn(size)
    plain, named = pdn.state_dict(), {}
    for i, conv in enumerate(layer for layer in pdn if isinstance(layer, nn.Conv2d)):
        named |= {f"conv{i + 1}.{name}": value.data for name, value in conv.named_parameters()}
    assert pdn(torch.randn(1, 3, 224, 224)).shape == (1, 384, 48, 48)
    x = torch.randn(1, 3, 64, 64)
    expected = pdn(x)
    for state in (plain, named):
        loaded, description = backbone.pdn_from_state(state, "x")
        assert description == f"PDN {size}"
        torch.testing.assert_close(loaded(x), expected)


def test_pdn_receptive_field_is_33_pixels_at_stride_4():
    pdn = backbone.build_pdn("small").double()
    x = torch.randn(1, 3, 65, 65, dtype=torch.double, requires_grad=True)
    y = pdn(x)
    assert y.shape[-1] == 9 == backbone.positions(65)               # (65 - 33) / 4 + 1
    y[0, :, 2, 3].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert seen.min(0).values.tolist() == [8, 12]
    assert seen.max(0).values.tolist() == [8 + 32, 12 + 32]


@pytest.mark.parametrize("state", [{}, {"0.weight": torch.zeros(3, 3)},
                                   {"conv1.weight": torch.zeros(128, 3, 4, 4)}])
def test_foreign_weights_are_refused(state):
    with pytest.raises(InputError, match="no PDN"):
        backbone.pdn_from_state(state, "x")


def test_weight_files_that_are_none(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickle.pt")       # weights_only refuses a class
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "empty.pt", "pickle.pt", "list.pt", "missing.pt"):
        with pytest.raises(InputError, match="--pdn"):
            backbone.load_pdn(str(tmp_path / name), 0)


def test_weights_are_checked_against_the_sum_beside_them(tmp_path):
    torch.save(backbone.build_pdn("small").state_dict(), tmp_path / "own.pt")
    backbone.load_pdn(str(tmp_path / "own.pt"), 0)                  # no sum, no check
    (tmp_path / "own.pt.sha256").write_text("0" * 64 + "  own.pt\n")
    with pytest.raises(InputError, match="SHA-256"):
        backbone.load_pdn(str(tmp_path / "own.pt"), 0)


def test_random_weights_are_the_seeds_own_and_leave_other_randomness_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = (backbone.load_pdn("random", seed)[0][0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.rand(3), expected)


# Features

@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("grid", [24, 12, 6, 5])
def test_extract_is_the_mean_of_what_the_pdn_gives(size, grid):
    torch.manual_seed(0)
    pdn = backbone.build_pdn(size).eval()
    images = torch.randint(0, 256, (2, 125, 125, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        positions = pdn.double()(x)                          # (2, 384, 24, 24)
    cells = 24 // grid
    expected = F.avg_pool2d(positions, cells).flatten(2).transpose(1, 2)
    extracted = backbone.extract(pdn.float(), images, grid)
    assert extracted.shape == (2, (24 // cells) ** 2, 384) and extracted.dtype == torch.float32
    torch.testing.assert_close(extracted.double(), expected, atol=1e-4, rtol=1e-4)


def test_features_in_bfloat16_are_near_and_kept_in_a_file_of_their_own(tmp_path):
    pdn, _ = backbone.load_pdn(backbone.SHIPPED, 0)
    photos = [data.Photo(path, "things", split, "good") for split in ("train", "validation")
              for path in [tmp_path / f"{split}.png"]]
    for seed, photo in enumerate(photos):
        noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photo.path)
    found = [backbone.find_features(photos, pdn, 64, 4, False, torch.device("cpu"),
                                    tmp_path / "cache", precision=precision)
             for precision in ("fp32", "bf16", "bf16")]
    plain, low, again = (seen.float() for seen, *_ in found)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert torch.equal(low, again) and 0 < (plain - low).abs().max() < 0.05 * plain.std()
    assert found[0][3] != found[1][3] == found[2][3]         # the fingerprints


@pytest.mark.parametrize("size, grid", [(125, 6), (125, 24), (64, 4)])
def test_token_centres_are_the_middles_of_what_tokens_see(size, grid):
    """The pixels that move a token, by the gradient."""
    pdn = backbone.build_pdn("small").double()
    nn.init.ones_(pdn[-1].weight)
    x = torch.rand(1, 3, size, size, dtype=torch.double, requires_grad=True)
    y = F.avg_pool2d(pdn(x), backbone.positions(size) // grid)
    assert y.shape[-1] == grid
    centres = backbone.token_centres(size, grid)
    for row, column in ((0, 0), (1, grid - 1)):
        gradient, = torch.autograd.grad(y[0, :, row, column].sum(), x, retain_graph=True)
        seen = gradient.abs().sum((0, 1)).nonzero().double()
        middle = (seen.min(0).values + seen.max(0).values + 1) / 2
        assert middle.tolist() == [centres[row], centres[column]]


@pytest.mark.parametrize("grid", [6, 12, 24])
def test_patches_lie_where_the_tokens_look(grid):
    image = np.random.default_rng(grid).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    patches = backbone.patches(torch.from_numpy(image)[None], grid)[0].view(grid, grid, 48)
    side = 192 // grid                               # of a token: 4 pixels for each position
    for row, column in ((0, 0), (1, grid - 1), (grid - 1, 2)):
        top, left = 14 + row * side, 14 + column * side
        part = image[top:top + side, left:left + side].astype(float)
        cells = part.reshape(4, side // 4, 4, side // 4, 3).mean((1, 3)).ravel()
        expected = (cells - cells.mean()) / (cells.std() + 1)
        np.testing.assert_allclose(patches[row, column].numpy(), expected, atol=1e-4)


def test_features_hold_patches_behind_the_channels_and_standardise_the_channels_alone():
    pdn, _ = backbone.load_pdn("random", 0)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    cpu = torch.device("cpu")
    plain = backbone.look(pdn, images, 4, False, cpu)
    whole = backbone.look(pdn, images, 4, True, cpu)
    assert plain.dtype == torch.float16 and plain.shape == (3, 16, CHANNELS)
    assert torch.equal(whole[..., :CHANNELS], plain) and whole.shape == (3, 16, CHANNELS + 48)
    mean, std, index = torch.randn(CHANNELS), torch.rand(CHANNELS) + 1, torch.tensor([2, 0])
    for seen in (plain, whole):
        features = Features(seen, mean, std, cpu)
        assert torch.equal(features.h0(index), (plain[[2, 0]].float() - mean) / std)
    patches = backbone.patches(torch.from_numpy(images), 4)[[2, 0]]
    torch.testing.assert_close(features.pixels(index), patches, atol=2e-3, rtol=2e-3)
    assert Features(plain, mean, std, cpu).pixels(index) is None


def test_channel_statistics_are_those_of_the_first_photos():
    seen = torch.randn(9, 4, CHANNELS + 48).half()
    mean, std = backbone.channel_statistics(seen, torch.arange(7), batch=3)
    tokens = seen[:7, :, :CHANNELS].double().flatten(0, 1)
    torch.testing.assert_close(mean.double(), tokens.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(std.double(), tokens.std(0, correction=0), atol=1e-6, rtol=1e-5)


def test_features_that_are_not_finite_are_refused(photos):
    pdn = backbone.build_pdn("small")
    with torch.no_grad():
        pdn[-1].bias[5] = math.nan
    torch.save(pdn.state_dict(), photos / "nan.pt")
    result = command(*TRAIN, "--pdn", "nan.pt", "--out", "run", cwd=photos)
    assert "not finite" in one_error(result) and not (photos / "run").exists()


# A run's photos

def test_a_category_without_a_readable_validation_photo_is_named(tmp_path):
    for name in ("widgets", "gadgets"):
        make_photos(tmp_path / "photos", name, train=3, validation=2, good=1, bad=1)
    for path in (tmp_path / "photos/gadgets/validation/good").iterdir():
        path.write_bytes(b"no photo")
    result = command(*TRAIN, "--category", "widgets,gadgets", "--out", "run", cwd=tmp_path)
    assert one_error(result).startswith("error: gadgets: no training or no validation photo")
    assert not (tmp_path / "run").exists()


def test_a_bad_training_photo_costs_one_line(tmp_path):
    make_photos(tmp_path / "photos")
    (tmp_path / "photos/widgets/train/good/bad.png").write_bytes(b"not a picture")
    result = command(*TRAIN, "--out", "run", cwd=tmp_path)
    assert result.returncode == 1
    assert len([line for line in result.stderr.splitlines() if "bad.png" in line]) == 1
    assert (tmp_path / "run/scores.csv").exists()


# Heat maps

def test_the_overlay_is_clear_to_three_and_red_from_there():
    photo = Image.new("RGB", (64, 48), (10, 20, 30))
    tokens = np.zeros((4, 4))
    assert np.array_equal(backbone.overlay(photo, tokens + 3, 64), photo)
    tokens[:, 2:] = 12
    values = np.asarray(backbone.overlay(photo, tokens, 64)).astype(int)
    assert (values[:, 0] == (10, 20, 30)).all()
    full = (10 + 245 * 180 / 255, 20 + 10 * 180 / 255, 30 - 30 * 180 / 255)
    assert abs(values[:, -1] - full).max() <= 1 and (np.diff(values[0, :, 0]) >= 0).all()


@pytest.mark.parametrize("size, shown", [((90, 60), (90, 60)), ((4096, 64), (1024, 16))])
def test_a_heat_map_is_the_photo_the_map_beside_it_and_the_verdict_below(tmp_path, size, shown):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "photo.png")
    tokens = np.full(16, 12.0)
    backbone.save_heatmap(tmp_path / "heat.png", tmp_path / "photo.png", tokens, 64, "good")
    sheet = np.asarray(Image.open(tmp_path / "heat.png").convert("RGB"))
    (width, height), band = shown, 2 * max(16, shown[1] // 16)
    assert sheet.shape == (height + band, 2 * width + 8, 3)
    assert (sheet[:height, :width] == (10, 20, 30)).all()
    assert (sheet[:height, width:width + 8] == 255).all()
    assert (sheet[:height, width + 8:, 0] > 150).all()
    below = sheet[height:]
    assert below.min() < 100 and (below[:, width:] == 255).all()


def test_a_file_in_the_working_directory_does_not_stand_in_for_the_shipped_weights(
        tmp_path, monkeypatch):
    shipped = backbone.load_pdn(options.SHIPPED, 0)[0].state_dict()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    torch.save(backbone.build_pdn("small").state_dict(), options.SHIPPED)
    again = backbone.load_pdn(options.SHIPPED, 0)[0].state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in shipped.items())
    one = dataclasses.make_dataclass("One", [("pdn", str, "")])
    own = options.chosen_settings(argparse.Namespace(pdn=options.SHIPPED), one)["pdn"]
    assert own == str(tmp_path / options.SHIPPED)            # asked for by name, it is taken
    assert not torch.equal(backbone.load_pdn(own, 0)[0].state_dict()["0.bias"], shipped["0.bias"])


def test_a_heat_map_that_cannot_be_saved_is_one_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with pytest.raises(InputError, match="none/heat.png: could not be saved .*--heatmap"):
        backbone.save_heatmap(tmp_path / "none" / "heat.png", tmp_path / "photo.png",
                              np.zeros(16), 64, "good")
