"""What the published code computes, written down once more without its structure: plain functions on its weights.

These are the oracle of the tests, so they share nothing with the files under test: separate query, key and value
products, masked softmax, no cache, loops instead of tricks. A state dict in the published format comes from
`official_state_dict`, whose names and shapes are those of the published checkpoints.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F


def official_shapes(num_actions: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a published checkpoint, buffers left out."""
    shapes = {}
    for line in (Path(__file__).parent / "golden/official_checkpoint_keys.txt").read_text().splitlines():
        name, kind, shape = line.split()
        if kind == "float32" and not name.endswith("attn.mask"):
            shapes[name] = tuple(map(int, shape.split("x")))
    for layer in ("world_model.embedder.embedding_tables.0", "actor_critic.actor_linear"):  # the list has 4 actions
        for name in {f"{layer}.weight", f"{layer}.bias"} & shapes.keys():
            shapes[name] = (num_actions, *shapes[name][1:])
    return shapes


def official_state_dict(num_actions: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in the published format, large enough that no part of the network fades out, and its buffers."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in official_shapes(num_actions).items():
        fan_in = math.prod(shape[1:]) or 1
        scale = 1 / math.sqrt(fan_in) if len(shape) > 1 and "emb" not in name else 0.3
        weights[name] = torch.randn(shape, generator=generator) * scale
        if len(shape) == 1 and name.endswith(".weight"):
            weights[name] += 1  # norms
    for i in range(10):
        weights[f"world_model.transformer.blocks.{i}.attn.mask"] = torch.tril(torch.ones(340, 340))
    for head, size in (("observations", 320), ("rewards", 20), ("ends", 20)):
        weights[f"world_model.head_{head}.indices"] = torch.arange(size)
    weights["tokenizer.lpips.lin0.model.1.weight"] = torch.ones(1, 64, 1, 1)
    return weights


class Weights:
    """The weights below a prefix, by name."""

    def __init__(self, weights: dict[str, torch.Tensor], prefix: str):
        self.weights, self.prefix = weights, prefix

    def __truediv__(self, name) -> "Weights":
        return Weights(self.weights, f"{self.prefix}.{name}")

    @property
    def pair(self):
        return self.weights[f"{self.prefix}.weight"], self.weights[f"{self.prefix}.bias"]


def group_norm(w: Weights, x):
    n, c, h, wd = x.shape
    groups = x.reshape(n, 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(n, c, h, wd)
    weight, bias = w.pair
    return normed * weight[None, :, None, None] + bias[None, :, None, None]


def swish(x):
    return x / (1 + (-x).exp())


def block(w: Weights, x):
    h = F.conv2d(swish(group_norm(w / "norm1", x)), *(w / "conv1").pair, padding=1)
    return x + F.conv2d(swish(group_norm(w / "norm2", h)), *(w / "conv2").pair, padding=1)


def attention(w: Weights, x):
    n, c, height, width = x.shape
    h = group_norm(w / "norm", x)
    q, k, v = (F.conv2d(h, *(w / part).pair).reshape(n, c, -1) for part in "qkv")
    scores = torch.einsum("nci,ncj->nij", q, k) / math.sqrt(c)
    mixed = torch.einsum("nij,ncj->nci", scores.softmax(-1), v).reshape(n, c, height, width)
    return x + F.conv2d(mixed, *(w / "proj_out").pair)


def middle(w: Weights, x):
    return block(w / "mid.block_2", attention(w / "mid.attn_1", block(w / "mid.block_1", x)))


def encoder_outputs(weights, frames):
    """Frames in [0, 1] -> vectors before quantisation (N, 512, 4, 4)."""
    w = Weights(weights, "tokenizer.encoder")
    x = F.conv2d(frames * 2 - 1, *(w / "conv_in").pair, padding=1)
    for level in range(5):
        for i in range(2):
            x = block(w / f"down.{level}.block.{i}", x)
            if level in (2, 3):
                x = attention(w / f"down.{level}.attn.{i}", x)
        if level < 4:
            padded = torch.zeros(x.shape[0], 64, x.shape[2] + 1, x.shape[3] + 1)
            padded[:, :, :-1, :-1] = x
            x = F.conv2d(padded, *(w / f"down.{level}.downsample.conv").pair, stride=2)
    x = swish(group_norm(w / "norm_out", middle(w, x)))
    x = F.conv2d(x, *(w / "conv_out").pair, padding=1)
    return F.conv2d(x, *Weights(weights, "tokenizer.pre_quant_conv").pair)


def encode(weights, frames):
    """-> tokens (N, 16), by comparing each vector with each code."""
    z = encoder_outputs(weights, frames).permute(0, 2, 3, 1).reshape(-1, 512)
    codes = weights["tokenizer.embedding.weight"]
    return torch.stack([(codes - row).square().sum(1).argmin() for row in z]).reshape(-1, 16)


def decode(weights, tokens):
    w = Weights(weights, "tokenizer.decoder")
    z = weights["tokenizer.embedding.weight"][tokens].permute(0, 2, 1).reshape(-1, 512, 4, 4)
    x = F.conv2d(z, *Weights(weights, "tokenizer.post_quant_conv").pair)
    x = middle(w, F.conv2d(x, *(w / "conv_in").pair, padding=1))
    for level in (4, 3, 2, 1, 0):
        for i in range(3):
            x = block(w / f"up.{level}.block.{i}", x)
            if level in (2, 3):
                x = attention(w / f"up.{level}.attn.{i}", x)
        if level > 0:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = F.conv2d(x, *(w / f"up.{level}.upsample.conv").pair, padding=1)
    x = F.conv2d(swish(group_norm(w / "norm_out", x)), *(w / "conv_out").pair, padding=1)
    return ((x + 1) / 2).clamp(0, 1)


def layer_norm(w: Weights, x):
    weight, bias = w.pair
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def world_model(weights, stream):
    """A stream (N, T) of 16 frame tokens and an action, again and again -> for each position a dict of logits (N, ...)
    with those of "observations", "rewards" and "ends" that the published code predicts there."""
    w = Weights(weights, "world_model")
    frame_table = weights["world_model.embedder.embedding_tables.1.weight"]
    action_table = weights["world_model.embedder.embedding_tables.0.weight"]
    columns = []
    for position in range(stream.shape[1]):
        table = action_table if position % 17 == 16 else frame_table
        columns.append(table[stream[:, position]] + weights["world_model.pos_emb.weight"][position])
    x = torch.stack(columns, dim=1)
    n, t, width = x.shape
    future = torch.ones(t, t).triu(1).bool()
    for i in range(10):
        layer = w / f"transformer.blocks.{i}"
        h = layer_norm(layer / "ln1", x)
        q, k, v = (
            F.linear(h, *(layer / f"attn.{part}").pair).reshape(n, t, 4, 64).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = (q @ k.transpose(-2, -1) / 8).masked_fill(future, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, width)
        x = x + F.linear(mixed, *(layer / "attn.proj").pair)
        h = F.linear(layer_norm(layer / "ln2", x), *(layer / "mlp.0").pair)
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + F.linear(h, *(layer / "mlp.2").pair)
    x = layer_norm(w / "transformer.ln_f", x)

    def head(name, at):
        h = F.linear(at, *(w / f"head_{name}.head_module.0").pair).clamp(min=0)
        return F.linear(h, *(w / f"head_{name}.head_module.2").pair)

    outputs = []
    for position in range(t):
        place, at = position % 17, x[:, position]
        here = {"observations": head("observations", at)} if place != 15 else {}
        if place == 16:
            here |= {"rewards": head("rewards", at), "ends": head("ends", at)}
        outputs.append(here)
    return outputs


def actor_critic(weights, frames, state):
    """One frame (N, 3, 64, 64) in [0, 1] -> policy logits, values, state."""
    w = Weights(weights, "actor_critic")
    x = frames * 2 - 1
    for i in range(1, 5):
        x = F.conv2d(x, *(w / f"conv{i}").pair, padding=1)
        n, c, h, wd = x.shape
        x = x.reshape(n, c, h // 2, 2, wd // 2, 2).amax(dim=(3, 5)).clamp(min=0)
    hidden, cell = state
    gates = F.linear(x.flatten(1), weights["actor_critic.lstm.weight_ih"], weights["actor_critic.lstm.bias_ih"])
    gates = gates + F.linear(hidden, weights["actor_critic.lstm.weight_hh"], weights["actor_critic.lstm.bias_hh"])
    i, f, g, o = gates.chunk(4, dim=1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return F.linear(hidden, *(w / "actor_linear").pair), F.linear(hidden, *(w / "critic_linear").pair)[:, 0], (hidden, cell)
