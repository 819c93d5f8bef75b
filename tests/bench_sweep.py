"""Try recipes drawn from train.py's SEARCH_SPACE on one fold, then judge the best one with other seeds.

    python tests/bench_sweep.py --trials 20 --seeds 3 -- --data DATA --exp out/main --scale 256 --epochs 10

After -- come train.py's arguments; what SEARCH_SPACE doesn't name stays as they say. Writes EXP/sweep/: study.db, a run
KEY/ for each trial, trials.csv and importance.png. The same line resumes and, once TRIALS are finished, adds none;
started in several processes it shares the study.
"""
import argparse
import hashlib
import json
import statistics
import sys
import warnings
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from itertools import accumulate
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from common import (Hashes, Help, atomic_write, build_model, claim_device, code_of, different_keys,  # noqa: E402
                    folds_hash, load_data, load_folds, lock, number, run_script)

COMPLETE, PRUNED, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--trials", type=number(int, 1), default=20, help="finished trials of the study in the end")
    parser.add_argument("--seeds", type=number(int, 2), default=3, help="other seeds that judge the best setting")
    parser.add_argument("line", nargs="*", metavar="ARG", help="train.py's arguments, after --")
    args = parser.parse_args(argv)
    args.run = train.parse_args(args.line)
    return args


def with_values(args, values):
    """train.py's arguments with `values` put over them; SystemExit with train.py's own line when it refuses one."""
    said = StringIO()
    try:
        with redirect_stderr(said):
            run = train.parse_args([*args.line, *(f"--{name.replace('_', '-')}={v}" for name, v in values.items())])
        train.check_args(run, 1)
        return run
    except SystemExit as e:
        raise SystemExit(f"train.py's SEARCH_SPACE: {said.getvalue().strip().split('error: ')[-1] or e}") from None


def search_space(args):
    """{option: Optuna's distribution} of SEARCH_SPACE, once train.py has accepted every choice and end of a range."""
    space, entries = {}, dict(train.SEARCH_SPACE)
    if args.run.weights not in ("imagenet", "none") and entries.pop("model", None):
        print(f"model is not searched: the file {args.run.weights} fits one encoder only")
    for name, entry in entries.items():
        try:
            if name not in ("model", *train.RECIPE) or not isinstance(entry, tuple):
                raise ValueError("no option of RECIPE with its choices or ('even' or 'log', lowest, highest)")
            ranged = entry[0] in ("even", "log")
            values = [getattr(with_values(args, {name: value}), name) for value in entry[ranged:]]
            kind = IntDistribution if isinstance(values[0], int) else FloatDistribution
            space[name] = kind(*values, log=entry[0] == "log") if ranged else CategoricalDistribution(values)
        except (ValueError, TypeError, IndexError) as e:
            raise SystemExit(f"train.py's SEARCH_SPACE: {name} {entry!r}: {e}") from None
    return space


def open_study(folder, epochs, fixed, code):
    """The study in `folder`, new or begun with the same `fixed` values, and code unless the user says "keep"."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db", {"connect_args": {"timeout": 60}})
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=epochs // 3)
    study = optuna.create_study(storage=storage, pruner=pruner, study_name="sweep", direction="maximize",
                                load_if_exists=True)
    old = study.user_attrs.get("fixed", fixed)
    if differ := [f"{k} {old.get(k)} -> {fixed.get(k)}" for k in {**old, **fixed} if old.get(k) != fixed.get(k)]:
        raise SystemExit(f"{folder}/study.db was begun with other values: {', '.join(differ)}; take another --exp, or "
                         "remove it to begin anew")
    made, now = study.user_attrs.get("code"), code_of("run")
    if code != "keep" and made and (names := sorted(different_keys(made, now))):
        raise SystemExit(f"{folder}/study.db was begun by other code ({', '.join(names[:6])}): --code keep (CODE=keep) "
                         "carries on with it, another --exp begins anew")
    study.set_user_attr("fixed", fixed)
    study.set_user_attr("code", now)
    return study


def root_of(args, fixed, values):
    """The folder of the run with `values`, named by all that decides its result: tried again it resumes."""
    text = json.dumps([fixed, values], sort_keys=True)
    return args.run.exp / "sweep" / hashlib.sha256(text.encode()).hexdigest()[:10]


def run_trial(args, fixed, trial):
    """(state, v3 or None) of a trial; what train.py can't run is a bad recipe and counts as pruned."""
    def report(epoch, v3):
        trial.report(v3, epoch)
        if epoch < trial.params.get("epochs", args.run.epochs) and trial.should_prune():
            raise optuna.TrialPruned
    root = root_of(args, fixed, trial.params)
    trial.set_user_attr("folder", root.name)
    try:
        return COMPLETE, train.train_run(with_values(args, trial.params), root, report)
    except optuna.TrialPruned:
        return PRUNED, None
    except SystemExit as e:
        print(e)
        trial.set_user_attr("error", str(e))
        return PRUNED, None


