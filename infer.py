"""Predict the held-out fold and the test photos with one trained model, or with several of its epochs averaged.

    python infer.py --data DATA --checkpoint out/main/r0/fpn/tu-tf_efficientnet_lite0/s512/f0/model.pt --tta flip

Writes valid.npy + valid.json and test.npy + test.json beside the checkpoint: probabilities as uint8 (0..255 for 0..1)
of shape [N, C, 256, 256], and what made them; background where a test photo can't be read. A .json is written last:
where it stands, the .npy is whole. The same line again carries on where it was interrupted, and does nothing when it is
done; what it replaces is kept in the folder replaced/ until the next time. Photos other than those of the competition
need --out FOLDER. Under torchrun all processes share the work.
"""
import argparse
import math
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten

import numpy as np
from tqdm import tqdm

from common import (DESCRIBED, SUBMIT_SIZE, EvalPhotos, Hashes, Parser, accepted_code, amp, atomic_write, build_model,
                    check_output, check_space, claim_device, code_hashes, code_of, decide, is_description, keep_code,
                    load_checkpoint, load_data, lock, move_aside, normalise, number, provenance, ranks,
                    read_description, read_json, run_script, short_hash, write_description,
                    write_npy_header)

FROM_RECIPE = ("model", "scale", "round", "fold", "folds_csv", "seed", "paint", "contaminated")  # in a store's JSON
KEYS = (*DESCRIBED, "image_ids", "classes", "split", "tta", "checkpoints", "data", "unreadable", "run", "files",
        *FROM_RECIPE)  # of a store's JSON
BY_FOLD = ("fold", "pseudo", "contaminated")  # in the recipe of a run: what the folds of one member may differ in
# what decides no result; see BESIDE in common.py
BESIDE = {"KEYS", "check_unchanged", "difference", "is_run", "make_recipe", "run_of", "store_id",
          "write_store"}


def parse_args(argv=None):
    parser = Parser(prog="infer.py", description=__doc__)
    what = parser.add_argument_group("what to predict")
    what.add_argument("--data", type=Path, required=True, help="the competition's folder")
    what.add_argument("--checkpoint", type=Path, nargs="+", required=True,
                      help="model.pt of train.py, or epoch-*.pt of one run, whose probabilities are averaged")
    what.add_argument("--split", choices=("valid", "test"), nargs="+", default=["valid", "test"])
    what.add_argument("--tta", type=lambda text: tta_views(text) and text, default="flip",  # checked, kept as a name
                      metavar="SET|VIEW,VIEW+VIEW,...", help="views whose probabilities are averaged: "
                      f"{', '.join(TTA)}, or a list of {', '.join(VIEWS)}; + does one after another")
    what.add_argument("--tta-scales", type=number(float, 0.1, 10), nargs="+", default=[1.0], metavar="SCALE",
                      help="sizes that every view is predicted at, times the scale that the model was trained at")
    what.add_argument("--out", type=Path, help="folder to write to, instead of beside the checkpoint: for other photos")
    system = parser.add_argument_group("system: none of these decides the result")
    system.add_argument("--replace", action="store_true", help="replace predictions for other photos: DATA has changed")
    system.add_argument("--code", choices=("new", "keep"), help="where other code has predicted: predict anew, or keep "
                        "what is there")
    system.add_argument("--batch", type=number(int, 1), default=8)
    system.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks, shared by experiments")
    system.add_argument("--device", default="auto", help="auto takes the first idle GPU, or the CPU")
    system.add_argument("--workers", type=number(int, 0), default=0, help="loader processes")
    return parser.parse_args(argv)


# ---- TTA ------------------------------------------------------------------------------------------------------------

# name -> (whether transposed, dims flipped after that): these 8 are all that flips and quarter turns make
VIEWS = {"identity": (False, ()), "hflip": (False, (-1,)), "vflip": (False, (-2,)), "rot90ccw": (True, (-2,)),
         "rot180": (False, (-2, -1)), "rot90cw": (True, (-1,)), "transpose": (True, ()),
         "antitranspose": (True, (-2, -1))}
TTA = {"none": "identity", "flip": "identity,hflip,vflip", "flip_rot": "identity,hflip,vflip,rot90cw,rot90ccw,rot180",
       "d4": ",".join(VIEWS)}


def tta_views(text):
    """The different views of a set's name or a list such as "identity,hflip,hflip+rot90cw"; + does one after another.

    Raises argparse.ArgumentTypeError for a name that is neither.
    """
    views = []
    for item in TTA.get(text, text).split(","):
        transposed, flipped = False, set()
        for name in item.split("+"):
            if name not in VIEWS:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(TTA)} and none of {', '.join(VIEWS)}")
            transpose, flips = VIEWS[name]
            transposed ^= transpose
            flipped = {-3 - dim for dim in flipped} if transpose else flipped  # -1 becomes -2
            flipped ^= set(flips)
        views.append((transposed, tuple(sorted(flipped))))
    return list(dict.fromkeys(views))


