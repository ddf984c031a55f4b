"""The promises of the scripts in results/."""
from pathlib import Path

import numpy as np
import pytest

import aggregate

RESULTS = Path(__file__).parents[1] / "results"


def published_runs():
    reference = aggregate.read_scores(aggregate.PUBLISHED)
    return aggregate.normalise(aggregate.read_scores(RESULTS / "published_runs.csv")["iris"], reference)


def test_the_published_runs_give_the_papers_aggregates():
    table = published_runs()
    assert table.shape == (26, 5)
    values = {name: value for name, (value, _, _) in aggregate.aggregate(table, draws=10).items()}
    paper = {"mean": 1.046, "median": 0.289, "interquartile mean": 0.501, "optimality gap": 0.512}
    assert values == pytest.approx(paper, abs=0.0006)


def test_bootstrap_draws_runs_within_each_game_and_never_across_games():
    table = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    samples = aggregate.stratified_bootstrap(table, draws=4000)
    assert samples.shape == (4000, 2, 3)
    for game in range(2):
        drawn, counts = np.unique(samples[:, game], return_counts=True)
        assert drawn.tolist() == table[game].tolist() and counts / 12_000 == pytest.approx(np.full(3, 1 / 3), abs=0.02)
    equal_runs = np.repeat(np.arange(26.0)[:, None], 5, axis=1)  # games differ, but no game's runs do
    assert all(low == high for _, low, high in aggregate.aggregate(equal_runs, draws=50).values())


def test_intervals_hold_the_value_and_have_the_width_of_the_means_standard_error():
    rng = np.random.default_rng(0)
    table = rng.normal(0.5, 0.2, size=(20, 10))
    value, low, high = aggregate.aggregate(table)["mean"]
    error = np.sqrt((table.var(axis=1) / 10).mean() / 20)  # of the mean of 20 games' means, each with its own runs
    assert low < value < high and (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_games_with_other_numbers_of_runs_are_refused():
    reference = {"random": {"A": [0.0], "B": [0.0]}, "human": {"A": [1.0], "B": [2.0]}}
    assert aggregate.normalise({"B": [1.0], "A": [3.0]}, reference).tolist() == [[3.0], [0.5]]
    with pytest.raises(ValueError, match="as many runs"):
        aggregate.normalise({"A": [1.0], "B": [1.0, 2.0]}, reference)
