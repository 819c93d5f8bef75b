"""ensemble.py against slow implementations of the same, on small votes by hand and on stores by hand."""
import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from contextlib import redirect_stdout
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_folder, seal, write_coco, write_store
from demo_data import choose_classes, draw_split
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

import common
import ensemble
import train
from common import SUBMIT_SIZE, UserError, image_miou

SIDE = 16  # of the images of a FakeOof, in place of SUBMIT_SIZE


@pytest.fixture
def small(monkeypatch):
    for module in (common, ensemble):
        monkeypatch.setattr(module, "SUBMIT_SIZE", SIDE)
    monkeypatch.setattr(ensemble, "FEW_IMAGES", 1)


def set_steps(monkeypatch, steps):
    for module in (common, ensemble):  # the one applies them, the other has them fitted
        monkeypatch.setattr(module, "STEPS_AFTER_VOTE", steps)


class FakeOof(Namespace):
    """What OutOfFold offers, of probs uint8 [M, N, C, SIDE, SIDE]; member m has predicted image n where has[m, n]."""

    def __init__(self, probs, truths, parts, has=None, **info):
        n_members, n_images, n_classes = probs.shape[:3]
        plain = {"model": "m", "scale": 64, "round": 0, "tta": "flip", "seed": 0, "checkpoints": ["model.pt"]}
        super().__init__(
            names=[f"member {m}" for m in range(n_members)], classes=[f"class {c}" for c in range(n_classes)],
            ids=list(range(n_images)), truths=truths, parts=np.array(parts), title="out of fold", all=probs,
            contaminated=False, tables=[], used={}, cache=tempfile.gettempdir(),
            has=np.ones((n_members, n_images), bool) if has is None else has,
            infos=[plain | {key: values[m] for key, values in info.items()} for m in range(n_members)])

    def probs(self, n):
        return {m: image[n] for m, image in enumerate(self.all) if self.has[m, n]}


def random_truths(rng, n_images, n_classes):
    """uint8 [N, SIDE, SIDE] in blocks of 4 x 4."""
    return rng.integers(0, n_classes, (n_images, SIDE // 4, SIDE // 4), dtype=np.uint8).repeat(4, 1).repeat(4, 2)


def one_hot(masks, n_classes, value=200):
    """uint8 [N, C, SIDE, SIDE] probabilities that say the masks."""
    return ((masks[:, None] == np.arange(n_classes)[:, None, None]) * value).astype(np.uint8)


def blurred(rng, truths, n_classes, right):
    """Probabilities that say the truth on about the share `right` of the pixels."""
    noise = rng.integers(0, 150, (len(truths), n_classes, SIDE, SIDE))
    sure = rng.random((len(truths), 1, SIDE, SIDE)) < right
    return (noise + one_hot(truths, n_classes, 100) * sure).astype(np.uint8)


def slow_v3(preds, truths):
    """By scikit-learn, image by image."""
    return np.mean([jaccard_score(t.ravel(), p.ravel(), labels=np.union1d(t, p), average="macro")
                    for p, t in zip(preds, truths, strict=True)])


def slow_v2(preds, truths):
    """By scikit-learn, of all pixels together."""
    truths, preds = np.ravel(truths), np.ravel(preds)
    return jaccard_score(truths, preds, labels=np.union1d(truths, preds), average="macro")


def slow_score(preds, truths):
    """What is fitted for."""
    return slow_v2(preds, truths) + slow_v3(preds, truths)


def slow_vote(images, weights, n_classes, least_share=0):
    """The mask of one image, pixel by pixel: the first of the classes with the largest sum, of those that stay."""
    def winners(classes):
        pred = np.zeros((SIDE, SIDE), np.uint8)
        for y, x in product(range(SIDE), repeat=2):
            totals = [sum(weights[m] * float(image[c, y, x]) for m, image in images.items()) for c in classes]
            pred[y, x] = classes[totals.index(max(totals))]
        return pred
    pred = winners(range(n_classes))
    areas = [(pred == c).sum() for c in range(n_classes)]
    return winners([c for c in range(n_classes) if c == 0 or areas[c] >= least_share * max(areas[1:])])


V3 = Namespace(metric="v3", batch=2)


def no_tables(tmp_path=None):
    return Namespace(tables=tmp_path, batch=2)


def chosen(oof, weights=None, fit=True, metric="v3", post="fit", batch=2):
    """(what is used, counts, {name of what was tried: row})."""
    _, thumbs, truths, _ = ensemble.survey(oof)
    args = Namespace(weights="fit" if fit else "equal", metric=metric, post=post, batch=batch)
    weights = np.ones(len(oof.names)) if weights is None else weights
    used, counts, tried = ensemble.choose(args, oof, thumbs, truths, weights)
    return used, counts, {row["tried"]: row for row in tried}


# ---- scores and votes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_quick_score_is_the_real_one(small, seed):
    rng = np.random.default_rng(seed)
    truths = random_truths(rng, 5, 4)
    probs = blurred(rng, truths, 4, 0.4)
    found = ensemble.score_of(probs.reshape(5, 4, -1), truths.reshape(5, -1).astype(int))
    assert found == pytest.approx(slow_score(probs.argmax(1), truths), abs=1e-12)


def test_votes_are_counted_as_a_plain_loop_counts_them(small):
    rng = np.random.default_rng(0)
    truths = random_truths(rng, 4, 3)
    truths[2, :5] = common.IGNORE_INDEX
    has = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]], bool)  # nobody has predicted the last
    oof = FakeOof(rng.integers(0, 256, (3, 4, 3, SIDE, SIDE), dtype=np.uint8), truths, [0, 0, 1, 1], has)
    weights = [[1, 1, 1], [2, 0, 1], [0, 0, 1], [1, 1, 1], [0.3, 0.5, 0.2]]
    shares = [0, 0, 0, 0.5, 1]
    masks, vote_of = ensemble.keep_votes(oof, weights, shares)
    found = ensemble.equal_vote_counts(oof, weights[:3])
    for k, n in product(range(5), range(4)):
        pred, labelled = slow_vote(oof.probs(n), weights[k], 3, shares[k]), truths[n] < 3
        assert (masks[n, vote_of[k]] == pred).all(), (k, n)
        if k < 3:
            expected = confusion_matrix(truths[n][labelled], pred[labelled], labels=range(3))
            assert (found[k, n] == expected).all(), (k, n)
    assert (found[0] != found[1]).any() and not found[:, 3, :, 1:].any() and not masks[3].any()


def test_a_class_below_the_least_share_gives_its_pixels_to_the_likeliest_that_stays():
    """4 pixels of class 1, 2 of class 2, 2 of the background; class 2 lies within an object, or beside it."""
    values = np.float32([[2, 2, 2, 2, 1, 3, 9, 9], [8, 8, 8, 8, 2, 1, 0, 0], [1, 1, 1, 1, 7, 7, 0, 0]])
    pred = values.argmax(0).astype(np.uint8)
    assert pred.tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    for least_share, expected in ((0, pred), (0.5, pred), (0.51, [1, 1, 1, 1, 1, 0, 0, 0]), (1, [1] * 5 + [0] * 3)):
        found = ensemble.drop_small(values, pred, least_share)
        assert found.dtype == np.uint8 and found.tolist() == list(expected), least_share
    background = np.zeros(8, np.uint8)
    assert ensemble.drop_small(np.float32([[1] * 8, [0] * 8, [0] * 8]), background, 0.5).tolist() == [0] * 8


def test_a_least_share_is_fitted_where_stray_classes_cost_score():
    truths = np.tile(np.uint8([1] * 60 + [0] * 40), (4, 1))
    total = ((truths[:, None] == np.arange(3)[:, None]) * 5).astype(np.float32)
    assert ensemble.fit_least_share(total, truths) == 0
    total[:, 2, 50:60] = 9  # a sixth of the object is taken for class 2, a fifth of what is left of it
    assert ensemble.fit_least_share(total, truths) == 0.35


def test_what_few_images_have_is_shrunk_towards_nothing():
    counts = np.zeros((30, 5, 5), int)
    counts[:, 0, 0], counts[:4, 1, 0], counts[4:10, 0, 1], counts[:, 2, 2], counts[0, 3, 3] = 9, 1, 1, 1, 1
    assert common.shrink(np.array([7, 1, -2, 11, 5.0]), counts).tolist() == [7 * 30 / 40, 0.5, -1.5, 1, 0]


def test_a_survey_counts_each_member_where_it_has_predicted_and_thins_its_probabilities(small):
    rng = np.random.default_rng(1)
    has = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0]], bool)
    oof = FakeOof(rng.integers(0, 256, (3, 3, 4, SIDE, SIDE), dtype=np.uint8), random_truths(rng, 3, 4), [0, 1, 2], has)
    counts, thumbs, truths, apart = ensemble.survey(oof)
    preds = oof.all.argmax(2)
    for m, n in product(range(3), range(3)):
        if has[m, n]:
            assert (counts[m, n] == confusion_matrix(oof.truths[n].ravel(), preds[m, n].ravel(), labels=range(4))).all()
            assert thumbs[m, n].tolist() == oof.all[m, n][:, 2::4, 2::4].reshape(4, -1).tolist()
        else:
            assert not counts[m, n].any() and not thumbs[m, n].any()
    assert truths.tolist() == oof.truths[:, 2::4, 2::4].reshape(3, -1).tolist()
    for a, b in product(range(3), range(3)):
        both = [n for n in range(3) if has[a, n] and has[b, n]]
        expected = np.mean([(preds[a, n] != preds[b, n]).mean() for n in both]) if both else np.nan
        assert apart[a, b] == pytest.approx(expected, nan_ok=True)


def test_thumbnails_keep_within_their_bound(small, monkeypatch):
    rng = np.random.default_rng(1)
    oof = FakeOof(rng.integers(0, 256, (2, 3, 4, SIDE, SIDE), dtype=np.uint8), random_truths(rng, 3, 4), [0, 1, 2])
    monkeypatch.setattr(ensemble, "THUMBNAILS", 3 * 4 * (2 + 8) * 4)
    assert ensemble.survey(oof)[1].shape == (2, 3, 4, 4)
    monkeypatch.setattr(ensemble, "THUMBNAILS", 3 * 4 * (2 + 8) * 4 - 1)
    assert ensemble.survey(oof)[1].shape == (2, 3, 4, 1)


# ---- the hard vote --------------------------------------------------------------------------------------------------


def slow_majority(preds, weights):
    """Exactly, pixel by pixel: of the classes with the most weight that of the heaviest voter, of equals the first."""
    result = np.zeros(preds.shape[1:], int)
    for place in np.ndindex(result.shape):
        votes, total = [int(pred[place]) for pred in preds], {}
        for vote, weight in zip(votes, weights, strict=True):
            total[vote] = total.get(vote, 0) + weight
        tied = [(-weights[m], m, votes[m]) for m in range(len(votes)) if total[votes[m]] == max(total.values())]
        result[place] = min(tied)[2]
    return result


