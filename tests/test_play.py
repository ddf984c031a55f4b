"""What a person meets who types `python iris_play.py ...`: a real browser, real files, real errors."""
import functools
import http.client
import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import iris_play
import iris_train
import reference
from iris_play import Moment, World, choose, think
from iris_train import IrisError, load_agent, make_env, to_model, to_stored
from test_command_line import ROOT, assert_one_clear_line, environment
from test_train import FAST

MEANINGS_18 = """NOOP FIRE UP RIGHT LEFT DOWN UPRIGHT UPLEFT DOWNRIGHT DOWNLEFT UPFIRE RIGHTFIRE LEFTFIRE DOWNFIRE
    UPRIGHTFIRE UPLEFTFIRE DOWNRIGHTFIRE DOWNLEFTFIRE""".split()
BREAKOUT, CPU = "BreakoutNoFrameskip-v4", torch.device("cpu")


def command(*arguments):
    return [sys.executable, "-u", str(ROOT / "iris_play.py"), *map(str, arguments)]


def surroundings(**changes):
    """No display, no network, and one thread: beside other work, two would wait for each other."""
    return environment(DISPLAY="", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **changes)


def run(*arguments, cwd=ROOT, **more):
    """iris_play.py to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=surroundings(), capture_output=True, text=True, timeout=300, **more
    )


def wait_until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)
    return value


def make_run(folder, env_id, epoch=60, episodes=0, **biases):
    """A run's folder with small random models. Dreams don't end; what else is fixed is given by name of the weight."""
    args = iris_train.parse_args([*FAST, "--env-id", env_id, "--run-dir", str(folder)])
    args.tokenizer_from, args.world_model_from, args.actor_critic_from = 3, 13, 18
    env = make_env(env_id)
    torch.manual_seed(0)
    weights = iris_train.build_agent(args, int(env.action_space.n)).state_dict()
    weights["world_model.head_ends.2.bias"] = torch.tensor([100.0, 0.0])
    for name, bias in biases.items():
        weights[f"actor_critic.{name}.weight"].zero_()
        weights[f"actor_critic.{name}.bias"].copy_(torch.tensor(bias))
    content = {"format": iris_train.FORMAT, "args": asdict(args), "num_actions": int(env.action_space.n)}
    content |= {"epoch": epoch, "agent": weights}
    folder.mkdir(parents=True)
    torch.save(content, folder / "checkpoint.pt")
    (folder / "args.json").write_text("{}")
    for kind in ("test", "train") if episodes else ():
        for number in range(episodes):
            frame, steps = env.reset(seed=number)[0], []
            for _ in range(30):
                after, reward, end, *_ = env.step(1)
                steps.append((frame, 1, reward + 1, len(steps) == 29))
                frame = after
            iris_train.save_episode(folder / "media/episodes" / kind, f"e{number}", np.array(steps, iris_train.STEP))
    return folder


@pytest.fixture(scope="module")
def breakout(tmp_path_factory):
    """A run on Breakout, with recorded episodes."""
    return make_run(tmp_path_factory.mktemp("breakout") / "run", BREAKOUT, episodes=2)


@pytest.fixture(scope="module")
def boxing(tmp_path_factory):
    """A run on Boxing, which has 18 actions."""
    return make_run(tmp_path_factory.mktemp("boxing") / "run", "BoxingNoFrameskip-v4")


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    """A run on a small game, whose policy always chooses action 2."""
    folder = tmp_path_factory.mktemp("counter") / "run"
    return make_run(folder, "tests.games:Counter-v0", actor_linear=[0.0, 0.0, 100.0])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint in the published format."""
    path = tmp_path_factory.mktemp("published") / "Breakout.pt"
    weights = reference.official_state_dict(4)
    weights["world_model.head_ends.head_module.2.bias"] = torch.tensor([100.0, 0.0])  # a dream without an end
    torch.save(weights, path)
    return path


def world(breakout, place="game", seed=3):
    agent, _ = load_agent(breakout)
    game = World(make_env(BREAKOUT), agent, CPU, seed, place)
    game.reset()
    return agent, game


def pictures_of(path):
    """The pictures of a video or an animation, and how long each is shown in seconds."""
    if path.suffix in (".webm", ".mp4"):
        reader, pictures = cv2.VideoCapture(str(path)), []
        while (read := reader.read())[0]:
            pictures.append(read[1][..., ::-1])
        return pictures, 1 / reader.get(cv2.CAP_PROP_FPS)
    animation, pictures, seconds = Image.open(path), [], 0
    for number in range(animation.n_frames):
        animation.seek(number)
        animation.load()
        seconds += animation.info["duration"] / 1000
        pictures.append(np.array(animation.convert("RGB")))
    return pictures, seconds / animation.n_frames


