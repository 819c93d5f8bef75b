"""Rows of bench_speed.py that need a GPU: train steps, compiled steps, epochs, prediction, profiles.

MODELS, BATCHES, COMPILED and PROFILED say what is measured. A row takes the device and all sizes as arguments, so that
a test can run it on a CPU with a tiny model. A row without a target only says how it is.
"""
import gc
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import bench_rows
import numpy as np
from bench_rows import N_CLASSES, bound, in_turn, litter

import common
import infer
import train

NARROW = "fpn-narrow/tu-efficientnet_b0"
MODELS = (NARROW, "fpn/tu-efficientnet_b0", "unet/resnet34", "unet/resnet50", "deeplabv3plus/resnet50",
          "efficientdet/tu-efficientnet_b0")
BATCHES = (8, 32)
# (model, batch) -> images/s that train.py's steps should reach on an H100 or H200 at 512 px
TARGETS = {(NARROW, 32): 600, ("unet/resnet34", 32): 475, ("unet/resnet50", 32): 350,
           ("deeplabv3plus/resnet50", 32): 380}
COMPILED = tuple(TARGETS)  # compiling takes up to a minute for each
PROFILED = ((NARROW, 8), (NARROW, 32), ("unet/resnet34", 32))
TURN = 0.3  # seconds that one way takes before the next one has its turn

# ---- what a row of the table holds ----------------------------------------------------------------------------------


def about(values):
    """Return median and half the spread between quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "spread": float(high - low) / 2}


def note(what, value, unit, plain=None, limit=None):
    """Return a row of the table without a target; `plain`: the same number of the plain way."""
    ratio = plain / value if plain and value else None
    return {"what": what, "unit": unit, "plain": None if plain is None else {"median": plain, "spread": 0},
            "ours": {"median": value, "spread": 0}, "ratio": ratio, "target": "", "ok": None, "limit": limit}


def at_least(what, value, unit, least):
    """Return a row of the table: ours should be at least `least`."""
    return note(what, value, unit) | {"target": f">= {least:g}", "ok": bool(value >= least)}


def faster(what, times, batch, target, plain, ours="ours"):
    """Return a row of the table: images/s of ours should be `target` times those of the plain way.

    times: {way: seconds of a step, one for each round}. The ratio is the median over the rounds, in each of which both
    ran at one clock of the card.
    """
    ratio = statistics.median(a / b for a, b in zip(times[plain], times[ours], strict=True))
    found = {name: about([batch / t for t in times[key]]) for name, key in (("plain", plain), ("ours", ours))}
    return {"what": what, "unit": "images/s", **found, "ratio": ratio, "target": f">= {target:g}x",
            "ok": bool(ratio >= target), "limit": None}


# ---- measuring ------------------------------------------------------------------------------------------------------


def wait(device):
    """Wait until a GPU has done all that it was given."""
    import torch
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device):
    """Give back the memory of what was measured before."""
    import torch
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def steps_of_turn(take, turn):
    """Warm up and return how many steps, at least two, take about `turn` seconds; take(n) takes n steps."""
    take(3)
    started = time.perf_counter()
    take(3)
    return max(2, round(turn * 3 / (time.perf_counter() - started)))


def step_seconds(ways, rounds, turn):
    """Return {way: [seconds of a step]}, one for each round; ways: {way: a function that takes n steps and waits}."""
    n_steps = {way: steps_of_turn(take, turn) for way, take in ways.items()}
    times = in_turn(rounds, warm_up=False, **{way: partial(take, n_steps[way]) for way, take in ways.items()})
    return {way: [wall / n_steps[way] for _, wall in found] for way, found in times.items()}


def matmul_tflops(device, side):
    """Return how many TFLOP/s a product of two bfloat16 matrices of this side makes, on random data."""
    import torch
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for n in (3, 20):  # the first ones warm up
        wait(device)
        started = time.perf_counter()
        for _ in range(n):
            a @ b
        wait(device)
    return 2 * side ** 3 * n / (time.perf_counter() - started) / 1e12


@contextmanager
def timers(module, names, spent, device):
    """Let functions of `module` add their seconds, and those that the GPU still needs, to spent[name]."""
    def timed(name, function):
        def call(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            wait(device)
            spent[name] += time.perf_counter() - started
            return result
        return call
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(module, name, timed(name, getattr(module, name))))
        yield


# ---- train steps ----------------------------------------------------------------------------------------------------


def start(model, scale, batch, device, *options):
    """Return (a Run of train.py without weights, its arguments, a batch as its loader makes it)."""
    import torch
    args = train.parse_args(["--data", "", "--exp", "", "--model", model, "--scale", str(scale), "--batch", str(batch),
                             "--weights", "none", "--save-every", "0", *options])
    run = train.start_run(args, range(N_CLASSES), np.ones(N_CLASSES), None, device)
    images = torch.randint(256, (batch, scale, scale, 3), dtype=torch.uint8)
    masks = torch.randint(N_CLASSES, (batch, scale, scale), dtype=torch.uint8)
    if device.type == "cuda":
        images, masks = images.pin_memory(), masks.pin_memory()
    return run, args, (images, masks)


def our_steps(run, args, batch):
    """Return a function that takes n steps of train.py's loop, each of which copies the batch to the GPU."""
    return lambda n: train.train_one_epoch(run, [batch] * n, args)


