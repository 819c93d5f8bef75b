"""What competitors bring, through make on drawn data: weights by a folder, a ViT, native crops, soup, METRIC, POST."""
import json

import pandas as pd
import pytest
import timm
import torch
from conftest import run_folder
from test_graph import data, make, new_folder  # noqa: F401  data is a fixture

import common

torch.set_num_threads(1)
FPN, RESNET, VIT = "fpn-narrow/tu-test_efficientnet", "fpn-narrow/tu-test_resnet", "dpt/tu-test_vit"
KNOBS = {"ROUNDS": 0, "EPOCHS": 2, "FOLDS": "0"}


@pytest.fixture
def folder(tmp_path, data):  # noqa: F811
    return new_folder(tmp_path / "fresh", data)


def config(folder, model, scale=64, fold=0):
    return json.loads((run_folder(folder / "out/main", 0, model, scale, fold) / "config.json").read_text())


def test_a_folder_of_weights_serves_several_architectures(folder):
    (folder / "w").mkdir()
    for name in ("test_efficientnet", "test_resnet"):
        torch.save(timm.create_model(name).state_dict(), folder / f"w/{name}.r1.pth")
    text = make(folder, "submit", WEIGHTS="w", MODELS=f"{FPN} {RESNET}", **KNOBS).stdout
    for name in ("test_efficientnet", "test_resnet"):
        assert f"weights w/{name}.r1.pth: " in text and "100.0% of the encoder's parameters" in text
    hashes = {config(folder, model)["recipe"]["weights"] for model in (FPN, RESNET)}
    assert hashes == {common.file_hash(folder / f"w/{name}.r1.pth") for name in ("test_efficientnet", "test_resnet")}
    assert make(folder, "why", WEIGHTS="w", MODELS=f"{FPN} {RESNET}", **KNOBS).stdout == "out/main is up to date\n"
    (folder / "w/test_resnet.r1.pth").unlink()
    done = make(folder, "submit", code=2, WEIGHTS="w", MODELS=f"{FPN} {RESNET}", **KNOBS)
    assert "0 files are named after the encoder test_resnet" in done.stderr


def test_a_vit_at_an_odd_size_with_what_transformers_need(folder):
    (folder / "w").mkdir()
    torch.save(timm.create_model("test_vit").state_dict(), folder / "w/test_vit.pth")  # of another size
    options = "--layer-decay 0.7 --drop-path 0.1 --freeze 1 --encoder-lr 0.5"
    grid = KNOBS | {"WEIGHTS": "w", "MODELS": VIT, "SCALES": 70, "TRAIN_ARGS": options}
    make(folder, "submit", **grid)
    recipe = config(folder, VIT, 70)["recipe"]
    assert (recipe["layer_decay"], recipe["drop_path"], recipe["freeze"], recipe["scale"]) == (0.7, 0.1, 1, 70)
    assert (folder / "out/main/submission.csv").exists()
    assert make(folder, "why", **grid).stdout == "out/main is up to date\n"


def test_native_crops_and_another_size_in_prediction(folder):
    grid = KNOBS | {"TRAIN_ARGS": "--crop native --repeat 2", "SCALES": 48, "INFER_ARGS": "--scale 64"}
    make(folder, "submit", **grid)
    run = run_folder(folder / "out/main", 0, FPN, 48, 0)
    assert json.loads((run / "test.json").read_text())["recipe"]["scale"] == 64
    assert config(folder, FPN, 48)["recipe"]["crop"] == "native"
    assert make(folder, "why", **grid).stdout == "out/main is up to date\n"
    why = make(folder, "why", **grid | {"INFER_ARGS": "--scale 80"}).stdout
    assert "test.json: scale 64 -> 80" in why and "model.pt" not in why


def test_metric_post_and_soup_reach_runs_and_vote(folder):
    grid = KNOBS | {"METRIC": "v1", "POST": "least-share", "TRAIN_ARGS": "--soup 2", "EPOCHS": 4}
    make(folder, "submit", **grid)
    run = run_folder(folder / "out/main", 0, FPN, 64, 0)
    model = torch.load(run / "model.pt")
    assert model["recipe"]["metric"] == "v1" and model["soup"][0] == model["epoch"]
    made = json.loads((folder / "out/main/submission.made.json").read_text())["recipe"]
    assert (made["metric"], made["post"], made["batch"]) == ("v1", "least-share", 4)
    make(folder, "score", **grid)
    tried = pd.read_csv(folder / "out/main/report/tried.csv")
    assert tried["tried"].tolist() == ["least share"] and {"v1 gain", "v2 gain"} < {*tried}
    why = make(folder, "why", **grid | {"METRIC": "v2"}).stdout
    assert "f0/model.pt: metric v1 -> v2" in why
    why = make(folder, "why", **grid | {"POST": "none"}).stdout
    assert why.splitlines() == ["out/main/submission.csv: post least-share -> none"]


@pytest.mark.parametrize(("knobs", "message"), [
    ({"POST": "least-shar"}, "there is no least-shar in fit, none, least-share, minimum-area"),
    ({"METRIC": "v4"}, "METRIC=v4 can not be"), ({"TRAIN_ARGS": "--soup 9"}, "--soup 9: this run has only"),
    ({"TRAIN_ARGS": "--crop natve"}, "invalid choice: 'natve'")])
def test_what_cant_be_is_told_before_anything_runs(folder, knobs, message):
    done = make(folder, "submit", code=2, **KNOBS | knobs)
    assert message in done.stderr and not (folder / "out/main").exists()
