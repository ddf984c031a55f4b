"""Chapter 1's promises."""
import hashlib
import http.server
import socket
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import iris_tokenizer
from iris_tokenizer import IrisError, Lpips, Tokenizer, TokenizerConfig, load_lpips, resize_frame, to_model, to_stored

SMALL = TokenizerConfig(vocab_size=32, code_dim=16, channels=(8, 8, 8), blocks=(0, 1, 1), attention_at=(16,))


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return Tokenizer(TokenizerConfig(**{**vars(SMALL), **changes}))


def test_paper_size_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in Tokenizer(TokenizerConfig()).parameters()) == 4_027_523


def test_shapes_at_every_level_from_frame_to_vectors_and_back():
    tokenizer = Tokenizer(TokenizerConfig())
    seen = []
    for layer in [*tokenizer.encoder, *tokenizer.decoder]:
        if isinstance(layer, iris_tokenizer.Downsample | iris_tokenizer.Upsample):
            layer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    frames = torch.rand(2, 3, 64, 64)
    tokens = tokenizer.encode(frames)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < 512
    painted = tokenizer.decode(tokens)
    assert painted.shape == frames.shape and painted.dtype == torch.float32
    assert seen == [(64, s, s) for s in (32, 16, 8, 4, 8, 16, 32, 64)]


def test_decoded_frames_stay_in_0_1_even_where_the_decoder_overshoots():
    tokenizer = small()
    with torch.no_grad():
        tokenizer.decoder[-1].weight.mul_(1000)
    painted = tokenizer.decode(torch.randint(32, (2, 256)))
    assert painted.min() == 0 and painted.max() == 1


def test_encode_takes_the_nearest_code_of_all():
    tokenizer = small()
    with torch.no_grad():
        tokenizer.codebook.weight.copy_(torch.randn(32, 16))
    frames = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        vectors = tokenizer._vectors(frames)
    codes = tokenizer.codebook.weight.detach()
    expected = [min(range(32), key=lambda c: float((z - codes[c]).square().sum())) for z in vectors]
    assert tokenizer.encode(frames).flatten().tolist() == expected


def test_a_local_encoder_changes_no_token_but_those_around_what_changes():
    tokenizer = small(channels=(8,) * 5, blocks=(0,) * 5, attention_at=(), local_encoder=True).eval()
    frames = torch.rand(1, 3, 64, 64).repeat(2, 1, 1, 1)
    frames[1, :, 38:42, 54:58] = 1.0  # inside the patch of row 2 and column 3, of 4 x 4
    with torch.no_grad():
        before, after = tokenizer._vectors(frames).unflatten(0, (2, 4, 4))
    changed = (before != after).any(dim=2)
    assert changed[2, 3] and not changed[[0, 3]].any() and not changed[:, :2].any()  # a halving looks right and down


