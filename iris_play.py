"""Chapter 5 of IRIS: step into the dream, and watch what was learned.

A world model that predicts the next tokens well is a game engine (IRIS, arXiv 2209.00588). Here a person or the policy
chooses the actions, and the transformer of chapter 2 answers with the next frame. The way of a key to a new picture:

    1. "left" is held on the page                          ->  action 3             choose
    2. the action is appended to the stream of tokens      ->  (1, T + 1)           Dream.step, chapter 2
    3. the transformer samples reward, end, and 16 tokens  ->  (1, 16)              Dream.step, chapter 2
    4. the tokenizer's decoder turns these into a frame    ->  (1, 3, 64, 64)       Tokenizer.decode, chapter 1
    5. the page magnifies it by a whole number             ->  640 x 640 pixels     showPanels, in PAGE

What the player sees of that:
    16 tokens   Each stands for about 16 x 16 pixels. One wrong token, and a ball of two pixels jumps, or is gone.
    sampling    Rewards, ends and tokens are drawn, not argmaxed: the same keys in the same frame give another dream.
    refill      The context holds 20 steps. When it is full, the latest 10 are kept and read again: this step is slower,
                and what was out of sight for 10 steps is forgotten.

Run it:   python iris_play.py                            # the agent of the newest run plays the real game
          python iris_play.py --world-model              # you play in its dream; `--agent`: it plays there itself
          python iris_play.py --compare                  # game and dream side by side, under the same actions
          python iris_play.py --pretrained Breakout --evaluate 100
          python iris_play.py --help                     # all modes; the page names the keys
Read it:  game and dream, who chooses, the loop; evaluation, video files, the page. [paper] is IRIS, [ours] is not.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import base64
import json
import os
import re
import socket
import sys
import threading
import time
import webbrowser
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Iterator

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor
from werkzeug import Request, Response
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.utils import send_file

import iris_train
from iris_agent import Agent, State, sample
from iris_train import IrisError, make_env, to_model, to_stored
from iris_world_model import Dream

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: what is wrong with a video file, IrisError says
Mode = tyro.conf.create_mutex_group(required=False, title="what to do (nothing: the agent plays the real game)")
Source = tyro.conf.create_mutex_group(required=False, title="whose models (nothing: the newest run's under runs/)")


@dataclass
class Args:
    """Plays with a trained IRIS agent, on a page in the browser."""

    world_model: Annotated[bool, Mode] = False  # You play in the dream
    compare: Annotated[bool, Mode] = False  # The game and the dream side by side, under the same actions
    reconstruction: Annotated[bool, Mode] = False  # The game, the same at 64x64, and what the agent sees
    human: Annotated[bool, Mode] = False  # You play the real game: no models are needed, and the agent isn't computed
    episodes: Annotated[bool, Mode] = False  # Shows the run's recorded episodes
    evaluate: Annotated[int, Mode] = 0  # Plays this many whole test games and prints their statistics
    agent: bool = False  # With world_model: the agent plays in the dream
    checkpoint: Annotated[str, Source] = ""  # Checkpoint of a run, or a published one named after its game: Breakout.pt
    run_dir: Annotated[str, Source] = ""  # Folder of a run
    pretrained: Annotated[str, Source] = ""  # A game, as in Breakout, whose published agent is fetched and kept
    env_id: str = ""  # The game, where it is not the one that the checkpoint names
    host: str = "127.0.0.1"  # Address to serve the page at; any but this one lets others on your network play
    port: int = 8765  # Port to serve at, or the next free one; 0 takes any
    video: str = ""  # No page, but a .webm, .mp4, .gif or .webp: one episode, or --steps
    steps: int = 0  # Stop after this many steps; a video is an episode, but of a dream, .gif or .webp 1,000 at most
    fps: float = 15.0  # Steps a second; 15 is an Atari's own speed
    seed: int = 1  # Seed of the game, the policy and the dream
    temperature: float = 0.5  # Of the policy; 0 is always its likeliest action, inf is random play
    json: str = ""  # With evaluate: file for the result
    device: str = "auto"  # cuda, cpu, ...; auto takes a GPU where there is one


# --- The game and the dream -------------------------------------------------------------------------------------------
@dataclass
class Moment:
    """A frame, the step that led to it, and what the agent computes from it (None until then)."""

    frame: np.ndarray  # (64, 64, 3) uint8
    step: int = 0  # of the episode
    total: float = 0.0  # return of the episode so far
    action: int | None = None  # that led here, with its reward; None at the beginning
    reward: float = 0.0
    end: bool = False
    before: Tensor | None = None  # tokens of the frame before
    tokens: Tensor | None = None  # (1, K)
    seen: Tensor | None = None  # (1, 3, 64, 64) in [0, 1], the decoded tokens
    logits: Tensor | None = None  # (1, A) of the policy
    value: float | None = None
    state: State | None = None  # the LSTM's state to start from; `think` replaces it by the one after this frame

    def then(self, frame: np.ndarray, action: int, reward: float, end: bool) -> "Moment":
        """The moment after this one. An LSTM that missed a frame starts anew."""
        state = None if self.logits is None else self.state
        return Moment(frame, self.step + 1, self.total + reward, action, reward, end, self.tokens, state=state)


class World:
    """The real game, and a dream of it. `place` says which of them is played: "game", "dream", or "both".

    A dream begins with a real frame. From then on the real game waits where it was left, unless both are played."""

    def __init__(self, env, agent: Agent | None, device: torch.device, seed: int, place: str, all_views: bool = False):
        self.env, self.device, self.seed, self.home, self.all_views = env, device, seed, place, all_views
        self.dream = Dream(agent.tokenizer, agent.world_model) if agent else None
        self.commands = {"t": self.enter_or_leave} if agent else {}  # key of the page -> what it does

    def reset(self) -> None:
        """The game of the next seed, and its dream."""
        self.real, self.place, self.seed = Moment(self.env.reset(seed=self.seed)[0]), self.home, self.seed + 1
        if self.place != "game":
            self.start_dream()

    def start_dream(self) -> None:
        """A dream that begins with the game's present frame. Step, return and the LSTM's state go on."""
        seen = self.dream.reset(to_model(torch.from_numpy(self.real.frame)[None].to(self.device)))
        frame = to_stored(seen)[0].cpu().numpy()
        self.dreamed = replace(self.real, frame=frame, tokens=self.dream.context, seen=seen)
        self.parted = self.real, self.dreamed  # where game and dream were one

    def enter_or_leave(self) -> None:
        """From the game into the dream, at this very frame; from the dream to the game, where it was left."""
        self.place = {"game": "dream", "dream": "game", "both": "both"}[self.place]
        if self.place != "game":
            self.start_dream()

    def step(self, action: int) -> None:
        if self.place != "dream":
            frame, reward, terminated, truncated, info = self.env.step(action)
            self.real = self.real.then(frame, info.get("recorded", action), float(reward), terminated or truncated)
        if self.place != "game":
            seen, rewards, ends = self.dream.step(torch.tensor([action], device=self.device))
            frame, k = to_stored(seen)[0].cpu().numpy(), self.dreamed.tokens.shape[1]
            self.dreamed = self.dreamed.then(frame, action, rewards.item(), bool(ends))
            self.dreamed.tokens, self.dreamed.seen = self.dream.context[:, -k:], seen

    @property
    def now(self) -> Moment:
        """The moment that the player acts on."""
        return self.dreamed if self.place == "dream" else self.real

    @property
    def ended(self) -> bool:
        return self.now.end or (self.place == "both" and self.dreamed.end)

    def go_on(self) -> None:
        """After an end: a new game; but where only a dream ended that began in mid-game, the game goes on."""
        if self.place == "both" and not self.real.end:
            self.start_dream()
        elif self.place == "dream" and self.home == "game":
            self.place = "game"
        else:
            self.reset()

    def drift(self) -> tuple[int, float] | None:
        """Steps since game and dream were one; their mean absolute difference where either has changed since [ours]."""
        if self.place != "both":
            return None
        real, dream, *then = (m.frame.astype(np.float32) / 255 for m in (self.real, self.dreamed, *self.parted))
        changed = np.maximum(np.abs(real - then[0]), np.abs(dream - then[1])).max(axis=2) > 0.1  # (64, 64)
        difference = float(np.abs(real - dream)[changed].mean()) if changed.any() else 0.0
        return self.real.step - self.parted[0].step, difference

    def panels(self) -> list[tuple[str, np.ndarray, Moment]]:
        """What is shown: for each panel a title, a picture (H, W, 3) uint8, and whose tokens lie over it."""
        small = "At 64 x 64", self.real.frame, self.real
        if self.place != "game":
            dream = "The dream", self.dreamed.frame, self.dreamed
            return [("The game", *small[1:]), dream] if self.place == "both" else [dream]
        screen = np.atleast_3d(self.env.screen)  # (H, W, 1 or 3)
        panels = [(getattr(self.env, "title", "The game"), np.repeat(screen, 3 // screen.shape[2], axis=2), self.real)]
        if self.all_views and self.real.seen is not None:
            panels += [small] * (len(screen) > 64)
            panels.append(("The agent's view", to_stored(self.real.seen)[0].cpu().numpy(), self.real))
        return panels


# --- Who chooses: a person, or the policy -----------------------------------------------------------------------------
# What a key means, in the words that action names are made of; a digit is the action of that number.
KEYS = {"left": "LEFT", "right": "RIGHT", "up": "UP", "down": "DOWN", "space": "FIRE",
        "a": "LEFT", "d": "RIGHT", "w": "UP", "s": "DOWN", **{digit: digit for digit in "0123456789"}}  # fmt: skip
WORDS = re.compile(r"UP|DOWN|LEFT|RIGHT|FIRE|\d+")


def choose(names: list[str], held: list[str]) -> int:
    """The keys held, oldest first -> of the actions whose words are all held the one of most words, and among equals
    the one of the newest keys. With nothing held that is NOOP, or the first action."""
    wanted = list(dict.fromkeys(KEYS[key] for key in held if key in KEYS))
    ages = [[wanted.index(word) if word in wanted else -1 for word in WORDS.findall(name)] for name in names]
    possible = [action for action in range(len(names)) if -1 not in ages[action]]
    return max(possible, key=lambda action: (len(ages[action]), sorted(ages[action], reverse=True)), default=0)


def think(agent: Agent, moment: Moment, device: torch.device) -> None:
    """Fills in what the agent computes, once for each moment. The policy sees decoded tokens [paper]."""
    if moment.logits is None:
        if moment.seen is None:  # a real frame
            moment.tokens = agent.tokenizer.encode(to_model(torch.from_numpy(moment.frame)[None].to(device)))
            moment.seen = agent.tokenizer.decode(moment.tokens)
        state = moment.state or agent.actor_critic.initial_state(1)
        moment.logits, value, moment.state = agent.actor_critic(moment.seen, state)
        moment.value = value.item()


# --- The loop ---------------------------------------------------------------------------------------------------------
def play(world: World, agent: Agent | None, screen, names: list[str], args: Args, folder: Path, who: str = "agent",
         episodes: int = 0) -> None:  # fmt: skip
    """Shows the world, and steps it with the actions of who is in charge, "you" or "agent"; until `q`, or args.steps
    steps, or this many episodes (0 is any number). Recordings go to folder/media/recordings. Raises IrisError."""
    world.reset()
    paused, stepped, recording, trouble, fps, played, returns = False, False, None, "", args.fps, 0, []
    keys = ["enter", *".e,-+q", *"m" * bool(agent and not args.episodes)]
    history: deque = deque(maxlen=100)  # value, reward and drift of the latest steps
    began = deadline = time.perf_counter()
    try:
        while True:
            # Look. With --human, the agent is not computed unless it plays, or a dream is on.
            moment = world.now
            if agent and (who == "agent" or not args.human or world.place != "game"):
                think(agent, moment, world.device)
            policy = None if moment.logits is None else moment.logits / max(args.temperature, 1e-6)  # (1, A)

            # Show.
            panels, drift = world.panels(), world.drift()
            if stepped:
                history.append((moment.value, moment.reward, drift and drift[1]))
            screen.show(panels, {
                "place": world.place, "who": who, "names": names, "step": moment.step, "return": moment.total,
                "action": moment.action, "reward": moment.reward, "end": world.ended, "value": moment.value,
                "policy": None if policy is None else policy[0].softmax(dim=0).tolist(), "drift": drift, "fps": fps,
                "traces": list(zip(*history)), "paused": paused, "recording": bool(recording), "trouble": trouble,
                "keys": [*keys, *world.commands],
            })  # fmt: skip
            if (args.steps and played == args.steps) or (episodes and len(returns) == episodes):
                break

            # Read the keys.
            pressed, held = screen.read(deadline)
            deadline, stepped = max(deadline, time.perf_counter()) + 1 / fps, False
            if "q" in pressed:
                break
            paused ^= "." in pressed
            if faster := ("+" in pressed) + ("=" in pressed) - ("-" in pressed):
                fps = min(240.0, max(1.0, fps * 1.5**faster))
            if "m" in pressed and "m" in keys:
                who = "you" if who == "agent" else "agent"
            if "," in pressed:
                old, recording, trouble = recording, None, ""
                try:
                    if old:
                        screen.recorded = old.close() or screen.recorded
                    else:
                        recording = Video(folder / time.strftime("media/recordings/%Y%m%d_%H%M%S.webm"), fps)
                        recording.show(panels)
                except IrisError as error:  # a game goes on even if the disk is full
                    trouble = str(error)

            # Act.
            if asked := [key for key in pressed if key in world.commands and (key == "t" or world.place == world.home)]:
                world.commands[asked[0]]()
                paused |= asked[0] in ("left", "right", "up", "down")
            elif "enter" in pressed:
                world.reset()
            elif world.ended and not paused:
                world.go_on()
            elif not world.ended and (not paused or "e" in pressed):
                world.step(int(sample(policy)) if who == "agent" and policy is not None else choose(names, held))
                stepped, played = True, played + 1
                if recording:
                    recording.show(world.panels())
                returns += [world.now.total] if world.now.end else []
    finally:  # also when stopped with Ctrl-C: what was recorded is kept
        screen.close()
        if recording:
            recording.close()
        print(f"{played} steps, {played / (time.perf_counter() - began):.1f} a second; {len(returns)} episodes"
              + (f" of mean return {np.mean(returns):g}" if returns else ""))  # fmt: skip


# --- Evaluation [paper, section 3.1] ----------------------------------------------------------------------------------
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


def evaluate(agent: Agent, settings: iris_train.Args, args: Args, device: torch.device, checkpoint: Path) -> None:
    """Plays whole test games, at most 16 side by side, and prints what they returned."""
    settings.test_episodes, settings.test_envs = args.evaluate, min(16, args.evaluate)
    settings.test_temperature, env_id = args.temperature, settings.env_id
    games = iris_train.play_test_episodes(agent, settings, device, args.seed, keep=0)
    returns, n = np.array([game["return"] for game in games]), len(games)
    statistics = {
        "mean": returns.mean(), "standard_error": returns.std(ddof=1) / n**0.5 if n > 1 else None,
        "median": np.median(returns), "min": returns.min(), "max": returns.max(),
        "human_normalised": human_normalised(env_id, returns.mean()), "paper": published_scores(env_id).get("iris"),
    }  # fmt: skip
    print(f"{env_id}: {n} test episodes, {sum(game['length'] for game in games)} steps")
    for name, value in statistics.items():
        print(f"  {name.replace('_', ' '):17}{'-' if value is None else format(value, '.2f'):>9}")
    if args.json:
        how = {"env_id": env_id, "checkpoint": str(checkpoint), "episodes": n, "temperature": str(args.temperature)}
        result = how | statistics | {"seed": args.seed, "returns": returns.tolist()}
        write(Path(args.json), json.dumps(result, indent=2).encode() + b"\n")


# --- Video files ------------------------------------------------------------------------------------------------------
def paint(panels: list[tuple], height: int) -> np.ndarray:
    """Panels side by side, each magnified by a whole number to at most a height -> (height + 24, W, 3) uint8."""
    columns = []
    for title, picture, _ in panels:
        times = max(1, height // picture.shape[0])
        picture = picture.repeat(times, axis=0).repeat(times, axis=1)
        right = 8 - picture.shape[1] % 8  # codecs need even numbers
        columns.append(np.pad(picture, ((24, max(0, height - picture.shape[0])), (0, right), (0, 0))))
        cv2.putText(columns[-1], title, (2, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (230, 230, 230), 1, cv2.LINE_AA)
    return np.concatenate(columns, axis=1)


class Video:
    """A screen that is a file: each step once, as fast as they come. Browsers play .webm (VP8); an .mp4 (MPEG-4 Part 2)
    is for other programs. It is written under another name, read back, and renamed: so it is whole or not there."""

    def __init__(self, path: Path, fps: float):
        self.path, self.beside, self.fps = path, path.with_name("." + path.name), fps
        self.pictures, self.writer, self.count = [], None, 0
        write(self.beside, b"")  # says before anything is played if there can be no file

    def show(self, panels: list[tuple], status: dict | None = None) -> None:
        code, self.count = {".webm": "VP80", ".mp4": "mp4v"}.get(self.path.suffix), self.count + 1
        picture = np.ascontiguousarray(paint(panels, 448 if code else 256)[..., ::-1])
        if not code:
            return self.pictures.append(picture)
        if not self.writer:
            self.size, stderr = picture.shape[1::-1], os.dup(2)
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)  # OpenCV complains about the name of VP8, and then takes it
            self.writer = cv2.VideoWriter(str(self.beside), cv2.VideoWriter_fourcc(*code), self.fps, self.size)
            os.dup2(stderr, 2)
            os.close(stderr)
        self.writer.write(cv2.resize(picture, self.size))  # it changes where the number of panels does

    def read(self, deadline: float) -> tuple[list[str], list[str]]:
        return [], []

    def close(self) -> Path | None:
        """None if nothing was shown. Raises IrisError if the file is not whole."""
        whole = True
        if self.pictures:
            times = np.round(np.arange(self.count + 1) * 100 / self.fps) * 10  # a GIF counts hundredths of a second
            animation = cv2.Animation()
            animation.frames, animation.durations = self.pictures, np.diff(times).astype(np.int32)
            _, content = cv2.imencodeanimation(self.path.suffix, animation, [cv2.IMWRITE_GIF_QUALITY, 1])
            self.beside.unlink()
            write(self.path, content.tobytes())
        elif self.writer:
            self.writer.release()
            whole = sum(iter(cv2.VideoCapture(str(self.beside)).grab, False)) == self.count
            if whole:
                self.beside.replace(self.path)
        self.beside.unlink(missing_ok=True)
        if not whole:
            raise IrisError(f"can't write {self.path} whole: is the disk full?")
        if self.count:
            print(f"{self.path}: {self.count} frames", flush=True)
        return self.path if self.count else None


# --- The page ---------------------------------------------------------------------------------------------------------
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><link rel=icon href="data:,"><title>IRIS</title>
<meta name=viewport content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --text: light-dark(#1c2128, #e6e9ee); --soft: light-dark(#57606a, #9aa4b0);
  --card: light-dark(#fff, #191d23); --line: light-dark(#d0d5dc, #2f363f); --main: light-dark(#0b62c4, #62a8ff) }
* { box-sizing: border-box; margin: 0 } [hidden] { display: none !important } header { display: flex; gap: 0 16px }
body { display: grid; grid: "head head" auto "main side" 1fr "bar bar" auto / minmax(0, 1fr) 312px; gap: 8px;
  padding: 8px 12px; height: 100dvh; overflow: hidden; font: 15px/1.35 system-ui, sans-serif; color: var(--text);
  background: light-dark(#eef0f3, #0f1216) } header { grid-area: head; align-items: baseline }
h1 { font-size: 18px; flex: none; max-width: 100% }
#notice { color: light-dark(#b34700, #ffb454); font-weight: 600 } #about { flex: 1 } #about, dt { color: var(--soft) }
main { grid-area: main; container-type: size; display: flex; gap: 0 16px; flex-wrap: wrap; place-content: center }
/* A pixel of a picture, whose height is --pixels of them, takes a whole number of the screen's pixels. */
.frame { position: relative; aspect-ratio: var(--ratio); height: max(var(--pixels), round(down,
  min(100cqh - 26px, (100cqw - 32px) / var(--ratios)), var(--pixels))) } img { image-rendering: pixelated }
.frame > * { position: absolute; inset: 0; width: 100%; height: 100% } .note { background: var(--card); padding: 9% }
figcaption { height: 26px; contain: inline-size; overflow: hidden; white-space: nowrap; font-weight: 600 }
.tokens { display: grid; grid: auto-flow 1fr / repeat(var(--side), 1fr); font-size: 14px; text-shadow: 0 0 3px #000 }
.tokens b { border: 1px solid #fff4; padding: 0 4px; overflow: hidden; color: #fff }
.tokens .on { border: 3px solid #ffd60a; padding: 0 2px; background: #ffd60a30 }
aside { grid-area: side; display: flex; flex-direction: column; gap: 8px; min-height: 0 } h2 b { color: var(--text) }
section, button, b[id], a { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 6px }
h2 { font-size: 14px; display: flex; justify-content: space-between; color: var(--soft) } dd { font-weight: 600 }
dl { display: grid; grid-template-columns: auto 1fr auto 1fr; gap: 2px 10px; white-space: nowrap }
#shares { display: grid; grid-template-columns: auto 1fr auto; gap: 2px 8px; align-items: center; font-size: 14px }
#shares .on { color: var(--main); font-weight: 600 } .many { line-height: 1.15 } video { width: 100%; height: 120px }
aside:has(.many) :is(#rewards, #keys) { display: none } #pad b { display: grid; place-items: center }
s { height: 11px; background: linear-gradient(var(--main) 0 0) 0 / var(--share) no-repeat, var(--line) }
svg { width: 100%; height: 56px; display: block; fill: none; stroke: var(--main); stroke-width: 2 }
nav { grid-area: bar; display: flex; flex-wrap: wrap; gap: 6px; justify-content: center }
button, a { font: inherit; font-size: 14px; color: var(--text); text-decoration: none; white-space: nowrap }
section { padding: 6px 11px } nav button::before { content: attr(value); margin-right: 7px; font-family: monospace }
[aria-pressed=true], #pad .on { background: var(--main); color: light-dark(#fff, #0f1216) }
#pad { grid-area: pad; display: none; justify-content: space-between; touch-action: none; user-select: none }
#pad b:empty { opacity: 0 } #cross { display: grid; grid: repeat(3, 42px) / repeat(3, 42px) }
@media (pointer: coarse) { #pad { display: flex } nav button::before, #keys { display: none } }
@media (max-width: 800px) and (orientation: portrait) {
  body { grid: "head" auto "main" 1fr "side" auto "pad" auto "bar" auto / minmax(0, 1fr); gap: 5px; padding: 5px }
  header { flex-wrap: wrap } aside { display: grid; grid: auto / 1fr 1fr; gap: 5px } section { padding: 3px 8px }
  #about, #rewards, #keys, #policy:has(.many), aside:has(#drifts:not([hidden])) #policy { display: none }
  dl { grid-template-columns: repeat(3, auto 1fr); gap: 0 6px } section:has(dl) { grid-column: 1 / 3; font-size: 14px }
  nav button { padding: 4px 6px; flex: 1 } .tokens b { color: #0000; text-shadow: none }
}
@media (max-height: 520px) {
  #policy, #rewards, #drifts, #keys { display: none } #pad { position: fixed; inset: auto 8px 80px; opacity: .7 }
}
</style>
<header><h1 id=title>IRIS</h1><span id=about></span><span id=notice role=status>Connecting</span></header> <main></main>
<aside><section><dl id=facts></dl></section> <section id=policy><h2>Policy</h2><div id=shares></div></section>
<section id=values></section> <section id=rewards></section> <section id=drifts></section>
<section id=keys><h2>Keys</h2><span id=help></span></section> <section id=recorded hidden>
<h2>Recording <a id=download download>download</a></h2><video id=clip controls preload=auto></video></section></aside>
<div id=pad><div id=cross></div><b id=space>FIRE</b></div> <nav id=bar></nav>
<script>
const el = (id) => document.getElementById(id), tab = Math.random().toString(36), buttons = {}, down = {};
const nameOf = (event) => event.key.toLowerCase().replace("arrow", "").replace(" ", "space");
let count = 0, latest = null, tokensShown = false;
document.querySelector("main").innerHTML = `<figure><figcaption></figcaption><div class=frame><img alt="">
  <div class=tokens></div><div class=note></div></div></figure>`.repeat(3);
const arms = {"up left": "", up: "&#x25B4;", "up right": "", left: "&#x25C2;", "": "", right: "&#x25B8;",
  "down left": "", down: "&#x25BE;", "down right": ""};
el("cross").innerHTML = Object.entries(arms).map(([keys, arrow]) => `<b id="${keys}">${arrow}</b>`).join("");

// --- What the server sends
function show(message) {
  latest = message;
  const {place, who, names, action, paused, recording, policy, traces, drift, file, panels} = message;
  const where = {game: "the game", dream: "the dream", both: "game and dream"}[place];
  const marks = {paused, recording, "the end": message.end, [message.trouble]: true, [message.warning]: true};
  const notice = Object.keys(marks).filter((text) => text && marks[text]).join(" · ");
  const texts = {title: `IRIS: ${message.game}, ${where}`, about: message.about, help: message.help, notice};
  for (const id in texts) el(id).textContent = texts[id];
  const facts = {Step: message.step, Return: message.return, Plays: who, Action: names[action] ?? "-",
    Reward: message.reward, Speed: message.fps.toFixed(0)};
  el("facts").innerHTML = Object.entries(facts).map(([name, fact]) => `<dt>${name}<dd>${fact}`).join("");
  el("policy").hidden = !policy;
  el("shares").className = names.length > 9 ? "many" : "";
  el("shares").innerHTML = (policy ?? []).map((share, i) => `<span class=${i == action && "on"}>${names[i]}</span>
    <s style="--share: ${100 * share}%"></s><span>${Math.round(100 * share)}%</span>`).join("");
  trace("values", "Value", traces[0], message.value?.toFixed(2));
  trace("rewards", "Reward", traces[1], message.reward);
  trace("drifts", "Error", traces[2], drift && `${drift[1].toFixed(3)}, step ${drift[0]}`);
  el("recorded").hidden = !file;
  if (file && !el("clip").src.endsWith(file)) el("clip").src = el("download").href = file;
  document.querySelectorAll("figure").forEach((figure, i) => {
    figure.hidden = !panels[i];
    if (panels[i]) showPanel(panels[i], figure.children[0], figure.children[1]);
  });
  document.body.style = `--ratios: ${panels.reduce((sum, panel) => sum + panel.width / panel.height, 0)}`;
  const dreams = {game: "into the dream", dream: "back to game", both: "dream anew"};
  const labels = {m: who == "you" ? "agent" : "take over", t: dreams[place], enter: "restart", e: "one step",
    ".": paused ? "resume" : "pause", ",": recording ? "stop" : "record",
    n: "next", p: "previous", h: "start", left: "1 back", right: "1 on", down: "10 back", up: "10 on", g: "tokens",
    "-": "slower", "+": "faster", f: "full screen", q: "quit"};
  const on = {".": paused, ",": recording, g: tokensShown, f: document.fullscreenElement, t: place == "dream"};
  for (const key of Object.keys(labels).filter((key) => ["g", "f", ...message.keys].includes(key))) {
    buttons[key] ??= el("bar").appendChild(document.createElement("button"));
    Object.assign(buttons[key], {value: key, textContent: labels[key], ariaPressed: !!on[key]});
  }
}
function showPanel(panel, title, frame) {
  const [image, tokens, note] = frame.children, noise = latest.noise[panel.title];
  frame.style = `--pixels: ${panel.height / devicePixelRatio}px; --ratio: ${panel.width} / ${panel.height}`;
  title.textContent = panel.title;
  image.src = panel.png;
  Object.assign(note, {hidden: !noise, textContent: noise});
  Object.assign(tokens, {hidden: !tokensShown, style: `--side: ${Math.sqrt(panel.tokens.length)}`});
  tokens.innerHTML = panel.tokens.map((token, i) => `<b class=${panel.changed[i] && "on"}>${token}</b>`).join("");
}
function trace(id, title, values, text) {
  const known = (values ?? []).map((value) => value ?? 0), low = Math.min(0, ...known);
  const high = Math.max(low + 0.01, ...known);
  const points = known.map((value, i) => `${i},${37 - 34 * (value - low) / (high - low)}`).join(" ");
  el(id).hidden = (text ?? null) === null;
  el(id).innerHTML = `<h2>${title}<b>${text}</b></h2><svg viewBox="0 0 100 40" preserveAspectRatio=none>
    <polyline vector-effect=non-scaling-stroke points="${points}" /></svg>`;
}
const events = new EventSource("/pictures");  // connects again by itself
events.onerror = () => el("notice").textContent = "No connection: iris_play.py has stopped, or the line is broken";
events.onmessage = (event) => show(JSON.parse(event.data));

// --- What the player does. Over a slow line messages may change order: each has a number, and older ones are ignored.
const send = (pressed) => fetch("/keys", {method: "POST", keepalive: true,
  body: JSON.stringify({tab, count: ++count, pressed, held: Object.values(down).flat()})}).catch(() => {});
setInterval(() => Object.keys(down).length && send([]), 300);  // "still held": without it, a key is let go
function hold(place, keys) {  // `place` is a physical key, or a part of the pad
  if (!keys.length == !down[place]) return;
  keys.length ? down[place] = keys : delete down[place];
  send(keys);
}
function press(key) {
  if (key == "g") tokensShown = !tokensShown;
  else if (key == "f") document.fullscreenElement ? document.exitFullscreen() : document.body.requestFullscreen();
  else send([key]);
  show(latest);
}
for (const type of ["pointerdown", "pointerover", "pointerup", "pointerout", "pointercancel"])
  el("pad").addEventListener(type, ({target, buttons, pointerId}) => {
    const on = buttons > 0 && ["pointerdown", "pointerover"].includes(type) && target.tagName == "B";
    if (target.hasPointerCapture(pointerId)) target.releasePointerCapture(pointerId);  // a finger may slide on
    target.classList.toggle("on", on);
    hold(target.id, on ? target.id.split(" ") : []);
  });
for (const type of ["blur", "visibilitychange"])
  addEventListener(type, () => Object.keys(down).forEach((place) => hold(place, [])));
addEventListener("keydown", (event) => {
  const key = nameOf(event), isAction = /^(left|right|up|down|space|[wasd0-9])$/.test(key);
  const onButton = "BUTTON A VIDEO".includes(document.activeElement.tagName) && ["enter", "space"].includes(key);
  if (event.ctrlKey || event.metaKey || event.altKey || onButton || !(isAction || buttons[key] || key == "=")) return;
  event.preventDefault();
  if (!event.repeat) isAction ? hold(event.code || key, [key]) : press(key);
});
addEventListener("keyup", (event) => hold(event.code || nameOf(event), []));
el("bar").onclick = ({target, detail}) => {
  if (target.value) press(target.value);
  if (detail) target.blur();  // after the mouse, Enter and space belong to the game again
};
</script>"""


