"""Chapter 3's promises."""
import math

import pytest
import torch

import reference
from iris_agent import (
    ActorCritic, ActorCriticConfig, Agent, Rollout, actor_critic_loss, imagine, lambda_returns, load_official_checkpoint
)
from iris_tokenizer import IrisError

SMALL = ActorCriticConfig(channels=(4, 4, 8, 8), lstm_width=12)


def small(seed=0, actions=3):
    torch.manual_seed(seed)
    return ActorCritic(actions, SMALL)


def test_paper_size_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in ActorCritic(4).parameters()) == 3_217_957


def test_a_standardising_actor_critic_looks_at_each_pixel_in_units_of_its_own_variation():
    agent, frames = small(), torch.rand(50, 3, 64, 64)
    frames[:, :, 0, 0] = 0.25  # never changes, and stays finite
    looked_at = []
    agent.convolutions.register_forward_pre_hook(lambda module, inputs: looked_at.append(inputs[0]))
    agent.features(frames)
    assert torch.equal(looked_at[0], 2 * frames - 1)  # as published, until the statistics are there
    agent.standardize.fit(frames)
    agent.features(frames)
    pixels = 2 * frames.double().numpy() - 1
    expected = (pixels - pixels.mean(axis=0)) / (pixels.std(axis=0) + 0.05)
    assert abs(looked_at[1].numpy() - expected).max() < 1e-4


def test_lambda_returns_equal_the_direct_sum_over_n_step_returns():
    """The definition: a weighted mean of all n-step returns, cut where an episode ends (Sutton and Barto, 12.1)."""
    torch.manual_seed(0)
    length, gamma, lam = 7, 0.9, 0.8
    rewards, values = torch.randn(3, length, dtype=torch.float64), torch.randn(3, length, dtype=torch.float64)
    ends = torch.zeros(3, length, dtype=torch.bool)
    ends[1, 3] = ends[2, 0] = ends[2, 4] = ends[2, 6] = True
    got = lambda_returns(rewards, values, ends, gamma, lam)
    for n in range(3):
        for t in range(length):

            def n_step(steps):
                total, alive = 0.0, 1.0
                for k in range(steps):
                    total += alive * float(rewards[n, t + k])
                    alive *= gamma * (not ends[n, t + k])
                return total + alive * float(values[n, t + steps])

            last = length - 1 - t  # steps until the last value, which stands for the rest
            if last == 0:
                expected = float(values[n, t])
            else:
                expected = sum((1 - lam) * lam ** (k - 1) * n_step(k) for k in range(1, last)) + lam ** (last - 1) * n_step(last)
            assert float(got[n, t]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("behind_ends", [True, False])
def test_losses_equal_loops_over_all_steps_but_the_last_and_those_behind_an_end_only_if_asked(behind_ends):
    torch.manual_seed(0)
    n, length, actions = 2, 4, 3
    rollout = Rollout(
        torch.randn(n, length, actions), torch.randn(n, length), torch.randint(actions, (n, length)),
        torch.randn(n, length).sign(), torch.tensor([[False, True, False, False], [False] * 4]), [],
    )
    losses, metrics = actor_critic_loss(rollout, 0.9, 0.8, entropy_weight=0.1, behind_ends=behind_ends)
    returns = lambda_returns(rollout.rewards, rollout.values, rollout.ends, 0.9, 0.8)
    policy, value, entropy = [], [], []
    for i in range(n):
        for t in range(length - 1):
            if not behind_ends and (i, t) == (0, 2):  # the first of the two ends at step 1
                continue
            p = [math.exp(x) for x in rollout.logits[i, t].tolist()]
            p = [x / sum(p) for x in p]
            advantage = float(returns[i, t] - rollout.values[i, t])
            policy.append(-math.log(p[rollout.actions[i, t]]) * advantage)
            value.append(advantage**2)
            entropy.append(-sum(x * math.log(x) for x in p))
    count = n * (length - 1) - (not behind_ends)
    assert len(policy) == count
    assert float(losses["actions"]) == pytest.approx(sum(policy) / count, rel=1e-5)
    assert float(losses["values"]) == pytest.approx(sum(value) / count, rel=1e-5)
    assert float(losses["entropy"]) == pytest.approx(-0.1 * sum(entropy) / count, rel=1e-5)
    assert float(metrics["policy_entropy"]) == pytest.approx(sum(entropy) / count, rel=1e-5)


def test_policy_gradient_raises_an_action_that_did_better_than_expected():
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    rollout = Rollout(
        logits, torch.zeros(1, 2), torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, dtype=torch.bool), []
    )
    losses, _ = actor_critic_loss(rollout, 0.9, 0.9, 0.0)
    losses["actions"].backward()
    assert logits.grad[0, 0, 1] < 0 < logits.grad[0, 0, 0] and logits.grad[0, 1].abs().sum() == 0


