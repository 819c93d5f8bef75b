"""Test the project on a real GPU; without one every test here is skipped. `make test-gpu` runs this file.

Most tests call functions in this process. The others look at scripts that run as processes, or at what a pool of
processes has learned: all of those start before the first test, since importing the libraries takes most of their time.

cuDNN compiles a depthwise convolution for a second or two, anew for every shape, type and process. So only the models
whose learning is looked at have any.
"""
import csv
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import active_children, get_context

import numpy as np
import pytest
import torch
from conftest import ROOT, run_of
from test_models import ENCODERS, SMALLEST
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten

import common
import infer
import train
from common import UserError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
N_CLASSES, N_STEPS, LR, SIDE, BATCH = 12, 20, 1e-3, 64, 4
PRECISIONS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
OPTIMIZERS = pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
# their encoder has batch norm, but no depthwise convolution
MODEL, MODEL_WITH_DROPOUT = "segformer/tu-test_byobnet", "fpn/tu-test_byobnet"
MODELS = [*(f"{decoder}/{ENCODERS.get(decoder, 'tu-test_byobnet')}" for decoder in common.DECODERS),
          "fpn/resnet18", "fpn/tu-test_efficientnet", "fpn/tu-test_convnext", "segformer/mit_b0"]
SIDES = SMALLEST | {"efficientdet": 128}  # at 64 batch norm sees a pixel of each image in three of its maps
EPOCHS = 16  # of the scripts: then the model is sure of most pixels
SECONDS = 60  # that a test may take


@pytest.fixture(autouse=True)
def alarm():
    """End a test that hangs. A wait for the GPU hears no signal: `make test-gpu` lets that end the process, later."""
    def ring(*_):
        pytest.fail(f"not done in {SECONDS} s")
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- runs and batches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let the CPU compute with one thread: for nets this small more would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_run(args, device, resume=None):
    """Return a Run in training mode."""
    run = train.start_run(args, range(N_CLASSES), np.ones(N_CLASSES), resume, device)
    run.model.train()
    return run


@pytest.fixture
def begin(line, tmp_path):
    """Return a function (more arguments) -> (a new Run on the GPU, its arguments)."""
    def start(*more):
        args = line(tmp_path, "--model", MODEL_WITH_DROPOUT, *more)
        return new_run(args, GPU), args
    return start


def use_precision(monkeypatch, dtype):
    """Let train.py's mixed precision be of this type. float16 also switches its GradScaler on."""
    monkeypatch.setattr(train, "amp", lambda device: torch.autocast(device.type, dtype))


def lower_scale(run):
    """Let a GradScaler start at a scale at which no gradient of a small net overflows: no step is skipped."""
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 256.0})


def two_batches(splits, side=SIDE):
    """Return two batches (images uint8 [B, side, side, 3], masks), numpy, of the drawn photos of 64 x 64."""
    part, factor = splits[0], side // SIDE
    batches = []
    for first in (0, BATCH):
        images = np.stack([part.image(i) for i in range(first, first + BATCH)])
        masks = np.stack([part.mask(i) for i in range(first, first + BATCH)])
        batches.append(tuple(array.repeat(factor, 1).repeat(factor, 2) for array in (images, masks)))
    return batches


def take_step(run, args, batch, step=0, lr=LR):
    """Take a step; return (loss, whether it was a bad one)."""
    images, masks = (torch.as_tensor(array).to(run.device) for array in batch)
    loss, is_bad = train.train_step(run, images, masks, lr, step, N_STEPS, args)
    return loss.item(), bool(is_bad)


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


# ---- bad steps, resuming --------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("fault", ["input", "gradient"])
@OPTIMIZERS
def test_a_bad_step_changes_nothing_but_the_average_and_the_scale(optimizer, dtype, fault, begin, splits, monkeypatch):
    use_precision(monkeypatch, dtype)
    run, args = begin("--optimizer", optimizer)
    lower_scale(run)
    batch, loss, mean = two_batches(splits)[0], run.loss, run.mean
    assert not any(take_step(run, args, batch, step)[1] for step in range(3))
    before, scale = state_of(run), run.scaler.get_scale()
    average = [tensor.clone() for tensor in run.ema.module.parameters()]
    if fault == "input":  # then batch norm's statistics aren't finite either
        run.mean = (math.nan,) * 3
    else:  # the loss itself is finite
        run.loss = lambda logits, mask: loss(logits, mask) + (logits * 0).sqrt().sum()
    value, is_bad = take_step(run, args, batch, 3)
    assert is_bad and math.isfinite(value) == (fault == "gradient")
    assert changed(before, state_of(run)) == []
    assert any(not torch.equal(*pair) for pair in zip(average, run.ema.module.parameters(), strict=True))
    assert all(tensor.isfinite().all() for tensor in run.ema.module.state_dict().values())
    assert run.scaler.get_scale() == (scale / 2 if dtype == torch.float16 else scale)
    run.loss, run.mean = loss, mean
    assert not take_step(run, args, batch, 4)[1]
    assert changed(before, state_of(run)) == ["weights", "buffers", "optimizer"]


