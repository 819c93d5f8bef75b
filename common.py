"""Data, models, losses, metrics, prediction and files: what the scripts share.

In this order: data, augmentation, ClassMix, models, losses, metrics, TTA and prediction, stores,
pseudo labels; what made an artefact; files, processes and devices; pictures and pages.

Shapes are fixed here and nowhere else:
    image   uint8   [H, W, 3]      RGB as read from the file; [B, H, W, 3] in a batch
    mask    uint8   [H, W]         class ids, IGNORE_INDEX where unlabelled; [B, H, W] in a batch
    logits  float32 [B, C, H, W]   before softmax
    probs   float32 [B, C, H, W]   after softmax: 0..1, sums to 1 over C
    store   uint8   [N, C, SUBMIT_SIZE, SUBMIT_SIZE]   probs x 255 on disk
Importing this file does nothing and is quick: libraries that take seconds to import are imported in
the functions that use them. It raises UserError for all that a user has to mend.
"""
import argparse
import ast
import base64
import csv
import ctypes
import errno
import fcntl
import glob
import hashlib
import inspect
import io
import json
import logging
import math
import os
import platform
import re
import reprlib
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
import warnings
import zipfile
import zlib
from collections import defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from itertools import accumulate, count, cycle, islice, product
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from textwrap import shorten
from urllib.parse import unquote

import numpy as np
from tqdm import tqdm

BACKGROUND = "Background"
IGNORE_INDEX = 255
SUBMIT_SIZE = 256  # side of a submitted mask, pixels: the competition's
MAX_CLASSES = 200  # with the background; a submission is written with a byte for each id
MAX_PIXELS = 89_000_000  # of one photo: 267 MB decoded; from 89.5 million on Pillow warns of a bomb
MAX_FAULTS = 1000  # of one JSON file: reading it ends there
TRAIN_ONLY, NO_FOLD = -1, -2  # folds of images: in training alone; not decided yet
ALL = "all"  # the fold of a run that learns from all images and holds none out
# each use of random numbers leads its seed with one of these, so that no two draw the same
ORDER, SAMPLE, STEP, MIX, HOOK = range(1, 6)  # from 1: numpy pads seeds with zeros


class UserError(Exception):
    """What the user has to mend, in one line that says what is wrong, where, and what to do.

    run_script prints it and ends the process with `code`; a notebook shows it like any exception.
    """

    def __init__(self, text, code=1):
        super().__init__(text)
        self.code = code


# ---- data: photos and masks ----------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The photos of train or test in the order of the JSON, with their painted masks.

    A list has one value for each photo unless its comment says otherwise.
    """
    root: Path
    classes: list  # names by class id
    category_ids: list  # of the JSON, by class id from 1
    ids: list
    file_names: list
    sizes: list  # (height, width)
    groups: list  # a label; photos with the same label stay on one side of every fold
    pixels: list  # pixel counts by class id; the list is empty for test
    objects: list  # {"sizes": ..., "covered": ...} as paint_mask returns them; empty for test
    digests: list  # hash of the photo's file, "" if it can't be read
    contents: list  # hash of the photo's pixels, "" if it has a fault
    masks: np.ndarray | None  # uint8, all masks one after another, flat; None for test
    photos: np.ndarray | None  # the decoded photos likewise, 3 bytes a pixel; None if not cached
    faults: list  # what is wrong with the photo, or None; only test photos may have a fault
    odd: list  # ids of the annotations with a polygon that leaves the photo or has no area
    turns: list  # what choose_orientation says of the photo's EXIF orientation
    low_contrast: list  # whether the photo shows next to nothing; see check_image
    dropped: list  # names of the categories that are no classes, by DATA_OPTIONS's "unused"
    orientation: str  # how photos are read whose "turns" is "ambiguous"
    fingerprint: str  # a line that names the JSON, the settings and the photos' content

    def image(self, index):
        """Return the photo, uint8 RGB [H, W, 3]; a black one if it has a fault.

        Raises OSError if the photo can't be read any more.
        """
        if self.faults[index]:
            return np.zeros((*self.sizes[index], 3), np.uint8)
        if self.photos is not None:
            start, end = 3 * self.starts[index], 3 * self.starts[index + 1]
            return np.asarray(self.photos[start:end]).reshape(*self.sizes[index], 3)
        try:
            path = self.root / self.file_names[index]
            return read_image(path, *self.sizes[index], self.orientation)
        except OSError as e:
            name = f"image {self.ids[index]} ({self.file_names[index]})"
            raise OSError(f"{name} has changed: {e.strerror}; run the same again") from None

    @cached_property
    def starts(self):
        """Return pixel_starts of the photos."""
        return pixel_starts(self.sizes)

    def mask(self, index):
        """Return the mask of a training photo, uint8 [H, W]."""
        if self.masks is None:
            raise UserError("test photos have no mask")
        start, end = self.starts[index], self.starts[index + 1]
        return self.masks[start:end].reshape(self.sizes[index])

    def truth(self, index):
        """Return the mask at the submission's size, as the leaderboard sees it.

        A mask of 512 x 512 becomes the competition's mask[::2, ::2]. For test it is IGNORE_INDEX.
        """
        if self.masks is None:
            return np.full((SUBMIT_SIZE, SUBMIT_SIZE), IGNORE_INDEX, np.uint8)
        return submitted_size(self.mask(index))


def submitted_size(mask):
    """Return a mask uint8 [H, W] at the submission's size; see Split.truth."""
    import cv2
    return cv2.resize(mask, (SUBMIT_SIZE, SUBMIT_SIZE), interpolation=cv2.INTER_NEAREST)


def pixel_starts(sizes):
    """Return [N + 1] positions: where each photo's pixels begin if all are put one after another.

    The last position is where the pixels of the last photo end. sizes: N pairs (height, width).
    """
    return [0, *accumulate(map(math.prod, sizes))]


# how DATA is read: options of the scripts, arguments of load_data and keys of every recipe;
# name -> (values, the first of them by default, what it decides)
DATA_OPTIONS = {
    "paint": (("area", "id", "order"), "which object wins where they overlap: the smaller, the "
              "higher class, the later"),
    "orientation": (("shown", "stored"), "whether photos that EXIF turns without changing their "
                    "size are read turned, as most labelling tools show them, or as stored"),
    "unused": (("keep", "drop"), "whether categories without annotations, such as the root of an "
               "export's categories, are classes")}


def add_data_options(group, names=tuple(DATA_OPTIONS)):
    """Add the options `names` of DATA_OPTIONS to a group of a parser."""
    for name in names:
        values, text = DATA_OPTIONS[name]
        group.add_argument(f"--{name}", choices=values, default=values[0], help=text)


def data_options(values):
    """Return those of a recipe's values, or of vars(args), that say how DATA is read."""
    return {name: values[name] for name in DATA_OPTIONS}


def load_data(data, cache, paint="area", orientation="shown", unused="keep", decoded=False):
    """Check the folder `data` in one pass and return its (train, test) Splits.

    Raises UserError that lists all faults at once. A test photo that can't be read only brings a
    warning, unless none can be read: a submission needs all its rows.

    Masks are painted once, into a folder of `cache` that is named by the JSON files, the settings
    and the code, so a stale cache is never read; when a photo has changed, everything is checked
    again. With `decoded` the training photos are cached too; later calls read them from there even
    without it. Nothing is written under `data`. DATA_OPTIONS says what the other arguments do.
    """
    data, hashes = Path(data), Hashes(cache)
    check_output(data, cache)
    paths = data_files(data)
    settings = {"paint": paint, "orientation": orientation, "unused": unused}
    for name, (values, _) in DATA_OPTIONS.items():
        if settings[name] not in values:
            raise UserError(f"{name} is {settings[name]!r}, it must be {' or '.join(values)}")
    folder = cache_folder(cache, paths, settings, hashes)
    build = partial(build_cache, folder, paths, settings, hashes)
    splits = open_or_build(folder, data, hashes, build, decoded)
    for fault in filter(None, splits["test"].faults):
        print(f"warning: test.json: {fault}: it counts as background", flush=True)
    return splits["train"], splits["test"]


def load_extra(folder, train, test, cache, paint="area", orientation="shown", unused="keep"):
    """Return (Split, indices) of the labelled photos of another COCO folder, `folder`.

    Its classes are those of `train`, found by their names: their order may differ and some may be
    missing. indices: the positions of the photos to learn from, those that neither of DATA's Splits
    `train` and `test` has: a fold may hold the others out. DATA_OPTIONS says what the other
    arguments do; categories without annotations are never in the way. Raises UserError that lists
    all faults, as load_data does, also of categories that are no classes.
    """
    folder, hashes = Path(folder), Hashes(cache)
    check_output(folder, cache)
    path = extra_json(folder)
    settings = {"paint": paint, "orientation": orientation, "unused": unused}
    place = cache_folder(cache, [path], settings, hashes, train.classes)
    build = partial(build_extra, place, path, train.classes, settings, hashes)
    split = open_or_build(place, folder, hashes, build)["train"]
    indices = not_in_data(split, train, test)
    if not indices:
        raise UserError(f"{folder}: all of its labelled photos are in DATA already")
    # which they are, the test photos decide too
    both = join_fingerprints(split.fingerprint, test.fingerprint)
    return replace(split, fingerprint=both), indices


def load_unlabelled(folder, train, test, cache, orientation="shown"):
    """Return the Split of the photos at any depth in `folder`, which needs no JSON.

    Their ids are their names below `folder`. Photos that can't be read, and those that DATA's
    Splits `train` and `test` have, are left out, with a line that says so. Raises UserError if
    nothing is left.
    """
    folder, hashes = Path(folder), Hashes(cache)
    check_output(folder, cache)
    names, settings = find_photos(folder)[0], {"orientation": orientation}
    if unsafe := [name for name in names if name_fault(name)]:
        raise UserError(f"{folder}: {clean(unsafe[0])} {name_fault(unsafe[0])}: rename it")
    place = cache_folder(cache, [], settings, hashes, names, train.classes)
    build = partial(build_unlabelled, place, folder, names, train.classes, settings, hashes)
    split = open_or_build(place, folder, hashes, build)["test"]
    for fault in filter(None, split.faults):
        print(f"warning: {folder}: {fault}: left out", flush=True)
    kept = not_in_data(split, train, test)
    if not kept:
        raise UserError(f"{folder}: no photo is left that can be read and isn't in DATA")
    # which are left out, DATA decides too
    whole = join_fingerprints(split.fingerprint, train.fingerprint, test.fingerprint)
    return replace(split, fingerprint=whole, **{name: [getattr(split, name)[i] for i in kept]
                                                for name in PHOTO_LISTS if getattr(split, name)})


def not_in_data(split, train, test):
    """Return the positions of a Split's readable photos that DATA's `train` and `test` don't have.

    A line tells how many they have: a fold may hold these out.
    """
    known = {*train.contents, *test.contents}
    readable = [i for i, fault in enumerate(split.faults) if not fault]
    kept = [i for i in readable if split.contents[i] not in known]
    if n_known := len(readable) - len(kept):
        print(f"{split.root}: {n_known} photo(s) that are in DATA too are left out", flush=True)
    return kept


def join_photos(test, unlabelled):
    """Return one Split of the photos of two that have no masks, those of `test` first."""
    names = [str(Path(unlabelled.root).absolute() / name) for name in unlabelled.file_names]
    lists = {name: getattr(test, name) + getattr(unlabelled, name) for name in PHOTO_LISTS}
    lists["file_names"] = test.file_names + names
    both = join_fingerprints(test.fingerprint, unlabelled.fingerprint)
    return replace(test, **lists, fingerprint=both)


def join_fingerprints(*fingerprints):
    """Return one fingerprint of what several Splits decide together."""
    return " and ".join(fingerprints)


def open_or_build(folder, root, hashes, build, decoded=False):
    """Return the {name: Split} of the photos in `root` that a folder of the cache holds.

    build() fills it if it isn't whole. decoded: as in load_data.
    """
    splits = open_cache(folder, root, hashes)
    if splits is None or (decoded and splits["train"].photos is None):
        with lock(folder, wait=True):  # the first process builds, the others wait for it
            splits = open_cache(folder, root, hashes) or build()
            if decoded and splits and splits["train"].photos is None:
                write_photos(folder / "photos.npy", splits["train"])
                write_checksums(folder, hashes)
                splits = open_cache(folder, root, hashes)
    hashes.save()
    if splits is None:
        raise UserError(f"photos in {root} changed while they were read: run it again")
    return splits


def data_files(data):
    """Return the paths of the training and the test JSON in the folder `data`.

    Raises UserError if a file or the folder is missing.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; DATA is the competition's folder with train.json "
                        "and test.json")
    paths = (training_json(data), data / "test.json")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"no {' and no '.join(missing)}; DATA is the competition's folder")
    return paths


def training_json(folder):
    """Return the path of a folder's train_all.json or, if it has none, of its train.json."""
    path = Path(folder) / "train_all.json"
    return path if path.exists() else Path(folder) / "train.json"


def extra_json(folder):
    """Return the path of the training JSON of a folder of EXTRA; raise UserError if it has none."""
    path = training_json(folder)
    if not path.is_file():
        raise UserError(f"no {path}; each of EXTRA is a folder with train.json and its photos")
    return path


def find_photos(folder):
    """Return (names of the photos at any depth of a folder, relative to it; those of other files).

    The ending of its name, in any case, makes a file a photo. Hidden files, which some systems put
    beside photos, are left out; links are followed. Raises UserError if there is no photo.
    """
    def stop(error):
        raise error
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of photos")
    photos, others = [], []
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(place) in map(os.path.realpath, Path(place).absolute().parents):
            folders.clear()  # a link that leads in a circle
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                is_photo = name.lower().endswith(PHOTO_ENDINGS)
                path = os.path.relpath(os.path.join(place, name), folder)
                (photos if is_photo else others).append(path)
    if not photos:
        raise UserError(f"{folder}: no photo at any depth; the name of one ends in "
                        f"{', '.join(PHOTO_ENDINGS)}")
    return sorted(photos), sorted(others)


def truth_file(data, truth=None):
    """Return the annotated COCO file of the test photos, or None if there is none.

    It is `truth`, a path, or else the test.json of the folder `data` if that has annotations. Only
    scores are made of it: nothing is fitted on it.
    """
    if truth:
        return Path(truth)
    path = data_files(data)[1]
    coco = read_json(path)
    return path if isinstance(coco, dict) and coco.get("annotations") else None


def load_truths(path, test, paint):
    """Return the masks uint8 [N, S, S] of the photos of the Split `test` by an annotated COCO file.

    S is SUBMIT_SIZE; paint: as in DATA_OPTIONS. The file may list more images. Raises UserError
    that lists what is wrong with it, such as an id that another photo has.
    """
    used = set(test.category_ids) if test.dropped else None
    photos, categories, _, faults = read_coco(path, used, labelled=True)
    if not faults and [BACKGROUND, *categories.values()] != test.classes:
        faults.append(f"{path}: its categories are {', '.join(categories.values())}, those of the "
                      f"data {', '.join(test.classes[1:])}")
    by_id = {photo["id"]: photo for photo in photos}
    for image_id, name, size in zip(test.ids, test.file_names, test.sizes, strict=True):
        photo = by_id.get(image_id)
        if photo is None:
            faults.append(f"{path}: test image {image_id}: it has no such image")
        elif photo["file_name"] != name:
            faults.append(f"{path}: test image {image_id}: it is {photo['file_name']} there and "
                          f"{name} in the data: another photo, or one by another name")
        elif photo["size"] != tuple(size):
            faults.append(f"{path}: test image {image_id}: it has the size {photo['size']}, not "
                          f"{tuple(size)}")
    if faults:
        raise UserError("\n".join(faults[:MAX_FAULTS]))
    return np.stack([paint_truth(by_id[image_id], paint, len(test.classes))
                     for image_id in test.ids])


def paint_truth(photo, paint, n_classes):
    """Return the mask of a photo of read_coco at the submission's size; paint: see paint_mask."""
    mask, *_ = paint_mask(photo["objects"], *photo["size"], paint, n_classes)
    return submitted_size(mask)


# ---- data: samples and batches -------------------------------------------------------------------


# what a model sees of a photo: all of it, squashed to its square, or squares of its own resolution
CROPS = ("photo", "native")


class EvalPhotos:
    """The photos `indices` of a Split for a DataLoader, for models of a `crop` in CROPS.

    An item is (image uint8, truth uint8 [SUBMIT_SIZE, SUBMIT_SIZE]); the image is squashed to
    [scale, scale, 3], or with "native" the photo itself, which predict_windows takes.
    """

    def __init__(self, split, indices, scale, crop="photo"):
        self.split, self.indices, self.scale, self.crop = split, indices, scale, crop

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, item):
        index = self.indices[item]
        image, truth = self.split.image(index), self.split.truth(index)
        return np.array(image) if self.crop == "native" else resize_image(image, self.scale), truth

    def largest(self):
        """Return the bytes of the largest item."""
        sizes = [math.prod(self.split.sizes[index]) for index in self.indices]
        n_pixels = max(sizes, default=0) if self.crop == "native" else self.scale ** 2
        return 3 * n_pixels + SUBMIT_SIZE ** 2


def full_batch(items, size):
    """Return a batch's items filled up to `size` with the last one; who predicts them drops those.

    A GPU needs seconds to prepare for each batch size that it meets.
    """
    return [*items, *[items[-1]] * (size - len(items))]


def as_photo(image):
    """Return a photo as numpy; raise UserError if it isn't uint8 [H, W, 3], or empty."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UserError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    return image


def resize_image(image, scale):
    """Return an image uint8 [H, W, 3] squashed to the square that the network sees."""
    import cv2
    # INTER_AREA averages when it shrinks, but repeats pixels when it enlarges
    shrinks = scale < min(image.shape[:2])
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (scale, scale), interpolation=interpolation)


class TrainSamples:
    """Augmented samples by key (epoch, index) and, for a DataLoader, batches by lists of keys.

    A sample is (image uint8 [scale, scale, 3], mask uint8 [scale, scale]). Everything random in it
    is drawn from (seed, epoch, index): neither resuming nor the number of workers changes it.

    entries: (Split, index in it, label) for each index of a key. The label is None for the mask of
    the Split, or a pseudo label: uint8 class ids [H, W] or probabilities [C, H, W].
    augment: a function (image, mask, rng) that returns both at the scale.
    mix: (probability, weights [C]) for ClassMix, or None.
    side: what `augment` gets is a square of so many pixels, of native_crop; None: the whole photo.
    """

    def __init__(self, entries, augment, seed, mix=None, side=None):
        self.entries, self.augment, self.seed, self.mix = entries, augment, seed, mix
        self.side = side

    def __getitem__(self, key):
        import cv2
        epoch, index = key
        split, photo_index, label = self.entries[index]
        image = split.image(photo_index)
        rng = np.random.default_rng([SAMPLE, self.seed, epoch, index])
        if label is None:
            mask = np.asarray(split.mask(photo_index))
        else:
            if label.ndim == 3:
                label = draw_label(label, rng.random())
            size = image.shape[1::-1]  # (width, height)
            mask = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)
        if self.side:
            image, mask = native_crop(image, mask, self.side, rng)
        return self.augment(image, mask, rng)

    def __getitems__(self, keys):
        """Return a batch of tensors, images [B, scale, scale, 3] and masks [B, scale, scale]."""
        import torch
        images, masks = zip(*[self[key] for key in keys], strict=True)
        images, masks = np.stack(images), np.stack(masks)
        if self.mix and len(keys) > 1:
            rng = np.random.default_rng([MIX, self.seed, *np.ravel(keys).tolist()])
            images, masks = classmix(images, masks, *self.mix, rng)
        return torch.from_numpy(images), torch.from_numpy(masks)


OBJECT_SHARE = 0.5  # of the crops are laid on an object: most squares of a large photo have none


def native_crop(image, mask, side, rng):
    """Return a square of side x side pixels of a photo and its mask, at the photo's resolution.

    A share OBJECT_SHARE of them has a pixel of a class that is drawn from those in the photo, each
    as likely as any; the others lie anywhere. A smaller photo is reflected beyond its right and
    lower edge, where the mask is IGNORE_INDEX.
    """
    import cv2
    height, width = mask.shape
    histogram = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel()
    present = 1 + np.flatnonzero(histogram[1:IGNORE_INDEX])
    highest = np.maximum(0, (height - side, width - side))
    top, left = rng.integers(highest, endpoint=True)
    if len(present) and rng.random() < OBJECT_SHARE:
        pixels = np.flatnonzero(mask == rng.choice(present))
        pixel = divmod(int(rng.choice(pixels)), width)
        top, left = np.clip(pixel - rng.integers(side, size=2), 0, highest)
    box = np.s_[top:top + side, left:left + side]
    image, mask = padded_to(image[box], side), mask[box]
    ignored = ((0, side - mask.shape[0]), (0, side - mask.shape[1]))
    return image, np.pad(mask, ignored, constant_values=IGNORE_INDEX)


def padded_to(image, side):
    """Return an image uint8 [H, W, 3] of at least side x side, reflected beyond its last pixels."""
    import cv2
    bottom, right = (max(0, side - length) for length in image.shape[:2])
    if not bottom and not right:
        return image
    return cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REFLECT_101)


def draw_label(probs, u):
    """Draw class ids uint8 [H, W] from probs uint8 [C, H, W], with one u in [0, 1) for all pixels.

    Each pixel has a class as often as it is likely, so over the epochs the loss is that of soft
    targets; since neighbours share u, every draw has objects and no noise. Where no class has a
    probability the label is IGNORE_INDEX.
    """
    cumulative = probs.cumsum(0, dtype=np.uint16)
    total = cumulative[-1]
    label = (cumulative <= total * u).sum(0, dtype=np.uint8)
    return np.where(total > 0, label, np.uint8(IGNORE_INDEX))


class EpochBatches:
    """Batches of keys (epoch, index) for a DataLoader, in an order drawn from (seed, epoch).

    Set `epoch` before each pass. In an epoch each image comes once, or with `odds` [N] images are
    drawn by them. Every batch is full: the last one is filled up with images that come again.

    The last `n_pseudo` of the images have pseudo labels. With a `ratio` every batch has that many
    of them for each labelled image, and an epoch goes once through the labelled ones; from the
    epoch `labelled_from` on only labelled images come.

    Each rank gets its share of every batch.
    """
    first = 0  # the number of the batch to begin at

    def __init__(self, n_images, batch_size, seed, odds=None, n_pseudo=0, ratio=0,
                 labelled_from=math.inf):
        self.n_images, self.batch_size = n_images, batch_size
        self.seed, self.epoch, self.odds = seed, 0, odds
        self.n_pseudo, self.ratio, self.labelled_from = n_pseudo, ratio, labelled_from
        self.rank, self.n_ranks = ranks()

    def sources(self):
        """Return [(image numbers, how many of them a batch has)] of this epoch.

        The epoch is over when the first source is.
        """
        images = np.arange(self.n_images)
        labelled, pseudo = np.split(images, [self.n_images - self.n_pseudo])
        if self.epoch >= self.labelled_from:
            return [(labelled, self.batch_size)]
        if not self.ratio or not self.n_pseudo:
            return [(images, self.batch_size)]
        n_labelled = round(self.batch_size / (1 + self.ratio))
        n_labelled = int(np.clip(n_labelled, 1, self.batch_size - 1))
        return [(labelled, n_labelled), (pseudo, self.batch_size - n_labelled)]

    def __len__(self):
        images, share = self.sources()[0]
        return math.ceil(len(images) / share)

    def __iter__(self):
        rng = np.random.default_rng([ORDER, self.seed, self.epoch])
        n_batches = len(self)
        parts = []  # of each source its share of every batch
        for images, share in self.sources():
            order = self.draw_order(images, n_batches * share, rng)
            parts.append(order.reshape(n_batches, share))
        batches = np.concatenate(parts, axis=1)
        for batch in batches[self.first:]:
            own = batch[self.rank::self.n_ranks].tolist()
            yield [(self.epoch, index) for index in own]

    def draw_order(self, images, n_drawn, rng):
        """Return `n_drawn` of `images`: by the odds, or all of them as often as it takes."""
        if self.odds is not None:
            odds = self.odds[images]
            return rng.choice(images, n_drawn, p=odds / odds.sum())
        n_rounds = math.ceil(n_drawn / len(images))
        return np.concatenate([rng.permutation(images) for _ in range(n_rounds)])[:n_drawn]


def rare_odds(present):
    """Return the odds [N] to draw each image, which sum to 1; present: bool [N, C].

    They are inverse to the number of images that have the image's rarest class.
    """
    odds = (present / present.sum(0).clip(1)).max(1)
    return odds / odds.sum()


# ---- data: the cache -----------------------------------------------------------------------------

# field of a Split in index.json -> key of a photo's dict, as read_coco and check_photo fill it
PHOTO_KEYS = {
    "ids": "id", "file_names": "file_name", "sizes": "size", "pixels": "pixels",
    "objects": "painted", "digests": "digest", "contents": "content", "faults": "fault",
    "odd": "odd", "turns": "turn", "low_contrast": "low_contrast"}
PHOTO_LISTS = (*PHOTO_KEYS, "groups")  # fields of a Split with a value for each photo


def cache_folder(cache, paths, settings, hashes, *more):
    """Return the folder in `cache` for JSON files, the settings of `data_options` and `more`.

    The code names it too.
    """
    json_hashes = [hashes(path) for path in paths]
    return Path(cache) / short_hash(json_hashes, settings, code_of("masks"), *more)


def fingerprint(json_hash, settings, digests):
    """Return a line that names the content of a split.

    json_hash: of the file that lists its photos, or of their names; settings: as in cache_folder;
    digests: hashes of its photos, "" where one is missing.
    """
    return f"{json_hash} {' '.join(settings.values())} {short_hash(*digests)}"


def open_cache(folder, data, hashes):
    """Return the Splits by name that `folder` holds, with their arrays mapped into memory.

    The names are "train" and "test". Return None if the cache isn't whole or if a photo was changed
    or removed since.
    """
    index, photos = read_index_json(folder, hashes), None
    if index is None or not matches_checksum(folder / "masks.npy", hashes):
        return None
    for entry in index.values():
        paths = [f"{data}/{name}" for name in entry["file_names"]]
        if hashes.of_all(paths) != entry["digests"]:
            return None
    masks = np.load(folder / "masks.npy", mmap_mode="r")
    if matches_checksum(folder / "photos.npy", hashes):
        photos = np.load(folder / "photos.npy", mmap_mode="r")
    arrays = {"train": {"masks": masks, "photos": photos}, "test": {"masks": None, "photos": None}}
    return {name: Split(root=data, **arrays[name], **entry) for name, entry in index.items()}


def read_index_json(folder, hashes):
    """Return the index.json of a folder of the cache, or None if it isn't as it was written."""
    path = folder / "index.json"
    return read_json(path) if matches_checksum(path, hashes) else None


