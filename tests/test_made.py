"""Test what made an artefact: the code that a step can reach, hashes of files, decisions, what is moved aside."""
import ast
import json
import os
import re
import shutil
import textwrap
import threading

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import common
from common import UserError

MODULES = {"common": '''
    """Shared."""
    import math
    from math import floor as down
    SIDE = 8
    WIDTH, HEIGHT = SIDE, 2
    TABLE = {"a": lambda x: square(x), "b": lambda x: cube(x)}
    LATE = [1]
    LATE += [2]
    BESIDE = {"shown"}
    def square(x):
        """The square."""
        return x * x  # quick
    def cube(x):
        return x * square(x)
    def area():
        return WIDTH * down(math.pi)
    class Box:
        """A box."""
        def __init__(self, side=SIDE):
            self.side = side
    def unused():
        return LATE
    def make():
        """A class."""
        class Inner:
            """Inside."""
            def method(self):
                """Deep inside."""
                return 1
        return Inner
    def shown(x):
        return unused()
    ''', "train": '''
    from common import Box, TABLE, area as surface, make, shown
    import extra
    STEPS = 3
    def run(name):
        box = Box()
        shown(box)
        return TABLE[name](box.side) + surface() + extra.more() + make().method()
    def other():
        return STEPS
    if __name__ == "__main__":
        run("a")
    ''', "extra": '''
    def more():
        return 1
    '''}


@pytest.fixture
def project(monkeypatch):
    """Return a function (edits {module: [(old, new)]}) -> code_of the step of a small project after these edits."""
    def code_of(changes=None, **entries):
        texts = {name: textwrap.dedent(text) for name, text in MODULES.items()}
        for name, edits in (changes or {}).items():
            for old, new in edits:
                assert texts[name].count(old) == 1, old
                texts[name] = texts[name].replace(old, new)
        monkeypatch.setattr(common, "project_files", lambda: {f"{k}.py": v.encode() for k, v in texts.items()})
        for cached in (common.definitions, common.read_definition, common.names_beside, common.code_of):
            cached.cache_clear()
        return common.code_of("run", **entries)
    monkeypatch.setattr(common, "STEPS", {"run": [("train", "run")]})
    yield code_of
    monkeypatch.undo()
    for cached in (common.definitions, common.read_definition, common.names_beside, common.code_of):
        cached.cache_clear()


def test_all_that_a_step_can_reach_by_name_is_its_code(project):
    assert list(project()) == ["Box", "SIDE", "TABLE", "WIDTH", "area", "cube", "make", "more", "run",
                               "square"]
    assert list(project(TABLE="a")) == ["Box", "SIDE", "TABLE[a]", "WIDTH", "area", "make", "more", "run",
                                         "square"]
    assert "TABLE[c]" not in project(TABLE="c") and "TABLE" not in project(TABLE="c")


@pytest.mark.parametrize(("module", "old", "new", "names"), [
    ("common", "return x * x", "return x ** 2", ["square"]), ("common", "SIDE = 8", "SIDE = 9", ["SIDE"]),
    ("common", "self.side = side", "self.side = side + 1", ["Box"]),
    ("common", "WIDTH, HEIGHT = SIDE, 2", "WIDTH, HEIGHT = SIDE, 3", ["WIDTH"]),
    ("common", "from math import floor as down", "from math import ceil as down", ["area"]),
    ("common", "import math\n", "import cmath as math\n", ["area"]),
    ("common", "lambda x: square(x)", "lambda x: 2 * square(x)", ["TABLE[a]"]),
    ("common", "def unused", "SIDE += 1\ndef unused", ["SIDE"]),
    ("common", "LATE = [1]", "print(1)\nLATE = [1]", ["common.py"]), ("extra", "return 1", "return 2", ["more"]),
    ("train", "import extra", "import extra\nimport os\nos.nice(1)", ["train.py"]),
    ("train", "box = Box()", "box = Box(3)", ["run"])])
def test_an_edit_of_what_decides_is_said_by_name(project, module, old, new, names):
    before, after = project(TABLE="a"), project({module: [(old, new)]}, TABLE="a")
    assert common.code_changes({"code": before, "kept_under": []}, after) == names
    assert common.code_changes({"code": after, "kept_under": []}, before) == names


