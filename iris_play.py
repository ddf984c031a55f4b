"""Chapter 5 of IRIS: step into the dream, and watch what was learned.

A world model that predicts its next tokens well is a game that can be played. Here a person takes the policy's place:
keys become actions, the transformer answers with the tokens of the next frame, the decoder paints them, and nothing of
the real game is left but its first frame. The same loop shows the agent at work, replays what a run has kept, and
with `--evaluate` measures a policy as the paper does.

    controller --- action ---> world --- picture ---> screen
    a person: keys             the game               a window
    the agent: policy          the dream (chapter 2)  a page in the browser
      ^   ^                    a recorded episode     a video file
      |   +----- frame, reward, end ----+                  |
      +------------------------ keys ----------------------+      all in one loop, play(), that knows none by name

Run it:   python iris_play.py                            # the agent of the newest run plays the real game
          python iris_play.py --world-model              # you play in its dream; `--agent`: it plays there itself
          python iris_play.py --world-model --web        # the same in the browser, for a machine without a screen
          python iris_play.py --pretrained Breakout --evaluate 100
          python iris_play.py --help                     # all modes; the keys are printed at the start
Read it:  arguments, worlds, controllers, screens, the loop, then evaluation and `main`.
"""
import base64
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Callable

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor

import iris_train
from iris_agent import Agent, sample
from iris_train import (
    IrisError, checkpoint_path, choose_device, load_agent, make_env, play_test_episodes, to_model, to_stored,
    write_file,
)  # fmt: skip
from iris_world_model import Dream

PRETRAINED_URL = "https://huggingface.co/eloialonso/iris/resolve/main/pretrained_models/{}.pt"
NO_DISPLAY = "there is no display here: choose --web (a page in the browser) or --video FILE"

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """Plays with a trained IRIS agent. Without further arguments the newest run's agent plays its game."""

    checkpoint: str = ""  # Checkpoint of a run, or a published one, whose file is named after the game (Breakout.pt)
    run_dir: str = ""  # Folder of a run; with neither of them, the newest under runs/
    pretrained: str = ""  # A game, as in Breakout, whose published agent is fetched into torch.hub's cache
    env_id: str = ""  # The game, where it is not the one that the checkpoint names

    human: bool = False  # You play the real game
    world_model: bool = False  # You play in the dream
    agent: bool = False  # With world_model: the agent plays in the dream
    reconstruction: bool = False  # Three panels: the game, the same at 64x64, and what the agent sees
    episodes: bool = False  # Replays the run's recorded episodes
    evaluate: int = 0  # Plays so many whole test episodes and prints their statistics

    web: bool = False  # Show it in the browser, not in a window
    host: str = "127.0.0.1"  # With web: address to serve at; any but this one lets others on your network play
    port: int = 8765  # With web: port to serve at; 0 takes a free one
    video: str = ""  # Show nothing, write this .mp4, .gif or .webp: one episode, or --steps
    steps: int = 0  # Stop after so many steps; of a dream, .gif or .webp a video is 1,000 if nothing is said

    fps: float = 15.0  # Steps a second; 15 is an Atari's own speed
    header: bool = False  # Write step, action, reward, return, value and policy under the picture; the page always does
    save: bool = False  # Ask after each episode whether to keep it
    seed: int = 1  # Seed of the game, the policy and the dream
    temperature: float = 0.5  # Of the policy; 0 is always its likeliest action, inf plays at random
    json: str = ""  # With evaluate: file to keep the result in
    device: str = "auto"  # cuda, cpu, ...; auto takes a GPU where there is one


def check(args: Args) -> None:
    """Raises IrisError for arguments that don't go together, before anything is loaded."""
    given = {name for name, value in vars(args).items() if value not in (False, 0, "")}

    def flags(names) -> str:
        return " and ".join(f"--{name.replace('_', '-')}" for name in names)

    for names in (
        ("checkpoint", "run_dir", "pretrained"), ("human", "world_model", "episodes", "evaluate"), ("web", "video"),
        ("human", "agent"), ("human", "video"), ("episodes", "save"), ("video", "save"),
        ("reconstruction", "world_model"), ("evaluate", "web"), ("evaluate", "video"), ("evaluate", "save"),
        ("evaluate", "steps"), ("evaluate", "reconstruction"),
    ):  # fmt: skip
        if len(both := [name for name in names if name in given]) > 1:
            raise IrisError(f"{flags(both)} don't go together: leave one out")
    for name, needed in (("json", "evaluate"), ("agent", "world_model")):
        if name in given and needed not in given:
            raise IrisError(f"{flags([name])} needs {flags([needed])}")
    for name, valid in (
        ("fps", 0.5 <= args.fps <= 1000), ("temperature", args.temperature >= 0), ("evaluate", args.evaluate >= 0),
        ("steps", args.steps >= 0), ("seed", 0 <= args.seed < 2**31), ("port", 0 <= args.port < 2**16),
    ):  # fmt: skip
        if not valid:
            raise IrisError(f"--{name} {getattr(args, name)} is out of range")
    if args.video and Path(args.video).suffix not in (".mp4", ".gif", ".webp"):
        raise IrisError(f"--video {args.video}: its name has to end in .mp4, .gif or .webp")
    if args.video.endswith((".gif", ".webp")) and (args.steps > 1000 or args.fps > 50):
        raise IrisError("a .gif or .webp has at most 1,000 steps, and 50 a second: write an .mp4")


