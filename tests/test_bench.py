"""Test bench_speed.py: its table and its history on rows made by hand, and the rows of a GPU on a tiny model."""
import json

import bench_gpu_rows
import bench_model_rows
import bench_rows
import bench_speed
import pytest
import torch
from bench_rows import bound, in_turn, versus
from conftest import MODEL, SCALE

from common import UserError

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Return a function that runs the bench and returns (lines of its table, what its history has)."""
    def run(*argv):
        bench_speed.main(bench_speed.parse_args([*argv, "--out", str(tmp_path / "b.jsonl")]))
        history = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
        return capsys.readouterr().out.splitlines(), history
    monkeypatch.setattr(bench_rows, "OUT", tmp_path / "bench")
    monkeypatch.setattr(bench_model_rows, "ROWS", {})
    monkeypatch.setattr(bench_gpu_rows, "ROWS", {"gpu": lambda: iter([bench_gpu_rows.note("d", 5, "GB")])})
    monkeypatch.setattr(bench_gpu_rows, "gpu_name", lambda: None)
    times = {"plain": [(6, 60), (2, 20), (4, 90)], "ours": [(1, 10), (1, 12), (3, 11)], "read": [(0.5, 1)] * 3}
    monkeypatch.setattr(bench_rows, "ROWS", {
        "cpu": lambda: [versus("a", times, 10, "ms", 4, limit="read"), bound("b", 3.5, "MB", 3)],
        "wall": lambda: [versus("c", times, 1, "s", 6, clock="wall")]})
    return run


def test_ways_are_called_in_turn_after_a_warm_up():
    called = []
    times = in_turn(2, a=lambda: called.append("a"), b=lambda: called.append("b"))
    assert "".join(called) == "ababab" and [len(t) for t in times.values()] == [2, 2]


def test_the_table_says_which_targets_are_reached_and_its_history_is_kept(bench):
    lines, history = bench()
    assert [line.split() for line in lines[2:-1]] == [
        ["cpu", "a", "40", "±10", "10", "±5", "CPU", "ms", "2.00x", "4x", "5", "MISSED"],
        ["cpu", "b", "3.5", "MB", "<=", "3", "MISSED"],
        ["wall", "c", "60", "±18", "11", "±0.5", "wall", "s", "6.00x", "6x", "ok"]]
    assert "1 of 3 targets" in lines[-1]
    assert {"commit", "cpu", "cores", "python", "torch", "numpy", "opencv-python-headless"} <= history[0].keys()
    assert [row["ratio"] for row in history[0]["rows"]] == [2, None, 6]
    lines, history = bench("--rows", "wall")
    assert len(history) == 2 and [row["row"] for row in history[1]["rows"]] == ["wall"]


def test_an_unknown_row_is_refused_with_those_that_there_are(bench):
    with pytest.raises(UserError, match="no row vot; there are cpu, wall, gpu"):
        bench("--rows", "wall,vot")


def test_a_row_of_a_gpu_is_refused_without_one_and_left_out_of_all(bench, monkeypatch):
    with pytest.raises(UserError, match="^gpu: needs a GPU, and torch sees none here$"):
        bench("--rows", "wall,gpu")
    assert [row["row"] for row in bench()[1][0]["rows"]] == ["cpu", "cpu", "wall"]
    monkeypatch.setattr(bench_gpu_rows, "gpu_name", lambda: "some card")
    lines, history = bench()
    assert lines[-2].split() == ["gpu", "d", "5", "GB"] and "1 of 3 targets" in lines[-1]  # it has no target
    assert history[-1]["rows"][-1]["ok"] is None and history[-1]["gpu"] == "some card"


def test_what_was_measured_before_an_error_is_kept(bench, monkeypatch):
    monkeypatch.setitem(bench_rows.ROWS, "wall", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench()
    _, history = bench("--rows", "cpu")
    assert [[row["what"] for row in line["rows"]] for line in history] == [["a", "b"], ["a", "b"]]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Return a function that runs a row of a GPU on the CPU and returns {(what, unit): what was found}."""
    def run(row, *args):
        found = list(row(CPU, *args))
        assert all(bench_speed.line_of("gpu", each) for each in found)
        return {(each["what"], each["unit"]): each for each in found}
    monkeypatch.setattr(bench_rows, "OUT", tmp_path)
    return run


