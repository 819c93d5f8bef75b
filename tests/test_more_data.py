"""More photos than DATA's: EXTRA with labels, UNLABELLED without any, folds.csv by hand; at the end through make."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FOLD, read_csv, run_of, write_coco, write_photo
from PIL import Image
from test_pipeline import KNOBS, clone, make

import common
import train
from common import UserError
from demo_data import draw_data

torch.set_num_threads(1)
SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]


def coco(folder, categories, annotations, **options):
    return write_coco(folder, [(1, 8, 8), (2, 8, 8)], annotations, categories, **options)


@pytest.fixture
def data(tmp_path):
    """DATA with Paper (class 1) and Metal (class 2); its photos 1 and 2 have a square of each."""
    return coco(tmp_path / "data", [(0, "Paper"), (1, "Metal")], [(1, 0, SQUARE), (2, 1, SQUARE)])


@pytest.fixture
def more(tmp_path, data):
    """A folder whose classes are in another order, with a square of "metal"; one of its photos is in DATA too."""
    folder = coco(tmp_path / "more", [(5, "metal"), (7, "Paper")], [(1, 5, SQUARE), (2, 7, SQUARE)], photos=False)
    for number, seed in ((1, 71), (2, 2)):
        write_photo(folder / f"batch_01/000{number}.png", 8, 8, seed)
    return folder


# ---- labelled photos ------------------------------------------------------------------------------------------------


def test_masks_of_extra_photos_are_in_the_classes_of_the_data(data, more, tmp_path, capsys):
    train_split, test = common.load_data(data, tmp_path / "cache")
    split, indices = common.load_extra(more, train_split, test, tmp_path / "cache")
    assert split.classes == train_split.classes == ["Background", "Paper", "Metal"]
    assert np.unique(split.mask(0)).tolist() == [0, 2] and (split.mask(0)[1:5, 1:5] == 2).all()
    assert np.unique(split.mask(1)).tolist() == [0, 1]
    assert split.pixels[0][2] == (split.mask(0) == 2).sum()
    assert indices == [0]  # the other one is a training photo of DATA
    assert "1 photo(s) that are in DATA too are left out" in capsys.readouterr().out


def test_the_cache_of_extra_photos_is_of_their_json_and_of_the_data_s_classes(data, more, tmp_path):
    cache = tmp_path / "cache"
    train_split, test = common.load_data(data, cache)
    common.load_extra(more, train_split, test, cache)
    before = {path.name for path in cache.iterdir()}
    first, _ = common.load_extra(more, train_split, test, cache)
    assert {path.name for path in cache.iterdir()} == before
    swapped = coco(tmp_path / "swapped", [(0, "Metal"), (1, "Paper")], [(1, 0, SQUARE), (2, 1, SQUARE)])
    second, _ = common.load_extra(more, *common.load_data(swapped, cache), cache)
    assert np.unique(second.mask(0)).tolist() == [0, 1] and np.unique(first.mask(0)).tolist() == [0, 2]


@pytest.mark.parametrize(("categories", "message"), [
    ([(5, "metal"), (7, "Rope")], "category 7 (Rope) is none of DATA's classes, Paper, Metal: rename it, or"),
    ([(5, "metal"), (7, "METAL")], "category 7 (METAL) has the name of category 5")])
def test_a_class_that_the_data_lacks_is_refused_by_name(data, more, tmp_path, categories, message):
    coco(more, categories, [(1, 5, SQUARE), (2, 7, SQUARE)])
    splits = common.load_data(data, tmp_path / "cache")
    with pytest.raises(UserError, match=f"{re.escape(message)}[^\n]*\n1 fault"):  # and not each annotation
        common.load_extra(more, *splits, tmp_path / "cache")


def test_a_foreign_class_without_annotations_and_a_missing_one_are_no_fault(data, more, tmp_path):
    coco(more, [(5, "metal"), (8, "Rope")], [(1, 5, SQUARE)])
    splits = common.load_data(data, tmp_path / "cache")
    split, _ = common.load_extra(more, *splits, tmp_path / "cache")
    assert split.dropped == ["Rope"] and np.unique(split.mask(0)).tolist() == [0, 2]


def test_faults_of_extra_data_are_listed_with_all_others(data, more, tmp_path):
    coco(more, [(5, "metal")], [(1, 5, [[0, 0]]), (9, 5, SQUARE)])
    (more / "batch_01/0001.png").write_bytes(b"")
    splits = common.load_data(data, tmp_path / "cache")
    with pytest.raises(UserError, match=f"3 fault.*in {more}:") as error:
        common.load_extra(more, *splits, tmp_path / "cache")
    assert "polygon of 2 numbers" in str(error.value) and "image 9" in str(error.value)
    with pytest.raises(UserError, match="each of EXTRA is a folder with train.json"):
        common.load_extra(tmp_path / "nowhere", *splits, tmp_path / "cache")
    with pytest.raises(UserError, match="all of its labelled photos are in DATA already"):
        common.load_extra(data, *splits, tmp_path / "cache")


def test_extra_photos_are_learnt_from_by_every_fold_and_held_out_by_none(tiny_data, cache, line, tmp_path, splits):
    more = tmp_path / "more"
    draw_data(more, train=5, test=1, size=64, seed=9)
    for fold in range(3):
        args = line(tmp_path / "exp", "--extra", more, "--fold", fold)
        data, photos, extras = every = train.load_splits(args)
        assert photos is data or len(photos.ids) == len(splits[1].ids)
        folds = common.load_folds(args.exp, data, 3)
        learn, held = train.split_by_fold(args, data, folds)
        loader, valid = train.make_loaders(args, every, learn, held, cuda=False)
        entries = loader.dataset.entries
        assert [(split.root, i) for split, i, _ in entries[len(learn):]] == [(more, i) for i in range(5)]
        assert len(valid.dataset) == len(held) and valid.dataset.split is data
        assert entries[-1][0].mask(4).tolist() == extras[0][0].mask(4).tolist()
        pixels = train.labelled_pixels(data, learn, extras)
        assert pixels.sum(0).tolist() == (np.array(data.pixels)[learn].sum(0)
                                          + np.array(extras[0][0].pixels).sum(0)).tolist()


def test_extra_photos_are_part_of_the_recipe_by_their_content(line, tmp_path):
    more = tmp_path / "more"
    draw_data(more, train=5, test=1, size=64, seed=9)

    def recipe(*options):
        args = line(tmp_path / "exp", *options)
        every = train.load_splits(args)
        folds = common.load_folds(args.exp, every[0], 3)
        return train.describe_run(args, every, folds, common.Hashes(args.cache))["recipe"]
    plain, extra = recipe(), recipe("--extra", more)
    assert common.different_keys(plain, extra) == ["extra"]
    moved = shutil.copytree(more, tmp_path / "moved")
    assert recipe("--extra", moved) == extra
    photo = next(moved.rglob("*.jpg"))
    Image.open(photo).rotate(180).save(photo)
    assert common.different_keys(recipe("--extra", moved), extra) == ["extra"]


# ---- photos without labels ------------------------------------------------------------------------------------------


@pytest.fixture
def unlabelled(tmp_path):
    """Photos a/1.png, b.JPG and, turned by EXIF, c.jpg; the same as DATA's photo 1; damage; what is no photo."""
    folder = tmp_path / "unlabelled"
    write_photo(folder / "a/1.png", 8, 6, 100)
    write_photo(folder / "b.jpg", 10, 10, 101)
    (folder / "b.jpg").rename(folder / "b.JPG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (7, 5), "red").save(folder / "c.jpg", exif=exif)
    write_photo(folder / "known.png", 8, 8, 1)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "._b.JPG").write_bytes(b"mac")
    (folder / "notes.txt").write_text("none")
    return folder


