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

from common import (Help, atomic_write, file_hash, load_data, lock, number, open_store, pseudo_folder, read_csv,
                    run_script, soft_vote, write_csv, write_json, write_npy_header)


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
            for image_id, probs in zip(test.ids, tqdm(votes, str(folder), len(test.ids), disable=None), strict=True):
                label, reason, foreground, unsure = judge(probs, args.confident, args.max_unsure)
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
