"""Chapter 4 of IRIS: the loop. Play a little, learn to see, learn to foresee, learn to act; and again.

An epoch plays 200 steps of the real game and then trains the three models of chapters 1 to 3, one after the other; 600
epochs make a run (IRIS paper, section 2 and appendix). Nothing is learned from reality directly but to paint it
and to predict it: the policy is trained in the dream alone.

    +--> collect ------> train the ------> encode the ------> train the -------> train the ----+
    |    200 steps       tokenizer         replay, once       world model        actor-critic  |
    |    of the game     256 frames x200   (N, 16) tokens     64 x 20 steps x200 64 dreams x200|
    +------------------------------------------------------------------------------------------+
         from epoch 1    from epoch 6                         from epoch 26      from epoch 51     (first 500 collect)

Run it:   python iris_train.py --env-id BreakoutNoFrameskip-v4             # the paper's run; wants a GPU
          python iris_train.py --env-id BreakoutNoFrameskip-v4 --preset laptop
          python iris_train.py --resume runs/...                           # goes on exactly where it stood
          python iris_train.py --help                                      # every number below is an argument
Read it:  arguments, environment, replay, then the phases in the order of the picture, then checkpoints, then `main`.
"""
import ctypes
import difflib
import errno
import fcntl
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Callable, Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import trange

from iris_agent import (
    ActorCritic, ActorCriticConfig, Agent, Rollout, actor_critic_loss, agent_from_official, imagine, read_checkpoint,
)  # fmt: skip
from iris_tokenizer import (
    FRAME_SIZE, IrisError, Lpips, Tokenizer, TokenizerConfig, load_lpips, resize_frame, save_picture, to_model,
    to_stored,
)  # fmt: skip
from iris_world_model import Dream, WorldModel, WorldModelConfig

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


Preset = Literal["paper", "laptop", "catch"]


@dataclass
class Args:
    """Trains IRIS on one game. The defaults are the paper's (its appendix A and published configuration)."""

    # A gymnasium id with discrete actions and image observations; `module:Env-v0` imports the module first
    env_id: str = "BreakoutNoFrameskip-v4"
    # Where the other arguments start: the paper's sizes, or sizes for a machine without a GPU, or for tests/catch.py
    preset: Preset = "paper"
    seed: int = 1  # Seed of everything random
    device: str = "auto"  # cuda, cpu, ...; auto takes a GPU where there is one
    # Type of convolutions and products; auto is bf16 where the hardware has it, else fp32 (on a GPU with TF32)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # torch.compile the dream's token pass: on a GPU one launch in place of about 160. Compiling takes a minute at first
    compile: bool = False
    # lpips is the paper's and needs two weight files, pixel needs none; auto takes lpips if the files can be had
    perceptual_loss: Literal["auto", "lpips", "pixel"] = "auto"
    run_dir: str = ""  # Folder of the run; empty makes runs/{env_id}__iris__{seed}__{time}
    resume: str = ""  # Folder of a run to go on with; its own arguments apply
    init_from: str = ""  # Checkpoint of a run, or a published one, whose weights to start from
    load_tokenizer: bool = True  # With init_from: take over the tokenizer
    load_world_model: bool = True  # With init_from: take over the world model
    load_actor_critic: bool = True  # With init_from: take over the actor-critic
    track: bool = False  # Mirror TensorBoard to Weights & Biases (pip install wandb)
    wandb_project: str = "iris"  # Project to track in
    wandb_entity: str = ""  # Team to track for; empty is your own account

    epochs: int = 600  # Epochs of the run
    collect_epochs: int = 500  # In how many of them, from the first, the game is played
    collect_steps: int = 200  # Environment steps played in each of these (500 x 200 is the 100,000 of Atari 100k)
    collect_epsilon: float = 0.01  # Share of steps with a uniformly random action
    collect_temperature: float = 1.0  # Temperature of the policy while collecting
    # While no policy has been trained, each action is held for 1 to this many steps, mostly few: dithering never crosses
    # Freeway's road, so that the first reward is never seen (temporally extended exploration, Dabney et al., 2021)
    collect_hold: int = 1
    noop_max: int = 30  # Training games begin with 1 to this many no-ops
    max_frames: int = 20_000  # Raw Atari frames after which a training game is cut off
    # What all three phases draw uniformly from the replay: an episode, whatever its length, as published; or a step,
    # so that long episodes, where most rewards are, count by their length
    draw: Literal["episodes", "steps"] = "episodes"

    tokenizer_from: int = 6  # First epoch that trains the tokenizer
    tokenizer_steps: int = 200  # Its optimiser steps an epoch
    tokenizer_batch_size: int = 256  # Frames in each
    tokenizer_learning_rate: float = 1e-4  # Learning rate of its Adam
    # Last epoch that trains the tokenizer, its learning rate falling in the second half of its epochs; 0 trains it to
    # the end at the full rate, as published. A small world model can't follow tokens that keep changing
    tokenizer_until: int = 0
    world_model_from: int = 26  # First epoch that trains the world model
    world_model_steps: int = 200  # Its optimiser steps an epoch
    world_model_batch_size: int = 64  # Sequences in each, of world_model.max_blocks steps
    world_model_learning_rate: float = 1e-4  # Learning rate of its AdamW
    world_model_weight_decay: float = 0.01  # Weight decay of its AdamW, on the weights of linear layers
    actor_critic_from: int = 51  # First epoch that trains the actor-critic
    actor_critic_steps: int = 200  # Its optimiser steps an epoch
    actor_critic_batch_size: int = 64  # Dreams in each
    actor_critic_learning_rate: float = 1e-4  # Learning rate of its Adam
    burn_in: int = 20  # Real frames that warm up the LSTM before a dream, and when play goes on in mid-episode
    horizon: int = 20  # Imagined steps of a dream
    gamma: float = 0.995  # Discount of future rewards
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 0.95  # Lambda of the lambda-returns
    entropy_weight: float = 0.001  # Weight of the policy's entropy in the loss
    # Whether dreamed steps behind an imagined end train the actor-critic, as published; where episodes are short, off
    behind_ends: bool = True
    max_grad_norm: float = 10.0  # Gradients are scaled down to this norm, in all three phases
    # Parts that the tokenizer's and world model's batches are split into to save memory, their gradients averaged; 0
    # is 1 on a GPU, and on a CPU as many as keep a part at 32 frames or 16 sequences
    accumulate: int = 0

    eval_every: int = 5  # Epochs from one evaluation to the next; 0 is never
    test_episodes: int = 16  # Whole games played in each
    test_envs: int = 8  # Games played side by side
    test_temperature: float = 0.5  # Temperature of the policy in tests
    test_noop_max: int = 1  # Test games begin with 1 to this many no-ops
    test_max_frames: int = 108_000  # Raw Atari frames after which a test game is cut off (half an hour)

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    actor_critic: ActorCriticConfig = field(default_factory=ActorCriticConfig)


