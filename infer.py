r"""Predict with trained models: the held-out fold and the test photos, or the photos of any folder.

    python infer.py --data DATA --tta flip \
        --checkpoint out/main/r0/fpn/tu-tf_efficientnet_lite0/s512/f0/model.pt

Writes valid.npy + valid.json and test.npy + test.json beside the checkpoint, or unlabelled.npy and
.json of photos that only pseudo labels are made for. A .npy has probabilities as uint8 (0..255 for
0..1) of shape [N, C, 256, 256], background for a test photo that can't be read. A .json says what
made them; it is written last, so where it stands, the .npy is whole. Several epochs of one run are
averaged.

The same line again carries on where it was interrupted, and does nothing when all is done. What it
replaces is kept in the folder replaced/ until the next time. Photos other than those of the
competition, in another DATA, need --out FOLDER. Under torchrun all processes share the work.

    python infer.py --photos FOLDER --out FOLDER --checkpoint A/model.pt B/model.pt
    python infer.py --photos FOLDER --out FOLDER --vote out/main/submission.vote.json

predicts all photos below a folder, which needs no DATA. Into masks/ go PNGs in the photos' own size
whose pixels are class ids, into overlays/ pictures of them, and areas.csv has each class's share of
each photo. The probabilities of the checkpoints are averaged and brought to the photo's size; they
may be of different models and scales with the same classes. --vote takes the runs, weights and
steps of a submission: as those were fitted to masks of 256 x 256, a mask is made at that size, and
then brought to the photo's by repeating its pixels. The exit code is 3 if a photo can't be read.
One process does so, without torchrun.
"""
import json
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (
    ALL, COLOURS, FROM_RECIPE, RUN_PLACE, STEPS_AFTER_VOTE, STORE_KINDS, STRIDE, SUBMIT_SIZE, TTA,
    UNSAFE, VIEWS, EvalPhotos, Hashes, Parser, UserError, accepted_code, apply_steps, atomic_write,
    check_output, check_shared_memory, check_space, checked, claim_device, clean, code_hashes,
    code_of, data_options, decide, find_photos, full_batch, has_kinds, keep_code, load_data,
    load_model, load_unlabelled, loader_options, loader_workers, lock, move_aside, normalise,
    number, open_store, overlay, predict_probs, predict_windows, provenance, ranks,
    read_description, read_json, read_photo, resize_image, resize_probs, run_script, settings_of,
    short_hash, signals_later, store_code, store_recipe, try_asked_sides, tta_name, tta_views, vote,
    write_csv, write_description, write_npy_header)

# what decides no result; see BESIDE in common.py
BESIDE = {"parts_folder", "write_store"}


def parse_args(argv=None):
    parser = Parser(prog="infer.py", description=__doc__)
    what = parser.add_argument_group("what to predict")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="the competition's folder")
    source.add_argument("--photos", type=Path, help="a folder of any photos, at any depth")
    voters = what.add_mutually_exclusive_group(required=True)
    voters.add_argument("--checkpoint", type=Path, nargs="+",
                        help="model.pt of train.py, or epoch-*.pt, whose probabilities are "
                        "averaged; with --data those of one run")
    voters.add_argument("--vote", type=Path, metavar="JSON", help="with --photos: the .vote.json "
                        "of a submission, which knows its checkpoints and their TTA")
    what.add_argument("--split", choices=("valid", "test", "unlabelled"), nargs="+",
                      default=["valid", "test"])
    what.add_argument("--unlabelled", type=Path, metavar="FOLDER",
                      help="of the photos of --split unlabelled, which pseudo labels are made for")
    what.add_argument("--tta", type=checked(tta_views), default="flip",
                      metavar="SET|VIEW,VIEW+VIEW,...",
                      help="views whose probabilities are averaged: "
                      f"{', '.join(TTA)}, or a list of {', '.join(VIEWS)}; + does one after "
                      "another")
    what.add_argument("--tta-scales", type=number(float, 0.1, 10), nargs="+", default=[1.0],
                      metavar="SCALE", help="sizes that every view is predicted at, times the "
                      "scale that the model was trained at")
    what.add_argument("--scale", type=number(int, STRIDE, 4096), help="side of what the "
                      "network sees, made from the full photo; else the one that it was trained "
                      "at")
    what.add_argument("--out", type=Path, help="folder to write to, instead of beside the "
                      "checkpoint")
    system = parser.add_argument_group("system: none of these decides the result")
    system.add_argument("--replace", action="store_true",
                        help="replace predictions for other photos, or by other models; they "
                        "are kept in replaced/ until the next time")
    system.add_argument("--code", choices=("new", "keep"),
                        help="where other code has predicted: predict anew, or keep what is there")
    system.add_argument("--batch", type=number(int, 1, 4096), default=8)
    system.add_argument("--cache", type=Path, default=Path("out/cache"),
                        help="painted masks, shared by experiments")
    system.add_argument("--device", default="auto",
                        help="auto takes the first idle GPU, or the CPU")
    system.add_argument("--per-gpu", type=number(int, 1), default=1, metavar="N",
                        help="jobs that may share a GPU that auto takes")
    system.add_argument("--workers", type=number(int, 0, 256),
                        help="of the loader; none on a CPU, else one a core up to 8")
    system.add_argument("--show-args", action="store_true",
                        help="print these arguments as JSON and stop: make asks so")
    parser.set_defaults(decides=["tta", "tta_scales", "scale"])
    return parser.parse_args(argv)


