"""Test the project on a real GPU; without one every test here is skipped. `make test-gpu` runs this file.

Most tests call functions in this process. The others look at scripts that run as processes: those start all at once
before the first test, since importing the libraries takes most of their time.
"""
import csv
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import ROOT, run_of
from test_models import SMALLEST, encoder_of
from torch.nn.modules.dropout import _DropoutNd

import common
import infer
import train
from common import UserError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
N_CLASSES, N_STEPS, LR = 12, 20, 1e-3
PRECISIONS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
DECODERS = [f"{decoder}/{encoder_of(decoder)}" for decoder in common.DECODERS]
ENCODERS = ["fpn/resnet18", "fpn/tu-test_convnext", "segformer/mit_b0"]
EPOCHS = 40  # of the scripts: then the model is sure of most pixels


# ---- runs and batches in this process -------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    """Let the CPU compute with 8 threads at most: for nets this small more would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(8, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def begin(line, tmp_path):
    """Return a function (device, more arguments) -> (a new Run in training mode, its arguments)."""
    def start(device, *more):
        args = line(tmp_path, *more)
        run = train.start_run(args, range(N_CLASSES), np.ones(N_CLASSES), None, device)
        run.model.train()
        return run, args
    return start


def use_precision(monkeypatch, dtype):
    """Let train.py's mixed precision be of this type. float16 also switches its GradScaler on."""
    monkeypatch.setattr(train, "amp", lambda device: torch.autocast(device.type, dtype))


def lower_scale(run):
    """Let a GradScaler start at a scale at which no gradient of a small net overflows: no step is skipped."""
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 256.0})


def two_batches(splits, side=64, n_images=8):
    """Return two batches (images uint8 [B, side, side, 3], masks) of the 14 drawn photos of 64 x 64."""
    part, factor = splits[0], side // 64
    batches = []
    for first in (0, 14 - n_images):
        images = torch.from_numpy(np.stack([part.image(i) for i in range(first, first + n_images)]))
        masks = torch.from_numpy(np.stack([part.mask(i) for i in range(first, first + n_images)]))
        images = images.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        batches.append((images, masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)))
    return batches


def take_step(run, args, batch, step=0, lr=LR):
    """Take a step; return (loss, whether it was a bad one)."""
    images, masks = (tensor.to(run.device) for tensor in batch)
    loss, is_bad = train.train_step(run, images, masks, lr, step, N_STEPS, args)
    return loss.item(), bool(is_bad)


# ---- learning -------------------------------------------------------------------------------------------------------


def learn(run, args, batches, monkeypatch):
    """Take N_STEPS steps without dropout, which draws other numbers on each device; return their losses."""
    for module in run.model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # trying algorithms takes longer than the steps
    lower_scale(run)
    losses = []
    for step in range(N_STEPS):
        loss, is_bad = take_step(run, args, batches[step % 2], step, args.lr)
        assert not is_bad, f"step {step} is a bad one"
        losses.append(loss)
    return np.array(losses)


def assert_same_learning(losses, expected):
    """Check that the loss fell as it did on the CPU.

    The CPU's own bfloat16 is up to 0.054 of the fall away from its float32 in a step, and 0.012 at the end. With a
    third or three times the learning rate an SGD is at least 0.15 away.
    """
    end, expected_end = losses[-4:].mean(), expected[-4:].mean()
    fall = expected[0] - expected_end
    assert fall > 0.15, f"nothing is learned on the CPU: {expected}"
    said = f"GPU {losses.round(4).tolist()}, CPU {expected.round(4).tolist()}"
    assert abs(losses - expected).max() < 0.1 * fall and abs(end - expected_end) < 0.05 * fall, said


# a ViT jumps at a larger learning rate, and DPT takes a CPU a second a step with 8 images
@pytest.mark.parametrize(("model", "optimizer", "lr", "n_images"), [
    *((model, "adamw", 3e-4 if model.startswith("dpt/") else LR, 2 if model.startswith("dpt/") else 8)
      for model in DECODERS + ENCODERS), (DECODERS[0], "sgd", 3e-2, 8), ("fpn/tu-test_efficientnet", "sgd", 3e-2, 8)])
