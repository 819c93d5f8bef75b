"""Train one model on one fold at one scale.

    python train.py --data DATA --exp out/main --model fpn/tu-tf_efficientnet_lite0 --scale 512 --fold 0

Writes EXP/rROUND/MODEL/sSCALE/fFOLD/: config.json, log.csv, last.pt after every epoch and, when
training is done, model.pt. The same line again resumes after an interruption and does nothing when model.pt is there.
"""
import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (AUGMENTATIONS, DECODERS, PAINT_ORDERS, STRIDE, EvalPhotos, Help, amp, amp_dtype, build_model,
                    claim_device, confusion, encoder_mean_std, file_hash, iou_ce, load_checkpoint, load_data,
                    load_folds, lock, make_augmentation, normalise, number, predict_probs, pseudo_folder, read_csv,
                    read_json, resize_probs, run_folder, run_script, save_checkpoint, scores, tune_process, write_csv,
                    write_json)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=Help)
    run = parser.add_argument_group("what to train")
    run.add_argument("--data", type=Path, required=True, help="the competition's folder")
    run.add_argument("--exp", type=Path, required=True, help="folder of the experiment, out/EXP")
    run.add_argument("--check", action="store_true", help="check the data, write EXP/folds.csv and stop")
    run.add_argument("--model", type=model_name, default="fpn/tu-tf_efficientnet_lite0", metavar="DECODER/ENCODER",
                     help=f"decoder: {', '.join(DECODERS)}; encoder: any of segmentation-models-pytorch, or tu- and a "
                          "timm name")
    run.add_argument("--scale", type=number(int, STRIDE, 4096), default=512,
                     help="side of the square training image, a multiple of 32")
    run.add_argument("--fold", type=number(int, 0), default=0, help="fold held out for validation")
    run.add_argument("--folds", type=number(int, 2), default=5, help="number of folds")
    run.add_argument("--round", type=number(int, 0, 9), default=0,
                     help="0: no pseudo labels; R: also learn from EXP/rR/pseudo/fFOLD")
    run.add_argument("--paint", choices=PAINT_ORDERS, default="area", help="which object wins where they overlap")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--weights", default="imagenet",
                        help="of the encoder: imagenet (downloaded), none, or a file with its state dict")
    recipe.add_argument("--epochs", type=number(int, 1), default=40)
    recipe.add_argument("--batch", type=number(int, 2), default=8)
    recipe.add_argument("--lr", type=number(float, 0, 10), default=2e-3,
                        help="peak learning rate; a small FPN learned more from real photos with 2e-3 than with 1e-3, "
                             "large pretrained encoders may want less")
    recipe.add_argument("--warmup", type=number(float, 0, 0.9), default=0.05,
                        help="share of the run with a rising learning rate")
    recipe.add_argument("--weight-decay", type=number(float, 0, 1), default=1e-2)
    recipe.add_argument("--iou-weight", type=number(float, 0, 1), default=0.4,
                        help="of soft IoU in the loss; rest: cross-entropy")
    recipe.add_argument("--augment", choices=AUGMENTATIONS, default="basic")
    recipe.add_argument("--ema", type=number(float, 0, 0.99999), default=0.998,
                        help="decay of the weights' moving average; the first steps use a smaller one")
    recipe.add_argument("--seed", type=number(int, 0, 2 ** 31 - 1), default=0)
    system = parser.add_argument_group("system: none of these decides the recipe")
    system.add_argument("--replace", action="store_true", help="replace a run of another recipe instead of refusing")
    system.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks, shared by experiments")
    system.add_argument("--device", default="auto", help="auto takes the first idle GPU, or the CPU")
    system.add_argument("--workers", type=number(int, 0),
                        help="loader processes; default 0 on a CPU, else one a core up to 8")
    return parser.parse_args(argv)


def model_name(text):
    decoder, slash, encoder = text.partition("/")
    if decoder not in DECODERS or not encoder:
        raise argparse.ArgumentTypeError(f"{text!r} is not DECODER/ENCODER with a decoder of {', '.join(DECODERS)}")
    return text


# ---- data -----------------------------------------------------------------------------------------------------------


class TrainSamples:
    """Augmented (image uint8 [scale, scale, 3], mask uint8 [scale, scale]) by key (epoch, index).

    Everything random is drawn from (seed, epoch, index): neither resuming nor the number of workers changes a sample.
    """

    def __init__(self, entries, augment, seed):
        self.entries, self.augment, self.seed = entries, augment, seed  # entries: (Split, index, pseudo label or None)

    def __getitem__(self, key):
        import cv2
        epoch, index = key
        split, i, label = self.entries[index]
        image = split.image(i)
        mask = (np.array(split.mask(i)) if label is None
                else cv2.resize(label, image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT))
        return self.augment(image, mask, np.random.default_rng([self.seed, epoch, index]))


