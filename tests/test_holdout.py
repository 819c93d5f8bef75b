"""ensemble.py holdout: a DATA whose test photos are held out of the labelled ones."""
import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import write_coco, write_photo
from test_graph import make, new_folder

import common
import ensemble

BOX, SMALL = [[1, 1, 5, 1, 5, 5, 1, 5]], [[2, 2, 4, 2, 4, 4, 2, 4]]


@pytest.fixture
def data(tmp_path):
    """40 photos of 8 x 8 in two folders and beside the JSON: 20 with Paper, 10 with Metal, 2 with Glass.

    Photos 0 to 2 are one group, 10 and 11 equal.
    """
    images = [{"id": i, "file_name": f"batch_{i % 2}/{i:04}.png", "license": 1} for i in range(39)]
    images.append({"id": 39, "file_name": "0039.png", "date": float("nan")})
    for image in images[:3]:
        image["group"] = "scene"
    annotations = [{"id": i, "image_id": i, "category_id": 1 if i % 2 else 2, "segmentation": BOX, "area": 16}
                   for i in range(0, 40) if i % 4]
    annotations += [{"id": 100 + i, "image_id": float(i), "category_id": 3, "segmentation": SMALL} for i in (5, 12)]
    folder = write_coco(tmp_path / "data", images, annotations, ((1, "Paper"), (2, "Metal"), (3, "Glass")))
    for name in ("batch_0/0010.png", "batch_1/0011.png"):
        write_photo(folder / name, 8, 8, 77)
    coco = json.loads((folder / "train.json").read_text())
    for annotation in coco["annotations"]:  # of equal photos equal masks
        if annotation["image_id"] == 11:
            annotation["category_id"] = 2
    coco["images"][39]["id"] = 39.0  # as some tools write ids
    coco = {"info": {"year": 2020, "text": "\ud800 ä"}, "licenses": [{"id": 1}]} | coco | {"more": [1.5]}
    (folder / "train.json").write_text(json.dumps(coco))
    return folder


def hold_out(data, out, share=0.2, *more):
    ensemble.main(ensemble.parse_args(["holdout", "--data", str(data), "--cache", str(data.parent / "cache"), "--out",
                                       str(out), "--share", str(share), *more]))
    return [json.loads((out / name).read_text()) for name in ("train.json", "test.json")]


def contents(folder):
    return {p.name: p.read_bytes() if p.is_file() else os.readlink(p) for p in folder.iterdir()
            if p.name not in (".lock", "replaced")}


def ids(coco):
    return [image["id"] for image in coco["images"]]


def test_both_sides_are_the_whole_with_all_that_the_json_says(data, tmp_path, capsys):
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    whole = json.loads((data / "train.json").read_text())
    train, test = hold_out(data, tmp_path / "out")
    for key in ("images", "annotations"):
        text = [json.dumps(entry) for entry in whole[key]]
        parts = [[json.dumps(entry) for entry in coco[key]] for coco in (train, test)]
        assert Counter(parts[0] + parts[1]) == Counter(text) and all(parts)
        assert all(part == [entry for entry in text if entry in part] for part in parts)  # in their order
    for coco in (train, test):
        assert {annotation["image_id"] for annotation in coco["annotations"]} <= {*ids(coco)}
        assert list(coco) == list(whole)
        for key in ("info", "licenses", "categories", "more"):
            assert coco[key] == whole[key]
    for together in ((0, 1, 2), (10, 11)):
        assert len({i in ids(test) for i in together}) == 1
    assert f"{tmp_path}/out: {len(ids(test))} of 40 photos are held out, {len(ids(test)) / 40:.1%}\n" in (
        capsys.readouterr().out)
    assert 7 <= len(ids(test)) <= 9 and {p: p.read_bytes() for p in data.rglob("*") if p.is_file()} == before


def test_it_is_a_data_of_its_own_with_truths_and_every_class_on_both_sides(data, tmp_path):
    train_json, test_json = hold_out(data, tmp_path / "out")
    train, test = common.load_data(tmp_path / "out", tmp_path / "cache")
    assert (train.ids, test.ids) == (ids(train_json), ids(test_json)) and test.faults == [None] * len(test.ids)
    assert common.truth_file(tmp_path / "out") == tmp_path / "out/test.json"
    truths = common.load_truths(tmp_path / "out/test.json", test, "area")
    whole, _ = common.load_data(data, tmp_path / "cache")
    expected = [whole.truth(whole.ids.index(image_id)) for image_id in test.ids]
    assert np.array_equal(truths, expected)
    count = [sum(class_id in truth for truth in truths) for class_id in (1, 2, 3)]
    assert 3 <= count[0] <= 5 and 1 <= count[1] <= 3 and count[2] == 1  # of 19, 11 and 2
    assert all((np.array(train.pixels)[:, 1:] > 0).any(0))