def test_every_model_learns_as_in_float32_on_the_cpu(model, optimizer, lr, n_images, begin, splits, monkeypatch):
    side = SMALLEST.get(model.split("/")[0], 64)
    batches = two_batches(splits, side, n_images)
    options = "--model", model, "--scale", side, "--batch", n_images, "--optimizer", optimizer, "--lr", lr
    run, args = begin(CPU, *options)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    expected = learn(run, args, batches, monkeypatch)
    for dtype in (torch.bfloat16, torch.float16):
        use_precision(monkeypatch, dtype)
        run, args = begin(GPU, *options)
        assert run.scaler.is_enabled() == (dtype == torch.float16)
        run.model.load_state_dict(weights)
        assert_same_learning(learn(run, args, batches, monkeypatch), expected)


def state_of(run):
    """Return copies of all that a good step changes: {"weights", "buffers", "optimizer"} -> tensors."""
    remembered = [value for values in run.optimizer.state.values() for value in values.values()]
    groups = {"weights": run.model.parameters(), "buffers": run.model.buffers(),
              "optimizer": [value for value in remembered if isinstance(value, torch.Tensor)]}
    return {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in groups.items()}


def changed(before, after):
    """Return the names of the groups of state_of in which any tensor differs."""
    names = []
    for name, tensors in before.items():
        pairs = zip(tensors, after[name], strict=True)
        if not all(torch.equal(old, new) for old, new in pairs):
            names.append(name)
    return names


@PRECISIONS
@pytest.mark.parametrize("fault", ["input", "gradient"])
@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_a_bad_step_changes_nothing_but_the_average_and_the_scale(optimizer, fault, dtype, begin, splits, monkeypatch):
    use_precision(monkeypatch, dtype)
    run, args = begin(GPU, "--optimizer", optimizer)
    lower_scale(run)
    batch, loss, mean = two_batches(splits)[0], run.loss, run.mean
    assert not any(take_step(run, args, batch, step)[1] for step in range(2))
    before, scale = state_of(run), run.scaler.get_scale()
    average = [tensor.clone() for tensor in run.ema.module.parameters()]
    if fault == "input":  # then batch norm's statistics aren't finite either
        run.mean = (math.nan,) * 3
    else:  # the loss itself is finite
        run.loss = lambda logits, mask: loss(logits, mask) + (logits * 0).sqrt().sum()
    value, is_bad = take_step(run, args, batch, 2)
    assert is_bad and math.isfinite(value) == (fault == "gradient")
    assert changed(before, state_of(run)) == []
    assert any(not torch.equal(*pair) for pair in zip(average, run.ema.module.parameters(), strict=True))
    assert all(tensor.isfinite().all() for tensor in run.ema.module.state_dict().values())
    assert run.scaler.get_scale() == (scale / 2 if dtype == torch.float16 else scale)
    run.loss, run.mean = loss, mean
    assert not take_step(run, args, batch, 3)[1]
    assert changed(before, state_of(run)) == ["weights", "buffers", "optimizer"]


# ---- speed and memory -----------------------------------------------------------------------------------------------


class WatchedBatches:
    """Batches in pinned memory, for train_one_epoch; after the first two, waiting for the GPU is an error."""

    def __init__(self, batches):
        self.batches = [tuple(tensor.pin_memory() for tensor in batch) for batch in batches]

    def __len__(self):
        return 8  # at every tenth step train_one_epoch looks at the loss, for which it waits

    def __iter__(self):
        for step in range(len(self)):
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")
            yield self.batches[step % 2]
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def restore_sync_mode():
    yield
    torch.cuda.set_sync_debug_mode("default")


