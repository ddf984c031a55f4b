"""The sweep's promises: on a real Ray cluster of two nodes, with real kills."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_command_line import ROOT, assert_one_clear_line, assert_same_run, checkpoint, environment, heard, train
from test_train import FAST

GAMES = ["tests.games:Counter-v0", "tests.catch:Catch-v0"]
SMALL = [*FAST, "--epochs", "12"]
RUNS = [(game, seed) for seed in (1, 2) for game in GAMES]


def folder_of(storage, game, seed):
    return storage / f"{game.replace(':', '-')}__iris__{seed}"


def command(storage, *arguments, games=GAMES, seeds=(1, 2), flags=SMALL):
    options = ["--storage", storage, "--evaluate", 3, "--refresh", 0.5, *arguments]
    words = [sys.executable, "results/reproduce.py", "--games", *games, "--seeds", *seeds, *options, *flags]
    return [str(word) for word in words]


def finish(words, **changes):
    return subprocess.run(words, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=600)


def wait_until(condition, process=None):
    """What the condition returns, once that is true. A sweep that ends before has failed."""
    deadline = time.monotonic() + 300
    while not (value := condition()):
        assert time.monotonic() < deadline and (process is None or process.poll() is None), "it never happened"
        time.sleep(0.02)
    return value


def starts(folder):
    """For each start of the run: node, process, and the epochs that it trained."""
    log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    found = []
    for part in log.split("start on ")[1:]:
        process, threads, node = re.match(r"\S+, process (\d+), (\d+) threads, node (\w+)", part).groups()
        assert threads == "1"
        found.append((node, int(process), [int(epoch) for epoch in re.findall(r"^epoch (\d+)/", part, re.MULTILINE)]))
    return found


def in_its_midst(folder, node=None):
    """The process that trains the run, if it has saved an epoch since it was started (on that node) and goes on."""
    if (begun := starts(folder)) and node in (None, begun[-1][0]) and len(begun[-1][2]) > 1:
        return None if "Done: " in (folder / "log.txt").read_text() else begun[-1][1]


# --- what needs no cluster --------------------------------------------------------------------------------------------
BAD_INPUT = {
    "unknown game": (["--games", "Brekout"], "Atari 100k has no game Brekout: is it Breakout"),
    "unknown id": (["--games", "tests.games:None-v0"], "no environment 'tests.games:None-v0'"),
    "no seeds": (["--seeds"], "--games and --seeds need one or more"),
    "a negative seed": (["--seeds", "1", "-1"], "--seed is -1"),
    "no test games": (["--evaluate", "0"], "--evaluate, .* above 0"),
    "one GPU and a half": (["--gpus-per-run", "1.5"], "neither a share of a GPU nor a whole number"),
    "no storage": (["--storage", "/dev/null/sweep"], "can't write into --storage /dev/null/sweep"),
    "a run's own flag": (["--seed", "3"], "use --seeds, --games and --storage"),
    "no address": (["--address", "cluster"], "--address cluster is not HOST:PORT or auto"),
    "nobody at the address": (["--address", "127.0.0.1:1"], "can't use a Ray cluster at 127.0.0.1:1: .*refused"),
    "numbers no run can have": (["--epochs", "0"], "--epochs is 0"),
    "no flag": (["--speed", "3"], None),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_leaves_nothing(case, tmp_path):
    arguments, message = BAD_INPUT[case]
    words = ["results/reproduce.py", "--games", "Pong", "--storage", str(tmp_path / "sweep"), *arguments]
    result = finish([sys.executable, *words])
    if message:
        assert_one_clear_line(result, message)
    assert result.returncode == 2 and "Traceback" not in result.stderr and not list(tmp_path.iterdir())


def test_without_ray_it_says_what_to_install(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('hidden')")
    result = finish(command(tmp_path / "sweep"), PYTHONPATH=str(tmp_path))
    assert_one_clear_line(result, r"pip install -r results/requirements.txt")
    assert not (tmp_path / "sweep").exists()


def test_a_finished_sweep_needs_no_ray_and_gives_the_table_and_the_figures(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('hidden')")
    storage = tmp_path / "sweep"
    for game, mean in (("Breakout", 10), ("Pong", -20)):
        for seed in (1, 2):
            folder = folder_of(storage, f"{game}NoFrameskip-v4", seed)
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"returns": [mean - 1, mean + seed]}))
    result = finish(command(storage, games=["Breakout", "Pong"]), PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    table = list(csv.DictReader((storage / "scores.csv").open()))
    assert [(row["game"], row["seed"], row["mean_return"]) for row in table] == [
        ("Breakout", "1", "10.00"), ("Breakout", "2", "10.50"), ("Pong", "1", "-20.00"), ("Pong", "2", "-19.50"),
    ]  # fmt: skip
    assert "ours: 2 games, 2 runs each" in result.stdout and "interquartile mean" in result.stdout
    assert (storage / "aggregate.png").stat().st_size > 10_000


def test_a_storage_keeps_its_flags(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"flags": ["--preset", "laptop"], "evaluate": 100}))
    assert_one_clear_line(finish(command(tmp_path)), "holds a sweep with --evaluate 100 --preset laptop: use these")


# --- with Ray ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def marked(monkeypatch, tmp_path):
    """Marks all processes that are started from here on; -> a function that lists those that live."""
    mark = f"IRIS_SWEEP={tmp_path}".encode()
    monkeypatch.setenv("IRIS_SWEEP", str(tmp_path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")

    def alive():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # it has ended, or is another user's
                pass
        return found

    yield alive
    for process in alive():
        os.kill(process, signal.SIGKILL)


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux: finds processes in /proc")


@pytest.mark.slow
@needs_proc
def test_a_sweep_that_loses_a_worker_and_a_node_ends_bit_for_bit_as_runs_without_ray(tmp_path, marked):
    from ray.cluster_utils import Cluster

    storage = tmp_path / "sweep"
    folders = [folder_of(storage, *run) for run in RUNS]
    config = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # so that a lost node is missed soon
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": config})
    log = open(tmp_path / "output.txt", "w")
    process = None
    try:
        other = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        words = command(storage, "--address", cluster.address)
        env = environment(OMP_NUM_THREADS="2")  # a run's threads are the sweep's to set
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

        def run_on(node):
            return next(((x, pid) for x in folders if (pid := in_its_midst(x, node))), None)

        killed, worker = wait_until(lambda: run_on(cluster.head_node.node_id), process)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: len(starts(killed)) == 2, process)
        moved, worker = wait_until(lambda: run_on(other.node_id), process)
        cluster.remove_node(other, allow_graceful=False)
        process.wait(timeout=600)
        output = (tmp_path / "output.txt").read_text()
        assert process.returncode == 0, output
        wait_until(lambda: worker not in marked())
    finally:
        if process:
            process.kill()
            process.wait()
        cluster.shutdown()
        log.close()
    wait_until(lambda: not marked())

    assert sum(len(starts(folder)) for folder in folders) >= 4 + 2
    for folder in folders:
        (_, _, first), *later = starts(folder)
        assert first[0] == 1 and all(epochs[:1] != [1] for _, _, epochs in later)  # resumed, not begun again
    assert len(starts(killed)) > 1 < len(starts(moved)) and starts(moved)[-1][0] != other.node_id
    assert ", start 2:" in output and "4 finished, 0 failed, 0 under way, 0 wait" in output
    for folder, (game, seed) in zip(folders, RUNS):
        alone = tmp_path / f"alone-{seed}-{game}"
        result = train(*SMALL, "--env-id", game, "--seed", seed, "--run-dir", alone, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
        assert checkpoint(folder)["epoch"] == 12
        assert_same_run(folder, alone)
        played = json.loads((folder / "result.json").read_text())
        assert played["env_id"] == game and len(played["returns"]) == 3


@pytest.mark.slow
@needs_proc
def test_a_sweep_stopped_by_ctrl_c_goes_on_with_the_same_command_and_a_run_that_fails_stops_no_other(tmp_path, marked):
    games = [GAMES[0], "tests.games:Faulty-nan-v0"]
    words, log = command(tmp_path / "sweep", games=games, seeds=[1]), open(tmp_path / "output.txt", "w")
    good, bad = (folder_of(tmp_path / "sweep", game, 1) for game in games)
    with heard(signal.SIGINT):
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    wait_until(lambda: in_its_midst(good), process)
    os.killpg(process.pid, signal.SIGINT)  # to all processes of the sweep's group, as a terminal does
    assert process.wait(timeout=120) == 130
    log.close()
    output = (tmp_path / "output.txt").read_text()
    assert "Stopped. Each run keeps its last epoch. Go on with: python results/reproduce.py" in output
    assert "Traceback" not in output
    wait_until(lambda: not marked())
    saved = checkpoint(good)["epoch"]
    assert 1 <= saved < 12 and not (good / "result.json").exists()
    assert f"Stopped in epoch {saved + 1}. Epoch {saved} is saved" in (good / "log.txt").read_text()

    told = output.split("Go on with: python ")[1].split()
    result = finish([sys.executable, *told])
    assert result.returncode == 1 and not result.stderr, result.stderr
    assert [epochs[0] for _, _, epochs in starts(good)] == [1, saved + 1]
    assert re.search(r"Faulty-nan-v0__iris__1 +failed: .*the reward is nan", result.stdout)
    assert "1 of 2 runs are not finished: the same command tries them again" in result.stdout
    before = (good / "log.txt").read_bytes()
    assert finish([sys.executable, *told]).returncode == 1
    assert (good / "log.txt").read_bytes() == before  # what is finished is not begun again
    assert len(starts(bad)) == 3  # once in each sweep: Ray does not start again what failed for good
    wait_until(lambda: not marked())