def test_returns_carry_no_gradient_into_the_critic_but_values_do():
    values = torch.randn(2, 5, requires_grad=True)
    rollout = Rollout(torch.zeros(2, 5, 3), values, torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5), torch.zeros(2, 5), [])
    losses, _ = actor_critic_loss(rollout, 0.9, 0.9, 0.0)
    (gradient,) = torch.autograd.grad(losses["values"], values)
    returns = lambda_returns(rollout.rewards, values, rollout.ends, 0.9, 0.9).detach()
    expected = 2 * (values - returns) / 8
    expected[:, -1] = 0  # the last value is only a target
    assert torch.allclose(gradient, expected.detach(), atol=1e-6)


def test_warm_up_is_the_step_by_step_memory_and_padding_leaves_it_alone():
    model = small()
    frames, mask = torch.rand(3, 5, 3, 64, 64), torch.ones(3, 5, dtype=torch.bool)
    mask[1, :3] = mask[2, :] = False
    hidden, cell = model.warm_up(frames, mask)
    for i, first in ((0, 0), (1, 3), (2, 5)):
        state = model.initial_state(1)
        for t in range(first, 5):
            with torch.no_grad():
                _, _, state = model(frames[i : i + 1, t], state)
        assert torch.allclose(hidden[i], state[0][0], atol=1e-6) and torch.allclose(cell[i], state[1][0], atol=1e-6)
    assert hidden[2].abs().max() == 0 and not hidden.requires_grad
    other = frames.clone()
    other[1, :3], other[2] = 0.5, 0.1
    assert torch.equal(model.warm_up(other, mask)[0], hidden)


class Script:
    """A dream that shows frames made beforehand and notes what it is asked."""

    def __init__(self, n, length):
        torch.manual_seed(5)
        self.shown, self.asked, self.actions = torch.rand(length + 1, n, 3, 64, 64), [], []

    def step(self, actions, next_frame=True):
        self.asked.append(next_frame)
        self.actions.append(actions)
        step = len(self.actions)
        rewards, ends = torch.full((len(actions),), float(step)), torch.full((len(actions),), step == 2)
        return (self.shown[step] if next_frame else None), rewards, ends


def test_imagination_lines_up_frames_actions_rewards_and_ends_and_asks_for_no_frame_after_the_last():
    model, script = small(), Script(4, 6)
    rollout = imagine(model, script, script.shown[0], model.initial_state(4), horizon=6)
    assert script.asked == [True] * 5 + [False]
    assert torch.equal(rollout.actions, torch.stack(script.actions, dim=1))
    assert rollout.rewards.tolist() == [[1, 2, 3, 4, 5, 6]] * 4
    assert rollout.ends.tolist() == [[False, True, False, False, False, False]] * 4
    state = model.initial_state(4)
    for t in range(6):
        logits, values, state = model(script.shown[t], state)
        assert torch.allclose(rollout.logits[:, t], logits, atol=1e-6) and torch.allclose(rollout.values[:, t], values, atol=1e-6)
        assert torch.equal(rollout.frames[t], script.shown[t])
    (gradient,) = torch.autograd.grad(rollout.values[:, -1].sum(), model.lstm.weight_hh)
    assert gradient.abs().sum() > 0  # through the memory of earlier steps


