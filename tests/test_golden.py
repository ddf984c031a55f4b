"""The models compute what the published implementation computed: golden/published_outputs.pt, kept from a run of it.

Paper sizes, float32, CPU, dropout and perceptual network off. golden/published_weights.py makes weights and frames.
"""
from pathlib import Path

import pytest
import torch

from golden import published_weights
from iris_agent import Rollout, actor_critic_loss, official_agent

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="module")
def published():
    return torch.load(GOLDEN / "published_outputs.pt", weights_only=True)


@pytest.fixture
def agent():
    """In evaluation mode, as the published models were when these outputs were made."""
    return official_agent(published_weights.state_dict(GOLDEN / "official_checkpoint_keys.txt"))


def train(model, optimizer, losses):
    """One published optimiser step. Returns the losses before it."""
    optimizer.zero_grad()
    sum(losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def test_frames_become_the_published_tokens(agent, published):
    assert torch.equal(agent.tokenizer.encode(published_weights.frames(4, seed=0)), published["tokens"])


def test_tokens_become_the_published_reconstructions(agent, published):
    with torch.no_grad():
        decoded = agent.tokenizer.decode(published["tokens"][:2])
    torch.testing.assert_close(decoded, published["reconstructions"], rtol=1e-4, atol=1e-5)


def test_the_three_heads_give_the_published_logits_at_their_positions(agent, published):
    stream = published["stream"]
    tokens = torch.cat([stream["obs_tokens"], stream["actions"][..., None]], dim=2).flatten(1)
    with torch.no_grad():
        output = agent.world_model(tokens)
    ours = output.observation_logits[:, ::16], output.reward_logits, output.end_logits
    theirs = published["observation_logits"], published["reward_logits"], published["end_logits"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_policy_and_values_are_the_published_ones_also_after_a_step_of_memory(agent, published):
    state, steps = agent.actor_critic.initial_state(2), []
    with torch.no_grad():
        decoded = agent.tokenizer.decode(published["tokens"])
        for frames in (decoded[:2], decoded[2:]):
            logits, values, state = agent.actor_critic(frames, state)
            steps.append((logits, values))
    ours = [torch.stack(column, dim=1) for column in zip(*steps)]
    torch.testing.assert_close(ours, [published["policy_logits"], published["values"]], rtol=1e-4, atol=1e-6)


def test_three_steps_of_the_world_models_training_have_the_published_losses(agent, published):
    model = agent.world_model
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.01), lr=1e-4)
    for expected in published["world_model_training"]:
        losses = train(model, optimizer, model.loss(**published["stream"]))
        ours = {"loss_obs": losses["observations"], "loss_rewards": losses["rewards"], "loss_ends": losses["ends"]}
        assert ours == pytest.approx(expected, rel=1e-4)


def test_tokenizer_losses_and_the_gradient_norm_of_each_part_are_the_published_ones(agent, published):
    losses = agent.tokenizer.loss(published_weights.frames(4, seed=0), lpips=lambda x, y: torch.zeros(len(x)))
    sum(losses.values()).backward()
    expected = published["tokenizer_losses"]
    assert set(losses) == {"codebook", "commitment", "reconstruction", "perceptual"}
    assert losses["reconstruction"].item() == pytest.approx(expected["reconstruction_loss"], rel=1e-4)
    assert losses["perceptual"].item() == expected["perceptual_loss"] == 0
    assert (losses["codebook"] + losses["commitment"]).item() == pytest.approx(expected["commitment_loss"], rel=1e-4)
    parts = {
        "encoder": "encoder", "pre_quantization": "pre_quant_conv", "codebook": "embedding",
        "post_quantization": "post_quant_conv", "decoder": "decoder",
    }  # fmt: skip
    for ours, theirs in parts.items():
        gradient = torch.cat([p.grad.flatten() for p in getattr(agent.tokenizer, ours).parameters()])
        assert gradient.norm().item() == pytest.approx(published["tokenizer_gradient_norms"][theirs], rel=1e-4), ours


def test_three_steps_of_the_actor_critics_training_have_the_published_losses(agent, published):
    model, stream = agent.actor_critic, published["stream"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    ends = torch.zeros(2, 6, dtype=torch.bool)
    ends[0, 2] = True
    for update, expected in enumerate(published["actor_critic_training"]):
        frames = [published_weights.frames(2, seed=100 * update + step + 1) for step in range(6)]
        state, steps = model.initial_state(2), []
        for seen in frames:
            logits, values, state = model(seen, state)
            steps.append((logits, values))
        logits, values = (torch.stack(column, dim=1) for column in zip(*steps))
        rollout = Rollout(logits, values, stream["actions"][:, :6], stream["rewards"][:, :6], ends, frames)
        losses = train(model, optimizer, actor_critic_loss(rollout, 0.995, 0.95, entropy_weight=0.001)[0])
        ours = {
            "loss_actions": losses["policy"], "loss_values": losses["value"], "loss_entropy": losses["entropy_bonus"]
        }  # fmt: skip
        assert ours == pytest.approx(expected, rel=1e-4)