# ---- models and photos ---------------------------------------------------------------------------


def load_models(paths, hashes):
    """Return ([TrainedModel], [what a store says of the checkpoint]) of checkpoints of one run.

    Raises UserError if their recipes differ.
    """
    models = [load_model(path) for path in paths]
    checkpoints = []
    for path, trained in zip(paths, models, strict=True):
        if trained.recipe != models[0].recipe:
            raise UserError(f"{path} and {paths[0]} are of different runs: give the epochs of one")
        epoch = trained.checkpoint["epoch"]
        checkpoints.append({"file": path.name, "hash": hashes(path), "epoch": epoch})
    return models, checkpoints


def load_photos(args, trained):
    """Return {name: (Split, indices of the photos to predict)} of "test" and of all of args.split.

    A model of the fold ALL has no "valid". Raises UserError when DATA isn't what the model was
    trained on.
    """
    path, recipe, checkpoint = args.checkpoint[0], trained.recipe, trained.checkpoint
    if missing := FROM_RECIPE.keys() - recipe.keys():
        raise UserError(f"{path}: its recipe lacks {', '.join(sorted(missing))}: it is by an older "
                        "train.py; train it again")
    train, test = load_data(args.data, args.cache, **data_options(recipe))
    if trained.classes != train.classes:
        raise UserError(f"{path} knows the classes {trained.classes}, DATA has {train.classes}")
    photos = {"test": (test, range(len(test.ids)))}
    if "valid" in args.split and recipe["fold"] != ALL:
        index_of = {image_id: index for index, image_id in enumerate(train.ids)}
        missing = [image_id for image_id in checkpoint["valid_ids"] if image_id not in index_of]
        if missing:
            raise UserError(f"{path} was validated on {len(missing)} images that DATA doesn't "
                            f"have, the first with id {missing[0]}: it was trained on other data")
        photos["valid"] = train, [index_of[image_id] for image_id in checkpoint["valid_ids"]]
    if "unlabelled" in args.split:
        split = load_unlabelled(args.unlabelled, train, test, args.cache, recipe["orientation"])
        photos["unlabelled"] = split, range(len(split.ids))
    return photos


# ---- what a store says of itself -----------------------------------------------------------------


def describe_store(name, split, indices, trained, checkpoints, run, args):
    """Return all that a store's JSON says, except for the hashes of its files.

    name: of args.split; split, indices: the photos; checkpoints: as load_models returns them;
    run: as run_of returns it.
    """
    tta = tta_name(args)
    checkpoint_hashes = [checkpoint["hash"] for checkpoint in checkpoints]
    recipe = store_recipe(args, name, checkpoint_hashes, split.fingerprint)
    info = provenance(recipe, store_code(trained.recipe["model"], tta))
    info |= {
        "image_ids": [split.ids[i] for i in indices], "classes": trained.classes, "split": name,
        "tta": tta, "unreadable": [split.ids[i] for i in indices if split.faults[i]],
        "checkpoints": checkpoints, "data": split.fingerprint, "run": run}
    return info | {key: trained.recipe[key] for key in FROM_RECIPE}


def run_of(folder, trained, hashes):
    """Return what a store says of the run in `folder`: its recipe and the code that it counts as.

    config.json knows under which code the run was kept since; where it is of another run, or not
    there, the checkpoint itself tells.
    """
    checkpoint = trained.checkpoint
    config = read_description(folder / "config.json", hashes)
    is_of_this_run = config and config["recipe"] == trained.recipe
    description = config if is_of_this_run else checkpoint
    return {"recipe": trained.recipe, "code": accepted_code(description),
            "codes": code_hashes(description), "state": checkpoint["state"],
            "commit": checkpoint["commit"],
            "kept_under": [kept["state"] for kept in description["kept_under"]]}


