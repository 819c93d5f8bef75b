"""Measure how fast, large and hungry models are before any of them is trained.

    python tests/bench_runtimes.py --models fpn/resnet18 unet/resnet34 --scales 256 512 --out out/runtimes.csv

Prints a row for each model and scale and writes it to OUT at once, with the reason instead of numbers where a model
can't be built or can't work; at the end a picture beside OUT, ending in .png. The same line again measures again.
Training images/s are those of train.py's own step on one batch that stays in memory, inference images/s those of one
view, both the median over their steps. Peak memory is of training: what torch allocated on a GPU, on a CPU the whole
process, 0.7 GB of it libraries. GMACs are the multiply-adds of convolutions and matrix products for one image.
"""
import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from common import (STRIDE, Help, amp, atomic_write, claim_device, encoder_mean_std, normalise, number,  # noqa: E402
                    run_script, write_csv)

N_CLASSES, WARM_UP = 12, 2
NUMBERS = {"params_m": "params M", "gmacs": "GMACs", "train_images_per_s": "train/s", "infer_images_per_s": "infer/s",
           "peak_mb": "peak MB", "train_steps": "train steps", "infer_steps": "infer steps"}  # column -> heading


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--models", type=train.model_name, nargs="+", required=True, metavar="DECODER/ENCODER")
    parser.add_argument("--scales", type=number(int, STRIDE, 4096), nargs="+", required=True)
    parser.add_argument("--batch", type=number(int, 2), default=8)
    parser.add_argument("--seconds", type=number(float, 0, 3600), default=10,
                        help="for each model and scale, three quarters of them to train; at least two steps of either")
    parser.add_argument("--device", default="auto", help="auto takes the first idle GPU, or the CPU")
    parser.add_argument("--out", type=Path, default=Path("out/runtimes.csv"))
    parser.add_argument("--alone", action="store_true",
                        help="measure the first model at the first scale in this process and print JSON, no table: "
                             "the table does this once for each row, for a peak memory of its own")
    return parser.parse_args(argv)


# ---- one model at one scale -----------------------------------------------------------------------------------------


