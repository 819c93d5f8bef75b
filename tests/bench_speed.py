"""Time what the public baselines of the competition do and what we do in turn, on this machine.

    python tests/bench_speed.py --rows submission,vote

Prints a table, a line for each measurement: medians, half the spread between quartiles, the ratio, the target and,
where there is one, the limit that nothing can beat. Adds all numbers and versions as a line of JSON to out/bench.jsonl.
Both ways run A B A B, so what else the machine does slows both; CPU seconds suffer less from it than wall seconds.
The rows that begin with gpu need one; without one `all` leaves them out.
Data is drawn into out/bench once.
"""
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Parser, UserError, run_script  # noqa: E402

LIBRARIES = ("torch", "numpy", "opencv-python-headless", "albumentations", "segmentation-models-pytorch", "pycocotools")
LINE = "{:12} {:50} {:>14} {:>14}  {:20} {:>7} {:>10} {:>7}  {}"  # of the table
VERDICTS = {True: "ok", False: "MISSED", None: ""}  # None: a number without a target


def parse_args(argv=None):
    parser = Parser(prog="bench_speed.py", description=__doc__)
    parser.add_argument("--rows", default="all", metavar="all|ROW,ROW,...", help="what to measure")
    parser.add_argument("--out", type=Path, default=Path("out/bench.jsonl"))
    return parser.parse_args(argv)


def about_machine():
    """Return what the numbers depend on besides the code, and the commit of the code."""
    def installed(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ":?")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], text=True, capture_output=True,
                            cwd=Path(__file__).parent)
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "commit": commit.stdout.strip(),
            "cpu": cpu.split(":")[1].strip(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
            "python": platform.python_version(), "threads": os.environ.get("OMP_NUM_THREADS"),
            **{name: installed(name) for name in LIBRARIES}}


def line_of(row, found):
    """Return one line of the table."""
    def number(value, spread=None):
        text = "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        return text + (f" ±{spread:.2g}" if spread else "")
    plain = number(found["plain"]["median"], found["plain"]["spread"]) if found["plain"] else ""
    ours = number(found["ours"]["median"], found["ours"]["spread"])
    ratio = f"{found['ratio']:.2f}x" if found["ratio"] else ""
    return LINE.format(row, found["what"][:50], plain, ours, found["unit"], ratio, found["target"],
                       number(found["limit"]), VERDICTS[found["ok"]])


def choose_rows(text):
    """Return {name: function} of the rows of --rows; raise UserError if this machine can't run one of them."""
    import bench_gpu_rows
    import bench_model_rows
    import bench_rows
    rows, gpu_rows = bench_rows.ROWS | bench_model_rows.ROWS, bench_gpu_rows.ROWS
    names = text.split(",")
    if text == "all":
        names = [*rows, *(gpu_rows if bench_gpu_rows.gpu_name() else ())]
    if unknown := [name for name in names if name not in rows | gpu_rows]:
        raise UserError(f"no row {', '.join(unknown)}; there are {', '.join(rows | gpu_rows)}")
    if (refused := [name for name in names if name in gpu_rows]) and not bench_gpu_rows.gpu_name():
        raise UserError(f"{', '.join(refused)}: needs a GPU, and torch sees none here")
    return {name: (rows | gpu_rows)[name] for name in names}


def main(args):
    import bench_gpu_rows
    import bench_rows
    chosen = choose_rows(args.rows)
    bench_rows.OUT.mkdir(parents=True, exist_ok=True)
    machine, results = about_machine() | {"gpu": bench_gpu_rows.gpu_name()}, []
    print(" ".join(f"{k} {v}" for k, v in machine.items()))
    print(LINE.format("row", "what", "plain", "ours", "unit", "ratio", "target", "limit", ""), flush=True)
    try:
        for row, measure in chosen.items():
            for found in measure():
                results.append({"row": row} | found)
                print(line_of(row, found), flush=True)
    finally:  # what was measured before an error or Ctrl-C
        with open(args.out, "a", encoding="utf-8") as f:
            f.write(json.dumps(machine | {"rows": results}, default=float) + "\n")
    verdicts = [row["ok"] for row in results if row["ok"] is not None]
    print(f"{args.out}: {sum(verdicts)} of {len(verdicts)} targets reached")


if __name__ == "__main__":
    run_script(main, parse_args())
