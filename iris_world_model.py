"""Chapter 2 of IRIS: a GPT learns how the game goes on, and can then be played in its place.

With frames as short sentences of tokens (chapter 1), a game is one long text: 16 tokens of what was seen, one for the
action taken, 16 tokens of what was seen next, and so on. This file trains a GPT to continue that text, and to tell at
each action which reward it brings and whether the episode ends (IRIS paper, section 2.2 and appendix). Trained on
two hours of play it is a world model: `Dream` samples from it, action by action, and is an environment to step in.

    z = frame token, a = action; a block is 16 z and 1 a; the stream holds 20 blocks, 340 positions

      z1   z2   ...  z15   z16   a  |  z1   z2  ...       what enters, one vector of width 256 each
      |    |          |     |    |     |    |
    [ 10 transformer layers: each position sees itself and what is left of it ]
      |    |          |     |    |     |    |
      z2   z3   ...  z16    -    z1    z2   z3  ...       next frame token: everywhere but at the 16th token, whose
                                 reward, end              successor is the player's free choice; reward and end at a

Run it alone:   python iris_world_model.py     (under two minutes on a laptop: Breakout frames, a small tokenizer, a
                                                small world model, and a real continuation above a dreamed one)
Reuse it:       copy this file and iris_tokenizer.py; `WorldModel` alone needs torch only.

    world_model = WorldModel(vocab_size=512, num_actions=4, config=WorldModelConfig())
    sum(world_model.loss(obs_tokens, actions, rewards, ends, mask).values()).backward()
    dream = Dream(tokenizer, world_model)
    frames = dream.reset(frames)                       # (N, 3, 64, 64): N dreams begin
    frames, rewards, ends = dream.step(actions)        # (N,): and go on
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris_tokenizer import IrisError, Tokenizer, random_breakout, save_picture, to_model, train_small_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# The transformer
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class WorldModelConfig:
    """Sizes of the world model. The defaults are the paper's (its appendix and published configuration)."""

    tokens_per_frame: int = 16
    """Tokens of a frame, K; the tokenizer's number of levels decides it (5 levels: 4x4)."""
    max_blocks: int = 20
    """Time steps that the transformer sees at once; it is also the length of its training sequences."""
    layers: int = 10
    """Transformer layers."""
    heads: int = 4
    """Attention heads; they share the width."""
    width: int = 256
    """Width of the embeddings and of the residual stream."""
    dropout: float = 0.1
    """Dropout of embeddings, attention weights and residual branches."""

    @property
    def block(self) -> int:
        return self.tokens_per_frame + 1

    @property
    def max_tokens(self) -> int:
        return self.max_blocks * self.block


@dataclass
class Cache:
    """Keys and values of the positions read so far, so that a new position costs one pass, not a pass of them all.

    Preallocated for the longest stream: appending writes in place, where growing would copy all that is there.
    """

    # (layers, N, 2 * heads, max_tokens, width / heads): the heads' keys, then their values. A list for compiled passes
    kv: Tensor | list[Tensor]
    size: int = 0  # positions filled; a Python number, so that asking for it never waits for the GPU


@dataclass
class WorldModelOutput:
    """Logits at those positions of the pass that predict something, in the order of the stream (see `WorldModel`)."""

    observation_logits: Tensor  # (N, positions but each frame's last token, V)
    reward_logits: Tensor  # (N, action positions, 3), for rewards -1, 0, 1
    end_logits: Tensor  # (N, action positions, 2), for going on and ending


