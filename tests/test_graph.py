"""The Makefile as a build graph with the real scripts: what is made after which change, and nothing else.

An experiment is built once; each test changes a copy of it and mostly asks `make -n` what would be made.
"""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch

import numpy as np
import pytest
from conftest import ROOT, read_csv
from demo_data import draw_data
from PIL import Image

import common

MAKEFILE = (ROOT / "Makefile").read_text()
KNOBS = re.findall(r"^([A-Z_]+) +\?=", MAKEFILE, re.M)
FILES = ("Makefile", "common.py", "train.py", "infer.py", "pseudo_label.py", "ensemble.py", "report.html.jinja",
         "requirements.txt")
PY = sys.executable
MODEL = "fpn-narrow/tu-test_efficientnet"
GRID = {"MODELS": MODEL, "SCALES": 64, "FOLDS": "0 1", "NFOLDS": 2, "ROUNDS": 1, "EPOCHS": 2, "BATCH": 4, "LR": "3e-3",
        "WEIGHTS": "none", "PSEUDO_ARGS": "--confident 0.3 --max-unsure 1", "PY": PY}
ENV = {"PATH": os.environ["PATH"], "LC_ALL": "C", "OMP_NUM_THREADS": "1"}  # no knobs of a make that runs the tests
RECORDER = f"""#!/bin/bash
# a Python that asks the plan for real and only notes all else; what FAIL is part of fails
case " $* " in *" ensemble.py plan "*--ready*) exit;; *" ensemble.py plan "*) exec {PY} "$@";; esac
echo "${{OMP_NUM_THREADS-none}} $*" >>trace
[[ -z ${{FAIL-}} || "$*" != *$FAIL* ]]
"""
A0, B1 = f"r0/{MODEL}/s64/f0", f"r1/{MODEL}/s64/f1"  # a run without and one with pseudo labels
AFTER_A0 = ["pseudo r1/f0", "train r1/*/f0", "infer r1/*/f0", "submit"]
FROM_LABELS, FROM_INFER, FROM_TRAIN, EVERYTHING = (
    ["pseudo *", "* r1/*", "submit"], ["infer *", "pseudo *", "train r1/*", "submit"],
    ["train *", "infer *", "pseudo *", "submit"], ["*"])


