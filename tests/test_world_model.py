"""Chapter 2's promises."""
import math
from dataclasses import replace

import cv2
import pytest
import torch
import torch.nn.functional as F

import iris_tokenizer
import iris_world_model
import reference
from iris_agent import official_agent
from iris_tokenizer import Tokenizer, TokenizerConfig
from iris_world_model import CompiledDream, Dream, WorldModel, WorldModelConfig, sample

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


def last_logits(model, context):
    """Observation, reward and end logits at the last position of a context, read at once and without a cache."""
    with torch.no_grad():
        h = model.hidden_states(context, torch.arange(context.shape[1]))[:, -1]
        return model.head_observations(h), model.head_rewards(h), model.head_ends(h)


def test_paper_size_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in WorldModel(512, 4, WorldModelConfig()).parameters()) == 8_447_493


def test_heads_predict_at_the_right_positions_only():
    """Perturbing one token changes exactly those predictions that stand at its position or after it."""
    model, tokens = small(), stream(1, 3)
    observing = [p for p in range(51) if p % 17 != 15]
    heads = {"observation_logits": observing, "reward_logits": [16, 33, 50], "end_logits": [16, 33, 50]}
    output = model(tokens)
    assert output.observation_logits.shape == (1, 48, V)
    assert output.reward_logits.shape == (1, 3, 3) and output.end_logits.shape == (1, 3, 2)
    for changed in (0, 14, 15, 16, 17, 33, 50):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % A
        after = model(other)
        for name, positions in heads.items():
            differs = (getattr(after, name) != getattr(output, name)).any(dim=-1)[0]
            assert differs.tolist() == [p >= changed for p in positions], (name, changed)


@pytest.mark.parametrize("lengths", [[1] * 68, [17] * 4, [16, 1, 16, 1, 34], [5, 40, 2, 21], [15, 2] * 4])
@pytest.mark.parametrize("whole", [False, True])  # whether attention runs over all of the cache, as it does on a GPU
def test_cache_gives_the_last_hidden_state_of_the_full_forward_pass(lengths, whole):
    model, tokens, start, lasts = small(), stream(2, 4), 0, []
    cache = model.new_cache(2)
    with torch.no_grad():
        for length in lengths:
            positions, filled = torch.arange(start, start + length), 68 if whole else start + length
            lasts.append(model.hidden_states(tokens[:, positions], positions, cache, filled))
            start += length
        assert start == 68
        expected = model.hidden_states(tokens, torch.arange(68))[:, torch.tensor(lengths).cumsum(0) - 1]
    torch.testing.assert_close(torch.cat(lasts, dim=1), expected, rtol=0, atol=1e-5)


def test_tokens_that_are_not_whole_blocks_or_too_many_are_an_error_with_all_numbers():
    for count in (1, 16, 33, 85):
        with pytest.raises(ValueError, match=f"{count} tokens .* 4 blocks of 17"):
            small()(torch.zeros(1, count, dtype=torch.int64))


def test_loss_equals_one_written_with_loops_over_what_the_published_code_predicts():
    weights = reference.official_state_dict(num_actions=3)
    model = official_agent(weights).world_model
    torch.manual_seed(0)
    obs, actions = torch.randint(512, (2, 3, 16)), torch.randint(3, (2, 3))
    rewards, ends = torch.tensor([[0.0, 0.5, -0.5], [7.0, -3.0, 9.0]]), torch.tensor([[0, 0, 1], [0, 1, 0]])
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
    weights = {name for name in names.values() if name.endswith("weight")}
    others = {name for name in weights if "ln" in name or "embedding" in name}
    assert {names[id(p)] for p in decaying["params"]} == weights - others
    assert len(decaying["params"]) + len(staying["params"]) == len(names)


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    model = WorldModel(512, 4, WorldModelConfig())
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.layers[3].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    wider = WorldModel(512, 4, replace(model.config, init_std=0.06))
    assert wider.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert wider.layers[3].mlp[0].weight.std().item() == pytest.approx(0.06, rel=0.02)
    assert model.layers[3].attn.qkv.bias.abs().max() == 0 and model.layers[3].ln1.weight.min() == 1


def test_dropout_works_in_training_mode_only():
    model, tokens = small(config=replace(SMALL, dropout=0.5)), stream(1, 2)
    outputs = [model.train(training)(tokens).reward_logits for training in (True, True, False)]
    assert not torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], small()(tokens).reward_logits)


