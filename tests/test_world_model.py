"""Chapter 2's promises."""
import math

import pytest
import torch

import reference
from iris_tokenizer import IrisError, Tokenizer, TokenizerConfig
from iris_world_model import Dream, WorldModel, WorldModelConfig, sample

V, A, K = 11, 3, 16
SMALL = WorldModelConfig(max_blocks=4, layers=2, heads=2, width=16, dropout=0.0)


def small(seed=0, config=SMALL):
    torch.manual_seed(seed)
    model = WorldModel(V, A, config)
    for parameter in model.parameters():  # the initial 0.02 makes all logits alike
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def stream(n, blocks, seed=0):
    torch.manual_seed(seed)
    return torch.cat([torch.randint(V, (n, blocks, K)), torch.randint(A, (n, blocks, 1))], dim=2).flatten(1)


def test_paper_size_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in WorldModel(512, 4, WorldModelConfig()).parameters()) == 8_447_493


def test_heads_predict_at_the_right_positions_only():
    """Perturbing one token changes exactly those predictions that stand at its position or behind it."""
    model, tokens = small(), stream(1, 3)
    observing = [p for p in range(51) if p % 17 != 15]
    output = model(tokens)
    assert output.observation_logits.shape == (1, 48, V)
    assert output.reward_logits.shape == (1, 3, 3) and output.end_logits.shape == (1, 3, 2)
    for changed in (0, 14, 15, 16, 17, 33, 50):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % A
        after = model(other)
        for name, positions in (("observation_logits", observing), ("reward_logits", [16, 33, 50]), ("end_logits", [16, 33, 50])):
            differs = (getattr(after, name) != getattr(output, name)).any(dim=-1)[0]
            assert differs.tolist() == [p >= changed for p in positions], (name, changed)


@pytest.mark.parametrize("lengths", [[1] * 68, [17] * 4, [16, 1, 16, 1, 34], [5, 40, 2, 21], [15, 2, 15, 2, 15, 2, 15, 2]])
def test_cache_gives_the_logits_of_the_full_forward_pass_at_every_position(lengths):
    model, tokens = small(), stream(2, 4)
    full, cache, parts = model(tokens), model.empty_cache(2), []
    for length in lengths:
        parts.append(model(tokens[:, cache.size : cache.size + length], cache))
    assert cache.size == 68
    for name in ("observation_logits", "reward_logits", "end_logits"):
        pieces = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.allclose(pieces, getattr(full, name), atol=1e-5)


