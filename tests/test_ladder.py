"""The ladder: its table of rungs, what each is worth, and the whole climb with the real Makefile; and budgets."""
import argparse
import contextlib
import fcntl
import io
import json
import math
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import read_csv
from demo_data import draw_data
from test_graph import ENV, MODEL, command, edit, make, new_folder

import common
import ensemble
import infer
import train
from common import UserError
from ensemble import Rung

# ---- the table ------------------------------------------------------------------------------------------------------


def test_each_rung_changes_something_for_a_reason():
    assert all(rung.why and rung.knobs for rung in ensemble.LADDER)


@pytest.mark.parametrize("knob, option", [(knob, option) for knob, options in ensemble.HAVE_A_KNOB.items()
                                          for option in options])
def test_options_that_have_a_knob_are_options_of_their_script(knob, option):
    parse_args, line = {
        "TRAIN_ARGS": (train.parse_args, ["--data", "x"]), "INFER_ARGS": (infer.parse_args, ["--data", "x"]),
        "SUBMIT_ARGS": (ensemble.parse_args, ["soft"])}[knob]
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:
        parse_args([*line, "--help"])
    assert re.search(rf"^ *{option}\b", told.getvalue(), re.M)


def test_a_rung_changes_what_it_says_of_the_rungs_below_and_one_aside_changes_nothing_above(monkeypatch):
    monkeypatch.setattr(ensemble, "LADDER", (
        Rung("low", {"MODELS": 1, "SCALES": 1, "FOLDS": 1, "TTA": "none", "TRAIN_ARGS": "--loss ce"}, "first"),
        Rung("loss", {"TRAIN_ARGS": "--loss iou_ce"}, "why"),
        Rung("tried", {"TRAIN_ARGS": "--classmix plain", "TTA": "d4"}, "why", aside_in=("fast",)),
        Rung("views", {"TTA": "flip"}, "why"),
        Rung("scales", {"SCALES": 2}, "nothing, with one scale"),
        Rung("folds", {"FOLDS": 10}, "all of them")))
    asked = {"MODELS": "unet/a fpn/b", "SCALES": "64", "NFOLDS": "3", "TRAIN_ARGS": "--ema 0.9", "SEED": "4"}
    climbed = ensemble.climb("fast", asked | {"FOLDS": "0 1 2"})
    assert [(rung.name, below) for rung, _, below in climbed] == [
        ("low", ""), ("loss", "low"), ("tried", "loss"), ("views", "loss"), ("folds", "views")]
    knobs = {rung.name: knobs for rung, knobs, _ in climbed}
    assert knobs["low"] | {"EPOCHS": ""} == asked | {
        "EPOCHS": "", "ROUNDS": "0",
        "MODELS": "unet/a", "FOLDS": "0", "TTA": "none", "TRAIN_ARGS": "--ema 0.9 --loss ce"}
    assert knobs["tried"]["TRAIN_ARGS"] == "--ema 0.9 --loss ce --loss iou_ce --classmix plain"
    assert knobs["views"] == knobs["loss"] | {"TTA": "flip"} and knobs["folds"]["FOLDS"] == "0 1 2"
    assert knobs["low"]["EPOCHS"] == ensemble.LADDER_KNOBS["fast"]["EPOCHS"].split()[0]
    two = Rung("fpn", {"MODELS": 2}, "why", aside_in=("fast",))
    monkeypatch.setattr(ensemble, "LADDER", (*ensemble.LADDER, two, two._replace(name="unet", knobs={"MODELS": 3})))
    assert [rung.name for rung, _, _ in ensemble.climb("fast", asked)][-2:] == ["folds", "fpn"]  # there is no third
    climbed = ensemble.climb("full", {"NFOLDS": "4"})
    assert climbed[-1][1]["FOLDS"] == "0 1 2 3"
    assert [below for _, _, below in climbed][:4] == ["", "low", "loss", "tried"]  # in full it isn't aside
    with pytest.raises(UserError, match="^TTA=d4: rungs of the ladder set TTA themselves"):
        ensemble.climb("full", {"TTA": "d4"})
    with pytest.raises(UserError, match="^TRAIN_ARGS=--loss=ce: rungs of the ladder set --loss themselves"):
        ensemble.climb("full", {"TRAIN_ARGS": "--loss=ce"})
    with pytest.raises(UserError, match="^SUBMIT_ARGS: write IMAGE_ID= instead of --image-id"):
        ensemble.climb("full", {"SUBMIT_ARGS": "--image-id file_name"})