def write_store(path, info):
    """Write the JSON of a store."""
    write_description(path, info, **{key: info[key] for key in STORE_KINDS})


def is_up_to_date(path, info, args, hashes, exp):
    """Return whether the store `path`, a .npy, is whole and as `info` says, or is to be kept.

    Raises UserError when the user has to say what to do. The JSON of a store that stays gets what
    has changed since: that it, or its run, was kept though the code is another.
    """
    try:
        _, description = open_store(path.with_suffix(".json"), hashes)
    except UserError:  # not there or not whole
        return False
    if description["data"] != info["data"] and not args.replace:
        raise UserError(f"{path} is of other photos than {args.data} has: --out FOLDER writes "
                        "elsewhere, --replace writes over it")
    decision = decide(path, description, info, args.code)
    if decision == "make":
        return False
    if ranks()[0] == 0:
        if decision == "kept":
            keep_code(exp)
        if decision == "kept" or description["run"] != info["run"]:
            write_store(path.with_suffix(".json"), description | {"run": info["run"]})
        shutil.rmtree(parts_folder(path), ignore_errors=True)  # left by a kill after the .json
    return True


# ---- prediction ----------------------------------------------------------------------------------


def parts_folder(path):
    """Return where the batches of an unfinished store `path` are kept."""
    return path.with_name(f".{path.stem}.parts")


def predict_split(models, split, indices, path, info, args, device, hashes):
    """Write the store `path`, a .npy, and `info` beside it; what was there is moved aside.

    models: [TrainedModel], whose probabilities are averaged. split, indices: the photos. Each
    batch is kept as a file of its own until the store is whole: so nothing is predicted twice after
    an interruption, and several processes can share the work.
    """
    import torch
    rank, n_ranks = ranks()
    photos = EvalPhotos(split, indices, *seen_by(models[0], args.scale))
    shape = (len(photos), len(info["classes"]), SUBMIT_SIZE, SUBMIT_SIZE)
    folder = parts_folder(path) / short_hash(info["recipe"], info["code"], args.batch)
    batches = {}  # file of a batch -> items of `photos`
    for start in range(0, len(photos), args.batch):
        batches[folder / f"{start:06}"] = range(start, min(start + args.batch, len(photos)))
    written = sum(part.stat().st_size for part in batches if part.exists())
    check_space(path.parent, 2 * math.prod(shape) - written)  # the batches and the store
    missing = {part: batches[part] for part in list(batches)[rank::n_ranks] if not part.exists()}
    predict_batches(models, photos, missing, path, args, device)
    if n_ranks > 1:
        torch.distributed.barrier()
    if rank == 0:
        join_parts(path, shape, batches, info, hashes)


def seen_by(trained, scale=None):
    """Return (scale, crop) at which a TrainedModel sees photos; scale: of --scale, or None."""
    recipe = trained.recipe  # that of an older train.py has no crop
    return scale or recipe["scale"], recipe.get("crop", "photo")


def predict_batches(models, photos, batches, path, args, device):
    """Predict batches of `photos`, an EvalPhotos, into a file each: uint8 [B, C, S, S].

    S is SUBMIT_SIZE. models: [TrainedModel]. batches: {file: items of `photos`}. path: the store,
    for the progress bar. A GPU works on a batch while the one before it is written.
    """
    predicted = native_batches if photos.crop == "native" else squashed_batches
    probs = predicted(models, photos, list(batches.values()), args, device)
    progress = tqdm(probs, str(path), len(batches), disable=True if ranks()[0] else None)
    previous = None  # what write_batch gets of the batch before
    for (part, items), each in zip(batches.items(), progress, strict=True):
        stored = stored_values(each)  # a GPU has only begun with it
        if previous:
            write_batch(*previous)
        faults = [photos.split.faults[photos.indices[item]] for item in items]
        previous = part, stored[:len(items)].cpu().numpy(), faults
    if previous:
        write_batch(*previous)


def squashed_batches(models, photos, batches, args, device):
    """Yield the probs [B, C, scale, scale] of each batch of items; all have the size of the first.

    models, photos, args: as in predict_batches.
    """
    recipe, views = models[0].recipe, tta_views(args.tta)
    size = min(args.batch, len(photos))
    full_batches = [full_batch(items, size) for items in batches]
    bytes_in_batches = size * photos.largest(), len(full_batches)
    loader = load_batches(photos, bytes_in_batches, args, device, batch_sampler=full_batches)
    networks = [trained.model for trained in models]
    for images, _ in loader:
        images = normalise(images.to(device, non_blocking=True), recipe["mean"], recipe["std"])
        yield predict_probs(networks, images, views, args.tta_scales)


