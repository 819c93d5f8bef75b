"""One run by several processes: what they compute together, who writes, how they end and carry on.

A helper process imports the libraries once and forks the ranks of each quick test, with the variables that torchrun
sets; make and the tests marked slow start torchrun itself.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_csv

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
MODEL = "fpn-narrow/tu-mobilenetv3_small_050"
RUN = f"r0/{MODEL}/s64/f1"
# 5 of the 14 photos are held out: the other 9 are two batches of 5, of which the ranks have 3 and 2
EPOCHS, LEARN, VALID = 2, 9, 5


# ---- in the helper and its forks ------------------------------------------------------------------------------------


def serve():
    """Fork the ranks of every job on stdin, a line of JSON; answer with their exit codes, negative for a signal."""
    for name in ("albumentations", "cv2", "segmentation_models_pytorch", "timm.utils", "torch.distributed",
                 "torch.utils.data", "train", "infer"):
        __import__(name)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        pids = {}
        for rank in range(job["ranks"]):
            if not (pid := os.fork()):
                os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"]),
                                   "LOCAL_WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1",
                                   "MASTER_PORT": port})
                run_rank(rank, **job)
            pids[pid] = rank
        codes = [None] * job["ranks"]
        while None in codes:
            pid, status = os.wait()
            codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
            for other in pids if status else ():  # as torchrun does
                os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def run_rank(rank, function, notes, ranks, **options):
    """Call `function` in a fork, which then ends; it writes its output to files in `notes`."""
    code = 1
    signal.alarm(300)  # ranks that wait for each other for ever
    try:
        for descriptor, name in ((0, os.devnull), (1, f"{notes}/out{rank}"), (2, f"{notes}/err{rank}")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        globals()[function](rank, Path(notes), **options)
        code = 0
    except SystemExit as e:
        code = e.code
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def note_writes(written):
    """Note the path of every file that this process creates, changes or renames from now on."""
    def hook(event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) or event in ("os.rename", "os.remove"):
            written.append(os.fspath(arguments[0]) if not isinstance(arguments[0], int) else "")
    sys.addaudithook(hook)


def train_rank(rank, notes, argv, die_after=None):
    """Run train.py; note the keys that it saw, what it wrote, what a batch hook drew and its weights at the end.

    It may die after an epoch.
    """
    import torch

    import common
    import train
    keys, written, draws, fit, log_row = [], [], [], train.fit, train.log_row
    note_writes(written)

    def fit_and_note(run, *rest):
        fit(run, *rest)
        torch.save({"keys": keys, "written": written, "draws": draws, "ema": run.ema.state_dict(),
                    "frozen": [name for name, p in run.model.named_parameters() if not p.requires_grad],
                    "model": {name: p.detach() for name, p in run.model.named_parameters()}},
                   notes / f"rank{rank}.pt")

    def log_row_and_die(run, row, *rest):
        log_row(run, row, *rest)
        if row["epoch"] == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    class Noting(common.TrainSamples):
        def __getitem__(self, key):
            keys.append(key)
            return super().__getitem__(key)
    train.fit, train.log_row, train.TrainSamples = fit_and_note, log_row_and_die, Noting
    train.BATCH_HOOKS["none"] = lambda images, masks, rng: draws.append(rng.random()) or (images, masks)
    common.run_script(train.main, train.parse_args(argv))


def evaluate_rank(rank, notes, argv, checkpoint):
    """Validate a finished model as train.py does and note its counts."""
    from types import SimpleNamespace

    import common
    import train
    args = train.parse_args(argv)
    device = common.claim_device("cpu")
    splits = common.load_data(args.data, args.cache)
    folds = common.load_folds(args.exp, splits[0], args.folds)
    loaded = common.load_model(Path(checkpoint))
    run = SimpleNamespace(ema=SimpleNamespace(module=loaded.model), device=device, mean=loaded.recipe["mean"],
                          std=loaded.recipe["std"])
    learn, held = np.flatnonzero(folds != 1), np.flatnonzero(folds == 1)
    _, loader = train.make_loaders(args, (*splits, []), learn, held, cuda=False)
    np.save(notes / f"counts{rank}.npy", train.evaluate(run, loader, len(loaded.classes)))


def infer_rank(rank, notes, argv, die_after=None):
    """Run infer.py; note how many batches this rank has predicted. Rank 1 may die in the middle of a batch."""
    import common
    import infer
    predict, batches = infer.predict_probs, []

    def count_and_predict(*rest):
        if rank == 1 and len(batches) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        batches.append(1)
        return predict(*rest)
    infer.predict_probs = count_and_predict
    common.run_script(infer.main, infer.parse_args(argv))
    (notes / f"batches{rank}").write_text(str(len(batches)))


# ---- what the tests share -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_ranks():
    """Return a function that runs one of the functions above in some ranks and returns their exit codes."""
    helper = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=ENV)

    def run(ranks, function, notes, **options):
        notes.mkdir(parents=True, exist_ok=True)
        job = {"ranks": ranks, "function": function, "notes": str(notes)} | options
        print(json.dumps(job), file=helper.stdin, flush=True)
        return json.loads(helper.stdout.readline())
    yield run
    helper.stdin.close()
    assert helper.wait(60) == 0


@pytest.fixture(scope="module")
def argv(tiny_data, tmp_path_factory):
    """Return a function (experiment, further arguments) -> command line of train.py."""
    cache = tmp_path_factory.mktemp("cache")

    def line(exp, *more, model=MODEL):
        options = ("--data", tiny_data, "--exp", exp, "--cache", cache, "--model", model, "--scale", 64, "--fold", 1,
                   "--folds", 3, "--batch", 5, "--epochs", EPOCHS, "--weights", "none", "--device", "cpu",
                   "--save-every", 0, *more)
        return [str(word) for word in options]
    return line


@pytest.fixture(scope="module")
def finished(run_ranks, argv, tmp_path_factory):
    """Return the experiment of an uninterrupted run by two ranks, with their notes."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_ranks(2, "train_rank", folder / "notes", argv=argv(folder)) == [0, 0], errors(folder / "notes")
    return folder


