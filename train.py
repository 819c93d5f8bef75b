"""Train one model on one fold at one scale.

    python train.py --data DATA --exp out/main --model fpn/tu-tf_efficientnet_lite0 --scale 512 --fold 0

Writes EXP/rROUND/MODEL/sSCALE/fFOLD/: batch.png (the first batch), log.csv, curves.png, last.pt after every epoch and,
when training is done, valid.png (the worst, median and best images), model.pt and, last, config.json, which says what
made it. The same line again resumes after an interruption and does nothing when the run is done. When an edited script
would make it otherwise, --code says what is to happen. --snapshots K also keeps K epoch-*.pt.
"""
import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy as np
from tqdm import tqdm

from common import (AUGMENTATIONS, COLOURS, DECODERS, DESCRIBED, IGNORE_INDEX, LOSSES, PAINT_ORDERS, STEP, STRIDE,
                    EpochBatches, EvalPhotos, Hashes, Parser, TrainSamples, amp, atomic_write, build_model,
                    check_output, check_space, claim_device, code_of, confusion, decide, draw_bars, draw_heat,
                    encoder_mean_std, figure_urls, folds_hash, image_miou, keep_code, load_checkpoint, load_data,
                    load_folds, lock, make_augmentation, make_loss, move_aside, named, normalise, number, overlay,
                    provenance, ranks, rare_odds, read_description, recipe_changes, run_script, save_checkpoint,
                    scores, tile_url, write_csv, write_description, write_page, write_sheet)
from infer import resize_probs
from pseudo_label import check_labels, load_labels

STATES = ("model", "ema", "optimizer", "scaler")  # of these and
PLACE = ("epoch", "step", "total", "parts", "log", "best", "kept")  # these of a run is last.pt
OVERFIT_V3 = 0.9  # what --overfit must reach on its own training images
MAX_SKIPPED = 10  # steps in a row without a finite gradient that end a run
LOGGERS = ("tensorboard", "wandb")
# what decides no result; see BESIDE in common.py
BESIDE = {"begin", "choose_resume", "check_args", "draw_batch", "draw_curves", "draw_valid", "find_done", "find_last",
          "images_of", "log_row", "make_recipe", "model_files", "run_code", "start_logger",
          "write_config"}

# ---- options ---------------------------------------------------------------------------------------------------------

# name -> share of the peak learning rate at t in [0, 1), from the end of the warm-up to the end of the run; n: cycles
SCHEDULES = {
    "cosine": lambda t, n: 0.5 + 0.5 * math.cos(math.pi * t),
    "restarts": lambda t, n: 0.5 + 0.5 * math.cos(math.pi * (t * n % 1)),
    "poly": lambda t, n: (1 - t) ** 0.9,
    "multistep": lambda t, n: 0.1 ** ((t >= 0.6) + (t >= 0.85)),
    "onecycle": lambda t, n: 1 - t}

# name -> (torch.optim's name, settings)
OPTIMIZERS = {"adamw": ("AdamW", {}), "sgd": ("SGD", {"momentum": 0.9, "nesterov": True})}

# every option that decides the result of a run, besides those of "what to train": type or choices, default, why
RECIPE = {
    "weights": (str, "imagenet", "of the encoder: imagenet (downloaded), none, or a file with its state dict"),
    "epochs": (number(int, 1), 40, "with --overfit: at most"),
    "batch": (number(int, 2), 8, "images in a step, over all GPUs"),
    "accumulate": (number(int, 1), 1, "parts in which a step's batch goes through the model, to save memory"),
    "optimizer": (tuple(OPTIMIZERS), "adamw", "sgd has Nesterov momentum 0.9 and wants a larger --lr"),
    "lr": (number(float, 0, 10), 2e-3, "peak; a small FPN learned more from real photos with 2e-3 than with 1e-3"),
    "encoder_lr": (number(float, 0, 10), 1.0, "learning rate of the encoder, as a multiple of --lr"),
    "schedule": (tuple(SCHEDULES), "cosine", "of the learning rate"),
    "warmup": (number(float, 0, 0.9), 0.05, "share of the run with a rising learning rate; onecycle usually has 0.3"),
    "cycles": (number(int, 1), 3, "of the schedule restarts"),
    "snapshots": (number(int, 0), 0, "epochs kept as epoch-*.pt: last valleys of restarts, else over the last half"),
    "weight_decay": (number(float, 0, 1), 1e-2, "not of norms and biases"),
    "clip": (number(float, 0), 0.0, "largest norm of the gradient; 0: any"),
    "loss": (tuple(LOSSES), "iou_ce", "over the labelled pixels"),
    "loss_ratio": (number(float, 0, 1), 0.4, "share of iou in iou_ce, of dice in dice_ce; the rest is cross-entropy"),
    "label_smoothing": (number(float, 0, 0.99), 0.0, "of cross-entropy and focal"),
    "class_weights": (("none", "inverse"), "none", "of cross-entropy and focal: inverse to the class's pixels"),
    "augment": (tuple(AUGMENTATIONS), "basic", "see AUGMENTATIONS in common.py"),
    "classmix": (("none", "plain", "weighted"), "none", "paste half an image's classes, or rather rare, on another"),
    "classmix_prob": (number(float, 0, 1), 0.5, "share of the images that are pasted on"),
    "sampler": (("all", "rare"), "all", "every image once an epoch, or drawn: oftener the rarer its rarest class"),
    "pseudo_ratio": (number(float, 0), 0.0, "pseudo-labelled images of a batch to each labelled one; 0: as they come"),
    "labelled_only": (number(float, 0, 1), 0.0, "share of the run, its end, that learns from labelled images alone"),
    "ema": (number(float, 0, 0.99999), 0.998, "decay of the weights' average; the first steps use a smaller one"),
    "seed": (number(int, 0, 2 ** 31 - 1), 0, "of everything random")}

