"""What the scripts are built from: files, data, augmentation, models, losses, metrics, pictures, pages.

Shapes are fixed here and nowhere else:
    image   uint8   [H, W, 3]      RGB as read from the file; [B, H, W, 3] in a batch
    mask    uint8   [H, W]         class ids, IGNORE_INDEX where unlabelled; [B, H, W] in a batch
    logits  float32 [B, C, H, W]   before softmax
    probs   float32 [B, C, H, W]   after softmax: 0..1, sums to 1 over C
    store   uint8   [N, C, SUBMIT_SIZE, SUBMIT_SIZE]   probs x 255 on disk
Importing this file does nothing and is quick: libraries that take seconds to import are imported where they are used.
"""
import argparse
import ast
import base64
import csv
import ctypes
import fcntl
import hashlib
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
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections import defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate, count, cycle
from multiprocessing import get_context
from pathlib import Path
from textwrap import shorten

import numpy as np
from tqdm import tqdm

BACKGROUND = "Background"
IGNORE_INDEX = 255
SUBMIT_SIZE = 256  # side of a submitted mask, pixels: the competition's
MAX_CLASSES = 200  # with the background; a submission is written with a byte for each id
MAX_PIXELS = 89_000_000  # of one photo: 267 MB decoded; from 89.5 million on Pillow warns of a bomb
MAX_FAULTS = 1000  # of one JSON file: reading it ends there
ORDER, SAMPLE, STEP, MIX = range(1, 5)  # lead a seed each, so no two uses draw the same: numpy pads with zeros

# ---- files and devices ----------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path):
    """Yield a scratch path beside `path`; flush it and rename it into place only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        yield scratch
        with open(scratch, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(scratch, path)
    except OSError as e:  # of a full disk it doesn't say which file
        if e.strerror:
            e.filename = e.filename or str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows the docstring as it stands and every default."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and whose errors are one line."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, "formatter_class": Help} | options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf, step=None):
    """An argparse type: `kind`, int or float, from `low` to `high`, a multiple of `step`; no NaN and no infinity."""
    def parse(text):
        value = kind(text)
        if not low <= value <= min(high, sys.float_info.max) or step and value % step:
            steps = f" in steps of {step}" if step else ""
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}{steps}")
        return value
    parse.__name__ = kind.__name__
    return parse


def check_space(folder, needed):
    """Raise SystemExit when fewer than `needed` bytes are free in `folder`."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise SystemExit(f"{folder}: {needed:,} bytes are needed there, {free:,} are free")


def run_script(main, args):
    """main(args), with one line instead of a traceback for files that can't be used, lost loaders, Ctrl-C and SIGTERM.

    SIGTERM ends it as Ctrl-C does, by a KeyboardInterrupt in the main thread. The process is tuned first, so torch must
    not be imported yet.
    """
    tune_process()
    project_files()  # as they are now: what is edited later has no part in it
    rank, n_ranks = ranks()
    if n_ranks > 1:  # in a session of its own, where a signal that kills torchrun and its group doesn't reach it
        kill_me_with_parent = 1  # PR_SET_PDEATHSIG in prctl.h
        ctypes.CDLL(None).prctl(kill_me_with_parent, signal.SIGKILL)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives

    def terminate(number, _):
        signal.signal(number, signal.SIG_IGN)  # a second one would break off the cleaning up
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, terminate)
    try:
        main(args)
    except (KeyboardInterrupt, Exception) as e:
        said = str(e).strip().splitlines() or ["interrupted"]
        terminated = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        if isinstance(e, KeyboardInterrupt) or terminated:  # then a loader or another rank may have ended before
            if not rank:
                print(f"{said[0]}; the same command carries on", file=sys.stderr)
            raise SystemExit(143 if terminated else 130) from None
        # torch notices a dead loader process, or by chance first that its end of a pipe is gone
        if said[0].startswith("DataLoader worker") or isinstance(e, ConnectionResetError):
            raise SystemExit(f"a loader process died: {said[0]}; too little memory? Lower --workers; the same command "
                             "carries on") from None
        if not isinstance(e, OSError):
            raise
        if e.filename and e.strerror:
            raise SystemExit(f"{e.filename}: {e.strerror}") from None
        raise SystemExit(said[-1].removeprefix("OSError: ")) from None  # of a loader process: its own line comes last


def write_json(path, value):
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path):
    """The parsed file; raises SystemExit with one line when it is missing, no JSON or too large for the memory."""
    try:
        size, memory = os.path.getsize(path), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size * 40 > memory:  # what is parsed takes up to 35 times as much
            raise SystemExit(f"{path}: {size} bytes of JSON are too many for {memory} bytes of memory")
        return json.loads(Path(path).read_bytes())
    except OSError as e:
        raise SystemExit(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError, MemoryError) as e:
        raise SystemExit(f"{path}: not JSON: {str(e) or 'out of memory'}") from None


def write_csv(path, rows):
    """Write `rows`, a non-empty list of dicts with the same keys."""
    with atomic_write(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path, columns):
    """Rows as dicts of strings; raises SystemExit when the file is missing or lacks one of `columns`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, restval="")
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SystemExit(f"{path}: {e}") from None
    if lacking := [c for c in columns if c not in names]:
        raise SystemExit(f"{path}: no column {', '.join(lacking)} in its first line")
    return rows


def short_hash(*values):
    """The first 16 hex digits of the SHA-256 of plain values, written as JSON."""
    return hashlib.sha256(json.dumps(values, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def file_hash(path):
    """The first 16 hex digits of the file's SHA-256."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


class Hashes:
    """Content hashes of files, remembered in CACHE/hashes.txt while device, inode, size and both times stay the same.

    Times alone lie: a file may come from elsewhere with any time of change, but not with any ctime and inode.
    """

    def __init__(self, cache):
        self.path, self.known, self.new = Path(cache) / "hashes.txt", {}, []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        for line in lines:  # a later line of the same file wins; one that a kill has cut short counts for nothing
            digest, _, key = line.partition(" ")
            if re.fullmatch("[0-9a-f]{16}", digest):
                self.known[key] = digest

    @staticmethod
    def key(path):
        """What must stay the same of a file, as text; raises OSError when there is no such file or it is a pipe."""
        s = os.stat(path)
        if not stat.S_ISREG(s.st_mode):
            raise OSError(f"{path} is no file")
        return f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {str(path)!a}"

    def remember(self, key, digest):
        self.known[key] = digest
        self.new.append(f"{digest} {key}\n")

    def __call__(self, path):
        """The hash of the file's content, "" of one that is not there or can't be read; see file_hash."""
        try:
            key = self.key(path)
            if key not in self.known:
                self.remember(key, file_hash(path))
            return self.known[key]
        except (OSError, ValueError):  # ValueError: a name with a zero byte
            return ""

    def remembered(self, path):
        """The hash if the file need not be read for it, else None."""
        with suppress(OSError, ValueError):
            return self.known.get(self.key(path))

    def of_all(self, paths):
        """The hashes of many files; those that aren't remembered are read by several threads."""
        found = [self.remembered(path) for path in paths]
        if None not in found:
            return found
        with ThreadPoolExecutor(8) as pool:
            read = pool.map(self, [path for path, digest in zip(paths, found, strict=True) if digest is None])
            return [next(read) if digest is None else digest for digest in found]

    def save(self):
        """Append what is new; several processes may do so at once. A cache that can't be written is no error."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.new:
                with open(self.path, "a", encoding="utf-8") as f:
                    f.write("\n" + "".join(self.new))  # the line before may have been cut short
            self.new = []


def move_aside(folder, names):
    """Move files of `folder` that are about to be replaced into folder/replaced, over those of the time before.

    The first of `names` describes the others. From here until it is written anew by write_description a mark tells a
    later call that this one was killed in between: then what is there already stays. Says what it has moved.
    """
    aside, mark = folder / "replaced", move_mark(folder / names[0])
    if not mark.exists():
        if not any((folder / name).exists() for name in names):
            return
        aside.mkdir(exist_ok=True)
        for name in names:
            (aside / name).unlink(missing_ok=True)
        mark.touch()
    names = [name for name in names if (folder / name).exists() and not (aside / name).exists()]
    for name in names:
        os.replace(folder / name, aside / name)
    if names:
        print(f"{aside}: {', '.join(names)} of before", flush=True)


def move_mark(path):
    """The file that is there while files are moved aside that the JSON `path` describes."""
    return path.parent / "replaced" / f".{path.name}.moving"


def check_output(data, *outputs, inputs=()):
    """Raise SystemExit if an output is an input or another output, or lies in `data`, where nothing is written."""
    root, taken = os.path.realpath(data), {os.path.realpath(path): f"{path}, which is read" for path in inputs}
    for path in outputs:
        real = os.path.realpath(path)
        if real in taken:
            raise SystemExit(f"{path} would be written over {taken[real]}: choose another name")
        taken[real] = f"{path}, which is written too"
        if Path(real).is_relative_to(root):
            raise SystemExit(f"{path} lies in DATA, {data}, where nothing is ever written: choose another place")


@contextmanager
def lock(folder, wait=False, name=".lock"):
    """Hold `folder`, or with `name` .FILE.lock that file in it; when the process dies the kernel drops the lock.

    Raises SystemExit naming the holder when another process has it, unless `wait`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            f.seek(0)
            held = folder / name.removesuffix(".lock").lstrip(".")
            raise SystemExit(f"{held} is in use by {f.read().strip() or 'another process'}: "
                             "wait for it or stop it") from None
        f.truncate(0)
        f.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        f.flush()
        os.register_at_fork(after_in_child=f.close)  # else the loader processes of a killed run keep it for seconds
        yield