# --- who chooses, game and dream -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "held, action",
    [
        ([], "NOOP"), (["left"], "LEFT"), (["a"], "LEFT"), (["left", "a"], "LEFT"), (["space"], "FIRE"),
        (["w", "d"], "UPRIGHT"), (["space", "left", "down"], "DOWNLEFTFIRE"), (["left", "right"], "RIGHT"),
        (["right", "left"], "LEFT"), (["left", "right", "space"], "RIGHTFIRE"), (["m", "."], "NOOP"),
    ],
)  # fmt: skip
def test_held_keys_are_the_action_that_uses_most_of_them_and_the_newest_wins(held, action):
    assert MEANINGS_18[choose(MEANINGS_18, held)] == action


def test_a_game_with_fewer_actions_leaves_keys_out_that_it_has_no_action_for():
    names = ["NOOP", "FIRE", "RIGHT", "LEFT"]
    held = [], ["up"], ["up", "left"], ["left", "space"], ["space", "left"]
    assert [choose(names, keys) for keys in held] == [0, 0, 3, 1, 3]
    assert [choose(["0", "1", "2"], keys) for keys in ([], ["1"], ["2", "1"], ["9"])] == [0, 1, 1, 0]


def test_the_agent_sees_the_decoded_tokens_of_the_game_and_its_memory_follows(breakout):
    agent, game = world(breakout)
    state = agent.actor_critic.initial_state(1)
    with torch.no_grad():
        for action in (1, 0, 3):
            think(agent, game.now, CPU)
            seen = agent.tokenizer.reconstruct(to_model(torch.from_numpy(game.now.frame)[None]))
            logits, value, state = agent.actor_critic(seen, state)
            assert torch.equal(game.now.seen, seen) and torch.equal(game.now.logits, logits)
            assert game.now.value == value.item() and torch.equal(game.now.state[0], state[0])
            game.step(action)
        game.step(0)  # a frame that the agent has not looked at: its memory starts anew
        assert game.now.state is None


def test_the_key_steps_into_the_dream_at_this_very_frame_and_back_to_where_the_game_was_left(breakout):
    agent, game = world(breakout)
    twin = make_env(BREAKOUT)
    twin.reset(seed=3)
    for action in (1, 3, 3):
        game.step(action)
        frame, *_ = twin.step(action)
    game.commands["t"]()
    assert game.place == "dream" and game.now.step == 3
    seen = agent.tokenizer.reconstruct(to_model(torch.from_numpy(frame)[None]))
    assert np.array_equal(game.now.frame, to_stored(seen)[0].numpy())
    for step in range(4, 12):  # longer than the 4 blocks of this world model
        game.step(2)
        assert (game.now.step, game.now.action, game.now.tokens.shape) == (step, 2, (1, 16))
    game.commands["t"]()
    assert game.place == "game" and game.now.step == 3 and np.array_equal(game.now.frame, frame)
    game.step(2)
    assert np.array_equal(game.now.frame, twin.step(2)[0])  # the real game had waited


def test_game_and_dream_are_compared_where_either_has_moved_since_they_were_one(breakout):
    _, game = world(breakout, place="both")
    assert game.drift() == (0, 0.0)
    frame = np.zeros((64, 64, 3), np.uint8)
    game.real, game.dreamed = Moment(frame), Moment(frame)
    game.parted = game.real, game.dreamed
    real, dream = frame.copy(), frame.copy()
    real[:2, :2], dream[4:6, :2] = 255, 51  # what the game moved, and what the dream moved elsewhere
    game.real, game.dreamed = Moment(real, step=7), Moment(dream, step=7)
    steps, difference = game.drift()
    assert steps == 7 and difference == pytest.approx((4 * 1.0 + 4 * 0.2) / 8)
    game.dreamed.end = True
    game.go_on()  # only the dream ended: another one from here
    assert game.drift()[0] == 0 and game.real.step == 7


class Script:
    """A page that shows nothing and presses what a test has written down: read number -> keys."""

    def __init__(self, pressed, held=()):
        self.pressed, self.held, self.count, self.shown = pressed, list(held), 0, []

    def show(self, panels, status):
        self.shown.append(status | {"titles": [title for title, _, _ in panels]})

    def read(self, deadline):
        self.count += 1
        pressed = self.pressed.get(self.count, [])
        return pressed, self.held + pressed


def scripted(breakout, pressed, held=(), who="you", place="game", **changes):
    agent, game = world(breakout, place, seed=7)
    game.seed = 7
    page, args = Script(pressed, held), iris_play.Args(fps=1000, **changes)
    with torch.no_grad():
        iris_play.play(game, agent, page, None, ["NOOP", "FIRE", "RIGHT", "LEFT"], args, who)
    return page.shown