def test_heads_that_do_not_divide_the_width_are_an_error_with_both_numbers():
    with pytest.raises(ValueError, match="3 heads .* 16"):
        WorldModel(V, A, WorldModelConfig(heads=3, width=16))


def test_sample_draws_each_class_as_often_as_the_softmax_says():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    counts = sample(logits.expand(40_000, 4)).bincount(minlength=4) / 40_000
    assert torch.allclose(counts, logits.softmax(0), atol=0.01)
    assert sample(torch.tensor([[[-1e9, 0.0], [0.0, -1e9]]])).tolist() == [[1, 0]]


# --- the dream -------------------------------------------------------------------------------------------------------


def small_dream(kind=Dream):
    torch.manual_seed(1)
    tokenizer = Tokenizer(
        TokenizerConfig(vocab_size=V, code_dim=8, channels=(8, 8, 8, 8, 8), blocks=(0, 0, 0, 0, 1), attention_at=())
    ).eval()
    torch.nn.init.normal_(tokenizer.codebook.weight)
    return kind(tokenizer, small())


@pytest.mark.parametrize("bf16", [False, True])
def test_dream_steps_have_the_promised_shapes_and_values(bf16):
    dream = small_dream()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        frames = dream.reset(start := torch.rand(5, 3, 64, 64))
        assert frames.shape == (5, 3, 64, 64)
        assert torch.equal(frames, dream.tokenizer.reconstruct(start))
        for _ in range(3):
            frames, rewards, ends = dream.step(torch.randint(A, (5,)))
            assert frames.shape == (5, 3, 64, 64) and 0 <= frames.min() and frames.max() <= 1
            assert rewards.shape == (5,) and set(rewards.tolist()) <= {-1.0, 0.0, 1.0}
            assert ends.shape == (5,) and ends.dtype == torch.bool
            assert torch.equal(frames, dream.tokenizer.decode(dream.context[:, -K:]))
            assert not frames.requires_grad


