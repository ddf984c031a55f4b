"""Draws learning curves from the TensorBoard files of runs, and keeps their numbers.

    python results/curves.py runs/a runs/b ... --png results/catch.png --csv results/catch.csv --random -0.75

Each run is a thin line with its seed, the mean over the runs of a game a thick one, over environment steps. What was
trained after the last of these (ten epochs of the laptop preset) stands at the right edge. Numbers that were kept can be
drawn again, beside new runs: name the CSV like a run.
"""
import csv
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # Run folders; and CSVs of earlier pictures, with all runs that these hold
    png: str = "curves.png"  # The picture
    csv: str = ""  # The numbers: game, seed, precision, epoch, environment steps, mean test return
    random: float | None = None  # Mean return of random play, drawn as a dotted line


def read(folder: str) -> dict:
    """A run -> its game, seed and precision, and (epoch, environment steps, mean test return) of each evaluation."""
    args = json.loads((Path(folder) / "args.json").read_text())
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    # An epoch logs its number first, so an evaluation is of the epoch that was logged last before it.
    epochs, points = events.Scalars("charts/epoch"), {}
    for event in events.Scalars("eval/episodic_return"):
        latest = max((x for x in epochs if x.wall_time <= event.wall_time), key=lambda x: x.wall_time)
        points[int(latest.value)] = (event.step, round(event.value, 4))  # of an epoch that was played twice, the second
    points = [(epoch, *point) for epoch, point in sorted(points.items())]
    return {"game": args["env_id"], "seed": args["seed"], "precision": args["precision"], "points": points}


def read_csv(path: str) -> list[dict]:
    """The runs of a CSV that this script wrote, each as `read` gives it."""
    runs = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            run = {"game": row["game"], "seed": int(row["seed"]), "precision": row["precision"]}
            point = int(row["epoch"]), int(row["environment_steps"]), float(row["mean_return"])
            # Two runs may have the same seed, of two presets; but within a run epochs rise.
            if not runs or runs[-1] | run != runs[-1] or point[0] <= runs[-1]["points"][-1][0]:
                runs.append(run | {"points": []})
            runs[-1]["points"].append(point)
    return runs


def main(args: Args) -> None:
    runs, games = [], defaultdict(list)
    for path in args.runs:
        runs += read_csv(path) if path.endswith(".csv") else [read(path)]
    for run in runs:
        games[run["game"]].append(run)
    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=120, layout="constrained")
    colours = iter(plt.rcParams["axes.prop_cycle"].by_key()["color"])
    for game, its_runs in games.items():
        name, by_epoch = game.split(":")[-1].split("NoFrameskip")[0].split("-v")[0], defaultdict(list)
        for run in its_runs:
            steps, values = [x for _, x, _ in run["points"]], [value for *_, value in run["points"]]
            label = f"{name}, seed {run['seed']}, {run['precision']}"
            axes.plot(steps, values, color=next(colours), lw=1.2, marker="o", ms=3, alpha=0.8, label=label)
            for epoch, step, value in run["points"]:
                by_epoch[epoch].append((step, value))
        whole = [np.mean(points, axis=0) for _, points in sorted(by_epoch.items()) if len(points) == len(its_runs)]
        if len(its_runs) > 1:
            axes.plot(*zip(*whole), color="black", lw=2.5, alpha=0.5, label=f"mean of {len(its_runs)}")
    if args.random is not None:
        axes.axhline(args.random, color="grey", ls=":", label="random play")
    axes.set(xlabel="environment steps", ylabel="mean return of test games")
    axes.legend(frameon=False, fontsize=8)
    for path in filter(None, (args.png, args.csv)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.png)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["game", "seed", "precision", "epoch", "environment_steps", "mean_return"])
            for run in runs:
                writer.writerows([run["game"], run["seed"], run["precision"], *point] for point in run["points"])
    print(f"{args.png}: {len(runs)} runs")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (OSError, KeyError, ValueError) as error:
        print(f"error: no run that could be drawn: {error}", file=sys.stderr)
        sys.exit(2)