def test_a_rung_may_change_what_a_preset_gives(monkeypatch):
    monkeypatch.setattr(ensemble, "LADDER", (
        Rung("low", {"EPOCHS": 1}, "first"), Rung("more", {"EPOCHS": -1}, "why"),
        Rung("longer", {"EPOCHS": "80"}, "why"), Rung("shorter", {"EPOCHS": 1}, "the first that was asked for")))
    monkeypatch.setitem(ensemble.LADDER_KNOBS, "fast", {"SCALES": "64", "EPOCHS": "6 12"})
    assert [knobs["EPOCHS"] for _, knobs, _ in ensemble.climb("fast", {})] == ["6", "12", "80", "6"]
    with pytest.raises(UserError, match="^EPOCHS=3: rungs"):
        ensemble.climb("fast", {"EPOCHS": "3"})


@pytest.mark.parametrize("asked, told", [
    ({"SCALES": "192 128"}, "^SCALES=192 128: a ladder takes the lowest first"),
    ({"EPOCHS": "12 5"}, "^EPOCHS=12 5: a ladder takes the lowest first"),
    ({"EPOCHS": "5 5"}, "^EPOCHS=5 5: a ladder takes the lowest first"),
    ({"EPOCHS": "5 9 12"}, "^EPOCHS=5 9 12: a ladder takes one or two numbers")])
def test_sizes_rise_from_a_trial_to_the_full_size(monkeypatch, asked, told):
    with pytest.raises(UserError, match=told):
        ensemble.climb("fast", asked)
    monkeypatch.setitem(ensemble.LADDER_KNOBS, "mine", {"SCALES": "64"})
    with pytest.raises(UserError, match="^LADDER_KNOBS in ensemble.py: a preset without EPOCHS"):
        ensemble.climb("mine", {})


def test_one_size_leaves_out_the_rungs_of_others():
    names = [rung.name for rung, _, _ in ensemble.climb("full", {"SCALES": "256", "EPOCHS": "9", "MODELS": "unet/a"})]
    assert not {"full-size", "scales", "models-2", "models-3"} & {*names} and names[-2:] == ["pseudo-all", "fitted"]


def test_the_ladder_holds_what_the_climb_was_made_of():
    """Baseline, loss, schedule, augmentation, ClassMix, views, folds, models, rounds, size, scales, fits."""
    climbed = ensemble.climb("full", {})
    assert [rung.name for rung, _, _ in climbed] == [rung.name for rung in ensemble.LADDER] and len(climbed) == 17
    aside = ["classmix", "classmix-rare", "pseudo-1", "pseudo-2"]
    assert [rung.name for rung, _, _ in climbed if "full" in rung.aside_in] == aside
    first, last = climbed[0][1], climbed[-1][1]
    assert (first["TTA"], first["VOTE"], first["POST"], first["ROUNDS"]) == ("none", "equal", "none", "0")
    assert (last["VOTE"], last["POST"], last["ROUNDS"]) == ("fit", "fit", "2")
    sizes = [[len(knobs[name].split()) for name in ensemble.LIST_KNOBS] for knobs in (first, last)]
    assert sizes == [[1, 1, 1, 1, 1], [3, 2, 1, 5, 1]]
    assert int(first["EPOCHS"]) < int(last["EPOCHS"]) and int(first["SCALES"]) <= min(map(int, last["SCALES"].split()))
    aside = {rung.name for rung, _, _ in climbed if "fast" in rung.aside_in}
    assert not aside & {below for _, _, below in ensemble.climb("fast", {})}


def test_a_rung_waits_for_the_one_below_with_its_recipe():
    """Rungs of other recipes are made at the same time; what is predicted otherwise has the same runs."""
    steps = [(Rung(name, {}, ""), knobs, "") for name, knobs in (
        ("a", {"LR": "1", "FOLDS": "0"}), ("b", {"LR": "1", "TRAIN_ARGS": "--x"}), ("c", {"LR": "2"}),
        ("d", {"LR": "1", "TTA": "flip"}), ("e", {"LR": "1", "TRAIN_ARGS": "--x", "ROUNDS": "1"}),
        ("f", {"LR": "1", "FOLDS": "0 1"}))]
    assert ensemble.same_recipe_before(steps) == ["", "", "", "a", "b", "d"]