@pytest.mark.parametrize("given", [1, 3])
def test_every_dreamed_token_is_drawn_from_the_logits_of_the_full_forward_pass_even_across_refills(given, monkeypatch):
    """The dream is long enough to refill twice. The oracle knows only which tokens the model should have before it."""
    dream, blocks, drawn = small_dream(), SMALL.max_blocks, []

    def greedy(logits):
        drawn.append(logits)
        return logits.argmax(dim=-1)

    monkeypatch.setattr(iris_world_model, "sample", greedy)
    frames, refills = torch.rand(2, 3, 64, 64), 0
    context = dream.tokenizer.encode(frames)  # the latest part of all that was seen and done
    for _ in range(given - 1):  # earlier frames and actions, where the dream goes on from several
        context = torch.cat([torch.randint(V, (2, K)), torch.randint(A, (2, 1)), context], dim=1)
    seen = dream.reset(frames) if given == 1 else dream.reset_from_tokens(context)
    assert torch.equal(seen, dream.tokenizer.reconstruct(frames))
    for _ in range(9):
        action = torch.randint(A, (2,))
        drawn.clear()
        filled_before = dream.filled
        decoded, rewards, ends = dream.step(action)
        context = torch.cat([context, action[:, None]], dim=1)
        if context.shape[1] + 15 > blocks * 17:
            context, refills = context[:, -(3 * blocks // 4) * 17 :], refills + 1
            assert dream.filled < filled_before + 17
        observation_logits, reward_logits, end_logits = last_logits(dream.world_model, context)
        expected = [reward_logits, end_logits]
        for _ in range(K):
            expected.append(observation_logits)
            context = torch.cat([context, observation_logits.argmax(-1)[:, None]], dim=1)
            observation_logits, _, _ = last_logits(dream.world_model, context)
        assert len(drawn) == 18
        for ours, theirs in zip(drawn, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
        assert torch.equal(decoded, dream.tokenizer.decode(context[:, -K:]))
        assert torch.equal(rewards, reward_logits.argmax(-1) - 1.0) and torch.equal(ends, end_logits.argmax(-1) == 1)
    assert refills >= 2


def test_a_refill_remembers_more_than_the_last_frame():
    dream, filled = small_dream(), []
    dream.reset(torch.rand(1, 3, 64, 64))
    for _ in range(8):
        dream.step(torch.zeros(1, dtype=torch.int64))
        filled.append(dream.filled)
    assert min(filled[3:]) >= 17 * (3 * SMALL.max_blocks // 4) + 15
    dream.kept_blocks = 1  # the published way
    for _ in range(8):
        dream.step(torch.zeros(1, dtype=torch.int64))
        filled.append(dream.filled)
    assert min(filled[8:]) == 17 + 15


def test_a_dream_of_exactly_the_published_length_never_refills_and_is_then_over():
    dream = small_dream()
    with pytest.raises(ValueError, match="reset"):
        dream.step(torch.zeros(1, dtype=torch.int64))  # before it has begun
    dream.reset(torch.rand(1, 3, 64, 64))
    for step in range(SMALL.max_blocks):
        frames, rewards, ends = dream.step(torch.zeros(1, dtype=torch.int64), next_frame=step + 1 < SMALL.max_blocks)
        assert dream.filled == 17 * (step + 1) + 15 * (frames is not None)
    assert frames is None and rewards.shape == ends.shape == (1,)
    with pytest.raises(ValueError, match="reset"):
        dream.step(torch.zeros(1, dtype=torch.int64))
    dream.reset(torch.rand(1, 3, 64, 64))
    assert dream.step(torch.zeros(1, dtype=torch.int64))[0].shape == (1, 3, 64, 64)


def test_a_dream_goes_on_after_an_end():
    dream = small_dream()
    dream.world_model.head_ends[2].bias.data = torch.tensor([-1e4, 1e4])
    dream.reset(torch.rand(2, 3, 64, 64))
    for _ in range(3):
        frames, _, ends = dream.step(torch.zeros(2, dtype=torch.int64))
        assert ends.all() and frames.shape == (2, 3, 64, 64)


def test_nothing_in_a_dreamed_step_is_read_back_to_the_host():
    """What makes a GPU wait (item, tolist, bool, cpu, nonzero, masks as indices) shows as one of these operators."""
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
    assert "searchsorted" in seen  # it did watch


def test_tokenizer_and_world_model_that_do_not_fit_are_refused():
    dream = small_dream()
    other = Dream(dream.tokenizer, WorldModel(V, A, WorldModelConfig(tokens_per_frame=4, layers=1, heads=1, width=8)))
    with pytest.raises(ValueError, match="^16 tokens: .* frames of 4"):
        other.reset(torch.rand(1, 3, 64, 64))


def test_any_tokenizer_that_encodes_and_decodes_will_do():
    class Tokenizer:
        def encode(self, frames):
            return frames[:, 0, ::16, ::16].flatten(1).long()

        def decode(self, tokens):
            return F.interpolate(tokens.view(-1, 1, 4, 4).float(), scale_factor=16).expand(-1, 3, 64, 64)

    dream = Dream(Tokenizer(), small())
    frames = dream.reset(torch.full((2, 3, 64, 64), 5.0))
    assert (frames == 5).all()
    frames, _, _ = dream.step(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(dream.tokenizer.encode(frames), dream.context[:, -K:])


def test_a_compiled_dream_is_the_same_dream_in_four_graphs_a_batch_size(monkeypatch):
    """All but the code generation: dynamo's graphs are run as they are."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, **{**options, "backend": backend}))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    dreams, frames = (small_dream(), small_dream(CompiledDream)), torch.rand(3, 3, 64, 64)
    caches = []
    for n in (3, 2, 3):
        results = []
        for dream in dreams:
            torch.manual_seed(n)
            dream.reset(frames[:n])
            results.append([dream.step(torch.randint(A, (n,)), next_frame=step < 8) for step in range(9)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
        caches.append(dreams[1].cache[0].data_ptr())
    assert caches[0] == caches[2] != caches[1]  # a CUDA graph needs its addresses again
    assert len(graphs) == 8


# --- the lesson ------------------------------------------------------------------------------------------------------


def test_the_lesson_runs_and_leaves_its_picture(tmp_path, capsys, monkeypatch):
    train, tiny = iris_tokenizer.train_small_tokenizer, replace(iris_tokenizer.SMALL_TOKENIZER, channels=(4,) * 5)
    monkeypatch.setattr(iris_tokenizer, "train_small_tokenizer", lambda frames, steps: train(frames, steps=2))
    monkeypatch.setattr(iris_tokenizer, "SMALL_TOKENIZER", tiny)
    iris_world_model.lesson(steps=2, out=tmp_path / "world_model.png")
    assert cv2.imread(str(tmp_path / "world_model.png")).shape == (4 * 132, 150 + 7 * 132, 3)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"Picture: {tmp_path / 'world_model.png'}")
