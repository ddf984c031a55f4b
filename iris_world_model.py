"""Chapter 2 of IRIS: a GPT learns to predict the game, token by token, and can then be played in its place.

With frames written as 16 tokens each (chapter 1), a game is one long sequence: 16 tokens of a frame, one token for the
action, 16 tokens of the next frame, and so on. This file trains a GPT on such sequences. It predicts each frame token
from the position before it, and at each action also the reward and whether the episode ends (IRIS, arXiv 2209.00588,
section 2.2). `Dream` samples from these predictions: an environment that exists in the model alone.

    z1 .. z16 = tokens of a frame, a = action; a block is 16 z and 1 a; the context is 20 blocks = 340 positions
    In comments: N sequences, L blocks, K = 16 tokens a frame, T positions, V codes, A actions, C width

    input        z1   z2  ...  z15  z16   a  |  z1   z2  ...
                  |    |         |    |   |      |    |
                [ 10 transformer layers; a position attends to itself and to all positions before it ]
                  |    |         |    |   |      |    |
    prediction   z2   z3  ...  z16    -   z1    z2   z3  ...     at z16 nothing: the next token is the agent's action
                                       reward, end               at a: reward and end as well

Run it:    python iris_world_model.py     (two minutes on one core; needs iris_tokenizer.py and opencv-python)
Reuse it:  copy this file; it needs torch only. `Dream` takes any tokenizer that has `encode` and `decode`.

    import torch
    from iris_world_model import WorldModel, WorldModelConfig
    world_model = WorldModel(vocab_size=512, num_actions=4, config=WorldModelConfig())
    tokens, actions = torch.randint(512, (2, 20, 16)), torch.randint(4, (2, 20))    # 2 sequences of 20 steps
    rewards, ends, mask = torch.zeros(2, 20), torch.zeros(2, 20), torch.ones(2, 20, dtype=torch.bool)
    sum(world_model.loss(tokens, actions, rewards, ends, mask).values()).backward()

With a tokenizer of V codes (chapter 1) it is an environment: `dream = Dream(tokenizer.eval(), world_model.eval())`,
then `frames = dream.reset(frames)` and, again and again, `frames, rewards, ends = dream.step(actions)`.

Rules. A training sequence lies within one episode; a shorter one is padded on the right, where the causal mask hides it
from real steps. Gradients reach this model's weights only: tokens are integers, and a dream has no gradient. Dropout
and a dream's samples draw from torch's global generator. The paper trains with AdamW, rate 1e-4, weight decay 0.01, 64
sequences a step, gradient norm clipped at 10. [paper] is IRIS or its code, [ours] is not. The single embedding
table, the way of sampling and the cache are ours too, and change no result.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class WorldModelConfig:
    """Sizes of the world model. The defaults are the published configuration's."""

    tokens_per_frame: int = 16  # Tokens of a frame, K, as many as the tokenizer makes
    max_blocks: int = 20  # Time steps in the context; also the length of training sequences, L
    layers: int = 10  # Transformer layers
    heads: int = 4  # Attention heads, which share the width
    width: int = 256  # Width of embeddings and hidden states, C
    dropout: float = 0.1  # Of embeddings, attention weights and residual branches, in training mode
    init_std: float = 0.02  # Of linear layers' initial weights; with more, small widths learn sooner [ours]

    @property
    def block_size(self) -> int:
        return self.tokens_per_frame + 1

    @property
    def max_tokens(self) -> int:
        return self.max_blocks * self.block_size


# --- The transformer --------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention, (N, T, C) -> (N, T, C). A position attends to itself and those before it."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cache: Tensor | None, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Without a cache, `mask` is None. A dream passes both (see `hidden_states`): -> (N, the mask's rows, C)."""
        n, t, c = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # (3, N, heads, T, C')
        q, kv = qkv[0], qkv[1:]
        if cache is not None:
            cache.index_copy_(3, positions, kv.to(cache.dtype))  # write the new keys and values
            kv = cache[..., : mask.shape[1], :]  # (2, N, heads, visible, C'): all so far
            q = q[:, :, -len(mask) :].to(cache.dtype)  # one for each row of the mask, which has one in the last layer
        with torch.autocast(x.device.type, enabled=False):  # it would convert the cache at each call
            y = F.scaled_dot_product_attention(q, *kv, mask, self.dropout * self.training, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).reshape(n, -1, c))


