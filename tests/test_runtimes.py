"""Test train.py --runtimes: what a row holds, what it is made of, and what becomes of the table and its picture."""
import csv
import os
import shlex
import subprocess
import sys
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import train
from common import UserError, build_model

MODEL, SCALE, IMPOSSIBLE = "unet/tu-mobilenetv3_small_050", 64, "dpt/resnet18"
N_CLASSES = 12  # the competition's
COLUMNS = ["model", "scale", "batch", *train.RUNTIMES, "device", "reason"]


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def command(table, *more):
    """Return the arguments of train.py that measure MODEL at SCALE on the CPU; later ones win. No data is read."""
    return ["--runtimes", str(table), "--data", "nosuch", "--exp", "nosuch", "--model", MODEL, "--scale", str(SCALE),
            "--batch", "2", "--seconds", "0", "--device", "cpu", *map(str, more)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Return ([finished process], the CSV's path) of a pair that works after one that can't be built."""
    folder = tmp_path_factory.mktemp("runtimes")
    out = folder / "sub/table.csv"
    done = [subprocess.run([sys.executable, ROOT / "train.py", *command(out, "--model", model)], cwd=folder, text=True,
                           capture_output=True) for model in (IMPOSSIBLE, MODEL)]
    return done, out


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Return a function (result, more arguments) that runs train.main with this result of measuring and returns rows.

    result: images/s trained, or an exception that measuring raises.
    """
    device = f"CPU, {torch.get_num_threads()} threads"

    def run(result, *more):
        def measure(*_):
            if isinstance(result, BaseException):
                raise result
            return dict.fromkeys(train.RUNTIMES, 1) | {"train_images_per_s": result, "device": device}
        monkeypatch.setattr(train, "measure", measure)
        train.main(train.parse_args(command(tmp_path / "table.csv", *more)))
        return read(tmp_path / "table.csv")
    return run


def numbers(rows):
    return {(row["model"], row["scale"], row["batch"]): row["train_images_per_s"] for row in rows}


# ---- a row ----------------------------------------------------------------------------------------------------------


def test_row_has_the_model_s_size_its_speed_and_memory(table):
    row = read(table[1])[1]
    model = build_model(MODEL, N_CLASSES).eval()
    macs = []
    for module in model.modules():
        assert not isinstance(module, torch.nn.Linear)
        if isinstance(module, torch.nn.Conv2d):  # each output value takes a kernel's worth of multiply-adds
            module.register_forward_hook(lambda conv, _, y: macs.append(y.numel() * conv.weight[0].numel()))
    model(torch.zeros(1, 3, SCALE, SCALE))
    assert list(row) == COLUMNS
    assert (row["model"], row["scale"], row["batch"], row["reason"]) == (MODEL, str(SCALE), "2", "")
    assert float(row["gmacs"]) == pytest.approx(sum(macs) / 1e9, abs=1e-4) and sum(macs) > 1e8
    assert float(row["params_m"]) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=1e-4)
    assert float(row["train_images_per_s"]) > 0 and float(row["infer_images_per_s"]) > 0
    assert (row["train_steps"], row["infer_steps"]) == ("1", "1") and row["device"].startswith("CPU")
    assert 200 < float(row["peak_mb"]) < 10_000  # torch alone is more than the one, nothing here needs the other


def test_pair_that_cannot_be_built_has_the_reason_and_does_not_stop_the_table(table):
    done, out = table
    row, works = read(out)
    assert [process.returncode for process in done] == [0, 0]  # else make's loop would end
    assert "Traceback" not in done[0].stderr + done[1].stderr
    assert row["model"] == IMPOSSIBLE and "Only Timm encoders" in row["reason"] and not works["reason"]
    assert {row[name] for name in train.RUNTIMES} == {""}
    printed = [process.stdout.splitlines() for process in done]
    assert [line.split()[:2] for (line,) in printed] == [[IMPOSSIBLE, "64:"], [MODEL, "64:"]]
    assert "Only Timm encoders" in printed[0][0]
    assert float(printed[1][0].split()[2]) == pytest.approx(float(works["params_m"]), rel=1e-3)


def test_nothing_but_the_table_and_its_picture_is_written(table):
    folder = table[1].parent.parent
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock"}
    assert names == {"sub", "sub/table.csv", "sub/table.png"}


def test_picture_shows_the_dot_of_the_one_pair_and_its_name(table):
    pixels = np.array(Image.open(table[1].with_suffix(".png")).convert("RGB"))
    first_colour = (pixels == (31, 119, 180)).all(axis=2)
    # no letter has a stroke of 5 pixels
    dot = np.argwhere(np.lib.stride_tricks.sliding_window_view(first_colour, (5, 5)).all(axis=(2, 3)))
    assert len(dot) and np.ptp(dot, axis=0).max() < 6
    assert first_colour[:, dot[:, 1].max() + 12:].sum() > 50


@pytest.mark.parametrize("cell", ["", "3,5", "nan"])
def test_a_cell_that_is_no_number_is_named_before_anything_is_measured(measured, tmp_path, monkeypatch, cell):
    measured(RuntimeError("can't"))  # its cells are empty for a reason
    measured(2.5, "--batch", 4)
    text = (tmp_path / "table.csv").read_text()
    assert text.count(",2.5,") == 1
    (tmp_path / "table.csv").write_text(text.replace(",2.5,", f',"{cell}",'))
    monkeypatch.setattr(train, "claim_device", lambda *_: pytest.fail("it measures"))
    with pytest.raises(UserError, match=f"table.csv line 3: train_images_per_s is '{cell}', no number: mend"):
        train.main(train.parse_args(command(tmp_path / "table.csv")))


def test_scale_that_a_model_cannot_take_is_a_reason(tmp_path):
    train.main(train.parse_args(command(tmp_path / "table.csv", "--model", "pan/resnet18")))
    reason = read(tmp_path / "table.csv")[0]["reason"]
    assert "pan/resnet18 can't work at scale 64" in reason and "\n" not in reason


@pytest.mark.parametrize(("wrong", "message"), [
    (["--scale", 16], "--scale: 16 is not from 32 to 4096"),
    (["--model", "unett/resnet18"], "--model: 'unett/resnet18' is not DECODER/ENCODER"),
    (["--seconds", -1], "--seconds: -1 is not from 0 to 3600"), (["--batch", 1], "--batch: 1 is not from 2")])
def test_mistake_is_refused_at_once(tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit):
        train.parse_args(command(tmp_path / "table.csv", *wrong))
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


# ---- the parts ------------------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    def forward(self, image):
        x = image.flatten(2)[:, None]  # [1, 1, 3, S x S]: three tokens
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("model, macs", [
    (torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), 8 * 32 * 32 * 3 * 9),
    (torch.nn.Sequential(torch.nn.Conv2d(3, 12, 1), torch.nn.Conv2d(12, 6, 5, padding=2, groups=3)),
     12 * 64 * 64 * 3 + 6 * 64 * 64 * 4 * 25),
    (Attention(), 2 * 3 * 3 * 64 * 64)])