def options_of_steps():
    """Return lists of options: AdamW's default, all that change what a step does, and every loss without a sort."""
    lists = [[], ["--optimizer", "sgd"], ["--clip", 1], ["--accumulate", 2], ["--class-weights", "inverse"],
             ["--label-smoothing", 0.1], ["--encoder-lr", 0.1]]
    return lists + [["--loss", name] for name in train.LOSSES if name not in ("iou_ce", "lovasz")]


@pytest.mark.parametrize(("dtype", "more"), [
    *((torch.bfloat16, more) for more in options_of_steps()), (torch.float16, []),
    (torch.float16, ["--optimizer", "sgd"])])
def test_no_step_of_an_epoch_waits_for_the_gpu(dtype, more, begin, splits, monkeypatch, restore_sync_mode):
    use_precision(monkeypatch, dtype)
    run, args = begin(GPU, *more)
    row = train.train_one_epoch(run, WatchedBatches(two_batches(splits)), args)
    assert math.isfinite(row["loss"])


def test_a_step_that_waits_for_the_gpu_is_seen(begin, splits, restore_sync_mode):
    run, args = begin(GPU)
    loss = run.loss
    run.loss = lambda logits, mask: loss(logits, mask) * (1 if logits.sum() > 0 else 2)
    with pytest.raises(RuntimeError, match="synchroniz"):
        train.train_one_epoch(run, WatchedBatches(two_batches(splits)), args)


@pytest.fixture
def restore_memory():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    torch.cuda.empty_cache()


def test_a_batch_that_does_not_fit_goes_through_in_halves(begin, restore_memory, monkeypatch, capsys):
    run, args = begin(GPU, "--model", "unet/resnet18", "--scale", 256, "--batch", 96)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # what it tries takes memory of its own
    torch.manual_seed(0)
    batch = torch.randint(256, (96, 256, 256, 3), dtype=torch.uint8), torch.randint(N_CLASSES, (96, 256, 256)).byte()
    losses, allocated, reserved = {}, {}, {}
    for parts in (1, 2, 1, 2):  # the first of each also finds and keeps its algorithms' memory
        run.parts = parts
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        losses[parts], is_bad = take_step(run, args, batch, lr=0)  # the weights stay
        assert not is_bad and run.parts == parts
        allocated[parts], reserved[parts] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    assert allocated[1] > 1.1 * reserved[2] > 1e9, f"{allocated} {reserved}"
    torch.cuda.empty_cache()
    limit = (allocated[1] + reserved[2]) / 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(GPU).total_memory, GPU)
    run.parts = 1
    capsys.readouterr()
    loss, is_bad = take_step(run, args, batch, lr=0)
    assert run.parts in (2, 4) and f"in {run.parts} parts" in capsys.readouterr().out and not is_bad
    assert loss == pytest.approx(losses[2], rel=0.02) and loss == pytest.approx(losses[1], rel=0.05)
    before = state_of(run)
    assert not take_step(run, args, batch, 1)[1]
    assert changed(before, state_of(run)) == ["weights", "buffers", "optimizer"]


@pytest.mark.parametrize("model", ["unet/resnet18", "fpn/tu-test_efficientnet", "deeplabv3plus/tu-test_convnext"])
def test_weights_images_and_maps_are_channels_last(model, begin, splits):
    def is_channels_last(tensor):
        return tensor.is_contiguous(memory_format=torch.channels_last)
    run, args = begin(GPU, "--model", model, "--scale", 128)
    kernels = [p for p in run.model.parameters() if p.ndim == 4]
    assert kernels and all(is_channels_last(p) for p in kernels)
    images, maps, logits = [], [], []
    run.model.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
    common.last_convolution(run.model).register_forward_hook(lambda _, inputs, output: logits.append(output))
    run.model.encoder.register_forward_hook(lambda _, inputs, outputs: maps.append(outputs[-1]))
    take_step(run, args, two_batches(splits, side=128)[0])
    for tensor in (*images, *maps):  # one of a single pixel or channel would be of both kinds
        assert is_channels_last(tensor) and not tensor.is_contiguous()
    assert len(images) == len(maps) == len(logits) == 1 and logits[0].dtype == train.amp(GPU).fast_dtype


