"""Test losses, metrics, TTA, stores, batches, augmentation, ClassMix, checkpoints, devices and how a script ends."""
import argparse
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import albumentations as A
import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import ROOT, run_folder, seal, write_store
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import confusion_matrix, jaccard_score

import common
from common import IGNORE_INDEX, SUBMIT_SIZE, UserError, make_loss

N_CLASSES = 4
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# ---- losses ---------------------------------------------------------------------------------------------------------

label_maps = arrays(np.uint8, st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
                    elements=st.sampled_from([*range(N_CLASSES), IGNORE_INDEX]))
seeds = st.integers(0, 2 ** 32 - 1)
WEIGHTS = [0.3, 1, 2.5, 0.7]
# (smoothing, weights) of the term over pixels
PIXEL_OPTIONS = [(0.0, None), (0.1, None), (0.0, WEIGHTS), (0.3, WEIGHTS)]


def random_logits(mask, seed, n_classes=N_CLASSES):
    b, h, w = mask.shape
    return np.random.default_rng(seed).normal(0, 2, (b, n_classes, h, w)).astype(np.float32)


def as_tensors(logits, mask):
    return torch.tensor(logits), torch.from_numpy(mask.astype(np.int64))


def loss_of(name, logits, mask, ratio=0.4, smoothing=0.0, weights=None):
    return make_loss(name, ratio, smoothing, weights if weights is None else torch.tensor(weights))(logits, mask)


def slow_iou(probs, true):
    """Return 1 - soft IoU of one class from its probability and truth at each pixel."""
    return 1 - sum(p for p, t in zip(probs, true, strict=True) if t) / sum(
        p + t - p * t for p, t in zip(probs, true, strict=True))


def slow_dice(probs, true):
    return 1 - 2 * sum(p for p, t in zip(probs, true, strict=True) if t) / (sum(probs) + sum(true))


def slow_lovasz(probs, true):
    """Return the Lovasz extension by its definition on sets.

    Errors, the largest first, are multiplied by what their pixel adds to 1 - IoU.
    """
    errors = {i: 1 - p if t else p for i, (p, t) in enumerate(zip(probs, true, strict=True))}
    truth, wrong, cost, total = {i for i, t in enumerate(true) if t}, set(), 0.0, 0.0
    for i in sorted(errors, key=errors.get, reverse=True):
        wrong.add(i)
        total += errors[i] * (len(wrong) / len(truth | wrong) - cost)
        cost = len(wrong) / len(truth | wrong)
    return total


# name -> (share of the term over regions, None where the ratio decides; that term for one class; focal's gamma)
SLOW = {"iou_ce": (None, slow_iou, 0), "ce": (0, None, 0), "iou": (1, slow_iou, 0), "dice_ce": (None, slow_dice, 0),
        "focal": (0, None, 2), "lovasz": (1, slow_lovasz, 0)}


def slow_loss(name, logits, mask, ratio=0.4, smoothing=0.0, weights=None):
    """Compute the loss by its formula, pixel by pixel in Python's floats."""
    share, region, gamma = SLOW[name]
    share = ratio if share is None else share
    weights = [1] * logits.shape[1] if weights is None else weights
    probs, truth, pixel_sum = [], [], 0.0
    for b, y, x in np.ndindex(mask.shape):
        if mask[b, y, x] == IGNORE_INDEX:
            continue
        exps = [math.exp(float(v)) for v in logits[b, :, y, x]]
        probs.append([e / sum(exps) for e in exps])
        truth.append(int(mask[b, y, x]))
        p = probs[-1][truth[-1]]
        even = -sum(w * math.log(q) for w, q in zip(weights, probs[-1], strict=True)) / len(weights)
        pixel_sum += smoothing * even - (1 - smoothing) * weights[truth[-1]] * (1 - p) ** gamma * math.log(p)
    if not truth:
        return 0.0
    regional = np.mean([region([p[c] for p in probs], [t == c for t in truth]) for c in set(truth)]) if share else 0
    return share * regional + (1 - share) * pixel_sum / sum(weights[t] for t in truth)


def test_every_loss_is_tested():
    assert SLOW.keys() <= common.LOSSES.keys()  # others are tested by what every loss must do, in test_models.py


def test_losses_by_hand():
    probs = torch.tensor([[0.8, 0.4, 0.5], [0.2, 0.6, 0.5]]).view(1, 2, 1, 3)
    mask = torch.tensor([[[0, 1, IGNORE_INDEX]]])
    # class 0: 0.8 / (1 + 0.8 + 0.4 - 0.8) = 4/7; class 1: 0.6 / (1 + 0.2 + 0.6 - 0.6) = 1/2
    iou, cross_entropy = (4 / 7 + 1 / 2) / 2, -(math.log(0.8) + math.log(0.6)) / 2
    dice = (2 * 0.8 / (1 + 0.8 + 0.4) + 2 * 0.6 / (1 + 0.2 + 0.6)) / 2
    # class 0: errors 0.4, then 0.2 at the one true pixel: IoU falls by half each time; class 1: 0.4 at the true pixel
    # takes all of the IoU
    lovasz = ((0.4 / 2 + 0.2 / 2) + 0.4) / 2
    expected = {"iou_ce": 0.4 * (1 - iou) + 0.6 * cross_entropy, "ce": cross_entropy, "iou": 1 - iou,
                "dice_ce": 0.4 * (1 - dice) + 0.6 * cross_entropy, "lovasz": lovasz,
                "focal": -(0.2 ** 2 * math.log(0.8) + 0.4 ** 2 * math.log(0.6)) / 2}
    assert {name: make_loss(name)(probs.log(), mask).item() for name in expected} == pytest.approx(expected, rel=1e-5)
    assert make_loss("iou_ce", 1)(probs.log(), mask).item() == pytest.approx(1 - iou, rel=1e-5)
    assert make_loss("iou_ce", 0)(probs.log(), mask).item() == pytest.approx(cross_entropy, rel=1e-5)
    assert make_loss("dice_ce", 1)(probs.log(), mask).item() == pytest.approx(1 - dice, rel=1e-5)


@pytest.mark.parametrize("name", SLOW)
@given(label_maps, seeds, st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from(PIXEL_OPTIONS))
def test_a_loss_equals_its_formula_written_out_pixel_by_pixel(name, mask, seed, ratio, options):
    logits = random_logits(mask, seed)
    assert loss_of(name, *as_tensors(logits, mask), ratio, *options).item() == pytest.approx(
        slow_loss(name, logits, mask, ratio, *options), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("options", PIXEL_OPTIONS)
@pytest.mark.parametrize("name", SLOW)
def test_a_losss_gradient_is_the_slope_of_its_formula(name, options):
    mask = np.array([[[0, 1], [3, IGNORE_INDEX]], [[0, 3], [3, 0]]], np.uint8)
    values = random_logits(mask, 5)
    logits, target = as_tensors(values, mask)
    logits.requires_grad_()
    loss_of(name, logits, target, 0.4, *options).backward()
    for at in np.ndindex(values.shape):
        step = np.zeros(values.shape)
        step[at] = 1e-4
        up, down = (slow_loss(name, values + sign * step, mask, 0.4, *options) for sign in (1, -1))
        assert logits.grad[at].item() == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("name", "ratio"), [("ce", 0.4), ("ce", 1), ("iou_ce", 0), ("dice_ce", 0)])
def test_cross_entropy_is_torchs(name, ratio, weights, smoothing):
    mask = np.random.default_rng(0).choice([0, 1, 2, 3, IGNORE_INDEX], (2, 16, 16))
    logits, target = as_tensors(random_logits(mask, 1), mask)
    torch.testing.assert_close(loss_of(name, logits, target, ratio, smoothing, weights),
                               torch.nn.functional.cross_entropy(
                                   logits, target, None if weights is None else torch.tensor(weights),
                                   ignore_index=IGNORE_INDEX, label_smoothing=smoothing))


