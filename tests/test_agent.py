"""Chapter 3's promises."""
import math

import pytest
import torch

import iris_agent
import reference
from iris_agent import (
    ActorCritic, ActorCriticConfig, Agent, FadingCatch, Rollout, actor_critic_loss, imagine, lambda_returns,
    load_official_checkpoint, official_agent,
)  # fmt: skip
from iris_tokenizer import Tokenizer, TokenizerConfig
from iris_world_model import Dream, WorldModel, WorldModelConfig

SMALL = ActorCriticConfig(channels=(4, 4, 8, 8), lstm_width=12)


def small(seed=0, actions=3):
    torch.manual_seed(seed)
    return ActorCritic(actions, SMALL)


def test_paper_size_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in ActorCritic(4).parameters()) == 3_217_957


def test_frames_are_scaled_to_minus_1_and_1_unless_pixels_have_their_own_statistics():
    model, frames, seen = small(), torch.rand(50, 3, 64, 64), []
    model.convolutions.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().numpy()))
    model.features(frames)
    model.mean.copy_(mean := torch.rand(3, 64, 64))
    model.std.copy_(std := torch.rand(3, 64, 64) + 0.1)
    model.features(frames)
    pixels = frames.double().numpy()
    assert abs(seen[0] - (2 * pixels - 1)).max() < 1e-6
    assert abs(seen[1] - (pixels - mean.numpy()) / std.numpy()).max() < 1e-4


def test_patches_of_pixels_become_channels_before_the_first_convolution():
    torch.manual_seed(0)
    model = ActorCritic(3, ActorCriticConfig(channels=(8, 8, 8), lstm_width=16, patch=2))
    frames = torch.rand(2, 3, 64, 64)
    (logits, values, _), (weight, bias) = model(frames, model.initial_state(2)), model.convolutions.conv1.parameters()
    assert logits.shape == (2, 3) and values.shape == (2,) and model.lstm.input_size == 8 * 4 * 4
    x = 2 * frames - 1
    folded = torch.stack([x[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)], dim=1)
    h = torch.nn.functional.conv2d(folded, weight, bias, padding=1)
    h = torch.nn.functional.max_pool2d(h, 2).relu()
    for layer in (model.convolutions.conv2, model.convolutions.conv3):
        h = torch.nn.functional.max_pool2d(layer(h), 2).relu()
    assert torch.allclose(model.features(frames), h.flatten(1), atol=1e-5)


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
                expected = sum((1 - lam) * lam ** (k - 1) * n_step(k) for k in range(1, last))
                expected += lam ** (last - 1) * n_step(last)
            assert float(got[n, t]) == pytest.approx(expected, abs=1e-9)


def docstring_table():
    """Rows of the example in lambda_returns' docstring: name -> its five entries."""
    rows, lines = ("step", "reward", "value", "end", "return", "counted"), lambda_returns.__doc__.splitlines()
    return {name: entries[:5] for name, *entries in map(str.split, filter(str.strip, lines)) if name in rows}


def test_the_lambda_returns_in_the_docstrings_table_are_right():
    table = docstring_table()
    assert table["step"] == ["0", "1", "2", "3", "4"] and "yes" in table["end"]
    rewards, values, returns = (torch.tensor([[float(x) for x in table[row]]]) for row in ("reward", "value", "return"))
    ends = torch.tensor([[x == "yes" for x in table["end"]]])
    assert torch.equal(lambda_returns(rewards, values, ends, gamma=0.5, lambda_=0.5), returns)


@pytest.mark.parametrize("after_end", [True, False])
def test_steps_in_the_docstrings_table_are_counted_as_it_says(after_end):
    table, values = docstring_table(), torch.zeros(1, 5, requires_grad=True)
    ends = torch.tensor([[x == "yes" for x in table["end"]]])
    rollout = Rollout(torch.zeros(1, 5, 2), values, torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5), ends, [])
    actor_critic_loss(rollout, 0.5, 0.5, entropy_weight=0.0, after_end=after_end)[0]["value"].backward()
    counted = [x == "yes" and (i != 3 or after_end) for i, x in enumerate(table["counted"])]
    assert (values.grad[0] != 0).tolist() == counted and table["counted"][2:] == ["yes", "yes", "no"]