class Linear(nn.Module):
    """Rows (M, inputs) -> (M, outputs): rows @ weight + bias.

    `nn.Linear` stores its weight the other way round and turns it in every call. A dreamed frame takes 670 products,
    each of a few microseconds: what is not done at all is the fastest.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.addmm(self.bias, rows, self.weight)


class Layer(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x)). Shape (N * T, width) is kept."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = Linear(config.width, 3 * config.width)  # queries, keys and values in one product
        self.attention_out = Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        inner = 4 * config.width
        self.mlp = nn.Sequential(Linear(config.width, inner), nn.GELU(), Linear(inner, config.width))

    def forward(self, x: Tensor, n: int, past: "Past | None") -> Tensor:
        t = len(x) // n
        qkv = self.qkv(self.attention_norm(x))
        # (N, 3 * heads, T, width / heads). A dream goes position by position, and a single one needs no transposing.
        qkv = qkv.view(n, 3 * self.heads, 1, -1) if t == 1 else qkv.view(n, t, 3 * self.heads, -1).transpose(1, 2)
        q, kv = qkv.split([self.heads, 2 * self.heads], dim=1)
        if past is None:
            k, v = kv.chunk(2, dim=1)
            dropout = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            dtype = past.cache.dtype
            past.cache.index_copy_(2, past.positions, kv.to(dtype))  # k and v below are views of the cache, and see it
            with torch.autocast(x.device.type, enabled=False):
                attended = F.scaled_dot_product_attention(q.to(dtype), past.k, past.v, attn_mask=past.mask)
        attended = attended if t == 1 else attended.transpose(1, 2)  # (N, T, heads, width / heads)
        x = x + F.dropout(self.attention_out(attended.reshape(x.shape)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


class Past(NamedTuple):
    """What one layer is to know of the cache (see `WorldModel.read`)."""

    cache: Tensor  # (N, 2 * heads, max_tokens, width / heads), to write into
    positions: Tensor  # (T,), where
    k: Tensor  # (N, heads, filled, width / heads), to attend over
    v: Tensor
    mask: Tensor | None  # (T, filled), True where a position may look; None is everywhere


class WorldModel(nn.Module):
    """The transformer over frame tokens and actions (paper, section 2.2). 8,447,493 parameters with 4 actions.

    A stream of tokens (N, T) int64 begins with a frame's first token; at the positions p with p % 17 == 16 it holds
    actions, in [0, num_actions), elsewhere frame tokens, in [0, vocab_size).
    """

    def __init__(self, vocab_size: int, num_actions: int, config: WorldModelConfig):
        super().__init__()
        self.vocab_size, self.num_actions, self.config = vocab_size, num_actions, config
        # Frame tokens and actions have an embedding table each; stacked, one look-up serves a mixed stream.
        self.embedding = nn.Embedding(vocab_size + num_actions, config.width)
        self.position_embedding = nn.Embedding(config.max_tokens, config.width)
        for table in (self.embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)

        def head(outputs: int) -> nn.Sequential:
            return nn.Sequential(Linear(config.width, config.width), nn.ReLU(), Linear(config.width, outputs))

        self.observation_head, self.reward_head, self.end_head = head(vocab_size), head(3), head(2)

        # What stands where in a stream of full length. Buffers, so that they are on the device already when needed.
        positions = torch.arange(config.max_tokens)
        place = positions % config.block  # of a position within its block
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("table_offset", (place == config.tokens_per_frame) * vocab_size, persistent=False)
        self.register_buffer("observation_at", (place != config.tokens_per_frame - 1).nonzero()[:, 0], persistent=False)
        self.register_buffer("causal", positions[:, None] >= positions, persistent=False)

    def empty_cache(self, n: int) -> Cache:
        """A cache for n streams, with nothing read yet. Under autocast it is in bfloat16 on a GPU, but not on a CPU,
        whose attention takes twice as long for a single position in bfloat16 as in float32."""
        config, weight = self.config, self.embedding.weight
        kind = weight.device.type
        half = kind != "cpu" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if half else weight.dtype
        shape = (config.layers, n, 2 * config.heads, config.max_tokens, config.width // config.heads)
        return Cache(weight.new_zeros(shape, dtype=dtype))

    def read(self, rows: Tensor, positions: Tensor, kv: Tensor | None = None, filled: int | None = None) -> Tensor:
        """The transformer without its heads: -> what it thinks at each position, (N * T, width).

        `rows` (N, T) int64 are rows of the embedding table: frame tokens as they are, actions with vocab_size added.
        They stand at `positions` (T,). Without a cache these start the stream. With one (`kv`, see `Cache`) they are
        written into it, and look at its first `filled` positions; where `filled` is None at all of it, under a mask,
        so that no shape depends on the position (for `torch.compile`, which else would compile each position anew).
        """
        n, t = rows.shape
        x = self.embedding(rows) + self.position_embedding(positions)  # (N, T, width)
        x = F.dropout(x, self.config.dropout, self.training).view(n * t, -1)
        pasts = [None] * len(self.layers)
        if kv is not None:
            mask = self.causal[positions, :filled] if t > 1 or filled is None else None
            if filled is None:
                pasts = [Past(cache, positions, *cache.chunk(2, dim=1), mask) for cache in kv]
            else:  # the views of all layers, in four operators
                keys, values = (half.unbind() for half in kv[..., :filled, :].chunk(2, dim=2))
                pasts = [Past(*layer, mask) for layer in zip(kv, [positions] * len(kv), keys, values, strict=True)]
        for layer, past in zip(self.layers, pasts, strict=True):
            x = layer(x, n, past)
        return self.final_norm(x)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> WorldModelOutput:
        """Tokens (N, T) -> logits at the positions of this pass.

        Without a cache the stream starts here. With one, it continues the positions that the cache holds, the cache
        grows by T, and no gradient reaches the transformer. Raises ValueError when the stream becomes longer than
        max_tokens.
        """
        n, t = tokens.shape
        start = 0 if cache is None else cache.size
        stop = start + t
        if stop > self.config.max_tokens:
            raise ValueError(f"a stream of {stop} tokens is longer than the world model's {self.config.max_tokens}")
        rows, positions = tokens + self.table_offset[start:stop], self.positions[start:stop]
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = self.read(rows, positions, cache.kv if cache else None, stop).view(n, t, -1)  # (N, T, width)
        if cache is not None:
            cache.size = stop

        # Heads cost as much as a layer, so they look only where they have something to say.
        observing = self.observation_at[self._observations_before(start) : self._observations_before(stop)] - start
        acting = self.positions[(self.config.tokens_per_frame - start) % self.config.block : t : self.config.block]

        def at(places: Tensor, head: nn.Sequential) -> Tensor:
            logits = head(x[:, places].flatten(0, 1))
            return logits.view(n, len(places), logits.shape[1])

        return WorldModelOutput(
            at(observing, self.observation_head), at(acting, self.reward_head), at(acting, self.end_head)
        )

    def _observations_before(self, position: int) -> int:
        """How many positions left of this one predict a frame token: 16 in a whole block, all but the 16th of 17."""
        blocks, rest = divmod(position, self.config.block)
        return blocks * self.config.tokens_per_frame + min(rest, self.config.tokens_per_frame - 1)

    def loss(
        self, obs_tokens: Tensor, actions: Tensor, rewards: Tensor, ends: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Three cross-entropies, whose sum is minimised (paper, section 2.2).

        obs_tokens (N, L, K) int64, actions (N, L) int64, rewards (N, L) of which only the sign counts, ends (N, L) in
        {0, 1}; mask (N, L) is True where the step is real and False where it pads a sequence on its right.
        """
        n, length, k = obs_tokens.shape
        output = self(torch.cat([obs_tokens, actions[..., None]], dim=2).reshape(n, length * (k + 1)))
        # Each frame token is predicted by the position before it; the very first of the sequence by none, and the frame
        # that the last action leads to is not in the sequence. -100 is what cross_entropy ignores.
        padding = ~mask
        token_labels = obs_tokens.masked_fill(padding[..., None], -100).reshape(n, length * k)[:, 1:]
        reward_labels = (rewards.sign() + 1).long().masked_fill(padding, -100)
        end_labels = ends.long().masked_fill(padding, -100)
        return {
            "observations": F.cross_entropy(output.observation_logits[:, :-1].flatten(0, 1), token_labels.flatten()),
            "rewards": F.cross_entropy(output.reward_logits.flatten(0, 1), reward_labels.flatten()),
            "ends": F.cross_entropy(output.end_logits.flatten(0, 1), end_labels.flatten()),
        }

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """For AdamW: the weights of Linear layers decay, embeddings, norms and biases do not (published code)."""
        decaying = {id(module.weight) for module in self.modules() if isinstance(module, Linear)}
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if id(p) in decaying], "weight_decay": weight_decay},
            {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
        ]