def apply_view(x, view):
    """[..., H, W], or [..., W, H] if the view is transposed; flipping again and transposing back undoes it."""
    transposed, flipped = view
    return (x.transpose(-2, -1) if transposed else x).flip(flipped)


def predict_probs(models, images, views, scales=(1.0,)):
    """probs [B, C, H, W] averaged over models, views and scales; images normalised [B, 3, H, W].

    Probabilities are averaged, not logits, and in float32.
    """
    import torch
    from torch.nn.functional import interpolate
    total, size = 0, images.shape[2:]
    with torch.inference_mode(), amp(images.device):
        for scale in scales:
            scaled = images if scale == 1 else interpolate(images, [round(side * scale) for side in size],
                                                           mode="bilinear", antialias=True)
            alike = dict.fromkeys((transposed for transposed, _ in views), 0)  # transposing back costs more than a flip
            for view in views:
                seen = apply_view(scaled, view).contiguous(memory_format=torch.channels_last)
                for model in models:
                    alike[view[0]] += model(seen).float().softmax(dim=1).flip(view[1])
            probs = sum(part.transpose(-2, -1) if transposed else part for transposed, part in alike.items())
            total += probs if scale == 1 else interpolate(probs, size, mode="bilinear")
    return total / (len(models) * len(views) * len(scales))


# ---- stores ---------------------------------------------------------------------------------------------------------


def resize_probs(probs):
    """probs at the submission's size, [B, C, SUBMIT_SIZE, SUBMIT_SIZE]."""
    from torch.nn.functional import interpolate
    return interpolate(probs, size=(SUBMIT_SIZE, SUBMIT_SIZE), mode="bilinear", align_corners=False)


def open_store(path, hashes):
    """(uint8 memmap [N, C, SUBMIT_SIZE, SUBMIT_SIZE], its JSON) of the store whose JSON is `path`.

    Raises SystemExit when either is missing, they don't agree, the JSON lacks something, or it stands in the folder of
    another run. hashes: a Hashes, which remembers that the .npy has the checksum in the JSON.
    """
    info = read_json(path)
    try:
        probs = np.load(path.with_suffix(".npy"), mmap_mode="r")
        if lacking := [key for key in KEYS if key not in info]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        if not is_description(info) or not is_run(info["run"]):
            raise ValueError("what made it is not said as it should be")
        expected = (len(info["image_ids"]), len(info["classes"]), SUBMIT_SIZE, SUBMIT_SIZE)
    except (OSError, EOFError, ValueError, TypeError) as e:
        raise SystemExit(f"{path}: not a whole store: {e}; run infer.py again") from None
    if probs.shape != expected or probs.dtype != np.uint8:
        raise SystemExit(f"{path} is of uint8 {expected}, its .npy of {probs.dtype} {probs.shape}: run infer.py again")
    if hashes(path.with_suffix(".npy")) != info["files"].get(f"{path.stem}.npy"):
        raise SystemExit(f"{path}: the .npy has another checksum, damaged or of another store: run infer.py again")
    placed = re.search(r"/r(\d)/([^/]+/[^/]+)/s(\d+)/f(\d+)/[^/]+$", os.path.abspath(path))
    found = tuple(str(info[key]) for key in ("round", "model", "scale", "fold"))
    if placed and placed.groups() != found:
        raise SystemExit(f"{path} is of round {found[0]}, {found[1]}, scale {found[2]}, fold {found[3]}: it was moved "
                         "or copied into the folder of another run")
    return probs, info


def store_id(info):
    """What names a store by what made it, also when its .npy is gone; for its code see store_code."""
    return short_hash(info["recipe"])


def store_code(model, tta):
    """code_of a store; of the tables only the entries that it uses. tta: of tta_name."""
    return code_of("store", DECODERS=model.partition("/")[0], TTA=tta.partition(" ")[0])


def tta_name(args):
    """The views and the scales, "flip" or "flip x 1,0.5"."""
    return args.tta if args.tta_scales == [1] else f"{args.tta} x {','.join(f'{s:g}' for s in args.tta_scales)}"


def make_recipe(split, tta, checkpoints, data):
    """Everything but code that decides a store, as plain values; checkpoints: hashes, data: the split's fingerprint."""
    return {"split": split, "tta": tta, "checkpoints": checkpoints, "data": data}


