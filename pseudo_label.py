"""Turn the votes of one fold's models into pseudo labels for the test photos.

    python pseudo_label.py --data DATA --exp out/main --round 1 --fold 0 out/main/r0/*/*/s512/f0/test.json

Writes EXP/rROUND/pseudo/fFOLD/: labels.npy (class ids, uint8 [N, 256, 256], 255 where there is no label; with --soft
probabilities, uint8 [N, C, 256, 256]), sheet.png (some photos that were kept, dropped, or nearly the other way),
index.csv, a row for each photo, and, last, manifest.json (what made the labels, what was dropped and why). Set `keep`
in index.csv to 0 or 1 to overrule the rule; empty it to let the rule decide again. Then train on.

Models that train on labels must hold out the fold that the labels' makers held out, so that no validation image has had
a part in its own training labels.
"""
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (BACKGROUND, IGNORE_INDEX, Hashes, Parser, atomic_write, check_output, code_of, decide,
                    foreground_ids, keep_code, load_data, lock, move_aside, number, overlay, provenance, read_csv,
                    read_description, read_json, run_script, short_hash, write_csv, write_description, write_json,
                    write_npy_header, write_sheet)
from infer import check_unchanged, open_store, read_probs, store_code, store_id

FILES = ("manifest.json", "labels.npy", "index.csv")
LINEAGE = ("round", "fold", "folds_csv")  # where these differ, a validation image may have trained a label's maker
RULES = {"image": 0.8, "pixel": 0.9}  # name -> the top probability that makes a pixel sure
ROUNDING = 1e-6  # float32 makes 0.8000001 of 204 / 255
# what decides no result; see BESIDE in common.py
BESIDE = {"check_labels", "count_reasons", "draw_sheet", "labels_hash", "label_settings", "make_recipe"}


def parse_args(argv=None):
    parser = Parser(prog="pseudo_label.py", description=__doc__)
    what = parser.add_argument_group("what to label")
    what.add_argument("stores", type=Path, nargs="+", help="test.json of models of the round before, all of this fold")
    what.add_argument("--data", type=Path, required=True, help="the competition's folder")
    what.add_argument("--exp", type=Path, required=True, help="folder of the experiment, out/EXP")
    what.add_argument("--round", type=number(int, 1, 9), required=True,
                      help="the round that will learn from the labels, from 1")
    what.add_argument("--fold", type=number(int, 0), required=True)
    what.add_argument("--allow-leak", action="store_true",
                      help="take makers of other folds or rounds too; marks every later score as contaminated")
    rule = parser.add_argument_group("rule")
    rule.add_argument("--rule", choices=RULES, default="image",
                      help="image drops photos with too many unsure pixels; pixel keeps the sure pixels of every photo")
    rule.add_argument("--confident", type=number(float, 0, 1), metavar="P",
                      help=f"a pixel is sure above this top probability, with rule pixel from it on; by rule: {RULES}")
    rule.add_argument("--max-unsure", type=number(float, 0, 1), default=0.1,
                      help="rule image: a photo with more unsure pixels than this share of its foreground is dropped")
    rule.add_argument("--uncertain", choices=("ignore", "background"), default="ignore",
                      help="rule pixel: what unsure pixels become, ignored in training or background")
    rule.add_argument("--soft", action="store_true", help="keep probabilities, from which training draws its labels")
    rule.add_argument("--coco", action="store_true", help="also write the kept labels as COCO JSON, labels.json")
    system = parser.add_argument_group("system: does not decide the result")
    system.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks, shared by experiments")
    system.add_argument("--code", choices=("new", "keep"), help="where other code has made the labels: make them anew, "
                        "or keep them as they are")
    args = parser.parse_args(argv)
    args.confident = RULES[args.rule] if args.confident is None else args.confident
    return args


def pseudo_folder(exp, round_, fold):
    """Where the pseudo labels are that a run of this round and fold learns from."""
    return Path(exp) / f"r{round_}" / "pseudo" / f"f{fold}"


def check_makers(args, infos, test):
    """Whether a maker breaks the lineage, which needs --allow-leak; raises SystemExit for stores that don't fit."""
    expected = {"split": "test", "classes": test.classes, "image_ids": test.ids, "round": args.round - 1,
                "fold": args.fold, **{key: infos[0][key] for key in ("paint", "folds_csv")}, "data": test.fingerprint}
    wrong = [(path, key, info[key]) for key, value in expected.items()
             for path, info in zip(args.stores, infos, strict=True) if info[key] != value]
    for path, key, found in wrong:
        if not (args.allow_leak and key in LINEAGE):
            differs = "differ" if key == "image_ids" else f"is {found}, not {expected[key]}"
            cure = (f"round {args.round} of fold {args.fold} learns only from fold {args.fold} of round "
                    f"{args.round - 1}") if key in LINEAGE else "run infer.py on all of them again"
            raise SystemExit(f"{path}: {key} {differs}; {cure}")
    return bool(wrong) or any(info["contaminated"] for info in infos)


