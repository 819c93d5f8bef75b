"""Test models and losses: every entry of their tables, padding, weights from files, and EfficientDet's BiFPN."""
import math
import re
from argparse import Namespace
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from conftest import run_of
from safetensors.torch import save_file
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from timm.optim import param_groups_layer_decay

import common
import train
from common import IGNORE_INDEX, UserError, make_loss, region_loss

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHARED_ENCODERS = "../shared/encoders"  # beside the project, where there is one


# ---- decoders and sizes ---------------------------------------------------------------------------------------------

# A decoder that is added to DECODERS is tested by itself; what it needs instead of the default stands here.
ENCODERS = {"dpt": "tu-test_vit"}  # else a tiny EfficientNet
SMALLEST = {"pan": 128}  # side that it works at, else 64; pan halves the deepest map three times
STRIDES = {"dpt": 16}  # multiples of which sides are padded to, else 32; that of dpt is its ViT's patch


def encoder_of(decoder):
    return ENCODERS.get(decoder, "tu-test_efficientnet")


def build(decoder):
    try:
        return common.build_model(f"{decoder}/{encoder_of(decoder)}", 5)
    except UserError as e:
        pytest.fail(f"give {decoder} another encoder in ENCODERS of test_models.py, or mend it: {e}", pytrace=False)


@cache
def small(decoder):
    """Return the decoder's model with a tiny encoder and 5 classes; tests only read it."""
    torch.manual_seed(0)
    return build(decoder).eval()


@pytest.mark.parametrize("decoder", common.DECODERS)
def test_every_decoder_makes_logits_of_the_inputs_size(decoder):
    side = SMALLEST.get(decoder, 64)
    with torch.inference_mode():
        for height, width in ((side, side), (160, 128), (160, 160), (side, side + 32), (side + 1, side + 31)):
            try:
                logits = small(decoder)(torch.randn(2, 3, height, width))
            except RuntimeError as e:
                pytest.fail(f"say in SMALLEST of test_models.py from which side on {decoder} works: {e}", pytrace=False)
            assert logits.shape == (2, 5, height, width) and logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize(("encoder", "side"), [
    ("maxvit_rmlp_pico_rw_256", 256), ("hiera_tiny_224", 224),
    ("coatnet_nano_rw_224", 224), ("efficientformerv2_s0", 224), ("gcvit_xxtiny", 224)])
