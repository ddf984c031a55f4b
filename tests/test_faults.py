"""Fault injection: real processes that are killed at random and at named moments, and a table of bad inputs.

Run it alone:   pytest tests/test_faults.py -m slow

A fork server imports the programs once; each process is a fork of it that runs a program's file as `__main__`.
"""
import functools
import itertools
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import reference
from iris_train import STEP
from test_command_line import BREAKOUT, COUNTER, ROOT, assert_same_run, checkpoint, environment
from test_train import FAST

pytestmark = pytest.mark.slow


# --- Processes --------------------------------------------------------------------------------------------------------
def program(name: str, argv: list[str], folder: str, killed_at: tuple | None, changes: dict, limit: int) -> None:
    """In a process of its own: runs a program in a folder. It is killed in the n-th call of a function, before it or
    after it; its files may have `limit` bytes."""
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if killed_at:
        place, wanted, before = killed_at
        name_of_module, _, attributes = place.partition(":")  # "module:Class.method" or "module:function"
        *owners, attribute = attributes.split(".")
        owner = functools.reduce(getattr, owners, import_module(name_of_module))
        original, calls = getattr(owner, attribute), itertools.count(1)

        def deadly(*arguments, **options):
            number = next(calls)
            if number == wanted and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **options)
            if number == wanted:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, attribute, deadly)
    os.environ |= changes
    os.chdir(f"{folder}/cwd")
    sys.path.insert(0, str(ROOT))
    sys.argv = [name, *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Runner:
    """Starts programs; each has a folder with its output and an empty working directory."""

    def __init__(self, folder: Path):
        self.context, self.folder, self.count = multiprocessing.get_context("forkserver"), folder, itertools.count()
        self.context.set_forkserver_preload(["iris_play", "test_faults"])
        # The environment is the server's, and so its forks', not that of other tests.
        with mock.patch.dict(os.environ, environment(PYTHONPATH=f"{ROOT}:{ROOT}/tests", OMP_NUM_THREADS="1")):
            forkserver.ensure_running()

    def start(self, name: str, *argv, killed_at=None, changes={}, limit=0):
        folder = self.folder / f"process{next(self.count)}"
        (folder / "cwd").mkdir(parents=True)
        arguments = name, [*map(str, argv)], str(folder), killed_at, changes, limit
        process = self.context.Process(target=program, args=arguments)
        process.start()
        process.folder = folder
        return process

    def run(self, *arguments, seconds: float = 300, **options) -> tuple[int, str, str, Path]:
        """Exit code (negative: killed by that signal), output, errors, working directory."""
        process = self.start(*arguments, **options)
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, err = ((process.folder / kind).read_text() for kind in ("out", "err"))
        return process.exitcode, out, err, process.folder / "cwd"


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("processes"))


# --- Kills ------------------------------------------------------------------------------------------------------------
MOMENTS = {  # what is going on -> the function in whose n-th call the process is killed
    "a file is written, not yet on disk": ("os:fsync", (2, 3, 5)),
    "a checkpoint or an episode is renamed": ("pathlib:Path.replace", (1, 2, 4)),
    "old episodes are deleted": ("pathlib:Path.unlink", (1, 3)),
    "a picture is written": ("cv2:imwrite", (1, 2)),
    "test games are played": ("gymnasium.vector:SyncVectorEnv.step", (1, 3)),
    "a game is played, or repeated on resuming": ("tests.games:Counter.step", (1, 17, 40)),
    "a model is trained": ("torch.optim:Optimizer.zero_grad", (1, 5)),
    "TensorBoard is written": ("torch.utils.tensorboard:SummaryWriter.flush", (1, 2)),
}  # fmt: skip


@pytest.fixture
def say(capsys):
    """Prints the counts, though pytest keeps what tests print."""

    def print_it(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)

    return print_it