class Page:
    """A screen in the browser. The server pushes a message for each picture; a tab tells of each key pressed or let go.

    Any site that you visit may send requests to 127.0.0.1, so those from another origin, or for another name (DNS
    rebinding), are refused."""

    def __init__(self, host: str, port: int, fixed: dict):
        """Serves at the first free port from `port` on, and waits for the first visitor. Raises IrisError."""
        self.fixed, self.message, self.number, self.changed = fixed, "{}", 0, threading.Condition()
        self.tabs: dict[str, tuple[int, float, list[str]]] = {}  # number and time of its latest message, keys held
        self.pressed, self.recorded, self.visited, name = [], None, threading.Event(), socket.gethostname().lower()
        family, own, listener = socket.AF_INET6 if ":" in host else socket.AF_INET, port, None
        while not listener:
            try:
                listener = socket.create_server((host, own), family=family, backlog=256)
            except (OSError, OverflowError) as error:
                if "in use" not in str(error):
                    raise IrisError(f"can't serve at {host}:{own} ({error}): choose another --host, --port") from error
                own += 1
        # A request that is half sent after 10 seconds is dropped.
        handler = type("Handler", (WSGIRequestHandler,), {"timeout": 10, "log": lambda *_: None})
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)  # a slow line leaves pictures out
        self.hosts, own = {host.lower(), name, "localhost"}, listener.getsockname()[1]
        self.server = make_server(host, own, self.respond, True, request_handler=handler, fd=listener.fileno())
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        address = f"http://{name if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host}:{own}"
        taken = f" (port {port} is taken)" if port not in (0, own) else ""
        print(f"Open {address} in a browser{taken}. From elsewhere: ssh -L {own}:127.0.0.1:{own} {name}", flush=True)
        if {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & {*os.environ} or sys.platform != "linux":
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        while not self.visited.wait(0.1):
            pass

    @Request.application
    def respond(self, request: Request) -> Response:
        path, own, name = request.path, f"http://{request.host}", re.sub(r":\d+$", "", request.host.lower()).strip("[]")
        is_ours = name in self.hosts or re.fullmatch(r"[\d.]+|[\da-f:]*:[\da-f:]*", name)  # a number can't be rebound
        by_site = request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and path != "/"
        if not is_ours or by_site or request.headers.get("Origin", own) != own:
            return Response("This page answers requests of its own only.", 403)
        if path == "/":
            return Response(PAGE, mimetype="text/html", headers={"X-Frame-Options": "DENY"})
        if path == "/pictures":
            return Response(self.messages(), mimetype="text/event-stream")
        if self.recorded and path == f"/{self.recorded.name}":
            return send_file(self.recorded, request.environ)
        if path != "/keys":
            return Response("There is nothing here.", 404)
        request.max_content_length = 10_000
        try:
            message = json.loads(request.get_data())
            tab, count, pressed, held = (message[name] for name in ("tab", "count", "pressed", "held"))
            with self.changed:
                if int(count) > self.tabs.get(str(tab), (0,))[0]:
                    self.tabs[str(tab)] = int(count), time.perf_counter(), [*map(str, held)]
                self.pressed += map(str, pressed)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return Response("This is no message about keys.", 400)
        return Response(status=204)

    def messages(self) -> Iterator[str]:
        """The newest message, as soon as there is another; after 5 seconds the same one, which shows who has left."""
        number = 0
        self.visited.set()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.number != number, timeout=5)
                number, message = self.number, self.message
            if number:
                yield f"data: {message}\n\n"

    def show(self, panels: list[tuple], status: dict) -> None:
        pictures = []
        for title, picture, moment in panels:
            png = base64.b64encode(cv2.imencode(".png", picture[..., ::-1])[1]).decode()
            tokens, before = ([] if x is None else x[0].tolist() for x in (moment.tokens, moment.before))
            changed, (height, width, _) = [new != old for new, old in zip(tokens, before)], picture.shape
            pictures.append({"title": title, "png": "data:image/png;base64," + png, "height": height, "width": width,
                             "tokens": tokens, "changed": changed})  # fmt: skip
        status |= {"panels": pictures, "file": self.recorded.name if self.recorded else ""}
        with self.changed:
            self.message, self.number = json.dumps(self.fixed | status), self.number + 1
            self.changed.notify_all()

    def read(self, deadline: float) -> tuple[list[str], list[str]]:
        """Waits -> keys pressed since the last call, and keys held now. A tap counts for a step."""
        time.sleep(max(0.0, deadline - time.perf_counter()))
        alive = time.perf_counter() - 1.5  # a tab may have been closed, or the line broken, with a key held
        with self.changed:
            self.tabs = {tab: state for tab, state in self.tabs.items() if state[1] > alive}
            pressed, self.pressed, held = self.pressed, [], [key for *_, keys in self.tabs.values() for key in keys]
        return pressed, held + [key for key in pressed if key not in held]

    def close(self) -> None:
        self.server.shutdown()


