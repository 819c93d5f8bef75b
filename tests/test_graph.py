"""The Makefile as a build graph, driven in a copy of the project whose scripts are stubs.

A stub takes exactly the flags that the Makefile passes and writes the files that the real script writes. The text of a
file is a digest of all that it was made from, so two folders with the same texts were made alike.
"""
import importlib
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
KNOBS = re.findall(r"^([A-Z_]+) +\?=", MAKEFILE, re.M)
STUBS = {"common.py": '''
import os, sys, zlib
class Args(dict): __getattr__ = dict.__getitem__
def parse(flags, optional="", switches="", inputs=False):
    """Strict, but not argparse, whose import would take most of the time; what runs is noted in the file "trace"."""
    with open("trace", "a") as f: print(os.environ.get("OMP_NUM_THREADS"), *sys.argv, file=f)
    args, words = Args(dict.fromkeys(optional.split() + switches.split()), inputs=[]), iter(sys.argv[1:])
    for word in words:
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--"): args.inputs.append(word)
        elif word[2:] in switches.split(): args[name] = True
        elif word[2:] in (flags + " " + optional).split(): args[name] = next(words)
        else: sys.exit(f"unknown argument {word}")
    lacking = [flag for flag in flags.split() if flag.replace("-", "_") not in args]
    if lacking or inputs not in (bool(args.inputs), None): sys.exit(f"{lacking} missing, or inputs: {args.inputs}")
    return args
def digest(*made_of): return format(zlib.crc32(repr(made_of).encode()), "08x")
def read(*paths): return [open(path).read() for path in paths]
def write(path, text):
    """FAIL names a file whose writing fails; at the file STOP the stub says "here" and waits for its end."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/.{name}.tmp", "w") as f: f.write(text)
    if os.environ.get("FAIL") == path: sys.exit("the stub fails")
    if os.environ.get("STOP") == path:
        os.write(os.open("here", os.O_WRONLY), b"x")
        open("never")
    os.replace(f"{folder}/.{name}.tmp", path)
''', "train.py": '''
from common import *
check = "--check" in sys.argv
run = " model scale fold round epochs batch lr seed weights snapshots device"
a = parse("exp cache data folds paint" + (not check) * run, optional="augment", switches="check replace")
json = a.data + ("/train_all.json" if os.path.exists(a.data + "/train_all.json") else "/train.json")
folds = digest(a.folds, *read(json, a.data + "/test.json"))
if check and not (os.path.exists(a.exp + "/folds.csv") and read(a.exp + "/folds.csv") == [folds]):
    write(a.exp + "/folds.csv", folds)
if read(a.exp + "/folds.csv") != [folds]: sys.exit("folds.csv is of other data or folds")
if check: sys.exit()
folder = f"{a.exp}/r{a.round}/{a.model}/s{a.scale}/f{a.fold}"
out, epochs = folder + "/model.pt", [f"{folder}/epoch-{epoch:03}.pt" for epoch in range(int(a.snapshots))]
labels = [f"{a.exp}/r{a.round}/pseudo/f{a.fold}/{n}" for n in ("labels.npy", "manifest.json", "index.csv")]
recipe = digest(folds, sorted((k, v) for k, v in a.items() if k not in ("data", "exp", "cache", "device", "replace")),
                read(*labels) if a.round != "0" else "")
if all(os.path.exists(f) and read(f)[0].split()[0] == recipe for f in [out, *epochs]): os.utime(out); sys.exit()
if os.path.exists(out) and not a.replace: sys.exit(out + " was made with another recipe")
for name in os.listdir(folder) if os.path.exists(folder) else ():
    if name.startswith("epoch-"): os.remove(f"{folder}/{name}")
for path in [*epochs, out]: write(path, recipe + " code 1")
''', "infer.py": '''
from common import *
a = parse("data cache checkpoint tta device", optional="batch", inputs=None)
for name in ("valid.npy", "valid.json", "test.npy", "test.json"):
    path = os.path.dirname(a.checkpoint) + "/" + name
    if name.endswith(".npy") and os.path.exists(path[:-3] + "json"): os.remove(path[:-3] + "json")
    write(path, digest(name, a.tta, a.batch, read(a.checkpoint, *a.inputs)))
''', "pseudo_label.py": '''
from common import *
a = parse("data cache exp round fold", optional="confident", inputs=True)
folder = f"{a.exp}/r{a.round}/pseudo/f{a.fold}"
made_of = a.confident, read(*a.inputs, *(path.replace(".json", ".npy") for path in a.inputs))
if os.path.exists(folder + "/index.csv"): os.remove(folder + "/index.csv")
for name in ("labels.npy", "manifest.json", "index.csv"): write(f"{folder}/{name}", digest(name, made_of))
''', "ensemble.py": '''
from common import *
command = sys.argv.pop(1)
soft = command == "soft"
if command == "compare":
    a = parse("data cache", inputs=True)
    sys.exit(print("compare", *a.inputs))
a = parse("data cache batch weights report" + (" image-id out" if soft else " tables"), inputs=True)
parts = ("valid.json", "valid.npy", "test.json", "test.npy")[:4 if soft else 2]
text = digest(a.batch, a.weights, soft and a.image_id, [read(f"{run}/{part}") for run in a.inputs for part in parts])
if not soft: os.makedirs(a.tables, exist_ok=True)
write(a.out, text) if soft else print("score", text)
''', "torch/distributed/run.py": '''
import os, runpy, sys
if sys.argv[1:3] != ["--standalone", "--nproc-per-node"]: sys.exit(f"not one machine: {sys.argv}")
with open("ranked", "a") as f: print(*sys.argv[3:], file=f)
sys.argv[:4] = []
runpy.run_path(sys.argv[0], run_name="__main__")
'''}
LAUNCHER = """#!/bin/bash
echo "$@" >>launched
[[ $1 = --tag ]] && shift 2
exec env -i PATH="$PATH" HOME="$HOME" "$@"
"""
PY = f"{sys.executable} -SE"  # the stubs need no site-packages
GRID = {"MODELS": "fpn/a unet/b", "SCALES": 64, "FOLDS": "0 1", "NFOLDS": 2, "ROUNDS": 1, "PY": PY}
ENV = {"PATH": os.environ["PATH"], "LC_ALL": "C"}  # no MAKEFLAGS or knobs of a make that runs the tests
CHANGED = {"NFOLDS": 3, "LR": "4e-3", "TTA": "none", "PSEUDO_ARGS": "--confident 0.9", "IMAGE_ID": "file_name"}
A0, B1 = "r0/fpn/a/s64/f0", "r1/unet/b/s64/f1"  # a run without and one with pseudo labels
AFTER_LABELS = ["train r1/*/f0", "infer r1/*/f0", "submit"]
AFTER_A0 = ["pseudo r1/f0", *AFTER_LABELS]
FROM_LABELS, FROM_INFER, FROM_TRAIN, EVERYTHING = (
    ["pseudo *", "* r1/*", "submit"], ["infer *", "pseudo *", "train r1/*", "submit"],
    ["train *", "infer *", "pseudo *", "submit"], ["*"])