PRESETS = {
    "paper": Args(),
    # One CPU core or two, two to three hours. Pixels are what costs, so nothing but a few convolutions works at full
    # size. Memory and horizon stay the paper's: Breakout ends a life six frames after the ball was last seen.
    "laptop": Args(
        preset="laptop",
        epochs=60, collect_epochs=50, collect_steps=2000, max_frames=10_000, draw="steps", test_max_frames=10_000,
        tokenizer_from=3, tokenizer_steps=500, tokenizer_batch_size=16, tokenizer_learning_rate=1e-3,
        tokenizer_until=14,
        world_model_from=13, world_model_steps=1000, world_model_batch_size=4, world_model_learning_rate=5e-4,
        actor_critic_from=18, actor_critic_steps=100, actor_critic_batch_size=16, actor_critic_learning_rate=1e-3,
        horizon=20, burn_in=10, entropy_weight=0.003, gamma=0.99, behind_ends=False,
        eval_every=10, test_episodes=8,
        tokenizer=TokenizerConfig(
            code_dim=64, channels=(16, 32, 32, 64, 64), blocks=(0, 0, 0, 1, 1), attention_at=(),
            local_encoder=True, worst_values=12, worst_weight=0.1, standardize=True,
        ),
        world_model=WorldModelConfig(layers=2, width=128, dropout=0.0),
        actor_critic=ActorCriticConfig(channels=(16, 16, 32, 32), lstm_width=256, standardize=True),
    ),
    # The whole algorithm on tests/catch.py, in a quarter of an hour on one CPU core, or a little more.
    "catch": Args(
        preset="catch", env_id="tests.catch:Catch-v0",
        epochs=28, collect_epochs=28, collect_steps=200, max_frames=10_000,
        tokenizer_from=3, tokenizer_steps=100, tokenizer_batch_size=16, tokenizer_learning_rate=1e-3,
        tokenizer_until=14,
        world_model_from=9, world_model_steps=200, world_model_batch_size=32, world_model_learning_rate=1e-3,
        actor_critic_from=13, actor_critic_steps=50, actor_critic_batch_size=64, actor_critic_learning_rate=1e-3,
        horizon=8, burn_in=2, entropy_weight=0.02, behind_ends=False, gamma=0.99,
        eval_every=5, test_episodes=40, test_envs=40,
        tokenizer=TokenizerConfig(
            vocab_size=64, code_dim=32, channels=(16, 32, 32, 64, 64), blocks=(0, 0, 0, 0, 1), attention_at=(),
            local_encoder=True, standardize=True,
        ),
        world_model=WorldModelConfig(max_blocks=4, layers=2, width=128, dropout=0.0),
        actor_critic=ActorCriticConfig(channels=(16, 16, 32, 32), lstm_width=128, standardize=True),
    ),
}  # fmt: skip


def parse_args(argv: list[str]) -> Args:
    """The command line -> Args. Explicit flags override a preset, or the arguments of a run that is resumed."""

    @dataclass
    class First:  # the two flags that decide where the others start
        preset: Preset = "paper"
        resume: str = ""

    asks_for_help = {"-h", "--help"} & set(argv)
    first, _ = tyro.cli(First, args=[a for a in argv if a not in asks_for_help], return_unknown_args=True)
    if not first.resume or asks_for_help:
        return tyro.cli(Args, default=PRESETS[first.preset], args=argv)
    saved = args_from_dict(read_checkpoint(checkpoint_path(first.resume)), first.resume)
    args = tyro.cli(Args, default=saved, args=argv)
    for name in ("env_id", "preset", "seed", "perceptual_loss", "tokenizer", "world_model", "actor_critic"):
        old, new = getattr(saved, name), getattr(args, name)
        if old != new:
            raise IrisError(f"{first.resume} is a run with {name} {old}, not {new}: leave that out, or start a new run")
    return args


def check(args: Args) -> None:
    """Raises IrisError for a number that no run can have; what a phase would trip over hours later is said at once."""
    least = {"seed": 0, "burn_in": 0, "accumulate": 0, "eval_every": 0, "tokenizer_until": 0, "horizon": 2}
    for name, value in vars(args).items():
        flag = f"--{name.rstrip('_').replace('_', '-')}"
        if type(value) is int and value < least.get(name, 1):
            raise IrisError(f"{flag} is {value}, and has to be at least {least.get(name, 1)}")
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise IrisError(f"{flag} is {value}, and has to be a number that is not negative")
    ours, theirs = args.tokenizer.tokens_per_frame, args.world_model.tokens_per_frame
    if ours != theirs:
        raise IrisError(
            f"the tokenizer's {len(args.tokenizer.channels)} levels make {ours} tokens a frame, and "
            f"--world-model.tokens-per-frame is {theirs}: make them the same"
        )
    if not 1 <= args.tokenizer.worst_values <= 3 * FRAME_SIZE**2:
        raise IrisError(f"--tokenizer.worst-values is {args.tokenizer.worst_values}, and has to be from 1 to 12,288")
    gpt = args.world_model
    if gpt.max_blocks < 2 or gpt.heads < 1 or gpt.width % gpt.heads or not 0 <= gpt.dropout < 1:
        raise IrisError("the world model needs max_blocks of 2 or more, heads that divide its width, dropout below 1")
    if FRAME_SIZE >> len(args.actor_critic.channels) == 0:
        raise IrisError("the actor-critic's convolutions each halve the frame: 64 pixels are enough for 6 of them")


