"""Time what the public baselines of the competition do and what we do in turn, on this machine.

    python tests/bench_speed.py --rows submission,vote

Prints a table, a line for each measurement: medians, half the spread between quartiles, the ratio, the target and,
where there is one, the limit that nothing can beat. Adds all numbers and versions as a line of JSON to out/bench.jsonl.
Both ways run A B A B, so what else the machine does slows both; CPU seconds suffer less from it than wall seconds.
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
LINE = "{:10} {:46} {:>14} {:>14}  {:20} {:>7} {:>10} {:>7}  {}"  # of the table


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
    return LINE.format(row, found["what"][:46], plain, ours, found["unit"], ratio, found["target"],
                       number(found["limit"]), "ok" if found["ok"] else "MISSED")


def main(args):
    import bench_model_rows
    import bench_rows
    rows = bench_rows.ROWS | bench_model_rows.ROWS
    chosen = list(rows) if args.rows == "all" else args.rows.split(",")
    if unknown := [row for row in chosen if row not in rows]:
        raise UserError(f"no row {', '.join(unknown)}; there are {', '.join(rows)}")
    bench_rows.OUT.mkdir(parents=True, exist_ok=True)
    machine, results = about_machine(), []
    print(" ".join(f"{k} {v}" for k, v in machine.items()))
    print(LINE.format("row", "what", "plain", "ours", "unit", "ratio", "target", "limit", ""), flush=True)
    for row in chosen:
        for found in rows[row]():
            results.append({"row": row} | found)
            print(line_of(row, found), flush=True)
    with open(args.out, "a", encoding="utf-8") as f:
        f.write(json.dumps(machine | {"rows": results}, default=float) + "\n")
    print(f"{args.out}: {sum(bool(r['ok']) for r in results)} of {len(results)} targets reached")


if __name__ == "__main__":
    run_script(main, parse_args())