def matches_checksum(path, hashes):
    """Return whether a file of the cache has the hash that write_checksums wrote.

    A cache is trusted with masks, sizes and class names: a damaged one would train on wrong labels.
    Hashes reads the file only if it has changed since it was last hashed.
    """
    checksums = read_own_json(path.parent / "checksums.json", {path.name: str})
    return bool(checksums) and hashes(path) == checksums[path.name] != ""


def write_checksums(folder, hashes):
    """Write checksums.json, last of all: a folder of the cache counts only with it."""
    names = ("index.json", "masks.npy", "photos.npy")
    write_json(folder / "checksums.json", {name: hashes(folder / name) for name in names})


def build_cache(folder, paths, settings, hashes):
    """Check the data, fill `folder` and return open_cache of it.

    Raises UserError that lists all faults.
    """
    used = used_categories(paths[0]) if settings["unused"] == "drop" else None
    train, categories, dropped, faults = read_coco(paths[0], used, labelled=True)
    test, test_categories, _, test_faults = read_coco(paths[1], used, labelled=False)
    faults += test_faults
    differing = different_keys(categories, test_categories)
    if categories and test_categories and differing:
        here, there = (ascii(names.get(differing[0])) for names in (categories, test_categories))
        faults.append(f"{paths[0].name} and {paths[1].name} have different categories: of id "
                      f"{differing[0]} the name is {here} and {there}")
    shared = {"classes": [BACKGROUND, *categories.values()], "category_ids": list(categories),
              "dropped": dropped}
    parts = {"train": (train, hashes(paths[0])), "test": (test, hashes(paths[1]))}
    return fill_cache(folder, paths[0].parent, parts, shared, faults, settings, hashes)


def build_extra(folder, path, classes, settings, hashes):
    """Do for load_extra what build_cache does: check the photos of the JSON `path`, fill `folder`.

    classes: names by class id, which the masks are painted in.
    """
    used = used_categories(path)  # others can't be in the way
    photos, categories, dropped, faults = read_coco(path, used, labelled=True, classes=classes)
    shared = {"classes": classes, "category_ids": list(categories), "dropped": dropped}
    parts = {"train": (photos, hashes(path))}
    return fill_cache(folder, path.parent, parts, shared, faults, settings, hashes)


def build_unlabelled(folder, root, names, classes, settings, hashes):
    """Do for load_unlabelled what build_cache does: check the photos `names`, fill `folder`."""
    photos = [{"id": name, "file_name": name, "size": None, "group": "", "odd": []}
              for name in names]
    shared = {"classes": classes, "category_ids": [], "dropped": []}
    parts = {"test": (photos, short_hash(names))}
    return fill_cache(folder, root, parts, shared, [], settings, hashes)


def fill_cache(folder, root, parts, shared, faults, settings, hashes):
    """Check photos in `root` and paint their masks, fill `folder` and return open_cache of it.

    parts: {name: (photos as read_coco returns them, hash of their list)}, where "train" has masks
    and a photo without a size has that of its file; shared: what index.json says of all of them;
    faults: what is wrong with the lists. The checksums are written last. Raises UserError that
    lists all faults.
    """
    check_files()  # else the workers would paint with other code than the folder is named for
    (folder / "photos.npy").unlink(missing_ok=True)  # its photos may have changed
    train, test = (parts.get(name, ([], ""))[0] for name in ("train", "test"))
    with atomic_write(folder / "masks.npy") as scratch:
        if not faults:
            begin_masks(scratch, train)
        check = partial(check_photo, root, settings, len(shared["classes"]), scratch)
        check_photos(train + test, check, hashes)
        name_alternatives(root, train + test)
        if not faults:
            faults += conflicting_duplicates(train)
        raise_faults(root, faults, train, test)
    shared["orientation"] = settings["orientation"]
    index = {name: index_entry(photos, list_hash, settings) | shared
             for name, (photos, list_hash) in parts.items()}
    write_json(folder / "index.json", index)
    write_checksums(folder, hashes)
    return open_cache(folder, root, hashes)


def begin_masks(path, photos):
    """Begin the .npy of all masks and note with each photo the byte where its mask goes."""
    starts = pixel_starts(photo["size"] for photo in photos)
    with open(path, "wb") as f:
        write_npy_header(f, (starts[-1],))
        for photo, start in zip(photos, starts[:-1], strict=True):
            photo["offset"] = f.tell() + start


def check_photos(photos, check, hashes):
    """Add to each photo's dict what `check`, a partial check_photo, returns for it.

    The photos are shared out to one process for each core.
    """
    pool_options = {"mp_context": get_context("forkserver"), "initializer": begin_worker}
    others = active_children()  # a notebook's own
    try:
        with without_main(), ProcessPoolExecutor(**pool_options) as pool:
            results = pool.map(check, photos, chunksize=8)
            results = tqdm(results, "checking photos", len(photos), disable=None)
            try:
                for photo, facts in zip(photos, results, strict=True):
                    key = facts.pop("key")
                    if key:
                        hashes.remember(key, facts["digest"])
                    photo.update(facts)
            except (KeyboardInterrupt, Exception):
                kill_children(others)  # else the pool would wait for those that are stuck
                raise
    except BrokenExecutor:
        raise UserError("a process died while it checked the photos: out of memory, or killed; run "
                        "the same again, with more memory") from None


def check_photo(root, settings, n_classes, masks, photo):
    """Check a photo and paint its mask; return what there is to know about it, as a dict.

    "fault" is what is wrong with it or None, "digest" the hash of its file, "" if it can't be read,
    "key" that of Hashes before it was read; what check_image returns is there too. The mask of a
    faultless photo with an "offset" is written there in the file `masks`; "mask_hash" is then its
    hash, "pixels" and "painted" are from paint_mask. settings: as in cache_folder.
    """
    path = root / photo["file_name"]
    facts = {"fault": None, "digest": "", "key": None, "content": "", "turn": "",
             "low_contrast": False, "size": photo["size"] or (1, 1)}
    with suppress(OSError):  # check_image says what is wrong with the file
        facts |= {"key": Hashes.key(path), "digest": file_hash(path)}
    try:
        facts["size"] = photo["size"] or shown_size(path)
        facts |= check_image(path, *facts["size"], settings["orientation"])
    except OSError as e:
        facts["fault"] = f"image {photo['id']} ({photo['file_name']}) {e.strerror}"
        return facts
    if "offset" not in photo:
        return facts
    objects, paint = photo["objects"], settings["paint"]
    mask, pixels, sizes, covered = paint_mask(objects, *photo["size"], paint, n_classes)
    with open(masks, "rb+") as f:  # here, as sending a mask to another process copies it four times
        f.seek(photo["offset"])
        f.write(mask)
    facts["mask_hash"] = hashlib.sha256(mask).hexdigest()
    return facts | {"pixels": pixels, "painted": {"sizes": sizes, "covered": covered}}


def name_alternatives(root, photos):
    """Add to the fault of each missing photo a file of `root` whose name is nearly the same."""
    missing = [photo for photo in photos
               if photo["fault"] and not os.path.lexists(root / photo["file_name"])]
    names = {}  # spelling -> name
    for folder, _, files in os.walk(root) if missing else ():
        for file in files:
            name = os.path.relpath(os.path.join(folder, file), root)
            names[spelling(name)] = clean(name)
    for photo in missing:
        if name := names.get(spelling(photo["file_name"])):
            photo["fault"] += f"; there is {name}: write both names alike"


def spelling(name):
    """Return a file name as name_key does, with slashes for backslashes and "%20" as a space."""
    return name_key(os.path.normpath(unquote(name.replace("\\", "/"))))


def conflicting_duplicates(photos):
    """Return a fault for each training photo that has an earlier one's pixels but another mask."""
    faults, first = [], {}
    for photo in photos:
        if photo["fault"]:  # then it has no mask
            continue
        other = first.setdefault(photo["content"], photo)
        if (photo["size"], photo["mask_hash"]) != (other["size"], other["mask_hash"]):
            faults.append(
                f"training image {photo['id']} ({photo['file_name']}) is the same photo as "
                f"image {other['id']} ({other['file_name']}), with another mask: "
                "keep only one of them, with the objects of both")
    return faults


def raise_faults(root, faults, train, test):
    """Raise UserError with all faults, of the JSON files and of photos, if they stop the work.

    A fault of a test photo doesn't, as long as another test photo can be read.
    """
    photo_faults = [photo["fault"] for photo in train + test if photo["fault"]]
    train_fault = any(photo["fault"] for photo in train)
    no_test_photo = bool(test) and all(photo["fault"] for photo in test)
    if faults or train_fault or no_test_photo:
        lines = [*faults, *photo_faults]
        count_line = f"{len(lines)} fault(s) in the data in {root}: mend or remove what is listed"
        raise UserError("\n".join([*lines, count_line]))


def index_entry(photos, json_hash, settings):
    """Return what index.json says of train or test alone: fields of a Split."""
    entry = {}
    for field, key in PHOTO_KEYS.items():
        entry[field] = [photo[key] for photo in photos if key in photo]
    entry["groups"] = merge_groups(photos)
    entry["fingerprint"] = fingerprint(json_hash, settings, entry["digests"])
    return entry


def merge_groups(photos):
    """Return a label for each photo, the same for photos that belong together.

    They do when they have the same group or the same pixels, or are linked by others that do.
    """
    parents = {}  # a forest of contents and groups: all that belong together lead to one root

    def find_root(key):
        while (parent := parents.get(key, key)) != key:
            key = parent
        return key

    for photo in photos:
        if photo["group"]:
            parents[find_root(f"content {photo['content']}")] = find_root(f"group {photo['group']}")
    return [find_root(f"content {photo['content']}") for photo in photos]


def write_photos(path, split):
    """Write the .npy of all decoded photos of a split, one after another."""
    with atomic_write(path) as scratch, open(scratch, "wb") as f:
        write_npy_header(f, (3 * split.starts[-1],))
        for index in tqdm(range(len(split.ids)), "decoding photos", disable=None):
            f.write(split.image(index))


# ---- data: folds ---------------------------------------------------------------------------------


def make_folds(present, groups, n_folds, kept=types.MappingProxyType({})):
    """Return the fold of every image, int [N]: stratified by classes, with groups kept whole.

    present: bool [N, K], which classes an image has; groups: N labels; kept: {group: fold} of those
    that have a fold already, or TRAIN_ONLY. This is the iterative stratification of Sechidis et al.
    2011 for groups: the largest group with the rarest class goes to the fold that still wants most
    of that class, until no group is left. Nothing is random, so folds don't depend on the seed.
    Raises UserError if there are fewer groups than folds.
    """
    names, group_of_image = np.unique(groups, return_inverse=True)
    n_groups = len(names)
    if n_folds > n_groups:
        raise UserError(f"{n_folds} folds of {n_groups} group(s) of images: ask for fewer folds")
    # by group the number of images with each class, in the last column of all images
    waiting = np.zeros((n_groups, present.shape[1] + 1), int)
    np.add.at(waiting, group_of_image, np.column_stack([present, np.ones(len(present), int)]))
    fold_of_group = np.array([kept.get(name, NO_FOLD) for name in names.tolist()])
    waiting[fold_of_group == TRAIN_ONLY] = 0
    wanted = np.tile(waiting.sum(0) / n_folds, (n_folds, 1))
    for group in np.flatnonzero(fold_of_group >= 0):
        wanted[fold_of_group[group]] -= waiting[group]
        waiting[group] = 0
    for _ in range(np.count_nonzero(fold_of_group == NO_FOLD)):
        totals = waiting.sum(0)
        rarest = np.where(totals > 0, totals, totals.max() + 1).argmin()
        group = waiting[:, rarest].argmax()
        # of folds that want as much of the class the one that wants most images
        fold = np.lexsort((-wanted[:, -1], -wanted[:, rarest]))[0]
        fold_of_group[group] = fold
        wanted[fold] -= waiting[group]
        waiting[group] = 0
    return fold_of_group[group_of_image]


def load_folds(exp, train, n_folds, renew=False):
    """Return the fold of every training image, int [N], from EXP/folds.csv.

    TRAIN_ONLY is the fold of an image that every run trains on and none is validated on. The file
    is written if it isn't there. If it is of other images or of another number of folds, UserError
    is raised; with `renew` it is replaced by new_folds instead, and a copy of it kept.
    """
    path = Path(exp) / "folds.csv"
    with lock(exp, wait=True):
        if path.exists():
            folds, wrong = read_folds(path, train.ids, n_folds)
            if not wrong:
                wrong = group_in_two_folds(train.ids, train.groups, folds)
            if not wrong:
                return folds
            if not renew:
                raise UserError(f"{path} {wrong}: choose another EXP, or run train.py --check to "
                                "make it anew")
            copy = copy_aside(path)
            print(f"{path} {wrong}: made anew, the old one is {copy}")
        folds = new_folds(path, train.ids, train.pixels, train.groups, n_folds)
        columns = zip(train.ids, train.groups, folds.tolist(), strict=True)
        write_csv(path, [{"image_id": image_id, "group": group, "fold": fold}
                         for image_id, group, fold in columns])
    return folds


def new_folds(path, ids, pixels, groups, n_folds):
    """Return what make_folds makes of images, int [N], where those of the folds.csv `path` stay.

    ids [N], pixels [N, C], groups [N]: as of a Split. A group that the file has whole keeps its
    fold unless the file has another number of folds: what is added to the data moves nothing. A row
    without a group that is known counts for that of its image. TRAIN_ONLY stays in any case.
    """
    group_of_image = dict(zip(map(str, ids), groups, strict=True))
    known, folds_of_group = set(groups), defaultdict(set)
    if path.exists():
        for _, row in read_rows(path, ("image_id", "fold")):
            group = row.get("group", "")
            if group not in known:
                group = group_of_image.get(row["image_id"], group)
            folds_of_group[group].add(int(row["fold"]))
    kept = {group: min(folds) for group, folds in folds_of_group.items() if len(folds) == 1}
    if {*kept.values()} - {TRAIN_ONLY} != {*range(n_folds)}:
        kept = {group: fold for group, fold in kept.items() if fold == TRAIN_ONLY}
    return make_folds(np.array(pixels)[:, 1:] > 0, groups, n_folds, kept)


def read_folds(path, ids, n_folds):
    """Read a folds.csv; return (folds, None), where folds, int [N], are those of the images `ids`.

    Return (None, what is wrong) if the file is of other images or of another number of folds. It
    may have been edited by hand: blanks, empty lines, the order of lines and columns besides
    image_id and fold don't matter. Raises UserError if a fold is no number, if an image is listed
    twice, if ids were changed, or if the numbers of the folds leave one out.
    """
    fold_of_image = {}
    for line, row in read_rows(path, ("image_id", "fold")):
        image_id, text = row["image_id"], row["fold"]
        if image_id in fold_of_image:
            raise UserError(f"{path} line {line}: image {clean(image_id)} is listed twice")
        if not re.fullmatch(f"[0-9]{{1,9}}|{TRAIN_ONLY}", text):
            raise UserError(f"{path} line {line}: the fold of image {clean(image_id)} is "
                            f"{quoted(text)}: it must be a number from 0, or {TRAIN_ONLY} for an "
                            "image that is trained on alone")
        fold_of_image[image_id] = int(text)
    wanted = set(map(str, ids))
    if foreign := fold_of_image.keys() - wanted:
        missing = wanted - fold_of_image.keys()
        if len(foreign) == len(missing) < len(ids) / 2:  # an edit by hand, and not other data
            raise UserError(f"{path}: image {clean(min(foreign))} is not in DATA and image "
                            f"{min(missing)} not in this file: mend it, or remove it to have it "
                            "made anew")
    if fold_of_image.keys() != wanted:
        return None, "lists other images than DATA"
    numbers = sorted(set(fold_of_image.values()) - {TRAIN_ONLY})
    if numbers != list(range(len(numbers))):
        raise UserError(f"{path} has the folds {numbers}: one number must be wrong")
    if len(numbers) != n_folds:
        return None, f"has the folds {numbers}, not 0 to {n_folds - 1}"
    return np.array([fold_of_image[str(image_id)] for image_id in ids]), None


def group_in_two_folds(ids, groups, folds):
    """Return a line that names two images of one group in different folds; None if none are."""
    first_of_group = {}
    for image_id, group, fold in zip(ids, groups, folds.tolist(), strict=True):
        first_id, first_fold = first_of_group.setdefault(group, (image_id, fold))
        if fold != first_fold:
            return (f"has a group of images in two folds, such as image {first_id} in fold "
                    f"{first_fold} and image {image_id} in fold {fold}")
    return None


def copy_aside(path):
    """Copy a file to the first free name of NAME-1, NAME-2, ... beside it and return that path."""
    copies = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
    free = next(copy for copy in copies if not copy.exists())
    return shutil.copy2(path, free)


def folds_hash(ids, folds):
    """Return a hash of the folds of images, which is the same however their file is written."""
    lines = [f"{image_id} {fold}" for image_id, fold in zip(ids, folds, strict=True)]
    return short_hash(*lines)


# ---- data: COCO files ----------------------------------------------------------------------------
# Nothing in them is trusted: what they hold is checked before anything else is done with it.

# control characters, ends of lines, changes of direction and lone surrogates: a terminal obeys some
# of them, and some files can't hold others
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# characters that nobody sees, though Unicode calls them letters, marks or signs
INVISIBLE = re.compile("[\u034f\u115f\u1160\u2800\ufe00-\ufe0f\U000e0100-\U000e01ef]")
# categories of tools for what is no class
NO_CLASS = {"background", "bg", "ignore", "unlabeled", "unlabelled", "void"}
# COCO's 64 characters to Python's digits in base 32; the second half are the same digits again
RLE_DIGITS = {ord("0") + i: "0123456789abcdefghijklmnopqrstuv"[i % 32] for i in range(64)}


def used_categories(path):
    """Return the set of the category ids of a COCO file's annotations, as far as it is sound."""
    coco = read_json(path)
    if not has_kinds(coco, {"annotations": list}):
        return set()  # read_coco lists what is wrong
    annotations = [each for each in coco["annotations"] if isinstance(each, dict)]
    ids = [whole(annotation.get("category_id")) for annotation in annotations]
    return {category for category in ids if type(category) is int}


def read_coco(path, used, labelled, classes=None):
    """Read and check one COCO file; return (photos, categories, dropped, faults).

    photos: a dict for each photo, with id, file_name, size (height, width), group, objects,
    (class_id, segmentation) pairs, odd, the ids of annotations with odd polygons, and faulty.
    Class ids count the categories by id, from 1, or are those of the same names in `classes`.
    categories: {id: name} by id, of those with an id in the set `used` or, if that is None, of all;
    dropped: names of the others. faults: lines; if there are any, the rest is not to be used.
    Raises UserError if the file is no JSON.
    """
    coco = read_json(path)
    lists = ["images", "categories"]
    if labelled:
        lists.append("annotations")
    if not isinstance(coco, dict) or not all(isinstance(coco.get(key), list) for key in lists):
        return [], {}, [], [f"{path.name}: not a COCO file: it needs the lists {', '.join(lists)}"]
    faults = []
    photos = read_images(coco, faults)
    categories, dropped = read_categories(coco, used, faults)
    if labelled:
        class_ids = {category: class_id for class_id, category in enumerate(categories, 1)}
        if classes:
            class_ids = same_classes(categories, classes, faults)
        add_objects(coco, photos, class_ids, faults)
    sound = [photo for photo in photos.values() if not photo["faulty"]]
    return sound, categories, dropped, [f"{path.name}: {fault}"[:500] for fault in faults]


def read_images(coco, faults):
    """Return {image id: photo} as read_coco has them, without objects; add to `faults`."""
    photos = {}
    for image, id_fault in checked_entries(coco, "images", faults):
        name = clean(image.get("file_name"))
        size = (image.get("height"), image.get("width"))
        group = image.get("group")
        checks = (name_fault(image.get("file_name")), id_fault, size_fault(*size),
                  group_fault(group))
        image_faults = [fault for fault in checks if fault]
        faults += [f"image {quoted(image.get('id'))} ({name}) {fault}" for fault in image_faults]
        if group is None and ".rf." in name:  # of Roboflow's versions of a photo, NAME.rf.HASH.jpg
            group = name.partition(".rf.")[0]
        if not id_fault:
            photos[image["id"]] = {
                "id": image["id"], "file_name": name, "size": size, "objects": [], "odd": [],
                "group": "" if group is None else clean(str(group)), "faulty": bool(image_faults)}
    return photos


def group_fault(group):
    """Return what is wrong with the group of a photo, or None.

    NaN, as pandas writes where there is none, would put all such photos into one group. Of lists
    and objects `clean` shows the start alone, by which different groups would be the same.
    """
    if group is None or isinstance(group, (str, int)):
        return None
    return f"has the group {clean(group)}, neither text nor a whole number nor null"


