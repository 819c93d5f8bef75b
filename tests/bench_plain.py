"""Train a plain script for so many CPU seconds, and compare it with a submission of ours on photos held out of both.

    make holdout DATA=litter HOLDOUT=0.25 EXP=plain
    make submit DATA=out/plain/data EXP=plain/ours BUDGET=5m WEIGHTS=FILE SCALES=192
    python tests/bench_plain.py --data out/plain/data --weights FILE --scale 192 --cpu-seconds 600 1800 \\
        --against out/plain/ours/submission.csv

The plain script is what a competitor writes first: segmentation-models-pytorch's FPN with the same encoder and
weights, all training photos, one mask painted by annToMask for each sample, mild augmentation, cross-entropy, Adam
with 2e-4, the last weights, no TTA. Its rate is constant, so one run serves several --cpu-seconds. Its masks are kept
in --out and used again. Two --seed show what a seed makes.
"""
import time
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO

from bench_speed import Parser, run_script

import common
import ensemble


def parse_args(argv=None):
    parser = Parser(prog="bench_plain.py", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="train.json, and test.json with its objects")
    parser.add_argument("--weights", required=True, help="state dict of the encoder, of timm")
    parser.add_argument("--encoder", default="tf_efficientnet_lite0", help="of timm, with mean and std 0.5")
    parser.add_argument("--scale", type=int, default=192)
    parser.add_argument("--cpu-seconds", type=float, nargs="+", default=[500], help="of training, rising")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="submissions to compare with")
    parser.add_argument("--image-id", choices=("id", "file_name"), default="id", help="of the submissions")
    parser.add_argument("--out", type=Path, default=Path("out/bench/plain"), help="folder of the masks")
    return parser.parse_args(argv)


def as_input(image):
    """Return the network's input, float32 [3, H, W], of an image uint8 [H, W, 3]."""
    import torch
    return torch.from_numpy((image.astype(np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)


def samples(args):
    """Return a map-style dataset of (input, mask int64 [H, W]), augmented."""
    import albumentations as A
    import torch
    coco = COCO(str(args.data / "train.json"))
    augment = A.Compose([A.Resize(args.scale, args.scale), A.HorizontalFlip(p=0.5),
                         A.Affine(scale=(0.9, 1.1), translate_percent=0.05, rotate=(-10, 10), p=0.5),
                         A.RandomBrightnessContrast(p=0.3)], seed=args.seed)

    class Samples(torch.utils.data.Dataset):
        ids = sorted(coco.imgs)

        def __len__(self):
            return len(self.ids)

        def __getitem__(self, i):
            info = coco.imgs[self.ids[i]]
            image = cv2.cvtColor(cv2.imread(str(args.data / info["file_name"])), cv2.COLOR_BGR2RGB)
            mask = np.zeros(image.shape[:2], np.uint8)
            classes = sorted(coco.cats)
            objects = coco.loadAnns(coco.getAnnIds(self.ids[i]))
            for thing in sorted(objects, key=lambda thing: -thing["area"]):
                mask[coco.annToMask(thing) > 0] = 1 + classes.index(thing["category_id"])
            sample = augment(image=image, mask=mask)
            return as_input(sample["image"]), torch.from_numpy(sample["mask"]).long()
    return Samples(), len(coco.cats) + 1


def train(args):
    """Yield (CPU seconds, the network after as many of training) for each of args.cpu_seconds."""
    import segmentation_models_pytorch as smp
    import torch
    torch.manual_seed(args.seed)
    dataset, n_classes = samples(args)
    net = smp.FPN(f"tu-{args.encoder}", encoder_weights=None, classes=n_classes)
    weights = torch.load(args.weights, weights_only=True)
    absent = net.encoder.model.load_state_dict(weights, strict=False).missing_keys  # it has more: a classifier
    if absent:
        raise common.UserError(f"{args.weights}: no {absent[0]}: not the weights of {args.encoder}")
    optimizer = torch.optim.Adam(net.parameters(), 2e-4)
    batches = forever(torch.utils.data.DataLoader(dataset, 8, shuffle=True, drop_last=True))
    spent, n_images = 0.0, 0
    for cpu_seconds in args.cpu_seconds:
        net.train()
        while spent < cpu_seconds:
            started = time.process_time()
            images, masks = next(batches)
            loss = torch.nn.functional.cross_entropy(net(images), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            n_images += len(images)
            spent += time.process_time() - started
        n_epochs = n_images / len(dataset)
        print(f"plain: {n_epochs:.1f} epochs of {len(dataset)} photos in {cpu_seconds:g} CPU s", flush=True)
        yield cpu_seconds, net.eval()


def forever(loader):
    """Yield the loader's batches, epoch after epoch."""
    while True:
        yield from loader


def predict(args, net, test):
    """Return the masks of the photos of the Split `test`, uint8 [N, S, S]."""
    import torch
    preds = []
    for i in range(len(test.ids)):
        image = cv2.resize(test.image(i), (args.scale, args.scale), interpolation=cv2.INTER_LINEAR)
        with torch.inference_mode():
            pred = net(as_input(image)[None]).argmax(1)[0].byte().numpy()
        size = (common.SUBMIT_SIZE, common.SUBMIT_SIZE)
        preds.append(cv2.resize(pred, size, interpolation=cv2.INTER_NEAREST_EXACT))
    return np.stack(preds)


def count(preds, truths, n_classes):
    """Return the pixel counts [N, C, C] of masks."""
    return np.stack([common.confusion(pred, truth, n_classes) for pred, truth in zip(preds, truths, strict=True)])


def main(args):
    _, test = common.load_data(args.data, "out/cache")
    truths = common.load_truths(common.truth_file(args.data), test, "area")
    args.out.mkdir(parents=True, exist_ok=True)
    made_from = f"{test.fingerprint[:8]}-{common.file_hash(args.weights)[:8]}"
    paths = {seconds: args.out / f"{args.encoder}-{args.scale}-{seconds:g}-{args.seed}-{made_from}.npy"
             for seconds in args.cpu_seconds}
    if not all(path.exists() for path in paths.values()):
        for seconds, net in train(args):
            with common.atomic_write(paths[seconds]) as scratch, open(scratch, "wb") as f:
                np.save(f, predict(args, net, test))
    ours = {path: count(ensemble.masks_of(path, None, args, test), truths, len(test.classes)) for path in args.against}
    for path in paths.values():
        plain = count(np.load(path), truths, len(test.classes))
        print(f"{path}: v2 {common.image_miou(plain.sum(0)):.4f} v3 {common.image_miou(plain).mean():.4f}")
        say_gains(ours, plain)


def say_gains(ours, plain):
    """Print what submissions, {path: pixel counts}, gain over the plain script's pixel counts by v2 and v3."""
    for submission, counts in ours.items():
        gains = [ensemble.gain_text(*ensemble.gain(counts, plain, metric).values()) for metric in ("v2", "v3")]
        print(f"{submission}: v2 {common.image_miou(counts.sum(0)):.4f} v3 {common.image_miou(counts).mean():.4f}, "
              f"over the plain script v2 {gains[0]}, v3 {gains[1]}")


if __name__ == "__main__":
    run_script(main, parse_args())
