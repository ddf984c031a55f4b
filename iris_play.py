"""Chapter 5 of IRIS: step into the dream, and watch what was learned.

A world model that predicts its next tokens well is a game that can be played. Here a person takes the policy's place:
keys become actions, the transformer answers with the tokens of the next frame, the decoder paints them, and nothing of
the real game is left but its first frame. The same loop shows the agent at work, replays what a run has kept, and
with `--evaluate` measures a policy as the paper does.

    world                           controller                      screen
    the game                        a person: keys -> action        a window
    the dream (chapter 2)           the agent: policy -> action     a page in the browser
    a recorded episode                                              a video file
        |   ^                            ^    |                          ^    |
        |   +----------- action ---------|----+                          |    | keys
        +------- frame, reward, end -----+------------- picture ---------+    v
                                     play(), which knows none of them by name

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
import re
import signal
import socket
import sys
import threading
import time
import zipfile
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Callable, Literal

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor

import iris_train
from iris_agent import Agent
from iris_tokenizer import IrisError, download, to_model, to_stored
from iris_train import checkpoint_path, choose_device, has_bf16, load_agent, make_env, play_test_episodes
from iris_world_model import Dream, sample

PRETRAINED_URL = "https://huggingface.co/eloialonso/iris/resolve/main/pretrained_models/{}.pt"

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
    video: str = ""  # Show nothing, write this .mp4, .gif or .webp: an episode (of a dream 1,000 steps at most)
    steps: int = 0  # Stop after so many steps

    fps: float = 15.0  # Steps a second; 15 is the real game's speed
    header: bool = False  # Write step, action, reward, return, value and policy under the picture
    save: bool = False  # Ask after each episode whether to keep it
    seed: int = 1  # Seed of the game, the policy and the dream
    temperature: float = 0.5  # Of the policy; 0 is always its likeliest action, inf plays at random
    json: str = ""  # With evaluate: file to keep the result in
    device: str = "auto"  # cuda, cpu, ...; auto takes a GPU where there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto is bf16 where the hardware has it


def check(args: Args) -> None:
    """Raises IrisError for arguments that don't go together, before anything is loaded."""
    for names in (
        ("checkpoint", "run_dir", "pretrained"), ("human", "world_model", "episodes", "evaluate"), ("web", "video"),
        ("human", "agent"), ("human", "video"), ("episodes", "save"), ("video", "save"),
        ("reconstruction", "world_model"),
    ):  # fmt: skip
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
        if len(given) > 1:
            raise IrisError(f"{' and '.join(given)} don't go together: leave one out")
    for name, valid in (
        ("fps", 0 < args.fps <= 1000), ("temperature", args.temperature >= 0), ("evaluate", args.evaluate >= 0),
        ("steps", args.steps >= 0), ("seed", 0 <= args.seed < 2**31), ("port", 0 <= args.port < 2**16),
    ):  # fmt: skip
        if not valid:
            raise IrisError(f"--{name} {getattr(args, name)} is out of range")
    if args.video and Path(args.video).suffix not in (".mp4", ".gif", ".webp"):
        raise IrisError(f"--video {args.video}: its name has to end in .mp4, .gif or .webp")


def find_checkpoint(args: Args) -> Path:
    """The checkpoint that the arguments speak of. Raises IrisError if there is none."""
    if args.pretrained:
        make_env(f"{args.pretrained}NoFrameskip-v4").close()  # says what was meant if there is no such game
        path = Path(torch.hub.get_dir()) / "checkpoints" / "iris" / f"{args.pretrained}.pt"
        url = PRETRAINED_URL.format(args.pretrained)
        try:
            if not path.exists():
                print(f"Fetching {url}", flush=True)
                download(url, path)
        except OSError as error:
            raise IrisError(f"can't fetch the agent ({error}): put {path.name} (from {url}) into {path.parent}") from error
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