def read_categories(coco, used, faults):
    """Return ({category id: name} sorted by id, dropped) as read_coco does; add to `faults`."""
    names, taken, dropped = {}, {}, []
    for category, id_fault in checked_entries(coco, "categories", faults):
        category_id, name = category.get("id"), category.get("name")
        name = name[:100] if isinstance(name, str) else name
        shown = clean(name)
        if used is not None and not id_fault and category_id not in used:
            dropped.append(shown)
            continue
        if fault := id_fault or category_fault(name, taken):
            faults.append(f"category {quoted(category_id)} ({shown}) {fault}")
        if not id_fault:
            names[category_id] = shown
            taken |= {name_key(str(name)): category_id, name_key(shown): category_id}
    if len(names) >= MAX_CLASSES:
        faults.append(f"{len(names)} categories; 1 to {MAX_CLASSES - 1} can be told apart")
    return dict(sorted(names.items())), dropped


def same_classes(categories, classes, faults):
    """Return {category id: class id} of categories {id: name} whose names are in `classes`.

    Names are compared as name_key does. Add those that are not to `faults`; to them the background
    is given, so that not each of their annotations is a fault too.
    """
    class_ids = {name_key(name): class_id for class_id, name in enumerate(classes)}
    found = {}
    for category, name in categories.items():
        found[category] = class_ids.get(name_key(name), 0)
        if name_key(name) not in class_ids:
            faults.append(f"category {category} ({name}) is none of DATA's classes, "
                          f"{', '.join(classes[1:])}: rename it, or remove its annotations")
    return found


def category_fault(name, taken):
    """Return what is wrong with the name of a category, or None.

    taken: {name_key of a name, also as it is shown: id} of the categories before.
    """
    drop = "; --unused drop (make: UNUSED=drop) drops those without annotations"
    if not isinstance(name, str) or not name_key(name):
        return f"has no name{drop}"
    if "".join(filter(str.isalnum, name_key(name))) in NO_CLASS:
        return ("is the background, which is class 0 without being listed, or no class: remove it "
                f"and its annotations, or rename it{drop}")
    other = taken.get(name_key(name), taken.get(name_key(clean(name))))
    if other is None:
        return None
    return (f"has the name of category {other}, where case, spaces, invisible characters and what "
            f"follows the first 100 don't count: rename one{drop}")


def add_objects(coco, photos, class_ids, faults):
    """Add each annotation to the objects of its photo, or what is wrong with it to `faults`."""
    for annotation, id_fault in checked_entries(coco, "annotations", faults):
        fault = id_fault or object_fault(annotation, photos, class_ids)
        if fault:
            faults.append(f"annotation {quoted(annotation.get('id'))} {fault}")
            continue
        photo, segmentation = photos[annotation["image_id"]], annotation.get("segmentation")
        photo["objects"].append((class_ids[annotation["category_id"]], segmentation))
        if isinstance(segmentation, dict) or photo["faulty"]:  # no polygons, or unchecked ones
            continue
        if any(is_odd(polygon, *photo["size"]) for polygon in segmentation):
            photo["odd"].append(annotation["id"])


def checked_entries(coco, key, faults):
    """Yield (entry, what is wrong with its id or None) for each JSON object in coco[key].

    A whole number may be written as 3.0 and comes as 3. Add to `faults` whatever in the list is no
    object, and an empty list. End at MAX_FAULTS faults.
    """
    ids = set()
    if not coco[key]:
        faults.append(f"no {key}")
    for position, entry in enumerate(coco[key]):
        if len(faults) >= MAX_FAULTS:
            return
        if not isinstance(entry, dict):
            faults.append(f"{key}[{position}] is not an object")
            continue
        entry = whole_numbers(entry)
        if type(entry.get("id")) is not int or abs(entry["id"]) >= 2 ** 63:
            yield entry, "has no whole number of 64 bits as id"
        elif entry["id"] in ids:
            yield entry, f"has an id that another of the {key} has too"
        else:
            ids.add(entry["id"])
            yield entry, None


def whole_numbers(entry):
    """Return an object of the JSON with its values such as 3.0 as 3; some tools write all so."""
    return {key: whole(value) for key, value in entry.items()}


def whole(value):
    """Return 3 for 3.0, any other value as it is; from 2 ** 53 on a float may be another number."""
    is_whole = type(value) is float and value.is_integer() and abs(value) < 2 ** 53
    return int(value) if is_whole else value


def name_key(text):
    """Return a name for comparison: without case, spaces and invisible characters.

    Unicode spells letters with an accent in two ways, of which macOS takes the other one: they
    become the same by the form NFKC.
    """
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text.casefold()))
    return "".join(c for c in text if unicodedata.category(c)[0] not in "CZ")


def clean(value):
    """Return a value of the data as text that any file can hold and any terminal can show.

    Characters of UNSAFE are escaped; a value that is no text is shortened.
    """
    text = value if isinstance(value, str) else reprlib.repr(value)  # limits length and depth
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def quoted(value):
    """Return `clean` of a value, a text with its quotes: "1" is no id, though 1 is one."""
    return clean(reprlib.repr(value))


def name_fault(name):
    """Return what is wrong with a file_name, or None."""
    if not isinstance(name, str) or not name:
        return "has no file_name"
    if UNSAFE.search(name) or len(name) > 500:
        return "has an impossible file_name: with control characters or over 500 long"
    # a link in DATA may lead anywhere, as its user laid it
    if os.path.isabs(name) or ".." in Path(name).parts:
        return "has a file_name from / or with .., which leads out of DATA"
    return None


def size_fault(height, width):
    """Return what is wrong with the size of a photo in the JSON, or None."""
    possible = all(type(side) is int and 0 < side < 2 ** 16 for side in (height, width))
    if possible and height * width <= MAX_PIXELS:
        return None
    return (f"of height and width {clean((height, width))}: not whole numbers from 1 to 65535, "
            f"or over {MAX_PIXELS} pixels of memory")


def object_fault(annotation, photos, class_ids):
    """Return what is wrong with an annotation apart from its id, or None."""
    image_id, category = annotation.get("image_id"), annotation.get("category_id")
    if type(image_id) is not int or image_id not in photos:
        return f"is of image {quoted(image_id)}, which is not in images"
    if type(category) is not int or category not in class_ids:
        return f"of image {image_id} has the unknown category {quoted(category)}"
    name, size = photos[image_id]["file_name"], photos[image_id]["size"]
    if size_fault(*size):  # listed with the image; the segmentation can't be checked
        return None
    fault = segmentation_fault(annotation.get("segmentation"), *size)
    return f"of image {image_id} ({name}) has {fault}" if fault else None


def segmentation_fault(segmentation, height, width):
    """Return what is wrong with one COCO segmentation, or None.

    pycocotools crashes the process on what this refuses.
    """
    if isinstance(segmentation, dict):
        return rle_fault(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        return "no polygon and no RLE"
    faults = (polygon_fault(polygon, height, width) for polygon in segmentation)
    return next(filter(None, faults), None)


def rle_fault(rle, height, width):
    """Return what is wrong with an RLE, {"size": ..., "counts": ...}, or None."""
    size, counts = rle.get("size"), rle_counts(rle.get("counts"))
    if size != [height, width]:
        return f"RLE of size {clean(size)}, the image is {[height, width]}"
    if counts is None:
        return "RLE counts that are damaged or cut off: not whole numbers from 0"
    if sum(counts) != height * width:
        return f"RLE of {sum(counts)} pixels, not {height * width}"
    return None


def polygon_fault(polygon, height, width):
    """Return what is wrong with one polygon, [x, y, x, y, ...], or None."""
    limit = 10 * max(height, width)
    if not isinstance(polygon, list) or not all(isinstance(v, (int, float)) for v in polygon):
        return "a polygon that is not a list of numbers"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"a polygon of {len(polygon)} numbers: at least three points, two numbers each"
    if not all(abs(v) <= limit for v in polygon):  # false for NaN and infinity too
        return "a polygon with NaN, infinite or absurdly large coordinates"
    steps = np.diff(closed_outline(polygon), axis=0)
    if np.abs(steps).sum() > min(100 * limit, 2_000_000):  # pycocotools needs 80 bytes for each
        return "a polygon with an absurdly long outline"
    return None


def is_odd(polygon, height, width):
    """Return whether a polygon leaves the photo, at whose edge it is clipped, or has no area."""
    points = closed_outline(polygon).T
    clipped = points.clip(0, [[width], [height]])
    x, y = clipped
    twice_area = abs(x[1:] @ y[:-1] - y[1:] @ x[:-1])
    return (clipped != points).any() or twice_area < 1e-6


def closed_outline(polygon):
    """Return the points (x, y) of a polygon as an array [N + 1, 2]; the last is the first again."""
    return np.reshape([*polygon, *polygon[:2]], (-1, 2))


def rle_counts(counts):
    """Return the run lengths of an RLE from its counts, a list or COCO's compressed string.

    Return None if they are damaged.
    """
    if isinstance(counts, str):
        counts = decompress_counts(counts)
    elif isinstance(counts, list):
        counts = [whole(length) for length in counts]
    if not isinstance(counts, list):
        return None
    valid = all(type(length) is int and 0 <= length < 2 ** 32 for length in counts)
    return counts if valid else None


def decompress_counts(text):
    """Return the numbers in COCO's compressed string, or None if it isn't one.

    It holds signed numbers in base 32, the lowest digit first: "0" to "O" end a number, "P" to "o"
    are the same digits when more follow. From the fourth number on each is the difference to the
    run two before.
    """
    if not re.fullmatch("([P-o]{0,6}[0-O])*", text):
        return None
    counts = []
    for digits in re.findall("[P-o]*[0-O]", text):
        value = int(digits[::-1].translate(RLE_DIGITS), 32)
        if digits[-1] >= "@":  # the highest bit is the sign
            value -= 32 ** len(digits)
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
    return counts


# ---- data: painting masks, reading photos --------------------------------------------------------

TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # EXIF orientation -> Pillow's name
LOW_CONTRAST = 16  # a photo of which 98% lie within so many of 256 greys shows next to nothing
PHOTO_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")  # Pillow starts programs for others
# the last three are of formats that can't be read: they are told of like a damaged photo
PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif",
                 ".heic", ".heif", ".avif")


def paint_mask(objects, height, width, paint, n_classes):
    """Paint the mask of one photo; return (mask, pixels, sizes, covered).

    objects: (class_id, segmentation) pairs; segmentation_fault must have found nothing. Where
    objects overlap the later one wins. paint: "area" paints the largest first, "id" by class id,
    "order" as listed. mask: uint8 [height, width]; pixels: counts by class id; sizes: [class_id,
    pixels] of each object; covered: [class_id, class_id painted over it, pixels] for each object
    and each other class that it covers.
    """
    import cv2
    shapes = []
    for class_id, segmentation in objects:
        rle, area = encode_object(segmentation, height, width)
        shapes.append((class_id, area, rle))
    if paint == "id":
        shapes.sort(key=lambda shape: shape[0])
    elif paint == "area":
        shapes.sort(key=lambda shape: -shape[1])
    columns = np.zeros((width, height), np.uint8)
    pixels = np.array([height * width] + [0] * (n_classes - 1))
    covered = []
    for class_id, _, rle in shapes:
        below = paint_object(columns, rle, class_id, n_classes)
        pixels -= below
        pixels[class_id] += below.sum()
        for other in np.flatnonzero(below).tolist():
            if other not in (0, class_id):
                covered.append([other, class_id, int(below[other])])
    sizes = [[class_id, area] for class_id, area, _ in shapes]
    return cv2.transpose(columns), pixels.tolist(), sizes, covered


def encode_object(segmentation, height, width):
    """Return (RLE of pycocotools, its pixels) of a segmentation."""
    from pycocotools import mask as coco_mask
    if isinstance(segmentation, dict):
        counts = rle_counts(segmentation["counts"])
        segmentation = [{"size": [height, width], "counts": counts}]
    rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return rle, int(coco_mask.area(rle))


def paint_object(columns, rle, class_id, n_classes):
    """Paint an object onto `columns`, uint8 [width, height]; return the counts of classes below.

    The mask is transposed, as a decoded RLE lies in memory, and only the object's box is touched;
    with whole masks as rows a photo takes twice the time.
    """
    from pycocotools import mask as coco_mask
    x, y, w, h = coco_mask.toBbox(rle).astype(int)
    box = np.s_[x:x + w, y:y + h]
    part = columns[box]
    shape = coco_mask.decode(rle).T[box].view(bool)
    below = np.bincount(part[shape], minlength=n_classes)
    part[shape] = class_id
    return below


def read_image(path, height, width, orientation="shown"):
    """Return the photo as uint8 RGB [height, width, 3].

    Grey, palette and CMYK are converted, alpha is dropped; of 16 bits the upper 8 are kept, of
    several pages or frames the first. The content decides on the format, not the name's ending.
    orientation: as in choose_orientation. Raises OSError that says what is wrong with the photo;
    damage inside a JPEG is no error here.
    """
    with open_photo(path) as photo:
        way, _ = choose_orientation(photo, height, width, orientation)
        pixels = None
        if (photo.format, photo.mode, way) == ("JPEG", "RGB", "stored"):
            pixels = decode_jpeg(path)
        return np.array(convert_photo(photo, way).convert("RGB")) if pixels is None else pixels


def read_photo(path):
    """Return any photo as uint8 RGB [H, W, 3], turned as its EXIF orientation says.

    It is for photos that no JSON lists. Raises OSError that says what is wrong with the photo, also
    for damage inside a JPEG, which read_image takes as it is.
    """
    with open_photo(path) as photo:
        if photo.width * photo.height > MAX_PIXELS:
            raise ValueError(f"is {photo.width}x{photo.height}, over {MAX_PIXELS} pixels of memory")
        way = "stored" if exif_orientation(photo) == 1 else "shown"
        return np.array(convert_photo(photo, way).convert("RGB"))


def check_image(path, height, width, orientation="shown"):
    """Return what `make check` warns of in a photo: {"turn", "low_contrast", "content"}.

    "turn" is that of choose_orientation; "low_contrast" whether nearly all of it is of one grey or,
    of 16 bits, nearly black; "content" a hash of its pixels.

    Raises OSError that says what is wrong with it, as read_image does, and in damaged data. If the
    size is wrong only the header is read. A JPEG is decoded at an eighth of its size: that goes
    through all of its data, finds what a full decode does and takes half the time.
    """
    with open_photo(path) as photo:
        way, turn = choose_orientation(photo, height, width, orientation)
        is_deep = photo.info["16 bits"]
        photo = convert_photo(photo, way)
        photo.draft(None, (1, 1))
        photo = photo.convert("RGB")
        counts = np.cumsum(photo.convert("L").histogram())
        low, bright, high = np.searchsorted(counts, counts[-1] * np.array([0.01, 0.95, 0.99]))
        is_low = high - low < LOW_CONTRAST or is_deep and bright < 64
        return {"turn": turn, "low_contrast": bool(is_low),
                "content": hashlib.sha256(photo.tobytes()).hexdigest()[:16]}


@contextmanager
def open_photo(path):
    """Yield the photo opened by Pillow; any error in the block becomes an OSError that says why."""
    from PIL import Image, UnidentifiedImageError
    try:
        if not os.path.isfile(path):
            raise ValueError("is no file" if os.path.exists(path) else "is missing")
        with warnings.catch_warnings(action="ignore"):  # of damaged EXIF, without a name
            photo = Image.open(path, formats=PHOTO_FORMATS)
        with photo:
            photo.info.pop("transparency", None)  # Pillow warns that it is dropped
            # 16 bits a channel: the tile, which says so, is gone once the pixels are loaded
            is_deep = photo.format in ("PNG", "TIFF") and ";16" in str(photo.tile)
            photo.info["16 bits"] = photo.mode.startswith("I") or is_deep
            yield photo
    except UserError:
        raise
    except UnidentifiedImageError:
        with open(path, "rb") as f:  # HEIC has "ftypheic", AVIF "ftypavif", a web page "<!DOCTYPE"
            start = "".join(filter(str.isprintable, f.read(40).decode("ascii", "ignore")))
        reason = (f"can't be read as {', '.join(PHOTO_FORMATS)}, it begins with {start!r}: make it "
                  "a JPEG or PNG of 8 bits")
        raise OSError(None, reason, str(path)) from None
    except Exception as e:  # decoders raise many types on damaged files
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise OSError(None, clean(reason), str(path)) from None


def choose_orientation(photo, height, width, orientation):
    """Return (way, turn): how a photo of Pillow is read and what its EXIF orientation is to that.

    way: "shown", turned as the EXIF orientation says, or "stored", as the pixels lie in the file.
    The size in the JSON decides, or `orientation`, "shown" or "stored", where the photo has that
    size both ways. turn: "" if the two ways are one, "ambiguous" if the size can't decide, else the
    way that it decides on. Raises ValueError if the photo doesn't have the size.
    """
    asked, stored, exif = (width, height), photo.size, 1
    if asked in (stored, stored[::-1]):  # else it is refused, before more than its header is read
        exif = exif_orientation(photo)
    shown = stored[::-1] if exif >= 5 else stored  # from 5 on it is a quarter turn
    if asked not in (stored, shown):
        raise ValueError(f"is {stored[0]}x{stored[1]}, the JSON says {width}x{height}")
    if exif == 1:
        return "stored", ""
    if stored == shown:
        return orientation, "ambiguous"
    way = "shown" if asked == shown else "stored"
    return way, way


def shown_size(path):
    """Return (height, width) of a photo as viewers show it, turned as its EXIF says.

    Raises OSError that says what is wrong with the photo.
    """
    with open_photo(path) as photo:
        width, height = photo.size
        if fault := size_fault(height, width):
            raise ValueError(f"is {fault}")
        return (width, height) if exif_orientation(photo) >= 5 else (height, width)


def exif_orientation(photo):
    """Return the EXIF orientation of a photo of Pillow: 1, as stored, or 2 to 8, turned.

    XMP, which cv2 doesn't ask, turns nothing. A PNG is loaded for it. Raises ValueError for a TIFF
    that has one: Pillow turns some TIFFs by itself and others not.
    """
    if photo.format == "PNG":
        photo.load()  # its EXIF may stand behind the pixels
    for key in ("xmp", "XML:com.adobe.xmp", "Raw profile type exif"):  # where Pillow looks too
        photo.info.pop(key, None)
    try:
        with warnings.catch_warnings(action="ignore"):
            exif = photo.getexif().get(0x0112)
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1  # what is damaged turns nothing, as in viewers
    if exif not in range(2, 9):
        return 1
    if photo.format == "TIFF":
        raise ValueError(f"is a TIFF with the orientation {exif}: save it upright, without it")
    return exif


def convert_photo(photo, way):
    """Return a photo of Pillow, turned as choose_orientation says, with at most 8 bits a channel.

    Raises ValueError if nobody can tell which of its values is white.
    """
    from PIL import Image
    if photo.mode == "F":
        raise ValueError("has fractions as pixels, of which nobody knows what is white")
    is_deep = photo.info["16 bits"]
    if is_deep and photo.format == "TIFF" and photo.tag_v2.get(262) == 0:
        raise ValueError("has 16 bits a channel and 0 as white: convert it to 8 bits")
    if way == "shown":
        photo = photo.transpose(Image.Transpose[TURNS[exif_orientation(photo)]])
    return upper_bits(photo) if is_deep else photo


def upper_bits(photo):
    """Return the upper 8 of 16 bits a channel; of colours Pillow has already dropped the others.

    Cameras put 10, 12 or 14 bits into 16, which would become a few nearly black values: ValueError
    is raised if no value reaches a quarter of white.
    """
    from PIL import Image
    cure = "nobody can tell which is white: convert it to 8 bits"
    if photo.mode.startswith("I"):
        pixels = np.asarray(photo)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"has values from {pixels.min()} to {pixels.max()}, {cure}")
        photo = Image.fromarray((pixels >> 8).astype(np.uint8))
    brightest = int(np.asarray(photo.convert("RGB")).max())
    if brightest < 64:
        raise ValueError(f"has 16 bits a channel but no value above {brightest << 8 | 255}, {cure}")
    return photo


