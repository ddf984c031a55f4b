"""How long does a dream stay with the real game? Measures what `iris_world_model.Dream` keeps when its context is full.

    python results/coherence.py --run-dir runs/...

The agent plays real games. Dreams begin with the first frames of their segments and are given the same actions; each
of their frames is held against the real one. Done twice on the same segments: once the project's way, which refills a
full context with the latest three quarters of its blocks, and once the published way, which flushes it to the last frame.
The error is that of the pixels that move, those that differ from the median frame by over 0.1 in either picture: a
dream whose ball is elsewhere is wrong at both places.
"""
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from iris_train import IrisError, checkpoint_path, load_agent, play_test_episodes, to_model, to_stored
from iris_world_model import Dream


@dataclass
class Args:
    run_dir: str  # Folder of a run, or a checkpoint
    segments: int = 64  # Segments of real games
    steps: int = 60  # Dreamed steps of each
    given: int = 4  # Real frames that a dream begins with, so that it knows how things move
    games: int = 16  # Games that are played for them
    temperature: float = 1.0  # Of the policy that plays
    seed: int = 1
    json: str = ""  # File to keep the figures in
    animation: str = ""  # A .webp or .gif of four segments: the real game above, the refilled dream below


@torch.no_grad()
def measure(args: Args) -> dict:
    torch.manual_seed(args.seed)
    agent, train_args = load_agent(checkpoint_path(args.run_dir))
    settings = replace(train_args, test_episodes=args.games, test_envs=args.games, test_temperature=args.temperature)
    games = [game["steps"] for game in play_test_episodes(agent, settings, torch.device("cpu"), args.seed)]
    length, rng = args.given + args.steps, np.random.default_rng(args.seed)
    long_enough = [game for game in games if len(game) > length]
    if not long_enough:
        raise IrisError(f"no game lasted {length} steps: measure fewer --steps")
    frames, actions = [], []
    for number in range(args.segments):
        game = long_enough[number % len(long_enough)]
        start = int(rng.integers(len(game) - length))
        frames.append(to_model(torch.from_numpy(game["frames"][start : start + length])))
        actions.append(torch.from_numpy(game["actions"][start : start + length].copy()))
    frames, actions = torch.stack(frames), torch.stack(actions)  # (N, L, 3, 64, 64), (N, L)
    everything = np.concatenate([game["frames"] for game in games])
    median = to_model(torch.from_numpy(np.median(everything[:: 1 + len(everything) // 1000], axis=0).astype(np.uint8)))

    def error(pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) twice -> mean absolute error of the pixels that move, (N,)"""
        moves = ((pictures - median).abs().amax(1) > 0.1) | ((real - median).abs().amax(1) > 0.1)  # (N, 64, 64)
        difference = (pictures - real).abs().mean(1) * moves
        return difference.sum((1, 2)) / moves.sum((1, 2)).clamp(min=1)

    tokens = torch.stack([agent.tokenizer.encode(segment) for segment in frames])  # (N, L, K)
    dream = Dream(agent.tokenizer, agent.world_model)
    ways = {"refill": dream.kept_blocks, "flush": 1}
    errors = {"reconstruction": torch.stack(
        [error(agent.tokenizer.decode(tokens[:, t]), frames[:, t]) for t in range(args.given, length)], dim=1
    )}  # fmt: skip
    for way, dream.kept_blocks in ways.items():
        torch.manual_seed(args.seed)
        blocks = torch.cat([tokens, actions[..., None]], dim=2)[:, : args.given]  # real steps so far
        dream.reset_from_tokens(blocks.flatten(1)[:, :-1])
        dreamed = [dream.step(actions[:, t - 1])[0] for t in range(args.given, length)]
        if way == "refill" and args.animation:
            real = to_stored(frames[:4, args.given :])  # (4, steps, 64, 64, 3)
            animate(real.numpy(), to_stored(torch.stack(dreamed, dim=1)[:4]).numpy(), Path(args.animation))
        each = [error(picture, frames[:, t]) for t, picture in enumerate(dreamed, args.given)]
        errors[way] = torch.stack(each, dim=1)

    # A dream is lost where its error has gone two thirds of the way from a reconstruction's to the worst that is seen.
    good, worst = errors["reconstruction"].mean(), errors["flush"][:, args.steps // 2 :].mean()
    limit = good + (worst - good) * 2 / 3
    result = {"blocks": agent.world_model.config.max_blocks, "limit": limit.item(), "nats": {}}
    # And without any dreaming: what the world model thinks of the next real frame, given so many real blocks.
    k = tokens.shape[2]
    for blocks in (*ways.values(), result["blocks"] - 1):
        losses = []
        for stop in range(result["blocks"], length - 1, result["blocks"]):
            text = torch.cat([tokens, actions[..., None]], dim=2)[:, stop - blocks : stop + 1].flatten(1)
            logits = agent.world_model(text).observation_logits[:, -k - 1 : -1]  # the last one is of the frame after
            losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, stop].flatten()))
        result["nats"][blocks] = torch.stack(losses).mean().item()
    for way, values in errors.items():
        lost = torch.cat([values > limit, torch.ones(len(values), 1, dtype=torch.bool)], dim=1).float().argmax(dim=1)
        result[way] = {"errors": values.mean(0).tolist(), "steps_until_lost": lost.float().tolist()}
    return result


def animate(above: np.ndarray, below: np.ndarray, path: Path) -> None:
    """Two rows of episodes (N, steps, 64, 64, 3) uint8 -> an animation, 15 steps a second."""
    rows = [np.pad(row, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for row in (above, below)]
    steps = np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1)  # (steps, 132, N * 66, 3)
    pictures = []
    for step in steps:  # three times as large, with labels on the left
        picture = np.pad(step.repeat(3, 0).repeat(3, 1), ((0, 0), (78, 0), (0, 0)), constant_values=255)
        for row, label in enumerate(("game", "dream")):
            where = 8, 198 * row + 104
            cv2.putText(picture, label, where, cv2.FONT_HERSHEY_SIMPLEX, 0.65, (0, 0, 0), 1, cv2.LINE_AA)
        pictures.append(np.ascontiguousarray(picture[..., ::-1]))
    animation = cv2.Animation()
    animation.frames = pictures
    animation.durations = np.full(len(steps), 67, np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwriteanimation(str(path), animation, [cv2.IMWRITE_WEBP_QUALITY, 80]):
        raise IrisError(f"can't write {path}")


if __name__ == "__main__":
    try:
        args = tyro.cli(Args)
        result = measure(args)
    except IrisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.segments} segments of {args.steps} steps; the world model holds {result['blocks']} blocks")
    shown = [step for step in (1, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100) if step <= args.steps]
    print("| error of what moves, after steps | " + " | ".join(map(str, shown)) + " | steps until lost |")
    print("| --- " * (len(shown) + 2) + "|")
    for way in ("reconstruction", "refill", "flush"):
        values, lost = result[way]["errors"], np.array(result[way]["steps_until_lost"])
        spread = f"{lost.mean():.1f} ± {lost.std(ddof=1) / len(lost) ** 0.5:.1f}"
        print(f"| {way} | " + " | ".join(f"{values[step - 1]:.3f}" for step in shown) + f" | {spread} |")
    print("nats a token of the next real frame, after so many real blocks: " + ", ".join(
        f"{blocks}: {nats:.3f}" for blocks, nats in result["nats"].items()
    ))  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(result) + "\n")