def errors(notes):
    return "\n".join(path.read_text() for path in sorted(notes.glob("err*")))


def load(path):
    import torch
    return torch.load(path, weights_only=True)


def assert_equal(ours, theirs):
    import torch
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_ranks_agree(notes):
    first, second = load(notes / "rank0.pt"), load(notes / "rank1.pt")
    for name in ("model", "ema"):
        assert_equal(first[name], second[name])


# ---- training -------------------------------------------------------------------------------------------------------


def test_two_ranks_share_full_batches_that_have_every_image_of_an_epoch(finished):
    from common import EpochBatches
    shares = [load(finished / f"notes/rank{rank}.pt")["keys"] for rank in (0, 1)]
    assert [len(share) for share in shares] == [EPOCHS * 2 * 3, EPOCHS * 2 * 2]
    assert {key for share in shares for key in share} == {(e, i) for e in range(EPOCHS) for i in range(LEARN)}
    first, second = EpochBatches(LEARN, 5, 0)  # of one process
    assert sorted(shares[0][:3] + shares[1][:2]) == sorted(first)
    assert sorted(shares[0][3:6] + shares[1][2:4]) == sorted(second)


def test_two_ranks_end_with_the_same_weights_and_averages(finished):
    assert_ranks_agree(finished / "notes")
    assert len(load(finished / "notes/rank0.pt")["ema"]) > 100


def test_batch_hooks_draw_the_same_on_all_ranks_and_anew_in_each_step(finished):
    # those before are of batch_sides, which tries the hook
    first, second = (load(finished / f"notes/rank{rank}.pt")["draws"][-EPOCHS * 2:] for rank in (0, 1))
    assert first == second and len(set(first)) == len(first) == EPOCHS * 2


def test_only_rank_0_writes_and_prints(finished):
    first, second = ([path for path in load(finished / f"notes/rank{rank}.pt")["written"] if RUN in path]
                     for rank in (0, 1))
    assert any(re.search(r"/\.last\.pt\.[0-9a-f]{8}\.tmp$", path) for path in first) and second == []
    assert "epoch 2/2" in (finished / "notes/out0").read_text() and (finished / "notes/out1").read_text() == ""
    assert sorted(path.name for path in (finished / RUN).iterdir()) == [
        ".lock", "batch.png", "config.json", "curves.png", "log.csv", "model.pt", "valid.png"]