def test_pause_one_step_hand_over_restart_and_speed_do_what_they_say(breakout):
    pressed = {4: ["."], 8: ["e"], 9: ["e"], 12: ["."], 15: ["m"], 20: ["enter"], 21: ["-"], 23: ["q"]}
    shown = scripted(breakout, pressed, held=["right"])
    steps = [0, 1, 2, 3, 3, 3, 3, 3, 4, 5, 5, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 1, 2]
    assert [status["step"] for status in shown] == steps
    assert [status["paused"] for status in shown[3:6]] == [False, True, True]
    assert (shown[14]["who"], shown[15]["who"]) == ("you", "agent")
    assert all(status["action"] == 2 for status in shown[1:15]) and shown[22]["fps"] == pytest.approx(1000 / 1.5)
    assert len(shown[19]["traces"][0]) == 13 and len(shown[19]["policy"]) == 4


def test_a_paused_game_that_is_over_begins_anew_with_a_single_step(breakout):
    agent, game = world(breakout)
    step, page = game.env.step, Script({1: ["."], 2: ["e"], 3: ["e"], 4: ["q"]})
    game.env.step = lambda action: (*step(action)[:2], True, False, {})
    with torch.no_grad():
        iris_play.play(game, agent, page, None, ["NOOP"] * 4, iris_play.Args(fps=1000), "you")
    assert [(status["step"], status["end"]) for status in page.shown] == [(0, False), (0, False), (1, True), (0, False)]


def test_with_human_the_agent_is_computed_only_where_it_plays_or_where_there_is_a_dream(breakout):
    shown = scripted(breakout, {4: ["m"], 8: ["m"], 12: ["t"], 16: ["q"]}, human=True)
    computed = [status["value"] is not None for status in shown]
    assert computed == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4


def test_policy_is_sampled_at_the_temperature(breakout):
    greedy = scripted(breakout, {30: ["q"]}, who="agent", temperature=0.0)
    assert all(after["action"] == np.argmax(before["policy"]) for before, after in zip(greedy, greedy[1:]))
    random = scripted(breakout, {60: ["q"]}, who="agent", temperature=float("inf"))
    assert random[0]["policy"] == [0.25] * 4 and len({status["action"] for status in random[1:]}) == 4


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["webm", "mp4", "gif", "webp"])
def test_video_holds_the_steps_that_were_asked_for_and_is_small(breakout, tmp_path, suffix):
    result = run("--run-dir", breakout, "--video", tmp_path / f"play.{suffix}", "--steps", 9, "--fps", 10, "--compare")
    assert result.returncode == 0 and not result.stderr, result.stderr
    (path,) = tmp_path.iterdir()  # nothing is left beside it
    pictures, seconds = pictures_of(path)
    assert len(pictures) * seconds == pytest.approx(1.0, abs=0.02)  # the first frame, and one a step
    height, width, _ = pictures[0].shape
    assert width > 1.8 * height and 256 <= height <= 480
    assert path.stat().st_size < 30_000 * 10


def test_a_video_is_one_whole_episode_if_nothing_is_said_and_many_episodes_are_one_line(counter, tmp_path):
    result = run("--run-dir", counter, "--video", tmp_path / "play.webm", "--seed", 5)
    env = make_env("tests.games:Counter-v0")
    env.reset(seed=5)
    length = env.unwrapped.length
    assert f"play.webm: {length + 1} frames" in result.stdout, (result.stdout, result.stderr)
    assert f"{length} steps, " in result.stdout
    many = run("--run-dir", counter, "--video", tmp_path / "many.webm", "--steps", 100)
    assert len(many.stdout.splitlines()) == 2 and "101 frames" in many.stdout, many.stdout


@pytest.mark.parametrize("flags", [["--video", "x.webm"], ["--video", "x.gif"], ["--evaluate", 1, "--json", "x.json"]])
def test_on_a_full_disk_there_is_one_clear_line_and_nothing_is_left(counter, tmp_path, flags):
    def limit():  # larger files can't be written, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    result = run("--run-dir", counter, *flags, cwd=tmp_path, preexec_fn=limit)
    assert_one_clear_line(result, "can't write x")
    assert not list(tmp_path.iterdir())


