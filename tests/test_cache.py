"""The cache of frozen features: computed once, never stale, whole or not there at all."""
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch
from test_data import picture, pictures, refused

import data
from backbone import cached_features

SHAPE = (4, 3)                                       # N, d0
ROW = 2 * 4 * 3                                      # bytes of a photo's features


class Backbone:
    """Counts what it computes. Its features, the means of a photo's quarters, tell photos apart."""
    def __init__(self, weight=1.0):
        self.weight, self.images, self.sizes = weight, 0, []

    def __call__(self, batch):
        assert batch.dtype == np.uint8 and batch.shape[3] == 3
        self.images += len({image.tobytes() for image in batch if image.any()})  # no padding
        self.sizes.append(len(batch))
        n, size = batch.shape[:2]
        quarters = batch.astype(np.float32).reshape(n, 2, size // 2, 2, size // 2, 3)
        return self.weight * quarters.mean((2, 4)).reshape(n, *SHAPE)


def features(paths, cache, backbone, key="weights-1", size=8, **options):
    """Of photos that can all be read."""
    found, reasons = cached_features(paths, size, key, backbone, SHAPE, cache, **options)
    assert not reasons
    return found


def direct(paths, backbone, size=8):
    return np.stack([backbone(data.load_image(path, size)[None])[0] for path in paths]).astype("e")


def entries(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


# Computed once, and never stale

def test_a_set_of_photos_is_computed_once(tmp_path):
    paths, backbone, cache = pictures(tmp_path / "a", 37), Backbone(), tmp_path / "cache"
    steps = []
    first = features(paths, cache, backbone, progress=steps.append)
    assert first.shape == (37, *SHAPE) and first.dtype == np.float16
    assert (first == direct(paths, Backbone())).all()
    assert backbone.images == 37 and set(backbone.sizes) == {16} and steps == [16, 32, 37]
    again = features(paths, cache, backbone)
    assert (again == first).all() and again.dtype == np.float16 and again.shape == first.shape
    assert backbone.images == 37 and len(entries(cache)) == 1


def test_moved_photos_are_known_by_their_bytes(tmp_path):
    paths, cache = pictures(tmp_path / "a", 5), tmp_path / "cache"
    before, backbone = features(paths, cache, Backbone()), Backbone()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = [tmp_path / "b" / path.name for path in paths]
    assert (features(moved, cache, backbone) == before).all() and backbone.images == 0


def test_what_is_stale_is_never_served(tmp_path):
    paths, cache = pictures(tmp_path / "a", 5), tmp_path / "cache"
    before, backbone = features(paths, cache, Backbone()), Backbone()
    picture(paths[2], number=77)                     # another photo under the old name
    changed = features(paths, cache, backbone)
    assert backbone.images == 5 and (changed == direct(paths, Backbone())).all()
    assert (changed != before).any((1, 2)).tolist() == [False, False, True, False, False]
    turned = features(paths[::-1], cache, backbone)
    assert (turned == changed[::-1]).all()
    double = features(paths, cache, Backbone(2.0), key="weights-2")
    assert (double == direct(paths, Backbone(2.0))).all()
    small = features(paths, cache, Backbone(), size=4)
    assert (small == direct(paths, Backbone(), 4)).all()


def test_another_shape_is_another_file(tmp_path):
    paths, cache = pictures(tmp_path / "a", 2), tmp_path / "cache"
    features(paths, cache, Backbone())

    def means(batch):
        return batch.astype(np.float32).mean((1, 2))[:, None]

    other, _ = cached_features(paths, 8, "weights-1", means, (1, 3), cache)
    assert other.shape == (2, 1, 3) and len(entries(cache)) == 2


def flipped(content, at):
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:10], lambda content: content[:-ROW],
    lambda content: content[:-1], lambda content: content + b"x",
    lambda content: bytes(len(content)), lambda content: flipped(content, 0),
    lambda content: flipped(content, 2 * ROW), lambda content: flipped(content, -1)])
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    paths, cache = pictures(tmp_path / "a", 6), tmp_path / "cache"
    first, backbone = np.array(features(paths, cache, Backbone())), Backbone()
    [file] = entries(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert (features(paths, cache, backbone) == first).all() and backbone.images == 6
    assert file.read_bytes() == whole
    assert (features(paths, cache, backbone) == first).all() and backbone.images == 6


def test_a_whole_file_of_other_photos_is_not_taken(tmp_path):
    paths, others, cache = pictures(tmp_path / "a", 6), pictures(tmp_path / "b", 6), tmp_path / "c"
    first = np.array(features(paths, cache, Backbone()))
    [file] = entries(cache)
    features(others, cache, Backbone())
    [other] = set(entries(cache)) - {file}
    file.write_bytes(other.read_bytes())
    assert (features(paths, cache, Backbone()) == first).all()


def test_features_do_not_depend_on_how_many_there_are(tmp_path):
    """A real convolution, whose last bits may change with the batch size."""
    torch.manual_seed(0)
    conv, sizes = torch.nn.Conv2d(3, 64, 5).eval(), []

    @torch.inference_mode()
    def compute(batch):
        sizes.append(len(batch))
        images = torch.from_numpy(batch).permute(0, 3, 1, 2).float()
        return conv(images).flatten(2).mT.numpy()

    paths = pictures(tmp_path / "a", 37)
    whole, _ = cached_features(paths, 16, "k", compute, (144, 64), tmp_path / "cache")
    few, _ = cached_features(paths[33:36], 16, "k", compute, (144, 64), tmp_path / "cache")
    assert (whole[33:36] == few).all() and set(sizes) == {16}


# Mapped, not in memory

def test_the_features_are_mapped_and_torch_takes_them_as_they_are(tmp_path):
    """For reading only: a mapping that may be written counts as memory, and may be refused."""
    paths, cache = pictures(tmp_path / "a", 9), tmp_path / "cache"
    for found in (features(paths, cache, Backbone()), features(paths, cache, Backbone())):
        assert isinstance(found, np.memmap) and not found.flags.writeable
        tensor, index = torch.from_numpy(found), torch.tensor([8, 1, 1])
        assert tensor.dtype == torch.float16
        assert (tensor[index].numpy() == direct(paths, Backbone())[[8, 1, 1]]).all()


# Several processes, and killed ones

class Meeting(Backbone):
    """Calls `meet` before its second batch."""
    def __init__(self, meet):
        super().__init__()
        self.meet = meet

    def __call__(self, batch):
        if len(self.sizes) == 1:
            self.meet()
        return super().__call__(batch)


@pytest.fixture
def forks():
    """Starts processes; they end with the test."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forks here")
    context, started = multiprocessing.get_context("fork"), []

    def start(paths, cache, meet):
        process = context.Process(target=features, args=(paths, cache, Meeting(meet)))
        process.start()
        started.append(process)
        return process

    yield context, start
    for process in started:
        process.kill()
        process.join()


def test_a_killed_process_leaves_nothing_that_is_served_and_nothing_for_ever(tmp_path, forks):
    cache, paths, backbone = tmp_path / "cache", pictures(tmp_path / "a", 20), Backbone()
    context, start = forks
    halfway = context.Event()

    def sleep():
        halfway.set()
        time.sleep(60)

    process = start(paths, cache, sleep)
    assert halfway.wait(60)
    process.kill()
    process.join()
    [left] = entries(cache)
    assert left.suffix == ".part"
    assert (features(paths, cache, backbone) == direct(paths, Backbone())).all()
    assert backbone.images == 20
    for days, stays in ((0.9, True), (1.1, False)):  # after less than a day it may be at work
        then = time.time() - days * 24 * 60 * 60
        os.utime(left, (then, then))
        features(paths[:round(10 * days)], cache, backbone)
        assert left.exists() == stays
    assert len(entries(cache)) == 3


def test_two_processes_at_once(tmp_path, forks):
    """Neither goes on to its second batch before the other has computed its first."""
    cache, paths, backbone = tmp_path / "cache", pictures(tmp_path / "a", 40), Backbone()
    context, start = forks
    both = context.Barrier(2)
    children = [start(paths, cache, lambda: both.wait(60)) for _ in range(2)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert (features(paths, cache, backbone) == direct(paths, Backbone())).all()
    assert backbone.images == 0 and len(entries(cache)) == 1


def test_a_stop_halfway_leaves_nothing(tmp_path):
    cache, paths = tmp_path / "cache", pictures(tmp_path / "a", 20)

    def stopped(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features(paths, cache, stopped)
    assert entries(cache) == []


# Bad photos, bad features

def test_bad_photos_are_all_named_and_the_others_kept(tmp_path):
    paths, cache, backbone = pictures(tmp_path / "a", 20), tmp_path / "cache", Backbone()
    bad, good = [1, 6, 19], [i for i in range(20) if i not in (1, 6, 19)]
    paths[1].write_bytes(b"")
    paths[6].write_bytes(b"x" * 100)
    paths[19].unlink()
    for _ in range(2):                               # computed, and read back
        found, reasons = cached_features(paths, 8, "k", backbone, SHAPE, cache)
        assert list(reasons) == [paths[i] for i in bad] and np.isnan(found[bad]).all()
        for path, reason in reasons.items():
            assert str(path) in reason and "\n" not in reason
        assert "empty" in reasons[paths[1]] and "no such file" in reasons[paths[19]]
        rest = [paths[i] for i in good]
        assert (found[good] == direct(rest, Backbone())).all()
        assert backbone.images == 17
    picture(paths[1])                                # mended
    found, reasons = cached_features(paths, 8, "k", backbone, SHAPE, cache)
    assert list(reasons) == [paths[6], paths[19]] and np.isfinite(found[1]).all()


def test_it_matters_which_photo_cannot_be_read(tmp_path):
    paths, cache, gone = pictures(tmp_path / "a", 2), tmp_path / "cache", tmp_path / "gone.png"
    for order in ([gone, *paths], [*paths, gone], [gone, *paths]):
        found, reasons = cached_features(order, 8, "k", Backbone(), SHAPE, cache)
        assert list(reasons) == [gone]
        assert np.isnan(found).all((1, 2)).tolist() == [path == gone for path in order]


def test_photos_that_are_all_bad(tmp_path):
    paths = pictures(tmp_path / "a", 17)
    for path in paths:
        path.write_bytes(b"x")
    found, reasons = cached_features(paths, 8, "k", Backbone(), SHAPE, tmp_path / "cache")
    assert list(reasons) == paths and np.isnan(found).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_features_beyond_float16_are_refused_and_not_kept(tmp_path, value):
    paths, cache = pictures(tmp_path / "a", 3), tmp_path / "cache"

    def backbone(batch):
        return np.full((len(batch), *SHAPE), value)

    refused(lambda: features(paths, cache, backbone), paths[0], "65504")
    assert entries(cache) == []


# A folder that cannot be written

def test_a_cache_that_cannot_be_written_costs_one_line(tmp_path, capsys):
    paths, cache = pictures(tmp_path / "a", 6), tmp_path / "cache"
    cache.write_text("a file where the folder should be")
    found = features(paths, cache, Backbone())
    assert (found == direct(paths, Backbone())).all() and not isinstance(found, np.memmap)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {cache}: ")
    assert cache.read_text().startswith("a file")


def test_a_full_disk_costs_one_line_and_leaves_no_rubbish(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    paths, cache = pictures(tmp_path / "a", 40), tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * ROW, hard))         # no file may be larger
    try:
        found = features(paths, cache, Backbone())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (found == direct(paths, Backbone())).all()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {cache}: ") and "File too large" in line
    assert entries(cache) == []


def test_no_photos(tmp_path):
    assert features([], tmp_path / "cache", Backbone()).shape == (0, *SHAPE)
