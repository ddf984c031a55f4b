"""Chapter 1's promises."""
import hashlib
import http.server
import socket
import threading
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import iris_tokenizer
from iris_tokenizer import Codebook, Lpips, Tokenizer, TokenizerConfig, load_lpips

SMALL = TokenizerConfig(vocab_size=32, code_dim=16, channels=(8, 8, 8), blocks=(0, 1, 1), attention_at=(16,))


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return Tokenizer(replace(SMALL, **changes))


def test_paper_size_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in Tokenizer(TokenizerConfig()).parameters()) == 4_027_523


def test_shapes_at_every_level_from_frame_to_tokens_and_back():
    tokenizer, seen = Tokenizer(TokenizerConfig()), []
    for layers in (tokenizer.encoder, tokenizer.decoder):
        for name, layer in layers.named_children():
            if name.endswith("sample"):
                layer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    frames = torch.rand(2, 3, 64, 64)
    tokens = tokenizer.encode(frames)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < 512
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == frames.shape and decoded.dtype == torch.float32
    assert seen == [(64, s, s) for s in (32, 16, 8, 4, 8, 16, 32, 64)]
    with torch.no_grad():
        z = tokenizer.encoder_outputs(frames)
        assert z.shape == (2, 16, 512) and tokenizer.decoder_outputs(z).shape == frames.shape


def test_decoded_frames_stay_in_0_1_even_where_the_decoder_overshoots():
    tokenizer = small()
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.mul_(1000)
    decoded = tokenizer.decode(torch.randint(32, (2, 256)))
    assert decoded.min() == 0 and decoded.max() == 1


def test_encoding_has_no_gradient_and_decoding_has_one():
    tokenizer, frames = small(), torch.rand(2, 3, 64, 64)
    assert tokenizer.encoder_outputs(frames).requires_grad and not tokenizer.reconstruct(frames).requires_grad
    assert tokenizer.decode(tokenizer.encode(frames)).requires_grad
    assert torch.equal(tokenizer.reconstruct(frames), tokenizer.decode(tokenizer.encode(frames)))


def test_encode_takes_the_nearest_code_of_all():
    tokenizer = small()
    with torch.no_grad():
        tokenizer.codebook.weight.copy_(torch.randn(32, 16))
    frames = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        z = tokenizer.encoder_outputs(frames)
    codes = tokenizer.codebook.weight.detach()
    expected = [min(range(32), key=lambda c: float((vector - codes[c]).square().sum())) for vector in z.flatten(0, 1)]
    assert len(set(expected)) > 1 and tokenizer.encode(frames).flatten().tolist() == expected