def test_twice_gives_the_same_bytes_and_again_writes_nothing(data, tmp_path, capsys):
    hold_out(data, tmp_path / "one")
    hold_out(data, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = {p: p.lstat().st_mtime_ns for p in (tmp_path / "one").iterdir() if p.name != ".lock"}
    capsys.readouterr()
    hold_out(data, tmp_path / "one")
    assert {p: p.lstat().st_mtime_ns for p in before} == before
    assert "nothing to do" in capsys.readouterr().out and not (tmp_path / "one/replaced").exists()


@pytest.mark.parametrize("change", ["share", "json", "photo", "file", "link", "option"])
def test_what_has_changed_makes_it_anew(data, tmp_path, change, capsys):
    out = tmp_path / "out"
    hold_out(data, out)
    before = contents(out)
    if change == "json":
        coco = json.loads((data / "train.json").read_text())
        coco["annotations"][0]["category_id"] = 3
        (data / "train.json").write_text(json.dumps(coco))
    elif change == "photo":
        write_photo(data / "batch_0/0004.png", 8, 8, 99)
    elif change == "file":
        (out / "test.json").write_text("{}")
    elif change == "link":
        (out / "batch_0").unlink()
    capsys.readouterr()
    hold_out(data, out, 0.5 if change == "share" else 0.2, *(["--paint", "id"] if change == "option" else []))
    assert "photos are held out" in capsys.readouterr().out and (out / "replaced/test.json").exists()
    assert (contents(out) == before) == (change in ("file", "link"))
    hold_out(data, out, 0.5 if change == "share" else 0.2, *(["--paint", "id"] if change == "option" else []))
    assert "nothing to do" in capsys.readouterr().out


def test_a_kill_leaves_no_folder_that_counts_as_made(data, tmp_path, monkeypatch):
    hold_out(data, tmp_path / "whole")
    hold_out(data, tmp_path / "out", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            hold_out(data, tmp_path / "out")
    hold_out(data, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_fold_that_is_held_out_costs_training_no_class_if_another_one_does_not():
    present = np.zeros((12, 2), bool)
    present[:, 0] = True
    present[3, 1] = True  # the one image of its class
    held = ensemble.choose_held_out(present, [str(i) for i in range(12)], 4)
    assert held.sum() == 3 and not held[3]
    present[[5, 7], 1] = True  # now a fold without it would lack it
    held = ensemble.choose_held_out(present, [str(i) for i in range(12)], 4)
    assert held.sum() == 3 and present[held, 1].any() and present[~held, 1].any()


def test_a_group_is_held_out_whole():
    groups = [str(i % 4) for i in range(12)]
    held = ensemble.choose_held_out(np.ones((12, 1), bool), groups, 4)
    assert sorted(np.array(groups)[held]) == [groups[held.argmax()]] * 3


def test_classes_that_a_side_lacks_are_named(tmp_path, capsys):
    annotations = [(i, 0, BOX) for i in range(1, 8)] + [(1, 1, BOX)]
    data = write_coco(tmp_path / "data", [(i, 8, 8) for i in range(1, 9)], annotations,
                      ((0, "Paper"), (1, "Metal"), (2, "Glass")))
    hold_out(data, tmp_path / "out", 0.25)
    assert capsys.readouterr().out.endswith("2 of 8 photos are held out, 25.0%; not in the held-out photos: Metal\n")


@pytest.mark.parametrize("share", ["0.04", "0.51", "0", "-0.2", "nan", "inf", "x", "15%"])
def test_other_shares_are_refused(data, tmp_path, share, capsys):
    with pytest.raises(SystemExit):
        hold_out(data, tmp_path / "out", share)
    assert "--share" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_too_few_groups_are_refused(tmp_path):
    images = [{"id": i, "group": i % 3} for i in range(9)]
    data = write_coco(tmp_path / "data", images, [(i, 0, BOX) for i in range(9)])
    with pytest.raises(common.UserError, match=r"data: 3 group\(s\) of photos are too few to hold out a share of 0\.2"):
        hold_out(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_share_held_out_is_the_nearest_that_folds_have(tmp_path):
    data = write_coco(tmp_path / "data", [{"id": i} for i in range(12)], [(i, 0, BOX) for i in range(12)])
    hold_out(data, tmp_path / "out", 0.4)  # a third, not half
    assert len(common.read_json(tmp_path / "out/test.json")["images"]) == 4


def test_nothing_is_written_into_data_or_over_other_files(data, tmp_path):
    for out in (data, data / "held"):
        with pytest.raises(common.UserError, match="lies in DATA"):
            hold_out(data, out)
    (tmp_path / "out/batch_0").mkdir(parents=True)
    with pytest.raises(common.UserError, match=r"out/batch_0 is in the way"):
        hold_out(data, tmp_path / "out")
    (data / "replaced").mkdir()
    shutil.move(data / "0039.png", data / "replaced/0039.png")
    text = (data / "train.json").read_text()
    (data / "train.json").write_text(text.replace('"0039.png"', '"replaced/0039.png"'))
    with pytest.raises(common.UserError, match=r"data/replaced: photos can't lie there"):
        hold_out(data, tmp_path / "new")
    assert os.listdir(data / "replaced") == ["0039.png"]


def test_make_holds_out_and_needs_a_share(data, tmp_path):
    folder = new_folder(tmp_path / "project", data)
    assert "HOLDOUT is empty" in make(folder, "holdout", code=2, EXP="lad").stderr
    assert "HOLDOUT=15%" in make(folder, "holdout", code=2, EXP="lad", HOLDOUT="15%").stderr
    assert "8 of 40 photos are held out" in make(folder, "holdout", EXP="lad", HOLDOUT=0.2).stdout
    make(folder, "check", EXP="lad/a", DATA="out/lad/data")
    planned = make(folder, "-n", "submit", EXP="lad/a", DATA="out/lad/data").stdout
    assert "train.py --data 'out/lad/data'" in planned and "--check " not in planned
