"""Test files, and data from the competition's folder to masks and folds; pycocotools is the reference for shapes."""
import copy
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import ROOT, read_csv, write_coco, write_photo
from demo_data import CLASSES, draw_data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import common
import train
from common import DATA_OPTIONS, IGNORE_INDEX, SUBMIT_SIZE, UserError
from ensemble import read_numbers

# pycocotools on a new NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TRIANGLE = [[1, 1, 6, 1, 6, 6]]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return load_data with this test's own cache, and threads instead of processes, which take a second to start."""
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(2), raising=False)
    return lambda data, *settings, **options: common.load_data(data, tmp_path / "cache", *settings, **options)


@pytest.fixture
def data(tmp_path):
    """Write faultless data: images 11 (8 x 8) and 12 (6 high, 10 wide), annotations 1 and 2, test image 9000."""
    return write_coco(tmp_path / "data", [(11, 8, 8), (12, 6, 10)], [(11, 0, TRIANGLE), (12, 1, TRIANGLE)])


def snapshot(folder):
    """Return what would differ if anything in `folder` were written, even with the same content."""
    return {str(p): (p.lstat().st_ino, p.lstat().st_mtime_ns, p.is_file() and p.read_bytes())
            for p in sorted(folder.rglob("*")) if p.name != ".lock"}


def object_mask(segmentation, height, width):
    """Return the mask of one object, bool [height, width]."""
    return common.paint_mask([(1, segmentation)], height, width, "order", 2)[0] == 1


def edit(path, change):
    """Apply change(dict) to a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rle(mask):
    """Return the uncompressed RLE of a mask as COCO defines it: down the columns, beginning with the zeros."""
    counts = [len(list(run)) for _, run in groupby(mask.ravel(order="F").tolist())]
    return {"size": list(mask.shape), "counts": [0, *counts] if mask[0, 0] else counts}


def compressed(mask):
    """Return the compressed RLE of a mask."""
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def refusal(load, data):
    """Return the text with which loading `data` is refused; nothing must be written there."""
    before = snapshot(data)
    with pytest.raises(UserError) as refused:
        load(data)
    assert snapshot(data) == before
    return str(refused.value)


def error_line(function, capsys):
    """Return the line that run_script prints when `function` raises what the user has to mend."""
    with pytest.raises(SystemExit) as stop:
        common.run_script(lambda _: function(), None)
    assert stop.value.code == 1
    line, = capsys.readouterr().err.splitlines()
    return line


# ---- files ----------------------------------------------------------------------------------------------------------


def test_importing_common_imports_no_slow_library():
    code = "import sys, common; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "cv2", "albumentations", "segmentation_models_pytorch", "PIL"} & set(modules.split())


def test_atomic_write_shows_the_file_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with common.atomic_write(path) as scratch:
        scratch.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_write_keeps_the_old_file_on_failure(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), common.atomic_write(path) as scratch:
        scratch.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_write_flushes_before_it_renames(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    with common.atomic_write(tmp_path / "a.txt") as scratch:
        scratch.write_text("new")
    assert calls == ["fsync", "replace"]


def test_two_writers_of_one_file_publish_each_what_it_wrote(tmp_path):
    path = tmp_path / "a[1].txt"
    with common.atomic_write(path) as first:
        first.write_text("the first, long")
        with common.atomic_write(path) as second:
            second.write_text("second")
        assert path.read_text() == "second" and first.read_text() == "the first, long"
    assert path.read_text() == "the first, long" and os.listdir(tmp_path) == ["a[1].txt"]


def test_what_a_killed_writer_leaves_goes_with_the_next_write_and_other_files_stay(tmp_path):
    code = "import os, sys, common\nwith common.atomic_write(sys.argv[1]): os.kill(os.getpid(), 9)"
    with start_python(code, tmp_path / "a[1].txt") as killed:
        killed.communicate()
    (tmp_path / ".a1.txt.01234567.tmp").write_text("another's")
    assert len(list(tmp_path.glob(".*.tmp"))) == 2
    (tmp_path / ".a[1].txt.tmp").write_text("no name of a scratch file")
    common.write_json(tmp_path / "a[1].txt", 1)
    assert sorted(os.listdir(tmp_path)) == [".a1.txt.01234567.tmp", ".a[1].txt.tmp", "a[1].txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_writer_that_comes_before_the_last_steps_of_another_removes_nothing(tmp_path, monkeypatch, step):
    path, function = tmp_path / "a.json", getattr(os, step)

    def write_another_first(*args):
        monkeypatch.setattr(os, step, function)
        common.write_json(path, "second")
        function(*args)
    monkeypatch.setattr(os, step, write_another_first)
    common.write_json(path, "first")
    assert common.read_json(path) == "first" and os.listdir(tmp_path) == ["a.json"]


def test_a_scratch_file_is_never_a_link(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr(os, "urandom", bytes)
    (tmp_path / ".a.txt.00000000.tmp").symlink_to("victim")
    with pytest.raises(FileExistsError), common.atomic_write(tmp_path / "a.txt") as scratch:
        scratch.write_text("new")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize(("error", "told"), [
    (OSError(errno.ENOSPC, "No space left"), "{path}: No space left"), (OSError(errno.EFBIG, "Large"), "{path}: Large"),
    (OSError(errno.EDQUOT, "Quota"), "{path}: Quota"), (OSError(errno.EIO, "broken"), "[Errno 5] broken"),
    (OSError(errno.EACCES, "not yours", "b.png"), "b.png: not yours"),
    (OSError(errno.ENOSPC, "No space left", "b.png"), "b.png: No space left"),
    (OSError("b.png is odd"), "b.png is odd")])
def test_only_an_error_of_writing_is_told_as_one_of_the_file(tmp_path, capsys, error, told):
    def write():
        with common.atomic_write(tmp_path / "a.txt"):
            raise error
    assert error_line(write, capsys) == told.format(path=tmp_path / "a.txt")


def test_a_file_in_a_place_where_none_can_be_is_named_itself_and_not_its_scratch_file(tmp_path, capsys):
    (tmp_path / "a.json").mkdir()
    assert error_line(lambda: common.write_json(tmp_path / "a.json", 1), capsys) == f"{tmp_path}/a.json: Is a directory"
    assert error_line(lambda: common.write_json("/proc/a.json", 1), capsys).startswith("/proc/a.json: ")


def test_json_comes_back_as_written(tmp_path):
    value = {"classes": ["Background", "Glasflasche, grün"], "lr": 1e-3, "ids": [3, 10]}
    common.write_json(tmp_path / "a.json", value)
    assert common.read_json(tmp_path / "a.json") == value


def test_json_with_nan_is_not_written(tmp_path):
    common.write_json(tmp_path / "a.json", {"v3": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        common.write_json(tmp_path / "a.json", {"v3": float("nan")})
    assert common.read_json(tmp_path / "a.json") == {"v3": 0.5}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"9" * 5000, None])
def test_unreadable_json_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json"):
        common.read_json(path)


def test_csv_comes_back_as_strings(tmp_path):
    rows = [{"image_id": 3, "note": 'comma, "quote"\nline'}, {"image_id": 10, "note": "grün"}]
    common.write_csv(tmp_path / "a.csv", rows)
    expected = [{k: str(v) for k, v in row.items()} for row in rows]
    assert read_csv(tmp_path / "a.csv", ("note", "image_id")) == expected


@pytest.mark.parametrize("content", [b"", b"image_id\n3\n", b"image_id,fold\n3,\xff\n", None])
def test_unreadable_csv_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.csv"):
        read_csv(path, ("image_id", "fold"))


def test_a_pipe_where_a_file_belongs_is_not_waited_for(tmp_path):
    path = tmp_path / "hashes.txt"
    os.mkfifo(path)
    for read in (common.read_json, lambda path: common.read_rows(path, ())):
        with pytest.raises(UserError, match=r"hashes\.txt.* is no file"):
            read(path)
    assert common.read_own_json(path, dict) is None and common.Hashes(tmp_path).known == {}
    with pytest.raises(UserError, match="no such checkpoint"):
        common.load_checkpoint(path)
    path.rename(tmp_path / "a.npy")
    common.write_json(tmp_path / "a.json", {})
    with pytest.raises(UserError, match=r"a\.json: not a whole store: .*a\.npy is no file"):
        common.open_store(tmp_path / "a.json", common.Hashes(tmp_path))


def test_file_hash_is_the_start_of_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert common.file_hash(tmp_path / "a") == "ba7816bf8f01cfea"


SPREADSHEETS = {
    "semicolons": lambda text: text.replace(",", ";"), "tabs": lambda text: text.replace(",", "\t"),
    "a byte order mark and CRLF": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    "blank rows": lambda text: text.replace("\n", "\n,,\n\n") + "\n , ,\n",
    "an empty column": lambda text: text.replace("\n", ",\n"), "blanks": lambda text: text.replace(",", " , ")}


@pytest.mark.parametrize("change", SPREADSHEETS)
def test_what_a_spreadsheet_does_to_a_csv_is_harmless(tmp_path, change):
    (tmp_path / "a.csv").write_text(SPREADSHEETS[change]("image_id,keep,note\n3,1,a b\n10,,\n"), newline="")
    rows = read_csv(tmp_path / "a.csv", ("image_id", "keep"))
    expected = [{"image_id": "3", "keep": "1", "note": "a b"}, {"image_id": "10", "keep": "", "note": ""}]
    assert [{name: row[name] for name in expected[0]} for row in rows] == expected


def test_lines_are_counted_with_those_that_are_blank(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n\n,\n1,"x\ny"\n2,z\n')
    assert [line for line, _ in common.read_rows(tmp_path / "a.csv", ("a",))] == [5, 6]


@pytest.mark.parametrize("content", [b'a,b\n1,"' + b"x\n" * 200_000, b"a,b\n" + b"1" * 200_000])
def test_an_open_quote_or_an_endless_line_of_a_csv_is_one_line(tmp_path, content):
    limit = common.csv.field_size_limit(131072)
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.csv: field larger than field limit"):
        read_csv(tmp_path / "a.csv", ("a",))
    common.csv.field_size_limit(limit)


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "1,5"])
def test_a_cell_that_is_no_number_is_named_by_its_line(tmp_path, text):
    (tmp_path / "log.csv").write_text(f'epoch,seconds\n1,2.5\n2,"{text}"\n')
    with pytest.raises(UserError, match=rf"log\.csv line 3: seconds is '{text}', no number: mend or remove the file"):
        read_numbers(tmp_path / "log.csv", ("seconds",))
    (tmp_path / "log.csv").write_text("epoch,seconds\n1,2.5\n")
    assert read_numbers(tmp_path / "log.csv", ("seconds",)) == [{"epoch": "1", "seconds": 2.5}]


def test_the_folder_of_pseudo_labels():
    assert str(common.pseudo_folder("out/a", 1, 3)) == "out/a/r1/pseudo/f3"


def start_python(code, *args):
    """Start a second process, whose `code` may import common."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


HOLD = """import sys, common
with common.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()"""


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=rf"{tmp_path}/run/.lock: can't be locked: No locks available; is the disk "):
        common.lock(tmp_path / "run").__enter__()


def test_lock_names_its_holder_and_ends_with_the_process(tmp_path):
    with start_python(HOLD, tmp_path / "run") as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=rf"run is in use by pid {holder.pid}\b"):
                common.lock(tmp_path / "run").__enter__()
        finally:
            holder.kill()
    (tmp_path / "run" / ".lock").write_text("pid 1234567 on the computer of the last holder\n")
    with common.lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_lock_is_free_after_a_failure_inside(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), common.lock(tmp_path):
            raise KeyError


WAIT = """import sys, common
with common.lock(sys.argv[1], wait=True), open(sys.argv[2], "a") as f:
    f.write("waiter")"""


def test_lock_can_wait_for_its_turn_and_says_once_for_whom(tmp_path):
    with common.lock(tmp_path):
        waiter = start_python(WAIT, tmp_path, tmp_path / "order.txt")
        holder = f"pid {os.getpid()} on {socket.gethostname()}"
        assert select.select([waiter.stdout], [], [], 20)[0], "it says nothing"
        assert waiter.stdout.readline() == f"waiting for {holder}, which works on {tmp_path}\n"
        (tmp_path / "order.txt").write_text("holder ")
    assert waiter.communicate()[0] == "" and waiter.returncode == 0
    assert (tmp_path / "order.txt").read_text() == "holder waiter"


def test_a_lock_through_a_link_is_refused_and_what_it_leads_to_stays(tmp_path, capsys):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to("victim")
    assert error_line(lambda: common.lock(tmp_path).__enter__(), capsys).startswith(f"{tmp_path}/.lock: ")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_checkpoint_has_the_same_bytes_each_time(tmp_path):
    import torch
    written = set()
    for _ in range(2):
        common.save_checkpoint(tmp_path / "a.pt", model={"w": torch.arange(3.)})
        written.add((tmp_path / "a.pt").read_bytes())
    assert len(written) == 1


def test_checkpoint_of_tensors_and_plain_values_comes_back(tmp_path):
    import torch
    common.save_checkpoint(tmp_path / "a.pt", model={"w": torch.arange(3.)}, epoch=2, classes=["Background"], best=None)
    state = common.load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(state.pop("model")["w"], torch.arange(3.))
    assert state == {"epoch": 2, "classes": ["Background"], "best": None}


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    import torch
    torch.save({"model": SimpleNamespace()}, tmp_path / "pickle.pt")  # loading it could run any code
    common.save_checkpoint(tmp_path / "torn.pt", model=torch.zeros(1000))
    (tmp_path / "torn.pt").write_bytes((tmp_path / "torn.pt").read_bytes()[:2000])
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name in ("pickle.pt", "torn.pt", "text.pt", "absent.pt"):
        with pytest.raises(UserError, match=name):
            common.load_checkpoint(tmp_path / name)


