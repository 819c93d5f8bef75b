"""TTA: which views there are, that each is undone exactly, and what is averaged how."""
import itertools
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common
import infer

NAMES = list(common.VIEWS)
SLOW = {  # each view again, on a numpy array [..., H, W] and by other means
    "identity": lambda x: x, "hflip": lambda x: x[..., ::-1], "vflip": lambda x: x[..., ::-1, :],
    "rot180": lambda x: x[..., ::-1, ::-1], "transpose": lambda x: np.swapaxes(x, -1, -2),
    "rot90cw": lambda x: np.swapaxes(x, -1, -2)[..., ::-1], "rot90ccw": lambda x: np.swapaxes(x, -1, -2)[..., ::-1, :],
    "antitranspose": lambda x: np.swapaxes(x, -1, -2)[..., ::-1, ::-1]}


def numbers(*shape):
    """Every element another."""
    return torch.arange(float(np.prod(shape))).reshape(shape)


def undo(x, view):
    transposed, flipped = view
    return x.flip(flipped).transpose(-2, -1) if transposed else x.flip(flipped)


def apply_slowly(x, item):
    for name in item.split("+"):
        x = SLOW[name](x)
    return x


class Net(torch.nn.Module):
    """Logits that depend on the place in the image and on its size, so that no two views give the same."""

    def __init__(self, slope=0.01):
        super().__init__()
        self.slope, self.seen = slope, []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        rows = torch.arange(images.shape[2])[:, None] * self.slope
        columns = torch.arange(images.shape[3]) * self.slope * 3
        first = images[:, :1] * 2 + rows
        return torch.cat([first, images[:, 1:2] * 3 + columns, images[:, 2:3] - rows * columns], dim=1)


def slow_probs(models, images, items, scales=(1.0,)):
    """Mean over models, views and scales in float64, image by image and view by view."""
    total, size = 0, images.shape[2:]
    for model, scale, item, n in itertools.product(models, scales, items, range(len(images))):
        image = images[n:n + 1]
        if scale != 1:
            sides = [round(side * scale) for side in size]
            image = torch.nn.functional.interpolate(image, sides, mode="bilinear", antialias=True)
        logits = model(torch.tensor(apply_slowly(image.numpy(), item).copy())).double()
        probs = (logits.exp() / logits.exp().sum(1, keepdim=True)).numpy()
        for name in reversed(item.split("+")):
            probs = SLOW[{"rot90cw": "rot90ccw", "rot90ccw": "rot90cw"}.get(name, name)](probs)
        if scale != 1:
            probs = torch.nn.functional.interpolate(torch.tensor(probs.copy()), size, mode="bilinear").numpy()
        image_probs = np.zeros((len(images), *probs.shape[1:]))
        image_probs[n] = probs[0]
        total = total + image_probs
    return total / (len(models) * len(scales) * len(items))


# ---- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 7), (1, 9), (2, 3, 33, 31), (4, 6)])
def test_every_view_is_what_its_name_says_and_is_undone_exactly(name, shape):
    x, (view,) = numbers(*shape), common.tta_views(name)
    seen = common.apply_view(x, view)
    assert (seen.numpy() == SLOW[name](x.numpy())).all()
    assert seen.shape[-2:] == (shape[:-3:-1] if view[0] else shape[-2:])
    assert torch.equal(undo(seen, view), x)


def test_the_views_are_the_8_orientations():
    seen = {tuple(common.apply_view(numbers(3, 3), view).ravel().tolist()) for view in common.tta_views("d4")}
    assert len(seen) == 8 and common.tta_views("d4") == list(common.VIEWS.values())


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5))
def test_plus_does_one_after_another(names):
    x, (view,) = numbers(3, 5), common.tta_views("+".join(names))
    seen = common.apply_view(x, view)
    assert (seen.numpy() == apply_slowly(x.numpy(), "+".join(names))).all()
    assert torch.equal(undo(seen, view), x)


