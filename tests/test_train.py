"""train.py in-process: one line starts, resumes or does nothing, and ends in the same bytes, stopped or not."""
import csv
import json
import math
import pickletools
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

import common
import train
from common import SUBMIT_SIZE

torch.set_num_threads(1)  # for nets this small a second thread would only wait for the first
MODEL = "fpn/tu-test_efficientnet"  # an epoch takes half a second; has batch norm and dropout
SCALE, FOLD = 64, 1
SPEED = ("images_per_s", "seconds")  # what a log has that is never the same twice
EPOCHS, STEPS = 3, 2  # of the runs below; their 9 training images in batches of 4 are two steps, the last one of 5


@pytest.fixture(scope="module")
def line(tiny_data, tmp_path_factory):
    """Function (exp, more arguments) -> parsed arguments of a tiny run; what comes later on the line wins."""
    cache = tmp_path_factory.mktemp("cache")

    def parse(exp, *more):
        return train.parse_args(["--data", str(tiny_data), "--exp", str(exp), "--cache", str(cache), "--model", MODEL,
                                 "--scale", str(SCALE), "--fold", str(FOLD), "--folds", "3", "--epochs", str(EPOCHS),
                                 "--batch", "4", "--lr", "1e-3", "--weights", "none", "--device", "cpu",
                                 *map(str, more)])
    return parse


def run_of(args):
    return common.run_folder(args.exp, args.round, args.model, args.scale, args.fold)


@pytest.fixture(scope="module")
def splits(line):
    args = line("unused")
    return common.load_data(args.data, args.cache, args.paint)


def run_and_keep(args):
    """train.main; the last.pt, which it removes in the end, stays as EXP/kept.pt."""
    save_run = train.save_run

    def save_and_copy(path, *rest):
        save_run(path, *rest)
        shutil.copy(path, args.exp / "kept.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_run", save_and_copy)
        train.main(args)


@pytest.fixture(scope="module")
def finished_exp(line, tmp_path_factory):
    """An experiment with one run that was never interrupted; tests only read it."""
    exp = tmp_path_factory.mktemp("finished")
    run_and_keep(line(exp))
    return exp