# ---- segmentations --------------------------------------------------------------------------------------------------


def test_rle_runs_down_the_columns_from_zeros():
    mask = object_mask({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    assert mask.tolist() == [[False, True, False], [True, False, False]]


def test_polygon_by_hand():
    mask = object_mask([[2, 1, 5, 1, 5, 4, 2, 4]], 6, 8)
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:5] = True
    assert np.array_equal(mask, expected)


BLOCK = np.zeros((9, 14), bool)
BLOCK[2:7, 0:5] = BLOCK[0:3, 9:12] = True


@pytest.mark.parametrize("segmentation", [
    pytest.param([[1.5, 0.5, 11.2, 3.3, 4.1, 7.9]], id="polygon"),
    pytest.param([[0, 0, 4, 0, 4, 4], [6, 2, 13, 2, 13, 8, 6, 8]], id="parts"),
    pytest.param([[0, 0, 8, 0, 8, 8], [4, 2, 13, 2, 13, 8, 4, 8]], id="overlapping parts"),
    pytest.param([[-5, -3, 20, 4, 3, 12]], id="leaving the image"),
    pytest.param([[50, 50, 60, 50, 60, 60]], id="outside the image"),
    pytest.param([[3, 3, 3, 3, 3, 3]], id="no area"),
    pytest.param(rle(BLOCK), id="uncompressed RLE"),
    pytest.param(rle(~BLOCK), id="uncompressed RLE from ones"),
    pytest.param(compressed(BLOCK), id="compressed RLE"),
    pytest.param(rle(BLOCK & False), id="nothing in RLE")])
def test_object_mask_agrees_with_pycocotools(segmentation):
    assert common.segmentation_fault(segmentation, 9, 14) is None
    reference = COCO()
    reference.imgs = {1: {"height": 9, "width": 14}}
    expected = reference.annToMask({"image_id": 1, "segmentation": segmentation})
    mask = object_mask(segmentation, 9, 14)
    assert np.array_equal(mask, expected)


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=8), st.booleans())
def test_compressed_rle_is_read_as_pycocotools_writes_it(runs, ones_first):
    column = np.repeat((np.arange(len(runs)) + ones_first) % 2, runs)[:, None]
    assert common.rle_counts(compressed(column)["counts"]) == [0] * ones_first + runs


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2 ** 32 - 1))
def test_both_forms_of_rle_give_the_mask_back(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    for segmentation in (rle(mask), compressed(mask)):
        assert common.segmentation_fault(segmentation, height, width) is None
        assert np.array_equal(object_mask(segmentation, height, width), mask)


numbers = st.one_of(st.integers(), st.floats())
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text("09aoP?", max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=8), st.dictionaries(st.sampled_from(["size", "counts"]), inner)))
polygons = st.lists(st.lists(st.floats(-75, 75), min_size=5, max_size=8), min_size=1, max_size=3)
rles = st.builds(lambda counts: {"size": [5, 7], "counts": counts},
                 st.one_of(st.text("013NOPo", max_size=8), st.lists(st.integers(-1, 36), max_size=4)))


@given(st.one_of(json_values, st.lists(st.lists(numbers, min_size=5, max_size=7)), polygons, rles))
def test_any_segmentation_is_either_refused_or_painted(segmentation):
    fault = common.segmentation_fault(segmentation, 5, 7)
    assert fault is None or (fault and isinstance(fault, str))
    if fault is None:
        mask, pixels, sizes, _ = common.paint_mask([(1, segmentation)], 5, 7, "order", 2)
        assert sizes == [[1, int((mask == 1).sum())]] and pixels == np.bincount(mask.ravel(), minlength=2).tolist()


# ---- photos ---------------------------------------------------------------------------------------------------------


def test_rgb_is_read_as_stored(tmp_path):
    write_photo(tmp_path / "a.png", 3, 5, seed=1)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    assert np.array_equal(common.read_image(tmp_path / "a.png", 3, 5), pixels)


@pytest.mark.parametrize(("mode", "colour", "name", "expected"), [
    ("L", 77, "a.png", (77, 77, 77)),
    ("1", 1, "a.png", (255, 255, 255)),
    ("LA", (77, 0), "a.png", (77, 77, 77)),
    ("RGBA", (10, 20, 30, 0), "a.png", (10, 20, 30)),
    ("CMYK", (0, 255, 255, 0), "a.tif", (255, 0, 0)),
    ("CMYK", (0, 255, 255, 0), "a.jpg", (255, 0, 0)),
    ("I;16", 0x5634, "a.png", (0x56, 0x56, 0x56)),
    ("I;16", 0xFFFF, "a.tif", (255, 255, 255)),
    ("I", 0x5634, "a.tif", (0x56, 0x56, 0x56))])
def test_other_kinds_of_photo_become_rgb(tmp_path, mode, colour, name, expected):
    Image.new(mode, (5, 3), colour).save(tmp_path / name)
    image = common.read_image(tmp_path / name, 3, 5)
    assert image.dtype == np.uint8
    assert np.array_equal(image, np.tile(np.uint8(expected), (3, 5, 1)))


@pytest.mark.parametrize("transparency", [{}, {"transparency": 1}])
def test_palette_photo_gets_the_colours_of_its_palette(tmp_path, transparency):
    image = Image.new("P", (5, 3), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", **transparency)
    assert np.array_equal(common.read_image(tmp_path / "a.png", 3, 5), np.tile(np.uint8((10, 20, 30)), (3, 5, 1)))


# EXIF orientation -> what a viewer makes of the pixels in the file
VIEWED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
          6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}


def write_turned(path, height, width, exif):
    """Write a photo of blocks of noise with this EXIF orientation; return its pixels as they are in the file."""
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    pixels, tags = pixels.repeat(4, 0).repeat(4, 1), Image.Exif()
    tags[0x0112] = exif
    options = {"lossless": True} if path.suffix == ".webp" else {"quality": 100, "dpi": (72, 72)}
    Image.fromarray(pixels).save(path, exif=tags, **options)
    with Image.open(path) as photo:
        return np.array(photo.convert("RGB"))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("stored_size", [(16, 32), (32, 32)])
@pytest.mark.parametrize("exif", VIEWED)
def test_exif_turns_a_photo_as_the_size_says_and_as_the_setting_says_where_the_size_cannot(
        tmp_path, ending, stored_size, exif):
    path = tmp_path / f"a.{ending}"
    stored = write_turned(path, *stored_size, exif)
    ways = {"stored": stored, "shown": VIEWED[exif](stored)}
    for setting, asked in itertools.product(DATA_OPTIONS["orientation"][0], {stored_size, stored_size[::-1]}):
        fitting = [way for way, pixels in ways.items() if pixels.shape[:2] == asked]
        if not fitting:
            with pytest.raises(OSError, match="the JSON says"):
                common.read_image(path, *asked, setting)
            continue
        way, = fitting if len(fitting) == 1 else [setting]
        assert np.array_equal(common.read_image(path, *asked, setting), ways[way])
        turn = "" if exif == 1 else "ambiguous" if len(fitting) == 2 else way
        assert common.check_image(path, *asked, setting)["turn"] == turn


def test_a_tiff_with_an_orientation_is_refused_as_libraries_read_it_differently(tmp_path):
    for exif in range(1, 9):
        write_turned(tmp_path / "a.tif", 16, 16, exif)
        for read in (common.read_image, common.check_image):
            with pytest.raises(OSError, match=f"orientation {exif}: save it upright") if exif > 1 else nullcontext():
                read(tmp_path / "a.tif", 16, 16)


def test_damaged_exif_turns_nothing(tmp_path):
    pixels = write_turned(tmp_path / "a.jpg", 16, 16, 6)
    content = (tmp_path / "a.jpg").read_bytes()
    start = content.index(b"Exif\0\0") + 6
    (tmp_path / "a.jpg").write_bytes(content[:start] + b"XX" + content[start + 2:])
    assert np.array_equal(common.read_image(tmp_path / "a.jpg", 16, 16), pixels)
    assert common.check_image(tmp_path / "a.jpg", 16, 16)["turn"] == ""


def test_the_orientation_decides_what_a_split_reads_and_is_part_of_its_fingerprint(data, tmp_path, load):
    stored = write_turned(data / "batch_01/0011.png", 8, 8, 3)
    splits = {way: load(data, orientation=way, decoded=way == "stored") for way in DATA_OPTIONS["orientation"][0]}
    for way, expected in (("stored", stored), ("shown", stored[::-1, ::-1])):
        train, test = splits[way]
        assert np.array_equal(train.image(0), expected) and train.turns == ["ambiguous", ""] and test.turns == [""]
    fingerprints = {split.fingerprint for pair in splits.values() for split in pair}
    assert len(fingerprints) == 4
    assert np.array_equal(load(data)[0].image(0), stored[::-1, ::-1])  # as viewers and most labelling tools show it


def test_the_check_names_photos_whose_turn_is_ambiguous_and_shows_them_both_ways(data, tmp_path, load, capsys):
    for name in ("0011", "9000"):
        write_turned(data / f"batch_01/{name}.png", 8, 8, 3)
    sets = load(data, orientation="stored")
    train.warn_of_photos(*sets)
    out = capsys.readouterr().out
    assert "2 photo(s) are turned by EXIF" in out and "read as stored; " in out
    assert "shown or stored: batch_01/0011.png, batch_01/9000.png\n" in out
    card, test_card = train.turned_photos(*sets)
    assert card["text"] == "batch_01/0011.png" and card["classes"] == [1]
    assert test_card["text"] == "batch_01/9000.png" and test_card["classes"] == []
    assert [title for title, _ in card["tiles"]] == ["shown", "stored, as it is read"]
    assert len({url for _, url in card["tiles"]}) == 2


