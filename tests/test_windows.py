"""Real crops and whole photos: native crops in training, overlapping windows in prediction, infer.py --scale."""
import shutil
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import run_folder, run_of, run_until_killed, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

import common
import infer
import train
from common import IGNORE_INDEX, SUBMIT_SIZE, UserError

torch.set_num_threads(1)  # for nets this small a second thread would only wait for the first
MODEL, SCALE = "fpn-narrow/tu-test_efficientnet", 64
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
SIZES = [(200, 150), (64, 64), (130, 48), (20, 30)]  # of photos, larger and smaller than the windows


class Colours(torch.nn.Module):
    """A model whose probabilities are the colours of the image: after softmax they are its channels' shares."""

    def forward(self, images):
        return (images + 1e-3).log()


def windowed(model, images, scale, sizes=None, tta="none", scales=(1.0,), batch=5):
    """[probs float32 [C, h, w]] of images; by default in their own sizes."""
    sizes = sizes or [image.shape[:2] for image in images]
    predict = partial(common.predict_probs, [model], views=common.tta_views(tta), scales=scales)
    probs = common.predict_windows(predict, PLAIN | {"scale": scale}, zip(images, sizes, strict=True), batch,
                                   torch.device("cpu"))
    return [each.numpy() for each in probs]


def shares(image):
    """The probabilities of Colours, [3, H, W]."""
    values = image.transpose(2, 0, 1) / 255 + 1e-3
    return values / values.sum(0)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8)


# ---- windows --------------------------------------------------------------------------------------------------------


def test_the_windows_of_ten_pixels_are_those_worked_out_by_hand():
    """Side 8: two windows, at 0 and 2; sin^2 of 1/16 to 15/16 of half a turn, and what they share, added up."""
    hann = [0.0381, 0.3087, 0.6913, 0.9619, 0.9619, 0.6913, 0.3087, 0.0381]
    (start, first, left), (next_start, next_first, right) = common.axis_windows(10, 8, 10)
    assert (start, first, left.shape, next_start, next_first, right.shape) == (0, 0, (8, 8), 2, 2, (8, 8))
    weights = left.diagonal().tolist()
    assert weights[:2] == [1, 1]  # nobody else sees them
    for pixel in range(2, 8):
        assert weights[pixel] == pytest.approx(hann[pixel] / (hann[pixel] + hann[pixel - 2]), abs=1e-3)
    assert torch.equal(left, left.diagonal().diag()) and torch.equal(right, right.diagonal().diag())
    assert right.diagonal().flip(0).tolist() == pytest.approx(weights)


@settings(max_examples=40)
@given(st.integers(1, 300), st.sampled_from([32, 64, 96]), st.integers(1, 300))
def test_windows_cover_an_axis_overlap_by_half_and_their_weights_sum_to_one(length, side, size):
    windows = common.axis_windows(length, side, size)
    starts = [start for start, *_ in windows]
    assert starts[0] == 0 and starts[-1] == max(0, length - side)
    assert all(0 < after - before <= side / 2 + 0.5 for before, after in pairwise(starts))
    resized = torch.zeros(size)
    for _, first, matrix in windows:
        resized[first:first + len(matrix)] += matrix.sum(1)
    assert abs(resized - 1).max() < 1e-5  # of equal values each result is that value


