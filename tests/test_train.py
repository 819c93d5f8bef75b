"""train.py in-process: one line starts, resumes or does nothing, and ends in the same bytes, stopped or not."""
import csv
import importlib
import json
import math
import pickletools
import re
import shutil
import sys
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from copy import deepcopy
from fractions import Fraction
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from types import SimpleNamespace

import conftest
import cv2
import numpy as np
import pytest
import timm
import torch
from conftest import EPOCHS, FOLD, MODEL, SCALE, read_csv, run_folder, run_of, run_until_killed, write_coco
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from torch.optim import lr_scheduler

import common
import ensemble
import infer
import pseudo_label
import train
from common import SUBMIT_SIZE, UserError
from demo_data import draw_data

torch.set_num_threads(1)  # for nets this small a second thread would only wait for the first
SPEED = ("images_per_s", "waiting", "seconds")  # what a log has that is never the same twice
FINISHED = ("config.json", "log.csv", "epoch-002.pt", "epoch-003.pt", "model.pt")  # of a run with two snapshots
STEPS = 3  # of an epoch of the runs below: their 9 training images in batches of 4, the last one filled up


@pytest.fixture(scope="module")
def splits(line):
    args = line("unused")
    return common.load_data(args.data, args.cache, args.paint)


def run_and_keep(args):
    """Run train.main; the last.pt, which it removes in the end, stays as EXP/kept.pt."""
    save_checkpoint = train.save_checkpoint

    def save_and_copy(path, **state):
        save_checkpoint(path, **state)
        if path.name == "last.pt":
            shutil.copy(path, args.exp / "kept.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_and_copy)
        train.main(args)


@pytest.fixture(scope="module")
def finished_exp(line, tmp_path_factory):
    """Return an experiment with one run that was never interrupted; tests only read it."""
    exp = tmp_path_factory.mktemp("finished")
    run_and_keep(line(exp))
    return exp


@pytest.fixture
def exp(finished_exp, tmp_path):
    """Return a copy of it to change."""
    return shutil.copytree(finished_exp, tmp_path / "exp")


@pytest.fixture
def no_training(monkeypatch):
    """Let any attempt to train fail the test."""
    monkeypatch.setattr(train, "train_one_epoch", lambda *_: pytest.fail("training began"))


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function (name in train, call) that raises KeyboardInterrupt at that call, from 1 on, until undone."""
    def arm(name, call):
        function, calls = getattr(train, name), []

        def interrupted(*args, **kwargs):
            calls.append(None)
            if len(calls) == call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        monkeypatch.setattr(train, name, interrupted)
    return arm


def start_and_stop(args, monkeypatch, interrupt, name, call):
    """Run until the interruption, then lift it."""
    interrupt(name, call)
    with pytest.raises(KeyboardInterrupt):
        run_and_keep(args)
    monkeypatch.undo()


def read_log(folder):
    """Return the rows of log.csv without the columns that tell how fast it went."""
    with open(folder / "log.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k not in SPEED} for row in csv.DictReader(f)]


def leaves(value, path=()):
    """Yield (path, tensor or plain value) of all that is inside nested dicts, lists and tuples."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def assert_same_run(args, finished):
    """Check that both runs left the same model.pt, to the byte, and, but for the speed, log.csv and last.pt."""
    folder, expected = run_of(args), run_of(finished)
    assert (folder / "model.pt").read_bytes() == (expected / "model.pt").read_bytes()
    assert read_log(folder) == read_log(expected) and len(read_log(expected)) == EPOCHS
    state, expected = (dict(leaves(torch.load(a.exp / "kept.pt"))) for a in (args, finished))
    assert state.keys() == expected.keys()
    differ = [path for path, value in expected.items() if path[-1] not in SPEED and not (
        torch.equal(value, state[path]) if isinstance(value, torch.Tensor) else repr(value) == repr(state[path]))]
    assert differ == []


# ---- starts, resumes or does nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "call"), [
    ("backward", 1),  # nothing is saved yet
    ("backward", STEPS * 2 + 2),  # in the middle of epoch 3
    ("evaluate", 2),
    ("save_checkpoint", 2),  # epoch 2 is lost
    ("write_csv", 2),
    ("write_csv", EPOCHS),
    ("save_checkpoint", EPOCHS + 1),  # all but model.pt is there
])
def test_a_resumed_run_ends_in_the_bytes_of_one_never_interrupted(
        line, finished_exp, tmp_path, monkeypatch, interrupt, name, call):
    args = line(tmp_path)
    start_and_stop(args, monkeypatch, interrupt, name, call)
    assert not (run_of(args) / "model.pt").exists()
    run_and_keep(args)
    assert_same_run(args, line(finished_exp))
    assert {path.name for path in run_of(args).iterdir()} == {"config.json", "log.csv", "model.pt", ".lock"}


def test_a_resumed_run_trains_only_the_epochs_that_were_lost_and_counts_steps_on(
        line, tmp_path, monkeypatch, interrupt):
    args = line(tmp_path)
    start_and_stop(args, monkeypatch, interrupt, "backward", STEPS * 2 + 2)
    trained, train_one_epoch = [], train.train_one_epoch
    steps, update = [], train.update_averages
    monkeypatch.setattr(train, "train_one_epoch",
                        lambda run, *rest: trained.append(run.epoch + 1) or train_one_epoch(run, *rest))
    monkeypatch.setattr(train, "update_averages", lambda run, n_steps: steps.append(n_steps) or update(run, n_steps))
    train.main(args)
    # the average's decay rises with the step
    assert trained == [3] and steps == list(range(STEPS * 2 + 1, STEPS * 3 + 1))


def test_the_same_line_again_does_nothing(line, exp, no_training, capsys):
    folder = run_of(line(exp))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    train.main(line(exp))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert "nothing to do" in capsys.readouterr().out


def test_the_file_that_says_what_made_a_run_lists_its_checkpoints_and_is_written_again_when_it_is_gone(
        line, exp, no_training):
    path = run_of(line(exp)) / "config.json"
    before, state = path.read_bytes(), torch.load(path.with_name("model.pt"))
    assert json.loads(before) == {
        **{key: state[key] for key in (*common.DESCRIBED, "classes", "epoch", "v3")},
        "files": {"model.pt": common.file_hash(path.with_name("model.pt"))}}
    path.unlink()
    train.main(line(exp))
    assert path.read_bytes() == before
    for damage in ({"v3": "0.5"}, {"classes": 3}, {"epoch": None}, {"kept_under": [3]}, {"files": []}):
        path.write_text(json.dumps(json.loads(before) | damage))
        train.main(line(exp))
        assert path.read_bytes() == before


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_number_of_workers_changes_nothing(line, finished_exp, tmp_path, monkeypatch, interrupt, interrupted):
    args = line(tmp_path, "--workers", 2)
    if interrupted:
        start_and_stop(args, monkeypatch, interrupt, "backward", STEPS * 2 + 1)
    run_and_keep(args)
    assert_same_run(args, line(finished_exp))


def test_another_seed_gives_other_weights(line, finished_exp, tmp_path):
    args = line(tmp_path, "--seed", 1, "--epochs", 1)
    train.main(args)
    weights, others = (torch.load(run_of(line(e)) / "model.pt")["model"] for e in (finished_exp, tmp_path))
    kernels = [k for k in weights if weights[k].ndim == 4]
    assert kernels and not any(torch.equal(weights[k], others[k]) for k in kernels)


def test_another_recipe_is_refused_naming_the_values_that_differ(line, exp, no_training):
    folder = run_of(line(exp))
    before = (folder / "model.pt").read_bytes()
    with pytest.raises(UserError) as refusal:
        train.main(line(exp, "--lr", "2e-3", "--batch", 5))
    differ = str(refusal.value).split("recipe: ")[1].split(";")[0]
    assert sorted(differ.split(", ")) == ["batch 4 -> 5", "lr 0.001 -> 0.002"] and "--replace" in str(refusal.value)
    assert (folder / "model.pt").read_bytes() == before


def test_an_unfinished_run_of_another_recipe_is_refused_too(line, tmp_path, monkeypatch, interrupt):
    start_and_stop(line(tmp_path), monkeypatch, interrupt, "backward", STEPS + 1)
    before = (run_of(line(tmp_path)) / "last.pt").read_bytes()
    with pytest.raises(UserError, match="augment basic -> none"):
        train.main(line(tmp_path, "--augment", "none"))
    assert (run_of(line(tmp_path)) / "last.pt").read_bytes() == before


def test_another_recipe_is_replaced_on_request(line, exp, capsys):
    args = line(exp, "--lr", "2e-3", "--epochs", 1, "--replace")
    train.main(args)
    assert "lr 0.001 -> 0.002" in capsys.readouterr().out
    assert torch.load(run_of(args) / "model.pt")["recipe"]["lr"] == 2e-3
    assert [row["epoch"] for row in read_log(run_of(args))] == ["1"]


def test_replacing_does_not_resume_what_is_replaced(line, finished_exp, tmp_path, monkeypatch, interrupt):
    start_and_stop(line(tmp_path, "--lr", "2e-3"), monkeypatch, interrupt, "backward", STEPS * 2 + 1)
    run_and_keep(line(tmp_path, "--replace"))
    assert_same_run(line(tmp_path), line(finished_exp))


def test_settings_that_do_not_decide_the_result_are_not_in_the_recipe(line, finished_exp):
    recipe = torch.load(run_of(line(finished_exp)) / "model.pt")["recipe"]
    assert not {"data_folder", "exp", "cache", "workers", "device", "replace", "check"} & recipe.keys()
    assert all(isinstance(v, (str, int, float, list)) for v in recipe.values())
    assert common.read_json(run_of(line(finished_exp)) / "config.json")["recipe"] == recipe


def test_a_run_that_another_process_has_is_refused(line, tmp_path, no_training):
    with common.lock(run_of(line(tmp_path))), pytest.raises(UserError, match="in use"):
        train.main(line(tmp_path))


def test_pretrained_weights_are_read_at_the_start_but_not_on_resuming(line, tmp_path, monkeypatch, interrupt, capsys):
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "encoder.pth")
    args = line(tmp_path / "exp", "--weights", tmp_path / "encoder.pth", "--epochs", 2)
    loaded, load_weights = [], train.load_weights

    def spy():
        monkeypatch.setattr(train, "load_weights", lambda *a: loaded.append(a[2]) or load_weights(*a))
    spy()
    start_and_stop(args, monkeypatch, interrupt, "backward", STEPS + 1)
    spy()
    train.main(args)
    assert loaded == [tmp_path / "encoder.pth"]
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("weights ")]
    assert len(lines) == 1 and f"weights {tmp_path}/encoder.pth: " in lines[0] and "100.0% of the encoder's" in lines[0]


def test_a_finished_run_leaves_no_loader_process_also_if_something_holds_its_frames(line, tmp_path, monkeypatch):
    frames, draw_some_curves = [], train.draw_some_curves

    def hold_frames(*args):  # as the traceback of an import that fails does until the garbage is collected
        frames.append(sys._getframe())
        draw_some_curves(*args)
    monkeypatch.setattr(train, "draw_some_curves", hold_frames)
    train.main(line(tmp_path, "--workers", 1, "--epochs", 2, "--soup", 1))
    assert len(frames) == 2 and active_children() == []


def test_a_run_goes_on_from_a_model_pt_of_its_fold_at_another_scale_and_no_other_fold(line, finished_exp, tmp_path):
    path = run_of(line(finished_exp)) / "model.pt"
    before, args = common.load_checkpoint(path), line(tmp_path, "--weights", path, "--scale", 96)
    run = train.start_run(args, before["classes"], np.arange(12) + 1.0, None, torch.device("cpu"))
    state = run.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before["model"].items())  # the head's bias is no prior
    assert all(torch.equal(value, before["model"][key]) for key, value in run.ema.module.state_dict().items())
    train.main(line(tmp_path, "--weights", path, "--scale", 96, "--epochs", 1))
    recipe = common.load_checkpoint(run_of(args) / "model.pt")["recipe"]
    assert recipe["weights"] == common.file_hash(path)
    for i, other in enumerate((["--fold", 0], ["--folds", 4])):
        with pytest.raises(UserError, match=r"model.pt: has learnt from \d+ of the \d+ photos that fold . holds out"):
            train.main(line(tmp_path / f"other{i}", "--weights", path, *other))


def test_weights_remember_the_photos_they_come_from_in_every_run_that_goes_on_from_them(line, tiny_data, tmp_path):
    other, more = tmp_path / "other", tmp_path / "more"
    draw_data(other, train=6, test=2, size=64, seed=77)
    shutil.copytree(tiny_data, more)
    coco = json.loads((tiny_data / "train.json").read_text())
    removed_id = coco["images"][0]["id"]
    for part, key in (("images", "id"), ("annotations", "image_id")):  # the other photos, by other ids
        coco[part] = [each | {key: each[key] + 500} for each in coco[part] if each[key] != removed_id]
    (more / "train.json").write_text(json.dumps(coco))
    weights = []
    for name, data in (("first", tiny_data), ("second", other)):
        args = line(tmp_path / name, "--data", data, "--fold", 0, "--epochs", 1, *weights)
        train.main(args)
        weights = ["--weights", run_of(args) / "model.pt"]
    with pytest.raises(UserError, match=r"model.pt: has learnt from \d+ of the \d+ photos that fold 1 holds out"):
        train.main(line(tmp_path / "exp", "--data", more, "--fold", 1, *weights))