@given(arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 5)), elements=st.integers(0, 3)),
       st.lists(st.sampled_from(["0", "0.1", "0.2", "0.3", "0.5", "0.7", "1", "2", "3"]), min_size=6, max_size=6))
def test_the_majority_is_that_of_a_slow_count_also_in_ties(preds, texts):
    exact = [Fraction(text) for text in texts[:len(preds)]]
    if sum(exact):
        found = ensemble.majority(preds, np.array([float(weight) for weight in exact]))
        assert found.dtype == np.uint8 and (found == slow_majority(preds, exact)).all()


@pytest.mark.parametrize(("votes", "weights", "winner"), [
    ([1, 2], [1, 1], 1), ([2, 1], [1, 1], 2), ([1, 2], [1, 2], 2), ([3, 2, 2], [2, 1, 1], 3), ([2, 2, 3], [1, 1, 2], 3),
    ([3, 2, 2], [0.3, 0.1, 0.2], 3), ([2, 2, 3], [0.1, 0.2, 0.3], 3), ([1, 2, 2, 1], [1, 1, 1, 1], 1),
    ([5, 1, 2, 2, 1], [1] * 5, 1), ([0, 7, 7], [1, 1, 1], 7), ([4], [3], 4), ([1, 2, 2], [0, 1, 0], 2)])
def test_ties_go_to_the_heavier_voter_and_of_equals_to_the_first(votes, weights, winner):
    assert ensemble.majority(np.uint8(votes)[:, None, None], np.array(weights, float)).tolist() == [[winner]]


@given(arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(3), st.just(3)), elements=st.integers(0, 200)))
def test_masks_survive_encoding_writing_and_reading(tmp_path_factory, masks):
    path, names = tmp_path_factory.mktemp("s") / "s.csv", [f"a,{i}" for i in range(len(masks))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "SUBMIT_SIZE", 3)
        ensemble.write_submission(path, names, masks, 201)
        rows = list(ensemble.read_submission(path, names, 201))
    assert [fault for fault, _ in rows] == [None] * len(masks)
    assert all((pred == mask).all() for (_, pred), mask in zip(rows, masks, strict=True))


# ---- what is fitted -------------------------------------------------------------------------------------------------


def slow_greedy(thumbs, truths):
    """Caruana's selection with replacement, until nothing gains in v2 + v3 or 30 are picked."""
    chosen, best = [], -1
    while len(chosen) < 30:
        tries = []
        for m in range(len(thumbs)):
            total = sum(thumbs[k].astype(int) for k in [*chosen, m])
            tries.append(slow_score(total.argmax(1), truths))
        if max(tries) <= best + 1e-12:
            break
        best = max(tries)
        chosen.append(next(m for m, value in enumerate(tries) if value >= best - 1e-12))
    return [chosen.count(m) / len(chosen) for m in range(len(thumbs))]


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_those_of_a_slow_greedy_selection(seed):
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, 3, (6, 20))
    right = (truths[:, None] == np.arange(3)[:, None]) * 60
    thumbs = (rng.integers(0, 150, (4, 6, 3, 20)) + right).astype(np.uint8)
    found = ensemble.fit_weights(thumbs, truths)
    assert found.tolist() == pytest.approx(slow_greedy(thumbs, truths)) and (found > 0).sum() > 1


def test_the_selection_ends_after_so_many_picks(monkeypatch):
    rising = iter(range(1000))
    monkeypatch.setattr(ensemble, "score_of", lambda *_: next(rising))
    assert ensemble.fit_weights(np.zeros((2, 1, 2, 1), np.uint8), None).tolist() == [0, 1] and next(rising) == 60


def test_the_search_takes_each_class_in_turn_to_the_best_value_of_the_grid():
    goal = np.array([9, 3, -1, 0.5])
    values = common.coordinate_search(np.zeros(4), (-1, 1, 2, 3), lambda values: -abs(values - goal).sum())
    assert values.tolist() == [0, 3, -1, 0]  # background stays, and the last is as far from 1 as from 0


