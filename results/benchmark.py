"""How fast is it, and against what? `python results/benchmark.py`; results/README.md, "Speed".

It measures the project beside a plain version of the same mathematics, written below as one would write it first:
separate products for queries, keys and values, attention as a masked softmax, a cache that grows by copying, 17 passes
for a dreamed frame, and frames that are encoded and reconstructed whenever a sample needs them; in torch's own memory
layout and optimisers. Both are held against what the machine reaches when it does nothing but multiply or convolve. Each measurement has a process of its own, so
that memory peaks are its own, and takes the best of a few repetitions (dreams on a CPU: of one, after one to warm up).

With `--tables plain`, that is all; it takes a quarter of an hour on two cores. Two more tables, `--tables phases
sharing`, need no plain version: an epoch by its phases, timed in parts of real epochs (`iris_train.collect`, `optimise`
and `encode_replay`), and what several runs get done that share the machine. A measurement that fails, as where the GPU
has too little memory, is nan in its table and is named at the end.

`Plain` is also the reference of `test_speed.py`, which shows that it computes the same.
"""
import dataclasses
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import iris_train  # noqa: E402
from iris_agent import Agent, actor_critic_loss, imagine  # noqa: E402
from iris_tokenizer import Lpips  # noqa: E402
from iris_train import (  # noqa: E402
    PRESETS, STEP, Args, Replay, build_agent, choose_device, make_optimizers, to_model, to_stored,
)  # fmt: skip
from iris_world_model import CompiledDream, Dream  # noqa: E402


# --- the plain version -----------------------------------------------------------------------------------------------

PUBLISHED = (  # our name -> the published one, as regular expressions, one after the other
    (r"(down|up)_(\d)_(block|attn)_(\d)\.", r"\1.\2.\3.\4."), (r"(down|up)_(\d)_(\w+)sample\.", r"\1.\2.\3sample."),
    (r"\.mid_", ".mid."), (r"quantization\.", "quant_conv."), (r"tokenizer\.codebook", "tokenizer.embedding"),
    (r"world_model\.layers", "world_model.transformer.blocks"), (r"world_model\.ln_f", "world_model.transformer.ln_f"),
    (r"position_embedding", "pos_emb"), (r"(head_\w+)\.", r"\1.head_module."),
    (r"actor_critic\.convolutions\.", "actor_critic."),
)  # fmt: skip


def published_weights(agent: Agent) -> dict[str, Tensor]:
    """The agent's weights under their published names, apart where we stack what is published apart. Layers of a local
    tokenizer, which is not the paper's, keep their names."""
    vocab_size, weights = agent.tokenizer.config.vocab_size, {}
    for name, weight in agent.named_parameters():
        for pattern, theirs in PUBLISHED:
            name = re.sub(pattern, theirs, name)
        if name == "world_model.embedding.weight":
            tables = zip((1, 0), weight.split([vocab_size, len(weight) - vocab_size]))  # frame tokens, actions
            weights |= {f"world_model.embedder.embedding_tables.{i}.weight": table for i, table in tables}
        elif ".qkv." in name:
            parts = zip(("query", "key", "value"), weight.chunk(3))
            weights |= {name.replace("qkv", part): rows for part, rows in parts}
        else:
            weights[name] = weight
    return {name: weight.detach().clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}


