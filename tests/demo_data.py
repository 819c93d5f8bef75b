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
    """Return an outline in -1..1 from the points of its right half from top to bottom."""
    left_half = [(-u, v) for u, v in points[::-1]]
    return np.array([*points, *left_half])


def blob(lobes, depth):
    """Return a round outline with bulges; its first half is the right one, as in mirrored()."""
    angle = np.linspace(-np.pi / 2, np.pi * 1.5, 24, endpoint=False)
    radius = 1 - depth + depth * np.cos(lobes * angle)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]


# name: (relative frequency, radius as a share of the photo's side, opacity, outline, two RGB colours, where in the
# object the second colour is)
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
    parser.add_argument("--objects", type=float, default=1.0, help="size of the objects, as a multiple of the usual")
    return parser.parse_args(argv)


def choose_classes(n_photos, n_train, rng):
    """Return for each photo the class ids of its 1 to MAX_OBJECTS objects.

    Each class is in at least two of the first n_train photos.
    """
    frequency = np.array([row[0] for row in CLASSES.values()])
    chosen = []
    for _ in range(n_photos):
        n_objects = rng.integers(1, MAX_OBJECTS)
        chosen.append(rng.choice(len(CLASSES), n_objects, p=frequency / frequency.sum()).tolist())
    for class_id in range(len(CLASSES)):
        without = [photo for photo in chosen[:n_train] if class_id not in photo]
        n_missing = max(0, 2 - (n_train - len(without)))
        for photo in sorted(without, key=len)[:n_missing]:
            photo.append(class_id)
    return chosen


