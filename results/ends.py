"""Does a dream end a life when the game does? A policy can learn to see no better than its dreams tell hit from miss.

    python results/ends.py runs/...

Takes steps of play from the later half of a run's replay: some whose episode (in an Atari game, a life) ended within the
next steps, and as many whose episode went on. From each a dream goes on under the actions that were taken. A perfect
dream would end all of the first and none of the second.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from iris_train import STEP, IrisError, Steps, load_agent
from iris_world_model import Dream


@dataclass
class Options:
    """Counts dreamed ends against those of the game."""

    run_dir: tyro.conf.Positional[str]  # Folder of a run, with its replay
    given: int = 4  # Real frames that a dream goes on from
    kept: int = 0  # Blocks that a dream keeps when its context is full; 0 is its own number
    steps: int = 19  # Dreamed steps
    starts: int = 256  # Dreams of each kind
    seed: int = 0  # Of everything random


def load_run(run_dir: str) -> tuple[Dream, Steps]:
    """A run's folder -> a dream of its models, and its replay. Raises IrisError."""
    agent, _ = load_agent(run_dir)
    try:
        replay = Steps(np.memmap(Path(run_dir) / "replay/steps.bin", STEP, "r"))
    except (OSError, ValueError) as error:
        raise IrisError(f"{run_dir} has no replay: name the folder of a run") from error
    return Dream(agent.tokenizer, agent.world_model), replay


def begin(dream: Dream, frames: Tensor, actions: np.ndarray) -> Tensor:
    """Real frames (N, L, 3, 64, 64) and actions (N, L), the last still to come -> the first frames (N, 3, 64, 64)."""
    tokens = dream.tokenizer.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])  # (N, L, K)
    blocks = torch.cat([tokens, torch.from_numpy(actions)[..., None]], dim=2)
    return dream.reset_from_tokens(blocks.flatten(1)[:, :-1])


def choose(replay: Steps, options: Options) -> tuple[list[int], list[int], list[int]]:
    """Steps whose episode ends 5 to `steps` steps later, after how many it does, and steps whose episode goes on."""
    ending, going_on = [], []
    for start, stop in zip(replay.starts.tolist(), replay.stops.tolist(), strict=True):
        for step in range(max(start + options.given - 1, len(replay) // 2), stop - 5):
            if stop - step > options.steps + 1:
                going_on.append(step)
            elif replay.ends[stop - 1]:
                ending.append((step, stop - 1 - step))
    rng, n = np.random.default_rng(options.seed), options.starts
    if min(len(ending), len(going_on)) < n:
        raise IrisError(f"the replay has {len(ending)} starts that end, {len(going_on)} that go on: lower --starts")
    steps, after = zip(*(ending[i] for i in rng.permutation(len(ending))[:n]), strict=True)
    return list(steps), list(after), [going_on[i] for i in rng.permutation(len(going_on))[:n]]


@torch.no_grad()
def dreamed_ends(dream: Dream, replay: Steps, starts: list[int], options: Options) -> Tensor:
    """-> the step at which each dream first ends (N,), `steps` where it does not."""
    steps = np.array(starts)[:, None]
    history = steps + np.arange(1 - options.given, 1)  # (N, given)
    begin(dream, replay.frames_at(history, torch.device("cpu")), replay.actions[history])
    actions = torch.from_numpy(replay.actions[np.minimum(steps + np.arange(options.steps), len(replay) - 1)])
    ends = torch.stack([dream.step(actions[:, t])[2] for t in range(options.steps)], dim=1)  # (N, steps)
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1), options.steps)


def main(options: Options) -> None:
    dream, replay = load_run(options.run_dir)
    dream.kept_blocks = options.kept or dream.kept_blocks
    torch.manual_seed(options.seed)
    ending, after, going_on = choose(replay, options)
    found, false = dreamed_ends(dream, replay, ending, options), dreamed_ends(dream, replay, going_on, options)
    close = ((found - torch.tensor(after)).abs() <= 2) & (found < options.steps)
    print(f"{options.starts} lives that ended within {options.steps} steps: {(found < options.steps).float().mean():.0%} "
          f"of their dreams did, {close.float().mean():.0%} within two steps of the time")  # fmt: skip
    print(f"{options.starts} lives that went on: {(false < options.steps).float().mean():.0%} of their dreams ended")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except IrisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