def test_a_token_stands_for_its_own_patch_in_reading_order():
    tokenizer = small(blocks=(0, 0, 0), attention_at=()).eval()
    for module in tokenizer.encoder:  # the middle's attention would let every patch see every other
        if isinstance(module, iris_tokenizer.SelfAttention):
            torch.nn.init.zeros_(module.out.weight)
        if isinstance(module, iris_tokenizer.ResidualBlock):
            torch.nn.init.zeros_(module.conv2.weight)
    tokenizer.encoder[-3] = torch.nn.Identity()  # so would the normalisation
    frames = torch.zeros(2, 3, 64, 64)
    frames[1, :, 34:38, 54:58] = 1.0  # inside the patch of row 8 and column 13, of 16 x 16
    with torch.no_grad():
        nothing, something = tokenizer._vectors(frames).unflatten(0, (2, 256))
    change = (something - nothing).abs().sum(dim=1)
    where = change.nonzero()[:, 0]  # convolutions see a patch or two beyond their own
    assert len(where) > 0 and (where // 16 - 8).abs().max() <= 2 and (where % 16 - 13).abs().max() <= 2


def test_straight_through_hands_the_decoders_gradient_to_the_encoder_unchanged():
    tokenizer = small(pixel_commitment_weight=0.0).eval()
    frames = torch.rand(2, 3, 64, 64)
    got = {}
    real_vectors, real_paint = tokenizer._vectors, tokenizer._paint

    def vectors(x):
        got["vectors"] = real_vectors(x)
        got["vectors"].retain_grad()
        return got["vectors"]

    def paint(codes):
        got["codes"] = codes
        codes.retain_grad()
        return real_paint(codes)

    nearest = tokenizer.codebook.weight[tokenizer.encode(frames).flatten()]
    tokenizer._vectors, tokenizer._paint = vectors, paint
    sum(tokenizer.loss(frames).values()).backward()
    assert got["codes"].grad.abs().sum() > 0
    assert torch.equal(got["vectors"].grad, got["codes"].grad)
    assert torch.allclose(got["codes"], nearest, atol=1e-6)  # forwards, the decoder sees the codes themselves


def test_codebook_term_moves_codes_only_and_commitment_moves_vectors_only():
    tokenizer = small().eval()
    frames = torch.rand(2, 3, 64, 64)
    parameters = dict(tokenizer.named_parameters())
    for term, moved in (("codebook", {"codebook.weight"}), ("commitment", {"encoder", "pre_quantization"})):
        tokenizer.zero_grad()
        tokenizer.loss(frames)[term].backward()
        with_gradient = {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
        assert {name if name == "codebook.weight" else name.split(".")[0] for name in with_gradient} == moved


@pytest.mark.parametrize("worst", [{}, {"worst_values": 12, "worst_weight": 0.1}])
def test_pixel_loss_is_the_published_sum_or_as_told_of_more_worst_values(worst):
    tokenizer = small(**worst).eval()
    frames = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        losses = tokenizer.loss(frames)
        codes = tokenizer.codebook.weight[tokenizer.encode(frames).flatten()]
        painted = (tokenizer._paint(codes) + 1) / 2
        distance = float((tokenizer._vectors(frames) - codes).square().mean())
    error = (painted - frames).numpy()
    n, weight = worst.values() or (1, 0.01)
    largest = np.mean([sorted(np.square(image).ravel())[-n:] for image in error])
    expected = 0.1 * np.abs(error).mean() + np.square(error).mean() + weight * largest
    assert float(losses["reconstruction"]) == pytest.approx(expected, rel=1e-5)
    assert float(losses["codebook"]) == pytest.approx(distance, rel=1e-5)
    assert float(losses["commitment"]) == pytest.approx(0.02 * distance, rel=1e-5)


def test_codes_unused_for_long_are_revived_at_encoder_outputs_and_used_ones_stay():
    tokenizer = small(revive_after=3).train()
    with torch.no_grad():
        tokenizer.codebook.weight[1:] = 100.0  # so far away that only code 0 is ever used
    frames = torch.rand(2, 3, 64, 64)
    first = tokenizer.codebook.weight.detach().clone()
    for _ in range(3):
        tokenizer.loss(frames)
        assert torch.equal(tokenizer.codebook.weight, first)
    tokenizer.loss(frames)
    with torch.no_grad():
        vectors = tokenizer._vectors(frames)
    assert torch.equal(tokenizer.codebook.weight[0], first[0])
    for code in tokenizer.codebook.weight[1:]:
        assert (vectors - code).abs().amax(dim=1).min() == 0
    assert tokenizer.code_age.max() == 0
    assert tokenizer.encode(frames).unique().numel() > 1


def test_a_tokenizer_that_diverges_gives_a_loss_that_is_not_finite_and_no_error_of_its_own():
    tokenizer = small(revive_after=0).train()
    with torch.no_grad():
        tokenizer.encoder[0].weight.fill_(float("nan"))
    assert not sum(tokenizer.loss(torch.rand(2, 3, 64, 64)).values()).isfinite()


def test_no_code_is_revived_in_evaluation_mode_or_beside_the_perceptual_loss():
    frames = torch.rand(2, 3, 64, 64)
    for mode, lpips in ((False, None), (True, lambda x, y: torch.zeros(len(x)))):
        tokenizer = small(revive_after=0).train(mode)
        first = tokenizer.codebook.weight.detach().clone()
        tokenizer.loss(frames, lpips)
        assert torch.equal(tokenizer.codebook.weight, first)


def test_code_search_is_float32_under_autocast():
    tokenizer = small()
    tokenizer._vectors = lambda frames: torch.tensor([[1.0] * 15 + [1.001]])
    with torch.no_grad():
        tokenizer.codebook.weight.fill_(1.0)
        tokenizer.codebook.weight[7, 15] = 1.001  # in bfloat16 this is 1.0
    tokenizer.config.channels = (8,) * 7  # 1 token a frame
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.encode(torch.rand(1, 3, 64, 64)).item() == 7


def test_standardising_changes_what_is_read_and_painted_by_the_frames_own_statistics():
    tokenizer = small(standardize=True)
    assert not tokenizer.standardize.fitted
    frames = torch.rand(50, 3, 64, 64)
    read = []
    tokenizer.encoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    tokenizer.standardize.fit(frames)
    assert tokenizer.standardize.fitted
    tokenizer.encode(frames)
    assert read[0].mean(dim=0).abs().max() < 1e-5 and 0.8 < read[0].std(dim=0).mean() < 1
    with torch.no_grad():
        for parameter in tokenizer.decoder[-1].parameters():
            parameter.zero_()  # a decoder that says nothing paints the mean frame
        assert torch.allclose(tokenizer.decode(torch.zeros(1, 256, dtype=torch.int64))[0], frames.mean(dim=0), atol=1e-5)


def test_resize_is_pillows_within_one_level():
    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3), dtype=np.uint8)
    screen[100:104, 50:52] = 255
    expected = np.asarray(Image.fromarray(screen).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resize_frame(torch.from_numpy(screen)).numpy().astype(int) - expected).max() <= 1


