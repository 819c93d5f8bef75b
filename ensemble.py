"""Let any number of runs vote on a submission, or score them out of fold.

    python ensemble.py soft --data DATA --weights fit --out out/main/submission.csv out/main/r1/*/*/s512/f*
    python ensemble.py hard --data DATA --weights 2,1 --out out/voted.csv mine.csv theirs.csv
    python ensemble.py score --data DATA --weights fit --tables out/main/report out/main/r1/*/*/s512/f*
    python ensemble.py compare --data DATA out/main out/lr5

A run is a folder of train.py and infer.py; runs that differ only in the fold are one member. soft averages
probabilities, hard counts the votes of submissions and runs; both write the CSV in test.json's order, read back and
checked before it gets its name, then OUT.made.json, which says what made it, and soft a .png of some predictions; the
same line again does nothing. --report is a web page of all that is known. A run votes background on a photo that it
couldn't read; then the exit code is 3, though the submission stands. Whatever is fitted is fitted on some folds, scored
on the others, and used only if the 95% interval of its gain in v3 is above zero. plan, which make asks, compares what
made each file with what would make it now.
"""
import argparse
import csv
import gc
import itertools
import json
import math
import os
import re
import sys
from collections import defaultdict
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (DERIVED, SUBMIT_SIZE, Hashes, Help, Parser, accepted_code, atomic_write, cache_folder,
                    check_output, class_iou, clean, code_changes, code_hashes, code_of, code_question, confusion,
                    data_files, decide, different_keys, draw_bars, draw_heat, figure_urls, fingerprint, folds_hash,
                    foreground_ids, image_miou, is_description, keep_code, library_versions, load_data, lock,
                    make_folds, move_aside, named, number, overlay, provenance, read_csv, read_description, read_folds,
                    read_json, recipe_changes, run_script, scores, short_hash, tile_url, version_changes,
                    write_description, write_page, write_sheet)
from infer import BY_FOLD, check_unchanged, difference, open_store, order_of, read_probs
from pseudo_label import pseudo_counts, write_coco

HEADER = ["image_id", "PredictionString"]
PAIR = np.uint16(ord("0") + 256 * ord(" "))  # "0 " as a number of two bytes, the lower first: of x86 and ARM
MAX_PICKS = 30  # of the greedy selection of weights
THUMBNAILS = 128_000_000  # bytes for the small copies of probabilities that weights and biases are fitted on
BIASES = (-1.4, -1, -0.7, -0.35, 0.35, 0.7, 1, 1.4)  # tried for each class
SIZES = (0, 0.003, 0.01, 0.03, 0.1, 0.3)  # of a class in an image, as a share of it: where bins of the report begin
AREAS = (0, *(2 ** np.arange(4, 12)))  # up to 3% of the image: a larger one fits the images it was fitted on
CONTAMINATED = "CONTAMINATED: pseudo labels' makers have seen these images (--allow-leak)"
FITTED = {"weights": "weights", "bias": "log-bias by class", "min_area": "minimum area by class"}
# what decides no result; see BESIDE in common.py
BESIDE = {"check_classes", "check_one_member", "exit_if_unread", "explain", "keep_looks", "made_file",
          "check_outputs", "run_name", "show", "show_scores", "soft_recipe", "stands",
          "write_made"}


def parse_args(argv=None):
    data, runs, scored, tables, out, pair, mixed = (argparse.ArgumentParser(add_help=False) for _ in range(7))
    data.add_argument("--data", type=Path, required=True, help="the competition's folder")
    data.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks")
    runs.add_argument("runs", type=Path, nargs="+", help="run folders with stores of infer.py; hard: or CSVs")
    runs.add_argument("--weights", type=vote_weights, default="equal", metavar="equal|fit|W,W,...",
                      help="of the members, or for hard of the voters; fit: by greedy selection, not for hard")
    scored.add_argument("--report", type=Path, help="a web page with the tables, figures and the worst images to write")
    scored.add_argument("--batch", type=number(int, 1), default=8, help="images in a batch of v1")
    tables.add_argument("--tables", type=Path, help="folder for the printed tables as CSV")
    out.add_argument("--out", type=Path, required=True, help="the submission to write")
    out.add_argument("--image-id", choices=("id", "file_name"), default="id",
                     help="what names an image in the submission; some upload pages want file_name")
    out.add_argument("--coco", action="store_true", help="also write the masks as COCO JSON beside the submission")
    out.add_argument("--code", choices=("new", "keep"), help="where other code has made the submission: make it anew, "
                     "or keep it as it is")
    mixed.add_argument("--mixed", action="store_true", help="let folds of different recipes or code be one member")
    pair.add_argument("experiments", type=Path, nargs=2, help="out/EXP for its last round, or out/EXP/rR")
    parser = Parser(prog="ensemble.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, parents, text in (
            ("soft", [data, runs, mixed, scored, tables, out], "average the probabilities of runs"),
            ("hard", [data, runs, out], "count the votes of submissions and runs"),
            ("score", [data, runs, mixed, scored, tables], "print out-of-fold scores"),
            ("compare", [data, mixed, tables, pair], "say whether one experiment beats another"),
            ("plan", [data, grid_options()], "print what of an experiment is to be made"),
            ("status", [data, grid_options()], "say how far the runs are, and why what is not up to date isn't")):
        commands.add_parser(name, parents=parents, allow_abbrev=False, formatter_class=Help, help=text)
    return parser.parse_args(argv)


def vote_weights(text):
    if text in ("equal", "fit"):
        return text
    try:
        weights = [float(w) for w in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights):
        raise argparse.ArgumentTypeError(f"{text}: weights are numbers from 0, not all 0, with commas between them")
    return weights


# ---- members --------------------------------------------------------------------------------------------------------


def open_members(args, runs, split, hashes):
    """({name: {fold: (probs, info)}} of the runs, every info, the folder they share); SystemExit if they don't fit."""
    members, infos = defaultdict(dict), []
    for run in runs:
        path = run / f"{split}.json"
        probs, info = open_store(path, hashes)
        infos.append(info)
        check_classes(info["classes"], infos[0]["classes"], path, runs[0])
        for key in ("paint", "folds_csv", "data"):
            if info[key] != infos[0][key]:
                raise SystemExit(f"{path} has another {key} than {runs[0]}, {info[key]} and not {infos[0][key]}: made "
                                 "on other data or folds, they can't vote together; run infer.py on both again")
        folds = members[os.path.abspath(run.parent), info["tta"]]
        if info["fold"] in folds:
            raise SystemExit(f"{run}: given twice, or another of its member has fold {info['fold']} too")
        if folds and not args.mixed:
            check_one_member(path, info, *next((other.filename, info) for other, info in folds.values()))
        folds[info["fold"]] = probs, info
    shared = os.path.commonpath([os.path.dirname(folder) for folder, _ in members])
    return {f"{os.path.relpath(path, shared)} {tta}": folds for (path, tta), folds in members.items()}, infos, shared


def check_one_member(path, info, other_path, other):
    """Raise SystemExit if two folds of a member differ in more than the fold: in recipe, or in code nobody has kept."""
    ours, theirs = info["run"], other["run"]
    free = {*BY_FOLD, *DERIVED}
    differ = different_keys({k: v for k, v in ours["recipe"].items() if k not in free},
                            {k: v for k, v in theirs["recipe"].items() if k not in free})
    if not {*ours["codes"]} & {*theirs["codes"]}:
        differ += [f"the code of {name}" for name in different_keys(ours["code"], theirs["code"])]
    if not {*code_hashes(info)} & {*code_hashes(other)}:
        differ += [f"the code of {name}" for name in different_keys(accepted_code(info), accepted_code(other))]
    if differ:
        raise SystemExit(f"{path} and {other_path} are folds of one member, but differ in {', '.join(differ[:6])}: "
                         "make one of them anew, or let them vote as one with --mixed")


def check_classes(found, wanted, path, other):
    if found != wanted:
        raise SystemExit(f"{path} has other classes than {other}: it {difference(found, wanted) or 'orders them so'}: "
                         f"{clean(', '.join(found))}")


def member_weights(args, voters):
    """[M] weights of the voters, given or equal."""
    if args.weights in ("equal", "fit"):
        return np.ones(len(voters))
    if len(args.weights) != len(voters):
        raise SystemExit(f"{len(args.weights)} weights for {len(voters)} voters: {', '.join(map(str, voters))}")
    return np.array(args.weights)


