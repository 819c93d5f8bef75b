"""infer.py in-process: what its stores hold, and that a killed prediction carries on to the same bytes."""
import csv
import itertools
import os
import re
import shutil
import signal
import subprocess
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import run_folder, run_until_killed

import common
import infer
import pseudo_label
import train
from common import SUBMIT_SIZE, UserError

torch.set_num_threads(1)  # for nets this small a second thread would only wait for the first
MODEL, SCALE = "unet/tu-test_efficientnet", 96
CLASSES = ["Background", "UNKNOWN", "General trash", "Paper", "Paper pack", "Metal", "Glass", "Plastic", "Styrofoam",
           "Plastic bag", "Battery", "Clothing"]
STORES = ("valid.npy", "valid.json", "test.npy", "test.json")


@pytest.fixture(scope="module")
def trained(tiny_data, cache, tmp_path_factory):
    """The folder of a run with two snapshots whose model.pt has predicted, TTA flip; tests only read it."""
    exp = tmp_path_factory.mktemp("trained")
    train.main(train.parse_args(["--data", str(tiny_data), "--exp", str(exp), "--cache", str(cache), "--model", MODEL,
                                 "--scale", str(SCALE), "--folds", "3", "--epochs", "2", "--weights", "none",
                                 "--fold", "1", "--lr", "1e-2", "--device", "cpu", "--snapshots", "2"]))
    folder = run_folder(exp, 0, MODEL, SCALE, 1)
    infer.main(infer_line(tiny_data, cache, folder))
    assert common.file_hash(folder / "epoch-001.pt") != common.file_hash(folder / "epoch-002.pt")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(trained, tmp_path / "run")


def infer_line(data, cache, folder, *more, files=("model.pt",)):
    return infer.parse_args(["--data", str(data), "--checkpoint", *(str(folder / file) for file in files), "--cache",
                             str(cache), "--device", "cpu", "--batch", "3", *more])


# ---- what a store holds ---------------------------------------------------------------------------------------------


def slow_probs(model, recipe, image, flips):
    """float64 [C, SUBMIT_SIZE, SUBMIT_SIZE] of one photo: the model's answers to its mirror images, averaged."""
    assert recipe["scale"] > max(image.shape[:2])  # a photo that is made smaller is averaged instead
    image = cv2.resize(image, (recipe["scale"],) * 2, interpolation=cv2.INTER_LINEAR) / 255
    image = (image - recipe["mean"]) / recipe["std"]
    views = []
    for axis in flips:
        seen = image if axis is None else np.flip(image, axis)
        with torch.no_grad():
            logits = model(torch.from_numpy(seen.transpose(2, 0, 1)[None].copy()).float())[0].numpy().astype(float)
        exps = np.exp(logits - logits.max(0)).transpose(1, 2, 0)
        probs = exps / exps.sum(2, keepdims=True)
        views.append(probs if axis is None else np.flip(probs, axis))
    resized = [cv2.resize(plane, (SUBMIT_SIZE,) * 2) for plane in np.moveaxis(np.mean(views, 0), 2, 0)]
    return np.stack(resized)


@pytest.mark.parametrize(("tta", "flips"), [("none", [None]), ("flip", [None, 0, 1])])
def test_stores_hold_the_models_probabilities_to_a_255th(tiny_data, cache, splits, run, tta, flips):
    if tta != "flip":
        infer.main(infer_line(tiny_data, cache, run, "--tta", tta))
    loaded = common.load_model(run / "model.pt")
    for name, split in zip(("valid", "test"), splits, strict=True):
        store, info = common.open_store(run / f"{name}.json", common.Hashes(cache))
        assert info["tta"] == tta
        for stored, image_id in zip(store, info["image_ids"], strict=True):
            expected = slow_probs(loaded.model, loaded.recipe, split.image(split.ids.index(image_id)), flips)
            assert abs(stored / 255 - expected).max() <= 0.51 / 255