# --- Skip on first reading: recorded episodes, files, start-up --------------------------------------------------------
class Recorded:
    """The episodes in media/episodes/{test,train,imagination}, as an environment that doesn't heed the action."""

    def __init__(self, folder: Path):
        kinds = "test", "train", "imagination"
        self.paths, self.number = [path for kind in kinds for path in sorted(folder.glob(f"{kind}/*.npz"))], 0
        if not self.paths:
            raise IrisError(f"there are no recorded episodes in {folder.resolve()}: evaluations record some")

    def reset(self, seed: int) -> tuple[np.ndarray, dict]:
        path = self.paths[self.number % len(self.paths)]
        try:
            with np.load(path) as file:
                self.frames, self.actions, self.rewards = file["frames"], file["actions"], file["rewards"]
        except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
            raise IrisError(f"{path} can't be read ({error}): move it away") from error
        self.title, self.at, self.screen = f"{path.parent.name}/{path.stem}", 0, self.frames[0]
        return self.screen, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """After the last step there is no frame: the one before stays."""
        self.at, last = self.at + 1, self.at
        self.screen = self.frames[min(self.at, len(self.frames) - 1)]
        end, info = self.at == len(self.frames), {"recorded": int(self.actions[last])}
        return self.screen, self.rewards[last], end, False, info

    def move(self, world: World, episodes: int, steps: int) -> None:
        """So many episodes or, in the present one, steps on; 0 and 0 is its start."""
        target = max(0, world.now.step + steps) if steps else 0
        if steps <= 0:
            self.number += episodes
            world.reset()
        while world.now.step < target and not world.ended:
            world.step(0)