def top_class(values):
    """uint8 [H, W]: argmax(0) of [C, H, W], of equal ones the first, in a seventh of the time that numpy takes."""
    best, pred = values[0].copy(), np.zeros(values.shape[1:], np.uint8)
    for class_id in range(1, len(values)):
        np.maximum(pred, (values[class_id] > best) * np.uint8(class_id), out=pred)
        np.maximum(best, values[class_id], out=best)
    return pred


def vote(images, weights, bias):
    """Class ids uint8 [H, W] by the weighted sum of {voter's number: probs uint8 [C, H, W]}; background without any."""
    import cv2
    total = np.zeros((len(bias), SUBMIT_SIZE * SUBMIT_SIZE), np.float32)
    for weight in {weights[m] for m in images} - {0}:  # those of one weight are first added up as whole numbers
        alike = np.zeros_like(total)
        for image in (image for m, image in images.items() if weights[m] == weight):
            cv2.accumulate(image.reshape(total.shape), alike)
        total += np.float32(weight) * alike
    total *= np.float32(np.exp(bias))[:, None]
    return top_class(total.reshape(-1, SUBMIT_SIZE, SUBMIT_SIZE))


# ---- out of fold ----------------------------------------------------------------------------------------------------


class OutOfFold:
    """The validation images of all members, in train's order, and where each member's probabilities of them are."""

    def __init__(self, args, runs):
        members, self.made, shared = open_members(args, runs, "valid", Hashes(args.cache))
        self.names, self.infos = list(members), [next(iter(folds.values()))[1] for folds in members.values()]
        train, self.test = load_data(args.data, args.cache, self.infos[0]["paint"])
        check_classes(self.infos[0]["classes"], train.classes, runs[0], args.data)
        if self.infos[0]["data"] != train.fingerprint:
            raise SystemExit(f"{runs[0]}/valid.json was made on other data than is in {args.data} now: run train.py "
                             "and infer.py again")
        self.classes, self.stores, fold_of = train.classes, defaultdict(dict), {}  # [id] {member's number: its place}
        self.contaminated = any(info["contaminated"] for info in self.made)
        for m, folds in enumerate(members.values()):
            for fold, (probs, info) in folds.items():
                others = [i for i, other in fold_of.items() if other == fold]
                order_of(info["image_ids"], others or info["image_ids"], probs.filename)
                for i, image_id in enumerate(info["image_ids"]):
                    fold_of[image_id] = fold
                    self.stores[image_id][m] = probs, i
        if absent := fold_of.keys() - set(train.ids):
            raise SystemExit(f"DATA has no image {min(absent)}, which a validation store has: run train.py again")
        indices = [i for i, image_id in enumerate(train.ids) if image_id in fold_of]
        self.ids = [train.ids[i] for i in indices]
        self.train, self.indices, self.tables, self.used = train, indices, [], {}  # the last two: what was shown
        self.truths = np.stack([train.truth(i) for i in indices])  # uint8 [N, H, W]
        kind, folds = "fold", [fold_of[i] for i in self.ids]
        if len(set(folds)) == 1:  # parts of the one fold take the place of folds
            kind, groups = "part", [train.groups[i] for i in indices]
            folds = make_folds(np.array(train.pixels)[indices, 1:] > 0, groups, min(5, len(set(groups))))
        names, self.parts = np.unique(folds, return_inverse=True)  # [N] from 0: what is held out together in a fit
        self.part_names = [f"{kind} {name}" for name in names]
        self.title = f"out of fold: {len(self.ids)} of {len(train.ids)} training images, runs in {shared}"

    def probs(self, n):
        """{member's number: uint8 [C, H, W]} of image n, by the models that held it out."""
        return {m: read_probs(*place) for m, place in self.stores[self.ids[n]].items()}


