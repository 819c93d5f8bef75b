"""pseudo_label.py on stores made by hand: rules, hand decisions, lineage, what training draws from the labels."""
import importlib.util
import itertools
import math
import re
from argparse import Namespace
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import read_csv, write_store
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_predict import CLASSES, change_json, random_stores

import common
import pseudo_label
from common import IGNORE_INDEX, SUBMIT_SIZE, UserError



def settings(rule, confident, max_unsure=0.1, uncertain="ignore"):
    """What a rule reads of the arguments, with the same threshold for each of 12 classes."""
    return Namespace(rule=rule, max_unsure=max_unsure, uncertain=uncertain, thresholds=np.full(12, confident))


IMAGE, PIXEL = settings("image", 0.8), settings("pixel", 0.9)


# ---- rules ----------------------------------------------------------------------------------------------------------


def two_class_probs(top, n_foreground):
    """float32 [2, 10, 10]: the first n_foreground pixels are class 1 with these top probabilities, in turn."""
    probs = np.zeros((2, 100), np.float32)
    probs[0] = 1
    probs[1, :n_foreground] = np.resize(np.float32(top), n_foreground)
    probs[0, :n_foreground] = 1 - probs[1, :n_foreground]
    return probs.reshape(2, 10, 10)


def on_disk(path, store):
    np.save(path, store)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize(("n_unsure", "reason"), [(0, ""), (1, ""), (2, ""), (3, "unsure"), (20, "unsure")])
def test_a_photo_is_kept_up_to_exactly_10_percent_unsure_foreground(n_unsure, reason):
    tops = [0.6] * n_unsure + [0.9] * (20 - n_unsure)
    verdict = pseudo_label.judge(two_class_probs(tops, 20), IMAGE)
    assert (verdict.reason, verdict.unsure) == (reason, n_unsure / 20)
    assert verdict.label.dtype == np.uint8 and verdict.label.ravel().tolist() == [1] * 20 + [0] * 80
    assert verdict.sure.ravel().tolist() == [False] * n_unsure + [True] * (100 - n_unsure)


@pytest.mark.parametrize(("top", "reason"), [
    (0.8, "unsure"), (0.8001, ""), (0.7999, "unsure"), (0.6, "unsure"), (1.0, "")])
def test_a_top_probability_of_exactly_80_percent_is_unsure_by_rule_image(top, reason):
    assert pseudo_label.judge(two_class_probs([top], 20), IMAGE)[2] == reason


@pytest.mark.parametrize(("top", "label"), [(0.9, 1), (0.9001, 1), (0.8999, IGNORE_INDEX), (0.6, IGNORE_INDEX)])
def test_a_top_probability_of_exactly_90_percent_is_sure_by_rule_pixel(top, label):
    verdict = pseudo_label.judge(two_class_probs([top, 1.0], 20), PIXEL)
    assert verdict.label.ravel().tolist() == [label, 1] * 10 + [0] * 80


@pytest.mark.parametrize("n_stores", [1, 2, 3, 5, 8])
def test_votes_of_exactly_the_threshold_are_judged_as_such(n_stores, tmp_path):
    store = on_disk(tmp_path / "a.npy", np.array([51, 204], np.uint8)[None, :, None, None].repeat(2, 2).repeat(2, 3))
    probs = pseudo_label.soft_vote([store] * n_stores, 0)
    assert pseudo_label.judge(probs, IMAGE)[2] == "unsure"
    assert (pseudo_label.judge(probs, settings("pixel", 0.8))[0] == 1).all()


def test_a_class_that_labels_nothing_is_ignored_by_every_rule():
    probs = np.zeros((3, 1, 100), np.float32)
    probs[0, 0, :40], probs[1, 0, 40:95], probs[2, 0, 95:] = 1, 1, 1
    for rule in pseudo_label.RULES:
        args = settings(rule, 0.5)
        args.thresholds = np.array([0.5, 0.5, np.inf])
        verdict = pseudo_label.judge(probs, args)
        assert verdict.label.ravel().tolist() == [0] * 40 + [1] * 55 + [IGNORE_INDEX] * 5, rule
        assert verdict.reason == "" and verdict.unsure == pytest.approx(5 / 60)


def test_unsure_background_is_no_reason_to_drop_a_photo():
    probs = np.full((2, 10, 10), 0.5, np.float32)
    probs[:, :2] = [[[0.05]], [[0.95]]]
    probs[0, 2:] += 0.01
    assert pseudo_label.judge(probs, IMAGE)[2:4] == ("", 0.0)
    label, _, *rest, _ = pseudo_label.judge(probs, PIXEL)
    assert rest == ["", 0.0] and (label[:2] == 1).all() and (label[2:] == IGNORE_INDEX).all()


@pytest.mark.parametrize(("rule", "probs", "unsure"), [
    (IMAGE, two_class_probs([0.9], 0), 0), (PIXEL, two_class_probs([0.9], 0), 0),
    (PIXEL, two_class_probs([0.7], 9), 1)])
def test_a_photo_without_sure_foreground_is_dropped(rule, probs, unsure):
    assert pseudo_label.judge(probs, rule)[2:4] == ("no foreground", unsure)


def slow_label(probs, args):
    """(label, reason) by loops over the pixels."""
    n_classes, height, width = probs.shape
    label, foreground, unsure, kept = np.zeros((height, width), int), 0, 0, 0
    for y, x in np.ndindex(height, width):
        top = max(range(n_classes), key=lambda c: (probs[c, y, x], -c))
        foreground += top > 0
        if args.rule == "image":
            unsure += top > 0 and probs[top, y, x] <= args.thresholds[top]
        elif probs[top, y, x] < args.thresholds[top]:
            top = {"ignore": 255, "background": 0}[args.uncertain]
        kept += 0 < top < 255
        label[y, x] = top
    if not (foreground if args.rule == "image" else kept):
        return label, "no foreground"
    return label, "unsure" if args.rule == "image" and unsure / foreground > args.max_unsure else ""


@given(arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 255)), st.sampled_from(["image", "pixel"]),
       st.sampled_from([0.3, 0.41, 0.77]), st.sampled_from([0.0, 0.13, 0.5, 1.0]),
       st.sampled_from(["ignore", "background"]))
def test_rules_are_those_of_a_slow_loop(values, rule, confident, max_unsure, uncertain):
    args = settings(rule, confident, max_unsure, uncertain)
    probs = values / np.float32(255)
    label, _, reason, *_ = pseudo_label.judge(probs, args)
    slow, slow_reason = slow_label(probs, args)
    assert (label == slow).all() and reason == slow_reason


