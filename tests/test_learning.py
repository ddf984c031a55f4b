"""The promise that everything else serves: trained in the dream alone, an agent plays the real game."""
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from iris_train import STEP, load_agent, play_test_episodes, to_model
from test_command_line import ROOT, environment

# Another clone to train in, and flags to train with: to see this test fail where learning is broken.
ROOT = os.environ.get("IRIS_ROOT", ROOT)
FLAGS = os.environ.get("IRIS_FLAGS", "").split()


def moving_error(frames, reconstructions, background):
    """Mean absolute error where it counts: at pixels that differ by over 0.1 from the background (3, 64, 64)."""
    moving = (frames - background).abs().amax(dim=1, keepdim=True).gt(0.1).expand_as(frames)
    return (frames - reconstructions).abs()[moving].mean().item()


@pytest.fixture(scope="module")
def catch(tmp_path_factory):
    """An agent trained on tests/catch.py, and 200 test episodes: frames (N, 7, 64, 64, 3), actions, rewards (N, 7)."""
    folder = tmp_path_factory.mktemp("catch") / "run"
    command = [sys.executable, "iris_train.py", "--preset", "catch", "--perceptual-loss", "pixel", "--seed", "1"]
    subprocess.run([*command, "--run-dir", str(folder), *FLAGS], cwd=ROOT, env=environment(), check=True, timeout=5000)
    agent, args = load_agent(folder)
    torch.manual_seed(0)
    args = replace(args, test_episodes=200, test_envs=50)
    games = play_test_episodes(agent, args, torch.device("cpu"), seed=1_000_000)  # no training game has such a seed
    return agent, *(np.stack([game["steps"][name] for game in games]) for name in STEP.names[:3])


@pytest.mark.slow
def test_catch_is_won_by_a_policy_that_was_trained_in_the_dream_alone(catch):
    _, _, _, rewards = catch
    assert rewards.sum(axis=1).mean() >= 0.95  # random play earns -0.75


@pytest.mark.slow
def test_catch_ball_and_paddle_survive_the_tokens(catch):
    agent, frames, _, _ = catch
    frames = to_model(torch.from_numpy(frames).flatten(0, 1))
    error = moving_error(frames, agent.tokenizer.reconstruct(frames), background=frames.median(dim=0).values)
    assert error < 0.03  # 0.54 where the ball is dropped


@pytest.mark.slow
@torch.no_grad()
def test_catch_next_tokens_and_rewards_are_foreseen(catch):
    agent, frames, actions, rewards = catch
    model, (n, length) = agent.world_model, actions.shape
    blocks = min(length, model.config.max_blocks)
    tokens = agent.tokenizer.encode(to_model(torch.from_numpy(frames).flatten(0, 1))).unflatten(0, (n, length))
    stream = torch.cat([tokens, torch.from_numpy(actions)[..., None]], dim=2)[:, -blocks:]  # (N, blocks, K + 1)
    output = model(stream.flatten(1))
    k = model.config.tokens_per_frame
    # The first frame of the stream can't be foreseen; the position before each later token is that of the prediction.
    guesses = output.observation_logits.argmax(dim=2)[:, k - 1 : -1].unflatten(1, (blocks - 1, k))
    accuracy = (guesses == tokens[:, -blocks:][:, 1:]).float().mean().item()
    foreseen = output.reward_logits.argmax(dim=2)[:, -1].numpy() - 1  # what the last action of the episode brings
    agreement = (foreseen == rewards[:, -1]).mean()
    print(f"next-token accuracy {accuracy:.3f}, rewards as in the game {agreement:.3f}")
    assert accuracy >= 0.8 and agreement >= 0.97
