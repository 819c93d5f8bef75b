r"""Turn the votes of one fold's models into pseudo labels for the test photos.

    python pseudo_label.py --data DATA --exp out/main --round 1 --fold 0 \
        out/main/r0/*/*/s512/f0/test.json --out-of-fold out/main/r0/*/*/s512/f*/valid.json

Writes into EXP/rROUND/pseudo/fFOLD/:
    labels.npy      class ids, uint8 [N, 256, 256], 255 where there is no label; with --soft
                    probabilities, uint8 [N, C, 256, 256]
    sheet.png       some photos that were kept or dropped, the clearest and the least clear ones
    index.csv       a row for each photo
    manifest.json   what made the labels, how right they are expected to be, and how many photos
                    were dropped for which reason; written last
How sure a pixel must be is learnt, class by class, from predictions out of fold: so sure that of
such pixels at least --precision were right. The photos of --fold have no part in it, they only tell
how right the labels can be expected to be. To overrule the rule for a photo, set its `keep` in
index.csv to 0 or 1; empty it to let the rule decide again. Then train on.

A model that trains on labels must hold out the fold that the makers of the labels held out. Then no
validation image has had a part in its own training labels.
"""
import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import (
    ALL, BACKGROUND, IGNORE_INDEX, LINEAGE, Hashes, Parser, Split, UserError, atomic_write, by_rule,
    check_output, check_unchanged, clean, data_options, decide, fold_name, foreground_ids,
    join_photos, keep_code, labels_code, labels_recipe, load_data, load_truths, load_unlabelled,
    lock, move_aside, number, open_store, overlay, provenance, pseudo_folder, read_index,
    read_probs, run_script, store_id, truth_file, whole_manifest, write_coco, write_csv,
    write_description, write_npy_header, write_sheet)

ROUNDING = 1e-6  # in float32, 204 / 255 is 0.8000001 and not 0.8
LEAST_PHOTOS = 3  # with sure pixels of a class: fewer would open a class by chance
# what decides no result; see BESIDE in common.py
BESIDE = {
    "check_makers", "count_expected", "count_labelled", "count_reasons", "describe_labels",
    "draw_sheet", "move_labels_aside", "report_labels", "share_right", "write_manifest"}

# ---- rules ---------------------------------------------------------------------------------------
# A rule is a function (probs float32 [C, H, W], args) -> (label, sure, reason):
#     label   uint8 [H, W]   class ids, IGNORE_INDEX where there is no label
#     sure    bool [H, W]    shown on the review sheet, counted over the foreground by judge
#     reason  str            why the photo is dropped, "" to keep it
# args.thresholds, float [C], is the top probability that makes a pixel of each class sure, infinite
# for a class that labels nothing. judge drops photos without foreground by itself. A new rule needs
# its function, whose docstring begins with what --help says of it, and an entry in RULES. A number
# of its own needs a line in SETTINGS, and then stands in args. Nothing else has to be edited.


def label_every_pixel(probs, args):
    """Label every pixel, but drop photos with too many unsure pixels.

    Too many are more than the share args.max_unsure of the photo's foreground. Pixels of a class
    that labels nothing are ignored.
    """
    label = probs.argmax(0).astype(np.uint8)
    sure = probs.max(0) > args.thresholds[label] + ROUNDING
    reason = "unsure" if unsure_share(label, sure) > args.max_unsure else ""
    label[np.isinf(args.thresholds)[label]] = IGNORE_INDEX
    return label, sure, reason


def label_sure_pixels(probs, args):
    """Label the sure pixels of every photo.

    The others are ignored or made background, as args.uncertain says.
    """
    label = probs.argmax(0).astype(np.uint8)
    sure = probs.max(0) >= args.thresholds[label] - ROUNDING
    label[~sure] = IGNORE_INDEX if args.uncertain == "ignore" else 0
    return label, sure, ""


def unsure_share(pred, sure):
    """Return the share of the foreground in `pred`, class ids [H, W], that is not sure.

    It is 0 where there is no foreground.
    """
    foreground = pred > 0
    return float((~sure[foreground]).mean()) if foreground.any() else 0.0


