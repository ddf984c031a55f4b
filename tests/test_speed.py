"""What was made fast still computes what the plain version does (`benchmark.Plain`), to rounding in float32 and within
the bounds stated here in bfloat16; and the counts that the speed rests on. Seconds are measured by benchmark.py."""
import json
import math
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import reference
from benchmark import Plain, PlainDream, operators, run_together
from iris_agent import official_agent
from iris_tokenizer import Tokenizer, TokenizerConfig
from iris_train import PRESETS, build_agent
from iris_world_model import CompiledDream, Dream, WorldModel, WorldModelConfig

N, L, K = 2, 3, 16
# Largest error allowed, as a share of the whole: of a loss, of a vector of gradients, of a matrix of logits.
BOUNDS = {
    "fp32": {"loss": 1e-5, "gradient": 1e-3, "logits": 1e-4},
    "bf16": {"loss": 0.02, "gradient": 0.15, "logits": 0.03},
}


@pytest.fixture(scope="module")
def agent():
    return official_agent(reference.official_state_dict())


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def distance(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def check_loss_and_gradients(loss, module, plain, plain_loss, precision):
    bounds = BOUNDS[precision]
    assert abs(loss.item() - plain_loss.item()) <= bounds["loss"] * abs(plain_loss.item())
    parameters = list(module.parameters())
    ours = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    # Read the reference's gradients in our order, by writing them into a copy of the agent as if they were weights.
    weights = [w for name, w in plain.weights.items() if not name.startswith("actor_critic")]
    for weight, gradient in zip(weights, torch.autograd.grad(plain_loss, weights, materialize_grads=True), strict=True):
        weight.data.copy_(gradient)
    gradients = official_agent({name: w.detach() for name, w in plain.weights.items()})
    module_of = gradients.tokenizer if isinstance(module, Tokenizer) else gradients.world_model
    theirs = torch.cat([p.flatten() for p in module_of.parameters()])
    assert theirs.norm() > 0 and distance(ours, theirs) <= bounds["gradient"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokenizer_losses_and_gradients_are_those_of_the_plain_version(agent, precision):
    torch.manual_seed(0)
    frames, plain = torch.rand(N, 3, 64, 64), Plain(agent)
    # The nearest code jumps where two are equally near, so both are given the same: as many codes as vectors, apart.
    codes = agent.tokenizer.encoder_outputs(frames).detach().flatten(0, 1)[:: N * K // 8].repeat(64, 1) + 3 * torch.randn(512, 512)
    agent.tokenizer.codebook.weight.data.copy_(codes)
    plain.weights["tokenizer.embedding.weight"].data.copy_(codes)
    with autocast(precision):
        assert torch.equal(agent.tokenizer.encode(frames), plain.encode(frames)) or precision == "bf16"
        loss, plain_loss = sum(agent.tokenizer.loss(frames).values()), None
        with torch.autocast("cpu", enabled=False):
            plain_loss = plain.tokenizer_loss(frames)
    check_loss_and_gradients(loss, agent.tokenizer, plain, plain_loss, precision)


def test_the_laptops_tokenizer_is_that_of_the_plain_version():
    agent, frames = build_agent(PRESETS["laptop"], 4), torch.rand(N, 3, 64, 64)
    agent.tokenizer.fit_pixels(torch.rand(9, 3, 64, 64))
    plain = Plain(agent, requires_grad=False)
    with torch.no_grad():
        assert distance(agent.tokenizer.encoder_outputs(frames).flatten(0, 1), plain.vectors(frames)) < 1e-5
        loss, plain_loss = sum(agent.tokenizer.loss(frames).values()), plain.tokenizer_loss(frames)
    assert abs(loss - plain_loss) <= 1e-5 * plain_loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_world_model_losses_and_gradients_are_those_of_the_plain_version(agent, precision):
    torch.manual_seed(0)
    plain = Plain(agent)
    plain.training = False
    batch = (
        torch.randint(512, (N, L, K)), torch.randint(4, (N, L)), torch.randn(N, L), torch.randint(2, (N, L)),
        torch.tensor([[True, True, True], [True, True, False]]),
    )  # fmt: skip
    with autocast(precision):
        loss = sum(agent.world_model.loss(*batch).values())
    check_loss_and_gradients(loss, agent.world_model, plain, plain.world_model_loss(*batch), precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_token_passes_give_the_logits_of_the_plain_version_with_its_growing_cache(agent, precision):
    torch.manual_seed(0)
    model, plain = agent.world_model, Plain(agent, requires_grad=False)
    plain.training = False
    stream = torch.cat([torch.randint(512, (N, 2, K)), torch.randint(4, (N, 2, 1))], dim=2).flatten(1)  # (N, 34)
    with torch.no_grad():
        cache: list = [()] * 10
        theirs = [plain.head("observations", plain.transformer(stream[:, p : p + 1], cache)) for p in range(34)]
        with autocast(precision):
            ours, cache, passes = [], model.new_cache(N), [(0, 17), *((p, p + 1) for p in range(17, 32)), (32, 34)]
            for start, stop in passes:
                h = model.hidden_states(stream[:, start:stop], model.positions[start:stop], cache, stop)
                ours.append(model.head_observations(h).float())
    expected = torch.cat([theirs[stop - 1] for _, stop in passes], dim=1)
    assert distance(torch.cat(ours, dim=1), expected) <= BOUNDS[precision]["logits"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_nearest_code_is_searched_in_float32(precision):
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
                seen.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    tokenizer = Tokenizer(TokenizerConfig(code_dim=8, channels=(8, 8, 8, 8, 8), blocks=(0,) * 5, attention_at=()))
    with Watch(), autocast(precision):
        tokenizer.encode(torch.rand(1, 3, 64, 64))
    assert seen == {torch.float32}


def test_a_dreamed_frame_takes_at_most_3500_operators_that_compute(agent):
    counts, plain = [], Plain(agent, requires_grad=False)
    plain.training = False
    for dream in (Dream(agent.tokenizer, agent.world_model), PlainDream(plain)):
        with torch.no_grad():
            dream.reset(torch.rand(2, 3, 64, 64))
            dream.step(torch.zeros(2, dtype=torch.int64))
            counts.append(operators(lambda dream=dream: dream.step(torch.zeros(2, dtype=torch.int64))))
    assert counts[0] <= 3500 and counts[1] > 1.3 * counts[0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU: install g++")
def test_compiled_dreams_are_the_same_dreams_with_one_graph_a_kind_of_pass_and_no_graph_break():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    small = TokenizerConfig(vocab_size=11, code_dim=8, channels=(8,) * 5, blocks=(0, 0, 0, 0, 1), attention_at=())
    tokenizer = Tokenizer(small).eval()
    world_model = WorldModel(11, 3, WorldModelConfig(max_blocks=4, layers=2, heads=2, width=16)).eval()
    for parameter in world_model.parameters():  # the initial 0.02 makes all logits alike
        torch.nn.init.normal_(parameter, std=0.3)
    frames, actions, dreams = torch.rand(3, 3, 64, 64), torch.randint(3, (12, 3)), []
    for compiled in (False, True):
        dream, shown = (CompiledDream if compiled else Dream)(tokenizer, world_model), []
        torch.manual_seed(1)
        # The third time in the first one's cache; a run changes the batch size when it evaluates.
        for n, precision in ((3, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")):
            with autocast(precision):
                shown.append(dream.reset(frames[:n]))
                for action in actions:  # long enough to refill more than once
                    shown += dream.step(action[:n])
        dreams.append(shown)
    exact = 3 * (1 + 3 * len(actions))  # in bfloat16 a compiler may keep more digits between two operators
    assert all(torch.equal(*pair) for pair in list(zip(*dreams, strict=True))[:exact])
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # Passes of 1 and 2 tokens, of 17 after a reset, of 34 at a refill, for three kinds of dreams, at any position.
    assert counters["stats"]["unique_graphs"] == 12


def test_what_starts_something_on_a_gpu_is_a_launch_and_waiting_or_recording_is_none():
    launches = """cudaLaunchKernel cudaLaunchKernelExC cudaLaunchCooperativeKernel cuLaunchKernel cuLaunchKernelEx
        cudaGraphLaunch cudaMemcpyAsync cudaMemsetAsync cudaMemcpy2DAsync"""
    others = "cudaStreamSynchronize cudaGraphInstantiate cudaMalloc cudaEventRecord aten::mm void at::native::kernel<4>"
    assert all(map(benchmark.STARTS.match, launches.split())) and not any(map(benchmark.STARTS.match, others.split()))


def test_runs_that_share_the_machine_begin_together_and_one_that_fails_is_named():
    ready, fails = "print('ready', flush=True); assert input() == 'go'", "raise SystemExit('no memory')"
    child = f"{ready}; print('{{\"epochs_per_hour\": 1.5}}')"
    assert run_together([sys.executable, "-c", child], 3) == 4.5
    for child in (fails, f"{ready}; {fails}"):
        with pytest.raises(RuntimeError, match="no memory"):
            run_together([sys.executable, "-c", child], 2)


def test_a_measurement_that_failed_is_nan_in_its_table(capsys):
    nothing = defaultdict(lambda: math.nan)
    for device in (torch.device("cpu"), torch.device("cuda")):
        benchmark.print_phases(benchmark.Options(), lambda *_: nothing, device)
        benchmark.print_sharing(benchmark.Options(), lambda *_: nothing, device, "bf16")
        text = capsys.readouterr().out
        assert "| bf16 | nan | nan |" in text and "| 1 | nan | nan% |" in text
        assert ("--compile" in text) == (device.type == "cuda")


@pytest.mark.slow
def test_the_benchmark_runs_from_end_to_end(tmp_path):
    path = Path(__file__).parents[1] / "results/benchmark.py"
    command = [sys.executable, path, "--preset", "catch", "--repeat", "1", "--device", "cpu", "--json", tmp_path / "f"]
    command += ["--updates", "1", "--seconds", "0.1", "--tables", "phases", "sharing"]  # plain takes ten minutes
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for heading in ("operators a dreamed frame", "epochs an hour, all together"):
        assert heading in result.stdout
    figures = json.loads((tmp_path / "f").read_text())["figures"]
    assert all(figure["seconds"] > 0 for figure in figures.values() if "seconds" in figure)
    assert {"phases/ours/bf16", "phases/ours/fp32"} <= figures.keys()
    assert {"sharing/ours/bf16/1", "sharing/ours/fp32/1"} & figures.keys()  # in the precision that is faster here
    command = [sys.executable, path, "--preset", "catch", "--repeat", "1", "--device", "cpu", "--only", "tokenizer/plain/fp32"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True).stdout)["seconds"] > 0
