"""Chapter 4's promises, piece by piece; test_command_line.py tests it as a user meets it."""
import dataclasses
import json

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch

import games
import iris_train
from iris_train import STEP, Args, IrisError, Replay, load_agent, make_env, parse_args, resize_frame

FAST = [
    "--preset", "laptop", "--perceptual-loss", "pixel", "--device", "cpu", "--precision", "fp32",
    "--collect-steps", "25", "--tokenizer-from", "1", "--tokenizer-steps", "2", "--tokenizer-batch-size", "4",
    "--world-model-from", "1", "--world-model-steps", "2", "--world-model-batch-size", "2",
    "--actor-critic-from", "1", "--actor-critic-steps", "2", "--actor-critic-batch-size", "2",
    "--horizon", "3", "--burn-in", "2", "--eval-every", "2", "--test-episodes", "2", "--test-envs", "2",
    "--world-model.max-blocks", "4", "--world-model.layers", "1", "--world-model.width", "32",
    "--tokenizer.channels", "8", "8", "8", "8", "8", "--tokenizer.blocks", "0", "0", "0", "0", "1",
    "--test-max-frames", "400",
]  # fmt: skip


# --- environment -----------------------------------------------------------------------------------------------------


def raw_breakout(seed):
    gym.register_envs(ale_py)
    env = gym.make("BreakoutNoFrameskip-v4")
    return env, env.reset(seed=seed)[0]


def test_a_step_is_four_screens_and_the_maximum_of_the_last_two_resized_ones():
    env = make_env("BreakoutNoFrameskip-v4", noop_max=1)
    frame, _ = env.reset(seed=3)
    raw, screen = raw_breakout(3)
    screen, *_ = raw.step(0)  # noop_max 1: exactly one no-op
    assert np.array_equal(frame, resize_frame(screen))
    total = expected_total = 0.0
    for action in [1, 2, 3, 0, 2, 2, 3, 3, 1] * 6:
        frame, reward, terminated, truncated, _ = env.step(action)
        screens = []
        for _ in range(4):
            screen, raw_reward, *_ = raw.step(action)
            screens.append(resize_frame(screen))
            expected_total += raw_reward
        total += reward
        assert np.array_equal(frame, np.maximum(screens[2], screens[3])) and frame.shape == (64, 64, 3)
        assert not (terminated or truncated)
    assert total == expected_total


def test_losing_a_life_ends_the_training_episode_but_only_game_over_resets_the_game():
    env = make_env("BreakoutNoFrameskip-v4", noop_max=30, life_loss_ends=True)
    env.reset(seed=0)
    ale, lives, endings = env.unwrapped.ale, [], []
    while len(endings) < 5:
        frame_number = ale.getEpisodeFrameNumber()
        _, _, terminated, truncated, info = env.step(1 if ale.getEpisodeFrameNumber() % 8 else 2)
        if terminated:
            endings.append(info["life_lost"])
            lives.append(ale.lives())
            if info["life_lost"]:
                frame_number = ale.getEpisodeFrameNumber()
                env.reset()
                assert ale.getEpisodeFrameNumber() == frame_number + 4  # one no-op step, and the game goes on
                assert ale.lives() == lives[-1]
    assert endings == [True] * 4 + [False] and lives == [4, 3, 2, 1, 0]
    env.reset()
    assert ale.lives() == 5 and ale.getEpisodeFrameNumber() <= 30


def test_a_reset_with_a_seed_always_starts_a_new_game():
    env = make_env("BreakoutNoFrameskip-v4", noop_max=30, life_loss_ends=True)
    first, _ = env.reset(seed=5)
    while not env.step(1)[2]:
        pass
    assert env.life_lost
    again, _ = env.reset(seed=5)
    assert np.array_equal(first, again) and env.unwrapped.ale.lives() == 5


def test_a_second_life_lost_in_the_noop_step_is_no_game_over_either():
    class Console:  # the real one, but for its count of lives
        def __init__(self, ale):
            self.ale = ale

        def __getattr__(self, name):
            return getattr(self.ale, name)

        def lives(self):
            return lives

    env, lives = make_env("BreakoutNoFrameskip-v4", life_loss_ends=True), 5
    env.unwrapped.ale = ale = Console(env.unwrapped.ale)
    env.reset(seed=0)
    lives = 4
    assert env.step(1)[2]
    lives, frame_number = 3, ale.getEpisodeFrameNumber()
    env.reset()
    assert ale.getEpisodeFrameNumber() == frame_number + 4 and not env.step(1)[2]


def test_a_test_episode_is_a_whole_game():
    env = make_env("BreakoutNoFrameskip-v4")
    env.reset(seed=0)
    for _ in range(10_000):
        if env.step(1)[2]:
            break
    assert env.unwrapped.ale.lives() == 0


def test_games_are_cut_off_after_max_frames():
    env = make_env("PongNoFrameskip-v4", max_frames=100)
    env.reset(seed=0)
    steps = next(i for i in range(1, 100) if env.step(0)[3])
    assert steps in (24, 25)  # one no-op, then four screens a step
    env = make_env("Counter-v0", max_frames=2)
    env.reset(seed=0)
    assert [env.step(0)[2:4] for _ in range(2)] == [(False, False), (False, True)]  # a frame a step


def test_noops_at_reset_vary_within_their_bound():
    env = make_env("BreakoutNoFrameskip-v4", noop_max=30)
    counts = []
    for seed in range(40):
        env.reset(seed=seed)
        counts.append(env.unwrapped.ale.getEpisodeFrameNumber())
    assert 1 <= min(counts) <= 4 and 27 <= max(counts) <= 30


def test_an_id_without_its_version_is_the_same_game():
    env = make_env("BreakoutNoFrameskip", life_loss_ends=True)
    assert env.atari


def test_other_games_are_resized_and_grey_ones_get_three_channels():
    for name in ("Counter-v0", "Grey-v0"):
        env = make_env(name)
        frame, _ = env.reset(seed=0)
        assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
        assert (env.step(1)[0] == 20).all()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("BreakoutNoFrameskip-v9", "no environment 'BreakoutNoFrameskip-v9': .*`v9`.*`v4`"),
        ("CartPol-v1", "Did you mean: `CartPole`"),
        ("MrsPacmanNoFrameskip-v4", "Did you mean: `MsPacmanNoFrameskip`"),
        ("xyz", "`xyz` doesn't exist"),
        ("no_such_module:Game-v0", "No module named 'no_such_module'"),
        ("Vector-v0", r"Box\(.* needs .* uint8 images: wrap it"),
        ("Continuous-v0", r"Box\(.* needs Discrete"),
        ("Broken-v0", "ZeroDivisionError"),
        ("", "no environment ''"),
    ],
)
def test_environments_that_will_not_do_are_refused_in_one_helpful_line(env_id, message):
    with pytest.raises(IrisError, match=message) as error:
        make_env(env_id)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", games.FAULTS)