RULES = {
    "image": label_every_pixel,
    "pixel": label_sure_pixels}

# ---- options -------------------------------------------------------------------------------------


def list_rules():
    """Return the help of --rule: every rule with the first line of its function's docstring."""
    texts = []
    for name, rule in RULES.items():
        sentence = (rule.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        texts.append(f"{name}: {sentence}" if sentence else name)
    return "; ".join(texts).replace("%", "%%")  # argparse takes % for a format


def top_probability(text):
    """Return "auto" or a number from 0 to 1; an argparse type."""
    try:
        return text if text == "auto" else number(float, 0, 1)(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}, or auto") from None


# every option that decides the labels, besides round and fold:
# name -> (type or choices or bool, default, what it is)
SETTINGS = {
    "rule": (tuple(RULES), "image", list_rules()),
    "confident": (top_probability, "auto", "a pixel is sure above this top probability, with rule "
                                           "pixel from it on; auto: by class, from --precision"),
    "precision": (number(float, 0.5, 1), 0.9, "share of the sure pixels of a class that were right "
                                              "out of fold, at least; for --confident auto"),
    "max_unsure": (number(float, 0, 1), 0.1, "rule image: a photo with more unsure pixels than "
                                             "this share of its foreground is dropped"),
    "uncertain": (("ignore", "background"), "ignore", "rule pixel: what unsure pixels become, "
                                                      "ignored in training or background"),
    "soft": (bool, False, "keep probabilities, from which training draws its labels"),
    "coco": (bool, False, "also write the kept labels as COCO JSON, labels.json")}


def parse_args(argv=None):
    parser = Parser(prog="pseudo_label.py", description=__doc__)
    what = parser.add_argument_group("what to label")
    what.add_argument("stores", type=Path, nargs="+",
                      help="test.json of models of the round before, all of this fold")
    what.add_argument("--data", type=Path, required=True, help="the competition's folder")
    what.add_argument("--exp", type=Path, required=True, help="folder of the experiment, out/EXP")
    what.add_argument("--round", type=number(int, 1, 9), required=True,
                      help="the round that will learn from the labels, from 1")
    what.add_argument("--fold", type=fold_name, required=True, metavar=f"K|{ALL}")
    what.add_argument("--allow-leak", action="store_true",
                      help="take makers of other folds or rounds too; marks every later score as "
                      "contaminated")
    what.add_argument("--out-of-fold", type=Path, nargs="+", default=[], metavar="STORE",
                      help="valid.json of the same models in all folds: by those of other folds "
                      "--confident auto decides, those of this fold tell what to expect")
    add_settings(parser.add_argument_group("rule"))
    what.add_argument("--unlabelled", type=Path, metavar="FOLDER",
                      help="photos that get labels too; infer.py has predicted them into "
                      "unlabelled.json beside each test.json")
    system = parser.add_argument_group("system: does not decide the result")
    system.add_argument("--cache", type=Path, default=Path("out/cache"),
                        help="painted masks, shared by experiments")
    system.add_argument("--truth", type=Path,
                        help="COCO file with the objects of the test photos, else test.json's: "
                        "tells how right the labels are")
    system.add_argument("--code", choices=("new", "keep"),
                        help="where other code has made the labels: make them anew, or keep them "
                        "as they are")
    system.add_argument("--show-args", action="store_true",
                        help="print these arguments as JSON and stop: make asks so")
    parser.set_defaults(decides=["round", "fold", *SETTINGS])
    return parser.parse_args(argv)


def add_settings(group):
    """Add an option for every entry of SETTINGS; one of type bool is a flag that turns it on."""
    for name, (kind, default, text) in SETTINGS.items():
        if kind is bool:
            how = {"action": "store_true"}
        elif isinstance(kind, tuple):
            how = {"choices": kind}
        else:
            how = {"type": kind}
        group.add_argument("--" + name.replace("_", "-"), default=default, help=text, **how)


# ---- makers --------------------------------------------------------------------------------------


def check_makers(args, name, paths, infos, photos):
    """Return whether a store breaks the lineage, which only --allow-leak lets pass.

    name: "test" or "unlabelled", of the stores `paths`, whose JSONs are `infos`; photos: the Split
    of it. Raises UserError for the first store that differs from the others, from the photos or,
    without --allow-leak, from the round and fold asked for.
    """
    expected = {
        "split": name, "classes": photos.classes, "image_ids": photos.ids, "round": args.round - 1,
        "fold": args.fold, "paint": infos[0]["paint"], "folds_csv": infos[0]["folds_csv"],
        "data": photos.fingerprint}
    leaks = any(info["contaminated"] for info in infos)
    for key, value in expected.items():
        for path, info in zip(paths, infos, strict=True):
            if info[key] == value:
                continue
            if key not in LINEAGE:
                cure = "run infer.py on all of them again"
            else:
                cure = (f"round {args.round} of fold {args.fold} learns only from fold {args.fold} "
                        f"of round {args.round - 1}")
            if key not in LINEAGE or not args.allow_leak:
                differs = "differ" if key == "image_ids" else f"is {info[key]}, not {value}"
                raise UserError(f"{path}: {key} {differs}; {cure}")
            leaks = True
    return leaks


class Makers(NamedTuple):
    """The models that make the labels, and the photos that they have predicted."""
    test: Split
    photos: Split  # those that get labels: the test's, then those of --unlabelled
    stores: list  # of each maker the uint8 probabilities [N, C, H, W] of the test photos
    more_stores: list  # and those of --unlabelled, if it is given
    paths: list  # the JSON of each store, those of the test first
    infos: list  # what it says
    contaminated: bool  # see check_makers

    def vote(self, i):
        """Return the soft vote of photo i: probs float32 [C, H, W]."""
        n_test = len(self.test.ids)
        if i < n_test:
            return soft_vote(self.stores, i)
        return soft_vote(self.more_stores, i - n_test)


def open_makers(args, opened, train, test, hashes):
    """Return the Makers; opened: of open_store of each of args.stores.

    Raises UserError as check_makers does, and if a store of --unlabelled is missing.
    """
    paths, photos = list(args.stores), test
    stores, infos = map(list, zip(*opened, strict=True))
    contaminated = check_makers(args, "test", paths, infos, test)
    more_stores, more_infos = [], []
    if args.unlabelled:
        more = load_unlabelled(args.unlabelled, train, test, args.cache, infos[0]["orientation"])
        photos = join_photos(test, more)
        more_paths = [path.with_name("unlabelled.json") for path in args.stores]
        more_opened = [open_store(path, hashes) for path in more_paths]
        more_stores, more_infos = map(list, zip(*more_opened, strict=True))
        contaminated |= check_makers(args, "unlabelled", more_paths, more_infos, more)
        paths += more_paths
    return Makers(test, photos, stores, more_stores, paths, infos + more_infos, contaminated)


def soft_vote(stores, i):
    """Return the mean of image i over uint8 stores [N, C, H, W]: probs float32 [C, H, W]."""
    total = sum(read_probs(store, i).astype(np.float32) for store in stores)
    return total / np.float32(255 * len(stores))


# ---- how sure is sure enough: thresholds ---------------------------------------------------------


def open_out_of_fold(args, makers, train, hashes):
    """Return ({fold: (stores, infos, paths)} of --out-of-fold, whether one may have seen the fold).

    The stores are in the makers' order; makers: the JSON of each one's store. Raises UserError for
    a store that isn't of the makers' round, folds and data, and unless each fold has just the
    makers' models.
    """
    def name(info):
        return info["model"], info["scale"], info["tta"]
    expected = {"split": "valid", "classes": train.classes, "round": args.round - 1,
                "paint": makers[0]["paint"], "folds_csv": makers[0]["folds_csv"],
                "data": train.fingerprint}
    folds, leaks = {}, False
    for path in args.out_of_fold:
        store, info = open_store(path, hashes)
        leaks |= info["contaminated"]
        for key, value in expected.items():
            if info[key] == value:
                continue
            if not (key in LINEAGE and args.allow_leak):
                raise UserError(f"{path}: {key} is {info[key]}, not {value}: --out-of-fold takes "
                                f"valid.json of round {args.round - 1}; run infer.py again")
            leaks = True
        folds.setdefault(info["fold"], {})[name(info)] = store, info, path
    wanted = [name(info) for info in makers]
    for fold, stores in folds.items():
        if differing := set(wanted) ^ stores.keys():
            what = " ".join(map(str, min(differing)))
            raise UserError(f"--out-of-fold: fold {fold} and the makers of the labels differ in "
                            f"{what}: give the valid.json of the same models")
    return {fold: list(zip(*(stores[key] for key in wanted), strict=True))
            for fold, stores in sorted(folds.items())}, leaks


def sum_validation(stores, infos, train):
    """Yield (sum of the uint8 probabilities, int64 [C, H, W], truth uint8 [H, W]) of each photo.

    stores, infos: of one fold, of open_out_of_fold.
    """
    position = {image_id: i for i, image_id in enumerate(train.ids)}
    orders = [{image_id: i for i, image_id in enumerate(info["image_ids"])} for info in infos]
    for image_id in infos[0]["image_ids"]:
        total = sum(read_probs(store, order[image_id]).astype(np.int64)
                    for store, order in zip(stores, orders, strict=True))
        yield total, train.truth(position[image_id])


def count_top_sums(stores, infos, train):
    """Yield how the soft vote of validation stores does on each photo: pixels int [C, T, 2].

    For each predicted class and sum of its uint8 probabilities they are how many labelled pixels
    there are, and how many of them are right; T is 255 times the number of models, plus 1.

    stores, infos: of one fold, of open_out_of_fold.
    """
    n_classes, n_sums = len(train.classes), 255 * len(stores) + 1
    for total, truth in sum_validation(stores, infos, train):
        pred, top = total.argmax(0), total.max(0)
        labelled = truth != IGNORE_INDEX
        codes = (pred * n_sums + top)[labelled]
        is_right = (pred == truth)[labelled]
        counts = [np.bincount(found, minlength=n_classes * n_sums)
                  for found in (codes, codes[is_right])]
        yield np.stack(counts, axis=1).reshape(n_classes, n_sums, 2)


def fit_thresholds(photos, precision):
    """Return thresholds float [C]: from which top probability on a pixel of each class is sure.

    It is the lowest from which on at least the share `precision` of the pixels were right, even
    without the photo that does most for it, in LEAST_PHOTOS photos or more; infinite where there is
    none. It lies between two probabilities that can occur. photos: of count_top_sums.
    """
    pixels = n_photos = most_gained = 0  # each of [C, T], from that sum on; pixels [C, T, 2]
    for counts in photos:
        from_here = counts[:, ::-1].cumsum(1)[:, ::-1]
        pixels = pixels + from_here
        n_photos = n_photos + (from_here[..., 0] > 0)
        most_gained = np.maximum(most_gained, gained(from_here, precision))
    was_seen = -np.diff(pixels[..., 0], append=0) > 0
    is_enough = gained(pixels, precision) >= most_gained - ROUNDING
    is_fit = was_seen & is_enough & (n_photos >= LEAST_PHOTOS)
    lowest = (is_fit.argmax(1) - 0.5) / (is_fit.shape[1] - 1)
    return np.where(is_fit.any(1), lowest, np.inf)


def gained(pixels, precision):
    """Return by how many right pixels [...] counts [..., 2] are above the share `precision`."""
    return pixels[..., 1] - precision * pixels[..., 0]


def choose_thresholds(args, folds, train):
    """Return the thresholds [C], which other folds than args.fold decide.

    folds: of open_out_of_fold. Raises UserError for --confident auto without another fold.
    """
    others = [folds[fold] for fold in folds if fold != args.fold]
    if args.confident != "auto":
        return np.full(len(train.classes), args.confident)
    if not others:
        raise UserError(f"--confident auto needs --out-of-fold with valid.json of other folds than "
                        f"{args.fold}: train another fold, or give a number, --confident 0.8")
    photos = itertools.chain(*(count_top_sums(*fold, train) for *fold, _ in others))
    return fit_thresholds(photos, args.precision)


# ---- the labels of a photo -----------------------------------------------------------------------


class Verdict(NamedTuple):
    """What a rule says of a photo, and what holds for every rule."""
    label: np.ndarray
    sure: np.ndarray
    reason: str
    unsure: float  # share of the foreground in `pred` that is not sure
    pred: np.ndarray  # the likeliest class of every pixel, int [H, W]


def judge(probs, args):
    """Return the Verdict of args.rule on a photo; probs float32 [C, H, W].

    A photo whose label has no foreground is dropped, whatever the rule. Raises TypeError for a rule
    whose label has another type or shape: written to labels.npy, it would be garbled.
    """
    label, sure, reason = RULES[args.rule](probs, args)
    if label.dtype != np.uint8 or label.shape != probs.shape[1:]:
        raise TypeError(f"rule {args.rule} returned a label of {label.dtype} {label.shape}, not of "
                        f"uint8 {probs.shape[1:]}")
    foreground = (label > 0) & (label != IGNORE_INDEX)
    if not foreground.any():
        reason = "no foreground"
    pred = probs.argmax(0)
    return Verdict(label, sure, reason, unsure_share(pred, sure), pred)


def soft_label(probs, label):
    """Return the probabilities to draw labels from: uint8 [C, H, W].

    They are those of `probs` where `label` is the likeliest class. Elsewhere background is certain
    where `label` says so, and all are 0, which means ignored, where it says anything else.
    """
    soft = np.round(probs * 255).astype(np.uint8)
    changed = label != probs.argmax(0)
    soft[:, changed] = 0
    soft[0, changed & (label == 0)] = 255
    return soft


# ---- files ---------------------------------------------------------------------------------------


def hand_decisions(folder, photos):
    """Return {image_id: keep} for the rows of index.csv whose `keep` was ever changed by hand.

    `by_hand` holds what was decided before; a `keep` that differs from it, or from the rule where
    there is none, is a new decision. An empty `keep` takes a decision back. Raises UserError if one
    is of no image of the Split `photos`: a spreadsheet may have written 100000 as 1E+05.
    """
    decisions = {}
    rows = read_index(folder) if (folder / "index.csv").exists() else {}
    for row in rows.values():
        written = row["by_hand"] or by_rule(row)
        decision = row["by_hand"] if row["keep"] == written else row["keep"]
        if decision:
            decisions[row["image_id"]] = decision
    if foreign := decisions.keys() - set(map(str, photos.ids)):
        raise UserError(f"{folder}/index.csv: decides on image {clean(min(foreign))}, which is not "
                        "in test.json: mend the id or remove the line")
    return decisions


def write_labels(path, makers, by_hand, truths, args):
    """Write labels.npy as `path`; return (rows of index.csv, labelled pixels [C, 3]).

    by_hand: as hand_decisions returns it; truths: uint8 [N, S, S] of the test photos, or empty. The
    columns are, of the photos that are kept, all pixels of a class, those that have a truth, and
    those that are right. The photos of the stores are read, voted on and written one at a time.
    """
    photos = makers.photos
    _, n_classes, *size = makers.stores[0].shape
    rows, labelled = [], np.zeros((n_classes, 3), np.int64)
    n_photos = len(photos.ids)
    shape = (n_photos, n_classes, *size) if args.soft else (n_photos, *size)
    with atomic_write(path) as scratch, open(scratch, "wb") as f:
        write_npy_header(f, shape)
        for i, image_id in enumerate(tqdm(photos.ids, str(path.parent), disable=None)):
            probs = makers.vote(i)
            verdict = judge(probs, args)
            f.write(soft_label(probs, verdict.label) if args.soft else verdict.label)
            row = {
                "image_id": image_id,
                "keep": "",
                "reason": "unreadable" if photos.faults[i] else verdict.reason,
                "by_hand": by_hand.get(str(image_id), ""),
                "unsure": f"{verdict.unsure:.4f}",
                "classes": join_ids(foreground_ids(verdict.label)),
                "seen": join_ids(foreground_ids(verdict.pred))}
            row["keep"] = row["by_hand"] or by_rule(row)
            rows.append(row)
            if row["keep"] == "1":
                unknown = np.full_like(verdict.label, IGNORE_INDEX)
                truth = truths[i] if i < len(truths) else unknown
                labelled += count_labelled(verdict.label, truth, len(labelled))
    return rows, labelled


def count_expected(stores, infos, train, args):
    """Return the pixels [C, 3], as of write_labels, that the rule labels of validation photos.

    stores, infos: of the fold that is labelled, of open_out_of_fold.
    """
    labelled = np.zeros((len(train.classes), 3), np.int64)
    for total, truth in sum_validation(stores, infos, train):
        verdict = judge(total.astype(np.float32) / np.float32(255 * len(stores)), args)
        if not verdict.reason:
            labelled += count_labelled(verdict.label, truth, len(labelled))
    return labelled


def count_labelled(label, truth, n_classes):
    """Return how many pixels of each class a label has: [C, 3] as of write_labels.

    label, truth: uint8 [H, W].
    """
    has_truth = truth != IGNORE_INDEX
    parts = (label, label[has_truth], label[has_truth & (label == truth)])
    return np.stack([np.bincount(part.ravel(), minlength=256)[:n_classes] for part in parts], 1)


def join_ids(class_ids):
    """Return class ids as they stand in index.csv: "3 7"."""
    return " ".join(map(str, class_ids))


def write_kept_coco(path, labels_npy, rows, test, args):
    """Write the labels of the kept test photos as COCO JSON; rows: of index.csv."""
    labels = np.load(labels_npy, mmap_mode="r")

    def kept_masks():
        for i, row in enumerate(rows[:len(test.ids)]):
            if row["keep"] == "1":
                label = labels[i].argmax(0).astype(np.uint8) if args.soft else labels[i]
                yield i, label
    write_coco(path, args.data / "test.json", test, kept_masks())


def move_labels_aside(folder):
    """Move labels that are about to be replaced into folder/replaced, with a copy of index.csv.

    index.csv itself stays until the new one is written: it has the decisions made by hand.
    """
    if (folder / "manifest.json").exists() and (folder / "index.csv").exists():
        (folder / "replaced").mkdir(exist_ok=True)
        shutil.copy2(folder / "index.csv", folder / "replaced")
    move_aside(folder, ["manifest.json", "labels.npy"])


def describe_labels(classes, thresholds, expected, labelled):
    """Return what is known of each class's labels, and last of all foreground, whose class is None.

    "threshold": the top probability from which on a pixel is sure, None if the class labels
    nothing; "pixels": how many are labelled; "real": the share of them that is right by the truth
    of the test photos; "expected": the share that is right of what the rule labels of this fold's
    validation photos. None where it isn't known. thresholds [C]; labelled, expected [C, 3]: of
    write_labels and count_expected.
    """
    described = []
    labelled, expected = (np.vstack([counts, counts[1:].sum(0)]) for counts in (labelled, expected))
    for i, name in enumerate([*classes, None]):
        is_sure = name and np.isfinite(thresholds[i])
        described.append({
            "class": name, "threshold": float(thresholds[i]) if is_sure else None,
            "expected": share_right(expected[i]), "real": share_right(labelled[i]),
            "pixels": int(labelled[i, 0])})
    return described


def share_right(counts):
    """Return the share of right pixels, None if none has a truth; counts [3]: of write_labels."""
    _, n_with_truth, n_right = counts.tolist()
    return n_right / n_with_truth if n_with_truth else None


def write_manifest(path, args, makers, wanted, counts, labels, files):
    """Write manifest.json, which says what made the labels; files: {name: hash}."""
    stores, first = [], makers.infos[0]
    for store, info in zip(makers.paths, makers.infos, strict=True):
        stores.append({"store": str(store), "id": store_id(info),
                       "checkpoints": info["checkpoints"], "tta": info["tta"],
                       "state": info["state"]})
    write_description(
        path, wanted, round=args.round, fold=args.fold, folds_csv=first["folds_csv"],
        classes=makers.test.classes, paint=first["paint"], contaminated=makers.contaminated,
        photos=counts, labels=labels, makers=stores, files=files)


# ---- what the user sees --------------------------------------------------------------------------


def outcome(row):
    """Return what became of the photo of a row of index.csv: "kept", or why it was dropped."""
    if row["keep"] == "1":
        return "kept"
    return "by hand" if row["by_hand"] else row["reason"]


def count_reasons(rows, classes):
    """Return {class name: {outcome: number of photos in which the models see the class}}.

    Background counts all photos.
    """
    counts = {name: {} for name in classes}
    for row in rows:
        for class_id in (0, *map(int, row["seen"].split())):
            class_counts = counts[classes[class_id]]
            class_counts[outcome(row)] = class_counts.get(outcome(row), 0) + 1
    return counts


def draw_sheet(path, rows, counts, labels, makers, args):
    """Draw some photos of every outcome beside their labels: the clearest and the least clear.

    Kept photos come first. counts: as count_reasons returns them, labels: as describe_labels does,
    for the legend.
    """
    photos = makers.photos
    readable = [i for i, fault in enumerate(photos.faults) if not fault]
    by_outcome = {"kept": []}
    for i in sorted(readable, key=lambda i: float(rows[i]["unsure"])):
        by_outcome.setdefault(outcome(rows[i]), []).append(i)
    tiles = []
    for name in sorted(by_outcome, key=lambda name: (name != "kept", name)):
        some = by_outcome[name]
        for i in some if len(some) < 12 else some[:6] + some[-6:]:
            image = photos.image(i)
            verdict = judge(makers.vote(i), args)
            shown = verdict.sure | (verdict.label == 0)
            mask = np.where(shown, verdict.label, IGNORE_INDEX)
            caption = f"{name}; {float(rows[i]['unsure']):.0%} of it unsure"
            title = photos.file_names[i] if i < len(makers.test.ids) else photos.ids[i]
            tiles.append([(title, overlay(image)), (caption, overlay(image, mask))])
    legend = {}
    for class_id, (name, outcomes) in enumerate(counts.items()):
        numbers = ", ".join(f"{n} {why}" for why, n in outcomes.items())
        row = labels[class_id or -1]  # the foreground stands for all photos
        text = f"{row['pixels']:,} pixels labelled{precision_text(row)}"
        texts = filter(None, [numbers, text])  # no photo may have the class
        legend[class_id] = f"{name if class_id else 'all photos'}: {'; '.join(texts)}"
    write_sheet(path, tiles, legend | {IGNORE_INDEX: "unsure"}, across=2)


def precision_text(row):
    """Return ", 93% right expected, 88% in truth" of a row of describe_labels, as far as known."""
    words = {"expected": "right expected", "real": "in truth"}
    return "".join(f", {row[key]:.0%} {text}" for key, text in words.items()
                   if row[key] is not None)


def report_labels(folder, args, counts, labels, by_hand, contaminated):
    """Print how many photos were kept and dropped, and what the user should know of them."""
    import pandas as pd
    table = pd.DataFrame(counts).T.fillna(0).astype(int)
    print(f"{folder}: photos by the classes that the models see in them, {BACKGROUND} is all of "
          f"them\n{table.to_string()}")
    table = pd.DataFrame(labels).fillna({"class": "foreground"}).fillna(np.nan)
    print(f"labelled pixels; threshold: the top probability from which on a pixel of the class is "
          f"sure; expected: the share of right pixels among those that the rule labels in the "
          f"fold's validation photos; real: among those that are labelled here\n"
          f"{table.to_string(index=False, na_rep='-', float_format='{:.3f}'.format)}")
    if by_hand:
        print(f"{folder}: {len(by_hand)} decision(s) made by hand in index.csv kept")
    if contaminated:
        print(f"warning: {folder} is contaminated: what learns from it has no honest validation "
              "score")
    if "kept" in counts[BACKGROUND] and not labels[0]["pixels"]:
        print(f"warning: no pixel is labelled {BACKGROUND}, so these labels teach only to see "
              "objects")
    if "kept" not in counts[BACKGROUND]:
        print(f"warning: no photo is kept, so round {args.round} of fold {args.fold} learns "
              "nothing new: its runs will be those of the round before")


# ---- command -------------------------------------------------------------------------------------


def make_labels(folder, args, train, makers, folds, wanted, hashes):
    """Write the labels, what describes them and, last, manifest.json.

    train: the Split; folds: of open_out_of_fold; wanted: what provenance says of the labels.
    Decisions that were made by hand in index.csv stay.
    """
    test = makers.test
    thresholds = choose_thresholds(args, folds, train)
    args = argparse.Namespace(**vars(args), thresholds=thresholds)
    expected = np.zeros((len(test.classes), 3), np.int64)
    if args.fold in folds:
        fold_stores, fold_infos, _ = folds[args.fold]
        expected = count_expected(fold_stores, fold_infos, train, args)
    for _, fold_infos, paths in folds.values():
        check_unchanged(paths, fold_infos)
    by_hand = hand_decisions(folder, makers.photos)
    path = truth_file(args.data, args.truth)
    truths = load_truths(path, test, makers.infos[0]["paint"]) if path else ()
    rows, labelled = write_labels(folder / "new-labels.npy", makers, by_hand, truths, args)
    check_unchanged(makers.paths, makers.infos)
    counts = count_reasons(rows, test.classes)
    labels = describe_labels(test.classes, thresholds, expected, labelled)
    draw_sheet(folder / "sheet.png", rows, counts, labels, makers, args)
    names = ["labels.npy"]
    if args.coco:
        write_kept_coco(folder / "labels.json", folder / "new-labels.npy", rows, test, args)
        names.append("labels.json")
    move_labels_aside(folder)
    (folder / "new-labels.npy").rename(folder / "labels.npy")
    write_csv(folder / "index.csv", rows)
    files = {name: hashes(folder / name) for name in names}
    write_manifest(folder / "manifest.json", args, makers, wanted, counts, labels, files)
    report_labels(folder, args, counts, labels, by_hand, makers.contaminated)


def main(args):
    if args.show_args:
        print(json.dumps(vars(args), default=str))
        return
    folder = pseudo_folder(args.exp, args.round, args.fold)
    check_output(args.data, folder)
    hashes = Hashes(args.cache)
    opened = [open_store(path, hashes) for path in args.stores]
    infos = [info for _, info in opened]
    train, test = load_data(args.data, args.cache, **data_options(infos[0]))
    makers = open_makers(args, opened, train, test, hashes)
    folds, leaks = open_out_of_fold(args, infos, train, hashes)
    fold_ids = [store_id(info) for _, some, _ in folds.values() for info in some]
    makers = makers._replace(contaminated=makers.contaminated or leaks)
    recipe = labels_recipe(args, makers.photos.fingerprint, infos[0]["folds_csv"],
                           infos[0]["paint"], [store_id(info) for info in makers.infos], fold_ids)
    wanted = provenance(recipe, labels_code([(info["model"], info["tta"]) for info in infos],
                                            args.rule))
    with lock(folder):
        manifest = whole_manifest(folder, hashes)
        decision = decide(folder, manifest, wanted, args.code) if manifest else "make"
        if decision != "done":
            keep_code(args.exp)
        if decision == "kept":
            del manifest["touched"]  # which read_description added to what the file says
            write_description(folder / "manifest.json", manifest, **manifest)
        if decision == "make":
            make_labels(folder, args, train, makers, folds, wanted, hashes)
        else:
            print(f"{folder} is there and was made like this: nothing to do")
        hashes.save()


if __name__ == "__main__":
    run_script(main, parse_args())