def native_batches(models, photos, batches, args, device):
    """Yield the probs [B, C, SUBMIT_SIZE, SUBMIT_SIZE] of each batch of items, from windows.

    models, photos, args: as in predict_batches. The photos come one by one, in any size.
    """
    import torch
    items = [item for batch in batches for item in batch]
    bytes_in_batches = photos.largest(), len(items)
    loader = load_batches(photos, bytes_in_batches, args, device, batch_size=None, sampler=items)
    networks, recipe = [each.model for each in models], models[0].recipe | {"scale": photos.scale}
    images = ((image.numpy(), (SUBMIT_SIZE, SUBMIT_SIZE)) for image, _ in loader)
    views = tta_views(args.tta)
    probs_of = partial(predict_probs, networks, views=views, scales=args.tta_scales)
    for batch in batches:  # windows of two would not come together again after an interruption
        some = islice(images, len(batch))
        probs = predict_windows(probs_of, recipe, some, args.batch, device)
        yield torch.stack(list(probs))


def load_batches(photos, bytes_in_batches, args, device, **batching):
    """Return the started iterator of a DataLoader of an EvalPhotos.

    bytes_in_batches: of check_shared_memory; batching: options of the DataLoader.
    """
    from torch.utils.data import DataLoader
    cuda = device.type == "cuda"
    workers = loader_workers(args.workers, cuda)
    check_shared_memory(workers, bytes_in_batches)
    loader = DataLoader(photos, **batching, **loader_options(workers, cuda))
    with signals_later():
        return iter(loader)


def stored_values(probs):
    """Return probs [B, C, H, W] as a store holds them: uint8 [B, C, SUBMIT_SIZE, SUBMIT_SIZE]."""
    return (resize_probs(probs) * 255).round_().byte()


def write_batch(part, stored, faults):
    """Write a batch, uint8 [B, C, S, S], to the file `part`; faults: of each photo, or None."""
    for row, fault in enumerate(faults):
        if fault is not None:  # it can't be read
            stored[row] = 0
            stored[row, 0] = 255  # surely background
    with atomic_write(part) as scratch:
        scratch.write_bytes(stored)


def join_parts(path, shape, parts, info, hashes):
    """Write the store `path` of this shape from its batches, then its JSON; remove the batches."""
    with atomic_write(path) as scratch:
        with open(scratch, "wb") as f:
            write_npy_header(f, shape)
            for part in parts:
                f.write(part.read_bytes())
        move_aside(path.parent, [f"{path.stem}.json", path.name])
    write_store(path.with_suffix(".json"), info | {"files": {path.name: hashes(path)}})
    hashes.save()
    shutil.rmtree(parts_folder(path))


# ---- the photos of any folder: what votes on them ------------------------------------------------


@dataclass
class Voter:
    """Checkpoints of one run, and how they predict."""
    models: list  # [TrainedModel], whose probabilities are averaged
    weight: float
    settings: dict  # tta, tta_scales and scale
    checkpoints: list  # their hashes

    @property
    def recipe(self):
        """Return the recipe of the run, with the scale and crop that it is predicted at."""
        scale, crop = seen_by(self.models[0], self.settings["scale"])
        return self.models[0].recipe | {"scale": scale, "crop": crop}


def load_voters(args, hashes):
    """Return ([Voter], what decides the masks: a recipe of plain values).

    Raises UserError if a checkpoint isn't there, or if their classes differ.
    """
    if args.vote:
        voters, recipe = read_vote(args.vote, hashes)
    else:
        settings = settings_of(args)
        voters = [Voter([load_model(path)], 1.0, settings, [hashes(path)])
                  for path in args.checkpoint]
        recipe = settings | {"checkpoints": [voter.checkpoints[0] for voter in voters]}
    classes = voters[0].models[0].classes
    for voter in voters:
        if voter.models[0].classes != classes:
            raise UserError(f"the models {voters[0].recipe['model']} and {voter.recipe['model']} "
                            f"have different classes, {', '.join(classes)} and "
                            f"{', '.join(voter.models[0].classes)}: they can't vote together")
        check_sides(voter.models[0], voter.settings)
    return voters, recipe


VOTE_KINDS = {
    "runs": [{"folder": str, "weight": (int, float),
              "settings": {"tta": str, "tta_scales": [(int, float)], "scale": (int, type(None))},
              "checkpoints": [{"file": str, "hash": str}]}],
    "least share": (int, float), "steps": {str: [(int, float)]}}  # see has_kinds