def bare_steps(model, batch, run):
    """Return a function that takes n steps with nothing around them, on a normalised batch on the GPU.

    run: of train.py, whose device, loss and normalisation they share.
    """
    import torch
    net = common.build_model(model, N_CLASSES).to(run.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    images = common.normalise(batch[0].to(run.device), run.mean, run.std)
    masks = batch[1].to(run.device).long()

    def take(n):
        for _ in range(n):
            optimizer.zero_grad()
            with common.amp(run.device):
                logits = net(images)
            run.loss(logits, masks).backward()
            optimizer.step()
        wait(run.device)
    return take


def plain_steps(model, batch, device):
    """Return a function that takes n steps as a script of torch and smp does that leaves all at its defaults.

    Float32, contiguous memory, Adam, cross-entropy, a float batch from pageable memory, loss.item() at each step. smp
    has no EfficientDet, so that one is ours.
    """
    import segmentation_models_pytorch as smp
    import torch
    decoder, encoder = common.split_model(model)
    if decoder == "efficientdet":
        net = common.build_model(model, N_CLASSES)
    else:
        net = smp.create_model(decoder.removesuffix("-narrow"), encoder, encoder_weights=None, classes=N_CLASSES)
    net = net.to(device).train()
    optimizer, loss = torch.optim.Adam(net.parameters(), lr=1e-4), torch.nn.CrossEntropyLoss()
    images, masks = batch[0].permute(0, 3, 1, 2).float().div(255).contiguous(), batch[1].long()

    def take(n):
        for _ in range(n):
            optimizer.zero_grad()
            value = loss(net(images.to(device)), masks.to(device))
            value.backward()
            optimizer.step()
            value.item()
        wait(device)
    return take


def step_rows(model, scale, batch, device, rounds, turn, peak):
    """Yield the rows of one model and batch; peak: TFLOP/s of the card."""
    import torch
    free(device)
    run, args, data = start(model, scale, batch, device)
    ours = our_steps(run, args, data)
    started = time.perf_counter()
    ours(1)
    yield note(f"{model} x{batch}, the first step", time.perf_counter() - started, "s")
    ours(3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ours(3)
    memory = train.peak_mb(device) / 1000
    ways = {"ours": ours, "bare": bare_steps(model, data, run), "plain": plain_steps(model, data, device)}
    times = step_seconds(ways, rounds, turn)
    name = f"{model} x{batch}"
    yield faster(f"{name}, bare", times, batch, 0.95, "bare")
    yield faster(f"{name}, plain", times, batch, 2, "plain")
    speed = batch / statistics.median(times["ours"])
    card = train.device_name(device)
    if (model, batch) in TARGETS and ("H100" in card or "H200" in card):
        yield at_least(name, speed, "images/s", TARGETS[model, batch])
    gmacs = train.count_gmacs(common.build_model(model, N_CLASSES), scale)
    tflops = speed * gmacs * 2 * 3 / 1000  # the backward pass computes twice what the forward pass does
    yield note(name, tflops, "TFLOP/s", limit=peak) | {"ratio": tflops / peak}
    yield note(name, memory, "GB at most")


def gpu(device, models=MODELS, batches=BATCHES, scale=512, rounds=3, turn=TURN, side=8192):
    """Time train.py's steps against bare ones and a plain script's, in turn; limit: the card's TFLOP/s."""
    peak = matmul_tflops(device, side)
    yield note(f"matrix product of {side}, bfloat16", peak, "TFLOP/s")
    for model in models:
        for batch in batches:
            yield from step_rows(model, scale, batch, device, rounds, turn, peak)


def gpu_compiled(device, configurations=COMPILED, scale=512, rounds=5, turn=TURN):
    """Time train.py's steps with --compile against those without."""
    import torch
    for model, batch in configurations:
        free(device)
        torch.compiler.reset()
        ways = {"eager": our_steps(*start(model, scale, batch, device))}
        compiled = our_steps(*start(model, scale, batch, device, "--compile"))
        ways["eager"](2)  # finds the algorithms, which is no part of compiling
        started = time.perf_counter()
        compiled(2)
        yield note(f"{model} x{batch}, compiling", time.perf_counter() - started, "s")
        times = step_seconds(ways | {"compiled": compiled}, rounds, turn)
        yield faster(f"{model} x{batch}, compiled", times, batch, 1.4, "eager", ours="compiled")


# ---- epochs and prediction ------------------------------------------------------------------------------------------


def photos():
    """Return a folder of 413 training and 256 test photos of 512 x 512, of which 60 are drawn."""
    return litter("gpu", 413, 256, 60)


def train_model(data, folder, device, report=None, **options):
    """Train fold 0 without weights as train.py does; return the run's folder. options: of train.py."""
    words = ["--data", data, "--exp", folder / "exp", "--cache", bench_rows.OUT / "cache-gpu", "--weights", "none",
             "--device", device]  # by its number: this process holds it already
    for name, value in options.items():
        words += [f"--{name}", value]
    args = train.parse_args(list(map(str, words)))
    with redirect_stdout(StringIO()):
        train.train_run(args, args.exp, report)
    return common.run_folder(args.exp, args.round, args.model, args.scale, args.fold)


def gpu_epoch(device, data=None, model=NARROW, batches=BATCHES, scale=512, epochs=8):
    """Find where the time of an epoch goes, from the third on: 331 training and 82 validation photos."""
    data = data or photos()
    for batch in batches:
        free(device)
        parts = ("train_one_epoch", "validate", "save_epoch", "save_last", "log_row", "draw_some_curves")
        spent, ends = defaultdict(float), []

        def report(epoch, _, spent=spent, ends=ends):
            ends.append({"epoch": time.perf_counter()} | spent)
        with tempfile.TemporaryDirectory(dir=bench_rows.OUT) as folder, timers(train, parts, spent, device):
            out = train_model(data, Path(folder), device, report, model=model, batch=batch, scale=scale, epochs=epochs)
            log = [row for _, row in common.read_rows(out / "log.csv", ("waiting",))][2:]
        yield from epoch_rows(f"{model} x{batch}", ends, parts, [float(row["waiting"]) for row in log])


def epoch_rows(name, ends, parts, waiting):
    """Yield the rows of gpu_epoch.

    ends: at the end of each epoch {"epoch": the time, part: its seconds so far}; waiting: share of each epoch's steps.
    """
    used = {part: [after.get(part, 0) - before.get(part, 0) for before, after in zip(ends[1:], ends[2:], strict=False)]
            for part in ("epoch", *parts)}
    outside = [1 - steps / epoch for steps, epoch in zip(used["train_one_epoch"], used["epoch"], strict=True)]
    yield note(f"{name}, an epoch", statistics.median(used["epoch"]), "s")
    yield bound(f"{name}, waits for photos", 100 * statistics.median(waiting), "% of its steps", 5)
    yield bound(f"{name}, outside of steps", 100 * statistics.median(outside), "% of an epoch", 15)
    means = {part: 1000 * statistics.mean(seconds) for part, seconds in used.items()}
    for part in parts:
        yield note(f"{name}, {part}", means[part], "ms an epoch")
    yield note(f"{name}, the rest", means["epoch"] - sum(means[part] for part in parts), "ms an epoch")


def infer_once(data, checkpoint, out, device, *names):
    """Let infer.py predict the test photos; return {name: seconds} of functions of it and of its "loader"."""
    spent, load_batches = defaultdict(float), infer.load_batches

    def timed_batches(*args, **kwargs):
        batches = load_batches(*args, **kwargs)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            spent["loader"] += time.perf_counter() - started
            if batch is None:
                return
            yield batch
    words = ["--data", data, "--checkpoint", checkpoint, "--split", "test", "--out", out, "--device", device,
             "--cache", bench_rows.OUT / "cache-gpu"]
    loading = patch.object(infer, "load_batches", timed_batches)
    with redirect_stdout(StringIO()), timers(infer, names, spent, device), loading:
        infer.main(infer.parse_args(list(map(str, words))))
    return spent


def bare_forwards(model, batch, scale, device, rounds, turn):
    """Return images/s of the forward passes and softmax of each view of `flip` on a batch on the GPU."""
    import torch
    net = model.to(device, memory_format=torch.channels_last).eval()
    images = torch.randn(batch, 3, scale, scale, device=device).contiguous(memory_format=torch.channels_last)

    def take(n):
        with torch.inference_mode(), common.amp(device):
            for _ in range(n * len(common.tta_views("flip"))):
                net(images).float().softmax(dim=1)
        wait(device)
    return batch / statistics.median(step_seconds({"bare": take}, rounds, turn)["bare"])


def gpu_infer(device, data=None, model=NARROW, scale=512, rounds=5, turn=TURN):
    """Time infer.py on 256 photos with the views of `flip`, and find where its time goes; limit: bare forwards.

    Its parts are timed in a run of their own, which waits for the GPU after each of them.
    """
    data = data or photos()
    free(device)
    parts = ("normalise", "predict_probs", "resize_probs", "write_batch", "join_parts")
    with tempfile.TemporaryDirectory(dir=bench_rows.OUT) as folder:
        folder = Path(folder)
        checkpoint = train_model(data, folder, device, model=model, scale=scale, epochs=1) / "model.pt"
        infer_once(data, checkpoint, folder / "warm", device)
        whole = infer_once(data, checkpoint, folder / "whole", device, "predict_split")["predict_split"]
        spent = infer_once(data, checkpoint, folder / "parts", device, "predict_split", *parts)
        forwards = bare_forwards(common.load_model(checkpoint).model, 8, scale, device, rounds, turn)
    n_photos = len(common.read_json(data / "test.json")["images"])
    name = f"{model}, {n_photos} photos"
    yield note(name, n_photos / whole, "images/s", limit=forwards) | {"ratio": n_photos / whole / forwards}
    total = spent.pop("predict_split")
    for part in ("loader", *parts):
        yield note(f"{name}: {part}", 1000 * spent[part], "ms")
    yield note(f"{name}: the rest", 1000 * (total - sum(spent.values())), "ms")


# ---- profiles -------------------------------------------------------------------------------------------------------


def profiled(take, n, device):
    """Return ({name: number of a step}, tables) of n steps, which are timed before the profiler slows them down."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    take(3)
    started = time.perf_counter()
    take(n)
    wall = time.perf_counter() - started
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        take(n)
    found = profiler.key_averages()
    done = [e for e in found if e.device_type == DeviceType.CUDA and not e.is_user_annotation]

    def count(*words):
        return sum(e.count for e in found if any(word in e.key for word in words)) / n
    numbers = {
        "wall time": 1000 * wall / n, "GPU busy": sum(e.self_device_time_total for e in done) / 1000 / n,
        "kernel launches": count("LaunchKernel", "cudaGraphLaunch"),
        "waits of the CPU": count("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        "pageable copies": sum(e.count for e in done if "Pageable" in e.key) / n}
    tables = [found.table(sort_by=key, row_limit=40, max_name_column_width=90)
              for key in ("self_device_time_total", "self_cpu_time_total")]
    return numbers, "\n".join(tables)


def gpu_profile(device, configurations=PROFILED, scale=512, n=5):
    """Profile n steps of train.py and n bare ones, whose numbers stand under "plain"; write the tables beside."""
    for model, batch in configurations:
        free(device)
        run, args, data = start(model, scale, batch, device)
        ours, tables = profiled(our_steps(run, args, data), n, device)
        bare, bare_tables = profiled(bare_steps(model, data, run), n, device)
        path = bench_rows.OUT / f"profile-{model.replace('/', '-')}-{batch}.txt"
        path.write_text(f"{n} steps of train.py\n{tables}\n{n} bare steps\n{bare_tables}", encoding="utf-8")
        for name, value in ours.items():
            unit = "ms a step" if name in ("wall time", "GPU busy") else "a step"
            yield note(f"{model} x{batch}: {name}", value, unit, plain=bare[name])


# ---- rows -----------------------------------------------------------------------------------------------------------


def gpu_name():
    """Return the name of this machine's GPU, None without one."""
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def on_gpu(row):
    """Return a row that claims a GPU when it begins, as a script does."""
    def call():
        yield from row(common.claim_device())
    return call


ROWS = {row.__name__: on_gpu(row) for row in (gpu, gpu_compiled, gpu_epoch, gpu_infer, gpu_profile)}