def decode_jpeg(path):
    """Return the pixels of an RGB JPEG as stored, or None if it is cut off or cv2 can't decode it.

    The pixels are those of Pillow, in two thirds of its time.
    """
    import cv2
    if not hasattr(cv2, "IMREAD_COLOR_RGB"):
        raise UserError(f"OpenCV {cv2.__version__} is too old: install what requirements.txt says")
    content = np.fromfile(path, np.uint8)
    if content[-2:].tobytes() != b"\xff\xd9":  # the mark of the end
        return None
    return cv2.imdecode(content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


# ---- augmentation --------------------------------------------------------------------------------


def resampling():
    """Return how images and masks are resampled: bilinear, and exact nearest for class ids."""
    import cv2
    return {"interpolation": cv2.INTER_LINEAR, "mask_interpolation": cv2.INTER_NEAREST_EXACT}


def squash(A, size):
    return [A.Resize(*size, **resampling())]


def crop_and_turn(A, size):
    """Crop a quarter to all of the photo, then flip and turn it into one of its 8 orientations."""
    import cv2

    class Crop(A.RandomResizedCrop):
        """Draw the crop in a square and stretch it to the photo: any shape shows the same shares.

        So a crop is squashed about as much as the whole photo is in prediction. albumentations
        finds no crop in a photo wider than 5:1 and takes its centre: nothing learns from the ends.
        """

        def get_params_dependent_on_data(self, params, data):
            height, width = params["shape"][:2]
            side = max(height, width)
            square = super().get_params_dependent_on_data({"shape": (side, side)}, data)
            left, top, right, bottom = square["crop_coords"]
            return {"crop_coords": (left * width // side, top * height // side,
                                    math.ceil(right * width / side),
                                    math.ceil(bottom * height / side))}

    class D4(A.D4):
        """Do what albumentations' D4 does, by cv2 in a tenth of numpy's time to transpose."""

        def apply(self, img, group_element, **_):
            if group_element in ("t", "r90", "r270", "hvt"):
                img = cv2.transpose(img)
            axes = {"v": 0, "r90": 0, "h": 1, "r270": 1, "r180": -1, "hvt": -1}
            axis = axes.get(group_element)
            return img if axis is None else cv2.flip(img, axis)
    return [Crop(size, scale=(0.25, 1), **resampling()), D4(p=1)]


def colours(A):
    return [A.RandomBrightnessContrast(0.2, 0.2, p=0.5), A.HueSaturationValue(10, 20, 10, p=0.3)]


def damages(A):
    """Blur the image or add noise, distort it, cut holes into it.

    The mask becomes IGNORE_INDEX where a distortion brings in pixels from outside and where a hole
    hides the image.
    """
    import cv2
    warp = {"interpolation": cv2.INTER_LINEAR, "mask_interpolation": cv2.INTER_NEAREST,
            "border_mode": cv2.BORDER_CONSTANT, "fill_mask": IGNORE_INDEX}
    noise = [A.GaussianBlur((3, 7)), A.GaussNoise((0.02, 0.1)),
             A.ImageCompression(quality_range=(40, 90))]
    distortion = [A.GridDistortion(**warp), A.ElasticTransform(60, 8, **warp)]
    holes = A.CoarseDropout((1, 6), (0.05, 0.2), (0.05, 0.2), fill_mask=IGNORE_INDEX, p=0.3)
    return [A.OneOf(noise, p=0.3), A.OneOf(distortion, p=0.3), holes]


# recipe -> function (albumentations, size) -> the list of what is done to a training image and its
# mask; they must end at `size`, (height, width). What brings in pixels from outside, or hides some,
# needs fill_mask=IGNORE_INDEX, as in `damages`; resampling() is for Resize and crops only.
AUGMENTATIONS = {
    "none": squash,
    "flip": lambda A, size: [*squash(A, size), A.HorizontalFlip(p=0.5)],
    "basic": crop_and_turn,
    "colour": lambda A, size: [*crop_and_turn(A, size), *colours(A)],
    "strong": lambda A, size: [*crop_and_turn(A, size), *colours(A), *damages(A)]}


def make_augmentation(name, scale):
    """Return a function (image, mask, rng) -> (image, mask) of scale x scale pixels.

    All its randomness comes from `rng`, a numpy Generator.
    """
    import random

    import albumentations as A
    transform = A.Compose(AUGMENTATIONS[name](A, (scale, scale)))

    def augment(image, mask, rng):
        transform.set_random_state(rng, random.Random(int(rng.integers(2 ** 32))))
        augmented = transform(image=image, mask=mask)
        return augmented["image"], augmented["mask"]
    return augment


# ---- ClassMix ------------------------------------------------------------------------------------


def classmix(images, masks, prob, weights, rng):
    """Paste half the classes of another image of the batch onto each image (arXiv 2007.07936).

    images uint8 [B, H, W, 3], masks uint8 [B, H, W]. An image is pasted on with probability `prob`.
    The classes are drawn in proportion to `weights` [C], without replacement. Pixels of
    IGNORE_INDEX are never pasted. Returns a new batch.
    """
    import cv2
    n_images, n_classes = len(images), len(weights)
    mixed_images, mixed_masks = images.copy(), masks.copy()
    shift = int(rng.integers(1, n_images))  # the image that is pasted comes so many places earlier
    # with these rates of arrival the k classes that come first are k draws without replacement
    arrival = rng.exponential(size=(n_images, n_classes)) / weights
    for i in np.flatnonzero(rng.random(n_images) < prob):
        image, mask = images[i - shift], masks[i - shift]
        histogram = cv2.calcHist([mask], [0], None, [n_classes], [0, n_classes])
        present = np.flatnonzero(histogram)
        first = arrival[i, present].argsort()[:(len(present) + 1) // 2]
        is_pasted = np.zeros(256, np.uint8)  # by class id
        is_pasted[present[first]] = 1
        paste = cv2.LUT(mask, is_pasted)
        cv2.copyTo(image, paste, mixed_images[i])
        cv2.copyTo(mask, paste, mixed_masks[i])
    return mixed_images, mixed_masks


# ---- models --------------------------------------------------------------------------------------

STRIDE = 32  # of the deepest map of all encoders but plain ViTs, which have their patch's side


def smp_decoder(name, **settings):
    """Return a builder for DECODERS of a decoder of segmentation-models-pytorch."""
    def build(encoder, n_classes, **options):
        import segmentation_models_pytorch as smp
        return smp.create_model(name, encoder, classes=n_classes, **settings, **options)
    return build


def dpt(encoder, n_classes, **options):
    """Build DPT (arXiv 2103.13413), also for patches of 14 pixels and odd numbers of them.

    smp's decoder wants strides that are powers of two. As Depth Anything (arXiv 2401.10891) does,
    patches of 14 count as 16, and the last enlargement makes up for it.
    """
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
    model = smp.create_model("dpt", encoder, classes=n_classes, **options)
    strides = model.encoder.output_strides
    rounded = [2 ** round(math.log2(stride)) for stride in strides]
    if rounded != strides:
        model.decoder = DPTDecoder(model.encoder.out_channels, rounded,
                                   model.encoder.has_prefix_tokens)
        model.segmentation_head.upsampling_factor *= strides[0] / rounded[0]
        model.initialize()
    for block in model.decoder.fusion_blocks:
        block.register_forward_pre_hook(resize_previous)
    return model


def resize_previous(block, inputs):
    """Give the map [B, C, h, w] that a block of DPT's decoder fuses with another the other's size.

    Of 37 patches the level below has 19, which become 38.
    """
    from torch.nn.functional import interpolate
    feature, previous = (*inputs, None)[:2]
    if previous is not None and previous.shape[2:] != feature.shape[2:]:
        previous = interpolate(previous, feature.shape[2:], mode="bilinear", align_corners=True)
    return feature, previous


def assemble(encoder, n_classes, make_decoder, width, upsampling, encoder_weights, **options):
    """Return a model of an encoder, a decoder of one's own and a segmentation head.

    make_decoder(channels) returns the decoder, an nn.Module from the list of the encoder's maps at
    strides 1, 2, 4, 8, 16 and 32, `channels` deep, to one map [B, width, h, w]; `upsampling` is its
    stride. encoder_weights and options go to smp.encoders.get_encoder.
    """
    import segmentation_models_pytorch as smp
    model = smp.base.SegmentationModel()
    model.encoder = smp.encoders.get_encoder(encoder, weights=encoder_weights, **options)
    model.decoder = make_decoder(model.encoder.out_channels)
    model.segmentation_head = smp.base.SegmentationHead(width, n_classes, 1, upsampling=upsampling)
    model.classification_head = None
    model.initialize()
    return model


# (width, layers) of the BiFPN in EfficientDet-D0 to D7 (table 1 of arXiv 1911.09070), by the size
# in the encoder's name, b0 to b7 or lite0 to lite4; D0's if it has none
BIFPN_SIZES = ((64, 3), (88, 4), (112, 5), (160, 6), (224, 7), (288, 7), (384, 8), (384, 8))


def efficientdet(encoder, n_classes, **options):
    """Build EfficientDet (arXiv 1911.09070) with a segmentation head for its detection heads."""
    size = re.search(r"(?<![a-z])(?:b|lite)([0-7])(?!\d)", encoder)
    width, n_layers = BIFPN_SIZES[int(size[1]) if size else 0]

    def make_decoder(channels):
        return bifpn_class()(channels, width, n_layers)
    return assemble(encoder, n_classes, make_decoder, width, upsampling=4, **options)


def node_class():
    """Return the module that fuses maps in a BiFPN."""
    from torch import nn, ones

    class Node(nn.Module):
        def __init__(self, width, n_inputs):
            super().__init__()
            self.weights = nn.Parameter(ones(n_inputs))
            self.conv = nn.Sequential(
                nn.SiLU(), nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))

        def forward(self, *maps):
            """Fuse maps [B, width, h, w] into one: fast normalised fusion (section 3.3)."""
            weights = self.weights.relu()
            weights = weights / (1e-4 + weights.sum())
            return self.conv(sum(w * x for w, x in zip(weights, maps, strict=True)))
    return Node


def bifpn_layer_class():
    """Return the module of one BiFPN layer."""
    from torch import nn
    from torch.nn.functional import interpolate
    Node = node_class()
    down = nn.MaxPool2d(3, stride=2, padding=1)  # of n pixels ceil(n / 2)

    class BiFPNLayer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.m6, self.m5, self.m4, self.o3 = (Node(width, 2) for _ in range(4))
            self.o4, self.o5, self.o6, self.o7 = (Node(width, n) for n in (3, 3, 3, 2))

        def forward(self, p3, p4, p5, p6, p7, q4, q5):
            """Return P3..P7 from P3..P7, each [B, width, h, w] (figure 2d).

            q4 and q5 stand for P4 and P5 on the way from P3 to P7.
            """
            # to a size, not by 2: a level of 3 pixels lies above one of 5
            m6 = self.m6(p6, interpolate(p7, p6.shape[2:]))
            m5 = self.m5(p5, interpolate(m6, p5.shape[2:]))
            m4 = self.m4(p4, interpolate(m5, p4.shape[2:]))
            o3 = self.o3(p3, interpolate(m4, p3.shape[2:]))
            o4 = self.o4(q4, m4, down(o3))
            o5 = self.o5(q5, m5, down(o4))
            o6 = self.o6(p6, m6, down(o5))
            return o3, o4, o5, o6, self.o7(p7, down(o6))
    return BiFPNLayer


def bifpn_class():
    """Return the decoder of EfficientDet, as a class: torch is imported only when it is built."""
    from torch import nn
    from torch.nn.functional import interpolate, silu
    down = nn.MaxPool2d(3, stride=2, padding=1)  # of n pixels ceil(n / 2)
    Node, BiFPNLayer = node_class(), bifpn_layer_class()

    class BiFPN(nn.Module):
        def __init__(self, channels, width, n_layers):
            super().__init__()

            def project(index):
                channels_in = int(channels[index])  # Conv2d refuses numpy's numbers
                return nn.Sequential(nn.Conv2d(channels_in, width, 1, bias=False),
                                     nn.BatchNorm2d(width))
            # as in google/automl: P6 too starts from the encoder's last map, and the first way from
            # P3 to P7 has projections of its own, q4 and q5
            self.p2, self.p3, self.p4, self.p5 = (project(index) for index in (-4, -3, -2, -1))
            self.p6, self.q4, self.q5 = (project(index) for index in (-1, -2, -1))
            self.layers = nn.ModuleList(BiFPNLayer(width) for _ in range(n_layers))
            self.join = Node(width, 6)

        def forward(self, features):
            """Return [B, width, H/4, W/4] from the last four of an encoder's maps."""
            x2, x3, x4, x5 = features[-4:]
            p2, p6, q4, q5 = self.p2(x2), down(self.p6(x5)), self.q4(x4), self.q5(x5)
            levels = self.p3(x3), self.p4(x4), self.p5(x5), p6, down(p6)
            for layer in self.layers:
                levels = layer(*levels, q4, q5)
                _, q4, q5, *_ = levels
            # P3 alone would leave half of the last layer untrained; enlarged by nearest P7 would
            # show as squares of 128 pixels
            size = p2.shape[2:]
            enlarged = [interpolate(level, size, mode="bilinear") for level in levels]
            return silu(self.join(p2, *enlarged))
    return BiFPN


# name -> function (encoder, n_classes, **options) -> model from float [B, 3, H, W] to logits [B,
# n_classes, H, W], such as `assemble` returns. fpn-narrow, with 64 and 32 channels for smp's 256
# and 128, trains on twice as many images/s on a CPU, but learns less, even in the same time.
DECODERS = {
    "unet": smp_decoder("unet"),
    "unetplusplus": smp_decoder("unetplusplus"),
    "manet": smp_decoder("manet"),
    "linknet": smp_decoder("linknet"),
    "pspnet": smp_decoder("pspnet"),
    "deeplabv3": smp_decoder("deeplabv3"),
    "deeplabv3plus": smp_decoder("deeplabv3plus"),
    "pan": smp_decoder("pan"),
    "upernet": smp_decoder("upernet"),
    "segformer": smp_decoder("segformer"),
    "dpt": dpt,
    "fpn": smp_decoder("fpn"),
    "fpn-narrow": smp_decoder("fpn", decoder_pyramid_channels=64, decoder_segmentation_channels=32),
    "efficientdet": efficientdet}


def build_model(name, n_classes, weights="none", scale=None, drop_path=0.0):
    """Return a model DECODER/ENCODER from float [B, 3, H, W] to logits [B, n_classes, H, W].

    weights: of the encoder, "none" or "imagenet" (downloaded); load_weights takes those of a file.
    scale: side of the images, for which an encoder of fixed size is built; else it has its own.
    drop_path: see timm_options. Raises UserError when the name, the pair or the weights don't work,
    with the reason.
    """
    decoder, encoder = split_model(name)
    # timm warns of the classifier's weights, which an encoder doesn't need
    logging.getLogger("timm.models").setLevel(logging.ERROR)
    try:
        options = timm_options(encoder, scale, drop_path)
        model = DECODERS[decoder](encoder, n_classes, **encoder_weights_options(encoder, weights),
                                  **options)
    except UserError:
        raise
    except Exception as e:  # smp, timm and the hub raise many types; the reason is in the message
        cure = ""
        if weights == "imagenet":
            cure = ("; to work without the network bring the weights as --weights FILE, or take "
                    "--weights none")
        raise UserError(f"{name} with weights {weights}: {shorten(str(e), 2000)}{cure}") from None
    check_parts(model, name)
    if drop_path and not any(getattr(module, "drop_prob", 0) and "DropPath" in type(module).__name__
                             for module in model.encoder.modules()):
        raise UserError(f"--drop-path {drop_path}: the encoder {encoder} drops no paths, take 0")
    model.timm_options = options
    return padded(model)


def split_model(name):
    """Return (decoder, encoder) of DECODER/ENCODER; raise UserError if there is no such decoder."""
    decoder, _, encoder = name.partition("/")
    if decoder not in DECODERS or not encoder:
        raise UserError(f"{name!r} is not DECODER/ENCODER with a decoder of {', '.join(DECODERS)}")
    if not re.fullmatch(r"\w[\w.-]*", encoder, re.ASCII):  # it names a folder
        raise UserError(f"{name!r}: an encoder's name has letters, digits, '_', '.' and '-' alone")
    return decoder, encoder


def check_parts(model, name):
    """Raise UserError if a model lacks the parts that training and weights files need."""
    convolution = last_convolution(model)
    if not hasattr(model, "encoder") or convolution is None or convolution.bias is None:
        raise UserError(f"{name}: the builder's model must have .encoder and .segmentation_head, "
                        "whose last convolution has a bias, as those of `assemble` have")


def last_convolution(model):
    """Return the last convolution of a model's segmentation head, or None if it has none."""
    from torch.nn import Conv2d, Module
    head = getattr(model, "segmentation_head", Module())
    convolutions = [module for module in head.modules() if isinstance(module, Conv2d)]
    return convolutions[-1] if convolutions else None


def timm_options(encoder, scale, drop_path):
    """Return timm's options for an encoder tu-NAME at a scale; {} of another encoder.

    One of fixed size is built for that side, padded; if it can, it also takes others later. With
    drop_path its residual branches are left out at random in training (stochastic depth, arXiv
    1603.09382), the last with this probability, earlier ones less; 0: as the encoder has it.
    """
    network = timm_network(encoder)
    if network is None:
        if drop_path:
            raise UserError(f"--drop-path {drop_path}: the encoder {encoder} is not of timm, whose "
                            "names begin with tu-, and keeps what it has, take 0")
        return {}
    parameters, options = inspect.signature(type(network).__init__).parameters, {}
    if scale and "img_size" in parameters:
        stride = max(level["reduction"] for level in network.feature_info)
        options["img_size"] = 2 * (math.ceil(scale / stride) * stride,)
    if "dynamic_img_size" in parameters:
        options["dynamic_img_size"] = True
    if drop_path and "drop_path_rate" in parameters:  # else build_model finds no paths that drop
        options["drop_path_rate"] = drop_path
    return options


def timm_network(encoder, **options):
    """Return timm's network of an encoder tu-NAME, on "meta"; None of another encoder.

    It is whole, where the encoder is what smp and timm have made of it for its maps.
    """
    if not encoder.startswith("tu-"):
        return None
    import timm
    import torch
    with torch.device("meta"):
        return timm.create_model(encoder.removeprefix("tu-"), **options)


def encoder_weights_options(encoder, weights):
    """Return the builder's options for an encoder's weights, "none" or "imagenet"."""
    if weights == "none":
        return {"encoder_weights": None}
    go_offline_without_network()
    return {"encoder_weights": True if encoder.startswith("tu-") else weights}


def go_offline_without_network():
    """Let the Hugging Face hub use only what it has kept when it can't be reached.

    It would try for a minute. With a proxy or a mirror nobody can know, and it tries.
    """
    from urllib.request import getproxies

    import huggingface_hub
    try:
        socket.create_connection(("huggingface.co", 443), timeout=5).close()
    except OSError:
        if not getproxies() and "HF_ENDPOINT" not in os.environ:
            huggingface_hub.constants.HF_HUB_OFFLINE = True


def padded(model):
    """Return the same model, which now takes sides that are no multiples of its encoder's stride.

    It pads the images and crops its logits back.
    """
    from torch.nn.functional import pad
    # only smp's encoder for plain ViTs lists its strides
    stride = max(getattr(model.encoder, "output_strides", [STRIDE]))

    class Padded(type(model)):
        def forward(self, images):
            height, width = images.shape[2:]
            if height % stride or width % stride:
                images = pad(images, (0, -width % stride, 0, -height % stride))
            return super().forward(images)[..., :height, :width]
    model.__class__ = Padded
    return model


def try_sides(model, name, sides, asked=""):
    """Raise UserError if a model can't work at one of these sides; return the copy that has tried.

    It is on "meta", where nothing is computed, and has a gradient for each parameter that the
    logits need. Some encoders take images of one size alone. asked: what asks for these sides.
    """
    import torch
    copy = deepcopy(model).to("meta").eval()
    for side in sides:
        try:
            logits = copy(torch.zeros(1, 3, side, side, device="meta"))
            logits.sum().backward()
        except Exception as e:  # too few pixels, a fixed size: encoders raise many types
            reason = shorten(str(e), 300)
            raise UserError(f"{name} can't work at scale {side}{asked}: {reason}") from None
        if logits.shape[2:] != (side, side):
            raise UserError(f"{name} makes {list(logits.shape[2:])} of {side} x {side}: "
                            "`upsampling` must be the stride of the decoder's map")
    return copy


def try_asked_sides(model, name, trained_scale, asked, where=""):
    """Raise UserError if a model can't work at the sides that infer.py's options ask for.

    asked: the options' values, with "scale" and "tta_scales"; where: words before their names. At
    its own scale alone training has tried it.
    """
    if not asked["scale"] and asked["tta_scales"] == [1]:
        return
    side = asked["scale"] or trained_scale
    option = f"--tta-scales times {side}" if asked["tta_scales"] != [1] else "--scale"
    try_sides(model, name, tta_sides(side, asked["tta_scales"]), f" ({where}{option})")


def encoder_mean_std(name):
    """Return the (mean, std) by RGB channel, of values 0..1, that an encoder was pretrained with.

    name: DECODER/ENCODER. Of an encoder that timm doesn't know they are ImageNet's.
    """
    from timm.models import PretrainedCfg, get_pretrained_cfg
    encoder = name.split("/", 1)[1]
    encoder = encoder.replace("timm-mobilenetv3", "tf_mobilenetv3")  # as smp does
    encoder = encoder.removeprefix("tu-").removeprefix("timm-")
    names_in_timm = {"inceptionv4": "inception_v4", "inceptionresnetv2": "inception_resnet_v2",
                     "xception": "legacy_xception"}
    config = get_pretrained_cfg(names_in_timm.get(encoder, encoder)) or PretrainedCfg()
    return tuple(config.mean), tuple(config.std)


def normalise(images, mean, std):
    """Return float32 [B, 3, H, W] in channels_last memory from uint8 [B, H, W, 3]."""
    mean, std = (colour_row(tuple(values), images.shape[2], images.device)
                 for values in (mean, std))
    return images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


@cache  # to copy a few numbers to a GPU the CPU waits until all its work is done
def colour_row(values, width, device):
    """Return three values of 0..1 as a row of pixels, float32 [width, 3] of 0..255.

    A row at a time is several times faster than a pixel at a time.
    """
    import torch
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).mul(255).repeat(width, 1)


# ---- models: how an encoder is trained -----------------------------------------------------------


def layer_factors(model, name, decay):
    """Return {name of an encoder's parameter: factor of its learning rate} for --layer-decay.

    It is decay ** (layers above it), by timm's grouping: as in BEiT (arXiv 2106.08254) that of the
    last block is `decay`, since what stands on it counts as one layer. {} if decay is 1.
    """
    if decay == 1:
        return {}
    network = encoder_network(model, name)
    if not hasattr(network, "group_matcher"):
        raise UserError(f"--layer-decay {decay}: timm knows no layers of the encoder of {name}: "
                        "take 1, or another encoder tu-NAME")
    from timm.models import group_parameters
    layers = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    top = max(layers.values())
    factors = {plain_name(key): decay ** (top - layer) for key, layer in layers.items()}
    return {f"encoder.{key}": factors[plain_name(key)]
            for key, _ in model.encoder.named_parameters()}


def checkpoint_gradients(model, name):
    """Let an encoder compute its maps twice in a step instead of keeping them: saves memory.

    Raises UserError if it can't: timm must know how, and batch norm would count each batch twice.
    """
    from torch.nn.modules.batchnorm import _NormBase
    network = getattr(model.encoder, "model", None)
    if not hasattr(network, "set_grad_checkpointing"):
        network = getattr(network, "model", None)  # timm's FeatureGetterNet has it inside
    reason = ""
    if any(isinstance(module, _NormBase) for module in model.encoder.modules()):
        reason = "has batch norm, which would count each batch twice"
    elif not hasattr(network, "set_grad_checkpointing"):
        reason = "is not one that timm can do so"
    else:
        try:
            network.set_grad_checkpointing(True)
        except AssertionError:  # so timm says that a network can't
            reason = "can't do so in timm"
    if reason:
        raise UserError(f"--grad-checkpoint: the encoder of {name} {reason}: leave it out")


# ---- models: weights from a file -----------------------------------------------------------------
# Weights come by many names: "stages.0.blocks.0.norm.weight" in timm's network is
# "encoder.model.stages_0.blocks.0.norm.weight" in the model built of it, and has "module." or
# "backbone." before it elsewhere. So tensors are matched by plain_name and shape.

WEIGHT_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
# where a file with more than weights keeps them; averages of the weights come first
WEIGHT_KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model",
               "teacher", "net", "encoder", "backbone", "weights")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # what DDP, torch.compile and others put before
ENCODER_PREFIXES = (*WRAPPERS, "encoder.", "backbone.", "body.")
LEAST_MATCHED = 0.9  # share of an encoder's parameters that a file must hold
# what model.pt, epoch-*.pt and last.pt of train.py hold besides weights; see has_kinds
OWN_KINDS = {"recipe": {"model": str}, "classes": [str], "valid_ids": [int]}


def weights_file(weights, name):
    """Return the file that --weights gives the model DECODER/ENCODER; None for imagenet and none.

    In a folder it is named after the encoder without tu-: that alone, or followed by a sign that is
    neither letter nor digit, and more. Raises UserError if there is none, or more than one.
    """
    if weights in ("imagenet", "none"):
        return None
    path, encoder = Path(weights), name.partition("/")[2].removeprefix("tu-")
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"--weights {weights}: no such file or folder, and neither imagenet nor "
                        "none")
    there = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_ENDINGS)
    named_so = [file for file in there if file.stem == encoder]
    begin_so = [file for file in there if re.match(rf"{re.escape(encoder)}[\W_]", file.stem)]
    files = named_so or begin_so
    if len(files) != 1:
        listed = shorten(", ".join(file.name for file in files or there), 500) or "nothing"
        raise UserError(f"--weights {weights}: {len(files)} files are named after the encoder "
                        f"{encoder}, and one must be, {encoder}.pth or {encoder}_MORE.pth (or "
                        f"{', '.join(WEIGHT_ENDINGS[1:])}): there is {listed}")
    return files[0]


def load_weights(model, name, path, classes=None):
    """Load a file's weights into a model of build_model; return a line that says what it took.

    path: state dict of timm, torchvision or smp, also inside another dict, or a model.pt of
    train.py. The encoder must get LEAST_MATCHED of its parameters. The decoder is taken if all of
    it fits, and with it rows of the segmentation head: of `classes` (names by class id) those that
    a model.pt has, else all if there are as many. Raises UserError if the file doesn't fit, with
    the reason. It runs no code from the file.
    """
    checkpoint = read_weights(path)
    recipe, their_classes, origin = {}, None, ""
    if has_kinds(checkpoint, OWN_KINDS):
        recipe, their_classes = checkpoint["recipe"], checkpoint["classes"]
        origin = f" (of {recipe['model']})"
    parts = split_parts(find_tensors(checkpoint, path), path)
    text = load_encoder(model, name, f"{path}{origin}", parts["encoder"])
    check_normalisation(name, path, recipe)
    if parts["decoder"]:
        text += load_decoder(model, parts, their_classes, classes)
    return f"weights {path}{origin}: {text}"


def read_weights(path):
    """Return what a weights file holds, with its tensors on the CPU; no code from it is run."""
    if Path(path).suffix != ".safetensors":
        import torch
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own holds options
            return load_checkpoint(path)
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except Exception as e:  # safetensors has a type of its own
        raise UserError(f"{path}: no safetensors that can be read: {first_line(str(e))}") from None


def find_tensors(checkpoint, path):
    """Return {name: tensor} of what a weights file holds, from a dict inside it if there is one."""
    import torch
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds no weights by name, but a {type(checkpoint).__name__}")
    for key in WEIGHT_KEYS:
        if isinstance(checkpoint.get(key), dict):
            return find_tensors(checkpoint[key], path)
    tensors = {}
    for key, value in checkpoint.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[key] = value
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name, and no dict of them under "
                        f"{', '.join(WEIGHT_KEYS)}, but {first_names(map(str, checkpoint))}")
    return tensors