@pytest.mark.parametrize("tta", ["none", "flip", "d4"])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0)])
def test_a_model_with_one_answer_has_it_everywhere_in_any_size(tta, scales):
    class Same(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([0.2, 0.3, 0.5]).log()[None, :, None, None].expand(len(images), 3, *images.shape[2:])
    images = [noise(*size) for size in SIZES]
    for sizes in (None, [(SUBMIT_SIZE, SUBMIT_SIZE)] * 4, [(9, 400)] * 4):
        for probs in windowed(Same(), images, 64, sizes, tta, scales):
            assert abs(probs - np.float32([0.2, 0.3, 0.5])[:, None, None]).max() < 1e-5


@pytest.mark.parametrize("tta", ["none", "flip_rot"])
def test_a_model_that_answers_with_the_photo_gives_the_photo_back(tta):
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    for image, probs in zip(images, windowed(Colours(), images, 64, tta=tta), strict=True):
        assert probs.shape == (3, *image.shape[:2]) and abs(probs - shares(image)).max() < 1e-5


@pytest.mark.parametrize("size", [(SUBMIT_SIZE, SUBMIT_SIZE), (50, 90), (7, 3)])
def test_probabilities_in_another_size_are_those_of_the_photo_resized(size):
    images = [noise(*each, seed) for seed, each in enumerate(SIZES)]
    for image, probs in zip(images, windowed(Colours(), images, 64, [size] * 4), strict=True):
        whole = torch.from_numpy(shares(image)[None])
        expected = interpolate(whole, size, mode="bilinear", antialias=True)[0].numpy()
        assert abs(probs - expected).max() < 1e-5


def test_batches_of_windows_are_full_also_across_photos_and_only_one_photo_is_waited_for():
    sizes, drawn = [], []

    def predict(images):
        sizes.append(len(images))
        return images.softmax(1)

    def photos():
        for n, size in enumerate([(96, 96), (64, 64), (64, 96), (64, 64)]):  # 4, 1, 2 and 1 windows of 64
            drawn.append(n)
            yield noise(*size), size
    probs = common.predict_windows(predict, PLAIN | {"scale": 64}, photos(), 4, torch.device("cpu"))
    assert next(probs).shape == (3, 96, 96) and drawn == [0] and sizes == [4]
    assert [each.shape for each in probs] == [(3, 64, 64), (3, 64, 96), (3, 64, 64)] and sizes == [4, 4]


def test_what_is_predicted_does_not_depend_on_the_batch():
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    model = torch.nn.Conv2d(3, 4, 9, padding=4)
    for one, many in zip(windowed(model, images, 64, batch=1), windowed(model, images, 64, batch=16), strict=True):
        assert abs(one - many).max() < 1e-6


# ---- native crops ---------------------------------------------------------------------------------------------------


def numbered(height, width):
    """A photo whose pixels name their place, and a mask with one pixel of class 7, and IGNORE_INDEX on the left."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows % 256, columns % 256, rows // 256 + 16 * (columns // 256)], 2).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[:, 0] = IGNORE_INDEX
    mask[height // 3, width // 2] = 7
    return image, mask


def places(image):
    """(rows, columns) that the pixels of a crop of `numbered` come from."""
    red, green, blue = image.astype(int).transpose(2, 0, 1)
    return red + 256 * (blue % 16), green + 256 * (blue // 16)


def test_a_native_crop_is_a_square_of_the_photo_as_it_is_and_half_of_them_lie_on_an_object():
    image, mask = numbered(700, 400)
    rng, tops, lefts, hits = np.random.default_rng(0), [], [], 0
    for _ in range(400):
        crop, cut = common.native_crop(image, mask, 64, rng)
        rows, columns = places(crop)
        top, left = rows[0, 0], columns[0, 0]
        assert np.array_equal(crop, image[top:top + 64, left:left + 64]) and crop.shape == (64, 64, 3)
        assert np.array_equal(cut, mask[top:top + 64, left:left + 64])
        tops.append(top)
        lefts.append(left)
        hits += 7 in cut
    assert 0.4 < hits / 400 < 0.65  # a crop anywhere hits it once in 50 times
    assert min(tops) < 30 and max(tops) > 600 and min(lefts) < 30 and max(lefts) > 310


def test_each_class_of_a_photo_is_cropped_as_often_however_large_it_is():
    image, mask = noise(500, 500), np.zeros((500, 500), np.uint8)
    mask[:, 250:] = 1
    mask[10, 10], mask[490, 10] = 2, 3
    rng = np.random.default_rng(0)
    seen = [set(np.unique(common.native_crop(image, mask, 32, rng)[1]).tolist()) for _ in range(600)]
    for class_id in (2, 3):
        assert 0.11 < sum(class_id in some for some in seen) / 600 < 0.23  # a half of a third


@pytest.mark.parametrize("size", [(20, 30), (64, 20), (10, 100), (1, 1)])
def test_a_photo_smaller_than_the_crop_is_reflected_and_ignored_there(size):
    image, mask = noise(*size), np.full(size, 3, np.uint8)
    crop, cut = common.native_crop(image, mask, 64, np.random.default_rng(0))
    height, width = (min(64, side) for side in size)
    assert crop.shape == (64, 64, 3) and cut.shape == (64, 64)
    assert (cut[:height, :width] == 3).all() and (cut == 3).sum() == height * width
    assert set(np.unique(cut)) <= {3, IGNORE_INDEX}
    if size == (20, 30):
        assert np.array_equal(crop, np.pad(image, ((0, 44), (0, 34), (0, 0)), mode="reflect"))


def test_a_sample_is_cropped_from_the_seed_and_a_label_is_brought_to_the_photo_first(splits):
    labelled, test = splits
    label = np.zeros((SUBMIT_SIZE, SUBMIT_SIZE), np.uint8)
    label[128:] = 5  # the lower half
    entries = [(labelled, 3, None), (test, 1, label)]
    samples = common.TrainSamples(entries, lambda image, mask, rng: (image, mask), 7, side=32)
    for index, (split, number, _) in enumerate(entries):
        photo = np.asarray(split.image(number))
        mask = np.asarray(split.mask(number)) if split is labelled else np.repeat([0, 5], 32)[:, None].repeat(64, 1)
        crops = [samples[epoch, index] for epoch in range(20)]
        again = [samples[epoch, index] for epoch in range(20)]
        assert all(np.array_equal(np.dstack(one), np.dstack(two)) for one, two in zip(crops, again, strict=True))
        tops = set()
        for crop, cut in crops:
            assert crop.shape == (32, 32, 3)
            found = [(y, x) for y in range(33) for x in range(33) if np.array_equal(photo[y:y + 32, x:x + 32], crop)]
            assert any(np.array_equal(mask[y:y + 32, x:x + 32], cut) for y, x in found)
            tops.add(found[0])
        assert len(tops) > 10


# ---- the scripts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big_data(tmp_path_factory):
    """Photos of several sizes, larger and smaller than a window, with a square of two classes each."""
    folder, images, annotations = tmp_path_factory.mktemp("big"), [], []
    for n in range(10):
        height, width = SIZES[n % 4]
        images.append({"id": n, "height": height, "width": width, "file_name": f"{n}.png"})
        photo, side = noise(height, width, n) // 2, 12
        for k, (top, left) in enumerate([(2 + n % 3, 3), (height - 14, width - 15)]):
            photo[top:top + side, left:left + side] = (250, 20, 20) if k else (20, 250, 20)
            corners = [left, top, left + side, top, left + side, top + side, left, top + side]
            annotations.append((n, k, [corners]))
        cv2.imwrite(str(folder / f"{n}.png"), photo[..., ::-1])
    test = [image | {"id": 100 + image["id"]} for image in images[:5]]
    return write_coco(folder, images, annotations, test_images=test, photos=False)


def train_line(data, cache, exp, *more):
    return train.parse_args(["--data", str(data), "--exp", str(exp), "--cache", str(cache), "--model", MODEL, "--scale",
                             str(SCALE), "--folds", "2", "--epochs", "2", "--weights", "none", "--lr", "1e-2",
                             "--device", "cpu", "--batch", "4", *map(str, more)])


@pytest.fixture(scope="module")
def native(big_data, cache, tmp_path_factory):
    """The arguments of a run of native crops, trained; for reading."""
    args = train_line(big_data, cache, tmp_path_factory.mktemp("native"), "--crop", "native", "--repeat", 4,
                      "--classmix", "plain", "--epochs", 3)
    train.main(args)
    return args


@pytest.fixture
def native_run(native, tmp_path):
    """A copy of its folder to change."""
    return shutil.copytree(run_of(native), tmp_path / "run")


def infer_line(data, cache, run, *more):
    return infer.parse_args(["--data", str(data), "--checkpoint", str(run / "model.pt"), "--cache", str(cache),
                             "--device", "cpu", "--batch", "3", *map(str, more)])


def test_a_run_of_native_crops_is_validated_on_whole_photos_by_windows(native, big_data, cache):
    run = run_of(native)
    trained = common.load_model(run / "model.pt")
    assert trained.recipe["crop"] == "native" and trained.recipe["repeat"] == 4
    labelled, _ = common.load_data(big_data, cache)
    counts = []
    for image_id in trained.checkpoint["valid_ids"]:
        index = labelled.ids.index(image_id)
        probs, = windowed_by(trained, labelled.image(index), (SUBMIT_SIZE, SUBMIT_SIZE))
        counts.append(common.confusion(probs.argmax(0).astype(np.uint8), labelled.truth(index), 3))
    assert len(counts) == 5
    assert common.scores(np.stack(counts), 4)["v3"] == pytest.approx(trained.checkpoint["v3"], abs=1e-6)


def windowed_by(trained, image, size, tta="none", scales=(1.0,), **changes):
    predict = partial(common.predict_probs, [trained.model], views=common.tta_views(tta), scales=scales)
    probs = common.predict_windows(predict, trained.recipe | changes, [(np.asarray(image), size)], 2,
                                   torch.device("cpu"))
    return [each.numpy() for each in probs]


def test_each_photo_comes_as_often_as_repeat_says_with_other_crops(native, big_data, cache):
    splits = *common.load_data(big_data, cache), []
    loader, _ = train.make_loaders(native, splits, np.arange(5), np.arange(5, 10), cuda=False)
    keys = [key for batch in loader.batch_sampler for key in batch]
    assert sorted(index for _, index in keys) == list(range(20)) and len(loader.dataset.entries) == 20
    assert [loader.dataset.entries[n][1] for n in range(20)] == 4 * list(range(5))
    assert not np.array_equal(loader.dataset[0, 0][0], loader.dataset[0, 5][0])


@pytest.mark.parametrize("more", [["--tta", "none"], ["--tta", "flip", "--tta-scales", 1, 1.5], ["--scale", 96]])
def test_a_store_of_a_native_model_holds_the_windows_probabilities_of_full_photos(big_data, cache, native_run, more):
    args = infer_line(big_data, cache, native_run, *more)
    infer.main(args)
    trained = common.load_model(native_run / "model.pt")
    for name, split in zip(("valid", "test"), common.load_data(big_data, cache), strict=True):
        store, info = common.open_store(native_run / f"{name}.json", common.Hashes(cache))
        assert len(store) == 5 and info["recipe"]["scale"] == args.scale
        for stored, image_id in zip(store, info["image_ids"], strict=True):
            image = split.image(split.ids.index(image_id))
            probs, = windowed_by(trained, image, (SUBMIT_SIZE, SUBMIT_SIZE), args.tta, args.tta_scales,
                                 scale=args.scale or SCALE)
            assert abs(probs - stored / 255).max() < 0.51 / 255
    assert (np.load(native_run / "valid.npy").argmax(1) > 0).any()


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_killed_prediction_of_a_native_model_carries_on_to_the_same_bytes(
        big_data, cache, native_run, tmp_path, call):
    whole = shutil.copytree(native_run, tmp_path / "whole")
    infer.main(infer_line(big_data, cache, whole))
    run_until_killed(infer, infer_line(big_data, cache, native_run), "write_batch", call)
    infer.main(infer_line(big_data, cache, native_run, "--workers", 1))
    for name in ("valid.npy", "test.npy"):
        assert (native_run / name).read_bytes() == (whole / name).read_bytes()


def test_a_damaged_test_photo_is_background_in_a_native_models_store(big_data, cache, native_run, tmp_path):
    data = shutil.copytree(big_data, tmp_path / "data")
    coco = common.read_json(data / "test.json")
    coco["images"][2]["file_name"] = "cut.png"
    common.write_json(data / "test.json", coco)
    (data / "cut.png").write_bytes((data / "2.png").read_bytes()[:900])
    infer.main(infer_line(data, tmp_path / "cache", native_run, "--split", "test", "--out", tmp_path / "out"))
    store = np.load(tmp_path / "out/test.npy")
    assert (store[2, 0] == 255).all() and not store[2, 1:].any() and not (store[1, 0] == 255).all()


def test_predict_photo_and_a_folder_of_photos_take_a_native_model_too(big_data, native, tmp_path):
    trained = common.load_model(run_of(native) / "model.pt")
    infer.main(infer.parse_args(["--photos", str(big_data), "--out", str(tmp_path / "out"), "--cache",
                                 str(tmp_path / "cache"), "--device", "cpu", "--checkpoint",
                                 str(run_of(native) / "model.pt")]))
    for n in range(4):
        image = cv2.imread(str(big_data / f"{n}.png"))[..., ::-1]
        probs = common.predict_photo(trained, image)
        assert probs.shape == (3, *SIZES[n]) and abs(probs.sum(0) - 1).max() < 1e-5
        expected, = windowed_by(trained, image, SIZES[n], "flip")
        assert abs(probs - expected).max() < 1e-5
        mask = np.array(Image.open(tmp_path / f"out/masks/{n}.png"))
        assert mask.shape == SIZES[n] and (mask != probs.argmax(0)).mean() < 1e-3


def test_a_native_model_and_one_of_whole_photos_are_averaged_over_probabilities(big_data, cache, native, tmp_path):
    other = train_line(big_data, cache, tmp_path / "exp")
    train.main(other)
    paths = [str(run_of(args) / "model.pt") for args in (native, other)]
    infer.main(infer.parse_args(["--photos", str(big_data), "--out", str(tmp_path / "out"), "--cache", str(cache),
                                 "--device", "cpu", "--tta", "none", "--checkpoint", *paths]))
    for n, size in enumerate(SIZES):
        image = cv2.imread(str(big_data / f"{n}.png"))[..., ::-1]
        probs = [common.predict_photo(common.load_model(path), image, "none") for path in paths]
        mask = np.array(Image.open(tmp_path / f"out/masks/{n}.png"))
        assert mask.shape == size and (mask != np.mean(probs, 0).argmax(0)).mean() < 0.01


def test_a_vote_of_a_native_model_is_that_of_its_store(big_data, cache, native_run, tmp_path):
    infer.main(infer_line(big_data, cache, native_run, "--split", "test", "--tta", "flip"))
    store, info = common.open_store(native_run / "test.json", common.Hashes(cache))
    run = {"folder": ".", "weight": 1.0, "settings": {"tta": "flip", "tta_scales": [1.0], "scale": None},
           "checkpoints": info["checkpoints"]}
    common.write_json(native_run / "s.vote.json", {"runs": [run], "least share": 0.0, "steps": {}})
    infer.main(infer.parse_args(["--photos", str(big_data), "--out", str(tmp_path / "out"), "--cache", str(cache),
                                 "--device", "cpu", "--vote", str(native_run / "s.vote.json")]))
    for n in range(4):
        pred, size = store[n].argmax(0), SIZES[n]
        rows, columns = ((2 * np.arange(side) + 1) * SUBMIT_SIZE // (2 * side) for side in size)
        mask = np.array(Image.open(tmp_path / f"out/masks/{n}.png"))
        assert (mask != pred[rows][:, columns]).mean() < 1e-3


def test_probabilities_of_a_huge_photo_are_added_up_in_a_bounded_size():
    assert infer.probs_size((1500, 2000)) == (1500, 2000) and infer.probs_size((8192, 4096)) == (2048, 1024)
    assert infer.probs_size((1, 30000)) == (1, 2048)


# ---- --scale --------------------------------------------------------------------------------------------------------


def test_another_scale_is_made_from_the_full_photo_and_decides_the_store(big_data, cache, tmp_path):
    args = train_line(big_data, cache, tmp_path / "exp")
    train.main(args)
    run = run_folder(tmp_path / "exp", 0, MODEL, SCALE, 0)
    infer.main(infer_line(big_data, cache, run, "--tta", "none"))
    before = np.load(run / "test.npy")
    infer.main(infer_line(big_data, cache, run, "--tta", "none", "--scale", 128))
    store, info = common.open_store(run / "test.json", common.Hashes(cache))
    assert info["tta"] == "none at 128" and (store != before).mean() > 0.01
    trained, (_, test) = common.load_model(run / "model.pt"), common.load_data(big_data, cache)
    for n, image_id in enumerate(info["image_ids"]):
        image = common.resize_image(test.image(test.ids.index(image_id)), 128)  # not of what was 64 already
        images = common.normalise(torch.from_numpy(image)[None], trained.recipe["mean"], trained.recipe["std"])
        with torch.inference_mode():
            probs = common.resize_probs(trained.model(images).softmax(1))[0].numpy()
        assert abs(probs - store[n] / 255).max() < 0.51 / 255


@pytest.mark.parametrize("scale", ["16", "0", "x", "8192"])
def test_a_scale_that_is_none_is_refused(big_data, cache, tmp_path, scale):
    with pytest.raises(SystemExit) as stop:
        infer_line(big_data, cache, tmp_path, "--scale", scale)
    assert stop.value.code == 2


def test_a_scale_that_a_model_can_not_do_is_one_line():
    name = "pan/tu-test_efficientnet"
    recipe = {"model": name, "scale": 128, **PLAIN}
    trained = common.TrainedModel(common.build_model(name, 3).eval(), recipe, ["Background", "a", "b"], {})
    infer.check_sides(trained, {"scale": None, "tta_scales": [1.0]})
    with pytest.raises(UserError, match=f"{name} can't work at scale 64 .--scale.: "):
        infer.check_sides(trained, {"scale": 64, "tta_scales": [1.0]})


def test_without_the_option_nothing_of_a_sample_changes(splits):
    """The draws of an augmentation are those of the seed alone, as before there were native crops."""
    seen = []
    samples = common.TrainSamples([(splits[0], 2, None)], lambda *sample: seen.append(sample) or sample[:2], 3)
    samples[4, 0]
    image, mask, rng = seen[0]
    assert np.array_equal(image, splits[0].image(2)) and np.array_equal(mask, splits[0].mask(2))
    assert rng.random() == np.random.default_rng([common.SAMPLE, 3, 4, 0]).random()
    assert infer.seen_by(SimpleNamespace(recipe={"scale": 64})) == (64, "photo")
