"""Aggregates of human-normalised scores over games and runs, as the field reports them (arXiv 2108.13264).

    python results/aggregate.py results/published_runs.csv --ours results/scores.csv --png results/aggregate.png

reads runs (game, method, seed, mean_return: a line each) and prints for each method the mean, the median, the
interquartile mean and the optimality gap, with 95% intervals from a stratified bootstrap: runs are drawn with
replacement within each game, never across games. The picture shows them beside the means and medians of published
methods (results/published_scores.csv has a score a game for these, which gives no interval and no interquartile mean),
and each game's runs on the scale from random play (0) to a human's (1), beside single runs of ours, which are too few
for aggregates. Needs results/requirements.txt.
"""
import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

PUBLISHED = Path(__file__).parent / "published_scores.csv"


@dataclass
class Options:
    """Aggregates human-normalised scores over games and runs."""

    runs: tyro.conf.Positional[list[Path]]  # CSV files with the columns game, method, seed, mean_return
    png: Path | None = None  # Picture to write
    draws: int = 2000  # Bootstrap samples
    ours: Path | None = None  # CSV that scores.py wrote, whose runs the picture shows by game


def mean(x: np.ndarray) -> np.ndarray:
    """Scores (..., games, runs) -> (...): the mean of everything."""
    return x.mean(axis=(-2, -1))


def median(x: np.ndarray) -> np.ndarray:
    """Scores (..., games, runs) -> (...): the median over games of the mean over runs."""
    return np.median(x.mean(axis=-1), axis=-1)


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """Scores (..., games, runs) -> (...): the mean of all runs but the lowest and the highest quarter."""
    flat = np.sort(x.reshape(*x.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(axis=-1)


def optimality_gap(x: np.ndarray) -> np.ndarray:
    """Scores (..., games, runs) -> (...): by how much runs miss a human's score, on average."""
    return 1 - np.minimum(x, 1).mean(axis=(-2, -1))


AGGREGATES = {
    "mean": mean, "median": median, "interquartile mean": interquartile_mean, "optimality gap": optimality_gap,
}  # fmt: skip


def stratified_bootstrap(x: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """Scores (games, runs) -> (draws, games, runs), each game's runs drawn with replacement from its own."""
    games, runs = x.shape
    drawn = np.random.default_rng(seed).integers(runs, size=(draws, games, runs))
    return np.take_along_axis(np.broadcast_to(x, drawn.shape), drawn, axis=2)


def aggregate(x: np.ndarray, draws: int = 2000) -> dict[str, tuple[float, float, float]]:
    """Human-normalised scores (games, runs) -> for each aggregate: value, and bounds of its 95% interval."""
    samples = stratified_bootstrap(x, draws)
    return {
        name: (float(of(x)), *np.quantile(of(samples), [0.025, 0.975]).tolist()) for name, of in AGGREGATES.items()
    }  # fmt: skip


def read_scores(path: Path) -> dict[str, dict[str, list[float]]]:
    """A CSV with game, method, mean_return, or scores.py's game, player, mean -> method -> game -> its runs' scores."""
    scores: dict = defaultdict(lambda: defaultdict(list))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            method, score = row.get("method") or row["player"], row.get("mean_return") or row["mean"]
            scores[method][row["game"].removesuffix("NoFrameskip-v4")].append(float(score))
    return scores


def normalise(scores: dict[str, list[float]], reference: dict) -> np.ndarray:
    """game -> runs' scores, as many for each game -> human-normalised (games, runs). Raises ValueError."""
    if len({len(runs) for runs in scores.values()}) != 1:
        raise ValueError("a stratified bootstrap over a table needs as many runs of each game")
    rows = []
    for game, runs in sorted(scores.items()):
        (random,), (human,) = reference["random"][game], reference["human"][game]
        rows.append([(run - random) / (human - random) for run in runs])
    return np.array(rows)


def draw(results: dict, tables: dict, games: dict, published: dict, ours: dict, png: Path) -> None:
    """`ours`: game -> human-normalised scores of some runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 5, figsize=(16, 7), width_ratios=(1, 1, 1, 1, 1.6), layout="constrained")
    for axis, name in zip(axes, AGGREGATES):
        values = {method: aggregates[name] for method, aggregates in results.items()}
        if name in ("mean", "median"):
            others = {method: x for method, x in published.items() if method not in values}
            values |= {method: (float(AGGREGATES[name](x)),) * 3 for method, x in others.items()}
        for i, (method, (value, low, high)) in enumerate(sorted(values.items(), key=lambda item: item[1][0])):
            axis.barh(i, high - low, left=low, height=0.5, color="tab:blue", alpha=0.4)
            axis.plot([value, value], [i - 0.25, i + 0.25], color="black")
            axis.text(0, i + 0.3, f" {method} {value:.3f}", fontsize=9)
        axis.set(title=name, yticks=[], ylim=(-0.6, len(published) + 0.2))
        axis.set_xlim(0, 1.1 * max(high for _, _, high in values.values()))
    last = axes[-1]
    for colour, (method, x) in zip(("tab:blue", "tab:orange", "tab:green"), tables.items()):
        for i, runs in enumerate(x):
            last.scatter(runs, [i] * len(runs), s=14, color=colour, alpha=0.6, label=method if i == 0 else None)
    for game, runs in ours.items():
        row, label = games[method].index(game), "ours, on a laptop" if game == min(ours) else None
        last.scatter(runs, [row] * len(runs), s=40, marker="x", color="tab:red", label=label)
    last.set(title="runs by game: 0 random, 1 human", xscale="symlog", yticks=range(len(games[method])))
    last.set_yticklabels(games[method], fontsize=8)
    last.axvline(0, color="grey", lw=0.8)
    last.axvline(1, color="grey", lw=0.8, ls="--")
    last.legend()
    figure.savefig(png, dpi=110)


def main(options: Options) -> None:
    reference, scores = read_scores(PUBLISHED), defaultdict(dict)
    for path in options.runs:
        for method, runs_of in read_scores(path).items():
            scores[method] |= runs_of
    tables = {method: normalise(runs_of, reference) for method, runs_of in scores.items()}
    results = {method: aggregate(table, options.draws) for method, table in tables.items()}
    for method, aggregates in results.items():
        games, runs = tables[method].shape
        print(f"{method}: {games} games, {runs} runs each")
        for name, (value, low, high) in aggregates.items():
            print(f"  {name:20}{value:7.3f}   [{low:.3f}, {high:.3f}]")
    if options.png:
        methods = {m: runs for m, runs in reference.items() if m not in ("random", "human") and len(runs) == 26}
        published = {method: normalise(runs, reference) for method, runs in methods.items()}
        ours = read_scores(options.ours)["iris"] if options.ours else {}
        ours = {game: normalise({game: runs}, reference)[0] for game, runs in ours.items()}
        games = {method: sorted(runs_of) for method, runs_of in scores.items()}
        draw(results, tables, games, published, ours, options.png)
        print(options.png)


if __name__ == "__main__":
    main(tyro.cli(Options))
