"""Let any number of runs vote on a submission, or score them out of fold.

    python ensemble.py soft --data DATA --out out/main/submission.csv out/main/r1/*/*/s512/f*
    python ensemble.py hard --data DATA --out out/voted.csv mine.csv theirs.csv --weights 2 1
    python ensemble.py score --data DATA out/main/r1/*/*/s512/f*
    python ensemble.py compare --data DATA out/lr5 out/main

A run is a folder of train.py and infer.py; runs that differ only in the fold are one member. soft averages
probabilities, hard counts the votes of submissions and runs; both write the CSV in test.json's order, read back and
checked before it gets its name, and soft a .png of some predictions. score prints tables and leaves them in --tables.
"""
import argparse
import csv
import itertools
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (SUBMIT_SIZE, Help, atomic_write, class_iou, confusion, image_miou, load_data, make_folds, number,
                    open_store, run_script, scores, write_csv)

HEADER = ["image_id", "PredictionString"]
MAX_PICKS = 30  # of the greedy selection of weights
THUMBNAILS = 64_000_000  # bytes that the votes' thumbnails may take while weights are fitted on them
BIASES = (-1.4, -1, -0.7, -0.35, 0.35, 0.7, 1, 1.4)  # that are tried for each class


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    about = {"soft": "average the probabilities of runs", "hard": "count the votes of submissions and runs",
             "score": "print out-of-fold scores", "compare": "say whether one experiment beats another"}
    options = {name: commands.add_parser(name, allow_abbrev=False, formatter_class=Help, help=text)
               for name, text in about.items()}
    for name, command in options.items():
        command.add_argument("--data", type=Path, required=True, help="the competition's folder")
        command.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks")
        command.add_argument("--batch", type=number(int, 1), default=8, help="images in a batch of v1")
        if name in ("soft", "hard"):
            command.add_argument("--out", type=Path, required=True, help="the submission to write")
            command.add_argument("--image-id", choices=("id", "file_name"), default="id",
                                 help="what names an image in the submission; some upload pages want file_name")
        if name == "compare":
            command.add_argument("experiments", type=Path, nargs=2, help="two out/EXP; their last rounds are compared")
        else:
            what = "run folders with stores of infer.py" + ", or submissions" * (name == "hard")
            command.add_argument("runs", type=Path, nargs="+", help=what)
    for name in ("soft", "score"):
        options[name].add_argument("--weights", default="equal", metavar="equal|fit|W,W,...", type=weights_of,
                                   help="of the members; fit: by greedy selection, if that gains more than chance")
    options["hard"].add_argument("--weights", default=None, metavar="W,W,...", type=weights_of, help="default: equal")
    options["score"].add_argument("--tables", type=Path, help="folder for the tables as CSV")
    return parser.parse_args(argv)


def weights_of(text):
    if text in ("equal", "fit"):
        return text
    weights = [float(w) for w in text.split(",")]
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights):
        raise argparse.ArgumentTypeError(f"{text}: weights are numbers from 0, not all 0, with commas between them")
    return weights


# ---- members --------------------------------------------------------------------------------------------------------


def open_members(runs, split):
    """{name: {fold: (probs, info)}} of the runs' stores; raises SystemExit when they don't belong together."""
    members, first = {}, None
    for run in runs:
        probs, info = open_store(run / f"{split}.json")
        first = first or info
        for key in ("classes", "folds_csv", "paint"):
            if info[key] != first[key]:
                raise SystemExit(f"{run}/{split}.json has {key} {info[key]}, {runs[0]}/{split}.json {first[key]}: made "
                                 "on other data or folds, they can't vote together")
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


def order_of(found, wanted, path):
    """Positions in the image ids `found` of those in `wanted`; raises SystemExit when they aren't the same images."""
    position = {image_id: i for i, image_id in enumerate(found)}
    absent, more = [i for i in wanted if i not in position], sorted(position.keys() - set(wanted))
    if absent or more:
        raise SystemExit(f"{path} is of other images: it lacks {len(absent)} {absent[:3]} and has {len(more)} more "
                         f"{more[:3]}: run infer.py again")
    return [position[i] for i in wanted]


