"""Chapter 1 of IRIS: frames become tokens, and tokens become frames again.

A transformer continues sequences of symbols, so before it can imagine a game, each frame has to become a short
sentence of symbols. This file trains a discrete autoencoder (a VQ-VAE; IRIS paper, section 2.1 and appendix):
the encoder shrinks a frame to a 4x4 grid of vectors, each vector is replaced by the nearest of the 512 vectors of a
learned codebook, and the decoder paints the frame back from the 16 code numbers alone. What the decoder cannot
paint from them does not exist for the agent: if the ball is missing here, no policy will ever see it.

    frame (3, 64, 64)                                                             frame (3, 64, 64)
        |  encoder: five levels, 64 -> 32 -> 16 -> 8 -> 4 pixels                      ^  decoder, the same in
        v                                                                             |  the other direction
    vectors (512, 4, 4)  --- nearest code of (512, 512) --->  tokens (16,)  --->  code vectors (512, 4, 4)

Run it alone:   python iris_tokenizer.py      (under two minutes on a laptop: Breakout frames, a small tokenizer,
                                               and a picture of originals, reconstructions and token maps)
Reuse it:       copy this file; it needs torch only (its lesson also gymnasium, ale-py, opencv-python, tqdm).

    tokenizer = Tokenizer(TokenizerConfig())
    tokens = tokenizer.encode(frames)         # (N, 3, 64, 64) in [0, 1]  ->  (N, 16) int64
    frames = tokenizer.decode(tokens)         # and back
    sum(tokenizer.loss(frames).values()).backward()
"""
import hashlib
import os
import threading
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FRAME_SIZE = 64


class IrisError(Exception):
    """Something that the person at the keyboard can put right. Its text is one line: what is wrong, what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------------------


def resize_frame(frame: Tensor) -> Tensor:
    """Screen (H, W, 3) uint8 -> (64, 64, 3) uint8, by antialiased bilinear interpolation.

    The published agents were trained on Pillow's resize; torch's antialiased one differs from it by one level of 255 at
    most. An area resize, as in gymnasium's AtariPreprocessing, differs by up to 90, just where Breakout's ball is.
    """
    frame = frame.permute(2, 0, 1)[None]  # (1, 3, H, W)
    frame = F.interpolate(frame, size=(FRAME_SIZE, FRAME_SIZE), mode="bilinear", antialias=True)
    return frame[0].permute(1, 2, 0).contiguous()


def to_model(frames: Tensor) -> Tensor:
    """Stored frames (..., 64, 64, 3) uint8 -> what all models read: (..., 3, 64, 64) float32 in [0, 1]."""
    return frames.movedim(-1, -3).float().div(255)


def to_stored(frames: Tensor) -> Tensor:
    """Models' frames (..., 3, 64, 64) in [0, 1] -> (..., 64, 64, 3) uint8."""
    return frames.mul(255).round().clamp(0, 255).byte().movedim(-3, -1)