def save_checkpoint(path, previous=None, **state):
    """Write tensors and plain values, so that loading needs no pickle; the file that was there becomes `previous`."""
    import torch
    with atomic_write(path) as scratch:
        try:
            torch.save(state, scratch)
        except RuntimeError as e:  # torch's own for a write that failed
            raise OSError(None, f"can't be written, is the disk full? ({str(e).splitlines()[0]})", str(path)) from None
        if previous and path.exists():
            os.replace(path, previous)


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU; raises SystemExit when the file is not one."""
    import torch
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):  # torch doesn't look at checksums
            raise ValueError(f"the checksum of {part} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such checkpoint") from None
    except Exception as e:  # torch raises many types on a damaged or foreign file
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise SystemExit(f"{path}: not a checkpoint that can be loaded safely: {reason}") from None


def tune_process():
    """Settings of this process that cost nothing and save time; call before torch is imported.

    Waiting OpenMP threads sleep: two jobs on the same cores otherwise slow each other down 8 times. glibc keeps large
    blocks instead of handing them back to the kernel after every step: 1.3 to 1.5 times as many images/s on a CPU.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")  # its own threads, one a core, don't know of OMP_NUM_THREADS
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network on import
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names in malloc.h
        for option, value in ((mmap_max, 0), (trim_threshold, 2 ** 31 - 1), (top_pad, 2 ** 26)):
            ctypes.CDLL("libc.so.6").mallopt(option, value)


def ranks():
    """(rank of this process, number of processes) under torchrun, (0, 1) without; only rank 0 is to print and write."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@cache  # a second claim of the same process would wait for the first
def claim_device(name="auto"):
    """The torch device of this process: "auto" is an idle GPU, which is held until it exits, or the CPU.

    Under torchrun each process gets a GPU of its own, or the CPU, and meets the others.
    """
    import torch
    cuda, n_ranks = torch.cuda.is_available() and name != "cpu", ranks()[1]
    if cuda and n_ranks == 1 and name == "auto":
        return idle_gpu()
    asked = f"cuda:{os.environ['LOCAL_RANK']}" if cuda and n_ranks > 1 else "cpu" if name == "auto" else name
    try:
        device = torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError) as e:
        raise SystemExit(f"--device {asked}: {str(e).splitlines()[0]}") from None
    if n_ranks > 1:
        if cuda:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    return device


def idle_gpu():
    """The first GPU that no other process of this user holds; it is this one's until it exits."""
    import torch
    waiting = False
    while True:
        for index in range(torch.cuda.device_count()):
            uuid = torch.cuda.get_device_properties(index).uuid
            idle_gpu.lock = lock(Path(tempfile.gettempdir()) / f"gpu-{uuid}-{os.getuid()}")
            try:
                idle_gpu.lock.__enter__()  # without an exit: held until the process ends
            except SystemExit:
                continue
            torch.cuda.set_device(index)
            return torch.device("cuda", index)
        if not waiting:
            print("all GPUs are taken: waiting for one", flush=True)
        waiting = True
        time.sleep(5)


def amp(device):
    """Mixed precision on a GPU: a context for the forward pass; it does nothing on a CPU, where it would be slower.

    bfloat16, which needs no loss scaling, where the GPU computes in it (Ampere and later), else float16.
    """
    import torch
    cuda = device.type == "cuda"
    old = cuda and torch.cuda.get_device_capability(device)[0] < 8
    return torch.autocast(device.type, torch.float16 if old else torch.bfloat16, enabled=cuda)


# ---- what made it ---------------------------------------------------------------------------------------------------
# An artefact is up to date when its recipe (settings, data, parents) and its code are those that would make it now.

# what is made -> (module, function) where the code that decides it begins
STEPS = {"masks": [("common", "build_cache")],
         "run": [("train", "train_run")],
         "store": [("common", "load_data"), ("common", "EvalPhotos"), ("infer", "load_models"),
                   ("infer", "predict_split")],
         "labels": [("pseudo_label", "make_labels")],
         "submission": [("ensemble", "soft")],
         "voted": [("ensemble", "hard")]}

# What shows, keeps and guards results without deciding them: in each file the search for code ends at the names in its
# BESIDE, so that edits of these, and of what only they use, make nothing stale.
BESIDE = {"DESCRIBED", "Hashes", "Help", "Parser", "accepted_code", "atomic_write", "cache_folder", "check_files",
          "check_output", "check_space", "clean", "code_changes", "code_hashes", "code_of", "code_question",
          "code_state", "data_files", "decide", "different_keys", "file_hash", "fingerprint", "folds_hash",
          "git_commit", "is_description", "keep_code", "library_versions", "load_folds", "lock", "move_aside",
          "move_mark", "name_fault", "named", "number", "overlay", "project_files", "provenance", "read_csv",
          "read_description", "read_folds", "read_json", "recipe_changes", "run_script", "short_hash",
          "tune_process", "version_changes", "write_csv", "write_description", "write_json", "write_page",
          "write_sheet"}
DERIVED = ("mean", "std")  # what a recipe says besides, as it follows from the rest
DESCRIBED = ("recipe", "code", "state", "commit", "versions", "kept_under")  # of provenance
VERSIONS = ("torch", "timm", "segmentation-models-pytorch", "albumentations")  # shown when they differ, no more


@cache
def project_files():
    """{name: content} of the Python files beside this one, as they were when this process first asked.

    run_script asks at once, so edits made while it runs are not taken for what made its results.
    """
    return {path.name: path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))}


def check_files():
    """Raise SystemExit if the project's Python files were edited since this process read them, as in a notebook."""
    for name, content in project_files().items():
        path = Path(__file__).parent / name
        if not path.exists() or path.read_bytes() != content:
            raise SystemExit(f"{name} was edited since this process has read it: start the process anew")


@cache
def definitions(module):
    """{name: syntax trees that define it} of the top level of a project's file.

    Under "" stands what the file does on import besides defining names. What is imported is defined by its import.
    """
    defined = defaultdict(list)
    for node in ast.parse(project_files()[f"{module}.py"]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.If) and "__name__" in ast.dump(node.test):
            continue  # what a script does when it is run, after main's arguments are read
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        else:
            places = getattr(node, "targets", [getattr(node, "target", node)])
            names = [n.id for place in places for n in ast.walk(place) if isinstance(n, ast.Name) and (
                isinstance(n.ctx, ast.Store) or isinstance(place, (ast.Subscript, ast.Attribute)))] or [""]
        for name in names:
            defined[name].append(node)
    return defined


def imports_of(node):
    """{name: (module, name there or None for all of it)} of an import statement, as far as it is of project's files."""
    if isinstance(node, ast.ImportFrom):
        return {a.asname or a.name: (node.module, a.name if a.name != "*" else None) for a in node.names
                if f"{node.module}.py" in project_files()}
    return {a.asname or a.name: (a.name, None) for a in node.names if f"{a.name}.py" in project_files()}


def remove_docstrings(node):
    """Remove the docstrings of a function or class and of those defined in it from its syntax tree."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        for part in node.body:
            remove_docstrings(part)


@cache
def read_definition(module, name, entry):
    """(hash, [(module, name) used]) of what defines a name; with `entry` only that entry of a table.

    The hash has no docstrings; in it are the imports of other libraries that it needs.
    """
    trees, loaded, places, defined = [], set(), {}, definitions(module)
    for node in defined[name]:
        if entry is not None:
            node = dict(zip(map(ast.literal_eval, node.value.keys), node.value.values, strict=True))[entry]
        remove_docstrings(node)
        text = ast.dump(node)
        trees.append(text)
        loaded |= set(re.findall(r"Name\(id='(\w+)', ctx=Load\(\)\)", text))  # 2 ms of all files, a walk 30 ms
        for part in ast.walk(node) if "Import" in text else ():
            places |= imports_of(part) if isinstance(part, (ast.Import, ast.ImportFrom)) else {}
    for other in sorted(loaded & defined.keys()):
        for node in defined[other]:
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                places.setdefault(other, (module, other))
            elif found := imports_of(node):
                places |= {other: found[other]}
            else:
                alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == other)
                trees.append(f"{getattr(node, 'module', '')} {ast.dump(alias)}")
    return short_hash(*trees), list(places.values())


@cache
def code_of(step, **entries):
    """{name: hash} of every top-level function, class and constant that a step of STEPS can reach by name.

    The hash is of the syntax tree, so comments, docstrings and layout don't count. entries: {table: entry}; of such a
    dict the entry alone is reached, or nothing if it has none of that name: a new entry changes nothing that is there.
    """
    todo, seen, found = list(STEPS[step]), set(), defaultdict(list)
    while todo:
        module, name = place = todo.pop()
        defined = definitions(module)
        if name is None:  # of a module that is imported whole
            todo += [(module, each) for each in defined]
        if place in seen or name not in defined or name in names_beside(module):
            continue
        seen.add(place)
        entry, label, keys = None, name or f"{module}.py", table_keys(module, name) if name in entries else None
        if keys is not None:
            if entries[name] not in keys:
                continue
            entry, label = entries[name], f"{name}[{entries[name]}]"
        digest, used = read_definition(module, name, entry)
        found[label].append(digest)
        todo += [*used, (module, ""), (module, "*")]
    return {name: short_hash(*sorted(found[name])) for name in sorted(found)}


@cache
def names_beside(module):
    """The set BESIDE of a project's file; see there."""
    statements = definitions(module).get("BESIDE")
    return ast.literal_eval(statements[0].value) if statements else set()


def table_keys(module, name):
    """The keys of a table, or None if it isn't a dict that is written out in one statement: then it counts whole."""
    node, *others = definitions(module)[name]
    table = getattr(node, "value", None)
    if others or not isinstance(table, ast.Dict) or not all(isinstance(key, ast.Constant) for key in table.keys):
        return None
    return [key.value for key in table.keys]


def code_state():
    """What names the project's Python files as they are."""
    return short_hash(*(f"{name} {content!r}" for name, content in project_files().items()))


