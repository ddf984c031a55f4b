"""Chapter 3 of IRIS: a policy that is trained in dreams alone.

An actor-critic sees decoded frames, keeps a memory in an LSTM, and puts out a policy and a value. It is trained on
imagined episodes (IRIS, arXiv 2209.00588, section 2.3): the dream of chapter 2 is stepped 20 times with sampled
actions, the rewards become lambda-returns, and actions that led to more than the value predicted become more likely.
Real frames do two things only: they fill the LSTM's memory before a dream, and the last of them starts it.

    20 real frames, reconstructed       1 real frame
      |  warm_up: fills the memory        |  starts the dream
      v  (no gradient)                    v
    state ------------------->  frame 0 --> frame 1 --> ... --> frame 19
                                  | ^         |                   |
                                  v | action  v                   v
                              actor-critic: policy logits (A,), value ();  the dream returns reward, end, next frame

    gradient:  losses -> logits and values -> LSTM, back through the 20 steps -> convolutions; never into the dream

Run it:    python iris_agent.py     (a minute on a laptop: a small game of memory in place of the dream)
Reuse it:  copy this file; it needs torch only. `imagine` takes whatever has the `step` of a dream.

    import torch
    from iris_agent import ActorCritic
    actor_critic = ActorCritic(num_actions=4)
    frames, mask = torch.rand(2, 20, 3, 64, 64), torch.ones(2, 20, dtype=torch.bool)
    state = actor_critic.warm_up(frames, mask)                          # the memory after 20 frames
    logits, values, state = actor_critic(torch.rand(2, 3, 64, 64), state)

With a dream (chapter 2) a training step is `rollout = imagine(actor_critic, dream, dream.reset(frames), state, 20)`,
`losses, metrics = actor_critic_loss(rollout, gamma=0.995, lambda_=0.95, entropy_weight=0.001)`, and an optimiser's step
on the sum of the losses; see the lesson at the end.

Marks: [paper] is IRIS, [ours] is not. All defaults are the paper's.
"""
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

State = tuple[Tensor, Tensor]  # the LSTM's hidden state and cell state, each (N, lstm_width)


@dataclass
class ActorCriticConfig:
    """Sizes of the actor-critic. The defaults are the published configuration's."""

    channels: tuple[int, ...] = (32, 32, 64, 64)  # Of the convolutions; each halves height and width
    lstm_width: int = 512  # Width of the LSTM's hidden state
    standardize: bool = False  # Scale each pixel by its own mean and deviation, in place of 0.5 and 0.5 [ours]