@given(label_maps, seeds)
def test_lovasz_is_smps(mask, seed):
    assume((mask != IGNORE_INDEX).any())  # smp's is then 0 / 0
    logits, target = as_tensors(random_logits(mask, seed), mask)
    smps = smp.losses.LovaszLoss("multiclass", ignore_index=IGNORE_INDEX)(logits, target)
    torch.testing.assert_close(make_loss("lovasz")(logits, target), smps, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", common.LOSSES)
@given(label_maps, seeds, st.sampled_from(PIXEL_OPTIONS))
def test_a_loss_and_its_gradient_ignore_unlabelled_pixels(name, mask, seed, options):
    logits = random_logits(mask, seed)
    unlabelled = np.broadcast_to((mask == IGNORE_INDEX)[:, None], logits.shape)
    losses, gradients = [], []
    for values in (logits, np.where(unlabelled, 50 * random_logits(mask, seed + 1), logits)):
        values, target = as_tensors(values, mask)
        values.requires_grad_()
        losses.append(loss_of(name, values, target, 0.4, *options))
        losses[-1].backward()
        gradients.append(values.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    assert not gradients[0].numpy()[unlabelled].any() and gradients[1].isfinite().all()


@pytest.mark.parametrize("options", PIXEL_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", common.LOSSES)
def test_the_loss_of_an_unlabelled_batch_is_0_with_zero_gradients(name, dtype, options):
    logits = torch.randn(2, N_CLASSES, 3, 5, dtype=dtype, requires_grad=True)
    loss = loss_of(name, logits, torch.full((2, 3, 5), IGNORE_INDEX), 0.4, *options)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(("name", "ratio"), [("iou_ce", 0), ("iou_ce", 1), ("dice_ce", 1),
                                             *((name, 0.4) for name in common.LOSSES)])
def test_a_loss_orders_predictions_from_perfect_to_wrong(name, ratio):
    mask = torch.from_numpy(np.random.default_rng(0).integers(0, N_CLASSES, (2, 8, 8)))
    right = torch.nn.functional.one_hot(mask, N_CLASSES).permute(0, 3, 1, 2).float()
    partly = right.clone()
    partly[:, :, ::2] = right.roll(1, dims=1)[:, :, ::2]  # every other row says the next class
    losses = [make_loss(name, ratio)(logits, mask).item()
              for logits in (20 * right, 5 * right, 5 * partly, -5 * right, -20 * right)]
    assert losses == sorted(losses) and len(set(losses)) == len(losses)
    assert losses[0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", common.LOSSES)
def test_a_loss_is_computed_in_float32_whatever_the_logits(name, dtype):
    mask = torch.randint(N_CLASSES, (1, 4, 4))
    logits = torch.randn(1, N_CLASSES, 4, 4).to(dtype)
    for options in PIXEL_OPTIONS:
        loss = loss_of(name, logits, mask, 0.4, *options)
        assert loss.dtype == torch.float32 and loss.shape == () and loss == loss_of(name, logits.float(), mask, 0.4,
                                                                                     *options)


@pytest.mark.parametrize("name", common.LOSSES)
def test_a_class_that_is_in_neither_truth_nor_prediction_changes_nothing(name):
    mask = torch.randint(N_CLASSES, (2, 5, 6))
    logits = torch.randn(2, N_CLASSES, 5, 6)
    wider = torch.cat([logits, torch.full((2, 3, 5, 6), -200.)], dim=1).requires_grad_()
    loss = make_loss(name)(wider, mask)
    torch.testing.assert_close(loss, make_loss(name)(logits, mask))
    loss.backward()
    assert wider.grad.isfinite().all() and not wider.grad[:, N_CLASSES:].any()


@pytest.mark.parametrize("name", ["iou", "lovasz"])
def test_a_class_that_is_only_predicted_counts_in_the_others_alone(name):
    mask = torch.ones(1, 1, 2, dtype=torch.int64)
    probs = torch.tensor([[0.1, 0.2], [0.6, 0.7], [0.3, 0.1]]).view(1, 3, 1, 2)
    expected = {"iou": 1 - (0.6 + 0.7) / 2, "lovasz": (0.4 + 0.3) / 2}  # all true: both are the mean error
    assert make_loss(name)(probs.log(), mask).item() == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("name", common.LOSSES)
def test_millions_of_pixels_weigh_as_much_as_few(name):
    """Check that copies of a batch have its loss: float32 keeps the terms however many are added up."""
    mask = torch.zeros(2, 64, 64, dtype=torch.int64)
    mask[:, :6] = 1
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 64, 64, generator=generator)
    logits[:, 0] += 2
    tiled = make_loss(name)(logits.repeat(8, 1, 8, 8), mask.repeat(8, 8, 8))  # 16 images of 512 x 512
    torch.testing.assert_close(tiled, make_loss(name)(logits, mask), rtol=1e-4, atol=0)


# ---- metrics --------------------------------------------------------------------------------------------------------


@st.composite
def predictions(draw):
    """Draw (pred, mask) of one image, with a labelled pixel at least."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    mask = draw(arrays(np.uint8, shape, elements=st.sampled_from([*range(N_CLASSES), IGNORE_INDEX])))
    mask[0, 0] = draw(st.integers(0, N_CLASSES - 1))
    return draw(arrays(np.uint8, shape, elements=st.integers(0, N_CLASSES - 1))), mask


def set_miou(images):
    """Return the mIoU of a list of (pred, mask), from sets of pixels."""
    ious = []
    for c in range(N_CLASSES):
        truth, predicted = set(), set()
        for number, (pred, mask) in enumerate(images):
            for y, x in np.ndindex(mask.shape):
                if mask[y, x] != IGNORE_INDEX:
                    truth |= {(number, y, x)} if mask[y, x] == c else set()
                    predicted |= {(number, y, x)} if pred[y, x] == c else set()
        if truth | predicted:
            ious.append(len(truth & predicted) / len(truth | predicted))
    return sum(ious) / len(ious)


def test_confusion_and_iou_by_hand():
    mask = np.array([[0, 0, 1], [1, 1, IGNORE_INDEX]], np.uint8)
    pred = np.array([[0, 1, 1], [1, 2, 3]], np.uint8)
    counts = common.confusion(pred, mask, N_CLASSES)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = common.class_iou(counts)
    assert iou[:3].tolist() == [1 / 2, 2 / 4, 0] and np.isnan(iou[3])  # class 3 is in neither: its pixel is unlabelled
    assert common.image_miou(counts[None]).tolist() == [pytest.approx(1 / 3)]


@given(predictions())
@settings(deadline=None)
def test_confusion_and_iou_agree_with_scikit_learn(image):
    pred, mask = image
    labelled = mask != IGNORE_INDEX
    counts = common.confusion(pred, mask, N_CLASSES)
    assert (counts == confusion_matrix(mask[labelled], pred[labelled], labels=range(N_CLASSES))).all()
    seen = np.union1d(mask[labelled], pred[labelled])
    ious = jaccard_score(mask[labelled], pred[labelled], labels=seen, average=None)
    assert common.class_iou(counts)[seen] == pytest.approx(ious)
    assert np.isnan(np.delete(common.class_iou(counts), seen)).all()


@given(st.lists(predictions(), min_size=1, max_size=5), st.integers(1, 3))
@settings(deadline=None)
def test_the_three_scores_agree_with_set_arithmetic(images, batch_size):
    counts = np.stack([common.confusion(pred, mask, N_CLASSES) for pred, mask in images])
    result = common.scores(counts, batch_size)
    batches = [images[i:i + batch_size] for i in range(0, len(images), batch_size)]
    assert result["v1"] == pytest.approx(np.mean([set_miou(batch) for batch in batches]))
    assert result["v2"] == pytest.approx(set_miou(images))
    assert result["v3"] == pytest.approx(np.mean([set_miou([image]) for image in images]))


def test_the_three_scores_by_hand_with_an_odd_last_batch():
    truth = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]], np.uint8)
    preds = np.array([[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]], np.uint8)
    counts = np.stack([common.confusion(*pair, 3) for pair in zip(preds, truth, strict=True)])
    result = common.scores(counts, batch_size=2)
    assert result["v3"] == pytest.approx((1 + 3 / 8 + 3 / 8) / 3)  # images: (1 + 1) / 2, (3/4 + 0) / 2, (0 + 3/4) / 2
    assert result["v1"] == pytest.approx(((5 / 6 + 2 / 3) / 2 + 3 / 8) / 2)  # batches: the first two, and the last
    assert result["v2"] == pytest.approx(5 / 7)  # 5 of 7 pixels for either class
    assert result["iou"][:2].tolist() == [5 / 7, 5 / 7] and np.isnan(result["iou"][2])


@given(st.lists(predictions(), min_size=1, max_size=4))
@settings(deadline=None)
def test_a_perfect_prediction_scores_1(images):
    counts = np.stack([common.confusion(np.where(mask == IGNORE_INDEX, 0, mask), mask, N_CLASSES)
                       for _, mask in images])
    result = common.scores(counts, 2)
    assert (result["v1"], result["v2"], result["v3"]) == (1, 1, 1)


def test_one_pixel_of_a_wrong_class_costs_a_third_of_a_perfect_two_class_image():
    mask = np.zeros((SUBMIT_SIZE, SUBMIT_SIZE), np.uint8)
    mask[100:] = 1
    pred = mask.copy()
    assert common.image_miou(common.confusion(pred, mask, 12)[None])[0] == 1
    pred[0, 0] = 2
    assert common.image_miou(common.confusion(pred, mask, 12)[None])[0] == pytest.approx(0.667, abs=5e-4)


# ---- TTA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", common.TTA)
def test_tta_changes_nothing_for_a_model_that_looks_at_single_pixels(name):
    model, images = torch.nn.Conv2d(3, N_CLASSES, 1), torch.randn(2, 3, 5, 7)
    probs = common.predict_probs([model], images, common.tta_views(name))
    torch.testing.assert_close(probs, model(images).softmax(1).detach())


@pytest.mark.parametrize("name", common.TTA)
def test_probs_sum_to_1_in_float32_whatever_the_models_precision(name):
    model = torch.nn.Conv2d(3, N_CLASSES, 3, padding=1).bfloat16()
    probs = common.predict_probs([model], 10 * torch.randn(2, 3, 5, 7).bfloat16(), common.tta_views(name))
    assert probs.dtype == torch.float32 and probs.shape == (2, N_CLASSES, 5, 7)
    torch.testing.assert_close(probs.sum(1), torch.ones(2, 5, 7))


def test_flip_averages_the_photo_and_its_two_mirror_images():
    model, images = torch.nn.Conv2d(3, N_CLASSES, 3, padding=1), torch.randn(2, 3, 5, 7)

    def predict(x):
        return model(torch.tensor(x.copy())).softmax(1).detach().numpy()
    x = images.numpy()
    expected = (predict(x) + predict(x[..., ::-1])[..., ::-1] + predict(x[:, :, ::-1])[:, :, ::-1]) / 3
    assert common.predict_probs([model], images, common.tta_views("flip")).numpy() == pytest.approx(expected, abs=1e-6)
    alone = common.predict_probs([model], images, common.tta_views("none"))
    assert alone.numpy() == pytest.approx(predict(x), abs=1e-6)


def test_probs_are_the_mean_over_models_and_views():
    models, images = [torch.nn.Conv2d(3, N_CLASSES, 3, padding=1) for _ in range(3)], torch.randn(2, 3, 5, 5)
    expected = sum(common.predict_probs([model], images, common.tta_views("d4")) for model in models) / 3
    torch.testing.assert_close(common.predict_probs(models, images, common.tta_views("d4")), expected)


# ---- normalising, resizing, stores ----------------------------------------------------------------------------------


def test_normalise_moves_channels_first_and_scales_each_by_its_own_mean_and_std():
    images = torch.randint(256, (2, 5, 7, 3), dtype=torch.uint8)
    before = images.clone()
    out = common.normalise(images, *IMAGENET)
    expected = (before.numpy() / 255 - IMAGENET[0]) / IMAGENET[1]
    np.testing.assert_allclose(out.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [(64, 96), (256, 256), (128, 320)])
def test_resized_probs_are_the_bilinear_ones_at_the_submissions_size(size):
    probs = torch.randn(2, N_CLASSES, *size).softmax(1)
    out = common.resize_probs(probs)
    expected = [[cv2.resize(plane, (SUBMIT_SIZE, SUBMIT_SIZE), interpolation=cv2.INTER_LINEAR) for plane in image]
                for image in probs.numpy()]
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-4)
    torch.testing.assert_close(out.sum(1), torch.ones(2, SUBMIT_SIZE, SUBMIT_SIZE))


def test_resizing_probs_to_half_averages_four_pixels():
    probs = torch.rand(1, 2, 2 * SUBMIT_SIZE, 2 * SUBMIT_SIZE)
    torch.testing.assert_close(common.resize_probs(probs), torch.nn.functional.avg_pool2d(probs, 2))


@pytest.fixture
def hashes(tmp_path):
    return common.Hashes(tmp_path / "cache")


@pytest.fixture
def store(tmp_path):
    """Write a good store of 2 images and 3 classes; return the path of its JSON."""
    part = Namespace(ids=[5, 3], classes=["Background", "a", "b"], fingerprint="d")
    write_store(tmp_path, "test", np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1).repeat(256, 2).repeat(256, 3), part)
    return tmp_path / "test.json"


def test_open_store_maps_the_file_and_returns_its_description(store, hashes):
    probs, info = common.open_store(store, hashes)
    assert isinstance(probs, np.memmap) and probs[:, :, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert info == common.read_json(store) and info["image_ids"] == [5, 3]


def leave_out(path, key):
    common.write_json(path, {k: value for k, value in common.read_json(path).items() if k != key})


def change_json(path, **changes):
    common.write_json(path, common.read_json(path) | changes)


def save_probs(path, probs):
    """Write other probabilities and their hash to the JSON."""
    np.save(path.with_suffix(".npy"), probs)
    seal(path)


STORE_FAULTS = {
    "no description": lambda path: path.unlink(),
    "description cut off": lambda path: path.write_text(path.read_text()[:-4]),
    "description is a list": lambda path: path.write_text("[]"),
    "no ids": lambda path: leave_out(path, "image_ids"),
    "no fold": lambda path: leave_out(path, "fold"),
    "no run": lambda path: leave_out(path, "run"),
    "no hashes": lambda path: leave_out(path, "files"),
    "no array": lambda path: path.with_suffix(".npy").unlink(),
    "array cut off": lambda path: os.truncate(path.with_suffix(".npy"), 1000),
    "array is text": lambda path: path.with_suffix(".npy").write_text("hello"),
    "array of objects": lambda path: save_probs(path, np.array([{}])),
    "an image too many": lambda path: change_json(path, image_ids=[5, 3, 1]),
    "a class too few": lambda path: change_json(path, classes=["a", "b"]),
    "floats": lambda path: save_probs(path, np.zeros((2, 3, 256, 256), np.float16)),
    "other size": lambda path: save_probs(path, np.zeros((2, 3, 128, 128), np.uint8)),
}


@pytest.mark.parametrize("fault", STORE_FAULTS)
def test_open_store_refuses_a_store_that_is_not_whole(store, hashes, fault):
    STORE_FAULTS[fault](store)
    with pytest.raises(UserError, match="test.json") as refusal:
        common.open_store(store, hashes)
    assert "checksum" not in str(refusal.value)  # the checksums agree, or nobody has got that far


def flip_a_bit(path):
    with open(path, "r+b") as f:
        f.seek(-1000, os.SEEK_END)
        byte, = f.read(1)
        f.seek(-1000, os.SEEK_END)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("remembered", [True, False])
def test_open_store_refuses_probabilities_with_another_checksum(store, hashes, remembered):
    if remembered:
        common.open_store(store, hashes)
    npy, times = store.with_suffix(".npy"), os.stat(store.with_suffix(".npy"))
    flip_a_bit(npy)
    os.utime(npy, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="test.json: the .npy has another checksum, damaged or of another store"):
        common.open_store(store, hashes)
    assert common.Hashes(hashes.path.parent).remembered(npy) == common.file_hash(npy)  # so make knows of it
    flip_a_bit(npy)
    assert common.open_store(store, hashes)[1]["image_ids"] == [5, 3]


def test_open_store_refuses_the_probabilities_of_another_store_of_the_same_size(store, hashes, tmp_path):
    part = Namespace(ids=[5, 3], classes=["Background", "a", "b"], fingerprint="d")
    write_store(tmp_path / "other", "test", np.ones((2, 3, SUBMIT_SIZE, SUBMIT_SIZE), np.uint8), part)
    for path in (store, tmp_path / "other/test.json"):
        common.open_store(path, hashes)
    shutil.copy2(tmp_path / "other/test.npy", store.with_suffix(".npy"))
    with pytest.raises(UserError, match="another checksum"):
        common.open_store(store, hashes)


@pytest.mark.parametrize("place", [(0, "unet/a", 64, 0), (1, "unet/b", 64, 0), (1, "unet/a", 96, 0),
                                   (1, "unet/a", 64, 2)])
def test_open_store_refuses_a_store_in_the_folder_of_another_run(store, hashes, tmp_path, place):
    change_json(store, round=1, model="unet/a", scale=64, fold=0)
    common.open_store(store, hashes)  # this folder is no run's
    for exp in ("exp", "renamed/r0"):
        own, other = run_folder(tmp_path / exp, 1, "unet/a", 64, 0), run_folder(tmp_path / exp, *place)
        for folder in (own, other):
            folder.mkdir(parents=True)
            for path in (store, store.with_suffix(".npy")):
                shutil.copy(path, folder)
        common.open_store(own / "test.json", hashes)
        with pytest.raises(UserError, match=f"{other}/test.json is of round 1, unet/a, scale 64, fold 0: it was moved "
                                            "or copied into the folder of another run"):
            common.open_store(other / "test.json", hashes)


# ---- batches --------------------------------------------------------------------------------------------------------


@contextmanager
def as_rank(rank, n_ranks, **variables):
    """Be one of the processes of torchrun on one machine, or as `variables` say."""
    place = {"RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n_ranks,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (place | variables).items():
            patch.setenv(name, str(value))
        yield


def rank_batches(n_ranks, n_images, batch_size, seed, odds=None, epoch=0):
    """Return [[batches of each rank]] after checking that their number is the length that each rank says."""
    found = []
    for rank in range(n_ranks):
        with as_rank(rank, n_ranks):
            batches = common.EpochBatches(n_images, batch_size, seed, odds)
        batches.epoch = epoch
        found.append(list(batches))
        assert len(batches) == len(found[-1])
    return found


def test_ranks_are_those_of_torchrun():
    assert common.ranks() == (0, 1)
    with as_rank(2, 3):
        assert common.ranks() == (2, 3)


@pytest.mark.parametrize("left", [["RANK"], ["WORLD_SIZE"], ["RANK", "WORLD_SIZE"], ["MASTER_ADDR", "MASTER_PORT"],
                                  ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]])
def test_variables_that_another_program_has_left_are_no_torchrun(monkeypatch, left):
    for name in left:
        monkeypatch.setenv(name, "x" if name == "MASTER_ADDR" else "4")
    assert common.ranks() == (0, 1)


@pytest.mark.parametrize("rank", ["", "abc", "-1", "1.0"])
def test_a_rank_that_is_none_is_no_torchrun(monkeypatch, rank):
    with as_rank(1, 2):
        monkeypatch.setenv("RANK", rank)
        assert common.ranks() == (0, 1)


@given(st.integers(1, 4), st.integers(1, 60), st.integers(0, 9), st.integers(0, 2 ** 31 - 1), st.integers(0, 99))
def test_ranks_share_full_batches_that_have_every_image_of_an_epoch(n_ranks, n_images, size, seed, epoch):
    batch_size = 2 * n_ranks + size
    ranked = rank_batches(n_ranks, n_images, batch_size, seed, epoch=epoch)
    shares = [batch_size // n_ranks + (rank < batch_size % n_ranks) for rank in range(n_ranks)]
    n_batches = math.ceil(n_images / batch_size)
    assert [[len(batch) for batch in batches] for batches in ranked] == [[share] * n_batches for share in shares]
    assert min(shares) >= 2  # which batch norm needs
    times = Counter(key for batches in ranked for batch in batches for key in batch)
    assert times.keys() == {(epoch, index) for index in range(n_images)}
    assert max(times.values()) - min(times.values()) <= 1  # none comes again before all others have


def test_ranks_share_the_order_of_one_process():
    (alone,), ranked = rank_batches(1, 21, 8, 3, epoch=5), rank_batches(4, 21, 8, 3, epoch=5)
    assert [sorted(sum(batches, [])) for batches in zip(*ranked, strict=True)] == [sorted(batch) for batch in alone]
    assert alone != rank_batches(1, 21, 8, 4, epoch=5)[0] and sorted(sum(alone, [])) != sum(alone, [])


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_images_are_drawn_by_their_odds(n_ranks):
    odds, n = np.array([0, 0.5, 0.3, 0.2] + [0] * 1996), 2000
    ranked = rank_batches(n_ranks, n, 7, 1, odds)
    indices = [index for batches in ranked for batch in batches for _, index in batch]
    assert len(indices) == math.ceil(n / 7) * 7 and set(indices) == {1, 2, 3}
    assert np.bincount(indices)[1:] / n == pytest.approx([0.5, 0.3, 0.2], abs=0.05)  # over 4 standard errors
    assert ranked == rank_batches(n_ranks, n, 7, 1, odds) != rank_batches(n_ranks, n, 7, 1, odds, epoch=1)


def test_rare_odds_by_hand():
    present = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]) > 0  # no image has class 3
    # the rarest class of each image is that of 1, 4, 2 and 2 images
    assert common.rare_odds(present).tolist() == pytest.approx([1 / 2.25, 0.25 / 2.25, 0.5 / 2.25, 0.5 / 2.25])


def test_images_that_show_the_same_are_drawn_alike():
    assert common.rare_odds(np.ones((8, 3), bool)).tolist() == [1 / 8] * 8


# ---- augmentation ---------------------------------------------------------------------------------------------------


def ramp(height, width):
    """Return uint8 [height, width] that no flip or turn leaves as it is: x + 2 y."""
    return (np.arange(width) + 2 * np.arange(height)[:, None]).astype(np.uint8)


def local_means(values, seen):
    """Return the means over the pixels of `seen` in 9 x 9, where noise averages out."""
    return cv2.blur(values * seen, (9, 9))[seen] / cv2.blur(seen.astype(float), (9, 9))[seen]


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_augmentation_moves_image_and_mask_together(name):
    mask = ramp(64, 80)
    image = mask[..., None].repeat(3, 2)
    augment = common.make_augmentation(name, 96)
    for seed in range(40):
        moved_image, moved_mask = augment(image, mask, np.random.default_rng(seed))
        seen = moved_mask != IGNORE_INDEX
        means = [local_means(values.astype(float), seen) for values in (moved_image.mean(2), moved_mask)]
        assert np.corrcoef(*means)[0, 1] > 0.9, f"AUGMENTATIONS[{name!r}] must move image and mask together"


def test_flips_and_turns_by_cv2_are_those_of_albumentations():
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    ours = next(t for t in common.AUGMENTATIONS["basic"](A, (32, 32)) if type(t).__name__ == "D4")
    found = {element: ours.apply(image, element) for element in ("e", "r90", "r180", "r270", "v", "hvt", "h", "t")}
    for element, moved in found.items():
        assert np.array_equal(moved, A.D4(p=1).apply(image, element)), element
        assert np.array_equal(moved[..., 0], ours.apply(image[..., 0].copy(), element)), element
    assert len({moved.tobytes() for moved in found.values()}) == 8


@pytest.mark.parametrize("name", ["none", "flip", "basic"])
@pytest.mark.parametrize("scale", [32, 96])
def test_an_augmented_mask_is_within_half_a_pixel_of_its_image(name, scale):
    mask = ramp(63, 81)
    augment = common.make_augmentation(name, scale)
    shifts = []
    for seed in range(20):
        image, moved = augment(mask[..., None].repeat(3, 2), mask, np.random.default_rng(seed))
        shift = image[..., 0].astype(int) - moved
        assert abs(shift).max() <= 2  # half a pixel along x + 2 y is 1.5, and the image is rounded
        shifts.append(shift.mean())
    assert abs(np.mean(shifts)) < 0.25


def geometry(name, scale):
    """Return a recipe without what changes colours alone, where distortions and cutouts always happen."""
    def chosen(transforms):
        for transform in transforms:
            if isinstance(transform, A.OneOf):
                if kept := list(chosen(transform.transforms)):
                    yield A.OneOf(kept, p=1)
            elif not isinstance(transform, A.ImageOnlyTransform):
                if isinstance(transform, A.CoarseDropout):
                    transform.p = 1
                yield transform
    return list(chosen(common.AUGMENTATIONS[name](A, (scale, scale))))


def apply(transforms, image, mask, seed):
    out = A.Compose(transforms, seed=seed)(image=image, mask=mask)
    return out["image"], out["mask"]


def test_geometry_is_all_that_a_recipe_does_to_a_mask():
    kinds = {name: [type(t).__name__ for t in geometry(name, 32)] for name in common.AUGMENTATIONS}
    expected = {"none": ["Resize"], "flip": ["Resize", "HorizontalFlip"], "basic": ["Crop", "D4"],
                "colour": ["Crop", "D4"], "strong": ["Crop", "D4", "OneOf", "CoarseDropout"]}
    assert expected.items() <= kinds.items()


def inner(seen):
    """Remove the pixels within 2 of the frame or of others: an image fades there into what lies outside."""
    return cv2.erode(np.pad(seen.astype(np.uint8), 1), np.ones((5, 5), np.uint8))[1:-1, 1:-1] > 0


# a mask is resampled in turn by every geometric step: half a pixel each along x + 2 y is 1.5; the image is rounded
@pytest.mark.parametrize(("name", "scale", "bound"), [
    *((name, scale, 2) for name in ("none", "flip", "basic", "colour") for scale in (32, 96)), ("strong", 96, 3.5)])
def test_a_mask_is_within_half_a_pixel_of_its_image_and_not_shifted_on_average(name, scale, bound):
    mask = ramp(63, 81)
    transforms = geometry(name, scale)
    shifts = []
    for seed in range(40):
        image, moved = apply(transforms, mask[..., None].repeat(3, 2), mask, seed)
        seen = moved != IGNORE_INDEX
        seen = inner(seen) if name == "strong" else seen
        shift = (image[..., 0].astype(int) - moved)[seen]
        assert seen.mean() > 0.3 and abs(shift).max() <= bound
        shifts.append(shift.mean())
    assert abs(np.mean(shifts)) < 0.25


@pytest.mark.parametrize("kind", ["GridDistortion", "ElasticTransform"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_distorted_mask_is_the_nearest_pixel_of_its_image(kind, axis):
    distortions, = (t for t in common.AUGMENTATIONS["strong"](A, (160, 160))
                    if isinstance(t, A.OneOf) and isinstance(t.transforms[0], A.DualTransform))
    distortion, = (t for t in distortions.transforms if type(t).__name__ == kind)
    distortion.p = 1
    mask = (np.indices((160, 160))[axis] + 20).astype(np.uint8)  # a step of 1 a pixel
    shifts, moves = [], []
    for seed in range(20):
        image, moved = apply([distortion], mask.astype(np.float32)[..., None].repeat(3, 2), mask, seed)
        seen = inner(moved != IGNORE_INDEX)
        shifts.append((image[..., 0] - moved)[seen])
        moves.append((moved.astype(int) - mask)[seen])
    assert abs(np.concatenate(moves)).max() >= 3  # it does distort
    shifts = np.concatenate(shifts)
    assert abs(shifts).max() <= 0.52  # 1/64 for the fractions of a pixel that OpenCV knows
    assert abs(shifts.mean()) < 0.02


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_what_an_image_shows_does_not_decide_how_its_mask_is_moved(name):
    mask, augment = ramp(64, 80), common.make_augmentation(name, 48)
    for seed in range(20):
        images = mask[..., None].repeat(3, 2), np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        first, second = (augment(image, mask, np.random.default_rng(seed))[1] for image in images)
        assert (first == second).all()


def test_masks_are_unlabelled_where_strong_brings_in_or_hides_pixels():
    image, mask = np.full((80, 80, 3), 200, np.uint8), np.full((80, 80), 3, np.uint8)
    transforms = geometry("strong", 80)
    for seed in range(40):
        moved_image, moved = apply(transforms, image, mask, seed)
        shown = moved_image[..., 0]
        assert set(np.unique(moved)) == {3, IGNORE_INDEX}
        # at the edge an image fades, a mask changes half way: 1/2 of the light, 1/4 at a corner
        assert (moved[shown < 45] == IGNORE_INDEX).all() and (moved[shown > 105] == 3).all()
        assert (moved == IGNORE_INDEX).any() and (shown == 200).any()


def test_strong_hides_or_distorts_about_half_of_the_images():
    image, mask = np.full((64, 64, 3), 200, np.uint8), np.zeros((64, 64), np.uint8)
    augment = common.make_augmentation("strong", 64)
    hidden = [(augment(image, mask, np.random.default_rng(seed))[1] == IGNORE_INDEX).any() for seed in range(300)]
    assert 0.4 < np.mean(hidden) < 0.62  # 1 - 0.7 x 0.7


@pytest.mark.parametrize(("name", "n"), [("none", 1), ("flip", 2), ("basic", 8), ("colour", 8), ("strong", 8)])
def test_a_recipe_turns_and_mirrors_in_all_the_ways_it_says(name, n):
    mask, augment, seen = ramp(70, 70), common.make_augmentation(name, 64), []
    for seed in range(120):
        moved = augment(mask[..., None].repeat(3, 2), mask, np.random.default_rng(seed))[1].astype(int)
        steps = [np.median(moved[8:] - moved[:-8]), np.median(moved[:, 8:] - moved[:, :-8])]  # 2 y is steeper than x
        seen.append((steps[0] > 0, steps[1] > 0, abs(steps[0]) > abs(steps[1])))
    assert len(set(seen)) == n and min(map(seen.count, seen)) >= 4


SHAPES = [(96, 96), (480, 640), (64, 400), (400, 64), (300, 2000), (20, 1500), (1500, 15)]


def blocks(height, width):
    """Return a mask that tells the 15 x 15 blocks of a photo apart: ids 0 to 224."""
    return (15 * (np.arange(height)[:, None] * 15 // height) + np.arange(width) * 15 // width).astype(np.uint8)


@pytest.mark.parametrize("name", ["basic", "colour", "strong"])
def test_samples_show_photos_of_any_shape_alike_and_to_their_ends(name):
    augment, n_epochs, shares = common.make_augmentation(name, 64), 150, []
    for shape in SHAPES:
        mask, seen = blocks(*shape), np.zeros((n_epochs, 256), bool)
        for epoch in range(n_epochs):
            moved = augment(mask[..., None].repeat(3, 2), mask, np.random.default_rng([epoch, *shape]))[1]
            seen[epoch, moved] = True
        seen = seen[:, :225].reshape(-1, 15, 15)
        assert seen[:40].any(0).all()  # after 40 epochs each part of the photo
        ends = seen.mean(0)[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert ends.min() > 0.07 and seen.mean(0)[7, 7] > 0.8  # corners are in few crops, the middle in nearly all
        shares.append(seen.mean())
    assert min(shares) > 0.5 and max(shares) - min(shares) < 0.1


def test_square_photos_are_cropped_as_albumentations_does():
    crops = common.AUGMENTATIONS["basic"](A, (32, 32))[0], A.RandomResizedCrop((32, 32), scale=(0.25, 1))
    for seed in range(50):
        boxes = []
        for crop in crops:
            crop.set_random_seed(seed)
            boxes.append(crop.get_params_dependent_on_data({"shape": (96, 96, 3)}, {})["crop_coords"])
        assert boxes[0] == boxes[1]


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_albumentations_has_nothing_to_warn_of(name):
    image, mask = np.zeros((40, 50, 3), np.uint8), np.zeros((40, 50), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment = common.make_augmentation(name, 32)
        for seed in range(30):
            augment(image, mask, np.random.default_rng(seed))


class DrawnPhotos:
    """A Split of noise, with as much of one as TrainSamples needs."""

    def image(self, index):
        return np.random.default_rng(index).integers(0, 256, (50, 60, 3), dtype=np.uint8)

    def mask(self, index):
        return np.random.default_rng(index).integers(0, 12, (50, 60), dtype=np.uint8)


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_seed_epoch_and_index_decide_a_sample_whatever_came_before(name):
    def samples(seed):
        entries = [(DrawnPhotos(), i, None) for i in (0, 0, 1)]
        return common.TrainSamples(entries, common.make_augmentation(name, 32), seed)

    def read(samples, key):
        return b"".join(part.tobytes() for part in samples[key])
    keys = [(epoch, index) for epoch in range(4) for index in range(3)]
    first, again = samples(0), samples(0)
    found = {key: read(first, key) for key in keys}
    assert {key: read(again, key) for key in keys[::-2]} == {key: found[key] for key in keys[::-2]}
    other = samples(1)
    many = set(found.values()) | {read(other, key) for key in keys}
    expected = {"none": {2}, "flip": {4}, "basic": {24}, "colour": {24}, "strong": {24}}
    assert len(many) in expected.get(name, range(2, 25))


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_an_augmented_mask_holds_only_values_that_were_there(name):
    values = np.array([1, 4, 9, 200, IGNORE_INDEX], np.uint8)
    augment = common.make_augmentation(name, 64)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mask = rng.choice(values, (50, 70))
        _, moved = augment(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8), mask, rng)
        assert set(np.unique(moved)) <= set(values), (
            f"AUGMENTATIONS[{name!r}] must give pixels from outside fill_mask=IGNORE_INDEX and invent no class")


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
@pytest.mark.parametrize("size", [(40, 64), (200, 100)])
def test_every_recipe_ends_at_scale_x_scale_in_uint8(name, size):
    image, mask = common.make_augmentation(name, 64)(np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8),
                                                     np.random.default_rng(0))
    assert image.shape == (64, 64, 3) and mask.shape == (64, 64) and image.dtype == mask.dtype == np.uint8


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_the_generator_alone_decides_the_sample(name):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), ramp(64, 64)

    def sample(augment, seed):
        return b"".join(out.tobytes() for out in augment(image, mask, np.random.default_rng(seed)))
    augment, another = (common.make_augmentation(name, 64) for _ in range(2))
    first = [sample(augment, seed) for seed in range(5)]
    assert [sample(another, seed) for seed in (4, 2, 0)] == [first[4], first[2], first[0]]
    assert len(set(first)) == {"none": 1, "flip": 2}.get(name, 5)


# ---- ClassMix -------------------------------------------------------------------------------------------------------


def tracers(n, height, width):
    """Return images whose pixels say where they come from: (image, y, x)."""
    at = np.stack(np.meshgrid(np.arange(n), np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    return at.astype(np.uint8)


def mix(masks, prob, weights, seed):
    """Return (image that each pixel comes from [B, H, W], mixed masks) after checking what every mix must obey."""
    masks = np.asarray(masks, np.uint8)
    images = tracers(*masks.shape)
    before = images.copy(), masks.copy()
    mixed, labels = common.classmix(images, masks, prob, np.asarray(weights, float), np.random.default_rng(seed))
    assert np.array_equal(images, before[0]) and np.array_equal(masks, before[1])
    assert mixed.dtype == labels.dtype == np.uint8 and mixed.shape == images.shape and labels.shape == masks.shape
    assert np.array_equal(mixed[..., 1:], images[..., 1:])  # a pixel stays in its place
    source = mixed[..., 0]
    b, y, x = np.indices(source.shape)
    assert (labels == masks[source, y, x]).all()  # a label goes with its pixel
    assert (masks[source, y, x][source != b] != IGNORE_INDEX).all()
    return source, labels


def pasted(source, masks):
    """Return [(partner, class ids pasted whole)] of each image, (None, set()) where nothing was pasted."""
    found = []
    for i, image in enumerate(source):
        partners = set(image.ravel().tolist()) - {i}
        assert len(partners) <= 1
        partner = partners.pop() if partners else None
        classes = set() if partner is None else set(masks[partner][image == partner].tolist())
        if partner is not None:
            assert ((image == partner) == np.isin(masks[partner], list(classes))).all()  # no class is cut in parts
        found.append((partner, classes))
    return found


mask_batches = arrays(np.uint8, st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 5)),
                      elements=st.sampled_from([0, 1, 7, 127, 128, 198, 199, IGNORE_INDEX]))


def labels_of(mask):
    return set(mask.ravel().tolist()) - {IGNORE_INDEX}


def test_classmix_by_hand():
    masks = [[[0, 1, 1]], [[2, IGNORE_INDEX, 2]]]
    source, labels = mix(masks, 1, [1e-9, 1, 1], 0)  # so class 1 is drawn before class 0
    assert labels.tolist() == [[[2, 1, 2]], [[2, 1, 1]]]  # the unlabelled pixel isn't pasted but pasted on
    assert source.tolist() == [[[1, 0, 1]], [[1, 0, 0]]]
    assert mix(masks, 0, [1e-9, 1, 1], 0)[1].tolist() == masks


@given(mask_batches, seeds)
def test_half_the_partners_classes_are_pasted_whole(masks, seed):
    source, _ = mix(masks, 1, np.ones(200), seed)
    for i, (partner, classes) in enumerate(pasted(source, masks)):
        if partner is None:
            assert any(not labels_of(mask) for j, mask in enumerate(masks) if j != i)
        else:
            assert len(classes) == math.ceil(len(labels_of(masks[partner])) / 2)


@given(mask_batches, seeds, st.floats(0, 1))
def test_an_image_is_mixed_by_half_or_left_alone(masks, seed, prob):
    source, _ = mix(masks, prob, np.linspace(0.1, 5, 200), seed)
    for partner, classes in pasted(source, masks):
        assert partner is None or len(classes) == math.ceil(len(labels_of(masks[partner])) / 2)


@given(mask_batches, seeds)
def test_probability_0_changes_nothing(masks, seed):
    source, labels = mix(masks, 0, np.ones(200), seed)
    assert (labels == masks).all() and pasted(source, masks) == [(None, set())] * len(masks)


@given(mask_batches, seeds)
def test_the_generator_alone_decides_the_mix(masks, seed):
    first, again = (mix(masks, 0.5, np.ones(200), seed)[0] for _ in range(2))
    assert (first == again).all()


def test_different_generators_draw_different_partners_classes_and_images():
    masks = np.random.default_rng(0).integers(0, 200, (6, 8, 8))
    mixes = [pasted(mix(masks, 0.5, np.ones(200), seed)[0], masks) for seed in range(30)]
    assert {partner for found in mixes for partner in [found[0][0]]} == {None, 1, 2, 3, 4, 5}
    assert len({str(found) for found in mixes}) == 30


def drawn(weights, prob=1):
    """Return how often each class is pasted when 2000 images show all of them, a pixel each."""
    n = 2000
    masks = np.tile(np.arange(len(weights), dtype=np.uint8), (n, 1, 1))
    numbers = np.stack([np.arange(n) // 256, np.arange(n) % 256, np.zeros(n)], axis=-1).astype(np.uint8)
    images = np.tile(numbers[:, None, None], (1, 1, len(weights), 1))
    mixed, _ = common.classmix(images, masks, prob, np.asarray(weights, float), np.random.default_rng(0))
    return (mixed != images).any(-1).mean((0, 1)).tolist()


def test_the_probability_is_the_share_of_images_that_are_mixed():
    assert drawn([1], 0.3) == pytest.approx([0.3], abs=0.05)  # 0.05 is over 4 standard errors
    assert drawn([1], 0) == [0] and drawn([1], 1) == [1]


def test_classes_are_drawn_in_proportion_to_their_weights_without_replacement():
    # two of three: a class is left out when it would be the last of three draws, worked by hand for the weights 1, 2, 3
    left_out = [2 / 6 * 3 / 4 + 3 / 6 * 2 / 3, 1 / 6 * 3 / 5 + 3 / 6 * 1 / 3, 1 / 6 * 2 / 5 + 2 / 6 * 1 / 4]
    assert drawn([1, 2, 3]) == pytest.approx([1 - p for p in left_out], abs=0.05)
    assert drawn([1, 1, 1, 1]) == pytest.approx([0.5] * 4, abs=0.05)


def test_rare_classes_are_drawn_far_more_often_by_weight():
    shares = drawn([1e-6, 1e-3])  # as 1 / pixels of a common and a rare class
    assert shares[1] > 0.99 and shares[0] < 0.01


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class RunsOnUnpickling:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    state = {"model": {"w": torch.randn(3, 4)}, "recipe": {"lr": 1e-3, "classes": ["ä", "b"]}, "best": None}
    common.save_checkpoint(tmp_path / "x.pt", **state)
    loaded = common.load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(loaded["model"].pop("w"), state["model"].pop("w")) and loaded == state


@pytest.mark.parametrize("in_a_pickle", [False, True])
def test_a_checkpoint_with_code_is_refused_without_running_it(tmp_path, in_a_pickle):
    trap = RunsOnUnpickling(tmp_path / "made")
    if in_a_pickle:
        (tmp_path / "x.pt").write_bytes(pickle.dumps(trap, protocol=2))
    else:
        torch.save({"model": trap}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt: not a checkpoint"):
        common.load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()
    if in_a_pickle:
        pickle.loads((tmp_path / "x.pt").read_bytes())
    else:
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "made").exists()  # the trap works


@given(share=st.floats(0.001, 0.999))
@settings(deadline=None)
def test_a_truncated_checkpoint_is_refused_wherever_it_was_cut(tmp_path_factory, share):
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "whole.pt").exists():
        common.save_checkpoint(folder / "whole.pt", model={f"w{i}": torch.randn(20, 20) for i in range(5)}, epoch=3)
    content = (folder / "whole.pt").read_bytes()
    (folder / "cut.pt").write_bytes(content[:max(1, int(share * len(content)))])
    with pytest.raises(UserError, match="cut.pt: not a checkpoint"):
        common.load_checkpoint(folder / "cut.pt")


def test_a_file_that_is_no_checkpoint_or_missing_is_refused_by_name(tmp_path):
    for content in ("", "not a checkpoint\n"):
        (tmp_path / "x.pt").write_text(content)
        with pytest.raises(UserError, match="x.pt: not a checkpoint"):
            common.load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(UserError, match="y.pt: no such"):
        common.load_checkpoint(tmp_path / "y.pt")


# ---- devices --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Return a function (n) that lets torch have n GPUs, whose locks are in tmp_path and whose kernels do nothing."""
    def pretend(n):
        answers = {"is_available": n > 0, "device_count": n, "set_device": None, "get_device_capability": (7, 5),
                   "get_device_name": "Tesla T4", "get_arch_list": ["sm_80", "sm_90"]}
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"id{index}"))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(common, "run_kernel", torch.device)
    common.claim_device.cache_clear(), common.idle_gpu.cache_clear()
    yield pretend
    common.claim_device.cache_clear(), common.idle_gpu.cache_clear()


@pytest.fixture
def start_job(monkeypatch):
    """Return a function (per_gpu) that forks a job; it returns the process and the end of a pipe where its GPU comes.

    The job looks for a GPU twenty times a second, holds it and waits to be killed.
    """
    fork, sleep, processes = get_context("fork"), time.sleep, []
    monkeypatch.setattr(time, "sleep", lambda _: sleep(0.05))

    def work(pipe, per_gpu):
        pipe.send(common.idle_gpu(per_gpu))
        signal.pause()

    def start(per_gpu):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=work, args=(theirs, per_gpu))
        process.start()
        processes.append(process)
        return process, ours
    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("per_gpu, taken", [
    (1, ["cuda:0", "cuda:1"]), (2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"])])
@pytest.mark.parametrize("killed", [0, 1])
def test_jobs_take_idle_gpus_first_then_share_them_and_one_too_many_waits(gpus, start_job, capfd, tmp_path, per_gpu,
                                                                          taken, killed):
    gpus(2)
    jobs = []
    for name in taken:
        jobs.append(start_job(per_gpu))
        assert jobs[-1][1].poll(20) and jobs[-1][1].recv() == name
    _, waiting = start_job(per_gpu)
    assert not waiting.poll(0.5)
    jobs[killed][0].kill()
    assert waiting.poll(20) and waiting.recv() == taken[killed]
    holders = [f"pid {process.pid} on {socket.gethostname()}" for process, _ in jobs]
    assert capfd.readouterr().out == f"all GPUs are taken: waiting for one of {', '.join(holders)}\n"
    locks = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.lock")}
    assert {str(path) for path in locks} == {
        f"gpus-{os.getuid()}/.id{index}.{slot}.lock" for index in (0, 1) for slot in range(per_gpu)}


@pytest.mark.parametrize("spoil", [
    lambda folder: folder.mkdir(mode=0o755), lambda folder: (folder.mkdir(), folder.chmod(0o720)),
    lambda folder: folder.touch(0o600), lambda folder: folder.symlink_to("nowhere"),
    lambda folder: folder.symlink_to(folder.with_name("mine")),
    lambda folder: (folder.mkdir(mode=0o700), os.chown(folder, 12345, -1))])
def test_gpus_are_held_in_a_folder_of_this_user_alone(gpus, tmp_path, spoil):
    gpus(1)
    (tmp_path / "mine").mkdir(mode=0o700)
    folder = tmp_path / f"gpus-{os.getuid()}"
    try:
        spoil(folder)
    except PermissionError as e:
        pytest.skip(f"only root may give a folder away: {e}")
    with pytest.raises(UserError, match=f"^{folder}: must be a folder of yours that nobody else may enter: remove it"):
        common.idle_gpu(1)
    assert not list(tmp_path.rglob("*.lock"))


def test_the_folder_of_the_locks_lets_nobody_else_in(gpus, tmp_path):
    gpus(1)
    assert common.own_folder("gpus").stat().st_mode & 0o777 == 0o700 and common.own_folder("gpus").parent == tmp_path


def test_a_claimed_gpu_is_one_of_as_many_slots_as_are_asked_for(gpus, start_job, monkeypatch):
    gpus(1)
    _, first = start_job(1)
    assert first.poll(20) and first.recv() == "cuda:0"
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits for the first slot"))
    assert common.claim_device("auto", 2) == torch.device("cuda:0")


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might"


@pytest.mark.parametrize("name, n_ranks, told", [("auto", 1, "cuda:0"), ("cuda:1", 1, "cuda:1"), ("auto", 2, "cuda:1"),
                                                 ("cuda:0", 2, "cuda:0")])
def test_a_gpu_that_torch_was_not_built_for_is_one_line_that_says_what_to_do(gpus, monkeypatch, name, n_ranks, told):
    def fail(_):
        raise torch.AcceleratorError(NO_KERNEL)
    gpus(2)
    monkeypatch.setattr(common, "run_kernel", fail)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("the ranks joined"))
    with as_rank(1, n_ranks, LOCAL_WORLD_SIZE=2), pytest.raises(UserError) as caught:
        common.claim_device(name)
    assert str(caught.value) == (
        f"--device {told}: Tesla T4 has compute capability 7.5 (sm_75), torch {torch.__version__} was built for sm_80, "
        "sm_90: install a build of torch for this GPU, or take --device cpu (make: DEVICE=cpu)")


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory.\nmore"), AssertionError("CUDA out of memory.")])
def test_a_gpu_that_does_not_work_is_one_line(gpus, monkeypatch, error):
    def fail(_):
        raise error
    gpus(1)
    monkeypatch.setattr(common, "run_kernel", fail)
    with pytest.raises(UserError, match=r"^--device cuda:0: CUDA out of memory\.$"):
        common.claim_device("auto")


def test_a_device_computes_before_it_is_used(monkeypatch):
    common.claim_device.cache_clear(), common.idle_gpu.cache_clear()
    assert common.claim_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="^--device meta: "):  # it is a device of torch that computes nothing
        common.claim_device("meta")


@pytest.mark.parametrize("name, n_gpus, device, backend", [
    ("auto", 4, "cuda:3", "nccl"), ("cuda", 5, "cuda:3", "nccl"), ("auto", 0, "cpu", "gloo"), ("cpu", 4, "cpu", "gloo"),
    ("cuda:0", 1, "cuda:0", "gloo"), ("cuda:0", 4, "cuda:0", "gloo"), ("cuda:1", 2, "cuda:1", "gloo")])
def test_a_rank_has_a_gpu_of_its_own_unless_all_are_to_share_one(gpus, monkeypatch, name, n_gpus, device, backend):
    joined, current = [], []
    gpus(n_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *how, **more: joined.append((how, more)))
    with as_rank(7, 8, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4):  # the second of two machines
        assert common.claim_device(name) == torch.device(device)
    assert joined == [((backend,), {"device_id": torch.device(device)} if backend == "nccl" else {})]
    assert current == [torch.device(device)] * (device != "cpu")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_ranks_than_gpus_are_one_line_that_says_what_to_do(gpus, name):
    gpus(1)
    with as_rank(0, 2), pytest.raises(UserError) as caught:
        common.claim_device(name)
    assert str(caught.value) == (
        "2 processes, but 1 GPU(s) on this machine: start as many as there are GPUs (make: GPUS=n), or let all of them "
        "share one with --device cuda:0 (make: DEVICE=cuda:0)")


@pytest.mark.parametrize("wanted, cuda, n_cores, workers", [
    (None, True, 16, 8), (None, True, 3, 3), (None, False, 16, 0), (0, True, 16, 0), (12, True, 4, 12),
    (2, False, 1, 2)])
def test_loader_processes_are_as_many_as_the_device_needs_unless_told(monkeypatch, wanted, cuda, n_cores, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(n_cores)))
    assert common.loader_workers(wanted, cuda) == workers


