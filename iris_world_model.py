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

    keys: Tensor  # (layers, N, heads, max_tokens, width / heads)
    values: Tensor  # the same
    size: int = 0  # positions filled; a Python number, so that asking for it never waits for the GPU


@dataclass
class WorldModelOutput:
    """Logits at those positions of the pass that predict something, in the order of the stream (see `WorldModel`)."""

    observation_logits: Tensor  # (N, positions but each frame's last token, V)
    reward_logits: Tensor  # (N, action positions, 3), for rewards -1, 0, 1
    end_logits: Tensor  # (N, action positions, 2), for going on and ending


class Layer(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x)). Shape (N, T, width) is kept."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)  # queries, keys and values in one product
        self.attention_out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, index: int) -> Tensor:
        n, t, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width / heads)
        if cache is not None:
            # Write the new positions behind the old ones, and attend over all that is filled.
            filled = cache.size + t
            cache.keys[index, :, :, cache.size : filled] = k
            cache.values[index, :, :, cache.size : filled] = v
            k, v = cache.keys[index, :, :, :filled], cache.values[index, :, :, :filled]
        dropout = self.dropout if self.training else 0.0
        # No mask and more than one position means a stream from its start: plainly causal.
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and t > 1
        )  # (N, heads, T, width / heads)
        attended = attended.transpose(1, 2).reshape(n, t, width)
        x = x + F.dropout(self.attention_out(attended), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


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
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)

        def head(outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(config.width, config.width), nn.ReLU(), nn.Linear(config.width, outputs))

        self.observation_head, self.reward_head, self.end_head = head(vocab_size), head(3), head(2)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

        # What stands where in a stream of full length. Buffers, so that they are on the device already when needed.
        place = torch.arange(config.max_tokens) % config.block  # place of a position within its block
        is_action = place == config.tokens_per_frame
        causal = torch.ones(config.max_tokens, config.max_tokens, dtype=torch.bool).tril()
        self.register_buffer("table_offset", is_action * vocab_size, persistent=False)
        self.register_buffer("observation_at", (place != config.tokens_per_frame - 1).nonzero()[:, 0], persistent=False)
        self.register_buffer("causal", causal, persistent=False)

    def empty_cache(self, n: int) -> Cache:
        """A cache for n streams, with nothing read yet, in the type that keys have here (bfloat16 under autocast)."""
        config, weight = self.config, self.embedding.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = (config.layers, n, config.heads, config.max_tokens, config.width // config.heads)
        return Cache(weight.new_zeros(shape, dtype=dtype), weight.new_zeros(shape, dtype=dtype))

    def _observations_before(self, position: int) -> int:
        """How many positions left of this one predict a frame token: 16 in a whole block, all but the 16th of 17."""
        blocks, rest = divmod(position, self.config.block)
        return blocks * self.config.tokens_per_frame + min(rest, self.config.tokens_per_frame - 1)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> WorldModelOutput:
        """Tokens (N, T) -> logits at the positions of this pass.

        Without a cache the stream starts here. With one, it continues the positions that the cache holds, and the
        cache grows by T. Raises ValueError when the stream becomes longer than max_tokens.
        """
        start = 0 if cache is None else cache.size
        stop = start + tokens.shape[1]
        if stop > self.config.max_tokens:
            raise ValueError(f"a stream of {stop} tokens is longer than the world model's {self.config.max_tokens}")
        x = self.embedding(tokens + self.table_offset[start:stop]) + self.position_embedding.weight[start:stop]
        x = F.dropout(x, self.config.dropout, self.training)  # (N, T, width)
        mask = self.causal[start:stop, :stop] if start > 0 and stop - start > 1 else None  # (T, stop)
        for index, layer in enumerate(self.layers):
            x = layer(x, mask, cache, index)
        x = self.final_norm(x)
        if cache is not None:
            cache.size = stop

        # Heads cost as much as a layer, so they look only where they have something to say.
        observing = self.observation_at[self._observations_before(start) : self._observations_before(stop)] - start
        first_action = (self.config.tokens_per_frame - start) % self.config.block
        at_actions = x[:, first_action :: self.config.block]  # (N, actions in this pass, width)
        return WorldModelOutput(
            self.observation_head(x[:, observing]), self.reward_head(at_actions), self.end_head(at_actions)
        )

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
        decaying = {id(module.weight) for module in self.modules() if isinstance(module, nn.Linear)}
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if id(p) in decaying], "weight_decay": weight_decay},
            {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
        ]