def test_a_local_vector_depends_on_its_own_16x16_pixels_alone():
    tokenizer = small(channels=(8,) * 5, local=True).eval()
    for row in range(4):
        for column in range(4):
            frames = torch.rand(1, 3, 64, 64).repeat(2, 1, 1, 1)
            frames[1, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1.0
            with torch.no_grad():
                before, after = tokenizer.encoder_outputs(frames).unflatten(1, (4, 4))
            assert (before != after).any(dim=2).nonzero().tolist() == [[row, column]]


def test_a_token_stands_for_its_own_patch_in_reading_order():
    tokenizer = small(blocks=(0, 0, 0), attention_at=()).eval()
    torch.nn.init.zeros_(tokenizer.encoder.mid_attn_1.proj_out.weight)  # lets every patch see every other
    for block in (tokenizer.encoder.mid_block_1, tokenizer.encoder.mid_block_2):
        torch.nn.init.zeros_(block.conv2.weight)
    tokenizer.encoder.norm_out = torch.nn.Identity()  # so does the normalisation
    frames = torch.zeros(2, 3, 64, 64)
    frames[1, :, 34:38, 54:58] = 1.0  # inside the patch of row 8 and column 13, of 16 x 16
    with torch.no_grad():
        nothing, something = tokenizer.encoder_outputs(frames)
    change = (something - nothing).abs().sum(dim=1)
    where = change.nonzero()[:, 0]  # convolutions see a patch or two beyond their own
    assert len(where) > 0 and (where // 16 - 8).abs().max() <= 2 and (where % 16 - 13).abs().max() <= 2
    tokenizer.decoder.mid_attn_1, tokenizer.decoder.norm_out = torch.nn.Identity(), torch.nn.Identity()
    for name, block in tokenizer.decoder.named_children():
        if "block" in name:
            torch.nn.init.zeros_(block.conv2.weight)
    codes = torch.zeros(2, 256, 16)
    codes[1, 8 * 16 + 13] = 1.0
    with torch.no_grad():
        nothing, something = tokenizer.decoder_outputs(codes)
    where = (something - nothing).abs().sum(dim=0).nonzero() // 4  # rows and columns of patches
    assert len(where) > 0 and (where - torch.tensor([8, 13])).abs().max() <= 2


# --- the codebook and the losses -------------------------------------------------------------------------------------


def test_straight_through_passes_the_decoders_gradient_to_the_encoder_unchanged(monkeypatch):
    tokenizer, frames, got = small(pixel_commitment_weight=0.0), torch.rand(2, 3, 64, 64), {}
    real_decoder = tokenizer.decoder_outputs

    def decoder_outputs(codes):
        got["codes"] = codes
        codes.retain_grad()
        return real_decoder(codes)

    monkeypatch.setattr(tokenizer, "decoder_outputs", decoder_outputs)
    z = tokenizer.encoder_outputs(frames)
    z.retain_grad()
    sum(tokenizer.loss(frames, z=z).values()).backward()
    assert got["codes"].grad.abs().sum() > 0
    assert torch.equal(z.grad, got["codes"].grad)
    nearest = tokenizer.codebook.weight[tokenizer.encode(frames)]
    assert torch.allclose(got["codes"], nearest, atol=1e-6)  # forwards, the decoder sees the codes themselves
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0  # and backwards, the encoder the decoder's wishes


def test_the_loss_of_given_encoder_outputs_is_the_loss():
    tokenizer, frames = small(), torch.rand(2, 3, 64, 64)
    assert tokenizer.loss(frames, z=tokenizer.encoder_outputs(frames)) == tokenizer.loss(frames)


def test_codebook_term_moves_codes_only_and_commitment_moves_vectors_only():
    tokenizer = small()
    frames = torch.rand(2, 3, 64, 64)
    parameters = dict(tokenizer.named_parameters())
    for term, moved in (("codebook", {"codebook"}), ("commitment", {"encoder", "pre_quantization"})):
        tokenizer.zero_grad()
        tokenizer.loss(frames)[term].backward()
        with_gradient = {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
        assert {name.split(".")[0] for name in with_gradient} == moved


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("worst", [{}, {"worst_values": 12, "worst_weight": 0.1}])
def test_pixel_loss_is_the_published_sum_or_as_told_of_more_worst_values_and_in_units_of_each_pixel(worst, standardize):
    tokenizer = small(**worst, standardize=standardize)
    frames = torch.rand(3, 3, 64, 64)
    tokenizer.fit_pixels(frames * 0.1)
    with torch.no_grad():
        losses = tokenizer.loss(frames)
        codes = tokenizer.codebook.weight[tokenizer.encode(frames)]
        error = (tokenizer.decoder_outputs(codes) - frames).numpy()
        error = error / ((frames * 0.1).numpy().std(axis=0) + 0.1) if standardize else error
        distance = float((tokenizer.encoder_outputs(frames) - codes).square().mean())
    n, weight = worst.values() or (1, 0.01)
    largest = np.mean([sorted(np.square(image).ravel())[-n:] for image in error])
    expected = 0.1 * np.abs(error).mean() + np.square(error).mean() + weight * largest
    assert set(losses) == {"reconstruction", "codebook", "commitment"}
    assert float(losses["reconstruction"]) == pytest.approx(expected, rel=1e-5)
    assert float(losses["codebook"]) == pytest.approx(distance, rel=1e-5)
    assert float(losses["commitment"]) == pytest.approx(0.02 * distance, rel=1e-5)


def used_codebook():
    """A codebook of which only code 0 is ever used, and the vectors that use it."""
    torch.manual_seed(0)
    codebook, z = Codebook(32, 16), torch.rand(2, 9, 16)
    with torch.no_grad():
        codebook.weight[1:] = 100.0
    return codebook, z


def test_codes_unused_for_long_are_revived_at_encoder_outputs_and_used_ones_stay():
    codebook, z = used_codebook()
    first = codebook.weight.detach().clone()
    for _ in range(3):
        codebook.revive(z, after=3)
        assert torch.equal(codebook.weight, first)
    assert codebook.unused_for.tolist() == [0] + [3] * 31
    codebook.revive(z, after=3)
    assert torch.equal(codebook.weight[0], first[0])
    distances = (codebook.weight[1:, None] - z.flatten(0, 1)).abs().amax(dim=2)  # (31 codes, 18 vectors)
    assert distances.min(dim=1).values.max() == 0
    assert codebook.unused_for.max() == 0
    assert codebook.nearest(z).unique().numel() > 1


def test_vectors_far_from_all_codes_are_the_likelier_places_of_revived_codes():
    codebook = Codebook(4000, 1)
    z = torch.tensor([[0.1], [0.3], [0.0]])
    with torch.no_grad():
        codebook.weight[:] = 100.0
        codebook.weight[0] = 0.0
    torch.manual_seed(0)
    codebook.revive(z, after=0)
    shares = [(codebook.weight[1:] == place).float().mean().item() for place in z]
    assert shares == pytest.approx([0.1, 0.9, 0.0], abs=0.02)  # as 0.01 to 0.09 to 0


def test_ages_of_codes_survive_saving():
    codebook, z = used_codebook()
    codebook.revive(z, after=3)
    again = Codebook(32, 16)
    again.load_state_dict(codebook.state_dict())
    assert again.unused_for.tolist() == [0] + [1] * 31


def test_a_tokenizer_that_diverges_gives_a_loss_that_is_not_finite_and_no_error_of_its_own():
    tokenizer, frames = small(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        tokenizer.encoder.conv_in.weight.fill_(float("nan"))
    tokenizer.codebook.revive(tokenizer.encoder_outputs(frames), after=0)
    assert not sum(tokenizer.loss(frames).values()).isfinite()


@pytest.mark.parametrize("lpips", [None, lambda x, y: torch.zeros(len(x))])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_moves_no_code_and_counts_no_batch(training, lpips):
    tokenizer = small().train(training)
    tokenizer.codebook.unused_for.fill_(1000)
    first = {name: x.clone() for name, x in tokenizer.state_dict().items()}
    tokenizer.loss(torch.rand(2, 3, 64, 64), lpips)
    assert all(torch.equal(x, first[name]) for name, x in tokenizer.state_dict().items())


def test_code_search_is_float32_under_autocast():
    codebook, z = Codebook(32, 16), torch.tensor([[1.0] * 15 + [1.001]])
    with torch.no_grad():
        codebook.weight.fill_(1.0)
        codebook.weight[7, 15] = 1.001  # in bfloat16 this is 1.0
    with torch.autocast("cpu", torch.bfloat16):
        assert codebook.nearest(z).item() == 7


def test_outputs_and_losses_are_float32_under_autocast():
    tokenizer, frames = small(), torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        z = tokenizer.encoder_outputs(frames)
        losses = tokenizer.loss(frames)
    assert {x.dtype for x in (z, tokenizer.decode(tokenizer.encode(frames)), *losses.values())} == {torch.float32}


def test_frames_are_scaled_to_minus_1_and_1_unless_pixels_have_their_own_statistics():
    tokenizer, frames, seen = small(), torch.rand(50, 3, 64, 64), []
    frames[:, :, 0, 0] = 0.25  # never changes, and stays finite
    tokenizer.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().numpy()))
    tokenizer.encode(frames)
    tokenizer.fit_pixels(frames)
    tokenizer.encode(frames)
    pixels = frames.double().numpy()
    assert abs(seen[0] - (2 * pixels - 1)).max() < 1e-6
    assert abs(seen[1] - (pixels - pixels.mean(axis=0)) / (pixels.std(axis=0) + 0.1)).max() < 1e-4
    torch.nn.init.zeros_(tokenizer.decoder.conv_out.weight)  # a decoder that says nothing gives the mean frame,
    torch.nn.init.zeros_(tokenizer.decoder.conv_out.bias)
    decoded = tokenizer.decode(torch.zeros(1, 256, dtype=torch.int64))[0]
    assert torch.allclose(decoded, frames.mean(dim=0), atol=1e-5)
    torch.nn.init.ones_(tokenizer.decoder.conv_out.bias)  # and one that says 1, a deviation more
    with torch.no_grad():
        outputs = tokenizer.decoder_outputs(torch.zeros(1, 256, 16))[0]
    assert abs(outputs.numpy() - (pixels.mean(axis=0) + pixels.std(axis=0) + 0.1)).max() < 1e-5


# --- the perceptual loss ---------------------------------------------------------------------------------------------


def random_lpips_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    vgg, channels = {}, 3
    plan = {64: (0, 2), 128: (5, 7), 256: (10, 12, 14), 512: (17, 19, 21, 24, 26, 28)}
    for index, width in ((index, width) for width, indices in plan.items() for index in indices):
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
        outputs = 2 * tokenizer.decoder_outputs(tokenizer.codebook.weight[tokenizer.encode(frames)]) - 1
        assert torch.allclose(losses["reconstruction"], (outputs - (2 * frames - 1)).abs().mean())
        assert torch.allclose(losses["perceptual"], lpips(outputs, 2 * frames - 1).mean(), rtol=1e-4)
        assert torch.equal(losses["commitment"], losses["codebook"])  # weight 1.0
    assert set(losses) == {"reconstruction", "perceptual", "codebook", "commitment"}
    sum(losses.values()).backward()
    assert all(p.grad is None for p in lpips.parameters())
    assert not any("lpips" in name for name in tokenizer.state_dict())


@pytest.fixture
def weight_server(tmp_path, monkeypatch):
    """A server on 127.0.0.1 with two weight files, known to the project by their true hashes, and a fresh cache."""
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
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
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
    cached = sorted(path.name for path in (folder / "hub/checkpoints").iterdir())
    assert cached == ["lpips_v0.1_vgg.pth", "vgg16-397923af.pth"]


def test_lpips_file_with_a_wrong_hash_is_refused_by_name(weight_server):
    _, folder = weight_server
    load_lpips()
    path = folder / "hub/checkpoints/lpips_v0.1_vgg.pth"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(OSError, match="lpips_v0.1_vgg.pth was damaged"):
        load_lpips()


def test_missing_lpips_error_names_both_files_and_their_place_in_one_line(weight_server, monkeypatch):
    _, folder = weight_server
    (folder / "served/vgg16-397923af.pth").unlink()
    with pytest.raises(OSError) as error:
        load_lpips()
    text = str(error.value)
    assert "404" in text and "\n" not in text
    assert all(word in text for word in ("vgg16-397923af.pth", "lpips_v0.1_vgg.pth", str(folder / "hub/checkpoints")))
    assert not list((folder / "hub").rglob("*partial"))


def test_an_lpips_download_that_breaks_off_is_no_lpips(weight_server, monkeypatch):
    _, folder = weight_server
    path = folder / "served/vgg16-397923af.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="vgg16-397923af.pth was damaged"):
        load_lpips()


def test_a_server_that_never_answers_is_given_up_and_the_sockets_default_is_kept(monkeypatch, tmp_path):
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing
    rescue = threading.Timer(8.0, silent.close)  # should nobody give up
    rescue.start()
    asked, set_timeout = [], socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: asked.append(s) or set_timeout(s and min(s, 0.5)))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    address = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
    monkeypatch.setattr(iris_tokenizer, "LPIPS_FILES", {"x": (address, "md5", "0"), "y": (address, "md5", "0")})
    began = time.monotonic()
    with pytest.raises(OSError, match="no LPIPS weights") as error:
        load_lpips()
    assert time.monotonic() - began < 5 and "\n" not in str(error.value)
    assert asked == [10.0, None] and socket.getdefaulttimeout() is None
    rescue.cancel()
    silent.close()


# --- the lesson ------------------------------------------------------------------------------------------------------


def test_the_lessons_game_pays_1_for_a_ball_on_the_paddle_and_minus_1_for_any_other():
    torch.manual_seed(0)
    frames, actions, rewards, ends = iris_tokenizer.play_catch(episodes=100)
    red, green, blue = frames[..., ::8, ::8].unbind(dim=2)  # (100, 7, 8, 8): a value a cell
    ball, paddle = ((red > 0.8) | (green > 0.7)).nonzero().view(100, 7, 2, 4)[..., 2:].unbind(dim=2)  # row, column
    assert (green > 0.7).sum() == (red > 0.8).sum() == 700 and (ball[..., 0] == torch.arange(7)).all()
    assert (paddle[..., 0] == 7).all() and (ball[:, :1, 1] == ball[..., 1]).all()
    after = (paddle[..., 1] + actions - 1).clamp(0, 7)  # where the paddle is in the next frame
    assert torch.equal(after[:, :-1], paddle[:, 1:, 1])
    assert (rewards[:, :6] == 0).all() and (ends[:, :6] == 0).all() and (ends[:, 6] == 1).all()
    assert rewards[:, 6].tolist() == [1.0 if on else -1.0 for on in after[:, 6] == ball[:, 6, 1]]
    assert set(rewards[:, 6].tolist()) == {-1.0, 1.0}


def test_pictures_have_their_colours_and_labels_where_they_belong(tmp_path):
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])[:, :, None, None].expand(2, 3, 64, 64)
    path = tmp_path / "new/folder/picture.png"
    image = iris_tokenizer.labelled_rows({"a": colours, "b": 1 - colours}, path)
    picture = cv2.imread(str(path))[..., ::-1]
    assert picture.shape == (2 * 132, 150 + 2 * 132, 3) and np.array_equal(image.numpy(), picture)
    centres = picture[66::132, [150 + 66, 150 + 132 + 66]].tolist()
    assert centres == [[[255, 0, 0], [0, 0, 255]], [[0, 255, 255], [255, 255, 0]]]
    assert (picture[:132, :150] == 0).any() and (picture[132:, :150] == 0).any()  # each row has its label
    with pytest.raises(OSError):
        iris_tokenizer.labelled_rows({"a": colours}, path / "below_a_file.png")


def test_the_lesson_runs_and_leaves_its_picture(tmp_path, capsys):
    iris_tokenizer.lesson(steps=2, out=tmp_path / "tokenizer.png")
    assert cv2.imread(str(tmp_path / "tokenizer.png")).shape == (3 * 132, 150 + 12 * 132, 3)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"Picture: {tmp_path / 'tokenizer.png'}")
