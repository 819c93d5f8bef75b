"""train.py --soup: the mean of several epochs' weights, kept when it scores higher on the held-out fold."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_of, run_until_killed

import common
import train
from common import UserError

torch.set_num_threads(1)


def states(n):
    return [{"a.weight": torch.full((2, 3), float(k)), "n": torch.tensor(10 + k)} for k in range(n)]


def test_the_mean_is_of_all_weights_and_leaves_counters_alone():
    mean = train.mean_weights(states(3))
    assert mean["a.weight"].tolist() == [[1, 1, 1], [1, 1, 1]] and mean["n"].item() == 10
    assert mean["a.weight"].dtype == torch.float32 and mean["n"].dtype == torch.int64


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """Return a function that makes a soup of three epochs, whose weights are scored by `score`(their value)."""
    def cook(score, best=1, v2=0.0):
        epochs = {k: {"epoch": k, "v1": 0.1, "v2": v2, "v3": score(k), "image_v3": [], "model": state}
                  for k, state in enumerate(states(4)) if k}
        for k in (2, 3):
            common.save_checkpoint(train.soup_file(tmp_path, k), **epochs[k])
        seen = []
        module = SimpleNamespace(load_state_dict=lambda state: seen.append(state["a.weight"][0, 0].item()))

        def validate(run, *_):
            return {"v1": 0.1, "v2": v2, "v3": score(seen[-1])}, {}, [score(seen[-1])]
        monkeypatch.setattr(train, "validate", validate)
        monkeypatch.setattr(train, "soup_epochs", lambda args: [2, 3])
        run = SimpleNamespace(best=epochs[best], ema=SimpleNamespace(module=module))
        train.make_soup(run, None, SimpleNamespace(metric="v3"), [], tmp_path)
        return run.best, seen
    return cook


@pytest.mark.parametrize(("score", "tried", "taken", "weight"), [
    # the weights of epoch k are k; the best one is epoch 1
    (lambda w: 1 - abs(w - 1.5), [1.5, 2], [1, 2], 1.5),  # 2 helps; with 3 besides it would be 2
    (lambda w: 1 - abs(w - 1), [1.5, 2], [1], 1),  # nothing helps
    (lambda w: 1 - abs(w - 2.1) if w > 1 else 0.85, [1.5, 2], [1, 3], 2)])  # 2 doesn't help, 3 does
def test_each_epoch_joins_only_if_the_score_rises(kitchen, score, tried, taken, weight, capsys):
    best, seen = kitchen(score)
    assert seen == tried and best["soup"] == taken
    assert best["model"]["a.weight"][0, 0].item() == weight and best["v3"] == pytest.approx(score(weight))
    assert best["epoch"] == 1
    text = capsys.readouterr().out
    assert ("soup of the epochs" in text) == (len(taken) > 1)


def test_epochs_are_tried_in_the_order_of_their_scores(kitchen):
    _, seen = kitchen(lambda w: w / 10)  # 3 before 2: the means are 2 and, as that helps, (1 + 3 + 2) / 3
    assert seen == [2, 2]


def test_a_real_run_keeps_the_soup_and_no_file_of_it(line, tmp_path, monkeypatch):
    args = line(tmp_path, "--epochs", 4, "--soup", 2)
    made, ingredients = [], {}
    mean, save = train.mean_weights, train.save_checkpoint

    def saved(path, *rest, **state):
        if "soup" in path.name:
            ingredients[path.name] = state["model"]
        save(path, *rest, **state)
    monkeypatch.setattr(train, "save_checkpoint", saved)
    monkeypatch.setattr(train, "mean_weights", lambda states: made.append(mean(states)) or made[-1])
    # what has just been validated is better than what is kept, which has weights
    monkeypatch.setattr(train, "guarded", lambda v, metric: 0.0 if "model" in v else 1.0)
    train.main(args)
    assert sorted(ingredients) == ["last-soup-003.pt", "last-soup-004.pt"]
    model = torch.load(run_of(args) / "model.pt")
    assert model["soup"] == [4, 3] and len(made) == 1
    key = next(key for key, value in model["model"].items() if value.is_floating_point())
    expected = np.mean([state[key].numpy() for state in ingredients.values()], axis=0)
    np.testing.assert_allclose(model["model"][key].numpy(), expected, rtol=1e-6)
    assert not [*run_of(args).glob("last*")]
    trained = common.load_model(run_of(args) / "model.pt")
    assert trained.checkpoint["v3"] == common.read_json(run_of(args) / "config.json")["v3"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_run_killed_while_it_makes_the_soup_ends_in_the_same_bytes(line, tmp_path, call):
    whole, killed = (line(tmp_path / name, "--epochs", 4, "--soup", 3) for name in "ab")
    train.main(whole)
    run_until_killed(train, killed, "mean_weights", call)
    assert (run_of(killed) / "last-soup-004.pt").exists()
    train.main(killed)
    for name in ("model.pt", "config.json"):
        assert (run_of(killed) / name).read_bytes() == (run_of(whole) / name).read_bytes(), name
    shutil.rmtree(tmp_path / "b")


def test_a_run_on_all_images_takes_none_as_nothing_can_judge_it(line, tmp_path):
    for fold in ([0], ["all", "--of-folds", 0]):
        train.main(line(tmp_path, "--fold", *fold, "--soup", 2))
    args = line(tmp_path, "--fold", "all", "--soup", 2)
    assert "soup" not in torch.load(run_of(args) / "model.pt") and train.soup_epochs(args) == []


def test_more_epochs_than_there_are_is_refused(line, tmp_path):
    with pytest.raises(UserError, match="--soup 9: this run has only"):
        train.main(line(tmp_path, "--soup", 9))