class ActorCritic(nn.Module):
    """Frame and memory -> policy, value, memory [paper, appendix A]. 3,217,957 parameters with 4 actions."""

    def __init__(self, num_actions: int, config: ActorCriticConfig = ActorCriticConfig()):
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.full((3, 64, 64), 0.5))  # with both 0.5, [0, 1] becomes [-1, 1]
        self.register_buffer("std", torch.full((3, 64, 64), 0.5))
        layers, channels = OrderedDict(), 3
        for i, width in enumerate(config.channels, start=1):
            layers[f"conv{i}"] = nn.Conv2d(channels, width, kernel_size=3, padding=1)
            layers[f"pool{i}"], layers[f"relu{i}"] = nn.MaxPool2d(2), nn.ReLU()
            channels = width
        self.convolutions = nn.Sequential(layers)
        side = 64 >> len(config.channels)  # 4
        self.lstm = nn.LSTMCell(channels * side * side, config.lstm_width)
        self.actor_linear = nn.Linear(config.lstm_width, num_actions)
        self.critic_linear = nn.Linear(config.lstm_width, 1)

    def initial_state(self, n: int) -> State:
        """The memory of n agents that have seen nothing."""
        zeros = self.actor_linear.weight.new_zeros(n, self.config.lstm_width)
        return zeros, zeros

    def features(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, 64, 64) in [0, 1] -> the LSTM's input (N, 1024)."""
        return self.convolutions((frames - self.mean) / self.std).flatten(1)

    def forward(self, frames: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Frames (N, 3, 64, 64) in [0, 1] -> policy logits (N, A) and values (N,) in float32, and the next state."""
        hidden, cell = self.lstm(self.features(frames), state)
        return self.actor_linear(hidden).float(), self.critic_linear(hidden)[:, 0].float(), (hidden, cell)

    @torch.no_grad()
    def warm_up(self, frames: Tensor, mask: Tensor) -> State:
        """The memory after frames (N, L, 3, 64, 64). Padding (mask (N, L) is False) leaves the state unchanged."""
        n, length = mask.shape
        features = self.features(frames.flatten(0, 1)).unflatten(0, (n, length))  # (N, L, 1024)
        state = self.initial_state(n)
        for t in range(length):
            after = self.lstm(features[:, t], state)
            state = tuple(torch.where(mask[:, t, None], new, old) for new, old in zip(after, state, strict=True))
        return state

    @torch.no_grad()
    def fit_pixels(self, frames: Tensor) -> None:
        """Takes mean and std from frames (N, 3, 64, 64) in [0, 1], once, before training [ours]. Otherwise a ball of a
        few pixels is so small a part of the input that short training does not find it."""
        self.mean.copy_(frames.mean(dim=0))
        self.std.copy_(frames.std(dim=0, correction=0) + 0.025)  # bounds the scale of a pixel that never changes


class Agent(nn.Module):
    """The three models together: enough to play the real game, or to dream it."""

    def __init__(self, tokenizer: nn.Module, world_model: nn.Module, actor_critic: ActorCritic):
        super().__init__()
        self.tokenizer, self.world_model, self.actor_critic = tokenizer, world_model, actor_critic

    @torch.no_grad()
    def act(self, frames: Tensor, state: State, temperature: float = 1.0) -> tuple[Tensor, State]:
        """Frames (N, 3, 64, 64) in [0, 1] -> actions (N,) int64, and the next state.

        The policy is trained on decoded frames, so real frames go through the tokenizer first. Actions are drawn from
        softmax(logits / temperature); at 0 the most likely action is taken.
        """
        logits, _, state = self.actor_critic(self.tokenizer.reconstruct(frames), state)
        return logits.argmax(dim=1) if temperature == 0 else sample(logits / temperature), state


def sample(logits: Tensor) -> Tensor:
    """Logits (N, A) -> actions (N,), drawn from their softmax by the Gumbel-max trick, for which no GPU has to wait."""
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=1)


# --- Imagination ------------------------------------------------------------------------------------------------------
@dataclass
class Rollout:
    """N imagined episodes of L steps. All are (N, L) but the logits. Logits and values carry gradients."""

    logits: Tensor  # (N, L, A)
    values: Tensor
    actions: Tensor  # int64
    rewards: Tensor  # in {-1, 0, 1}
    ends: Tensor  # bool
    frames: list[Tensor]  # L times (N, 3, 64, 64), what the agent saw at each step


def imagine(actor_critic: ActorCritic, dream, frames: Tensor, state: State, horizon: int) -> Rollout:
    """Steps a dream that shows frames (N, 3, 64, 64) `horizon` times, with sampled actions [paper, section 2.3].

    `dream` is an `iris_world_model.Dream`, or anything with its `step`. The gradient runs through the LSTM's states
    from step to step, but not through frames and actions: they are sampled, and REINFORCE needs no derivative of them.
    """
    steps, seen = [], []
    for t in range(horizon):
        seen.append(frames)
        logits, values, state = actor_critic(frames, state)
        actions = sample(logits.detach())
        frames, rewards, ends = dream.step(actions, next_frame=t + 1 < horizon)
        steps.append((logits, values, actions, rewards, ends))
    return Rollout(*(torch.stack(column, dim=1) for column in zip(*steps, strict=True)), seen)


def lambda_returns(rewards: Tensor, values: Tensor, ends: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Rewards, values and ends (N, L) -> lambda-returns (N, L) [paper, section 2.3; Sutton and Barto, section 12.1].

    R_t = r_t + gamma * (1 - end_t) * ((1 - lambda) * v_{t+1} + lambda * R_{t+1}), backwards from R_{L-1} = v_{L-1}: the
    last value stands for all that comes later. With lambda 0 a return is the reward and the next value; with lambda 1
    it is all rewards, and the last value. An example with gamma 0.5 and lambda 0.5:

        step      0       1      2     3     4
        reward    0       1      0     0     1
        value     4       2      3     2     4
        end       no      no     yes   no    no
        return    0.9375  1.75   0     2     4      e.g. 1.75 = 1 + 0.5 * (0.5 * 3 + 0.5 * 0)
        counted   yes     yes    yes   no*   no     in the losses; * yes if `after_end`
    """
    returns = [values[:, -1]]
    discount = gamma * (1 - ends.to(values.dtype))
    for t in reversed(range(rewards.shape[1] - 1)):
        returns.append(rewards[:, t] + discount[:, t] * ((1 - lambda_) * values[:, t + 1] + lambda_ * returns[-1]))
    return torch.stack(returns[::-1], dim=1)


def actor_critic_loss(
    rollout: Rollout, gamma: float, lambda_: float, entropy_weight: float, after_end: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, whose sum is minimised, and metrics to log, all scalar [paper, section 2.3].

        policy         mean of -log pi(a_t) * (R_t - v_t): REINFORCE with the value as baseline; no gradient to R, v
        value          mean of (v_t - R_t)^2; no gradient to R
        entropy_bonus  -entropy_weight * mean entropy of pi

    The means are over the first L - 1 steps: the last one gives the returns their bootstrap value. Steps after an
    imagined end are counted as well [published code]; with `after_end=False` they are not [ours].
    """
    with torch.no_grad():
        returns = lambda_returns(rollout.rewards, rollout.values, rollout.ends, gamma, lambda_)[:, :-1]
        ended_before = rollout.ends.cumsum(dim=1) - rollout.ends.long() > 0  # (N, L)
        counted = (after_end | ~ended_before).float()

    def mean(x: Tensor) -> Tensor:  # (N, L - 1) or (N, L) -> its mean over counted steps
        weights = counted[:, : x.shape[1]]
        return (x * weights).sum() / weights.sum()

    values, policy = rollout.values[:, :-1], Categorical(logits=rollout.logits[:, :-1], validate_args=False)
    entropy = mean(policy.entropy())
    losses = {
        "policy": mean(-policy.log_prob(rollout.actions[:, :-1]) * (returns - values.detach())),
        "value": mean((values - returns).square()),
        "entropy_bonus": -entropy_weight * entropy,
    }
    metrics = {
        "entropy": entropy.detach(), "mean_value": mean(values.detach()), "mean_return": mean(returns),
        "imagined_reward": mean(rollout.rewards), "imagined_end": mean(rollout.ends.float()),
    }  # fmt: skip
    return losses, metrics


# --- The lesson: python iris_agent.py learns a game of memory ---------------------------------------------------------
class FadingCatch:
    """Stands in for the dream: n games in which a ball falls from row 0 to row 7 of a board of 8 rows and 4 columns,
    and is visible in rows 0 to 2 only. Actions 0, 1, 2 move the paddle in row 7 left, not at all, right. The episode
    ends when the ball arrives: reward 1 on the paddle, -1 beside it."""

    def __init__(self, row: Tensor):
        """Starts at rows (n,). `past` (n, 3, 3, 64, 64) holds the three frames before, as far as `mask` is True."""
        self.row, self.column, self.paddle = row, torch.randint(4, row.shape), torch.randint(4, row.shape)
        before = torch.tensor([3, 2, 1])
        self.past, self.mask = torch.stack([self.draw(row - k) for k in before], dim=1), row[:, None] >= before

    def draw(self, row: Tensor) -> Tensor:
        boards, n = torch.zeros(len(row), 3, 8, 4), torch.arange(len(row))
        boards[n, 1, 7, self.paddle] = 1.0
        boards[n, 0, row.clamp(0, 7), self.column] = ((0 <= row) & (row <= 2)).float()
        return boards.repeat_interleave(8, dim=2).repeat_interleave(16, dim=3)  # (n, 3, 64, 64)

    def step(self, actions: Tensor, next_frame: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        self.paddle = (self.paddle + actions - 1).clamp(0, 3)
        self.row = self.row + 1
        ends = self.row == 7
        return self.draw(self.row), ends * (2.0 * (self.paddle == self.column) - 1), ends


def lesson(updates: int = 300) -> None:
    torch.manual_seed(0)
    actor_critic = ActorCritic(3, ActorCriticConfig(channels=(8, 8, 16, 16), lstm_width=64))
    optimizer = torch.optim.Adam(actor_critic.parameters(), lr=3e-3)
    for update in range(1, updates + 1):
        game = FadingCatch(row=torch.randint(6, (64,)))
        state = actor_critic.warm_up(game.past, game.mask)
        rollout = imagine(actor_critic, game, game.draw(game.row), state, horizon=8)
        losses, metrics = actor_critic_loss(rollout, gamma=0.995, lambda_=0.95, entropy_weight=0.003, after_end=False)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if update % 30 == 0:
            mean_return = rollout.rewards.sum(dim=1).mean()
            print(f"update {update:4d}   mean return {mean_return:5.2f}   entropy {metrics['entropy']:.2f}", flush=True)
    for name, keep in (("with", True), ("without", False)):
        game = FadingCatch(row=torch.full((1000,), 3))
        with torch.no_grad():
            state = actor_critic.warm_up(game.past, game.mask & keep)
            rollout = imagine(actor_critic, game, game.draw(game.row), state, horizon=5)
        print(f"1000 games from row 3, the ball hidden, {name} warm_up: {rollout.rewards.sum(dim=1).mean():.2f} a game")


# --- Published checkpoints: huggingface.co, eloialonso/iris, pretrained_models/{Game}.pt ------------------------------
RENAMES = (  # published name -> ours, as regular expressions, one after the other
    (r"(down|up)\.(\d)\.(block|attn)\.(\d)\.", r"\1_\2_\3_\4."), (r"\.(\d)\.(downsample|upsample)\.", r"_\1_\2."),
    (r"\.mid\.", ".mid_"), (r"quant_conv", "quantization"), (r"tokenizer\.embedding", "tokenizer.codebook"),
    (r"transformer\.blocks", "layers"), (r"transformer\.ln_f", "ln_f"), (r"pos_emb", "position_embedding"),
    (r"\.head_module", ""), (r"actor_critic\.conv", "actor_critic.convolutions.conv"),
)  # fmt: skip


def load_official_checkpoint(path: Path | str) -> Agent:
    """A published checkpoint -> an Agent of the paper's sizes, on the CPU, in evaluation mode. Needs chapters 1 and 2.

    Raises OSError, or ValueError for a file that is no such checkpoint, in one line.
    """
    try:
        return official_agent(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, ValueError):
        raise
    except Exception as error:  # torch.load has many errors for files that are cut short or of another kind
        raise ValueError(f"{path} is no file of weights: {type(error).__name__}") from error


def official_agent(weights: dict[str, Tensor]) -> Agent:
    """The same for weights that have been read already. Buffers and `tokenizer.lpips.*` are ignored."""
    from iris_tokenizer import Tokenizer, TokenizerConfig
    from iris_world_model import WorldModel, WorldModelConfig

    try:
        state = {}
        for name, weight in weights.items():
            for pattern, ours in RENAMES:
                name = re.sub(pattern, ours, name)
            state[name] = weight
        for leaf in ("weight", "bias"):  # queries, keys and values are one layer here
            for i in range(WorldModelConfig.layers):
                attn = f"world_model.layers.{i}.attn"
                parts = [state[f"{attn}.{x}.{leaf}"] for x in ("query", "key", "value")]
                state[f"{attn}.qkv.{leaf}"] = torch.cat(parts)
        tables = [state[f"world_model.embedder.embedding_tables.{i}.weight"] for i in (1, 0)]  # frame tokens, actions
        state["world_model.embedding.weight"] = torch.cat(tables)
        num_actions = len(state["actor_critic.actor_linear.weight"])
        tokenizer, world_model = Tokenizer(TokenizerConfig()), WorldModel(512, num_actions, WorldModelConfig())
        agent = Agent(tokenizer, world_model, ActorCritic(num_actions)).eval()
        for name, parameter in agent.named_parameters():
            if state[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
            parameter.data.copy_(state[name])
        return agent
    except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"no published IRIS checkpoint: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    lesson()