# ---- every rule, also one that is new -------------------------------------------------------------------------------


@pytest.fixture(params=pseudo_label.RULES)
def rule_args(request):
    """The arguments of a rule of the table, with its defaults but for the thresholds."""
    args = pseudo_label.parse_args(["test.json", "--data", "d", "--exp", "e", "--round", "1", "--fold", "0", "--rule",
                                    request.param])
    return Namespace(**vars(args), thresholds=np.full(12, 0.8))


def certain_probs(mask, n_classes):
    """float32 [C, H, W]: 1 for the class of each pixel in `mask`, 0 for all others."""
    return (np.arange(n_classes)[:, None, None] == mask).astype(np.float32)


def test_every_rule_returns_what_the_table_promises_and_leaves_the_probabilities_alone(rule_args):
    probs = np.random.default_rng(0).dirichlet(np.full(12, 0.3), (7, 9)).transpose(2, 0, 1).astype(np.float32)
    given, rule = probs.copy(), pseudo_label.RULES[rule_args.rule]
    label, sure, reason = rule(probs, rule_args)
    assert label.dtype == np.uint8 and label.shape == (7, 9) and ((label < 12) | (label == IGNORE_INDEX)).all()
    assert sure.dtype == bool and sure.shape == (7, 9)
    assert isinstance(reason, str) and (probs == given).all()
    assert rule_args.confident == "auto"


@pytest.mark.parametrize("label", [np.ones((7, 9), int), np.ones((12, 7, 9), np.uint8)])
def test_a_rule_that_returns_no_label_fails_loudly(label, monkeypatch):
    monkeypatch.setattr(pseudo_label, "RULES", {"mine": lambda probs, args: (label, np.ones((7, 9), bool), "")})
    with pytest.raises(TypeError, match="rule mine returned a label of .*, not of uint8 .7, 9."):
        pseudo_label.judge(certain_probs(np.ones((7, 9)), 12), Namespace(rule="mine"))


@pytest.mark.parametrize("top", [1.0, 0.5])
def test_every_rule_drops_a_photo_of_background_alone(rule_args, top):
    probs = certain_probs(np.zeros((7, 9)), 12) * np.float32(top)
    probs[1:] = (1 - top) / 11
    verdict = pseudo_label.judge(probs, rule_args)
    assert verdict.reason == "no foreground" and verdict.unsure == 0


def test_every_rule_keeps_a_photo_that_the_models_are_perfectly_sure_of(rule_args):
    mask = np.arange(63).reshape(7, 9) % 12
    verdict = pseudo_label.judge(certain_probs(mask, 12), rule_args)
    assert (verdict.label == mask).all() and (verdict.pred == mask).all() and verdict.sure.all()
    assert verdict.reason == "" and verdict.unsure == 0


def test_every_rule_makes_labels(rule_args, makers):
    pseudo_label.main(makers.args("--rule", rule_args.rule))
    recipe = common.read_json(makers.folder / "manifest.json")["recipe"]
    assert recipe["rule"] == rule_args.rule and recipe["confident"] == {"image": 0.8, "pixel": 0.9}[rule_args.rule]
    assert keeps(makers)[1] == "0"  # the photo without foreground
    assert np.load(makers.folder / "labels.npy").shape == (4, SUBMIT_SIZE, SUBMIT_SIZE)


def test_a_rules_code_is_its_entry_and_what_that_uses():
    for name, rule in pseudo_label.RULES.items():
        code = common.code_of("labels", RULES=name)
        assert {rule.__name__, "judge"} <= code.keys()
        assert [key for key in code if key.startswith("RULES")] == [f"RULES[{name}]"]


METAL = 5
FUNCTION = f'''
def label_by_class(probs, args):
    """Label the pixels that reach the threshold of their class.

    Metal has to be surer than the others.
    """
    thresholds = args.thresholds.copy()
    thresholds[{METAL}] = args.metal
    label = probs.argmax(0).astype(np.uint8)
    sure = probs.max(0) >= thresholds[label]
    label[~sure] = IGNORE_INDEX
    return label, sure, ""


'''
RULE = 'RULES = {\n'
SETTING = 'SETTINGS = {\n'
EDITS = [(RULE, FUNCTION + RULE + '    "surer-metal": label_by_class,\n'),
         (SETTING, SETTING + '    "metal": (number(float, 0, 1), 0.99, "rule surer-metal: the least of metal"),\n')]


@pytest.fixture
def edited(tmp_path):
    """pseudo_label.py as a module, after EDITS of its text."""
    text = Path(pseudo_label.__file__).read_text()
    for old, new in EDITS:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "edited.py").write_text(text)
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_rule_with_a_number_of_its_own_is_a_function_an_entry_and_a_setting(makers, edited, capsys):
    with pytest.raises(SystemExit):
        makers.args("--rule", "surer-metal")
    with pytest.raises(SystemExit):
        edited.parse_args(makers.line("--help"))
    usage = " ".join(capsys.readouterr().out.split())
    assert f"{{{','.join(edited.RULES)}}}" in usage
    assert "surer-metal: Label the pixels that reach the threshold of their class; " in usage
    assert "rule surer-metal: the least of metal (default: 0.99)" in usage
    edited.main(edited.parse_args(makers.line("--rule", "surer-metal", "--confident", "0.45")))
    votes, labels = votes_of(makers), np.load(makers.folder / "labels.npy")
    pred = votes.argmax(1)
    sure = votes.max(1) >= np.where(pred == METAL, 0.99, 0.45)
    assert (labels == np.where(sure, pred, IGNORE_INDEX)).all() and not sure.all()
    rows = read_csv(makers.folder / "index.csv", ("keep", "reason", "unsure", "seen"))
    # the third photo is all metal, of a top probability of 250 / 255
    assert [row["keep"] for row in rows] == ["1", "0", "0", "1"]
    assert (rows[2]["reason"], float(rows[2]["unsure"]), rows[2]["seen"]) == ("no foreground", 1, str(METAL))
    recipe = common.read_json(makers.folder / "manifest.json")["recipe"]
    assert (recipe["rule"], recipe["confident"], recipe["metal"]) == ("surer-metal", 0.45, 0.99)
    edited.main(edited.parse_args(makers.line("--rule", "surer-metal", "--confident", "0.45", "--metal", "0.98")))
    assert f"{makers.folder} is replaced: metal 0.99 -> 0.98\n" in capsys.readouterr().out
    assert keeps(makers) == ["1", "0", "1", "1"]