def member_weights(members, weights):
    """[M] weights of the members, given or equal."""
    if weights in (None, "equal", "fit"):
        return np.ones(len(members))
    if len(weights) != len(members):
        raise SystemExit(f"{len(weights)} weights for {len(members)} members: {', '.join(members)}")
    return np.array(weights)


# ---- submissions ----------------------------------------------------------------------------------------------------


def encode_mask(pred):
    """b"0 0 11 3": the class ids of a mask uint8 [H, W], row by row."""
    text = np.full(2 * pred.size, ord(" "), np.uint8)
    text[::2] = pred.ravel() + ord("0")  # ids from 10 on stand as the bytes after "9" until they are replaced
    text = text[:-1].tobytes()
    for class_id in range(10, int(pred.max()) + 1):
        text = text.replace(bytes([class_id + ord("0")]), str(class_id).encode())
    return text


def write_submission(args, preds, test):
    """Write, read back and check the CSV; it gets its name only when every row is as it should be."""
    names = image_names(args, test)
    with atomic_write(args.out) as scratch:
        with open(scratch, "wb") as f:
            f.write((",".join(HEADER) + "\n").encode())
            for name, pred in zip(names, tqdm(preds, str(args.out), len(names), disable=None), strict=True):
                quoted = '"' + name.replace('"', '""') + '"' if set(name) & set(',"\n\r') else name
                f.write(quoted.encode() + b"," + encode_mask(pred) + b"\n")
        if faults := [fault for fault, _ in read_submission(scratch, names, len(test.classes)) if fault]:
            raise SystemExit("\n".join(faults))


def image_names(args, test):
    return test.file_names if args.image_id == "file_name" else [str(i) for i in test.ids]


def read_submission(path, names, n_classes):
    """Yield (what is wrong or None, mask uint8 [SUBMIT_SIZE, SUBMIT_SIZE]) of each row; they must be of `names`."""
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, newline="", encoding="utf-8") as f:
        rows = csv.reader(f)
        header = next(rows, None)
        if header != HEADER:
            yield f"{path}: the first line is {header}, not {','.join(HEADER)}", None
            return
        for line, (name, row) in enumerate(itertools.zip_longest(names, rows), 2):
            if not row or row[0] != name or len(row) != 2:
                found = row[0] if row else "missing"
                yield f"{path} line {line}: image {found}, expected {name or 'no more'}", None
                continue
            ids = np.fromstring(row[1], np.int64, sep=" ") if set(row[1]) <= set("0123456789 ") else np.zeros(0, int)
            if ids.size != SUBMIT_SIZE ** 2 or ids.min() < 0 or ids.max() >= n_classes:
                yield f"{path} line {line}, image {name}: not {SUBMIT_SIZE ** 2} ids of 0 to {n_classes - 1}", None
            else:
                yield None, ids.astype(np.uint8).reshape(SUBMIT_SIZE, SUBMIT_SIZE)


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


def soft(args):
    if args.out.suffix != ".csv":
        raise SystemExit(f"--out {args.out}: must end in .csv; a .png goes beside it")
    members, info = open_members(args.runs, "test")
    train, test = open_data(args, info, args.runs[0])
    streams = [[(probs[i] for i in order_of(info["image_ids"], test.ids, f"a store of {name}"))
                for probs, info in folds.values()] for name, folds in members.items()]
    oof = open_oof(open_members(args.runs, "valid")[0], train)
    weights, factors, min_area, *tables, _ = choose(oof, member_weights(members, args.weights), args.weights == "fit")
    print_scores(args, oof, *tables)
    looks = []
    votes = (sum(w * sum(map(np.float32, folds)) / len(folds) for w, folds in zip(weights, images, strict=True) if w)
             for images in zip(*(zip(*stores, strict=True) for stores in streams), strict=True))
    preds = (remove_small((probs * factors[:, None, None]).argmax(0).astype(np.uint8), min_area) for probs in votes)
    write_submission(args, keep_looks(preds, test, looks), test)
    write_sheet(args.out.with_suffix(".png"), [sum(looks[i:i + 3], []) for i in range(0, len(looks), 3)], test.classes)
    print(f"{args.out}: {len(test.ids)} images by {len(args.runs)} run(s) of {len(members)} member(s)")