# what make sweep tries: option -> its choices, or ("even", lowest, highest) or ("log", lowest, highest) to draw from
SEARCH_SPACE = {
    "model": ("fpn/tu-tf_efficientnet_lite0", "fpn/tu-mobilenetv3_large_100", "efficientdet/tu-tf_efficientnet_lite0"),
    "batch": (4, 8, 16), "lr": ("log", 3e-4, 1e-2), "loss": ("iou_ce", "dice_ce", "ce", "lovasz"),
    "loss_ratio": ("even", 0.2, 0.8), "schedule": tuple(SCHEDULES), "augment": ("basic", "colour", "strong"),
    "classmix": ("none", "plain", "weighted"), "seed": (0, 1, 2)}


def parse_args(argv=None):
    parser = Parser(prog="train.py", description=__doc__)
    run = parser.add_argument_group("what to train")
    run.add_argument("--data", type=Path, required=True, help="the competition's folder")
    run.add_argument("--exp", type=Path, required=True, help="folder of the experiment, out/EXP")
    run.add_argument("--model", type=model_name, default="fpn/tu-tf_efficientnet_lite0", metavar="DECODER/ENCODER",
                     help=f"decoder: {', '.join(DECODERS)}; encoder: segmentation-models-pytorch's, or tu- and timm's")
    run.add_argument("--scale", type=number(int, STRIDE, 4096, STRIDE), default=512, help="image side, in steps of 32")
    run.add_argument("--fold", type=number(int, 0), default=0, help="fold held out for validation")
    run.add_argument("--folds", type=number(int, 2), default=5, help="number of folds")
    run.add_argument("--round", type=number(int, 0, 9), default=0, help="from 1: also learns EXP/rROUND/pseudo/fFOLD")
    run.add_argument("--paint", choices=PAINT_ORDERS, default="area", help="which object wins where they overlap")
    run.add_argument("--allow-leak", action="store_true", help="learn also from pseudo labels whose makers may have "
                     "trained on this fold; marks every later score as contaminated")
    run.add_argument("--check", action="store_true", help="check the data, write EXP/folds.csv and data.html, stop")
    run.add_argument("--overfit", type=number(int, 0), default=0, metavar="N",
                     help="instead train and validate on N images in EXP/overfit, not augmented; fails below v3 0.9")
    recipe = parser.add_argument_group("recipe")
    for name, (kind, default, text) in RECIPE.items():
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        recipe.add_argument("--" + name.replace("_", "-"), default=default, help=text, **how)
    system = parser.add_argument_group("system: none of these decides the recipe")
    system.add_argument("--replace", action="store_true", help="replace a run of another recipe, which is kept in "
                        "its folder replaced/ until the next time, instead of refusing")
    system.add_argument("--code", choices=("new", "keep"), help="where other code has made a run, or begun it: "
                        "train it anew, or keep it as it is and carry on")
    system.add_argument("--save-every", type=number(int, 0), default=0, metavar="N",
                        help="write last.pt after every N steps, not only after an epoch")
    system.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks, shared by experiments")
    system.add_argument("--cache-images", action="store_true",
                        help="also cache the training photos decoded: 3 bytes a pixel on disk, less to compute")
    system.add_argument("--device", default="auto", help="auto takes the first idle GPU, or the CPU")
    system.add_argument("--workers", type=number(int, 0), help="of the loader; none on a CPU, else one a core up to 8")
    system.add_argument("--compile", action="store_true", help="torch.compile the model: slow to start, then faster")
    system.add_argument("--logger", choices=LOGGERS, help="besides log.csv")
    return parser.parse_args(argv)


def model_name(text):
    decoder, _, encoder = text.partition("/")
    if decoder not in DECODERS or not encoder:
        raise argparse.ArgumentTypeError(f"{text!r} is not DECODER/ENCODER with a decoder of {', '.join(DECODERS)}")
    return text


# ---- training -------------------------------------------------------------------------------------------------------


def make_loaders(args, train, test, learn, valid, cuda):
    """(training, validation) DataLoaders; `learn` and `valid` are positions in `train`."""
    import torch
    from torch.utils.data import DataLoader
    entries = [(train, i, None) for i in learn.tolist()] * math.ceil(256 / len(learn) if args.overfit else 1)
    present, pseudo = np.array(train.pixels)[learn] > 0, []
    if args.round and not args.overfit:
        pseudo, class_ids = load_labels(args, test)
        print(f"{len(entries)} labelled and {len(pseudo)} pseudo-labelled images")
        entries += pseudo
        present = np.stack([*present, *(np.isin(range(len(train.classes)), [0, *some]) for some in class_ids)])
    rank, n_ranks = ranks()
    if len(entries) < 2 * n_ranks:
        raise SystemExit(f"{len(entries)} training images: batch norm needs 2 for each of {n_ranks} process(es)")
    workers = args.workers if args.workers is not None else min(8, os.cpu_count()) if cuda else 0
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": cuda,
               "multiprocessing_context": "fork" if workers else None,
               "generator": torch.Generator()}  # of its own: else starting workers would draw from the global one
    batches = EpochBatches(len(entries), args.batch, args.seed, rare_odds(present) if args.sampler == "rare" else None,
                           len(pseudo), args.pseudo_ratio, round(args.epochs * (1 - args.labelled_only)))
    weights = {"none": None, "plain": np.ones(len(train.classes)),
               "weighted": 1 / np.array(train.pixels)[learn].sum(0).clip(min=1)}[args.classmix]
    samples = TrainSamples(entries, make_augmentation(args.augment, args.scale), args.seed,
                           None if weights is None else (args.classmix_prob, weights))
    return (DataLoader(samples, batch_sampler=batches, collate_fn=tuple, **options),  # batches come whole from samples
            DataLoader(EvalPhotos(train, valid[rank::n_ranks].tolist(), args.scale), args.batch, **options))