def test_the_help_lists_rules_also_without_a_docstring_or_with_a_percent_sign(monkeypatch):
    def label(probs, args):
        """
        Drop 10% of the photos.

        Then label.
        """
    rules = {"plain": lambda probs, args: None, "tenth": label}
    monkeypatch.setattr(pseudo_label, "RULES", rules)
    assert pseudo_label.list_rules() == "plain; tenth: Drop 10%% of the photos"


# ---- the vote -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_stores", [1, 2, 3, 4])
def test_the_vote_is_the_mean_of_the_stores(n_stores, tmp_path):
    stores = np.random.default_rng(n_stores).integers(0, 256, (n_stores, 2, 3, 4, 5), dtype=np.uint8)
    vote = pseudo_label.soft_vote([on_disk(tmp_path / f"{i}.npy", store) for i, store in enumerate(stores)], 1)
    assert vote == pytest.approx(stores[:, 1].mean(0) / 255, abs=1e-6) and vote.dtype == np.float32


# ---- soft labels ----------------------------------------------------------------------------------------------------


def test_a_soft_label_holds_probabilities_and_none_where_it_is_ignored():
    probs = np.float32([[[0.1, 0.7, 0.0, 0.2]], [[0.9, 0.2, 0.5, 0.8]], [[0.0, 0.1, 0.5, 0.0]]])
    label = np.uint8([[1, 0, 255, 0]])  # the last two are unsure: one is ignored, one turned into background
    assert pseudo_label.soft_label(probs, label)[:, 0].tolist() == [
        [26, 178, 0, 255], [230, 51, 0, 0], [0, 26, 0, 0]]


def test_a_class_is_drawn_as_often_as_it_is_likely():
    probs = np.uint8([[51, 0, 0, 255], [153, 0, 255, 0], [51, 0, 0, 0]])[:, None]
    drawn = np.stack([common.draw_label(probs, u)[0] for u in (np.arange(1000) + 0.5) / 1000])
    assert drawn.dtype == np.uint8 and np.bincount(drawn[:, 0]).tolist() == [200, 600, 200]
    assert (drawn[:, 1:] == [IGNORE_INDEX, 1, 0]).all()
    assert common.draw_label(probs, 0.0).tolist() == [[0, 255, 1, 0]]
    assert common.draw_label(probs, np.nextafter(1, 0)).tolist() == [[2, 255, 1, 0]]


@given(arrays(np.uint8, (4, 3, 3)), st.floats(0, 1, exclude_max=True))
def test_no_class_without_a_probability_is_drawn(probs, u):
    label = common.draw_label(probs, u)
    for y, x in np.ndindex(3, 3):
        assert label[y, x] == IGNORE_INDEX if not probs[:, y, x].any() else probs[label[y, x], y, x] > 0


def test_training_draws_another_label_of_a_soft_one_in_every_epoch(splits):
    probs = np.zeros((12, SUBMIT_SIZE, SUBMIT_SIZE), np.uint8)
    probs[3], probs[7] = 127, 128
    samples = common.TrainSamples([(splits[1], 0, probs)], lambda image, mask, rng: (image, mask), 5)
    masks = [samples[epoch, 0][1] for epoch in range(40)]
    assert {mask.shape for mask in masks} == {tuple(splits[1].sizes[0])}
    assert all((mask == mask[0, 0]).all() for mask in masks)  # one draw for all pixels
    seen = Counter(int(mask[0, 0]) for mask in masks)
    assert set(seen) == {3, 7} and min(seen.values()) > 8
    assert [samples[epoch, 0][1][0, 0] for epoch in range(40)] == [mask[0, 0] for mask in masks]


# ---- batches --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 9), st.sampled_from([0.25, 1, 3]), st.integers(0, 9),
       st.booleans())
def test_every_batch_mixes_labelled_and_pseudo_labelled_images_by_their_ratio(n_labelled, n_pseudo, size, ratio, epoch,
                                                                              drawn):
    odds = np.arange(1, n_labelled + n_pseudo + 1) / sum(range(1, n_labelled + n_pseudo + 1)) if drawn else None
    batches = common.EpochBatches(n_labelled + n_pseudo, size, 1, odds, n_pseudo, ratio)
    batches.epoch = epoch
    drawn_batches = [[index for _, index in batch] for batch in batches]
    share = min(max(round(size / (1 + ratio)), 1), size - 1)
    labelled = [[i for i in batch if i < n_labelled] for batch in drawn_batches]
    assert len(drawn_batches) == len(batches) == math.ceil(n_labelled / share)
    assert {(len(batch), len(some)) for batch, some in zip(drawn_batches, labelled, strict=True)} == {(size, share)}
    if not drawn:
        times = Counter(sum(drawn_batches, []))
        often = [times[i] for i in range(n_labelled + n_pseudo)]
        assert min(often[:n_labelled]) > 0
        for source in (often[:n_labelled], often[n_labelled:]):
            assert max(source) - min(source) <= 1  # none comes again before all others have


def test_the_last_epochs_have_labelled_images_alone():
    batches = common.EpochBatches(20, 4, 0, None, 8, 1, labelled_from=2)
    seen = []
    for batches.epoch in range(4):
        seen.append(sorted({index for batch in batches for _, index in batch}))
        assert len(batches) == len(list(batches)) == (6 if batches.epoch < 2 else 3)
    assert seen == [list(range(20))] * 2 + [list(range(12))] * 2


def test_without_a_ratio_pseudo_labelled_images_come_once_an_epoch_like_all():
    plain, with_pseudo = common.EpochBatches(20, 4, 3), common.EpochBatches(20, 4, 3, None, 8)
    assert list(plain) == list(with_pseudo)


# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def makers(tmp_path, splits, tiny_data, cache):
    """Two test stores by hand and the line that makes pseudo labels of them."""
    rng = np.random.default_rng(0)
    paths = []
    for name in "ab":
        probs = random_stores(rng, 4)
        probs[1] = np.where(np.arange(12)[:, None, None] == 0, 255, 0)  # no foreground
        probs[2] = np.where(np.arange(12)[:, None, None] == 5, 250, 0)  # all of it surely metal
        write_store(tmp_path / name, "test", probs, splits[1], model=f"unet/{name}")
        paths.append(tmp_path / name / "test.json")

    def line(*more):
        confident = "0.9" if "pixel" in more else "0.8"
        return ["--data", str(tiny_data), "--cache", str(cache), "--exp", str(tmp_path / "exp"), "--round", "1",
                "--fold", "0", *map(str, paths), "--confident", confident, *more]

    def args(*more):
        return pseudo_label.parse_args(line(*more))
    return Namespace(line=line, args=args, paths=paths, folder=tmp_path / "exp/r1/pseudo/f0")