# ---- the device -----------------------------------------------------------------------------------------------------


def test_a_gpu_that_torch_was_not_built_for_ends_in_one_line_that_names_it(monkeypatch):
    def fail(name):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\n"
                           "CUDA kernel errors might be asynchronously reported at some other API call\n")
    monkeypatch.setattr(common, "run_kernel", fail)
    common.claim_device.cache_clear()
    with pytest.raises(UserError) as end:
        common.claim_device("cuda:0")
    said = str(end.value)
    assert "\n" not in said and "--device cuda:0" in said and torch.cuda.get_device_name(GPU) in said


def test_a_gpu_that_is_not_there_ends_in_one_line():
    with pytest.raises(UserError, match="^--device cuda:77: [^\n]+$"):
        common.claim_device("cuda:77")


# ---- scripts in this process ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def argv(tiny_data, cache):
    """Return a function (exp, more arguments) -> arguments of train.py on the GPU; later ones win.

    A U-Net has no dropout, so that runs with other processes or compiled code can be compared.
    """
    def arguments(exp, *more):
        return ["--data", tiny_data, "--exp", exp, "--cache", cache, "--model", "unet/tu-test_efficientnet", "--scale",
                64, "--fold", 1, "--folds", 3, "--epochs", EPOCHS, "--batch", 4, "--lr", 5e-3, "--weights", "none",
                "--save-every", 0, "--workers", 0, "--device", "cuda:0", *more]
    return lambda exp, *more: list(map(str, arguments(exp, *more)))


def train_here(arguments):
    """Run train.py in this process; return the folder of its run."""
    args = train.parse_args(arguments)
    train.main(args)
    return run_of(args)


@pytest.fixture(scope="module")
def plain(argv, tmp_path_factory):
    """Return the folder of a run that nothing disturbed; tests only read it."""
    return train_here(argv(tmp_path_factory.mktemp("plain")))


def read_log(folder):
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def assert_same_log(folder, other):
    """Check that two runs learned alike.

    On the CPU a run in bfloat16 has losses up to 6% from those of one in float32, 2% on average, and v3 0.04 away.
    """
    rows, others = read_log(folder), read_log(other)
    losses, other_losses = (np.array([float(row["loss"]) for row in log]) for log in (rows, others))
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in others]
    away = abs(losses / other_losses - 1)
    assert away.max() < 0.2 and away.mean() < 0.06, f"{losses.round(3)}, {other_losses.round(3)}"
    assert losses[-5:].mean() < 0.6 * losses[0]
    assert float(rows[-1]["v3"]) == pytest.approx(float(others[-1]["v3"]), abs=0.15)


def test_a_store_of_the_gpu_is_one_of_the_cpu(plain, tiny_data, cache, tmp_path):
    """On the CPU 99.97% of the pixels are the same in bfloat16 and float32, and no probability differs by over 3."""
    for device in ("cpu", "cuda:0"):
        infer.main(infer.parse_args([
            "--data", str(tiny_data), "--cache", str(cache), "--checkpoint", str(plain / "model.pt"), "--out",
            str(tmp_path / device), "--device", device, "--workers", "0"]))
    for name in ("valid.npy", "test.npy"):
        on_cpu, on_gpu = (np.load(tmp_path / device / name) for device in ("cpu", "cuda:0"))
        classes = on_cpu.argmax(1)
        assert (classes == on_gpu.argmax(1)).mean() > 0.999
        assert abs(on_cpu.astype(int) - on_gpu).max() < 20
        assert (classes > 0).mean() > 0.05 and (on_cpu.max(1) > 200).mean() > 0.5  # it has learned something


class Noted:
    """A loader that notes its batches and whether they are pinned."""

    def __init__(self, loader, batches):
        self.loader, self.batches = loader, batches

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            assert all(tensor.is_pinned() for tensor in batch)
            self.batches.append([tensor.clone() for tensor in batch])
            yield batch