def test_flipping_changes_the_store_and_not_its_shape(tiny_data, cache, run):
    before = np.load(run / "test.npy")
    infer.main(infer_line(tiny_data, cache, run, "--tta", "none", "--split", "test"))
    after = np.load(run / "test.npy")
    assert after.shape == before.shape == (4, 12, SUBMIT_SIZE, SUBMIT_SIZE) and (after != before).mean() > 0.01


def test_images_stand_in_the_order_of_the_jsons_and_validation_is_the_held_out_fold(trained, splits):
    with open(trained.parents[4] / "folds.csv", newline="") as f:
        held_out = [int(row["image_id"]) for row in csv.DictReader(f) if row["fold"] == "1"]
    assert common.read_json(trained / "valid.json")["image_ids"] == held_out
    assert common.read_json(trained / "test.json")["image_ids"] == splits[1].ids


def test_a_stores_json_says_what_made_it(trained, splits):
    state, folds = torch.load(trained / "model.pt"), common.load_folds(trained.parents[4], splits[0], 3)
    checkpoint = common.file_hash(trained / "model.pt")
    for name, split in zip(("valid", "test"), splits, strict=True):
        info = common.read_json(trained / f"{name}.json")
        del info["image_ids"]
        code = info.pop("code")
        assert {"predict_split", "predict_probs", "read_image", "TTA[flip]", "DECODERS[unet]"} <= {*code}
        assert not {"TTA", "DECODERS", "train_one_epoch", "soft_vote", "train_run"} & code.keys()
        assert (trained.parents[4] / "code" / info.pop("state") / "infer.py").is_file()
        assert info == {
            "recipe": {"tta": "flip", "tta_scales": [1.0], "scale": None, "split": name, "checkpoints": [checkpoint],
                       "data": split.fingerprint},
            "run": {key: state[key] for key in ("recipe", "code", "state", "commit", "kept_under")} | {
                "codes": [common.short_hash(state["code"])]},
            "commit": common.git_commit(), "versions": common.library_versions(), "kept_under": [],
            "files": {f"{name}.npy": common.file_hash(trained / f"{name}.npy")},
            "classes": CLASSES, "split": name, "tta": "flip", "unreadable": [],
            "checkpoints": [{"file": "model.pt", "hash": checkpoint, "epoch": state["epoch"]}],
            "data": split.fingerprint, "model": MODEL, "scale": SCALE, "round": 0, "fold": 1,
            "folds_csv": common.folds_hash(splits[0].ids, folds), "seed": 0, "paint": "area",
            "orientation": "shown", "unused": "keep", "contaminated": False}


def test_the_batch_size_changes_the_store_by_rounding_alone(tiny_data, cache, run):
    before = np.load(run / "valid.npy").astype(int)
    infer.main(infer_line(tiny_data, cache, run, "--split", "valid", "--batch", "1"))
    assert abs(np.load(run / "valid.npy") - before).max() <= 1


def change_checkpoint(path, **changes):
    common.save_checkpoint(path, **torch.load(path) | changes)


@pytest.mark.parametrize("classes", [CLASSES[:-1] + ["Clothes"], [CLASSES[0], *CLASSES[:0:-1]]])
def test_data_of_other_classes_is_refused(tiny_data, cache, run, classes):
    change_checkpoint(run / "model.pt", classes=classes)
    with pytest.raises(UserError, match="model.pt knows the classes"):
        infer.main(infer_line(tiny_data, cache, run))


def test_validation_images_that_the_data_does_not_have_are_refused_by_id(tiny_data, cache, run):
    change_checkpoint(run / "model.pt", valid_ids=[*torch.load(run / "model.pt")["valid_ids"], 999_999])
    with pytest.raises(UserError, match="1 images that DATA doesn't have.*999999"):
        infer.main(infer_line(tiny_data, cache, run))


