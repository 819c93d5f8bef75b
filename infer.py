"""Predict the held-out fold and the test photos with one trained model.

    python infer.py --data DATA --checkpoint out/main/r0/fpn/tu-tf_efficientnet_lite0/s512/f0/model.pt --tta flip

Writes valid.npy + valid.json and test.npy + test.json beside the checkpoint: probabilities as uint8 (0..255 for 0..1)
of shape [N, C, 256, 256], and what made them. A .json is written last: where it stands, the .npy is whole.
"""
import argparse
from pathlib import Path

from tqdm import tqdm

from common import (SUBMIT_SIZE, TTA, EvalPhotos, Help, atomic_write, claim_device, file_hash, load_data, load_model,
                    lock, normalise, number, predict_probs, resize_probs, run_script, tune_process, write_json,
                    write_npy_header)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=Help)
    what = parser.add_argument_group("what to predict")
    what.add_argument("--data", type=Path, required=True, help="the competition's folder")
    what.add_argument("--checkpoint", type=Path, required=True, help="model.pt of train.py")
    what.add_argument("--split", choices=("valid", "test"), nargs="+", default=["valid", "test"])
    what.add_argument("--tta", choices=TTA, default="flip", help="the views whose probabilities are averaged")
    system = parser.add_argument_group("system: none of these decides the result")
    system.add_argument("--batch", type=number(int, 1), default=8)
    system.add_argument("--cache", type=Path, default=Path("out/cache"), help="painted masks, shared by experiments")
    system.add_argument("--device", default="auto", help="auto takes the first idle GPU, or the CPU")
    system.add_argument("--workers", type=number(int, 0), default=0, help="loader processes")
    return parser.parse_args(argv)


def find_photos(split, ids, checkpoint):
    """Positions in `split` of the image ids; raises SystemExit when one isn't there."""
    position = {image_id: i for i, image_id in enumerate(split.ids)}
    if absent := [i for i in ids if i not in position]:
        raise SystemExit(f"{checkpoint} was validated on {len(absent)} images that DATA doesn't have, the first with "
                         f"id {absent[0]}: it was trained on other data")
    return [position[i] for i in ids]


def predict_split(model, recipe, photos, n_classes, path, args, device):
    """Write the store `path`, a .npy, of an EvalPhotos."""
    import torch
    from torch.utils.data import DataLoader
    loader = DataLoader(photos, args.batch, num_workers=args.workers, pin_memory=device.type == "cuda",
                        multiprocessing_context="fork" if args.workers else None)
    with atomic_write(path) as scratch, open(scratch, "wb") as f:
        write_npy_header(f, (len(photos), n_classes, SUBMIT_SIZE, SUBMIT_SIZE))
        for images, _ in tqdm(loader, str(path), disable=None):
            images = normalise(images.to(device, non_blocking=True), recipe["mean"], recipe["std"])
            probs = resize_probs(predict_probs(model, images, args.tta))
            f.write((probs * 255).round_().to(torch.uint8).cpu().numpy())
        f.flush()
        path.with_suffix(".json").unlink(missing_ok=True)  # from here to its rewriting the .npy has no description


def main(args):
    tune_process()
    if not args.checkpoint.is_file():
        raise SystemExit(f"{args.checkpoint}: no such checkpoint")
    with lock(args.checkpoint.parent):
        model, state = load_model(args.checkpoint)
        recipe, classes = state["recipe"], state["classes"]
        train, test = load_data(args.data, args.cache, recipe["paint"])
        if classes != train.classes:
            raise SystemExit(f"{args.checkpoint} knows the classes {classes}, DATA has {train.classes}")
        valid = find_photos(train, state["valid_ids"], args.checkpoint)
        device = claim_device(args.device)
        model = model.to(device)
        for name in args.split:
            split, indices = (train, valid) if name == "valid" else (test, range(len(test.ids)))
            path = args.checkpoint.with_name(f"{name}.npy")
            predict_split(model, recipe, EvalPhotos(split, indices, recipe["scale"]), len(classes), path, args, device)
            write_json(path.with_suffix(".json"), {
                "image_ids": [split.ids[i] for i in indices], "classes": classes, "split": name, "tta": args.tta,
                "checkpoint": file_hash(args.checkpoint), "epoch": state["epoch"], "data": split.fingerprint,
                **{k: recipe[k] for k in ("model", "scale", "round", "fold", "folds_csv", "seed", "paint")}})
            print(f"{path}: {len(indices)} images")


if __name__ == "__main__":
    run_script(main, parse_args())
