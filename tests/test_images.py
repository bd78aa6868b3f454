"""Reading images: every mode, turned photos, damaged files; the order of what is decoded ahead."""
import io
import os
import random
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from test_data import ROOT, picture, refused

import data
from data import InputError

# As data.py asks; pytest has filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

# One folder serves all examples of a test.
ONE_FOLDER = settings(deadline=None,
                      suppress_health_check=[HealthCheck.function_scoped_fixture])

RNG = np.random.default_rng(1)
GREY, COLOUR, ALPHA = (RNG.integers(0, 256, shape, dtype=np.uint8)
                       for shape in ((24, 24), (24, 24, 3), (24, 24)))
DEEP = RNG.integers(0, 65536, (24, 24), dtype=np.uint16)
INDEX = RNG.integers(0, 4, (24, 24), dtype=np.uint8)
PALETTE = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
CMYK = RNG.integers(0, 256, (24, 24, 4), dtype=np.uint8)
FLOAT = RNG.random((24, 24), dtype=np.float32)
BROKEN_EXIF = b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense"


# Modes

def of_palette(mode="P"):
    image = Image.fromarray(INDEX)
    image = image.convert("P") if mode == "P" else image
    image.putpalette(PALETTE.tobytes())
    return image


def lab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(COLOUR // 4 + 96), *profiles,
                                     outputMode="LAB")


def rgb(values):
    return np.repeat(np.asarray(values)[..., None], 3, 2)


def over_black(colour, alpha):
    return np.rint(colour * (alpha[..., None] / 255.0))


def of_inks(cmyk):
    inks = 255 - cmyk.astype(float)
    return np.rint(inks[..., :3] * inks[..., 3:] / 255)


DEEP_RGB, FADED = rgb(np.rint(DEEP / 257.0)), bytes([0, 90, 200, 255])
RGBA, ONE_COLOUR = np.dstack([COLOUR, ALPHA]), tuple(COLOUR[3, 4].tolist())
# name: (image, file suffix, options of save, the RGB it stands for, tolerance)
MODES = {
    "1": (Image.fromarray(GREY > 127), ".png", {}, rgb((GREY > 127) * 255), 0),
    "L": (Image.fromarray(GREY), ".png", {}, rgb(GREY), 0),
    "L bmp": (Image.fromarray(GREY), ".bmp", {}, rgb(GREY), 0),
    "L transparent": (Image.fromarray(GREY), ".png", {"transparency": 7},
                      rgb(np.where(GREY == 7, 0, GREY)), 0),
    "P": (of_palette(), ".png", {}, PALETTE[INDEX], 0),
    "P gif": (of_palette(), ".gif", {}, PALETTE[INDEX], 0),
    "P transparent": (of_palette(), ".png", {"transparency": 2},
                      PALETTE[INDEX] * (INDEX != 2)[..., None], 0),
    "P alphas": (of_palette(), ".png", {"transparency": FADED},
                 over_black(PALETTE[INDEX], np.array(list(FADED))[INDEX]), 1),
    "RGB": (Image.fromarray(COLOUR), ".png", {}, COLOUR, 0),
    "RGB ppm": (Image.fromarray(COLOUR), ".ppm", {}, COLOUR, 0),
    "RGB webp": (Image.fromarray(COLOUR), ".webp", {"lossless": True}, COLOUR, 0),
    "RGB transparent": (Image.fromarray(COLOUR), ".png", {"transparency": ONE_COLOUR},
                        COLOUR * (COLOUR != ONE_COLOUR).any(-1, keepdims=True), 0),
    "RGBA": (Image.fromarray(RGBA), ".png", {}, over_black(COLOUR, ALPHA), 1),
    "RGBA tif": (Image.fromarray(RGBA), ".tif", {}, over_black(COLOUR, ALPHA), 1),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA])), ".png", {},
           over_black(rgb(GREY), ALPHA), 1),
    "I;16": (Image.fromarray(DEEP), ".png", {}, DEEP_RGB, 0),
    "I;16 tif": (Image.fromarray(DEEP), ".tif", {}, DEEP_RGB, 0),
    "I;16B tif": (Image.frombytes("I;16B", (24, 24), DEEP.astype(">u2").tobytes()), ".tif", {},
                  DEEP_RGB, 0),
    "I tif": (Image.fromarray(DEEP.astype(np.int32)), ".tif", {}, DEEP_RGB, 0),
    "I pgm": (Image.fromarray(DEEP.astype(np.int32)), ".pgm", {}, DEEP_RGB, 0),
    "F to 1": (Image.fromarray(FLOAT), ".tif", {}, rgb(np.rint(FLOAT * 255.0)), 0),
    "F to 255": (Image.fromarray(GREY.astype(np.float32)), ".tif", {}, rgb(GREY), 0),
    "CMYK": (Image.fromarray(CMYK, "CMYK"), ".tif", {}, of_inks(CMYK), 1),
    "LAB": (lab(), ".tif", {}, COLOUR // 4 + 96, 4),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_reads_as_the_colours_it_stands_for(tmp_path, name):
    image, suffix, options, expected, tolerance = MODES[name]
    path = tmp_path / f"x{suffix}"
    image.save(path, **options)
    found = data.load_image(path, 24)
    assert found.shape == (24, 24, 3) and found.dtype == np.uint8 and found.flags.writeable
    assert np.abs(found.astype(float) - expected).max() <= tolerance
    assert (np.asarray(data.open_image(path)) == found).all()


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "RGBX", "HSV", "YCbCr"])
def test_modes_that_need_no_file(mode):
    half = np.full((24, 24), 128, np.uint8)
    if mode == "PA":
        image = of_palette("PA").convert("PA")
        image.putalpha(Image.fromarray(half))
        expected = over_black(PALETTE[INDEX], half)
    elif mode == "La":
        image = Image.fromarray(np.dstack([GREY, half])).convert("La")
        expected = over_black(rgb(GREY), half)
    elif mode == "RGBa":
        image = Image.fromarray(np.dstack([COLOUR, half])).convert("RGBa")
        expected = over_black(COLOUR, half)
    else:
        image, expected = Image.fromarray(COLOUR).convert(mode), COLOUR
    assert image.mode == mode
    tolerance = {"HSV": 8, "YCbCr": 3}.get(mode, 2)
    assert np.abs(np.asarray(data.to_rgb(image), float) - expected).max() <= tolerance


