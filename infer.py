r"""Predict the held-out fold and the test photos with one trained model, or with several epochs.

    python infer.py --data DATA --tta flip \
        --checkpoint out/main/r0/fpn/tu-tf_efficientnet_lite0/s512/f0/model.pt

Writes valid.npy + valid.json and test.npy + test.json beside the checkpoint, or unlabelled.npy and
.json of photos that only pseudo labels are made for. A .npy has probabilities as uint8 (0..255 for
0..1) of shape [N, C, 256, 256], background for a test photo that can't be read. A .json says what
made them; it is written last, so where it stands, the .npy is whole. Several epochs of one run are
averaged.

The same line again carries on where it was interrupted, and does nothing when all is done. What it
replaces is kept in the folder replaced/ until the next time. Photos other than those of the
competition need --out FOLDER. Under torchrun all processes share the work.
"""
import json
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from common import (
    ALL, FROM_RECIPE, RUN_PLACE, STORE_KINDS, SUBMIT_SIZE, TTA, VIEWS, EvalPhotos, Hashes, Parser,
    UserError, accepted_code, atomic_write, batch_bytes, check_output, check_shared_memory,
    check_space, checked, claim_device, code_hashes, data_options, decide, full_batch, keep_code,
    load_data, load_model, load_unlabelled, loader_options, loader_workers, lock, move_aside,
    normalise, number, open_store, predict_probs, provenance, ranks, read_description, resize_probs,
    run_script, short_hash, signals_later, store_code, store_recipe, try_sides, tta_name, tta_sides,
    tta_views, write_description, write_npy_header)

# what decides no result; see BESIDE in common.py
BESIDE = {"parts_folder", "write_store"}


def parse_args(argv=None):
    parser = Parser(prog="infer.py", description=__doc__)
    what = parser.add_argument_group("what to predict")
    what.add_argument("--data", type=Path, required=True, help="the competition's folder")
    what.add_argument("--checkpoint", type=Path, nargs="+", required=True,
                      help="model.pt of train.py, or epoch-*.pt of one run, whose probabilities "
                      "are averaged")
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
    what.add_argument("--out", type=Path, help="folder to write to, instead of beside the "
                      "checkpoint: for other photos")
    system = parser.add_argument_group("system: none of these decides the result")
    system.add_argument("--replace", action="store_true",
                        help="replace predictions for other photos: DATA has changed")
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
    parser.set_defaults(decides=["tta", "tta_scales"])
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
    photos = EvalPhotos(split, indices, models[0].recipe["scale"])
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


def predict_batches(models, photos, batches, path, args, device):
    """Predict batches of `photos`, an EvalPhotos, into a file each: uint8 [B, C, S, S].

    S is SUBMIT_SIZE. models: [TrainedModel]. batches: {file: items of `photos`}. path: the store,
    for the progress bar. A GPU works on a batch while the one before it is written.
    """
    import torch
    from torch.utils.data import DataLoader
    recipe, views = models[0].recipe, tta_views(args.tta)
    networks = [trained.model for trained in models]
    cuda = device.type == "cuda"
    workers = loader_workers(args.workers, cuda)
    size = min(args.batch, len(photos))
    full_batches = [full_batch(items, size) for items in batches.values()]
    n_bytes = batch_bytes(size, recipe["scale"], SUBMIT_SIZE)
    check_shared_memory(workers, (n_bytes, len(full_batches)))
    loader = DataLoader(photos, batch_sampler=full_batches, **loader_options(workers, cuda))
    with signals_later():
        loaded = iter(loader)
    progress = tqdm(loaded, str(path), len(loader), disable=True if ranks()[0] else None)
    previous = None  # what write_batch gets of the batch before
    for (part, items), (images, _) in zip(batches.items(), progress, strict=True):
        images = normalise(images.to(device, non_blocking=True), recipe["mean"], recipe["std"])
        probs = resize_probs(predict_probs(networks, images, views, args.tta_scales))
        stored = (probs * 255).round_().to(torch.uint8)  # a GPU has only begun with it
        if previous:
            write_batch(*previous)
        faults = [photos.split.faults[photos.indices[item]] for item in items]
        previous = part, stored[:len(items)].cpu().numpy(), faults
    if previous:
        write_batch(*previous)


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


# ---- command -------------------------------------------------------------------------------------


def main(args):
    if args.show_args:
        print(json.dumps(vars(args), default=str))
        return
    if missing := [str(path) for path in args.checkpoint if not path.is_file()]:
        raise UserError(f"{', '.join(missing)}: no such checkpoint")
    if (args.unlabelled is None) == ("unlabelled" in args.split):
        raise UserError("--unlabelled FOLDER and --split unlabelled go together")
    folder = args.out or args.checkpoint[0].parent
    check_output(args.data, folder)
    with lock(folder) if ranks()[0] == 0 else nullcontext():
        predict(args, folder)


def predict(args, folder):
    """Write the stores of args.split into `folder`, those that aren't there and up to date."""
    hashes = Hashes(args.cache)
    models, checkpoints = load_models(args.checkpoint, hashes)
    recipe = models[0].recipe
    if args.tta_scales != [1]:  # training has tried its own scale
        try_sides(models[0].model, recipe["model"], tta_sides(recipe["scale"], args.tta_scales),
                  f" (--tta-scales times {recipe['scale']})")
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


def experiment_folder(folder):
    """Return EXP of EXP/rROUND/DECODER/ENCODER/sSCALE/fFOLD; any other folder is its own EXP."""
    place = RUN_PLACE.fullmatch(os.path.abspath(folder))
    return Path(place[1]) if place else folder


if __name__ == "__main__":
    run_script(main, parse_args())
