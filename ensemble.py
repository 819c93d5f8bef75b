"""Soft-vote the predictions of any number of runs into a submission, or score them out of fold.

    python ensemble.py soft --data DATA --out out/main/submission.csv out/main/r1/*/*/s512/f*
    python ensemble.py score --data DATA out/main/r1/*/*/s512/f*

A run is a folder of train.py and infer.py. `soft` reads its test store and writes the CSV in test.json's order, read
back and checked before it gets its name; `score` reads its validation store and prints every recipe and the vote.
"""
import argparse
import csv
import itertools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import SUBMIT_SIZE, atomic_write, confusion, load_data, open_store, scores, soft_vote

HEADER = ["image_id", "PredictionString"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    soft = commands.add_parser("soft", allow_abbrev=False, help="write a submission")
    soft.add_argument("--out", type=Path, required=True, help="the submission to write")
    soft.add_argument("--image-id", choices=("id", "file_name"), default="id",
                      help="what names an image in the submission; some editions' upload pages want the file_name")
    score = commands.add_parser("score", allow_abbrev=False, help="print out-of-fold scores")
    score.add_argument("--batch", type=int, default=8, help="images in a batch of v1, the official baseline's score")
    for command in (soft, score):
        command.add_argument("runs", type=Path, nargs="+", help="run folders with stores of infer.py")
        command.add_argument("--data", type=Path, required=True, help="the competition's folder")
        command.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks")
    return parser.parse_args(argv)


# ---- members --------------------------------------------------------------------------------------------------------


def recipe_name(info):
    """Runs that differ only in the fold are one recipe."""
    return f"{info['model']} s{info['scale']} r{info['round']} {info['tta']}"


def open_members(runs, split):
    """{recipe: {fold: (probs, info)}} of the runs' stores; raises SystemExit when they don't belong together."""
    members, first = {}, None
    for run in runs:
        probs, info = open_store(run / f"{split}.json")
        first = first or info
        for key in ("classes", "folds_csv", "paint") + (("image_ids",) if split == "test" else ()):
            if info[key] != first[key]:
                raise SystemExit(f"{run}/{split}.json and {runs[0]}/{split}.json have different {key}: their models "
                                 "were made on other data or folds and can't vote together")
        folds = members.setdefault(recipe_name(info), {})
        if info["fold"] in folds:
            raise SystemExit(f"{run}: a second run of {recipe_name(info)} on fold {info['fold']}")
        folds[info["fold"]] = probs, info
    return members, first


def open_data(args, info, path):
    """(train, test) Splits with the classes of the stores."""
    train, test = load_data(args.data, args.cache, info["paint"])
    if info["classes"] != train.classes:
        raise SystemExit(f"{path} has the classes {info['classes']}, DATA has {train.classes}")
    return train, test


# ---- submission -----------------------------------------------------------------------------------------------------


def encode_mask(pred):
    """b"0 0 11 3": the class ids of a mask uint8 [H, W], row by row."""
    if pred.max() > 200:
        raise ValueError(f"class id {pred.max()}: more than 200 classes don't fit one byte each")
    text = np.full(2 * pred.size, ord(" "), np.uint8)
    text[::2] = pred.ravel() + ord("0")  # ids from 10 on stand as the bytes after "9" until they are replaced
    text = text[:-1].tobytes()
    for class_id in range(10, int(pred.max()) + 1):
        text = text.replace(bytes([class_id + ord("0")]), str(class_id).encode())
    return text


def write_submission(out, names, preds, n_classes):
    """Write, read back and check the CSV; it gets its name only when every row is as it should be."""
    with atomic_write(out) as scratch:
        with open(scratch, "wb") as f:
            f.write((",".join(HEADER) + "\n").encode())
            for name, pred in zip(names, tqdm(preds, str(out), len(names), disable=None), strict=True):
                quoted = '"' + name.replace('"', '""') + '"' if set(name) & set(',"\n\r') else name
                f.write(quoted.encode() + b"," + encode_mask(pred) + b"\n")
        if faults := submission_faults(scratch, names, n_classes):
            raise SystemExit("\n".join(faults))


def submission_faults(path, names, n_classes):
    """What is wrong with a submission for the images `names`, in that order, a line each; [] when it is right."""
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, newline="", encoding="utf-8") as f:
        rows = csv.reader(f)
        header = next(rows, None)
        if header != HEADER:
            return [f"{path}: the first line is {header}, not {','.join(HEADER)}"]
        faults = []
        for number, (name, row) in enumerate(itertools.zip_longest(names, rows), 2):
            if not row or row[0] != name or len(row) != 2:
                found = row[0] if row else "missing"
                faults.append(f"{path} line {number}: image {found}, expected {name or 'no more'}")
                continue
            ids = np.fromstring(row[1], np.int64, sep=" ")
            if ids.size != SUBMIT_SIZE ** 2 or ids.min() < 0 or ids.max() >= n_classes:
                faults.append(f"{path} line {number}, image {name}: not {SUBMIT_SIZE ** 2} ids of 0 to {n_classes - 1}")
    return faults