@pytest.fixture
def exp(finished_exp, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(finished_exp, tmp_path / "exp")


@pytest.fixture
def no_training(monkeypatch):
    """Any attempt to train fails the test."""
    monkeypatch.setattr(train, "train_one_epoch", lambda *_: pytest.fail("training began"))


@pytest.fixture
def interrupt(monkeypatch):
    """Function (name in train, call) that raises KeyboardInterrupt at that call, from 1 on, until undone."""
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
    """log.csv without the columns that tell how fast it went."""
    with open(folder / "log.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k not in SPEED} for row in csv.DictReader(f)]


def leaves(value, path=()):
    """(path, tensor or plain value) of all that is inside nested dicts, lists and tuples."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def assert_same_run(args, finished):
    """Both runs left the same bytes in model.pt and, but for the speed, the same log.csv and last.pt."""
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
    ("iou_ce", 1),  # nothing is saved yet
    ("iou_ce", STEPS * 2 + 2),  # in the middle of epoch 3
    ("evaluate", 2),
    ("save_checkpoint", 2),  # epoch 2 is lost
    ("write_csv", 2),  # epoch 2 is in last.pt but not in log.csv
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
    start_and_stop(args, monkeypatch, interrupt, "iou_ce", STEPS * 2 + 2)
    trained, train_one_epoch = [], train.train_one_epoch
    steps, update = [], timm.utils.ModelEmaV3.update
    monkeypatch.setattr(train, "train_one_epoch",
                        lambda run, *rest: trained.append(run["epoch"] + 1) or train_one_epoch(run, *rest))
    monkeypatch.setattr(timm.utils.ModelEmaV3, "update",
                        lambda self, model, step: steps.append(step) or update(self, model, step))
    train.main(args)
    assert trained == [3] and steps == [STEPS * 2 + 1, STEPS * 3]  # the average's decay rises with the step


def test_the_same_line_again_does_nothing(line, exp, no_training, capsys):
    folder = run_of(line(exp))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    train.main(line(exp))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_number_of_workers_changes_nothing(line, finished_exp, tmp_path, monkeypatch, interrupt, interrupted):
    args = line(tmp_path, "--workers", 2)
    if interrupted:
        start_and_stop(args, monkeypatch, interrupt, "iou_ce", STEPS * 2 + 1)
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
    with pytest.raises(SystemExit) as refusal:
        train.main(line(exp, "--lr", "2e-3", "--batch", 5))
    differ = str(refusal.value).split("recipe: ")[1].split(";")[0]
    assert sorted(differ.split(", ")) == ["batch 4 -> 5", "lr 0.001 -> 0.002"] and "--replace" in str(refusal.value)
    assert (folder / "model.pt").read_bytes() == before


def test_an_unfinished_run_of_another_recipe_is_refused_too(line, tmp_path, monkeypatch, interrupt):
    start_and_stop(line(tmp_path), monkeypatch, interrupt, "iou_ce", STEPS + 1)
    before = (run_of(line(tmp_path)) / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match="augment basic -> none"):
        train.main(line(tmp_path, "--augment", "none"))
    assert (run_of(line(tmp_path)) / "last.pt").read_bytes() == before


def test_another_recipe_is_replaced_on_request(line, exp, capsys):
    args = line(exp, "--lr", "2e-3", "--epochs", 1, "--replace")
    train.main(args)
    assert "lr 0.001 -> 0.002" in capsys.readouterr().out
    assert torch.load(run_of(args) / "model.pt")["recipe"]["lr"] == 2e-3
    assert [row["epoch"] for row in read_log(run_of(args))] == ["1"]


def test_replacing_does_not_resume_what_is_replaced(line, finished_exp, tmp_path, monkeypatch, interrupt):
    start_and_stop(line(tmp_path, "--lr", "2e-3"), monkeypatch, interrupt, "iou_ce", STEPS * 2 + 1)
    run_and_keep(line(tmp_path, "--replace"))
    assert_same_run(line(tmp_path), line(finished_exp))


def test_settings_that_do_not_decide_the_result_are_not_in_the_recipe(line, finished_exp):
    recipe = torch.load(run_of(line(finished_exp)) / "model.pt")["recipe"]
    assert not {"data_folder", "exp", "cache", "workers", "device", "replace", "check"} & recipe.keys()
    assert all(isinstance(v, (str, int, float, list)) for v in recipe.values())
    assert json.loads((run_of(line(finished_exp)) / "config.json").read_text()).items() >= recipe.items()


def test_a_run_that_another_process_has_is_refused(line, tmp_path, no_training):
    with common.lock(run_of(line(tmp_path))), pytest.raises(SystemExit, match="in use"):
        train.main(line(tmp_path))


def test_pretrained_weights_are_read_at_the_start_but_not_on_resuming(line, tmp_path, monkeypatch, interrupt):
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "encoder.pth")
    args = line(tmp_path / "exp", "--weights", tmp_path / "encoder.pth", "--epochs", 2)
    built, build_model = [], train.build_model

    def spy():
        monkeypatch.setattr(train, "build_model", lambda *a: built.append(str(a[2])) or build_model(*a))
    spy()
    start_and_stop(args, monkeypatch, interrupt, "iou_ce", STEPS + 1)
    spy()
    train.main(args)
    assert built == [str(tmp_path / "encoder.pth"), "none"]


def test_a_weights_file_with_other_content_is_another_recipe(line, tmp_path, monkeypatch, interrupt):
    path = tmp_path / "encoder.pth"
    args = line(tmp_path / "exp", "--weights", path)
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    start_and_stop(args, monkeypatch, interrupt, "iou_ce", STEPS + 1)
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    with pytest.raises(SystemExit, match="weights encoder.pth .* -> encoder.pth"):
        train.main(args)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--epoch", "--rep", "--ephocs", "--iou_weight"])
def test_misspelt_and_abbreviated_flags_are_refused(line, tmp_path, flag, capsys):
    with pytest.raises(SystemExit):
        line(tmp_path, flag, 1)
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("model", ["resnet18", "unet/", "nosuch/resnet18", "/resnet18"])
def test_a_model_that_is_not_decoder_and_encoder_is_refused(line, tmp_path, model, capsys):
    with pytest.raises(SystemExit):
        line(tmp_path, "--model", model)
    assert f"{model!r} is not DECODER/ENCODER" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["pan/resnet18", "dpt/tu-vit_tiny_patch16_224"])  # too few pixels; fixed scale
def test_a_model_that_cannot_work_at_the_scale_is_refused_in_one_line(line, tmp_path, model):
    with pytest.raises(SystemExit, match=f"^{model} can't work at scale 64: [^\n]+$"):
        train.main(line(tmp_path, "--model", model))


@pytest.mark.parametrize("wrong", [
    ("--scale", "33"), ("--scale", "0"), ("--scale", "-32"), ("--scale", "16"), ("--fold", "3"), ("--fold", "-1"),
    ("--folds", "99"), ("--folds", "1"), ("--weights", "nosuch.pth"), ("--round", "-1"), ("--epochs", "0"),
    ("--batch", "0"), ("--lr", "nan"), ("--lr", "-1"), ("--warmup", "1"), ("--iou-weight", "2"), ("--ema", "2"),
    ("--seed", "-1"), ("--workers", "-1"), ("--augment", "nosuch"), ("--paint", "nosuch")], ids=" ".join)
def test_a_wrong_value_is_refused_by_name_before_a_run_is_begun(line, tmp_path, no_training, capsys, wrong):
    with pytest.raises(SystemExit) as refusal:
        train.main(line(tmp_path, *wrong))
    said = f"{refusal.value} {capsys.readouterr().err}"
    assert wrong[0].removeprefix("--") in said and wrong[1] in said
    assert not list(tmp_path.glob("r*"))


def test_a_device_that_is_not_there_is_refused_before_training(line, tmp_path, no_training):
    with pytest.raises(SystemExit, match="nosuch"):
        train.main(line(tmp_path, "--device", "nosuch"))


def test_weights_that_do_not_fit_are_refused_before_training(line, tmp_path, no_training):
    state = timm.create_model("test_efficientnet").state_dict()
    del state["conv_stem.weight"]
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(SystemExit, match="bad.pth.*conv_stem.weight"):
        train.main(line(tmp_path, "--weights", tmp_path / "bad.pth"))


def test_an_encoder_that_does_not_exist_is_refused_before_training(line, tmp_path, no_training):
    with pytest.raises(SystemExit, match="nosuch"):
        train.main(line(tmp_path, "--model", "unet/tu-nosuch"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_epoch_before(line, tmp_path, monkeypatch):
    losses, iou_ce = [], train.iou_ce

    def failing(*args):
        losses.append(iou_ce(*args) * (math.nan if len(losses) == STEPS else 1))
        return losses[-1]
    monkeypatch.setattr(train, "iou_ce", failing)
    with pytest.raises(SystemExit, match="epoch 2 is nan.*--lr"):
        train.main(line(tmp_path))
    state = torch.load(run_of(line(tmp_path)) / "last.pt")
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["model"].values())


def test_check_writes_the_folds_and_trains_nothing(line, tmp_path, no_training, capsys):
    train.main(line(tmp_path, "--check"))
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"folds.csv"}
    out = capsys.readouterr().out
    assert "14 training and 4 test images, 12 classes" in out and "no faults" in out


# ---- order, samples and learning rate -------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_batches_hold_every_image_once_an_epoch_and_no_tail_of_one(n_images, batch_size, seed, epoch):
    batches = train.EpochBatches(n_images, batch_size, seed)
    batches.epoch = epoch
    listed = list(batches)
    assert len(listed) == len(batches)
    assert sorted(index for batch in listed for _, index in batch) == list(range(n_images))
    assert {key[0] for batch in listed for key in batch} == {epoch}
    sizes = [len(batch) for batch in listed]
    assert all(size == batch_size for size in sizes[:-1])
    if batch_size > 1 and n_images > 1:
        assert 2 <= sizes[-1] <= batch_size + 1


def test_a_tail_of_one_image_joins_the_batch_before():
    assert [len(batch) for batch in train.EpochBatches(7, 3, 0)] == [3, 4]
    assert [len(batch) for batch in train.EpochBatches(8, 3, 0)] == [3, 3, 2]


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        batches = train.EpochBatches(50, 8, seed)
        batches.epoch = epoch
        return tuple(index for batch in batches for _, index in batch)
    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert orders == {key: order(*key) for key in reversed(orders)}


def test_a_sample_depends_on_seed_epoch_and_index_alone(splits):
    augment = common.make_augmentation("basic", 32)
    samples = {seed: train.TrainSamples([(splits[0], i, None) for i in (3, 3, 5)], augment, seed) for seed in (0, 1)}
    keys = [(seed, epoch, index) for seed in samples for epoch in range(2) for index in range(3)]

    def draw(seed, epoch, index):
        return b"".join(part.tobytes() for part in samples[seed][epoch, index])
    drawn = {key: draw(*key) for key in keys}
    assert len(set(drawn.values())) == len(keys)  # the same photo at two indices is augmented twice
    assert drawn == {key: draw(*key) for key in reversed(keys)}


def test_a_sample_is_the_photo_with_its_mask_or_its_pseudo_label(splits):
    labelled, test = splits
    label = np.random.default_rng(0).integers(0, 12, (SUBMIT_SIZE, SUBMIT_SIZE), dtype=np.uint8)
    samples = train.TrainSamples([(labelled, 4, None), (test, 1, label)], lambda image, mask, rng: (image, mask), 0)
    image, mask = samples[0, 0]
    assert (image == labelled.image(4)).all() and (mask == labelled.mask(4)).all()
    image, mask = samples[0, 1]
    assert (image == test.image(1)).all() and mask.shape == image.shape[:2] == (64, 64)
    assert (mask == label[2::4, 2::4]).all()  # the centre of a pixel that covers 4 x 4


def test_the_learning_rate_is_torchs_linear_warm_up_and_cosine():
    steps, warm, peak = 200, 30, 3e-3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-9, total_iters=warm)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warm)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], milestones=[warm])
    for step in range(steps):
        assert train.cosine_lr(step / steps, peak, warm / steps) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-10)
        optimizer.step()
        scheduler.step()


@given(st.floats(0.01, 0.99), st.floats(1e-6, 10))
def test_the_learning_rate_has_no_jump_at_the_end_of_warm_up(warmup, peak):
    around = [train.cosine_lr(warmup + shift, peak, warmup) for shift in (-1e-6, 0, 1e-6)]
    assert around == pytest.approx([peak] * 3, rel=1e-3)
    assert train.cosine_lr(0, peak, warmup) == 0 and train.cosine_lr(1, peak, warmup) == pytest.approx(0, abs=1e-12)


def test_without_warm_up_the_learning_rate_starts_at_its_peak():
    assert train.cosine_lr(0, 1e-3, 0) == 1e-3 and train.cosine_lr(1, 1e-3, 0) == pytest.approx(0, abs=1e-12)


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_the_log_has_a_row_an_epoch_with_loss_rate_scores_and_iou_by_class(line, finished_exp, splits):
    with open(run_of(line(finished_exp)) / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["epoch", "loss", "lr", "v1", "v2", "v3", "images_per_s", "seconds",
                             *(f"iou {name}" for name in splits[0].classes)]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    rates = [train.cosine_lr(epoch / EPOCHS, 1e-3, 0.05) for epoch in (1, 2, 3)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates)
    for row in rows:
        ious = [float(v) for k, v in row.items() if k.startswith("iou ")]
        assert float(row["v2"]) == pytest.approx(np.nanmean(ious))
        assert float(row["loss"]) > 0 and all(0 <= float(row[k]) <= 1 for k in ("v1", "v2", "v3"))


def test_the_saved_v3_is_what_the_saved_weights_score_on_the_held_out_fold(line, finished_exp, splits):
    labelled = splits[0]
    model, state = common.load_model(run_of(line(finished_exp)) / "model.pt")
    with open(finished_exp / "folds.csv", newline="") as f:
        held_out = [int(row["image_id"]) for row in csv.DictReader(f) if row["fold"] == str(FOLD)]
    assert state["valid_ids"] == held_out and 0 < len(held_out) < len(labelled.ids)
    mious = []
    for i in map(labelled.ids.index, held_out):
        assert labelled.sizes[i] == [SCALE, SCALE]
        image = (labelled.image(i) / 255 - state["recipe"]["mean"]) / state["recipe"]["std"]
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


def test_model_pt_holds_the_averaged_weights_of_the_best_epoch_by_v3_not_the_last(line, tmp_path, monkeypatch):
    v3, seen, scores, evaluate = iter([0.2, 0.5, 0.5, 0.3]), [], train.scores, train.evaluate
    monkeypatch.setattr(train, "scores", lambda *args: scores(*args) | {"v3": next(v3), "v1": 0.9, "v2": 0.9})

    def remember(model, *rest):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return evaluate(model, *rest)
    monkeypatch.setattr(train, "evaluate", remember)
    train.main(line(tmp_path, "--epochs", 4))
    state = torch.load(run_of(line(tmp_path)) / "model.pt")
    assert (state["epoch"], state["v3"]) == (2, 0.5)
    assert all(torch.equal(v, seen[1][k]) for k, v in state["model"].items())
    assert not all(torch.equal(v, seen[2][k]) for k, v in state["model"].items())


def pickled_names(path):
    """All classes and functions that unpickling the checkpoint would call."""
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
    """The loss falls clearly below the least that a prediction can have which is the same for every pixel."""
    train.main(line(tmp_path, "--model", "unet/tu-test_efficientnet", "--batch", 2, "--epochs", 6, "--lr", "1e-2",
                    "--augment", "none"))
    with open(tmp_path / "folds.csv", newline="") as f:
        learnt = [i for i, row in enumerate(csv.DictReader(f)) if row["fold"] != str(FOLD)]
    masks = torch.from_numpy(np.stack([splits[0].mask(i) for i in learnt])).long()
    logits = (torch.bincount(masks.flatten(), minlength=12) + 1).log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(100):
        loss = common.iou_ce(logits.view(1, 12, 1, 1).expand(len(masks), -1, *masks.shape[1:]), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = [float(row["loss"]) for row in read_log(run_of(line(tmp_path, "--model", "unet/tu-test_efficientnet")))]
    assert losses[-1] < 0.85 * loss.item() and losses[-1] < 0.85 * losses[0]


# ---- pseudo labels --------------------------------------------------------------------------------------------------


@pytest.fixture
def pseudo(line, exp, splits):
    """Arguments of a run of round 1 whose pseudo labels, each of one class by position, are there; image 2 is out."""
    args = line(exp, "--round", 1, "--epochs", 1)
    folder, test = exp / f"r1/pseudo/f{FOLD}", splits[1]
    folder.mkdir(parents=True)
    labels = np.stack([np.full((SUBMIT_SIZE, SUBMIT_SIZE), 3 + i, np.uint8) for i in range(len(test.ids))])
    np.save(folder / "labels.npy", labels)
    common.write_csv(folder / "index.csv", [{"image_id": i, "keep": int(n != 2), "reason": ""}
                                            for n, i in enumerate(test.ids)])
    common.write_json(folder / "manifest.json", {
        "round": 1, "fold": FOLD, "folds_csv": common.file_hash(exp / "folds.csv"), "classes": test.classes,
        "labels": common.file_hash(folder / "labels.npy")})
    return Namespace(args=args, folder=folder, test=test)


def load_pseudo(pseudo):
    return train.load_pseudo(pseudo.args, pseudo.test, common.file_hash(pseudo.args.exp / "folds.csv"))


def edit(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def test_kept_pseudo_labels_are_learnt_from_and_the_others_left_out(pseudo):
    entries = load_pseudo(pseudo)
    assert [(i, int(label[0, 0])) for _, i, label in entries] == [(0, 3), (1, 4), (3, 6)]
    assert all(split is pseudo.test for split, _, _ in entries)


def test_keep_may_be_edited_by_hand(pseudo):
    first, third = pseudo.test.ids[0], pseudo.test.ids[2]
    edit(pseudo.folder / "index.csv", f"{first},1", f"{first},0")
    edit(pseudo.folder / "index.csv", f"{third},0", f"{third},1")
    assert [i for _, i, _ in load_pseudo(pseudo)] == [1, 2, 3]
    edit(pseudo.folder / "index.csv", f"{third},1", f"{third},yes")
    with pytest.raises(SystemExit, match="index.csv: keep is yes"):
        load_pseudo(pseudo)


@pytest.mark.parametrize(("key", "value"), [
    ("round", 2), ("fold", 0), ("folds_csv", "0123456789abcdef"), ("classes", ["Background", "Paper"])])
def test_pseudo_labels_of_another_lineage_are_refused_by_name(pseudo, no_training, key, value):
    path = pseudo.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(SystemExit, match=f"manifest.json: {key} is"):
        train.main(pseudo.args)
    lacking = json.loads(path.read_text())
    del lacking[key]
    path.write_text(json.dumps(lacking))
    with pytest.raises(SystemExit, match=f"manifest.json: {key} is None"):
        train.main(pseudo.args)


def test_pseudo_labels_made_before_the_folds_were_edited_are_refused(pseudo):
    path = pseudo.args.exp / "folds.csv"
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    rows[0]["fold"] = "1" if rows[0]["fold"] == "2" else "2"
    common.write_csv(path, rows)
    with pytest.raises(SystemExit, match="manifest.json: folds_csv is"):
        load_pseudo(pseudo)


@pytest.mark.parametrize("fault", ["order", "missing row", "short labels"])
def test_pseudo_labels_of_other_images_are_refused(pseudo, fault):
    lines = (pseudo.folder / "index.csv").read_text().splitlines()
    if fault == "short labels":
        np.save(pseudo.folder / "labels.npy", np.load(pseudo.folder / "labels.npy")[:-1])
    else:
        lines = [lines[0], lines[2], lines[1], *lines[3:]] if fault == "order" else lines[:-1]
        (pseudo.folder / "index.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit, match="other images|labels is"):
        load_pseudo(pseudo)


@pytest.mark.parametrize("name", ["manifest.json", "labels.npy", "index.csv"])
def test_missing_pseudo_labels_are_refused_by_name(pseudo, no_training, name):
    (pseudo.folder / name).unlink()
    with pytest.raises(SystemExit, match=name):
        train.main(pseudo.args)


def test_a_run_of_round_1_trains_on_both_and_an_edited_index_makes_it_another_recipe(
        pseudo, monkeypatch, capsys):
    seen, iou_ce = [], train.iou_ce
    monkeypatch.setattr(train, "iou_ce", lambda logits, mask, w: seen.append(mask.clone()) or iou_ce(logits, mask, w))
    train.main(pseudo.args)
    assert "9 labelled and 3 pseudo-labelled images" in capsys.readouterr().out
    masks = torch.cat(seen)
    whole = [int(mask[0, 0]) for mask in masks if (mask == mask[0, 0]).all()]
    assert len(masks) == 12 and {3, 4, 6} <= set(whole)
    edit(pseudo.folder / "index.csv", f"{pseudo.test.ids[0]},1", f"{pseudo.test.ids[0]},0")
    with pytest.raises(SystemExit, match="pseudo .* -> "):
        train.main(pseudo.args)
