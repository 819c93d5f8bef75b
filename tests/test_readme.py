"""README.md: its size and links, and that its diffs and commands, and the notebook's lines in tests/README.md, work."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README, MANUAL = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "tests/README.md"))
FILES = ("Makefile", "requirements.txt", "report.html.jinja", *(path.name for path in ROOT.glob("*.py")))
KNOBS = ["SCALES=64", "FOLDS=0 1", "NFOLDS=2", "EPOCHS=2", "BATCH=4", "WEIGHTS=none", "DEVICE=cpu",
         f"PY={sys.executable}"]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def apply_diff(folder, diff):
    """Apply a diff of the README, whose first line names the file, to the project in `folder`."""
    head, *lines = diff.splitlines(keepends=True)
    path = folder / head.removeprefix("# ").strip()
    old, new = ("".join(line[1:] for line in lines if line[:1] in kinds) for kinds in (" -", " +"))
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has this {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))


def make(folder, *words, code=0):
    done = subprocess.run(["make", "--no-print-directory", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def project(tmp_path, tiny_data):
    """A copy of the project, with drawn photos as its data."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "data").symlink_to(tiny_data)
    return tmp_path


def test_the_readme_is_one_page():
    assert README.count("\n") <= 150 and len(README.encode()) <= 10_000


def test_all_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_credit_names_the_six_photos():
    assert len(re.findall(r"\b0000\d\d|\b0001\d\d", README.split("CC BY 4.0")[1].split("*")[0])) == 6


def test_every_edit_trains_labels_and_votes_and_the_snippet_runs_on_what_it_made(project):
    diffs = blocks(README, "diff")
    assert len(diffs) == 6
    for diff in diffs:
        apply_diff(project, diff)
    # each edit stands beside the words that use it
    change_it = README.split("## Change it")[1]
    used = re.findall(r"`(?:make train )?(TRAIN_ARGS|PSEUDO_ARGS|MODELS)=\"?([^\"`]+)\"?`", change_it)
    options = {"TRAIN_ARGS": "", "PSEUDO_ARGS": "--confident 0.2", "MODELS": ""}
    for knob, value in used:
        options[knob] = f"{options[knob]} {value}".strip()
    assert [options["TRAIN_ARGS"].count(name) for name in ("tversky_ce", "grey", "floor")] == [1, 1, 1]
    options["MODELS"] = options["MODELS"].replace("resnet18", "tu-test_efficientnet")
    assert options["MODELS"] == "tiny/tu-test_efficientnet" and "margin" in options["PSEUDO_ARGS"]
    said = make(project, "submit", "ROUNDS=1", *KNOBS, *(f"{knob}={value}" for knob, value in options.items()))
    assert (project / "out/main/submission.csv").exists()
    assert re.search(r"closed gaps +-?\d", said)  # it was tried
    run = project / "out/main/r0" / options["MODELS"] / "s64/f0"
    snippet, = blocks(MANUAL, "python")
    snippet = re.sub(r'"out/main/r0/[^"]+/model.pt"', repr(str(run / "model.pt")), snippet)
    done = subprocess.run([sys.executable, "-c", f"{snippet}\nprint(probs.shape, probs.dtype, len(model.classes))"],
                          cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-5:] == ["(12,", "64,", "64)", "float32", "12"]


def test_the_knobs_and_options_of_what_one_brings_are_there(project):
    section = README.split("## What you bring")[1].split("\n## ")[0]
    codes = re.findall("`([^`]+)`", section)
    known = make(project, "help", f"PY={sys.executable}")
    knobs = {knob for code in codes for knob in re.findall(r"\b([A-Z_]+)=", code)}
    assert {"EXTRA", "UNLABELLED", "FOLDS", "WEIGHTS", "PHOTOS", "TRUTH", "METRIC", "POST"} <= knobs
    assert [knob for knob in knobs if not re.search(rf"^  {knob} ", known, re.M) and f" {knob} " not in known] == []
    scripts = "".join((project / f"{name}.py").read_text() for name in ("common", "train", "infer", "ensemble"))
    for option in {option for code in codes for option in re.findall(r"--[a-z-]+", code)}:
        name = option.removeprefix("--")
        assert f'"{option}"' in scripts or f'"{name.replace("-", "_")}": (' in scripts, option


def test_its_commands_are_what_make_knows(project):
    lines = re.findall(r"^    (make \w+[^#\n]*)", README, re.M)
    assert len(lines) >= 7
    known = make(project, "help", f"PY={sys.executable}")
    for line in lines:
        command, *knobs = re.findall(r'(?:[^\s"]|"[^"]*")+', line)[1:]
        assert re.search(rf"^ +{command} ", known, re.M), line
        if command in ("check", "train", "submit"):
            words = [knob.replace('"', "").replace("/data/trash", "data") for knob in knobs]
            make(project, "-n", command, *words, "DEVICE=cpu", f"PY={sys.executable}")