def png16(planes):
    rng = np.random.default_rng(planes)
    deep = rng.integers(0, 65536, (24, 24, planes), dtype=np.uint16)
    return deep / 257.0, png16_of(deep)


def png16_of(deep):
    """(24, 24, planes) -> a 16-bit PNG of 2 to 4 bands (Pillow writes none), filter 0."""
    planes = deep.shape[2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(kind, body):
        checked = kind + body
        return len(body).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")

    head = (24).to_bytes(4, "big") * 2 + bytes([16, {2: 4, 3: 2, 4: 6}[planes], 0, 0, 0])
    chunks = (chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_16_bit_colour(tmp_path, planes):
    deep, content = png16(planes)
    (tmp_path / "x.png").write_bytes(content)
    expected = deep if planes == 3 else over_black(deep[..., :-1], deep[..., -1])
    expected = np.broadcast_to(expected, (24, 24, 3))
    assert np.abs(data.load_image(tmp_path / "x.png", 24) - expected).max() <= 2


@pytest.mark.parametrize("values", [
    [[-1, 5]], [[0, 65536]], [[-0.1, 0.5]], [[0.0, 255.5]], [[float("nan"), 0.5]],
    [[0.0, float("inf")]]])
def test_values_without_a_known_scale_are_refused(tmp_path, values):
    values = np.array(values)
    values = values.astype(np.int32 if values.dtype.kind == "i" else np.float32)
    path = tmp_path / "x.tif"
    Image.fromarray(values).save(path)
    refused(lambda: data.load_image(path, 8), "x.tif", "values from", "8 or 16 bits")


# Turned and cropped

def turned():
    """An upright photo, and by EXIF orientation what a camera stores of it. EXIF 2.3: where the
    stored row 0 and column 0 lie in the upright photo."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[8:, 16:] = (255, 0, 0), (0, 0, 255)       # upper left, lower right
    return upright, {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1)}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    upright, stored = turned()
    exif = Image.Exif()
    exif[0x0112] = orientation                       # 0 and 9 say nothing
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}
    image = Image.fromarray(np.ascontiguousarray(stored.get(orientation, upright)))
    image.save(tmp_path / f"x{suffix}", exif=exif, **options.get(suffix, {}))
    found = np.asarray(data.open_image(tmp_path / f"x{suffix}")).astype(int)
    assert found.shape == upright.shape and np.abs(found - upright).max() <= 8


def test_a_broken_exif_block_does_not_cost_the_photo(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "x.png", exif=BROKEN_EXIF)
    assert (data.load_image(tmp_path / "x.png", 24) == COLOUR).all()


def test_a_photo_is_turned_though_the_rest_of_its_exif_block_is_broken(tmp_path):
    upright, stored = turned()
    entries = b"\x01\x12\0\3\0\0\0\1\0\6\0\0" + b"\x01\x4c\0\2\0\0\0\2ab\0\0"   # text as SubIFD
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + entries + bytes(4)
    Image.fromarray(np.ascontiguousarray(stored[6])).save(tmp_path / "x.png", exif=exif)
    assert (np.asarray(data.open_image(tmp_path / "x.png")) == upright).all()


def test_adobe_cmyk_jpeg_is_not_inverted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    found = data.load_image(tmp_path / "x.jpg", 8).astype(int)
    assert np.abs(found - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    colours = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in colours)
    path, options = tmp_path / f"x{suffix}", {"lossless": True} if suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, **options)
    assert np.abs(data.load_image(path, 8).astype(int) - colours[0]).max() <= 2


@settings(ONE_FOLDER, max_examples=30)
@given(width=st.integers(1, 60), height=st.integers(1, 60), size=st.integers(1, 48),
       seed=st.integers(0, 999))
def test_resizing_is_antialiased_bilinear(tmp_path, width, height, size, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    oracle = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), (size, size), mode="bilinear",
        antialias=True, align_corners=False)
    found = data.load_image(tmp_path / "x.png", size)
    difference = np.abs(found - oracle[0].permute(1, 2, 0).numpy())
    assert difference.max() <= 1.5                   # 8 bits after each of two passes


# Bad files

def encoded(suffix="png", **options):
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix, **options)
    return file.getvalue()


def half(suffix):
    return encoded(suffix)[:len(encoded(suffix)) // 2]


BAD = {
    "empty.png": b"",
    "text.png": b"this is not an image\n" * 50,
    "signature.png": encoded()[:8],
    "header.png": encoded()[:40],
    "half.png": half("png"),
    "half.jpg": half("jpeg"),
    "half.gif": half("gif"),
    "half.bmp": half("bmp"),
    "half.webp": half("webp"),
    "half.tif": half("tiff"),
    "lzw.tif": encoded("tiff", compression="tiff_lzw")[:-3000],
    "crc.png": encoded()[:20] + b"\xff" + encoded()[21:],
    "bomb.ppm": b"P6 100000 100000 255\n" + bytes(100),
    "bomb.pgm": b"P5 2147483647 2147483647 255\n" + bytes(100),
    "zero.ppm": b"P6 0 0 255\n",
    "nul.jpg": bytes(5000),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name])
    refused(lambda: data.load_image(tmp_path / name, 8), tmp_path / name)
    refused(lambda: data.open_image(tmp_path / name), tmp_path / name)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    def loading(name):
        return lambda: data.load_image(tmp_path / name, 8)

    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    refused(loading("folder.png"), "folder.png", "is a folder")
    refused(loading("none.png"), "none.png", "no such file")
    refused(loading("dangling.png"), "dangling.png", "no such file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")             # opening it would wait for ever
        refused(loading("pipe.png"), "pipe.png")


@settings(ONE_FOLDER, max_examples=60)
@given(suffix=st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp"]),
       seed=st.integers(0, 10 ** 6))
def test_damaged_bytes_give_an_image_or_an_input_error(tmp_path, suffix, seed):
    rng, content = random.Random(seed), bytearray(encoded(suffix))
    for _ in range(rng.randint(1, 8)):
        end = min(len(content), rng.choice((60, 10 ** 9)))
        content[rng.randrange(end)] = rng.randrange(256)
    path, length = tmp_path / f"x.{suffix}", rng.randrange(1, len(content))
    path.write_bytes(content[:rng.choice((len(content), length))])
    try:
        assert data.load_image(path, 8).shape == (8, 8, 3)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_nothing_but_the_error_reaches_the_terminal(tmp_path):
    for name, content in BAD.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(COLOUR).save(tmp_path / "exif.png", exif=BROKEN_EXIF)
    of_palette().save(tmp_path / "alphas.png", transparency=FADED)
    (tmp_path / "large.png").write_bytes(encoded())
    code = textwrap.dedent("""
        import sys, data, images
        from pathlib import Path
        images.Image.MAX_IMAGE_PIXELS = 3000           # large.png: more, not twice it
        def command():
            paths = data.find_images([Path(sys.argv[1])])
            for path, image in zip(paths, data.load_images(paths, 8)):
                if not isinstance(image, data.InputError):
                    print(path.name)
        sys.exit(data.run_command(command))
        """)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert done.stderr == "" and done.stdout.split() == ["alphas.png", "exif.png", "large.png"]


# Many files

def test_load_images_keeps_the_order_and_goes_on_past_bad_files(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(40)]
    for i in (0, 7, 39):
        paths[i].write_bytes(b"broken")
    found = list(data.load_images(iter(paths), 6))
    assert len(found) == 40
    for i, (path, image) in enumerate(zip(paths, found)):
        if i in (0, 7, 39):
            assert isinstance(image, InputError) and str(path) in str(image)
        else:
            assert (image == data.load_image(path, 6)).all()
    assert list(data.load_images([], 6)) == []


def test_decoding_ahead_is_bounded():
    begun = []

    def note(item):
        begun.append(item)
        return item

    results = data.ahead(note, range(10 ** 9), waiting=5)
    assert [next(results) for _ in range(10)] == list(range(10))
    time.sleep(0.05)
    assert len(begun) <= 10 + 5
    results.close()


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        list(data.ahead(lambda item: 1 // item, [1, 0]))


def test_find_images(tmp_path):
    inside = [picture(tmp_path / "a" / name) for name in ("b/1.png", "b/2.JPG", "z.png")]
    (tmp_path / "a/readme.txt").write_text("x")
    odd, gone = tmp_path / "odd.dat", tmp_path / "gone.png"
    odd.write_bytes(b"x")
    assert data.find_images([odd, tmp_path / "a", gone]) == [odd, *inside, gone]
    (tmp_path / "void").mkdir()
    refused(lambda: data.find_images([tmp_path / "void"]), "void", "no images")


def test_flat_names():
    paths = [Path("/d/test", name) for name in ("good/000.png", "bad/000.png", "bad/000.jpg")]
    assert data.flat_names(paths) == ["good_000", "bad_000", "bad_000_2"]
    assert data.flat_names([Path("/d/x.png")]) == ["x"] and data.flat_names([]) == []


PART = st.sampled_from(["a", "A", "b", "a_b", "2", "a_2"])


@settings(deadline=None)
@given(st.lists(st.lists(PART, min_size=1, max_size=3), max_size=12))
def test_flat_names_are_unique_and_hold_no_folder(parts):
    paths = [Path("/r", *part[:-1], part[-1] + ".png") for part in parts]
    names = data.flat_names(paths)
    assert len(names) == len(paths) and len({name.lower() for name in names}) == len(names)
    assert not any(os.sep in name for name in names)


def tiff16(planar, white_is_zero=False):
    """A 16-bit TIFF of three bands, each by itself where `planar`, or of one. -> values, content"""
    bands = 1 if white_is_zero else 3
    ramp = np.linspace(0, 60_000, 64 * 16).reshape(16, 64, 1) / np.arange(1, 1 + bands)
    ramp = ramp.astype("<u2")
    planes = [ramp[..., i] for i in range(bands)] if planar else [ramp]
    data, size, at = b"".join(p.tobytes() for p in planes), 16 * 64 * 2, 8 + 2 + 10 * 12 + 4
    extra = np.full(bands, 16, "<u2").tobytes()                 # bits of each
    extra += b"".join((at + 64 + i * size).to_bytes(4, "little") for i in range(bands))
    extra += b"".join(size.to_bytes(4, "little") for _ in range(bands))
    many, split = bands > 1, planar and bands > 1
    entries = [(256, 4, 1, 64), (257, 4, 1, 16), (258, 3, bands, at if many else 16),
               (259, 3, 1, 1),
               (262, 3, 1, 2 * many if not white_is_zero else 0),
               (273, 4, bands if split else 1, at + 2 * bands if split else at + 64),
               (277, 3, 1, bands), (278, 4, 1, 16),
               (279, 4, bands if split else 1, at + 6 * bands if split else size * bands),
               (284, 3, 1, 2 if planar else 1)]
    head = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    for tag, kind, count, value in entries:
        head += b"".join(part.to_bytes(n, "little")
                         for part, n in ((tag, 2), (kind, 2), (count, 4), (value, 4)))
    return ramp, head + bytes(4) + extra.ljust(64, b"\0") + data


def test_16_bits_that_pillow_misreads_are_refused(tmp_path):
    """It takes planes of 16 bits for 8, and does not turn round a white of 0."""
    path = tmp_path / "x.tif"
    ramp, content = tiff16(planar=False)
    path.write_bytes(content)
    upper = Image.fromarray((ramp // 256).astype(np.uint8))
    upper = np.array(upper.resize((64, 64), Image.Resampling.BILINEAR), int)
    assert np.abs(data.load_image(path, 64) - upper).max() <= 1
    for bad in (tiff16(planar=True), tiff16(planar=False, white_is_zero=True)):
        path.write_bytes(bad[1])
        with pytest.raises(InputError, match="x.tif: .*save it with 8 bits"):
            data.load_image(path, 64)


def test_no_memory_is_no_fault_of_the_photo(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")

    def use(image):
        raise MemoryError

    with pytest.raises(MemoryError):
        data.decode(data.read(tmp_path / "x.png"), tmp_path / "x.png", use)


def test_a_read_that_fails_after_it_was_opened_names_its_file():
    with pytest.raises(InputError, match="^/proc/self/mem: cannot be read"):
        data.read(Path("/proc/self/mem"))
