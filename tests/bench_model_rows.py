"""Rows of bench_speed.py that run models or whole scripts: train steps, TTA, starting, growth."""
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from bench_rows import N_CLASSES, OUT, ROOT, bound, in_turn, seconds, versus
from demo_data import draw_data

import common
import train

ENCODER = "tu-tf_efficientnet_lite0"
SCRIPTS = ("train.py", "infer.py", "pseudo_label.py", "ensemble.py")

# ---- train steps ----------------------------------------------------------------------------------------------------


def start_training(model, scale, batch, device):
    """Return (a Run of train.py without weights, a step of its loop on a batch that stays in memory, that batch)."""
    import torch
    args = train.parse_args(["--data", "", "--exp", "", "--model", model, "--scale", str(scale), "--batch", str(batch),
                             "--weights", "none"])
    run = train.start_run(args, range(N_CLASSES), np.ones(N_CLASSES), None, device)
    images = torch.randint(256, (batch, scale, scale, 3), dtype=torch.uint8, device=device)
    masks = torch.randint(N_CLASSES, (batch, scale, scale), dtype=torch.uint8, device=device)
    return run, lambda: train.train_one_epoch(run, [(images, masks)], args), (images, masks)


def bare_step(model, batch, loss, layout):
    """Return a train step on a fixed batch of normalised images, with nothing around it."""
    import torch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    images, masks = batch[0].permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=layout), batch[1].long()

    def step():
        optimizer.zero_grad()
        value = loss(model(images), masks)
        value.backward()
        optimizer.step()
        return value.item()
    model.train()
    return step


def worker(way, model):
    """Take a train step at 256 px, batch 8, for each line that comes in and print its (CPU, wall) seconds.

    "plain": as the public baselines do, contiguous tensors and glibc's malloc as it is; "ours": train.py's loop;
    "untuned": train.py's loop with OpenMP and malloc as they come.
    """
    if way == "ours":
        common.tune_process()
    import torch
    _, step, batch = start_training(model, 256, 8, torch.device("cpu"))
    if way == "plain":
        net = common.build_model(model, N_CLASSES)
        step = bare_step(net, batch, torch.nn.CrossEntropyLoss(), torch.contiguous_format)
    for _ in sys.stdin:
        print(json.dumps(seconds(step)), flush=True)


@contextmanager
def ask_worker(way, model):
    """Yield a function that lets a worker of its own take a step."""
    code = f"import bench_model_rows; bench_model_rows.worker({way!r}, {model!r})"
    env = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    if way == "untuned":
        del env["OMP_WAIT_POLICY"]
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=env) as process:
        def ask():
            process.stdin.write("\n")
            process.stdin.flush()
            return tuple(json.loads(process.stdout.readline()))
        yield ask
        process.stdin.close()


def ask_in_turn(rounds, models):
    """Return {way: [(CPU, wall)]} of workers, one for each way and its model, that step in turn."""
    with ExitStack() as stack:
        ask = {way: stack.enter_context(ask_worker(way, model)) for way, model in models.items()}
        times = [{way: ask[way]() for way in models} for _ in range(rounds + 1)]  # the first warms up
    return {way: [t[way] for t in times[1:]] for way in models}


def step():
    """Time train steps at 256 px, batch 8: the whole loop of train.py against a bare loop."""
    rows = []
    for plain, ours, target, what in (("efficientdet", "efficientdet", 1.8, "efficientdet"),
                                      ("fpn", "fpn", 1.4, "fpn in both"),
                                      ("fpn", "fpn-narrow", 1.4, "smp's fpn, our lighter one")):
        times = ask_in_turn(4, {"plain": f"{plain}/{ENCODER}", "ours": f"{ours}/{ENCODER}"})
        rows.append(versus(what, times, 1 / 8, "s an image", target))
    return rows


def busy():
    """Time train steps of our fpn in two processes at once, each with a thread a core, as by jobs in two shells.

    The limit is one of ours alone.
    """
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        pairs = {way: [stack.enter_context(ask_worker(way, f"fpn/{ENCODER}")) for _ in range(2)]
                 for way in ("untuned", "ours")}
        pairs["alone"] = pairs["ours"][:1]
        times = {way: [] for way in pairs}
        for way, pair in list(pairs.items()) * 7:
            cpu, wall = zip(*pool.map(lambda ask: ask(), pair), strict=True)
            times[way].append((sum(cpu) / len(pair), max(wall) / len(pair)))
    times = {way: found[1:] for way, found in times.items()}  # the first warms up
    return [versus("OpenMP and malloc as they come", times, 1 / 8, "s an image", 7, clock="wall", plain="untuned",
                   limit="alone")]


def loop():
    """Time train.py's loop against forward, loss, backward and step alone: the same model, layout and loss."""
    import torch
    run, ours, batch = start_training(f"fpn/{ENCODER}", 256, 8, torch.device("cpu"))
    other, _, _ = start_training(f"fpn/{ENCODER}", 256, 8, torch.device("cpu"))
    times = in_turn(8, plain=bare_step(other.model, batch, run.loss, torch.channels_last), ours=ours)
    return [versus("fpn, batch of 8", times, 1 / 8, "s an image", 1 / 1.05) | {"target": "<= 5% more"}]


# ---- prediction, scripts --------------------------------------------------------------------------------------------