def split_parts(state, path):
    """Return {"encoder", "decoder", "segmentation_head": {name: tensor}} of a file's state dict.

    Without encoder.* and decoder.* it is all an encoder's. A classification head is left out.
    """
    names = new_names(state, lambda name: without_prefixes(name, WRAPPERS), path)
    state = {name: state[old] for name, old in names.items()}
    parts = {"encoder": {}, "decoder": {}, "segmentation_head": {}}
    if not {"encoder", "decoder"} <= {name.partition(".")[0] for name in state}:
        return parts | {"encoder": state}
    for name, tensor in state.items():
        part, _, name_inside = name.partition(".")
        if part in parts:
            parts[part][name_inside] = tensor
    return parts


def new_names(names, rename, path):
    """Return {rename(name): name}; raise UserError if two names of the file become the same."""
    renamed = {}
    for name in names:
        if (other := renamed.setdefault(rename(name), name)) != name:
            raise UserError(f"{path}: holds {other} and {name}, of which only one can be meant: "
                            "take one out")
    return renamed


def without_prefixes(name, prefixes):
    """Return a name without the prefixes that it begins with, however many they are."""
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def plain_name(name):
    """Return what a tensor's names in the network, the model and files have in common."""
    name = without_prefixes(name, ENCODER_PREFIXES)
    # torchvision's files of DenseNet have denselayer1.norm.1 for norm1
    name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name)
    return name.replace(".", "_")


def load_encoder(model, name, path, given):
    """Load {name: tensor} of a file into the encoder; return which share fits and what doesn't.

    What doesn't fit as it is goes through timm's own conversion.
    """
    from torch.nn import Module
    encoder = model.encoder
    own, network = encoder.state_dict(), encoder_network(model, name)
    matched, rest = match_tensors(own, given, path)
    if len(matched) < len(own) and network is not None:
        given = convert_weights(network, given)
        matched, rest = match_tensors(own, given, path)
    sizes = {key: parameter.numel() for key, parameter in encoder.named_parameters()
             if not is_classifier(key, network)}
    share = sum(size for key, size in sizes.items() if key in matched) / sum(sizes.values())
    text = f"{len(matched)} of {len(own)} tensors, {share:.1%} of the encoder's parameters"
    for what, names in rest.items():
        text += f"; {what}: {first_names(names)}" if names else ""
    if share < LEAST_MATCHED:
        raise UserError(f"{path} doesn't fit the encoder of {name}, of which it must have "
                        f"{LEAST_MATCHED:.0%}: {text}")
    deeper = sum(given[key].numel() for key in deeper_names(own, rest["left over"], network))
    if deeper > (1 - LEAST_MATCHED) * sum(sizes.values()):
        raise UserError(f"{path} is of a deeper encoder than that of {name}: {text}")
    Module.load_state_dict(encoder, own | matched)  # smp's own would rename some again
    return text


def match_tensors(own, given, path):
    """Return ({own name: tensor of `given` that fits it}, {what the others are: [name]})."""
    unused, matched, missing, misshaped = new_names(given, plain_name, path), {}, [], []
    for key, tensor in own.items():
        theirs = given.get(unused.pop(plain_name(key), None))
        if theirs is None:
            missing.append(key)
        elif theirs.shape != tensor.shape:
            misshaped.append(f"{key} {list(theirs.shape)} for {list(tensor.shape)}")
        else:
            matched[key] = theirs
    return matched, {"missing": missing, "of another shape": misshaped,
                     "left over": list(unused.values())}


def deeper_names(own, names, network):
    """Return those of the names left over of a file that belong to more layers of the same kind.

    EfficientNet-B1 has all of B0, in the same shapes. The network's own, which smp leaves out, such
    as conv_head, are none, nor is what begins with another word, such as fc.
    """
    whole = set() if network is None else {plain_name(key) for key in network.state_dict()}
    words = {plain_name(key).partition("_")[0] for key in own}
    return [name for name in names if plain_name(name) not in whole
            and plain_name(name).partition("_")[0] in words]


def first_names(names, n=3):
    """Return the first names of a list and how many more there are: "a, b, c and 5 more"."""
    names = list(names)
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return shorten(", ".join(names[:n]) or "nothing", 300) + more


def encoder_network(model, name):
    """Return the timm_network of a model's encoder, built like it; None of another encoder."""
    return timm_network(name.partition("/")[2], **model.timm_options)


def is_classifier(key, network):
    """Return whether a tensor of an encoder belongs to the classifier of its network, of timm."""
    prefixes = network.pretrained_cfg.get("classifier") if network is not None else None
    prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes or ()
    return any(plain_name(key).startswith(plain_name(prefix) + "_") for prefix in prefixes)


def convert_weights(network, given):
    """Return a file's {name: tensor} as timm converts it for its network.

    It takes other authors' names, and resamples position embeddings to the network's size.
    """
    module = sys.modules[type(network).__module__]
    convert = getattr(module, "checkpoint_filter_fn", getattr(module, "_filter_fn", None))
    if convert is None:
        return given
    names = {plain_name(name): name for name in network.state_dict()}
    state = {}
    for name, tensor in given.items():
        state[names.get(plain_name(name), without_prefixes(name, ENCODER_PREFIXES))] = tensor
    try:
        return convert(state, network)
    except Exception:  # it meets a foreign file: the caller names what doesn't fit
        return given


def check_normalisation(name, path, recipe):
    """Raise UserError if weights were made with other mean and std than the model's encoder has.

    recipe: of a model.pt, else {}. The name of a timm file may tell, as in NAME.TAG.safetensors.
    """
    from timm.models import get_pretrained_cfg
    own, config = encoder_mean_std(name), None
    with suppress(RuntimeError):  # timm knows no such tag of this network
        config = get_pretrained_cfg(Path(path).stem)
    if {"mean", "std"} <= recipe.keys():
        theirs = recipe["mean"], recipe["std"]
    elif config:
        theirs = config.mean, config.std
    else:
        return
    if [*map(list, theirs)] != [*map(list, own)]:
        raise UserError(f"{path}: its images were normalised with mean {list(theirs[0])} and std "
                        f"{list(theirs[1])}, those of {name} are with {list(own[0])} and "
                        f"{list(own[1])}: name the encoder with timm's tag of these weights, "
                        "tu-NAME.TAG")


def weights_learnt_from(path):
    """Return the set of hashes of the photo files that weights have learnt from.

    A model.pt of train.py notes those that it and its own weights have learnt from; of any other
    file the set is empty. Raises UserError for one of an older train.py, which noted none.
    """
    checkpoint = read_weights(path)
    if not has_kinds(checkpoint, OWN_KINDS):
        return set()
    if not has_kinds(checkpoint, {"learnt_from": [str]}):
        raise UserError(f"{path} doesn't say which photos it has learnt from, as it is of an older "
                        "train.py: if it knows none of DATA, save its weights alone, "
                        "torch.load(...)[\"model\"], and give that file")
    return {*checkpoint["learnt_from"]}


def check_unseen(path, held_out, fold):
    """Raise UserError if weights have learnt from photos that a run holds out.

    held_out: set, the hashes of the files of the photos of `fold`. Scores would flatter the run.
    """
    if n_seen := len(weights_learnt_from(path) & held_out):
        raise UserError(f"{path}: has learnt from {n_seen} of the {len(held_out)} photos that fold "
                        f"{fold} holds out, so every score would flatter: take the model.pt of "
                        "the same fold, or weights made from other photos")


def load_decoder(model, parts, their_classes, classes):
    """Load decoder and head of {part: {name: tensor}} if the decoder fits; return what was taken.

    their_classes, classes: names by class id in the file and in the model, or None.
    """
    own, given = model.decoder.state_dict(), parts["decoder"]
    shapes, their_shapes = ({key: value.shape for key, value in state.items()}
                            for state in (own, given))
    if shapes != their_shapes:
        return "; its decoder doesn't fit, and the model's begins at random"
    model.decoder.load_state_dict(given)
    n_rows = load_head(model, parts["segmentation_head"], their_classes, classes)
    rows = len(last_convolution(model).weight)
    return f"; its decoder, and the head's rows of {n_rows} of {rows} classes"


def load_head(model, given, their_classes, classes):
    """Load the rows of the segmentation head that a file has; return how many they are.

    Rows are matched by class name where both sides have names, else all if there are as many.
    """
    head, last = model.segmentation_head, last_convolution(model)
    prefix = next(name for name, module in head.named_modules() if module is last)
    own, rows = head.state_dict(), []
    of_rows = [f"{prefix}.weight", f"{prefix}.bias"]
    fits = own.keys() == given.keys() and all(
        given[key].shape[key in of_rows:] == own[key].shape[key in of_rows:] for key in own)
    if their_classes and classes:
        rows = [(i, their_classes.index(name)) for i, name in enumerate(classes)
                if name in their_classes]
    elif fits and len(given[of_rows[0]]) == len(last.weight):
        rows = [(i, i) for i in range(len(last.weight))]
    if not fits or not rows:
        return 0
    ours, theirs = map(list, zip(*rows, strict=True))
    for key in of_rows:
        own[key][ours] = given[key][theirs].to(own[key].dtype)
    head.load_state_dict(given | {key: own[key] for key in of_rows})
    return len(rows)


# ---- losses --------------------------------------------------------------------------------------
# A term of a loss gets log_probs float32 [B, C, H, W], log_true float32 [B, H, W] (those of the
# true class), target int64 [B, H, W] (class ids, 0 where there is no label) and labelled bool [B,
# H, W].


def region_loss(index):
    """Return a term over regions: the mean of 1 - index(overlap, missed, invented) over classes.

    The index gets three float32 [C], summed over the batch: the probability of each class on its
    own pixels, what is lacking to all of them, and its probability on pixels of other classes. Only
    classes in the truth count. It must have a finite slope where nothing is missed or invented.
    Soft IoU: Rahman and Wang 2016; Tversky: Salehi et al. 2017.
    """
    def term(log_probs, log_true, target, labelled):
        # summed by row first: a float32 that millions of pixels are added to one by one loses them
        rows = target.flatten(0, 1)  # [B x H, W]
        per_row = log_probs.new_zeros(len(rows), log_probs.shape[1])
        overlap = per_row.scatter_add(1, rows, (log_true.exp() * labelled).flatten(0, 1)).sum(0)
        truth = per_row.scatter_add(1, rows, labelled.flatten(0, 1).float()).sum(0)
        predicted = (log_probs.exp() * labelled[:, None]).sum((0, 2, 3))
        # no branch and no boolean index: either would make a GPU wait for the answer
        present = truth > 0
        value = index(overlap, (truth - overlap).where(present, 1), predicted - overlap)
        return ((1 - value) * present).sum() / present.sum().clamp(min=1)
    return term


def iou(overlap, missed, invented):
    return overlap / (overlap + missed + invented)


def dice(overlap, missed, invented):
    return 2 * overlap / (2 * overlap + missed + invented)


def lovasz_loss(log_probs, log_true, target, labelled):
    """Return the Lovasz-softmax loss (Berman et al. 2018), the mean over classes in the truth."""
    from segmentation_models_pytorch.losses import LovaszLoss
    mask = target.where(labelled, IGNORE_INDEX)
    loss = LovaszLoss("multiclass", ignore_index=IGNORE_INDEX)
    return loss(log_probs, mask).sum()  # of no labelled pixel it is empty, and its sum 0


def pixel_weights(target, labelled, weights):
    """Return what each pixel weighs in a loss over pixels, [B, H, W]: its class's weight, or 1."""
    return labelled if weights is None else weights[target] * labelled


def pixel_loss(log_probs, log_true, target, labelled, smoothing, weights, gamma):
    """Return the cross-entropy, the mean over labelled pixels weighted by class.

    Smoothing and weights are torch's. gamma > 0 turns down pixels that are right already by
    (1 - probability) ** gamma: focal loss (Lin et al. 2017).
    """
    weight = pixel_weights(target, labelled, weights)
    loss = -log_true * weight
    if gamma:
        loss = loss * (1 - log_true.exp()) ** gamma
    if smoothing:
        by_class = log_probs if weights is None else log_probs * weights[:, None, None]
        loss = (1 - smoothing) * loss + smoothing * -by_class.mean(1) * labelled
    return loss.sum() / weight.sum().clamp(min=1e-6)


cross_entropy = partial(pixel_loss, gamma=0)
focal = partial(pixel_loss, gamma=2)

# name -> (term over regions or None, term over pixels or None)
LOSSES = {
    "iou_ce": (region_loss(iou), cross_entropy),
    "ce": (None, cross_entropy),
    "iou": (region_loss(iou), None),
    "dice_ce": (region_loss(dice), cross_entropy),
    "focal": (None, focal),
    "lovasz": (lovasz_loss, None)}


def make_loss(name, ratio=0.4, smoothing=0.0, weights=None):
    """Return a function (logits [B, C, H, W], mask int64 [B, H, W]) -> float32 scalar.

    It averages over the labelled pixels, and a batch without one gives 0. ratio: share of the term
    over regions where a loss has both terms; smoothing and weights, float [C] or None, are of the
    term over pixels.
    """
    region_term, pixel_term = LOSSES[name]
    if region_term is None:
        ratio = 0
    elif pixel_term is None:
        ratio = 1

    def loss(logits, mask):
        labelled = mask != IGNORE_INDEX
        target = mask.where(labelled, 0)
        log_probs = logits.float().log_softmax(dim=1)
        log_true = log_probs.gather(1, target[:, None]).squeeze(1)
        inputs = log_probs, log_true, target, labelled
        total = ratio * region_term(*inputs) if ratio else 0
        if ratio < 1:
            total = total + (1 - ratio) * pixel_term(*inputs, smoothing, weights)
        return total
    return loss


# ---- metrics -------------------------------------------------------------------------------------


def confusion(pred, mask, n_classes):
    """Return the pixel counts of one image, int64 [C, C], rows the truth.

    pred, mask: uint8 [H, W]; pixels of IGNORE_INDEX in the mask are left out.
    """
    import cv2
    codes = mask.astype(np.uint16) * n_classes + pred
    n_codes = n_classes ** 2  # those of IGNORE_INDEX lie beyond
    counts = cv2.calcHist([codes], [0], None, [n_codes], [0, n_codes])
    # from float32, which is exact up to 16 million pixels
    return counts.astype(np.int64).reshape(n_classes, n_classes)


def class_iou(confusion):
    """Return the IoU by class of pixel counts [..., C, C].

    It is NaN for a class in neither truth nor prediction, and 0 for one only in the prediction.
    """
    hits = np.einsum("...ii->...i", confusion).astype(float)
    union = confusion.sum(-1) + confusion.sum(-2) - hits
    return np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)


def image_miou(confusions):
    """Return the mIoU [N] of pixel counts [N, C, C]: the mean over the classes that have an IoU."""
    return np.nanmean(class_iou(confusions), axis=-1)


def scores(confusions, batch_size):
    """Return {"v1", "v2", "v3": mIoU, "iou": IoU by class of v2} from pixel counts [N, C, C].

    v1: mean over batches of images in this order (the official baseline's), v2: of the summed
    counts, v3: mean over images (the leaderboard's).
    """
    iou = class_iou(confusions.sum(0))
    return {"v1": image_miou(batch_counts(confusions, batch_size)).mean(), "v2": np.nanmean(iou),
            "v3": image_miou(confusions).mean(), "iou": iou}


def batch_counts(confusions, batch_size):
    """Return the summed pixel counts [B, C, C] of batches of images in this order."""
    return np.add.reduceat(confusions, np.arange(0, len(confusions), batch_size))


METRICS = ("v3", "v2", "v1")  # what --metric can be


def guarded(v, metric):
    """Return what an epoch is chosen by, and a vote is fitted for, of scores {"v1", "v2", "v3"}.

    It is v2, and with it v3 or v1 if that is the metric: alone these are raised by silence on rare
    classes, which v2 counts in full; and what is fitted for the sum has the higher v3 on other
    images too, as rare classes are fitted on few.
    """
    return v["v2"] if metric == "v2" else v["v2"] + v[metric]


# ---- TTA and prediction --------------------------------------------------------------------------

# name -> (whether transposed, dims flipped after that): these 8 are all that flips and quarter
# turns make
VIEWS = {"identity": (False, ()), "hflip": (False, (-1,)), "vflip": (False, (-2,)),
         "rot90ccw": (True, (-2,)), "rot180": (False, (-2, -1)), "rot90cw": (True, (-1,)),
         "transpose": (True, ()), "antitranspose": (True, (-2, -1))}
# name -> the views whose probabilities are averaged
TTA = {
    "none": "identity",
    "flip": "identity,hflip,vflip",
    "flip_rot": "identity,hflip,vflip,rot90cw,rot90ccw,rot180",
    "d4": "identity,hflip,vflip,rot90ccw,rot180,rot90cw,transpose,antitranspose"}


def tta_views(text):
    """Return the different views of a set in TTA, or of a list such as "identity,hflip+rot90cw".

    + does one view after another. Raises UserError for a name that is neither.
    """
    views = []
    for item in TTA.get(text, text).split(","):
        transposed, flipped = False, set()
        for name in item.split("+"):
            if name not in VIEWS:
                raise UserError(f"{name!r} is none of {', '.join(TTA)} and none of "
                                f"{', '.join(VIEWS)}")
            transpose, flips = VIEWS[name]
            transposed ^= transpose
            if transpose:
                flipped = {-3 - dim for dim in flipped}  # -1 becomes -2
            flipped ^= set(flips)
        views.append((transposed, tuple(sorted(flipped))))
    return list(dict.fromkeys(views))


def tta_name(args):
    """Return how infer.py's arguments predict as text: "flip" or "flip x 1,0.5 at 512"."""
    at_scale = f" at {args.scale}" if args.scale else ""
    if args.tta_scales == [1]:
        return f"{args.tta}{at_scale}"
    scales = [str(scale).removesuffix(".0") for scale in args.tta_scales]  # all digits: it is a key
    return f"{args.tta} x {','.join(scales)}{at_scale}"


def tta_sides(scale, tta_scales):
    """Return the different sides at which predict_probs asks a model of this scale."""
    return sorted({round(scale * tta_scale) for tta_scale in tta_scales})


def apply_view(x, view):
    """Return [..., H, W] as a view shows it, [..., W, H] if that is transposed.

    Flipping the result again and transposing it back undoes the view.
    """
    transposed, flipped = view
    return (x.transpose(-2, -1) if transposed else x).flip(flipped)


def predict_probs(models, images, views, scales=(1.0,)):
    """Return probs [B, C, H, W], the mean over models, views and scales.

    images: normalised float32 [B, 3, H, W]. Probabilities are averaged, not logits, in float32.
    """
    import torch
    from torch.nn.functional import interpolate
    total, size = 0, images.shape[2:]
    with torch.inference_mode(), amp(images.device):
        for scale in scales:
            scaled = images
            if scale != 1:
                scaled_size = [round(side * scale) for side in size]
                scaled = interpolate(images, scaled_size, mode="bilinear", antialias=True)
            probs = sum_of_views(models, scaled, views)
            total += probs if scale == 1 else interpolate(probs, size, mode="bilinear")
    return total / (len(models) * len(views) * len(scales))


def sum_of_views(models, images, views):
    """Return the probs [B, C, H, W] of all models and views, added up.

    Transposing back costs more than a flip, so views of one kind are added up first.
    """
    import torch
    by_kind = dict.fromkeys((transposed for transposed, _ in views), 0)
    for transposed, flipped in views:
        view = apply_view(images, (transposed, flipped))
        view = view.contiguous(memory_format=torch.channels_last)
        for model in models:
            by_kind[transposed] += model(view).float().softmax(dim=1).flip(flipped)
    return sum(probs.transpose(-2, -1) if transposed else probs
               for transposed, probs in by_kind.items())


@dataclass
class Window:
    """A square of a photo that a model sees, and where its probabilities go."""
    image: np.ndarray  # uint8 [side, side, 3]
    size: tuple  # (height, width) of the photo's probabilities
    rows: tuple  # of axis_windows, down and across
    columns: tuple
    is_first: bool  # of its photo
    is_last: bool


def predict_windows(probs_of, recipe, photos, batch, device):
    """Yield probs float32 [C, height, width] of one photo after another, from overlapping windows.

    probs_of: a function from normalised images float32 [B, 3, scale, scale] to their probs; recipe:
    "scale", the side of a window, "mean" and "std"; photos: any number of (image uint8 [H, W, 3],
    (height, width) of its probs). Batches are full, also across photos; in memory are a photo, a
    batch and the probs.
    """
    import torch
    total = None
    for windows in batched(photo_windows(photos, recipe["scale"]), batch):
        images = np.stack([window.image for window in full_batch(windows, batch)])
        images = normalise(torch.from_numpy(images).to(device), recipe["mean"], recipe["std"])
        probs = probs_of(images)[:len(windows)]
        for window, each in zip(windows, probs, strict=True):
            if window.is_first:
                total = torch.zeros(len(each), *window.size, device=device)
            (_, top, down), (_, left, across) = window.rows, window.columns
            part = down.to(device) @ each @ across.to(device).T
            total[:, top:top + part.shape[1], left:left + part.shape[2]] += part
            if window.is_last:
                yield total


def batched(items, size):
    """Yield lists of `size` items, the last one of what is left."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def photo_windows(photos, side):
    """Yield the Windows of (image, size) after (image, size); see predict_windows."""
    for image, size in photos:
        (height, width), padded = image.shape[:2], padded_to(image, side)
        rows, columns = axis_windows(height, side, size[0]), axis_windows(width, side, size[1])
        n_windows = len(rows) * len(columns)
        for n, (row, column) in enumerate(product(rows, columns)):
            (top, *_), (left, *_) = row, column
            yield Window(padded[top:top + side, left:left + side], size, row, column, n == 0,
                         n == n_windows - 1)


@lru_cache(maxsize=64)  # photos of one size come one after another
def axis_windows(length, side, size):
    """Return where windows lie along an axis, and how their values get to the result.

    The axis of `length` pixels is brought to `size`. A window is (its start, the start of what it
    adds to in the result, a matrix float32 [n, side] from its values to those n). Neighbours share
    at least half their pixels. A value counts by Hann's window, sin^2 from 0 at the edges to 1 in
    the middle, so no edge shows; the weights of each pixel sum to 1, so that equal values stay. The
    matrix has these weights and the resizing in one: nothing is ever as large as the photo.
    """
    import torch
    from torch.nn.functional import interpolate
    last = max(0, length - side)
    starts = np.linspace(0, last, 1 + math.ceil(2 * last / side)).round().astype(int)
    weights = np.zeros((len(starts), last + side))
    for row, start in zip(weights, starts, strict=True):
        row[start:start + side] = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    weights /= weights.sum(0)
    windows = []
    for row, start in zip(weights[:, :length], starts.tolist(), strict=True):
        n_pixels = min(side, length)  # the rest of a window is what padded_to has added
        weighted = torch.zeros(length, side)
        pixels = range(n_pixels)
        weighted[range(start, start + n_pixels), pixels] = torch.from_numpy(
            row[start:start + n_pixels]).float()
        matrix = interpolate(weighted[None, None], (size, side), mode="bilinear", antialias=True)
        matrix = matrix[0, 0]
        reached = matrix.any(dim=1).nonzero().ravel()
        first, end = int(reached[0]), int(reached[-1]) + 1
        windows.append((start, first, matrix[first:end].clone()))
    return windows


def resize_probs(probs):
    """Return probs at the submission's size, [B, C, SUBMIT_SIZE, SUBMIT_SIZE]."""
    from torch.nn.functional import interpolate
    size = (SUBMIT_SIZE, SUBMIT_SIZE)
    return interpolate(probs, size=size, mode="bilinear", align_corners=False)


