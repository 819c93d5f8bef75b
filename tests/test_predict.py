"""ensemble.py in-process, on stores made by hand."""
import csv
import json
import os
import re
import shutil
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch
from conftest import seal, write_coco, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools.coco import COCO
from sklearn.metrics import confusion_matrix, jaccard_score

import common
import ensemble
import pseudo_label
from common import SUBMIT_SIZE, UserError

torch.set_num_threads(1)  # for nets this small a second thread would only wait for the first
CLASSES = ["Background", "UNKNOWN", "General trash", "Paper", "Paper pack", "Metal", "Glass", "Plastic", "Styrofoam",
           "Plastic bag", "Battery", "Clothing"]


# ---- stores by hand -------------------------------------------------------------------------------------------------


MAKERS = [{"file": "epoch-002.pt", "hash": "c0ffee", "epoch": 2},
          {"file": "epoch-004.pt", "hash": "0ff1ce", "epoch": 4}]


def random_stores(rng, n_images, n_classes=12):
    """uint8 [N, C, SUBMIT_SIZE, SUBMIT_SIZE] in blocks of 16 x 16 pixels."""
    probs = rng.dirichlet(np.full(n_classes, 0.3), (n_images, 16, 16)) * 255
    return probs.round().astype(np.uint8).transpose(0, 3, 1, 2).repeat(16, 2).repeat(16, 3)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- the submission file --------------------------------------------------------------------------------------------


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 200)))
def test_a_mask_is_encoded_as_its_ids_row_by_row(pred):
    assert ensemble.encode_mask(pred) == " ".join(map(str, pred.ravel().tolist())).encode()


def test_every_class_id_up_to_200_is_encoded():
    ids = np.random.default_rng(0).permutation(201).astype(np.uint8)
    assert ensemble.encode_mask(np.stack([ids, ids[::-1]])).split() == [b"%d" % i for i in [*ids, *ids[::-1]]]


def masks(n, seed=0):
    return np.random.default_rng(seed).integers(0, 12, (n, SUBMIT_SIZE, SUBMIT_SIZE), dtype=np.uint8)


def submission_faults(path, names, n_classes):
    return [fault for fault, _ in ensemble.read_submission(path, names, n_classes) if fault]


@pytest.fixture(scope="module")
def good_csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("submission") / "good.csv"
    ensemble.write_submission(path, ["7", "3", "12"], masks(3), 12)
    return path


def test_a_submission_read_back_holds_the_masks_in_order(good_csv):
    lines = good_csv.read_text().splitlines()
    assert lines[0] == "image_id,PredictionString" and len(lines) == 4
    for line, name, mask in zip(lines[1:], ("7", "3", "12"), masks(3), strict=True):
        image_id, ids = line.split(",")
        assert image_id == name and [int(i) for i in ids.split(" ")] == mask.ravel().tolist()
    assert submission_faults(good_csv, ["7", "3", "12"], 12) == []


@pytest.mark.parametrize("name", ["batch_01_vt/0003.jpg", 'a,"b".jpg', "new\nline.jpg", "Müll 1.jpg", ' "', "'"])
def test_a_file_name_is_quoted_so_that_it_is_read_back(tmp_path, name):
    ensemble.write_submission(tmp_path / "s.csv", [name, "b"], masks(2), 12)
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as f:
        csv.field_size_limit(10 ** 6)
        assert [row[0] for row in csv.reader(f)] == ["image_id", name, "b"]


def replace_id(line, position, text):
    name, ids = line.split(",")
    ids = ids.split(" ")
    ids[position] = text
    return f"{name},{' '.join(ids)}"


ROW_FAULTS = {  # name: (what is done to the lines, the lines that must be named)
    "wrong order": (lambda rows: [rows[0], rows[2], rows[1], rows[3]], [2, 3]),
    "first row missing": (lambda rows: [rows[0], *rows[2:]], [2, 3, 4]),
    "last row missing": (lambda rows: rows[:-1], [4]),
    "no rows": (lambda rows: rows[:1], [2, 3, 4]),
    "extra row": (lambda rows: [*rows, "99," + rows[1].split(",")[1]], [5]),
    "last row twice": (lambda rows: [*rows, rows[3]], [5]),
    "row twice": (lambda rows: [rows[0], rows[1], rows[1], rows[3]], [3]),
    "blank row": (lambda rows: [*rows[:2], "", *rows[2:]], [3, 4, 5]),
    "other name": (lambda rows: [*rows[:2], "03" + rows[2][1:], rows[3]], [3]),
    "an id too few": (lambda rows: [*rows[:2], rows[2].rsplit(" ", 1)[0], rows[3]], [3]),
    "an id too many": (lambda rows: [*rows[:2], rows[2] + " 0", rows[3]], [3]),
    "id out of range": (lambda rows: [*rows[:2], replace_id(rows[2], 700, "12"), rows[3]], [3]),
    "negative id": (lambda rows: [*rows[:2], replace_id(rows[2], 700, "-1"), rows[3]], [3]),
    "word in the middle": (lambda rows: [*rows[:2], replace_id(rows[2], 700, "metal"), rows[3]], [3]),
    "word at the end": (lambda rows: [*rows[:2], replace_id(rows[2], -1, "metal"), rows[3]], [3]),
    "word after the end": (lambda rows: [*rows[:2], rows[2] + " metal", rows[3]], [3]),
    "fraction in the middle": (lambda rows: [*rows[:2], replace_id(rows[2], 700, "1.0"), rows[3]], [3]),
    "fraction at the end": (lambda rows: [*rows[:2], replace_id(rows[2], -1, "1.0"), rows[3]], [3]),
    "empty string": (lambda rows: [*rows[:2], "3,", rows[3]], [3]),
    "spaces": (lambda rows: [*rows[:2], "3,   ", rows[3]], [3]),
    "no second column": (lambda rows: [*rows[:2], "3", rows[3]], [3]),
    "third column": (lambda rows: [*rows[:2], rows[2] + ",0", rows[3]], [3]),
    "two faults": (lambda rows: [rows[0], rows[1] + " 0", rows[2], replace_id(rows[3], 0, "12")], [2, 4]),
}


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_a_faulty_submission_is_refused_naming_its_lines(good_csv, tmp_path, fault):
    change, numbers = ROW_FAULTS[fault]
    (tmp_path / "bad.csv").write_text("\n".join(change(good_csv.read_text().splitlines())) + "\n")
    faults = submission_faults(tmp_path / "bad.csv", ["7", "3", "12"], 12)
    assert [line.split("bad.csv line ")[1].split(",")[0].split(":")[0] for line in faults] == [str(n) for n in numbers]


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_submission_with_only_carriage_returns_is_refused(good_csv, tmp_path, quote):
    rows = [f"{quote}{row}{quote}" for row in good_csv.read_text().replace(",", f"{quote},{quote}").splitlines()]
    (tmp_path / "bad.csv").write_text("\r".join(rows))
    fault, = submission_faults(tmp_path / "bad.csv", ["7", "3", "12"], 12)
    assert "the first line is " in fault and fault.isprintable() and len(fault) < 300


