"""What a GPU owes us. All tests are skipped where there is none; the README of results/ says how to run them in one go.

`IRIS_TEST_DEVICE=cpu pytest tests/test_cuda.py` runs the same tests on a CPU, in small sizes: a test that fails there
is wrong itself. What has a meaning on CUDA only, such as its memory, is skipped there.
"""
import functools
import gc
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import iris_play
import iris_train
import iris_world_model
import reference
from iris_agent import Rollout, actor_critic_loss, imagine, official_agent
from iris_tokenizer import TokenizerConfig
from iris_train import Args, choose_device, load_agent, parse_args
from iris_world_model import CompiledDream, Dream, WorldModelConfig
from test_train import FAST, NoWriter

DEVICE = torch.device(os.environ.get("IRIS_TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    CUDA and not torch.cuda.is_available(), reason="no GPU; IRIS_TEST_DEVICE=cpu runs these tests on the CPU"
)
on_cuda_only = pytest.mark.skipif(not CUDA, reason="has a meaning on CUDA only")
compiler = pytest.mark.skipif(not (CUDA or shutil.which("g++")), reason="torch.compile needs a C++ compiler on a CPU")

EAGER = pytest.param(Dream, id="eager")
PRECISIONS = ["fp32", "bf16"]
MODELS = ["tokenizer", "world_model", "actor_critic"]
# An epoch with every phase, of few steps. On CUDA the sizes and batches are the paper's.
SHORT = [
    "--preset", "paper", "--perceptual-loss", "pixel", "--collect-steps", "60", "--test-max-frames", "400",
    "--tokenizer-from", "1", "--world-model-from", "1", "--actor-critic-from", "1",
    "--tokenizer-steps", "3", "--world-model-steps", "3", "--actor-critic-steps", "3",
    "--eval-every", "1", "--test-episodes", "2", "--test-envs", "2",
]  # fmt: skip
SIZES = [*(SHORT if CUDA else FAST), "--eval-every", "1", "--device", str(DEVICE), "--env-id", "BreakoutNoFrameskip-v4"]
# Largest difference from the CPU's float32, as a share of the whole. A sum in another order differs by 1e-7 a product,
# and the networks are 30 layers deep. TF32, which cuDNN takes for convolutions in float32 unless told otherwise, rounds
# factors to 10 bits (5e-4), bfloat16 to 7 bits (4e-3); errors add up over layers, but with both signs. The bounds of
# bfloat16 are those of test_speed.py.
BOUNDS = {
    "fp32": {"loss": 1e-4, "gradient": 2e-3, "logits": 1e-3},
    "tf32": {"loss": 0.01, "gradient": 0.05, "logits": 1e-3},
    "bf16": {"loss": 0.02, "gradient": 0.15, "logits": 0.03},
}


def autocast(precision, device=DEVICE):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def distance(ours, theirs):
    return ((ours.double().cpu() - theirs.double()).norm() / theirs.double().norm()).item()


def build(folder, *flags):
    run = iris_train.build(parse_args([*SIZES, "--run-dir", str(folder), *flags]))
    run.writer = NoWriter()
    return run


def train(run, epochs):
    run.args.epochs = epochs
    iris_train.train(run)


@pytest.fixture(autouse=True)
def clean_up():
    """Compiled graphs and the memory that they hold are of one test only."""
    yield
    torch._dynamo.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


@pytest.fixture
def tf32():
    """Whether convolutions in float32 may take TF32; restored after the test."""
    before = torch.backends.cudnn.allow_tf32
    yield lambda allowed: setattr(torch.backends.cudnn, "allow_tf32", allowed)
    torch.backends.cudnn.allow_tf32 = before


@contextmanager
def no_waiting():
    """An error for whatever makes the host wait for the GPU; on a CPU, for the operators that would."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name, leaves = function.overloadpacket.__name__, tree_leaves(args[1:])
            masks = [x for x in leaves if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
            assert not (name in ("index", "index_put_", "index_put", "_index_put_impl_") and masks), f"{name} by a mask"
            assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2"), name
            return function(*args, **(kwargs or {}))

    with Watch():
        yield


# --- a run ------------------------------------------------------------------------------------------------------------
def test_auto_takes_the_gpu_and_bfloat16_where_the_gpu_multiplies_in_it():
    device, bf16 = choose_device(Args())
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device.type == "cpu" or bf16 == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("how", ["eager", pytest.param("compile", marks=compiler)])
def test_an_epoch_trains_all_three_models_and_its_checkpoint_can_be_read_without_a_gpu(precision, how, tmp_path):
    flags = {"eager": [], "compile": ["--compile", "--eval-every", "0"]}[how]  # evaluating would compile other sizes
    run = build(tmp_path / "run", "--precision", precision, *flags)
    before = {name: weight.detach().clone() for name, weight in run.agent.named_parameters()}
    train(run, 1)
    assert {weight.device.type for weight in [*run.agent.parameters(), *run.agent.buffers()]} == {DEVICE.type}
    for name in MODELS:
        weights = [key for key in before if key.startswith(name)]
        moved = [not torch.equal(before[key], run.agent.get_parameter(key)) for key in weights]
        assert sum(moved) > 0.9 * len(moved), name  # a code that no frame used has no gradient, and others have theirs
        assert f"losses/{name}_grad_norm" in run.metrics
    assert all(np.isfinite(value) for value in run.metrics.values())
    assert ("eval/episodic_return" in run.metrics) == (how == "eager")
    agent, _ = load_agent(tmp_path / "run")
    for (name, weight), other in zip(run.agent.state_dict().items(), agent.state_dict().values(), strict=True):
        assert other.device.type == "cpu" and torch.equal(weight.cpu(), other), name


def test_a_resumed_run_has_weights_moments_and_random_draws_of_the_one_that_stopped_and_goes_on_alike(tmp_path):
    def state(run):
        tensors = [x for optimizer in run.optimizers.values() for x in tree_leaves(optimizer.state_dict())]
        return [*run.agent.state_dict().values(), *(x for x in tensors if isinstance(x, torch.Tensor))]

    def draws(run):
        return [torch.rand(5, device=DEVICE), torch.rand(5), torch.from_numpy(run.rng.random(5))]

    run = build(tmp_path / "run")
    train(run, 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    stopped, drawn = [x.clone() for x in state(run)], draws(run)
    train(run, 2)

    again = iris_train.build(parse_args(["--resume", str(tmp_path / "copy")]))
    again.writer = NoWriter()
    for ours, theirs in zip([*state(again), *draws(again)], [*stopped, *drawn], strict=True):
        assert ours.device == theirs.device and ours.stride() == theirs.stride() and torch.equal(ours, theirs)
    train(again, 2)
    assert np.array_equal(again.replay.array, run.replay.array)
    # On CUDA sums are not always taken in the same order, so what has been trained agrees to rounding only.
    for name in ("tokenizer", "world_model"):
        assert again.metrics[f"losses/{name}"] == pytest.approx(run.metrics[f"losses/{name}"], rel=0.02)
    if not CUDA:
        assert all(torch.equal(*pair) for pair in zip(state(again), state(run), strict=True))


def test_a_run_that_was_begun_on_one_device_goes_on_on_another(tmp_path):
    run = build(tmp_path / "run", *FAST, "--device", str(DEVICE))
    train(run, 1)
    run.replay.file.close()
    again = iris_train.build(parse_args(["--resume", str(tmp_path / "run"), "--device", "cpu", "--epochs", "2"]))
    again.writer = NoWriter()
    train(again, 2)
    again.replay.file.close()
    back = iris_train.build(parse_args(["--resume", str(tmp_path / "run"), "--device", str(DEVICE), "--epochs", "3"]))
    back.writer = NoWriter()
    train(back, 3)
    assert {weight.device.type for weight in back.agent.parameters()} == {DEVICE.type}


# --- the numbers ------------------------------------------------------------------------------------------------------
def batch(agent, name, device):
    """A closure that computes a model's losses, on the same numbers whatever the device."""
    g, n, length, k = torch.Generator().manual_seed(0), 4, 3, 16
    frames = torch.rand(n, 3, 64, 64, generator=g).to(device)
    if name == "tokenizer":
        return lambda: agent.tokenizer.loss(frames)
    tokens, actions, ends = (torch.randint(high, (n, length, k), generator=g).to(device) for high in (512, 4, 2))
    rewards, mask = torch.randn(n, length, generator=g).to(device), torch.ones(n, length, dtype=torch.bool).to(device)
    mask[0, 2] = False
    if name == "world_model":
        return lambda: agent.world_model.loss(tokens, actions[..., 0], rewards, ends[..., 0], mask)

    def losses():  # of a policy that sees given frames and takes given actions
        state, steps = agent.actor_critic.warm_up(frames[:, None].expand(-1, length, -1, -1, -1), mask), []
        for t in range(length):
            logits, values, state = agent.actor_critic(frames.roll(t, dims=0), state)
            steps.append((logits, values))
        logits, values = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
        rollout = Rollout(logits, values, actions[..., 0], rewards.sign(), ends[..., 0].bool(), [])
        return actor_critic_loss(rollout, 0.995, 0.95, 0.001)[0]

    return losses


def losses_and_gradient(name, precision, device):
    agent = official_agent(reference.official_state_dict())
    codes = agent.tokenizer.codebook.weight  # far apart, for the nearest code jumps where two are equally near
    codes.data.copy_(3 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(1)))
    model, compute = getattr(agent.to(device), name), batch(agent, name, device)
    with autocast(precision, device):
        losses = compute()
    gradient = torch.autograd.grad(sum(losses.values()), list(model.parameters()), materialize_grads=True)
    return {key: loss.item() for key, loss in losses.items()}, torch.cat([g.flatten().cpu() for g in gradient])


