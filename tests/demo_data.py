"""Draw a small, imbalanced set of litter photos in the competition's format.

    python tests/demo_data.py out/demo/data

Writes train.json, test.json (no annotations), sample_submission.csv and photos such as batch_01/0000.jpg. The same line
again does nothing; the same options give the same bytes.
"""
import argparse
import json
import os
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

MAX_OBJECTS, PHOTOS_PER_BATCH = 6, 24
GROUNDS = ((74, 112, 58), (158, 138, 104), (96, 98, 104), (128, 122, 116))  # RGB of grass, sand, asphalt, paving


def mirrored(*points):
    """Outline, in -1..1, from the points of its right half from top to bottom."""
    return np.array([*points, *((-u, v) for u, v in points[::-1])])


def blob(lobes, depth):
    """A round outline with bulges; its first half is the right one, as in mirrored()."""
    angle = np.linspace(-np.pi / 2, np.pi * 1.5, 24, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * (1 - depth + depth * np.cos(lobes * angle))[:, None]


# name: (relative frequency, radius by side of the photo, opacity, outline, two RGB colours, where the second one is)
CLASSES = {
    "UNKNOWN": (1, 0.13, 1, blob(6, 0.3), (200, 40, 190), (90, 20, 120), lambda u, v: u * u + v * v < 0.1),
    "General trash": (14, 0.18, 1, blob(5, 0.15), (92, 50, 40), (48, 26, 24),
                      lambda u, v: np.sin(9 * u) * np.sin(8 * v) > 0),
    "Paper": (22, 0.19, 1, mirrored((0.8, -0.9), (0.75, 0.95)), (240, 236, 220), (120, 120, 130),
              lambda u, v: (abs(u) < 0.6) & (abs(v) < 0.8) & (np.sin(22 * v) > 0.6)),
    "Paper pack": (6, 0.18, 1, mirrored((0.15, -1), (0.55, -0.55), (0.55, 1)), (235, 240, 245), (40, 80, 190),
                   lambda u, v: abs(v - 0.35) < 0.35),
    "Metal": (6, 0.15, 1, mirrored((0.45, -1), (0.55, -0.85), (0.55, 0.85), (0.45, 1)), (205, 208, 214), (196, 24, 30),
              lambda u, v: abs(v) < 0.5),
    "Glass": (5, 0.2, 0.75, mirrored((0.14, -1), (0.16, -0.45), (0.38, -0.15), (0.38, 1)), (18, 96, 40),
              (150, 220, 150), lambda u, v: abs(u + 0.2) < 0.07),
    "Plastic": (14, 0.16, 0.9, mirrored((0.7, -1), (0.45, 1)), (60, 190, 220), (235, 250, 255),
                lambda u, v: np.sin(10 * v) > 0.5),
    "Styrofoam": (4, 0.17, 1, mirrored((0.95, -0.6), (0.95, 0.6), (0.3, 0.6), (0.3, 0.3)), (250, 250, 252),
                  (205, 215, 230), lambda u, v: np.sin(26 * u) * np.sin(26 * v) > 0.3),
    "Plastic bag": (20, 0.23, 0.85, mirrored((0.2, -0.3), (0.3, -0.95), (0.55, -0.95), (0.95, 0.5), (0.7, 0.95)),
                    (245, 205, 60), (250, 235, 160), lambda u, v: np.sin(14 * u + 5 * np.sin(3 * v)) > 0.7),
    "Battery": (1, 0.08, 1, mirrored((0.15, -1), (0.15, -0.85), (0.35, -0.85), (0.35, 1)), (24, 24, 26), (214, 140, 40),
                lambda u, v: v < -0.3),
    "Clothing": (2, 0.24, 1, mirrored((0.25, -0.75), (0.9, -0.5), (0.75, -0.05), (0.5, -0.2), (0.5, 0.9)),
                 (70, 60, 150), (220, 90, 120), lambda u, v: np.sin(16 * v) > 0),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder to draw into")
    parser.add_argument("--train", type=int, default=48, help="number of training photos")
    parser.add_argument("--test", type=int, default=12, help="number of test photos")
    parser.add_argument("--size", type=int, default=512, help="side of a photo, pixels")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def choose_classes(n_photos, n_train, rng):
    """Class ids of the 1 to MAX_OBJECTS objects of each photo; each class is in two of the first n_train or more."""
    frequency = np.array([row[0] for row in CLASSES.values()])
    chosen = [rng.choice(len(CLASSES), rng.integers(1, MAX_OBJECTS), p=frequency / frequency.sum()).tolist()
              for _ in range(n_photos)]
    for class_id in range(len(CLASSES)):
        without = sorted((photo for photo in chosen[:n_train] if class_id not in photo), key=len)
        for photo in without[:max(0, 2 - (n_train - len(without)))]:
            photo.append(class_id)
    return chosen


def draw_ground(kind, size, rng):
    """float32 RGB [size, size, 3]: uneven patches, grit, and joints between paving stones."""
    ground = np.tile(np.float32(GROUNDS[kind]), (size, size, 1))
    for cells, strength in ((4, 14), (16, 9), (size // 3, 12), (size, 7)):
        patches = rng.normal(0, strength, (cells, cells, 1)) + rng.normal(0, strength / 4, (cells, cells, 3))
        ground += cv2.resize(patches.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    for start in range(int(rng.integers(size // 4)), size, size // 4) if kind == len(GROUNDS) - 1 else ():
        ground[start:start + 1 + size // 128] *= 0.6
        ground[:, start:start + 1 + size // 128] *= 0.6
    return ground


def place_object(class_id, size, rng):
    """(class_id, polygons, centre, axes) of an object in pixels; (u, v) of a point is axes @ (point - centre)."""
    _, radius, _, outline, *_ = [*CLASSES.values()][class_id]
    angle, radius = rng.uniform(0, 2 * np.pi), radius * size * rng.uniform(0.8, 1.3)
    centre = rng.uniform(0.1, 0.9, 2) * size
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / radius
    parts = [outline * rng.uniform(0.93, 1.07, outline.shape)]
    if rng.random() < 0.12:  # torn in two along its axis
        parts = [np.vstack([half, [(gap, half[-1][1]), (gap, half[0][1])]])
                 for half, gap in zip(np.split(parts[0], 2), (0.07, -0.07), strict=True)]
    return class_id, [np.clip(p @ axes * radius ** 2 + centre, 0, size).round(1) for p in parts], centre, axes


def draw_object(photo, class_id, polygons, centre, axes, rng):
    """Draw one object and its shadow onto the float32 RGB `photo`."""
    _, _, opacity, _, colour, second, pattern = [*CLASSES.values()][class_id]
    size, points = len(photo), np.concatenate(polygons)
    (x0, y0), (x1, y1) = (points.min(0) - size / 16).astype(int).clip(0), (points.max(0) + size / 12).astype(int)
    photo = photo[y0:y1, x0:x1]
    fixed = [((p - (x0, y0)) * 16).round().astype(np.int32) for p in polygons]  # 4 bits after the point
    shadow = cv2.fillPoly(np.zeros(photo.shape[:2], np.float32), fixed, 1, cv2.LINE_AA, 4, (size // 64, size // 48))
    photo *= 1 - 0.45 * cv2.GaussianBlur(shadow, (0, 0), 1 + size / 128)[..., None]
    alpha = cv2.fillPoly(np.zeros(photo.shape[:2], np.uint8), fixed, 255, cv2.LINE_AA, 4)[..., None] / 255 * opacity
    grid = np.stack(np.meshgrid(np.arange(photo.shape[1]) + x0, np.arange(photo.shape[0]) + y0), -1)
    u, v = np.moveaxis((grid - centre) @ axes.T, -1, 0)
    paint = np.where(pattern(u, v)[..., None], second, colour) * rng.uniform(0.85, 1.05)
    paint *= (1 - 0.25 * u.clip(-1, 1) ** 2 + 0.12 * np.sin(4 * u + 3 * v + rng.uniform(0, 6)))[..., None]
    photo += (paint - photo) * alpha


def draw_photo(class_ids, size, kind, rng):
    """(uint8 RGB photo, [(class_id, polygons)]), the largest object at the bottom and first in the list."""
    photo = draw_ground(kind, size, rng)
    objects = [place_object(class_id, size, rng) for class_id in class_ids]
    objects.sort(key=lambda o: -sum(cv2.contourArea(p.astype(np.float32)) for p in o[1]))
    for placed in objects:
        draw_object(photo, *placed, rng)
    photo *= np.linspace(*rng.uniform(0.75, 1.15, 2), size, dtype=np.float32)[:, None, None]
    photo += rng.normal(0, 4, photo.shape)
    return photo.clip(0, 255).astype(np.uint8), [placed[:2] for placed in objects]


def encode(polygons, size, form):
    """(segmentation, area) as COCO has them; form 0 is uncompressed RLE, 1 compressed RLE, others polygons."""
    polygons = [p.ravel().tolist() for p in polygons]
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, size, size))
    flat = coco_mask.decode(rle).ravel(order="F")
    counts = (np.diff(np.flatnonzero(np.diff(flat, prepend=0, append=2)), prepend=0).tolist(), rle["counts"].decode())
    return {"size": [size, size], "counts": counts[form]} if form < len(counts) else polygons, int(flat.sum())


def draw_split(data, chosen, first, size, seed, quality=92):
    """(images, annotations) of COCO; draws a photo for each list of class ids, numbered from `first`."""
    images, annotations = [], []
    for number, class_ids in enumerate(chosen, first):
        rng = np.random.default_rng([seed, number])
        group = {"group": f"scene {number // 5}"} if number % 5 < 2 else {}  # two of five photos show one place
        kind = number // 5 % len(GROUNDS) if group else int(rng.integers(len(GROUNDS)))
        photo, objects = draw_photo(class_ids, size, kind, rng)
        name = f"batch_{number // PHOTOS_PER_BATCH + 1:02}/{number:04}.jpg"
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(data / name), photo[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))
        images.append({"id": 7 * number + 3, "file_name": name, "width": size, "height": size} | group)
        for class_id, polygons in objects:
            segmentation, area = encode(polygons, size, len(annotations))
            annotations.append({"id": 2 * len(annotations) + 1, "image_id": images[-1]["id"], "category_id": class_id,
                                "segmentation": segmentation, "area": area, "iscrowd": 0})
    return images, annotations


def draw_data(data, train=48, test=12, size=512, seed=0):
    """Draw everything into the folder `data`, unless the same is there already; train.json comes last."""
    data, path = Path(data), Path(data) / "train.json"
    info = {"description": "drawn by demo_data.py", "options": [train, test, size, seed]}
    if path.exists():
        found = json.loads(path.read_bytes()).get("info", {})
        if found == info:
            return
        if found.get("description") != info["description"]:
            raise SystemExit(f"{path} was not drawn by this script: choose another folder")
        path.unlink()
    chosen = choose_classes(train + test, train, np.random.default_rng(seed))
    images, annotations = draw_split(data, chosen[:train], 0, size, seed)
    coco = {"info": info, "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)], "images": images}
    test_images, _ = draw_split(data, chosen[train:], train, size, seed)
    for name, text in (("sample_submission.csv", "image_id,PredictionString\n"),
                       ("test.json", json.dumps(coco | {"images": test_images})),
                       ("train.json", json.dumps(coco | {"annotations": annotations}))):
        (data / f".{name}").write_text(text)
        os.replace(data / f".{name}", data / name)


if __name__ == "__main__":
    draw_data(**vars(parse_args()))
