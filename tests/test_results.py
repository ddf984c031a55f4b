"""The promises of the scripts in results/."""
import dataclasses
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import aggregate
import ends
import export
import games  # noqa: F401  registers the small games
import iris_train
from test_train import FAST

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


def test_starts_are_told_apart_by_whether_their_life_ends_in_the_steps_to_come():
    play = np.zeros(60, iris_train.STEP)
    play["ends"][[9, 39]] = 1  # lives of steps 0 to 9, 10 to 39, and 40 to 59, which goes on
    options = ends.Options("", given=2, steps=8, starts=4)
    steps, after, going_on = ends.choose(iris_train.Steps(play), options)
    assert sorted(zip(steps, after, strict=True)) == [(31, 8), (32, 7), (33, 6), (34, 5)]  # of the later half
    assert len(set(going_on)) == 4 and set(going_on) <= {30, *range(41, 51)}


# --- models that come with the clone ----------------------------------------------------------------------------------
def test_a_small_model_is_a_checkpoint_like_any_other_with_its_weights_rounded_to_float16(tmp_path):
    argv = [*FAST, "--env-id", "Counter-v0", "--run-dir", str(tmp_path / "run"), "--epochs", "1", "--eval-every", "0"]
    iris_train.main(iris_train.parse_args(argv))
    export.main(export.Options(tmp_path / "run", tmp_path / "models/counter.pt"))
    (agent, args), (small, small_args) = (iris_train.load_agent(tmp_path / x) for x in ("run", "models/counter.pt"))
    assert args.run_dir and small_args == dataclasses.replace(args, run_dir="")
    for (name, weight), other in zip(agent.state_dict().items(), small.state_dict().values(), strict=True):
        rounded = weight.is_floating_point() and not name.endswith((".mean", ".std"))
        assert torch.equal(weight.half().to(weight.dtype) if rounded else weight, other), name
    sizes = [(tmp_path / x).stat().st_size for x in ("models/counter.pt", "run/checkpoint.pt")]
    assert sizes[0] < sizes[1] / 4
    argv = [*FAST, "--env-id", "Counter-v0", "--run-dir", str(tmp_path / "next"), "--init-from", str(tmp_path / "models/counter.pt")]
    fresh = iris_train.build(iris_train.parse_args(argv)).agent
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), small.parameters(), strict=True))


@pytest.mark.parametrize("path", sorted((RESULTS / "models").glob("*.pt")), ids=lambda path: path.name)
def test_models_that_come_with_the_clone_load_and_are_small(path):
    agent, args = iris_train.load_agent(path)
    assert path.stat().st_size < 5e6 and path.stem in args.env_id.lower() and not args.run_dir
    frames = torch.rand(1, 3, 64, 64)
    assert (agent.tokenizer.reconstruct(frames) - 0.5).abs().max() <= 0.5 and agent.world_model.num_actions > 1


# --- a GPU for ten minutes --------------------------------------------------------------------------------------------
def test_the_gpu_check_goes_on_after_a_step_that_fails_or_takes_too_long_and_names_both_at_the_end(tmp_path):
    python = tmp_path / "python"
    cases = 'case "$*" in *"-m pytest"*) exit 3;; *phases*) sleep 99;; esac'
    python.write_text(f'#!/bin/sh\necho "$@"\n{cases}\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "GPU_CHECK_SECONDS": "15", "IRIS_TEST_DEVICE": "cpu"}
    command = [RESULTS / "gpu_check.sh", "figures"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    failed = (tmp_path / "figures/failed.txt").read_text().splitlines()
    assert failed == ["FAILED: tests (exit code 3)", "FAILED: phases (stopped after 5 s)"]
    assert all(line in result.stdout for line in failed)
    assert "--tables sharing" in (tmp_path / "figures/sharing.txt").read_text()  # the last step ran all the same


# --- README -----------------------------------------------------------------------------------------------------------
def test_the_readme_is_short_counts_its_lines_right_and_points_to_files_that_are_there():
    text = (RESULTS.parent / "README.md").read_text()
    assert len(text.split()) <= 1500
    counted = {file: int(lines) for file, lines in re.findall(r"\| `(iris_\w+\.py)` \| (\d+) \|", text)}
    assert counted == {path.name: len(path.read_text().splitlines()) for path in RESULTS.parent.glob("iris_*.py")}
    for name, folder in (("README.md", RESULTS.parent), ("results/README.md", RESULTS)):
        links = re.findall(r"\]\((?!http)([^)#]+)\)", (RESULTS.parent / name).read_text())
        assert links and all((folder / link).exists() for link in links), [x for x in links if not (folder / x).exists()]


def test_scripts_that_documents_name_are_there():
    for document in (RESULTS.parent / "README.md", RESULTS / "README.md"):
        scripts = set(re.findall(r"\b((?:results|tests)/\w+\.py)\b", document.read_text()))
        assert scripts and all((RESULTS.parent / script).exists() for script in scripts), scripts
