"""The paper's table, or any games and seeds: a sweep of training runs on Ray, over one machine or many.

    python results/reproduce.py --games Breakout Pong --seeds 1 2 --storage runs/sweep --preset laptop    # this machine
    python results/reproduce.py --games all --storage /shared/sweep --address auto                      # a Ray cluster

Each run is a task. It trains its folder in the storage, or goes on with what is there, plays 100 test games, and writes
result.json. When its process dies or its machine is lost, Ray starts the task again, here or there; it resumes from its
checkpoint, exactly, so an epoch is lost at most. A run that has a result is never begun again: the same command goes on
with a sweep that was stopped. Flags that are not this script's (--help) go to iris_train.py.

All machines need this clone and the storage at the same paths (a shared folder), and results/requirements.txt.
"""
import csv
import difflib
import fcntl
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import aggregate
import iris_train
from iris_train import IrisError
from scores import bootstrap_interval

ATARI = sorted(aggregate.read_scores(aggregate.PUBLISHED)["human"])  # the 26 games of Atari 100k


@dataclass
class Options:
    """A sweep of training runs, games x seeds, on Ray. All other flags go to iris_train.py: --preset laptop, ..."""

    games: tuple[str, ...]  # Games, as in Breakout Pong; all is the 26 of Atari 100k; or gymnasium ids
    storage: Path  # Folder for the runs, which all machines see under this path
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # A run of each game for each seed
    address: str = ""  # HOST:PORT of a Ray cluster that this machine is in, or auto; empty starts Ray here
    cpus_per_run: int = 1  # Cores of a run, and its threads (OMP_NUM_THREADS); as many runs as fit train at once
    gpus_per_run: float = -1  # GPUs of a run: with 0.25, four share one; -1 is 0.25 if the cluster has GPUs, else 0
    evaluate: int = 100  # Test games of a trained agent
    retries: int = 100  # Times that a run is started again after its process or its machine was lost
    refresh: float = 30  # Seconds between two looks at the runs


@dataclass
class Run:
    """A game and a seed. Its folder holds all that is known of it, for every machine to see."""

    game: str  # gymnasium id
    seed: int
    folder: Path
    log_start: int = 0  # where this sweep's part of the log begins
    error: str = ""

    def score(self) -> tuple[float, float, float] | None:
        """The trained agent's mean return in test games, and its 95% interval; None if the run is not finished."""
        path = self.folder / "result.json"
        if not path.exists():
            return None
        returns = np.array(json.loads(path.read_text())["returns"])
        return float(returns.mean()), *bootstrap_interval(returns)

    def state(self, nodes: set[str]) -> str:
        """Where it runs, how far it is, and its score, in a line; "" if it waits for its turn."""
        if score := self.score():
            return "finished, mean return {:.2f} [{:.2f}, {:.2f}]".format(*score)
        if self.error:
            return f"failed: {self.error}"
        log = (self.folder / "log.txt").read_bytes()[self.log_start :].decode(errors="replace")
        if not (starts := [*re.finditer(r"^start on (\S+), .*, node (\w+)\n", log, re.MULTILINE)]):
            return ""
        host, node = starts[-1].groups()
        if node not in nodes:
            return f"lost with {host}, waits for another machine"
        *_, line = log.splitlines()
        if line.startswith("epoch"):
            line = "  ".join(re.findall(r"epoch \S+|[\d.]+ h left", line))
        tests = re.findall(r"test return \S+", log)[-1:]  # the last evaluation may be epochs ago
        return "  ".join([f"{host}, start {len(starts)}:", line, *tests])


def main(options: Options, flags: list[str]) -> int:
    """Returns the exit code: 0, or 1 if a run failed. Raises IrisError and KeyboardInterrupt."""
    runs = plan(options, flags)
    if any(run.score() is None for run in runs):
        sweep(runs, options, flags)
    report(runs, options.storage)
    return int(any(run.error for run in runs))


