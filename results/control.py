"""The control: the laptop preset's actor-critic trained on the true game in place of the dream, with the same losses.

Where this learns and a run does not, the dream is at fault; where neither does, the policy step. It needs play without
end, 320 steps an update, so it says nothing of sample efficiency.

    python results/control.py --env-id BreakoutNoFrameskip-v4 --updates 1250       # seven minutes on one core
    python results/control.py --no-standardize                                     # as published: nothing learned by then
"""
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from iris_agent import ActorCritic, actor_critic_loss, imagine, lambda_returns
from iris_tokenizer import Tokenizer
from iris_train import PRESETS, choose_device, make_env, to_model


@dataclass
class Options:
    """Trains an actor-critic on the true game and prints, every 50 updates, how it does."""

    env_id: str = "BreakoutNoFrameskip-v4"  # A game
    updates: int = 1250  # Policy updates, each of `games` times `horizon` steps
    games: int = 32  # Games played side by side
    horizon: int = 10  # Steps of an update; half a dream's do, for the next update goes on from where this one stopped
    burn_in: int = 5  # Frames that warm up the LSTM before each
    standardize: bool = True  # Scale each pixel by its own mean and deviation
    seed: int = 0  # Seed of everything random


class TrueGames:
    """Several games at once, with the `step` of a dream: frames, signs of the rewards, ends. What ends begins anew."""

    def __init__(self, env_id: str, n: int, burn_in: int):
        self.envs = [make_env(env_id, noop_max=30, max_frames=10_000, life_loss_ends=True) for _ in range(n)]
        frame = to_model(torch.from_numpy(np.stack([env.reset(seed=i)[0] for i, env in enumerate(self.envs)])))
        self.frames = [frame] * (burn_in + 1)  # (N, 3, 64, 64) each, the latest last
        self.ages = torch.zeros(n, dtype=torch.int64)  # steps since an episode began
        self.totals, self.returns = np.zeros(n), []  # of games that go on; of whole games

    def before(self) -> tuple[Tensor, Tensor]:
        """Frames (N, burn_in, 3, 64, 64) before the latest, and which of them are of the same episode (N, burn_in)."""
        back = torch.arange(len(self.frames) - 1, 0, -1)
        return torch.stack(self.frames[:-1], dim=1), back <= self.ages[:, None]

    def step(self, actions: Tensor, next_frame: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        frames, rewards, ends = [], [], []
        for i, (env, action) in enumerate(zip(self.envs, actions.tolist(), strict=True)):
            frame, reward, terminated, truncated, info = env.step(action)
            self.totals[i] += reward
            if terminated or truncated:
                frame, _ = env.reset()
                if not info.get("life_lost"):
                    self.returns.append(self.totals[i])
                    self.totals[i] = 0
            frames.append(frame)
            rewards.append(float(np.sign(reward)))
            ends.append(terminated or truncated)
        self.frames = [*self.frames[1:], to_model(torch.from_numpy(np.stack(frames)))]
        self.ages = torch.where(torch.tensor(ends), 0, self.ages + 1)
        return self.frames[-1], torch.tensor(rewards), torch.tensor(ends)


def main(options: Options) -> None:
    args = replace(PRESETS["laptop"], device="cpu")
    _, bf16 = choose_device(args)
    torch.manual_seed(options.seed)
    n, games = options.games, TrueGames(options.env_id, options.games, options.burn_in)
    num_actions = int(games.envs[0].action_space.n)
    actor_critic = ActorCritic(num_actions, args.actor_critic)
    if options.standardize:
        seen = [games.step(torch.randint(num_actions, (n,)))[0] for _ in range(100)]
        tokenizer = Tokenizer(args.tokenizer)  # whose pixel statistics a run's policy takes
        tokenizer.fit_pixels(torch.cat(seen))
        actor_critic.mean.copy_(tokenizer.mean)
        actor_critic.std.copy_(tokenizer.std)
    optimizer = torch.optim.Adam(actor_critic.parameters(), lr=args.actor_critic_learning_rate)
    began, columns = time.perf_counter(), defaultdict(list)
    for update in range(1, options.updates + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            state = actor_critic.warm_up(*games.before())
            rollout = imagine(actor_critic, games, games.frames[-1], state, options.horizon)
            losses, metrics = actor_critic_loss(rollout, args.gamma, args.lambda_, args.entropy_weight, args.after_end)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(actor_critic.parameters(), args.max_grad_norm)
        optimizer.step()
        for key, value in metrics.items():
            columns[key].append(float(value))
        with torch.no_grad():
            returns = lambda_returns(rollout.rewards, rollout.values, rollout.ends, args.gamma, args.lambda_)
            errors = (returns - rollout.values)[:, :-1]
            columns["unforeseen"].append(float(errors.var() / returns[:, :-1].var().clamp(min=1e-8)))
        if update % 50 == 0:
            recent = {key: np.median(values[-50:]) for key, values in columns.items()}
            print(
                f"update {update}  steps {update * n * options.horizon}  games {len(games.returns)}  "
                f"return of the last 40 {np.mean(games.returns[-40:]):.2f}  "
                f"reward a step {np.mean(columns['imagined_reward'][-50:]):.4f}  "
                f"entropy {recent['entropy']:.3f}  returns not foreseen by the value {recent['unforeseen']:.0%}  "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Options))