# ---------------------------------------------------------------------------------------------------------------------
# The dream
# ---------------------------------------------------------------------------------------------------------------------


def sample(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """Draws one of C classes from logits (..., C) -> (...) int64, without asking the host for anything.

    Exponential race: if each class arrives after a time Exp(1) / p, the first to arrive is a draw from p; in logarithms
    this is the Gumbel-max trick. `noise` is log Exp(1), for who has drawn it already.
    """
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_().log() if noise is None else noise
    return (logits - noise).argmax(dim=-1)  # float32, as the noise is


def next_token(world_model: WorldModel, rows, positions, kv, filled, noise) -> tuple[Tensor, Tensor]:
    """Reads rows (N, T) (see `WorldModel.read`) -> the frame token drawn behind the last (N,), and what the world model
    thinks there (N, width). This is the token pass, 16 of which dream a frame."""
    x = world_model.read(rows, positions, kv, filled)
    x = x if rows.shape[1] == 1 else x.view(*rows.shape, -1)[:, -1]
    return sample(world_model.observation_head(x), noise), x


class Dream:
    """A batch of N imagined environments (paper, section 2.3): the world model samples, the tokenizer paints.

    Everything stays on the device: nothing in `step` waits for a number. Put the two models into evaluation mode first,
    since dropout would blur the dream. One `Dream` may be reset again and again.

    A dream may be longer than the transformer's 20 blocks. When the stream is full, the more recent half of its blocks
    is read again from position 0, so that speed and direction of what moves are not forgotten (the published code
    starts over from the last frame alone, which shows no motion). Half, because one long pass then buys ten steps.
    `kept_blocks` is that number; 1 is the published way.

    With `compile`, torch.compile makes one call of the token pass; on a GPU, one launch of a CUDA graph. For that, its
    shapes and addresses are fixed: the attention runs over the whole cache under a mask, the position is a tensor, and
    the random numbers are drawn outside.
    """

    def __init__(self, tokenizer: Tokenizer, world_model: WorldModel, compile: bool = False):
        if tokenizer.config.tokens_per_frame != world_model.config.tokens_per_frame:
            raise IrisError(
                f"the tokenizer writes {tokenizer.config.tokens_per_frame} tokens a frame, the world model reads "
                f"{world_model.config.tokens_per_frame}: make world_model.tokens_per_frame the same"
            )
        self.tokenizer, self.world_model, self.compile = tokenizer, world_model, compile
        self.kept_blocks = world_model.config.max_blocks // 2
        self.next_token, self.caches = next_token, {}
        if compile:
            mode = "reduce-overhead" if world_model.embedding.weight.is_cuda else None  # this is what makes CUDA graphs
            self.next_token = torch.compile(next_token, mode=mode, fullgraph=True, dynamic=False)
            torch._dynamo.config.recompile_limit = 64  # four graphs for each batch size, and for each precision

    @torch.no_grad()
    def reset(self, frames: Tensor) -> Tensor:
        """Begins N dreams at frames (N, 3, 64, 64) in [0, 1]; returns them as the agent sees them, reconstructed."""
        return self.reset_from_tokens(self.tokenizer.encode(frames))

    @torch.no_grad()
    def reset_from_tokens(self, tokens: Tensor) -> Tensor:
        """The same, for frames that are tokens (N, K) already."""
        self.cache = self._compiled_cache(len(tokens)) if self.compile else self.world_model.empty_cache(len(tokens))
        self.tokens = tokens  # (N, K), the current frame
        self.stream = tokens  # (N, S), the text that the cache stands for, and behind it what is still unread
        return self.tokenizer.decode(tokens)

    @torch.no_grad()
    def step(self, actions: Tensor, next_frame: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """Actions (N,) int64 -> frames (N, 3, 64, 64) in [0, 1], rewards (N,) in {-1, 0, 1}, ends (N,) bool, sampled.

        With `next_frame=False` the frame is None and costs next to nothing: for the last step of a dream.
        """
        config, model = self.world_model.config, self.world_model
        # The stream is written as rows of the embedding table, in which actions follow the frame tokens.
        self.stream = torch.cat([self.stream, actions[:, None] + model.vocab_size], dim=1)
        # The next frame's tokens are read too, but for the 16th, which is read with the action after it.
        needed = self.stream.shape[1] + (config.tokens_per_frame - 1 if next_frame else 0)
        if needed > config.max_tokens:
            self.stream = self.stream[:, -self.kept_blocks * config.block :]
            self.cache.size = 0  # the old keys and values are written over
        # All random numbers of the frame at once: (K, N, V), for each of its tokens a number for each code.
        shape = (config.tokens_per_frame if next_frame else 1, len(actions), model.vocab_size)
        noise = torch.empty(shape, device=actions.device).exponential_().log().unbind()
        # Read what is unread: the current frame's last token and the action, more after a reset or a refill.
        token, x = self._read(self.stream[:, self.cache.size :], noise[0])
        rewards = sample(model.reward_head(x)).float() - 1
        ends = sample(model.end_head(x)).bool()
        if not next_frame:
            return None, rewards, ends
        tokens = [token]
        for more in noise[1:]:
            tokens.append(self._read(tokens[-1][:, None], more)[0])
        self.tokens = torch.stack(tokens, dim=1)  # (N, K)
        self.stream = torch.cat([self.stream, self.tokens], dim=1)
        return self.tokenizer.decode(self.tokens), rewards, ends

    def _compiled_cache(self, n: int) -> Cache:
        """What a CUDA graph writes into has to stay where it is, so compiled passes keep a cache for each batch size;
        in a tensor for each layer, since a compiler copies all of a tensor to write into a slice of it."""
        key = n, torch.is_autocast_enabled(self.world_model.embedding.weight.device.type)
        if key not in self.caches:
            self.caches[key] = Cache([layer.clone() for layer in self.world_model.empty_cache(n).kv])
            for layer in self.caches[key].kv:
                torch._dynamo.mark_static_address(layer)
        self.caches[key].size = 0
        return self.caches[key]

    def _read(self, rows: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        start, stop = self.cache.size, self.cache.size + rows.shape[1]
        self.cache.size = stop
        positions = self.world_model.positions[start:stop]
        if not self.compile:
            return self.next_token(self.world_model, rows, positions, self.cache.kv, stop, noise)
        # Contiguous, since a compiled graph expects the same strides each time; and copied, since a CUDA graph writes
        # its outputs to the same place each time.
        torch.compiler.cudagraph_mark_step_begin()
        outputs = self.next_token(self.world_model, rows.contiguous(), positions, self.cache.kv, None, noise)
        return tuple(output.clone() for output in outputs)


# ---------------------------------------------------------------------------------------------------------------------
# The lesson: python iris_world_model.py
# ---------------------------------------------------------------------------------------------------------------------

SMALL_WORLD_MODEL = WorldModelConfig(max_blocks=8, layers=3, heads=4, width=128, dropout=0.0)


def lesson(tokenizer_steps: int = 900, steps: int = 500, out: Path = Path("runs/lessons/world_model.png")) -> None:
    from tqdm import trange

    torch.manual_seed(0)
    play, train_steps = random_breakout(5000), 4800
    tokenizer = train_small_tokenizer(play["frames"][:train_steps], tokenizer_steps)
    tokens = torch.cat([tokenizer.encode(to_model(frames)) for frames in play["frames"].split(256)])  # (5000, K)
    world_model = WorldModel(tokenizer.config.vocab_size, 4, SMALL_WORLD_MODEL)

    def losses_from(starts: Tensor) -> dict[str, Tensor]:
        """Of the sequences that begin at these steps (N,). A real loop keeps them inside an episode
        (`iris_train.Replay`); one game over in 200 frames is no harm."""
        index = starts[:, None] + torch.arange(world_model.config.max_blocks)  # (N, L)
        columns = [play[name][index] for name in ("actions", "rewards", "ends")]
        return world_model.loss(tokens[index], *columns, mask=torch.ones_like(index, dtype=torch.bool))

    optimizer = torch.optim.AdamW(world_model.parameter_groups(weight_decay=0.01), lr=1e-3)
    for _ in trange(steps, desc="world model", disable=None):
        losses = losses_from(torch.randint(train_steps - world_model.config.max_blocks, (16,)))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    # The test: 24 frames that were never trained on, and a dream that starts with the first and gets the same actions.
    world_model.eval()
    with torch.no_grad():
        nats = losses_from(torch.arange(train_steps, 4990, 6))["observations"].item()
    start, horizon = train_steps + 32, 24
    real = to_model(play["frames"][start : start + horizon])
    dream = Dream(tokenizer, world_model)
    dreamed = [dream.reset(real[:1])]
    for step in range(horizon - 1):
        frame, _, _ = dream.step(play["actions"][start + step : start + step + 1])
        dreamed.append(frame)
    save_picture(out, [real[::2], torch.cat(dreamed)[::2]])
    print(
        f"Learned how Breakout goes on: {nats:.2f} nats a token of unseen play (a blind guess costs "
        f"{math.log(tokenizer.config.vocab_size):.2f}). A real game above, and below it a dream with the same first "
        f"frame and actions: {out}"
    )


if __name__ == "__main__":
    lesson()