def votes_of(makers):
    return np.mean([np.load(path.with_suffix(".npy")).astype(float) for path in makers.paths], axis=0) / 255


@pytest.mark.parametrize(("key", "value"), [
    ("round", 1), ("fold", 1), ("split", "valid"), ("folds_csv", "0ther"), ("image_ids", [4, 3, 2, 1]),
    ("classes", CLASSES[:0:-1] + CLASSES[:1]), ("paint", "id"), ("data", "0ther")])
@pytest.mark.parametrize("store", [0, 1])
def test_makers_of_another_lineage_are_refused_by_name(makers, key, value, store):
    change_json(makers.paths[store], **{key: value})
    with pytest.raises(UserError, match=f"test.json: {key} (is|differ)"):
        pseudo_label.main(makers.args())
    assert not (makers.folder / "index.csv").exists()


def test_stores_of_other_photos_than_the_data_has_are_refused(makers):
    for path in makers.paths:
        change_json(path, data="0ther")
    with pytest.raises(UserError, match="test.json: data is 0ther, not"):
        pseudo_label.main(makers.args())
    assert not (makers.folder / "index.csv").exists()


@pytest.mark.parametrize(("flag", "value", "key"), [("--round", "2", "round"), ("--fold", "1", "fold")])
def test_labels_for_another_round_or_fold_than_the_makers_are_refused(makers, flag, value, key):
    with pytest.raises(UserError, match=f"{key} is 0, not 1"):
        pseudo_label.main(makers.args(flag, value))


@pytest.mark.parametrize(("key", "value"), [("fold", 1), ("round", 1), ("folds_csv", "0ther"), ("contaminated", True)])
def test_a_leak_that_is_allowed_is_marked(makers, key, value, capsys):
    change_json(makers.paths[1], **{key: value})
    pseudo_label.main(makers.args("--allow-leak"))
    assert common.read_json(makers.folder / "manifest.json")["contaminated"] is True
    assert "is contaminated" in capsys.readouterr().out


def test_allowing_a_leak_marks_nothing_where_there_is_none_and_lets_no_other_fault_pass(makers, capsys):
    pseudo_label.main(makers.args("--allow-leak"))
    assert common.read_json(makers.folder / "manifest.json")["contaminated"] is False
    assert "contaminated" not in capsys.readouterr().out
    change_json(makers.paths[1], split="valid")
    with pytest.raises(UserError, match="split is valid"):
        pseudo_label.main(makers.args("--allow-leak"))


def test_labels_are_the_soft_vote_with_a_row_for_each_photo(makers, splits):
    pseudo_label.main(makers.args())
    votes, labels = votes_of(makers), np.load(makers.folder / "labels.npy")
    assert labels.dtype == np.uint8 and labels.shape == (4, SUBMIT_SIZE, SUBMIT_SIZE)
    assert (np.take_along_axis(votes, labels[:, None].astype(int), 1)[:, 0] > votes.max(1) - 1e-6).all()
    rows = read_csv(makers.folder / "index.csv", ("image_id", "keep", "reason", "by_hand", "unsure"))
    assert [row["image_id"] for row in rows] == [str(i) for i in splits[1].ids]
    assert [(row["keep"], row["reason"], row["by_hand"]) for row in rows] == [
        ("0", "unsure", ""), ("0", "no foreground", ""), ("1", "", ""), ("0", "unsure", "")]
    for row, vote, label in zip(rows, votes, labels, strict=True):
        foreground = label > 0
        unsure = (vote.max(0)[foreground] <= 0.8).mean() if foreground.any() else 0
        assert float(row["unsure"]) == pytest.approx(unsure, abs=1e-4)
        assert row["classes"] == row["seen"] == " ".join(str(c) for c in np.unique(label) if c)


@pytest.mark.parametrize("uncertain", ["ignore", "background"])
def test_rule_pixel_labels_the_sure_pixels_of_every_photo(makers, uncertain):
    pseudo_label.main(makers.args("--rule", "pixel", "--confident", "0.45", "--uncertain", uncertain))
    votes, labels = votes_of(makers), np.load(makers.folder / "labels.npy")
    unsure = votes.max(1) < 0.45 - 1e-6
    assert unsure.any() and (labels[unsure] == {"ignore": 255, "background": 0}[uncertain]).all()
    assert (labels[~unsure] == votes.argmax(1)[~unsure]).all()
    rows = read_csv(makers.folder / "index.csv", ("keep", "reason", "classes", "seen"))
    assert [(row["keep"], row["reason"]) for row in rows] == [("1", ""), ("0", "no foreground"), ("1", ""), ("1", "")]
    for row, label, vote in zip(rows, labels, votes, strict=True):
        assert row["classes"] == " ".join(str(c) for c in np.unique(label) if c not in (0, 255))
        assert row["seen"] == " ".join(str(c) for c in np.unique(vote.argmax(0)) if c)


def test_soft_labels_are_the_probabilities_of_the_vote(makers):
    pseudo_label.main(makers.args("--soft", "--rule", "pixel", "--confident", "0.5"))
    votes, labels = votes_of(makers), np.load(makers.folder / "labels.npy")
    assert labels.shape == votes.shape and labels.dtype == np.uint8
    sure = (votes.max(1) >= 0.5 - 1e-6)[:, None]
    assert abs(labels - votes * 255 * sure).max() <= 0.51
    assert common.read_json(makers.folder / "manifest.json")["recipe"]["soft"] is True