def find_checkpoint(args: Args) -> Path:
    """The checkpoint that the arguments speak of. Raises IrisError if there is none."""
    if args.pretrained:
        make_env(f"{args.pretrained}NoFrameskip-v4").close()  # says what was meant if there is no such game
        path = Path(torch.hub.get_dir()) / "checkpoints" / "iris" / f"{args.pretrained}.pt"
        url = PRETRAINED_URL.format(args.pretrained)
        try:
            if not path.exists():
                print(f"Fetching {url}", flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            where = f"put {path.name} (from {url}) into {path.parent}"
            raise IrisError(f"can't fetch the agent ({error}): {where}") from error
        return path
    if args.checkpoint or args.run_dir:
        return checkpoint_path(args.checkpoint or args.run_dir)
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise IrisError(
            "there is no run under runs/: train one (python iris_train.py --preset laptop), or name a file with "
            "--checkpoint, or a game with --pretrained Breakout"
        )
    return runs[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Worlds: the game, the dream, a recorded episode
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class View:
    """A moment of a world: what is shown of it, and what the step that led here brought."""

    panels: list[np.ndarray]  # pictures to show side by side, each (H, W, 3) uint8
    frame: np.ndarray  # the same as it is recorded, (64, 64, 3) uint8
    seen: Tensor  # what the agent sees of it, (1, 3, 64, 64) in [0, 1]
    step: int = 0  # of the episode
    total: float = 0.0  # return of the episode so far
    action: int | None = None  # that led here, and its reward; None at the beginning
    reward: float = 0.0
    end: bool = False
    label: str = ""  # what else to say of it

    def after(self, action: int, reward: float, end: bool, before: "View") -> "View":
        """This view, as the one that an action led to."""
        total = before.total + reward
        return replace(self, step=before.step + 1, total=total, action=action, reward=reward, end=end)


class Game:
    """The real game, as in tests: whole games, not single lives. Each reset begins the game of the next seed."""

    commands: dict = {}

    def __init__(self, agent: Agent, env, device: torch.device, seed: int, three_panels: bool = False):
        self.agent, self.env, self.device, self.seed, self.three_panels = agent, env, device, seed, three_panels

    def look(self, frame: np.ndarray) -> View:
        seen = self.agent.tokenizer.reconstruct(to_model(torch.from_numpy(frame)[None].to(self.device)))
        screen = np.atleast_3d(self.env.screen)  # (H, W, 1 or 3)
        panels = [np.repeat(screen, 3 // screen.shape[2], axis=2), frame, to_stored(seen)[0].cpu().numpy()]
        return View(panels if self.three_panels else panels[:1], frame, seen)

    def reset(self) -> View:
        self.now = self.look(self.env.reset(seed=self.seed)[0])
        self.seed += 1
        return self.now

    def step(self, action: int) -> View:
        frame, reward, terminated, truncated, _ = self.env.step(action)
        self.now = self.look(frame).after(action, float(reward), terminated or truncated, self.now)
        return self.now


class DreamedGame:
    """The dream of chapter 2. The first frame of a real game begins it; after that the real game is not asked."""

    commands: dict = {}

    def __init__(self, agent: Agent, game: Game):
        self.dream, self.game = Dream(agent.tokenizer, agent.world_model), game

    def look(self, seen: Tensor) -> View:
        frame = to_stored(seen)[0].cpu().numpy()
        return View([frame], frame, seen)

    def reset(self) -> View:
        frame = torch.from_numpy(self.game.reset().frame)[None].to(self.game.device)
        self.now = self.look(self.dream.reset(to_model(frame)))
        return self.now

    def step(self, action: int) -> View:
        seen, rewards, ends = self.dream.step(torch.tensor([action], device=self.game.device))
        self.now = self.look(seen).after(action, rewards.item(), bool(ends), self.now)
        return self.now


class RecordedEpisodes:
    """What was kept: media/episodes/{test,train,imagination}, and media/recordings. A step shows the next recorded
    frame, whatever the action."""

    def __init__(self, agent: Agent, folder: Path, device: torch.device, two_panels: bool):
        places = [folder / "media/episodes" / name for name in ("test", "train", "imagination")]
        self.folders = [place for place in (*places, folder / "media/recordings") if any(place.glob("*.npz"))]
        if not self.folders:
            raise IrisError(
                f"there are no recorded episodes in {folder.resolve()}/media: evaluations record some, and `,` while "
                "playing does"
            )
        self.agent, self.device, self.two_panels = agent, device, two_panels
        self.folder, self.episode = 0, 0
        self.commands = {
            "n": ("next episode", lambda: self.open(self.folder, self.episode + 1)),
            "p": ("previous episode", lambda: self.open(self.folder, self.episode - 1, way=-1)),
            "f": ("next folder", lambda: self.open(self.folder + 1, 0)),
            "right": ("a step on", lambda: self.at(self.place + 1)),
            "left": ("a step back", lambda: self.at(self.place - 1)),
            "up": ("10 steps on", lambda: self.at(self.place + 10)),
            "down": ("10 steps back", lambda: self.at(self.place - 10)),
            "h": ("back to the start", self.reset),
        }

    def reset(self) -> View:
        return self.open(self.folder, self.episode)

    def open(self, folder: int, episode: int, way: int = 1) -> View:
        """An episode by number, counted around. One that can't be read is passed over."""
        self.folder = folder % len(self.folders)
        paths = sorted(self.folders[self.folder].glob("*.npz"))  # anew each time: training adds and deletes some
        for attempt in range(len(paths)):
            self.episode = (episode + way * attempt) % len(paths)
            path = paths[self.episode]
            try:
                with np.load(path) as file:
                    self.frames, self.actions = np.uint8(file["frames"]), np.int64(file["actions"])
                    self.rewards = np.float64(file["rewards"])
                lengths = {len(self.frames), len(self.actions), len(self.rewards)}
                if len(lengths) > 1 or self.frames[:1].shape != (1, 64, 64, 3):
                    raise ValueError("not columns of an episode")
                self.label = f"{path.parent.name}/{path.stem}, {len(self.frames)} steps"
                return self.at(0)
            except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
                print(f"passed over {path}: {error}", file=sys.stderr)
        raise IrisError(f"{self.folders[self.folder]} has no episode that can be read")

    def at(self, place: int) -> View:
        """The episode after `place` steps. Behind its last step there is no frame: the last one stays."""
        self.place = min(max(place, 0), len(self.frames))
        frame = self.frames[min(self.place, len(self.frames) - 1)]
        seen, panels = to_model(torch.from_numpy(frame)[None].to(self.device)), [frame]
        if self.folders[self.folder].name != "imagination":  # dreams are reconstructions already
            seen = self.agent.tokenizer.reconstruct(seen)
            panels += [to_stored(seen)[0].cpu().numpy()] if self.two_panels else []
        view = View(panels, frame, seen, self.place, float(self.rewards[: self.place].sum()), label=self.label)
        if self.place == 0:
            return view
        action, reward = int(self.actions[self.place - 1]), float(self.rewards[self.place - 1])
        return replace(view, action=action, reward=reward, end=self.place == len(self.frames))

    def step(self, action: int) -> View:
        return self.at(self.place + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Controllers: a person, the agent
# ---------------------------------------------------------------------------------------------------------------------

# What a key means, in the words that action names are made of; a digit is the action of that number.
MEANINGS = {
    "left": "LEFT", "right": "RIGHT", "up": "UP", "down": "DOWN", "space": "FIRE",
    "a": "LEFT", "d": "RIGHT", "w": "UP", "s": "DOWN", **{digit: digit for digit in "0123456789"},
}  # fmt: skip


def action_names(env) -> list[str]:
    """The game's own names, such as RIGHTFIRE, or else numbers."""
    meanings = getattr(env.unwrapped, "get_action_meanings", None)
    return list(meanings()) if meanings else [str(number) for number in range(env.action_space.n)]


class Person:
    name = "you"

    def __init__(self, names: list[str]):
        self.actions = [set(re.findall(r"UP|DOWN|LEFT|RIGHT|FIRE|\d+", name)) for name in names]  # parts of each
        keys = {part: "/".join(key for key in MEANINGS if MEANINGS[key] == part) for part in MEANINGS.values()}
        self.help = "   ".join(
            f"{name}: {' + '.join(keys.get(part, '-') for part in sorted(parts))}"
            for name, parts in zip(names, self.actions, strict=True) if parts
        )  # fmt: skip

    def look(self, view: View) -> str:
        return ""

    def choose(self, held: list[str]) -> int:
        """The keys held, oldest first -> of the actions whose every part is held the one with most parts, and among
        equals the one with the newest keys. With nothing held that is NOOP, or the first action."""
        wanted = list(dict.fromkeys(MEANINGS[key] for key in held if key in MEANINGS))

        def fit(action: int) -> tuple[int, int]:
            parts = self.actions[action]
            if not parts <= set(wanted):
                return -1, 0
            return len(parts), sum(2 ** wanted.index(part) for part in parts)  # a newer key outweighs all older ones

        return max(range(len(self.actions)), key=fit)


class AgentPlayer:
    name = "agent"

    def __init__(self, agent: Agent, names: list[str], temperature: float):
        self.agent, self.names, self.temperature, self.step = agent, names, temperature, -2

    def look(self, view: View) -> str:
        """Takes the view in, whoever plays: its LSTM follows the game, so that it can take over at any moment."""
        if view.step != self.step + 1:  # another episode, or a jump in a recorded one: nothing leads here
            self.state = self.agent.actor_critic.initial_state(1)
        self.step = view.step
        logits, value, self.state = self.agent.actor_critic(view.seen, self.state)
        self.logits = logits[0] / max(self.temperature, 1e-6)
        shares = self.logits.softmax(dim=0).tolist()
        best = sorted(range(len(shares)), key=lambda action: -shares[action])[:4]
        return f"value {value.item():.2f}   policy {'  '.join(f'{self.names[i]} {shares[i]:.0%}' for i in best)}"

    def choose(self, held: list[str]) -> int:
        return int(sample(self.logits[None]))


# ---------------------------------------------------------------------------------------------------------------------
# Screens: a window, a page, a video file
# ---------------------------------------------------------------------------------------------------------------------


def paint(panels: list[np.ndarray], lines: list[str]) -> np.ndarray:
    """Pictures of any size (H, W, 3) uint8 side by side, and lines of text below -> one picture (H', W', 3) uint8."""
    # Magnified by whole numbers, so that all pixels stay alike.
    times = [max(1, round(448 / panel.shape[0])) for panel in panels]
    large = [panel.repeat(n, axis=0).repeat(n, axis=1) for panel, n in zip(panels, times, strict=True)]
    height, gap = max(panel.shape[0] for panel in large), 4 if len(large) > 1 else 0
    shown = np.concatenate(
        [np.pad(panel, ((0, height - panel.shape[0]), (gap, gap), (0, 0))) for panel in large], axis=1
    )  # fmt: skip
    if not lines:
        return shown
    width = max(shown.shape[1], 480)
    strip = np.zeros((8 + 20 * len(lines), width, 3), np.uint8)
    for row, line in enumerate(lines):
        cv2.putText(strip, line, (8, 20 + 20 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (230, 230, 230), 1, cv2.LINE_AA)
    left = (width - shown.shape[1]) // 2
    return np.concatenate([np.pad(shown, ((0, 0), (left, width - shown.shape[1] - left), (0, 0))), strip])


def x11_key_state() -> Callable[[int], bool] | None:
    """Asks the X server whether the key with a given symbol is down now; None where there is no X library.

    OpenCV reports that a key was pressed, then, while it is held, that it was pressed again, 25 times a second after a
    pause, and only of the latest key held; never that it was let go; and of two keys that come while the program is
    computing, only the second. So which keys are held, the server's own map of the keyboard has to say.
    """
    if not os.environ.get("DISPLAY"):
        raise IrisError(NO_DISPLAY)  # else Qt would end the program itself
    try:
        x11 = ctypes.CDLL("libX11.so.6")
    except OSError:
        return None
    x11.XOpenDisplay.restype = ctypes.c_void_p
    display = ctypes.c_void_p(x11.XOpenDisplay(None))
    if not display:
        raise IrisError(NO_DISPLAY)
    keys = ctypes.create_string_buffer(32)  # a bit for each key of the keyboard

    def is_down(symbol: int) -> bool:
        code = x11.XKeysymToKeycode(display, ctypes.c_ulong(symbol))
        x11.XQueryKeymap(display, keys)
        return bool(keys.raw[code >> 3] >> (code & 7) & 1)

    return is_down


class Window:
    """OpenCV's window. OpenCV reports that keys were pressed in it; which ones, and until when, the X server."""

    # X's key symbols; those of other keys are the characters themselves
    SYMBOLS = {"left": 65361, "up": 65362, "right": 65363, "down": 65364, "enter": 65293, "space": 32}
    NAMES = {symbol: name for name, symbol in SYMBOLS.items()} | {
        13: "enter", 65421: "enter", 27: "q", 63234: "left", 63232: "up", 63235: "right", 63233: "down",  # and macOS
    }  # fmt: skip
    HELD_FOR = 0.25  # seconds that a key counts as held after a report, where nothing better is known (macOS)

    def __init__(self, title: str, names: list[str], header: bool):
        self.title, self.header = title, header
        self.symbols = {name: self.SYMBOLS.get(name) or ord(name) for name in names}
        self.down: dict[str, float] = {}  # key -> when it was last reported; oldest press first
        self.is_down = x11_key_state() if sys.platform == "linux" else None
        try:
            cv2.namedWindow(title, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
        except cv2.error as error:
            raise IrisError("this OpenCV has no windows (opencv-python-headless?): use --web or --video") from error

    def show(self, panels: list[np.ndarray], header: list[str], notice: str) -> None:
        lines = (header if self.header else []) + ([notice] if notice else [])
        cv2.imshow(self.title, paint(panels, lines)[..., ::-1])

    def read(self, deadline: float) -> tuple[list[str], list[str]]:
        pressed = []
        while True:
            symbol = cv2.waitKeyEx(max(1, int(1000 * (deadline - time.perf_counter()))))
            if not self.is_open():
                return ["q"], []
            if symbol != -1:
                reported = self.NAMES.get(symbol) or chr(symbol & 0xFFFF).lower()
                others = [x for x in self.symbols if self.is_down and x != reported and self.is_held(x)]
                # Of keys pressed since it was last asked, OpenCV reports the newest alone.
                for name in [*others, reported] if reported in self.symbols else others:
                    if name not in self.down:
                        pressed.append(name)
                    self.down[name] = time.perf_counter()
            if time.perf_counter() >= deadline:
                break
        # A tap that was shorter than a step counts for one step.
        held = [name for name in self.down if name in pressed or self.is_held(name)]
        self.down = {name: when for name, when in self.down.items() if self.is_held(name)}
        return pressed, held

    def is_held(self, name: str) -> bool:
        if self.is_down is None:
            return time.perf_counter() - self.down[name] < self.HELD_FOR
        return self.is_down(self.symbols[name])

    def is_open(self) -> bool:
        try:
            return cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) >= 1
        except cv2.error:  # somebody closed it
            return False

    def close(self) -> None:
        if self.is_open():
            cv2.destroyWindow(self.title)


class Video:
    """A file. It shows each step once, as fast as they come, and nobody sits before it."""

    def __init__(self, path: str, fps: float, header: bool):
        self.path, self.fps, self.header, self.pictures, self.writer, self.count = Path(path), fps, header, [], None, 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")  # what can't be written is said before anything is played
        except OSError as error:
            raise IrisError(f"can't write {path}: {error.strerror}") from error

    def show(self, panels: list[np.ndarray], header: list[str], notice: str) -> None:
        picture = paint(panels, header if self.header else [])
        picture = np.pad(picture, ((0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)))[..., ::-1]  # codecs
        picture, self.count = np.ascontiguousarray(picture), self.count + 1
        if self.path.suffix != ".mp4":
            self.pictures.append(picture)
            return
        if self.writer is None:
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(str(self.path), code, round(self.fps, 2), picture.shape[1::-1])
        self.writer.write(picture)

    def read(self, deadline: float) -> tuple[list[str], list[str]]:
        return [], []

    def close(self, keep: bool = True) -> None:
        if self.writer:
            self.writer.release()
        if not keep:
            return self.path.unlink(missing_ok=True)
        if self.pictures:
            unit = 10 if self.path.suffix == ".gif" else 1  # a GIF counts time in hundredths of a second
            ends = np.round(np.arange(self.count + 1) * 1000 / self.fps / unit) * unit
            animation = cv2.Animation()
            animation.frames, animation.durations = self.pictures, np.diff(ends).astype(np.int32)
            cv2.imwriteanimation(str(self.path), animation)
        whole = cv2.VideoCapture(str(self.path)).isOpened() if self.writer else self.path.stat().st_size > 0
        if not whole:
            raise IrisError(f"{self.path} could not be written whole: is the disk full?")
        print(f"{self.path}: {self.count} frames, {self.path.stat().st_size / 1e6:.2f} MB", flush=True)


PAGE = """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>$title</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; background: #14161a; color: #e8e8e8; max-width: 84rem; margin: 1rem auto;
        padding: 0 1rem; text-align: center }
 h1 { font-size: 1.1rem } p { color: #b0b4bc; font-size: 14px } #notice { min-height: 1.5em; color: #ffc857 }
 img { image-rendering: pixelated; max-width: 100%; min-height: 12rem; background: #000 }
 pre { font: 14px/1.5 ui-monospace, monospace; min-height: 4.5em; margin: .5rem; white-space: pre-wrap }
 button { font: inherit; color: inherit; background: #2a2e36; border: 1px solid #555; border-radius: 6px; margin: 2px;
          padding: 4px 12px; cursor: pointer }
 button:focus-visible { outline: 3px solid #ffc857 }
 kbd { background: #444; border-radius: 3px; padding: 0 5px; font-size: 85% }
</style>
<h1>$title</h1>
<img id=picture alt="The game"><div id=notice role=status></div><pre id=header></pre><div id=commands></div><p>$help</p>
<script>
 const tab = Math.random().toString(36).slice(2), names = $names, commands = $commands;
 const element = (id) => document.getElementById(id);
 const special = {ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", " ": "space",
                  Enter: "enter", Escape: "q"};
 let down = {}, count = 0;  // physical key -> the name that it had when it was pressed
 // Over a slow line, messages may arrive out of order: each has a number, and an older one is ignored.
 const send = (pressed) => fetch("/keys", {method: "POST", keepalive: true,
   body: JSON.stringify({tab, count: ++count, pressed, held: Object.values(down)})}).catch(() => {});
 setInterval(() => Object.keys(down).length && send([]), 300);  // "still held": without it, a key is let go
 const letGo = () => { if (Object.keys(down).length) { down = {}; send([]); } };
 addEventListener("blur", letGo);
 addEventListener("visibilitychange", letGo);
 addEventListener("keydown", (event) => {
   const name = special[event.key] ?? event.key.toLowerCase();
   const onButton = document.activeElement.tagName == "BUTTON" && (name == "enter" || name == "space");
   if (event.ctrlKey || event.metaKey || event.altKey || onButton || !names.includes(name)) return;
   event.preventDefault();
   if (event.repeat || down[event.code || name]) return;
   down[event.code || name] = name;
   send([name]);
 });
 addEventListener("keyup", (event) => {
   const key = event.code || (special[event.key] ?? event.key.toLowerCase());
   if (down[key]) { delete down[key]; send([]); }
 });
 for (const [key, text] of Object.entries(commands)) {
   const button = document.createElement("button");
   button.append(Object.assign(document.createElement("kbd"), {textContent: key}), " " + text);
   button.onclick = () => { send([key]); button.blur(); };
   element("commands").append(button);
 }
 (async () => {
   // The next picture is asked for when the last one is there: over a slow line some are left out, none comes late.
   for (let number = 0, over = false; !over;) {
     try {
       const message = await (await fetch("/picture?after=" + number)).json();
       ({number, over} = message);
       element("notice").textContent = message.notice;
       if (over) break;
       element("picture").src = message.picture;
       element("header").textContent = message.header.join("\\n");
     } catch {
       element("notice").textContent = "No connection; trying again.";
       await new Promise((wake) => setTimeout(wake, 1000));
     }
   }
 })();
</script>"""


class Page:
    """A page in the browser. It asks for picture after picture, and tells of each press and each release of a key.

    Any site that you visit may send requests to 127.0.0.1, so what comes from another origin is refused.
    """

    HELD_FOR = 1.5  # seconds after a tab's last message: the line may have broken, or the tab been closed

    def __init__(self, host: str, port: int, title: str, names: list[str], commands: dict[str, str], help_text: str):
        self.changed, self.message, self.number = threading.Condition(), {}, 0
        self.tabs: dict[str, tuple[int, float, list[str]]] = {}  # number and time of its latest message, keys held
        self.names, self.pressed = names, []
        parts = {"title": title, "help": help_text, "names": json.dumps(names), "commands": json.dumps(commands)}
        self.page = re.sub(r"\$(\w+)", lambda match: parts[match[1]], PAGE).encode()
        page, own_names = self, ("localhost", host, socket.gethostname())

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # one connection for many requests

            def log_message(self, *arguments) -> None:
                pass

            def answer(self, status: int, content: bytes = b"", kind: str = "text/plain") -> None:
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Frame-Options", "DENY")
                if status >= 400:
                    self.send_header("Connection", "close")  # its body has not been read
                self.end_headers()
                self.wfile.write(content)

            def is_foreign(self) -> bool:
                """Whether another site sent this, be it under a name of its own that leads here (DNS rebinding)."""
                address = self.headers.get("Host", "")
                name = re.sub(r":\d+$", "", address).strip("[]")
                if name not in own_names and not re.fullmatch(r"[0-9.]+|[0-9a-f]*:[0-9a-f:]+", name):
                    return True
                if self.headers.get("Origin") not in (None, f"http://{address}"):
                    return True
                by_link = self.path == "/" and self.headers.get("Sec-Fetch-Mode") == "navigate"
                return self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and not by_link

            def do_GET(self) -> None:
                if self.is_foreign():
                    self.answer(403, b"This page answers requests of its own only.")
                elif self.path == "/":
                    self.answer(200, page.page, "text/html")
                elif found := re.fullmatch(r"/picture\?after=(\d{1,12})", self.path):
                    self.answer(200, page.newer_than(int(found[1])), "application/json")
                else:
                    self.answer(404, b"Nothing here.")

            def do_POST(self) -> None:
                if self.is_foreign():
                    return self.answer(403, b"This page answers requests of its own only.")
                try:
                    length = int(self.headers["Content-Length"])
                    if self.path != "/keys" or not 0 < length < 10_000:
                        raise ValueError
                    page.receive(json.loads(self.rfile.read(length)))
                    self.answer(204)
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                    self.answer(400, b"Not a message about keys.")

        try:
            self.server = ThreadingHTTPServer((host, port), Handler)
        except (OSError, OverflowError, TypeError) as error:
            raise IrisError(f"can't serve at {host}:{port} ({error}): choose another --port, or --host") from error
        self.server.handle_error = lambda *_: None  # a browser that hangs up in mid-answer is no news
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        port = self.server.server_port
        tunnel, name = f"ssh -L {port}:127.0.0.1:{port} THIS_MACHINE", socket.gethostname()
        shown = name if host == "0.0.0.0" else host
        print(f"Open http://{shown}:{port} in a browser; from another machine behind {tunnel}", flush=True)

    def newer_than(self, number: int) -> bytes:
        """The newest picture, as soon as there is one that the browser has not seen; after a second the old one."""
        with self.changed:
            self.changed.wait_for(lambda: self.number and self.number != number, timeout=1.0)
            return json.dumps(self.message).encode()

    def receive(self, message: dict) -> None:
        tab, count, held = str(message["tab"])[:20], int(message["count"]), message["held"]
        with self.changed:
            self.pressed += [key for key in message["pressed"] if key in self.names]
            if count > self.tabs.get(tab, (0,))[0]:
                self.tabs[tab] = count, time.perf_counter(), [key for key in held if key in self.names]

    def show(self, panels: list[np.ndarray], header: list[str], notice: str) -> None:
        _, png = cv2.imencode(".png", paint(panels, [])[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
        picture = "data:image/png;base64," + base64.b64encode(png).decode()
        self.publish({"picture": picture, "header": header, "notice": notice})

    def publish(self, message: dict) -> None:
        with self.changed:
            self.number += 1
            self.message = {"number": self.number, "over": False, **message}
            self.changed.notify_all()

    def read(self, deadline: float) -> tuple[list[str], list[str]]:
        time.sleep(max(0.0, deadline - time.perf_counter()))
        with self.changed:
            pressed, self.pressed, alive = self.pressed, [], time.perf_counter() - self.HELD_FOR
            self.tabs = {tab: state for tab, state in self.tabs.items() if state[1] > alive}
            held = [key for _, _, keys in self.tabs.values() for key in keys]
        return pressed, held + [key for key in pressed if key not in held]  # a tap counts for a step

    def close(self) -> None:
        self.publish({"over": True, "notice": "Stopped. Start iris_play.py again to go on."})
        time.sleep(0.2)  # for the tabs to hear of it
        self.server.shutdown()
        self.server.server_close()


# ---------------------------------------------------------------------------------------------------------------------
# Recordings
# ---------------------------------------------------------------------------------------------------------------------


class Recording:
    """Steps that are being kept: a video as it goes, and in the end the columns that a run's own episodes have too."""

    def __init__(self, folder: Path, fps: float):
        now = time.time()
        name = time.strftime("%Y%m%d_%H%M%S", time.localtime(now)) + f"_{int(now % 1 * 1000):03d}.npz"
        self.path = folder / "media/recordings" / name
        self.video, self.steps = Video(str(self.path.with_suffix(".mp4")), fps, header=True), []
        print(f"Recording {self.path}", flush=True)

    def add(self, before: View, after: View, header: list[str]) -> None:
        """A step, and the picture that it began with."""
        self.video.show(before.panels, header, "")
        self.steps.append((before.frame, after.action, after.reward, after.end))

    def cut(self) -> None:
        """What comes next does not follow from what was."""
        if self.steps:
            self.steps[-1] = *self.steps[-1][:3], True

    def close(self, keep: bool = True) -> None:
        keep = keep and len(self.steps) > 0
        if keep:
            frames, actions, rewards, ends = (np.array(column) for column in zip(*self.steps, strict=True))
            columns = {"frames": frames, "actions": actions, "rewards": np.float32(rewards), "ends": np.uint8(ends)}
            try:
                columns["return"] = float(rewards.sum())
                write_file(self.path, lambda file: np.savez_compressed(file, **columns))
            except OSError as error:
                raise IrisError(f"can't write {self.path}: {error.strerror}") from error
        self.video.close(keep)
        if keep:
            print(f"{self.path}: {len(frames)} steps, return {rewards.sum():g}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "enter": "start anew", ".": "pause", "e": "a step, while paused", "m": "hand over", ",": "record", "q": "quit",
}  # fmt: skip
STEPPING = {"left", "right", "up", "down"}  # commands of a world after which it should stand still


def play(
    world, controllers: list, screen, names: list[str], folder: Path, fps: float, save: bool = False, steps: int = 0,
    episodes: int = 0,
) -> None:  # fmt: skip
    """Shows the world and steps it with the actions of the controller in charge, at first the first one, until `q`, or
    until so many steps or episodes have been played (0 is any number). All controllers see everything, so that `m` can
    hand over at any moment. Recordings go to folder/media/recordings; with `save`, each episode, if the answer is yes.
    """
    view, is_new, in_charge, paused, recording, asking = world.reset(), True, 0, False, None, False
    played, ended, playing, computing = 0, 0, 0.0, 0.0  # steps, episodes, and the seconds that the steps took
    deadline, trouble = time.perf_counter(), ""
    try:
        while True:
            began, stepped = time.perf_counter(), False
            # Look, and show.
            if is_new:
                thoughts = [thought for controller in controllers if (thought := controller.look(view))]
            if save and recording is None and not view.end:
                recording = Recording(folder, fps)
            action = "-" if view.action is None else dict(enumerate(names)).get(view.action, view.action)
            who = "over" if view.end else view.label or controllers[in_charge].name
            line = f"step {view.step}   action {action}   reward {view.reward:g}   return {view.total:g}   {who}"
            header = [line, *thoughts]
            notices = ["paused"] * paused + ["recording"] * bool(recording) + ["Keep this episode?   y / n"] * asking
            notices += [trouble] * bool(trouble)
            screen.show(view.panels, header, "   ".join(notices))
            if (steps and played == steps) or (episodes and ended == episodes):
                break

            # Read what the person wants.
            waited = time.perf_counter()
            pressed, held = screen.read(deadline)
            waited = time.perf_counter() - waited
            deadline, is_new = max(deadline, time.perf_counter()) + 1 / fps, False
            if "q" in pressed:
                break
            if asking:
                if answers := {"y", "n"} & set(pressed):
                    recording, asking = recording.close(keep="y" in answers), False
                    view, is_new = world.reset(), True
                continue
            paused ^= "." in pressed
            in_charge = (in_charge + ("m" in pressed)) % len(controllers)
            if "," in pressed and not save:
                try:
                    old, recording = recording, None
                    recording = old.close() if old else Recording(folder, fps)
                    trouble = ""
                except IrisError as error:  # a game goes on even if the disk is full
                    trouble = str(error)

            # Act.
            if asked := [key for key in pressed if key in world.commands]:
                view, is_new = world.commands[asked[0]][1](), True
                paused |= asked[0] in STEPPING
                if recording:
                    recording.cut()
            elif "enter" in pressed or (view.end and not paused):
                asking = save and bool(recording.steps)
                if not asking:
                    view, is_new = world.reset(), True
                    if recording:
                        recording.cut()
            elif not view.end and (not paused or "e" in pressed):
                before, view, is_new = view, world.step(controllers[in_charge].choose(held)), True
                played, stepped = played + 1, True
                if recording:
                    recording.add(before, view, header)
                if view.end:
                    ended += 1
                    print(f"Episode {ended}: {view.step} steps, return {view.total:g}", flush=True)
            if stepped:
                seconds = time.perf_counter() - began
                playing, computing = playing + seconds, computing + seconds - waited
    finally:  # also when stopped with Ctrl-C: what was recorded is kept
        if recording:
            recording.close()
        screen.close()
        if played:
            print(
                f"{played} steps, {played / playing:.1f} a second of {fps:g} asked for; a step takes "
                f"{1000 * computing / played:.0f} ms, which would do for {played / computing:.0f} a second"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation (paper, section 3.1)
# ---------------------------------------------------------------------------------------------------------------------


def published_scores(env_id: str) -> dict[str, float]:
    """Method -> mean return in that game, from results/published_scores.csv; empty where there is none."""
    path = Path(__file__).parent / "results" / "published_scores.csv"
    game = env_id.split("/")[-1].split("-")[0].removesuffix("NoFrameskip")
    rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
    return {method: float(score) for name, method, score in rows if name == game}


def human_normalised(env_id: str, mean_return: float) -> float | None:
    """0 for random play, 1 for a human's; None for a game without published scores."""
    scores = published_scores(env_id)
    return (mean_return - scores["random"]) / (scores["human"] - scores["random"]) if scores else None


def evaluate(agent: Agent, train_args: iris_train.Args, args: Args, device: torch.device, checkpoint: Path) -> None:
    """Plays whole test games, at most 16 side by side, and prints what they returned."""
    if args.json:
        try:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            open(args.json, "a").close()
        except OSError as error:
            raise IrisError(f"can't write {args.json}: {error.strerror}") from error
    settings = replace(
        train_args, test_episodes=args.evaluate, test_envs=min(16, args.evaluate), test_temperature=args.temperature
    )
    began = time.perf_counter()
    games = play_test_episodes(agent, settings, device, args.seed, keep=0)
    seconds, returns = time.perf_counter() - began, np.array([game["return"] for game in games])
    spread = returns.std(ddof=1) / len(returns) ** 0.5 if len(returns) > 1 else None
    published = published_scores(train_args.env_id)
    score = human_normalised(train_args.env_id, returns.mean())
    statistics = {
        "mean": returns.mean(), "standard_error": spread, "median": np.median(returns), "min": returns.min(),
        "max": returns.max(), "human_normalised": score, "paper": published.get("iris"),
    }  # fmt: skip
    statistics = {name: None if value is None else float(value) for name, value in statistics.items()}
    steps = sum(game["length"] for game in games)
    print(f"{train_args.env_id}: {len(games)} test episodes, {steps} steps, in {seconds:.0f} s")
    for name, value in statistics.items():
        if value is not None:
            print(f"  {name.replace('_', ' '):17}{value:9.2f}")
    if published:
        print(f"  (Human-normalised: 0 is a random player's {published['random']}, 1 a human's {published['human']}.)")
    if args.json:
        how = {"temperature": str(args.temperature), "seed": args.seed, "returns": returns.tolist()}
        what = {"env_id": train_args.env_id, "checkpoint": str(checkpoint), "episodes": len(games)}
        Path(args.json).write_text(json.dumps(what | statistics | how, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Plays. Raises IrisError for what the user can put right."""
    check(args)
    checkpoint = find_checkpoint(args)
    agent, train_args = load_agent(checkpoint)
    train_args.env_id = args.env_id or train_args.env_id
    train_args.device = args.device
    device, bf16 = choose_device(train_args)
    agent.to(device)
    torch.manual_seed(args.seed)
    env = make_env(train_args.env_id, max_frames=train_args.test_max_frames)
    if env.action_space.n != agent.world_model.num_actions:
        raise IrisError(
            f"{checkpoint} knows {agent.world_model.num_actions} actions and {train_args.env_id} has "
            f"{env.action_space.n}: name its game with --env-id"
        )
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if args.evaluate:
            return evaluate(agent, train_args, args, device, checkpoint)
        # A published checkpoint lies in a cache, where nobody would look for recordings.
        folder = checkpoint.parent if (checkpoint.parent / "args.json").exists() else Path()
        names = action_names(env)
        person, player = Person(names), AgentPlayer(agent, names, args.temperature)
        if args.episodes:
            world, controllers = RecordedEpisodes(agent, folder, device, args.reconstruction), [player]
        else:
            world = Game(agent, env, device, args.seed, args.reconstruction)
            world = DreamedGame(agent, world) if args.world_model else world
            you_play = args.human or (args.world_model and not args.agent and not args.video)
            controllers = [person, player] if you_play else [player, person]
        without = ["m"] * (len(controllers) == 1) + [","] * args.save
        commands = {key: text for key, text in COMMANDS.items() if key not in without}
        commands |= {key: text for key, (text, _) in world.commands.items()}
        commands |= {"y": "keep it", "n": "don't keep it"} if args.save else {}
        keys = list(dict.fromkeys([*MEANINGS, *commands]))
        help_text = "" if args.episodes else f"Actions: {person.help}"
        title = f"IRIS: {train_args.env_id}{', the dream' if args.world_model else ''}"
        steps, episodes = args.steps, 0
        if args.video:
            episodes = 0 if steps else 1
            steps = steps or (1000 if args.world_model or Path(args.video).suffix != ".mp4" else 0)
            screen = Video(args.video, args.fps, args.header)
        else:
            print(f"{title} ({checkpoint})", help_text, sep="\n")
            print("Commands: " + "   ".join(f"{key}: {text}" for key, text in commands.items()), flush=True)
            screen = (
                Page(args.host, args.port, title, keys, commands, help_text) if args.web
                else Window(title, keys, args.header)
            )  # fmt: skip
        play(world, controllers, screen, names, folder, args.fps, args.save, steps, episodes)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # a cluster's way to say Ctrl-C; a connection that broke
        if signal.getsignal(number) == signal.SIG_DFL:  # but not under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,)))
    except IrisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):  # the latter where its output goes to a program that has ended
        sys.exit(130)
