"""Chapter 4's promises, piece by piece; test_command_line.py tests it as a user meets it."""
import dataclasses

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch

import games  # noqa: F401  registers the small games
import iris_train
from iris_tokenizer import IrisError, resize_frame
from iris_train import Args, Replay, human_normalised, load_agent, make_env, parse_args

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
    assert np.array_equal(frame, resize_frame(torch.from_numpy(screen)).numpy())
    total = expected_total = 0.0
    for action in [1, 2, 3, 0, 2, 2, 3, 3, 1] * 6:
        frame, reward, terminated, truncated, _ = env.step(action)
        screens = []
        for _ in range(4):
            screen, raw_reward, *_ = raw.step(action)
            screens.append(resize_frame(torch.from_numpy(screen)).numpy())
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


def test_noops_at_reset_vary_within_their_bound():
    env = make_env("BreakoutNoFrameskip-v4", noop_max=30)
    counts = []
    for seed in range(40):
        env.reset(seed=seed)
        counts.append(env.unwrapped.ale.getEpisodeFrameNumber())
    assert 1 <= min(counts) <= 4 and 27 <= max(counts) <= 30


def test_an_id_without_its_version_is_the_same_game():
    env = make_env("BreakoutNoFrameskip", life_loss_ends=True)
    assert isinstance(env, iris_train.AtariFrames)


def test_other_games_are_resized_and_grey_ones_get_three_channels():
    for name in ("Counter-v0", "Grey-v0"):
        env = make_env(name)
        frame, _ = env.reset(seed=0)
        assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
        assert (env.step(1)[0] == 20).all()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("BreakoutNoFrameskip-v9", "did you mean BreakoutNoFrameskip-v4"),
        ("CartPol-v1", "did you mean CartPole-v1"),
        ("xyz", "gymnasium does not know it"),
        ("breakout", "did you mean BreakoutNoFrameskip-v4"),
        ("MrsPacmanNoFrameskip-v4", "did you mean MsPacmanNoFrameskip-v4"),
        ("no_such_module:Game-v0", "No module named 'no_such_module'"),
        ("Vector-v0", "needs an image"),
        ("Continuous-v0", r"Box\(.* needs Discrete"),
        ("Broken-v0", "ZeroDivisionError"),
        ("", "no environment ''"),
    ],
)
def test_environments_that_will_not_do_are_refused_in_one_helpful_line(env_id, message):
    with pytest.raises(IrisError, match=message) as error:
        make_env(env_id)
    assert "\n" not in str(error.value)


def test_human_normalised_score_is_0_for_random_and_1_for_human_play():
    assert human_normalised("BreakoutNoFrameskip-v4", 1.7) == 0 and human_normalised("BreakoutNoFrameskip-v4", 30.5) == 1
    assert human_normalised("ALE/Pong-v5", 14.6) == 1 and human_normalised("Counter-v0", 3) is None


# --- replay ----------------------------------------------------------------------------------------------------------


def filled_replay(tmp_path, lengths=(5, 1, 12), rest=3, draw="episodes"):
    """Episodes of these lengths and one that goes on; a step's number is in its frame and its reward."""
    replay, step = Replay(tmp_path / "replay", draw=draw), 0
    for length, ends in [(length, True) for length in lengths] + [(rest, False)]:
        for i in range(length):
            replay.append(np.full((64, 64, 3), step, np.uint8), step % 4, step, ends and i + 1 == length)
            step += 1
    replay.flush()
    return replay


def test_replay_gives_back_what_was_put_in_also_after_reopening(tmp_path):
    filled_replay(tmp_path)
    again = Replay(tmp_path / "replay", length=21)
    with pytest.raises(IrisError, match="no checkpoint speaks of"):
        Replay(tmp_path / "replay")
    assert len(Replay(tmp_path / "replay", length=21)) == 21
    assert len(again) == 21 and (again.frames[:, 5, 6, 1] == np.arange(21)).all()
    assert (again.rewards == np.arange(21)).all() and np.flatnonzero(again.ends).tolist() == [4, 5, 17]
    assert again.starts.tolist() == [0, 5, 6, 18] and again.stops.tolist() == [5, 6, 18, 21]


def test_reopening_at_an_earlier_length_forgets_what_came_later(tmp_path):
    filled_replay(tmp_path)
    shorter = Replay(tmp_path / "replay", length=8)
    assert shorter.stops.tolist() == [5, 6, 8] and (tmp_path / "replay/frames.bin").stat().st_size == 8 * 64 * 64 * 3
    with pytest.raises(IrisError, match="shorter than its checkpoint"):
        Replay(tmp_path / "replay", length=9)