def draw_ground(kind, size, rng):
    """Draw the ground, float32 RGB [size, size, 3]: uneven patches, grit, and joints between paving stones."""
    ground = np.tile(np.float32(GROUNDS[kind]), (size, size, 1))
    for cells, strength in ((4, 14), (16, 9), (size // 3, 12), (size, 7)):
        patches = rng.normal(0, strength, (cells, cells, 1)) + rng.normal(0, strength / 4, (cells, cells, 3))
        ground += cv2.resize(patches.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    if kind == len(GROUNDS) - 1:  # paving
        first_joint, width = int(rng.integers(size // 4)), 1 + size // 128
        for start in range(first_joint, size, size // 4):
            ground[start:start + width] *= 0.6
            ground[:, start:start + width] *= 0.6
    return ground


def place_object(class_id, size, rng, objects=1.0):
    """Return (class_id, polygons, centre, axes) of an object somewhere in the photo, in pixels.

    A point has the place (u, v) = axes @ (point - centre) in the object's outline.
    """
    _, radius, _, outline, *_ = list(CLASSES.values())[class_id]
    angle = rng.uniform(0, 2 * np.pi)
    radius = radius * objects * size * rng.uniform(0.8, 1.3)
    centre = rng.uniform(0.1, 0.9, 2) * size
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / radius
    parts = [outline * rng.uniform(0.93, 1.07, outline.shape)]
    if rng.random() < 0.12:  # torn in two along its axis
        right, left = np.split(parts[0], 2)
        parts = [close_half(right, 0.07), close_half(left, -0.07)]
    polygons = [np.clip(part @ axes * radius ** 2 + centre, 0, size).round(1) for part in parts]
    return class_id, polygons, centre, axes


def close_half(half, gap):
    """Return half of an outline, closed by a straight line at u = gap."""
    return np.vstack([half, [(gap, half[-1][1]), (gap, half[0][1])]])


def draw_object(photo, class_id, polygons, centre, axes, rng):
    """Draw one object and its shadow onto the float32 RGB `photo`."""
    _, _, opacity, _, colour, second, pattern = list(CLASSES.values())[class_id]
    size, points = len(photo), np.concatenate(polygons)
    x0, y0 = (points.min(0) - size / 16).astype(int).clip(0)
    x1, y1 = (points.max(0) + size / 12).astype(int)
    photo = photo[y0:y1, x0:x1]  # only this part of it changes
    fixed = [((p - (x0, y0)) * 16).round().astype(np.int32) for p in polygons]  # 4 bits after the point
    shadow = cv2.fillPoly(np.zeros(photo.shape[:2], np.float32), fixed, 1, cv2.LINE_AA, 4, (size // 64, size // 48))
    photo *= 1 - 0.45 * cv2.GaussianBlur(shadow, (0, 0), 1 + size / 128)[..., None]
    inside = cv2.fillPoly(np.zeros(photo.shape[:2], np.uint8), fixed, 255, cv2.LINE_AA, 4)
    alpha = inside[..., None] / 255 * opacity
    grid = np.stack(np.meshgrid(np.arange(photo.shape[1]) + x0, np.arange(photo.shape[0]) + y0), -1)
    u, v = np.moveaxis((grid - centre) @ axes.T, -1, 0)
    paint = np.where(pattern(u, v)[..., None], second, colour) * rng.uniform(0.85, 1.05)
    paint *= (1 - 0.25 * u.clip(-1, 1) ** 2 + 0.12 * np.sin(4 * u + 3 * v + rng.uniform(0, 6)))[..., None]
    photo += (paint - photo) * alpha


def draw_photo(class_ids, size, kind, rng, objects=1.0):
    """Draw a photo; return it, uint8 RGB, and its objects [(class_id, polygons)].

    The largest object lies at the bottom and comes first in the list.
    """
    photo = draw_ground(kind, size, rng)
    all_placed = [place_object(class_id, size, rng, objects) for class_id in class_ids]
    all_placed.sort(key=lambda placed: -area_of(placed[1]))
    for placed in all_placed:
        draw_object(photo, *placed, rng)
    photo *= np.linspace(*rng.uniform(0.75, 1.15, 2), size, dtype=np.float32)[:, None, None]
    photo += rng.normal(0, 4, photo.shape)
    return photo.clip(0, 255).astype(np.uint8), [placed[:2] for placed in all_placed]


def area_of(polygons):
    """Return the area of polygons that don't overlap, in pixels."""
    return sum(cv2.contourArea(polygon.astype(np.float32)) for polygon in polygons)


def encode(polygons, size, form):
    """Return (segmentation, area) in COCO's format.

    form: 0 is uncompressed RLE, 1 compressed RLE, every other number polygons.
    """
    polygons = [polygon.ravel().tolist() for polygon in polygons]
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, size, size))
    flat = coco_mask.decode(rle).ravel(order="F")
    segmentation = polygons
    if form == 0:
        ends = np.flatnonzero(np.diff(flat, prepend=0, append=2))
        segmentation = {"size": [size, size], "counts": np.diff(ends, prepend=0).tolist()}
    elif form == 1:
        segmentation = {"size": [size, size], "counts": rle["counts"].decode()}
    return segmentation, int(flat.sum())


def draw_split(data, chosen, first, size, seed, quality=92, objects=1.0):
    """Draw a photo for each list of class ids, numbered from `first`; return COCO's (images, annotations)."""
    images, annotations = [], []
    for number, class_ids in enumerate(chosen, first):
        rng = np.random.default_rng([seed, number])
        group = {"group": f"scene {number // 5}"} if number % 5 < 2 else {}  # two of five photos show one place
        kind = number // 5 % len(GROUNDS) if group else int(rng.integers(len(GROUNDS)))
        photo, drawn = draw_photo(class_ids, size, kind, rng, objects)
        name = f"batch_{number // PHOTOS_PER_BATCH + 1:02}/{number:04}.jpg"
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(data / name), photo[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))
        images.append({"id": 7 * number + 3, "file_name": name, "width": size, "height": size} | group)
        for class_id, polygons in drawn:
            segmentation, area = encode(polygons, size, len(annotations))
            annotations.append({"id": 2 * len(annotations) + 1, "image_id": images[-1]["id"], "category_id": class_id,
                                "segmentation": segmentation, "area": area, "iscrowd": 0})
    return images, annotations


def draw_data(data, train=48, test=12, size=512, seed=0, objects=1.0):
    """Draw everything into the folder `data`, unless the same is there already; write train.json last."""
    data, path = Path(data), Path(data) / "train.json"
    info = {"description": "drawn by demo_data.py", "options": [train, test, size, seed, objects][:4 + (objects != 1)]}
    if path.exists():
        info_there = json.loads(path.read_bytes()).get("info", {})
        if info_there == info:
            return
        if info_there.get("description") != info["description"]:
            raise SystemExit(f"{path} was not drawn by this script: choose another folder")
        path.unlink()
    chosen = choose_classes(train + test, train, np.random.default_rng(seed))
    images, annotations = draw_split(data, chosen[:train], 0, size, seed, objects=objects)
    test_images, _ = draw_split(data, chosen[train:], train, size, seed, objects=objects)
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    coco = {"info": info, "categories": categories, "images": images}
    files = {"sample_submission.csv": "image_id,PredictionString\n",
             "test.json": json.dumps(coco | {"images": test_images}),
             "train.json": json.dumps(coco | {"annotations": annotations})}
    for name, text in files.items():
        (data / f".{name}").write_text(text)
        os.replace(data / f".{name}", data / name)


if __name__ == "__main__":
    draw_data(**vars(parse_args()))