def hard(args):
    """Majority per pixel of submissions and of runs' own votes."""
    paths = [path / "test.json" if path.is_dir() else path for path in args.runs]
    weights = member_weights(args.runs, args.weights)
    stores = {path: open_store(path) for path in paths if path.suffix == ".json"}
    paint = next((info["paint"] for _, info in stores.values()), "area")
    _, test = load_data(args.data, args.cache, paint)
    names, preds = image_names(args, test), []
    for path in paths:
        if path in stores:
            probs, info = stores[path]
            if info["classes"] != test.classes:
                raise SystemExit(f"{path} has the classes {info['classes']}, DATA has {test.classes}")
            preds.append(probs[i].argmax(0) for i in order_of(info["image_ids"], test.ids, path))
        else:
            preds.append(sound_rows(read_submission(path, names, len(test.classes))))
    voted = (majority(np.stack(masks), weights, len(test.classes)) for masks in zip(*preds, strict=True))
    write_submission(args, voted, test)
    print(f"{args.out}: {len(names)} images by {len(paths)} votes")


def sound_rows(rows):
    for fault, pred in rows:
        if fault:
            raise SystemExit(fault)
        yield pred


def majority(preds, weights, n_classes):
    """uint8 [H, W]: the class with the largest sum of weights among [M, H, W] votes; ties go to the heaviest voter."""
    votes = np.stack([np.tensordot(weights, preds == class_id, 1) for class_id in range(n_classes)])
    top = votes.max(0) * (1 - 1e-9)  # 0.1 + 0.2 is a tie with 0.3
    result = np.zeros(preds.shape[1:], np.uint8)
    for pred in preds[np.argsort(-weights, kind="stable")[::-1]]:  # the heaviest has the last word
        result = np.where(np.take_along_axis(votes, pred[None].astype(int), 0)[0] >= top, pred, result)
    return result


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


# ---- out of fold ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutOfFold:
    """The validation images of all members in train's order, and where each member's probabilities of them are."""
    train: object
    members: dict  # {name: {fold: (probs, info)}}
    images: list  # positions in train
    parts: np.ndarray  # [N] what is held out together when something is fitted: the fold

    def probs(self, n):
        """{member's number: uint8 [C, H, W]} of image n, by the models that held it out."""
        image_id = self.train.ids[self.images[n]]
        found = {m: places.get(image_id) for m, places in enumerate(self.places)}
        return {m: place[0][place[1]] for m, place in found.items() if place}

    @cached_property
    def places(self):
        """[{image id: (store, position)}] by member."""
        return [{image_id: (probs, i) for probs, info in folds.values() for i, image_id in enumerate(info["image_ids"])}
                for folds in self.members.values()]

    @cached_property
    def truths(self):
        return np.stack([self.train.truth(i) for i in self.images])


def open_oof(members, train):
    """OutOfFold of the members; raises SystemExit when a store is of other images than its fold's other stores."""
    position, fold_of = {image_id: i for i, image_id in enumerate(train.ids)}, {}
    for name, folds in members.items():
        for fold, (_, info) in folds.items():
            if absent := [i for i in info["image_ids"] if i not in position]:
                raise SystemExit(f"DATA has no image {absent[0]}, which a validation store has: run train.py again")
            others = [i for i, f in fold_of.items() if f == fold]
            order_of(info["image_ids"], others or info["image_ids"], f"the validation store of {name}, fold {fold},")
            fold_of |= dict.fromkeys(info["image_ids"], fold)
    images = sorted(position[i] for i in fold_of)
    parts = np.array([fold_of[train.ids[i]] for i in images])
    if len(set(parts)) == 1:  # parts of the one fold take the place of folds
        groups = [train.groups[i] for i in images]
        present = np.array(train.pixels)[images, 1:] > 0
        parts = make_folds(present, groups, min(5, len(set(groups))))
    return OutOfFold(train, members, images, parts)