class Game:
    """The real game, as in tests: whole games, not single lives. Each reset begins the game of the next seed."""

    def __init__(self, agent: Agent, env, device: torch.device, seed: int, three_panels: bool = False):
        self.agent, self.env, self.device, self.seed, self.three_panels = agent, env, device, seed, three_panels
        self.commands: dict[str, tuple[str, Callable[[], View]]] = {}

    def reset(self) -> View:
        frame, _ = self.env.reset(seed=self.seed)
        self.seed += 1
        self.now = self.look(frame)
        return self.now

    def look(self, frame: np.ndarray, **what_happened) -> View:
        seen = self.agent.tokenizer.reconstruct(to_model(torch.from_numpy(frame)[None].to(self.device)))
        panels = [self.env.screen, frame, to_stored(seen)[0].cpu().numpy()]
        return View(panels if self.three_panels else panels[:1], frame, seen, **what_happened)

    def step(self, action: int) -> View:
        frame, reward, terminated, truncated, _ = self.env.step(action)
        self.now = self.look(
            frame, step=self.now.step + 1, total=self.now.total + float(reward), action=action, reward=float(reward),
            end=terminated or truncated,
        )  # fmt: skip
        return self.now


class DreamedGame:
    """The dream of chapter 2. The first frame of a real game begins it; after that the real game is not asked."""

    def __init__(self, agent: Agent, game: Game):
        self.dream, self.game = Dream(agent.tokenizer, agent.world_model), game
        self.commands: dict[str, tuple[str, Callable[[], View]]] = {}

    def reset(self) -> View:
        self.now = self.look(self.dream.reset(to_model(torch.from_numpy(self.game.reset().frame)[None].to(self.game.device))))
        return self.now

    def look(self, seen: Tensor, **what_happened) -> View:
        frame = to_stored(seen)[0].cpu().numpy()
        return View([frame], frame, seen, **what_happened)

    def step(self, action: int) -> View:
        seen, rewards, ends = self.dream.step(torch.tensor([action], device=self.game.device))
        self.now = self.look(
            seen, step=self.now.step + 1, total=self.now.total + rewards.item(), action=action, reward=rewards.item(),
            end=bool(ends),
        )  # fmt: skip
        return self.now


class RecordedEpisodes:
    """What a run has kept: media/episodes/{train,test,imagination}, and media/recordings. Actions change nothing."""

    def __init__(self, agent: Agent, folder: Path, device: torch.device, two_panels: bool):
        places = [folder / "media/episodes" / name for name in ("test", "train", "imagination")]
        self.folders = [found for place in (*places, folder / "media/recordings") if (found := sorted(place.glob("*.npz")))]
        if not self.folders:
            raise IrisError(f"{folder} has no recorded episodes: evaluations and `,` while playing record some")
        self.agent, self.device, self.two_panels = agent, device, two_panels
        self.folder, self.episode = 0, 0
        self.commands = {
            "n": ("next episode", lambda: self.open(self.folder, self.episode + 1)),
            "p": ("previous episode", lambda: self.open(self.folder, self.episode - 1)),
            "f": ("next folder", lambda: self.open(self.folder + 1, 0)),
            "right": ("a step on", lambda: self.at(self.place + 1)),
            "left": ("a step back", lambda: self.at(self.place - 1)),
            "up": ("10 steps on", lambda: self.at(self.place + 10)),
            "down": ("10 steps back", lambda: self.at(self.place - 10)),
            "h": ("back to the start", self.reset),
        }

    def reset(self) -> View:
        return self.open(self.folder, self.episode)

    def open(self, folder: int, episode: int) -> View:
        self.folder = folder % len(self.folders)
        self.episode = episode % len(self.folders[self.folder])
        path = self.folders[self.folder][self.episode]
        try:
            with np.load(path) as file:
                self.frames, self.actions, self.rewards = (file[name] for name in ("frames", "actions", "rewards"))
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise IrisError(f"{path} is no readable episode: delete it") from error
        self.label = f"{path.parent.name}/{path.stem}, {len(self.frames)} steps"
        return self.at(0)

    def at(self, place: int) -> View:
        """The episode after `place` steps. Behind its last step there is no frame: the last one stays."""
        self.place = min(max(place, 0), len(self.frames))
        frame = self.frames[min(self.place, len(self.frames) - 1)]
        seen, panels = to_model(torch.from_numpy(frame)[None].to(self.device)), [frame]
        if self.folders[self.folder][0].parent.name != "imagination":  # dreams are reconstructions already
            seen = self.agent.tokenizer.reconstruct(seen)
            panels += [to_stored(seen)[0].cpu().numpy()] if self.two_panels else []
        before = self.place - 1
        return View(
            panels, frame, seen, self.place, float(self.rewards[: self.place].sum()),
            int(self.actions[before]) if self.place else None, float(self.rewards[before]) if self.place else 0.0,
            end=self.place == len(self.frames), label=self.label,
        )  # fmt: skip

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
        self.help = "   ".join(
            f"{name}: {' + '.join('/'.join(key for key, meaning in MEANINGS.items() if meaning == part) for part in sorted(parts))}"
            for name, parts in zip(names, self.actions, strict=True) if parts
        )  # fmt: skip

    def reset(self) -> None:
        pass

    def look(self, view: View) -> str:
        return ""

    def choose(self, held: list[str]) -> int:
        """The keys held, oldest first -> the action that uses most of them, and of such the one of the newest keys."""
        wanted = list(dict.fromkeys(MEANINGS[key] for key in held if key in MEANINGS))

        def fit(action: int) -> tuple[int, int]:
            parts = self.actions[action]
            if not parts <= set(wanted):
                return -1, 0
            return len(parts), sum(2 ** wanted.index(part) for part in parts)

        return max(range(len(self.actions)), key=fit)  # with nothing held, NOOP, or the first