def survey(oof):
    """One pass over the members: (counts, thumbnails, truths of these, shares).

    Pixel counts int32 [M, N, C, C], 0 where a member hasn't predicted an image; of every so many pixels probabilities
    uint8 [M, N, C, P] and truths [N, P]; the share of pixels on which two members differ, [M, M].
    """
    n_members, n_images, n_classes = len(oof.names), len(oof.ids), len(oof.classes)
    room = THUMBNAILS / (n_images * n_classes * (n_members + 8))  # 8 for two sums of them in float32
    step = next((s for s in (4, 8, 16, 32) if (SUBMIT_SIZE // s) ** 2 <= room), 64)
    pixels = np.s_[..., step // 2::step, step // 2::step]
    truths = oof.truths[pixels].reshape(n_images, -1).astype(int)
    thumbs = np.zeros((n_members, n_images, n_classes, truths.shape[1]), np.uint8)
    counts = np.zeros((n_members, n_images, n_classes, n_classes), np.int32)
    apart, both = np.zeros((2, n_members, n_members))
    for n, truth in enumerate(tqdm(oof.truths, "members", disable=None)):
        images = oof.probs(n)
        preds = {m: top_class(image) for m, image in images.items()}
        for m, pred in preds.items():
            counts[m, n] = confusion(pred, truth, n_classes)
            thumbs[m, n] = images[m][pixels].reshape(n_classes, -1)
        for a, b in itertools.combinations_with_replacement(preds, 2):
            apart[[a, b], [b, a]] += (preds[a] != preds[b]).mean()
            both[[a, b], [b, a]] += 1
    return counts, thumbs, truths, np.divide(apart, both, np.full_like(both, np.nan), where=both > 0)


def vote_counts(oof, weights, biases):
    """int32 [K, N, C, C] pixel counts of K votes of weights [K, M] and log-biases [K, C]."""
    kinds, kind_of = np.unique(np.column_stack([weights, biases]), axis=0, return_inverse=True)
    counts = np.zeros((len(kinds), len(oof.ids), len(oof.classes), len(oof.classes)), np.int32)
    for n, truth in enumerate(tqdm(oof.truths, "votes", disable=None)):
        images = oof.probs(n)
        for k, kind in enumerate(kinds):
            pred = vote(images, kind[:len(oof.names)], kind[len(oof.names):])
            counts[k, n] = confusion(pred, truth, len(oof.classes))
    return counts[kind_of]


# ---- what is fitted -------------------------------------------------------------------------------------------------


def score_of(probs, truths):
    """Mean v3 of [N, C, P] probabilities, or whatever has the same argmax."""
    n, n_classes, _ = probs.shape
    codes = (np.arange(n)[:, None] * n_classes + truths) * n_classes + probs.argmax(1)
    counts = np.bincount(codes.ravel(), minlength=n * n_classes ** 2).reshape(n, n_classes, n_classes)
    return image_miou(counts).mean()


def fit_weights(thumbs, truths):
    """[M] weights: greedy selection with replacement by v3 (Caruana et al. 2004); thumbs [M, N, C, P]."""
    picks, total, best = np.zeros(len(thumbs)), np.float32(0), -1.0
    while picks.sum() < MAX_PICKS:
        tries = [score_of(total + thumb, truths) for thumb in thumbs]
        if max(tries) <= best:
            break
        best, pick = max(tries), int(np.argmax(tries))
        picks[pick] += 1
        total = total + thumbs[pick]
    return picks / picks.sum()


def climb(values, grid, measure):
    """[C] values after each class but background in turn took the value of the grid that scores best, if it gains."""
    best = measure(values)
    for class_id in range(1, len(values)):
        for value in grid:
            tried = np.where(np.arange(len(values)) == class_id, value, values)
            if (found := measure(tried)) > best:
                best, values = found, tried
    return values


def fit_bias(weights, thumbs, truths):
    """[C] log-bias of the classes' probabilities that gains most in v3."""
    def v3(bias):
        return score_of(total * np.float32(np.exp(bias))[:, None], truths)
    total = sum(np.float32(w) * thumb for w, thumb in zip(weights, thumbs, strict=True) if w)
    return climb(np.zeros(total.shape[1]), BIASES, v3)


def fit_min_area(counts):
    """[C] pixels: the best common area for v3, then each class in turn; counts [N, C, C] hold all that this needs."""
    def v3(areas):
        return image_miou(apply_min_area(counts, areas)).mean()
    foreground = np.arange(counts.shape[1]) > 0
    return climb(max((area * foreground for area in AREAS), key=v3), AREAS, v3)


def apply_min_area(counts, min_area):
    """[N, C, C] pixel counts after remove_small."""
    kept = counts * (counts.sum(1) >= min_area)[:, None, :]
    kept[:, :, 0] += (counts - kept).sum(2)
    return kept


def remove_small(pred, min_area):
    """pred uint8 [H, W] with the classes that have fewer than min_area[class_id] pixels turned into background."""
    areas = np.bincount(pred.ravel(), minlength=len(min_area))
    return np.where(areas >= min_area, np.arange(len(min_area)), 0).astype(np.uint8)[pred]


def bootstrap_interval(values, n_draws=2000):
    """95% interval of the mean of [N] values, each an image's, by drawing images with replacement."""
    draws = np.random.default_rng(0).integers(len(values), size=(n_draws, len(values)))
    return np.percentile(values[draws].mean(1), (2.5, 97.5))


def gain(after, before):
    """Mean gain in v3 and its paired 95% interval, from the pixel counts [N, C, C] of the same images."""
    gains = image_miou(after) - image_miou(before)
    low, high = bootstrap_interval(gains)
    return {"gain": gains.mean(), "low": low, "high": high}


def choose(oof, thumbs, truths, weights, fit):
    """({"weights": [M], "bias": [C], "min_area": [C]} to use, counts [N, C, C] by name, rows of what was tried).

    For each part all three are fitted on the other parts, one on top of the other, and scored on that part. The last
    of each list is fitted on all images: that is what the test photos get. Log-bias and minimum area compete, alone and
    together: the first that gains would often spoil the other's larger gain.
    """
    n_classes, n_images = len(oof.classes), np.arange(len(oof.ids))
    rests = [oof.parts != part for part in np.unique(oof.parts)] + [oof.parts >= 0]
    none = {"weights": [weights] * len(rests), "bias": [np.zeros(n_classes)] * len(rests),
            "min_area": [np.zeros(n_classes, int)] * len(rests)}
    used, votes = none, vote_counts(oof, none["weights"], none["bias"])
    name = f"soft vote, {'given' if np.ptp(weights) else 'equal'} weights"
    counts, tried = {name: votes[oof.parts, n_images]}, []

    def take_best(options):
        """What wins of {name: (used, votes)} over what is used, if it does by more than chance; all into `tried`."""
        rows = {name: gain(after[oof.parts, n_images], votes[oof.parts, n_images])
                for name, (_, after) in options.items()}
        best = max((name for name in rows if rows[name]["low"] > 0), key=lambda n: rows[n]["gain"], default=None)
        tried.extend({"tried": name, **row, "taken": "yes" if name == best else "no"} for name, row in rows.items())
        return options.get(best, (used, votes))

    if fit and len(oof.names) > 1 and len(rests) > 2:  # one group of photos has no other part to be fitted on
        now = none | {"weights": [fit_weights(thumbs[:, rest], truths[rest]) for rest in rests]}
        used, votes = take_best({"fitted weights": (now, vote_counts(oof, now["weights"], now["bias"]))})
    if len(rests) > 2:
        biased = used | {"bias": [fit_bias(w, thumbs[:, rest], truths[rest])
                                  for w, rest in zip(used["weights"], rests, strict=True)]}
        options = {"log-bias": (biased, vote_counts(oof, used["weights"], biased["bias"]))}
        for label, (before, counted) in {"minimum area": (used, votes), "both of them": options["log-bias"]}.items():
            areas = [fit_min_area(of_fit[rest]) for of_fit, rest in zip(counted, rests, strict=True)]
            sized = np.stack([apply_min_area(*pair) for pair in zip(counted, areas, strict=True)])
            options[label] = before | {"min_area": areas}, sized
        used, votes = take_best(options)
    counts["with what is taken"] = votes[oof.parts, n_images]
    counts["all background"] = apply_min_area(counts[name], SUBMIT_SIZE ** 2 + 1)
    return {key: found[-1] for key, found in used.items()}, counts, tried


# ---- tables ---------------------------------------------------------------------------------------------------------


def show(args, oof, name, title, cells):
    """Print, keep and write a table; cells: a list of its rows or a dict of its columns."""
    import pandas as pd
    table = pd.DataFrame(cells)
    oof.tables.append((title, table))
    if oof.contaminated:
        table["contaminated"] = "yes"
        title = f"{CONTAMINATED}\n{title}"
    print(f"\n{title}\n" + table.to_string(index=False, float_format="{:.4f}".format, na_rep="-"))
    if args.tables:
        with atomic_write(args.tables / f"{name}.csv") as scratch:
            table.to_csv(scratch, index=False)


def show_scores(args, oof, singles, used, counts, tried):
    members, iou = [], {"class": oof.classes}
    numbered = [(str(m + 1), name, singles[m]) for m, name in enumerate(oof.names)]
    for label, name, of_images in [*numbered, *(("", name, of_images) for name, of_images in counts.items())]:
        of_images = of_images[of_images.sum((1, 2)) > 0]  # not every member has predicted every image
        found, (low, high) = scores(of_images, args.batch), bootstrap_interval(image_miou(of_images))
        members.append({"": label, "name": name, "images": len(of_images), **{k: found[k] for k in ("v1", "v2", "v3")},
                        "low": low, "high": high})
        iou[label or name] = found["iou"]
    show(args, oof, "members", f"{oof.title}; low and high: 95% interval of v3", members)
    show(args, oof, "iou", "IoU of each class, members by their number", iou)
    if tried:
        show(args, oof, "tried", "tried: gain in v3 on the folds that it wasn't fitted on; taken if low is above 0",
             tried)
    for key, labels in (("weights", oof.names), ("bias", oof.classes), ("min_area", oof.classes)):
        values = [f"{label} {value:.4g}" for label, value in zip(labels, used[key], strict=True) if value]
        oof.used[FITTED[key]] = ", ".join(values) or "none"
    print("\nused:", *(f"{what}: {values}" for what, values in oof.used.items()), sep="\n    ")


def analyse(args, oof, thumbs, truths, apart):
    """Show who adds what, what each axis gains, and who disagrees with whom.

    The order of the waterfall is found on thumbnails, all numbers are of whole images.
    """
    n_members, order, total = len(oof.names), [], np.float32(0)
    show(args, oof, "disagreement", "disagreement: share of pixels on which two members differ",
         {"": range(1, n_members + 1), "member": oof.names, **{str(m): share for m, share in enumerate(apart, 1)}})
    shared = thumbs.any((2, 3)).all(0)  # [N] images that all have predicted: an absent member would be no loss else
    if not shared.any():
        print("\nno image was predicted by all members: no table of who adds what")
        return
    thumbs, truths = thumbs[:, shared], truths[shared]
    while len(order) < n_members:
        left = [m for m in range(n_members) if m not in order]
        order.append(max(left, key=lambda m: score_of(total + thumbs[m], truths)))
        total = total + thumbs[order[-1]]
    axes = {axis: [str(info[axis]) for info in oof.infos] for axis in ("model", "scale", "round", "tta", "seed")}
    axes["epochs"] = [str(len(info["checkpoints"])) for info in oof.infos]
    alike = {(axis, value): np.array(values) == value for axis, values in axes.items() if len(set(values)) > 1
             for value in sorted(set(values))}  # [M] the members with this value
    weights = [*(np.isin(range(n_members), order[:i + 1]) for i in range(n_members)), *alike.values()]
    votes = vote_counts(oof, weights, np.zeros((len(weights), len(oof.classes))))[:, shared]
    v3 = [image_miou(counts).mean() for counts in votes]
    rows = [{"": m + 1, "member": oof.names[m], "v3": v3[i], **(gain(votes[i], votes[i - 1]) if i else {})}
            for i, m in enumerate(order)]
    show(args, oof, "waterfall", "waterfall: the member next is the one that the vote of those above gains most from",
         rows)
    best = {}  # axis -> row of its best value
    for k, (axis, value) in enumerate(alike, n_members):
        if axis not in best or v3[k] > best[axis]["v3"]:
            best[axis] = {"axis": axis, "best alone": value, "v3": v3[k], **gain(votes[n_members - 1], votes[k])}
    if best:
        show(args, oof, "axes", "axes: what the vote of all gains over that of the members with the best value alone\n"
             "(fold isn't here: no two folds predict the same image out of fold)", [*best.values()])


# ---- submissions ----------------------------------------------------------------------------------------------------


def encode_mask(pred):
    """b"0 0 11 3": the class ids of a mask uint8 [H, W], row by row."""
    # two bytes an id; those from 10 on stand as the bytes after "9" until they are replaced
    text = (pred + PAIR).tobytes()[:-1]
    for class_id in range(10, int(pred.max()) + 1):
        text = text.replace(bytes([class_id + ord("0")]), str(class_id).encode())
    return text


def decode_mask(text, n_classes):
    """The class ids that encode_mask wrote, uint16 [SUBMIT_SIZE ** 2]; None if the text isn't just like that."""
    length = 2 * SUBMIT_SIZE ** 2 - 1
    if np.frombuffer(text, np.uint8).max(initial=0) > ord("9"):
        return None
    for class_id in range(n_classes - 1, 9, -1):  # each id to one byte, as in encode_mask
        text = text.replace(str(class_id).encode(), bytes([class_id + ord("0")])) if len(text) > length else text
    if len(text) != length:
        return None
    ids = np.frombuffer(text + b" ", np.uint16) - PAIR
    return ids if ids.max() < n_classes else None


def write_submission(path, names, preds, n_classes, beside=lambda scratch: None):
    """Write, read back and check the CSV; it gets its name only when every row is as it should be.

    beside(scratch) writes, before that, what goes beside it from the CSV under its scratch name.
    """
    with atomic_write(path) as scratch:
        with open(scratch, "wb") as f:
            f.write(",".join(HEADER).encode() + b"\n")
            for name, pred in zip(names, tqdm(preds, str(path), len(names), disable=None), strict=True):
                quoted = '"' + name.replace('"', '""') + '"' if set(name) & set('",\r\n') else name
                f.write(quoted.encode() + b"," + encode_mask(pred) + b"\n")  # csv looks at each character in turn
        if faults := [fault for fault, _ in read_submission(scratch, names, n_classes) if fault]:
            raise SystemExit("\n".join(faults))
        beside(scratch)


def write_masks(args, test, preds, looks=()):
    """Write the submission, beside it a picture of `looks` and, if it is asked for, its masks as COCO JSON."""
    names, n_classes = image_names(args, test), len(test.classes)

    def beside(scratch):
        if looks:  # which preds() has filled
            write_sheet(args.out.with_suffix(".png"), looks, dict(enumerate(test.classes)), across=3)
        if args.coco:
            masks = (pred for _, pred in read_submission(scratch, names, n_classes))
            write_coco(args.out.with_suffix(".json"), args.data / "test.json", test, enumerate(masks))
        move_aside(args.out.parent, [made_file(args.out).name, args.out.name])
    write_submission(args.out, names, preds, n_classes, beside)


def image_names(args, test):
    return test.file_names if args.image_id == "file_name" else [str(i) for i in test.ids]


def csv_rows(f):
    """The rows of a CSV opened in binary, as bytes; csv, which is slow, reads only lines with quotes."""
    for line in f:
        if b'"' in line:
            lines = (part.decode("utf-8-sig", "replace").replace("\r", "") for part in itertools.chain([line], f))
            yield [cell.encode() for cell in next(csv.reader(lines))]
        else:
            yield line.rstrip(b"\r\n").split(b",", 1)  # a second comma is no class id


def read_submission(path, names, n_classes):
    """Yield (what is wrong or None, mask uint8 [SUBMIT_SIZE, SUBMIT_SIZE]) of each row; they must be of `names`.

    A byte order mark, CRLF and more spaces than needed between and around the ids are harmless.
    """
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, "rb", buffering=2 ** 20) as f:
        rows = csv_rows(f)
        header = b",".join(next(rows, [])).decode("utf-8-sig", errors="replace")
        if [cell.strip() for cell in header.split(",")] != HEADER:
            yield f"{path}: the first line is {clean(header[:100])!r}, not {','.join(HEADER)}", None
            return
        for line, (name, row) in enumerate(itertools.zip_longest(names, rows), 2):
            found = row and row[0].decode(errors="replace")
            if found != name or len(row) != 2:
                found = f"{clean(found[:300])} with {len(row)} column(s)" if row else "missing"
                yield f"{path} line {line}: image {found}, expected {clean(name or 'no more')}", None
                continue
            ids = decode_mask(row[1], n_classes)
            if ids is None:  # somebody else's, with more blanks or leading zeros, or damaged
                ids = np.fromstring(row[1] if re.fullmatch(rb"[\d\s]*", row[1]) else b"", np.int64, sep=" ")
            if ids.size != SUBMIT_SIZE ** 2 or ids.min() < 0 or ids.max() >= n_classes:
                yield f"{path} line {line}, image {clean(name)}: {pixel_fault(row[1], n_classes)}", None
            else:
                yield None, ids.astype(np.uint8).reshape(SUBMIT_SIZE, SUBMIT_SIZE)


def pixel_fault(text, n_classes):
    """What is wrong with the text that ought to be the ids of an image's pixels."""
    words, good = text.split(), {str(i).encode() for i in range(n_classes)}
    bad = next((i for i, word in enumerate(words[:SUBMIT_SIZE ** 2]) if (word.lstrip(b"0") or b"0") not in good), None)
    found = f"there are {len(words)}"
    if bad is not None:
        word = clean(words[bad][:30].decode(errors="replace"))
        found = f"row {bad // SUBMIT_SIZE}, column {bad % SUBMIT_SIZE}, both from 0, is {word}"
    return f"not {SUBMIT_SIZE ** 2} ids of 0 to {n_classes - 1}: {found}"


def keep_looks(preds, test, looks, n=24):
    """Pass `preds` on; put [(caption, photo), (caption, prediction)] of `n` photos, spread evenly, in `looks`."""
    chosen = set(np.linspace(0, len(test.ids) - 1, min(n, len(test.ids))).astype(int).tolist())
    for i, pred in enumerate(preds):
        if i in chosen:
            image = test.image(i)
            looks.append([(test.file_names[i], overlay(image)), (named(pred, test.classes), overlay(image, pred))])
        yield pred


# ---- report ---------------------------------------------------------------------------------------------------------


def calibration(total, truths, n_bins=10):
    """(confidence, accuracy, share of the pixels) by bin of confidence, and the expected calibration error (Guo 2017).

    total [N, C, P]: votes of any scale; truths [N, P]. A bin without a pixel has NaN.
    """
    sure, right = (total.max(1) / total.sum(1).clip(1e-9)).ravel(), (total.argmax(1) == truths).ravel()
    bins = (sure * n_bins).astype(int).clip(0, n_bins - 1)
    n, confidence, accuracy = (np.bincount(bins, weights, n_bins) for weights in (None, sure, right))
    with np.errstate(invalid="ignore"):
        confidence, accuracy, share = confidence / n, accuracy / n, n / n.sum()
    return confidence, accuracy, share, np.nansum(share * abs(confidence - accuracy))


def iou_by_size(counts):
    """Mean IoU [C, S] of each class in the images of which it covers a share in SIZES; NaN where there are none."""
    area, iou = counts.sum(2), class_iou(counts)  # [N, C]
    size = np.digitize(area / area.sum(1, keepdims=True).clip(1), SIZES) * (area > 0) - 1
    with np.errstate(invalid="ignore"):
        return np.stack([np.where(size == s, iou, 0).sum(0) / (size == s).sum(0) for s in range(len(SIZES))], 1)


def draw_calibration(axes, confidence, accuracy, share):
    colour = axes.yaxis.label.get_color()
    axes.plot((0, 1), (0, 1), ":", color="grey", label="perfect")
    axes.plot(confidence, accuracy, "o-", color=colour, label="accuracy")
    axes.bar((np.arange(len(share)) + 0.5) / len(share), share, 0.9 / len(share), color="grey", alpha=0.4,
             label="share of the pixels")
    axes.set(xlabel="probability of the predicted class", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left", frameon=False)


def worst_images(oof, used, counts, n=24):
    """Cards of the `n` images with the lowest v3: photo, truth, vote with what is `used`, and where that is unsure."""
    from matplotlib import colormaps
    cards, v3 = [], image_miou(counts)
    for i in np.argsort(v3, kind="stable")[:n].tolist():
        total = sum(np.float32(used["weights"][m]) * image for m, image in oof.probs(i).items())
        probs = total * np.float32(np.exp(used["bias"]))[:, None, None]
        pred, probs = remove_small(probs.argmax(0), used["min_area"]), probs / probs.sum(0).clip(1e-9)
        entropy = -(probs * np.log(probs.clip(1e-9))).sum(0) / np.log(len(probs))
        photo, name = oof.train.image(oof.indices[i]), oof.train.file_names[oof.indices[i]]
        tiles = {"photo": overlay(photo), "truth": overlay(photo, oof.truths[i]), "vote": overlay(photo, pred),
                 "entropy": colormaps["magma"](entropy, bytes=True)[..., :3]}
        cards.append({"text": f"v3 {v3[i]:.3f}, {name}", "classes": foreground_ids([oof.truths[i], pred]),
                      "tiles": [(text, tile_url(tile)) for text, tile in tiles.items()]})
    return cards


def report_sections(args, oof, thumbs, truths, used, counts):
    """Of the page, all but how it was made."""
    import pandas as pd
    by_id, votes = dict(enumerate(oof.classes)), counts["with what is taken"]
    folds = {name: class_iou(votes[oof.parts == part].sum(0)) for part, name in enumerate(oof.part_names)}
    total = sum(np.float32(w) * thumb for w, thumb in zip(used["weights"], thumbs, strict=True) if w)
    *bins, error = calibration(total * np.float32(np.exp(used["bias"]))[:, None], truths)
    pixels, high = votes.sum(0), 1.5 + 0.25 * len(by_id)
    with np.errstate(invalid="ignore"):
        shares = pixels / pixels.sum(1, keepdims=True)
    columns = [f"{100 * low:g} to {100 * up:g}" for low, up in zip(SIZES, (*SIZES[1:], 1), strict=True)]
    figures = (
        ("IoU of each class in each fold", high, lambda axes: draw_bars(
            axes, by_id, {"all": class_iou(pixels), **folds}, xlim=(0, 1))),
        ("Confusion: how many % of a class's pixels are predicted as what", high, lambda axes: draw_heat(
            axes, shares, oof.classes, oof.classes, xlabel="prediction", ylabel="truth")),
        ("IoU in % by class and by how much of the photo it covers", high, lambda axes: draw_heat(
            axes, iou_by_size(votes), oof.classes, columns, xlabel="% of the photo")),
        (f"Reliability: expected calibration error {error:.4f}", 4, lambda axes: draw_calibration(axes, *bins)))
    sections = [{"title": title, "note": note, "table": table}
                for text, table in oof.tables for title, _, note in [text.partition(": ")]]
    sections[1:1] = [
        {"title": "used", "table": pd.DataFrame(oof.used.items(), columns=["what", "by the vote"])},
        {"title": "figures", "figures": [(text, figure_urls(plot, height)) for text, height, plot in figures],
         "note": "Of the vote with what is taken. Reliability: of a sample of pixels, with what was fitted on all "
                 "images and without minimum area."}]
    sections.append({"title": "worst images", "cards": worst_images(oof, used, votes),
                     "note": "Those with the lowest v3 of the vote with what is taken. The vote shown and its entropy, "
                             "black to yellow, are with what was fitted on all images, as for the test photos."})
    if rows := pseudo_counts(args.runs):
        sections.append({"title": "pseudo labels", "note": "Photos that models of each round and fold learnt from, and "
                         "why others were dropped.", "table": pd.DataFrame(rows).fillna(0).convert_dtypes()})
    return sections


def explain(args, oof, surveyed, used, counts, made, pixels=None):
    """Show who adds what, with score or a report, and write args.report; many members may take minutes.

    surveyed: of survey(); made: what describes the stores; pixels [C]: of the classes in the predicted test photos.
    """
    import pandas as pd
    _, thumbs, truths, apart = surveyed
    if (args.command == "score" or args.report) and len(oof.names) > 1:
        analyse(args, oof, thumbs, truths, apart)
    if not args.report:
        return
    sections = report_sections(args, oof, thumbs, truths, used, counts)
    if pixels is not None:
        labelled, by_id = np.array(oof.train.pixels).sum(0), dict(enumerate(oof.classes))
        series = {"train": labelled / labelled.sum(), "predicted test": pixels / pixels.sum()}
        sections.append({"title": "class balance", "figures": [("Share of the pixels", figure_urls(
            lambda axes: draw_bars(axes, by_id, series, xscale="log"), 1.5 + 0.25 * len(by_id)))],
            "table": pd.DataFrame({"class": oof.classes, **series})})
    rows = []
    for info in made:
        run, checkpoints = info["run"], [f"{c['file']} {c['hash']} epoch {c['epoch']}" for c in info["checkpoints"]]
        rows.append({key: info[key] for key in ("split", "model", "scale", "round", "fold", "tta", "seed")} | {
            "code of the run": f"{run['state']} {run['commit']}", "kept under": ", ".join(run["kept_under"]),
            "code of the store": f"{info['state']} {info['commit']}", "checkpoints": ", ".join(checkpoints),
            **{key: info[key] for key in ("data", "folds_csv", "contaminated")}})
    sections.append({"title": "how it was made", "note": "Stores of probabilities, with the hashes of what they come "
                     "from. Code: its folder in out/EXP/code and the git commit, with a + if files differed from it.",
                     "table": pd.DataFrame(rows)})
    write_page(args.report, f"Report: {args.report.absolute().parent.name}", sections, oof.classes,
               CONTAMINATED if oof.contaminated else "")
    print(f"{args.report}: the report")


# ---- commands -------------------------------------------------------------------------------------------------------


def fit_vote(args, oof):
    """(its survey, {"weights": [M], ...} to be used, its counts by name) of an OutOfFold, whose scores are shown."""
    weights = member_weights(args, oof.names)
    singles, thumbs, truths, _ = surveyed = survey(oof)
    used, counts, tried = choose(oof, thumbs, truths, weights, args.weights == "fit")
    show_scores(args, oof, singles, used, counts, tried)
    return surveyed, used, counts


def score(args):
    oof = OutOfFold(args, args.runs)
    explain(args, oof, *fit_vote(args, oof), oof.made)


def made_file(out):
    """What says what made the submission `out`."""
    return out.with_suffix(".made.json")


def check_outputs(args):
    """Raise SystemExit if a command would write over what it reads, over its own files, or into DATA."""
    given, outputs, inputs = vars(args), [], []
    if given.get("out"):
        outputs += [args.out, args.out.with_suffix(".png"), made_file(args.out)]
        outputs += [args.out.with_suffix(".json")] if args.coco else []
    outputs += [given[name] for name in ("report", "tables") if given.get(name)]
    for run in given.get("runs", ()):
        inputs += [run, *(run / f"{split}.{kind}" for split in ("valid", "test") for kind in ("json", "npy"))]
    check_output(args.data, *outputs, inputs=inputs)
    for path in outputs:
        if any((path.parent / name).exists() for name in ("config.json", "manifest.json")):
            raise SystemExit(f"{path} lies in the folder of a run or of pseudo labels: choose another place")


def run_name(run):
    """rROUND/DECODER/ENCODER/sSCALE/fFOLD, wherever the experiment is."""
    return "/".join(Path(os.path.abspath(run)).parts[-5:])


def soft_recipe(weights, image_id, coco, test, train, runs, valid_infos, test_infos):
    """Everything but code that decides a submission, as plain values; test, train: fingerprints of the data."""
    stores = [f"{run_name(run)} {valid['files']['valid.npy']} {info['files']['test.npy']} {info['tta']}"
              for run, valid, info in zip(runs, valid_infos, test_infos, strict=True)]
    return {"weights": weights, "image_id": image_id, "coco": coco, "test": test, "train": train, "stores": stores}


def stands(args, recipe, step, hashes):
    """(whether the submission is there and made like this, or kept; its provenance)."""
    path = made_file(args.out)
    wanted, made = provenance(recipe, code_of(step)), read_description(path, hashes)
    todo = decide(args.out, made, wanted, args.code) if made else "make"
    if todo != "done":
        keep_code(args.out.parent)
    if todo == "kept":
        write_description(path, made, files=made["files"])
    if todo != "make":
        print(f"{args.out} is there and was made like this: nothing to do")
    return todo != "make", wanted


def write_made(args, wanted, hashes):
    """Write what made the submission, after it."""
    coco = [args.out.with_suffix(".json")] if args.coco else []
    write_description(made_file(args.out), wanted, files={path.name: hashes(path) for path in (args.out, *coco)})
    hashes.save()


def soft(args):
    hashes = Hashes(args.cache)
    members, infos, _ = open_members(args, args.runs, "test", hashes)
    oof = OutOfFold(args, args.runs)
    test, looks, pixels = oof.test, [], np.zeros(len(oof.classes), int)
    if list(members) != oof.names:
        raise SystemExit(f"the test stores are {', '.join(members)}, those of validation {', '.join(oof.names)}")
    stores = [(m, len(folds), store, order_of(info["image_ids"], test.ids, store.filename))
              for m, folds in enumerate(members.values()) for store, info in folds.values()]
    if infos[0]["data"] != test.fingerprint:
        raise SystemExit(f"{args.runs[0]}/test.json was made on other data than is in {args.data} now: run infer.py "
                         "again")
    member_weights(args, oof.names)
    recipe = soft_recipe(args.weights, args.image_id, args.coco, test.fingerprint, oof.train.fingerprint, args.runs,
                         oof.made, infos)
    done, wanted = stands(args, recipe, "submission", hashes)
    if done:
        exit_if_unread(infos)
        return
    surveyed, used, counts = fit_vote(args, oof)
    weights = [used["weights"][m] / n_folds for m, n_folds, *_ in stores]  # the folds of a member share its weight

    def preds():
        for n in range(len(test.ids)):
            images = {s: read_probs(store, order[n]) for s, (*_, store, order) in enumerate(stores) if weights[s]}
            pred = remove_small(vote(images, weights, used["bias"]), used["min_area"])
            pixels[:] += np.bincount(pred.ravel(), minlength=len(pixels))
            yield pred
        for split, made in (("test", infos), ("valid", oof.made)):  # before the submission gets its name
            check_unchanged([run / f"{split}.json" for run in args.runs], made)
    write_masks(args, test, keep_looks(preds(), test, looks), looks)
    write_made(args, wanted, hashes)
    print(f"{args.out}: {len(test.ids)} images by {len(args.runs)} run(s) of {len(members)} member(s)")
    explain(args, oof, surveyed, used, counts, oof.made + infos, pixels)
    exit_if_unread(infos)


def hard(args):
    """Majority per pixel of submissions and of runs' own votes."""
    if args.weights == "fit":
        raise SystemExit("--weights fit: submissions have no out-of-fold predictions to fit on; give W,W,...")
    hashes = Hashes(args.cache)
    stores = {path: open_store(path / "test.json", hashes) for path in args.runs if path.is_dir()}
    weights, paint = member_weights(args, args.runs), [info["paint"] for _, info in stores.values()]
    _, test = load_data(args.data, args.cache, *paint[:1])
    if other := [str(path) for path, (_, info) in stores.items() if info["data"] != test.fingerprint]:
        raise SystemExit(f"{other[0]}/test.json was made on other data than is in {args.data} now: run infer.py again")
    voters = [short_hash(stores[path][1]["files"]) if path in stores else hashes(path) for path in args.runs]
    recipe = {"weights": weights.tolist(), "image_id": args.image_id, "coco": args.coco, "test": test.fingerprint,
              "voters": voters}
    done, wanted = stands(args, recipe, "voted", hashes)
    if not done:
        preds = (majority(np.stack(masks), weights) for masks in zip(
            *(masks_of(path, stores.get(path), args, test) for path in args.runs), strict=True))
        write_masks(args, test, preds)
        write_made(args, wanted, hashes)
        print(f"{args.out}: {len(test.ids)} images by {len(args.runs)} votes")
    exit_if_unread(info for _, info in stores.values())


def exit_if_unread(infos):
    """Exit with 3, saying so, if a voter couldn't read all photos; infos describe the voters."""
    if unread := sorted({image_id for info in infos for image_id in info["unreadable"]}):
        print(f"warning: the submission stands, but of {len(unread)} photo(s) that can't be read runs have voted "
              f"background: {', '.join(map(str, unread))}; mend them, run infer.py, then this again", file=sys.stderr)
        raise SystemExit(3)


def masks_of(path, store, args, test):
    """Yield the masks uint8 [H, W] of a voter, a submission or the (probs, info) of a run."""
    if store:
        probs, info = store
        check_classes(info["classes"], test.classes, path, args.data)
        yield from (top_class(read_probs(probs, i)) for i in order_of(info["image_ids"], test.ids, path))
        return
    for fault, pred in read_submission(path, image_names(args, test), len(test.classes)):
        if fault:
            raise SystemExit(fault)
        yield pred


def majority(preds, weights):
    """uint8 [H, W]: the class with the largest sum of weights among votes [M, H, W].

    Ties go to the class of the heaviest voter in them, of equally heavy ones to the first.
    """
    heaviest_first = np.argsort(-weights, kind="stable")
    preds, weights = preds[heaviest_first], weights[heaviest_first] / weights.sum()
    behind = np.stack([np.tensordot(weights, preds == pred, 1) for pred in preds])  # the class of each voter
    winner = behind.round(9).argmax(0)  # rounded: 0.1 + 0.2 is a tie with 0.3
    return np.take_along_axis(preds, winner[None], 0)[0].astype(np.uint8)


def last_round(args, exp):
    """({image id: [C, C] pixel counts} by the equal vote, OutOfFold) of out/EXP's last round, or of out/EXP/rR."""
    paths = sorted(exp.glob("r[0-9]/*/*/s*/f*/valid.json")) or sorted(exp.glob("*/*/s*/f*/valid.json"))
    if not paths:
        raise SystemExit(f"{exp}: no run with a valid.json; make score makes them")
    last = paths[-1].parents[4]
    runs = [path.parent for path in paths if path.parents[4] == last]
    oof = OutOfFold(args, runs)
    counts, = vote_counts(oof, np.ones((1, len(oof.names))), np.zeros((1, len(oof.classes))))
    print(f"{last}: {len(runs)} run(s) of {len(oof.names)} member(s), {len(oof.ids)} images")
    return dict(zip(oof.ids, counts, strict=True)), oof


def compare(args):
    """Show what the second experiment gains over the first on the images that both held out."""
    (before, oof), (after, other) = (last_round(args, exp) for exp in args.experiments)
    if (orders := [o.infos[0]["paint"] for o in (oof, other)])[0] != orders[1]:
        raise SystemExit(f"one has the paint order {orders[0]}, the other {orders[1]}: their truths differ")
    shared = [i for i in before if i in after]
    if not shared:
        raise SystemExit("the two have no validation image in common")
    before, after = (np.stack([counts[i] for i in shared]) for counts in (before, after))
    draws = np.random.default_rng(0).integers(len(shared), size=(500, len(shared)))
    drawn = np.stack([class_iou(after[d].sum(0)) - class_iou(before[d].sum(0)) for d in draws])
    v3 = gain(after, before)
    rows = [{"score": "v3", "before": image_miou(before).mean(), "after": image_miou(after).mean(), **v3}]
    old, new = (class_iou(counts.sum(0)) for counts in (before, after))
    for c in np.flatnonzero(before.sum((0, 2))):  # the classes in the truth
        low, high = np.nanpercentile(drawn[:, c], (2.5, 97.5))
        rows.append({"score": f"IoU {oof.classes[c]}", "before": old[c], "after": new[c], "gain": new[c] - old[c],
                     "low": low, "high": high})
    oof.contaminated |= other.contaminated
    show(args, oof, "compare", f"{args.experiments[1]} against {args.experiments[0]}: {len(shared)} images that both "
         "held out, 95% intervals by paired bootstrap", rows)
    verdict = "better" if v3["low"] > 0 else "worse" if v3["high"] < 0 else "no more than chance apart"
    print(f"by v3 {args.experiments[1]} is {verdict}")


# ---- plan -----------------------------------------------------------------------------------------------------------


class Plan:
    """What of an experiment isn't up to date: recorded is what made each artefact, known what would make it now.

    Nothing is read but JSON, folds.csv and index.csv, and of other files what Hashes doesn't remember. todo: {file that
    make knows: [why it is to be made]}; asked: {kind: {file: names}} of what only other code would make otherwise.
    """

    def __init__(self, args):
        self.train, self.infer, self.pseudo = map(import_module, ("train", "infer", "pseudo_label"))
        self.args, self.versions = args, defaultdict(list)
        self.installed = library_versions() if args.why else {}
        self.todo, self.asked, self.memory, self.hashes = {}, defaultdict(dict), {}, Hashes(args.cache)
        self.check_grid()
        self.train_args, infer_args, self.pseudo_args, self.submit_args = self.parse()
        self.tta = self.infer.tta_name(infer_args)
        self.data = self.read_data()
        self.folds = self.read_folds()

    def check_grid(self):
        """Raise SystemExit when a model, scale or fold is given twice, or a number isn't written plainly."""
        a = self.args
        for knob, values in (("MODELS", a.models), ("SCALES", a.scales), ("FOLDS", a.folds)):
            for value in values:
                if values.count(value) > 1:
                    raise SystemExit(f"{knob} has {value} twice")
        for scale in (*a.scales, *a.pick_scales):
            if not re.fullmatch("[1-9][0-9]*", scale):
                raise SystemExit(f"SCALES: {scale} is not a plain number such as 512")
        for model in (*a.models, *a.pick_models):
            if not re.fullmatch(r"[^/]+/[^/]+", model) or ".." in model:
                raise SystemExit(f"MODELS: {model} is not DECODER/ENCODER")
        for script in ("train", "infer", "pseudo", "submit"):
            if {"-h", "--help"} & {*vars(a)[f"{script}_args"].split()}:
                raise SystemExit(f"{script.upper()}_ARGS: for its help run the script itself with --help")
        for fold in (*a.folds, *a.pick_folds):
            if not re.fullmatch("0|[1-9][0-9]*", fold) or int(fold) >= a.nfolds:
                raise SystemExit(f"FOLDS and FOLD go from 0 to {a.nfolds - 1}, as NFOLDS={a.nfolds} says, not {fold}")

    def parse(self):
        """The arguments of the four scripts, as make passes them; raises SystemExit for what they refuse."""
        a = self.args
        common_args = ["--data", str(a.data), "--exp", str(a.exp), "--cache", str(a.cache)]
        scales, models = [*a.scales, *a.pick_scales], [*a.models, *a.pick_models]
        grid = []  # of an option given several times each value is checked and the last one stays
        for model in models:
            grid += ["--model", model]
        for scale in scales:
            grid += ["--scale", scale]
        run = self.train.parse_args([*common_args, *grid, "--fold", a.folds[0], "--folds", str(a.nfolds),
                                     "--paint", a.paint, *a.train_args.split()])
        self.forbid("TRAIN_ARGS", run, data=a.data, exp=a.exp, cache=a.cache, model=models[-1], scale=int(scales[-1]),
                    fold=int(a.folds[0]), folds=a.nfolds, round=0, paint=a.paint, check=False, overfit=0)
        self.train.check_args(run, a.gpus)
        predict = self.infer.parse_args(["--data", str(a.data), "--cache", str(a.cache), "--checkpoint", "model.pt",
                                         *a.infer_args.split()])
        self.forbid("INFER_ARGS", predict, data=a.data, cache=a.cache, checkpoint=[Path("model.pt")], out=None,
                    split=["valid", "test"])
        labels = self.pseudo.parse_args([*common_args, "--round", "1", "--fold", "0", *a.pseudo_args.split(), "x"])
        self.forbid("PSEUDO_ARGS", labels, data=a.data, exp=a.exp, cache=a.cache, round=1, fold=0, stores=[Path("x")])
        out = a.exp / "submission.csv"
        submit = parse_args(["soft", "--data", str(a.data), "--cache", str(a.cache), "--out", str(out),
                             *a.submit_args.split(), "x"])
        self.forbid("SUBMIT_ARGS", submit, data=a.data, cache=a.cache, out=out, runs=[Path("x")])
        given, n_members = submit.weights, len(a.models) * len(a.scales)
        if given not in ("equal", "fit") and len(given) != n_members:
            raise SystemExit(f"VOTE has {len(given)} weights for {n_members} member(s), each a model at a scale")
        return run, predict, labels, submit

    def forbid(self, knob, parsed, **wanted):
        """Raise SystemExit if the knob's text has set what make sets itself."""
        for name, value in wanted.items():
            if vars(parsed)[name] != value:
                raise SystemExit(f"{knob} sets --{name.replace('_', '-')}, which make sets itself or can't use")

    def read_data(self):
        """{"train", "test": fingerprints, "ids", "index" of the cache if these photos have been checked, else None}."""
        paths = data_files(self.args.data)
        folder, found = cache_folder(self.args.cache, paths, self.args.paint, self.hashes), {}
        try:
            index = json.loads((folder / "index.json").read_bytes())
            names, ids = [index[split]["file_names"] for split in ("train", "test")], index["train"]["ids"]
            checked = {split: index[split]["digests"] for split in ("train", "test")}
        except (OSError, ValueError, KeyError, TypeError):
            index, listed = None, [images_in(path) for path in paths]
            names = [[image.get("file_name") for image in images] for images in listed]
            ids = [image.get("id") for image in listed[0]]
        for split, path, listed in zip(("train", "test"), paths, names, strict=True):
            digests = self.hashes.of_all([f"{self.args.data}/{name}" for name in listed])
            found[split] = fingerprint(self.hashes(path), self.args.paint, digests)
            index = index if index and digests == checked[split] else None
        return found | {"ids": ids, "index": index}

    def read_folds(self):
        """folds_hash of folds.csv, or of what will be written there; None if that isn't known yet."""
        path, index = self.args.exp / "folds.csv", self.data["index"]
        if path.exists():
            folds, wrong = read_folds(path, self.data["ids"], self.args.nfolds)
            if not wrong:
                return folds_hash(self.data["ids"], folds.tolist())
        self.todo[path] = [f"it {wrong}" if path.exists() else "it is missing"]
        if not index:
            return None
        present = np.array(index["train"]["pixels"])[:, 1:] > 0
        folds = make_folds(present, index["train"]["groups"], self.args.nfolds)
        return folds_hash(self.data["ids"], folds.tolist())

    def judge(self, kind, path, made, recipe, code, lacks=()):
        """Put an artefact in todo or asked if it isn't up to date; returns whether its content will be another."""
        if made and self.args.why and (changes := version_changes(made, self.installed)):
            self.versions[", ".join(changes)].append(path)
        reasons = list(lacks) or (["it is missing or not whole"] if made is None else recipe_changes(made, recipe))
        names = [] if reasons else code_changes(made, code)
        if names and self.args.code == "keep":
            self.todo[path] = [f"to be kept, though other code made it: {', '.join(names)}"]
        elif names and self.args.code != "new":
            self.asked[kind][path] = names
        elif names:
            reasons = [f"other code: {', '.join(names)}"]
        if reasons:
            self.todo[path] = reasons
        return bool(reasons)

    def folder(self, round_, model, scale, fold):
        return self.args.exp / f"r{round_}" / model / f"s{scale}" / f"f{fold}"

    def once(self, method, *key):
        """method(*key), remembered."""
        if (method.__name__, *key) not in self.memory:
            self.memory[method.__name__, *key] = method(*key)
        return self.memory[method.__name__, *key]

    def run(self, round_, model, scale, fold):
        """What config.json says of a run, or None if it is to be trained."""
        folder = self.folder(round_, model, scale, fold)
        args = argparse.Namespace(**vars(self.train_args) | {
            "model": model, "scale": int(scale), "fold": int(fold), "round": round_})
        lacks, labels = [] if self.folds else ["the folds are not known yet"], ()
        if round_:
            labels = self.once(self.labels, round_, fold)
            lacks += [] if labels else [f"the pseudo labels of round {round_}, fold {fold} are to be made"]
        recipe = self.train.make_recipe(args, self.data["train"], self.folds, self.hashes, *labels or ())
        code, made = self.train.run_code(recipe), read_description(folder / "config.json", self.hashes)
        last = read_description(folder / "last.json", self.hashes) if (folder / "last.pt").exists() else None
        if last and not lacks and (not made or recipe_changes(made, recipe)) and not recipe_changes(last, recipe):
            names = code_changes(last, code)
            if names and self.args.code is None:
                self.asked["begun run(s)"][folder / "last.pt"] = names
        return None if self.judge("model(s)", folder / "model.pt", made, recipe, code, lacks) else made

    def checkpoints(self, made):
        """The hashes of the checkpoints that infer.py gets of a run."""
        names = sorted(made["files"])
        return [made["files"][name] for name in names if (name == "model.pt") != bool(self.train_args.snapshots)]

    def store_recipe(self, made, split):
        data = self.data["train" if split == "valid" else "test"]
        return self.infer.make_recipe(split, self.tta, self.checkpoints(made), data)

    def stores(self, splits, round_, model, scale, fold):
        """{split: description} of a run's stores, or None if one of them is to be made."""
        folder, made = self.folder(round_, model, scale, fold), self.once(self.run, round_, model, scale, fold)
        path, code = folder / "test.json", self.infer.store_code(model, self.tta)
        if made is None:
            self.todo[path] = ["its run is to be trained"]
            return None
        found, again = {split: self.store(folder / f"{split}.json") for split in splits}, False
        for split, store in found.items():
            again |= self.judge("store(s)", path, store, self.store_recipe(made, split), code)
            kept = folder / "model.pt" in self.todo or store and store["run"]["codes"] != code_hashes(made)
            if kept and not again:
                self.todo.setdefault(path, ["it is to say that its run was kept"])
        return None if again else found

    def store(self, path):
        """What a store's JSON says, or None without a .npy of its size, or one that Hashes remembers to be another."""
        try:
            info, npy = json.loads(path.read_bytes()), path.with_suffix(".npy")
            size = len(info["image_ids"]) * len(info["classes"]) * SUBMIT_SIZE ** 2
            whole = os.path.getsize(npy) > size and self.hashes.remembered(npy) in (None, info["files"][npy.name])
            known = info.keys() >= set(self.infer.KEYS) and is_description(info) and self.infer.is_run(info["run"])
            return info if whole and known else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def labels(self, round_, fold):
        """(labels_hash, label_settings, whether they are contaminated) of what a round learns from, None if to be made.

        Their makers' stores may be gone, as long as their models would make the same.
        """
        folder = self.pseudo.pseudo_folder(self.args.exp, round_, fold)
        runs = {key: self.once(self.run, round_ - 1, *key, fold)
                for key in itertools.product(self.args.models, self.args.scales)}
        lacks = [f"{self.folder(round_ - 1, *key, fold)} is to be trained" for key, made in runs.items() if not made]
        makers = [short_hash(self.store_recipe(made, "test")) for made in runs.values() if made]
        args = argparse.Namespace(**vars(self.pseudo_args) | {"round": round_, "fold": int(fold)})
        recipe = self.pseudo.make_recipe(args, self.data["test"], self.folds, self.args.paint, makers)
        made = read_description(folder / "manifest.json", self.hashes) if (folder / "index.csv").exists() else None
        made = None if made and (made["touched"] or "contaminated" not in made) else made
        code = self.pseudo.labels_code((model, self.tta) for model in self.args.models)
        if self.judge("set(s) of pseudo labels", folder / "manifest.json", made, recipe, code, lacks):
            for key in runs:
                self.once(self.stores, ("test",), round_ - 1, *key, fold)
            return None
        return self.pseudo.labels_hash(folder, self.hashes), self.pseudo.label_settings(made), made["contaminated"]

    def submission(self):
        a, out = self.args, self.args.exp / "submission.csv"
        grid = list(itertools.product([a.rounds], a.models, a.scales, a.folds))
        found = {key: self.once(self.stores, ("valid", "test"), *key) for key in grid}
        lacks = [f"{self.folder(*key)} is to be predicted" for key, stores in found.items() if not stores]
        recipe = None if lacks else soft_recipe(
            self.submit_args.weights, self.submit_args.image_id, self.submit_args.coco, self.data["test"],
            self.data["train"], [self.folder(*key) for key in grid], [s["valid"] for s in found.values()],
            [s["test"] for s in found.values()])
        made = read_description(made_file(out), self.hashes)
        self.judge("submission(s)", out, made, recipe, code_of("submission"), lacks)

    def follow(self, goals):
        """Judge all that the goals of make need."""
        a = self.args
        picks = a.pick_models, a.pick_scales, a.pick_folds
        for goal in goals:
            if goal == "train":
                for key in itertools.product([a.round or 0], *picks):
                    self.once(self.run, *key)
            elif goal == "pseudo":
                for fold in a.pick_folds:
                    self.once(self.labels, a.round or 1, fold)
            elif goal == "score":
                for key in itertools.product([a.rounds if a.round is None else a.round], *picks):
                    self.once(self.stores, ("valid",), *key)
            else:
                self.submission()
        if (self.todo or self.asked) and not self.data["index"]:
            self.todo.setdefault(a.exp / "folds.csv", ["the data has changed or hasn't been checked yet"])

    def questions(self):
        """One line for each kind of artefact that other code made, for the user to decide on."""
        for kind, found in self.asked.items():
            names = list(dict.fromkeys(itertools.chain(*found.values())))
            yield code_question(f"{len(found)} {kind} in {self.args.exp} (the first: {next(iter(found))}) were", names,
                                "CODE=new", "CODE=keep", "EXP")

    def reasons(self):
        """A line for each file that isn't up to date."""
        for kind, found in self.asked.items():
            for path, names in found.items():
                yield f"{path}: {kind}, made by other code: {', '.join(names)}; say CODE=new or CODE=keep"
        for path, reasons in self.todo.items():
            yield f"{path}: {'; '.join(reasons)}"
        for change, paths in self.versions.items():
            yield f"note: {len(paths)} file(s) were made with other versions, the first {paths[0]}: {change}"


def images_in(path):
    """The objects in the list images of a COCO file that nobody has checked yet."""
    coco = read_json(path)
    images = coco.get("images") if isinstance(coco, dict) else None
    return [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []


def grid_options():
    """The options by which make describes an experiment."""
    grid = argparse.ArgumentParser(add_help=False)
    grid.add_argument("--exp", type=Path, required=True)
    grid.add_argument("--paint", default="area")
    grid.add_argument("--nfolds", type=number(int, 2, 10), default=5)
    grid.add_argument("--gpus", type=number(int, 1), default=1)
    grid.add_argument("--rounds", type=number(int, 0, 9), default=0)
    grid.add_argument("--round", type=number(int, 0, 9))
    grid.add_argument("--code", choices=("new", "keep"))
    for name in ("models", "scales", "folds"):
        grid.add_argument(f"--{name}", type=str.split, required=True, help="with blanks between them")
        grid.add_argument(f"--pick-{name}", type=str.split, required=True, help="those that this command is about")
    for name in ("train", "infer", "pseudo", "submit"):
        grid.add_argument(f"--{name}-args", default="", help="as make passes them to that script")
    grid.add_argument("--goals", type=str.split, default=["submit"], help="of make")
    grid.add_argument("--why", action="store_true", help="print why, a line for each file")
    grid.add_argument("--ready", action="store_true", help="stop if the runs that vote aren't up to date")
    grid.add_argument("--dry", action="store_true", help="write nothing, not even hashes")
    return grid


def check_encoders(models):
    """Raise SystemExit if timm or segmentation-models-pytorch don't know the encoder of a model DECODER/ENCODER."""
    import segmentation_models_pytorch as smp
    import timm
    for model in models:
        encoder = model.partition("/")[2]
        known = timm.is_model(encoder[3:]) if encoder.startswith("tu-") else encoder in smp.encoders.encoders
        if not known:
            raise SystemExit(f"MODELS: {model}: there is no encoder {encoder}; those of timm begin with tu-")


def plan(args):
    """Print the files that are to be made, or why; raises SystemExit when the user has to decide about other code."""
    gc.disable()  # in half a second of small objects it would take a sixth of the time
    made = Plan(args)
    made.follow(args.goals)
    if args.why:
        print("\n".join([*made.reasons(), *([] if made.todo or made.asked else [f"{args.exp} is up to date"])]))
        return
    if args.ready:
        made.todo.pop(args.exp / "submission.csv", None)
        made.asked.pop("submission(s)", None)
        if lines := list(made.reasons()):
            raise SystemExit(f"{lines[0]}: changed while make ran, as by another make in this EXP; run it again")
        return
    if made.asked:
        raise SystemExit("\n".join(made.questions()))
    to_train = {path.parents[2].relative_to(path.parents[4]) for path in made.todo if path.name == "model.pt"}
    if to_train and not args.dry:  # which takes seconds, but hours would be lost if the last model had no encoder
        check_encoders(sorted(map(str, to_train)))
    if not args.dry:
        made.hashes.save()
    print("\n".join(map(str, made.todo)))


def status(args):
    """Print how far each run is, how long the others will take by the epochs seen so far, and what isn't up to date."""
    import pandas as pd
    args.why = True
    made = Plan(args)
    made.follow(["submit"])
    grid, left, seconds = defaultdict(dict), [], defaultdict(list)
    keys = [*itertools.product(range(args.rounds + 1), args.pick_models, args.pick_scales, args.pick_folds)]
    for key in keys:
        made.once(made.run, *key)
    stale = {*made.todo, *itertools.chain(*made.asked.values())}
    for round_, model, scale, fold in keys:
        run = made.folder(round_, model, scale, fold)
        logs = [path for path in (run / "last.csv", run / "log.csv") if path.exists()]  # last.csv: of one that replaces
        log = read_csv(logs[0], ("seconds",)) if logs else []
        begun, kind = (run / "last.pt").exists(), (model, scale)
        trained = (run / "model.pt").exists() and not (begun and run / "model.pt" in stale)
        seconds[kind] += [float(row["seconds"]) for row in log]
        left.append((kind, 0 if trained else max(0, made.train_args.epochs - len(log))))
        grid[f"r{round_}/{model}/s{scale}"][f"f{fold}"] = (
            "missing" if not trained and not log else f"epoch {len(log)}" if not trained else
            "stale" if run / "model.pt" in stale else "done" if (run / "test.json").exists() else "trained")
    known = {kind: np.median(found) for kind, found in seconds.items() if found}
    print(pd.DataFrame(grid).T.to_string())
    if known:
        left_seconds = sum(n * known.get(kind, np.mean(list(known.values()))) for kind, n in left)
        hours, minutes = divmod(round(left_seconds / 60), 60)
        print(f"{sum(n for _, n in left)} epochs are left: about {hours} h {minutes} min of training, job after job")
    for line in made.reasons():
        print(line)


def main(args):
    if "out" in args and args.out.suffix != ".csv":
        raise SystemExit(f"--out {args.out}: must end in .csv; a .png or .json goes beside it")
    check_outputs(args)
    with lock(args.out.parent, name=f".{args.out.name}.lock") if "out" in args else nullcontext():
        {"soft": soft, "hard": hard, "score": score, "compare": compare, "plan": plan,
         "status": status}[args.command](args)


if __name__ == "__main__":
    run_script(main, parse_args())
