"""Run folders: options, checkpoints, going on, taking over, runs in turn; several processes."""
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import (TRAIN, checkpoint, command, learned_the_same, make_photos, new_run, one_error,
                      same, score_rows, trains)

import backbone
import eval as evaluation
import options
import ladmim
import runs
from backbone import positions
from data import InputError
from ladmim import OPTIONS, PRESETS, Config, add_options


# Options and settings

def parse(*argv):
    return runs.parse(list(argv), Config, PRESETS, OPTIONS, add_options)


@pytest.mark.parametrize("text, seeds", [("3", [3]), ("0-4", [0, 1, 2, 3, 4]),
                                         ("7,0-2,1", [7, 0, 1, 2])])
def test_seeds_are_read(text, seeds):
    assert options.seed_list(text) == seeds
    for option in ("--seed", "--seeds"):
        assert parse("train", "--category", "x", option, text).seeds == seeds


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_every_setting_is_an_option_of_train(field):
    typed = "other.pt" if isinstance(field.default, str) else 3
    if field.name in OPTIONS:
        typed = list(OPTIONS[field.name])[-1]
    option = f"--{field.name.replace('_', '-')}"
    args = parse("train", "--category", "x", option, str(typed))
    assert options.chosen_settings(args, Config) == {field.name: typed}
    assert options.chosen_settings(parse("train", "--category", "x"), Config) == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_works(preset):
    cfg = Config(**PRESETS[preset])
    options.check_settings(cfg, OPTIONS, positions(cfg.image_size))


@pytest.mark.parametrize("grid", [8, 12, 16, 24, 48])
def test_grids_that_have_an_eighth_or_nearly_hold_checkerboards(grid):
    cfg = dataclasses.replace(Config(), mask="checkerboard", grid=grid)
    options.check_settings(cfg, OPTIONS, positions(cfg.image_size))


@pytest.mark.parametrize("settings, option", [
    ({"mask": "stripes"}, "--mask"), ({"mask": "checkerboard", "grid": 6}, "--grid"),
    ({"target": "code", "mim_score": "whitened"}, "--mim-score"),
    ({"codes": 129, "mim_score": "whitened"}, "--mim-score"), ({"grid": 7}, "--grid"),
    ({"image_size": 30}, "--grid"), ({"codes": 2 ** 15 + 1}, "--codes"),
    ({"levels": 0}, "--levels"), ({"ema_decay": 1.0}, "--ema-decay"),
    ({"mim_dropout": 1.0}, "--mim-dropout"), ({"mim_heads": 3}, "--mim-heads"),
    ({"train_ratio": 0.0}, "--train-ratio"), ({"score_ratio": 1e-4}, "--score-ratio"),
    ({"score_block": 1.1}, "--score-block"), ({"mim_lr": float("inf")}, "--mim-lr"),
    ({"mim_clip": -1.0}, "--mim-clip")])
def test_settings_that_cannot_work_are_named(settings, option):
    cfg = Config(**settings)
    with pytest.raises(InputError, match=f"^{option} "):
        options.check_settings(cfg, OPTIONS, positions(cfg.image_size))


def test_randomness_depends_on_its_key_alone():
    def draw(*key):
        return torch.rand(4, generator=runs.seeded(*key)).tolist()

    assert draw(0, "hvq", 3) == draw(0, "hvq", 3)
    others = [draw(0, "hvq", 3), draw(0, "hvq", 4), draw(1, "hvq", 3), draw(0, "mim", 3)]
    assert len({tuple(numbers) for numbers in others}) == 4


