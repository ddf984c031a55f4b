"""What a person meets who types `python iris_train.py ...`: real processes, real kills, real files."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import reference
from iris_train import STEP
from test_train import FAST

ROOT = Path(__file__).parent.parent
BREAKOUT = ["--env-id", "BreakoutNoFrameskip-v4", "--collect-epsilon", "0.5"]  # so that a life ends whatever is learned
COUNTER = ["--env-id", "tests.games:Counter-v0"]


def environment(**changes):
    """No network (a proxy that is not there) and no cache, so that no test depends on either."""
    return os.environ | {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": "/nonexistent/torch"} | changes


def train(*arguments, **changes):
    """Runs iris_train.py to its end."""
    return subprocess.run(
        [sys.executable, "iris_train.py", *map(str, arguments)],
        cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def start(*arguments):
    """Starts iris_train.py; its output can be read line by line."""
    return subprocess.Popen(
        [sys.executable, "iris_train.py", *map(str, arguments)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@contextmanager
def heard(number):
    """What is started herein heeds the signal, though nohup or a shell's `&` may have these tests ignore it."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended with {process.wait()} before {text!r}")


def assert_one_clear_line(result, message):
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and re.search(message, errors[0]), result.stderr


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_run(one, other):
    """Two folders hold the same run, bit for bit: weights, optimisers, generators and replay."""
    contents = [checkpoint(folder) for folder in (one, other)]
    for content in contents:
        assert content.pop("args")  # they name the run folder
    assert_same(*contents)
    for file in (one / "replay").iterdir():
        assert file.read_bytes() == (other / "replay" / file.name).read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on Breakout through all phases and two evaluations, never interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = train(*FAST, *BREAKOUT, "--epochs", 4, "--run-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_short_run_leaves_everything_that_the_run_folder_promises(finished):
    folder, result = finished
    for epoch in range(1, 5):
        assert re.search(rf"epoch {epoch}/4  steps {25 * epoch} .* left", result.stdout)
    saved = json.loads((folder / "args.json").read_text())
    assert saved["perceptual_loss"] == "pixel" and saved["collect_steps"] == 25 and saved["versions"]["torch"]
    assert saved["precision"] == "fp32" and saved["device"] == "cpu" and saved["world_model"]["layers"] == 1
    for kind, count in (("test", 2), ("imagination", 2)):
        episodes = sorted((folder / f"media/episodes/{kind}").glob("epoch*.npz"))
        assert len(episodes) == count
        episode = np.load(episodes[-1])
        length = len(episode["frames"])
        assert episode["frames"].shape == (length, 64, 64, 3) and episode["frames"].dtype == np.uint8
        assert len(episode["actions"]) == len(episode["rewards"]) == len(episode["ends"]) == length
        assert episode["return"] == episode["rewards"].sum()
    assert list((folder / "media/episodes/train").glob("step_*_return_*.npz"))
    picture = cv2.imread(str(folder / "media/reconstructions/epoch_0004.png"))
    assert picture.shape == (2 * 66 * 2, 150 + 8 * 66 * 2, 3)  # labels, and 8 frames of twice their size
    assert cv2.imread(str(folder / "media/dreams/epoch_0004.png")).shape == (2 * 66 * 2, 150 + 2 * 66 * 2, 3)
    frames = np.fromfile(folder / "replay/steps.bin", STEP)["frames"]
    assert len(frames) == 100 and frames[:, :14].mean() > 20


def test_tensorboard_file_of_a_short_run_holds_scalars_images_and_arguments(finished):
    folder, _ = finished
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    every_epoch = """
        losses/tokenizer losses/reconstruction_loss losses/codebook_loss losses/commitment_loss losses/tokenizer_grad_norm
        losses/world_model losses/observations_loss losses/rewards_loss losses/ends_loss losses/world_model_grad_norm
        losses/actor_critic losses/policy_loss losses/value_loss losses/entropy_bonus_loss losses/actor_critic_grad_norm
        losses/entropy losses/mean_value losses/mean_lambda_return losses/imagined_reward losses/imagined_end
        charts/epoch charts/SPS charts/codes_in_use
        charts/tokenizer_learning_rate charts/world_model_learning_rate charts/actor_critic_learning_rate""".split()
    every_evaluation = """
        eval/episodic_return eval/episodic_return_std eval/episodic_length eval/reconstruction_loss eval/codebook_loss
        eval/commitment_loss eval/observations_loss eval/rewards_loss eval/ends_loss""".split()
    for tags, steps in ((every_epoch, [25, 50, 75, 100]), (every_evaluation, [50, 100])):
        for tag in tags:
            assert sorted(scalars[tag]) == steps and np.isfinite(list(scalars[tag].values())).all(), tag
    assert scalars["charts/epoch"] == {25: 1, 50: 2, 75: 3, 100: 4}
    for tag in ("reconstructions", "dreams"):
        assert [e.step for e in events.Images(tag)] == [50, 100]
    strip = cv2.imdecode(np.frombuffer(events.Images("dreams")[0].encoded_image_string, np.uint8), 1)
    assert strip.shape == (2 * 66 * 2, 150 + 2 * 66 * 2, 3)  # every other one of 3 frames, of the game and dreamed
    text = events.Tensors("arguments/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"world_model_steps": 2,' in text


def test_a_run_killed_twice_and_resumed_ends_bit_for_bit_as_one_never_interrupted(finished, tmp_path):
    folder, _ = finished
    other = tmp_path / "run"
    process = start(*FAST, *BREAKOUT, "--epochs", 4, "--run-dir", other)
    wait_for(process, "epoch 1/4")
    while (other / "replay/steps.bin").stat().st_size <= 25 * STEP.itemsize:  # in the middle of epoch 2's collection
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and checkpoint(other)["epoch"] == 1

    process = start("--resume", other)
    wait_for(process, "epoch 3/4")
    time.sleep(0.5)  # wherever that is
    process.kill()
    process.wait()

    result = train("--resume", other)
    assert result.returncode == 0 and "Done: 4 epochs, 100 environment steps" in result.stdout, result.stderr
    assert_same_run(folder, other)


@pytest.mark.parametrize(("how", "when"), [(signal.SIGINT, "epoch 2/500"), (signal.SIGTERM, "Run folder")])
def test_an_interrupted_run_says_what_is_saved_and_how_to_go_on(tmp_path, how, when):
    folder = tmp_path / "run"
    with heard(how):
        process = start(*FAST, *COUNTER, "--epochs", 500, "--run-dir", folder)
    wait_for(process, when)
    if when == "Run folder":  # in the midst of the first epoch
        while not (folder / "replay/steps.bin").stat().st_size:
            time.sleep(0.001)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output
    stopped, saved = map(int, re.search(r"Stopped in epoch (\d+). Epoch (\d+) is saved", output).groups())
    assert stopped == saved + 1
    assert checkpoint(folder)["epoch"] == saved
    command = re.search(r"python iris_train.py (--resume \S+)", output)[1].split()
    result = train(*command, "--epochs", saved + 1)
    assert result.returncode == 0 and f"epoch {saved + 1}/{saved + 1}" in result.stdout


def test_a_full_disk_while_saving_is_one_clear_line_and_the_last_checkpoint_survives(finished, tmp_path):
    folder = tmp_path / "run"
    assert train(*FAST, *COUNTER, "--epochs", 1, "--run-dir", folder).returncode == 0
    before = (folder / "checkpoint.pt").read_bytes()
    (folder / ".checkpoint.pt.tmp").symlink_to("/dev/full")
    assert_one_clear_line(train("--resume", folder, "--epochs", 2), "can't write into the run folder: No space left on device. Epoch 1 is saved")
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not os.path.lexists(folder / ".checkpoint.pt.tmp")  # what was written so far would only fill the disk
    assert train("--resume", folder, "--epochs", 2).returncode == 0
    assert checkpoint(folder)["epoch"] == 2


@pytest.mark.parametrize("kilobytes", [1, 20])
def test_a_disk_that_is_full_from_the_start_is_one_clear_line_too(tmp_path, kilobytes):
    """The system's limit on a file's size fails a write in the middle, as a full disk does."""
    command = [sys.executable, "iris_train.py", *FAST, *COUNTER, "--run-dir", str(tmp_path / "run")]
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f {kilobytes}; exec \"$@\"", "bash", *command],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert_one_clear_line(result, "can't write into the run folder: File too large. (Nothing was|Epoch 0 is) saved")


def test_a_loss_that_explodes_stops_the_run_by_name_and_keeps_the_last_checkpoint(tmp_path):
    folder = tmp_path / "run"
    result = train(
        *FAST, *COUNTER, "--epochs", 3, "--run-dir", folder, "--world-model-from", 2, "--world-model-learning-rate", 1e30
    )
    assert_one_clear_line(result, r"error: \w+ is not finite at step 2 of the world_model.*Epoch 1 is saved")
    content = checkpoint(folder)
    assert content["epoch"] == 1 and all(w.isfinite().all() for w in content["agent"].values() if w.is_floating_point())


@pytest.fixture(scope="module")
def foreign_files(tmp_path_factory, finished):
    folder = tmp_path_factory.mktemp("files")
    whole = (finished[0] / "checkpoint.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("hello")
    torch.save({"some": torch.zeros(1)}, folder / "other.pt")
    torch.save(reference.official_state_dict(6), folder / "Pong.pt")
    return folder


BAD_INPUT = {
    "unknown env id": (["--env-id", "BreakoutNoFrameskp-v4"], "Did you mean: `BreakoutNoFrameskip`"),
    "actions not discrete": (["--env-id", "tests.games:Continuous-v0"], "needs Discrete"),
    "observation no image": (["--env-id", "tests.games:Vector-v0"], "needs .* uint8 images: wrap it"),
    "a game that fails": ([*FAST, "--env-id", "tests.games:Faulty-exit-v0"], "Faulty-exit-v0 failed .* Epoch 0 is saved; go on"),
    "no checkpoint": (["--init-from", "FILES/none.pt"], "no checkpoint can be read at"),
    "truncated checkpoint": (["--init-from", "FILES/cut.pt"], "it is damaged, or another kind of file"),
    "no checkpoint at all": (["--init-from", "FILES/text.pt"], "no checkpoint can be read .*another kind of file"),
    "foreign checkpoint": (["--init-from", "FILES/other.pt"], "is no checkpoint of an IRIS run of this version, and not a published one"),
    "other actions": (["--init-from", "FILES/Pong.pt"], "can.t take the world_model of .*Pong.pt: see --init-models"),
    "nothing to resume": (["--resume", "FILES/nowhere"], "no checkpoint can be read at"),
    "resume of another game": (["--resume", "RUN", "--env-id", "PongNoFrameskip-v4"], "env_id Breakout.*not Pong"),
    "resume elsewhere": (["--resume", "RUN", "--run-dir", "/tmp/x"], "is a run with run_dir .*, not /tmp/x: leave that out"),
    "resume with other sizes": (["--resume", "RUN", "--world-model.layers", "3"], "is a run with world_model"),
    "a run already there": (["--run-dir", "RUN"], "holds a run already"),
    "unwritable run folder": (["--run-dir", "/dev/null/run"], "can't use the run folder /dev/null/run: Not a directory"),
    "no such device": (["--device", "quantum"], "--device quantum is not available here"),
    "lpips insisted on": (["--perceptual-loss", "lpips"], "vgg16-397923af.pth .* and lpips_v0.1_vgg.pth"),
    "no compiler": (["--device", "cpu", "--compile"], "install g\\+\\+"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, finished, foreign_files, tmp_path):
    arguments, message = BAD_INPUT[case]
    before = (finished[0] / "checkpoint.pt").read_bytes()
    arguments = [a.replace("FILES", str(foreign_files)).replace("RUN", str(finished[0])) for a in arguments]
    if "--resume" not in arguments:
        arguments = ["--env-id", "BreakoutNoFrameskip-v4", "--run-dir", str(tmp_path / "run"), "--epochs", "1", *arguments]
        if "--perceptual-loss" not in arguments:
            arguments += ["--perceptual-loss", "pixel"]
    changes = {"PATH": str(tmp_path), "CXX": ""} if case == "no compiler" else {}  # hides an installed one
    assert_one_clear_line(train(*arguments, **changes), message)
    assert (finished[0] / "checkpoint.pt").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent_is_one_clear_line():
    assert_one_clear_line(train("--device", "cuda"), "--device cuda is not available here")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU: install g++")
def test_a_run_with_compile_learns_the_same_as_one_without(tmp_path):
    returns = []
    for flags in ([], ["--compile"]):
        folder = tmp_path / f"run{len(flags)}"
        result = train(*FAST, *COUNTER, "--epochs", 3, "--run-dir", folder, *flags)
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if line.startswith("epoch")]
        returns.append([re.sub(r"  \d+ s  .*", "", line) for line in lines])  # without the times
    assert returns[0] == returns[1] and "imagined reward" in returns[0][-1]


def test_a_game_that_does_not_repeat_itself_cannot_be_resumed_and_says_so(tmp_path):
    folder = tmp_path / "run"
    arguments = [*FAST, "--env-id", "tests.games:Forgetful-v0", "--run-dir", folder, "--epochs", 1]
    assert train(*arguments, "--collect-steps", 1).returncode == 0  # 1 step: it stops in mid-episode
    assert_one_clear_line(train("--resume", folder, "--epochs", 2), "does not repeat a game from its seed")


def test_without_weight_files_and_network_auto_warns_once_and_says_pixel_in_args_json(tmp_path):
    folder = tmp_path / "run"
    result = train(*FAST, *COUNTER, "--epochs", 1, "--perceptual-loss", "auto", "--run-dir", folder)
    assert result.returncode == 0 and len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("warning: ") and "lpips_v0.1_vgg.pth" in result.stderr
    assert json.loads((folder / "args.json").read_text())["perceptual_loss"] == "pixel"
    resumed = train("--resume", folder, "--epochs", 2)
    assert resumed.returncode == 0 and not resumed.stderr  # it keeps what it used, and asks no more


def test_paper_sizes_go_through_every_phase_on_a_cpu_and_warn_of_the_wait(tmp_path):
    folder = tmp_path / "run"
    one = [f"--{name}-{what}" for name in ("tokenizer", "world-model", "actor-critic") for what in ("from", "steps", "batch-size")]
    result = train(
        *BREAKOUT, "--preset", "paper", "--epochs", 1, "--run-dir", folder, "--perceptual-loss", "pixel",
        "--collect-steps", 5, *(word for flag in one for word in (flag, 1)),
        "--eval-every", 1, "--test-episodes", 1, "--test-max-frames", 60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.search(r"--preset paper in \S+ on cpu \(laptop an hour, paper weeks\)", result.stdout)
    assert "Done: 1 epochs, 5 environment steps" in result.stdout
    sizes = {name: 0 for name in ("tokenizer", "world_model", "actor_critic")}
    for name, weight in checkpoint(folder)["agent"].items():
        if not name.endswith((".unused_for", ".mean", ".std")):
            sizes[name.split(".")[0]] += weight.numel()
    assert sizes == {"tokenizer": 4_027_523, "world_model": 8_447_493, "actor_critic": 3_217_957}


LESSONS = {  # what is said at the end, what has to be true of the numbers in it, and rows and columns of the picture
    "iris_tokenizer.py": (r"decoded: (0\.\d+); .* be (0\.\d+)", lambda error, dull: error < 0.15 * dull, (3, 12)),
    "iris_world_model.py": (
        r"frame (\d+)%, the paddle (\d+)%, the reward (\d+)%, where it is 1 (\d+)%",  # a dull model: 81% and 0%
        lambda ball, paddle, reward, caught: ball > 80 and paddle > 40 and reward > 70 and caught > 30, (4, 7),
    ),
    "iris_agent.py": (
        r"with warm_up: (-?\d\.\d+) .*without warm_up: (-?\d\.\d+)",  # without memory, -0.5 is the best
        lambda memory, none: memory > 0.8 > -0.2 > none, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("lesson", LESSONS)
def test_each_chapter_runs_alone_and_shows_what_was_learned(lesson, tmp_path):
    pattern, learned, shape = LESSONS[lesson]
    result = subprocess.run(
        [sys.executable, ROOT / lesson], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    assert learned(*map(float, re.search(pattern, result.stdout, re.DOTALL).groups())), result.stdout
    if shape:
        picture = cv2.imread(str(tmp_path / re.search(r"Picture: (runs/lessons/\w+\.png)", result.stdout)[1]))
        assert picture.shape == (shape[0] * 66 * 2, 150 + shape[1] * 66 * 2, 3) and picture.std() > 20