def run_trials(args, fixed, space, study, folder):
    """Run trials until, with those of other processes, args.trials are finished.

    A running trial holds a lock, which the kernel drops when its process is killed: then it is due again.
    """
    requeue = optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
    while True:
        with ExitStack() as alive:
            with lock(folder, wait=True):  # one process at a time counts and draws
                for dead in study.get_trials(states=(RUNNING,)):
                    try:
                        with lock(folder / "running" / str(dead.number)):
                            study.tell(dead.number, state=TrialState.FAIL)
                            requeue(study, dead)
                    except SystemExit:
                        continue
                if len(study.get_trials(False, (COMPLETE, PRUNED, RUNNING))) >= args.trials:
                    return
                trial = study.ask(space)
                alive.enter_context(lock(folder / "running" / str(trial.number)))
            state, v3 = run_trial(args, fixed, trial)
            with lock(folder, wait=True):  # or another process could list the trial as running, then find it unlocked
                done = study.tell(trial, v3, state if v3 is None else None)
        v3 = "none" if done.value is None else f"{done.value:.4f}"
        values = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in done.params.items())
        print(f"trial {done.number}: v3 {v3} {state.name.lower()}, {values}", flush=True)


def plot(study, path):
    """How much each option matters, and v3 of every trial."""
    from matplotlib.figure import Figure
    shares = optuna.importance.get_param_importances(study)
    figure = Figure(figsize=(11, 2 + 0.3 * len(shares)), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar_label(left.barh(list(shares), list(shares.values())), fmt="%.2f", padding=3)
    left.invert_yaxis()
    left.set(title="importance of the options", xlim=(0, 1.15 * max(shares.values())))
    complete = study.get_trials(False, (COMPLETE,))
    numbers, v3s = [trial.number for trial in complete], [trial.value for trial in complete]
    right.plot(numbers, v3s, "o")
    right.step(numbers, list(accumulate(v3s, max)), where="post", alpha=0.5)
    pruned = [trial.number for trial in study.get_trials(False, (PRUNED,))]  # their v3 is of an early epoch
    right.plot(pruned, [0.03] * len(pruned), "x", color="grey", transform=right.get_xaxis_transform())
    right.set(title="v3 of the complete trials, and the best so far; x: pruned", xlabel="trial")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.grid(alpha=0.3)
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)


def as_knobs(run):
    """A recipe as it is pasted behind `make train`, without its seed."""
    rest = [f"--{n.replace('_', '-')} {getattr(run, n)}" for n, (_, default, _) in train.RECIPE.items()
            if n not in ("batch", "lr", "seed") and getattr(run, n) != default]
    return f"MODEL={run.model} BATCH={run.batch} LR={run.lr} TRAIN_ARGS='{' '.join(rest)}'"


def judge(args, fixed, study):
    """Train the best setting with other seeds and say how its lead over the second compares with their spread."""
    settings = {}  # best first
    for trial in sorted(study.get_trials(False, (COMPLETE,)), key=lambda trial: -trial.value):
        settings.setdefault(as_knobs(with_values(args, trial.params)), trial)
    (line, best), *others = settings.items()
    print(f"best setting, v3 {best.value:.4f} in trial {best.number}:\n  {line}", flush=True)
    used = best.params.get("seed", args.run.seed)
    seeds = [seed for seed in range(args.seeds + 1) if seed != used][:args.seeds]
    runs = [{**best.params, "seed": seed} for seed in seeds]
    v3s = [train.train_run(with_values(args, run), root_of(args, fixed, run), lambda epoch, v3: None) for run in runs]
    spread = statistics.stdev(v3s)
    print(f"with the seeds {', '.join(map(str, seeds))}: v3 mean {statistics.mean(v3s):.4f}, standard deviation "
          f"{spread:.4f}, range {min(v3s):.4f} to {max(v3s):.4f}")
    for _, second in others[:1]:
        gap = best.value - second.value
        units = f", {gap / spread:.1f} standard deviations" if spread else ""
        print(f"the second best setting, trial {second.number}, is {gap:.4f} below the best{units}")
    print(f"differences smaller than the spread, {spread:.4f}, are noise: the seed alone makes them")


def main(args):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    run, folder = args.run, args.run.exp / "sweep"
    if run.check or run.overfit:
        raise SystemExit("--check and --overfit are other jobs of train.py, not for a sweep")
    train.check_args(run, 1)
    space = search_space(args)
    data, test = load_data(run.data, run.cache, run.paint)
    folds = folds_hash(data.ids, load_folds(run.exp, data, run.folds))
    labels = train.check_labels(run, test, folds, Hashes(run.cache)) if run.round else ()
    recipe = train.make_recipe(run, data.fingerprint, folds, Hashes(run.cache), *labels)
    fixed = {k: v for k, v in recipe.items() if k not in space}
    fixed |= {f"SEARCH_SPACE {name}": list(train.SEARCH_SPACE[name]) for name in space}
    with lock(folder, wait=True):
        study = open_study(folder, run.epochs, fixed, run.code)
    if len(study.get_trials(False, (COMPLETE, PRUNED))) < args.trials:
        claim_device(run.device)
        if "model" not in space:  # what no trial could build ends the sweep, not each of its trials
            build_model(run.model, len(data.classes), run.weights)
    run_trials(args, fixed, space, study, folder)
    if running := study.get_trials(False, (RUNNING,)):
        print(f"{len(running)} trials still run in other processes: the last to finish prints the result")
        return
    n_complete = len(study.get_trials(False, (COMPLETE,)))
    with lock(folder, wait=True):
        with atomic_write(folder / "trials.csv") as scratch:
            study.trials_dataframe().to_csv(scratch, index=False)
        if n_complete >= 4:  # of fewer the importances would be guesses
            plot(study, folder / "importance.png")
    if not n_complete:
        raise SystemExit(f"{folder}/trials.csv: no trial is complete, see user_attrs_error; then remove study.db")
    judge(args, fixed, study)


if __name__ == "__main__":
    run_script(main, parse_args())