def write(path: Path, content: bytes) -> None:
    try:
        iris_train.write_file(path, lambda file: file.write(content))
    except OSError as error:
        raise IrisError(f"can't write {path}: {error.strerror}") from error


PRETRAINED_URL = "https://huggingface.co/eloialonso/iris/resolve/main/pretrained_models/{}.pt"
MODELS = Path(__file__).parent / "results" / "models"


def find_checkpoint(args: Args) -> Path | None:
    """The checkpoint that the arguments speak of; None where a person plays and there is none. Raises IrisError."""
    if args.pretrained:
        make_env(f"{args.pretrained}NoFrameskip-v4").close()  # says what was meant if there is no such game
        path = Path(torch.hub.get_dir(), "checkpoints", "iris", f"{args.pretrained}.pt")
        url = PRETRAINED_URL.format(args.pretrained)
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise IrisError(f"can't fetch it ({error}): put {path.name} (from {url}) into {path.parent}") from error
        return path
    if args.checkpoint or args.run_dir:
        return iris_train.checkpoint_path(args.checkpoint or args.run_dir)
    runs = Path("runs").glob(re.sub("[/:]", "-", args.env_id) + "*/checkpoint.pt")
    runs = sorted(runs, key=lambda path: path.stat().st_mtime)
    game = re.sub(r".*[:/]|(NoFrameskip)?-v\d+$", "", args.env_id).lower()
    models = sorted(MODELS.glob(f"{game or '*'}.pt"), key=lambda path: path.stem == "breakout")
    if not runs and not models and not args.human:
        raise IrisError("there is no run under runs/: train one (python iris_train.py --preset laptop), or name a file "
                        "with --checkpoint, or a game with --pretrained Breakout")  # fmt: skip
    return [None, *models, *runs][-1]