@pytest.mark.parametrize("rungs, told", [
    ([Rung("flip it", {}, "")], "a rung 'flip it': the name"), ([Rung("../x", {}, "")], "a rung '../x'"),
    ([Rung("", {}, "")], "a rung ''"), ([Rung("data", {}, "")], "a rung 'data'"), ([Rung("r1", {}, "")], "a rung 'r1'"),
    ([Rung("report", {}, "")], "a rung 'report'"), ([Rung("ladder.csv", {}, "")], "a rung 'ladder.csv'"),
    ([Rung(".x", {}, "")], "'.x'"),
    ([Rung("a", {}, ""), Rung("b", {}, ""), Rung("a", {}, "")], "two rungs have the name a,"),
    ([Rung("a", {"MODELS": 1, "LR": 1}, "")], """a: write a text, "LR": "1"; a number takes so many of MODELS,"""),
    ([Rung("a", {"MODELS": 0}, "")], "a: MODELS: 0: 2 takes the first two, -1 the last"),
    ([Rung("a", {"MODELS": -2}, "")], "a: MODELS: -2: 2 takes"),
    ([Rung("a", {}, "", ("fsat",))], "a: aside_in is a tuple of presets, of full, fast, not .'fsat'"),
    ([Rung("a", {}, "", ("fast",))], "a, the lowest rung, can't be aside"),
    ([Rung("a", {}, "", "fast")], "a: aside_in is a tuple"),
    ([Rung("a", {}, ""), Rung("b", {"FOLDS": -1}, ""), Rung("c", {"FOLDS": "0"}, "")],
     "c has FOLDS=0, b below it FOLDS=1: no photo is out of fold in both"),
    ([Rung("a", {"TRAIN_ARGS": "--loss ce --lr=1"}, "")], "a: TRAIN_ARGS: write LR= instead of --lr"),
    ([Rung(1, {}, "")], "write Rung"), ([Rung("a", {"MODELS": True}, "")], "a: MODELS: True is neither"),
    ([Rung("a", {"PAINT": "id"}, "")], "a: PAINT is no knob of a rung; there are MODELS,"),
    ([Rung("a", {"EXP": "b"}, "")], "a: EXP is no knob"), ([Rung("a", {"TTA": None}, "")], "a: TTA: None is neither"),
    ([("a", {}, "")], r".'a', {}, ''.: write Rung"), ([Rung("a", "LR=1", "")], "write Rung")])
def test_what_can_not_be_a_rung_is_told_before_the_climb(monkeypatch, rungs, told):
    monkeypatch.setattr(ensemble, "LADDER", rungs)
    with pytest.raises(UserError, match=f"^LADDER: .*{told}"):
        ensemble.climb("fast", {})


# ---- what a rung is worth -------------------------------------------------------------------------------------------


def test_gains_are_of_the_images_that_both_rungs_have():
    def pixels(right):
        return np.array([[10, 0], [10 - right, right]])
    counts = {"low": {1: pixels(2), 2: pixels(5), 3: pixels(0)}, "high": {2: pixels(10), 3: pixels(10), 4: pixels(1)}}
    row = ensemble.rung_scores("test ", counts, "high", "low", 8)
    shared = [np.stack([counts[name][i] for i in (2, 3)]) for name in ("high", "low")]
    for metric in ("v2", "v3"):
        assert row[f"test {metric} gain"] == pytest.approx(ensemble.gain(*shared, metric)["gain"])
    assert row["test images"] == 3
    assert row["test v3"] == pytest.approx(common.image_miou(np.stack([*counts["high"].values()])).mean())
    lowest = ensemble.rung_scores("", counts, "low", "", 8)
    assert all(math.isnan(lowest[f"{metric} {key}"]) for metric in ("v2", "v3") for key in ("gain", "low", "high"))


def test_the_picture_adds_up_the_gains_from_the_lowest_rung_on():
    rows = [{"rung": name, "over": over, "v3": score, "v3 gain": gain} for name, over, score, gain in (
        ("low", "", 0.2, math.nan), ("tried", "low", 0.9, -0.1), ("more", "low", 0.8, 0.0), ("top", "more", 0.7, 0.25))]
    assert ensemble.climbed_scores(rows, "v3") == pytest.approx([0.2, 0.1, 0.2, 0.45])


