"""Experiments of one folder share runs, stores and pseudo labels: with the real Makefile and scripts.

out/lad/a is built once, with one fold and one round of pseudo labels; each test makes a sibling in a copy of it.
"""
import json
import shutil
from pathlib import Path

import pytest
from conftest import read_csv
from demo_data import draw_data
from test_graph import A0, EDITS, MODEL, edit, make, new_folder, plan, steps

import common

B0 = f"r1/{MODEL}/s64/f0"
LABELS = "r1/pseudo/f0"
ARTEFACTS = ("model.pt", "valid.npy", "test.npy", "labels.npy")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    draw_data(folder / "drawn", train=12, test=4, size=64)
    built = new_folder(folder / "built", folder / "drawn")
    share(built, "a", "submit")
    return built


@pytest.fixture
def built(template, tmp_path):
    """A folder in which `make submit EXP=lad/a` has run."""
    return shutil.copytree(template, tmp_path / "built", symlinks=True)


def share(folder, exp, *words, **knobs):
    return make(folder, *words, **{"FOLDS": 0, "EXP": f"lad/{exp}"} | knobs)


def planned(folder, exp, goal="submit", **knobs):
    return plan(folder, goal, **{"FOLDS": 0, "EXP": f"lad/{exp}"} | knobs)


def lad(folder, exp):
    return folder / "out/lad" / exp


def whole(folder):
    """{path: bytes} of an experiment without its locks, reports and what was moved aside."""
    names = (".lock", "report.html", "data.html")
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in names and not {"replaced", "report"} & {*p.parts}}


