"""Let any number of runs vote on a submission, or score them out of fold.

    python ensemble.py soft --data DATA --weights fit --out out/main/vote.csv out/main/r1/*/*/*/f*
    python ensemble.py hard --data DATA --weights 2,1 --out out/voted.csv mine.csv theirs.csv
    python ensemble.py score --data DATA --weights fit --tables out/main/report out/main/r1/*/*/*/f*
    python ensemble.py evaluate --truth test_labels.json mine.csv theirs.csv
    python ensemble.py compare --data DATA out/main/r0 out/main/r1 out/lr5
    python ensemble.py plan --data DATA --exp out/main GRID     (make asks this)
    python ensemble.py status --data DATA --exp out/main GRID   (make status)
    python ensemble.py holdout --data DATA --share 0.15 --out out/lad/data
    python ensemble.py ladder --data out/lad/data --exp out/lad KNOB=VALUE ...   (make ladder)

A run is a folder of train.py and infer.py; runs that differ only in the fold are one member. soft
averages probabilities, hard counts the votes of submissions and runs. Both write the CSV in
test.json's order, read back and checked before it gets its name, then OUT.made.json, which says
what made it, and soft a .png of some predictions, OUT.oof.npz, the vote's pixel counts out of fold,
and OUT.vote.json, by which infer.py votes on other photos; the same line again does nothing.
--report is a web page of all that is known. A run votes background on a photo that it couldn't
read; then the exit code is 3, though the submission stands.
Whatever is fitted is fitted on some folds, scored on the others, and used only if v3 gains by more
than chance (95%) and v2 doesn't lose so; --metric v2 turns them round. A step of your own after the
vote is one entry in STEPS_AFTER_VOTE of common.py. plan compares what made each file of an
experiment with what would make it now, and prints the files that are to be made; status prints how
far each run is and why a file isn't up to date. GRID: the models, scales and folds, as make passes
them. holdout writes a folder that is a DATA of its own; its test photos are some of DATA's labelled
ones.
"""
import argparse
import csv
import gc
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import nullcontext, redirect_stdout, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from common import (
    ALL, BACKGROUND, DERIVED, DESCRIPTION_KINDS, MANIFEST_KINDS, METRICS, RUN_PLACE,
    STEPS_AFTER_VOTE, STORE_KINDS, SUBMIT_SIZE, TORCHRUN, TRAIN_KNOBS, Hashes, Help, Parser,
    UserError, accepted_code, add_data_options, apply_steps, as_number, atomic_write, batch_counts,
    begun_files, build_model, cache_folder, changes, check_output, check_space, check_unchanged,
    check_unseen, checked, checkpoint_gradients, class_iou, clean, code_hashes, code_of,
    code_question, code_state, confusion, data_files, data_options, decide, different_keys,
    draw_bars, draw_heat, drop_small, extra_json, figure_urls, find_photos, fingerprint, fit_score,
    fold_name, folds_hash, foreground_ids, image_miou, join_fingerprints, keep_code, label_settings,
    labels_code, labels_hash, labels_recipe, layer_factors, library_versions, load_data, load_extra,
    load_truths, load_unlabelled, load_weights, lock, make_folds, move_aside, move_mark, named,
    new_folds, number, open_store, overlay, paint_truth, provenance, pseudo_folder, read_coco,
    read_description, read_folds, read_index_json, read_json, read_own_json, read_probs, read_rows,
    recipe_changes, run_code, run_folder, run_recipe, run_script, scores, settings_of, short_hash,
    store_code, store_id, store_recipe, tile_url, top_class, truth_file, try_asked_sides, try_sides,
    tta_name, tta_views, used_categories, version_changes, vote, weights_file, whole_manifest,
    whole_numbers, write_coco, write_description, write_json, write_page, write_sheet)

HEADER = ["image_id", "PredictionString"]
PAIR = np.uint16(ord("0") + 256 * ord(" "))  # "0 " as one number, the lower byte first: x86 and ARM
MAX_ROW = 64 * SUBMIT_SIZE ** 2  # bytes of a row of a submission: 64 for each id with its blanks
MAX_PICKS = 30  # of the greedy selection of weights
LEAST_WEIGHT = 1e-4  # of the largest: what weighs less is lost where a vote is summed in float32
THUMBNAILS = 128_000_000  # bytes for the small probabilities that weights are fitted on
LEAST_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)  # see drop_small
BUDGET_SHARE = 0.9  # of a budget that is planned: what else runs slows some steps
START_SECONDS = 15  # of a run's scripts, libraries, checks and pictures; of its labels; of the vote
ENOUGH_EPOCHS, MOST_EPOCHS = 15, 40  # by a budget: fewer for another fold lose, more gain nothing
TAKEN = "with what is taken"  # the name of the vote with all that gains out of fold
FEW_IMAGES = 10  # of fewer a bootstrap knows too little: its intervals are too narrow
SIZES = (0, 0.003, 0.01, 0.03, 0.1, 0.3)  # shares of an image where the report's bins begin
NO_GAIN = dict.fromkeys(("gain", "low", "high"), math.nan)  # what gain returns, of the lowest rung
WHERE = {"": "out of fold", "test ": "on the test photos' truth"}  # by the prefix of columns
# above pictures of steps: of compare, and of a ladder
COMPARE_TITLE = "bars: 95% interval of the gain over the step before"
CLIMB_TITLE = ("the lowest rung's score plus each rung's gain over\n"
               "the one that it stands on; bars: 95% interval of that gain")
CONTAMINATED = "CONTAMINATED: pseudo labels' makers have seen these images (--allow-leak)"
# where the recipes of a member's folds may differ
BY_FOLD = ("fold", "pseudo", "contaminated", "stop_epoch")
# what decides no result; see BESIDE in common.py
BESIDE = {
    "TAKEN", "already_made", "as_text", "check_classes", "check_names", "check_one_member",
    "check_store", "describe_params", "difference", "explain", "made_file", "no_formula",
    "oof_file", "pixel_fault", "read_test_truths", "run_name", "sample_pictures", "scratch_folder",
    "show", "show_scores", "show_test", "soft_recipe", "tell_unread", "vote_file", "write_made"}


# ---- the ladder: what make ladder climbs ---------------------------------------------------------


class Rung(NamedTuple):
    """A step of the climb: an experiment EXP/name of make submit."""
    name: str
    # what it changes, {knob: value} of make: a text (of *_ARGS: added to that below), or, of
    # LIST_KNOBS, a number: 2 takes the first two words of what was asked for, -1 the last one
    knobs: dict
    why: str
    aside_in: tuple = ()  # presets in which it is tried, and the rungs above don't stand on it


LIST_KNOBS = ("MODELS", "SCALES", "EPOCHS", "FOLDS", "ROUNDS")
RECIPE_KNOBS = ("EPOCHS", "BATCH", "LR", "SEED", "WEIGHTS", "METRIC", "TRAIN_ARGS")  # of every run
RUNG_KNOBS = (*LIST_KNOBS, "BATCH", "LR", "SEED", "WEIGHTS", "TTA", "VOTE", "METRIC", "POST",
              "SNAPSHOTS", "TRAIN_ARGS", "INFER_ARGS", "PSEUDO_ARGS", "SUBMIT_ARGS")
# options that have a knob of make: as one of *_ARGS they would silently override it
HAVE_A_KNOB = {
    "TRAIN_ARGS": TRAIN_KNOBS,
    "INFER_ARGS": {"--tta": "TTA"},
    "SUBMIT_ARGS": {"--weights": "VOTE", "--metric": "METRIC", "--post": "POST",
                    "--batch": "BATCH", "--image-id": "IMAGE_ID"}}

# LADDER=NAME of make -> knobs where the command line has no others. ROUNDS can't be given there,
# since rungs set it: pseudo-all takes the last number
LADDER_KNOBS = {
    "full": {"SCALES": "384 512", "EPOCHS": "20 40", "ROUNDS": "0 2"},
    "fast": {"SCALES": "128 256", "EPOCHS": "6 20", "ROUNDS": "0", "FOLDS": "0 1"}}
# the cheapest first: an epoch of fpn takes 1.6 to 1.9 times as long; one encoder: WEIGHTS may be a
# file
LADDER_MODELS = ("efficientdet/tu-tf_efficientnet_lite0 fpn/tu-tf_efficientnet_lite0 "
                 "unet/tu-tf_efficientnet_lite0")
ALL_PRESETS = tuple(LADDER_KNOBS)

# From the bottom to the top: ideas are tried at the first of SCALES and EPOCHS, the climb ends at
# the last. Edit it as you like: each rung is whatever make submit can do. In fast, what costs more
# than it gains in the time of more epochs is aside; see tests/RECORDS.md.
LADDER = (
    Rung("baseline", {
        "MODELS": 1, "SCALES": 1, "EPOCHS": 1, "FOLDS": 1, "ROUNDS": "0", "TTA": "none",
        "VOTE": "equal", "POST": "none", "LR": "5e-4",
        "TRAIN_ARGS": "--loss ce --schedule constant --warmup 0 --ema 0 --encoder-lr 1 "
                      "--augment none"},
        "cross-entropy, one model on one fold, as public baselines start"),
    Rung("iou-ce", {"TRAIN_ARGS": "--loss iou_ce"}, "0.4 IoU + 0.6 cross-entropy"),
    Rung("schedule", {
        "LR": "4e-3", "TRAIN_ARGS": "--schedule cosine --warmup 0.05 --ema 0.998 --encoder-lr 0.5"},
        "warm-up, a high peak, cosine, averaged weights"),
    Rung("augment", {"TRAIN_ARGS": "--augment basic"}, "random crops, flips and turns"),
    Rung("classmix", {"TRAIN_ARGS": "--classmix plain"},
         "half an image's classes pasted on another", aside_in=ALL_PRESETS),
    Rung("classmix-rare", {"TRAIN_ARGS": "--classmix weighted"},
         "the same, rather rare classes", aside_in=ALL_PRESETS),
    Rung("flip", {"TTA": "flip"}, "prediction averaged with the mirrored photo's"),
    Rung("turns", {"TTA": "flip_rot"}, "and with those of quarter turns"),
    Rung("folds", {"FOLDS": 10}, "a model of each fold: only test photos can show it"),
    Rung("pseudo-1", {"ROUNDS": "1"}, "trained again with pseudo labels of the vote below",
         aside_in=ALL_PRESETS),
    Rung("pseudo-2", {"ROUNDS": "2"}, "two rounds of pseudo labels", aside_in=ALL_PRESETS),
    Rung("models-2", {"MODELS": 2}, "a second architecture votes", aside_in=("fast",)),
    Rung("models-3", {"MODELS": 3}, "three architectures vote", aside_in=("fast",)),
    Rung("full-size", {"SCALES": -1, "EPOCHS": -1}, "larger photos, more epochs than in a trial"),
    Rung("scales", {"SCALES": 10}, "the smaller scale votes too", aside_in=("fast",)),
    Rung("pseudo-all", {"ROUNDS": -1}, "all trained again with pseudo labels"),
    Rung("fitted", {"VOTE": "fit", "POST": "fit"},
         "weights and steps after the vote, those that gain"))

# ---- options -------------------------------------------------------------------------------------


def parse_args(argv=None):
    options = shared_options()
    parser = Parser(prog="ensemble.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, groups, text in (
            ("soft", "data runs mixed scored tables truth out",
             "average the probabilities of runs"),
            ("hard", "data voted runs out", "count the votes of submissions and runs"),
            ("score", "data runs mixed scored tables truth",
             "print out-of-fold scores, and those on the truth of the test photos"),
            ("evaluate", "csvs tables", "score submissions from anywhere on a truth"),
            ("compare", "data mixed tables truth steps", "say what experiments gain"),
            ("rungs", "data climb rung truth", "print the rungs of a ladder, each as make's knobs"),
            ("holdout", "data held", "hold labelled photos out as a test set with annotations"),
            ("ladder", "data climb rung truth", "say what each rung of a ladder is worth"),
            ("budget", "data grid spend", "print the epochs and folds that fit into a time"),
            ("plan", "data grid", "print what of an experiment is to be made"),
            ("status", "data grid",
             "say how far the runs are, and why what is not up to date isn't")):
        commands.add_parser(name, parents=[options[group] for group in groups.split()],
                            allow_abbrev=False, formatter_class=Help, help=text)
    return parser.parse_args(argv)


def shared_options():
    """Return {group: a parser of options that several commands share}."""
    names = ("data", "voted", "runs", "mixed", "scored", "tables", "out", "steps", "climb", "rung",
             "truth", "held", "grid", "spend", "csvs")
    groups = {name: argparse.ArgumentParser(add_help=False) for name in names}
    (data, voted, runs, mixed, scored, tables, out, steps, climb, rung, truth, held, grid, spend,
     csvs) = groups.values()
    data.add_argument("--data", type=Path, required=True, help="the competition's folder")
    data.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks")
    add_data_options(voted.add_argument_group("how DATA is read, if no voter is a run"))
    runs.add_argument("runs", type=Path, nargs="+",
                      help="run folders with stores of infer.py; hard: or CSVs")
    runs.add_argument("--weights", type=vote_weights, default="equal", metavar="equal|fit|W,W,...",
                      help="of the members, or for hard of the voters; fit: by greedy selection, "
                      "not for hard")
    mixed.add_argument("--mixed", action="store_true",
                       help="let folds of different recipes or code be one member")
    add_scored(scored)
    tables.add_argument("--tables", type=Path, help="folder for the printed tables as CSV")
    out.add_argument("--out", type=Path, required=True, help="the submission to write")
    out.add_argument("--image-id", choices=("id", "file_name"), default="id",
                     help="what names an image in the submission; some upload pages want file_name")
    out.add_argument("--coco", action="store_true",
                     help="also write the masks as COCO JSON beside the submission")
    out.set_defaults(decides=["weights", "image_id", "coco"])
    out.add_argument("--code", choices=("new", "keep"), help="where other code has made the "
                     "submission: make it anew, or keep it as it is")
    steps.add_argument("experiments", type=Path, nargs="+",
                       help="two or more: out/EXP for its last round, or out/EXP/rR")
    steps.add_argument("--picture", type=Path, help="the scores as a staircase, a PNG to write")
    truth.add_argument("--truth", type=Path,
                       help="COCO file with the objects of the test photos; else test.json's")
    add_ladder(climb, rung)
    held.add_argument("--share", type=number(float, 0.05, 0.5), required=True,
                      help="of the labelled photos to hold out; 1/2, 1/3, ... 1/20 can be had")
    held.add_argument("--out", type=Path, required=True, dest="folder",
                      help="the folder to write, a DATA of its own")
    add_data_options(held)
    add_csvs(csvs)
    add_grid(grid)
    add_budget(spend)
    return groups


def add_scored(scored):
    """Add the options by which a vote is fitted and scored."""
    scored.add_argument("--report", type=Path,
                        help="a web page with the tables, figures and the worst images to write")
    scored.add_argument("--batch", type=number(int, 1), default=8, help="images in a batch of v1")
    scored.add_argument("--metric", choices=METRICS, default="v3",
                        help="the score in which what is fitted must gain; v2 must not lose, or v3 "
                        "if that is it")
    scored.add_argument("--post", type=checked(post_names), default="fit",
                        metavar="fit|none|NAME,NAME",
                        help="what may follow the vote, if it gains: least-share and the steps "
                        f"{', '.join(name.replace(' ', '-') for name, *_ in STEPS_AFTER_VOTE)}")


def post_names(text):
    """Return the names in --post of what may follow the vote, in the order in which it is done.

    Blanks of a name are written as "-". Raises UserError for a name that there is not.
    """
    names = {name.replace(" ", "-"): name
             for name in ("least share", *(step for step, *_ in STEPS_AFTER_VOTE))}
    if text in ("fit", "none"):
        return list(names.values()) if text == "fit" else []
    if unknown := set(text.split(",")) - names.keys():
        raise UserError(f"there is no {min(unknown) or 'name'} in fit, none, {', '.join(names)}")
    return [name for key, name in names.items() if key in text.split(",")]


def add_csvs(csvs):
    """Add the submissions that `evaluate` scores, and what it needs for that."""
    csvs.add_argument("submissions", type=Path, nargs="+", metavar="CSV",
                      help="each is compared with the first")
    csvs.add_argument("--truth", type=Path, required=True,
                      help="COCO file with the objects of the photos; no other file is needed")
    csvs.add_argument("--image-id", choices=("id", "file_name"), default="id",
                      help="what names an image in the submissions")
    csvs.add_argument("--batch", type=number(int, 1), default=8, help="images in a batch of v1")
    add_data_options(csvs, ("paint", "unused"))


def add_ladder(climb, rung):
    """Add the options of the rungs, and those by which `ladder` scores them."""
    climb.add_argument("--preset", choices=LADDER_KNOBS, default="full", help="see LADDER_KNOBS")
    climb.add_argument("knobs", type=knob, nargs="*", metavar="KNOB=VALUE",
                       help="of make's command line")
    rung.add_argument("--exp", type=Path, required=True, help="each rung is EXP/NAME")
    rung.add_argument("--batch", type=number(int, 1), default=8, help="images in a batch of v1")
    rung.add_argument("--image-id", choices=("id", "file_name"), default="id",
                      help="what names an image in the submissions")
    add_data_options(rung)


def add_budget(spend):
    """Add the options of a budget besides the grid that it is for."""
    spend.add_argument("--budget", type=duration, required=True, help="40m, 1h30m or 90s")
    spend.add_argument("--keep-folds", action="store_true", help="use all --folds")
    spend.add_argument("--device", default="auto", help="as of train.py")


def duration(text):
    """Return the seconds of "1h30m", "40m" or "90s"; an argparse type."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    seconds = sum(int(n or 0) * unit for n, unit in zip(parts.groups(), (3600, 60, 1), strict=True)
                  ) if parts else 0
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text}: no time such as 40m, 1h30m or 90s")
    return seconds


def knob(text):
    """Return (name, value) of a knob as make's command line has it; an argparse type."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text}: not KNOB=VALUE")
    return name, value


def add_grid(grid):
    """Add the options by which make describes an experiment."""
    grid.add_argument("--exp", type=Path, required=True)
    add_data_options(grid)
    grid.add_argument("--extra", nargs="*", default=[], help="as of train.py")
    grid.add_argument("--unlabelled", help="as of train.py")
    grid.add_argument("--nfolds", type=number(int, 2, 10), default=5)
    grid.add_argument("--gpus", type=number(int, 1), default=1)
    grid.add_argument("--rounds", type=number(int, 0, 9), default=0)
    grid.add_argument("--round", type=number(int, 0, 9))
    grid.add_argument("--code", choices=("new", "keep"))
    for name in ("models", "scales", "folds"):
        grid.add_argument(f"--{name}", type=str.split, required=True, help="with blanks between")
        grid.add_argument(f"--pick-{name}", type=str.split, required=True,
                          help="those that this command is about")
    for name in ("train", "infer", "pseudo", "submit"):
        grid.add_argument(f"--{name}-args", default="", help="as make passes them to that script")
    grid.add_argument("--goals", type=str.split, default=["submit"], help="of make")
    grid.add_argument("--why", action="store_true", help="print why, a line for each file")
    grid.add_argument("--ready", action="store_true",
                      help="stop if the runs that vote aren't up to date")
    grid.add_argument("--dry", action="store_true", help="write nothing, not even hashes")


