"""Soft-vote the predictions of any number of runs into a submission, or score them out of fold.

    python ensemble.py soft --data DATA --out out/main/submission.csv out/main/r1/*/*/s512/f*
    python ensemble.py score --data DATA out/main/r1/*/*/s512/f*

A run is a folder of train.py and infer.py. Both commands read its validation store and print every recipe and the vote;
`soft` goes on to the test store and writes the CSV in test.json's order, read back and checked before it gets its name,
and beside it a .png of some predictions.
"""
import argparse
import csv
import itertools
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (SUBMIT_SIZE, Help, atomic_write, confusion, image_miou, load_data, make_folds, number, open_store,
                    run_script, scores)
from pseudo_label import soft_vote

HEADER = ["image_id", "PredictionString"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    soft = commands.add_parser("soft", allow_abbrev=False, formatter_class=Help, help="write a submission")
    soft.add_argument("--out", type=Path, required=True, help="the submission to write")
    soft.add_argument("--image-id", choices=("id", "file_name"), default="id",
                      help="what names an image in the submission; some editions' upload pages want the file_name")
    score = commands.add_parser("score", allow_abbrev=False, formatter_class=Help, help="print scores")
    for command in (soft, score):
        command.add_argument("runs", type=Path, nargs="+", help="run folders with stores of infer.py")
        command.add_argument("--data", type=Path, required=True, help="the competition's folder")
        command.add_argument("--batch", type=number(int, 1), default=8,
                             help="images in a batch of v1, the baseline's score")
        command.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks")
    return parser.parse_args(argv)


# ---- members --------------------------------------------------------------------------------------------------------


def open_members(runs, split):
    """{recipe: {fold: (probs, info)}} of the runs' stores; raises SystemExit when they don't belong together.

    Runs whose folders differ only in the fold are one recipe.
    """
    members, first = {}, None
    for run in runs:
        probs, info = open_store(run / f"{split}.json")
        first = first or info
        for key in ("classes", "folds_csv", "paint") + (("image_ids",) if split == "test" else ()):
            if info[key] != first[key]:
                raise SystemExit(f"{run}/{split}.json and {runs[0]}/{split}.json have different {key}: their models "
                                 "were made on other data or folds and can't vote together")
        folds = members.setdefault(f"{os.path.normpath(run.parent)} {info['tta']}", {})
        if info["fold"] in folds:
            raise SystemExit(f"{run}: given twice")
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
            ids = np.fromstring(row[1], np.int64, sep=" ") if set(row[1]) <= set("0123456789 ") else np.zeros(0, int)
            if ids.size != SUBMIT_SIZE ** 2 or ids.min() < 0 or ids.max() >= n_classes:
                faults.append(f"{path} line {number}, image {name}: not {SUBMIT_SIZE ** 2} ids of 0 to {n_classes - 1}")
    return faults


def keep_looks(preds, test, looks, n=24):
    """Pass `preds` on; put [(caption, photo), (caption, prediction)] of `n` photos, spread evenly, in `looks`."""
    chosen = set(np.linspace(0, len(test.ids) - 1, min(n, len(test.ids))).astype(int).tolist())
    for i, pred in enumerate(preds):
        if i in chosen:
            image = test.image(i)
            found = ", ".join(test.classes[c] for c in np.unique(pred) if c) or "nothing"
            looks.append([(test.file_names[i], overlay(image, np.zeros_like(pred), len(test.classes))),
                          (found, overlay(image, pred, len(test.classes)))])
        yield pred


def submit(args):
    if args.out.suffix != ".csv":
        raise SystemExit(f"--out {args.out}: must end in .csv; a .png goes beside it")
    members, info = open_members(args.runs, "test")
    train, test = open_data(args, info, args.runs[0])
    if info["image_ids"] != test.ids:
        raise SystemExit(f"{args.runs[0]}/test.json is of other images than {args.data}/test.json: run infer.py again")
    min_area = print_scores(args, open_members(args.runs, "valid")[0], train)
    stores, weights = [], []
    for folds in members.values():  # the folds of a recipe share its vote
        stores += [probs for probs, _ in folds.values()]
        weights += [1 / len(folds)] * len(folds)
    names = test.file_names if args.image_id == "file_name" else [str(i) for i in test.ids]
    looks = []
    preds = (remove_small(probs.argmax(0).astype(np.uint8), min_area) for probs in soft_vote(stores, weights))
    write_submission(args.out, names, keep_looks(preds, test, looks), len(test.classes))
    write_sheet(args.out.with_suffix(".png"), [sum(looks[i:i + 3], []) for i in range(0, len(looks), 3)], test.classes)
    print(f"{args.out}: {len(names)} images by {len(stores)} run(s) of {len(members)} recipe(s)")


# ---- pictures -------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours for the colour-blind and four of Tol's; class 1 has the first, after the last they repeat
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
           (136, 34, 85), (51, 34, 136), (187, 187, 187), (255, 255, 255))