def soft_vote(stores, i):
    """float32 probs [C, SUBMIT_SIZE, SUBMIT_SIZE] of image i: the mean of uint8 stores of one shape."""
    return sum(read_probs(store, i).astype(np.float32) for store in stores) / np.float32(255 * len(stores))


def judge(probs, args):
    """(label uint8 [H, W], sure bool [H, W], reason to drop the photo or "", unsure share of its foreground)."""
    label, top = probs.argmax(0).astype(np.uint8), probs.max(0)
    foreground = label > 0
    sure = top > args.confident + ROUNDING if args.rule == "image" else top >= args.confident - ROUNDING
    unsure = float((~sure[foreground]).mean()) if foreground.any() else 0.0
    if args.rule == "pixel":
        label[~sure] = IGNORE_INDEX if args.uncertain == "ignore" else 0
        foreground &= sure
    if not foreground.any():
        return label, sure, "no foreground", unsure
    return label, sure, "unsure" if args.rule == "image" and unsure > args.max_unsure else "", unsure


def soft_label(probs, label):
    """uint8 [C, H, W]: the probabilities where `label` is the likeliest class; else of background, or 0 if ignored."""
    soft, changed = np.round(probs * 255).astype(np.uint8), label != probs.argmax(0)
    soft[:, changed] = 0
    soft[0, changed & (label == 0)] = 255
    return soft


def by_rule(row):
    """`keep` of a row of index.csv before anybody changed it."""
    return str(int(not row["reason"]))


def hand_decisions(path):
    """{image_id: keep} of the rows of an index.csv whose `keep` was, now or before, changed by hand."""
    rows = read_csv(path, ("image_id", "keep", "reason", "by_hand")) if path.exists() else ()
    decisions = {row["image_id"]: row["by_hand"] if row["keep"] == (row["by_hand"] or by_rule(row)) else row["keep"]
                 for row in rows}
    return {image_id: keep for image_id, keep in decisions.items() if keep}


# ---- what train.py reads --------------------------------------------------------------------------------------------


def labels_hash(folder, hashes):
    """What names the labels in `folder`: their masks and which photos are kept, by the rule or by hand."""
    kept = [row["image_id"] for row in read_index(folder) if is_kept(row)]
    return short_hash(hashes(folder / "labels.npy"), kept)


def label_settings(manifest):
    """What names the settings and the data of labels: what the folds of one member must share."""
    return short_hash({k: v for k, v in manifest["recipe"].items() if k not in ("fold", "makers", "folds_csv")})


def read_index(folder):
    """The rows of index.csv; raises SystemExit when a `keep` is no decision."""
    rows = read_csv(folder / "index.csv", ("image_id", "keep", "reason", "classes"))
    if wrong := sorted({row["keep"] for row in rows} - {"0", "1", ""}):
        raise SystemExit(f"{folder}/index.csv: keep is {', '.join(wrong)}; it must be 0 or 1, or empty for the rule's")
    return rows


def is_kept(row):
    return (row["keep"] or by_rule(row)) == "1"


def check_labels(args, test, folds_csv, hashes):
    """labels_hash and label_settings of what a run of train.py with `args` learns from; whether it breaks the lineage.

    Raises SystemExit when a file is missing or of other data, and unless --allow-leak when the makers did not hold out
    the fold that the run holds out.
    """
    folder = pseudo_folder(args.exp, args.round, args.fold)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise SystemExit(f"{folder} has no {', no '.join(missing)}: make the pseudo labels of this round first")
    manifest = read_description(folder / "manifest.json", hashes)
    if not manifest:
        raise SystemExit(f"{folder}/manifest.json doesn't say what made the labels: run make pseudo again")
    if manifest["touched"]:
        raise SystemExit(f"{folder}/manifest.json describes another {manifest['touched'][0]}: run make pseudo again")
    if manifest["recipe"].get("data") != test.fingerprint:
        raise SystemExit(f"{folder}/manifest.json: the labels are of other test photos: run make pseudo again")
    expected = {"classes": test.classes, "paint": args.paint, "round": args.round, "fold": args.fold,
                "folds_csv": folds_csv, "contaminated": False}
    wrong = {key: value for key, value in expected.items() if manifest.get(key) != value}
    for key, value in wrong.items():
        differs = f"{folder}/manifest.json: {key} is {manifest.get(key)}, this run has {value}: run make pseudo again"
        if key not in (*LINEAGE, "contaminated"):
            raise SystemExit(differs)
        if not args.allow_leak:
            raise SystemExit(f"{differs}, since validation images may have trained these labels' makers; "
                             "--allow-leak lets that be and marks every later score as contaminated")
    return labels_hash(folder, hashes), label_settings(manifest), bool(wrong)


