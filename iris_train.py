"""Chapter 4 of IRIS: the loop. Play a little, then train the three models of chapters 1 to 3; 600 times.

An epoch plays 200 steps of the game, and then trains the three models one after the other (IRIS, arXiv 2209.00588,
section 2 and appendix A). Tokenizer and world model learn from real play, the policy from dreams alone.

    +--> collect --------> tokenizer -------> encode --------> world model ------> actor-critic ---+
    |    200 steps of      200 x 256 frames   all frames that  200 x 64 sequences  200 x 64 dreams |
    |    the game          to reconstruct     need new tokens  of 20 steps         of 20 steps     |
    +----------------------------------------------------------------------------------------------+
         epochs 1 to 500   from epoch 6                        from epoch 26       from epoch 51

Run it:   python iris_train.py --env-id BreakoutNoFrameskip-v4    # on a GPU the paper's run, else --preset laptop
          python iris_train.py --resume runs/...                                  # goes on as if never stopped
Read it:  arguments, the paper's unless a preset differs; environment, replay; then `train`, the algorithm, and what it
calls; checkpoints and start-up last. [paper] is IRIS or its code, [Delta-IRIS] arXiv 2406.19320, [ours] neither.
"""
import copy
import fcntl
import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import timeit
import zipfile
from collections import defaultdict, deque
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Callable, Literal, get_args

import ale_py  # registers Atari's games
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange

from iris_agent import ActorCritic, ActorCriticConfig, Agent, Rollout, actor_critic_loss, imagine, official_agent
from iris_tokenizer import FRAME_SIZE, SMALL_TOKENIZER, Lpips, Tokenizer, TokenizerConfig, labelled_rows, load_lpips
from iris_world_model import CompiledDream, Dream, WorldModel, WorldModelConfig


class IrisError(Exception):
    """What a user can put right. Its text is one line: what is wrong, and what to do. The programs exit with 2."""


# --- Arguments --------------------------------------------------------------------------------------------------------
Preset = Literal["auto", "paper", "laptop", "catch"]
Precision = Literal["auto", "fp32", "bf16", "fp32-nchw", "bf16-nchw"]
Model = Literal["tokenizer", "world_model", "actor_critic"]


@dataclass
class Args:
    """Trains IRIS on one game. The defaults are the paper's (appendix A and the published configuration)."""

    env_id: str = "BreakoutNoFrameskip-v4"  # A gymnasium id; `module:Env-v0` imports the module first
    preset: Preset = "paper"  # Sets all others: for a GPU, a CPU, tests/catch.py. No flag, or auto: by what there is
    seed: int = 1  # Seed of everything random
    device: str = "auto"  # cuda, cpu, ...; auto takes a GPU where there is one
    precision: Precision = "auto"  # nchw: channels first; auto: bf16 on a GPU [ours], on a CPU the fastest measured
    compile: bool = False  # torch.compile the dream; for GPUs; compiling takes a minute at first
    perceptual_loss: Literal["auto", "lpips", "pixel"] = "auto"  # lpips [paper] needs files, pixel [Delta-IRIS] none
    run_dir: str = ""  # Folder of the run; empty is runs/{env_id}__iris__{seed}__{time}
    resume: str = ""  # Folder of a run to go on with; all other arguments default to those of that run
    init_from: str = ""  # Checkpoint of a run, or a published one, whose weights to start from
    init_models: tuple[Model, ...] = get_args(Model)  # With init_from: the models to take over, with their sizes

    epochs: int = 600  # Epochs of the run
    collect_epochs: int = 500  # The game is played in the first this many epochs
    collect_steps: int = 200  # Environment steps played in each of them; 500 x 200 is the 100,000 of Atari 100k
    collect_epsilon: float = 0.01  # Probability of a uniformly random action while collecting
    collect_temperature: float = 1.0  # Temperature of the policy while collecting
    collect_hold: int = 1  # [ours] Until the policy is trained, hold actions for k steps, P(k) ~ 1/k^2, at most this
    noop_max: int = 30  # Training games start with 1 to this many no-ops
    max_frames: int = 20_000  # Frames after which a training game is cut off; raw ones in an Atari game
    draw: Literal["episodes", "steps"] = "episodes"  # What the replay draws uniformly: episodes [paper] or steps

    tokenizer_from: int = 6  # First epoch that trains the tokenizer
    tokenizer_until: int = 0  # [ours] Last epoch that trains it, at a falling rate; 0: it is trained to the end
    tokenizer_steps: int = 200  # Optimiser steps an epoch
    tokenizer_batch_size: int = 256  # Frames a step
    tokenizer_learning_rate: float = 1e-4  # Learning rate of Adam
    world_model_from: int = 26  # First epoch that trains the world model
    world_model_steps: int = 200  # Optimiser steps an epoch
    world_model_batch_size: int = 64  # Sequences a step, each of world_model.max_blocks steps of play
    world_model_learning_rate: float = 1e-4  # Learning rate of AdamW
    world_model_average: float = 0.0  # [ours] Decay of a moving average of its weights, which dreams use; 0: the latest
    actor_critic_from: int = 51  # First epoch that trains the actor-critic
    actor_critic_steps: int = 200  # Optimiser steps an epoch
    actor_critic_batch_size: int = 64  # Dreams a step
    actor_critic_learning_rate: float = 1e-4  # Learning rate of Adam
    burn_in: int = 20  # Real frames that warm up the LSTM, before a dream and where collecting goes on in mid-episode
    horizon: int = 20  # Steps of a dream
    given: int = 1  # Real frames a dream goes on from, at most burn_in + 1; one [paper] shows no motion, more do [ours]
    gamma: float = 0.995  # Discount factor
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 0.95  # Lambda of the lambda-returns
    entropy_weight: float = 0.001  # Weight of the entropy bonus
    after_end: bool = True  # Count the dreamed steps after an imagined end in the loss [paper, its code]
    max_grad_norm: float = 10.0  # Gradient norm at which gradients are clipped, for each model
    accumulate: int = 1  # Parts that each batch is split into, to save memory

    eval_every: int = 5  # Epochs from one evaluation to the next; 0 is never
    test_episodes: int = 16  # Whole games played in an evaluation
    test_envs: int = 8  # Of these, games played side by side
    test_temperature: float = 0.5  # Temperature of the policy in evaluations
    test_max_frames: int = 108_000  # Frames after which a test game is cut off; in an Atari game half an hour

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    actor_critic: ActorCriticConfig = field(default_factory=ActorCriticConfig)