def parameter_groups(model, encoder_lr, weight_decay):
    """Trainable parameters by learning rate factor and decay; norms and biases, all of one dimension, have none."""
    groups = {}
    for name, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
        factor = encoder_lr if name.startswith("encoder.") else 1.0
        groups.setdefault((factor, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": p, "factor": factor, "weight_decay": decay} for (factor, decay), p in groups.items()]


def learning_rate(progress, args):
    """Of the whole model at `progress` in [0, 1] of the run: a linear warm-up, then the schedule."""
    if progress < args.warmup:
        return args.lr * progress / args.warmup
    return args.lr * SCHEDULES[args.schedule]((progress - args.warmup) / (1 - args.warmup), args.cycles)


def snapshot_epochs(args):
    """The epochs after which a snapshot is kept: the last valleys of the schedule, or even steps up to the last."""
    k, n = args.snapshots, args.cycles
    valleys = [args.warmup + (1 - args.warmup) * (cycle + 1) / n for cycle in range(n)]
    ends = valleys if args.schedule == "restarts" else [1 - 0.5 * i / k for i in range(k)]
    return sorted({int(args.epochs * end + 1e-6) for end in ends} - {0})[-k:] if k else []


def backward(run, images, masks, device):
    """Gradients of a batch, part after part; returns its loss. When a GPU's memory is too small, parts are halved."""
    import torch
    n_parts = max(1, min(run["parts"], len(images) // 2))  # batch norm needs two images
    try:
        total = 0
        for image, mask in zip(images.tensor_split(n_parts), masks.tensor_split(n_parts), strict=True):
            with amp(device):
                logits = run["forward"](image)
            loss = run["loss"](logits, mask) * (len(image) / len(images))
            run["scaler"].scale(loss).backward()
            total += loss.detach()
        return total
    except torch.OutOfMemoryError as e:
        if n_parts >= len(images) // 2 or ranks()[1] > 1:
            raise SystemExit(f"out of memory: lower --scale or --batch, or raise --accumulate ({e})") from None
        run["parts"] = 2 * n_parts
        logits = loss = None  # they hold the failed attempt's graph
    print(f"out of memory: batches now go through the model in {run['parts']} parts", flush=True)
    run["optimizer"].zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return backward(run, images, masks, device)


def optimise(run, images, masks, clip, device):
    """A step of the weights: (loss, whether the gradient wasn't finite: then nothing changes), both on the device."""
    import torch
    model, optimizer, scaler = run["model"], run["optimizer"], run["scaler"]
    buffers = [buffer.clone() for buffer in model.buffers()]
    optimizer.zero_grad(set_to_none=True)
    loss = backward(run, images, masks, device)
    if ranks()[1] > 1:
        torch.distributed.all_reduce(loss.div_(ranks()[1]))
    scaler.unscale_(optimizer)
    bad = ~torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).isfinite()  # the same on all ranks
    optimizer.found_inf = bad.float()  # a fused optimizer then leaves weights and state alone, and no GPU waits
    scaler.step(optimizer)
    scaler.update()
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before.where(bad, buffer))
    return loss, bad


def train_one_epoch(run, loader, args, recipe, device, save=None, look=None):
    """The epoch from run["step"] on; returns what log.csv says of it: mean loss, last learning rate, ...

    Steps whose gradient isn't finite are counted. run["total"] is float32 [3]: sum of losses, skipped steps, those
    skipped in a row. save(steps done) is called as --save-every says, look(images, masks) before the run's first step.
    """
    import torch
    model, epoch, total = run["model"], run["epoch"], run["total"]
    model.train()
    images_seen, waited, started = 0, 0.0, time.time()
    ready = started
    bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", len(loader), initial=run["step"], leave=False,
               disable=True if ranks()[0] else None)
    for step, (images, masks) in enumerate(bar, run["step"]):
        waited += time.time() - ready
        lr = learning_rate((epoch + (step + 0.5) / len(loader)) / args.epochs, args)
        for group in run["optimizer"].param_groups:
            group["lr"] = lr * group["factor"]
        images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        dropout = np.random.default_rng([STEP, args.seed, epoch, step, ranks()[0]])
        torch.manual_seed(int(dropout.integers(2 ** 63)))
        if look and epoch == step == 0:
            look(images.cpu().numpy(), masks.cpu().numpy())
        loss, bad = optimise(run, normalise(images, recipe["mean"], recipe["std"]), masks.long(), args.clip, device)
        run["ema"].update(model, step=epoch * len(loader) + step + 1)
        total.copy_(torch.stack([total[0] + loss.where(~bad, 0), total[1] + bad, (total[2] + 1) * bad]))
        images_seen += len(images)
        if step % 10 == 9:  # looking at every step would make a GPU wait
            loss_sum, skipped, in_a_row = total.tolist()
            if in_a_row >= MAX_SKIPPED:
                raise SystemExit(f"{MAX_SKIPPED} steps in a row without a finite gradient, the last with images "
                                 f"{images_of(loader, step)}: lower --lr; kept is what was after {run['kept']}")
            bar.set_postfix(loss=f"{loss_sum / max(1, step + 1 - skipped):.3f}", lr=f"{lr:.1e}",
                            images_s=f"{images_seen / (time.time() - started):.1f}")
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < len(loader):
            save(step + 1)
        ready = time.time()
    if ranks()[1] > 1:
        for buffer in run["ema"].buffers():  # each rank has seen other images; rank 0's statistics are the model's
            torch.distributed.broadcast(buffer, 0)
    loss_sum, skipped, _ = total.tolist()
    seconds = time.time() - started
    return {"loss": loss_sum / (len(loader) - skipped) if skipped < len(loader) else math.nan, "lr": lr,
            "skipped": int(skipped), "images_per_s": images_seen * ranks()[1] / seconds, "waiting": waited / seconds}


def images_of(loader, step):
    """"7, 9": the ids of the images in a batch of this epoch."""
    loader.batch_sampler.first = step
    batch = [loader.dataset.entries[index][:2] for _, index in next(iter(loader.batch_sampler))]
    return ", ".join(str(split.ids[i]) for split, i in batch)


def predict(model, images, recipe, device):
    """Class ids uint8 [B, SUBMIT_SIZE, SUBMIT_SIZE] of uint8 images [B, H, W, 3]."""
    import torch
    with torch.inference_mode(), amp(device):
        logits = model(normalise(images.to(device, non_blocking=True), recipe["mean"], recipe["std"]))
    return resize_probs(logits.float().softmax(dim=1)).argmax(dim=1).byte().cpu().numpy()


def evaluate(model, loader, n_classes, recipe, device):
    """[N, C, C] pixel counts of every validation image at the submission's size, put together from all ranks."""
    n_ranks, counts = ranks()[1], []
    for images, truths in loader:
        preds = predict(model, images, recipe, device)
        counts += [confusion(pred, truth, n_classes) for pred, truth in zip(preds, truths.numpy(), strict=True)]
    shares = [counts] * n_ranks
    if n_ranks > 1:
        import torch
        torch.distributed.all_gather_object(shares, counts)
    return np.stack([shares[i % n_ranks][i // n_ranks] for i in range(sum(map(len, shares)))])


def validate(run, loader, args, info, device):
    """(scores by column of log.csv, {column: IoU of each class}, what model.pt has of this epoch if it is the best)."""
    model = run["ema"].module
    counts = evaluate(model, loader, len(info["classes"]), info["recipe"], device)
    found = scores(counts, args.batch)
    v = {name: float(found[name]) for name in ("v1", "v2", "v3")}
    iou = {f"iou {c}": float(value) for c, value in zip(info["classes"], found["iou"], strict=True)}
    return v, iou, {"epoch": run["epoch"] + 1, "v3": v["v3"], "image_v3": image_miou(counts).tolist(),
                    "model": {k: value.detach().clone() for k, value in model.state_dict().items()}}


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw_curves(path, log):
    """A PNG of the columns of log.csv over the epochs; waiting: share of the time without a batch to train on."""
    from matplotlib.figure import Figure
    figure, ious = Figure((13, 6), layout="constrained"), [name for name in log[0] if name.startswith("iou ")]
    panels = ["loss"], ["v1", "v2", "v3"], ious, ["lr"], ["images_per_s"], ["waiting"]
    for axes, names in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for name in names:
            colour = COLOURS[ious.index(name)] / 255 if name in ious else None
            axes.plot([row["epoch"] for row in log], [row[name] for row in log], ".-", color=colour,
                      label=name.removeprefix("iou ").replace("$", r"\$"))
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png", dpi=90)


def draw_batch(path, classes, images, masks):
    """The first images [B, H, W, 3] that are learnt from, as they are after augmentation and ClassMix, with masks."""
    write_sheet(path, [[("as trained on", overlay(image)), (named(mask, classes), overlay(image, mask))]
                       for image, mask in zip(images[:8], masks[:8], strict=True)],
                dict(enumerate(classes)) | {IGNORE_INDEX: "ignored"}, across=2)


def draw_valid(path, run, photos, info, device):
    """The worst, median and best images of an EvalPhotos by v3 in the epoch kept, with truth, prediction and errors."""
    import torch
    best, classes, order = run["best"], info["classes"], np.argsort(run["best"]["image_v3"]).tolist()
    middle = max(0, len(order) // 2 - 2)
    chosen = list(dict.fromkeys([*order[:4], *order[middle:middle + 4], *order[-4:]]))
    images, truths = zip(*(photos[i] for i in chosen), strict=True)
    run["ema"].module.load_state_dict(best["model"])
    preds = predict(run["ema"].module, torch.from_numpy(np.stack(images)), info["recipe"], device)
    write_sheet(path, [[
        (f"v3 {best['image_v3'][i]:.2f} {photos.split.file_names[photos.indices[i]]}", overlay(image)),
        (f"truth: {named(truth, classes)}", overlay(image, truth)),
        (f"found: {named(pred, classes)}", overlay(image, pred)),
        ("errors", overlay(image, np.where(pred == truth, 0, IGNORE_INDEX).astype(np.uint8)))]
        for i, image, truth, pred in zip(chosen, images, truths, preds, strict=True)],
        dict(enumerate(classes)) | {IGNORE_INDEX: "wrong"})


# ---- one run --------------------------------------------------------------------------------------------------------


def make_recipe(args, data, folds, hashes, pseudo=None, labels=None, contaminated=False):
    """Everything but code that decides the result, as plain values; a run made with other values is another run.

    data: fingerprint of the training photos; folds: folds_hash; pseudo, labels: labels_hash and label_settings of the
    labels learnt from, if any.
    """
    names = ("model", "scale", "fold", "folds", "round", "paint", "overfit", *RECIPE)
    recipe = {name: getattr(args, name) for name in names} | {"data": data, "folds_csv": folds}
    if args.weights not in ("imagenet", "none"):
        recipe["weights"] = hashes(args.weights)
    if args.round and not args.overfit:
        return recipe | {"pseudo": pseudo, "labels": labels, "contaminated": contaminated}
    return {k: v for k, v in recipe.items() if k not in ("pseudo_ratio", "labelled_only")} | {"contaminated": False}


def run_code(recipe):
    """code_of a run; of the tables only the entries that it uses."""
    return code_of("run", DECODERS=recipe["model"].partition("/")[0], LOSSES=recipe["loss"],
                   AUGMENTATIONS=recipe["augment"], SCHEDULES=recipe["schedule"], OPTIMIZERS=recipe["optimizer"])


def find_done(out, hashes):
    """What config.json says of the finished run in `out`, or None; if it is missing, what model.pt itself says."""
    if not (out / "model.pt").exists():
        return None
    made = read_description(out / "config.json", hashes)
    if not made:  # killed before it was written, or damaged
        made = load_checkpoint(out / "model.pt")
        if not isinstance(made, dict) or not made.keys() >= set(DESCRIBED):
            raise SystemExit(f"{out}/model.pt: not a checkpoint of this train.py: take another --exp, or remove it")
    return made


def model_files(epochs):
    """The checkpoints of a finished run, the one written last at the end."""
    return [*(f"epoch-{epoch:03}.pt" for epoch in epochs), "model.pt"]


def write_config(out, made, epochs, hashes):
    """Write what made the run and the hashes of its checkpoints; with this file the run is done."""
    more = {key: made[key] for key in ("classes", "epoch", "v3")}
    files = {name: hashes(out / name) for name in model_files(epochs)}
    write_description(out / "config.json", made, **more, files=files)
    hashes.save()


def find_last(out):
    """(path, checkpoint) that a run carries on from, if any: last.pt or, when that is damaged, last-1.pt."""
    damaged = ""
    for path in filter(Path.exists, (out / "last.pt", out / "last-1.pt")):
        try:
            last = load_checkpoint(path)
        except SystemExit as e:
            damaged += f"{e}; "
        else:
            if damaged and ranks()[0] == 0:
                print(f"{damaged}going back to {path}")
                (out / "last.pt").rename(out / "last-damaged.pt")  # else the next last.pt would make it last-1.pt
            return path, last
    if damaged:
        raise SystemExit(f"{damaged}remove {out}/last*.pt to start anew")
    return None


def set_prior(model, pixels):
    """Start the last bias at the log frequency of each class in `pixels` [C] (Lin et al. 2017, section 4.1)."""
    import torch
    last = [m for m in model.segmentation_head.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.bias.copy_(torch.tensor((pixels + 1) / (pixels + 1).sum()).log())


def start_run(args, classes, pixels, resume, device):
    """What a run works with, new or as it stands in `resume`, of find_last; pixels [C] are the training images'."""
    import torch
    from timm.utils import ModelEmaV3
    torch.manual_seed(args.seed)
    model = build_model(args.model, len(classes), "none" if resume else args.weights)
    try:
        model.eval()(torch.zeros(1, 3, args.scale, args.scale)).sum().backward()
    except (RuntimeError, ValueError, AssertionError) as e:  # too few pixels for a decoder; a ViT of another size
        raise SystemExit(f"{args.model} can't work at scale {args.scale}: {e}") from None
    for parameter in model.parameters():  # what the logits don't depend on would make DDP wait for its gradient
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad()
    set_prior(model, pixels)  # else the first epochs find out that nearly all is background
    model = model.to(device, memory_format=torch.channels_last)
    forward, n_ranks, gpu = model, ranks()[1], [device.index] if device.type == "cuda" else None
    if n_ranks > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if gpu else model
        forward = torch.nn.parallel.DistributedDataParallel(model, gpu)
    weights = (pixels > 0) / pixels.clip(min=1)
    weights = torch.tensor(weights / weights[pixels > 0].mean(), dtype=torch.float32, device=device)
    optimizer, settings = OPTIMIZERS[args.optimizer]
    run = {"model": model, "forward": torch.compile(forward) if args.compile else forward, "parts": args.accumulate,
           "loss": make_loss(args.loss, args.loss_ratio, args.label_smoothing,
                             weights if args.class_weights == "inverse" else None),
           "ema": ModelEmaV3(model, decay=args.ema, use_warmup=True),
           "optimizer": getattr(torch.optim, optimizer)(
               parameter_groups(model, args.encoder_lr, args.weight_decay), lr=args.lr, fused=True, **settings),
           "scaler": torch.amp.GradScaler(device.type, enabled=amp(device).fast_dtype == torch.float16),
           "total": torch.zeros(3), "epoch": 0, "step": 0, "log": [], "best": None, "kept": "the start", "drawing": 0.0}
    for p in (p for p in model.parameters() if p.requires_grad and args.optimizer == "sgd"):
        run["optimizer"].state[p]["momentum_buffer"] = torch.zeros_like(p)  # undefined after a skipped first step
    if resume:
        restore(run, *resume)
    run["total"] = run["total"].to(device)
    return run


def restore(run, path, state):
    """Put what the checkpoint `path` holds into a new run."""
    try:
        for name in STATES:
            if state[name]:  # a scaler that is off has no state
                run[name].load_state_dict(state[name])
        run |= {name: state[name] for name in PLACE}
    except (KeyError, RuntimeError, ValueError) as e:
        raise SystemExit(f"{path}: not of these scripts and libraries, remove it to start anew: "
                         f"{shorten(str(e), 300)}") from None
    print(f"{path.parent}: resuming after {run['kept']}")


def fit(run, loaders, args, info, out, device, report):
    """Train to the last epoch; the best of the later half by v3 is kept in run["best"]. info: what every file of the
    run says besides.
    """
    (train_loader, valid_loader), recipe = loaders, info["recipe"]
    finished = (out / "model.pt").exists()  # of a run that this one replaces: its log stays beside it until then
    look = None if ranks()[0] else partial(draw_batch, out / "batch.png", info["classes"])

    def save(step, snapshot=None):
        run["step"], kept = step, f"step {step} of epoch {run['epoch'] + 1}" if step else f"epoch {run['epoch']}"
        if not out.is_dir():
            raise SystemExit(f"{out} was removed: training stops")
        if ranks()[0] == 0:
            if snapshot and snapshot["epoch"] in snapshot_epochs(args):
                save_checkpoint(out / f"last-epoch-{snapshot['epoch']:03}.pt", **info, **snapshot)
            if snapshot:  # before last.pt: an epoch that counts as done is in it
                write_csv(out / ("last.csv" if finished else "log.csv"), run["log"])
            save_checkpoint(out / "last.pt", previous=out / "last-1.pt", **info, **{k: run[k] for k in PLACE} | {
                "kept": kept}, **{k: run[k].state_dict() for k in STATES})
        run["kept"] = kept

    while run["epoch"] < args.epochs and not (args.overfit and run["best"] and run["best"]["v3"] >= OVERFIT_V3):
        started = time.time()
        train_loader.batch_sampler.epoch, train_loader.batch_sampler.first = run["epoch"], run["step"]
        row = {"epoch": run["epoch"] + 1, **train_one_epoch(run, train_loader, args, recipe, device, save, look)}
        if not math.isfinite(row["loss"]):
            raise SystemExit(f"{out}: the loss of epoch {row['epoch']} is {row['loss']}: lower --lr; kept is what was "
                             f"after {run['kept']}")
        v, iou, now = validate(run, valid_loader, args, info, device)
        row |= {**v, "seconds": time.time() - started, **({"contaminated": 1} if recipe["contaminated"] else {}), **iou}
        run["log"].append(row)
        run["epoch"] += 1
        run["total"].zero_()
        # early on a model that calls nearly all background often has the best v3; --overfit stops as soon as it can
        late = args.overfit or 2 * row["epoch"] > args.epochs
        if late and (run["best"] is None or now["v3"] > run["best"]["v3"]):
            run["best"] = now
        save(0, now)
        if ranks()[0] == 0:
            log_row(run, row, args, recipe, out)
            if row["epoch"] < args.epochs and run["drawing"] < 0.02 * sum(row["seconds"] for row in run["log"]):
                drawn = time.time()
                draw_curves(out / "curves.png", run["log"])
                run["drawing"] += time.time() - drawn
        if report:
            report(row["epoch"], row["v3"])


def start_logger(name, out, recipe):
    """A function that takes a row of log.csv."""
    if name == "wandb":
        import wandb
        return wandb.init(dir=out, config=recipe, mode=os.environ.get("WANDB_MODE", "offline")).log
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(out / "tensorboard")
    return lambda row: [writer.add_scalar(k, v, row["epoch"]) for k, v in row.items()] and writer.flush()


def log_row(run, row, args, recipe, out):
    """Print the row and tell the logger; whatever fails there is a warning, since log.csv has it all."""
    print(f"{out} epoch {row['epoch']}/{args.epochs} loss {row['loss']:.4f} v1 {row['v1']:.4f} v2 {row['v2']:.4f} "
          f"v3 {row['v3']:.4f}{' contaminated' * recipe['contaminated']} {row['images_per_s']:.1f} images/s "
          f"{row['seconds']:.0f} s" + f" skipped {row['skipped']} step(s): gradient not finite" * (row["skipped"] > 0)
          + "\n   IoU "
          + ", ".join(f"{k.removeprefix('iou ')} {v:.3f}" for k, v in row.items() if k.startswith("iou ")), flush=True)
    if args.logger:
        try:
            run["logger"] = run.get("logger") or start_logger(args.logger, out, recipe)
            run["logger"](row)
        except Exception as e:
            print(f"warning: {args.logger} failed, training goes on without it: {e}", file=sys.stderr)
            run["logger"] = lambda row: None


def train_run(args, root, report=None):
    """Train, resume or find done the run of `args` under `root`; returns the v3 of the epoch it keeps.

    report(epoch, v3) is called after each epoch. With --overfit a v3 below OVERFIT_V3 raises SystemExit.
    """
    check_output(args.data, args.exp)
    train, test = load_data(args.data, args.cache, args.paint, args.cache_images)
    folds = load_folds(args.exp, train, args.folds)
    learn, valid = np.flatnonzero(folds != args.fold), np.flatnonzero(folds == args.fold)
    pixels, hashes, epochs = np.array(train.pixels), Hashes(args.cache), snapshot_epochs(args)
    if args.overfit:  # on the images with the most classes
        learn = valid = learn[np.argsort(-(pixels[learn] > 0).sum(1), kind="stable")][:args.overfit]
    out, first = root / f"r{args.round}" / args.model / f"s{args.scale}" / f"f{args.fold}", ranks()[0] == 0
    with lock(out, wait=report is not None) if first else nullcontext():
        folds_csv = folds_hash(train.ids, folds)
        labels = check_labels(args, test, folds_csv, hashes) if args.round and not args.overfit else ()
        recipe = make_recipe(args, train.fingerprint, folds_csv, hashes, *labels)
        recipe["mean"], recipe["std"] = map(list, encoder_mean_std(args.model))
        info = provenance(recipe, run_code(recipe)) | {
            "classes": train.classes, "valid_ids": [train.ids[i] for i in valid]}
        done = find_done(out, hashes)
        todo = decide(out / "model.pt", done, info, args.code, args.replace) if done else "make"
        if todo != "make" and all((out / name).exists() for name in model_files(epochs)):
            if first and (todo == "kept" or not read_description(out / "config.json", hashes)):
                keep_code(args.exp)
                write_config(out, done, epochs, hashes)
            print(f"{out}/model.pt is there and has this recipe: nothing to do")
            return done["v3"]
        resume = choose_resume(out, info, args, hashes)
        device = claim_device(args.device)
        if first:  # other ranks have read what is moved here, as claim_device waits for them
            begin(out, info, args, resume)
        loaders = make_loaders(args, train, test, learn, valid, device.type == "cuda")
        run = start_run(args, train.classes, pixels[learn].sum(0), resume, device)
        for name, part in (("training", learn), ("validation", valid)):
            if absent := [c for c, n in zip(train.classes, pixels[part].sum(0), strict=True) if not n]:
                print(f"warning: no {name} image of fold {args.fold} has {', '.join(absent)}")
        if first:  # three times the weights, their average, the best ones and Adam's two; the rest once
            size = sum(tensor.nbytes for tensor in run["model"].state_dict().values())
            check_space(out, (3 * 5 + 1 + args.snapshots) * size - sum(p.stat().st_size for p in out.glob("last*.pt")))
        try:
            fit(run, loaders, args, info, out, device, report)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{out}: interrupted, kept is what was after {run['kept']}") from None
        if first:
            draw_curves(out / "curves.png", run["log"])  # fit leaves out some epochs, and the last
        v3 = run["best"]["v3"]
        if args.overfit and v3 < OVERFIT_V3:
            raise SystemExit(f"{out}: v3 {v3:.4f} on its own {len(learn)} training images, below {OVERFIT_V3}: more "
                             "--epochs or another --lr, or the model or the loss doesn't learn")
        if first:
            finish_run(run, info, out, EvalPhotos(train, valid.tolist(), args.scale), device, epochs, hashes)
    return v3


def choose_resume(out, info, args, hashes):
    """What find_last finds if the run carries on from it, or None when it begins; info is what would make it now.

    When the user keeps what other code has begun, info gets to say so.
    """
    resume = find_last(out)
    if not resume:
        return None
    path, last = resume
    if not isinstance(last, dict) or not last.keys() >= set(DESCRIBED):
        raise SystemExit(f"{path}: not a checkpoint of this train.py: take another --exp, or remove it to start anew")
    said = read_description(out / "last.json", hashes)
    if said and not recipe_changes(last, said["recipe"]) and said["code"] == last["code"]:
        last["kept_under"] = said["kept_under"]  # the user has said so, but no epoch has ended since
    todo = decide(path, last, info, args.code, args.replace)
    if todo == "make":
        return None
    if last["kept_under"]:
        info |= {key: last[key] for key in DESCRIBED}
    return resume


def begin(out, info, args, resume):
    """Move aside what isn't carried on and write last.json, which says what makes this run."""
    begun = [path.name for path in sorted(out.glob("last*")) if path.suffix != ".json"]
    if begun and not resume:
        move_aside(out, ["last.json", *begun])
    keep_code(args.exp)
    write_description(out / "last.json", info, files={})


def finish_run(run, info, out, photos, device, epochs, hashes):
    """Write what stays of a run that is done and move aside what it replaces.

    photos: the validation images, an EvalPhotos. A kill at any point leaves last.pt, from which this is done again.
    """
    draw_valid(out / "valid.png", run, photos, info, device)
    best = {sys.intern(k): v for k, v in run["best"].items()}  # else a resumed run's file has other bytes
    save_checkpoint(out / "last-model.pt", **info, **best)
    if (out / "model.pt").exists():
        old = {path.name for folder in (out, out / "replaced") for path in folder.glob("epoch-*.pt")}
        move_aside(out, ["config.json", "log.csv", *sorted(old), "model.pt"])
    write_csv(out / "log.csv", run["log"])
    for name in model_files(epochs):
        if (out / f"last-{name}").exists():
            os.replace(out / f"last-{name}", out / name)
    for old in out.glob("last*"):  # before config.json: model.pt alone says what it needs, and none of these is left
        old.unlink()
    write_config(out, info | best, epochs, hashes)
    print(f"{out}/model.pt: epoch {best['epoch']}, v3 {best['v3']:.4f}")


def check(args):
    """Print the data's sizes, classes and folds, or stop with its faults."""
    train, test = load_data(args.data, args.cache, args.paint)
    folds = load_folds(args.exp, train, args.folds, renew=True)
    pixels, unread = np.array(train.pixels), sum(fault is not None for fault in test.faults)
    print(f"data: {len(train.ids)} training and {len(test.ids)} test images, {len(train.classes)} classes, "
          f"{len(set(train.groups))} groups, folds of {np.bincount(folds).tolist()} images; "
          + (f"{unread} test photo(s) can't be read: mend them for a full score" if unread else "no faults"))
    if odd := sum(train.odd, []):
        print(f"warning: {len(odd)} annotation(s) have a polygon that leaves the photo, where it's clipped, or without "
              f"area: {', '.join(map(str, odd[:9]))}")
    for class_id, name in enumerate(train.classes):
        present, share = pixels[:, class_id] > 0, pixels[:, class_id].sum() / pixels.sum()
        print(f"  {class_id:3} {name:20} {present.sum():6} images {share:8.3%} of pixels")
        if absent := [fold for fold in range(args.folds) if not present[folds == fold].any()]:
            print(f"      warning: no image of fold {', '.join(map(str, absent))} has it")
    write_data_page(args, train, test, folds)
    print(f"{args.exp}/data.html: a look at them")


# ---- data page ------------------------------------------------------------------------------------------------------


def write_data_page(args, train, test, folds):
    """Write EXP/data.html: what a first evening looks for in the data."""
    import pandas as pd
    names, pixels = train.classes, np.array(train.pixels)
    by_id, present = dict(list(enumerate(names))[1:]), pixels > 0
    sizes = pd.DataFrame([(c, n / sum(counts)) for photo, counts in zip(train.objects, train.pixels, strict=True)
                          for c, n in photo["sizes"]], columns=["class", "share"]).groupby("class")["share"]
    objects = sizes.size().reindex(range(len(names)), fill_value=0)
    shares = {"photos": present.mean(0), "objects": objects / objects.sum(), "pixels": pixels.sum(0) / pixels.sum()}
    both = present.T.astype(int) @ present  # [C, C] photos with two classes
    covered = pd.DataFrame([(names[below], names[above], n) for photo in train.objects
                            for below, above, n in photo["covered"]], columns=["below", "on top", "pixels"])
    photos = pd.DataFrame({"photo": train.file_names + test.file_names, "content": train.digests + test.digests,
                           "of": ["train"] * len(train.ids) + ["test"] * len(test.ids)})
    equal = photos[photos["content"].ne("") & photos.duplicated("content", keep=False)].sort_values("content")
    figures = [(text, figure_urls(plot, 1.5 + 0.25 * len(by_id))) for text, plot in (
        ("Shares of photos, objects and pixels", lambda axes: draw_bars(axes, by_id, shares, xscale="log")),
        ("Sizes of objects, as a share of the photo", lambda axes: draw_bars(axes, by_id, {
            label: sizes.quantile(q).reindex(range(len(names))) for label, q in (
                ("median", 0.5), ("5%", 0.05), ("95%", 0.95), ("largest", 1))}, xscale="log")),
        ("Of the photos with one class, how many % have another too", lambda axes: draw_heat(
            axes, (both / both.diagonal().clip(1)[:, None])[1:, 1:], names[1:], names[1:], xlabel="another",
            ylabel="one")))]
    write_page(args.exp / "data.html", f"Data: {args.data}", [
        {"title": "classes", "note": f"{len(train.ids)} photos for training, {len(test.ids)} for the test.",
         "figures": figures, "table": pd.DataFrame({
             "class": names, "photos": present.sum(0), "objects": objects, "pixels": pixels.sum(0),
             "share of pixels": shares["pixels"],
             **{f"photos of fold {f}": present[folds == f].sum(0) for f in range(args.folds)}})},
        {"title": "contested pixels", "note": "Objects of one class that are painted over by another's, by the paint "
         f"order {args.paint}: what lies on top is the truth.",
         "table": covered.groupby(["below", "on top"], as_index=False).agg(
             overlaps=("pixels", "size"), pixels=("pixels", "sum")).sort_values("pixels", ascending=False)},
        {"title": "equal photos", "note": f"{len(equal)} photos have the content of another; those for training are "
         "kept in one fold.", "table": equal.head(200)},
        {"title": "samples", "note": "Of each class photos spread evenly over those that have it.",
         "cards": sample_photos(train, present)}], names)


def sample_photos(train, present, n=6):
    """Cards of up to `n` photos of each class, with that class in its colour."""
    cards = []
    for class_id in range(1, len(train.classes)):
        having = np.flatnonzero(present[:, class_id])
        for i in having[np.linspace(0, len(having) - 1, min(n, len(having))).astype(int)].tolist():
            truth = train.truth(i)
            shown = overlay(train.image(i), np.where(truth == class_id, truth, 0), 0.4)
            cards.append({"text": train.file_names[i], "classes": [class_id],
                          "tiles": [(f"{(truth == class_id).mean():.2%} of the photo", tile_url(shown))]})
    return cards


# ---- main -----------------------------------------------------------------------------------------------------------


def check_args(args, n_ranks):
    """Stop with one line when the arguments don't fit each other, what is there or the number of processes."""
    if args.fold >= args.folds:
        raise SystemExit(f"--fold {args.fold}: there are the folds 0 to {args.folds - 1}")
    if args.weights not in ("imagenet", "none") and not Path(args.weights).is_file():
        raise SystemExit(f"--weights {args.weights}: no such file, and neither imagenet nor none")
    if args.batch < 2 * n_ranks:
        raise SystemExit(f"--batch {args.batch}: batch norm needs 2 images a process, of which there are {n_ranks}")
    if len(snapshot_epochs(args)) < args.snapshots:
        raise SystemExit(f"--snapshots {args.snapshots}: this run has only {len(snapshot_epochs(args))} to keep")


def main(args):
    if args.check:
        check(args)
        return
    check_args(args, ranks()[1])
    if args.overfit:
        plain = {"augment": "none", "classmix": "none", "sampler": "all", "snapshots": 0,
                 "code": "new", "replace": True}
        args = argparse.Namespace(**vars(args) | plain)
    train_run(args, args.exp / "overfit" if args.overfit else args.exp)


if __name__ == "__main__":
    run_script(main, parse_args())