def test_the_order_of_a_composition_matters():
    assert common.tta_views("hflip+rot90cw") == common.tta_views("antitranspose") != common.tta_views("rot90cw+hflip")


@pytest.mark.parametrize(("name", "items"), [
    ("none", ["identity"]), ("flip", ["identity", "hflip", "vflip"]),
    ("flip_rot", ["identity", "hflip", "vflip", "rot90cw", "rot90ccw", "rot180"]), ("d4", NAMES)])
def test_a_sets_name_stands_for_its_list(name, items):
    assert common.tta_views(name) == common.tta_views(",".join(items)) and len(common.tta_views(name)) == len(items)


def test_products_of_flips_and_turns_hold_each_orientation_once():
    flips, turns = ("identity", "hflip", "vflip", "rot180"), ("identity", "rot90cw", "rot180", "rot90ccw")
    views = common.tta_views(",".join(f"{flip}+{turn}" for flip in flips for turn in turns))
    assert len(views) == 8 and set(views) == set(common.VIEWS.values())


@given(st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("+".join), min_size=1, max_size=20))
def test_a_list_holds_each_orientation_once_in_the_order_of_the_first(items):
    x = numbers(3, 4)
    seen = [common.apply_view(x, view).numpy() for view in common.tta_views(",".join(items))]
    expected = []
    for item in items:
        slow = apply_slowly(x.numpy(), item)
        if not any(slow.shape == other.shape and (slow == other).all() for other in expected):
            expected.append(slow)
    assert len(seen) == len(expected) <= 8
    assert all((a == b).all() for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("text", [
    "", "flips", "identity,", "hflip,nosuch", "hflip+", "+", "flip,rot180", "hflip rot180"])
def test_an_unknown_view_is_one_line_that_lists_the_known(text, capsys):
    with pytest.raises(SystemExit) as refusal:
        infer.parse_args(["--data", "d", "--checkpoint", "m.pt", "--tta", text])
    error = capsys.readouterr().err.splitlines()[-1]
    assert refusal.value.code == 2 and "argument --tta: " in error
    assert all(name in error for name in (*common.TTA, *NAMES))


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf", "11", "x"])
def test_a_scale_that_makes_no_sense_is_refused(scale, capsys):
    with pytest.raises(SystemExit):
        infer.parse_args(["--data", "d", "--checkpoint", "m.pt", "--tta-scales", "1", scale])
    assert "argument --tta-scales: " in capsys.readouterr().err


# ---- what is averaged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [["identity"], ["hflip"], ["rot90cw"], ["identity", "hflip", "vflip"], NAMES,
                                   ["rot90ccw", "hflip+rot90cw", "rot180"]])
@pytest.mark.parametrize("size", [(8, 8), (7, 11)])
def test_probabilities_are_turned_back_and_averaged_also_for_images_that_are_not_square(items, size):
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    probs = common.predict_probs([Net()], images, common.tta_views(",".join(items)))
    assert probs.dtype == torch.float32 and probs.shape == (3, 3, *size)
    assert abs(probs.numpy() - slow_probs([Net()], images, items)).max() < 1e-5
    assert abs(probs.sum(1) - 1).max() < 1e-5


def test_several_models_are_averaged():
    images, models = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1)), [Net(), Net(0.2), Net(-0.1)]
    probs = common.predict_probs(models, images, common.tta_views("flip_rot"))
    assert abs(probs.numpy() - slow_probs(models, images, common.TTA["flip_rot"].split(","))).max() < 1e-5
    assert abs(probs - common.predict_probs(models[:1], images, common.tta_views("flip_rot"))).max() > 0.01


