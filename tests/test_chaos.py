"""The whole graph under `kill -9` at random moments: it ends in the bytes of a run that nothing ever stopped."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from demo_data import draw_data

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
KNOBS = ["MODELS=fpn-narrow/tu-test_efficientnet", "SCALES=64", "FOLDS=0 1", "NFOLDS=2", "EPOCHS=3", "BATCH=4",
         "ROUNDS=1", "WEIGHTS=none", "LR=3e-3", "PSEUDO_ARGS=--confident 0.3 --max-unsure 1",
         "TRAIN_ARGS=--save-every 0.001 --workers 1",
         f"PY={sys.executable}"]
KILLS = 30


def new_repo(folder, data):
    folder.mkdir()
    for name in ("Makefile", "common.py", "train.py", "infer.py", "pseudo_label.py", "ensemble.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").symlink_to(data)
    return folder


def start(repo):
    """`make submit`, the leader of a process group of its own."""
    with open(repo / "log", "w") as log:
        return subprocess.Popen(["make", "-j2", "submit", *KNOBS], cwd=repo, env=ENV, start_new_session=True,
                                stdout=log, stderr=subprocess.STDOUT)


def files(folder):
    """{path: (size, time of change, inode)} of everything below."""
    found = {}
    for path in (Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
        try:
            status = path.stat()
        except FileNotFoundError:  # renamed since it was listed
            continue
        found[path] = status.st_size, status.st_mtime_ns, status.st_ino
    return found


def kill_after(process, repo, stage, events, delay):
    """kill -9 of the group once the graph has made `stage` files, `delay` seconds after so many changes of any file.

    Returns whether it came to that.
    """
    while len(made(repo)) < stage and not ended(process, 0.005):
        pass
    before = files(repo / "out")
    while events and not ended(process, 0.005):
        now = files(repo / "out")
        events -= now != before
        before = now
    if ended(process, delay):
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def ended(process, timeout):
    """Whether the process ends within `timeout` seconds."""
    try:
        return process.wait(timeout) is not None
    except subprocess.TimeoutExpired:
        return False


def made(repo):
    """What the graph is for and what it trained and predicted, as far as it is there."""
    return [path for path in files(repo / "out/main") if path.name in (
        "model.pt", "valid.npy", "valid.json", "test.npy", "test.json", "labels.npy", "index.csv", "submission.csv")]


def results(repo):
    return {str(path.relative_to(repo)): path.read_bytes() for path in made(repo)}


@pytest.mark.slow
def test_a_graph_killed_at_30_random_moments_ends_in_the_same_submission_and_weights(tmp_path):
    draw_data(tmp_path / "data", train=12, test=6, size=64)
    straight = new_repo(tmp_path / "straight", tmp_path / "data")
    started = time.monotonic()
    assert start(straight).wait() == 0, (straight / "log").read_text()
    said = (straight / "log").read_text()
    expected, lasted = results(straight), time.monotonic() - started
    assert sum(name.endswith("model.pt") for name in expected) == 4 and "out/main/submission.csv" in expected
    assert " 0 kept" not in said and "warning: no photo is kept" not in said  # round 1 learns from something
    rng, kills, graphs = np.random.default_rng(0), [], 0
    while len(kills) < KILLS:
        repo = new_repo(tmp_path / f"killed{graphs}", tmp_path / "data")
        graphs += 1
        for stage in sorted(rng.integers(0, len(expected), KILLS - len(kills)).tolist()):  # often twice at the same one
            process, events, delay = start(repo), int(rng.geometric(0.3)), float(rng.exponential(rng.choice((0.05, 2))))
            if not kill_after(process, repo, stage, events, delay):
                break
            kills.append(len(made(repo)))
        else:
            process = start(repo)
        assert process.wait() == 0, (repo / "log").read_text()
        found = results(repo)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
    print(f"{KILLS} kills in {graphs} graphs, after {kills} of {len(expected)} files; uninterrupted {lasted:.0f} s, "
          f"all {time.monotonic() - started:.0f} s")
    assert len(kills) == KILLS