@pytest.mark.parametrize(("module", "old", "new"), [
    ("common", "  # quick", "  # quicker"), ("common", '"""The square."""', '"""x times x."""'),
    ("common", '    """A box."""\n', ""), ("common", "return x * x", "return (x\n            * x)"),
    ("common", "return LATE", "return None"), ("common", "return unused()", "return 5"),
    ("common", "LATE = [1]", "LATE = [7]"),
    ("common", '"b": lambda x: cube(x)', '"b": lambda x: 1, "c": 3'), ("common", "return x * square(x)", "return 4"),
    ("common", "import math\n", "import math\nimport os\n"), ("train", 'run("a")', 'run("b")'),
    ("train", "STEPS = 3", "STEPS = 4"),
    ("train", "import Box, TABLE", "import TABLE, Box"),
    ("common", '"""Deep inside."""', '"""Deeper."""'), ("common", '"""Inside."""', '"""In."""'),
    ("common", '"""Shared."""', '"""All that is shared."""')])
def test_an_edit_of_what_decides_nothing_changes_nothing(project, module, old, new):
    assert project(TABLE="a") == project({module: [(old, new)]}, TABLE="a")


@pytest.mark.parametrize("edit", [("LATE = [1]", "TABLE['c'] = 1\nLATE = [1]"),
                                  ("LATE = [1]", "TABLE |= {'c': 1}\nLATE = [1]"),
                                  ('TABLE = {"a"', 'TABLE = {**{}, "a"'), ("TABLE = {", "TABLE = dict() | {")])
def test_a_table_that_is_not_one_dict_counts_whole(project, edit):
    found = project({"common": [edit]}, TABLE="a")
    assert "TABLE" in found and "cube" in found and "common.py" not in found


def test_what_is_imported_with_a_star_counts_whole(project):
    changes = {"train": [("import extra", "import extra\nfrom extra import *")]}
    before = project(changes)
    assert before != project({**changes, "extra": [("return 1", "return 2")]})


def test_a_function_that_moves_to_another_file_is_the_same(project):
    moved = {"extra": [("def more():\n    return 1\n", "x = 1\n")],
             "train": [("import extra", "from common import more"), ("extra.more()", "more()")],
             "common": [("def unused", "def more():\n    return 1\ndef unused")]}
    before, after = project(), project(moved)
    assert before["more"] == after["more"] and set(before) == set(after)


def test_every_step_begins_in_a_function_that_is_there():
    for step, roots in common.STEPS.items():
        for module, name in roots:
            assert name in common.definitions(module), (step, module, name)


RECIPE = {"model": "fpn/tu-a", "loss": "iou_ce", "augment": "basic", "schedule": "cosine", "optimizer": "adamw",
          "batch_hook": "none"}
CODE = {
    "run": lambda: common.run_code(RECIPE), "store": lambda: common.store_code("fpn/tu-a", "flip x 1,0.5"),
    "labels": lambda: common.labels_code([("fpn/tu-a", "flip")], "image"), "masks": lambda: common.code_of("masks"),
    "submission": lambda: common.code_of("submission"), "voted": lambda: common.code_of("voted"),
    "photos": lambda: common.code_of("photos", DECODERS="fpn", TTA="flip")}
# what a step must reach and, of what is there, must not
REACHED = {
    "run": ("DECODERS[fpn] LOSSES[iou_ce] AUGMENTATIONS[basic] SCHEDULES[cosine] OPTIMIZERS[adamw] BATCH_HOOKS[none] "
            "region_loss classmix crop_and_turn train_step finish_run set_prior TrainSamples paint_mask read_image "
            "build_model learning_rate", "lovasz_loss make_folds damages draw_curves write_page Plan vote "
            "predict_probs log_row mixup sgd overlay"),
    "store": ("DECODERS[fpn] TTA[flip] VIEWS predict_probs EvalPhotos normalise read_image load_model",
              "region_loss classmix train_step soft judge"),
    "photos": ("DECODERS[fpn] TTA[flip] predict_probs load_model read_photo vote remove_small predict_windows",
               "train_step classmix predict_split load_data soft"),
    "labels": ("RULES[image] judge soft_vote hand_decisions TTA[flip] predict_probs", "train_step soft write_sheet"),
    "submission": ("vote fit_weights remove_small encode_mask Split choose", "report_sections draw_bars write_page "
                   "train_run Plan status hard"),
    "voted": ("majority decode_mask csv_rows order_of", "fit_weights report_sections Plan"),
    "masks": ("paint_mask read_coco", "TrainSamples vote train_run")}