@dataclass
class TrainedModel:
    """What a model.pt or epoch-*.pt of train.py holds."""
    model: object  # the torch module, in eval mode, on the CPU
    recipe: dict  # the settings that made it: model, scale, fold, mean, std, ...
    classes: list  # names by class id
    checkpoint: dict  # all else in the file: epoch, v3, valid_ids, code, ...


def load_model(path):
    """Return the TrainedModel in a checkpoint, which needs nothing but this file.

    Raises UserError when it is no checkpoint of train.py, or damaged, or of other libraries.
    """
    import torch
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give its model.pt, or an epoch-*.pt")
    checkpoint = load_checkpoint(path)
    if not has_kinds(checkpoint, MODEL_KINDS):
        raise UserError(f"{path}: not a model.pt of train.py")
    name, classes = checkpoint["recipe"]["model"], checkpoint["classes"]
    model = build_model(name, len(classes), scale=checkpoint["recipe"]["scale"])
    try:
        model.load_state_dict(checkpoint.pop("model"))
    except RuntimeError as e:
        raise UserError(f"{path}: its weights are not those of {name} as it is built here: "
                        f"{shorten(str(e), 300)}") from None
    model = model.to(memory_format=torch.channels_last).eval()
    return TrainedModel(model, checkpoint["recipe"], classes, checkpoint)


def predict_photo(trained, image, tta="flip", tta_scales=(1.0,)):
    """Return probs float32 [C, H, W] of one RGB photo uint8 [H, W, 3] of any size, as numpy.

    trained: of load_model; move trained.model to a GPU to predict there. tta, tta_scales: as in
    infer.py. Raises UserError for arguments of other kinds, and for scales that the model can't do.
    """
    import torch
    from torch.nn.functional import interpolate
    image = as_photo(image)
    if not isinstance(trained, TrainedModel):
        raise UserError(f"a model must be what load_model returns, not {type(trained).__name__}")
    recipe, device = trained.recipe, next(trained.model.parameters()).device
    if tuple(tta_scales) != (1,):
        try_sides(trained.model, recipe["model"], tta_sides(recipe["scale"], tta_scales))
    if recipe.get("crop") == "native":  # the recipes of an older train.py have none
        probs_of = partial(predict_probs, [trained.model], views=tta_views(tta), scales=tta_scales)
        probs, = predict_windows(probs_of, recipe, [(image, image.shape[:2])], 8, device)
        return probs.cpu().numpy()
    resized = resize_image(image, recipe["scale"])
    images = normalise(torch.from_numpy(resized)[None].to(device), recipe["mean"], recipe["std"])
    probs = predict_probs([trained.model], images, tta_views(tta), tta_scales)
    return interpolate(probs, image.shape[:2], mode="bilinear")[0].cpu().numpy()


# ---- the vote, and the steps after it ------------------------------------------------------------

AREAS = (0, *(2 ** np.arange(4, 12)))  # up to 3% of the image: a larger one fits its own images
HALF_TRUSTED = 10  # images; see shrink


def vote(images, weights, n_classes, least_share=0):
    """Return the class ids uint8 [H, W] with the largest weighted sum of probabilities.

    images: {voter's number: probs uint8 [C, H, W]}, without any all is background; weights [M] of
    the voters; least_share: of drop_small.
    """
    import cv2
    total = np.zeros((n_classes, SUBMIT_SIZE * SUBMIT_SIZE), np.float32)
    for weight in {weights[m] for m in images} - {0}:
        same_weight = np.zeros_like(total)  # the sum of whole numbers is exact
        for m, image in images.items():
            if weights[m] == weight:
                cv2.accumulate(image.reshape(total.shape), same_weight)
        total += np.float32(weight) * same_weight
    total = total.reshape(-1, SUBMIT_SIZE, SUBMIT_SIZE)
    return drop_small(total, top_class(total), least_share)


def drop_small(values, pred, least_share):
    """Return `pred`, the class ids uint8 [...] with the largest of values [C, ...], without some.

    A class with less than least_share of the pixels of the image's largest class, the background
    apart, gives them to the likeliest class of those that stay: as a rule that of the object which
    it is a part of, where a minimum area alone would cut a hole.
    """
    areas = np.bincount(pred.ravel(), minlength=len(values))
    areas[0] = areas[1:].max()  # the background stays
    stays = np.flatnonzero(areas >= least_share * areas[0])
    if len(stays) == len(values):
        return pred
    return stays.astype(np.uint8)[top_class(values[stays])]


def top_class(values):
    """Return argmax(0) of [C, H, W] as uint8, of equals the first, in a seventh of numpy's time."""
    best = values[0].copy()
    pred = np.zeros(values.shape[1:], np.uint8)
    for class_id in range(1, len(values)):
        np.maximum(pred, (values[class_id] > best) * np.uint8(class_id), out=pred)
        np.maximum(best, values[class_id], out=best)
    return pred


def fit_score(counts, metric="v3", batch=8):
    """Return `guarded` of pixel counts [N, C, C]; batch: images in a batch of v1."""
    v = {"v2": image_miou(counts.sum(0))}
    if metric != "v2":
        units = batch_counts(counts, batch) if metric == "v1" else counts
        v[metric] = image_miou(units).mean()
    return guarded(v, metric)


def fit_min_area(preds, truths, n_classes, measure=fit_score):
    """Return areas [C]: the best one for all classes, improved class by class, after shrink.

    An area is a number of pixels; the best has the highest measure(pixel counts [N, C, C]).
    """
    def measured(areas):
        return measure(apply_min_area(counts, areas))
    counts = np.stack([confusion(pred, truth, n_classes)
                       for pred, truth in zip(preds, truths, strict=True)])
    foreground = np.arange(n_classes) > 0
    best_common = max((area * foreground for area in AREAS), key=measured)
    return shrink(coordinate_search(best_common, AREAS, measured), counts)


def coordinate_search(values, grid, measure):
    """Try each value of `grid` for one class after another; keep what raises measure(values).

    Returns the values [C]. That of the background stays.
    """
    best = measure(values)
    for class_id in range(1, len(values)):
        for value in grid:
            changed = np.where(np.arange(len(values)) == class_id, value, values)
            measured = measure(changed)
            if measured > best:
                best, values = measured, changed
    return values


def shrink(values, counts):
    """Return values [C] nearer to 0 for classes that few images have, in truth or prediction.

    With HALF_TRUSTED images a value is halved: what was fitted on so few is half chance. counts:
    pixel counts [N, C, C].
    """
    n_images = (counts.sum(1) + counts.sum(2) > 0).sum(0)
    return values * n_images / (n_images + HALF_TRUSTED)


def apply_min_area(counts, min_area):
    """Return the pixel counts [N, C, C] after remove_small, without any mask: they hold its areas.

    So some hundred areas are tried in the time in which masks would be counted once.
    """
    kept = counts * (counts.sum(1) >= min_area)[:, None, :]
    kept[:, :, 0] += (counts - kept).sum(2)
    return kept


def remove_small(pred, min_area):
    """Turn the classes with fewer than min_area[class_id] pixels in the image into background."""
    areas = np.bincount(pred.ravel(), minlength=len(min_area))
    return np.where(areas >= min_area, np.arange(len(min_area)), 0).astype(np.uint8)[pred]


# Steps that change the voted masks, in this order: (name, fit, apply). A new one is one entry here;
# it is used only if it gains out of fold, alone or with others.
#   fit(preds, truths, n_classes, measure) -> params: preds and truths uint8 [N, H, W] of the images
#       that it is fitted on, 255 in truths where nothing is labelled; measure(pixel counts [N, C,
#       C]) is what the params should raise; params: a list or array of numbers
#   apply(pred, params) -> pred: uint8 [H, W], also in what is returned
STEPS_AFTER_VOTE = [
    ("minimum area", fit_min_area, remove_small)]


def apply_steps(pred, used):
    """Return a voted mask [H, W] after the STEPS_AFTER_VOTE that `used` has params of."""
    for name, _, apply in STEPS_AFTER_VOTE:
        if name in used:
            pred = apply(pred, used[name])
    return pred


# ---- stores of probabilities ---------------------------------------------------------------------
# A store is NAME.npy, uint8 [N, C, SUBMIT_SIZE, SUBMIT_SIZE], probs x 255, with NAME.json, written
# last, which says what made it.

# options of train.py that have a knob of make
TRAIN_KNOBS = {"--epochs": "EPOCHS", "--batch": "BATCH", "--lr": "LR", "--seed": "SEED",
               "--weights": "WEIGHTS", "--snapshots": "SNAPSHOTS", "--metric": "METRIC"}
# where a run and its stores lie: EXP, round, model, scale, fold
RUN_PLACE = re.compile(rf"(.*)/r(\d)/([^/]+/[^/]+)/s(\d+)/f(\d+|{ALL})")
# what a store's JSON says of its run's recipe, and what it says besides DESCRIBED; see has_kinds
FROM_RECIPE = {"model": str, "scale": int, "round": int, "fold": (int, str), "folds_csv": str,
               "seed": int, "contaminated": bool, **dict.fromkeys(DATA_OPTIONS, str)}
RUN_KINDS = {"recipe": dict, "code": dict, "codes": [str], "state": str, "commit": str,
             "kept_under": [str]}
STORE_KINDS = {
    "image_ids": [(int, str)], "classes": [str], "split": str, "tta": str,
    "checkpoints": [{"file": str, "hash": str, "epoch": int}], "data": str,
    "unreadable": [(int, str)], "run": RUN_KINDS, "files": {str: str}, **FROM_RECIPE}


def run_folder(exp, round_, model, scale, fold):
    """Return the folder of a run and its stores."""
    return Path(exp) / f"r{round_}" / model / f"s{scale}" / f"f{fold}"


def open_store(path, hashes):
    """Return (memmap of the .npy, content of the JSON) of the store whose JSON is `path`.

    Raises UserError when either is missing, they don't agree, the JSON lacks something, or the
    store stands in the folder of another run. hashes: a Hashes, which remembers that the .npy has
    the checksum in the JSON.
    """
    info, npy = read_json(path), path.with_suffix(".npy")
    try:
        hashes.key(npy)  # raises OSError if it is no file
        probs = np.load(npy, mmap_mode="r")
        kinds = DESCRIPTION_KINDS | STORE_KINDS
        if wrong := [key for key in kinds if not has_kinds(info, {key: kinds[key]})]:
            raise ValueError(f"{', '.join(wrong)} missing or damaged")
        shape = (len(info["image_ids"]), len(info["classes"]), SUBMIT_SIZE, SUBMIT_SIZE)
    except (OSError, EOFError, ValueError) as e:
        raise UserError(f"{path}: not a whole store: {e}; run infer.py again") from None
    if probs.shape != shape or probs.dtype != np.uint8:
        raise UserError(f"{path} is of uint8 {shape}, its .npy of {probs.dtype} {probs.shape}: run "
                        "infer.py again")
    if hashes(npy) != info["files"].get(npy.name):
        hashes.save()  # then make knows of it, which reads no store
        raise UserError(f"{path}: the .npy has another checksum, damaged or of another store: run "
                        "infer.py again")
    check_place(path, info)
    return probs, info


def check_place(path, info):
    """Raise UserError if a store lies in the folder of another run than its JSON says."""
    place = RUN_PLACE.fullmatch(os.path.dirname(os.path.abspath(path)))
    run = tuple(str(info[key]) for key in ("round", "model", "scale", "fold"))
    if place and place.groups()[1:] != run:
        raise UserError(f"{path} is of round {run[0]}, {run[1]}, scale {run[2]}, fold {run[3]}: "
                        "it was moved or copied into the folder of another run")


def store_id(info):
    """Return a hash of the recipe of a store, which names it also when its .npy is gone."""
    return short_hash(info["recipe"])


def check_unchanged(paths, infos):
    """Raise UserError if a store with one of these JSONs was replaced since `infos` were read."""
    for path, info in zip(paths, infos, strict=True):
        if not path.exists() or read_json(path).get("files") != info["files"]:
            raise UserError(f"{path} was replaced while it was read, as by another make in this "
                            "EXP; run it again")


def read_probs(store, i):
    """Return image i of a store's memmap, uint8 [C, SUBMIT_SIZE, SUBMIT_SIZE].

    It is read from the file, because pages of a memmap that were touched count as memory.
    """
    shape = store.shape[1:]
    size = math.prod(shape)
    values = np.fromfile(store.filename, np.uint8, size, offset=store.offset + i * size)
    return values.reshape(shape)


# ---- pseudo labels -------------------------------------------------------------------------------
# EXP/rROUND/pseudo/fFOLD holds the labels that runs of this round and fold learn from: labels.npy,
# index.csv, whose column keep a user may edit, and manifest.json, which is written last.

LABEL_FILES = ("manifest.json", "labels.npy", "index.csv")
# some of what manifest.json says besides DESCRIBED; photos: {class: {outcome: how many}}
MANIFEST_KINDS = {"round": int, "fold": (int, str), "contaminated": bool,
                  "photos": {str: {str: int}},
                  "labels": [{"pixels": int, "expected": object, "real": object}]}
# where these differ, a validation image may have trained a model that made the labels
LINEAGE = ("round", "fold", "folds_csv")


def pseudo_folder(exp, round_, fold):
    """Return the folder of the pseudo labels that runs of this round and fold learn from."""
    return Path(exp) / f"r{round_}" / "pseudo" / f"f{fold}"


def read_index(folder):
    """Return {image id: row} of index.csv, whose rows may have been sorted otherwise.

    Raises UserError when a `keep` is no decision or `classes` are no ids.
    """
    path, rows = folder / "index.csv", {}
    for line, row in read_rows(path, ("image_id", "keep", "reason", "classes")):
        image_id, decisions = row["image_id"], {row["keep"], row.setdefault("by_hand", "")}
        if wrong := sorted(decisions - {"0", "1", ""}):
            raise UserError(f"{path} line {line}: keep is {clean(wrong[0])}; it must be 0 or 1, or "
                            "empty for the rule's")
        if not re.fullmatch("[0-9 ]{0,999}", row["classes"]):
            raise UserError(f"{path} line {line}: classes are {quoted(row['classes'])}, not ids "
                            "with blanks between; run make pseudo again")
        if image_id in rows:
            raise UserError(f"{path} line {line}: image {clean(image_id)} is listed twice")
        rows[image_id] = row
    return rows


def by_rule(row):
    """Return what the rule says to the `keep` of a row of index.csv, whatever stands there now."""
    return str(int(not row["reason"]))


def is_kept(row):
    return (row["keep"] or by_rule(row)) == "1"


def labels_hash(folder, hashes):
    """Return a hash of the masks in `folder` and of which photos are kept, by rule or by hand."""
    kept_ids = [image_id for image_id, row in read_index(folder).items() if is_kept(row)]
    return short_hash(hashes(folder / "labels.npy"), sorted(kept_ids))


def label_settings(manifest):
    """Return a hash of what the labels of all folds of one member must share: settings and data."""
    by_fold = ("fold", "makers", "out_of_fold", "folds_csv")
    recipe = manifest["recipe"]
    return short_hash({key: value for key, value in recipe.items() if key not in by_fold})


def check_labels(args, test, folds_csv, hashes):
    """Return labels_hash and label_settings of a run's labels, and whether they break the lineage.

    args: of train.py. Raises UserError when a file is missing or of other data, and unless
    --allow-leak when the models that made the labels did not hold out the run's fold.
    """
    folder = pseudo_folder(args.exp, args.round, args.fold)
    manifest = read_manifest(folder, test, hashes)
    expected = {"classes": test.classes, "paint": args.paint, "round": args.round,
                "fold": args.fold, "folds_csv": folds_csv, "contaminated": False}
    contaminated = False
    for key, value in expected.items():
        if manifest.get(key) == value:
            continue
        contaminated = True
        text = (f"{folder}/manifest.json: {key} is {manifest.get(key)}, this run has {value}: run "
                "make pseudo again")
        if key not in (*LINEAGE, "contaminated"):
            raise UserError(text)
        if not args.allow_leak:
            raise UserError(f"{text}, since validation images may have trained these labels' "
                            "makers; --allow-leak lets that be and marks every later score as "
                            "contaminated")
    return labels_hash(folder, hashes), label_settings(manifest), contaminated


def read_manifest(folder, test, hashes):
    """Return the manifest of pseudo labels; raise UserError if they aren't whole or of `test`."""
    if missing := [name for name in LABEL_FILES if not (folder / name).is_file()]:
        raise UserError(f"{folder} has no {', no '.join(missing)}: make the pseudo labels of this "
                        "round first")
    manifest = read_description(folder / "manifest.json", hashes)
    again = "run make pseudo again"
    if not manifest:
        raise UserError(f"{folder}/manifest.json doesn't say what made the labels: {again}")
    if manifest["touched"]:
        touched = manifest["touched"][0]
        raise UserError(f"{folder}/manifest.json describes another {touched}: {again}")
    if manifest["recipe"].get("data") != test.fingerprint:
        raise UserError(f"{folder}/manifest.json: the labels are of other test photos: {again}")
    return manifest


def whole_manifest(folder, hashes):
    """Return the manifest of pseudo labels, or None if they aren't whole."""
    if not (folder / "index.csv").exists():
        return None
    manifest = read_description(folder / "manifest.json", hashes)
    is_whole = has_kinds(manifest, MANIFEST_KINDS) and not manifest["touched"]
    return manifest if is_whole else None


def load_labels(args, test):
    """Return the kept pseudo labels of a run: entries of TrainSamples, and the class ids of each.

    args: of train.py.
    """
    folder = pseudo_folder(args.exp, args.round, args.fold)
    rows, labels = read_index(folder), np.load(folder / "labels.npy", mmap_mode="r")
    if rows.keys() != {str(i) for i in test.ids} or len(labels) != len(rows):
        raise UserError(f"{folder}/index.csv lists other images than test.json; run make pseudo "
                        "again")
    entries, class_ids = [], []
    for i, image_id in enumerate(test.ids):
        row = rows[str(image_id)]
        if is_kept(row) and not test.faults[i]:
            entries.append((test, i, labels[i]))
            class_ids.append([int(class_id) for class_id in row["classes"].split()])
            if max(class_ids[-1], default=0) >= len(test.classes):
                raise UserError(f"{folder}/index.csv: image {image_id} has classes that DATA "
                                f"doesn't have, {row['classes']}; run make pseudo again")
    return entries, class_ids


def write_coco(path, test_json, split, masks):
    """Write masks as COCO JSON: pairs (position in `split`, uint8 [SUBMIT_SIZE, SUBMIT_SIZE]).

    Each class in a photo becomes one object, an RLE of the photo's size; images and categories are
    those of `test_json`, without the categories that are no classes.
    """
    import cv2
    from pycocotools import mask as coco_mask
    coco, objects = read_json(test_json), []
    for i, mask in masks:
        height, width = split.sizes[i]
        large = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        for class_id in foreground_ids(large):
            rle = coco_mask.encode(np.asfortranarray(large == class_id))
            objects.append({
                "id": len(objects) + 1, "image_id": split.ids[i],
                "category_id": split.category_ids[class_id - 1],
                "segmentation": rle | {"counts": rle["counts"].decode()}, "iscrowd": 1,
                "area": int(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist()})
    categories = [category for category in coco["categories"]
                  if category["id"] in split.category_ids]
    write_json(path, {"images": coco["images"], "categories": categories, "annotations": objects})


# ---- what made it --------------------------------------------------------------------------------
# An artefact is up to date when two things are the same as those that would make it now: its recipe
# (settings, data, the artefacts that it was made from) and its code. `changes` compares them.
#
# The code of a step is a hash for every function, class and constant that decides its result.
# code_of finds them by name: it begins at the functions in STEPS, looks up the top-level names that
# their syntax trees mention, also those imported from other files of the project, then the names
# that these mention, and so on. Example: with
#
#     SIDE = 8
#     def square(x):
#         return x * x
#     def area():
#         return square(SIDE)
#     def unused():
#         return 0
#
# and STEPS = {"measure": [("common", "area")]}, code_of("measure") is
# {"SIDE": "5f0c...", "area": "91d2...", "square": "c07a..."}. An edit of square's formula changes
# its hash, and the user is told "made by other code (square)". An edit of unused, of a comment or
# of a docstring changes nothing.

# what is made -> (module, function) where the code that decides it begins
STEPS = {
    "masks": [("common", "build_cache"), ("common", "build_extra"), ("common", "build_unlabelled")],
    "run": [("train", "train_run")],
    "store": [("common", "load_data"), ("common", "EvalPhotos"), ("infer", "load_models"),
              ("infer", "predict_split")],
    "labels": [("pseudo_label", "make_labels"), ("pseudo_label", "open_out_of_fold"),
               ("pseudo_label", "open_makers")],
    "photos": [("common", "load_model"), ("infer", "FolderPhotos"), ("infer", "predict_batch"),
               ("infer", "Voter"), ("infer", "write_photo")],
    "submission": [("ensemble", "soft")],
    "voted": [("ensemble", "hard")]}

# These names show, keep and guard results and decide none. The search for code stops at the names
# in a file's BESIDE, so an edit of them, or of what only they use, makes nothing stale.
BESIDE = {
    "DATA_OPTIONS", "DESCRIBED", "GPU_MEMORY_WORDS", "Hashes", "Help", "LABEL_FILES", "LINEAGE",
    "Parser", "RUN_PLACE", "STORE_KINDS", "UserError", "accepted_code", "atomic_write",
    "batch_bytes", "begin_worker", "cache_folder", "category_fault", "changes", "check_device",
    "check_files", "check_labels", "check_normalisation", "check_output", "check_place",
    "check_shared_memory", "check_space", "check_unchanged", "check_unseen", "checkpoint_gradients",
    "claim_device", "clean", "code_changes", "code_hashes", "code_of", "code_question",
    "code_state", "conflicting_duplicates", "data_files", "data_options", "decide",
    "different_keys", "file_hash", "fingerprint", "first_names", "folds_hash", "git_commit",
    "gpu_of_rank", "has_kinds", "idle_gpu", "keep_code", "kill_children", "label_settings",
    "labels_code", "labels_hash", "labels_recipe", "library_versions", "load_folds", "load_truths",
    "loader_options", "loader_workers", "lock", "matches_checksum", "move_aside", "move_mark",
    "name_alternatives", "name_fault", "named", "number", "overlay", "project_files", "provenance",
    "quoted", "raise_faults", "read_description", "read_folds", "read_index_json", "read_json",
    "read_own_json", "read_rows", "recipe_changes", "run_code", "run_folder", "run_recipe",
    "run_script", "settings_of", "short_hash", "signals_later", "spelling", "store_code",
    "store_id", "store_recipe", "truth_file", "tune_process", "version_changes", "weights_file",
    "whole_manifest", "write_checksums", "write_csv", "write_description", "write_json",
    "write_page", "write_sheet"}
DERIVED = ("mean", "std")  # keys of a recipe that follow from its other keys
VERSIONS = ("torch", "timm", "segmentation-models-pytorch", "albumentations")  # only shown

# what provenance returns, in its order; see has_kinds
DESCRIBED = {"recipe": dict, "code": dict, "state": str, "commit": str, "versions": dict,
             "kept_under": [{"code": dict, "state": str}]}
# what the JSON that write_description writes holds, and what model.pt holds
DESCRIPTION_KINDS = DESCRIBED | {"files": {str: str}}
MODEL_KINDS = DESCRIBED | {"recipe": {"model": str, "scale": int}, "model": dict, "classes": [str],
                           "valid_ids": [int], "epoch": int, "v3": float}


@cache
def project_files():
    """Return {name: content} of the Python files beside this one, as they were at the first call.

    run_script calls it at once, so an edit made while a script runs is not taken for the code that
    made its results.
    """
    return {path.name: path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))}


def check_files():
    """Raise UserError if a Python file of the project was edited since this process has read it.

    That happens in a notebook, which lives on while its user edits.
    """
    for name, content in project_files().items():
        path = Path(__file__).parent / name
        if not path.exists() or path.read_bytes() != content:
            raise UserError(f"{name} was edited since this process has read it: "
                            "start the process anew")


