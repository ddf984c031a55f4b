"""Chapter 3 of IRIS: a policy that never saw the game, only dreams of it.

An actor-critic looks at reconstructed frames, remembers with an LSTM, and outputs a policy and a value. It is trained
on imagined episodes alone (IRIS paper, section 2.3 and appendix): the dream of chapter 2 is stepped for 20 frames
with sampled actions, the rewards become lambda-returns, and the policy is moved towards actions that did better than
the value expected. Real frames only start the dream and warm up the LSTM's memory.

    20 real frames, reconstructed       1 real frame
      |  warm up the LSTM                 |  the dream starts
      v  (no gradient)                    v
    state ------------------->  frame 0 --> frame 1 --> ... --> frame 19
                                  | ^         |                   |
                                  v |action   v                   v
                              actor-critic: policy logits (A,), value (); the dream answers with reward and end

Run it alone:   python iris_agent.py      (a minute on a laptop: a hand-made stand-in for the dream, in which one
                                           action pays; the return climbs)
Reuse it:       copy this file, iris_world_model.py and iris_tokenizer.py; the losses need nothing but tensors.

    actor_critic = ActorCritic(num_actions=4)
    state = actor_critic.warm_up(frames, mask)                          # (N, L, 3, 64, 64): what came before
    rollout = imagine(actor_critic, dream, dream.reset(last_frames), state, horizon=20)
    losses, metrics = actor_critic_loss(rollout, gamma=0.995, lambda_=0.95, entropy_weight=0.001)
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris_tokenizer import IrisError, Standardize, Tokenizer, TokenizerConfig, conv3x3, save_picture
from iris_world_model import Linear, WorldModel, WorldModelConfig, sample

State = tuple[Tensor, Tensor]  # an LSTM's (hidden, cell), each (N, lstm_width)

# ---------------------------------------------------------------------------------------------------------------------
# The actor-critic
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ActorCriticConfig:
    """Sizes of the actor-critic. The defaults are the paper's (its appendix and published configuration)."""

    channels: tuple[int, ...] = (32, 32, 64, 64)
    """Channels of the convolutions; each is followed by a 2x2 max-pool, so four of them leave 4x4 pixels."""
    lstm_width: int = 512
    """Width of the LSTM's state."""
    standardize: bool = False
    """Look at frames with the mean frame taken off and each pixel divided by how much it varies (`Standardize`). Not
    the paper's; it lets small runs notice a ball of one pixel, which otherwise goes unseen (`tests/control.py`)."""


class ActorCritic(nn.Module):
    """Frame and memory -> policy and value. 3,217,957 parameters with 4 actions."""

    def __init__(self, num_actions: int, config: ActorCriticConfig = ActorCriticConfig()):
        super().__init__()
        self.config = config
        self.standardize = Standardize()
        self.convolutions = nn.Sequential()
        channels = 3
        for width in config.channels:
            self.convolutions.extend([conv3x3(channels, width), nn.MaxPool2d(2), nn.ReLU()])
            channels = width
        side = 64 >> len(config.channels)
        self.lstm = nn.LSTMCell(channels * side * side, config.lstm_width)
        self.actor = nn.Linear(config.lstm_width, num_actions)
        self.critic = nn.Linear(config.lstm_width, 1)

    def initial_state(self, n: int) -> State:
        """The memory of n agents that have seen nothing."""
        zeros = self.actor.weight.new_zeros(n, self.config.lstm_width)
        return zeros, zeros

    def features(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, 64, 64) in [0, 1] -> what the LSTM reads: (N, 1024)."""
        return self.convolutions(self.standardize(frames)).flatten(1)

    def forward(self, frames: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Frames (N, 3, 64, 64) in [0, 1] -> policy logits (N, A) and values (N,) float32, and the next state."""
        hidden, cell = self.lstm(self.features(frames), state)
        return self.actor(hidden).float(), self.critic(hidden)[:, 0].float(), (hidden, cell)

    @torch.no_grad()
    def warm_up(self, frames: Tensor, mask: Tensor) -> State:
        """The memory after frames (N, L, 3, 64, 64); where mask (N, L) is False there is no frame, and it waits."""
        n, length = mask.shape
        features = self.features(frames.flatten(0, 1)).unflatten(0, (n, length))  # (N, L, 1024)
        state = self.initial_state(n)
        for step in range(length):
            seen = mask[:, step, None]
            after = self.lstm(features[:, step], state)
            state = tuple(torch.where(seen, new, old) for new, old in zip(after, state, strict=True))
        return state


