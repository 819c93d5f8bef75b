"""Put the project on the path and give the tests what they share: data sets, stores and runs, drawn or by hand."""
import json
import os
import select
import signal
import sys
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network on import
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's waiting threads else slow each other down
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)  # else a make of a test has the options of the make that runs the tests
if "PYTEST_XDIST_WORKER" in os.environ:  # a file of tests runs on each core
    os.environ["OMP_NUM_THREADS"] = "1"

from demo_data import draw_data  # noqa: E402

import common  # noqa: E402
import train  # noqa: E402

settings.register_profile("project", max_examples=60, deadline=None, derandomize=True)  # the same on every machine
settings.load_profile("project")
MODEL, SCALE, FOLD, EPOCHS = "fpn-narrow/tu-test_efficientnet", 64, 1, 3  # half a second an epoch
PICTURES = {name: getattr(train, name) for name in ("draw_curves", "draw_batch", "draw_valid")}


@pytest.fixture(autouse=True)
def own_signals():
    """Put back what run_script changes of a process that is to end soon."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Return a folder with 14 training and 4 test photos of 64 x 64 in all 12 classes; tests only read it."""
    folder = tmp_path_factory.mktemp("tiny")
    draw_data(folder, train=14, test=4, size=64)
    return folder


def write_photo(path, height, width, seed):
    """Write noise, different for each seed, in the format that the ending of the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_coco(folder, images, annotations=(), categories=((0, "Paper"), (1, "Metal")), test_images=None, photos=True):
    """Write train.json, test.json and the photos that are not there yet; return the folder.

    images: (id, height, width) or dicts as in COCO, where missing keys are filled in: size 8 x 8, a file name by id.
    annotations: (image_id, category_id, segmentation) or whole dicts. categories: (id, name) or dicts. test_images:
    like images; by default one photo of 8 x 8 with id 9000. photos=False writes the JSON files alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    test_images = [(9000, 8, 8)] if test_images is None else test_images
    categories = [c if isinstance(c, dict) else {"id": c[0], "name": c[1]} for c in categories]
    annotations = [a if isinstance(a, dict) else
                   {"id": i, "image_id": a[0], "category_id": a[1], "segmentation": a[2]}
                   for i, a in enumerate(annotations, 1)]
    for name, listed in (("train.json", images), ("test.json", test_images)):
        listed = [i if isinstance(i, dict) else {"id": i[0], "height": i[1], "width": i[2]} for i in listed]
        listed = [{"height": 8, "width": 8, "file_name": f"batch_01/{i['id']:04}.png"} | i for i in listed]
        coco = {"images": listed, "categories": categories, "annotations": annotations if name == "train.json" else []}
        (folder / name).write_text(json.dumps(coco))
        for image in listed if photos else ():
            if not (path := folder / image["file_name"]).exists():
                write_photo(path, image["height"], image["width"], image["id"])
    return folder


def read_csv(path, columns=()):
    """Return the rows of a CSV as dicts of strings."""
    return [row for _, row in common.read_rows(path, columns)]


def run_until_killed(script, args, name, call):
    """Run script.main(args) in a process that kills itself at the `call`-th call, from 1 on, of script.name."""
    function, calls = getattr(script, name), count(1)

    def deadly(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, name, deadly)
        process = get_context("fork").Process(target=script.main, args=[args])  # it has torch imported already
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(autouse=True)
def seeded():
    """Let every test draw the same numbers, whichever tests ran before; torch is imported by those who need it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_pictures():
    """Leave out train.py's pictures, which take longer than a tiny run; the fixture `pictures` puts them back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(train, name, lambda *args: None)
        yield


@pytest.fixture
def pictures(monkeypatch):
    for name, draw in PICTURES.items():
        monkeypatch.setattr(train, name, draw)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def line(tiny_data, cache):
    """Return a function (exp, more arguments) -> parsed arguments of a tiny run; later arguments win."""
    def parse(exp, *more):
        return train.parse_args(["--data", str(tiny_data), "--exp", str(exp), "--cache", str(cache), "--model", MODEL,
                                 "--scale", str(SCALE), "--fold", str(FOLD), "--folds", "3", "--epochs", str(EPOCHS),
                                 "--batch", "4", "--lr", "1e-3", "--weights", "none", "--device", "cpu",
                                 "--save-every", "0",
                                 *map(str, more)])
    return parse


def write_store(run, split, probs, part, ids=None, **info):
    """Write a store to the folder `run`, of probs uint8 [N, C, H, W] for the images `ids` of the Split `part`.

    Its JSON says that it was made from `part`; `info` replaces keys of it. Call `seal` after a change of the .npy.
    """
    run.mkdir(parents=True, exist_ok=True)
    np.save(run / f"{split}.npy", probs)
    found = {"classes": part.classes, "split": split, "tta": "flip", "data": part.fingerprint, "seed": 0,
             "model": "unet/a", "scale": 64, "round": 0, "fold": 0, "folds_csv": "f01d", "paint": "area",
             "orientation": "shown", "unused": "keep", "contaminated": False,
             "image_ids": part.ids if ids is None else ids, "unreadable": [], "state": "5ta7e",
             "checkpoints": [{"file": "model.pt", "hash": "0", "epoch": 1}], "commit": "", "versions": {}, "code": {},
             "kept_under": []} | info
    run_recipe = {key: found[key] for key in ("model", "scale", "round", "fold", "seed", "paint")}
    common.write_json(run / f"{split}.json", {
        "recipe": {"split": split, "tta": found["tta"], "checkpoints": [f"{run.name} {found['fold']}"]},
        "run": {"recipe": run_recipe, "code": {}, "codes": [common.short_hash({})], "state": "5ta7e", "commit": "",
                "kept_under": []},
        "files": {f"{split}.npy": common.file_hash(run / f"{split}.npy")}} | found)


def seal(path):
    """Write the present hash of a store's .npy to its JSON, `path`."""
    info = common.read_json(path)
    common.write_json(path, info | {"files": {f"{path.stem}.npy": common.file_hash(path.with_suffix(".npy"))}})


def run_folder(exp, round_, model, scale, fold):
    """Return EXP/rROUND/DECODER/ENCODER/sSCALE/fFOLD."""
    return Path(exp) / f"r{round_}" / model / f"s{scale}" / f"f{fold}"


def run_of(args):
    """Return the folder of the run that train.py trains with these arguments."""
    return run_folder(args.exp, args.round, args.model, args.scale, args.fold)


@pytest.fixture(scope="module")
def splits(tiny_data, cache):
    return common.load_data(tiny_data, cache)


@pytest.fixture
def end_of_all():
    """Return a function that waits until no process is left that began since then, forked or by close_fds=False."""
    end, held = os.pipe()
    os.set_inheritable(held, True)

    def wait():
        os.close(held)
        assert select.select([end], [], [], 30)[0], "a process is left"
        os.close(end)
    return wait