def keep_code(exp):
    """Keep the project's Python files as EXP/code/STATE/, once for each state of them."""
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
    """The commit that the project's folder is at, with "+" when its Python files differ from it; "" without git."""
    ask = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    with suppress(OSError):
        commit = ask(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = ask(["git", "--no-optional-locks", "status", "--porcelain", "--", ":(glob)*.py"]).stdout.strip()
        return commit + "+" * bool(commit and changed)
    return ""


def library_versions():
    """{package: version, "" if it isn't installed} of VERSIONS."""
    from importlib.metadata import PackageNotFoundError, version
    found = dict.fromkeys(VERSIONS, "")
    for package in VERSIONS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def provenance(recipe, code):
    """What every artefact says of what made it, as plain values.

    recipe: settings, data and parents; code: of code_of; state: of keep_code, which whoever makes it calls; kept_under:
    later provenances that it stood under when the user said to keep it.
    """
    return dict(zip(DESCRIBED, (recipe, code, code_state(), git_commit(), library_versions(), []), strict=True))


def is_description(made):
    """Whether a parsed JSON has what provenance says, and files."""
    kinds = dict.fromkeys(("recipe", "code", "versions", "files"), dict) | {"kept_under": list, "state": str,
                                                                            "commit": str}
    return isinstance(made, dict) and all(isinstance(made.get(key), kind) for key, kind in kinds.items())


def read_description(path, hashes):
    """The JSON that describes an artefact, or None if it or a file that it names is missing or it is of an old version.

    Its "touched" lists the files that aren't those which it describes; "files" has the hashes of what is there.
    """
    try:
        made = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not is_description(made):
        return None
    found = {name: hashes(path.parent / name) for name in made["files"]}
    touched = different_keys(found, made["files"])
    return made | {"files": found, "touched": touched} if all(found.values()) else None


def write_description(path, made, **more):
    """Write the JSON that describes an artefact: of `made` what provenance says, and `more`, its files among it."""
    write_json(path, {key: made[key] for key in DESCRIBED} | more)
    move_mark(path).unlink(missing_ok=True)


def accepted_code(made):
    """The code that an artefact counts as: that which made it or, if the user kept it since, that of then."""
    return (made["kept_under"] or [made])[-1]["code"]


def code_hashes(made):
    """A hash of each state of the code that made an artefact or that it was kept under."""
    return sorted({short_hash(state["code"]) for state in (made, *made["kept_under"])})


def different_keys(old, new):
    """The keys that two dicts don't share, or under which they have different values."""
    return [key for key in {**old, **new} if key not in old or key not in new or old[key] != new[key]]


def recipe_changes(made, recipe):
    """["lr 0.001 -> 0.002"]: where the recipe of what is there differs from `recipe`."""
    old = made["recipe"]
    return [f"{key} {shorten(str(old.get(key)), 60)} -> {shorten(str(recipe.get(key)), 60)}"
            for key in different_keys(old, recipe) if key not in DERIVED]


def code_changes(made, code):
    """The names of what differs between `code` and that which made an artefact, or which it was kept under."""
    touched = [f"{name} touched by hand" for name in made.get("touched", ())]
    return touched + ([] if made["code"] == code else sorted(different_keys(accepted_code(made), code)))


def version_changes(made, versions):
    """["torch 2.11.0 -> 2.14.1"]: where the libraries that made an artefact differ; that makes nothing stale."""
    return [f"{name} {made['versions'].get(name)} -> {version}" for name, version in versions.items()
            if made["versions"].get(name) != version]


def code_question(what, names, new="--code new", keep="--code keep", exp="--exp"):
    """The line that asks what is to become of artefacts which other code has made."""
    some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{what} made by other code ({some}): {new} makes anew, {keep} keeps what is there, another {exp} keeps both"


def decide(path, made, wanted, code=None, replace=True):
    """What is to happen with the artefact `path`: "done", "kept" or "make"; made: what made it, wanted: what would now.

    code: None, "new" or "keep", as the user says for the case that only the code differs, or a file was touched by
    hand. "kept": made["kept_under"] has got the new provenance, to be written. Raises SystemExit when the user has to
    say.
    """
    if changes := recipe_changes(made, wanted["recipe"]):
        if not replace:
            raise SystemExit(f"{path} was made with another recipe: {', '.join(changes)}; pass --replace to replace it")
        print(f"{path} is replaced: {', '.join(changes)}", flush=True)
        return "make"
    names = code_changes(made, wanted["code"])
    if names and code is None:
        raise SystemExit(code_question(f"{path} was", names))
    if names and code == "new":
        print(f"{path} is replaced: other code, {', '.join(names)}", flush=True)
        return "make"
    if other := version_changes(made, wanted["versions"]):
        print(f"note: {path} was made with other versions: {', '.join(other)}", flush=True)
    if names:
        made["kept_under"].append({k: wanted[k] for k in ("code", "state", "commit", "versions")})
        print(f"{path} is kept, though other code made it: {', '.join(names)}", flush=True)
    return "kept" if names else "done"


# ---- data: reading and checking -------------------------------------------------------------------------------------

PAINT_ORDERS = ("area", "id", "order")
PHOTO_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")  # Pillow starts programs for some others
# what a terminal obeys and some files can't hold: control characters, ends of lines, turned direction, lone surrogates
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
RLE_DIGITS = {ord("0") + i: "0123456789abcdefghijklmnopqrstuv"[i % 32] for i in range(64)}  # COCO's to Python's


def rle_counts(counts):
    """Run lengths from the counts of an RLE, a list or COCO's compressed string; None when they are damaged.

    The string holds signed numbers in base 32, the lowest digit first: "0" to "O" end a number, "P" to "o" are the same
    digits when more follow. From the fourth run on the number is the difference to the run two before.
    """
    if isinstance(counts, str) and re.fullmatch("([P-o]{0,6}[0-O])*", counts):
        numbers, counts = re.findall("[P-o]*[0-O]", counts), []
        for digits in numbers:
            value = int(digits[::-1].translate(RLE_DIGITS), 32)
            value -= 32 ** len(digits) if digits[-1] >= "@" else 0  # the highest bit is the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts if isinstance(counts, list) and all(type(c) is int and 0 <= c < 2 ** 32 for c in counts) else None


def segmentation_fault(segmentation, height, width):
    """What is wrong with one COCO segmentation, or None. pycocotools crashes the process on what this refuses."""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), rle_counts(segmentation.get("counts"))
        if size != [height, width]:
            return f"RLE of size {clean(size)}, the image is {[height, width]}"
        if counts is None:
            return "RLE counts that are damaged or cut off: not whole numbers from 0"
        return None if sum(counts) == height * width else f"RLE of {sum(counts)} pixels, not {height * width}"
    if not isinstance(segmentation, list) or not segmentation:
        return "no polygon and no RLE"
    limit = 10 * max(height, width)
    for polygon in segmentation:
        if not isinstance(polygon, list) or not all(isinstance(v, (int, float)) for v in polygon):
            return "a polygon that is not a list of numbers"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"a polygon of {len(polygon)} numbers: at least three points, two numbers each"
        if not all(abs(v) <= limit for v in polygon):  # false for NaN and infinity too
            return "a polygon with NaN, infinite or absurdly large coordinates"
        steps = np.diff(np.reshape([*polygon, *polygon[:2]], (-1, 2)), axis=0)
        if np.abs(steps).sum() > min(100 * limit, 2_000_000):  # pycocotools needs 80 bytes for each pixel of it
            return "a polygon with an absurdly long outline"
    return None


def is_odd(polygon, height, width):
    """Whether a polygon leaves the photo, where it is clipped, or has no area in it."""
    points = np.reshape([*polygon, *polygon[:2]], (-1, 2)).T
    x, y = inside = points.clip(0, [[width], [height]])
    return (inside != points).any() or abs(x[1:] @ y[:-1] - y[1:] @ x[:-1]) < 1e-6


def paint_mask(objects, height, width, paint, n_classes):
    """(uint8 [height, width], [class_id] pixel counts, sizes, covered) from (class_id, segmentation) pairs.

    The segmentations are those that segmentation_fault has passed. Where they overlap the later wins. `paint`: "area"
    the largest first, "id" by class id, "order" as listed. sizes: [class_id, pixels] of each object; covered:
    [class_id, class_id painted over it, pixels], for classes that differ.
    """
    import cv2
    from pycocotools import mask as coco_mask
    shapes = []
    for class_id, segmentation in objects:
        if isinstance(segmentation, dict):
            segmentation = [{"size": [height, width], "counts": rle_counts(segmentation["counts"])}]
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        shapes.append((class_id, int(coco_mask.area(rle)), rle))
    if paint != "order":
        shapes.sort(key=lambda shape: shape[0] if paint == "id" else -shape[1])
    columns, covered = np.zeros((width, height), np.uint8), []  # as decoded RLEs lie in memory
    pixels = np.array([height * width] + [0] * (n_classes - 1))
    for class_id, _, rle in shapes:
        x, y, w, h = coco_mask.toBbox(rle).astype(int)
        box = np.s_[x:x + w, y:y + h]
        part, shape = columns[box], coco_mask.decode(rle).T[box].view(bool)
        below = np.bincount(part[shape], minlength=n_classes)
        covered += [[c, class_id, int(below[c])] for c in np.flatnonzero(below).tolist() if c not in (0, class_id)]
        part[shape] = class_id
        pixels -= below
        pixels[class_id] += below.sum()
    return cv2.transpose(columns), pixels.tolist(), [[class_id, area] for class_id, area, _ in shapes], covered