def test_the_manifest_says_what_made_the_labels_and_how_many_photos_each_reason_removed_per_class(
        makers, splits, capsys):
    pseudo_label.main(makers.args())
    manifest, seen = common.read_json(makers.folder / "manifest.json"), votes_of(makers).argmax(1)
    stores = [common.read_json(path) for path in makers.paths]
    assert manifest.pop("makers") == [
        {"store": str(path), "id": common.store_id(info), "checkpoints": info["checkpoints"], "tta": "flip",
         "state": "5ta7e"} for path, info in zip(makers.paths, stores, strict=True)]
    assert manifest.pop("recipe") == {
        "round": 1, "fold": 0, "rule": "image", "confident": 0.8, "precision": 0.9, "max_unsure": 0.1,
        "uncertain": "ignore", "out_of_fold": [],
        "soft": False, "coco": False, "paint": "area", "data": splits[1].fingerprint, "folds_csv": "f01d",
        "makers": sorted(map(common.store_id, stores))}
    photos, code = manifest.pop("photos"), manifest.pop("code")
    labels = manifest.pop("labels")
    kept = np.load(makers.folder / "labels.npy")[2]
    assert [row["class"] for row in labels] == [*CLASSES, None]
    assert [row["pixels"] for row in labels] == [(kept == i).sum() for i in range(12)] + [(kept > 0).sum()]
    assert all((row["expected"], row["real"]) == (None, None) for row in labels)
    assert [row["threshold"] for row in labels] == [0.8] * 12 + [None]
    assert {"write_labels", "judge", "soft_vote", "predict_probs", "TTA[flip]", "DECODERS[unet]"} <= code.keys()
    assert "RULES[image]" in code and not {"RULES", "RULES[pixel]"} & code.keys()
    assert (makers.folder.parents[2] / "code" / manifest.pop("state") / "pseudo_label.py").is_file()
    assert manifest == {"round": 1, "fold": 0, "folds_csv": "f01d", "classes": CLASSES, "paint": "area",
                        "contaminated": False, "commit": common.git_commit(), "versions": common.library_versions(),
                        "kept_under": [], "files": {"labels.npy": common.file_hash(makers.folder / "labels.npy")}}
    assert list(photos) == CLASSES
    assert photos["Background"] == {"unsure": 2, "no foreground": 1, "kept": 1}  # all photos
    for class_id, name in enumerate(CLASSES[1:], 1):
        unsure, kept = sum((seen[i] == class_id).any() for i in (0, 3)), int((seen[2] == class_id).any())
        assert photos[name] == {why: n for why, n in (("unsure", unsure), ("kept", kept)) if n}, name
    out = capsys.readouterr().out
    assert "Metal" in out and "no foreground" in out


def test_the_kept_labels_are_exported_as_coco_when_asked(makers, splits):
    pseudo_label.main(makers.args("--coco"))
    coco = common.read_json(makers.folder / "labels.json")
    metal = sorted(category["id"] for category in coco["categories"])[5 - 1]
    height, width = splits[1].sizes[2]
    assert [(a["image_id"], a["category_id"], a["area"]) for a in coco["annotations"]] == [
        (splits[1].ids[2], metal, height * width)]


def test_what_describes_pseudo_labels_is_written_last(makers, monkeypatch):
    written, replace, rename = [], common.os.replace, common.os.rename
    monkeypatch.setattr(common.os, "replace", lambda source, target: (
        written.append(target.name), replace(source, target)))
    monkeypatch.setattr(common.os, "rename", lambda source, target: (
        written.append(target.name), rename(source, target)))
    pseudo_label.main(makers.args())
    assert written[1:] == ["new-labels.npy", "sheet.png", "labels.npy", "index.csv", "manifest.json"]
    assert {path.name for path in makers.folder.iterdir()} == {*written[2:], ".lock"}
    assert written[0] == common.read_json(makers.folder / "manifest.json")["state"]  # the folder with the code


def test_the_sheet_shows_photos_of_every_reason_and_the_unsure_pixels(makers):
    pseudo_label.main(makers.args())
    sheet = cv2.imread(str(makers.folder / "sheet.png"))[:, :, ::-1]
    legend, line = len(CLASSES) + 1, 18
    assert sheet.shape == (2 * (SUBMIT_SIZE + line) + legend * line, 4 * SUBMIT_SIZE, 3)  # four photos, two in a row
    unsure = sheet[2 * (SUBMIT_SIZE + line) + len(CLASSES) * line + line // 2, 15]
    assert unsure.tolist() == common.COLOURS[IGNORE_INDEX].tolist()


def keeps(makers):
    return [row["keep"] for row in read_csv(makers.folder / "index.csv", ("image_id", "keep"))]


def edit_keep(makers, position, keep):
    path = makers.folder / "index.csv"
    rows = read_csv(path, ("keep",))
    rows[position]["keep"] = keep
    common.write_csv(path, rows)


def test_decisions_made_by_hand_outlive_labels_made_anew_and_the_others_do_not(makers, capsys):
    pseudo_label.main(makers.args())
    assert keeps(makers) == ["0", "0", "1", "0"]
    edit_keep(makers, 0, "1")
    edit_keep(makers, 2, "0")
    pseudo_label.main(makers.args("--coco"))
    assert keeps(makers) == ["1", "0", "0", "0"] and "2 decision(s) made by hand" in capsys.readouterr().out
    assert common.read_json(makers.folder / "manifest.json")["photos"]["Background"] == {
        "kept": 1, "by hand": 1, "no foreground": 1, "unsure": 1}
    pseudo_label.main(makers.args("--max-unsure", "1"))
    assert keeps(makers) == ["1", "0", "0", "1"]


def test_the_sheet_too_says_what_was_dropped_by_hand(makers, monkeypatch):
    pseudo_label.main(makers.args())
    edit_keep(makers, 0, "1")
    pseudo_label.main(makers.args("--coco"))
    edit_keep(makers, 0, "0")  # which the rule says too
    captions = []
    monkeypatch.setattr(pseudo_label, "write_sheet", lambda path, rows, *_, **__: captions.extend(
        caption.split(";")[0] for _, (caption, _) in rows))
    pseudo_label.main(makers.args())
    assert captions == ["kept", "by hand", "no foreground", "unsure"]


def test_a_decision_made_by_hand_is_not_lost_when_the_rule_agrees_for_a_while(makers):
    pseudo_label.main(makers.args())
    edit_keep(makers, 0, "1")
    pseudo_label.main(makers.args("--max-unsure", "1"))  # the rule keeps it too
    pseudo_label.main(makers.args())
    assert keeps(makers)[0] == "1"
    edit_keep(makers, 0, "0")  # another decision
    pseudo_label.main(makers.args("--max-unsure", "1"))
    assert keeps(makers)[0] == "0"
    edit_keep(makers, 0, "")  # none any more
    pseudo_label.main(makers.args("--max-unsure", "1", "--coco"))
    pseudo_label.main(makers.args())
    assert keeps(makers)[0] == "0"
    assert all(row["by_hand"] == "" for row in read_csv(makers.folder / "index.csv", ("by_hand",)))


def test_an_index_that_is_no_index_of_labels_is_refused_and_left_alone(makers):
    makers.folder.mkdir(parents=True)
    (makers.folder / "index.csv").write_text("image_id,keep\n1,1\n")
    with pytest.raises(UserError, match="no column reason"):
        pseudo_label.main(makers.args())
    assert (makers.folder / "index.csv").read_text() == "image_id,keep\n1,1\n"


def sorted_otherwise(lines):
    return [lines[0], *sorted(lines[1:], reverse=True)]


INDEX_EDITS = {
    "sorted otherwise": sorted_otherwise, "semicolons": lambda lines: [line.replace(",", ";") for line in lines],
    "blank rows": lambda lines: [*lines[:2], "," * lines[0].count(","), "", *lines[2:], "", ",,"]}


@pytest.mark.parametrize("change", INDEX_EDITS)
def test_what_a_spreadsheet_does_to_an_index_changes_no_label_and_loses_no_decision(makers, splits, change):
    pseudo_label.main(makers.args())
    edit_keep(makers, 0, "1")
    path, args = makers.folder / "index.csv", Namespace(exp=makers.folder.parents[2], round=1, fold=0)

    def state():
        entries, class_ids = common.load_labels(args, splits[1])
        kept = [(i, label.tobytes()) for _, i, label in entries]
        return kept, class_ids, common.labels_hash(makers.folder, common.Hashes("nocache"))
    before = state()
    assert [i for i, _ in before[0]] == [0, 2]
    path.write_text("\n".join(INDEX_EDITS[change](path.read_text().splitlines())) + "\n")
    assert state() == before
    pseudo_label.main(makers.args("--coco"))
    assert keeps(makers) == ["1", "0", "1", "0"]


@pytest.mark.parametrize(("old", "new", "told"), [
    (",5,5\n", ",1;2,5\n", "line 4: classes are '1;2', not ids with blanks between"),
    (",5,5\n", ",5,5\n{id},1,,,0,5,5\n", "line 5: image {id} is listed twice"),
    (",5,5\n", ",44,5\n", "image {id} has classes that DATA doesn't have, 44")])
def test_a_slip_in_an_index_is_named(makers, splits, old, new, told):
    pseudo_label.main(makers.args())
    path, image_id = makers.folder / "index.csv", splits[1].ids[2]
    text = path.read_text().replace("\r\n", "\n")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new.format(id=image_id)))
    with pytest.raises(UserError, match="index.csv.*" + told.format(id=image_id)):
        common.load_labels(Namespace(exp=makers.folder.parents[2], round=1, fold=0), splits[1])