def test_an_encoder_of_fixed_size_is_refused_at_another_in_one_line_that_names_both(encoder, side):
    name = f"fpn/tu-{encoder}"
    with torch.device("meta"):
        model = common.build_model(name, 3)
        common.try_sides(model, name, [side])
        with pytest.raises(UserError) as refusal:
            common.try_sides(model, name, [side, side // 2], " (--tta-scales)")
    assert str(refusal.value).startswith(f"{name} can't work at scale {side // 2} (--tta-scales): ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("decoder", common.DECODERS)
def test_a_train_steps_gradient_reaches_every_part_of_every_decoder(decoder):
    """Try a few initial weights: a ReLU that is 0 everywhere passes no gradient on, by chance."""
    side, unreached = SMALLEST.get(decoder, 64), None
    for seed in range(5):
        torch.manual_seed(seed)
        model = build(decoder)
        train.try_model(model, decoder, [side])
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert not [name for name in frozen if not name.startswith("encoder.")]  # only maps that a decoder leaves out
        mask = torch.randint(5, (4, side, side))
        make_loss("iou_ce")(model.train()(torch.randn(4, 3, side, side)), mask).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
        zero = {name for name, gradient in gradients.items() if not gradient.any()}
        unreached = zero if unreached is None else unreached & zero
        if not unreached:
            break
    assert not unreached


@pytest.mark.parametrize(("decoder", "smps", "settings"), [
    *((name, name, {}) for name in ("unet", "unetplusplus", "manet", "linknet", "pspnet", "deeplabv3", "deeplabv3plus",
                                    "pan", "upernet", "segformer", "dpt", "fpn")),
    ("fpn-narrow", "fpn", {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32})])
def test_decoders_by_smps_names_are_smps(decoder, smps, settings):
    plain = smp.create_model(smps, encoder_of(decoder), encoder_weights=None, classes=5, **settings).eval()
    plain.load_state_dict(small(decoder).state_dict())
    images = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        assert torch.equal(small(decoder)(images), plain(images))


def sum_of_maps(encoder, n_classes, **options):
    """Build a stranger's decoder: the encoder's last four maps, each of 16 channels, enlarged and added up."""
    class Sum(torch.nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.project = torch.nn.ModuleList(torch.nn.Conv2d(c, 16, 1) for c in channels[-4:])

        def forward(self, features):
            maps = [project(x) for project, x in zip(self.project, features[-4:], strict=True)]
            return sum(torch.nn.functional.interpolate(x, maps[0].shape[2:]) for x in maps)
    return common.assemble(encoder, n_classes, Sum, width=16, upsampling=4, **options)


@pytest.fixture
def stranger(monkeypatch):
    monkeypatch.setitem(common.DECODERS, "sum", sum_of_maps)
    return "sum/tu-test_efficientnet"


def test_a_strangers_decoder_builds_and_learns_in_a_step(stranger, line, tmp_path):
    args = line(tmp_path, "--model", stranger)
    run = train.start_run(args, range(5), np.ones(5), None, torch.device("cpu"))
    assert run.model(torch.zeros(2, 3, 40, 72)).shape == (2, 5, 40, 72)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    images = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    masks = torch.randint(5, (4, 64, 64), dtype=torch.uint8)
    losses = [train.train_step(run, images, masks, 1e-3, n, 5, args) for n in range(5)]
    assert losses[-1][0] < losses[0][0] and not any(bad for _, bad in losses)
    assert not [name for name, p in run.model.named_parameters() if torch.equal(p, before[name])]


def test_a_strangers_decoder_is_trained_and_rebuilt_from_its_checkpoint_alone(stranger, line, tmp_path, monkeypatch):
    args = line(tmp_path, "--model", stranger, "--epochs", 1)
    train.main(args)
    path = run_of(args) / "model.pt"
    saved, trained = common.load_checkpoint(path)["model"], common.load_model(path)
    state = trained.model.state_dict()
    assert trained.recipe["model"] == stranger and any("decoder.project" in name for name in state)
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
    assert common.predict_photo(trained, np.zeros((33, 70, 3), np.uint8)).shape == (12, 33, 70)
    monkeypatch.delitem(common.DECODERS, "sum")
    with pytest.raises(UserError, match="sum/tu-test_efficientnet.*is not DECODER/ENCODER with a decoder of unet, "):
        common.load_model(path)


@pytest.mark.parametrize("name", ["fpm/resnet18", "fpn", "fpn/", "/resnet18", ""])
def test_a_name_that_is_no_decoder_and_encoder_is_refused_with_the_decoders_that_there_are(name):
    with pytest.raises(UserError, match=f"^{name!r} is not DECODER/ENCODER with a decoder of unet, .*efficientdet$"):
        common.build_model(name, 5)


@pytest.mark.parametrize("encoder", ["../../x", "..", ".", "a/b", "/a", "a b", "a\n", "tu-h\u00e4", "-a"])
def test_an_encoder_whose_name_is_no_name_of_a_folder_is_refused(encoder):
    with pytest.raises(UserError, match=r"^'fpn/.*': an encoder's name has letters, digits, '_', '.' and '-' alone$"):
        common.split_model(f"fpn/{encoder}")


@pytest.mark.parametrize("name", ["resnet18", "tu-vit_base_patch16_224.augreg_in21k", "timm-efficientnet-b0"])
def test_the_names_of_real_encoders_are_taken(name):
    assert common.split_model(f"fpn/{name}") == ("fpn", name)


@pytest.mark.parametrize("decoder", common.DECODERS)
def test_sides_that_are_no_multiples_of_the_stride_are_padded_and_cropped_back(decoder):
    model, stride = small(decoder), STRIDES.get(decoder, 32)
    low = SMALLEST.get(decoder, 64)
    for height, width in ((low + 1, low + stride), (low + stride, low + stride - 1), (low + 10, low + 1)):
        images = torch.randn(2, 3, height, width)
        whole = torch.zeros(2, 3, low + stride, low + stride)
        whole[:, :, :height, :width] = images
        with torch.inference_mode():
            assert torch.equal(model(images), model(whole)[:, :, :height, :width])


@pytest.mark.parametrize("decoder", common.DECODERS)
def test_padding_leaves_the_model_its_class_its_keys_and_its_answers(decoder):
    plain = common.DECODERS[decoder](encoder_of(decoder), 5, encoder_weights=None)
    kind, model = type(plain), small(decoder)
    plain.eval().load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        expected = plain(images)
        assert torch.equal(model(images), expected)
        same = common.padded(plain)
        assert same is plain and isinstance(same, kind) and type(same).mro()[1] is kind
        assert torch.equal(same(images), expected)
    assert list(same.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("decoder", ["fpn", "efficientdet"])
def test_a_copy_of_a_padded_model_pads_and_lives_on_its_own(decoder):
    model, images = small(decoder), torch.randn(1, 3, 40, 72)
    with torch.inference_mode():
        expected = model(images)
    copy = deepcopy(model)
    with torch.inference_mode():
        assert torch.equal(copy(images), expected)
        for parameter in copy.parameters():
            parameter.add_(1)
        assert torch.equal(model(images), expected) and not torch.equal(copy(images), expected)


def test_gradients_come_from_the_pixels_and_not_from_the_padding():
    model, images = deepcopy(small("unet")).train(), torch.randn(2, 3, 40, 72, requires_grad=True)
    model(images).square().sum().backward()
    assert images.grad.shape == images.shape and (images.grad != 0).float().mean() > 0.9


def test_fpn_is_as_in_smp_and_fpn_narrow_is_narrow():
    n = {name: sum(p.numel() for p in small(name).decoder.parameters()) for name in ("fpn", "fpn-narrow")}
    smps = smp.FPN(encoder_of("fpn"), encoder_weights=None)
    assert n["fpn"] == sum(p.numel() for p in smps.decoder.parameters()) > 5 * n["fpn-narrow"]


@pytest.mark.parametrize("name", ["unet/resnet18", "fpn/tu-mobilenetv3_small_100", "deeplabv3plus/resnet18"])
def test_smps_own_and_timms_encoders_make_logits_of_the_inputs_size(name):
    model = common.build_model(name, 12).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 12, 64, 96)


@pytest.mark.parametrize(("name", "reason"), [
    ("unet/nosuch", "Wrong encoder name"), ("unet/tu-nosuch", "Unknown model"), ("dpt/resnet18", "Only Timm encoders"),
    ("unetplusplus/mit_b0", "not support"), ("unet/tu-vit_tiny_patch16_224", "Unsupported"),
    ("efficientdet/nosuch", "Wrong encoder name"), ("efficientdet/tu-nosuch", "Unknown model"),
    ("efficientdet/tu-vit_tiny_patch16_224", "Unsupported")])
def test_a_model_that_cannot_be_built_ends_with_the_reason(name, reason):
    with pytest.raises(UserError, match=f"{name} .*{reason}"):
        common.build_model(name, 5)


# ---- encoders at every scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "scale", "options"), [
    ("vit_tiny_patch16_224", 384, {"img_size": (384, 384), "dynamic_img_size": True}),
    ("eva02_tiny_patch14_224", 450, {"img_size": (462, 462), "dynamic_img_size": True}),
    ("swin_tiny_patch4_window7_224", 250, {"img_size": (256, 256), "dynamic_img_size": True}),
    ("hiera_tiny_224", 100, {"img_size": (128, 128)}), ("convnext_atto", 250, {}), ("tf_efficientnet_lite0", 64, {})])
def test_an_encoder_of_fixed_size_is_built_for_the_scale_padded_to_its_stride(encoder, scale, options):
    assert common.timm_options(f"tu-{encoder}", scale, 0) == options
    assert common.timm_options(f"tu-{encoder}", None, 0) == {k: v for k, v in options.items() if k != "img_size"}
    assert common.timm_options("resnet18", scale, 0) == {}


AT_SCALES = [  # (model, the scale that it is built for, other sides that it must take then)
    ("dpt/tu-vit_small_patch14_dinov2.lvd142m", 448, (224,)), ("dpt/tu-vit_small_patch14_dinov2.lvd142m", 518, (400,)),
    ("upernet/tu-swin_tiny_patch4_window7_224", 256, (192,)), ("dpt/tu-vit_base_patch16_224", 384, (300,)),
    ("upernet/tu-swinv2_tiny_window8_256", 320, (160,)), ("upernet/tu-hiera_tiny_224", 320, ()),
    ("fpn/tu-maxvit_tiny_tf_224", 320, ()), ("upernet/tu-convnext_atto", 250, (300,)),
    ("segformer/mit_b0", 250, (300,)), ("dpt/tu-vit_small_patch16_dinov3.lvd1689m", 250, (300,))]


@pytest.mark.parametrize(("name", "scale", "others"), AT_SCALES)
def test_transformers_work_at_scales_that_are_not_their_own(name, scale, others):
    with torch.device("cpu" if "mit_" in name else "meta"):
        model = common.build_model(name, 3, scale=scale)
    common.try_sides(model, name, [scale, *others])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale", "others"), AT_SCALES)
def test_transformers_take_a_step_at_scales_that_are_not_their_own(line, tmp_path, name, scale, others):
    args = line(tmp_path, "--model", name, "--scale", scale, "--batch", 2)
    run = train.start_run(args, range(3), np.ones(3), None, torch.device("cpu"))
    images = torch.randint(256, (2, scale, scale, 3), dtype=torch.uint8)
    before = {key: p.clone() for key, p in run.model.named_parameters() if p.requires_grad}
    loss, is_bad = train.train_step(run, images, images[..., 0] % 3, 1e-3, 0, 1, args)
    after = dict(run.model.named_parameters())
    assert loss.isfinite() and not is_bad
    moved = [key for key in before if not torch.equal(after[key], before[key])]
    assert len(moved) > 0.7 * len(before)  # what stands before SwinV2's norms does not: they begin at 0


def test_a_vit_of_14_pixels_is_decoded_as_smps_decoder_does_16_and_enlarged_to_the_photo():
    model = common.build_model("dpt/tu-eva02_tiny_patch14_224", 4, scale=56).eval()
    decoder = DPTDecoder(model.encoder.out_channels, [16] * 4, True).eval()
    decoder.load_state_dict(model.decoder.state_dict())
    images = torch.randn(1, 3, 50, 56)
    with torch.inference_mode():
        whole = torch.nn.functional.pad(images, (0, 0, 0, 6))
        features = decoder(*model.encoder(whole))  # of 4 x 4 patches 32 x 32
        logits = model.segmentation_head.head(features)
        expected = torch.nn.functional.interpolate(logits, (56, 56), mode="bilinear", align_corners=True)
        assert features.shape[2:] == (32, 32) and torch.equal(model(images), expected[:, :, :50])


@pytest.mark.parametrize(("name", "sides"), [
    ("dpt/tu-eva02_tiny_patch14_224", (70, 98)), ("dpt/tu-test_vit", (80, 48))])
def test_dpt_takes_odd_numbers_of_patches(name, sides):
    model = common.build_model(name, 4, scale=sides[0]).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, *sides)).shape == (1, 4, *sides)


def test_dpts_lower_level_is_shrunk_to_the_size_of_the_upper_corner_on_corner():
    ramp = torch.linspace(0, 1, 38)
    upper = torch.zeros(1, 1, 37, 37)
    feature, previous = common.resize_previous(None, (upper, ramp.expand(1, 1, 38, 38)))
    assert feature is upper
    torch.testing.assert_close(previous, torch.linspace(0, 1, 37).expand(1, 1, 37, 37))
    assert common.resize_previous(None, (upper,)) == (upper, None)
    assert common.resize_previous(None, (upper, upper))[1] is upper


@pytest.mark.parametrize(("name", "takes_others"), [("dpt/tu-test_vit", True), ("fpn/tu-hiera_tiny_224", False)])
def test_a_model_of_fixed_size_is_rebuilt_for_its_runs_scale_from_the_checkpoint_alone(tmp_path, name, takes_others):
    model = common.build_model(name, 3, scale=96).eval()
    checkpoint = own_checkpoint(model, ["Background", "a", "b"], model=name, scale=96, mean=[0.5] * 3, std=[0.5] * 3)
    checkpoint["model"] = model.state_dict()
    torch.save(checkpoint, tmp_path / "model.pt")
    trained, images = common.load_model(tmp_path / "model.pt"), torch.randn(1, 3, 96, 96)
    photo = np.zeros((50, 70, 3), np.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(trained.model(images), model(images), rtol=0, atol=1e-3)  # one in channels_last
    assert common.predict_photo(trained, photo).shape == (3, 50, 70)
    if takes_others:
        assert common.predict_photo(trained, photo, tta_scales=(1, 0.5)).shape == (3, 50, 70)
    else:
        with pytest.raises(UserError, match=f"{name} can't work at scale 48: [^\n]+$"):
            common.predict_photo(trained, photo, tta_scales=(1, 0.5))


# ---- how an encoder is trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "encoder"), [
    ("dpt/tu-test_vit", "test_vit"), ("fpn/tu-convnext_atto", "convnext_atto"), ("fpn/tu-test_resnet", "test_resnet"),
    ("upernet/tu-swin_s3_tiny_224", "swin_s3_tiny_224"), ("fpn/tu-hiera_tiny_224", "hiera_tiny_224")])