def read_image(path, height, width, check=False):
    """The photo as uint8 RGB [height, width, 3]; grey, palette and CMYK are converted, alpha is dropped.

    The size in the JSON decides: pixels are turned by the EXIF orientation only if they don't have that size as stored.
    Of 16 bits the upper 8 are kept, of several pages or frames the first. The content decides, not the name's ending.
    Raises OSError that says what is wrong with the photo; only its header is read if the size is. With `check` None is
    returned and a JPEG decoded at an eighth of its size, which finds what a full decode does. Without, cv2 decodes a
    whole RGB JPEG, to the same pixels as Pillow in two thirds of the time, and damage inside it is no error.
    """
    from PIL import Image, ImageOps
    try:
        if not os.path.isfile(path):
            raise ValueError("is missing")
        with Image.open(path, formats=PHOTO_FORMATS) as image:
            image.info.pop("transparency", None)  # Pillow warns that it is dropped
            stored = image.size
            if not check and (image.format, image.mode, stored) == ("JPEG", "RGB", (width, height)):
                import cv2
                content = np.fromfile(path, np.uint8)
                pixels = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
                if pixels is not None and content[-2:].tobytes() == b"\xff\xd9":  # the mark of the end: not cut off
                    return pixels
            if stored != (width, height) and stored == (height, width):
                image = ImageOps.exif_transpose(image)
            if image.size != (width, height):
                raise ValueError(f"is {stored[0]}x{stored[1]}, the JSON says {width}x{height}")
            if image.mode == "F":
                raise ValueError("has fractions as pixels, of which nobody knows what is white")
            if image.mode.startswith("I"):  # 16 bits a pixel
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            if check:
                image.draft(None, (1, 1))  # a JPEG at an eighth of its size: all of its data in half the time
                image.load()
                return None
            return np.array(image.convert("RGB"))
    except Exception as e:  # decoders raise many types on damaged files
        raise OSError(None, clean(str(e) or type(e).__name__), str(path)) from None


def entries(coco, key, faults):
    """Yield (object, what is wrong with its id or None) for each JSON object in a list of the file.

    `faults` gets a line for everything in the list that is no object, and for an empty list; many faults end it.
    """
    ids = set()
    if not coco[key]:
        faults.append(f"no {key}")
    for position, entry in enumerate(coco[key]):
        if len(faults) >= MAX_FAULTS:
            return
        if not isinstance(entry, dict):
            faults.append(f"{key}[{position}] is not an object")
        elif type(entry.get("id")) is not int or abs(entry["id"]) >= 2 ** 63:
            yield entry, "has no whole number of 64 bits as id"
        elif entry["id"] in ids:
            yield entry, f"has an id that another {key.removesuffix('s')} has too"
        else:
            ids.add(entry["id"])
            yield entry, None


def clean(value):
    """A value of the data as text that any file can hold and any terminal shows: what is UNSAFE is escaped."""
    text = value if isinstance(value, str) else reprlib.repr(value)  # which bounds length and depth
    return UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def name_fault(name, root):
    """What is wrong with a file_name, or None."""
    if not isinstance(name, str) or not name:
        return "has no file_name"
    if UNSAFE.search(name) or len(name) > 500:
        return "has an impossible file_name: with control characters or over 500 long"
    inside = Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root))
    return None if inside else "has a file_name that leads out of DATA"


def size_fault(height, width):
    """What is wrong with the size of a photo in the JSON, or None."""
    if all(type(side) is int and 0 < side < 2 ** 16 for side in (height, width)) and height * width <= MAX_PIXELS:
        return None
    return f"of height and width {clean((height, width))}: not from 1 to 65535, or over {MAX_PIXELS} pixels of memory"


def read_categories(coco, faults):
    """{category id: name} by id."""
    valid = {c["id"]: clean(c["name"])[:100] for c in coco["categories"]
             if isinstance(c, dict) and type(c.get("id")) is int and isinstance(c.get("name"), str)}
    if len(set(valid.values())) < len(coco["categories"]):
        faults.append("every category needs a whole number as id and a name, all different")
    if BACKGROUND in valid.values():
        faults.append(f"category {BACKGROUND}: it is class 0 without being listed; remove it")
    if not 0 < len(valid) < MAX_CLASSES:
        faults.append(f"{len(valid)} categories; 1 to {MAX_CLASSES - 1} can be told apart")
    return dict(sorted(valid.items()))


def object_fault(annotation, photos, class_ids):
    """What is wrong with an annotation apart from its id, or None."""
    image_id, category = annotation.get("image_id"), annotation.get("category_id")
    if type(image_id) is not int or image_id not in photos:
        return f"is of image {clean(image_id)}, which is not in images"
    if type(category) is not int or category not in class_ids:
        return f"of image {image_id} has the unknown category {clean(category)}"
    name, size = photos[image_id]["file_name"], photos[image_id]["size"]
    fault = None if size_fault(*size) else segmentation_fault(annotation.get("segmentation"), *size)
    return f"of image {image_id} ({name}) has {fault}" if fault else None


def read_coco(path, labelled):
    """(photos, categories, faults) of one COCO file, which is not trusted in anything.

    photos: dicts with id, file_name, size (height, width), group, objects, a list of (class_id, segmentation), where
    class ids count the categories from 1 by id, odd, the ids of annotations with odd polygons, and faulty. faults: one
    line each; when there are any, the rest is not to be used.
    """
    coco, faults, photos = read_json(path), [], {}
    lists = ("images", "categories", "annotations") if labelled else ("images", "categories")
    if not isinstance(coco, dict) or not all(isinstance(coco.get(k), list) for k in lists):
        return [], {}, [f"{path.name}: not a COCO file: it needs the lists {', '.join(lists)}"]
    for image, id_fault in entries(coco, "images", faults):
        size, group = (image.get("height"), image.get("width")), image.get("group")
        name, name_wrong = clean(image.get("file_name")), name_fault(image.get("file_name"), path.parent)
        wrong = [fault for fault in (name_wrong, id_fault, size_fault(*size)) if fault]
        faults += [f"image {clean(image.get('id'))} ({name}) {fault}" for fault in wrong]
        if not id_fault:
            photos[image["id"]] = {"id": image["id"], "file_name": name, "size": size, "objects": [], "odd": [],
                                   "group": "" if group is None else clean(group), "faulty": bool(wrong)}
    categories = read_categories(coco, faults)
    class_ids = {category: class_id for class_id, category in enumerate(categories, 1)}
    for annotation, id_fault in entries(coco, "annotations", faults) if labelled else ():
        if fault := id_fault or object_fault(annotation, photos, class_ids):
            faults.append(f"annotation {clean(annotation.get('id'))} {fault}")
        else:
            photo, segmentation = photos[annotation["image_id"]], annotation.get("segmentation")
            photo["objects"].append((class_ids[annotation["category_id"]], segmentation))
            polygons = segmentation if isinstance(segmentation, list) and not photo["faulty"] else ()
            photo["odd"] += [annotation["id"]] if any(is_odd(p, *photo["size"]) for p in polygons) else []
    sound = [photo for photo in photos.values() if not photo["faulty"]]
    return sound, categories, [f"{path.name}: {fault}"[:500] for fault in faults]


# ---- data: masks, folds, samples ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The photos of train or test in the JSON's order, with their painted masks."""
    root: Path
    classes: list  # names by class id
    ids: list
    file_names: list
    sizes: list  # (height, width)
    groups: list  # a label each; photos that must stay on one side of a fold share it
    pixels: list  # [class_id] pixel counts each; empty for test
    objects: list  # {"sizes": ..., "covered": ...} of paint_mask each; empty for test
    digests: list  # hash of each photo's content, "" of one that can't be read
    masks: np.ndarray | None  # the masks one after another, flat; None for test
    photos: np.ndarray | None  # likewise the decoded photos, three bytes a pixel; None unless they are cached
    faults: list  # what is wrong with each photo, or None; only a test photo may have one
    odd: list  # [annotation id] of each, those with a polygon that leaves the photo or has no area
    fingerprint: str  # of the JSON, the paint order and the photos' content

    def image(self, index):
        """The photo; black if it can't be read."""
        if self.faults[index]:
            return np.zeros((*self.sizes[index], 3), np.uint8)
        if self.photos is not None:
            first, end = 3 * self.starts[index], 3 * self.starts[index + 1]
            return np.asarray(self.photos[first:end]).reshape(*self.sizes[index], 3)
        try:
            return read_image(self.root / self.file_names[index], *self.sizes[index])
        except OSError as e:
            name = f"image {self.ids[index]} ({self.file_names[index]})"
            raise OSError(f"{name} has changed: {e.strerror}; run the same again") from None

    @cached_property
    def starts(self):
        return pixel_starts(self.sizes)

    def mask(self, index):
        return self.masks[self.starts[index]:self.starts[index + 1]].reshape(self.sizes[index])

    def truth(self, index):
        """The mask as the leaderboard sees it: of 512 x 512 the competition's mask[::2, ::2]; IGNORE_INDEX for test."""
        import cv2
        if self.masks is None:
            return np.full((SUBMIT_SIZE, SUBMIT_SIZE), IGNORE_INDEX, np.uint8)
        return cv2.resize(self.mask(index), (SUBMIT_SIZE, SUBMIT_SIZE), interpolation=cv2.INTER_NEAREST)


def pixel_starts(sizes):
    """Where the pixels of each photo begin when all stand one after another, and where the last end."""
    return [0, *accumulate(map(math.prod, sizes))]


def load_data(data, cache, paint="area", decoded=False):
    """(train, test) Splits of the folder `data`, checked in one pass; raises SystemExit that lists all faults at once.

    Test photos that can't be read only bring a warning each, while there are others: a submission needs all its rows.
    Masks are painted once into `cache` under a hash of the JSON files, the settings and the code, so a stale cache is
    never read; photos whose content changed since are checked again. Nothing is written under `data`. With `decoded`
    the training photos are cached too, and whoever comes later reads them there.
    """
    data, hashes = Path(data), Hashes(cache)
    check_output(data, cache)
    paths = data_files(data)
    folder = cache_folder(cache, paths, paint, hashes)
    splits = open_cache(folder, data, hashes)
    if splits is None or decoded and splits[0].photos is None:
        with lock(folder, wait=True):  # the first to come builds
            splits = open_cache(folder, data, hashes) or build_cache(folder, paths, paint, hashes)
            if decoded and splits and splits[0].photos is None:
                with atomic_write(folder / "photos.npy") as scratch, open(scratch, "wb") as f:
                    write_npy_header(f, (3 * splits[0].starts[-1],))
                    for index in tqdm(range(len(splits[0].ids)), "decoding photos", disable=None):
                        f.write(splits[0].image(index))
                splits = open_cache(folder, data, hashes)
    hashes.save()
    if splits is None:
        raise SystemExit(f"photos in {data} changed while they were read: run it again")
    for fault in filter(None, splits[1].faults):
        print(f"warning: test.json: {fault}: it counts as background", flush=True)
    return splits


