"""What is a photo, and what a kind: hidden files, links, suffixes, heat maps, twice the same."""
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from conftest import command, make_photos, one_error
from test_data import loco, picture, pictures, refused, visa, write_table

import data
import eval as evaluation
import predict

README = "PNG, JPEG, JPEG 2000, BMP, TIFF, WebP, AVIF, GIF or PNM"


def test_hidden_files_and_folders_are_none_at_any_level(tmp_path):
    folder = loco(tmp_path / ".data")                # the folder given may be hidden
    before = data.find_photos(tmp_path / ".data", "breakfast_box", 0)
    seen = data.find_images([folder])
    for place in (".x", "train/.x", "train/good/.x", "test/.x", "test/.x/y", "test/good/.x/y/z"):
        pictures(folder / place, 2)
    for place in ("train/good/.a.png", "test/.a.png", "test/good/._000.png"):
        picture(folder / place)
    assert data.find_photos(tmp_path / ".data", "breakfast_box", 0) == before
    assert data.find_images([folder]) == seen
    assert data.find_images([folder / "test/.x/y"])  # it was asked for


def test_hidden_runs_are_none(tmp_path):
    for name in ("a", ".trash/b", "c/.x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "c/scores.csv").write_text("")
    assert evaluation.find_runs([tmp_path]) == [tmp_path / "a", tmp_path / "c"]


def test_every_suffix_of_the_formats_that_the_readme_names_is_taken():
    formats = ("PNG", "JPEG", "JPEG2000", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "AVIF")
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    assert known | {".pnm", ".jpe", ".avif"} <= set(data.SUFFIXES)
    assert README in (data.REPORTED.parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", [".pnm", ".jpe", ".avif", ".PNM"])
def test_a_photo_of_a_rarer_suffix_is_read(tmp_path, suffix):
    folder = tmp_path / "nut/train/good"
    paths = [folder / f"{i}{suffix}" for i in range(3)]
    folder.mkdir(parents=True)
    try:
        for path in paths:
            image = Image.new("RGB", (16, 16), "red")
            image.save(path, {".pnm": "PPM", ".jpe": "JPEG"}.get(suffix.lower()))
    except (KeyError, OSError):
        pytest.skip("this Pillow writes no AVIF")
    assert data.find_images([tmp_path]) == paths
    assert len(data.find_photos(tmp_path, "nut", 0)) == 3
    assert data.load_image(paths[0], 8)[0, 0, 0] > 200


def test_linked_folders_are_followed_once(tmp_path, capsys):
    inside = pictures(tmp_path / "given/a", 2)
    other = pictures(tmp_path / "elsewhere/b", 2)
    for name, target in (("link", "elsewhere"), ("again", "elsewhere/b"), ("z", "given/a"),
                         ("self", "given"), ("up", "given/a/.."), ("none", "gone")):
        (tmp_path / "given" / name).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "given")
    (tmp_path / "given/loop").symlink_to("loop")
    found = data.find_images([tmp_path / "given"])
    assert sorted(map(os.path.realpath, found)) == sorted(map(str, inside + other))
    assert capsys.readouterr().err == ""


def test_photos_that_are_passed_over_are_counted_in_one_line(tmp_path, capsys):
    folder = loco(tmp_path)

    def lines():
        return [line for line in data.check_photos(
            data.find_photos(tmp_path, "breakfast_box", 0), tmp_path) if "passed over" in line]

    assert lines() == []
    (folder / "train/good/notes.txt").write_text("no photo")
    (folder / "test/good/label").mkdir()                         # BMAD's masks
    picture(folder / "test/good/label/000.png")
    assert lines() == []
    for name in ("train/good/deeper/1.png", "train/bent/2.JPG", "test/good/x/y/3.tif"):
        picture(folder / name)
    (folder / "train/good/4.heic").write_bytes(b"x")
    (folder / "train/good/6.tga").write_bytes(b"x")
    (folder / "train/good/5.png").symlink_to(tmp_path / "gone.png")
    [line] = lines()
    assert "photos passed over: 6, such as" in line and str(folder / "test/good/x/y/3.tif") in line
    data.find_images([folder / "train"])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {folder / 'train'}: photos passed over: 3, such as")


def test_ground_truth_is_not_judged(tmp_path, capsys):
    """Of MVTec, VisA and BMAD; but photos in a folder of such a name are, and what is asked for."""
    photos, masks = [tmp_path / "label/1.png", tmp_path / "a/Masks/1.png"], []
    for name, mask in (("bottle/test/bent/1.png", "bottle/ground_truth/bent/1_mask.png"),
                       ("candle/Data/Images/Anomaly/1.png", "candle/Data/Masks/Anomaly/1.png"),
                       ("brain/test/Ungood/img/1.png", "brain/test/Ungood/label/1.png"),
                       ("own/test/bent/1.png", "own/test/bent/label/1.png")):
        photos.append(tmp_path / name)
        masks.append(tmp_path / mask)
    for path in photos + masks:
        picture(path)
    assert set(data.find_images([tmp_path])) == set(photos)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}: ground-truth masks, passed over: 4, such as {tmp_path}/")
    folders = [mask.parent for mask in masks]
    assert data.find_images(folders) == masks and data.find_images(masks) == masks
    assert capsys.readouterr().err == ""


