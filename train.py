"""Train one model on one fold at one scale.

    python train.py --data DATA --exp out/main --scale 512 --fold 0

Writes EXP/rROUND/MODEL/sSCALE/fFOLD/: batch.png (the first batch), log.csv, curves.png, last.pt
once a minute and, when training is done, valid.png (the worst, median and best images), model.pt
and, last, config.json, which says what made it. The same line again resumes after an interruption
and does nothing when the run is done. When an edited script would make it otherwise,
--code says what is to happen. --snapshots K also keeps K epoch-*.pt.

Other jobs: --check looks at the data, --overfit N tries whether a model learns at all, --sweep N
looks for the best recipe, --runtimes CSV measures the speed of a model.
"""
import argparse
import gc
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten

import numpy as np
from tqdm import tqdm

from common import (
    ALL, AUGMENTATIONS, COLOURS, CROPS, DATA_OPTIONS, DECODERS, DERIVED, DESCRIBED,
    GPU_MEMORY_WORDS, HOOK, IGNORE_INDEX, LOSSES, METRICS, MODEL_KINDS, STEP, STRIDE, SUBMIT_SIZE,
    TRAIN_KNOBS, TRAIN_ONLY, EpochBatches, EvalPhotos, Hashes, Parser, TrainSamples, UserError,
    add_data_options, amp, as_number, atomic_write, batch_bytes, begun_files, build_model,
    check_labels, check_output, check_shared_memory, check_space, check_unseen, checked,
    checkpoint_gradients, claim_device, code_of, confusion, data_options, decide, different_keys,
    draw_bars, draw_heat, encoder_mean_std, figure_urls, fold_name, folds_hash, foreground_ids,
    full_batch, guarded, has_kinds, image_miou, join_photos, keep_code, last_convolution,
    layer_factors, load_checkpoint, load_data, load_extra, load_folds, load_labels, load_unlabelled,
    load_weights, loader_options, loader_workers, lock, make_augmentation, make_loss, move_aside,
    named, normalise, number, overlay, pixel_weights, predict_windows, provenance, ranks, rare_odds,
    read_description, read_image, read_rows, recipe_changes, resize_probs, run_code, run_folder,
    run_recipe, run_script, save_checkpoint, scores, signals_later, split_model, this_process,
    tile_url, try_sides, weights_file, weights_learnt_from, write_csv, write_description,
    write_page, write_sheet)

OVERFIT_V3 = 0.9  # what --overfit must reach on its own training images
MAX_SKIPPED = 10  # steps in a row without a finite gradient that end a run
LOGGERS = ("tensorboard", "wandb")
CONFIG_KINDS = {"classes": [str], "epoch": int, "v3": float}  # see has_kinds; besides DESCRIBED
# what decides no result; see BESIDE in common.py
BESIDE = {
    "CONFIG_KINDS", "begin", "check_args", "check_folder", "check_run_space", "choose_resume",
    "describe_photos", "describe_run", "draw_batch", "draw_curves", "draw_some_curves",
    "draw_valid", "find_done", "find_finished", "find_last", "images_of", "in_shared_memory",
    "keeps_done", "log_row", "model_files", "run_that_stands", "show_progress", "start_logger",
    "warn_of_absent_classes", "write_config"}

# ---- what to try: schedules, optimizers, batch hooks ---------------------------------------------

# name -> share of the peak learning rate at t in [0, 1), from the end of the warm-up to the end of
# the run; n: number of cycles
SCHEDULES = {
    "cosine": lambda t, n: 0.5 + 0.5 * math.cos(math.pi * t),
    "restarts": lambda t, n: 0.5 + 0.5 * math.cos(math.pi * (t * n % 1)),
    "poly": lambda t, n: (1 - t) ** 0.9,
    "multistep": lambda t, n: 0.1 ** ((t >= 0.6) + (t >= 0.85)),
    "constant": lambda t, n: 1.0,
    "onecycle": lambda t, n: 1 - t}


def adamw(groups, lr):
    import torch
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def sgd(groups, lr):
    """Return SGD with Nesterov momentum 0.9, whose buffers start at 0.

    torch creates them at the first step, which may be skipped.
    """
    import torch
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# name -> function (parameter groups, peak learning rate) -> torch.optim.Optimizer
OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


def mixup(images, masks, rng):
    """Mix each image with another of the batch (mixup, arXiv 1710.09412).

    A pixel of the mask is that of one of the two, drawn in proportion to their shares: over many
    steps the cross-entropy is that of the mixed labels.
    """
    import torch
    share = float(rng.beta(0.4, 0.4))
    other_images, other_masks = images.roll(1, dims=0), masks.roll(1, dims=0)
    takes_own = torch.from_numpy(rng.random(tuple(masks.shape)) < share).to(masks.device)
    return share * images + (1 - share) * other_images, masks.where(takes_own, other_masks)


def multiscale(images, masks, rng):
    """Resize the batch to a size drawn from 0.75 to 1.25 times its own, a multiple of STRIDE.

    Near 48 there is none, and it is 64.
    """
    from torch.nn.functional import interpolate
    side = masks.shape[-1]
    low, high = math.ceil(0.75 * side / STRIDE), math.floor(1.25 * side / STRIDE)
    side = STRIDE * int(rng.integers(low, max(low, high) + 1))
    images = interpolate(images, (side, side), mode="bilinear", antialias=True)
    masks = interpolate(masks[:, None].float(), (side, side), mode="nearest-exact")
    return images, masks[:, 0].long()


# name -> function (images float32 [B, 3, H, W] normalised, masks int64 [B, H, W], rng) -> the same
# as they go into the model. It changes neither in place and draws from rng alone, a numpy Generator
# that is the same on all processes of a run.
BATCH_HOOKS = {"none": lambda images, masks, rng: (images, masks), "mixup": mixup,
               "multiscale": multiscale}

# ---- options -------------------------------------------------------------------------------------

# every option that decides the result of a run, besides those of "what to train":
# name -> (type or choices, default, what it is). A new one makes the runs before it be made anew.
RECIPE = {
    "weights": (str, "imagenet", "of the encoder: imagenet (downloaded), none, a file, of timm, "
                                 "torchvision or smp, or a model.pt, whose decoder is taken too; "
                                 "or a folder of files named after encoders"),
    "epochs": (number(int, 1), 40, "with --overfit: at most"),
    "batch": (number(int, 2, 4096), 8, "images in a step, over all GPUs"),
    "accumulate": (number(int, 1), 1, "parts in which a batch goes through the model: saves "
                                      "memory"),
    "optimizer": (tuple(OPTIMIZERS), "adamw", "sgd (Nesterov, 0.9) wants a larger --lr"),
    "lr": (number(float, 0, 10), 4e-3, "peak; FPNs learned more with 5e-3 than with 2e-3"),
    "encoder_lr": (number(float, 0, 10), 0.5, "of the encoder, as a multiple of --lr; 1 without "
                                              "pretrained weights"),
    "layer_decay": (number(float, 0.01, 1), 1.0, "of the encoder's learning rate, from each layer "
                                                 "to the one below it"),
    "drop_path": (number(float, 0, 0.9), 0.0, "stochastic depth of the encoder, the rate of its "
                                              "last block; 0: as the encoder has it"),
    "freeze": (number(int, 0), 0, "epochs at the start in which the encoder doesn't learn"),
    "schedule": (tuple(SCHEDULES), "cosine", "of the learning rate"),
    "warmup": (number(float, 0, 0.9), 0.05, "share of the run; onecycle usually has 0.3"),
    "cycles": (number(int, 1, 1000), 3, "of the schedule restarts"),
    "snapshots": (number(int, 0), 0, "epochs kept: last valleys of restarts, else of the last "
                                     "half"),
    "weight_decay": (number(float, 0, 1), 1e-2, "not of norms and biases"),
    "clip": (number(float, 0), 0.0, "largest norm of the gradient; 0: any"),
    "loss": (tuple(LOSSES), "iou_ce", "over the labelled pixels"),
    "loss_ratio": (number(float, 0, 1), 0.4, "share of the region term in a loss that has both"),
    "label_smoothing": (number(float, 0, 0.99), 0.0, "of cross-entropy and focal"),
    "class_weights": (("none", "inverse"), "none", "of cross-entropy and focal, to its pixels"),
    "crop": (CROPS, "photo", "what a model sees: the whole photo squashed to the scale, or native, "
                             "squares of the photo's own resolution, for small objects"),
    "repeat": (number(int, 1, 1000), 1, "times that each photo comes in an epoch: a large one has "
                                        "many squares"),
    "augment": (tuple(AUGMENTATIONS), "basic", "see AUGMENTATIONS in common.py"),
    "classmix": (("none", "plain", "weighted"), "none", "paste half an image's (rare) classes"),
    "classmix_prob": (number(float, 0, 1), 0.5, "share of the images that are pasted on"),
    "batch_hook": (tuple(BATCH_HOOKS), "none", "what happens to a batch before the model"),
    "sampler": (("all", "rare"), "all", "all images once an epoch, or rather those of rare "
                                        "classes"),
    "pseudo_ratio": (number(float, 0), 0.0, "pseudo labels to a labelled image; 0: as they come"),
    "labelled_only": (number(float, 0, 1), 0.0, "share of the run, its end, without pseudo labels"),
    "ema": (number(float, 0, 0.99999), 0.998, "decay of the weights' average; smaller at first"),
    "soup": (number(int, 0, 100), 0, "epochs, as of --snapshots, whose weights are averaged with "
                                     "the best one's, each if the score rises by it"),
    "metric": (METRICS, "v3", "score that chooses the epoch, v3 and v1 together with v2"),
    "seed": (number(int, 0, 2 ** 31 - 1), 0, "of everything random")}

# what --sweep tries: option -> its choices, or ("even", lowest, highest), ("log", lowest, highest)
SEARCH_SPACE = {
    "model": ("fpn/tu-tf_efficientnet_lite0", "fpn/tu-mobilenetv3_large_100",
              "efficientdet/tu-tf_efficientnet_lite0"),
    "batch": (4, 8, 16), "lr": ("log", 3e-4, 1e-2), "loss": ("iou_ce", "dice_ce", "ce", "lovasz"),
    "loss_ratio": ("even", 0.2, 0.8), "schedule": tuple(SCHEDULES),
    "augment": ("basic", "colour", "strong"), "classmix": ("none", "plain", "weighted"),
    "seed": (0, 1, 2)}


def parse_args(argv=None):
    parser = Parser(prog="train.py", description=__doc__)
    run = parser.add_argument_group("what to train")
    run.add_argument("--data", type=Path, required=True, help="the competition's folder")
    run.add_argument("--exp", type=Path, required=True, help="folder of the experiment, out/EXP")
    run.add_argument("--model", type=checked(split_model), default="fpn/tu-tf_efficientnet_lite0",
                     metavar="DECODER/ENCODER",
                     help=f"decoder: {', '.join(DECODERS)}; encoder: "
                     "segmentation-models-pytorch's, or tu- and timm's")
    run.add_argument("--scale", type=number(int, STRIDE, 4096), default=512,
                     help="image side; padded to the encoder's stride, which is 32, or of a ViT "
                     "its patch")
    run.add_argument("--fold", type=fold_name, default=0, metavar=f"K|{ALL}",
                     help=f"fold held out for validation; {ALL}: none, for as many epochs as the "
                     "folds were best at")
    run.add_argument("--of-folds", type=number(int, 0), nargs="*", default=[], metavar="K",
                     help=f"with --fold {ALL}: the folds, all trained before, whose best epochs' "
                     "median it stops at; else all of them")
    run.add_argument("--folds", type=number(int, 2), default=5, help="number of folds")
    run.add_argument("--round", type=number(int, 0, 9), default=0,
                     help="from 1: also learns EXP/rROUND/pseudo/fFOLD")
    run.add_argument("--extra", type=Path, nargs="*", default=[], metavar="FOLDER",
                     help="other COCO folders, with a train.json of the same class names: every "
                     "fold learns from their photos, none is validated on them")
    run.add_argument("--unlabelled", type=Path, metavar="FOLDER",
                     help="of photos that have pseudo labels besides those of the test")
    add_data_options(run)
    run.add_argument("--allow-leak", action="store_true",
                     help="learn also from pseudo labels whose makers may have trained on this "
                     "fold; marks every later score as contaminated")
    add_jobs(run)
    recipe = parser.add_argument_group("recipe")
    for name, (kind, default, text) in RECIPE.items():
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        recipe.add_argument("--" + name.replace("_", "-"), default=default, help=text, **how)
    add_system_arguments(parser.add_argument_group("system: none of these decides the recipe"))
    # --of-folds decides by the best epochs alone
    parser.set_defaults(decides=["model", "scale", "fold", "folds", "round", "overfit",
                                 *DATA_OPTIONS, *RECIPE])
    return parser.parse_args(argv)