def read_vote(path, hashes):
    """Return ([Voter], recipe) of the .vote.json of a submission.

    Raises UserError if it is none, or if a checkpoint has changed since it voted.
    """
    said = read_json(path)
    if not has_kinds(said, VOTE_KINDS) or not said["runs"] or not all(
            run["checkpoints"] and run["settings"]["tta_scales"] for run in said["runs"]):
        raise UserError(f"{path}: not a .vote.json of ensemble.py, or damaged: run ensemble.py "
                        "soft, or make submit, again")
    if unknown := said["steps"].keys() - {name for name, *_ in STEPS_AFTER_VOTE}:
        raise UserError(f"{path}: STEPS_AFTER_VOTE of common.py has no {', '.join(unknown)}, "
                        "which this vote took: vote again")
    voters = []
    for run in said["runs"]:
        paths = [path.parent / run["folder"] / each["file"] for each in run["checkpoints"]]
        digests = [each["hash"] for each in run["checkpoints"]]
        for checkpoint, digest in zip(paths, digests, strict=True):
            if hashes(checkpoint) != digest:
                what = "has changed since it voted" if checkpoint.exists() else "is missing"
                raise UserError(f"{checkpoint}: {what}, by {path}: vote again (make submit)")
        models = [load_model(checkpoint) for checkpoint in paths]
        voters.append(Voter(models, run["weight"], run["settings"], digests))
    runs = [{"checkpoints": voter.checkpoints, "weight": voter.weight, **voter.settings}
            for voter in voters]
    return voters, {"runs": runs, "least share": said["least share"], "steps": said["steps"]}


# ---- the photos of any folder: reading them ------------------------------------------------------

OVERLAY_SIDE = 1024  # pixels, at most: it is to be looked at
PROBS_SIDE = 2048  # pixels, at most, of probabilities that are added up from windows


@dataclass
class LoadedPhoto:
    """A photo of a folder as the models see it, or why it can't be read."""
    name: str
    fault: str = ""
    size: tuple = ()  # (height, width)
    preview: np.ndarray | None = None  # uint8 RGB, for the overlay
    images: dict | None = None  # {scale: uint8 [scale, scale, 3]}, the photo itself for "native"


class FolderPhotos:
    """The photos `names` of a folder as LoadedPhotos, for a DataLoader.

    kinds: of the images that the models see, each a scale or "native".
    """

    def __init__(self, folder, names, kinds):
        self.folder, self.names, self.kinds = folder, names, kinds

    def __len__(self):
        return len(self.names)

    def __getitem__(self, item):
        import cv2
        name = self.names[item]
        try:
            if UNSAFE.search(name):
                raise OSError(None, "has a name that no CSV can hold: rename it")
            image = read_photo(self.folder / name)
        except OSError as e:
            return LoadedPhoto(name, e.strerror)
        height, width = image.shape[:2]
        shrink = min(1, OVERLAY_SIDE / max(height, width))
        size = [max(1, round(side * shrink)) for side in (width, height)]
        preview = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        images = {kind: image if kind == "native" else resize_image(image, kind)
                  for kind in self.kinds}
        return LoadedPhoto(name, "", (height, width), preview, images)


# ---- the photos of any folder: their masks -------------------------------------------------------


def predict_batch(voters, recipe, photos, batch, device):
    """Return the masks uint8 [H, W] of LoadedPhotos, each in its photo's size.

    recipe: of load_voters; batch: the number of photos, or windows, that a batch is filled up to.
    """
    if "runs" not in recipe:
        return mean_masks(voters, photos, batch, device)
    sizes = [(SUBMIT_SIZE, SUBMIT_SIZE)] * len(photos)
    weights, masks = [voter.weight for voter in voters], []
    stores = [[stored_values(probs[None])[0].cpu().numpy()
               for probs in voter_probs(voter, photos, sizes, batch, device)] for voter in voters]
    for n, photo in enumerate(photos):
        images = {m: store[n] for m, store in enumerate(stores)}
        pred = vote(images, weights, len(images[0]), recipe["least share"])
        masks.append(enlarge_mask(apply_steps(pred, recipe["steps"]), photo.size))
    return masks


def kind_of(voter):
    """Return what a Voter sees of a photo, a kind of FolderPhotos."""
    return "native" if voter.recipe["crop"] == "native" else voter.recipe["scale"]


def probs_size(size):
    """Return the (height, width) of the probabilities that windows add up to, at most PROBS_SIDE.

    A photo of 89 megapixels would take 4 GB.
    """
    shrink = min(1, PROBS_SIDE / max(size))
    return tuple(max(1, round(side * shrink)) for side in size)