def class_colours(n_classes):
    """uint8 [n_classes, 3] RGB; background is black."""
    return np.array([(0, 0, 0), *(PALETTE[i % len(PALETTE)] for i in range(n_classes - 1))], np.uint8)


def overlay(image, mask, n_classes, strength=0.6):
    """uint8 [S, S, 3] with S = SUBMIT_SIZE: the photo, greyed, under the colours of the mask uint8 [S, S]."""
    import cv2
    photo = cv2.resize(image, (SUBMIT_SIZE, SUBMIT_SIZE), interpolation=cv2.INTER_AREA).astype(np.float32)
    grey = np.repeat(photo.mean(2, keepdims=True), 3, axis=2)
    mixed = grey * (1 - strength) + class_colours(n_classes)[mask] * strength
    return np.where((mask > 0)[..., None], mixed, photo).astype(np.uint8)


def write_sheet(path, rows, classes):
    """Write a PNG of `rows`, lists of (caption, uint8 RGB tile of one size), over a legend of the class colours."""
    from PIL import Image, ImageDraw, ImageFont
    font, line = ImageFont.load_default(13), 18
    height, width = rows[0][0][1].shape[:2]
    sheet = Image.new("RGB", (width * max(map(len, rows)), (height + line) * len(rows) + line * len(classes)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (caption, tile) in enumerate(row):
            sheet.paste(Image.fromarray(tile), (c * width, r * (height + line) + line))
            draw.text((c * width + 3, r * (height + line) + 1), caption[:width // 7], "black", font)
    for i, (name, colour) in enumerate(zip(classes, class_colours(len(classes)).tolist(), strict=True)):
        top = (height + line) * len(rows) + i * line
        draw.rectangle((4, top + 3, 30, top + line - 3), tuple(colour), "black")
        draw.text((36, top + 1), name, "black", font)
    with atomic_write(path) as scratch:
        sheet.save(scratch, format="png")


# ---- out-of-fold scores ---------------------------------------------------------------------------------------------


def fold_confusions(stores, train, position):
    """{image position in train: [C, C] pixel counts} of the soft vote of one fold's stores [(probs, info)]."""
    image_ids = stores[0][1]["image_ids"]
    if any(info["image_ids"] != image_ids for _, info in stores):
        raise SystemExit("validation stores of one fold are of different images: run infer.py again")
    if absent := [i for i in image_ids if i not in position]:
        raise SystemExit(f"DATA has no image {absent[0]}, which a validation store has: run train.py again")
    votes = soft_vote([probs for probs, _ in stores], np.ones(len(stores)))
    return {position[i]: confusion(probs.argmax(0).astype(np.uint8), train.truth(position[i]), len(train.classes))
            for i, probs in zip(image_ids, votes, strict=True)}


def oof_confusions(recipes, train):
    """(image positions in train, their folds, [N, C, C] pixel counts) of the vote of recipes {fold: (probs, info)}."""
    position = {image_id: i for i, image_id in enumerate(train.ids)}
    counts, fold_of = {}, {}
    for fold in sorted(set().union(*recipes)):
        new = fold_confusions([folds[fold] for folds in recipes if fold in folds], train, position)
        counts |= new
        fold_of |= dict.fromkeys(new, fold)
    images = sorted(counts)
    return images, np.array([fold_of[i] for i in images]), np.stack([counts[i] for i in images])


def print_scores(args, members, train):
    """Print every recipe, the vote and what follows it, out of fold; returns the minimum area by class to use."""
    rows = {name: oof_confusions([folds], train)[2] for name, folds in members.items()}
    images, folds, vote = oof_confusions(list(members.values()), train)
    rows["soft vote"] = vote
    if len(set(folds)) == 1:  # parts of the one fold take the place of folds
        present = vote.sum(2)[:, 1:] > 0
        folds = make_folds(present, [train.groups[i] for i in images], min(5, len({train.groups[i] for i in images})))
    min_area, cross_fitted, verdict = choose_min_area(vote, folds)
    rows["soft vote, minimum area"] = cross_fitted
    rows["all background"] = drop_columns(vote, np.zeros(vote.shape[:2], bool))
    width = max(map(len, rows))
    print(f"out of fold: {len(images)} of {len(train.ids)} training images\n"
          f"{'':{width}}     v1     v2     v3   IoU of {', '.join(train.classes)}")
    for name, counts in rows.items():
        result = scores(counts, args.batch)
        print(f"{name:{width}} {result['v1']:6.4f} {result['v2']:6.4f} {result['v3']:6.4f}   "
              + " ".join("  -  " if np.isnan(iou) else f"{iou:.3f}" for iou in result["iou"]))
    print(verdict)
    return min_area


# ---- minimum area: a class with fewer pixels than that in an image becomes background -------------------------------


def remove_small(pred, min_area):
    """pred uint8 [H, W] with the classes that have fewer than min_area[class_id] pixels turned into background."""
    areas = np.bincount(pred.ravel(), minlength=len(min_area))
    return np.where(areas >= min_area, np.arange(len(min_area)), 0).astype(np.uint8)[pred]


def drop_columns(counts, keep):
    """[N, C, C] pixel counts after the predictions of the classes with keep [N, C] false became background."""
    kept = counts * keep[:, None, :]
    kept[:, :, 0] += (counts - kept).sum(2)
    return kept


def apply_min_area(counts, min_area):
    return drop_columns(counts, counts.sum(1) >= min_area)


def fit_min_area(counts):
    """[C] pixels: the best common area for v3, then each class in turn; counts [N, C, C] hold all that this needs."""
    grid = [0, *(2 ** np.arange(4, 12))]  # up to 3% of the image: a larger area fits the images it was fitted on
    v3 = lambda area: image_miou(apply_min_area(counts, area)).mean()  # noqa: E731
    areas = [np.full(counts.shape[1], area) for area in grid]
    best = max(areas, key=v3)
    for class_id in range(1, len(best)):
        tries = [np.where(np.arange(len(best)) == class_id, area, best) for area in [best[class_id], *grid]]
        best = max(tries, key=v3)
    return best


def choose_min_area(counts, folds):
    """(areas [C] to use, counts with areas fitted on the other folds, a line that says what was found).

    Areas are used only if, fitted on the other folds, they gain more than chance: the 95% interval of the mean gain in
    v3 by a paired bootstrap over images is above zero.
    """
    cross_fitted = counts.copy()
    for fold in set(folds) if len(set(folds)) > 1 else ():
        cross_fitted[folds == fold] = apply_min_area(counts[folds == fold], fit_min_area(counts[folds != fold]))
    gain = image_miou(cross_fitted) - image_miou(counts)
    low, high = bootstrap_interval(gain)
    areas = fit_min_area(counts) if low > 0 else np.zeros(counts.shape[1], int)
    return areas, cross_fitted, (f"minimum area, cross-fitted: v3 {gain.mean():+.4f} [{low:+.4f}, {high:+.4f}]: "
                                 + (f"taken, {areas[1:].tolist()} pixels" if low > 0 else "not taken"))


def bootstrap_interval(values, n_draws=2000):
    """95% interval of the mean of [N] values, each an image's, by drawing images with replacement."""
    draws = np.random.default_rng(0).integers(len(values), size=(n_draws, len(values)))
    return np.percentile(values[draws].mean(1), (2.5, 97.5))


def main(args):
    if args.command == "soft":
        submit(args)
    else:
        members, info = open_members(args.runs, "valid")
        print_scores(args, members, open_data(args, info, args.runs[0])[0])


if __name__ == "__main__":
    run_script(main, parse_args())
