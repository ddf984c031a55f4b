"""Chapter 1 of IRIS: a frame becomes 16 tokens, and 16 tokens become a frame.

A transformer continues sequences of symbols. Before it can predict a game, each frame has to become a short sequence of
symbols. This file trains a discrete autoencoder that does so (a VQ-VAE: IRIS, arXiv 2209.00588, section 2.1). The
encoder turns a frame into a 4x4 grid of vectors. Each vector is replaced by the nearest of 512 learned vectors, the
codes; their numbers are the tokens. The decoder reconstructs the frame from the tokens alone. What a reconstruction
lacks does not exist for the agent: if the ball is missing here, no policy will learn to hit it.

    frame (3, 64, 64)                                                              frame (3, 64, 64)
       |  encoder: 64 -> 32 -> 16 -> 8 -> 4 pixels                                    ^  decoder: the mirror image
       v                                                                              |
    vectors z (16, 512)  --- nearest of 512 codes --->  tokens (16,)  --- look-up --->  codes (16, 512)

    gradient:  reconstruction -> decoder -> (straight-through) -> z -> encoder; commitment -> encoder; codebook -> codes

Run it:    python iris_tokenizer.py     (a minute on one core; opencv-python writes its picture)
Reuse it:  copy this file; it needs torch only.

    import torch
    from iris_tokenizer import Tokenizer, TokenizerConfig, load_lpips
    frames = torch.rand(2, 3, 64, 64)                           # float32 in [0, 1]
    tokenizer = Tokenizer(TokenizerConfig())
    losses = tokenizer.loss(frames)                             # [Delta-IRIS]; the paper's: loss(frames, load_lpips())
    sum(losses.values()).backward()
    tokens = tokenizer.encode(frames)                           # (2, 16) int64
    reconstructions = tokenizer.decode(tokens)                  # (2, 3, 64, 64) in [0, 1]

The paper trains with Adam, rate 1e-4, 256 frames a step, gradient norm clipped at 10. Random numbers come from torch's
global generator; encoding draws none. [paper] is IRIS or its code, [Delta-IRIS] arXiv 2406.19320, [ours] neither.
"""
import hashlib
import socket
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FRAME_SIZE = 64  # pixels of a frame, in height and in width


@dataclass
class TokenizerConfig:
    """Sizes and loss weights of the tokenizer. The defaults are IRIS's; those of the pixel loss are Delta-IRIS's."""

    vocab_size: int = 512  # Number of codes, V
    code_dim: int = 512  # Width of a code and of the encoder's outputs, D
    channels: tuple[int, ...] = (64, 64, 64, 64, 64)  # Width of each level, of half the resolution of the previous one
    blocks: tuple[int, ...] = (2, 2, 2, 2, 2)  # Residual blocks of an encoder level; the decoder has one more
    attention_at: tuple[int, ...] = (16, 8)  # Resolutions with attention after each block; the middle always has it
    commitment_weight: float = 1.0  # Of the commitment loss, with the perceptual loss
    pixel_commitment_weight: float = 0.02  # Of the commitment loss, with the pixel loss [Delta-IRIS]
    worst_values: int = 1  # Pixel loss: so many of a frame's 12,288 squared errors, the largest, weigh more
    worst_weight: float = 0.01  # Pixel loss: weight of their mean [Delta-IRIS]
    revive_after: int = 50  # Codes that more batches in a row did not use are moved: see `Codebook.revive` [ours]
    local: bool = False  # Small models, by `build_local`, which reads `channels` and `code_dim` only [ours]
    standardize: bool = False  # Pixel loss: errors in units of `fit_pixels`' std, which is to be called before [ours]

    @property
    def tokens_per_frame(self) -> int:
        return (FRAME_SIZE >> (len(self.channels) - 1)) ** 2