class AgentPlayer:
    name = "agent"

    def __init__(self, agent: Agent, names: list[str], temperature: float):
        self.agent, self.names, self.temperature = agent, names, temperature

    def reset(self) -> None:
        self.state = self.agent.actor_critic.initial_state(1)

    def look(self, view: View) -> str:
        """Takes the view in, whoever plays: the LSTM follows the game, so that it can take over at any moment."""
        logits, value, self.state = self.agent.actor_critic(view.seen, self.state)
        self.logits = logits[0] / self.temperature if self.temperature else (logits[0] == logits[0].max()).float().log()
        shares = self.logits.softmax(dim=0).tolist()
        best = sorted(range(len(shares)), key=lambda action: -shares[action])[:4]
        return f"value {value.item():.2f}   policy {'  '.join(f'{self.names[i]} {shares[i]:.0%}' for i in best)}"

    def choose(self, held: list[str]) -> int:
        return int(sample(self.logits))


# ---------------------------------------------------------------------------------------------------------------------
# Screens: a window, a page, a video file
# ---------------------------------------------------------------------------------------------------------------------


def paint(panels: list[np.ndarray], lines: list[str]) -> np.ndarray:
    """Pictures of any size (H, W, 3) uint8 side by side, and lines of text below -> one picture, pixels kept square."""
    if len(panels) == 1:
        times = max(1, round(448 / panels[0].shape[0]))  # a whole number, so that all pixels stay alike
        shown = panels[0].repeat(times, axis=0).repeat(times, axis=1)
    else:
        sizes = [(round(448 * panel.shape[1] / panel.shape[0]), 448) for panel in panels]
        large = [cv2.resize(panel, size, interpolation=cv2.INTER_NEAREST) for panel, size in zip(panels, sizes, strict=True)]
        shown = np.concatenate([np.pad(panel, ((0, 0), (4, 4), (0, 0))) for panel in large], axis=1)
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
    pause, and only of the latest key held; never that it was let go. Left and fire held together can't be told so.
    """
    try:
        x11 = ctypes.CDLL("libX11.so.6")
    except OSError:
        return None
    x11.XOpenDisplay.restype = ctypes.c_void_p
    display = ctypes.c_void_p(x11.XOpenDisplay(None))
    if not display:
        raise IrisError("there is no display here: choose --web (a page in the browser) or --video FILE")
    keys = ctypes.create_string_buffer(32)  # a bit for each key of the keyboard

    def is_down(symbol: int) -> bool:
        code = x11.XKeysymToKeycode(display, ctypes.c_ulong(symbol))
        x11.XQueryKeymap(display, keys)
        return bool(keys.raw[code >> 3] >> (code & 7) & 1)

    return is_down


class Window:
    """OpenCV's window. A press is what it reports; a release is what the X server's map of keys shows."""

    NAMES = {
        65361: "left", 65362: "up", 65363: "right", 65364: "down", 63234: "left", 63232: "up", 63235: "right",
        63233: "down", 13: "enter", 65421: "enter", 27: "q", 32: "space",
    }  # fmt: skip
    HELD_FOR = 0.15  # seconds that a key counts as held after a report, where nothing better is known (macOS)

    def __init__(self, title: str, header: bool):
        self.title, self.header = title, header
        self.down: dict[str, tuple[int, float]] = {}  # key -> its symbol, and when it was last reported
        self.is_down = x11_key_state() if sys.platform == "linux" else None
        try:
            cv2.namedWindow(title, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
        except cv2.error as error:
            raise IrisError("this OpenCV has no windows (opencv-python-headless?): use --web or --video FILE") from error

    def show(self, panels: list[np.ndarray], header: list[str], notice: str) -> None:
        lines = (header if self.header else []) + ([notice] if notice else [])
        cv2.imshow(self.title, paint(panels, lines)[..., ::-1])

    def read(self, deadline: float) -> tuple[list[str], list[str]]:
        pressed, reported = [], {}
        while True:
            symbol = cv2.waitKeyEx(max(1, int(1000 * (deadline - time.perf_counter()))))
            if symbol != -1:
                name = self.NAMES.get(symbol) or (chr(symbol).lower() if 32 < symbol < 127 else "")
                reported[name] = symbol, time.perf_counter()
                if name not in self.down:
                    pressed.append(name)
                self.down[name] = reported[name]  # a key already there keeps its place: oldest first
            if cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) < 1:
                return ["q"], []  # closed
            if time.perf_counter() >= deadline:
                break
        held = [name for name, (symbol, when) in self.down.items() if name in reported or self.is_held(symbol, when)]
        # What was pressed and let go since the last time counts this time, and is up for the next.
        self.down = {name: state for name, state in self.down.items() if self.is_held(*state)}
        return pressed, held

    def is_held(self, symbol: int, reported: float) -> bool:
        if self.is_down is None:
            return time.perf_counter() - reported < self.HELD_FOR
        return self.is_down({13: 0xFF0D, 27: 0xFF1B}.get(symbol, symbol))

    def close(self) -> None:
        cv2.destroyAllWindows()
        cv2.waitKey(1)


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
        self.count += 1
        if self.path.suffix != ".mp4":
            self.pictures.append(np.ascontiguousarray(picture))
            return
        if self.writer is None:
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(str(self.path), code, self.fps, picture.shape[1::-1])
        self.writer.write(np.ascontiguousarray(picture))

    def read(self, deadline: float) -> tuple[list[str], list[str]]:
        return [], []

    def close(self) -> None:
        if self.writer:
            self.writer.release()
        if self.pictures:
            animation = cv2.Animation()
            animation.frames = self.pictures
            animation.durations = np.full(len(self.pictures), round(1000 / self.fps), np.int32)
            cv2.imwriteanimation(str(self.path), animation)
        if self.count == 0 or self.path.stat().st_size == 0:
            raise IrisError(f"nothing could be written to {self.path}: is the disk full?")
        print(f"{self.path}: {self.count} frames, {self.path.stat().st_size / 1e6:.2f} MB", flush=True)


PAGE = """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>$title</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; background: #14161a; color: #e8e8e8; margin: 0 auto; padding: 1rem;
        max-width: 84rem; text-align: center }
 img { image-rendering: pixelated; max-width: 100%; min-height: 12rem; background: #000 }
 pre { font: 14px/1.5 ui-monospace, monospace; min-height: 4.5em; margin: .5rem; white-space: pre-wrap }
 #notice { min-height: 1.5em; color: #ffc857 }
 button { font: inherit; color: inherit; background: #2a2e36; border: 1px solid #555; border-radius: 6px; margin: 2px;
          padding: 4px 12px; cursor: pointer }
 button:focus-visible { outline: 3px solid #ffc857 }
 kbd { background: #444; border-radius: 3px; padding: 0 5px; font-size: 85% }
 p { color: #b0b4bc; font-size: 14px }
</style>
<h1 style="font-size: 1.1rem; margin: .3rem">$title</h1>
<img id=picture alt="The game"><div id=notice role=status></div><pre id=header></pre><div id=commands></div><p id=keys></p>
<script>
 const tab = Math.random().toString(36).slice(2), commands = $commands, names = $names, element = {};
 for (const id of ["picture", "notice", "header", "commands", "keys"]) element[id] = document.getElementById(id);
 element.keys.textContent = $help;
 const special = {ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", " ": "space",
                  Enter: "enter", Escape: "q"};
 let held = [], count = 0;
 // A message at a time would come too late over a slow line, so they overtake each other, and are counted.
 const send = (pressed) => fetch("/keys", {method: "POST", keepalive: true,
   body: JSON.stringify({tab, count: ++count, pressed, held})}).catch(() => {});
 for (const [key, text] of Object.entries(commands)) {
   const button = document.createElement("button");
   button.append(Object.assign(document.createElement("kbd"), {textContent: key}), " " + text);
   button.onclick = () => { send([key]); button.blur(); };
   element.commands.append(button);
 }
 addEventListener("keydown", (event) => {
   const name = special[event.key] ?? event.key.toLowerCase();
   const onButton = document.activeElement.tagName == "BUTTON" && (name == "enter" || name == "space");
   if (event.ctrlKey || event.metaKey || event.altKey || onButton || !names.includes(name)) return;
   event.preventDefault();
   if (event.repeat || held.includes(name)) return;
   held.push(name);
   send([name]);
 });
 addEventListener("keyup", (event) => {
   const name = special[event.key] ?? event.key.toLowerCase();
   if (held.includes(name)) { held = held.filter((key) => key != name); send([]); }
 });
 const letGo = () => { if (held.length) { held = []; send([]); } };
 addEventListener("blur", letGo);
 addEventListener("visibilitychange", letGo);
 const stream = new EventSource("/stream?tab=" + tab);
 stream.onmessage = (event) => {
   const message = JSON.parse(event.data);
   if (message.over) { stream.close(); element.notice.textContent = "Stopped. Start iris_play.py again to go on."; return; }
   element.picture.src = message.picture;
   element.notice.textContent = message.notice;
   element.header.textContent = message.header.join("\\n");
 };
 stream.onerror = () => { element.notice.textContent = "No connection; trying again."; };
</script>"""


class Page:
    """A page in the browser. Pictures go out as server-sent events; each press and each release comes in as a request.

    Any site that you visit may send requests to 127.0.0.1, so what comes from another origin is refused.
    """

    def __init__(self, host: str, port: int, title: str, commands: dict[str, str], help_text: str):
        self.changed, self.message, self.number, self.over = threading.Condition(), b"", 0, False
        self.held: dict[str, list[str]] = {}  # browser tab -> the keys held in it
        self.counts: dict[str, int] = {}  # browser tab -> number of its latest message
        self.pressed: list[str] = []
        self.names = [*MEANINGS, *commands]
        parts = {"title": title, "commands": json.dumps(commands), "names": json.dumps(self.names), "help": json.dumps(help_text)}
        self.page = re.sub(r"\$(title|commands|names|help)", lambda match: parts[match[1]], PAGE).encode()
        page = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments) -> None:
                pass

            def answer(self, status: int, content: bytes = b"", kind: str = "text/plain") -> None:
                self.send_response(status)
                for name, value in (
                    ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(content))),
                    ("Cache-Control", "no-store"), ("X-Frame-Options", "DENY"), ("X-Content-Type-Options", "nosniff"),
                ):  # fmt: skip
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def is_foreign(self) -> bool:
                """Whether another site sent this, be it under a name of its own that leads here (DNS rebinding)."""
                address = self.headers.get("Host", "")
                name = re.sub(r":\d+$", "", address).strip("[]")
                ours = name in ("localhost", host, socket.gethostname()) or re.fullmatch(r"[0-9.]+|[0-9a-f:]+", name)
                origin = self.headers.get("Origin")
                site = self.headers.get("Sec-Fetch-Site", "none")
                entering = self.path == "/" and self.headers.get("Sec-Fetch-Mode") == "navigate"  # a link to the page
                return not ours or origin not in (None, f"http://{address}") or (
                    site not in ("same-origin", "none") and not entering
                )

            def do_GET(self) -> None:
                if self.is_foreign():
                    self.answer(403, b"This page answers requests of its own only.")
                elif self.path == "/":
                    self.answer(200, page.page, "text/html")
                elif self.path.startswith("/stream?tab="):
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream")
                    self.send_header("Cache-Control", "no-store")
                    self.end_headers()
                    page.stream(self.path.removeprefix("/stream?tab=")[:20], self.wfile.write)
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
                except (ValueError, TypeError, KeyError):
                    self.answer(400, b"Not a message about keys.")

        try:
            self.server = ThreadingHTTPServer((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise IrisError(f"can't serve at {host}:{port} ({error}): choose another --port") from error
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        port = self.server.server_port
        print(
            f"Open http://{host}:{port} in a browser. From another machine: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE, "
            f"then http://localhost:{port}", flush=True,
        )  # fmt: skip

    def stream(self, tab: str, write: Callable[[bytes], int]) -> None:
        """Sends a browser tab the newest picture whenever there is one, and leaves out what it is too slow for."""
        sent = -1
        try:
            while True:
                with self.changed:
                    news = self.changed.wait_for(lambda: self.over or self.number != sent, timeout=1.0)
                    sent, message, over = self.number, self.message, self.over
                write(b"data: %s\n\n" % message if news else b": nothing new\n\n")
                if over:
                    return
        except OSError:  # the tab is closed
            pass
        finally:
            self.held.pop(tab, None)

    def receive(self, message: dict) -> None:
        tab, count, pressed, held = str(message["tab"])[:20], int(message["count"]), message["pressed"], message["held"]
        with self.changed:
            self.pressed += [key for key in pressed if key in self.names]
            if count > self.counts.get(tab, 0):
                self.counts[tab], self.held[tab] = count, [key for key in held if key in self.names]

    def show(self, panels: list[np.ndarray], header: list[str], notice: str) -> None:
        _, png = cv2.imencode(".png", paint(panels, [])[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
        picture = "data:image/png;base64," + base64.b64encode(png).decode()
        self.publish({"picture": picture, "header": header, "notice": notice})

    def publish(self, message: dict) -> None:
        with self.changed:
            self.message, self.number, self.over = json.dumps(message).encode(), self.number + 1, "over" in message
            self.changed.notify_all()

    def read(self, deadline: float) -> tuple[list[str], list[str]]:
        time.sleep(max(0.0, deadline - time.perf_counter()))
        with self.changed:
            pressed, self.pressed = self.pressed, []
            held = [key for keys in list(self.held.values()) for key in keys]
        return pressed, held + [key for key in pressed if key not in held]

    def close(self) -> None:
        self.publish({"over": True})
        time.sleep(0.2)  # for the tabs to hear of it
        self.server.shutdown()
        self.server.server_close()


# ---------------------------------------------------------------------------------------------------------------------
# Recordings
# ---------------------------------------------------------------------------------------------------------------------


class Recording:
    """Steps that are being kept: a video as it goes, and in the end the columns that a run's own episodes have too."""

    def __init__(self, folder: Path, fps: float):
        name, folder = time.strftime("%Y%m%d_%H%M%S"), folder / "media/recordings"
        taken = len(list(folder.glob(f"{name}*.npz")))  # two in a second
        self.path = folder / (f"{name}_{taken}.npz" if taken else f"{name}.npz")
        self.video, self.steps = Video(str(self.path.with_suffix(".mp4")), fps, header=True), []
        print(f"Recording {self.path}", flush=True)

    def add(self, before: View, after: View, header: list[str]) -> None:
        """A step, and the picture that it began with."""
        self.video.show(before.panels, header, "")
        self.steps.append((before.frame, after.action, after.reward, after.end))

    def close(self, keep: bool = True) -> None:
        if not keep or not self.steps:
            if self.video.writer:
                self.video.writer.release()
            self.video.path.unlink()
            return
        self.video.close()
        frames, actions, rewards, ends = (np.array(column) for column in zip(*self.steps, strict=True))
        columns = {"frames": frames, "actions": actions, "rewards": rewards.astype(np.float32), "ends": ends.astype(np.uint8)}
        np.savez_compressed(self.path, **columns, **{"return": float(rewards.sum())})
        print(f"{self.path}: {len(frames)} steps, return {rewards.sum():g}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------

COMMANDS = {"enter": "start anew", ".": "pause", "e": "a step, while paused", "m": "hand over", ",": "record", "q": "quit"}


def play(world, controllers: list, screen, names: list[str], args: Args, folder: Path, episodes: int = 0) -> None:
    """Steps the world with the actions of the controller in charge, the first, and shows it, until `q`, or after
    args.steps steps or so many episodes (0 is any number). Each controller sees everything, so `m` can hand over."""
    charge, paused, recording, ended, steps, busy = 0, False, None, 0, 0, 0.0
    view, fresh = world.reset(), True
    for controller in controllers:
        controller.reset()
    started = deadline = time.perf_counter()

    def ask(question: str) -> bool:
        """Waits for y or n; who leaves without an answer loses nothing."""
        while True:
            screen.show(view.panels, header, question)
            pressed, _ = screen.read(time.perf_counter() + 0.05)
            if {"y", "n", "q"} & set(pressed):
                return "n" not in pressed

    try:
        while True:
            began = time.perf_counter()
            if fresh:
                thoughts = [thought for controller in controllers if (thought := controller.look(view))]
                if args.save and recording is None and not view.end:
                    recording = Recording(folder, args.fps)
            action = "-" if view.action is None else names[view.action]
            header = [
                f"step {view.step}   action {action}   reward {view.reward:g}   return {view.total:g}   "
                f"{'over' if view.end else view.label or controllers[charge].name}", *thoughts,
            ]  # fmt: skip
            notice = "   ".join(["paused"] * paused + ["recording"] * (recording is not None))
            screen.show(view.panels, header, notice)
            busy += time.perf_counter() - began
            pressed, held = screen.read(deadline)
            deadline = max(deadline, time.perf_counter()) + 1 / args.fps
            began, fresh, before = time.perf_counter(), True, view
            paused ^= "." in pressed
            charge = (charge + ("m" in pressed)) % len(controllers)
            if "," in pressed:
                recording = recording.close() if recording else Recording(folder, args.fps)
            asked = next((key for key in pressed if key in world.commands), None)
            if "q" in pressed:
                break
            elif asked:
                view = world.commands[asked][1]()
            elif "enter" in pressed or (view.end and not paused):
                if args.save and recording:
                    recording = recording.close(ask("Keep this episode?   y / n"))
                view = world.reset()
            elif not view.end and (not paused or "e" in pressed):
                view = world.step(controllers[charge].choose(held))
                steps += 1
                if recording:
                    recording.add(before, view, header)
                if view.end:
                    ended += 1
                    print(f"Episode {ended}: {view.step} steps, return {view.total:g}", flush=True)
            else:
                fresh = False  # nothing new to see
            if view.step == 0 and fresh:
                for controller in controllers:
                    controller.reset()
            busy += time.perf_counter() - began
            if (episodes and ended == episodes and view.end) or (args.steps and steps == args.steps):
                screen.show(view.panels, header, "")
                break
    finally:  # also when stopped with Ctrl-C: what was recorded is kept
        if recording:
            recording.close()
        rate = steps / (time.perf_counter() - started)
        screen.close()
        if steps:
            seconds = busy / steps
            print(f"{steps} steps, {rate:.1f} a second; a step takes {1000 * seconds:.0f} ms, so {1 / seconds:.0f} would do")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation (paper, section 3.1)
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(agent: Agent, train_args: iris_train.Args, args: Args, device: torch.device, checkpoint: Path) -> None:
    """Plays whole test games, at most 16 side by side, and prints what they returned."""
    if args.json:
        try:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).touch()
        except OSError as error:
            raise IrisError(f"can't write {args.json}: {error.strerror}") from error
    settings = replace(
        train_args, test_episodes=args.evaluate, test_envs=min(16, args.evaluate), test_temperature=args.temperature
    )
    began = time.perf_counter()
    games = play_test_episodes(agent, settings, device, args.seed, keep=0)
    seconds, returns = time.perf_counter() - began, np.array([game["return"] for game in games])
    spread = returns.std(ddof=1) / len(returns) ** 0.5 if len(returns) > 1 else None
    published, score = iris_train.published_scores(train_args.env_id), iris_train.human_normalised(train_args.env_id, returns.mean())
    result = {
        "env_id": train_args.env_id, "checkpoint": str(checkpoint), "episodes": args.evaluate,
        "temperature": args.temperature if args.temperature < float("inf") else "inf", "seed": args.seed, "mean": returns.mean(), "standard_error": spread,
        "median": np.median(returns), "min": returns.min(), "max": returns.max(), "human_normalised": score,
        "paper": published.get("iris"), "returns": returns.tolist(),
    }  # fmt: skip
    steps = sum(game["length"] for game in games)
    print(f"{train_args.env_id}: {len(games)} test episodes, {steps} steps, in {iris_train.duration(seconds)}")
    for name in ("mean", "standard_error", "median", "min", "max"):
        if result[name] is not None:
            print(f"  {name.replace('_', ' '):15}{result[name]:10.2f}")
    if score is not None:
        print(f"  human-normalised{score:9.3f}   (0 is a random player's {published['random']}, 1 a human's {published['human']})")
        print(f"  the paper's    {published['iris']:10.2f}   (mean of five agents)")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2, default=float) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Plays. Raises IrisError for what the user can put right."""
    check(args)
    checkpoint = find_checkpoint(args)
    agent, train_args = load_agent(checkpoint)
    train_args.env_id = args.env_id or train_args.env_id
    device = choose_device(args)
    agent.to(device)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    bf16 = has_bf16(device) if args.precision == "auto" else args.precision == "bf16"
    env = make_env(train_args.env_id, train_args.test_noop_max, train_args.test_max_frames)
    if env.action_space.n != agent.world_model.num_actions:
        raise IrisError(
            f"{checkpoint} knows {agent.world_model.num_actions} actions and {train_args.env_id} has "
            f"{env.action_space.n}: name its game with --env-id"
        )
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if args.evaluate:
            return evaluate(agent, train_args, args, device, checkpoint)
        names = action_names(env)
        person, player = Person(names), AgentPlayer(agent, names, args.temperature)
        world = Game(agent, env, device, args.seed, args.reconstruction)
        controllers = [person, player] if args.human else [player, person]
        if args.world_model:
            world = DreamedGame(agent, world)
            controllers = [player, person] if args.agent or args.video else [person, player]
        elif args.episodes:
            world, controllers = RecordedEpisodes(agent, checkpoint.parent, device, args.reconstruction), [player]
        commands = {key: text for key, text in COMMANDS.items() if key != "m" or len(controllers) > 1}
        commands |= {key: text for key, (text, _) in world.commands.items()}
        commands |= {"y": "keep it", "n": "don't keep it"} if args.save else {}
        help_text = "" if args.episodes else f"Actions: {person.help}"
        title = f"IRIS: {train_args.env_id}{', the dream' if args.world_model else ''}"
        episodes = 1 if args.video and not args.steps else 0
        if args.video:
            if args.world_model and not args.steps:
                args = replace(args, steps=1000)
            screen = Video(args.video, args.fps, args.header)
        else:
            print(f"{title} ({checkpoint})", help_text, sep="\n")
            print("Commands: " + "   ".join(f"{key}: {text}" for key, text in commands.items()), flush=True)
            screen = Page(args.host, args.port, title, commands, help_text) if args.web else Window(title, args.header)
        # A published checkpoint lies in a cache, where nobody would look for recordings.
        folder = checkpoint.parent if (checkpoint.parent / "args.json").exists() else Path()
        play(world, controllers, screen, names, args, folder, episodes)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,)))
    except IrisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