def test_a_machine_without_git_trains_too(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runs.git_commit() == ""


def test_a_file_of_weights_has_one_name(tmp_path, monkeypatch):
    """However its path was typed; the shipped one from everywhere."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    def setting(typed):
        args = parse("train", "--category", "x", "--pdn", typed)
        return options.chosen_settings(args, Config)["pdn"]

    same = ("a.pt", "./a.pt", "../in/a.pt", "b/../a.pt", str(tmp_path / "in/a.pt"))
    assert {setting(typed) for typed in same} == {"a.pt"}
    assert setting("../a.pt") == setting(str(tmp_path / "a.pt")) == str(tmp_path / "a.pt")
    assert setting("random") == "random" and setting("b/a.pt") == "b/a.pt"
    assert setting(str(options.ROOT / options.SHIPPED)) == options.SHIPPED == Config().pdn
    assert setting(options.SHIPPED) == str(tmp_path / "in" / options.SHIPPED)
    assert setting("./random") == str(tmp_path / "in/random")        # a file, not the control


IDLE = [("--codebook ema", "--tokenizer published"), ("--code-dim 8", "--tokenizer published"),
        ("--ema-decay 0.9", "--codebook gradient"), ("--train-block 0.1", "--mask random"),
        ("--train-block 0.1", "--mask checkerboard"), ("--train-ratio 0.3", "--mask checkerboard"),
        ("--hvq-lr 0.1", "--hvq-epochs 0"), ("--commitment 1.0", "--hvq-epochs 0"),
        ("--ema-decay 0.9", "--hvq-epochs 0"), ("--mim-batch 4", "--mim-epochs 0"),
        ("--mask random", "--mim-epochs 0"), ("--train-ratio 0.5", "--mim-epochs 0"),
        ("--mim-warmup 2", "--mim-epochs 0"), ("--mim-dropout 0.2", "--mim-epochs 0"),
        ("--hvq-drop 0.5", "--hvq-drop-at 1"), ("--hvq-drop 0.5", "--hvq-drop-at 0.9995"),
        ("--hvq-dropout 0.2", "--tokenizer published --hvq-epochs 0")]


@pytest.mark.parametrize("option, mode", IDLE)
def test_a_setting_that_does_nothing_is_refused(option, mode):
    def check(*words):
        typed = options.chosen_settings(parse("train", "--category", "x", *words), Config)
        options.check_typed(typed, Config(**{"codebook": "ema"} | typed))

    check(*option.split())                           # alone or in another mode it does something
    check(*mode.split())
    why = " ".join(mode.split()[-2:])                # the last option, where a mode has two
    with pytest.raises(InputError, match=f"^{option}: does nothing beside {why}; leave it out$"):
        check(*option.split(), *mode.split())


def test_what_published_tokenizers_heed_is_not_refused():
    typed = {"tokenizer": "published", "ema_decay": 0.9, "codes": 64}
    options.check_typed(typed, Config(**typed))
    six = {"mask": "checkerboard", "masks": 6}
    options.check_typed(six, Config(**six))


@pytest.mark.parametrize("more, option", [
    (["--tokenizer", "published"], "--code-dim 8"), (["--separate"], "--separate")])
def test_an_option_that_does_nothing_trains_nothing(photos, more, option):
    assert one_error(command(*TRAIN, *more, cwd=photos)).startswith(f"error: {option}: does noth")
    assert not (photos / "runs").exists()


# A folder holds one run

def test_a_new_version_goes_on_with_an_older_run(tmp_path):
    """A setting that came later has its default in older runs."""
    run = new_run(tmp_path)
    del run.state["config"]["target"]
    run.save(stage="hvq", epoch=1)
    run.lock.close()
    again = new_run(tmp_path)
    assert again.state["epoch"] == 1
    again.lock.close()
    with pytest.raises(InputError, match="target = histogram, asked for pixel"):
        new_run(tmp_path, target="pixel")


def test_other_settings_do_not_overwrite_a_run(trained):
    result = command(*TRAIN, "--codes", "16", "--out", "run", cwd=trained[0])
    assert "codes = 8, asked for 16" in one_error(result)


def test_precision_is_a_setting_of_the_run(photos):
    """bf16 at work from end to end: predict agrees with the training's table, roughly."""
    trains("--precision", "bf16", "--out", "run", cwd=photos)
    assert "precision = bf16, asked for fp32" in one_error(command(*TRAIN, "--out", "run",
                                                                   cwd=photos))
    predicted = command("predict", "photos/widgets/test", "--run", "run", "--json", cwd=photos)
    expected = {f"photos/{row['path']}": float(row["score"]) for row in score_rows(photos / "run")}
    lines = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert len(lines) == 12
    for line in lines:
        assert line["score"] == pytest.approx(expected[line["path"]], rel=0.05, abs=0.05)
    cpu, images = torch.device("cpu"), np.zeros((1, 64, 64, 3), np.uint8)
    detector = ladmim.load_detector(photos / "run", None, cpu)
    seen = backbone.look(detector.pdn, images, detector.cfg.grid, False, cpu, "bf16")
    assert torch.equal(detector.look(images)[0], (seen.float() - detector.mean) / detector.std)
    trains("--out", "old", cwd=photos)
    state = checkpoint(photos / "old")
    del state["config"]["precision"]                 # as a run from before the option
    torch.save(state, photos / "old/checkpoint.pt")
    trains("--out", "old", cwd=photos)


def test_a_data_set_of_the_same_name_elsewhere_is_not_taken_for_the_finished_one(photos):
    make_photos(photos / "b/photos", train=10)
    trains("--seeds", "0-1", cwd=photos)
    result = command(*TRAIN, "--seeds", "0-1", "--data", "b/photos", cwd=photos)
    assert "changed since this run began" in one_error(result)


@pytest.mark.parametrize("damage, reason", [("truncated", "truncated"), ("changed", "damaged"),
                                            ("foreign", "not a checkpoint"),
                                            ("newer", "format 99")])
def test_damaged_checkpoints_are_refused(trained, tmp_path, damage, reason):
    folder, _ = trained
    path, content = tmp_path / "checkpoint.pt", (folder / "run/checkpoint.pt").read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:len(content) // 2])
    elif damage == "changed":                        # in the middle of a tensor
        at = content.index(checkpoint(folder / "run")["mean"].numpy().tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
    else:
        newer = checkpoint(folder / "run") | {"format": 99}
        torch.save([1, 2] if damage == "foreign" else newer, path)
    result = command("predict", folder / "photos/widgets/test/good", "--run", tmp_path)
    assert reason in one_error(result) and len(result.stderr.splitlines()) == 1


def test_an_unfinished_run_is_not_predicted_with(tmp_path):
    new_run(tmp_path).save(stage="mim", epoch=1)
    result = command("predict", "x.png", "--run", tmp_path / "run")
    assert "its training is not finished" in one_error(result)


# Going on

def stopped_run(folder, monkeypatch):
    """A run that Ctrl-C stopped at the end of HVQ-Trans's training."""
    real = runs.Run.save

    def save_then_die(run, **news):
        real(run, **news)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "save", save_then_die)
        assert command(*TRAIN, "--out", "run", cwd=folder).returncode == 130


def other_processor(monkeypatch):
    """Moments of the same features, rounded otherwise."""
    real = backbone.channel_statistics
    monkeypatch.setattr(backbone, "channel_statistics", lambda *of: [
        moment * (1 + 2e-6) for moment in real(*of)])


def test_a_run_goes_on_on_another_processor(trained, photos, monkeypatch):
    """With the moments that it began with."""
    stopped_run(photos, monkeypatch)
    other_processor(monkeypatch)
    trains("--out", "run", cwd=photos)
    assert learned_the_same(trained[0] / "run", photos / "run")


def test_models_are_taken_over_on_another_processor(trained, photos, monkeypatch):
    other_processor(monkeypatch)
    trains("--take", trained[0] / "run", "--out", "other", cwd=photos)
    assert learned_the_same(trained[0] / "run", photos / "other")


def test_a_changed_training_photo_stops_a_run_even_where_its_features_are_the_same(
        trained, tmp_path, monkeypatch):
    shutil.copytree(trained[0] / "photos", tmp_path / "photos")
    stopped_run(tmp_path, monkeypatch)
    with open(tmp_path / "photos/widgets/test/good/000.png", "ab") as file:
        file.write(b"x")                             # no training photo
    trains("--out", "run", cwd=tmp_path)
    with open(tmp_path / "photos/widgets/train/good/000.png", "ab") as file:
        file.write(b"x")
    result = command(*TRAIN, "--out", "run", cwd=tmp_path)
    assert "changed since this run began" in one_error(result)


@pytest.mark.parametrize("stage", ["hvq", "mim"])
def test_a_killed_run_ends_bit_identical(trained, photos, stage, monkeypatch):
    """Stops in the middle of a stage, at an epoch whose checkpoint was written, and goes on."""
    real = runs.Run.save

    def save_then_die(run, **news):
        real(run, **news)
        if news["stage"] == stage and news["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "SAVE_EVERY", 0)       # a checkpoint every epoch
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "save", save_then_die)
        assert command(*TRAIN, "--out", "run", cwd=photos).returncode == 130
    trains("--out", "run", cwd=photos)
    assert learned_the_same(trained[0] / "run", photos / "run")


def test_a_checkpoint_is_written_once_a_minute_and_at_the_end_of_a_stage(photos, monkeypatch):
    real, saved = runs.Run.save, []

    def save(run, **news):
        saved.append((news["stage"], run.state["epoch"] if news["stage"] == "done"
                      else news["epoch"]))
        real(run, **news)

    monkeypatch.setattr(runs.Run, "save", save)
    trains("--out", "seldom", cwd=photos)
    assert saved == [("hvq", 3), ("mim", 3), ("done", 3)]
    saved.clear()
    monkeypatch.setattr(runs, "SAVE_EVERY", 0)
    trains("--out", "often", cwd=photos)
    assert saved == [*(("hvq", n) for n in (1, 2, 3)), *(("mim", n) for n in (1, 2, 3)),
                     ("done", 3)]


def test_a_second_train_only_reports(trained):
    folder, first = trained
    before = (folder / "run/checkpoint.pt").read_bytes()
    again = trains("--out", "run", cwd=folder)
    assert (folder / "run/checkpoint.pt").read_bytes() == before
    assert again.stdout.splitlines()[-4:] == first.stdout.splitlines()[-4:]


@pytest.mark.parametrize("lost", ["scores.csv", "maps.npz", "config.json", "bytes of maps.npz"])
def test_a_finished_run_is_scored_again_where_a_table_is_lost(trained, photos, lost):
    shutil.copytree(trained[0] / "run", photos / "run")
    file = photos / "run" / lost.split()[-1]
    content = file.read_bytes()
    if lost.startswith("bytes"):
        file.write_bytes(content[:60] + bytes(100) + content[160:])
    else:
        file.unlink()
    trains("--out", "run", cwd=photos)
    assert file.read_bytes() == content


def test_a_finished_run_is_scored_again_where_photos_came(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    good = tmp_path / "photos/widgets/test/good"
    shutil.copy(good / "000.png", good / "later.png")
    trains("--out", "run", cwd=tmp_path)
    assert "good/later.png" in (tmp_path / "run/scores.csv").read_text()


@pytest.mark.parametrize("replaced", ["test/good/001.png", "validation/good/002.png"])
def test_a_finished_run_is_scored_again_where_a_photo_was_replaced(trained, tmp_path, replaced):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    photos, before = tmp_path / "photos/widgets", score_rows(tmp_path / "run")
    shutil.copy(photos / "test/structural_anomalies/000.png", photos / replaced)
    trains("--out", "run", cwd=tmp_path)
    rows = score_rows(tmp_path / "run")
    asked = command("predict", "photos/widgets/test", "photos/widgets/validation", "--run", "run",
                    "--json", cwd=tmp_path)
    for line in map(json.loads, asked.stdout.splitlines()):
        row, = (row for row in rows if line["path"].endswith(row["path"]))
        assert float(row["score"]) == pytest.approx(line["score"], abs=1e-3, rel=1e-6)
    changed = {row["path"] for row, old in zip(rows, before, strict=True) if row != old}
    assert f"widgets/{replaced}" in changed
    assert (len(changed) == 1) == replaced.startswith("test")    # all are scored by validation's
    written = (tmp_path / "run/checkpoint.pt").read_bytes()
    trains("--out", "run", cwd=tmp_path)                         # and only once
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == written


def test_a_photo_that_is_replaced_while_a_run_trains_is_scored_by_the_next_train(
        photos, tmp_path, monkeypatch):
    (tmp_path / "photos").unlink()
    make_photos(tmp_path / "photos")
    test, train_mim = tmp_path / "photos/widgets/test", ladmim.train_mim

    def replaces(*args):
        shutil.copy(test / "structural_anomalies/000.png", test / "good/001.png")
        return train_mim(*args)

    monkeypatch.setattr(ladmim, "train_mim", replaces)
    trains("--out", "run", cwd=tmp_path)
    monkeypatch.undo()
    before = score_rows(tmp_path / "run")
    trains("--out", "run", cwd=tmp_path)
    changed = [row["path"] for row, old in zip(score_rows(tmp_path / "run"), before) if row != old]
    assert changed == ["widgets/test/good/001.png"]


def test_a_finished_run_is_scored_again_where_a_photo_changed_its_kind(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    test = tmp_path / "photos/widgets/test"
    (test / "good/003.png").rename(test / "logical_anomalies/new.png")
    trains("--out", "run", cwd=tmp_path)
    kinds = {row["path"]: row["kind"] for row in score_rows(tmp_path / "run")}
    assert kinds["widgets/test/logical_anomalies/new.png"] == "logical_anomalies"
    assert "widgets/test/good/003.png" not in kinds


def test_the_lock_is_let_go_with_the_run(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(InputError, match="another process is training in it"):
        runs.lock(tmp_path / "run")
    run.lock.close()
    runs.lock(tmp_path / "run").close()


# Taking over

def test_taking_over_what_a_finished_run_has_learned(trained, photos):
    folder, _ = trained
    state = checkpoint(folder / "run")
    kinds = [("pixels", ["--target", "pixel", "--mim-score", "mean"], ["hvq"], ["mim"]),
             ("mean", ["--hvq-score", "mean", "--masks", "7"], ["hvq", "mim"], [])]
    for out, more, kept, changed in kinds:
        trains("--take", folder / "run", *more, "--out", out, cwd=photos)
        taken = checkpoint(photos / out)
        assert all(same(taken[name], state[name]) for name in kept)
        assert not any(same(taken[name], state[name]) for name in changed)
        stages = [line["stage"] for line in taken["metrics"]]
        assert stages == ["hvq"] * 3 + ["mim"] * 3 + ["score"]
        assert score_rows(photos / out) != score_rows(folder / "run")
    rows = {row["path"]: float(row["score"]) for row in score_rows(photos / "pixels")}
    asked = command("predict", "photos/widgets/test", "--run", "pixels", "--json", cwd=photos)
    lines = [json.loads(line) for line in asked.stdout.splitlines()]
    assert len(lines) == 12
    for line in lines:
        assert abs(line["score"] - rows[line["path"].removeprefix("photos/")]) < 2e-3


@pytest.mark.parametrize("options, why", [
    (["--commitment", "0.5"], "commitment"), (["--seed", "1"], "its seed"),
    (["--pdn", "random"], "pdn"), (["--take", "nowhere"], "--take nowhere")])
def test_what_cannot_be_taken_over_is_refused(trained, photos, options, why):
    result = command(*TRAIN, "--take", trained[0] / "run", *options, "--out", "other", cwd=photos)
    assert why in one_error(result) and "--take" in one_error(result)


def test_models_of_other_photos_are_not_taken_over(trained, tmp_path):
    make_photos(tmp_path / "photos", train=10)
    result = command(*TRAIN, "--take", trained[0] / "run", "--out", "other", cwd=tmp_path)
    assert "its photos or backbone" in one_error(result)


# Several runs

def test_categories_and_seeds_in_turn(tmp_path, monkeypatch):
    for name in ("gadgets", "widgets"):
        make_photos(tmp_path / "photos", name, train=6, validation=2, good=2, bad=2)
    several = (*TRAIN, "--category", "gadgets,widgets", "--separate", "--seeds", "0,3-4", "--out",
               "mine")
    real, folders, trained = evaluation.write_scores, [], []

    def stop_in_the_fourth(folder, *rest):
        if len(folders) == 3:
            raise KeyboardInterrupt
        folders.append(folder.name)
        real(folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_scores", stop_in_the_fourth)
        assert command(*several, cwd=tmp_path).returncode == 130
    assert folders == ["gadgets-tiny-seed0", "gadgets-tiny-seed3", "gadgets-tiny-seed4"]
    home = tmp_path / "mine"                         # --out holds the folders of several runs
    finished = [home / name / "checkpoint.pt" for name in folders]
    before, begin = [file.read_bytes() for file in finished], runs.Run.begin_epoch

    def noted(run, stage, epoch, model):
        trained.append(run.folder.name)
        return begin(run, stage, epoch, model)

    monkeypatch.setattr(runs.Run, "begin_epoch", noted)
    result = command(*several, cwd=tmp_path)
    # The fourth one was trained, only its scores are missing. Of the finished ones nothing is
    # trained or written again.
    assert result.returncode == 0 and result.stdout.count("run: mine/") == 6
    assert trained == ["widgets-tiny-seed3"] * 6 + ["widgets-tiny-seed4"] * 6
    assert [file.read_bytes() for file in finished] == before
    trains("--seed", "3", "--out", "alone", cwd=tmp_path)
    assert checkpoint(tmp_path / "alone")["config"]["seed"] == 3
    assert learned_the_same(tmp_path / "alone", home / "widgets-tiny-seed3")
    other = checkpoint(home / "widgets-tiny-seed4")
    assert not same(checkpoint(tmp_path / "alone")["mim"], other["mim"])


def test_multi_class_scores_category_by_category(tmp_path):
    for name in ("gadgets", "widgets"):
        make_photos(tmp_path / "photos", name, train=6)
    trains("--category", "all", "--out", "run", cwd=tmp_path)
    rows = score_rows(tmp_path / "run")
    for name in ("gadgets", "widgets"):
        total = [float(row["score"]) for row in rows
                 if row["path"].startswith(name) and row["split"] == "validation"]
        assert len(total) == 4 and abs(sum(total) / 4) < 1e-6
    asked = command("predict", "photos/gadgets/test/good", "--run", "run", cwd=tmp_path)
    assert "gadgets, widgets" in one_error(asked)


def test_categories_with_codes_of_their_own_are_judged_by_these(tmp_path):
    """`predict` says of each category's test photos what `train` said."""
    for name in ("gadgets", "widgets"):
        make_photos(tmp_path / "photos", name, train=6)
    trains("--category", "widgets,gadgets", "--category-codes", "own", "--out", "run", cwd=tmp_path)
    state = checkpoint(tmp_path / "run")
    assert state["hvq"]["codebooks"].shape[1] == 2 * state["config"]["codes"]
    for name in ("gadgets", "widgets"):
        asked = command("predict", f"photos/{name}/test/good", "--run", "run", "--category", name,
                        "--json", cwd=tmp_path)
        said = [json.loads(line)["score"] for line in asked.stdout.splitlines()]
        kept = [float(row["score"]) for row in score_rows(tmp_path / "run")
                if row["path"].startswith(f"{name}/test/good")]
        assert said == pytest.approx(kept, abs=1e-4) and len(kept) == 4
    asked = command(*TRAIN, "--category-codes", "own", cwd=tmp_path)
    assert "--category-codes own" in one_error(asked)


def test_same_seed_same_bits_whatever_the_workers_and_the_cache(photos, monkeypatch):
    cases = (1, "a"), (7, "b"), (3, "a")             # the third finds all features in the cache
    for workers, cache in cases:
        monkeypatch.setattr(os, "cpu_count", lambda workers=workers: workers)
        trains("--cache", cache, "--out", f"run{workers}", cwd=photos)
    assert learned_the_same(photos / "run1", photos / "run7")
    assert learned_the_same(photos / "run1", photos / "run3")
    trains("--seed", "1", "--out", "other", cwd=photos)
    assert score_rows(photos / "other") != score_rows(photos / "run1")


# Several processes

@pytest.mark.parametrize("size, rank", [("2", None), ("2", "0"), ("x", "0"), ("", None)])
def test_several_processes_without_torchrun_are_refused(tmp_path, monkeypatch, size, rank):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if rank:                                         # all but LOCAL_WORLD_SIZE
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, rank)
    result = command(*TRAIN, cwd=tmp_path)
    assert "torchrun" in one_error(result)


def test_shares_of_a_batch_are_disjoint_and_whole(monkeypatch):
    for length in (0, 1, 3, 8):
        batch, parts = torch.arange(length), []
        for rank in range(3):
            monkeypatch.setattr(runs, "processes", lambda rank=rank: (rank, 3))
            parts.append(runs.share(batch))
        assert same(torch.cat(parts), batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_all_tensors_are_added_up_in_one_message(monkeypatch):
    """Three processes that hold the same: each tensor keeps its shape and gets its own sum."""
    messages = []

    def three_times(flat):
        messages.append(flat)
        flat.mul_(3)

    monkeypatch.setattr(runs, "processes", lambda: (0, 3))
    monkeypatch.setattr(runs.dist, "all_reduce", three_times)
    tensors = [torch.rand(2, 3), torch.rand(()), torch.rand(4)]
    expected = [3 * tensor for tensor in tensors]
    runs.add_up(tensors)
    assert same(tensors, expected) and len(messages) == 1
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    weights[0].grad = torch.ones(2)                  # the other one took no part
    runs.sum_gradients(weights)
    assert same([weight.grad for weight in weights], [torch.full((2,), 3.0), torch.zeros(3)])