class EpochBatches:
    """Batches of keys (epoch, index), in an order drawn from (seed, epoch); set `epoch` before each pass.

    A last batch of one image, which batch norm can't take, joins the batch before it.
    """

    def __init__(self, n_images, batch_size, seed):
        self.n_images, self.seed, self.epoch = n_images, seed, 0
        self.starts = list(range(0, n_images, batch_size))
        if n_images % batch_size == 1 and len(self.starts) > 1:
            self.starts.pop()

    def __len__(self):
        return len(self.starts)

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n_images).tolist()
        for start, stop in zip(self.starts, [*self.starts[1:], self.n_images], strict=True):
            yield [(self.epoch, index) for index in order[start:stop]]


def load_pseudo(args, test, folds_hash):
    """Entries of TrainSamples for the kept pseudo labels of this round and fold.

    Raises SystemExit unless their makers held out the same fold of the same folds, so that validation stays honest.
    """
    folder = pseudo_folder(args.exp, args.round, args.fold)
    manifest = read_json(folder / "manifest.json")
    expected = {"round": args.round, "fold": args.fold, "folds_csv": folds_hash, "classes": test.classes,
                "labels": file_hash(folder / "labels.npy")}
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise SystemExit(f"{folder}/manifest.json: {key} is {manifest.get(key)}, this run has {value}: its "
                             "validation images may have trained the makers of these labels; run make pseudo again")
    rows = read_csv(folder / "index.csv", ("image_id", "keep"))
    labels = np.load(folder / "labels.npy", mmap_mode="r")
    if [row["image_id"] for row in rows] != [str(i) for i in test.ids] or len(labels) != len(rows):
        raise SystemExit(f"{folder}/index.csv lists other images than test.json; run make pseudo again")
    if wrong := sorted({row["keep"] for row in rows} - {"0", "1"}):
        raise SystemExit(f"{folder}/index.csv: keep is {', '.join(wrong)}; it must be 0 or 1")
    return [(test, i, labels[i]) for i, row in enumerate(rows) if row["keep"] == "1"]


def make_loaders(args, train, test, folds, cuda):
    import torch
    from torch.utils.data import DataLoader
    entries = [(train, i, None) for i in np.flatnonzero(folds != args.fold).tolist()]
    if args.round:
        pseudo = load_pseudo(args, test, file_hash(args.exp / "folds.csv"))
        print(f"{len(entries)} labelled and {len(pseudo)} pseudo-labelled images")
        entries += pseudo
    workers = args.workers if args.workers is not None else min(8, os.cpu_count()) if cuda else 0
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": cuda,
               "multiprocessing_context": "fork" if workers else None,
               "generator": torch.Generator()}  # of its own: else starting workers would draw from the global one
    samples = TrainSamples(entries, make_augmentation(args.augment, args.scale), args.seed)
    valid = EvalPhotos(train, np.flatnonzero(folds == args.fold).tolist(), args.scale)
    return (DataLoader(samples, batch_sampler=EpochBatches(len(entries), args.batch, args.seed), **options),
            DataLoader(valid, args.batch, **options))


# ---- training -------------------------------------------------------------------------------------------------------


def cosine_lr(progress, peak, warmup):
    """Learning rate at `progress` in [0, 1]: linear warm-up, then half a cosine down to zero."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def train_one_epoch(run, loader, args, recipe, device):
    """One pass; returns (mean loss, last learning rate, images/s)."""
    import torch
    model, ema, optimizer, scaler, epoch = run["model"], run["ema"], run["optimizer"], run["scaler"], run["epoch"]
    model.train()
    loss_sum, images_seen, started = torch.zeros((), device=device), 0, time.time()
    bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=None)
    for step, (images, masks) in enumerate(bar):
        lr = cosine_lr((epoch + (step + 1) / len(loader)) / args.epochs, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = normalise(images.to(device, non_blocking=True), recipe["mean"], recipe["std"])
        masks = masks.to(device, non_blocking=True).long()
        with amp(device):
            logits = model(images)
        loss = iou_ce(logits, masks, args.iou_weight)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update(model, step=epoch * len(loader) + step + 1)
        loss_sum += loss.detach()  # summed on the device: .item() here would stall every step
        images_seen += len(images)
        if not bar.disable and step % 10 == 9:
            bar.set_postfix(loss=f"{loss_sum.item() / (step + 1):.3f}", lr=f"{lr:.1e}",
                            images_s=f"{images_seen / (time.time() - started):.1f}")
    return loss_sum.item() / len(loader), lr, images_seen / (time.time() - started)


def evaluate(model, loader, n_classes, recipe, device):
    """[N, C, C] pixel counts of every validation image at the submission's size."""
    counts = []
    for images, truths in loader:
        probs = predict_probs(model, normalise(images.to(device), recipe["mean"], recipe["std"]))
        preds = resize_probs(probs).argmax(dim=1).byte().cpu().numpy()
        counts += [confusion(pred, truth, n_classes) for pred, truth in zip(preds, truths.numpy(), strict=True)]
    return np.stack(counts)