@pytest.fixture
def shared_memory(monkeypatch):
    """Return a function that says how many bytes /dev/shm has free; None: there is no such folder."""
    def have(free):
        folder_is_there = Path.is_dir
        monkeypatch.setattr(Path, "is_dir", lambda path: folder_is_there(path) and (
            free is not None or str(path) != "/dev/shm"))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    return have


@pytest.mark.parametrize("workers, loaders, n_ranks, needed", [
    (1, [(100, 99)], 1, 400), (3, [(100, 99)], 1, 800), (3, [(100, 2)], 1, 200), (3, [(100, 99), (7, 99)], 1, 856),
    (3, [(100, 99), (7, 5)], 1, 835), (3, [(100, 99)], 4, 3200),
    (8, [(common.batch_bytes(8, 512, 512), 99), (common.batch_bytes(8, 512, SUBMIT_SIZE), 99)], 1,
     18 * 8 * (4 * 512 ** 2 + 3 * 512 ** 2 + 256 ** 2))])
def test_shared_memory_must_have_room_for_what_loader_processes_make_ahead(
        shared_memory, workers, loaders, n_ranks, needed):
    needed += 128 * 1024 * workers * len(loaders) * n_ranks  # for queues
    shared_memory(needed)
    with as_rank(0, n_ranks):
        common.check_shared_memory(workers, *loaders)
        shared_memory(needed - 1)
        with pytest.raises(UserError) as refusal:
            common.check_shared_memory(workers, *loaders)
    assert str(refusal.value) == (
        f"/dev/shm: {workers} loader processes want {needed:,} bytes there for their batches, {needed - 1:,} are free: "
        "lower --workers or --batch (make: BATCH, TRAIN_ARGS, INFER_ARGS), or give a container more, as with docker "
        "run --shm-size=1g")