@pytest.mark.parametrize("after_end", [True, False])
def test_losses_equal_loops_over_all_steps_but_the_last_and_those_after_an_end_only_if_asked(after_end):
    torch.manual_seed(0)
    n, length, actions = 2, 4, 3
    rollout = Rollout(
        torch.randn(n, length, actions), torch.randn(n, length), torch.randint(actions, (n, length)),
        torch.randn(n, length).sign(), torch.tensor([[False, True, False, False], [False] * 4]), [],
    )  # fmt: skip
    losses, metrics = actor_critic_loss(rollout, gamma=0.9, lambda_=0.8, entropy_weight=0.1, after_end=after_end)
    returns = lambda_returns(rollout.rewards, rollout.values, rollout.ends, 0.9, 0.8)
    policy, value, entropy = [], [], []
    for i in range(n):
        for t in range(length - 1):
            if not after_end and (i, t) == (0, 2):  # the first of the two ends at step 1
                continue
            p = [math.exp(x) for x in rollout.logits[i, t].tolist()]
            p = [x / sum(p) for x in p]
            advantage = float(returns[i, t] - rollout.values[i, t])
            policy.append(-math.log(p[rollout.actions[i, t]]) * advantage)
            value.append(advantage**2)
            entropy.append(-sum(x * math.log(x) for x in p))
    count = n * (length - 1) - (not after_end)
    assert len(policy) == count
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx({
        "policy": sum(policy) / count, "value": sum(value) / count, "entropy_bonus": -0.1 * sum(entropy) / count,
    }, rel=1e-5)  # fmt: skip
    steps = [(i, t) for i in range(n) for t in range(length - 1) if after_end or i == 1 or t < 2]

    def over(x, steps):
        return sum(float(x[i, t]) for i, t in steps) / len(steps)

    assert {name: float(metric) for name, metric in metrics.items()} == pytest.approx({
        "entropy": sum(entropy) / count, "mean_value": over(rollout.values, steps),
        "mean_lambda_return": over(returns, steps), "imagined_reward": over(rollout.rewards, steps),
        "imagined_end": over(rollout.ends, steps),
    }, rel=1e-5)  # fmt: skip
    assert not any(metric.requires_grad for metric in metrics.values())


def test_a_rollout_of_one_step_is_an_error():
    zeros = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="2 steps or more"):
        actor_critic_loss(Rollout(torch.zeros(2, 1, 3), zeros, zeros.long(), zeros, zeros.bool(), []), 0.9, 0.9, 0.1)


def test_policy_gradient_raises_an_action_that_did_better_than_expected():
    logits, zeros = torch.zeros(1, 2, 3, requires_grad=True), torch.zeros(1, 2)
    rollout = Rollout(logits, zeros, torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]), zeros.bool(), [])
    losses, _ = actor_critic_loss(rollout, 0.9, 0.9, 0.0)
    losses["policy"].backward()
    assert logits.grad[0, 0, 1] < 0 < logits.grad[0, 0, 0] and logits.grad[0, 1].abs().sum() == 0


def test_the_policys_loss_has_no_gradient_for_the_values_and_the_values_loss_none_through_the_returns():
    values, zeros = torch.randn(2, 5, requires_grad=True), torch.zeros(2, 5)
    rollout = Rollout(torch.zeros(2, 5, 3), values, zeros.long(), torch.ones(2, 5), zeros.bool(), [])
    losses, _ = actor_critic_loss(rollout, 0.9, 0.9, 0.0)
    assert not losses["policy"].requires_grad  # the logits here are constants, and the values are one to it
    (gradient,) = torch.autograd.grad(losses["value"], values)
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
        assert torch.allclose(rollout.logits[:, t], logits, atol=1e-6)
        assert torch.allclose(rollout.values[:, t], values, atol=1e-6)
        assert torch.equal(rollout.frames[t], script.shown[t])
    (gradient,) = torch.autograd.grad(rollout.values[:, -1].sum(), model.lstm.weight_hh)
    assert gradient.abs().sum() > 0  # through the memory of earlier steps


def test_imagined_actions_are_drawn_from_the_policy():
    torch.manual_seed(0)
    logits, script = torch.tensor([0.0, 1.0, -1.0]), Script(1, 2)
    imagine(lambda frames, state: (logits.expand(20_000, 3), torch.zeros(20_000), state), script, torch.zeros(20_000), None, horizon=2)
    for actions in script.actions:
        assert torch.allclose(actions.bincount(minlength=3) / 20_000, logits.softmax(0), atol=0.015)
    assert not torch.equal(*script.actions)


def test_the_docstrings_training_step_works_with_the_two_chapters_before():
    lines = iris_agent.__doc__.partition("A training step")[2].splitlines()
    code = "\n".join(line.strip() for line in lines if line.startswith("    "))
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(7, code_dim=4, channels=(4,) * 5, blocks=(0,) * 5, attention_at=()))
    dream = Dream(tokenizer, WorldModel(7, 3, WorldModelConfig(layers=1, heads=1, width=8)).eval())
    segments, mask = torch.rand(2, 21, 3, 64, 64), torch.ones(2, 20, dtype=torch.bool)
    names = {"N": 2, "tokenizer": tokenizer, "dream": dream, "segments": segments, "mask": mask}
    names["actor_critic"] = small()
    exec(code, vars(iris_agent) | names, names)
    assert names["rollout"].logits.shape == (2, 20, 3) and names["past"].shape == (2, 20, 3, 64, 64)
    sum(names["losses"].values()).backward()
    assert all(p.grad is not None for p in names["actor_critic"].parameters())
    assert all(p.grad is None for p in [*tokenizer.parameters(), *dream.world_model.parameters()])