# ---- one run --------------------------------------------------------------------------------------------------------


def make_recipe(args, train):
    """Everything that decides the result, as plain values; a run made with other values is another run."""
    names = ("model", "scale", "fold", "folds", "round", "paint", "weights", "epochs", "batch", "lr", "warmup",
             "weight_decay", "iou_weight", "augment", "ema", "seed")
    recipe = {name: getattr(args, name) for name in names}
    if args.weights not in ("imagenet", "none"):
        recipe["weights"] = f"{Path(args.weights).name} {file_hash(args.weights)}"
    recipe["mean"], recipe["std"] = map(list, encoder_mean_std(args.model))
    recipe["data"], recipe["folds_csv"] = train.fingerprint, file_hash(args.exp / "folds.csv")
    if args.round:
        files = [pseudo_folder(args.exp, args.round, args.fold) / name
                 for name in ("manifest.json", "labels.npy", "index.csv")]
        if missing := [str(path) for path in files if not path.is_file()]:
            raise SystemExit(f"no {', no '.join(missing)}: make the pseudo labels of this round first")
        recipe["pseudo"] = [file_hash(path) for path in files]
    return recipe


def same_recipe(path, recipe, replace):
    """Whether the checkpoint `path` was made with `recipe`; when not, say what differs and stop, unless `replace`."""
    if not path.exists():
        return False
    old = load_checkpoint(path)
    if not isinstance(old, dict) or "recipe" not in old:
        raise SystemExit(f"{path}: not a checkpoint of train.py: remove it")
    old = old["recipe"]
    differ = [f"{k} {old.get(k)} -> {recipe.get(k)}" for k in {**old, **recipe} if old.get(k) != recipe.get(k)]
    if differ and not replace:
        raise SystemExit(f"{path} was made with another recipe: {', '.join(differ)}; pass --replace to replace it")
    if differ:
        print(f"{path} is replaced: {', '.join(differ)}")
    return not differ


def set_prior(model, pixels):
    """Start the last convolution's bias at the log frequency of each class in `pixels` [C].

    The first epochs then need not find out that nearly all is background (Lin et al. 2017, section 4.1).
    """
    import torch
    last = [m for m in model.segmentation_head.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.bias.copy_(torch.tensor((pixels + 1) / (pixels + 1).sum()).log())


def start_run(args, train, folds, recipe, resume, device):
    """Everything a checkpoint saves, new or as it stands in the checkpoint `resume`."""
    import torch
    from timm.utils import ModelEmaV3
    torch.manual_seed(args.seed)
    model = build_model(args.model, len(train.classes), "none" if resume else args.weights)
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, args.scale, args.scale))
    except (RuntimeError, ValueError, AssertionError) as e:  # too few pixels for a decoder; a ViT of another size
        raise SystemExit(f"{args.model} can't work at scale {args.scale}: {e}") from None
    set_prior(model, np.array(train.pixels)[folds != args.fold].sum(0))
    model = model.to(device, memory_format=torch.channels_last)
    run = {"model": model, "ema": ModelEmaV3(model, decay=args.ema, use_warmup=True),
           "optimizer": torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                                          fused=device.type == "cuda"),
           "scaler": torch.amp.GradScaler(device.type, enabled=amp_dtype(device) == torch.float16),
           "epoch": 0, "log": [], "best": None}
    if resume:
        state = load_checkpoint(resume)
        for name in ("model", "ema", "optimizer", "scaler"):
            if state[name]:  # a scaler that is off has no state
                run[name].load_state_dict(state[name])
        run |= {name: state[name] for name in ("epoch", "log", "best")}
        print(f"{resume.parent}: resuming after epoch {run['epoch']}")
    return run


def save_run(path, run, recipe, classes):
    states = {name: run[name].state_dict() for name in ("model", "ema", "optimizer", "scaler")}
    save_checkpoint(path, **states, **{k: run[k] for k in ("epoch", "log", "best")}, recipe=recipe, classes=classes)