def submit(args):
    members, info = open_members(args.runs, "test")
    _, test = open_data(args, info, args.runs[0])
    if info["image_ids"] != test.ids:
        raise SystemExit(f"{args.runs[0]}/test.json is of other images than {args.data}/test.json: run infer.py again")
    stores, weights = [], []
    for folds in members.values():  # the folds of a recipe share its vote
        stores += [probs for probs, _ in folds.values()]
        weights += [1 / len(folds)] * len(folds)
    names = test.file_names if args.image_id == "file_name" else [str(i) for i in test.ids]
    preds = (probs.argmax(0).astype(np.uint8) for probs in soft_vote(stores, weights))
    write_submission(args.out, names, preds, len(test.classes))
    print(f"{args.out}: {len(names)} images by {len(stores)} run(s) of {len(members)} recipe(s)")


# ---- scores ---------------------------------------------------------------------------------------------------------


def oof_confusions(fold_members, train, n_classes):
    """{image position in train: [C, C] pixel counts} of the soft vote of stores [(probs, info)] of one fold."""
    image_ids = fold_members[0][1]["image_ids"]
    if any(info["image_ids"] != image_ids for _, info in fold_members):
        raise SystemExit("stores of one fold are of different images: run infer.py again")
    position = {image_id: i for i, image_id in enumerate(train.ids)}
    if absent := [i for i in image_ids if i not in position]:
        raise SystemExit(f"DATA has no image {absent[0]}, which a validation store has: run train.py again")
    votes = soft_vote([probs for probs, _ in fold_members], np.ones(len(fold_members)))
    return {position[i]: confusion(probs.argmax(0).astype(np.uint8), train.truth(position[i]), n_classes)
            for i, probs in zip(image_ids, votes, strict=True)}


def recipe_confusions(recipes, train):
    """[N, C, C] pixel counts, in the order of train, of the vote of recipes [{fold: (probs, info)}] fold by fold."""
    counts = {}
    for fold in sorted(set().union(*recipes)):
        counts |= oof_confusions([folds[fold] for folds in recipes if fold in folds], train, len(train.classes))
    return np.stack([counts[i] for i in sorted(counts)]), sorted(counts)


def print_scores(args):
    members, info = open_members(args.runs, "valid")
    train, _ = open_data(args, info, args.runs[0])
    rows = {name: recipe_confusions([folds], train)[0] for name, folds in members.items()}
    vote, images = recipe_confusions(list(members.values()), train)
    rows["soft vote"] = vote
    empty = np.zeros((SUBMIT_SIZE, SUBMIT_SIZE), np.uint8)
    rows["all background"] = np.stack([confusion(empty, train.truth(i), len(train.classes)) for i in images])
    width = max(map(len, rows))
    print(f"out of fold: {len(images)} of {len(train.ids)} training images\n"
          f"{'':{width}}  images     v1     v2     v3   IoU {', '.join(train.classes)}")
    for name, counts in rows.items():
        result = scores(counts, args.batch)
        print(f"{name:{width}}  {len(counts):6} {result['v1']:6.4f} {result['v2']:6.4f} {result['v3']:6.4f}   "
              + " ".join("  -  " if np.isnan(iou) else f"{iou:.3f}" for iou in result["iou"]))


def main(args):
    if args.command == "soft":
        submit(args)
    else:
        print_scores(args)


if __name__ == "__main__":
    main(parse_args())