@pytest.mark.parametrize(("round_", "contaminated"), [(0, False), (1, False), (1, True)])
def test_extra_photos_and_those_of_labels_are_learnt_from_and_what_these_had_seen(line, splits, round_, contaminated):
    args, (labelled, test) = line("unused", "--round", round_), splits
    extras = [(labelled, [6])]
    digests = train.hashes_learnt_from(args, (labelled, test, extras), np.arange(3), np.arange(3, 5), contaminated)
    of_labels = test.digests if round_ else []
    assert digests == sorted([*labelled.digests[:5 if contaminated else 3], labelled.digests[6], *of_labels])


def test_classes_that_a_model_pt_lacks_begin_at_their_frequency(line, finished_exp, tmp_path):
    path = run_of(line(finished_exp)) / "model.pt"
    before, pixels = common.load_checkpoint(path), np.arange(12) + 1.0
    classes = before["classes"][:-1] + ["Ship"]
    run = train.start_run(line(tmp_path, "--weights", path), classes, pixels, None, torch.device("cpu"))
    bias = run.model.segmentation_head[0].bias
    assert torch.equal(bias[:-1], before["model"]["segmentation_head.0.bias"][:-1])
    assert bias[-1].item() == pytest.approx(math.log(13 / 90))  # one more pixel of each: 2 + 3 + ... + 13


def test_a_folder_of_weights_gives_each_model_its_file_whose_content_is_in_the_recipe(line, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for encoder in ("test_efficientnet", "test_resnet"):
        torch.save(timm.create_model(encoder).state_dict(), folder / f"{encoder}_mine.pth")
        args = line(tmp_path / "exp", "--weights", folder, "--model", f"fpn/tu-{encoder}", "--epochs", 1)
        train.main(args)
        recipe = common.load_checkpoint(run_of(args) / "model.pt")["recipe"]
        assert recipe["weights"] == common.file_hash(folder / f"{encoder}_mine.pth")
    (folder / "test_resnet_mine.pth").unlink()
    with pytest.raises(UserError, match="0 files are named after the encoder test_resnet, .*: there is test_efficient"):
        train.main(args)


def test_a_weights_file_with_other_content_is_another_recipe(line, tmp_path, monkeypatch, interrupt):
    path = tmp_path / "encoder.pth"
    args = line(tmp_path / "exp", "--weights", path)
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    start_and_stop(args, monkeypatch, interrupt, "backward", STEPS + 1)
    before = common.file_hash(path)
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    after = common.file_hash(path)
    with pytest.raises(UserError, match=f"weights {before} -> {after};"):
        train.main(args)
    path.rename(tmp_path / "renamed.pth")
    assert before != after
    train.main(line(args.exp, "--weights", tmp_path / "renamed.pth", "--replace"))
    train.main(line(args.exp, "--weights", shutil.copy(tmp_path / "renamed.pth", path)))  # the name alone differs


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--epoch", "--rep", "--ephocs", "--loss_ratio"])
def test_misspelt_and_abbreviated_flags_are_refused(line, tmp_path, flag, capsys):
    with pytest.raises(SystemExit):
        line(tmp_path, flag, 1)
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("model", ["resnet18", "unet/", "nosuch/resnet18", "/resnet18"])
def test_a_model_that_is_not_decoder_and_encoder_is_refused(line, tmp_path, model, capsys):
    with pytest.raises(SystemExit):
        line(tmp_path, "--model", model)
    assert f"{model!r} is not DECODER/ENCODER" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["pan/resnet18", "dpt/tu-cait_xxs24_224"])  # too few pixels; not one for dpt
def test_a_model_that_cannot_work_at_the_scale_is_refused_in_one_line(line, tmp_path, model):
    with pytest.raises(UserError, match=f"^{model} can't work at scale 64: [^\n]+$"):
        train.main(line(tmp_path, "--model", model))


@pytest.mark.parametrize("wrong", [
    ("--layer-decay", "0"), ("--layer-decay", "1.5"), ("--drop-path", "1"), ("--freeze", "-1"),
    ("--scale", "0"), ("--scale", "-32"), ("--scale", "16"), ("--fold", "3"), ("--fold", "-1"),
    ("--folds", "99"), ("--folds", "1"), ("--weights", "nosuch.pth"), ("--round", "-1"), ("--epochs", "0"),
    ("--batch", "0"), ("--lr", "nan"), ("--lr", "-1"), ("--warmup", "1"), ("--loss-ratio", "2"), ("--ema", "2"),
    ("--seed", "-1"), ("--workers", "-1"), ("--workers", "3000"), ("--batch", "1000000"), ("--clip", "1e-46"),
    ("--cycles", str(10 ** 20)), ("--augment", "nosuch"), ("--paint", "nosuch"),
    ("--batch", "1"), ("--accumulate", "0"), ("--optimizer", "adam"), ("--encoder-lr", "-1"), ("--schedule", "step"),
    ("--cycles", "0"), ("--snapshots", "-1"), ("--weight-decay", "-1"), ("--clip", "inf"), ("--loss", "nosuch"),
    ("--label-smoothing", "1"), ("--class-weights", "nosuch"), ("--classmix", "nosuch"), ("--classmix-prob", "1.5"),
    ("--sampler", "nosuch"), ("--logger", "nosuch"), ("--overfit", "-1"),
    ("--epochs", "9" * 401), ("--lr", "9" * 401)], ids=lambda wrong: " ".join(wrong)[:20])
def test_a_wrong_value_is_refused_by_name_before_a_run_is_begun(line, tmp_path, no_training, capsys, wrong):
    with pytest.raises((SystemExit, UserError)) as refusal:
        train.main(line(tmp_path, *wrong))
    said = f"{refusal.value} {capsys.readouterr().err}"
    assert wrong[0].removeprefix("--") in said and wrong[1] in said
    assert not list(tmp_path.glob("r*"))


def test_a_device_that_is_not_there_is_refused_before_training(line, tmp_path, no_training):
    with pytest.raises(UserError, match="nosuch"):
        train.main(line(tmp_path, "--device", "nosuch"))


def test_weights_that_do_not_fit_are_refused_before_training(line, tmp_path, no_training):
    state = timm.create_model("test_efficientnet").state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("blocks.4")}
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="bad.pth.*missing: model.blocks.4.0.conv_pw.weight"):
        train.main(line(tmp_path, "--weights", tmp_path / "bad.pth"))


def test_an_encoder_that_does_not_exist_is_refused_before_training(line, tmp_path, no_training):
    with pytest.raises(UserError, match="nosuch"):
        train.main(line(tmp_path, "--model", "unet/tu-nosuch"))


@pytest.mark.parametrize("model", ["pan/tu-test_efficientnet", "dpt/tu-cait_xxs24_224"])
def test_a_model_that_cannot_work_at_the_scale_is_refused_before_training(line, tmp_path, no_training, model):
    with pytest.raises(UserError, match=f"{model} can't work at scale 64: ") as refusal:
        train.main(line(tmp_path, "--model", model))
    assert "\n" not in str(refusal.value)


def test_check_writes_the_folds_and_a_page_and_trains_nothing(line, tmp_path, no_training, capsys):
    train.main(line(tmp_path, "--check"))
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"folds.csv", "data.html"}
    out = capsys.readouterr().out
    assert "14 training and 4 test images, 12 classes" in out and "no faults" in out


# ---- order, samples and learning rate -------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_batches_are_full_and_hold_every_image_of_an_epoch(n_images, batch_size, seed, epoch):
    batches = common.EpochBatches(n_images, batch_size, seed)
    batches.epoch = epoch
    listed = list(batches)
    assert len(listed) == len(batches) == math.ceil(n_images / batch_size)
    assert {len(batch) for batch in listed} == {batch_size}
    times = Counter(key for batch in listed for key in batch)
    assert times.keys() == {(epoch, index) for index in range(n_images)}
    assert max(times.values()) <= math.ceil(len(listed) * batch_size / n_images)
    batches.first = len(listed) // 2  # where a stopped run goes on
    assert list(batches) == listed[batches.first:]


def test_the_images_that_fill_the_last_batch_are_drawn_anew_in_each_epoch():
    batches, fillings = common.EpochBatches(20, 16, 0), []
    for batches.epoch in range(5):
        order = [index for batch in batches for _, index in batch]
        assert sorted(order[:20]) == list(range(20))  # first each image once
        fillings.append(order[20:])
        assert fillings[-1] != order[:12] and set(fillings[-1]) != set(order[:12])
    assert len({tuple(sorted(filling)) for filling in fillings}) == 5


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        batches = common.EpochBatches(50, 8, seed)
        batches.epoch = epoch
        return tuple(index for batch in batches for _, index in batch)
    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert orders == {key: order(*key) for key in reversed(orders)}


def test_a_sample_depends_on_seed_epoch_and_index_alone(splits):
    augment = common.make_augmentation("basic", 32)
    samples = {seed: common.TrainSamples([(splits[0], i, None) for i in (3, 3, 5)], augment, seed) for seed in (0, 1)}
    keys = [(seed, epoch, index) for seed in samples for epoch in range(2) for index in range(3)]

    def draw(seed, epoch, index):
        return b"".join(part.tobytes() for part in samples[seed][epoch, index])
    drawn = {key: draw(*key) for key in keys}
    assert len(set(drawn.values())) == len(keys)  # the same photo at two indices is augmented twice
    assert drawn == {key: draw(*key) for key in reversed(keys)}


def test_a_sample_is_the_photo_with_its_mask_or_its_pseudo_label(splits):
    labelled, test = splits
    label = np.random.default_rng(0).integers(0, 12, (SUBMIT_SIZE, SUBMIT_SIZE), dtype=np.uint8)
    samples = common.TrainSamples([(labelled, 4, None), (test, 1, label)], lambda image, mask, rng: (image, mask), 0)
    image, mask = samples[0, 0]
    assert (image == labelled.image(4)).all() and (mask == labelled.mask(4)).all()
    image, mask = samples[0, 1]
    assert (image == test.image(1)).all() and mask.shape == image.shape[:2] == (64, 64)
    assert (mask == label[2::4, 2::4]).all()  # the centre of a pixel that covers 4 x 4


def settings(schedule="cosine", **changes):
    """Return the arguments that learning_rate and snapshot_epochs read, and further ones."""
    return Namespace(**{"schedule": schedule, "lr": 3e-3, "warmup": 0.05, "cycles": 3, "epochs": 10, "snapshots": 0}
                     | changes)