def test_shared_memory_is_not_asked_for_without_processes_or_where_there_is_none(shared_memory):
    shared_memory(0)
    common.check_shared_memory(0, (100, 99))
    shared_memory(None)
    common.check_shared_memory(8, (100, 99))


# ---- how a script ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "DataLoader worker (pid 7) is killed by signal: Killed. ", "DataLoader worker (pid(s) 7) exited unexpectedly",
    "DataLoader timed out after 300 seconds", "Pin memory thread exited unexpectedly",
    "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
    "unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)",
    "Too many open files. Communication with the workers is no longer possible.",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out"])
@pytest.mark.parametrize("in_loader", [False, True])
def test_what_a_loader_process_fails_of_is_one_line_that_says_what_to_do(text, in_loader):
    raised = f"Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n" \
             f'  File "x.py", line 1, in y\nRuntimeError: {text}\n'
    line, code = common.stop_reason(RuntimeError(raised if in_loader else text))
    assert code == 1 and line == (f"a loader process failed: {text.strip()}; too little memory, /dev/shm full or a "
                                  "slow disk? Lower --workers; the same command carries on")


@pytest.mark.parametrize("text", ["out of resource: shared memory, Required: 131072", "an own augmentation's mistake"])
def test_another_error_is_no_loaders(text):
    assert common.stop_reason(RuntimeError(text)) == (None, 1)