def plan(options: Options, flags: list[str]) -> list[Run]:
    """Games x seeds, all that can be checked without training. Writes nothing. Raises IrisError."""
    options.storage = options.storage.resolve()
    parent = next(path for path in (options.storage, *options.storage.parents) if path.exists())
    low, gpus = min(options.evaluate, options.cpus_per_run, options.refresh, options.retries + 1), options.gpus_per_run
    for wrong, text in (
        (not options.games or not options.seeds, "--games and --seeds need one or more"),
        (low <= 0, "--evaluate, --cpus-per-run and --refresh have to be above 0, and --retries not below"),
        (gpus > 1 and gpus % 1, f"--gpus-per-run {gpus} is neither a share of a GPU nor a whole number of them"),
        (not re.fullmatch(r"|auto|.+:\d+", options.address), f"--address {options.address} is not HOST:PORT or auto"),
        (not parent.is_dir() or not os.access(parent, os.W_OK), f"can't write into --storage {options.storage}"),
        (any(re.match("--(seed|env.id|run.dir|resume)(=|$)", flag) for flag in flags),
         "--seed, --env-id, --run-dir and --resume are the sweep's to set: use --seeds, --games and --storage"),
    ):  # fmt: skip
        if wrong:
            raise IrisError(text)
    games = []
    for name in ATARI if "all" in options.games else options.games:
        if name not in ATARI and not re.search(r"-v\d+$", name):
            close = difflib.get_close_matches(name, ATARI, 1) or ATARI[:1]
            raise IrisError(f"Atari 100k has no game {name}: is it {close[0]}? Others need their whole gymnasium id")
        games.append(f"{name}NoFrameskip-v4" if name in ATARI else name)
        iris_train.check(iris_train.parse_args([*flags, "--env-id", games[-1], "--seed", str(min(options.seeds))]))
        iris_train.make_env(games[-1]).close()
    path = options.storage / "sweep.json"
    if path.exists() and (kept := json.loads(path.read_text())) != {"flags": flags, "evaluate": options.evaluate}:
        kept = shlex.join(["--evaluate", str(kept["evaluate"]), *kept["flags"]])
        raise IrisError(f"{options.storage} holds a sweep with {kept}: use these flags, or another --storage")
    pairs = [(game, seed) for seed in dict.fromkeys(options.seeds) for game in dict.fromkeys(games)]
    return [Run(game, seed, options.storage / f"{re.sub('[/:]', '-', game)}__iris__{seed}") for game, seed in pairs]


def train_and_evaluate(folder: Path, argv: list[str], games: int, cpus: int) -> str:
    """The task: a run, on any machine, perhaps not for the first time. Returns "", or in a line what failed.

    It trains in the task's own process: no child is left that would go on training when that is killed."""
    os.environ["OMP_NUM_THREADS"] = str(cpus)  # before torch is loaded; threads that wait for a core spin
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's handler raises SystemExit, which a game might have raised
    sys.path.insert(0, str(ROOT))
    import ray
    import torch

    import iris_play
    import iris_train

    with open(folder / "log.txt", "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        where = f"start on {socket.gethostname()}, process {os.getpid()}, {torch.get_num_threads()} threads"
        print(f"{where}, node {ray.get_runtime_context().get_node_id()}\nbegins, once no other task has this run")
        try:
            fcntl.flock(log, fcntl.LOCK_EX)  # a process on a lost machine may hold it, until that notices
            begun = (folder / "checkpoint.pt").exists()
            args = iris_train.parse_args(["--resume", str(folder)] if begun else argv)
            iris_train.main(args)
            print(f"plays {games} test games")
            paths = {"run_dir": str(folder), "json": str(folder / "result.json")}
            iris_play.main(iris_play.Args(evaluate=games, device=args.device, **paths))
        except iris_train.IrisError as error:
            print(f"error: {error}")
            return str(error)
        except Exception as error:  # not foreseen; the same command will try again
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())} ({folder}/log.txt)"
    return ""