@pytest.mark.parametrize("spelt", ["{}.0", "0{}", "1E+05"])
def test_a_decision_on_an_unknown_image_stops_new_labels(makers, splits, spelt):
    pseudo_label.main(makers.args())
    edit_keep(makers, 0, "1")
    path, image_id = makers.folder / "index.csv", splits[1].ids[0]
    path.write_text(path.read_text().replace(f"\n{image_id},", f"\n{spelt.format(image_id)},"))
    with pytest.raises(UserError, match=f"index.csv: decides on image {re.escape(spelt.format(image_id))}, which is "):
        pseudo_label.main(makers.args("--coco"))


def test_a_decision_that_is_none_stops_new_labels_too(makers):
    pseudo_label.main(makers.args())
    edit_keep(makers, 0, "yes")
    with pytest.raises(UserError, match="index.csv line 2: keep is yes; "):
        pseudo_label.main(makers.args("--coco"))


@pytest.mark.parametrize("damage", [
    {"photos": []}, {"photos": {"Background": 3}}, {"round": "1"}, {"contaminated": "no"}, {"kept_under": [1]}])
def test_a_damaged_manifest_is_made_anew(makers, damage):
    pseudo_label.main(makers.args())
    path = makers.folder / "manifest.json"
    sound = common.read_json(path)
    common.write_json(path, sound | damage)
    pseudo_label.main(makers.args())
    assert common.read_json(path) == sound


def test_a_photo_that_cannot_be_read_is_never_a_label(makers, splits, monkeypatch):
    test = replace(splits[1], faults=[None, None, "is missing", None])
    monkeypatch.setattr(pseudo_label, "load_data", lambda *args, **settings: (splits[0], test))
    pseudo_label.main(makers.args())
    row = read_csv(makers.folder / "index.csv", ("keep", "reason"))[2]
    assert (row["keep"], row["reason"]) == ("0", "unreadable")
    edit_keep(makers, 2, "1")
    args = Namespace(exp=makers.folder.parents[2], round=1, fold=0)
    assert common.load_labels(args, test)[0] == [] and len(common.load_labels(args, splits[1])[0]) == 1


def test_a_warning_says_when_nothing_is_kept(makers, capsys):
    pseudo_label.main(makers.args("--confident", "1"))
    assert set(keeps(makers)) == {"0"} and "warning: no photo is kept" in capsys.readouterr().out


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_the_same_line_again_does_nothing_and_labels_made_anew_from_the_same_stores_have_the_same_bytes(
        makers, capsys, monkeypatch):
    pseudo_label.main(makers.args())
    before = files_of(makers.folder)
    with monkeypatch.context() as patch:
        patch.setattr(pseudo_label, "write_labels", lambda *_: pytest.fail("labels were begun"))
        pseudo_label.main(makers.args())
    assert files_of(makers.folder) == before and "nothing to do" in capsys.readouterr().out
    (makers.folder / "manifest.json").unlink()
    pseudo_label.main(makers.args())
    assert files_of(makers.folder) == before and common.read_json(makers.folder / "manifest.json")["fold"] == 0


def test_labels_that_are_kept_under_other_code_stay_and_their_manifest_says_so(makers, monkeypatch):
    pseudo_label.main(makers.args())
    before = files_of(makers.folder)
    manifest = common.read_json(makers.folder / "manifest.json")
    monkeypatch.setattr(pseudo_label, "labels_code", lambda makers, rule: manifest["code"] | {"judge": "0ther"})
    pseudo_label.main(makers.args("--code", "keep"))
    after = files_of(makers.folder)
    assert after.keys() == before.keys() and all(after[name] == before[name] for name in ("labels.npy", "index.csv"))
    kept = common.read_json(makers.folder / "manifest.json")
    assert [entry["code"]["judge"] for entry in kept.pop("kept_under")] == ["0ther"]
    assert kept == {key: value for key, value in manifest.items() if key != "kept_under"}


@pytest.mark.parametrize("damage", ["cut", "of other bytes", "gone"])
def test_damaged_labels_are_made_anew(makers, damage):
    pseudo_label.main(makers.args())
    before, path = files_of(makers.folder), makers.folder / "labels.npy"
    content = before["labels.npy"]
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    pseudo_label.main(makers.args())
    assert files_of(makers.folder) == before