def median_seconds(step, budget):
    """(median seconds of a step, number of steps it is the median of), stopping after `budget` seconds.

    Steps before it warm up: WARM_UP, fewer where the budget ends early. There are two steps at least.
    """
    times, started = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - started < budget:
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
    times = times[min(WARM_UP, len(times) // 2):]
    return statistics.median(times), len(times)


def peak_mb(device=None):
    """Most memory so far, in MB: allocated by torch on a GPU, or resident of this process."""
    if device and device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device) / 1e6
    # not getrusage: its peak is never below what the parent held when it started this process
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def count_gmacs(model, scale):
    """Multiply-adds in 1e9 of one image; the model loses its weights, since nothing is computed on "meta".

    There attention is made of matrix products, which are counted; the fused attention of a CPU is not.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta").eval()(torch.empty(1, 3, scale, scale, device="meta"))
    return counter.get_total_flops() / 2 / 1e9


def start_training(model, scale, batch, device):
    """(what train.py works with, its train step on a uint8 batch in memory, that batch) of a model without weights."""
    import torch
    options = train.parse_args(["--data", "", "--exp", "", "--model", model, "--scale", str(scale), "--batch",
                                str(batch), "--weights", "none"])
    run = train.start_run(options, range(N_CLASSES), np.ones(N_CLASSES), None, device)
    mean, std = encoder_mean_std(model)
    images = torch.randint(256, (batch, scale, scale, 3), dtype=torch.uint8, device=device)
    masks = torch.randint(N_CLASSES, (batch, scale, scale), dtype=torch.uint8, device=device)

    def step():  # waits for the GPU, since it returns the loss
        train.train_one_epoch(run, [(images, masks)], options, {"mean": mean, "std": std}, device)
    return run, step, (images, masks)


def measure(args):
    """{column: value} of the first model at the first scale; SystemExit, RuntimeError or ValueError if it can't run."""
    import torch
    model_name, scale = args.models[0], args.scales[0]
    if scale % STRIDE:  # some encoders would take it, but train.py doesn't
        raise SystemExit(f"{model_name} can't work at scale {scale}: it must be a multiple of {STRIDE}")
    device = claim_device(args.device)
    run, train_step, (images, _) = start_training(model_name, scale, args.batch, device)
    mean, std = encoder_mean_std(model_name)

    def infer_step():
        with torch.inference_mode(), amp(device):
            model(normalise(images, mean, std)).float().softmax(dim=1)[0, 0, 0, 0].item()

    train_seconds, train_steps = median_seconds(train_step, args.seconds * 3 / 4)
    peak, model = peak_mb(device), run["model"].eval()
    infer_seconds, infer_steps = median_seconds(infer_step, args.seconds / 4)
    values = (sum(p.numel() for p in model.parameters()) / 1e6, count_gmacs(model, scale), args.batch / train_seconds,
              args.batch / infer_seconds, peak, train_steps, infer_steps)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {k: round(v, 4) for k, v in zip(NUMBERS, values, strict=True)} | {"device": name}


# ---- the table ------------------------------------------------------------------------------------------------------


def measure_apart(args, model, scale):
    """One row of the table, measured by a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--alone", "--models", model, "--scales", str(scale), "--batch",
                           str(args.batch), "--seconds", str(args.seconds), "--device", args.device],
                          text=True, capture_output=True, start_new_session=True)  # Ctrl-C is for this process alone
    row = {"model": model, "scale": scale, "batch": args.batch} | dict.fromkeys([*NUMBERS, "device", "reason"], "")
    if done.returncode == 0:
        return row | json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(done.stderr)
    why = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    return row | {"reason": f"its process ended with {why}"}


def print_row(row, width):
    cells = [row["reason"][:100]]
    if not row["reason"]:
        digits = {name: 0 if isinstance(row[name], int) or row[name] >= 100 else 2 for name in NUMBERS}
        cells = [f"{row[name]:{len(heading) + 2},.{digits[name]}f}" for name, heading in NUMBERS.items()]
    print(f"{row['model']:{width}} {row['scale']:5}", *cells, flush=True)


def draw(path, rows):
    """A PNG: training images/s against parameters, a dot for each row, named in the right margin in order of speed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator
    rows = sorted(rows, key=lambda row: row["train_images_per_s"])
    models = sorted({row["model"] for row in rows})
    figure = Figure((10, max(5, 0.24 * len(rows))))
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="parameters, millions", ylabel="training images/s",
             title=f"{rows[0]['device']}, batch {rows[0]['batch']}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    for i, row in enumerate(rows):
        point, colour = (row["params_m"], row["train_images_per_s"]), f"C{models.index(row['model'])}"
        axes.plot(*point, "o", color=colour, markersize=8, markeredgecolor="white")
        axes.annotate(f"{row['model']} {row['scale']}", point, (1.04, (i + 0.5) / len(rows)), color=colour, va="center",
                      textcoords="axes fraction",
                      arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "relpos": (0, 0.5)})
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png", bbox_inches="tight", dpi=120)


def main(args):
    if args.alone:
        try:
            print(json.dumps(measure(args)))
        except (SystemExit, RuntimeError, ValueError) as e:
            print(json.dumps({"reason": " ".join(str(e).split()) or type(e).__name__}))
        return
    pairs, rows, width = list(product(args.models, args.scales)), [], max(map(len, args.models))
    picture = args.out.with_suffix(".png")
    if picture == args.out:
        raise SystemExit(f"--out {args.out}: that is the picture's name; give the table another ending")
    picture.unlink(missing_ok=True)  # of an older table
    print(f"{'model':{width}} scale   {'   '.join(NUMBERS.values())}", flush=True)
    try:
        for model, scale in pairs:
            rows.append(measure_apart(args, model, scale))
            write_csv(args.out, rows)
            print_row(rows[-1], width)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted after {len(rows)} of {len(pairs)} rows, which {args.out} keeps") from None
    measured = [row for row in rows if not row["reason"]]
    if not measured:
        raise SystemExit(f"none of the {len(rows)} could be measured; {args.out} has the reasons")
    draw(picture, measured)
    print(f"{args.out}, {picture}: {len(measured)} of {len(rows)} measured on {measured[0]['device']}")


if __name__ == "__main__":
    run_script(main, parse_args())