def test_the_same_photo_as_good_and_as_a_defect_is_named(tmp_path):
    folder = loco(tmp_path)
    bad, good = folder / "test/structural_anomalies/000.png", folder / "test/good/zzz.png"
    shutil.copy(bad, folder / "test/structural_anomalies/again.png")
    photos = data.find_photos(tmp_path, "breakfast_box", 0)
    assert data.same(photos) == []                               # twice in one kind
    shutil.copy(bad, good)
    [line] = data.same(data.find_photos(tmp_path, "breakfast_box", 0))
    assert str(bad) in line and str(good) in line


def test_heat_maps_are_no_photos(trained, tmp_path):
    shutil.copytree(trained[0] / "photos/widgets/test", tmp_path / "shots")
    (tmp_path / "run").symlink_to(trained[0] / "run")
    asked = ("predict", "shots", "--run", "run")
    first = command(*asked, "--heatmap", "shots/heat", cwd=tmp_path)
    drawn = sorted((tmp_path / "shots/heat").iterdir())
    assert first.returncode == 0 and len(drawn) == 12
    for more in (("--heatmap", "shots/heat"), ()):
        again = command(*asked, *more, cwd=tmp_path)
        assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, first.stderr)
    assert sorted((tmp_path / "shots/heat").iterdir()) == drawn
    refused(lambda: data.find_images([tmp_path / "shots/heat"]), "no images")
    picture(tmp_path / "shots/heat/own.png")         # photos among them are still not drawn on
    refused(lambda: data.make_folder(tmp_path / "shots/heat", "--heatmap", data.find_images(
        [tmp_path / "shots"]), []), "photos themselves")


def test_heat_maps_are_no_kind_of_defect(tmp_path, trained):
    shutil.copytree(trained[0] / "photos", tmp_path / "photos")
    (tmp_path / "run").symlink_to(trained[0] / "run")
    before = data.find_photos(tmp_path / "photos", "widgets", 0)
    test = tmp_path / "photos/widgets/test"
    for place in (test / "heat", tmp_path / "maps"):
        assert command("predict", test / "good", "--run", "run", "--heatmap", place,
                       cwd=tmp_path).returncode == 0
    shutil.copy(next((tmp_path / "maps").iterdir()), test / "good/zzz.png")
    photos = data.find_photos(tmp_path / "photos", "widgets", 0)
    assert photos == before
    assert not any("passed" in line for line in data.check_photos(photos, tmp_path / "photos"))


def test_folders_beside_visas_categories_are_none(tmp_path):
    write_table(tmp_path, visa(tmp_path) + visa(tmp_path, "pcb1", 10, 2))
    (tmp_path / "pcb1/image_anno.csv").unlink()      # the table names it
    for other in ("__MACOSX", "cache", "Data", "le"):
        (tmp_path / other).mkdir()
    assert data.list_categories(tmp_path) == ["candle", "pcb1"]


@pytest.mark.parametrize("category", ["", "widgets,", ","])
def test_a_category_without_a_name_is_none(tmp_path, category):
    make_photos(tmp_path / "photos")
    for given in ("photos", "photos/widgets"):
        line = one_error(command("train", "--data", given, "--category", category, cwd=tmp_path))
        assert "--category" in line or "is a category" in line


def test_a_link_to_itself_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for words in (["--data", "loop", "--category", "bottle"],
                  ["--data", ".", "--category", "loop"],
                  ["--category", "pushpins", "--pdn", "loop", "--out", "run"]):
        asked = command("train", *words, cwd=tmp_path)
        assert asked.returncode == 2 and asked.stderr.count("\n") == 1
        assert asked.stderr.startswith(f"error: --{'pdn loop' if '--pdn' in words else 'data'}")
    with pytest.raises(data.InputError, match="loop"):
        data.make_folder(Path("loop"), "--heatmap", [Path("loop/x.png")], ["x"])
        data.read(Path("loop"))


def test_an_empty_data_option_is_not_the_twin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, names = data.find_data("", "pushpins")
    assert root == Path() and not Path("data").exists()
    with pytest.raises(data.InputError, match="holds no category folder"):
        data.find_photos(root, *names, 0)


def test_a_table_keeps_the_bytes_of_a_name(tmp_path):
    name = os.fsdecode(b"\xff.png")
    predict.write_table(tmp_path / "t.csv", [{"path": name, "verdict": "good"}])
    assert os.fsencode(name) in (tmp_path / "t.csv").read_bytes()


def test_a_photo_that_cannot_be_read_does_not_stop_the_search_for_repeats(tmp_path):
    """Folders stand for photos: they have a size, and reading one fails, for root, too."""
    photos = [data.Photo(tmp_path / name, "w", split)
              for name, split in zip("abcd", ("test", "test", "test", "train"))]
    for photo in photos[:2]:
        photo.path.mkdir()
    for photo in photos[2:]:
        photo.path.write_bytes(bytes(photos[0].path.stat().st_size))
    [line] = data.same(photos)
    assert str(photos[2].path) in line and str(photos[3].path) in line