def vote_weights(text):
    """Return "equal", "fit" or a list of numbers; an argparse type."""
    if text in ("equal", "fit"):
        return text
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = [math.nan]
    largest = max(weights)
    in_range = all(weight == 0 or LEAST_WEIGHT * largest <= weight for weight in weights)
    if not all(map(math.isfinite, weights)) or not in_range or largest <= 0:
        raise argparse.ArgumentTypeError(
            f"{text}: weights are numbers from 0, not all 0, none of them below {LEAST_WEIGHT:g} "
            "of the largest, with commas between them")
    return weights


# ---- members -------------------------------------------------------------------------------------


def open_members(args, runs, split, hashes):
    """Open the stores of runs, and group into one member those that differ only in the fold.

    Returns ({member's name: {fold: (probs, info)}}, the info of each run, the folder that they
    share); info is the JSON of a store. Raises UserError if the runs don't fit together.
    """
    members = defaultdict(dict)
    infos = []
    for run in runs:
        path = run / f"{split}.json"
        probs, info = open_store(path, hashes)
        infos.append(info)
        check_store(path, info, runs[0], infos[0])
        folds = members[os.path.abspath(run.parent), info["tta"]]
        if info["fold"] in folds:
            raise UserError(f"{run}: given twice, or another of its member has fold {info['fold']} "
                            "too")
        if folds and not args.mixed:
            first_probs, first_info = next(iter(folds.values()))
            check_one_member(path, info, first_probs.filename, first_info)
        folds[info["fold"]] = probs, info
    shared = os.path.commonpath([os.path.dirname(folder) for folder, _ in members])
    by_name = {f"{os.path.relpath(folder, shared)} {tta}": folds
               for (folder, tta), folds in members.items()}
    return by_name, infos, shared


def check_store(path, info, first_run, first_info):
    """Raise UserError if a store has other classes, data or folds than that of the first run."""
    check_classes(info["classes"], first_info["classes"], path, first_run)
    for key in ("paint", "folds_csv", "data"):
        if info[key] != first_info[key]:
            raise UserError(f"{path} has another {key} than {first_run}, {info[key]} and not "
                            f"{first_info[key]}: made on other data or folds, they can't vote "
                            "together; run infer.py on both again")


def check_one_member(path, info, other_path, other_info):
    """Raise UserError if two folds of a member differ in recipe, or in code that nobody kept."""
    run, other_run = info["run"], other_info["run"]
    may_differ = {*BY_FOLD, *DERIVED}
    keys = different_keys(run["recipe"], other_run["recipe"])
    differ = [key for key in keys if key not in may_differ]
    code_names = []
    if not {*run["codes"]} & {*other_run["codes"]}:
        code_names += different_keys(run["code"], other_run["code"])
    if not {*code_hashes(info)} & {*code_hashes(other_info)}:
        code_names += different_keys(accepted_code(info), accepted_code(other_info))
    differ += [f"the code of {name}" for name in code_names]
    if differ:
        raise UserError(f"{path} and {other_path} are folds of one member, but differ in "
                        f"{', '.join(differ[:6])}: make one of them anew, or let them vote as one "
                        "with --mixed")


def check_classes(classes, expected, path, other):
    """Raise UserError unless `path` has the same classes in the same order as `other`."""
    if classes != expected:
        text = difference(classes, expected) or "orders them so"
        raise UserError(f"{path} has other classes than {other}: it {text}: "
                        f"{clean(', '.join(classes))}")


def difference(values, expected):
    """Return in a few words what tells two lists apart; "" if they have the same items."""
    lacking, added = set(expected) - set(values), set(values) - set(expected)
    parts = []
    for text, items in (("lacks", lacking), ("also has", added)):
        if items:
            some = ", ".join(map(str, sorted(items)[:3]))
            parts.append(f"{text} {len(items)}: {some}")
    return "; ".join(parts)


def order_of(image_ids, wanted, path):
    """Return the positions in `image_ids` of those in `wanted`.

    Raises UserError naming `path` when they aren't the same images.
    """
    if text := difference(image_ids, wanted):
        raise UserError(f"{path} is of other images: it {text}; run infer.py again")
    position = {image_id: i for i, image_id in enumerate(image_ids)}
    return [position[i] for i in wanted]


def member_weights(args, voters):
    """Return the weights [M] of the voters, given or equal."""
    if args.weights in ("equal", "fit"):
        return np.ones(len(voters))
    if len(args.weights) != len(voters):
        raise UserError(f"{len(args.weights)} weights for {len(voters)} voters: "
                        f"{', '.join(map(str, voters))}")
    return np.array(args.weights) / max(args.weights)  # as they are float32 may not hold them


# ---- the majority --------------------------------------------------------------------------------


def majority(preds, weights):
    """Return the class uint8 [H, W] with the largest sum of weights [M] among votes [M, H, W].

    Ties go to the class of the heaviest voter in them, of equally heavy ones to the first.
    """
    heaviest_first = np.argsort(-weights, kind="stable")
    preds, weights = preds[heaviest_first], weights[heaviest_first] / weights.sum()
    support = np.stack([np.tensordot(weights, preds == pred, 1) for pred in preds])  # [M, H, W]
    winner = support.round(9).argmax(0)  # rounded: 0.1 + 0.2 is a tie with 0.3
    return np.take_along_axis(preds, winner[None], 0)[0].astype(np.uint8)


# ---- out of fold ---------------------------------------------------------------------------------


class OutOfFold:
    """The validation images of all members, in train's order, with their truth and predictions.

    runs: those given that hold images out; store_infos: of each of them; info_of_run: of each run
    given, None of one on all images; names, infos: of the M members; ids, indices (in the Split
    train) and
    truths uint8 [N, H, W] of the N images; parts [N], from 0: the images with one number are held
    out together when something is fitted; tables, used: what was shown, for the report.
    """

    def __init__(self, args, runs):
        self.runs = [run for run in runs if not is_of_all(run)]
        if not self.runs:
            raise UserError(f"{runs[0]} has learnt from all images, so nothing of it is out of "
                            "fold: give the runs of the folds too")
        members, self.store_infos, shared = open_members(args, self.runs, "valid",
                                                         Hashes(args.cache))
        of_run = dict(zip(self.runs, self.store_infos, strict=True))
        self.info_of_run = [of_run.get(run) for run in runs]
        self.names, self.cache = list(members), args.cache
        self.infos = [next(iter(folds.values()))[1] for folds in members.values()]
        self.contaminated = any(info["contaminated"] for info in self.store_infos)
        self.train, self.test = load_data(args.data, args.cache, **data_options(self.infos[0]))
        self.classes = self.train.classes
        check_classes(self.infos[0]["classes"], self.classes, runs[0], args.data)
        if self.infos[0]["data"] != self.train.fingerprint:
            raise UserError(f"{runs[0]}/valid.json was made on other data than is in {args.data} "
                            "now: give the DATA that it was made on, or run train.py and infer.py "
                            "again")
        fold_of, self.places = find_images(members)
        if absent := fold_of.keys() - set(self.train.ids):
            raise UserError(f"DATA has no image {min(absent)}, which a validation store has: run "
                            "train.py again")
        self.indices = [i for i, image_id in enumerate(self.train.ids) if image_id in fold_of]
        self.ids = [self.train.ids[i] for i in self.indices]
        self.truths = np.stack([self.train.truth(i) for i in self.indices])
        folds = [fold_of[image_id] for image_id in self.ids]
        self.parts, self.part_names = split_parts(self.train, self.indices, folds)
        self.title = (f"out of fold: {len(self.ids)} of {len(self.train.ids)} training images, "
                      f"runs in {shared}")
        if len(self.runs) < len(runs):
            self.title += (f"; {len(runs) - len(self.runs)} run(s) on all images vote on test "
                           "photos as one fold more of their member, whose score is the folds'")
        self.tables, self.used = [], {}

    def probs(self, n):
        """Return {member's number: uint8 [C, H, W]} of image n, by models that held it out."""
        return {m: read_probs(*place) for m, place in self.places[self.ids[n]].items()}


def is_of_all(run):
    """Return whether a run's folder is that of a run on all images."""
    return Path(run).name == f"f{ALL}"


def find_images(members):
    """Return ({image id: fold}, {image id: {member's number: (probs, position there)}})."""
    fold_of = {}
    places = defaultdict(dict)
    for m, folds in enumerate(members.values()):
        for fold, (probs, info) in folds.items():
            ids = info["image_ids"]
            others = [i for i, other_fold in fold_of.items() if other_fold == fold]
            order_of(ids, others or ids, probs.filename)  # all members have the same images in it
            for position, image_id in enumerate(ids):
                fold_of[image_id] = fold
                places[image_id][m] = probs, position
    return fold_of, places


def split_parts(train, indices, folds):
    """Return (part of each image, [N] from 0, names of the parts): the folds.

    Where all images are of one fold, parts of it that keep groups whole take the place of folds.
    """
    kind = "fold"
    if len(set(folds)) == 1:
        kind = "part"
        groups = [train.groups[i] for i in indices]
        present = np.array(train.pixels)[indices, 1:] > 0
        folds = make_folds(present, groups, min(5, len(set(groups))))
    names, parts = np.unique(folds, return_inverse=True)
    return parts, [f"{kind} {name}" for name in names]


def survey(oof):
    """Read all members once; return (counts, thumbnails, truths of these, disagreement).

    Pixel counts int32 [M, N, C, C], 0 where a member hasn't predicted an image; of every so many
    pixels probabilities uint8 [M, N, C, P] and truths [N, P]; the share of pixels on which two
    members differ, [M, M], NaN where they share no image.
    """
    n_members, n_images, n_classes = len(oof.names), len(oof.ids), len(oof.classes)
    pixels = thumbnail_pixels(n_members, n_images, n_classes)
    truths = oof.truths[pixels].reshape(n_images, -1).astype(int)
    thumbs = np.zeros((n_members, n_images, n_classes, truths.shape[1]), np.uint8)
    counts = np.zeros((n_members, n_images, n_classes, n_classes), np.int32)
    differing, n_both = np.zeros((2, n_members, n_members))
    for n, truth in enumerate(tqdm(oof.truths, "members", disable=None)):
        images = oof.probs(n)
        preds = {m: top_class(image) for m, image in images.items()}
        for m, pred in preds.items():
            counts[m, n] = confusion(pred, truth, n_classes)
            thumbs[m, n] = images[m][pixels].reshape(n_classes, -1)
        for a, b in itertools.combinations_with_replacement(preds, 2):
            differing[[a, b], [b, a]] += (preds[a] != preds[b]).mean()
            n_both[[a, b], [b, a]] += 1
    unknown = np.full_like(n_both, np.nan)
    return counts, thumbs, truths, np.divide(differing, n_both, unknown, where=n_both > 0)