# [ours] Under an hour on a CPU. Small models on patches of pixels; half the paper's context, the same horizon.
LAPTOP = Args(
    preset="laptop", epochs=50, collect_epochs=50, collect_steps=2000, max_frames=10_000, test_max_frames=10_000,
    tokenizer_from=3, tokenizer_until=12, tokenizer_steps=800, tokenizer_batch_size=16, tokenizer_learning_rate=1e-3,
    world_model_from=13, world_model_steps=600, world_model_batch_size=8, world_model_learning_rate=1e-3,
    actor_critic_from=17, actor_critic_steps=80, actor_critic_batch_size=16, actor_critic_learning_rate=1e-3,
    burn_in=10, given=4, entropy_weight=0.003, gamma=0.99, after_end=False, world_model_average=0.995, draw="steps",
    tokenizer=replace(SMALL_TOKENIZER, vocab_size=1024, code_dim=64, worst_values=12), test_episodes=8, eval_every=10,
    world_model=WorldModelConfig(max_blocks=10, layers=2, heads=2, width=128, dropout=0.0, init_std=0.06),
    actor_critic=ActorCriticConfig(channels=(16, 32, 32), lstm_width=256, patch=2),
)  # fmt: skip
# [ours] The whole algorithm on the game of tests/catch.py, in minutes on a CPU. Its tokenizer is frozen after epoch 14.
CATCH = replace(
    LAPTOP, preset="catch", env_id="tests.catch:Catch-v0", epochs=36, collect_epochs=36, collect_steps=200,
    draw="episodes", tokenizer_until=14, tokenizer_steps=100, tokenizer=SMALL_TOKENIZER, world_model_from=9,
    world_model_steps=200, world_model_batch_size=32, actor_critic_from=13, actor_critic_steps=50,
    actor_critic_batch_size=64, horizon=8, burn_in=2, given=1, entropy_weight=0.02, eval_every=5,
    test_envs=40, test_episodes=40, world_model=replace(LAPTOP.world_model, max_blocks=4), world_model_average=0.0,
    actor_critic=replace(LAPTOP.actor_critic, lstm_width=128),
)  # fmt: skip
PRESETS = {"paper": Args(), "laptop": LAPTOP, "catch": CATCH}


# --- Environment [paper, appendix A] ----------------------------------------------------------------------------------
FRAME_SPACE = gym.spaces.Box(0, 255, (FRAME_SIZE, FRAME_SIZE, 3), np.uint8)