def test_a_recording_that_cannot_be_kept_does_not_end_the_game(breakout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()  # in the folder's place
    shown = scripted(breakout, {2: [","], 5: ["q"]})
    assert len(shown) == 5 and "can't write" in shown[2]["trouble"]


def test_a_film_has_even_sizes_and_one_height_whatever_the_sizes_of_its_panels():
    tall, small = np.zeros((501, 333, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    for height in (448, 256):
        picture = iris_play.paint([("The game", tall, None), ("At 64 x 64", small, None)], height)
        assert picture.shape[0] == height + 24 and picture.shape[1] % 2 == 0


def test_a_recording_has_all_panels_and_a_picture_for_each_step(breakout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scripted(breakout, {2: [","], 4: ["."], 6: ["e"], 9: [","], 11: ["q"]}, place="both")  # paused from 4 on
    (path,) = (tmp_path / "runs/recordings").iterdir()
    pictures, _ = pictures_of(path)
    assert len(pictures) == 3 and pictures[0].shape[1] > 1.8 * pictures[0].shape[0]


def test_recorded_episodes_are_walked_step_by_step_ten_back_and_by_episode(breakout):
    agent, _ = load_agent(breakout)
    recorded = iris_play.Recorded(breakout / "media/episodes")
    game = World(recorded, agent, CPU, 0, "game", all_views=True)
    game.reset()
    content = np.load(sorted((breakout / "media/episodes/test").glob("*.npz"))[0])
    for steps, now in [(1, 1), (12, 13), (None, 3), (9, 12), (None, 2), (None, 0)]:  # None: ten back
        for _ in range(steps or 0):
            game.step(0)
        if not steps:
            iris_play.go_back(game)
        assert game.now.step == now and np.array_equal(game.now.frame, content["frames"][now])
        assert game.now.total == content["rewards"][:now].sum()
    while not game.now.end:
        game.step(0)
    assert game.now.step == len(content["frames"]) and game.now.action == content["actions"][-1]
    titles = []
    for _ in range(4):
        titles.append(game.panels()[0][0])
        game.reset()
    assert [title.split("_")[0] for title in titles] == ["test/e0", "test/e1", "train/e0", "train/e1"]
    assert game.panels()[0][0] == titles[0]
    iris_play.go_back(game)  # from the first frame: the episode before
    assert game.panels()[0][0] == titles[3]


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_prints_the_statistics_of_a_policy_whose_score_is_known(counter, tmp_path):
    result = run("--run-dir", counter, "--evaluate", 21, "--seed", 100, "--json", tmp_path / "new" / "score.json")
    assert result.returncode == 0, result.stderr
    env, returns = make_env("tests.games:Counter-v0"), []
    for seed in range(100, 121):
        env.reset(seed=seed)
        returns.append(2 * env.unwrapped.length)  # it earns its action's number, 2, each step
    kept = json.loads((tmp_path / "new" / "score.json").read_text())
    assert kept["returns"] == returns and kept["mean"] == pytest.approx(np.mean(returns))
    assert kept["standard_error"] == pytest.approx(np.std(returns, ddof=1) / 21**0.5)
    assert (kept["median"], kept["min"], kept["max"]) == (np.median(returns), min(returns), max(returns))
    assert re.search(rf"mean +{np.mean(returns):.2f}", result.stdout) and kept["human_normalised"] is None


@pytest.mark.parametrize(
    "env_id, mean, normalised",
    [(BREAKOUT, 1.7, 0), (BREAKOUT, 30.5, 1), ("ALE/Pong-v5", 14.6, 1), ("tests.games:Counter-v0", 3.0, None)],
)
def test_human_normalised_score_is_0_for_random_and_1_for_human_play(env_id, mean, normalised, tmp_path, monkeypatch):
    games = [{"return": mean, "length": 1}]
    monkeypatch.setattr(iris_train, "play_test_episodes", lambda *arguments, **options: games)
    args = iris_play.Args(evaluate=1, json=str(tmp_path / "score.json"))
    iris_play.evaluate(None, iris_train.Args(env_id=env_id), args, CPU, tmp_path)
    assert json.loads((tmp_path / "score.json").read_text())["human_normalised"] == normalised


def test_evaluation_sets_an_atari_score_beside_a_humans_and_the_papers(breakout, tmp_path):
    path = tmp_path / "score.json"
    result = run("--run-dir", breakout, "--evaluate", 2, "--temperature", "inf", "--json", path)
    kept = json.loads(path.read_text())
    assert kept["human_normalised"] == pytest.approx((kept["mean"] - 1.7) / (30.5 - 1.7))
    assert kept["paper"] == 83.7 and "83.70" in result.stdout


# --- whose models ----------------------------------------------------------------------------------------------------


def test_the_newest_run_is_taken_then_the_small_models_and_a_person_needs_none(
    breakout, counter, tmp_path, monkeypatch
):
    monkeypatch.setattr(iris_play, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    find = iris_play.find_checkpoint
    with pytest.raises(IrisError, match=r"no run under runs/: train one .*--checkpoint.*--pretrained"):
        find(iris_play.Args())
    assert find(iris_play.Args(human=True)) is None
    (tmp_path / "models").mkdir()
    for name in ("catch", "breakout", "freeway"):
        shutil.copy(breakout / "checkpoint.pt", tmp_path / "models" / f"{name}.pt")
    assert find(iris_play.Args()).name == "breakout.pt"
    assert find(iris_play.Args(env_id="FreewayNoFrameskip-v4")).name == "freeway.pt"
    assert find(iris_play.Args(env_id="tests.catch:Catch-v0")).name == "catch.pt"
    for name, source, when in (("a", counter, 2000), ("b", breakout, 1000)):
        shutil.copytree(source, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "checkpoint.pt", (when, when))
    assert str(find(iris_play.Args())) == "runs/a/checkpoint.pt"


def test_pretrained_fetches_the_published_weights_once_into_torch_hubs_cache(published, tmp_path, monkeypatch):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(published.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(iris_play, "PRETRAINED_URL", f"http://127.0.0.1:{server.server_port}/{{}}.pt")
        for _ in range(2):
            path = iris_play.find_checkpoint(iris_play.Args(pretrained="Breakout"))
        assert len([x for x in asked if "Breakout" in x]) == 1
        path.write_bytes(path.read_bytes()[:1000])  # what a connection leaves that was closed in mid-file
        iris_play.find_checkpoint(iris_play.Args(pretrained="Breakout"))
        with pytest.raises(IrisError, match="put Pong.pt"):
            iris_play.find_checkpoint(iris_play.Args(pretrained="Pong"))
        server.shutdown()
    assert path.read_bytes() == published.read_bytes()
    assert load_agent(path)[1].env_id == BREAKOUT


def test_a_published_checkpoint_plays_in_the_dream(published, tmp_path):
    flags = "--world-model", "--video", "x.webm", "--steps", 2
    result = run("--checkpoint", published, *flags, cwd=tmp_path)
    assert result.returncode == 0 and "x.webm: 3 frames" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint", "/nonexistent.pt"], "no checkpoint can be read at /nonexistent.pt"),
        (["--checkpoint", "{published}", "--env-id", "PongNoFrameskip-v4"], "4 actions, and Pong.* has 6: see --env-id"),
        (["--human", "--checkpoint", "{published}", "--env-id", "BoxingNoFrameskip-v4"], "and Boxing.* has 18: see --env-id"),
        (["--run-dir", "{run}", "--host", ""], "--host is empty"),
        (["--run-dir", "{run}", "--host", "192.0.2.1"], "can't serve at 192.0.2.1"),
        (["--run-dir", "{run}", "--video", "x.avi"], "has to end in .webm, .mp4, .gif or .webp, and to be no folder"),
        (["--run-dir", "{run}", "--video", "/proc/x.mp4"], "can't write /proc/.*x.mp4"),
        (["--run-dir", "{run}", "--video", "x.webm", "--human"], "--video shows the agent"),
        (["--run-dir", "{run}", "--evaluate", "1", "--json", "/proc/x/y.json"], "can't write /proc/x/y.json"),
        (["--run-dir", "{run}", "--episodes"], "there are no recorded episodes in"),
        (["--pretrained", "Brekout"], "Did you mean: `BreakoutNoFrameskip`"),
        (["--fps", "0"], "--fps 0.0 is not from"),
        (["--seed", "-1"], "a number is negative, or too large"),
        (["--json", "x.json"], "--json needs --evaluate"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_exit_code_2_and_leaves_nothing(
    counter, published, tmp_path, arguments, message
):
    result = run(*(argument.format(run=counter, published=published) for argument in arguments), cwd=tmp_path)
    assert_one_clear_line(result, message)
    assert not list(tmp_path.iterdir())


def test_modes_that_exclude_each_other_are_named(counter):
    result = run("--run-dir", counter, "--human", "--evaluate", 2)
    assert result.returncode == 2 and "--human" in result.stderr and "--evaluate" in result.stderr


def test_ctrl_c_ends_without_a_traceback_whenever_it_comes(counter):
    for seconds in (0.3, 0.8, 1.5):
        process = subprocess.Popen(
            command("--run-dir", counter, "--port", 0), cwd=ROOT, env=surroundings(), stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in errors, errors


# --- the server ------------------------------------------------------------------------------------------------------


class Server:
    """iris_play.py with its page on a free port."""

    def __init__(self, *arguments, port=0, cwd=ROOT):
        self.process = subprocess.Popen(
            command(*arguments, "--port", port), cwd=cwd, env=surroundings(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.output = ""
        for line in self.process.stdout:
            self.output += line
            if found := re.search(r"Open (http://127.0.0.1:(\d+)) ", line):
                self.url, self.port = found[1], int(found[2])
                return
        raise AssertionError(self.output)

    def end(self):
        """What it printed until it ended, which `q` has asked it to."""
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, self.output + output
        return self.output + output

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse()

    def press(self, key):
        try:
            return self.request("POST", f"/keys?tab=t&held=&pressed={key}").status
        except (http.client.RemoteDisconnected, ConnectionResetError):
            assert key == "q"  # on a busy machine, it may have stopped before it answers

    def messages(self):
        """What a tab is sent."""
        for line in self.request("GET", "/pictures"):
            if line.startswith(b"data: ") and len(line) > 20:
                yield json.loads(line[6:])


@pytest.fixture
def serve():
    servers = []
    yield lambda *arguments, **more: servers.append(Server(*arguments, **more)) or servers[-1]
    for server in servers:
        server.process.kill()
        server.process.wait()


def test_page_refuses_other_origins_other_names_and_what_is_no_message(counter, serve):
    server = serve("--run-dir", counter)
    here, keys = f"127.0.0.1:{server.port}", "/keys?tab=t&held=&pressed=1"
    assert server.request("GET", "/").status == 200
    assert server.request("GET", "/", Host=f"localhost:{server.port + 1}").status == 200  # through an ssh tunnel
    assert server.request("POST", keys, Host=here, Origin=f"http://{here}").status == 204
    for refused in (
        {"Host": f"evil.example:{server.port}"}, {"Host": here, "Origin": "http://evil.example"},
        {"Host": here, "Origin": "null"}, {"Host": here, "Sec_Fetch_Site": "cross-site"},
    ):  # fmt: skip
        assert server.request("POST", keys, **refused).status == 403
        assert server.request("GET", "/pictures", **refused).status == 403
    for message in ("", "?tab=t", "?tab=t&pressed=q", "?tab=t&held=q"):
        assert server.request("POST", "/keys" + message).status == 400
    assert server.request("GET", keys).status == 404  # an image on another site could ask for it
    assert server.request("POST", "/keys?tab=" + "x" * 70_000).status == 414
    assert server.request("GET", "/etc/passwd").status == server.request("GET", "/../iris_play.py").status == 404
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 130


def test_it_waits_for_its_first_visitor_and_takes_the_next_port_where_one_is_taken(counter, serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = serve("--run-dir", counter, port=port)
        assert server.port > port and f"(port {port} is taken)" in server.output and "ssh -L" in server.output
    time.sleep(1)
    assert next(server.messages())["step"] == 0
    server.press("q")
    server.end()


def test_half_sent_requests_are_dropped_and_500_idle_connections_leave_the_game_playable(counter, serve):
    server = serve("--run-dir", counter, "--human")
    half = socket.create_connection(("127.0.0.1", server.port))
    half.sendall(b"POST /keys?tab=t&held=&pressed=q HTTP/1.1\r\nContent-Le")
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(500)]
    messages = server.messages()
    next(messages)
    server.press("1")
    assert any(message["action"] == 1 for message, _ in zip(messages, range(300)))
    half.settimeout(60)
    assert not half.recv(100)  # it ends; it does not wait for the rest for ever
    for connection in idle:
        connection.close()
    server.press("q")
    server.end()


# --- the page, in a real browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing and "CI" not in os.environ:
        pytest.skip(f"needs the system packages of {', '.join(missing)} (.ci/run installs them)")
    assert not missing, missing
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Tab:
    """What a test sees and does on the page."""

    def __init__(self, browser, url, width=1280, height=800, scheme="dark", touch=False):
        self.browser, size = browser, {"width": width, "height": height}
        self.devtools("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1 + touch, mobile=touch)
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=touch)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)
        browser.get(url)
        wait_until(lambda: "Step" in self.text("facts"))
        wait_until(lambda: self.js("return document.querySelector('img').naturalWidth"))

    def devtools(self, name, **arguments):
        return self.browser.execute_cdp_cmd(name, arguments)

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def text(self, name):
        return self.js("return document.getElementById(arguments[0]).innerText", name)

    def fact(self, name):
        names = "[...document.querySelectorAll('dt')]"
        return self.js(f"return {names}.find((x) => x.innerText == arguments[0]).nextSibling.innerText", name)

    def button(self, key):
        return self.js("return buttons[arguments[0]]", key)

    def key(self, *names, kinds=("keyDown", "keyUp")):
        texts = {"Enter": "\r", " ": " "}
        for kind in kinds:
            for name in names:
                text = texts.get(name, "")
                self.devtools("Input.dispatchKeyEvent", type=kind, key=name, code=f"Key{name}", text=text)

    def touch(self, *ids):
        """Fingers on these parts of the pad, and on no others."""
        code = """const box = document.getElementById(arguments[0]).getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]"""
        points = [dict(zip("xy", self.js(code, name))) | {"id": i} for i, name in enumerate(ids)]
        self.devtools("Input.dispatchTouchEvent", type="touchStart" if ids else "touchEnd", touchPoints=points)

    def acts(self, action):
        wait_until(lambda: self.fact("Action") == action)


@pytest.mark.parametrize(
    "width, height, scheme, touch",
    [(360, 640, "dark", True), (1280, 800, "light", False), (1920, 1080, "dark", False)],
)
@pytest.mark.parametrize("mode", ["--world-model", "--compare", "--reconstruction"])
def test_page_fits_the_screen_without_scrolling_or_overlaps_and_is_legible(
    boxing, serve, browser, mode, width, height, scheme, touch
):
    server = serve("--run-dir", boxing, mode)
    tab = Tab(browser, server.url, width, height, scheme, touch)
    expected = {"--world-model": 1, "--compare": 2, "--reconstruction": 3}[mode]
    wait_until(lambda: tab.js("return document.querySelectorAll('figure:not([hidden])').length") == expected)
    tab.key("g")
    measured = tab.js(
        """const shown = (selector) => [...document.querySelectorAll(selector)].filter((x) => x.checkVisibility());
        const box = (x) => (({left, top, right, bottom}) => [left, top, right, bottom])(x.getBoundingClientRect());
        return {
          page: [document.documentElement.scrollWidth, document.documentElement.scrollHeight, innerWidth, innerHeight],
          boxes: shown("header, figure, section, dl, nav button, #pad b").map(box),
          inside: shown("section, dl").every((x) => x.scrollWidth <= x.clientWidth),
          frames: shown("figure").map((x, i) => x.clientWidth * devicePixelRatio / latest.panels[i].width),
          type: Math.min(...shown("body *").filter((x) => x.innerText)
            .map((x) => parseFloat(getComputedStyle(x).fontSize))),
          colour: getComputedStyle(document.body).backgroundColor, lit: shown(".over b").length}"""
    )
    assert measured["page"] == [width, height, width, height] and measured["inside"]
    assert measured["type"] >= 14 and measured["lit"] == 16 * expected
    assert (int(re.search(r"\d+", measured["colour"])[0]) < 50) == (scheme == "dark")
    assert all(times == int(times) >= 1 for times in measured["frames"])  # pixels are magnified by whole numbers
    for i, (left, top, right, bottom) in enumerate(measured["boxes"]):
        assert 0 <= left and 0 <= top and right <= width and bottom <= height
        for a, b, c, d in measured["boxes"][:i]:
            assert left >= c - 1 or right <= a + 1 or top >= d - 1 or bottom <= b + 1, "two parts overlap"


@pytest.mark.parametrize("mode", ["--human", "--world-model"])
def test_keys_held_together_act_until_let_go_and_a_reload_and_a_second_tab_do_no_harm(breakout, serve, browser, mode):
    server = serve("--run-dir", breakout, mode, "--fps", 20)
    tab = Tab(browser, server.url)
    first = tab.js("return latest.panels[0].png")
    tab.key("ArrowLeft", kinds=["keyDown"])
    tab.acts("LEFT")
    wait_until(lambda: tab.js("return latest.panels[0].png") != first)
    time.sleep(1.5)
    tab.acts("LEFT")  # still
    tab.key(" ", kinds=["keyDown"])  # both are held: Breakout has no such action, and the newer key wins
    tab.acts("FIRE")
    tab.key(" ", kinds=["keyUp"])
    tab.acts("LEFT")
    browser.refresh()  # with the key down: it must not stay so for ever
    wait_until(lambda: "Step" in tab.text("facts"))
    tab.acts("NOOP")
    home = browser.current_window_handle
    browser.switch_to.new_window("tab")
    other = Tab(browser, server.url)
    other.key("d", kinds=["keyDown"])
    other.acts("RIGHT")
    other.key("d", kinds=["keyUp"])
    other.acts("NOOP")
    browser.close()
    browser.switch_to.window(home)
    tab.key("q")
    wait_until(lambda: "iris_play.py has stopped" in tab.text("notice"))
    assert "a second" in server.end()


def test_on_a_phone_the_cross_and_the_fire_button_play(breakout, serve, browser):
    server = serve("--run-dir", breakout, "--human", "--fps", 20)
    tab = Tab(browser, server.url, 360, 640, touch=True)
    for parts, action in [(["left"], "LEFT"), ([], "NOOP"), (["space"], "FIRE"), ([], "NOOP"), (["up right"], "RIGHT")]:
        tab.touch(*parts)
        tab.acts(action)
    tab.touch()
    tab.acts("NOOP")


def test_by_keyboard_alone_one_takes_over_pauses_steps_into_the_dream_and_back_and_sees_tokens(
    breakout, serve, browser
):
    server = serve("--run-dir", breakout)
    tab = Tab(browser, server.url)
    assert tab.fact("Plays") == "agent" and "the game" in tab.text("title") and "%" in tab.text("shares")
    tab.key("m")
    wait_until(lambda: tab.fact("Plays") == "you")
    tab.js("buttons['.'].focus()")  # Enter on a button presses it, and does not restart the game
    tab.key("Enter")
    wait_until(lambda: "paused" in tab.text("notice") and tab.button(".").text == "resume")
    assert tab.button(".").get_attribute("aria-pressed") == "true"
    step = int(tab.fact("Step"))
    tab.key("e")
    wait_until(lambda: int(tab.fact("Step")) == step + 1)
    tab.key("t")
    wait_until(lambda: "the dream" in tab.text("title") and tab.button("t").text == "back to game")
    tab.key("e")
    wait_until(lambda: int(tab.fact("Step")) == step + 2)
    tab.key("g")
    assert len(tab.js("return [...document.querySelectorAll('.over b')].filter((x) => x.checkVisibility())")) == 16
    tab.key("t")
    wait_until(lambda: "the game" in tab.text("title") and int(tab.fact("Step")) == step + 1)
    tab.key("Escape")
    tab.js("document.activeElement.blur()")
    tab.key("Enter")
    wait_until(lambda: int(tab.fact("Step")) == 0)
    tab.key("f")
    wait_until(lambda: tab.js("return !!document.fullscreenElement"))
    for key, speed in (("+", "23"), ("-", "15"), ("-", "10")):
        tab.key(key)
        wait_until(lambda: tab.fact("Speed") == speed)
    assert server.process.poll() is None  # Escape ended nothing
    tab.key("q")
    server.end()


def test_compare_counts_the_steps_since_the_frame_that_game_and_dream_share(breakout, serve, browser):
    server = serve("--run-dir", breakout, "--compare", "--fps", 30)
    tab = Tab(browser, server.url)
    wait_until(lambda: tab.js("return latest.drift[0]") > 10)
    assert re.search(r"0\.\d{3}, step \d+", tab.text("traces"))  # the error, and the steps since
    tab.button("t").click()
    wait_until(lambda: tab.js("return latest.drift[0]") < 10)
    assert tab.js("return latest.step") > 10  # the game itself went on


def test_a_recording_plays_back_in_the_page_and_can_be_downloaded(breakout, serve, browser, tmp_path):
    server = serve("--run-dir", breakout, "--world-model", "--fps", 20, cwd=tmp_path)
    tab = Tab(browser, server.url)
    tab.key(",")
    wait_until(lambda: "recording" in tab.text("notice") and tab.button(",").text == "stop")
    start = int(tab.fact("Step"))
    wait_until(lambda: int(tab.fact("Step")) > start + 20)
    tab.button(",").click()
    link = wait_until(lambda: tab.js("return document.getElementById('download').checkVisibility() && latest.file"))
    wait_until(lambda: tab.js("return document.getElementById('clip').readyState >= 2"))
    tab.js("document.getElementById('clip').play()")
    wait_until(lambda: tab.js("return document.getElementById('clip').currentTime > 0.2"))
    (path,) = (tmp_path / "runs/recordings").iterdir()
    assert server.request("GET", "/" + link).read() == path.read_bytes()
    assert len(pictures_of(path)[0]) > 20


def test_a_component_that_is_not_trained_yet_is_said_in_place_of_noise(serve, browser, tmp_path):
    run = make_run(tmp_path / "run", BREAKOUT, epoch=5)
    tab = Tab(browser, serve("--run-dir", run, "--world-model").url)
    note = tab.js("return document.querySelector('.over p').innerText")
    assert note == "The dream is trained from epoch 13 on" and note in tab.text("about")
    assert "epoch 5" in tab.text("about") and "The policy is trained from epoch 18 on" in tab.text("about")


def test_a_person_plays_without_any_models(serve, browser, tmp_path):
    server = serve("--human", "--env-id", "PongNoFrameskip-v4", cwd=tmp_path)  # no model of it comes with the clone
    tab = Tab(browser, server.url)
    tab.key("a", kinds=["keyDown"])
    tab.acts("LEFT")
    assert not tab.button("t") and not tab.button("m")  # nothing to step into, and nobody to hand over to
    assert not tab.js("return document.getElementById('policy').checkVisibility()")