def new_folder(folder):
    for name, text in STUBS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").mkdir()
    for name in ("train.json", "test.json"):
        (folder / "data" / name).write_text(name)
    return folder


@pytest.fixture
def fresh(tmp_path):
    return new_folder(tmp_path)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = new_folder(tmp_path_factory.mktemp("template"))
    make(folder, "-j4", "submit")
    return folder


@pytest.fixture(scope="module")
def changed_texts(tmp_path_factory):
    """What `make submit` with the knobs CHANGED writes in a new folder."""
    folder = new_folder(tmp_path_factory.mktemp("changed"))
    make(folder, "-j4", "submit", **CHANGED)
    return texts(folder)


@pytest.fixture
def built(template, tmp_path):
    """A folder in which `make submit` has run."""
    return shutil.copytree(template, tmp_path / "built")


def command(*words, **knobs):
    return ["make", "--warn-undefined-variables", *words, *(f"{k}={v}" for k, v in (GRID | knobs).items())]


def make(folder, *words, code=0, env=(), **knobs):
    done = subprocess.run(command(*words, **knobs), cwd=folder, env=ENV | dict(env), text=True, capture_output=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "undefined variable" not in done.stderr
    return done


def step(argv):
    """A short name for one call of a script: "train r0/fpn/a/s64/f0"."""
    script, flags = argv[0].removesuffix(".py"), dict(zip(argv, argv[1:], strict=False))
    if script == "train":
        run = "train r{--round}/{--model}/s{--scale}/f{--fold}"
        return "check" if "--check" in argv else run.format_map(flags)
    if script == "infer":
        return re.sub(r"^out/\w+/(.*)/[^/]+\.pt$", r"infer \1", flags["--checkpoint"])
    if script == "pseudo_label":
        return "pseudo r{--round}/f{--fold}".format_map(flags)
    return "submit" if "--out" in argv else "score"


def calls(folder, *goals, **knobs):
    """Command lines of the scripts as `make -n` prints them, without the interpreter."""
    text = make(folder, "-n", *goals, **knobs).stdout.replace("\\\n", " ")
    return [shlex.split(line.removeprefix(PY)) for line in text.splitlines() if line.startswith(PY)]


def commands(folder, *goals, **knobs):
    """All lines of `make -n` that start Python, as printed."""
    return [line for line in make(folder, "-n", *goals, **knobs).stdout.replace("\\\n", " ").splitlines() if PY in line]


def plan(folder, *goals, **knobs):
    return sorted(map(step, calls(folder, *goals, **knobs)))


def trace(folder):
    """[threads, script, argument, ...] of every call so far."""
    return [line.split() for line in (folder / "trace").read_text().splitlines()] if (folder / "trace").exists() else []


def remade(folder, *goals, **knobs):
    """Names of the steps that ran; they are what was planned, and after them there is nothing left to do."""
    planned, before = plan(folder, *goals, **knobs), len(trace(folder))
    make(folder, "-j4", *goals, **knobs)
    ran = sorted(step(argv) for _, *argv in trace(folder)[before:])
    assert ran == planned
    make(folder, "-q", *goals, code=int("score" in goals), **knobs)  # score always prints
    return ran


def texts(folder):
    """{path: text} of everything under out, stamps and left-overs too."""
    return {str(p.relative_to(folder)): p.read_text() for p in (folder / "out").rglob("*") if p.is_file()}


def steps(*patterns, models=("fpn/a", "unet/b"), scales=(64,), folds=(0, 1), rounds=(0, 1)):
    """Those of all steps up to a submission whose names match one of the patterns; every pattern matches something."""
    runs = [f"r{r}/{m}/s{s}/f{f}" for r in rounds for m in models for s in scales for f in folds]
    every = ["check", *(f"{script} {run}" for run in runs for script in ("train", "infer")),
             *(f"pseudo r{r}/f{f}" for r in rounds if r for f in folds), "submit"]
    assert all(any(fnmatch(name, pattern) for name in every) for pattern in patterns)
    return sorted(name for name in every if any(fnmatch(name, pattern) for pattern in patterns))


# ---- help, the plan, mistakes at the command line -------------------------------------------------------------------


def test_help_is_the_default_and_lists_every_command_and_knob_with_its_value(fresh):
    knobs = {"LR": "7e-7", "TRAIN_ARGS": "--augment 'a b'"}
    out = make(fresh, "help", **knobs).stdout
    commands = re.search(r"^\.PHONY: (help .*)$", MAKEFILE, re.M)[1].split()
    assert out == make(fresh, **knobs).stdout
    assert len(commands) > 8 and all(re.search(rf"^  {c} +\w", out, re.M) for c in commands)
    assert len(KNOBS) > 20 and all(re.search(rf"\b{k}\b", out) for k in KNOBS)
    for line in (" LR +7e-7 +peak", " MODELS +fpn/a unet/b +DEC", " TRAIN_ARGS --augment 'a b' +more"):
        assert re.search(f"^ {line}", out, re.M)


@pytest.mark.parametrize("rounds, runs, labels", [(0, 8, 0), (1, 16, 2), (2, 24, 4)])
def test_dry_run_plans_the_whole_grid_without_a_warning_and_writes_nothing(fresh, rounds, runs, labels):
    before = sorted(fresh.rglob("*"))
    scripts = [argv[0] for argv in calls(fresh, "submit", SCALES="64 96", ROUNDS=rounds)]
    assert [scripts.count(f"{script}.py") for script in ("train", "infer", "pseudo_label", "ensemble")] == [
        1 + runs, runs, labels, 1]
    assert make(fresh, "-n", "submit", SCALES="64 96", ROUNDS=rounds).stderr == ""
    assert sorted(fresh.rglob("*")) == before


@pytest.mark.parametrize("knobs, message", [
    *(({typo: 1}, f"unknown knob: {typo};") for typo in ("FLOD", "lr", "OMP_NUM_THREADS")),
    *(({knob: ""}, f" {knob} is empty") for knob in KNOBS if knob not in ("ROUND", "STRICT", "LAUNCH", "A", "B")
      and "_ARGS" not in knob),
    *(({knob: value}, f"{knob}={value}: not a whole number") for knob, value in (
        ("GPUS", 0), ("GPUS", "x"), ("GPUS", "2 2"), ("GPUS", "1.5"), ("GPUS", "'"), ("TRIALS", -1), ("TRIALS", 0),
        ("SNAPSHOTS", -1), ("SNAPSHOTS", "two"), ("SNAPSHOTS", "01"))),
    ({"ROUNDS": 10}, "not 10"), ({"FOLD": 1}, "submit takes FOLDS, not FOLD"),
    ({"SCALE": 96}, "submit takes SCALES"),
    ({"ROUND": "x"}, "not x"), ({"DATA": "my data"}, "DATA"), ({"EXP": "my exp"}, "EXP")])
def test_mistaken_knob_is_an_error_of_one_line_that_names_it_and_writes_nothing(fresh, knobs, message):
    shutil.copytree(fresh / "data", fresh / "my data")
    error = make(fresh, "submit", code=2, **knobs).stderr
    assert message in error and error.count("\n") == 1 and not (fresh / "out").exists()


@pytest.mark.parametrize("name", ["train.json", "test.json"])
def test_missing_data_is_told_in_one_line_before_anything_runs(fresh, name):
    (fresh / "data" / name).unlink()
    error = [x for x in make(fresh, "submit", code=2).stderr.splitlines() if not x.startswith("make: ***")]
    assert len(error) == 1 and f"no data/{name}" in error[0] and "DATA=data" in error[0] and not trace(fresh)


def test_real_scripts_accept_what_make_passes_and_get_every_knob(fresh, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    shutil.copytree(fresh / "data", fresh / "new")
    knobs = {"DATA": "new", "EXP": "e", "MODELS": "unet/b", "SCALES": 96, "FOLDS": 3, "NFOLDS": 4, "PAINT": "order",
             "EPOCHS": 7, "BATCH": 9, "LR": "2e-5", "SEED": 11, "WEIGHTS": "none", "TTA": "none", "DEVICE": "cpu",
             "IMAGE_ID": "file_name", "TRAIN_ARGS": "--augment none --ema 0.5", "INFER_ARGS": "--batch 13",
             "PSEUDO_ARGS": "--confident 0.75", "SNAPSHOTS": 6, "VOTE": "3,1"}
    values = {}  # {script: every value that its arguments ever had}
    for changed in ({}, knobs):
        for script, *argv in calls(fresh, "submit", "score", "check", **changed):
            args = vars(importlib.import_module(script.removesuffix(".py")).parse_args(argv))
            values.setdefault(script, set()).update(map(str, args.values()))
    wanted = {"train.py": "new out/e unet/b 96 3 4 order 7 9 2e-05 11 none cpu 0.5 out/cache True 0 1 6",
              "infer.py": "new none 13 cpu out/cache", "pseudo_label.py": "new out/e 3 0.75 out/cache 1",
              "ensemble.py": "new file_name 9 out/e/submission.csv out/e/report out/cache soft score fit [3.0, 1.0]"}
    assert set(values) == set(wanted)
    for script, text in wanted.items():
        assert set(re.findall(r"\[.*\]|\S+", text)) <= values[script], script


def test_bench_measures_the_rows_that_were_asked_for(fresh, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for knobs, rows in (({}, "all"), ({"ROWS": "vote,step"}, "vote,step")):
        [[script, *argv]] = calls(fresh, "bench", **knobs)
        args = importlib.import_module("bench_speed").parse_args(argv)
        assert (script, args.rows, str(args.out)) == ("tests/bench_speed.py", rows, "out/bench.jsonl")


def test_runtimes_measures_what_model_and_scale_pick_every_time(fresh, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    (fresh / "out").mkdir()
    for name in ("runtimes", "out/runtimes.csv"):
        (fresh / name).touch()
    knobs = {"MODEL": "unet/b pan/c", "SCALE": "96 64", "BATCH": 3, "DEVICE": "cpu"}
    for changed, wanted in (({}, (["fpn/a", "unet/b"], [64], 8, "auto")),
                            (knobs, (["unet/b", "pan/c"], [96, 64], 3, "cpu"))):
        [[script, *argv]] = calls(fresh, "runtimes", **changed)
        args = importlib.import_module("bench_runtimes").parse_args(argv)
        assert script == "tests/bench_runtimes.py" and str(args.out) == "out/runtimes.csv"
        assert (args.models, args.scales, args.batch, args.device) == wanted


@pytest.mark.parametrize("goal, knobs, patterns, grid", [
    ("check", {}, [], {}),
    ("train", {"FOLD": 1}, ["train r0/*"], {"folds": [1]}),
    ("train", {"MODEL": "pan/c", "SCALE": 96, "FOLD": 2}, ["train r0/*"],
     {"models": ["pan/c"], "scales": [96], "folds": [2]}),
    ("train", {"MODEL": "fpn/a", "FOLD": 0, "ROUND": 1}, ["* r0/*", "pseudo *", "train r1/fpn/*"], {"folds": [0]}),
    ("train", {"MODEL": "pan/c", "FOLD": 2, "ROUND": 1}, ["* r0/[!p]*", "pseudo *", "train r1/pan/*"],
     {"models": ["fpn/a", "unet/b", "pan/c"], "folds": [2]}),
    ("pseudo", {}, ["* r0/*", "pseudo *"], {}),
    ("pseudo", {"FOLD": 1, "ROUND": 2}, ["* r0/*", "* r1/*", "pseudo r2/*"], {"folds": [1], "rounds": [0, 1, 2]}),
    ("score", {}, ["train *", "infer *", "pseudo *"], {}),
    ("score", {"MODEL": "unet/b", "ROUND": 0}, ["* r0/*"], {"models": ["unet/b"]}),
])
def test_model_scale_fold_and_round_pick_a_slice_of_the_grid_or_outside_it(fresh, goal, knobs, patterns, grid):
    assert plan(fresh, goal, **knobs) == sorted(steps("check", *patterns, **grid) + ["score"] * (goal == "score"))


def test_compare_gets_both_experiments_and_trains_nothing(built):
    shutil.copytree(built / "out/main", built / "out/lr5")
    assert calls(built, "compare", A="main", B="lr5") == [
        ["ensemble.py", "compare", "--data", "data", "--cache", "out/cache", "out/main", "out/lr5"]]
    before = texts(built)
    assert make(built, "compare", A="main", B="lr5").stdout == "compare out/main out/lr5\n"
    assert make(built, "compare", A="main/r0", B="main/r1").stdout == "compare out/main/r0 out/main/r1\n"
    assert texts(built) == before


def test_status_gets_all_runs_of_all_rounds_once(fresh):
    *call, = calls(fresh, "status", EPOCHS=7)[0]
    assert call[:4] == ["ensemble.py", "status", "--epochs", "7"]
    assert call[4:] == [f"out/main/r{r}/{m}/s64/f{f}" for r in (0, 1) for m in ("fpn/a", "unet/b") for f in (0, 1)]


@pytest.mark.parametrize("knobs, wrong", [
    ({}, "A="), ({"A": "main"}, "B="), ({"B": "main"}, "A="), ({"A": "main", "B": "empty"}, "B=empty"),
    ({"A": "nosuch", "B": "main"}, "A=nosuch")])
def test_compare_without_two_experiments_that_were_scored_is_an_error_of_one_line(built, knobs, wrong):
    (built / "out/empty/r0").mkdir(parents=True)
    before = len(trace(built))
    error = make(built, "compare", code=2, **knobs).stderr
    assert f" {wrong}" in error and "compare takes two experiments, or rounds" in error and error.count("\n") == 1
    assert len(trace(built)) == before


def test_score_leaves_its_tables_in_the_experiments_report(built):
    make(built, "score", EXP="main")
    assert (built / "out/main/report").is_dir()


# ---- what is remade, and nothing else -------------------------------------------------------------------------------


def test_second_submit_has_nothing_to_do_and_neither_has_it_after_a_check(built):
    assert plan(built, "submit") == [] and make(built, "-q", "submit").stderr == ""
    make(built, "check")
    assert remade(built, "submit") == []


@pytest.mark.parametrize("name, if_deleted, if_touched", [
    ("folds.csv", EVERYTHING, FROM_TRAIN),
    (f"{A0}/model.pt", [f"train {A0}", f"infer {A0}", *AFTER_A0], [f"infer {A0}", *AFTER_A0]),
    (f"{A0}/test.npy", [], AFTER_A0),  # its labels are there
    (f"{A0}/test.json", [f"infer {A0}", *AFTER_A0], []),
    (f"{A0}/valid.npy", [], []),
    (f"{B1}/model.pt", [f"train {B1}", f"infer {B1}", "submit"], [f"infer {B1}", "submit"]),
    *((f"{B1}/{store}", [f"infer {B1}", "submit"], ["submit"])
      for store in ("test.npy", "test.json", "valid.npy", "valid.json")),
    ("r1/pseudo/f0/labels.npy", AFTER_A0, AFTER_LABELS),
    ("r1/pseudo/f0/manifest.json", AFTER_A0, AFTER_LABELS),
    ("r1/pseudo/f0/index.csv", AFTER_A0, AFTER_LABELS),
    ("submission.csv", ["submit"], []),
])
def test_deleted_or_touched_file_remakes_what_depends_on_it(built, template, name, if_deleted, if_touched):
    path, made = built / "out/main" / name, texts(template)
    made = made if if_deleted else {path: text for path, text in made.items() if path != f"out/main/{name}"}
    os.utime(path)
    assert remade(built, "submit") == steps(*if_touched)
    path.unlink()
    assert remade(built, "submit") == steps(*if_deleted)
    assert texts(built) == made


def test_deleted_stores_of_an_old_round_are_made_again_only_when_its_labels_are(built, template):
    made = texts(template)
    for path in (built / "out/main/r0").rglob("test.*"):
        path.unlink()
    assert remade(built, "submit") == remade(built, "pseudo") == remade(built, "submit", MODELS="fpn/a unet/b") == []
    assert remade(built, "score", ROUND=0) == ["score"]
    os.utime(built / "out/main/r1/fpn/a/s64/f0/model.pt")
    assert remade(built, "submit") == ["infer r1/fpn/a/s64/f0", "submit"]
    (built / "out/main/r1/pseudo/f1/labels.npy").unlink()
    assert remade(built, "submit") == steps("infer r0/*/f1", "pseudo r1/f1", "train r1/*/f1", "infer r1/*/f1", "submit")
    assert remade(built, "submit", PSEUDO_ARGS="--confident 0.9") == steps("infer r0/*/f0", *FROM_LABELS)
    remade(built, "submit")
    assert texts(built) == made


@pytest.mark.parametrize("name", ["valid.npy", "valid.json"])
def test_score_remakes_a_deleted_half_of_a_validation_store(built, name):
    score = make(built, "score", ROUND=0).stdout
    (built / "out/main" / A0 / name).unlink()
    assert remade(built, "score", ROUND=0) == [f"infer {A0}", "score"]
    assert make(built, "score", ROUND=0).stdout == score


@pytest.mark.parametrize("knobs, if_changed, if_changed_back, grid", [
    ({"EPOCHS": 3, "BATCH": 4, "LR": "4e-3", "SEED": 1, "WEIGHTS": "none", "TRAIN_ARGS": "--augment 'none'"},
     FROM_TRAIN, FROM_TRAIN, {}),
    ({"SNAPSHOTS": 2}, FROM_TRAIN, FROM_TRAIN, {}),
    ({"DATA": "./data", "PAINT": "id", "NFOLDS": 3}, EVERYTHING, EVERYTHING, {}),
    ({"INFER_ARGS": "--batch 4", "TTA": "none"}, FROM_INFER, FROM_INFER, {}),
    ({"PSEUDO_ARGS": "--confident 0.9"}, FROM_LABELS, FROM_LABELS, {}),
    ({"FOLDS": 0, "ROUNDS": 0, "IMAGE_ID": "file_name", "VOTE": "equal"}, ["submit"], ["submit"], {}),
    ({"FOLDS": "0 1 2"}, ["*/f2", "submit"], ["submit"], {"folds": [0, 1, 2]}),
    ({"MODELS": "fpn/a"}, FROM_LABELS, FROM_LABELS, {"models": ["fpn/a"]}),
    ({"SCALES": "64 96"}, ["* r0/*/s96/*", *FROM_LABELS], FROM_LABELS, {"scales": [64, 96]}),
    ({"ROUNDS": 2}, ["* r2/*", "submit"], ["submit"], {"rounds": [0, 1, 2]}),
    ({"EXP": "other"}, EVERYTHING, [], {}),
    ({"DEVICE": "cpu", "GPUS": 2, "LAUNCH": "env", "TRIALS": 3, "STRICT": 1, "PY": f"{PY} -B"}, [], [], {}),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_changed_knob_rebuilds_exactly_what_reads_it_and_so_does_changing_it_back(
        built, knobs, if_changed, if_changed_back, grid):
    for knob, value in knobs.items():
        assert plan(built, "submit", **{knob: value}) == steps(*if_changed, **grid), knob
    remade(built, "submit", **{knob: value})
    assert plan(built, "submit") == steps(*if_changed_back)


def test_knobs_changed_and_changed_back_give_what_a_new_folder_gives(built, template, changed_texts):
    remade(built, "submit", **CHANGED)
    assert texts(built) == changed_texts
    make(built, "check", **CHANGED | {"NFOLDS": 4})  # writes other folds
    assert plan(built, "submit", **CHANGED) == remade(built, "submit") == steps("*")
    assert texts(built) == texts(template)


def test_train_all_json_is_preferred_whatever_its_age(built):
    path, away = built / "data/train_all.json", built / "away"
    path.write_text("more")
    os.utime(path, (1, 1))  # unpacked with the time of its packing
    assert remade(built, "submit") == steps("*")
    os.utime(built / "data/train.json")
    assert plan(built, "submit") == []
    path.rename(away)
    assert plan(built, "submit") == steps("*")
    away.rename(path)
    assert plan(built, "submit") == []
    os.utime(path)
    assert plan(built, "submit") == steps("*")


@pytest.mark.parametrize("name", ["train.json", "test.json"])
def test_touched_json_remakes_everything(built, name):
    os.utime(built / "data" / name)
    assert remade(built, "submit") == steps("*")


def test_edited_script_rebuilds_what_it_made_only_if_strict(built):
    for name, patterns in {"infer": FROM_INFER, "pseudo_label": FROM_LABELS, "ensemble": ["submit"],
                           "common": FROM_TRAIN}.items():
        edited = shutil.copytree(built, built / name)
        os.utime(edited / f"{name}.py")
        assert plan(edited, "submit") == [] and plan(edited, "submit", STRICT=1) == steps(*patterns)
    (built / "train.py").write_text(STUBS["train.py"].replace("code 1", "code 2"))
    assert plan(built, "submit") == [] and remade(built, "submit", STRICT=1) == steps(*FROM_TRAIN)
    assert {path.read_text()[-6:] for path in (built / "out/main").rglob("model.pt")} == {"code 2"}


def test_snapshots_vote_instead_of_the_best_epoch_and_lost_ones_are_made_again(fresh):
    knobs = {"SNAPSHOTS": 2, "ROUNDS": 0}
    make(fresh, "-j4", "submit", **knobs)
    made, run = texts(fresh), fresh / "out/main" / A0
    passed = [argv[argv.index("--checkpoint") + 1:] for _, *argv in trace(fresh) if argv[0] == "infer.py"]
    assert sorted(words[:2] for words in passed) == [
        [f"out/main/{step}/epoch-00{e}.pt" for e in (0, 1)] for step in sorted(
            name.removeprefix("train ") for name in steps("train r0/*"))]
    assert plan(fresh, "submit", **knobs) == []
    for lost in (["epoch-000.pt"], ["epoch-000.pt", "epoch-001.pt"]):
        for name in lost:
            (run / name).unlink()
        assert remade(fresh, "submit", **knobs) == [f"infer {A0}", "submit", f"train {A0}"]
        assert texts(fresh) == made
    remade(fresh, "submit", **knobs | {"SNAPSHOTS": 0})
    assert not list(fresh.rglob("epoch-*"))


# ---- several processes, other machines ------------------------------------------------------------------------------


def test_training_and_prediction_get_their_processes_and_the_rest_one(fresh, template):
    one = commands(fresh, "check", "submit", "score")
    three = commands(fresh, "check", "submit", "score", GPUS=3)
    started = "-m torch.distributed.run --standalone --nproc-per-node 3 "
    assert all("  train.py" not in line and "  infer.py" not in line for line in one + three)
    assert three == [re.sub(r"(train.py(?! --check)|infer.py)", started + r"\1", line) for line in one]
    make(fresh, "-j4", "submit", GPUS=3)
    assert texts(fresh) == texts(template)
    ranked = [line.split() for line in (fresh / "ranked").read_text().splitlines()]
    assert {line[0] for line in ranked} == {"3"}
    assert sorted(step(line[1:]) for line in ranked) == steps("train *", "infer *")


def test_launcher_with_another_environment_starts_every_script_and_makes_the_same_files(fresh, template):
    (fresh / "launch").write_text(LAUNCHER)
    (fresh / "launch").chmod(0o755)
    knobs = {"LAUNCH": "./launch --tag 'a b'", "GPUS": 2}
    planned = commands(fresh, "check", "submit", "score", **knobs)
    assert all(line.startswith("./launch --tag 'a b' ") for line in planned)
    make(fresh, "-j2", "submit", **knobs)
    make(fresh, "check", **knobs)
    assert make(fresh, "score", **knobs).stdout.endswith(make(fresh, "score").stdout.splitlines()[-1] + "\n")
    assert texts(fresh) == texts(template)
    launched = [shlex.split(line) for line in (fresh / "launched").read_text().splitlines()]
    scripts = [next(word for word in line if word.endswith(".py")) for line in launched]
    ran = [argv for _, *argv in trace(fresh)][:-1]  # the last score ran without
    assert sorted(scripts) == sorted(argv[0] for argv in ran) and set(scripts) == set(STUBS) - {
        "common.py", "torch/distributed/run.py"}
    assert {threads for threads, *_ in trace(fresh)[:-1]} == {"None"}


def test_failure_of_the_launcher_stops_make(fresh):
    assert "Error 3" in make(fresh, "submit", code=2, LAUNCH="exit 3;").stderr and not trace(fresh)


# ---- jobs, failures and interruptions -------------------------------------------------------------------------------


def test_one_job_and_a_shell_that_is_given_the_printed_commands_make_what_four_jobs_make(fresh, built, template):
    printed = make(fresh, "-n", "submit").stdout
    said = make(fresh, "-j1", "submit").stdout
    assert texts(fresh) == texts(template)
    assert [line for line in said.splitlines() if PY in line] == [line for line in printed.splitlines() if PY in line]
    shutil.rmtree(built / "out")
    subprocess.run(["bash", "-e"], input=printed, cwd=built, env=ENV | {"OMP_NUM_THREADS": "1"}, text=True, check=True)
    assert texts(built) == texts(template) and make(built, "-q", "submit")


@pytest.mark.parametrize("jobs, gpus, threads", [
    ("-j1", 1, "8"), ("-j2", 1, "4"), ("-kj3", 1, "2"), ("-j16", 1, "1"), ("-j", 1, "1"), ("-j1", 2, "4"),
    ("-j1", 3, "2"), ("-j2", 2, "2"), ("-j4", 4, "1"), ("-j1", 9, "1"), ("-j", 8, "1")])
def test_processes_of_all_jobs_share_the_cores(fresh, jobs, gpus, threads):
    (fresh / "bin").mkdir()
    (fresh / "bin/nproc").write_text("#!/bin/sh\necho 8\n")
    (fresh / "bin/nproc").chmod(0o755)
    make(fresh, jobs, "train", FOLD=0, MODEL="fpn/a", GPUS=gpus, env={"PATH": f"{fresh}/bin:{ENV['PATH']}"})
    assert [line[0] for line in trace(fresh)] == [threads, threads]


def test_with_k_a_failing_run_stops_only_what_needs_it(fresh, template):
    make(fresh, "-k", "-j4", "submit", code=2, env={"FAIL": f"out/main/{A0}/model.pt"})
    ran = {step(argv) for _, *argv in trace(fresh)} - {f"train {A0}"}
    assert sorted(ran) == sorted({*steps("*")} - {*steps(f"* {A0}", *AFTER_A0)})
    assert remade(fresh, "submit") == steps(f"* {A0}", *AFTER_A0)
    assert texts(fresh) == texts(template)


@pytest.mark.parametrize("name, how", [
    ("folds.csv", "SIGINT"), (f"{A0}/model.pt", "SIGKILL"), (f"{A0}/test.npy", "SIGKILL"),
    (f"{A0}/test.json", "SIGINT"), ("r1/pseudo/f0/manifest.json", "SIGKILL"), (f"{B1}/model.pt", "SIGTERM"),
    ("submission.csv", "SIGINT")])
def test_interrupted_anywhere_the_same_command_carries_on_to_the_same_result(built, changed_texts, name, how):
    """Everything is to be remade; at the moment of the signal the new file is written but has not got its name."""
    os.mkfifo(built / "here")
    os.mkfifo(built / "never")
    here, before = os.open(built / "here", os.O_RDONLY | os.O_NONBLOCK), len(trace(built))
    child = subprocess.Popen(
        command("submit", **CHANGED), cwd=built, env=ENV | {"STOP": f"out/main/{name}"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored if the tests run in the background
    assert select.select([here], [], [], 60)[0] and os.read(here, 1) == b"x"
    (os.kill if how == "SIGTERM" else os.killpg)(child.pid, signal.Signals[how])  # SIGTERM goes to make alone
    assert child.wait(60) != 0
    assert select.select([here], [], [], 60)[0] and os.read(here, 1) == b""  # the stub has ended
    os.close(here)
    done = [step(argv) for _, *argv in trace(built)[before:]][:-1]
    assert sorted(done + remade(built, "submit", **CHANGED)) == steps("*")
    assert texts(built) == changed_texts


# ---- around the graph -----------------------------------------------------------------------------------------------


def test_environment_is_made_once_and_rebuilds_nothing(built):
    assert make(built, "-n", "submit", PY=".venv/bin/python").stdout.count(" -m pip install ") == 1
    (built / ".venv").mkdir()
    (built / ".venv/.installed").touch()
    make(built, "-q", "submit", PY=".venv/bin/python")


def test_clean_removes_its_experiment_and_no_other(built):
    for name in ("cache", "other"):
        shutil.copytree(built / "out/main/r0", built / "out" / name)
    make(built, "clean")
    assert sorted(path.name for path in (built / "out").iterdir()) == ["cache", "other"]