def test_photos_without_json_are_found_at_any_depth_and_what_cant_serve_is_told(data, unlabelled, tmp_path, capsys):
    splits = common.load_data(data, tmp_path / "cache")
    for _ in range(2):  # the second time from the cache
        split = common.load_unlabelled(unlabelled, *splits, tmp_path / "cache")
        assert split.ids == split.file_names == ["a/1.png", "b.JPG", "c.jpg"]
        assert [tuple(size) for size in split.sizes] == [(8, 6), (10, 10), (7, 5)]
        assert [split.image(i).shape for i in range(3)] == [(8, 6, 3), (10, 10, 3), (7, 5, 3)]
        assert split.masks is None and len(split.groups) == len(split.contents) == 3
        text = capsys.readouterr().out
        assert "broken.jpg" in text and "left out" in text and "1 photo(s) that are in DATA too" in text
    (unlabelled / "new.png").write_bytes((unlabelled / "a/1.png").read_bytes())
    assert "new.png" in common.load_unlabelled(unlabelled, *splits, tmp_path / "cache").ids


def test_a_folder_without_photos_is_refused(data, tmp_path):
    splits = common.load_data(data, tmp_path / "cache")
    with pytest.raises(UserError, match="no such folder of photos"):
        common.load_unlabelled(tmp_path / "nowhere", *splits, tmp_path / "cache")
    with pytest.raises(UserError, match="no photo is left"):
        common.load_unlabelled(data, *splits, tmp_path / "cache")