def test_steps_are_compared_with_bare_and_plain_ones(rows, monkeypatch):
    monkeypatch.setattr(bench_gpu_rows.train, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(bench_gpu_rows, "TARGETS", {(MODEL, 2): 1e9})
    found = rows(bench_gpu_rows.gpu, (MODEL,), (2,), SCALE, 1, 0.01, 32)
    name = f"{MODEL} x2"
    assert list(found) == [
        ("matrix product of 32, bfloat16", "TFLOP/s"), (f"{name}, the first step", "s"), (f"{name}, bare", "images/s"),
        (f"{name}, plain", "images/s"), (name, "images/s"), (name, "TFLOP/s"), (name, "GB at most")]
    for plain, target in (("bare", 0.95), ("plain", 2)):
        row = found[f"{name}, {plain}", "images/s"]
        assert row["ratio"] == pytest.approx(row["ours"]["median"] / row["plain"]["median"])
        assert row["ok"] is (row["ratio"] >= target)
    speed = found[name, "images/s"]["ours"]["median"]
    gmacs = bench_gpu_rows.train.count_gmacs(bench_gpu_rows.common.build_model(MODEL, 12), SCALE)
    assert found[name, "TFLOP/s"]["ours"]["median"] == pytest.approx(speed * gmacs * 6 / 1000)
    assert found[name, "images/s"]["ok"] is False


def test_compiled_steps_are_compared_with_eager_ones(rows, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    found = rows(bench_gpu_rows.gpu_compiled, ((MODEL, 2),), SCALE, 1, 0.01)
    assert list(found) == [(f"{MODEL} x2, compiling", "s"), (f"{MODEL} x2, compiled", "images/s")] and compiled
    assert found[f"{MODEL} x2, compiled", "images/s"]["target"] == ">= 1.4x"


def test_an_epoch_and_a_prediction_are_taken_apart(rows, tiny_data):
    found = rows(bench_gpu_rows.gpu_epoch, tiny_data, MODEL, (2,), SCALE, 4)
    by_name = {what.removeprefix(f"{MODEL} x2, "): row["ours"]["median"] for (what, _), row in found.items()}
    parts = ("train_one_epoch", "validate", "save_epoch", "save_last", "log_row", "draw_some_curves", "the rest")
    assert list(by_name) == ["an epoch", "waits for photos", "outside of steps", *parts]
    assert sum(by_name[part] for part in parts) == pytest.approx(1000 * by_name["an epoch"])
    assert by_name["validate"] > 0 and 0 < by_name["outside of steps"] < 100 and by_name["the rest"] >= 0

    found = rows(bench_gpu_rows.gpu_infer, tiny_data, MODEL, SCALE, 1, 0.01)
    by_name = {what.removeprefix(f"{MODEL}, 4 photos: "): row["ours"]["median"] for (what, _), row in found.items()}
    parts = ("loader", "normalise", "predict_probs", "resize_probs", "write_batch", "join_parts", "the rest")
    assert list(by_name) == [f"{MODEL}, 4 photos", *parts] and min(by_name.values()) > 0


def test_a_profile_counts_what_a_step_starts_and_waits_for(rows, tmp_path):
    found = rows(bench_gpu_rows.gpu_profile, ((MODEL, 2),), SCALE, 1)
    assert [what.partition(": ")[2] for what, _ in found] == [
        "wall time", "GPU busy", "kernel launches", "waits of the CPU", "pageable copies"]
    text = (tmp_path / f"profile-{MODEL.replace('/', '-')}-2.txt").read_text()
    assert "1 bare steps" in text and text.count("aten::") > 100


def test_the_public_way_and_ours_make_the_same_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_rows, "OUT", tmp_path)
    data = bench_rows.litter("few", 3, 1, 2)
    train, test = bench_rows.common.load_data(data, tmp_path / "cache")
    coco = bench_rows.open_coco(data / "train.json")
    assert len(train.ids) == 3 and len(test.ids) == 1
    for i in range(3):
        assert (train.mask(i) == bench_rows.plain_mask(coco, i)).mean() > 0.999  # objects of equal area