def test_layer_decay_is_that_of_timms_own_parameter_groups(name, encoder):
    with torch.device("meta"):
        network, model = timm.create_model(encoder), common.build_model(name, 3)
    names = {id(p): key for key, p in network.named_parameters()}
    groups = param_groups_layer_decay(network, layer_decay=0.7)
    scales = {names[id(p)].replace(".", "_"): group["lr_scale"] for group in groups for p in group["params"]}
    factors = common.layer_factors(model, name, 0.7)
    assert factors.keys() == {f"encoder.{key}" for key, _ in model.encoder.named_parameters()}
    for key, factor in factors.items():
        assert factor == scales[re.sub(r"^encoder\.(model\.)+", "", key).replace(".", "_")], key
    assert len(set(factors.values())) > 3


def test_layer_decay_of_a_vit_by_hand():
    model = common.build_model("dpt/tu-test_vit", 3)  # of 6 blocks
    factors = common.layer_factors(model, "dpt/tu-test_vit", 0.5)
    expected = {"norm.weight": 1 / 2, "blocks.5.mlp.fc1.weight": 1 / 2, "blocks.0.attn.qkv.weight": 1 / 64,
                "pos_embed": 1 / 128, "patch_embed.proj.weight": 1 / 128}
    assert {key: factors[f"encoder.model.{key}"] for key in expected} == expected
    assert common.layer_factors(model, "dpt/tu-test_vit", 1) == {}


@pytest.mark.parametrize("name", ["fpn/resnet18", "segformer/mit_b0", "fpn/tu-caformer_s18"])
def test_layer_decay_of_an_encoder_without_timms_layers_is_refused(name):
    with torch.device("cpu" if "mit_" in name else "meta"):
        model = common.build_model(name, 3)
    with pytest.raises(UserError, match=f"^--layer-decay 0.5: timm knows no layers of the encoder of {name}: take 1, "):
        common.layer_factors(model, name, 0.5)


@pytest.mark.parametrize("name", ["dpt/tu-test_vit", "fpn/tu-convnext_atto", "fpn/tu-test_efficientnet",
                                  "fpn/tu-hiera_tiny_224", "upernet/tu-swin_s3_tiny_224"])
def test_drop_path_grows_to_its_rate_at_the_last_block_and_0_is_as_the_encoder_has_it(name):
    def rates(model):
        return [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath" and m.drop_prob]
    with torch.device("meta"):
        dropped, plain = (rates(common.build_model(name, 3, drop_path=rate).encoder) for rate in (0.3, 0))
        network = timm.create_model(name.partition("/tu-")[2])
    assert dropped == sorted(dropped) and 0.2 < dropped[-1] < 0.3 + 1e-6
    assert plain == rates(network) and bool(plain) == ("swin" in name)  # timm's Swin has 0.1


@pytest.mark.parametrize("name", ["fpn/resnet18", "segformer/mit_b0", "fpn/tu-vgg11"])
def test_drop_path_of_an_encoder_that_cannot_is_refused(name):
    with pytest.raises(UserError, match=f"^--drop-path 0.1: the encoder {name.partition('/')[2]} .*, take 0$"):
        common.build_model(name, 3, drop_path=0.1)


@pytest.mark.parametrize("name", ["dpt/tu-test_vit", "fpn/tu-convnext_atto", "upernet/tu-swin_s3_tiny_224",
                                  "fpn/tu-hiera_tiny_224"])
def test_checkpointed_gradients_are_the_same_numbers_though_maps_are_computed_twice(name):
    plain = common.build_model(name, 3, scale=64, drop_path=0.5).train()
    saving = deepcopy(plain)
    common.checkpoint_gradients(saving, name)
    images, calls = torch.randn(2, 3, 64, 64), []
    kinds = ("Block", "ConvNeXtBlock", "SwinTransformerBlock", "HieraBlock")
    for model in (plain, saving):
        for module in model.encoder.modules():
            if type(module).__name__ in kinds:
                module.register_forward_pre_hook(lambda *_, model=model: calls.append(model))
        torch.manual_seed(1)  # of the dropped paths
        model(images).square().mean().backward()
    assert calls.count(saving) > calls.count(plain) > 0
    others = dict(saving.named_parameters())
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, others[key].grad), key


@pytest.mark.parametrize(("name", "reason"), [
    ("fpn/tu-test_efficientnet", "has batch norm, which would count each batch twice"),
    ("fpn/resnet18", "has batch norm"), ("segformer/mit_b0", "is not one that timm can do so")])
def test_gradients_of_an_encoder_that_cannot_are_not_checkpointed(name, reason):
    with pytest.raises(UserError, match=f"^--grad-checkpoint: the encoder of {name} {reason}.*: leave it out$"):
        common.checkpoint_gradients(common.build_model(name, 3), name)


# ---- weights from files ----------------------------------------------------------------------------------------------


def random_state(model):
    """The model's state dict with every tensor replaced by random numbers, so that any left-over is seen."""
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 7 for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def mobilenet_state():
    return random_state(timm.create_model("mobilenetv3_small_100"))


def load(name, path, content=None, n_classes=5, **more):
    """Build a model, write `content` to the file unless it is None, load it; return (model, the line that says so)."""
    if content is not None:
        torch.save(content, path)
    model = common.build_model(name, n_classes)
    return model, common.load_weights(model, name, path, **more)


def all_equal(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def test_torchvisions_state_dict_is_in_the_model_that_it_was_loaded_into(tmp_path):
    state = random_state(torchvision.models.resnet18())
    model, line = load("unet/resnet18", tmp_path / "resnet18.pth", state)
    assert all_equal(model.encoder.state_dict(), {k: v for k, v in state.items() if not k.startswith("fc.")})
    assert line == (f"weights {tmp_path}/resnet18.pth: 120 of 120 tensors, 100.0% of the encoder's parameters; "
                    "left over: fc.weight, fc.bias")


def densenets_old_names(state):
    return {re.sub(r"(denselayer\d+)\.(norm|conv)(\d)", r"\1.\2.\3", key): value for key, value in state.items()}


def test_torchvisions_older_names_of_densenet_are_taken(tmp_path):
    state = random_state(torchvision.models.densenet121())
    model, _ = load("unet/densenet121", tmp_path / "densenet121.pth", densenets_old_names(state))
    assert all_equal(model.encoder.state_dict(), {k: v for k, v in state.items() if not k.startswith("classifier.")})


WRAPPINGS = {  # of one state dict
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "twice": lambda state: {"model": {"state_dict": state}},
    "average": lambda state: {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
    "timm": lambda state: {"state_dict": state, "args": Namespace(model="x")},
    "module": lambda state: {f"module.{k}": v for k, v in state.items()},
    "encoder": lambda state: {f"encoder.{k}": v for k, v in state.items()},
    "backbone": lambda state: {"state_dict": {f"backbone.{k}": v for k, v in state.items()}},
    "all": lambda state: {f"_orig_mod.module.model.encoder.model.{k}": v for k, v in state.items()},
    "no classifier": lambda state: {k: v for k, v in state.items() if not k.startswith("classifier")},
    "besides": lambda state: state | {"decode_head.conv_seg.weight": torch.zeros(9, 9), "epoch": 3}}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_timms_state_dict_is_in_the_model_however_it_was_wrapped(tmp_path, mobilenet_state, wrapping):
    name, path = "fpn/tu-mobilenetv3_small_100", str(tmp_path / "mobilenet.pth")
    model, line = load(name, path, WRAPPINGS[wrapping](mobilenet_state))
    loaded = model.encoder.model.state_dict()
    assert {k.split(".")[0] for k in mobilenet_state.keys() - loaded.keys()} == {"conv_head", "classifier"}
    assert loaded and all(torch.equal(loaded[k], mobilenet_state[k]) for k in loaded)
    assert f": {len(loaded)} of {len(loaded)} tensors, 100.0% of the encoder's parameters; left over: " in line


def test_safetensors_are_taken_and_damaged_ones_refused(tmp_path, mobilenet_state):
    name, path = "fpn/tu-mobilenetv3_small_100", tmp_path / "mobilenet.safetensors"
    save_file(mobilenet_state, path)
    loaded = load(name, path)[0].encoder.model.state_dict()
    assert loaded and all(torch.equal(loaded[k], mobilenet_state[k]) for k in loaded)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"mobilenet.safetensors: no safetensors that can be read: [^\n]+$"):
        load(name, path)


@pytest.mark.parametrize("encoder", ["convnext_atto", "swin_s3_tiny_224", "hiera_tiny_224", "test_resnet"])
def test_the_maps_of_an_encoder_whose_tensors_smp_names_anew_are_those_of_the_network_in_the_file(tmp_path, encoder):
    network = timm.create_model(encoder).eval()
    model, line = load(f"fpn/tu-{encoder}", tmp_path / "w.pth", network.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = network.forward_intermediates(images, intermediates_only=True)[-3:]
        found = model.eval().encoder(images)[-3:]
    assert "100.0% of the encoder's parameters" in line and "missing" not in line
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "resnet18"])
def test_efficientdet_takes_a_state_dict_like_other_decoders(tmp_path, mobilenet_state, name):
    timms = name.startswith("mobilenet")
    state = mobilenet_state if timms else random_state(torchvision.models.resnet18())
    model, _ = load(f"efficientdet/{'tu-' * timms}{name}", tmp_path / "weights.pth", state)
    loaded = (model.encoder.model if timms else model.encoder).state_dict()
    assert loaded and all(torch.equal(loaded[k], state[k]) for k in loaded)