def test_hundred_thousand_steps_fit_in_1_3_gigabytes():
    step = sum(int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize for dtype, shape in Replay.COLUMNS.values())
    assert 100_000 * step < 1.3e9


@pytest.mark.parametrize("anchor", ["start", "stop"])
def test_sampling_draws_episodes_uniformly_and_starts_or_stops_uniformly_within_them(tmp_path, anchor):
    replay, n, length = filled_replay(tmp_path), 40_000, 6
    indices, mask = replay.sample(np.random.default_rng(0), n, length, anchor)
    assert indices.shape == mask.shape == (n, length)
    anchored = indices[:, 0] if anchor == "start" else indices[:, -1]
    assert mask[:, 0 if anchor == "start" else -1].all()
    for begin, stop in ((0, 5), (5, 6), (6, 18), (18, 21)):
        for step in range(begin, stop):
            expected = 1 / 4 / (stop - begin)
            assert (anchored == step).mean() == pytest.approx(expected, abs=4 * (expected / n) ** 0.5)


@pytest.mark.parametrize("anchor", ["start", "stop"])
def test_drawing_steps_starts_or_stops_at_each_step_alike(tmp_path, anchor):
    replay, n = filled_replay(tmp_path, draw="steps"), 40_000
    indices, mask = replay.sample(np.random.default_rng(0), n, 6, anchor)
    place = 0 if anchor == "start" else -1
    assert mask[:, place].all()
    shares = np.bincount(indices[:, place], minlength=21) / n
    assert shares == pytest.approx(np.full(21, 1 / 21), abs=4 * (1 / 21 / n) ** 0.5)


@pytest.mark.parametrize("anchor", ["start", "stop"])
def test_segments_are_consecutive_steps_of_one_episode_and_padding_is_on_the_right_side(tmp_path, anchor):
    replay = filled_replay(tmp_path)
    indices, mask = replay.sample(np.random.default_rng(1), 500, 6, anchor)
    episode_of = np.searchsorted(replay.stops, np.arange(21), side="right")
    assert (episode_of[indices] == episode_of[indices[:, :1]]).all()
    for row, real in zip(indices, mask, strict=True):
        steps = row[real]
        assert (np.diff(steps) == 1).all() and len(steps) >= 1
        begin, stop = replay.starts[episode_of[steps[0]]], replay.stops[episode_of[steps[0]]]
        if anchor == "start":
            assert real.tolist() == sorted(real, reverse=True) and (len(steps) == 6 or steps[-1] == stop - 1)
        else:
            assert real.tolist() == sorted(real) and (len(steps) == 6 or steps[0] == begin)


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    return iris_train.build(parse_args([*FAST, "--env-id", "Counter-v0", "--run-dir", str(tmp_path / "run")]))


def test_collect_stores_what_the_game_showed_and_did(run):
    metrics = iris_train.collect(run)
    replay = run.replay
    assert len(replay) == 25
    for begin, stop in zip(replay.starts, replay.stops, strict=True):
        assert (replay.frames[begin:stop, 0, 0, 0] == 20 * np.arange(stop - begin)).all()  # Counter shows its step
        assert replay.ends[begin : stop - 1].sum() == 0 and stop - begin <= 9
    assert (replay.rewards == replay.actions).all()
    ended = replay.ends.sum()
    assert metrics["train/episodes"] == ended and metrics["train/length"] == pytest.approx(replay.stops[ended - 1] / ended)


def test_actions_are_held_until_the_policy_trains_and_never_by_default(run):
    def repeats(hold: int, epoch: int) -> float:  # share of steps with the action of the step before
        run.args.collect_hold, run.epoch, run.args.collect_steps = hold, epoch, 600
        iris_train.collect(run)
        actions = run.replay.actions[-600:]
        return (actions[1:] == actions[:-1]).mean()

    run.args.actor_critic_from = 2
    chance = 1 / run.env.action_space.n
    assert repeats(1, 1) == pytest.approx(chance, abs=0.1) == repeats(100, 2)
    # Holds of k steps, k as often as 1 / k^2 and 100 at most, last 3.8 on average: of as many steps one is a new draw.
    assert repeats(100, 1) == pytest.approx(1 - (1 - chance) / 3.8, abs=0.12)


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
    iris_train.train_tokenizer(run)
    encoded.clear()
    metrics = iris_train.encode_replay(run)
    assert sum(encoded) == 25 and 1 <= metrics["codes/in_use"] <= 512 and metrics["codes/perplexity"] <= metrics["codes/in_use"]
    iris_train.train_world_model(run)
    iris_train.train_actor_critic(run)
    assert sum(encoded) == 25


