"""Rows of bench_speed.py that need no model: samples, scores, submissions, votes, ClassMix, the mask cache."""
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from demo_data import CLASSES, draw_split

import common
import ensemble
import train

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out/bench")
N_CLASSES, N_TRAIN, N_TEST, N_DRAWN, N_OBJECTS = 12, 2617, 837, 300, 8  # the competition's; 21,116 objects: 8 an image

# ---- measuring ------------------------------------------------------------------------------------------------------


def seconds(call):
    """Return the (CPU, wall) seconds of call(), with the processes that it waited for."""
    def now():
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used), time.perf_counter()
    before = now()
    call()
    return tuple(b - a for a, b in zip(before, now(), strict=True))


def in_turn(rounds, warm_up=True, **ways):
    """Call functions in turn, A B A B, so that all share what else runs; return {name: [(CPU, wall) seconds]}."""
    times = {name: [] for name in ways}
    for _ in range(rounds + warm_up):
        for name, call in ways.items():
            times[name].append(seconds(call))
    return {name: found[warm_up:] for name, found in times.items()}


def summary(times, factor, clock):
    """Return median and half the spread between quartiles of CPU or wall seconds x `factor`, and the other's median."""
    chosen, other = ([t[c] * factor for t in times] for c in ((0, 1) if clock == "CPU" else (1, 0)))
    low, middle, high = np.percentile(chosen, (25, 50, 75))
    return {"median": middle, "spread": (high - low) / 2, f"other than {clock}": statistics.median(other)}


def versus(what, times, factor, unit, target, clock="CPU", limit=None, plain="plain", ours="ours"):
    """Return a row of the table: ours should be `target` times as fast as the plain way; nothing can beat `limit`.

    The ratio is the median over the rounds, in each of which both ran at one clock of the machine.
    """
    found = {name: summary(times[key], factor, clock) for name, key in (("plain", plain), ("ours", ours))}
    column = 0 if clock == "CPU" else 1
    ratio = statistics.median(a[column] / b[column] for a, b in zip(times[plain], times[ours], strict=True))
    return {"what": what, "unit": f"{clock} {unit}", **found, "ratio": ratio, "target": f"{target}x",
            "ok": bool(ratio >= target), "limit": limit and summary(times[limit], factor, clock)["median"]}


def bound(what, value, unit, most):
    """Return a row of the table: ours should be at most `most`."""
    return {"what": what, "unit": unit, "plain": None, "ours": {"median": value, "spread": 0}, "ratio": None,
            "target": f"<= {most:g}", "ok": bool(value <= most), "limit": None}


def peak_mb():
    """Return the most memory of this process so far, in MB."""
    return train.peak_mb(SimpleNamespace(type="cpu"))


def peak_of(code):
    """Return (MB at its start, most MB so far) of a process of its own that runs `code` after the imports."""
    imports = "import bench_rows, common, ensemble, numpy as np, cv2, csv; start = bench_rows.peak_mb(); "
    done = subprocess.run([sys.executable, "-c", f"{imports}{code}; print(start, bench_rows.peak_mb())"],
                          env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, check=True, text=True,
                          stdout=subprocess.PIPE)
    return tuple(map(float, done.stdout.split()[-2:]))


# ---- data -----------------------------------------------------------------------------------------------------------


