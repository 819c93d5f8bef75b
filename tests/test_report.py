"""The pages: their numbers against slow loops, their HTML, and what a browser makes of them."""
import base64
import html
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT, run_folder, write_coco, write_store
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from test_ensemble import run_ensemble

import common
import ensemble
import train
from common import SUBMIT_SIZE

CLASSES = ["Background", "<script>alert(1)</script>", "$\\bad$ & \"quoted\"", "Never seen"]
RUN = {"recipe": {}, "code": {}, "codes": ["0"], "state": "7ra1n", "commit": "c0331t", "kept_under": ["0ld", "n3w"]}
PHOTO = "batch_01/<img src=x onerror=alert(2)>.png"
VOID = {"meta", "link", "img", "br", "source"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_the_reliability_is_that_of_a_slow_count():
    rng = np.random.default_rng(0)
    total = rng.gamma(0.3, 40, (6, 5, 50)).astype(np.float32)
    truths = np.where(rng.random((6, 50)) < 0.5, total.argmax(1), rng.integers(0, 5, (6, 50)))
    bins = {b: [] for b in range(10)}
    for n in range(6):
        for p in range(50):
            share = total[n, :, p] / sum(total[n, :, p])
            bins[min(int(max(share) * 10), 9)].append((max(share), share.argmax() == truths[n, p]))
    n_pixels = sum(map(len, bins.values()))
    assert not bins[0] and not bins[1] and n_pixels == 300
    confidence, accuracy, share, error = ensemble.calibration(total, truths)
    expected = 0
    for b, pixels in bins.items():
        assert share[b] == pytest.approx(len(pixels) / n_pixels)
        assert np.isnan(confidence[b]) == np.isnan(accuracy[b]) == (not pixels)
        if pixels:
            sure, right = np.mean(pixels, axis=0)
            assert (confidence[b], accuracy[b]) == pytest.approx((sure, right))
            expected += len(pixels) / n_pixels * abs(sure - right)
    assert error == pytest.approx(expected)


def test_a_sure_vote_that_is_right_has_no_calibration_error():
    total = np.zeros((1, 3, 4))
    total[:, 2] = 7
    *_, share, error = ensemble.calibration(total, np.full((1, 4), 2))
    assert error == 0 and share[-1] == 1


def test_iou_by_size_is_that_of_scikit_learn_image_by_image():
    rng = np.random.default_rng(1)
    truths, preds = np.zeros((2, 40, 400), int)
    for n in range(40):
        for c in (1, 2):  # areas over several orders of magnitude
            truths[n, :int(400 * rng.random() ** 6)] = c
        preds[n] = np.where(rng.random(400) < 0.7, truths[n], rng.integers(0, 4, 400))
    counts = np.stack([confusion_matrix(t, p, labels=range(4)) for t, p in zip(truths, preds, strict=True)])
    found = ensemble.iou_by_size(counts)
    edges = [*ensemble.SIZES, 1.1]
    for c in range(4):
        for s in range(len(ensemble.SIZES)):
            share = (truths == c).mean(1)
            those = [n for n in range(40) if share[n] > 0 and edges[s] <= share[n] < edges[s + 1]]
            expected = [jaccard_score(truths[n] == c, preds[n] == c) for n in those]
            assert found[c, s] == pytest.approx(np.mean(expected) if expected else np.nan, nan_ok=True), (c, s)
    assert np.isnan(found[3]).all() and np.isfinite(found).sum() > 8


@pytest.mark.parametrize("paint", common.DATA_OPTIONS["paint"][0])
def test_sizes_and_covered_pixels_are_those_of_a_slow_painter(paint):
    rng, height, width, objects, areas = np.random.default_rng(2), 12, 9, [], []
    for _ in range(7):
        y, x, h, w = rng.integers(0, 8, 2).tolist() + rng.integers(2, 9, 2).tolist()
        shape = np.zeros((height, width), bool)
        shape[y:y + h, x:x + w] = True
        flat = shape.T.ravel()
        edges = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *([0] if flat[0] else []), *edges, flat.size]).tolist()
        objects.append((int(rng.integers(1, 4)), {"size": [height, width], "counts": counts}))
        areas.append(shape)
    order = {"area": lambda i: -areas[i].sum(), "id": lambda i: objects[i][0], "order": lambda i: i}[paint]
    painted, contested = {}, Counter()
    for i in sorted(range(7), key=order):
        for place in map(tuple, np.argwhere(areas[i])):
            below = painted.get(place, 0)
            if below and below != objects[i][0]:
                contested[below, objects[i][0]] += 1
            painted[place] = objects[i][0]
    mask, pixels, sizes, covered = common.paint_mask(objects, height, width, paint, 4)
    assert sorted(sizes) == sorted([c, int(area.sum())] for (c, _), area in zip(objects, areas, strict=True))
    found = Counter()
    for below, above, n in covered:
        found[below, above] += n
    assert found == contested and contested
    assert {place: mask[place] for place in painted} == painted
    assert pixels == np.bincount(mask.ravel(), minlength=4).tolist()