class Layer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x)). (N, T, C) -> (N, T, C)."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(nn.Linear(c := config.width, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Tensor | None, positions: Tensor, mask: Tensor | None) -> Tensor:
        y = self.dropout(self.attn(self.ln1(x), cache, positions, mask))
        x = x[:, -y.shape[1] :] + y  # in a dream's last layer, y is of the last position alone
        return x + self.dropout(self.mlp(self.ln2(x)))


class WorldModelOutput(NamedTuple):
    observation_logits: Tensor  # (N, L * K, V): a block's 16, of z2 .. z16 and of the next block's z1
    reward_logits: Tensor  # (N, L, 3): for rewards -1, 0, 1
    end_logits: Tensor  # (N, L, 2): for going on and ending


class WorldModel(nn.Module):
    """The GPT over frame tokens and actions [paper, section 2.2]. 8,447,493 parameters with 4 actions.

    A sequence (N, T) int64 starts with a frame's first token. Positions p with p % 17 == 16 hold actions in [0, A), all
    others frame tokens in [0, V). Action a is embedded in row V + a.
    """

    def __init__(self, vocab_size: int, num_actions: int, config: WorldModelConfig):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"{config.heads} heads do not divide a width of {config.width}")
        self.vocab_size, self.num_actions, self.config = vocab_size, num_actions, config
        self.embedding = nn.Embedding(vocab_size + num_actions, config.width)  # V rows for frame tokens, A for actions
        self.position_embedding = nn.Embedding(config.max_tokens, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head_observations, self.head_rewards, self.head_ends = (
            nn.Sequential(nn.Linear(config.width, config.width), nn.ReLU(), nn.Linear(config.width, outputs))
            for outputs in (vocab_size, 3, 2)
        )
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.init_std)
                nn.init.zeros_(module.bias)
        positions = torch.arange(config.max_tokens)
        is_action = positions % config.block_size == config.tokens_per_frame
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("row_offset", vocab_size * is_action, persistent=False)  # V at actions
        self.register_buffer("causal", positions[:, None] >= positions, persistent=False)

    def new_cache(self, n: int) -> list[Tensor]:
        """Room for the keys and values of n sequences: for each layer (2, N, heads, max_tokens, C / heads)."""
        config, device = self.config, self.positions.device.type
        autocast = device != "cpu" and torch.is_autocast_enabled(device)  # a CPU attends faster in float32
        dtype = torch.get_autocast_dtype(device) if autocast else self.embedding.weight.dtype
        shape = 2, n, config.heads, config.max_tokens, config.width // config.heads
        return [torch.zeros(shape, dtype=dtype, device=self.positions.device) for _ in self.layers]

    def hidden_states(
        self, tokens: Tensor, positions: Tensor, cache: list[Tensor] | None = None, visible: int = 0
    ) -> Tensor:
        """Tokens (N, T) at positions (T,) -> hidden states (N, T, C). Each attends to itself and the tokens before it.

        For speed, a dream passes a cache of the keys and values of earlier tokens, which later ones do not change. This
        call writes its own into it at `positions`, attends to its first `visible` positions under the causal mask, and
        returns the last state alone (N, 1, C): a dream needs no other."""
        x = self.dropout(self.embedding(tokens + self.row_offset[positions]) + self.position_embedding(positions))
        mask = None if cache is None else self.causal[positions, :visible]  # (T, visible)
        for i, layer in enumerate(self.layers):
            mask = mask[-1:] if mask is not None and i + 1 == len(self.layers) else mask  # one query: the last
            x = layer(x, None if cache is None else cache[i], positions, mask)
        return self.ln_f(x)

    def forward(self, tokens: Tensor) -> WorldModelOutput:
        """Tokens (N, L * 17), that is L whole blocks -> the logits of all predictions, in the order of the sequence."""
        n, t = tokens.shape
        if t > self.config.max_tokens or t % self.config.block_size:
            raise ValueError(f"{t} tokens are not 1 to {self.config.max_blocks} blocks of {self.config.block_size}")
        h = self.hidden_states(tokens, self.positions[:t])
        h = h.view(n, -1, self.config.block_size, self.config.width)  # (N, L, 17, C)
        k = self.config.tokens_per_frame
        predicting = torch.cat([h[:, :, : k - 1], h[:, :, k:]], dim=2)  # (N, L, 16, C): all but z16
        at_action = h[:, :, k]  # (N, L, C)
        return WorldModelOutput(
            self.head_observations(predicting).flatten(1, 2), self.head_rewards(at_action), self.head_ends(at_action)
        )

    def loss(
        self, obs_tokens: Tensor, actions: Tensor, rewards: Tensor, ends: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Three mean cross-entropies, whose sum is minimised [paper, section 2.2].

        obs_tokens (N, L, K) int64, actions (N, L) int64, rewards (N, L), of which the sign is predicted, ends (N, L) in
        {0, 1}, mask (N, L), False where a step is padding, on the right, of any valid tokens and actions. Its label is
        -100, which `cross_entropy` ignores.

            position in the sequence     0    1   ..  14   15   16  |  17   18  ..
            input                        z1   z2  ..  z15  z16  a   |  z1   z2  ..
            observation_logits, index    0    1   ..  14   -    15  |  16   17  ..     the last is dropped: the sequence
            label                        z2   z3  ..  z16  -    z1  |  z2   z3  ..     ends before the next frame

        Reward and end of a step are predicted at its action. The first z1 is never predicted.
        """
        tokens = torch.cat([obs_tokens, actions[..., None]], dim=2).flatten(1)  # (N, L * 17)
        output = self(tokens)
        observation_labels = obs_tokens.masked_fill(~mask[..., None], -100).flatten(1)[:, 1:]  # (N, L * 16 - 1)
        reward_labels = (rewards.sign() + 1).long().masked_fill(~mask, -100)  # -1, 0, 1 -> 0, 1, 2
        end_labels = ends.long().masked_fill(~mask, -100)
        observation_logits = output.observation_logits[:, :-1]  # (N, L * 16 - 1, V)
        return {
            "observations": F.cross_entropy(observation_logits.flatten(0, 1), observation_labels.flatten()),
            "rewards": F.cross_entropy(output.reward_logits.flatten(0, 1), reward_labels.flatten()),
            "ends": F.cross_entropy(output.end_logits.flatten(0, 1), end_labels.flatten()),
        }

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """For AdamW: weights of linear layers decay; embeddings, norms and biases do not [paper]."""
        decaying = {id(module.weight) for module in self.modules() if isinstance(module, nn.Linear)}
        return [
            {"params": [p for p in self.parameters() if id(p) in decaying], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters() if id(p) not in decaying], "weight_decay": 0.0},
        ]


# --- The dream --------------------------------------------------------------------------------------------------------
def sample(logits: Tensor) -> Tensor:
    """Logits (..., V) -> classes (...) int64, drawn from their softmax: the first class whose cumulative probability
    reaches a uniform number in (0, 1]. `torch.multinomial` would wait for a GPU."""
    cumulative = logits.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
    u = (1 - torch.rand_like(cumulative[..., -1:])) * cumulative[..., -1:]  # the last is 1 but for rounding
    return torch.searchsorted(cumulative, u).squeeze(-1).clamp(max=logits.shape[-1] - 1)  # V for logits of NaN


class Dream:
    """N imagined environments [paper, section 2.3]. `tokenizer` has `encode`, frames -> tokens (N, K) in [0, V), and
    `decode`. Both models must be in evaluation mode, or dropout disturbs the dream. The algorithm, without the cache
    that saves computing earlier positions again:

        reset   context = the 16 tokens of a real frame
        step    context += the action
                reward, end ~ softmax of the two heads at the action
                16 times: context += a token ~ softmax of the observation head at the last position
                frame = decode(the last 16 tokens)

    A dream may be longer than 20 blocks. When the next frame does not fit any more, the latest 15 blocks are kept
    [ours; the published code keeps the last frame alone, which shows no motion]. They are read again from position 0
    on, for position embeddings are absolute. An end does not stop a dream, but steps after it are untrained: skip them.
    """

    def __init__(self, tokenizer, world_model: WorldModel):
        self.tokenizer, self.world_model = tokenizer, world_model
        self.kept_blocks = 3 * world_model.config.max_blocks // 4  # from 1, the published way, to max_blocks - 1
        self.context: Tensor | None = None  # (N, T): all that the next prediction may depend on

    @torch.no_grad()
    def reset(self, frames: Tensor) -> Tensor:
        """Starts N dreams at frames (N, 3, 64, 64) in [0, 1]. Returns these frames, decoded from their tokens."""
        return self.reset_from_tokens(self.tokenizer.encode(frames))

    @torch.no_grad()
    def reset_from_tokens(self, tokens: Tensor) -> Tensor:
        """The same for tokens (N, K), or (N, T): of earlier frames and actions, then of the last. Else ValueError."""
        k, t = self.world_model.config.tokens_per_frame, tokens.shape[1]
        if (t + 1) % self.world_model.config.block_size:
            raise ValueError(f"{t} tokens: a dream starts from frames of {k} tokens, with an action between two")
        self.context = tokens
        self.cache, self.filled = self.new_cache(len(tokens)), 0  # how many positions it holds
        return self.tokenizer.decode(tokens[:, -k:])

    def new_cache(self, n: int) -> list[Tensor]:
        return self.world_model.new_cache(n)

    @torch.no_grad()
    def step(self, actions: Tensor, next_frame: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """Actions (N,) int64 -> frames (N, 3, 64, 64) in [0, 1], rewards (N,) in {-1, 0, 1}, ends (N,) bool, sampled.

        With `next_frame=False` the frames are None: for the last step of a dream. Another step is then a ValueError.
        """
        if self.context is None:
            raise ValueError("this dream has not begun, or its last step had next_frame=False: reset it")
        model, config = self.world_model, self.world_model.config
        self.context = torch.cat([self.context, actions[:, None]], dim=1)
        # This step reads 15 more tokens: a frame's last one is read in the next step, with the action. With 20 blocks,
        # after the 20th action, the context has 340 tokens, 355 are needed, and 255 are kept.
        if self.context.shape[1] + next_frame * (config.tokens_per_frame - 1) > config.max_tokens:
            self.context, self.filled = self.context[:, -self.kept_blocks * config.block_size :], 0
        h, logits = self.read()  # at the action
        rewards = sample(model.head_rewards(h)).float() - 1
        ends = sample(model.head_ends(h)).bool()
        if not next_frame:
            self.context = None
            return None, rewards, ends
        for k in range(config.tokens_per_frame):
            self.context = torch.cat([self.context, sample(logits)[:, None]], dim=1)
            if k + 1 < config.tokens_per_frame:
                _, logits = self.read()
        return self.tokenizer.decode(self.context[:, -config.tokens_per_frame :]), rewards, ends

    def read(self) -> tuple[Tensor, Tensor]:
        """-> hidden state (N, C) and observation logits (N, V) at the context's last position. Only what is not in the
        cache is computed; plainly, h = hidden_states(context, positions[:T])[:, -1]."""
        start, self.filled = self.filled, self.context.shape[1]
        positions = self.world_model.positions[start : self.filled]
        return predict(self.world_model, self.context[:, start:], positions, self.cache, self.filled)


def predict(model: WorldModel, tokens: Tensor, positions: Tensor, cache: list[Tensor], visible: int):
    """The tensor part of `Dream.read`, which `CompiledDream` compiles."""
    h = model.hidden_states(tokens, positions, cache, visible)[:, -1]
    return h, model.head_observations(h)


# --- For speed on a GPU: skip on first reading ------------------------------------------------------------------------
class CompiledDream(Dream):
    """The same dream with `predict` compiled. On a GPU, a token then costs one launch of a CUDA graph, not about 120.

    A graph has fixed shapes and addresses. So attention runs over the whole cache under the mask, and the position is a
    tensor; each batch size keeps its cache; outputs are copied before the next launch writes over them.
    """

    def __init__(self, tokenizer, world_model: WorldModel):
        super().__init__(tokenizer, world_model)
        mode = "reduce-overhead" if world_model.positions.is_cuda else None  # this is what makes CUDA graphs
        self.compiled = torch.compile(predict, mode=mode, fullgraph=True, dynamic=False)
        self.caches: dict = {}
        torch._dynamo.config.recompile_limit = 64  # T is 1, 2, or what a reset or a full context needs

    def new_cache(self, n: int) -> list[Tensor]:
        key = n, torch.is_autocast_enabled(self.world_model.positions.device.type)  # which decides the type
        if key not in self.caches:
            self.caches[key] = super().new_cache(n)
            for keys_and_values in self.caches[key]:
                torch._dynamo.mark_static_address(keys_and_values)
        return self.caches[key]

    def read(self) -> tuple[Tensor, Tensor]:
        start, self.filled = self.filled, self.context.shape[1]
        tokens, positions = self.context[:, start:].contiguous(), self.world_model.positions[start : self.filled]
        torch.compiler.cudagraph_mark_step_begin()
        outputs = self.compiled(self.world_model, tokens, positions, self.cache, self.world_model.config.max_tokens)
        return tuple(output.clone() for output in outputs)


# --- The lesson: python iris_world_model.py trains a small world model on the game of Catch ---------------------------
def lesson(steps: int = 1600, out: Path = Path("runs/lessons/world_model.png")) -> None:
    from iris_tokenizer import labelled_rows, play_catch, train_small_tokenizer

    torch.manual_seed(0)
    frames, actions, rewards, ends = play_catch(episodes=1000)  # (1000, 7, 3, 64, 64), (1000, 7) the others
    tokenizer = train_small_tokenizer(frames[:400].flatten(0, 1), steps=400)
    tokens = torch.stack([tokenizer.encode(episode) for episode in frames])  # (1000, 7, 16)
    data, test = (tokens, actions, rewards, ends, torch.ones(1000, 7, dtype=torch.bool)), slice(600, 1000)  # no padding
    world_model = WorldModel(64, 3, WorldModelConfig(max_blocks=7, layers=2, width=64, dropout=0.0))
    optimizer = torch.optim.AdamW(world_model.parameter_groups(weight_decay=0.01))
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:  # the learning rate rises, stays, and falls to 0
            group["lr"] = 2e-3 * min(1.0, step / 100, 2 * (1 - step / steps))
        batch = torch.randint(600, (16,))
        losses = world_model.loss(*(column[batch] for column in data))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"world model step {step:4d}   " + "   ".join(f"{k} {v.item():.3f}" for k, v in losses.items()))

    # Test episodes are dreamed from their first frames, under the same actions.
    dream = Dream(tokenizer, world_model.eval())
    dreamed = [dream.reset(frames[test, 0])]
    for t in range(7):
        frame, last_rewards, _ = dream.step(actions[test, t], next_frame=t < 6)
        dreamed += [] if frame is None else [frame]
    dreamed = torch.stack(dreamed, dim=1)  # (400, 7, 3, 64, 64)
    wrong = F.avg_pool2d((dreamed[:, 6] - frames[test, 6]).abs(), kernel_size=8).amax(dim=1) > 0.2  # (400, 8, 8) cells
    ball, paddle = (~rows.any(dim=(1, 2)) for rows in (wrong[:, :7], wrong[:, 7:]))  # the paddle is in row 7
    labelled_rows({"game, episode 1": frames[600], "dream, episode 1": dreamed[0],
                   "game, episode 2": frames[601], "dream, episode 2": dreamed[1]}, out)  # fmt: skip
    right, caught = last_rewards == rewards[test, 6], rewards[test, 6] == 1
    shares = [x.float().mean().item() for x in (ball, paddle, right, right[caught])]
    print("400 test episodes, dreamed from their first frames. As in the game: the ball of the last frame {:.0%}, the "
          "paddle {:.0%}, the reward {:.0%}, where it is 1 {:.0%}. Picture: {}".format(*shares, out))  # fmt: skip


if __name__ == "__main__":
    lesson()