@pytest.mark.parametrize("seed", range(3))
def test_an_area_is_the_best_of_its_grid_for_two_classes(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(common, "HALF_TRUSTED", 0)
    truths, preds = (rng.random((2, 9, 20, 20)) < rng.random((2, 9, 1, 1))).astype(np.uint8)
    area = common.fit_min_area(preds, truths, 2)
    tries = {a: slow_score([p if p.sum() >= a else np.zeros_like(p) for p in preds], truths) for a in common.AREAS}
    assert tries[area[1]] == pytest.approx(max(tries.values())) and area[0] == 0


def test_the_interval_is_that_of_a_slow_bootstrap():
    values = np.random.default_rng(5).normal(size=13)
    means = []
    for draw in np.random.default_rng(0).integers(13, size=(200, 13)):
        means.append(sum(float(values[i]) for i in draw) / 13)
    means.sort()

    def percentile(share):
        place = share * 199
        low = math.floor(place)
        return means[low] + (place - low) * (means[low + 1] - means[low])
    assert ensemble.bootstrap_interval(values, 200).tolist() == pytest.approx([percentile(0.025), percentile(0.975)])
    before, after = np.random.default_rng(6).integers(0, 9, (2, 13, 3, 3))
    gains = image_miou(after) - image_miou(before)
    row = ensemble.gain(after, before)
    assert [row["gain"], row["low"], row["high"]] == pytest.approx(
        [gains.mean(), *ensemble.bootstrap_interval(gains)])


# ---- what is taken --------------------------------------------------------------------------------------------------


def test_fitted_weights_find_the_good_member(small):
    rng = np.random.default_rng(0)
    truths = random_truths(rng, 30, 4)
    oof = FakeOof(np.stack([blurred(rng, truths, 4, right) for right in (0.1, 0.9, 0.1)]), truths, np.arange(30) % 3)
    used, counts, tried = chosen(oof)
    assert tried["fitted weights"]["taken"] == "yes" and used["weights"][1] > 0.5
    assert image_miou(counts["with what is taken"]).mean() > image_miou(counts["soft vote, equal weights"]).mean()
    assert "fitted weights" not in chosen(oof, fit=False)[2]
    assert chosen(oof, np.array([3, 1, 1.0]), fit=False)[0]["weights"].tolist() == [3, 1, 1]


def test_votes_are_kept_elsewhere_where_the_cache_cannot_be_written(small, tmp_path):
    truths = random_truths(np.random.default_rng(0), 4, 3)
    probs = (truths[:, None] == np.arange(3)[:, None, None])[None].astype(np.uint8)
    oof = FakeOof(probs, truths, np.arange(4) % 2)
    oof.cache = tmp_path / "gone"  # like a folder of somebody else, which root could write
    masks, vote_of = ensemble.keep_votes(oof, np.ones((3, 1)), np.zeros(3))
    assert (masks[:, 0] == truths).all() and vote_of.ravel().tolist() == [0, 0, 0] and not any(tmp_path.iterdir())


def test_equal_weights_win_where_the_interval_spans_zero(small):
    rng = np.random.default_rng(10)
    truths = random_truths(rng, 6, 3)
    oof = FakeOof(np.stack([blurred(rng, truths, 3, r) for r in (0.6, 0.5, 0.2)]), truths, np.arange(6) % 3)
    used, _, tried = chosen(oof)
    row = tried["fitted weights"]
    assert row["taken"] == "no" and row["v3 low"] < 0 < row["v3 gain"] and used["weights"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("n_images, is_taken", [(9, False), (10, True)])
def test_of_too_few_images_nothing_is_taken(n_images, is_taken):
    wrong, right = (Namespace(counts=np.array([counts] * n_images)) for counts in ([[9, 0], [9, 0]], [[9, 0], [0, 9]]))
    tried = []
    assert (ensemble.take_best({"step": right}, wrong, V3, tried) is right) == is_taken
    assert tried[0]["v3 gain"] == pytest.approx(0.75) and math.isnan(tried[0]["v3 low"]) != is_taken


def option_of(*changes):
    """(before, after) of 40 images of 3 classes as Options have them; changes: how many pixels of class 1 and of 2
    of an image's 10 become right, for the first 20 images and for the others.
    """
    counts = []
    for right in changes:
        counts.append([[[90, 5, 5], [5 - right[0], 5 + right[0], 0], [5 - right[1], 0, 5 + right[1]]]] * 20)
    after = np.concatenate(counts)
    before = np.array([[[90, 5, 5], [5, 5, 0], [5, 0, 5]]] * 40)
    return Namespace(counts=before), Namespace(counts=after)


def test_what_gains_in_one_score_and_loses_in_the_other_by_more_than_chance_is_not_taken():
    silent = np.array([[[96, 4, 0], [5, 5, 0], [10, 0, 0]]] * 40)  # class 2 in no prediction of images without it
    without = np.array([[[98, 1, 1], [0, 0, 0], [0, 0, 0]]] * 60)
    before = Namespace(counts=np.concatenate([option_of((0, 0), (0, 0))[0].counts, without]))
    quiet = np.array([[[100, 0, 0], [0, 0, 0], [0, 0, 0]]] * 60)
    after = Namespace(counts=np.concatenate([silent, quiet]))
    tried = []
    assert ensemble.take_best({"silence": after}, before, V3, tried) is before
    row, = tried
    assert row["v3 low"] > 0 > row["v2 high"] and row["taken"] == "no"
    both = Namespace(counts=np.concatenate([option_of((3, 3), (3, 3))[1].counts, quiet]))
    assert ensemble.take_best({"silence": after, "both": both}, before, V3, []) is both
    assert ensemble.take_best({"both": both}, before, Namespace(metric="v2", batch=2), []) is both


def test_of_what_is_no_more_than_chance_apart_the_simplest_is_taken():
    before, simple = option_of((0, 0), (3, 3))
    _, lucky = option_of((0, 1), (3, 3))
    lucky.counts[1:20] = before.counts[1:20]  # better on one image alone
    _, better = option_of((3, 3), (3, 3))
    assert ensemble.take_best({"simple": simple, "lucky": lucky}, before, V3, []) is simple
    assert ensemble.take_best({"simple": simple, "lucky": lucky, "better": better}, before, V3, []) is better


def test_the_metric_names_the_score_that_must_gain():
    before, same_v3 = option_of((0, 0), (0, 0))
    tried = []
    ensemble.take_best({"nothing": same_v3}, before, Namespace(metric="v2", batch=2), tried)
    assert [*tried[0]] == ["tried", "v2 gain", "v2 low", "v2 high", "v3 gain", "v3 low", "v3 high", "taken"]
    assert tried[0]["taken"] == "no"  # it gains nothing


@pytest.mark.parametrize("metric", ["v3", "v2", "v1"])
def test_what_is_fitted_for_by_each_metric(metric):
    counts = np.array([[[4, 0], [2, 2]], [[2, 0], [2, 0]]])  # [image, truth, prediction]
    v3 = ((4 / 6 + 2 / 4) / 2 + (2 / 4 + 0) / 2) / 2
    v2 = (6 / 10 + 2 / 6) / 2
    wanted = {"v3": v2 + v3, "v2": v2, "v1": v2 + v2}[metric]  # of one batch v1 is v2
    assert common.fit_score(counts, metric, batch=2) == pytest.approx(wanted)
    alone = {"v3": v2 + v3, "v2": v2, "v1": v2 + v3}[metric]  # of batches of one image it is v3
    assert common.fit_score(counts, metric, batch=1) == pytest.approx(alone)


def test_a_gain_in_v1_is_of_batches_and_has_their_interval():
    rng = np.random.default_rng(0)
    before = rng.integers(1, 50, (40, 3, 3))
    after = before + rng.integers(0, 9, (40, 1, 1)) * np.eye(3, dtype=int)
    batches = [np.stack([counts[i:i + 4].sum(0) for i in range(0, 40, 4)]) for counts in (after, before)]
    assert ensemble.gain(after, before, "v1", 4) == ensemble.gain(*batches, "v3")
    assert math.isnan(ensemble.gain(after, before, "v1", 5)["low"])  # 8 batches are too few
    assert not math.isnan(ensemble.gain(after, before, "v3")["low"])


@pytest.mark.parametrize("metric", ["v1", "v2", "v3"])
def test_all_that_is_fitted_gets_the_metric(small, monkeypatch, metric):
    asked = []
    monkeypatch.setattr(ensemble, "fit_score", lambda counts, metric, batch: asked.append((metric, batch)) or 0.0)

    def fit(preds, truths, n_classes, measure):
        measure(np.ones((2, 3, 3)))
        return [0.0]
    fit_weights = ensemble.fit_weights  # has a default for whoever calls it alone
    monkeypatch.setattr(ensemble, "fit_weights", lambda thumbs, truths, measure: fit_weights(thumbs, truths, measure))
    set_steps(monkeypatch, [("look", fit, lambda pred, params: pred)])
    probs, truths = stray(12, 5)
    _, _, tried = chosen(FakeOof(np.concatenate([probs, probs]), truths, np.arange(12) % 3), metric=metric, batch=3)
    assert set(asked) == {(metric, 3)}
    other = "v3" if metric == "v2" else "v2"
    assert all({f"{metric} gain", f"{other} gain"} < row.keys() for row in tried.values())


@pytest.mark.parametrize(("post", "names"), [
    ("fit", ["least share", "minimum area", "look twice", "least share + minimum area", "least share + look twice",
             "minimum area + look twice", "least share + minimum area + look twice"]),
    ("none", []), ("minimum-area", ["minimum area"]),
    ("look-twice,least-share", ["least share", "look twice", "least share + look twice"])])
def test_only_the_steps_that_post_names_are_tried(small, monkeypatch, post, names):
    steps = [("minimum area", common.fit_min_area, common.remove_small),
             ("look twice", lambda *args: [0.0], lambda pred, params: pred)]
    set_steps(monkeypatch, steps)
    assert [*chosen(FakeOof(*stray(30, 5), np.arange(30) % 3), post=post)[2]] == names


@pytest.mark.parametrize("post", ["", "fit,none", "minimum area", "least-share,", "area"])
def test_a_step_that_there_is_not_is_refused_by_name(tmp_path, capsys, post):
    with pytest.raises(SystemExit):
        ensemble.parse_args(["score", "--data", str(tmp_path), "--post", post, "a"])
    assert "in fit, none, least-share, minimum-area" in capsys.readouterr().err


def test_nothing_is_tried_after_the_vote_when_that_is_asked_for(small):
    used, counts, tried = chosen(FakeOof(*stray(30, 5), np.arange(30) % 3), post="none")
    assert tried == {} and used["least share"] == 0
    assert (counts["with what is taken"] == counts["soft vote, equal weights"]).all()


def stray(n_images, pixels):
    """(probs, truths): right everywhere but for `pixels` pixels that are taken for class 2, in a 3-class problem."""
    truths = np.zeros((n_images, SIDE, SIDE), np.uint8)
    truths[:, :8] = 1
    preds = truths.copy()
    preds.reshape(n_images, -1)[:, 200:200 + pixels] = 2
    return one_hot(preds, 3)[None], truths


def test_a_least_share_is_taken_where_it_does_what_areas_would(small):
    _, truths = stray(30, 0)
    preds = truths.copy()
    preds[:, 14, :6] = 2  # with one of the 4 x 4 pixels that shares are fitted on, of which class 1 has 8
    used, counts, tried = chosen(FakeOof(one_hot(preds, 3)[None], truths, np.arange(30) % 3))
    assert tried["least share"]["taken"] == "yes" and used["least share"] == 0.2
    assert (counts["with what is taken"].sum(0) == [[128 * 30, 0, 0], [0, 128 * 30, 0], [0, 0, 0]]).all()


def test_a_minimum_area_is_taken_when_stray_pixels_cost_score_and_not_otherwise(small, monkeypatch):
    monkeypatch.setattr(ensemble, "LEAST_SHARES", ())
    used, counts, tried = chosen(FakeOof(*stray(30, 5), np.arange(30) % 3))
    assert tried["minimum area"]["taken"] == "yes" and used["minimum area"][2] > 5
    assert used["minimum area"][0] == 0 and used["minimum area"][1] < SIDE * 8
    assert image_miou(counts["soft vote, equal weights"]).mean() == pytest.approx(0.66, abs=0.01)
    assert image_miou(counts["with what is taken"]).mean() > 0.97
    used, counts, tried = chosen(FakeOof(*stray(30, 0), np.arange(30) % 3))
    assert tried["minimum area"]["taken"] == "no" and used.keys() == {"weights", "least share"}
    assert not used["least share"]
    assert (counts["with what is taken"] == counts["soft vote, equal weights"]).all()


def memorising(n_images=30):
    """Probabilities of 3 members, each right on the images of one fold alone and wrong on the others."""
    rng = np.random.default_rng(0)
    truths, parts = random_truths(rng, n_images, 4), np.arange(n_images) % 3
    wrong = np.stack([one_hot((truths + 1 + m) % 4, 4, 90) for m in range(3)])
    knows = np.arange(3)[:, None] == parts
    return np.where(knows[:, :, None, None, None], one_hot(truths, 4, 80), wrong).astype(np.uint8), truths, parts


def test_weights_that_memorise_a_fold_gain_nothing_on_it(small):
    probs, truths, parts = memorising()
    oof = FakeOof(probs, truths, parts)
    _, thumbs, small_truths, _ = ensemble.survey(oof)
    fold_0 = parts == 0
    fitted = ensemble.fit_weights(thumbs[:, fold_0], small_truths[fold_0])
    assert fitted.tolist() == [1, 0, 0]  # whoever looks at the fold sees that one member knows it
    used, _, tried = chosen(oof)
    assert tried["fitted weights"]["taken"] == "no" and tried["fitted weights"]["v3 gain"] <= 0
    assert used["weights"].tolist() == [1, 1, 1]


def test_an_area_that_memorises_a_fold_gains_nothing_on_it(small):
    """In fold k alone class k + 1 is seen where there is none, in the other folds it is small and right."""
    n_images, parts = 30, np.arange(30) % 3
    truths, preds = np.zeros((2, n_images, SIDE, SIDE), np.uint8)
    for n, part in enumerate(parts):
        for c in (1, 2, 3):
            preds[n, 4 * c:4 * c + 2, :8] = c
            if c != part + 1:
                truths[n, 4 * c:4 * c + 2, :8] = c
    seen = common.fit_min_area(preds[parts == 0], truths[parts == 0], 4)
    assert seen[1] > 5 and not seen[2:].any()  # shrunk from 16 or more, by 10 images
    _, _, tried = chosen(FakeOof(one_hot(preds, 4)[None], truths, parts))
    assert tried["minimum area"]["taken"] == "no" and tried["minimum area"]["v3 gain"] <= 0


@pytest.fixture
def fits(monkeypatch):
    """{name: what each call of that fit returned}, and everything is taken whatever it gains."""
    found = {name: [] for name in ("fit_weights", "fit_least_share", "fit_min_area")}

    def recorded(name):
        fit = getattr(common if name == "fit_min_area" else ensemble, name)
        return lambda *args: found[name].append(fit(*args)) or found[name][-1]
    for name in ("fit_weights", "fit_least_share"):
        monkeypatch.setattr(ensemble, name, recorded(name))
    set_steps(monkeypatch, [
        ("minimum area", recorded("fit_min_area"), common.remove_small)])
    gain = ensemble.gain
    monkeypatch.setattr(ensemble, "gain", lambda *args: gain(*args) | {"low": 1.0, "high": 2.0})
    return found


@pytest.mark.parametrize("part", range(3))
def test_nothing_that_scores_a_fold_depends_on_its_truth_however_many_fits_stand_on_one_another(small, fits, part):
    rng = np.random.default_rng(3)
    truths, parts = random_truths(rng, 12, 4), np.arange(12) % 3
    probs = np.stack([blurred(rng, truths, 4, right) for right in (0.3, 0.5, 0.4)])
    chosen(FakeOof(probs, truths, parts))
    other = np.where((parts == part)[:, None, None], random_truths(rng, 12, 4), truths)
    chosen(FakeOof(probs, other.astype(np.uint8), parts))
    for name, results in fits.items():
        half = len(results) // 2  # areas are fitted after each of the two ways to vote
        assert half == 4 * {"fit_min_area": 2}.get(name, 1)
        before, after = results[:half][part::4], results[half:][part::4]
        assert np.array_equal(before, after), name
    assert any((b != a).any() for results in fits.values() for b, a in zip(results[:4], results[4:], strict=True))


def test_each_fold_is_scored_with_what_was_fitted_on_the_others_and_the_last_fit_is_used(small, fits):
    rng = np.random.default_rng(4)
    truths, parts = random_truths(rng, 9, 3), np.arange(9) % 3
    oof = FakeOof(np.stack([blurred(rng, truths, 3, right) for right in (0.2, 0.6)]), truths, parts)
    used, counts, tried = chosen(oof)
    taken, = {name for name, row in tried.items() if row["taken"] == "yes"} - {"fitted weights"}
    parts_taken = taken.split(" + ")
    shares, areas = [0] * 4, [np.zeros(3, int)] * 4
    if "least share" in parts_taken:
        shares = fits["fit_least_share"]
    if "minimum area" in parts_taken:
        first = 4 * ("least share" in parts_taken)
        areas = fits["fit_min_area"][first:first + 4]
    fits |= {"fit_least_share": shares, "fit_min_area": areas}
    assert tried["fitted weights"]["taken"] == "yes"
    for n, part in enumerate(parts):
        pred = slow_vote(oof.probs(n), fits["fit_weights"][part], 3, shares[part])
        n_pixels = np.bincount(pred.ravel(), minlength=3)
        pred = np.where(n_pixels[pred] >= areas[part][pred], pred, 0)
        assert (counts["with what is taken"][n] == confusion_matrix(
            truths[n].ravel(), pred.ravel(), labels=range(3))).all()
    for key, name in (("weights", "fit_weights"), ("least share", "fit_least_share"), ("minimum area", "fit_min_area")):
        assert np.all(used.get(key, 0) == fits[name][3])


def test_one_group_of_photos_has_no_other_part_so_nothing_is_tried(small):
    used, counts, tried = chosen(FakeOof(*stray(6, 5), np.zeros(6, int)))
    assert tried == {} and used.keys() == {"weights", "least share"} and len(counts) == 3


# ---- steps after the vote -------------------------------------------------------------------------------------------

N_STEP_CLASSES = 5


def noisy(seed):
    """(preds, truths) uint8 [N, SIDE, SIDE]: blocks of which some are wrong, with stray pixels and holes."""
    rng = np.random.default_rng(seed)
    truths = random_truths(rng, 12, N_STEP_CLASSES)
    preds = np.where((rng.random((12, SIDE // 4, SIDE // 4)) < 0.2).repeat(4, 1).repeat(4, 2),
                     random_truths(rng, 12, N_STEP_CLASSES), truths)
    stray = rng.random(preds.shape) < rng.choice([0, 0.02, 0.1], (12, 1, 1))
    return np.where(stray, rng.integers(0, N_STEP_CLASSES, preds.shape), preds).astype(np.uint8), truths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("fit", "apply"), [step[1:] for step in ensemble.STEPS_AFTER_VOTE],
                         ids=[step[0] for step in ensemble.STEPS_AFTER_VOTE])
def test_each_step_keeps_what_a_mask_is_and_never_loses_on_the_images_that_it_was_fitted_on(fit, apply, seed):
    preds, truths = noisy(seed)
    before = preds.copy(), truths.copy()
    params = fit(preds, truths, N_STEP_CLASSES)
    assert (preds == before[0]).all() and (truths == before[1]).all()
    plain = json.loads(json.dumps(np.asarray(params).tolist(), allow_nan=False))
    after = [apply(pred.copy(), params) for pred in preds]
    for pred, by_plain in zip(after, [apply(pred.copy(), plain) for pred in preds], strict=True):
        assert type(pred) is np.ndarray and pred.dtype == np.uint8 and pred.shape == (SIDE, SIDE)
        assert pred.max() < N_STEP_CLASSES and (pred == by_plain).all()
    assert slow_v3(after, truths) >= slow_v3(preds, truths) - 1e-12


def test_the_names_of_the_steps_are_their_own():
    names = [name for name, _, _ in ensemble.STEPS_AFTER_VOTE]
    assert len(set(names)) == len(names) and not {*names} & {"weights", "least share"}


def fit_shift(preds, truths, n_classes, measure):
    """[shift, n_classes]: by how much all class ids are too high."""
    shifts = range(n_classes)
    v3 = [slow_v3((preds + n_classes - shift) % n_classes, truths) for shift in shifts]
    return [int(np.argmax(v3)), n_classes]


def apply_shift(pred, params):
    pred += params[1] - params[0]  # in place, which a step may do
    pred %= params[1]
    return pred


def test_every_combination_of_steps_is_tried_in_order_and_a_step_sees_what_those_before_it_made(small, monkeypatch):
    seen = []

    def fit(preds, truths, n_classes, measure):
        seen.append(preds.copy())
        return [0.0]
    set_steps(monkeypatch, [
        ("minimum area", common.fit_min_area, common.remove_small), ("look", fit, lambda pred, params: pred),
        ("shift", fit_shift, apply_shift)])
    monkeypatch.setattr(ensemble, "LEAST_SHARES", ())
    probs, truths = stray(12, 5)
    oof = FakeOof(probs, truths, np.arange(12) % 3)
    used, counts, tried = chosen(oof)
    names = ["least share", "minimum area", "look", "shift"]
    wanted = [" + ".join(some) for size in range(1, 5) for some in combinations(names, size)]
    assert list(tried) == wanted and len(seen) == 4 * 4  # what follows a step shares its fit
    alone, after_area = seen[:4], seen[8:12]
    assert all(((preds == 2).sum((1, 2)) == 5).all() for preds in alone) and not any((a == 2).any() for a in after_area)
    assert [len(preds) for preds in alone] == [8, 8, 8, 12]
    assert used.keys() == {"weights", "least share", "minimum area"}  # of equal gains the first
    assert image_miou(counts["with what is taken"]).mean() == pytest.approx(
        slow_v3([ensemble.apply_steps(pred.copy(), used) for pred in probs[0].argmax(1).astype(np.uint8)], truths))


@pytest.mark.parametrize("gains", [True, False])
def test_a_new_step_is_one_entry_and_tried_gated_applied_shown_and_reported(
        tiny_data, splits, tmp_path, capsys, monkeypatch, gains):
    """The votes are right but for their class ids, which are one too high; a step that lowers them is all it takes."""
    set_steps(monkeypatch, [
        ("minimum area", common.fit_min_area, common.remove_small),
        ("shift", fit_shift if gains else lambda *args: [3, 12], apply_shift)])
    runs = [write_run(run_folder(tmp_path / "out", 0, "unet/a", 64, fold), splits, np.random.default_rng(fold), fold,
                      right=200) for fold in (0, 1)]
    for run in runs:
        valid = run / "valid.npy"
        np.save(valid, np.roll(np.load(valid), 1, axis=1))
        seal(run / "valid.json")
    out, cache = tmp_path / "s.csv", tmp_path / "cache"
    run_ensemble(tiny_data, cache, "soft", "--out", out, "--tables", tmp_path / "tables", "--report",
                 tmp_path / "report.html", *runs)
    tried = pd.read_csv(tmp_path / "tables/tried.csv", index_col="tried")
    names = ["least share", "minimum area", "shift"]
    assert tried.index.tolist() == [" + ".join(some) for size in range(1, 4) for some in combinations(names, size)]
    assert (tried.loc["shift", "v3 low"] > 0) == gains
    taken, = tried.index[tried["taken"] == "yes"]
    assert ("shift" in taken) == gains
    printed, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert f"\n    shift: {'1, 12' if gains else 'none'}\n" in printed
    params = ["<td>1, 12</td>"] if gains else []
    for text in ("<td>shift</td>", "<td>least share + minimum area + shift</td>", *params):
        assert text in page.replace('<td class="short">', "<td>")
    vote = sum(np.load(run / "test.npy").astype(int) for run in runs)
    ids = np.array(read_ids(out)).reshape(4, SUBMIT_SIZE, SUBMIT_SIZE)
    if taken == "shift":
        assert (ids == (vote.argmax(1) + 11) % 12).all()
    assert not [path for path in cache.iterdir() if path.name.startswith("tmp")]  # the masks that were fitted on


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(small):
    """Left half class 1, right half class 2. A knows the left, B the right, C says class 1, without being sure."""
    truths = np.ones((4, SIDE, SIDE), np.uint8)
    truths[:, :, 8:] = 2
    probs = np.zeros((3, 4, 3, SIDE, SIDE), np.uint8)
    probs[0, :, 1, :, :8], probs[0, :, 0, :, 8:] = 200, 90
    probs[1, :, 2, :, 8:], probs[1, :, 0, :, :8] = 200, 90
    probs[2, :, 1] = 50
    return FakeOof(probs, truths, np.arange(4) % 2, model=["x", "x", "y"], scale=[64, 96, 64],
                   checkpoints=[["a"], ["a"], ["a"]])


def test_waterfall_axes_and_disagreement_by_hand(three, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ensemble, "FEW_IMAGES", 1)
    _, thumbs, truths, apart = ensemble.survey(three)
    ensemble.analyse(no_tables(tmp_path), three, thumbs, truths, apart)
    waterfall, axes, disagreement = (pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False)
                                     for name in ("waterfall", "axes", "disagreement"))
    assert waterfall["member"].tolist() == ["member 0", "member 1", "member 2"]
    assert waterfall["v3"].tolist() == pytest.approx([1 / 3, 1, 1])
    assert waterfall["gain"][0] == "" and [float(g) for g in waterfall["gain"][1:]] == pytest.approx([2 / 3, 0])
    assert axes["axis"].tolist() == ["model", "scale"] and axes["best alone"].tolist() == ["x", "64"]
    assert axes["v3"].tolist() == pytest.approx([1, 1 / 3])
    for key in ("gain", "low", "high"):
        assert axes[key].tolist() == pytest.approx([0, 2 / 3])
    assert disagreement[["1", "2", "3"]].values.tolist() == [[0, 1, 0.5], [1, 0, 1], [0.5, 1, 0]]
    out = capsys.readouterr().out
    assert "fold isn't here" in out and "nan" not in out.lower()


def test_snapshots_are_an_axis_and_without_axes_there_is_no_table_of_them(three, tmp_path, capsys):
    found = ensemble.survey(three)[1:]
    three.infos = [info | {"model": "x", "scale": 64} for info in three.infos]
    ensemble.analyse(no_tables(tmp_path), three, *found)
    assert "axes" not in capsys.readouterr().out and not (tmp_path / "axes.csv").exists()
    three.infos[1]["checkpoints"] = ["a", "b", "c"]
    ensemble.analyse(no_tables(tmp_path), three, *found)
    assert pd.read_csv(tmp_path / "axes.csv")["axis"].tolist() == ["epochs"]


def test_who_adds_what_is_asked_of_images_that_all_have_predicted(three, tmp_path, capsys):
    whole = three.has.copy()
    three.has[2, 3] = False
    _, thumbs, truths, apart = ensemble.survey(three)
    ensemble.analyse(no_tables(tmp_path), three, thumbs, truths, apart)
    found = [pd.read_csv(tmp_path / f"{name}.csv") for name in ("waterfall", "axes")]
    few = FakeOof(three.all[:, :3], three.truths[:3], three.parts[:3], whole[:, :3])
    few.infos = three.infos
    ensemble.analyse(no_tables(tmp_path / "few"), few, *ensemble.survey(few)[1:])
    for name, table in zip(("waterfall", "axes"), found, strict=True):
        pd.testing.assert_frame_equal(table, pd.read_csv(tmp_path / "few" / f"{name}.csv"))
    three.has = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]], bool)
    capsys.readouterr()
    ensemble.analyse(no_tables(tmp_path / "none"), three, *ensemble.survey(three)[1:])
    assert "no image was predicted by all members" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["disagreement.csv"]
    shares = pd.read_csv(tmp_path / "none/disagreement.csv")[["1", "2", "3"]].to_numpy()
    assert np.isnan(shares).tolist() == [[False, True, False], [True, False, False], [False] * 3]