def check(args: Args) -> None:
    """Raises IrisError for arguments that no mode can have, before anything is loaded."""
    suffix, numbers = Path(args.video).suffix, (args.evaluate, args.steps, args.seed, args.port)
    for wrong, text in (
        (args.agent and not args.world_model, "--agent needs --world-model"),
        (args.json and not args.evaluate, "--json needs --evaluate"),
        (args.video and (args.human or args.evaluate), "--video shows the agent: leave out --human and --evaluate"),
        (args.video and suffix not in (".webm", ".mp4", ".gif", ".webp"),
         f"--video {args.video}: its name has to end in .webm, .mp4, .gif or .webp"),
        (args.json and Path(args.json).is_dir(), f"--json {args.json} is a folder"),
        (suffix in (".gif", ".webp") and (args.steps > 1000 or args.fps > 50), "over 1,000 steps or 50 fps: use .webm"),
        (not 0.5 <= args.fps <= 1000, f"--fps {args.fps} is not from 0.5 to 1,000"),
        (not (args.temperature >= 0 <= min(numbers) and max(numbers) < 2**31), "a number is negative, or too large"),
        (not args.host, "--host is empty, which would be any address: say 0.0.0.0 if that is meant"),
    ):  # fmt: skip
        if wrong:
            raise IrisError(text)