def test_a_stream_that_is_too_long_is_an_error_with_both_numbers():
    model, cache = small(), small().empty_cache(1)
    with pytest.raises(ValueError, match="69 .* 68"):
        model(torch.zeros(1, 69, dtype=torch.int64))
    model(torch.zeros(1, 68, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="69"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache)


def test_loss_equals_one_written_with_loops_over_what_the_published_code_predicts():
    weights = reference.official_state_dict(num_actions=3)
    from iris_agent import agent_from_official

    model = agent_from_official(weights, "test").world_model
    torch.manual_seed(0)
    obs, actions = torch.randint(512, (2, 3, 16)), torch.randint(3, (2, 3))
    rewards, ends = torch.tensor([[0.0, 7.0, -0.5], [1.0, -3.0, 9.0]]), torch.tensor([[0, 0, 1], [0, 1, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    with torch.no_grad():
        losses = model.loss(obs, actions, rewards, ends, mask)
        predicted = reference.world_model(weights, torch.cat([obs, actions[..., None]], dim=2).flatten(1))

    def surprise(logits, label):
        return float(torch.logsumexp(logits, 0) - logits[label])

    sums = {"observations": [], "rewards": [], "ends": []}
    for n in range(2):
        for step in range(3):
            if not mask[n, step]:
                continue
            for k in range(16):
                position = 17 * step + k
                if position > 0:  # predicted by the token before, for the first of a frame by the action before
                    sums["observations"].append(surprise(predicted[position - 1]["observations"][n], obs[n, step, k]))
            here = predicted[17 * step + 16]
            sign = (rewards[n, step] > 0).int() - (rewards[n, step] < 0).int()
            sums["rewards"].append(surprise(here["rewards"][n], sign + 1))
            sums["ends"].append(surprise(here["ends"][n], ends[n, step]))
    assert len(sums["observations"]) == 5 * 16 - 2
    for name, values in sums.items():
        assert float(losses[name]) == pytest.approx(math.fsum(values) / len(values), rel=1e-4)


def test_what_stands_in_padding_changes_neither_loss_nor_gradient():
    gradients = []
    for filler in (0, 2):
        model = small().train()
        obs, actions = stream(2, 3).unflatten(1, (3, 17)).split([16, 1], dim=2)
        obs, actions = obs.clone(), actions[..., 0].clone()
        rewards, ends = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
        mask = torch.tensor([[True, True, True], [True, False, False]])
        obs[1, 1:], actions[1, 1:], rewards[1, 1:], ends[1, 1:] = filler, filler, filler, filler // 2
        sum(model.loss(obs, actions, rewards, ends, mask).values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_only_weights_of_linear_layers_decay():
    model = small()
    decaying, staying = model.parameter_groups(0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decaying["weight_decay"] == 0.01 and staying["weight_decay"] == 0
    assert {names[id(p)] for p in decaying["params"]} == {
        name for name in names.values() if name.endswith("weight") and "norm" not in name and "embedding" not in name
    }
    assert len(decaying["params"]) + len(staying["params"]) == len(names)


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    model = WorldModel(512, 4, WorldModelConfig())
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.layers[3].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.layers[3].qkv.bias.abs().max() == 0 and model.layers[3].attention_norm.weight.min() == 1


def test_sample_draws_each_class_as_often_as_the_softmax_says():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    counts = sample(logits.expand(40_000, 4)).bincount(minlength=4) / 40_000
    assert torch.allclose(counts, logits.softmax(0), atol=0.01)
    assert sample(torch.tensor([[[-1e9, 0.0], [0.0, -1e9]]])).tolist() == [[1, 0]]


# --- the dream -------------------------------------------------------------------------------------------------------


def small_dream(config=SMALL):
    torch.manual_seed(1)
    tokenizer = Tokenizer(
        TokenizerConfig(vocab_size=V, code_dim=8, channels=(8, 8, 8, 8, 8), blocks=(0, 0, 0, 0, 1), attention_at=())
    ).eval()
    torch.nn.init.normal_(tokenizer.codebook.weight)
    return Dream(tokenizer, small(config=config))


def test_dream_steps_have_the_promised_shapes_and_values():
    dream = small_dream()
    frames = dream.reset(torch.rand(5, 3, 64, 64))
    assert frames.shape == (5, 3, 64, 64)
    assert torch.equal(frames, dream.tokenizer.decode(dream.tokens))
    for _ in range(3):
        frames, rewards, ends = dream.step(torch.randint(A, (5,)))
        assert frames.shape == (5, 3, 64, 64) and 0 <= frames.min() and frames.max() <= 1
        assert rewards.shape == (5,) and set(rewards.tolist()) <= {-1.0, 0.0, 1.0}
        assert ends.shape == (5,) and ends.dtype == torch.bool
        assert torch.equal(frames, dream.tokenizer.decode(dream.tokens))
        assert not frames.requires_grad


def test_every_dreamed_token_was_drawn_from_the_logits_of_the_full_forward_pass_even_across_refills(monkeypatch):
    """The dream is long enough to refill twice. The oracle knows only which text the model should have before it."""
    import iris_world_model

    dream, blocks = small_dream(), SMALL.max_blocks
    drawn = []

    def greedy(logits, noise=None):
        drawn.append(logits)
        return logits.argmax(dim=-1)

    monkeypatch.setattr(iris_world_model, "sample", greedy)
    dream.reset(torch.rand(2, 3, 64, 64))
    text, refills = dream.tokens.clone(), 0  # all that was seen and done, and the window of it that the model sees
    for step in range(9):
        action = torch.randint(A, (2,))
        drawn.clear()
        cache_before = dream.cache.size
        dream.step(action)
        text = torch.cat([text, action[:, None]], dim=1)
        if text.shape[1] + 15 > blocks * 17:
            text, refills = text[:, -(blocks // 2) * 17 :], refills + 1
            assert dream.cache.size < cache_before + 17
        logits = dream.world_model(text)
        expected = [logits.observation_logits[:, -1]]
        for k in range(1, 16):
            text = torch.cat([text, expected[-1].argmax(-1)[:, None]], dim=1)
            expected.append(dream.world_model(text).observation_logits[:, -1])
        text = torch.cat([text, expected[-1].argmax(-1)[:, None]], dim=1)
        expected[1:1] = [logits.reward_logits[:, -1], logits.end_logits[:, -1]]
        assert len(drawn) == 18
        for ours, theirs in zip(drawn, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
        assert torch.equal(dream.tokens, text[:, -16:])
    assert refills >= 2


def test_a_refill_remembers_more_than_the_last_frame(monkeypatch):
    dream = small_dream()
    dream.reset(torch.rand(1, 3, 64, 64))
    sizes = []
    for _ in range(8):
        dream.step(torch.zeros(1, dtype=torch.int64))
        sizes.append(dream.cache.size)
    assert min(sizes[3:]) >= 17 * (SMALL.max_blocks // 2) + 15


def test_a_dream_of_exactly_the_published_length_never_refills():
    dream = small_dream()
    dream.reset(torch.rand(1, 3, 64, 64))
    for step in range(SMALL.max_blocks):
        frames, rewards, ends = dream.step(torch.zeros(1, dtype=torch.int64), next_frame=step + 1 < SMALL.max_blocks)
    assert frames is None and rewards.shape == ends.shape == (1,)
    assert dream.stream.shape[1] == dream.cache.size == SMALL.max_tokens


def test_nothing_in_a_dreamed_step_is_read_back_to_the_host(monkeypatch):
    """Whatever makes a GPU wait (item, tolist, bool, cpu, nonzero, masks as indices) shows as one of these operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    dream = small_dream()
    with Watch():
        dream.reset(torch.rand(2, 3, 64, 64))
        for _ in range(5):
            dream.step(torch.zeros(2, dtype=torch.int64))
    assert seen and not seen & {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item", "unique"}
    assert "exponential_" in seen  # it did watch


def test_tokenizer_and_world_model_that_do_not_fit_are_refused():
    dream = small_dream()
    with pytest.raises(IrisError, match="16 tokens a frame.*reads 4"):
        Dream(dream.tokenizer, WorldModel(V, A, WorldModelConfig(tokens_per_frame=4, layers=1, heads=1, width=8)))
