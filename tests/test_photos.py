"""infer.py --photos in-process: the masks, overlays and areas of any folder of photos, by checkpoints or by a vote."""
import csv
import errno
import json
import os
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import run_folder, run_until_killed
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

import common
import ensemble
import infer
import train
from common import SUBMIT_SIZE, UserError

torch.set_num_threads(1)  # for nets this small a second thread would only wait for the first
SMALL, LARGE = ("fpn-narrow/tu-test_efficientnet", 64), ("unet/tu-test_efficientnet", 96)
PHOTOS = {"beach/one.jpg": (60, 90), "beach/deep/two.png": (97, 33), "three.WEBP": (300, 200), "grey.tif": (50, 50)}


@pytest.fixture(scope="module")
def exp(tiny_data, cache, tmp_path_factory):
    """An experiment of two members, a small and a large one, with two folds each, and their stores; for reading."""
    exp = tmp_path_factory.mktemp("exp")
    for model, scale in (SMALL, LARGE):
        for fold in ("0", "1"):
            train.main(train.parse_args(["--data", str(tiny_data), "--exp", str(exp), "--cache", str(cache), "--model",
                                         model, "--scale", str(scale), "--folds", "2", "--fold", fold, "--epochs", "2",
                                         "--weights", "none", "--lr", "1e-2", "--device", "cpu", "--batch", "4"]))
            run = run_folder(exp, 0, model, scale, fold)
            infer.main(infer.parse_args(["--data", str(tiny_data), "--checkpoint", str(run / "model.pt"), "--cache",
                                         str(cache), "--device", "cpu", "--tta", "none" if scale == 96 else "flip"]))
    return exp


@pytest.fixture(scope="module")
def vote_json(tiny_data, cache, exp):
    """The vote of a submission by given weights, 3 to 1."""
    runs = [str(run_folder(exp, 0, *member, fold)) for member in (SMALL, LARGE) for fold in (0, 1)]
    ensemble.main(ensemble.parse_args(["soft", "--data", str(tiny_data), "--cache", str(cache), "--weights", "3,1",
                                       "--out", str(exp / "submission.csv"), *runs]))
    return exp / "submission.vote.json"


def model_of(exp, member, fold=0):
    return run_folder(exp, 0, *member, fold) / "model.pt"


def write_photo(path, height, width, seed):
    """Write blocks of colour, which a model finds something in; a JPEG is stored lying on its side."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(cv2.resize(blocks, (width, height), interpolation=cv2.INTER_CUBIC))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        image = image.convert("L")
    exif = Image.Exif()
    if path.suffix == ".jpg":
        exif[0x0112] = 6  # a quarter turn
        image = image.transpose(Image.Transpose.ROTATE_90)
    image.save(path, exif=exif)


@pytest.fixture
def photos(tmp_path):
    """A folder of photos of all kinds at several depths."""
    folder = tmp_path / "my photos"
    for seed, (name, size) in enumerate(PHOTOS.items()):
        write_photo(folder / name, *size, seed)
    return folder


@pytest.fixture
def line(cache, exp, photos, tmp_path):
    """Return a function (more arguments, checkpoints) -> parsed arguments; it writes to tmp_path/out."""
    def parse(*more, voters=None):
        voters = voters or ("--checkpoint", model_of(exp, SMALL))
        return infer.parse_args(["--photos", str(photos), "--out", str(tmp_path / "out"), "--cache", str(cache),
                                 "--device", "cpu", "--batch", "3", *map(str, voters), *map(str, more)])
    return parse


@pytest.fixture
def predicted(monkeypatch):
    """The names of the photos of every batch that is predicted."""
    names, predict = [], infer.predict_batch
    monkeypatch.setattr(infer, "predict_batch", lambda voters, recipe, photos, *more: (
        names.extend(photo.name for photo in photos), predict(voters, recipe, photos, *more))[1])
    return names


def shown(path):
    """uint8 RGB [H, W, 3] of a photo as a viewer shows it."""
    return np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def mask_of(out, name):
    return np.array(Image.open((out / "masks" / name).with_suffix(".png")))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not {".lock", "code"} & {*path.relative_to(folder).parts}}


def results(out):
    """What was predicted, without the JSON, which has the command's code and versions."""
    return {name: content for name, content in contents(out).items() if name != "made.json"}


