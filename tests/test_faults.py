"""What goes wrong while a run is on: damaged checkpoints, signals, lost loaders, full disks, no network, NaN."""
import csv
import ctypes
import errno
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from itertools import chain, repeat
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, read_csv, run_of, write_coco
from hypothesis import given
from hypothesis import strategies as st

import common
import infer
import train
from common import UserError

torch.set_num_threads(1)  # for nets this small a second thread would only wait for the first
STEPS = 5  # of an epoch: 9 training images in batches of 2, the last one filled up


@pytest.fixture(scope="module")
def line(line):
    return lambda exp, *more: line(exp, "--batch", 2, *more)


def model_bytes(args):
    return (run_of(args) / "model.pt").read_bytes()


@pytest.fixture(scope="module")
def finished(line, tmp_path_factory):
    """Return the arguments of a run that was never stopped; tests only read it."""
    args = line(tmp_path_factory.mktemp("finished"))
    train.main(args)
    return args


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def at_call(patch, owner, name, call, act):
    """Let the `call`-th call, from 1 on, of owner.name begin with act()."""
    function, calls = getattr(owner, name), []

    def acting(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            act()
        return function(*args, **kwargs)
    patch.setattr(owner, name, acting)


@pytest.mark.parametrize(("number", "said"), [
    (errno.ECONNRESET, "a loader process failed: .*reset by peer; too little memory[^\n]*"),  # its pipe broke first
    (errno.ECONNREFUSED, "a loader process failed: .*refused; too little memory[^\n]*"),
    (errno.ENOSPC, r"\[Errno 28\] No space left on device")])
def test_an_error_without_a_file_is_a_line_without_one(number, said, capsys):
    def main(_):
        raise OSError(number, os.strerror(number))  # of the class that belongs to the number
    with pytest.raises(SystemExit) as end:
        common.run_script(main, None)
    assert end.value.code == 1 and re.fullmatch(f"{said}\n", capsys.readouterr().err)


def script_in_a_fork(main, args, notes, owner=None, name=None, call=0, act=None):
    """Run a script's main as a process of its own, which has the libraries already; return (exit code, stderr)."""
    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
        os.setpgid(0, 0)
        for descriptor in (1, 2):
            os.dup2(os.open(notes / str(descriptor), os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        with pytest.MonkeyPatch.context() as patch:
            if owner:
                at_call(patch, owner, name, call, act)
            common.run_script(main, args)
    notes.mkdir(parents=True, exist_ok=True)
    process = get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode, (notes / "2").read_text()


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def stop(args, monkeypatch, name, call, owner=train):
    """Run until this call, which ends as by Ctrl-C; return what the run says then."""
    def interrupt():
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, interrupt)
        with pytest.raises(KeyboardInterrupt) as end:
            train.main(args)
    return str(end.value)


# ---- damaged checkpoints --------------------------------------------------------------------------------------------


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def middle_of_a_weight(path):
    """Return the position in the file of a byte of its largest part."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
        return part.header_offset + part.file_size // 2 + 128


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


DAMAGES = {"cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
           "cut in half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
           "empty": lambda path: path.write_bytes(b""), "text": lambda path: path.write_text("what?"),
           "a flipped bit": lambda path: flip(path, middle_of_a_weight(path))}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_by_name_in_one_line(finished, tmp_path, damage):
    path = Path(shutil.copy(run_of(finished) / "model.pt", tmp_path))
    DAMAGES[damage](path)
    with pytest.raises(UserError, match="model.pt: not a checkpoint that can be loaded safely: [^\n]+$"):
        common.load_model(path)


@pytest.mark.parametrize("kinds", [
    {}, {"recipe": 0}, {"recipe": {}}, {"code": []}, {"kept_under": [0]}, {"model": []}, {"classes": "abc"},
    {"valid_ids": None}, {"v3": "high"}])
def test_a_checkpoint_with_other_kinds_of_values_is_refused_by_name(line, finished, tmp_path, kinds):
    args = line(tmp_path / "exp")
    shutil.copytree(finished.exp, args.exp)
    (run_of(args) / "config.json").unlink()
    state = torch.load(run_of(args) / "model.pt") | kinds
    torch.save(state if kinds else [], run_of(args) / "model.pt")
    with pytest.raises(UserError, match="f1/model.pt: not a checkpoint of this train.py: "):
        train.main(args)
    with pytest.raises(UserError, match="f1/model.pt: not a model.pt of train.py"):
        common.load_model(run_of(args) / "model.pt")
    if kinds.keys() <= set(common.DESCRIBED) and kinds != {"recipe": {}}:
        (run_of(args) / "model.pt").rename(run_of(args) / "last.pt")
        with pytest.raises(UserError, match="f1/last.pt: not a checkpoint of this train.py: "):
            train.main(args)


def test_a_checkpoint_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path):
    torch.save({"model": {}, "recipe": Malicious(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="model.pt: not a checkpoint that can be loaded safely"):
        common.load_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it is what it says


SMALL = {"a": torch.arange(20.0), "text": "some words", "n": 3}


@given(st.data())
def test_no_flipped_bit_changes_what_is_loaded(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "x.pt"
    common.save_checkpoint(path, **SMALL)
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7)))
    try:
        state = common.load_checkpoint(path)
    except UserError:
        return
    assert torch.equal(state.pop("a"), SMALL["a"]) and state == {"text": "some words", "n": 3}


def test_weights_that_are_not_the_recipes_are_refused_in_one_line(finished, tmp_path):
    state = torch.load(run_of(finished) / "model.pt")
    common.save_checkpoint(tmp_path / "model.pt", **state | {"model": {"x": torch.zeros(1)}})
    with pytest.raises(UserError, match=f"model.pt: its weights are not those of {MODEL}[^\n]+$"):
        common.load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("lacking", ["weights", *slow("step", "ema")])
def test_a_last_pt_of_other_scripts_or_libraries_is_refused_in_one_line(line, tmp_path, monkeypatch, lacking):
    args = line(tmp_path)
    stop(args, monkeypatch, "backward", STEPS + 1)
    state = torch.load(run_of(args) / "last.pt")
    if lacking == "weights":
        state["model"] = {"x": torch.zeros(1)}
    else:
        del state[lacking]
    common.save_checkpoint(run_of(args) / "last.pt", **state)
    with pytest.raises(UserError, match="last.pt: not of these scripts and libraries, remove it[^\n]+$"):
        train.main(args)


@pytest.fixture(scope="module")
def stopped(line, tmp_path_factory):
    """Return the arguments of a run stopped in its third epoch; tests copy it."""
    args = line(tmp_path_factory.mktemp("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        stop(args, patch, "backward", STEPS * 2 + 2)
    return args


@pytest.mark.parametrize("damage", ["a flipped bit", *slow("cut", "cut in half", "empty", "text", "gone")])
def test_a_damaged_last_pt_falls_back_to_the_one_before_and_says_so(
        line, stopped, finished, tmp_path, capsys, monkeypatch, damage):
    args = line(shutil.copytree(stopped.exp, tmp_path / "exp"))
    last = run_of(args) / "last.pt"
    (Path.unlink if damage == "gone" else DAMAGES[damage])(last)
    stop(args, monkeypatch, "save_checkpoint", 1)  # and that once more
    said = capsys.readouterr().out
    assert "resuming after epoch 1\n" in said
    if damage != "gone":
        assert f"{last}: not a checkpoint" in said and f"; going back to {last.parent}/last-1.pt" in said
    train.main(args)
    assert model_bytes(args) == model_bytes(finished)
    assert {path.name for path in last.parent.iterdir()} == {"config.json", "log.csv", "model.pt", ".lock"}


@pytest.mark.parametrize("more", [[], ["--replace"]])
def test_two_damaged_ones_are_named_with_the_cure_and_nothing_is_begun_anew(
        line, stopped, tmp_path, monkeypatch, more):
    args = line(shutil.copytree(stopped.exp, tmp_path / "exp"), *more)
    folder = run_of(args)
    for name in ("last.pt", "last-1.pt"):
        flip(folder / name, middle_of_a_weight(folder / name))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(train, "train_one_epoch", lambda *_: pytest.fail("training began"))
    with pytest.raises(UserError) as refusal:
        train.main(args)
    said = str(refusal.value)
    assert "\n" not in said and "/last.pt: " in said and "/last-1.pt: " in said
    assert said.endswith(f"remove {folder}/last*.pt to start anew")
    assert {path: path.read_bytes() for path in folder.iterdir()}.keys() == before.keys()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


# os.replace is called for last.json, then in each epoch for log.csv, from the second one on for last-1.pt, and for
# last.pt, then for last-model.pt, log.csv, model.pt and config.json
BEFORE_CALL = {1: [], 2: ["last.json"], 3: ["last.json"], 4: ["last.json", "last.pt"], 5: ["last.json", "last.pt"],
               6: ["last-1.pt", "last.json"], 7: ["last-1.pt", "last.json", "last.pt"],
               8: ["last-1.pt", "last.json", "last.pt"], 9: ["last-1.pt", "last.json"],
               10: ["last-1.pt", "last.json", "last.pt"], 11: ["last-1.pt", "last-model.pt", "last.json", "last.pt"],
               12: ["last-1.pt", "last-model.pt", "last.json", "last.pt"], 13: [],
               14: []}  # which is never made


@pytest.mark.parametrize("call", [6, 12, 13, 14, *slow(1, 2, 3, 4, 5, 7, 8, 9, 10, 11)])
def test_killed_between_any_two_renames_a_run_carries_on_to_the_same_bytes(line, finished, tmp_path, call):
    args = line(tmp_path / "exp")
    folds = tmp_path / "exp/folds.csv"
    folds.parent.mkdir()
    shutil.copy(finished.exp / "folds.csv", folds)
    code, _ = script_in_a_fork(train.main, args, tmp_path / "notes", common.os, "replace", call, kill_me)
    assert code == (0 if call == 14 else -signal.SIGKILL)
    assert sorted(path.name for path in run_of(args).glob("last*")) == BEFORE_CALL[call]
    assert (run_of(args) / "log.csv").exists() == (call > 2) and (run_of(args) / "model.pt").exists() == (call > 12)
    assert (run_of(args) / "config.json").exists() == (call > 13)
    train.main(args)
    assert model_bytes(args) == model_bytes(finished)
    left, expected = files_of(run_of(args)), files_of(run_of(finished))
    assert left.keys() == expected.keys() and left["config.json"] == expected["config.json"]


@pytest.fixture(scope="module")
def replacing(line, tmp_path_factory):
    """Return the arguments of a trained run that is about to replace one with snapshots, which had replaced one too."""
    exp = tmp_path_factory.mktemp("replacing")
    for seed in (1, 2):
        train.main(line(exp, "--epochs", 1 + seed, "--snapshots", 2, "--seed", seed, "--replace"))
    args = line(exp, "--epochs", 1, "--snapshots", 1, "--replace")
    with pytest.MonkeyPatch.context() as patch:
        stop(args, patch, "draw_valid", 1)
    return args


# last.json, last-model.pt, config.json, log.csv, two snapshots and model.pt aside, log.csv, epoch-001.pt, model.pt,
# config.json; a twelfth call is never made
@pytest.mark.parametrize("call", [4, 10, *slow(1, 2, 3, 5, 6, 7, 8, 9, 11, 12)])
def test_killed_between_any_two_renames_a_replacement_loses_neither_the_new_run_nor_the_old(
        line, replacing, tmp_path, call):
    args = line(shutil.copytree(replacing.exp, tmp_path / "exp"), "--epochs", 1, "--snapshots", 1, "--replace")
    folder = run_of(args)
    old = {name: content for name, content in files_of(folder).items() if not name.startswith("last")}
    assert sorted(old) == ["config.json", "epoch-002.pt", "epoch-003.pt", "log.csv", "model.pt"]
    code, _ = script_in_a_fork(train.main, args, tmp_path / "notes", common.os, "replace", call, kill_me)
    assert code == (0 if call == 12 else -signal.SIGKILL)
    train.main(args)
    assert sorted(files_of(folder)) == ["config.json", "epoch-001.pt", "log.csv", "model.pt"]
    made = common.read_json(folder / "config.json")
    assert made["recipe"]["seed"] == 0
    assert made["files"] == {name: common.file_hash(folder / name) for name in ("epoch-001.pt", "model.pt")}
    assert {name: files_of(folder / "replaced").get(name) for name in old} == old


# ---- stopped in the middle of an epoch ------------------------------------------------------------------------------


EACH_STEP = 1e-9  # seconds
OPTIONS = ["--sampler", "rare", "--classmix", "weighted", "--optimizer", "sgd", "--accumulate", 2, "--clip", 1]


@pytest.mark.parametrize(("every", "more", "first", "second"), [
    (EACH_STEP, [], "step 4 of epoch 2", "step 1 of epoch 3"), (60, [], "the start", "the start"),
    (EACH_STEP, OPTIONS, "step 4 of epoch 2", "step 1 of epoch 3"), (0, OPTIONS, "epoch 1", "epoch 1"),
    pytest.param(EACH_STEP, ["--workers", 2], "step 4 of epoch 2", "step 1 of epoch 3", marks=pytest.mark.slow)])
def test_a_run_stopped_in_an_epoch_loses_only_the_steps_since_it_was_saved_and_ends_in_the_same_bytes(
        line, finished, tmp_path, monkeypatch, capsys, every, more, first, second):
    straight, args = finished, line(tmp_path / "stopped", "--save-every", every, *more)
    if more == OPTIONS:
        straight = line(tmp_path / "straight", *OPTIONS)
        train.main(straight)
    for call, position in ((STEPS * 2, first), (3, second)):  # the last step of epoch 2; then the third left
        said = stop(args, monkeypatch, "backward", call)
        assert said == f"{run_of(args)}: interrupted, kept is what was after {position}"
    capsys.readouterr()
    train.main(args)
    assert model_bytes(args) == model_bytes(straight)
    logs = []
    for run in (args, straight):
        with open(run_of(run) / "log.csv", newline="") as f:
            logs.append([{k: v for k, v in row.items() if k not in ("images_per_s", "waiting", "seconds")}
                         for row in csv.DictReader(f)])
    assert logs[0] == logs[1]


def test_a_run_that_was_saved_only_in_the_middle_of_an_epoch_goes_on_with_all_steps(
        line, finished, tmp_path, monkeypatch):
    args = line(tmp_path, "--save-every", 60)
    is_due = chain([False, True], repeat(False))
    monkeypatch.setattr(train, "save_is_due", lambda run, args: next(is_due))
    assert stop(args, monkeypatch, "backward", STEPS * 2 + 1).endswith("kept is what was after step 2 of epoch 1")
    train.main(args)
    assert model_bytes(args) == model_bytes(finished)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_the_group_ends_training_at_once_saying_what_is_kept(
        line, finished, tmp_path, number, code, workers):
    args = line(tmp_path / "exp", "--workers", workers)
    ended, said = script_in_a_fork(train.main, args, tmp_path / "notes", train, "backward", STEPS + 2,
                                   lambda: os.killpg(0, number))
    assert ended == code
    assert said == f"{run_of(args)}: interrupted, kept is what was after epoch 1; the same command carries on\n"
    assert not list(tmp_path.rglob("*.tmp"))
    train.main(args)
    assert model_bytes(args) == model_bytes(finished)


def stop_workers_and(act):
    """Return a function that stops this process's workers, which then answer nothing, and calls `act`."""
    def run():
        for child in active_children():
            os.kill(child.pid, signal.SIGSTOP)
        act()
    return run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_loader_processes_that_are_stopped_keep_no_run_alive(line, tmp_path, end_of_all, number, code):
    args = line(tmp_path / "exp", "--workers", 2)
    ended, said = script_in_a_fork(train.main, args, tmp_path / "notes", train, "backward", STEPS + 2,
                                   stop_workers_and(lambda: os.kill(os.getpid(), number)))
    assert ended == code
    assert said == f"{run_of(args)}: interrupted, kept is what was after epoch 1; the same command carries on\n"
    end_of_all()


def test_a_process_that_starts_as_its_parent_dies_ends_too(end_of_all):
    dead, alive = os.pipe()  # the parent alone holds the end that is written to

    def start_late():
        os.close(alive)
        os.read(dead, 1)  # until the parent is dead
        common.end_with_parent()
        select.select([], [], [])

    def die_early():
        get_context("fork").Process(target=start_late).start()
        kill_me()
    process = get_context("fork").Process(target=die_early)
    process.start()
    os.close(alive)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    end_of_all()
    os.close(dead)


def test_loader_processes_end_with_a_run_that_is_killed_even_if_they_are_stuck(line, tmp_path, end_of_all):
    def kill_the_run():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(300)
    args = line(tmp_path / "exp", "--workers", 2)
    ended, _ = script_in_a_fork(train.main, args, tmp_path / "notes", common.Split, "image", 3, kill_the_run)
    assert ended == -signal.SIGKILL
    end_of_all()


def infer_line(data, cache, folder, *more):
    return infer.parse_args(["--data", str(data), "--checkpoint", str(folder / "model.pt"), "--cache", str(cache),
                             "--device", "cpu", "--batch", "2", "--tta", "none", *map(str, more)])


@pytest.fixture(scope="module")
def stores(tiny_data, cache, finished, tmp_path_factory):
    """Return a copy of the finished run with what it predicts, never stopped and without loader processes."""
    folder = shutil.copytree(run_of(finished), tmp_path_factory.mktemp("stores") / "run")
    infer.main(infer_line(tiny_data, cache, folder))
    return folder


@pytest.mark.parametrize("workers", [2, *slow(0)])
def test_a_terminated_prediction_leaves_no_scratch_file_and_carries_on_to_the_same_bytes(
        tiny_data, cache, finished, stores, tmp_path, workers):
    folder = shutil.copytree(run_of(finished), tmp_path / "run")
    args = infer_line(tiny_data, cache, folder, "--workers", workers)
    ended, said = script_in_a_fork(infer.main, args, tmp_path / "notes", common.os, "fsync", 2,
                                   lambda: os.killpg(0, signal.SIGTERM))
    assert ended == 143 and said.endswith("interrupted; the same command carries on\n")
    assert not list(folder.rglob("*.tmp")) and len(list(folder.glob(".valid.parts/*/*"))) == 1
    infer.main(args)
    for name in ("valid.npy", "valid.json", "test.npy", "test.json"):
        assert (folder / name).read_bytes() == (stores / name).read_bytes()


def test_a_finished_prediction_claims_no_device(tiny_data, cache, stores, monkeypatch, capsys):
    monkeypatch.setattr(infer, "claim_device", lambda *_: pytest.fail("a device was claimed"))
    infer.main(infer_line(tiny_data, cache, stores))
    assert capsys.readouterr().out.count("nothing to do") == 2


# a Python that answers make's plan for real; for one other script it only writes a file, stops make and waits
STOPPER = """#!{python} -SE
import os, signal, sys
line = " ".join(sys.argv[1:])
if line.startswith("ensemble.py plan") and "--ready" not in line:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
if "{call}" in line:
    os.makedirs(os.path.dirname("out/main/{name}"), exist_ok=True)
    open("out/main/{name}", "w").close()
    signal.signal({number}, signal.SIG_IGN)
    os.killpg(0, {number})  # make and its shells; their session is their group
    sys.exit(1)
"""
MADE = {"folds.csv": "train.py --check", f"r0/{MODEL}/s64/f0/model.pt": "train.py --data",
        f"r0/{MODEL}/s64/f0/test.json": "infer.py", "r1/pseudo/f0/manifest.json": "pseudo_label.py",
        "submission.csv": "ensemble.py soft"}


@pytest.mark.parametrize(("name", "number"), [
    *((name, signal.SIGTERM) for name in MADE), (f"r0/{MODEL}/s64/f0/model.pt", signal.SIGINT),
    *(pytest.param(name, signal.SIGINT, marks=pytest.mark.slow) for name in MADE if not name.endswith(".pt"))])
def test_make_stopped_after_a_file_is_written_and_before_its_script_ends_keeps_the_file(
        tiny_data, tmp_path, name, number):
    for needed in (*ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "requirements.txt"):
        shutil.copy(needed, tmp_path)
    stopper = tmp_path / "stopper"
    stopper.write_text(STOPPER.format(python=sys.executable, call=MADE[name], name=name, number=int(number)))
    stopper.chmod(0o755)
    make = subprocess.Popen(
        ["make", "submit", f"DATA={tiny_data}", f"MODELS={MODEL}", "SCALES=64", "FOLDS=0", "ROUNDS=1",
         "EPOCHS=1", "WEIGHTS=none", "PSEUDO_ARGS=--confident 0.5", "PY=./stopper"], cwd=tmp_path,
        env={"PATH": os.environ["PATH"]}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True)
    said = make.communicate()[1]
    with suppress(ProcessLookupError):
        os.killpg(make.pid, signal.SIGKILL)  # a script of which make didn't see the end
    assert make.returncode and (tmp_path / "out/main" / name).exists(), said


# ---- small losses ---------------------------------------------------------------------------------------------------


def test_random_streams_of_different_uses_differ(splits):
    def draw(*key):
        return tuple(np.random.default_rng(list(key)).integers(2 ** 62, size=4).tolist())
    assert draw(5, 3) == draw(5, 3, 0)  # what numpy does
    keys = [(common.ORDER, 5, 3), *((common.SAMPLE, 5, 3, i) for i in range(4)),
            *((common.STEP, 5, 3, step, rank) for step in range(4) for rank in range(3)),
            *((common.HOOK, 5, 3, step) for step in range(4)), (common.MIX, 5, 3)]
    assert len({draw(*key) for key in keys}) == len(keys)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        rng = np.random.default_rng
        patch.setattr(np.random, "default_rng", lambda key: seen.append(key[0]) or rng(key))
        list(common.EpochBatches(4, 2, 0))
        common.TrainSamples([(splits[0], 0, None)], lambda image, mask, rng: (image, mask), 0)[0, 0]
    assert seen == [common.ORDER, common.SAMPLE]


def test_parts_found_by_running_out_of_memory_are_kept_for_the_resumed_run(line, tmp_path, monkeypatch):
    args = line(tmp_path, "--batch", 4)
    start_run = train.start_run

    def start_in_parts(*arguments):
        run = start_run(*arguments)
        run.parts = max(run.parts, 2)
        return run
    with monkeypatch.context() as patch:
        patch.setattr(train, "start_run", start_in_parts)
        stop(args, patch, "backward", 4)  # the first of epoch 2
    seen = []
    at_call(monkeypatch, train, "backward", 0, None)
    backward = train.backward
    monkeypatch.setattr(train, "backward", lambda run, *rest: seen.append(run.parts) or backward(run, *rest))
    train.main(args)
    assert seen == [2] * 6


def test_an_abandoned_replacement_leaves_the_config_and_log_of_the_model_that_is_there(
        line, finished, tmp_path, monkeypatch):
    args = line(shutil.copytree(finished.exp, tmp_path / "exp"))
    before = {name: (run_of(args) / name).read_bytes() for name in ("model.pt", "config.json", "log.csv")}
    other = line(args.exp, "--seed", 3, "--replace")
    stop(other, monkeypatch, "backward", STEPS + 1)
    assert {name: (run_of(args) / name).read_bytes() for name in before} == before
    train.main(other)
    assert common.read_json(run_of(args) / "config.json")["recipe"]["seed"] == 3
    assert (run_of(args) / "log.csv").read_bytes() != before["log.csv"]
    assert not list(run_of(args).glob("last*"))
    assert files_of(run_of(args) / "replaced") == before


def test_a_class_that_the_fold_lacks_is_one_warning(line, tmp_path, capsys):
    square = [[4, 4, 20, 4, 20, 20, 4, 20]]
    data = write_coco(tmp_path / "data", [(i, 32, 32) for i in range(1, 7)],
                      [(i, 0, square) for i in range(1, 7)] + [(1, 1, square)])
    for fold in range(3):
        args = line(tmp_path / "exp", "--data", data, "--fold", fold, "--epochs", 1)
        train.main(args)
        held_out = [row["image_id"] for row in read_csv(tmp_path / "exp/folds.csv", ("fold",))
                    if row["fold"] == str(fold)]
        which = "training" if "1" in held_out else "validation"
        said = capsys.readouterr().out
        assert said.count("warning") == 1 and f"warning: no {which} image of fold {fold} has Metal\n" in said


# ---- gradients that are not finite ----------------------------------------------------------------------------------


def poison(patch, calls):
    """Make the loss NaN in these steps, counted from 1; return a list that gets the state before each step."""
    make_loss, backward, states = train.make_loss, train.backward, []

    def make_failing(*settings):
        loss = make_loss(*settings)
        return lambda *args: loss(*args) * (math.nan if len(states) in calls else 1)

    def noting(run, images, *rest):
        states.append({name: {k: v.clone() for k, v in values.items()} for name, values in (
            ("model", run.model.state_dict()), ("ema", run.ema.state_dict()),
            ("optimizer", {(i, k): v for i, state in run.optimizer.state_dict()["state"].items()
                           for k, v in state.items()}))})
        if len(states) in calls:
            images = images * math.nan  # what batch norm sees
        return backward(run, images, *rest)
    patch.setattr(train, "make_loss", make_failing)
    patch.setattr(train, "backward", noting)
    return states


@pytest.mark.parametrize("optimizer", [*train.OPTIMIZERS, "not fused"])
def test_steps_without_a_finite_gradient_change_nothing_and_are_counted(
        line, tmp_path, monkeypatch, capsys, optimizer):
    monkeypatch.setitem(train.OPTIMIZERS, "not fused", lambda groups, lr: torch.optim.NAdam(groups, lr=lr))
    args = line(tmp_path, "--epochs", 2)
    args.optimizer = optimizer
    states = poison(monkeypatch, {1, 6})
    train.main(args)
    for step in (1, 6):
        before, after = states[step - 1], states[step]
        assert all(torch.equal(v, after["model"][k]) for k, v in before["model"].items())
        for k, v in after["optimizer"].items():
            assert torch.equal(v, before["optimizer"].get(k, torch.zeros_like(v)))
    for state in states:
        assert all(v.isfinite().all() for values in state.values() for v in values.values())
    assert any(not torch.equal(v, states[2]["model"][k]) for k, v in states[1]["model"].items())
    with open(run_of(args) / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["skipped"] for row in rows] == ["1", "1"] and all(float(row["loss"]) > 0 for row in rows)
    assert capsys.readouterr().out.count("skipped 1 step(s)") == 2


def test_ten_such_steps_in_a_row_end_the_run_and_name_the_images_of_the_last(line, tmp_path, monkeypatch, splits):
    args = line(tmp_path, "--overfit", 2)  # 256 steps an epoch
    poison(monkeypatch, range(1, 100))
    with pytest.raises(UserError) as end:
        train.main(args)
    said = str(end.value)
    assert "\n" not in said and "10 steps in a row" in said and "--lr" in said and said.endswith("after the start")
    ids = said.split("with images ")[1].split(":")[0].split(", ")
    assert len(ids) == 2 and set(map(int, ids)) <= set(splits[0].ids)


def test_an_epoch_without_a_finite_step_ends_the_run_and_keeps_the_epoch_before(line, tmp_path, monkeypatch):
    args = line(tmp_path)
    poison(monkeypatch, range(STEPS + 1, STEPS * 2 + 1))
    with pytest.raises(UserError, match="epoch 2 is nan: lower --lr; kept is what was after epoch 1$"):
        train.main(args)
    state = torch.load(run_of(args) / "last.pt")
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["model"].values())


# ---- loader processes -----------------------------------------------------------------------------------------------


def test_a_killed_loader_process_is_one_line(line, tmp_path):
    args = line(tmp_path / "exp", "--workers", 1)
    code, said = script_in_a_fork(train.main, args, tmp_path / "notes", common.Split, "image", 5, kill_me)
    assert code == 1 and len(said.splitlines()) == 1, said
    assert said.startswith("a loader process failed: ") and "--workers" in said


@pytest.mark.parametrize("script", [train, infer])
def test_a_loader_process_that_is_stuck_is_one_line_and_not_for_ever(
        line, tiny_data, cache, finished, tmp_path, monkeypatch, script):
    """A process that waits for a lost disk doesn't die."""
    options = common.loader_options
    monkeypatch.setattr(script, "loader_options", lambda *given: options(*given) | {"timeout": 1})
    args = line(tmp_path / "exp", "--workers", 1)
    if script == infer:
        args = infer_line(tiny_data, cache, shutil.copytree(run_of(finished), tmp_path / "run"), "--workers", 1)
    started = time.monotonic()
    code, said = script_in_a_fork(script.main, args, tmp_path / "notes", common.Split, "image", 3,
                                  lambda: time.sleep(300))
    assert code == 1 and said == (
        "a loader process failed: DataLoader timed out after 1 seconds; too little memory, /dev/shm full or a slow "
        "disk? Lower --workers; the same command carries on\n") and time.monotonic() - started < 60


@pytest.fixture
def small_shared_memory():
    """Return a function (main, kilobytes) -> main with a /dev/shm of that size, which only it sees."""
    mount = "mount --make-rprivate / && mount -t tmpfs -o size={}k tmpfs /dev/shm"
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount.format(64)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small /dev/shm is not permitted here: {done.stderr.strip()}")

    def with_small(main, kilobytes):
        def run(args):
            new_mounts = 0x20000  # CLONE_NEWNS in sched.h
            ctypes.CDLL(None).unshare(new_mounts)
            subprocess.run(["sh", "-c", mount.format(kilobytes)], check=True)
            main(args)
        return run
    return with_small


@pytest.mark.parametrize(("script", "kilobytes"), [(train, 300), (infer, 160)])  # room for queues, not for validation
@pytest.mark.parametrize("is_filled_later", [False, True])  # by another job
def test_a_small_shared_memory_is_one_line_and_no_run_waits_for_ever(
        line, tiny_data, cache, finished, tmp_path, monkeypatch, small_shared_memory, script,
        kilobytes, is_filled_later):
    args = line(tmp_path / "exp", "--workers", 2)
    if script == infer:
        args = infer_line(tiny_data, cache, shutil.copytree(run_of(finished), tmp_path / "run"), "--workers", 2)
    if is_filled_later:
        monkeypatch.setattr(script, "check_shared_memory", lambda *_: None)
    code, said = script_in_a_fork(small_shared_memory(script.main, kilobytes), args, tmp_path / "notes")
    assert code == 1 and len(said.splitlines()) == 1, said
    assert "--workers" in said and said.startswith(
        "a loader process failed: unable to allocate shared memory" if is_filled_later else "/dev/shm: 2 loader pro")


def test_shared_memory_of_just_the_size_that_is_asked_for_is_enough(line, finished, tmp_path, small_shared_memory):
    args = line(tmp_path / "exp", "--workers", 2)
    small_main = small_shared_memory(train.main, 64)
    _, said = script_in_a_fork(small_main, args, tmp_path / "notes")
    wanted = int(re.search("want ([0-9,]+) bytes", said)[1].replace(",", ""))
    code, said = script_in_a_fork(small_shared_memory(train.main, math.ceil(wanted / 1024)), args, tmp_path / "more")
    assert code == 0 and model_bytes(args) == model_bytes(finished), said


@pytest.mark.parametrize(("workers", "damage"), [(1, "cut"), (0, "gone")])
def test_a_photo_that_breaks_while_training_is_named_in_one_line(line, tiny_data, tmp_path, workers, damage):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    args = line(tmp_path / "exp", "--data", data, "--workers", workers)
    coco = common.read_json(data / "train.json")

    def break_all():
        for image in coco["images"]:
            path = data / image["file_name"]
            path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:300])
    code, said = script_in_a_fork(train.main, args, tmp_path / "notes", common.Split, "image", 1, break_all)
    assert code == 1 and len(said.splitlines()) == 1, said
    assert any(f"image {image['id']} ({image['file_name']}) has changed: " in said for image in coco["images"])