def test_labels_that_are_replaced_stand_aside_with_the_decisions_made_by_hand(makers, capsys):
    pseudo_label.main(makers.args())
    edit_keep(makers, 0, "1")
    before, names = files_of(makers.folder), ("manifest.json", "labels.npy", "index.csv")
    pseudo_label.main(makers.args("--confident", "0.9"))
    said = capsys.readouterr().out
    assert f"{makers.folder} is replaced: confident 0.8 -> 0.9\n" in said and f"{makers.folder}/replaced: " in said
    assert files_of(makers.folder / "replaced") == {name: before[name] for name in names}
    assert common.read_json(makers.folder / "manifest.json")["recipe"]["confident"] == 0.9
    assert keeps(makers)[0] == "1"


# of new-labels.npy and sheet.png, of the old manifest.json and labels.npy, of the new labels.npy, index.csv and
# manifest.json; an eighth call is never made
@pytest.mark.parametrize("call", range(1, 9))
def test_stopped_between_any_two_renames_a_replacement_loses_neither_labels_nor_decisions(makers, monkeypatch, call):
    pseudo_label.main(makers.args("--max-unsure", "1"))
    pseudo_label.main(makers.args())  # from now on older ones stand aside
    edit_keep(makers, 0, "1")
    before, calls, other = files_of(makers.folder), itertools.count(1), makers.args("--confident", "0.9")

    def stopping(move):
        def moving(source, target):
            if next(calls) == call:
                raise KeyboardInterrupt
            move(source, target)
        return moving
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if call < 8 else nullcontext():
        for name in ("replace", "rename"):
            patch.setattr(common.os, name, stopping(getattr(common.os, name)))
        pseudo_label.main(other)
    pseudo_label.main(other)
    assert keeps(makers) == ["1", "0", "1", "0"]
    assert files_of(makers.folder).keys() == before.keys()
    manifest = common.read_json(makers.folder / "manifest.json")
    assert manifest["recipe"]["confident"] == 0.9 and manifest["photos"]["Background"]["kept"] == 2
    assert manifest["files"] == {"labels.npy": common.file_hash(makers.folder / "labels.npy")}
    assert files_of(makers.folder / "replaced") == {
        name: before[name] for name in ("manifest.json", "labels.npy", "index.csv")}


# ---- how sure is sure enough ----------------------------------------------------------------------------------------


def slow_thresholds(tops, preds, truths, photos, n_classes, precision):
    """By every threshold that can be, over lists of pixels."""
    found = []
    for c in range(n_classes):
        mine = [(top, truth == c, photo) for top, pred, truth, photo in zip(tops, preds, truths, photos, strict=True)
                if pred == c and truth != IGNORE_INDEX]
        enough = []
        for least in {top for top, _, _ in mine}:
            sure = [(right, photo) for top, right, photo in mine if top >= least]
            of_photos = {p for _, p in sure}
            parts = [[right for right, photo in sure if photo != left_out] for left_out in (*of_photos, None)]
            if all(sum(part) >= precision * len(part) for part in parts) and len(of_photos) >= 3:
                enough.append(least)
        found.append(min(enough, default=None))
    return found


@given(st.integers(0, 2 ** 32 - 1), st.sampled_from([0.5, 0.75, 0.9, 1.0]))
def test_thresholds_are_those_of_a_slow_search(seed, precision):
    rng = np.random.default_rng(seed)
    n, n_classes, n_sums = 60, 3, 11
    tops, preds, truths = rng.integers(4, n_sums, n), rng.integers(0, 3, n), rng.integers(0, 3, n)
    truths = np.where(rng.random(n) < 0.7, preds, truths)
    photos = rng.integers(0, 5, n)
    pixels = np.zeros((5, n_classes, n_sums, 2), int)
    for top, pred, truth, photo in zip(tops, preds, truths, photos, strict=True):
        pixels[photo, pred, top] += (1, pred == truth)
    found = pseudo_label.fit_thresholds(pixels, precision)
    slow = slow_thresholds(tops.tolist(), preds.tolist(), truths.tolist(), photos.tolist(), n_classes, precision)
    assert found.tolist() == [np.inf if s is None else pytest.approx((s - 0.5) / (n_sums - 1)) for s in slow]


@pytest.fixture
def judges(makers, splits, tmp_path):
    """Valid stores of both models in folds 0 and 1, and their paths: metal is right from 200 of 255 on, in fold 1."""
    train, rng = splits[0], np.random.default_rng(3)
    halves = {0: range(7), 1: range(7, 14)}
    for fold, images in halves.items():
        for name in "ab":
            probs = np.zeros((len(images), 12, SUBMIT_SIZE, SUBMIT_SIZE), np.uint8)
            for n, i in enumerate(images):
                truth = train.truth(i)
                pred = np.where((truth == 0) & (rng.random(truth.shape) < 0.3), METAL, truth)  # metal is often wrong
                level = np.where((pred == METAL) & (truth != METAL), 150, 220)
                np.put_along_axis(probs[n], pred[None].astype(int), level[None].astype(np.uint8), axis=0)
            run = tmp_path / f"judges{name}{fold}"
            write_store(run, "valid", probs, train, ids=[train.ids[i] for i in images], model=f"unet/{name}", fold=fold)
    return [tmp_path / f"judges{name}{fold}" / "valid.json" for fold in (0, 1) for name in "ab"]


def automatic(makers, judges, *more):
    return makers.args("--confident", "auto", *more, "--out-of-fold", *map(str, judges))


def test_labels_are_as_sure_as_other_folds_ask_for(makers, judges, splits, capsys):
    pseudo_label.main(automatic(makers, judges, "--rule", "pixel"))
    manifest = common.read_json(makers.folder / "manifest.json")
    train = splits[0]
    in_photos = {c: sum((train.truth(i) == c).any() for i in range(7, 14)) for c in range(12)}
    for c, row in enumerate(manifest["labels"][:-1]):
        if in_photos[c] < 3:
            assert row["threshold"] is None and row["pixels"] == 0, c
        elif c == METAL:
            assert 150 / 255 < row["threshold"] < 220 / 255 and row["expected"] >= 0.9
    labels, votes = np.load(makers.folder / "labels.npy"), votes_of(makers)
    thresholds = np.array([row["threshold"] or np.inf for row in manifest["labels"][:-1]])
    pred = votes.argmax(1)
    assert (labels == np.where(votes.max(1) >= thresholds[pred], pred, IGNORE_INDEX)).all()
    assert "expected" in capsys.readouterr().out
    assert len(manifest["recipe"]["out_of_fold"]) == 4
    # expected: what the rule labels of the fold's own photos
    own = np.mean([np.load(path.with_suffix(".npy")) for path in judges[:2]], axis=0) / 255
    pred = own.argmax(1)
    labels = np.where(own.max(1) >= thresholds[pred], pred, IGNORE_INDEX)
    kept = ((labels > 0) & (labels != IGNORE_INDEX)).any((1, 2))
    labels, truths = labels[kept], np.stack([train.truth(i) for i in range(7)])[kept]
    for c, row in enumerate(manifest["labels"]):
        mine = labels == c if c < 12 else (labels > 0) & (labels != IGNORE_INDEX)  # the last is all foreground
        mine &= truths != IGNORE_INDEX
        assert row["expected"] == (pytest.approx((labels == truths)[mine].mean()) if mine.any() else None), c