@pytest.fixture
def shared_encoders():
    folder = (Path(common.__file__).resolve().parent / SHARED_ENCODERS).resolve()
    if not folder.is_dir():
        pytest.skip(f"{SHARED_ENCODERS} is not there")
    return folder


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
def test_the_shared_encoders_files_are_in_the_models_they_are_named_after(shared_encoders, encoder):
    path = common.weights_file(str(shared_encoders), f"fpn/tu-{encoder}")
    assert path == shared_encoders / f"{encoder}_imagenet.pth"
    state = common.load_checkpoint(path)
    model, line = load(f"fpn/tu-{encoder}", path, n_classes=12)
    loaded = model.encoder.model.state_dict()
    assert {k.split(".")[0] for k in state.keys() - loaded.keys()} == {"conv_head", "bn2", "classifier"}
    assert loaded and all(torch.equal(loaded[k], state[k]) for k in loaded) and "100.0%" in line


def test_position_embeddings_of_another_size_are_resampled_by_timm(tmp_path):
    theirs = timm.create_model("test_vit", img_size=320)
    own = common.build_model("dpt/tu-test_vit", 5).encoder.model
    old, new = theirs.patch_embed.grid_size, own.patch_embed.grid_size
    assert old != new
    model, line = load("dpt/tu-test_vit", tmp_path / "vit.pth", theirs.state_dict())
    expected = timm.layers.resample_abs_pos_embed(theirs.pos_embed, new, old)
    loaded = model.encoder.model.state_dict()
    assert torch.equal(loaded.pop("pos_embed"), expected) and ": 80 of 80 tensors, 100.0%" in line
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in loaded.items())


def test_a_classifier_that_the_file_lacks_is_no_part_of_the_encoders_share(tmp_path):
    network = timm.create_model("test_vit", num_classes=0)
    _, line = load("dpt/tu-test_vit", tmp_path / "vit.pth", network.state_dict())
    assert line.endswith(": 78 of 80 tensors, 100.0% of the encoder's parameters; missing: model.head.weight, "
                         "model.head.bias")


def without_layers(*layers):
    """Return a state dict of resnet18 without some layers, and which share of its encoder's parameters it has."""
    network = torchvision.models.resnet18()
    state = {key: value for key, value in network.state_dict().items() if not key.startswith(layers)}
    sizes = {key: p.numel() for key, p in network.named_parameters() if not key.startswith("fc.")}
    return state, sum(size for key, size in sizes.items() if key in state) / sum(sizes.values())


def test_under_90_percent_of_the_encoders_parameters_are_refused_and_the_rest_is_named(tmp_path):
    few, share = without_layers("layer3.1.")
    assert 0.89 < share < 0.9
    text = (rf"few.pth doesn't fit the encoder of unet/resnet18, of which it must have 90%: 108 of 120 tensors, "
            rf"{share:.1%} of the encoder's parameters; missing: layer3.1.conv1.weight, ")
    with pytest.raises(UserError, match=text):
        load("unet/resnet18", tmp_path / "few.pth", few)
    enough, share = without_layers("layer3.1.conv1.", "layer2.1.")
    assert 0.9 < share < 0.93
    _, line = load("unet/resnet18", tmp_path / "enough.pth", enough)
    assert line.endswith(f": 107 of 120 tensors, {share:.1%} of the encoder's parameters; missing: "
                         "layer2.1.conv1.weight, layer2.1.bn1.weight, layer2.1.bn1.bias and 10 more; left over: "
                         "fc.weight, fc.bias")


def test_weights_of_another_architecture_are_refused_by_names_and_shapes(tmp_path, mobilenet_state):
    state = {key: value for key, value in mobilenet_state.items() if not key.startswith("bn1.")}
    text = (r"a.pth doesn't fit the encoder of unet/resnet18, .*: 0 of 120 tensors, 0.0% of the encoder's parameters; "
            r"missing: conv1.weight, bn1.weight, bn1.bias and 117 more; left over: conv_stem.weight, blocks.0.0.")
    with pytest.raises(UserError, match=text):
        load("unet/resnet18", tmp_path / "a.pth", state)


def test_weights_of_another_width_are_refused_by_shape(tmp_path, mobilenet_state):
    with pytest.raises(UserError, match=r"of another shape: model.blocks.0.0.conv_pw.weight \[16, 16, 1, 1\] for "
                                        r"\[8, 16, 1, 1\], .* more"):
        load("fpn/tu-mobilenetv3_small_050", tmp_path / "w.pth", mobilenet_state)


@pytest.mark.parametrize(("name", "deeper"), [
    ("unet/resnet18", lambda: torchvision.models.resnet34()),
    ("unet/tu-resnet18", lambda: timm.create_model("resnet34")),
    ("unet/tu-tf_efficientnet_lite0", lambda: timm.create_model("tf_efficientnet_lite1"))])
def test_weights_of_a_deeper_network_are_refused_though_all_of_the_encoder_is_in_them(tmp_path, name, deeper):
    with pytest.raises(UserError, match=f"w.pth is of a deeper encoder than that of {name}: .*100.0%.*left over: "):
        load(name, tmp_path / "w.pth", deeper().state_dict())


