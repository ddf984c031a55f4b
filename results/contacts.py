"""Is sight worth anything in the dream? And does the dream tell a caught ball from a missed one? For Breakout alone.

    python results/contacts.py runs/...

1. From the same states of the game, a scripted player who keeps the paddle under the ball and one who acts at random go on
   for 20 steps: in the game, seen through the tokenizer, and in the dream. How many lives end, what is earned? The states
   are of random play and of the scripted player's. What sight is worth in the dream is all that a policy can learn.
2. In the frames of these states, how often does a reconstruction have the ball in its place, and the paddle? And how
   often does a dream of a single step, which goes on from all of a state's frames but the last, lose the last one's ball?
3. In the later half of the replay, balls came down and were caught, or missed. From five steps before, dreams go on
   under the actions that were taken: those of a caught ball should not end, those of a missed one should.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from ends import begin, dreamed_ends, load_run
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from iris_tokenizer import Tokenizer
from iris_train import IrisError, Steps, make_env, to_model
from iris_world_model import Dream

HORIZON = 20  # Steps that go on from a state: a dream's


@dataclass
class Options:
    """Compares play in dreams of Breakout with play in the game."""

    run_dir: tyro.conf.Positional[str]  # Folder of a run of Breakout, with its replay
    given: int = 4  # Real frames that a dream goes on from
    starts: int = 128  # Dreams of each kind
    seed: int = 0  # Of everything random
    steps: int = 18  # Dreamed steps before and after a contact: five, and what an end needs to come


def places(frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames (N, 3, 64, 64) in [0, 1] -> whether a ball is seen, its column and row, and the paddle's column (N,)."""
    red = frames[:, 0].float()
    ball, paddle = red[:, 29:55, 4:60], (red[:, 57:59, 4:60] - 0.25).clamp(min=0).sum(dim=1)
    brightest, at = ball.flatten(1).max(dim=1)
    column = (paddle * torch.arange(56)).sum(dim=1) / paddle.sum(dim=1).clamp(min=1e-6)
    return brightest > 0.12, at % 56, at // 56, column


def kept(tokenizer: Tokenizer, states: list[tuple]) -> tuple[list[float], float]:
    """-> shares of the balls that a reconstruction has within two pixels, at the wall (rows 29 to 32), in between, and
    at the paddle (48 to 54); and of the paddles that it has within two."""
    frames = to_model(torch.from_numpy(np.concatenate([state[2] for state in states])))
    (ball, column, row, paddle), there = places(frames), places(tokenizer.reconstruct(frames))
    right = there[0] & ((there[1] - column).abs() <= 2) & ((there[2] - row).abs() <= 2)
    parts = [ball & (row >= first) & (row < end) for first, end in ((0, 4), (4, 19), (19, 26))]
    return [right[part].float().mean().item() for part in parts], ((there[3] - paddle).abs() <= 2).float().mean().item()


def actions_of(frames: Tensor, rng: np.random.Generator, scripted: bool) -> Tensor:
    """Frames (N, 3, 64, 64) -> actions (N,): fire without a ball, else towards it from over 3 pixels; or random."""
    ball, at, _, paddle = places(frames)
    followed = torch.where(at > paddle + 3.5, 2, torch.where(at < paddle - 3.5, 3, 0))
    return torch.where(ball, followed, 1) if scripted else torch.from_numpy(rng.integers(4, size=len(frames)))


def states_of(env: gym.Env, options: Options, scripted: bool) -> list[tuple]:
    """Every eleventh step of play, a fifth of it random: the emulator's state, lives, and the latest `given` frames and
    actions. The last action is still to come."""
    rng, states, step = np.random.default_rng(options.seed), [], 0
    frames, actions = [env.reset(seed=options.seed)[0]], []
    while len(states) < options.starts:
        latest = to_model(torch.from_numpy(frames[-1])[None])
        actions.append(int(actions_of(latest, rng, scripted and rng.random() < 0.8)))
        frame, _, terminated, truncated, _ = env.step(actions[-1])
        frames.append(frame)
        step += 1
        if terminated or truncated:
            frames, actions = [env.reset()[0]], []
        elif step % 11 == 0 and len(frames) >= options.given:
            ale, n = env.unwrapped.ale, options.given
            states.append((ale.cloneState(), ale.lives(), np.stack(frames[-n:]), [*actions, 0][-n:]))
    return states


