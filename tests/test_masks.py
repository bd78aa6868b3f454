"""What a mask marks: every mode, depth and palette, labels, soft and noisy edges; what is odd."""
import numpy as np
import pytest
from PIL import Image, ImageFilter
from test_data import loco, picture, refused

import data
import images
from data import Photo

TRUTH = np.zeros((60, 70), bool)
TRUTH[12:22, 10:30] = TRUTH[40:48, 50:61] = True
TRUTH[30, 5:40] = True                               # a scratch, one pixel wide
GREY = Image.fromarray(TRUTH * np.uint8(255))
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128,
       128, 128, 128, 64, 0, 0, 192, 0, 0]           # its first ten colours


def marks(image, path):
    """What `load_regions` takes from the image, saved at path."""
    image.save(path)
    regions = data.load_regions(Photo(path, "c", "test", "bent", (path,)), None)
    return np.logical_or.reduce([np.zeros(TRUTH.shape, bool), *(mask for mask, _ in regions)])


def palette(colours, index):
    image = Image.fromarray(index.astype(np.uint8)).convert("P")
    image.putpalette(colours)
    return image


def see_through(mode):
    image = GREY.convert("L").convert(mode)
    image.paste("white", (0, 0, *image.size))
    image.putalpha(GREY)
    return image


def of(values):
    return Image.fromarray(values)


LABELS = np.where(TRUTH, 1 + np.indices(TRUTH.shape)[1] // 10, 0)        # 1 to 7
BINARY = {
    "white first": palette([255, 255, 255, 0, 0, 0], ~TRUTH),
    "black first": palette([0, 0, 0, 255, 255, 255], TRUTH),
    "grey palette": GREY.convert("P"), "2 colours": GREY.convert("RGB").quantize(2),
    "8 colours": GREY.convert("RGB").quantize(8), "web": GREY.convert("RGB").convert("P"),
    "VOC 1": palette(VOC, TRUTH), "VOC 8": palette(VOC, TRUTH * 8),
    "VOC many": palette(VOC, np.where(TRUTH, LABELS + 2, 0)),
    "1": GREY.convert("1"), "L": GREY, "RGB": GREY.convert("RGB"), "red": Image.merge(
        "RGB", (GREY, *[Image.new("L", GREY.size)] * 2)),
    "LA": GREY.convert("LA"), "RGBA": GREY.convert("RGBA"),
    "clear LA": see_through("LA"), "clear RGBA": see_through("RGBA"),
    "1 of 255": of(TRUTH * np.uint8(1)), "labels": of(LABELS.astype(np.uint8)),
    "grey labels": of((LABELS * 36).astype(np.uint8)),
    "16 bits": of(TRUTH * np.uint16(65535)), "16-bit labels": of(LABELS.astype(np.uint16)),
    "12 of 16 bits": of(TRUTH * np.uint16(4095)),
}
TIFF = {"CMYK": GREY.convert("RGB").convert("CMYK"), "I": of(TRUTH * np.int32(255)),
        "I;16B": Image.frombytes("I;16B", GREY.size, (TRUTH * 900).astype(">u2").tobytes()),
        "F to 1": of(TRUTH * np.float32(1)), "F to 255": of(TRUTH * np.float32(255)), **BINARY}


@pytest.mark.parametrize("suffix, name", [*((".png", name) for name in BINARY),
                                          *((".tif", name) for name in TIFF)])
def test_a_mask_means_what_an_eye_sees(tmp_path, suffix, name):
    assert (marks(TIFF[name], tmp_path / f"m{suffix}") == TRUTH).all()


@pytest.mark.parametrize("scale", [1, 128 / 255, 257])
@pytest.mark.parametrize("soften", ["resized", "blurred", "dithered"])
def test_soft_and_noisy_edges_are_split_between_their_two_levels(tmp_path, scale, soften):
    large = GREY.resize((280, 240), Image.Resampling.NEAREST)
    truth = np.asarray(large) > 0
    if soften == "resized":                          # a few levels
        soft = np.asarray(large.resize((560, 480), Image.Resampling.BILINEAR))
        truth = np.asarray(large.resize((560, 480), Image.Resampling.NEAREST)) > 0
    elif soften == "blurred":                        # many
        soft = np.asarray(large.filter(ImageFilter.GaussianBlur(3)))
    else:
        noise = np.random.default_rng(0).integers(0, 40, truth.shape)
        soft = np.where(truth, 255 - noise, noise).astype(np.uint8)
    soft = (soft * float(scale)).astype(np.uint16 if scale > 1 else np.uint8)
    found = images.defect_pixels(soft)
    if soften == "blurred":                          # corners are rounded: the definition
        assert (found == (soft > soft.max() / 2)).all()
    else:
        assert (found == truth).all()


def test_a_mask_saved_as_jpeg_is_found_and_read(tmp_path):
    folder = tmp_path / "nut"
    for name in ("train/good/0.png", "train/good/1.png", "test/good/0.png", "test/bent/7.JPG"):
        picture(folder / name)
    (folder / "ground_truth/bent").mkdir(parents=True)
    large = Image.fromarray(np.kron(TRUTH[:25], np.ones((8, 8), np.uint8)) * np.uint8(255))
    large.save(folder / "ground_truth/bent/7_mask.JPG", quality=60)
    photo = data.find_photos(tmp_path, "nut", 0)[-1]
    [(mask, area)] = data.load_regions(photo, None)
    assert (mask == (np.asarray(large) > 0)).all() and area == mask.sum()


def test_a_mask_is_turned_as_its_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    for image in (GREY.rotate(180), of(np.ascontiguousarray(TRUTH[::-1, ::-1] * np.uint16(9)))):
        image.save(tmp_path / "m.png", exif=exif)
        photo = Photo(tmp_path, "c", "test", "bent", (tmp_path / "m.png",))
        assert (data.load_regions(photo, None)[0][0] == TRUTH).all()


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_a_mask_without_meaning_is_refused(tmp_path, value):
    path = tmp_path / "m.tif"
    refused(lambda: marks(of(np.array([[0, value]], np.float32)), path), "m.tif", "8 bits")


def test_black_and_overfull_masks_are_named(tmp_path):
    folder = loco(tmp_path)
    truth = folder / "ground_truth"
    for path in truth.rglob("*.png"):
        GREY.save(path)
    photos = data.find_photos(tmp_path, "breakfast_box", 0)
    assert data.odd_masks(photos, tmp_path) == []
    black, full = truth / "logical_anomalies/000/000.png", truth / "structural_anomalies/001"
    Image.new("P", GREY.size).save(black)
    Image.new("L", GREY.size).save(full / "000.png")             # the other one marks something
    of(~TRUTH * np.uint8(255)).save(full / "001.png")
    broken = truth / "structural_anomalies/000/000.png"
    broken.write_bytes(b"no mask")
    lines = data.check_photos(photos, tmp_path)
    assert any(str(black) in line and "is missing" in line for line in lines)
    assert any(str(full) in line and "over half" in line for line in lines)
    assert any(str(broken) in line and "cannot be read" in line for line in lines)
    assert len(data.odd_masks(photos, tmp_path)) == 3
    (folder / "defects_config.json").write_text("[]")            # LOCO's may mark so much
    assert not any("over half" in line for line in data.check_photos(photos, tmp_path))
