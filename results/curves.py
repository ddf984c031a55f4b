"""Draws learning curves from the TensorBoard files of runs, and keeps their numbers.

    python results/curves.py runs/a runs/b ... --png results/catch.png --csv results/catch.csv --random -0.75

Each run is a thin line, the mean over the runs of a game a thick one. Numbers that were kept can be drawn again, beside
new runs: name the CSV like a run.
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
    # TensorBoard's step is the environment's, of which an epoch after the last that plays has as many as the one before.
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
        games[run["game"]].append(run["points"])
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    for (game, curves), colour in zip(games.items(), plt.rcParams["axes.prop_cycle"].by_key()["color"]):
        by_epoch = defaultdict(list)
        for curve in curves:
            axes.plot([epoch for epoch, *_ in curve], [value for *_, value in curve], color=colour, lw=0.8, alpha=0.5)
            for epoch, _, value in curve:
                by_epoch[epoch].append(value)
        whole = sorted(epoch for epoch, values in by_epoch.items() if len(values) == len(curves))
        name = f"{game.split(':')[-1].removesuffix('NoFrameskip-v4')}, mean of {len(curves)}"
        axes.plot(whole, [np.mean(by_epoch[epoch]) for epoch in whole], color=colour, lw=2.5, label=name)
    if args.random is not None:
        axes.axhline(args.random, color="grey", ls=":", label="random play")
    axes.set(xlabel="epoch", ylabel="mean return of test games")
    axes.legend(frameon=False)
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