def fit(run, loaders, args, train, recipe, out, device):
    """Train to the last epoch; the best epoch by v3 is kept in run["best"]."""
    import torch
    train_loader, valid_loader = loaders
    while run["epoch"] < args.epochs:
        started = time.time()
        torch.manual_seed(args.seed * 1_000_003 + run["epoch"])  # dropout and the like, whether resumed or not
        train_loader.batch_sampler.epoch = run["epoch"]
        loss, lr, speed = train_one_epoch(run, train_loader, args, recipe, device)
        if not math.isfinite(loss):
            raise SystemExit(f"{out}: the loss of epoch {run['epoch'] + 1} is {loss}: lower --lr; {out}/last.pt keeps "
                             "the epoch before")
        counts = evaluate(run["ema"].module, valid_loader, len(train.classes), recipe, device)
        result = scores(counts, args.batch)
        run["epoch"] += 1
        run["log"].append({"epoch": run["epoch"], "loss": loss, "lr": lr,
                           **{k: float(result[k]) for k in ("v1", "v2", "v3")}, "images_per_s": speed,
                           "seconds": time.time() - started,
                           **{f"iou {c}": float(v) for c, v in zip(train.classes, result["iou"], strict=True)}})
        if run["best"] is None or result["v3"] > run["best"]["v3"]:
            weights = {k: v.detach().clone() for k, v in run["ema"].module.state_dict().items()}
            run["best"] = {"epoch": run["epoch"], "v3": float(result["v3"]), "model": weights}
        save_run(out / "last.pt", run, recipe, train.classes)
        write_csv(out / "log.csv", run["log"])
        print_epoch(out, run["log"][-1], args.epochs)


def print_epoch(out, row, epochs):
    print(f"{out} epoch {row['epoch']}/{epochs} loss {row['loss']:.4f} v1 {row['v1']:.4f} v2 {row['v2']:.4f} "
          f"v3 {row['v3']:.4f} {row['images_per_s']:.1f} images/s {row['seconds']:.0f} s\n   IoU "
          + ", ".join(f"{k.removeprefix('iou ')} {v:.3f}" for k, v in row.items() if k.startswith("iou ")), flush=True)


def describe(train, test, folds):
    """The check's summary: sizes, classes, folds."""
    pixels = np.array(train.pixels)
    print(f"data: {len(train.ids)} training and {len(test.ids)} test images, {len(train.classes)} classes, "
          f"{len(set(train.groups))} groups, folds of {np.bincount(folds).tolist()} images; no faults")
    for class_id, name in enumerate(train.classes):
        present = pixels[:, class_id] > 0
        share = pixels[:, class_id].sum() / pixels.sum()
        print(f"  {class_id:3} {name:20} {present.sum():6} images {share:8.3%} of pixels")
        if absent := [fold for fold in range(folds.max() + 1) if not present[folds == fold].any()]:
            print(f"      warning: no image of fold {', '.join(map(str, absent))} has it")


def main(args):
    tune_process()
    train, test = load_data(args.data, args.cache, args.paint)
    with lock(args.exp, wait=True):
        folds = load_folds(args.exp, train, args.folds, renew=args.check)
    if args.check:
        describe(train, test, folds)
        return
    if args.scale % STRIDE or args.scale < STRIDE:
        raise SystemExit(f"--scale {args.scale}: must be a multiple of {STRIDE}")
    if not 0 <= args.fold < args.folds:
        raise SystemExit(f"--fold {args.fold}: there are the folds 0 to {args.folds - 1}")
    if args.weights not in ("imagenet", "none") and not Path(args.weights).is_file():
        raise SystemExit(f"--weights {args.weights}: no such file, and neither imagenet nor none")
    out = run_folder(args.exp, args.round, args.model, args.scale, args.fold)
    with lock(out):
        recipe = make_recipe(args, train)
        if same_recipe(out / "model.pt", recipe, args.replace):
            (out / "model.pt").touch()  # newer than what it was made from: make has nothing left to do
            print(f"{out}/model.pt is there and has this recipe: nothing to do")
            return
        resume = out / "last.pt" if same_recipe(out / "last.pt", recipe, args.replace) else None
        write_json(out / "config.json", recipe | {"classes": train.classes})
        device = claim_device(args.device)
        loaders = make_loaders(args, train, test, folds, device.type == "cuda")
        run = start_run(args, train, folds, recipe, resume, device)
        fit(run, loaders, args, train, recipe, out, device)
        best = run["best"]
        save_checkpoint(out / "model.pt", model=best["model"], epoch=best["epoch"], v3=best["v3"], recipe=recipe,
                        classes=train.classes, valid_ids=[train.ids[i] for i in np.flatnonzero(folds == args.fold)])
        (out / "last.pt").unlink()
        print(f"{out}/model.pt: epoch {best['epoch']}, v3 {best['v3']:.4f}")


if __name__ == "__main__":
    run_script(main, parse_args())