# ---- what made it: the code that a step can reach ------------------------------------------------


@cache
def code_of(step, **entries):
    """Return {name: hash} of the code of a step of STEPS; the section's comment says how it works.

    entries: {table: key} for tables such as LOSSES={"ce": ..., "iou": ...}, written as one dict.
    code_of("run", LOSSES="ce") follows this one entry, under the name "LOSSES[ce]", and nothing of
    the table if it lacks the key: so a new loss leaves the runs with other losses up to date.
    """
    to_visit, visited, digests = list(STEPS[step]), set(), defaultdict(list)
    while to_visit:
        module, name = place = to_visit.pop()
        if name is None:  # the module is imported whole: all its names can be reached
            to_visit += [(module, each) for each in definitions(module)]
        if place in visited or name not in definitions(module) or name in names_beside(module):
            continue
        visited.add(place)
        label, key = name or f"{module}.py", None
        if name in entries and table_keys(module, name) is not None:
            key = entries[name]
            if key not in table_keys(module, name):
                continue
            label = f"{name}[{key}]"
        digest, used = read_definition(module, name, key)
        digests[label].append(digest)
        # what the file does on import and takes by `from x import *` may decide too
        to_visit += [*used, (module, ""), (module, "*")]
    return {label: short_hash(*sorted(digests[label])) for label in sorted(digests)}


@cache
def definitions(module):
    """Return {name: [syntax trees]} of the top-level statements that define or change each name.

    Docstrings are left out, and what a script does under `if __name__ == "__main__"`. Statements
    that define no name, such as a call, stand under "": importing the file runs them.
    """
    statements = defaultdict(list)
    for statement in ast.parse(project_files()[f"{module}.py"]).body:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_guard = isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test)
        if is_docstring or is_guard:
            continue
        remove_docstrings(statement)
        for name in defined_names(statement):
            statements[name].append(statement)
    return statements


def defined_names(statement):
    """Return the names that a top-level statement defines or changes, [""] if there are none.

    An import defines the names that it brings in, "*" in `from x import *`.
    """
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [imported_name(alias) for alias in statement.names]
    names = []
    for target in getattr(statement, "targets", [getattr(statement, "target", statement)]):
        changes_part = isinstance(target, (ast.Subscript, ast.Attribute))  # as in TABLE["c"] = 1
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and (changes_part or isinstance(node.ctx, ast.Store)):
                names.append(node.id)
    return names or [""]


def remove_docstrings(node):
    """Remove the docstrings of a function or class, and of those defined in it, from its tree."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        for part in node.body:
            remove_docstrings(part)


@cache
def read_definition(module, name, key):
    """Return (hash of what defines a name, [(module, name) that it uses of the project]).

    With `key`, unless it is None, only that entry of a table counts. An import of another library
    that the definition uses is part of its hash: `from math import floor as down` and `from math
    import ceil as down` make different code.
    """
    texts, names_read, used = [], set(), {}
    for node in definitions(module)[name]:
        if key is not None:
            node = table_entry(node, key)
        text = ast.dump(node)
        texts.append(text)
        names_read |= names_in(text)
        if "Import" in text:
            used |= imports_inside(node)
    for other in sorted(names_read & definitions(module).keys()):
        for node in definitions(module)[other]:
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                used.setdefault(other, (module, other))
            elif other in imports_of(node):
                used[other] = imports_of(node)[other]
            else:
                alias = next(alias for alias in node.names if imported_name(alias) == other)
                texts.append(f"{getattr(node, 'module', '')} {ast.dump(alias)}")
    return short_hash(*texts), list(used.values())


def names_in(text):
    """Return the names that a dumped syntax tree reads.

    A search of the text takes 5 ms for all files of the project, ast.walk 50 ms: make waits for it.
    """
    return set(re.findall(r"Name\(id='(\w+)', ctx=Load\(\)\)", text))


def imports_inside(node):
    """Return imports_of for all imports anywhere in a syntax tree, as in a function's body."""
    places = {}
    for part in ast.walk(node):
        if isinstance(part, (ast.Import, ast.ImportFrom)):
            places |= imports_of(part)
    return places


def imports_of(node):
    """Return {name: (module, name there)} of what an import takes from the project's own files.

    "name there" is None where the whole module is imported, as in `import x` and `from x import *`.
    """
    places = {}
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            place = (node.module, None if alias.name == "*" else alias.name)
        else:
            place = (alias.name, None)
        if f"{place[0]}.py" in project_files():
            places[alias.asname or alias.name] = place
    return places


def imported_name(alias):
    """Return the name under which a part of an import statement is known: "os" for `os.path`."""
    return alias.asname or alias.name.partition(".")[0]


@cache
def names_beside(module):
    """Return the set BESIDE of a file of the project, where the search for code stops."""
    statements = definitions(module).get("BESIDE")
    return ast.literal_eval(statements[0].value) if statements else set()


def table_keys(module, name):
    """Return the keys of a table; None if it isn't a single dict written out: it counts whole."""
    first, *others = definitions(module)[name]
    table = getattr(first, "value", None)
    if others or not isinstance(table, ast.Dict):
        return None
    if not all(isinstance(key, ast.Constant) for key in table.keys):
        return None
    return [key.value for key in table.keys]


def table_entry(statement, key):
    """Return the syntax tree of an entry of the table that a statement assigns; see table_keys."""
    pairs = zip(statement.value.keys, statement.value.values, strict=True)
    return {node.value: entry for node, entry in pairs}[key]


# ---- what made it: the project's state, kept beside the results ----------------------------------


def code_state():
    """Return a hash of the project's Python files with all their content."""
    return short_hash(*(f"{name} {content!r}" for name, content in project_files().items()))


def keep_code(exp):
    """Copy the project's Python files to EXP/code/STATE/, once for each state of them."""
    folder = Path(exp) / "code" / code_state()
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="."))
    for name, content in project_files().items():
        (scratch / name).write_bytes(content)
    scratch.chmod(0o755)
    try:
        scratch.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(scratch)


@cache
def git_commit():
    """Return the commit of the project's folder, "" without git.

    A "+" behind it says that the Python files differ from that commit.
    """
    def git(*arguments):
        folder = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip()
    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("--no-optional-locks", "status", "--porcelain", "--", ":(glob)*.py")
    except OSError:  # git isn't installed
        return ""
    return f"{commit}+" if commit and changed else commit


def library_versions():
    """Return {package: version} of the packages in VERSIONS, "" for one that isn't installed."""
    from importlib.metadata import PackageNotFoundError, version
    versions = dict.fromkeys(VERSIONS, "")
    for package in VERSIONS:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


# ---- what made it: recipes and code of each kind of artefact -------------------------------------


def settings_of(args):
    """Return {name: value} of a script's arguments that decide its result."""
    return {name: getattr(args, name) for name in args.decides}


def run_recipe(args, data, folds, hashes, pseudo=None, labels=None, contaminated=False, *,
               extra=(), best_epochs=()):
    """Return everything but code that decides the result of a run, as plain values.

    A run made with other values is another run. data: fingerprint of the training photos; folds:
    folds_hash; hashes: a Hashes; pseudo, labels, contaminated: what check_labels says of the pseudo
    labels that the run learns from, if it learns from any; extra: fingerprints of further training
    photos; best_epochs: of the runs of the folds, for a run on all images, which stops at their
    median unless it keeps snapshots.
    """
    recipe = settings_of(args) | {"data": data, "folds_csv": folds}
    if path := weights_file(args.weights, args.model):
        recipe["weights"] = hashes(path)  # the content of the file counts, not its name
    if extra:
        recipe["extra"] = list(extra)
    if best_epochs:
        median = statistics.median_high(best_epochs)
        recipe["stop_epoch"] = args.epochs if args.snapshots else median
    if args.round and not args.overfit:
        return recipe | {"pseudo": pseudo, "labels": labels, "contaminated": contaminated}
    for name in ("pseudo_ratio", "labelled_only"):  # they decide nothing without pseudo labels
        recipe.pop(name, None)
    return recipe | {"contaminated": False}


def run_code(recipe):
    """Return code_of a run, with only those entries of the tables that its recipe uses."""
    return code_of("run", DECODERS=recipe["model"].partition("/")[0], LOSSES=recipe["loss"],
                   AUGMENTATIONS=recipe["augment"], SCHEDULES=recipe["schedule"],
                   OPTIMIZERS=recipe["optimizer"], BATCH_HOOKS=recipe["batch_hook"])


def store_recipe(args, split, checkpoints, data):
    """Return everything but code that decides a store, as plain values.

    args: of infer.py; checkpoints: the hashes of their files; data: fingerprint of the split.
    """
    return settings_of(args) | {"split": split, "checkpoints": checkpoints, "data": data}


def store_code(model, tta):
    """Return code_of a store, with only those entries of the tables that it uses.

    tta: of tta_name, which begins with a key of TTA or a list of views.
    """
    return code_of("store", DECODERS=model.partition("/")[0], TTA=tta.partition(" ")[0])


def labels_recipe(args, data, folds, paint, makers, out_of_fold):
    """Return everything but code that decides pseudo labels, as plain values.

    data: fingerprint of the test photos; folds: folds_hash; makers, out_of_fold: the store_id of
    each store.
    """
    parents = {"paint": paint, "data": data, "folds_csv": folds, "makers": sorted(makers),
               "out_of_fold": sorted(out_of_fold)}
    return settings_of(args) | parents


def labels_code(makers, rule):
    """Return code_of pseudo labels and of the stores that they are made from, which may be gone.

    makers: the (model, tta) of each store; rule: the entry of RULES that is used.
    """
    code = {}
    for model, tta in makers:
        code |= store_code(model, tta)
    return dict(sorted((code | code_of("labels", RULES=rule)).items()))


# ---- what made it: the description of an artefact ------------------------------------------------


def provenance(recipe, code):
    """Return what every artefact says of what made it, as plain values under the keys DESCRIBED.

    recipe: settings, data and parents; code: of code_of; state: names the copy of all code, which
    whoever makes the artefact keeps by keep_code; kept_under: code, state, commit and versions that
    would have made it otherwise when the user said to keep it, the last one at the end.
    """
    return {"recipe": recipe, "code": code, "state": code_state(), "commit": git_commit(),
            "versions": library_versions(), "kept_under": []}


def has_kinds(value, kinds):
    """Return whether a value of a parsed JSON is of these kinds, at every depth.

    kinds: a type or several; [kinds of each item]; {key: kinds of its value}, which may have other
    keys too; {str: kinds of every value}.
    """
    if isinstance(kinds, (type, tuple)):
        return isinstance(value, kinds)
    if isinstance(kinds, list):
        return isinstance(value, list) and all(has_kinds(item, kinds[0]) for item in value)
    if not isinstance(value, dict):
        return False
    if str in kinds:
        return all(has_kinds(item, kinds[str]) for item in value.values())
    return all(key in value and has_kinds(value[key], kinds[key]) for key in kinds)


def read_own_json(path, kinds):
    """Return the JSON in `path`, or None if it is missing, damaged or not of `kinds` (has_kinds).

    It is for files that the project has written and makes anew if they aren't right.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if has_kinds(value, kinds) else None


def read_description(path, hashes):
    """Return the JSON that describes an artefact, with "files" and "touched" as they are now.

    "files" gets the hashes of the files that are there, "touched" the names of those that are not
    the ones described, as after an edit by hand. Returns None if the JSON or a file that it names
    is missing, or if an older version of the project wrote it.
    """
    description = read_own_json(path, DESCRIPTION_KINDS)
    if description is None:
        return None
    files = {name: hashes(path.parent / name) for name in description["files"]}
    if not all(files.values()):
        return None
    touched = different_keys(files, description["files"])
    return description | {"files": files, "touched": touched}


def write_description(path, description, **more):
    """Write the JSON that describes an artefact: the keys DESCRIBED of `description`, and `more`.

    `more` has the hashes of the artefact's files as "files". The mark of move_aside is removed.
    """
    write_json(path, {key: description[key] for key in DESCRIBED} | more)
    move_mark(path).unlink(missing_ok=True)


# ---- what made it: is it up to date? -------------------------------------------------------------


def changes(description, recipe, code):
    """Return (recipe changes, code changes) from what made an artefact to what would make it now.

    The artefact is up to date if both lists are empty. The first has lines such as "lr 0.001 ->
    0.002", the second names such as "square". If the recipe has changed the second is empty: the
    artefact is then made anew whatever its code is, so the code is no question to the user.
    """
    recipe_lines = recipe_changes(description, recipe)
    return recipe_lines, [] if recipe_lines else code_changes(description, code)


def recipe_changes(description, recipe):
    """Return a line such as "lr 0.001 -> 0.002" for each value that differs from `recipe`."""
    old, lines = description["recipe"], []
    for key in different_keys(old, recipe):
        if key not in DERIVED:
            before, after = (shorten(str(values.get(key)), 60) for values in (old, recipe))
            lines.append(f"{key} {before} -> {after}")
    return lines


def code_changes(description, code):
    """Return the names whose code in `code`, of code_of, is not what an artefact counts as.

    Files of the artefact that were touched by hand are among them.
    """
    touched = [f"{name} touched by hand" for name in description.get("touched", ())]
    if description["code"] == code:  # also when later edits were taken back
        return touched
    return touched + sorted(different_keys(accepted_code(description), code))


def version_changes(description, versions):
    """Return a line such as "torch 2.11.0 -> 2.14.1" for each library that has another version.

    Versions are shown only: other versions make nothing stale.
    """
    old = description["versions"]
    return [f"{name} {old.get(name)} -> {version}" for name, version in versions.items()
            if old.get(name) != version]


def accepted_code(description):
    """Return the code that an artefact counts as, {name: hash}.

    That is the code which made it or, if the user has kept it since, the code at that time.
    """
    states = [description, *description["kept_under"]]
    return states[-1]["code"]


def code_hashes(description):
    """Return the sorted hashes of the code that made an artefact and of all it was kept under."""
    states = [description, *description["kept_under"]]
    return sorted({short_hash(state["code"]) for state in states})


def different_keys(old, new):
    """Return the keys that only one of two dicts has, or that have different values in them."""
    missing = object()
    return [key for key in old | new if old.get(key, missing) != new.get(key, missing)]


def code_question(what, names, new="--code new", keep="--code keep", exp="--exp"):
    """Return the line that asks the user what to do with artefacts that other code has made."""
    listed = ", ".join(names[:6])
    if len(names) > 6:
        listed += f" and {len(names) - 6} more"
    return (f"{what} made by other code ({listed}): {new} makes anew, {keep} keeps what is there, "
            f"another {exp} keeps both")


def decide(path, description, wanted, code=None, replace=True):
    """Return what is to be done with the artefact `path`: "done", "kept" or "make".

    description: of what is there, as read_description returns it; wanted: provenance of what would
    be made now. code: the user's answer where only the code differs or a file was touched by hand:
    "new", "keep" or None. After "kept" the caller writes the description again, which has got the
    code that it is kept under. Raises UserError if the user has to answer, or if the recipe differs
    and `replace` is False.
    """
    recipe_lines, names = changes(description, wanted["recipe"], wanted["code"])
    if recipe_lines and not replace:
        raise UserError(f"{path} was made with another recipe: {', '.join(recipe_lines)}; pass "
                        "--replace to replace it")
    if recipe_lines:
        print(f"{path} is replaced: {', '.join(recipe_lines)}", flush=True)
        return "make"
    if names and code is None:
        raise UserError(code_question(f"{path} was", names))
    if names and code == "new":
        print(f"{path} is replaced: other code, {', '.join(names)}", flush=True)
        return "make"
    if other := version_changes(description, wanted["versions"]):
        print(f"note: {path} was made with other versions: {', '.join(other)}", flush=True)
    if not names:
        return "done"
    kept = {key: wanted[key] for key in ("code", "state", "commit", "versions")}
    description["kept_under"].append(kept)
    print(f"{path} is kept, though other code made it: {', '.join(names)}", flush=True)
    return "kept"


# ---- files ---------------------------------------------------------------------------------------

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, quota, largest size of a file


@contextmanager
def atomic_write(path):
    """Yield a new scratch file beside `path`; when the block succeeds, flush and rename it.

    Its name is random, so two writers never share it. It is locked until it is renamed: a scratch
    file without a lock is that of a killed writer, and the next writer of `path` removes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    scratch = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(scratch, "xb") as f:  # x: it is new, and no link to another file
            fcntl.flock(f, fcntl.LOCK_EX)
            yield scratch
            os.fsync(f.fileno())
            os.replace(scratch, path)
    except OSError as e:
        # the error of a full disk names no file; others that name none may be of other files
        if e.filename == str(scratch) or e.filename is None and e.errno in DISK_FULL:
            e.filename = str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)


def remove_leftovers(path):
    """Remove the scratch files that killed writers of `path` have left."""
    for scratch in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        # BlockingIOError: its writer lives
        with suppress(OSError), open(scratch, "rb+", opener=open_no_link) as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            scratch.unlink()


def write_json(path, value):
    """Write plain values as JSON, atomically; NaN and infinity raise ValueError."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as scratch:
        scratch.write_text(f"{text}\n", encoding="utf-8")


def read_json(path):
    """Return the parsed file.

    Raises UserError if the file is missing, no JSON or too large for the memory.
    """
    try:
        check_size(path, "JSON")
        return json.loads(Path(path).read_bytes())
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError, MemoryError) as e:
        raise UserError(f"{path}: not JSON: {str(e) or 'out of memory'}") from None


def check_size(path, kind):
    """Raise UserError if a file of JSON or CSV would not fit in the memory when it is parsed.

    Raises OSError if it is no file, but a pipe, say, which would be waited for.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "is no file", str(path))
    size = status.st_size
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size * 40 > memory:  # the parsed values take up to 35 times as much as the text
        raise UserError(f"{path}: {size} bytes of {kind} are too many for {memory} bytes of memory")


def write_csv(path, rows):
    """Write a non-empty list of dicts with the same keys as a CSV, atomically."""
    with atomic_write(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path, columns):
    """Return [(number of the line, dict of strings)] for the rows of a CSV.

    What a spreadsheet does is harmless: semicolons or tabs for commas, a byte order mark, blanks
    around cells, cells that are missing, rows without any text. Raises UserError if the file is
    missing, no CSV or without one of `columns`.
    """
    rows = []
    try:
        check_size(path, "CSV")
        with open(path, newline="", encoding="utf-8-sig") as f:
            header = f.readline()
            f.seek(0)
            reader = csv.DictReader(f, restval="", delimiter=max(",;\t", key=header.count))
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for row in reader:
                cells = {name: row[name].strip() for name in names}
                if any(cells.values()):
                    rows.append((reader.line_num, cells))
    except (OSError, UnicodeDecodeError, csv.Error, MemoryError) as e:
        raise UserError(f"{path}: {str(e) or 'out of memory'}") from None
    missing = [column for column in columns if column not in names]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)} in its first line")
    return rows


def as_number(text, where):
    """Return a cell of a CSV as a finite float; raise UserError, which says `where`, for others."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where} is {quoted(text)}, no number: mend or remove the file")
    return value


def write_npy_header(f, shape):
    """Write the header of a .npy of uint8 to an open file.

    The array's bytes follow in order, so a full disk is an error and not, as with a memmap, a
    signal that kills the process.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(f, header)


def save_checkpoint(path, previous=None, **state):
    """Write tensors and plain values to `path`.

    The file that was there is renamed to `previous`, if that is given.
    """
    import torch
    with atomic_write(path) as scratch:
        try:
            with open(scratch, "wb") as f:  # torch would write the name of a path into the file
                torch.save(state, f)
        except RuntimeError as e:  # torch's own for a write that failed
            if "CUDA" in str(e):  # an error of the GPU, which is asked for the tensors
                raise
            reason = str(e).splitlines()[0]
            text = f"can't be written, is the disk full? ({reason})"
            raise OSError(None, text, str(path)) from None
        if previous and path.exists():
            os.replace(path, previous)


def load_checkpoint(path):
    """Return the dict that save_checkpoint wrote, with its tensors on the CPU.

    No code in the file is run. Raises UserError if the file is missing, damaged or no checkpoint.
    """
    import torch
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"the checksum of {part} in it is wrong")  # torch checks none
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many types on a damaged or foreign file
        reason = (str(e) or type(e).__name__).splitlines()[0]
        text = f"{path}: not a checkpoint that can be loaded safely: {reason}"
        raise UserError(text) from None


def short_hash(*values):
    """Return the first 16 hex digits of the SHA-256 of plain values, written as JSON."""
    text = json.dumps(values, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path):
    """Return the first 16 hex digits of the file's SHA-256."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def checksum(text):
    """Return a CRC-32 of a text as 8 hex digits, which tells damage of its line in a file."""
    return f"{zlib.crc32(text.encode()):08x}"


class Hashes:
    """Content hashes of files, remembered in CACHE/hashes.txt.

    A hash counts as long as the file's device, inode, size and both times are the same. The time of
    the last change alone is no proof: a copied file can bring any, but not any ctime and inode.
    """

    def __init__(self, cache):
        self.path, self.known, self.new = Path(cache) / "hashes.txt", {}, []
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            check, _, entry = line.partition(" ")
            if check == checksum(entry):  # a kill may have cut a line short
                digest, _, key = entry.partition(" ")
                self.known[key] = digest  # of several lines for a file the last one counts

    @staticmethod
    def key(path):
        """Return what must stay the same of a file, as text; raises OSError if it is no file."""
        s = os.stat(path)
        if not stat.S_ISREG(s.st_mode):
            raise OSError(f"{path} is no file")  # a pipe would be waited for
        return f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {str(path)!a}"

    def remember(self, key, digest):
        """Take a hash for a key; `save` writes it."""
        entry = f"{digest} {key}"
        self.known[key] = digest
        self.new.append(f"{checksum(entry)} {entry}\n")

    def __call__(self, path):
        """Return the file's hash as file_hash does, "" if it is not there or can't be read."""
        try:
            key = self.key(path)
            if key not in self.known:
                self.remember(key, file_hash(path))
            return self.known[key]
        except (OSError, ValueError):  # ValueError: a name with a zero byte
            return ""

    def remembered(self, path):
        """Return the file's hash if the file need not be read for it, else None."""
        with suppress(OSError, ValueError):
            return self.known.get(self.key(path))

    def of_all(self, paths):
        """Return the hashes of many files; several threads read those that aren't remembered."""
        hashes = [self.remembered(path) for path in paths]
        unknown = [i for i, digest in enumerate(hashes) if digest is None]
        if unknown:
            with ThreadPoolExecutor(8) as pool:
                digests = pool.map(self, [paths[i] for i in unknown])
                for i, digest in zip(unknown, digests, strict=True):
                    hashes[i] = digest
        return hashes

    def save(self):
        """Append the new hashes to the file; several processes may do so at once.

        A cache that can't be written is no error.
        """
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.new:
                with open(self.path, "a", encoding="utf-8") as f:
                    f.write("\n" + "".join(self.new))  # the line before may have been cut short
            self.new = []


@contextmanager
def lock(folder, wait=False, name=".lock"):
    """Hold a lock on `folder` or, with name=".FILE.lock", on that file in it.

    When the process dies the kernel releases the lock. If another process holds it, this one waits
    if `wait` is True and says for whom, else UserError names the holder.
    """
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", opener=open_no_link) as f:
        try:
            take_lock(f, path, wait)
        except OSError as e:
            raise UserError(f"{path}: can't be locked: {e.strerror or e}; is the disk full, or of "
                            "a kind without locks? Choose another place") from None
        # else the loader processes of a killed run would keep the lock for seconds
        os.register_at_fork(after_in_child=f.close)
        yield


def take_lock(f, path, wait):
    """Lock the open file of `path` and write this process into it; see `lock`."""
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        holder = f.read().strip() or "another process"
        held = path.parent / path.name.removesuffix(".lock").lstrip(".")
        if not wait:
            raise UserError(f"{held} is in use by {holder}: wait for it or stop it") from None
        print(f"waiting for {holder}, which works on {held}", flush=True)
        fcntl.flock(f, fcntl.LOCK_EX)
    f.truncate(0)
    f.write(f"{this_process()}\n")
    f.flush()