# ---- real stores ----------------------------------------------------------------------------------------------------


def write_run(run, splits, rng, fold, n_folds=2, right=120, **info):
    """Both stores of one fold by a model that is the better the larger `right`."""
    train, test = splits
    ids = train.ids[fold::n_folds]
    truths = np.stack([train.truth(train.ids.index(i)) for i in ids])
    noise = rng.integers(0, 130, (len(ids), 12, 16, 16)).repeat(16, 2).repeat(16, 3)
    probs = noise + (truths[:, None] == np.arange(12)[:, None, None]) * right
    write_store(run, "valid", probs.astype(np.uint8), train, ids, fold=fold, **info)
    noise = rng.integers(0, 256, (len(test.ids), 12, 16, 16), dtype=np.uint8).repeat(16, 2).repeat(16, 3)
    write_store(run, "test", noise, test, fold=fold, **info)
    return run


@pytest.fixture(scope="module")
def experiments(tmp_path_factory, splits):
    """Folder with two experiments: "weak" of one member and "good" of two, on two folds; tests only read it."""
    root, rng = tmp_path_factory.mktemp("out"), np.random.default_rng(0)
    for exp, right, round_, models in (("weak", 40, 0, "a"), ("good", 120, 0, "ab"), ("good", 125, 1, "a")):
        for model, fold in product(models, (0, 1)):
            write_run(run_folder(root / exp, round_, f"unet/{model}", 64, fold), splits, rng, fold, right=right,
                      model=f"unet/{model}", round=round_)
    (root / "weak/report").mkdir()
    return root