# ---- masks, overlays, areas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_a_mask_has_the_likeliest_classes_in_the_size_of_the_photo_as_it_is_shown(line, exp, photos, tmp_path, tta):
    infer.main(line("--tta", tta))
    trained = common.load_model(model_of(exp, SMALL))
    for name, size in PHOTOS.items():
        image = shown(photos / name)
        expected = common.predict_photo(trained, image, tta).argmax(0)
        with Image.open((tmp_path / "out/masks" / name).with_suffix(".png")) as mask:
            assert mask.mode == "P" and mask.size == size[::-1] and image.shape[:2] == size
            assert mask.getpalette() == common.COLOURS.ravel().tolist()
            assert (np.array(mask) != expected).mean() < 1e-3  # where two classes are equally likely
        assert len(np.unique(expected)) > 1
        assert Image.open((tmp_path / "out/overlays" / name).with_suffix(".jpg")).size == size[::-1]
    with open(tmp_path / "out/areas.csv", newline="") as f:
        rows = {row["file"]: row for row in csv.DictReader(f)}
    assert rows.keys() == PHOTOS.keys()
    for name, (height, width) in PHOTOS.items():
        mask, row = mask_of(tmp_path / "out", name), rows[name]
        assert (row["height"], row["width"]) == (str(height), str(width))
        for class_id, each in enumerate(trained.classes):
            assert float(row[f"share of {each}"]) == pytest.approx((mask == class_id).mean(), abs=1e-6)
    assert len(rows["grey.tif"]) == 3 + len(trained.classes)


def test_models_of_different_scales_are_averaged_over_probabilities(line, exp, photos, tmp_path):
    write_photo(photos / "square.png", 96, 96, 9)
    voters = ["--checkpoint", model_of(exp, SMALL), model_of(exp, LARGE), model_of(exp, LARGE, 1)]
    infer.main(line("--tta", "none", voters=voters))
    models = [common.load_model(path) for path in voters[1:]]
    probs = [common.predict_photo(model, shown(photos / "square.png"), "none") for model in models]
    mask = mask_of(tmp_path / "out", "square.png")
    assert (mask != np.mean(probs, 0).argmax(0)).mean() < 1e-3
    assert min((mask != each.argmax(0)).mean() for each in probs) > 0.01


def test_an_overlay_is_a_small_picture_of_a_large_photo(line, photos, tmp_path):
    write_photo(photos / "large.png", 700, 2100, 1)
    write_photo(photos / "line.png", 1, 1500, 2)
    infer.main(line("--tta", "none"))
    assert Image.open(tmp_path / "out/overlays/large.jpg").size == (1024, 341)
    assert Image.open(tmp_path / "out/overlays/line.jpg").size == (1024, 1)
    mask, picture = mask_of(tmp_path / "out", "large.png"), np.array(Image.open(tmp_path / "out/overlays/large.jpg"))
    colours = common.overlay(shown(photos / "large.png"), mask, size=(1024, 341))
    assert mask.shape == (700, 2100) and abs(picture.astype(int) - colours).mean() < 3


@pytest.mark.parametrize("size", [(1, 1), (37, 61), (64, 64), (301, 97)])
def test_the_likeliest_class_is_that_of_all_probabilities_brought_to_the_size(size):
    probs = torch.rand(5, 64, 64).softmax(0)
    expected = interpolate(probs[None], size, mode="bilinear")[0].argmax(0).numpy()
    pred = infer.likeliest_classes(probs.numpy(), size)
    assert pred.shape == size and pred.dtype == np.uint8 and (pred != expected).mean() < 1e-3
    ties = np.full((3, 2, 2), 1 / 3, np.float32)
    assert infer.likeliest_classes(ties, (4, 4)).max() == 0  # of equals the first, as argmax