@PRECISIONS
@OPTIMIZERS
def test_a_run_is_put_back_on_the_gpu_as_it_was(optimizer, dtype, begin, splits, tmp_path, monkeypatch):
    use_precision(monkeypatch, dtype)
    run, args = begin("--model", MODEL, "--optimizer", optimizer)
    lower_scale(run)
    batches = two_batches(splits)
    for step in range(3):
        assert not take_step(run, args, batches[step % 2], step)[1]
    run.total += 1
    train.save_last(run, {}, tmp_path, step=3)
    again = new_run(args, GPU, train.find_last(tmp_path))
    assert torch.equal(run.total, again.total) and again.step == 3
    for name in train.STATES:
        (values, form), (others, other_form) = (tree_flatten(getattr(each, name).state_dict()) for each in (run, again))
        assert form == other_form and (values or name == "scaler")
        for value, other in zip(values, others, strict=True):  # torch.equal refuses tensors of two devices
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    before = state_of(again)
    losses = [take_step(each, args, batches[1], 3)[0] for each in (run, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert changed(before, state_of(again)) == ["weights", "buffers", "optimizer"]


# ---- speed and memory -----------------------------------------------------------------------------------------------


class WatchedBatches:
    """Batches in pinned memory, for train_one_epoch; after the first two, waiting for the GPU is an error."""

    def __init__(self, batches):
        self.batches = [tuple(torch.from_numpy(array).pin_memory() for array in batch) for batch in batches]

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
    run, args = begin(*more)
    row = train.train_one_epoch(run, WatchedBatches(two_batches(splits)), args)
    assert math.isfinite(row["loss"])


def test_a_step_that_waits_for_the_gpu_is_seen(begin, splits, restore_sync_mode):
    run, args = begin()
    loss = run.loss
    run.loss = lambda logits, mask: loss(logits, mask) * (1 if logits.sum() > 0 else 2)
    with pytest.raises(RuntimeError, match="synchroniz"):
        train.train_one_epoch(run, WatchedBatches(two_batches(splits)), args)


@pytest.fixture
def restore_memory():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    torch.cuda.empty_cache()


def test_a_batch_that_does_not_fit_goes_through_in_halves(begin, restore_memory, capsys):
    run, args = begin("--model", "unet/resnet18", "--scale", 256, "--batch", 96)
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


@pytest.mark.parametrize("model", ["unet/resnet18", "deeplabv3/tu-test_byobnet", "fpn/tu-test_convnext"])
def test_weights_images_and_maps_are_channels_last(model, begin, splits):
    def is_channels_last(tensor):
        return tensor.is_contiguous(memory_format=torch.channels_last)
    run, args = begin("--model", model, "--scale", 128)
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
    common.claim_device.cache_clear(), common.idle_gpu.cache_clear()
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

    The model has no dropout, so that runs with other processes or compiled code can be compared.
    """
    def arguments(exp, *more):
        return ["--data", tiny_data, "--exp", exp, "--cache", cache, "--model", MODEL, "--scale", SIDE, "--fold", 1,
                "--folds", 3, "--epochs", EPOCHS, "--batch", BATCH, "--lr", 5e-3, "--weights", "none", "--workers", 0,
                "--device", "cuda:0", *more]
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


def assert_same_log(folder, other, largest=0.15, mean=0.04):
    """Check that two runs learned alike: how far the losses of epochs may be apart.

    On the CPU bfloat16 brings the losses up to 4% from those of float32. An optimizer that starts anew amid the run
    brings them up to 26% away, 7% on average.
    """
    rows, others = read_log(folder), read_log(other)
    losses, other_losses = (np.array([float(row["loss"]) for row in log]) for log in (rows, others))
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in others]
    away = abs(losses / other_losses - 1)
    assert away.max() < largest and away.mean() < mean, f"{losses.round(3)}, {other_losses.round(3)}"
    assert losses[-5:].mean() < 0.6 * losses[0]
    assert float(rows[-1]["v3"]) == pytest.approx(float(others[-1]["v3"]), abs=0.15)


def test_a_store_of_the_gpu_is_one_of_the_cpu(plain, tiny_data, cache, tmp_path):
    """On the CPU 99.96% of the pixels are the same in bfloat16 and float32, and no probability differs by over 2."""
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
    assert len(batches[0]) == len(batches[2]) == 9
    for batch, other in zip(batches[0], batches[2], strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, other, strict=True))


@pytest.fixture
def nccl(monkeypatch):
    """Claim the GPU as one of two processes that talk by nccl, of which there is one: two need two GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "RANK": 0, "LOCAL_RANK": 0,
                 "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    for module in (common, train):
        monkeypatch.setattr(module, "ranks", lambda: (0, 2))
    common.claim_device.cache_clear(), common.idle_gpu.cache_clear()
    assert common.claim_device("auto") == GPU
    yield
    torch.distributed.destroy_process_group()
    common.claim_device.cache_clear(), common.idle_gpu.cache_clear()


def test_a_step_over_nccl_is_one_without(begin, splits, monkeypatch, request):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    batches = two_batches(splits)
    run, args = begin("--model", MODEL)
    expected = [take_step(run, args, batches[step % 2], step)[0] for step in range(4)]
    request.getfixturevalue("nccl")
    run, args = begin("--model", MODEL)
    assert isinstance(run.forward, torch.nn.parallel.DistributedDataParallel)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in run.model.modules())
    losses = [2 * take_step(run, args, batches[step % 2], step)[0] for step in range(4)]  # a half of two processes
    assert losses == pytest.approx(expected, rel=0.02) and expected[-1] < expected[0]
    train.share_buffers(run)


def test_runtimes_measures_the_gpu(argv, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    train.main(train.parse_args(argv(tmp_path, "--runtimes", tmp_path / "runtimes.csv", "--seconds", 2)))
    with open(tmp_path / "runtimes.csv", newline="") as f:
        row, = csv.DictReader(f)
    assert row["reason"] == "" and row["device"] == torch.cuda.get_device_name(GPU)
    assert all(float(row[name]) > 0 for name in train.RUNTIMES)
    # weights and their copies by EMA and optimizer, 4 bytes each, up to some GB
    assert 16 * float(row["params_m"]) < float(row["peak_mb"]) < 4000
    assert (tmp_path / "runtimes.png").exists()


# ---- learning, in a pool of processes -------------------------------------------------------------------------------


def learn(args, batches, device, dtype):
    """Take N_STEPS steps without dropout, which draws other numbers on each device; return their losses."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if dtype:
            use_precision(patch, dtype)
        run = new_run(args, device)  # the seed decides its weights
        assert run.scaler.is_enabled() == (dtype == torch.float16)
        for module in run.model.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
        lower_scale(run)
        losses = []
        for step in range(N_STEPS):
            loss, is_bad = take_step(run, args, batches[step % 2], step, args.lr)
            assert not is_bad, f"step {step} is a bad one"
            losses.append(loss)
    return np.array(losses)


@pytest.fixture(scope="module")
def learned(request, line, splits, tmp_path_factory):
    """Return {(model, optimizer, lr, dtype): Future of the losses}; the dtype None stands for the CPU in float32.

    They are computed by processes beside the tests, for the tests that were chosen.
    """
    folder, futures = tmp_path_factory.mktemp("learned"), {}
    settings = [item.callspec.params for item in request.session.items if "learned" in item.fixturenames]
    settings.sort(key=lambda setting: not setting["model"].startswith("dpt/"))  # which takes the CPU longest
    pool = ProcessPoolExecutor(5, get_context("spawn"))
    try:
        for setting in settings:
            model, optimizer, lr = (setting[name] for name in ("model", "optimizer", "lr"))
            side = SIDES.get(model.split("/")[0], SIDE)
            args = line(folder, "--model", model, "--scale", side, "--optimizer", optimizer, "--lr", lr)
            for device, dtype in ((CPU, None), (GPU, setting["dtype"])):
                key = model, optimizer, lr, dtype
                if key not in futures:
                    futures[key] = pool.submit(learn, args, two_batches(splits, side), device, dtype)
        yield futures
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():  # one that hangs would be waited for at the end
            process.kill()


def assert_same_learning(losses, expected):
    """Check that the loss fell as it did on the CPU.

    The CPU's own bfloat16 is up to 0.029 of the fall away from its float32 in a step, and 0.010 at the end. With a
    third or three times the learning rate an SGD is at least 0.11 away in a step.
    """
    end, expected_end = losses[-4:].mean(), expected[-4:].mean()
    fall = expected[0] - expected_end
    assert fall > 0.15, f"nothing is learned on the CPU: {expected}"
    said = f"GPU {losses.round(4).tolist()}, CPU {expected.round(4).tolist()}"
    assert abs(losses - expected).max() < 0.1 * fall and abs(end - expected_end) < 0.05 * fall, said


@PRECISIONS
@pytest.mark.parametrize(("model", "optimizer", "lr"), [
    *((model, "adamw", 3e-4 if model.startswith("dpt/") else LR) for model in MODELS),  # a ViT jumps at a larger one
    (MODEL, "sgd", 3e-2), (MODEL_WITH_DROPOUT, "sgd", 3e-2)])
def test_every_model_learns_as_in_float32_on_the_cpu(model, optimizer, lr, dtype, learned):
    losses, expected = (learned[model, optimizer, lr, each].result(SECONDS) for each in (dtype, None))
    assert_same_learning(losses, expected)


# ---- scripts as processes -------------------------------------------------------------------------------------------


class Script:
    """A script as a process of its own, which is killed at the line that has `kill_at` in it."""

    def __init__(self, *command, kill_at=None, **env):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | env
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

    def wait_for(self, pattern, seconds=SECONDS - 10):
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
    """Start the processes of all tests below; return (their folder, {name: Script}, locks of the GPUs).

    As a job that was started before it would, this process holds the GPUs until a test lets them go.
    """
    folder, script = tmp_path_factory.mktemp("jobs"), ROOT / "train.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    locks, scripts = [], {}
    try:
        with pytest.MonkeyPatch.context() as patch:  # the locks lie in the folder for temporary files
            patch.setattr(tempfile, "tempdir", str(folder))
            for _ in range(torch.cuda.device_count()):
                common.idle_gpu(1)
                locks.append(common.idle_gpu.lock)
        scripts["compiled"] = Script(script, *argv(folder / "compiled", "--compile"), TORCHINDUCTOR_COMPILE_THREADS="4")
        scripts["two"] = Script(*torchrun, script, *argv(folder / "two", "--loss", "ce"))
        scripts["killed"] = Script(script, *argv(folder / "killed", "--save-every", 0, "--device", "auto"),
                                   kill_at=f" epoch {EPOCHS // 2}/", TMPDIR=str(folder))
        yield folder, scripts, locks
    finally:
        release(locks)
        for each in scripts.values():
            each.kill()
            each.process.wait()


def release(locks):
    while locks:
        locks.pop().__exit__(None, None, None)


@pytest.fixture(scope="module")
def killed(jobs):
    """Let go the GPU that the run "killed" waits for, once it waits; return (its Script, its folder)."""
    folder, scripts, locks = jobs
    script = scripts["killed"]
    script.wait_for("all GPUs are taken: waiting for one")
    release(locks)
    return script, run_in(folder / "killed")


@pytest.fixture(scope="module", autouse=True)
def early(request):
    """Start the processes before the first test, if any test needs them."""
    needed = set().union(*(getattr(item, "fixturenames", ()) for item in request.session.items))
    for name in {"jobs", "learned"} & needed:
        request.getfixturevalue(name)


def run_in(folder):
    """Return the folder of the run of the experiment `folder`."""
    return folder / "r0" / MODEL / f"s{SIDE}" / "f1"


def epochs_in(text):
    """Return the numbers of the epochs that were printed as done."""
    return [int(n) for n in re.findall(r" epoch (\d+)/\d+ loss ", text)]


def test_a_job_waits_until_the_gpu_is_let_go(killed):
    script, _ = killed
    script.wait_for(" epoch 1/")
    assert not epochs_in(script.text.partition("waiting for one")[0])


def test_two_processes_share_the_gpu_over_gloo(jobs, argv, tmp_path):
    """The mean cross-entropy of two halves is that of the whole; a region loss of them would be another one."""
    folder, scripts, _ = jobs
    alone = train_here(argv(tmp_path, "--loss", "ce"))
    assert epochs_in(scripts["two"].finish()) == list(range(1, EPOCHS + 1))
    assert_same_log(run_in(folder / "two"), alone, largest=0.2, mean=0.06)


def test_a_killed_run_carries_on_where_it_was(killed, plain, argv, capsys):
    script, folder = killed
    before = epochs_in(script.finish(-signal.SIGKILL))
    n_done = len(read_log(folder))
    assert before == list(range(1, len(before) + 1)) and EPOCHS // 2 <= len(before) <= n_done < EPOCHS
    capsys.readouterr()
    train_here(argv(folder.parents[4], "--save-every", 0))
    text = capsys.readouterr().out
    kept = int(re.search(r"resuming after epoch (\d+)\n", text)[1])
    assert kept in (n_done, n_done - 1) and epochs_in(text) == list(range(kept + 1, EPOCHS + 1))
    assert_same_log(folder, plain)


def test_a_compiled_run_is_one_that_is_not(jobs, plain, splits):
    folder, scripts, _ = jobs
    scripts["compiled"].finish()
    compiled = run_in(folder / "compiled")
    assert_same_log(compiled, plain)
    states = [common.load_checkpoint(run / "model.pt")["model"] for run in (compiled, plain)]
    assert states[0].keys() == states[1].keys()
    models = [common.load_model(run / "model.pt") for run in (compiled, plain)]
    for i in range(len(splits[1].ids)):
        probs, expected = (common.predict_photo(trained, splits[1].image(i)) for trained in models)
        assert abs(probs - expected).mean() < 0.02 and (probs.argmax(0) == expected.argmax(0)).mean() > 0.9
