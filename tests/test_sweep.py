"""Test train.py --sweep: killed, shared or refused, it does each trial once, and what it says of the best is right."""
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
from conftest import ROOT, run_folder
from PIL import Image

import common
import train
from common import UserError

MODEL = "fpn-narrow/tu-mobilenetv3_small_050"
SPACE = {"model": (MODEL, "unet/tu-test_efficientnet"), "lr": ("log", 1e-4, 1e-2), "loss": ("ce", "lovasz"),
         "seed": (0, 1)}
EPOCHS, UNPRUNED = 6, ("--epochs", 1)  # nothing is pruned at the last epoch
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def cache(tiny_data, tmp_path_factory):
    """Return a cache that is filled: a forked child can't paint, once its parent has started a fork server."""
    cache = tmp_path_factory.mktemp("cache")
    common.load_data(tiny_data, cache)
    return cache


@pytest.fixture
def sweep(tiny_data, cache, tmp_path, monkeypatch):
    """Return a function (trials, more arguments) that runs a sweep in tmp_path/exp and returns its study."""
    monkeypatch.setattr(train, "SEARCH_SPACE", SPACE)

    def run(trials, *more, seeds=2):
        train.main(train.parse_args([
            "--sweep", str(trials), "--sweep-seeds", str(seeds), "--data", str(tiny_data), "--exp",
            str(tmp_path / "exp"), "--cache", str(cache), "--model", MODEL, "--scale", "64", "--folds", "3",
            "--epochs", str(EPOCHS), "--batch", "4", "--weights", "none", "--device", "cpu", *map(str, more)]))
        return study(tmp_path / "exp")
    return run


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Return a function that replaces training; what it returns lists the [folder, process] of all runs so far.

    It takes the v3 as a function of (number of the call, arguments, epoch) and what else happens at (call, epoch). The
    first call of a process is 0.
    """
    def put(v3_of, at=lambda call, epoch: None):
        calls = iter(range(1000))

        def train_run(args, root, report=None, wait=False):
            assert wait  # another process of the sweep may be at the same run
            call = next(calls)
            with open(tmp_path / "trace", "a") as f:
                print(root.name, os.getpid(), file=f)
            for epoch in range(1, args.epochs + 1):
                at(call, epoch)
                if report:
                    report(epoch, v3_of(call, args, epoch))
            return v3_of(call, args, args.epochs)
        monkeypatch.setattr(train, "train_run", train_run)
        return lambda: [line.split() for line in (tmp_path / "trace").read_text().splitlines()]
    return put


def study(exp):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{exp}/sweep/study.db")


def states(study):
    """Return a letter for each trial: Complete, Pruned, Fail, Running, Waiting."""
    return "".join(trial.state.name[0] for trial in study.trials)


def slope(call, args, epoch):
    """Return a v3 that is another for every recipe and seed."""
    return 0.5 + args.lr + 0.001 * args.seed


# ---- killed, stopped, shared ----------------------------------------------------------------------------------------


def test_killed_sweep_tries_the_same_values_again_and_a_finished_one_does_nothing_more(sweep, fake, tmp_path, capsys):
    def kill(call, epoch):
        if call == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    fake(slope, kill)
    child = fork.Process(target=sweep, args=(6, *UNPRUNED))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and states(study(tmp_path / "exp")) == "CCR"
    runs = fake(slope)
    done = sweep(6, *UNPRUNED)
    assert states(done) == "CCFCCCC" and done.trials[3].params == done.trials[2].params
    roots = [root for root, _ in runs()]
    assert roots[2] == roots[3] and len(set(roots[:7])) == 6
    csv = pd.read_csv(tmp_path / "exp/sweep/trials.csv")
    assert csv.state.tolist() == [trial.state.name for trial in done.trials] and csv.value.max() == done.best_value
    assert csv.user_attrs_folder.tolist() == roots[:7]
    Image.open(tmp_path / "exp/sweep/importance.png").verify()
    said = capsys.readouterr().out
    assert said.count("\ntrial ") + said.startswith("trial ") == 4
    assert states(sweep(6, *UNPRUNED)) == "CCFCCCC" and {root for root, _ in runs()} == set(roots)
    assert capsys.readouterr().out == said[said.index("best setting"):]
    assert states(sweep(7, *UNPRUNED)) == "CCFCCCCC"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interruption_or_full_disk_ends_the_sweep_and_the_same_values_come_first_next_time(sweep, fake, error):
    def stop(call, epoch):
        if call == 1:
            raise error
    fake(slope, stop)
    with pytest.raises(error):
        sweep(3)
    fake(slope)
    assert states(sweep(1)) == "CFW"  # enough trials already: it waits until more are wanted
    done = sweep(3)
    assert states(done) == "CFCC" and done.trials[1].params == done.trials[2].params


def test_two_processes_share_a_study_and_do_no_trial_twice(sweep, fake, tmp_path, capfd):
    both = fork.Barrier(2)

    def meet(call, epoch):
        if call == 0:
            both.wait(60)  # each holds a trial
    runs = fake(slope, meet)
    children = [fork.Process(target=sweep, args=(6, *UNPRUNED)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    done = study(tmp_path / "exp")
    assert states(done) == "CCCCCC"
    folders = [trial.user_attrs["folder"] for trial in done.trials]
    trained = [(root, pid) for root, pid in runs() if root in folders]
    assert len({root for root, _ in trained}) == len(set(folders)) == 6 and len({pid for _, pid in trained}) == 2
    assert "best setting" in capfd.readouterr().out


def test_process_begins_no_trial_while_the_last_ones_run_elsewhere(sweep, fake, tmp_path, capfd):
    both, first_is_over = fork.Barrier(2), fork.Event()

    def run(is_first):
        def meet(call, epoch):
            if call == 0:
                both.wait(60)
                assert is_first or first_is_over.wait(60)
        fake(slope, meet)
        sweep(2, *UNPRUNED)
        if is_first:
            first_is_over.set()
    children = [fork.Process(target=run, args=(is_first,)) for is_first in (True, False)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0] and states(study(tmp_path / "exp")) == "CC"
    said = capfd.readouterr().out
    assert said.count("1 trials still run in other processes") == said.count("best setting, v3") == 1


# ---- pruned and failed trials ---------------------------------------------------------------------------------------


def test_hopeless_trial_is_pruned_after_a_third_of_its_epochs_and_never_at_the_last(sweep, fake):
    def v3(call, args, epoch):
        if call == 6:
            return 0.6  # best but for the last epoch
        return 0.0 if call in (1, 5) else 0.9 if epoch == EPOCHS else 0.5
    fake(v3)
    done = sweep(7)
    assert states(done) == "CCCCCPC"  # the first five have nothing to be compared with
    assert list(done.trials[5].intermediate_values) == list(range(1, EPOCHS // 3 + 1))
    assert done.trials[5].value == 0.0 and done.trials[6].value == 0.6


def test_recipe_that_cannot_run_counts_as_a_trial_and_the_sweep_goes_on(sweep, fake, tmp_path, capsys):
    def fail(call, epoch):
        if call == 1:
            raise UserError("the loss of epoch 1 is nan")
    fake(slope, fail)
    assert states(sweep(4)) == "CPCC"
    assert capsys.readouterr().out.count("the loss of epoch 1 is nan\n") == 1
    assert pd.read_csv(tmp_path / "exp/sweep/trials.csv").user_attrs_error[1] == "the loss of epoch 1 is nan"
    assert not (tmp_path / "exp/sweep/importance.png").exists()  # of three trials it would say nothing


def test_sweep_without_one_complete_trial_says_where_to_look(sweep, fake):
    def fail(call, epoch):
        raise UserError("no")
    fake(slope, fail)
    with pytest.raises(UserError, match=r"trials.csv: no trial is complete"):
        sweep(2)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "message"), [
    ({"lrr": ("log", 1e-3, 1e-2)}, "lrr .*no option of RECIPE"), ({"device": ("cpu",)}, "device .*no option of RECIPE"),
    ({"lr": ("log", 1e-3, 20)}, "SEARCH_SPACE: lr: 20 is not from 0 to 10$"), ({"loss": "ce"}, "loss 'ce': .*choices"),
    ({"loss": ("ce", "focall")}, "SEARCH_SPACE: loss: 'focall' is none of iou_ce, ce, "),
    ({"model": ("fpm/resnet18",)}, "SEARCH_SPACE: model: 'fpm/resnet18' is not DECODER"),
    ({"batch": ("even", 2, 8.5)}, "SEARCH_SPACE: batch: .*8.5"), ({"lr": ("log", 0, 1)}, "lr .*low"),
    ({"lr": ("even", 1, 0.5)}, "lr .*low"), ({"lr": ("log", 1e-3)}, "lr .*high"), ({"lr": ()}, r"lr \(\)")])
def test_mistake_in_the_search_space_is_one_line_before_any_trial(sweep, fake, tmp_path, monkeypatch, capfd, entry,
                                                                  message):
    fake(lambda *_: pytest.fail("a trial began"))
    monkeypatch.setattr(train, "SEARCH_SPACE", SPACE | entry)
    with pytest.raises(UserError, match=message) as error:
        sweep(2)
    assert "\n" not in str(error.value) and "SEARCH_SPACE" in str(error.value)
    assert capfd.readouterr().err == "" and not (tmp_path / "exp").exists()


@pytest.mark.parametrize(("wrong", "message"), [
    (["--data", "nosuch"], "nosuch"), (["--snapshots", 9], "--snapshots 9"), (["--fold", 3], "--fold 3"),
    (["--weights", "nosuch"], "--weights nosuch"), (["--device", "nosuch"], "--device nosuch"),
    (["--round", 1], "pseudo labels")])
def test_wrong_arguments_end_the_sweep_at_once(sweep, fake, wrong, message):
    fake(lambda *_: pytest.fail("a trial began"))
    with pytest.raises(UserError, match=message) as error:
        sweep(2, *wrong)
    assert "\n" not in str(error.value) and "SEARCH_SPACE" not in str(error.value)


@pytest.mark.parametrize("job", [["--check"], ["--overfit", 2], ["--runtimes", "table.csv"]])
def test_another_job_of_train_py_beside_the_sweep_is_refused(sweep, fake, job, tmp_path, monkeypatch, capsys):
    fake(lambda *_: pytest.fail("a trial began"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, UserError)) as error:  # by argparse or check_args
        sweep(2, *job)
    said = f"{error.value} {capsys.readouterr().err}"
    assert job[0] in said and "--sweep" in said and said.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_ends_the_sweep_at_once(sweep, fake, tmp_path):
    fake(lambda *_: pytest.fail("a trial began"))
    (tmp_path / "exp").touch()
    with pytest.raises(OSError, match="exp"):
        sweep(2)


def test_study_begun_with_other_values_is_refused_with_those_that_differ(sweep, fake, monkeypatch):
    fake(slope)
    sweep(2)
    with pytest.raises(UserError, match=r"other values: epochs 6 -> 7, ema 0.998 -> 0.9; "):
        sweep(3, "--ema", 0.9, "--epochs", 7)
    monkeypatch.setattr(train, "SEARCH_SPACE", SPACE | {"seed": (0,)})
    with pytest.raises(UserError, match=r"other values: SEARCH_SPACE seed \[0, 1\] -> \[0\]; "):
        sweep(3)
    monkeypatch.setattr(train, "SEARCH_SPACE", SPACE)
    # what is searched, and what decides nothing, may differ
    assert states(sweep(3, "--model", "unet/resnet18", "--lr", 1, "--seed", 7, "--workers", 1)) == "CCC"


def test_weights_of_a_file_fix_the_model(sweep, fake, tmp_path, monkeypatch, capsys):
    built = []
    monkeypatch.setattr(train, "start_model", lambda args, *_: built.append(args.model))
    (tmp_path / "my.pth").write_text("")
    fake(slope)
    assert set(sweep(2, "--weights", tmp_path / "my.pth").trials[0].params) == set(SPACE) - {"model"}
    assert "model is not searched" in capsys.readouterr().out and built == [MODEL]


def test_models_are_searched_with_a_folder_of_weights_whose_content_is_fixed(sweep, fake, tmp_path):
    fake(slope)
    folder = tmp_path / "weights"
    folder.mkdir()
    encoders = sorted({model.partition("/")[2].removeprefix("tu-") for model in SPACE["model"]})
    for encoder in encoders[:-1]:
        (folder / f"{encoder}.pth").write_text(encoder)
    with pytest.raises(UserError, match=f"SEARCH_SPACE.*0 files are named after the encoder {encoders[-1]}"):
        sweep(2, "--weights", folder)
    (folder / f"{encoders[-1]}.pth").write_text("a")
    assert "model" in sweep(2, "--weights", folder).trials[0].params
    (folder / f"{encoders[-1]}.pth").write_text("b")
    with pytest.raises(UserError, match="begun with other values: weights "):
        sweep(3, "--weights", folder)


# ---- the result -----------------------------------------------------------------------------------------------------


def pasted(data, knobs):
    """Return the arguments that `make train` gives train.py, if knobs are pasted behind it."""
    done = subprocess.run(["make", "-n", "train", f"DATA={data}", "EXP=pasted", "SCALE=64", "FOLD=1", "SEED=5",
                           f"PY={sys.executable}", *shlex.split(knobs)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.replace("\\\n", " ")
    return train.parse_args(shlex.split(re.search(r"train\.py (--data .* --round .*)", printed)[1]))


def test_best_setting_is_judged_by_other_seeds(sweep, fake, capsys, tiny_data):
    trials = 5

    def v3(call, args, epoch):
        return (0.3, 0.42, 0.6, 0.55, 0.2)[call] if call < trials else (0.50, 0.52, 0.57)[call - trials]
    fake(v3)
    done = sweep(trials, "--ema", 0.9, seeds=3)
    said, best = capsys.readouterr().out, done.trials[2].params
    seeds = [seed for seed in range(4) if seed != best["seed"]][:3]
    spread = statistics.stdev([0.50, 0.52, 0.57])
    assert "best setting, v3 0.6000 in trial 2:\n" in said
    assert (f"with the seeds {', '.join(map(str, seeds))}: v3 mean 0.5300, standard deviation {spread:.4f}, range "
            "0.5000 to 0.5700\n") in said
    assert f"trial 3, is 0.0500 below the best, {0.05 / spread:.1f} standard deviations" in said
    assert "are noise" in said
    run = pasted(tiny_data, re.search("^  (MODEL=.*)$", said, re.M)[1])
    assert {name: getattr(run, name) for name in SPACE if name != "seed"} == {k: best[k] for k in best if k != "seed"}
    assert (run.ema, run.batch, run.epochs, run.weights, run.seed) == (0.9, 4, EPOCHS, "none", 5)


def test_one_setting_tried_with_two_seeds_is_no_second_best(sweep, fake, monkeypatch, capsys):
    monkeypatch.setattr(train, "SEARCH_SPACE", {"model": (MODEL,), "seed": (0, 1)})
    fake(slope)
    sweep(4)
    assert "second best" not in capsys.readouterr().out


def test_make_passes_its_knobs(tiny_data):
    knobs = {"DATA": tiny_data, "EXP": "e", "MODELS": "unet/b fpn/a", "SCALE": 96, "FOLDS": "2 1", "EPOCHS": 7,
             "TRIALS": 11, "LAUNCH": "nice -n 5", "PY": sys.executable, "TRAIN_ARGS": "--ema 0.5", "PER_GPU": 2}
    plan = subprocess.run(["make", "-n", "sweep", *(f"{k}={v}" for k, v in knobs.items())], cwd=ROOT, text=True,
                          capture_output=True, check=True, env={"PATH": os.environ["PATH"]})
    assert plan.stderr == ""
    line = shlex.split(plan.stdout.replace("\\\n", " ").strip().splitlines()[-1])
    assert line[:5] == ["nice", "-n", "5", sys.executable, "train.py"]
    args = train.parse_args(line[5:])
    assert (args.sweep, args.model, args.scale, args.fold, args.device) == (11, "unet/b", 96, 2, "auto")
    assert args.per_gpu == 2
    assert (args.epochs, args.ema, str(args.exp), args.data) == (7, 0.5, "out/e", tiny_data)


def test_process_claims_its_gpu_once(monkeypatch, tmp_path):
    import torch
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(common.time, "sleep", lambda _: pytest.fail("the process waits for its own GPU"))
    monkeypatch.setattr(common, "run_kernel", torch.device)
    for name, value in {"is_available": True, "device_count": 1, "set_device": None,
                        "get_device_properties": SimpleNamespace(uuid="a")}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    common.claim_device.cache_clear(), common.idle_gpu.cache_clear()
    try:
        assert common.claim_device("auto") == common.claim_device() == torch.device("cuda", 0)
    finally:
        common.claim_device.cache_clear(), common.idle_gpu.cache_clear()


# ---- real training --------------------------------------------------------------------------------------------------


def test_real_runs_are_found_done_and_tensorboard_has_v3_of_every_epoch(sweep, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log_row, seen = train.log_row, []

    def log_and_read(run, row, args, recipe, out):
        log_row(run, row, args, recipe, out)
        events = EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        seen.append({e.step: e.value for e in events.Scalars("v3")})
    monkeypatch.setattr(train, "log_row", log_and_read)
    monkeypatch.setattr(train, "SEARCH_SPACE", {"model": (MODEL,), "lr": (1e-3, 1e-2)})
    line = ("--epochs", 2, "--logger", "tensorboard")
    done = sweep(1, *line)
    monkeypatch.setattr(train, "train_one_epoch", lambda *_: pytest.fail("it trains again"))
    sweep(1, *line)
    root = tmp_path / "exp/sweep" / done.trials[0].user_attrs["folder"]
    run = run_folder(root, 0, MODEL, 64, 0)
    log = pd.read_csv(run / "log.csv")
    assert done.trials[0].intermediate_values == pytest.approx(dict(zip(log.epoch, log.v3, strict=True)))
    assert done.best_value == pytest.approx(log.v3[1]) and len(list(root.parent.rglob("model.pt"))) == 3
    v3s = dict(zip(log.epoch, log.v3, strict=True))
    assert seen[:2] == [pytest.approx({1: v3s[1]}), pytest.approx(v3s)]  # at once, after each epoch


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
train.SEARCH_SPACE = {"model": ("fpn-narrow/tu-mobilenetv3_small_050",), "lr": ("log", 1e-3, 1e-2), "seed": (0, 1)}
save, n_saved = train.save_checkpoint, 0
def save_and_die(path, **state):
    global n_saved
    save(path, **state)
    n_saved += path.name == "last.pt"
    if path.name == "last.pt" and n_saved == int(os.environ["KILL"]): os.kill(os.getpid(), signal.SIGKILL)
train.save_checkpoint = save_and_die
if __name__ == "__main__": train.run_script(train.main, train.parse_args())
"""