def run_ensemble(data, cache, command, *args):
    ensemble.main(ensemble.parse_args([command, "--data", str(data), "--cache", str(cache), *map(str, args)]))


def runs_of(experiments, pattern):
    return sorted(experiments.glob(pattern))


# ---- experiments side by side ---------------------------------------------------------------------------------------


def slow_votes(runs, split, ids):
    """The equal vote uint8 [N, H, W] on the images `ids`: the mean of the members, each the mean of its folds."""
    preds = []
    for image_id in ids:
        members = {}
        for run in runs:
            info = common.read_json(run / f"{split}.json")
            if image_id in info["image_ids"]:
                probs = np.load(run / f"{split}.npy", mmap_mode="r")[info["image_ids"].index(image_id)]
                members.setdefault(run.parent, []).append(probs.astype(float))
        preds.append(np.mean([np.mean(folds, 0) for folds in members.values()], 0).argmax(0))
    return np.array(preds)


def check_gains(rows, label, v3s):
    """Check the columns of a v3 of a table against the scores [N] of the images in each experiment."""
    draws = np.random.default_rng(0).integers(len(v3s[0]), size=(2000, len(v3s[0])))
    for i, ending in product(range(1, len(v3s)), ("", " over first")):
        gains = v3s[i] - v3s[0 if ending else i - 1]
        interval = np.percentile(gains[draws].mean(1), (2.5, 97.5)) if len(gains) >= 10 else [math.nan, math.nan]
        assert rows.loc[i, [f"{label} {name}{ending}" for name in ("gain", "low", "high")]].tolist() == pytest.approx(
            [gains.mean(), *interval], abs=1e-9, nan_ok=True), (label, i, ending)


