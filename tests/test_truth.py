"""Scores on test photos with labels: in score and report, and of submissions from anywhere by ensemble.py evaluate."""
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from conftest import write_coco
from sklearn.metrics import jaccard_score
from test_graph import make, new_folder
from test_predict import voters  # noqa: F401  a fixture

import common
import ensemble
from common import SUBMIT_SIZE, UserError
from demo_data import draw_data

N_PIXELS = SUBMIT_SIZE ** 2


def annotate(test_json, train_json):
    """Give the photos of test.json the categories of train.json and a rectangle each, of a class by its position."""
    test, categories = (json.loads(path.read_text()) for path in (test_json, train_json))
    ids = [category["id"] for category in categories["categories"]]
    test["annotations"] = []
    for n, image in enumerate(test["images"]):
        right, bottom = image["width"] // 2, image["height"] // 2
        polygon = [0, 0, right, 0, right, bottom, 0, bottom]
        test["annotations"].append({"id": n + 1, "image_id": image["id"], "category_id": ids[n % len(ids)],
                                    "segmentation": [polygon]})
    return test


@pytest.fixture
def truth(tiny_data, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(annotate(tiny_data / "test.json", tiny_data / "train.json")))
    return path


def true_masks(splits):
    """The masks of `annotate`: a quarter of each photo."""
    masks = np.zeros((len(splits[1].ids), SUBMIT_SIZE, SUBMIT_SIZE), np.uint8)
    masks[:, :SUBMIT_SIZE // 2, :SUBMIT_SIZE // 2] = 1 + np.arange(len(masks))[:, None, None] % 11
    return masks


def score_by_sklearn(preds, truths):
    """v3: the mean over images of the mean IoU of the classes that are in truth or prediction."""
    means = []
    for pred, true in zip(preds, truths, strict=True):
        labels = np.union1d(pred, true)
        means.append(jaccard_score(true.ravel(), pred.ravel(), labels=labels, average="macro"))
    return np.mean(means)


def run(*line):
    ensemble.main(ensemble.parse_args([*map(str, line)]))


def tables(folder):
    return (pd.read_csv(folder / f"{name}.csv") for name in ("test", "test-iou"))


# ---- in score and soft ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["score", "soft"])
def test_the_vote_is_scored_on_the_test_photos_truth_and_by_nothing_fitted_on_it(
        tiny_data, cache, splits, voters, truth, tmp_path, monkeypatch, command):  # noqa: F811
    choose = ensemble.choose

    def with_area(*args):  # so that the vote is not that with equal weights alone
        used, *rest = choose(*args)
        return used | {"minimum area": np.full(12, 3000)}, *rest
    monkeypatch.setattr(ensemble, "choose", with_area)
    out = tmp_path / "s.csv"
    line = ["--data", tiny_data, "--cache", cache, "--tables", tmp_path / "tables", *voters.values()]
    run("soft", *line, "--out", tmp_path / "without.csv")
    assert not (tmp_path / "tables/test.csv").exists()
    page = tmp_path / "page.html"
    run(command, *line, "--truth", truth, "--report", page, *(["--out", out] if command == "soft" else []))
    table, by_class = tables(tmp_path / "tables")
    names = [str(i) for i in splits[1].ids]
    preds = [pred for _, pred in ensemble.read_submission(tmp_path / "without.csv", names, 12)]
    taken = table.set_index("name").loc["with what is taken"]
    assert table["name"].tolist() == ["soft vote, equal weights", "with what is taken"]
    assert taken["v3"] == pytest.approx(score_by_sklearn(preds, true_masks(splits)))
    assert table["v3"][0] != taken["v3"]
    labels = np.union1d(np.unique(preds), np.unique(true_masks(splits)))
    iou = jaccard_score(true_masks(splits).ravel(), np.stack(preds).ravel(), labels=labels, average=None)
    assert by_class["IoU"].dropna().tolist() == pytest.approx(iou) and taken["v2"] == pytest.approx(np.mean(iou))
    assert math.isnan(taken["v3 low"])  # of four photos there is no interval
    assert by_class["images"].tolist() == [4, 1, 1, 1, 1, *[0] * 7]
    assert "on the truth of 4 test photos" in page.read_text()
    if command == "soft":  # the truth is no part of what made it
        assert out.read_bytes() == (tmp_path / "without.csv").read_bytes()
        assert common.read_json(out.with_suffix(".made.json"))["recipe"] == common.read_json(
            tmp_path / "without.made.json")["recipe"]


def test_a_truth_of_other_photos_is_refused_before_the_vote(tiny_data, cache, voters, truth, tmp_path, monkeypatch):  # noqa: F811
    coco = json.loads(truth.read_text())
    coco["images"][0]["file_name"] = "other.jpg"
    truth.write_text(json.dumps(coco))
    monkeypatch.setattr(ensemble, "survey", lambda *_: pytest.fail("the vote began"))
    with pytest.raises(UserError, match=r"it is other\.jpg there"):
        run("score", "--data", tiny_data, "--cache", cache, "--truth", truth, *voters.values())


def test_make_score_and_submit_take_a_labelled_test_json_or_truth(tmp_path):
    folder = new_folder(tmp_path / "built", draw_data_into(tmp_path / "drawn"))
    knobs = {"ROUNDS": 0, "EPOCHS": 1, "FOLDS": "0"}
    plain = make(folder, "submit", **knobs)
    assert "on the truth of" not in plain.stdout
    labels = json.dumps(annotate(folder / "data/test.json", folder / "data/train.json"))
    (folder / "labels.json").write_text(labels)
    text = make(folder, "score", **knobs, TRUTH="labels.json").stdout
    assert "on the truth of 4 test photos: labels.json" in text
    assert "test-iou" in "".join(path.name for path in (folder / "out/main/report").iterdir())
    assert make(folder, "why", **knobs, TRUTH="labels.json").stdout == "out/main is up to date\n"
    (folder / "data/test.json").write_text(labels)
    text = make(folder, "submit", **knobs, EXP="labelled").stdout
    assert "on the truth of 4 test photos: test.json" in text


def draw_data_into(folder):
    draw_data(folder, train=12, test=4, size=64)
    return folder


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_scores_and_are_those_of_a_slow_bootstrap():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 60, (30, 3, 3))
    counts[3:, 2], counts[3:, :, 2] = 0, 0  # class 2 in three images alone
    draws = np.random.default_rng(0).integers(30, size=(1000, 30))
    drawn = [common.class_iou(counts[draw].sum(0)) for draw in draws]
    low, high = ensemble.iou_intervals(counts)
    for c in (0, 1):
        assert (low[c], high[c]) == pytest.approx(np.percentile([iou[c] for iou in drawn], (2.5, 97.5)))
    assert math.isnan(low[2]) and math.isnan(high[2])
    expected = np.percentile([np.nanmean(iou) for iou in drawn], (2.5, 97.5))
    assert ensemble.score_interval(counts, "v2", 8) == pytest.approx(expected)
    for metric in ("v1", "v2", "v3"):
        low, high = ensemble.score_interval(counts, metric, 3)
        assert low < common.scores(counts, 3)[metric] < high
    assert all(map(math.isnan, ensemble.score_interval(counts, "v1", 4)))  # 8 batches
    assert not any(map(math.isnan, ensemble.score_interval(counts, "v3", 4)))
    assert all(map(math.isnan, ensemble.score_interval(counts[:9], "v3", 4)))