@pytest.mark.parametrize("step", common.STEPS)
def test_a_step_reaches_what_it_must_and_nothing_of_others(step):
    names, (must, must_not) = CODE[step]().keys(), map(str.split, REACHED[step])
    assert set(must) - names == set()
    assert set(must_not) & names == set()
    tables = {name.partition("[")[0] for name in names if "[" in name}
    assert tables & names == set()  # a new entry makes nothing stale
    there = set().union(*(common.definitions(path.stem) for path in ROOT.glob("*.py")))
    assert set(must_not) - there == set()  # else it is no wonder that they aren't reached


def test_what_stands_beside_the_results_is_there():
    for module in ("common", "train", "infer", "pseudo_label", "ensemble"):
        beside = common.names_beside(module)
        assert beside and sorted(beside - common.definitions(module).keys()) == []


def test_names_are_found_in_the_text_of_a_tree_as_in_the_tree():
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            read = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
            assert common.names_in(ast.dump(node)) == read


@given(st.sampled_from(sorted(ROOT.glob("*.py"))), st.integers(0, 10 ** 6))
def test_a_comment_anywhere_changes_no_syntax_tree(path, place):
    lines = path.read_text().splitlines()
    tree = ast.parse(path.read_text())
    inside = {n for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr)) and isinstance(
        getattr(node, "value", ""), str) for n in range(node.lineno, node.end_lineno)}
    at = place % len(lines)
    if at in inside or lines[at - 1].endswith("\\"):
        return
    lines.insert(at, "# a comment")
    assert ast.dump(ast.parse("\n".join(lines))) == ast.dump(tree)


# ---- hashes of files ------------------------------------------------------------------------------------------------


def reads(monkeypatch):
    """Return a list that gets the names of the files that are read to be hashed from now on."""
    seen, file_hash = [], common.file_hash
    monkeypatch.setattr(common, "file_hash", lambda path: seen.append(os.path.basename(path)) or file_hash(path))
    return seen


def test_a_file_is_read_once_and_again_only_when_its_inode_or_times_are_others(tmp_path, monkeypatch):
    path, seen = tmp_path / "a", reads(monkeypatch)
    path.write_text("1234")
    for _ in range(2):
        hashes = common.Hashes(tmp_path / "cache")
        assert hashes(path) == common.file_hash.__closure__[0].cell_contents(path)
        hashes.save()
    assert seen == ["a"]
    before = path.stat()
    path.write_text("5678")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time of change
    first, second = common.Hashes(tmp_path / "cache"), hashes(path)
    assert first(path) == second != hashes.known[hashes.key(path)] or seen.count("a") >= 2
    shutil.copy2(path, tmp_path / "b")
    os.replace(tmp_path / "b", path)
    assert first(path) == second


def test_what_is_no_file_has_no_hash_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    hashes = common.Hashes(tmp_path / "cache")
    assert [hashes(tmp_path / name) for name in ("pipe", "nosuch", ".")] == ["", "", ""]
    assert hashes.of_all([tmp_path / "pipe", tmp_path / "nosuch"]) == ["", ""]
    assert hashes.remembered(tmp_path / "nosuch") is None


def test_many_files_are_hashed_in_order(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}" for i in range(50)]
    for path in paths:
        path.write_text(path.name)
    hashes = common.Hashes(tmp_path / "cache")
    assert hashes.of_all(paths) == [common.file_hash(path) for path in paths]
    hashes.save()
    seen = reads(monkeypatch)
    assert common.Hashes(tmp_path / "cache").of_all(paths[::-1]) and seen == []


