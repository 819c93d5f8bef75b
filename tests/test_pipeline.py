"""The real scripts through make and as processes, on the smallest data, models and grid."""
import csv
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_coco
from PIL import Image

import train

torch.set_num_threads(1)  # as the processes have
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
KNOBS = ["MODELS=unet/tu-mobilenetv3_small_100", "SCALES=64", "FOLDS=0 1", "NFOLDS=2", "EPOCHS=2", "BATCH=4",
         "ROUNDS=1", "WEIGHTS=none", f"PY={sys.executable}"]


def make(repo, *goals, knobs=KNOBS, check=True):
    done = subprocess.run(["make", *goals, *knobs], cwd=repo, env=ENV, text=True, capture_output=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def clone(folder):
    """The project as a user has it, without its outputs."""
    folder.mkdir()
    for name in ("Makefile", "common.py", "train.py", "infer.py", "pseudo_label.py", "ensemble.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def disc(height, width, seed):
    """Uncompressed RLE of a disc somewhere in the image."""
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[:height, :width]
    mask = (rows - rng.integers(90, height - 90)) ** 2 + (columns - rng.integers(90, width - 90)) ** 2 < 70 ** 2
    flat = mask.T.ravel()  # COCO runs down the columns
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [height, width], "counts": np.diff([0, *edges, flat.size]).tolist()}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A finished `make submit` on photos of 480 x 360: two classes, as RLE, ids with gaps, one test photo broken."""
    repo = clone(tmp_path_factory.mktemp("pipeline") / "repo")
    images = [(7 * i + 3, 360, 480) for i in range(8)]
    write_coco(repo / "data", images, [(i, n % 2 + 4, disc(h, w, i)) for n, (i, h, w) in enumerate(images)],
               categories=[(4, "Can"), (5, "Cup, small")], test_images=[(50, 360, 480), (20, 360, 480), (31, 360, 480)])
    broken = repo / "data/batch_01/0020.png"
    broken.rename(repo / "sound.png")
    broken.write_bytes((repo / "sound.png").read_bytes()[:5000])
    done = make(repo, "-j2", "submit")
    (repo / "log").write_text(done.stdout + done.stderr)
    return repo


def test_submission_has_a_class_id_for_every_pixel_in_the_order_of_test_json(repo):
    csv.field_size_limit(2 ** 31 - 1)
    rows = list(csv.reader((repo / "out/main/submission.csv").read_text().splitlines()))
    assert rows[0] == ["image_id", "PredictionString"] and [row[0] for row in rows[1:]] == ["50", "20", "31"]
    for _, text in rows[1:]:
        ids = text.split(" ")
        assert len(ids) == 256 * 256 and set(ids) <= {"0", "1", "2"}


def test_a_broken_test_photo_is_told_and_background_and_the_submission_is_made(repo):
    csv.field_size_limit(2 ** 31 - 1)
    log, text = (repo / "log").read_text(), (repo / "out/main/submission.csv").read_text()
    assert "warning: test.json: image 20 (batch_01/0020.png) image file is truncated" in log
    assert set(list(csv.reader(text.splitlines()))[2][1].split(" ")) == {"0"}
    assert "the submission stands, but of 1 photo(s)" in log and "background: 20;" in log
    for fold in "01":
        assert re.search(r"^20,0,unreadable,", (repo / f"out/main/r1/pseudo/f{fold}/index.csv").read_text(), re.M)


def test_scores_of_recipe_vote_and_background_are_printed(repo):
    out = (repo / "log").read_text()
    for line in ("out of fold: 8 of 8 training images", "out/main/r1/unet/tu-mobilenetv3_small_100;", " s64 flip ",
                 "soft vote, equal weights", "all background", "\n       Can ", "\nCup, small "):
        assert line in out
    assert "soft vote" in make(repo, "score", "ROUND=0").stdout


def test_the_pages_of_data_and_scores_are_made_in_passing(repo):
    for name, heading in (("data", "<h2>contested pixels</h2>"), ("report", "<h2>pseudo labels</h2>")):
        assert heading in (repo / f"out/main/{name}.html").read_text()


def test_make_predict_votes_on_any_photos_as_the_submission_does(repo, tmp_path):
    csv.field_size_limit(2 ** 31 - 1)
    photos, out = tmp_path / "it's $mine" / "one", repo / "out/main/predicted"
    photos.mkdir(parents=True)
    for name in ("0050", "0020", "0031"):
        (photos / f"{name}.png").write_bytes((repo / f"data/batch_01/{name}.png").read_bytes())
    (tmp_path / "no dollar").symlink_to(photos.parent)  # make reads a $ in a knob as its own
    knobs = [f"PHOTOS={tmp_path}/no dollar", f"PY={sys.executable}"]
    done = make(repo, "predict", knobs=knobs)
    assert "of 1 photo(s) that can't be read there are none: one/0020.png" in done.stderr
    rows = list(csv.reader((repo / "out/main/submission.csv").read_text().splitlines()))[1:]
    submitted = {row[0]: np.array(row[1].split(" "), np.uint8).reshape(256, 256) for row in rows}
    nearest = [(2 * np.arange(n) + 1) * 256 // (2 * n) for n in (360, 480)]
    for name in ("0050", "0031"):
        mask = np.array(Image.open(out / f"masks/one/{name}.png"))
        assert mask.shape == (360, 480) and (mask != submitted[name[2:]][np.ix_(*nearest)]).mean() < 1e-3
    assert not (out / "masks/one/0020.png").exists() and len((out / "areas.csv").read_text().splitlines()) == 3
    (photos / "0020.png").unlink()
    make(repo, "predict", knobs=knobs)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert "nothing to do" in make(repo, "predict", knobs=knobs).stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_weights_that_have_seen_a_fold_are_refused_before_anything_trains(repo):
    weights, = repo.glob("out/main/r0/unet/*/s64/f0/model.pt")
    done = make(repo, "submit", "EXP=next", knobs=[*KNOBS, f"WEIGHTS={weights}"], check=False)
    assert done.returncode == 2 and "holds out, so every score would flatter" in done.stderr
    assert "model.pt: has learnt from 4 of the 4 photos that fold 1 holds out" in done.stderr
    assert not (repo / "out/next/r0").exists()


def test_second_submit_has_nothing_to_do(repo):
    assert make(repo, "-q", "submit", check=False).returncode == 0


def test_every_fold_of_round_1_learns_from_labels_of_its_own_fold(repo):
    for fold in "01":
        assert f"out/main/r1/pseudo/f{fold}: " in (repo / "log").read_text()
    assert len(re.findall("4 labelled and |round 1 keeps no pseudo label", (repo / "log").read_text())) == 2


def test_every_broken_photo_is_listed_by_one_command_and_nothing_is_trained(repo, tmp_path):
    broken = clone(tmp_path / "repo")
    write_coco(broken / "data", [(1, 64, 64), (2, 64, 64), (3, 64, 64), (4, 64, 64)], [(1, 0, [[1, 1, 9, 1, 9, 9]])])
    photos = sorted((broken / "data/batch_01").glob("*.png"))
    photos[0].write_bytes(photos[0].read_bytes()[:60])
    photos[2].write_bytes(b"")
    done = make(broken, "submit", check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for photo in (photos[0], photos[2]):
        assert photo.name in done.stderr
    assert "2 fault(s)" in done.stderr and not list(broken.glob("out/main/r0"))


HOLD = """import importlib, sys
script, name, *line = sys.argv[1:]
script = importlib.import_module(script)
def stay(*args, **kwargs):
    print("here", flush=True)
    sys.stdin.read()
setattr(script, name, stay)  # it is called with the lock held
script.run_script(script.main, script.parse_args(line))"""


@pytest.mark.parametrize(("script", "name", "line", "held"), [
    ("infer", "load_models", ["--checkpoint", "{run}/model.pt"], "{run}"),
    ("pseudo_label", "whole_manifest", ["--exp", "{repo}/out/main", "--round", "1", "--fold", "0", "{run}/test.json"],
     "{repo}/out/main/r1/pseudo/f0"),
    ("ensemble", "open_members", ["soft", "--out", "{repo}/out/main/submission.csv", "{run}"],
     "{repo}/out/main/submission.csv"),
    ("ensemble", "member_weights", ["hard", "--out", "{repo}/out/main/voted.csv", "{run}"],
     "{repo}/out/main/voted.csv")])
def test_a_second_job_for_one_output_names_the_first_and_a_killed_one_holds_nothing(repo, script, name, line, held):
    names = {"repo": repo, "run": repo / "out/main/r0/unet/tu-mobilenetv3_small_100/s64/f0"}
    line = [word.format(**names) for word in line] + ["--data", str(repo / "data"), "--cache", str(repo / "out/cache")]
    hold = [sys.executable, "-c", HOLD, script, name, *line]
    for after_a_kill in (False, True):
        with subprocess.Popen(hold, cwd=ROOT, env=ENV, text=True, stdin=-1, stdout=-1) as first:
            try:
                assert any(text == "here\n" for text in first.stdout)
                if not after_a_kill:
                    again = [sys.executable, str(ROOT / f"{script}.py"), *line]
                    second = subprocess.run(again, env=ENV, text=True, capture_output=True)
                    holder = f"pid {first.pid} on {socket.gethostname()}"
                    assert second.returncode == 1 and second.stderr == (
                        f"{held.format(**names)} is in use by {holder}: wait for it or stop it\n")
            finally:
                first.kill()


RUN = "r0/unet/tu-mobilenetv3_small_100/s64/f0"


def train_line(folder, data):
    return ["--data", str(data), "--exp", str(folder), "--model", "unet/tu-mobilenetv3_small_100", "--scale", "64",
            "--weights", "none", "--epochs", "3", "--batch", "4", "--folds", "2", "--cache", str(folder / "cache"),
            "--save-every", "0",
            "--sampler", "rare", "--classmix", "weighted", "--class-weights", "inverse", "--snapshots", "2"]


def test_a_run_is_one_processs_and_when_that_is_killed_carries_on_to_the_same_weights(tiny_data, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *train_line(tmp_path / "killed", tiny_data)]
    victim = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True)
    assert any("epoch 1/3" in line for line in victim.stdout)  # printed when last.pt is whole
    victim.send_signal(signal.SIGSTOP)  # so that it can't be done before the second one asks
    second = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert second.returncode != 0 and f"in use by pid {victim.pid}" in second.stderr
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "killed" / RUN / "model.pt").exists()
    resumed = subprocess.run(command, env=ENV, check=True, capture_output=True, text=True)
    assert "resuming after epoch" in resumed.stdout
    train.main(train.parse_args(train_line(tmp_path / "straight", tiny_data)))
    for name in ("model.pt", "epoch-002.pt", "epoch-003.pt"):
        killed, straight = (torch.load(tmp_path / exp / RUN / name, weights_only=True)["model"]
                            for exp in ("killed", "straight"))
        assert all(torch.equal(straight[key], killed[key]) for key in straight)


def test_a_mended_photo_is_predicted_anew_by_the_same_command(repo):
    os.replace(repo / "sound.png", repo / "data/batch_01/0020.png")  # with the time that it always had
    plan = make(repo, "-n", "submit").stdout
    assert "train.py --check" in plan and plan.count("infer.py") == 4 and "ensemble.py soft" in plan