def test_a_failed_prediction_leaves_no_description_of_a_store_it_did_not_write(
        tiny_data, cache, run, monkeypatch):
    replace, calls = common.os.replace, []

    def stop_at_the_json(source, target):
        calls.append(str(target.relative_to(run)))
        if target == run / "test.json":
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(common.os, "replace", stop_at_the_json)
    with pytest.raises(KeyboardInterrupt):
        infer.main(infer_line(tiny_data, cache, run, "--split", "test", "--tta", "none"))
    assert [call.partition(".parts/")[2][-6:] or call for call in calls] == [
        "000000", "000003", "replaced/test.json", "replaced/test.npy", "test.npy", "test.json"]
    with pytest.raises(UserError, match="test.json"):
        common.open_store(run / "test.json", common.Hashes(cache))


# ---- several epochs of a run ----------------------------------------------------------------------------------------

EPOCHS = ("epoch-001.pt", "epoch-002.pt")


def test_two_epochs_predict_the_mean_of_what_each_predicts(tiny_data, cache, run):
    stores = []
    for files in (EPOCHS[:1], EPOCHS[1:], EPOCHS):
        infer.main(infer_line(tiny_data, cache, run, files=files))
        stores.append([np.load(run / f"{split}.npy").astype(float) for split in ("valid", "test")])
    for first, second, both in zip(*stores, strict=True):
        assert abs(both - (first + second) / 2).max() <= 1  # each is rounded by up to a half
        assert abs(first - second).max() > 5
    assert common.read_json(run / "test.json")["checkpoints"] == [
        {"file": file, "hash": common.file_hash(run / file), "epoch": n} for n, file in enumerate(EPOCHS, 1)]


def test_the_mean_over_models_is_taken_over_probabilities_and_every_view():
    models = [torch.nn.Conv2d(3, 4, 3, padding=1) for _ in range(3)]
    images = 5 * torch.randn(2, 3, 6, 6)
    single = [common.predict_probs([model], images, common.tta_views("d4")) for model in models]
    torch.testing.assert_close(common.predict_probs(models, images, common.tta_views("d4")), sum(single) / 3)
    assert (single[0] - single[1]).abs().max() > 0.1


@pytest.mark.parametrize("other", [{"seed": 1}, {"fold": 2}, {"data": "another"}])
def test_checkpoints_of_different_runs_are_refused_in_one_line(tiny_data, cache, run, no_prediction, other):
    before = {name: (run / name).read_bytes() for name in STORES}
    change_checkpoint(run / EPOCHS[1], recipe=torch.load(run / EPOCHS[1])["recipe"] | other)
    with pytest.raises(UserError, match="epoch-002.pt and .*epoch-001.pt are of different runs") as refusal:
        infer.main(infer_line(tiny_data, cache, run, files=EPOCHS))
    assert "\n" not in str(refusal.value)
    assert {name: (run / name).read_bytes() for name in STORES} == before