def tree(folder):
    """{path: inode and times} of all files, which tells whether anything was written."""
    return {p: (s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for p in folder.rglob("*")
            if "__pycache__" not in p.parts for s in [p.lstat()]}


def shared_lines(done):
    return [line for line in done.stderr.splitlines() if " are those of " in line]


# ---- what is taken --------------------------------------------------------------------------------------------------


def test_an_equal_experiment_takes_everything_and_says_so_and_is_then_up_to_date(built):
    before = tree(built)
    assert planned(built, "b") == ["check", "submit"]
    why = share(built, "b", "why").stdout
    assert why.count(f"{A0}/config.json is that of out/lad/a: to be linked\n") == 1
    assert why.count(" is that of out/lad/a") == 5  # r0 and r1, the labels, and the stores of r1
    assert share(built, "b", "status").stdout.count("done") == 2
    assert tree(built) == before
    done = share(built, "b", "submit")
    assert shared_lines(done) == [f"{n} {kind} are those of out/lad/a: linked" for n, kind in (
        (2, "run(s)"), (1, "set(s) of pseudo labels"), (2, "store(s)"))]
    a, b = lad(built, "a"), lad(built, "b")
    for path in (path for path in a.rglob("*") if path.name in (*ARTEFACTS, "log.csv", "curves.png", "sheet.png")):
        if path.parent.parent.name != "s64" or "r1" in path.parts or path.suffix != ".npy":
            assert path.samefile(b / path.relative_to(a)), path
    assert not (a / LABELS / "index.csv").samefile(b / LABELS / "index.csv")
    first, second = whole(a), whole(b)
    gone = {f"{A0}/{split}.{end}" for split in ("valid", "test") for end in ("npy", "json")}  # no need of them
    different = {name for name in first if "submission" not in name and second.get(name) != first[name]}
    assert different == gone
    assert (a / "submission.csv").read_bytes() == (b / "submission.csv").read_bytes()
    again = share(built, "b", "submit")
    assert again.stdout.startswith("make: Nothing to be done") and again.stderr == ""
    assert share(built, "b", "why").stdout == "out/lad/b is up to date\n"
    assert planned(built, "b", "score", ROUND=0) == ["score"]  # these stores too


@pytest.mark.slow
def test_a_link_costs_no_file_its_remembered_hash(built, monkeypatch):
    share(built, "b", "train")
    share(built, "c", "train")  # links a third name to the files of a and b
    hashes = common.Hashes(built / "out/cache")
    monkeypatch.chdir(built)
    paths = [Path("out/lad", exp, A0, "model.pt") for exp in "abc"]
    assert len({path.stat().st_ino for path in paths}) == 1
    assert {hashes.remembered(path) for path in paths} == {common.file_hash(paths[0])}


@pytest.mark.parametrize("knobs, patterns, grid", [
    ({"TTA": "none"}, ["check", "infer *", "pseudo *", "train r1/*", "submit"], {}),
    ({"LR": "4e-3"}, ["*"], {}),
    ({"PSEUDO_ARGS": "--confident 0.2"}, ["check", "pseudo *", "* r1/*", "submit"], {}),
    ({"ROUNDS": 0}, ["check", "submit"], {}),
    ({"VOTE": "equal"}, ["check", "submit"], {}),
    ({"SCALES": "64 96"}, ["check", "* r0/*/s96/*", "pseudo *", "* r1/*", "submit"], {"scales": [64, 96]}),
    ({"FOLDS": "0 1"}, ["check", "* r0/*/f1", "pseudo r1/f1", "* r1/*/f1", "submit"], {"folds": [0, 1]}),
    ({"EXP": "lad/deep/b"}, ["*"], {}), ({"EXP": "b"}, ["*"], {}), ({"EXP": "lad"}, ["*"], {}),
    ({"EXP": "other/b"}, ["*"], {})],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_a_sibling_makes_only_what_differs(template, knobs, patterns, grid):
    wanted = steps(*patterns, **{"folds": [0]} | grid)
    found = planned(template, "b", **knobs)
    # stores of round 0 are needed only where labels are to be made of them
    assert found == [name for name in wanted if name in found] and {*wanted} - {*found} <= {f"infer {A0}"}


@pytest.mark.slow
def test_experiments_beside_the_cache_share_nothing(built):
    (built / "out/lad/a").rename(built / "out/a")
    assert planned(built, "a", EXP="a") == [] and planned(built, "b", EXP="b") == steps("*", folds=[0])


def test_another_fold_is_trained_and_the_first_one_taken_with_the_folds_that_both_have(built):
    done = share(built, "b", "train", FOLDS="0 1", ROUNDS=0)
    assert shared_lines(done) == ["1 run(s) are those of out/lad/a: linked"]
    assert done.stdout.count("train.py --data") == 1 and "--fold 1" in done.stdout
    assert (lad(built, "b") / "folds.csv").read_bytes() == (lad(built, "a") / "folds.csv").read_bytes()
    folds = lad(built, "a") / "folds.csv"  # edited by hand: of another split
    folds.write_text(folds.read_text().replace(",0\n", ",2\n").replace(",1\n", ",0\n").replace(",2\n", ",1\n"))
    shutil.copy(folds, lad(built, "b"))
    assert f"train {A0}" in planned(built, "b", "train", ROUNDS=0)


@pytest.mark.slow
def test_what_is_replaced_later_stays_in_the_sibling_and_what_was_there_is_moved_aside(built):
    share(built, "b", "train")
    kept = whole(lad(built, "b"))
    share(built, "a", "train", EPOCHS=1)
    assert whole(lad(built, "b")) == kept and planned(built, "b", "train") == []
    assert (lad(built, "a") / A0 / "model.pt").read_bytes() != kept[f"{A0}/model.pt"]
    shorter = (lad(built, "a") / A0 / "model.pt").read_bytes()
    done = share(built, "a", "train")  # as it was before, which b has
    assert shared_lines(done) == ["1 run(s) are those of out/lad/b: linked"] and "train.py --data" not in done.stdout
    assert (lad(built, "a") / A0 / "model.pt").samefile(lad(built, "b") / A0 / "model.pt")
    assert (lad(built, "a") / A0 / "replaced/model.pt").read_bytes() == shorter
    assert not (lad(built, "a") / A0 / "replaced/.config.json.moving").exists()
    make(built, "clean", EXP="lad/a")
    assert whole(lad(built, "b")) == kept and planned(built, "b", "train") == []


@pytest.mark.slow
def test_a_run_that_was_begun_is_moved_aside_for_one_that_is_whole(built):
    run = lad(built, "b") / A0
    run.mkdir(parents=True)
    for name in ("last.pt", "last.json"):
        (run / name).write_text("begun")
    share(built, "b", "train")
    assert not list(run.glob("last*")) and (run / "replaced/last.pt").read_text() == "begun"


def test_labels_bring_the_decisions_by_hand_and_never_replace_them(built):
    index = lad(built, "a") / LABELS / "index.csv"
    rows = read_csv(index)
    rows[0]["keep"] = "1" if rows[0]["keep"] == "0" else "0"
    common.write_csv(index, rows)
    share(built, "b", "pseudo")
    copy = lad(built, "b") / LABELS / "index.csv"
    assert copy.read_bytes() == index.read_bytes() and not copy.samefile(index)
    rows[1]["keep"] = "0"
    common.write_csv(copy, rows)
    share(built, "b", "pseudo", PSEUDO_ARGS="--confident 0.2 --max-unsure 1")
    assert planned(built, "b", "pseudo") == ["pseudo r1/f0"]  # though a has labels of this recipe
    assert read_csv(copy)[1]["keep"] == "0"


@pytest.mark.slow
def test_where_links_can_not_be_made_files_are_copied(built):
    (built / "sitecustomize.py").write_text("import os\n\n\ndef link(*a, **k):\n    raise OSError(1, 'no')\n"
                                            "\n\nos.link = link\n")
    done = share(built, "b", "train", env={"PYTHONPATH": str(built)})
    (built / "sitecustomize.py").unlink()
    assert shared_lines(done) == ["1 run(s) are those of out/lad/a: copied"]
    first, second = (lad(built, exp) / A0 / "model.pt" for exp in "ab")
    assert first.read_bytes() == second.read_bytes() and not first.samefile(second)
    assert planned(built, "b", "train") == []


@pytest.mark.slow
def test_the_code_that_made_it_comes_along(built):
    edit(built, "common.py", "def region_loss(", "# a comment\n\n\ndef region_loss(")
    share(built, "b", "train")
    state = json.loads((lad(built, "b") / A0 / "config.json").read_text())["state"]
    first, second = (whole(lad(built, exp) / "code" / state) for exp in "ab")
    assert first == second and first


# ---- what is not taken ----------------------------------------------------------------------------------------------


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage, name, goal, made", [
    (flip_byte, f"{A0}/model.pt", "train", [f"train {A0}"]), (cut, f"{A0}/config.json", "train", [f"train {A0}"]),
    (Path.unlink, f"{A0}/config.json", "train", [f"train {A0}"]), (cut, f"{A0}/model.pt", "train", [f"train {A0}"]),
    (flip_byte, f"{B0}/valid.npy", "submit", [f"infer {B0}", "submit"]),
    (cut, f"{B0}/test.json", "submit", [f"infer {B0}", "submit"]),
    (flip_byte, f"{LABELS}/labels.npy", "pseudo", ["pseudo r1/f0"]),
    (Path.unlink, f"{LABELS}/labels.npy", "pseudo", ["pseudo r1/f0"])],
    ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_is_damaged_is_not_taken(built, damage, name, goal, made):
    damage(lad(built, "a") / name)
    assert planned(built, "b", goal) == sorted(["check", *made])


@pytest.mark.slow
def test_a_damaged_store_is_predicted_anew_for_real(built):
    expected = (lad(built, "a") / B0 / "valid.npy").read_bytes()
    flip_byte(lad(built, "a") / B0 / "valid.npy")
    share(built, "b", "submit")
    assert (lad(built, "b") / B0 / "valid.npy").read_bytes() == expected


def test_other_code_is_a_question_about_own_files_alone(built):
    share(built, "b", "train")
    edit(built, *EDITS[0][:3])
    assert planned(built, "c", "train") == ["check", f"train {A0}"]
    asked = make(built, "train", code=2, FOLDS=0, EXP="lad/b").stderr
    assert "1 model(s) in out/lad/b" in asked and "lad/a" not in asked
    share(built, "a", "train", CODE="new")
    asked = make(built, "train", code=2, FOLDS=0, EXP="lad/b").stderr  # though a has what would be made
    assert "1 model(s) in out/lad/b" in asked
    assert planned(built, "b", "train", CODE="keep") == [f"train {A0}"]
    assert planned(built, "b", "train", CODE="new") == []


@pytest.mark.slow
def test_a_run_that_another_process_holds_is_left_alone(built):
    run = lad(built, "b") / A0
    with common.lock(run):
        before = sorted(run.iterdir())
        stopped = make(built, "train", code=2, FOLDS=0, EXP="lad/b")
        assert shared_lines(stopped) == [] and sorted(run.iterdir()) == before
    assert planned(built, "b", "train") == []


def test_a_round_that_stands_for_another_leaves_the_pictures_of_siblings_alone(built):
    share(built, "b", "submit")
    pictures = {path: path.read_bytes() for path in (built / "out/lad/a" / B0).glob("*.png")}
    assert len(pictures) == 3
    assert all((built / "out/lad/b" / B0 / path.name).samefile(path) for path in pictures)
    done = share(built, "b", "submit", PSEUDO_ARGS="--confident 1")
    assert "round 1 keeps no pseudo label" in done.stdout
    assert {path: path.read_bytes() for path in pictures} == pictures
    second = built / "out/lad/b" / B0
    first = built / "out/lad/b" / B0.replace("r1", "r0", 1)
    assert all((second / path.name).read_bytes() == (first / path.name).read_bytes() for path in pictures)