# ---------------------------------------------------------------------------------------------------------------------
# The dream
# ---------------------------------------------------------------------------------------------------------------------


def sample(logits: Tensor) -> Tensor:
    """Draws one of C classes from logits (..., C) -> (...) int64, without asking the host for anything.

    Exponential race: if each class arrives after a time Exp(1) / p, the first to arrive is a draw from p.
    """
    probabilities = logits.float().softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)


class Dream:
    """A batch of N imagined environments (paper, section 2.3): the world model samples, the tokenizer paints.

    Everything stays on the device: nothing in `step` waits for a number. Call both methods without gradients; put the
    two models into evaluation mode first, since dropout would blur the dream.

    A dream may be longer than the transformer's 20 blocks. When the stream is full, the more recent half of its blocks
    is read again from position 0, so that speed and direction of what moves are not forgotten (the published code
    starts over from the last frame alone, which shows no motion). Half, because one long pass then buys ten steps.
    """

    def __init__(self, tokenizer: Tokenizer, world_model: WorldModel):
        if tokenizer.config.tokens_per_frame != world_model.config.tokens_per_frame:
            raise IrisError(
                f"the tokenizer writes {tokenizer.config.tokens_per_frame} tokens a frame, the world model reads "
                f"{world_model.config.tokens_per_frame}: make world_model.tokens_per_frame the same"
            )
        self.tokenizer, self.world_model = tokenizer, world_model

    @torch.no_grad()
    def reset(self, frames: Tensor) -> Tensor:
        """Begins N dreams at frames (N, 3, 64, 64) in [0, 1]; returns them as the agent sees them, reconstructed."""
        return self.reset_from_tokens(self.tokenizer.encode(frames))

    @torch.no_grad()
    def reset_from_tokens(self, tokens: Tensor) -> Tensor:
        """The same, for frames that are tokens (N, K) already."""
        self.cache = self.world_model.empty_cache(len(tokens))
        self.tokens = tokens  # (N, K), the current frame
        self.stream = tokens  # (N, S), the text that the cache stands for, and behind it what is still unread
        return self.tokenizer.decode(tokens)

    @torch.no_grad()
    def step(self, actions: Tensor, next_frame: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """Actions (N,) int64 -> frames (N, 3, 64, 64) in [0, 1], rewards (N,) in {-1, 0, 1}, ends (N,) bool, sampled.

        With `next_frame=False` the frame is None and costs nothing: for the last step of a dream.
        """
        config = self.world_model.config
        self.stream = torch.cat([self.stream, actions[:, None]], dim=1)
        # The next frame's tokens are read too, but for the 16th, which is read with the action after it.
        needed = self.stream.shape[1] + (config.tokens_per_frame - 1 if next_frame else 0)
        if needed > config.max_tokens:
            self.stream = self.stream[:, -(config.max_blocks // 2) * config.block :]
            self.cache.size = 0  # the old keys and values are written over
        # Read what is unread: the current frame's last token and the action, more after a reset or a refill.
        output = self.world_model(self.stream[:, self.cache.size :], self.cache)
        rewards = sample(output.reward_logits[:, -1]).float() - 1
        ends = sample(output.end_logits[:, -1]).bool()
        if not next_frame:
            return None, rewards, ends
        tokens = [sample(output.observation_logits[:, -1])]
        while len(tokens) < config.tokens_per_frame:
            output = self.world_model(tokens[-1][:, None], self.cache)
            tokens.append(sample(output.observation_logits[:, -1]))
        self.tokens = torch.stack(tokens, dim=1)  # (N, K)
        self.stream = torch.cat([self.stream, self.tokens], dim=1)
        return self.tokenizer.decode(self.tokens), rewards, ends


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