@pytest.mark.parametrize("precision", [*PRECISIONS, pytest.param("tf32", marks=on_cuda_only)])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_at_paper_sizes_are_those_of_the_cpu_in_float32(name, precision, tf32):
    expected, expected_gradient = losses_and_gradient(name, "fp32", torch.device("cpu"))
    tf32(precision != "fp32")
    losses, gradient = losses_and_gradient(name, precision, DEVICE)
    bounds, whole = BOUNDS[precision], sum(map(abs, expected.values()))
    assert losses.keys() == expected.keys()
    assert all(abs(losses[key] - expected[key]) <= bounds["loss"] * whole for key in losses), (losses, expected)
    assert expected_gradient.norm() > 0 and distance(gradient, expected_gradient) <= bounds["gradient"]


def test_three_optimiser_steps_have_the_losses_and_gradient_norms_of_the_cpu(tmp_path, tf32):
    tf32(False)
    means = []
    for device in (torch.device("cpu"), DEVICE):
        flags = ["--world-model.dropout", "0", "--tokenizer-batch-size", "4", "--world-model-batch-size", "2"]
        run = build(tmp_path / f"{device}{len(means)}", "--precision", "fp32", "--device", str(device), *flags)
        rng = np.random.default_rng(0)
        frames = rng.integers(256, size=(60, 64, 64, 3), dtype=np.uint8)
        steps = [(frame, step % 4, step % 2, step % 20 == 19) for step, frame in enumerate(frames)]
        run.replay.extend(np.array(steps, iris_train.STEP))
        run.tokens = torch.from_numpy(rng.integers(run.args.tokenizer.vocab_size, size=(60, 16))).to(device)
        for name in ("tokenizer", "world_model"):  # the policy's dreams are drawn from the device's own generator
            iris_train.optimise(run, name, getattr(iris_train, f"{name}_losses"))
        means.append({key: value for key, value in run.metrics.items() if key.startswith("losses/")})
    assert len(means[0]) == 10 and means[1] == pytest.approx(means[0], rel=0.01)