# ---- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Return a function (megabytes) -> folder on a disk of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(megabytes):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder],
                              capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
        return folder
    yield mount
    subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def test_too_little_space_is_said_before_training_begins(line, small_disk):
    with pytest.raises(UserError, match=r"^.*/f1: [\d,]+ bytes are needed there, [\d,]+ are free$") as refusal:
        train.main(line(small_disk(1)))
    needed, free = (int(text.replace(",", "")) for text in str(refusal.value).replace("are needed", "").split(": ")[1]
                    .replace(" bytes ", "").replace(" are free", "").split(" there, "))
    assert needed > 2 ** 20 > free


def test_too_little_space_for_a_store_is_said_before_anything_is_predicted(
        tiny_data, cache, finished, small_disk, monkeypatch):
    size = (run_of(finished) / "model.pt").stat().st_size
    folder = shutil.copytree(run_of(finished), small_disk(size // 2 ** 20 + 5) / "run")
    monkeypatch.setattr(infer, "predict_probs", lambda *_: pytest.fail("prediction began"))
    needed = 2 * 5 * 12 * 256 * 256  # the store and its parts
    with pytest.raises(UserError, match=f"{folder}: {needed:,} bytes are needed there, [0-9,]+ are free"):
        infer.main(infer_line(tiny_data, cache, folder))


def fill(folder, leave):
    """Write a file that leaves `leave` bytes of the disk."""
    (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - leave))


@pytest.mark.parametrize("leave", [100_000, *slow(0)])  # nothing can be written; the first part of a checkpoint can
def test_a_disk_that_fills_up_while_training_is_one_line_and_the_last_checkpoint_is_whole(
        line, finished, small_disk, tmp_path, leave):
    args = line(small_disk(40))
    shutil.copy(finished.exp / "folds.csv", args.exp)
    code, said = script_in_a_fork(train.main, args, tmp_path / "notes", train, "backward", STEPS * 2 + 1,
                                  lambda: fill(args.exp, leave))
    assert code == 1 and len(said.splitlines()) == 1, said
    assert f"{run_of(args)}/" in said and ("No space left" in said or "is the disk full?" in said)
    assert common.load_checkpoint(run_of(args) / "last.pt")["epoch"] == 2 and not list(args.exp.rglob("*.tmp"))
    (args.exp / "filler").unlink()
    train.main(args)
    assert model_bytes(args) == model_bytes(finished)


def test_a_disk_that_fills_up_while_predicting_is_one_line(tiny_data, cache, stores, finished, small_disk, tmp_path):
    folder = shutil.copytree(run_of(finished), small_disk(40) / "run")
    args = infer_line(tiny_data, cache, folder)
    code, said = script_in_a_fork(infer.main, args, tmp_path / "notes", infer, "predict_probs", 2,
                                  lambda: fill(folder, 100_000))
    assert code == 1 and said.splitlines()[-1].endswith("No space left on device") and f"{folder}/" in said
    (folder / "filler").unlink()
    infer.main(args)
    for name in ("valid.npy", "valid.json", "test.npy", "test.json"):
        assert (folder / name).read_bytes() == (stores / name).read_bytes()


def test_a_folder_that_cannot_be_written_is_one_line(line, finished, small_disk, tmp_path):
    disk = small_disk(40)
    args = line(disk / "exp")
    shutil.copytree(finished.exp, args.exp)
    (run_of(args) / "model.pt").unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, said = script_in_a_fork(train.main, args, tmp_path / "notes")
    assert code == 1 and len(said.splitlines()) == 1 and os.strerror(errno.EROFS) in said and str(args.exp) in said


def test_a_folder_that_is_removed_while_training_is_one_line_and_stays_away(line, tmp_path):
    args = line(tmp_path / "exp")
    code, said = script_in_a_fork(train.main, args, tmp_path / "notes", train, "backward", STEPS + 1,
                                  lambda: shutil.rmtree(args.exp))
    assert code == 1 and said == f"{run_of(args)} was removed: training stops\n" and not args.exp.exists()


def test_a_folder_that_another_run_has_taken_is_left_to_it(line, tmp_path):
    args = line(tmp_path / "exp")

    def take():
        shutil.rmtree(args.exp)
        run_of(args).mkdir(parents=True)
        (run_of(args) / ".lock").write_text("pid 1 on another machine\n")
    code, said = script_in_a_fork(train.main, args, tmp_path / "notes", train, "backward", STEPS + 1, take)
    assert code == 1 and said == f"{run_of(args)} was removed: training stops\n"
    assert [path.name for path in run_of(args).iterdir()] == [".lock"]


# ---- the network ----------------------------------------------------------------------------------------------------

NO_NETWORK = '''
import os, socket
def refuse(what, call):
    def checked(*args, **kwargs):
        target = args[0] if what == "name" else args[1]
        if str(target[0] if isinstance(target, tuple) else target) not in ("127.0.0.1", "localhost", "None") and not (
                what == "connect" and args[0].family == socket.AF_UNIX):
            open(os.environ["CALLS"], "a").write(f"{what} {target}\\n")
            raise (socket.gaierror(-3, "Temporary failure in name resolution") if what == "name"
                   else OSError(101, "Network is unreachable"))
        return call(*args, **kwargs)
    return checked
socket.getaddrinfo = refuse("name", socket.getaddrinfo)
socket.socket.connect = refuse("connect", socket.socket.connect)
'''


@pytest.fixture
def offline(tmp_path):
    """Return the environment of a process whose attempts to reach the network fail and are noted in the file CALLS."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NO_NETWORK)
    hidden = ("HF_", "NO_ALBUMENTATIONS_UPDATE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(hidden)}, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(tmp_path / "site"), "CALLS": str(tmp_path / "calls"), "HF_HOME": str(tmp_path / "hub")}


def run_offline(offline, script, *argv):
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, argv)], env=offline, capture_output=True,
                          text=True, timeout=100)
    calls = Path(offline["CALLS"])
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.slow
def test_nothing_asks_the_network_and_pretrained_weights_fail_at_once_with_what_to_do(
        offline, tiny_data, cache, tmp_path):
    line = ["--data", tiny_data, "--exp", tmp_path / "exp", "--cache", cache, "--model", MODEL, "--scale", 64,
            "--folds", 3, "--epochs", 1, "--batch", 4, "--device", "cpu"]
    done, calls = run_offline(offline, "train.py", *line, "--weights", "none")
    assert done.returncode == 0 and calls == [], (done.stderr, calls)
    done, calls = run_offline(offline, "infer.py", "--data", tiny_data, "--cache", cache, "--checkpoint",
                              tmp_path / f"exp/r0/{MODEL}/s64/f0/model.pt", "--device", "cpu")
    assert done.returncode == 0 and calls == [], (done.stderr, calls)
    done, calls = run_offline(offline, "train.py", *line, "--weights", "imagenet", "--model", "fpn/resnet18")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "--weights FILE" in done.stderr, done.stderr
    assert calls == ["name huggingface.co"]  # once, where the hub itself tries for half a minute