def thumbnail_pixels(n_members, n_images, n_classes):
    """Return the index [..., rows, columns] of as many pixels as THUMBNAILS has room for."""
    n_copies = n_members + 8  # 8 for two sums of them in float32
    room = THUMBNAILS / (n_images * n_classes * n_copies)  # pixels of an image
    step = next((s for s in (4, 8, 16, 32) if (SUBMIT_SIZE // s) ** 2 <= room), 64)
    return np.s_[..., step // 2::step, step // 2::step]


def distinct_votes(weights, least_shares):
    """Return (the votes that differ [V, M + 1], which of them each is [K]).

    Each is cast once.
    """
    columns = np.column_stack([weights, least_shares])
    return np.unique(columns, axis=0, return_inverse=True)


def cast_votes(oof, votes):
    """Yield, for each image in turn, the masks uint8 [V, H, W] of votes [V, M + 1]."""
    for n in tqdm(range(len(oof.ids)), "votes", disable=None):
        images = oof.probs(n)
        yield np.stack([vote(images, row[:-1], len(oof.classes), row[-1]) for row in votes])


def equal_vote_counts(oof, weights):
    """Return int32 [K, N, C, C] pixel counts of K votes of weights [K, M], nothing else fitted."""
    n_classes = len(oof.classes)
    votes, vote_of = distinct_votes(weights, np.zeros(len(weights)))
    counts = np.zeros((len(votes), len(oof.ids), n_classes, n_classes), np.int32)
    for n, preds in enumerate(cast_votes(oof, votes)):
        counts[:, n] = [confusion(pred, oof.truths[n], n_classes) for pred in preds]
    return counts[vote_of]


def keep_votes(oof, weights, least_shares):
    """Return (masks uint8 [N, V, H, W] of the votes that differ, which of them each is [K]).

    The masks are in a file of the cache, not in memory; it has no name and ends with the process.
    It takes 64 KiB for each image and vote: 1 GB for 2,617 images and the 6 votes of 5 folds.
    """
    votes, vote_of = distinct_votes(weights, least_shares)
    shape = (len(oof.ids), len(votes), SUBMIT_SIZE, SUBMIT_SIZE)
    folder = scratch_folder(oof.cache)
    check_space(folder, math.prod(shape))
    with tempfile.TemporaryFile(dir=folder) as f:
        for preds in cast_votes(oof, votes):
            f.write(preds)
        f.flush()
        return np.memmap(f, np.uint8, "r", shape=shape), vote_of


def scratch_folder(cache):
    """Return the cache, or the folder for temporary files if the cache can't be written."""
    return cache if os.access(cache, os.W_OK | os.X_OK) else tempfile.gettempdir()


# ---- what is fitted: weights and the least share -------------------------------------------------


def score_of(probs, truths, measure=fit_score):
    """Return measure(pixel counts) of [N, C, P] probabilities, or whatever has the same argmax."""
    return measure(count_pixels(probs.argmax(1), truths, probs.shape[1]))


def count_pixels(preds, truths, n_classes):
    """Return pixel counts [N, C, C] of class ids [N, P], none of which is IGNORE_INDEX."""
    firsts = np.arange(len(preds))[:, None] * n_classes
    codes = (firsts + truths) * n_classes + preds
    counts = np.bincount(codes.ravel(), minlength=len(preds) * n_classes ** 2)
    return counts.reshape(len(preds), n_classes, n_classes)


def fit_weights(thumbs, truths, measure=fit_score):
    """Return weights [M] by greedy selection with replacement (Caruana et al. 2004).

    thumbs [M, N, C, P]: the members' probabilities; truths [N, P]; measure: what the selection is
    to raise, of pixel counts [N, C, C].
    """
    picks = np.zeros(len(thumbs))
    total = np.float32(0)
    best = -1.0
    while picks.sum() < MAX_PICKS:
        tries = [score_of(total + thumb, truths, measure) for thumb in thumbs]
        if max(tries) <= best:
            break
        best = max(tries)
        pick = int(np.argmax(tries))
        picks[pick] += 1
        total = total + thumbs[pick]
    return picks / picks.sum()


def fit_least_share(total, truths, measure=fit_score):
    """Return the least share, of drop_small, that gains most on votes [N, C, P]."""
    def measured(least_share):
        dropped = [drop_small(values, pred, least_share)
                   for values, pred in zip(total, preds, strict=True)]
        return measure(count_pixels(np.stack(dropped), truths, total.shape[1]))
    preds = np.stack([top_class(values) for values in total])
    return max((0, *LEAST_SHARES), key=measured)


def weighted_sum(weights, thumbs):
    """Return the sum float32 [N, C, P] of thumbs [M, N, C, P] times weights [M]."""
    return sum(np.float32(w) * thumb for w, thumb in zip(weights, thumbs, strict=True) if w)


# ---- what is fitted: the choice ------------------------------------------------------------------


class Option:
    """Parameters of a vote, fitted K times: without each part in turn, and on all images.

    fitted: {"weights": [K arrays [M]], "least share": [K numbers], name of a step: [K params]};
    fit k hasn't seen part k, the last has seen all images. votes: of keep_votes, shared by the
    options that differ only in steps after the vote.
    """

    def __init__(self, oof, fitted, votes=None):
        self.oof, self.fitted = oof, fitted
        self.votes = votes or keep_votes(oof, fitted["weights"], fitted["least share"])

    def used(self, k=-1):
        """Return what fit k found, {name: params}, as in `fitted`."""
        return {name: values[k] for name, values in self.fitted.items()}

    def pred(self, n, k):
        """Return the mask uint8 [H, W] of image n by fit k."""
        masks, vote_of = self.votes
        return apply_steps(np.array(masks[n, vote_of[k]]), self.used(k))

    @cached_property
    def counts(self):
        """Return [N, C, C] pixel counts of every image by the fit that hasn't seen it."""
        n_classes = len(self.oof.classes)
        return np.stack([confusion(self.pred(n, part), self.oof.truths[n], n_classes)
                         for n, part in enumerate(self.oof.parts)])

    def with_least_share(self, thumbs, truths, measure):
        """Return this option with a least share, fitted on votes of small images."""
        shares = []
        for k, seen in enumerate(images_to_fit(self.oof)):
            total = weighted_sum(self.fitted["weights"][k], thumbs[:, seen])
            shares.append(fit_least_share(total, truths[seen], measure))
        return Option(self.oof, self.fitted | {"least share": shares})

    def with_step(self, name, fit, measure):
        """Return this option with a step more after the vote, fitted on what it predicts."""
        params = []
        for k, seen in enumerate(images_to_fit(self.oof)):
            preds = np.stack([self.pred(n, k) for n in np.flatnonzero(seen)])
            params.append(fit(preds, self.oof.truths[seen], len(self.oof.classes), measure))
        return Option(self.oof, self.fitted | {name: params}, self.votes)


def images_to_fit(oof):
    """Return K masks [N] of the images that each fit sees: all but one part, and at last all."""
    return [oof.parts != part for part in np.unique(oof.parts)] + [oof.parts >= 0]


def choose(args, oof, thumbs, truths, weights):
    """Return (what is to be used, counts [N, C, C] by name, rows of what was tried).

    What is used is as Option.used returns it. For each part all of it is fitted on the other parts,
    one on top of the other, and scored on that part; the test photos get what was fitted on all
    images. First fitted weights compete with those given. Then least share and the steps after the
    vote compete, alone and together: the first that gains would often spoil a larger gain of the
    next.
    """
    fits = images_to_fit(oof)
    taken = Option(oof, {"weights": [weights] * len(fits), "least share": [0] * len(fits)})
    name = f"soft vote, {'given' if np.ptp(weights) else 'equal'} weights"
    counts = {name: taken.counts}
    tried = []
    measure = partial(fit_score, metric=args.metric, batch=args.batch)
    if len(fits) > 2:  # one group of photos has no other part to be fitted on
        if args.weights == "fit" and len(oof.names) > 1:
            fitted = [fit_weights(thumbs[:, seen], truths[seen], measure) for seen in fits]
            option = Option(oof, taken.fitted | {"weights": fitted})
            taken = take_best({"fitted weights": option}, taken, args, tried)
        options = combine_steps(taken, thumbs, truths, post_names(args.post), measure)
        taken = take_best(options, taken, args, tried)
    counts[TAKEN] = taken.counts
    counts["all background"] = np.zeros_like(taken.counts)
    counts["all background"][:, :, 0] = counts[name].sum(2)
    return taken.used(), counts, tried


def take_best(options, before, args, tried):
    """Return the option that is to be taken in place of `before`, or `before` if none is.

    Those count that gain in args.metric by more than chance and don't lose in v2 by more than
    chance, or in v3 if v2 is the metric. Of them the first is taken that the best isn't better than
    by more than chance: the best of many has been lucky. options: {name: Option}, the simplest
    first; a row of each goes into `tried`.
    """
    metric, other = args.metric, "v3" if args.metric == "v2" else "v2"
    rows, sure = {}, []
    for name, option in options.items():
        gains = {m: gain(option.counts, before.counts, m, args.batch) for m in (metric, other)}
        rows[name] = {f"{m} {key}": value for m in gains for key, value in gains[m].items()}
        if gains[metric]["low"] > 0 and gains[other]["high"] >= 0:
            sure.append(name)
    taken = best = max(sure, key=lambda name: rows[name][f"{metric} gain"], default=None)
    for name in sure:
        if gain(options[best].counts, options[name].counts, metric, args.batch)["low"] <= 0:
            taken = name
            break
    for name, row in rows.items():
        tried.append({"tried": name, **row, "taken": "yes" if name == taken else "no"})
    return options.get(taken, before)


def combine_steps(before, thumbs, truths, allowed, measure):
    """Return {"A + B": Option} of least share and steps after the vote, all combinations.

    Each is fitted on what those before it in the combination predict. allowed: of post_names.
    """
    fits = {name: fit for name, fit, _ in STEPS_AFTER_VOTE}
    options = {(): before}
    for size in range(1, len(allowed) + 1):
        for names in itertools.combinations(allowed, size):
            option, last = options[names[:-1]], names[-1]
            if last in fits:
                options[names] = option.with_step(last, fits[last], measure)
            else:
                options[names] = option.with_least_share(thumbs, truths, measure)
    del options[()]
    return {" + ".join(names): option for names, option in options.items()}


def bootstrap_interval(values, n_draws=2000):
    """Return the 95% interval of the mean of [N] values of images, drawn with replacement."""
    draws = np.random.default_rng(0).integers(len(values), size=(n_draws, len(values)))
    return np.percentile(values[draws].mean(1), (2.5, 97.5))


def gain(after, before, metric="v3", batch=8):
    """Return the gain in a metric and its paired 95% interval: the same images drawn in both.

    after, before: pixel counts [N, C, C] of the same images. The interval is NaN if they are fewer
    than FEW_IMAGES. Of v1 batches of `batch` images take the place of images.
    """
    if metric == "v1":
        after, before = (batch_counts(counts, batch) for counts in (after, before))
    if metric != "v2":
        gains = image_miou(after) - image_miou(before)
        gained, (low, high) = gains.mean(), bootstrap_interval(gains)
    else:
        gains = image_miou(drawn_counts(after, 1000)) - image_miou(drawn_counts(before, 1000))
        gained, (low, high) = gains[0], np.percentile(gains[1:], (2.5, 97.5))
    if len(after) < FEW_IMAGES:
        low = high = math.nan
    return {"gain": gained, "low": low, "high": high}


def drawn_counts(counts, n_draws):
    """Return sums [1 + n_draws, C, C] of pixel counts [N, C, C]: of all images, then of draws."""
    n_images, n_classes, _ = counts.shape
    draws = np.random.default_rng(0).integers(n_images, size=(n_draws, n_images))
    times = [np.bincount(draw, minlength=n_images) for draw in draws]  # that each image was drawn
    summed = np.vstack([np.ones(n_images), *times]) @ counts.reshape(n_images, -1)
    return summed.reshape(-1, n_classes, n_classes)


# ---- tables --------------------------------------------------------------------------------------


def show(args, oof, name, title, cells, text=None):
    """Print, keep and write a table; cells: a list of its rows or a dict of its columns.

    text: printed in place of the table.
    """
    import pandas as pd
    table = pd.DataFrame(cells)
    oof.tables.append((title, table))
    if oof.contaminated:
        table["contaminated"] = "yes"
        title = f"{CONTAMINATED}\n{title}"
    print(f"\n{title}\n{text or as_text(table)}")
    if args.tables:
        write_table(args.tables / f"{name}.csv", table)


def write_table(path, table):
    """Write a DataFrame as a CSV that a spreadsheet opens without harm."""
    with atomic_write(path) as scratch:
        table.map(no_formula).to_csv(scratch, index=False)


def as_text(table):
    """Return a DataFrame as columns of text, its numbers with four decimals."""
    return table.to_string(index=False, float_format="{:.4f}".format, na_rep="-")


def no_formula(cell):
    """Return a cell of a table; a text that a spreadsheet would run as a formula is behind a '.

    Class names come from the data.
    """
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@"))
    return f"'{cell}" if is_formula else cell


def show_scores(args, oof, member_counts, used, counts, tried):
    """Show the scores of members and votes, the IoU of each class, what was tried and is used."""
    rows = []
    iou = {"class": oof.classes}
    by_name = [*zip(oof.names, member_counts, strict=True), *counts.items()]
    for m, (name, pixels) in enumerate(by_name, 1):
        label = str(m) if m <= len(oof.names) else ""  # the votes have no number
        pixels = pixels[pixels.sum((1, 2)) > 0]  # not every member predicted every image
        result = scores(pixels, args.batch)
        low, high = bootstrap_interval(image_miou(pixels))
        rows.append({"": label, "name": name, "images": len(pixels), "v1": result["v1"],
                     "v2": result["v2"], "v3": result["v3"], "low": low, "high": high})
        iou[label or name] = result["iou"]
    show(args, oof, "members", f"{oof.title}; low and high: 95% interval of v3", rows)
    show(args, oof, "iou", "IoU of each class, members by their number", iou)
    if tried:
        show(args, oof, "tried", "tried: gain on the folds that it wasn't fitted on; taken if "
             f"{args.metric} gains by more than chance and the score beside it doesn't lose so",
             tried)
    oof.used["weights"] = describe_params(used["weights"], oof.names)
    oof.used["least share"] = describe_params(used["least share"], [])
    for name, _, _ in STEPS_AFTER_VOTE:
        oof.used[name] = describe_params(used.get(name, []), oof.classes)
    print("\nused:", *(f"{name}: {text}" for name, text in oof.used.items()), sep="\n    ")


def describe_params(params, labels):
    """Return parameters as text: those that aren't 0, with labels if there is one for each."""
    values = np.ravel(params).tolist()
    if len(values) != len(labels):
        labels = [""] * len(values)
    texts = [f"{label} {value:.4g}".strip()
             for label, value in zip(labels, values, strict=True) if value]
    return ", ".join(texts) or "none"


def analyse(args, oof, thumbs, truths, disagreement):
    """Show who disagrees with whom, who adds what, and what each axis gains.

    The order of the waterfall is found on thumbnails, all numbers are of whole images.
    """
    n_members = len(oof.names)
    numbers = range(1, n_members + 1)
    columns = {str(m): shares for m, shares in zip(numbers, disagreement, strict=True)}
    show(args, oof, "disagreement", "disagreement: share of pixels on which two members differ",
         {"": numbers, "member": oof.names, **columns})
    # images that all have predicted: elsewhere an absent member would be no loss
    shared = thumbs.any((2, 3)).all(0)  # [N]
    if not shared.any():
        print("\nno image was predicted by all members: no table of who adds what")
        return
    order = waterfall_order(thumbs[:, shared], truths[shared])
    groups = members_by_value(oof)
    waterfall = [np.isin(range(n_members), order[:i + 1]) for i in range(n_members)]
    votes = equal_vote_counts(oof, [*waterfall, *groups.values()])[:, shared]
    show_waterfall(args, oof, order, votes[:n_members])
    by_value = dict(zip(groups, votes[n_members:], strict=True))
    show_axes(args, oof, by_value, votes[n_members - 1])


def waterfall_order(thumbs, truths):
    """Return the members' numbers: each is what the vote of those before gains most from."""
    order = []
    total = np.float32(0)
    while len(order) < len(thumbs):
        left = [m for m in range(len(thumbs)) if m not in order]
        v3 = [score_of(total + thumbs[m], truths) for m in left]
        order.append(left[int(np.argmax(v3))])
        total = total + thumbs[order[-1]]
    return order


def members_by_value(oof):
    """Return {(axis, value): bool [M], which members have it} of axes on which members differ."""
    axes = {axis: [str(info[axis]) for info in oof.infos]
            for axis in ("model", "scale", "round", "tta", "seed")}
    axes["epochs"] = [str(len(info["checkpoints"])) for info in oof.infos]
    groups = {}
    for axis, values in axes.items():
        distinct = sorted(set(values))
        for value in distinct if len(distinct) > 1 else ():
            groups[axis, value] = np.array(values) == value
    return groups


def show_waterfall(args, oof, order, votes):
    """Show what each member adds; votes [M, N, C, C]: of the first, the first two, ..."""
    rows = []
    for i, m in enumerate(order):
        row = {"": m + 1, "member": oof.names[m], "v3": image_miou(votes[i]).mean()}
        rows.append(row | gain(votes[i], votes[i - 1]) if i else row)
    show(args, oof, "waterfall", "waterfall: the member next is the one that the vote of those "
         "above gains most from", rows)


def show_axes(args, oof, by_value, all_members):
    """Show what the vote of all gains over that of the members with an axis's best value alone.

    by_value: {(axis, value): counts [N, C, C]}; all_members [N, C, C].
    """
    best = {}  # axis -> row of its best value
    for (axis, value), counts in by_value.items():
        v3 = image_miou(counts).mean()
        if axis not in best or v3 > best[axis]["v3"]:
            best[axis] = {"axis": axis, "best alone": value, "v3": v3, **gain(all_members, counts)}
    if best:
        show(args, oof, "axes", "axes: what the vote of all gains over that of the members with "
             "the best value alone\n"
             "(fold isn't here: no two folds predict the same image out of fold)",
             [*best.values()])


# ---- submissions ---------------------------------------------------------------------------------


def encode_mask(pred):
    """Return b"0 0 11 3": the class ids of a mask uint8 [H, W], row by row."""
    # two bytes an id; those from 10 on stand as the bytes after "9" until they are replaced
    text = (pred + PAIR).tobytes()[:-1]
    for class_id in range(10, int(pred.max()) + 1):
        text = text.replace(bytes([class_id + ord("0")]), str(class_id).encode())
    return text


def decode_mask(text, n_classes):
    """Return the class ids that encode_mask wrote, uint16 [SUBMIT_SIZE ** 2].

    None if the text isn't just as encode_mask writes it.
    """
    length = 2 * SUBMIT_SIZE ** 2 - 1
    if np.frombuffer(text, np.uint8).max(initial=0) > ord("9"):
        return None
    for class_id in range(n_classes - 1, 9, -1):  # each id to one byte, as in encode_mask
        if len(text) > length:
            text = text.replace(str(class_id).encode(), bytes([class_id + ord("0")]))
    if len(text) != length:
        return None
    ids = np.frombuffer(text + b" ", np.uint16) - PAIR
    return ids if ids.max() < n_classes else None


def write_submission(path, names, preds, n_classes, write_more=lambda scratch: None):
    """Write, read back and check the CSV; it gets its name only when every row is as it should be.

    write_more(scratch) writes, before that, what goes beside it from the CSV's scratch file.
    """
    with atomic_write(path) as scratch:
        with open(scratch, "wb") as f:
            f.write(",".join(HEADER).encode() + b"\n")
            progress = tqdm(preds, str(path), len(names), disable=None)
            for name, pred in zip(names, progress, strict=True):  # csv looks at each character
                f.write(quote_cell(name).encode() + b"," + encode_mask(pred) + b"\n")
        faults = [fault for fault, _ in read_submission(scratch, names, n_classes) if fault]
        if faults:
            raise UserError("\n".join(faults))
        write_more(scratch)


def quote_cell(text):
    """Return the text as a cell of a CSV, in quotes if it needs them."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set('",\r\n') else text


def write_masks(args, test, preds, pictures=()):
    """Write the submission, and beside it what was asked for.

    pictures: rows for the picture of some predictions, filled while `preds` is read; --coco: the
    masks as COCO JSON.
    """
    names = image_names(args, test)
    n_classes = len(test.classes)

    def write_more(scratch):
        if pictures:
            legend = dict(enumerate(test.classes))
            write_sheet(args.out.with_suffix(".png"), pictures, legend, across=3)
        if args.coco:
            masks = (pred for _, pred in read_submission(scratch, names, n_classes))
            write_coco(args.out.with_suffix(".json"), args.data / "test.json", test,
                       enumerate(masks))
        move_aside(args.out.parent, [made_file(args.out).name, args.out.name])
    write_submission(args.out, names, preds, n_classes, write_more)


def image_names(args, test):
    """Return what names the test images in the submission."""
    check_names(args, test.file_names)
    return test.file_names if args.image_id == "file_name" else [str(i) for i in test.ids]


def check_names(args, file_names):
    """Raise UserError if file names are to name the test images and two images have the same."""
    repeated = [name for name, times in Counter(map(str, file_names)).items() if times > 1]
    if args.image_id == "file_name" and repeated:
        raise UserError(f"test.json: several images have the file_name {clean(repeated[0])}, which "
                        "can't name them in the submission: take IMAGE_ID=id (--image-id id)")


def csv_rows(f):
    """Yield the rows of a CSV opened in binary as bytes; csv, which is slow, reads quotes alone.

    Raises UserError for a row of more than MAX_ROW bytes, as behind a quote that is left open.
    """
    csv.field_size_limit(MAX_ROW)
    lines = iter(partial(f.readline, MAX_ROW), b"")
    for line_number, line in enumerate(lines, 1):
        place = f"{f.name} line {line_number}"
        if len(line) == MAX_ROW:
            raise UserError(f"{place}: longer than {MAX_ROW} bytes: no row of a submission")
        if b'"' not in line:
            yield line.rstrip(b"\r\n").split(b",", 1)  # a second comma is no class id
            continue
        texts = (part.decode("utf-8-sig", "replace").replace("\r", "")
                 for part in itertools.chain([line], lines))
        try:
            yield [cell.encode() for cell in next(csv.reader(texts))]
        except csv.Error as e:
            raise UserError(f"{place}: {e}: is a quote left open?") from None


def read_submission(path, names, n_classes):
    """Yield (what is wrong or None, mask uint8 [SUBMIT_SIZE, SUBMIT_SIZE]) of each row of `names`.

    A byte order mark, CRLF, blank lines at the end and more spaces than needed between and around
    the ids are harmless.
    """
    with open(path, "rb", buffering=2 ** 20) as f:
        rows = csv_rows(f)
        header = b",".join(next(rows, [])).decode("utf-8-sig", errors="replace")
        if [cell.strip() for cell in header.split(",")] != HEADER:
            yield (f"{path}: the first line is '{clean(header[:100])}', not {','.join(HEADER)}",
                   None)
            return
        for line, (name, row) in enumerate(itertools.zip_longest(names, rows), 2):
            if name is None and not b"".join(row).strip():
                continue  # a blank line at the end
            row_name = row and row[0].decode(errors="replace")
            if row_name != name or len(row) != 2:
                text = "missing"
                if row:
                    text = f"{clean(row_name[:60])} with {len(row)} column(s)"
                yield (f"{path} line {line}: image {text}, expected {clean(name or 'no more')}",
                       None)
                continue
            ids = read_ids(row[1], n_classes)
            if ids is None:
                fault = pixel_fault(row[1], n_classes)
                yield f"{path} line {line}, image {clean(name)}: {fault}", None
            else:
                yield None, ids.astype(np.uint8).reshape(SUBMIT_SIZE, SUBMIT_SIZE)


def read_ids(text, n_classes):
    """Return the class ids of an image's pixels [SUBMIT_SIZE ** 2], or None if they aren't that."""
    ids = decode_mask(text, n_classes)
    if ids is None:  # somebody else's, with more blanks or leading zeros, or damaged
        digits = text if re.fullmatch(rb"[\d\s]*", text) else b""
        ids = np.fromstring(digits, np.int64, sep=" ")
    is_right = ids.size == SUBMIT_SIZE ** 2 and ids.min() >= 0 and ids.max() < n_classes
    return ids if is_right else None


def pixel_fault(text, n_classes):
    """Return what is wrong with the text that ought to be the ids of an image's pixels."""
    words = text.split()
    good = {str(i).encode() for i in range(n_classes)}
    fault = f"there are {len(words)}"
    for i, word in enumerate(words[:SUBMIT_SIZE ** 2]):
        if (word.lstrip(b"0") or b"0") not in good:
            row, column = divmod(i, SUBMIT_SIZE)
            shown = clean(word[:30].decode(errors="replace"))
            fault = f"row {row}, column {column}, both from 0, is {shown}"
            break
    return f"not {SUBMIT_SIZE ** 2} ids of 0 to {n_classes - 1}: {fault}"


def sample_pictures(preds, test, pictures, n=24):
    """Pass `preds` on; put [(caption, photo), (caption, prediction)] of some in `pictures`.

    They are `n` photos, spread evenly.
    """
    n_images = len(test.ids)
    chosen = set(np.linspace(0, n_images - 1, min(n, n_images)).astype(int).tolist())
    for i, pred in enumerate(preds):
        if i in chosen:
            image = test.image(i)
            pictures.append([(test.file_names[i], overlay(image)),
                             (named(pred, test.classes), overlay(image, pred))])
        yield pred


# ---- report --------------------------------------------------------------------------------------


def calibration(total, truths, n_bins=10):
    """Return (confidence, accuracy, share of the pixels) by bin of confidence, and their error.

    total [N, C, P]: votes of any scale; truths [N, P]. A bin without a pixel has NaN. The error is
    the expected calibration error (Guo 2017).
    """
    top_probs = (total.max(1) / total.sum(1).clip(1e-9)).ravel()
    is_right = (total.argmax(1) == truths).ravel()
    bins = (top_probs * n_bins).astype(int).clip(0, n_bins - 1)
    n_pixels = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, top_probs, n_bins) / n_pixels
        accuracy = np.bincount(bins, is_right, n_bins) / n_pixels
        share = n_pixels / n_pixels.sum()
    return confidence, accuracy, share, np.nansum(share * abs(confidence - accuracy))


def iou_by_size(counts):
    """Return the mean IoU [C, S] of each class in the images of which it covers a share in SIZES.

    counts [N, C, C]; NaN where there are no such images.
    """
    area, iou = counts.sum(2), class_iou(counts)  # [N, C]
    share = area / area.sum(1, keepdims=True).clip(1)
    size = np.digitize(share, SIZES) * (area > 0) - 1  # -1: the class isn't there
    means = []
    with np.errstate(invalid="ignore"):
        for s in range(len(SIZES)):
            means.append(np.where(size == s, iou, 0).sum(0) / (size == s).sum(0))
    return np.stack(means, 1)


def draw_calibration(axes, confidence, accuracy, share):
    colour = axes.yaxis.label.get_color()
    axes.plot((0, 1), (0, 1), ":", color="grey", label="perfect")
    axes.plot(confidence, accuracy, "o-", color=colour, label="accuracy")
    axes.bar((np.arange(len(share)) + 0.5) / len(share), share, 0.9 / len(share), color="grey",
             alpha=0.4, label="share of the pixels")
    axes.set(xlabel="probability of the predicted class", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left", frameon=False)


def worst_images(oof, used, counts, n=24):
    """Return cards of the `n` images with the lowest v3.

    Each shows photo, truth, the vote with what is `used`, and where that is unsure.
    """
    from matplotlib import colormaps
    cards = []
    v3 = image_miou(counts)
    for i in np.argsort(v3, kind="stable")[:n].tolist():
        images = oof.probs(i)
        probs = sum(np.float32(used["weights"][m]) * image for m, image in images.items())
        pred = drop_small(probs, probs.argmax(0).astype(np.uint8), used["least share"])
        pred = apply_steps(pred, used)
        probs = probs / probs.sum(0).clip(1e-9)
        entropy = -(probs * np.log(probs.clip(1e-9))).sum(0) / np.log(len(probs))
        photo = oof.train.image(oof.indices[i])
        name = oof.train.file_names[oof.indices[i]]
        tiles = {"photo": overlay(photo), "truth": overlay(photo, oof.truths[i]),
                 "vote": overlay(photo, pred),
                 "entropy": colormaps["magma"](entropy, bytes=True)[..., :3]}
        cards.append({"text": f"v3 {v3[i]:.3f}, {name}",
                      "classes": foreground_ids([oof.truths[i], pred]),
                      "tiles": [(text, tile_url(tile)) for text, tile in tiles.items()]})
    return cards


def pseudo_counts(runs):
    """Return rows of how many photos the pseudo labels of each round and fold have, why not all.

    They are those of the runs' experiments.
    """
    places = [RUN_PLACE.fullmatch(str(run.resolve())) for run in runs]
    rows = []
    for exp in sorted({Path(place[1]) for place in places if place}):
        for path in sorted(exp.glob("r[0-9]/pseudo/f*/manifest.json")):
            manifest = read_own_json(path, MANIFEST_KINDS)
            if manifest is None:
                raise UserError(f"{path}: damaged: run make pseudo again")
            photos = manifest["photos"]
            row = {"round": manifest["round"], "fold": manifest["fold"]}
            row |= photos.get(BACKGROUND, {})
            foreground = manifest["labels"][-1]
            row |= {f"foreground {key}": foreground[key] for key in ("pixels", "expected", "real")}
            for name, reasons in photos.items():
                if name != BACKGROUND:
                    row[f"kept with {name}"] = reasons.get("kept", 0)
            rows.append(row)
    return rows


def pseudo_table(rows):
    """Return the rows of pseudo_counts as a table; a count that a row lacks is 0."""
    import pandas as pd
    table = pd.DataFrame(rows)
    others = ("fold", "foreground expected", "foreground real")
    counts = [name for name in table if name not in others]
    table[counts] = table[counts].fillna(0).astype(int)
    return table


def report_figures(oof, thumbs, truths, used, votes):
    """Return [(title, (light, dark) URLs)] of the vote's pixel counts `votes` [N, C, C]."""
    by_id = dict(enumerate(oof.classes))
    pixels = votes.sum(0)
    bars = {"all": class_iou(pixels)}
    for part, name in enumerate(oof.part_names):
        bars[name] = class_iou(votes[oof.parts == part].sum(0))
    with np.errstate(invalid="ignore"):
        shares = pixels / pixels.sum(1, keepdims=True)
    *bins, error = calibration(weighted_sum(used["weights"], thumbs), truths)
    sizes = [f"{100 * low:g} to {100 * high:g}"
             for low, high in zip(SIZES, (*SIZES[1:], 1), strict=True)]
    by_size = iou_by_size(votes)
    height = 1.5 + 0.25 * len(by_id)
    figures = (
        ("IoU of each class in each fold", height,
         lambda axes: draw_bars(axes, by_id, bars, xlim=(0, 1))),
        ("Confusion: how many % of a class's pixels are predicted as what", height,
         lambda axes: draw_heat(axes, shares, oof.classes, oof.classes, xlabel="prediction",
                                ylabel="truth")),
        ("IoU in % by class and by how much of the photo it covers", height,
         lambda axes: draw_heat(axes, by_size, oof.classes, sizes, xlabel="% of the photo")),
        (f"Reliability: expected calibration error {error:.4f}", 4,
         lambda axes: draw_calibration(axes, *bins)))
    return [(title, figure_urls(draw, inches)) for title, inches, draw in figures]


def report_sections(args, oof, thumbs, truths, used, counts):
    """Return the sections of the page, all but how it was made."""
    import pandas as pd
    votes = counts[TAKEN]
    sections = []
    for text, table in oof.tables:
        title, _, note = text.partition(": ")
        sections.append({"title": title, "note": note, "table": table})
    sections[1:1] = [
        {"title": "used",
         "table": pd.DataFrame(oof.used.items(), columns=["what", "by the vote"])},
        {"title": "figures", "figures": report_figures(oof, thumbs, truths, used, votes),
         "note": f"Of the vote {TAKEN}. Reliability: of a sample of pixels, with what was fitted "
                 "on all images and without the steps after the vote."}]
    sections.append(
        {"title": "worst images", "cards": worst_images(oof, used, votes),
         "note": f"Those with the lowest v3 of the vote {TAKEN}. The vote shown and its entropy, "
                 "black to yellow, are with what was fitted on all images, as for the test "
                 "photos."})
    if rows := pseudo_counts(args.runs):
        sections.append(
            {"title": "pseudo labels", "table": pseudo_table(rows),
             "note": "Photos that models of each round and fold learnt from, and why others were "
                     "dropped; how many foreground pixels are labelled, and which share of them is "
                     "right: expected out of fold, and real where test photos have a truth."})
    return sections


def balance_section(oof, pixels):
    """Return the section with the share of each class in train and in predicted test photos."""
    import pandas as pd
    labelled = np.array(oof.train.pixels).sum(0)
    by_id = dict(enumerate(oof.classes))
    series = {"train": labelled / labelled.sum(), "predicted test": pixels / pixels.sum()}
    urls = figure_urls(lambda axes: draw_bars(axes, by_id, series, xscale="log"),
                       1.5 + 0.25 * len(by_id))
    return {"title": "class balance", "figures": [("Share of the pixels", urls)],
            "table": pd.DataFrame({"class": oof.classes, **series})}


def stores_section(infos):
    """Return the section that says what made the stores."""
    import pandas as pd
    rows = []
    for info in infos:
        run = info["run"]
        checkpoints = [f"{c['file']} {c['hash']} epoch {c['epoch']}" for c in info["checkpoints"]]
        keys = ("split", "model", "scale", "round", "fold", "tta", "seed")
        rows.append({key: info[key] for key in keys} | {
            "code of the run": f"{run['state']} {run['commit']}",
            "kept under": ", ".join(run["kept_under"]),
            "code of the store": f"{info['state']} {info['commit']}",
            "checkpoints": ", ".join(checkpoints),
            **{key: info[key] for key in ("data", "folds_csv", "contaminated")}})
    return {"title": "how it was made", "table": pd.DataFrame(rows),
            "note": "Stores of probabilities, with the hashes of what they come from. Code: its "
                    "folder in out/EXP/code and the git commit, with a + if files differed from "
                    "it."}


def explain(args, oof, surveyed, used, counts, infos, pixels=None):
    """Show who adds what, with score or a report, and write args.report; may take minutes.

    surveyed: of survey(); infos: of the stores; pixels [C]: of the classes in the predicted test
    photos.
    """
    _, thumbs, truths, disagreement = surveyed
    if (args.command == "score" or args.report) and len(oof.names) > 1:
        analyse(args, oof, thumbs, truths, disagreement)
    if not args.report:
        return
    sections = report_sections(args, oof, thumbs, truths, used, counts)
    if pixels is not None:
        sections.append(balance_section(oof, pixels))
    sections.append(stores_section(infos))
    write_page(args.report, f"Report: {args.report.absolute().parent.name}", sections, oof.classes,
               CONTAMINATED if oof.contaminated else "")
    print(f"{args.report}: the report")


# ---- commands ------------------------------------------------------------------------------------


def fit_vote(args, oof):
    """Fit the vote and show its scores; return (survey of the members, what is used, counts)."""
    weights = member_weights(args, oof.names)
    surveyed = survey(oof)
    member_counts, thumbs, truths, _ = surveyed
    used, counts, tried = choose(args, oof, thumbs, truths, weights)
    show_scores(args, oof, member_counts, used, counts, tried)
    return surveyed, used, counts


def score(args):
    """Print how well members and vote do out of fold, and on test photos with labels."""
    oof = OutOfFold(args, args.runs)
    truths = read_test_truths(args, oof)
    surveyed, used, counts = fit_vote(args, oof)
    show_test(args, oof, truths, used)
    explain(args, oof, surveyed, used, counts, oof.store_infos)


def read_test_truths(args, oof):
    """Return the masks uint8 [N, S, S] of the test photos, None if they have no labels."""
    path = truth_file(args.data, args.truth)
    return None if path is None else load_truths(path, oof.test, oof.infos[0]["paint"])


def show_test(args, oof, truths, used):
    """Show how the vote does on test photos with labels; truths: of read_test_truths.

    Nothing is fitted on them: what is `used` was found out of fold.
    """
    if truths is None:
        return
    infos = [read_json(path) for run in args.runs if (path := run / "test.json").exists()]
    if any(info["data"] != oof.test.fingerprint for info in infos):
        print("the runs have predicted other test photos, or a test.json before it had labels: "
              "make submit predicts them again, then they are scored on them")
        return
    plain = {"weights": np.ones(len(oof.names)), "least share": 0}
    counts = count_test(args, oof, args.runs, truths, [plain, used])
    if counts is not None:
        votes = dict(zip(("soft vote, equal weights", TAKEN), counts, strict=True))
        show_truth(args, oof, votes, args.truth or "test.json")


def show_truth(args, shown, votes, truth):
    """Show the scores of votes {name: pixel counts [N, C, C]} on photos whose `truth` is known.

    The IoUs by class are those of the last one. shown: has classes, and tables and contaminated as
    of OutOfFold.
    """
    rows = []
    for name, counts in votes.items():
        result = scores(counts, args.batch)
        row = {"name": name}
        for metric in ("v1", "v2", "v3"):
            low, high = score_interval(counts, metric, args.batch)
            row |= {metric: result[metric], f"{metric} low": low, f"{metric} high": high}
        rows.append(row)
    last, counts = list(votes.items())[-1]
    show(args, shown, "test", f"on the truth of {len(counts)} test photos: {truth}; v1 of batches "
         f"of {args.batch}; low and high: 95% interval over images, for {FEW_IMAGES} or more; "
         "nothing is fitted on them", rows)
    low, high = iou_intervals(counts)
    columns = {"class": shown.classes, "images": (counts.sum(2) > 0).sum(0),
               "IoU": class_iou(counts.sum(0)), "low": low, "high": high}
    show(args, shown, "test-iou", f"IoU of each class on the test photos: {last}; images: that "
         "have the class", columns)


def score_interval(counts, metric, batch):
    """Return the 95% interval of a score of pixel counts [N, C, C]; NaN for fewer than FEW_IMAGES.

    Of v1 batches of images are drawn in place of images.
    """
    if metric == "v1":
        counts = batch_counts(counts, batch)
    if len(counts) < FEW_IMAGES:
        return math.nan, math.nan
    if metric == "v2":
        return np.percentile(image_miou(drawn_counts(counts, 1000))[1:], (2.5, 97.5))
    return bootstrap_interval(image_miou(counts))


def iou_intervals(counts):
    """Return (low [C], high [C]): 95% intervals of the IoU of each class in pixel counts [N, C, C].

    NaN for a class that fewer than FEW_IMAGES images have, in truth or prediction.
    """
    drawn = class_iou(drawn_counts(counts, 1000))[1:]
    n_images = (counts.sum(1) + counts.sum(2) > 0).sum(0)
    low, high = np.nanpercentile(np.nan_to_num(drawn), (2.5, 97.5), axis=0)
    return [np.where(n_images < FEW_IMAGES, np.nan, ends) for ends in (low, high)]


def evaluate(args):
    """Show the scores of submissions on the truth of their photos, which is all that is needed."""
    used = used_categories(args.truth) if args.unused == "drop" else None
    photos, categories, _, faults = read_coco(args.truth, used, labelled=True)
    if faults:
        raise UserError("\n".join(faults))
    classes = [BACKGROUND, *categories.values()]
    by_name = {str(photo[args.image_id]): photo for photo in photos}
    names_in = {path: submission_names(path) for path in args.submissions}
    names = names_in[args.submissions[0]]
    if unknown := [name for name in names if name not in by_name]:
        raise UserError(f"{args.submissions[0]}: image {clean(unknown[0])} is not in {args.truth}: "
                        "is --image-id right?")
    if len(names) < len(by_name):
        print(f"{len(names)} of the {len(by_name)} images of {args.truth} are in "
              f"{args.submissions[0]}: the others have no part in the scores")
    truths = {name: paint_truth(by_name[name], args.paint, len(classes)) for name in names}
    votes = {}
    for path in args.submissions:
        counts, own_names = {}, names_in[path]  # each may have an order of its own
        if text := difference(own_names, names):
            raise UserError(f"{path} is of other images than {args.submissions[0]}: it {text}")
        rows = read_submission(path, own_names, len(classes))
        for name, (fault, pred) in zip(own_names, rows, strict=True):
            if fault:
                raise UserError(fault)
            counts[name] = confusion(pred, truths[name], len(classes))
        votes[str(path)] = np.stack([counts[name] for name in names])
    shown = argparse.Namespace(classes=classes, tables=[], contaminated=False)
    show_truth(args, shown, votes, args.truth)
    show_gains(args, shown, votes)


def show_gains(args, shown, votes):
    """Show what each of votes {name: pixel counts [N, C, C]} gains over the first."""
    (first, before), *others = votes.items()
    rows = []
    for name, counts in others:
        gains = {metric: gain(counts, before, metric, args.batch) for metric in ("v2", "v3")}
        rows.append({"name": name} | {f"{metric} {key}": value for metric in gains
                                      for key, value in gains[metric].items()})
    if rows:
        show(args, shown, "test-gain", f"gain over {first}; 95% intervals by paired bootstrap",
             rows)


def submission_names(path):
    """Return the names of the images in a submission, in its order."""
    try:
        with open(path, "rb", buffering=2 ** 20) as f:
            rows = csv_rows(f)
            next(rows, None)
            names = [row[0].decode(errors="replace") for row in rows if b"".join(row).strip()]
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    for name, n_times in Counter(names).items():
        if n_times > 1:
            raise UserError(f"{path}: image {clean(name)} is there {n_times} times")
    if not names:
        raise UserError(f"{path}: no submission: it has no image")
    return names


def made_file(out):
    """Return the path of the JSON that says what made the submission `out`."""
    return out.with_suffix(".made.json")


def check_outputs(args):
    """Raise UserError if a command would write into DATA, or over its input or its own files."""
    given = vars(args)
    if "data" not in given:
        return
    outputs = []
    if given.get("out"):
        outputs += [args.out, args.out.with_suffix(".png"), made_file(args.out),
                    oof_file(args.out), vote_file(args.out)]
        if args.coco:
            outputs.append(args.out.with_suffix(".json"))
    outputs += [given[name] for name in ("report", "tables", "picture", "exp") if given.get(name)]
    inputs = [args.truth] if given.get("truth") else []
    stores = [f"{split}.{ending}" for split in ("valid", "test") for ending in ("json", "npy")]
    for run in given.get("runs", ()):
        inputs += [run, *(run / name for name in stores)]
    check_output(args.data, *outputs, inputs=inputs)
    for path in outputs:
        if any((path.parent / name).exists() for name in ("config.json", "manifest.json")):
            raise UserError(f"{path} lies in the folder of a run or of pseudo labels: choose "
                            "another place")


def run_name(run):
    """Return rROUND/DECODER/ENCODER/sSCALE/fFOLD of a run, wherever its experiment is."""
    return "/".join(Path(os.path.abspath(run)).parts[-5:])


def soft_recipe(args, test, train, runs, valid_infos, test_infos):
    """Return everything but code that decides a submission, as plain values.

    test, train: fingerprints of the data; args: of soft; valid_infos: None for a run on all images.
    """
    stores = []
    for run, valid, info in zip(runs, valid_infos, test_infos, strict=True):
        valid_hash = valid["files"]["valid.npy"] if valid else ALL
        hashes = f"{valid_hash} {info['files']['test.npy']}"
        stores.append(f"{run_name(run)} {hashes} {info['tta']}")
    fitted = {"metric": args.metric, "post": args.post}
    if args.metric == "v1":
        fitted["batch"] = args.batch
    return settings_of(args) | fitted | {"test": test, "train": train, "stores": stores}


def already_made(args, recipe, step, hashes):
    """Return (whether the submission is there and made like this, or kept; its provenance)."""
    path = made_file(args.out)
    wanted = provenance(recipe, code_of(step))
    description = read_description(path, hashes)
    decision = decide(args.out, description, wanted, args.code) if description else "make"
    if decision != "done":
        keep_code(args.out.parent)
    if decision == "kept":
        write_description(path, description, files=description["files"])
    if decision != "make":
        print(f"{args.out} is there and was made like this: nothing to do")
    return decision != "make", wanted


def oof_file(out):
    """Return the path of the out-of-fold pixel counts of the vote that made the submission."""
    return out.with_suffix(".oof.npz")


def write_oof_counts(path, oof, counts):
    """Write the vote's pixel counts [N, C, C] of validation images, with their ids and classes."""
    with atomic_write(path) as scratch, open(scratch, "wb") as f:
        np.savez_compressed(f, ids=oof.ids, classes=oof.classes, counts=counts)


def vote_file(out):
    """Return the path of the JSON that says how the submission was voted for."""
    return out.with_suffix(".vote.json")


def write_vote(path, members, used):
    """Write what infer.py --vote needs to vote on other photos as on those of the submission.

    members: of open_members; used: of Option.used. Folds of a member share its weight, runs without
    a weight are left out. The folder of a run is relative to that of the file; its settings are the
    options of infer.py that decided its stores.
    """
    runs = []
    for weight, folds in zip(used["weights"], members.values(), strict=True):
        if not weight:
            continue
        for probs, info in folds.values():
            settings = {key: value for key, value in info["recipe"].items()
                        if key not in ("split", "checkpoints", "data")}
            folder = os.path.relpath(os.path.dirname(probs.filename), path.parent)
            runs.append({"folder": folder, "weight": float(weight / len(folds)),
                         "checkpoints": info["checkpoints"], "settings": settings})
    steps = {name: np.asarray(used[name]).tolist() for name, *_ in STEPS_AFTER_VOTE if name in used}
    write_json(path, {"runs": runs, "least share": float(used["least share"]), "steps": steps})


def write_made(args, wanted, hashes, *more):
    """Write what made the submission, after it; more: other files that were made with it."""
    paths = [args.out, *more]
    if args.coco:
        paths.append(args.out.with_suffix(".json"))
    files = {path.name: hashes(path) for path in paths}
    write_description(made_file(args.out), wanted, files=files)
    hashes.save()


def soft(args):
    """Average the probabilities of runs, and write the submission that this votes for."""
    hashes = Hashes(args.cache)
    members, infos, _ = open_members(args, args.runs, "test", hashes)
    oof = OutOfFold(args, args.runs)
    test = oof.test
    n_images = len(test.ids)
    stores = place_test_images(args, oof, members, infos)
    member_weights(args, oof.names)  # raises if those given don't fit
    recipe = soft_recipe(args, test.fingerprint, oof.train.fingerprint, args.runs,
                         oof.info_of_run, infos)
    is_made, wanted = already_made(args, recipe, "submission", hashes)
    if is_made:
        tell_unread(infos)
        return
    truths = read_test_truths(args, oof)
    surveyed, used, counts = fit_vote(args, oof)
    pictures = []
    pixels = np.zeros(len(oof.classes), int)

    def preds():
        for n in range(n_images):
            pred = vote_test_image(n, stores, used)
            pixels[:] += np.bincount(pred.ravel(), minlength=len(pixels))
            yield pred
        # before the submission gets its name
        check_unchanged([run / "test.json" for run in args.runs], infos)
        check_unchanged([run / "valid.json" for run in oof.runs], oof.store_infos)
    write_masks(args, test, sample_pictures(preds(), test, pictures), pictures)
    write_oof_counts(oof_file(args.out), oof, counts[TAKEN])
    write_vote(vote_file(args.out), members, used)
    write_made(args, wanted, hashes, oof_file(args.out), vote_file(args.out))
    print(f"{args.out}: {n_images} images by {len(args.runs)} run(s) of {len(members)} member(s)")
    show_test(args, oof, truths, used)
    explain(args, oof, surveyed, used, counts, oof.store_infos + infos, pixels)
    tell_unread(infos)


def place_test_images(args, oof, members, infos):
    """Return [(member's number, number of its folds, test store, its positions of the images)].

    Raises UserError if the test stores aren't of the same members as those of validation, or of
    other photos than the data has.
    """
    if list(members) != oof.names:
        raise UserError(f"the test stores are {', '.join(members)}, those of validation "
                        f"{', '.join(oof.names)}")
    stores = []
    for m, folds in enumerate(members.values()):
        for probs, info in folds.values():
            positions = order_of(info["image_ids"], oof.test.ids, probs.filename)
            stores.append((m, len(folds), probs, positions))
    if infos[0]["data"] != oof.test.fingerprint:
        raise UserError(f"{args.runs[0]}/test.json was made on other data than is in {args.data} "
                        "now: run infer.py again")
    return stores


def vote_test_image(n, stores, used):
    """Return the mask uint8 [H, W] of test image n; stores: of place_test_images."""
    weights = [used["weights"][m] / n_folds for m, n_folds, _, _ in stores]  # folds share theirs
    images = {}
    for s, (_, _, probs, positions) in enumerate(stores):
        if weights[s]:
            images[s] = read_probs(probs, positions[n])
    n_classes = stores[0][2].shape[1]
    return apply_steps(vote(images, weights, n_classes, used["least share"]), used)


def hard(args):
    """Write the submission of the majority per pixel of submissions and of runs' own votes."""
    if args.weights == "fit":
        raise UserError("--weights fit: submissions have no out-of-fold predictions to fit on; "
                        "give W,W,...")
    hashes = Hashes(args.cache)
    stores = {path: open_store(path / "test.json", hashes) for path in args.runs if path.is_dir()}
    infos = [info for _, info in stores.values()]
    weights = member_weights(args, args.runs)
    _, test = load_data(args.data, args.cache, **data_options(infos[0] if infos else vars(args)))
    for path, (_, info) in stores.items():
        if info["data"] != test.fingerprint:
            raise UserError(f"{path}/test.json was made on other data than is in {args.data} now: "
                            "run infer.py again")
    voters = []
    for path in args.runs:
        voters.append(short_hash(stores[path][1]["files"]) if path in stores else hashes(path))
        if not voters[-1]:  # a pipe can't be told from another one
            raise UserError(f"{path}: no file that can be read: give a CSV or the folder of a run")
    recipe = settings_of(args) | {"test": test.fingerprint, "voters": voters}
    recipe["weights"] = weights.tolist()  # equal weights too as numbers
    is_made, wanted = already_made(args, recipe, "voted", hashes)
    if not is_made:
        masks = [masks_of(path, stores.get(path), args, test) for path in args.runs]
        preds = (majority(np.stack(votes), weights) for votes in zip(*masks, strict=True))
        write_masks(args, test, preds)
        write_made(args, wanted, hashes)
        print(f"{args.out}: {len(test.ids)} images by {len(args.runs)} votes")
    tell_unread(infos)


def masks_of(path, store, args, test):
    """Yield the masks uint8 [H, W] of a voter, a submission or a run's store (probs, info)."""
    if store:
        probs, info = store
        check_classes(info["classes"], test.classes, path, args.data)
        for i in order_of(info["image_ids"], test.ids, path):
            yield top_class(read_probs(probs, i))
        return
    for fault, pred in read_submission(path, image_names(args, test), len(test.classes)):
        if fault:
            raise UserError(fault)
        yield pred


def tell_unread(infos):
    """Raise UserError, code 3, if a voter couldn't read all photos; infos: of its stores."""
    unread = sorted({image_id for info in infos for image_id in info["unreadable"]})
    if unread:
        raise UserError(f"warning: the submission stands, but of {len(unread)} photo(s) that can't "
                        f"be read runs have voted background: {', '.join(map(str, unread))}; mend "
                        "them, run infer.py, then this again", code=3)


class Comparison:
    """The equal votes of the last rounds of E experiments, on the images that all of them have.

    runs_of: the run folders of each; names: as given; valid: the pixel counts [N, C, C] of each,
    out of fold; test: likewise on the labelled test photos, None for an experiment without test
    stores; is_labelled: whether there are such photos; contaminated, tables: as of OutOfFold.
    """

    def __init__(self, args, runs_of):
        self.names = [str(exp) for exp in args.experiments]
        self.test, self.tables, self.contaminated, by_image = [], [], False, []
        for exp, runs in zip(args.experiments, runs_of, strict=True):
            oof = OutOfFold(args, runs)
            if not by_image:
                self.classes, self.options = oof.classes, data_options(oof.infos[0])
                truths = read_test_truths(args, oof)
                self.is_labelled = truths is not None
            self.check_options(exp, data_options(oof.infos[0]))
            equal = {"weights": np.ones(len(oof.names)), "least share": 0}
            counts, = equal_vote_counts(oof, [equal["weights"]])
            by_image.append(dict(zip(oof.ids, counts, strict=True)))
            print(f"{runs[0].parents[3]}: {len(runs)} run(s) of {len(oof.names)} member(s), "
                  f"{len(oof.ids)} images")
            tested = count_test(args, oof, runs, truths, [equal]) if self.is_labelled else None
            self.test.append(None if tested is None else tested[0])
            self.contaminated |= oof.contaminated
        shared = [i for i in by_image[0] if all(i in counts for counts in by_image)]
        if not shared:
            raise UserError(f"{', '.join(self.names)} have no validation image in common")
        self.valid = [np.stack([counts[i] for i in shared]) for counts in by_image]

    def check_options(self, exp, options):
        """Raise UserError if an experiment reads the data otherwise than the first."""
        for name, value in self.options.items():
            if options[name] != value:
                raise UserError(f"{exp} has {name} {options[name]}, {self.names[0]} {value}: their "
                                "truths differ")


def last_round(exp):
    """Return the run folders of an experiment with a valid.json, and those on all images.

    exp: out/EXP, of which the last round is taken, or out/EXP/rR.
    """
    paths = sorted(exp.glob("r[0-9]/*/*/s*/f*/valid.json"))
    paths = paths or sorted(exp.glob("*/*/s*/f*/valid.json"))
    if not paths:
        raise UserError(f"{exp}: no run with a valid.json; make score makes them")
    last = paths[-1].parents[4]
    runs = [path.parent for path in paths if path.parents[4] == last]
    on_all = [run.parent / f"f{ALL}" for run in runs]
    return runs + sorted({run for run in on_all if (run / "test.json").exists()})


def count_test(args, oof, runs, truths, votes):
    """Return the pixel counts [K, N, C, C] of K votes on test photos.

    Return None if a run has no test store. truths: uint8 [N, H, W]; votes: what each uses, as
    vote_test_image takes it.
    """
    absent = [run for run in runs if not (run / "test.json").exists()]
    if absent:
        print(f"{absent[0]}: no test.json, so nothing to score on the labelled test photos; "
              "infer.py makes it")
        return None
    members, infos, _ = open_members(args, runs, "test", Hashes(args.cache))
    stores = place_test_images(argparse.Namespace(**vars(args) | {"runs": runs}), oof, members,
                               infos)
    n_classes = len(oof.classes)
    counts = np.zeros((len(votes), len(truths), n_classes, n_classes), int)
    for n, truth in enumerate(tqdm(truths, "test", disable=None)):
        for k, used in enumerate(votes):
            counts[k, n] = confusion(vote_test_image(n, stores, used), truth, n_classes)
    return counts


def compare(args):
    """Show what each experiment gains over the one before and over the first."""
    names = ", ".join(map(str, args.experiments))
    if len(args.experiments) < 2:
        raise UserError(f"compare takes two or more experiments, not {names}")
    runs_of = [last_round(exp) for exp in args.experiments]
    for path, n_times in Counter(os.path.realpath(runs[0].parents[3]) for runs in runs_of).items():
        if n_times > 1:
            raise UserError(f"compare of {names}: {n_times} of them are the round {path}")
    comparison = Comparison(args, runs_of)
    groups = {"": comparison.valid}
    n_images = len(comparison.valid[0])
    title = (f"{n_images} images that all of them held out; 95% intervals by paired bootstrap"
             f", for {FEW_IMAGES} or more")
    if comparison.is_labelled:
        groups["test "] = comparison.test
        title += ("\ntest: the vote of all folds on labelled test photos, whose labels nothing has "
                  "seen: the honest column for what folds\nare worth, since out of fold each "
                  "photo has the vote of one fold alone")
    labels = [f"{group}{metric}" for group in groups for metric in ("v3", "v2")]
    numbers = range(1, len(comparison.names) + 1)
    columns = {"": numbers, "experiment": comparison.names}
    for label in labels:
        columns |= gain_columns(groups[label[:-2]], label, label[-2:])
    text = "\n\n".join(compact_table(columns, label) for label in labels)
    show(args, comparison, "compare", title, columns, text)
    for i in range(1, len(comparison.names)):
        row = {name: values[i] for name, values in columns.items()}
        before = comparison.names[i - 1]
        print(f"{comparison.names[i]} against {before}: {verdict(row, labels)}")
    show(args, comparison, "compare-iou", "IoU of each class by the experiment's number; gain, low "
         "and high: of the last over the first", compare_classes(comparison))
    if args.picture:
        write_staircase(args.picture, columns, groups)


def gain_columns(counts, label, metric):
    """Return {column: [E] values} of v2 or v3: the score, its gain over the one before, the first.

    counts: pixel counts [N, C, C] of each experiment, or None. What isn't known is NaN.
    """
    columns = defaultdict(list)
    for i, after in enumerate(counts):
        pixels = after if metric == "v3" or after is None else after.sum(0)
        columns[label].append(math.nan if after is None else image_miou(pixels).mean())
        for ending, before in (("", counts[i - 1]), (" over first", counts[0])):
            is_known = i > 0 and after is not None and before is not None
            for name, value in (gain(after, before, metric) if is_known else NO_GAIN).items():
                columns[f"{label} {name}{ending}"].append(value)
    return columns


def compact_table(columns, label):
    """Return the text of a table of one score, which fits a terminal; columns: all of compare's."""
    import pandas as pd
    table = {name: columns[name] for name in ("", "experiment", label)}
    for heading, ending in (("over the one before", ""), ("over the first", " over first")):
        cells = zip(*(columns[f"{label} {name}{ending}"] for name in NO_GAIN), strict=True)
        table[heading] = [gain_text(*cell) for cell in cells]
    return as_text(pd.DataFrame(table))


def gain_text(gained, low, high):
    """Return a gain with its interval as "+0.012 [0.001, 0.023]", "-" for one that isn't known."""
    if math.isnan(gained):
        return "-"
    return f"{gained:+.3f}" if math.isnan(low) else f"{gained:+.3f} [{low:.3f}, {high:.3f}]"


def verdict(row, labels):
    """Return in words what a step gains, such as "v3 gains, v2 within chance".

    row: its columns, of each of `labels` "v3 gain" with the 95% interval "v3 low", "v3 high". A
    gain that isn't known is left out.
    """
    words = []
    for label in labels:
        gained, low, high = (row[f"{label} {key}"] for key in NO_GAIN)
        what = "gains" if low > 0 else "loses" if high < 0 else "within chance"
        if math.isnan(low):
            what = "too few images"
        elif low == high == 0:
            what = "same"  # not an image differs, as out of fold where a fold was added
        if not math.isnan(gained):
            words.append(f"{label} {what}")
    return ", ".join(words)


def compare_classes(comparison):
    """Return rows of the IoU of each class in the truth in every experiment.

    The gain of the last over the first has its paired 95% interval, unless the class is in fewer
    than FEW_IMAGES.
    """
    before, after = comparison.valid[0], comparison.valid[-1]
    gains = class_iou(drawn_counts(after, 500)) - class_iou(drawn_counts(before, 500))
    iou = [class_iou(counts.sum(0)) for counts in comparison.valid]
    rows = []
    for c in np.flatnonzero(before.sum((0, 2))):
        has_class = before.sum(2)[:, c] > 0
        low, high = math.nan, math.nan
        if has_class.sum() >= FEW_IMAGES:
            low, high = np.nanpercentile(gains[1:, c], (2.5, 97.5))
        rows.append({"class": comparison.classes[c]}
                    | {str(place): values[c] for place, values in enumerate(iou, 1)}
                    | {"gain": iou[-1][c] - iou[0][c], "low": low, "high": high})
    return rows


def write_staircase(path, columns, groups):
    """Write a PNG of v3, and below it of v2, of the experiments; columns, groups: of compare."""
    names = columns["experiment"]
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
    numbered = [f"{place} {os.path.relpath(name, shared)}" for place, name in enumerate(names, 1)]
    with atomic_write(path) as scratch:
        draw_staircases(scratch, numbered, columns, groups)


def draw_staircases(path, names, columns, groups, asides=(), title=COMPARE_TITLE):
    """Draw a PNG of v3, and below it of v2, of steps with these names.

    columns: {"v3", "v3 gain", "v3 low", ...: [N] values}; groups: prefixes of columns, keys of
    WHERE; asides, title: of draw_staircase.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    options = {"text.parse_math": False}  # a $ in a name begins no formula
    with style.context(["default", options]):
        figure = Figure((max(7, 2 + 0.6 * len(names)), 8), layout="constrained")
        for axes, metric in zip(figure.subplots(2, sharex=True), ("v3", "v2"), strict=True):
            draw_staircase(axes, names, stairs_of(metric, columns, groups), asides, title)
            axes.label_outer()
        figure.savefig(path, format="png", dpi=120)


def stairs_of(metric, columns, groups):
    """Return the series of draw_staircase of v2 or v3; columns, groups: as of draw_staircases."""
    series, endings = {}, ["", *(f" {key}" for key in NO_GAIN)]
    for group in groups:
        values = (columns[f"{group}{metric}{ending}"] for ending in endings)
        series[f"{metric} {WHERE[group]}"] = [around(*step) for step in zip(*values, strict=True)]
    return series


def draw_staircase(axes, names, series, asides=(), title=COMPARE_TITLE):
    """Draw the scores of steps one after another: a tread at each score, risers between them.

    names: of N steps; series: {label: N of (score, low, high)} of around; asides: which steps, from
    0, were only tried: hollow marks, past which the stairs go on.
    """
    n_steps, aside = len(names), np.isin(range(len(names)), asides)
    for s, (label, steps) in enumerate(series.items()):
        values, lows, highs = np.array(steps, float).T
        colour = f"C{s}"
        places = np.arange(n_steps) + 0.16 * (s - (len(series) - 1) / 2)  # bars side by side
        treads = values.copy()
        for i in np.flatnonzero(aside):
            treads[i] = treads[i - 1]
        axes.stairs(treads, np.arange(n_steps + 1) - 0.5, baseline=None, color=colour, linewidth=2,
                    label=label)
        axes.vlines(places, lows, highs, color=colour, linewidth=1)
        for ends in (lows, highs):
            axes.plot(places, ends, "_", color=colour)
        axes.plot(places[~aside], values[~aside], "o", color=colour, markersize=4)
        axes.plot(places[aside], values[aside], "o", color=colour, markersize=5, mfc="none")
    texts = [name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}" for name in names]
    fits = n_steps * (max(map(len, texts)) + 2) <= 50  # beside each other on 5 inches
    turned = {} if fits else {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(n_steps), texts, **turned)
    axes.grid(axis="y", alpha=0.3)
    if aside.any():
        title += "\nhollow: only tried, the stairs go past it"
    axes.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def around(score, gained, low, high):
    """Return (score, low, high) with the interval of its gain put on the score before."""
    return score, score - gained + low, score - gained + high


# ---- the climb -----------------------------------------------------------------------------------


def climb(preset, given):
    """Return [(Rung, its knobs {name: value}, name of the rung that it stands on)] of LADDER.

    given: {knob: value} of make's command line. A rung that changes nothing is left out, as one of
    a second scale where one is asked for, and one aside like another. Raises UserError for a knob
    that the rungs set, and for what can't be in LADDER.
    """
    check_ladder()
    for name, text in given.items():
        check_has_no_knob(name, text)
    n_folds = int(given.get("NFOLDS", 5))
    folds = " ".join(map(str, range(n_folds)))
    asked = {"MODELS": LADDER_MODELS, "FOLDS": folds, "ROUNDS": "0"} | LADDER_KNOBS[preset] | given
    check_sizes(asked)
    knobs = asked | {name: asked[name].split()[0] for name in ("EPOCHS", "ROUNDS")}
    below, rungs, tried = "", [], []
    for rung in LADDER:
        changed = change_knobs(rung, knobs, asked, given)
        is_aside = preset in rung.aside_in
        if is_aside and not rungs:
            raise UserError(f"LADDER: {rung.name}, the lowest rung, can't be aside: the others "
                            "stand on it")
        is_repeated = changed == knobs or (is_aside and changed in tried)
        if rungs and is_repeated:
            continue
        if rungs and not {*changed["FOLDS"].split()} & {*knobs["FOLDS"].split()}:
            raise UserError(f"LADDER: {rung.name} has FOLDS={changed['FOLDS']}, {below} below it "
                            f"FOLDS={knobs['FOLDS']}: no photo is out of fold in both, so they "
                            "can't be compared")
        rungs.append((rung, changed, below))
        if is_aside:
            tried.append(changed)
        else:
            knobs, below = changed, rung.name
    return rungs


def change_knobs(rung, knobs, asked, given):
    """Return the knobs {name: value} of a rung that stands on one with `knobs`.

    asked: the knobs of the whole climb; given: those of them from the command line. Raises
    UserError where both the command line and the rung set something.
    """
    changed = dict(knobs)
    for name, value in rung.knobs.items():
        if isinstance(value, int):
            words = asked[name].split()
            changed[name] = " ".join(words[:value] if value > 0 else words[value:])
        elif name.endswith("_ARGS"):
            if both := option_names(given.get(name, "")) & option_names(value):
                raise UserError(f"{name}={given[name]}: rungs of the ladder set {min(both)} "
                                "themselves: see LADDER in ensemble.py")
            changed[name] = f"{knobs.get(name, '')} {value}".strip()
        elif name in given:
            raise UserError(f"{name}={given[name]}: rungs of the ladder set {name} themselves: "
                            "see LADDER and LADDER_KNOBS in ensemble.py")
        else:
            changed[name] = value
    return changed


def option_names(text):
    """Return a Counter of the options such as --loss in a text of arguments."""
    return Counter(word.partition("=")[0] for word in text.split() if word.startswith("--"))


def check_has_no_knob(name, text, where="", n_own=0):
    """Raise UserError if the text of one of *_ARGS has an option that is a knob of its own.

    where: words before its name; n_own: how often make itself has put each of them into the text.
    """
    given = option_names(text)
    for option, knob in HAVE_A_KNOB.get(name, {}).items():
        if given[option] > n_own:
            raise UserError(f"{where}{name}: write {knob}= instead of {option}")


def check_sizes(asked):
    """Raise UserError unless there are SCALES and EPOCHS, from a trial's to those of the full size.
    """
    for name in ("SCALES", "EPOCHS"):
        values = asked.get(name, "").split()
        if not values:
            raise UserError(f"LADDER_KNOBS in ensemble.py: a preset without {name}")
        numbers = [int(value) for value in values if value.isdecimal()]
        if numbers != sorted(set(numbers)):
            raise UserError(f"{name}={asked[name]}: a ladder takes the lowest first, as its ideas "
                            "are tried at it")
    if len(asked["EPOCHS"].split()) > 2:
        raise UserError(f"EPOCHS={asked['EPOCHS']}: a ladder takes one or two numbers: those of a "
                        "trial, and of the rungs from full-size on")


def check_ladder():
    """Raise UserError for what can't be in LADDER: a name, a number or a preset."""
    for rung in LADDER:
        if not (isinstance(rung, Rung) and isinstance(rung.name, str)
                and isinstance(rung.knobs, dict)):
            raise UserError(f'LADDER: {rung!r}: write Rung("name", {{"KNOB": "value"}}, "why")')
    names = [rung.name for rung in LADDER]
    for rung in LADDER:
        is_taken = re.fullmatch("data|code|report|pseudo|r[0-9]", rung.name)
        if is_taken or not re.fullmatch(r"\w[\w+-]*", rung.name, re.ASCII):
            raise UserError(f"LADDER: a rung {rung.name!r}: the name, of its folder in out/EXP, is "
                            "made of letters, digits, _ + -, and is none of data, code, report, "
                            "pseudo and r0 to r9")
        if names.count(rung.name) > 1:
            raise UserError(f"LADDER: two rungs have the name {rung.name}, and so the same folder")
        if not isinstance(rung.aside_in, tuple) or set(rung.aside_in) - set(LADDER_KNOBS):
            raise UserError(f"LADDER: {rung.name}: aside_in is a tuple of presets, of "
                            f"{', '.join(LADDER_KNOBS)}, not {rung.aside_in!r}")
        for knob, value in rung.knobs.items():
            if knob not in RUNG_KNOBS:
                raise UserError(f"LADDER: {rung.name}: {knob} is no knob of a rung; there are "
                                f"{', '.join(RUNG_KNOBS)}")
            if type(value) not in (int, str):
                raise UserError(f"LADDER: {rung.name}: {knob}: {value!r} is neither a text nor a "
                                "whole number")
            if isinstance(value, int) and knob not in LIST_KNOBS:
                raise UserError(f'LADDER: {rung.name}: write a text, "{knob}": "{value}"; a number '
                                f"takes so many of {', '.join(LIST_KNOBS)}")
            if isinstance(value, int) and (value < -1 or value == 0):
                raise UserError(f"LADDER: {rung.name}: {knob}: {value}: 2 takes the first two, -1 "
                                "the last one")
            check_has_no_knob(knob, str(value), f"LADDER: {rung.name}: ")


def make_words(knobs):
    """Return the knobs {name: value} as words of make's command line."""
    return [f"{name}={value}" for name, value in knobs.items()]


def rungs(args):
    """Print rung_lines. What the table of the ladder needs is looked at first, before hours go."""
    steps = climb(args.preset, dict(args.knobs))
    check_encoders(dict.fromkeys(" ".join(knobs["MODELS"] for _, knobs, _ in steps).split()))
    _, test = load_data(args.data, args.cache, **data_options(vars(args)))
    if path := truth_file(args.data, args.truth):
        load_truths(path, test, args.paint)
    print("\n".join(rung_lines(steps)))


def rung_lines(steps):
    """Return lines of rungs.tsv: a rung's name, one that is made before it or "", its make's knobs.

    steps: of climb. Tabs stand between.
    """
    return ["\t".join([rung.name, earlier, *make_words(knobs)])
            for (rung, knobs, _), earlier in zip(steps, same_recipe_before(steps), strict=True)]


def same_recipe_before(steps):
    """Return for each step of climb the name of the last one below with its recipe, or "".

    They may have runs in common, so the lower one is made first. Other rungs are made at once.
    """
    names, last = [], {}
    for rung, knobs, _ in steps:
        recipe = tuple(knobs.get(name) for name in RECIPE_KNOBS)
        names.append(last.get(recipe, ""))
        last[recipe] = rung.name
    return names


def ladder(args):
    """Show what each rung gains over the one below, out of fold and on a labelled test set.

    Writes EXP/ladder.csv, ladder.png and report.html.
    """
    steps = climb(args.preset, dict(args.knobs))
    path = args.exp / "rungs.tsv"
    if not path.exists():
        raise UserError(f"{path} is missing: run make ladder")
    if path.read_text().splitlines() != rung_lines(steps):
        raise UserError(f"{path} was climbed with another LADDER or other knobs: run make ladder "
                        "again, which makes what has changed")
    train, test = load_data(args.data, args.cache, **data_options(vars(args)))
    scored = {"": {rung.name: read_oof_counts(args.exp / rung.name) for rung, _, _ in steps}}
    if path := truth_file(args.data, args.truth):
        truths = load_truths(path, test, args.paint)
        scored["test "] = {rung.name: submission_counts(args, rung.name, test, truths)
                           for rung, _, _ in steps}
    honest = [*scored][-1]  # the labelled test set, if there is one
    judged_by = [f"{honest}{metric}" for metric in ("v2", "v3")]
    rows = []
    for rung, knobs, below in steps:
        is_aside = args.preset in rung.aside_in
        row = {"rung": rung.name, "over": below, "aside": "yes" if is_aside else ""}
        for prefix, counts in scored.items():
            row |= rung_scores(prefix, counts, rung.name, below, args.batch)
        row |= read_cost(args.exp / rung.name, knobs)
        row["verdict"] = verdict(row, judged_by) if below else "the lowest rung"
        adds = {name: knobs[name] if isinstance(value, int) else value
                for name, value in rung.knobs.items()}
        rows.append(row | {"adds": " ".join(make_words(adds)), "why": rung.why})
    show_ladder(args, rows, scored, train.classes)


def read_oof_counts(folder):
    """Return {image id: pixel counts [C, C]} of a rung's vote, each image held out."""
    path = oof_file(folder / "submission.csv")
    try:
        with np.load(path) as saved:
            return dict(zip(saved["ids"].tolist(), saved["counts"], strict=True))
    except (OSError, ValueError, KeyError, BadZipFile) as e:
        raise UserError(f"{path}: {e}: run make ladder, which makes it") from None


def submission_counts(args, name, test, truths):
    """Return {image id: pixel counts [C, C]} of the submission of rung `name` by truths [N, S, S].
    """
    preds = masks_of(args.exp / name / "submission.csv", None, args, test)
    return {image_id: confusion(pred, truth, len(test.classes))
            for image_id, pred, truth in zip(test.ids, preds, truths, strict=True)}


def rung_scores(prefix, counts, name, below, batch):
    """Return columns of ladder.csv: a rung's scores and gains over the rung `below`, "" if none.

    counts: {rung: {image id: [C, C]}}. Scores are of all its images, gains of those that both have.
    """
    own, other = counts[name], counts.get(below)
    pixels = np.stack([*own.values()])
    result = scores(pixels, batch)
    row = {f"{prefix}images": len(own)} | {f"{prefix}{v}": result[v] for v in ("v1", "v2", "v3")}
    for metric in ("v2", "v3"):
        gained = shared_gain(own, other, metric) if other else NO_GAIN
        row |= {f"{prefix}{metric} {key}": value for key, value in gained.items()}
    return row


def shared_gain(after, before, metric):
    """Return gain() of the images that both have; after, before: {image id: [C, C]}."""
    shared = [image_id for image_id in after if image_id in before]
    if not shared:
        return NO_GAIN
    return gain(*(np.stack([counts[i] for i in shared]) for counts in (after, before)), metric)


def climbed_scores(rows, label):
    """Return the score of the lowest rung, and of each other that of the rung below plus the gain.

    So the picture has no step where a rung predicts more images and no pixel differs otherwise.
    rows: of ladder.csv; label: a column such as "test v3".
    """
    levels = {}
    for row in rows:
        below = row["over"]
        levels[row["rung"]] = levels[below] + row[f"{label} gain"] if below else row[label]
    return [*levels.values()]


def show_ladder(args, rows, scored, classes):
    """Print the climb, and write it as EXP/ladder.csv, ladder.png and report.html.

    rows: of ladder.csv; scored: {prefix of the columns: {rung: {image id: [C, C]}}}.
    """
    import pandas as pd
    write_table(args.exp / "ladder.csv", pd.DataFrame(rows))
    table = pd.DataFrame([compact_row(row, scored) for row in rows])
    names = [row["rung"] for row in rows]
    asides = [i for i, row in enumerate(rows) if row["aside"]]
    note = climb_text([row["rung"] for row in rows if not row["aside"]], scored)
    print(f"{as_text(table)}\n{note}")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for label in (f"{prefix}{metric}" for prefix in scored for metric in ("v2", "v3")):
        columns[label] = climbed_scores(rows, label)
    with atomic_write(args.exp / "ladder.png") as scratch:
        draw_staircases(scratch, names, columns, scored, asides, CLIMB_TITLE)
    figures = []
    for metric in ("v3", "v2"):
        draw = partial(draw_staircase, names=names, series=stairs_of(metric, columns, scored),
                       asides=asides, title=CLIMB_TITLE)
        figures.append((f"The climb in {metric}", figure_urls(draw, 5)))
    iou = {"class": classes}
    for name, counts in [*scored.values()][-1].items():
        iou[name] = class_iou(sum(counts.values()))
    sections = [
        {"title": "ladder", "note": note, "table": table, "figures": figures},
        {"title": "IoU of each class", "table": pd.DataFrame(iou), "note": WHERE[[*scored][-1]]},
        {"title": "what each rung adds",
         "table": pd.DataFrame(rows)[["rung", "over", "adds", "why"]],
         "note": "Each rung is an experiment of its own, with a report.html in its folder."}]
    write_page(args.exp / "report.html", f"Ladder: {args.exp.name}", sections, classes)
    print(f"{args.exp}/ladder.csv, ladder.png, report.html: the ladder")


def compact_row(row, scored):
    """Return a row of ladder.csv as it is printed: each gain in one cell with its interval."""
    shown = {"rung": row["rung"], "over": row["over"] or "-", "aside": row["aside"] or "-"}
    for prefix in scored:
        for name in ("images", "v1", "v2", "v3"):
            shown[f"{prefix}{name}"] = row[f"{prefix}{name}"]
        for metric in ("v2", "v3"):
            gained = (row[f"{prefix}{metric} {key}"] for key in NO_GAIN)
            shown[f"{prefix}{metric} gain"] = gain_text(*gained)
    for key in ("seconds", "cpu_seconds"):
        shown[key] = "-" if math.isnan(row[key]) else f"{row[key]:.0f}"
    return shown | {"verdict": row["verdict"]}


def climb_text(names, scored):
    """Return sentences on the climb over the rungs `names`, from the lowest to the highest."""
    first, last = names[0], names[-1]
    sentences = ["Scores are of all images of a rung, gains of those that both rungs predict, with "
                 f"the 95% interval for {FEW_IMAGES} or more."]
    for prefix, counts in scored.items():
        v2, v3 = (gain_text(*shared_gain(counts[last], counts[first], metric).values())
                  for metric in ("v2", "v3"))
        sentences.append(f"From {first} to {last} {WHERE[prefix]}: v2 {v2}, v3 {v3}.")
    if len(scored) == 1:
        sentences.append("What folds are worth shows only on test photos with a truth: --truth "
                         "FILE (make: TRUTH=FILE), or HOLDOUT=0.15. Weights and steps after the "
                         "vote that are fitted are taken only if they gain out of fold, so their "
                         "gain out of fold is rather too high.")
    return " ".join(sentences)


def read_cost(folder, knobs):
    """Return {"seconds", "cpu_seconds"} of a rung: what make took for what no other rung had made.

    make ladder adds a line to cost.csv each time that it makes something or fails. Lines of other
    knobs than {name: value} don't count.
    """
    path, wanted = folder / "cost.csv", " ".join(make_words(knobs)).split()
    names = ("seconds", "user", "system")
    costs = []
    for line, row in read_rows(path, (*names, "knobs")) if path.exists() else ():
        if row["knobs"].split() == wanted:
            costs.append([as_number(row[name], f"{path} line {line}: {name}") for name in names])
    seconds, user, system = np.sum(costs, axis=0) if costs else 3 * [math.nan]
    return {"seconds": seconds, "cpu_seconds": user + system}


# ---- a test set that is held out -----------------------------------------------------------------


def choose_held_out(present, groups, n_folds):
    """Return which images to hold out, bool [N]: a fold of make_folds, one of `n_folds`.

    present: bool [N, K], which classes an image has; groups: N labels. It is the fold that leaves
    the fewest classes without an image in training and then, of these, in itself.
    """
    folds = make_folds(present, groups, n_folds)

    def lost(fold):
        """Return how many classes have no image outside the fold, and how many none in it."""
        outside, inside = present[folds != fold].any(0), present[folds == fold].any(0)
        return (~outside).sum(), (~inside).sum()
    return folds == min(range(n_folds), key=lost)


def link_photos(folder, links):
    """Make the links {name: target} in a folder; raise UserError where something else stands."""
    for name, target in links.items():
        path = folder / name
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            raise UserError(f"{path} is in the way of a link to {target}: choose another --out")
        path.symlink_to(target)


def write_held_out(folder, coco, held_ids):
    """Write train.json and test.json of a COCO file: the images `held_ids` are in test.json."""
    for name, in_test in (("train.json", False), ("test.json", True)):
        parts = {}
        for key, id_key in (("images", "id"), ("annotations", "image_id")):
            parts[key] = [entry for entry in coco[key]
                          if (whole_numbers(entry)[id_key] in held_ids) == in_test]
        with atomic_write(folder / name) as scratch:
            scratch.write_text(json.dumps(coco | parts))  # also NaN, as it stood there


def holdout(args):
    """Write a DATA whose test photos are held out of the labelled ones, unless it is there."""
    check_output(args.data, args.folder)
    data, folder, hashes = args.data, args.folder, Hashes(args.cache)
    train, _ = load_data(data, args.cache, **data_options(vars(args)))
    names = ("train.json", "test.json")
    links = {Path(name).parts[0]: None for name in train.file_names}
    links = {name: os.path.abspath(data / name) for name in links}
    if taken := {*links} & {"holdout.json", "replaced", "train_all.json", *names}:
        raise UserError(f"{data}/{min(taken)}: photos can't lie there, holdout writes such a file")
    n_folds = min(range(2, 21), key=lambda n: abs(1 / n - args.share))
    if (n_groups := len(set(train.groups))) < n_folds:
        raise UserError(f"{data}: {n_groups} group(s) of photos are too few to hold out a share of "
                        f"{args.share:g}: take a larger --share")
    wanted = {"share": args.share, "data": train.fingerprint, "links": links}
    made = folder / "holdout.json"
    with lock(folder):
        there = read_own_json(made, {"files": {str: str}})
        files = {name: hashes(folder / name) for name in names}
        has_links = all(os.path.realpath(folder / name) == os.path.realpath(target)
                        for name, target in links.items())
        if there == wanted | {"files": files} and has_links:
            print(f"{folder} is there and was made like this: nothing to do")
            return
        present = np.array(train.pixels)[:, 1:] > 0
        held = choose_held_out(present, train.groups, n_folds)
        held_ids = {image_id for image_id, is_held in zip(train.ids, held, strict=True) if is_held}
        move_aside(folder, ["holdout.json", *names, "train_all.json"])
        link_photos(folder, links)
        write_held_out(folder, read_json(data_files(data)[0]), held_ids)
        files = {name: hashes(folder / name) for name in names}
        write_json(made, wanted | {"files": files})
        move_mark(made).unlink(missing_ok=True)
        tell_held_out(folder, train.classes[1:], present, held)


def tell_held_out(folder, classes, present, held):
    """Print how many photos are held out, and which classes one of both sides lacks."""
    text = f"{folder}: {held.sum()} of {len(held)} photos are held out, {held.mean():.1%}"
    for where, images in (("the held-out photos", held), ("training", ~held)):
        absent = present.any(0) & ~present[images].any(0)
        if absent.any():
            text += f"; not in {where}: {', '.join(np.array(classes)[absent])}"
    print(text)


# ---- what make asks: the arguments of the scripts ------------------------------------------------


class Answers:
    """What the other scripts make of their command lines, each asked as a process of its own.

    Answers are remembered in CACHE/arguments/STATE, STATE being the code_state: other code may
    answer otherwise.
    """

    def __init__(self, cache, n_processes):
        self.folder = cache / "arguments" / code_state()
        self.n_processes = n_processes
        self.new = {}  # file -> answer, for save

    def ask(self, lines):
        """Return {script: Namespace} of {script: [argument]}; paths are text.

        Raises UserError with the script's own line if it refuses them.
        """
        paths = {}
        answers = {}
        processes = {}
        for script, line in lines.items():
            key = short_hash(script, line, self.n_processes)
            paths[script] = self.folder / f"{key}.json"
            answers[script] = remembered_answer(paths[script])
            if answers[script] is None:
                processes[script] = start_script(script, line, self.n_processes)
        outputs = {script: process.communicate() for script, process in processes.items()}
        for script, (stdout, stderr) in outputs.items():
            if processes[script].returncode:
                raise UserError(own_line(stderr))
            answers[script] = self.new[paths[script]] = json.loads(stdout)
        return {script: argparse.Namespace(**answer) for script, answer in answers.items()}

    def save(self):
        """Write what is new and remove the answers of other code.

        A cache that can't be written is no error.
        """
        for path, answer in self.new.items():
            with suppress(OSError):
                write_json(path, {"answer": answer, "hash": short_hash(answer)})
        self.new = {}
        for folder in self.folder.parent.glob("*"):
            if folder != self.folder:
                shutil.rmtree(folder, ignore_errors=True)


def remembered_answer(path):
    """Return the answer in the file `path`; None if there is none or its --weights are gone."""
    remembered = read_own_json(path, {"answer": dict, "hash": str})
    if remembered is None or short_hash(remembered["answer"]) != remembered["hash"]:
        return None
    answer = remembered["answer"]
    weights = answer.get("weights", "none")
    return answer if weights in ("imagenet", "none") or Path(weights).exists() else None


def start_script(script, line, n_processes):
    """Start a script that checks its arguments as one of `n_processes`, and prints them as JSON."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *line, "--show-args"]
    env = os.environ | dict.fromkeys(TORCHRUN, "0") | {"WORLD_SIZE": str(n_processes)}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def own_line(stderr):
    """Return the line, the last, in which a script says why it stopped; all of a traceback."""
    text = stderr.rstrip()
    if not text:
        return "a script ended without a word: out of memory, or killed"
    return text if '  File "' in text else text.splitlines()[-1]


def script_lines(args):
    """Return {script: [argument]} of train, infer and pseudo_label, as make passes them.

    The models and scales of the grid are given one after the other: the script checks each value,
    and the last one stays.
    """
    cache = ["--data", str(args.data), "--cache", str(args.cache)]
    exp = ["--exp", str(args.exp)]
    grid = []
    for model in (*args.models, *args.pick_models):
        grid += ["--model", model]
    for scale in (*args.scales, *args.pick_scales):
        grid += ["--scale", scale]
    more = ["--unlabelled", args.unlabelled] if args.unlabelled else []
    split = ["--fold", numbered(args.folds)[0], "--folds", str(args.nfolds), *more]
    if args.extra:
        split += ["--extra", *args.extra]
    for name, value in data_options(vars(args)).items():
        split += [f"--{name}", value]
    return {
        "train.py": [*cache, *exp, *grid, *split, *args.train_args.split()],
        "infer.py": [*cache, "--checkpoint", "model.pt", *args.infer_args.split()],
        "pseudo_label.py": [*cache, *exp, "--round", "1", "--fold", "0", *more,
                            *args.pseudo_args.split(), "x"]}


def read_arguments(args, answers):
    """Return the arguments of train, infer, pseudo_label and soft, each a Namespace.

    Raises UserError for what a script refuses or what make sets itself.
    """
    for name, text in (("TRAIN_ARGS", args.train_args), ("INFER_ARGS", args.infer_args),
                       ("SUBMIT_ARGS", args.submit_args)):
        check_has_no_knob(name, text, n_own=1)
    train, infer, pseudo = answers.ask(script_lines(args)).values()
    paths = {"data": str(args.data), "cache": str(args.cache)}
    model = [*args.models, *args.pick_models][-1]
    scale = [*args.scales, *args.pick_scales][-1]
    forbid("TRAIN_ARGS", train, **paths, exp=str(args.exp), model=model, scale=int(scale),
           fold=int(numbered(args.folds)[0]), folds=args.nfolds, of_folds=[], round=0, check=False,
           overfit=0, sweep=0, runtimes=None, **data_options(vars(args)),
           unlabelled=as_path(args.unlabelled), extra=[as_path(folder) for folder in args.extra])
    forbid("INFER_ARGS", infer, **paths, checkpoint=["model.pt"], out=None,
           split=["valid", "test"], unlabelled=None)
    forbid("PSEUDO_ARGS", pseudo, **paths, exp=str(args.exp), round=1, fold=0, stores=["x"],
           out_of_fold=[], unlabelled=as_path(args.unlabelled))
    learns = args.rounds or args.round or "pseudo" in args.goals
    if learns and pseudo.confident == "auto" and len(numbered(args.folds)) < 2:
        raise UserError("pseudo labels learn from other folds how sure is sure enough: give two "
                        "or more FOLDS, or a number, PSEUDO_ARGS='--confident 0.8'")
    out = args.exp / "submission.csv"
    soft_args = parse_args(["soft", "--data", str(args.data), "--cache", str(args.cache), "--out",
                            str(out), *args.submit_args.split(), "x"])
    forbid("SUBMIT_ARGS", soft_args, data=args.data, cache=args.cache, out=out, runs=[Path("x")])
    weights = soft_args.weights
    n_members = len(args.models) * len(args.scales)
    if weights not in ("equal", "fit") and len(weights) != n_members:
        raise UserError(f"VOTE has {len(weights)} weights for {n_members} member(s), each a model "
                        "at a scale")
    return train, infer, pseudo, soft_args


def as_path(text):
    """Return a knob's path as the scripts' answers have it: without a slash at its end."""
    return text and str(Path(text))


def forbid(knob, parsed, **wanted):
    """Raise UserError if the knob's text has set what make sets itself."""
    for name, value in wanted.items():
        if vars(parsed)[name] != value:
            raise UserError(f"{knob} sets --{name.replace('_', '-')}, which make sets itself or "
                            "can't use")


def check_grid(args):
    """Raise UserError if a value is given twice, or a number isn't written plainly."""
    for knob, values in (("MODELS", args.models), ("SCALES", args.scales), ("FOLDS", args.folds)):
        for value in values:
            if values.count(value) > 1:
                raise UserError(f"{knob} has {value} twice")
    for scale in (*args.scales, *args.pick_scales):
        if not re.fullmatch("[1-9][0-9]*", scale):
            raise UserError(f"SCALES: {scale} is not a plain number such as 512")
    for model in (*args.models, *args.pick_models):
        if not re.fullmatch(r"[^/]+/[^/]+", model) or ".." in model:
            raise UserError(f"MODELS: {model} is not DECODER/ENCODER")
    for script in ("train", "infer", "pseudo", "submit"):
        if {"-h", "--help"} & {*vars(args)[f"{script}_args"].split()}:
            raise UserError(f"{script.upper()}_ARGS: for its help run the script itself with "
                            "--help")
    known = {ALL, *map(str, range(args.nfolds))}
    for fold in (*args.folds, *args.pick_folds):
        if fold not in known:
            raise UserError(f"FOLDS and FOLD go from 0 to {args.nfolds - 1}, as NFOLDS="
                            f"{args.nfolds} says, or are {ALL}, not {fold}")
    if not numbered(args.folds):
        raise UserError(f"FOLDS={ALL}: the folds choose how long a run on all images trains: "
                        f'FOLDS="0 1 {ALL}"')


def numbered(folds):
    """Return those of the folds that hold images out."""
    return [fold for fold in folds if fold != ALL]


def check_encoders(models):
    """Raise UserError if neither timm nor segmentation-models-pytorch knows a model's encoder."""
    import segmentation_models_pytorch as smp
    import timm

    def is_known(encoder):
        if encoder.startswith("tu-"):
            return timm.is_model(encoder[3:])
        return encoder in smp.encoders.encoders
    for model in models:
        encoder = model.partition("/")[2]
        if not is_known(encoder):
            raise UserError(f"MODELS: {model}: there is no encoder {encoder}; those of timm begin "
                            "with tu-")


def check_models(current, runs):
    """Raise UserError if one of these runs, (model, scale, fold), can't be made by a Plan.

    A model must work at its scale, at --scale and --tta-scales of infer.py, with its file of
    weights if it has one, and with what TRAIN_ARGS asks of its encoder.
    """
    train = current.train_args
    check_encoders(sorted({model for model, _, _ in runs}))
    for model, fold in sorted({(model, fold) for model, _, fold in runs}, key=str):
        if path := weights_file(train.weights, model):
            check_unseen(path, current.held_out(fold), fold)
    for model, scale in sorted({(model, scale) for model, scale, _ in runs}):
        built = build_model(model, 1, scale=scale, drop_path=train.drop_path)
        layer_factors(built, model, train.layer_decay)
        tried = try_sides(built, model, [scale])
        try_asked_sides(tried, model, scale, vars(current.infer_args), "INFER_ARGS: ")
        if path := weights_file(train.weights, model):
            load_weights(built, model, path)
        if train.grad_checkpoint:
            checkpoint_gradients(built, model)


# ---- what make asks: what fits into a budget -----------------------------------------------------


def budget(args):
    """Print "EPOCHS FOLD ...": what trains for as long as the budget allows.

    EXP/budget.json remembers the answer: asked the same again, other speeds change nothing.
    """
    check_grid(args)
    if ALL in args.folds:
        raise UserError(f"BUDGET chooses FOLDS, and not {ALL}: take the folds it chooses, with "
                        f"their EPOCHS, then add {ALL}")
    path = args.exp / "budget.json"
    answers = Answers(args.cache, args.gpus)
    train_args, infer_args, _, _ = read_arguments(args, answers)
    if train_args.crop == "native" or train_args.repeat > 1 or infer_args.scale:
        raise UserError("BUDGET takes each photo for one image of its SCALE: with --crop native, "
                        "--repeat or INFER_ARGS=--scale give EPOCHS")
    if not args.dry:
        answers.save()
    options = data_options(vars(args))
    train, test = load_data(args.data, args.cache, **options)
    extras = [load_extra(folder, train, test, args.cache, **options) for folder in args.extra]
    n_extra = sum(len(indices) for _, indices in extras)
    n_more = 0
    if folder := args.unlabelled:
        n_more = len(load_unlabelled(folder, train, test, args.cache, args.orientation).ids)
    asked = {"budget": args.budget, "models": args.models,
             "scales": args.scales, "folds": args.folds, "keep_folds": args.keep_folds,
             "nfolds": args.nfolds, "rounds": args.rounds, "batch": train_args.batch,
             "tta": tta_name(infer_args), "data": train.fingerprint, "test": test.fingerprint,
             "snapshots": train_args.snapshots, "gpus": args.gpus, "extra": n_extra,
             "unlabelled": n_more}
    answer = read_own_json(path, {"asked": dict, "epochs": int, "folds": [str]})
    if answer is None or answer["asked"] != asked:
        if args.dry:
            raise UserError("BUDGET: nothing is measured yet, so nobody knows the EPOCHS: make "
                            "train or submit measures")
        speeds = measure_speeds(args, train_args.batch)
        n_views = len(tta_views(infer_args.tta)) * len(infer_args.tta_scales)
        n_views *= max(1, train_args.snapshots)
        epoch, rest = seconds_of_a_fold(speeds, len(train.ids), len(test.ids), args.nfolds, n_views,
                                        args.rounds, n_extra, n_more)
        epochs, folds = share_budget(args, count_lanes(args), epoch, rest)
        answer = {"asked": asked, "epochs": epochs, "folds": folds}
        write_json(path, answer)
    print(f"BUDGET: {answer['epochs']} epochs on fold(s) {' '.join(answer['folds'])}",
          file=sys.stderr)
    print(answer["epochs"], *answer["folds"])


def measure_speeds(args, batch):
    """Return [(images/s trained, images/s predicted)] of each model at each scale, here and now."""
    table = args.exp / "budget.csv"
    table.unlink(missing_ok=True)
    for model, scale in itertools.product(args.models, args.scales):
        script = str(Path(__file__).with_name("train.py"))
        line = [sys.executable, script, "--data", str(args.data), "--exp", str(args.exp), "--model",
                model, "--scale", scale, "--batch", str(batch), "--device", args.device,
                "--runtimes", str(table)]
        if subprocess.run(line, stdout=sys.stderr).returncode:
            raise UserError(f"BUDGET: {model} at {scale} can't be measured, for the reason above")
    speeds = []
    for line, row in read_rows(table, ("model", "scale", "train_images_per_s",
                                       "infer_images_per_s", "reason")):
        if row["reason"]:
            raise UserError(f"BUDGET: {row['model']} at {row['scale']}: {row['reason']}")
        speeds.append([as_number(row[key], f"{table} line {line}: {key}")
                       for key in ("train_images_per_s", "infer_images_per_s")])
    return speeds


def seconds_of_a_fold(speeds, n_train, n_test, n_folds, n_views, n_rounds, n_extra=0, n_more=0):
    """Return (seconds of an epoch, seconds besides) of one run of each model and scale together.

    They are the mean over the rounds 0 to n_rounds. Rounds from 1 on also label the test photos and
    the `n_more` unlabelled ones, and train on them; all are assumed to be kept. speeds: of
    measure_speeds; n_train, n_test, n_extra: photos; n_views: predictions of a photo, by TTA and
    snapshots.
    """
    n_valid = n_train / n_folds
    labelled_share = n_rounds / (1 + n_rounds)
    n_trained = n_train - n_valid + n_extra + labelled_share * (n_test + n_more)
    n_predicted = n_valid + n_test + labelled_share * n_more
    epoch = sum(n_trained / trained + n_valid / predicted for trained, predicted in speeds)
    rest = sum(START_SECONDS + n_predicted * n_views / predicted for _, predicted in speeds)
    return epoch, rest + labelled_share * START_SECONDS


def count_lanes(args):
    """Return how many runs are trained at a time: one on every --gpus GPUs, or one on the CPU."""
    import torch
    return max(1, torch.cuda.device_count() // args.gpus) if args.device == "auto" else 1


def share_budget(args, n_lanes, epoch, rest):
    """Return (epochs, folds): as many folds as have ENOUGH_EPOCHS, or else one, two with rounds.

    n_lanes: runs at a time; epoch, rest: of seconds_of_a_fold. Raises UserError if there is no time
    for an epoch.
    """
    seconds = (BUDGET_SHARE * args.budget - START_SECONDS) / (1 + args.rounds)
    n_members = len(args.models) * len(args.scales)

    def epochs_of(n_folds):
        """Return the epochs of runs that are trained n_lanes at a time, one lot after another."""
        lots = math.ceil(n_folds * n_members / n_lanes)
        return math.floor((seconds / lots * n_members - rest) / epoch)
    least = len(args.folds) if args.keep_folds else min(len(args.folds), 1 + (args.rounds > 0))
    n_folds = next((n for n in range(len(args.folds), least, -1) if epochs_of(n) >= ENOUGH_EPOCHS),
                   least)
    epochs = min(epochs_of(n_folds), MOST_EPOCHS)
    if epochs < 1:
        raise UserError(f"BUDGET: {args.budget} s have no room for one epoch, of {epoch:.0f} s for "
                        f"each fold, and {rest:.0f} s to start and predict: more time, a smaller "
                        "SCALES or fewer MODELS")
    return epochs, args.folds[:n_folds]


# ---- what make asks: what sibling experiments have -----------------------------------------------


class Siblings:
    """The experiments in the folder of EXP, out/lad/b of out/lad/a, from which it takes artefacts.

    What would be made in EXP just as a sibling has it is linked instead: no script writes into a
    file that stands, so that a file may have two names. out/a has no siblings.

    shared: {JSON that describes what was taken: (kind, sibling, "linked" or "copied")}.
    """

    def __init__(self, args, hashes):
        self.exp, self.hashes = args.exp, hashes
        self.is_dry = args.dry or args.why  # then it is only told what would be taken
        self.shared = {}
        self.folders = []
        is_grouped = args.cache.parent in args.exp.parent.parents
        if is_grouped and args.exp.parent.is_dir() and not args.ready:
            folders = sorted(path for path in args.exp.parent.iterdir() if path.is_dir())
            self.folders = [folder for folder in folders if folder != args.exp]

    def take(self, kind, path, read, recipe, code, more=()):
        """Return the JSON from which EXP's artefact is to be read: `path`, or a sibling's if dry.

        path: the JSON that describes it, which isn't up to date; read(path) returns what it says;
        recipe, code: what would make it now; more: patterns of files besides those that it names.
        """
        place = path.relative_to(self.exp)
        sibling, info = self.find(place, recipe, code)
        if sibling is None:
            return path
        source = sibling / place
        if self.is_dry:
            self.shared[path] = kind, sibling, "to be linked"
            return source
        names = [*info["files"]]
        for pattern in more:
            names += sorted(file.name for file in source.parent.glob(pattern))
        before = read(path)
        # UserError: another process is at it; FileNotFoundError: the sibling was removed
        with suppress(UserError, FileNotFoundError), lock(path.parent):
            if read(path) == before:
                self.link(kind, path, sibling, info, names)
        return path

    def find(self, place, recipe, code):
        """Return (sibling, content of its JSON `place`) of one who has it whole, or two None."""
        for sibling in self.folders:
            info = read_own_json(sibling / place, DESCRIPTION_KINDS)
            if info is None or any(changes(info, recipe, code)):
                continue
            whole = read_description(sibling / place, self.hashes)  # which may read large files
            if whole and not any(changes(whole, recipe, code)):
                return sibling, info
        return None, None

    def link(self, kind, path, sibling, info, names):
        """Link the files `names` of a sibling's artefact beside `path`, then write that JSON."""
        source, folder = sibling / path.parent.relative_to(self.exp), path.parent
        begun = begun_files(folder) if path.name == "config.json" else []
        with redirect_stdout(sys.stderr):  # make reads stdout
            move_aside(folder, list(dict.fromkeys([path.name, *names, *begun])))
        copied = {name for name in names if not self.link_file(source / name, folder / name)}
        files = info["files"].items()
        if all(self.hashes(folder / name) == digest for name, digest in files):  # it still is so
            copy_code(sibling, self.exp, info)
            write_description(path, info, **info)
            how = "copied" if copied - {"index.csv"} else "linked"
            self.shared[path] = kind, sibling, how

    def link_file(self, source, target):
        """Link a file, or copy it where links can't be made; return whether it was linked.

        A link changes the ctime of all names of the file, so their hashes are remembered anew.
        """
        before, digest = os.stat(source), self.hashes.remembered(source)
        target.unlink(missing_ok=True)
        if target.name != "index.csv":  # editors may write into that file
            with suppress(OSError):
                os.link(source, target)
        if not target.exists():
            with atomic_write(target) as scratch:
                shutil.copyfile(source, scratch)
            return False
        place = target.relative_to(self.exp)
        for path in (target, *(folder / place for folder in self.folders)):
            with suppress(OSError):
                now = os.stat(path)
                same_time = now.st_mtime_ns == before.st_mtime_ns
                if digest and os.path.samestat(before, now) and same_time:
                    self.hashes.remember(self.hashes.key(path), digest)
        return True

    def lines(self):
        """Yield a line for each kind of artefact and sibling that it was taken from."""
        for (kind, sibling, how), n in Counter(self.shared.values()).items():
            yield f"{n} {kind} are those of {sibling}: {how}"


def copy_code(sibling, exp, info):
    """Copy the code that made a sibling's artefact, or that it was kept under, to EXP/code."""
    for state in (info["state"], *(kept["state"] for kept in info["kept_under"])):
        source, target = sibling / "code" / state, exp / "code" / state
        if target.exists() or not source.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
            copy = shutil.copytree(source, Path(scratch) / state)
            with suppress(OSError):  # another process was first
                copy.rename(target)


# ---- what make asks: the plan --------------------------------------------------------------------


class Plan:
    """What of an experiment isn't up to date.

    For each artefact the description of what made it is compared with what would make it now. A
    method judge_... looks at an artefact and at what it is made from. Nothing is read but JSON,
    folds.csv and index.csv, and of other files what Hashes doesn't remember.

    to_make: {file that make knows: [why it is to be made]}; to_decide: {kind: {file: names of the
    code}} of what only other code would make otherwise; other_versions: {change: [file]}.
    """

    def __init__(self, args):
        check_grid(args)
        self.args = args
        self.hashes = Hashes(args.cache)
        self.answers = Answers(args.cache, args.gpus)
        arguments = read_arguments(args, self.answers)
        self.train_args, self.infer_args, self.pseudo_args, self.submit_args = arguments
        self.to_make = {}
        self.to_decide = defaultdict(dict)
        self.other_versions = defaultdict(list)
        self.siblings = Siblings(args, self.hashes)
        self.versions = library_versions() if args.why else {}
        self.results = {}  # of once
        # whose photos get pseudo labels
        self.labelled_splits = ("test", "unlabelled") if args.unlabelled else ("test",)
        self.tta = tta_name(self.infer_args)
        self.data = self.current_data()
        self.fold_numbers = self.current_folds()  # of the training images, None if unknown yet
        self.folds = None
        if self.fold_numbers is not None:
            self.folds = folds_hash(self.data["ids"], self.fold_numbers)

    def save(self):
        """Write the hashes and answers that are new, for the next time."""
        self.hashes.save()
        self.answers.save()

    def current_data(self):
        """Return {"train", "test": fingerprints, "ids": of the training images, "index": ...}.

        The index is that of the cache if just these photos have been checked, else None. "extra"
        has a fingerprint of each of --extra, "unlabelled" one of that folder, "photos" that of all
        photos which pseudo labels are made for.
        """
        paths = data_files(self.args.data)
        settings = data_options(vars(self.args))
        folder = cache_folder(self.args.cache, paths, settings, self.hashes)
        index = read_index_json(folder, self.hashes)
        if index:
            names = [index[split]["file_names"] for split in ("train", "test")]
            ids = index["train"]["ids"]
            checked = {split: index[split]["digests"] for split in ("train", "test")}
        else:
            listed = [images_in(path) for path in paths]
            names = [[image.get("file_name") for image in images] for images in listed]
            ids = [image.get("id") for image in listed[0]]
        check_names(self.submit_args, names[1])
        data = {"ids": ids}
        for split, path, file_names in zip(("train", "test"), paths, names, strict=True):
            digests = self.hashes.of_all([f"{self.args.data}/{name}" for name in file_names])
            data[split] = fingerprint(self.hashes(path), settings, digests)
            if index and digests != checked[split]:
                index = None
        classes = index["train"]["classes"] if index else []
        extra = [join_fingerprints(self.extra_fingerprint(folder, settings, classes), data["test"])
                 for folder in self.args.extra]
        data |= {"index": index, "extra": extra, "photos": data["test"]}
        if folder := self.args.unlabelled:
            names, _ = find_photos(folder)
            digests = self.hashes.of_all([f"{folder}/{name}" for name in names])
            settings = {"orientation": self.args.orientation}
            own = fingerprint(short_hash(names), settings, digests)
            data["unlabelled"] = join_fingerprints(own, data["train"], data["test"])
            data["photos"] = join_fingerprints(data["test"], data["unlabelled"])
        return data

    def extra_fingerprint(self, folder, settings, classes):
        """Return the fingerprint of the labelled photos in a folder of --extra.

        classes: of the data, by which the cache knows the names of the photos without the JSON.
        """
        path = extra_json(folder)
        place = cache_folder(self.args.cache, [path], settings, self.hashes, classes)
        if index := read_index_json(place, self.hashes):
            names = index["train"]["file_names"]
        else:
            names = [image.get("file_name") for image in images_in(path)]
        digests = self.hashes.of_all([f"{folder}/{name}" for name in names])
        return fingerprint(self.hashes(path), settings, digests)

    def current_folds(self):
        """Return folds.csv's list of fold numbers, or what will be there; None if unknown yet."""
        path = self.args.exp / "folds.csv"
        index = self.data["index"]
        if path.exists():
            folds, fault = read_folds(path, self.data["ids"], self.args.nfolds)
            if not fault:
                return folds.tolist()
        self.to_make[path] = [f"it {fault}" if path.exists() else "it is missing"]
        if not index:
            return None
        pixels, groups = index["train"]["pixels"], index["train"]["groups"]
        return new_folds(path, self.data["ids"], pixels, groups, self.args.nfolds).tolist()

    def held_out(self, fold):
        """Return the set of hashes of the photo files that a fold holds out, if known yet."""
        if self.fold_numbers is None or not self.data["index"]:
            return set()
        digests = self.data["index"]["train"]["digests"]
        return {digest for digest, number in zip(digests, self.fold_numbers, strict=True)
                if number == fold}

    def own_or_shared(self, kind, path, read, recipe, code, more=()):
        """Return the JSON from which an artefact is to be read: `path`, or that of a sibling.

        One that isn't up to date is taken from a sibling that has it, unless it is a question to
        the user. The arguments are those of Siblings.take.
        """
        description = read(path)
        if description:
            recipe_lines, code_names = changes(description, recipe, code)
            if not recipe_lines and not (code_names and self.args.code == "new"):
                return path
        return self.siblings.take(kind, path, read, recipe, code, more)

    def judge(self, kind, path, description, recipe, code, reasons=()):
        """Note an artefact if it isn't up to date; return whether its content will be another.

        description: its own, None if it isn't whole; recipe, code: what would make it now;
        reasons: why it is to be made anyway, such as a parent that is.
        """
        versions = version_changes(description, self.versions) if description else []
        if versions:
            self.other_versions[", ".join(versions)].append(path)
        if not reasons and description is None:
            reasons = ["it is missing or not whole"]
        code_names = []
        if not reasons:
            reasons, code_names = changes(description, recipe, code)
        if code_names and self.args.code == "new":
            reasons = [f"other code: {', '.join(code_names)}"]
        elif code_names and self.args.code == "keep":
            names = ", ".join(code_names)
            self.to_make[path] = [f"to be kept, though other code made it: {names}"]
        elif code_names:
            self.to_decide[kind][path] = code_names
        if reasons:
            self.to_make[path] = list(reasons)
        return bool(reasons)

    def once(self, method, *key):
        """Return method(*key), called only the first time."""
        if (method.__name__, *key) not in self.results:
            self.results[method.__name__, *key] = method(*key)
        return self.results[method.__name__, *key]

    def judge_run(self, round_, model, scale, fold):
        """Return what config.json says of a run, or None if it is to be trained."""
        folder = run_folder(self.args.exp, round_, model, scale, fold)
        args = argparse.Namespace(**vars(self.train_args) | {
            "model": model, "scale": int(scale), "fold": fold_name(fold), "round": round_})
        reasons = [] if self.folds else ["the folds are not known yet"]
        best_epochs = []
        for other in numbered(self.args.folds) if fold == ALL else ():
            run = self.once(self.judge_run, round_, model, scale, other)
            if run:
                best_epochs.append(run["epoch"])
            else:
                reasons.append(f"the run of fold {other}, which it follows, is to be trained")
        labels = ()
        if round_:
            labels = self.once(self.judge_labels, round_, fold) or ()
            if not labels:
                reasons.append(f"the pseudo labels of round {round_}, fold {fold} are to be made")
        recipe = run_recipe(args, self.data["train"], self.folds, self.hashes, *labels,
                            extra=self.data["extra"], best_epochs=best_epochs)
        code = run_code(recipe)
        config = folder / "config.json"
        if not reasons:
            config = self.own_or_shared("run(s)", config, self.read_run, recipe, code,
                                        ["log.csv", "*.png"])
        description = self.read_run(config)
        if not reasons and (not description or recipe_changes(description, recipe)):
            self.judge_begun_run(folder, recipe, code)
        path = folder / "model.pt"
        is_stale = self.judge("model(s)", path, description, recipe, code, reasons)
        return None if is_stale else description

    def read_run(self, path):
        """Return what the config.json `path` of a run says, or None if the run isn't whole."""
        return read_description(path, self.hashes)

    def judge_begun_run(self, folder, recipe, code):
        """Note a run that was interrupted if other code has begun it."""
        if not (folder / "last.pt").exists():
            return
        last = read_description(folder / "last.json", self.hashes)
        values, code_names = changes(last, recipe, code) if last else ([], [])
        if not values and code_names and self.args.code is None:
            self.to_decide["begun run(s)"][folder / "last.pt"] = code_names

    def expected_store_recipe(self, run, split):
        """Return store_recipe of what infer.py makes of a run; run: what config.json says."""
        has_snapshots = bool(self.train_args.snapshots)
        names = [name for name in sorted(run["files"]) if (name != "model.pt") == has_snapshots]
        checkpoints = [run["files"][name] for name in names]
        data = self.data["train" if split == "valid" else split]
        return store_recipe(self.infer_args, split, checkpoints, data)

    def judge_stores(self, splits, round_, model, scale, fold):
        """Return {split: description} of a run's stores, or None if one of them is to be made."""
        folder = run_folder(self.args.exp, round_, model, scale, fold)
        run = self.once(self.judge_run, round_, model, scale, fold)
        code = store_code(model, self.tta)
        stores = {}
        is_stale = False
        for split in splits if fold != ALL else [split for split in splits if split != "valid"]:
            # infer.py makes the stores of validation and test together
            path = folder / ("unlabelled.json" if split == "unlabelled" else "test.json")
            if run is None:
                self.to_make[path] = ["its run is to be trained"]
                is_stale = True
                continue
            recipe = self.expected_store_recipe(run, split)
            place = self.own_or_shared("store(s)", folder / f"{split}.json", self.read_store,
                                       recipe, code)
            store = stores[split] = self.read_store(place)
            store_is_stale = self.judge("store(s)", path, store, recipe, code)
            is_stale |= store_is_stale
            was_kept = folder / "model.pt" in self.to_make
            was_kept |= bool(store) and store["run"]["codes"] != code_hashes(run)
            if was_kept and not store_is_stale:
                self.to_make.setdefault(path, ["it is to say that its run was kept"])
        return None if is_stale else stores

    def read_store(self, path):
        """Return what a store's JSON says, or None if the store isn't whole.

        Its .npy is not read: it must have the size, and not be one that Hashes remembers to be
        another.
        """
        info, npy = read_own_json(path, DESCRIPTION_KINDS | STORE_KINDS), path.with_suffix(".npy")
        if info is None or not npy.is_file():
            return None
        size = len(info["image_ids"]) * len(info["classes"]) * SUBMIT_SIZE ** 2
        digest = self.hashes.remembered(npy)
        is_whole = npy.stat().st_size > size and digest in (None, info["files"].get(npy.name))
        return info if is_whole else None

    def judge_labels(self, round_, fold):
        """Return (labels_hash, label_settings, contaminated) of pseudo labels; None if to be made.

        Their makers' stores may be gone, as long as their models would make the same.
        """
        folder = pseudo_folder(self.args.exp, round_, fold)
        by_precision = self.pseudo_args.confident == "auto"
        judges = numbered(self.args.folds) if by_precision else []
        folds = dict.fromkeys([*judges, fold])
        grid = itertools.product([round_ - 1], self.args.models, self.args.scales, folds)
        runs = {key: self.once(self.judge_run, *key) for key in grid}
        reasons = []
        makers, out_of_fold = [], []
        for key, run in runs.items():
            if not run:
                reasons.append(f"{run_folder(self.args.exp, *key)} is to be trained")
                continue
            for split in self.labelled_splits if key[-1] == fold else ():
                makers.append(store_id({"recipe": self.expected_store_recipe(run, split)}))
            if key[-1] in judges:
                out_of_fold.append(store_id({"recipe": self.expected_store_recipe(run, "valid")}))
        args = argparse.Namespace(**vars(self.pseudo_args) | {
            "round": round_, "fold": fold_name(fold)})
        recipe = labels_recipe(args, self.data["photos"], self.folds, self.args.paint, makers,
                               out_of_fold)
        code = labels_code([(model, self.tta) for model in self.args.models], args.rule)
        path = folder / "manifest.json"
        if not reasons and not (folder / "index.csv").exists():  # its decisions by hand stay
            shared = self.own_or_shared("set(s) of pseudo labels", path, self.read_labels, recipe,
                                        code, ["sheet.png", "index.csv"])
            folder = shared.parent
        manifest = whole_manifest(folder, self.hashes)
        if self.judge("set(s) of pseudo labels", path, manifest, recipe, code, reasons):
            splits = ("valid",) if by_precision else ()
            for key in runs:
                of_fold = self.labelled_splits if key[-1] == fold else ("test",)
                self.once(self.judge_stores, (*splits, *of_fold), *key)
            return None
        return labels_hash(folder, self.hashes), label_settings(manifest), manifest["contaminated"]

    def read_labels(self, path):
        """Return what the manifest.json `path` says, or None if the labels aren't whole."""
        return whole_manifest(path.parent, self.hashes)

    def judge_submission(self):
        """Look at the submission and all that it is made from."""
        args = self.args
        out = args.exp / "submission.csv"
        grid = list(itertools.product([args.rounds], args.models, args.scales, args.folds))
        folders = [run_folder(self.args.exp, *key) for key in grid]
        stores = [self.once(self.judge_stores, ("valid", "test"), *key) for key in grid]
        reasons = [f"{folder} is to be predicted"
                   for folder, infos in zip(folders, stores, strict=True) if not infos]
        recipe = None
        if not reasons:
            valid = [infos.get("valid") for infos in stores]
            test = [infos["test"] for infos in stores]
            recipe = soft_recipe(self.submit_args, self.data["test"], self.data["train"], folders,
                                 valid, test)
        description = read_description(made_file(out), self.hashes)
        self.judge("submission(s)", out, description, recipe, code_of("submission"), reasons)

    def follow(self, goals):
        """Judge all that the goals of make need."""
        args = self.args
        picks = args.pick_models, args.pick_scales, args.pick_folds
        for goal in goals:
            if goal == "train":
                for key in itertools.product([args.round or 0], *picks):
                    self.once(self.judge_run, *key)
            elif goal == "pseudo":
                for fold in args.pick_folds:
                    self.once(self.judge_labels, args.round or 1, fold)
            elif goal == "score":
                round_ = args.rounds if args.round is None else args.round
                picked = *picks[:2], numbered(args.pick_folds)
                for key in itertools.product([round_], *picked):
                    self.once(self.judge_stores, ("valid",), *key)
            else:
                self.judge_submission()
        if (self.to_make or self.to_decide) and not self.data["index"]:
            reason = "the data has changed or hasn't been checked yet"
            self.to_make.setdefault(args.exp / "folds.csv", [reason])

    def questions(self):
        """Yield a line for each kind of artefact that other code made: the user has to decide."""
        for kind, names_by_path in self.to_decide.items():
            names = list(dict.fromkeys(itertools.chain(*names_by_path.values())))
            first = next(iter(names_by_path))
            yield code_question(f"{len(names_by_path)} {kind} in {self.args.exp} (the first: "
                                f"{first}) were", names, "CODE=new", "CODE=keep", "EXP")

    def reasons(self):
        """Yield a line for each file that isn't up to date."""
        for kind, names_by_path in self.to_decide.items():
            for path, names in names_by_path.items():
                yield (f"{path}: {kind}, made by other code: {', '.join(names)}; say CODE=new or "
                       "CODE=keep")
        for path, reasons in self.to_make.items():
            yield f"{path}: {'; '.join(reasons)}"
        for path, (_, sibling, how) in self.siblings.shared.items():
            yield f"{path} is that of {sibling}: {how}"
        for change, paths in self.other_versions.items():
            yield (f"note: {len(paths)} file(s) were made with other versions, the first "
                   f"{paths[0]}: {change}")


def images_in(path):
    """Return the objects in the list images of a COCO file that nobody has checked yet."""
    coco = read_json(path)
    images = coco.get("images") if isinstance(coco, dict) else None
    listed = images if isinstance(images, list) else []
    return [whole_numbers(image) for image in listed if isinstance(image, dict)]


def plan(args):
    """Print the files that are to be made, or why.

    Raises UserError when the user has to decide about other code.
    """
    gc.disable()  # in half a second of small objects it would take a sixth of the time
    current = Plan(args)
    current.follow(args.goals)
    if not args.dry and not args.why:
        for line in current.siblings.lines():
            print(line, file=sys.stderr)
    if args.why:
        for line in current.reasons():
            print(line)
        if not current.to_make and not current.to_decide:
            print(f"{args.exp} is up to date")
        return
    if args.ready:
        check_ready(current)
        return
    if current.to_decide:
        raise UserError("\n".join(current.questions()))
    places = [RUN_PLACE.fullmatch(os.path.abspath(path.parent))
              for path in current.to_make if path.name == "model.pt"]
    runs = {(place[3], int(place[4]), fold_name(place[5])) for place in places if place}
    if runs and not args.dry:  # seconds, but hours would be lost if the last had no encoder
        check_models(current, runs)
    if not args.dry:
        current.save()
    print("\n".join(map(str, current.to_make)))


def check_ready(current):
    """Raise UserError if something that the submission is made from isn't up to date."""
    current.to_make.pop(current.args.exp / "submission.csv", None)
    current.to_decide.pop("submission(s)", None)
    if lines := list(current.reasons()):
        raise UserError(f"{lines[0]}: changed while make ran, as by another make in this EXP; run "
                        "it again")


def status(args):
    """Print how far each run is, how long the others will take, and what isn't up to date."""
    import pandas as pd
    args.why = True
    current = Plan(args)
    current.follow(["submit"])
    picks = args.pick_models, args.pick_scales, args.pick_folds
    keys = list(itertools.product(range(args.rounds + 1), *picks))
    for key in keys:
        current.once(current.judge_run, *key)
    grid = defaultdict(dict)
    epochs_left = []
    seconds = defaultdict(list)
    for round_, model, scale, fold in keys:
        folder = run_folder(args.exp, round_, model, scale, fold)
        state, epochs, log = run_state(current, folder)
        grid[f"r{round_}/{model}/s{scale}"][f"f{fold}"] = state
        seconds[model, scale] += [row["seconds"] for row in log]
        epochs_left.append(((model, scale), epochs))
    print(pd.DataFrame(grid).T.to_string())
    medians = {kind: np.median(times) for kind, times in seconds.items() if times}
    if medians:
        mean = np.mean(list(medians.values()))  # of a model and scale without an epoch so far
        total = sum(n * medians.get(kind, mean) for kind, n in epochs_left)
        hours, minutes = divmod(round(total / 60), 60)
        print(f"{sum(n for _, n in epochs_left)} epochs are left: about {hours} h {minutes} min of "
              "training, job after job")
    for line in current.reasons():
        print(line)


def read_numbers(path, columns):
    """Return the rows of read_rows with floats in `columns`; raise UserError for what is none."""
    rows = read_rows(path, columns)
    for line, row in rows:
        for column in columns:
            row[column] = as_number(row[column], f"{path} line {line}: {column}")
    return [row for _, row in rows]


def run_state(current, run):
    """Return (state in a word or two, epochs that are left, rows of its log) of a run's folder."""
    stale = {*current.to_make, *itertools.chain(*current.to_decide.values())}
    is_stale = run / "model.pt" in stale
    if run / "config.json" in current.siblings.shared:  # not linked yet
        sibling = current.siblings.shared[run / "config.json"][1]
        run = sibling / run.relative_to(current.args.exp)
    paths = [run / "last.csv", run / "log.csv"]  # last.csv: of one that replaces another
    logs = [path for path in paths if path.exists()]
    log = read_numbers(logs[0], ("seconds",)) if logs else []
    is_trained = (run / "model.pt").exists() and not (is_stale and (run / "last.pt").exists())
    if not is_trained:
        state = f"epoch {len(log)}" if log else "missing"
        return state, max(0, current.train_args.epochs - len(log)), log
    if is_stale:
        return "stale", 0, log
    return "done" if (run / "test.json").exists() else "trained", 0, log


def main(args):
    writes_csv = args.command in ("soft", "hard")
    if writes_csv and args.out.suffix != ".csv":
        raise UserError(f"--out {args.out}: must end in .csv; a .png or .json goes beside it")
    check_outputs(args)
    commands = {"soft": soft, "hard": hard, "score": score, "compare": compare, "rungs": rungs,
                "evaluate": evaluate, "holdout": holdout, "ladder": ladder, "budget": budget,
                "plan": plan, "status": status}
    lock_out = nullcontext()
    if writes_csv:
        lock_out = lock(args.out.parent, name=f".{args.out.name}.lock")
    with lock_out:
        commands[args.command](args)


if __name__ == "__main__":
    run_script(main, parse_args())
