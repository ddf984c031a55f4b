"""Is sight worth anything in the dream? And does the dream tell a caught ball from a missed one? For Breakout alone.

    python results/contacts.py runs/...

1. A scripted player who keeps the paddle under the ball, and one who acts at random, play lives: in the game, in the game
   seen through the tokenizer, and in dreams that begin where lives of the run's replay began. What sight is worth in
   the dream is all that a policy can learn there.
2. In the later half of the replay, balls came down and were caught, or missed. From five steps before, dreams go on
   under the actions that were taken: those of a caught ball should not end, those of a missed one should.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import tyro
from ends import dreamed_ends
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from iris_train import STEP, IrisError, Steps, load_agent, make_env, to_model
from iris_world_model import Dream


@dataclass
class Options:
    """Compares lives and catches in dreams of Breakout with those in the game."""

    run_dir: tyro.conf.Positional[str]  # Folder of a run of Breakout, with its replay
    given: int = 4  # Real frames that a dream goes on from
    starts: int = 128  # Dreams of each kind
    seed: int = 0  # Of everything random
    life: int = 60  # Steps after which a life is cut off
    steps: int = 18  # Dreamed steps before and after a contact: five, and what an end needs to come


def places(frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames (N, 3, 64, 64) in [0, 1] -> whether a ball is seen, its column and row, and the paddle's column (N,)."""
    red = frames[:, 0].float()
    ball, paddle = red[:, 29:55, 4:60], (red[:, 57:59, 4:60] - 0.25).clamp(min=0).sum(dim=1)
    brightest, at = ball.flatten(1).max(dim=1)
    column = (paddle * torch.arange(56)).sum(dim=1) / paddle.sum(dim=1).clamp(min=1e-6)
    return brightest > 0.12, at % 56, at // 56, column


def actions_of(frames: Tensor, rng: np.random.Generator, scripted: bool) -> Tensor:
    """Frames (N, 3, 64, 64) -> actions (N,): fire without a ball, else left or right of more than 3 pixels, or random."""
    ball, at, _, paddle = places(frames)
    followed = torch.where(at > paddle + 3.5, 2, torch.where(at < paddle - 3.5, 3, 0))
    return torch.where(ball, followed, 1) if scripted else torch.from_numpy(rng.integers(4, size=len(frames)))


def played_lives(options: Options, scripted: bool, view: Callable[[Tensor], Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and rewards of lives (N,) in the game, seen through `view`. None is longer than `life`."""
    rng, env = np.random.default_rng(options.seed), make_env("BreakoutNoFrameskip-v4", 30, 10_000, True)
    lengths, rewards = np.zeros(options.starts, int), np.zeros(options.starts)
    frame, over = env.reset(seed=options.seed)[0], False
    for i in range(options.starts):
        while lengths[i] < options.life and not over:
            action = actions_of(view(to_model(torch.from_numpy(frame)[None])), rng, scripted)
            frame, reward, terminated, truncated, _ = env.step(int(action))
            over, lengths[i], rewards[i] = terminated or truncated, lengths[i] + 1, rewards[i] + np.sign(reward)
        frame, over = env.reset(seed=None if over else int(rng.integers(2**31)))[0], False
    return lengths, rewards


def dreamed_lives(options: Options, scripted: bool, dream: Dream, replay: Steps) -> tuple[np.ndarray, np.ndarray]:
    """The same in dreams, which go on from the first `given` frames of lives of the replay's later half."""
    rng = np.random.default_rng(options.seed)
    starts = replay.starts[(replay.stops - replay.starts > 10) & (replay.starts > len(replay) // 2)]
    history = rng.permutation(starts)[: options.starts, None] + np.arange(options.given)
    tokens = dream.tokenizer.encode(replay.frames_at(history.ravel(), torch.device("cpu"))).unflatten(0, history.shape)
    blocks = torch.cat([tokens, torch.from_numpy(replay.actions[history])[..., None]], dim=2)
    frames, alive = dream.reset_from_tokens(blocks.flatten(1)[:, :-1]), np.ones(len(history), bool)
    lengths, rewards = np.full(len(history), options.given - 1), np.zeros(len(history))
    for _ in range(options.life - options.given + 1):
        frames, reward, ends = dream.step(actions_of(frames, rng, scripted))
        lengths, rewards, alive = lengths + alive, rewards + reward.numpy() * alive, alive & ~ends.numpy()
    return lengths, rewards


def contacts(replay: Steps) -> tuple[list[int], list[int], list[int]]:
    """Steps at which a ball that comes down was last seen, and then caught; missed; missed by at most 10 pixels."""
    first = len(replay) // 2
    parts = [places(to_model(torch.from_numpy(part.copy()))) for part in np.array_split(replay.frames[first:], 100)]
    ball, column, row, paddle = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    ends, caught, missed, narrowly, step = replay.ends[first:], [], [], [], 10
    while step < len(ball) - 25:
        falls = ball[step - 1 : step + 1].all() and row[step] > row[step - 1] and row[step] >= 19
        if not falls or (ball[step + 1] and row[step + 1] > row[step]) or ends[step - 8 : step].any():
            step += 1
            continue
        after = slice(step + 1, step + 8)
        up, over = (ball[after] & (row[after] < row[step])).any(), ends[step : step + 13].any()
        if up and not over:
            caught.append(first + step)
        elif over and not up:
            missed.append(first + step)
            at = column[step] + 2 * (column[step] - column[step - 1])  # where the ball reaches the paddle's row
            narrowly += [first + step] * bool(abs(at - paddle[step + 2]) < 10)
        step += 5
    return caught, missed, narrowly


@torch.no_grad()
def main(options: Options) -> None:
    agent, _ = load_agent(options.run_dir)
    try:
        replay = Steps(np.memmap(Path(options.run_dir) / "replay/steps.bin", STEP, "r"))
    except (OSError, ValueError) as error:
        raise IrisError(f"{options.run_dir} has no replay: name the folder of a run") from error
    dream, rng = Dream(agent.tokenizer, agent.world_model), np.random.default_rng(options.seed)
    for player in ("scripted", "random"):
        torch.manual_seed(options.seed)
        lives = {
            "game": played_lives(options, player == "scripted", lambda frames: frames),
            "decoded game": played_lives(options, player == "scripted", dream.tokenizer.reconstruct),
            "dream": dreamed_lives(options, player == "scripted", dream, replay),
        }
        for where, (lengths, rewards) in lives.items():
            print(f"{player:8}  {where:12}  a life of {lengths.mean():.1f} steps (at most {options.life}), "
                  f"{rewards.sum() / lengths.sum():.4f} rewards a step")  # fmt: skip
    for what, found in zip(("caught", "missed", "missed by at most 10 pixels"), contacts(replay), strict=True):
        starts = rng.permutation(found)[: options.starts] - 5
        ended = (dreamed_ends(dream, replay, starts, options) < options.steps).float().mean()
        print(f"balls {what}: {len(found)}, of {len(starts)} dreams {ended:.0%} ended")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except IrisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