def torch_rates(make, n_steps, peak):
    """Return the learning rates of n_steps steps under a scheduler of torch's."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler, rates = make(optimizer), []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


TORCH_SCHEDULES = {  # name -> torch's scheduler for this many steps; further below every schedule is tested
    "cosine": lambda n: partial(lr_scheduler.CosineAnnealingLR, T_max=n),
    "restarts": lambda n: partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=n // 3),
    "poly": lambda n: partial(lr_scheduler.PolynomialLR, total_iters=n, power=0.9),
    "multistep": lambda n: partial(lr_scheduler.MultiStepLR, milestones=[n * 60 // 100, n * 85 // 100], gamma=0.1),
    "onecycle": lambda n: partial(lr_scheduler.LinearLR, start_factor=1, end_factor=0, total_iters=n)}


@pytest.mark.parametrize("schedule", TORCH_SCHEDULES)
@pytest.mark.parametrize("warm", [0, 60])
def test_the_learning_rate_is_torchs_linear_warm_up_and_then_torchs_schedule(schedule, warm):
    steps, args = 660, settings(schedule, warmup=Fraction(warm, 660))  # fractions: no step lies beside a milestone
    rising = partial(lr_scheduler.LinearLR, start_factor=1e-9, total_iters=warm)
    falling = TORCH_SCHEDULES[schedule](steps - warm)
    expected = torch_rates(rising, warm, args.lr) + torch_rates(falling, steps - warm, args.lr)
    rates = [train.learning_rate(Fraction(step, steps), args) for step in range(steps)]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("warm", [30, 60, 90])
def test_onecycle_is_torchs_with_linear_annealing(warm):
    steps, args = 200, settings("onecycle", warmup=Fraction(warm, 200))
    make = partial(lr_scheduler.OneCycleLR, max_lr=args.lr, total_steps=steps + 1, pct_start=(warm + 1) / (steps + 1),
                   anneal_strategy="linear", div_factor=1e9, cycle_momentum=False)
    expected = torch_rates(make, steps, args.lr)  # its step number `steps` is the last
    rates = [train.learning_rate(Fraction(step, steps), args) for step in range(steps)]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-9) and max(rates) == args.lr


@given(st.sampled_from(sorted(TORCH_SCHEDULES)), st.floats(0, 0.9), st.integers(1, 9), st.integers(1, 300),
       st.floats(1e-6, 10))
def test_the_learning_rate_is_above_nought_and_not_over_its_peak(schedule, warmup, cycles, steps, lr):
    args = settings(schedule, warmup=warmup, cycles=cycles, lr=lr)
    rates = [train.learning_rate((step + 0.5) / steps, args) for step in range(steps)]
    assert all(isinstance(rate, float) and 0 < rate <= lr for rate in rates)


@given(st.sampled_from(sorted(TORCH_SCHEDULES)), st.floats(0.01, 0.9), st.floats(1e-6, 10))
def test_the_learning_rate_has_no_jump_at_the_end_of_warm_up(schedule, warmup, peak):
    args = settings(schedule, warmup=warmup, lr=peak)
    around = [train.learning_rate(warmup + shift, args) for shift in (-1e-6, 0, 1e-6)]
    assert around == pytest.approx([peak] * 3, rel=1e-3) and train.learning_rate(0, args) == 0


@pytest.mark.parametrize("schedule", TORCH_SCHEDULES)
def test_without_warm_up_the_learning_rate_starts_at_its_peak_and_ends_low(schedule):
    args = settings(schedule, warmup=0.0)
    assert train.learning_rate(0, args) == args.lr
    end = 0.01 * args.lr if schedule == "multistep" else 0
    assert train.learning_rate(1 - 1e-9, args) == pytest.approx(end, abs=1e-9)


@pytest.mark.parametrize(("epochs", "warmup", "snapshots", "expected"), [
    (10, 0.05, 0, []),
    (10, 0.05, 1, [10]),
    (10, 0.05, 2, [7, 10]),  # after 7.5 and 10 epochs
    (8, 0.0, 4, [5, 6, 7, 8]),
    (12, 0.3, 3, [8, 10, 12]),
    (4, 0.05, 10, [2, 3, 4]),  # there are no more in the second half
    (1, 0.05, 2, [1])])
@pytest.mark.parametrize("schedule", sorted(TORCH_SCHEDULES.keys() - {"restarts"}))
def test_snapshots_are_spread_over_the_second_half_of_the_run(schedule, epochs, warmup, snapshots, expected):
    args = settings(schedule, epochs=epochs, warmup=warmup, snapshots=snapshots)
    assert train.snapshot_epochs(args) == expected


@pytest.mark.parametrize(("epochs", "warmup", "cycles", "snapshots", "expected"), [
    (9, 0.0, 3, 0, []),
    (9, 0.0, 3, 1, [9]),
    (9, 0.0, 3, 2, [6, 9]),
    (9, 0.0, 3, 5, [3, 6, 9]),  # there are no more valleys
    (10, 0.0, 3, 3, [3, 6, 10]),  # after 3.33, 6.67 and 10: the last whole epoch before each valley
    (10, 0.1, 3, 3, [4, 7, 10]),
    (20, 0.1, 3, 3, [8, 14, 20]),
    (40, 0.05, 3, 2, [27, 40]),  # 0.05 + 0.95 * 2 / 3 of 40 is 27.33
    (3, 0.0, 5, 9, [1, 2, 3]),  # valleys after 0.6, 1.2, 1.8, 2.4 and 3 epochs
    (3, 0.0, 5, 2, [2, 3]),
    (1, 0.5, 4, 4, [1])])
def test_snapshots_of_restarts_are_the_last_valleys(epochs, warmup, cycles, snapshots, expected):
    args = settings("restarts", epochs=epochs, warmup=warmup, cycles=cycles, snapshots=snapshots)
    assert train.snapshot_epochs(args) == expected


# ---- a training step ------------------------------------------------------------------------------------------------


def small_net(seed=0):
    """Return an encoder and head of 3 classes without batch norm; a pixel is told by its 3 x 3 surroundings."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(OrderedDict(encoder=torch.nn.Conv2d(3, 8, 3, padding=1), norm=torch.nn.GroupNorm(2, 8),
                                          act=torch.nn.ReLU(), head=torch.nn.Conv2d(8, 3, 1)))
    net.frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    return net


def small_run(net, loss="ce", parts=1, optimizer=None, mean=(0.4,) * 3, std=(0.2,) * 3):
    """Return a train.Run of `net` at its start."""
    if optimizer is None:
        optimizer = torch.optim.SGD(train.parameter_groups(net, 1.0, 0.0), lr=0.1, fused=True)
    return train.Run(net, net, common.make_loss(loss), optimizer, torch.amp.GradScaler("cpu", enabled=False),
                     timm.utils.ModelEmaV3(net), CPU, mean, std, parts, torch.zeros(3))


def small_batch(n_images, seed=0, size=8):
    """Return normalised images [n, 3, size, size] and fully labelled masks of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n_images, 3, size, size, generator=generator),
            torch.randint(0, 3, (n_images, size, size), generator=generator))


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_close(tensors, expected, **tolerance):
    assert tensors.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(tensors[name], expected[name], **tolerance or {"rtol": 1e-4, "atol": 1e-6})


CPU = torch.device("cpu")


def test_parameters_have_the_encoders_factor_and_norms_and_biases_no_decay():
    net = small_net()
    groups = train.parameter_groups(net, 0.1, 0.3)
    names = {p: name for name, p in net.named_parameters()}
    listed = [(names[p], group["factor"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(listed) == [
        ("encoder.bias", 0.1, 0.0), ("encoder.weight", 0.1, 0.3), ("head.bias", 1.0, 0.0), ("head.weight", 1.0, 0.3),
        ("norm.bias", 1.0, 0.0), ("norm.weight", 1.0, 0.0)]


@pytest.mark.parametrize("model", [MODEL, "unet/resnet18", "efficientdet/tu-test_efficientnet"])
def test_every_trainable_parameter_is_in_one_group(model):
    net = common.build_model(model, 4)
    groups = train.parameter_groups(net, 0.5, 0.01)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(set(listed)) == len(listed) and set(listed) == {id(p) for p in net.parameters() if p.requires_grad}
    encoder = {id(p) for p in net.encoder.parameters()}
    assert encoder == {id(p) for group in groups if group["factor"] == 0.5 for p in group["params"]}


@pytest.mark.parametrize(("name", "make"), [
    ("adamw", lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=False)),
    ("sgd", lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=False))])
def test_steps_are_those_of_torchs_optimizer_with_the_middle_of_each_steps_learning_rate(
        line, tmp_path, name, make, monkeypatch):
    """Compare two epochs of train.main's own loop on a small net with a loop written out."""
    args = line(tmp_path, "--optimizer", name, "--encoder-lr", 0.25, "--weight-decay", 0.2, "--epochs", 2, "--lr", 0.01,
                "--warmup", 0.3)
    net, reference = small_net(), small_net()
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    optimizer = train.OPTIMIZERS[name](train.parameter_groups(net, 0.25, 0.2), 1)
    run = small_run(net, optimizer=optimizer, mean=mean, std=std)
    batches = [tuple(part.byte() for part in small_batch(4, seed)) for seed in range(3)]
    batches = [(images.permute(0, 2, 3, 1) * 40, masks) for images, masks in batches]
    part = dict(reference.named_parameters())
    optimizer = make([{"params": [part["encoder.weight"]], "weight_decay": 0.2, "of": 0.25},
                      {"params": [part["encoder.bias"]], "weight_decay": 0.0, "of": 0.25},
                      {"params": [part["head.weight"]], "weight_decay": 0.2, "of": 1.0},
                      {"params": [part[n] for n in ("head.bias", "norm.weight", "norm.bias")], "weight_decay": 0.0,
                       "of": 1.0}])
    for epoch in range(2):
        run.epoch, run.total = epoch, torch.zeros(3)
        row = train.train_one_epoch(run, batches, args)
        loss, lr, skipped = row["loss"], row["lr"], row["skipped"]
        losses = []
        for step, (images, masks) in enumerate(batches):
            middle = (epoch * 3 + step + 0.5) / 6
            rate = 0.01 * (middle / 0.3 if middle < 0.3 else (1 + math.cos(math.pi * (middle - 0.3) / 0.7)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["of"]
            inputs = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) \
                / torch.tensor(std).view(3, 1, 1)
            losses.append(torch.nn.functional.cross_entropy(reference(inputs), masks.long()))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert skipped == 0 and lr == pytest.approx(rate) and loss == pytest.approx(sum(losses).item() / 3, rel=1e-4)
    assert_close(dict(net.named_parameters()), part, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 3, 4, 99])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(parts):
    images, masks = small_batch(9)
    whole, net = small_net(), small_net()
    loss = train.backward(small_run(whole), images, masks)
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert train.backward(small_run(net, parts=parts), images, masks) == pytest.approx(loss.item(), rel=1e-5)
    assert_close(gradients(net), gradients(whole))
    assert sum(seen) == 9 and len(seen) == min(parts, 4) and min(seen) >= 2  # batch norm needs two images


def partly_labelled_batch():
    """Return 8 images whose masks lack from none to all of their labels: two images, a part of 4, have none at all."""
    images, masks = small_batch(8)
    for i, rows in enumerate((8, 1, 6, 2, 0, 0, 3, 7)):
        masks[i, rows:] = common.IGNORE_INDEX
    return images, masks


def weighted_run(net, loss, parts=1, smoothing=0.0, weights=None):
    run = small_run(net, parts=parts)
    run.class_weights = weights if weights is None else torch.tensor(weights)
    run.loss = common.make_loss(loss, 0.4, smoothing, run.class_weights)
    return run


PIXEL_LOSSES = [("ce", 0.0, None), ("ce", 0.1, [0.2, 1.0, 2.5]), ("focal", 0.0, [0.2, 1.0, 2.5]), ("focal", 0.1, None)]


@pytest.mark.parametrize("options", PIXEL_LOSSES)
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_batch_with_unlabelled_pixels_has_in_parts_the_gradients_of_the_whole(options, parts):
    whole, net = small_net(), small_net()
    loss, smoothing, weights = options
    expected = train.backward(weighted_run(whole, loss, 1, smoothing, weights), *partly_labelled_batch())
    found = train.backward(weighted_run(net, loss, parts, smoothing, weights), *partly_labelled_batch())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients(net), gradients(whole))


@pytest.mark.parametrize("options", PIXEL_LOSSES)
def test_processes_have_together_the_gradients_of_one_with_all_their_images(options, monkeypatch):
    loss, smoothing, weights = options
    whole, nets = small_net(), (small_net(), small_net())
    images, masks = partly_labelled_batch()
    expected = train.backward(weighted_run(whole, loss, 1, smoothing, weights), images, masks)
    halves = [(images[:5], masks[:5]), (images[5:], masks[5:])]  # 17 and 10 of the rows are labelled
    monkeypatch.setattr(train, "ranks", lambda: (0, 2))
    losses = []
    for net, own, other in zip(nets, halves, halves[::-1], strict=True):
        others = torch.stack([(1 if weights is None else weights[i]) * (other[1] == i).sum() for i in range(3)]).sum()
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, others=others: total.add_(others))
        losses.append(train.backward(weighted_run(net, loss, 2, smoothing, weights), *own).item())
    assert np.mean(losses) == pytest.approx(expected.item(), rel=1e-5)
    mean = {name: (gradients(nets[0])[name] + gradients(nets[1])[name]) / 2 for name in gradients(whole)}
    assert_close(mean, gradients(whole))