@pytest.mark.parametrize(("position", "text", "told"), [
    (700, "12", "row 2, column 188, both from 0, is 12"), (0, "-1", "row 0, column 0, both from 0, is -1"),
    (65535, "metal", "row 255, column 255, both from 0, is metal"), (256, "nan", "row 1, column 0, both from 0, is n"),
    (1, "9" * 40, "column 1, both from 0, is " + "9" * 30), (1, "\x1b[2J", r"is \x1b[2J"), (1, "é" * 40, "is é"),
    (9, "", "there are 65535"), (9, "1 1", "there are 65537")])
def test_the_pixel_that_is_no_class_is_named(good_csv, tmp_path, position, text, told):
    rows = good_csv.read_text().splitlines()
    (tmp_path / "bad.csv").write_text("\n".join([*rows[:2], replace_id(rows[2], position, text), rows[3]]) + "\n")
    fault, = submission_faults(tmp_path / "bad.csv", ["7", "3", "12"], 12)
    assert "line 3, image 3: not 65536 ids of 0 to 11: " in fault and told in fault and fault.isprintable()


HARMLESS = {
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "CRLF": lambda content: content.replace(b"\n", b"\r\n"),
    "spaces": lambda content: content.replace(b" ", b"  ").replace(b"\n", b" \n").replace(b",", b", ", 1),
    "tabs": lambda content: content.replace(b" ", b"\t"),
    "leading noughts": lambda content: content.replace(b" 1 ", b" 01 "),
    "quotes": lambda content: content.replace(b",", b',"').replace(b"\n", b'"\n').replace(b'"', b"", 2),
    "no last line end": lambda content: content[:-1],
    "blank lines at the end": lambda content: content + b"\n \r\n,\n\n"}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_a_spreadsheet_does_to_a_submission_is_harmless(good_csv, tmp_path, change):
    (tmp_path / "a.csv").write_bytes(HARMLESS[change](good_csv.read_bytes()))
    assert (tmp_path / "a.csv").read_bytes() != good_csv.read_bytes()
    rows = list(ensemble.read_submission(tmp_path / "a.csv", ["7", "3", "12"], 12))
    assert [fault for fault, _ in rows] == [None] * 3
    assert (np.stack([mask for _, mask in rows]) == masks(3)).all()


ENDLESS = {"a line": (lambda text: text + b"0 " * ensemble.MAX_ROW, "line 5: longer than 4194304 bytes"),
           "a quote": (lambda text: text.replace(b"3,", b'3,"') + b"99,0\n" * ensemble.MAX_ROW,
                       r"line 3: field larger than field limit \(4194304\): is a quote left open")}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_line_or_quote_without_an_end_is_named_and_not_read_whole(good_csv, tmp_path, kind):
    change, told = ENDLESS[kind]
    (tmp_path / "bad.csv").write_bytes(change(good_csv.read_bytes()))
    with open(tmp_path / "bad.csv", "rb") as f, pytest.raises(UserError, match=f"bad.csv {told}"):
        for _ in ensemble.csv_rows(f):
            assert f.tell() < 2 * ensemble.MAX_ROW + 2 ** 20


@given(st.data())
def test_a_changed_submission_is_read_or_refused_in_clean_lines(good_csv, tmp_path_factory, choices):
    path, content = tmp_path_factory.getbasetemp() / "changed.csv", good_csv.read_bytes()
    for _ in range(choices.draw(st.integers(1, 4))):
        start = choices.draw(st.one_of(st.integers(0, 60), st.integers(0, len(content))))
        new = choices.draw(st.one_of(st.binary(max_size=4), st.sampled_from([
            b'"', b",", b"\n", b"\r", b"\0", b"nan", b"-", b"9" * 30, b"\xff", b"\x1b[2J", b"\xe2\x80\xae"])))
        content = content[:start] + new + content[start + choices.draw(st.integers(0, 3)):]
    path.write_bytes(content)
    rows = list(ensemble.read_submission(path, ["7", "3", "12"], 12))
    assert all(fault is None or fault.isprintable() for fault, _ in rows)
    assert all(mask.shape == (SUBMIT_SIZE, SUBMIT_SIZE) and mask.max() < 12 for fault, mask in rows if not fault)


@pytest.mark.parametrize("header", ["", "image_id", "image_id,prediction", "PredictionString,image_id",
                                    "image_id,PredictionString,x"])
def test_a_submission_with_another_header_is_refused(good_csv, tmp_path, header):
    (tmp_path / "bad.csv").write_text("\n".join([header, *good_csv.read_text().splitlines()[1:]]) + "\n")
    faults = submission_faults(tmp_path / "bad.csv", ["7", "3", "12"], 12)
    assert len(faults) == 1 and "the first line is" in faults[0]


def test_an_empty_file_is_no_submission(tmp_path):
    (tmp_path / "bad.csv").write_text("")
    assert len(submission_faults(tmp_path / "bad.csv", [], 12)) == 1


