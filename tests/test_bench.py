"""Test bench_speed.py: its table and its history, on rows made by hand."""
import json

import bench_model_rows
import bench_rows
import bench_speed
import pytest
from bench_rows import bound, in_turn, versus

from common import UserError


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Return a function that runs the bench and returns (lines of its table, what its history has)."""
    def run(*argv):
        bench_speed.main(bench_speed.parse_args([*argv, "--out", str(tmp_path / "b.jsonl")]))
        history = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
        return capsys.readouterr().out.splitlines(), history
    monkeypatch.setattr(bench_rows, "OUT", tmp_path / "bench")
    monkeypatch.setattr(bench_model_rows, "ROWS", {})
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
    with pytest.raises(UserError, match="no row vot; there are cpu, wall"):
        bench("--rows", "wall,vot")


def test_the_public_way_and_ours_make_the_same_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_rows, "OUT", tmp_path)
    data = bench_rows.litter("few", 3, 1, 2)
    train, test = bench_rows.common.load_data(data, tmp_path / "cache")
    coco = bench_rows.open_coco(data / "train.json")
    assert len(train.ids) == 3 and len(test.ids) == 1
    for i in range(3):
        assert (train.mask(i) == bench_rows.plain_mask(coco, i)).mean() > 0.999  # objects of equal area