def main(args: Args) -> None:
    """Plays. Raises IrisError for what the user can put right."""
    check(args)
    checkpoint, agent, settings, about, untrained = find_checkpoint(args), None, iris_train.Args(), "no models", {}
    if checkpoint:
        content, settings = iris_train.read_checkpoint(checkpoint)
        agent, _ = iris_train.load_agent(checkpoint)
        epoch = content.get("epoch")  # a published checkpoint has none
        about = f"models of {os.path.relpath(checkpoint)}" + (f", epoch {epoch}" if "epoch" in content else "")
        starts = {name: getattr(settings, f"{name}_from") for name in ("tokenizer", "world_model", "actor_critic")}
        untrained = {name: f"The {name.replace('_', ' ')} is not trained before epoch {start}"
                     for name, start in starts.items() if "epoch" in content and epoch < start}  # fmt: skip
    named, env_id = args.checkpoint or args.run_dir or args.pretrained, args.env_id or settings.env_id
    if args.human and not named and env_id != settings.env_id:
        agent, about, untrained = None, "no models", {}  # those of another game, and a person needs none
    settings.env_id, settings.device = env_id, args.device
    device, bf16 = iris_train.choose_device(settings)
    torch.manual_seed(args.seed)
    env = make_env(env_id, max_frames=settings.test_max_frames)
    meanings = getattr(env.unwrapped, "get_action_meanings", lambda: map(str, range(env.action_space.n)))
    names = list(meanings())  # the game's own, such as RIGHTFIRE, or else numbers
    if agent and len(names) != agent.world_model.num_actions:
        what = f"{checkpoint} knows {agent.world_model.num_actions} actions and {env_id} has {len(names)}"
        raise IrisError(f"{what}: name " + ("a checkpoint of this game" if args.env_id else "its game with --env-id"))
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        agent = agent and agent.to(device)
        if args.evaluate:
            return evaluate(agent, settings, args, device, checkpoint)
        print(". ".join([about, *untrained.values()]), flush=True)
        # Published agents are in a cache, and results/models with the source: nobody would look there for recordings.
        folder = checkpoint.parent if checkpoint and (checkpoint.parent / "args.json").exists() else Path("runs/played")
        place = "dream" if args.world_model else "both" if args.compare else "game"
        recorded = Recorded(folder / "media/episodes") if args.episodes else None
        world = World(recorded or env, agent, device, args.seed, place, args.reconstruction or args.episodes)
        if recorded:
            steps = {"right": 1, "left": -1, "up": 10, "down": -10}
            moves = {"n": (1, 0), "p": (-1, 0), "h": (0, 0)} | {key: (0, n) for key, n in steps.items()}
            world.commands |= {key: lambda way=way: recorded.move(world, *way) for key, way in moves.items()}
        if args.video:
            endless, episodes = place != "game" or args.video.endswith((".gif", ".webp")), int(not args.steps)
            args.steps = args.steps or 1000 * endless
            return play(world, agent, Video(Path(args.video), args.fps), names, args, folder, episodes=episodes)
        words = dict.fromkeys(word for name in names for word in WORDS.findall(name))
        keys = [f"{word}: {'/'.join(key for key in KEYS if KEYS[key] == word)}" for word in words]
        noise = untrained.get("tokenizer", "")
        page = Page(args.host, args.port, {
            "game": env_id.removesuffix("NoFrameskip-v4"), "about": about, "help": "   ".join(keys),
            "warning": ". ".join(untrained.values()),
            "noise": {"The dream": noise or untrained.get("world_model", ""), "The agent's view": noise},
        })  # fmt: skip
        who = "you" if args.human or (args.world_model and not args.agent) else "recorded" if recorded else "agent"
        play(world, agent, page, names, args, folder, who)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Ctrl-C, a cluster's Ctrl-C, a broken connection
        if signal.getsignal(number) == signal.SIG_DFL:  # but not under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,)))
    except IrisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):  # the latter where its output goes to a program that has ended
        sys.exit(130)