def resize_frame(image: np.ndarray) -> np.ndarray:
    """Image (H, W[, 1 or 3]) uint8 -> frame (64, 64, 3) uint8. Published agents saw Pillow's resize: this one differs
    by at most 1 of 255, the area resize of gymnasium's AtariPreprocessing by up to 90, at Breakout's ball."""
    x = torch.from_numpy(np.atleast_3d(np.ascontiguousarray(image))).permute(2, 0, 1)[None]  # (1, 1 or 3, H, W)
    x = F.interpolate(x, size=(FRAME_SIZE, FRAME_SIZE), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()


def to_model(frames: Tensor) -> Tensor:
    """Stored frames (..., 64, 64, 3) uint8 -> the models' (..., 3, 64, 64) float32 in [0, 1]."""
    return frames.movedim(-1, -3).float().div(255)


def to_stored(frames: Tensor) -> Tensor:
    """The models' frames (..., 3, 64, 64) in [0, 1] -> (..., 64, 64, 3) uint8."""
    return frames.mul(255).round().clamp(0, 255).byte().movedim(-3, -1)


class GameFrames(gym.Wrapper):
    """A game as IRIS sees it: frames (64, 64, 3) uint8; `screen` is the latest image, (H, W[, 1 or 3]). In a
    `...NoFrameskip-v4` game an action lasts 4 raw frames, of which the last two are resized, and their maximum taken
    (some objects are drawn in every other one). With `life_loss_ends` a lost life ends the episode, but not the game:
    `info["life_lost"]` is True, and `reset()` goes on with one no-op step. Other games have no no-ops and no lives."""

    def __init__(self, env: gym.Env, noop_max: int, life_loss_ends: bool):
        super().__init__(env)
        self.observation_space = FRAME_SPACE
        self.atari = env.spec.id.endswith("NoFrameskip-v4")
        self.noop_max, self.life_loss_ends, self.life_lost = noop_max, life_loss_ends and self.atari, False

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if self.life_lost and seed is None:
            frame, _, terminated, truncated, info = self.step(0)
            if self.life_lost or not (terminated or truncated):  # losing another life does not end the game either
                self.life_lost = False
                return frame, info
        self.screen, info = self.play(self.env.reset, seed=seed, options=options)
        for _ in range(self.np_random.integers(1, self.noop_max + 1) if self.atari else 0):
            self.screen, *_, info = self.play(self.env.step, 0)
        self.lives, self.life_lost = self.unwrapped.ale.lives() if self.atari else 0, False
        return resize_frame(self.screen), info

    def step(self, action: int):
        images, total = [], 0.0
        for _ in range(4 if self.atari else 1):
            image, reward, terminated, truncated, info = self.play(self.env.step, action)
            images.append(image)
            total += float(reward)
            if terminated or truncated:
                break
        frame = np.maximum.reduce([resize_frame(image) for image in images[-2:]])
        self.screen = np.maximum.reduce(images[-2:])
        if self.life_loss_ends:
            lives, before = self.unwrapped.ale.lives(), self.lives
            self.lives, self.life_lost = lives, 0 < lives < before and not (terminated or truncated)
        return frame, total, terminated or self.life_lost, truncated, {**info, "life_lost": self.life_lost}

    def play(self, function: Callable, *arguments, **options) -> tuple:
        """Calls the environment: somebody else's code, which may fail in any way. Raises IrisError for its faults."""
        try:
            image, *rest = function(*arguments, **options)
            fits = image.dtype == np.uint8 and image.shape == self.env.observation_space.shape
            assert fits, f"the image is {image.shape} of {image.dtype}"
            assert len(rest) in (1, 4), f"{function.__name__} gave {1 + len(rest)} values"
            assert len(rest) == 1 or abs(float(rest[0])) < 1e9, f"the reward is {rest[0]}"
            return image, *rest
        except (Exception, SystemExit) as error:
            raise IrisError(f"{self.env.spec.id} failed in step {self.env._elapsed_steps}: {error!r}") from error


def make_env(env_id: str, noop_max: int = 1, max_frames: int = 108_000, life_loss_ends: bool = False) -> gym.Env:
    """A game with frames (64, 64, 3) uint8 and Discrete actions, cut off after `max_frames` (raw ones in an Atari game,
    else one a step). The defaults are a test game's. Raises IrisError for an unknown id, other actions, or no image."""
    gym.logger.min_level = gym.logger.ERROR  # or each game warns that there is a v5, which has sticky actions
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    try:
        env = gym.wrappers.TimeLimit(gym.make(env_id), max_frames)
    except Exception as error:  # an environment is somebody else's code and may fail in any way
        raise IrisError(f"no environment {env_id!r}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    space, actions = env.observation_space, env.action_space
    shape = space.shape if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 else ()
    discrete = isinstance(actions, gym.spaces.Discrete) and actions.start == 0
    if not discrete or len(shape) < 2 or shape[2:] not in ((), (1,), (3,)):
        raise IrisError(f"{env_id} has {actions} and {space}; IRIS needs Discrete(n) and uint8 images: wrap it")
    return GameFrames(env, noop_max, life_loss_ends)


# --- Replay -----------------------------------------------------------------------------------------------------------
# Frame, action, reward as the game gave it, and 1 where the episode ended with it: a life, a game, or the time limit
STEP = np.dtype([("frames", "u1", FRAME_SPACE.shape), ("actions", "<i8"), ("rewards", "<f4"), ("ends", "u1")])
FORMAT = 2  # of replays and checkpoints; changes when those of earlier versions can't be read any more


class Steps:
    """T steps of play, in order: frames (T, 64, 64, 3) uint8, actions, rewards and ends (T,). An episode lies between
    two ends; the last one may go on: starts and stops (episodes,)."""

    def __init__(self, steps: np.ndarray):
        self.array = steps  # (T,) of STEP
        self.frames, self.actions, self.rewards, self.ends = (steps[name] for name in STEP.names)
        self.stops = np.union1d(np.flatnonzero(self.ends) + 1, len(steps))  # the last episode may go on
        self.starts = np.append(0, self.stops[:-1])

    def __len__(self) -> int:
        return len(self.frames)

    def sample(self, rng: np.random.Generator, n: int, offsets: range, draw: str) -> tuple[np.ndarray, np.ndarray]:
        """n segments of L = len(offsets) steps -> indices (n, L), and mask (n, L), False for padding, which repeats
        the nearest step. An episode is drawn, uniformly [paper] or, if `draw` is "steps", by its length; then a step of
        it, uniformly. There a segment starts with range(L) (world model), stops with range(1 - L, 1) (actor-critic)."""
        lengths = self.stops - self.starts
        episodes = rng.choice(len(lengths), n, p=lengths / len(self) if draw == "steps" else None)
        starts, stops = self.starts[episodes, None], self.stops[episodes, None]  # (n, 1)
        indices = rng.integers(starts, stops) + np.array(offsets)  # (n, L)
        return np.clip(indices, starts, stops - 1), (indices >= starts) & (indices < stops)

    def frames_at(self, indices: np.ndarray, device: torch.device) -> Tensor:
        """Indices (...) -> their frames (..., 3, 64, 64) in [0, 1], on the device."""
        return to_model(torch.from_numpy(self.frames[indices]).to(device))


class Replay(Steps):
    """Steps in an append-only file, read through a memory map: 100,000 take 1.23 GB on disk and hardly any memory. They
    are not written through the map: on a full disk, that would kill the process, where `write` raises OSError."""

    def __init__(self, folder: Path):
        """Opens or creates the file, and keeps other processes away from it. Raises OSError if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / "steps.bin", "ab")
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.extend(np.empty(0, STEP))

    def cut(self, checkpoint: dict | None, num_actions: int) -> None:
        """Forgets steps after a checkpoint. Raises IrisError, and leaves the file, if those before it aren't there."""
        length, epoch = (checkpoint.get("replay_length"), checkpoint["epoch"]) if checkpoint else (0, 0)
        fits = type(length) is int and 0 <= length <= len(self) and (length > 0) == (epoch > 0)
        if not fits or not np.isin(self.actions[:length], range(num_actions)).all() or (len(self) and not checkpoint):
            raise IrisError(f"{self.file.name} is another run's, or damaged: --resume that, or name another --run-dir")
        self.file.truncate(length * STEP.itemsize)
        self.extend(np.empty(0, STEP))

    def extend(self, steps: np.ndarray) -> None:
        """Appends steps, an array of STEP, safe against a power cut."""
        self.file.write(steps.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        whole = os.path.getsize(self.file.name) // STEP.itemsize  # a process that is killed may leave a part of a step
        super().__init__(np.memmap(self.file.name, STEP, "r", shape=whole) if whole else np.empty(0, STEP))


# --- The algorithm ----------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """The state of a run. A checkpoint holds what changes in it; the replay lies beside the checkpoint."""

    args: Args
    folder: Path
    device: torch.device
    agent: Agent
    trained: Agent  # what optimisers change: the agent, but with world_model_average the world model before averaging
    optimizers: dict[str, torch.optim.Optimizer]
    lpips: Lpips | None
    dream: Dream
    env: gym.Env
    replay: Replay
    rng: np.random.Generator  # draws what torch does not: segments, epsilon, seeds of games
    epoch: int = 0  # the epoch that is running
    saved_epoch: int | None = None  # the epoch of the checkpoint on disk
    game_seed: int = -1  # of the training game that is being played; -1 before the first
    game_start: int = 0  # the step of the replay at which that game started
    frame: np.ndarray | None = None  # that game's current frame, (64, 64, 3) uint8; None: a new game is due
    tokens: Tensor | None = None  # the replay's frames as tokens, (steps, K) int64 on the device
    decoded: Tensor | None = None  # those tokens as frames again, (steps, 64, 64, 3) uint8 on the device
    metrics: dict[str, float] = field(default_factory=dict)  # of this epoch, by their names in TensorBoard
    writer: Any = None  # TensorBoard's

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled="bf16" in self.args.precision)

    def x_axis(self) -> int:
        """TensorBoard's: environment steps; after the last one, it goes on by one an epoch."""
        return len(self.replay) + max(0, self.epoch - self.args.collect_epochs)

    def saved(self) -> str:
        """What of a run that stops is on disk."""
        go_on = f"Epoch {self.saved_epoch} is saved; go on with: python iris_train.py --resume {self.folder}"
        return f"Nothing was saved in {self.folder}" if self.saved_epoch is None else go_on


def train(run: Run) -> None:
    """IRIS. `optimise` takes an epoch's steps on one model. Its last argument draws a batch and computes the losses:

        tokenizer     reconstruction + perceptual + codebook + commitment         of 256 frames      chapter 1
        world_model   observations + rewards + ends                               of 64 sequences    chapter 2
        actor_critic  policy + value - entropy_weight * entropy                   of 64 dreams       chapter 3

    Each has an optimiser of its own, and no gradient crosses models: world model and policy read tokens and decoded
    frames that `encode_replay` stored, and the dream and the LSTM's warm-up run without gradients."""
    args, agent = run.args, run.agent
    for run.epoch in range(run.epoch + 1, args.epochs + 1):
        began, run.metrics = time.perf_counter(), {"charts/epoch": run.epoch}
        if run.epoch <= args.collect_epochs:
            collect(run)

        if args.tokenizer_from <= run.epoch <= (args.tokenizer_until or args.epochs):
            if args.tokenizer.standardize:  # [ours]
                seen = run.replay.sample(run.rng, min(4096, len(run.replay)), range(1), args.draw)[0][:, 0]
                agent.tokenizer.fit_pixels(run.replay.frames_at(seen, run.device))
            optimise(run, "tokenizer", tokenizer_losses)
            run.tokens = None  # those in `run.tokens` are another tokenizer's

        if run.epoch >= min(args.world_model_from, args.actor_critic_from):
            encode_replay(run)

        if run.epoch >= args.world_model_from:
            optimise(run, "world_model", world_model_losses)

        if run.epoch >= args.actor_critic_from:
            agent.actor_critic.mean.copy_(agent.tokenizer.mean)  # 0.5, unless `fit_pixels` was called
            agent.actor_critic.std.copy_(agent.tokenizer.std)
            optimise(run, "actor_critic", actor_critic_losses)

        if args.eval_every and run.epoch % args.eval_every == 0:
            evaluate(run)
        log(run, time.perf_counter() - began)
        save_checkpoint(run)


def tokenizer_losses(run: Run, n: int) -> tuple[dict, dict]:
    """Losses and metrics on n frames."""
    args, tokenizer = run.args, run.agent.tokenizer
    frames = run.replay.frames_at(run.replay.sample(run.rng, n, range(1), args.draw)[0][:, 0], run.device)
    z = tokenizer.encoder_outputs(frames)
    if run.lpips is None:
        tokenizer.codebook.revive(z, args.tokenizer.revive_after * min(args.accumulate, args.tokenizer_batch_size))
    return tokenizer.loss(frames, run.lpips, z), {}


def world_model_losses(run: Run, n: int) -> tuple[dict, dict]:
    """Losses and metrics on n sequences of L = max_blocks steps."""
    indices, columns = sample_sequences(run, run.replay, run.rng, n)
    return run.trained.world_model.loss(run.tokens[torch.from_numpy(indices).to(run.device)], *columns), {}


def actor_critic_losses(run: Run, n: int) -> tuple[dict, dict]:
    """Losses and metrics on n dreams."""
    args, rollout = run.args, dream_from_replay(run, run.rng, n)
    return actor_critic_loss(rollout, args.gamma, args.lambda_, args.entropy_weight, args.after_end)


def sample_sequences(run: Run, steps: Steps, rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[Tensor]]:
    """n segments -> their steps' indices (n, L), and actions, rewards, ends and mask (n, L) on the device."""
    indices, mask = steps.sample(rng, n, range(run.args.world_model.max_blocks), run.args.draw)
    columns = steps.actions[indices], steps.rewards[indices], steps.ends[indices], mask
    return indices, [torch.from_numpy(column).to(run.device) for column in columns]


def dream_from_replay(run: Run, rng: np.random.Generator, n: int) -> Rollout:
    """n dreams. Each has a segment of burn_in + 1 real frames: the last one starts it, the others warm up the LSTM."""
    args, agent = run.args, run.agent
    segments = run.replay.sample(rng, n, range(-args.burn_in, 1), args.draw)
    actions = torch.from_numpy(run.replay.actions[segments[0][:, -args.given :]]).to(run.device)  # (n, given)
    indices, mask = (torch.from_numpy(x).to(run.device) for x in segments)  # (n, burn_in + 1)
    state = agent.actor_critic.warm_up(to_model(run.decoded[indices[:, :-1]]), mask[:, :-1])
    blocks = torch.cat([run.tokens[indices[:, -args.given :]], actions[..., None]], dim=2)  # (n, given, K + 1)
    first = run.dream.reset_from_tokens(blocks.flatten(1)[:, :-1])
    return imagine(agent.actor_critic, run.dream, first, state, args.horizon)


def optimise(run: Run, name: str, losses_of: Callable[[Run, int], tuple[dict, dict]]) -> None:
    """An epoch's optimiser steps on one model; no step waits for a GPU. The means of losses and metrics go to
    `run.metrics`. Raises IrisError for a loss or a gradient norm that was not finite."""
    args, model, optimizer = run.args, getattr(run.trained, name), run.optimizers[name]
    steps, batch_size, rate = (getattr(args, f"{name}_{what}") for what in ("steps", "batch_size", "learning_rate"))
    if name == "tokenizer" and (until := args.tokenizer_until):  # [ours] falls over the second half of its epochs
        rate *= min(1.0, 2 * (until + 1 - run.epoch) / (until + 1 - args.tokenizer_from))
    for group in optimizer.param_groups:
        group["lr"] = rate
    sizes = [len(part) for part in np.array_split(np.arange(batch_size), min(batch_size, args.accumulate))]
    logged = defaultdict(lambda: torch.zeros(steps, len(sizes), device=run.device))  # lists would fragment memory
    model.train()
    for step in trange(steps, desc=name, leave=False, disable=None):
        optimizer.zero_grad()
        for part, n in enumerate(sizes):
            with run.autocast():
                losses, metrics = losses_of(run, n)
            total = sum(losses.values())
            (total * (n / batch_size)).backward()
            for key, value in ({f"{key}_loss": loss for key, loss in losses.items()} | metrics | {name: total}).items():
                logged[key][step, part] = value.detach()
        logged[f"{name}_grad_norm"][step] = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        if model is not (averaged := getattr(run.agent, name)):  # [ours] a world model: see world_model_average
            get_ema_multi_avg_fn(args.world_model_average)([*averaged.parameters()], [*model.parameters()], None)
    model.eval()
    for key, values in logged.items():
        if len(bad := (~values.isfinite()).nonzero()):  # (step, part) of each
            raise IrisError(f"{key} is not finite at step {bad[0, 0] + 1} of the {name}: lower its learning rate")
        run.metrics[f"losses/{key}"] = values.mean().item()
    run.metrics[f"charts/{name}_learning_rate"] = rate


def encode_replay(run: Run) -> None:
    """Tokens of all frames, and these decoded: once an epoch, or once at all when the tokenizer's training is over."""
    start = 0 if run.tokens is None else (len(run.tokens) - 1) // 256 * 256  # a part's: a resumed run makes the same
    tokens = torch.zeros(len(run.replay), run.args.tokenizer.tokens_per_frame, dtype=torch.int64, device=run.device)
    decoded = torch.zeros(len(tokens), *FRAME_SPACE.shape, dtype=torch.uint8, device=run.device)
    if start:
        tokens[:start], decoded[:start] = run.tokens[:start], run.decoded[:start]
    for part in np.split(np.arange(start, len(tokens)), range(256, len(tokens) - start, 256)):
        with run.autocast(), torch.no_grad():
            tokens[part] = run.agent.tokenizer.encode(run.replay.frames_at(part, run.device))
            decoded[part] = to_stored(run.agent.tokenizer.decode(tokens[part]))
    run.tokens, run.decoded = tokens, decoded
    run.metrics["charts/codes_in_use"] = float(len(run.tokens.unique()))


# --- Playing: collection and evaluation -------------------------------------------------------------------------------
def collect(run: Run) -> None:
    """Plays `collect_steps` of the training game into the replay, where an Atari episode is a single life."""
    args, agent, replay, device = run.args, run.agent, run.replay, run.device
    # The LSTM and the tokenizer have changed since the last epoch: compute the state anew from the latest frames.
    length = len(replay)
    start = int(replay.starts[-1]) if length and not replay.ends[-1] else length  # of the current episode
    latest = np.arange(max(start, length - args.burn_in), length)
    state = agent.actor_critic.initial_state(1)
    if len(latest):
        with run.autocast(), torch.no_grad():
            frames = agent.tokenizer.reconstruct(replay.frames_at(latest, device))[None]  # (1, L, 3, 64, 64)
            state = agent.actor_critic.warm_up(frames, torch.ones(frames.shape[:2], dtype=torch.bool, device=device))
    learned = run.epoch > args.actor_critic_from or (args.init_from and "actor_critic" in args.init_models)
    began, steps, games, hold = time.perf_counter(), [], [], 0
    for step in trange(length, length + args.collect_steps, desc="collect", leave=False, disable=None):
        if run.frame is None:  # a new game, with a seed of its own, from which a resumed run can repeat it
            run.game_seed, run.game_start = int(run.rng.integers(2**31)), step
            run.frame, _ = run.env.reset(seed=run.game_seed)
        with run.autocast():
            seen = to_model(torch.from_numpy(run.frame)[None].to(device))
            actions, state = agent.act(seen, state, args.collect_temperature)
        if hold == 0:  # else the last `action` is held (temporally extended exploration, arXiv 2006.01782)
            action = int(actions)
            if run.rng.random() < args.collect_epsilon:
                action = int(run.rng.integers(run.env.action_space.n))
            hold = 1 if learned else min(int(run.rng.zipf(2.0)), args.collect_hold)
        hold -= 1
        frame, reward, terminated, truncated, info = run.env.step(action)
        steps.append((run.frame, action, reward, terminated or truncated))
        run.frame = frame
        if terminated or truncated:
            hold, state = 0, agent.actor_critic.initial_state(1)
            if not info["life_lost"]:
                games.append((run.game_start, step + 1))
            run.frame = run.env.reset()[0] if info["life_lost"] else None
    replay.extend(np.array(steps, STEP))
    run.metrics["charts/SPS"] = args.collect_steps / (time.perf_counter() - began)
    ended = [(a, b) for a, b in zip(replay.starts, replay.stops, strict=True) if b > length and replay.ends[b - 1]]
    for begin, stop in {*ended[-10:], *sorted(ended, key=lambda span: replay.rewards[slice(*span)].sum())[-1:]}:
        save_episode(run.folder / "media/episodes/train", f"step_{begin:07d}", replay.array[begin:stop])
    if games:
        run.metrics["charts/episodic_return"] = np.mean([replay.rewards[begin:stop].sum() for begin, stop in games])
        run.metrics["charts/episodic_length"] = np.mean([stop - begin for begin, stop in games])


@torch.no_grad()
def play_test_episodes(agent: Agent, args: Args, device: torch.device, seed: int, keep: int = 2000) -> list[dict]:
    """Whole games -> for each its return, length, and last `keep` steps, an array of STEP (all might fill the memory).
    A round of `test_envs` games is played until the longest is over: to stop earlier would favour short games."""
    games: list[dict] = []
    for first in trange(0, args.test_episodes, args.test_envs, desc="test episodes", leave=False, disable=None):
        n = min(args.test_envs, args.test_episodes - first)
        envs = gym.vector.SyncVectorEnv([lambda: make_env(args.env_id, max_frames=args.test_max_frames)] * n)
        frames, _ = envs.reset(seed=[seed + first + i for i in range(n)])  # (n, 64, 64, 3)
        state, over = agent.actor_critic.initial_state(n), np.zeros(n, bool)
        played = [{"return": 0.0, "length": 0, "steps": deque(maxlen=keep)} for _ in range(n)]
        while not over.all():
            actions, state = agent.act(to_model(torch.from_numpy(frames).to(device)), state, args.test_temperature)
            next_frames, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
            for i in np.flatnonzero(~over):  # games that are over are reset and go on, but nobody looks
                game, over[i] = played[i], terminated[i] or truncated[i]
                game["return"] += float(rewards[i])
                game["length"] += 1
                game["steps"].append((frames[i].copy(), actions[i].item(), rewards[i], over[i]))
            frames = next_frames
        envs.close()
        games += [game | {"steps": np.array([*game["steps"]], STEP)} for game in played]
    return games


@torch.no_grad()
def evaluate(run: Run) -> None:
    """Test games, the models' losses on them, and pictures. Has random generators of its own: it changes no weights."""
    args, agent, metrics, name = run.args, run.agent, run.metrics, f"epoch_{run.epoch:04d}"
    episodes, rng = run.folder / "media/episodes", np.random.default_rng([args.seed, run.epoch])
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []), run.autocast():
        torch.manual_seed(int(rng.integers(2**31)))
        games = play_test_episodes(agent, args, run.device, int(rng.integers(2**31)))
        returns = np.array([game["return"] for game in games])
        metrics["eval/episodic_return"], metrics["eval/episodic_return_std"] = returns.mean(), returns.std()
        metrics["eval/episodic_length"] = np.mean([game["length"] for game in games])
        save_episode(episodes / "test", name, games[returns.argmax()]["steps"], returns.max())  # the best of them
        test, losses, pictures = Steps(np.concatenate([game["steps"] for game in games])), {}, {}
        if run.epoch >= args.tokenizer_from:
            indices, _ = test.sample(rng, 128, range(1), args.draw)
            losses |= agent.tokenizer.loss(test.frames_at(indices[:, 0], run.device), run.lpips)
            frames = test.frames_at(np.linspace(0, len(test) - 1, 8).astype(int), run.device)
            pictures["reconstructions"] = {"test games": frames, "reconstructions": agent.tokenizer.reconstruct(frames)}
        if run.epoch >= args.world_model_from:
            indices, columns = sample_sequences(run, test, rng, 16)
            tokens = agent.tokenizer.encode(test.frames_at(indices.ravel(), run.device)).unflatten(0, indices.shape)
            losses |= agent.world_model.loss(tokens, *columns)
            real = test.frames_at(np.arange(min(args.horizon, test.stops[0])), run.device)
            actions = torch.tensor(test.actions[: len(real) - 1].tolist(), device=run.device)
            dreamed = [run.dream.reset(real[:1]), *(run.dream.step(action[None])[0] for action in actions)]
            pictures["dreams"] = {"test game": real[::2], "dream, same actions": torch.cat(dreamed)[::2]}
            rollout = dream_from_replay(run, rng, 1)
            columns = to_stored(torch.stack(rollout.frames, dim=1)), rollout.actions, rollout.rewards, rollout.ends
            dream = {key: column[0].cpu().numpy() for key, column in zip(STEP.names, columns, strict=True)}
            save_episode(episodes / "imagination", name, dream)
        for kind, rows in pictures.items():
            image = labelled_rows(rows, run.folder / f"media/{kind}/{name}.png")
            run.writer.add_image(kind, image, run.x_axis(), dataformats="HWC")
    metrics |= {f"eval/{key}_loss": value.item() for key, value in losses.items()}


def save_episode(folder: Path, name: str, steps: np.ndarray | dict, total: float | None = None) -> None:
    """Keeps an episode, of the columns of STEP, as `{name}_return_{total}.npz`; of all, the last ten and the best stay.
    `total` is the return, where these are not all its steps. Raises OSError."""
    total = float(steps["rewards"].sum() if total is None else total)
    columns = {key: steps[key] for key in STEP.names} | {"return": total}
    write_file(folder / f"{name}_return_{total:g}.npz", lambda file: np.savez_compressed(file, **columns))
    paths = sorted(folder.glob("*_return_*.npz"))
    best = max(paths, key=lambda path: float(path.stem.split("_return_")[1]))
    for path in {*paths[:-10]} - {best}:
        path.unlink()


def write_file(path: Path, save: Callable[[io.BytesIO], Any]) -> None:
    """Writes what `save` writes to a file. Whenever the process is killed, `path` is whole or as before. OSError."""
    content = io.BytesIO()  # on a full disk, torch.save has errors of its own, and writing bytes has the system's
    save(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after an error


# --- Logging ----------------------------------------------------------------------------------------------------------
def log(run: Run, seconds: float) -> None:
    """The epoch's metrics to TensorBoard, and one line to the terminal."""
    args, metrics = run.args, run.metrics
    for name, value in metrics.items():
        run.writer.add_scalar(name, value, run.x_axis())
    run.writer.flush()
    shown = {
        "charts/episodic_return": "return", "losses/tokenizer": "tokenizer", "charts/codes_in_use": "codes",
        "losses/world_model": "world model", "losses/imagined_reward": "imagined reward", "losses/entropy": "entropy",
        "eval/episodic_return": "test return",
    }  # fmt: skip
    line = [f"epoch {run.epoch}/{args.epochs}", f"steps {len(run.replay)}"]
    line += [f"{label} {metrics[name]:.4g}" for name, label in shown.items() if name in metrics] + [f"{seconds:.0f} s"]
    line += [f"{(args.epochs - run.epoch) * seconds / 3600:.1f} h left"] * (run.epoch >= args.actor_critic_from)
    print("  ".join(line), flush=True)


# --- Checkpoints ------------------------------------------------------------------------------------------------------
def checkpoint_path(run_or_checkpoint: Path | str) -> Path:
    """A run's folder, or a checkpoint itself -> the checkpoint."""
    path = Path(run_or_checkpoint)
    return path / "checkpoint.pt" if path.is_dir() else path


def save_checkpoint(run: Run) -> None:
    """Writes what resuming after this epoch needs, beside the replay. Raises OSError."""
    content = {
        "format": FORMAT, "args": asdict(run.args), "num_actions": run.agent.world_model.num_actions,
        "epoch": run.epoch, "agent": run.agent.state_dict(), "trained": run.trained.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()},
        "replay_length": len(run.replay), "game_seed": run.game_seed, "game_start": run.game_start,
        "torch_rng": torch.get_rng_state(), "numpy_rng": json.dumps(run.rng.bit_generator.state),  # 128 bits
        "cuda_rng": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
    }  # fmt: skip
    write_file(run.folder / "checkpoint.pt", lambda file: torch.save(content, file))
    run.saved_epoch = run.epoch


def read_checkpoint(run_or_checkpoint: Path | str) -> tuple[dict, Args]:
    """A run's folder, its checkpoint, or a published one, named by its game (Breakout.pt) -> its content on the CPU,
    and its arguments, defaults for newer ones; for a published one the paper's. Raises IrisError for any other file."""
    path = checkpoint_path(run_or_checkpoint)
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError(damaged)
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load has half a dozen errors for a file of another kind
        why = getattr(error, "strerror", None) or "it is damaged, or another kind of file"
        raise IrisError(f"no checkpoint can be read at {path}: {why}") from error
    if "actor_critic.actor_linear.weight" in content:
        return content, Args(env_id=f"{path.stem}NoFrameskip-v4")
    if content.get("format") != FORMAT:
        raise IrisError(f"{path} is no checkpoint of an IRIS run of this version, and not a published one")
    values = {name: value for name, value in content["args"].items() if name in Args.__dataclass_fields__}
    check(args := Args(**values | {name: type(getattr(Args(), name))(**values[name]) for name in get_args(Model)}))
    return content, args


def restore(run: Run, checkpoint: dict) -> None:
    """Brings a run that was just built from the same arguments to where the checkpoint was written."""
    run.agent.load_state_dict(checkpoint["agent"])
    run.trained.load_state_dict(checkpoint.get("trained", checkpoint["agent"]))
    for name, optimizer in run.optimizers.items():
        optimizer.load_state_dict(checkpoint["optimizers"][name])
    run.epoch = run.saved_epoch = checkpoint["epoch"]
    run.game_seed, run.game_start = checkpoint["game_seed"], checkpoint["game_start"]
    if run.epoch < run.args.collect_epochs and run.game_seed >= 0:  # play the current game again, up to where it was
        run.frame, _ = run.env.reset(seed=run.game_seed)
        for step in range(run.game_start, len(run.replay)):
            if not np.array_equal(run.frame, run.replay.frames[step]):
                raise IrisError(f"{run.args.env_id} does not repeat a game from its seed: the run can't be resumed")
            run.frame, _, terminated, truncated, info = run.env.step(int(run.replay.actions[step]))
            if terminated or truncated:
                run.frame = run.env.reset()[0] if info["life_lost"] else None
    run.rng.bit_generator.state = json.loads(checkpoint["numpy_rng"])
    torch.set_rng_state(checkpoint["torch_rng"])
    if run.device.type == "cuda" and checkpoint["cuda_rng"] is not None:
        torch.cuda.set_rng_state(checkpoint["cuda_rng"], run.device)


def build_agent(args: Args, num_actions: int) -> Agent:
    """The three models in the sizes of the arguments, in evaluation mode. Raises IrisError if there are none such."""
    try:
        if args.tokenizer.tokens_per_frame != args.world_model.tokens_per_frame:
            raise ValueError(f"--world-model.tokens-per-frame is not the tokenizer's {args.tokenizer.tokens_per_frame}")
        if 64 % (patch := args.actor_critic.patch) or 64 // patch >> len(args.actor_critic.channels) < 1:
            raise ValueError(f"--actor-critic.patch {patch}: its convolutions have to halve 64 / {patch} pixels each")
        tokenizer = Tokenizer(args.tokenizer)
        if "nchw" in args.precision:
            tokenizer.to(memory_format=torch.contiguous_format)
        world_model = WorldModel(args.tokenizer.vocab_size, num_actions, args.world_model)
        return Agent(tokenizer, world_model, ActorCritic(num_actions, args.actor_critic)).eval()
    except (ValueError, RuntimeError, ArithmeticError, IndexError, TypeError) as error:
        raise IrisError(f"no model has these sizes: {' '.join(str(error).split())}") from error


def load_agent(run_or_checkpoint: Path | str) -> tuple[Agent, Args]:
    """As `read_checkpoint`, but the agent, in evaluation mode on the CPU, and its arguments."""
    content, args = read_checkpoint(run_or_checkpoint)
    if "format" in content:
        agent = build_agent(args, content["num_actions"])
        agent.load_state_dict(content["agent"])
        return agent, args
    try:
        return official_agent(content), args
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise IrisError(f"{run_or_checkpoint} is no whole published checkpoint ({error})") from error


# --- Starting ---------------------------------------------------------------------------------------------------------
def parse_args(argv: list[str]) -> Args:
    """The command line -> Args. Flags override a preset, or the arguments of a resumed run. Raises IrisError."""

    def first(preset: Preset = "auto", resume: str = "", device: str = "auto"):  # these decide the other defaults
        gpu = device != "cpu" and torch.cuda.is_available()
        return ("paper" if gpu else "laptop") if preset == "auto" else preset, resume

    (preset, resume), others = tyro.cli(first, args=argv, return_unknown_args=True, add_help=False)
    if not resume or {"-h", "--help"} & set(others):
        ranges = ", ".join(f"{name} {least} to {most:.4g}" for name, (least, most) in RANGES.items())
        args = tyro.cli(Args, default=PRESETS[preset], args=argv, description=f"{Args.__doc__} Ranges: {ranges}.")
        return replace(args, preset=preset)
    checkpoint, saved = read_checkpoint(resume)
    if "replay_length" not in checkpoint:
        raise IrisError(f"{resume} is a model without its run: start another with --init-from {resume}")
    args = tyro.cli(Args, default=saved, args=argv)
    fixed = "env_id preset seed noop_max max_frames perceptual_loss run_dir init_from"
    for name in [*fixed.split(), *get_args(Model)]:
        old, new = getattr(saved, name), getattr(args, name)
        if new == "auto":
            setattr(args, name, old)
        elif old != new:
            raise IrisError(f"{resume} is a run with {name} {old}, not {new}: leave that out, or start a new run")
    return args


RANGES = {  # the least and the greatest value of a number, or of each in a tuple; by name, or else by kind
    **dict.fromkeys(("tokenizer_until", "burn_in", "eval_every"), (0, 10**9)), "blocks": (0, 99), "layers": (1, 999),
    **dict.fromkeys(("gamma", "lambda_", "collect_epsilon", "world_model_average"), (0, 1)), "dropout": (0, 0.99),
    "horizon": (2, 10**9), "whole numbers": (1, 10**9), "other numbers": (0, sys.float_info.max), "test_envs": (1, 999),
    "seed": (0, 2**63 - 1), "max_blocks": (2, 10**9), "max_grad_norm": (1e-9, 1e9), "worst_values": (1, 12_288),
}  # fmt: skip


def check(part: Any, prefix: str = "--") -> None:
    """Arguments, or those of a model. Raises IrisError for a value that would fail in a phase, maybe hours later."""
    for (name, value), default in zip(vars(part).items(), vars(type(part)()).values(), strict=True):
        flag, kind = prefix + name.rstrip("_").replace("_", "-"), type(default)
        if is_dataclass(value):
            check(value, f"{flag}.")
        if not isinstance(value, (int, float) if kind is float else kind) or (value == () and name != "attention_at"):
            raise IrisError(f"{flag} is {value!r}, and has to be of type {kind.__name__}, not empty")
        for x in value if kind is tuple else (value,):
            least, most = RANGES.get(name, RANGES["whole numbers" if type(x) is int else "other numbers"])
            if isinstance(x, (int, float)) and not least <= x <= most:
                raise IrisError(f"{flag} is {x}, and has to be from {least} to {most}")


def check_memory(args: Args, num_actions: int) -> None:
    """Raises IrisError for what can't fit: weights, gradients, Adam's moments, and a batch's frames or embeddings."""
    with torch.device("meta"):  # tensors without memory
        weights = sum(weight.numel() for weight in build_agent(args, num_actions).parameters())
    frames = max(args.tokenizer_batch_size, args.actor_critic_batch_size * (args.burn_in + args.horizon))
    embeddings = args.world_model_batch_size * args.world_model.max_tokens * args.world_model.width
    needed = 4 * (4 * weights + max(3 * FRAME_SIZE**2 * frames, embeddings) // args.accumulate)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    has = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > has:
        raise IrisError(f"such models and batches need {needed >> 30:,} GiB of memory; there are {has >> 30}")


def choose_device(args: Args) -> tuple[torch.device, bool]:
    """Settles args.precision -> the device, and whether it computes in bfloat16. Raises IrisError if it isn't there."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=(device := torch.device(name))).item()
    except (RuntimeError, AssertionError) as error:
        raise IrisError(f"--device {name} is not available here: leave it out, or use --device cpu") from error
    if args.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = fastest_precision(args) if device.type == "cpu" else "bf16" if bf16 else "fp32"
    return device, "bf16" in args.precision


def fastest_precision(args: Args) -> str:
    """The precision in which this CPU trains tokenizer and world model fastest, by a step of each: what the processor
    names may be slow, as bfloat16 is without AMX. Draws random numbers, so it is called before seeding."""
    agents = {name: build_agent(replace(args, precision=name), 2) for name in get_args(Precision)[1:]}

    def step(name: str) -> None:
        frames, zeros = torch.rand(n, 3, 64, 64), torch.zeros(1, args.world_model.max_blocks, dtype=torch.int64)
        tokens = zeros[..., None].repeat(1, 1, args.world_model.tokens_per_frame)
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in name):
            losses = agents[name].world_model.loss(tokens, zeros, zeros, zeros, zeros == 0)
            sum((agents[name].tokenizer.loss(frames) | losses).values()).backward()

    n, least = 1, {}
    while n <= 2 or (n <= 16 and sum(least.values()) < 0.5):  # the first rounds also prepare kernels
        least, n = {name: min(timeit.repeat(lambda: step(name), number=1, repeat=2)) for name in agents}, 2 * n
    return min(least, key=lambda name: least[name] * (1.05 if "nchw" in name else 1))  # near a tie, channels last


def make_optimizers(agent: Agent, args: Args) -> dict[str, torch.optim.Optimizer]:
    """Adam for tokenizer and actor-critic, AdamW for the world model [paper]. Fused: one operator for all weights."""
    groups, Adam = agent.world_model.parameter_groups(weight_decay=0.01), torch.optim.Adam  # of linear weights [paper]
    return {
        "tokenizer": Adam(agent.tokenizer.parameters(), lr=args.tokenizer_learning_rate, fused=True),
        "world_model": torch.optim.AdamW(groups, lr=args.world_model_learning_rate, fused=True),
        "actor_critic": Adam(agent.actor_critic.parameters(), lr=args.actor_critic_learning_rate, fused=True),
    }


def build(args: Args) -> Run:
    """All that a run needs, from its arguments: new, or as a resumed one was."""
    taken = args.init_models if args.init_from and not args.resume else ()
    source, source_args = load_agent(args.init_from) if taken else (None, args)
    for name in taken:  # its sizes come along with a model
        setattr(args, name, getattr(source_args, name))
    check(args)
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
        raise IrisError("--compile needs a C++ compiler: install g++, or leave it out")
    env = make_env(args.env_id, args.noop_max, args.max_frames, life_loss_ends=True)
    check_memory(args, int(env.action_space.n))  # before models are built, to measure or to train
    torch.set_flush_denormal(True)  # on a CPU, arithmetic with numbers under 1e-38 takes many times as long
    device, _ = choose_device(args)
    torch.manual_seed(args.seed)
    try:
        lpips = None if args.perceptual_loss == "pixel" else load_lpips().to(device)
    except OSError as error:
        lpips = None
        if args.perceptual_loss == "lpips":
            raise IrisError(str(error)) from error
        print(f"warning: training with the pixel loss, not the paper's perceptual loss: {error}", file=sys.stderr)
    args.perceptual_loss = "lpips" if lpips else "pixel"  # auto is settled
    agent = build_agent(args, int(env.action_space.n))
    try:
        for name in taken:
            getattr(agent, name).load_state_dict(getattr(source, name).state_dict())
    except RuntimeError as error:
        raise IrisError(f"{args.env_id} can't take the {name} of {args.init_from}: see --init-models") from error
    agent.to(device)
    name = f"runs/{args.env_id.replace('/', '-').replace(':', '-')}__iris__{args.seed}__{int(time.time())}"
    folder = checkpoint_path(args.resume).parent if args.resume else Path(args.run_dir or name)
    try:
        if not args.resume and (folder / "checkpoint.pt").exists():
            raise IrisError(f"{folder} holds a run already: --resume {folder}, or name another --run-dir")
        replay = Replay(folder / "replay")
    except OSError as error:
        why = "another process is training there" if isinstance(error, BlockingIOError) else error.strerror
        raise IrisError(f"can't use the run folder {folder}: {why}; choose another --run-dir") from error
    checkpoint = read_checkpoint(args.resume)[0] if args.resume else None
    dream = (CompiledDream if args.compile else Dream)(agent.tokenizer, agent.world_model)
    replay.cut(checkpoint, int(env.action_space.n))
    learner = copy.deepcopy(agent.world_model) if args.world_model_average else agent.world_model
    trained = Agent(agent.tokenizer, learner, agent.actor_critic)
    optimizers, rng = make_optimizers(trained, args), np.random.default_rng(args.seed)
    run = Run(args, folder, device, agent, trained, optimizers, lpips, dream, env, replay, rng)
    if checkpoint:
        restore(run, checkpoint)
    return run


def main(args: Args) -> None:  # raises IrisError, and KeyboardInterrupt when stopped
    run = build(args)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "ale-py", "numpy")}
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    facts = {"device": str(run.device), "versions": versions, "git_commit": git.stdout.strip() or None}
    text = json.dumps(asdict(run.args) | facts, indent=2)
    try:
        (run.folder / "args.json").write_text(text + "\n")
        with SummaryWriter(str(run.folder), purge_step=run.x_axis() + 1) as run.writer:
            if run.epoch == 0:
                save_checkpoint(run)  # shows whether there is room for it, and can be resumed like any other
                run.writer.add_text("arguments", f"<pre>{text}</pre>", 0)
            gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "laptop an hour, paper weeks"
            print(f"--preset {args.preset} in {args.precision} on {run.device} ({gpu})", flush=True)
            print(f"Run folder: {run.folder}   (tensorboard --logdir {run.folder.parent})", flush=True)
            for name in get_args(Model):
                if (start := getattr(args, f"{name}_from")) > args.epochs:
                    print(f"The {name} trains from epoch {start} on, so not within {args.epochs} epochs.", flush=True)
            train(run)
        print(f"Done: {args.epochs} epochs, {len(run.replay)} environment steps. The agent: {run.folder}/checkpoint.pt")
    except KeyboardInterrupt:
        print(f"\nStopped in epoch {run.epoch}. {run.saved()}")
        raise
    except (IrisError, OSError) as error:
        what = f"can't write {getattr(error, 'filename', None) or 'into the run folder'}: " * isinstance(error, OSError)
        raise IrisError(f"{what}{getattr(error, 'strerror', None) or error}. {run.saved()}") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C
    try:
        main(parse_args(sys.argv[1:]))
    except IrisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