# --- dreams -----------------------------------------------------------------------------------------------------------
def dreamer():
    """An agent with weights at which logits differ. On CUDA it has the paper's sizes but for the number of layers, so
    that compiling takes seconds."""
    small = TokenizerConfig(vocab_size=11, code_dim=8, channels=(8,) * 5, blocks=(0, 0, 0, 0, 1), attention_at=())
    narrow = WorldModelConfig(max_blocks=4, layers=2, heads=2, width=16)
    args = Args(world_model=WorldModelConfig(layers=2)) if CUDA else Args(tokenizer=small, world_model=narrow)
    torch.manual_seed(0)
    agent = iris_train.build_agent(args, 4)
    for parameter in agent.world_model.parameters():  # the initial 0.02 makes all logits alike
        nn.init.normal_(parameter, std=1.2 / args.world_model.width**0.5)
    return agent


@functools.cache  # the CPU's are needed more than once
def logits_of_dreams(kind, device, precision):
    """All logits of three dreams that are longer than the context. Samples are given, so that all dreams say the same.
    The logits are kept as they are: a CUDA graph that writes over its last outputs would show."""
    agent, logits = dreamer().to(device), []
    dream, vocab_size = kind(agent.tokenizer, agent.world_model), agent.world_model.vocab_size
    g = torch.Generator().manual_seed(0)

    def sample(x):
        logits.append(x)
        return torch.randint(x.shape[-1], x.shape[:1], generator=g).to(device)

    with pytest.MonkeyPatch.context() as patch, autocast(precision, device):
        patch.setattr(iris_world_model, "sample", sample)
        for n in (3, 2, 3):
            dream.reset_from_tokens(torch.randint(vocab_size, (n, 16), generator=g).to(device))
            for _ in range(agent.world_model.config.max_blocks + 2):
                dream.step(torch.randint(4, (n,), generator=g).to(device))
    return logits


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [EAGER, pytest.param(CompiledDream, marks=compiler, id="compile")])
def test_dreams_have_the_logits_of_the_cpu_past_a_refill_and_after_a_change_of_batch_size(kind, precision):
    expected = logits_of_dreams(Dream, torch.device("cpu"), "fp32")
    logits, bound = logits_of_dreams(kind, DEVICE, precision), BOUNDS[precision]["logits"]
    wrong = [i for i, pair in enumerate(zip(logits, expected, strict=True)) if distance(*pair) > bound]
    assert not wrong, f"{len(wrong)} of {len(logits)} passes, the first is {wrong[0]}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [EAGER, pytest.param(CompiledDream, marks=on_cuda_only, id="compile")])