def test_joined_photos_are_read_from_both_folders(data, unlabelled, tmp_path):
    train_split, test = common.load_data(data, tmp_path / "cache")
    joined = common.join_photos(test, common.load_unlabelled(unlabelled, train_split, test, tmp_path / "cache"))
    assert joined.ids == [9000, "a/1.png", "b.JPG", "c.jpg"]
    assert joined.image(0).tolist() == test.image(0).tolist()
    assert joined.image(1).tolist() == np.asarray(Image.open(unlabelled / "a/1.png")).tolist()
    assert joined.fingerprint != test.fingerprint
    assert all(len(getattr(joined, name)) == 4 for name in common.PHOTO_LISTS if name not in ("pixels", "objects"))


# ---- through make ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A finished `make submit` of one round with EXTRA and UNLABELLED."""
    repo = clone(tmp_path_factory.mktemp("more") / "repo")
    draw_data(repo / "data", train=12, test=3, size=64)
    draw_data(repo / "more", train=4, test=1, size=64, seed=5)
    draw_data(repo / "photos", train=1, test=5, size=64, seed=6)
    names = json.loads((repo / "more/train.json").read_text())
    names["categories"].reverse()  # and other numbers
    ids = {category["id"]: 50 + place for place, category in enumerate(names["categories"])}
    for entry in (*names["categories"], *names["annotations"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = ids[entry[key]]
    (repo / "more/train.json").write_text(json.dumps(names))
    done = make(repo, "-j2", "submit", knobs=MORE)
    (repo / "log").write_text(done.stdout + done.stderr)
    return repo


MORE = [*KNOBS, "EXTRA=more", "UNLABELLED=photos", "PSEUDO_ARGS=--confident 0.05 --max-unsure 1"]


def test_labels_are_of_test_and_unlabelled_photos_and_the_submission_of_the_test_alone(repo):
    rows = read_csv(repo / "out/main/r1/pseudo/f0/index.csv", ("image_id",))
    test_ids = [str(image["id"]) for image in json.loads((repo / "data/test.json").read_text())["images"]]
    photos = sorted(path.relative_to(repo / "photos").as_posix() for path in (repo / "photos").rglob("*.jpg"))
    assert [row["image_id"] for row in rows] == [*test_ids, *photos] and len(photos) == 6
    assert np.load(repo / "out/main/r1/pseudo/f0/labels.npy").shape == (9, 256, 256)
    submission = common.read_rows(repo / "out/main/submission.csv", ("image_id",))
    assert [row["image_id"] for _, row in submission] == test_ids
    assert np.load(next((repo / "out/main/r0").rglob("f0/unlabelled.npy"))).shape == (6, 12, 256, 256)
    assert not [*(repo / "out/main/r1").rglob("unlabelled.npy")]  # the last round labels nothing


def test_the_second_make_does_nothing_and_what_is_added_or_left_out_remakes_its_runs(repo):
    assert make(repo, "why", knobs=MORE).stdout.strip() == "out/main is up to date"
    slashes = [{"EXTRA=more": "EXTRA=./more/", "UNLABELLED=photos": "UNLABELLED=photos/"}.get(k, k) for k in MORE]
    assert make(repo, "why", knobs=slashes).stdout.strip() == "out/main is up to date"
    assert "extra" in make(repo, "why", knobs=[k for k in MORE if not k.startswith("EXTRA")]).stdout
    why = make(repo, "why", knobs=[k for k in MORE if not k.startswith("UNLABELLED")]).stdout
    assert "r1/pseudo/f0/manifest.json: data" in why and "r0/unet" not in why
    photo = next((repo / "photos").rglob("*.jpg"))
    before = photo.read_bytes()
    Image.open(photo).rotate(180).save(photo)
    why = make(repo, "why", knobs=MORE).stdout
    assert re.search(r"f0/unlabelled.json: data .*\n", why) and "f0/model.pt" in why
    assert not re.search(r"r0/.*/(model.pt|test.json)", why)
    photo.write_bytes(before)
    assert make(repo, "why", knobs=MORE).stdout.strip() == "out/main is up to date"


def test_a_decision_on_an_unlabelled_photo_stands_in_index_csv(repo):
    path = repo / "out/main/r1/pseudo/f0/index.csv"
    rows = read_csv(path)
    kept = next(row for row in reversed(rows) if row["keep"] == "1")
    assert "/" in kept["image_id"]
    before = path.read_bytes()
    common.write_csv(path, [row | {"keep": "0"} if row is kept else row for row in rows])
    why = make(repo, "why", knobs=MORE).stdout
    assert re.search(r"r1/unet/.*/f0/model.pt: pseudo ", why) and "f1/model.pt" not in why
    path.write_bytes(before)


@pytest.mark.parametrize(("knobs", "message"), [
    (["EXTRA=nowhere"], "no nowhere/train.json; each of EXTRA is a folder with train.json"),
    (["UNLABELLED=nowhere"], "nowhere: no such folder of photos"), (["EXTAR=more"], "unknown knob: EXTAR"),
    (["TRAIN_ARGS=--extra more"], "TRAIN_ARGS sets --extra, which make sets itself"),
    (["UNLABELLED=photos", "PSEUDO_ARGS=--unlabelled data"], "PSEUDO_ARGS sets --unlabelled")])
def test_what_cant_be_is_told_before_anything_runs(repo, knobs, message):
    done = make(repo, "submit", knobs=[*KNOBS, "EXP=none", *knobs], check=False)
    assert done.returncode == 2 and message in done.stderr and not (repo / "out/none").exists()


def test_check_says_what_is_added(repo):
    text = make(repo, "check", knobs=[*MORE, "EXP=check"]).stdout
    assert re.search(r"more: 4 images that every fold learns from: Background 4, ", text)
    assert "photos: 6 photos that get pseudo labels" in text


def test_an_image_with_the_fold_minus_one_is_learnt_from_and_never_held_out(line, tmp_path, splits):
    args = line(tmp_path / "exp", "--epochs", 1)
    folds = common.load_folds(args.exp, splits[0], 3)
    rows = read_csv(args.exp / "folds.csv")
    groups = [row["group"] for row, fold in zip(rows, folds, strict=True) if fold == FOLD]
    moved = [row | {"fold": -1} if row["group"] == groups[0] else row for row in rows]
    common.write_csv(args.exp / "folds.csv", moved)
    train.main(args)
    ids = [int(row["image_id"]) for row in moved if row["fold"] == -1]
    valid_ids = torch.load(Path(run_of(args)) / "model.pt")["valid_ids"]
    assert ids and not set(ids) & set(valid_ids)
    learn, held = train.split_by_fold(args, splits[0], common.load_folds(args.exp, splits[0], 3))
    assert set(ids) <= {splits[0].ids[i] for i in learn} and len(learn) + len(held) == len(splits[0].ids)


def test_which_extra_photos_are_left_out_is_part_of_what_names_them(data, more, tmp_path):
    cache = tmp_path / "cache"
    first, indices = common.load_extra(more, *common.load_data(data, cache), cache)
    test = json.loads((data / "test.json").read_text())
    shutil.copy(more / "batch_01/0001.png", data / "batch_01/9000.png")  # now a test photo
    (data / "test.json").write_text(json.dumps(test))
    coco(more, [(5, "metal")], [(1, 5, SQUARE)], photos=False)
    write_photo(more / "batch_01/0002.png", 8, 8, 72)
    second, left = common.load_extra(more, *common.load_data(data, cache), cache)
    assert indices == [0] and left == [1] and first.fingerprint != second.fingerprint


def test_a_folds_csv_without_groups_keeps_its_folds_too(tmp_path):
    pixels, groups = [[1, 1]] * 6, list("abcdef")
    (tmp_path / "folds.csv").write_text("image_id,fold\n1,0\n2,1\n3,0\n4,1\n5,-1\n")
    folds = common.new_folds(tmp_path / "folds.csv", [*range(1, 7)], pixels, groups, 2)
    assert folds[:5].tolist() == [0, 1, 0, 1, -1] and folds[5] in (0, 1)
    assert common.new_folds(tmp_path / "folds.csv", [*range(1, 7)], pixels, groups, 3)[4] == -1