def test_stored_frames_survive_the_way_to_the_models_and_back():
    frames = torch.randint(256, (2, 5, 64, 64, 3), dtype=torch.uint8)
    assert to_model(frames).shape == (2, 5, 3, 64, 64)
    assert torch.equal(to_stored(to_model(frames)), frames)


# --- the perceptual loss ---------------------------------------------------------------------------------------------


def random_lpips_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    vgg, channels = {}, 3
    plan = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
    for index, width in plan.items():
        vgg[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) / (3 * channels**0.5)
        vgg[f"features.{index}.bias"] = torch.randn(width, generator=generator) * 0.1
        channels = width
    vgg["classifier.0.weight"] = torch.zeros(2, 2)
    widths = (64, 128, 256, 512, 512)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(widths)}
    return vgg, linear


def naive_lpips(vgg, linear, x, y):
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    taps = []
    for image in (x, y):
        h = (image - shift[None, :, None, None]) / scale[None, :, None, None]
        taps.append([])
        for index in range(30):
            if index in (4, 9, 16, 23):
                h = F.max_pool2d(h, 2, 2)
            elif f"features.{index}.weight" in vgg:
                h = F.conv2d(h, vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"], padding=1).clamp(min=0)
            if index in (3, 8, 15, 22, 29):
                taps[-1].append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
    total = 0
    for i, (a, b) in enumerate(zip(*taps, strict=True)):
        total = total + ((a - b).square() * linear[f"lin{i}.model.1.weight"]).sum(1).mean(dim=(1, 2))
    return total


def test_lpips_is_the_published_distance_and_zero_for_the_same_picture():
    vgg, linear = random_lpips_weights()
    lpips = Lpips(vgg, linear)
    assert sum(b.numel() for name, b in lpips.named_buffers() if name.startswith("linear")) == 1472
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.allclose(lpips(x, y), naive_lpips(vgg, linear, x, y), rtol=1e-4)
    assert lpips(x, x).abs().max() < 1e-6


def test_perceptual_loss_is_the_papers_sum_and_leaves_the_network_frozen():
    lpips = Lpips(*random_lpips_weights())
    tokenizer, frames = small(), torch.rand(2, 3, 64, 64)
    losses = tokenizer.loss(frames, lpips)
    with torch.no_grad():
        painted = tokenizer._paint(tokenizer.codebook.weight[tokenizer.encode(frames).flatten()])
        assert torch.allclose(losses["reconstruction"], (painted - (2 * frames - 1)).abs().mean())
        assert torch.allclose(losses["perceptual"], lpips(painted, 2 * frames - 1).mean(), rtol=1e-4)
        assert torch.equal(losses["commitment"], losses["codebook"])  # weight 1.0
    sum(losses.values()).backward()
    assert all(p.grad is None for p in lpips.parameters())
    assert not any("lpips" in name for name in tokenizer.state_dict())


@pytest.fixture
def weight_server(tmp_path, monkeypatch):
    """A server on 127.0.0.1 with two small weight files, known to the project by their true hashes, and a fresh cache."""
    vgg, linear = random_lpips_weights()
    for name, content in (("vgg16-397923af.pth", vgg), ("lpips_v0.1_vgg.pth", linear)):
        (tmp_path / "served").mkdir(exist_ok=True)
        torch.save(content, tmp_path / "served" / name)

    class Handler(http.server.SimpleHTTPRequestHandler):
        requests = []

        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "served")

        def log_message(self, *args):
            self.requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = {}
    for name, kind in (("vgg16-397923af.pth", "sha256"), ("lpips_v0.1_vgg.pth", "md5")):
        digest = hashlib.new(kind, (tmp_path / "served" / name).read_bytes()).hexdigest()
        files[name] = (f"http://127.0.0.1:{server.server_port}/{name}", kind, digest)
    monkeypatch.setattr(iris_tokenizer, "LPIPS_FILES", files)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield Handler.requests, tmp_path
    server.shutdown()
    server.server_close()