def test_the_climb_ends_at_the_highest_rung_that_is_not_aside(tmp_path, capsys):
    counts = {name: {1: np.array([[8, 0], [8 - right, right]])} for name, right in (("a", 2), ("b", 6), ("tried", 8))}
    rows = [{"rung": name, "over": below, "aside": "yes" if name == "tried" else "", "adds": "", "why": "",
             "seconds": math.nan, "cpu_seconds": math.nan, "verdict": ""} | ensemble.rung_scores(
                 "", counts, name, below, 8)
            for name, below in (("a", ""), ("b", "a"), ("tried", "b"))]
    ensemble.show_ladder(argparse.Namespace(exp=tmp_path), rows, {"": counts}, ["Background", "Can"])
    gained = (8 / 10 + 6 / 8) / 2 - (8 / 14 + 2 / 8) / 2
    assert f"From a to b out of fold: v2 +{gained:.3f}, v3 +{gained:.3f}." in capsys.readouterr().out  # of one image


def test_the_cost_is_of_all_times_that_make_made_something(tmp_path):
    (tmp_path / "cost.csv").write_text('seconds,user,system,knobs\n10.5,7.25,1,"LR=1 TTA=a,b"\n2,1,0.5,"LR=1 TTA=a,b"\n'
                                       '40,40,0,LR=1 TTA=none\n')
    assert ensemble.read_cost(tmp_path, {"LR": "1", "TTA": "a,b"}) == {"seconds": 12.5, "cpu_seconds": 9.75}
    assert math.isnan(ensemble.read_cost(tmp_path, {"LR": "2"})["seconds"])  # nothing is known of these knobs
    assert math.isnan(ensemble.read_cost(tmp_path / "none", {})["seconds"])


# ---- the climb ------------------------------------------------------------------------------------------------------

SHORT = '''LADDER = (
    Rung("low", {"MODELS": 1, "SCALES": 1, "EPOCHS": 1, "FOLDS": 1, "TTA": "none", "VOTE": "equal",
                 "POST": "none"}, "first"),
    Rung("tried", {"TRAIN_ARGS": "--classmix plain"}, "aside", aside_in=("full",)),
    Rung("flip", {"TTA": "flip"}, "views", aside_in=("fast",)),
    Rung("folds", {"FOLDS": 10}, "folds"),
    Rung("fitted", {"POST": "fit"}, "steps"))

'''


def short_ladder(folder, n_train):
    """Return a folder with the project, drawn data as its DATA, and SHORT as its ladder."""
    draw_data(folder / "drawn", train=n_train, test=3, size=64)
    project = new_folder(folder / "project", folder / "drawn")
    text = (project / "ensemble.py").read_text()
    edit(project, "ensemble.py", text[text.index("LADDER = (\n"):text.index("# ---- options")], SHORT)
    return project