# ---- the vote of a submission ---------------------------------------------------------------------------------------


def submitted(path):
    csv.field_size_limit(10 ** 7)
    with open(path, newline="") as f:
        return {row[0]: np.array(row[1].split(), np.uint8).reshape(SUBMIT_SIZE, SUBMIT_SIZE)
                for row in list(csv.reader(f))[1:]}


def test_a_vote_makes_of_the_test_photos_the_masks_of_the_submission(line, tiny_data, exp, vote_json, splits, tmp_path):
    said = json.loads(vote_json.read_text())
    assert [(run["folder"], run["weight"], run["settings"]["tta"]) for run in said["runs"]] == [
        (f"r0/{model}/s{scale}/f{fold}", weight, tta) for model, scale, weight, tta in (
            (*SMALL, 1 / 2, "flip"), (*LARGE, 1 / 6, "none")) for fold in (0, 1)]
    assert common.read_json(exp / "submission.made.json")["files"][vote_json.name] == common.file_hash(vote_json)
    infer.main(line("--photos", tiny_data, "--batch", 2, voters=("--vote", vote_json)))
    test, masks = splits[1], submitted(exp / "submission.csv")
    assert len({mask.tobytes() for mask in masks.values()}) == len(test.ids) == 4
    for image_id, name in zip(test.ids, test.file_names, strict=True):
        expected = masks[str(image_id)][2::4, 2::4]  # of 256 pixels to 64: the exact nearest of each centre
        pred = mask_of(tmp_path / "out", name)
        assert pred.shape == (64, 64) and (pred != expected).mean() < 2e-3  # batches differ in rounding