def test_photos_that_the_rule_drops_expect_nothing(makers, judges, monkeypatch):
    """Of fold 0 the rule keeps one photo: what is expected is of that one, as what is real is of kept ones."""
    def keep_one(probs, args):
        label, sure, _ = pseudo_label.label_sure_pixels(probs, args)
        calls.append(1)
        return label, sure, "" if len(calls) == 3 else "dropped"
    calls = []
    monkeypatch.setitem(pseudo_label.RULES, "one", keep_one)
    args = makers.args("--rule", "pixel", "--confident", "0.4")
    args.rule, args.thresholds = "one", np.full(12, 0.4)
    train, _ = common.load_data(args.data, args.cache)
    stores, infos = zip(*(common.open_store(path, common.Hashes(args.cache)) for path in judges[:2]), strict=True)
    counts = pseudo_label.count_expected(stores, infos, train, args)
    assert len(calls) == 7 and counts[:, 0].sum() == SUBMIT_SIZE ** 2
    totals = [total for total, _ in pseudo_label.sum_validation(stores, infos, train)]
    pred, truth = totals[2].argmax(0), train.truth(2)
    assert counts[:, 2].sum() == (pred == truth)[truth != IGNORE_INDEX].sum()


def test_the_truth_of_the_fold_itself_decides_nothing(makers, judges, monkeypatch):
    pseudo_label.main(automatic(makers, judges, "--rule", "pixel"))
    before = (makers.folder / "labels.npy").read_bytes(), [
        row["threshold"] for row in common.read_json(makers.folder / "manifest.json")["labels"]]
    truth = common.Split.truth
    monkeypatch.setattr(common.Split, "truth", lambda split, i: truth(split, i) if i >= 7 else truth(split, i) * 0)
    (makers.folder / "manifest.json").unlink()
    pseudo_label.main(automatic(makers, judges, "--rule", "pixel"))
    rows = common.read_json(makers.folder / "manifest.json")["labels"]
    assert before == ((makers.folder / "labels.npy").read_bytes(), [row["threshold"] for row in rows])
    assert rows[-1]["expected"] == 0  # it only tells how right they are


@pytest.mark.parametrize("least, is_warned", [(np.inf, True), (0.4, False)])
def test_labels_without_background_are_warned_of(makers, monkeypatch, capsys, least, is_warned):
    monkeypatch.setattr(pseudo_label, "choose_thresholds", lambda args, *data: np.array([least, *11 * [0.4]]))
    pseudo_label.main(makers.args("--rule", "pixel"))
    assert "1" in keeps(makers) and ("warning: no pixel is labelled Background" in capsys.readouterr().out) == is_warned


def test_without_another_fold_or_with_other_models_auto_is_refused(makers, judges):
    with pytest.raises(UserError, match="needs --out-of-fold with valid.json of other folds than 0: .*--confident 0.8"):
        pseudo_label.main(makers.args("--confident", "auto"))
    with pytest.raises(UserError, match="other folds than 0"):
        pseudo_label.main(automatic(makers, judges[:2]))
    with pytest.raises(UserError, match="fold 1 and the makers of the labels differ in unet/b 64 flip"):
        pseudo_label.main(automatic(makers, judges[:3]))
    change_json(judges[2], round=3)
    with pytest.raises(UserError, match="valid.json: round is 3, not 0: --out-of-fold takes valid.json of round 0"):
        pseudo_label.main(automatic(makers, judges))


def test_thresholds_of_contaminated_models_contaminate_the_labels(makers, judges):
    change_json(judges[2], contaminated=True)
    pseudo_label.main(automatic(makers, judges))
    assert common.read_json(makers.folder / "manifest.json")["contaminated"] is True


@pytest.mark.parametrize("change, contaminated", [({}, False), ({"round": 1}, True), ({"folds_csv": "other"}, True)])
def test_thresholds_of_models_that_may_have_seen_the_fold_contaminate_the_labels(makers, judges, change, contaminated):
    change_json(judges[2], **change)
    pseudo_label.main(automatic(makers, judges, "--allow-leak"))
    assert common.read_json(makers.folder / "manifest.json")["contaminated"] is contaminated


def test_thresholds_of_a_store_that_is_replaced_meanwhile_make_no_labels(makers, judges, monkeypatch):
    count = pseudo_label.count_top_sums

    def count_and_replace(*fold):
        yield from count(*fold)
        change_json(judges[3], files={"valid.npy": "other"})
    monkeypatch.setattr(pseudo_label, "count_top_sums", count_and_replace)
    with pytest.raises(UserError, match="valid.json was replaced while it was read"):
        pseudo_label.main(automatic(makers, judges))
    assert not (makers.folder / "manifest.json").exists()


def test_the_real_precision_stands_beside_the_expected_one(makers, tmp_path, monkeypatch):
    truths = votes_of(makers).argmax(1).astype(np.uint8)
    truths[:, :128] = 11  # half of the pixels
    monkeypatch.setattr(pseudo_label, "truth_file", lambda data, truth: truth)
    monkeypatch.setattr(pseudo_label, "load_truths", lambda path, test, paint: truths)
    pseudo_label.main(makers.args("--rule", "pixel", "--confident", "0.45", "--truth", str(tmp_path)))
    manifest, labels = common.read_json(makers.folder / "manifest.json"), np.load(makers.folder / "labels.npy")
    kept = labels[[keep == "1" for keep in keeps(makers)]]
    assert len(kept)
    right = truths[[keep == "1" for keep in keeps(makers)]] == kept
    foreground = (kept > 0) & (kept != IGNORE_INDEX)
    assert manifest["labels"][-1]["pixels"] == foreground.sum()
    assert manifest["labels"][-1]["real"] == pytest.approx(right[foreground].mean())
    for c, row in enumerate(manifest["labels"][:-1]):
        assert row["real"] == (pytest.approx(right[kept == c].mean()) if (kept == c).any() else None)
