"""Chapter 3 of IRIS: a policy that is trained in dreams alone.

An actor-critic sees decoded frames, keeps a memory in an LSTM, and puts out a policy and a value. It is trained on
imagined episodes (IRIS, arXiv 2209.00588, section 2.3): the dream of chapter 2 is stepped 20 times with sampled
actions, the rewards become lambda-returns, and an action becomes more likely if its return exceeds the value, less
likely if not. Real rewards teach it nothing. Real frames only start it: 20 fill the LSTM's memory, the 21st the dream.

    real frames 1 .. 20, decoded    real frame 21, decoded     dreamed frame         dreamed frame
       |                                  |                       |                     |
    warm_up, no gradient -- state --> actor-critic -------> actor-critic --> ... --> actor-critic     state passes on
                                          | logits, value
                                       action ~ softmax --> dream.step(action) -> reward, end, next frame

    gradient:  losses -> logits and values -> LSTM, back to frame 21 -> convolutions
    cut at:    warm_up's state; frames, actions, rewards and ends; returns and advantages

Run it:    python iris_agent.py     (a minute on one core: a small game of memory in place of the dream)
Reuse it:  copy this file; it needs torch only. To load published checkpoints, it also needs chapters 1 and 2.

    import torch
    from iris_agent import ActorCritic
    actor_critic, mask = ActorCritic(num_actions=4), torch.ones(2, 20, dtype=torch.bool)
    state = actor_critic.warm_up(torch.rand(2, 20, 3, 64, 64), mask)
    logits, values, state = actor_critic(torch.rand(2, 3, 64, 64), state)

A training step, with tokenizer and dream of chapters 1 and 2, N segments of real frames (N, 21, 3, 64, 64), and a mask
(N, 20). Where a segment would begin before its episode does, it is padded, and the mask is False:

    past = tokenizer.reconstruct(segments[:, :-1].flatten(0, 1)).unflatten(0, (N, 20))
    first = dream.reset(segments[:, -1])  # real frame 21, decoded from its tokens
    rollout = imagine(actor_critic, dream, first, actor_critic.warm_up(past, mask), horizon=20)
    losses, metrics = actor_critic_loss(rollout, gamma=0.995, lambda_=0.95, entropy_weight=0.001)

and an optimiser's step on the losses' sum. The paper's: Adam, rate 1e-4, N = 64, gradient norm clipped at 10. Actions
and what the dream samples are drawn from torch's global generator. Sizes default to the paper's. [paper] is IRIS or its
code, [ours] is neither.
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
    patch: int = 1  # [ours], for speed: k x k pixels become 3 k^2 channels; k <= 64 / 2^len(channels)


class ActorCritic(nn.Module):
    """Frame and memory -> policy, value, memory [paper, appendix A]. 3,217,957 parameters with 4 actions."""

    def __init__(self, num_actions: int, config: ActorCriticConfig = ActorCriticConfig()):
        super().__init__()
        self.config = config
        # Frames enter as (frames - mean) / std: 0.5 and 0.5 give [-1, 1] [paper]; chapter 4 copies the tokenizer's own.
        self.register_buffer("mean", torch.full((3, 64, 64), 0.5))
        self.register_buffer("std", torch.full((3, 64, 64), 0.5))
        layers, inputs = OrderedDict(patch=nn.PixelUnshuffle(config.patch)), (3 * config.patch**2, *config.channels)
        for i, width in enumerate(config.channels, start=1):
            layers[f"conv{i}"] = nn.Conv2d(inputs[i - 1], width, kernel_size=3, padding=1)
            layers[f"pool{i}"], layers[f"relu{i}"] = nn.MaxPool2d(2), nn.ReLU()
        self.convolutions = nn.Sequential(layers)
        side = 64 // config.patch >> len(config.channels)
        self.lstm = nn.LSTMCell(inputs[-1] * side**2, config.lstm_width)  # 64 x 4 x 4 = 1024 inputs
        self.actor_linear = nn.Linear(config.lstm_width, num_actions)
        self.critic_linear = nn.Linear(config.lstm_width, 1)
        self.to(memory_format=torch.channels_last)  # for speed

    def initial_state(self, n: int) -> State:
        """The memory of n agents that have seen nothing."""
        return (self.actor_linear.weight.new_zeros(n, self.config.lstm_width),) * 2

    def features(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, 64, 64) in [0, 1] -> the LSTM's input (N, 1024)."""
        return self.convolutions((frames - self.mean) / self.std).flatten(1)

    def forward(self, frames: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Frames (N, 3, 64, 64) in [0, 1] -> policy logits (N, A) and values (N,) in float32, and the next state."""
        hidden, cell = self.lstm(self.features(frames), state)
        return self.actor_linear(hidden).float(), self.critic_linear(hidden)[:, 0].float(), (hidden, cell)

    @torch.no_grad()
    def warm_up(self, frames: Tensor, mask: Tensor) -> State:
        """The memory after decoded frames (N, L, 3, 64, 64). Where mask (N, L) is False, it stays as it was."""
        features = self.features(frames.flatten(0, 1)).unflatten(0, mask.shape)  # (N, L, 1024)
        state = self.initial_state(len(mask))
        for t in range(mask.shape[1]):
            after = self.lstm(features[:, t], state)
            state = tuple(torch.where(mask[:, t, None], new, old) for new, old in zip(after, state, strict=True))
        return state


class Agent(nn.Module):
    """The three models together."""

    def __init__(self, tokenizer: nn.Module, world_model: nn.Module, actor_critic: ActorCritic):
        super().__init__()
        self.tokenizer, self.world_model, self.actor_critic = tokenizer, world_model, actor_critic

    @torch.no_grad()
    def act(self, frames: Tensor, state: State, temperature: float = 1.0) -> tuple[Tensor, State]:
        """Frames (N, 3, 64, 64) in [0, 1] -> actions (N,) int64, and the next state. At an episode's first frame, the
        state is `initial_state`. Temperature 0 takes the most likely action. The policy is trained on decoded frames,
        so real frames go through the tokenizer first."""
        logits, _, state = self.actor_critic(self.tokenizer.reconstruct(frames), state)
        return logits.argmax(dim=1) if temperature == 0 else sample(logits / temperature), state


def sample(logits: Tensor) -> Tensor:
    """Logits (N, A) -> actions (N,) drawn from their softmax, by the Gumbel-max trick: `Categorical(logits=logits)`
    has a `sample()` too, but that would make the CPU wait for the GPU."""
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=1)


# --- Imagination ------------------------------------------------------------------------------------------------------
@dataclass
class Rollout:
    """N imagined episodes of L steps, (N, L) where nothing else is said. Logits and values carry gradients."""
    logits: Tensor  # (N, L, A)
    values: Tensor
    actions: Tensor  # int64
    rewards: Tensor  # in {-1, 0, 1}
    ends: Tensor  # bool
    frames: list[Tensor]  # L times (N, 3, 64, 64), what the agent saw at each step


def imagine(actor_critic: ActorCritic, dream, frames: Tensor, state: State, horizon: int) -> Rollout:
    """Steps a dream `horizon` times, from frames (N, 3, 64, 64) on, with sampled actions [paper, section 2.3].

    `dream.step(actions (N,), next_frame)` returns frames (N, 3, 64, 64), rewards (N,) and ends (N,) bool, as in chapter
    2; at the last step next_frame is False, and the frames may be None. An end neither stops the dream nor resets the
    LSTM. Gradients run through the LSTM's states; frames and actions have none, and REINFORCE needs none.
    """
    steps, seen, frames = [], [], frames.detach()
    for t in range(horizon):
        seen.append(frames)
        logits, values, state = actor_critic(frames, state)
        with torch.no_grad():
            actions = sample(logits)
            frames, rewards, ends = dream.step(actions, next_frame=t + 1 < horizon)
        steps.append((logits, values, actions, rewards, ends))
    logits, values, actions, rewards, ends = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
    return Rollout(logits, values, actions, rewards, ends, seen)


def lambda_returns(rewards: Tensor, values: Tensor, ends: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Rewards, values and ends (N, L) -> lambda-returns (N, L) [paper, section 2.3; Sutton and Barto, section 12.1].

    R_t = r_t + gamma * (1 - end_t) * ((1 - lambda) * v_{t+1} + lambda * R_{t+1}), backwards from R_{L-1} = v_{L-1}: the
    last value stands for all that follows; the last reward and end are not used. Without ends, lambda 0 gives
    r_t + gamma * v_{t+1}, lambda 1 the discounted sum of the rewards and the last value. With gamma = lambda = 0.5:

        step      0       1      2     3     4
        reward    0       1      1     0     1
        value     4       2      3     2     4
        end       no      no     yes   no    no
        return    1       2      1     2     4      e.g. the second: 2 = 1 + 0.5 * (0.5 * 3 + 0.5 * 1)
        counted   yes     yes    yes   yes   no     in `actor_critic_loss`; with after_end=False not the fourth
    """
    returns = [values[:, -1]]
    discount = gamma * (1 - ends.to(values.dtype))
    for t in reversed(range(rewards.shape[1] - 1)):
        returns.append(rewards[:, t] + discount[:, t] * ((1 - lambda_) * values[:, t + 1] + lambda_ * returns[-1]))
    return torch.stack(returns[::-1], dim=1)


def actor_critic_loss(rollout: Rollout, gamma: float, lambda_: float, entropy_weight: float, after_end: bool = True):
    """-> a dict of losses, whose sum is minimised, and a dict of metrics to log, all scalar [paper, section 2.3].

        policy         mean of -log pi(a_t) * (R_t - v_t), REINFORCE with the value as baseline; R_t - v_t is a constant
        value          mean of (v_t - R_t)^2; R_t is a constant
        entropy_bonus  -entropy_weight * mean entropy of pi

    The means are over the first L - 1 steps: of a horizon of 20, 19 steps train, the last only bootstraps. Steps
    after an imagined end are counted as well [paper]; `after_end=False` drops them [ours]. ValueError if L is 1.
    """
    if rollout.rewards.shape[1] < 2:
        raise ValueError("a rollout needs 2 steps or more: its last step is only the bootstrap")
    with torch.no_grad():
        returns = lambda_returns(rollout.rewards, rollout.values, rollout.ends, gamma, lambda_)[:, :-1]
        earlier_ends = rollout.ends.cumsum(dim=1) - rollout.ends.long()  # (N, L)
        counted = ((earlier_ends == 0) | after_end)[:, :-1].float()  # (N, L - 1)
        advantages = returns - rollout.values[:, :-1]

    def mean(x: Tensor) -> Tensor:  # (N, L - 1) -> its mean over counted steps
        return (x * counted).sum() / counted.sum()

    # validate_args would make the CPU wait for the GPU.
    values, policy = rollout.values[:, :-1], Categorical(logits=rollout.logits[:, :-1], validate_args=False)
    entropy = mean(policy.entropy())
    losses = {
        "policy": mean(-policy.log_prob(rollout.actions[:, :-1]) * advantages),
        "value": mean((values - returns).square()),
        "entropy_bonus": -entropy_weight * entropy,
    }
    metrics = {
        "entropy": entropy.detach(), "mean_value": mean(values.detach()), "mean_lambda_return": mean(returns),
        "imagined_reward": mean(rollout.rewards[:, :-1]), "imagined_end": mean(rollout.ends[:, :-1].float()),
    }  # fmt: skip
    return losses, metrics


# --- The lesson: python iris_agent.py learns a game of memory ---------------------------------------------------------
class FadingCatch:
    """In place of the dream, n games: a ball falls through 8 rows and 4 columns, visible in rows 0 to 2. Action 0
    moves the paddle, in row 7, to the left, 2 to the right. A ball in row 7 ends the episode: reward 1 on the paddle,
    -1 beside it. `past` (n, 3, 3, 64, 64) and `mask` are the 3 frames before the first."""

    def __init__(self, row: Tensor):
        self.row, self.column, self.paddle = row, torch.randint(4, row.shape), torch.randint(4, row.shape)
        self.past = torch.stack([self.draw(row - 3), self.draw(row - 2), self.draw(row - 1)], dim=1)
        self.mask = row[:, None] >= torch.tensor([3, 2, 1])

    def draw(self, row: Tensor) -> Tensor:
        boards, n = torch.zeros(len(row), 3, 8, 4), torch.arange(len(row))
        boards[n, 1, 7, self.paddle] = 1.0
        boards[n, 0, row.clamp(0, 7), self.column] = ((0 <= row) & (row <= 2)).float()
        return boards.repeat_interleave(8, dim=2).repeat_interleave(16, dim=3)  # (n, 3, 64, 64)

    def step(self, actions: Tensor, next_frame: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        self.paddle, self.row = (self.paddle + actions - 1).clamp(0, 3), self.row + 1
        ends = self.row == 7
        return self.draw(self.row), ends * (2.0 * (self.paddle == self.column) - 1), ends


def lesson(updates: int = 400) -> None:
    """From row 3 the ball is hidden. Without memory one meets it once in four games, -0.5 a game; with it, up to 1."""
    torch.manual_seed(0)
    actor_critic = ActorCritic(3, ActorCriticConfig(channels=(16, 32), lstm_width=64, patch=4))
    actor_critic.mean.zero_()  # black is 0, and a ball is large: with the paper's 0.5 and 0.5, some seeds learn nothing
    actor_critic.std.fill_(0.2)
    optimizer = torch.optim.Adam(actor_critic.parameters(), lr=3e-3)
    for update in range(1, updates + 1):
        game = FadingCatch(row=torch.randint(6, (64,)))  # from row 5, the earliest past frame shows the ball
        state = actor_critic.warm_up(game.past, game.mask)
        rollout = imagine(actor_critic, game, game.draw(game.row), state, horizon=8)  # at most 7 steps, bootstrap
        losses, metrics = actor_critic_loss(rollout, gamma=0.995, lambda_=0.95, entropy_weight=0.01, after_end=False)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if update % 50 == 0:
            print(f"update {update}  reward {rollout.rewards.sum(1).mean():.2f}  entropy {metrics['entropy']:.2f}")
    for name, warm in (("with", True), ("without", False)):
        game = FadingCatch(row=torch.full((1000,), 3))
        with torch.no_grad():
            state = actor_critic.warm_up(game.past, game.mask & warm)
            rollout = imagine(actor_critic, game, game.draw(game.row), state, horizon=4)
        print(f"1000 games from row 3, the ball hidden, {name} warm_up: {rollout.rewards.sum(dim=1).mean():.2f} a game")


# --- Published checkpoints: huggingface.co, eloialonso/iris, pretrained_models/{Game}.pt ------------------------------
RENAMES = (  # published name -> ours: regular expressions, applied one after the other
    (r"(down|up)\.(\d)\.(block|attn)\.(\d)\.", r"\1_\2_\3_\4."), (r"\.(\w+)\.(\d)\.(\w+sample)\.", r".\1_\2_\3."),
    (r"\.mid\.", ".mid_"), (r"quant_conv", "quantization"), (r"tokenizer\.embedding", "tokenizer.codebook"),
    (r"transformer\.blocks", "layers"), (r"transformer\.ln_f", "ln_f"), (r"pos_emb", "position_embedding"),
    (r"\.head_module", ""), (r"actor_critic\.conv", "actor_critic.convolutions.conv"),
)  # fmt: skip


def load_official_checkpoint(path: Path | str) -> Agent:
    """A published checkpoint -> an Agent of the paper's sizes, on the CPU, in eval mode. Raises OSError for a
    file that cannot be read, ImportError without chapters 1 and 2, else ValueError."""
    try:
        return official_agent(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, ImportError):
        raise
    except Exception as error:  # torch.load has many errors for files that are cut short or of another kind
        raise ValueError(f"{path} is no published IRIS checkpoint: {' '.join(repr(error).split())}") from error


def official_agent(weights: dict[str, Tensor]) -> Agent:
    """Published weights -> the Agent; what no layer needs, such as `tokenizer.lpips.*`, is ignored. Raises KeyError
    for a missing weight and ValueError for one of another shape, both with its name."""
    from iris_tokenizer import Tokenizer, TokenizerConfig
    from iris_world_model import WorldModel, WorldModelConfig

    state = {}
    for name, weight in weights.items():
        for pattern, ours in RENAMES:
            name = re.sub(pattern, ours, name)
        state[name] = weight
    for i in range(WorldModelConfig.layers):  # queries, keys and values are one layer here
        for leaf in ("weight", "bias"):
            parts = [state[f"world_model.layers.{i}.attn.{part}.{leaf}"] for part in ("query", "key", "value")]
            state[f"world_model.layers.{i}.attn.qkv.{leaf}"] = torch.cat(parts)
    tables = [state[f"world_model.embedder.embedding_tables.{i}.weight"] for i in (1, 0)]  # frame tokens, actions
    state["world_model.embedding.weight"] = torch.cat(tables)
    num_actions = len(state["actor_critic.actor_linear.weight"])
    world_model = WorldModel(TokenizerConfig.vocab_size, num_actions, WorldModelConfig())
    agent = Agent(Tokenizer(TokenizerConfig()), world_model, ActorCritic(num_actions)).eval()
    for name, parameter in agent.named_parameters():
        if state[name].shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
        parameter.data.copy_(state[name])
    return agent


if __name__ == "__main__":
    lesson()