def voter_probs(voter, photos, sizes, batch, device):
    """Return an iterator of probs float32 [C, height, width] of LoadedPhotos by a Voter.

    From windows they have the (height, width) in `sizes`, else they are of its scale.
    """
    import torch
    recipe, settings = voter.recipe, voter.settings
    networks, kind = [trained.model for trained in voter.models], kind_of(voter)
    images = [photo.images[kind] for photo in photos]
    views, scales = tta_views(settings["tta"]), settings["tta_scales"]
    if kind == "native":
        pairs = zip(images, sizes, strict=True)
        probs_of = partial(predict_probs, networks, views=views, scales=scales)
        return predict_windows(probs_of, recipe, pairs, batch, device)
    images = torch.from_numpy(np.stack(full_batch(images, batch)))
    images = normalise(images.to(device), recipe["mean"], recipe["std"])
    return iter(predict_probs(networks, images, views, scales)[:len(photos)])


def mean_masks(voters, photos, batch, device):
    """Return the masks of LoadedPhotos by the mean of the Voters' probabilities.

    They are added up voter by voter, in the largest size that any of them has: those of five
    voters' windows of eight large photos would take 6 GB at once.
    """
    from torch.nn.functional import interpolate
    window_sizes = [probs_size(photo.size) for photo in photos]
    sizes = [largest_size(voters, size) for size in window_sizes]
    totals = [0] * len(photos)
    for voter in voters:
        for n, probs in enumerate(voter_probs(voter, photos, window_sizes, batch, device)):
            totals[n] = totals[n] + interpolate(probs[None], sizes[n], mode="bilinear")[0]
    return [likeliest_classes(total.cpu().numpy(), photo.size)
            for total, photo in zip(totals, photos, strict=True)]


def largest_size(voters, window_size):
    """Return the largest height and the largest width of a photo's probabilities by the voters.

    window_size: the (height, width) of those from windows; others have the voter's scale.
    """
    height = width = 0
    for voter in voters:
        kind = kind_of(voter)
        size = window_size if kind == "native" else (kind, kind)
        height, width = max(height, size[0]), max(width, size[1])
    return height, width


def likeliest_classes(probs, size):
    """Return argmax(0) of probs [C, S, S] brought to a size (height, width), uint8 [height, width].

    One class after another is brought there: all of a photo of 89 megapixels would take 4 GB.
    """
    import cv2
    planes = (cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR) for plane in probs)
    best = next(planes)
    pred = np.zeros(size, np.uint8)
    for class_id, plane in enumerate(planes, 1):
        pred[plane > best] = class_id
        np.maximum(best, plane, out=best)
    return pred


def enlarge_mask(mask, size):
    """Return a mask brought to a size (height, width) by exact nearest."""
    import cv2
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


# ---- the photos of any folder: what is written ---------------------------------------------------


def mask_path(out, name):
    return out / "masks" / Path(name).with_suffix(".png")


def overlay_path(out, name):
    return out / "overlays" / Path(name).with_suffix(".jpg")


def begin_folder(args, wanted, names, hashes):
    """Make --out ready for the masks of `wanted`, a provenance: made.json says what makes them.

    What other models or code have made, and what belongs to none of the photos `names`, is moved
    to replaced/. Raises UserError if the user has to say so first.
    """
    made = args.out / "made.json"
    description = read_description(made, hashes)
    decision = "make"
    if description:
        decision = decide(args.out, description, wanted, args.code, args.replace)
        if decision == "make":
            move_aside(args.out, ["made.json", "areas.csv", "masks", "overlays"])
    move_foreign(args, names if description else [])
    if decision != "done":
        keep_code(experiment_folder(args.out))
        write_description(made, description if decision == "kept" else wanted, files={})


def move_foreign(args, names):
    """Move what belongs to none of the photos `names`, with areas.csv, to replaced/ in --out.

    Raises UserError without --replace.
    """
    belonging = {path(args.out, name) for name in names for path in (mask_path, overlay_path)}
    there = [*(args.out / "masks").rglob("*"), *(args.out / "overlays").rglob("*")]
    foreign = [path for path in sorted(there) if path not in belonging and path.is_file()
               and not path.name.startswith(".")]  # a killed writer's scratch file
    areas = args.out / "areas.csv"
    if areas.exists() and (foreign or not names):
        foreign.append(areas)
    if foreign and not args.replace:
        raise UserError(f"{args.out} has {len(foreign)} file(s) that belong to none of the photos, "
                        f"such as {foreign[0]}: choose another --out, or pass --replace, which "
                        f"moves them to {args.out / 'replaced'}")
    if foreign:
        print(f"{args.out / 'replaced'}: {len(foreign)} file(s) of photos that were predicted "
              "before", flush=True)
    for path in foreign:
        aside = args.out / "replaced" / path.relative_to(args.out)
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, aside)