# --- The codebook: vectors become tokens (vector quantisation, van den Oord et al., arXiv 1711.00937) -----------------
class Codebook(nn.Embedding):
    """V codes of width D. Called with tokens (...), it returns their codes (..., D), as any embedding does."""

    def __init__(self, vocab_size: int, code_dim: int):
        super().__init__(vocab_size, code_dim)
        nn.init.uniform_(self.weight, -1 / vocab_size, 1 / vocab_size)
        self.register_buffer("unused_for", torch.zeros(vocab_size, dtype=torch.int64))  # batches since each was used

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Vectors (..., D) -> tokens (...) int64, the numbers of the nearest codes. No gradient.

        |z - e|^2 = |z|^2 - 2 z.e + |e|^2, of which |z|^2 is the same for all codes e and left out. bfloat16 would tie
        close codes, so this is computed in float32 even under autocast.
        """
        with torch.autocast(z.device.type, enabled=False):
            return (self.weight.square().sum(dim=1) - 2 * z.float() @ self.weight.T).argmin(dim=-1)

    def quantize(self, z: Tensor, commitment_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Vectors (..., D) -> their nearest codes, with a gradient for z, and two losses that pull them together."""
        codes = self(self.nearest(z))
        losses = {
            "codebook": F.mse_loss(codes, z.detach()),  # moves the codes towards the vectors
            "commitment": commitment_weight * F.mse_loss(z, codes.detach()),  # moves the vectors towards the codes
        }
        # The choice of the nearest code has no derivative. Straight-through estimator: the output equals the codes, and
        # the gradient that arrives here is passed to z unchanged.
        return z + (codes - z).detach(), losses

    @torch.no_grad()
    def revive(self, z: Tensor, after: int) -> None:
        """Moves each code that more than `after` batches in a row did not use, to one of the vectors z (..., D) [ours].

        An unused code gets no gradient and would stay unused. Its new place is a vector drawn with a probability
        proportional to the squared distance from its nearest code: k-means++, but without new distances after each
        draw, so two codes may meet. Call it in each training step, before `loss`, which then uses the moved codes.
        """
        z = z.flatten(0, -2)  # (M, D)
        tokens = self.nearest(z)  # (M,)
        self.unused_for.add_(1).index_fill_(0, tokens, 0)
        unused = self.unused_for > after  # (V,)
        distances = (z - self(tokens)).square().sum(dim=1) + 1e-12  # (M,)
        distances = distances.nan_to_num(nan=1.0, posinf=1.0)  # multinomial rejects NaN; let the loss show it
        # V places are drawn though few are needed: with fixed shapes, the CPU need not wait for the GPU.
        places = z[torch.multinomial(distances, len(self.weight), replacement=True)]  # (V, D)
        self.weight.copy_(torch.where(unused[:, None], places, self.weight))
        self.unused_for.masked_fill_(unused, 0)


# --- Encoder and decoder. Layers are named as in published checkpoints; down.0.block.1 is down_0_block_1 here ---------
def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