def test_two_ranks_count_the_pixels_that_one_process_counts(run_ranks, finished, argv, tmp_path):
    from common import scores
    options = {"argv": argv(finished), "checkpoint": str(finished / RUN / "model.pt")}
    assert run_ranks(2, "evaluate_rank", tmp_path / "two", **options) == [0, 0], errors(tmp_path / "two")
    assert run_ranks(1, "evaluate_rank", tmp_path / "one", **options) == [0], errors(tmp_path / "one")
    one, *two = (np.load(tmp_path / name) for name in ("one/counts0.npy", "two/counts0.npy", "two/counts1.npy"))
    assert one.shape[0] == VALID and one.sum() == VALID * 256 ** 2
    for counts in two:
        np.testing.assert_array_equal(counts, one)
    log = read_csv(finished / RUN / "log.csv", ("v1", "v2", "v3"))
    best = max(log, key=lambda row: float(row["v2"]) + float(row["v3"]))
    assert {name: float(best[name]) for name in ("v1", "v2", "v3")} == {
        name: scores(one, 5)[name] for name in ("v1", "v2", "v3")}


@pytest.mark.parametrize("before, after", [(2, 2), (1, 2), (2, 1)])
def test_killed_run_carries_on_with_as_many_processes_or_others(run_ranks, finished, argv, tmp_path, before, after):
    line, notes = argv(tmp_path / "exp"), tmp_path / "notes"
    codes = run_ranks(before, "train_rank", notes, argv=line, die_after=1)
    # the other one may see that the first is gone before it is killed itself
    assert -signal.SIGKILL in codes and 0 not in codes and not (tmp_path / "exp" / RUN / "model.pt").exists()
    assert run_ranks(after, "train_rank", notes, argv=line) == [0] * after, errors(notes)
    assert "resuming after epoch 1" in (notes / "out0").read_text()
    keys = [key for rank in range(after) for key in load(notes / f"rank{rank}.pt")["keys"]]
    assert set(keys) == {(1, i) for i in range(LEARN)} and len(keys) == 2 * 5
    if after == 2:
        assert_ranks_agree(notes)
    if before == after:
        for name in ("model", "ema"):
            assert_equal(load(notes / "rank0.pt")[name], load(finished / "notes/rank0.pt")[name])
        assert_equal(load(tmp_path / "exp" / RUN / "model.pt")["model"], load(finished / RUN / "model.pt")["model"])


def test_one_training_image_is_enough_for_two_ranks(run_ranks, argv, tmp_path):
    from conftest import write_coco
    data = write_coco(tmp_path / "data", [(i, 64, 64) for i in range(2)],
                      [(i, i, [[1, 1, 30, 1, 30, 30]]) for i in range(2)])
    line = argv(tmp_path / "exp", "--data", data, "--folds", 2, "--epochs", 1)
    assert run_ranks(2, "train_rank", tmp_path, argv=line) == [0, 0], errors(tmp_path)
    assert [load(tmp_path / f"rank{rank}.pt")["keys"] for rank in (0, 1)] == [[(0, 0)] * 3, [(0, 0)] * 2]
    assert_ranks_agree(tmp_path)


def test_ranks_with_other_numbers_of_images_split_their_batches_into_as_many_parts(run_ranks, argv, tmp_path):
    line = argv(tmp_path / "exp", "--epochs", 1, "--batch", 7, "--accumulate", 2)  # 4 and 3 images
    assert run_ranks(2, "train_rank", tmp_path, argv=line) == [0, 0], errors(tmp_path)
    assert_ranks_agree(tmp_path)


def test_weights_that_the_logits_do_not_depend_on_stop_no_rank(run_ranks, argv, tmp_path):
    line = argv(tmp_path / "exp", "--epochs", 1, model="fpn/efficientnet-b0")
    assert run_ranks(2, "train_rank", tmp_path, argv=line) == [0, 0], errors(tmp_path)
    assert load(tmp_path / "rank0.pt")["frozen"]  # that is, it has such weights
    assert_ranks_agree(tmp_path)


def test_ranks_agree_when_the_encoder_thaws(run_ranks, argv, tmp_path):
    line = argv(tmp_path / "exp", "--epochs", 2, "--freeze", 1)
    assert run_ranks(2, "train_rank", tmp_path, argv=line) == [0, 0], errors(tmp_path)
    assert_ranks_agree(tmp_path)


@pytest.mark.parametrize("arguments, message", [
    (["--batch", 3], "--batch 3: batch norm needs 2 images a process, of which there are 2"),
    (["--device", "nonsense"], "--device nonsense: ")])