@pytest.mark.parametrize("files", [["nosuch.pt"], ["epoch-*.pt"], ["epoch-001.pt", "nosuch.pt"]])
def test_a_checkpoint_that_is_not_there_is_one_line(tiny_data, cache, run, no_prediction, files):
    with pytest.raises(UserError, match="no such checkpoint") as refusal:
        infer.main(infer_line(tiny_data, cache, run, files=files))
    assert str(run / files[-1]) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_folder_that_is_not_there_is_not_made(tiny_data, cache, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        infer.main(infer_line(tiny_data, cache, tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_too_little_memory_is_one_line(tiny_data, cache, fresh, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(infer, "predict_probs", fail)
    with pytest.raises(SystemExit):
        common.run_script(infer.main, infer_line(tiny_data, cache, fresh))
    assert capsys.readouterr().err.startswith("out of GPU memory: CUDA out of memory.; lower --batch (make: BATCH, ")


# ---- carries on or does nothing -------------------------------------------------------------------------------------


@pytest.fixture
def no_prediction(monkeypatch):
    """Any attempt to predict fails the test."""
    monkeypatch.setattr(infer, "predict_probs", lambda *_: pytest.fail("prediction began"))


@pytest.fixture
def predicted(monkeypatch):
    """The number of photos in every batch that is predicted: a GPU prepares itself for one size, so all have that."""
    batches, sizes, predict_probs = [], set(), infer.predict_probs

    def n_photos(images):
        sizes.add(len(images))
        assert len(sizes) == 1  # the last ones of a split are filled up
        return len(images.unique(dim=0))
    monkeypatch.setattr(infer, "predict_probs", lambda models, images, *how: (
        batches.append(n_photos(images)), predict_probs(models, images, *how))[1])
    return batches


@pytest.fixture
def fresh(trained, tmp_path):
    """A copy of the trained folder without its stores."""
    return shutil.copytree(trained, tmp_path / "fresh", ignore=shutil.ignore_patterns("*.npy", *STORES, ".*"))


def parts(folder):
    """Names of the batches kept, by the folder that they are in."""
    return {path.name: sorted(p.name for p in path.glob("*/*")) for path in folder.glob(".*.parts")}


def assert_same_stores(folder, expected):
    """The same bytes, and nothing else is left of a prediction."""
    for name in STORES:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert parts(folder) == {} and not list(folder.rglob("*.tmp"))


# 5 images of valid and 4 of test in batches of 3: four calls
@pytest.mark.parametrize(("name", "call", "kept", "left"), [
    ("predict_probs", 1, {}, [3, 2, 3, 1]),
    ("predict_probs", 2, {}, [3, 2, 3, 1]),  # a batch is written after the next one is predicted
    ("atomic_write", 2, {".valid.parts": ["000000"]}, [2, 3, 1]),  # the second batch was predicted but not written
    ("atomic_write", 3, {".valid.parts": ["000000", "000003"]}, [3, 1]),  # as the store is begun
    ("write_npy_header", 1, {".valid.parts": ["000000", "000003"]}, [3, 1]),
    ("write_store", 1, {".valid.parts": ["000000", "000003"]}, [3, 1]),  # the .npy stands without its .json
    ("predict_probs", 3, {}, [3, 1]),
    ("predict_probs", 4, {}, [3, 1]),
    ("atomic_write", 5, {".test.parts": ["000000"]}, [1]),
    ("write_store", 2, {".test.parts": ["000000", "000003"]}, [])])
def test_a_killed_prediction_carries_on_to_the_same_bytes_with_the_missing_batches_alone(
        tiny_data, cache, trained, fresh, predicted, name, call, kept, left):
    args = infer_line(tiny_data, cache, fresh)
    run_until_killed(infer, args, name, call)
    assert {folder: files for folder, files in parts(fresh).items() if files} == kept
    infer.main(args)
    assert predicted == left
    assert_same_stores(fresh, trained)


def test_the_device_decides_how_many_loader_processes_there_are_and_the_bytes_are_the_same(
        tiny_data, cache, trained, fresh, monkeypatch):
    asked = []
    monkeypatch.setattr(infer, "loader_workers", lambda *given: asked.append(given) or 1)
    infer.main(infer_line(tiny_data, cache, fresh))
    assert asked == [(None, False)] * 2
    assert_same_stores(fresh, trained)


def test_batches_of_a_store_that_was_finished_as_the_process_was_killed_are_removed(
        tiny_data, cache, trained, fresh, predicted, monkeypatch):
    args = infer_line(tiny_data, cache, fresh, "--split", "valid")

    def interrupted(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(infer.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            infer.main(args)
    assert parts(fresh) == {".valid.parts": ["000000", "000003"]}
    infer.main(infer_line(tiny_data, cache, fresh))
    assert predicted == [3, 2, 3, 1]
    assert_same_stores(fresh, trained)


@pytest.mark.parametrize("stale", [["--tta", "none"], ["--batch", "2"], ["--split", "test", "--tta", "d4"]],
                         ids=" ".join)
def test_batches_of_another_prediction_are_not_used_and_are_gone_at_the_end(
        tiny_data, cache, trained, fresh, predicted, stale):
    run_until_killed(infer, infer_line(tiny_data, cache, fresh, *stale), "atomic_write", 2)
    assert sum(map(len, parts(fresh).values())) == 1
    infer.main(infer_line(tiny_data, cache, fresh))
    assert predicted == [3, 2, 3, 1]
    assert_same_stores(fresh, trained)


def test_batches_of_other_weights_are_not_used(tiny_data, cache, trained, fresh, predicted):
    shutil.copy(fresh / "model.pt", fresh / "kept.pt")
    shutil.copy(fresh / "epoch-001.pt", fresh / "model.pt")
    if common.file_hash(fresh / "kept.pt") == common.file_hash(fresh / "model.pt"):
        shutil.copy(fresh / "epoch-002.pt", fresh / "model.pt")
    run_until_killed(infer, infer_line(tiny_data, cache, fresh), "atomic_write", 2)
    assert sum(map(len, parts(fresh).values())) == 1
    shutil.move(fresh / "kept.pt", fresh / "model.pt")
    infer.main(infer_line(tiny_data, cache, fresh))
    assert predicted == [3, 2, 3, 1]
    assert_same_stores(fresh, trained)


def test_the_same_line_again_does_nothing(tiny_data, cache, trained, run, no_prediction, capsys):
    for name in STORES:
        os.utime(run / name, (1e9, 1e9))
    infer.main(infer_line(tiny_data, cache, run))
    assert capsys.readouterr().out.count("nothing to do") == 2
    for name in STORES:  # times play no part
        assert (run / name).read_bytes() == (trained / name).read_bytes() and (run / name).stat().st_mtime == 1e9


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def edit(path):
    text = path.read_text()
    assert text.count('"flip"') == 2  # in its recipe and beside it
    path.write_text(text.replace('"flip"', '"none"'))


DAMAGES = {
    "valid.npy cut": ("valid.npy", cut), "valid.npy empty": ("valid.npy", lambda path: path.write_bytes(b"")),
    "valid.npy text": ("valid.npy", lambda path: path.write_text("what?")),
    "valid.npy gone": ("valid.npy", lambda path: path.unlink()),
    "valid.npy of fewer images": ("valid.npy", lambda path: np.save(path, np.load(path)[:-1])),
    "valid.npy of another value": ("valid.npy", lambda path: np.save(path, np.load(path) ^ np.uint8(1))),
    "valid.json changed": ("valid.json", edit), "valid.json cut": ("valid.json", cut),
    "valid.json a list": ("valid.json", lambda path: path.write_text("[]")),
    "valid.json gone": ("valid.json", lambda path: path.unlink())}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_made_anew_and_the_whole_one_left(tiny_data, cache, trained, run, predicted, damage):
    name, change = DAMAGES[damage]
    change(run / name)
    if damage == "valid.json cut":  # of its line end alone: still the same JSON
        cut(run / name)
    infer.main(infer_line(tiny_data, cache, run))
    assert predicted == [3, 2]
    assert_same_stores(run, trained)


def test_a_store_that_is_replaced_stands_aside(tiny_data, cache, trained, run, capsys):
    infer.main(infer_line(tiny_data, cache, run, "--tta", "none", "--split", "test"))
    said = capsys.readouterr().out
    assert f"{run}/test.npy is replaced: tta flip -> none\n" in said
    assert f"{run}/replaced: test.json, test.npy of before\n" in said
    assert {path.name: path.read_bytes() for path in (run / "replaced").iterdir()} == {
        name: (trained / name).read_bytes() for name in ("test.json", "test.npy")}
    assert common.read_json(run / "test.json")["tta"] == "none"
    assert all((run / name).read_bytes() == (trained / name).read_bytes() for name in ("valid.npy", "valid.json"))
    other = np.load(run / "test.npy")
    infer.main(infer_line(tiny_data, cache, run))  # and in turn
    assert (np.load(run / "replaced/test.npy") == other).all()
    assert_same_stores(run, trained)


def test_other_scales_make_another_store_whose_name_has_them(tiny_data, cache, run, capsys):
    infer.main(infer_line(tiny_data, cache, run, "--tta-scales", "1", "0.5", "--split", "test"))
    assert f"{run}/test.npy is replaced: tta_scales [1.0] -> [1.0, 0.5]\n" in capsys.readouterr().out
    info = common.read_json(run / "test.json")
    assert (info["tta"], info["recipe"]["tta"], info["recipe"]["tta_scales"]) == ("flip x 1,0.5", "flip", [1.0, 0.5])


def test_a_size_that_the_model_cannot_take_is_told_before_prediction(tiny_data, cache, run, predicted):
    name = "pan/tu-test_efficientnet"
    checkpoint = common.load_checkpoint(run / "model.pt")
    checkpoint["recipe"] |= {"model": name, "scale": 128}
    checkpoint["model"] = common.build_model(name, len(checkpoint["classes"])).state_dict()
    common.save_checkpoint(run / "model.pt", **checkpoint)
    reason = re.escape(f"{name} can't work at scale 64 (--tta-scales times 128): ")
    with pytest.raises(UserError, match=f"^{reason}[^\n]+$"):
        infer.main(infer_line(tiny_data, cache, run, "--tta-scales", "1", "0.5"))
    assert predicted == []


def test_shared_memory_must_have_room_for_the_batches_of_prediction(tiny_data, cache, fresh, predicted, monkeypatch):
    monkeypatch.setattr(infer, "check_space", lambda *_: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="^/dev/shm: 1 loader processes want [0-9,]+ bytes there"):
        infer.main(infer_line(tiny_data, cache, fresh, "--workers", "1"))
    assert predicted == []


def killed_at_rename(args, call):
    """infer.main(args) in a process that SIGKILL ends at this call of os.replace, from 1 on."""
    def run(args):
        replace, calls = common.os.replace, itertools.count(1)
        common.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == call \
            else replace(*paths)
        infer.main(args)
    process = get_context("fork").Process(target=run, args=[args])
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("older", [False, True])  # whether stores of a time before stand aside already
@pytest.mark.parametrize("call", [2, 3, 4, 5])  # of the old .json and .npy, the new .npy and .json
def test_killed_between_any_two_renames_a_replacement_loses_no_store(
        tiny_data, cache, trained, run, tmp_path, call, older):
    if older:
        infer.main(infer_line(tiny_data, cache, run, "--tta", "none", "--split", "test"))
        infer.main(infer_line(tiny_data, cache, run, "--split", "test"))
    args = infer_line(tiny_data, cache, run, "--tta", "d4", "--split", "test", "--batch", "4")
    killed_at_rename(args, call)
    infer.main(args)
    assert common.read_json(run / "test.json")["tta"] == "d4"
    common.open_store(run / "test.json", common.Hashes(cache))
    aside = {path.name: path.read_bytes() for path in (run / "replaced").iterdir()}
    assert aside == {name: (trained / name).read_bytes() for name in ("test.json", "test.npy")}


def test_a_folder_in_which_another_process_predicts_is_refused(tiny_data, cache, run, no_prediction):
    with common.lock(run), pytest.raises(UserError, match="in use"):
        infer.main(infer_line(tiny_data, cache, run))


# ---- test photos that can't be read -----------------------------------------------------------------------------


@pytest.fixture
def photos(tiny_data, tmp_path):
    """A copy of the data to break: (folder, test.json's photos)."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    return data, [data / image["file_name"] for image in common.read_json(data / "test.json")["images"]]


def test_an_unreadable_test_photo_is_background_in_the_store_and_the_others_are_predicted(
        tiny_data, photos, cache, trained, run, splits):
    data, paths = photos
    paths[1].write_bytes(paths[1].read_bytes()[:700])
    infer.main(infer_line(data, cache, run, "--split", "test", "--replace"))
    info, store, sound = common.read_json(run / "test.json"), np.load(run / "test.npy"), np.load(trained / "test.npy")
    assert info["unreadable"] == [splits[1].ids[1]] and info["image_ids"] == splits[1].ids
    assert (store[1, 0] == 255).all() and not store[1, 1:].any()
    assert np.abs(store[[0, 2, 3]].astype(int) - sound[[0, 2, 3]]).max() <= 1
    shutil.copy(tiny_data / splits[1].file_names[1], paths[1])
    infer.main(infer_line(data, cache, run, "--split", "test", "--replace"))
    assert_same_stores(run, trained)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_photo_that_breaks_while_others_are_predicted_is_one_line_and_the_same_line_again_carries_on(
        photos, cache, fresh, splits, monkeypatch, capsys, workers):
    data, paths = photos
    load = infer.load_data

    def load_and_break(*args, **settings):
        sets = load(*args, **settings)
        paths[3].unlink()
        return sets
    line = infer_line(data, cache, fresh, "--split", "test", "--workers", workers, "--tta", "none")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as refusal:
        patch.setattr(infer, "load_data", load_and_break)
        common.run_script(infer.main, line)
    said = capsys.readouterr().err
    assert refusal.value.code == 1 and said.count("\n") == 1
    assert splits[1].file_names[3] in said and "is missing" in said
    infer.main(line)
    assert common.read_json(fresh / "test.json")["unreadable"] == [splits[1].ids[3]]


# ---- other photos -------------------------------------------------------------------------------------------------


def test_other_photos_are_refused_without_a_folder_of_their_own_and_predicted_into_it(
        photos, cache, trained, run, splits, predicted, tmp_path):
    data, paths = photos
    cv2.imwrite(str(paths[2]), cv2.imread(str(paths[2]))[::-1])
    before = {name: (run / name).read_bytes() for name in STORES}
    with pytest.raises(UserError) as refusal:
        infer.main(infer_line(data, cache, run))
    said = str(refusal.value)
    assert said.startswith(f"{run}/test.npy is of other photos than {data} has") and "\n" not in said
    assert "--out FOLDER" in said and "--replace" in said and predicted == []
    out = tmp_path / "elsewhere"
    line = infer_line(data, cache, run, "--out", str(out))
    infer.main(line)
    assert predicted == [3, 2, 3, 1]
    assert {name: (run / name).read_bytes() for name in STORES} == before and not (run / "replaced").exists()
    assert (out / "valid.npy").read_bytes() == before["valid.npy"]  # the training photos are the same
    store, info = common.open_store(out / "test.json", common.Hashes(cache))
    assert info["image_ids"] == splits[1].ids and info["data"] != splits[1].fingerprint
    differ = np.abs(store.astype(int) - np.load(run / "test.npy")).max((1, 2, 3))
    assert differ[2] > 1 and (differ[[0, 1, 3]] <= 1).all()
    infer.main(line)
    assert predicted == [3, 2, 3, 1]  # it is done


def test_other_photos_replace_the_stores_when_asked_and_these_stand_aside(photos, cache, trained, run, splits):
    data, paths = photos
    cv2.imwrite(str(paths[2]), cv2.imread(str(paths[2]))[::-1])
    infer.main(infer_line(data, cache, run, "--replace"))
    assert common.read_json(run / "test.json")["data"] != splits[1].fingerprint
    assert {path.name: path.read_bytes() for path in (run / "replaced").iterdir()} == {
        name: (trained / name).read_bytes() for name in ("test.json", "test.npy")}


def test_nothing_is_written_into_the_folder_of_the_photos(photos, cache, run, no_prediction):
    data, _ = photos
    before = sorted(data.rglob("*"))
    with pytest.raises(UserError, match="lies in DATA"):
        infer.main(infer_line(data, cache, run, "--out", str(data / "probs")))
    assert sorted(data.rglob("*")) == before


# ---- what a store may not be ----------------------------------------------------------------------------------------


def test_a_store_in_the_folder_of_another_run_is_refused_by_name(cache, trained, tmp_path):
    for fold in (1, 2):
        folder = run_folder(tmp_path, 0, MODEL, SCALE, fold)
        folder.mkdir(parents=True)
        for name in ("test.json", "test.npy"):
            shutil.copy(trained / name, folder)
    common.open_store(run_folder(tmp_path, 0, MODEL, SCALE, 1) / "test.json", common.Hashes(cache))
    with pytest.raises(UserError, match="f2/test.json is of round 0, .*, fold 1: it was moved or copied"):
        common.open_store(run_folder(tmp_path, 0, MODEL, SCALE, 2) / "test.json", common.Hashes(cache))


def test_a_store_whose_checksum_is_another_is_refused_also_when_size_and_time_are_the_same(cache, run):
    path, hashes = run / "test.npy", common.Hashes(cache)
    common.open_store(run / "test.json", hashes)
    times = path.stat()
    np.save(path, np.load(path) ^ np.uint8(1))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    for known in (hashes, common.Hashes(cache)):
        with pytest.raises(UserError, match="test.json: the .npy has another checksum"):
            common.open_store(run / "test.json", known)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [
    ["--data", "d", "--checkpoint", "m.pt", "--tt", "none"],
    ["--data", "d", "--checkpoint", "m.pt", "--tta", "nosuch"],
    ["--data", "d", "--checkpoint", "m.pt", "--split", "train"],
    ["--data", "d", "--checkpoint"],
    ["--data", "d"]])
def test_misspelt_abbreviated_and_foreign_arguments_are_refused(line):
    with pytest.raises(SystemExit) as refusal:
        infer.parse_args(line)
    assert refusal.value.code == 2


@pytest.mark.parametrize("script", [infer, pseudo_label])
def test_each_command_in_a_scripts_docstring_can_be_pasted_from_the_file_as_one_command(script):
    text = Path(script.__file__).read_text()
    commands = re.findall(r"^    python (?:.*\\\n)*.*$", text, re.M)
    assert len(commands) == (3 if script is infer else 1)
    for command in commands:
        print_words = 'python() { printf "%s\\n" "$@"; }\n'
        done = subprocess.run(["bash", "-ec", print_words + command], capture_output=True, text=True)
        name, *words = done.stdout.splitlines()
        assert done.returncode == 0 and done.stderr == "" and name == f"{script.__name__}.py"
        assert words[-1].endswith(("model.pt", "valid.json", "vote.json"))
        script.parse_args(words)


@pytest.mark.parametrize(("folder", "exp"), [
    ("out/main/r1/unet/a/s64/f0", "out/main"), ("out/main/r1/unet/a/s64/f0/more", None), ("elsewhere", None)])
def test_a_runs_folder_tells_its_experiment_and_any_other_is_its_own(tmp_path, folder, exp):
    assert infer.experiment_folder(tmp_path / folder) == tmp_path / (exp or folder)


def test_photos_are_read_as_the_checkpoint_says(tmp_path, monkeypatch):
    def refuse(data, cache, **settings):
        raise UserError(" ".join(settings.values()))

    monkeypatch.setattr(infer, "load_data", refuse)
    args = SimpleNamespace(checkpoint=[tmp_path / "model.pt"], data=tmp_path, cache=tmp_path)
    recipe = dict.fromkeys(common.FROM_RECIPE) | {"paint": "id", "orientation": "stored", "unused": "drop"}
    with pytest.raises(UserError, match="^id stored drop$"):
        infer.load_photos(args, SimpleNamespace(recipe=recipe, checkpoint={}))
    del recipe["orientation"]  # as an older train.py wrote it
    with pytest.raises(UserError, match="model.pt: its recipe lacks orientation: .*train it again"):
        infer.load_photos(args, SimpleNamespace(recipe=recipe, checkpoint={}))