def test_two_tensors_that_could_both_be_meant_are_refused(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    for more in ("module.conv1.weight", "backbone.conv1.weight"):
        with pytest.raises(UserError, match=f"w.pth: holds conv1.weight and {more}, of which only one can be meant"):
            load("unet/resnet18", tmp_path / "w.pth", state | {more: state["conv1.weight"]})


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_in_a_weights_file_is_run(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    with pytest.raises(UserError, match="w.pth: not a checkpoint that can be loaded safely"):
        load("unet/resnet18", tmp_path / "w.pth", {"state_dict": state, "x": Intruder(tmp_path / "touched")})
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "w.pth", weights_only=False)  # it would have
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize(("content", "reason"), [
    ({"model": {"conv1.weight": torch.zeros(2)}, "epoch": 3}, "doesn't fit .* 0 of"), ([1, 2], "but a list"),
    (torch.zeros(2), "but a Tensor"), ({}, "but nothing"),
    ({"epoch": 3, "lr": 0.1}, "no tensors by name.*but epoch, lr")])
@pytest.mark.parametrize("name", ["unet/resnet18", "fpn/tu-mobilenetv3_small_100"])
def test_a_file_that_holds_no_weights_is_refused_by_name(tmp_path, name, content, reason):
    with pytest.raises(UserError, match=f"bad.pth.*{reason}"):
        load(name, tmp_path / "bad.pth", content)


# ---- weights of whole models ----------------------------------------------------------------------------------------

WHOLE = "fpn-narrow/tu-test_efficientnet"


def own_checkpoint(net, classes, **recipe):
    """Return what a model.pt of train.py holds, of a model with random tensors everywhere."""
    return dict.fromkeys(common.DESCRIBED, {}) | {
        "model": random_state(net), "classes": classes, "valid_ids": [7, 8], "learnt_from": ["a", "b"],
        "epoch": 1, "v3": 0.5, "state": "", "commit": "", "kept_under": [],
        "recipe": {"model": WHOLE, "scale": 64} | recipe}


def test_a_model_pt_of_other_classes_gives_encoder_decoder_and_the_rows_of_classes_by_name(tmp_path):
    checkpoint = own_checkpoint(common.build_model(WHOLE, 4), ["Background", "Paper", "Glass", "Metal"])
    torch.save(checkpoint, tmp_path / "model.pt")
    model = common.build_model(WHOLE, 3)
    before = deepcopy(model.state_dict())
    line = common.load_weights(model, WHOLE, tmp_path / "model.pt", ["Background", "Metal", "Cloth"])
    theirs, ours = checkpoint["model"], model.state_dict()
    assert line.startswith(f"weights {tmp_path}/model.pt (of {WHOLE}): ")
    assert line.endswith("; its decoder, and the head's rows of 2 of 3 classes")
    head = [key for key in ours if key.startswith("segmentation_head.")]
    assert head == ["segmentation_head.0.weight", "segmentation_head.0.bias"]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key not in head)
    for key in head:
        assert torch.equal(ours[key][0], theirs[key][0]) and torch.equal(ours[key][1], theirs[key][3])
        assert torch.equal(ours[key][2], before[key][2])  # a class that the file lacks begins as it was built


@pytest.mark.parametrize(("n_classes", "rows"), [(5, 5), (6, 0)])
def test_smps_whole_state_dict_gives_the_head_only_to_as_many_classes(tmp_path, n_classes, rows):
    smps = smp.create_model("fpn", "tu-test_efficientnet", encoder_weights=None, classes=5)
    state = random_state(smps)
    model, line = load("fpn/tu-test_efficientnet", tmp_path / "smp.pth", state, n_classes)
    ours = model.state_dict()
    assert line.endswith(f"; its decoder, and the head's rows of {rows} of {n_classes} classes")
    assert all(torch.equal(ours[key], state[key]) for key in ours if rows or not key.startswith("segmentation_head."))


def test_a_decoder_that_does_not_fit_stays_at_random_and_the_line_says_so(tmp_path):
    checkpoint = own_checkpoint(common.build_model(WHOLE, 3), ["Background", "a", "b"])
    torch.save(checkpoint, tmp_path / "model.pt")
    for decoder in ("fpn", "unet"):
        name = f"{decoder}/tu-test_efficientnet"
        torch.manual_seed(0)
        fresh = common.build_model(name, 3).state_dict()
        torch.manual_seed(0)
        model, line = load(name, tmp_path / "model.pt", n_classes=3, classes=["Background", "a", "b"])
        ours = model.state_dict()
        assert line.endswith("; its decoder doesn't fit, and the model's begins at random")
        for key in ours:
            expected = checkpoint["model"] if key.startswith("encoder.") else fresh
            assert torch.equal(ours[key], expected[key])


def test_a_head_of_several_layers_takes_all_of_them(tmp_path):
    name = "dpt/tu-test_vit"
    checkpoint = own_checkpoint(common.build_model(name, 3), ["Background", "a", "b"], model=name)
    model, line = load(name, tmp_path / "model.pt", checkpoint, 3, classes=["Background", "b", "c"])
    ours, theirs = model.segmentation_head.state_dict(), checkpoint["model"]
    last = [key for key, module in model.segmentation_head.named_modules() if module is common.last_convolution(model)]
    assert "head's rows of 2 of 3" in line and len(ours) > 2
    for key, value in ours.items():
        expected = theirs[f"segmentation_head.{key}"]
        if key.rpartition(".")[0] in last:
            assert torch.equal(value[:2], expected[[0, 2]]) and not torch.equal(value[2], expected[1])
        else:
            assert torch.equal(value, expected)


def test_weights_made_with_other_mean_and_std_are_refused(tmp_path):
    model = common.build_model(WHOLE, 3)
    own = dict(zip(("mean", "std"), map(list, common.encoder_mean_std(WHOLE)), strict=True))
    torch.save(own_checkpoint(model, ["Background", "a", "b"], **own), tmp_path / "model.pt")
    load(WHOLE, tmp_path / "model.pt", n_classes=3)
    torch.save(own_checkpoint(model, ["Background", "a", "b"], **own | {"std": [1, 1, 1]}), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt: its images were normalised with mean \[.*\] and std \[1, 1, 1\], "):
        load(WHOLE, tmp_path / "model.pt", n_classes=3)


def test_a_timm_file_of_another_tag_is_refused_if_that_has_another_mean():
    tagged = "mobilenetv3_large_100.miil_in21k_ft_in1k"  # mean 0, std 1; timm's default tag has ImageNet's
    with pytest.raises(UserError, match=r"tu-NAME.TAG"):
        common.check_normalisation("fpn/tu-mobilenetv3_large_100", f"x/{tagged}.safetensors", {})
    common.check_normalisation(f"fpn/tu-{tagged}", f"x/{tagged}.safetensors", {})
    common.check_normalisation("fpn/tu-mobilenetv3_large_100", "x/mobilenetv3_large_100.pth", {})
    common.check_normalisation("fpn/tu-mobilenetv3_large_100", "x/my_own.pth", {})


def test_weights_that_have_learnt_from_photos_of_the_fold_are_refused(tmp_path):
    torch.save(own_checkpoint(common.build_model(WHOLE, 1), ["Background"]), tmp_path / "model.pt")
    assert common.weights_learnt_from(tmp_path / "model.pt") == {"a", "b"}
    common.check_unseen(tmp_path / "model.pt", {"c", "d"}, 1)
    with pytest.raises(UserError, match="model.pt: has learnt from 1 of the 2 photos that fold 1 holds out, so every "):
        common.check_unseen(tmp_path / "model.pt", {"b", "c"}, 1)


@pytest.mark.parametrize("noted", [{}, {"learnt_from": None}, {"learnt_from": "ab"}, {"learnt_from": [1]}])
def test_weights_of_train_py_that_dont_say_what_they_have_learnt_from_are_refused(tmp_path, noted):
    older = own_checkpoint(common.build_model(WHOLE, 1), ["Background"])
    del older["learnt_from"]
    torch.save(older | noted, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt doesn't say which photos it has learnt from, .* save its weig"):
        common.check_unseen(tmp_path / "model.pt", {"c"}, 1)


def test_last_pt_is_weights_of_its_run_too_and_its_average_is_taken(tmp_path):
    whole = own_checkpoint(common.build_model(WHOLE, 2), ["Background", "a"])
    average = {f"module.{key}": value for key, value in whole["model"].items()}
    last = {key: whole[key] for key in ("recipe", "classes", "valid_ids", "learnt_from")} | {
        "model": random_state(common.build_model(WHOLE, 2)), "ema": average, "optimizer": {"state": {}}}
    model, line = load(WHOLE, tmp_path / "last.pt", last, 2, classes=["Background", "a"])
    assert all_equal(model.state_dict(), whole["model"]) and "head's rows of 2 of 2" in line
    with pytest.raises(UserError, match="last.pt: has learnt from 1 of the 1 photos that fold 1 holds out"):
        common.check_unseen(tmp_path / "last.pt", {"a"}, 1)


def test_weights_of_no_run_have_seen_nothing(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    assert common.weights_learnt_from(tmp_path / "w.pth") == set()


# ---- which file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "model", "found"), [
    (["a.pth"], "fpn/tu-a", "a.pth"), (["a_imagenet.pth", "b.pth"], "fpn/tu-a", "a_imagenet.pth"),
    (["a.safetensors", "ab.pth"], "fpn/tu-a", "a.safetensors"), (["a-5c10.pth"], "unet/a", "a-5c10.pth"),
    (["a.in1k.bin", "README.md", "a.txt"], "fpn/tu-a", "a.in1k.bin"), (["a.pth", "a_1.pth"], "fpn/tu-a", "a.pth"),
    (["a.in1k.pth", "a.in22k.pth"], "fpn/tu-a.in22k", "a.in22k.pth"), (["a+b.ckpt"], "unet/a", "a+b.ckpt")])
def test_a_folder_gives_the_file_named_after_the_encoder(tmp_path, names, model, found):
    for name in names:
        (tmp_path / name).touch()
    assert common.weights_file(str(tmp_path), model) == tmp_path / found


@pytest.mark.parametrize(("names", "count", "there"), [
    ([], 0, "nothing"), (["README.md"], 0, "nothing"), (["ab.pth", "c.pth", "a2.pt", "A.pth"], 0,
                                                         "A.pth, a2.pt, ab.pth, c.pth"),
    (["a_1.pth", "a_2.pth", "c.pth"], 2, "a_1.pth, a_2.pth"), (["a.pth", "a.pt"], 2, "a.pt, a.pth")])
def test_a_folder_without_one_such_file_is_refused_with_what_is_there(tmp_path, names, count, there):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"--weights {tmp_path}: {count} files are named after the encoder a, .*: "
                                        f"there is {there}$"):
        common.weights_file(str(tmp_path), "fpn/tu-a")