def test_each_experiment_is_set_against_the_one_before_and_the_first(
        tiny_data, cache, splits, experiments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(experiments)
    run_ensemble(tiny_data, cache, "compare", "--tables", tmp_path, "weak", "good/r0", "good")
    rows, out = pd.read_csv(tmp_path / "compare.csv"), capsys.readouterr().out
    train = splits[0]
    truths = np.stack([train.truth(i) for i in range(14)])
    votes = [slow_votes(runs_of(experiments, pattern), "valid", train.ids)
             for pattern in ("weak/r0/*/*/*/f*", "good/r0/*/*/*/f*", "good/r1/*/*/*/f*")]
    assert rows["experiment"].tolist() == ["weak", "good/r0", "good"]
    v3s = [np.array([slow_v3(pred[None], truth[None]) for pred, truth in zip(vote, truths, strict=True)])
           for vote in votes]
    v2 = [slow_v2(vote, truths) for vote in votes]
    assert rows["v3"].tolist() == pytest.approx([v3.mean() for v3 in v3s])
    assert rows["v2"].tolist() == pytest.approx(v2)
    check_gains(rows, "v3", v3s)
    assert rows["v2 gain"][1:].tolist() == pytest.approx(np.diff(v2))
    assert rows["v2 gain over first"][1:].tolist() == pytest.approx(np.array(v2[1:]) - v2[0])
    assert not [name for name in rows if "test" in name] and rows.loc[0].drop(["Unnamed: 0", "experiment"]).count() == 2
    assert (rows["v2 low"] <= rows["v2 high"])[1:].all() and "good/r1: 2 run(s) of 1 member(s), 14 images" in out
    cell = "{:+.3f} [{:.3f}, {:.3f}]".format(*rows.loc[1, ["v3 gain", "v3 low", "v3 high"]])
    assert re.search(rf"^2 +good/r0 {rows['v3'][1]:.4f} +{re.escape(cell)} ", out, re.M)
    assert "14 images that all of them held out" in out
    by_class = pd.read_csv(tmp_path / "compare-iou.csv")
    assert [*by_class] == ["class", "1", "2", "3", "gain", "low", "high"]
    present = [c for c in range(12) if (truths == c).any()]
    assert by_class["class"].tolist() == [train.classes[c] for c in present]
    for number, vote in enumerate(votes, 1):
        iou = jaccard_score(truths.ravel(), vote.ravel(), labels=present, average=None)
        assert by_class[str(number)].tolist() == pytest.approx(iou.tolist())
    assert by_class["gain"].tolist() == pytest.approx((by_class["3"] - by_class["1"]).tolist())
    assert by_class["low"].notna().tolist() == [sum((truth == c).any() for truth in truths) >= 10 for c in present]
    assert (by_class["low"] <= by_class["high"])[by_class["low"].notna()].all() and by_class["low"].notna().any()


@pytest.mark.parametrize(("a", "b", "verdict"), [
    ("weak", "good", "v3 gains, v2 gains"), ("good", "weak", "v3 loses, v2 loses"),
    ("good", "copy", "v3 same, v2 same")])
def test_a_verdict_is_given_for_each_step_in_the_last_round(tiny_data, cache, experiments, tmp_path, capsys,
                                                            monkeypatch, a, b, verdict):
    for name in (a, b):
        shutil.copytree(experiments / name.replace("copy", "good"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    run_ensemble(tiny_data, cache, "compare", a, b)
    out = capsys.readouterr().out
    assert f"\n{b} against {a}: {verdict}\n" in out and "good/r1: 2 run(s) of 1 member(s), 14 images" in out
    assert max(map(len, out.split("held out")[1].split("\nIoU")[0].splitlines()[1:])) <= 80


def test_a_verdict_is_by_the_intervals_and_leaves_out_what_is_not_known():
    row = {}
    for label, low, high in (("v3", -0.1, 0.2), ("v2", 0.1, 0.2), ("test v3", -0.2, -0.1), ("test v2", -0.2, 0),
                             ("v1", math.nan, math.nan), ("test v1", 0, 0), ("low", 0, 0.1)):
        row |= {f"{label} gain": low, f"{label} low": low, f"{label} high": high}
    row |= {"few gain": 0.1, "few low": math.nan, "few high": math.nan}
    said = ensemble.verdict(row, ["v3", "v2", "test v3", "test v2", "v1"])
    assert said == "v3 within chance, v2 gains, test v3 loses, test v2 within chance"
    assert ensemble.verdict(row, ["v1"]) == "" and ensemble.verdict(row, ["few", "low"]) == (
        "few too few images, low within chance")
    assert ensemble.verdict(row, ["test v1", "low"]) == "test v1 same, low within chance"


def test_few_images_have_no_interval_that_can_be_trusted():
    before, after = np.zeros((2, 12, 3, 3), np.int64)
    before[:, 0, 0] = after[:, 0, 0] = 9
    before[:9, 1, 0], after[:9, 1, 1], before[:, 2, 0], after[:, 2, 2] = 5, 5, 5, 5  # class 1 is in nine images
    rows = ensemble.compare_classes(Namespace(valid=[before, after], classes=["Background", "Can", "Cup"]))
    assert [math.isnan(row["low"]) for row in rows] == [False, True, False]
    assert [row["gain"] for row in rows] == pytest.approx([1 - 108 / (108 + 45 + 60), 1, 1])
    for metric in ("v2", "v3"):
        nine, ten = (ensemble.gain(after[:n], before[:n], metric) for n in (9, 10))
        assert math.isnan(nine["low"]) and math.isnan(nine["high"]) and 0 < ten["low"] <= ten["gain"] <= ten["high"]
        cells = re.fullmatch(r"\+0\.\d+ . \+0\.\d+ \[.*\]", f"{ensemble.gain_text(*nine.values())} . "
                             f"{ensemble.gain_text(*ten.values())}")
        assert cells, metric


def test_an_experiment_may_be_named_like_a_round(tiny_data, cache, experiments, tmp_path, capsys):
    shutil.copytree(experiments / "good", tmp_path / "r5")
    run_ensemble(tiny_data, cache, "compare", experiments / "good", tmp_path / "r5")
    assert "r5/r1: 2 run(s) of 1 member(s), 14 images" in capsys.readouterr().out


def test_only_the_images_that_all_held_out_are_compared(tiny_data, cache, splits, experiments, tmp_path, capsys):
    half, other = (write_run(run_folder(tmp_path / name, 0, "unet/a", 64, fold), splits,
                             np.random.default_rng(7), fold).parents[4] for name, fold in (("half", 0), ("other", 1)))
    run_ensemble(tiny_data, cache, "compare", "--tables", tmp_path, experiments / "weak", half, experiments / "good")
    assert "7 images that all of them held out" in capsys.readouterr().out
    ids = splits[0].ids[::2]
    truths = [splits[0].truth(splits[0].ids.index(i)) for i in ids]
    store = np.load(half / "r0/unet/a/s64/f0/valid.npy")
    assert pd.read_csv(tmp_path / "compare.csv")["v3"][1] == pytest.approx(slow_v3(store.argmax(1), truths))
    for wrong, told in (([half, other, experiments / "good"], "have no validation image in common"),
                        ([half, tmp_path / "nosuch"], "nosuch: no run with a valid.json"),
                        ([half], "takes two or more experiments"),
                        ([half, other, half / "r0"], "other.*half/r0: 2 of them are the round /.*half/r0$")):
        with pytest.raises(UserError, match=told):
            run_ensemble(tiny_data, cache, "compare", *wrong)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, tiny_data, cache):
    """Folder with data whose test.json has annotations, truth.json, and experiments one, two and none of test stores.

    one: member a on two folds; two: that and member b on one fold; none: as one, but with one test store alone.
    """
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(3)
    shutil.copytree(tiny_data, root / "data")
    chosen = choose_classes(18, 14, np.random.default_rng(0))
    images, annotations = draw_split(root / "again", chosen[14:], 14, 64, 0)
    coco = common.read_json(root / "data/test.json")
    assert coco["images"] == images
    common.write_json(root / "data/test.json", coco | {"annotations": annotations})
    fewer = [annotation for annotation in annotations if annotation["image_id"] != images[1]["id"]]
    common.write_json(root / "truth.json", coco | {"annotations": fewer})
    parts = common.load_data(root / "data", cache)
    truths = common.load_truths(root / "data/test.json", parts[1], "area")
    for exp, members in (("one", "aa"), ("two", "aab"), ("none", "aa")):
        for fold, model in zip((0, 1, 0), members, strict=False):
            run = run_folder(root / exp, 0, f"unet/{model}", 64, fold)
            write_run(run, parts, rng, fold, model=f"unet/{model}")
            noise = rng.integers(0, 130, (4, 12, 16, 16)).repeat(16, 2).repeat(16, 3)
            probs = noise + (truths[:, None] == np.arange(12)[:, None, None]) * {"a": 60, "b": 100}[model]
            write_store(run, "test", probs.astype(np.uint8), parts[1], fold=fold, model=f"unet/{model}")
    (root / "none/r0/unet/a/s64/f1/test.json").unlink()
    return root


@pytest.mark.parametrize("truth", ["truth.json", None])
def test_the_vote_of_all_folds_is_scored_on_labelled_test_photos(labelled, cache, tmp_path, capsys, monkeypatch, truth):
    monkeypatch.chdir(labelled)
    options = ["--tables", tmp_path, *(["--truth", truth] if truth else [])]
    shutil.copytree("one", "copy", dirs_exist_ok=True)
    run_ensemble("data", cache, "compare", *options, "one", "two", "none", "copy")
    rows, out = pd.read_csv(tmp_path / "compare.csv"), capsys.readouterr().out
    _, test = common.load_data(labelled / "data", cache)
    truths = common.load_truths(labelled / (truth or "data/test.json"), test, "area")
    votes = [slow_votes(runs_of(labelled, f"{exp}/r0/*/*/*/f*"), "test", test.ids) for exp in ("one", "two")]
    assert len(votes[0]) == 4 and (truths[1].any() if truth is None else not truths[1].any())
    v3s = [np.array([slow_v3(pred[None], mask[None]) for pred, mask in zip(vote, truths, strict=True)])
           for vote in votes]
    v2 = [slow_v2(vote, truths) for vote in votes]
    seen = [0, 1, 3]
    assert rows["test v3"][seen].tolist() == pytest.approx([v3s[i].mean() for i in (0, 1, 0)])
    assert rows["test v2"][seen].tolist() == pytest.approx([v2[i] for i in (0, 1, 0)])
    check_gains(rows, "test v3", v3s)
    assert rows["test v2 gain"][1] == pytest.approx(v2[1] - v2[0])
    assert rows[[name for name in rows if name.startswith("test ")]].loc[2].isna().all()
    assert np.isnan(rows["test v3 gain"][3]) and rows["test v3 gain over first"][3] == 0
    assert "none/r0/unet/a/s64/f1: no test.json" in out and "honest column for what folds" in out
    assert re.search(r"^ 3 +none +- +- +-$", out.replace("\n", "\n "), re.M)
    assert re.search(r"^two against one: v3 .*, test v3 too few images, test v2 too few images$", out, re.M)
    assert "test" not in re.search(r"^none against two: .*$", out, re.M)[0]


def test_without_labels_of_test_photos_a_truth_that_is_none_is_refused(tiny_data, cache, experiments):
    with pytest.raises(UserError, match="test.json: not a COCO file: it needs the lists images, categories, annot"):
        run_ensemble(tiny_data, cache, "compare", "--truth", tiny_data / "test.json", experiments / "good",
                     experiments / "weak")
    with pytest.raises(UserError, match="would be written over .*, which is read"):
        run_ensemble(tiny_data, cache, "compare", "--truth", "a.json", "--picture", "a.json", "a", "b")


def test_the_picture_of_experiments_is_a_light_png(tiny_data, cache, experiments, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.chdir(experiments)
    monkeypatch.setattr(ensemble, "draw_staircase", lambda axes, *args: drawn.append(args))
    run_ensemble(tiny_data, cache, "compare", "--tables", tmp_path, "--picture", tmp_path / "c.png", "weak", "good/r1")
    rows = pd.read_csv(tmp_path / "compare.csv")
    for (names, series, asides, title), metric in zip(drawn, ("v3", "v2"), strict=True):
        (label, steps), = series.items()
        assert names == ["1 weak", "2 good/r1"] and label == f"{metric} out of fold"
        ends = [rows[f"{metric} {end}"] + rows[metric] - rows[f"{metric} gain"] for end in ("low", "high")]
        np.testing.assert_allclose(steps, np.transpose([rows[metric], *ends]))
        assert not asides and title == ensemble.COMPARE_TITLE
    with Image.open(tmp_path / "c.png") as picture:
        assert round(picture.info["dpi"][0]) == 120 and picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_a_staircase_has_treads_at_the_scores_and_bars_around_them():
    axes = Figure().subplots()
    unknown = math.nan
    steps = [(0.4, unknown, unknown), ensemble.around(0.5, 0.1, 0.05, 0.2), (unknown,) * 3, (0.3, unknown, unknown),
             ensemble.around(0.2, -0.1, -0.3, 0.1)]
    ensemble.draw_staircase(axes, list("abcde"), {"v3": steps, "other": [(0.6, unknown, unknown)] * 5}, asides=[1])
    stairs = axes.patches[0].get_data()
    assert stairs.values.tolist() == pytest.approx([0.4, 0.4, unknown, 0.3, 0.2], nan_ok=True)
    assert stairs.edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]
    bars = [bar for bar in axes.collections[0].get_segments() if len(bar)]  # without those of NaN
    assert [bar[:, 1].tolist() for bar in bars] == [pytest.approx([0.45, 0.6]), pytest.approx([0.0, 0.4])]
    assert [round(bar[0, 0]) for bar in bars] == [1, 4]
    assert not any(len(bar) for bar in axes.collections[1].get_segments())
    assert axes.get_legend().get_title().get_text().endswith("\nhollow: only tried, the stairs go past it")
    ensemble.draw_staircase(axes, list("abcde"), {"v3": steps})
    assert "hollow" not in axes.get_legend().get_title().get_text()


@pytest.mark.parametrize("name", ["r{}", "experiment{}", "{} main/efficientnet-b3-512-strong-augmentation-lr5e-4"])
@pytest.mark.parametrize("n_steps", [2, 5, 9, 16])
def test_names_under_a_staircase_do_not_overlap(n_steps, name):
    figure = Figure((5.5, 5), layout="constrained")  # as narrow as a figure of a report
    axes = figure.subplots()
    names = [name.format(i) for i in range(n_steps)]
    ensemble.draw_staircase(axes, names, {"v3": [(0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.2) for i in range(n_steps)]})
    figure.savefig(io.BytesIO(), format="png")
    labels = axes.get_xticklabels()
    assert len({label.get_text() for label in labels}) == n_steps
    boxes = [label.get_window_extent() for label in labels]
    assert min(box.y0 for box in boxes) >= 0
    if labels[0].get_rotation():
        apart = (axes.transData.transform((1, 0)) - axes.transData.transform((0, 0)))[0]
        assert apart * math.sin(math.radians(labels[0].get_rotation())) > labels[0].get_fontsize() * figure.dpi / 72
    else:
        assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def status(data, cache, exp, models, rounds=0, pick_folds="0 1", epochs=4):
    """What status prints of these models on two folds: (the words of each line of its table, the lines below it)."""
    with redirect_stdout(io.StringIO()) as out:
        run_ensemble(data, cache, "status", "--exp", exp, "--nfolds", 2, "--rounds", rounds, "--models", models,
                     "--scales", 64, "--folds", "0 1", "--pick-models", models, "--pick-scales", 64, "--pick-folds",
                     pick_folds, f"--train-args=--epochs {epochs} --weights none")
    lines, end = out.getvalue().splitlines(), 1 + (rounds + 1) * len(models.split())
    return [line.split() for line in lines[:end]], lines[end:]


@pytest.fixture
def exp(tiny_data, cache, tmp_path):
    """An experiment with folds alone."""
    train.main(train.parse_args(["--check", "--data", str(tiny_data), "--cache", str(cache), "--folds", "2", "--exp",
                                 str(tmp_path / "exp")]))
    return tmp_path / "exp"


def write_log(path, epochs, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_csv(path, [{"epoch": i, "seconds": seconds} for i in range(epochs)])


def write_trained(data, cache, folder, model, fold, epochs, seconds):
    """A run by hand of an untrained model, as up to date as if train.py had made it."""
    write_log(folder / "log.csv", epochs, seconds)
    (folder / "model.pt").write_text("weights")
    splits, hashes = common.load_data(data, cache), common.Hashes(cache)
    args = train.parse_args(["--data", str(data), "--exp", str(folder.parents[4]), "--model", model, "--scale", "64",
                             "--fold", str(fold), "--folds", "2", "--epochs", str(epochs), "--weights", "none"])
    folds = common.folds_hash(splits[0].ids, common.load_folds(args.exp, splits[0], 2).tolist())
    recipe = common.run_recipe(args, splits[0].fingerprint, folds, hashes)
    common.write_json(folder / "config.json", common.provenance(recipe, common.run_code(recipe)) | {
        "files": {"model.pt": hashes(folder / "model.pt")}})


def test_status_says_which_runs_are_done_and_how_long_the_others_take(tiny_data, cache, exp):
    models = "unet/a", "unet/b"
    runs = {(model, fold): run_folder(exp, 0, model, 64, fold) for model, fold in product(models, (0, 1))}
    write_trained(tiny_data, cache, runs["unet/a", 0], "unet/a", 0, 4, 900)
    (runs["unet/a", 0] / "test.json").touch()
    write_trained(tiny_data, cache, runs["unet/a", 1], "unet/a", 1, 4, 1100)
    write_log(runs["unet/b", 0] / "log.csv", 3, 1800)
    for name in ("last.pt", "model.pt"):
        (runs["unet/b", 0] / name).touch()
    table, (left, *why) = status(tiny_data, cache, exp, "unet/a unet/b")
    assert table == [["f0", "f1"], ["r0/unet/a/s64", "done", "trained"], ["r0/unet/b/s64", "epoch", "3", "missing"]]
    assert left == "5 epochs are left: about 2 h 30 min of training, job after job"
    assert not any(f"{exp}/r0/unet/a/s64/f{fold}/model.pt:" in line for fold in (0, 1) for line in why)
    for fold in (0, 1):
        assert f"{exp}/r0/unet/b/s64/f{fold}/model.pt: it is missing or not whole" in why
    table, (left, *why) = status(tiny_data, cache, exp, "unet/a unet/b", epochs=2)
    assert table[1:] == [["r0/unet/a/s64", "stale", "stale"], ["r0/unet/b/s64", "epoch", "3", "missing"]]
    assert left.startswith("2 epochs are left: about 1 h 0 min") and any("epochs 4 -> 2" in line for line in why)
    table, (left, *_) = status(tiny_data, cache, exp, "unet/b", pick_folds="0", epochs=2)
    assert table == [["f0"], ["r0/unet/b/s64", "epoch", "3"]] and left.startswith("0 epochs are left: about 0 h 0 min")


@pytest.fixture
def asked(monkeypatch):
    """Scripts that a plan has asked for their arguments."""
    scripts, start = [], ensemble.start_script
    monkeypatch.setattr(ensemble, "start_script", lambda *args: (scripts.append(args[0]), start(*args))[1])
    return scripts


def plan(data, cache, exp, *more, train_args="--weights none", infer_args=""):
    with redirect_stdout(io.StringIO()) as out:
        run_ensemble(data, cache, "plan", "--exp", exp, "--nfolds", 2, *(
            word for name, value in (("models", "fpn/tu-test_efficientnet"), ("scales", 64), ("folds", "0 1"))
            for word in (f"--{name}", value, f"--pick-{name}", value)),
            f"--train-args={train_args}", f"--infer-args={infer_args}", *more)
    return out.getvalue().splitlines()


def test_a_plan_asks_each_script_for_its_arguments_once(tiny_data, cache, exp, tmp_path, monkeypatch, asked):
    own = shutil.copytree(cache, tmp_path / "cache")
    everything = ["infer.py", "pseudo_label.py", "train.py"]
    first = plan(tiny_data, own, exp, "--dry")
    assert sorted(asked) == everything and not (own / "arguments").exists()
    assert plan(tiny_data, own, exp) == first and sorted(asked) == sorted(everything * 2)
    asked.clear()
    assert plan(tiny_data, own, exp) == plan(tiny_data, own, exp, "--dry") == first and asked == []
    plan(tiny_data, own, exp, train_args="--weights none --lr 1e-3")
    plan(tiny_data, own, exp, "--gpus", 2)
    assert asked == ["train.py", *sorted(everything, key=["train.py", "infer.py", "pseudo_label.py"].index)]
    path = next((own / "arguments").glob("*/*"))
    path.write_text(path.read_text()[:20])  # as by a full disk
    asked.clear()
    for _ in range(2):
        plan(tiny_data, own, exp)
        plan(tiny_data, own, exp, train_args="--weights none --lr 1e-3")
        plan(tiny_data, own, exp, "--gpus", 2)
    assert len(asked) == 1
    monkeypatch.setattr(ensemble, "code_state", lambda: "edited")
    asked.clear()
    plan(tiny_data, own, exp, "--dry")
    assert sorted(asked) == everything and path.exists()
    plan(tiny_data, own, exp)
    assert sorted(asked) == sorted(everything * 2)
    assert [folder.name for folder in (own / "arguments").iterdir()] == ["edited"]  # of other code nothing is kept


def test_what_a_script_refuses_stops_the_plan_with_its_own_line(tiny_data, cache, exp, asked):
    for more, told in (
            ({"train_args": "--weights none --lr fast"}, "train.py: error: argument --lr: invalid float value: 'fast'"),
            ({"train_args": "--weights none --check"}, "TRAIN_ARGS sets --check"),
            ({"train_args": "--weights nosuch.pth"}, "--weights nosuch.pth: no such file or folder, and neither "),
            ({"infer_args": "--tta flipp"}, "infer.py: error: argument --tta")):
        with pytest.raises(UserError, match=f"^{re.escape(told)}[^\n]*$"):
            plan(tiny_data, cache, exp, **more)
    with pytest.raises(UserError, match="batch norm needs 2 images a process, of which there are 5"):
        plan(tiny_data, cache, exp, "--gpus", 5)
    assert sorted(path.name for path in exp.iterdir() if path.name[0] != ".") == ["data.html", "folds.csv"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_remembered_answer_does_not_outlive_its_file_of_weights(tiny_data, cache, exp, tmp_path, asked, is_folder):
    import timm
    import torch
    file = tmp_path / "test_efficientnet.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), file)
    weights, told = (tmp_path, "0 files are named after") if is_folder else (file, "no such file")
    for _ in range(2):
        plan(tiny_data, cache, exp, train_args=f"--weights {weights}")
    assert asked.count("train.py") == 1
    file.unlink()
    with pytest.raises(UserError, match=f"--weights {weights}: {told}"):
        plan(tiny_data, cache, exp, train_args=f"--weights {weights}")


@pytest.mark.parametrize("text", ["[]", '{"answer": {}, "hash": "0"}'])
def test_a_damaged_answer_is_asked_for_again(tiny_data, cache, exp, tmp_path, asked, text):
    own = shutil.copytree(cache, tmp_path / "cache")
    first = plan(tiny_data, own, exp)
    answers = list((own / "arguments").rglob("*.json"))
    for path in answers:
        path.write_text(text)
    asked.clear()
    assert plan(tiny_data, own, exp) == first and len(asked) == 3


@pytest.mark.parametrize(("name", "text"), [("index.json", "[]"), ("index.json", '{"train": {}, "test": {}}'),
                                            ("checksums.json", "{}")])
def test_a_plan_takes_no_damaged_cache_for_one(tiny_data, cache, exp, tmp_path, name, text):
    own = shutil.copytree(cache, tmp_path / "cache")
    expected = plan(tiny_data, own, exp)
    for path in own.rglob(name):
        path.write_text(text)
    assert {*expected} <= {*plan(tiny_data, own, exp)}


def test_status_names_a_damaged_log(tiny_data, cache, exp):
    folder = run_folder(exp, 0, "unet/a", 64, 0)
    write_log(folder / "log.csv", 2, "")
    with pytest.raises(UserError, match="f0/log.csv line 2: seconds is '', no number: mend or remove the file"):
        status(tiny_data, cache, exp, "unet/a")
    (folder / "log.csv").unlink()
    assert status(tiny_data, cache, exp, "unet/a")[0][1] == ["r0/unet/a/s64", "missing", "missing"]


def test_of_what_a_script_says_its_last_line_is_its_own_but_a_traceback_is_shown_whole():
    assert ensemble.own_line("some warning\n  of two lines\ntrain.py: error: x\n") == "train.py: error: x"
    for code in ("1 / 0", "def ("):
        done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
        assert ensemble.own_line(done.stderr) == done.stderr.rstrip() != ""


def test_a_script_that_is_killed_stops_the_plan_with_one_line(tiny_data, cache, exp, tmp_path, monkeypatch):
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(ensemble, "start_script", lambda *args: subprocess.Popen(
        killed, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    with pytest.raises(UserError, match="^a script ended without a word: out of memory, or killed$"):
        plan(tiny_data, shutil.copytree(cache, tmp_path / "cache"), exp, train_args="--weights none --lr 7e-4")


def test_status_of_what_nothing_is_known_of_yet(tiny_data, cache, exp):
    table, below = status(tiny_data, cache, exp, "unet/c", rounds=1)
    assert table == [["f0", "f1"], *([f"r{round_}/unet/c/s64", "missing", "missing"] for round_ in (0, 1))]
    assert not any("epochs are left" in line for line in below)
    assert f"{exp}/r0/unet/c/s64/f1/model.pt: it is missing or not whole" in below
    write_log(run_folder(exp, 0, "unet/c", 64, 1) / "last.csv", 1, 60)  # of one that has begun
    table, (left, *_) = status(tiny_data, cache, exp, "unet/c unet/d", rounds=1)
    assert table[1] == ["r0/unet/c/s64", "missing", "epoch", "1"]
    assert left.startswith("31 epochs are left: about 0 h 31 min")  # of others by those that are known


@pytest.mark.parametrize(("cell", "shown"), [
    ("=1+1", "'=1+1"), ("+a", "'+a"), ("-a", "'-a"), ("@a", "'@a"), ("a=1", "a=1"), ("", ""), (-0.5, "-0.5")])
def test_a_table_holds_nothing_that_a_spreadsheet_computes(tmp_path, cell, shown, capsys):
    args = Namespace(tables=tmp_path)
    ensemble.show(args, Namespace(tables=[], contaminated=False), "t", "title", {"class": [cell], "n": [-2]})
    with open(tmp_path / "t.csv", newline="") as f:
        assert list(csv.reader(f)) == [["class", "n"], [shown, "-2"]]
    assert "'" not in capsys.readouterr().out


def test_score_prints_every_table_and_keeps_it(tiny_data, cache, experiments, tmp_path, capsys):
    runs = [*runs_of(experiments, "good/r0/*/*/*/f*"), *runs_of(experiments, "weak/r0/*/*/*/f*")]
    run_ensemble(tiny_data, cache, "score", "--weights", "fit", "--tables", tmp_path / "report", *runs)
    out = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "axes.csv", "disagreement.csv", "iou.csv", "members.csv", "tried.csv", "waterfall.csv"]
    names = ["good/r0/unet/a/s64 flip", "good/r0/unet/b/s64 flip", "weak/r0/unet/a/s64 flip"]  # the folder is the title
    rows = pd.read_csv(tmp_path / "report/members.csv")
    assert rows["name"].tolist() == [*names, "soft vote, equal weights", "with what is taken", "all background"]
    assert all(name in out for name in rows["name"]) and f"runs in {experiments}; " in out
    assert rows["images"].tolist() == [14] * 6
    assert (rows["low"] <= rows["v3"]).all() and (rows["v3"] <= rows["high"]).all()
    waterfall = pd.read_csv(tmp_path / "report/waterfall.csv")
    assert sorted(waterfall["member"]) == names and waterfall["member"].iloc[-1] == names[2]
    tried = pd.read_csv(tmp_path / "report/tried.csv", index_col="tried")
    assert tried.index.tolist() == [
        "fitted weights", "least share", "minimum area", "least share + minimum area"]
    taken = tried[tried["taken"] == "yes"]
    assert (taken["v3 low"] > 0).all() and (taken["v2 high"] >= 0).all()


def test_a_member_without_some_folds_is_scored_on_what_it_covers(tiny_data, cache, splits, experiments, tmp_path):
    runs = [*runs_of(experiments, "good/r0/unet/a/*/f*"), *runs_of(experiments, "good/r0/unet/b/*/f1")]
    run_ensemble(tiny_data, cache, "score", "--weights", "fit", "--tables", tmp_path, *runs)
    rows = pd.read_csv(tmp_path / "members.csv")
    assert rows["images"].tolist() == [14, 7, 14, 14, 14]
    truths = [splits[0].truth(i) for i in range(1, 14, 2)]
    assert rows["v3"][1] == pytest.approx(slow_v3(np.load(runs[2] / "valid.npy").argmax(1), truths))


def test_one_fold_is_split_into_parts_that_keep_groups_whole(tmp_path):
    images = [{"id": i, "group": f"scene {i // 2}"} for i in range(8)]
    write_coco(tmp_path / "data", images, [(i, i % 2, [[0, 0, 0, 6, 6, 6, 6, 0]]) for i in range(8)])
    splits = common.load_data(tmp_path / "data", tmp_path / "cache")
    probs = np.random.default_rng(0).integers(0, 256, (8, 3, SUBMIT_SIZE, SUBMIT_SIZE), dtype=np.uint8)
    run = tmp_path / "unet/a/s64/f0"
    write_store(run, "valid", probs, splits[0])
    args = Namespace(data=tmp_path / "data", cache=tmp_path / "cache", mixed=False)
    parts = ensemble.OutOfFold(args, [run]).parts
    assert sorted(set(parts)) == [0, 1, 2, 3] and all(parts[i] == parts[i + 1] for i in range(0, 8, 2))


def test_stores_that_were_made_with_another_tta_are_another_member(tiny_data, cache, splits, tmp_path):
    rng = np.random.default_rng(0)
    runs = [write_run(tmp_path / f"unet/a/s64/f{fold}{tta}", splits, rng, fold, tta=tta)
            for tta in ("flip", "d4") for fold in (0, 1)]
    run_ensemble(tiny_data, cache, "score", "--tables", tmp_path, *runs)
    assert pd.read_csv(tmp_path / "members.csv")["name"].tolist()[:2] == ["s64 flip", "s64 d4"]
    assert pd.read_csv(tmp_path / "axes.csv")["axis"].tolist() == ["tta"]


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_soft_refuses_test_stores_made_otherwise_than_those_of_validation(tiny_data, cache, splits, tmp_path):
    run = write_run(tmp_path / "unet/a/s64/f0", splits, np.random.default_rng(0), 0)
    change_json(run / "test.json", tta="d4")
    with pytest.raises(UserError, match="the test stores are s64 d4, those of validation s64 flip"):
        run_ensemble(tiny_data, cache, "soft", "--out", tmp_path / "s.csv", run)
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize(("weights", "told"), [("1,2,3", "3 weights for 2 voters: "), ("1", "1 weights for 2 ")])
@pytest.mark.parametrize("command", ["soft", "score"])
def test_weights_that_are_not_one_for_each_member_are_refused(
        tiny_data, cache, experiments, tmp_path, command, weights, told):
    out = ["--out", tmp_path / "s.csv"] if command == "soft" else []
    with pytest.raises(UserError, match=told):
        run_ensemble(tiny_data, cache, command, "--weights", weights, *out, *runs_of(experiments, "good/r0/*/*/*/f*"))


@pytest.mark.parametrize("weights", ["-1,2", "0,0", "nan,1", "1,nan", "inf,1", "a,b", "1,,2", "", "fitted", "1,1e-5",
                                     "1e-46,1", "1e20,1e15,3"])
def test_weights_that_are_none_are_refused(weights, capsys):
    with pytest.raises(SystemExit):
        ensemble.parse_args(["score", "--data", "d", f"--weights={weights}", "run"])
    assert f"argument --weights: {weights}: weights are numbers from 0" in capsys.readouterr().err


def test_given_weights_decide_the_submission(tiny_data, cache, splits, experiments, tmp_path, monkeypatch):
    gain = ensemble.gain
    monkeypatch.setattr(ensemble, "gain", lambda *args: gain(*args) | {"low": -1.0})
    runs = runs_of(experiments, "good/r0/*/*/*/f*")[:3]
    run_ensemble(tiny_data, cache, "soft", "--weights", "1,3", "--out", tmp_path / "s.csv", *runs)
    a0, a1, b0 = (np.load(run / "test.npy").astype(float) for run in runs)
    total = ((a0 + a1) / 2 + 3 * b0).reshape(4, 12, -1)
    ids = np.array(read_ids(tmp_path / "s.csv"))
    assert (np.take_along_axis(total, ids[:, None], 1)[:, 0] > total.max(1) - 1e-3).all()
    for other in (a0 + a1 + b0, (a0 + a1) / 2 + b0, a0 + a1 + 3 * b0):
        assert (ids != other.reshape(4, 12, -1).argmax(1)).mean() > 0.02


@pytest.mark.parametrize("scale", ["1e-46", "5e-324", "1e-30", "1e30", "1e308"])
@pytest.mark.parametrize("command", ["soft", "hard"])
def test_weights_of_any_size_vote_by_their_ratio(tiny_data, cache, experiments, tmp_path, command, scale):
    runs = runs_of(experiments, "good/r0/*/*/*/f0")
    for name, weights in (("a", "1,1"), ("b", f"{scale},{scale}")):
        run_ensemble(tiny_data, cache, command, "--weights", weights, "--out", tmp_path / f"{name}.csv", *runs)
    assert read_ids(tmp_path / "a.csv") == read_ids(tmp_path / "b.csv") and any(map(any, read_ids(tmp_path / "a.csv")))


# ---- submissions that vote ------------------------------------------------------------------------------------------


def read_ids(path):
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, newline="") as f:
        return [[int(i) for i in row[1].split(" ")] for row in list(csv.reader(f))[1:]]


@pytest.fixture
def team(tmp_path, splits):
    """Three submissions, and their masks [3, N, 16, 16], of which each pixel stands for a block."""
    masks = np.random.default_rng(0).integers(0, 4, (3, 4, 16, 16), dtype=np.uint8)
    paths = [tmp_path / f"{name}.csv" for name in "abc"]
    for path, of_path in zip(paths, masks, strict=True):
        ensemble.write_submission(path, [str(i) for i in splits[1].ids], blocks(of_path), 12)
    return paths, masks


def blocks(masks):
    return masks.repeat(16, -1).repeat(16, -2)


@pytest.mark.parametrize("weights", ["1,1,1", "1,2,1", "0.1,0.2,0.3", "3,1,1", None])
def test_a_submission_is_made_from_submissions_alone(tiny_data, cache, tmp_path, team, weights):
    paths, masks = team
    run_ensemble(tiny_data, cache, "hard", "--out", tmp_path / "s.csv", *(["--weights", weights] if weights else []),
                 *paths)
    exact = [Fraction(w) for w in (weights or "1,1,1").split(",")]
    assert read_ids(tmp_path / "s.csv") == blocks(slow_majority(masks, exact)).reshape(4, -1).tolist()


def test_submissions_and_runs_vote_together(tiny_data, cache, experiments, tmp_path, team):
    paths, masks = team
    run, = runs_of(experiments, "weak/r0/unet/a/*/f0")
    run_ensemble(tiny_data, cache, "hard", "--out", tmp_path / "s.csv", run, *paths)
    own = np.load(run / "test.npy").argmax(1)[:, ::16, ::16]
    expected = blocks(slow_majority(np.stack([own, *masks]), [1] * 4))
    assert read_ids(tmp_path / "s.csv") == expected.reshape(4, -1).tolist()


def test_a_faulty_submission_is_named_and_nothing_is_written(tiny_data, cache, tmp_path, team):
    paths, _ = team
    lines = paths[1].read_text().splitlines()
    paths[1].write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    with pytest.raises(UserError, match="b.csv line 2: image"):
        run_ensemble(tiny_data, cache, "hard", "--out", tmp_path / "s.csv", *paths)
    paths[1].write_text("\n".join(lines[:3]) + "\n")
    with pytest.raises(UserError, match="b.csv line 4: image missing"):
        run_ensemble(tiny_data, cache, "hard", "--out", tmp_path / "s.csv", *paths)
    with pytest.raises(UserError, match="--weights fit: submissions have no out-of-fold"):
        run_ensemble(tiny_data, cache, "hard", "--weights", "fit", "--out", tmp_path / "s.csv", *paths)
    assert not (tmp_path / "s.csv").exists()


# ---- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import ensemble
ensemble.THUMBNAILS = 1
ensemble.main(ensemble.parse_args(sys.argv[2:]))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak(data, cache, runs, out):
    """Megabytes that soft takes at most, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, str(ROOT), "soft", "--data", str(data), "--cache", str(cache), "--out",
               str(out), *map(str, runs)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=-1, text=True)
    return int(done.stdout.split("peak ")[1])


def test_memory_stays_the_same_with_more_members(tmp_path):
    """Stores of 10 + 10 images, 33 MB for a member, as hard links of one; with mapped files the peak would grow."""
    write_coco(tmp_path / "data", [(i, 8, 8) for i in range(10)], [(0, 1, [[0, 0, 0, 6, 6, 6]])],
               categories=[(c, f"c{c}") for c in range(1, 25)], test_images=[(100 + i, 8, 8) for i in range(10)])
    splits = common.load_data(tmp_path / "data", tmp_path / "cache")
    runs = [tmp_path / f"{m}/s64/f0" for m in range(4)]
    for run in runs:
        for split, of_split in zip(("valid", "test"), splits, strict=True):
            write_store(run, split, np.zeros((1, 1), np.uint8), of_split)
            (run / f"{split}.npy").unlink()
            if run is runs[0]:
                np.lib.format.open_memmap(run / f"{split}.npy", "w+", np.uint8, (10, 25, SUBMIT_SIZE, SUBMIT_SIZE))
            else:
                os.link(runs[0] / f"{split}.npy", run / f"{split}.npy")
            seal(run / f"{split}.json")
    one, four = (peak(tmp_path / "data", tmp_path / "cache", some, tmp_path / "s.csv") for some in (runs[:1], runs))
    assert four - one < 40


@pytest.mark.parametrize(("option", "values"), [("paint", ["area", "id"]), ("unused", ["keep", "drop"])])
def test_experiments_that_read_the_data_in_two_ways_are_not_compared(
        tiny_data, cache, experiments, monkeypatch, option, values):
    real, read = ensemble.OutOfFold, []

    def out_of_fold(args, runs):
        oof = real(args, runs)
        oof.infos = [info | {option: values[len(read) == 2]} for info in oof.infos]
        read.append(runs)
        return oof
    monkeypatch.setattr(ensemble, "OutOfFold", out_of_fold)
    monkeypatch.chdir(experiments)
    with pytest.raises(UserError, match=f"^good has {option} {values[1]}, weak {values[0]}: their truths differ$"):
        run_ensemble(tiny_data, cache, "compare", "weak", "good/r0", "good")