def write_photo(out, photo, mask, key):
    """Write the overlay of a LoadedPhoto, then its mask, which holds the key and its pixel counts.

    Its pixels are class ids, its palette is COLOURS.
    """
    import cv2
    from PIL import Image, PngImagePlugin
    picture = overlay(photo.preview, mask, size=photo.preview.shape[1::-1])
    _, content = cv2.imencode(".jpg", picture[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 90))
    with atomic_write(overlay_path(out, photo.name)) as scratch:
        scratch.write_bytes(content)
    image, note = Image.fromarray(mask), PngImagePlugin.PngInfo()
    note.add_text("made", key)
    note.add_text("pixels", json.dumps(image.histogram()))
    image.putpalette(COLOURS.tobytes())
    with atomic_write(mask_path(out, photo.name)) as scratch:
        image.save(scratch, format="png", pnginfo=note)


def read_areas(out, name, key, classes):
    """Return the row of areas.csv of a photo; None if its mask isn't there or has another key."""
    from PIL import Image
    if not overlay_path(out, name).exists():
        return None
    try:
        with Image.open(mask_path(out, name), formats=["PNG"]) as image:
            if image.info.get("made") != key:
                return None
            pixels, (width, height) = json.loads(image.info["pixels"]), image.size
    except (OSError, KeyError, ValueError):
        return None
    shares = {f"share of {each}": f"{pixels[n] / (height * width):.6f}"
              for n, each in enumerate(classes)}
    return {"file": name, "height": height, "width": width, **shares}


def predict_photos(args, out):
    """Write the masks, overlays and areas.csv of the photos of a folder into the folder `out`."""
    hashes = Hashes(args.cache)
    names = photo_names(args.photos)
    voters, recipe = load_voters(args, hashes)
    begin_folder(args, provenance(recipe, photos_code(voters)), names, hashes)
    digests = hashes.of_all([args.photos / name for name in names])
    hashes.save()
    keys = {name: short_hash(recipe, digest) for name, digest in zip(names, digests, strict=True)}
    classes = voters[0].models[0].classes
    rows = {name: read_areas(out, name, keys[name], classes) for name in names}
    missing = [name for name, row in rows.items() if not row]
    areas = out / "areas.csv"
    if not missing and areas.exists():
        print(f"{out} has the masks of all {len(names)} photo(s): nothing to do")
        return
    areas.unlink(missing_ok=True)  # where it stands it is whole, and of these photos
    faulty = predict_missing(args, voters, recipe, missing, keys) if missing else []
    rows = [rows[name] or read_areas(out, name, keys[name], classes) for name in names
            if name not in faulty]
    if not rows:
        raise UserError(f"{args.photos}: none of its {len(names)} photo(s) can be read")
    write_csv(areas, rows)
    print(f"{out}: masks, overlays and areas.csv of {len(rows)} photo(s)")
    if faulty:
        raise UserError(f"warning: the masks stand, but of {len(faulty)} photo(s) that can't be "
                        f"read there are none: {clean(', '.join(faulty))}; mend or remove them",
                        code=3)


def photo_names(folder):
    """Return the names of find_photos, and tell of other files.

    Raises UserError as find_photos does, and if two photos would have masks of the same name.
    """
    names, others = find_photos(folder)
    if others:
        print(f"{folder}: {len(others)} other file(s), such as {clean(others[0])}, are no photos "
              "by their ending")
    by_mask = {}
    for name in names:
        other = by_mask.setdefault(Path(name).with_suffix(""), name)
        if other != name:
            raise UserError(f"{folder}: {clean(other)} and {clean(name)} would share one mask: "
                            "give one of them another name")
    return names


def photos_code(voters):
    """Return code_of what predicts photos, with only those entries of the tables that it uses."""
    code = {}
    for voter in voters:
        decoder, tta = voter.recipe["model"].partition("/")[0], voter.settings["tta"]
        code |= code_of("photos", DECODERS=decoder, TTA=tta)
    return dict(sorted(code.items()))