# ---- evaluate: a truth and a submission -----------------------------------------------------------------------------


BOX = [[0, 0, 4, 0, 4, 8, 0, 8]]  # the left half of a photo of 8 x 8


@pytest.fixture
def files(tmp_path):
    """A truth of 12 images, each with class 1 on its left half, and a function that writes a submission of masks."""
    folder = write_coco(tmp_path / "data", [(i, 8, 8) for i in range(1, 13)], [(i, 7, BOX) for i in range(1, 13)],
                        categories=[(9, "Metal"), (7, "Paper")], photos=False)

    def write(name, masks, names=range(1, 13)):
        rows = [f'{image},{" ".join(map(str, mask.ravel()))}' for image, mask in zip(names, masks, strict=True)]
        (tmp_path / name).write_text("\n".join(["image_id,PredictionString", *rows, ""]))
        return tmp_path / name
    right = np.zeros((SUBMIT_SIZE, SUBMIT_SIZE), int)
    right[:, :SUBMIT_SIZE // 2] = 1
    return folder / "train.json", write, right


def test_a_truth_and_submissions_are_all_that_it_needs(files, tmp_path, capsys):
    truth, write, right = files
    half = right.copy()
    half[:SUBMIT_SIZE // 2] = 0  # a quarter is found of the half
    mine, theirs = write("mine.csv", [half] * 12), write("theirs.csv", [right] * 12)
    run("evaluate", "--truth", truth, "--tables", tmp_path / "tables", mine, theirs)
    table, by_class = tables(tmp_path / "tables")
    iou = (2 / 3 + 1 / 2) / 2  # of the background, of which 2/4 are right among 3/4, and of class 1
    assert table["v3"].tolist() == pytest.approx([iou, 1]) and table["v2"].tolist() == pytest.approx([iou, 1])
    assert table["v1"].tolist() == pytest.approx([iou, 1])
    assert by_class["class"].tolist() == ["Background", "Paper", "Metal"]  # by id
    assert by_class["IoU"].tolist()[:2] == [1, 1] and math.isnan(by_class["IoU"][2])
    gained = pd.read_csv(tmp_path / "tables/test-gain.csv")
    assert gained["v3 gain"].tolist() == pytest.approx([1 - iou]) and gained["v3 low"][0] == pytest.approx(1 - iou)
    assert str(theirs) in capsys.readouterr().out and gained["name"].tolist() == [str(theirs)]


def test_images_may_be_named_by_file_name_and_the_truth_may_have_more(files, capsys):
    truth, write, right = files
    names = [f"batch_01/{i:04}.png" for i in (3, 1)]
    run("evaluate", "--truth", truth, "--image-id", "file_name", write("mine.csv", [right] * 2, names))
    text = capsys.readouterr().out
    assert "2 of the 12 images of" in text and "on the truth of 2 test photos" in text
    assert re.search(r"mine\.csv +1\.0000", text)


@pytest.mark.parametrize(("change", "message"), [
    (lambda text: text.replace("\n12,", "\n13,"), "image 13 is not in"),
    (lambda text: text.replace("\n12,", "\n11,"), "image 11 is there 2 times"),
    (lambda text: text.replace("image_id", "id"), "the first line is"),
    (lambda text: text[:-9], r"line 13, image 12: not 65536 ids of 0 to 2: there are 655"),
    (lambda text: "image_id,PredictionString\n", "it has no image"), (lambda text: "", "it has no image")])
def test_what_is_wrong_with_a_submission_is_told_in_one_line(files, change, message):
    truth, write, right = files
    path = write("mine.csv", [right] * 12)
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as error:
        run("evaluate", "--truth", truth, path)
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_the_truth_is_listed_and_missing_files_are_named(files, tmp_path):
    truth, write, right = files
    path = write("mine.csv", [right] * 12)
    with pytest.raises(UserError, match="nowhere.csv: No such file"):
        run("evaluate", "--truth", truth, tmp_path / "nowhere.csv")
    coco = json.loads(truth.read_text())
    coco["annotations"][0]["category_id"] = 3
    truth.write_text(json.dumps(coco))
    with pytest.raises(UserError, match="unknown category 3"):
        run("evaluate", "--truth", truth, path)
    with pytest.raises(UserError, match=r"nowhere\.json: No such file"):
        run("evaluate", "--truth", tmp_path / "nowhere.json", path)


def test_a_second_submission_must_have_the_images_of_the_first(files):
    truth, write, right = files
    first, second = write("a.csv", [right] * 12), write("b.csv", [right] * 11, range(1, 12))
    with pytest.raises(UserError, match=r"b\.csv is of other images than .*a\.csv: it lacks 1: 12"):
        run("evaluate", "--truth", truth, first, second)


def test_each_submission_may_have_an_order_of_its_own(files, tmp_path):
    truth, write, right = files
    masks = [right] * 6 + [right * 0] * 6
    first, second = write("a.csv", masks), write("b.csv", masks[::-1], range(12, 0, -1))
    run("evaluate", "--truth", truth, "--batch", 3, "--tables", tmp_path, first, second)
    table, _ = tables(tmp_path)
    scores = table.drop(columns="name").to_numpy()  # v1 too is of batches in the order of the first
    np.testing.assert_array_equal(scores[0], scores[1])
    assert 0.5 < scores[0, 0] < 1