def data_files(data):
    """The two JSON files of the folder `data`, of train and of test; raises SystemExit when one is missing."""
    data = Path(data)
    if not data.is_dir():
        raise SystemExit(f"{data}: no such folder; DATA is the competition's folder with train.json and test.json")
    train_json = data / "train_all.json"
    paths = (train_json if train_json.exists() else data / "train.json", data / "test.json")
    if missing := [str(p) for p in paths if not p.is_file()]:
        raise SystemExit(f"no {' and no '.join(missing)}; DATA is the competition's folder")
    return paths


def cache_folder(cache, paths, paint, hashes):
    return Path(cache) / short_hash([hashes(path) for path in paths], paint, code_of("masks"))


def fingerprint(json_hash, paint, digests):
    """What names a split's content: its JSON, the paint order and the hashes of its photos, "" where one is missing."""
    return f"{json_hash} {paint} {short_hash(*digests)}"


def open_cache(folder, data, hashes):
    """The Splits in `folder`, or None when it isn't whole or a photo has changed or gone since."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        masks = {"train": np.load(folder / "masks.npy", mmap_mode="r")}
        photos = {"train": np.load(folder / "photos.npy", mmap_mode="r")} if (folder / "photos.npy").exists() else {}
    except (OSError, ValueError, EOFError):  # EOFError: an empty .npy
        return None
    for entry in index.values():
        if hashes.of_all([f"{data}/{name}" for name in entry["file_names"]]) != entry["digests"]:
            return None
    return tuple(Split(root=data, masks=masks.get(name), photos=photos.get(name), **entry)
                 for name, entry in index.items())


def build_cache(folder, paths, paint, hashes):
    """Check everything, write masks.npy and, last, index.json into `folder`, and return open_cache of it."""
    check_files()  # else the workers would paint with other code than the folder is named for
    root = paths[0].parent
    train, categories, faults = read_coco(paths[0], labelled=True)
    test, test_categories, test_faults = read_coco(paths[1], labelled=False)
    faults += test_faults
    if categories != test_categories and categories and test_categories:
        faults.append(f"{paths[0].name} and {paths[1].name} have different categories")
    photos = train + test
    starts = pixel_starts(photo["size"] for photo in train)
    (folder / "photos.npy").unlink(missing_ok=True)  # of photos that have changed
    with atomic_write(folder / "masks.npy") as scratch:
        with open(scratch, "wb") as f:
            write_npy_header(f, (starts[-1],))
            places = [None if faults else f.tell() + start for start in starts[:-1]] + [None] * len(test)
        check = partial(check_photo, root, paint, len(categories) + 1, scratch)
        try:
            with without_main(), ProcessPoolExecutor(mp_context=get_context("forkserver"),
                                                     initializer=tune_process) as pool:
                found = pool.map(check, photos, places, chunksize=8)
                for photo, facts in zip(photos, tqdm(found, "checking photos", len(photos), disable=None), strict=True):
                    if key := facts.pop("key"):
                        hashes.remember(key, facts["digest"])
                    photo |= facts
        except BrokenExecutor:
            raise SystemExit("a process died while it checked the photos: out of memory, or killed") from None
        if faults or any(photo["fault"] for photo in train) or all(photo["fault"] for photo in test):
            faults += filter(None, (photo["fault"] for photo in photos))
            raise SystemExit("\n".join([*faults, f"{len(faults)} fault(s) in the data: mend or remove what is listed"]))
    lists = {"ids": "id", "file_names": "file_name", "sizes": "size", "pixels": "pixels", "objects": "painted",
             "digests": "digest", "faults": "fault", "odd": "odd"}
    index = {name: {key: [photo[of_one] for photo in part if of_one in photo] for key, of_one in lists.items()}
             for name, part in (("train", train), ("test", test))}
    for path, part, entry in zip(paths, (train, test), index.values(), strict=True):
        entry.update({"groups": merge_groups(part, entry["digests"]), "classes": [BACKGROUND, *categories.values()],
                      "fingerprint": fingerprint(hashes(path), paint, entry["digests"])})
    write_json(folder / "index.json", index)
    return open_cache(folder, root, hashes)


@contextmanager
def without_main():
    """Let worker processes start without the main module: a script without a guard would begin anew in each of them,
    and a notebook's or a shell's can't be imported.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def write_npy_header(f, shape):
    """Begin a .npy of uint8 in an open file; the bytes that follow are written in order, so a full disk is an error."""
    np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})


def check_photo(root, paint, n_classes, masks, photo, place):
    """{"fault", "digest", "key"} of a photo; of one with a `place`, whose mask goes there in the file `masks`, also
    "pixels" and "painted". key: of Hashes, from before it was read.
    """
    path = root / photo["file_name"]
    found = {"fault": None, "digest": "", "key": None}
    with suppress(OSError):  # what is wrong with the file is said by reading it
        found |= {"key": Hashes.key(path), "digest": file_hash(path)}
    try:
        read_image(path, *photo["size"], check=True)
    except OSError as e:
        return found | {"fault": f"image {photo['id']} ({photo['file_name']}) {e.strerror}"}
    if place is None:
        return found
    mask, pixels, sizes, covered = paint_mask(photo["objects"], *photo["size"], paint, n_classes)
    with open(masks, "rb+") as f:  # written here: on its way to another process a mask is copied four times
        f.seek(place)
        f.write(mask)
    return found | {"pixels": pixels, "painted": {"sizes": sizes, "covered": covered}}


def merge_groups(photos, digests):
    """A label for each photo: equal for those linked, over any number of steps, by group or by identical content."""
    parents = {}  # a forest over contents and groups: whatever is linked has one root

    def find(key):
        while (parent := parents.get(key, key)) != key:
            key = parent
        return key

    for photo, digest in zip(photos, digests, strict=True):
        if photo["group"]:
            parents[find(f"content {digest}")] = find(f"group {photo['group']}")
    return [find(f"content {digest}") for digest in digests]


def make_folds(present, groups, n_folds):
    """Fold of every image: multilabel-stratified (Sechidis et al. 2011, iterative stratification), groups kept whole.

    present: bool [N, K], which classes an image has; groups: N labels. Rarest class first, its largest group goes to
    the fold that still wants most of that class. No randomness, so folds don't depend on the seed.
    """
    names, group_of = np.unique(groups, return_inverse=True)
    if n_folds > len(names):
        raise SystemExit(f"{n_folds} folds of {len(names)} group(s) of images: ask for fewer folds")
    left = np.zeros((len(names), present.shape[1] + 1), int)  # images with the class; in the last column all images
    np.add.at(left, group_of, np.column_stack([present, np.ones(len(present), int)]))
    wanted = np.tile(left.sum(0) / n_folds, (n_folds, 1))
    fold_of = np.empty(len(names), int)
    for _ in names:
        totals = left.sum(0)
        rarest = np.where(totals > 0, totals, totals.max() + 1).argmin()
        group = left[:, rarest].argmax()
        fold_of[group] = fold = np.lexsort((-wanted[:, -1], -wanted[:, rarest]))[0]
        wanted[fold] -= left[group]
        left[group] = 0  # done
    return fold_of[group_of]


def read_folds(path, ids, n_folds):
    """([N] fold of each image of `ids`, None) from a folds.csv, or (None, what is wrong with it as a whole).

    It may have been edited by hand: blanks, empty lines, the order of lines and columns besides image_id and fold don't
    matter. Raises SystemExit for a fold that is no number and for an image that is listed twice.
    """
    fold_of = {}
    for line, row in enumerate(read_csv(path, ("image_id", "fold")), 2):
        image_id, text = row["image_id"].strip(), row["fold"].strip()
        if not image_id and not text:
            continue
        if image_id in fold_of:
            raise SystemExit(f"{path} line {line}: image {clean(image_id)} is listed twice")
        if not text.isdecimal():
            raise SystemExit(f"{path} line {line}: the fold of image {clean(image_id)} is {clean(text)!r}, no number")
        fold_of[image_id] = int(text)
    if fold_of.keys() != {str(i) for i in ids}:
        return None, "lists other images than DATA"
    if (found := set(fold_of.values())) != set(range(len(found))):
        raise SystemExit(f"{path} has the folds {sorted(found)}: one number must be wrong")
    if found != set(range(n_folds)):
        return None, f"has the folds {sorted(found)}, not 0 to {n_folds - 1}"
    return np.array([fold_of[str(i)] for i in ids]), None


def load_folds(exp, train, n_folds, renew=False):
    """Fold of every training image, from EXP/folds.csv, which is written when it isn't there.

    One that is of other images or another number of folds is an error, or with `renew` replaced, keeping a copy.
    """
    path = Path(exp) / "folds.csv"
    with lock(exp, wait=True):
        if path.exists():
            folds, wrong = read_folds(path, train.ids, n_folds)
            if not wrong and len(set(zip(train.groups, folds.tolist(), strict=True))) > len(set(train.groups)):
                wrong = "has a group of images in two folds"
            if not wrong:
                return folds
            if not renew:
                raise SystemExit(f"{path} {wrong}: choose another EXP, or run train.py --check to make it anew")
            free = (path.with_name(f"folds-{number}.csv") for number in count(1))
            copy = shutil.copy2(path, next(copy for copy in free if not copy.exists()))
            print(f"{path} {wrong}: made anew, the old one is {copy}")
        folds = make_folds(np.array(train.pixels)[:, 1:] > 0, train.groups, n_folds)
        write_csv(path, [{"image_id": i, "group": g, "fold": f}
                         for i, g, f in zip(train.ids, train.groups, folds.tolist(), strict=True)])
    return folds


