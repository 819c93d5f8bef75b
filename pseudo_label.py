"""Turn the votes of one fold's models into pseudo labels for the test photos.

    python pseudo_label.py --data DATA --exp out/main --round 1 --fold 0 out/main/r0/*/*/s512/f0/test.json

Writes EXP/rROUND/pseudo/fFOLD/: labels.npy (class ids, uint8 [N, 256, 256]), manifest.json (what made them) and, last,
index.csv (a row for each photo; set its `keep` to 0 or 1 by hand to overrule). Models that train on them must hold out
the fold that their makers held out, so that no validation image has had a part in its own training labels.
"""
import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (Help, atomic_write, file_hash, load_data, lock, number, open_store, read_csv, read_json, run_script,
                    write_csv, write_json, write_npy_header)

FILES = ("manifest.json", "labels.npy", "index.csv")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    what = parser.add_argument_group("what to label")
    what.add_argument("stores", type=Path, nargs="+", help="test.json of models of the round before, all of this fold")
    what.add_argument("--data", type=Path, required=True, help="the competition's folder")
    what.add_argument("--exp", type=Path, required=True, help="folder of the experiment, out/EXP")
    what.add_argument("--round", type=number(int, 1, 9), required=True,
                      help="the round that will learn from the labels, from 1")
    what.add_argument("--fold", type=number(int, 0), required=True)
    rule = parser.add_argument_group("rule")
    rule.add_argument("--confident", type=number(float, 0, 1), default=0.8,
                      help="a pixel is sure above this top probability")
    rule.add_argument("--max-unsure", type=number(float, 0, 1), default=0.1,
                      help="a photo with more unsure pixels than this share of its foreground is dropped")
    system = parser.add_argument_group("system: does not decide the result")
    system.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks, shared by experiments")
    return parser.parse_args(argv)


def pseudo_folder(exp, round_, fold):
    """Where the pseudo labels are that a run of this round and fold learns from."""
    return Path(exp) / f"r{round_}" / "pseudo" / f"f{fold}"


def check_makers(args, makers, test):
    """Raise SystemExit unless all stores are of the test photos, the round before and this fold."""
    expected = {"split": "test", "round": args.round - 1, "fold": args.fold, "classes": test.classes,
                "image_ids": test.ids, "folds_csv": makers[0][1]["folds_csv"]}
    for path, (_, info) in zip(args.stores, makers, strict=True):
        for key, value in expected.items():
            if info[key] != value:
                found = "differ" if key == "image_ids" else f"is {info[key]}, not {value}"
                raise SystemExit(f"{path}: {key} {found}; round {args.round} of fold {args.fold} learns only from fold "
                                 f"{args.fold} of round {args.round - 1}")


def soft_vote(stores, weights):
    """Yield float32 probs [C, SUBMIT_SIZE, SUBMIT_SIZE] of each image: the weighted mean of uint8 stores of one shape.

    One image at a time, so memory stays the same however many stores vote.
    """
    weights = np.float32(weights) / np.float32(255 * np.sum(weights))
    for images in zip(*stores, strict=True):
        yield sum(weight * image for weight, image in zip(weights, images, strict=True))


def judge(probs, confident, max_unsure):
    """(class ids uint8 [H, W], reason to drop the photo or "", foreground share, unsure share of the foreground)."""
    pred, top = probs.argmax(0).astype(np.uint8), probs.max(0)
    foreground = pred > 0
    if not foreground.any():
        return pred, "no foreground", 0.0, 0.0
    unsure = float((top[foreground] <= confident + 1e-6).mean())  # float32 makes 0.8000001 of 204 / 255
    return pred, "unsure" if unsure > max_unsure else "", float(foreground.mean()), unsure


def hand_decisions(path):
    """{image_id: keep} of the rows of an index.csv whose `keep` was changed by hand."""
    if not path.exists():
        return {}
    return {row["image_id"]: row["keep"] for row in read_csv(path, ("image_id", "keep", "reason"))
            if row["keep"] != str(int(not row["reason"]))}


# ---- what train.py reads --------------------------------------------------------------------------------------------


def hash_labels(args):
    """Hashes of the labels that a run of train.py with `args` learns from; raises SystemExit when one is missing."""
    folder = pseudo_folder(args.exp, args.round, args.fold)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise SystemExit(f"{folder} has no {', no '.join(missing)}: make the pseudo labels of this round first")
    return [file_hash(folder / name) for name in FILES]


def load_pseudo(args, test, folds_hash):
    """Entries of TrainSamples for the kept labels that a run of train.py with `args` learns from.

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
    return [(test, i, labels[i]) for i, row in enumerate(rows) if row["keep"] == "1" and not test.faults[i]]


# ---- command --------------------------------------------------------------------------------------------------------


def main(args):
    makers = [open_store(path) for path in args.stores]
    _, test = load_data(args.data, args.cache, makers[0][1]["paint"])
    check_makers(args, makers, test)
    folder = pseudo_folder(args.exp, args.round, args.fold)
    rows = []
    with lock(folder):
        by_hand = hand_decisions(folder / "index.csv")
        with atomic_write(folder / "labels.npy") as scratch, open(scratch, "wb") as f:
            write_npy_header(f, (len(test.ids), *makers[0][0].shape[2:]))
            votes = soft_vote([probs for probs, _ in makers], np.ones(len(makers)))
            votes = tqdm(votes, str(folder), len(test.ids), disable=None)
            for image_id, fault, probs in zip(test.ids, test.faults, votes, strict=True):
                label, reason, foreground, unsure = judge(probs, args.confident, args.max_unsure)
                reason = "unreadable" if fault else reason
                f.write(label)
                rows.append({"image_id": image_id, "keep": by_hand.get(str(image_id), int(not reason)),
                             "reason": reason, "foreground": f"{foreground:.4f}", "unsure": f"{unsure:.4f}"})
        reasons = Counter(row["reason"] or "kept" for row in rows)
        write_json(folder / "manifest.json", {
            "round": args.round, "fold": args.fold, "folds_csv": makers[0][1]["folds_csv"], "classes": test.classes,
            "labels": file_hash(folder / "labels.npy"),
            "confident": args.confident, "max_unsure": args.max_unsure, "photos": dict(reasons),
            "makers": [{"store": str(path), "hash": file_hash(path), **{k: info[k] for k in ("checkpoints", "tta")}}
                       for path, (_, info) in zip(args.stores, makers, strict=True)]})
        write_csv(folder / "index.csv", rows)
    if by_hand:
        print(f"{folder}: {len(by_hand)} decision(s) made by hand in index.csv kept")
    if not any(str(row["keep"]) == "1" for row in rows):
        print(f"warning: no photo is kept, so round {args.round} learns nothing new: --confident and --max-unsure are "
              "the rule's two numbers")
    print(f"{folder}: " + ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()))


if __name__ == "__main__":
    run_script(main, parse_args())