def test_mistake_is_one_line_of_each_rank(run_ranks, argv, tmp_path, arguments, message):
    codes = run_ranks(2, "train_rank", tmp_path, argv=argv(tmp_path / "exp", *arguments))
    assert 1 in codes and 0 not in codes
    said = errors(tmp_path).splitlines()
    assert said and all(line.startswith(message) for line in said if line)
    assert not list((tmp_path / "exp").rglob("last.pt"))


def test_finished_run_is_said_to_be_so_once(run_ranks, finished, argv, tmp_path):
    assert run_ranks(2, "train_rank", tmp_path, argv=argv(finished)) == [0, 0], errors(tmp_path)
    assert "nothing to do" in (tmp_path / "out0").read_text() and (tmp_path / "out1").read_text() == ""


# ---- snapshots ------------------------------------------------------------------------------------------------------


def test_lost_or_foreign_snapshot_trains_the_run_again_to_the_same_weights(run_ranks, argv, tmp_path):
    line, run = argv(tmp_path / "exp", "--snapshots", 2, "--replace"), tmp_path / "exp" / RUN

    def train_and_load(line, **options):
        assert run_ranks(1, "train_rank", tmp_path, argv=line, **options) == [-9 * bool(options)], errors(tmp_path)
        return [load(path)["model"] for path in sorted(run.glob("epoch-*.pt"))]
    first, second = train_and_load(line)
    train_and_load(line)
    assert "nothing to do" in (tmp_path / "out0").read_text()
    (run / "epoch-001.pt").unlink()
    again, _ = train_and_load(line)
    assert_equal(again, first)
    train_and_load([*line, "--lr", "1e-4"], die_after=1)  # its snapshot stands beside the other recipe's model.pt
    for ours, theirs in zip(train_and_load(line), (first, second), strict=True):
        assert_equal(ours, theirs)


def test_more_snapshots_than_the_run_has_epochs_for_are_one_line(run_ranks, argv, tmp_path):
    assert run_ranks(1, "train_rank", tmp_path, argv=argv(tmp_path / "exp", "--snapshots", 3)) == [1]
    assert errors(tmp_path) == "--snapshots 3: this run has only 2 to keep\n"


# ---- prediction -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def infer_argv(argv):
    """Return a function (folder) -> command line of infer.py for the model there."""
    def line(folder):
        options = dict(zip(argv(folder)[::2], argv(folder)[1::2], strict=True))
        return [*(word for name in ("--data", "--cache", "--device") for word in (name, options[name])), "--batch", "1",
                "--tta", "none", "--checkpoint", str(folder / "model.pt")]
    return line


@pytest.fixture(scope="module")
def stores(run_ranks, finished, infer_argv, tmp_path_factory):
    """Return {name: bytes} of what one process predicts."""
    folder = tmp_path_factory.mktemp("stores")
    shutil.copy(finished / RUN / "model.pt", folder)
    assert run_ranks(1, "infer_rank", folder, argv=infer_argv(folder)) == [0], errors(folder)
    assert (folder / "batches0").read_text() == "9"
    return {path.name: path.read_bytes() for path in (*folder.glob("*.npy"), *folder.glob("*.json"))}


@pytest.mark.parametrize("die_after, left", [(None, "4"), (1, "4"), (3, "2")])
def test_two_ranks_write_the_bytes_of_one_whether_killed_or_not(
        run_ranks, finished, infer_argv, stores, tmp_path, die_after, left):
    """Kill and carry on; left: the batches that rank 1 has to predict, of 2 held-out and 2 test photos.

    A batch is written after the next one is predicted.
    """
    shutil.copy(finished / RUN / "model.pt", tmp_path)
    line = infer_argv(tmp_path)
    if die_after is not None:
        codes = run_ranks(2, "infer_rank", tmp_path, argv=line, die_after=die_after)
        assert codes[1] == -signal.SIGKILL and codes[0] in (-signal.SIGKILL, 1)  # it may notice that first
    assert run_ranks(2, "infer_rank", tmp_path, argv=line) == [0, 0], errors(tmp_path)
    assert (tmp_path / "batches1").read_text() == left
    assert {name: (tmp_path / name).read_bytes() for name in stores} == stores
    assert not list(tmp_path.glob(".*.parts"))


# ---- make, torchrun and srun themselves -----------------------------------------------------------------------------