def test_a_file_is_itself_and_what_is_no_path_is_none_or_refused(tmp_path):
    (tmp_path / "x").touch()
    assert common.weights_file(str(tmp_path / "x"), "fpn/tu-a") == tmp_path / "x"
    assert common.weights_file("imagenet", "fpn/tu-a") is common.weights_file("none", "fpn/tu-a") is None
    with pytest.raises(UserError, match="--weights .*/nosuch: no such file or folder, and neither imagenet nor none"):
        common.weights_file(str(tmp_path / "nosuch"), "fpn/tu-a")


# ---- mean and std, checkpoints --------------------------------------------------------------------------------------


def test_mean_and_std_are_those_the_encoders_weights_were_made_with():
    half = ((0.5,) * 3,) * 2
    assert common.encoder_mean_std("fpn/tu-tf_efficientnet_lite0") == half
    assert common.encoder_mean_std("unet/tu-tf_efficientnet_lite0.in1k") == half
    assert common.encoder_mean_std("unet/resnet18") == IMAGENET
    assert common.encoder_mean_std("fpn/tu-mobilenetv3_small_100") == IMAGENET
    assert common.encoder_mean_std("unet/tu-nosuch") == common.encoder_mean_std("unet/efficientnet-b0") == IMAGENET
    for name in ("timm-tf_efficientnet_lite0", "timm-mobilenetv3_large_100"):  # as smp takes them for tu-
        assert common.encoder_mean_std(f"unet/{name}") == half
    for name in ("inceptionv4", "inceptionresnetv2", "xception"):  # smp has them by other names than timm
        assert common.encoder_mean_std(f"unet/{name}") == half
    assert common.encoder_mean_std("unet/dpn68")[1] == pytest.approx((0.2348,) * 3, abs=1e-4)


def test_a_model_is_rebuilt_from_its_checkpoint_alone(tmp_path):
    model = common.build_model("unet/tu-test_efficientnet", 3)
    model.load_state_dict(random_state(model))
    common.save_checkpoint(tmp_path / "model.pt", model=model.state_dict(), classes=["Background", "a", "b"], epoch=4,
                           v3=0.5, valid_ids=[7], code={}, state="", commit="", versions={}, kept_under=[],
                           recipe={"model": "unet/tu-test_efficientnet", "scale": 64})
    trained = common.load_model(tmp_path / "model.pt")
    assert not trained.model.training and trained.checkpoint["epoch"] == 4 and trained.recipe["scale"] == 64
    assert trained.classes == ["Background", "a", "b"] and "model" not in trained.checkpoint
    rebuilt, expected = trained.model.state_dict(), model.state_dict()
    assert rebuilt.keys() == expected.keys() and all(torch.equal(rebuilt[k], expected[k]) for k in expected)


def test_a_checkpoint_of_something_else_is_no_model(tmp_path):
    last = dict.fromkeys(common.DESCRIBED, {}) | {  # its weights are no average
        "model": {}, "classes": [], "valid_ids": [], "epoch": 1}
    for value in ({"model": {}}, [1, 2], last):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(UserError, match="x.pt: not a model.pt"):
            common.load_model(tmp_path / "x.pt")


# ---- EfficientDet: sizes --------------------------------------------------------------------------------------------

# N: BiFPN width, layers (table 1 of the paper); depth of EfficientNet-BN's maps at strides 4, 8, 16, 32;
# layers in each detection head and EfficientDet-DN's parameters in millions (tables 1 and 2), None where the paper's
# detector takes another encoder
PAPER = {
    0: (64, 3, (24, 40, 112, 320), 3, 3.9), 1: (88, 4, (24, 40, 112, 320), 3, 6.6),
    2: (112, 5, (24, 48, 120, 352), 3, 8.1), 3: (160, 6, (32, 48, 136, 384), 4, 12),
    4: (224, 7, (32, 56, 160, 448), 4, 21), 5: (288, 7, (40, 64, 176, 512), 4, 34),
    6: (384, 8, (40, 72, 200, 576), 5, 52), 7: (384, 8, (48, 80, 224, 640), None, None)}


def count(module):
    return sum(p.numel() for p in module.parameters())


def modules(module, kind):
    """Every (name, module) whose class is called `kind`: each build makes its own classes."""
    return [(name, m) for name, m in module.named_modules() if type(m).__name__ == kind]


@pytest.mark.parametrize(("encoder", "n"), [
    *((f"efficientnet-b{n}", n) for n in range(8)), *((f"tu-tf_efficientnet_lite{n}", n) for n in range(5)),
    ("tu-tf_efficientnet_b5.ns_jft_in1k", 5), ("tu-efficientnet_b3_pruned", 3), ("tu-hgnetv2_b4", 4), ("mit_b2", 2),
    ("tu-mobilenetv3_small_100", 0), ("resnet18", 0), ("tu-caformer_b36", 0), ("tu-regnetz_b16", 0),
    ("tu-tf_efficientnet_b8", 0), ("tu-mobilenetv3_large_100.miil_in21k_ft_in1k", 0), ("tu-orb4_made_up", 0)])
def test_the_encoders_name_decides_the_size(encoder, n, monkeypatch):
    class Encoder(torch.nn.Module):
        out_channels = (3, 4, 5, 6, 7, 8)

    asked = []
    monkeypatch.setattr(common, "timm_options", lambda *_: {})
    monkeypatch.setattr(smp.encoders, "get_encoder", lambda name, **options: asked.append((name, options)) or Encoder())
    with torch.device("meta"):
        model = common.build_model(f"efficientdet/{encoder}", 5)
    assert asked == [(encoder, {"weights": None})]
    assert (model.decoder.p2[0].out_channels, len(model.decoder.layers)) == PAPER[n][:2]


@pytest.mark.parametrize("n", PAPER)
def test_parameters_and_nodes_are_those_counted_by_hand(n):
    width, layers, (c2, c3, c4, c5), head_layers, millions = PAPER[n]
    with torch.device("meta"):
        model = common.build_model(f"efficientdet/efficientnet-b{n}", 12)
    norm = 2 * width
    node = 9 * width + width ** 2 + norm  # depthwise 3x3, pointwise, batch norm
    layer = 8 * node + 5 * 2 + 3 * 3  # five nodes weigh two maps, three weigh three
    project = (c3 + 2 * c4 + 3 * c5) * width + 6 * norm  # P3 once; P4 twice; P5 twice and once more for P6
    stride4 = c2 * width + norm + node + 6
    assert len(model.decoder.layers) == layers
    assert len(modules(model.decoder.layers, "Node")) == 8 * layers
    assert count(model.decoder.layers) == layers * layer
    assert count(model.decoder) == layers * layer + project + stride4
    assert count(model.segmentation_head) == (width + 1) * 12
    if millions is None:
        return
    # EfficientDet as published: this encoder without its classifier, this BiFPN with the biases that batch norm makes
    # idle and without what is ours at stride 4, and heads of 90 classes and of boxes, 9 anchors at each place
    encoder = model.encoder
    detector = count(encoder) - count(encoder._conv_head) - count(encoder._bn1)
    detector += layers * (layer + 8 * width) + project + 6 * width
    for outputs in (9 * 90, 9 * 4):
        detector += head_layers * (9 * width + width ** 2 + width + 5 * norm) + 9 * width + (width + 1) * outputs
    assert detector / 1e6 == pytest.approx(millions, abs=0.06 if millions < 10 else 0.6)


