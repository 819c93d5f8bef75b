"""FOLD=all: a run on all images, as long as the folds were best at, which votes as one fold more of its member."""
import json
import shutil
from statistics import median_high

import numpy as np
import pytest
import torch
from conftest import MODEL, SCALE, read_csv, run_folder, run_of, run_until_killed
from test_graph import GRID, data, make, new_folder, said  # noqa: F401  data is a fixture

import common
import ensemble
import train
from common import UserError

torch.set_num_threads(1)
KNOBS = {"FOLDS": "0 1 all", "EPOCHS": 4, "VOTE": "equal", "POST": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):  # noqa: F811
    """A finished `make submit` of one round, of two folds and of all images."""
    folder = new_folder(tmp_path_factory.mktemp("all") / "built", data)
    make(folder, "-j2", "submit", **KNOBS)
    return folder


def run(folder, fold, round_=0):
    return run_folder(folder / "out/main", round_, GRID["MODELS"], GRID["SCALES"], fold)


def config(folder, fold, round_=0):
    return json.loads((run(folder, fold, round_) / "config.json").read_text())


@pytest.mark.parametrize("round_", [0, 1])
def test_it_stops_at_the_median_of_the_epochs_at_which_the_folds_were_best(folder, round_):
    best = [config(folder, fold, round_)["epoch"] for fold in (0, 1)]
    mean_v3 = np.mean([config(folder, fold, round_)["v3"] for fold in (0, 1)])
    done = config(folder, "all", round_)
    assert done["epoch"] == done["recipe"]["stop_epoch"] == median_high(best) > 2
    assert done["v3"] == pytest.approx(mean_v3) and done["recipe"]["fold"] == "all"
    log = read_csv(run(folder, "all", round_) / "log.csv")
    assert len(log) == done["epoch"] and not {"v1", "v2", "v3"} & log[0].keys()
    # as far as it goes it is on the folds' schedule: of 4 epochs, whatever the epoch that it stops at
    assert [row["lr"] for row in log] != [] and float(log[-1]["lr"]) > 0
    assert common.load_model(run(folder, "all", round_) / "model.pt").checkpoint["valid_ids"] == []
    assert not (run(folder, "all", round_) / "valid.npy").exists()


def test_its_labels_are_by_the_runs_on_all_images_of_the_round_before(folder):
    manifest = json.loads((folder / "out/main/r1/pseudo/fall/manifest.json").read_text())
    assert manifest["fold"] == "all" and not manifest["contaminated"]
    stores = [maker["store"] for maker in manifest["makers"]]
    assert stores == [str(run(folder, "all").relative_to(folder) / "test.json")]


def test_it_votes_as_one_fold_more_of_its_member(folder):
    stores = [np.load(run(folder, fold, 1) / "test.npy").astype(int) for fold in ("0", "1", "all")]
    ids = [image["id"] for image in json.loads((folder / "data/test.json").read_text())["images"]]
    voted = list(ensemble.read_submission(folder / "out/main/submission.csv", [str(i) for i in ids], 12))
    total = sum(stores)
    top = np.sort(total, axis=1)
    for n, (fault, pred) in enumerate(voted):
        assert fault is None
        clear = top[n, -1] - top[n, -2] > 3  # float32 sums decide the others
        assert clear.mean() > 0.5 and (pred == total[n].argmax(0))[clear].all()
    without = sum(stores[:2]).argmax(1)
    assert (without != total.argmax(1)).any()  # else it would have shown nothing


def test_the_second_make_does_nothing_and_the_score_says_whose_it_is(folder):
    assert make(folder, "why", **KNOBS).stdout.strip() == "out/main is up to date"
    text = make(folder, "score", **KNOBS).stdout
    assert "out of fold: 12 of 12 training images" in text
    report = make(folder, "submit", **KNOBS, IMAGE_ID="file_name").stdout
    assert "1 run(s) on all images vote on test photos as one fold more of their member, whose score is the" in report
    assert " fall " in make(folder, "status", **KNOBS).stdout.splitlines()[0] + " "