def next_balls(dream: Dream, states: list[tuple]) -> tuple[int, float, float]:
    """-> balls that the last two frames of the states show; and, where a dream of one step goes on from all frames but
    the last, the shares of them that it does not show, and that it has more than two pixels from the reconstruction's."""
    frames = to_model(torch.from_numpy(np.stack([state[2] for state in states])))  # (N, given, 3, 64, 64)
    actions = np.array([state[3] for state in states])
    before, after = (places(dream.tokenizer.reconstruct(frames[:, t])) for t in (-2, -1))
    begin(dream, frames[:, :-1], actions[:, :-1])
    ball, column, row, _ = places(dream.step(torch.from_numpy(actions[:, -2]))[0])
    off = ((column - after[1]).abs() > 2) | ((row - after[2]).abs() > 2)
    shown = before[0] & after[0]
    return int(shown.sum()), (~ball)[shown].float().mean().item(), (ball & off)[shown].float().mean().item()


def in_the_game(
    env: gym.Env, states: list[tuple], scripted: bool, tokenizer: Tokenizer, options: Options
) -> np.ndarray:
    """-> of each state's next 20 steps, whether the life ended, and the rewards until then: (N, 2)."""
    rng, results = np.random.default_rng(options.seed), []
    for state, lives, frames, _ in states:
        env.unwrapped.ale.restoreState(state)
        env.lives, frame, over, steps, earned = lives, frames[-1], False, 0, 0.0
        while steps < HORIZON and not over:
            seen = tokenizer.reconstruct(to_model(torch.from_numpy(frame)[None]))
            frame, reward, terminated, truncated, _ = env.step(int(actions_of(seen, rng, scripted)))
            over, steps, earned = terminated or truncated, steps + 1, earned + np.sign(reward)
        results.append((over, earned))
    return np.array(results, float)


def in_the_dream(dream: Dream, states: list[tuple], scripted: bool, options: Options) -> np.ndarray:
    """The same in dreams that go on from the states' frames."""
    rng, frames = np.random.default_rng(options.seed), np.stack([state[2] for state in states])
    actions, alive, earned = np.array([state[3] for state in states]), np.ones(len(states), bool), 0.0
    seen = begin(dream, to_model(torch.from_numpy(frames)), actions)
    for _ in range(HORIZON):
        seen, rewards, ends = dream.step(actions_of(seen, rng, scripted))
        earned, alive = earned + rewards.numpy() * alive, alive & ~ends.numpy()
    return np.stack([~alive, earned], axis=1)


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
    (dream, replay), rng = load_run(options.run_dir), np.random.default_rng(options.seed)
    env = make_env("BreakoutNoFrameskip-v4", 30, 10**9, life_loss_ends=True)
    for play in ("random", "scripted"):
        states = states_of(env, options, play == "scripted")
        balls, paddles = kept(dream.tokenizer, states)
        print(f"{play} play: balls in their place at the wall {balls[0]:.0%}, between {balls[1]:.0%}, at the paddle "
              f"{balls[2]:.0%}; paddles {paddles:.1%}")  # fmt: skip
        torch.manual_seed(options.seed)
        print("one dreamed step: of {} balls, {:.0%} lost, {:.0%} off".format(*next_balls(dream, states)))
        for player in ("random", "scripted"):
            torch.manual_seed(options.seed)
            game = in_the_game(env, states, player == "scripted", dream.tokenizer, options).mean(axis=0)
            dreamt = in_the_dream(dream, states, player == "scripted", options).mean(axis=0)
            print(f"from {len(states)} states of {play} play, a {player} player: lives that ended, game {game[0]:.0%}, "
                  f"dream {dreamt[0]:.0%}; rewards, game {game[1]:.2f}, dream {dreamt[1]:.2f}", flush=True)  # fmt: skip
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