def test_least_share_and_steps_are_applied_at_the_size_that_they_were_fitted_at(line, exp, vote_json, photos, tmp_path):
    """What is kept and removed follows from the 256 x 256 masks by hand; the photo's size plays no part."""
    said, name = json.loads(vote_json.read_text()), "three.WEBP"
    run = said["runs"][0] | {"weight": 1.0, "folder": str(exp / said["runs"][0]["folder"])}
    plain, cut, least = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    common.write_json(plain, said | {"runs": [run], "least share": 0.0, "steps": {}})
    infer.main(line(voters=("--vote", plain)))
    trained = common.load_model(model_of(exp, SMALL))
    probs = torch.from_numpy(common.predict_photo(trained, shown(photos / name), "flip"))
    before = mask_of(tmp_path / "out", name)
    at_256 = common.resize_probs(probs[None])[0].argmax(0).numpy()
    rows, columns = ((2 * np.arange(n) + 1) * 256 // (2 * n) for n in before.shape)  # the nearest centre
    assert (before != at_256[rows][:, columns]).mean() < 0.02  # of a photo that was resized twice
    sizes = {class_id: (at_256 == class_id).sum() for class_id in np.unique(before) if class_id}
    smallest, largest = (choose(sizes, key=sizes.get) for choose in (min, max))
    assert len(sizes) > 1 and sizes[largest] > 2 * sizes[smallest]
    areas = [0.0] * len(trained.classes)
    areas[smallest] = float(sizes[smallest] * 1.2)  # over its pixels at 256 x 256
    common.write_json(cut, said | {"runs": [run], "least share": 0.0, "steps": {"minimum area": areas}})
    infer.main(line("--replace", voters=("--vote", cut)))
    assert np.array_equal(mask_of(tmp_path / "out", name), np.where(before == smallest, 0, before))
    share = (sizes[smallest] * 1.2) / sizes[largest]
    common.write_json(least, said | {"runs": [run], "least share": float(share), "steps": {}})
    infer.main(line("--replace", voters=("--vote", least)))
    after = mask_of(tmp_path / "out", name)
    assert smallest not in after and largest in after


def test_what_a_step_took_is_in_the_vote_by_name(tmp_path, exp):
    run = run_folder(exp, 0, *SMALL, 0)
    stores = {0: common.open_store(run / "test.json", common.Hashes(tmp_path)),
              1: common.open_store(run_folder(exp, 0, *SMALL, 1) / "test.json", common.Hashes(tmp_path))}
    used = {"weights": np.array([0.4, 0.0]), "least share": np.float64(0.1), "minimum area": np.array([0, 2.5])}
    ensemble.write_vote(tmp_path / "s.vote.json", {"a": stores, "b": stores}, used)
    said = json.loads((tmp_path / "s.vote.json").read_text())
    assert [run["weight"] for run in said["runs"]] == [0.2, 0.2]  # two folds share; b has no weight
    assert said["least share"] == 0.1 and said["steps"] == {"minimum area": [0.0, 2.5]}
    checkpoint = common.file_hash(run / "model.pt")
    assert [each["hash"] for each in said["runs"][0]["checkpoints"]] == [checkpoint]
    assert said["runs"][0]["settings"] == {"tta": "flip", "tta_scales": [1.0], "scale": None}


@pytest.mark.parametrize(("change", "told"), [
    (lambda said: {}, "not a .vote.json of ensemble.py, or damaged"),
    (lambda said: said | {"runs": []}, "not a .vote.json of ensemble.py, or damaged"),
    (lambda said: said | {"steps": {"dilate": [3]}}, "STEPS_AFTER_VOTE of common.py has no dilate"),
    (lambda said: said | {"runs": [said["runs"][0] | {"folder": "r0/gone"}]}, "r0/gone/model.pt: is missing"),
    (lambda said: said | {"runs": [said["runs"][0] | {"checkpoints": [{"file": "model.pt", "hash": "0"}]}]},
     "model.pt: has changed since it voted")])
def test_a_vote_that_can_not_be_taken_is_one_line(line, vote_json, tmp_path, change, told):
    said = json.loads(vote_json.read_text())
    for run in said["runs"]:
        run["folder"] = str(vote_json.parent / run["folder"])
    common.write_json(tmp_path / "s.vote.json", change(said))
    with pytest.raises(UserError, match=told) as error:
        infer.main(line(voters=("--vote", tmp_path / "s.vote.json")))
    assert "\n" not in str(error.value) and contents(tmp_path / "out") == {}


# ---- carries on or does nothing -------------------------------------------------------------------------------------


def test_the_same_line_again_does_nothing_and_what_has_changed_alone_is_predicted(
        line, photos, tmp_path, predicted, capsys):
    out = tmp_path / "out"
    infer.main(line())
    assert predicted == sorted(PHOTOS)
    first = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*") if path.name != ".lock"}
    before = contents(out)
    predicted.clear()
    capsys.readouterr()
    for name in PHOTOS:
        os.utime(photos / name)  # the content is the same
    infer.main(line("--batch", 2))
    assert predicted == [] and capsys.readouterr().out == f"{out} has the masks of all 4 photo(s): nothing to do\n"
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in first} == first
    shutil.copy(photos / "grey.tif", photos / "another.tif")
    write_photo(photos / "beach/one.jpg", 40, 40, 77)
    (out / "masks/three.png").unlink()
    infer.main(line())
    assert sorted(predicted) == ["another.tif", "beach/one.jpg", "three.WEBP"]
    after = contents(out)
    assert after["masks/three.png"] == before["masks/three.png"] and after["masks/grey.png"] == before["masks/grey.png"]
    assert mask_of(out, "beach/one.jpg").shape == (40, 40) and len(after["areas.csv"].splitlines()) == 6