def test_what_a_game_does_wrong_is_said_in_one_line_with_its_name_and_step(fault):
    env = make_env(f"Faulty-{fault}-v0")
    env.reset(seed=2)
    for _ in range(2):
        env.step(0)
    with pytest.raises(IrisError, match=f"^Faulty-{fault}-v0 failed in step [23]: .*{games.FAULTS[fault]}") as error:
        env.step(0)
    assert "\n" not in str(error.value)


# --- replay ----------------------------------------------------------------------------------------------------------


def filled_replay(tmp_path, lengths=(5, 1, 12), rest=3):
    """Episodes of these lengths and one that goes on; a step's number is in its frame and its reward."""
    replay, steps, step = Replay(tmp_path / "replay"), [], 0
    for length, ends in [(length, True) for length in lengths] + [(rest, False)]:
        for i in range(length):
            steps.append((np.full((64, 64, 3), step, np.uint8), step % 4, step, ends and i + 1 == length))
            step += 1
    replay.extend(np.array(steps[:7], STEP))
    replay.extend(np.array(steps[7:], STEP))
    return replay


def reopened(folder, length, num_actions=4):
    replay = Replay(folder)
    replay.cut({"replay_length": length, "epoch": 1}, num_actions)
    return replay


def test_replay_gives_back_what_was_put_in_also_after_reopening(tmp_path):
    filled_replay(tmp_path).file.close()
    again = reopened(tmp_path / "replay", 21)
    assert len(again) == 21 and (again.frames[:, 5, 6, 1] == np.arange(21)).all()
    assert (again.rewards == np.arange(21)).all() and np.flatnonzero(again.ends).tolist() == [4, 5, 17]
    assert again.starts.tolist() == [0, 5, 6, 18] and again.stops.tolist() == [5, 6, 18, 21]
    with pytest.raises(BlockingIOError):  # one process at a time
        Replay(tmp_path / "replay")


def test_reopening_at_an_earlier_length_forgets_what_came_later(tmp_path):
    filled_replay(tmp_path).file.close()
    shorter = reopened(tmp_path / "replay", 8)
    assert shorter.stops.tolist() == [5, 6, 8] and (tmp_path / "replay/steps.bin").stat().st_size == 8 * STEP.itemsize