def vote_counts(oof, votes, thumbnails=None):
    """int32 [K, N, C, C] pixel counts of K votes, each a function of an image's part -> (weights [M], factors [C]).

    An image that no member with a weight has predicted counts nothing. thumbnails uint8 [M, N, C, P] are filled by the
    way with every so many pixels.
    """
    n_classes = len(oof.train.classes)
    counts = np.zeros((len(votes), len(oof.images), n_classes, n_classes), np.int32)
    for n, truth in enumerate(tqdm(oof.truths, "out of fold", disable=None)):
        probs = oof.probs(n)
        for m, image in probs.items() if thumbnails is not None else ():
            thumbnails[m, n] = every(image, thumbnails.shape[3])
        for k, vote in enumerate(votes):
            weights, factors = vote(oof.parts[n])
            parts = [np.float32(weights[m]) * image for m, image in probs.items() if weights[m]]
            if parts:
                total = sum(parts) * np.float32(factors)[:, None, None] if np.ndim(factors) else sum(parts)
                counts[k, n] = confusion(total.argmax(0).astype(np.uint8), truth, n_classes)
    return counts


def every(maps, n_pixels):
    """[..., n_pixels] of maps [..., H, W], evenly."""
    step = math.isqrt(maps.shape[-1] * maps.shape[-2] // n_pixels)
    return maps[..., step // 2::step, step // 2::step].reshape(*maps.shape[:-2], -1)


def score_of(probs, truths):
    """Mean v3 of [N, C, P] probabilities, or whatever has the same argmax."""
    n, n_classes, _ = probs.shape
    codes = (np.arange(n)[:, None] * n_classes + truths) * n_classes + probs.argmax(1)
    counts = np.bincount(codes.ravel(), minlength=n * n_classes ** 2).reshape(n, n_classes, n_classes)
    return image_miou(counts).mean()


def fit_weights(thumbnails, truths):
    """[M] weights: greedy selection with replacement by v3 (Caruana et al. 2004); thumbnails [M, N, C, P]."""
    picks, total, best = np.zeros(len(thumbnails)), np.float32(0), -1.0
    while picks.sum() < MAX_PICKS:
        tries = [score_of(total + thumbnail, truths) for thumbnail in thumbnails]
        if max(tries) <= best:
            break
        best, pick = max(tries), int(np.argmax(tries))
        picks[pick] += 1
        total = total + thumbnails[pick]
    return picks


def fit_bias(probs, truths):
    """[C] log-bias of the classes' probabilities, class after class, that gains most in v3."""
    bias, best = np.zeros(probs.shape[1], np.float32), score_of(probs, truths)
    for class_id in range(1, len(bias)):
        for step in BIASES:
            tried = np.where(np.arange(len(bias)) == class_id, np.float32(step), bias)
            if (score := score_of(probs * np.exp(tried)[:, None], truths)) > best:
                best, bias = score, tried
    return bias


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


# ---- what is used, and how it scores --------------------------------------------------------------------------------


def bootstrap_interval(values, n_draws=2000):
    """95% interval of the mean of [N] values, each an image's, by drawing images with replacement."""
    draws = np.random.default_rng(0).integers(len(values), size=(n_draws, len(values)))
    return np.percentile(values[draws].mean(1), (2.5, 97.5))


def gain(name, before, after, found):
    """A row of the table of what was tried: taken only if the 95% interval of its cross-fitted gain is above zero."""
    gains = image_miou(after) - image_miou(before)
    low, high = bootstrap_interval(gains)
    return {"tried": name, "gain": gains.mean(), "low": low, "high": high, "taken": bool(low > 0), "found": found}


def choose(oof, weights, fit):
    """(weights [M], factors [C], minimum areas [C], counts [N, C, C] by name, rows of what was tried).

    Everything fitted is fitted on the other parts of the images than those it is scored on.
    """
    n_members, n_classes = len(oof.members), len(oof.train.classes)
    shape = n_members, len(oof.images), n_classes
    step = next(s for s in (4, 8, 16, 32, 64) if s == 64 or math.prod(shape) * (SUBMIT_SIZE // s) ** 2 < THUMBNAILS)
    thumbs = np.zeros((*shape, (SUBMIT_SIZE // step) ** 2), np.uint8)
    singles = [lambda part, m=m: (np.eye(n_members)[m], 1) for m in range(n_members)]
    *single_counts, vote = vote_counts(oof, [*singles, lambda part: (weights, 1)], thumbs)
    counts = dict(zip(oof.members, single_counts, strict=True)) | {"soft vote": vote}
    truths, parts, tried = every(oof.truths, thumbs.shape[3]).astype(int), oof.parts, []
    others = {part: parts != part for part in sorted(set(parts))}

    def attempt(name, after, found, nothing):
        """The later of vote and `after` that is worth it, and what is then used."""
        gains = image_miou(after) - image_miou(vote)
        low, high = bootstrap_interval(gains)
        tried.append({"tried": name, "gain in v3": gains.mean(), "low": low, "high": high, "taken": bool(low > 0),
                      "fitted": found.round(2).tolist()})
        return (after, found) if low > 0 else (vote, nothing)

    by_part = dict.fromkeys(others, weights)
    if fit:
        fits = {part: fit_weights(thumbs[:, rest], truths[rest]) for part, rest in others.items()}
        vote, weights = attempt("fitted weights", vote_counts(oof, [lambda part: (fits[part], 1)])[0],
                                fit_weights(thumbs, truths), weights)
        by_part = fits if tried[-1]["taken"] else by_part
    mean = lambda weights, rest: np.tensordot(np.float32(weights), thumbs[:, rest], 1)  # noqa: E731
    biases = {part: fit_bias(mean(by_part[part], rest), truths[rest]) for part, rest in others.items()}
    vote, bias = attempt("log-bias by class", vote_counts(oof, [lambda part: (by_part[part], np.exp(biases[part]))])[0],
                         fit_bias(mean(weights, slice(None)), truths), np.zeros(n_classes))
    areas = {part: fit_min_area(vote[rest]) for part, rest in others.items()}
    vote, min_area = attempt("minimum area by class", apply_min_area(vote, np.stack([areas[part] for part in parts])),
                             fit_min_area(vote), np.zeros(n_classes, int))
    counts |= {"with what is taken": vote, "all background": drop_columns(vote, np.zeros(vote.shape[:2], bool))}
    return weights, np.exp(bias), min_area, counts, tried, (thumbs, truths)


def score_rows(oof, counts, batch):
    """Rows of v1, v2, v3 with its interval, and IoU by class, of [N, C, C] counts by name."""
    rows = []
    for name, of_images in counts.items():
        of_images = of_images[of_images.sum((1, 2)) > 0]  # not every member has predicted every image
        result, (low, high) = scores(of_images, batch), bootstrap_interval(image_miou(of_images))
        rows.append({"name": name, "images": len(of_images), **{k: result[k] for k in ("v1", "v2", "v3")},
                     "low": low, "high": high, **dict(zip(oof.train.classes, result["iou"], strict=True))})
    return rows


def print_table(title, rows):
    import pandas as pd
    print(f"\n{title}\n" + pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format, na_rep="-"))


def analyse(oof, thumbs, truths):
    """Rows of three tables: the members in the order of what they add, what each axis gains, who disagrees with whom.

    The order is found on thumbnails, all numbers are of whole images. The gain of an axis is that of all members over
    the best vote of those with one value of it; the folds of a member never predict the same image, so they have none.
    """
    names, infos = list(oof.members), [next(iter(folds.values()))[1] for folds in oof.members.values()]
    left, order = list(range(len(names))), []
    while left:
        total = sum((np.float32(thumbs[m]) for m in order), np.float32(0))
        order.append(max(left, key=lambda m: score_of(total + thumbs[m], truths)))
        left.remove(order[-1])
    sets = [(("waterfall", names[m]), order[:i + 1]) for i, m in enumerate(order)]
    for axis in ("model", "scale", "round", "tta", "seed"):
        values = [str(info[axis]) for info in infos]
        sets += [((axis, v), [m for m, value in enumerate(values) if value == v])
                 for v in sorted(set(values)) if len(set(values)) > 1]
    votes = [lambda part, some=some: (np.isin(np.arange(len(names)), some), 1) for _, some in sets]
    v3 = {key: image_miou(counts) for (key, _), counts in zip(sets, vote_counts(oof, votes), strict=True)}
    steps = [value for (kind, _), value in v3.items() if kind == "waterfall"]
    everyone = steps[-1]
    waterfall = [{"member": names[m], "v3": after.mean(), **difference(after, before)}
                 for m, after, before in zip(order, steps, [np.zeros(len(everyone)), *steps], strict=False)]
    axes = []
    for axis in sorted({kind for kind, _ in v3} - {"waterfall"}):
        best = max((value for (kind, value) in v3 if kind == axis), key=lambda value: v3[axis, value].mean())
        axes.append({"axis": axis, "best alone": best, **difference(everyone, v3[axis, best])})
    apart = np.zeros((len(names), len(names)))
    for n in range(len(oof.images)):
        preds = {m: image.argmax(0) for m, image in oof.probs(n).items()}
        for a, b in itertools.product(preds, preds):
            apart[a, b] += (preds[a] != preds[b]).mean() / len(oof.images)
    return {"waterfall": waterfall, "axes": axes,
            "disagreement": [{"member": name, **dict(zip(names, row, strict=True))}
                             for name, row in zip(names, apart.tolist(), strict=True)]}


def difference(after, before):
    """Mean and paired 95% interval of what [N] scores gain over others of the same images."""
    low, high = bootstrap_interval(after - before)
    return {"gain": (after - before).mean(), "low": low, "high": high}


def print_scores(args, oof, counts, tried):
    rows = score_rows(oof, counts, args.batch)
    print_table(f"out of fold, {len(oof.images)} of {len(oof.train.ids)} training images; the interval is v3's", rows)
    print_table("after the vote, fitted on some folds and scored on others: gain in v3 with its 95% interval", tried)
    return {"members": rows, "tried": tried}


def score(args):
    members, info = open_members(args.runs, "valid")
    oof = open_oof(members, open_data(args, info, args.runs[0])[0])
    *_, counts, tried, thumbs = choose(oof, member_weights(members, args.weights), args.weights == "fit")
    tables = print_scores(args, oof, counts, tried)
    if len(members) > 1:
        more = analyse(oof, *thumbs)
        for name, rows in more.items():
            print_table(name, rows)
        tables |= more
    for name, rows in tables.items() if args.tables else ():
        write_csv(args.tables / f"{name}.csv", rows)


def last_round(args, exp):
    """({image id: [C, C] pixel counts} of the equal vote of the runs of an experiment's last round, their classes)."""
    rounds = sorted(exp.glob("r*"))
    runs = sorted(path.parent for path in rounds[-1].glob("*/*/s*/f*/valid.json")) if rounds else []
    if not runs:
        raise SystemExit(f"{exp}: its last round has no run with a valid.json; make score EXP={exp.name} makes them")
    members, info = open_members(runs, "valid")
    oof = open_oof(members, open_data(args, info, runs[0])[0])
    counts, = vote_counts(oof, [lambda part: (np.ones(len(members)), 1)])
    print(f"{exp}: {len(runs)} runs of {len(members)} members in {rounds[-1].name}, {len(counts)} images")
    return {oof.train.ids[i]: of_image for i, of_image in zip(oof.images, counts, strict=True)}, oof.train.classes


def compare(args):
    """Print the gain of the second experiment over the first on the images that both held out, with intervals."""
    (before, classes), (after, _) = (last_round(args, exp) for exp in args.experiments)
    shared = [i for i in before if i in after]
    if not shared:
        raise SystemExit("the two have no validation image in common")
    before, after = (np.stack([counts[i] for i in shared]) for counts in (before, after))
    draws = np.random.default_rng(0).integers(len(shared), size=(500, len(shared)))
    drawn = np.stack([class_iou(after[d].sum(0)) - class_iou(before[d].sum(0)) for d in draws])
    v3 = {"score": "v3", "before": image_miou(before).mean(), "after": image_miou(after).mean(),
          **difference(image_miou(after), image_miou(before))}
    iou = zip(classes, class_iou(before.sum(0)), class_iou(after.sum(0)), *np.nanpercentile(drawn, (2.5, 97.5), axis=0),
              strict=True)
    print_table(f"{len(shared)} images, paired bootstrap", [v3] + [
        {"score": f"IoU {name}", "before": b, "after": a, "gain": a - b, "low": low, "high": high}
        for name, b, a, low, high in iou])
    print("more than chance" if v3["low"] > 0 or v3["high"] < 0 else "v3: no more than chance")


def main(args):
    {"soft": soft, "hard": hard, "score": score, "compare": compare}[args.command](args)


if __name__ == "__main__":
    run_script(main, parse_args())