def test_act_shows_the_policy_reconstructions_and_obeys_the_temperature():
    class Tokenizer(torch.nn.Module):
        def reconstruct(self, frames):
            return 1 - frames

    agent = Agent(Tokenizer(), torch.nn.Module(), small())
    with torch.no_grad():
        agent.actor_critic.actor.weight.mul_(20)
    frames, state = torch.rand(1, 3, 64, 64).expand(1000, -1, -1, -1), agent.actor_critic.initial_state(1000)
    logits, _, expected_state = agent.actor_critic(1 - frames, state)
    for temperature in (0.5, 1.0, 3.0):
        actions, new_state = agent.act(frames, state, temperature)
        shares = actions.bincount(minlength=3) / 1000
        assert torch.allclose(shares, (logits[0] / temperature).softmax(0), atol=0.06)
    assert torch.allclose(new_state[0], expected_state[0])
    assert (agent.act(frames, state, 0)[0] == logits[0].argmax()).all()


# --- published checkpoints -------------------------------------------------------------------------------------------


def saved(tmp_path, weights):
    torch.save(weights, tmp_path / "Game.pt")
    return tmp_path / "Game.pt"


@pytest.mark.parametrize("actions", [4, 18])
def test_published_weights_compute_what_the_published_code_computes(tmp_path, actions):
    weights = reference.official_state_dict(actions, seed=actions)
    agent = load_official_checkpoint(saved(tmp_path, weights))
    torch.manual_seed(0)
    frames = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(agent.tokenizer.encode(frames), reference.encode(weights, frames))
        tokens = torch.randint(512, (2, 16))
        assert torch.allclose(agent.tokenizer.decode(tokens), reference.decode(weights, tokens), atol=1e-4)

        stream = torch.cat([torch.randint(512, (2, 3, 16)), torch.randint(actions, (2, 3, 1))], dim=2).flatten(1)
        ours, theirs = agent.world_model(stream), reference.world_model(weights, stream)
        for name, logits in (
            ("observations", ours.observation_logits), ("rewards", ours.reward_logits), ("ends", ours.end_logits)
        ):
            expected = torch.stack([here[name] for here in theirs if name in here], dim=1)
            assert logits.shape == expected.shape and torch.allclose(logits, expected, atol=1e-4)

        state = reference_state = agent.actor_critic.initial_state(2)
        for _ in range(3):
            logits, values, state = agent.actor_critic(frames, state)
            expected, expected_values, reference_state = reference.actor_critic(weights, frames, reference_state)
            assert torch.allclose(logits, expected, atol=1e-5) and torch.allclose(values, expected_values, atol=1e-5)


def test_published_checkpoint_needs_none_of_its_buffers_and_minds_no_others(tmp_path):
    weights = reference.official_state_dict()
    full = load_official_checkpoint(saved(tmp_path, weights))
    bare = {name: w for name, w in weights.items() if name in reference.official_shapes(4)}
    bare["world_model.head_rewards.something_new"] = torch.zeros(3)
    again = load_official_checkpoint(saved(tmp_path, bare))
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), again.parameters(), strict=True))


def test_each_published_weight_is_used_exactly_once():
    from iris_agent import agent_from_official

    shapes = reference.official_shapes(4)
    weights = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items(), start=1)}
    agent = agent_from_official(weights, "test")
    found = torch.cat([p.detach().flatten() for p in agent.parameters()]).long().bincount()
    assert found.tolist() == [0] + [math.prod(shape) for shape in shapes.values()]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tokenizer.encoder.down.2.attn.1.k.bias", None),
        ("world_model.transformer.blocks.9.attn.value.weight", None),
        ("world_model.embedder.embedding_tables.0.weight", (6, 256)),
        ("world_model.pos_emb.weight", (340, 128)),
        ("actor_critic.lstm.weight_hh", (2048, 256)),
        ("tokenizer.decoder.up.0.block.2.conv2.weight", (64, 64, 1, 1)),
    ],
)
def test_missing_or_misshapen_weight_is_named(tmp_path, name, shape):
    weights = reference.official_state_dict()
    if shape is None:
        del weights[name]
    else:
        weights[name] = torch.zeros(shape)
    with pytest.raises(IrisError, match=name.replace(".", r"\.")):
        load_official_checkpoint(saved(tmp_path, weights))


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = saved(tmp_path, reference.official_state_dict())
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:1_000_000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    for name, message in (("cut", "cut short"), ("text", "cut short"), ("list", "holds a list"), ("other", "no published"), ("none", "no checkpoint at")):
        with pytest.raises(IrisError, match=message) as error:
            load_official_checkpoint(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)