@pytest.fixture
def make(tiny_data, tmp_path):
    """Return a function that makes goals in a clone of the project and returns what it printed."""
    for name in ("Makefile", "common.py", "train.py", "infer.py", "pseudo_label.py", "ensemble.py"):
        (tmp_path / name).symlink_to(ROOT / name)

    def run(*words, **knobs):
        knobs = {"DATA": tiny_data, "MODELS": MODEL, "SCALES": 64, "NFOLDS": 2, "EPOCHS": 2, "BATCH": 4,
                 "WEIGHTS": "none", "DEVICE": "cpu", "PY": sys.executable} | knobs
        done = subprocess.run(["make", *words, *(f"{name}={value}" for name, value in knobs.items())], cwd=tmp_path,
                              env=ENV, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    return run


def torchrun(*words, **options):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words], env=ENV, text=True,
                            start_new_session=True, **options)


STANDALONE = ("--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"))


def test_make_trains_a_run_with_two_processes(make, tmp_path):
    said = make("train", GPUS=2, FOLD=1, EPOCHS=1)
    assert said.count("--nproc-per-node 2 train.py") == said.count("epoch 1/1") == 1
    assert load(tmp_path / "out/main" / RUN / "model.pt")["epoch"] == 1


@pytest.mark.slow
def test_make_submits_with_two_processes_and_snapshots(make, tmp_path):
    knobs = {"GPUS": 2, "SNAPSHOTS": 2, "FOLDS": "0 1"}
    make("-j2", "submit", **knobs)
    run, submission = tmp_path / "out/main" / RUN, tmp_path / "out/main/submission.csv"
    made, probs = submission.read_bytes(), (run / "test.npy").read_bytes()
    make("-q", "submit", **knobs)
    (run / "test.npy").unlink()
    assert "train.py" not in make("-j2", "submit", **knobs | {"GPUS": 1})
    assert (run / "test.npy").read_bytes() == probs
    (run / "epoch-001.pt").unlink()
    assert "epoch 2/2" in make("-j2", "submit", **knobs)
    assert submission.read_bytes() == made


@pytest.mark.slow
def test_torchrun_killed_with_its_group_takes_its_processes_along_and_carries_on(finished, argv, tmp_path):
    line = argv(tmp_path)
    victim = torchrun(*STANDALONE, *line, stdout=subprocess.PIPE)
    assert any("epoch 1/2" in said for said in victim.stdout)  # printed when last.pt is whole
    os.killpg(victim.pid, signal.SIGKILL)
    assert "epoch 2/2" not in victim.stdout.read()  # ends when all that could write to it have ended
    victim.wait()
    second = torchrun(*STANDALONE, *line, stdout=subprocess.PIPE)
    assert "resuming after epoch 1" in second.communicate()[0] and second.returncode == 0
    assert_equal(load(tmp_path / RUN / "model.pt")["model"], load(finished / RUN / "model.pt")["model"])


@pytest.mark.slow
def test_error_of_one_rank_ends_the_command_and_is_a_line_of_its_own(argv, tmp_path):
    from common import lock
    with lock(tmp_path / RUN):
        refused = torchrun(*STANDALONE, *argv(tmp_path), stderr=subprocess.PIPE)
        lines = refused.communicate()[1].splitlines()
    assert refused.returncode != 0
    assert [line for line in lines if line.startswith(f"{tmp_path / RUN} is in use by pid {os.getpid()} ")]


@pytest.mark.slow
def test_two_machines_train_what_two_processes_of_one_do(finished, argv, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    machines = [torchrun("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                         endpoint, str(ROOT / "train.py"), *argv(tmp_path)) for _ in range(2)]
    assert [machine.wait() for machine in machines] == [0, 0]
    assert_equal(load(tmp_path / RUN / "model.pt")["model"], load(finished / RUN / "model.pt")["model"])


@pytest.mark.slow
def test_slurm_runs_the_jobs_of_make(make, tmp_path):
    if not shutil.which("sinfo") or subprocess.run("sinfo", capture_output=True).returncode:
        pytest.skip("no SLURM here: sinfo doesn't work")
    if subprocess.run(["srun", "--immediate=30", "test", "-e", tmp_path / "Makefile"]).returncode:
        pytest.skip("SLURM gives no node at once, or one that doesn't see this folder")
    make("-j2", "train", FOLDS="0 1", LAUNCH="srun -n1 -c1")
    assert len(list(tmp_path.rglob("model.pt"))) == 2


if __name__ == "__main__":
    serve()