@pytest.mark.parametrize("game", ["Counter", "Breakout"])
def test_runs_killed_at_named_and_random_moments_end_bit_for_bit_as_one_never_interrupted(runner, tmp_path, game, say):
    arguments = [*FAST, *(COUNTER if game == "Counter" else BREAKOUT), "--epochs", 4, "--seed", 3]
    began = time.perf_counter()
    assert runner.run("iris_train.py", *arguments, "--run-dir", tmp_path / "whole")[0] == 0
    seconds, rng, kills, folder = time.perf_counter() - began, np.random.default_rng(0), 0, tmp_path / "killed"
    places = [(place, n, before) for place, ns in MOMENTS.values() for n in ns for before in (True, False)]
    if game == "Breakout":
        places = [(place.replace("tests.games:Counter", "ale_py.env:AtariEnv"), n, b) for place, n, b in places[::5]]

    def go_on() -> list:
        """Arguments to go on with what is on disk."""
        begun = (folder / "checkpoint.pt").exists()
        return ["--resume", folder] if begun else [*arguments, "--run-dir", folder]

    for place in places:
        code, out, err, _ = runner.run("iris_train.py", *go_on(), killed_at=place)
        assert code in (0, -signal.SIGKILL), err
        kills += code == -signal.SIGKILL
        if code == 0:  # it was done: begin another
            assert_equal_runs(tmp_path / "whole", folder)
            shutil.rmtree(folder)
    for _ in range(8 if game == "Counter" else 4):
        process = runner.start("iris_train.py", *go_on())
        process.join(rng.uniform(0.1, 1.0) * seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert_equal_runs(tmp_path / "whole", folder)
            shutil.rmtree(folder)
    if not (folder / "checkpoint.pt").exists() or checkpoint(folder)["epoch"] < 4:
        code, out, err, _ = runner.run("iris_train.py", *go_on())
        assert code == 0, err
    assert_equal_runs(tmp_path / "whole", folder)
    assert kills >= (36 if game == "Counter" else 6)
    say(f"{game}: {kills} kills, weights, optimisers, generators and replay bit for bit as without")


def assert_equal_runs(one: Path, other: Path) -> None:
    assert_same_run(one, other)
    assert not [*one.rglob("*.tmp"), *other.rglob("*.tmp")]  # a killed process leaves some, which are written anew
    names = [sorted(path.name for path in (folder / "media").rglob("*.png")) for folder in (one, other)]
    assert names[0] == names[1]
    for path in (one / "media/episodes").rglob("*.npz"):
        with np.load(path) as a, np.load(other / path.relative_to(one)) as b:
            assert all(np.array_equal(a[key], b[key]) for key in a)


# --- Bad inputs -------------------------------------------------------------------------------------------------------
NUMBERS = """
    --seed -1; --seed 99999999999999999999999; --epochs 0; --epochs -3; --epochs 1000000000000; --collect-epochs 0;
    --collect-steps 0; --collect-steps -5; --collect-epsilon -0.1; --collect-epsilon 5; --collect-epsilon nan;
    --collect-temperature -1; --collect-temperature inf; --collect-hold 0; --noop-max 0; --max-frames 0;
    --max-frames -1; --tokenizer-from 0; --tokenizer-until -1; --tokenizer-steps 0; --tokenizer-batch-size 0;
    --tokenizer-batch-size 100000000; --tokenizer-learning-rate -1; --tokenizer-learning-rate nan; --world-model-from 0;
    --world-model-steps 0; --world-model-batch-size 0; --world-model-batch-size 100000000;
    --world-model-learning-rate inf; --actor-critic-from 0; --actor-critic-steps -1;
    --actor-critic-batch-size 0; --actor-critic-batch-size 100000000; --actor-critic-learning-rate nan; --burn-in -1;
    --burn-in 1000000; --horizon 1; --horizon 0; --horizon 1000000000; --gamma 2; --gamma -0.5; --gamma nan; --lambda 5;
    --lambda -1; --entropy-weight -1; --entropy-weight inf; --max-grad-norm 0; --max-grad-norm nan; --accumulate 0;
    --eval-every -1; --test-episodes 0; --test-envs 0; --test-envs 5000; --test-temperature -1; --test-max-frames 0;
    --tokenizer.vocab-size 0; --tokenizer.vocab-size 100000000000; --tokenizer.code-dim 0; --tokenizer.channels;
    --tokenizer.channels 8 8 8 8; --tokenizer.channels 8 0 8 8 8; --tokenizer.channels 48 48 48 48 48;
    --tokenizer.no-local --tokenizer.blocks 1 1; --actor-critic.patch 3; --actor-critic.patch 16;
    --tokenizer.blocks 0 -1 0 0 0; --tokenizer.commitment-weight nan;
    --tokenizer.pixel-commitment-weight -1; --tokenizer.worst-values 0; --tokenizer.worst-values 12289;
    --tokenizer.revive-after 0; --world-model.tokens-per-frame 15; --world-model.max-blocks 1; --world-model.layers 0;
    --world-model.layers -1; --world-model.layers 1000000; --world-model.heads 0; --world-model.heads 3;
    --world-model.width 0; --world-model.width 10000000; --world-model.dropout 1; --world-model.dropout -0.1;
    --actor-critic.channels; --actor-critic.channels 8 8 8 8 8 8 8; --actor-critic.channels 8 -8;
    --actor-critic.lstm-width 0; --actor-critic.lstm-width 10000000; --init-models
"""
TRAIN = {  # what is wrong -> arguments, and what the line says
    "unknown game": ("--env-id BreakotNoFrameskip-v4", "Did you mean"),
    "empty game": ("--env-id=", "no environment ''"),
    "no such module": ("--env-id nowhere:Game-v0", "No module named"),
    "actions not discrete": ("--env-id tests.games:Continuous-v0", "needs Discrete"),
    "no image": ("--env-id tests.games:Vector-v0", "uint8 images"),
    "a game that breaks": ("--env-id tests.games:Broken-v0", "ZeroDivisionError"),
    **{f"a game's {fault}": (f"{{fast}} --env-id tests.games:Faulty-{fault}-v0", f"Faulty-{fault}-v0 failed in step")
       for fault in ("nan", "1e300", "word", "none", "floats", "shape", "four", "error", "exit")},
    "no such device": ("--device quantum", "--device quantum is not available"),
    "a device without memory": ("--device meta", "--device meta is not available"),
    "no weights": ("--perceptual-loss lpips", "lpips_v0.1_vgg.pth"),
    "a long name": (f"--run-dir {'x' * 300}", "File name too long"),
    "a file as folder": ("--run-dir {text}/run", "Not a directory"),
    "no permission": ("--run-dir /proc/run", "can't use the run folder"),
    "a run is there": ("--run-dir {run}", "holds a run already"),
    "nothing to resume": ("--resume {nowhere}", "No such file"),
    "a folder without a run": ("--resume {folder}", "No such file"),
    "half a checkpoint": ("--resume {half}", "damaged"),
    "zeroed bytes": ("--resume {zeroed}", "damaged"),
    "an empty checkpoint": ("--resume {empty}", "damaged"),
    "a text": ("--resume {text}", "another kind of file"),
    "another version": ("--resume {version}", "of an IRIS run of this version"),
    "a published one": ("--resume {published}", "start another with --init-from"),
    "a model without a replay": ("--resume {models}/catch.pt", "start another with --init-from"),
    "no length": ("--resume {length0}", "is another run's, or damaged"),
    "a negative length": ("--resume {length-5}", "is another run's, or damaged"),
    "a greater length": ("--resume {length999}", "is another run's, or damaged"),
    "a string as length": ("--resume {lengthten}", "is another run's, or damaged"),
    "a string as seed": ("--resume {seedone}", "has to be of type int"),
    "actions out of range": ("--resume {actions}", "is another run's, or damaged"),
    "half a replay": ("--resume {halfreplay}", "is another run's, or damaged"),
    "another game": ("--resume {run} --env-id PongNoFrameskip-v4", "is a run with env_id"),
    "another seed": ("--resume {run} --seed 77", "is a run with seed"),
    "another size": ("--resume {run} --world-model.layers 3", "is a run with world_model"),
    "another preset": ("--resume {run} --preset catch", "is a run with preset"),
    "a number on resuming": ("--resume {run} --gamma 3", "--gamma is 3.0"),
    "weights of another game": ("--init-from {published}", "can't take the world_model"),
    "weights of a text": ("--init-from {text}", "another kind of file"),
    "weights from nowhere": ("--init-from {nowhere}", "No such file"),
}  # fmt: skip
PLAY = {
    "no checkpoint": ("--checkpoint {nowhere}", "no checkpoint can be read"),
    "no run": ("--run-dir {folder}", "no checkpoint can be read"),
    "a text as checkpoint": ("--checkpoint {text}", "another kind of file"),
    "half of one": ("--run-dir {half} --evaluate 1", "damaged"),
    "zeroes in one": ("--run-dir {zeroed} --world-model", "damaged"),
    "a string in one": ("--run-dir {seedone}", "has to be of type int"),
    "the wrong game": ("--checkpoint {published} --env-id BreakoutNoFrameskip-v4 --evaluate 1", "actions"),
    "an unknown game": ("--human --env-id Brekout-v4", "no environment"),
    "no published game": ("--pretrained Brekout", "no environment"),
    "no network": ("--pretrained Breakout", "can't fetch it"),
    "no recorded episodes": ("--run-dir {bare} --episodes --steps 1", "no recorded episodes"),
    "a video of another kind": ("--run-dir {run} --video x.avi", "has to end in"),
    "a video nowhere": ("--run-dir {run} --video /proc/x.webm --steps 1", "can't write"),
    "a long GIF": ("--run-dir {run} --video x.gif --steps 5000", "use .webm"),
    "a person in a video": ("--run-dir {run} --video x.webm --human", "--video shows the agent"),
    "an agent without its dream": ("--run-dir {run} --agent", "--agent needs --world-model"),
    "json without games": ("--run-dir {run} --json x.json", "--json needs --evaluate"),
    "json into a folder": ("--run-dir {run} --evaluate 1 --json {folder}", "and no folder"),
    "json nowhere": ("--run-dir {run} --evaluate 1 --json /proc/x.json", "can't write"),
    "no host": ("--run-dir {run} --host=", "--host is empty"),
    "a foreign host": ("--run-dir {run} --host 192.0.2.1", "can't serve at"),
    "a port too high": ("--run-dir {run} --port 99999", "can't serve at"),
    "a port too low": ("--run-dir {run} --port -1", "negative"),
    "no speed": ("--run-dir {run} --fps 0", "--fps"),
    "a negative seed": ("--run-dir {run} --seed -1", "negative"),
    "a negative temperature": ("--run-dir {run} --temperature -1", "negative"),
    "games below zero": ("--run-dir {run} --evaluate -3", "negative"),
    "steps below zero": ("--run-dir {run} --steps -3", "negative"),
    "no such device": ("--run-dir {run} --device quantum", "--device quantum is not available"),
}


@pytest.fixture(scope="module")
def files(runner, tmp_path_factory):
    """Good and bad files, by the names in the tables."""
    folder = tmp_path_factory.mktemp("files")
    assert runner.run("iris_train.py", *FAST, *COUNTER, "--epochs", 2, "--run-dir", folder / "run")[0] == 0
    whole = (folder / "run/checkpoint.pt").read_bytes()
    middle = len(whole) // 2
    damage = {"half": whole[:middle], "zeroed": whole[:middle] + bytes(400) + whole[middle + 400 :], "empty": b""}
    changes = {"version": {"format": 999}, "length0": {"replay_length": 0}, "length-5": {"replay_length": -5},
               "length999": {"replay_length": 999}, "lengthten": {"replay_length": "ten"}}  # fmt: skip
    for name in [*damage, *changes, "seedone", "actions", "halfreplay", "bare"]:
        shutil.copytree(folder / "run", folder / name)
        if name in damage:
            (folder / name / "checkpoint.pt").write_bytes(damage[name])
        else:
            content = torch.load(folder / name / "checkpoint.pt", weights_only=True)
            content |= changes.get(name, {})
            content["args"]["seed"] = "one" if name == "seedone" else content["args"]["seed"]
            torch.save(content, folder / name / "checkpoint.pt")
    steps = np.memmap(folder / "actions/replay/steps.bin", STEP)
    steps["actions"][7] = 55
    steps.flush()
    os.truncate(folder / "halfreplay/replay/steps.bin", STEP.itemsize * 9)
    shutil.rmtree(folder / "bare/media")
    (folder / "text").write_text("hello")
    (folder / "folder").mkdir()
    torch.save(reference.official_state_dict(6), folder / "Pong.pt")
    return {path.name: path for path in folder.iterdir()} | {
        "nowhere": folder / "nowhere", "published": folder / "Pong.pt", "models": ROOT / "results/models",
        "fast": " ".join(FAST),
    }  # fmt: skip


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing_behind(runner, files, say):
    cases = {f"train {flags}": ("iris_train.py", flags, f"error: {flags.split()[0]}|error: no model|error: such models")
             for flags in map(str.strip, NUMBERS.split(";"))}  # fmt: skip
    cases |= {name: ("iris_train.py", *case) for name, case in TRAIN.items()}
    cases |= {f"play, {name}": ("iris_play.py", *case) for name, case in PLAY.items()}
    before, wrong, models = snapshot(files["run"].parent), [], snapshot(files["models"])
    for name, (file, flags, said) in cases.items():
        argv = flags.format(**files).split()
        if file == "iris_train.py" and "--resume" not in flags:
            argv = ["--perceptual-loss", "pixel", *argv] if "lpips" not in flags else argv
            argv = [*COUNTER, *argv] if "--env-id" not in flags and "published" not in flags else argv
        code, out, err, cwd = runner.run(file, *argv, seconds=60)
        lines = [line for line in err.splitlines() if line.strip()]
        fits = len(lines) == 1 and lines[0].startswith("error: ") and any(part in lines[0] for part in said.split("|"))
        left = [path.name for path in cwd.rglob("*") if path.is_file() and "failed in step" not in said]
        if code != 2 or not fits or left:
            wrong.append(f"{name}: exit code {code}, left {left}, {err[-300:]!r}")
    assert not wrong, "\n".join(wrong)
    assert snapshot(files["run"].parent) == before and snapshot(files["models"]) == models
    assert len(cases) >= 100
    say(f"{len(cases)} bad inputs: exit code 2 and one line on stderr, nothing left behind")


def test_a_disk_that_is_full_at_any_size_is_one_line_and_loses_nothing(runner, tmp_path, say):
    folder, sizes = tmp_path / "run", (5_000, 100_000, 400_000)
    for size in sizes:
        arguments = [*FAST, *COUNTER, "--epochs", 2, "--run-dir", tmp_path / str(size)]
        code, _, err, _ = runner.run("iris_train.py", *arguments, limit=size)
        assert code == 2 and len(err.strip().splitlines()) == 1 and "File too large" in err and "saved" in err, err
    assert runner.run("iris_train.py", *FAST, *COUNTER, "--epochs", 1, "--run-dir", folder)[0] == 0
    before = (folder / "checkpoint.pt").read_bytes()
    code, _, err, _ = runner.run("iris_train.py", "--resume", folder, "--epochs", 2, limit=len(before) // 2)
    assert code == 2 and "Epoch 1 is saved" in err and (folder / "checkpoint.pt").read_bytes() == before
    assert runner.run("iris_train.py", "--resume", folder, "--epochs", 2)[0] == 0
    say(f"{len(sizes) + 1} full disks: one line, what was saved is whole")


def test_a_temporary_folder_that_is_full_or_missing_does_not_matter(runner, tmp_path):
    changes = {"TMPDIR": "/nonexistent", "TEMP": "/nonexistent", "TMP": "/nonexistent"}
    arguments = [*FAST, *COUNTER, "--epochs", 2, "--run-dir", tmp_path / "run"]
    code, _, err, _ = runner.run("iris_train.py", *arguments, changes=changes)
    assert code == 0 and json.loads((tmp_path / "run/args.json").read_text())["epochs"] == 2, err
