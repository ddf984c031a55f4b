"""What a person meets who types `python iris_play.py ...`: real windows, a real browser, real files."""
import ctypes
import functools
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import iris_play
import reference
from iris_play import AgentPlayer, DreamedGame, Game, Person, RecordedEpisodes, View, human_normalised, paint
from iris_train import IrisError, load_agent, make_env, to_model, to_stored
from test_command_line import ROOT, assert_one_clear_line, environment, heard, train
from test_train import FAST

MEANINGS_18 = """NOOP FIRE UP RIGHT LEFT DOWN UPRIGHT UPLEFT DOWNRIGHT DOWNLEFT UPFIRE RIGHTFIRE LEFTFIRE DOWNFIRE
    UPRIGHTFIRE UPLEFTFIRE DOWNRIGHTFIRE DOWNLEFTFIRE""".split()


def needs(*programs):
    """Skips where a system package is missing on somebody's machine; in CI a missing one is an error."""
    missing = [name for name in programs if not shutil.which(name)]
    if missing and "CI" not in os.environ:
        pytest.skip(f"needs the system packages of {', '.join(missing)} (.ci/run installs them)")
    assert not missing, missing


def play(*arguments, **changes):
    """Runs iris_play.py to its end, without a display."""
    return subprocess.run(
        [sys.executable, "iris_play.py", *map(str, arguments)],
        cwd=ROOT, env=environment(**{"DISPLAY": ""} | changes), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def breakout(tmp_path_factory):
    """The folder of a short run on Breakout, with recorded episodes of all kinds."""
    folder = tmp_path_factory.mktemp("breakout") / "run"
    flags = "--env-id", "BreakoutNoFrameskip-v4", "--epochs", 2, "--collect-steps", 120, "--run-dir", folder
    result = train(*FAST, *flags)
    assert result.returncode == 0, result.stderr
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    content["agent"]["world_model.head_ends.2.bias"].copy_(torch.tensor([100.0, 0.0]))  # a dream without an end
    torch.save(content, folder / "checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    """The folder of a run on a small game, whose actor always chooses action 2."""
    folder = tmp_path_factory.mktemp("counter") / "run"
    assert train(*FAST, "--env-id", "tests.games:Counter-v0", "--epochs", 1, "--run-dir", folder).returncode == 0
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    content["agent"]["actor_critic.actor_linear.weight"].zero_()
    content["agent"]["actor_critic.actor_linear.bias"].copy_(torch.tensor([0.0, 0.0, 100.0]))
    torch.save(content, folder / "checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint in the published format."""
    path = tmp_path_factory.mktemp("published") / "Breakout.pt"
    weights = reference.official_state_dict(4)
    weights["world_model.head_ends.head_module.2.bias"] = torch.tensor([100.0, 0.0])  # a dream without an end
    torch.save(weights, path)
    return path


# --- controllers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "held, action",
    [
        ([], "NOOP"), (["left"], "LEFT"), (["a"], "LEFT"), (["left", "a"], "LEFT"), (["space"], "FIRE"),
        (["w", "d"], "UPRIGHT"), (["space", "left", "down"], "DOWNLEFTFIRE"), (["left", "right"], "RIGHT"),
        (["right", "left"], "LEFT"), (["left", "right", "space"], "RIGHTFIRE"), (["m", "."], "NOOP"),
    ],
)  # fmt: skip
def test_held_keys_are_the_action_that_uses_most_of_them_and_the_newest_wins(held, action):
    assert MEANINGS_18[Person(MEANINGS_18).choose(held)] == action


def test_a_game_with_fewer_actions_leaves_keys_out_that_it_has_no_action_for():
    person = Person(["NOOP", "FIRE", "RIGHT", "LEFT"])
    assert [person.choose(keys) for keys in ([], ["up"], ["up", "left"], ["left", "space"], ["space", "left"])] == [
        0, 0, 3, 1, 3,
    ]  # fmt: skip
    assert "DOWN" not in person.help and "FIRE: space" in person.help and "LEFT: left/a" in person.help
    assert [Person(["0", "1", "2"]).choose(keys) for keys in ([], ["1"], ["2", "1"], ["9"])] == [0, 1, 1, 0]


def test_agent_player_follows_its_policy_at_the_temperature(breakout):
    agent, _ = load_agent(breakout)
    agent.actor_critic.actor_linear.weight.data.zero_()
    agent.actor_critic.actor_linear.bias.data.copy_(torch.tensor([0.0, 1.0, 2.0, 0.0]))
    view = View([], np.zeros((64, 64, 3), np.uint8), torch.rand(1, 3, 64, 64))
    torch.manual_seed(0)
    for temperature in (0.0, 0.5, float("inf")):
        player = AgentPlayer(agent, ["A", "B", "C", "D"], temperature)
        with torch.no_grad():
            said = player.look(view)
        drawn = np.bincount([player.choose([]) for _ in range(2000)], minlength=4) / 2000
        weights = {0.0: [0, 0, 1, 0], 0.5: np.exp([0, 2, 4, 0]), float("inf"): [1, 1, 1, 1]}[temperature]
        wanted = np.array(weights) / np.sum(weights)
        np.testing.assert_allclose(drawn, wanted, atol=0.05)
        assert f"C {wanted[2]:.0%}" in said


# --- worlds ----------------------------------------------------------------------------------------------------------


def test_game_shows_the_screen_at_its_own_resolution_and_the_agent_its_reconstruction(breakout):
    agent, _ = load_agent(breakout)
    game = Game(agent, make_env("BreakoutNoFrameskip-v4"), torch.device("cpu"), seed=3, three_panels=True)
    raw = make_env("BreakoutNoFrameskip-v4")
    frame, _ = raw.reset(seed=3)
    view, total = game.reset(), 0.0
    for step, action in enumerate([1, 0, 3, 3, 3, 2, 0, 0, 0, 0], start=1):
        view = game.step(action)
        frame, reward, *_ = raw.step(action)
        total += reward
        assert view.panels[0].shape == (210, 160, 3) and np.array_equal(view.panels[1], frame)
        assert np.array_equal(view.panels[2], to_stored(view.seen)[0].numpy())
        assert torch.equal(view.seen, agent.tokenizer.reconstruct(to_model(torch.from_numpy(frame)[None])))
        assert (view.step, view.action, view.reward, view.total) == (step, action, reward, total)
    # The screen is what the frame was shrunk from: averaged over cells of the same size it says the same.
    shrunk = cv2.resize(view.panels[0], (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(float) - frame).mean() < 3


def test_dreamed_game_begins_with_the_games_first_frame_and_never_steps_the_game(breakout):
    agent, _ = load_agent(breakout)
    game = Game(agent, make_env("BreakoutNoFrameskip-v4"), torch.device("cpu"), seed=3)
    game.step = None
    world = DreamedGame(agent, game)
    torch.manual_seed(0)
    views = [world.reset()] + [world.step(1) for _ in range(12)]  # longer than the 4 blocks of this world model
    first, _ = make_env("BreakoutNoFrameskip-v4").reset(seed=3)
    assert torch.equal(views[0].seen, agent.tokenizer.reconstruct(to_model(torch.from_numpy(first)[None])))
    assert [view.step for view in views] == list(range(13)) and all(view.frame.shape == (64, 64, 3) for view in views)
    assert (world.reset().step, world.now.total, world.game.seed) == (0, 0.0, 5)  # of the next seed's game


def test_recorded_episodes_are_walked_by_step_by_ten_by_episode_and_by_folder(breakout):
    agent, _ = load_agent(breakout)
    world = RecordedEpisodes(agent, breakout, torch.device("cpu"), two_panels=True)
    files = {
        kind: sorted((breakout / "media/episodes" / kind).glob("*.npz")) for kind in ("test", "train", "imagination")
    }
    assert all(files.values())
    content = np.load(files["test"][0])
    length = len(content["frames"])

    def press(key):
        return world.commands[key][1]()

    view = world.reset()
    assert view.step == 0 and np.array_equal(view.frame, content["frames"][0]) and len(view.panels) == 2
    for key, step in [("right", 1), ("up", 11), ("left", 10), ("down", 0), ("left", 0), ("up", 10), ("h", 0)]:
        view = press(key)
        assert view.step == step and np.array_equal(view.frame, content["frames"][step])
        assert view.total == content["rewards"][:step].sum()
        assert view.action == (content["actions"][step - 1] if step else None)
    for _ in range(length):
        assert not view.end
        view = world.step(0)
    assert view.end and view.total == pytest.approx(float(content["return"]))
    assert files["test"][1 % len(files["test"])].stem in press("n").label
    assert files["test"][0].stem in press("p").label and files["test"][-1].stem in press("p").label
    assert files["train"][0].stem in press("f").label
    view = press("f")
    assert "imagination" in view.label and len(view.panels) == 1
    assert torch.equal(view.seen, to_model(torch.from_numpy(np.load(files["imagination"][0])["frames"][:1])))
    assert "test" in press("f").label


def test_recorded_episodes_that_cannot_be_read_are_passed_over(breakout, tmp_path, capsys):
    agent, _ = load_agent(breakout)
    folder = tmp_path / "media/recordings"
    folder.mkdir(parents=True)
    good = sorted((breakout / "media/episodes/test").glob("*.npz"))[0]
    shutil.copy(good, folder / "b.npz")
    content = dict(np.load(good))
    (folder / "a.npz").write_bytes(b"PK")
    (folder / "c.npz").write_bytes(good.read_bytes()[:3000])
    np.savez(folder / "d.npz", **content | {"frames": content["frames"][:0]})
    np.savez(folder / "e.npz", **content | {"actions": np.array(["left"] * len(content["actions"]))})
    np.save(folder / "f.npy", content["frames"])
    (folder / "f.npy").rename(folder / "f.npz")
    world = RecordedEpisodes(agent, tmp_path, torch.device("cpu"), two_panels=False)
    for view in (world.reset(), world.commands["n"][1](), world.commands["p"][1]()):
        assert "recordings/b," in view.label
    assert "passed over" in capsys.readouterr().err
    (folder / "b.npz").unlink()
    with pytest.raises(IrisError, match="no episode that can be read"):
        world.reset()


# --- video, recordings, evaluation -----------------------------------------------------------------------------------


def test_pictures_are_magnified_by_whole_numbers_and_text_is_written_below():
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    shown = paint([frame], [])
    assert shown.shape == (448, 448, 3) and np.array_equal(shown[3::7, 3::7], frame)
    with_text = paint([frame], ["step 1", "value 2"])
    assert np.array_equal(with_text[:448, 16:464], shown) and with_text[448:].max() > 200


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_video_file_holds_the_steps_that_were_asked_for(breakout, tmp_path, suffix):
    path = tmp_path / f"play.{suffix}"
    result = play("--run-dir", breakout, "--video", path, "--steps", 9, "--header", "--reconstruction", "--fps", 10)
    assert result.returncode == 0, result.stderr
    if suffix == "mp4":
        reader = cv2.VideoCapture(str(path))
        pictures = []
        while (read := reader.read())[0]:
            pictures.append(read[1])
        assert reader.get(cv2.CAP_PROP_FPS) == 10
    else:
        animation = Image.open(path)
        pictures = []
        for i in range(animation.n_frames):
            animation.seek(i)
            picture = np.array(animation.convert("RGB"))
            pictures += [picture] * round(animation.info["duration"] / 100)  # equal ones may be shown as a longer one
    assert len(pictures) == 10  # the first frame, and one a step
    height, width, _ = pictures[0].shape
    assert height == 448 + 8 + 20 * 2 and width > 2.5 * 448
    assert pictures[0][448:].max() > 150 and not np.array_equal(pictures[0][448:], pictures[9][448:])  # the header


def test_video_without_steps_is_one_whole_episode(counter, tmp_path):
    result = play("--run-dir", counter, "--video", tmp_path / "play.mp4", "--seed", 5)
    env = make_env("tests.games:Counter-v0")
    env.reset(seed=5)
    length = env.unwrapped.length
    assert re.search(rf"play.mp4: {length + 1} frames", result.stdout), (result.stdout, result.stderr)
    assert f"Episode 1: {length} steps, return {2 * length}" in result.stdout


class Script:
    """A screen that shows nothing and presses what a test has written down: read number -> keys."""

    def __init__(self, pressed, held=()):
        self.script, self.held, self.count, self.shown = pressed, list(held), 0, []

    def show(self, panels, header, notice):
        self.shown.append((header, notice))

    def read(self, deadline):
        self.count += 1
        pressed = self.script.get(self.count, [])
        return pressed, self.held + pressed

    def close(self):
        self.closed = True


def scripted(breakout, tmp_path, pressed, held=(), seed=1, **changes):
    agent, train_args = load_agent(breakout)
    env = make_env(train_args.env_id, max_frames=train_args.test_max_frames)
    names = iris_play.action_names(env)
    screen = Script(pressed, held)
    controllers = [Person(names), AgentPlayer(agent, names, 0.5)]
    with torch.no_grad():
        world = Game(agent, env, torch.device("cpu"), seed)
        iris_play.play(world, controllers, screen, names, tmp_path, fps=1000, **changes)
    return screen


def test_recording_holds_what_was_played_as_the_game_itself_shows_when_it_is_played_again(breakout, tmp_path):
    scripted(breakout, tmp_path, {1: [","], 5: ["space"], 31: [","], 40: ["q"]}, held=["left"], seed=7)
    (path,) = (tmp_path / "media/recordings").glob("*.npz")
    recorded = np.load(path)
    assert len(recorded["frames"]) == 30 and recorded["return"] == recorded["rewards"].sum()
    assert recorded["actions"].tolist() == [3] * 4 + [1] + [3] * 25  # FIRE was the newer key for a step
    env = make_env("BreakoutNoFrameskip-v4", max_frames=400)
    frame, _ = env.reset(seed=7)
    for step in range(30):
        assert np.array_equal(frame, recorded["frames"][step])
        frame, reward, end, *_ = env.step(int(recorded["actions"][step]))
        assert reward == recorded["rewards"][step] and end == recorded["ends"][step]
    video = cv2.VideoCapture(str(path.with_suffix(".mp4")))
    count = 0
    while video.read()[0]:
        count += 1
    assert count == 30


def test_recording_marks_where_the_player_began_anew_and_survives_a_hangup(breakout, tmp_path, web):
    scripted(breakout, tmp_path, {1: [","], 10: ["enter"], 20: ["q"]})
    (path,) = (tmp_path / "media/recordings").glob("*.npz")
    assert np.flatnonzero(np.load(path)["ends"]).tolist() == [8]  # nine steps, Enter, and then nine more
    with heard(signal.SIGHUP):
        session = web("--run-dir", breakout)
    keys = {"tab": "t", "count": 1, "pressed": [","], "held": []}
    assert session.request("POST", "/keys", json.dumps(keys)) == 204
    wait_until(lambda: '"step 9 ' in session.picture() or '"step 1' in session.picture())
    session.process.send_signal(signal.SIGHUP)
    assert session.process.wait(30) == 130
    assert len(recording(breakout)["frames"]) > 0


def test_a_recording_that_cannot_be_kept_does_not_end_the_game(breakout, tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/recordings").touch()  # in the folder's place
    screen = scripted(breakout, tmp_path, {2: [","], 5: ["q"]})
    assert len(screen.shown) == 5 and "can't write" in screen.shown[2][1]


def test_pause_step_hand_over_and_start_anew_do_what_they_say(breakout, tmp_path):
    script = {4: ["."], 8: ["e"], 9: ["e"], 12: ["."], 15: ["m"], 20: ["enter"], 23: ["q"]}
    screen = scripted(breakout, tmp_path, script, held=["right"])
    headers = [header[0] for header, _ in screen.shown]
    steps = [int(re.match(r"step (\d+)", line)[1]) for line in headers]
    assert steps[:15] == [0, 1, 2, 3, 3, 3, 3, 3, 4, 5, 5, 5, 6, 7, 8]
    assert steps[15:] == [9, 10, 11, 12, 13, 0, 1, 2] and screen.closed
    assert [notice for _, notice in screen.shown[3:6]] == ["", "paused", "paused"]
    assert headers[14].endswith("you") and headers[15].endswith("agent")
    assert all("action RIGHT" in line for line in headers[1:15])


def test_save_keeps_the_episodes_that_are_answered_with_y_and_no_others(counter, tmp_path):
    screen = scripted(counter, tmp_path, {n: ["y" if n % 3 else "n"] for n in range(1, 60)} | {60: ["q"]}, save=True)
    questions = [notice for _, notice in screen.shown if "Keep this episode" in notice]
    kept = list((tmp_path / "media/recordings").glob("*.npz"))
    assert len(questions) >= 5 and 1 <= len(kept)
    answers = [
        ("y" if number % 3 else "n")
        for number, (_, notice) in enumerate(screen.shown, start=1) if "Keep this episode" in notice
    ]  # fmt: skip
    whole = [path for path in kept if np.load(path)["ends"][-1] == 1]
    assert len(whole) == answers.count("y") and len(list((tmp_path / "media/recordings").glob("*.mp4"))) == len(kept)


def test_evaluation_prints_the_statistics_of_a_policy_whose_score_is_known(counter, tmp_path):
    result = play("--run-dir", counter, "--evaluate", 21, "--seed", 100, "--json", tmp_path / "new" / "score.json")
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


def test_human_normalised_score_is_0_for_random_and_1_for_human_play():
    assert human_normalised("BreakoutNoFrameskip-v4", 1.7) == 0 and human_normalised("BreakoutNoFrameskip-v4", 30.5) == 1
    assert human_normalised("ALE/Pong-v5", 14.6) == 1 and human_normalised("Counter-v0", 3) is None


def test_evaluation_sets_an_atari_score_beside_a_humans_and_the_papers(breakout, tmp_path):
    result = play("--run-dir", breakout, "--evaluate", 2, "--temperature", "inf", "--json", tmp_path / "score.json")
    kept = json.loads((tmp_path / "score.json").read_text())
    assert kept["human_normalised"] == pytest.approx((kept["mean"] - 1.7) / (30.5 - 1.7))
    assert kept["paper"] == 83.7 and "83.70" in result.stdout


def test_published_checkpoint_plays_in_every_mode(published, tmp_path):
    path = tmp_path / "play.mp4"
    for mode in (["--reconstruction"], ["--world-model"]):
        result = play("--checkpoint", published, *mode, "--video", path, "--steps", 3)
        assert result.returncode == 0 and "play.mp4: 4 frames" in result.stdout, result.stderr
    evaluation = play("--checkpoint", published, "--evaluate", 1, "--temperature", "inf")
    assert re.search(r"1 test episodes.*\n +mean +\d", evaluation.stdout), evaluation.stderr
    assert len(scripted(published, tmp_path, {1: [","], 5: ["q"]}, held=["left"]).shown) == 5  # a person plays
    command = [sys.executable, ROOT / "iris_play.py", "--checkpoint", published, "--episodes", "--video", "play.mp4"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0 and "play.mp4: 5 frames" in result.stdout, result.stderr  # what was just recorded


# --- errors ----------------------------------------------------------------------------------------------------------


def test_without_any_run_it_says_how_to_come_by_one(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "iris_play.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert_one_clear_line(result, r"no run under runs/: train one .*--checkpoint.*--pretrained")


def test_without_arguments_the_newest_run_is_taken(breakout, counter, tmp_path):
    for name, run, when in (("a", counter, 2000), ("b", breakout, 1000)):
        shutil.copytree(run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "checkpoint.pt", (when, when))
    command = [sys.executable, ROOT / "iris_play.py", "--evaluate", "1"]
    changes = environment(PYTHONPATH=str(ROOT))
    result = subprocess.run(command, cwd=tmp_path, env=changes, capture_output=True, text=True)
    assert "Counter" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint", "/nonexistent.pt"], "there is no checkpoint at /nonexistent.pt"),
        (["--checkpoint", "{foreign}"], "is no checkpoint of this version"),
        (["--checkpoint", "{published}", "--env-id", "PongNoFrameskip-v4"], "knows 4 actions and Pong.* has 6"),
        (["--checkpoint", "{elsewhere}"], "no environment 'best_agentNoFrameskip-v4'"),
        (["--run-dir", "{run}"], r"no display here: choose --web .* or --video"),
        (["--run-dir", "{run}", "--web", "--port", "{taken}"], "can't serve at 127.0.0.1:.*choose another --port"),
        (["--run-dir", "{run}", "--video", "x.avi"], "has to end in .mp4, .gif or .webp"),
        (["--run-dir", "{run}", "--video", "/proc/x.mp4"], "can't write /proc/x.mp4"),
        (["--run-dir", "{run}", "--evaluate", "2", "--json", "/proc/x/y.json"], "can't write /proc/x/y.json"),
        (["--run-dir", "{run}", "--human", "--world-model"], "--human and --world-model don't go together"),
        (["--run-dir", "{run}", "--checkpoint", "x.pt"], "--checkpoint and --run-dir don't go together"),
        (["--checkpoint", "{published}", "--episodes", "--web"], "there are no recorded episodes in"),
        (["--pretrained", "Brekout"], "Did you mean: `BreakoutNoFrameskip`"),
        (["--pretrained", "Breakout"], r"put Breakout.pt \(from https.*Breakout.pt\) into .*checkpoints/iris"),
        (["--fps", "0"], "--fps 0.0 is out of range"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_exit_code_2(counter, published, tmp_path, arguments, message):
    shutil.copy(published, tmp_path / "best_agent.pt")
    shutil.copy(published, tmp_path / "Breakout.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {
            "foreign": tmp_path / "foreign.pt", "elsewhere": tmp_path / "best_agent.pt", "run": counter,
            "published": tmp_path / "Breakout.pt", "taken": taken.getsockname()[1],
        }  # fmt: skip
        result = play(*(argument.format(**places) for argument in arguments))
    assert_one_clear_line(result, message)


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
        with pytest.raises(IrisError, match="put Pong.pt"):
            iris_play.find_checkpoint(iris_play.Args(pretrained="Pong"))
        server.shutdown()
    assert path.read_bytes() == published.read_bytes() and len([x for x in asked if "Breakout" in x]) == 1
    assert load_agent(path)[1].env_id == "BreakoutNoFrameskip-v4"


# --- the window, under a real X server -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def display():
    """An X server of our own, without a screen behind it."""
    needs("Xvfb", "xdotool")
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "1600x900x24"], pass_fds=[write], stderr=subprocess.DEVNULL
    )
    yield ":" + os.read(read, 10).decode().strip()
    server.terminate()
    server.wait()


def rest_of(process):
    """What it still prints until it ends, well."""
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


class Session:
    """iris_play.py in a window, and xdotool to press keys in it."""

    def __init__(self, display, *arguments):
        self.env = environment(DISPLAY=display, OMP_NUM_THREADS="1")  # beside other work, two would wait for each other
        self.process = subprocess.Popen(
            [sys.executable, "iris_play.py", *map(str, arguments)],
            cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        for _ in range(300):
            self.window = self.xdotool("search", "--name", "^IRIS", check=False).split()
            if self.window or self.process.poll() is not None:
                break
            time.sleep(0.2)
        assert self.window, self.process.communicate()
        self.xdotool("windowfocus", "--sync", self.window[-1])
        time.sleep(0.5)

    def xdotool(self, *arguments, check=True):
        result = subprocess.run(["xdotool", *arguments], env=self.env, capture_output=True, text=True, check=check)
        return result.stdout

    def key(self, key, answer=None):
        """Presses and lets go; waits for the line that answers."""
        self.xdotool("key", key)
        for line in self.process.stdout if answer else ():
            if answer in line:
                return

    def hold(self, keys, seconds):
        for key in keys:
            self.xdotool("keydown", key)
        time.sleep(seconds)
        for key in keys:
            self.xdotool("keyup", key)

    def end(self):
        """What it printed until it ended, which `q` has asked it to."""
        return rest_of(self.process)

    def close_window(self):
        """What a window manager sends when somebody clicks on the cross."""
        x11 = ctypes.CDLL("libX11.so.6")
        x11.XOpenDisplay.restype = ctypes.c_void_p
        display = ctypes.c_void_p(x11.XOpenDisplay(self.env["DISPLAY"].encode()))
        protocols, delete = (x11.XInternAtom(display, name, 0) for name in (b"WM_PROTOCOLS", b"WM_DELETE_WINDOW"))
        # XClientMessageEvent: type 33, serial, send_event, display, window, message_type, format 32, five longs
        event = struct.pack("iLiPLLi5l12L", 33, 0, 1, 0, int(self.window[-1]), protocols, 32, delete, *[0] * 16)
        x11.XSendEvent(display, ctypes.c_ulong(int(self.window[-1])), 0, ctypes.c_long(0), event)
        x11.XFlush(display)


def recording(folder):
    (path,) = (folder / "media/recordings").glob("*.npz")
    content = dict(np.load(path))
    shutil.rmtree(folder / "media/recordings")
    return content


def runs_of(actions):
    """[3, 3, 0] -> [(3, 2), (0, 1)]"""
    return [(int(run[0]), len(run)) for run in np.split(actions, np.flatnonzero(np.diff(actions)) + 1)]


@pytest.mark.parametrize("mode", [["--human"], ["--world-model"]])
def test_in_a_window_keys_held_together_act_until_they_are_let_go(breakout, display, mode):
    session = Session(display, "--run-dir", breakout, *mode, "--fps", 20)
    session.key("comma", "Recording")
    time.sleep(1)
    session.hold(["Left"], 3)  # past the pause after which a keyboard begins to repeat
    time.sleep(1)
    session.hold(["d", "space"], 2)  # only the latter repeats
    time.sleep(1)
    session.key("comma", "npz: ")
    session.key("q")
    session.end()
    actions = recording(breakout)["actions"]
    runs = [run for run in runs_of(actions) if run[1] > 1]  # d is down a moment before space
    assert [kind for kind, _ in runs] == [0, 3, 0, 1, 0], runs  # NOOP, LEFT, NOOP, FIRE, NOOP: no gap in LEFT
    assert runs[1][1] >= 10, runs


def test_in_a_window_two_keys_pressed_while_a_step_is_computed_are_both_held(display):
    script = """if True:
        import time, iris_play, numpy
        window = iris_play.Window("IRIS", list(iris_play.MEANINGS), header=False)
        window.show([numpy.zeros((64, 64, 3), numpy.uint8)], [], "")
        window.read(time.perf_counter() + 1)
        print("ready", flush=True)
        input()  # in place of computing: the window is not looked at
        print(*sorted(window.read(time.perf_counter() + 0.3)[1]), flush=True)
        input()
        print("then", window.read(time.perf_counter() + 0.3)[1], flush=True)
    """
    env = environment(DISPLAY=display)
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "ready\n"

        def xdotool(*arguments):
            return subprocess.run(["xdotool", *arguments], env=env, check=True, capture_output=True, text=True).stdout

        xdotool("windowfocus", "--sync", xdotool("search", "--name", "^IRIS").split()[-1])
        for verb, said in (("keydown", "d space\n"), ("keyup", "then []\n")):
            for key in ("d", "space"):
                xdotool(verb, key)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == said


def test_in_a_window_a_person_takes_over_from_the_agent(breakout, display):
    flags = "--reconstruction", "--header", "--fps", 20, "--temperature", "inf"
    session = Session(display, "--run-dir", breakout, *flags)
    session.key("comma", "Recording")
    time.sleep(1)
    session.key("m")
    time.sleep(0.5)  # a tap that is over before the next key is lost if both fall into the same step
    session.hold(["Right"], 4)
    session.key("comma", "npz: ")
    session.key("q")
    assert "a second" in session.end()
    actions = recording(breakout)["actions"]
    assert max(length for kind, length in runs_of(actions) if kind == 2) >= 6 and len(set(actions.tolist())) >= 3


def test_in_a_window_a_recorded_episode_is_shown_and_closing_the_window_ends_the_program(breakout, display):
    session = Session(display, "--run-dir", breakout, "--episodes", "--header")
    for key in ("period", "h", "Right", "Up", "f", "n", "p"):
        session.key(key)
        time.sleep(0.3)
    session.close_window()
    session.end()


# --- the page, in a real browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    needs("chromium", "chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,900"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Web:
    """iris_play.py --web, on a free port."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-u", "iris_play.py", *map(str, arguments), "--web", "--port", "0"],
            cwd=ROOT, env=environment(DISPLAY="", OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.output = ""
        for line in self.process.stdout:
            self.output += line
            if found := re.search(r"Open (http://127.0.0.1:(\d+))", line):
                self.url, self.port = found[1], int(found[2])
                return
        raise AssertionError(self.output)

    def end(self):
        return self.output + rest_of(self.process)

    def picture(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", "/picture?after=0")
        return connection.getresponse().read().decode()

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse().status


@pytest.fixture
def web():
    sessions = []
    yield lambda *arguments: sessions.append(Web(*arguments)) or sessions[-1]
    for session in sessions:
        session.process.kill()
        session.process.wait()


def element(browser, name, attribute="textContent"):
    return browser.execute_script(f"return document.getElementById('{name}').{attribute}")


def event(browser, kind, key):
    browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "key": key, "windowsVirtualKeyCode": 0})


@pytest.mark.parametrize("mode", [["--human"], ["--world-model"]])
def test_on_the_page_keys_held_together_reach_the_game_and_a_reload_and_a_second_tab_do_no_harm(
    breakout, web, browser, mode
):
    session = web("--run-dir", breakout, *mode, "--fps", 20)
    browser.get(session.url)
    wait_until(lambda: "step" in element(browser, "header") and element(browser, "picture", "naturalWidth") > 100)
    first = element(browser, "picture", "src")
    event(browser, "keyDown", ",")
    event(browser, "keyUp", ",")
    wait_until(lambda: "recording" in element(browser, "notice"))
    event(browser, "keyDown", "ArrowLeft")
    wait_until(lambda: "action LEFT" in element(browser, "header"))
    wait_until(lambda: element(browser, "picture", "src") != first)  # pictures move
    time.sleep(1.0)
    event(browser, "keyDown", " ")  # both are held: Breakout has no such action, and the newer key wins
    wait_until(lambda: "action FIRE" in element(browser, "header"))
    event(browser, "keyUp", " ")
    wait_until(lambda: "action LEFT" in element(browser, "header"))
    browser.refresh()  # with the key down: it must not stay so for ever
    wait_until(lambda: "action NOOP" in element(browser, "header"))
    home = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(session.url)
    wait_until(lambda: "step" in element(browser, "header"))
    event(browser, "keyDown", "d")
    wait_until(lambda: "action RIGHT" in element(browser, "header"))
    event(browser, "keyUp", "d")
    browser.close()
    browser.switch_to.window(home)
    wait_until(lambda: "action NOOP" in element(browser, "header"))
    browser.find_element("xpath", "//button[contains(., 'record')]").click()
    wait_until(lambda: "recording" not in element(browser, "notice"))
    browser.find_element("xpath", "//button[contains(., 'quit')]").click()
    wait_until(lambda: "Stopped" in element(browser, "notice"))
    assert "a second" in session.end()
    actions = recording(breakout)["actions"]
    runs = runs_of(actions)
    assert [kind for kind, _ in runs] == [0, 3, 1, 3, 0, 2, 0] and runs[1][1] >= 5, runs


def test_on_the_page_a_person_takes_over_from_the_agent_and_buttons_work_by_keyboard(breakout, web, browser):
    session = web("--run-dir", breakout, "--reconstruction")
    browser.get(session.url)
    wait_until(lambda: "agent" in element(browser, "header") and "policy" in element(browser, "header"))
    assert element(browser, "picture", "naturalWidth") > 2.5 * element(browser, "picture", "naturalHeight")
    event(browser, "keyDown", "m")
    event(browser, "keyUp", "m")
    wait_until(lambda: "you" in element(browser, "header"))
    browser.execute_script("document.querySelectorAll('#commands button')[1].focus()")  # pause
    for kind in ("keyDown", "keyUp"):  # Enter on a button presses it, and does not start the game anew
        browser.execute_cdp_cmd(
            "Input.dispatchKeyEvent", {"type": kind, "key": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        )
    wait_until(lambda: "paused" in element(browser, "notice"))
    step = int(re.search(r"step (\d+)", element(browser, "header"))[1])
    assert step > 0
    event(browser, "keyDown", "e")
    event(browser, "keyUp", "e")
    wait_until(lambda: f"step {step + 1} " in element(browser, "header"))
    event(browser, "keyDown", "Enter")
    event(browser, "keyUp", "Enter")
    wait_until(lambda: "step 0 " in element(browser, "header"))
    event(browser, "keyDown", "q")
    session.end()


def test_page_refuses_other_origins_and_what_is_no_message(counter, web):
    session = web("--run-dir", counter)
    here, keys = f"127.0.0.1:{session.port}", json.dumps({"tab": "t", "count": 1, "pressed": [], "held": []})
    assert session.request("GET", "/") == 200
    assert session.request("GET", "/", Host=f"localhost:{session.port + 1}") == 200  # through an ssh tunnel
    assert session.request("POST", "/keys", keys, Host=here, Origin=f"http://{here}") == 204
    for refused in (
        {"Host": f"evil.example:{session.port}"}, {"Host": here, "Origin": "http://evil.example"},
        {"Host": here, "Origin": "null"}, {"Host": here, "Sec_Fetch_Site": "cross-site"},
    ):  # fmt: skip
        assert session.request("POST", "/keys", keys, **refused) == 403
        assert session.request("GET", "/picture?after=0", **refused) == 403
    for body in ("", "[]", "{}", "no json", '{"tab": 1, "count": "x", "pressed": [], "held": []}', "x" * 20_000,
                 '{"tab": 1, "count": 1, "pressed": null, "held": []}'):  # fmt: skip
        assert session.request("POST", "/keys", body) == 400
    assert session.request("GET", "/etc/passwd") == 404
    session.process.send_signal(signal.SIGTERM)
    assert session.process.wait(30) == 130