class GroupNorm(nn.GroupNorm):
    """At most 32 groups, in float32: CUDA's autocast does that by itself, the CPU's does not."""

    def __init__(self, channels: int):
        super().__init__(num_groups=min(32, channels), num_channels=channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))). Keeps the shape (N, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.conv1 = conv3x3(channels, channels)
        self.norm2 = GroupNorm(channels)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    """x + single-head attention among all pixels: 3x3 convolutions do not connect distant ones. Keeps (N, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, kernel_size=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (N, 1, HW, C)
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (N, HW, C)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


def downsample(channels_in: int, channels_out: int) -> nn.Sequential:
    """(N, C, H, W) -> (N, C', H/2, W/2). Padding is on the right and at the bottom only [paper]: an output pixel sees
    the 2x2 pixels in its place, and one column and one row beyond them."""
    conv = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels_in: int, channels_out: int) -> nn.Sequential:
    """(N, C, H, W) -> (N, C', 2H, 2W), by repeating pixels and then a convolution."""
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=conv3x3(channels_in, channels_out)))


def level_blocks(name: str, count: int, channels: int, attention: bool) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for i in range(count):
        layers[f"{name}_block_{i}"] = ResidualBlock(channels)
        if attention:
            layers[f"{name}_attn_{i}"] = SelfAttention(channels)
    return layers


def mid_layers(channels: int) -> dict[str, nn.Module]:
    block_1, attn_1, block_2 = ResidualBlock(channels), SelfAttention(channels), ResidualBlock(channels)
    return {"mid_block_1": block_1, "mid_attn_1": attn_1, "mid_block_2": block_2}


def out_layers(channels_in: int, channels_out: int) -> dict[str, nn.Module]:
    return {"norm_out": GroupNorm(channels_in), "silu_out": nn.SiLU(), "conv_out": conv3x3(channels_in, channels_out)}


def build_encoder(config: TokenizerConfig) -> nn.Sequential:
    """Scaled frames (N, 3, 64, 64), in [-1, 1] unless `fit_pixels` was called -> (N, D, 4, 4)."""
    channels = config.channels
    layers: dict[str, nn.Module] = {"conv_in": conv3x3(3, channels[0])}
    for level, (width, blocks) in enumerate(zip(channels, config.blocks, strict=True)):
        layers |= level_blocks(f"down_{level}", blocks, width, FRAME_SIZE >> level in config.attention_at)
        if level + 1 < len(channels):
            layers[f"down_{level}_downsample"] = downsample(width, channels[level + 1])
    return nn.Sequential(OrderedDict(layers | mid_layers(channels[-1]) | out_layers(channels[-1], config.code_dim)))


def build_decoder(config: TokenizerConfig) -> nn.Sequential:
    """(N, D, 4, 4) -> scaled frames (N, 3, 64, 64). The encoder's mirror image, with one more block a level."""
    channels = config.channels
    layers: dict[str, nn.Module] = {"conv_in": conv3x3(config.code_dim, channels[-1])} | mid_layers(channels[-1])
    for level, (width, blocks) in reversed(list(enumerate(zip(channels, config.blocks, strict=True)))):
        layers |= level_blocks(f"up_{level}", blocks + 1, width, FRAME_SIZE >> level in config.attention_at)
        if level > 0:
            layers[f"up_{level}_upsample"] = upsample(width, channels[level - 1])
    return nn.Sequential(OrderedDict(layers | out_layers(channels[0], 3)))


# --- The tokenizer ----------------------------------------------------------------------------------------------------
class Tokenizer(nn.Module):
    """Frames <-> tokens [paper, section 2.1]. 4,027,523 parameters with the default sizes.

    Frames are (N, 3, 64, 64) float32 in [0, 1]; tokens are (N, K) int64 in [0, V), K = 16, in reading order.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        # Frames enter as (frames - mean) / std. With 0.5 and 0.5 that is [-1, 1] [paper], until `fit_pixels` [ours].
        self.register_buffer("mean", torch.full((3, FRAME_SIZE, FRAME_SIZE), 0.5))
        self.register_buffer("std", torch.full((3, FRAME_SIZE, FRAME_SIZE), 0.5))
        encoder_and_decoder = build_local(config) if config.local else (build_encoder(config), build_decoder(config))
        self.encoder, self.decoder = encoder_and_decoder
        self.pre_quantization = nn.Conv2d(config.code_dim, config.code_dim, kernel_size=1)
        self.codebook = Codebook(config.vocab_size, config.code_dim)
        self.post_quantization = nn.Conv2d(config.code_dim, config.code_dim, kernel_size=1)
        self.to(memory_format=torch.channels_last)  # for speed; the weights' layout decides that of all that follows

    def encoder_outputs(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, 64, 64) float32 in [0, 1] -> vectors z (N, K, D) float32, with gradient."""
        x = ((frames - self.mean) / self.std).contiguous()
        return self.pre_quantization(self.encoder(x)).flatten(2).transpose(1, 2).float()

    def decoder_outputs(self, codes: Tensor) -> Tensor:
        """Codes (N, K, D) -> frames (N, 3, 64, 64) float32, about in [0, 1] but not clamped, with gradient."""
        side = FRAME_SIZE >> (len(self.config.channels) - 1)  # 4
        x = codes.transpose(1, 2).unflatten(2, (side, side)).contiguous()  # (N, D, 4, 4)
        return self.decoder(self.post_quantization(x)).float() * self.std + self.mean

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, 64, 64) in [0, 1] -> tokens (N, K) int64. No gradient."""
        return self.codebook.nearest(self.encoder_outputs(frames))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (N, K) int64 -> frames (N, 3, 64, 64), clamped to [0, 1]. With gradient, unless called in no_grad."""
        return self.decoder_outputs(self.codebook(tokens)).clamp(0, 1)

    @torch.no_grad()
    def reconstruct(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, 64, 64) in [0, 1] -> decode(encode(frames)): what the agent gets to see. No gradient."""
        return self.decode(self.encode(frames))

    @torch.no_grad()
    def fit_pixels(self, frames: Tensor) -> None:
        """Takes mean and std of each pixel from frames (N, 3, 64, 64) in [0, 1] [ours]. The mean is the background:
        what is encoded is what differs from it, in units of the std. With `standardize`, the pixel loss is in these
        units too: errors weigh more where values rarely change, as where a ball passes. Later calls change tokens."""
        self.mean.copy_(frames.mean(dim=0))
        self.std.copy_(frames.std(dim=0, correction=0) + 0.1)  # a pixel that never changes is scaled by 10

    def loss(self, frames: Tensor, lpips: "Lpips | None" = None, z: Tensor | None = None) -> dict[str, Tensor]:
        """Frames (N, 3, 64, 64) in [0, 1] -> named scalar losses, whose sum is minimised.

        With `lpips` the reconstruction loss is the paper's; without, it is the pixel loss, which needs no downloaded
        network. `z` is `encoder_outputs(frames)`, from a caller that has it already (see `Codebook.revive`).
        """
        z, c = self.encoder_outputs(frames) if z is None else z, self.config
        codes, losses = self.codebook.quantize(z, c.commitment_weight if lpips else c.pixel_commitment_weight)
        decoded = self.decoder_outputs(codes)
        if lpips:
            return losses | paper_loss(decoded, frames, lpips)
        errors = (decoded - frames) / (self.std if c.standardize else 1.0)
        return losses | pixel_loss(errors, c.worst_values, c.worst_weight)


def paper_loss(decoded: Tensor, frames: Tensor, lpips: "Lpips") -> dict[str, Tensor]:
    """mean |x - y| + LPIPS(x, y), where x and y are the decoder's outputs and the frames, scaled to [-1, 1] [paper]."""
    x, y = 2 * decoded - 1, 2 * frames - 1
    return {"reconstruction": F.l1_loss(x, y), "perceptual": lpips(x, y).mean()}