def test_workers_give_the_same_batches_and_pin_them(argv, tmp_path, monkeypatch):
    train_one_epoch, batches = train.train_one_epoch, {}
    for workers in (0, 2):
        noted = batches[workers] = []
        monkeypatch.setattr(train, "train_one_epoch", lambda run, loader, *more, noted=noted, **options:
                            train_one_epoch(run, Noted(loader, noted), *more, **options))
        train_here(argv(tmp_path / str(workers), "--workers", workers, "--epochs", 3, "--augment", "strong",
                        "--classmix", "plain"))
    assert len(batches[0]) == len(batches[2]) == 6
    for batch, other in zip(batches[0], batches[2], strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, other, strict=True))


@pytest.fixture
def nccl(monkeypatch):
    """Let train.py believe in two processes that talk by nccl, of which there is one: two need two GPUs."""
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1,
                                         device_id=GPU)
    monkeypatch.setattr(train, "ranks", lambda: (0, 2))
    yield
    torch.distributed.destroy_process_group()


def test_a_step_over_nccl_is_one_without(begin, splits, monkeypatch, request):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    batches = two_batches(splits)
    run, args = begin(GPU, "--model", "unet/tu-test_efficientnet")
    expected = [take_step(run, args, batches[step % 2], step)[0] for step in range(4)]
    request.getfixturevalue("nccl")
    run, args = begin(GPU, "--model", "unet/tu-test_efficientnet")
    assert isinstance(run.forward, torch.nn.parallel.DistributedDataParallel)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in run.model.modules())
    losses = [2 * take_step(run, args, batches[step % 2], step)[0] for step in range(4)]  # a half of two processes
    assert losses == pytest.approx(expected, rel=0.02) and expected[-1] < expected[0]
    train.share_buffers(run)


# ---- scripts as processes -------------------------------------------------------------------------------------------