@pytest.mark.slow
def test_really_killed_sweep_of_six_resumes_in_the_middle_of_a_run(tiny_data, cache, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    line = [sys.executable, str(tmp_path / "script.py"), str(ROOT), "--sweep", "6", "--sweep-seeds", "2", "--data",
            str(tiny_data), "--exp", str(tmp_path / "exp"), "--cache", str(cache), "--scale", "64", "--folds",
            "3", "--epochs", "2", "--batch", "4", "--weights", "none", "--device", "cpu"]
    texts = []
    for kill in (5, 3, 0, 0):  # after the third trial's first epoch, the fourth's last, never
        run = subprocess.run(line, env=os.environ | {"KILL": str(kill)}, capture_output=True, text=True)
        assert run.returncode == (-signal.SIGKILL if kill else 0), run.stdout + run.stderr
        texts.append(run.stdout)
    done = study(tmp_path / "exp")
    assert sum(trial.state.is_finished() and trial.state.name != "FAIL" for trial in done.trials) == 6
    folders = [trial.user_attrs["folder"] for trial in done.trials]
    assert states(done).count("F") == 2 and len(set(folders)) == 6
    for folder in set(folders):
        assert len(re.findall(f"{folder}.* epoch 1/2 ", "".join(texts))) <= 1  # what was saved is not trained again
    assert len(pd.read_csv(tmp_path / "exp/sweep/trials.csv")) == 8
    Image.open(tmp_path / "exp/sweep/importance.png").verify()
    assert " epoch " not in texts[3] and "best setting" in texts[3]