def this_process():
    """Return the words for this process that stand in the locks that it holds."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def open_no_link(path, flags):
    """Open a file as `open` does, but no link: another user may have put it there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def own_folder(name):
    """Make and return the folder NAME-UID among the temporary files, of this user alone.

    Other users can guess its name. UserError is raised if one of them could write there.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_own or status.st_mode & 0o077:
        raise UserError(f"{folder}: must be a folder of yours that nobody else may enter: remove "
                        "it, or set TMPDIR to a folder of yours")
    return folder


def check_output(data, *outputs, inputs=(), name="DATA"):
    """Raise UserError if an output is also an input or another output, or lies in `data`.

    Nothing is ever written to that folder, which the user knows as `name`.
    """
    root = os.path.realpath(data)
    taken = {os.path.realpath(path): f"{path}, which is read" for path in inputs}
    for path in outputs:
        real = os.path.realpath(path)
        if real in taken:
            raise UserError(f"{path} would be written over {taken[real]}: choose another name")
        taken[real] = f"{path}, which is written too"
        if Path(real).is_relative_to(root):
            raise UserError(f"{path} lies in {name}, {data}, where nothing is ever written: "
                            "choose another place")


def check_space(folder, needed):
    """Raise UserError if fewer than `needed` bytes are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {needed:,} bytes are needed there, {free:,} are free")


def move_aside(folder, names):
    """Move the files or folders `names` of `folder` to folder/replaced before they are replaced.

    The first name is that of the JSON that describes the others. What was in replaced/ before is
    removed, but not if a process was killed between this call and write_description: then a mark is
    there, and the files that were moved already stay. A line says what is moved.
    """
    aside, mark = folder / "replaced", move_mark(folder / names[0])
    if not mark.exists():
        if not any((folder / name).exists() for name in names):
            return
        aside.mkdir(exist_ok=True)
        for name in names:
            if (aside / name).is_dir():
                shutil.rmtree(aside / name)
            (aside / name).unlink(missing_ok=True)
        mark.touch()
    moved = []
    for name in names:
        if (folder / name).exists() and not (aside / name).exists():
            os.replace(folder / name, aside / name)
            moved.append(name)
    if moved:
        print(f"{aside}: {', '.join(moved)} of before", flush=True)


def begun_files(folder):
    """Return the names of a run's snapshots and of what an interrupted run has left, sorted."""
    return sorted(path.name for glob in ("epoch-*.pt", "last*") for path in folder.glob(glob))


def move_mark(path):
    """Return the file that stands from move_aside until the JSON `path` is written anew."""
    return path.parent / "replaced" / f".{path.name}.moving"


# ---- processes and devices -----------------------------------------------------------------------

# words in the type and text of an exception when a GPU's memory is used up; cuDNN finds no "engine"
# when none gets the memory that it needs
GPU_MEMORY_WORDS = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED",
                    "unable to find an engine")
# what ends a process from outside: (what fails, the words for it, what to do)
FAILURES = (
    ("a loader process failed",
     ("DataLoader worker (", "DataLoader timed out", "Pin memory thread exited",
      "shared memory(shm)", "shared memory object", "Too many open files. Comm",
      # torch notices a dead loader process, or by chance first that its end of a pipe is gone
      "ConnectionResetError", "ConnectionRefusedError"),
     "too little memory, /dev/shm full or a slow disk? Lower --workers"),
    ("out of GPU memory", GPU_MEMORY_WORDS, "lower --batch (make: BATCH, INFER_ARGS) or --scale"),
    ("out of memory or of address space",
     ("MemoryError", "failed to map segment", "Cannot allocate memory", "can't allocate memory",
      "can't start new thread"), "raise the limit (ulimit -v) or free some"),
    ("nobody reads what is printed", ("BrokenPipeError",), "run it without head or the like"),
    ("too many open files", ("Too many open files",),
     "raise the limit (ulimit -n) or lower --workers"),
    ("no place for temporary files", ("No usable temporary directory", "AF_UNIX path too long"),
     "set TMPDIR to a folder with a short name that can be written"))


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows the docstring as it stands and every default."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and whose errors are one line."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, "formatter_class": Help} | options)

    def parse_args(self, args=None, namespace=None):
        """Parse as argparse does, but refuse bytes that aren't UTF-8: no JSON could hold them."""
        args = sys.argv[1:] if args is None else args
        for text in args:
            if re.search("[\ud800-\udfff]", text):  # Python's stand-ins for such bytes
                self.error(f"{clean(text)}: is not UTF-8: rename the file or folder, or give a "
                           "symbolic link to it")
        return super().parse_args(args, namespace)

    def error(self, message):
        """End the process with exit code 2 and one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf, step=None):
    """Return an argparse type: a `kind`, int or float, from `low` to `high`, in steps of `step`.

    NaN, infinity and what is nearly 0, which computes as 0 somewhere, are refused.
    """
    steps = f" in steps of {step}" if step else ""

    def parse(text):
        value = kind(text)
        in_range = low <= value <= min(high, sys.float_info.max)  # False for NaN
        if not in_range or 0 < abs(value) < 1e-12 or step and value % step:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}{steps}")
        return value
    parse.__name__ = kind.__name__
    return parse


def fold_name(text):
    """Return a fold, a number from 0 or ALL; an argparse type."""
    return text if text == ALL else number(int, 0)(text)


def checked(check):
    """Return an argparse type that keeps the text; check(text) raises UserError for a wrong one."""
    def parse(text):
        try:
            check(text)
        except UserError as e:
            raise argparse.ArgumentTypeError(str(e)) from None
        return text
    return parse


def run_script(main, args):
    """Run main(args) and turn what stops it into a line on stderr and an exit code.

    A UserError, a file that can't be used, a lost loader process and the signals ENDING end in a
    line; anything else is a bug and keeps its traceback. Each signal ends main as Ctrl-C does, by a
    KeyboardInterrupt. The process is tuned first, so torch must not be imported yet.
    """
    tune_process()
    reopen_closed_streams()
    project_files()  # read now: what is edited later has no part in the results
    rank, n_ranks = ranks()
    if n_ranks > 1:
        # a rank has a session of its own: a signal that kills torchrun's group doesn't reach it
        end_with_parent()
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open for as long as the process lives
    received = catch_signals()
    try:
        main(args)
    except (KeyboardInterrupt, Exception) as error:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler tells of each that dies
        kill_children()
        line, code = stop_reason(error, received)
        if line is None:
            raise
        is_interrupted = code in [128 + number for number in ENDING]
        if rank == 0 or not is_interrupted:  # all ranks are interrupted: one line is enough
            with suppress(OSError):  # its reader may be gone
                print(line, file=sys.stderr)
        raise SystemExit(code) from None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    kill_children()  # by the SIGTERM that Python sends at exit none would end; see signals_later


def reopen_closed_streams():
    """Open /dev/null as stdin, stdout or stderr if that was closed, as by 2>&-.

    Else the next files would get their numbers, and what libraries say would be written into them.
    A letter that stdout can't show is escaped, as it is on stderr anyway.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


# Ctrl-C, kill and a closed terminal
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch_signals():
    """Let each signal of ENDING raise a KeyboardInterrupt; return a list of those that come.

    One that is ignored, as by nohup, stays so. After the first SIGTERM or SIGHUP more are ignored,
    as they would stop the cleaning up: programs send them to a group and to its processes.
    """
    received = []

    def interrupt(number, _):
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)
        received.append(number)
        raise KeyboardInterrupt
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    return received


@contextmanager
def signals_later():
    """Let the signals of ENDING wait for the end of the block, in which processes are forked.

    Python drops a KeyboardInterrupt in the middle of a fork. The new processes never get these
    signals: they end with this one. The mask is this thread's and theirs; what another thread gets,
    such as one of a library, Python handles here all the same, so it is noted and raised again.
    """
    came = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        for number in ENDING:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in came:
            signal.raise_signal(number)


def kill_children(but=()):
    """Kill the worker processes `but` some: waiting for one that is stuck would last for ever."""
    for child in active_children():
        if child not in but:
            child.kill()


def stop_reason(error, received=()):
    """Return (line, exit code) for an exception that ended a script; (None, 1) for a bug.

    received: the signals of ENDING that came before. After SIGTERM or SIGHUP a loader or another
    rank may have ended first, and `error` is only what follows from it.
    """
    text = own_text(error)
    if isinstance(error, UserError):
        return text, error.code
    if received or isinstance(error, KeyboardInterrupt):
        line = f"{first_line(text) or 'interrupted'}; the same command carries on"
        return line, 128 + (received or [signal.SIGINT])[0]
    name = type(error).__name__
    for what, words, cure in FAILURES:
        if any(word in f"{name}: {text}" for word in words):
            return f"{what}: {first_line(text) or name}; {cure}; the same command carries on", 1
    if not isinstance(error, OSError):
        return None, 1
    if error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}", 1
    return text, 1


def own_text(error):
    """Return the text of an exception; of one that a loader process raised without its traceback.

    torch hands such an exception on with the traceback as its text, whose last line is
    "OSError: photo.jpg is missing".
    """
    text = str(error).strip()
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.splitlines()[-1].partition(": ")[2]
    return text


def first_line(text):
    """Return the first line of a text, "" if it is empty."""
    return text.partition("\n")[0]


def tune_process():
    """Set what costs nothing and saves time in this process; call it before torch is imported.

    Waiting OpenMP threads sleep: two jobs on the same cores otherwise slow each other down 8 times.
    glibc keeps large blocks instead of handing them back to the kernel after every step: 1.3 to 1.5
    times as many images a second on a CPU.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # OpenCV's own threads, one a core, don't know of OMP_NUM_THREADS
    os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network on import
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names in malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2 ** 31 - 1)
        mallopt(top_pad, 2 ** 26)


def begin_worker():
    """Tune a worker process of a pool, and end it when the process that started the pool dies.

    A killed process can't end its workers, which would wait for ever. To the kernel their parent is
    another process, the fork server.
    """
    def end_with_pool():
        parent_process().join()
        os._exit(1)
    tune_process()
    threading.Thread(target=end_with_pool, daemon=True).start()


def end_with_parent(*_):
    """Let the kernel kill this process when its parent dies; end a fork whose parent is dead."""
    kill_with_parent = 1  # PR_SET_PDEATHSIG in prctl.h
    ctypes.CDLL(None).prctl(kill_with_parent, signal.SIGKILL)
    forked_by = parent_process()
    if forked_by and os.getppid() != forked_by.pid:  # it died before the kernel was told
        os._exit(1)


@contextmanager
def without_main():
    """Hide the main module while worker processes start.

    Each of them imports it: a script without a guard would begin anew in all of them, and that of a
    notebook or a shell can't be imported.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# what torchrun tells each of its processes
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def ranks():
    """Return (rank of this process, number of processes) under torchrun, (0, 1) without it.

    Only rank 0 is to print and write. Some of the variables alone, left behind by another program,
    or without values, are no torchrun: a process would wait for others that never come.
    """
    if not all(os.environ.get(name) for name in TORCHRUN):
        return 0, 1
    rank, n_ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    return (int(rank), int(n_ranks)) if f"{rank}{n_ranks}".isdecimal() else (0, 1)


@cache  # the processes of torchrun join once
def claim_device(name="auto", per_gpu=1):
    """Return the torch device of this process; "auto" is an idle GPU, or the CPU without GPUs.

    The GPU is held until the process ends; `per_gpu` processes may hold it at once. Under torchrun
    the processes wait for each other to join: with "auto" or "cuda" each gets a GPU of its own, a
    device with a number is shared by all. Raises UserError if the device isn't there or can't work.
    """
    import torch
    n_ranks, has_gpu = ranks()[1], torch.cuda.is_available()
    own_gpu = n_ranks > 1 and has_gpu and name in ("auto", "cuda")
    if own_gpu:
        name = gpu_of_rank()
    elif name == "auto":
        name = idle_gpu(per_gpu) if has_gpu else "cpu"
    device = check_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if own_gpu:
        torch.distributed.init_process_group("nccl", device_id=device)
    elif n_ranks > 1:  # nccl refuses two processes on one GPU
        torch.distributed.init_process_group("gloo")
    return device


def gpu_of_rank():
    """Return the name of this process's own GPU under torchrun; raise UserError if it has none."""
    import torch
    n_gpus, n_processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if n_processes > n_gpus:
        raise UserError(f"{n_processes} processes, but {n_gpus} GPU(s) on this machine: start as "
                        "many as there are GPUs (make: GPUS=n), or let all of them share one with "
                        "--device cuda:0 (make: DEVICE=cuda:0)")
    return f"cuda:{os.environ['LOCAL_RANK']}"


def check_device(name):
    """Return the torch device `name`; raise UserError if it isn't there or can't compute.

    A torch that was built for older or newer GPUs has no kernels for this one. Without this check
    the first computation would end in a traceback.
    """
    import torch
    try:
        return run_kernel(name)
    except (RuntimeError, AssertionError) as e:
        text = first_line(str(e))
    if "no kernel image is available" in text:
        major, minor = torch.cuda.get_device_capability(name)
        text = (f"{torch.cuda.get_device_name(name)} has compute capability {major}.{minor} "
                f"(sm_{major}{minor}), torch {torch.__version__} was built for "
                f"{', '.join(torch.cuda.get_arch_list())}: install a build of torch for this GPU, "
                "or take --device cpu (make: DEVICE=cpu)")
    raise UserError(f"--device {name}: {text}")


def run_kernel(name):
    """Compute something small on the device `name`, wait for the result and return the device."""
    import torch
    result = torch.ones(1, device=name).add_(1)
    result.item()
    return result.device


@cache  # a second call of the same process would wait for the first
def idle_gpu(per_gpu):
    """Return the name of a GPU that fewer than `per_gpu` processes of this user hold, and hold it.

    Each GPU has `per_gpu` slots; the first slots of all GPUs are taken before the second ones.
    Waits until one is free. It is released when the process ends.
    """
    import torch
    waiting, folder = False, own_folder("gpus")
    while True:
        holders = []
        for slot, index in product(range(per_gpu), range(torch.cuda.device_count())):
            name = f".{torch.cuda.get_device_properties(index).uuid}.{slot}.lock"
            # kept as an attribute: a lock that nothing refers to is released
            idle_gpu.lock = lock(folder, name=name)
            try:
                idle_gpu.lock.__enter__()  # without an exit: held until the process ends
            except UserError:
                holders.append((folder / name).read_text().strip())
                continue
            return f"cuda:{index}"
        if not waiting:
            print(f"all GPUs are taken: waiting for one of {', '.join(holders)}", flush=True)
        waiting = True
        time.sleep(5)


def loader_workers(wanted, cuda):
    """Return how many processes a loader has: `wanted` or, if None, as many as the device needs.

    A GPU waits for photos without them; on a CPU they would only take cores from the training.
    """
    if wanted is not None:
        return wanted
    return min(8, len(os.sched_getaffinity(0))) if cuda else 0


def loader_options(workers, cuda):
    """Return what all DataLoaders with so many processes are given.

    A process that is stuck would let the run wait for ever without the timeout, in seconds: a batch
    from a slow disk takes far less.
    """
    return {"num_workers": workers, "pin_memory": cuda, "timeout": 300 if workers else 0,
            "multiprocessing_context": "fork" if workers else None,
            "worker_init_fn": end_with_parent}


def batch_bytes(n_images, scale, mask_side):
    """Return the bytes of a batch of square images and masks."""
    return n_images * (3 * scale ** 2 + mask_side ** 2)


def check_shared_memory(workers, *loaders):
    """Raise UserError if /dev/shm has no room for the batches that loader processes put there.

    loaders: (bytes of a batch, number of batches) of each that is at work at the same time. Of a
    loader two batches for each process may wait there, while one is in use and one is taken.
    Queues, locks and pages that aren't full take less than 128 KB more for each process.
    """
    folder = Path("/dev/shm")
    if not workers or not folder.is_dir():
        return
    n_processes = int(os.environ["LOCAL_WORLD_SIZE"]) if ranks()[1] > 1 else 1
    needed = 2 ** 17 * workers * len(loaders)
    needed += sum(size * min(n_batches, 2 * workers + 2) for size, n_batches in loaders)
    needed, free = n_processes * needed, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {workers} loader processes want {needed:,} bytes there for "
                        f"their batches, {free:,} are free: lower --workers or --batch (make: "
                        "BATCH, TRAIN_ARGS, INFER_ARGS), or give a container more, as with docker "
                        f"run --shm-size={math.ceil(needed / 2 ** 30)}g")


def amp(device):
    """Return a context for the forward pass: mixed precision on a GPU, nothing on a CPU.

    A GPU that computes in bfloat16 (Ampere and later) uses it, as it needs no loss scaling; an
    older one uses float16. On a CPU mixed precision would be slower.
    """
    import torch
    use_cuda = device.type == "cuda"
    is_old = use_cuda and torch.cuda.get_device_capability(device)[0] < 8
    dtype = torch.float16 if is_old else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=use_cuda)


# ---- pictures ------------------------------------------------------------------------------------

# Okabe and Ito's colours for the colour-blind, three of Tol's, white. Class 1 has the first;
# after the last they begin again
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
           (213, 94, 0), (204, 121, 167), (136, 34, 85), (51, 34, 136), (187, 187, 187),
           (255, 255, 255))
# uint8 [256, 3]: the RGB colour of each class id; black is background, magenta IGNORE_INDEX
COLOURS = np.array([(0, 0, 0), *(PALETTE[i % len(PALETTE)] for i in range(254)), (255, 0, 255)],
                   np.uint8)


def overlay(image, mask=None, strength=0.6, size=(SUBMIT_SIZE, SUBMIT_SIZE)):
    """Return a photo at the submission's size, grey under the colours of a mask's foreground.

    image: uint8 [H, W, 3]; mask: uint8 [H, W], which may be of another size; size: (width, height)
    of the result, uint8 [height, width, 3]. Without a mask the photo keeps its colours.
    """
    import cv2
    photo = cv2.resize(as_photo(image), size, interpolation=cv2.INTER_AREA)
    if mask is None:
        return photo
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iu" or not mask.size:
        raise UserError(f"a mask must be class ids [H, W], not {mask.dtype} {list(mask.shape)}")
    if not 0 <= mask.min() <= mask.max() < len(COLOURS):
        raise UserError(f"a mask must hold class ids of 0 to 255, not {mask.min()} to {mask.max()}")
    mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    grey = photo.astype(np.float32).mean(2, keepdims=True)
    mixed = grey * (1 - strength) + COLOURS[mask] * strength
    return np.where((mask > 0)[..., None], mixed, photo).astype(np.uint8)


def foreground_ids(mask):
    """Return the class ids in a mask in order, without background and IGNORE_INDEX."""
    return [class_id for class_id in np.unique(mask).tolist() if 0 < class_id < IGNORE_INDEX]


def named(mask, classes):
    """Return the names of the foreground classes in a mask, as "Paper, Metal", or "nothing"."""
    return ", ".join(classes[class_id] for class_id in foreground_ids(mask)) or "nothing"


def write_sheet(path, rows, legend, across=1):
    """Write a PNG of rows of captioned pictures, with a legend of colours below.

    rows: lists of (caption, uint8 RGB picture), all of one size; `across` of them stand side by
    side. legend: {class id: text}.
    """
    from PIL import Image, ImageDraw, ImageFont
    lines = [sum(rows[start:start + across], []) for start in range(0, len(rows), across)]
    font, text_height = ImageFont.load_default(13), 18
    height, width = rows[0][0][1].shape[:2]
    legend_top = (text_height + height) * len(lines)
    size = (width * max(map(len, lines)), legend_top + text_height * len(legend))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for line_number, line in enumerate(lines):
        top = line_number * (text_height + height)
        for column, (caption, picture) in enumerate(line):
            sheet.paste(Image.fromarray(picture), (column * width, top + text_height))
            draw.text((column * width + 3, top + 1), caption[:width // 7], "black", font)
    for i, (class_id, text) in enumerate(legend.items()):
        top, colour = legend_top + i * text_height, tuple(COLOURS[class_id].tolist())
        draw.rectangle((4, top + 3, 30, top + text_height - 3), colour, "black")
        draw.text((36, top + 1), text, "black", font)
    with atomic_write(path) as scratch:
        sheet.save(scratch, format="png")


# ---- pages ---------------------------------------------------------------------------------------


def data_url(kind, content):
    """Return the bytes of a picture as a URL that holds them; kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def tile_url(tile):
    """Return a small RGB picture, uint8 [H, W, 3], as the URL of a JPEG."""
    import cv2
    _, content = cv2.imencode(".jpg", tile[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 85))
    return data_url("jpeg", content)


def figure_urls(plot, height):
    """Return what plot(axes) draws, `height` inches high, as two URLs of a PNG.

    The first is for light screens, the second for dark ones.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    options = {"text.parse_math": False, "font.size": 10}  # a $ in a name begins no formula
    urls = []
    for look in ("default", "dark_background"):
        # a letter that the font lacks is drawn as a box, for which no warning is needed
        with warnings.catch_warnings(action="ignore"), style.context([look, options]), \
                io.BytesIO() as f:
            figure = Figure((5.5, height), layout="constrained")
            plot(figure.subplots())
            figure.savefig(f, format="png", dpi=150, transparent=True)
            urls.append(data_url("png", f.getvalue()))
    return urls


def draw_bars(axes, classes, series, **labels):
    """Draw series of values by class: the first as bars, the others as marks.

    classes: {id: name} of those to show; series: {label: values}, each by class id; labels: of the
    axes, as for their `set`.
    """
    class_ids, rows = list(classes), range(len(classes))
    (bar_label, bar_values), *others = series.items()
    colours = COLOURS[class_ids] / 255
    axes.barh(rows, np.array(bar_values)[class_ids], color=colours, edgecolor="grey")
    axes.barh(0, np.nan, color="grey", label=bar_label)  # for the legend: bars have many colours
    for (label, values), mark in zip(others, cycle("oD^sv<>pPX"), strict=False):
        axes.plot(np.array(values)[class_ids], rows, mark, color="black", mfc="white", ms=5,
                  label=label)
    axes.set_yticks(rows, [name[:22] for name in classes.values()])
    axes.invert_yaxis()
    axes.set(**labels)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)


def draw_heat(axes, values, rows, columns, **labels):
    """Draw shares [R, C] as colours and, if there are at most 500, in percent; NaN stays empty.

    rows, columns: their names; labels: of the axes, as for their `set`.
    """
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if values.size <= 500 and not np.isnan(value):
            colour = "black" if value > 0.6 else "white"
            axes.text(x, y, f"{100 * value:.0f}", color=colour, ha="center", va="center")
    axes.set_yticks(range(len(rows)), [name[:22] for name in rows])
    axes.set_xticks(range(len(columns)), [name[:22] for name in columns], rotation=90)
    axes.set(**labels)


def write_page(path, title, sections, classes, warning=""):
    """Write a web page that needs no other file; report.html.jinja says what is in a section."""
    from jinja2 import Environment, FileSystemLoader
    folder = Path(__file__).resolve().parent
    pages = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True,
                        lstrip_blocks=True)
    text = pages.get_template("report.html.jinja").render(
        title=title, sections=sections, classes=classes, warning=warning, colours=COLOURS.tolist(),
        command=" ".join(sys.argv), date=time.strftime("%F %T %z"),
        versions=[f"Python {platform.python_version()}", *required_versions()])
    with atomic_write(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def required_versions():
    """Return "torch 2.14.1" for each package of requirements.txt that is installed."""
    from importlib.metadata import distributions
    installed = {}
    for package in distributions():
        installed[package.name.lower().replace("_", "-")] = package.version
    requirements = Path(__file__).resolve().with_name("requirements.txt").read_text()
    names = re.findall("^[^=#\n]+", requirements, re.M)
    return [f"{name} {installed[name]}" for name in names if name in installed]
