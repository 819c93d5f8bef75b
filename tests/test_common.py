"""Losses, metrics, TTA, stores, augmentation, models and checkpoints of common.py."""
import json
import math
import os
import pickle

import cv2
import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import confusion_matrix, jaccard_score

import common
from common import IGNORE_INDEX, SUBMIT_SIZE, iou_ce

N_CLASSES = 4
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHARED_ENCODER = "../shared/encoders/tf_efficientnet_lite0_imagenet.pth"  # beside the project, where there is one


# ---- losses ---------------------------------------------------------------------------------------------------------

label_maps = arrays(np.uint8, st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
                    elements=st.sampled_from([*range(N_CLASSES), IGNORE_INDEX]))
seeds = st.integers(0, 2 ** 32 - 1)


def random_logits(mask, seed, n_classes=N_CLASSES):
    b, h, w = mask.shape
    return np.random.default_rng(seed).normal(0, 2, (b, n_classes, h, w)).astype(np.float32)


def as_tensors(logits, mask):
    return torch.tensor(logits), torch.from_numpy(mask.astype(np.int64))


def slow_iou_ce(logits, mask, iou_weight):
    """The formula pixel by pixel in Python's floats."""
    n_classes = logits.shape[1]
    overlap, truth, predicted = [0.0] * n_classes, [0.0] * n_classes, [0.0] * n_classes
    cross_entropy, labelled = 0.0, 0
    for b, y, x in np.ndindex(mask.shape):
        if mask[b, y, x] == IGNORE_INDEX:
            continue
        exps = [math.exp(float(logits[b, c, y, x])) for c in range(n_classes)]
        probs = [e / sum(exps) for e in exps]
        true = int(mask[b, y, x])
        cross_entropy -= math.log(probs[true])
        labelled += 1
        truth[true] += 1
        overlap[true] += probs[true]
        for c in range(n_classes):
            predicted[c] += probs[c]
    if not labelled:
        return 0.0
    ious = [overlap[c] / (truth[c] + predicted[c] - overlap[c]) for c in range(n_classes) if truth[c]]
    return iou_weight * (1 - sum(ious) / len(ious)) + (1 - iou_weight) * cross_entropy / labelled


def test_iou_ce_by_hand():
    probs = torch.tensor([[0.8, 0.4, 0.5], [0.2, 0.6, 0.5]]).view(1, 2, 1, 3)
    mask = torch.tensor([[[0, 1, IGNORE_INDEX]]])
    # class 0: 0.8 / (1 + 0.8 + 0.4 - 0.8) = 4/7; class 1: 0.6 / (1 + 0.2 + 0.6 - 0.6) = 1/2
    iou, cross_entropy = (4 / 7 + 1 / 2) / 2, -(math.log(0.8) + math.log(0.6)) / 2
    assert iou_ce(probs.log(), mask).item() == pytest.approx(0.4 * (1 - iou) + 0.6 * cross_entropy, rel=1e-5)
    assert iou_ce(probs.log(), mask, 1).item() == pytest.approx(1 - iou, rel=1e-5)
    assert iou_ce(probs.log(), mask, 0).item() == pytest.approx(cross_entropy, rel=1e-5)


@given(label_maps, seeds, st.sampled_from([0.0, 0.4, 1.0]))
@settings(deadline=None)
def test_iou_ce_equals_the_formula_written_out_pixel_by_pixel(mask, seed, iou_weight):
    logits = random_logits(mask, seed)
    assert iou_ce(*as_tensors(logits, mask), iou_weight).item() == pytest.approx(
        slow_iou_ce(logits, mask, iou_weight), rel=1e-4, abs=1e-6)


def test_iou_ce_without_the_iou_is_torchs_cross_entropy():
    mask = np.random.default_rng(0).choice([0, 1, 2, 3, IGNORE_INDEX], (2, 16, 16))
    logits, target = as_tensors(random_logits(mask, 1), mask)
    torch.testing.assert_close(iou_ce(logits, target, 0),
                               torch.nn.functional.cross_entropy(logits, target, ignore_index=IGNORE_INDEX))