def connect(address: str):
    """Ray, connected to a cluster, or started on this machine. Raises IrisError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:  # Ray listens on all network interfaces: let nobody else in
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray
    except ImportError as error:
        raise IrisError("a sweep needs Ray: pip install -r results/requirements.txt") from error
    try:
        if ":" in address:  # or Ray would try for two minutes
            host, port = address.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or "local", logging_level="ERROR", log_to_driver=False)
    except (OSError, OverflowError, ValueError, RuntimeError, SystemExit) as error:
        what = f"can't use a Ray cluster at {address}" if address else "can't start Ray"
        raise IrisError(f"{what}: {' '.join(str(error).split())}") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return ray


def sweep(runs: list[Run], options: Options, flags: list[str]) -> None:
    """Has Ray train what is not finished, as many runs at once as fit, and shows how far they are. Raises IrisError."""
    ray = connect(options.address)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = options.cpus_per_run, options.gpus_per_run
        if gpus < 0:
            gpus = 0.25 if any("GPU" in machine for machine in machines) else 0
        if not any(x.get("CPU", 0) >= cpus and x.get("GPU", 0) >= gpus for x in machines):
            raise IrisError(f"no machine has {cpus} CPUs and {gpus:g} GPUs: lower --cpus-per-run or --gpus-per-run")
        start = ray.remote(max_calls=1, max_retries=options.retries, num_cpus=cpus, num_gpus=gpus)(train_and_evaluate)
        settings = json.dumps({"flags": flags, "evaluate": options.evaluate}).encode()
        iris_train.write_file(options.storage / "sweep.json", lambda file: file.write(settings))
        tasks, shown = {}, {}
        for run in runs:
            if run.score() is None:
                run.folder.mkdir(exist_ok=True)
                with open(run.folder / "log.txt", "ab") as log:
                    run.log_start = log.tell()
                argv = [*flags, "--env-id", run.game, "--seed", str(run.seed), "--run-dir", str(run.folder)]
                tasks[start.remote(run.folder, argv, options.evaluate, cpus)] = run
        try:
            while tasks:
                for task in ray.wait(list(tasks), timeout=options.refresh)[0]:
                    run = tasks.pop(task)
                    try:
                        run.error = ray.get(task)
                    except ray.exceptions.RayError as error:  # a traceback, or some lines of explanation
                        lines = str(error).strip().splitlines()
                        run.error = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
                show(runs, {node["NodeID"] for node in ray.nodes() if node["Alive"]}, shown)
        except KeyboardInterrupt:
            for task in tasks:
                ray.cancel(task)  # as if by Ctrl-C, in the task
            ray.wait(list(tasks), num_returns=len(tasks), timeout=30)
            raise
    finally:
        ray.shutdown()


def show(runs: list[Run], nodes: set[str], shown: dict[str, str]) -> None:
    """The runs that are under way or ended: a table on a terminal; elsewhere what has changed since it was `shown`."""
    terminal, columns = sys.stdout.isatty(), shutil.get_terminal_size().columns
    rows = {run.folder.name: state for run in runs if (state := run.state(nodes))}
    new = {name: state for name, state in rows.items() if terminal or state != shown.get(name)}
    shown.update(rows)
    finished, failed = (sum(state.startswith(word) for state in rows.values()) for word in ("finished", "failed"))
    counts = f"{finished} finished, {failed} failed, {len(rows) - finished - failed} under way"
    lines = [f"{name:{max(map(len, rows))}}  {state}" for name, state in new.items()]
    lines.append(f"{time.strftime('%H:%M:%S')}  {counts}, {len(runs) - len(rows)} wait")
    if terminal:
        print("\x1b[H\x1b[2J" + "\n".join(line[:columns] for line in lines), flush=True)
    elif new:
        print("\n".join(lines), flush=True)


def report(runs: list[Run], storage: Path) -> None:
    """Scores of the finished runs, also as scores.csv; once all are finished, what `aggregate.py` makes of them."""
    rows = []
    for run in sorted(runs, key=lambda run: run.game):
        if score := run.score():
            rows.append([run.game.removesuffix("NoFrameskip-v4"), "ours", run.seed, *(f"{x:.2f}" for x in score)])
    head = ["game", "method", "seed", "mean_return", "low", "high"]  # low and high: 95% interval over test games
    for row in [head, *rows]:
        print(*row)
    with open(storage / "scores.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    print(storage / "scores.csv")
    if len(rows) < len(runs):
        print(f"{len(runs) - len(rows)} of {len(runs)} runs are not finished: the same command tries them again")
    elif all(row[0] in ATARI for row in rows):
        aggregate.main(aggregate.Options([storage / "scores.csv"], png=storage / "aggregate.png"))


if __name__ == "__main__":
    try:
        sys.exit(main(*tyro.cli(Options, return_unknown_args=True)))
    except (IrisError, OSError) as error:  # OSError: the storage can't be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nStopped. Each run keeps its last epoch. Go on with: {shlex.join(['python', *sys.argv])}")
        sys.exit(130)