class Fixed(torch.nn.Module):
    """The same logits everywhere, of a given type."""

    def __init__(self, logits, dtype):
        super().__init__()
        self.logits = torch.tensor(logits, dtype=dtype)

    def forward(self, images):
        return self.logits[None, :, None, None].expand(len(images), -1, *images.shape[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_mean_is_of_probabilities_not_of_logits_and_in_float32(dtype):
    models = [Fixed([12.0, 0.0], dtype), *([Fixed([0.0, 1.0], dtype)] * 2)]
    probs = common.predict_probs(models, torch.zeros(1, 3, 4, 4), common.tta_views("none"))
    first = [1 / (1 + np.exp(-12)), 1 / (1 + np.e), 1 / (1 + np.e)]
    assert probs.dtype == torch.float32 and probs[0, :, 1, 2].tolist() == pytest.approx(
        [np.mean(first), 1 - np.mean(first)], abs=1e-6)
    assert probs[0, 0, 0, 0] < 0.52 < 0.95  # of logits it would be 0.96


@pytest.mark.parametrize("tta", ["none", "flip_rot"])
def test_each_view_is_predicted_once_at_each_scale_with_all_images_at_a_time(tta):
    views, seen = common.tta_views(tta), []

    class Noting(Net):
        def forward(self, images):
            seen.append(images.contiguous().numpy().tobytes())
            return super().forward(images)
    net = Noting()
    common.predict_probs([net], torch.randn(5, 3, 6, 9, generator=torch.Generator().manual_seed(2)), views, (1.0, 1.5))
    assert [shape[0] for shape in net.seen] == [5] * 2 * len(views)
    assert len(set(seen)) == 2 * len(views)


# ---- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(0.5,), (1.0, 1.5), (0.75, 1.0, 1.25)])
@pytest.mark.parametrize("items", [["identity"], ["identity", "hflip", "rot90cw"]])
def test_every_view_is_predicted_at_every_scale_and_brought_back_to_the_images_size(scales, items):
    images, net = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(3)), Net()
    probs = common.predict_probs([net], images, common.tta_views(",".join(items)), scales)
    assert probs.shape == images.shape
    assert abs(probs.numpy() - slow_probs([Net()], images, items, scales)).max() < 1e-5
    assert {shape[2:] for shape in net.seen} == {(round(12 * s), round(20 * s))[::turn] for s in scales for turn in (
        1, -1 if "rot90cw" in items else 1)}


@given(st.integers(1, 8), st.lists(st.floats(0.1, 3), min_size=1, max_size=4))
def test_the_sides_that_are_tried_before_are_those_that_a_model_is_asked_for(scale, tta_scales):
    net, scale = Net(), 8 * scale
    common.predict_probs([net], torch.zeros(1, 3, scale, scale), common.tta_views("none"), tta_scales)
    assert {shape[2:] for shape in net.seen} == {(side, side) for side in common.tta_sides(scale, tta_scales)}


def test_scales_that_are_no_multiple_of_32_are_padded_for_the_network_and_cropped_again():
    model = common.build_model("unet/tu-test_efficientnet", 4).eval()
    sizes = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    scales = (0.8, 1.0, 1.3)  # sides of 51, 64 and 83
    probs = common.predict_probs([model], images, common.tta_views("none"), scales)
    assert sizes == [(64, 64), (64, 64), (96, 96)] and probs.shape == (1, 4, 64, 64)
    total = 0
    for side in (51, 64, 83):
        image = torch.nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
        padded = torch.zeros(1, 3, -(-side // 32) * 32, -(-side // 32) * 32)
        padded[:, :, :side, :side] = image
        with torch.no_grad():
            slow = model(padded)[:, :, :side, :side].softmax(1)
        total = total + torch.nn.functional.interpolate(slow, (64, 64), mode="bilinear") / 3
    assert abs(probs - total).max() < 1e-4


@pytest.mark.parametrize(("scales", "name"), [
    ([1.0], "flip"), ([1.0, 0.5], "flip x 1,0.5"), ([0.75], "flip x 0.75"), ([1.2345678], "flip x 1.2345678")])
def test_the_name_of_views_and_scales_has_all_their_digits(scales, name):
    assert common.tta_name(Namespace(tta="flip", tta_scales=scales, scale=None)) == name
    assert common.tta_name(Namespace(tta="flip", tta_scales=scales, scale=96)) == f"{name} at 96"