def litter(name, n_train, n_test, n_drawn):
    """Return a folder of n_train + n_test photos of 512 x 512, 8 objects each: links to `n_drawn`, drawn once."""
    folder = OUT / name
    if (folder / "train.json").exists():
        return folder
    rng, frequency = np.random.default_rng(0), np.array([row[0] for row in CLASSES.values()])
    chosen = [rng.choice(len(CLASSES), N_OBJECTS, p=frequency / frequency.sum()).tolist() for _ in range(n_drawn)]
    images, annotations = draw_split(folder, chosen, 0, 512, 0, quality=84)  # 70 kB, as much as photos of TACO
    of_image = {image["id"]: [a for a in annotations if a["image_id"] == image["id"]] for image in images}
    listed, objects = [], []
    for i in range(n_train + n_test):
        image = images[i % n_drawn]
        file_name = f"copies/{i:04}.jpg"
        (folder / file_name).parent.mkdir(exist_ok=True)
        (folder / file_name).unlink(missing_ok=True)
        os.link(folder / image["file_name"], folder / file_name)
        listed.append(image | {"id": i, "file_name": file_name})
        objects += [a | {"id": len(objects) + k, "image_id": i} for k, a in enumerate(of_image[image["id"]])]
    coco = {"categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)]}
    objects = [a for a in objects if a["image_id"] < n_train]
    common.write_json(folder / "test.json", coco | {"images": listed[n_train:]})
    common.write_json(folder / "train.json", coco | {"images": listed[:n_train], "annotations": objects})
    return folder


def plain_mask(coco, image_id):
    """Paint a mask as the public baselines do: annToMask of each object, the largest first."""
    image = coco.loadImgs(image_id)[0]
    mask = np.zeros((image["height"], image["width"]), np.uint8)
    for a in sorted(coco.loadAnns(coco.getAnnIds(image_id)), key=lambda a: -a["area"]):
        mask[coco.annToMask(a) == 1] = a["category_id"] + 1
    return mask


def open_coco(path):
    from pycocotools.coco import COCO
    with redirect_stdout(StringIO()):
        return COCO(path)


# ---- rows -----------------------------------------------------------------------------------------------------------


def sample(scale, targets):
    """Time batches of 8 augmented training samples as normalised float tensors."""
    import albumentations as A
    import torch
    from albumentations.pytorch import ToTensorV2
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    data = litter("small", 24, 4, 24)
    coco, batch, turn = open_coco(data / "train.json"), range(8), iter(range(10 ** 9))
    names = [str(data / image["file_name"]) for image in coco.dataset["images"]]
    transform = A.Compose([A.RandomResizedCrop((scale, scale), (0.25, 1)), A.D4(),
                           A.Normalize((0.5,) * 3, (0.2,) * 3, max_pixel_value=1), ToTensorV2()])

    def plain():
        found = []
        for i in batch:
            image = cv2.cvtColor(cv2.imread(names[i]), cv2.COLOR_BGR2RGB).astype(np.float32) / 255
            found.append(transform(image=image, mask=plain_mask(coco, i)))
        return torch.stack([s["image"] for s in found]), torch.stack([s["mask"] for s in found])

    def ours(decoded):
        split, _ = common.load_data(data, OUT / f"cache-{decoded}", decoded=decoded)
        samples = common.TrainSamples([(split, i, None) for i in batch], common.make_augmentation("basic", scale), 0)

        def call():
            epoch = next(turn)
            images, masks = samples.__getitems__([(epoch, i) for i in batch])
            return common.normalise(images, (0.5,) * 3, (0.2,) * 3), masks
        return call
    times = in_turn(15, plain=plain, ours=ours(False), cached=ours(True),
                    decode=lambda: [cv2.imread(names[i]) for i in batch])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
    return [versus("decoding JPEG", times, 125, "ms an image", targets[0], limit="decode"),
            versus("photos cached decoded", times, 125, "ms an image", targets[1], ours="cached")]


def v3():
    """Time the mean IoU by image of 100 pairs of 512 x 512."""
    rng, n = np.random.default_rng(0), N_CLASSES
    coarse = rng.integers(0, n, (2, 100, 32, 32)).astype(np.uint8)
    preds, masks = np.kron(coarse, np.ones((1, 1, 16, 16), np.uint8))
    preds64, masks64 = preds.astype(np.int64), masks.astype(np.int64)

    def fast_hist(true, pred):
        known = (true >= 0) & (true < n)
        return np.bincount(n * true[known].astype(int) + pred[known], minlength=n ** 2).reshape(n, n)

    def plain():
        found = []
        for true, pred in zip(masks64, preds64, strict=True):
            hist = fast_hist(true, pred)
            with np.errstate(divide="ignore", invalid="ignore"):
                found.append(np.nanmean(np.diag(hist) / (hist.sum(1) + hist.sum(0) - np.diag(hist))))
        return np.mean(found)

    def ours():
        counts = np.stack([common.confusion(*pair, n) for pair in zip(preds, masks, strict=True)])
        return common.image_miou(counts).mean()
    assert np.isclose(plain(), ours())
    return [versus("100 pairs of 512 x 512", in_turn(7, plain=plain, ours=ours), 10, "ms a pair", 4.5)]


def submission():
    """Time the CSV, checked by reading it back."""
    import pandas as pd
    split, _ = common.load_data(litter("small", 24, 4, 24), OUT / "cache-False")
    masks, n = np.stack([split.truth(i % 24) for i in range(N_TEST)]), 100
    names = [str(i) for i in range(N_TEST)]
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        folder = Path(folder)

        def plain():
            rows = [{"image_id": name, "PredictionString": " ".join(str(e) for e in mask.flatten().tolist())}
                    for name, mask in zip(names[:n], masks, strict=False)]
            pd.DataFrame(rows).to_csv(folder / "plain.csv", index=False)
        times = in_turn(9, plain=plain, ours=lambda: ensemble.write_submission(
            folder / "ours.csv", names[:n], masks[:n], N_CLASSES))
        assert (folder / "plain.csv").read_bytes() == (folder / "ours.csv").read_bytes()
        np.save(folder / "masks.npy", masks)
        start, most = peak_of(f"masks, names = np.load('{folder}/masks.npy'), list(map(str, range({N_TEST}))); "
                              f"ensemble.write_submission('{folder}/s.csv', names, masks, {N_CLASSES})")
    return [versus("written, read back and checked", times, N_TEST / n, f"s for {N_TEST} images", 30),
            bound("most memory on top", most - start - masks.nbytes / 1e6, "MB", 50)]


def make_stores(folder, n_members, n_images, fill):
    """Write .npy files of n_members x n_images x 12 x 256 x 256, on disk only if filled; return their paths."""
    rng, shape = np.random.default_rng(0), (n_images, N_CLASSES, common.SUBMIT_SIZE, common.SUBMIT_SIZE)
    for m in range(n_members):
        with open(folder / f"{m}.npy", "wb") as f:
            common.write_npy_header(f, shape)
            if fill:
                f.write(rng.integers(0, 256, shape, dtype=np.uint8))
            else:
                f.truncate(f.tell() + int(np.prod(shape)))
    return [folder / f"{m}.npy" for m in range(n_members)]


def write_vote(paths, out, n_images):
    """Write a submission by the equal vote of stores, as ensemble.py makes it."""
    stores = [np.load(path, mmap_mode="r") for path in paths]
    ensemble.write_submission(out, list(map(str, range(n_images))), (
        ensemble.vote({m: ensemble.read_probs(store, i) for m, store in enumerate(stores)}, np.ones(len(stores)),
                      N_CLASSES) for i in range(n_images)), N_CLASSES)


def vote():
    """Time the way from 20 members' probabilities to class ids."""
    n_members, n_images = 20, 20
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        folder = Path(folder)
        stores = [np.load(p, mmap_mode="r") for p in make_stores(folder, n_members, n_images, fill=True)]

        def plain():
            return [np.mean([store[i].astype(np.float32) for store in stores], axis=0).argmax(0)
                    for i in range(n_images)]

        def ours():
            return [ensemble.vote({m: ensemble.read_probs(store, i) for m, store in enumerate(stores)},
                                  np.ones(n_members), N_CLASSES) for i in range(n_images)]
        assert (np.stack(plain()) == np.stack(ours())).all()
        times = in_turn(5, plain=plain, ours=ours, read=lambda: [ensemble.read_probs(s, i) for i in range(n_images)
                                                                 for s in stores])
        paths = list(map(str, make_stores(folder, n_members, N_TEST, fill=False)))
        _, most = peak_of(f"bench_rows.write_vote({paths}, '{folder}/s.csv', {N_TEST})")
    return [versus("20 members in the page cache", times, 1000 / n_images, "ms an image", 3, limit="read"),
            bound(f"most memory, 20 members x {N_TEST} images and the CSV", most, "MB", 500)]


def classmix():
    """Time pasting half the classes of one image of a batch of 8 at 256 px onto another."""
    rng = np.random.default_rng(0)
    masks = np.kron(rng.integers(0, N_CLASSES, (8, 8, 8)), np.ones((1, 32, 32))).astype(np.uint8)
    images = rng.integers(0, 256, (8, 256, 256, 3), dtype=np.uint8)

    def plain():
        mixed = []
        for i in range(8):
            image, mask = images[(i + 1) % 8], masks[(i + 1) % 8]
            present = np.unique(mask)
            chosen = rng.choice(present, (len(present) + 1) // 2, replace=False)
            paste = np.isin(mask, chosen)
            mixed.append((np.where(paste[..., None], image, images[i]), np.where(paste, mask, masks[i])))
        return [np.stack(part) for part in zip(*mixed, strict=True)]
    times = in_turn(15, plain=plain, ours=lambda: common.classmix(images, masks, 1.0, np.ones(N_CLASSES), rng))
    return [versus("batch of 8 at 256 px", times, 125, "ms an image", 3)]


def cache():
    """Time checking the photos, painting masks and folds of the competition's number of images, 300 of them drawn."""
    data = litter("full", N_TRAIN, N_TEST, N_DRAWN)
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        def plain():
            coco = open_coco(data / "train.json")
            for path in sorted((data / "copies").iterdir()):
                assert cv2.imread(str(path)) is not None
            np.save(f"{folder}/masks.npy", np.stack([plain_mask(coco, i) for i in coco.getImgIds()]))

        def ours():
            common.load_folds(folder, common.load_data(data, folder)[0], 5)
        times = in_turn(1, warm_up=False, plain=plain, ours=ours, again=ours)
    return [versus(f"{N_TRAIN} + {N_TEST} photos; plain on one core", times, 1, "s", 1.8, clock="wall"),
            bound("second start", times["again"][0][1], "wall s", 1)]


class Made(ensemble.Plan):
    """A plan that writes a description of each artefact that it finds missing, as far as it can see."""

    def judge(self, kind, path, made, recipe, code, reasons=()):
        if made is None and not reasons:
            self.describe(path, recipe, code)
        return super().judge(kind, path, made, recipe, code, reasons)

    def describe(self, path, recipe, code):
        by_name = {"model.pt": "config.json", "submission.csv": "submission.made.json"}
        split = recipe.get("split", "test")
        target = path.with_name(by_name.get(path.name, path.name.replace("test", split)))
        data = path.with_name({"manifest.json": "labels.npy", "test.json": f"{split}.npy"}.get(path.name, path.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {int: 0, bool: False, str: ""}
        made = {key: values.get(kind) if isinstance(kind, type) else [] for key, kind in common.STORE_KINDS.items()}
        made |= dict(zip(common.DESCRIBED, (
            recipe, code, "5ta7e", "", dict.fromkeys(common.VERSIONS, "1"), []), strict=True))
        ids = self.data["index"]["train" if split == "valid" else "test"]["ids"]
        made |= {"image_ids": ids[::5] if split == "valid" else ids, "classes": list(map(str, range(N_CLASSES))),
                 "photos": {}, "labels": []}
        with open(data, "wb") as f:
            f.write(str(path).encode())
            if data.suffix == ".npy":  # sparse: it has the size alone
                f.truncate(len(made["image_ids"]) * N_CLASSES * common.SUBMIT_SIZE ** 2 + 128)
        if path.name == "test.json":
            run = common.read_json(path.with_name("config.json"))
            of_run = {key: run[key] for key in ("recipe", "code", "state", "commit", "kept_under")}
            made |= {"run": of_run | {"codes": common.code_hashes(run)}, "files": {data.name: "0"}}
        else:
            made |= {"files": {data.name: common.file_hash(data) if data.suffix != ".npy" else self.hashes(data)}}
        if path.name == "manifest.json":
            common.write_csv(path.with_name("index.csv"), [
                {"image_id": i, "keep": "1", "reason": "", "classes": "1"} for i in ids])
        common.write_json(target, made)


def plan():
    """Time the plan of a grid of 100 runs that is up to date, as make asks at each start."""
    data = litter("full", N_TRAIN, N_TEST, N_DRAWN)
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        words = ["plan", "--data", str(data), "--cache", f"{folder}/cache", "--exp", f"{folder}/main", "--rounds", "1",
                 "--train-args=--weights none"]
        grid = {"models": "fpn/tu-a unet/tu-b", "scales": "256 320 384 448 512", "folds": "0 1 2 3 4"}
        for name, values in grid.items():
            words += [f"--{name}", values, f"--pick-{name}", values]
        with redirect_stdout(StringIO()):
            common.load_folds(f"{folder}/main", common.load_data(data, f"{folder}/cache")[0], 5)
        to_make = [""]
        while to_make:  # what stands on others is written in a later round
            made = Made(ensemble.parse_args(words))
            made.follow(["submit"])
            to_make = made.to_make
        n_runs = len(list(Path(folder).rglob("config.json")))
        assert n_runs == 100

        def ours():
            done = subprocess.run([sys.executable, ROOT / "ensemble.py", *words], text=True, capture_output=True)
            assert done.stdout.strip() == "" and done.returncode == 0, done
        times = [wall for _, wall in in_turn(7, ours=ours)["ours"]]
    return [bound(f"{n_runs} runs, {N_TRAIN} + {N_TEST} photos, up to date", statistics.median(times), "wall s", 0.5)]


ROWS = {"plan": plan, "sample256": lambda: sample(256, (4.5, 10)), "sample512": lambda: sample(512, (2.5, 5)), "v3": v3,
        "submission": submission, "vote": vote, "classmix": classmix, "cache": cache}