# ---- EfficientDet: fusion --------------------------------------------------------------------------------------------


def fusion(*weights):
    """A node of those weights that shows what its fusion makes: the convolution is left out."""
    node = common.node_class()(4, len(weights))
    node.conv = torch.nn.Identity()
    node.weights.data = torch.tensor(weights)
    return node


@pytest.mark.parametrize(("weights", "values", "expected"), [
    ((1., 1.), (2., 6.), 8 / 2.0001), ((3., 1.), (2., 6.), 12 / 4.0001), ((1., 1., 2.), (1., 2., 3.), 9 / 4.0001),
    ((2., -5.), (7., 100.), 14 / 2.0001), ((-1., -1.), (7., 9.), 0), ((0., 0., 0.), (7., 8., 9.), 0)])
def test_constant_maps_fuse_to_the_number_worked_by_hand(weights, values, expected):
    fused = fusion(*weights)(*(torch.full((2, 4, 3, 5), v) for v in values))
    assert fused.shape == (2, 4, 3, 5)
    assert torch.allclose(fused, torch.tensor(float(expected)), atol=1e-6)


def test_fusion_weights_start_equal_and_initialize_leaves_them_so():
    nodes = modules(small("efficientdet"), "Node")
    assert sorted({m.weights.numel() for _, m in nodes}) == [2, 3, 6]
    assert all(torch.equal(m.weights, torch.ones_like(m.weights)) for _, m in nodes)


def test_normalised_weights_stay_in_0_to_1_whatever_training_does():
    torch.manual_seed(0)
    for _ in range(50):
        node = fusion(*(torch.randn(3) * 10).tolist())
        shares = torch.stack([node(*(torch.full((1, 4, 1, 1), float(i == j)) for i in range(3)))[0, 0, 0, 0]
                              for j in range(3)])  # the share of map j: it alone is 1
        assert (shares >= 0).all() and shares.sum() <= 1
        assert (shares[node.weights < 0] == 0).all()


def test_half_precision_maps_stay_so_through_fusion():
    assert fusion(1., 1.)(*torch.ones(2, 1, 4, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_node_is_swish_depthwise_pointwise_batch_norm_in_this_order():
    node = common.node_class()(2, 2).eval()
    _, depthwise, pointwise, norm = node.conv
    depthwise.weight.data = torch.tensor([1., 10.]).view(2, 1, 1, 1).expand(2, 1, 3, 3).clone()
    pointwise.weight.data = torch.tensor([[1., 1.], [1., -1.]]).view(2, 2, 1, 1)
    norm.running_mean.data, norm.eps = torch.tensor([5., 0.]), 0.
    value = -1 / 2.0001  # of -3 and 2
    swish = value / (1 + math.exp(-value))
    out = node(torch.full((1, 2, 3, 3), -3.), torch.full((1, 2, 3, 3), 2.))
    centre, corner = out[0, :, 1, 1].tolist(), out[0, :, 0, 0].tolist()
    assert centre == pytest.approx([99 * swish - 5, -81 * swish], rel=1e-5)
    assert corner == pytest.approx([44 * swish - 5, -36 * swish], rel=1e-5)  # four of nine pixels are inside


# ---- EfficientDet: wiring --------------------------------------------------------------------------------------------


def test_every_node_of_a_layer_sees_the_maps_of_figure_2d():
    """Nodes that only fuse, worked by hand on 1x1 maps, with a different power of ten for each input."""
    layer = common.bifpn_layer_class()(1)
    for _, node in modules(layer, "Node"):
        node.forward = lambda *maps: sum(maps)
    p3, p4, p5, p6, p7, q4, q5 = (torch.full((1, 1, 1, 1), 10. ** i) for i in range(7))
    out = [int(o) for o in layer(p3, p4, p5, p6, p7, q4, q5)]
    m6, m5, m4, o3 = 11000, 11100, 11110, 11111
    o4 = 100000 + m4 + o3
    o5 = 1000000 + m5 + o4
    o6 = 1000 + m6 + o5
    assert out == [o3, o4, o5, o6, 10000 + o6]


def test_the_first_layer_starts_from_the_encoder_and_the_second_from_the_first():
    decoder = common.bifpn_class()([3, 4, 5, 6, 7, 8], 16, 2).eval()
    x = [torch.randn(1, 3 + i, 160 >> i, 128 >> i) for i in range(6)]
    seen = []
    for layer in decoder.layers:
        layer.forward = lambda *maps: seen.append(maps) or [m + 1 for m in maps[:5]]
    with torch.inference_mode():
        decoder(x)
        p6 = torch.nn.functional.max_pool2d(decoder.p6(x[5]), 3, 2, 1)
        expected = [decoder.p3(x[3]), decoder.p4(x[4]), decoder.p5(x[5]), p6,
                    torch.nn.functional.max_pool2d(p6, 3, 2, 1), decoder.q4(x[4]), decoder.q5(x[5])]
    assert [tuple(m.shape[2:]) for m in seen[0]] == [(20, 16), (10, 8), (5, 4), (3, 2), (2, 1), (10, 8), (5, 4)]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected, strict=True))
    assert all(torch.equal(a, b + 1) for a, b in zip(seen[1], expected[:5] + expected[1:3], strict=True))


def test_the_join_sees_all_levels_at_stride_4_without_squares_and_ends_in_a_swish():
    decoder = common.bifpn_class()([3, 4, 5, 6, 7, 8], 16, 1).eval()
    seen = []
    decoder.join.forward = lambda *maps: seen.extend(maps) or -maps[0].abs() * 100
    with torch.inference_mode():
        out = decoder([torch.randn(1, 3 + i, 256 >> i, 256 >> i) for i in range(6)])
    assert [tuple(m.shape) for m in seen] == [(1, 16, 64, 64)] * 6
    assert all(m[0, 0].unique().numel() > 1000 for m in seen)  # P7 has 4 pixels
    assert out.min() > -0.2785 and out.max() <= 0  # of swish left of 0


@pytest.mark.parametrize("level", [2, 3, 4, 5])
def test_each_encoder_map_reaches_the_output(level):
    torch.manual_seed(0)
    decoder = common.bifpn_class()([3, 4, 5, 6, 7, 8], 16, 1).eval()
    maps = [torch.randn(1, 3 + i, 64 >> i, 64 >> i) for i in range(6)]
    with torch.inference_mode():
        before = decoder(maps)
        maps[level] = maps[level] + 1
        assert not torch.allclose(before, decoder(maps))


def test_the_deepest_levels_see_the_whole_image():
    """A change in one corner of the last map is felt in the opposite corner of the output."""
    torch.manual_seed(0)
    decoder = common.bifpn_class()([3, 4, 5, 6, 7, 8], 16, 1).eval()
    maps = [torch.randn(1, 3 + i, 256 >> i, 256 >> i) for i in range(6)]
    with torch.inference_mode():
        before = decoder(maps)
        maps[5][..., 0, 0] += 10
        assert (before - decoder(maps))[..., -1, -1].abs().max() > 0


@pytest.mark.parametrize("channels", [[3, 16., 24., 40., 112., 320.], [3, 0, 24, 40, 112, 320], [9, 24, 40, 56]])
def test_channels_may_be_floats_and_only_the_last_four_matter(channels):
    decoder = common.bifpn_class()(channels, 8, 1)
    maps = [torch.zeros(2, int(c), 16 >> i, 16 >> i) for i, c in enumerate(channels[-4:])]
    assert decoder(maps).shape == (2, 8, 16, 16)


# ---- EfficientDet: the model -----------------------------------------------------------------------------------------


def randomise(module):
    """Normal random parameters, so that nothing in a test is 0 or 1 by its initial value; fusion weights positive."""
    for name, p in module.named_parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if name.endswith("weights") else torch.nn.init.normal_(p, std=0.1)