def add_jobs(run):
    """Add the jobs besides training a run, and their options."""
    job = run.add_mutually_exclusive_group()
    job.add_argument("--check", action="store_true",
                     help="check the data, write EXP/folds.csv and data.html, stop")
    job.add_argument("--overfit", type=number(int, 1), default=0, metavar="N",
                     help="instead train and validate on N images in EXP/overfit, not augmented; "
                     "fails below v3 0.9")
    job.add_argument("--sweep", type=number(int, 1), default=0, metavar="N",
                     help="instead try recipes of SEARCH_SPACE, in EXP/sweep, until N are finished")
    run.add_argument("--sweep-seeds", type=number(int, 2), default=3, metavar="N",
                     help="other seeds that judge the best recipe of a sweep")
    job.add_argument("--runtimes", type=Path, metavar="CSV",
                     help="instead measure the speed, size and memory of the model at this scale")
    run.add_argument("--seconds", type=number(float, 0, 3600), default=10,
                     help="of --runtimes, three quarters of them to train")


def add_system_arguments(system):
    system.add_argument("--replace", action="store_true",
                        help="replace a run of another recipe, which is kept in its folder "
                        "replaced/ until the next time, instead of refusing")
    system.add_argument("--code", choices=("new", "keep"),
                        help="where other code has made a run, or begun it: train it anew, or keep "
                        "it as it is and carry on")
    system.add_argument("--save-every", type=number(float, 0), default=60, metavar="SECONDS",
                        help="write last.pt after a step or an epoch if so many have passed; 0: "
                        "after each epoch")
    system.add_argument("--cache", type=Path, default=Path("out/cache"),
                        help="painted masks, shared by experiments")
    system.add_argument("--cache-images", action="store_true",
                        help="also cache the training photos decoded: 3 bytes a pixel on disk, "
                        "less to compute")
    system.add_argument("--device", default="auto",
                        help="auto takes the first idle GPU, or the CPU")
    system.add_argument("--per-gpu", type=number(int, 1), default=1, metavar="N",
                        help="jobs that may share a GPU that auto takes")
    system.add_argument("--workers", type=number(int, 0, 256),
                        help="of the loader; none on a CPU, else one a core up to 8")
    system.add_argument("--grad-checkpoint", action="store_true",
                        help="compute the encoder's maps twice instead of keeping them: saves "
                        "memory, takes time; for encoders without batch norm")
    system.add_argument("--compile", action="store_true",
                        help="torch.compile the model and the loss: slow to start, then faster")
    system.add_argument("--logger", choices=LOGGERS, help="besides log.csv")
    system.add_argument("--show-args", action="store_true",
                        help="print these arguments as JSON and stop: make asks so")


def check_args(args, n_ranks):
    """Raise UserError when arguments don't fit each other or the number of processes."""
    for fold in args.of_folds if args.fold == ALL else [args.fold]:
        if fold >= args.folds:
            raise UserError(f"--fold {fold}: there are the folds 0 to {args.folds - 1}")
    if args.of_folds and args.fold != ALL:
        raise UserError(f"--of-folds goes with --fold {ALL} alone")
    if args.fold == ALL and (args.sweep or args.overfit):
        raise UserError(f"--fold {ALL} has no photo to judge by: give --sweep and --overfit a fold")
    weights_file(args.weights, args.model)  # raises if there is none
    if args.batch < 2 * n_ranks:
        raise UserError(f"--batch {args.batch}: batch norm needs 2 images a process, of which "
                        f"there are {n_ranks}")
    for option, asked in (("--snapshots", args.snapshots), ("--soup", args.soup)):
        n_epochs = len(late_epochs(args, asked))
        if n_epochs < asked:
            raise UserError(f"{option} {asked}: this run has only {n_epochs} to keep")


# ---- training ------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run works with, and how far it is."""
    model: object
    forward: object  # of wrap: None until the first step, and when the encoder thaws
    loss: object  # of make_loss
    optimizer: object
    scaler: object
    ema: object  # ModelEmaV3: the average of the weights, which is validated and kept
    device: object
    mean: tuple
    std: tuple
    parts: int  # in which a batch goes through the model
    total: object  # float32 [3] of this epoch: sum of losses, skipped steps, skipped in a row
    class_weights: object = None  # float32 [C], of the loss's pixels
    epoch: int = 0  # epochs done
    step: int = 0  # steps of this epoch that are done and saved
    log: list = field(default_factory=list)  # a row of log.csv for each epoch
    best: dict | None = None  # what model.pt is to have: the epoch that is kept
    kept: str = "the start"  # what last.pt holds, for people
    of_folds: dict | None = None  # of a run on all images: its scores, "v3" the mean of the folds'
    saved_at: float = field(default_factory=time.monotonic)  # when last.pt was last written
    drawing_seconds: float = 0.0
    batch: int = 8  # windows that validation predicts at a time
    logger: object = None
    is_frozen: bool = False  # whether the encoder doesn't learn now

    # what every step goes through, looked up once: to find it by name takes milliseconds
    @cached_property
    def parameters(self):
        return list(self.model.parameters())

    @cached_property
    def buffers(self):
        return by_dtype(self.model.buffers())

    @cached_property
    def weights(self):
        return by_dtype(self.model.state_dict().values())

    @cached_property
    def averages(self):
        return by_dtype(self.ema.module.state_dict().values())


def by_dtype(tensors):
    """Return {dtype: its tensors in their order}."""
    groups = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return groups


# last.pt holds the state_dict() of these attributes of a Run, and those in PLACE as they are
STATES = ("model", "ema", "optimizer", "scaler")
PLACE = ("epoch", "step", "total", "parts", "log", "best", "kept")


def train_step(run, images, masks, lr, step, n_steps, args):
    """Take step `step` of an epoch's `n_steps`; return its loss and whether it was a bad one.

    images uint8 [B, H, W, 3], masks uint8 [B, H, W]. A bad step, whose gradient isn't finite,
    changes nothing but the average of the weights. Both results are tensors on the device.
    """
    import torch
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    images, masks = normalise(images, run.mean, run.std), masks.long()
    rng = np.random.default_rng([HOOK, args.seed, run.epoch, step])  # the same on all ranks
    images, masks = BATCH_HOOKS[args.batch_hook](images, masks, rng)

    statistics = copy_buffers(run.buffers)  # of batch norm, which the forward pass changes
    run.optimizer.zero_grad(set_to_none=True)
    loss = backward(run, images, masks)
    if ranks()[1] > 1:
        torch.distributed.all_reduce(loss.div_(ranks()[1]))
    run.scaler.unscale_(run.optimizer)
    is_bad = ~clip_gradients(run.parameters, args.clip).isfinite()  # the same on all ranks
    step_unless(is_bad, run.optimizer, run.scaler)
    restore_buffers_if(is_bad, run.buffers, statistics)
    update_averages(run, run.epoch * n_steps + step + 1)
    return loss, is_bad


def learning_rate(progress, args):
    """Return the learning rate at `progress` in [0, 1] of the run: a warm-up, then the schedule."""
    if progress < args.warmup:
        return args.lr * progress / args.warmup
    t = (progress - args.warmup) / (1 - args.warmup)
    return args.lr * SCHEDULES[args.schedule](t, args.cycles)


