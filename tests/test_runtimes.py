"""bench_runtimes.py: what a row holds, what it is made of, and what is left when a pair or the whole table fails."""
import csv
import subprocess
import sys
from types import SimpleNamespace

import bench_runtimes as bench
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common import build_model

MODEL, SCALE, IMPOSSIBLE = "unet/tu-mobilenetv3_small_050", 64, "dpt/resnet18"
ROW = {"model": MODEL, "scale": SCALE, "batch": 8, **dict.fromkeys(bench.NUMBERS, 1), "device": "cpu", "reason": ""}
FAILED = ROW | dict.fromkeys(bench.NUMBERS, "") | {"device": "", "reason": "no such thing"}


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(finished process, its CSV's path) for a pair that works after one that can't be built."""
    out = tmp_path_factory.mktemp("runtimes") / "sub/table.csv"
    done = subprocess.run([sys.executable, ROOT / "tests/bench_runtimes.py", "--models", IMPOSSIBLE, MODEL, "--scales",
                           str(SCALE), "--batch", "2", "--seconds", "0", "--device", "cpu", "--out", out],
                          text=True, capture_output=True)
    return done, out


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """Function (results) -> main() over as many scales, whose rows are these or, if they are exceptions, raise."""
    def run(results):
        results = iter(results)

        def measured(*_):
            if isinstance(result := next(results), dict):
                return result
            raise result
        monkeypatch.setattr(bench, "measure_apart", measured)
        bench.main(bench.parse_args(["--models", MODEL, "--scales", "64", "96", "--out", str(tmp_path / "table.csv")]))
    return run


# ---- a row ----------------------------------------------------------------------------------------------------------


def test_row_has_the_model_s_size_its_speed_and_memory(table):
    row = read(table[1])[1]
    model = build_model(MODEL, bench.N_CLASSES).eval()
    macs = []
    for module in model.modules():
        assert not isinstance(module, torch.nn.Linear)
        if isinstance(module, torch.nn.Conv2d):  # each output value takes a kernel's worth of multiply-adds
            module.register_forward_hook(lambda conv, _, y: macs.append(y.numel() * conv.weight[0].numel()))
    model(torch.zeros(1, 3, SCALE, SCALE))
    assert (row["model"], row["scale"], row["batch"], row["reason"]) == (MODEL, str(SCALE), "2", "")
    assert float(row["gmacs"]) == pytest.approx(sum(macs) / 1e9, abs=1e-4) and sum(macs) > 1e8
    assert float(row["params_m"]) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=1e-4)
    assert float(row["train_images_per_s"]) > 0 and float(row["infer_images_per_s"]) > 0
    assert (row["train_steps"], row["infer_steps"]) == ("1", "1") and row["device"].startswith("CPU")
    assert 200 < float(row["peak_mb"]) < 10_000  # torch alone is more than the one, nothing here needs the other


def test_pair_that_cannot_be_built_has_the_reason_and_does_not_stop_the_table(table):
    done, out = table
    row, works = read(out)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert row["model"] == IMPOSSIBLE and "Only Timm encoders" in row["reason"] and not works["reason"]
    assert {row[name] for name in [*bench.NUMBERS, "device"]} == {""}
    printed = done.stdout.splitlines()
    assert [line.split()[:2] for line in printed[1:3]] == [[IMPOSSIBLE, "64"], [MODEL, "64"]]
    assert "Only Timm encoders" in printed[1] and float(printed[2].split()[2]) == round(float(works["params_m"]), 2)


def test_picture_shows_the_dot_of_the_one_pair_and_its_name(table):
    pixels = np.array(Image.open(table[1].with_suffix(".png")).convert("RGB"))
    first_colour = (pixels == (31, 119, 180)).all(axis=2)
    # no letter has a stroke of 5 pixels
    dot = np.argwhere(np.lib.stride_tricks.sliding_window_view(first_colour, (5, 5)).all(axis=(2, 3)))
    assert len(dot) and np.ptp(dot, axis=0).max() < 6
    assert first_colour[:, dot[:, 1].max() + 12:].sum() > 50


@pytest.mark.parametrize("scale, model, word", [(80, MODEL, "32"), (64, "pan/resnet18", "pan/resnet18 can't work")])
def test_scale_that_a_model_cannot_take_is_a_reason(scale, model, word, capsys):
    bench.main(bench.parse_args(["--alone", "--models", model, "--scales", str(scale), "--device", "cpu"]))
    reason = bench.json.loads(capsys.readouterr().out)["reason"]
    assert word in reason and "\n" not in reason


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
    assert bench.count_gmacs(model, 64) * 1e9 == pytest.approx(macs)


@pytest.mark.parametrize("durations, budget, expected", [
    ([9, 8, 1, 6, 2, 4, 7], 29, (3, 4)),  # the first two warm up; the median of 1, 6, 2, 4
    ([9, 8, 6, 7], 18, (7, 2)),  # slow: one step warms up
    ([9, 8, 7], 0, (8, 1))])
def test_median_of_the_steps_after_the_warm_up(durations, budget, expected, monkeypatch):
    clock, left = [0], iter(durations)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert bench.median_seconds(lambda: clock.append(clock.pop() + next(left)), budget) == expected


def test_peak_memory_is_of_the_process_alone_and_a_peak():
    held = b"x" * (500 << 20)  # by the parent
    code = ("import bench_runtimes as b; from types import SimpleNamespace as N; cpu = N(type='cpu');"
            "print(b.peak_mb(cpu)); x = b'x' * (200 << 20); del x; print(b.peak_mb(cpu))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", text=True, capture_output=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before < len(held) / 2e6 and after > 200


@pytest.mark.parametrize("code, reason", [(-9, "SIGKILL"), (3, "exit code 3")])
def test_crash_is_a_row_and_what_it_said_is_passed_on(code, reason, monkeypatch, capsys):
    args = bench.parse_args(["--models", MODEL, "--scales", "64"])
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=code, stderr="last words"))
    row = bench.measure_apart(args, MODEL, 64)
    assert reason in row["reason"] and list(row) == list(ROW) and capsys.readouterr().err == "last words"


# ---- the table ------------------------------------------------------------------------------------------------------


def test_interrupted_table_keeps_its_rows_and_no_older_picture(run_main, tmp_path):
    (tmp_path / "table.png").write_text("of an older table")
    with pytest.raises(SystemExit, match="after 1 of 2"):
        run_main([ROW, KeyboardInterrupt()])
    assert [row["model"] for row in read(tmp_path / "table.csv")] == [MODEL]
    assert not (tmp_path / "table.png").exists()


def test_only_a_table_without_any_number_is_a_failure(run_main, tmp_path):
    with pytest.raises(SystemExit, match="none of the 2"):
        run_main([FAILED, FAILED])
    assert [row["reason"] for row in read(tmp_path / "table.csv")] == ["no such thing"] * 2
    assert not (tmp_path / "table.png").exists()
    run_main([FAILED, ROW])
    assert [row["reason"] for row in read(tmp_path / "table.csv")] == ["no such thing", ""]


def test_table_that_would_be_overwritten_by_its_picture_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="picture"):
        bench.main(bench.parse_args(["--models", MODEL, "--scales", "64", "--out", str(tmp_path / "table.png")]))


def test_misspelt_decoder_is_refused_at_once(capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(["--models", "unett/resnet18", "--scales", "64"])
    assert "unett/resnet18" in capsys.readouterr().err