@pytest.mark.parametrize("sides", [(32, 32), (64, 96), (160, 128), (32, 224), (288, 32)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_logits_have_the_inputs_size_also_for_a_batch_of_one(sides, layout):
    model = deepcopy(small("efficientdet")).to(memory_format=layout)
    image = torch.randn(1, 3, *sides).contiguous(memory_format=layout)
    with torch.inference_mode():
        logits = model(image)
    assert logits.shape == (1, 5, *sides) and logits.isfinite().all()


def test_channels_last_changes_no_number():
    image, model = torch.randn(2, 3, 160, 96), small("efficientdet")
    with torch.inference_mode():
        plain = model(image)
        last = deepcopy(model).to(memory_format=torch.channels_last)(
            image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, last, rtol=0, atol=1e-4)


@pytest.mark.parametrize("encoder", ["tu-test_efficientnet", "resnet18", "tu-test_convnext"])
def test_gradients_reach_every_parameter(encoder):
    torch.manual_seed(0)
    model = common.build_model(f"efficientdet/{encoder}", 5).train()
    randomise(model.decoder)
    randomise(model.segmentation_head)
    model(torch.randn(4, 3, 160, 160)).square().sum().backward()  # P7 is 2x2: batch norm has 16 values
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_reach_every_parameter_from_the_initial_weights():
    torch.manual_seed(0)
    model = common.build_model("efficientdet/tu-mobilenetv3_small_050", 5).train()
    model(torch.randn(4, 3, 128, 128)).square().sum().backward()  # P7 is 1x1: batch norm has 4 values
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_state_dict_makes_the_same_model_again(tmp_path):
    model, image = small("efficientdet"), torch.randn(1, 3, 64, 90)
    common.save_checkpoint(tmp_path / "model.pt", model=model.state_dict())
    torch.manual_seed(1)
    again = common.build_model("efficientdet/tu-test_efficientnet", 5).eval()
    with torch.inference_mode():
        assert not torch.allclose(again(image), model(image))
        again.load_state_dict(common.load_checkpoint(tmp_path / "model.pt")["model"])
        assert torch.equal(again(image), model(image))


# ---- losses: a new entry of LOSSES is tested by itself ---------------------------------------------------------------
# test_common.py compares each loss that is there with its formula.


def batch_of(n_classes=5):
    """Return (logits of a perfect prediction, mask) with unlabelled pixels and all classes but the last."""
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(rng.integers(0, n_classes - 1, (2, 16, 24)))
    right = torch.nn.functional.one_hot(mask, n_classes).permute(0, 3, 1, 2).float()
    mask[:, 3:6] = IGNORE_INDEX
    return right, mask


@pytest.mark.parametrize("name", common.LOSSES)
def test_every_loss_is_about_0_for_a_perfect_prediction_and_grows_as_it_gets_worse(name):
    right, mask = batch_of()
    wrong = right.roll(1, dims=1)
    losses = [make_loss(name)(logits, mask).item()
              for logits in (30 * right, 6 * right, right, 0 * right, wrong, 6 * wrong)]
    assert losses == sorted(losses) and len(set(losses)) == len(losses)
    assert losses[0] == pytest.approx(0, abs=1e-3) and losses[3] > 0.1


@pytest.mark.parametrize("margin", [10, 17, 30, 100])
@pytest.mark.parametrize("name", common.LOSSES)
def test_the_gradient_of_every_loss_is_finite_at_a_perfect_prediction(name, margin):
    right, mask = batch_of()
    logits = (margin * right).requires_grad_()
    make_loss(name)(logits, mask).backward()
    assert logits.grad.isfinite().all(), (
        f"LOSSES[{name!r}] has an infinite slope at a perfect prediction: clamp what you take a root of")


@pytest.mark.parametrize("size", [0, 1e-6, 1, 100, 1e4])
@pytest.mark.parametrize("name", common.LOSSES)
def test_every_loss_and_its_gradient_are_finite_whatever_the_logits_size(name, size):
    right, mask = batch_of()
    logits = (size * torch.randn(right.shape)).requires_grad_()
    loss = make_loss(name)(logits, mask)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite() and loss > 0
    assert logits.grad.isfinite().all() and not logits.grad[:, :, 3:6].any()
    assert logits.grad.any() or size > 1


@pytest.mark.parametrize("name", common.LOSSES)
def test_every_loss_falls_along_its_gradient(name):
    _, mask = batch_of()
    logits = torch.randn(2, 5, 16, 24, requires_grad=True)
    before = make_loss(name)(logits, mask)
    before.backward()
    with torch.no_grad():
        after = make_loss(name)(logits - 0.1 * logits.grad / logits.grad.norm(), mask)
    slope = (before - after).item() / 0.1
    assert slope == pytest.approx(logits.grad.norm().item(), rel=0.2)


@pytest.mark.parametrize("name", common.LOSSES)
def test_every_loss_of_a_batch_without_labelled_pixels_is_0_and_so_is_its_gradient(name):
    logits = torch.randn(2, 5, 16, 24, requires_grad=True)
    loss = make_loss(name)(logits, torch.full((2, 16, 24), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def tversky(overlap, missed, invented):
    return overlap / (overlap + 0.7 * missed + 0.3 * invented)


# by hand, of the probabilities below. Class 1: overlap 0.8 + 0.6, missed 0.2 + 0.4, invented 0.3; class 0: overlap 0.6,
# missed 0.4, invented 0.1 + 0.3; class 2 is not in the truth
@pytest.mark.parametrize(("index", "class_1", "class_0"), [
    (common.iou, 1.4 / 2.3, 0.6 / 1.4), (common.dice, 2.8 / 3.7, 1.2 / 2.0), (tversky, 1.4 / 1.91, 0.6 / 1.0)])
def test_a_region_loss_is_1_less_the_index_worked_by_hand(index, class_1, class_0, monkeypatch):
    probs = torch.tensor([[0.1, 0.3, 0.6, 0.2], [0.8, 0.6, 0.3, 0.5], [0.1, 0.1, 0.1, 0.3]]).view(1, 3, 2, 2)
    mask = torch.tensor([[[1, 1], [0, IGNORE_INDEX]]])
    monkeypatch.setitem(common.LOSSES, "mine", (region_loss(index), None))  # all that a user adds
    expected = 1 - (class_1 + class_0) / 2
    assert make_loss("mine")(probs.log(), mask).item() == pytest.approx(expected, rel=1e-5)
    monkeypatch.setitem(common.LOSSES, "mine", (region_loss(index), common.cross_entropy))
    ce = -(math.log(0.8) + math.log(0.6) + math.log(0.6)) / 3
    assert make_loss("mine", 0.25)(probs.log(), mask).item() == pytest.approx(0.25 * expected + 0.75 * ce, rel=1e-5)


def test_a_region_losss_index_gets_the_sums_over_the_whole_batch():
    seen = []
    term = region_loss(lambda *sums: seen.append(sums) or common.iou(*sums))
    probs = torch.tensor([[[0.9, 0.2]], [[0.1, 0.8]]]).view(2, 2, 1, 1).expand(2, 2, 1, 3)  # two images of 3 pixels
    mask = torch.tensor([[[0, 0, 1]], [[1, IGNORE_INDEX, 1]]])
    labelled = mask != IGNORE_INDEX
    target = mask.where(labelled, 0)
    log_probs = probs.log()
    term(log_probs, log_probs.gather(1, target[:, None])[:, 0], target, labelled)
    (overlap, missed, invented), = seen
    p = probs[:, :, 0, 0].tolist()  # [image][class]
    assert overlap.tolist() == pytest.approx([2 * p[0][0], p[0][1] + 2 * p[1][1]])
    assert missed.tolist() == pytest.approx([2 * (1 - p[0][0]), 1 - p[0][1] + 2 * (1 - p[1][1])])
    assert invented.tolist() == pytest.approx([p[0][0] + 2 * p[1][0], 2 * p[0][1]])


def test_the_iou_loss_is_1_less_the_soft_iou():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (3, 6, 20, 30))
    mask = rng.choice([0, 1, 2, 4, IGNORE_INDEX], (3, 20, 30))  # without 3 and 5
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probs = np.moveaxis(probs, 1, -1)[mask != IGNORE_INDEX]  # [labelled pixels, C]
    truth = np.eye(6)[mask[mask != IGNORE_INDEX]]
    soft_iou = (probs * truth).sum(0) / (probs + truth - probs * truth).sum(0)
    expected = 1 - soft_iou[[0, 1, 2, 4]].mean()
    loss = make_loss("iou")(torch.from_numpy(logits), torch.from_numpy(mask))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("index", "smps"), [(common.iou, smp.losses.JaccardLoss), (common.dice, smp.losses.DiceLoss)])
def test_region_losses_are_smps_where_all_classes_and_pixels_count(index, smps, monkeypatch):
    mask = torch.randint(5, (2, 16, 24))
    logits = torch.randn(2, 5, 16, 24)
    monkeypatch.setitem(common.LOSSES, "mine", (region_loss(index), None))
    torch.testing.assert_close(make_loss("mine")(logits, mask), smps("multiclass")(logits, mask))