def folds_hash(ids, folds):
    """What names the folds of images, however their file is written."""
    return short_hash(*(f"{image_id} {fold}" for image_id, fold in zip(ids, folds, strict=True)))


class EvalPhotos:
    """Items for a DataLoader: (image uint8 [scale, scale, 3], truth uint8 [SUBMIT_SIZE, SUBMIT_SIZE]) of `indices`.

    Photos are squashed to the square that the network sees.
    """

    def __init__(self, split, indices, scale):
        self.split, self.indices, self.scale = split, indices, scale

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, item):
        import cv2
        index = self.indices[item]
        image = self.split.image(index)
        # INTER_AREA averages when it shrinks but repeats pixels when it enlarges
        how = cv2.INTER_AREA if self.scale < min(image.shape[:2]) else cv2.INTER_LINEAR
        return cv2.resize(image, (self.scale, self.scale), interpolation=how), self.split.truth(index)


class TrainSamples:
    """Augmented (image uint8 [scale, scale, 3], mask uint8 [scale, scale]) by key (epoch, index); batches by such keys.

    Everything random is drawn from (seed, epoch, index): neither resuming nor the number of workers changes a sample.
    entries: (Split, index, None or a pseudo label, uint8 class ids [H, W] or probabilities [C, H, W]) each.
    mix: probability and weights [C] for ClassMix, or None.
    """

    def __init__(self, entries, augment, seed, mix=None):
        self.entries, self.augment, self.seed, self.mix = entries, augment, seed, mix

    def __getitem__(self, key):
        import cv2
        epoch, index = key
        split, i, label = self.entries[index]
        image, rng = split.image(i), np.random.default_rng([SAMPLE, self.seed, epoch, index])
        if label is not None and label.ndim == 3:
            label = draw_label(label, rng.random())
        mask = (np.asarray(split.mask(i)) if label is None
                else cv2.resize(label, image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT))
        return self.augment(image, mask, rng)

    def __getitems__(self, keys):  # what a DataLoader asks for
        import torch
        images, masks = map(np.stack, zip(*(self[key] for key in keys), strict=True))
        if self.mix and len(keys) > 1:
            rng = np.random.default_rng([MIX, self.seed, *np.ravel(keys).tolist()])
            images, masks = classmix(images, masks, *self.mix, rng)
        return torch.from_numpy(images), torch.from_numpy(masks)


def draw_label(probs, u):
    """Class ids uint8 [H, W] drawn from probs uint8 [C, H, W] with one u in [0, 1) for all pixels.

    Each pixel has a class as often as it is likely, so over the epochs the loss is that of soft targets; since
    neighbours share u, every draw has objects and no noise. IGNORE_INDEX where no class has a probability.
    """
    upto = probs.cumsum(0, dtype=np.uint16)
    label = (upto <= upto[-1] * u).sum(0, dtype=np.uint8)
    return np.where(upto[-1] > 0, label, np.uint8(IGNORE_INDEX))


class EpochBatches:
    """Batches of keys (epoch, index), in an order drawn from (seed, epoch); set `epoch` before each pass.

    Each rank gets its share of every batch. A last batch that would leave a rank fewer than two images, which batch
    norm needs, joins the batch before it. With `odds` [N] images are drawn by them, else each comes once.
    The last `n_pseudo` of the images have pseudo labels. With a `ratio` every batch has that many of them to each
    labelled image, and an epoch is once through the labelled ones; from `labelled_from` on epochs have only those.
    """
    first = 0  # set it to begin at a later batch

    def __init__(self, n_images, batch_size, seed, odds=None, n_pseudo=0, ratio=0, labelled_from=math.inf):
        self.n_images, self.batch_size, self.seed, self.odds, self.epoch = n_images, batch_size, seed, odds, 0
        self.n_pseudo, self.ratio, self.labelled_from = n_pseudo, ratio, labelled_from
        self.rank, self.n_ranks = ranks()

    def sources(self):
        """[(image numbers, how many of them a batch has)] of this epoch; it is over when the first source is."""
        images = np.arange(self.n_images)
        labelled, pseudo = np.split(images, [self.n_images - self.n_pseudo])
        if self.epoch >= self.labelled_from:
            return [(labelled, self.batch_size)]
        if not self.ratio or not self.n_pseudo:
            return [(images, self.batch_size)]
        share = int(np.clip(round(self.batch_size / (1 + self.ratio)), 1, self.batch_size - 1))
        return [(labelled, share), (pseudo, self.batch_size - share)]

    def __len__(self):
        (images, share), *others = self.sources()
        full, left = divmod(len(images), share)
        return max(1, full + (left > 0 and left + sum(n for _, n in others) >= 2 * self.n_ranks))

    def __iter__(self):
        rng, parts = np.random.default_rng([ORDER, self.seed, self.epoch]), []
        for images, share in self.sources():
            n = share * len(self) if parts else len(images)
            if self.odds is not None:
                order = rng.choice(images, n, p=self.odds[images] / self.odds[images].sum())
            else:
                order = np.concatenate([rng.permutation(images) for _ in range(math.ceil(n / len(images)))])[:n]
            parts.append(np.split(order, share * np.arange(1, len(self))))
        for batch in list(map(np.concatenate, zip(*parts, strict=True)))[self.first:]:
            yield [(self.epoch, index) for index in batch[self.rank::self.n_ranks].tolist()]


def rare_odds(present):
    """[N] chances to draw each image: inverse to the number of images with its rarest class; present bool [N, C]."""
    odds = (present / present.sum(0).clip(1)).max(1)
    return odds / odds.sum()


# ---- augmentation and ClassMix --------------------------------------------------------------------------------------


def resampling():
    """How an image and its mask are resampled: bilinear and exact nearest."""
    import cv2
    return {"interpolation": cv2.INTER_LINEAR, "mask_interpolation": cv2.INTER_NEAREST_EXACT}


def squash(A, size):
    return [A.Resize(*size, **resampling())]


def crop_and_turn(A, size):
    """A crop of a quarter to all of the photo, in one of the 8 combinations of flips and quarter turns."""
    import cv2

    class D4(A.D4):  # the same by cv2, in a tenth of the time that numpy takes to transpose an RGB image
        def apply(self, img, group_element, **_):
            img = cv2.transpose(img) if group_element in ("t", "r90", "r270", "hvt") else img
            axis = {"v": 0, "r90": 0, "h": 1, "r270": 1, "r180": -1, "hvt": -1}.get(group_element)
            return img if axis is None else cv2.flip(img, axis)
    return [A.RandomResizedCrop(size, scale=(0.25, 1), **resampling()), D4(p=1)]


def colours(A):
    return [A.RandomBrightnessContrast(0.2, 0.2, p=0.5), A.HueSaturationValue(10, 20, 10, p=0.3)]


def damages(A):
    """Blur or noise, distortion, cutout.

    Where a distortion brings in pixels from outside, and where a cutout hides the image, the mask is IGNORE_INDEX.
    """
    import cv2
    warp = {"interpolation": cv2.INTER_LINEAR, "mask_interpolation": cv2.INTER_NEAREST,
            "border_mode": cv2.BORDER_CONSTANT, "fill_mask": IGNORE_INDEX}
    return [A.OneOf([A.GaussianBlur((3, 7)), A.GaussNoise((0.02, 0.1)), A.ImageCompression(quality_range=(40, 90))],
                    p=0.3),
            A.OneOf([A.GridDistortion(**warp), A.ElasticTransform(60, 8, **warp)], p=0.3),
            A.CoarseDropout((1, 6), (0.05, 0.2), (0.05, 0.2), fill_mask=IGNORE_INDEX, p=0.3)]


# recipe -> function (albumentations, size) -> what happens to a training image and its mask together, ending at `size`
AUGMENTATIONS = {
    "none": squash,
    "flip": lambda A, size: [*squash(A, size), A.HorizontalFlip(p=0.5)],
    "basic": crop_and_turn,
    "colour": lambda A, size: [*crop_and_turn(A, size), *colours(A)],
    "strong": lambda A, size: [*crop_and_turn(A, size), *colours(A), *damages(A)]}


def make_augmentation(name, scale):
    """A function (image, mask, rng) -> (image, mask) of SCALE x SCALE; all randomness comes from the two generators."""
    import random

    import albumentations as A
    transform = A.Compose(AUGMENTATIONS[name](A, (scale, scale)))

    def augment(image, mask, rng):
        transform.set_random_state(rng, random.Random(int(rng.integers(2 ** 32))))
        out = transform(image=image, mask=mask)
        return out["image"], out["mask"]
    return augment