def test_gmacs_of_known_layers(model, macs):
    assert train.count_gmacs(model, 64) * 1e9 == pytest.approx(macs)


@pytest.mark.parametrize("durations, budget, expected", [
    ([9, 8, 1, 6, 2, 4, 7], 29, (3, 4)),  # the first two warm up; the median of 1, 6, 2, 4
    ([9, 8, 6, 7], 18, (7, 2)),  # slow: one step warms up
    ([9, 8, 7], 0, (8, 1))])
def test_median_of_the_steps_after_the_warm_up(durations, budget, expected, monkeypatch):
    clock, left = [0], iter(durations)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert train.median_seconds(lambda: clock.append(clock.pop() + next(left)), budget) == expected


def test_peak_memory_is_of_the_process_alone_and_a_peak():
    held = b"x" * (500 << 20)  # by the parent
    code = ("import train as t; from types import SimpleNamespace as N; cpu = N(type='cpu');"
            "print(t.peak_mb(cpu)); x = b'x' * (200 << 20); del x; print(t.peak_mb(cpu))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before < len(held) / 2e6 and after > 200


def test_what_is_measured_is_train_pys_own_step_with_its_options(tmp_path, monkeypatch):
    seen, one_epoch = [], train.train_one_epoch

    def record(run, loader, args, *more):
        (images, masks), = loader
        seen.append((images.shape, images.dtype, masks.shape, masks.dtype, args.batch_hook, run.parts))
        return one_epoch(run, loader, args, *more)
    monkeypatch.setattr(train, "train_one_epoch", record)
    train.main(train.parse_args(command(tmp_path / "table.csv", "--accumulate", 2, "--batch", 4, "--batch-hook",
                                        "mixup")))
    assert seen == [((4, 64, 64, 3), torch.uint8, (4, 64, 64), torch.uint8, "mixup", 2)] * 2


# ---- the table ------------------------------------------------------------------------------------------------------


def test_row_is_added_or_replaces_that_of_the_same_model_scale_batch_and_device(measured):
    measured(10)
    measured(20, "--scale", 96)
    measured(30, "--batch", 4)
    measured(40, "--model", "fpn-narrow/tu-mobilenetv3_small_050")
    rows = measured(50)
    assert numbers(rows) == {(MODEL, "64", "2"): "50", (MODEL, "96", "2"): "20", (MODEL, "64", "4"): "30",
                             ("fpn-narrow/tu-mobilenetv3_small_050", "64", "2"): "40"}
    assert len(rows) == 4 and all(list(row) == COLUMNS for row in rows)


def test_row_of_another_device_stays(measured, tmp_path):
    measured(10)
    text = (tmp_path / "table.csv").read_text()
    (tmp_path / "table.csv").write_text(text.replace("CPU, ", "H100, "))
    assert [row["device"].split(",")[0] for row in measured(20)] == ["H100", "CPU"]


def test_row_with_a_reason_gives_way_to_the_row_of_the_pair_that_works_now(measured):
    assert [row["reason"] for row in measured(UserError("no\n  network"))] == ["no network"]
    assert [row["reason"] for row in measured(RuntimeError())] == ["RuntimeError"]
    assert [row["reason"] for row in measured(10)] == [""]


def test_picture_is_drawn_of_the_measured_rows_and_none_without_one(measured, tmp_path, monkeypatch):
    drawn, draw = [], train.draw_runtimes
    monkeypatch.setattr(train, "draw_runtimes", lambda path, rows: drawn.append(numbers(rows)) or draw(path, rows))
    measured(UserError("no such thing"))
    assert drawn == [] and not (tmp_path / "table.png").exists()
    measured(10, "--scale", 96)
    measured(5, "--scale", 128)
    assert [sorted(rows.values(), key=int) for rows in drawn] == [[10], [5, "10"]]
    Image.open(tmp_path / "table.png").verify()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interruption_leaves_the_table_and_its_picture_as_they_were(measured, tmp_path, error):
    measured(10)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("table.*")}
    assert set(before) == {"table.csv", "table.png"}
    with pytest.raises(error):
        measured(error(), "--scale", 96)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("table.*")} == before