class Script:
    """A script as a process of its own, which is killed at the line that has `kill_at` in it."""

    def __init__(self, *command, kill_at=None, **env):
        env = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"} | env
        self.process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.STDOUT, start_new_session=True, env=env)
        self.text, self.kill_at, self.unread = "", kill_at, queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            if self.kill_at and self.kill_at in line:
                self.kill()
            self.unread.put(line)
        self.unread.put("")  # the end

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait_for(self, pattern, seconds=150):
        """Return what the first line that matches has of the pattern; fail if none comes."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self.unread.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no {pattern!r} in {seconds} s, but: {self.text}")
            self.text += line
            if found := re.search(pattern, line):
                return found[0]
            assert line, f"ended without {pattern!r}: {self.text}"

    def finish(self, code=0):
        """Wait for the end, which must have this exit code; return all that was printed."""
        self.wait_for(r"\A\Z")  # an empty string, not an empty line
        assert self.process.wait(10) == code, self.text
        return self.text


@pytest.fixture(scope="module")
def jobs(argv, tmp_path_factory):
    """Start the processes of all tests below; return (their folder, {name: Script})."""
    folder, script = tmp_path_factory.mktemp("jobs"), ROOT / "train.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    endless = ["--epochs", 100_000, "--save-every", 60, "--device", "auto"]
    commands = {
        "killed": [script, *argv(folder / "killed")],
        "compiled": [script, *argv(folder / "compiled", "--batch", 9, "--compile")],
        "one": [*torchrun, 1, script, *argv(folder / "one", "--device", "auto")],
        "two": [*torchrun, 2, script, *argv(folder / "two")],
        "runtimes": [script, *argv(folder / "runtimes", "--runtimes", folder / "runtimes.csv", "--seconds", 4)],
        "this": [script, *argv(folder / "this", *endless)],
        "that": [script, *argv(folder / "that", *endless)]}
    for name in ("own", "shared"):
        (folder / name).mkdir()
    # the locks of GPUs lie in the folder for temporary files: these jobs wait for nobody else's
    places = {"one": "own", "this": "shared", "that": "shared"}
    scripts = {}
    try:
        for name, command in commands.items():
            env = {"TMPDIR": str(folder / places[name])} if name in places else {}
            kill_at = f" epoch {EPOCHS // 2}/" if name == "killed" else None
            scripts[name] = Script(*command, kill_at=kill_at, **env)
        yield folder, scripts
    finally:
        for each in scripts.values():
            each.kill()
            each.process.wait()


@pytest.fixture(scope="module", autouse=True)
def early(request):
    """Start the processes before the first test, if any test needs them."""
    if any("jobs" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("jobs")


def run_in(folder):
    """Return the folder of the run of the experiment `folder`."""
    return folder / "r0/unet/tu-test_efficientnet/s64/f1"


def epochs_in(text):
    """Return the numbers of the epochs that were printed as done."""
    return [int(n) for n in re.findall(r" epoch (\d+)/\d+ loss ", text)]


def test_two_processes_share_the_gpu_over_gloo(jobs, plain):
    folder, scripts = jobs
    assert epochs_in(scripts["two"].finish()) == list(range(1, EPOCHS + 1))
    assert_same_log(run_in(folder / "two"), plain)


def test_torchrun_with_one_process_is_a_plain_run(jobs, plain):
    folder, scripts = jobs
    assert epochs_in(scripts["one"].finish()) == list(range(1, EPOCHS + 1))
    assert_same_log(run_in(folder / "one"), plain)


def test_runtimes_measures_the_gpu(jobs):
    folder, scripts = jobs
    scripts["runtimes"].finish()
    with open(folder / "runtimes.csv", newline="") as f:
        row, = csv.DictReader(f)
    assert row["reason"] == "" and row["device"] == torch.cuda.get_device_name(GPU)
    assert all(float(row[name]) > 0 for name in train.RUNTIMES)
    # weights and their copies by EMA and optimizer, 4 bytes each, up to some GB
    assert 16 * float(row["params_m"]) < float(row["peak_mb"]) < 4000
    assert (folder / "runtimes.png").exists()


def test_a_killed_run_carries_on_where_it_was(jobs, plain, argv):
    folder, scripts = jobs
    before = epochs_in(scripts["killed"].finish(-signal.SIGKILL))
    n_done = len(read_log(run_in(folder / "killed")))
    assert before == list(range(1, len(before) + 1)) and EPOCHS // 2 <= len(before) <= n_done < EPOCHS
    again = Script(ROOT / "train.py", *argv(folder / "killed"))
    try:
        text = again.finish()
    finally:
        again.kill()
    kept = int(re.search(r"resuming after epoch (\d+)\n", text)[1])
    assert kept in (n_done, n_done - 1) and epochs_in(text) == list(range(kept + 1, EPOCHS + 1))
    assert_same_log(run_in(folder / "killed"), plain)


def test_a_second_job_waits_until_the_first_is_killed(jobs):
    pair = [jobs[1][name] for name in ("this", "that")]
    said = [script.wait_for("all GPUs are taken: waiting for one| epoch 1/") for script in pair]
    assert sorted(said) == [" epoch 1/", "all GPUs are taken: waiting for one"]
    first, second = pair if said[0] == " epoch 1/" else pair[::-1]
    assert first.process.poll() is None and not epochs_in(second.text)
    first.kill()
    second.wait_for(" epoch 2/", 60)
    second.kill()


def test_a_compiled_run_is_one_that_is_not(jobs, argv, tmp_path, splits):
    folder, scripts = jobs
    plain = train_here(argv(tmp_path, "--batch", 9))
    scripts["compiled"].finish()
    compiled = run_in(folder / "compiled")
    assert_same_log(compiled, plain)
    states = [common.load_checkpoint(run / "model.pt")["model"] for run in (compiled, plain)]
    assert states[0].keys() == states[1].keys()
    models = [common.load_model(run / "model.pt") for run in (compiled, plain)]
    for i in range(len(splits[1].ids)):
        probs, expected = (common.predict_photo(trained, splits[1].image(i)) for trained in models)
        assert abs(probs - expected).mean() < 0.02 and (probs.argmax(0) == expected.argmax(0)).mean() > 0.9