def test_statistics_for_standardising_are_taken_at_the_first_training_and_then_kept(run):
    models = run.agent.tokenizer, run.agent.actor_critic
    iris_train.collect(run)
    assert not any(model.standardize.fitted for model in models)
    for first in (True, False):
        iris_train.train_tokenizer(run)
        iris_train.encode_replay(run)
        iris_train.train_actor_critic(run)
        if first:
            taken = [model.standardize.mean.clone() for model in models]
            iris_train.collect(run)
    assert all(model.standardize.fitted for model in models)
    assert all(torch.equal(model.standardize.mean, mean) for model, mean in zip(models, taken, strict=True))


def test_each_phase_trains_its_own_component_only(run):
    iris_train.collect(run)
    for phase, name in (("train_tokenizer", "tokenizer"), ("train_world_model", "world_model"), ("train_actor_critic", "actor_critic")):
        before = {key: value.clone() for key, value in run.agent.state_dict().items()}
        getattr(iris_train, phase)(run)
        iris_train.encode_replay(run)
        changed = {key.split(".")[0] for key, value in run.agent.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {name}


@pytest.mark.parametrize(("accumulate", "sizes"), [(1, [5]), (2, [3, 2]), (9, [1] * 5)])
def test_a_split_batch_keeps_its_size_and_its_gradient(run, accumulate, sizes):
    frames, state = torch.rand(5, 3, 64, 64), {key: value.clone() for key, value in run.agent.state_dict().items()}
    tokenizer, drawn = run.agent.tokenizer, []

    def losses_of(n):
        part = frames[sum(drawn) % 5 :][:n]
        drawn.append(n)
        return {"loss": (tokenizer.decode(tokenizer.encode(part)) - part).square().mean()}, {}

    run.args.tokenizer_batch_size, run.args.tokenizer_steps, norms = 5, 1, []
    for run.args.accumulate in (1, accumulate):
        drawn.clear()
        run.agent.load_state_dict(state)
        norms.append(iris_train.optimise(run, "tokenizer", losses_of)["tokenizer/grad_norm"])
    assert drawn == sizes and norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_loss_that_is_not_finite_names_component_epoch_and_step(run):
    run.epoch, run.args.world_model_steps, calls = 6, 5, []

    def losses_of(n):
        calls.append(n)
        weight = next(run.agent.world_model.parameters())
        return {"observations": weight.sum() * (float("nan") if len(calls) == 3 else 1.0)}, {}

    with pytest.raises(IrisError, match="world model's observations is not finite in epoch 7, step 3"):
        iris_train.optimise(run, "world_model", losses_of)


def test_a_gradient_that_is_not_finite_stops_the_run_though_every_loss_is(run):
    def losses_of(n):
        weight = next(run.agent.world_model.parameters())
        return {"observations": (weight - weight.detach()).abs().sum().sqrt()}, {}  # 0, with an infinite slope

    run.args.world_model_steps = 1
    with pytest.raises(IrisError, match="world model's grad_norm is not finite in epoch 1, step 1"):
        iris_train.optimise(run, "world_model", losses_of)


def test_a_tokenizer_that_is_not_trained_in_this_run_still_writes_the_tokens(tmp_path):
    arguments = [*FAST, "--env-id", "Counter-v0", "--run-dir", str(tmp_path / "run"), "--tokenizer-from", "99"]
    run = iris_train.build(parse_args([*arguments, "--epochs", "1"]))
    due = [name for name, (_, epochs) in iris_train.phases(run.args).items() if 1 in epochs]
    assert due == ["collect", "encode", "world_model", "actor_critic"]
    for name in due:
        iris_train.phases(run.args)[name][0](run)


def test_test_episodes_are_whole_games_with_their_true_returns(run):
    class Last(torch.nn.Module):  # always the last action, 2, so a game of n steps returns 2n
        def act(self, frames, state, temperature):
            assert temperature == 0.25
            shown = (frames[:, 0, 0, 0] * 255).round() / 20  # Counter shows how many steps the game has had
            assert torch.equal(shown[:, None].expand_as(state[0]), state[0])  # each game keeps its own memory
            seen.append(len(frames))
            return torch.full((len(frames),), 2), tuple(x + 1 for x in state)

    seen, agent = [], Last()
    agent.actor_critic = run.agent.actor_critic
    run.args.test_episodes, run.args.test_envs, run.args.test_temperature = 5, 2, 0.25
    played = iris_train.play_test_episodes(agent, run.args, run.device, seed=0)
    assert len(played) == 5 and all(game["return"] == 2 * game["length"] == 2 * len(game["frames"]) for game in played)
    assert all(3 <= game["length"] <= 9 and game["ends"].tolist() == [0] * (game["length"] - 1) + [1] for game in played)
    assert len({game["length"] for game in played}) > 1
    assert sum(seen) == sum(game["length"] for game in played)  # no frame is acted on behind an end


def test_of_a_long_test_game_only_the_first_steps_are_kept_but_all_rewards_count(run):
    played = iris_train.play_test_episodes(run.agent, run.args, run.device, seed=0, keep=2)
    assert all(len(game["frames"]) == 2 and game["length"] >= 3 for game in played)


def test_kept_episodes_are_the_last_ten_and_the_best(tmp_path):
    for i in range(14):
        columns = {"frames": np.zeros((2, 64, 64, 3), np.uint8), "actions": np.zeros(2), "ends": np.zeros(2)}
        iris_train.save_episode(tmp_path, f"step_{i:03d}", columns | {"rewards": np.array([1.0, 10.0 if i == 1 else i / 10])})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.npz", *(f"step_{i:03d}.npz" for i in range(4, 14))]
    best = np.load(tmp_path / "best.npz")
    assert best["return"] == 11 and best["frames"].shape == (2, 64, 64, 3) and best["rewards"].tolist() == [1, 10]


# --- arguments -------------------------------------------------------------------------------------------------------


def test_paper_preset_holds_the_published_schedule():
    args = parse_args([])
    assert args == Args()
    assert (args.epochs, args.collect_epochs * args.collect_steps, args.collect_epsilon) == (600, 100_000, 0.01)
    assert (args.tokenizer_from, args.world_model_from, args.actor_critic_from) == (6, 26, 51)
    assert (args.tokenizer_batch_size, args.world_model_batch_size, args.actor_critic_batch_size) == (256, 64, 64)
    assert (args.gamma, args.lambda_, args.entropy_weight, args.horizon, args.burn_in) == (0.995, 0.95, 0.001, 20, 20)
    assert (args.noop_max, args.max_frames, args.test_noop_max, args.test_max_frames) == (30, 20_000, 1, 108_000)


def test_explicit_flags_override_a_preset_wherever_they_stand():
    laptop = parse_args(["--preset", "laptop"])
    assert laptop.epochs < 600 and laptop.tokenizer.channels != Args().tokenizer.channels
    for argv in (["--epochs", "7", "--preset", "laptop"], ["--preset=laptop", "--epochs=7"]):
        assert parse_args(argv) == Args(**{**vars(laptop), "epochs": 7})


def test_load_agent_reads_a_run_its_checkpoint_and_a_published_one(run, tmp_path):
    import reference

    iris_train.save_checkpoint(run, 0)
    for source in (run.folder, run.folder / "checkpoint.pt"):
        agent, args = load_agent(source)
        assert args == run.args and not agent.training
        assert all(torch.equal(a, b) for a, b in zip(agent.parameters(), run.agent.parameters(), strict=True))
    torch.save(reference.official_state_dict(6), tmp_path / "Pong.pt")
    agent, args = load_agent(tmp_path / "Pong.pt")
    assert args == Args(env_id="PongNoFrameskip-v4") and agent.world_model.num_actions == 6


def test_a_checkpoint_needs_no_trust(run):
    """It loads with weights_only, so it can't bring code along."""
    iris_train.save_checkpoint(run, 0)
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["epoch"] == 0


def test_a_resumed_run_takes_the_learning_rate_of_the_command_line(run):
    iris_train.collect(run)
    iris_train.train_tokenizer(run)
    iris_train.save_checkpoint(run, 1)
    run.lock_file.close()
    again = iris_train.build(parse_args(["--resume", str(run.folder), "--tokenizer-learning-rate", "1e-9"]))
    assert again.optimizers["tokenizer"].param_groups[0]["lr"] == 1e-9
    assert again.optimizers["tokenizer"].state  # and its moments come back
    assert again.optimizers["world_model"].param_groups[0]["weight_decay"] == 0.01


def test_a_tokenizer_with_a_last_epoch_slows_down_towards_it_and_then_rests(run):
    run.args.tokenizer_from, run.args.tokenizer_until, run.args.epochs = 3, 6, 9
    iris_train.collect(run)
    rates = []
    for run.epoch in (2, 3, 4, 5):  # epochs 3 to 6
        iris_train.train_tokenizer(run)
        rates.append(run.optimizers["tokenizer"].param_groups[0]["lr"] / run.args.tokenizer_learning_rate)
    assert rates == [1, 1, 1, 0.5]
    assert list(iris_train.phases(run.args)["tokenizer"][1]) == [3, 4, 5, 6]
    assert list(iris_train.phases(run.args)["encode"][1])[-1] == 9
    run.args.tokenizer_until = 0
    assert list(iris_train.phases(run.args)["tokenizer"][1]) == list(range(3, 10))


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


def test_a_folder_in_which_another_process_trains_is_left_alone(run):
    iris_train.save_checkpoint(run, 0)
    with pytest.raises(IrisError, match="another process is training"):
        iris_train.build(parse_args(["--resume", str(run.folder)]))


def test_steps_that_no_checkpoint_speaks_of_are_not_overwritten(run, tmp_path):
    iris_train.collect(run)
    run.lock_file.close()
    with pytest.raises(IrisError, match="no checkpoint speaks of"):
        iris_train.build(run.args)
    assert (run.folder / "replay/frames.bin").stat().st_size == 25 * 64 * 64 * 3


@pytest.mark.parametrize("key", ["game_start", "agent", "args", "numpy_rng", "optimizers"])
def test_a_checkpoint_of_another_version_is_refused(run, key):
    iris_train.save_checkpoint(run, 0)
    run.lock_file.close()
    path = run.folder / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    if isinstance(content[key], dict):
        content[key].pop(next(iter(content[key])))
    else:
        del content[key]
    torch.save(content, path)
    with pytest.raises(IrisError, match="of this version|of an IRIS run"):
        iris_train.build(parse_args(["--resume", str(run.folder)]))


def test_a_run_older_than_an_argument_has_that_arguments_default(run):
    iris_train.save_checkpoint(run, 0)
    path = run.folder / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    del content["args"]["draw"]
    torch.save(content, path)
    assert run.args.draw == "steps" and iris_train.load_agent(path)[1] == dataclasses.replace(run.args, draw="episodes")


@pytest.mark.parametrize(
    "flags",
    """--noop-max 0; --collect-steps 0; --collect-epochs 0; --test-episodes 0; --test-envs 0; --horizon 1; --burn-in -1;
    --accumulate -1; --seed -1; --max-grad-norm -1; --tokenizer-learning-rate nan; --actor-critic-batch-size 0;
    --world-model.max-blocks 1; --world-model.heads 3; --world-model.heads 0; --world-model.dropout 2;
    --tokenizer.blocks 1 1; --tokenizer.channels 48 48 48 48 48; --tokenizer.vocab-size 0; --tokenizer.channels 8 8 8 8;
    --actor-critic.channels 8 8 8 8 8 8 8; --tokenizer.worst-values 0""".split(";"),
)
def test_numbers_that_no_run_can_have_are_refused_at_the_start(flags, tmp_path):
    with pytest.raises(IrisError) as error:
        iris_train.build(parse_args([*FAST, "--env-id", "Counter-v0", "--run-dir", str(tmp_path), *flags.split()]))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_init_from_takes_over_the_chosen_parts_only(run, tmp_path):
    iris_train.save_checkpoint(run, 0)
    argv = [*FAST, "--env-id", "Counter-v0", "--seed", "2", "--init-from", str(run.folder), "--no-load-world-model"]
    fresh = iris_train.build(parse_args([*argv, "--run-dir", str(tmp_path / "other")])).agent
    for name, same in (("tokenizer", True), ("world_model", False), ("actor_critic", True)):
        pairs = zip(getattr(fresh, name).parameters(), getattr(run.agent, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same
    with pytest.raises(IrisError, match="actor_critic of .* has other sizes"):  # weights for frames seen otherwise
        argv += ["--actor-critic.no-standardize", "--run-dir", str(tmp_path / "third")]
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