def tta():
    """Time three flips x four quarter turns x three scales of 8 images at 128 px: of 12 orientations 8 differ."""
    import torch
    from torch.nn.functional import interpolate
    model = common.build_model(f"fpn/{ENCODER}", N_CLASSES).to(memory_format=torch.channels_last).eval()
    images = common.normalise(torch.randint(256, (8, 128, 128, 3), dtype=torch.uint8), (0.5,) * 3, (0.2,) * 3)
    scales, flips = (0.75, 1.0, 1.25), ((), (-1,), (-2,))
    names = {(): "identity", (-1,): "hflip", (-2,): "vflip"}
    turned = ("identity", "rot90ccw", "rot180", "rot90cw")
    views = common.tta_views(",".join(f"{names[flip]}+{turn}" for flip in flips for turn in turned))
    assert len(views) == 8

    def resized(scale):
        return interpolate(images, [round(side * scale) for side in images.shape[2:]], mode="bilinear", antialias=True)

    def plain():
        total = 0
        with torch.inference_mode():
            for scale in scales:
                scaled = images if scale == 1 else resized(scale)
                for flip in flips:
                    for turns in range(4):
                        probs = model(scaled.flip(flip).rot90(turns, (2, 3))).softmax(1)
                        probs = probs.rot90(-turns, (2, 3)).flip(flip)
                        total = total + (probs if scale == 1 else interpolate(probs, images.shape[2:], mode="bilinear"))
        return total / 36

    def forwards():
        with torch.inference_mode():
            for scale in scales:
                scaled = resized(scale)
                for _ in views:
                    model(scaled).softmax(1)
    times = in_turn(12, plain=plain, ours=lambda: common.predict_probs([model], images, views, scales),
                    forwards=forwards)
    over = versus("over the bare forwards and their softmax", times, 1 / 8, "s an image", 1 / 1.03, plain="forwards")
    return [versus("36 views, 24 of them different", times, 1 / 8, "s an image", 1.4, limit="forwards"),
            over | {"target": "<= 3% more"}]


def start():
    """Time how long a script takes to say what its options are."""
    libraries = "import torch, segmentation_models_pytorch, albumentations"
    commands = {"plain": ["-c", libraries]} | {script: [str(ROOT / script), "--help"] for script in SCRIPTS}
    times = in_turn(3, **{name: lambda command=command: subprocess.run(
        [sys.executable, *command], check=True, stdout=subprocess.DEVNULL) for name, command in commands.items()})
    slowest = max(SCRIPTS, key=lambda script: np.median([cpu for cpu, _ in times[script]]))
    row = versus(f"{slowest} --help, the slowest; plain imports torch, smp, albumentations", times, 1, "s", 1,
                 ours=slowest)
    return [row | {"target": "<= 0.5", "ok": bool(row["ours"]["median"] <= 0.5)}]


def run_and_peak(*command):
    """Return (CPU seconds, most MB) of a script with its arguments."""
    code = ("import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
            "import bench_rows; print(bench_rows.peak_mb())")  # the kernel's own count begins at this process's memory
    done = []
    cpu, _ = seconds(lambda: done.append(subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], check=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})))
    return cpu, float(done[0].stdout.split()[-1])


def growth():
    """Measure infer.py and ensemble.py, with its CSV, on 64, 256 and 1024 test photos of 64 px.

    Reported are the time that one more image takes, from 64 to 256 and from 256 to 1024 photos, and the most memory of
    either script. Of three runs the fastest and the largest count: what else the machine does only adds time.
    """
    found, sizes = defaultdict(list), (64, 256, 1024)
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        folder = Path(folder)
        for n in sizes:
            draw_data(folder / f"data{n}", train=14, test=n, size=64)
        model, exp, options = "linknet/tu-mobilenetv3_small_100", folder / "exp", ["--cache", folder / "cache"]
        run, folds = exp / f"r0/{model}/s64/f0", ["--exp", exp, "--folds", 2, *options]
        run_and_peak(ROOT / "train.py", "--data", folder / f"data{sizes[0]}", "--model", model, "--scale", 64,
                     "--weights", "none", "--epochs", 1, *folds)
        for n in sizes * 3:
            for store in (*run.glob("test.*"), *run.glob("valid.*")):
                store.unlink()
            data = ["--data", folder / f"data{n}"]
            run_and_peak(ROOT / "train.py", "--check", *data, *folds)
            found[n].append([
                run_and_peak(ROOT / "infer.py", *data, "--checkpoint", run / "model.pt", *options),
                run_and_peak(ROOT / "ensemble.py", "soft", *data, "--out", folder / "s.csv", *options, run)])
    found = {n: np.stack([np.min(runs, 0)[:, 0], np.max(runs, 0)[:, 1]], 1) for n, runs in found.items()}  # [script, 2]
    return [bound("time of an image more: 1024 to 256 against 256 to 64", slope_change(found, sizes), "% apart", 10),
            *(bound(f"{script}: most memory on 1024 against 64 photos",
                    100 * (found[sizes[2]][k][1] / found[sizes[0]][k][1] - 1), "% more", 5)
              for k, script in enumerate(("infer.py", "ensemble.py")))]


def slope_change(found, sizes):
    """Return by how many percent the CPU seconds of one more image differ between the two steps of `sizes`."""
    total = [found[n][:, 0].sum() for n in sizes]
    early, late = ((total[i + 1] - total[i]) / (sizes[i + 1] - sizes[i]) for i in (0, 1))
    return 100 * abs(late / early - 1)


ROWS = {"step": step, "busy": busy, "loop": loop, "tta": tta, "start": start, "growth": growth}