def test_nothing_in_a_dream_waits_for_the_gpu(kind, precision):
    agent = dreamer().to(DEVICE)
    dream, steps = kind(agent.tokenizer, agent.world_model), agent.world_model.config.max_blocks + 2
    frames, actions = torch.rand(3, 3, 64, 64, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)

    def play():
        with autocast(precision):
            dream.reset(frames)
            for _ in range(steps):
                dream.step(actions)

    for _ in range(3):  # compiles, and records CUDA graphs
        play()
    with no_waiting():
        play()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_in_an_optimiser_step_waits_for_the_gpu(name):
    """But for the copy of its batch, which is here already."""
    agent = official_agent(reference.official_state_dict()).to(DEVICE)
    model, optimizer = getattr(agent, name), iris_train.make_optimizers(agent, Args())[name]
    compute, frames = batch(agent, name, DEVICE), torch.rand(4, 3, 64, 64, device=DEVICE)
    dream = Dream(agent.tokenizer, agent.world_model)
    model.train()

    def step():
        with autocast("bf16"):
            if name == "tokenizer":
                z = agent.tokenizer.encoder_outputs(frames)
                agent.tokenizer.codebook.revive(z, 0)
                losses = agent.tokenizer.loss(frames, None, z)
            elif name == "actor_critic":
                state = model.warm_up(frames[:, None], torch.ones(4, 1, dtype=torch.bool, device=DEVICE))
                losses, _ = actor_critic_loss(imagine(model, dream, dream.reset(frames), state, 3), 0.995, 0.95, 0.001)
            else:
                losses = compute()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with no_waiting():
        step()


# --- memory -----------------------------------------------------------------------------------------------------------
@on_cuda_only
@pytest.mark.parametrize("name", ["tokenizer", "world_model"])
def test_a_batch_in_four_parts_takes_less_than_half_the_memory(name, tmp_path):
    peaks = []
    for parts in ("1", "4"):
        run = build(tmp_path / parts, "--accumulate", parts)
        iris_train.collect(run)
        iris_train.encode_replay(run)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        iris_train.optimise(run, name, getattr(iris_train, f"{name}_losses"))
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert peaks[1] < 0.5 * peaks[0], peaks


@on_cuda_only
def test_an_epoch_leaves_no_memory_behind_but_its_new_frames(tmp_path):
    run, held = build(tmp_path / "run", "--eval-every", "2"), []
    for epoch in (1, 2, 3, 4):
        train(run, epoch)
        held.append(torch.cuda.memory_allocated())
    assert held[3] - held[1] < 2 * 60 * 64 * 64 * 3 + 2**23, held  # 60 frames an epoch, and 8 MB of rounding


# --- playing ----------------------------------------------------------------------------------------------------------
def test_an_agent_trained_here_is_evaluated_and_plays_the_game_and_its_dream(tmp_path, capsys):
    run = build(tmp_path / "run", *FAST, "--device", str(DEVICE))
    train(run, 1)
    (tmp_path / "run/args.json").write_text("{}")
    common = {"run_dir": str(tmp_path / "run"), "device": str(DEVICE)}
    iris_play.main(iris_play.Args(evaluate=2, **common))
    assert "episodes          2\n" in capsys.readouterr().out
    for mode in ({}, {"compare": True}, {"reconstruction": True}, {"world_model": True, "agent": True}):
        path = tmp_path / f"{'_'.join(mode) or 'game'}.gif"
        iris_play.main(iris_play.Args(video=str(path), steps=4, **mode, **common))
        assert path.stat().st_size > 0