def test_a_cut_off_line_and_writers_at_once_lose_at_most_their_own_lines(tmp_path):
    paths = [tmp_path / f"{i} with\nodd name" for i in range(20)]
    for path in paths:
        path.write_text(path.name)

    def one(path):
        hashes = common.Hashes(tmp_path / "cache")
        hashes(path)
        hashes.save()
    threads = [threading.Thread(target=one, args=[path]) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = common.Hashes(tmp_path / "cache")
    assert all(known.remembered(path) == common.file_hash(path) for path in paths)
    text = (tmp_path / "cache/hashes.txt").read_text()
    (tmp_path / "cache/hashes.txt").write_text(text[:-9])
    (tmp_path / "new").write_text("1")
    one(tmp_path / "new")
    assert common.Hashes(tmp_path / "cache").remembered(tmp_path / "new") == common.file_hash(tmp_path / "new")
    known = common.Hashes(tmp_path / "cache")
    assert sum(known.remembered(path) is None for path in paths) == 1
    assert all(known(path) == common.file_hash(path) for path in paths)


def test_a_damaged_line_counts_for_nothing(tmp_path):
    path, known = tmp_path / "a", tmp_path / "cache/hashes.txt"
    path.write_text("1")
    hashes = common.Hashes(tmp_path / "cache")
    digest = hashes(path)
    hashes.save()
    content = known.read_bytes()
    for position in range(1, len(content) - 1):  # between the ends of lines
        for bit in (1, 2, 128):
            damaged = bytearray(content)
            damaged[position] ^= bit
            known.write_bytes(damaged)
            hashes = common.Hashes(tmp_path / "cache")
            assert hashes.known in ({}, {hashes.key(path): digest}) and hashes(path) == digest


def test_hashes_that_cannot_be_kept_are_no_error(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    (tmp_path / "a").write_text("1")
    hashes = common.Hashes(tmp_path / "cache/deeper")
    assert hashes(tmp_path / "a") == common.file_hash(tmp_path / "a")
    hashes.save()


# ---- what is decided ------------------------------------------------------------------------------------------------


def made(recipe, code, kept=(), versions=None):
    return {"recipe": recipe, "code": code, "state": "s", "commit": "", "versions": versions or {"torch": "1"},
            "kept_under": [{"code": k, "state": "k"} for k in kept]}


def test_what_is_equal_is_done_and_another_recipe_is_refused_or_made():
    there = made({"lr": 1, "mean": [0]}, {"f": "1"})
    assert common.decide("x", there, made({"lr": 1, "mean": [1]}, {"f": "1"})) == "done"
    other = made({"lr": 2, "new": 3}, {"f": "2"})
    with pytest.raises(UserError, match="^x was made with another recipe: lr 1 -> 2, new None -> 3; pass --replace"):
        common.decide("x", there, other, replace=False)
    assert common.decide("x", there, other) == "make"  # the code is no question then


def test_other_code_is_a_question_with_three_answers(capsys):
    there, wanted = made({}, {"f": "1", "g": "1", "gone": "1"}), made({}, {"f": "2", "g": "1", "new": "1"})
    with pytest.raises(UserError, match=r"^x was made by other code \(f, gone, new\): --code new makes anew"):
        common.decide("x", there, wanted)
    assert common.decide("x", there, wanted, "new") == "make" and there["kept_under"] == []
    assert common.decide("x", there, wanted, "keep") == "kept" and there["kept_under"][0]["code"] == wanted["code"]
    assert common.decide("x", there, wanted) == "done"  # it is asked once
    assert common.decide("x", there, made({}, {"f": "1", "g": "1", "gone": "1"})) == "done"  # the edit was taken back
    with pytest.raises(UserError, match=r"\(g\)"):
        common.decide("x", there, made({}, {"f": "2", "g": "2", "new": "1"}))


def test_changes_are_those_of_the_recipe_or_else_those_of_the_code():
    there = made({"lr": 1, "mean": [0]}, {"f": "1", "g": "1"})
    assert common.changes(there, {"lr": 1, "mean": [1]}, {"f": "1", "g": "1"}) == ([], [])
    assert common.changes(there, {"lr": 1}, {"g": "2", "f": "1", "a": "1"}) == ([], ["a", "g"])
    assert common.changes(there, {"lr": 2}, {"f": "2", "g": "1"}) == (["lr 1 -> 2"], [])
    touched = there | {"touched": ["model.pt"]}
    assert common.changes(touched, {"lr": 1}, {"f": "1"}) == ([], ["model.pt touched by hand", "g"])
    kept = made({}, {"f": "1"}, kept=[{"f": "2"}, {"f": "3"}])
    assert [common.changes(kept, {}, {"f": f})[1] for f in "123"] == [[], ["f"], []]  # what made it, or the last kept
    assert there == made({"lr": 1, "mean": [0]}, {"f": "1", "g": "1"})


small_dicts = st.dictionaries(st.sampled_from(["a", "b", "mean"]), st.integers(0, 1))


@given(small_dicts, small_dicts, small_dicts, small_dicts, st.sampled_from([None, "new", "keep"]))
def test_what_is_decided_follows_from_the_changes(recipe, code, recipe_now, code_now, answer):
    there, wanted = made(recipe, code), made(recipe_now, code_now)
    recipe_lines, names = common.changes(there, recipe_now, code_now)
    if names and answer is None:
        with pytest.raises(UserError, match="made by other code"):
            common.decide("x", there, wanted)
        return
    expected = "make" if recipe_lines else {"new": "make", "keep": "kept"}[answer] if names else "done"
    assert common.decide("x", there, wanted, answer) == expected
    if expected == "kept":
        assert common.changes(there, recipe_now, code_now) == ([], [])


@pytest.mark.parametrize(("value", "told"), [
    ({"a": {}, "b": "x"}, True), ({"a": {}, "b": "x", "more": 1}, True), ({"a": {}}, False),
    ({"a": [], "b": "x"}, False), ({"a": {}, "b": None}, False), ([], False), (None, False), ("ab", False)])
def test_kinds_of_values_are_looked_at_before_they_are_used(value, told):
    assert common.has_kinds(value, {"a": dict, "b": str}) is told


KINDS = {"ids": [int], "made": [{"hash": str}], "counts": {str: {str: int}}}


@pytest.mark.parametrize(("value", "told"), [
    ({}, True), ({"ids": []}, True), ({"made": [{"hash": "a", "epoch": 1}]}, True), ({"counts": {}}, True),
    ({"ids": [1, [2]]}, False), ({"ids": {"0": 1}}, False), ({"made": [{}]}, False), ({"made": [["hash"]]}, False),
    ({"made": [{"hash": 1}]}, False), ({"counts": {"a": 1}}, False), ({"counts": {"a": {"b": "1"}}}, False)])
def test_kinds_are_looked_at_in_lists_and_objects_too(value, told):
    sound = {"ids": [1, 2], "made": [{"hash": "a"}], "counts": {"a": {"b": 1}}}
    assert common.has_kinds(sound | value, KINDS) is told


def test_other_versions_are_a_note(capsys):
    assert common.decide("x", made({}, {}), made({}, {}, versions={"torch": "2"})) == "done"
    assert "note: x was made with other versions: torch 1 -> 2" in capsys.readouterr().out


def test_a_description_counts_only_with_its_files_and_names_those_that_were_touched(tmp_path):
    hashes, path = common.Hashes(tmp_path / "cache"), tmp_path / "config.json"
    (tmp_path / "model.pt").write_text("1")
    description = made({"lr": 1}, {"f": "1"}) | {"files": {"model.pt": common.file_hash(tmp_path / "model.pt")}}
    assert common.read_description(path, hashes) is None
    path.write_text(json.dumps(description))
    assert common.read_description(path, hashes) == description | {"touched": []}
    (tmp_path / "model.pt").write_text("2")
    found = common.read_description(path, hashes)
    assert found["touched"] == ["model.pt"] and found["files"]["model.pt"] == common.file_hash(tmp_path / "model.pt")
    assert common.code_changes(found, {"f": "1"}) == ["model.pt touched by hand"]
    (tmp_path / "model.pt").unlink()
    assert common.read_description(path, hashes) is None
    for content in ([], {}, {"files": {}}, description | {"files": [1]}, description | {"code": 1}):
        path.write_text(json.dumps(content))
        assert common.read_description(path, hashes) is None


# ---- what is moved aside, kept and guarded --------------------------------------------------------------------------


@pytest.mark.parametrize("killed_after", range(5))
def test_a_kill_between_two_moves_loses_neither_the_old_nor_the_new(tmp_path, monkeypatch, killed_after):
    names = ["config.json", "log.csv", "model.pt"]
    (tmp_path / "replaced").mkdir()
    for name in names:
        (tmp_path / name).write_text("old")
        (tmp_path / "replaced" / name).write_text("older")
    moves, replace = iter(range(killed_after)), os.replace

    def deadly(*paths):
        if next(moves, None) is None:
            raise KeyboardInterrupt
        replace(*paths)

    def finish():
        common.move_aside(tmp_path, names)
        for name in names[1:]:
            (tmp_path / f"{name}.new").write_text("new")
            os.replace(tmp_path / f"{name}.new", tmp_path / name)
        common.write_description(tmp_path / names[0], made({}, {}), files={})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", deadly)
        finish()
    finish()
    assert [(tmp_path / name).read_text() for name in names[1:]] == ["new"] * 2
    assert common.read_json(tmp_path / names[0])["recipe"] == {}
    assert [(tmp_path / "replaced" / name).read_text() for name in names] == ["old"] * 3


def test_what_lost_its_description_is_kept_too(tmp_path):
    """Move files as after a kill before the description was written, while replaced/ holds a whole older artefact."""
    (tmp_path / "replaced").mkdir()
    for name in ("config.json", "model.pt"):
        (tmp_path / "replaced" / name).write_text("older")
    (tmp_path / "model.pt").write_text("old")
    common.move_aside(tmp_path, ["config.json", "model.pt"])
    assert [(path.name, path.read_text()) for path in (tmp_path / "replaced").iterdir() if path.name[0] != "."] == [
        ("model.pt", "old")]


def test_nothing_to_move_makes_no_folder(tmp_path, capsys):
    common.move_aside(tmp_path, ["a", "b"])
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_each_state_of_the_code_is_kept_once(tmp_path, monkeypatch):
    states = []
    for files in ({"train.py": b"1"}, {"train.py": b"1"}, {"train.py": b"2"}):
        monkeypatch.setattr(common, "project_files", lambda files=files: files)
        common.keep_code(tmp_path)
        states.append(common.code_state())
        kept = {path.name: path.read_bytes() for path in (tmp_path / "code" / states[-1]).iterdir()}
        assert kept == files
    assert states[0] == states[1] and {path.name for path in (tmp_path / "code").iterdir()} == set(states)


@pytest.mark.parametrize(("output", "told"), [("data/x.csv", "lies in DATA"), ("data", "lies in DATA"),
                                              ("out/../data/a/b.csv", "lies in DATA"),
                                              ("link/x.csv", "lies in DATA"), ("mine.csv", "over .*mine.csv"),
                                              ("other/../mine.csv", "over .*mine.csv"),
                                              ("alias.csv", "over .*mine.csv")])
def test_no_output_is_an_input_or_in_data(tmp_path, output, told):
    for folder in ("data", "out", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mine.csv").touch()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "alias.csv").symlink_to(tmp_path / "mine.csv")
    with pytest.raises(UserError, match=told):
        common.check_output(tmp_path / "data", tmp_path / output, inputs=[tmp_path / "mine.csv"])
    common.check_output(tmp_path / "data", tmp_path / "out/x.csv", tmp_path, inputs=[tmp_path / "mine.csv"])


def test_git_names_the_commit_and_marks_a_dirty_tree(monkeypatch, tmp_path):
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", common.git_commit())
    monkeypatch.setenv("PATH", str(tmp_path))
    common.git_commit.cache_clear()
    assert common.git_commit() == ""
    common.git_commit.cache_clear()