@pytest.mark.parametrize("error", [
    MemoryError(), MemoryError("Unable to allocate 1 GiB"), OSError(12, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"), RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_too_little_memory_or_address_space_ends_in_one_line(error):
    line, code = common.stop_reason(error)
    assert line.startswith("out of memory or of address space: ") and "ulimit -v" in line and code == 1


@pytest.mark.parametrize("text", [
    "CUDA out of memory. Tried to allocate 2.00 GiB", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "GET was unable to find an engine to execute this computation"])
def test_too_little_memory_of_a_gpu_ends_in_one_line(text):
    for error in (torch.OutOfMemoryError(text), RuntimeError(text)):
        line, code = common.stop_reason(error)
        assert line.startswith(f"out of GPU memory: {text}; lower --batch ") and code == 1


@pytest.mark.parametrize(("error", "told"), [
    (OSError(24, "Too many open files", "a.png"), "too many open files: .*a.png.*; raise the limit .ulimit -n"),
    (RuntimeError("unable to open: Too many open files (24)"), "too many open files: .*; raise the limit .ulimit -n"),
    (FileNotFoundError(2, "No usable temporary directory found in ['/x']"), "no place for temporary .*; set TMPDIR to"),
    (OSError("AF_UNIX path too long"), "no place for temporary files: AF_UNIX path too long; set TMPDIR to "),
    (BrokenPipeError(32, "Broken pipe"), "nobody reads what is printed: .*; run it without head"),
    (ConnectionResetError(), "a loader process failed: ConnectionResetError; ")])
def test_other_limits_of_a_process_end_in_one_line(error, told):
    line, code = common.stop_reason(error)
    assert re.match(told, line) and code == 1


@pytest.mark.parametrize(("limit", "needs"), [(900_000, "bytes(10 ** 9)"), (600_000, '__import__("torch")')])
def test_little_address_space_is_one_line(limit, needs):
    code = f"import common; common.run_script(lambda _: {needs}, None)"
    done = subprocess.run(["bash", "-c", f"ulimit -v {limit}; exec {sys.executable} -c '{code}'"], cwd=ROOT,
                          env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch("out of memory or of address space: .*; raise the limit .*\n", done.stderr)


@pytest.mark.parametrize("name", [b"d\xff", b"gr\xfcn/d"])
@pytest.mark.parametrize("script", ["train.py", "ensemble.py"])
def test_a_path_that_is_not_utf_8_is_refused_in_one_line(script, name):
    more = [b"score", b"run"] if script == "ensemble.py" else [b"--check"]
    done = subprocess.run([sys.executable, script, *more, b"--data", name], cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and done.stdout == b""
    assert re.fullmatch(rf"{script}: error: .*\\udcf.*: is not UTF-8: rename the file or folder, or give a symbolic "
                        "link to it\n", done.stderr.decode())


def run_python(code, cwd=ROOT):
    """Run code in a Python that finds the project's files and writes no bytecode; return the finished process.

    Its environment has nothing that importing common here may have set.
    """
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-B", "-c", code], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=300)  # what hangs must not hang the tests


SCRIPT = """
from common import UserError, run_script
def main(args):
    print("begun")
    {line}
run_script(main, None)
print("never printed")
"""


@pytest.mark.parametrize(("line", "code"), [("raise UserError('a.json: mend it')", 1),
                                            ("raise UserError('a.json: mend it', 3)", 3),
                                            ("raise UserError('a.json: mend it', code=130)", 130)])
def test_a_user_error_ends_a_script_with_its_code_and_nothing_but_its_line(line, code):
    done = run_python(SCRIPT.format(line=line))
    assert (done.returncode, done.stdout, done.stderr) == (code, "begun\n", "a.json: mend it\n")


@pytest.mark.parametrize("line", ["raise ValueError('a bug')", "{}['a bug']", "assert False, 'a bug'"])
def test_any_other_exception_keeps_its_traceback(line):
    done = run_python(SCRIPT.format(line=line))
    assert done.returncode == 1 and done.stdout == "begun\n" and "a bug" in done.stderr.splitlines()[-1]
    assert done.stderr.startswith("Traceback (most recent call last)") and "in main\n" in done.stderr


def test_a_script_that_ends_well_or_by_itself_is_left_alone():
    done = run_python(SCRIPT.format(line="return"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\nnever printed\n", "")
    assert run_python(SCRIPT.format(line="raise SystemExit(7)")).returncode == 7


@pytest.fixture
def end(monkeypatch, capsys):
    """Return a function (exception) -> (exit code, stderr) of a script whose main raises it."""
    monkeypatch.setattr(common, "tune_process", lambda: None)

    def run(error, received=None):
        for number in common.ENDING:
            signal.signal(number, signal.SIG_DFL)

        def main(_):
            if received:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(received)
            if received in (signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(received)  # a second one does nothing
            raise error
        with pytest.raises(SystemExit) as stop:
            common.run_script(main, None)
        return stop.value.code, capsys.readouterr().err
    return run


def with_code(error, code):
    error.code = code
    return error


@pytest.mark.parametrize(("error", "code", "told"), [
    (UserError("first\nsecond", 4), 4, "first\nsecond\n"),
    (KeyboardInterrupt(), 130, "interrupted; the same command carries on\n"),
    (KeyboardInterrupt("x: kept is epoch 2"), 130, "x: kept is epoch 2; the same command carries on\n"),
    (FileNotFoundError(2, "No such file", "a.png"), 1, "a.png: No such file\n"), (OSError("odd"), 1, "odd\n"),
    (with_code(OSError("HTTP Error 404"), 404), 1, "HTTP Error 404\n"),  # as urllib's, whose code is no exit code
    (RuntimeError("DataLoader worker (pid 7) is killed"), 1, "a loader process failed: DataLoader worker (pid 7) is "
     "killed; too little memory, /dev/shm full or a slow disk? Lower --workers; the same command carries on\n")])
def test_what_stops_a_script_is_a_line_and_an_exit_code(end, error, code, told):
    assert end(error) == (code, told)


def test_a_signal_that_another_thread_gets_waits_for_the_end_of_a_fork():
    code = """
import os, signal, threading
from common import run_script, signals_later
def main(args):
    got, note = os.pipe()
    os.set_blocking(note, False)
    signal.set_wakeup_fd(note)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)
        os.read(got, 1)  # until the other thread has it, since this one waits
    os.register_at_fork(before=terminate)
    with signals_later():
        if not os.fork():
            os._exit(0)
        print("forked", flush=True)
    print("never printed")
run_script(main, None)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (
        143, "forked\n", "interrupted; the same command carries on\n")


def test_a_signal_waits_for_the_end_of_a_fork():
    code = """
import os, signal
from common import run_script, signals_later
def main(args):
    os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))  # Python drops what is raised here
    with signals_later():
        if not os.fork():
            os._exit(0)
    print("never printed")
run_script(main, None)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "interrupted; the same command carries on\n")


def test_a_process_that_is_left_at_the_end_is_ended():
    code = """
import multiprocessing, time
from common import run_script, signals_later
def main(args):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    with signals_later():
        child.start()  # what Python ends it by, SIGTERM, never reaches it
    print("done", flush=True)
run_script(main, None)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_signal_that_is_ignored_from_the_start_stays_so():
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + SCRIPT.format(
        line="import signal; signal.raise_signal(signal.SIGHUP)")
    assert run_python(code).stdout == "begun\nnever printed\n"


@pytest.mark.parametrize("text", ["1e-13", "-1e-320", "1e-46"])
def test_a_number_that_is_nearly_0_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not from -1 to 1"):
        common.number(float, -1, 1)(text)
    assert common.number(float, -1, 1)("0") == common.number(float, -1, 1)("-0.0") == 0


def test_a_folder_for_temporary_files_is_asked_for_where_there_is_none(end, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    with pytest.raises(FileNotFoundError) as raised:
        tempfile.gettempdir()
    assert end(raised.value)[1].startswith("no place for temporary files: ")


CLOSED = """
import os, sys
import common
def main(args):
    print("begun \\u00e4", flush=True)
    with open(sys.argv[1], "w") as f:
        f.write("content")
        f.flush()
        os.system("echo of a library >&2; echo of a library")
    common.tqdm([], disable=None)
    raise common.UserError("mend it", 3)
common.run_script(main, None)
"""


@pytest.mark.parametrize(("streams", "out", "err"), [
    ("2>&-", "begun ä\nof a library\n", ""), (">&-", "", "of a library\nmend it\n"), ("<&- >&- 2>&-", "", ""),
    ("2>/dev/full", "begun ä\nof a library\n", ""), ("", "begun ä\nof a library\n", "of a library\nmend it\n")])
def test_closed_streams_change_neither_the_exit_code_nor_a_file(tmp_path, streams, out, err):
    command = ["sh", "-c", f'exec "$0" -c "$1" "$2" {streams}', sys.executable, CLOSED, tmp_path / "file"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONUTF8": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, out, err)
    assert (tmp_path / "file").read_text() == "content"


def test_a_letter_that_the_terminal_lacks_is_escaped(tmp_path):
    command = [sys.executable, "-c", CLOSED, tmp_path / "file"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 3 and done.stdout.startswith(b"begun \\xe4\n")


def test_after_a_signal_other_errors_are_what_follows_from_it_but_a_user_error_is_told(end):
    carries_on = "; the same command carries on\n"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        assert end(KeyboardInterrupt(), number) == (code, f"interrupted{carries_on}")
        assert end(RuntimeError("a rank is gone\nmore"), number) == (code, f"a rank is gone{carries_on}")
        assert end(UserError("mend it", 3), number) == (3, "mend it\n")


class Raises:
    """A data set whose items are an error."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("error", [UserError("image 7 (7.png): mend it"), OSError("image 7 (7.png): mend it"),
                                   FileNotFoundError("image 7 (7.png): mend it")])
def test_an_error_of_a_loader_process_is_told_without_its_traceback(end, error):
    loader = torch.utils.data.DataLoader(Raises(error), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(type(error), match="Original Traceback") as raised:
        list(loader)
    assert end(raised.value) == (1, "image 7 (7.png): mend it\n")


def test_a_user_error_keeps_its_text_and_code_between_processes():
    error = pickle.loads(pickle.dumps(UserError("mend it", 3)))
    assert isinstance(error, UserError) and (str(error), error.code) == ("mend it", 3)
    assert UserError("mend it").code == 1 and not isinstance(error, SystemExit)  # a notebook's kernel lives on


SIDE_EFFECTS = """
import os, signal, sys, threading
def watch(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "os.fork", "socket.connect"):
        print(event, args)
def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return dict(os.environ), handlers, sys.argv, sys.stdout, sys.excepthook, threading.active_count(), os.getcwd()
sys.addaudithook(watch)
before = state()
import common
assert state() == before
slow = {"torch", "torchvision", "cv2", "albumentations", "segmentation_models_pytorch", "timm", "PIL", "pandas",
        "matplotlib", "sklearn", "pycocotools", "jinja2"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""


def test_importing_common_has_no_side_effect(tmp_path):
    done = run_python(SIDE_EFFECTS, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and list(tmp_path.iterdir()) == []