class Standardize(nn.Module):
    """Frames (N, 3, 64, 64) in [0, 1] -> what models read: in [-1, 1], and nothing more, as published; or, once `fit`
    has been called, with the mean frame taken off, and each pixel divided by how much it varies.

    Nearly all of a game's frame is the same at every step. Left in, it is nearly all of what a model sees, and of what
    a decoder is blamed for, and a ball of one pixel waits until the last brick is learned. Not in the paper.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, FRAME_SIZE, FRAME_SIZE))
        self.register_buffer("std", torch.ones(3, FRAME_SIZE, FRAME_SIZE))

    @torch.no_grad()
    def fit(self, frames: Tensor) -> None:
        """Takes mean and deviation of each pixel from frames (N, 3, 64, 64). Once, before training starts."""
        x = frames.mul(2).sub(1)
        self.mean.copy_(x.mean(dim=0))
        # The 0.05 bounds how far a pixel that has hardly ever changed is blown up.
        self.std.copy_(x.std(dim=0, correction=0) + 0.05)

    @property
    def fitted(self) -> bool:
        """Whether `fit` has been called."""
        return bool((self.std != 1).any())

    def forward(self, frames: Tensor) -> Tensor:
        return (frames.mul(2).sub(1) - self.mean) / self.std

    def undo(self, x: Tensor) -> Tensor:
        """What a decoder painted, standardised -> in about [-1, 1]."""
        return x * self.std + self.mean


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TokenizerConfig:
    """Sizes of the tokenizer. The defaults are the paper's (its appendix and published configuration)."""

    vocab_size: int = 512
    """Number of codes in the codebook."""
    code_dim: int = 512
    """Width of a code, and of the encoder's output."""
    channels: tuple[int, ...] = (64, 64, 64, 64, 64)
    """Channels of each level, from 64x64 pixels downwards; each further level halves the height and the width."""
    blocks: tuple[int, ...] = (2, 2, 2, 2, 2)
    """Residual blocks of each level of the encoder, unless local. The decoder has one more where this is not zero."""
    attention_at: tuple[int, ...] = (16, 8)
    """Resolutions, in pixels, at which each residual block is followed by self-attention."""
    local_encoder: bool = False
    """Encode each patch from itself and those right and below: convolutions alone, no residual blocks, attention or
    norms, through which a ball changes every token. Not the paper's; small world models foresee such tokens sooner."""
    commitment_weight: float = 1.0
    """Weight of the commitment term beside the perceptual loss (published configuration)."""
    pixel_commitment_weight: float = 0.02
    """The same beside the weight-free pixel loss (Delta-IRIS)."""
    standardize: bool = False
    """Read frames with the mean frame taken off and each pixel divided by how much it varies, and paint likewise
    (`Standardize`). Not the paper's; it lets a small tokenizer see moving things much sooner."""
    worst_values: int = 1
    """With the pixel loss: how many of a frame's 12,288 errors, the largest, count a second time (Delta-IRIS: 1)."""
    worst_weight: float = 0.01
    """Weight of the mean of these (Delta-IRIS). A ball is about 12 values: 12 of weight 0.1 paint it much sooner."""
    revive_after: int = 50
    """With the pixel loss: training batches without use after which a code is moved to where it is needed."""

    @property
    def tokens_per_frame(self) -> int:
        return (FRAME_SIZE >> (len(self.channels) - 1)) ** 2


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


class GroupNormGradient(torch.autograd.Function):
    """Group normalisation with its backward pass written out: two sums over the pixels, and two multiply-adds.

    With x^ = (x - mean) / std and g = weight * dy, dx = (g - mean(g) - x^ * mean(g * x^)) / std, means over a group.
    Both means follow from two sums over the pixels of each channel, and dx is then a * dy + b * x + c, with numbers
    a, b, c for each frame and channel. torch's own backward does the same arithmetic, but on a CPU much slower when
    groups are as small as here (2 channels), and most of all in bfloat16 (README, "Speed").
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x.float(), weight, bias, n, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)  # mean, rstd = 1 / std: (N, groups)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, mean, rstd = ctx.saved_tensors
        x, (n, c, h, w), groups = x.float(), x.shape, mean.shape[1]
        sum_dy = dy.sum(dim=(2, 3)).view(n, groups, -1)  # (N, groups, channels of a group)
        sum_dyx = (dy * x).sum(dim=(2, 3)).view(n, groups, -1)
        mean, rstd, scale = mean[..., None], rstd[..., None], weight.view(groups, -1)
        sum_dyx_hat = (sum_dyx - mean * sum_dy) * rstd  # sums of dy * x^
        size = h * w * c // groups
        b = -rstd.square() * (scale * sum_dyx_hat).sum(dim=2, keepdim=True) / size  # (N, groups, 1)
        constant = -rstd * (scale * sum_dy).sum(dim=2, keepdim=True) / size - b * mean

        def per_channel(numbers: Tensor) -> Tensor:
            return numbers.expand(n, groups, c // groups).reshape(n, c, 1, 1)

        dx = torch.addcmul(per_channel(constant), x, per_channel(b)).addcmul_(dy, per_channel(rstd * scale))
        return dx, sum_dyx_hat.sum(dim=0).flatten(), sum_dy.sum(dim=0).flatten(), None, None


class GroupNorm(nn.GroupNorm):
    """(N, C, H, W) -> the same, each group of channels with mean 0 and deviation 1. In float32, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return GroupNormGradient.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)