def classmix(images, masks, prob, weights, rng):
    """ClassMix (arXiv 2007.07936): onto each image of a batch half the classes of another, with probability `prob`.

    images uint8 [B, H, W, 3], masks uint8 [B, H, W]; the classes are drawn in proportion to `weights` [C], without
    replacement. Pixels of IGNORE_INDEX are never pasted. Returns a new batch.
    """
    import cv2
    mixed, labels, n = images.copy(), masks.copy(), len(images)
    shift = int(rng.integers(1, n))
    times = rng.exponential(size=(n, len(weights))) / weights  # with these rates the k earliest are k draws
    for i in np.flatnonzero(rng.random(n) < prob):
        image, mask = images[i - shift], masks[i - shift]
        present = np.flatnonzero(cv2.calcHist([mask], [0], None, [len(weights)], [0, len(weights)]))
        chosen = np.zeros(256, np.uint8)
        chosen[present[times[i, present].argsort()[:(len(present) + 1) // 2]]] = 1
        paste = cv2.LUT(mask, chosen)
        cv2.copyTo(image, paste, mixed[i])
        cv2.copyTo(mask, paste, labels[i])
    return mixed, labels


# ---- models ---------------------------------------------------------------------------------------------------------

# name -> options of segmentation-models-pytorch's decoder; 64 and 32 channels of fpn train three times as many images/s
# on a CPU as its own 256 and 128, which are fpn-wide
DECODERS = {"unet": {}, "unetplusplus": {}, "manet": {}, "linknet": {}, "pspnet": {}, "deeplabv3": {},
            "deeplabv3plus": {}, "pan": {}, "upernet": {}, "segformer": {}, "dpt": {}, "fpn-wide": {},
            "efficientdet": {}, "fpn": {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32}}
STRIDE = 32  # of the deepest encoder map: what the sides of an input must be a multiple of


def build_model(name, n_classes, weights="none"):
    """A segmentation model DECODER/ENCODER that turns float [B, 3, H, W] into logits [B, n_classes, H, W].

    weights: "none", "imagenet" (downloaded), or a file with a plain timm or torchvision state dict of the encoder.
    Raises SystemExit when the name, the pair or the weights don't work, with the reason.
    """
    from urllib.request import getproxies

    import huggingface_hub
    import segmentation_models_pytorch as smp
    import timm
    import torch
    decoder, encoder = name.split("/", 1)
    options = DECODERS[decoder] | {"encoder_weights": None}
    of_timm, from_file = encoder.startswith("tu-"), weights not in ("none", "imagenet")
    state = load_checkpoint(weights) if from_file else {}
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise SystemExit(f"{weights}: not a plain state dict, which is a dict of tensors")
    logging.getLogger("timm.models").setLevel(logging.ERROR)  # it warns of the classifier's keys, which aren't needed
    try:
        if weights == "imagenet":
            try:
                socket.create_connection(("huggingface.co", 443), timeout=5).close()
            except OSError:  # without a proxy or mirror: the hub would try for a minute; what it has kept will do
                huggingface_hub.constants.HF_HUB_OFFLINE |= not getproxies() and "HF_ENDPOINT" not in os.environ
            options["encoder_weights"] = True if of_timm else weights
        elif from_file and of_timm:
            with torch.device("meta"):  # a trial without memory: given a file, timm itself lets keys be missing
                timm.create_model(encoder.removeprefix("tu-")).load_state_dict(state, assign=True)
            options |= {"encoder_weights": True, "pretrained_cfg_overlay": {"file": str(weights)}}
        model = (build_efficientdet(encoder, n_classes, **options) if decoder == "efficientdet" else
                 smp.create_model(decoder.removesuffix("-wide"), encoder, classes=n_classes, **options))
        if from_file and not of_timm:
            model.encoder.load_state_dict(state)
    except Exception as e:  # smp, timm and the hub raise many types; the reason is in the message
        cure = "; to work without the network bring the weights as --weights FILE, or take --weights none"
        raise SystemExit(f"{name} with weights {weights}: {shorten(str(e), 2000)}"
                         f"{cure if weights == 'imagenet' else ''}") from None
    return padded(model)


# (width, layers) of the BiFPN in EfficientDet-D0 to D7 (table 1 of arXiv 1911.09070), by the size in the encoder's
# name, b0 to b7 or lite0 to lite4; D0's if it has none
BIFPN_SIZES = ((64, 3), (88, 4), (112, 5), (160, 6), (224, 7), (288, 7), (384, 8), (384, 8))


def bifpn_modules():
    """The modules (Node, BiFPNLayer, BiFPN): the fusion of some maps, eight of them, and the whole decoder."""
    from torch import nn, ones
    from torch.nn.functional import interpolate, silu
    down = nn.MaxPool2d(3, stride=2, padding=1)  # of n pixels ceil(n / 2)

    class Node(nn.Module):
        def __init__(self, width, n_inputs):
            super().__init__()
            self.weights = nn.Parameter(ones(n_inputs))
            self.conv = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                                      nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))

        def forward(self, *maps):
            """[B, width, h, w] from n such maps: fast normalised fusion (section 3.3), swish, separable convolution."""
            weights = self.weights.relu()
            return self.conv(sum(w * x for w, x in zip(weights / (1e-4 + weights.sum()), maps, strict=True)))

    class BiFPNLayer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.m6, self.m5, self.m4, self.o3 = (Node(width, 2) for _ in range(4))
            self.o4, self.o5, self.o6, self.o7 = (Node(width, n) for n in (3, 3, 3, 2))

        def forward(self, p3, p4, p5, p6, p7, q4, q5):
            """P3..P7, each [B, width, h, w], from P3..P7; q4 and q5 stand for P4 and P5 on the way up. Figure 2d."""
            m6 = self.m6(p6, interpolate(p7, p6.shape[2:]))  # to a size, not by 2: a level of 3 lies above one of 5
            m5 = self.m5(p5, interpolate(m6, p5.shape[2:]))
            m4 = self.m4(p4, interpolate(m5, p4.shape[2:]))
            o3 = self.o3(p3, interpolate(m4, p3.shape[2:]))
            o4 = self.o4(q4, m4, down(o3))
            o5 = self.o5(q5, m5, down(o4))
            o6 = self.o6(p6, m6, down(o5))
            return o3, o4, o5, o6, self.o7(p7, down(o6))

    class BiFPN(nn.Module):
        def __init__(self, channels, width, n_layers):
            super().__init__()
            # as in google/automl: P6 too starts from the encoder's last map, and the first way up projects anew (q)
            self.p2, self.p3, self.p4, self.p5, self.p6, self.q4, self.q5 = (
                nn.Sequential(nn.Conv2d(int(channels[i]), width, 1, bias=False), nn.BatchNorm2d(width))
                for i in (-4, -3, -2, -1, -1, -2, -1))  # int: Conv2d refuses floats
            self.layers = nn.ModuleList(BiFPNLayer(width) for _ in range(n_layers))
            self.join = Node(width, 6)

        def forward(self, features):
            """[B, width, H/4, W/4] from an encoder's maps, the last four at strides 4 to 32 and `channels` deep."""
            x2, x3, x4, x5 = features[-4:]
            p2, p6, q4, q5 = self.p2(x2), down(self.p6(x5)), self.q4(x4), self.q5(x5)
            levels = self.p3(x3), self.p4(x4), self.p5(x5), p6, down(p6)
            for layer in self.layers:
                _, q4, q5, *_ = levels = layer(*levels, q4, q5)
            # P3 alone would leave half of the last layer untrained; nearest would show P7's squares, 128 px wide
            return silu(self.join(p2, *(interpolate(p, p2.shape[2:], mode="bilinear") for p in levels)))
    return Node, BiFPNLayer, BiFPN


def build_efficientdet(encoder_name, n_classes, encoder_weights, **options):
    """EfficientDet (arXiv 1911.09070) from float [B, 3, H, W] to logits [B, n_classes, H, W]: a segmentation head in
    place of its detection heads. The options go to smp.encoders.get_encoder.
    """
    import segmentation_models_pytorch as smp
    size = re.search(r"(?<![a-z])(?:b|lite)([0-7])(?!\d)", encoder_name)
    width, n_layers = BIFPN_SIZES[int(size[1]) if size else 0]
    *_, BiFPN = bifpn_modules()
    model = smp.base.SegmentationModel()
    model.encoder = smp.encoders.get_encoder(encoder_name, weights=encoder_weights, **options)
    model.decoder = BiFPN(model.encoder.out_channels, width, n_layers)
    model.segmentation_head = smp.base.SegmentationHead(width, n_classes, kernel_size=1, upsampling=4)
    model.classification_head = None
    model.initialize()
    return model


def padded(model):
    """The same model, which now pads images whose sides are no multiples of STRIDE and crops its logits back."""
    from torch.nn.functional import pad

    class Padded(type(model)):
        def forward(self, images):
            height, width = images.shape[2:]
            if height % STRIDE or width % STRIDE:
                images = pad(images, (0, -width % STRIDE, 0, -height % STRIDE))
            return super().forward(images)[..., :height, :width]
    model.__class__ = Padded
    return model


def encoder_mean_std(name):
    """(mean, std) per RGB channel, of values 0..1, that the encoder's pretrained weights were made with."""
    from timm.models import PretrainedCfg, get_pretrained_cfg
    encoder = name.split("/", 1)[1].replace("timm-mobilenetv3", "tf_mobilenetv3")  # smp does so too
    encoder = encoder.removeprefix("tu-").removeprefix("timm-")
    # smp's own that timm calls otherwise; of what timm doesn't know ImageNet's
    timms = {"inceptionv4": "inception_v4", "inceptionresnetv2": "inception_resnet_v2", "xception": "legacy_xception"}
    known = get_pretrained_cfg(timms.get(encoder, encoder)) or PretrainedCfg()
    return tuple(known.mean), tuple(known.std)


def normalise(images, mean, std):
    """float32 [B, 3, H, W] in channels_last memory from uint8 [B, H, W, 3], on the images' device."""
    import torch
    # [W, 3]: a row at a time is several times faster than a pixel
    mean, std = (torch.tensor(v, device=images.device).mul(255).repeat(images.shape[2], 1) for v in (mean, std))
    return images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


# ---- losses ---------------------------------------------------------------------------------------------------------


def region_loss(index):
    """Return a loss term over regions: the mean of 1 - index(overlap, missed, invented) over the classes in the truth.

    The index gets three float32 [C], summed over the batch: the probability of each class on its own pixels, what is
    lacking to all of them, and its probability on pixels of other classes. Soft IoU: Rahman and Wang 2016.
    """
    def term(log_probs, log_true, target, labelled):
        rows = target.flatten(0, 1)  # [B x H, W]: a float32 that millions of pixels are added to one by one loses them
        per_row = log_probs.new_zeros(len(rows), log_probs.shape[1])
        overlap = per_row.scatter_add(1, rows, (log_true.exp() * labelled).flatten(0, 1)).sum(0)
        truth = per_row.scatter_add(1, rows, labelled.flatten(0, 1).float()).sum(0)
        predicted = (log_probs.exp() * labelled[:, None]).sum((0, 2, 3))
        present = truth > 0  # no branch and no boolean index: either would make a GPU wait for the answer
        found = index(overlap, (truth - overlap).where(present, 1), predicted - overlap)
        return ((1 - found) * present).sum() / present.sum().clamp(min=1)
    return term


def lovasz_loss(log_probs, log_true, target, labelled):
    """Lovasz-softmax (Berman et al. 2018), mean over the classes in the batch's truth."""
    from segmentation_models_pytorch.losses import LovaszLoss
    mask = target.where(labelled, IGNORE_INDEX)
    return LovaszLoss("multiclass", ignore_index=IGNORE_INDEX)(log_probs, mask).sum()  # of no pixel: empty, sum 0


def pixel_loss(log_probs, log_true, target, labelled, smoothing, weights, gamma):
    """Cross-entropy, mean over labelled pixels weighted by class, as torch defines smoothing and weights.

    gamma > 0 turns down pixels that are right already by (1 - probability) ** gamma: focal loss (Lin et al. 2017).
    """
    weight = labelled if weights is None else weights[target] * labelled
    loss = -log_true * weight * ((1 - log_true.exp()) ** gamma if gamma else 1)
    if smoothing:
        even = -(log_probs if weights is None else log_probs * weights[:, None, None]).mean(1) * labelled
        loss = (1 - smoothing) * loss + smoothing * even
    return loss.sum() / weight.sum().clamp(min=1e-6)


def iou(overlap, missed, invented):
    return overlap / (overlap + missed + invented)


def dice(overlap, missed, invented):
    return 2 * overlap / (2 * overlap + missed + invented)


cross_entropy = partial(pixel_loss, gamma=0)
focal = partial(pixel_loss, gamma=2)
# name -> (term over regions or None, term over pixels or None)
LOSSES = {"iou_ce": (region_loss(iou), cross_entropy), "ce": (None, cross_entropy), "iou": (region_loss(iou), None),
          "dice_ce": (region_loss(dice), cross_entropy), "focal": (None, focal), "lovasz": (lovasz_loss, None)}


def make_loss(name, ratio=0.4, smoothing=0.0, weights=None):
    """A function (logits [B, C, H, W], mask int64 [B, H, W]) -> float32 scalar over the labelled pixels.

    ratio: share of the region term where a loss has both; weights: float [C] of the pixel term, or None. A batch
    without a labelled pixel gives 0.
    """
    region, pixel = LOSSES[name]
    ratio = 0 if region is None else 1 if pixel is None else ratio

    def loss(logits, mask):
        labelled = mask != IGNORE_INDEX
        target = mask.where(labelled, 0)
        log_probs = logits.float().log_softmax(dim=1)
        parts = log_probs, log_probs.gather(1, target[:, None]).squeeze(1), target, labelled
        total = ratio * region(*parts) if ratio else 0
        return total + (1 - ratio) * pixel(*parts, smoothing, weights) if ratio < 1 else total
    return loss


# ---- metrics --------------------------------------------------------------------------------------------------------


def confusion(pred, mask, n_classes):
    """int64 [C, C] pixel counts of one image, rows the truth; pred, mask uint8 [H, W], IGNORE_INDEX left out."""
    import cv2
    codes = mask.astype(np.uint16) * n_classes + pred
    counts = cv2.calcHist([codes], [0], None, [n_classes ** 2], [0, n_classes ** 2])  # IGNORE_INDEX lies beyond
    return counts.astype(np.int64).reshape(n_classes, n_classes)  # from float32, exact up to 16 million pixels


def class_iou(confusion):
    """IoU by class from [..., C, C] pixel counts; NaN for a class in neither truth nor prediction."""
    hits = np.einsum("...ii->...i", confusion).astype(float)
    union = confusion.sum(-1) + confusion.sum(-2) - hits
    return np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)