@pytest.mark.parametrize("name", ["iou_ce", "iou", "dice_ce", "lovasz"])
def test_a_loss_over_regions_has_in_parts_nearly_the_gradients_of_the_whole(name):
    whole, net = small_net(), small_net()
    train.backward(weighted_run(whole, name), *partly_labelled_batch())
    train.backward(weighted_run(net, name, 4), *partly_labelled_batch())
    expected, found = (torch.cat([g.flatten() for g in gradients(each).values()]) for each in (whole, net))
    assert (found - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("name", common.LOSSES)
@pytest.mark.parametrize("parts", [1, 4])
def test_a_batch_without_a_label_has_zero_gradients_in_parts_too(name, parts):
    net, (images, masks) = small_net(), small_batch(8)
    loss = train.backward(weighted_run(net, name, parts), images, masks.fill_(common.IGNORE_INDEX))
    assert loss == 0 and not any(gradient.any() for gradient in gradients(net).values())


def test_a_batch_of_one_image_is_one_part():
    net = small_net()
    train.backward(small_run(net, parts=2), *small_batch(1))
    assert gradients(net)


def limit_memory(run, net, largest, only_from_call=1):
    """Let forward passes of more than `largest` images fail as a GPU does; return the sizes of all parts tried."""
    tried = []

    def forward(images):
        tried.append(len(images))
        if len(images) > largest and len(tried) >= only_from_call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return net(images)
    run.forward = forward
    return tried


@pytest.mark.parametrize(("n_images", "largest", "tried", "parts"), [
    (8, 8, [8], 1), (8, 4, [8, 4, 4], 2), (8, 3, [8, 4, 2, 2, 2, 2], 4), (9, 3, [9, 5, 3, 2, 2, 2], 4),
    (6, 2, [6, 3, 2, 2, 2], 3)])
def test_out_of_memory_halves_the_parts_and_keeps_the_batch_and_its_gradients(n_images, largest, tried, parts, capsys):
    images, masks = small_batch(n_images)
    whole, net = small_net(), small_net()
    loss = train.backward(small_run(whole), images, masks)
    run = small_run(net)
    sizes = limit_memory(run, net, largest)
    assert train.backward(run, images, masks).item() == pytest.approx(loss.item(), rel=1e-5)
    assert sizes == tried and run.parts == parts
    assert_close(gradients(net), gradients(whole))
    said = capsys.readouterr().out
    assert said.count("out of memory: batches now go through the model in") == math.ceil(math.log2(parts))
    assert parts == 1 or f"in {parts} parts" in said.splitlines()[-1]
    sizes.clear()
    run.optimizer.zero_grad()
    train.backward(run, images, masks)  # the next batch doesn't try again
    assert sizes == tried[-min(parts, n_images // 2):]


def test_no_gradient_of_a_failed_attempt_stays(capsys):
    images, masks = small_batch(8)
    whole, net = small_net(), small_net()
    train.backward(small_run(whole), images, masks)
    run = small_run(net, parts=2)
    sizes = limit_memory(run, net, largest=2, only_from_call=2)  # the first part of the first attempt goes through
    train.backward(run, images, masks)
    assert sizes == [4, 4, 2, 2, 2, 2] and run.parts == 4
    assert_close(gradients(net), gradients(whole))


@pytest.mark.parametrize("n_images", [2, 3, 8, 9])
def test_two_images_that_do_not_fit_are_the_end_in_one_line(n_images, capsys):
    net = small_net()
    run = small_run(net)
    limit_memory(run, net, largest=1)
    with pytest.raises(UserError) as end:
        train.backward(run, *small_batch(n_images))
    said = str(end.value)
    assert "\n" not in said and "--batch" in said and "--accumulate" in said and "Tried to allocate 2.00 GiB" in said


def test_other_errors_of_the_model_are_not_taken_for_a_lack_of_memory():
    run = small_run(small_net())
    run.forward = lambda images: pytest.fail("shape") if len(images) < 4 else torch.zeros(2, 2) @ torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="multipl|shape"):
        train.backward(run, *small_batch(4))


@pytest.mark.parametrize("clip", [0, 0.01, 1e6])
def test_a_long_gradient_is_cut_to_the_norm_asked_for(line, tmp_path, clip):
    net, whole = small_net(), small_net()
    images, masks = small_batch(4)
    batch = (images.permute(0, 2, 3, 1).mul(40).byte(), masks.byte())
    run = small_run(net)
    train.backward(small_run(whole), common.normalise(batch[0], run.mean, run.std), masks)
    full = torch.cat([g.flatten() for g in gradients(whole).values()]).norm().item()
    args = line(tmp_path, "--clip", clip, "--lr", 0.5, "--warmup", 0, "--schedule", "multistep")
    train.train_one_epoch(run, [batch], args)
    before, after = (torch.cat([p.detach().flatten() for p in n.parameters()]) for n in (whole, net))
    assert full > 0.1
    assert (after - before).norm().item() / 0.5 == pytest.approx(min(full, clip or full), rel=1e-3)


# ---- what to try: every entry of the tables ------------------------------------------------------------------------


MADE_UP_SCHEDULES = {"waves": lambda t, n: 1 - t * n % 1, "stairs": lambda t, n: 0.5 ** int(t * n),
                     "flat": lambda t, n: 1.0}


@pytest.mark.parametrize("name", train.SCHEDULES)
def test_every_schedule_gives_a_share_from_0_to_1_that_depends_on_t_and_n_alone(name):
    schedule, ts = train.SCHEDULES[name], [*np.linspace(0, 1, 2000, endpoint=False).tolist(), 1e-12, 1 - 1e-12]
    for n in range(1, 6):
        shares = [schedule(t, n) for t in ts]
        wrong = [(t, share) for t, share in zip(ts, shares, strict=True) if not 0 <= share <= 1]  # NaN too
        assert not wrong, f"SCHEDULES[{name!r}](t, {n}) must give a share from 0 to 1, not (t, share) {wrong[0]}"
        again = [schedule(t, n) for t in reversed(ts)]
        assert again[::-1] == shares, f"SCHEDULES[{name!r}] must depend on t and n alone"


@pytest.mark.parametrize("name", [*train.SCHEDULES, *MADE_UP_SCHEDULES])
def test_snapshots_are_at_the_valleys_of_a_schedule_that_depends_on_n_and_evenly_spread_otherwise(name, monkeypatch):
    monkeypatch.setattr(train, "SCHEDULES", train.SCHEDULES | MADE_UP_SCHEDULES)
    ts = np.linspace(0, 1, 100, endpoint=False).tolist()
    schedule = train.SCHEDULES[name]
    has_cycles = [schedule(t, 2) for t in ts] != [schedule(t, 3) for t in ts]
    args = settings(name, epochs=20, warmup=0.1, cycles=3, snapshots=3)
    assert train.snapshot_epochs(args) == ([8, 14, 20] if has_cycles else [13, 16, 20])


OPTIMIZERS = {**train.OPTIMIZERS, "not fused": lambda groups, lr: torch.optim.NAdam(groups, lr=lr)}


def norm_net():
    """Return a net of 3 classes with batch norm, always with the same weights."""
    torch.manual_seed(0)
    return torch.nn.Sequential(OrderedDict(encoder=torch.nn.Conv2d(3, 4, 3, padding=1), norm=torch.nn.BatchNorm2d(4),
                                           act=torch.nn.ReLU(), head=torch.nn.Conv2d(4, 3, 1)))


def norm_run(name, lr=0.01, half=False):
    """Return a Run of norm_net; half: with the scaled losses of a GPU that computes in float16."""
    net = norm_net()
    run = small_run(net, optimizer=OPTIMIZERS[name](train.parameter_groups(net, 0.5, 0.1), lr))
    run.scaler = torch.amp.GradScaler("cpu", enabled=half)
    return run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_one_of_torchs_over_the_groups_with_their_factor_and_decay(name):
    groups = train.parameter_groups(norm_net(), 0.25, 0.2)
    expected = [(list(map(id, group["params"])), group["factor"], group["weight_decay"]) for group in groups]
    optimizer = OPTIMIZERS[name](groups, 0.01)
    assert isinstance(optimizer, torch.optim.Optimizer), f"OPTIMIZERS[{name!r}] must return a torch.optim.Optimizer"
    assert expected == [(list(map(id, group["params"])), group["factor"], group["weight_decay"])
                        for group in optimizer.param_groups], f"OPTIMIZERS[{name!r}] must keep the groups as they are"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss_in_one_step_and_takes_the_learning_rate_of_its_groups(name):
    run, (images, masks) = norm_run(name, lr=1e-3), small_batch(4)
    before = {key: value.clone() for key, value in run.model.named_parameters()}
    loss = train.backward(run, images, masks)
    for lr in (0, 1e-3):
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        moved = any(not torch.equal(value, before[key]) for key, value in run.model.named_parameters())
        assert moved == (lr > 0), f"OPTIMIZERS[{name!r}] must step with the lr that its groups have at that time"
    assert train.backward(run, images, masks) < loss


def norm_step(run, seed, fault=None):
    """Take a step of training on the batch `seed`; return whether its gradient was not finite."""
    images, masks = small_batch(4, seed)
    loss, mean = run.loss, run.mean
    if fault == "input":  # then batch norm's statistics aren't finite either
        run.mean = (math.nan,) * 3
    if fault == "gradient":  # of a loss that is finite
        run.loss = lambda logits, mask: loss(logits, mask) + (logits * 0).sqrt().sum()
    images = images.permute(0, 2, 3, 1).mul(40).byte()
    args = settings(batch_hook="none", clip=0.0, seed=0)
    value, bad = train.train_step(run, images, masks.byte(), 0.05, 0, 1, args)
    run.loss, run.mean = loss, mean
    assert value.isfinite() == (fault != "input")
    return bool(bad)


def copy_of_state(run):
    """Return {path: value} of weights, buffers and what the optimizer remembers."""
    states = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    return {path: value.clone() if isinstance(value, torch.Tensor) else value for path, value in leaves(states)}


def differing(first, second):
    """Return the paths at which two such states differ."""
    paths = first.keys() | second.keys()
    return sorted(map(str, (path for path in paths if not np.array_equal(first.get(path), second.get(path)))))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("fault", ["input", "gradient"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_a_finite_gradient_changes_nothing_with_any_optimizer(name, fault, half):
    said = f"OPTIMIZERS[{name!r}] must change nothing in such a step: let it be fused=True, or not fused at all"
    run = norm_run(name, half=half)
    assert not norm_step(run, 1)
    before = copy_of_state(run)
    assert norm_step(run, 2, fault)
    assert differing(before, copy_of_state(run)) == [], said
    assert not norm_step(run, 3)
    straight, disturbed = norm_run(name, half=half), norm_run(name, half=half)
    faults = [norm_step(disturbed, seed, fault * (seed in (0, 2))) for seed in range(4)]  # also in the first step
    assert faults == [True, False, True, False]
    for seed in (1, 3):
        norm_step(straight, seed)
    assert differing(copy_of_state(straight), copy_of_state(disturbed)) == [], said
    assert differing(before, copy_of_state(run))  # these would be seen


def hook_batch(n_images=5, side=128, seed=0):
    """Return normalised images and masks in blocks of the classes 0, 3 and 7 and of pixels without a label."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice([0, 3, 7, common.IGNORE_INDEX], (n_images, side // 16, side // 16))
    masks = torch.from_numpy(blocks.repeat(16, 1).repeat(16, 2))
    images = torch.from_numpy(rng.normal(size=(n_images, side, side, 3))).float().permute(0, 3, 1, 2)
    return images, masks  # images in channels_last memory, as those of normalise


@pytest.mark.parametrize("n_images", [2, 5])
@pytest.mark.parametrize("name", train.BATCH_HOOKS)
def test_every_batch_hook_gives_a_batch_as_the_model_wants_it_and_depends_on_the_generator_alone(name, n_images):
    hook, must = train.BATCH_HOOKS[name], f"BATCH_HOOKS[{name!r}] must "
    images, masks = hook_batch(n_images)
    before = images.clone(), masks.clone()
    for seed in range(20):
        new_images, new_masks = hook(images, masks, np.random.default_rng(seed))
        assert torch.equal(images, before[0]) and torch.equal(masks, before[1]), must + "not change what it gets"
        assert (new_images.dtype, new_masks.dtype) == (torch.float32, torch.int64), must + "keep the dtypes"
        height, width = new_masks.shape[1:]
        assert new_images.shape == (n_images, 3, height, width) and len(new_masks) == n_images, must + "keep the batch"
        assert height % common.STRIDE == width % common.STRIDE == 0 < height * width, must + "keep sides of STRIDE"
        assert new_images.isfinite().all(), must + "give finite images"
        assert set(new_masks.unique().tolist()) <= {0, 3, 7, common.IGNORE_INDEX}, must + "invent no class"
        torch.manual_seed(seed + 1)
        np.random.seed(seed + 1)  # noqa: NPY002
        again = hook(images, masks, np.random.default_rng(seed))
        assert torch.equal(again[0], new_images) and torch.equal(again[1], new_masks), must + "draw from rng alone"


@pytest.mark.parametrize(("side", "expected"), [(40, {32}), (45, {64}), (70, {64}), (518, set(range(416, 641, 32)))])
def test_multiscale_has_a_size_for_every_side(side, expected):
    images, masks = torch.zeros(2, 3, side, side), torch.zeros(2, side, side, dtype=torch.int64)
    sizes = {train.multiscale(images, masks, np.random.default_rng(seed))[1].shape[-1] for seed in range(99)}
    assert sizes == expected


def test_the_hook_none_returns_the_very_same():
    images, masks = hook_batch()
    result = train.BATCH_HOOKS["none"](images, masks, None)
    assert result[0] is images and result[1] is masks


class FixedShare:
    """Stand in for a numpy Generator: give every mixup one share, and random pixels."""

    def __init__(self, share, seed=0):
        self.share, self.random = share, np.random.default_rng(seed).random

    def beta(self, a, b):
        assert (a, b) == (0.4, 0.4)
        return self.share


@pytest.mark.parametrize(("share", "shift"), [(1.0, 0), (0.0, 1)])
def test_mixup_with_a_share_of_1_or_0_leaves_one_of_the_two_images_whole(share, shift):
    images, masks = hook_batch()
    mixed_images, mixed_masks = train.mixup(images, masks, FixedShare(share))
    assert torch.equal(mixed_images, images.roll(shift, 0)) and torch.equal(mixed_masks, masks.roll(shift, 0))


def test_mixup_takes_images_and_pixels_of_the_mask_from_the_same_two_in_the_same_proportion():
    images, masks = hook_batch()
    others, other_masks = images.roll(1, 0), masks.roll(1, 0)
    shares = []
    for seed in range(30):
        mixed, mixed_masks = train.mixup(images, masks, np.random.default_rng(seed))
        difference = images - others
        share = ((mixed - others) * difference).sum() / difference.square().sum()
        torch.testing.assert_close(mixed, share * images + (1 - share) * others, rtol=0, atol=1e-4)
        differ = masks != other_masks
        own = mixed_masks[differ] == masks[differ]
        assert ((mixed_masks == masks) | (mixed_masks == other_masks)).all()
        assert own.float().mean().item() == pytest.approx(share.item(), abs=0.01)
        shares.append(share.item())
    assert min(shares) < 0.05 and max(shares) > 0.95 and 0.3 < np.mean(shares) < 0.7  # of Beta(0.4, 0.4)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_cross_entropy_of_mixup_is_that_of_the_mixed_labels(share):
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(4, 8, 64, 64, generator=generator), small_batch(4, 1, 64)[1]
    images, loss = torch.zeros(4, 3, 64, 64), common.make_loss("ce")
    draws = [train.mixup(images, masks, FixedShare(share, seed))[1] for seed in range(100)]
    losses = torch.stack([loss(logits, mask) for mask in draws])
    expected = share * loss(logits, masks) + (1 - share) * loss(logits, masks.roll(1, 0))
    error = losses.std() / 100 ** 0.5  # of their mean
    assert error < 0.002 and losses.mean().item() == pytest.approx(expected.item(), abs=4 * error.item())


@pytest.mark.parametrize("side", [64, 96, 128, 256])
def test_multiscale_draws_all_sizes_from_three_to_five_quarters(side):
    images, masks = hook_batch(2, side)
    drawn = {train.multiscale(images, masks, np.random.default_rng(seed))[1].shape[1:] for seed in range(60)}
    sizes = [size for size in range(32, 2 * side, 32) if 0.75 * side <= size <= 1.25 * side]
    assert sorted(drawn) == [(size, size) for size in sizes]


@pytest.mark.parametrize("edge", [37, 64, 91])
@pytest.mark.parametrize("axis", [1, 2])
def test_multiscale_keeps_image_and_mask_aligned(edge, axis):
    masks = torch.zeros(1, 128, 128, dtype=torch.int64)
    masks.narrow(axis, edge, 128 - edge).fill_(common.IGNORE_INDEX)
    images = (masks[:, None] > 0).float().repeat(1, 3, 1, 1)
    for seed in range(10):
        new_images, new_masks = train.multiscale(images, masks, np.random.default_rng(seed))
        assert torch.equal(new_images[:, 0] > 0.5, new_masks == common.IGNORE_INDEX)
        assert (new_masks > 0).float().mean().item() == pytest.approx(1 - edge / 128, abs=1 / 96)


def assert_killed_run_ends_the_same(straight, killed):
    """Train one run straight on; kill the other in its second epoch and carry on, to the same bytes and log."""
    train.main(straight)
    killed.save_every = 1e-9  # seconds: after each step
    run_until_killed(train, killed, "backward", STEPS + 2)
    last = torch.load(run_of(killed) / "last.pt")
    assert (last["epoch"], last["step"]) == (1, 1)
    train.main(killed)
    assert (run_of(killed) / "model.pt").read_bytes() == (run_of(straight) / "model.pt").read_bytes()
    assert read_log(run_of(killed)) == read_log(run_of(straight)) and len(read_log(run_of(killed))) == 2


@pytest.mark.parametrize("name", train.BATCH_HOOKS)
def test_a_run_with_each_batch_hook_ends_in_the_same_bytes_killed_or_not(line, tmp_path, monkeypatch, name):
    hook, seen = train.BATCH_HOOKS[name], []

    def noting(images, masks, rng):
        new_images, new_masks = hook(images, masks, rng)
        seen.append((len(images), new_masks.shape[-1], rng.random()))
        return new_images, new_masks
    monkeypatch.setitem(train.BATCH_HOOKS, name, noting)
    monkeypatch.setattr(train, "batch_sides", lambda args: [args.scale])  # which calls the hook too
    straight, killed = (line(tmp_path / each, "--epochs", 2, "--scale", 128, "--batch-hook", name) for each in "ab")
    assert_killed_run_ends_the_same(straight, killed)
    steps, resumed = seen[:2 * STEPS], seen[2 * STEPS:]
    assert [n_images for n_images, _, _ in steps] == [4] * 2 * STEPS
    assert resumed == steps[STEPS + 1:] and len({draw for _, _, draw in steps}) == 2 * STEPS
    assert name != "multiscale" or len({size for _, size, _ in steps}) > 1


def test_a_size_that_a_hook_makes_and_the_model_cannot_take_is_told_before_training(line, tmp_path):
    args = line(tmp_path, "--scale", 128, "--model", "pan/tu-test_efficientnet", "--batch-hook", "multiscale")
    assert train.batch_sides(args) == [96, 128, 160] and train.batch_sides(line(tmp_path)) == [SCALE]
    with pytest.raises(UserError, match="pan/tu-test_efficientnet can't work at scale 96"):
        train.main(args)
    assert not (run_of(args) / "last.pt").exists()


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_both_loaders_are_weighed_against_shared_memory_by_what_their_batches_have(
        line, splits, tmp_path, monkeypatch, n_ranks):
    weighed = []
    for module in (common, train):
        monkeypatch.setattr(module, "ranks", lambda: (0, n_ranks))
    monkeypatch.setattr(train, "check_shared_memory", lambda *given: weighed.append(given))
    args = line(tmp_path, "--batch", 7, "--workers", 3, "--scale", 96)
    loaders = train.make_loaders(args, (*splits, []), np.arange(9), np.arange(9, 14), cuda=False)
    sizes = [sum(tensor.nbytes for tensor in next(iter(loader))) for loader in loaders]
    (workers, *told), = weighed
    assert workers == 3 and [n_batches for _, n_batches in told] == [len(loader) for loader in loaders]
    assert told[0][0] == sizes[0] and told[1][0] >= sizes[1]  # the few photos of validation fill no batch
    for loader in loaders:
        assert loader.timeout == 300 and loader.num_workers == 3


def test_too_little_shared_memory_is_told_before_training(line, tmp_path, no_training, monkeypatch):
    free = SimpleNamespace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match="^/dev/shm: 8 loader processes want [0-9,]+ bytes there for their batches, 1"):
        train.main(line(tmp_path, "--workers", 8))


def test_a_size_between_the_smallest_and_the_largest_is_tried_too(line, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(train, "try_sides", lambda model, name, sides: tried.extend(sides) or common.try_sides(
        model, name, sides))
    args = line(tmp_path, "--scale", 160, "--batch-hook", "multiscale")
    train.start_run(args, range(3), np.ones(3), None, torch.device("cpu"))
    assert tried == [128, 160, 192]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_each_optimizer_ends_in_the_same_bytes_killed_or_not(line, tmp_path, monkeypatch, name):
    monkeypatch.setattr(train, "OPTIMIZERS", OPTIMIZERS)
    straight, killed = (line(tmp_path / each, "--epochs", 2) for each in "ab")
    straight.optimizer = killed.optimizer = name
    assert_killed_run_ends_the_same(straight, killed)


STRANGERS = {  # table -> (its option, an entry as somebody would add it)
    "SCHEDULES": ("--schedule", '"mine": lambda t, n: 0.2 + 0.3 * t,'),
    "OPTIMIZERS": ("--optimizer", '"mine": lambda groups, lr: __import__("torch").optim.NAdam(groups, lr=lr),'),
    "BATCH_HOOKS": ("--batch-hook", '"mine": lambda images, masks, rng: (images + rng.random(), masks),')}


def train_in(project, argv):
    """Run train.py of another folder, with the libraries that are imported here already."""
    sys.path.insert(0, str(project))
    for name in ("common", "train"):
        del sys.modules[name]
    edited = importlib.import_module("train")
    assert Path(edited.__file__).parent == Path(edited.run_recipe.__code__.co_filename).parent == project
    for name in conftest.PICTURES:
        setattr(edited, name, lambda *_: None)
    edited.main(edited.parse_args(argv))


@pytest.mark.parametrize("table", STRANGERS)
def test_an_entry_that_is_added_to_a_table_in_a_copy_of_the_project_trains_by_its_name(
        tiny_data, cache, tmp_path, table):
    option, entry = STRANGERS[table]
    project = tmp_path / "project"
    project.mkdir()
    for path in conftest.ROOT.glob("*.py"):
        shutil.copy(path, project)
    edit(project / "train.py", f"\n{table} = {{", f"\n{table} = {{{entry}\n    ")
    argv = ["--data", tiny_data, "--exp", tmp_path / "exp", "--cache", cache, "--model", MODEL, "--scale", SCALE,
            "--folds", 3, "--epochs", 1, "--batch", 4, "--weights", "none", "--device", "cpu", option, "mine"]
    process = get_context("fork").Process(target=train_in, args=(project, list(map(str, argv))))
    process.start()
    process.join()
    assert process.exitcode == 0
    made = common.read_json(run_folder(tmp_path / "exp", 0, MODEL, SCALE, 0) / "config.json")
    assert made["recipe"][option.removeprefix("--").replace("-", "_")] == "mine"
    # its code is part of what made the run, that of the others in the table isn't
    assert [name for name in made["code"] if name.startswith(table)] == [f"{table}[mine]"]


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_the_log_has_a_row_an_epoch_with_loss_rate_scores_and_iou_by_class(line, finished_exp, splits):
    with open(run_of(line(finished_exp)) / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["epoch", "loss", "lr", "skipped", "images_per_s", "waiting", "v1", "v2", "v3", "seconds",
                             *(f"iou {name}" for name in splits[0].classes)]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    middles = [(epoch - 0.5 / STEPS) / EPOCHS for epoch in (1, 2, 3)]  # of each epoch's last step
    rates = [1e-3 * (1 + math.cos(math.pi * (middle - 0.05) / 0.95)) / 2 for middle in middles]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates)
    for row in rows:
        ious = [float(v) for k, v in row.items() if k.startswith("iou ")]
        assert float(row["v2"]) == pytest.approx(np.nanmean(ious))
        assert float(row["loss"]) > 0 and all(0 <= float(row[k]) <= 1 for k in ("v1", "v2", "v3"))


def test_the_saved_v3_is_what_the_saved_weights_score_on_the_held_out_fold(line, finished_exp, splits):
    labelled = splits[0]
    loaded = common.load_model(run_of(line(finished_exp)) / "model.pt")
    model, recipe, state = loaded.model, loaded.recipe, loaded.checkpoint
    with open(finished_exp / "folds.csv", newline="") as f:
        held_out = [int(row["image_id"]) for row in csv.DictReader(f) if row["fold"] == str(FOLD)]
    assert state["valid_ids"] == held_out and 0 < len(held_out) < len(labelled.ids)
    mious = []
    for i in map(labelled.ids.index, held_out):
        assert labelled.sizes[i] == [SCALE, SCALE]
        image = (labelled.image(i) / 255 - recipe["mean"]) / recipe["std"]
        with torch.no_grad():
            logits = model(torch.from_numpy(image.transpose(2, 0, 1)[None]).float())
        probs = logits.softmax(1)[0].permute(1, 2, 0).numpy()
        pred = cv2.resize(probs, (SUBMIT_SIZE, SUBMIT_SIZE)).argmax(2).ravel()
        mask = labelled.mask(i).repeat(4, 0).repeat(4, 1).ravel()  # 64 -> 256
        seen = np.union1d(pred, mask)
        mious.append(jaccard_score(mask, pred, labels=seen, average="macro"))
    assert state["v3"] == pytest.approx(np.mean(mious), abs=2e-4)
    best = read_log(run_of(line(finished_exp)))[state["epoch"] - 1]
    assert float(best["v3"]) == state["v3"]


@pytest.mark.parametrize("classmix", ["none", "plain", "weighted"])
def test_classmix_weighs_classes_by_their_pixels_in_the_training_images(line, splits, tmp_path, classmix):
    args, learn = line(tmp_path, "--classmix", classmix, "--classmix-prob", 0.7), np.arange(0, len(splits[0].ids), 2)
    mix = train.make_loaders(args, (*splits, []), learn, np.array([1]), cuda=False)[0].dataset.mix
    pixels = sum(np.bincount(splits[0].mask(i).ravel(), minlength=12) for i in learn.tolist())
    expected = {"none": None, "plain": [1] * 12, "weighted": [1 / max(n, 1) for n in pixels.tolist()]}[classmix]
    assert (mix and (mix[0], mix[1].tolist())) == (expected and (0.7, pytest.approx(expected)))


def test_the_mix_of_a_batch_is_drawn_from_seed_epoch_and_images(splits):
    entries = [(splits[0], i, None) for i in range(6)]
    samples = {seed: common.TrainSamples(entries, lambda image, mask, rng: (image, mask), seed, (1.0, np.ones(12)))
               for seed in (0, 1)}

    def masks(seed, epoch, last=6):
        return samples[seed].__getitems__([(epoch, i) for i in range(last)])[1]
    assert torch.equal(masks(0, 0), masks(0, 0))
    assert not torch.equal(masks(0, 0), masks(0, 1)) and not torch.equal(masks(0, 0), masks(1, 0))
    assert samples[0].__getitems__([(0, 2)])[1].shape[0] == 1  # alone: nothing to mix with


def test_model_pt_holds_the_averaged_weights_of_the_best_epoch_of_the_later_half_by_v3(line, tmp_path, monkeypatch):
    v3, seen, scores, evaluate = iter([0.9, 0.2, 0.3, 0.5, 0.5, 0.3]), [], train.scores, train.evaluate
    monkeypatch.setattr(train, "scores", lambda *args: scores(*args) | {"v3": next(v3), "v1": 0.9, "v2": 0.9})

    def remember(run, *rest):
        seen.append({k: v.clone() for k, v in run.ema.module.state_dict().items()})
        return evaluate(run, *rest)
    monkeypatch.setattr(train, "evaluate", remember)
    train.main(line(tmp_path, "--epochs", 6))
    state = torch.load(run_of(line(tmp_path)) / "model.pt")
    assert (state["epoch"], state["v3"]) == (4, 0.5)  # the first half doesn't count
    assert all(torch.equal(v, seen[3][k]) for k, v in state["model"].items())
    assert not all(torch.equal(v, seen[4][k]) for k, v in state["model"].items())


def pickled_names(path):
    """Return the names of all classes and functions that unpickling the checkpoint would call."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        return {arg for code, arg, _ in pickletools.genops(archive.read(name)) if code.name in ("GLOBAL", "INST")}


def test_checkpoints_hold_tensors_and_plain_values_only(line, tmp_path, monkeypatch, interrupt):
    start_and_stop(line(tmp_path), monkeypatch, interrupt, "save_checkpoint", EPOCHS + 1)
    last = run_of(line(tmp_path)) / "last.pt"
    copy = line(shutil.copytree(tmp_path, tmp_path / "copy"))
    train.main(copy)
    for path in (last, run_of(copy) / "model.pt"):
        assert {name.split()[0].split(".")[0] for name in pickled_names(path)} <= {"torch", "collections"}
        state = torch.load(path, weights_only=True)
        assert {type(value) for _, value in leaves(state)} <= {torch.Tensor, str, int, float, bool, type(None)}


def test_saved_weights_have_the_names_of_the_bare_model(line, finished_exp):
    state = torch.load(run_of(line(finished_exp)) / "model.pt")
    assert state["model"].keys() == common.build_model(MODEL, 12).state_dict().keys()
    assert len(state["classes"]) == 12 and state["classes"][0] == "Background"


# ---- learning -------------------------------------------------------------------------------------------------------


def test_a_new_model_predicts_the_class_frequencies_of_its_training_fold(splits):
    model = common.build_model(MODEL, 12).eval()
    pixels = np.array(splits[0].pixels)[3:].sum(0)
    train.set_prior(model, pixels)
    last = [m for m in model.segmentation_head.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight.zero_()
        probs = model(torch.randn(1, 3, SCALE, SCALE)).softmax(1).mean((0, 2, 3))
    assert probs.numpy() == pytest.approx(pixels / pixels.sum(), abs=1e-3)


def test_training_learns_to_tell_pixels_apart_by_the_photo(line, tmp_path, splits):
    """Expect a loss clearly below the least that a prediction can have which is the same for every pixel."""
    train.main(line(tmp_path, "--model", "unet/tu-test_efficientnet", "--batch", 2, "--epochs", 6, "--lr", "1e-2",
                    "--augment", "none"))
    with open(tmp_path / "folds.csv", newline="") as f:
        learnt = [i for i, row in enumerate(csv.DictReader(f)) if row["fold"] != str(FOLD)]
    masks = torch.from_numpy(np.stack([splits[0].mask(i) for i in learnt])).long()
    logits = (torch.bincount(masks.flatten(), minlength=12) + 1).log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(100):
        loss = common.make_loss("iou_ce")(logits.view(1, 12, 1, 1).expand(len(masks), -1, *masks.shape[1:]), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = [float(row["loss"]) for row in read_log(run_of(line(tmp_path, "--model", "unet/tu-test_efficientnet")))]
    assert losses[-1] < 0.85 * loss.item() and losses[-1] < 0.85 * losses[0]


# ---- snapshots ------------------------------------------------------------------------------------------------------


def test_snapshots_are_the_averaged_weights_after_their_epochs_whether_resumed_or_not(
        line, tmp_path, monkeypatch, interrupt):
    seen, evaluate = [], train.evaluate

    def remember(run, *rest):
        seen.append({k: v.clone() for k, v in run.ema.module.state_dict().items()})
        return evaluate(run, *rest)
    monkeypatch.setattr(train, "evaluate", remember)
    args, resumed = line(tmp_path / "a", "--snapshots", 2), line(tmp_path / "b", "--snapshots", 2)
    train.main(args)
    monkeypatch.undo()
    snapshots = sorted(run_of(args).glob("epoch-*.pt"))
    assert [path.name for path in snapshots] == ["epoch-002.pt", "epoch-003.pt"]
    for path, epoch in zip(snapshots, (2, 3), strict=True):
        loaded = common.load_model(path)
        state = loaded.checkpoint
        assert state["epoch"] == epoch and loaded.recipe["snapshots"] == 2
        assert state["v3"] == float(read_log(run_of(args))[epoch - 1]["v3"])
        assert state["valid_ids"] == torch.load(run_of(args) / "model.pt")["valid_ids"]
        weights = loaded.model.state_dict()
        assert weights.keys() == seen[epoch - 1].keys()
        assert all(torch.equal(v, weights[k]) for k, v in seen[epoch - 1].items())
    assert not all(torch.equal(v, seen[2][k]) for k, v in seen[1].items())
    start_and_stop(resumed, monkeypatch, interrupt, "backward", STEPS * 2 + 1)
    assert [path.name for path in run_of(resumed).glob("*epoch-*.pt")] == ["last-epoch-002.pt"]
    train.main(resumed)
    assert {path.name for path in run_of(resumed).glob("*.pt")} == {"epoch-002.pt", "epoch-003.pt", "model.pt"}
    for path in snapshots:
        assert (run_of(resumed) / path.name).read_bytes() == path.read_bytes()


def test_a_run_in_place_of_another_leaves_all_of_it_until_the_new_one_is_there_and_then_keeps_it_aside(
        line, tmp_path, monkeypatch, interrupt):
    first, second = line(tmp_path, "--snapshots", 2), line(tmp_path, "--snapshots", 1, "--seed", 3, "--replace")
    train.main(first)
    folder = run_of(first)
    before = {name: (folder / name).read_bytes() for name in FINISHED}
    start_and_stop(second, monkeypatch, interrupt, "backward", STEPS + 1)
    assert {path.name for path in folder.iterdir()} == {*FINISHED, ".lock", "last.pt", "last.csv", "last.json"}
    assert {name: (folder / name).read_bytes() for name in FINISHED} == before
    back = line(shutil.copytree(tmp_path, tmp_path / "back"), "--snapshots", 2, "--replace")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_epoch", lambda *_: pytest.fail("training began"))
        train.main(back)  # it is all there
    assert {name: (run_of(back) / name).read_bytes() for name in FINISHED} == before
    train.main(second)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "log.csv", "epoch-003.pt", "model.pt", "replaced", ".lock"}
    assert torch.load(folder / "epoch-003.pt")["recipe"]["seed"] == 3
    assert {path.name: path.read_bytes() for path in (folder / "replaced").iterdir()} == before


def test_a_run_that_was_begun_and_is_replaced_stands_aside_with_its_snapshots(line, tmp_path, monkeypatch, interrupt):
    args = line(tmp_path, "--snapshots", 2, "--seed", 3)
    start_and_stop(args, monkeypatch, interrupt, "backward", STEPS * 2 + 1)
    begun = ("last.json", "last.pt", "last-1.pt", "last-epoch-002.pt")
    before = {name: (run_of(args) / name).read_bytes() for name in begun}
    train.main(line(tmp_path, "--replace"))
    assert {path.name for path in run_of(args).iterdir()} == {"config.json", "log.csv", "model.pt", "replaced", ".lock"}
    aside = run_of(args) / "replaced"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert torch.load(aside / "last.pt")["recipe"]["seed"] == common.read_json(aside / "last.json")["recipe"]["seed"] \
        == 3


# ---- options that change a run and keep it reproducible -------------------------------------------------------------


@pytest.mark.parametrize("more", [
    ["--sampler", "rare"], ["--classmix", "plain"], ["--classmix", "weighted", "--classmix-prob", 1],
    ["--class-weights", "inverse"], ["--optimizer", "sgd", "--clip", 0.5, "--accumulate", 2, "--encoder-lr", 0.1],
    ["--layer-decay", 0.5, "--drop-path", 0.3], ["--freeze", 1, "--clip", 1], ["--freeze", 2, "--optimizer", "sgd"],
], ids=lambda more: "_".join(map(str, more)))
def test_an_option_changes_the_run_which_stays_the_same_with_workers_and_when_killed(
        line, finished_exp, tmp_path, more, capsys):
    straight, killed = (line(tmp_path / name, "--epochs", 2, *more) for name in "ab")
    killed.workers = 2  # they outlive it by seconds, but must not keep its lock
    train.main(straight)
    plain, log = read_log(run_of(line(finished_exp))), read_log(run_of(straight))
    assert log[0]["loss"] != plain[0]["loss"]
    run_until_killed(train, killed, "backward", STEPS + 1)
    assert torch.load(run_of(killed) / "last.pt")["epoch"] == 1 and not (run_of(killed) / "model.pt").exists()
    capsys.readouterr()
    train.main(killed)
    assert "resuming after epoch 1" in capsys.readouterr().out
    assert (run_of(killed) / "model.pt").read_bytes() == (run_of(straight) / "model.pt").read_bytes()
    assert read_log(run_of(killed)) == log


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_a_frozen_encoder_keeps_its_weights_and_statistics_for_so_many_epochs_and_then_learns(
        line, tmp_path, monkeypatch, optimizer):
    args = line(tmp_path, "--freeze", 2, "--epochs", 3, "--weight-decay", 0.5, "--ema", 0.5, "--optimizer", optimizer)
    states, start_run, train_one_epoch = [], train.start_run, train.train_one_epoch

    def copies(run):
        return [deepcopy(model.state_dict()) for model in (run.model, run.ema.module)]

    def start(*rest):
        run = start_run(*rest)
        states.append(copies(run))
        return run

    def one_epoch(run, *rest):
        row = train_one_epoch(run, *rest)
        states.append(copies(run))
        return row
    monkeypatch.setattr(train, "start_run", start)
    monkeypatch.setattr(train, "train_one_epoch", one_epoch)
    train.main(args)
    first, *after = states
    for epoch, (state, average) in enumerate(after, 1):
        for key, value in first[0].items():
            is_kept = torch.equal(state[key], value) and torch.equal(average[key], value)
            learns = value.is_floating_point() and (not key.startswith("encoder.") or epoch == 3)
            assert is_kept != learns or not value.is_floating_point(), (epoch, key)
    counted = [key for key in first[0] if key.startswith("encoder.") and key.endswith("num_batches_tracked")]
    assert counted and all(after[1][0][key] == 0 and after[2][0][key] == STEPS for key in counted)


def test_freezing_and_thawing_leaves_alone_what_the_logits_do_not_need(line, tmp_path):
    args = line(tmp_path, "--model", "fpn/efficientnet-b0", "--freeze", 1)
    run = train.start_run(args, range(3), np.ones(3), None, torch.device("cpu"))
    needless = [p for name, p in run.model.named_parameters() if "_conv_head" in name or "_bn1" in name[:14]]
    assert needless and not any(p.requires_grad for p in run.model.encoder.parameters()) and run.is_frozen
    run.epoch = 1
    train.prepare_model(run, args)
    assert not any(p.requires_grad for p in needless) and not run.is_frozen and run.model.encoder.training
    listed = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in run.model.parameters() if p.requires_grad} == listed


def test_the_encoders_parameters_have_its_factor_times_their_layers_and_its_last_block_the_rate(line, tmp_path):
    args = line(tmp_path, "--model", "dpt/tu-test_vit", "--encoder-lr", 0.5, "--layer-decay", 0.5, "--drop-path", 0.3)
    run = train.start_run(args, range(3), np.ones(3), None, torch.device("cpu"))
    names = {id(p): name for name, p in run.model.named_parameters()}
    factors = {names[id(p)]: group["factor"] for group in run.optimizer.param_groups for p in group["params"]}
    expected = {"encoder.model.blocks.5.mlp.fc1.weight": 1 / 4, "encoder.model.blocks.0.norm1.bias": 1 / 128,
                "encoder.model.pos_embed": 1 / 256, "segmentation_head.head.4.weight": 1}
    assert {name: factors[name] for name in expected} == expected
    assert run.model.encoder.model.blocks[5].drop_path1.drop_prob == pytest.approx(0.3)


def test_checkpointed_gradients_are_no_part_of_the_recipe_and_end_in_the_same_bytes(line, tmp_path):
    plain, saving = (line(tmp_path / name, "--model", "fpn-narrow/tu-convnext_atto", "--epochs", 1, *more)
                     for name, more in (("a", []), ("b", ["--grad-checkpoint"])))
    for args in (plain, saving):
        train.main(args)
    assert (run_of(plain) / "model.pt").read_bytes() == (run_of(saving) / "model.pt").read_bytes()


def test_a_scale_of_no_stride_trains_and_predicts(line, tmp_path):
    args = line(tmp_path, "--model", "dpt/tu-test_vit", "--scale", 70, "--epochs", 1, "--batch-hook", "multiscale")
    train.main(args)
    trained = common.load_model(run_of(args) / "model.pt")
    assert trained.model.encoder.model.patch_embed.grid_size == (5, 5)  # of 16 pixels
    assert common.predict_photo(trained, np.zeros((30, 40, 3), np.uint8)).shape == (12, 30, 40)


def drawn(args, epochs):
    """Return the indices that a run's loader asks for in some epochs, and bool [N, C]: the classes of each image."""
    labelled, test = common.load_data(args.data, args.cache, args.paint)
    folds = common.load_folds(args.exp, labelled, args.folds)
    learn, valid = np.flatnonzero(folds != args.fold), np.flatnonzero(folds == args.fold)
    loader, _ = train.make_loaders(args, (labelled, test, []), learn, valid, cuda=False)
    indices = []
    for loader.batch_sampler.epoch in epochs:
        indices += [index for batch in loader.batch_sampler for _, index in batch]
    return indices, np.array(labelled.pixels)[learn] > 0


def test_the_rare_sampler_draws_images_with_a_rare_class_oftener(line, exp):
    indices, present = drawn(line(exp, "--sampler", "rare"), range(300))
    times = np.bincount(indices, minlength=len(present))
    rarest = np.array([present.sum(0)[image].min() for image in present])  # images with the rarest class of each
    expected = 1 / rarest / (1 / rarest).sum()
    assert times / times.sum() == pytest.approx(expected, abs=0.02) and np.ptp(expected) > 0.06
    assert sorted(drawn(line(exp), range(1))[0][:len(present)]) == list(range(len(present)))


def test_inverse_class_weights_are_of_the_training_folds_pixels(line, exp, splits, monkeypatch):
    made, make_loss = [], train.make_loss
    monkeypatch.setattr(train, "make_loss", lambda *settings: made.append(settings) or make_loss(*settings))
    args = line(exp, "--class-weights", "inverse", "--loss", "dice_ce", "--loss-ratio", 0.3, "--label-smoothing", 0.1)
    train.start_run(args, splits[0].classes, np.array([100, 0, 25, 50] + [0] * 8), None, CPU)
    name, ratio, smoothing, weights = made[0]
    assert (name, ratio, smoothing) == ("dice_ce", 0.3, 0.1)
    expected = [1 / 100, 0, 1 / 25, 1 / 50] + [0] * 8  # a class without pixels has none to weigh
    assert weights.numpy() == pytest.approx(np.array(expected) / (0.07 / 3))
    train.start_run(line(exp), splits[0].classes, np.ones(12), None, CPU)
    assert made[1][3] is None


def test_a_run_that_runs_out_of_memory_goes_on_in_parts(line, tmp_path, monkeypatch, capsys):
    start_run = train.start_run

    def start_small(*arguments):
        run = start_run(*arguments)
        limit_memory(run, run.model, largest=3)
        return run
    monkeypatch.setattr(train, "start_run", start_small)
    train.main(line(tmp_path, "--epochs", 1))
    assert "in 2 parts" in capsys.readouterr().out and (run_of(line(tmp_path)) / "model.pt").exists()


# ---- validation's batches -------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12))
def test_validation_has_each_image_once_in_batches_of_one_size_the_last_filled_up(n_images, size):
    batches = train.eval_batches(n_images, size)
    items = np.concatenate(batches)
    assert {len(batch) for batch in batches} == {min(size, n_images)}
    assert items[:n_images].tolist() == list(range(n_images)) and set(items[n_images:]) <= {n_images - 1}
    assert len(items) - n_images < size
    assert train.eval_batches(7, 3) == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    assert train.eval_batches(0, 3) == []  # of a process that has none of few images


def test_what_fills_up_validations_last_batch_does_not_count(line, tmp_path, monkeypatch):
    counted, sizes, predict = [], [], train.predict
    monkeypatch.setattr(train, "scores", lambda counts, size: counted.append(len(counts)) or common.scores(
        counts, size))
    monkeypatch.setattr(train, "predict", lambda model, images, run: sizes.append(len(images)) or predict(
        model, images, run))
    args = line(tmp_path, "--epochs", 1, "--batch", 3)
    train.main(args)
    assert counted == [5] and sizes[:2] == [3, 3]
    assert len(common.load_checkpoint(run_of(args) / "model.pt")["image_v3"]) == 5


# ---- torch.compile --------------------------------------------------------------------------------------------------


def test_compile_changes_neither_the_weights_nor_their_names(line, finished_exp, tmp_path, monkeypatch):
    calls = []

    def compile_function(function):
        calls.append([])
        return lambda images, *mask: calls[is_loss(mask)].append(len(images)) or function(images, *mask)

    def is_loss(mask):
        return 0 if mask else 1  # the loss is compiled first
    monkeypatch.setattr(torch, "compile", compile_function)
    args = line(tmp_path, "--compile")
    run_and_keep(args)
    assert calls == [[4] * STEPS * EPOCHS] * 2  # one size; evaluated is the average, as it is
    assert_same_run(args, line(finished_exp))


@pytest.mark.slow
def test_a_compiled_model_trains_and_its_file_is_read_without_compiling(line, tmp_path):
    args = line(tmp_path, "--compile", "--epochs", 2)
    train.main(args)
    state = torch.load(run_of(args) / "model.pt")
    assert state["model"].keys() == common.build_model(MODEL, 12).state_dict().keys()
    common.load_model(run_of(args) / "model.pt")
    assert all(math.isfinite(float(row["loss"])) for row in read_log(run_of(args)))


# ---- overfit --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Return a folder with 8 photos of 64 x 64 that each show a plain square of one of two classes."""
    folder = tmp_path_factory.mktemp("shapes")
    annotations = []
    for i in range(1, 9):
        x, y = (4 * int(v) for v in np.random.default_rng(i).integers(0, 8, 2))
        photo = np.full((64, 64, 3), (60, 120, 50), np.uint8)
        photo[y:y + 32, x:x + 32] = ((220, 40, 40), (40, 60, 230))[i % 2]
        (folder / "batch_01").mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"batch_01/{i:04}.png"), photo[..., ::-1])
        annotations.append((i, i % 2, [[x, y, x + 32, y, x + 32, y + 32, x, y + 32]]))
    return write_coco(folder, [(i, 64, 64) for i in range(1, 9)], annotations)


def overfit_line(line, shapes, exp, *more):
    return line(exp, "--data", shapes, "--batch", 8, "--lr", "5e-3", "--epochs", 8, "--overfit", 2, *more)


def test_overfit_learns_its_few_images_by_heart_beside_the_normal_run(line, shapes, tmp_path, monkeypatch, capsys):
    args = overfit_line(line, shapes, tmp_path, "--augment", "strong", "--classmix", "plain", "--sampler", "rare")
    run_of(args).mkdir(parents=True)
    (run_of(args) / "model.pt").write_text("a normal run")
    seen, backward = [], train.backward
    monkeypatch.setattr(train, "backward", lambda run, images, masks: (
        seen.extend(zip(images.clone(), masks.clone(), strict=True)), backward(run, images, masks))[1])
    train.main(args)
    assert {path.name for path in run_of(args).iterdir()} == {"model.pt"}
    assert (run_of(args) / "model.pt").read_text() == "a normal run"
    folder = run_folder(tmp_path / "overfit", 0, MODEL, SCALE, FOLD)
    state = torch.load(folder / "model.pt")
    assert state["v3"] >= 0.9 and state["epoch"] == len(read_log(folder)) < 8  # it stops when it can
    recipe = state["recipe"]
    assert (recipe["overfit"], recipe["augment"], recipe["classmix"], recipe["sampler"]) == (2, "none", "none", "all")
    assert len(seen) == 256 * state["epoch"]
    assert len({image.numpy().tobytes() for image, _ in seen}) == 2 == len(state["valid_ids"])
    labelled = common.load_data(args.data, args.cache)[0]
    for image_id in state["valid_ids"]:  # those that it has learnt, as they are
        image, mask = (v(labelled.ids.index(image_id)) for v in (labelled.image, labelled.mask))
        inputs = (torch.tensor(image).permute(2, 0, 1) / 255 - torch.tensor(recipe["mean"]).view(3, 1, 1)) \
            / torch.tensor(recipe["std"]).view(3, 1, 1)
        assert any(torch.allclose(inputs, i, atol=1e-5) and (m.numpy() == mask).all() for i, m in seen[:16])
    capsys.readouterr()
    monkeypatch.setattr(train, "train_one_epoch", lambda *_: pytest.fail("training began"))
    train.main(args)
    assert "nothing to do" in capsys.readouterr().out


def test_overfit_that_learns_nothing_fails_with_one_line_every_time(line, shapes, tmp_path, monkeypatch):
    args = overfit_line(line, shapes, tmp_path, "--lr", 0, "--epochs", 1, "--overfit", 4)
    for _ in range(2):
        with pytest.raises(UserError, match=r"v3 0\.\d+ on its own 4 training images, below 0.9.*--lr") as failure:
            train.main(args)
        assert failure.value.code == 1 and "\n" not in str(failure.value)  # printed, and status 1
        assert not list(tmp_path.rglob("model.pt"))
        monkeypatch.setattr(train, "train_one_epoch", lambda *_: pytest.fail("training began"))


@pytest.mark.slow
@pytest.mark.parametrize("decoder", common.DECODERS)
def test_every_decoder_can_learn_a_few_images_by_heart(line, shapes, tmp_path, decoder):
    encoder, lr = ("tu-test_vit", "4e-3") if decoder == "dpt" else ("tu-mobilenetv3_small_050", "5e-3")
    # pan needs 128 or more; those at 32 are slow
    scale = {"pan": 128, "upernet": 32, "deeplabv3": 32, "dpt": 32}.get(decoder, 64)
    train.main(overfit_line(line, shapes, tmp_path, "--model", f"{decoder}/{encoder}", "--lr", lr, "--scale", scale))


@pytest.mark.slow
@pytest.mark.parametrize("loss", common.LOSSES)
def test_every_loss_teaches_a_few_images_by_heart(line, shapes, tmp_path, loss):
    train.main(overfit_line(line, shapes, tmp_path, "--loss", loss))


# ---- loggers --------------------------------------------------------------------------------------------------------


class Recorder:
    """Stand in for a logger's module and its writer: remember the rows, and raise at the call `fails`."""

    def __init__(self, fails=None):
        self.rows, self.fails, self.started, self.calls = [], fails, [], 0

    def call(self):
        self.calls += 1
        if self.fails is not None and self.calls == self.fails:
            raise RuntimeError("no route to host")

    def init(self, **settings):  # wandb's
        self.call()
        self.started.append(settings)
        return self

    def log(self, row):
        self.call()
        self.rows.append(dict(row))

    def flush(self):
        pass

    def SummaryWriter(self, folder, **_):  # noqa: N802  tensorboard's
        self.call()
        self.started.append({"dir": folder})
        return self

    def add_scalar(self, key, value, step):
        if key == "epoch":
            self.call()
            self.rows.append({})
        self.rows[-1][key] = value
        assert self.rows[-1]["epoch"] == step


MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


@pytest.mark.parametrize("logger", train.LOGGERS)
def test_a_logger_gets_every_row_of_the_log(line, finished_exp, tmp_path, monkeypatch, capsys, logger):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, MODULES[logger], recorder)
    args = line(tmp_path, "--logger", logger)
    run_and_keep(args)
    assert len(recorder.started) == 1 and str(run_of(args)) in str(recorder.started[0]["dir"])
    with open(run_of(args) / "log.csv", newline="") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    assert len(rows) == EPOCHS and repr(rows) == repr([{k: float(v) for k, v in r.items()} for r in recorder.rows])
    assert "warning" not in capsys.readouterr().err
    assert_same_run(args, line(finished_exp))


@pytest.mark.parametrize("logger", train.LOGGERS)
@pytest.mark.parametrize("fails", [1, 3])  # at the start, at the second row
def test_a_logger_that_fails_is_one_warning_and_the_run_goes_on(
        line, finished_exp, tmp_path, monkeypatch, capsys, logger, fails):
    recorder = Recorder(fails)
    monkeypatch.setitem(sys.modules, MODULES[logger], recorder)
    args = line(tmp_path, "--logger", logger)
    run_and_keep(args)
    assert recorder.calls == fails
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and f"{logger} failed" in said and "no route to host" in said
    assert_same_run(args, line(finished_exp))


@pytest.mark.parametrize("logger", train.LOGGERS)
def test_a_logger_that_is_not_installed_is_one_warning(line, finished_exp, tmp_path, monkeypatch, capsys, logger):
    for name in (logger, MODULES[logger]):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    args = line(tmp_path, "--logger", logger)
    run_and_keep(args)
    assert capsys.readouterr().err.count(f"warning: {logger} failed") == 1
    assert_same_run(args, line(finished_exp))


# ---- pictures -------------------------------------------------------------------------------------------------------


def read_picture(path):
    return cv2.imread(str(path))[:, :, ::-1]


def test_a_run_leaves_its_pictures(line, pictures, tmp_path):
    args = line(tmp_path, "--epochs", 2)
    train.main(args)
    curves, batch, valid = (read_picture(run_of(args) / f"{name}.png") for name in ("curves", "batch", "valid"))
    assert curves.std() > 10 and batch.shape[1] == 4 * SUBMIT_SIZE
    assert valid.shape[:2] == (5 * (SUBMIT_SIZE + 18) + 13 * 18, 4 * SUBMIT_SIZE)  # five images, 13 lines of legend


def test_the_first_batch_is_shown_as_it_is_learnt_from(line, pictures, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "draw_batch", lambda path, classes, images, masks: (
        seen.append((images, masks)), conftest.PICTURES["draw_batch"](path, classes, images, masks)))
    learnt, backward = [], train.backward
    monkeypatch.setattr(train, "backward", lambda run, images, masks: (
        learnt.append(masks.clone()), backward(run, images, masks))[1])
    args = line(tmp_path, "--epochs", 1, "--classmix", "plain", "--classmix-prob", 1)
    train.main(args)
    (images, masks), = seen
    assert (masks == learnt[0].numpy()).all() and len(images) == 4
    sheet, line_height = read_picture(run_of(args) / "batch.png"), 18
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        top, left = (i // 2) * (SUBMIT_SIZE + line_height) + line_height, (i % 2) * 2 * SUBMIT_SIZE
        shown = sheet[top:top + SUBMIT_SIZE, left:left + 2 * SUBMIT_SIZE]
        assert (shown == np.hstack([common.overlay(image, mask * 0), common.overlay(image, mask)])).all()


def test_the_worst_the_median_and_the_best_images_are_shown_in_order(line, splits, tmp_path):
    photos = common.EvalPhotos(splits[0], list(range(14)), SCALE)
    scores = [0.5, 0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.05, 0.95, 0.15, 0.85, 0.25]
    model = common.build_model(MODEL, 12).eval()
    run = Namespace(ema=Namespace(module=model), best={"image_v3": scores, "model": model.state_dict()},
                    device=torch.device("cpu"), mean=[0.5] * 3, std=[0.5] * 3)
    conftest.PICTURES["draw_valid"](tmp_path / "v.png", run, photos, splits[0].classes)
    sheet, height = read_picture(tmp_path / "v.png"), SUBMIT_SIZE + 18
    order = np.argsort(scores).tolist()
    shown = order[:4] + order[5:9] + order[-4:]
    assert sheet.shape[0] == 12 * height + 13 * 18
    for row, i in enumerate(shown):
        image, truth = photos[i]
        tiles = np.hstack([common.overlay(image, truth * 0), common.overlay(image, truth)])
        assert (sheet[row * height + 18:(row + 1) * height, :2 * SUBMIT_SIZE] == tiles).all()


def test_curves_are_drawn_after_each_epoch_unless_that_would_cost_2_percent(line, tmp_path, monkeypatch):
    drawn, clock = [], iter(range(0, 10 ** 9, 50))  # whatever is timed takes 50 seconds or a multiple of it
    monkeypatch.setattr(train, "draw_curves", lambda path, log: drawn.append(len(log)))
    monkeypatch.setattr(train, "time", Namespace(monotonic=lambda: next(clock)))
    train.main(line(tmp_path, "--epochs", 4))
    assert drawn == [1, 4]


def test_a_run_that_is_stopped_before_its_last_curves_draws_them_when_it_resumes(line, tmp_path, monkeypatch):
    drawn = []

    def stop(path, log):
        drawn.append(len(log))
        if drawn == [1]:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "draw_curves", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(line(tmp_path, "--epochs", 1))
    train.main(line(tmp_path, "--epochs", 1))
    assert drawn == [1, 1]


# ---- pseudo labels --------------------------------------------------------------------------------------------------


@pytest.fixture
def pseudo(line, exp, splits):
    """Return the arguments of a run of round 1 whose pseudo labels, each of one class, are there; image 2 is out."""
    args = line(exp, "--round", 1, "--epochs", 1)
    folder, test = exp / f"r1/pseudo/f{FOLD}", splits[1]
    folder.mkdir(parents=True)
    labels = np.stack([np.full((SUBMIT_SIZE, SUBMIT_SIZE), 3 + i, np.uint8) for i in range(len(test.ids))])
    np.save(folder / "labels.npy", labels)
    common.write_csv(folder / "index.csv", [
        {"image_id": i, "keep": int(n != 2), "reason": "unsure" * (n == 2), "classes": 3 + n}
        for n, i in enumerate(test.ids)])
    common.write_description(
        folder / "manifest.json", common.provenance({"data": test.fingerprint, "rule": "image"}, {}), round=1,
        fold=FOLD, folds_csv=folds_of(args, splits), classes=test.classes, paint="area", contaminated=False,
        files={"labels.npy": common.file_hash(folder / "labels.npy")})
    return Namespace(args=args, folder=folder, test=test, splits=splits)


def folds_of(args, splits):
    """Return what a recipe says of the folds in EXP/folds.csv."""
    return common.folds_hash(splits[0].ids, common.load_folds(args.exp, splits[0], args.folds))


def check_labels(pseudo):
    """Return the labels' hashes and whether they break the lineage, as a run asks for them."""
    return train.check_labels(pseudo.args, pseudo.test, folds_of(pseudo.args, pseudo.splits),
                              common.Hashes(pseudo.args.cache))


def check_and_load(pseudo):
    check_labels(pseudo)
    return train.load_labels(pseudo.args, pseudo.test)


def edit(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def test_kept_pseudo_labels_are_learnt_from_and_the_others_left_out(pseudo):
    entries, class_ids = check_and_load(pseudo)
    assert class_ids == [[3], [4], [6]]
    assert [(i, int(label[0, 0])) for _, i, label in entries] == [(0, 3), (1, 4), (3, 6)]
    assert all(split is pseudo.test for split, _, _ in entries)


def test_keep_may_be_edited_by_hand(pseudo):
    first, third = pseudo.test.ids[0], pseudo.test.ids[2]
    edit(pseudo.folder / "index.csv", f"{first},1", f"{first},0")
    edit(pseudo.folder / "index.csv", f"{third},0", f"{third},1")
    assert [i for _, i, _ in check_and_load(pseudo)[0]] == [1, 2, 3]
    edit(pseudo.folder / "index.csv", f"{first},0", f"{first},")  # nobody's decision: the rule's
    edit(pseudo.folder / "index.csv", f"{third},1", f"{third},")
    assert [i for _, i, _ in check_and_load(pseudo)[0]] == [0, 1, 3]
    edit(pseudo.folder / "index.csv", f"{third},", f"{third},yes")
    with pytest.raises(UserError, match="index.csv line .*: keep is yes"):
        check_and_load(pseudo)


@pytest.mark.parametrize(("key", "value"), [
    ("round", 2), ("fold", 0), ("folds_csv", "0123456789abcdef"), ("contaminated", True), ("paint", "id"),
    ("classes", ["Background", "Paper"])])
def test_pseudo_labels_of_another_lineage_are_refused_by_name(pseudo, no_training, key, value):
    path = pseudo.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"manifest.json: {key} is"):
        train.main(pseudo.args)
    lacking = json.loads(path.read_text())
    del lacking[key]
    path.write_text(json.dumps(lacking))
    with pytest.raises(UserError, match=f"manifest.json: {key} is None"):
        train.main(pseudo.args)


@pytest.mark.parametrize(("key", "value", "leak"), [
    ("fold", 0, True), ("round", 2, True), ("folds_csv", "0123456789abcdef", True), ("contaminated", True, True),
    ("paint", "id", False), ("classes", ["Background", "Paper"], False)])
def test_a_leak_must_be_allowed_and_nothing_else_can_be(pseudo, key, value, leak):
    path = pseudo.folder / "manifest.json"
    pseudo.args.allow_leak = True
    assert check_labels(pseudo)[-1] is False
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    if leak:
        assert check_labels(pseudo)[-1] is True
    else:
        with pytest.raises(UserError, match=f"manifest.json: {key} is"):
            check_labels(pseudo)


@pytest.mark.parametrize(("changes", "told"), [
    ({"files": {"labels.npy": "0123"}}, "describes another labels.npy"),
    ({"recipe": {"data": "0ther"}}, ".*of other test photos"), ({"recipe": []}, "doesn't say what made")])
def test_labels_that_are_not_those_described_or_of_other_photos_are_refused(pseudo, changes, told):
    path = pseudo.folder / "manifest.json"
    pseudo.args.allow_leak = True
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=f"manifest.json.* {told}"):
        check_labels(pseudo)


def test_every_score_after_an_allowed_leak_is_marked(pseudo, capsys, tmp_path):
    path = pseudo.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fold": 0}))
    pseudo.args.allow_leak = True
    train.main(pseudo.args)
    run = run_folder(pseudo.args.exp, 1, pseudo.args.model, pseudo.args.scale, FOLD)
    assert re.search(r"v3 0\.\d{4} contaminated", capsys.readouterr().out)
    assert [row["contaminated"] for row in read_csv(run / "log.csv", ("contaminated",))] == ["1"]
    where = ["--data", str(pseudo.args.data), "--cache", str(pseudo.args.cache)]
    infer.main(infer.parse_args([*where, "--checkpoint", str(run / "model.pt"), "--tta", "none"]))
    ensemble.main(ensemble.parse_args(["score", *where, "--tables", str(tmp_path / "tables"), str(run)]))
    assert "CONTAMINATED" in capsys.readouterr().out
    for table in (tmp_path / "tables").iterdir():
        assert {row["contaminated"] for row in read_csv(table, ("contaminated",))} == {"yes"}, table
    args = pseudo_label.parse_args([*where, "--exp", str(tmp_path / "exp"), "--round", "2", "--fold", str(FOLD),
                                    str(run / "test.json"), "--confident", "0.8"])
    pseudo_label.main(args)  # what such a model labels is marked too
    manifest = common.read_json(common.pseudo_folder(tmp_path / "exp", 2, FOLD) / "manifest.json")
    assert manifest["contaminated"] is True


def test_pseudo_labels_made_before_the_folds_were_edited_are_refused(pseudo):
    path = pseudo.args.exp / "folds.csv"
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    common.write_csv(path, [row | {"fold": f" {row['fold']}"} for row in rows[::-1]])
    check_and_load(pseudo)  # the same folds, written in another way
    other = "1" if rows[0]["fold"] == "2" else "2"
    common.write_csv(path, [row | {"fold": other if row["group"] == rows[0]["group"] else row["fold"]} for row in rows])
    with pytest.raises(UserError, match="manifest.json: folds_csv is"):
        check_and_load(pseudo)


@pytest.mark.parametrize("fault", ["missing row", "short labels"])
def test_pseudo_labels_of_other_images_are_refused(pseudo, fault):
    lines = (pseudo.folder / "index.csv").read_text().splitlines()
    if fault == "short labels":
        np.save(pseudo.folder / "labels.npy", np.load(pseudo.folder / "labels.npy")[:-1])
    else:
        (pseudo.folder / "index.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="other images|another labels.npy"):
        check_and_load(pseudo)


@pytest.mark.parametrize("name", ["manifest.json", "labels.npy", "index.csv"])
def test_missing_pseudo_labels_are_refused_by_name(pseudo, no_training, name):
    (pseudo.folder / name).unlink()
    with pytest.raises(UserError, match=name):
        train.main(pseudo.args)


def test_a_run_of_round_1_trains_on_both_and_an_edited_index_makes_it_another_recipe(
        pseudo, monkeypatch, capsys):
    seen, backward = [], train.backward
    monkeypatch.setattr(train, "backward", lambda run, images, masks: (
        seen.append(masks.clone()), backward(run, images, masks))[1])
    train.main(pseudo.args)
    assert "9 labelled and 3 pseudo-labelled images" in capsys.readouterr().out
    masks = torch.cat(seen)
    whole = [int(mask[0, 0]) for mask in masks if (mask == mask[0, 0]).all()]
    assert len(masks) == 12 and {3, 4, 6} <= set(whole)
    edit(pseudo.folder / "index.csv", f"{pseudo.test.ids[0]},1", f"{pseudo.test.ids[0]},0")
    with pytest.raises(UserError, match="pseudo .* -> "):
        train.main(pseudo.args)


def test_the_rare_sampler_draws_also_a_pseudo_label_of_background_alone(pseudo):
    for class_id in (3, 4, 6):  # those that are kept
        edit(pseudo.folder / "index.csv", f",{class_id}\n", ",\n")
    pseudo.args.sampler, pseudo.args.pseudo_ratio = "rare", 1.0
    indices, _ = drawn(pseudo.args, range(10))
    assert {9, 10, 11} <= set(indices)


def test_overfit_learns_no_pseudo_labels(pseudo, splits):
    pseudo.args.overfit = 2
    learn = np.array([3, 5])
    loader, _ = train.make_loaders(pseudo.args, (*splits, []), learn, learn, cuda=False)
    assert [(split is splits[0], i) for split, i, _ in loader.dataset.entries] == [(True, 3), (True, 5)] * 128