def pixel_loss(errors: Tensor, worst_values: int, worst_weight: float) -> dict[str, Tensor]:
    """Errors d (N, 3, 64, 64) -> 0.1 mean |d| + mean d^2 + worst_weight * mean of a frame's worst_values largest d^2.

    [Delta-IRIS]. Breakout's ball is 4 of 4,096 pixels: it hardly changes a mean, but its errors are among the largest.
    """
    worst = errors.square().flatten(1).topk(worst_values, dim=1).values.mean()
    return {"reconstruction": 0.1 * errors.abs().mean() + errors.square().mean() + worst_weight * worst}


# --- LPIPS, the perceptual loss (Zhang et al., arXiv 1801.03924): images are alike if VGG16's features of them are ----
class Lpips(nn.Module):
    """Images x, y (N, 3, H, W) in [-1, 1] -> their distance (N,). LPIPS v0.1 with VGG16; its weights are frozen.

    The keys are torchvision's (features.0.weight ...) and LPIPS's (lin0.model.1.weight ...). `load_lpips` fetches both.
    """

    def __init__(self, vgg16_state_dict: dict[str, Tensor], linear_state_dict: dict[str, Tensor]):
        super().__init__()
        self.stages = nn.ModuleList()  # a stage ends where features are compared
        channels, index = 3, 0  # torchvision numbers all layers: convolution 0, ReLU 1, convolution 2, ReLU 3, pool 4
        for i, widths in enumerate(((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)):
            stage = nn.Sequential(nn.MaxPool2d(2) if i else nn.Identity())
            for width in widths:
                conv = conv3x3(channels, width)
                conv.load_state_dict({k: vgg16_state_dict[f"features.{index}.{k}"] for k in ("weight", "bias")})
                stage.extend([conv, nn.ReLU(inplace=True)])
                channels, index = width, index + 2
            index += 1
            self.stages.append(stage)
            self.register_buffer(f"linear{i}", linear_state_dict[f"lin{i}.model.1.weight"].clone())  # (1, C, 1, 1)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("divisor", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = (torch.cat([x, y]) - self.shift) / self.divisor  # (2N, 3, H, W)
        distance = torch.zeros(len(x), device=x.device)
        for i, stage in enumerate(self.stages):
            h = stage(h)  # (2N, C, H', W')
            unit = h.float() / (h.float().square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            difference = (unit[: len(x)] - unit[len(x) :]).square() * getattr(self, f"linear{i}")
            distance = distance + difference.sum(dim=1).mean(dim=(1, 2))
        return distance


PERCEPTUAL_SIMILARITY = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
LPIPS_FILES = {  # name in torch.hub's cache: (address, kind of hash, beginning of the hash)
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth", "sha256", "397923af"),
    "lpips_v0.1_vgg.pth": (f"{PERCEPTUAL_SIMILARITY}/vgg.pth", "md5", "d507d7349b931f0638a25a48a722f98a"),
}


def load_lpips() -> Lpips:
    """LPIPS with its published weights, on the CPU: 530 MB, fetched into torch.hub's cache (TORCH_HOME) where missing.

    Raises OSError, in one line, if a file can't be fetched or is damaged, or the network is silent for 10 seconds.
    """
    folder, timeout = Path(torch.hub.get_dir()) / "checkpoints", socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(10.0)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (url, kind, digest) in LPIPS_FILES.items():
            if not (folder / name).exists():
                torch.hub.download_url_to_file(url, str(folder / name))
            if not hashlib.new(kind, (folder / name).read_bytes()).hexdigest().startswith(digest):
                (folder / name).unlink()  # a download that broke off, or another file of that name
                raise OSError(f"{name} was damaged (its {kind} did not begin with {digest}) and has been deleted")
        return Lpips(*(torch.load(folder / name, map_location="cpu", weights_only=True) for name in LPIPS_FILES))
    except OSError as error:
        files = " and ".join(f"{name} (from {url})" for name, (url, _, _) in LPIPS_FILES.items())
        raise OSError(f"no LPIPS weights: {error}. Put {files} into {folder}") from error
    finally:
        socket.setdefaulttimeout(timeout)


# --- Encoder and decoder of small models [ours] -----------------------------------------------------------------------
def build_local(config: TokenizerConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """The same shapes from fewer layers: patches of 4x4 pixels, merged by 2x2 into a vector; `channels[-1]` wide.

    In the published encoder 3x3 convolutions, norms and attention let a moving ball change all 16 tokens. Here a vector
    depends on its own 16x16 pixels only, and the others stay, which a small world model learns sooner. The decoder's
    convolutions see neighbours."""
    width = config.channels[-1]
    encoder = [nn.PixelUnshuffle(4), nn.Conv2d(48, width, kernel_size=1), nn.SiLU()]
    decoder = [conv3x3(config.code_dim, width)]
    for _ in config.channels[3:]:  # from 16x16 positions to 4x4, and back
        encoder += [nn.Conv2d(width, width, kernel_size=2, stride=2), nn.SiLU()]
        decoder += [ResidualBlock(width), upsample(width, width)]
    encoder.append(nn.Conv2d(width, config.code_dim, kernel_size=1))
    return nn.Sequential(*encoder), nn.Sequential(*decoder, nn.SiLU(), conv3x3(width, 48), nn.PixelShuffle(4))


# --- The lesson: python iris_tokenizer.py trains a small tokenizer on the game of Catch -------------------------------
SMALL_TOKENIZER = TokenizerConfig(
    vocab_size=64, code_dim=32, local=True, standardize=True, pixel_commitment_weight=0.25, worst_weight=0.001
)  # fmt: skip


def draw_catch(row: Tensor, column: Tensor, paddle: Tensor) -> Tensor:
    """(N,) each -> boards (N, 3, 64, 64) of 8x8 cells: a red ball at (row, column), a green paddle in row 7."""
    boards, n = torch.tensor([0.08, 0.08, 0.16]).view(3, 1, 1).repeat(len(row), 1, 8, 8), torch.arange(len(row))
    boards[n, :, 7, paddle] = torch.tensor([0.2, 0.8, 0.4])
    boards[n, :, row, column] = torch.tensor([0.9, 0.3, 0.2])
    return boards.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def play_catch(episodes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random play: frames (E, 7, 3, 64, 64), actions (0 left, 1 stay, 2 right), rewards and ends (E, 7), for chapter 2.

    The ball falls a row a step. The seventh action brings it to row 7 and ends the episode: +1 on the paddle, else -1.
    """
    column, paddle = torch.randint(8, (episodes,)), torch.full((episodes,), 4)
    frames, actions = [], torch.randint(3, (episodes, 7))
    for step in range(7):
        frames.append(draw_catch(torch.full_like(column, step), column, paddle))
        paddle = (paddle + actions[:, step] - 1).clamp(0, 7)
    rewards, ends = torch.zeros(episodes, 7), torch.zeros(episodes, 7, dtype=torch.int64)
    rewards[:, 6], ends[:, 6] = (paddle == column).float() * 2 - 1, 1
    return torch.stack(frames, dim=1), actions, rewards, ends


def train_small_tokenizer(frames: Tensor, steps: int) -> Tokenizer:
    """Frames (M, 3, 64, 64) in [0, 1] -> a tokenizer trained on them. Prints its losses."""
    tokenizer = Tokenizer(SMALL_TOKENIZER)
    tokenizer.fit_pixels(frames)  # for SMALL_TOKENIZER.standardize is True
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        batch = frames[torch.randint(len(frames), (16,))]
        z = tokenizer.encoder_outputs(batch)
        tokenizer.codebook.revive(z, tokenizer.config.revive_after)
        losses = tokenizer.loss(batch, z=z)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"tokenizer step {step:4d}   " + "   ".join(f"{k} {v.item():.5f}" for k, v in losses.items()))
    return tokenizer


def labelled_rows(rows: dict[str, Tensor], path: Path, scale: int = 2) -> Tensor:
    """Rows of frames, label -> (N, 3, 64, 64) in [0, 1] -> an image (H, W, 3) uint8, written to `path` as PNG."""
    import cv2

    strips = []
    for label, frames in rows.items():
        tiles = F.pad(frames.cpu(), (1, 1, 1, 1), value=1.0).permute(2, 0, 3, 1).flatten(1, 2)  # (66, N * 66, 3)
        tiles = tiles.repeat_interleave(scale, dim=0).repeat_interleave(scale, dim=1).mul(255).round().byte()
        margin = torch.full((len(tiles), 150, 3), 255, dtype=torch.uint8).numpy()
        cv2.putText(margin, label, (6, len(tiles) // 2 + 4), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        strips.append(torch.cat([torch.from_numpy(margin), tiles], dim=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), torch.cat(strips).flip(2).numpy()):  # OpenCV takes blue first
        raise OSError(f"can't write {path}")
    return torch.cat(strips)


def lesson(steps: int = 500, out: Path = Path("runs/lessons/tokenizer.png")) -> None:
    torch.manual_seed(0)
    frames = play_catch(episodes=400)[0].flatten(0, 1)  # (2800, 3, 64, 64)
    train, test = frames[:2450], frames[2450:]  # whole episodes; most of Catch's few frames are in both
    tokenizer = train_small_tokenizer(train, steps)
    tokens, reconstructions = tokenizer.encode(test), tokenizer.reconstruct(test)
    colours = torch.rand(tokenizer.config.vocab_size, 3)[tokens[:12]].unflatten(1, (4, 4))  # (12, 4, 4, 3)
    maps = F.interpolate(colours.permute(0, 3, 1, 2), scale_factor=16.0)  # (12, 3, 64, 64)
    labelled_rows({"frames": test[:12], "tokens (colours)": maps, "reconstructions": reconstructions[:12]}, out)
    background = train.median(dim=0).values
    objects = torch.maximum((test - background).abs(), (reconstructions - background).abs()) > 0.1
    errors = [(x - test).abs()[objects].mean().item() for x in (reconstructions, background)]
    print("{} codes in use. Mean error where ball and paddle are, or are decoded: {:.3f}; of the background alone it "
          "would be {:.3f}. Picture: {}".format(tokens.unique().numel(), *errors, out))  # fmt: skip


if __name__ == "__main__":
    lesson()