def test_the_climb_trains_nothing_twice_and_ends_in_a_table_a_picture_and_a_page(tmp_path):
    project = short_ladder(tmp_path, 20)
    knobs = {"EXP": "lad", "HOLDOUT": "0.2", "ROUNDS": None, "FOLDS": "0 1", "NFOLDS": 2, "EPOCHS": "1 2"}
    assert [line.split("\t")[0] for line in make(project, "-n", "ladder", **knobs).stdout.splitlines() if "\t" in line
            ] == ["low", "tried", "flip", "folds", "fitted"]
    for mistake, told in (({"HOLDOUT": None, "TRUTH": "nosuch.json"}, "TRUTH=nosuch.json: no such file"),
                          ({"HOLDOUT": None, "FOLDS": "0 1 2"}, "FOLDS and FOLD go from 0 to 1"),
                          ({"HOLDOUT": None, "MODELS": "unet/nosuch unet/resnet18"}, "there is no encoder nosuch"),
                          ({"HOLDOUT": None, "BUDGET": "9m"}, "BUDGET is for one submit"),
                          ({"TRUTH": "train.py"}, "TRUTH is not of the photos that HOLDOUT holds out"),
                          ({"HOLDOUT": None, "TRAIN_ARGS": "--epoch 3"}, "LADDER: low can't be made, see above")):
        assert told in make(project, "ladder", code=2, **(knobs | mistake)).stderr
    assert "climb is a part of make ladder" in make(project, "climb", code=2, **knobs).stderr
    assert "ladder goes alone" in make(project, "ladder", "check", code=2, **knobs).stderr
    assert os.listdir(project / "out/lad") == [".climb"]
    assert "EPOCHS=1 2 can not be" in make(project, "submit", code=2, FOLDS="0 1", NFOLDS=2, EPOCHS="1 2").stderr
    with open(project / "out/lad/.climb", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for word in ("ladder", "holdout"):
            assert "out/lad: a make ladder climbs here: wait" in make(project, word, code=2, **knobs).stderr
    assert os.listdir(project / "out/lad") == [".climb"]
    done = make(project, "-j2", "ladder", **knobs)
    trained = re.findall(r"^\S*python.* train.py .*--exp (\S+) .*\n.*\n.*--fold (\d)", done.stdout, re.M)
    assert sorted(trained) == [("out/lad/folds", "1"), ("out/lad/low", "0"), ("out/lad/tried", "0")]
    at = done.stdout.index
    assert at("== tried") < at("out/lad/low/submission.csv") < at("== flip") < at("== folds")  # the first two at once
    rows = read_csv(project / "out/lad/ladder.csv")
    assert [row["rung"] for row in rows] == ["low", "tried", "flip", "folds", "fitted"]
    assert [row["over"] for row in rows] == ["", "low", "low", "flip", "folds"]
    assert [row["aside"] for row in rows] == ["", "yes", "", "", ""]
    held_out = json.loads((project / "out/lad/data/test.json").read_text())["images"]
    assert {row["test images"] for row in rows} == {str(len(held_out))}
    assert rows[3]["v3 gain"] == "0.0" and rows[3]["v3 low"] == ""  # folds show on held-out photos alone; eight images
    assert int(rows[3]["images"]) > int(rows[2]["images"])
    assert rows[0]["verdict"] == "the lowest rung" and rows[3]["verdict"].startswith("test v2 ")
    assert all(float(row["seconds"]) > 0 and float(row["cpu_seconds"]) > 0 for row in rows)
    counts = ensemble.read_oof_counts(project / "out/lad/fitted")
    assert float(rows[4]["v3"]) == pytest.approx(common.image_miou(np.stack([*counts.values()])).mean())
    assert (project / "out/lad/ladder.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>ladder</h2>" in (project / "out/lad/report.html").read_text().split("<section")[1]
    before = (project / "out/lad/ladder.csv").read_bytes()
    error = make(project, "ladder", code=2, **(knobs | {"EXP": "lad/low"})).stderr
    assert "EXP=lad/low has runs and a report of its own" in error
    assert "EXP=lad is a ladder with a report" in make(project, "submit", code=2, EXP="lad").stderr
    again = make(project, "ladder", **knobs)
    assert "train.py" not in again.stdout and (project / "out/lad/ladder.csv").read_bytes() == before


@pytest.mark.parametrize("is_group, number", [
    (False, signal.SIGTERM), pytest.param(True, signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_all_rungs_and_the_next_make_carries_on(tmp_path, end_of_all, is_group, number):
    project = short_ladder(tmp_path, 12)
    knobs = {"EXP": "lad", "ROUNDS": None, "FOLDS": "0", "NFOLDS": 2, "EPOCHS": "20", "TRAIN_ARGS": "--save-every 0"}
    climbing = subprocess.Popen(command("-j2", "ladder", **knobs), cwd=project, env=ENV, start_new_session=True,
                                close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saved = [project / f"out/lad/{name}/r0/{MODEL}/s64/f0/last.pt" for name in ("low", "tried")]
    while not all(path.exists() for path in saved) and climbing.poll() is None:
        time.sleep(0.01)
    (os.killpg if is_group else os.kill)(climbing.pid, number)
    assert climbing.wait() != 0
    end_of_all()
    costs = read_csv(project / "out/lad/low/cost.csv")
    assert len(costs) == 1 and float(costs[0]["user"]) > 0
    done = make(project, "-j2", "ladder", **knobs)
    assert done.stdout.count("resuming after") == 2 and "From low to fitted" in done.stdout


def test_a_ladder_that_is_not_climbed_yet_says_what_is_missing(tiny_data, cache, tmp_path):
    args = ensemble.parse_args(["ladder", "--data", str(tiny_data), "--cache", str(cache), "--exp", str(tmp_path)])
    lines = ensemble.rung_lines(ensemble.climb("full", {}))
    with pytest.raises(UserError, match="rungs.tsv is missing: run make ladder"):
        ensemble.main(args)
    for wrong in (lines[:-1], [line.replace("flip", "d4") for line in lines]):  # edited since
        (tmp_path / "rungs.tsv").write_text("\n".join(wrong))
        with pytest.raises(UserError, match="rungs.tsv was climbed with another LADDER or other knobs: run make"):
            ensemble.main(args)
    (tmp_path / "rungs.tsv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="baseline/submission.oof.npz: .*: run make ladder, which makes it"):
        ensemble.main(args)


# ---- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, seconds", [("40m", 2400), ("1h30m", 5400), ("90s", 90), ("2h", 7200), ("1h1m1s", 3661)])
def test_a_duration_is_hours_minutes_and_seconds(text, seconds):
    assert ensemble.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "40", "0m", "m", "1m1h", "-1m", "1.5h"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no time such as 40m"):
        ensemble.duration(text)


def test_an_epoch_trains_on_the_other_folds_and_looks_at_this_one():
    epoch, rest = ensemble.seconds_of_a_fold([(10, 50), (5, 25)], 100, 40, 5, 3, 0)
    assert epoch == pytest.approx(80 / 10 + 20 / 50 + 80 / 5 + 20 / 25)
    assert rest == pytest.approx(2 * ensemble.START_SECONDS + 60 * 3 / 50 + 60 * 3 / 25)


def test_rounds_train_on_the_test_photos_too_and_label_them():
    start, predicted = ensemble.START_SECONDS, 60 * 3 / 50
    epoch, rest = ensemble.seconds_of_a_fold([(10, 50)], 100, 40, 5, 3, 2)
    assert 3 * epoch == pytest.approx(3 * 20 / 50 + (80 + 120 + 120) / 10)
    assert 3 * rest == pytest.approx(3 * (start + predicted) + 2 * start)


def test_a_budget_counts_what_is_added_to_the_data():
    start = ensemble.START_SECONDS
    epoch, rest = ensemble.seconds_of_a_fold([(10, 50)], 100, 40, 5, 1, 0, n_extra=30, n_more=70)
    assert epoch == pytest.approx((80 + 30) / 10 + 20 / 50)  # without rounds nothing unlabelled is looked at
    assert rest == pytest.approx(start + 60 / 50)
    epoch, rest = ensemble.seconds_of_a_fold([(10, 50)], 100, 40, 5, 1, 1, n_extra=30, n_more=70)
    assert 2 * epoch == pytest.approx((110 + 110 + 40 + 70) / 10 + 2 * 20 / 50)
    assert 2 * rest == pytest.approx(2 * start + (60 + 130) / 50 + start)  # one round predicts them


@pytest.mark.parametrize("snapshots, n_times", [(0, 1), (3, 3)])
def test_a_budget_counts_the_predictions_of_all_snapshots(tiny_data, cache, tmp_path, monkeypatch, snapshots, n_times):
    shared = []
    monkeypatch.setattr(ensemble, "read_arguments", lambda *args: (
        argparse.Namespace(batch=8, snapshots=snapshots, crop="photo", repeat=1),
        argparse.Namespace(tta="none", tta_scales=[1.0], scale=None), None, None))
    monkeypatch.setattr(ensemble, "measure_speeds", lambda *args: [(10, 50)])
    monkeypatch.setattr(ensemble, "share_budget", lambda *args: shared.append(args) or (5, ["0"]))
    line = ["budget", "--data", tiny_data, "--cache", cache, "--exp", tmp_path, "--nfolds", 2, "--budget", "9m",
            "--models", "unet/resnet18", "--scales", 64, "--folds", 0, "--pick-models", "", "--pick-scales", "",
            "--pick-folds", ""]
    ensemble.main(ensemble.parse_args([*map(str, line)]))
    train_split, test = common.load_data(tiny_data, cache)
    n_predicted = len(train_split.ids) / 2 + len(test.ids)
    assert shared[0][3] == pytest.approx(ensemble.START_SECONDS + n_predicted * n_times / 50)
    asked = common.read_json(tmp_path / "budget.json")["asked"]
    assert (asked["snapshots"], asked["test"]) == (snapshots, test.fingerprint)


@pytest.mark.parametrize("seconds, jobs, rounds, keep, expected", [
    (10_000, 1, 0, False, (34, 5)), (100_000, 1, 0, False, (40, 5)), (3000, 1, 0, False, (16, 3)),
    (3000, 2, 0, False, (16, 5)), (1000, 1, 0, False, (16, 1)), (1000, 2, 0, False, (16, 2)),
    (300, 1, 0, False, (3, 1)), (3000, 1, 0, True, (9, 5)), (3000, 1, 1, False, (11, 2)), (1862, 1, 0, False, (15, 2))])
def test_a_budget_buys_folds_with_enough_epochs_each(seconds, jobs, rounds, keep, expected):
    """An epoch of a fold takes 50 s, a fold besides 80 s; 90% of the time is planned, and 15 s are the vote's."""
    args = argparse.Namespace(budget=seconds, rounds=rounds, keep_folds=keep, folds=list("01234"), models=["m"],
                              scales=["64"])
    epochs, folds = ensemble.share_budget(args, jobs, 50, 80)
    assert (epochs, len(folds)) == expected
    lots = math.ceil(len(folds) / jobs)  # of five folds two at a time are three lots
    if epochs < ensemble.MOST_EPOCHS:
        assert (1 + rounds) * lots * (80 + 50 * epochs) <= 0.9 * seconds - 15
        assert (1 + rounds) * lots * (80 + 50 * (epochs + 1)) > 0.9 * seconds - 15


def test_the_members_of_a_fold_share_the_lanes_of_a_budget():
    args = argparse.Namespace(budget=1000, rounds=0, keep_folds=False, folds=["0"], models=["a", "b"], scales=["64"])
    assert ensemble.share_budget(args, 2, 50, 80) == (33, ["0"])  # 50 s and 80 s are those of both: a run takes half


@pytest.mark.parametrize("device, gpus, n_lanes", [("auto", 1, 4), ("auto", 2, 2), ("auto", 8, 1), ("cpu", 1, 1),
                                                   ("cuda:1", 1, 1)])
def test_a_budget_counts_on_a_run_on_each_gpu(monkeypatch, device, gpus, n_lanes):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert ensemble.count_lanes(argparse.Namespace(device=device, gpus=gpus)) == n_lanes


@pytest.mark.parametrize("seconds", [100, 110])
def test_a_budget_without_room_for_an_epoch_is_refused(seconds):
    args = argparse.Namespace(budget=seconds, rounds=0, keep_folds=False, folds=["0"], models=["m"], scales=["64"])
    with pytest.raises(UserError, match=f"{seconds} s have no room for one epoch, of 50 s for each fold, and 80 s to"):
        ensemble.share_budget(args, 1, 50, 80)


@pytest.mark.parametrize("knobs", [{"TRAIN_ARGS": "--crop native"}, {"TRAIN_ARGS": "--repeat 2"},
                                   {"INFER_ARGS": "--scale 96"}])
def test_a_budget_that_would_count_wrongly_is_refused_in_one_line(tmp_path, tiny_data, knobs):
    project = new_folder(tmp_path / "project", tiny_data)
    done = make(project, "-n", "submit", code=2, BUDGET="10m", EPOCHS=None, **knobs)
    assert "BUDGET takes each photo for one image of its SCALE" in done.stderr
    assert "give EPOCHS" in done.stderr and not (project / "out").exists()


@pytest.mark.slow
def test_a_budget_chooses_once_and_is_remembered(tmp_path):
    draw_data(tmp_path / "drawn", train=12, test=3, size=64)
    project = new_folder(tmp_path / "project", tmp_path / "drawn")
    edit(project, "ensemble.py", "ENOUGH_EPOCHS, MOST_EPOCHS = 15, 40", "ENOUGH_EPOCHS, MOST_EPOCHS = 2, 2")
    knobs = {"BUDGET": "10m", "EPOCHS": None, "FOLDS": None, "NFOLDS": 2, "ROUNDS": 0}
    for words in (["-n", "submit"], ["why"]):
        assert "nobody knows the EPOCHS" in make(project, *words, code=2, **knobs).stderr
    assert not (project / "out/main/budget.csv").exists()
    make(project, "submit", **knobs)
    answer = json.loads((project / "out/main/budget.json").read_text())
    assert (answer["epochs"], answer["folds"]) == (2, ["0", "1"])
    log, = (project / "out/main").glob("r0/*/*/s64/f1/log.csv")
    assert len(read_csv(log)) == 2
    assert make(project, "submit", **knobs).stdout.startswith("make: Nothing to be done")
    assert "BUDGET chooses EPOCHS" in make(project, "submit", code=2, **(knobs | {"EPOCHS": 3})).stderr