# ---- pages ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Its pictures, texts of its table cells [table][row][cell], and a check that what is opened is closed."""

    def __init__(self, path):
        super().__init__()
        self.source, self.open, self.urls, self.tables = path.read_text(), [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.urls += [value for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, *columns):
        """{first cell: {column: text}} of the one that has these columns."""
        rows, = (rows for rows in self.tables if set(columns) <= set(rows[0]))
        return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def square(x, side):
    return [[x, x, x + side, x, x + side, x + side, x, x + side]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with data.html, report.html (of soft), score.html and what was drawn, {"heat": [...], "bars": [...]}."""
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    exp, cache, drawn = root / "out/exp", root / "cache", {"heat": [], "bars": []}
    images = [{"id": i, "width": 64, "height": 64} | ({"file_name": PHOTO} if i == 3 else {}) for i in range(8)]
    objects = [(i, 1, square(4, 30)) for i in range(8)] + [(i, 2, square(24, 30)) for i in range(5)]
    write_coco(root / "data", images, objects,
               categories=list(enumerate(CLASSES[1:], 1)), test_images=[(9000, 64, 64), (9001, 64, 64)])
    shutil.copy(root / "data/batch_01/0001.png", root / "data/batch_01/9001.png")
    train.main(train.parse_args(["--check", "--data", str(root / "data"), "--exp", str(exp), "--cache", str(cache),
                                 "--folds", "2"]))
    splits = common.load_data(root / "data", cache)
    for model in "ab":
        for fold in (0, 1):
            run = run_folder(exp, 1, f"unet/{model}", 64, fold)
            for split, part, ids in (("valid", splits[0], splits[0].ids[fold::2]), ("test", splits[1], splits[1].ids)):
                probs = rng.integers(0, 120, (len(ids), 4, 16, 16)).repeat(16, 2).repeat(16, 3)
                probs[:, 3] = 0
                if split == "valid":
                    truths = np.stack([splits[0].truth(splits[0].ids.index(i)) for i in ids])
                    probs += (truths[:, None] == np.arange(4)[:, None, None]) * 80
                write_store(run, split, probs.astype(np.uint8), part, ids, fold=fold, round=1, model=f"unet/{model}",
                            contaminated=True, commit="5t0re")
                path = run / f"{split}.json"
                common.write_json(path, common.read_json(path) | {"run": RUN})
            counts = {CLASSES[0]: {"kept": 1 + fold, "unsure": 3}, **dict.fromkeys(CLASSES[1:], {"unsure": 1})}
            common.write_json(exp / f"r1/pseudo/f{fold}/manifest.json", {
                "round": 1, "fold": fold, "contaminated": True, "photos": counts | {CLASSES[1]: {"kept": 1}},
                "labels": [{"pixels": 50 + fold, "expected": 0.75, "real": None}]})
    with pytest.MonkeyPatch.context() as patch:
        for name in drawn:
            draw = getattr(ensemble, f"draw_{name}")
            patch.setattr(ensemble, f"draw_{name}", lambda axes, *args, draw=draw, name=name, **labels: (
                drawn[name].append(args), draw(axes, *args, **labels)))
        runs = sorted(exp.glob("r1/unet/*/s64/f*"))
        run_ensemble(root / "data", cache, "score", "--report", exp / "score.html", *runs)
        drawn = {name: calls[::2] for name, calls in drawn.items()}  # each is drawn light and dark
        run_ensemble(root / "data", cache, "soft", "--report", exp / "report.html", "--out", exp / "s.csv", *runs)
    return exp, splits, drawn


@pytest.fixture(scope="module", params=["data", "score", "report"])
def page(made, request):
    return Page(made[0] / f"{request.param}.html")


def test_every_picture_of_a_page_is_in_it_and_decodes(page):
    pictures = [url for url in page.urls if url.startswith("data:image/")]
    assert len(pictures) >= 9 and set(page.urls) - set(pictures) - {"data:,"} <= {f"#s{i}" for i in range(1, 20)}
    for url in pictures:
        head, raw = url.split(",")
        with Image.open(io.BytesIO(base64.b64decode(raw, validate=True))) as image:
            image.load()
            assert f"data:image/{image.format.lower()};base64" == head and min(image.size) >= 200


def test_a_page_asks_the_network_for_nothing(page):
    assert not re.search(r"https?:|\burl\(|@import|//\w+\.", re.sub("base64,[A-Za-z0-9+/=]*", "", page.source))
    assert "default-src 'none'" in page.source


def test_a_page_says_which_versions_made_it(page):
    for name in re.findall("^([^=#\n]+)==", (ROOT / "requirements.txt").read_text(), re.M):
        assert f"{name} {importlib.metadata.version(name)}" in page.source


def test_names_from_the_data_are_escaped(page):
    for name in CLASSES[1:3]:
        assert name not in page.source and html.escape(name).replace("&quot;", "&#34;") in page.source
    assert PHOTO not in page.source and page.source.count("<script>") == 1
    assert PHOTO.replace("<", "&lt;").replace(">", "&gt;") in page.source


def test_the_confusion_matrix_and_the_bars_are_those_of_scikit_learn(made):
    exp, (data, _), drawn = made
    truths, preds, hashes = {0: [], 1: []}, {0: [], 1: []}, common.Hashes(exp / "cache")
    for fold in truths:
        stores = [common.open_store(exp / f"r1/unet/{model}/s64/f{fold}/valid.json", hashes) for model in "ab"]
        preds[fold] = (stores[0][0].astype(int) + stores[1][0]).argmax(1).ravel()
        truths[fold] = np.concatenate([data.truth(data.ids.index(i)).ravel() for i in stores[0][1]["image_ids"]])
    everything = [np.concatenate([*some.values()]) for some in (truths, preds)]
    shares, rows, columns = drawn["heat"][0]
    expected = confusion_matrix(*everything, labels=range(4)).astype(float)
    expected[:3] /= expected[:3].sum(1, keepdims=True)
    expected[3] = np.nan  # no pixel of it
    assert shares == pytest.approx(expected, nan_ok=True) and rows == columns == CLASSES
    named, series = drawn["bars"][0]
    assert named == dict(enumerate(CLASSES)) and list(series) == ["all", "fold 0", "fold 1"]
    for key, (truth, pred) in zip(series, [everything, *((truths[f], preds[f]) for f in (0, 1))], strict=True):
        assert series[key][:3] == pytest.approx(jaccard_score(truth, pred, labels=range(3), average=None))
        assert np.isnan(series[key][3])


def test_the_report_says_what_was_scored_labelled_and_made(made):
    report, score = (Page(made[0] / f"{name}.html") for name in ("report", "score"))
    assert score.table("member", "gain") and score.table("member", "gain") == report.table("member", "gain")
    assert all("pseudo labels&#39; makers have seen" in found.source for found in (report, score))
    stores = [rows for rows in report.tables if "checkpoints" in rows[0]][0]
    assert len(stores) == 9 and {row[0] for row in stores[1:]} == {"valid", "test"}
    assert all("model.pt 0 epoch 1" in row and "f01d" in row and "flip" in row for row in stores[1:])
    for row in stores[1:]:
        of_code = {name: text for name, text in zip(stores[0], row, strict=True) if re.match("code|kept", name)}
        assert of_code == {"code of the run": "7ra1n c0331t", "code of the store": "5ta7e 5t0re",
                           "kept under": "0ld, n3w"}
    pseudo = [rows for rows in report.tables if "unsure" in rows[0]][0]
    assert [dict(zip(pseudo[0], row, strict=True)) for row in pseudo[1:]] == [
        {"round": "1", "fold": str(fold), "kept": str(1 + fold), "unsure": "3",
         "foreground pixels": str(50 + fold), "foreground expected": "0.7500", "foreground real": "–",
         **{f"kept with {name}": str(int(name == CLASSES[1])) for name in CLASSES[1:]}} for fold in (0, 1)]
    assert re.search(r"Python 3\.\d+\.\d+, torch \d", report.source)
    balance, (_, test) = report.table("class", "predicted test"), made[1]
    rows = (made[0] / "s.csv").read_text().splitlines()[1:]
    pixels = Counter(" ".join(row.split(",")[1] for row in rows).split())
    assert {name: row["predicted test"] for name, row in balance.items()} == {
        name: f"{pixels[str(c)] / len(test.ids) / SUBMIT_SIZE ** 2:.4f}" for c, name in enumerate(CLASSES)}


def test_worst_images_come_first_and_say_their_score_and_classes(made):
    source = (made[0] / "score.html").read_text()
    v3 = [float(found) for found in re.findall(r"<div>v3 ([\d.]+), ", source)]
    assert len(v3) == 8 and v3 == sorted(v3)
    assert all({"1"} <= set(found.split()) <= {"1", "2", "3"} for found in re.findall('data-classes="([^"]*)"', source))


def test_the_data_page_counts_objects_overlaps_and_equal_photos(made):
    page = Page(made[0] / "data.html")
    classes = page.table("class", "objects")
    assert [(row["photos"], row["objects"], row["pixels"]) for row in classes.values()] == [
        ("8", "0", str(8 * 64 * 64 - 8 * 30 * 30 - 5 * 30 * 30 + 5 * 10 * 10)),
        ("8", "8", str(8 * 30 * 30 - 5 * 10 * 10)), ("5", "5", str(5 * 30 * 30)), ("0", "0", "0")]
    assert sum(int(row["photos of fold 0"]) for row in classes.values()) + sum(
        int(row["photos of fold 1"]) for row in classes.values()) == 8 + 8 + 5
    covered = page.table("below", "on top")
    assert {(row["below"], row["on top"]): (row["overlaps"], row["pixels"]) for row in covered.values()} == {
        (CLASSES[1], CLASSES[2]): ("5", "500")}
    equal, = (rows for rows in page.tables if "photo" in rows[0])
    assert {(row[0], row[2]) for row in equal[1:]} == {("batch_01/0001.png", "train"), ("batch_01/9001.png", "test")}


@pytest.mark.filterwarnings("error")
def test_many_classes_with_letters_that_no_font_has_and_none_in_the_truth_still_make_a_page(tmp_path):
    names = [f"class \u4e00 {c} " + "long " * 20 for c in range(24)]
    values = np.full(24, np.nan)
    urls = common.figure_urls(lambda axes: common.draw_bars(axes, dict(enumerate(names)), {"all": values}), 5)
    urls += common.figure_urls(lambda axes: common.draw_heat(axes, np.full((24, 24), np.nan), names, names), 5)
    sections = [{"title": "t", "figures": [("one", urls[:2]), ("two", urls[2:])]}]
    common.write_page(tmp_path / "p.html", "Many", sections, names)
    assert len([url for url in Page(tmp_path / "p.html").urls if url.startswith("data:image/png")]) == 4


# ---- in a browser ---------------------------------------------------------------------------------------------------

FIRST = "<script>errors = []; onerror = e => errors.push(String(e)); alert = e => errors.push('alert')</script>"
PROBE = """<script>onload = () => {
  const images = [...document.images]
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[place].textContent)
  const table = [...document.querySelectorAll("table")].find(t => /v3|pixels/.test(t.tHead.textContent))
  const place = [...table.tHead.rows[0].cells].findIndex(cell => /^(v3|pixels)$/.test(cell.textContent.trim()))
  const button = table.tHead.rows[0].cells[place].querySelector("button"), sorted = []
  for (let i = 0; i < 2; i++) { button.click(); sorted.push(column()) }
  const filter = document.querySelector(".filter"), cards = [...document.querySelectorAll(".card")]
  filter.value = "2"
  filter.dispatchEvent(new Event("change"))
  const shown = cards.filter(card => card.getBoundingClientRect().height > 0).map(card => card.dataset.classes)
  const wide = document.documentElement.clientWidth
  const outside = e => !e.closest(".table table") && e.getBoundingClientRect().right > wide + 1
  const out = [...document.querySelectorAll("body *")].filter(outside).map(e => e.tagName + e.className)
  parent.postMessage({errors, sorted, shown, out, wide, cards: cards.map(card => card.dataset.classes),
    over: document.documentElement.scrollWidth - wide, decoded: images.filter(i => i.naturalWidth > 0).length,
    dark: getComputedStyle(document.body).backgroundColor, source: document.images[0].currentSrc ===
    document.images[0].src, small: [...document.querySelectorAll("body *")].filter(e => e.textContent.trim() &&
    parseFloat(getComputedStyle(e).fontSize) < 12).length, images: images.length}, "*")
}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_pages_on_a_desk_and_on_a_phone(made, tmp_path, dark):
    frames = ""
    for name in ("data", "report"):
        source = (made[0] / f"{name}.html").read_text()
        (tmp_path / f"{name}.html").write_text(
            source.replace("<title>", FIRST + "<title>").replace("</body>", PROBE + "</body>").replace("lazy", "eager"))
        frames += "".join(f'<iframe src="{name}.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
                          for width in (390, 1280))
    (tmp_path / "frames.html").write_text(
        "<script>found = []; onmessage = e => { found.push(e.data); if (found.length === 4) "
        "document.title = JSON.stringify(found) }</script>" + frames)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=180)
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert sorted(one["wide"] for one in found) == [390, 390, 1280, 1280]
    for one in found:
        assert one["errors"] == [] and one["decoded"] == one["images"] >= 9
        assert one["out"] == [] and one["over"] <= 0 and one["small"] == 0
        up, down = ([float(text) for text in column] for column in one["sorted"])
        assert up == sorted(up) and down == sorted(down, reverse=True) and len(set(up)) > 2
        assert one["shown"] == [ids for ids in one["cards"] if "2" in ids.split()] and one["shown"] != one["cards"]
        assert one["source"] == (not dark) and (sum(map(int, re.findall(r"\d+", one["dark"])[:3])) < 200) == dark
