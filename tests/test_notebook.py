"""Test what a notebook takes from common.py: load_data, overlay, load_model and predict_photo."""
import pickle
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, SCALE, run_of, write_coco
from PIL import Image

import common
import infer
import train
from common import SUBMIT_SIZE, UserError, load_data, load_model, overlay, predict_photo, resize_probs

torch.set_num_threads(1)  # for nets this small a second thread would only wait for the first
ANY_SIZES = [(1, 1), (1, 1000), (1000, 1), (37, 61), (63, 65), (64, 64), (97, 33), (300, 200), (513, 511)]  # scale: 64
# From the model's 64 pixels to these a photo is resized so that its resizing to the submission's size is infer.py's.
EXACT_SIZES = [(64, 64), (256, 256), (512, 512), (64, 256), (512, 64), (256, 512)]


@pytest.fixture(scope="module")
def run(line, tmp_path_factory):
    """Return the folder of a trained run; tests only read it."""
    args = line(tmp_path_factory.mktemp("trained"), "--epochs", 2, "--lr", 1e-2)
    train.main(args)
    return run_of(args)


@pytest.fixture(scope="module")
def trained(run):
    return load_model(run / "model.pt")


def photo(height, width, seed=0):
    """Return uint8 [height, width, 3] in blocks of colour, which a model finds something in."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(blocks, (width, height), interpolation=cv2.INTER_CUBIC)


def slow_probs(trained, image, axes):
    """Return float32 [C, H, W] of a photo: the answers to its mirror images along `axes`, averaged."""
    height, width = image.shape[:2]
    how = cv2.INTER_AREA if min(height, width) > SCALE else cv2.INTER_LINEAR
    seen = (cv2.resize(image, (SCALE, SCALE), interpolation=how) / 255 - trained.recipe["mean"]) / trained.recipe["std"]
    total = 0
    for axis in axes:
        view = seen if axis is None else np.flip(seen, axis)
        with torch.no_grad():
            probs = trained.model(torch.from_numpy(view.transpose(2, 0, 1)[None].copy()).float())[0].softmax(0)
        probs = np.moveaxis(probs.numpy(), 0, 2)
        total = total + (probs if axis is None else np.flip(probs, axis))
    planes = np.moveaxis(total / len(axes), 2, 0)
    return np.stack([cv2.resize(plane, (width, height)) for plane in planes])


# ---- a photo's probabilities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tta", "axes"), [("none", [None]), ("flip", [None, 0, 1])])
@pytest.mark.parametrize("size", ANY_SIZES)
def test_a_photo_of_any_size_has_the_models_probabilities(trained, size, tta, axes):
    image = photo(*size)
    probs = predict_photo(trained, image, tta)
    assert type(probs) is np.ndarray and probs.dtype == np.float32 and probs.shape == (12, *size)
    assert abs(probs.sum(0) - 1).max() < 1e-5 and probs.min() >= 0
    assert abs(probs - slow_probs(trained, image, axes)).max() < 1e-5


@pytest.mark.parametrize(("tta", "scales"), [("none", [1.0]), ("flip", [1.0]), ("hflip+rot90cw", [1.5, 1.0])])
def test_a_photos_probabilities_are_those_of_the_store_that_infer_py_writes(run, trained, cache, tmp_path, tta, scales):
    categories = list(enumerate(trained.classes[1:]))
    images = [{"id": n, "height": height, "width": width, "file_name": f"{n}.png"}
              for n, (height, width) in enumerate(EXACT_SIZES)]
    data = write_coco(tmp_path / "data", [(99, 8, 8)], [(99, 3, [[1, 1, 6, 1, 6, 6]])], categories, images)
    for n, size in enumerate(EXACT_SIZES):
        Image.fromarray(photo(*size, seed=n)).save(data / f"{n}.png")
    infer.main(infer.parse_args([
        "--data", str(data), "--checkpoint", str(run / "model.pt"), "--split", "test", "--out", str(tmp_path / "out"),
        "--cache", str(cache), "--device", "cpu", "--tta", tta, "--tta-scales", *map(str, scales)]))
    store = np.load(tmp_path / "out/test.npy")
    _, test = load_data(data, cache)
    assert test.ids == list(range(len(EXACT_SIZES))) and len(store) == len(EXACT_SIZES)
    assert (store.argmax(1) > 0).any() and len({of_photo.tobytes() for of_photo in store}) == len(store)
    for n, stored in enumerate(store):
        probs = predict_photo(trained, test.image(n), tta, scales)
        resized = resize_probs(torch.from_numpy(probs)[None])[0].numpy()
        assert resized.shape == stored.shape and abs(resized * 255 - stored).max() <= 0.5 + 1e-3


def test_a_photo_may_be_any_view_of_uint8_and_stays_as_it_is(trained):
    image = photo(60, 90)
    before, expected = image.copy(), predict_photo(trained, image)
    part_of_larger = np.pad(image, ((3, 3), (5, 5), (0, 1)))[3:-3, 5:-5, :3]
    for same in (part_of_larger, image[:, ::-1].copy()[:, ::-1], Image.fromarray(image), torch.from_numpy(image)):
        assert np.array_equal(predict_photo(trained, same), expected)
    assert np.array_equal(image, before)
    image.flags.writeable = False
    assert np.array_equal(predict_photo(trained, image), expected)
    assert not np.array_equal(predict_photo(trained, image[..., ::-1]), expected)  # BGR is another photo


@pytest.mark.parametrize("image", [
    photo(8, 9)[..., 0], photo(8, 9) / 255, photo(8, 9).astype(np.int64), photo(8, 9)[None],
    photo(8, 9).transpose(2, 0, 1), np.dstack([photo(8, 9), photo(8, 9)[..., 0]]), photo(8, 9)[..., :1],
    photo(8, 9)[:0], photo(8, 9)[:, :0], None, "photo.jpg"], ids=lambda image: str(getattr(image, "shape", image)))
def test_what_is_no_rgb_photo_is_refused_in_one_line(trained, image):
    with pytest.raises(UserError, match=r"^an image must be uint8 \[H, W, 3\], not .*$") as error:
        predict_photo(trained, image)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tta", ["fliip", "", "flip,", "hflip,none", "hflip+", "identity hflip"])
def test_an_unknown_view_is_refused_with_those_that_there_are(trained, tta):
    with pytest.raises(UserError, match="is none of none, flip, .* and none of identity, hflip") as error:
        predict_photo(trained, photo(8, 9), tta)
    assert "\n" not in str(error.value)


def test_a_scale_that_the_model_cannot_do_is_refused():
    name = "pan/tu-test_efficientnet"
    recipe = {"model": name, "scale": 128, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    model = common.TrainedModel(common.build_model(name, 3).eval(), recipe, ["Background", "a", "b"], {})
    assert predict_photo(model, photo(8, 9), "none").shape == (3, 8, 9)
    with pytest.raises(UserError, match=f"{name} can't work at scale 64: "):
        predict_photo(model, photo(8, 9), "none", (1, 0.5))


# ---- models, data, pictures -----------------------------------------------------------------------------------------


def test_a_model_is_what_its_run_says_and_ready_to_predict(run, trained, splits):
    assert trained.classes == splits[0].classes and trained.recipe == common.read_json(run / "config.json")["recipe"]
    assert not trained.model.training and {"epoch", "v3", "valid_ids"} <= trained.checkpoint.keys()
    assert next(trained.model.parameters()).device.type == "cpu"


class Trap:
    def __reduce__(self):
        return pytest.fail, ("the file's code was run",)


def test_a_file_that_is_no_model_is_refused_in_one_line_that_names_it(run, tmp_path):
    good, png = (run / "model.pt").read_bytes(), cv2.imencode(".png", photo(8, 8))[1]
    contents = {"empty.pt": b"", "text.pt": b"weights\nof mine\n", "photo.pt": png.tobytes(),
                "trap.pt": pickle.dumps(Trap(), 2), "cut.pt": good[:len(good) // 2], "swapped.pt": good[::-1]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("data.pkl", b"x")
    foreign = {"list.pt": [1, 2], "weights.pt": {"conv.weight": torch.zeros(2)}, "tensor.pt": torch.zeros(2)}
    for name, content in foreign.items():
        torch.save(content, tmp_path / name)
    paths = [tmp_path / name for name in ("missing.pt", "zip.pt", *contents, *foreign)]
    for path in (*paths, tmp_path, run / "config.json", run / "log.csv"):
        with pytest.raises(UserError, match=f"^{path}: ") as error:
            load_model(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="missing.pt: no such checkpoint"):
        load_model(str(tmp_path / "missing.pt"))


def test_a_model_of_other_weights_is_refused_in_one_line(run, tmp_path):
    state = common.load_checkpoint(run / "model.pt")
    state["model"] = dict(list(state["model"].items())[:-1])
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="model.pt: its weights are not those of ") as error:
        load_model(tmp_path / "model.pt")
    assert "\n" not in str(error.value)


def test_data_is_two_splits_of_photos_with_masks_where_there_are_any(tiny_data, cache):
    labelled, test = load_data(str(tiny_data), str(cache))
    assert (len(labelled.ids), len(test.ids)) == (14, 4) and labelled.classes == test.classes
    assert labelled.image(0).shape == (64, 64, 3) and labelled.mask(0).shape == (64, 64)
    assert labelled.image(0).dtype == labelled.mask(0).dtype == test.image(3).dtype == np.uint8


def test_faults_of_the_data_are_listed_at_once(tmp_path):
    with pytest.raises(UserError, match="nosuch: no such folder"):
        load_data(tmp_path / "nosuch", tmp_path / "cache")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no .*train.json and no .*test.json"):
        load_data(tmp_path / "none", tmp_path / "cache")
    data = write_coco(tmp_path / "data", [(1, 8, 8), (2, 8, 8)], [(1, 5, [[0, 0, 4, 0, 4, 4]])])
    (data / "batch_01/0002.png").unlink()
    with pytest.raises(UserError) as error:
        load_data(data, tmp_path / "cache")
    assert "category" in str(error.value) and "0002.png" in str(error.value)
    with pytest.raises(UserError, match="cache"):
        load_data(data, data / "cache")


@pytest.mark.parametrize("size", [(64, 64), (37, 61), (1, 1000), (1024, 300)])
def test_an_overlay_shows_what_was_found_in_a_photo_of_any_size(trained, size):
    image = photo(*size)
    pred = predict_photo(trained, image).argmax(0)
    shown, plain = overlay(image, pred), overlay(image)
    assert shown.shape == plain.shape == (SUBMIT_SIZE, SUBMIT_SIZE, 3) and shown.dtype == plain.dtype == np.uint8
    assert np.array_equal(shown, overlay(image, pred.astype(np.uint8)))
    assert np.array_equal(overlay(image, np.zeros(size, np.uint8)), plain)
    assert np.array_equal(overlay(image, pred.tolist()), shown)


GREY, MASK = photo(8, 9)[..., 0], np.zeros((8, 9), np.uint8)


@pytest.mark.parametrize("wrong", [
    (GREY,), (photo(8, 9) / 255,), (np.dstack([photo(8, 9), GREY]), MASK), (photo(8, 9)[:0],),
    (photo(8, 9), MASK / 1), (photo(8, 9), MASK[..., None]), (photo(8, 9), MASK[:0])],
    ids=lambda wrong: " ".join(f"{x.dtype}{[*x.shape]}" for x in wrong))
def test_an_overlay_of_what_is_no_photo_or_mask_is_refused_in_one_line(wrong):
    with pytest.raises(UserError, match=r"^an? (image|mask) must be .*\[H, W.*, not ") as error:
        overlay(*wrong)
    assert "\n" not in str(error.value)


NOTEBOOK = """
import sys
sys.path.insert(0, {root!r})
from common import load_data, load_model, overlay, predict_photo
assert "torch" not in sys.modules, "importing common is to cost nothing"
train, test = load_data({data!r}, {cache!r})
model = load_model({model!r})
probs = predict_photo(model, test.image(0))
print(probs.shape, overlay(test.image(0), probs.argmax(0)).shape, overlay(train.image(3), train.mask(3)).shape)
"""


def test_a_notebooks_cell_works_where_no_main_module_can_be_imported(tiny_data, run, tmp_path):
    cell = NOTEBOOK.format(root=str(ROOT), data=str(tiny_data), cache=str(tmp_path / "cache"),
                           model=str(run / "model.pt"))
    done = subprocess.run([sys.executable, "-"], input=cell, cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout == "(12, 64, 64) (256, 256, 3) (256, 256, 3)\n", done.stderr  # nothing has begun twice
    assert done.returncode == 0 and {path.name for path in tmp_path.iterdir()} == {"cache"}