def load_labels(args, test):
    """(entries of TrainSamples, their class ids) of the kept labels that a run of train.py with `args` learns from."""
    folder = pseudo_folder(args.exp, args.round, args.fold)
    rows, labels = read_index(folder), np.load(folder / "labels.npy", mmap_mode="r")
    if [row["image_id"] for row in rows] != [str(i) for i in test.ids] or len(labels) != len(rows):
        raise SystemExit(f"{folder}/index.csv lists other images than test.json; run make pseudo again")
    kept = [i for i, row in enumerate(rows) if is_kept(row) and not test.faults[i]]
    return [(test, i, labels[i]) for i in kept], [[int(c) for c in rows[i]["classes"].split()] for i in kept]


# ---- command --------------------------------------------------------------------------------------------------------


def count_reasons(rows, classes):
    """{class name: {"kept" or why not: photos in which the models see it}}, under Background all photos."""
    table = {name: {} for name in classes}
    for row in rows:
        why = "kept" if row["keep"] == "1" else "by hand" if row["by_hand"] else row["reason"]
        for class_id in (0, *map(int, row["seen"].split())):
            table[classes[class_id]][why] = table[classes[class_id]].get(why, 0) + 1
    return table


def pseudo_counts(runs):
    """Rows of how many photos the pseudo labels of each round and fold have in the runs' experiments, why not all."""
    exps = {(run / "../../../../..").resolve() for run in runs}  # of EXP/rROUND/DECODER/ENCODER/sSCALE/fFOLD
    found = [read_json(path) for exp in sorted(exps) for path in sorted(exp.glob("r[0-9]/pseudo/f*/manifest.json"))]
    return [{"round": made["round"], "fold": made["fold"], **made["photos"].get(BACKGROUND, {}), **{
        f"kept with {name}": why.get("kept", 0) for name, why in made["photos"].items() if name != BACKGROUND}}
        for made in found]


def draw_sheet(path, rows, counts, test, stores, args):
    """Photos beside their labels: the clearest and the least clear of those kept and of those dropped for a reason."""
    groups = {}
    readable = [i for i, fault in enumerate(test.faults) if not fault]
    for i in sorted(readable, key=lambda i: float(rows[i]["unsure"])):
        why = "" if rows[i]["keep"] == "1" else "by hand" if rows[i]["by_hand"] else rows[i]["reason"]
        groups.setdefault(why, []).append(i)
    tiles = []
    for why, some in sorted(groups.items()):  # those that are kept first
        for i in some if len(some) < 12 else some[:6] + some[-6:]:
            image, (label, sure, *_) = test.image(i), judge(soft_vote(stores, i), args)
            shown = np.where(sure | (label == 0), label, IGNORE_INDEX)
            tiles.append([(test.file_names[i], overlay(image)),
                          (f"{why or 'kept'}; {float(rows[i]['unsure']):.0%} of it unsure", overlay(image, shown))])
    legend = {c: f"{name if c else 'all photos'}: " + ", ".join(f"{n} {why}" for why, n in counts[name].items())
              for c, name in enumerate(counts)} | {IGNORE_INDEX: "unsure"}
    write_sheet(path, tiles, legend, across=2)