def test_another_recipe_is_refused_and_replaces_when_asked_what_then_stands_aside(line, tmp_path, predicted):
    out = tmp_path / "out"
    infer.main(line())
    before = contents(out)
    with pytest.raises(UserError, match="was made with another recipe: tta flip -> none; pass --replace") as error:
        infer.main(line("--tta", "none"))
    assert "\n" not in str(error.value) and contents(out) == before
    infer.main(line("--tta", "none", "--replace"))
    after = contents(out)
    assert {name.removeprefix("replaced/"): content for name, content in after.items()
            if name.startswith("replaced/")} == before
    assert after["masks/three.png"] != before["masks/three.png"] and len(predicted) == 8
    infer.main(line("--replace"))  # and back
    assert contents(out)["masks/three.png"] == before["masks/three.png"]
    assert contents(out)["replaced/masks/three.png"] == after["masks/three.png"]


def test_files_of_other_photos_are_never_written_over(line, photos, tmp_path, predicted):
    """Somebody's own masks/ of the same names, and the masks of a photo that is gone."""
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    (out / "masks/three.png").write_text("drawn by hand")
    with pytest.raises(UserError, match="has 1 file.s. that belong to none of the photos, such as .*masks/three.png"):
        infer.main(line())
    assert (out / "masks/three.png").read_text() == "drawn by hand" and predicted == []
    infer.main(line("--replace"))
    assert (out / "replaced/masks/three.png").read_text() == "drawn by hand"
    whole = contents(out)
    (photos / "three.WEBP").unlink()
    with pytest.raises(UserError, match="has 3 file.s. that belong to none of the photos, such as .*masks/three.png"):
        infer.main(line())
    predicted.clear()
    infer.main(line("--replace"))
    after = contents(out)
    assert predicted == [] and after["replaced/masks/three.png"] == whole["masks/three.png"]
    assert "masks/three.png" not in after and "three" not in after["areas.csv"].decode()


def test_other_code_is_asked_about_and_kept_or_made_anew(line, tmp_path, predicted):
    out = tmp_path / "out"
    infer.main(line())
    before, made = results(out), common.read_json(out / "made.json")
    assert {"predict_batch", "predict_probs", "read_photo", "load_model", "TTA[flip]"} <= made["code"].keys()
    assert (out / "code" / made["state"] / "infer.py").is_file()
    common.write_json(out / "made.json", made | {"code": made["code"] | {"predict_batch": "0dd"}})
    with pytest.raises(UserError, match=r"made by other code \(predict_batch\): --code new .*--code keep"):
        infer.main(line())
    infer.main(line("--code", "keep"))
    infer.main(line())
    assert results(out) == before and len(predicted) == 4
    common.write_json(out / "made.json", made | {"code": made["code"] | {"predict_batch": "0dd"}})
    infer.main(line("--code", "new"))
    assert len(predicted) == 8 and contents(out)["masks/three.png"] == before["masks/three.png"]


# 4 photos in batches of 3: a line of made.json, then an overlay and a mask of each, then areas.csv
@pytest.mark.parametrize(("name", "call", "left"), [
    ("write_description", 1, 4), ("predict_batch", 1, 4), ("atomic_write", 1, 4), ("atomic_write", 2, 4),
    ("atomic_write", 3, 3), ("predict_batch", 2, 1), ("atomic_write", 8, 1), ("write_csv", 1, 0)])
def test_a_killed_prediction_carries_on_to_the_same_bytes_with_what_is_missing(
        line, tmp_path, predicted, name, call, left):
    infer.main(line("--out", tmp_path / "whole"))
    predicted.clear()
    run_until_killed(infer, line(), name, call)
    assert not (tmp_path / "out/areas.csv").exists()
    predicted.clear()
    infer.main(line())
    assert len(predicted) == left
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_kill_before_the_areas_of_a_changed_photo_leaves_none_of_before(line, photos, tmp_path, predicted):
    infer.main(line())
    write_photo(photos / "grey.tif", 20, 30, 5)
    run_until_killed(infer, line(), "write_csv", 1)
    predicted.clear()
    infer.main(line())
    assert predicted == [] and "\ngrey.tif,20,30," in (tmp_path / "out/areas.csv").read_text().replace("\r", "")