def test_it_is_made_anew_when_the_folds_choose_another_epoch(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    for fold in (0, 1):
        path = run(copy, fold) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"epoch": 1}))
    why = make(copy, "why", ROUNDS=0, **KNOBS).stdout
    before = config(folder, "all")["epoch"]
    assert f"{run(copy, 'all').relative_to(copy)}/model.pt: stop_epoch {before} -> 1\n" in why
    assert "f0/model.pt" not in why


def test_make_trains_the_folds_before_it(folder):
    # -n: what would be made; FOLD=all alone asks for the folds of FOLDS too
    lines = make(folder, "-n", "train", FOLD="all", EXP="fresh", **KNOBS).stdout.splitlines()
    trained = [line.split("--fold ")[1].split()[0] for line in lines if "--fold " in line and "--check" not in line]
    assert sorted(trained) == ["0", "1", "all"] and trained[-1] == "all"
    assert "--of-folds 0 1" in "\n".join(lines)


@pytest.mark.parametrize(("knobs", "message"), [
    ({"FOLDS": "all"}, 'FOLDS=all: the folds choose how long a run on all images trains: FOLDS="0 1 all"'),
    ({"FOLDS": "0 1 al"}, "FOLDS and FOLD go from 0 to 1, as NFOLDS=2 says, or are all, not al"),
    ({"FOLDS": "0 1 all all"}, "FOLDS has all twice")])
def test_mistakes_are_told_in_one_line(folder, knobs, message):
    done = make(folder, "submit", code=2, **KNOBS | knobs)
    assert message in said(done)[-1]


@pytest.mark.parametrize("options", [["--sweep", 2], ["--overfit", 2]])
def test_what_needs_a_held_out_photo_is_refused(line, tmp_path, options):
    with pytest.raises(UserError, match="--fold all has no photo to judge by"):
        train.main(line(tmp_path, "--fold", "all", *options))


def test_without_its_folds_or_with_folds_of_another_recipe_it_is_refused(line, tmp_path):
    with pytest.raises(UserError, match=r"f0 isn't trained, whose best epoch --fold all needs"):
        train.main(line(tmp_path, "--fold", "all"))
    train.main(line(tmp_path, "--fold", 1, "--epochs", 1))
    with pytest.raises(UserError, match="fold 1 has another recipe than this one of all images, in epochs, lr"):
        train.main(line(tmp_path, "--fold", "all", "--of-folds", 1, "--epochs", 2, "--lr", "2e-3"))
    with pytest.raises(UserError, match="--fold 3: there are the folds 0 to 2"):
        train.main(line(tmp_path, "--fold", "all", "--of-folds", 3))


def test_a_run_on_all_images_that_was_killed_ends_in_the_same_bytes(line, tmp_path):
    train.main(line(tmp_path / "a", "--fold", 0))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole, killed = (line(tmp_path / name, "--fold", "all", "--of-folds", 0) for name in "ab")
    train.main(whole)
    run_until_killed(train, killed, "train_step", 6)
    assert (run_of(killed) / "last.pt").exists()
    train.main(killed)
    for name in ("model.pt", "config.json"):
        assert (run_of(killed) / name).read_bytes() == (run_of(whole) / name).read_bytes(), name
    train.main(killed)  # nothing is left to do


def test_with_snapshots_it_trains_to_the_end_and_keeps_the_same_epochs(line, tmp_path):
    for fold in ([0], ["all", "--of-folds", 0]):
        train.main(line(tmp_path, "--fold", *fold, "--epochs", 4, "--snapshots", 2))
    names = [sorted(path.name for path in run_folder(tmp_path, 0, MODEL, SCALE, fold).glob("epoch-*.pt"))
             for fold in (0, "all")]
    assert names[0] == names[1] == ["epoch-003.pt", "epoch-004.pt"]
