"""Photos of more than 8 bits: the depth that a camera uses is found over the training photos."""
import json

import numpy as np
import pytest
from PIL import Image
from conftest import TRAIN, command, checkpoint
from test_images import png16, png16_of

import data


def deep(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize("bits", range(8, 17))
def test_the_depth_is_the_photos_together_not_each_ones_own(tmp_path, bits, suffix):
    top = 2 ** bits - 1
    ramp = np.arange(256).reshape(16, 16) * top // 255
    kind = np.int32 if suffix == ".pgm" else np.uint16           # Pillow writes no other PGM
    dark, bright = (deep(tmp_path / f"{name}{suffix}", values.astype(kind))
                    for name, values in (("dark", ramp // 3), ("bright", ramp)))
    grey = tmp_path / "8.png"
    Image.new("L", (16, 16), 255).save(grey)
    white = max(data.deeper([dark, grey, bright]).values())
    assert white == top
    read = data.load_image(dark, 16, white)[..., 0]
    assert np.abs(read - (ramp // 3) * 255.0 / top).max() <= 0.51          # not stretched
    assert len(np.unique(data.load_image(bright, 16, white))) == 256
    assert (data.load_image(grey, 16, white) == 255).all()


@pytest.mark.parametrize("values, white", [
    (np.float32([[0, 1]]), 1), (np.float32([[0, 0.2]]), 1), (np.float32([[0, 1.5]]), 255),
    (np.int32([[0, 5000]]), 8191), (np.uint16([[0, 3]]), 255), (np.uint16([[0, 0]]), 255),
    (np.uint8([[0, 3]]), 0)])
def test_the_white_that_a_photo_needs(tmp_path, values, white):
    path = deep(tmp_path / "x.tif", values)
    assert data.deeper([path]) == ({path: white} if white else {})
    (tmp_path / "bad.tif").write_bytes(b"x")         # what cannot be read says nothing
    refused = [np.int32([[0, 65536]]), np.int32([[-1, 9]]), np.float32([[0, np.nan]]),
               np.float32([[0, 256]])]
    paths = [deep(tmp_path / f"{i}.tif", values) for i, values in enumerate(refused)]
    assert data.deeper([tmp_path / "bad.tif", tmp_path / "none.tif", *paths]) == {}
    for path in paths:
        with pytest.raises(data.InputError, match="8 or 16 bits"):
            data.load_image(path, 8, 4095)


@pytest.mark.parametrize("top", [1, 255])
def test_the_white_of_integers_says_nothing_of_floats(tmp_path, top):
    ramp = deep(tmp_path / "x.tif", np.linspace(0, top, 256, dtype=np.float32).reshape(16, 16))
    for white in (0, 1023, 65535):
        assert (data.load_image(ramp, 16, white)[..., 0].flatten() == np.arange(256)).all()


def test_floats_are_not_scaled_by_each_ones_own_maximum(tmp_path):
    dim = deep(tmp_path / "dim.tif", np.full((8, 8), 1, np.float32))
    white = max(data.deeper([dim, deep(tmp_path / "x.tif", dim_to_255())]).values())
    assert white == 255 and (data.load_image(dim, 8, white) == 1).all()


def dim_to_255():
    return np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8)


def test_colours_of_12_bits_keep_their_brightness(tmp_path):
    """Pillow reads the upper 8 of 16 bits: no more than 16 levels are left, but not in the dark."""
    values, content = png16(3)
    (tmp_path / "x.png").write_bytes(content)
    assert data.deeper([tmp_path / "x.png"]) == {tmp_path / "x.png": 65535}
    read = data.load_image(tmp_path / "x.png", 24, 4095).astype(float)
    assert np.abs(read - np.minimum(255, values.astype(int) * 65535 / 4095)).max() <= 32


def train(folder, kind=np.uint16, top=4095):
    rng = np.random.default_rng(0)
    for i in range(8):
        split = "validation" if i > 5 else "train"
        values = rng.integers(0, top + 1, (64, 64)).astype(kind)
        deep(folder / f"photos/widgets/{split}/good/{i}.tif", values)
    return command(*TRAIN, "--hvq-epochs", "1", "--mim-epochs", "0", "--out", "run", cwd=folder)


def test_a_run_keeps_its_depth_and_uses_it_everywhere(tmp_path):
    deep(tmp_path / "photos/widgets/validation/good/9.tif", np.full((64, 64), 4096, np.uint16))
    result = train(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("depth: 6 training photos") == 1 and "4095 is white" in result.stdout
    [line] = [line for line in result.stderr.splitlines() if "is white" in line]
    assert "9.tif" in line and "4095" in line
    assert checkpoint(tmp_path / "run")["white"] == 4095

    values = np.asarray(Image.open(tmp_path / "photos/widgets/train/good/0.tif"))
    eight = np.repeat((values * (255 / 4095) + 0.5).astype(np.uint8)[..., None], 3, 2)
    Image.fromarray(eight).save(tmp_path / "eight.png")
    deep(tmp_path / "deep.tif", values)
    deep(tmp_path / "deeper.tif", np.where(values > 2000, 5000, values).astype(np.uint16))
    asked = command("predict", "eight.png", "deep.tif", "deeper.tif", "--run", "run", "--json",
                    "--heatmap", "maps", cwd=tmp_path)
    scores = [json.loads(line)["score"] for line in asked.stdout.splitlines()]
    assert scores[0] == scores[1] != scores[2]
    line, count = asked.stderr.splitlines()
    assert "of 3 photos flagged" in count
    assert line.startswith("warning: deeper.tif") and "4095" in line
    sheets = [np.asarray(Image.open(tmp_path / f"maps/{name}.png")) for name in ("eight", "deep")]
    assert (sheets[0][:64, :64] == sheets[1][:64, :64]).all()


@pytest.mark.parametrize("tops, warned", [((4095, 65535), True), ((4095, 4095), False),
                                          ((4095, 255), False)])
def test_categories_of_other_depths_in_one_model_are_named(tmp_path, tops, warned):
    """A camera of 12 bits beside one of 16 would be dark without a word; 8 bits are read alike."""
    rng = np.random.default_rng(0)
    for name, top in zip(("bolts", "nuts"), tops):
        for i in range(5):
            deep(tmp_path / f"photos/a/train/good/{i}.png", np.full((64, 64), 9 * i, np.uint8))
            values = rng.integers(0, top + 1, (64, 64))
            deep(tmp_path / f"photos/{name}/train/good/{i}.tif",
                 values.astype(np.uint8 if top == 255 else np.uint16))
    result = command(*TRAIN[:3], "--category", "all", *TRAIN[5:], "--hvq-epochs", "0",
                     "--mim-epochs", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert ("depth: bolts ends at 4095, nuts ends at 65535; if" in result.stderr) == warned
    assert ("ends at" in result.stderr) == warned


def test_a_run_of_8_bits_reads_a_deeper_photo_by_its_format(trained, tmp_path):
    photo = trained[0] / "photos/widgets/test/good/000.png"
    grey = np.asarray(Image.open(photo).convert("L"))
    deep(tmp_path / "deep.tif", grey * np.uint16(257))
    deep(tmp_path / "grey.tif", grey)
    asked = command("predict", tmp_path, "--run", trained[0] / "run", "--json")
    one, other = (json.loads(line)["score"] for line in asked.stdout.splitlines())
    assert asked.returncode == 0 and "warning" not in asked.stderr and one == other
    assert "depth" not in trained[1].stdout and checkpoint(trained[0] / "run")["white"] == 0


@pytest.mark.parametrize("top, kind, warned", [
    (4095, np.uint16, True), (255, np.uint16, True), (65535, np.uint16, False),
    (255, np.float32, False), (1, np.float32, False), (255, np.uint8, False)])
def test_a_run_of_8_bits_warns_of_a_photo_that_it_reads_as_dark(trained, tmp_path, top, kind,
                                                                warned):
    deep(tmp_path / "x.tif", np.linspace(0, top, 64 * 64).reshape(64, 64).astype(kind))
    asked = command("predict", tmp_path / "x.tif", "--run", trained[0] / "run")
    lines = [line for line in asked.stderr.splitlines() if line.startswith("warning")]
    assert asked.returncode == 0 and len(lines) == warned
    assert not warned or (f"no value above {top}" in lines[0] and "save it with 8 bits" in lines[0])


@pytest.mark.parametrize("planes", [2, 4])
def test_alpha_says_nothing_of_the_depth(tmp_path, planes):
    values = np.full((24, 24, planes), 65535, np.uint16)
    values[..., :-1] = np.linspace(0, 4095, 24 * 24).reshape(24, 24, 1)
    (tmp_path / "x.png").write_bytes(png16_of(values))
    assert data.deeper([tmp_path / "x.png"]) == {tmp_path / "x.png": 4095}
    assert data.load_image(tmp_path / "x.png", 24, 4095).max() >= 239