def image_miou(confusions):
    """[N] mIoU of each of the [N, C, C] counts: a class only in the prediction counts 0, one in neither is skipped."""
    return np.nanmean(class_iou(confusions), axis=-1)


def scores(confusions, batch_size):
    """v1, v2, v3 mIoU and the per-class IoU of v2, from the counts [N, C, C] of each image in order.

    v1: mean over batches (the official baseline's), v2: of the summed counts, v3: mean over images (the leaderboard's).
    """
    batches = np.add.reduceat(confusions, np.arange(0, len(confusions), batch_size))
    iou = class_iou(confusions.sum(0))
    return {"v1": image_miou(batches).mean(), "v2": np.nanmean(iou), "v3": image_miou(confusions).mean(), "iou": iou}


# ---- pictures -------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours for the colour-blind, three of Tol's, white; class 1 has the first, after the last they repeat
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
           (136, 34, 85), (51, 34, 136), (187, 187, 187), (255, 255, 255))
COLOURS = np.array([(0, 0, 0), *(PALETTE[i % len(PALETTE)] for i in range(254)), (255, 0, 255)], np.uint8)


def overlay(image, mask=None, strength=0.6):
    """uint8 [S, S, 3] with S = SUBMIT_SIZE: the photo, greyed under the colours of a mask uint8 [H, W]."""
    import cv2
    photo = cv2.resize(image, (SUBMIT_SIZE, SUBMIT_SIZE), interpolation=cv2.INTER_AREA)
    if mask is None:
        return photo
    mask = cv2.resize(mask, (SUBMIT_SIZE, SUBMIT_SIZE), interpolation=cv2.INTER_NEAREST_EXACT)
    grey = photo.astype(np.float32).mean(2, keepdims=True)
    mixed = grey * (1 - strength) + COLOURS[mask] * strength
    return np.where((mask > 0)[..., None], mixed, photo).astype(np.uint8)


def foreground_ids(mask):
    """Class ids in a mask, in order, without background and IGNORE_INDEX."""
    return [c for c in np.unique(mask).tolist() if 0 < c < IGNORE_INDEX]


def named(mask, classes):
    """"Paper, Metal": the foreground in a mask."""
    return ", ".join(classes[c] for c in foreground_ids(mask)) or "nothing"


def write_sheet(path, rows, legend, across=1):
    """Write a PNG of lists of (caption, uint8 RGB tile of one size), `across` in a row, over {class id: text}."""
    from PIL import Image, ImageDraw, ImageFont
    rows = [sum(rows[i:i + across], []) for i in range(0, len(rows), across)]
    font, line = ImageFont.load_default(13), 18
    height, width = rows[0][0][1].shape[:2]
    sheet = Image.new("RGB", (width * max(map(len, rows)), (height + line) * len(rows) + line * len(legend)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (caption, tile) in enumerate(row):
            sheet.paste(Image.fromarray(tile), (c * width, r * (height + line) + line))
            draw.text((c * width + 3, r * (height + line) + 1), caption[:width // 7], "black", font)
    for i, (class_id, text) in enumerate(legend.items()):
        top = (height + line) * len(rows) + i * line
        draw.rectangle((4, top + 3, 30, top + line - 3), tuple(COLOURS[class_id].tolist()), "black")
        draw.text((36, top + 1), text, "black", font)
    with atomic_write(path) as scratch:
        sheet.save(scratch, format="png")


# ---- pages ----------------------------------------------------------------------------------------------------------


def data_url(kind, raw):
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def tile_url(tile):
    """A JPEG of an RGB picture uint8 [H, W, 3]."""
    import cv2
    return data_url("jpeg", cv2.imencode(".jpg", tile[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 85))[1])


def figure_urls(plot, height):
    """What plot(axes) draws, `height` inches high, as a PNG for light and one for dark screens."""
    from matplotlib import style
    from matplotlib.figure import Figure
    urls = []
    for look in ("default", "dark_background"):
        with style.context([look, {"text.parse_math": False, "font.size": 10}]), io.BytesIO() as f:  # a name isn't math
            figure = Figure((5.5, height), layout="constrained")
            plot(figure.subplots())
            figure.savefig(f, format="png", dpi=150, transparent=True)
            urls.append(data_url("png", f.getvalue()))
    return urls


def draw_bars(axes, classes, series, **labels):
    """Draw series {label: values by class id}, the first as bars, the others as marks.

    classes: {id: name} of those to show.
    """
    ids, rows = list(classes), range(len(classes))
    (bars, values), *others = series.items()
    axes.barh(rows, np.array(values)[ids], color=COLOURS[ids] / 255, edgecolor="grey")
    axes.barh(0, np.nan, color="grey", label=bars)  # for the legend
    for (label, values), mark in zip(others, cycle("oD^sv<>pPX"), strict=False):
        axes.plot(np.array(values)[ids], rows, mark, color="black", mfc="white", ms=5, label=label)
    axes.set_yticks(rows, [name[:22] for name in classes.values()])
    axes.invert_yaxis()
    axes.set(**labels)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)


def draw_heat(axes, values, rows, columns, **labels):
    """Shares [R, C] as colours and, while there is room, in percent; NaN stays empty."""
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if values.size <= 500 and value == value:
            axes.text(x, y, f"{100 * value:.0f}", color="black" if value > 0.6 else "white", ha="center", va="center")
    axes.set_yticks(range(len(rows)), [name[:22] for name in rows])
    axes.set_xticks(range(len(columns)), [name[:22] for name in columns], rotation=90)
    axes.set(**labels)


def write_page(path, title, sections, classes, warning=""):
    """Write a web page that needs no other file; report.html.jinja says what is in a section."""
    from importlib.metadata import distributions

    from jinja2 import Environment, FileSystemLoader
    here = Path(__file__).resolve().parent
    pages = Environment(loader=FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    installed = {package.name.lower().replace("_", "-"): package.version for package in distributions()}
    wanted = re.findall("^[^=#\n]+", (here / "requirements.txt").read_text(), re.M)
    versions = [f"{name} {installed[name]}" for name in wanted if name in installed]
    text = pages.get_template("report.html.jinja").render(
        title=title, sections=sections, warning=warning, command=" ".join(sys.argv), date=time.strftime("%F %T %z"),
        versions=[f"Python {platform.python_version()}", *versions], colours=COLOURS.tolist(), classes=classes)
    with atomic_write(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