class Agent(nn.Module):
    """The three models together: enough to play the real game, or to dream it."""

    def __init__(self, tokenizer: Tokenizer, world_model: WorldModel, actor_critic: ActorCritic):
        super().__init__()
        self.tokenizer, self.world_model, self.actor_critic = tokenizer, world_model, actor_critic

    @torch.no_grad()
    def act(self, frames: Tensor, state: State, temperature: float = 1.0) -> tuple[Tensor, State]:
        """Frames (N, 3, 64, 64) in [0, 1] -> actions (N,) int64, and the next state.

        The policy knows dreams only, so it is shown reality as a dream would paint it. The lower the temperature, the
        more often the likeliest action is drawn; at 0 always.
        """
        logits, _, state = self.actor_critic(self.tokenizer.reconstruct(frames), state)
        return logits.argmax(dim=1) if temperature == 0 else sample(logits / temperature), state


# ---------------------------------------------------------------------------------------------------------------------
# Imagination
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """N imagined episodes of L steps; all (N, L) but logits (N, L, A). Logits and values carry gradients."""

    logits: Tensor
    values: Tensor
    actions: Tensor  # int64
    rewards: Tensor  # in {-1, 0, 1}
    ends: Tensor  # bool
    frames: list[Tensor]  # L times (N, 3, 64, 64), what the agent saw at each step


def imagine(actor_critic: ActorCritic, dream, frames: Tensor, state: State, horizon: int) -> Rollout:
    """Plays `horizon` steps in a dream that shows frames (N, 3, 64, 64), with sampled actions.

    `dream` is an `iris_world_model.Dream`, or whatever has its `step`. The gradient runs through the LSTM from step to
    step, never through the dream: a sampled token has no derivative, and REINFORCE needs none.
    """
    steps, seen = [], []
    for step in range(horizon):
        seen.append(frames)
        logits, values, state = actor_critic(frames, state)
        actions = sample(logits.detach())
        frames, rewards, ends = dream.step(actions, next_frame=step + 1 < horizon)
        steps.append((logits, values, actions, rewards, ends))
    return Rollout(*(torch.stack(column, dim=1) for column in zip(*steps, strict=True)), seen)