def norm(channels: int) -> GroupNorm:
    return GroupNorm(num_groups=min(32, channels), num_channels=channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + two 3x3 convolutions, each behind a normalisation and a SiLU ("pre-activation"). Shape is kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), conv3x3(channels, channels)
        self.norm2, self.conv2 = norm(channels), conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    """x + single-head attention of every pixel to every pixel. A convolution sees its neighbours; this lets a
    paddle at the bottom know of a ball at the top. Shape is kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, 1, c))  # (N, 3, 1 head, C, HW)
        q, k, v = qkv.transpose(3, 4).unbind(dim=1)  # each (N, 1, HW, C)
        attended = F.scaled_dot_product_attention(q, k, v)  # (N, 1, HW, C)
        return x + self.out(attended.transpose(2, 3).reshape(n, c, h, w))


class Downsample(nn.Module):
    """Halves height and width: (N, C, H, W) -> (N, C', H/2, W/2).

    The padding is one pixel on the right and at the bottom only, so that every output pixel looks at the 2x2 pixels it
    stands for and one beyond. Published weights expect this; with symmetric padding it would look further left and up.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: (N, C, H, W) -> (N, C', 2H, 2W). Copying pixels and then smoothing them leaves no
    checkerboard, as a transposed convolution would."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = conv3x3(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def build_encoder(config: TokenizerConfig) -> nn.Sequential:
    """(N, 3, 64, 64) in [-1, 1] -> (N, code_dim, 4, 4)."""
    layers: list[nn.Module]
    if config.local_encoder:
        layers = [conv3x3(3, config.channels[0]), nn.SiLU()]
        for channels_in, channels_out in pairwise(config.channels):
            layers += [Downsample(channels_in, channels_out), nn.SiLU()]
        return nn.Sequential(*layers, nn.Conv2d(config.channels[-1], config.code_dim, kernel_size=1))
    levels = list(zip(config.channels, config.blocks, strict=True))
    layers = [conv3x3(3, config.channels[0])]
    for level, (channels, blocks) in enumerate(levels):
        for _ in range(blocks):
            layers.append(ResidualBlock(channels))
            if FRAME_SIZE >> level in config.attention_at:
                layers.append(SelfAttention(channels))
        if level + 1 < len(levels):
            layers.append(Downsample(channels, config.channels[level + 1]))
    layers += [ResidualBlock(channels), SelfAttention(channels), ResidualBlock(channels)]
    layers += [norm(channels), nn.SiLU(), conv3x3(channels, config.code_dim)]
    return nn.Sequential(*layers)


def build_decoder(config: TokenizerConfig) -> nn.Sequential:
    """(N, code_dim, 4, 4) -> (N, 3, 64, 64), about in [-1, 1]. The encoder's mirror image, one block a level richer."""
    levels = list(zip(config.channels, config.blocks, strict=True))
    channels = config.channels[-1]
    layers: list[nn.Module] = [conv3x3(config.code_dim, channels)]
    layers += [ResidualBlock(channels), SelfAttention(channels), ResidualBlock(channels)]
    for level, (channels, blocks) in reversed(list(enumerate(levels))):
        for _ in range(blocks + 1 if blocks else 0):
            layers.append(ResidualBlock(channels))
            if FRAME_SIZE >> level in config.attention_at:
                layers.append(SelfAttention(channels))
        if level > 0:
            layers.append(Upsample(channels, config.channels[level - 1]))
    layers += [norm(channels), nn.SiLU(), conv3x3(channels, 3)]
    return nn.Sequential(*layers)


class Tokenizer(nn.Module):
    """Frames <-> tokens (paper, section 2.1). 4,027,523 parameters with the default sizes.

    Frames are (N, 3, 64, 64) float32 in [0, 1], tokens (N, K) int64 in [0, vocab_size), K = 16 in reading order (left
    to right, top to bottom).
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.revive_after = config.revive_after
        self.standardize = Standardize()
        self.encoder = build_encoder(config)
        self.pre_quantization = nn.Conv2d(config.code_dim, config.code_dim, kernel_size=1)
        self.codebook = nn.Embedding(config.vocab_size, config.code_dim)
        self.post_quantization = nn.Conv2d(config.code_dim, config.code_dim, kernel_size=1)
        self.decoder = build_decoder(config)
        nn.init.uniform_(self.codebook.weight, -1 / config.vocab_size, 1 / config.vocab_size)
        # Steps since each code was last used. A buffer, because an exact resume needs it.
        self.register_buffer("code_age", torch.zeros(config.vocab_size, dtype=torch.int64))
        self.to(memory_format=torch.channels_last)  # no other numbers, but faster convolutions on CPU and GPU

    def _vectors(self, frames: Tensor) -> Tensor:
        """Frames -> encoder outputs, one row a token: (N * K, code_dim) float32."""
        x = self.standardize(frames).contiguous(memory_format=torch.channels_last)
        z = self.pre_quantization(self.encoder(x))  # (N, D, 4, 4)
        return z.permute(0, 2, 3, 1).reshape(-1, self.config.code_dim).float()

    def _relative_distances(self, vectors: Tensor) -> Tensor:
        """Vectors (M, D) -> squared distances to all codes (M, V), less |z|^2, which is the same for all codes:
        |z - e|^2 = |z|^2 - 2 z.e + |e|^2.

        Always in whole float32: in bfloat16 or TF32 the distances to two neighbouring codes are often the same number.
        """
        matmul = torch.backends.cuda.matmul
        precision, matmul.fp32_precision = matmul.fp32_precision, "ieee"  # no TF32
        try:
            with torch.autocast(vectors.device.type, enabled=False):
                codes = self.codebook.weight.float()
                return codes.square().sum(1) - 2 * vectors @ codes.T
        finally:
            matmul.fp32_precision = precision

    def _paint(self, codes: Tensor) -> Tensor:
        """Code vectors (N * K, D) -> frames (N, 3, 64, 64), about in [-1, 1]."""
        side = int(self.config.tokens_per_frame**0.5)
        z = codes.reshape(-1, side, side, self.config.code_dim).permute(0, 3, 1, 2)  # (N, D, 4, 4), channels last
        return self.standardize.undo(self.decoder(self.post_quantization(z)).float())

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, 64, 64) in [0, 1] -> tokens (N, K) int64. No gradient."""
        with torch.no_grad():
            nearest = self._relative_distances(self._vectors(frames)).argmin(dim=1)  # (N * K,)
            return nearest.reshape(len(frames), self.config.tokens_per_frame)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (N, K) int64 -> frames (N, 3, 64, 64), clamped to [0, 1]."""
        codes = self.codebook(tokens.reshape(-1))  # (N * K, D)
        return self._paint(codes).add(1).div(2).clamp(0, 1)

    @torch.no_grad()
    def reconstruct(self, frames: Tensor) -> Tensor:
        """What is left of frames (N, 3, 64, 64) after going through the tokens. No gradient."""
        return self.decode(self.encode(frames))

    def loss(self, frames: Tensor, lpips: "Lpips | None" = None) -> dict[str, Tensor]:
        """Frames (N, 3, 64, 64) in [0, 1] -> named scalar losses, whose sum is minimised.

        With `lpips`: the paper's loss (its section 2.1). Without: the weight-free pixel loss of Delta-IRIS, and, in
        training mode, codes that have not been used for long are moved (`revive_codes`).
        """
        vectors = self._vectors(frames)  # (N * K, D)
        with torch.no_grad():
            distances = self._relative_distances(vectors)  # (N * K, V)
            if self.training and lpips is None:
                distances = self.revive_codes(vectors, distances)
        codes = self.codebook(distances.argmin(dim=1))  # (N * K, D)
        # The nearest-code choice has no derivative. Straight-through: forwards the decoder gets the code, backwards
        # the gradient that arrives at the code is handed to the encoder's vector as it is.
        painted = self._paint(vectors + (codes - vectors).detach())  # (N, 3, 64, 64)

        # Two pulls on the same distance: the codebook term moves codes to the vectors, commitment the vectors to codes.
        losses = {"codebook": F.mse_loss(codes, vectors.detach())}
        commitment = F.mse_loss(vectors, codes.detach())
        if lpips is not None:
            target = frames.mul(2).sub(1)
            losses["reconstruction"] = F.l1_loss(painted, target)
            losses["perceptual"] = lpips(painted, target).mean()
            losses["commitment"] = self.config.commitment_weight * commitment
        else:
            # A ball is 4 of 4,096 pixels: a mean forgets it, the worst errors of the frame do not.
            error = (painted + 1) / 2 - frames
            worst = error.square().flatten(1).topk(self.config.worst_values, dim=1).values.mean()
            everywhere = 0.1 * error.abs().mean() + error.square().mean()
            losses["reconstruction"] = everywhere + self.config.worst_weight * worst
            losses["commitment"] = self.config.pixel_commitment_weight * commitment
        return losses

    def revive_codes(self, vectors: Tensor, distances: Tensor) -> Tensor:
        """Moves codes that no frame has used for `revive_after` steps onto encoder outputs of this batch.

        A code that is nearest to nothing gets no gradient, so it stays dead; a young tokenizer soon paints everything
        with a handful of codes. The new places are drawn in proportion to the squared distance to the nearest living
        code (the k-means++ rule): there the codebook is poorest, and there the small moving things are.
        All shapes are fixed and nothing is read back to the host. Vectors (M, D), distances (M, V); returns the
        distances to the codebook as it now is.
        """
        nearest, tokens = distances.min(dim=1)  # (M,) both
        self.code_age += 1
        self.code_age.index_fill_(0, tokens, 0)
        dead = self.code_age > self.revive_after  # (V,)
        badly_served = (nearest + vectors.square().sum(1)).clamp(min=0) + 1e-12  # (M,), the whole squared distance
        badly_served = badly_served.nan_to_num(nan=1.0, posinf=1.0)  # a run that diverges is reported elsewhere
        places = vectors[torch.multinomial(badly_served, len(dead), replacement=True)]  # (V, D)
        self.codebook.weight.data.copy_(torch.where(dead[:, None], places, self.codebook.weight))
        self.code_age.masked_fill_(dead, 0)
        return self._relative_distances(vectors)


# ---------------------------------------------------------------------------------------------------------------------
# Perceptual loss (LPIPS, Zhang et al., CVPR 2018): two pictures are alike if a trained network sees the same in them
# ---------------------------------------------------------------------------------------------------------------------

VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a 2x2 max-pool between


class Lpips(nn.Module):
    """Distance of pictures x, y (N, 3, H, W) in [-1, 1] -> (N,), in LPIPS v0.1 with VGG16. Frozen.

    `vgg16_state_dict` is torchvision's (features.0.weight ...), `linear_state_dict` LPIPS's (lin0.model.1.weight ...);
    `load_lpips` fetches both.
    """

    def __init__(self, vgg16_state_dict: dict[str, Tensor], linear_state_dict: dict[str, Tensor]):
        super().__init__()
        self.stages = nn.ModuleList()
        channels, index = 3, 0  # index counts torchvision's layers: a convolution, its ReLU, ..., the pool
        for widths in VGG16_WIDTHS:
            stage = nn.Sequential()
            if channels != 3:
                stage.append(nn.MaxPool2d(2))
            for width in widths:
                conv = conv3x3(channels, width)
                conv.weight.data.copy_(vgg16_state_dict[f"features.{index}.weight"])
                conv.bias.data.copy_(vgg16_state_dict[f"features.{index}.bias"])
                stage.extend([conv, nn.ReLU(inplace=True)])
                channels, index = width, index + 2
            index += 1
            self.stages.append(stage)
        for i in range(len(VGG16_WIDTHS)):
            self.register_buffer(f"linear{i}", linear_state_dict[f"lin{i}.model.1.weight"].clone())  # (1, C, 1, 1)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = (torch.cat([x, y]) - self.shift) / self.scale  # (2N, 3, H, W): one pass for both
        distance = torch.zeros(len(x), device=x.device)
        for i, stage in enumerate(self.stages):
            h = stage(h)  # (2N, C, H, W), C and size of this stage
            features = h.float()
            features = features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            of_x, of_y = features.chunk(2)
            weighted = (of_x - of_y).square() * getattr(self, f"linear{i}")
            distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))
        return distance


# name in torch.hub's cache: (address, kind of hash, how the file's hash begins)
LPIPS_FILES = {
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth", "sha256", "397923af"),
    "lpips_v0.1_vgg.pth": (
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
        "md5",
        "d507d7349b931f0638a25a48a722f98a",
    ),
}
NETWORK_PATIENCE = 10.0  # seconds until a network that does not answer is given up


def load_lpips() -> Lpips:
    """The perceptual network, from torch.hub's cache (TORCH_HOME), fetching what is missing.

    Raises IrisError, naming both files and where to put them, if one is missing and can't be fetched, or is damaged.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        for name, (url, kind, digest) in LPIPS_FILES.items():
            if not (folder / name).exists():
                download(url, folder / name)
            with open(folder / name, "rb") as file:
                if not hashlib.file_digest(file, kind).hexdigest().startswith(digest):
                    raise OSError(f"{name} is damaged (its {kind} does not begin with {digest}); delete it")
        vgg16, linear = (torch.load(folder / name, map_location="cpu", weights_only=True) for name in LPIPS_FILES)
        return Lpips(vgg16, linear)
    except (OSError, KeyError, RuntimeError) as error:
        sources = " and ".join(f"{name} (from {url})" for name, (url, _, _) in LPIPS_FILES.items())
        raise IrisError(f"no LPIPS weights: {error}. Put {sources} into {folder}") from error


def download(url: str, target: Path) -> None:
    """Fetches `url` into the file `target`, which appears only when complete. Raises OSError.

    urlopen's own timeout counts neither the name lookup nor each address it tries, so the connection is made in a
    thread that is waited for `NETWORK_PATIENCE` seconds, and left alone after that.
    """
    answer: list = []

    def connect():
        try:
            answer.append(urllib.request.urlopen(url, timeout=NETWORK_PATIENCE))
        except OSError as error:
            answer.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NETWORK_PATIENCE)
    if not answer:
        raise OSError(f"no answer from the network within {NETWORK_PATIENCE:.0f} seconds")
    if isinstance(answer[0], OSError):
        raise answer[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with answer[0] as response, open(partial, "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
            expected = response.headers.get("Content-Length")
            if expected is not None and file.tell() != int(expected):
                raise OSError(f"{url} broke off after {file.tell()} of {expected} bytes")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The lesson: python iris_tokenizer.py
# ---------------------------------------------------------------------------------------------------------------------

# Convolutions at many pixels are what a tokenizer costs. This one has no blocks at the three finest levels. Fewer
# codes, and a stronger pull of the vectors towards them, make tokens that a world model can foresee after a minute.
SMALL_TOKENIZER = TokenizerConfig(
    vocab_size=256, code_dim=64, channels=(16, 32, 32, 64, 64), blocks=(0, 0, 0, 1, 1), attention_at=(8,),
    standardize=True, pixel_commitment_weight=0.25,
)  # fmt: skip


def random_breakout(steps: int, seed: int = 0) -> dict[str, Tensor]:
    """Plays Breakout at random: frames (steps, 64, 64, 3) uint8, actions and ends int64, rewards float32 (steps,).

    Each action is repeated for 4 screens, the frame is the maximum of the last two (an Atari draws some objects only
    on every other screen). The loop's own `iris_train.make_env` does this with all its details.
    """
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    env = gymnasium.make("BreakoutNoFrameskip-v4")
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(int(env.action_space.n), (steps,), generator=generator)
    frames = torch.empty(steps, FRAME_SIZE, FRAME_SIZE, 3, dtype=torch.uint8)
    rewards, ends = torch.zeros(steps), torch.zeros(steps, dtype=torch.int64)
    screens = [torch.from_numpy(env.reset(seed=seed)[0])] * 2
    for step in range(steps):
        frames[step] = torch.maximum(resize_frame(screens[-2]), resize_frame(screens[-1]))
        for _ in range(4):
            screen, reward, terminated, truncated, _ = env.step(int(actions[step]))
            screens = [screens[-1], torch.from_numpy(screen)]
            rewards[step] += float(reward)
            if terminated or truncated:
                ends[step] = 1
                screens = [torch.from_numpy(env.reset()[0])] * 2
                break
    env.close()
    return {"frames": frames, "actions": actions, "rewards": rewards, "ends": ends}


def train_small_tokenizer(frames: Tensor, steps: int, batch_size: int = 16) -> Tokenizer:
    """Frames (M, 64, 64, 3) uint8 -> a tokenizer trained on them, in evaluation mode."""
    from tqdm import trange

    tokenizer = Tokenizer(SMALL_TOKENIZER)
    tokenizer.standardize.fit(to_model(frames))
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=1e-3)
    for _ in trange(steps, desc="tokenizer", disable=None):
        batch = to_model(frames[torch.randint(len(frames), (batch_size,))])
        losses = tokenizer.loss(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return tokenizer.eval()


def moving_error(frames: Tensor, painted: Tensor, background: Tensor) -> float:
    """Mean absolute error where it counts: at pixels that differ by over 0.1 from the background, the median frame.

    Frames and their reconstructions (N, 3, 64, 64), background (3, 64, 64), all in [0, 1]. Dropping every moving thing
    gives about 0.5 on Breakout; the plain mean error would not show it.
    """
    moving = (frames - background).abs().amax(dim=1, keepdim=True).gt(0.1).expand_as(frames)
    return (frames - painted).abs()[moving].mean().item()


def save_picture(path: Path, rows: list[Tensor], scale: int = 3) -> None:
    """Writes rows of frames, each (N, 3, 64, 64) in [0, 1], as one PNG with a thin line between them."""
    import cv2
    import numpy as np

    tiles = [F.pad(row, (1, 1, 1, 1), value=1.0).permute(2, 0, 3, 1).flatten(1, 2) for row in rows]  # (66, N * 66, 3)
    picture = torch.cat(tiles).clamp(0, 1).mul(255).round().byte()  # (rows * 66, N * 66, 3)
    picture = np.kron(picture.numpy(), np.ones((scale, scale, 1), dtype=np.uint8))  # each pixel scale x scale
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
        raise OSError(f"could not write {path}")


def token_map(tokens: Tensor, vocab_size: int) -> Tensor:
    """Tokens (N, K) -> pictures (N, 3, 64, 64): one coloured tile a token, the same colour for the same code."""
    palette = torch.rand(vocab_size, 3, generator=torch.Generator().manual_seed(1))
    side = int(tokens.shape[1] ** 0.5)
    tiles = palette[tokens].reshape(-1, side, side, 3).permute(0, 3, 1, 2)  # (N, 3, 4, 4)
    return F.interpolate(tiles, size=(FRAME_SIZE, FRAME_SIZE), mode="nearest")


def lesson(steps: int = 1200, out: Path = Path("runs/lessons/tokenizer.png")) -> None:
    torch.manual_seed(0)
    frames = random_breakout(5000)["frames"]
    seen, unseen = frames[:4600], frames[4600:]
    tokenizer = train_small_tokenizer(seen, steps)
    shown = to_model(unseen[::50])  # 8 frames
    tokens = tokenizer.encode(shown)
    painted = tokenizer.reconstruct(to_model(unseen))
    background = to_model(seen).median(dim=0).values
    save_picture(out, [shown, tokenizer.decode(tokens).detach(), token_map(tokens, tokenizer.config.vocab_size)])
    codes = tokenizer.encode(to_model(unseen)).unique().numel()
    print(
        f"Learned to write a Breakout frame as {tokens.shape[1]} tokens: {codes} codes in use, error on moving things "
        f"{moving_error(to_model(unseen), painted, background):.3f} (0.5 would mean that they are dropped). "
        f"Originals, reconstructions and token maps: {out}"
    )


if __name__ == "__main__":
    lesson()