@given(label_maps, seeds)
@settings(deadline=None)
def test_iou_ce_and_its_gradient_ignore_unlabelled_pixels(mask, seed):
    logits = random_logits(mask, seed)
    unlabelled = np.broadcast_to((mask == IGNORE_INDEX)[:, None], logits.shape)
    losses, gradients = [], []
    for values in (logits, np.where(unlabelled, 50 * random_logits(mask, seed + 1), logits)):
        values, target = as_tensors(values, mask)
        values.requires_grad_()
        losses.append(iou_ce(values, target))
        losses[-1].backward()
        gradients.append(values.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    assert not gradients[0].numpy()[unlabelled].any()


def test_iou_ce_of_an_unlabelled_batch_is_0_with_zero_gradients():
    logits = torch.randn(2, N_CLASSES, 3, 5, requires_grad=True)
    loss = iou_ce(logits, torch.full((2, 3, 5), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("iou_weight", [0, 0.4, 1])
def test_iou_ce_orders_predictions_from_perfect_to_wrong(iou_weight):
    mask = torch.from_numpy(np.random.default_rng(0).integers(0, N_CLASSES, (2, 8, 8)))
    right = torch.nn.functional.one_hot(mask, N_CLASSES).permute(0, 3, 1, 2).float()
    partly = right.clone()
    partly[:, :, ::2] = right.roll(1, dims=1)[:, :, ::2]  # every other row says the next class
    losses = [iou_ce(logits, mask, iou_weight).item()
              for logits in (20 * right, 5 * right, 5 * partly, -5 * right, -20 * right)]
    assert losses == sorted(losses) and len(set(losses)) == len(losses)
    assert losses[0] == pytest.approx(0, abs=1e-3)


def test_iou_ce_is_computed_in_float32_whatever_the_logits():
    mask = torch.randint(N_CLASSES, (1, 4, 4))
    logits = torch.randn(1, N_CLASSES, 4, 4).bfloat16()
    loss = iou_ce(logits, mask)
    assert loss.dtype == torch.float32 and loss == iou_ce(logits.float(), mask)


# ---- metrics --------------------------------------------------------------------------------------------------------


@st.composite
def predictions(draw):
    """(pred, mask) of one image, with a labelled pixel at least."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    mask = draw(arrays(np.uint8, shape, elements=st.sampled_from([*range(N_CLASSES), IGNORE_INDEX])))
    mask[0, 0] = draw(st.integers(0, N_CLASSES - 1))
    return draw(arrays(np.uint8, shape, elements=st.integers(0, N_CLASSES - 1))), mask


def set_miou(images):
    """mIoU of a list of (pred, mask), from sets of pixels."""
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
def test_every_view_is_undone(name):
    x = torch.arange(2 * 3 * 5 * 7.).view(2, 3, 5, 7)
    for apply, undo in common.TTA[name]:
        assert torch.equal(undo(apply(x)), x)


@pytest.mark.parametrize("name", common.TTA)
def test_the_views_of_a_set_all_differ(name):
    x = torch.arange(5 * 7.).view(1, 1, 5, 7)
    assert len({apply(x).numpy().tobytes() for apply, _ in common.TTA[name]}) == len(common.TTA[name])


@pytest.mark.parametrize("name", common.TTA)
def test_tta_changes_nothing_for_a_model_that_looks_at_single_pixels(name):
    model, images = torch.nn.Conv2d(3, N_CLASSES, 1), torch.randn(2, 3, 5, 7)
    probs = common.predict_probs(model, images, name)
    torch.testing.assert_close(probs, model(images).softmax(1).detach())


@pytest.mark.parametrize("name", common.TTA)
def test_probs_sum_to_1_in_float32_whatever_the_models_precision(name):
    model = torch.nn.Conv2d(3, N_CLASSES, 3, padding=1).bfloat16()
    probs = common.predict_probs(model, 10 * torch.randn(2, 3, 5, 7).bfloat16(), name)
    assert probs.dtype == torch.float32 and probs.shape == (2, N_CLASSES, 5, 7)
    torch.testing.assert_close(probs.sum(1), torch.ones(2, 5, 7))


def test_flip_averages_the_photo_and_its_two_mirror_images():
    model, images = torch.nn.Conv2d(3, N_CLASSES, 3, padding=1), torch.randn(2, 3, 5, 7)

    def predict(x):
        return model(torch.tensor(x.copy())).softmax(1).detach().numpy()
    x = images.numpy()
    expected = (predict(x) + predict(x[..., ::-1])[..., ::-1] + predict(x[:, :, ::-1])[:, :, ::-1]) / 3
    assert common.predict_probs(model, images, "flip").numpy() == pytest.approx(expected, abs=1e-6)
    assert common.predict_probs(model, images).numpy() == pytest.approx(predict(x), abs=1e-6)


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


@given(st.integers(1, 4), st.integers(1, 3), seeds)
@settings(deadline=None)
def test_soft_vote_is_the_weighted_mean_of_the_stores(n_stores, n_images, seed):
    rng = np.random.default_rng(seed)
    stores = rng.integers(0, 256, (n_stores, n_images, 3, 4, 5), dtype=np.uint8)
    weights = rng.uniform(0.1, 5, n_stores)
    votes = list(common.soft_vote(list(stores), weights))
    assert np.stack(votes) == pytest.approx(np.average(stores / 255, axis=0, weights=weights), abs=1e-6)
    assert votes[0].dtype == np.float32


def test_soft_vote_reads_no_image_before_it_is_asked_for():
    read = []

    def store(name):
        for i in range(5):
            read.append((name, i))
            yield np.full((2, 2, 2), 51, np.uint8)
    votes = common.soft_vote([store("a"), store("b")], [1, 1])
    assert read == []
    assert next(votes) == pytest.approx(0.2)
    assert read == [("a", 0), ("b", 0)]


def test_soft_vote_refuses_stores_of_different_lengths():
    stores = [np.zeros((n, 1, 1, 1), np.uint8) for n in (2, 3)]
    with pytest.raises(ValueError, match="shorter|longer"):
        list(common.soft_vote(stores, [1, 1]))


@pytest.fixture
def store(tmp_path):
    """The JSON path of a good store of 2 images and 3 classes."""
    np.save(tmp_path / "test.npy", np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1).repeat(256, 2).repeat(256, 3))
    (tmp_path / "test.json").write_text(json.dumps({"image_ids": [5, 3], "classes": ["Background", "a", "b"]}))
    return tmp_path / "test.json"


def test_open_store_maps_the_file_and_returns_its_description(store):
    probs, info = common.open_store(store)
    assert isinstance(probs, np.memmap) and probs[:, :, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert info == {"image_ids": [5, 3], "classes": ["Background", "a", "b"]}


STORE_FAULTS = {
    "no description": lambda path: path.unlink(),
    "description cut off": lambda path: path.write_text(path.read_text()[:-4]),
    "description is a list": lambda path: path.write_text("[]"),
    "no ids": lambda path: path.write_text('{"classes": ["a"]}'),
    "no array": lambda path: path.with_suffix(".npy").unlink(),
    "array cut off": lambda path: os.truncate(path.with_suffix(".npy"), 1000),
    "array is text": lambda path: path.with_suffix(".npy").write_text("hello"),
    "array of objects": lambda path: np.save(path.with_suffix(".npy"), np.array([{}]), allow_pickle=True),
    "an image too many": lambda path: path.write_text('{"image_ids": [5, 3, 1], "classes": ["a", "b", "c"]}'),
    "a class too few": lambda path: path.write_text('{"image_ids": [5, 3], "classes": ["a", "b"]}'),
    "floats": lambda path: np.save(path.with_suffix(".npy"), np.zeros((2, 3, 256, 256), np.float16)),
    "other size": lambda path: np.save(path.with_suffix(".npy"), np.zeros((2, 3, 128, 128), np.uint8)),
}


@pytest.mark.parametrize("fault", STORE_FAULTS)
def test_open_store_refuses_a_store_that_is_not_whole(store, fault):
    STORE_FAULTS[fault](store)
    with pytest.raises(SystemExit, match="test.json"):
        common.open_store(store)


# ---- augmentation ---------------------------------------------------------------------------------------------------


def ramp(height, width):
    """uint8 [height, width] that no flip or turn leaves as it is: x + 2 y."""
    return (np.arange(width) + 2 * np.arange(height)[:, None]).astype(np.uint8)


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_augmentation_moves_image_and_mask_together(name):
    mask = ramp(64, 80)
    image = mask[..., None].repeat(3, 2)
    augment = common.make_augmentation(name, 96)
    for seed in range(20):
        moved_image, moved_mask = augment(image, mask, np.random.default_rng(seed))
        seen = moved_mask != IGNORE_INDEX
        correlation = np.corrcoef(moved_image.mean(2)[seen], moved_mask[seen])[0, 1]  # holds for colour recipes too
        assert correlation > 0.95


@pytest.mark.parametrize("name", ["none", "basic"])
@pytest.mark.parametrize("scale", [32, 96])
def test_a_mask_is_within_half_a_pixel_of_its_image_and_not_shifted_on_average(name, scale):
    mask = ramp(63, 81)
    augment = common.make_augmentation(name, scale)
    shifts = []
    for seed in range(20):
        image, moved = augment(mask[..., None].repeat(3, 2), mask, np.random.default_rng(seed))
        shift = image[..., 0].astype(int) - moved
        assert abs(shift).max() <= 2  # half a pixel along x + 2 y is 1.5, and the image is rounded
        shifts.append(shift.mean())
    assert abs(np.mean(shifts)) < 0.25


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_an_augmented_mask_holds_only_values_that_were_there(name):
    values = np.array([1, 4, 9, 200, IGNORE_INDEX], np.uint8)
    augment = common.make_augmentation(name, 64)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mask = rng.choice(values, (50, 70))
        _, moved = augment(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8), mask, rng)
        assert set(np.unique(moved)) <= set(values)


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
    assert len(set(first)) == (1 if name == "none" else 5)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", common.DECODERS)
def test_every_decoder_makes_logits_of_the_inputs_size(decoder):
    encoder = "tu-test_vit" if decoder == "dpt" else "tu-test_efficientnet"
    sides = (160, 160) if decoder == "dpt" else (128, 160)
    model = common.build_model(f"{decoder}/{encoder}", 5).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, *sides)).shape == (2, 5, *sides)


@pytest.mark.parametrize("name", ["unet/resnet18", "fpn/tu-mobilenetv3_small_100", "deeplabv3plus/resnet18"])
def test_smps_own_and_timms_encoders_make_logits_of_the_inputs_size(name):
    model = common.build_model(name, 12).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 12, 64, 96)


@pytest.mark.parametrize(("name", "reason"), [
    ("unet/nosuch", "Wrong encoder name"), ("unet/tu-nosuch", "Unknown model"), ("dpt/resnet18", "Only Timm encoders"),
    ("unetplusplus/mit_b0", "not support"), ("unet/tu-vit_tiny_patch16_224", "Unsupported")])
def test_a_model_that_cannot_be_built_ends_with_the_reason(name, reason):
    with pytest.raises(SystemExit, match=f"{name} .*{reason}"):
        common.build_model(name, 5)


def random_state(model):
    """The model's state dict with every tensor replaced by random numbers, so that any left-over is seen."""
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 7 for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def mobilenet_state():
    return random_state(timm.create_model("mobilenetv3_small_100"))


def test_torchvisions_state_dict_is_in_the_model_that_was_built_with_it(tmp_path):
    state = random_state(torchvision.models.resnet18())
    torch.save(state, tmp_path / "resnet18.pth")
    loaded = common.build_model("unet/resnet18", 5, tmp_path / "resnet18.pth").encoder.state_dict()
    assert loaded.keys() == state.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(loaded[k], state[k]) for k in loaded)


def test_timms_state_dict_is_in_the_model_that_was_built_with_it(tmp_path, mobilenet_state):
    torch.save(mobilenet_state, tmp_path / "mobilenet.pth")
    model = common.build_model("fpn/tu-mobilenetv3_small_100", 5, str(tmp_path / "mobilenet.pth"))
    loaded = model.encoder.model.state_dict()
    assert {k.split(".")[0] for k in mobilenet_state.keys() - loaded.keys()} == {"conv_head", "classifier"}
    assert loaded and all(torch.equal(loaded[k], mobilenet_state[k]) for k in loaded)


def test_the_shared_encoder_file_is_in_the_model_that_was_built_with_it():
    path = (common.Path(common.__file__).resolve().parent / SHARED_ENCODER).resolve()
    if not path.is_file():
        pytest.skip(f"{SHARED_ENCODER} is not there")
    state = common.load_checkpoint(path)
    loaded = common.build_model("fpn/tu-tf_efficientnet_lite0", 12, path).encoder.model.state_dict()
    assert {k.split(".")[0] for k in state.keys() - loaded.keys()} == {"conv_head", "bn2", "classifier"}
    assert loaded and all(torch.equal(loaded[k], state[k]) for k in loaded)


STATE_FAULTS = {  # what is done to a state dict, and the key that the refusal must name
    "missing": lambda state, key: {k: v for k, v in state.items() if k != key},
    "renamed": lambda state, key: {f"module.{k}" if k == key else k: v for k, v in state.items()},
    "misshaped": lambda state, key: state | {key: torch.zeros(3, 2)},
    "surplus": lambda state, key: state | {key + "_more": torch.zeros(1)},
}


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_a_timm_state_dict_that_does_not_fit_is_refused_by_key(tmp_path, mobilenet_state, fault):
    key = "blocks.1.0.conv_pw.weight"
    assert key in mobilenet_state
    torch.save(STATE_FAULTS[fault](mobilenet_state, key), tmp_path / "bad.pth")
    with pytest.raises(SystemExit, match=f"(?s)bad.pth.*{key}"):
        common.build_model("fpn/tu-mobilenetv3_small_100", 5, tmp_path / "bad.pth")


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_a_torchvision_state_dict_that_does_not_fit_is_refused_by_key(tmp_path, fault):
    key = "layer2.0.conv1.weight"
    torch.save(STATE_FAULTS[fault](torchvision.models.resnet18().state_dict(), key), tmp_path / "bad.pth")
    with pytest.raises(SystemExit, match=f"(?s)bad.pth.*{key}"):
        common.build_model("unet/resnet18", 5, tmp_path / "bad.pth")


@pytest.mark.parametrize("content", [{"model": {"conv1.weight": torch.zeros(2)}, "epoch": 3}, [1, 2], torch.zeros(2)])
@pytest.mark.parametrize("name", ["unet/resnet18", "fpn/tu-mobilenetv3_small_100"])
def test_a_file_that_is_no_state_dict_is_refused_by_name(tmp_path, name, content):
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(SystemExit, match="bad.pth"):
        common.build_model(name, 5, tmp_path / "bad.pth")


@pytest.mark.parametrize("name", ["unet/resnet18", "fpn/tu-mobilenetv3_small_100"])
def test_a_missing_weights_file_is_refused_by_name(tmp_path, name):
    with pytest.raises(SystemExit, match="none.pth: no such"):
        common.build_model(name, 5, tmp_path / "none.pth")


def test_mean_and_std_are_those_the_encoders_weights_were_made_with():
    half = ((0.5,) * 3,) * 2
    assert common.encoder_mean_std("fpn/tu-tf_efficientnet_lite0") == half
    assert common.encoder_mean_std("unet/tu-tf_efficientnet_lite0.in1k") == half
    assert common.encoder_mean_std("unet/resnet18") == IMAGENET
    assert common.encoder_mean_std("fpn/tu-mobilenetv3_small_100") == IMAGENET
    assert common.encoder_mean_std("unet/tu-nosuch") == IMAGENET


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class RunsOnUnpickling:
    """Makes a folder when a pickle of it is loaded."""

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
    with pytest.raises(SystemExit, match="x.pt: not a checkpoint"):
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
    with pytest.raises(SystemExit, match="cut.pt: not a checkpoint"):
        common.load_checkpoint(folder / "cut.pt")


def test_a_file_that_is_no_checkpoint_or_missing_is_refused_by_name(tmp_path):
    for content in ("", "not a checkpoint\n"):
        (tmp_path / "x.pt").write_text(content)
        with pytest.raises(SystemExit, match="x.pt: not a checkpoint"):
            common.load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(SystemExit, match="y.pt: no such"):
        common.load_checkpoint(tmp_path / "y.pt")


def test_a_model_is_rebuilt_from_its_checkpoint_alone(tmp_path):
    model = common.build_model("unet/tu-test_efficientnet", 3)
    model.load_state_dict(random_state(model))
    common.save_checkpoint(tmp_path / "model.pt", model=model.state_dict(), classes=["Background", "a", "b"], epoch=4,
                           recipe={"model": "unet/tu-test_efficientnet", "scale": 64}, valid_ids=[7])
    rebuilt, state = common.load_model(tmp_path / "model.pt")
    assert not rebuilt.training and state["epoch"] == 4 and state["recipe"]["scale"] == 64
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in rebuilt.state_dict().items())


def test_a_checkpoint_of_something_else_is_no_model(tmp_path):
    for value in ({"model": {}}, [1, 2]):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(SystemExit, match="x.pt: not a model.pt"):
            common.load_model(tmp_path / "x.pt")