def test_a_part_of_a_step_as_a_killed_process_may_leave_it_is_forgotten(tmp_path):
    filled_replay(tmp_path).file.close()
    with open(tmp_path / "replay/steps.bin", "ab") as file:
        file.write(bytes(STEP.itemsize // 2))
    again = reopened(tmp_path / "replay", 21)
    assert len(again) == 21 and (tmp_path / "replay/steps.bin").stat().st_size == 21 * STEP.itemsize


def test_a_run_whose_replay_is_gone_is_not_overwritten(run):
    iris_train.save_checkpoint(run)
    run.replay.file.close()
    (run.folder / "replay/steps.bin").unlink()
    before = (run.folder / "checkpoint.pt").read_bytes()
    with pytest.raises(IrisError, match="holds a run already"):
        iris_train.build(run.args)
    assert (run.folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("length", [0, -1, 22, 2**70, None, "eight", 8.0])
def test_a_damaged_length_or_a_damaged_action_leaves_the_replay_as_it_is(tmp_path, length):
    filled_replay(tmp_path).file.close()
    before = (tmp_path / "replay/steps.bin").read_bytes()
    for damage in ((length, 4), (21, 3)):  # with 3 actions, action 3 is out of range
        with pytest.raises(IrisError, match="is another run's, or damaged"):
            reopened(tmp_path / "replay", *damage)
        assert (tmp_path / "replay/steps.bin").read_bytes() == before


def test_hundred_thousand_steps_fit_in_1_3_gigabytes():
    assert 100_000 * STEP.itemsize < 1.3e9


@pytest.mark.parametrize("offsets", [range(6), range(-5, 1)])
def test_sampling_draws_episodes_uniformly_and_starts_or_stops_uniformly_within_them(tmp_path, offsets):
    replay, n = filled_replay(tmp_path), 40_000
    indices, mask = replay.sample(np.random.default_rng(0), n, offsets, "episodes")
    assert indices.shape == mask.shape == (n, 6)
    place = offsets.index(0)
    anchored = indices[:, place]
    assert mask[:, place].all()
    for begin, stop in ((0, 5), (5, 6), (6, 18), (18, 21)):
        for step in range(begin, stop):
            expected = 1 / 4 / (stop - begin)
            assert (anchored == step).mean() == pytest.approx(expected, abs=4 * (expected / n) ** 0.5)


@pytest.mark.parametrize("offsets", [range(6), range(-5, 1)])
def test_drawing_steps_starts_or_stops_at_each_step_alike(tmp_path, offsets):
    replay, n = filled_replay(tmp_path), 40_000
    indices, mask = replay.sample(np.random.default_rng(0), n, offsets, "steps")
    place = offsets.index(0)
    assert mask[:, place].all()
    shares = np.bincount(indices[:, place], minlength=21) / n
    assert shares == pytest.approx(np.full(21, 1 / 21), abs=4 * (1 / 21 / n) ** 0.5)


@pytest.mark.parametrize("draw", ["episodes", "steps"])
@pytest.mark.parametrize("offsets", [range(6), range(-5, 1)])
def test_segments_are_consecutive_steps_of_one_episode_and_padding_is_on_the_right_side(tmp_path, offsets, draw):
    replay = filled_replay(tmp_path)
    indices, mask = replay.sample(np.random.default_rng(1), 500, offsets, draw)
    episode_of = np.searchsorted(replay.stops, np.arange(21), side="right")
    assert (episode_of[indices] == episode_of[indices[:, :1]]).all()
    for row, real in zip(indices, mask, strict=True):
        steps = row[real]
        assert (np.diff(steps) == 1).all() and len(steps) >= 1
        begin, stop = replay.starts[episode_of[steps[0]]], replay.stops[episode_of[steps[0]]]
        if offsets.start == 0:
            assert real.tolist() == sorted(real, reverse=True) and (len(steps) == 6 or steps[-1] == stop - 1)
        else:
            assert real.tolist() == sorted(real) and (len(steps) == 6 or steps[0] == begin)


# --- the loop --------------------------------------------------------------------------------------------------------


class NoWriter:
    """In place of TensorBoard's."""

    def __getattr__(self, name):
        return lambda *arguments, **options: None


@pytest.fixture
def run(tmp_path):
    run = iris_train.build(parse_args([*FAST, "--env-id", "Counter-v0", "--run-dir", str(tmp_path / "run")]))
    run.writer = NoWriter()
    return run


def learn(run, name):
    iris_train.optimise(run, name, getattr(iris_train, f"{name}_losses"))


def test_each_epoch_runs_the_phases_that_are_due_in_their_order_and_saves_them(run, monkeypatch):
    ran = []
    for name in ("collect", "encode_replay", "evaluate", "log", "save_checkpoint"):
        monkeypatch.setattr(iris_train, name, lambda run, *_, name=name: ran.append((run.epoch, name)))
    monkeypatch.setattr(run.agent.tokenizer, "fit_pixels", lambda frames: ran.append((run.epoch, "fit_pixels")))
    monkeypatch.setattr(iris_train.Replay, "sample", lambda *_: (np.zeros((1, 1), int), None))
    monkeypatch.setattr(iris_train.Replay, "frames_at", lambda *_: None)
    monkeypatch.setattr(iris_train, "optimise", lambda run, name, losses_of: ran.append((run.epoch, name)))
    run.args.epochs, run.args.collect_epochs, run.args.eval_every = 6, 5, 3
    run.args.tokenizer_from, run.args.tokenizer_until = 2, 4
    run.args.world_model_from, run.args.actor_critic_from = 3, 4
    iris_train.train(run)
    tokenizer = ["fit_pixels", "tokenizer"]
    expected = [
        ["collect"],
        ["collect", *tokenizer],
        ["collect", *tokenizer, "encode_replay", "world_model", "evaluate"],
        ["collect", *tokenizer, "encode_replay", "world_model", "actor_critic"],
        ["collect", "encode_replay", "world_model", "actor_critic"],
        ["encode_replay", "world_model", "actor_critic", "evaluate"],
    ]
    for epoch, phases in enumerate(expected, start=1):
        assert [name for when, name in ran if when == epoch] == [*phases, "log", "save_checkpoint"], epoch

    ran.clear()  # as after a resume: the last epoch is complete; then two more are asked for, of all phases
    run.args.tokenizer_until = run.args.eval_every = 0
    iris_train.train(run)
    assert ran == []
    run.args.epochs = 8
    iris_train.train(run)
    again = [*tokenizer, "encode_replay", "world_model", "actor_critic", "log", "save_checkpoint"]
    assert ran == [(epoch, name) for epoch in (7, 8) for name in again]


def test_a_tokenizer_that_is_not_trained_in_this_run_still_writes_the_tokens(run):
    run.args.epochs, run.args.eval_every, run.args.tokenizer_from = 1, 0, 99
    before = {key: value.clone() for key, value in run.agent.tokenizer.state_dict().items()}
    iris_train.train(run)
    assert len(run.tokens) == 25 and "losses/world_model" in run.metrics and "losses/tokenizer" not in run.metrics
    assert all(torch.equal(value, before[key]) for key, value in run.agent.tokenizer.state_dict().items())


def test_collect_stores_what_the_game_showed_and_did(run):
    iris_train.collect(run)
    replay, metrics = run.replay, run.metrics
    assert len(replay) == 25
    for begin, stop in zip(replay.starts, replay.stops, strict=True):
        assert (replay.frames[begin:stop, 0, 0, 0] == 20 * np.arange(stop - begin)).all()  # Counter shows its step
        assert replay.ends[begin : stop - 1].sum() == 0 and stop - begin <= 9
    assert (replay.rewards == replay.actions).all()
    last, games = np.flatnonzero(replay.ends)[-1] + 1, replay.ends.sum()
    assert metrics["charts/episodic_length"] == pytest.approx(last / games)
    assert metrics["charts/episodic_return"] == pytest.approx(replay.rewards[:last].sum() / games)


def test_the_return_that_is_logged_is_that_of_whole_games_not_of_lives(run):
    class Lives(gym.Wrapper):  # an end of Counter is a life lost, and every third one also the game's
        ends = 0

        def step(self, action):
            frame, reward, end, truncated, info = super().step(action)
            self.ends += end
            return frame, reward, end, truncated, info | {"life_lost": end and self.ends % 3 != 0}

    run.env, run.args.collect_steps = Lives(run.env), 30
    iris_train.collect(run)  # 30 steps are three to ten lives, but not always a game
    iris_train.collect(run)
    games = [0, *np.flatnonzero(run.replay.ends)[2::3] + 1]  # where they start
    ended_now = [(start, stop) for start, stop in zip(games, games[1:]) if stop > 30]
    assert ended_now and any(start < 30 for start, _ in ended_now)  # one of them had started in the first half
    returns = [run.replay.rewards[start:stop].sum() for start, stop in ended_now]
    assert run.metrics["charts/episodic_return"] == pytest.approx(np.mean(returns))
    assert run.metrics["charts/episodic_length"] == pytest.approx(np.mean([stop - start for start, stop in ended_now]))


class Draws:
    """In place of a run's generator: no action at random, and only long holds."""

    def __init__(self, rng):
        self.rng = rng

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def random(self):
        return 1.0

    def zipf(self, exponent):
        assert exponent == 2.0  # k as often as 1 / k^2
        return 50


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({"collect_hold": 2}, True),
        ({"collect_hold": 1}, False),
        ({"collect_hold": 2, "actor_critic_from": 1}, False),
        ({"collect_hold": 2, "init_from": "a.pt"}, False),
        ({"collect_hold": 2, "init_from": "a.pt", "init_models": ("tokenizer", "world_model")}, True),
    ],
)
def test_actions_are_held_until_a_policy_is_trained_and_no_longer_than_their_episode(run, monkeypatch, changes, held):
    run.args = dataclasses.replace(run.args, **{"actor_critic_from": 2, "collect_steps": 60} | changes)
    run.epoch, run.rng, asked = 2, Draws(run.rng), iter(range(60))  # an epoch plays before it trains
    monkeypatch.setattr(run.agent, "act", lambda frames, state, temperature: (torch.tensor([next(asked) % 3]), state))
    iris_train.collect(run)
    for start, stop in zip(run.replay.starts, run.replay.stops, strict=True):
        steps = np.arange(stop - start)
        chosen_at = start + steps - steps % 2 if held else start + steps
        assert run.replay.actions[start:stop].tolist() == (chosen_at % 3).tolist()


def test_collecting_in_two_goes_warms_the_memory_up_on_the_latest_frames_of_the_same_episode(run, monkeypatch):
    warmed = []
    warm_up = run.agent.actor_critic.warm_up
    monkeypatch.setattr(run.agent.actor_critic, "warm_up", lambda frames, mask: warmed.append(frames) or warm_up(frames, mask))
    monkeypatch.setattr(run.agent.tokenizer, "reconstruct", lambda frames: frames)
    iris_train.collect(run)
    assert not warmed  # nothing came before
    for _ in range(4):
        before = len(run.replay)
        goes_on = not run.replay.ends[-1]
        count = before - int(run.replay.starts[-1]) if goes_on else 0
        warmed.clear()
        iris_train.collect(run)
        seen = [round(float(x) * 255) // 20 for frames in warmed for x in frames[0, :, 0, 0, 0]]
        assert seen == list(range(max(0, count - 2), count))


def test_each_frame_is_encoded_once_an_epoch_and_later_phases_read_tokens(run, monkeypatch):
    encoded = []
    encode = run.agent.tokenizer.encode
    monkeypatch.setattr(run.agent.tokenizer, "encode", lambda frames: encoded.append(len(frames)) or encode(frames))
    iris_train.collect(run)
    learn(run, "tokenizer")
    encoded.clear()
    iris_train.encode_replay(run)
    assert sum(encoded) == 25 and run.metrics["charts/codes_in_use"] == len(set(run.tokens.flatten().tolist()))
    learn(run, "world_model")
    learn(run, "actor_critic")
    assert sum(encoded) == 25


def test_tokens_are_forgotten_when_the_tokenizer_is_trained_and_kept_while_it_rests(run, monkeypatch):
    kept, encode_replay = [], iris_train.encode_replay
    monkeypatch.setattr(iris_train, "encode_replay", lambda run: kept.append(run.tokens is not None) or encode_replay(run))
    run.args.epochs, run.args.eval_every, run.args.tokenizer_until = 4, 0, 2
    iris_train.train(run)
    assert kept == [False, False, True, True]


def test_frames_that_warm_up_a_memory_are_what_the_decoder_makes_of_the_replays_tokens(run, monkeypatch):
    iris_train.collect(run)
    iris_train.encode_replay(run)
    decoded = run.agent.tokenizer.decode(run.tokens).detach()
    assert torch.equal(run.decoded, iris_train.to_stored(decoded))
    seen, warm_up = [], run.agent.actor_critic.warm_up
    monkeypatch.setattr(run.agent.actor_critic, "warm_up", lambda frames, mask: seen.append(frames) or warm_up(frames, mask))
    state = run.rng.bit_generator.state
    iris_train.actor_critic_losses(run, 2)
    run.rng.bit_generator.state = state
    indices, _ = run.replay.sample(run.rng, 2, range(-run.args.burn_in, 1), run.args.draw)
    assert (seen[0] - decoded[indices[:, :-1]]).abs().max() <= 0.5 / 255 + 1e-6  # 8 bits a pixel


def test_statistics_of_pixels_are_the_replays_renewed_in_each_tokenizer_epoch_and_the_policys_are_the_same(run, monkeypatch):
    models, statistics = (run.agent.tokenizer, run.agent.actor_critic), []
    assert all((model.mean == 0.5).all() and (model.std == 0.5).all() for model in models)
    run.args.epochs, run.args.eval_every, run.args.tokenizer_until, run.args.draw = 2, 0, 0, "steps"
    log, pixels = iris_train.log, lambda model: torch.cat([model.mean, model.std])
    kept = lambda run, seconds: statistics.append([pixels(model) for model in models]) or log(run, seconds)  # noqa: E731
    monkeypatch.setattr(iris_train, "log", kept)
    iris_train.train(run)
    mean = torch.from_numpy(run.replay.frames / 255).mean(dim=0).permute(2, 0, 1)
    assert (models[0].mean - mean).abs().max() < 0.2 and (models[0].mean != 0.5).any()  # of as many draws as steps
    (tokenizer_1, policy_1), (tokenizer_2, policy_2) = statistics
    assert torch.equal(policy_1, tokenizer_1) and torch.equal(policy_2, tokenizer_2)
    assert not torch.equal(tokenizer_1, tokenizer_2)
    run.args.epochs, run.args.tokenizer.standardize = 3, False
    iris_train.train(run)
    assert torch.equal(pixels(models[0]), tokenizer_2)


def test_each_phase_trains_its_own_model_only(run):
    iris_train.collect(run)
    for name in ("tokenizer", "world_model", "actor_critic"):
        before = {key: value.clone() for key, value in run.agent.state_dict().items()}
        learn(run, name)
        iris_train.encode_replay(run)
        changed = {key.split(".")[0] for key, value in run.agent.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {name}


def test_a_dream_goes_on_from_as_many_real_frames_and_actions_as_are_given(run, monkeypatch):
    iris_train.collect(run)
    iris_train.encode_replay(run)
    begun, reset = [], run.dream.reset_from_tokens
    monkeypatch.setattr(run.dream, "reset_from_tokens", lambda tokens: begun.append(tokens) or reset(tokens))
    for run.args.given in (1, 3):
        state = run.rng.bit_generator.state
        iris_train.dream_from_replay(run, run.rng, 4)
        run.rng.bit_generator.state = state
        indices, _ = run.replay.sample(run.rng, 4, range(-run.args.burn_in, 1), run.args.draw)
        for row, tokens in zip(indices, begun.pop().tolist(), strict=True):
            expected = run.tokens[row[-1]].tolist()
            for index in row[-2 : -run.args.given - 1 : -1]:
                expected = [*run.tokens[index].tolist(), int(run.replay.actions[index]), *expected]
            assert tokens == expected


def test_numbers_too_small_for_a_fast_processor_are_0_in_a_run(run):
    assert torch.tensor([1e-30]).mul(1e-10).item() == 0  # else a denormal number, and 0 only under 1e-45


@pytest.mark.parametrize(("accumulate", "sizes"), [(1, [5]), (2, [3, 2]), (9, [1] * 5)])
def test_a_split_batch_keeps_its_size_and_its_gradient(run, accumulate, sizes):
    frames, state = torch.rand(5, 3, 64, 64), {key: value.clone() for key, value in run.agent.state_dict().items()}
    tokenizer, drawn = run.agent.tokenizer, []

    def losses_of(run, n):
        part = frames[sum(drawn) % 5 :][:n]
        drawn.append(n)
        return {"pixels": (tokenizer.decode(tokenizer.encode(part)) - part).square().mean()}, {}

    run.args.tokenizer_batch_size, run.args.tokenizer_steps, norms = 5, 1, []
    for run.args.accumulate in (1, accumulate):
        drawn.clear()
        run.agent.load_state_dict(state)
        iris_train.optimise(run, "tokenizer", losses_of)
        norms.append(run.metrics["losses/tokenizer_grad_norm"])
    assert drawn == sizes and norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_codes_are_revived_after_batches_not_after_parts_of_them_and_never_beside_the_perceptual_loss(run, monkeypatch):
    revived = []
    monkeypatch.setattr(run.agent.tokenizer.codebook, "revive", lambda z, after: revived.append((len(z), after)))
    monkeypatch.setattr(run.agent.tokenizer, "loss", lambda frames, lpips, z: {})
    iris_train.collect(run)
    run.args.tokenizer_batch_size, run.args.tokenizer.revive_after = 4, 50
    for run.args.accumulate in (1, 2):
        iris_train.tokenizer_losses(run, 3)
    run.lpips = object()
    iris_train.tokenizer_losses(run, 3)
    assert revived == [(3, 50), (3, 100)]


def test_means_over_the_epoch_are_logged_under_the_names_of_losses_and_metrics(run):
    weight, numbers = run.agent.world_model.ln_f.bias, iter((1.0, 2.0, 3.0, 6.0))

    def losses_of(run, n):
        x = next(numbers)
        return {"a": weight.sum() * 0 + x, "b": weight.sum() * 0 + 10.0}, {"c": torch.tensor(5 * x)}

    run.args.world_model_steps, run.metrics = 4, {}
    iris_train.optimise(run, "world_model", losses_of)
    logged = {"a_loss": 3, "b_loss": 10, "c": 15, "world_model": 13, "world_model_grad_norm": 0}
    assert {key: value for key, value in run.metrics.items() if key.startswith("losses/")} == {
        f"losses/{key}": value for key, value in logged.items()
    }
    assert run.metrics["charts/world_model_learning_rate"] == run.args.world_model_learning_rate


def test_a_loss_that_is_not_finite_is_named_with_its_model_epoch_and_step(run):
    run.epoch, run.args.world_model_steps, calls = 7, 5, []

    def losses_of(run, n):
        calls.append(n)
        weight = next(run.trained.world_model.parameters())
        return {"observations": weight.sum() * (float("nan") if len(calls) == 3 else 1.0)}, {}

    with pytest.raises(IrisError, match="observations_loss is not finite at step 3 of the world_model"):
        iris_train.optimise(run, "world_model", losses_of)


def test_a_gradient_that_is_not_finite_stops_the_run_though_every_loss_is(run):
    def losses_of(run, n):
        weight = next(run.trained.world_model.parameters())
        return {"observations": (weight - weight.detach()).abs().sum().sqrt()}, {}  # 0, with an infinite slope

    run.epoch, run.args.world_model_steps = 1, 1
    with pytest.raises(IrisError, match="world_model_grad_norm is not finite at step 1 of the world_model"):
        iris_train.optimise(run, "world_model", losses_of)


def test_the_learning_rate_of_a_tokenizer_with_a_last_epoch_falls_towards_it(run):
    def rates(name, epochs):
        weight = next(getattr(run.agent, name).parameters())
        for run.epoch in epochs:
            iris_train.optimise(run, name, lambda run, n: ({"nothing": weight.sum() * 0}, {}))
            yield run.metrics[f"charts/{name}_learning_rate"]
            assert run.optimizers[name].param_groups[0]["lr"] == run.metrics[f"charts/{name}_learning_rate"]

    args = run.args
    args.tokenizer_from, args.tokenizer_until, args.tokenizer_learning_rate, args.world_model_learning_rate = 3, 6, 1.0, 0.5
    args.epochs = 600
    assert list(rates("tokenizer", (3, 4, 5, 6))) == [1, 1, 1, 0.5]
    assert list(rates("world_model", (3, 6))) == [0.5, 0.5]
    args.tokenizer_until = 0
    assert list(rates("tokenizer", (3, 600))) == [1, 1]


def test_dreams_use_a_moving_average_of_the_world_models_weights_that_is_saved_beside_those_that_are_trained(run):
    run.args.world_model_average, run.args.world_model_steps, run.epoch, seen = 0.75, 4, 1, []
    name, weight = "ln_f.weight", run.trained.world_model.ln_f.weight
    average = run.dream.world_model.ln_f.weight
    before = average.detach().clone()

    def losses_of(run, n):
        seen.append(weight.detach().clone())
        return {"up": -weight.sum()}, {}

    iris_train.optimise(run, "world_model", losses_of)
    expected = before
    for after in [*seen[1:], weight.detach()]:
        expected = 0.75 * expected + 0.25 * after
    assert torch.allclose(average, expected, atol=1e-7) and (weight > average).all() and (average > before).all()
    iris_train.save_checkpoint(run)
    agent, checkpoint = iris_train.load_agent(run.folder)[0], iris_train.read_checkpoint(run.folder)[0]
    assert torch.equal(agent.world_model.state_dict()[name], average)
    assert torch.equal(checkpoint["trained"][f"world_model.{name}"], weight)


def test_tokens_of_a_tokenizer_that_rests_are_kept_in_parts_that_a_resumed_run_would_encode_alike(run, monkeypatch):
    sizes, encode = [], run.agent.tokenizer.encode
    monkeypatch.setattr(run.agent.tokenizer, "encode", lambda frames: sizes.append(len(frames)) or encode(frames))

    def encoded() -> list[int]:
        sizes.clear()  # playing encodes as well
        iris_train.encode_replay(run)
        return sizes.copy()

    for _ in range(12):
        iris_train.collect(run)
    assert encoded() == [256, 44]
    iris_train.collect(run)
    assert encoded() == [69] and len(run.tokens) == 325
    tokens, run.tokens = run.tokens, None  # as after a resume
    assert encoded() == [256, 69] and torch.equal(tokens, run.tokens)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_test_episodes_are_whole_games_and_what_comes_after_their_ends_counts_for_nothing(run):
    class Alternating(torch.nn.Module):  # a game's actions are 0, 1, 2, 0, ..., as it remembers how many it has had
        def act(self, frames, state, temperature):
            assert temperature == 0.25
            return state[0][:, 0].long() % 3, tuple(x + 1 for x in state)

    agent = Alternating()
    agent.actor_critic = run.agent.actor_critic
    run.args.test_episodes, run.args.test_envs, run.args.test_temperature = 5, 2, 0.25
    played, lengths = iris_train.play_test_episodes(agent, run.args, run.device, seed=7), []
    for seed in range(7, 12):
        env = make_env("Counter-v0")
        env.reset(seed=seed)
        lengths.append(env.unwrapped.length)
    assert [game["length"] for game in played] == lengths and len(set(lengths)) > 1
    for game in played:
        count, steps = np.arange(game["length"]), game["steps"]
        assert steps.dtype == STEP and (steps["frames"][:, 5, 6, 1] == 20 * count).all()
        assert (steps["actions"] == count % 3).all() and (steps["rewards"] == count % 3).all()
        assert game["return"] == (count % 3).sum() and np.flatnonzero(steps["ends"]).tolist() == [count[-1]]


def test_of_a_long_test_game_only_the_last_steps_are_kept_but_all_rewards_count(run):
    def played(keep):
        torch.manual_seed(0)
        return iris_train.play_test_episodes(run.agent, run.args, run.device, seed=0, keep=keep)

    whole, last = played(2000), played(2)
    assert all(game["length"] >= 3 and game["steps"]["ends"].tolist() == [0, 1] for game in last)
    for a, b in zip(whole, last, strict=True):
        assert a["length"] == b["length"] == len(a["steps"]) and a["return"] == b["return"] == a["steps"]["rewards"].sum()
        assert np.array_equal(a["steps"][-2:], b["steps"])
    assert sum(len(game["steps"]) for game in played(0)) == 0


def test_evaluating_changes_no_weights_no_draws_and_no_replay(tmp_path):
    argv = [*FAST, "--env-id", "Counter-v0", "--epochs", "3"]
    for every in ("1", "0"):
        iris_train.main(parse_args([*argv, "--eval-every", every, "--run-dir", str(tmp_path / every)]))
    often, never = (torch.load(tmp_path / every / "checkpoint.pt", weights_only=True) for every in ("1", "0"))
    assert (tmp_path / "1/media/episodes/test").is_dir() and not (tmp_path / "0/media/episodes/test").exists()
    for key, weight in often["agent"].items():
        assert torch.equal(weight, never["agent"][key]), key
    assert often["numpy_rng"] == never["numpy_rng"] and torch.equal(often["torch_rng"], never["torch_rng"])
    assert (tmp_path / "1/replay/steps.bin").read_bytes() == (tmp_path / "0/replay/steps.bin").read_bytes()


def test_of_the_test_games_of_an_evaluation_the_best_is_kept_with_its_whole_return(run, monkeypatch):
    def games_of_an_evaluation(*_):
        steps = np.zeros(3, STEP)
        return [{"return": 99.5 if i == 2 else i, "length": 3, "steps": steps.copy()} for i in range(20)]

    monkeypatch.setattr(iris_train, "play_test_episodes", games_of_an_evaluation)
    run.epoch, run.args.tokenizer_from, run.args.world_model_from = 4, 9, 9
    iris_train.evaluate(run)
    (path,) = (run.folder / "media/episodes/test").iterdir()
    assert path.name == "epoch_0004_return_99.5.npz" and np.load(path)["return"] == 99.5  # not of the steps kept, 0
    assert run.metrics["eval/episodic_return"] == pytest.approx((99.5 + sum(range(20)) - 2) / 20)


def kept_episode(*rewards):
    n = len(rewards)
    frames = np.zeros((n, 64, 64, 3), np.uint8)
    return {"frames": frames, "actions": np.zeros(n), "rewards": np.array(rewards), "ends": np.zeros(n)}


def test_tensorboards_x_axis_is_the_environment_step_and_goes_on_after_the_last_one(run):
    run.args.epochs, run.args.collect_epochs, run.args.eval_every, logged = 4, 2, 0, []
    run.writer = NoWriter()
    run.writer.add_scalar = lambda name, value, x: logged.append((value, x)) if name == "charts/epoch" else None
    iris_train.train(run)
    assert logged == [(1, 25), (2, 50), (3, 51), (4, 52)]


@pytest.mark.parametrize("sign", [1, -1])
def test_kept_episodes_are_the_last_ten_and_the_best(tmp_path, sign):
    rewards = [sign * (1 + i / 10) for i in range(14)]  # rising or falling, but for the second
    rewards[1] = 10.0
    for i, reward in enumerate(rewards):
        iris_train.save_episode(tmp_path, f"step_{i:03d}", kept_episode(0.5, reward))
    kept = [1, *range(4, 14)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{i:03d}_return_{rewards[i] + 0.5:g}.npz" for i in kept]
    best = np.load(tmp_path / "step_001_return_10.5.npz")
    assert best["return"] == 10.5 and best["frames"].shape == (2, 64, 64, 3) and best["rewards"].tolist() == [0.5, 10]


def test_of_many_episodes_of_one_epoch_the_last_ten_and_the_best_are_written(run):
    run.args.collect_steps = 200
    iris_train.collect(run)
    spans = list(zip(run.replay.starts, run.replay.stops, run.replay.ends[run.replay.stops - 1], strict=True))
    ended = [(start, stop) for start, stop, over in spans if over]
    assert len(ended) > 15
    best = sorted(ended, key=lambda span: run.replay.rewards[slice(*span)].sum())[-1]
    expected = {f"step_{start:07d}_return_{run.replay.rewards[start:stop].sum():g}.npz" for start, stop in [*ended[-10:], best]}
    assert expected <= {path.name for path in (run.folder / "media/episodes/train").iterdir()}


def test_a_damaged_episode_does_not_stop_the_run(tmp_path):
    for i, damaged in enumerate((b"", b"hello", bytes(60))):
        (tmp_path / f"step_{i:03d}_return_{100 + i}.npz").write_bytes(damaged)
    iris_train.save_episode(tmp_path, "step_009", kept_episode(1.0))
    assert np.load(tmp_path / "step_009_return_1.npz")["return"] == 1


# --- arguments, checkpoints ------------------------------------------------------------------------------------------


def test_paper_preset_holds_the_published_schedule():
    args = parse_args(["--preset", "paper"])
    assert args == Args()
    assert (args.epochs, args.collect_epochs * args.collect_steps, args.collect_epsilon) == (600, 100_000, 0.01)
    assert (args.tokenizer_from, args.world_model_from, args.actor_critic_from) == (6, 26, 51)
    assert (args.tokenizer_batch_size, args.world_model_batch_size, args.actor_critic_batch_size) == (256, 64, 64)
    assert (args.gamma, args.lambda_, args.entropy_weight, args.horizon, args.burn_in) == (0.995, 0.95, 0.001, 20, 20)
    assert (args.noop_max, args.max_frames, args.test_max_frames) == (30, 20_000, 108_000)
    assert (args.draw, args.collect_hold, args.tokenizer_until, args.after_end) == ("episodes", 1, 0, True)


@pytest.mark.parametrize(("gpu", "flags", "preset"), [
    (True, [], "paper"), (False, [], "laptop"), (True, ["--device", "cpu"], "laptop"),
    (False, ["--preset", "auto"], "laptop"), (False, ["--preset", "paper"], "paper"), (True, ["--preset=laptop"], "laptop"),
])  # fmt: skip
def test_without_a_preset_it_is_the_papers_on_a_gpu_and_the_laptops_on_a_cpu(monkeypatch, gpu, flags, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert parse_args(flags) == dataclasses.replace(iris_train.PRESETS[preset], device="cpu" if "cpu" in flags else "auto")


@pytest.mark.parametrize(
    ("fast", "others", "chosen"),
    [(name, 2.0, name) for name in ("fp32", "bf16", "fp32-nchw", "bf16-nchw")] + [("bf16-nchw", 1.03, "fp32")],
)
def test_auto_is_the_precision_in_which_a_step_takes_least_time(monkeypatch, fast, others, chosen):
    """The clock stands still but for a step: a second where it is the fast precision, else more. Near a tie, the
    convolutions' channels lie last."""
    clock, settings, loss = [0.0], [], iris_train.Tokenizer.loss

    def timed_loss(tokenizer, frames):
        bf16, layout = torch.is_autocast_enabled("cpu"), tokenizer.encoder[3].weight.is_contiguous()
        settings.append(("bf16" if bf16 else "fp32") + "-nchw" * layout)
        clock[0] += 1 if settings[-1] == fast else others
        return loss(tokenizer, frames)

    monkeypatch.setattr(iris_train.Tokenizer, "loss", timed_loss)
    monkeypatch.setattr(
        iris_train.timeit, "repeat", lambda f, number, repeat: [f() or clock[0] - before for before in clock * repeat]
    )
    args = parse_args([*FAST, "--precision", "auto"])
    device, bf16 = iris_train.choose_device(args)
    assert (str(device), bf16, args.precision) == ("cpu", "bf16" in chosen, chosen)
    assert {*settings} == {"fp32", "bf16", "fp32-nchw", "bf16-nchw"}
    before = len(settings)
    iris_train.choose_device(args)
    assert len(settings) == before  # settled: nothing is measured again


def test_a_run_keeps_the_precision_it_began_with_and_draws_the_same_numbers_however_it_was_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(iris_train, "fastest_precision", lambda args: torch.rand(7) is None or "fp32-nchw")
    runs = []
    for name, flags in (("a", ["--precision", "auto"]), ("b", ["--precision", "fp32-nchw"])):
        argv = [*FAST, "--env-id", "Counter-v0", "--epochs", "1", *flags, "--run-dir", str(tmp_path / name)]
        iris_train.main(parse_args(argv))
        runs.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True))
    for key, weight in runs[0]["agent"].items():
        assert torch.equal(weight, runs[1]["agent"][key])
    assert runs[0]["args"]["precision"] == json.loads((tmp_path / "a/args.json").read_text())["precision"] == "fp32-nchw"
    monkeypatch.setattr(iris_train, "fastest_precision", lambda args: pytest.fail("measured again"))
    again = iris_train.build(parse_args(["--resume", str(tmp_path / "a"), "--epochs", "2"]))
    assert again.args.precision == "fp32-nchw" and again.agent.tokenizer.encoder[3].weight.is_contiguous()


def test_explicit_flags_override_a_preset_wherever_they_stand():
    laptop = parse_args(["--preset", "laptop"])
    assert laptop.epochs < 600 and laptop.tokenizer.local and not Args().tokenizer.local
    for argv in (["--epochs", "7", "--preset", "laptop"], ["--preset=laptop", "--epochs=7"]):
        assert parse_args(argv) == Args(**{**vars(laptop), "epochs": 7})


def test_load_agent_reads_a_run_its_checkpoint_and_a_published_one(run, tmp_path):
    import reference

    iris_train.save_checkpoint(run)
    for source in (run.folder, run.folder / "checkpoint.pt"):
        agent, args = load_agent(source)
        assert args == run.args and not agent.training
        assert all(torch.equal(a, b) for a, b in zip(agent.parameters(), run.agent.parameters(), strict=True))
    torch.save(reference.official_state_dict(6), tmp_path / "Pong.pt")
    agent, args = load_agent(tmp_path / "Pong.pt")
    assert args == Args(env_id="PongNoFrameskip-v4") and agent.world_model.num_actions == 6


def test_a_checkpoint_needs_no_trust(run):
    """It loads with weights_only, so it can't bring code along."""
    iris_train.save_checkpoint(run)
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["epoch"] == 0


def test_a_run_that_stops_says_which_epoch_is_saved(run):
    assert run.saved() == f"Nothing was saved in {run.folder}"
    run.epoch = 4
    iris_train.save_checkpoint(run)
    run.epoch = 5
    assert run.saved().startswith("Epoch 4 is saved; ") and f"--resume {run.folder}" in run.saved()


def resumed(run, *flags):
    """The run, from its checkpoint."""
    run.replay.file.close()
    again = iris_train.build(parse_args(["--resume", str(run.folder), *flags]))
    again.writer = NoWriter()
    return again


def test_a_resumed_run_takes_the_learning_rates_of_the_command_line(run):
    iris_train.collect(run)
    learn(run, "tokenizer")
    run.epoch = 1
    iris_train.save_checkpoint(run)
    again = resumed(run, "--tokenizer-learning-rate", "1e-9")
    assert again.epoch == again.saved_epoch == 1 and again.optimizers["tokenizer"].state  # its moments come back
    again.epoch = 2
    learn(again, "tokenizer")
    assert again.optimizers["tokenizer"].param_groups[0]["lr"] == 1e-9
    assert [group["weight_decay"] for group in again.optimizers["world_model"].param_groups] == [0.01, 0]


def test_a_resumed_run_has_the_learning_rates_of_an_undisturbed_one_also_of_a_tokenizer_that_rests(run):
    def rates(run):
        return {name: optimizer.param_groups[0]["lr"] for name, optimizer in run.optimizers.items()}

    run.args.epochs, run.args.eval_every, run.args.tokenizer_until = 4, 0, 3
    iris_train.train(run)
    assert rates(run)["tokenizer"] == pytest.approx(run.args.tokenizer_learning_rate * 2 / 3)
    again = resumed(run, "--epochs", "5")
    assert rates(again) == rates(run)
    iris_train.train(again)
    assert rates(again) == rates(run)


def test_a_folder_in_which_another_process_trains_is_left_alone(run):
    iris_train.save_checkpoint(run)
    with pytest.raises(IrisError, match="another process is training"):
        iris_train.build(parse_args(["--resume", str(run.folder)]))


def test_steps_that_no_checkpoint_knows_of_are_not_overwritten(run):
    iris_train.collect(run)
    run.replay.file.close()
    with pytest.raises(IrisError, match="is another run's, or damaged"):
        iris_train.build(run.args)
    assert (run.folder / "replay/steps.bin").stat().st_size == 25 * STEP.itemsize


@pytest.mark.parametrize("number", [0, 999, None])
def test_a_checkpoint_of_another_version_is_refused(run, number):
    iris_train.save_checkpoint(run)
    path = run.folder / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    content["format"] = number
    torch.save(content, path)
    with pytest.raises(IrisError, match="of an IRIS run of this version"):
        resumed(run)
    with pytest.raises(IrisError, match="of an IRIS run of this version"):
        load_agent(path)


def test_a_checkpoint_with_zeroed_bytes_is_refused(run):
    iris_train.save_checkpoint(run)
    path = run.folder / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)  # amid the weights
    path.write_bytes(content)
    with pytest.raises(IrisError, match="no checkpoint can be read .* it is damaged"):
        load_agent(path)


def test_a_run_older_than_an_argument_has_that_arguments_default(run):
    iris_train.save_checkpoint(run)
    path = run.folder / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    del content["args"]["draw"]
    torch.save(content, path)
    assert run.args.draw == "steps" and iris_train.load_agent(path)[1] == dataclasses.replace(run.args, draw="episodes")


@pytest.mark.parametrize(
    "flags",
    """--env-id Grey-v0; --seed 2; --noop-max 5; --max-frames 77; --run-dir elsewhere; --init-from a.pt; --preset catch;
    --perceptual-loss lpips; --world-model.layers 3; --tokenizer.code-dim 8; --actor-critic.lstm-width 8""".split(";"),
)
def test_what_makes_a_run_what_it_is_cannot_be_changed_on_resume(run, flags):
    iris_train.save_checkpoint(run)
    with pytest.raises(IrisError, match="is a run with .*: leave that out") as error:
        parse_args(["--resume", str(run.folder), *flags.split()])
    assert "\n" not in str(error.value)


def test_what_a_run_has_already_may_be_said_again_on_resume(run):
    iris_train.save_checkpoint(run)
    said = "--perceptual-loss auto --seed 1 --env-id Counter-v0 --preset laptop --noop-max 30 --init-from".split()
    args = parse_args(["--resume", str(run.folder), "--run-dir", str(run.folder), *said, "", "--epochs", "9"])
    assert args == dataclasses.replace(run.args, resume=str(run.folder), epochs=9)


@pytest.mark.parametrize(
    "flags",
    """--noop-max 0; --collect-steps 0; --collect-epochs 0; --test-episodes 0; --test-envs 0; --horizon 1; --burn-in -1;
    --accumulate 0; --seed -1; --max-grad-norm -1; --tokenizer-learning-rate nan; --actor-critic-batch-size 0;
    --world-model.max-blocks 1; --world-model.heads 3; --world-model.heads 0; --world-model.dropout 2;
    --tokenizer.no-local --tokenizer.blocks 1 1; --actor-critic.patch 3; --actor-critic.patch 16;
    --tokenizer.channels 48 48 48 48 48; --tokenizer.vocab-size 0; --tokenizer.channels 8 8 8 8;
    --actor-critic.channels 8 8 8 8 8 8 8; --tokenizer.worst-values 0; --seed 99999999999999999999999;
    --tokenizer.channels; --actor-critic.channels; --tokenizer.code-dim 0; --tokenizer.channels 8 0 8 8 8;
    --world-model.layers -1; --world-model.layers 0; --world-model.width 0; --tokenizer.blocks 0 -1 0 0 0;
    --actor-critic.lstm-width 0; --device meta; --collect-epsilon 5; --gamma 2; --lambda 5; --max-grad-norm 0;
    --tokenizer.commitment-weight nan; --tokenizer.revive-after 0; --actor-critic-learning-rate inf; --epochs 1000000000000;
    --world-model.width 10000000; --world-model.layers 999999; --burn-in 100000 --actor-critic-batch-size 1000;
    --tokenizer-batch-size 100000000; --world-model-batch-size 100000000; --actor-critic-batch-size 100000000;
    --init-models; --test-envs 100000""".split(";"),
)
def test_numbers_that_no_run_can_have_are_refused_at_the_start(flags, tmp_path):
    with pytest.raises(IrisError) as error:
        iris_train.build(parse_args([*FAST, "--env-id", "Counter-v0", "--run-dir", str(tmp_path), *flags.split()]))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_help_shows_the_range_of_each_number_that_has_one_of_its_own(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, (least, most) in iris_train.RANGES.items():
        assert f"{name} {least} to {most:.4g}" in shown


@pytest.mark.parametrize("changes", [{"seed": "one"}, {"gamma": None}, {"epochs": 2.5}, {"burn_in": True, "gamma": "1"}])
def test_arguments_of_another_type_as_in_a_damaged_checkpoint_are_refused(run, changes):
    iris_train.save_checkpoint(run)
    path = run.folder / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    content["args"] |= changes
    torch.save(content, path)
    with pytest.raises(IrisError, match="has to be of type"):
        resumed(run)


def test_models_that_no_epoch_of_the_run_trains_are_named_in_one_line_each(tmp_path, capsys):
    flags = ["--epochs", "1", "--eval-every", "0", "--world-model-from", "7", "--actor-critic-from", "8"]
    iris_train.main(parse_args([*FAST, "--env-id", "Counter-v0", "--run-dir", str(tmp_path / "run"), *flags]))
    said = [line for line in capsys.readouterr().out.splitlines() if "trains from epoch" in line]
    assert said == [
        "The world_model trains from epoch 7 on, so not within 1 epochs.",
        "The actor_critic trains from epoch 8 on, so not within 1 epochs.",
    ]


def test_init_from_takes_over_the_chosen_models_only(run, tmp_path):
    iris_train.save_checkpoint(run)
    argv = [*FAST, "--env-id", "Counter-v0", "--seed", "2", "--init-from", str(run.folder)]
    chosen = ["--init-models", "tokenizer", "actor_critic"]
    fresh = iris_train.build(parse_args([*argv, *chosen, "--run-dir", str(tmp_path / "other")])).agent
    for name, same in (("tokenizer", True), ("world_model", False), ("actor_critic", True)):
        pairs = zip(getattr(fresh, name).parameters(), getattr(run.agent, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same
    argv += ["--world-model.width", "16", "--tokenizer.vocab-size", "32", "--run-dir", str(tmp_path / "third")]
    other = iris_train.build(parse_args(argv))  # sizes come along
    assert other.args.world_model == run.args.world_model and other.args.tokenizer == run.args.tokenizer
    argv = [*argv[:-1], str(tmp_path / "fourth"), "--init-models", "world_model"]  # of 512 codes, where there are 32
    with pytest.raises(IrisError, match="can't take the world_model of .*--init-models"):
        iris_train.build(parse_args(argv))


def test_catch_pays_whoever_is_under_the_ball_and_the_best_player_always_is():
    from gymnasium.utils.env_checker import check_env

    args = parse_args(["--preset", "catch"])
    env = make_env(args.env_id)
    check_env(env.unwrapped, skip_render_check=True)

    def play(seed, choose):
        frame, _ = env.reset(seed=seed)
        for step in range(1, 8):
            # The ball is all that is red, the paddle what is green: read off the picture, as a player would.
            columns = [np.flatnonzero((frame[..., c] > 80) & (frame[..., 1 - c] < 130)) % 64 // 8 for c in (0, 1)]
            ball, paddle = (int(np.median(column)) for column in columns)
            frame, reward, terminated, truncated, _ = env.step(choose(ball, paddle))
            assert terminated == (step == 7) and not truncated and (reward == 0 or step == 7)
        return reward

    assert [play(seed, lambda ball, paddle: 1 + (ball > paddle) - (ball < paddle)) for seed in range(40)] == [1.0] * 40
    assert {play(seed, lambda ball, paddle: 2 if ball < paddle else 0) for seed in range(40)} == {-1.0}


# --- frames ---


def test_resize_is_pillows_within_one_level():
    from PIL import Image

    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3), dtype=np.uint8)
    screen[100:104, 50:52] = 255
    expected = np.asarray(Image.fromarray(screen).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    resized = iris_train.resize_frame(screen)
    assert resized.shape == (64, 64, 3) and resized.dtype == np.uint8
    assert np.abs(resized.astype(int) - expected).max() <= 1
    assert np.array_equal(iris_train.resize_frame(screen[::-1].copy()[::-1]), resized)  # as OpenGL's images come


def test_stored_frames_survive_the_way_to_the_models_and_back():
    frames = torch.arange(256, dtype=torch.uint8).repeat(480).view(2, 5, 64, 64, 3)  # every level there is
    as_the_models_read_them = iris_train.to_model(frames)
    assert as_the_models_read_them.shape == (2, 5, 3, 64, 64)
    assert as_the_models_read_them.min() == 0 and as_the_models_read_them.max() == 1
    assert torch.equal(as_the_models_read_them[1, 2, :, 3, 4] * 255, frames[1, 2, 3, 4].float())
    assert torch.equal(iris_train.to_stored(as_the_models_read_them), frames)
    outside = torch.tensor([-0.1, 1.1]).view(1, 1, 2).expand(3, 1, 2)
    assert iris_train.to_stored(outside).tolist() == [[[0, 0, 0], [255, 255, 255]]]