def is_run(run):
    """Whether the "run" of a store's JSON has what run_of says."""
    kinds = {"recipe": dict, "code": dict, "codes": list, "state": str, "commit": str, "kept_under": list}
    return isinstance(run, dict) and all(isinstance(run.get(key), kind) for key, kind in kinds.items())


def check_unchanged(paths, infos):
    """Raise SystemExit if one of the stores with these JSONs was replaced since `infos` were read from them."""
    for path, info in zip(paths, infos, strict=True):
        if not path.exists() or read_json(path).get("files") != info["files"]:
            raise SystemExit(f"{path} was replaced while it was read, as by another make in this EXP; run it again")


def difference(found, wanted):
    """What tells two lists apart, in a few words."""
    parts = (("lacks", set(wanted) - set(found)), ("also has", set(found) - set(wanted)))
    return "; ".join(f"{word} {len(some)}: {', '.join(map(str, sorted(some)[:3]))}" for word, some in parts if some)


def order_of(found, wanted, path):
    """Positions in the image ids `found` of those in `wanted`; raises SystemExit when they aren't the same images."""
    if text := difference(found, wanted):
        raise SystemExit(f"{path} is of other images: it {text}; run infer.py again")
    position = {image_id: i for i, image_id in enumerate(found)}
    return [position[i] for i in wanted]


def read_probs(store, i):
    """uint8 [C, H, W] of image i; read, because the pages of a memmap that were touched count as memory."""
    size = math.prod(store.shape[1:])
    return np.fromfile(store.filename, np.uint8, size, offset=store.offset + i * size).reshape(store.shape[1:])


def load_model(path):
    """(model in eval mode on the CPU, the checkpoint's other content), from the checkpoint alone."""
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not {*DESCRIBED, "model", "classes", "valid_ids", "v3"} <= state.keys():
        raise SystemExit(f"{path}: not a model.pt of train.py")
    import torch
    model = build_model(state["recipe"]["model"], len(state["classes"]))
    try:
        model.load_state_dict(state.pop("model"))
    except RuntimeError as e:
        raise SystemExit(f"{path}: its weights are not those of {state['recipe']['model']} as it is built here: "
                         f"{shorten(str(e), 300)}") from None
    return model.to(memory_format=torch.channels_last).eval(), state


def load_models(paths, hashes):
    """(models, content of the first checkpoint besides, what names them all) of checkpoints with one recipe."""
    models, states = zip(*map(load_model, paths), strict=True)
    names = []
    for path, state in zip(paths, states, strict=True):
        if state["recipe"] != states[0]["recipe"]:
            raise SystemExit(f"{path} and {paths[0]} are of different runs: give the epochs of one")
        names.append({"file": path.name, "hash": hashes(path), "epoch": state["epoch"]})
    return models, states[0], names


def run_of(folder, state, hashes):
    """What a store says of the run: its recipe and the code that it counts as; state: the checkpoint's content."""
    config = read_description(folder / "config.json", hashes)
    made = config if config and config["recipe"] == state["recipe"] else state
    return {"recipe": state["recipe"], "code": accepted_code(made), "codes": code_hashes(made),
            "state": state["state"], "commit": state["commit"],
            "kept_under": [kept["state"] for kept in made["kept_under"]]}


def predict_split(models, recipe, split, indices, path, info, args, device, hashes):
    """Write the store `path`, a .npy, of photos of a Split, and `info` beside it; what was there is moved aside.

    Batch after batch is kept as a file of its own until the store is whole: so nothing is predicted twice after an
    interruption, and several processes can share the work.
    """
    import torch
    from torch.utils.data import DataLoader
    photos = EvalPhotos(split, indices, recipe["scale"])
    rank, n_ranks = ranks()
    store_bytes = len(photos) * len(info["classes"]) * SUBMIT_SIZE ** 2
    parts = path.with_name(f".{path.stem}.parts") / short_hash(info["recipe"], info["code"], args.batch)
    batches = {parts / f"{start:06}": range(start, min(start + args.batch, len(photos)))
               for start in range(0, len(photos), args.batch)}
    check_space(path.parent, 2 * store_bytes - sum(part.stat().st_size for part in batches if part.exists()))
    mine = [part for part in list(batches)[rank::n_ranks] if not part.exists()]
    loader = DataLoader(photos, batch_sampler=[batches[part] for part in mine], num_workers=args.workers,
                        pin_memory=device.type == "cuda", multiprocessing_context="fork" if args.workers else None)
    for part, (images, _) in zip(mine, tqdm(loader, str(path), disable=True if rank else None), strict=True):
        images = normalise(images.to(device, non_blocking=True), recipe["mean"], recipe["std"])
        probs = resize_probs(predict_probs(models, images, tta_views(args.tta), args.tta_scales))
        stored = (probs * 255).round_().to(torch.uint8).cpu().numpy()
        unread = [photos.split.faults[photos.indices[item]] is not None for item in batches[part]]
        stored[unread] = np.where(np.arange(stored.shape[1]) == 0, 255, 0)[:, None, None]  # surely background
        with atomic_write(part) as scratch:
            scratch.write_bytes(stored)
    if n_ranks > 1:
        torch.distributed.barrier()
    if rank == 0:
        with atomic_write(path) as scratch:
            with open(scratch, "wb") as f:
                write_npy_header(f, (len(photos), len(info["classes"]), SUBMIT_SIZE, SUBMIT_SIZE))
                for part in batches:
                    f.write(part.read_bytes())
            move_aside(path.parent, [f"{path.stem}.json", path.name])
        write_store(path.with_suffix(".json"), info | {"files": {path.name: hashes(path)}})
        hashes.save()
        shutil.rmtree(parts.parent)