def backward(run, images, masks):
    """Add up the gradients of a batch, part after part; return its loss.

    Each part counts by its share of what a loss averages over; see loss_shares. When a GPU's memory
    is too small for a part, the parts are halved from then on.
    """
    import torch
    n_parts = max(1, min(run.parts, len(images) // 2))  # batch norm needs two images
    try:
        total = 0
        shares = loss_shares(masks, n_parts, run.class_weights)
        parts = zip(images.tensor_split(n_parts), masks.tensor_split(n_parts), shares, strict=True)
        for part_images, part_masks, share in parts:
            with amp(run.device):
                logits = run.forward(part_images)
            loss = run.loss(logits, part_masks) * share
            run.scaler.scale(loss).backward()
            total += loss.detach()
        return total
    except RuntimeError as e:  # torch.OutOfMemoryError is one
        if not any(words in str(e) for words in GPU_MEMORY_WORDS):
            raise
        if n_parts >= len(images) // 2 or ranks()[1] > 1:
            text = ("out of memory: lower --scale or --batch, raise --accumulate, or add "
                    f"--grad-checkpoint ({e})")
            raise UserError(text) from None
        run.parts = min(2 * n_parts, len(images) // 2)
        logits = loss = None  # they hold the failed attempt's graph
    print(f"out of memory: batches now go through the model in {run.parts} parts", flush=True)
    run.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return backward(run, images, masks)


def loss_shares(masks, n_parts, weights):
    """Return the share of each part of a batch in its loss, [n_parts]: that of its labelled pixels.

    They count by class with class weights, float [C] or None. So a loss over pixels has the
    gradient of the whole batch. One over regions becomes the mean of its parts' losses, since no
    part sees the others' regions. With several processes the batch is that of all of them, and the
    shares are multiplied by their number, by which DistributedDataParallel divides.
    """
    import torch
    labelled = masks != IGNORE_INDEX
    pixels = pixel_weights(masks.where(labelled, 0), labelled, weights)
    sums = torch.stack([part.sum() for part in pixels.tensor_split(n_parts)])
    total, n_ranks = sums.sum(), ranks()[1]
    if n_ranks > 1:
        torch.distributed.all_reduce(total)
    return n_ranks * sums / total.clamp(min=1e-6)  # without a labelled pixel the loss is 0


def step_unless(is_bad, optimizer, scaler):
    """Let the optimizer step unless `is_bad`, a bool tensor on the device, is true."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = is_bad.float()  # a fused optimizer looks at it, and no GPU waits
        scaler.step(optimizer)
    elif scaler.is_enabled() or not is_bad:  # a scaler looks for itself
        scaler.step(optimizer)
    scaler.update()


def clip_gradients(parameters, largest):
    """Scale the gradients so that their norm is at most `largest`, 0: any; return their norm."""
    import torch
    if largest:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def copy_buffers(buffers):
    """Return a copy of buffers, of by_dtype, as one flat tensor for each dtype.

    One by one a GPU would spend more time on starting these kernels than on a small model.
    """
    from torch._utils import _flatten_dense_tensors  # of one tensor it is a view
    return {dtype: _flatten_dense_tensors(tensors).clone() for dtype, tensors in buffers.items()}


def restore_buffers_if(is_bad, buffers, copies):
    """Give buffers what copy_buffers has kept where `is_bad`, a bool tensor, is true."""
    import torch
    from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
    for dtype, tensors in buffers.items():
        kept = copies[dtype].where(is_bad, _flatten_dense_tensors(tensors))
        torch._foreach_copy_(tensors, _unflatten_dense_tensors(kept, tensors))


def update_averages(run, n_steps):
    """Move the averages towards the weights after `n_steps` of the run, as ModelEmaV3.update does.

    That looks all of them up by name, and starts a kernel for each of batch norm's counters.
    """
    import torch
    decay = run.ema.get_decay(n_steps)
    for dtype, averages in run.averages.items():
        if dtype.is_floating_point:
            torch._foreach_lerp_(averages, run.weights[dtype], 1 - decay)
        else:
            torch._foreach_copy_(averages, run.weights[dtype])


def train_one_epoch(run, loader, args, save=None, show_batch=None):
    """Train from step run.step of an epoch to its end; return what log.csv says of it.

    save(steps done) is called when --save-every says so, show_batch(images, masks) before the first
    step of a run.
    """
    prepare_model(run, args)
    rank, n_ranks = ranks()
    n_steps, n_images = len(loader), 0
    started, waited = time.monotonic(), 0.0
    batch_wanted = started
    title = f"epoch {run.epoch + 1}/{args.epochs}"
    bar = tqdm(loader, title, n_steps, initial=run.step, leave=False,
               disable=True if rank else None)
    for step, (images, masks) in enumerate(bar, run.step):
        waited += time.monotonic() - batch_wanted
        if show_batch and run.epoch == step == 0:
            show_batch(images.numpy(), masks.numpy())
        images = images.to(run.device, non_blocking=True)
        masks = masks.to(run.device, non_blocking=True)
        seed_dropout(args.seed, run.epoch, step, rank)
        lr = learning_rate((run.epoch + (step + 0.5) / n_steps) / args.epochs, args)
        loss, is_bad = train_step(run, images, masks, lr, step, n_steps, args)
        count_step(run.total, loss, is_bad)
        n_images += len(images)
        if step % 10 == 9:  # looking at every step would make a GPU wait
            images_per_s = n_images / (time.monotonic() - started)
            show_progress(run, bar, loader, step, lr, images_per_s)
        if save and args.save_every and step + 1 < n_steps and save_is_due(run, args):
            save(step + 1)
        batch_wanted = time.monotonic()
    share_buffers(run)
    loss_sum, skipped, _ = run.total.tolist()  # waits for the GPU
    seconds = time.monotonic() - started
    mean_loss = loss_sum / (n_steps - skipped) if skipped < n_steps else math.nan
    return {"loss": mean_loss, "lr": lr, "skipped": int(skipped),
            "images_per_s": n_images * n_ranks / seconds, "waiting": waited / seconds}


def prepare_model(run, args):
    """Put the model into training mode; the encoder learns unless the epoch is one of --freeze.

    Frozen, it works as in evaluation: its statistics stay, and it drops nothing.
    """
    run.model.train()
    is_frozen = run.epoch < args.freeze
    if is_frozen:
        run.model.encoder.eval()
    if is_frozen != run.is_frozen:
        run.is_frozen, run.forward = is_frozen, None
        # what the logits don't need is in no group, and never learns; see try_model
        learns = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        for parameter in run.model.encoder.parameters():
            parameter.requires_grad_(not is_frozen and id(parameter) in learns)
            parameter.grad = None
    if run.forward is None:
        run.forward = wrap(run.model, args, run.device)


def wrap(model, args, device):
    """Return the model compiled and wrapped for several processes, as the options say.

    DDP waits for the gradients of the parameters that learn when it is made, so it is made anew for
    an encoder that thaws.
    """
    import torch
    if ranks()[1] > 1:
        gc.collect()  # one that was made before waits for them too
        model = torch.nn.parallel.DistributedDataParallel(
            model, [device.index] if device.type == "cuda" else None)
    return torch.compile(model) if args.compile else model


def count_step(total, loss, is_bad):
    """Add a step to `total` in place: the sum of losses, bad steps, bad steps in a row."""
    total[0] += loss.where(~is_bad, 0)
    total[1] += is_bad
    total[2] = (total[2] + 1) * is_bad


def share_buffers(run):
    """Let all ranks have rank 0's averaged statistics: each has seen other images."""
    import torch
    if ranks()[1] > 1:
        for buffer in run.ema.buffers():
            torch.distributed.broadcast(buffer, 0)


def seed_dropout(seed, epoch, step, rank):
    """Seed torch for one step: so resuming needs no random state."""
    import torch
    rng = np.random.default_rng([STEP, seed, epoch, step, rank])
    torch.manual_seed(int(rng.integers(2 ** 63)))


def show_progress(run, bar, loader, step, lr, images_per_s):
    """Show loss and speed on the bar; raise UserError after MAX_SKIPPED skipped steps in a row."""
    loss_sum, skipped, in_a_row = run.total.tolist()
    if in_a_row >= MAX_SKIPPED:
        raise UserError(f"{MAX_SKIPPED} steps in a row without a finite gradient, the last with "
                        f"images {images_of(loader, step)}: lower --lr (or has the loss an "
                        f"infinite slope?); kept is what was after {run.kept}")
    mean_loss = loss_sum / max(1, step + 1 - skipped)
    bar.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{lr:.1e}", images_s=f"{images_per_s:.1f}")


def images_of(loader, step):
    """Return the ids of the images in a batch of this epoch: "7, 9"."""
    loader.batch_sampler.first = step
    keys = next(iter(loader.batch_sampler))
    entries = [loader.dataset.entries[index] for _, index in keys]
    return ", ".join(str(split.ids[i]) for split, i, _ in entries)


# ---- validation ----------------------------------------------------------------------------------


def predict(model, images, run):
    """Return class ids uint8 [B, SUBMIT_SIZE, SUBMIT_SIZE] of uint8 images [B, H, W, 3]."""
    images = images.to(run.device, non_blocking=True)
    probs = model_probs(model, normalise(images, run.mean, run.std))
    return resize_probs(probs).argmax(dim=1).byte().cpu().numpy()


def model_probs(model, images):
    """Return the probs float32 [B, C, H, W] of normalised images by a model."""
    import torch
    with torch.inference_mode(), amp(images.device):
        logits = model(images)
    return logits.float().softmax(dim=1)


def predict_native(images, run, scale):
    """Yield class ids uint8 [SUBMIT_SIZE, SUBMIT_SIZE] of uint8 images [H, W, 3] of any sizes."""
    recipe = {"scale": scale, "mean": run.mean, "std": run.std}
    photos = ((np.asarray(image), (SUBMIT_SIZE, SUBMIT_SIZE)) for image in images)
    probs_of = partial(model_probs, run.ema.module)
    for probs in predict_windows(probs_of, recipe, photos, run.batch, run.device):
        yield probs.argmax(dim=0).byte().cpu().numpy()


def evaluate(run, loader, n_classes):
    """Return the pixel counts [N, C, C] of all validation images, put together from all ranks."""
    n_ranks, counts, photos = ranks()[1], [], loader.dataset
    if photos.crop == "native":
        preds = predict_native((image for image, _ in loader), run, photos.scale)
        for index, pred in zip(photos.indices, preds, strict=True):
            counts.append(confusion(pred, photos.split.truth(index), n_classes))
    for images, truths in loader if photos.crop == "photo" else ():
        preds = predict(run.ema.module, images, run)
        for pred, truth in zip(preds, truths.numpy(), strict=True):
            counts.append(confusion(pred, truth, n_classes))
    del counts[len(photos):]  # what filled up the last batch
    shares = [counts] * n_ranks
    if n_ranks > 1:
        import torch
        torch.distributed.all_gather_object(shares, counts)
    n_images = sum(map(len, shares))
    return np.stack([shares[i % n_ranks][i // n_ranks] for i in range(n_images)])


def validate(run, loader, args, classes):
    """Return the scores by name, the IoUs by name, and the v3 of each validation image.

    All are empty for a run on all images.
    """
    if run.of_folds:
        return {}, {}, []
    counts = evaluate(run, loader, len(classes))
    result = scores(counts, args.batch)
    v = {name: float(result[name]) for name in ("v1", "v2", "v3")}
    iou = {f"iou {name}": float(x) for name, x in zip(classes, result["iou"], strict=True)}
    return v, iou, image_miou(counts).tolist()


# ---- the start of a run --------------------------------------------------------------------------


def loader_class():
    """Return a DataLoader whose workers can begin before their batches are asked for.

    Else a GPU has nothing to do until the first batch of each epoch and validation is made.
    """
    from torch.utils.data import DataLoader

    class EarlyLoader(DataLoader):
        begun = None

        def begin(self):
            with signals_later():
                self.begun = super().__iter__()

        def __iter__(self):
            if self.begun is None:
                self.begin()
            begun, self.begun = self.begun, None
            return begun

        def end(self):
            """End the workers: else they live until the garbage collector finds the loader."""
            if self._iterator:  # of persistent workers
                self._iterator._shutdown_workers()
            self.begun = self._iterator = None
    return EarlyLoader


def make_loaders(args, splits, train_indices, valid_indices, cuda):
    """Return the DataLoaders for training and validation.

    splits: of load_splits; indices: positions in the first of them.
    """
    import torch
    train, test, extras = splits
    entries, present, n_pseudo = training_entries(args, train, test, train_indices, extras)
    rank, n_ranks = ranks()
    workers = loader_workers(args.workers, cuda)
    options = loader_options(workers, cuda) | {"persistent_workers": workers > 0}
    # a generator of its own: starting workers would draw from the global one
    options["generator"] = torch.Generator()
    odds = rare_odds(present) if args.sampler == "rare" else None
    labelled_from = round(args.epochs * (1 - args.labelled_only))
    batches = EpochBatches(len(entries), args.batch, args.seed, odds, n_pseudo, args.pseudo_ratio,
                           labelled_from)
    mix = classmix_settings(args, labelled_pixels(train, train_indices, extras))
    side = args.scale if args.crop == "native" else None
    augment = make_augmentation(args.augment, args.scale)
    samples = TrainSamples(entries, augment, args.seed, mix, side)
    photos = EvalPhotos(train, valid_indices[rank::n_ranks].tolist(), args.scale, args.crop)
    if side:  # photos of any size, one by one
        photo_batches, n_photos, batching = range(len(photos)), 1, {"batch_size": None}
    else:
        photo_batches, n_photos = eval_batches(len(photos), args.batch), args.batch
        batching = {"batch_sampler": photo_batches}
    share = math.ceil(args.batch / n_ranks)
    check_shared_memory(workers, (batch_bytes(share, args.scale, args.scale), len(batches)),
                        (n_photos * photos.largest(), len(photo_batches)))
    loader = loader_class()
    return (loader(samples, batch_sampler=batches, collate_fn=in_shared_memory, **options),
            loader(photos, **batching, **options))


def in_shared_memory(batch):
    """Return a batch of tensors as a tuple, which a loader process has put into shared memory.

    Left to torch, a background thread does so, whose errors are lost: the run would wait for ever.
    """
    import torch
    if torch.utils.data.get_worker_info():  # None in the main process
        for tensor in batch:
            tensor.share_memory_()
    return tuple(batch)


def eval_batches(n_images, size):
    """Return batches of the numbers of images; the last one is filled up."""
    size = max(1, min(size, n_images))  # a process may have none of few images
    return [full_batch(range(first, min(first + size, n_images)), size)
            for first in range(0, n_images, size)]


def training_entries(args, train, test, train_indices, extras):
    """Return (entries of TrainSamples, classes present bool [N, C], number of pseudo labels)."""
    present = labelled_pixels(train, train_indices, extras) > 0
    entries = [(train, i, None) for i in train_indices.tolist()]
    for split, indices in extras:
        entries += [(split, i, None) for i in indices]
    n = args.repeat
    if args.overfit:  # some hundred images make an epoch of them
        return entries * math.ceil(256 / len(entries)), present, 0
    if not args.round:
        return entries * n, np.tile(present, (n, 1)), 0
    pseudo, class_ids = load_labels(args, test)
    print(f"{len(entries)} labelled and {len(pseudo)} pseudo-labelled images")
    pseudo_present = [np.isin(range(len(train.classes)), [0, *some]) for some in class_ids]
    present = np.stack([*present] * n + pseudo_present * n)
    return entries * n + pseudo * n, present, n * len(pseudo)


def labelled_pixels(train, train_indices, extras):
    """Return the pixel counts by class, int [N, C], of all labelled images that a run learns from.

    extras: of load_splits.
    """
    counts = [np.array(train.pixels)[train_indices]]
    counts += [np.array(split.pixels)[indices] for split, indices in extras]
    return np.concatenate(counts)


def classmix_settings(args, pixels):
    """Return (probability, weights [C]) of ClassMix, or None; pixels [N, C] of training images."""
    if args.classmix == "none":
        return None
    weights = np.ones(pixels.shape[1])
    if args.classmix == "weighted":
        weights = 1 / pixels.sum(0).clip(min=1)
    return args.classmix_prob, weights


def parameter_groups(model, encoder_lr, weight_decay, factors=()):
    """Return the trainable parameters grouped by learning rate factor and weight decay.

    Norms and biases, all parameters of one dimension, have no decay. factors: of layer_factors.
    """
    groups, factors = {}, dict(factors)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = encoder_lr * factors.get(name, 1) if name.startswith("encoder.") else 1.0
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
    return [{"params": parameters, "factor": factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()]


def set_prior(model, pixels):
    """Start the last bias at the log frequency of each class in `pixels` [C].

    Else the first epochs find out that nearly all is background (Lin et al. 2017, section 4.1).
    """
    import torch
    with torch.no_grad():
        frequencies = torch.tensor((pixels + 1) / (pixels + 1).sum())
        last_convolution(model).bias.copy_(frequencies.log())


def try_model(model, name, sides):
    """Raise UserError if the model can't work at these sides; freeze what its logits don't need."""
    copy = try_sides(model, name, sides)
    for parameter, tried in zip(model.parameters(), copy.parameters(), strict=True):
        parameter.requires_grad_(tried.grad is not None)  # DDP would wait for one that never comes


def batch_sides(args):
    """Return the sides of photos in validation, and of batches after 30 calls of the batch hook."""
    import torch
    images = torch.zeros(2, 3, args.scale, args.scale)
    masks = torch.zeros(2, args.scale, args.scale, dtype=torch.int64)
    sides = {args.scale}
    for seed in range(30):
        hooked, _ = BATCH_HOOKS[args.batch_hook](images, masks, np.random.default_rng(seed))
        sides.add(hooked.shape[-1])
    return sorted(sides)


def start_model(args, classes, pixels, resume=None):
    """Return the model before its first step, with the weights that --weights says, on the CPU.

    It needs none if there is a `resume`, of find_last. pixels [C]: of training images.
    """
    path = None if resume else weights_file(args.weights, args.model)
    model = build_model(args.model, len(classes), "none" if resume or path else args.weights,
                        args.scale, args.drop_path)
    try_model(model, args.model, batch_sides(args))
    if args.grad_checkpoint:
        checkpoint_gradients(model, args.model)
    set_prior(model, pixels)
    if path:  # after the prior: a file may also have rows of the head
        line = load_weights(model, args.model, path, classes)
        if ranks()[0] == 0:
            print(line, flush=True)
    return model


def start_run(args, classes, pixels, resume, device):
    """Return a Run, new or as `resume`, of find_last, holds it; pixels [C]: of training images."""
    import torch
    from timm.utils import ModelEmaV3
    torch.manual_seed(args.seed)
    model = start_model(args, classes, pixels, resume)
    model = model.to(device, memory_format=torch.channels_last)
    if ranks()[1] > 1 and device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    weights = class_weights(args, pixels, device)
    factors = layer_factors(model, args.model, args.layer_decay)
    groups = parameter_groups(model, args.encoder_lr, args.weight_decay, factors)
    # as many in each rank, though their shares of a batch may differ by an image: they wait for
    # each other in each part, which needs two images for batch norm
    n_parts = max(1, min(args.accumulate, args.batch // ranks()[1] // 2))
    is_half = amp(device).fast_dtype == torch.float16
    mean, std = encoder_mean_std(args.model)
    loss = make_loss(args.loss, args.loss_ratio, args.label_smoothing, weights)
    run = Run(
        model=model, forward=None,
        loss=torch.compile(loss) if args.compile else loss,
        optimizer=OPTIMIZERS[args.optimizer](groups, args.lr),
        scaler=torch.amp.GradScaler(device.type, enabled=is_half),
        ema=ModelEmaV3(model, decay=args.ema, use_warmup=True), device=device, mean=mean, std=std,
        parts=n_parts, total=torch.zeros(3), class_weights=weights, batch=args.batch)
    if resume:
        restore(run, *resume)
    run.total = run.total.to(device)
    prepare_model(run, args)
    return run


def class_weights(args, pixels, device):
    """Return the class weights float32 [C], with mean 1 over the classes present, or None."""
    import torch
    if args.class_weights == "none":
        return None
    weights = (pixels > 0) / pixels.clip(min=1)
    weights = weights / weights[pixels > 0].mean()
    return torch.tensor(weights, dtype=torch.float32, device=device)


def restore(run, path, checkpoint):
    """Put what the checkpoint `path` holds into a new Run."""
    try:
        for name in STATES:
            if checkpoint[name]:  # a scaler that is off has no state
                getattr(run, name).load_state_dict(checkpoint[name])
        for name in PLACE:
            setattr(run, name, checkpoint[name])
    except (KeyError, RuntimeError, ValueError) as e:
        raise UserError(f"{path}: not of these scripts and libraries, remove it to start anew: "
                        f"{shorten(str(e), 300)}") from None
    print(f"{path.parent}: resuming after {run.kept}")


# ---- the epochs of a run -------------------------------------------------------------------------


def fit(run, loaders, args, info, out, report):
    """Train to the last epoch; run.best becomes the best one of the later half by --metric.

    A run on all images, which has nothing to validate on, keeps its last epoch. info: what every
    file of the run says besides; report(epoch, v3) is called after each epoch.
    """
    train_loader, valid_loader = loaders
    rank, n_epochs = ranks()[0], info["recipe"].get("stop_epoch", args.epochs)
    begin_epoch(train_loader, run.epoch, run.step)
    save = partial(save_last, run, info, out)
    show_batch = None if rank else partial(draw_batch, out / "batch.png", info["classes"])
    while run.epoch < n_epochs and not is_overfitted(run, args):
        started = time.monotonic()
        valid_loader.begin()
        row = {"epoch": run.epoch + 1,
               **train_one_epoch(run, train_loader, args, save, show_batch)}
        if not math.isfinite(row["loss"]):
            raise UserError(f"{out}: the loss of epoch {row['epoch']} is {row['loss']}: lower "
                            f"--lr; kept is what was after {run.kept}")
        if run.epoch + 1 < n_epochs:
            begin_epoch(train_loader, run.epoch + 1)
        v, iou, image_v3 = validate(run, valid_loader, args, info["classes"])
        row |= v | {"seconds": time.monotonic() - started}
        if info["recipe"]["contaminated"]:
            row["contaminated"] = 1
        row |= iou
        run.log.append(row)
        run.epoch, run.step = run.epoch + 1, 0
        run.total.zero_()
        if is_best(run, args, v, n_epochs):
            run.best = epoch_model(run, v, image_v3)
        check_folder(out)
        if rank == 0:
            save_epoch(run, args, info, out, v, image_v3)
        is_last = run.epoch == n_epochs or is_overfitted(run, args)
        if is_last or save_is_due(run, args):
            save_last(run, info, out)
        if rank == 0:
            log_row(run, row, args, info["recipe"], out)
            draw_some_curves(run, args, out)
        if report:
            report(row["epoch"], row["v3"])


def is_best(run, args, v, n_epochs):
    """Return whether the epoch that has just ended, with the scores `v`, is the best to keep yet.

    Early on a model that calls nearly all background often has the best v3.
    """
    if run.of_folds:
        return run.epoch == n_epochs
    is_late = args.overfit or 2 * run.epoch > args.epochs
    return is_late and (run.best is None
                        or guarded(v, args.metric) > guarded(run.best, args.metric))


def begin_epoch(loader, epoch, first=0):
    """Let a loader's workers begin with an epoch, from its batch `first` on."""
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, first
    loader.begin()


def is_overfitted(run, args):
    """Return whether --overfit has reached what it must."""
    return bool(args.overfit and run.best and run.best["v3"] >= OVERFIT_V3)


def check_folder(out):
    """Raise UserError if the run's folder is gone or has become another process's."""
    held = out / ".lock"
    is_ours = held.is_file() and held.read_text().strip() == this_process()
    if not out.is_dir() or ranks()[0] == 0 and not is_ours:
        raise UserError(f"{out} was removed: training stops")


def epoch_model(run, v, image_v3):
    """Return what model.pt or a snapshot of this epoch has: the averaged weights and its scores.

    The scores of a run on all images are those of the folds.
    """
    v = run.of_folds or v
    weights = {key: value.detach().to("cpu", copy=True)
               for key, value in run.ema.module.state_dict().items()}
    return {"epoch": run.epoch, **v, "image_v3": image_v3, "model": weights}


def save_epoch(run, args, info, out, v, image_v3):
    """Write an epoch's snapshot, if --snapshots or --soup wants it, and its row of log.csv.

    This comes before save_last: an epoch that counts as done is in the log.
    """
    if run.epoch in snapshot_epochs(args):
        snapshot = out / f"last-epoch-{run.epoch:03}.pt"
        save_checkpoint(snapshot, **info, **epoch_model(run, v, image_v3))
    if run.epoch in soup_epochs(args):
        save_checkpoint(soup_file(out, run.epoch), **epoch_model(run, v, image_v3))
    # the log of a finished run that this one replaces stays beside its model until then
    log = "last.csv" if (out / "model.pt").exists() else "log.csv"
    write_csv(out / log, run.log)


def save_is_due(run, args):
    """Return whether --save-every seconds have passed since last.pt was written."""
    return time.monotonic() - run.saved_at >= args.save_every


def save_last(run, info, out, step=0):
    """Write last.pt after `step` steps of an epoch, or between two epochs."""
    run.step = step
    kept = f"step {step} of epoch {run.epoch + 1}" if step else f"epoch {run.epoch}"
    check_folder(out)
    if ranks()[0] == 0:
        place = {name: getattr(run, name) for name in PLACE} | {"kept": kept}
        states = {name: getattr(run, name).state_dict() for name in STATES}
        save_checkpoint(out / "last.pt", previous=out / "last-1.pt", **info, **place, **states)
    run.kept, run.saved_at = kept, time.monotonic()


def snapshot_epochs(args):
    """Return the epochs after which a snapshot is kept."""
    return late_epochs(args, args.snapshots)


def soup_epochs(args):
    """Return the epochs whose weights --soup may take; a run on all images can't judge any."""
    return [] if args.fold == ALL else late_epochs(args, args.soup)


def late_epochs(args, n_epochs):
    """Return `n_epochs` epochs of the later half of a run.

    They are the last valleys of a schedule with cycles, else even steps up to the last epoch.
    """
    n_epochs, n_cycles = min(n_epochs, args.epochs), args.cycles
    if not n_epochs:
        return []
    ends = [1 - 0.5 * i / n_epochs for i in range(n_epochs)]  # as shares of the run
    if has_cycles(SCHEDULES[args.schedule]):
        ends = [args.warmup + (1 - args.warmup) * (i + 1) / n_cycles for i in range(n_cycles)]
    return sorted({int(args.epochs * end + 1e-6) for end in ends} - {0})[-n_epochs:]


def has_cycles(schedule):
    """Return whether a schedule depends on its number of cycles."""
    return any(schedule(t, 2) != schedule(t, 3) for t in (0.1, 0.4, 0.7))


# ---- soup: the mean of several epochs' weights ---------------------------------------------------


def soup_file(out, epoch):
    """Return the file that keeps an epoch's weights until the end of the run, for --soup."""
    return out / f"last-soup-{epoch:03}.pt"


def make_soup(run, valid_loader, args, classes, out):
    """Let run.best be the mean of several epochs' weights if that scores higher.

    It is the greedy soup of arXiv 2203.05482: the epochs of soup_epochs, the best first, join the
    best epoch of all one after another, and each stays if the score by --metric rises by it.
    """
    import torch
    if ranks()[1] > 1:
        torch.distributed.barrier()  # rank 0 may still be writing the last epoch
    others = [load_checkpoint(soup_file(out, epoch)) for epoch in soup_epochs(args)
              if epoch != run.best["epoch"]]
    taken = [run.best]
    for other in sorted(others, key=lambda other: -guarded(other, args.metric)):
        weights = mean_weights([each["model"] for each in (*taken, other)])
        run.ema.module.load_state_dict(weights)
        v, _, image_v3 = validate(run, valid_loader, args, classes)
        if guarded(v, args.metric) > guarded(run.best, args.metric):
            taken.append(other)
            run.best = run.best | v | {"image_v3": image_v3, "model": weights}
    run.best["soup"] = [each["epoch"] for each in taken]
    v3s = " ".join(f"{each['epoch']} ({each['v3']:.4f})" for each in taken)
    print(f"{out}: soup of the epochs {v3s}: v3 {run.best['v3']:.4f}" if taken[1:] else
          f"{out}: no soup scores higher than epoch {v3s}", flush=True)


def mean_weights(states):
    """Return the mean of state dicts of one network; counters, which are whole, of the first."""
    mean = {}
    for key, value in states[0].items():
        mean[key] = value
        if value.is_floating_point():
            mean[key] = sum(state[key] for state in states) / len(states)
    return mean


# ---- the log -------------------------------------------------------------------------------------


def start_logger(name, out, recipe):
    """Return a function that hands a row of log.csv to TensorBoard or Weights & Biases."""
    if name == "wandb":
        import wandb
        mode = os.environ.get("WANDB_MODE", "offline")
        return wandb.init(dir=out, config=recipe, mode=mode).log
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(out / "tensorboard")

    def log(row):
        for key, value in row.items():
            writer.add_scalar(key, value, row["epoch"])
        writer.flush()
    return log


def log_row(run, row, args, recipe, out):
    """Print the row and tell the logger; what fails there is a warning: log.csv has it all."""
    contaminated = " contaminated" if recipe["contaminated"] else ""
    skipped = ""
    if row["skipped"]:
        skipped = f" skipped {row['skipped']} step(s): gradient not finite"
    ious = [f"{key.removeprefix('iou ')} {value:.3f}" for key, value in row.items()
            if key.startswith("iou ")]
    v = "".join(f" {name} {row[name]:.4f}" for name in ("v1", "v2", "v3") if name in row)
    text = f"\n   IoU {', '.join(ious)}" if ious else ""
    print(f"{out} epoch {row['epoch']}/{args.epochs} loss {row['loss']:.4f}{v}{contaminated} "
          f"{row['images_per_s']:.1f} images/s {row['seconds']:.0f} s{skipped}{text}", flush=True)
    if not args.logger:
        return
    try:
        run.logger = run.logger or start_logger(args.logger, out, recipe)
        run.logger(row)
    except Exception as e:
        print(f"warning: {args.logger} failed, training goes on without it: {e}", file=sys.stderr)
        run.logger = lambda row: None


def draw_some_curves(run, args, out):
    """Draw curves.png after an epoch but the last, while that takes under 2% of the time."""
    seconds = sum(row["seconds"] for row in run.log)
    if run.epoch < args.epochs and run.drawing_seconds < 0.02 * seconds:
        started = time.monotonic()
        draw_curves(out / "curves.png", run.log)
        run.drawing_seconds += time.monotonic() - started


# ---- one run -------------------------------------------------------------------------------------


def train_run(args, root, report=None, wait=False):
    """Train, resume or find done the run of `args` under `root`; return its v3.

    Its v3 is that of the epoch that it keeps. report(epoch, v3) is called after each epoch. With
    `wait` it waits for another process that is at this run. With --overfit a v3 below OVERFIT_V3
    is an error.
    """
    check_output(args.data, args.exp)
    train, test, _ = splits = load_splits(args)
    folds = load_folds(args.exp, train, args.folds)
    train_indices, valid_indices = indices = split_by_fold(args, train, folds)
    out = run_folder(root, args.round, args.model, args.scale, args.fold)
    first = ranks()[0] == 0
    hashes, epochs = Hashes(args.cache), snapshot_epochs(args)
    with lock(out, wait=wait) if first else nullcontext():
        fold_runs = read_fold_runs(args, hashes)
        info = describe_run(args, splits, folds, hashes, [run["epoch"] for run in fold_runs])
        check_fold_runs(fold_runs, info["recipe"])
        info |= describe_photos(args, splits, *indices, info["recipe"]["contaminated"])
        if finished := find_finished(args, test, info, out, epochs, hashes):
            return finished["v3"]
        resume = choose_resume(out, info, args, hashes)
        if not (resume or args.overfit) and (path := weights_file(args.weights, args.model)):
            check_unseen(path, {train.digests[i] for i in valid_indices}, args.fold)
        device = claim_device(args.device, args.per_gpu)
        if first:  # other ranks have read what is moved here, as claim_device waits for them
            begin(out, info, args, resume)
        run, loaders = set_up(args, splits, indices, fold_runs, info, resume, device)
        if first:
            check_run_space(run, args, out)
        try:
            fit(run, loaders, args, info, out, report)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{out}: interrupted, kept is what was after "
                                    f"{run.kept}") from None
        if soup_epochs(args):
            make_soup(run, loaders[1], args, train.classes, out)
        for loader in loaders:
            loader.end()
        if first:
            draw_curves(out / "curves.png", run.log)
        if args.overfit and run.best["v3"] < OVERFIT_V3:
            raise UserError(f"{out}: v3 {run.best['v3']:.4f} on its own {len(train_indices)} "
                            f"training images, below {OVERFIT_V3}: more --epochs or another --lr, "
                            "or the model or the loss doesn't learn")
        if first:
            photos = EvalPhotos(train, valid_indices.tolist(), args.scale, args.crop)
            finish_run(run, info, out, photos, epochs, hashes)
    return run.best["v3"]


def set_up(args, splits, indices, fold_runs, info, resume, device):
    """Return (Run, loaders for training and validation).

    splits: of load_splits; indices: (training, validation) of split_by_fold; fold_runs: of
    read_fold_runs; info: what every file of the run says; resume: of find_last.
    """
    (train, _, extras), (train_indices, valid_indices) = splits, indices
    loaders = make_loaders(args, splits, train_indices, valid_indices, device.type == "cuda")
    pixels = labelled_pixels(train, train_indices, extras).sum(0)
    run = start_run(args, train.classes, pixels, resume, device)
    run.mean, run.std = info["recipe"]["mean"], info["recipe"]["std"]  # also a kept run's
    warn_of_absent_classes(args, train.classes, "training", pixels)
    if fold_runs:
        mean_v3 = statistics.mean(run["v3"] for run in fold_runs)
        run.of_folds = {"v1": None, "v2": None, "v3": mean_v3}
    else:
        valid_pixels = np.array(train.pixels)[valid_indices].sum(0)
        warn_of_absent_classes(args, train.classes, "validation", valid_pixels)
    return run, loaders


def load_splits(args):
    """Return (train, photos, extras): what a run learns from and is validated on.

    train, photos: Splits, the second of the photos that may have pseudo labels, those of the test
    and of --unlabelled; extras: (Split, indices) of each of --extra, see load_extra.
    """
    options = data_options(vars(args))
    check_added_folders(args)
    train, test = load_data(args.data, args.cache, decoded=args.cache_images, **options)
    extras = [load_extra(folder, train, test, args.cache, **options) for folder in args.extra]
    if args.unlabelled and args.round:
        more = load_unlabelled(args.unlabelled, train, test, args.cache, args.orientation)
        test = join_photos(test, more)
    return train, test, extras


def check_added_folders(args):
    """Raise UserError if the experiment lies in a folder of --extra or --unlabelled."""
    for folder in filter(None, (*args.extra, args.unlabelled)):
        check_output(folder, args.exp, name="EXTRA or UNLABELLED")


def hashes_learnt_from(args, splits, train_indices, valid_indices, contaminated):
    """Return the sorted hashes of all photo files that a run learns from, also by its weights.

    splits: of load_splits; indices: of split_by_fold. Photos that may have pseudo labels count,
    and if these are contaminated so does what the fold holds out: their makers had seen it.
    """
    train, photos, extras = splits
    learnt = {train.digests[i] for i in train_indices}
    for split, indices in extras:
        learnt |= {split.digests[i] for i in indices}
    if args.round and not args.overfit:
        learnt |= {*photos.digests}
    if contaminated:
        learnt |= {train.digests[i] for i in valid_indices}
    if path := weights_file(args.weights, args.model):
        learnt |= weights_learnt_from(path)
    return sorted(learnt - {""})  # "" is that of a test photo that can't be read


def split_by_fold(args, train, folds):
    """Return the positions of (training, validation) images; with --overfit both are the same few.

    Those are the training images with the most classes. With the fold ALL none is for validation.
    """
    if args.fold == ALL:
        return np.arange(len(folds)), np.arange(0)
    train_indices = np.flatnonzero(folds != args.fold)
    valid_indices = np.flatnonzero(folds == args.fold)
    if args.overfit:
        n_classes = (np.array(train.pixels)[train_indices] > 0).sum(1)
        train_indices = train_indices[np.argsort(-n_classes, kind="stable")][:args.overfit]
        return train_indices, train_indices
    return train_indices, valid_indices


def read_fold_runs(args, hashes):
    """Return what the config.json of each run of --of-folds says, for --fold ALL; else [].

    Raises UserError if one of them isn't finished.
    """
    if args.fold != ALL:
        return []
    configs = []
    for fold in args.of_folds or range(args.folds):
        folder = run_folder(args.exp, args.round, args.model, args.scale, fold)
        config = read_description(folder / "config.json", hashes)
        if not has_kinds(config, CONFIG_KINDS):
            raise UserError(f"{folder} isn't trained, whose best epoch --fold {ALL} needs: train "
                            "it first, or name others in --of-folds")
        configs.append(config)
    return configs


def check_fold_runs(configs, recipe):
    """Raise UserError unless the runs of read_fold_runs have the recipe of the run on all images.

    Their best epochs would say nothing about it.
    """
    may_differ = {"fold", "stop_epoch", "pseudo", "contaminated", *DERIVED}
    for config in configs:
        differ = [key for key in different_keys(config["recipe"], recipe) if key not in may_differ]
        if differ:
            raise UserError(f"the run of fold {config['recipe']['fold']} has another recipe than "
                            f"this one of all images, in {', '.join(differ)}: train it again")


def describe_run(args, splits, folds, hashes, best_epochs=()):
    """Return the provenance of a run: what decides its result, as it is now.

    splits: of load_splits; best_epochs: of the runs of read_fold_runs.
    """
    train, test, extras = splits
    folds_csv = folds_hash(train.ids, folds)
    labels = ()
    if args.round and not args.overfit:
        labels = check_labels(args, test, folds_csv, hashes)
    extra = [split.fingerprint for split, _ in extras]
    recipe = run_recipe(args, train.fingerprint, folds_csv, hashes, *labels, extra=extra,
                        best_epochs=best_epochs)
    recipe["mean"], recipe["std"] = map(list, encoder_mean_std(args.model))
    return provenance(recipe, run_code(recipe))


def describe_photos(args, splits, train_indices, valid_indices, contaminated):
    """Return what the files of a run say of its photos: those held out and those learnt from.

    The arguments are those of hashes_learnt_from.
    """
    train = splits[0]
    return {"classes": train.classes, "valid_ids": [train.ids[i] for i in valid_indices],
            "learnt_from": hashes_learnt_from(args, splits, train_indices, valid_indices,
                                              contaminated)}


def warn_of_absent_classes(args, classes, name, pixels):
    """Warn of classes without pixels; name: of the images that `pixels` [C] counts."""
    absent = [c for c, count in zip(classes, pixels, strict=True) if not count]
    if absent:
        print(f"warning: no {name} image of fold {args.fold} has {', '.join(absent)}")


def check_run_space(run, args, out):
    """Raise UserError if the disk has no room for the run's checkpoints."""
    size = sum(tensor.nbytes for tensor in run.model.state_dict().values())
    # last.pt three times, also while it is written, with the weights, their average, the best ones
    # and Adam's two averages; model.pt, the snapshots and what soup may take once
    needed = (3 * 5 + 1 + args.snapshots + args.soup) * size
    check_space(out, needed - sum(path.stat().st_size for path in out.glob("last*.pt")))


# ---- a run's files -------------------------------------------------------------------------------


def find_finished(args, test, info, out, epochs, hashes):
    """Return what config.json says of a finished run that needs no training, or None.

    It is the run in `out`, or the one of the round before if that stands for it.
    """
    done = find_done(out, hashes)
    if done and keeps_done(done, info, out, epochs, args, hashes):
        print(f"{out}/model.pt is there and has this recipe: nothing to do")
        return done
    return run_that_stands(args, test, info, out, epochs, hashes)


def find_done(out, hashes):
    """Return what config.json says of the finished run in `out`, or None when there is none.

    If that file is missing, model.pt itself says it.
    """
    if not (out / "model.pt").exists():
        return None
    done = read_description(out / "config.json", hashes)
    if not has_kinds(done, CONFIG_KINDS):  # killed before it was written, or damaged
        done = load_checkpoint(out / "model.pt")
        if not has_kinds(done, MODEL_KINDS):
            raise UserError(f"{out}/model.pt: not a checkpoint of this train.py: take another "
                            "--exp, or remove it")
    return done


def keeps_done(done, info, out, epochs, args, hashes):
    """Return whether the finished run stays; raise UserError when the user has to decide."""
    action = decide(out / "model.pt", done, info, args.code, args.replace)
    missing = [name for name in model_files(epochs) if not (out / name).exists()]
    if action == "make" or missing:
        return False
    is_described = "files" in done  # model.pt, which find_done reads without config.json, has none
    if ranks()[0] == 0 and (action == "kept" or not is_described):
        keep_code(args.exp)
        write_config(out, done, epochs, hashes)
    return True


def run_that_stands(args, test, info, out, epochs, hashes):
    """Let the run of the round before stand for this one if its pseudo labels keep no photo.

    Its checkpoints are written into `out` with this run's recipe. Returns what its config.json
    says, or None if the run is to be trained: there are labels, or that run has another recipe.
    """
    if not args.round or args.overfit or load_labels(args, test)[0]:
        return None
    folder = run_folder(args.exp, args.round - 1, args.model, args.scale, args.fold)
    before = find_done(folder, hashes)
    of_labels = {"round", "pseudo", "labels", "pseudo_ratio", "labelled_only"}
    if before is None or before["code"] != info["code"] or {
            *different_keys(before["recipe"], info["recipe"])} - of_labels:
        return None
    print(f"{out}: round {args.round} keeps no pseudo label, so it would learn nothing new: the "
          f"run of round {args.round - 1} stands for it")
    if ranks()[0] == 0:
        keep_code(args.exp)
        take_over(folder, out, info, epochs, hashes)
    return before


def take_over(folder, out, info, epochs, hashes):
    """Write the finished run in `folder` as that of `info` into `out`, config.json last."""
    checkpoints = {name: load_checkpoint(folder / name) for name in model_files(epochs)}
    move_aside(out, ["config.json", "log.csv", *begun_files(out), "model.pt"])
    for name in ("log.csv", "batch.png", "curves.png", "valid.png"):
        if (folder / name).exists():  # what stands may be linked from another experiment
            with atomic_write(out / name) as scratch:
                shutil.copyfile(folder / name, scratch)
    for name, checkpoint in checkpoints.items():
        save_checkpoint(out / name, **(checkpoint | info))
    write_config(out, checkpoints["model.pt"] | info, epochs, hashes)


def choose_resume(out, info, args, hashes):
    """Return (path, checkpoint) to carry on from, or None to begin anew.

    If the user keeps what other code began, `info` takes over the description in last.pt.
    """
    resume = find_last(out)
    if not resume:
        return None
    path, last = resume
    if not has_kinds(last, DESCRIBED):
        raise UserError(f"{path}: not a checkpoint of this train.py: take another --exp, or remove "
                        "it to start anew")
    begun = read_description(out / "last.json", hashes)
    if begun and not recipe_changes(last, begun["recipe"]) and begun["code"] == last["code"]:
        last["kept_under"] = begun["kept_under"]  # the user may have kept it before an epoch ended
    if decide(path, last, info, args.code, args.replace) == "make":
        return None
    if last["kept_under"]:
        info |= {key: last[key] for key in DESCRIBED}
    return resume


def find_last(out):
    """Return (path, checkpoint) that a run carries on from, or None: last.pt, else last-1.pt."""
    damaged = ""
    for path in filter(Path.exists, (out / "last.pt", out / "last-1.pt")):
        try:
            last = load_checkpoint(path)
        except UserError as e:
            damaged += f"{e}; "
            continue
        if damaged and ranks()[0] == 0:
            print(f"{damaged}going back to {path}")
            (out / "last.pt").rename(out / "last-damaged.pt")  # else it would become last-1.pt
        return path, last
    if damaged:
        raise UserError(f"{damaged}remove {out}/last*.pt to start anew")
    return None


def begin(out, info, args, resume):
    """Move aside what isn't carried on and write last.json, which says what makes this run."""
    begun = [path.name for path in sorted(out.glob("last*")) if path.suffix != ".json"]
    if begun and not resume:
        move_aside(out, ["last.json", *begun])
    keep_code(args.exp)
    write_description(out / "last.json", info, files={})


def finish_run(run, info, out, photos, epochs, hashes):
    """Write what stays of a run that is done and move aside what it replaces.

    photos: the validation images, an EvalPhotos. A kill at any point leaves last.pt, from which
    this is done again.
    """
    if len(photos):
        draw_valid(out / "valid.png", run, photos, info["classes"])
    # pickle writes equal strings once only if they are one object: interned keys give a resumed
    # run's file the same bytes
    best = {sys.intern(key): value for key, value in run.best.items()}
    save_checkpoint(out / "last-model.pt", **info, **best)
    if (out / "model.pt").exists():
        paths = [*out.glob("epoch-*.pt"), *(out / "replaced").glob("epoch-*.pt")]
        snapshots = sorted({path.name for path in paths})
        move_aside(out, ["config.json", "log.csv", *snapshots, "model.pt"])
    write_csv(out / "log.csv", run.log)
    for name in model_files(epochs):
        if (out / f"last-{name}").exists():
            os.replace(out / f"last-{name}", out / name)
    for path in out.glob("last*"):  # before config.json is written: model.pt needs none of them
        path.unlink()
    write_config(out, info | best, epochs, hashes)
    whose = ", the mean of the folds': this run holds no image out" if run.of_folds else ""
    print(f"{out}/model.pt: epoch {best['epoch']}, v3 {best['v3']:.4f}{whose}")


def model_files(epochs):
    """Return the names of a finished run's checkpoints; the one that is written last comes last."""
    return [*(f"epoch-{epoch:03}.pt" for epoch in epochs), "model.pt"]


def write_config(out, info, epochs, hashes):
    """Write what made the run and the hashes of its checkpoints; with this file the run is done."""
    more = {key: info[key] for key in ("classes", "epoch", "v3")}
    files = {name: hashes(out / name) for name in model_files(epochs)}
    write_description(out / "config.json", info, **more, files=files)
    hashes.save()


# ---- pictures ------------------------------------------------------------------------------------


def draw_curves(path, log):
    """Draw the columns of log.csv over the epochs; waiting: share of the time without a batch.

    A run on all images has no scores, and nothing is in their places.
    """
    from matplotlib.figure import Figure
    ious = [name for name in log[0] if name.startswith("iou ")]
    v = [name for name in ("v1", "v2", "v3") if name in log[0]]
    panels = ["loss"], v, ious, ["lr"], ["images_per_s"], ["waiting"]
    epochs = [row["epoch"] for row in log]
    figure = Figure((13, 6), layout="constrained")
    for axes, names in zip(figure.subplots(2, 3).flat, panels, strict=True):
        axes.set_visible(bool(names))
        for name in names:
            colour = COLOURS[ious.index(name)] / 255 if name in ious else None
            label = name.removeprefix("iou ").replace("$", r"\$")
            axes.plot(epochs, [row[name] for row in log], ".-", color=colour, label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if names:
            axes.legend(fontsize="x-small")
    with atomic_write(path) as scratch, warnings.catch_warnings(action="ignore"):  # of letters
        figure.savefig(scratch, format="png", dpi=90)


def draw_batch(path, classes, images, masks):
    """Draw the first images [B, H, W, 3] as loaded: augmented, with ClassMix, before a hook."""
    rows = []
    for image, mask in zip(images[:8], masks[:8], strict=True):
        rows.append([("as loaded", overlay(image)),
                     (named(mask, classes), overlay(image, mask))])
    write_sheet(path, rows, dict(enumerate(classes)) | {IGNORE_INDEX: "ignored"}, across=2)


def draw_valid(path, run, photos, classes):
    """Draw the worst, median and best validation images by v3 of the epoch that is kept.

    photos: an EvalPhotos. Truth, prediction and errors stand beside each.
    """
    import torch
    image_v3 = run.best["image_v3"]
    order = np.argsort(image_v3).tolist()
    middle = max(0, len(order) // 2 - 2)
    chosen = list(dict.fromkeys([*order[:4], *order[middle:middle + 4], *order[-4:]]))
    images, truths = zip(*(photos[i] for i in chosen), strict=True)
    run.ema.module.load_state_dict(run.best["model"])
    if photos.crop == "native":
        preds = predict_native(images, run, photos.scale)
    else:
        preds = predict(run.ema.module, torch.from_numpy(np.stack(images)), run)
    rows = []
    for i, image, truth, pred in zip(chosen, images, truths, preds, strict=True):
        errors = np.where(pred == truth, 0, IGNORE_INDEX).astype(np.uint8)
        name = photos.split.file_names[photos.indices[i]]
        rows.append([(f"v3 {image_v3[i]:.2f} {name}", overlay(image)),
                     (f"truth: {named(truth, classes)}", overlay(image, truth)),
                     (f"prediction: {named(pred, classes)}", overlay(image, pred)),
                     ("errors", overlay(image, errors))])
    write_sheet(path, rows, dict(enumerate(classes)) | {IGNORE_INDEX: "wrong"})


# ---- check: the data before anything is trained --------------------------------------------------


def check(args):
    """Print the data's sizes, classes and folds and write data.html, or stop with its faults."""
    train, test = load_data(args.data, args.cache, **data_options(vars(args)))
    folds = load_folds(args.exp, train, args.folds, renew=True)
    unread = sum(fault is not None for fault in test.faults)
    verdict = "no faults"
    if unread:
        verdict = f"{unread} test photo(s) can't be read: mend them for a full score"
    sizes = np.bincount(folds[folds != TRAIN_ONLY]).tolist()
    print(f"data: {len(train.ids)} training and {len(test.ids)} test images, {len(train.classes)} "
          f"classes, {len(set(train.groups))} groups, folds of {sizes} images; {verdict}")
    if (folds == TRAIN_ONLY).any():
        print(f"{(folds == TRAIN_ONLY).sum()} images have the fold {TRAIN_ONLY}: all runs train on "
              "them, none is validated on them")
    if odd := sum(train.odd, []):
        print(f"warning: {len(odd)} annotation(s) have a polygon that leaves the photo, where it's "
              f"clipped, or without area: {', '.join(map(str, odd[:9]))}")
    if train.dropped:
        print(f"dropped, as they have no annotations: {', '.join(train.dropped)}")
    warn_of_photos(train, test)
    pixels = np.array(train.pixels)
    for class_id, name in enumerate(train.classes):
        present, share = pixels[:, class_id] > 0, pixels[:, class_id].sum() / pixels.sum()
        print(f"  {class_id:3} {name:20} {present.sum():6} images {share:8.3%} of pixels")
        absent = [fold for fold in range(args.folds) if not present[folds == fold].any()]
        if not present.any():
            print("      warning: no training image has it: if it is no class, such as the root "
                  "of an export's categories, set UNUSED=drop")
        elif absent:
            print(f"      warning: no image of fold {', '.join(map(str, absent))} has it")
    check_more_photos(args, train, test)
    write_data_page(args, train, test, folds)
    print(f"{args.exp}/data.html: a look at them")


def check_more_photos(args, train, test):
    """Print what --extra and --unlabelled add to DATA, or stop with its faults."""
    options = data_options(vars(args))
    check_added_folders(args)
    for folder in args.extra:
        split, indices = load_extra(folder, train, test, args.cache, **options)
        present = (np.array(split.pixels)[indices] > 0).sum(0)
        counts = [f"{name} {n}" for name, n in zip(train.classes, present, strict=True) if n]
        print(f"{folder}: {len(indices)} images that every fold learns from: {', '.join(counts)}")
    if args.unlabelled:
        more = load_unlabelled(args.unlabelled, train, test, args.cache, args.orientation)
        print(f"{args.unlabelled}: {len(more.ids)} photos that get pseudo labels")


def warn_of_photos(train, test):
    """Warn of photos that may be turned wrongly, show next to nothing, or are also in the test."""
    names = np.array(train.file_names + test.file_names)
    turns = np.array(train.turns + test.turns)
    warnings = {
        "are turned by EXIF, and the JSON's size doesn't say whether their masks are too: read as "
        f"{train.orientation}; data.html shows both ways: set ORIENTATION to shown or stored":
            names[turns == "ambiguous"],
        "are turned by EXIF, but have the size of the stored pixels in the JSON, and are read so; "
        "Label Studio, for one, writes this size beside masks of the turned photo: compare both "
        "ways in data.html, and mend the export if the masks fit the turned one":
            names[turns == "stored"],
        "show next to nothing, nearly one grey, or nearly black with 16 bits: look at them; if "
        "they should show more, convert them to 8 bits with their whole range":
            names[np.array(train.low_contrast + test.low_contrast)],
        "of the test are training photos too":
            np.array(test.file_names)[np.isin(test.contents, train.contents)]}
    for text, names in warnings.items():
        if len(names):
            print(f"warning: {len(names)} photo(s) {text}: {', '.join(names[:9])}")


def write_data_page(args, train, test, folds):
    """Write EXP/data.html: what a first evening looks for in the data."""
    import pandas as pd
    names, pixels = train.classes, np.array(train.pixels)
    present = pixels > 0
    sizes = object_sizes(train)
    objects = sizes.size().reindex(range(len(names)), fill_value=0)
    shares = {"photos": present.mean(0), "objects": objects / objects.sum(),
              "pixels": pixels.sum(0) / pixels.sum()}
    by_fold = {}
    for fold in range(args.folds):
        by_fold[f"photos of fold {fold}"] = present[folds == fold].sum(0)
    table = pd.DataFrame({"class": names, "photos": present.sum(0), "objects": objects,
                          "pixels": pixels.sum(0), "share of pixels": shares["pixels"], **by_fold})
    equal = equal_photos(train, test)
    write_page(args.exp / "data.html", f"Data: {args.data}", [
        {"title": "classes", "table": table, "figures": data_figures(names, present, shares, sizes),
         "note": f"{len(train.ids)} photos for training, {len(test.ids)} for the test."},
        {"title": "contested pixels", "table": contested_pixels(train),
         "note": "Objects of one class that are painted over by another's, by the paint order "
                 f"{args.paint}: what lies on top is the truth."},
        {"title": "equal photos", "table": equal.head(200),
         "note": f"{len(equal)} photos have the pixels of another; those for training are kept in "
                 "one fold."},
        {"title": "orientation", "cards": turned_photos(train, test),
         "note": "Photos that EXIF turns, both ways: their masks must fit the way that is read. "
                 "ORIENTATION decides on it where the JSON's size doesn't."},
        {"title": "samples", "cards": sample_photos(train, present),
         "note": "Of each class photos spread evenly over those that have it."}], names)


def object_sizes(train):
    """Return the objects' shares of their photos, a pandas column grouped by class id."""
    import pandas as pd
    rows = []
    for photo, counts in zip(train.objects, train.pixels, strict=True):
        rows += [(class_id, n_pixels / sum(counts)) for class_id, n_pixels in photo["sizes"]]
    return pd.DataFrame(rows, columns=["class", "share"]).groupby("class")["share"]


def contested_pixels(train):
    """Return a table of the classes painted over each other, most pixels first."""
    import pandas as pd
    rows = []
    for photo in train.objects:
        for below, above, n_pixels in photo["covered"]:
            rows.append((train.classes[below], train.classes[above], n_pixels))
    table = pd.DataFrame(rows, columns=["below", "on top", "pixels"])
    table = table.groupby(["below", "on top"], as_index=False).agg(
        overlaps=("pixels", "size"), pixels=("pixels", "sum"))
    return table.sort_values("pixels", ascending=False)


def equal_photos(train, test):
    """Return a table of the photos whose pixels another photo has too."""
    import pandas as pd
    photos = pd.DataFrame({"photo": train.file_names + test.file_names,
                           "content": train.contents + test.contents,
                           "of": ["train"] * len(train.ids) + ["test"] * len(test.ids)})
    is_equal = photos["content"].ne("") & photos.duplicated("content", keep=False)
    return photos[is_equal].sort_values("content")


def data_figures(names, present, shares, sizes):
    """Return (title, urls) of the page's figures; present bool [N, C], sizes of object_sizes."""
    foreground = dict(list(enumerate(names))[1:])
    quantiles = {"median": 0.5, "5%": 0.05, "95%": 0.95, "largest": 1}
    class_ids = range(len(names))
    sizes_by = {label: sizes.quantile(q).reindex(class_ids) for label, q in quantiles.items()}
    together = present.T.astype(int) @ present  # [C, C] photos with two classes
    together = together / together.diagonal().clip(1)[:, None]
    plots = {
        "Shares of photos, objects and pixels":
            lambda axes: draw_bars(axes, foreground, shares, xscale="log"),
        "Sizes of objects, as a share of the photo":
            lambda axes: draw_bars(axes, foreground, sizes_by, xscale="log"),
        "Of the photos with one class, how many % have another too":
            lambda axes: draw_heat(axes, together[1:, 1:], names[1:], names[1:], xlabel="another",
                                   ylabel="one")}
    height = 1.5 + 0.25 * len(foreground)
    return [(title, figure_urls(plot, height)) for title, plot in plots.items()]


def sample_photos(train, present, n=6):
    """Return cards of up to `n` photos of each class, with that class in its colour."""
    cards = []
    for class_id in range(1, len(train.classes)):
        indices = np.flatnonzero(present[:, class_id])
        spread = np.linspace(0, len(indices) - 1, min(n, len(indices))).astype(int)
        for i in indices[spread].tolist():
            truth = train.truth(i)
            shown = overlay(train.image(i), np.where(truth == class_id, truth, 0), 0.4)
            share = f"{(truth == class_id).mean():.2%} of the photo"
            cards.append({"text": train.file_names[i], "classes": [class_id],
                          "tiles": [(share, tile_url(shown))]})
    return cards


def turned_photos(train, test, n=24):
    """Return cards of up to `n` photos that may be turned wrongly, with their masks both ways."""
    cards = []
    turned = [(split, i) for split in (train, test) for i, turn in enumerate(split.turns)
              if turn in ("ambiguous", "stored")]
    for split, i in turned[:n]:
        size, turn, tiles = split.sizes[i], split.turns[i], []
        mask = None if split.masks is None else split.truth(i)
        for way in ("shown", "stored"):
            # a quarter turn of a photo that has its size as stored swaps the sides
            sides = size[::-1] if (turn, way) == ("stored", "shown") else size
            image = read_image(split.root / split.file_names[i], *sides, way)
            is_read = way == (split.orientation if turn == "ambiguous" else turn)
            title = f"{way}, as it is read" if is_read else way
            tiles.append((title, tile_url(overlay(image, mask, 0.4))))
        class_ids = [] if mask is None else foreground_ids(mask)
        cards.append({"text": split.file_names[i], "classes": class_ids, "tiles": tiles})
    return cards


# ---- sweep: which recipe is best -----------------------------------------------------------------


class Sweep:
    """A study of recipes drawn from SEARCH_SPACE, in EXP/sweep, which processes may share."""

    def __init__(self, args):
        import optuna
        from optuna.trial import TrialState
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.args, self.folder = args, args.exp / "sweep"
        self.complete, self.pruned = TrialState.COMPLETE, TrialState.PRUNED
        self.running, self.failed = TrialState.RUNNING, TrialState.FAIL
        self.space = search_space(args)
        self.fixed, self.n_classes = fixed_values(args, self.space)
        with lock(self.folder, wait=True):
            self.study = self.open_study()

    def trials(self, *states):
        return self.study.get_trials(False, states)

    def open_study(self):
        """Return the study, new or as it stands; raise UserError if it was begun with other values.

        Code may be another only if the user says --code keep.
        """
        import optuna
        database = f"sqlite:///{self.folder}/study.db"
        storage = optuna.storages.RDBStorage(database, {"connect_args": {"timeout": 60}})
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5,
                                             n_warmup_steps=self.args.epochs // 3)
        study = optuna.create_study(storage=storage, pruner=pruner, study_name="sweep",
                                    direction="maximize", load_if_exists=True)
        begun, fixed = study.user_attrs.get("fixed", self.fixed), self.fixed
        if keys := different_keys(begun, fixed):
            text = ", ".join(f"{key} {begun.get(key)} -> {fixed.get(key)}" for key in keys)
            raise UserError(f"{self.folder}/study.db was begun with other values: {text}; take "
                            "another --exp, or remove it to begin anew")
        code, code_now = study.user_attrs.get("code"), code_of("run")
        if self.args.code != "keep" and code and (names := sorted(different_keys(code, code_now))):
            raise UserError(f"{self.folder}/study.db was begun by other code "
                            f"({', '.join(names[:6])}): --code keep (CODE=keep) carries on with "
                            "it, another --exp begins anew")
        study.set_user_attr("fixed", fixed)
        study.set_user_attr("code", code_now)
        return study

    def root_of(self, values):
        """Return the folder of a trial's run, named by what decides its result: so it resumes."""
        text = json.dumps([self.fixed, values], sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:10]

    def run_trial(self, trial):
        """Return (state, v3 or None) of a trial; one that can't run counts as pruned."""
        import optuna

        def report(epoch, v3):
            trial.report(v3, epoch)
            if epoch < trial.params.get("epochs", self.args.epochs) and trial.should_prune():
                raise optuna.TrialPruned
        root = self.root_of(trial.params)
        trial.set_user_attr("folder", root.name)
        try:
            run = with_values(self.args, trial.params)
            return self.complete, train_run(run, root, report, wait=True)
        except optuna.TrialPruned:
            return self.pruned, None
        except UserError as e:
            print(e)
            trial.set_user_attr("error", str(e))
            return self.pruned, None

    def run_trials(self):
        """Run trials until, with those of other processes, args.sweep are finished.

        A running trial holds a lock, which the kernel drops when its process is killed.
        """
        while True:
            with ExitStack() as alive:
                with lock(self.folder, wait=True):  # one process at a time counts and draws
                    self.requeue_dead_trials()
                    counted = self.trials(self.complete, self.pruned, self.running)
                    if len(counted) >= self.args.sweep:
                        return
                    trial = self.study.ask(self.space)
                    alive.enter_context(lock(self.folder / "running" / str(trial.number)))
                state, v3 = self.run_trial(trial)
                # else another process could list the trial as running, then find it unlocked
                with lock(self.folder, wait=True):
                    done = self.study.tell(trial, v3, state if v3 is None else None)
            v3 = "none" if done.value is None else f"{done.value:.4f}"
            values = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                      for key, value in done.params.items()]
            print(f"trial {done.number}: v3 {v3} {state.name.lower()}, "
                  f"{', '.join(values)}", flush=True)

    def requeue_dead_trials(self):
        """Let trials whose process was killed be run again."""
        import optuna
        requeue = optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
        for trial in self.study.get_trials(states=(self.running,)):
            try:
                with lock(self.folder / "running" / str(trial.number)):
                    self.study.tell(trial.number, state=self.failed)
                    requeue(self.study, trial)
            except UserError:  # its process lives
                continue

    def draw(self, path):
        """Draw how much each option matters, and v3 of every trial."""
        import optuna
        from matplotlib.figure import Figure
        shares = optuna.importance.get_param_importances(self.study)
        figure = Figure(figsize=(11, 2 + 0.3 * len(shares)), layout="constrained")
        left, right = figure.subplots(1, 2)
        bars = left.barh(list(shares), list(shares.values()))
        left.bar_label(bars, fmt="%.2f", padding=3)
        left.invert_yaxis()
        left.set(title="importance of the options", xlim=(0, 1.15 * max(shares.values())))
        complete = self.trials(self.complete)
        numbers, v3s = [trial.number for trial in complete], [trial.value for trial in complete]
        right.plot(numbers, v3s, "o")
        right.step(numbers, np.maximum.accumulate(v3s), where="post", alpha=0.5)
        pruned = [trial.number for trial in self.trials(self.pruned)]  # their v3 is an early one
        right.plot(pruned, [0.03] * len(pruned), "x", color="grey",
                   transform=right.get_xaxis_transform())
        right.set(title="v3 of the complete trials, and the best so far; x: pruned", xlabel="trial")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.grid(alpha=0.3)
        with atomic_write(path) as scratch:
            figure.savefig(scratch, format="png", dpi=120)

    def judge(self):
        """Train the best setting with other seeds and compare its lead with what seeds make."""
        settings = {}  # best first
        for trial in sorted(self.trials(self.complete), key=lambda trial: -trial.value):
            settings.setdefault(as_knobs(with_values(self.args, trial.params)), trial)
        (line, best), *others = settings.items()
        print(f"best setting, v3 {best.value:.4f} in trial {best.number}:\n  {line}", flush=True)
        used = best.params.get("seed", self.args.seed)
        seeds = [seed for seed in range(self.args.sweep_seeds + 1) if seed != used]
        seeds, v3s = seeds[:self.args.sweep_seeds], []
        for seed in seeds:
            values = {**best.params, "seed": seed}
            run = with_values(self.args, values)
            v3s.append(train_run(run, self.root_of(values), wait=True))
        spread = statistics.stdev(v3s)
        print(f"with the seeds {', '.join(map(str, seeds))}: v3 mean {statistics.mean(v3s):.4f}, "
              f"standard deviation {spread:.4f}, range {min(v3s):.4f} to {max(v3s):.4f}")
        for _, second in others[:1]:
            gap = best.value - second.value
            units = f", {gap / spread:.1f} standard deviations" if spread else ""
            print(f"the second best setting, trial {second.number}, is {gap:.4f} below the "
                  f"best{units}")
        print(f"differences smaller than the spread, {spread:.4f}, are noise: the seed alone makes "
              "them")


def with_values(args, values):
    """Return train.py's arguments with `values` put over them; raise UserError if one can't be."""
    parsed = {}
    for name, value in values.items():
        kind = checked(split_model) if name == "model" else RECIPE[name][0]
        try:
            if isinstance(kind, tuple) and value not in kind:
                raise ValueError(f"{value!r} is none of {', '.join(map(str, kind))}")
            parsed[name] = value if isinstance(kind, tuple) else kind(str(value))
        except (ValueError, argparse.ArgumentTypeError) as e:
            raise UserError(f"train.py's SEARCH_SPACE: {name}: {e}") from None
    run = argparse.Namespace(**vars(args) | parsed)
    try:
        check_args(run, 1)
    except UserError as e:
        raise UserError(f"train.py's SEARCH_SPACE: {e}") from None
    return run


def search_space(args):
    """Return {option: Optuna's distribution}; raise UserError for what train.py refuses."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    space, table = {}, dict(SEARCH_SPACE)
    if Path(args.weights).is_file() and table.pop("model", None):
        print(f"model is not searched: the file {args.weights} fits one encoder only; a folder may "
              "have a file for each")
    for name, entry in table.items():
        try:
            if name not in ("model", *RECIPE) or not isinstance(entry, tuple):
                raise ValueError("no option of RECIPE with its choices or ('even' or 'log', "
                                 "lowest, highest)")
            is_range = entry[0] in ("even", "log")
            values = [getattr(with_values(args, {name: value}), name) for value in entry[is_range:]]
            if not is_range:
                space[name] = CategoricalDistribution(values)
                continue
            kind = IntDistribution if isinstance(values[0], int) else FloatDistribution
            space[name] = kind(*values, log=entry[0] == "log")
        except (ValueError, TypeError, IndexError) as e:
            raise UserError(f"train.py's SEARCH_SPACE: {name} {entry!r}: {e}") from None
    return space


def fixed_values(args, space):
    """Return (what all trials of a sweep share: their recipe and the space, number of classes)."""
    train, *_ = splits = load_splits(args)
    folds = load_folds(args.exp, train, args.folds)
    recipe = describe_run(args, splits, folds, Hashes(args.cache))["recipe"]
    fixed = {key: value for key, value in recipe.items() if key not in (*space, *DERIVED)}
    fixed |= {f"SEARCH_SPACE {name}": list(SEARCH_SPACE[name]) for name in space}
    if "model" in space and Path(args.weights).is_dir():
        files = [weights_file(args.weights, model) for model in SEARCH_SPACE["model"]]
        fixed["weights"] = [Hashes(args.cache)(file) for file in files]
    return fixed, len(train.classes)


def as_knobs(run):
    """Return a recipe without its seed as it is pasted behind `make train`."""
    knobs, options = [f"MODEL={run.model}"], []
    for name, (_, default, _) in RECIPE.items():
        option, value = f"--{name.replace('_', '-')}", getattr(run, name)
        if option in TRAIN_KNOBS:  # make has defaults of its own
            knobs.append(f"{TRAIN_KNOBS[option]}={value}")
        elif value != default:
            options.append(f"{option} {value}")
    knobs.remove(f"SEED={run.seed}")
    return f"{' '.join(knobs)} TRAIN_ARGS='{' '.join(options)}'"


def run_sweep(args):
    """Try recipes until args.sweep are finished, then judge the best one with other seeds."""
    if ranks()[1] > 1:
        raise UserError("--sweep: start it in several processes without torchrun, which share it")
    sweep = Sweep(args)
    if len(sweep.trials(sweep.complete, sweep.pruned)) < args.sweep:
        claim_device(args.device, args.per_gpu)
        if "model" not in sweep.space:  # what no trial could build ends the sweep, not each trial
            start_model(args, range(sweep.n_classes), np.ones(sweep.n_classes))
    sweep.run_trials()
    if running := sweep.trials(sweep.running):
        print(f"{len(running)} trials still run in other processes: the last to finish prints the "
              "result")
        return
    n_complete = len(sweep.trials(sweep.complete))
    with lock(sweep.folder, wait=True):
        with atomic_write(sweep.folder / "trials.csv") as scratch:
            sweep.study.trials_dataframe().to_csv(scratch, index=False)
        if n_complete >= 4:  # of fewer the importances would be guesses
            sweep.draw(sweep.folder / "importance.png")
    if not n_complete:
        raise UserError(f"{sweep.folder}/trials.csv: no trial is complete, see user_attrs_error; "
                        "then remove study.db")
    sweep.judge()


# ---- runtimes: speed, size and memory of a model -------------------------------------------------

# column of the table -> what it is
RUNTIMES = {
    "params_m": "M parameters", "gmacs": "GMACs an image",
    "train_images_per_s": "images/s trained", "infer_images_per_s": "images/s predicted",
    "peak_mb": "MB at most", "train_steps": "train steps", "infer_steps": "infer steps"}


def runtimes(args):
    """Measure args.model at args.scale, without data or weights, and put a row into args.runtimes.

    A picture of the table stands beside it. Images/s are of train.py's own step and of one view's
    prediction, on a batch that stays in memory, the median over their steps. Peak memory is of
    training: what torch allocated on a GPU, on a CPU the whole process, 0.7 GB of it libraries.
    GMACs are the multiply-adds of convolutions and matrix products.
    """
    path = args.runtimes
    if path.suffix == ".png":
        raise UserError(f"--runtimes {path}: that is the picture's name; give the table another "
                        "ending")
    check_output(args.data, path, path.with_suffix(".png"))
    if path.exists():
        read_runtimes(path)
    device = claim_device(args.device, args.per_gpu)
    row = {"model": args.model, "scale": args.scale, "batch": args.batch}
    row |= dict.fromkeys(RUNTIMES, "") | {"device": device_name(device), "reason": ""}
    try:
        row |= measure(args, device)
    except (UserError, RuntimeError, ValueError) as e:
        row["reason"] = " ".join(str(e).split()) or type(e).__name__
    with lock(path.parent, wait=True, name=f".{path.name}.lock"):
        rows = read_runtimes(path) if path.exists() else []
        others = [old for old in rows if row_key(old) != row_key(row)]
        write_csv(path, [*others, row])
        if measured := [each for each in (*others, row) if not each["reason"]]:
            draw_runtimes(path.with_suffix(".png"), measured)
    text = row["reason"]
    if not text:
        text = ", ".join(f"{row[name]:,.4g} {what}" for name, what in RUNTIMES.items())
    print(f"{args.model} {args.scale}: {text}")


def read_runtimes(path):
    """Return the rows of a table of runtimes, whose numbers are there or else a reason."""
    rows = read_rows(path, ("model", "scale", "batch", *RUNTIMES, "device", "reason"))
    for line, row in rows:
        for name in () if row["reason"] else RUNTIMES:
            as_number(row[name], f"{path} line {line}: {name}")
    return [row for _, row in rows]


def row_key(row):
    """Return the columns that name a row; a new row replaces one with the same."""
    return [str(row[name]) for name in ("model", "scale", "batch", "device")]


def device_name(device):
    import torch
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def measure(args, device):
    """Return {column: value} of a model at a scale.

    Raises UserError, RuntimeError or ValueError if the model can't run.
    """
    import torch
    n_classes, scale = 12, args.scale  # the competition's
    args = argparse.Namespace(**vars(args) | {"weights": "none"})
    run = start_run(args, range(n_classes), np.ones(n_classes), None, device)
    images = torch.randint(256, (args.batch, scale, scale, 3), dtype=torch.uint8, device=device)
    masks = torch.randint(n_classes, (args.batch, scale, scale), dtype=torch.uint8, device=device)

    def train_batch():  # waits for the GPU, since it returns the loss
        train_one_epoch(run, [(images, masks)], args)

    def predict_batch():
        with torch.inference_mode(), amp(device):
            logits = run.model(normalise(images, run.mean, run.std))
            logits.float().softmax(dim=1)[0, 0, 0, 0].item()
    train_seconds, train_steps = median_seconds(train_batch, args.seconds * 3 / 4)
    peak = peak_mb(device)
    run.model.eval()
    infer_seconds, infer_steps = median_seconds(predict_batch, args.seconds / 4)
    n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    values = (n_parameters / 1e6, count_gmacs(run.model, scale), args.batch / train_seconds,
              args.batch / infer_seconds, peak, train_steps, infer_steps)
    return {name: round(value, 4) for name, value in zip(RUNTIMES, values, strict=True)}


def median_seconds(step, budget):
    """Return (median seconds of a step, number of steps that it is of) in `budget` seconds.

    The first two steps warm up and don't count. At least two steps are made.
    """
    times, started = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - started < budget:
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
    times = times[min(2, len(times) // 2):]
    return statistics.median(times), len(times)


def peak_mb(device):
    """Return the most memory so far, in MB: allocated on a GPU, or of this process on a CPU."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device) / 1e6
    # not getrusage: its peak is never below what the parent held when it started this process
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def count_gmacs(model, scale):
    """Return the multiply-adds of one image in 1e9; the model loses its weights.

    Nothing is computed on "meta", where attention is made of matrix products, which are counted.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta").eval()(torch.empty(1, 3, scale, scale, device="meta"))
    return counter.get_total_flops() / 2 / 1e9


def draw_runtimes(path, rows):
    """Draw images/s trained against parameters, a dot for each row, named in the right margin."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator
    rows = sorted(rows, key=lambda row: float(row["train_images_per_s"]))
    models = sorted({row["model"] for row in rows})
    figure = Figure((10, max(5, 0.24 * len(rows))))
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="parameters, millions", ylabel="images/s trained",
             title="; ".join(sorted({f"{row['device']}, batch {row['batch']}" for row in rows})))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    line = {"arrowstyle": "-", "alpha": 0.5, "relpos": (0, 0.5)}
    for i, row in enumerate(rows):  # the names in order of speed, so that their lines don't cross
        point = float(row["params_m"]), float(row["train_images_per_s"])
        colour = f"C{models.index(row['model'])}"
        axes.plot(*point, "o", color=colour, markersize=8, markeredgecolor="white")
        axes.annotate(f"{row['model']} {row['scale']}", point, (1.04, (i + 0.5) / len(rows)),
                      color=colour, va="center", textcoords="axes fraction",
                      arrowprops=line | {"color": colour})
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png", bbox_inches="tight", dpi=120)


# ---- main ----------------------------------------------------------------------------------------


def overfit_args(args):
    """Return the arguments of --overfit: without augmentation, and replacing what is there."""
    plain = {"augment": "none", "classmix": "none", "batch_hook": "none", "sampler": "all",
             "snapshots": 0, "soup": 0, "code": "new", "replace": True, "extra": [],
             "unlabelled": None}
    return argparse.Namespace(**vars(args) | plain)


def main(args):
    if args.show_args:
        check_args(args, ranks()[1])
        print(json.dumps(vars(args), default=str))
        return
    if args.check:
        check(args)
        return
    if args.runtimes:
        runtimes(args)
        return
    check_args(args, ranks()[1])
    if args.sweep:
        run_sweep(args)
    elif args.overfit:
        train_run(overfit_args(args), args.exp / "overfit")
    else:
        train_run(args, args.exp)


if __name__ == "__main__":
    run_script(main, parse_args())