def test_act_shows_the_policy_reconstructions_and_obeys_the_temperature():
    class Negative(torch.nn.Module):
        def reconstruct(self, frames):
            return 1 - frames

    agent = Agent(Negative(), torch.nn.Module(), small())
    with torch.no_grad():
        agent.actor_critic.actor_linear.weight.mul_(20)
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
    shapes = reference.official_shapes(4)
    weights = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items(), start=1)}
    agent = official_agent(weights)
    found = torch.cat([p.detach().flatten() for p in agent.parameters()]).long().bincount()
    assert found.tolist() == [0] + [math.prod(shape) for shape in shapes.values()]


@pytest.mark.parametrize(
    ("name", "shape", "named"),  # in the error stands our name of the weight
    [
        ("tokenizer.encoder.down.2.attn.1.k.bias", None, "down_2_attn_1.k.bias"),
        ("world_model.transformer.blocks.9.attn.value.weight", None, "layers.9.attn.value.weight"),
        ("world_model.transformer.blocks.9.attn.query.weight", (256, 128), "size"),
        ("world_model.embedder.embedding_tables.0.weight", None, "embedding_tables.0.weight"),
        ("world_model.embedder.embedding_tables.0.weight", (6, 256), "embedding.weight has shape (518, 256)"),
        ("world_model.pos_emb.weight", (340, 128), "position_embedding.weight has shape (340, 128), not (340, 256)"),
        ("actor_critic.actor_linear.weight", None, "actor_linear.weight"),
        ("actor_critic.actor_linear.weight", (), "0-d"),
        ("actor_critic.lstm.weight_hh", (2048, 256), "lstm.weight_hh has shape (2048, 256), not (2048, 512)"),
        ("tokenizer.decoder.up.0.block.2.conv2.weight", (64, 64, 1, 1), "up_0_block_2.conv2.weight has shape"),
    ],
)
def test_missing_or_misshapen_weight_is_named_in_one_line(tmp_path, name, shape, named):
    weights = reference.official_state_dict()
    assert name in weights
    if shape is None:
        del weights[name]
    else:
        weights[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match="no published IRIS checkpoint") as error:
        load_official_checkpoint(saved(tmp_path, weights))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path):
    path = saved(tmp_path, reference.official_state_dict())
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:1_000_000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pt")
    for name in ("cut", "text", "empty", "list", "other", "numbers"):
        with pytest.raises(ValueError, match="no file of weights|no published IRIS checkpoint") as error:
            load_official_checkpoint(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value), name
    for missing in (tmp_path / "none.pt", str(tmp_path)):
        with pytest.raises(OSError) as error:
            load_official_checkpoint(missing)
        assert str(missing) in str(error.value) and "\n" not in str(error.value)


# --- the lesson ------------------------------------------------------------------------------------------------------


def test_the_lessons_ball_fades_from_row_3_and_pays_where_it_arrives():
    torch.manual_seed(0)
    game = FadingCatch(row=torch.tensor([0, 1, 2, 3, 5]))
    column = game.column
    assert game.mask.tolist() == [[False] * 3, [False, False, True], [False, True, True], [True] * 3, [True] * 3]
    # Rows of the visible balls in the three frames before, -1 where there is none
    ball = game.past[:, :, 0, ::8, ::16]  # (5, 3, 8, 4)
    rows = torch.where(ball.sum(dim=(2, 3)) > 0, ball.sum(dim=3).argmax(dim=2), -1)
    assert rows.masked_fill(~game.mask, -1).tolist() == [[-1, -1, -1], [-1, -1, 0], [-1, 0, 1], [0, 1, 2], [2, -1, -1]]
    assert (ball.sum(dim=2).argmax(dim=2)[rows >= 0] == column[:, None].expand(5, 3)[rows >= 0]).all()
    paddle = game.past[:, 2, 1, 56, ::16].argmax(dim=1)
    for step in range(1, 3):
        actions = torch.randint(3, (5,))
        paddle = (paddle + actions - 1).clamp(0, 3)
        frames, rewards, ends = game.step(actions)
        assert torch.equal(frames[:, 1, 56, ::16].argmax(dim=1), paddle)
        assert ends.tolist() == [False, False, False, False, step == 2]
    assert rewards.tolist() == [0, 0, 0, 0, 1.0 if paddle[4] == column[4] else -1.0]


def test_the_lesson_runs(capsys, monkeypatch):
    monkeypatch.setattr(iris_agent, "FadingCatch", lambda row: FadingCatch(row[:8]))  # of the 1000 games at its end, 8
    iris_agent.lesson(updates=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "with warm_up" in lines[0] and "without warm_up" in lines[1]