def test_lpips_weights_are_fetched_once_and_then_read_from_the_cache(weight_server):
    requests, folder = weight_server
    x, y = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    first = load_lpips()(x, y)
    assert len(requests) == 2
    assert torch.equal(load_lpips()(x, y), first) and len(requests) == 2
    assert sorted(p.name for p in (folder / "hub/checkpoints").iterdir()) == ["lpips_v0.1_vgg.pth", "vgg16-397923af.pth"]


def test_lpips_file_with_a_wrong_hash_is_refused_by_name(weight_server):
    _, folder = weight_server
    load_lpips()
    path = folder / "hub/checkpoints/lpips_v0.1_vgg.pth"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IrisError, match="lpips_v0.1_vgg.pth is damaged"):
        load_lpips()


def test_missing_lpips_error_names_both_files_and_their_place_in_one_line(weight_server, monkeypatch):
    _, folder = weight_server
    (folder / "served/vgg16-397923af.pth").unlink()
    with pytest.raises(IrisError) as error:
        load_lpips()
    text = str(error.value)
    assert "404" in text and "\n" not in text
    assert all(word in text for word in ("vgg16-397923af.pth", "lpips_v0.1_vgg.pth", str(folder / "hub/checkpoints")))
    assert not list((folder / "hub").rglob("*partial"))


def test_a_server_that_never_answers_is_given_up(monkeypatch, tmp_path):
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing
    monkeypatch.setattr(iris_tokenizer, "NETWORK_PATIENCE", 0.5)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    address = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
    monkeypatch.setattr(iris_tokenizer, "LPIPS_FILES", {"x": (address, "md5", "0"), "y": (address, "md5", "0")})
    began = time.monotonic()
    with pytest.raises(IrisError, match="no LPIPS weights"):
        load_lpips()
    assert time.monotonic() - began < 10  # a hang would be minutes; the patience here is half a second
    silent.close()