def test_processes_at_once_all_add_their_rows(measured, tmp_path):
    fork, scales = get_context("fork"), range(32, 32 * 7, 32)
    children = [fork.Process(target=measured, args=(scale, "--scale", scale)) for scale in scales]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * len(scales)
    assert numbers(read(tmp_path / "table.csv")) == {(MODEL, str(scale), "2"): str(scale) for scale in scales}


def test_table_that_would_be_overwritten_by_its_picture_is_refused(tmp_path):
    with pytest.raises(UserError, match="picture"):
        train.main(train.parse_args(command(tmp_path / "table.png")))
    assert not list(tmp_path.iterdir())


def test_file_that_is_no_such_table_is_refused_and_stays(measured, tmp_path):
    (tmp_path / "table.csv").write_text("name,age\nx,3\n")
    with pytest.raises(UserError, match=r"table.csv: no column model, scale"):
        measured(10)
    assert (tmp_path / "table.csv").read_text() == "name,age\nx,3\n"


def test_make_measures_every_model_at_every_scale_with_its_knobs(tmp_path):
    knobs = {"DATA": tmp_path, "EXP": "e", "MODELS": "unet/b fpn/a", "SCALES": "64 96", "BATCH": 4, "DEVICE": "cpu",
             "LAUNCH": "nice -n 5", "PY": sys.executable}
    plan = subprocess.run(["make", "-n", "runtimes", *(f"{k}={v}" for k, v in knobs.items())], cwd=ROOT, text=True,
                          capture_output=True, check=True, env={"PATH": os.environ["PATH"]})
    assert plan.stderr == ""
    # a model that fails or is killed doesn't stop the others, but the command
    first, *lines, last = plan.stdout.replace("\\\n", " ").strip().split(";")
    assert (first, last.split()) == ("failed=0", ["exit", "$failed"])
    pairs = []
    for text in lines:
        assert text.endswith(" || failed=1")
        line = shlex.split(text.removesuffix(" || failed=1"))
        assert line[:5] == ["nice", "-n", "5", sys.executable, "train.py"]
        args = train.parse_args(line[5:])
        assert (str(args.runtimes), args.batch, args.device) == ("out/runtimes.csv", 4, "cpu")
        pairs.append((args.model, args.scale))
    assert pairs == [("unet/b", 64), ("unet/b", 96), ("fpn/a", 64), ("fpn/a", 96)]