def new_folder(folder, data):
    """The project as a user has it, without outputs, on a copy of the data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(data, folder / "data")
    (folder / "recorder").write_text(RECORDER)
    (folder / "recorder").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "drawn"
    draw_data(folder, train=12, test=4, size=64)
    return folder


@pytest.fixture
def fresh(tmp_path, data):
    return new_folder(tmp_path / "fresh", data)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, data):
    """A new folder in which tests make nothing."""
    return new_folder(tmp_path_factory.mktemp("untouched") / "fresh", data)


@pytest.fixture(scope="module")
def template(tmp_path_factory, data):
    folder = new_folder(tmp_path_factory.mktemp("template") / "built", data)
    make(folder, "-j2", "submit")
    return folder


@pytest.fixture
def built(template, tmp_path):
    """A folder in which `make submit` has run."""
    return shutil.copytree(template, tmp_path / "built", symlinks=True)


def command(*words, **knobs):
    given = {k: v for k, v in (GRID | knobs).items() if v is not None}
    return ["make", "--warn-undefined-variables", *words, *(f"{k}={v}" for k, v in given.items())]


def make(folder, *words, code=0, env=(), **knobs):
    done = subprocess.run(command(*words, **knobs), cwd=folder, env=ENV | dict(env), text=True, capture_output=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "undefined variable" not in done.stderr and "Traceback" not in done.stderr
    return done


def said(done):
    """The lines of an error without those of make itself."""
    return [line for line in done.stderr.splitlines() if not re.search(r"\*\*\* (nothing was started|\[)", line)]


def step(argv):
    """A short name for one call of a script: "train r0/fpn-narrow/tu-test_efficientnet/s64/f0"."""
    script, flags = argv[0].removesuffix(".py"), dict(zip(argv, argv[1:], strict=False))
    if script == "train":
        run = "train r{--round}/{--model}/s{--scale}/f{--fold}"
        return "check" if "--check" in argv else run.format_map(flags)
    if script == "infer":
        return re.sub(r"^out/[^r].*?/(r\d/.*)/[^/]+\.pt$", r"infer \1", flags["--checkpoint"])
    if script == "pseudo_label":
        return "pseudo r{--round}/f{--fold}".format_map(flags)
    return "submit" if "--out" in argv else "score"


def calls(folder, *goals, **knobs):
    """Command lines of the scripts as `make -n` prints them, without the interpreter and without plan."""
    text, python = make(folder, "-n", *goals, **knobs).stdout.replace("\\\n", " "), (GRID | knobs)["PY"]
    lines = [line.partition(python)[2].partition(" || ")[0] for line in text.splitlines() if python in line]
    lines = [shlex.split(line) for line in lines]
    return [argv for argv in lines if argv[:2] != ["ensemble.py", "plan"]]


def plan(folder, *goals, **knobs):
    return sorted(map(step, calls(folder, *goals, **knobs)))


def trace(folder):
    """[threads, script, argument, ...] of every call of the recorder so far."""
    return [line.split() for line in (folder / "trace").read_text().splitlines()] if (folder / "trace").exists() else []


def steps(*patterns, models=(MODEL,), scales=(64,), folds=(0, 1), rounds=(0, 1)):
    """Those of all steps up to a submission whose names match one of the patterns; every pattern matches something."""
    runs = [f"r{r}/{m}/s{s}/f{f}" for r in rounds for m in models for s in scales for f in folds]
    every = ["check", *(f"{script} {run}" for run in runs for script in ("train", "infer")),
             *(f"pseudo r{r}/f{f}" for r in rounds if r for f in folds), "submit"]
    assert all(any(fnmatch(name, pattern) for name in every) for pattern in patterns)
    return sorted(name for name in every if any(fnmatch(name, pattern) for pattern in patterns))


def up_to_date(folder, **knobs):
    """Whether make -n and make why both say so."""
    planned, told = plan(folder, "submit", **knobs), make(folder, "why", **knobs).stdout
    assert (planned == []) == told.endswith(" is up to date\n")
    return planned == []


def why(folder, **knobs):
    return make(folder, "why", **knobs).stdout


def contents(folder):
    """{path: bytes} of models, stores, labels and the submission."""
    kinds = ("*.pt", "*.npy", "index.csv", "submission.csv", "folds.csv")
    return {str(p.relative_to(folder)): p.read_bytes() for kind in kinds for p in (folder / "out/main").rglob(kind)
            if "replaced" not in p.parts}


def edit(folder, name, old, new):
    path = folder / name
    text = path.read_text()
    assert text.count(old) == 1, (name, old)
    path.write_text(text.replace(old, new))


# ---- help, the plan, mistakes at the command line -------------------------------------------------------------------


def test_help_is_the_default_and_lists_every_command_and_knob_with_its_value(fresh):
    knobs = {"LR": "7e-7", "TRAIN_ARGS": "--augment none"}
    out = make(fresh, "help", **knobs).stdout
    commands = re.search(r"^\.PHONY: (help .*)$", MAKEFILE.replace("\\\n", ""), re.M)[1].split()
    assert out == make(fresh, **knobs).stdout
    assert len(commands) > 8 and all(re.search(rf"^  {c} +\w", out, re.M) for c in commands)
    assert len(KNOBS) > 20 and all(re.search(rf"\b{k}\b", out) for k in KNOBS)
    for line in (" LR +7e-7 +peak", f" MODELS +{MODEL} +DEC", " TRAIN_ARGS +--augment none +more"):
        assert re.search(f"^ {line}", out, re.M)


@pytest.mark.parametrize("rounds, runs, labels", [(0, 4, 0), (1, 8, 2), (2, 12, 4)])
def test_dry_run_plans_the_whole_grid_without_a_warning_and_writes_nothing(fresh, rounds, runs, labels):
    before = sorted(fresh.rglob("*"))
    scripts = [argv[0] for argv in calls(fresh, "submit", SCALES="64 96", ROUNDS=rounds)]
    assert [scripts.count(f"{script}.py") for script in ("train", "infer", "pseudo_label", "ensemble")] == [
        1 + runs, runs, labels, 1]
    assert make(fresh, "-n", "submit", SCALES="64 96", ROUNDS=rounds).stderr == ""
    assert [p for p in sorted(fresh.rglob("*")) if "__pycache__" not in p.parts] == before


SHELLS = ("$$(touch pwned)", "`touch pwned`", "; touch pwned", "x & touch pwned", "'; touch pwned #")


@pytest.mark.parametrize("knobs, message", [
    *(({typo: 1}, f"unknown knob: {typo};") for typo in ("FLOD", "lr", "OMP_NUM_THREADS", "STRICT")),
    *(({knob: ""}, f" {knob} is empty") for knob in KNOBS
      if knob not in ("ROUND", "EXTRA", "UNLABELLED", "CODE", "LAUNCH", "EXPS", "TRUTH", "HOLDOUT", "PHOTOS",
                      "BUDGET") and "_ARGS" not in knob),
    *(({knob: value}, f"{knob}={value}") for knob, value in (
        ("PER_GPU", 0), ("PER_GPU", 10),
        ("GPUS", 0), ("GPUS", "x"), ("GPUS", "2 2"), ("GPUS", "1.5"), ("GPUS", "'"), ("TRIALS", -1), ("TRIALS", 0),
        ("SNAPSHOTS", -1), ("SNAPSHOTS", "two"), ("SNAPSHOTS", "01"), ("ROUNDS", 10), ("ROUND", "x"), ("ROUND", 12),
        ("NFOLDS", 11), ("NFOLDS", 1), ("CODE", "old"), ("EPOCHS", "x"), ("EXP", "my exp"), ("EXP", "*"), ("EXP", "/"),
        ("EXP", ".."), ("EXP", "a/../b"), ("EXP", "."), ("EXP", "a//b"), ("EXP", ".x"), ("EXP", "cache"))),
    ({"FOLD": 1}, "submit takes FOLDS, not FOLD"), ({"SCALE": 96}, "submit takes SCALES"),
    ({"FOLDS": "0 1 0"}, "FOLDS has 0 twice"), ({"MODELS": f"{MODEL} {MODEL}"}, "twice"),
    ({"SCALES": "64 64"}, "twice"), ({"FOLDS": "00"}, "not 00"), ({"FOLDS": "0 5"}, "not 5"),
    ({"SCALES": "064"}, "SCALES: 064"), ({"SCALES": "+64"}, "SCALES: +64"),
    ({"SCALES": 16}, "--scale"), ({"MODELS": "fpn/a/b"}, "fpn/a/b is not DEC"), ({"MODELS": "fpn/.."}, "is not DEC"),
    ({"MODELS": f"{MODEL} unet/resnet99"}, "no encoder resnet99"), ({"SUBMIT_ARGS": "-h"}, "SUBMIT_ARGS: for its help"),
    ({"PAINT": "area\ntouch pwned"}, "PAINT has more than one line"), ({"MODELS": "fnp/x"}, "'fnp/x' is not DECODER/"),
    ({"LR": "fast"}, "--lr"), ({"BATCH": 1}, "--batch"),
    ({"BATCH": 4, "GPUS": 4}, "needs 2 images"), ({"WEIGHTS": "nosuch.pth"}, "--weights nosuch.pth"),
    ({"TTA": "flipp"}, "--tta"), ({"VOTE": "1,2"}, "VOTE has 2 weights for 1 member"), ({"VOTE": "best"}, "--weights"),
    ({"IMAGE_ID": "name"}, "--image-id"), ({"TRAIN_ARGS": "--los ce"}, "--los"), ({"INFER_ARGS": "--bach 3"}, "--bach"),
    ({"PSEUDO_ARGS": "--rule best"}, "--rule"), ({"SUBMIT_ARGS": "--cocoo"}, "--cocoo"),
    ({"TRAIN_ARGS": "--epochs 3"}, "TRAIN_ARGS: write EPOCHS= instead of --epochs"),
    ({"TRAIN_ARGS": "--loss ce --lr=1e-3"}, "write LR="), ({"TRAIN_ARGS": "--snapshots 2"}, "write SNAPSHOTS="),
    ({"BUDGET": "2h", "EPOCHS": None, "TRAIN_ARGS": "--epochs 3"}, "TRAIN_ARGS: write EPOCHS= instead of --epochs"),
    ({"INFER_ARGS": "--tta none"}, "INFER_ARGS: write TTA="), ({"SUBMIT_ARGS": "--post none"}, "write POST="),
    ({"TRAIN_ARGS": "--fold 1"}, "TRAIN_ARGS sets --fold"), ({"TRAIN_ARGS": "--overfit 2"}, "--overfit"),
    ({"INFER_ARGS": "--out x"}, "INFER_ARGS sets --out"), ({"SUBMIT_ARGS": "--out x.csv"}, "SUBMIT_ARGS sets --out"),
    ({"MODELS": f"{MODEL} pan/tu-test_efficientnet", "SCALES": 64},
     "pan/tu-test_efficientnet can't work at scale 64: "),
    ({"MODELS": "pan/tu-test_efficientnet", "SCALES": 128, "INFER_ARGS": "--tta-scales 1 0.5"},
     "pan/tu-test_efficientnet can't work at scale 64 (INFER_ARGS: --tta-scales times 128): "),
    ({"TRAIN_ARGS": "--layer-decay 0.8", "MODELS": f"{MODEL} fpn/resnet18"}, "timm knows no layers of the encoder of"),
    ({"TRAIN_ARGS": "--drop-path 0.1", "MODELS": f"{MODEL} fpn/resnet18"}, "--drop-path 0.1: the encoder resnet18 is "),
    ({"TRAIN_ARGS": "--grad-checkpoint"}, f"--grad-checkpoint: the encoder of {MODEL} has batch norm"),
    ({"SNAPSHOTS": 3}, "--snapshots 3"), ({"DATA": "nosuch"}, "nosuch: no such folder"), ({"PAINT": "last"}, "--paint"),
    *(({knob: text}, knob) for knob in ("LR", "TRAIN_ARGS", "LAUNCH", "EXP", "PY", "MODELS") for text in SHELLS)])
def test_mistaken_knob_is_an_error_of_one_line_that_names_it_and_nothing_is_written(untouched, knobs, message):
    done = make(untouched, "submit", code=2, **knobs)
    assert message in done.stderr and len(said(done)) == 1
    assert not (untouched / "out").exists() and not (untouched / "pwned").exists()


@pytest.mark.parametrize("knobs, message", [
    ({}, "PHOTOS is empty: predict takes a folder"), ({"PHOTO": "data"}, "unknown knob: PHOTO;"),
    ({"PHOTOS": "no such's"}, "no such's: no such folder; --photos is"),
    ({"PHOTOS": "$(shell touch pwned)"}, "PHOTOS has a $"),
    ({"PHOTOS": "'; touch pwned #"}, "'; touch pwned #: no such folder"),
    ({"PHOTOS": "data"}, "out/main/submission.vote.json: no such file; ensemble.py soft, or make submit, writes it")])
def test_predict_without_photos_or_a_submission_is_one_line_and_writes_nothing(untouched, knobs, message):
    done = make(untouched, "predict", code=2, **knobs)
    assert message in done.stderr and len(said(done)) == 1
    assert not (untouched / "out").exists() and not (untouched / "pwned").exists()


def test_a_dry_run_of_predict_prints_its_command_and_writes_nothing(fresh):
    before = sorted(fresh.rglob("*"))
    line, = calls(fresh, "predict", PHOTOS="it's a folder", EXP="lad/a", DEVICE="cpu")
    assert line == ["infer.py", "--photos", "it's a folder", "--vote", "out/lad/a/submission.vote.json", "--out",
                    "out/lad/a/predicted", "--cache", "out/cache", "--device", "cpu", "--per-gpu", "1", "--replace"]
    assert [p for p in sorted(fresh.rglob("*")) if "__pycache__" not in p.parts] == before


@pytest.mark.parametrize("name", ["train.json", "test.json"])
def test_missing_data_is_told_in_one_line_before_anything_runs(fresh, name):
    (fresh / "data" / name).unlink()
    done = make(fresh, "submit", code=2)
    assert len(said(done)) == 1 and f"no data/{name}" in done.stderr and not (fresh / "out").exists()


@pytest.mark.parametrize("command", ["train", "submit", "why"])
def test_file_names_that_can_not_name_the_rows_are_told_before_anything_runs(fresh, command):
    test = json.loads((fresh / "data/test.json").read_text())
    name = test["images"][2]["file_name"] = test["images"][0]["file_name"]
    (fresh / "data/test.json").write_text(json.dumps(test))
    done = make(fresh, command, code=2, IMAGE_ID="file_name")
    assert len(said(done)) == 1 and f"several images have the file_name {name}" in done.stderr
    assert "IMAGE_ID=id" in done.stderr and not (fresh / "out").exists()
    assert make(fresh, "-n", command).stderr == ""


def test_ids_written_as_floats_are_those_of_the_folds(fresh):
    coco = json.loads((fresh / "data/train.json").read_text())
    for image in coco["images"]:
        image["id"] = float(image["id"])
    (fresh / "data/train.json").write_text(json.dumps(coco))
    make(fresh, "check")
    shutil.rmtree(fresh / "out/cache")  # else the plan takes the ids from there
    assert "folds.csv: the data has changed or hasn't been checked yet" in make(fresh, "why").stdout


@pytest.mark.parametrize("name", ["my data", "a(b)&'c'", "x#y", "with=equals", "50%;touch pwned"])
def test_data_may_be_in_any_folder(fresh, name):
    (fresh / "data").rename(fresh / name)
    make(fresh, "check", DATA=name)
    assert (fresh / "out/main/folds.csv").exists() and not (fresh / "pwned").exists()
    assert plan(fresh, "train", DATA=name) == steps("train r0/*")


@pytest.mark.parametrize("exp", ["lr=5e-4", "a.b_c+d-e/f", "r0"])
def test_an_experiment_may_be_named_like_a_setting(fresh, exp):
    make(fresh, "train", EXP=exp, FOLD=0)
    assert (fresh / "out" / exp / A0 / "model.pt").exists()
    assert plan(fresh, "train", EXP=exp, FOLD=0) == []
    make(fresh, "clean", EXP=exp)
    assert not (fresh / "out" / exp).exists() and (fresh / "out/cache").exists()


def test_every_knob_reaches_the_script_that_reads_it(fresh):
    shutil.copytree(fresh / "data", fresh / "new")
    (fresh / "w.pth").touch()
    knobs = {"DATA": "new", "EXP": "e", "MODELS": "unet/b", "SCALES": 96, "FOLDS": 3, "NFOLDS": 4, "PAINT": "order",
             "ORIENTATION": "stored", "EPOCHS": 17, "BATCH": 9, "LR": "2e-5", "SEED": 11, "WEIGHTS": "w.pth",
             "TTA": "none", "DEVICE": "cpu", "IMAGE_ID": "file_name", "INFER_ARGS": "--batch 13",
             "TRAIN_ARGS": "--augment none --ema 0.5",
             "PER_GPU": 7, "PSEUDO_ARGS": "--confident 0.75", "SNAPSHOTS": 6, "VOTE": "3", "CODE": "keep",
             "LAUNCH": "env A=b"}
    values = {}
    for script, *argv in calls(fresh, "submit", "check", **knobs):
        values.setdefault(script, set()).update(argv)
    wanted = {"train.py": "new out/e unet/b 96 3 4 order stored 17 9 2e-5 11 w.pth cpu 7 none 0.5 out/cache 0 1 6 keep",
              "infer.py": "new none 13 cpu 7 out/cache keep", "pseudo_label.py": "new out/e 3 0.75 out/cache 1 keep",
              "ensemble.py": "new file_name 9 out/e/submission.csv out/cache soft 3 keep"}
    assert set(values) == set(wanted)
    for script, text in wanted.items():
        assert set(text.split()) <= values[script], script


@pytest.mark.parametrize("goal, knobs, patterns, grid", [
    ("train", {}, ["train r0/*"], {}), ("train", {"FOLD": 1}, ["train r0/*"], {"folds": [1]}),
    ("train", {"MODEL": "unet/b", "SCALE": "96 64"}, ["train r0/*"], {"models": ["unet/b"], "scales": [64, 96]}),
    ("train", {"ROUND": 1, "FOLD": 0}, ["train *", "pseudo *", "infer r0/*"], {"folds": [0]}),
    ("pseudo", {}, ["train r0/*", "infer r0/*", "pseudo *"], {}),
    ("pseudo", {"ROUND": 2, "FOLD": 1}, ["train r[01]/*", "infer r[01]/*", "pseudo *"],
     {"rounds": [0, 1, 2], "folds": [1]}),
    ("score", {"ROUND": 0, "FOLD": 1}, ["train r0/*", "infer r0/*"], {"folds": [1]}),
    ("score", {"ROUNDS": 0}, ["train r0/*", "infer r0/*"], {})])
def test_a_goal_plans_its_part_of_the_grid_and_what_that_needs(untouched, goal, knobs, patterns, grid):
    assert plan(untouched, goal, **knobs) == sorted(steps("check", *patterns, **grid) + ["score"] * (goal == "score"))


# ---- what is remade, and nothing else -------------------------------------------------------------------------------


def test_second_submit_has_nothing_to_do_and_neither_has_it_after_a_check(built):
    assert up_to_date(built) and make(built, "-q", "submit").stdout == ""
    make(built, "check")
    assert up_to_date(built) and make(built, "submit").stdout.startswith("make: Nothing to be done")


@pytest.mark.parametrize("name, if_deleted", [
    ("folds.csv", ["check"]),
    (f"{A0}/model.pt", [f"train {A0}", f"infer {A0}", *AFTER_A0]),
    (f"{A0}/test.npy", []), (f"{A0}/test.json", []), (f"{A0}/valid.npy", []),  # its labels are there
    (f"{B1}/model.pt", [f"train {B1}", f"infer {B1}", "submit"]),
    (f"{B1}/config.json", [f"train {B1}", f"infer {B1}", "submit"]),
    *((f"{B1}/{store}", [f"infer {B1}", "submit"]) for store in ("test.npy", "test.json", "valid.npy", "valid.json")),
    ("r1/pseudo/f0/labels.npy", [f"infer {A0}", *AFTER_A0][1:]), ("r1/pseudo/f0/manifest.json", AFTER_A0),
    ("r1/pseudo/f0/index.csv", AFTER_A0), ("submission.csv", ["submit"]), ("submission.made.json", ["submit"])])
def test_a_deleted_file_remakes_what_depends_on_it_and_a_touched_one_nothing(built, name, if_deleted):
    os.utime(built / "out/main" / name)
    assert up_to_date(built)
    (built / "out/main" / name).unlink()
    assert plan(built, "submit") == (steps(*if_deleted) if if_deleted else [])
    assert if_deleted == [] or f"out/main/{name.rpartition('/')[0]}" in why(built)


def test_deleted_files_are_made_again_as_they_were(built, template):
    for name in (f"{A0}/model.pt", f"{B1}/valid.npy", "submission.csv", "folds.csv"):
        (built / "out/main" / name).unlink()
    make(built, "-j2", "submit")
    assert contents(built) == contents(template) and up_to_date(built)


def test_deleted_stores_of_an_old_round_are_made_again_only_when_its_labels_are(built):
    for path in (built / "out/main/r0").rglob("test.*"):
        path.unlink()
    assert up_to_date(built) and plan(built, "pseudo") == []
    assert plan(built, "score", ROUND=0) == ["score"]
    (built / "out/main/r1/pseudo/f1/labels.npy").unlink()
    assert plan(built, "submit") == steps("infer r0/*/f1", "pseudo r1/f1", "train r1/*/f1", "infer r1/*/f1", "submit")


@pytest.mark.parametrize("knobs, if_changed, grid", [
    *(({knob: value}, FROM_TRAIN, {}) for knob, value in (
        ("EPOCHS", 3), ("BATCH", 5), ("LR", "4e-3"), ("SEED", 1), ("TRAIN_ARGS", "--augment none"), ("SNAPSHOTS", 1))),
    ({"PAINT": "id"}, EVERYTHING, {}), ({"ORIENTATION": "stored"}, EVERYTHING, {}),
    ({"UNUSED": "drop"}, EVERYTHING, {}), ({"DATA": "./data"}, [], {}),
    ({"LR": "0.003"}, [], {}),
    ({"TTA": "none"}, FROM_INFER, {}), ({"INFER_ARGS": "--batch 4"}, [], {}),
    ({"PSEUDO_ARGS": "--confident 0.9"}, FROM_LABELS, {}),
    *((knob, ["submit"], {}) for knob in ({"FOLDS": 0}, {"ROUNDS": 0}, {"IMAGE_ID": "file_name"}, {"VOTE": "equal"})),
    ({"NFOLDS": 3, "FOLDS": "0 1 2"}, EVERYTHING, {"folds": [0, 1, 2]}),
    ({"MODELS": f"{MODEL} unet/b"}, ["* r0/unet/*", *FROM_LABELS], {"models": [MODEL, "unet/b"]}),
    ({"SCALES": "64 96"}, ["* r0/*/s96/*", *FROM_LABELS], {"scales": [64, 96]}),
    ({"ROUNDS": 2}, ["* r2/*", "submit"], {"rounds": [0, 1, 2]}), ({"EXP": "other"}, EVERYTHING, {}),
    *(({knob: value}, [], {}) for knob, value in (("DEVICE", "cpu"), ("GPUS", 2), ("LAUNCH", "env"), ("TRIALS", 3),
                                                   ("CODE", "new"), ("CODE", "keep"), ("PY", f"{PY} -B")))],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_changed_knob_rebuilds_exactly_what_reads_it(template, knobs, if_changed, grid):
    assert plan(template, "submit", **knobs) == (steps(*if_changed, **grid) if if_changed else [])


def test_a_knob_changed_for_real_moves_what_was_there_aside_and_changed_back_gives_the_same_again(built, template):
    run, before = built / "out/main" / A0, contents(template)
    out = make(built, "train", FOLD=0, LR="4e-3").stdout
    assert "lr 0.003 -> 0.004" in out and f"out/main/{A0}/replaced: config.json, log.csv, model.pt" in out
    assert (run / "replaced/model.pt").read_bytes() == before[f"out/main/{A0}/model.pt"]
    assert f"infer {A0}" in plan(built, "submit", LR="4e-3")
    assert "lr 0.004 -> 0.003" in why(built)
    make(built, "train", FOLD=0)
    assert contents(built) == before and up_to_date(built)


# ---- what lies in the eyes of a clock -------------------------------------------------------------------------------


def other_truth(folder):
    """train.json with the class of one object changed, of the same size as before."""
    path = folder / "data/train.json"
    coco = json.loads(path.read_text())
    first = coco["annotations"][0]
    first["category_id"] = next(c["id"] for c in coco["categories"] if c["id"] not in (first["category_id"], 10))
    return path, json.dumps(coco)


def test_an_older_json_copied_in_with_its_time_remakes_everything(built):
    path, text = other_truth(built)
    path.write_text(text)
    os.utime(path, (1, 1))
    assert plan(built, "submit") == steps("*")
    assert re.search(rf"{A0}/model.pt: data \w+", why(built))


def replace_photo(path, keep=()):
    """Another photo at `path`, of the same format; in `keep` the times it had."""
    pixels = np.array(Image.open(path))
    Image.fromarray(pixels[:, ::-1].copy()).save(path, quality=92)
    if keep:
        os.utime(path, ns=keep)


@pytest.mark.parametrize("split, patterns", [
    ("train", EVERYTHING), ("test", ["check", "infer *", "pseudo *", "train r1/*", "submit"])])
def test_a_photo_of_the_same_size_and_time_remakes_what_saw_it(built, split, patterns):
    name = json.loads((built / f"data/{split}.json").read_text())["images"][0]["file_name"]
    path = built / "data" / name
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert plan(built, "submit") == steps(*patterns)


def test_a_link_that_is_switched_is_another_photo(fresh, template):
    shutil.copytree(template / "out", fresh / "out")
    path = fresh / "data" / json.loads((fresh / "data/train.json").read_text())["images"][0]["file_name"]
    first, second = path.with_name("first.jpg"), path.with_name("second.jpg")
    path.rename(first)
    shutil.copy(first, second)
    replace_photo(second)
    path.symlink_to(first)
    assert up_to_date(fresh)
    path.unlink()
    path.symlink_to(second)
    assert plan(fresh, "submit") == steps("*")


def test_a_weights_file_replaced_by_an_older_one_trains_anew(fresh):
    import timm
    import torch
    weights = fresh / "w.pth"
    for seed, age in ((0, 100), (1, 1)):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
        os.utime(weights, (age, age))
        assert plan(fresh, "train", FOLD=0, WEIGHTS="w.pth", ROUNDS=0)[-1:] == [f"train {A0}"]
        if not seed:
            make(fresh, "train", FOLD=0, WEIGHTS="w.pth", ROUNDS=0)
            weights = weights.rename(fresh / "renamed.pth")
            assert plan(fresh, "train", FOLD=0, WEIGHTS="renamed.pth", ROUNDS=0) == []
            weights = weights.rename(fresh / "w.pth")


def test_a_folder_of_weights_is_looked_at_for_each_model_before_anything_trains(fresh):
    import timm
    import torch
    folder, models = fresh / "w", f"{MODEL} unet/tu-test_resnet"
    folder.mkdir()
    torch.save(timm.create_model("test_efficientnet").state_dict(), folder / "test_efficientnet.pth")
    wanted = {"FOLD": 0, "ROUNDS": 0, "WEIGHTS": "w", "MODELS": models}
    text = ("--weights w: 0 files are named after the encoder test_resnet, and one must be, test_resnet.pth or "
            "test_resnet_MORE.pth (or .pt, .bin, .ckpt, .safetensors): there is test_efficientnet.pth")
    for order in (models, " ".join(reversed(models.split()))):  # train.py itself is asked about the last one
        for more in ("-n", "-j2"):
            done = make(fresh, more, "train", code=2, **wanted | {"MODELS": order})
            assert text in done.stderr and len(said(done)) == 1
    torch.save(timm.create_model("test_vit").state_dict(), folder / "test_resnet-1.pt")  # of another architecture
    done = make(fresh, "train", code=2, **wanted)
    assert "test_resnet-1.pt doesn't fit the encoder of unet/tu-test_resnet, of which it must have 90%" in done.stderr
    assert len(said(done)) == 1 and not (fresh / "out").exists()


@pytest.mark.parametrize("how", ["copied", "moved", "restored", "elsewhere"])
def test_nothing_is_made_again_of_an_experiment_that_was_copied_or_moved(built, template, tmp_path, how):
    if how == "copied":
        shutil.rmtree(built / "out")
        subprocess.run(["cp", "-r", template / "out", built], check=True)  # with other times
    elif how == "moved":
        (built / "out").rename(tmp_path / "out")
        (built / "out").symlink_to(tmp_path / "out")
    elif how == "restored":
        subprocess.run(["chmod", "-R", "a-w", built / "out"], check=True)
        subprocess.run(["cp", "-r", built / "out", tmp_path / "out"], check=True)
        subprocess.run(["chmod", "-R", "u+w", built / "out"], check=True)
        shutil.rmtree(built / "out")
        (tmp_path / "out").rename(built / "out")
    else:
        built = built.rename(tmp_path / "somewhere")
    assert up_to_date(built) and plan(built, "score") == ["score"]
    (built / "out/main/submission.csv").unlink()
    make(built, "submit")
    assert contents(built) == contents(template)


def test_the_cache_may_be_deleted(built):
    shutil.rmtree(built / "out/cache")
    assert up_to_date(built)


# ---- edited scripts -------------------------------------------------------------------------------------------------

EDITS = [  # (file, old, new, name that is said, what CODE=new makes)
    ("common.py", "((1 - value) * present)", "((1.01 - value) * present)", "region_loss", FROM_TRAIN),
    ("train.py", "0.5 + 0.5 * math.cos(math.pi * t),", "0.55 + 0.45 * math.cos(math.pi * t),", "SCHEDULES[cosine]",
     FROM_TRAIN),
    ("common.py", "scale=(0.25, 1)", "scale=(0.5, 1)", "crop_and_turn", FROM_TRAIN),
    ("common.py", "np.divide(hits, union, out", "1 * np.divide(hits, union, out", "class_iou", FROM_TRAIN),
    ("common.py", "key=lambda shape: -shape[1]", "key=lambda shape: shape[1]", "paint_mask", EVERYTHING),
    ("common.py", "+= probs if scale == 1 else", "+= probs ** 2 if scale == 1 else", "predict_probs", FROM_INFER),
    ("common.py", '"flip": "identity,hflip,vflip"', '"flip": "identity,hflip"', "TTA[flip]", FROM_INFER),
    ("pseudo_label.py", "foreground = (label > 0) &", "foreground = (label > 1) &", "judge", FROM_LABELS),
    ("common.py", "(areas >= min_area", "(areas > min_area", "remove_small", ["submit"]),
    ("ensemble.py", "MAX_PICKS = 30", "MAX_PICKS = 31", "MAX_PICKS", ["submit"])]
HARMLESS = [
    ("common.py", "def region_loss(", "# a comment\n\n\ndef region_loss("),
    ("common.py", "Soft IoU: Rahman and Wang 2016", "Soft intersection over union"),  # a docstring
    ("common.py", 'LOSSES = {\n', 'LOSSES = {\n    "mine": (region_loss(dice), focal),\n'),
    ("common.py", "def lovasz_loss(log_probs, log_true, target, labelled):",
     "def lovasz_loss(log_probs, log_true, target, labelled, more=None):"),  # which this recipe doesn't use
    ("common.py", '"none": squash,', '"none": squash, "mine": squash,'),
    ("common.py", "(0.05, 0.2), (0.05", "(0.1, 0.2), (0.05"),  # of another recipe's augmentation
    ("train.py", "figure.savefig(scratch, format=\"png\", dpi=90)", "figure.savefig(scratch, format=\"png\", dpi=60)"),
    ("train.py", '"peak; FPNs', '"the peak; FPNs'),
    ("report.html.jinja", "<html", "<html data-mine"),
    ("ensemble.py", "print(pd.DataFrame(grid).T.to_string())", "print(pd.DataFrame(grid).to_string())"),
    ("ensemble.py", "both from 0, is {shown}", "both from 0: {shown}"),
    ("infer.py", '    print(f"{path}: {len(indices)} images")', '    print(f"{path} has {len(indices)} images")'),
    ("requirements.txt", "tqdm==", "# mine\ntqdm==")]


@pytest.mark.parametrize("name, old, new, told, patterns", EDITS, ids=[e[3] for e in EDITS])
def test_an_edit_that_decides_stops_make_until_the_user_says_what_to_do(built, name, old, new, told, patterns):
    before = contents(built)
    edit(built, name, old, new)
    for goal in (["-n", "submit"], ["submit"]):
        done = make(built, *goal, code=2)
        assert all(f"({told})" in line or f" {told}" in line for line in said(done)) and said(done)
        assert all(f"{choice}" in line for line in said(done) for choice in ("CODE=new", "CODE=keep", "another EXP"))
    kinds = [re.search(r"\d+ ([a-z() ]+) in out/main", line)[1] for line in said(done)]
    assert len(kinds) == len(set(kinds))
    assert told in why(built) and contents(built) == before
    wanted = steps(*patterns)
    if patterns == EVERYTHING:
        wanted.remove("check") if name == "train.py" else None
    assert plan(built, "submit", CODE="new") == wanted
    kept = plan(built, "submit", CODE="keep")
    assert kept and not {"check"} & {*kept} - {*wanted}
    assert plan(built, "submit", EXP="other") == steps("*")


@pytest.mark.parametrize("name, old, new", HARMLESS, ids=range(len(HARMLESS)))
def test_an_edit_that_decides_nothing_remakes_nothing(built, name, old, new):
    edit(built, name, old, new)
    assert up_to_date(built)


def by_hand(folder, *argv, code=0):
    done = subprocess.run([PY, *argv], cwd=folder, env=ENV, text=True, capture_output=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


def line_of(folder, name, **knobs):
    """The command line by which make would make the first file whose step has this name."""
    path = folder / "away"
    (folder / "out").rename(path)
    argv = next(argv for argv in calls(folder, "submit", **knobs) if fnmatch(step(argv), name))
    path.rename(folder / "out")
    return argv


def test_each_script_asks_by_hand_too_and_keeps_what_is_there_when_told(built, template):
    lines = [line_of(built, name) for name in (f"train {A0}", f"infer {A0}", "pseudo r1/f0", "submit")]
    for name, old, new, *_ in (EDITS[0], EDITS[5], EDITS[7], EDITS[8]):
        edit(built, name, old, new)
    told = ("region_loss", "predict_probs", "judge", "remove_small")
    for argv, name in zip(lines, told, strict=True):
        done = by_hand(built, *argv, code=1)
        assert name in done.stderr and "--code new makes anew, --code keep keeps" in done.stderr
        assert done.stderr.count("\n") == 1
    assert contents(built) == contents(template)
    for argv, name in zip(lines, told, strict=True):
        assert f"kept, though other code made it: {name}" in by_hand(built, *argv, "--code", "keep").stdout
        assert "nothing to do" in by_hand(built, *argv).stdout
    assert contents(built) == contents(template)


def test_code_keep_keeps_everything_and_says_so_and_is_not_asked_again(built, template):
    edit(built, *EDITS[0][:3])
    make(built, "-j2", "submit", CODE="keep")
    assert contents(built) == contents(template) and up_to_date(built)
    config = json.loads((built / "out/main" / A0 / "config.json").read_text())
    now = config["kept_under"][-1]["state"]
    assert config["state"] != now
    diff = subprocess.run(["diff", "-r", f"out/main/code/{now}", "."], cwd=built, text=True, capture_output=True)
    assert [line for line in diff.stdout.splitlines() if not line.startswith("Only in .")] == []
    diff = subprocess.run(["diff", f"out/main/code/{config['state']}/common.py", "common.py"], cwd=built, text=True,
                          capture_output=True).stdout
    assert "1.01 - value" in diff and diff.count("\n") == 4
    edit(built, "common.py", "((1.01 - value)", "((1.02 - value)")
    assert "region_loss" in make(built, "submit", code=2).stderr
    edit(built, "common.py", "((1.02 - value)", "((1 - value)")  # as it was when the runs were made
    assert up_to_date(built)


def test_code_new_makes_anew_and_keeps_the_old_aside(built, template):
    edit(built, *EDITS[0][:3])
    make(built, "train", FOLD=0, CODE="new")
    before, run = contents(template)[f"out/main/{A0}/model.pt"], built / "out/main" / A0
    assert (run / "model.pt").read_bytes() != before and (run / "replaced/model.pt").read_bytes() == before
    assert plan(built, "train", FOLD=0) == []
    asked = make(built, "submit", code=2).stderr
    assert "region_loss" in asked and f"the first: out/main/r0/{MODEL}/s64/f1/model.pt" in asked


@pytest.mark.parametrize("name, old, new", [EDITS[i][:3] for i in (4, 5, 7)], ids=[EDITS[i][3] for i in (4, 5, 7)])
def test_code_keep_leaves_nothing_to_do_also_when_models_stores_and_labels_share_the_edit(
        built, template, name, old, new):
    edit(built, name, old, new)
    make(built, "-j2", "submit", CODE="keep")
    assert contents(built) == contents(template) and up_to_date(built)


def test_the_plan_remembers_the_hashes_that_it_read(built):
    (built / "out/cache/hashes.txt").unlink()
    plan(built, "submit")
    assert not (built / "out/cache/hashes.txt").exists()
    make(built, "submit")
    assert (built / "out/cache/hashes.txt").exists()


def test_make_takes_commands_and_no_files(built):
    error = make(built, "out/main/submission.csv", code=2).stderr
    assert "make takes commands" in error and error.count("\n") == 1


def test_folds_of_old_and_new_code_are_no_member_unless_the_old_was_kept_or_it_is_asked_for(built):
    edit(built, *EDITS[0][:3])
    runs = [f"out/main/r0/{MODEL}/s64/f{fold}" for fold in (0, 1)]
    make(built, "train", FOLD=0, CODE="new")
    by_hand(built, *line_of(built, f"infer {A0}"))
    vote = ["ensemble.py", "soft", "--data", "data", "--out", "out/mixed.csv", *runs]
    done = by_hand(built, *vote, code=1)
    assert all(text in done.stderr for text in ("folds of one member", "the code of region_loss", "--mixed"))
    by_hand(built, *vote, "--mixed")
    shutil.rmtree(built / "out/replaced", ignore_errors=True)
    (built / "out/mixed.csv").unlink()
    by_hand(built, *line_of(built, f"train r0/{MODEL}/s64/f1"), "--code", "keep")
    by_hand(built, *line_of(built, f"infer r0/{MODEL}/s64/f1"))
    by_hand(built, *vote)


def test_a_model_touched_by_hand_is_seen_and_asked_about(built):
    import torch
    path = built / "out/main" / B1 / "model.pt"
    state = torch.load(path, weights_only=True)
    state["model"] = {k: v * 0.5 if v.is_floating_point() else v for k, v in state["model"].items()}
    torch.save(state, path)
    assert "model.pt touched by hand" in make(built, "submit", code=2).stderr
    assert plan(built, "submit", CODE="keep") == steps(f"train {B1}", f"infer {B1}", "submit")
    make(built, "train", ROUND=1, FOLD=1, CODE="keep")
    assert plan(built, "submit") == steps(f"infer {B1}", "submit")  # of another model now


def test_an_interrupted_run_is_not_carried_on_by_other_code_without_asking(fresh):
    make(fresh, "check")
    line = [*line_of(fresh, f"train {A0}"), "--epochs", "60"]
    process = subprocess.Popen([PY, *line], cwd=fresh, env=ENV, stdout=subprocess.DEVNULL)
    last = fresh / "out/main" / A0 / "last.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    edit(fresh, *EDITS[0][:3])
    assert "begun run(s)" in make(fresh, "train", FOLD=0, EPOCHS=60, code=2).stderr
    assert "region_loss" in by_hand(fresh, *line, code=1).stderr
    out = by_hand(fresh, *line, "--code", "keep").stdout
    assert "resuming after epoch" in out
    config = json.loads((fresh / "out/main" / A0 / "config.json").read_text())
    assert len(config["kept_under"]) == 1 and plan(fresh, "train", FOLD=0, EPOCHS=60) == []


@pytest.mark.parametrize("line, code, told", [
    (["--overfit", "2", "--epochs", "1"], 1, "on its own 2 training images, below 0.9"), (["--check"], 0, "")])
def test_overfit_and_check_never_ask(built, line, code, told):
    argv = [word for word in line_of(built, f"train {A0}") if word != "--replace"]
    for changed in (False, True):
        if changed:
            edit(built, *EDITS[0][:3])
        assert told in by_hand(built, *argv, *line, code=code).stderr


def test_what_made_each_file_is_written_in_it_and_in_the_report(built):
    commit = "git -c user.name=x -c user.email=x@y commit -qm x"
    subprocess.run(f"git init -q && git add *.py Makefile && {commit}", shell=True, cwd=built, check=True,
                   env=ENV | {"HOME": str(built)})
    make(built, "train", FOLD=0, LR="4e-3")
    names = (f"{A0}/config.json", f"{B1}/test.json", f"{B1}/valid.json", "r1/pseudo/f0/manifest.json",
             "submission.made.json")
    found = [json.loads((built / "out/main" / name).read_text()) for name in names]
    commit = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=built, text=True).strip()
    assert found[0]["commit"] == commit and {made["commit"] for made in found[1:]} == {""}
    for made in found:
        assert (built / "out/main/code" / made["state"] / "common.py").read_bytes() == (ROOT / "common.py").read_bytes()
        assert set(made["versions"]) == {"torch", "timm", "segmentation-models-pytorch", "albumentations"}
    assert found[1]["state"] in (built / "out/main/report.html").read_text()
    edit(built, "train.py", '"""Train one model', '"""Trains one model')
    make(built, "train", FOLD=0, LR="5e-3")
    assert json.loads((built / f"out/main/{A0}/config.json").read_text())["commit"] == commit + "+"


def test_other_versions_are_shown_and_make_nothing_stale(built):
    path = built / "out/main" / A0 / "config.json"
    made = json.loads(path.read_text())
    made["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(made))
    assert up_to_date(built)
    assert "note: out/main" in by_hand(built, *line_of(built, f"train {A0}")).stdout


# ---- several processes, other machines ------------------------------------------------------------------------------


def test_training_and_prediction_get_their_processes_and_the_rest_one(fresh):
    def printed(**knobs):
        text = make(fresh, "-n", "check", "submit", **knobs).stdout.replace("\\\n", " ")
        return [line for line in text.splitlines() if PY in line and " plan " not in line]
    started = "-m torch.distributed.run --standalone --nproc-per-node 2 "
    one, two = printed(), printed(GPUS=2)
    assert two == [re.sub(r"(train.py(?! --check)|infer.py)", started + r"\1", line) for line in one]
    assert all(line.startswith("srun -n1 ") for line in printed(LAUNCH="srun -n1"))


def test_failure_of_the_launcher_stops_make(fresh):
    assert "Error 1" in make(fresh, "submit", code=2, LAUNCH="false").stderr
    assert not list((fresh / "out").rglob("*.pt"))


@pytest.mark.parametrize("goal, n_jobs", [("submit", 8), ("sweep", 1), ("runtimes", 1)])
def test_every_job_that_takes_a_gpu_knows_how_many_may_share_it(untouched, goal, n_jobs):
    jobs = [argv for argv in calls(untouched, goal, PER_GPU=3) if "--device" in argv]
    assert [argv[argv.index("--per-gpu") + 1] for argv in jobs] == ["3"] * n_jobs


@pytest.mark.parametrize("jobs, gpus, threads", [
    ("-j1", 1, "8"), ("-j2", 1, "4"), ("-kj3", 1, "2"), ("-j16", 1, "1"), ("-j", 1, "1"), ("-j1", 2, "4"),
    ("-j1", 3, "2"), ("-j2", 2, "2"), ("-j4", 4, "1"), ("-j1", 9, "1"), ("-j", 8, "1")])
def test_processes_of_all_jobs_share_the_cores(fresh, jobs, gpus, threads):
    (fresh / "bin").mkdir()
    (fresh / "bin/nproc").write_text("#!/bin/sh\necho 8\n")
    (fresh / "bin/nproc").chmod(0o755)
    make(fresh, jobs, "train", FOLD=0, GPUS=gpus, BATCH=18, env={"PATH": f"{fresh}/bin:{ENV['PATH']}"}, PY="./recorder")
    assert [line[0] for line in trace(fresh)] == [threads, threads]


def test_with_k_a_failing_run_stops_only_what_needs_it(fresh):
    make(fresh, "-k", "-j2", "submit", code=2, env={"FAIL": f"--round 0 --model {MODEL} --scale 64 --fold 0"},
         PY="./recorder")
    ran = {step(argv) for _, *argv in trace(fresh)} - {f"train {A0}"}
    assert sorted(ran) == sorted({*steps("*")} - {*steps(f"* {A0}", *AFTER_A0)})


def test_what_is_made_from_another_file_waits_for_it(fresh):
    make(fresh, "-j8", "submit", PY="./recorder")
    ran = [step(argv) for _, *argv in trace(fresh)]
    assert sorted(ran) == steps("*")
    for fold in (0, 1):
        chain = ["check", f"train r0/{MODEL}/s64/f{fold}", f"infer r0/{MODEL}/s64/f{fold}", f"pseudo r1/f{fold}",
                 f"train r1/{MODEL}/s64/f{fold}", f"infer r1/{MODEL}/s64/f{fold}", "submit"]
        assert sorted(chain, key=ran.index) == chain


def test_two_makes_with_different_knobs_never_end_in_a_mixture(built):
    """The second make changes a run after the first has planned, at the moment that the first asks again."""
    slow = built / "slow"
    slow.write_text(f"""#!/bin/bash