def write_coco(path, test_json, split, masks):
    """Write pairs (position in `split`, mask uint8 [SUBMIT_SIZE, SUBMIT_SIZE]) as COCO JSON.

    Each class in a photo is one object, an RLE of the photo's size; images and categories are those of `test_json`.
    """
    import cv2
    from pycocotools import mask as coco_mask
    coco, objects = read_json(test_json), []
    categories = sorted(category["id"] for category in coco["categories"])
    for i, mask in masks:
        height, width = split.sizes[i]
        large = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        for class_id in foreground_ids(large):
            rle = coco_mask.encode(np.asfortranarray(large == class_id))
            objects.append({"id": len(objects) + 1, "image_id": split.ids[i], "category_id": categories[class_id - 1],
                            "segmentation": rle | {"counts": rle["counts"].decode()}, "iscrowd": 1,
                            "area": int(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist()})
    write_json(path, {"images": coco["images"], "categories": coco["categories"], "annotations": objects})


def write_labels(path, test, stores, by_hand, args):
    """Write labels.npy; returns the rows of index.csv."""
    rows, (n, *shape) = [], stores[0].shape
    with atomic_write(path) as scratch, open(scratch, "wb") as f:
        write_npy_header(f, (n, *(shape if args.soft else shape[1:])))
        for i, image_id in enumerate(tqdm(test.ids, str(path.parent), disable=None)):
            probs = soft_vote(stores, i)
            label, _, reason, unsure = judge(probs, args)
            reason = "unreadable" if test.faults[i] else reason
            f.write(soft_label(probs, label) if args.soft else label)
            row = {"image_id": image_id, "keep": "", "reason": reason, "by_hand": by_hand.get(str(image_id), ""),
                   "unsure": f"{unsure:.4f}", "classes": " ".join(map(str, foreground_ids(label))),
                   "seen": " ".join(map(str, foreground_ids(probs.argmax(0))))}
            rows.append(row | {"keep": row["by_hand"] or by_rule(row)})
    return rows


def make_recipe(args, data, folds, paint, makers):
    """Everything but code that decides the labels, as plain values; makers: store_id of each store."""
    settings = {name: getattr(args, name) for name in ("round", "fold", "rule", "confident", "max_unsure", "uncertain",
                                                       "soft", "coco")}
    return settings | {"paint": paint, "data": data, "folds_csv": folds, "makers": sorted(makers)}


def labels_code(makers):
    """code_of the labels and of the stores that they come from, which may be gone; makers: (model, tta) of each."""
    code = {}
    for model, tta in makers:
        code |= store_code(model, tta)
    return dict(sorted((code | code_of("labels")).items()))


def main(args):
    folder = pseudo_folder(args.exp, args.round, args.fold)
    check_output(args.data, folder)
    hashes = Hashes(args.cache)
    stores, infos = zip(*(open_store(path, hashes) for path in args.stores), strict=True)
    _, test = load_data(args.data, args.cache, infos[0]["paint"])
    contaminated = check_makers(args, infos, test)
    recipe = make_recipe(args, test.fingerprint, infos[0]["folds_csv"], infos[0]["paint"], map(store_id, infos))
    wanted = provenance(recipe, labels_code((info["model"], info["tta"]) for info in infos))
    with lock(folder):
        made = read_description(folder / "manifest.json", hashes) if (folder / "index.csv").exists() else None
        todo = decide(folder, made, wanted, args.code) if made and not made["touched"] else "make"
        if todo != "done":
            keep_code(args.exp)
        if todo == "kept":
            write_description(folder / "manifest.json", made, **{k: v for k, v in made.items() if k != "touched"})
        if todo == "make":
            make_labels(folder, args, test, stores, infos, wanted, contaminated, hashes)
        else:
            print(f"{folder} is there and was made like this: nothing to do")
        hashes.save()


def make_labels(folder, args, test, stores, infos, wanted, contaminated, hashes):
    """Write the labels, what describes them and, last, manifest.json; decisions made by hand in index.csv stay."""
    import pandas as pd
    by_hand = hand_decisions(folder / "index.csv")
    rows = write_labels(folder / "new-labels.npy", test, stores, by_hand, args)
    check_unchanged(args.stores, infos)
    counts = count_reasons(rows, test.classes)
    draw_sheet(folder / "sheet.png", rows, counts, test, stores, args)
    coco = [folder / "labels.json"] if args.coco else []
    if coco:
        labels = np.load(folder / "new-labels.npy", mmap_mode="r")
        write_coco(folder / "labels.json", args.data / "test.json", test, (
            (i, labels[i].argmax(0).astype(np.uint8) if args.soft else labels[i])
            for i, row in enumerate(rows) if row["keep"] == "1"))
    if (folder / "manifest.json").exists() and (folder / "index.csv").exists():
        (folder / "replaced").mkdir(exist_ok=True)
        shutil.copy2(folder / "index.csv", folder / "replaced")  # not moved: it has the decisions made by hand
    move_aside(folder, ["manifest.json", "labels.npy"])
    (folder / "new-labels.npy").rename(folder / "labels.npy")
    write_csv(folder / "index.csv", rows)
    makers = [{"store": str(path), "id": store_id(info), **{k: info[k] for k in ("checkpoints", "tta", "state")}}
              for path, info in zip(args.stores, infos, strict=True)]
    write_description(
        folder / "manifest.json", wanted, round=args.round, fold=args.fold, folds_csv=infos[0]["folds_csv"],
        classes=test.classes, paint=infos[0]["paint"], contaminated=contaminated, photos=counts, makers=makers,
        files={path.name: hashes(path) for path in (folder / "labels.npy", *coco)})
    print(f"{folder}: photos by the classes that the models see in them, {BACKGROUND} is all of them\n"
          + pd.DataFrame(counts).T.fillna(0).astype(int).to_string())
    if by_hand:
        print(f"{folder}: {len(by_hand)} decision(s) made by hand in index.csv kept")
    if contaminated:
        print(f"warning: {folder} is contaminated: what learns from it has no honest validation score")
    if "kept" not in counts[BACKGROUND]:
        print(f"warning: no photo is kept, so round {args.round} learns nothing new: --confident and --max-unsure are "
              "the rule's two numbers")


if __name__ == "__main__":
    run_script(main, parse_args())