# Label Studio's export: points in percent of the turned photo, as people draw, times the size of the stored one
def test_the_check_names_photos_with_their_size_as_stored_and_shows_them_both_ways(data, load, capsys, monkeypatch):
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:4, :8] = 255  # shown, it is above on the right
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(stored).save(data / "batch_01/0011.png", exif=tags)
    edit(data / "train.json", lambda coco: coco["images"][0].update(width=16, height=8))
    edit(data / "train.json", lambda coco: coco["annotations"][0].update(segmentation=[[8, 0, 16, 0, 16, 4, 8, 4]]))
    sets = load(data)
    assert np.array_equal(sets[0].image(0), stored)  # as its size says
    train.warn_of_photos(*sets)
    out = capsys.readouterr().out
    assert "1 photo(s) are turned by EXIF, but have the size of the stored pixels" in out
    assert out.endswith("the masks fit the turned one: batch_01/0011.png\n")
    monkeypatch.setattr(train, "tile_url", lambda tile: tile)
    card, = train.turned_photos(*sets)
    assert [title for title, _ in card["tiles"]] == ["shown", "stored, as it is read"]
    white = [np.argwhere((tile > 40).all(2)) for _, tile in card["tiles"]]  # under the mask or not
    assert [[*corners.min(0), *corners.max(0)] for corners in white] == [[0, 128, 127, 255], [0, 0, 127, 127]]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_xmp_turns_nothing(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    write_photo(tmp_path / "b.png", 16, 16, 0)
    Image.open(tmp_path / "b.png").save(path, **({"pnginfo": info} if ending == "png" else {"xmp": xmp}))
    with Image.open(path) as photo:
        pixels = np.array(photo.convert("RGB"))
        assert photo.getexif()[0x0112] == 3  # Pillow takes it
    assert np.array_equal(common.read_image(path, 16, 16), pixels)
    assert common.check_image(path, 16, 16)["turn"] == ""


@pytest.mark.parametrize("colours", [1, 3, 4])
@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_sixteen_bits_that_hold_fewer_are_refused_with_the_cure(tmp_path, bits, ending, colours):
    path, ramp = tmp_path / f"a.{ending}", np.linspace(0, 2 ** bits - 1, 256).astype(np.uint16).reshape(16, 16)
    opaque = np.full_like(ramp, 0xFFFF)
    cv2.imwrite(str(path), ramp if colours == 1 else np.dstack([ramp, ramp, ramp, opaque][:colours]))
    if bits == 16:
        assert np.array_equal(common.read_image(path, 16, 16)[..., 1], ramp >> 8)
        facts = common.check_image(path, 16, 16)
        assert facts["turn"] == "" and not facts["low_contrast"]
        return
    for read in (common.read_image, common.check_image):
        with pytest.raises(OSError, match=f"no value above {2 ** bits - 1}, .*convert it to 8 bits"):
            read(path, 16, 16)


def test_whole_numbers_beyond_sixteen_bits_are_refused(tmp_path):
    for low, high in ((0, 70_000), (-5, 40_000)):
        Image.fromarray(np.linspace(low, high, 256).astype(np.int32).reshape(16, 16)).save(tmp_path / "a.tif")
        with pytest.raises(OSError, match=f"values from {low} to {high}, .*convert it to 8 bits"):
            common.read_image(tmp_path / "a.tif", 16, 16)


@pytest.mark.parametrize("burnt_in", [np.s_[3, 3], np.s_[18:19, 4:16]])
def test_twelve_bits_with_a_stuck_pixel_or_a_scale_bar_show_next_to_nothing(tmp_path, burnt_in):
    ramp = np.linspace(0, 4095, 400).astype(np.uint16).reshape(20, 20)
    ramp[burnt_in] = 0xFFFF
    cv2.imwrite(str(tmp_path / "a.png"), ramp)
    assert common.check_image(tmp_path / "a.png", 20, 20)["low_contrast"]
    write_photo(tmp_path / "b.png", 20, 20, 0)
    night = Image.fromarray(np.array(Image.open(tmp_path / "b.png")) // 8)  # 8 bits may be as dark
    night.save(tmp_path / "b.png")
    assert not common.check_image(tmp_path / "b.png", 20, 20)["low_contrast"]


def test_sixteen_bits_with_0_as_white_are_refused(tmp_path):
    ramp = np.linspace(0, 0xFFFF, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.tif", tiffinfo={262: 0})
    for read in (common.read_image, common.check_image):
        with pytest.raises(OSError, match="0 as white: convert it to 8 bits"):
            read(tmp_path / "a.tif", 16, 16)
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "b.tif", tiffinfo={262: 0})
    assert np.array_equal(common.read_image(tmp_path / "b.tif", 16, 16)[..., 0], ramp >> 8)  # Pillow knows of 8 bits


def test_the_check_names_photos_that_show_next_to_nothing(data, load, capsys):
    Image.new("RGB", (8, 8), (0, 0, 9)).save(data / "batch_01/9000.png")
    train.warn_of_photos(*load(data))
    out = capsys.readouterr().out
    assert "1 photo(s) show next to nothing" in out and out.endswith("whole range: batch_01/9000.png\n")


def test_photo_of_another_size_is_refused_naming_both_sizes(tmp_path):
    write_photo(tmp_path / "a.png", 16, 32, seed=1)
    for height, width in ((32, 16), (16, 31), (32, 32)):
        for read in (common.read_image, common.check_image):
            with pytest.raises(OSError, match=f"32x16.*{width}x{height}"):
                read(tmp_path / "a.png", height, width)


@pytest.mark.parametrize("options", [
    {"quality": 30}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"},
    {"orientation": 6}, {"orientation": 6, "asked": (70, 45)}, {"orientation": 3}, {"ending": "png"}])
def test_a_photo_has_the_pixels_that_pillow_reads_and_passes_the_check(tmp_path, monkeypatch, options):
    path = tmp_path / f"a.{options.pop('ending', 'jpg')}"
    rng, exif, asked = np.random.default_rng(0), Image.Exif(), options.pop("asked", (45, 70))
    exif[0x0112] = options.pop("orientation", 1)
    pixels = np.kron(rng.integers(0, 256, (9, 14, 3)), np.ones((5, 5, 1))) + rng.normal(0, 9, (45, 70, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(options.pop("mode", "RGB"))
    image.save(path, exif=exif, **options)
    decoded = common.read_image(path, *asked)
    common.check_image(path, *asked)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)  # then Pillow decodes
    assert decoded.shape == (*asked, 3) and np.array_equal(decoded, common.read_image(path, *asked))


def test_the_check_looks_at_all_of_a_jpeg(tmp_path):
    write_photo(tmp_path / "a.jpg", 64, 96, seed=1)
    whole = (tmp_path / "a.jpg").read_bytes()
    common.check_image(tmp_path / "a.jpg", 64, 96)
    for left in range(2, len(whole) - 2, 97):
        (tmp_path / "a.jpg").write_bytes(whole[:left])
        with pytest.raises(OSError):
            common.check_image(tmp_path / "a.jpg", 64, 96)


def test_a_checked_photo_that_has_been_damaged_since_is_an_error(tmp_path):
    write_photo(tmp_path / "a.jpg", 16, 32, seed=1)
    header = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(header[:header.index(b"\xff\xda")])
    with pytest.raises(OSError):
        common.read_image(tmp_path / "a.jpg", 16, 32)


# ---- splits ---------------------------------------------------------------------------------------------------------


def columns(first, last):
    """Return the RLE of the whole columns from first to last in a 2 x 6 image."""
    mask = np.zeros((2, 6), bool)
    mask[:, first:last + 1] = True
    return rle(mask)


@pytest.mark.parametrize(("paint", "row"), [("order", [1, 2, 2, 2, 2, 2]), ("id", [1, 2, 3, 3, 2, 2]),
                                            ("area", [1, 1, 3, 3, 2, 2])])
def test_paint_order_decides_overlaps(tmp_path, load, paint, row):
    data = write_coco(tmp_path / "data", [(1, 2, 6)],
                      [(1, 3, columns(2, 3)), (1, 1, columns(0, 1)), (1, 2, columns(1, 5))],
                      categories=[(1, "a"), (2, "b"), (3, "c")])
    train, _ = load(data, paint)
    assert train.mask(0).tolist() == [row, row]
    assert train.pixels == [np.bincount(row * 2, minlength=4).tolist()]


def test_there_is_a_test_for_every_paint_order():
    assert set(DATA_OPTIONS["paint"][0]) == {"order", "id", "area"}


@pytest.mark.parametrize(("categories", "class_ids"), [
    pytest.param([(0, "UNKNOWN"), (1, "General trash"), (2, "Paper")], [1, 2, 3], id="first edition, ids from 0"),
    pytest.param([(1, "General trash"), (2, "Paper"), (3, "Paper pack")], [1, 2, 3], id="later editions, ids from 1"),
    pytest.param([(10, "Clothing"), (2, "Paper"), (7, "Styrofoam")], [3, 1, 2], id="any ids in any order")])
def test_classes_are_background_and_the_categories_by_id(tmp_path, load, categories, class_ids):
    data = write_coco(tmp_path / "data", [(i, 8, 8) for i in (907, 3, 55)],
                      [(i, category, TRIANGLE) for i, (category, _) in zip((907, 3, 55), categories, strict=True)],
                      categories=categories)
    train, test = load(data)
    assert train.classes == test.classes == ["Background", *(name for _, name in sorted(categories))]
    assert [int(train.mask(i).max()) for i in range(3)] == class_ids


# as Roboflow exports it: a root category that no object has, with the name of a class or of the background
@pytest.mark.parametrize("root", ["rubbish", "Metal", "background", ""])
def test_categories_without_annotations_can_be_dropped(tmp_path, load, capsys, root):
    data = write_coco(tmp_path / "data", [(1, 8, 8), (2, 8, 8)], [(1, 1, TRIANGLE), (2, 3, TRIANGLE)],
                      categories=[(0, root), (1, "Paper"), (2, "Glass"), (3.0, "Metal")])
    splits = load(data, unused="drop")
    for split in splits:
        assert split.classes == ["Background", "Paper", "Metal"] and split.dropped == [root, "Glass"]
    assert [int(splits[0].mask(i).max()) for i in range(2)] == [1, 2]
    common.write_coco(tmp_path / "a.json", data / "test.json", splits[1], [(0, np.full((256, 256), 2, np.uint8))])
    exported = common.read_json(tmp_path / "a.json")
    assert [each["category_id"] for each in exported["annotations"]] == [3]
    assert [each["name"] for each in exported["categories"]] == ["Paper", "Metal"]
    train.check(train.parse_args(["--data", f"{data}", "--cache", f"{tmp_path}/cache", "--exp", f"{tmp_path}/exp",
                                  "--folds", "2", "--unused", "drop"]))
    assert f"dropped, as they have no annotations: {root}, Glass\n" in capsys.readouterr().out
    if root == "rubbish":
        kept, _ = load(data)
        assert kept.classes == ["Background", "rubbish", "Paper", "Glass", "Metal"] and kept.dropped == []
        assert kept.fingerprint != splits[0].fingerprint
    else:
        with pytest.raises(UserError, match=r"; --unused drop \(make: UNUSED=drop\) drops those without annotations"):
            load(data)


@pytest.mark.parametrize("annotations", [None, 7, [], [7, {}, {"category_id": [0]}, {"category_id": math.nan}]])
def test_dropping_unused_categories_takes_any_json(data, load, annotations):
    edit(data / "train.json", lambda train: train.update(annotations=annotations))
    with pytest.raises(UserError, match="train.json: "):
        load(data, unused="drop")


def test_dropping_unused_categories_lists_nothing_but_the_faults(data, load):
    edit(data / "train.json", lambda train: train["annotations"].append("x"))
    with pytest.raises(UserError) as refusal:
        load(data, unused="drop")
    assert str(refusal.value).splitlines()[:-1] == ["train.json: annotations[2] is not an object"]


@pytest.mark.parametrize("paint", DATA_OPTIONS["paint"][0])
def test_the_truths_of_labelled_test_photos_are_the_masks_of_the_same_photos(tmp_path, load, paint):
    square = [[0, 0, 0, 6, 6, 6, 6, 0]]
    data = write_coco(tmp_path / "data", [(11, 8, 8), (12, 6, 10), (13, 512, 512), (14, 8, 8)],
                      [(11, 1, TRIANGLE), (11, 0, square), (12, 0, square), (12, 1, TRIANGLE), (12, 0, TRIANGLE),
                       (13, 1, [[3.5, 4, 300, 5, 301, 300]])])
    train, _ = load(data, paint)
    coco = common.read_json(data / "train.json")
    coco["images"] = [*coco["images"][::-1], {"id": 5, "height": 9, "width": 9, "file_name": "more.png"}]
    coco["annotations"].append({"id": 99, "image_id": 5, "category_id": 1, "segmentation": TRIANGLE})
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    truths = common.load_truths(tmp_path / "truth.json", train, paint)
    assert truths.dtype == np.uint8 and truths.shape == (4, SUBMIT_SIZE, SUBMIT_SIZE)
    assert (truths == np.stack([train.truth(i) for i in range(4)])).all()
    assert [np.unique(truth).tolist() for truth in truths[1:]] == [
        {"area": [0, 1], "id": [0, 1, 2], "order": [0, 1]}[paint], [0, 2], [0]]


@pytest.mark.parametrize("change, faults", [
    (lambda coco: coco["images"][0].update(height=16), ["test image 11: it has the size (16, 8), not (8, 8)"]),
    (lambda coco: coco["images"].pop(1) and coco["annotations"].pop(1), ["test image 12: it has no such image"]),
    (lambda coco: coco["images"][1].update(file_name="train/0012.jpg"),
     ["test image 12: it is train/0012.jpg there and batch_01/0012.png in the data: another photo, or"]),
    (lambda coco: coco["categories"][1].update(name="Glass"),
     ["its categories are Paper, Glass, those of the data Paper, Metal"]),
    (lambda coco: coco["categories"].append({"id": 2, "name": "Glass"}),
     ["its categories are Paper, Metal, Glass, those of the data Paper, Metal"]),
    (lambda coco: coco["annotations"][1].update(category_id=7), ["annotation 2 "]),
    (lambda coco: coco.pop("annotations"), ["not a COCO file: it needs the lists images, categories, annotations"]),
    (lambda coco: [image.update(width=9) for image in coco["images"]],
     ["test image 11: it has the size (8, 9)", "test image 12: it has the size (6, 9), not (6, 10)"])])
def test_labels_of_test_photos_that_do_not_fit_them_are_listed(tmp_path, data, load, change, faults):
    train, _ = load(data)
    shutil.copy(data / "train.json", tmp_path / "truth.json")
    edit(tmp_path / "truth.json", change)
    with pytest.raises(UserError) as refusal:
        common.load_truths(tmp_path / "truth.json", train, "area")
    lines = str(refusal.value).splitlines()
    assert all(any(fault in line for line in lines) for fault in faults), lines
    assert all("truth.json: " in line for line in lines)


def test_labels_of_test_photos_drop_the_categories_that_the_data_drops(tmp_path, load):
    data = write_coco(tmp_path / "data", [(1, 8, 8), (2, 8, 8)], [(1, 1, TRIANGLE), (2, 3, TRIANGLE)],
                      categories=[(0, "root"), (1, "Paper"), (2, "Glass"), (3, "Metal")])
    train, _ = load(data, unused="drop")
    truths = common.load_truths(data / "train.json", train, "area")
    assert [truth.max() for truth in truths] == [1, 2] and (truths[1] == train.truth(1)).all()
    assert [truth.max() for truth in common.load_truths(data / "train.json", load(data)[0], "area")] == [2, 4]
    edit(data / "train.json", lambda coco: coco["annotations"][0].update(category_id=2))
    with pytest.raises(UserError, match="train.json: annotation 1 .*2"):
        common.load_truths(data / "train.json", train, "area")


@pytest.mark.parametrize("labelled", [True, False])
def test_the_test_json_is_its_own_truth_where_it_has_annotations(data, load, labelled):
    _, test = load(data)
    assert common.truth_file(data) is None
    if labelled:
        edit(data / "test.json", lambda coco: coco["annotations"].append({"id": 1}))
    else:
        edit(data / "test.json", lambda coco: coco.pop("annotations"))
    assert common.truth_file(data) == (data / "test.json" if labelled else None)
    assert common.truth_file(data, "other.json") == Path("other.json")
    with pytest.raises(UserError, match="nosuch.json: No such file"):
        common.load_truths(Path("nosuch.json"), test, "area")


@pytest.mark.parametrize("options", [{"unused": "Drop"}, {"paint": "Area"}, {"orientation": None}, {"paint": ["area"]}])
def test_an_option_that_there_is_not_is_refused_with_those_that_there_are(data, load, options):
    (name, value), = options.items()
    values = " or ".join(DATA_OPTIONS[name][0])
    with pytest.raises(UserError, match=f"^{name} is {re.escape(repr(value))}, it must be {values}$"):
        load(data, **options)


def test_image_ids_keep_the_order_of_the_json_and_need_not_be_contiguous(tmp_path, load):
    data = write_coco(tmp_path / "data", [(907, 8, 8), (3, 6, 10), (55, 10, 6)],
                      [(55, 1, TRIANGLE), (3, 0, TRIANGLE), (55, 0, [[0, 7, 5, 7, 5, 10]])],
                      test_images=[(70, 5, 4), (8, 4, 5)])
    train, test = load(data)
    assert (train.ids, test.ids) == ([907, 3, 55], [70, 8])
    assert (train.sizes[1], test.sizes[0]) == ([6, 10], [5, 4])
    assert [sorted(set(train.mask(i).flat)) for i in range(3)] == [[0], [0, 1], [0, 1, 2]]
    assert [train.mask(i).shape for i in range(3)] == [(8, 8), (6, 10), (10, 6)]
    assert np.array_equal(train.image(1), np.random.default_rng(3).integers(0, 256, (6, 10, 3), dtype=np.uint8))
    assert test.image(0).shape == (5, 4, 3)
    assert test.masks is None


def test_train_all_is_preferred(data, load):
    shutil.copy(data / "train.json", data / "train_all.json")
    edit(data / "train.json", lambda train: train["images"].clear())
    assert load(data)[0].ids == [11, 12]


def test_a_photo_without_annotations_is_background(data, load):
    edit(data / "train.json", lambda train: train["annotations"].pop())
    assert not load(data)[0].mask(1).any()


@pytest.mark.parametrize(("height", "width"), [(512, 512), (360, 480), (100, 300)])
def test_truth_is_the_nearest_pixel_above_and_left(tmp_path, load, height, width):
    mask = np.random.default_rng(0).random((height, width)) < 0.5
    train, _ = load(write_coco(tmp_path / "data", [(1, height, width)], [(1, 0, compressed(mask))]))
    assert np.array_equal(train.mask(0), mask)
    side = np.arange(SUBMIT_SIZE)
    expected = mask[side * height // SUBMIT_SIZE][:, side * width // SUBMIT_SIZE]
    assert np.array_equal(train.truth(0), expected)
    if height == width == 512:
        assert np.array_equal(expected, mask[::2, ::2])


def test_evaluation_items_are_square_and_unlabelled_without_masks(data, load):
    train, test = load(data)
    image, truth = common.EvalPhotos(train, [1, 0], 32)[0]
    assert (image.shape, image.dtype, truth.dtype) == ((32, 32, 3), np.uint8, np.uint8)
    assert np.array_equal(truth, train.truth(1))
    photos = common.EvalPhotos(test, range(1), 32)
    assert len(photos) == 1
    assert photos[0][1].shape == (SUBMIT_SIZE, SUBMIT_SIZE)
    assert (photos[0][1] == IGNORE_INDEX).all()


@pytest.fixture(scope="module")
def tiny_splits(tiny_data, tmp_path_factory):
    return common.load_data(tiny_data, tmp_path_factory.mktemp("cache"))


def test_masks_painted_by_many_processes_agree_with_pycocotools(tiny_data, tiny_splits):
    train, _ = tiny_splits
    coco = json.loads((tiny_data / "train.json").read_text())
    reference = COCO()
    reference.imgs = {i["id"]: i for i in coco["images"]}
    for index, image_id in enumerate(train.ids):
        objects = [(a["category_id"] + 1, reference.annToMask(a) > 0)
                   for a in coco["annotations"] if a["image_id"] == image_id]
        expected = np.zeros((64, 64), np.uint8)
        for class_id, mask in sorted(objects, key=lambda o: -int(o[1].sum())):
            expected[mask] = class_id
        assert np.array_equal(train.mask(index), expected)
        assert train.pixels[index] == np.bincount(expected.ravel(), minlength=12).tolist()


# ---- groups and folds -----------------------------------------------------------------------------------------------


def test_identical_photos_and_group_keys_link_over_any_number_of_steps(tmp_path, load):
    linked = [{"id": 1, "group": "drive"}, {"id": 2, "group": "drive"}, {"id": 3}, {"id": 4, "group": "park"},
              {"id": 5, "group": "park"}]
    alone = [{"id": 6}, {"id": 7, "group": "kitchen"}, {"id": 8, "group": None}]
    data = write_coco(tmp_path / "data", linked + alone, [(1, 0, TRIANGLE)])
    for double, original in ((3, 2), (4, 3)):
        shutil.copy(data / f"batch_01/{original:04}.png", data / f"batch_01/{double:04}.png")
    groups = load(data)[0].groups
    assert len(set(groups[:5])) == 1
    assert len({groups[0], *groups[5:]}) == 4


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.sampled_from("pqrstuvw")), max_size=9))
def test_groups_are_the_connected_parts(photos):
    groups = common.merge_groups([{"group": group, "content": content} for group, content in photos])
    linked = np.array([[a[1] == b[1] or (a[0] is not None and a[0] == b[0]) for b in photos] for a in photos], bool)
    for _ in photos:
        linked = linked @ linked
    assert [[a == b for b in groups] for a in groups] == linked.tolist()


@st.composite
def fold_problems(draw, grouped=True):
    """Draw (present, groups, n_folds) that can be split."""
    n = draw(st.integers(2, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    present = rng.random((n, draw(st.integers(1, 6)))) < rng.random() * rng.random()
    groups = [str(g) for g in (rng.integers(0, draw(st.integers(2, n)), n) if grouped else range(n))]
    return present, groups, draw(st.integers(1, min(5, len(set(groups)))))


@given(fold_problems())
def test_folds_keep_groups_whole_and_none_is_empty(problem):
    present, groups, n_folds = problem
    folds = common.make_folds(present, groups, n_folds)
    assert folds.shape == (len(present),)
    assert set(folds.tolist()) == set(range(n_folds))
    assert len({*zip(groups, folds.tolist(), strict=True)}) == len(set(groups))
    assert np.array_equal(common.make_folds(present, groups, n_folds), folds)


@given(fold_problems(grouped=False))
def test_the_rarest_class_is_shared_out_evenly(problem):
    present, groups, n_folds = problem
    folds = common.make_folds(present, groups, n_folds)
    totals = present.sum(0)
    if totals.any():
        rarest = np.where(totals > 0, totals, len(present) + 1).argmin()
        counts = np.bincount(folds[present[:, rarest]], minlength=n_folds)
        assert counts.max() - counts.min() <= 1
    else:
        sizes = np.bincount(folds)
        assert sizes.max() - sizes.min() <= 1


def test_every_class_of_an_imbalanced_set_is_shared_out():
    rng = np.random.default_rng(0)
    present = rng.random((300, 6)) < (0.6, 0.3, 0.15, 0.08, 0.04, 0.02)
    folds = common.make_folds(present, [str(i) for i in range(300)], 5)
    counts = np.array([np.bincount(folds[has], minlength=5) for has in present.T])
    assert (counts.max(1) - counts.min(1)).max() <= 2
    assert np.bincount(folds).tolist() == pytest.approx([60] * 5, abs=2)


@given(fold_problems(), st.data())
def test_groups_that_have_a_fold_keep_it_and_the_others_fill_the_folds_up(problem, data):
    present, groups, n_folds = problem
    names = sorted(set(groups))
    kept = {name: data.draw(st.integers(-1, n_folds - 1)) for name in data.draw(st.sets(st.sampled_from(names)))}
    folds = common.make_folds(present, groups, n_folds, kept)
    fold_of = dict(zip(groups, folds.tolist(), strict=True))
    assert {name: fold_of[name] for name in kept} == kept
    assert all(0 <= fold_of[name] < n_folds for name in set(names) - kept.keys())
    assert len({*zip(groups, folds.tolist(), strict=True)}) == len(names)


def test_what_is_new_goes_where_its_class_is_wanted_and_what_is_in_training_alone_counts_for_no_fold():
    present = np.array([[1], [1], [1], [1], [1], [1]], bool)
    folds = common.make_folds(present, list("abcdef"), 2, {"a": 1, "b": 1, "c": -1, "d": -1})
    assert folds.tolist() == [1, 1, -1, -1, 0, 0]


def test_added_images_move_no_other_to_another_fold(tmp_path, capsys):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 2, (40, 4)).tolist()
    groups = [f"group {i // 2}" for i in range(40)]
    before = common.load_folds(tmp_path, SimpleNamespace(ids=[*range(30)], groups=groups[:30], pixels=pixels[:30]), 3)
    rows = [row | {"fold": -1} if row["group"] == "group 0" else row for row in read_csv(tmp_path / "folds.csv")]
    common.write_csv(tmp_path / "folds.csv", rows)
    grown = SimpleNamespace(ids=[*range(100, 140)], groups=groups, pixels=pixels)  # with other ids, as by a new export
    with pytest.raises(UserError, match="lists other images"):
        common.load_folds(tmp_path, grown, 3)
    after = common.load_folds(tmp_path, grown, 3, renew=True)
    assert after[:30].tolist() == [-1, -1, *before[2:]]
    assert {0, 1, 2} == set(after[30:].tolist())
    assert common.load_folds(tmp_path, grown, 3).tolist() == after.tolist()
    assert set(common.load_folds(tmp_path, grown, 2, renew=True).tolist()) == {-1, 0, 1}  # but for -1 all anew


def test_more_folds_than_groups_are_refused():
    with pytest.raises(UserError, match="3 folds of 2"):
        common.make_folds(np.ones((4, 1), bool), ["a", "a", "b", "b"], 3)


def test_drawn_scenes_stay_on_one_side(tiny_splits, tmp_path):
    train, _ = tiny_splits
    folds = common.load_folds(tmp_path, train, 3)
    assert set(folds.tolist()) == {0, 1, 2}
    assert folds[0] == folds[1] and folds[5] == folds[6] and folds[10] == folds[11]


def test_folds_are_written_once_and_may_be_edited(tiny_splits, tmp_path):
    train, _ = tiny_splits
    folds = common.load_folds(tmp_path / "exp", train, 3)
    rows = read_csv(tmp_path / "exp/folds.csv", ("image_id", "group", "fold"))
    assert [int(r["image_id"]) for r in rows] == train.ids
    assert [r["group"] for r in rows] == train.groups
    assert [int(r["fold"]) for r in rows] == folds.tolist()
    moved = [r | {"fold": (int(r["fold"]) + 1) % 3} for r in rows]
    common.write_csv(tmp_path / "exp/folds.csv", moved)
    before = snapshot(tmp_path)
    assert common.load_folds(tmp_path / "exp", train, 3).tolist() == ((folds + 1) % 3).tolist()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("text", ["", "image_id\n", "image_id,group,fold\n", "image_id,group,fold\n1,a,0\n3,b,1\n",
                                  "image_id,group,fold\n1,a,0\n1,a,1\n", "image_id,group,fold\n1,a,0\n2,b,2\n",
                                  "image_id,group,fold\n1,a,0\n2,b,x\n", "image_id,group,fold\n1,a,0\n2,b\n",
                                  "image_id,group,fold\n1,a,0\n2,b,-1\n", "image_id,group,fold\n1,a,0\n2,b,-2\n",
                                  "image_id,group,fold\n1,a,0\n2,b,0\n"])
def test_folds_of_other_images_or_another_number_are_refused_by_name(tmp_path, text):
    train = SimpleNamespace(ids=[1, 2], groups=["a", "b"], pixels=[[3, 1], [4, 0]])
    (tmp_path / "folds.csv").write_text(text)
    with pytest.raises(UserError, match=r"folds\.csv"):
        common.load_folds(tmp_path, train, 2)
    assert (tmp_path / "folds.csv").read_text() == text


def test_folds_of_other_images_are_renewed_on_request_and_each_old_file_is_kept_by_name(tmp_path, capsys):
    train = SimpleNamespace(ids=[1, 2], groups=["a", "b"], pixels=[[3, 1], [4, 0]])
    for number in (1, 2):
        text = f"image_id,group,fold\n1,a,0\n{number + 2},b,1\n"
        (tmp_path / "folds.csv").write_text(text)
        assert sorted(common.load_folds(tmp_path, train, 2, renew=True).tolist()) == [0, 1]
        assert f"the old one is {tmp_path}/folds-{number}.csv" in capsys.readouterr().out
        assert (tmp_path / f"folds-{number}.csv").read_text() == text
    assert [r["image_id"] for r in read_csv(tmp_path / "folds.csv", ("image_id",))] == ["1", "2"]


@pytest.mark.parametrize("text", [
    "image_id,group,fold\n1 ,a,0 \n 2,b, 1\n", "image_id,group,fold\r\n2,b,1\r\n1,a,0\r\n",
    "image_id,fold\n2,1\n1,0\n\n",
    "\ufeffimage_id,group,fold,note\n1,a,0,good\n,,,\n2,b,1,\n\n\n"])
def test_what_an_editor_does_to_folds_is_harmless_and_makes_no_other_folds_of_them(tmp_path, text):
    train = SimpleNamespace(ids=[1, 2], groups=["a", "b"], pixels=[[3, 1], [4, 0]])
    (tmp_path / "folds.csv").write_bytes(text.encode())
    for renew in (False, True):
        folds = common.load_folds(tmp_path, train, 2, renew)
        assert folds.tolist() == [0, 1] and (tmp_path / "folds.csv").read_bytes() == text.encode()
    assert common.folds_hash([1, 2], folds.tolist()) == common.folds_hash(["1", "2"], [0, 1])
    assert common.folds_hash([1, 2], [0, 1]) != common.folds_hash([1, 2], [1, 0]) != common.folds_hash([2, 1], [0, 1])


@pytest.mark.parametrize(("rows", "message"), [
    ("1,a,0\n2,b,x\n", "line 3: the fold of image 2 is 'x'"),
    ("1,a,0\n2,b,\n", "line 3: the fold of image 2 is ''"),
    ("1,a,0\n2,b,1\n1,a,0\n", "line 4: image 1 is listed twice"),
    ("1,a,0\n2,b,7\n", r"has the folds \[0, 7\]: one number must be wrong")])
def test_a_slip_in_edited_folds_is_named_by_line_and_never_overwritten(tmp_path, rows, message):
    train = SimpleNamespace(ids=[1, 2], groups=["a", "b"], pixels=[[3, 1], [4, 0]])
    (tmp_path / "folds.csv").write_text("image_id,group,fold\n" + rows)
    with pytest.raises(UserError, match=message):
        common.load_folds(tmp_path, train, 2, renew=True)
    assert (tmp_path / "folds.csv").read_text() == "image_id,group,fold\n" + rows


def test_images_of_one_group_in_two_folds_are_named(tmp_path):
    train = SimpleNamespace(ids=[1, 2, 3, 4], groups=["a", "b", "c", "b"], pixels=4 * [[3, 1]])
    (tmp_path / "folds.csv").write_text("image_id,fold\n1,0\n2,0\n3,1\n4,-1\n")
    with pytest.raises(UserError, match="a group of images in two folds, such as image 2 in fold 0 and image 4 in f"):
        common.load_folds(tmp_path, train, 2)


@pytest.mark.parametrize("spelt", ["9999", "3.0", "'3"])
def test_a_changed_id_in_edited_folds_is_named_and_never_overwritten(tmp_path, spelt):
    train = SimpleNamespace(ids=[1, 2, 3], groups=["a", "b", "c"], pixels=[[3, 1], [4, 0], [5, 0]])
    text = f"image_id,group,fold\n1,a,0\n2,b,1\n{spelt},c,1\n"
    (tmp_path / "folds.csv").write_text(text)
    with pytest.raises(UserError, match=f"image {spelt} is not in DATA and image 3 not in this file: mend it, or"):
        common.load_folds(tmp_path, train, 2, renew=True)
    assert (tmp_path / "folds.csv").read_text() == text


# ---- without a main module ------------------------------------------------------------------------------------------


UNGUARDED = """import sys
sys.path.insert(0, {root!r})
import common
train, test = common.load_data({data!r}, {cache!r})
print(len(train.ids), "training images")
"""


@pytest.mark.parametrize("how", ["script without a guard", "standard input", "-c", "notebook"])
def test_data_is_loaded_from_anything_that_is_no_guarded_script(tiny_data, tmp_path, how):
    text = UNGUARDED.format(root=str(ROOT), data=str(tiny_data), cache=str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(text)
    cell = f"import code; code.InteractiveInterpreter().runsource({text!r}, '<cell>', 'exec')"
    argv = {"script without a guard": [tmp_path / "mine.py"], "standard input": ["-"], "-c": ["-c", text],
            "notebook": ["-c", cell]}[how]
    given = text if how == "standard input" else None
    done = subprocess.run([sys.executable, *argv], input=given, cwd=tmp_path, text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0 and done.stdout.count("14 training images") == 1, done.stdout + done.stderr


# ---- faults ---------------------------------------------------------------------------------------------------------


def image(**values):
    return lambda train, test, data: train["images"][0].update(values)


def annotation(**values):
    return lambda train, test, data: train["annotations"][0].update(values)


def shape(segmentation):
    return annotation(segmentation=segmentation)


def counts(value, size=(8, 8)):
    return shape({"size": list(size), "counts": value})


def photo(change, name="batch_01/0011.png"):
    return lambda train, test, data: change(data / name)


def category(**values):
    """Change the first category on both sides: they would differ otherwise."""
    return lambda train, test, data: [coco["categories"][0].update(values) for coco in (train, test)]


def starts_with(content):
    return photo(lambda path: path.write_bytes(content + bytes(1000)))


def cut_jpeg(train, test, data):
    train["images"][0]["file_name"] = "batch_01/0011.jpg"
    write_photo(data / "batch_01/0011.jpg", 8, 8, seed=11)
    (data / "batch_01/0011.jpg").write_bytes((data / "batch_01/0011.jpg").read_bytes()[:-10])


def photo_beside_data(train, test, data):
    train["images"][0]["file_name"] = "../out.png"
    write_photo(data.parent / "out.png", 8, 8, seed=11)


def photo_beside_a_linked_folder(train, test, data):
    (data.parent / "far/photos").mkdir(parents=True)
    (data / "batch_02").symlink_to(data.parent / "far/photos")
    train["images"][0]["file_name"] = "batch_02/../out.png"  # without the link it would be DATA/out.png
    write_photo(data.parent / "far/out.png", 8, 8, seed=11)


def absolute_name(train, test, data):
    train["images"][0]["file_name"] = str(data / "batch_01/0011.png")


def broken_link(train, test, data):
    (data / "batch_01/0011.png").unlink()
    (data / "batch_01/0011.png").symlink_to("nowhere.png")


def same_photo(name, category):
    """Return a change that lists the first photo once more, with an object of this category."""
    def change(train, test, data):
        train["images"].append({**train["images"][0], "id": 13, "file_name": name})
        train["annotations"].append({"id": 3, "image_id": 13, "category_id": category, "segmentation": TRIANGLE})
        if not (data / name).exists():
            shutil.copy(data / "batch_01/0011.png", data / name)
    return change


def two_channels(train, test, data):
    path = data / "batch_01/0011.tif"
    Image.new("LA", (8, 8)).save(path)
    path.write_bytes(path.read_bytes().replace(b"\x52\x01\x03\0", b"\x52\x81\x03\0"))  # no alpha any more
    train["images"][0]["file_name"] = "batch_01/0011.tif"


def photo_of_itself(train, test, data):
    (data / "batch_01/0011.png").unlink()
    (data / "batch_01/0011.png").symlink_to("0011.png")


def photo_as_pipe(train, test, data):
    (data / "batch_01/0011.png").unlink()
    os.mkfifo(data / "batch_01/0011.png")  # reading it would wait for ever


def photo_in_latin_1(train, test, data):
    train["images"][0]["file_name"] = "batch_01/\udce9.png"  # how Python spells a name that is not in UTF-8
    (data / "batch_01/0011.png").rename(data / "batch_01/\udce9.png")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(path, side=20_000):
    """Write a PNG of 50 kB that is 400 megapixels, 1.2 GB as RGB."""
    pixels = zlib.compress(bytes((1 + side // 8) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
showpage
%%EOF
"""


def many_categories(train, test, data):
    for coco in (train, test):
        coco["categories"] = [{"id": i, "name": f"c{i}"} for i in range(300)]
    train["annotations"][0]["category_id"] = 299


NAN, INFINITY = float("nan"), float("inf")
FOREIGN = "".join(chr(ord(c) + 64) for c in compressed(np.zeros((8, 8)))["counts"])  # right but for a bit of each byte
PHOTO, OBJECT = ("11", "0011.png"), ("annotation 1",)
# what is wrong: (change(train, test, data), what the message must say)
FAULTS = {
    "group NaN": (image(group=math.nan), ("image 11", "has the group nan, neither text nor a whole number nor null")),
    "group a list": (image(group=list(range(9))), ("image 11", "has the group [0, 1, 2, 3, 4, 5, ...]")),
    "photo missing": (photo(os.unlink), (*PHOTO, "missing")),
    "photo is a folder": (image(file_name="batch_01"), ("image 11 (batch_01) is no file",)),
    "photo under a photo": (image(file_name="batch_01/0012.png/a.png"), ("11", "0012.png/a.png")),
    "test photo missing": (photo(os.unlink, "batch_01/9000.png"), ("9000", "9000.png", "missing")),
    "photo empty": (photo(lambda path: path.write_bytes(b"")), PHOTO),
    "photo is text": (photo(lambda path: path.write_text("<html>404</html>")), PHOTO),
    "PNG cut off": (photo(lambda path: path.write_bytes(path.read_bytes()[:150])), PHOTO),
    "JPEG cut off": (cut_jpeg, ("11", "0011.jpg")),
    "test photo cut off": (photo(lambda path: path.write_bytes(path.read_bytes()[:150]), "batch_01/9000.png"),
                           ("9000", "9000.png")),
    "photo of another size": (image(height=9), (*PHOTO, "8x8", "8x9")),
    "photo too large": (image(height=20_000, width=20_000), (*PHOTO, "memory")),
    "photo of 400 megapixels": (photo(bomb), (*PHOTO, "400000000 pixels")),
    "photo is a program for a printer": (photo(lambda path: path.write_text(EPS)), (*PHOTO, "begins with '%!PS-Adobe")),
    "photo with fractions": (photo(lambda path: Image.new("F", (8, 8), 0.5).save(path, format="tiff")),
                             (*PHOTO, "fractions")),
    "photo linked to nothing": (broken_link, (*PHOTO, "is missing")),
    "photo in AVIF": (starts_with(b"\0\0\0\x1cftypavif"), (*PHOTO, "can't be read as JPEG, ", "'ftypavif")),
    "photo of two channels": (two_channels, ("image 11", "can't be read as JPEG, ", "'II*'", "of 8 bits")),
    "photo in HEIC": (starts_with(b"\0\0\0\x18ftypheic"), (*PHOTO, "'ftypheic", "make it a JPEG or PNG of 8 bits")),
    "photo is a web page": (photo(lambda path: path.write_text("<!DOCTYPE html>")), (*PHOTO, "'<!DOCTYPE html>'")),
    **{f"photo listed again as {name} with other objects": (
        same_photo(name, 1), (f"image 13 ({name}) is the same photo as image 11 (batch_01/0011.png)", "keep only one"))
       for name in ("batch_01/0011.png", "./batch_01//0011.png", "batch_01/copy.png")},
    "photo linked to itself": (photo_of_itself, PHOTO),
    "photo is a pipe": (photo_as_pipe, (*PHOTO, "no file")),
    "file name not in UTF-8": (photo_in_latin_1, ("image 11", r"\udce9.png", "impossible")),
    "file name with terminal codes": (image(file_name="\x1b[2J.png"), ("image 11", r"\x1b[2J.png", "impossible")),
    "file name is a folder above": (image(file_name=".."), ("image 11", "out of DATA")),
    "height over 16 bits": (image(height=70_000, width=1), (*PHOTO, "(70000, 1)")),
    "height with 4000 digits": (image(height=10 ** 4000), PHOTO),
    "height infinite": (image(height=INFINITY), (*PHOTO, "inf")),
    "height zero": (image(height=0), PHOTO),
    "width negative": (image(width=-8), PHOTO),
    "height fractional": (image(height=8.5), PHOTO),
    "width a string": (image(width="8"), PHOTO),
    "height absent": (image(height=None), PHOTO),
    "file name leads out": (photo_beside_data, ("11", "../out.png", "out of DATA")),
    "file name leads out by a link and ..": (photo_beside_a_linked_folder, ("image 11", "out of DATA")),
    "file name absolute, in DATA": (absolute_name, ("image 11", "out of DATA")),
    "file name absolute": (image(file_name="/etc/hostname"), ("11", "/etc/hostname", "out of DATA")),
    "file name absent": (image(file_name=None), ("image 11", "file_name")),
    "file name empty": (image(file_name=""), ("image 11", "file_name")),
    "file name a number": (image(file_name=3), ("image 11", "file_name")),
    "file name with NUL": (image(file_name="a\0b.png"), ("image 11",)),
    "file name no text": (image(file_name="\ud800.png"), ("image 11",)),
    "file name too long": (image(file_name="a" * 300 + ".png"), ("image 11",)),
    "image id twice": (lambda train, test, data: train["images"].append(train["images"][0]), PHOTO),
    "test image id twice": (lambda train, test, data: test["images"].append(test["images"][0]), ("9000",)),
    "image id a string": (image(id="11"), ("0011.png", "id")),
    "image id absent": (image(id=None), ("0011.png", "id")),
    "image not an object": (lambda train, test, data: train["images"].append(7), ("train.json", "images[2]")),
    "no images": (lambda train, test, data: train["images"].clear(), ("train.json", "no images")),
    "no test images": (lambda train, test, data: test["images"].clear(), ("test.json", "no images")),
    "no categories": (lambda train, test, data: [coco["categories"].clear() for coco in (train, test)],
                      ("train.json: no categories", "test.json: no categories")),
    "more classes than a byte holds": (many_categories, ("train.json", "300 categories")),
    "category not an object": (lambda train, test, data: train["categories"].append(7), ("categories[2]",)),
    "category id twice": (category(id=1), ("train.json: category 1 (Metal)", "another of the categories")),
    "category without name": (category(name=None), ("train.json: category 0 (None)", "no name")),
    "category name of spaces": (category(name=" \u200b\u3164"), ("train.json: category 0 (", "no name")),
    "category id a string": (category(id="0"), ("train.json: category '0' (Paper) has no whole number",)),
    "category of an annotation a string": (annotation(category_id="0"), (*OBJECT, "the unknown category '0'")),
    "image of an annotation a string": (annotation(image_id="11"), ("is of image '11', which is not in images",)),
    **{f"category name {ascii(name)}": (category(name=name), ("category 1 (Metal) has the name of category 0",))
       for name in ("Metal", "metal", " Metal ", "Me\u200btal", "Metal\ufe0f", "Metal\U000e0100", "\u202eMetal",
                    "\uff2detal", "Met al")},
    "category names alike in the first 100 characters": (
        lambda train, test, data: [c.update(name=100 * "a" + str(c["id"])) for c in train["categories"]],
        ("has the name of category 0", "first 100")),
    **{f"category named {ascii(name)}": (category(name=name), ("train.json: category 0 (", "is the background"))
       for name in ("Background", "background", "_background_", "Background ", "BACK-GROUND", "back\u200bground", "BG",
                    "__ignore__", "Void", "unlabeled")},
    "other categories in test": (lambda train, test, data: test["categories"].pop(), ("train.json", "test.json")),
    "other names in test": (lambda train, test, data: test["categories"][0].update(name="Papi\u00e9r"),
                            ("train.json and test.json have", "of id 0 the name is 'Paper' and 'Papi\\xe9r'")),
    "no annotations": (lambda train, test, data: train["annotations"].clear(), ("train.json", "no annotations")),
    "annotation not an object": (lambda train, test, data: train["annotations"].append([]),
                                 ("train.json", "annotations[2]")),
    "annotation id twice": (annotation(id=2), ("annotation 2",)),
    "annotation id absent": (annotation(id=None), ("annotation None", "id")),
    "annotation of unknown image": (annotation(image_id=999), (*OBJECT, "image 999")),
    "annotation of a test image": (annotation(image_id=9000), (*OBJECT, "image 9000")),
    "unknown category": (annotation(category_id=7), (*OBJECT, "category 7")),
    "category a list": (annotation(category_id=[0]), (*OBJECT, "category [0]")),
    "no segmentation": (shape(None), OBJECT),
    "segmentation empty": (shape([]), OBJECT),
    "segmentation a string": (shape("PPYo0"), OBJECT),
    "polygon not a list": (shape([1, 1, 6, 1, 6, 6]), OBJECT),
    "polygon of strings": (shape([["1", "1", "6", "1", "6", "6"]]), OBJECT),
    "polygon of two points": (shape([[1, 1, 6, 6]]), (*OBJECT, "three points")),
    "polygon with half a point": (shape([[1, 1, 6, 1, 6, 6, 2]]), OBJECT),
    "polygon of four numbers, a box to pycocotools": (shape([[1, 1, 6, 6], *TRIANGLE]), (*OBJECT, "three points")),
    "polygon with a long way": (shape([[0, 0, 80, 80] * 1000]), (*OBJECT, "outline")),
    "second part of two points": (shape([*TRIANGLE, [1, 1, 6, 6]]), (*OBJECT, "three points")),
    "polygon with NaN": (shape([[1, 1, NAN, 1, 6, 6]]), (*OBJECT, "NaN")),
    "polygon with infinity": (shape([[1, 1, INFINITY, 1, 6, 6]]), (*OBJECT, "infinite")),
    "polygon with minus infinity": (shape([[1, 1, 6, -INFINITY, 6, 6]]), (*OBJECT, "infinite")),
    "polygon far away": (shape([[1, 1, 1e9, 1, 6, 6]]), (*OBJECT, "large")),
    "polygon with 400 digits": (shape([[1, 1, -10 ** 400, 1, 6, 6]]), (*OBJECT, "large")),
    "RLE too short": (counts([10, 20]), (*OBJECT, "30", "64")),
    "RLE too long": (counts([10, 20, 35]), (*OBJECT, "65", "64")),
    "RLE of another size": (counts([64], size=(4, 16)), (*OBJECT, "[4, 16]", "[8, 8]")),
    "RLE without counts": (counts(None), OBJECT),
    "RLE with a negative run": (counts([70, -6]), OBJECT),
    "RLE with half a pixel": (counts([63.5, 0.5]), OBJECT),
    "compressed RLE too short": (counts("4"), (*OBJECT, "4", "64")),
    "compressed RLE damaged": (counts("4 4"), (*OBJECT, "damaged")),
    "compressed RLE in foreign letters": (counts(FOREIGN), (*OBJECT, "damaged")),
    "compressed RLE cut off": (counts("PP"), (*OBJECT, "cut off")),
    "compressed RLE of endless digits": (counts("o" * 50), (*OBJECT, "damaged")),
}


def with_faults(data, *changes):
    train, test = (json.loads((data / name).read_text()) for name in ("train.json", "test.json"))
    for change in changes:
        change(train, test, data)
    (data / "train.json").write_text(json.dumps(train))
    (data / "test.json").write_text(json.dumps(test))
    return data


def test_faultless_data_is_accepted(data, load):
    train, test = load(data)
    assert (len(train.ids), len(test.ids)) == (2, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(data, load, fault):
    change, words = FAULTS[fault]
    text = refusal(load, with_faults(data, change))
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("names", [
    ("Paper", "Paper pack"), ("C", "C++"), ("a1", "a2"), ("Back", "Ground"), ("Unlabeled litter", "Voids"),
    ("Background 1", "Background 2")])
def test_names_that_differ_are_no_fault(data, load, names):
    def rename(train, test, data):
        for category in [*train["categories"], *test["categories"]]:
            category["name"] = names[category["id"]]
    assert load(with_faults(data, rename))[0].classes[1:] == list(names)


@pytest.mark.parametrize("linked", ["batch_01", "batch_01/0011.png", "train.json"])
def test_what_lies_in_data_may_be_a_link_to_anywhere(data, load, linked):
    photo = common.read_image(data / "batch_01/0011.png", 8, 8)
    (data / linked).rename(data.parent / "elsewhere")
    (data / linked).symlink_to(data.parent / "elsewhere")
    assert np.array_equal(load(data)[0].image(0), photo)


@pytest.mark.parametrize("spelt", [
    r"batch_01\\a bé.png", "batch_01/a%20bé.png", "batch_01/A Bé.PNG", "Batch_01/a bé.png",
    "batch_01/a bé.png", "./BATCH_01%2Fa%20bé.png", "batch_01/a bé.png "])
def test_a_photo_that_is_there_under_another_spelling_is_named(data, load, spelt):
    (data / "batch_01/0011.png").rename(data / "batch_01/a bé.png")
    text = refusal(load, with_faults(data, image(file_name=spelt)))
    assert f"image 11 ({spelt}) is missing; there is batch_01/a bé.png: write both names alike" in text
    names = [path.name for path in (data / "batch_01").iterdir()]
    (data / "batch_01/a bé.png").rename(data / "batch_01/other.png")
    assert len(names) == 3 and "there is" not in refusal(load, data)


def test_a_link_to_nothing_is_no_other_spelling_of_its_own_name(data, load):
    (data / "batch_01/0011.png").unlink()
    (data / "batch_01/0011.png").symlink_to("nowhere")
    assert "image 11 (batch_01/0011.png) is missing\n" in refusal(load, data)


@pytest.mark.parametrize("name", ["batch_01/0011.png", "batch_01/copy.png"])
def test_one_photo_twice_with_one_mask_is_no_fault(data, load, name):
    train = load(with_faults(data, same_photo(name, 0)))[0]
    assert train.ids == [11, 12, 13] and train.groups[0] == train.groups[2] != train.groups[1]


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_photo_with_the_pixels_of_another_in_other_bytes_is_the_same(data, load, ending):
    photo, twin = (data / f"batch_01/{name}.{ending}" for name in ("0011", "copy"))
    write_photo(photo, 8, 8, 0)
    if ending == "png":  # saved again, with less effort
        Image.open(photo).save(twin, compress_level=0)
    else:  # with a comment
        twin.write_bytes(photo.read_bytes()[:2] + b"\xff\xfe\0\x05abc" + photo.read_bytes()[2:])
    assert photo.read_bytes() != twin.read_bytes()
    edit(data / "train.json", lambda coco: coco["images"][0].update(file_name=f"batch_01/0011.{ending}"))
    unlike = with_faults(data, same_photo(f"batch_01/copy.{ending}", 1))
    assert f"image 13 (batch_01/copy.{ending}) is the same photo as image 11" in refusal(load, unlike)
    edit(data / "train.json", lambda coco: coco["annotations"][2].update(category_id=0))
    groups = load(data)[0].groups
    assert groups[0] == groups[2] != groups[1]


def test_the_check_names_test_photos_that_are_training_photos(data, load, capsys):
    shutil.copy(data / "batch_01/0011.png", data / "batch_01/9000.png")
    edit(data / "test.json", lambda coco: coco["images"][0].update(width=8, height=8))
    train.warn_of_photos(*load(data))
    assert capsys.readouterr().out == "warning: 1 photo(s) of the test are training photos too: batch_01/9000.png\n"


def test_roboflows_versions_of_a_photo_are_a_group(tmp_path, load):
    names = [f"images/{name}_jpg.rf.{version}.png" for name in "ab" for version in ("0f3a", "77c1")]
    data = write_coco(tmp_path / "data", [(i, 8, 8) for i in range(5)], [(i, 0, TRIANGLE) for i in range(5)])
    (data / "images").mkdir()
    for i, name in enumerate(names):
        (data / f"batch_01/{i:04}.png").rename(data / name)
        edit(data / "train.json", lambda coco, i=i, name=name: coco["images"][i].update(file_name=name))
    edit(data / "train.json", lambda coco: coco["images"][3].update(group="mine"))
    groups = load(data)[0].groups
    assert groups[0] == groups[1] and len(set(groups)) == 4


def test_two_test_images_of_one_file_are_no_fault(three, load):
    edit(three / "test.json", lambda coco: coco["images"][1].update(coco["images"][0], id=71))
    assert load(three)[1].file_names[:2] == ["batch_01/0070.png"] * 2


def floats(value):
    """Return a parsed JSON with all whole numbers as floats."""
    if isinstance(value, dict):
        return {key: floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [floats(inner) for inner in value]
    return float(value) if type(value) is int else value


def test_whole_numbers_may_be_written_as_floats(sound, tmp_path, load):
    folder = shutil.copytree(sound[0], tmp_path / "data")
    as_written = load(folder)
    for name in ("train.json", "test.json"):
        (folder / name).write_text(json.dumps(floats(json.loads((folder / name).read_text()))))
    assert '"height": 8.0' in (folder / "train.json").read_text()
    for before, after in zip(as_written, load(folder), strict=True):
        assert all(repr(getattr(after, key)) == repr(getattr(before, key))
                   for key in ("ids", "sizes", "classes", "groups", "pixels", "objects", "odd", "faults"))
    assert np.array_equal(as_written[0].masks, load(folder)[0].masks)


def test_a_float_too_large_to_be_exact_is_no_id(data, load):
    assert "image 9007199254740992.0 (" in refusal(load, with_faults(data, image(id=2.0 ** 53)))


def test_old_opencv_is_no_fault_of_the_photo(data, load, monkeypatch):
    write_photo(data / "batch_01/0011.jpg", 8, 8, seed=11)
    train = load(with_faults(data, image(file_name="batch_01/0011.jpg")))[0]
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB")
    with pytest.raises(UserError, match=r"OpenCV .* is too old"):
        train.image(0)


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "{}", '{"images": [], "categories": {}}', "\udcff"])
@pytest.mark.parametrize("name", ["train.json", "test.json"])
def test_what_is_no_coco_file_is_refused_by_name(data, load, name, content):
    (data / name).write_bytes(content.encode(errors="surrogateescape"))
    assert name in refusal(load, data)


@pytest.mark.parametrize("name", ["train.json", "test.json"])
def test_absent_json_is_named(data, load, name):
    (data / name).unlink()
    assert str(data / name) in refusal(load, data)


def test_absent_folder_is_named(tmp_path, load):
    assert f"{tmp_path / 'nowhere'}: no such folder" in refusal(load, tmp_path / "nowhere")


def test_all_faults_are_listed_at_once(tmp_path, load):
    data = write_coco(
        tmp_path / "data", [{"id": i} for i in (1, 2, 3, 4, 5, 6, 7, 7)] + [{"id": 8, "file_name": "/etc/hostname"}],
        [(6, 0, TRIANGLE), (6, 0, [[1, 1, NAN, 1, 6, 6]]), (6, 5, TRIANGLE), (99, 0, TRIANGLE),
         (6, 0, {"size": [8, 8], "counts": [9]})], photos=False)
    for number in (2, 3, 4, 5, 6, 7, 9000):
        write_photo(data / f"batch_01/{number:04}.png", 8, 8 + (number == 4), seed=number)
    (data / "batch_01/0002.png").write_bytes(b"")
    (data / "batch_01/0003.png").write_bytes((data / "batch_01/0003.png").read_bytes()[:150])
    (data / "batch_01/9000.png").write_text("no photo")
    text = refusal(load, data)
    expected = [f"image {i} (" for i in (1, 2, 3, 4, 7, 8, 9000)] + [f"annotation {i} " for i in (2, 3, 4, 5)]
    sound = ["image 5 (", "annotation 1 "]
    assert [words for words in expected if words not in text] == []
    assert [words for words in sound if words in text] == []


def test_a_missing_photo_hides_no_fault_of_its_objects(data, load):
    text = refusal(load, with_faults(data, photo(os.unlink), shape([[1, 1, NAN, 1, 6, 6]])))
    assert "missing" in text
    assert "annotation 1" in text


def test_no_fault_hides_that_train_and_test_differ_in_categories(data, load):
    text = refusal(load, with_faults(data, photo(os.unlink), lambda train, test, data: test["categories"].pop()))
    assert "missing" in text
    assert "categories" in text


def test_refused_data_leaves_no_cache_behind(data, tmp_path, load):
    good = (data / "batch_01/0011.png").read_bytes()
    (data / "batch_01/0011.png").write_bytes(good[:150])
    for _ in range(2):
        assert "0011.png" in refusal(load, data)
    (data / "batch_01/0011.png").write_bytes(good)
    assert load(data)[0].ids == [11, 12]


# ---- the cache of masks ---------------------------------------------------------------------------------------------


def test_loading_writes_nothing_into_the_data(data, load):
    before = snapshot(data)
    load(data)
    assert snapshot(data) == before


def test_cached_photos_are_the_photos_until_one_changes(data, tmp_path, load):
    images = [load(data)[0].image(i) for i in range(2)]
    train, test = common.load_data(data, tmp_path / "cache", decoded=True)
    for split in (train, load(data)[0]):  # who doesn't ask for them takes them too
        assert split.photos.size == 3 * (8 * 8 + 6 * 10)
        assert all(np.array_equal(split.image(i), image) for i, image in enumerate(images))
    assert test.photos is None
    write_photo(data / train.file_names[1], 6, 10, seed=99)
    changed = np.random.default_rng(99).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    for decoded in (False, True):
        train, _ = common.load_data(data, tmp_path / "cache", decoded=decoded)
        assert (train.photos is not None) == decoded
        assert np.array_equal(train.image(0), images[0]) and np.array_equal(train.image(1), changed)


def test_photos_that_another_start_has_decoded_meanwhile_are_not_decoded_again(data, tmp_path, load, monkeypatch):
    load(data)
    reads, read, lock = [], common.read_image, common.lock

    def late_lock(*args, **options):
        monkeypatch.setattr(common, "lock", lock)
        common.load_data(data, tmp_path / "cache", decoded=True)
        return lock(*args, **options)
    monkeypatch.setattr(common, "read_image", lambda path, *size: reads.append(path) or read(path, *size))
    monkeypatch.setattr(common, "lock", late_lock)
    assert common.load_data(data, tmp_path / "cache", decoded=True)[0].photos is not None and len(reads) == 2


def test_a_photo_that_changes_while_photos_are_decoded_is_one_line(data, tmp_path, load, monkeypatch):
    name, read = load(data)[0].file_names[0], common.read_image
    monkeypatch.setattr(common, "read_image", lambda path, *size: (
        write_photo(data / name, 8, 8, seed=99), read(path, *size))[1])
    with pytest.raises(UserError, match="changed while they were read: run it again"):
        common.load_data(data, tmp_path / "cache", decoded=True)


def test_a_photo_that_breaks_while_photos_are_decoded_is_named_in_one_line(data, tmp_path, load, capsys):
    photo = data / load(data)[0].file_names[0]
    whole, split = photo.read_bytes(), load(data)[0]
    photo.write_bytes(whole[:40])

    def read():
        return split.image(0)

    def read_while_writing():
        with common.atomic_write(tmp_path / "photos.npy") as scratch:
            scratch.write_bytes(split.image(0))
    for function in (read, read_while_writing):
        assert re.fullmatch("image 11 .* has changed: .*; run the same again", error_line(function, capsys))


def test_second_load_reads_the_cache(data, tmp_path, load):
    first, _ = load(data)
    before = snapshot(tmp_path)
    second, _ = load(data)
    assert snapshot(tmp_path) == before
    assert np.array_equal(first.masks, second.masks)
    assert (first.pixels, first.groups, first.sizes, first.fingerprint) == (
        second.pixels, second.groups, second.sizes, second.fingerprint)


def test_changed_json_is_noticed(data, load):
    first, _ = load(data)
    edit(data / "train.json", lambda train: train["annotations"][0].update(category_id=1))
    second, _ = load(data)
    assert (first.mask(0).max(), second.mask(0).max()) == (1, 2)
    assert first.fingerprint != second.fingerprint
    edit(data / "test.json", lambda test: test["images"][0].update(id=9001))
    assert load(data)[1].ids == [9001]


def test_changed_paint_order_is_noticed(data, load):
    edit(data / "train.json", lambda train: train["annotations"].append(
        {"id": 3, "image_id": 11, "category_id": 1, "segmentation": [[0, 0, 8, 0, 8, 8, 0, 8]]}))
    splits = {paint: load(data, paint)[0] for paint in ("area", "order", "area")}
    assert (splits["area"].mask(0).min(), splits["order"].mask(0).min()) == (1, 2)
    assert splits["area"].fingerprint != splits["order"].fingerprint


def set_time(path, seconds):
    """Set the time of a file, as file times are too coarse for tests this quick."""
    os.utime(path, (seconds, seconds))


def test_changed_photo_is_noticed(tmp_path, load):
    data = write_coco(tmp_path / "data", [(11, 8, 8), (12, 8, 8)], [(11, 0, TRIANGLE), (12, 0, TRIANGLE)])
    path = data / "batch_01/0011.png"
    set_time(path, 1000)
    assert len(set(load(data)[0].groups)) == 2
    shutil.copy(data / "batch_01/0012.png", path)
    set_time(path, 1001)
    assert len(set(load(data)[0].groups)) == 1
    path.write_bytes(path.read_bytes()[:150])
    set_time(path, 1001)
    assert "0011.png" in refusal(load, data)
    path.unlink()
    assert "0011.png" in refusal(load, data)


def test_another_folder_with_the_same_json_is_checked_by_itself(data, tmp_path, load):
    load(data)
    shutil.copytree(data, tmp_path / "copy")
    write_photo(tmp_path / "copy/batch_01/0011.png", 8, 8, seed=77)
    image = load(tmp_path / "copy")[0].image(0)
    assert np.array_equal(image, np.random.default_rng(77).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(load(data)[0].image(0), np.random.default_rng(11).integers(0, 256, (8, 8, 3), dtype=np.uint8))


KILLED_BEFORE_INDEX = """import os, signal, sys, common
common.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
common.load_data(sys.argv[1], sys.argv[2])"""


def test_cache_whose_building_was_killed_is_built_again(data, tmp_path, load):
    with start_python(KILLED_BEFORE_INDEX, data, tmp_path / "cache") as killed:
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    masks, = (tmp_path / "cache").rglob("masks.npy")
    masks.write_bytes(b"torn")
    masks.with_name(".masks.npy.01234567.tmp").write_bytes(b"torn")
    train, _ = load(data)
    assert [int(train.mask(i).max()) for i in range(2)] == [1, 2] and not list(tmp_path.rglob("*.tmp"))


def test_the_processes_that_check_photos_end_when_the_one_that_started_them_is_killed():
    code = """import common
common.check_photos(["import time; print('begun', flush=True); time.sleep(60)"] * 16, exec, None)"""
    with start_python(code) as killed:
        assert killed.stdout.readline() == "begun\n"
        killed.kill()
        killed.communicate(timeout=20)  # stdout ends when the last process that has it does


def test_a_check_with_processes_that_are_stopped_ends_when_it_is_interrupted():
    code = """import common
stop = "import os, signal; print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
common.run_script(lambda _: common.check_photos([stop] * 16, exec, None), None)"""
    with start_python(code) as checking:
        assert checking.stdout.readline().strip().isdigit()
        checking.send_signal(signal.SIGTERM)
        checking.communicate(timeout=20)
    assert checking.returncode == 143


def test_a_check_that_fails_ends_no_process_but_its_own():
    code = """import multiprocessing, time, common
own = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
own.start()
try:
    common.check_photos(["1 / 0"] * 4, exec, None)
except ZeroDivisionError:
    print(own.is_alive())
own.kill()"""
    with start_python(code) as checking:
        assert checking.communicate(timeout=30)[0] == "True\n"


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


CACHE_DAMAGE = {
    "a bit of the masks": lambda folder: flip_bit(folder / "masks.npy"),
    "a bit of the photos": lambda folder: flip_bit(folder / "photos.npy"),
    "the masks cut": lambda folder: os.truncate(folder / "masks.npy", 60),
    "class names swapped": lambda folder: (folder / "index.json").write_text(
        (folder / "index.json").read_text().replace("Paper", "?").replace("Metal", "Paper").replace("?", "Metal")),
    **{f"{name} {text}": lambda folder, name=name, text=text: (folder / name).write_text(text)
       for name in ("index.json", "checksums.json") for text in ("[]", "{}", "", "[" * 9999, '{"index.json": []}')},
    "no checksums": lambda folder: (folder / "checksums.json").unlink()}


@pytest.mark.parametrize("damage", CACHE_DAMAGE)
def test_a_damaged_cache_is_made_anew(data, tmp_path, load, damage):
    load(data)
    before, _ = common.load_data(data, tmp_path / "cache", decoded=True)
    masks, photos = np.array(before.masks), np.array(before.photos)
    CACHE_DAMAGE[damage](next((tmp_path / "cache").rglob("index.json")).parent)
    for _ in range(2):
        after, _ = common.load_data(data, tmp_path / "cache", decoded=True)
        assert after.classes == before.classes == ["Background", "Paper", "Metal"] and after.sizes == before.sizes
        assert np.array_equal(after.masks, masks) and np.array_equal(after.photos, photos)


def test_the_masks_are_read_for_their_checksum_only_when_they_have_changed(data, load, monkeypatch):
    load(data)
    monkeypatch.setattr(common, "file_hash", lambda path: pytest.fail(f"{path} was read"))
    load(data)


# ---- test photos that can't be read ---------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Write data with the test photos 70, 71 and 72."""
    return write_coco(tmp_path / "data", [(11, 8, 8), (12, 8, 8)], [(11, 0, TRIANGLE)],
                      test_images=[(70, 8, 8), (71, 8, 8), (72, 8, 8)])


BROKEN = {
    "missing": (os.unlink, "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "can't be read as JPEG"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:150]), "truncated"),
    "of another size": (lambda path: write_photo(path, 8, 9, 0), "is 9x8, the JSON says 8x8"),
    "a bomb": (bomb, "400000000 pixels")}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_test_photo_that_cannot_be_read_is_background_with_a_warning_until_it_is_mended(three, load, capsys, fault):
    change, words = BROKEN[fault]
    sound, path = load(three)[1], three / "batch_01/0071.png"
    content = path.read_bytes()
    change(path)
    for _ in range(2):  # checked, and from the cache
        train, test = load(three)
        line, = capsys.readouterr().out.splitlines()
        assert line.startswith("warning: test.json: image 71 (batch_01/0071.png) ") and words in line
        assert [bool(fault) for fault in test.faults] == [False, True, False] and not any(train.faults)
    assert not common.EvalPhotos(test, [1], 32)[0][0].any() and common.EvalPhotos(test, [2], 32)[0][0].any()
    assert test.fingerprint != sound.fingerprint
    path.write_bytes(content)
    mended = load(three)[1]
    assert (mended.fingerprint, mended.faults, capsys.readouterr().out) == (sound.fingerprint, [None] * 3, "")


def test_check_tells_how_many_test_photos_cannot_be_read(three, tmp_path, capsys):
    (three / "batch_01/0070.png").unlink()
    (three / "batch_01/0072.png").write_text("no photo")
    train.main(train.parse_args(["--check", "--data", str(three), "--exp", str(tmp_path / "exp"), "--folds", "2",
                                 "--cache", str(tmp_path / "cache")]))
    lines = capsys.readouterr().out.splitlines()
    assert "image 70 (batch_01/0070.png) is missing" in lines[0] and "image 72 (" in lines[1]
    assert "2 test photo(s) can't be read" in lines[2] and "no faults" not in lines[2]


def test_check_names_a_category_that_nothing_has(data, tmp_path, capsys):
    for name in ("train.json", "test.json"):
        edit(data / name, lambda coco: coco["categories"].append({"id": 7, "name": "trash", "supercategory": "none"}))
    train.main(train.parse_args(["--check", "--data", str(data), "--exp", str(tmp_path / "exp"), "--folds", "2",
                                 "--cache", str(tmp_path / "cache")]))
    lines = capsys.readouterr().out.splitlines()
    warned = [before for before, line in pairwise(lines) if "no training image has it" in line]
    assert [line.split()[:2] for line in warned] == [["3", "trash"]]


def test_faults_of_test_photos_are_listed_with_the_others_and_stop_all_when_no_photo_is_left(three, load):
    for name in ("0011", "0071"):
        (three / f"batch_01/{name}.png").write_bytes(b"")
    text = refusal(load, three)
    assert "image 11 (" in text and "image 71 (" in text and "2 fault(s)" in text
    write_photo(three / "batch_01/0011.png", 8, 8, seed=11)
    for name in ("0070", "0072"):
        (three / f"batch_01/{name}.png").unlink()
    assert all(f"image {i} (" in refusal(load, three) for i in (70, 71, 72))


def test_a_photo_that_breaks_after_the_check_is_named_in_one_line(three, load, capsys):
    sets = load(three)
    for split, name in zip(sets, ("0011", "0070"), strict=True):
        (three / f"batch_01/{name}.png").write_bytes(b"")
        line = error_line(lambda split=split: split.image(0), capsys)
        start = f"image {int(name)} (batch_01/{name}.png) has changed: can't be read as JPEG, "
        assert line.startswith(start) and line.endswith("; run the same again")


# ---- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_photos_content_and_not_of_their_times(three, load):
    first = load(three)
    for name in ("0011", "0070"):
        set_time(three / f"batch_01/{name}.png", 1000)
    assert [s.fingerprint for s in load(three)] == [s.fingerprint for s in first]
    write_photo(three / "batch_01/0070.png", 8, 8, seed=999)
    train, test = load(three)
    assert train.fingerprint == first[0].fingerprint and test.fingerprint != first[1].fingerprint
    write_photo(three / "batch_01/0012.png", 8, 8, seed=998)
    assert load(three)[0].fingerprint != train.fingerprint


# ---- what is let in, and what is said about it ----------------------------------------------------------------------


def test_odd_polygons_are_clipped_and_noted_by_their_annotations(tmp_path, load, capsys):
    shapes = [TRIANGLE, [[0, 0, 8, 0, 8, 8, 0, 8]], [[-3, 2, 6, 2, 6, 20]], [[1, 1, 3, 3, 5, 5]],
              [[20, 20, 30, 20, 30, 30]], [TRIANGLE[0], [2, 2, 2, 2, 2, 2]], rle(np.eye(8, dtype=bool))]
    data = write_coco(tmp_path / "data", [(i, 8, 8) for i in range(len(shapes))],
                      [(i, 0, shape) for i, shape in enumerate(shapes)])
    split, _ = load(data)
    assert split.odd == [[], [], [3], [4], [5], [6], []]
    assert not split.mask(4).any() and split.mask(2).any()
    train.main(train.parse_args(["--check", "--data", str(data), "--exp", str(tmp_path / "exp"), "--folds", "2",
                                 "--cache", str(tmp_path / "cache")]))
    out = capsys.readouterr().out
    assert "warning: 4 annotation(s) have a polygon that leaves the photo" in out and ": 3, 4, 5, 6\n" in out


def test_a_crowd_is_painted_like_other_objects(data, load):
    crowd = np.arange(64).reshape(8, 8) % 3 == 0
    edit(data / "train.json", lambda coco: coco["annotations"][0].update(iscrowd=1, segmentation=rle(crowd)))
    assert np.array_equal(load(data)[0].mask(0) > 0, crowd)


def test_a_byte_order_mark_is_let_in_and_of_a_key_given_twice_the_last_counts(data, load):
    text = (data / "train.json").read_text().replace('"id": 12', '"id": 99, "id": 12')
    (data / "train.json").write_text("\ufeff" + text, encoding="utf-8")
    assert load(data)[0].ids == [11, 12]


NASTY = 'a\x1b[31m\r\n\t\u202e\ud800\x9b "b", <b>../../c</b>'
SHOWN = r'a\x1b[31m\r\n\t\u202e\ud800\x9b "b", <b>../../c</b>'


def test_names_from_the_data_obey_nothing_in_a_terminal_a_table_or_a_picture(data, load, tmp_path, capsys):
    for name in ("train.json", "test.json"):
        edit(data / name, lambda coco: coco["categories"][0].update(name=NASTY))
    edit(data / "train.json", lambda coco: coco["images"][0].update(group=NASTY))
    before = snapshot(tmp_path)
    split, _ = load(data)
    assert split.classes == ["Background", SHOWN, "Metal"]
    train.main(train.parse_args(["--check", "--data", str(data), "--exp", str(tmp_path / "exp"), "--folds", "2",
                                 "--cache", str(tmp_path / "cache")]))
    out = capsys.readouterr().out
    assert SHOWN in out and out.replace("\n", "").isprintable()
    common.write_csv(tmp_path / "a.csv", [{f"iou {name}": 0 for name in split.classes}])
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2
    assert f"iou {SHOWN}" in read_csv(tmp_path / "a.csv", ())[0]
    common.write_sheet(tmp_path / "s.png", [[("a", np.zeros((8, 400, 3), np.uint8))]], dict(enumerate(split.classes)))
    assert Image.open(tmp_path / "s.png").height == 8 + 4 * 18  # a line for the caption and for each class
    new = {str(p.relative_to(tmp_path)).split("/")[0] for p in map(Path, snapshot(tmp_path).keys() - before.keys())}
    assert new == {"cache", "exp", "a.csv", "s.png"}  # no name has become a path


@given(st.text(st.characters(), max_size=40))
def test_a_cleaned_text_is_one_line_in_any_encoding_without_controls(text):
    cleaned = common.clean(text)
    assert cleaned.encode().decode() == cleaned and len(cleaned.splitlines()) <= 1
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in cleaned)
    assert common.clean(cleaned) == cleaned and (cleaned == text or "\\" in cleaned)


def test_a_thousand_faults_end_the_list(data, load):
    edit(data / "train.json", lambda coco: coco["annotations"].extend([{}] * 100_000))
    assert refusal(load, data).count("\n") < common.MAX_FAULTS + 5


HUGE = {"nested lists": ("[", "["), "short lists": ("[[]", ",[]"), "objects": ("[{}", ",{}"), "no end": (" ", " "),
        "images": ('{"images":[{"id":0}', ',{"id":0}'), "annotations": ('{"annotations":[[]', ",[]")}


def read_huge(path, start, part, size, memory):
    """Read a file of `size` bytes with `memory` bytes of memory; return (exit code, what is printed)."""
    with open(path, "w") as f:
        f.write(start)
        for _ in range(size // 2 ** 20):
            f.write(part * (2 ** 20 // len(part)))
    code = ("import resource, sys, common\n"
            "resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)\n"
            "from pathlib import Path\n"
            "try:\n"
            "    print(len(common.read_coco(Path(sys.argv[1]), None, True)[-1]))\n"
            "except common.UserError as e:\n"
            "    sys.exit(str(e))")
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code, path, str(memory)], cwd=ROOT, text=True,
                          capture_output=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_json_is_refused_in_bounded_memory(tmp_path, kind):
    size = 4 * 2 ** 20
    code, text = read_huge(tmp_path / "a.json", *HUGE[kind], size, size * 40 + 2 ** 30)
    assert code in (0, 1) and text.count("\n") == 1 and "Traceback" not in text


def test_a_json_that_parsed_would_not_fit_in_the_memory_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps([[]] * 1000))
    assert len(common.read_json(tmp_path / "a.json")) == 1000
    monkeypatch.setattr(common.os, "sysconf", {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.get)
    with pytest.raises(UserError, match="a.json: 4000 bytes of JSON are too many for 40960 bytes of memory"):
        common.read_json(tmp_path / "a.json")


@pytest.mark.slow
@pytest.mark.parametrize("kind", HUGE)
def test_a_json_of_a_gigabyte_is_refused_in_8_gb(tmp_path, kind):
    code, text = read_huge(tmp_path / "a.json", *HUGE[kind], 2 ** 30, 2 ** 33)
    assert code == 1 and text.count("\n") == 1 and "a.json: " in text


# ---- fuzz -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Write faultless data with every kind of segmentation; return (folder, {name: content to put back})."""
    block = np.zeros((8, 8), bool)
    block[2:5, 1:7] = True
    data = write_coco(tmp_path_factory.mktemp("fuzz") / "data", [{"id": 11, "group": "a"}, (12, 6, 10)], [
        (11, 0, TRIANGLE), (11, 1, rle(block)), (11, 1, compressed(block)), (12, 1, [[-1, 0, 4, 0, 4, 4], *TRIANGLE])])
    return data, {name: (data / name).read_bytes() for name in (
        "train.json", "test.json", "batch_01/0011.png", "batch_01/9000.png")}


DEEP = "so many lists in one another"
values = st.one_of(
    json_values, st.sampled_from([
        NAN, INFINITY, -INFINITY, 1e308, 10 ** 400, -1, 0, True, 2 ** 31, 2 ** 63, 2 ** 64, "", "\0", "..", "/", NASTY,
        "batch_01/0012.png", "a" * 5000, DEEP, DEEP]),
    st.lists(st.lists(st.floats(-100, 100), min_size=4, max_size=12), max_size=3))


def places(value):
    """Yield (container, key) of everything inside a parsed JSON."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


@st.composite
def changed_json(draw, content):
    """Draw the bytes of a JSON file with one to four of its values replaced, removed, doubled or put elsewhere."""
    coco = json.loads(content)
    for _ in range(draw(st.integers(1, 4))):
        every = list(places(coco)) or [*places({"images": coco})]
        container, key = every[draw(st.integers(0, len(every) - 1))]
        how = draw(st.integers(0, 3))
        if how == 1:
            del container[key]
        elif how == 2 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = draw(values) if how else copy.deepcopy(draw(st.sampled_from([c[k] for c, k in every])))
    depth = draw(st.integers(1, 1000))
    return json.dumps(coco).replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode()


@st.composite
def changed_bytes(draw, content):
    """Draw the content with some bytes replaced, cut out, doubled or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 20)))
        new = draw(st.one_of(st.binary(max_size=4), st.just(content[start:end] * 2), st.sampled_from([
            b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 2000, b"\\ud800", b"\xef\xbb\xbf", b"\x00", b'"'])))
        content = content[:start] + new + content[end if draw(st.booleans()) else start:]
    return content[:draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


def fuzz(sound, cache, choices):
    """Load changed data: it is either let in and can be read, or refused in clean lines; no crash, no hang."""
    data, contents = sound
    name = choices.draw(st.sampled_from(list(contents)))
    change = changed_json if name.endswith("json") and choices.draw(st.booleans()) else changed_bytes
    (data / name).write_bytes(choices.draw(change(contents[name])))
    signal.alarm(60)  # kills the process, as a crash does: pytest shows where
    try:
        split, test = common.load_data(data, cache)
        images = [split.image(i) for i in range(len(split.ids))]
        assert [image.shape[:2] for image in images] == [split.mask(i).shape for i in range(len(images))]
        assert split.masks.max(initial=0) < len(split.classes)
        seen = [common.EvalPhotos(test, [i], 32)[0][0].any() for i in range(len(test.ids))]
        assert [bool(fault) for fault in test.faults] == [not some for some in seen]
    except UserError as refused:
        lines = str(refused).split("\n")
        assert not any(common.UNSAFE.search(line) for line in lines)
        assert all(line and len(line) < 1000 for line in lines)
    finally:
        signal.alarm(0)
        for changed, content in contents.items():
            (data / changed).write_bytes(content)


@pytest.fixture(scope="module")
def fuzz_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(1))
        patch.setattr(os, "fsync", lambda f: None)
        yield tmp_path_factory.mktemp("fuzzed")


@settings(max_examples=200)
@given(st.data())
def test_changed_data_is_read_or_refused(sound, fuzz_cache, choices):
    fuzz(sound, fuzz_cache, choices)


@pytest.mark.slow
@settings(max_examples=5000)
@given(st.data())
def test_data_changed_in_thousands_of_ways_is_read_or_refused(sound, fuzz_cache, choices):
    fuzz(sound, fuzz_cache, choices)


# ---- drawn data -----------------------------------------------------------------------------------------------------


def test_drawn_data_has_every_class_in_two_photos_and_every_kind_of_segmentation(tiny_data):
    coco = json.loads((tiny_data / "train.json").read_text())
    images_of = {c["id"]: {a["image_id"] for a in coco["annotations"] if a["category_id"] == c["id"]}
                 for c in coco["categories"]}
    assert [c["name"] for c in coco["categories"]] == list(CLASSES)
    assert min(map(len, images_of.values())) >= 2
    per_photo = [sum(a["image_id"] == i["id"] for a in coco["annotations"]) for i in coco["images"]]
    assert min(per_photo) >= 1
    assert max(per_photo) <= 6
    segmentations = [a["segmentation"] for a in coco["annotations"]]
    assert {type(s["counts"]) if isinstance(s, dict) else len(s) for s in segmentations} == {list, str, 1, 2}
    assert {"group" in i for i in coco["images"]} == {True, False}


def test_drawn_area_is_that_of_the_shape(tiny_data):
    for drawn in json.loads((tiny_data / "train.json").read_text())["annotations"]:
        assert drawn["area"] == object_mask(drawn["segmentation"], 64, 64).sum()


def test_same_options_draw_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_data(tmp_path / name, train=4, test=2, size=64, seed=seed)
    digests = [[hashlib.sha256(p.read_bytes()).digest() for p in sorted((tmp_path / n).rglob("*")) if p.is_file()]
               for n in "abc"]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 9
    assert sum(a != c for a, c in zip(digests[0], digests[2], strict=True)) == 8  # all but the header of the CSV


def test_drawing_again_does_nothing_and_other_options_draw_anew(tmp_path):
    draw_data(tmp_path, train=4, test=2, size=64)
    before = snapshot(tmp_path)
    draw_data(tmp_path, train=4, test=2, size=64)
    assert snapshot(tmp_path) == before
    draw_data(tmp_path, train=3, test=2, size=64)
    assert len(json.loads((tmp_path / "train.json").read_text())["images"]) == 3


def test_data_of_others_is_never_drawn_over(data):
    before = snapshot(data)
    with pytest.raises(SystemExit, match=r"train\.json"):
        draw_data(data, train=2, test=1, size=64)
    assert snapshot(data) == before