def args_from_dict(checkpoint: dict, source: Path | str) -> Args:
    """Args as they stand in a run's checkpoint. Raises IrisError if they are not this program's.

    Arguments younger than the run have their class's default, which is what was done before they came.
    """
    try:
        values = {"env_id": checkpoint["args"]["env_id"], **checkpoint["args"]}
        for name, config in (
            ("tokenizer", TokenizerConfig), ("world_model", WorldModelConfig), ("actor_critic", ActorCriticConfig)
        ):  # fmt: skip
            values[name] = config(**values[name])
        return Args(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise IrisError(f"{source} is no checkpoint of an IRIS run of this version ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Environment (paper, appendix)
# ---------------------------------------------------------------------------------------------------------------------


FRAME_SPACE = gym.spaces.Box(0, 255, (FRAME_SIZE, FRAME_SIZE, 3), np.uint8)


class AtariFrames(gym.Wrapper):
    """A `...NoFrameskip-v4` game as IRIS sees it: an action lasts 4 screens, a frame is the maximum of the last two.

    With `life_loss_ends`, losing a life ends the episode, but not the game: `info["life_lost"]` is then True, and a
    `reset()` without a seed plays on with one no-op step. A `reset(seed=...)` always begins a new game. `screen` is the
    latest frame for people: (210, 160, 3) uint8, nothing resized.
    """

    def __init__(self, env: gym.Env, noop_max: int, life_loss_ends: bool):
        super().__init__(env)
        self.noop_max, self.life_loss_ends, self.life_lost = noop_max, life_loss_ends, False
        self.observation_space = FRAME_SPACE

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if self.life_lost and seed is None:
            frame, _, terminated, truncated, info = self.step(0)
            if self.life_lost or not (terminated or truncated):  # a second life lost at once is no game over either
                self.life_lost = False
                return frame, info
        screen, info = self.env.reset(seed=seed, options=options)
        for _ in range(self.np_random.integers(1, self.noop_max + 1)):
            screen, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                screen, info = self.env.reset(options=options)
        self.lives, self.life_lost = self.unwrapped.ale.lives(), False
        self.screen = screen
        return resize_frame(torch.from_numpy(screen)).numpy(), info

    def step(self, action: int):
        screens, total = [], 0.0
        for _ in range(4):
            screen, reward, terminated, truncated, info = self.env.step(action)
            screens.append(screen)
            total += float(reward)
            if terminated or truncated:
                break
        # Resized first, then the maximum: the other order gives another picture of what flickers.
        frame = np.maximum.reduce([resize_frame(torch.from_numpy(screen)).numpy() for screen in screens[-2:]])
        self.screen = np.maximum.reduce(screens[-2:])
        lives = self.unwrapped.ale.lives()
        self.life_lost = self.life_loss_ends and 0 < lives < self.lives and not (terminated or truncated)
        self.lives = lives
        return frame, total, terminated or self.life_lost, truncated, {**info, "life_lost": self.life_lost}


class ResizedFrames(gym.ObservationWrapper):
    """Any other game: images (H, W[, 1 or 3]) uint8 become frames. `screen` is the latest image, (H, W, 3)."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = FRAME_SPACE

    def observation(self, image: np.ndarray) -> np.ndarray:
        image = image.reshape(*image.shape[:2], -1)  # (H, W, 1 or 3)
        self.screen = np.repeat(image, 3 // image.shape[2], axis=2)
        return resize_frame(torch.from_numpy(self.screen)).numpy()


def make_env(env_id: str, noop_max: int = 1, max_frames: int = 108_000, life_loss_ends: bool = False) -> gym.Env:
    """Any gymnasium game with frames (64, 64, 3) uint8 and Discrete actions. The defaults are those of a test game.

    `noop_max`, `max_frames` and `life_loss_ends` speak of `{Game}NoFrameskip-v4` ids; other ids keep their own rules
    and have their image resized. Raises IrisError for an unknown id, other actions, or no image.
    """
    gym.register_envs(ale_py)
    gym.logger.min_level = gym.logger.ERROR  # else each game complains that a v5 exists, which has sticky actions
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    try:
        env = gym.make(env_id)
        is_atari = env.spec.id.endswith("NoFrameskip-v4")
        if is_atari:
            env.close()
            env = gym.make(env.spec.id, max_num_frames_per_episode=max_frames)
    except Exception as error:  # an environment is somebody else's code: it may fail in any way
        raise IrisError(f"no environment {env_id!r}: {unknown_env_hint(env_id, error)}") from error
    space, actions = env.observation_space, env.action_space
    if not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        raise IrisError(f"{env_id} has the action space {actions}; IRIS needs Discrete(n): wrap the environment")
    if is_atari:
        return AtariFrames(env, noop_max, life_loss_ends)
    shape = space.shape if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 else ()
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise IrisError(f"{env_id} observes {space}; IRIS needs an image (H, W[, 1 or 3]) of uint8: wrap it")
    return ResizedFrames(env)


def unknown_env_hint(env_id: str, error: Exception) -> str:
    """One line on what might have been meant."""
    if type(error) not in (gym.error.NameNotFound, gym.error.NamespaceNotFound, gym.error.VersionNotFound):
        return " ".join(f"{type(error).__name__}: {error}".split())
    suffix = "NoFrameskip-v4"
    games = {name.removesuffix(suffix).lower(): name for name in gym.registry if name.endswith(suffix)}
    others = {name.lower(): name for name in gym.registry}
    bare = re.sub(r"(noframeskip)?(-v\d+)?$", "", env_id.split("/")[-1].lower())
    near = [games[name] for name in difflib.get_close_matches(bare, games, n=2)]
    near += [others[name] for name in difflib.get_close_matches(env_id.lower(), others, n=2)]
    return f"did you mean {', '.join(dict.fromkeys(near))}?" if near else "gymnasium does not know it"


def published_scores(env_id: str) -> dict[str, float]:
    """Method -> mean return in that game, from results/published_scores.csv; empty where there are none."""
    path = Path(__file__).parent / "results" / "published_scores.csv"
    if not path.exists():
        return {}
    game = env_id.split("/")[-1].split("-")[0].removesuffix("NoFrameskip")
    rows = (line.split(",") for line in path.read_text().splitlines())
    return {method: float(score) for name, method, score in rows if name == game}


def human_normalised(env_id: str, mean_return: float) -> float | None:
    """0 is a random player, 1 a human one; None for a game without published scores."""
    scores = published_scores(env_id)
    return (mean_return - scores["random"]) / (scores["human"] - scores["random"]) if scores else None


# ---------------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------------


class Replay:
    """All steps played, in order, in append-only files that are read through memory maps.

    Step t holds the frame seen, the action taken at it, the reward this brought and whether the episode ended with it;
    an episode is what lies between two ends. 100,000 steps take 1.23 GB on disk and hardly any memory. Plain appending
    rather than a map to write through, because a full disk then is an error and not a crash.
    """

    COLUMNS = {
        "frames": ("u1", (FRAME_SIZE, FRAME_SIZE, 3)), "actions": ("<i8", ()), "rewards": ("<f4", ()),
        "ends": ("u1", ()),
    }  # fmt: skip
    frames: np.ndarray  # (steps, 64, 64, 3), and (steps,) the others, as of the latest flush
    actions: np.ndarray
    rewards: np.ndarray
    ends: np.ndarray

    def __init__(self, folder: Path, length: int | None = None, draw: str = Args.draw):
        """Makes the files in `folder`; or, given the `length` that a checkpoint speaks of, opens them and forgets what
        was written after it. `draw` is what `sample` draws uniformly, "episodes" or "steps". Raises IrisError if there
        are steps already, or fewer than that."""
        self.draw = draw
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {}
        for name, (dtype, shape) in self.COLUMNS.items():
            path = folder / f"{name}.bin"
            wanted = (length or 0) * int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
            path.touch()
            if length is None and path.stat().st_size:
                raise IrisError(f"{path} holds steps that no checkpoint speaks of: move {folder} away")
            if path.stat().st_size < wanted:
                raise IrisError(f"{path} is shorter than its checkpoint says: the run can't be resumed")
            os.truncate(path, wanted)
            self.files[name] = open(path, "ab")
        self.flush()

    def append(self, frame: np.ndarray, action: int, reward: float, end: bool) -> None:
        """One step; it can be read after the next `flush`."""
        for name, value in (("frames", frame), ("actions", action), ("rewards", reward), ("ends", end)):
            self.files[name].write(np.asarray(value, dtype=self.COLUMNS[name][0]).tobytes())

    def flush(self, to_disk: bool = False) -> None:
        """Makes appended steps readable, and with `to_disk` safe against a power cut."""
        for name, (dtype, shape) in self.COLUMNS.items():
            self.files[name].flush()
            if to_disk:
                os.fsync(self.files[name].fileno())
            path = self.files[name].name
            empty = os.path.getsize(path) == 0  # an empty file can't be mapped
            column = np.empty(0, dtype) if empty else np.memmap(path, dtype, mode="r")
            setattr(self, name, column.reshape(-1, *shape))
        stops = np.flatnonzero(self.ends) + 1
        if len(self) > (stops[-1] if len(stops) else 0):
            stops = np.append(stops, len(self))  # the episode that still goes on
        self.starts, self.stops = np.concatenate([[0], stops[:-1]]).astype(np.int64), stops  # (episodes,)

    def __len__(self) -> int:
        return len(self.frames)

    def sample(self, rng: np.random.Generator, n: int, length: int, anchor: str) -> tuple[np.ndarray, np.ndarray]:
        """n segments -> indices of steps (n, length), and mask (n, length), False where a segment sticks out.

        An episode is drawn uniformly, whatever its length, or where `draw` is "steps" in proportion to it. Then, with
        anchor "start", the first step is uniform over it, and padding is on the right (tokenizer, world model); with
        "stop" the last step is, and padding is on the left (actor-critic). Padded places hold the index of some step
        of the same episode.
        """
        lengths = self.stops - self.starts
        episodes = rng.choice(len(lengths), n, p=lengths / len(self) if self.draw == "steps" else None)
        starts, stops = self.starts[episodes, None], self.stops[episodes, None]  # (n, 1)
        chosen = rng.integers(starts, stops)  # (n, 1)
        offsets = np.arange(length) if anchor == "start" else np.arange(1 - length, 1)
        indices = chosen + offsets  # (n, length)
        return np.clip(indices, starts, stops - 1), (indices >= starts) & (indices < stops)

    def sample_frames(self, rng: np.random.Generator, n: int, device: torch.device) -> Tensor:
        """n frames (n, 3, 64, 64), drawn as in `sample`."""
        return self.frames_at(self.sample(rng, n, 1, "start")[0][:, 0], device)

    def frames_at(self, indices: np.ndarray, device: torch.device) -> Tensor:
        """Steps (...) -> their frames (..., 3, 64, 64) in [0, 1], on the device."""
        return to_model(torch.from_numpy(self.frames[indices]).to(device))


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run, and the phases of an epoch
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that changes while training. A checkpoint holds it; `replay` lies beside the checkpoint."""

    args: Args
    folder: Path
    device: torch.device
    bf16: bool
    agent: Agent
    optimizers: dict[str, torch.optim.Optimizer]
    lpips: Lpips | None
    dream: Dream
    env: gym.Env
    replay: Replay
    rng: np.random.Generator  # all draws outside of torch: segments, epsilon, seeds
    lock_file: Any  # open as long as the run is
    epoch: int = 0  # the last one that is complete
    game_seed: int = -1  # of the training game that is being played; -1 before the first
    game_start: int = 0  # the step at which it began
    frame: np.ndarray | None = None  # what it shows now, (64, 64, 3) uint8
    writer: Any = None  # TensorBoard's
    tokens: Tensor | None = None  # the replay's, (steps, K) int64 on the device
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # that each phase took

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def collect(run: Run) -> dict[str, float]:
    """Plays `collect_steps` of the training game into the replay; mean return and length of the episodes that ended,
    which in an Atari game are single lives."""
    args, agent, device = run.args, run.agent, run.device
    if run.frame is None:
        new_game(run)
    # What the LSTM remembered was computed by an older tokenizer and an older LSTM: warm it up on the latest frames.
    length = len(run.replay)
    start = length if length == 0 or run.replay.ends[-1] else int(run.replay.starts[-1])  # of the current episode
    recent = run.replay.frames_at(np.arange(max(start, length - args.burn_in), length), device)[None]  # (1, L, 3, ...)
    with run.autocast(), torch.no_grad():
        state = agent.actor_critic.initial_state(1)
        if recent.shape[1] > 0:
            seen = torch.ones(recent.shape[:2], dtype=torch.bool, device=device)
            state = agent.actor_critic.warm_up(agent.tokenizer.reconstruct(recent[0])[None], seen)

    ended, held = [], 0
    untrained = run.epoch < args.actor_critic_from
    for step in trange(length, length + args.collect_steps, desc="collect", leave=False, disable=None):
        with run.autocast():
            actions, state = agent.act(
                to_model(torch.from_numpy(run.frame)[None].to(device)), state, args.collect_temperature
            )
        action = int(actions)
        if run.rng.random() < args.collect_epsilon:
            action = int(run.rng.integers(run.env.action_space.n))
        if held > 0:
            action, held = last_action, held - 1
        elif untrained and args.collect_hold > 1:
            held = min(int(run.rng.zipf(2.0)), args.collect_hold) - 1  # n steps in all as often as 1 / n^2
        last_action = action
        frame, reward, terminated, truncated, info = run.env.step(action)
        if not np.isfinite(reward):
            raise IrisError(f"{args.env_id} gave the reward {reward} at step {step}: mend the environment")
        run.replay.append(run.frame, action, float(reward), terminated or truncated)
        run.frame = frame
        if terminated or truncated:
            ended.append((start, step + 1))
            start = step + 1
            state = agent.actor_critic.initial_state(1)
            if info.get("life_lost"):
                run.frame, _ = run.env.reset()
            else:
                new_game(run, start)
    run.replay.flush()
    for begin, stop in ended:
        columns = {name: np.array(getattr(run.replay, name)[begin:stop]) for name in Replay.COLUMNS}
        save_episode(run.folder / "media/episodes/train", f"step_{begin:07d}", columns)
    if not ended:
        return {}
    returns = [float(run.replay.rewards[begin:stop].sum()) for begin, stop in ended]
    lengths = [stop - begin for begin, stop in ended]
    return {"train/return": np.mean(returns), "train/length": np.mean(lengths), "train/episodes": len(ended)}


def new_game(run: Run, start: int = 0) -> None:
    """Resets the training game with a seed of its own, so that a resumed run can play it again from there."""
    run.game_seed, run.game_start = int(run.rng.integers(2**31)), start
    run.frame, _ = run.env.reset(seed=run.game_seed)


def replay_game(run: Run) -> None:
    """Brings the environment of a resumed run to where it stood: the same seed, and the recorded actions since then."""
    if run.game_seed < 0:
        return
    frame, _ = run.env.reset(seed=run.game_seed)
    for step in range(run.game_start, len(run.replay)):
        if not np.array_equal(frame, run.replay.frames[step]):
            raise IrisError(f"{run.args.env_id} does not repeat itself from its seed: the run can't be resumed exactly")
        frame, _, terminated, truncated, _ = run.env.step(int(run.replay.actions[step]))
        if terminated or truncated:  # only ever a life lost: a game over would have begun another game
            frame, _ = run.env.reset()
    run.frame = frame


def parts_of(run: Run, name: str) -> int:
    """Into how many parts a component's batch is split (see Args.accumulate); dreams are never split."""
    batch_size, fits_a_cpu = getattr(run.args, f"{name}_batch_size"), {"tokenizer": 32, "world_model": 16}.get(name)
    if fits_a_cpu is None:
        return 1
    return min(batch_size, run.args.accumulate or (-(-batch_size // fits_a_cpu) if run.device.type == "cpu" else 1))


def optimise(run: Run, name: str, losses_of: Callable[[int], tuple[dict, dict]]) -> dict[str, float]:
    """The inside of each training phase: an epoch's optimiser steps on one component; means of all that was logged.

    `losses_of(n)` draws n samples and returns their losses and metrics. Nothing is read back from the device until the
    end, so a loss that is not finite is found then; the checkpoint of the epoch before is still the last one. Raises
    IrisError with component, epoch and step in that case.
    """
    component, optimizer = getattr(run.agent, name), run.optimizers[name]
    steps, batch_size = getattr(run.args, f"{name}_steps"), getattr(run.args, f"{name}_batch_size")
    sizes = [len(part) for part in np.array_split(np.arange(batch_size), parts_of(run, name))]
    component.train()
    logged: dict[str, list[Tensor]] = defaultdict(list)
    began = time.perf_counter()
    for _ in trange(steps, desc=name.replace("_", " "), leave=False, disable=None):
        optimizer.zero_grad()
        for size in sizes:
            with run.autocast():
                losses, metrics = losses_of(size)
            total = sum(losses.values())
            (total * (size / batch_size)).backward()
            for key, value in {**losses, "loss": total, **metrics}.items():
                logged[key].append(value.detach())
        # A norm that is not finite would spoil the weights while every loss still looks well, so it is logged, and
        # checked, like a loss.
        norm = nn.utils.clip_grad_norm_(component.parameters(), run.args.max_grad_norm)
        logged["grad_norm"].append(norm.detach())
        optimizer.step()
    component.eval()
    columns = {key: torch.stack(values).float().cpu() for key, values in logged.items()}
    for key, values in columns.items():
        if not values.isfinite().all():
            step = int((~values.isfinite()).nonzero()[0, 0]) * steps // len(values) + 1
            raise IrisError(
                f"the {name.replace('_', ' ')}'s {key} is not finite in epoch {run.epoch + 1}, step {step}. The "
                f"checkpoint of epoch {run.epoch} is kept: try --resume {run.folder} with a lower learning rate"
            )
    speed = steps / (time.perf_counter() - began)
    return {f"{name}/{key}": float(values.mean()) for key, values in columns.items()} | {f"speed/{name}": speed}


def fit_standardize(run: Run, model: Tokenizer | ActorCritic) -> None:
    """Before its first training, and with `standardize`: the statistics of what it will look at."""
    if model.config.standardize and not model.standardize.fitted:
        model.standardize.fit(run.replay.sample_frames(run.rng, min(1024, len(run.replay)), run.device))


def train_tokenizer(run: Run) -> dict[str, float]:
    """Phase 1: learn to write frames as tokens, and to paint them back."""
    tokenizer = run.agent.tokenizer
    tokenizer.revive_after = run.args.tokenizer.revive_after * parts_of(run, "tokenizer")  # it counts parts
    fit_standardize(run, tokenizer)
    if until := run.args.tokenizer_until:
        share_left = (until - run.epoch) / (until - run.args.tokenizer_from + 1)  # of its epochs, this one included
        for group in run.optimizers["tokenizer"].param_groups:
            group["lr"] = run.args.tokenizer_learning_rate * min(1, 2 * share_left)
    run.tokens = None  # they were another tokenizer's
    return optimise(
        run, "tokenizer", lambda n: (tokenizer.loss(run.replay.sample_frames(run.rng, n, run.device), run.lpips), {})
    )


def encode_replay(run: Run) -> dict[str, float]:
    """Between the phases: the tokens of all frames. Both later phases read them, so a frame is encoded once an epoch
    at most, not once a sample (525,000 times an epoch at the paper's sizes)."""
    first = 0 if run.tokens is None else len(run.tokens) // 256 * 256  # same parts, so same roundings, after a resume
    known = [] if run.tokens is None else [run.tokens[:first]]
    for start in range(first, len(run.replay), 256):
        with run.autocast():
            frames = run.replay.frames_at(np.arange(start, min(start + 256, len(run.replay))), run.device)
            known.append(run.agent.tokenizer.encode(frames))
    run.tokens = torch.cat(known)
    shares = run.tokens.flatten().bincount(minlength=run.args.tokenizer.vocab_size).double() / run.tokens.numel()
    perplexity = torch.special.entr(shares).sum().exp()
    return {"codes/in_use": float((shares > 0).sum()), "codes/perplexity": float(perplexity)}


def train_world_model(run: Run) -> dict[str, float]:
    """Phase 2: learn how the tokens go on."""

    def tokens_at(indices: np.ndarray) -> Tensor:
        return run.tokens[torch.from_numpy(indices).to(run.device)]

    return optimise(
        run, "world_model", lambda n: (run.agent.world_model.loss(*sequences(run, run.replay, n, tokens_at)), {})
    )


def sequences(run: Run, replay: Replay, n: int, tokens_at: Callable[[np.ndarray], Tensor]) -> list[Tensor]:
    """n segments as `WorldModel.loss` wants them: tokens (n, L, K), actions, rewards, ends and mask (n, L)."""
    indices, mask = replay.sample(run.rng, n, run.args.world_model.max_blocks, "start")
    columns = replay.actions[indices], replay.rewards[indices], replay.ends[indices], mask
    return [tokens_at(indices), *(torch.from_numpy(column).to(run.device) for column in columns)]


def train_actor_critic(run: Run) -> dict[str, float]:
    """Phase 3: learn to act, in dreams."""
    args, painted = run.args, None
    fit_standardize(run, run.agent.actor_critic)
    # Every dream first shows the LSTM real frames, reconstructed: 256,000 an epoch at the paper's sizes. As long as the
    # replay has fewer, each is painted once, and kept in the replay's own format.
    if len(run.replay) < args.actor_critic_steps * args.actor_critic_batch_size * args.burn_in:
        painted = torch.empty(len(run.replay), FRAME_SIZE, FRAME_SIZE, 3, dtype=torch.uint8, device=run.device)
        for tokens, place in zip(run.tokens.split(256), painted.split(256), strict=True):
            with run.autocast(), torch.no_grad():
                place.copy_(to_stored(run.agent.tokenizer.decode(tokens)))
    return optimise(
        run, "actor_critic",
        lambda n: actor_critic_loss(
            dream_on(run, n, painted), args.gamma, args.lambda_, args.entropy_weight, args.behind_ends
        ),
    )


def dream_on(run: Run, n: int, painted: Tensor | None = None) -> Rollout:
    """n imagined episodes that begin somewhere in the replay, whose reconstructions may be `painted` already."""
    args, agent = run.args, run.agent
    indices, mask = run.replay.sample(run.rng, n, args.burn_in + 1, "stop")
    indices, mask = torch.from_numpy(indices).to(run.device), torch.from_numpy(mask).to(run.device)
    state = agent.actor_critic.initial_state(n)
    if args.burn_in:
        before = indices[:, :-1].flatten()
        with torch.no_grad():  # in parts of 256 frames, for a decoder's activations are large
            parts = [to_model(painted[part]) if painted is not None else agent.tokenizer.decode(run.tokens[part])
                     for part in before.split(256)]  # fmt: skip
        state = agent.actor_critic.warm_up(torch.cat(parts).unflatten(0, (n, args.burn_in)), mask[:, :-1])
    first = run.dream.reset_from_tokens(run.tokens[indices[:, -1]])
    return imagine(agent.actor_critic, run.dream, first, state, args.horizon)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

KEPT_TEST_STEPS = 2000  # of each test episode, for losses and media; half an hour of frames would fill the memory


@torch.no_grad()
def play_test_episodes(
    agent: Agent, args: Args, device: torch.device, seed: int, keep: int = KEPT_TEST_STEPS
) -> list[dict]:
    """Whole games -> for each: return, length, and the replay's columns of its first `keep` steps.

    They are played in rounds of `test_envs` side by side, each round until its longest game is over: to stop at the
    first sixteen that end would favour short, that is bad, games.
    """
    envs = [make_env(args.env_id, args.test_noop_max, args.test_max_frames) for _ in range(args.test_envs)]
    games: list[dict] = []
    for start in trange(0, args.test_episodes, args.test_envs, desc="test episodes", leave=False, disable=None):
        going = list(zip(envs, range(start, args.test_episodes)))  # (environment, number of its game)
        games += [{"return": 0.0, "length": 0, **{name: [] for name in Replay.COLUMNS}} for _ in going]
        frames = [env.reset(seed=seed + number)[0] for env, number in going]
        state = agent.actor_critic.initial_state(len(going))
        while going:
            seen = to_model(torch.from_numpy(np.stack(frames)).to(device))
            actions, state = agent.act(seen, state, args.test_temperature)
            still, next_frames = [], []
            for place, ((env, number), action) in enumerate(zip(going, actions.tolist(), strict=True)):
                next_frame, reward, terminated, truncated, _ = env.step(action)
                game, end = games[number], terminated or truncated
                game["return"] += float(reward)
                game["length"] += 1
                if game["length"] <= keep:
                    for name, value in zip(Replay.COLUMNS, (frames[place], action, reward, end), strict=True):
                        game[name].append(value)
                if not end:
                    still.append(place)
                    next_frames.append(next_frame)
            going, frames = [going[place] for place in still], next_frames
            state = tuple(x[torch.tensor(still, dtype=torch.int64, device=device)] for x in state)
    for env in envs:
        env.close()
    return [game | {name: np.array(game[name], dtype) for name, (dtype, _) in Replay.COLUMNS.items()} for game in games]


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Test episodes, the models' losses on them, and pictures: reconstructions and imagined episodes."""
    args, agent, epoch, media = run.args, run.agent, run.epoch + 1, run.folder / "media"
    with tempfile.TemporaryDirectory() as folder, run.autocast():
        games, test = play_test_episodes(agent, args, run.device, int(run.rng.integers(2**31))), Replay(Path(folder))
        for i, game in enumerate(games):
            save_episode(media / "episodes/test", f"epoch_{epoch:04d}_{i:02d}", game)
            game["ends"][-1] = 1  # also where only its first steps were kept: nothing may cross from game to game
            for step in zip(*(game[name] for name in Replay.COLUMNS), strict=True):
                test.append(*step)
        test.flush()
        returns = np.array([game["return"] for game in games])
        metrics = {"test/return": returns.mean(), "test/return_std": returns.std()}
        metrics["test/return_median"] = np.median(returns)
        metrics["test/length"] = np.mean([game["length"] for game in games])
        if (score := human_normalised(args.env_id, returns.mean())) is not None:
            metrics["test/human_normalised_score"] = score

        if epoch >= args.tokenizer_from:
            batches = [test.sample_frames(run.rng, 64, run.device) for _ in range(4)]
            losses = [agent.tokenizer.loss(batch, run.lpips) for batch in batches]
            metrics |= {f"tokenizer_test/{key}": np.mean([float(loss[key]) for loss in losses]) for key in losses[0]}
            originals = test.frames_at(np.linspace(0, len(test) - 1, 8).astype(int), run.device)
            pair = [originals.cpu(), agent.tokenizer.reconstruct(originals).cpu()]
            save_picture(media / f"reconstructions/epoch_{epoch:04d}.png", pair)
            run.writer.add_images("reconstructions", torch.cat(pair), epoch)

        if epoch >= args.world_model_from:

            def tokens_at(indices: np.ndarray) -> Tensor:
                return agent.tokenizer.encode(test.frames_at(indices.ravel(), run.device)).unflatten(0, indices.shape)

            losses = [agent.world_model.loss(*sequences(run, test, 8, tokens_at)) for _ in range(4)]
            metrics |= {f"world_model_test/{key}": np.mean([float(loss[key]) for loss in losses]) for key in losses[0]}
            rollout = dream_on(run, 4)
            frames = to_stored(torch.stack(rollout.frames, dim=1))  # (4, horizon, 64, 64, 3) uint8
            columns = [x.cpu().numpy() for x in (frames, rollout.actions, rollout.rewards, rollout.ends)]
            for i, episode in enumerate(zip(*columns, strict=True)):
                named = dict(zip(Replay.COLUMNS, episode, strict=True))
                save_episode(media / "episodes/imagination", f"epoch_{epoch:04d}_{i:02d}", named)
            strip = np.concatenate(list(columns[0][0]), axis=1)  # (64, horizon * 64, 3)
            run.writer.add_image("imagined_episode", strip, epoch, dataformats="HWC")
    return metrics


def write_episode(path: Path, content: dict[str, Any]) -> None:
    """An `.npz` that is there whole or not at all. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there is one only where writing failed


def save_episode(folder: Path, name: str, columns: dict[str, np.ndarray]) -> None:
    """Keeps an episode as `.npz` (frames, actions, rewards, ends, return); of all, the last ten and the best stay."""
    folder.mkdir(parents=True, exist_ok=True)
    total = float(columns.get("return", columns["rewards"].sum()))
    content = {key: columns[key] for key in Replay.COLUMNS} | {"return": total}

    write_episode(folder / f"{name}.npz", content)
    best = folder / "best.npz"
    try:
        beaten = total > float(np.load(best)["return"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):  # there is none, or a power cut emptied it
        beaten = True
    if beaten:
        write_episode(best, content)
    for old in sorted(path for path in folder.glob("*.npz") if path != best)[:-10]:
        old.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_path(run_or_checkpoint: Path | str) -> Path:
    """A run's folder, or a checkpoint itself -> the checkpoint."""
    path = Path(run_or_checkpoint)
    return path / "checkpoint.pt" if path.is_dir() else path


def save_checkpoint(run: Run, epoch: int) -> None:
    """Writes all that resuming after this epoch needs but the replay, so that a kill at any moment leaves a whole
    checkpoint. The replay goes to disk first; then a file beside the checkpoint is written, synced and renamed over it.
    """
    run.replay.flush(to_disk=True)
    content = {
        "args": asdict(run.args),
        "num_actions": run.agent.world_model.num_actions,
        "epoch": epoch,
        "agent": run.agent.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()},
        "replay_length": len(run.replay),
        "game_seed": run.game_seed,
        "game_start": run.game_start,
        "numpy_rng": json.dumps(run.rng.bit_generator.state),  # as text, for its integers have 128 bits
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
    }
    buffer = io.BytesIO()  # torch.save answers a full disk with errors of its own; writing bytes with the system's
    torch.save(content, buffer)
    temporary = run.folder / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # it would only help to fill the disk
        raise
    temporary.replace(run.folder / "checkpoint.pt")
    folder = os.open(run.folder, os.O_RDONLY)
    os.fsync(folder)  # the new name, too, is on the disk only now
    os.close(folder)


def restore(run: Run, checkpoint: dict) -> None:
    """Brings a run, just built from the same arguments, to where the checkpoint was written."""
    run.agent.load_state_dict(checkpoint["agent"])
    for name, optimizer in run.optimizers.items():
        settings = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizers"][name])
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)  # the arguments': a run may be resumed with a lower learning rate
    run.epoch, run.game_seed, run.game_start = (checkpoint[key] for key in ("epoch", "game_seed", "game_start"))
    if run.epoch < run.args.collect_epochs:
        replay_game(run)
    # Last, because building and replaying may have drawn random numbers.
    run.rng.bit_generator.state = json.loads(checkpoint["numpy_rng"])
    torch.set_rng_state(checkpoint["torch_rng"])
    if run.device.type == "cuda" and checkpoint["cuda_rng"] is not None:
        torch.cuda.set_rng_state(checkpoint["cuda_rng"], run.device)


def build_agent(args: Args, num_actions: int) -> Agent:
    """The three models in the sizes of the arguments, in evaluation mode. Raises IrisError if no such model can be."""
    try:
        tokenizer = Tokenizer(args.tokenizer)
        world_model = WorldModel(args.tokenizer.vocab_size, num_actions, args.world_model)
        return Agent(tokenizer, world_model, ActorCritic(num_actions, args.actor_critic)).eval()
    except (ValueError, RuntimeError, ArithmeticError, IndexError) as error:
        raise IrisError(f"no model has these sizes: {' '.join(str(error).split())}") from error


def load_agent(run_or_checkpoint: Path | str) -> tuple[Agent, Args]:
    """A run's folder, its checkpoint, or a published checkpoint -> the agent, in evaluation mode on the CPU, and Args.

    Of a published one, Args are the paper's, and the game is what its file is called (Breakout.pt). Raises IrisError.
    """
    path = checkpoint_path(run_or_checkpoint)
    content = read_checkpoint(path)
    if "agent" not in content:
        return agent_from_official(content, str(path)), Args(env_id=f"{path.stem}NoFrameskip-v4")
    args = args_from_dict(content, path)
    try:
        agent = build_agent(args, content["num_actions"])
        agent.load_state_dict(content["agent"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise IrisError(f"{path} is no checkpoint of this version") from error
    return agent, args


def make_optimizers(agent: Agent, args: Args) -> dict[str, torch.optim.Optimizer]:
    """Adam for each model, and AdamW for the world model (paper, appendix); fused: one operator for all weights."""
    groups = agent.world_model.parameter_groups(args.world_model_weight_decay)
    adam, adamw = torch.optim.Adam, torch.optim.AdamW
    return {
        "tokenizer": adam(agent.tokenizer.parameters(), lr=args.tokenizer_learning_rate, fused=True),
        "world_model": adamw(groups, lr=args.world_model_learning_rate, fused=True),
        "actor_critic": adam(agent.actor_critic.parameters(), lr=args.actor_critic_learning_rate, fused=True),
    }


def init_from(agent: Agent, args: Args) -> None:
    """Copies the chosen parts of another agent into this one (`--init-from`). Raises IrisError where they don't fit."""
    source, source_args = load_agent(args.init_from)
    ours, theirs = agent.world_model.num_actions, source.world_model.num_actions
    if ours != theirs and (args.load_world_model or args.load_actor_critic):
        raise IrisError(
            f"{args.init_from} knows {theirs} actions and {args.env_id} has {ours}: take its tokenizer alone, with "
            "--no-load-world-model --no-load-actor-critic"
        )
    # These settings change what weights mean, but not all of them change their shapes.
    settings = {"tokenizer": ["standardize"], "world_model": ["heads"], "actor_critic": ["channels", "standardize"]}
    for name, those in settings.items():
        if not getattr(args, f"load_{name}"):
            continue
        try:
            if any(getattr(getattr(args, name), one) != getattr(getattr(source_args, name), one) for one in those):
                raise RuntimeError
            getattr(agent, name).load_state_dict(getattr(source, name).state_dict())
        except RuntimeError as error:
            raise IrisError(
                f"the {name} of {args.init_from} has other sizes or settings than this run's: give it the same "
                f"--{name.replace('_', '-')}... or use --no-load-{name.replace('_', '-')}"
            ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Starting
# ---------------------------------------------------------------------------------------------------------------------


def choose_device(args: Args) -> torch.device:
    """The device that --device names. Raises IrisError if there is none such."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise IrisError(f"--device {name} is not to be had here: leave it out, or use --device cpu") from error


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16, rather than torch pretending it does."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any("bf16" in name and there for name, there in capabilities.items())


def choose_bf16(args: Args, device: torch.device) -> bool:
    """Whether --precision comes to bfloat16 on this device."""
    return has_bf16(device) if args.precision == "auto" else args.precision == "bf16"


def keep_freed_memory() -> None:
    """Tells glibc to keep the blocks that it frees. Else it returns large ones to the system at once, which clears
    them page by page for the next batch: on a CPU that takes a third of the tokenizer's training time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: what is free at the heap's end is never returned
    mallopt(-4, 0)  # M_MMAP_MAX: blocks outside the heap, which are returned when freed


def choose_perceptual_loss(args: Args) -> Lpips | None:
    """Settles args.perceptual_loss on lpips or pixel, and returns the network if it is lpips."""
    if args.perceptual_loss == "pixel":
        return None
    try:
        lpips = load_lpips()
        args.perceptual_loss = "lpips"
        return lpips
    except IrisError as error:
        if args.perceptual_loss == "lpips":
            raise
        args.perceptual_loss = "pixel"
        print(f"warning: training with the pixel loss, not the paper's perceptual loss: {error}", file=sys.stderr)
        return None


def build(args: Args) -> Run:
    """Everything a run needs, from its arguments: fresh, or from where a resumed one stood."""
    check(args)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    device = choose_device(args)
    compilers = os.environ.get("CXX", ""), os.environ.get("CC", ""), "g++", "clang++", "gcc", "clang"
    if args.compile and not any(map(shutil.which, compilers)):
        raise IrisError("--compile needs a C++ compiler: install g++, or leave it out")
    bf16 = choose_bf16(args, device)
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # what stays in float32 is multiplied in tensor cores too
    env = make_env(args.env_id, args.noop_max, args.max_frames, life_loss_ends=True)
    checkpoint = read_checkpoint(checkpoint_path(args.resume)) if args.resume else None
    lpips = choose_perceptual_loss(args)
    agent = build_agent(args, int(env.action_space.n))
    if args.init_from and not args.resume:
        init_from(agent, args)
    agent.to(device)
    optimizers = make_optimizers(agent, args)
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__iris__{args.seed}__{int(time.time())}"
    folder = checkpoint_path(args.resume).parent if args.resume else Path(args.run_dir or f"runs/{name}")
    if not args.resume and (folder / "checkpoint.pt").exists():
        raise IrisError(f"{folder} holds a run already: --resume {folder} goes on with it; or name another --run-dir")
    lock_file = lock(folder)
    try:
        replay = Replay(folder / "replay", checkpoint["replay_length"] if checkpoint else None, args.draw)
        run = Run(
            args, folder, device, bf16, agent, optimizers, lpips.to(device) if lpips else None,
            Dream(agent.tokenizer, agent.world_model, args.compile), env, replay, np.random.default_rng(args.seed),
            lock_file,
        )  # fmt: skip
        if checkpoint:
            restore(run, checkpoint)
        return run
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if not checkpoint:
            raise
        raise IrisError(f"{folder} can't be resumed: its checkpoint is not one of this version ({error!r})") from error


def lock(folder: Path) -> Any:
    """Makes the run's folder, and keeps other processes from training in it while the returned file is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")
    except OSError as error:
        raise IrisError(f"can't write into the run folder {folder}: {error.strerror}; choose a --run-dir") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise IrisError(f"another process is training in {folder}: stop it first, or name another --run-dir") from error
    return handle


def write_args(run: Run) -> None:
    """args.json: every argument as it was settled, the libraries' versions, the git commit."""
    settled = {"device": str(run.device), "precision": "bf16" if run.bf16 else "fp32"}
    settled["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "ale-py", "numpy")}
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        settled["git_commit"] = git.stdout.strip() or None
    except OSError:
        settled["git_commit"] = None  # no git here
    (run.folder / "args.json").write_text(json.dumps(asdict(run.args) | settled, indent=2) + "\n")


def start_writer(run: Run):
    """The TensorBoard writer; with --track, Weights & Biases listens to it."""
    from torch.utils.tensorboard import SummaryWriter

    if run.args.track:
        try:
            import wandb
        except ImportError as error:
            raise IrisError("--track needs Weights & Biases: pip install wandb") from error
        wandb.init(
            project=run.args.wandb_project, entity=run.args.wandb_entity or None, name=run.folder.name,
            id=run.folder.name, resume="allow", sync_tensorboard=True, config=asdict(run.args), save_code=True,
        )  # fmt: skip
    # Epochs that were begun and not finished before a kill are played again: purge_step hides their first version.
    writer = SummaryWriter(str(run.folder), purge_step=run.epoch + 1)
    rows = [f"|{key}|{value}|" for key, value in asdict(run.args).items()]
    writer.add_text("arguments", "\n".join(["|argument|value|", "|-|-|", *rows]), run.epoch)
    return writer


def warn_of_the_wait(run: Run) -> None:
    """The paper's sizes on a CPU: says roughly how long an epoch takes, from how long 4 frames of the tokenizer do."""
    # Training on a frame, a sequence, a dream, in units of the first, on a CPU (tests/benchmark.py).
    costs = {"tokenizer": 1.0, "world_model": 3.5, "actor_critic": 8.5}
    epoch = sum(getattr(run.args, f"{x}_steps") * getattr(run.args, f"{x}_batch_size") * costs[x] for x in costs)
    for _ in range(2):  # the first time is a slow one
        began = time.perf_counter()
        with torch.random.fork_rng(), run.autocast():
            sum(run.agent.tokenizer.loss(torch.rand(4, 3, FRAME_SIZE, FRAME_SIZE)).values()).backward()
        seconds = (time.perf_counter() - began) / 4 * epoch
    run.agent.zero_grad()
    print(
        f"The paper's sizes on a CPU: an epoch of all three phases will take about {duration(seconds)} here, and there "
        f"are {run.args.epochs}. --preset laptop has sizes for a machine without a GPU.",
        flush=True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    minutes = int(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def phases(args: Args) -> dict[str, tuple[Callable[[Run], dict[str, float]], range]]:
    """The phases of an epoch, in order: name -> what to do, and the epochs that do it."""
    stop, tokenizer_stop = args.epochs + 1, min(args.tokenizer_until or args.epochs, args.epochs) + 1
    first_to_need_tokens = min(args.tokenizer_from, args.world_model_from, args.actor_critic_from)
    return {
        "collect": (collect, range(1, min(args.collect_epochs, args.epochs) + 1)),
        "tokenizer": (train_tokenizer, range(args.tokenizer_from, tokenizer_stop)),
        "encode": (encode_replay, range(first_to_need_tokens, stop)),
        "world_model": (train_world_model, range(args.world_model_from, stop)),
        "actor_critic": (train_actor_critic, range(args.actor_critic_from, stop)),
        "evaluate": (evaluate, range(args.eval_every, stop, args.eval_every) if args.eval_every else range(0)),
    }


def time_left(run: Run) -> str:
    """From the latest durations of each phase; a lower bound while a phase that is to come has not been seen."""
    seconds, unseen = 0.0, False
    for name, (_, epochs) in phases(run.args).items():
        due, seen = sum(epoch > run.epoch for epoch in epochs), run.seconds[name][-5:]
        unseen |= due > 0 and not seen
        seconds += due * sum(seen) / max(1, len(seen))
    return f"{'over ' if unseen else ''}{duration(seconds)} left"


def summary(run: Run, metrics: dict[str, float], seconds: float) -> str:
    """An epoch in one line."""
    shown = {
        "train/return": "train return {:.2f}", "tokenizer/loss": "tokenizer {:.4f}", "codes/in_use": "{:.0f} codes",
        "world_model/loss": "world model {:.3f}", "actor_critic/imagined_reward": "imagined reward {:.4f}",
        "actor_critic/policy_entropy": "entropy {:.3f}", "test/return": "test return {:.2f}",
    }  # fmt: skip
    parts = [text.format(metrics[key]) for key, text in shown.items() if key in metrics]
    head = f"epoch {run.epoch}/{run.args.epochs}  steps {len(run.replay)}"
    return "  ".join([head, *parts, duration(seconds), time_left(run)])


def main(args: Args) -> None:
    """Trains IRIS. Raises IrisError for what the user can put right, KeyboardInterrupt when stopped."""
    run = build(args)
    try:
        write_args(run)
        run.writer = start_writer(run)
        if run.epoch == 0:
            save_checkpoint(run, 0)  # shows at once whether there is room for it, and can be resumed as any other
        print(f"Run folder: {run.folder}   (tensorboard --logdir {run.folder.parent})", flush=True)
        if args.preset == "paper" and run.device.type == "cpu":
            warn_of_the_wait(run)
        while run.epoch < args.epochs:
            began, metrics = time.perf_counter(), {}
            for name, (phase, epochs) in phases(args).items():
                if run.epoch + 1 in epochs:
                    phase_began = time.perf_counter()
                    metrics |= phase(run)
                    run.seconds[name].append(time.perf_counter() - phase_began)
                    metrics[f"seconds/{name}"] = run.seconds[name][-1]
            metrics["environment_steps"] = len(run.replay)
            for name, value in metrics.items():
                run.writer.add_scalar(name, value, run.epoch + 1)
            run.writer.flush()
            save_checkpoint(run, run.epoch + 1)
            run.epoch += 1  # only now is it complete, and what the messages below say of it true
            print(summary(run, metrics, time.perf_counter() - began), flush=True)
        print(f"Done: {run.epoch} epochs, {len(run.replay)} steps of the game. The agent: {run.folder}/checkpoint.pt")
    except KeyboardInterrupt:
        print(
            f"\nStopped in epoch {run.epoch + 1}. Epoch {run.epoch} is saved in {run.folder}; go on from there with\n"
            f"  python iris_train.py --resume {run.folder}"
        )
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full" if full else f"the run folder failed ({error})"
        raise IrisError(f"{what}. Epoch {run.epoch} is saved: mend that, then --resume {run.folder}") from error
    finally:
        if run.writer:
            run.writer.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C
    try:
        main(parse_args(sys.argv[1:]))
    except IrisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