def test_a_file_cut_off_anywhere_is_no_submission(good_csv, tmp_path):
    content = good_csv.read_bytes()
    for size in (10, 27, 1000, len(content) // 2, len(content) - 3):
        (tmp_path / "cut.csv").write_bytes(content[:size])
        assert submission_faults(tmp_path / "cut.csv", ["7", "3", "12"], 12)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_crash_while_writing_leaves_the_old_submission(tmp_path, error):
    def preds():
        yield from masks(1)
        raise error
    (tmp_path / "s.csv").write_text("old")
    with pytest.raises(error):
        ensemble.write_submission(tmp_path / "s.csv", ["1", "2"], preds(), 12)
    assert (tmp_path / "s.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("preds", "n_classes"), [(masks(2), 11), (masks(2)[:, 1:], 12)])
def test_a_submission_that_is_not_right_when_read_back_gets_no_name(tmp_path, preds, n_classes):
    (tmp_path / "s.csv").write_text("old")
    with pytest.raises(UserError, match="(?s)line 2, image 1: not 65536 ids.*line 3, image 2"):
        ensemble.write_submission(tmp_path / "s.csv", ["1", "2"], preds, n_classes)
    assert (tmp_path / "s.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# ---- soft vote ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voters(tmp_path_factory, splits):
    """Run folders by hand: recipe a on folds 0, 1 and 2, recipe b on folds 0 and 1. Tests only read them."""
    root, rng = tmp_path_factory.mktemp("voters"), np.random.default_rng(1)
    runs = {}
    for recipe, fold in (("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)):
        run = runs[recipe, fold] = root / recipe / f"f{fold}"
        info = {"model": f"unet/{recipe}", "fold": fold, "checkpoints": MAKERS}
        write_store(run, "test", random_stores(rng, 4), splits[1], **info)
        ids = splits[0].ids[fold::3][::-1]  # in another order than train.json's
        noise, truths = random_stores(rng, len(ids)), [splits[0].truth(splits[0].ids.index(i)) for i in ids]
        right = (np.arange(12)[:, None, None] == np.stack(truths)[:, None]) * rng.integers(60, 200)
        write_store(run, "valid", (noise // 2 + right // 2).astype(np.uint8), splits[0], ids, **info)
    return runs


@pytest.fixture
def changeable(voters, tmp_path):
    """A copy of them to change."""
    root = shutil.copytree(voters["a", 0].parents[1], tmp_path / "voters")
    return {key: root / key[0] / f"f{key[1]}" for key in voters}


def ensemble_line(command, data, cache, runs, *more):
    return ensemble.parse_args([command, "--data", str(data), "--cache", str(cache), *more, *map(str, runs)])


def soft(tmp_path, data, cache, runs, *more):
    """(names, ids [N, pixels]) of the submission of these runs."""
    ensemble.main(ensemble_line("soft", data, cache, runs, "--out", str(tmp_path / "s.csv"), *more))
    rows = [line.split(",") for line in (tmp_path / "s.csv").read_text().splitlines()[1:]]
    return [name for name, _ in rows], np.array([ids.split() for _, ids in rows]).astype(int)


@pytest.fixture
def all_kept(monkeypatch):
    """No least share and no minimum area, so that the submission is the vote itself."""
    gain = ensemble.gain
    monkeypatch.setattr(ensemble, "gain", lambda *args: gain(*args) | {"low": -1.0})


def test_the_submission_is_the_vote_in_which_the_folds_of_a_recipe_share_one(
        tiny_data, cache, splits, voters, tmp_path, all_kept):
    names, ids = soft(tmp_path, tiny_data, cache, voters.values())
    probs = {key: np.load(run / "test.npy").astype(float) for key, run in voters.items()}
    a = (probs["a", 0] + probs["a", 1] + probs["a", 2]) / 3
    b = (probs["b", 0] + probs["b", 1]) / 2
    vote = ((a + b) / 2).reshape(4, 12, -1)
    assert names == [str(i) for i in splits[1].ids]
    assert (np.take_along_axis(vote, ids[:, None], 1)[:, 0] > vote.max(1) - 1e-3).all()
    unweighted = sum(probs.values()).reshape(4, 12, -1)
    assert (unweighted.argmax(1) != vote.argmax(1)).mean() > 0.01  # the two ways can be told apart


@given(arrays(np.uint8, (5, 4, 6), elements=st.integers(0, 3)), st.booleans())
def test_the_top_class_is_that_of_argmax_the_first_of_equal_ones(values, as_bytes):
    values = values if as_bytes else values / np.float32(3)
    assert np.array_equal(ensemble.top_class(values), values.argmax(0))


@settings(max_examples=5)
@given(st.integers(1, 200), st.integers(0, 2 ** 32 - 1), st.sampled_from(["", " ", "0", ":", "é", "1", "x", "-"]))
def test_a_mask_is_read_as_it_was_written_and_nothing_else_is(n_classes, seed, more):
    pred = np.random.default_rng(seed).integers(0, n_classes, (SUBMIT_SIZE, SUBMIT_SIZE)).astype(np.uint8)
    text = ensemble.encode_mask(pred).decode()
    assert np.array_equal(ensemble.decode_mask(text.encode(), n_classes), pred.ravel())
    assert text == " ".join(map(str, pred.ravel()))
    for other in (more + " " + text[2:], text.replace(" ", more + "  ", 1), text + more + " ", text[:-2]):
        found = ensemble.decode_mask(other.encode(), n_classes)
        assert found is None or found.max() >= n_classes or " ".join(map(str, found)) == other  # too large is for later


def test_images_may_be_named_by_file_name(tiny_data, cache, splits, voters, tmp_path):
    names, _ = soft(tmp_path, tiny_data, cache, [voters["b", 0]], "--image-id", "file_name")
    assert names == splits[1].file_names
    doubled = Namespace(file_names=["a.png", "b.png", "a.png"], ids=[1, 2, 3])
    with pytest.raises(UserError, match="several images have the file_name a.png.*--image-id id"):
        ensemble.image_names(Namespace(image_id="file_name"), doubled)
    assert ensemble.image_names(Namespace(image_id="id"), doubled) == ["1", "2", "3"]


def test_a_picture_of_predictions_stands_beside_the_submission(tiny_data, cache, voters, tmp_path):
    soft(tmp_path, tiny_data, cache, [voters["b", 0]])
    sheet = cv2.imread(str(tmp_path / "s.png"))
    assert sheet is not None and sheet.shape[0] > 2 * SUBMIT_SIZE and sheet.shape[1] == 6 * SUBMIT_SIZE


@pytest.mark.parametrize("command", ["soft", "hard"])
def test_background_for_want_of_a_photo_makes_a_whole_submission_and_exit_code_3(
        tiny_data, cache, splits, changeable, tmp_path, command):
    ids = splits[1].ids
    for key, unreadable in ((("a", 0), [ids[1]]), (("b", 1), [ids[2], ids[1]])):
        change_json(changeable[key] / "test.json", unreadable=unreadable)
    with pytest.raises(UserError, match=f"background: {ids[1]}, {ids[2]}; mend") as stop:
        ensemble.main(ensemble_line(command, tiny_data, cache, changeable.values(), "--out", str(tmp_path / "s.csv")))
    assert stop.value.code == 3
    assert submission_faults(tmp_path / "s.csv", [str(i) for i in ids], 12) == []


def test_the_submission_has_no_class_below_its_minimum_area(tiny_data, cache, voters, tmp_path, monkeypatch):
    choose, areas = ensemble.choose, np.arange(12) * 1000
    monkeypatch.setattr(ensemble, "choose", lambda *args: (
        {"weights": np.ones(1), "least share": 0, "minimum area": areas}, *choose(*args)[1:]))
    _, ids = soft(tmp_path, tiny_data, cache, [voters["a", 0]])
    voted = np.load(voters["a", 0] / "test.npy").argmax(1).reshape(4, -1)
    for found, vote in zip(ids, voted, strict=True):
        counted = {c: (vote == c).sum() for c in range(12)}
        assert 0 < sum(0 < counted[c] < areas[c] for c in counted) < 11
        assert found.tolist() == [c if counted[c] >= areas[c] else 0 for c in vote.tolist()]


@pytest.mark.parametrize("command", ["soft", "score"])
@pytest.mark.parametrize(("key", "value"), [
    ("classes", CLASSES[:1] + CLASSES[:0:-1]), ("folds_csv", "0ther"), ("paint", "id"), ("data", "0ther")])
def test_runs_that_disagree_are_refused_by_name(tiny_data, cache, changeable, tmp_path, command, key, value):
    for split in ("valid", "test"):
        change_json(changeable["a", 1] / f"{split}.json", **{key: value})
    out = ["--out", str(tmp_path / "s.csv")] if command == "soft" else []
    told = "other classes than .*a/f0: it orders them so: Background, C" if key == "classes" else f"another {key}"
    with pytest.raises(UserError, match=f"a/f1/.*{told}"):
        ensemble.main(ensemble_line(command, tiny_data, cache, changeable.values(), *out))
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize("split", ["test", "valid"])
def test_stores_of_the_same_images_in_another_order_are_aligned(tiny_data, cache, changeable, tmp_path, capsys, split):
    runs = list(changeable.values())
    names, masks = soft(tmp_path / "before", tiny_data, cache, runs)
    said = capsys.readouterr().out
    path, store = changeable["b", 0] / f"{split}.json", np.load(changeable["b", 0] / f"{split}.npy")
    change_json(path, image_ids=common.read_json(path)["image_ids"][::-1])
    np.save(path.with_suffix(".npy"), store[::-1])
    seal(path)
    found = soft(tmp_path / "after", tiny_data, cache, runs)
    assert found[0] == names and (found[1] == masks).all()
    assert capsys.readouterr().out == said.replace("/before/", "/after/")


def test_test_stores_of_other_images_than_the_datas_are_refused_with_the_difference(
        tiny_data, cache, splits, changeable, tmp_path):
    change_json(changeable["b", 0] / "test.json", image_ids=[*splits[1].ids[:3], 777])
    for runs in (changeable.values(), [changeable["b", 0]]):
        with pytest.raises(UserError, match=f"b/f0/test.npy is of other images: it lacks 1: {splits[1].ids[3]}; also "
                                             "has 1: 777; run infer.py again"):
            soft(tmp_path, tiny_data, cache, runs)


@pytest.mark.parametrize("command", ["soft", "score"])
def test_stores_of_other_classes_than_the_datas_are_refused(tiny_data, cache, changeable, tmp_path, command):
    for split in ("valid", "test"):
        change_json(changeable["b", 0] / f"{split}.json", classes=CLASSES[:-1] + ["Clothes"])
    out = ["--out", str(tmp_path / "s.csv")] if command == "soft" else []
    with pytest.raises(UserError, match="b/f0 has other classes than .*: it lacks 1: Clothing; also has 1: Clothes"):
        ensemble.main(ensemble_line(command, tiny_data, cache, [changeable["b", 0]], *out))


@pytest.mark.parametrize(("command", "split"), [("soft", "test"), ("soft", "valid"), ("score", "valid"),
                                                ("hard", "test")])
def test_stores_of_other_photos_than_are_there_now_are_refused(
        tiny_data, cache, changeable, tmp_path, command, split):
    for run in changeable.values():
        change_json(run / f"{split}.json", data="0f-before")
    out = [] if command == "score" else ["--out", str(tmp_path / "s.csv")]
    with pytest.raises(UserError, match=f"a/f0/{split}.json was made on other data than is in "):
        ensemble.main(ensemble_line(command, tiny_data, cache, changeable.values(), *out))
    assert not (tmp_path / "s.csv").exists()


def change_run(run, key="recipe", **changes):
    """Let both stores of a run say that another recipe or, with key="code", other code has trained it."""
    for path in (run / "valid.json", run / "test.json"):
        of_run = common.read_json(path)["run"]
        of_run[key] |= changes
        change_json(path, run=of_run | {"codes": [common.short_hash(of_run["code"])]})


OTHER_RUNS = {  # what is done to fold 1: what is said of it
    "a setting": (lambda run: change_run(run, lr=0.002), "lr"),
    "two settings": (lambda run: change_run(run, seed=1, batch=8), "seed, batch"),
    "code of the run": (lambda run: change_run(run, "code", train_one_epoch="0dd"), "the code of train_one_epoch"),
    "code of the stores": (lambda run: [change_json(run / f"{split}.json", code={"predict_probs": "0dd"})
                                        for split in ("valid", "test")], "the code of predict_probs")}


@pytest.mark.parametrize("command", ["soft", "score", "compare"])
@pytest.mark.parametrize("change", OTHER_RUNS)
def test_folds_that_were_made_otherwise_are_no_member_unless_it_is_asked_for(
        tiny_data, cache, changeable, tmp_path, capsys, command, change):
    spoil, told = OTHER_RUNS[change]
    spoil(changeable["a", 1])
    runs, out = changeable.values(), []
    if command == "compare":
        for round_ in (0, 1):
            shutil.copytree(changeable["a", 0].parent, tmp_path / f"exp/r{round_}/some/member/s64")
        for path in (tmp_path / "exp").glob("r*/*/*/s*/f*/*.json"):
            change_json(path, round=int(path.parts[-6][1]), model="some/member")
        runs = [tmp_path / "exp/r0", tmp_path / "exp/r1"]
    elif command == "soft":
        out = ["--out", str(tmp_path / "s.csv")]
    with pytest.raises(UserError, match=r"f1/\w+.json and .*f0/\w+.npy are folds of one member, but differ in "
                                         f"{told}: .*--mixed"):
        ensemble.main(ensemble_line(command, tiny_data, cache, runs, *out))
    assert not (tmp_path / "s.csv").exists()
    ensemble.main(ensemble_line(command, tiny_data, cache, runs, "--mixed", *out))
    assert ("14 images" if command == "compare" else "14 of 14 training images") in capsys.readouterr().out


def test_folds_of_one_member_may_differ_in_what_follows_from_the_fold_and_members_in_anything(
        tiny_data, cache, changeable, capsys):
    for number, run in enumerate(changeable.values()):
        change_run(run, fold=number, pseudo=f"1abe1{number}", contaminated=bool(number), mean=[number] * 3,
                   std=[number] * 3)
    for fold in (0, 1):
        change_run(changeable["b", fold], lr=0.002)
        change_run(changeable["b", fold], "code", train_one_epoch="0dd")
    ensemble.main(ensemble_line("score", tiny_data, cache, changeable.values()))
    assert "14 of 14 training images" in capsys.readouterr().out


def test_stores_of_older_code_that_were_kept_count_as_those_of_the_code_they_were_kept_under(
        tiny_data, cache, changeable, capsys):
    new = {"code": {"predict_probs": "0dd"}, "state": "0dd57", "commit": "", "versions": {}}
    for key, run in changeable.items():
        if key != ("a", 0):
            change_json(run / "valid.json", **new)
    with pytest.raises(UserError, match="differ in the code of predict_probs"):
        ensemble.main(ensemble_line("score", tiny_data, cache, changeable.values()))
    change_json(changeable["a", 0] / "valid.json", kept_under=[new | {"code": {"0lder": "c0de"}}, new])
    ensemble.main(ensemble_line("score", tiny_data, cache, changeable.values()))
    assert "14 of 14 training images" in capsys.readouterr().out


def test_the_same_fold_of_a_recipe_twice_is_refused(tiny_data, cache, voters):
    runs = [voters["a", 0], voters["a", 1], voters["a", 0]]
    with pytest.raises(UserError, match="a/f0: given twice"):
        ensemble.main(ensemble_line("score", tiny_data, cache, runs))


def test_a_store_of_another_version_is_refused_with_what_it_lacks(tiny_data, cache, changeable, tmp_path):
    path = changeable["b", 0] / "test.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in info.items() if key not in ("paint", "seed")}))
    with pytest.raises(UserError, match="b/f0/test.json: not a whole store: seed, paint missing or damaged; run infer"):
        soft(tmp_path, tiny_data, cache, [changeable["b", 0]])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_store_with_other_kinds_of_values_is_refused_by_their_names(tiny_data, cache, changeable, tmp_path, split):
    path = changeable["b", 0] / f"{split}.json"
    info = json.loads(path.read_text())
    for key in (*common.DESCRIPTION_KINDS, *common.STORE_KINDS):
        for value in ([[1]], {"a": [1]}, None, [{"a": 1}]):
            if info[key] in ({}, []) and not value or common.has_kinds(
                    {key: value}, {key: (common.DESCRIPTION_KINDS | common.STORE_KINDS)[key]}):
                continue
            path.write_text(json.dumps(info | {key: value}))
            with pytest.raises(UserError, match=f"{split}.json: not a whole store: {key} missing or damaged;"):
                soft(tmp_path, tiny_data, cache, [changeable["b", 0]])
    for text in ("[]", "3", "null", '"text"', "{}", "[" * 9999):
        path.write_text(text)
        with pytest.raises(UserError, match=f"{split}.json: not "):
            soft(tmp_path, tiny_data, cache, [changeable["b", 0]])


def test_a_submission_must_be_a_csv_for_its_picture_and_coco_stand_beside_it(tiny_data, cache, voters, tmp_path):
    for command in ("soft", "hard"):
        with pytest.raises(UserError, match="s.json: must end in .csv"):
            ensemble.main(ensemble_line(command, tiny_data, cache, [voters["a", 0]], "--out", str(tmp_path / "s.json")))


def test_a_run_without_stores_is_refused_by_name(tiny_data, cache, voters, tmp_path):
    with pytest.raises(UserError, match="nosuch/valid.json"):
        ensemble.main(ensemble_line("score", tiny_data, cache, [voters["a", 0], tmp_path / "nosuch"]))


def test_masks_exported_as_coco_are_read_back_as_they_were(tiny_data, cache, splits, tmp_path):
    rng, test = np.random.default_rng(0), splits[1]
    masks = rng.integers(0, 12, (len(test.ids), 16, 16), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    masks[1], masks[2, :128] = 0, 255  # nothing found; without a label
    common.write_coco(tmp_path / "coco.json", tiny_data / "test.json", test, enumerate(masks))
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert {a["image_id"] for a in coco["annotations"]} == set(test.ids) - {test.ids[1]}
    shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("train*.json"))
    shutil.copy(tmp_path / "coco.json", tmp_path / "data/train.json")  # as labels of what they were predicted for
    read = common.load_data(tmp_path / "data", tmp_path / "cache")[0]
    assert read.classes == test.classes and read.ids == test.ids
    for i, mask in enumerate(masks):
        height, width = test.sizes[i]
        assert (read.mask(i) == np.where(mask == 255, 0, mask)[2::256 // height, 2::256 // width]).all()
    by_file = COCO(tmp_path / "coco.json")
    for annotation in by_file.anns.values():
        shown = by_file.annToMask(annotation).astype(bool)
        assert annotation["area"] == shown.sum()
        x, y, width, height = map(int, annotation["bbox"])
        assert shown[y:y + height, x:x + width].sum() == shown.sum()


@pytest.mark.parametrize("command", ["soft", "hard"])
def test_a_submission_is_exported_as_coco_when_asked(tiny_data, cache, voters, splits, tmp_path, command):
    out = tmp_path / "s.csv"
    ensemble.main(ensemble_line(command, tiny_data, cache, [voters["a", 0]], "--out", str(out), "--coco"))
    coco, names = json.loads(out.with_suffix(".json").read_text()), [str(i) for i in splits[1].ids]
    ids = sorted(category["id"] for category in coco["categories"])
    for image_id, (_, mask) in zip(splits[1].ids, ensemble.read_submission(out, names, 12), strict=True):
        found = {a["category_id"] for a in coco["annotations"] if a["image_id"] == image_id}
        assert found == {ids[c - 1] for c in np.unique(mask[2::4, 2::4]) if c} != set()


# ---- what is written, and what made it ------------------------------------------------------------------------------


def everything_in(folder):
    """{path: content, None of a folder} of all but what locks leave."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
            if not path.name.endswith(".lock")}


@pytest.fixture
def project(tiny_data, voters, tmp_path):
    """A copy of DATA, two runs, two submissions and links to one of each, to write over."""
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    for fold in (0, 1):
        shutil.copytree(voters["a", fold], tmp_path / f"a/f{fold}")
    names = [str(image["id"]) for image in json.loads((folder / "test.json").read_text())["images"]]
    for seed, name in enumerate(("mine", "theirs")):
        ensemble.write_submission(tmp_path / f"{name}.csv", names, masks(len(names), seed), 12)
    (tmp_path / "link.csv").symlink_to(tmp_path / "theirs.csv")
    (tmp_path / "linked").symlink_to(tmp_path / "a/f0")
    (tmp_path / "data-link").symlink_to(folder)
    return tmp_path


READ, IN_DATA = "would be written over .*, which is read: choose", "lies in DATA, .*, where nothing is ever written"


@pytest.mark.parametrize(("line", "told"), [
    ("hard --out mine.csv mine.csv theirs.csv", READ), ("hard --out link.csv mine.csv theirs.csv", READ),
    ("hard --out theirs.csv mine.csv link.csv", READ), ("hard --out a/../mine.csv a/f0 mine.csv", READ),
    ("hard --coco --out a/f0/test.csv a/f0 mine.csv", READ), ("soft --coco --out a/f0/test.csv a/f0 a/f1", READ),
    ("soft --coco --out a/f1/valid.csv a/f0 a/f1", READ), ("soft --coco --out linked/test.csv a/f0 a/f1", READ),
    ("soft --coco --out a/f0/test.csv linked a/f1", READ),
    ("soft --out s.csv --report a/f1/valid.json a/f0 a/f1", READ),
    ("soft --out s.csv --report a/f0/test.npy a/f0 a/f1", READ),
    ("score --report a/f1/valid.json a/f0 a/f1", READ),
    ("soft --out data/s.csv a/f0 a/f1", IN_DATA), ("hard --out data/s.csv mine.csv theirs.csv", IN_DATA),
    ("soft --out data-link/batch_01/s.csv a/f0 a/f1", IN_DATA), ("soft --out data/new/s.csv a/f0 a/f1", IN_DATA),
    ("soft --out s.csv --report data/report.html a/f0 a/f1", IN_DATA),
    ("score --report data/train.json a/f0 a/f1", IN_DATA), ("score --tables data a/f0 a/f1", IN_DATA),
    ("soft --out s.csv --tables data a/f0 a/f1", IN_DATA),
    ("ladder --exp data/climb", IN_DATA),
    ("budget --exp data/b --budget 9m --models unet/resnet18 --pick-models unet/resnet18 --scales 64 --pick-scales 64 "
     "--folds 0 --pick-folds 0", IN_DATA)])
def test_nothing_is_written_over_what_is_read_or_into_the_data(cache, project, monkeypatch, line, told):
    monkeypatch.chdir(project)
    before = everything_in(project)
    command, *rest = line.split()
    with pytest.raises(UserError, match=told):
        ensemble.main(ensemble.parse_args([command, "--data", "data", "--cache", str(cache), *rest]))
    assert everything_in(project) == before


def test_a_run_may_get_a_submission_of_its_own(cache, project, monkeypatch):
    monkeypatch.chdir(project)
    before = everything_in(project)
    ensemble.main(ensemble.parse_args(["soft", "--data", "data", "--cache", str(cache), "--coco", "--out",
                                       "a/f0/alone.csv", "a/f0"]))
    after = everything_in(project)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys() if path.parent.name == "f0"} == {
        "alone.csv", "alone.png", "alone.json", "alone.made.json", "alone.oof.npz", "alone.vote.json",
        "code"}


def test_submissions_alone_are_voted_on_as_the_data_is_to_be_read(tmp_path):
    data = write_coco(tmp_path / "data", [(1, 8, 8), (2, 8, 8)], [(i, i, [[1, 1, 6, 1, 6, 6]]) for i in (1, 2)],
                      categories=[(0, "background"), (1, "Paper"), (2, "Metal")])
    ensemble.write_submission(tmp_path / "a.csv", ["9000"], np.full((1, SUBMIT_SIZE, SUBMIT_SIZE), 2, np.uint8), 3)
    line = ["hard", "--data", str(data), "--cache", str(tmp_path / "cache"), "--coco", "--out", str(tmp_path / "s.csv"),
            str(tmp_path / "a.csv")]
    with pytest.raises(UserError, match="--unused drop"):
        ensemble.main(ensemble.parse_args(line))
    ensemble.main(ensemble.parse_args([*line, "--unused", "drop"]))
    exported = common.read_json(tmp_path / "s.json")
    assert [each["category_id"] for each in exported["annotations"]] == [2]
    assert [each["name"] for each in exported["categories"]] == ["Paper", "Metal"]


def test_a_pipe_is_no_submission_of_a_team_mate(tiny_data, cache, tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    for name in ("a.csv", "nosuch.csv"):
        with pytest.raises(UserError, match=f"{name}: no file that can be read: give a CSV or the folder of a run"):
            ensemble.main(ensemble_line("hard", tiny_data, cache, [tmp_path / name], "--out", str(tmp_path / "s.csv")))


@pytest.fixture(params=["soft", "hard"])
def again(request, tiny_data, cache, changeable, tmp_path):
    """Function (more arguments) that makes tmp_path/out/s.csv of recipe a, by either command."""
    def make(*more):
        runs = [run for (recipe, _), run in changeable.items() if recipe == "a"]
        ensemble.main(ensemble_line(request.param, tiny_data, cache, runs, "--out", str(tmp_path / "out/s.csv"), *more))
        return everything_in(tmp_path / "out")
    return make


def test_a_submission_that_is_there_is_left_alone(again, changeable, splits, tmp_path, capsys):
    first = again("--coco")
    places = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in first}
    assert {path.name for path in first} >= {"s.csv", "s.json", "s.made.json"}
    capsys.readouterr()
    assert again("--coco") == first
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in first} == places
    assert capsys.readouterr().out == f"{tmp_path}/out/s.csv is there and was made like this: nothing to do\n"
    change_json(changeable["a", 1] / "test.json", unreadable=[splits[1].ids[2]])
    with pytest.raises(UserError) as stop:  # of a photo that couldn't be read it is told each time
        again("--coco")
    assert stop.value.code == 3 and everything_in(tmp_path / "out") == first


def test_another_submission_moves_the_one_of_before_aside(again, changeable, tmp_path, capsys):
    out = tmp_path / "out"
    first = again()
    capsys.readouterr()
    second, said = again("--image-id", "file_name"), capsys.readouterr().out
    assert f"{out}/s.csv is replaced: image_id id -> file_name\n" in said
    assert f"{out}/replaced: s.made.json, s.csv of before\n" in said
    for name in ("s.csv", "s.made.json"):
        assert second[out / "replaced" / name] == first[out / name] != second[out / name]
    third = again()
    assert third[out / "s.csv"] == first[out / "s.csv"] and third[out / "replaced/s.csv"] == second[out / "s.csv"]
    np.save(changeable["a", 1] / "test.npy", np.load(changeable["a", 1] / "test.npy")[:, ::-1])
    seal(changeable["a", 1] / "test.json")
    fourth = again()
    assert fourth[out / "replaced/s.csv"] == third[out / "s.csv"] != fourth[out / "s.csv"]
    assert again() == fourth


def edit_submission(out):
    (out / "s.csv").write_text((out / "s.csv").read_text() + "and more\n")


def edit_code(out):
    made = common.read_json(out / "s.made.json")
    change_json(out / "s.made.json", code=made["code"] | {"encode_mask": "0dd"}, kept_under=[])


@pytest.mark.parametrize(("edit", "told"), [(edit_submission, "s.csv touched by hand"), (edit_code, "encode_mask")])
def test_a_submission_of_other_code_or_touched_by_hand_is_asked_about(again, tmp_path, capsys, edit, told):
    first, out = again(), tmp_path / "out"
    edit(out)
    edited = everything_in(out)
    with pytest.raises(UserError, match=rf"s.csv was made by other code \({told}\): --code new .*--code keep"):
        again()
    assert everything_in(out) == edited
    capsys.readouterr()
    kept = again("--code", "keep")
    assert kept[out / "s.csv"] == edited[out / "s.csv"] and f"is kept, though other code made it: {told}\n" in (
        capsys.readouterr().out)
    assert again() == kept  # and not asked again
    edit(out)
    edited = everything_in(out)
    new = again("--code", "new")
    assert new[out / "s.csv"] == first[out / "s.csv"] and new[out / "replaced/s.csv"] == edited[out / "s.csv"]
    assert again() == new


def test_a_submission_that_nothing_describes_is_made_anew_and_kept_aside(again, tmp_path):
    first, out = again(), tmp_path / "out"
    (out / "s.made.json").unlink()
    (out / "s.csv").write_text("theirs")
    second = again()
    assert second[out / "replaced/s.csv"] == b"theirs" and second[out / "s.csv"] == first[out / "s.csv"]


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_background_is_black_and_eleven_classes_have_colours_of_their_own():
    colours = common.COLOURS
    assert colours.shape == (256, 3) and colours.dtype == np.uint8 and not colours[0].any()
    assert len({tuple(c) for c in colours[[*range(12), 255]].tolist()}) == 13
    assert (colours[12:23] == colours[1:12]).all() and (colours[189:200] == colours[2:13]).all()


def test_an_overlay_is_the_greyed_photo_under_colours_and_the_photo_where_nothing_was_found():
    image = np.zeros((SUBMIT_SIZE, SUBMIT_SIZE, 3), np.uint8)
    image[:] = 30, 60, 120  # its grey is 70
    mask = np.zeros((SUBMIT_SIZE, SUBMIT_SIZE), np.uint8)
    mask[10:20, 30:50] = 2
    mask[200:, 200:] = 11
    shown = common.overlay(image, mask)
    colours = common.COLOURS.astype(int)
    assert shown.dtype == np.uint8 and (shown[mask == 0] == image[0, 0]).all()
    for class_id in (2, 11):
        assert abs(shown[mask == class_id] - (0.4 * 70 + 0.6 * colours[class_id])).max() <= 1
    strong = common.overlay(image, mask, strength=1)
    assert (strong[mask == 11] == colours[11]).all() and (image == image[0, 0]).all()


@pytest.mark.parametrize("size", [(512, 512), (100, 300), (700, 400)])
def test_an_overlay_has_the_submissions_size_and_colours_its_mask_in_place(size):
    image = np.zeros((*size, 3), np.uint8)
    image[:size[0] // 2] = 200  # the upper half is light
    mask = np.zeros((SUBMIT_SIZE, SUBMIT_SIZE), np.uint8)
    mask[:, 100:] = 1
    shown = common.overlay(image, mask).astype(int)
    assert shown.shape == (SUBMIT_SIZE, SUBMIT_SIZE, 3)
    assert (shown[:126, :100] == 200).all() and (shown[130:, :100] == 0).all()
    assert (shown[:126, 100:] - shown[-1, -1] == 80).all()  # 0.4 of the grey 200


def read_sheet(path):
    return cv2.imread(str(path))[:, :, ::-1].astype(int)


def test_a_sheet_has_its_tiles_in_rows_under_captions_and_a_legend_below(tmp_path):
    tiles = [np.full((40, 60, 3), value, np.uint8) for value in (10, 80, 200)]
    tiles[0][0] = 255, 0, 0
    common.write_sheet(tmp_path / "s.png", [[("a", tiles[0]), ("", tiles[1])], [("x" * 300, tiles[2])]],
                         {0: "Background", 2: "Paper", 255: "unsure"})
    sheet, line = read_sheet(tmp_path / "s.png"), 18
    assert sheet.shape == (2 * (40 + line) + 3 * line, 120, 3)
    assert (sheet[line:line + 40, :60] == tiles[0]).all() and (sheet[line:line + 40, 60:] == tiles[1]).all()
    second = 2 * line + 40
    assert (sheet[second:second + 40, :60] == tiles[2]).all() and (sheet[second:second + 40, 60:] == 255).all()
    assert (sheet[:line, :60] < 128).any() and (sheet[:line, 60:] == 255).all()  # one caption is empty
    assert (sheet[40 + line:second, :60] < 128).any() and (sheet[40 + line:second, 64:] == 255).all()  # one is cut
    for i, colour in enumerate(common.COLOURS[[0, 2, 255]].tolist()):
        assert sheet[2 * (40 + line) + i * line + line // 2, 15].tolist() == colour
        assert (sheet[2 * (40 + line) + i * line:][:line, 36:] < 128).any()


def test_a_sheet_that_cannot_be_drawn_leaves_the_old_one(tmp_path):
    (tmp_path / "s.png").write_text("old")
    tile = np.zeros((40, 60, 3), np.uint8)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        common.write_sheet(tmp_path / "s.png", [[("a", tile), ("b", None)]], {0: "Background"})
    assert (tmp_path / "s.png").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("n_images", "n", "chosen"), [
    (4, 24, [0, 1, 2, 3]), (4, 4, [0, 1, 2, 3]), (9, 3, [0, 4, 8]), (100, 4, [0, 33, 66, 99]), (1, 24, [0])])
def test_pictures_are_spread_evenly_and_predictions_pass_unchanged(n_images, n, chosen):
    test = Namespace(ids=list(range(n_images)), file_names=[f"{i}.jpg" for i in range(n_images)], classes=CLASSES,
                     image=lambda i: np.full((32, 32, 3), i, np.uint8))
    preds = [np.full((SUBMIT_SIZE, SUBMIT_SIZE), i % 12, np.uint8) for i in range(n_images)]
    for pred in preds[1::2]:
        pred[:9] = 3
    pictures = []
    passed = list(ensemble.sample_pictures(iter(preds), test, pictures, n))
    assert len(passed) == n_images and all(a is b for a, b in zip(passed, preds, strict=True))
    assert [photo[0] for photo, _ in pictures] == [f"{i}.jpg" for i in chosen]
    for i, (photo, prediction) in zip(chosen, pictures, strict=True):
        assert (photo[1] == i).all() and (prediction[1] == common.overlay(test.image(i), preds[i])).all()
        found = {CLASSES[c] for c in ({i % 12, 3} if i % 2 else {i % 12}) - {0}}
        assert set(prediction[0].split(", ")) == (found or {"nothing"})


# ---- out-of-fold scores ---------------------------------------------------------------------------------------------


def slow_truth(split, image_id):
    """The mask at the submission's size: for each pixel the one above and left of where it falls."""
    mask = split.mask(split.ids.index(image_id))
    rows, columns = (np.arange(SUBMIT_SIZE) * side // SUBMIT_SIZE for side in mask.shape)
    return mask[np.ix_(rows, columns)]


def slow_scores(split, preds, batch_size):
    """[v1, v2, v3] of {image id: pred}, by scikit-learn."""
    ids = sorted(preds, key=split.ids.index)
    truths = {i: slow_truth(split, i) for i in ids}

    def miou(ids):
        truth, pred = (np.concatenate([part[i].ravel() for i in ids]) for part in (truths, preds))
        return jaccard_score(truth, pred, labels=np.union1d(truth, pred), average="macro")
    return [np.mean([miou(ids[k:k + batch_size]) for k in range(0, len(ids), batch_size)]), miou(ids),
            np.mean([miou([i]) for i in ids])]


def slow_vote(runs):
    """{image id: pred} of the mean of the runs' validation stores, in float64."""
    votes = {}
    for run in runs:
        probs = np.load(run / "valid.npy").astype(float)
        for i, image_probs in zip(common.read_json(run / "valid.json")["image_ids"], probs, strict=True):
            votes[i] = votes.get(i, 0) + image_probs
    return {i: probs.argmax(0) for i, probs in votes.items()}


def printed_scores(out):
    """{row: [v1, v2, v3]} of what `score` prints."""
    rows = (re.match(r" *\d* +(\S.*?) +\d+ (\d\.\d{4}) (\d\.\d{4}) (\d\.\d{4}) ", line) for line in out.splitlines())
    return {row[1]: [float(score) for score in row.groups()[1:]] for row in rows if row}


def test_score_prints_the_out_of_fold_scores_of_every_recipe_and_the_vote(
        tiny_data, cache, splits, voters, capsys):
    ensemble.main(ensemble_line("score", tiny_data, cache, voters.values(), "--batch", "4"))
    out = capsys.readouterr().out
    printed = printed_scores(out)
    everywhere = slow_vote(voters.values())
    expected = {
        "a flip": slow_vote(run for (recipe, _), run in voters.items() if recipe == "a"),
        "b flip": slow_vote(run for (recipe, _), run in voters.items() if recipe == "b"),
        "soft vote, equal weights": everywhere,
        "all background": {i: np.zeros_like(pred) for i, pred in everywhere.items()}}
    for name, preds in expected.items():
        assert printed[name] == pytest.approx(slow_scores(splits[0], preds, 4), abs=1e-4), name
    assert "out of fold: 14 of 14 training images" in out
    assert len({tuple(row) for row in printed.values()}) >= 4  # the rows can be told apart


def test_score_counts_the_images_that_the_folds_cover(tiny_data, cache, splits, voters, capsys):
    ensemble.main(ensemble_line("score", tiny_data, cache, [voters["b", 1]]))
    out = capsys.readouterr().out
    assert "out of fold: 5 of 14 training images" in out
    preds = slow_vote([voters["b", 1]])
    assert printed_scores(out)["soft vote, equal weights"] == pytest.approx(slow_scores(splits[0], preds, 8), abs=1e-4)


def test_validation_stores_of_one_fold_on_different_images_are_refused(tiny_data, cache, splits, changeable):
    ids = common.read_json(changeable["b", 1] / "valid.json")["image_ids"]
    change_json(changeable["b", 1] / "valid.json", image_ids=[*ids[:-1], splits[0].ids[0]])
    with pytest.raises(UserError, match=f"b/f1/valid.npy is of other images: it lacks 1: {ids[-1]}; also has 1: "
                                         f"{splits[0].ids[0]}"):
        ensemble.main(ensemble_line("score", tiny_data, cache, changeable.values()))


def test_a_validation_image_that_the_data_does_not_have_is_refused_by_id(tiny_data, cache, changeable):
    ids = common.read_json(changeable["b", 1] / "valid.json")["image_ids"]
    change_json(changeable["b", 1] / "valid.json", image_ids=[*ids[:-1], 999_999])
    with pytest.raises(UserError, match="no image 999999"):
        ensemble.main(ensemble_line("score", tiny_data, cache, [changeable["b", 1]]))


# ---- minimum area ---------------------------------------------------------------------------------------------------


@given(arrays(np.uint8, (2, 6, 7), elements=st.integers(0, 3)), arrays(np.int64, 4, elements=st.integers(0, 30)))
def test_removing_small_classes_from_a_mask_and_from_its_pixel_counts_is_the_same(masks, min_area):
    pred, truth = masks
    removed = common.remove_small(pred, min_area)
    counts = common.apply_min_area(common.confusion(pred, truth, 4)[None], min_area)[0]
    assert (counts == confusion_matrix(truth.ravel(), removed.ravel(), labels=range(4))).all()
    sizes = [(pred == c).sum() for c in range(4)]
    assert removed.tolist() == [[c if sizes[c] >= min_area[c] else 0 for c in row] for row in pred.tolist()]


def test_the_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [ensemble.bootstrap_interval(rng.normal(1, 2, 60), 500) for _ in range(200)]
    assert 0.9 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.99


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "line"), [
    (pseudo_label, ["a", "--data", "d", "--exp", "e", "--round", "1", "--fold", "0", "--conf", "0.9"]),
    (ensemble, ["soft", "a", "--data", "d", "--out", "s.csv", "--image", "id"]),
    (ensemble, ["score", "a", "--data", "d", "--out", "s.csv"]),
    (ensemble, ["hard", "a", "--data", "d"])])
def test_misspelt_abbreviated_and_foreign_arguments_are_refused(script, line, capsys):
    with pytest.raises(SystemExit) as refusal:
        script.parse_args(line)
    assert refusal.value.code == 2
