"""Does the dream's paddle obey, and does the dream tell a caught ball from a missed one? For Breakout alone.

    python results/contacts.py runs/...

1. The paddle. Random actions are played in the game and in dreams. How far the paddle moves in a step is explained by the
   actions of this step and the three before it (least squares); what they do not explain is printed in pixels. The game
   has some too: walls, and a paddle that begins anew with each life. A paddle that jumps in dreams can't learn to catch.
2. The ball. In the later half of a run's replay, it came down and was caught, or missed. From five steps before, dreams
   go on under the actions that were taken: those of a caught ball should not end, those of a missed one should.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

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
    """Counts what a dream of Breakout does to paddle and ball."""

    run_dir: tyro.conf.Positional[str]  # Folder of a run of Breakout, with its replay
    given: int = 4  # Real frames that a dream goes on from
    starts: int = 128  # Dreams of each kind
    seed: int = 0  # Of everything random
    steps: int = 18  # Dreamed steps: five to the contact, and what an end needs to come


def places(frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames (N, 3, 64, 64) in [0, 1] -> whether a ball is seen, its column and row, and the paddle's column (N,)."""
    red = frames[:, 0].float()
    ball, paddle = red[:, 29:55, 4:60], (red[:, 57:59, 4:60] - 0.25).clamp(min=0).sum(dim=1)
    brightest, at = ball.flatten(1).max(dim=1)
    column = (paddle * torch.arange(56)).sum(dim=1) / paddle.sum(dim=1).clamp(min=1e-6)
    return brightest > 0.12, at % 56, at // 56, column


def unexplained(columns: list[Tensor], actions: list[Tensor]) -> float:
    """The paddle's columns and the actions of T steps, (N,) each -> std of its moves that the actions don't explain."""
    moves, pushed = torch.stack(columns, dim=1).diff(dim=1), torch.stack(actions, dim=1)
    pushed = (pushed == 2).double() - (pushed == 3).double()  # right, left
    x = torch.stack([pushed[:, 3 - lag : moves.shape[1] - lag] for lag in range(4)], dim=2).flatten(0, 1)
    y = moves[:, 3:].flatten().double()
    return (y - x @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]).std().item()


@torch.no_grad()
def paddle(dream: Dream, replay: Steps, options: Options) -> None:
    rng, env = np.random.default_rng(options.seed), make_env("BreakoutNoFrameskip-v4", 30, 10_000, True)
    seen, read, played, frame = [], [], [], env.reset(seed=options.seed)[0]
    for _ in range(1500):
        frames = to_model(torch.from_numpy(frame)[None])
        seen.append(places(frames)[3])
        read.append(places(dream.tokenizer.reconstruct(frames))[3])
        played.append(torch.tensor([rng.integers(4)]))
        frame, _, terminated, truncated, _ = env.step(int(played[-1]))
        frame = env.reset()[0] if terminated or truncated else frame
    history, _ = replay.sample(rng, options.starts, range(1 - options.given, 1), "steps")
    tokens = dream.tokenizer.encode(replay.frames_at(history.ravel(), torch.device("cpu"))).unflatten(0, history.shape)
    blocks = torch.cat([tokens, torch.from_numpy(replay.actions[history])[..., None]], dim=2)
    frames, dreamed, actions = dream.reset_from_tokens(blocks.flatten(1)[:, :-1]), [], []
    for _ in range(20):
        dreamed.append(places(frames)[3])
        actions.append(torch.from_numpy(rng.integers(4, size=options.starts)))
        frames, _, _ = dream.step(actions[-1])
    print(f"moves of the paddle in a step that the actions don't explain, in pixels: game {unexplained(seen, played):.1f}, "
          f"decoded {unexplained(read, played):.1f}, dream {unexplained(dreamed, actions):.1f}")  # fmt: skip


def contacts(replay: Steps) -> tuple[list[int], list[int], list[int]]:
    """Steps at which a ball that comes down was last seen, and then caught; missed; missed by at most 10 pixels."""
    first = len(replay) // 2
    parts = [places(to_model(torch.from_numpy(part))) for part in np.array_split(replay.frames[first:], 100)]
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
            narrowly += [first + step] * (abs(at - paddle[step + 2]) < 10)
        step += 5
    return caught, missed, narrowly


def main(options: Options) -> None:
    agent, _ = load_agent(options.run_dir)
    try:
        replay = Steps(np.memmap(Path(options.run_dir) / "replay/steps.bin", STEP, "r"))
    except (OSError, ValueError) as error:
        raise IrisError(f"{options.run_dir} has no replay: name the folder of a run") from error
    torch.manual_seed(options.seed)
    dream, rng = Dream(agent.tokenizer, agent.world_model), np.random.default_rng(options.seed)
    paddle(dream, replay, options)
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