def write_store(path, info):
    """Write the JSON of a store."""
    write_description(path, info, **{key: info[key] for key in KEYS if key not in DESCRIBED})


def stands(path, info, args, hashes, exp):
    """Whether the store `path` is whole and as `info` says, or kept; raises SystemExit when the user has to say."""
    description = path.with_suffix(".json")
    try:
        _, made = open_store(description, hashes)
    except SystemExit:  # not there or not whole
        return False
    if made["data"] != info["data"] and not args.replace:
        raise SystemExit(f"{path} is of other photos than {args.data} has: --out FOLDER writes elsewhere, --replace "
                         "writes over it")
    todo = decide(path, made, info, args.code)
    if ranks()[0]:
        return todo != "make"
    if todo == "kept":
        keep_code(exp)
    if todo == "kept" or todo == "done" and made["run"] != info["run"]:  # the run was kept since
        write_store(description, made | {"run": info["run"]})
    if todo != "make":
        shutil.rmtree(path.with_name(f".{path.stem}.parts"), ignore_errors=True)  # left by a kill after the .json
    return todo != "make"


def main(args):
    if missing := [str(path) for path in args.checkpoint if not path.is_file()]:
        raise SystemExit(f"{', '.join(missing)}: no such checkpoint")
    folder, hashes = args.out or args.checkpoint[0].parent, Hashes(args.cache)
    check_output(args.data, folder)
    with lock(folder) if ranks()[0] == 0 else nullcontext():
        models, state, names = load_models(args.checkpoint, hashes)
        recipe, classes = state["recipe"], state["classes"]
        train, test = load_data(args.data, args.cache, recipe["paint"])
        if classes != train.classes:
            raise SystemExit(f"{args.checkpoint[0]} knows the classes {classes}, DATA has {train.classes}")
        position = {image_id: i for i, image_id in enumerate(train.ids)}
        if "valid" in args.split and (absent := [i for i in state["valid_ids"] if i not in position]):
            raise SystemExit(f"{args.checkpoint[0]} was validated on {len(absent)} images that DATA doesn't have, the "
                             f"first with id {absent[0]}: it was trained on other data")
        run, exp = run_of(args.checkpoint[0].parent, state, hashes), experiment_of(folder)
        for name in args.split:
            split, indices = ((train, [position[i] for i in state["valid_ids"]]) if name == "valid" else
                              (test, range(len(test.ids))))
            path = folder / f"{name}.npy"
            made_of = make_recipe(name, tta_name(args), [checkpoint["hash"] for checkpoint in names], split.fingerprint)
            info = provenance(made_of, store_code(recipe["model"], tta_name(args))) | {
                "image_ids": [split.ids[i] for i in indices], "classes": classes, "split": name, "tta": tta_name(args),
                "unreadable": [split.ids[i] for i in indices if split.faults[i]], "checkpoints": names,
                "data": split.fingerprint, "run": run, **{k: recipe[k] for k in FROM_RECIPE}}
            if stands(path, info, args, hashes, exp):
                print(f"{path} is there and was made like this: nothing to do")
                continue
            keep_code(exp)
            device = claim_device(args.device)  # which may wait for a GPU
            models = [model.to(device) for model in models]
            predict_split(models, recipe, split, indices, path, info, args, device, hashes)
            print(f"{path}: {len(indices)} images")


def experiment_of(folder):
    """EXP of EXP/rROUND/DECODER/ENCODER/sSCALE/fFOLD; another folder is an experiment by itself."""
    placed = re.fullmatch(r"(.*)/r\d/[^/]+/[^/]+/s\d+/f\d+", os.path.abspath(folder))
    return Path(placed[1]) if placed else folder


if __name__ == "__main__":
    run_script(main, parse_args())