def test_a_kill_while_another_recipe_replaces_loses_nothing_of_before(line, tmp_path):
    infer.main(line())
    before = contents(tmp_path / "out")
    run_until_killed(infer, line("--tta", "none", "--replace"), "write_description", 1)
    infer.main(line("--tta", "none", "--replace"))
    after = contents(tmp_path / "out")
    assert {name: after[f"replaced/{name}"] for name in before} == before
    infer.main(line("--tta", "none", "--out", tmp_path / "whole"))
    assert after["areas.csv"] == contents(tmp_path / "whole")["areas.csv"]


@pytest.mark.parametrize("call", [1, 4, 9])
def test_a_full_disk_is_one_line_and_the_same_command_carries_on(line, tmp_path, monkeypatch, capsys, call):
    calls, atomic_write = [], common.atomic_write

    def full(path):
        calls.append(path)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return atomic_write(path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        for module in (infer, common):
            patch.setattr(module, "atomic_write", full)
        common.run_script(infer.main, line())
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said == f"{calls[-1]}: No space left on device\n"
    infer.main(line())
    infer.main(line("--out", tmp_path / "whole"))
    assert results(tmp_path / "out") == results(tmp_path / "whole")


# ---- which photos ---------------------------------------------------------------------------------------------------


DAMAGED = {
    "cut.jpg": (lambda content: content[:len(content) // 2], "truncated"),
    "empty.png": (lambda _: b"", "begins with ''"),
    "page.jpg": (lambda _: b"<!DOCTYPE html>", "begins with '<!DOCTYPE html>'"),
    "phone.HEIC": (lambda _: b"\0\0\0\x18ftypheic", "begins with 'ftypheic'"),
    "bomb.png": (lambda _: Image.new("1", (30000, 3000)), "over 89000000 pixels")}


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_photos_are_told_in_a_line_each_and_the_rest_is_written(line, photos, tmp_path, capsys, workers):
    infer.main(line("--out", tmp_path / "whole"))
    whole = results(tmp_path / "whole")
    good = (photos / "beach/one.jpg").read_bytes()
    for name, (content, _) in DAMAGED.items():
        made = content(good)
        made.save(photos / name) if isinstance(made, Image.Image) else (photos / name).write_bytes(made)
    capsys.readouterr()
    for _ in range(2):  # it is told each time
        with pytest.raises(UserError, match="the masks stand, but of 5 photo.s. that can't be read") as stop:
            infer.main(line("--workers", workers))
        assert stop.value.code == 3 and "\n" not in str(stop.value)
        warned = [said for said in capsys.readouterr().out.splitlines() if said.startswith("warning: ")]
        assert len(warned) == 5
        for name, (_, reason) in DAMAGED.items():
            said, = (each for each in warned if name in each)
            assert reason in said and said.endswith(": skipped")
        assert results(tmp_path / "out") == whole
    for name in PHOTOS:
        (photos / name).write_bytes(b"")
    with pytest.raises(UserError, match="none of its 9 photo.s. can be read") as stop:
        infer.main(line())
    assert stop.value.code == 1 and results(tmp_path / "out") == {}  # nothing stands of what they were before


def test_hidden_files_are_left_out_others_are_counted_and_links_are_followed(line, photos, tmp_path, predicted, capsys):
    (photos / "notes.txt").write_text("x")
    (photos / "._one.jpg").write_text("of macOS")
    (photos / ".cache").mkdir()
    write_photo(photos / ".cache/a.png", 9, 9, 1)
    write_photo(tmp_path / "elsewhere/linked.png", 9, 9, 1)
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "beach/circle").symlink_to(photos)
    infer.main(line())
    assert predicted == sorted([*PHOTOS, "more/linked.png"])
    assert f"{photos}: 1 other file(s), such as notes.txt, are no photos by their ending\n" in capsys.readouterr().out


def test_nothing_is_ever_written_among_the_photos(line, photos, tmp_path):
    before = contents(photos)
    infer.main(line())
    assert contents(photos) == before
    (tmp_path / "link").symlink_to(photos)
    for out in (photos, photos / "beach/out", tmp_path / "link/out"):
        with pytest.raises(UserError, match="lies in --photos"):
            infer.main(line("--out", out))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/masks").symlink_to(photos / "beach")
    with pytest.raises(UserError, match="b/masks lies in --photos"):
        infer.main(line("--out", tmp_path / "b"))
    assert contents(photos) == before


@pytest.mark.parametrize(("more", "told"), [
    (["--photos", "nosuch"], "nosuch: no such folder; --photos is"),
    (["--photos", "{tmp}/none"], "none: no photo at any depth"),
    (["--checkpoint", "nosuch.pt"], "nosuch.pt: no such checkpoint"),
    (["--checkpoint", "{small}", "{other}"], "have different classes, Background, .*: they can't vote together"),
    (["--tta-scales", "0.001"], "not from 0.1")])
def test_a_mistake_is_one_line_and_nothing_is_written(line, exp, tmp_path, more, told, capsys):
    (tmp_path / "none/deeper").mkdir(parents=True)
    other = tmp_path / "other.pt"
    state = torch.load(model_of(exp, SMALL))
    common.save_checkpoint(other, **state | {"classes": [*state["classes"][:-1], "Clothes"]})
    more = [word.format(tmp=tmp_path, small=model_of(exp, SMALL), other=other) for word in more]
    with pytest.raises((UserError, SystemExit)) as error:
        infer.main(line(*more))
    said = str(error.value) if isinstance(error.value, UserError) else capsys.readouterr().err.strip()
    assert re.search(told, said) and "\n" not in said
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize(("words", "told"), [
    (["--photos", "p", "--checkpoint", "m.pt"], "--photos: needs --out FOLDER"),
    (["--data", "d", "--vote", "v.json"], "--vote: is for --photos"),
    (["--photos", "p", "--out", "o", "--vote", "v.json"], "v.json: no such file; ensemble.py soft, or make submit"),
    (["--photos", "p", "--out", "o", "--vote", "v.json", "--tta", "none"], "the runs of a --vote have their own"),
    (["--photos", "p", "--data", "d", "--checkpoint", "m.pt"], "not allowed with"),
    (["--photos", "p", "--out", "o"], "one of the arguments --checkpoint --vote is required"),
    (["--photos", "p", "--out", "o", "--vote", "v.json", "--checkpoint", "m.pt"], "not allowed with")])
def test_options_that_do_not_fit_each_other_are_one_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "m.pt").touch()
    if "none" in words:
        (tmp_path / "v.json").touch()
    with pytest.raises((UserError, SystemExit)) as error:
        infer.main(infer.parse_args(words))
    said = str(error.value) if isinstance(error.value, UserError) else capsys.readouterr().err.strip()
    assert told in said and "\n" not in said and not (tmp_path / "o").exists()


def test_two_photos_with_one_mask_are_refused_by_name(line, photos, tmp_path):
    shutil.copy(photos / "grey.tif", photos / "three.tif")
    with pytest.raises(UserError, match="three.WEBP and three.tif would share one mask"):
        infer.main(line())


@pytest.mark.parametrize("name", ["new\nline.png", b"caf\xe9.png".decode("utf-8", "surrogateescape")])
def test_a_name_that_no_csv_can_hold_is_told_and_skipped(line, photos, tmp_path, capsys, name):
    shutil.copy(photos / "grey.tif", photos / name)
    with pytest.raises(UserError, match="of 1 photo.s. that can't be read") as stop:
        infer.main(line())
    said = capsys.readouterr().out
    assert stop.value.code == 3 and str(stop.value).isprintable()
    assert "has a name that no CSV can hold: rename it" in said
    assert len((tmp_path / "out/areas.csv").read_text().splitlines()) == 5