def lambda_returns(rewards: Tensor, values: Tensor, ends: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Rewards, values and ends (N, L) -> what each step was worth: (N, L) (paper, section 2.3; Sutton and Barto, 12.1).

    R_t = r_t + gamma * (1 - end_t) * ((1 - lambda) * v_{t+1} + lambda * R_{t+1}), from the back, R_L = v_L: the last
    value stands for all that the dream does not reach. Lambda 0 trusts the value after one step, 1 only rewards.
    """
    returns = [values[:, -1]]
    goes_on = gamma * (1 - ends.to(values.dtype))
    for t in reversed(range(rewards.shape[1] - 1)):
        ahead = (1 - lambda_) * values[:, t + 1] + lambda_ * returns[-1]
        returns.append(rewards[:, t] + goes_on[:, t] * ahead)
    return torch.stack(returns[::-1], dim=1)


def actor_critic_loss(
    rollout: Rollout, gamma: float, lambda_: float, entropy_weight: float, behind_ends: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, whose sum is minimised, and metrics to watch, all scalar (paper, section 2.3).

    The last step's value serves as the target's end, so the losses count the L - 1 steps before it. Steps behind an
    imagined end count as well, as in the published code; without `behind_ends` they don't. What is dreamed there is
    nothing that the world model ever saw, for in the replay nothing follows an end.
    """
    counted = torch.ones_like(rollout.rewards)  # (N, L)
    if not behind_ends:
        counted = (rollout.ends.cumsum(dim=1) - rollout.ends.long() == 0).float()

    def mean(x: Tensor) -> Tensor:  # (N, L) or (N, L - 1)
        return (x * counted[:, : x.shape[1]]).sum() / counted[:, : x.shape[1]].sum()

    with torch.no_grad():
        returns = lambda_returns(rollout.rewards, rollout.values, rollout.ends, gamma, lambda_)[:, :-1]
    values, logits = rollout.values[:, :-1], rollout.logits[:, :-1]
    log_policy = logits.log_softmax(dim=-1)  # (N, L - 1, A)
    log_taken = log_policy.gather(2, rollout.actions[:, :-1, None])[..., 0]  # (N, L - 1)
    entropy = mean(-(log_policy.exp() * log_policy).sum(dim=-1))
    losses = {
        "actions": -mean(log_taken * (returns - values.detach())),  # REINFORCE, with the value as its baseline
        "values": mean((values - returns).square()),
        "entropy": -entropy_weight * entropy,
    }
    metrics = {
        "policy_entropy": entropy.detach(),
        "value": mean(values.detach()),
        "lambda_return": mean(returns),
        "imagined_reward": mean(rollout.rewards),
        "imagined_end": mean(rollout.ends.float()),
    }
    return losses, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints (huggingface.co, eloialonso/iris, pretrained_models/{Game}.pt)
# ---------------------------------------------------------------------------------------------------------------------


def official_names(config: TokenizerConfig, actor_critic: ActorCriticConfig, layers: int) -> dict[str, list[str]]:
    """Our parameter prefix -> the published prefixes of the same layer, several where we fused what they keep apart.

    Encoder and decoder are `nn.Sequential`s in the order of computation, so they are named by walking that order.
    """
    levels = range(len(config.channels))

    def level_names(kind: str, level: int, blocks: int) -> list[str]:
        names = []
        for block in range(blocks):
            names.append(f"{kind}.{level}.block.{block}")
            if 64 >> level in config.attention_at:
                names.append(f"{kind}.{level}.attn.{block}")
        return names

    middle, last = ["mid.block_1", "mid.attn_1", "mid.block_2"], ["norm_out", "", "conv_out"]  # "" is the SiLU
    encoder, decoder = ["conv_in"], ["conv_in", *middle]
    for level in levels:
        encoder += [""] if config.local_encoder else level_names("down", level, config.blocks[level])
        encoder += [f"down.{level}.downsample"] if level + 1 < len(levels) else []
    encoder += last[2:] if config.local_encoder else [*middle, *last]
    for level in reversed(levels):
        decoder += level_names("up", level, config.blocks[level] + bool(config.blocks[level]))
        decoder += [f"up.{level}.upsample"] if level > 0 else []

    names = {}
    for part, walk in (("encoder", encoder), ("decoder", [*decoder, *last])):
        for index, name in enumerate(walk):
            ours, theirs = f"tokenizer.{part}.{index}", f"tokenizer.{part}.{name}"
            if ".attn" in name:
                names[f"{ours}.norm"] = [f"{theirs}.norm"]
                names[f"{ours}.qkv"] = [f"{theirs}.{x}" for x in "qkv"]
                names[f"{ours}.out"] = [f"{theirs}.proj_out"]
            elif "block" in name:
                names |= {f"{ours}.{x}": [f"{theirs}.{x}"] for x in ("norm1", "conv1", "norm2", "conv2")}
            elif "sample" in name:
                names[f"{ours}.conv"] = [f"{theirs}.conv"]
            elif name:
                names[ours] = [theirs]
    names["tokenizer.pre_quantization"] = ["tokenizer.pre_quant_conv"]
    names["tokenizer.codebook"] = ["tokenizer.embedding"]
    names["tokenizer.post_quantization"] = ["tokenizer.post_quant_conv"]

    tables = "world_model.embedder.embedding_tables"
    names["world_model.embedding"] = [f"{tables}.1", f"{tables}.0"]  # frame tokens, then actions
    names["world_model.position_embedding"] = ["world_model.pos_emb"]
    names["world_model.final_norm"] = ["world_model.transformer.ln_f"]
    for i in range(layers):
        ours, theirs = f"world_model.layers.{i}", f"world_model.transformer.blocks.{i}"
        names[f"{ours}.attention_norm"] = [f"{theirs}.ln1"]
        names[f"{ours}.qkv"] = [f"{theirs}.attn.{x}" for x in ("query", "key", "value")]
        names[f"{ours}.attention_out"] = [f"{theirs}.attn.proj"]
        names[f"{ours}.mlp_norm"] = [f"{theirs}.ln2"]
        names |= {f"{ours}.mlp.{x}": [f"{theirs}.mlp.{x}"] for x in (0, 2)}
    for head in ("observation", "reward", "end"):
        names |= {f"world_model.{head}_head.{x}": [f"world_model.head_{head}s.head_module.{x}"] for x in (0, 2)}
    for i in range(len(actor_critic.channels)):  # a convolution, its pool and its ReLU each
        names[f"actor_critic.convolutions.{3 * i}"] = [f"actor_critic.conv{i + 1}"]
    names["actor_critic.lstm"] = ["actor_critic.lstm"]
    names["actor_critic.actor"] = ["actor_critic.actor_linear"]
    names["actor_critic.critic"] = ["actor_critic.critic_linear"]
    return names


def read_checkpoint(path: Path | str) -> dict:
    """The dictionary that a checkpoint file holds, on the CPU. Raises IrisError for a file that is no such thing."""
    path = Path(path)
    if not path.is_file():
        raise IrisError(f"there is no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for a file that is cut short or foreign
        raise IrisError(f"{path} is no readable checkpoint: it is cut short, or some other kind of file") from error
    if not isinstance(content, dict):
        raise IrisError(f"{path} is no IRIS checkpoint: it holds a {type(content).__name__}, not a dictionary")
    return content


def load_official_checkpoint(path: Path | str) -> Agent:
    """An Agent of the paper's sizes from a checkpoint in the published format, in evaluation mode, on the CPU.

    The number of actions is read off the weights; buffers and `tokenizer.lpips.*` are passed over. Raises IrisError,
    naming the weight, if one is missing or has another shape than the paper's sizes give it.
    """
    return agent_from_official(read_checkpoint(path), str(path))


def agent_from_official(weights: dict, path: str) -> Agent:
    """See `load_official_checkpoint`; `path` is for the error's text."""
    actor = weights.get("actor_critic.actor_linear.weight")
    if not isinstance(actor, Tensor) or actor.dim() != 2:
        raise IrisError(f"{path} is no published IRIS checkpoint: it has no weight actor_critic.actor_linear.weight")
    configs = TokenizerConfig(), WorldModelConfig(), ActorCriticConfig()
    agent = Agent(
        Tokenizer(configs[0]),
        WorldModel(configs[0].vocab_size, len(actor), configs[1]),
        ActorCritic(len(actor), configs[2]),
    )
    names = official_names(configs[0], configs[2], configs[1].layers)
    state = {}
    for name, parameter in agent.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        sources = [f"{source}.{leaf}" for source in names[prefix]]
        if missing := [source for source in sources if not isinstance(weights.get(source), Tensor)]:
            raise IrisError(f"{path} lacks the weight {missing[0]}")
        rows = [weights[source] for source in sources]
        turned = isinstance(agent.get_submodule(prefix), Linear) and leaf == "weight"  # ours is the transpose
        shape = (parameter.t() if turned else parameter).shape
        # What we fused is stacked along the first dimension: in equal parts, but for the two embedding tables.
        lengths = [shape[0] // len(rows)] * len(rows)
        if prefix == "world_model.embedding":
            lengths = [configs[0].vocab_size, len(actor)]
        for source, row, length in zip(sources, rows, lengths, strict=True):
            if tuple(row.shape) != (needed := (length, *shape[1:])):
                raise IrisError(f"{path}: the weight {source} has shape {tuple(row.shape)}, but {needed} is needed")
        state[name] = torch.cat(rows).t() if turned else torch.cat(rows)
    agent.load_state_dict(state, strict=False)  # our own buffers keep their initial values
    return agent.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The lesson: python iris_agent.py
# ---------------------------------------------------------------------------------------------------------------------


class LampDream:
    """A stand-in for the dream: one of four lamps is lit, the action with its number pays 1, then another is lit."""

    def reset(self, n: int) -> Tensor:
        self.lamps = torch.randint(4, (n,))
        return self.frames()

    def frames(self) -> Tensor:
        frames = torch.zeros(len(self.lamps), 3, 64, 64)
        for i, lamp in enumerate(self.lamps.tolist()):
            top, left = 8 + 32 * (lamp // 2), 8 + 32 * (lamp % 2)
            frames[i, :, top : top + 16, left : left + 16] = torch.tensor([1.0, 0.8, 0.2])[:, None, None]
        return frames

    def step(self, actions: Tensor, next_frame: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        rewards = (actions == self.lamps).float()
        self.lamps = torch.randint(4, self.lamps.shape)
        return self.frames(), rewards, torch.zeros(len(actions), dtype=torch.bool)


def lesson(updates: int = 200, out: Path = Path("runs/lessons/agent.png")) -> None:
    torch.manual_seed(0)
    actor_critic = ActorCritic(4, ActorCriticConfig(channels=(8, 8, 16, 16), lstm_width=64))
    optimizer = torch.optim.Adam(actor_critic.parameters(), lr=1e-3)
    dream, n, horizon = LampDream(), 16, 20
    curve = []
    for update in range(1, updates + 1):
        rollout = imagine(actor_critic, dream, dream.reset(n), actor_critic.initial_state(n), horizon)
        # Gamma 0: an action changes nothing but its own reward here, so its lambda-return is that reward. In a game,
        # where a paddle is moved now and a brick falls later, gamma 0.995 carries the reward back.
        losses, metrics = actor_critic_loss(rollout, gamma=0.0, lambda_=0.95, entropy_weight=0.01)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        curve.append(rollout.rewards.sum(dim=1).mean().item())
        if update % (updates // 10) == 0:
            recent = sum(curve[-updates // 10 :]) / len(curve[-updates // 10 :])
            print(f"update {update:4d}   return {recent:5.2f} of {horizon}   {'#' * round(2 * recent)}")

    # Above: what the agent saw at first glance. Below: the policy's four probabilities, as the brightness of the lamps.
    frames = dream.reset(8)
    with torch.no_grad():
        policy = actor_critic(frames, actor_critic.initial_state(8))[0].softmax(dim=1)  # (8, 4)
    painted = F.interpolate(policy.view(8, 1, 2, 2).expand(-1, 3, -1, -1), size=(64, 64), mode="nearest")
    save_picture(out, [frames, painted])
    print(
        f"Learned to press the lit lamp: the mean return rose from {curve[0]:.1f} to {curve[-1]:.1f} of {horizon}. "
        f"Lamps above, the policy's probabilities below: {out}"
    )


if __name__ == "__main__":
    lesson()
