"""Plays test games with the agents of runs, and as many at random in the same harness; keeps every score.

    python results/scores.py runs/a runs/b ... --csv results/scores.csv

A run counts as better than chance where its mean lies outside the 95% bootstrap interval of the random player's mean.
Whether it looks at the screen is another question: who always goes right scores 8 on Breakout. So beside each agent plays
its blind twin, which draws actions as often as the agent took them, and sees nothing.
"""
import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from iris_agent import Agent
from iris_train import Args, IrisError, load_agent, play_test_episodes, read_checkpoint


@dataclass
class Options:
    """Scores of test games, for each run and for a random player of its game."""

    runs: tyro.conf.Positional[list[str]]  # Run folders
    csv: str = "scores.csv"  # A line each: game, player, seed, epoch, temperature, mean, its 95% interval, all scores
    games: int = 20  # Test games of each player
    max_frames: int = Args.test_max_frames  # Raw Atari frames after which a game is cut off
    seed: int = 7  # Of the games


def bootstrap_interval(scores: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """Scores (N,) -> bounds that hold 95% of the means of N scores drawn from them with replacement."""
    means = np.random.default_rng(0).choice(scores, (draws, len(scores))).mean(axis=1)
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


class Blind:
    """The agent's actions at the agent's frequencies (A,), drawn without a look at the frames."""

    def __init__(self, agent: Agent, games: list[dict], num_actions: int):
        self.actor_critic = agent.actor_critic  # for the LSTM's shape
        taken = np.concatenate([game["steps"]["actions"] for game in games])
        self.frequencies = torch.from_numpy(np.bincount(taken, minlength=num_actions) / len(taken))

    def act(self, frames: Tensor, state: tuple, temperature: float) -> tuple[Tensor, tuple]:
        return torch.multinomial(self.frequencies, len(frames), replacement=True), state


def main(options: Options) -> None:
    rows, chance = [], {}
    for folder in options.runs:
        agent, args = load_agent(folder)
        epoch = read_checkpoint(folder)[0]["epoch"]
        args = replace(args, test_episodes=options.games, test_envs=16, test_max_frames=options.max_frames)
        players = [("iris", agent, args.test_temperature), ("blind", None, 1.0)]
        if args.env_id not in chance:
            players.append(("random", agent, float("inf")))
        for name, player, temperature in players:
            if name == "blind":
                player = Blind(agent, games, agent.world_model.num_actions)  # of the games just played
            torch.manual_seed(options.seed)
            settings = replace(args, test_temperature=temperature)
            games = play_test_episodes(player, settings, torch.device("cpu"), options.seed)
            scores = np.array([game["return"] for game in games])
            low, high = bootstrap_interval(scores)
            if name == "random":
                chance[args.env_id] = (low, high)
            whose = ("", "") if name == "random" else (args.seed, epoch)
            rows.append([args.env_id, name, *whose, temperature, f"{scores.mean():.2f}", f"{low:.2f}", f"{high:.2f}"])
            rows[-1].append(" ".join(f"{score:g}" for score in scores))
            print(*rows[-1], flush=True)
    Path(options.csv).parent.mkdir(parents=True, exist_ok=True)
    with open(options.csv, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["game", "player", "seed", "epoch", "temperature", "mean", "low", "high", "scores"])
        writer.writerows(rows)
    for game, player, seed, *_, mean, _, _, _ in rows:
        low, high = chance[game]
        if player == "iris":
            print(f"{game}, seed {seed}: {'within' if low <= float(mean) <= high else 'outside'} chance's interval")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except IrisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