case " $* " in *--ready*) {' '.join(shlex.quote(w) for w in command("train", ROUND=1, FOLD=0, LR="4e-3"))} >&2;; esac
exec {PY} "$@"
""")
    slow.chmod(0o755)
    done = make(built, "submit", VOTE="equal", PY="./slow", code=2)
    assert "changed while make ran" in done.stderr and "lr 0.004 -> 0.003" in done.stderr


# ---- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(0, 12, 2))
def test_killed_between_steps_with_a_knob_changed_make_ends_as_a_new_folder_does(built, fresh, stage):
    """make is killed after so many new files, then runs with another knob: nothing of either is mixed in."""
    changed = {"LR": "4e-3", "TTA": "none"}
    log = open(built / "log", "w")  # noqa: SIM115
    process = subprocess.Popen(command("submit", SEED=1), cwd=built, env=ENV, start_new_session=True, stdout=log,
                               stderr=log)

    def n_made():  # os.walk, for which folders may vanish
        return sum(name.endswith((".pt", ".npy")) for folder, _, names in os.walk(built / "out/main") for name in names
                   if folder.endswith("/replaced"))
    while n_made() < stage and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    make(built, "-j2", "submit", **changed)
    make(fresh, "-j2", "submit", **changed)
    assert contents(built) == contents(fresh) and up_to_date(built, **changed)


# ---- around the graph -----------------------------------------------------------------------------------------------


def test_environment_is_made_first_and_once(built):
    assert make(built, "-n", "submit", PY=".venv/bin/python").stdout.count(" -m pip install ") == 1
    assert make(built, "-n", "train", "submit", PY=".venv/bin/python").stdout.count(" -m pip install ") == 1
    (built / ".venv/bin").mkdir(parents=True)
    (built / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {PY} "$@"\n')
    (built / ".venv/bin/python").chmod(0o755)
    (built / ".venv/.installed").touch()
    make(built, "-q", "submit", PY=".venv/bin/python")
    times = (built / "requirements.txt").stat()
    os.utime(built / ".venv/.installed", ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy may have it
    assert "train.py" in make(built, "-n", "submit", PY=".venv/bin/python", EXP="new").stdout
    os.utime(built / ".venv/.installed", (0, 0))
    assert " -m pip install " in make(built, "-n", "submit", PY=".venv/bin/python", EXP="new").stdout


def test_clean_removes_its_experiment_and_no_other(built):
    for name in ("cache", "other"):
        shutil.copytree(built / "out/main/r0", built / "out" / name, dirs_exist_ok=True)
    make(built, "clean")
    assert sorted(path.name for path in (built / "out").iterdir()) == ["cache", "other"]
    for exp in ("*", "/", "..", "../..", "other/..", "."):
        make(built, "clean", EXP=exp, code=2)
    assert sorted(path.name for path in (built / "out").iterdir()) == ["cache", "other"]
    assert (built / "train.py").exists()


def test_status_tells_what_is_stale_from_what_is_done(built):
    text = make(built, "status").stdout
    assert text.count("done") == 4 and "stale" not in text
    text = make(built, "status", LR="4e-3").stdout
    assert text.count("stale") == 4 and "lr 0.003 -> 0.004" in text
    edit(built, *EDITS[0][:3])
    text = make(built, "status").stdout
    assert text.count("stale") == 4 and "region_loss" in text


@pytest.mark.parametrize("exps, told", [
    (None, "EXPS=: compare takes two or more experiments, or rounds"),
    ("main ", "EXPS=main : compare takes two or more experiments, or rounds"),
    ("main empty", "no run has a valid.json in out/empty"), ("nosuch none main", "valid.json in out/nosuch out/none"),
    ("main ../main", "EXPS=main ../main can not be"), ("main,lr5 main", "EXPS=main,lr5 main can not be")])
def test_compare_without_two_experiments_that_were_scored_is_an_error_of_one_line(built, exps, told):
    (built / "out/empty/r0").mkdir(parents=True)
    error = make(built, "compare", code=2, **({} if exps is None else {"EXPS": exps})).stderr
    assert told in error and error.count("\n") == 1


def test_compare_and_score_train_nothing(built):
    before = contents(built)
    shutil.copytree(built / "out/main", built / "out/lr5")
    shutil.copy(built / "data/train.json", built / "the truth.json")
    out = make(built, "compare", EXPS="main/r0  main lr5").stdout
    assert "\nout/lr5 against out/main: v3 same, v2 same\n" in out
    assert "\nout/main against out/main/r0: " in out
    assert (built / "out/compare.csv").read_text().count("\n") == 4 and (built / "out/compare-iou.csv").exists()
    assert (built / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    error = make(built, "compare", EXPS="main lr5", TRUTH="the truth.json", code=2).stderr
    assert re.match(r"(the truth.json: test image \d+: it has no such image\n){4}make: ", error)
    make(built, "score")
    assert (built / "out/main/report").is_dir() and contents(built) == before


# ---- a round that learns nothing ------------------------------------------------------------------------------------


def test_a_round_that_keeps_no_label_is_not_trained_until_one_is_kept_by_hand(fresh):
    knobs = {"PSEUDO_ARGS": "--confident 1", "SNAPSHOTS": 1, "LR": "3e-3", "FOLDS": 0}
    done = make(fresh, "submit", **knobs)
    assert done.stdout.count("round 1 keeps no pseudo label, so it would learn nothing new: the run of round 0") == 1
    first, second = fresh / "out/main" / A0, fresh / "out/main" / A0.replace("r0", "r1", 1)
    names = sorted(path.name for path in first.glob("*.pt"))
    assert names == sorted(path.name for path in second.glob("*.pt")) and len(names) == 2
    for name in names:
        before, after = (common.load_checkpoint(folder / name) for folder in (first, second))
        assert all((before["model"][key] == after["model"][key]).all() for key in before["model"])
        assert (before["recipe"]["round"], after["recipe"]["round"]) == (0, 1) and before["epoch"] == after["epoch"]
    assert (first / "log.csv").read_bytes() == (second / "log.csv").read_bytes()
    assert np.array_equal(np.load(first / "test.npy"), np.load(second / "test.npy"))
    assert make(fresh, "submit", **knobs).stdout.startswith("make: Nothing to be done")
    index = fresh / "out/main/r1/pseudo/f0/index.csv"
    rows = read_csv(index)
    rows[0]["keep"] = "1"
    common.write_csv(index, rows)
    assert plan(fresh, "submit", **knobs) == steps("train r1/*/f0", "infer r1/*/f0", "submit")
    done = make(fresh, "submit", **knobs)
    assert f"{second.relative_to(fresh)} epoch 2/2" in done.stdout
    assert common.load_checkpoint(second / "model.pt")["recipe"]["round"] == 1
    assert not np.array_equal(np.load(first / "test.npy"), np.load(second / "test.npy"))


@pytest.mark.parametrize("knobs", [{"PSEUDO_ARGS": ""}, {"PSEUDO_ARGS": "--confident auto"}, {"PSEUDO_ARGS": "--soft"}])
def test_one_fold_has_no_other_to_learn_from_how_sure_is_sure_enough(untouched, knobs):
    error = make(untouched, "-n", "submit", FOLDS=0, code=2, **knobs).stderr
    assert "give two or more FOLDS, or a number, PSEUDO_ARGS='--confident 0.8'" in error
    make(untouched, "-n", "submit", FOLDS=0, PSEUDO_ARGS="--confident 0.5")
    make(untouched, "-n", "submit", FOLDS=0, ROUNDS=0, PSEUDO_ARGS="")


def test_labels_that_learn_from_other_folds_wait_for_them_and_follow_their_change(untouched, built):
    knobs = {"PSEUDO_ARGS": "--precision 0.5"}
    assert plan(untouched, "pseudo", FOLD=0, **knobs) == steps("check", "train r0/*", "infer r0/*", "pseudo r1/f0")
    make(built, "submit", **knobs)
    manifest = common.read_json(built / "out/main/r1/pseudo/f0/manifest.json")
    assert len(manifest["recipe"]["out_of_fold"]) == 2 and len(manifest["makers"]) == 1
    assert make(built, "submit", **knobs).stdout.startswith("make: Nothing to be done")
    assert plan(built, "submit", PSEUDO_ARGS="--precision 0.6") == steps("pseudo *", "* r1/*", "submit")


def test_labels_of_another_fold_than_folds_has_are_made_once(fresh):
    knobs = {"NFOLDS": 3, "FOLD": 2, "PSEUDO_ARGS": "--precision 0.5"}
    make(fresh, "pseudo", **knobs)
    manifest = common.read_json(fresh / "out/main/r1/pseudo/f2/manifest.json")
    assert len(manifest["recipe"]["out_of_fold"]) == 2 and len(manifest["makers"]) == 1
    assert make(fresh, "pseudo", **knobs).stdout.startswith("make: Nothing to be done")