def predict_missing(args, voters, recipe, names, keys):
    """Predict the photos `names` one batch after another; return the names of those with a fault.

    keys: {name: what its mask is to say made it}.
    """
    from torch.utils.data import DataLoader
    device = claim_device(args.device, args.per_gpu)  # which may wait for a GPU
    for voter in voters:
        for trained in voter.models:
            trained.model.to(device)
    cuda, faults = device.type == "cuda", []
    photos = FolderPhotos(args.photos, names, {kind_of(voter) for voter in voters})
    workers, size = loader_workers(args.workers, cuda), min(args.batch, len(names))
    loader = DataLoader(photos, size, collate_fn=list, **loader_options(workers, cuda))
    with signals_later():
        loaded = iter(loader)
    for batch in tqdm(loaded, str(args.out), len(loader), disable=None):
        readable = [photo for photo in batch if not photo.fault]
        for photo in batch:
            if photo.fault:
                faults.append(photo.name)
                print(f"warning: {clean(photo.name)} {photo.fault}: skipped", flush=True)
                for path in (mask_path, overlay_path):  # of what the photo was before
                    path(args.out, photo.name).unlink(missing_ok=True)
        if not readable:
            continue
        masks = predict_batch(voters, recipe, readable, size, device)
        for photo, mask in zip(readable, masks, strict=True):
            write_photo(args.out, photo, mask, keys[photo.name])
    return faults


# ---- command -------------------------------------------------------------------------------------


def check_options(args):
    """Raise UserError when options don't fit each other, or name what isn't there."""
    if missing := [str(path) for path in args.checkpoint or () if not path.is_file()]:
        raise UserError(f"{', '.join(missing)}: no such checkpoint")
    if (args.unlabelled is None) == ("unlabelled" in args.split):
        raise UserError("--unlabelled FOLDER and --split unlabelled go together")
    if not args.photos:
        if args.vote:
            raise UserError("--vote: is for --photos; with --data give --checkpoint")
        return
    if args.split != ["valid", "test"]:
        raise UserError("--split: is for --data; of --photos all are predicted")
    if not args.photos.is_dir():
        raise UserError(f"{args.photos}: no such folder; --photos is a folder of photos")
    if not args.out:
        raise UserError("--photos: needs --out FOLDER, where the masks go")
    if args.vote and not args.vote.is_file():
        raise UserError(f"{args.vote}: no such file; ensemble.py soft, or make submit, writes it "
                        "when the submission is done")
    if args.vote and (args.tta, args.tta_scales, args.scale) != ("flip", [1], None):
        raise UserError("--tta, --tta-scales, --scale: the runs of a --vote have their own")
    if ranks()[1] > 1:
        raise UserError("--photos: one process predicts them; start it without torchrun")


def main(args):
    if args.show_args:
        print(json.dumps(vars(args), default=str))
        return
    check_options(args)
    folder = args.out or args.checkpoint[0].parent
    if args.photos:
        written = (folder / name for name in ("", "masks", "overlays"))
        check_output(args.photos, *written, args.cache, name="--photos")
    else:
        check_output(args.data, folder)
        if args.unlabelled:
            check_output(args.unlabelled, folder, name="UNLABELLED")
    with lock(folder) if ranks()[0] == 0 else nullcontext():
        (predict_photos if args.photos else predict)(args, folder)


def predict(args, folder):
    """Write the stores of args.split into `folder`, those that aren't there and up to date."""
    hashes = Hashes(args.cache)
    models, checkpoints = load_models(args.checkpoint, hashes)
    check_sides(models[0], vars(args))
    photos = load_photos(args, models[0])
    run = run_of(args.checkpoint[0].parent, models[0], hashes)
    exp = experiment_folder(folder)
    if "valid" not in photos and "valid" in args.split:
        print(f"{args.checkpoint[0]} has learnt from all images: no {folder}/valid.npy")
    for name in filter(photos.__contains__, args.split):
        split, indices = photos[name]
        path = folder / f"{name}.npy"
        info = describe_store(name, split, indices, models[0], checkpoints, run, args)
        if is_up_to_date(path, info, args, hashes, exp):
            print(f"{path} is there and was made like this: nothing to do")
            continue
        keep_code(exp)
        device = claim_device(args.device, args.per_gpu)  # which may wait for a GPU
        for trained in models:
            trained.model.to(device)
        predict_split(models, split, indices, path, info, args, device, hashes)
        print(f"{path}: {len(indices)} images")


def check_sides(trained, settings):
    """Raise UserError if a TrainedModel can't work at the sides that --scale and --tta-scales ask.

    settings: with "scale" and "tta_scales". Training has tried its own scale.
    """
    recipe = trained.recipe
    try_asked_sides(trained.model, recipe["model"], recipe["scale"], settings)


def experiment_folder(folder):
    """Return EXP of EXP/rROUND/DECODER/ENCODER/sSCALE/fFOLD; any other folder is its own EXP."""
    place = RUN_PLACE.fullmatch(os.path.abspath(folder))
    return Path(place[1]) if place else folder


if __name__ == "__main__":
    run_script(main, parse_args())