class Plain:
    """Tokenizer and world model as plain functions on weights in the published format, taken from one of our agents."""

    def __init__(self, agent: Agent, requires_grad: bool = True):
        self.tokenizer, self.world_model = agent.tokenizer.config, agent.world_model.config
        self.mean, self.std = agent.tokenizer.mean, agent.tokenizer.std
        self.vocab_size, self.actor_critic, self.training = agent.world_model.vocab_size, agent.actor_critic, True
        self.weights = {name: w.requires_grad_(requires_grad) for name, w in published_weights(agent).items()}

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def conv(self, name: str, x: Tensor, **options) -> Tensor:
        return F.conv2d(x, *self.pair(name), **options)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self.pair(name))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (p.to(x.dtype) for p in self.pair(name))
        return F.group_norm(x, min(32, x.shape[1]), weight, bias, eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        return x + self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (N, C, HW)
        weights = torch.bmm(q.transpose(1, 2), k).div(math.sqrt(x.shape[1])).softmax(dim=2)  # (N, HW, HW)
        return x + self.conv(f"{name}.proj_out", torch.bmm(v, weights.transpose(1, 2)).view_as(x))

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.attention(f"{name}.mid.attn_1", self.block(f"{name}.mid.block_1", x))
        return self.block(f"{name}.mid.block_2", x)

    def level(self, name: str, level: int, blocks: int, x: Tensor) -> Tensor:
        for i in range(blocks):
            x = self.block(f"{name}.{level}.block.{i}", x)
            if 64 >> level in self.tokenizer.attention_at:
                x = self.attention(f"{name}.{level}.attn.{i}", x)
        return x

    def vectors(self, frames: Tensor) -> Tensor:
        """(N, 3, 64, 64) -> (N * K, D) float32."""
        name, x = "tokenizer.encoder", (frames - self.mean) / self.std
        if self.tokenizer.local:
            x = F.silu(self.conv(f"{name}.1", F.pixel_unshuffle(x, 4)))
            for i in (3, 5):
                x = F.silu(self.conv(f"{name}.{i}", x, stride=2))
            x = self.conv(f"{name}.7", x)
        else:
            x = self.conv(f"{name}.conv_in", x, padding=1)
            for level, blocks in enumerate(self.tokenizer.blocks):
                x = self.level(f"{name}.down", level, blocks, x)
                if level + 1 < len(self.tokenizer.blocks):
                    x = self.conv(f"{name}.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
            x = F.silu(self.norm(f"{name}.norm_out", self.middle(name, x)))
            x = self.conv(f"{name}.conv_out", x, padding=1)
        return self.conv("tokenizer.pre_quant_conv", x).permute(0, 2, 3, 1).flatten(0, 2).float()

    def nearest(self, vectors: Tensor) -> Tensor:
        with torch.autocast(vectors.device.type, enabled=False):
            codes = self.weights["tokenizer.embedding.weight"]
            squares = vectors.square().sum(1, keepdim=True) + codes.square().sum(1)
            return (squares - 2 * vectors @ codes.t()).argmin(dim=1)

    def reconstructions(self, codes: Tensor) -> Tensor:
        """(N * K, D) -> (N, 3, 64, 64), about in [0, 1]."""
        name, side = "tokenizer.decoder", math.isqrt(self.tokenizer.tokens_per_frame)
        x = codes.unflatten(0, (-1, side, side)).permute(0, 3, 1, 2).contiguous()
        x = self.conv("tokenizer.post_quant_conv", x)
        if self.tokenizer.local:
            x = self.conv(f"{name}.0", x, padding=1)
            for i in (1, 3):
                x = F.interpolate(self.block(f"{name}.{i}", x), scale_factor=2.0, mode="nearest")
                x = self.conv(f"{name}.{i + 1}.conv", x, padding=1)
            x = F.pixel_shuffle(self.conv(f"{name}.6", F.silu(x), padding=1), 4)
        else:
            x = self.middle(name, self.conv(f"{name}.conv_in", x, padding=1))
            for level, blocks in reversed(list(enumerate(self.tokenizer.blocks))):
                x = self.level(f"{name}.up", level, blocks + 1, x)
                if level > 0:
                    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                    x = self.conv(f"{name}.up.{level}.upsample.conv", x, padding=1)
            x = self.conv(f"{name}.conv_out", F.silu(self.norm(f"{name}.norm_out", x)), padding=1)
        return x.float() * self.std + self.mean

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        return self.nearest(self.vectors(frames)).view(len(frames), -1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        return self.reconstructions(self.weights["tokenizer.embedding.weight"][tokens.flatten()]).clamp(0, 1)

    def tokenizer_loss(self, frames: Tensor) -> Tensor:
        vectors = self.vectors(frames)
        codes = self.weights["tokenizer.embedding.weight"][self.nearest(vectors.detach())]
        error = self.reconstructions(vectors + (codes - vectors).detach()) - frames
        error = error / self.std if self.tokenizer.standardize else error
        worst = error.square().flatten(1).sort(dim=1).values[:, -self.tokenizer.worst_values :].mean()
        pixel = 0.1 * error.abs().mean() + error.square().mean() + self.tokenizer.worst_weight * worst
        commitment = F.mse_loss(vectors, codes.detach())
        return pixel + F.mse_loss(codes, vectors.detach()) + self.tokenizer.pixel_commitment_weight * commitment

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.world_model.dropout, self.training)

    def transformer(self, tokens: Tensor, cache: list | None) -> Tensor:
        """Tokens (N, T) after what the cache holds, a pair of tensors a layer -> (N, T, width)."""
        n, t = tokens.shape
        config, w, start = self.world_model, self.weights, cache[0][0].shape[2] if cache and cache[0] else 0
        places = torch.arange(start, start + t, device=tokens.device)
        acts = (places % config.block_size == config.tokens_per_frame)[:, None]  # (T, 1)
        frame_table, action_table = (w[f"world_model.embedder.embedding_tables.{i}.weight"] for i in (1, 0))
        of_frames = frame_table[tokens.clamp(max=len(frame_table) - 1)]
        x = torch.where(acts, action_table[tokens.clamp(max=len(action_table) - 1)], of_frames)
        x = self.dropout(x + w["world_model.pos_emb.weight"][places])
        future = places[:, None] < torch.arange(start + t, device=tokens.device)  # (T, start + T)
        for i in range(config.layers):
            name = f"world_model.transformer.blocks.{i}"
            h = F.layer_norm(x, (config.width,), *self.pair(f"{name}.ln1"))
            q, k, v = (
                self.linear(f"{name}.attn.{part}", h).view(n, t, config.heads, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            if cache is not None:
                if cache[i]:
                    k, v = torch.cat([cache[i][0], k], dim=2), torch.cat([cache[i][1], v], dim=2)
                cache[i] = (k, v)
            scores = (q @ k.transpose(2, 3)) / math.sqrt(k.shape[3])
            weights = self.dropout(scores.masked_fill(future, float("-inf")).softmax(dim=3))
            mixed = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(n, t, config.width)
            x = x + self.dropout(self.linear(f"{name}.attn.proj", mixed))
            h = F.layer_norm(x, (config.width,), *self.pair(f"{name}.ln2"))
            x = x + self.dropout(self.linear(f"{name}.mlp.2", F.gelu(self.linear(f"{name}.mlp.0", h))))
        return F.layer_norm(x, (config.width,), *self.pair("world_model.transformer.ln_f"))

    def head(self, name: str, x: Tensor) -> Tensor:
        name = f"world_model.head_{name}.head_module"
        return self.linear(f"{name}.2", F.relu(self.linear(f"{name}.0", x))).float()

    def world_model_loss(self, tokens: Tensor, actions: Tensor, rewards: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
        n, length, k = tokens.shape
        x = self.transformer(torch.cat([tokens, actions[..., None]], dim=2).flatten(1), None)
        x = x.view(n, length, k + 1, -1)
        ahead = torch.cat([x[:, :, : k - 1], x[:, :, k:]], dim=2).flatten(1, 2)[:, :-1]  # all but each 16th token
        labels = tokens.masked_fill(~mask[..., None], -100).flatten(1)[:, 1:]
        loss = F.cross_entropy(self.head("observations", ahead).flatten(0, 1), labels.flatten())
        for name, label in (("rewards", (rewards.sign() + 1).long()), ("ends", ends.long())):
            logits = self.head(name, x[:, :, k])
            loss = loss + F.cross_entropy(logits.flatten(0, 1), label.masked_fill(~mask, -100).flatten())
        return loss


class PlainDream:
    """The dream with a pass for each of a frame's 16 tokens and one for the action, as the published code takes."""

    def __init__(self, plain: Plain):
        self.plain = plain

    @torch.no_grad()
    def reset(self, frames: Tensor) -> Tensor:
        self.read = self.plain.encode(frames)  # (N, S), the text that the cache stands for
        self.cache: list = [()] * self.plain.world_model.layers
        self.plain.transformer(self.read, self.cache)
        return self.plain.decode(self.read)

    @torch.no_grad()
    def step(self, actions: Tensor, next_frame: bool = True):
        def draw(logits: Tensor) -> Tensor:
            return torch.distributions.Categorical(logits=logits[:, -1]).sample()

        config, unread = self.plain.world_model, actions[:, None]
        self.read = torch.cat([self.read, unread], dim=1)
        if self.read.shape[1] + (config.tokens_per_frame if next_frame else 0) > config.max_tokens:  # read half again
            unread = self.read = self.read[:, -(config.max_blocks // 2) * config.block_size :]
            self.cache = [()] * config.layers
        x = self.plain.transformer(unread, self.cache)
        rewards, ends = draw(self.plain.head("rewards", x)).float() - 1, draw(self.plain.head("ends", x)).bool()
        if not next_frame:
            return None, rewards, ends
        tokens = []
        for _ in range(config.tokens_per_frame):
            tokens.append(draw(self.plain.head("observations", x)))
            x = self.plain.transformer(tokens[-1][:, None], self.cache)
        self.read = torch.cat([self.read, *(token[:, None] for token in tokens)], dim=1)
        return self.plain.decode(torch.stack(tokens, dim=1)), rewards, ends


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass
class Options:
    """Measures the project beside a plain version of the same mathematics, and beside what the machine can do."""

    preset: Literal["paper", "laptop", "catch"] = "paper"  # Sizes
    device: str = "auto"  # cuda, cpu, ...
    tables: tuple[Literal["plain", "phases", "sharing"], ...] = ("phases", "plain", "sharing")  # What to print
    json: str = ""  # File to keep the figures in
    repeat: int = 3  # Repetitions of each measurement, of which the best counts
    updates: int = 0  # Phases: the policy's updates in the part of an epoch that is timed; 0 is 10 on a GPU, else 2
    seconds: float = 10.0  # Sharing: how long the runs are watched
    # For the program's own use: one measurement, in this process
    only: str = ""


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device: torch.device, repeat: int) -> float:
    for _ in range(repeat):  # the first times are slow ones: the memory is still being got from the system
        function()
    best = float("inf")
    for _ in range(repeat):
        synchronise(device)
        began = time.perf_counter()
        function()
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return best


def batch_of(args: Args, name: str, device: torch.device) -> int:
    """Samples that are timed at once: on a GPU the whole batch; on a CPU, where the cost of a sample does not depend on
    it, fewer."""
    whole, part = getattr(args, f"{name}_batch_size"), {"tokenizer": 32, "world_model": 16, "actor_critic": 16}[name]
    return whole if device.type == "cuda" else min(whole, part)


def ceiling(kind: str, dtype: torch.dtype, device: torch.device, args: Args, repeat: int) -> float:
    """GFLOP/s of the machine at nothing but products, or at the training of nothing but a convolution."""
    if kind == "product":
        a, b = torch.randn(4096, 1024, device=device, dtype=dtype), torch.randn(1024, 1024, device=device, dtype=dtype)
        return 2 * 4096 * 1024 * 1024 / timed(lambda: a @ b, device, 5 * repeat) / 1e9
    channels, n = max(args.tokenizer.channels), 256 if device.type == "cuda" else 32
    side = 64 >> args.tokenizer.channels.index(channels)  # the widest level, where it is largest
    layout = torch.contiguous_format if kind == "convolution, NCHW" else torch.channels_last
    x, weight = torch.randn(n, channels, side, side), torch.randn(channels, channels, 3, 3)
    x, weight = (t.to(device, dtype, memory_format=layout).requires_grad_() for t in (x, weight))
    gradient = torch.randn_like(x)
    flop = 3 * 2 * n * side * side * channels * channels * 9  # forwards, and backwards to input and weight

    def train() -> None:
        torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), gradient)

    return flop / timed(train, device, 2 * repeat) / 1e9


def measure(options: Options) -> dict:
    """One measurement, named `what/who/precision[/detail]`: seconds an item, GFLOP an item, peak memory."""
    what, who, precision, *detail = options.only.split("/")
    args = PRESETS[options.preset]
    device, _ = choose_device(Args(device=options.device, precision="fp32"))  # `auto` would measure, each time
    torch.manual_seed(0)
    if what in ("phases", "sharing"):
        return (phases if what == "phases" else share)(options, device, precision, compiled=who == "compiled")
    if what == "ceiling":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return {"gflops": ceiling(detail[0], dtype, device, args, options.repeat)}
    agent = build_agent(args, 4).to(device)
    torch.nn.init.normal_(agent.tokenizer.codebook.weight)  # so that tokens differ
    plain, ours = Plain(agent), who != "plain"
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")  # noqa: E731
    length, k = args.world_model.max_blocks, args.tokenizer.tokens_per_frame
    optimizers = make_optimizers(agent, args)
    plain_optimizer = torch.optim.Adam(plain.weights.values(), lr=1e-4)
    plain_actor_optimizer = torch.optim.Adam(agent.actor_critic.parameters(), lr=1e-4)

    def random_frames(*shape: int) -> Tensor:
        return torch.rand(*shape, 3, 64, 64, device=device)

    def learn(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if what == "tokenizer":
        n = batch_of(args, "tokenizer", device)
        frames = random_frames(n)
        agent.tokenizer.train()

        def run() -> None:
            with autocast():
                if ours:
                    z = agent.tokenizer.encoder_outputs(frames)
                    agent.tokenizer.codebook.revive(z.detach(), args.tokenizer.revive_after)
                    loss = sum(agent.tokenizer.loss(frames, z=z).values())
                else:
                    loss = plain.tokenizer_loss(frames)
            learn(loss, optimizers["tokenizer"] if ours else plain_optimizer)

    elif what in ("encode", "decode"):
        n = 64
        frames, tokens = random_frames(n), torch.randint(args.tokenizer.vocab_size, (n, k), device=device)

        def run() -> None:
            with autocast(), torch.no_grad():
                model = agent.tokenizer if ours else plain
                model.encode(frames) if what == "encode" else model.decode(tokens)

    elif what == "world_model":
        n = batch_of(args, "world_model", device)
        frames = random_frames(n, length)
        tokens = torch.randint(args.tokenizer.vocab_size, (n, length, k), device=device)
        actions, ends = (torch.randint(high, (n, length), device=device) for high in (4, 2))
        rewards, mask = torch.randn(n, length, device=device), torch.ones(n, length, dtype=torch.bool, device=device)
        agent.world_model.train()

        def run() -> None:
            with autocast():
                if ours:  # its frames are encoded once an epoch: see the epoch
                    loss = sum(agent.world_model.loss(tokens, actions, rewards, ends, mask).values())
                else:
                    seen = plain.encode(frames.flatten(0, 1)).view(n, length, k)
                    loss = plain.world_model_loss(seen, actions, rewards, ends, mask)
            learn(loss, optimizers["world_model"] if ours else plain_optimizer)

    elif what == "imagine":  # frames of a dream; the actions cost nothing
        n, horizon = (int(x) for x in detail)
        plain.training = False
        kind = CompiledDream if who == "compiled" else Dream
        dream = kind(agent.tokenizer, agent.world_model) if ours else PlainDream(plain)
        frames, actions = random_frames(n), torch.zeros(n, dtype=torch.int64, device=device)

        def run() -> None:
            with autocast(), torch.inference_mode() if who == "inference_mode" else nullcontext():
                dream.reset(frames)
                for _ in range(horizon - 1):
                    dream.step(actions)

        n *= horizon - 1

    elif what == "actor_critic":
        n, model = batch_of(args, "actor_critic", device), agent.actor_critic
        plain.training = False
        dream = Dream(agent.tokenizer, agent.world_model) if ours else PlainDream(plain)
        frames, first = random_frames(n, args.burn_in), random_frames(n)
        decoded, mask = to_stored(frames), torch.ones(n, args.burn_in, dtype=torch.bool, device=device)

        def run() -> None:
            with autocast():
                if ours:  # burn-in frames are decoded once an epoch: see the epoch
                    state = model.warm_up(to_model(decoded), mask)
                else:
                    state = model.initial_state(n)
                    with torch.no_grad():
                        seen = plain.decode(plain.encode(frames.flatten(0, 1))).view_as(frames)
                        for step in range(args.burn_in):
                            state = model(seen[:, step], state)[2]
                rollout = imagine(model, dream, dream.reset(first), state, args.horizon)
                losses, _ = actor_critic_loss(rollout, args.gamma, args.lambda_, args.entropy_weight)
            learn(sum(losses.values()), optimizers["actor_critic"] if ours else plain_actor_optimizer)

    elif what == "adam":  # a step of the world model's optimiser; who: fused or one operator for all weights of a kind
        n, optimizer = 1, optimizers["world_model"]
        if who == "plain":
            optimizer = torch.optim.AdamW(agent.world_model.parameter_groups(0.01), lr=1e-4)
        for parameter in agent.world_model.parameters():
            parameter.grad = torch.randn_like(parameter)
        run = optimizer.step

    elif what == "attention":  # of one position of 64 dreams to a stream half full; who: the type of the cache
        n, (layers, kind) = 1, (4, torch.bfloat16 if who == "bf16" else torch.float32)
        heads, width = args.world_model.heads, args.world_model.width // args.world_model.heads
        shape = (64, 2 * heads, args.world_model.max_tokens, width)
        caches = [torch.randn(shape, device=device).to(kind) for _ in range(layers)]
        query = torch.randn(64, heads, 1, width, device=device, dtype=kind)

        def run() -> None:
            for cache in caches:
                F.scaled_dot_product_attention(query, *cache[:, :, : shape[2] // 2].chunk(2, dim=1))

    elif what == "batch":  # getting a batch of the tokenizer's frames from a replay of 10,000
        n = 1
        with tempfile.TemporaryDirectory() as folder:
            replay = Replay(Path(folder))
            steps = np.zeros(10_000, STEP)
            steps["ends"][99::100] = 1
            replay.extend(steps)
            rng = np.random.default_rng(0)

            def draw() -> None:
                indices, _ = replay.sample(rng, args.tokenizer_batch_size, range(1), args.draw)
                replay.frames_at(indices[:, 0], device)

            return {"seconds": timed(draw, device, 10)}

    elif what == "operators":
        plain.training = False
        dream = Dream(agent.tokenizer, agent.world_model) if ours else PlainDream(plain)
        with autocast(), torch.no_grad():
            dream.reset(random_frames(2))
            dream.step(torch.zeros(2, dtype=torch.int64, device=device))
            return {"operators": operators(lambda: dream.step(torch.zeros(2, dtype=torch.int64, device=device)))}
    else:
        raise SystemExit(f"there is no measurement {options.only}")

    slow = what in ("imagine", "actor_critic") and device.type == "cpu"  # up to a minute each time
    seconds = timed(run, device, 1 if slow else options.repeat) / n
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    if who != "ours":
        return {"seconds": seconds, "peak_gb": peak / 1e9}
    with FlopCounterMode(display=False) as counter:
        run()
    return {"seconds": seconds, "peak_gb": peak / 1e9, "gflop": counter.get_total_flops() / n / 1e9}


def operators(function) -> int:
    """How many operators of a call compute: each is taken apart into those it is made of, and those are not counted
    whose output is a view of an input, or memory that nothing was written to. On a GPU each costs a launch or more."""
    count: Counter = Counter()

    def places(x) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in tree_leaves(x) if isinstance(t, Tensor)}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            with self:
                parts = function.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
            output = function(*args, **(kwargs or {}))
            is_view = places(output) and places(output) <= places((args, kwargs)) and not function._schema.is_mutable
            if not is_view and "empty" not in str(function):
                count[str(function)] += 1
            return output

    with Watch():
        function()
    return count.total()


# --- epochs ----------------------------------------------------------------------------------------------------------

FRAMES = 10_000  # in replay, for the time that their tokens take
MODES = {
    "ours/bf16": "bf16", "compiled/bf16": "bf16, --compile", "ours/fp32": "fp32", "compiled/fp32": "fp32, --compile",
}  # fmt: skip


def begin_run(options: Options, device: torch.device, precision: str, compiled: bool, folder: str) -> iris_train.Run:
    """A run that has played a little. With the paper's sizes it has a perceptual loss of random weights."""
    args = dataclasses.replace(
        PRESETS[options.preset], device=str(device), precision=precision, compile=compiled, perceptual_loss="pixel",
        run_dir=folder, collect_steps=64,
    )  # fmt: skip
    run = iris_train.build(args)
    if options.preset == "paper":
        run.lpips = random_lpips().to(device)
    iris_train.collect(run)
    return run


def random_lpips() -> Lpips:
    """The paper's perceptual loss, without its 530 MB of weights: the time does not depend on them."""
    convolutions, channels, index = {}, 3, 0
    for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in widths:
            convolutions[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3) / (3 * channels**0.5)
            convolutions[f"features.{index}.bias"] = torch.zeros(width)
            channels, index = width, index + 2
        index += 1
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    return Lpips(convolutions, linear)


def part_of_epoch(run: iris_train.Run, updates: int) -> dict[str, float]:
    """Trains the part of an epoch in which the policy has this many updates -> each phase's seconds for a whole epoch.
    All frames in replay are given tokens, as after a tokenizer's training; the seconds are those of FRAMES."""
    args, whole, seconds = run.args, PRESETS[run.args.preset], {}

    def timed_phase(name: str, scale: float, function: Callable, *arguments) -> None:
        synchronise(run.device)
        began = time.perf_counter()
        function(run, *arguments)
        synchronise(run.device)
        seconds[name] = (time.perf_counter() - began) * scale

    def steps(name: str) -> float:  # sets the part's steps -> how many times they fit into an epoch
        count = max(1, getattr(whole, name) * updates // whole.actor_critic_steps)
        setattr(args, name, count)
        return getattr(whole, name) / count

    def train(name: str) -> None:
        losses_of = getattr(iris_train, f"{name}_losses")
        timed_phase(name, steps(f"{name}_steps"), iris_train.optimise, name, losses_of)

    timed_phase("play", steps("collect_steps"), iris_train.collect)
    train("tokenizer")
    run.tokens = None
    timed_phase("tokens", FRAMES / len(run.replay), iris_train.encode_replay)
    train("world_model")
    train("actor_critic")
    return seconds


def phases(options: Options, device: torch.device, precision: str, compiled: bool) -> dict:
    """Seconds of an epoch's phases, peak memory in GB, and launches of a dreamed frame (on a CPU: operators)."""
    with tempfile.TemporaryDirectory() as folder:
        run = begin_run(options, device, precision, compiled, folder)
        updates = options.updates or (10 if device.type == "cuda" else 2)
        part_of_epoch(run, 3 if device.type == "cuda" else 1)  # warms up; three dreams compile, record and replay
        result: dict = part_of_epoch(run, updates)
        result["peak_gb"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
        if device.type == "cuda":
            result["peak_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
        frames = run.replay.frames_at(np.zeros(run.args.actor_critic_batch_size, np.int64), device)
        actions = torch.zeros(len(frames), dtype=torch.int64, device=device)
        with run.autocast(), torch.no_grad():
            run.dream.reset(frames)
            run.dream.step(actions)
            if device.type == "cuda":
                result["launches"] = launches(lambda: run.dream.step(actions))
            elif not compiled:
                result["launches"] = operators(lambda: run.dream.step(actions))
        return result


STARTS = re.compile(r"(cuda|cu|hip)(Graph|Module)?(Launch|Mem(cpy|set)\w*Async)")


def launches(function) -> int:
    """How often a call makes the host start something on the GPU: a kernel, a copy, or a whole CUDA graph."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return sum(STARTS.match(event.name) is not None for event in profile.events())


def share(options: Options, device: torch.device, precision: str, compiled: bool) -> dict:
    """One of the runs that share the machine: gets ready, waits for a line, and then works until its time is over."""
    with tempfile.TemporaryDirectory() as folder:
        run = begin_run(options, device, precision, compiled, folder)
        part_of_epoch(run, 3 if device.type == "cuda" else 1)
        print("ready", flush=True)
        sys.stdin.readline()
        began, updates, spent = time.perf_counter(), 0, 0.0
        while spent < options.seconds:
            part_of_epoch(run, 1)
            updates, spent = updates + 1, time.perf_counter() - began
        return {"epochs_per_hour": 3600 * updates / spent / PRESETS[options.preset].actor_critic_steps}


def run_together(command: list[str], count: int) -> float:
    """Starts `count` processes of `share` at once, each with its share of the threads -> epochs an hour of them all.
    Raises RuntimeError if one of them fails: then that many do not fit."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    children = [subprocess.Popen(command, **pipes, text=True, env=environment) for _ in range(count)]
    try:
        ready = [child.stdout.readline() == "ready\n" for child in children]
        for child in children if all(ready) else ():
            child.stdin.write("go\n")
            child.stdin.flush()
        if not all(ready):
            raise RuntimeError(last_line(children[ready.index(False)].communicate()[1]))
        total = 0.0
        for child in children:
            output, errors = child.communicate()
            if child.returncode:
                raise RuntimeError(last_line(errors))
            total += json.loads(output.splitlines()[-1])["epochs_per_hour"]
        return total
    finally:
        for child in children:
            child.kill()
            child.wait()


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


# --- the tables ------------------------------------------------------------------------------------------------------

ITEMS = {
    "tokenizer": "tokenizer training, a frame",
    "encode": "encode, a frame",
    "decode": "decode, a frame",
    "world_model": "world model training, a sequence",
    "imagine": "imagine 64 dreams, a frame",
    "actor_critic": "actor-critic training, a dream",
}


def main(options: Options) -> None:
    figures: dict[str, dict] = {}
    failed: list[str] = []
    base = [sys.executable, __file__, "--preset", options.preset, "--device", options.device]
    base += ["--repeat", str(options.repeat), "--updates", str(options.updates), "--seconds", str(options.seconds)]

    def figure(name: str, count: int = 1) -> dict:
        """A measurement in a process of its own; with "sharing/...", in `count` of them at once."""
        command, key = [*base, "--only", name], f"{name}/{count}" if name.startswith("sharing") else name
        if key not in figures:
            if sys.stderr.isatty():
                print(f"\r{key:60}", end="", file=sys.stderr, flush=True)
            try:
                if name.startswith("sharing"):
                    figures[key] = {"epochs_per_hour": run_together(command, count)}
                else:
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise RuntimeError(last_line(done.stderr))
                    figures[key] = json.loads(done.stdout.splitlines()[-1])
            except RuntimeError as error:
                failed.append(f"{key} ({error})")
                figures[key] = defaultdict(lambda: math.nan)
        return figures[key]

    device, bf16 = choose_device(dataclasses.replace(PRESETS[options.preset], device=options.device))
    print(f"\n{options.preset} sizes, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'no GPU'}", flush=True)  # fmt: skip
    if "phases" in options.tables:
        print_phases(options, figure, device)
    if "plain" in options.tables:
        print_comparison(options, figure)
    if "sharing" in options.tables:
        print_sharing(options, figure, device, "bf16" if bf16 else "fp32")
    if options.json:
        content = {"options": dataclasses.asdict(options), "torch": torch.__version__, "figures": figures}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    if failed:
        raise SystemExit("error: these measurements failed: " + "; ".join(failed))


def print_phases(options: Options, figure: Callable, device: torch.device) -> None:
    """A row for each way to compute, as soon as it is measured. Compiling is for GPUs: see `iris_train.Args`."""
    whole, cuda = PRESETS[options.preset], device.type == "cuda"
    columns = [f"play, {whole.collect_steps:,} steps", f"tokens of {FRAMES:,} frames"]
    for name, unit in (("tokenizer", "frames"), ("world_model", "sequences"), ("actor_critic", "dreams")):
        steps, size = getattr(whole, f"{name}_steps"), getattr(whole, f"{name}_batch_size")
        columns.append(f"{name.replace('_', ' ')}, {steps:,} x {size} {unit}")
    columns += ["all", "peak GB", f"{'launches' if cuda else 'operators'} a dreamed frame"]
    print(f"\n| an epoch, s | {' | '.join(columns)} |\n{'| --- ' * (1 + len(columns))}|", flush=True)
    for mode, text in MODES.items():
        if cuda or mode.startswith("ours"):
            row = figure(f"phases/{mode}")
            seconds = [row[name] for name in ("play", "tokens", "tokenizer", "world_model", "actor_critic")]
            shown = " | ".join(f"{value:.1f}" for value in (*seconds, sum(seconds), row["peak_gb"]))
            print(f"| {text} | {shown} | {row['launches']:,} |", flush=True)


def print_sharing(options: Options, figure: Callable, device: torch.device, precision: str) -> None:
    """Runs at once: up to eight on a GPU, on a CPU up to one a thread."""
    print(f"\n| runs at once, {precision} | epochs an hour, all together | of one run |", flush=True)
    print("| --- | --- | --- |", flush=True)
    for count in (1, 2, 4, 8):
        if device.type == "cuda" or count <= torch.get_num_threads():
            alone, speed = (figure(f"sharing/ours/{precision}", n)["epochs_per_hour"] for n in (1, count))
            print(f"| {count} | {speed:.2f} | {speed / alone:.0%} |", flush=True)


def print_comparison(options: Options, figure: Callable) -> None:
    """The project beside its plain version, beside the machine, and ideas alone."""
    args = PRESETS[options.preset]
    ceilings = {}
    for kind in ("product", "convolution, NCHW", "convolution, channels last"):
        ceilings[kind] = [figure(f"ceiling/ours/{precision}/{kind}")["gflops"] for precision in ("fp32", "bf16")]
    print("\n| the machine alone, GFLOP/s | fp32 | bf16 |\n| --- | --- | --- |")
    for kind, speeds in ceilings.items():
        training = "" if kind == "product" else ", forwards and backwards"
        print(f"| {kind}{training} | {speeds[0]:.0f} | {speeds[1]:.0f} |")

    print("\n| what | plain fp32, ms | ours fp32, ms | of plain | ours bf16, ms | of plain | ours GFLOP | GFLOP/s fp32, bf16"
          " | share of ceiling | peak GB plain, fp32, bf16 |")  # fmt: skip
    print("| --- " * 10 + "|")
    detail = {"imagine": f"/64/{args.horizon}"}
    for what, text in ITEMS.items():
        rows = [figure(f"{what}/{who}{detail.get(what, '')}") for who in ("plain/fp32", "ours/fp32", "ours/bf16")]
        plain, fp32, bf16 = (row["seconds"] for row in rows)
        gflop = rows[1]["gflop"]
        # What is mostly convolutions is held against the better convolution, the rest against the product.
        top = ceilings["product"]
        if what != "world_model":
            top = [max(pair) for pair in zip(ceilings["convolution, NCHW"], ceilings["convolution, channels last"])]
        speeds = gflop / fp32, gflop / bf16
        print(
            f"| {text} | {plain * 1e3:.1f} | {fp32 * 1e3:.1f} | {fp32 / plain:.0%} | {bf16 * 1e3:.1f} | {bf16 / plain:.0%} "
            f"| {gflop:.2f} | {speeds[0]:.0f}, {speeds[1]:.0f} | {speeds[0] / top[0]:.0%}, {speeds[1] / top[1]:.0%} "
            f"| {', '.join(f'''{row['peak_gb']:.1f}''' for row in rows)} |"
        )

    def epoch(who: str, precision: str, replay: int) -> float:
        """Seconds of an epoch with all three phases."""

        def cost(what: str) -> float:
            return figure(f"{what}/{who}/{precision}{detail.get(what, '')}")["seconds"]

        phases = ("tokenizer", "world_model", "actor_critic")
        total = sum(getattr(args, f"{x}_steps") * getattr(args, f"{x}_batch_size") * cost(x) for x in phases)
        if who == "ours":  # encode all frames once, and decode them once or whenever the LSTM is warmed up
            warmed_up = args.actor_critic_steps * args.actor_critic_batch_size * args.burn_in
            total += replay * cost("encode") + min(replay, warmed_up) * cost("decode")
        return total

    plain = epoch("plain", "fp32", 10_000)
    print("\n| an epoch, extrapolated | hours | of plain |\n| --- | --- | --- |")
    print(f"| plain, float32 | {plain / 3600:.2f} | 100% |")
    for precision in ("fp32", "bf16"):
        for replay in (1_000, 10_000, 100_000):
            seconds = epoch("ours", precision, replay)
            print(f"| ours, {precision}, {replay:,} frames in replay | {seconds / 3600:.2f} | {seconds / plain:.0%} |")

    counts = [figure(f"operators/{who}")["operators"] for who in ("plain/fp32", "ours/fp32", "ours/bf16")]
    print("\n| operators that compute | plain | ours fp32 | ours bf16 |\n| --- | --- | --- | --- |")
    print(f"| a dreamed frame | {counts[0]:,} | {counts[1]:,} | {counts[2]:,} |")

    print("\n| imagined frames/s, ours | fp32 | bf16 |\n| --- | --- | --- |")
    h = args.horizon
    for n, horizon in ((1, h), (8, h), (64, h // 2), (64, h), (64, 2 * h)):
        speeds = [1 / figure(f"imagine/ours/{precision}/{n}/{horizon}")["seconds"] for precision in ("fp32", "bf16")]
        print(f"| {n} dreams of {horizon} frames | {speeds[0]:.1f} | {speeds[1]:.1f} |")

    print("\n| an idea alone, ms | without | with |\n| --- | --- | --- |")
    whole = f"/64/{args.horizon}"
    for text, without, with_it in (
        ("fused AdamW, a step of the world model", "adam/plain/fp32", "adam/ours/fp32"),
        ("cache in float32 and not bfloat16: attention of 4 layers", "attention/bf16/bf16", "attention/fp32/fp32"),
        ("a dreamed frame of 64, --compile", f"imagine/ours/fp32{whole}", f"imagine/compiled/fp32{whole}"),
        ("a dreamed frame of 1, inference_mode", f"imagine/ours/fp32/1/{h}", f"imagine/inference_mode/fp32/1/{h}"),
    ):  # fmt: skip
        print(f"| {text} | {figure(without)['seconds'] * 1e3:.2f} | {figure(with_it)['seconds'] * 1e3:.2f} |")
    batch = figure("batch/ours/fp32")["seconds"]
    step = figure("tokenizer/ours/bf16")["seconds"] * args.tokenizer_batch_size
    print(f"| prefetching: getting a batch takes {batch * 1e3:.1f} ms of a tokenizer step's | {step * 1e3:.0f} | |")


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if chosen.only:
        print(json.dumps(measure(chosen)))
    else:
        main(chosen)
