"""Chapter 5 of IRIS: step into the dream, and watch what was learned.

A world model that predicts the next tokens well is a game engine (IRIS, arXiv 2209.00588). Here a person or the policy
chooses the actions, and the transformer of chapter 2 answers with the next frame. From a key to a new picture:

    1. "left" is held on the page                          ->  action 3             choose
    2. the action is appended to the stream of tokens      ->  (1, T + 1)           Dream.step, chapter 2
    3. the transformer samples reward, end, and 16 tokens  ->  (1, 16)              Dream.step, chapter 2
    4. the tokenizer's decoder turns these into a frame    ->  (1, 3, 64, 64)       Tokenizer.decode, chapter 1
    5. the page magnifies it by a whole number             ->  640 x 640 pixels     show, in PAGE

What the player sees of that:
    16 tokens   Each stands for about 16 x 16 pixels. One wrong token, and a ball of two pixels jumps, or is gone.
    sampling    Rewards, ends and tokens are drawn [paper]: the same keys in the same frame give another dream.
    refill      20 steps fill the context. Then the latest 15 are read again (slower); the rest is forgotten [ours].

Run it:   python iris_play.py                        # the agent of the newest run plays the real game
          python iris_play.py --world-model          # you play in its dream; `--agent`: it plays there itself
          python iris_play.py --compare              # game and dream side by side, under the same actions
          python iris_play.py --pretrained Breakout --evaluate 100
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
import zipfile
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

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: IrisError says what is wrong with a file
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
    agent: bool = False  # With world_model: the agent plays in the dream, until you take over
    checkpoint: Annotated[str, Source] = ""  # Checkpoint of a run, or a published one named after its game: Breakout.pt
    run_dir: Annotated[str, Source] = ""  # Folder of a run
    pretrained: Annotated[str, Source] = ""  # A game, as in Breakout, whose published agent is fetched and kept
    env_id: str = ""  # The game, where it is not the one that the checkpoint names
    host: str = "127.0.0.1"  # Address to serve the page at; any but this one lets others on your network play
    port: int = 8765  # Port to serve at, or the next free one; 0 takes any
    video: str = ""  # No page, but a .webm, .mp4, .gif or .webp: one episode of at most 1,000 steps, or --steps
    steps: int = 0  # Stop after this many steps
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
    state: State | None = None  # the LSTM's state before this frame; after `think`, the state after it

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
        across = {"game": "dream", "dream": "game", "both": "both"}  # where `t` leads
        self.commands = {"t": lambda: self.enter(across[self.place])} if agent else {}  # by key

    def reset(self) -> None:
        """The game of the next seed, and its dream."""
        self.real, self.seed = Moment(self.env.reset(seed=self.seed)[0]), self.seed + 1
        self.enter(self.home)

    def enter(self, place: str) -> None:
        """Goes on with the game, or begins a dream from the game's present frame, step and return."""
        self.place = place
        if place != "game":
            seen = self.dream.reset(to_model(torch.from_numpy(self.real.frame)[None].to(self.device)))
            frame = to_stored(seen)[0].cpu().numpy()
            self.dreamed = replace(self.real, frame=frame, tokens=self.dream.context, seen=seen)  # LSTM state goes on
            self.parted = self.real, self.dreamed  # the frames at which they part

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

    def go_on(self) -> None:
        """After an end: a new game. If only a dream ended, which began in mid-game, that game goes on."""
        if self.real.end or self.home == "dream":
            self.reset()
        else:
            self.enter(self.home)

    def drift(self) -> tuple[int, float]:
        """Steps since game and dream were one; their mean absolute difference where either has changed since [ours]."""
        real, dream, real_then, dream_then = (m.frame / 255 for m in (self.real, self.dreamed, *self.parted))
        changed = np.maximum(np.abs(real - real_then), np.abs(dream - dream_then)).max(axis=2) > 0.1  # (64, 64)
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
# What a key means, in the words that action names are made of; a digit is for actions without names.
KEYS = {"left": "LEFT", "right": "RIGHT", "up": "UP", "down": "DOWN", "space": "FIRE",
        "a": "LEFT", "d": "RIGHT", "w": "UP", "s": "DOWN", **{digit: digit for digit in "0123456789"}}  # fmt: skip
WORDS = re.compile(r"UP|DOWN|LEFT|RIGHT|FIRE|\d+")


def choose(names: list[str], held: list[str]) -> int:
    """The keys held, oldest first -> an action. Of those whose words are all held, it is the one of most words, and
    among equals the one of the newest key. If nothing is held, it is NOOP, or the first action."""
    wanted = list(dict.fromkeys(KEYS[key] for key in held if key in KEYS))
    ages = [[wanted.index(word) if word in wanted else -1 for word in WORDS.findall(name.upper())] for name in names]
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
def play(world: World, agent: Agent | None, page, film: "Video | None", names: list[str], args: Args, who: str) -> None:
    """Shows the world on a page, in a film, or both, and steps it with the actions of who is in charge: "you",
    "agent" or "recorded"; until `q`, or args.steps steps. A film without a page is one episode, or args.steps."""
    paused, stepped, trouble, fps, played, history = False, False, "", args.fps, 0, []
    keys = [*"m" * bool(agent and not args.episodes), *world.commands, "enter", *"e.,g-+fq"]  # in the page's order
    limit = args.steps or (None if page else 1000)
    began = deadline = time.perf_counter()
    try:
        world.reset()
        while True:
            # Look. With --human, the agent is not computed unless it plays, or a dream is on.
            moment = world.now
            if agent and (who == "agent" or not args.human or world.place != "game"):
                think(agent, moment, world.device)
            policy = None if moment.logits is None else moment.logits / max(args.temperature, 1e-6)  # (1, A)
            ended = moment.end or (world.place == "both" and world.dreamed.end)

            # Show. A film has the frame that it begins with, and one for each step.
            panels, drift = world.panels(), world.drift() if world.place == "both" else None
            if stepped:
                history = [*history[-99:], (moment.value, moment.reward, drift and drift[1])]
            if film and (stepped or not film.count):
                film.show(panels)
            if page:
                page.show(panels, {
                    "place": world.place, "who": "you" if (who, world.place) == ("recorded", "dream") else who,
                    "names": names, "step": moment.step, "return": moment.total, "action": moment.action,
                    "reward": moment.reward, "end": ended, "value": moment.value, "drift": drift, "paused": paused,
                    "policy": None if policy is None else policy[0].softmax(dim=0).tolist(), "trouble": trouble,
                    "traces": list(zip(*history)), "recording": bool(film), "fps": fps, "keys": keys})  # fmt: skip
            if played == limit or (moment.end and not page and not args.steps):
                break

            # Read the keys.
            pressed, held = page.read(deadline) if page else ([], [])
            deadline, stepped = max(deadline, time.perf_counter()) + 1 / fps, False
            if "q" in pressed:
                break
            paused ^= "." in pressed
            if faster := ("+" in pressed) - ("-" in pressed):
                fps = min(1000.0, max(0.5, fps * 1.5**faster))
            if "m" in pressed and "m" in keys:
                who = "you" if who == "agent" else "agent"
            if "," in pressed:
                old, film, trouble = film, None, ""
                try:
                    if old:
                        page.recorded = old.close()
                    else:
                        film = Video(Path(time.strftime("runs/recordings/%Y%m%d_%H%M%S.webm")), fps)
                except IrisError as error:  # a game goes on even if the disk is full
                    trouble = str(error)

            # Act.
            if asked := [key for key in pressed if key in world.commands]:
                world.commands[asked[0]]()
            elif "enter" in pressed:
                world.reset()
            elif ended and (not paused or "e" in pressed):
                world.go_on()
            elif not paused or "e" in pressed:
                world.step(int(sample(policy)) if who == "agent" and policy is not None else choose(names, held))
                stepped, played = True, played + 1
    finally:  # also when stopped with Ctrl-C: what was recorded is kept
        if film:
            film.close()
        print(f"{played} steps, {played / (time.perf_counter() - began):.1f} a second")


# --- Evaluation [paper, section 3.1] ----------------------------------------------------------------------------------
def game_name(env_id: str) -> str:
    """BreakoutNoFrameskip-v4, ALE/Breakout-v5, tests.games:Breakout-v0 -> Breakout"""
    return re.sub(r".*[:/]|(NoFrameskip)?-v\d+$", "", env_id)


def evaluate(agent: Agent, settings: iris_train.Args, args: Args, device: torch.device, checkpoint: Path) -> None:
    """Plays whole test games, at most 16 side by side; prints statistics of their returns, and the paper's mean."""
    n = settings.test_episodes = args.evaluate
    settings.test_envs, settings.test_temperature = min(16, n), args.temperature
    games = iris_train.play_test_episodes(agent, settings, device, args.seed, keep=0)
    returns = np.array([game["return"] for game in games])
    path = Path(__file__).parent / "results" / "published_scores.csv"
    rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
    known = {player: float(score) for game, player, score in rows if game == game_name(settings.env_id)}  # may be empty
    result = {
        "env_id": settings.env_id, "checkpoint": str(checkpoint), "temperature": str(args.temperature),
        "seed": args.seed, "episodes": n, "steps": sum(game["length"] for game in games), "mean": returns.mean(),
        "standard_error": returns.std(ddof=1) / n**0.5 if n > 1 else None, "median": np.median(returns),
        "human_normalised": (returns.mean() - known["random"]) / (known["human"] - known["random"]) if known else None,
        "min": returns.min(), "max": returns.max(), "paper": known.get("iris")}  # fmt: skip
    for name, value in result.items():
        print(f"{name:17} {value:.2f}" if isinstance(value, float) else f"{name:17} {value}")
    if args.json:
        write(Path(args.json), json.dumps(result | {"returns": returns.tolist()}, indent=2).encode() + b"\n")


# --- Skip on first reading: video files -------------------------------------------------------------------------------
def paint(panels: list[tuple], height: int) -> np.ndarray:
    """Panels side by side, each magnified or thinned by a whole number to fit a height -> (height + 24, W, 3) uint8."""
    columns = []
    for title, picture, _ in panels:
        larger, smaller = max(1, height // picture.shape[0]), -(-picture.shape[0] // height)  # one of the two is 1
        picture = picture[::smaller, ::smaller].repeat(larger, axis=0).repeat(larger, axis=1)
        below, right = max(0, height - picture.shape[0]), 8 - picture.shape[1] % 8  # codecs need even numbers
        columns.append(np.pad(picture, ((24, below), (0, right), (0, 0))))
        cv2.putText(columns[-1], title, (2, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (230, 230, 230), 1, cv2.LINE_AA)
    return np.concatenate(columns, axis=1)


class Video:
    """A film. Browsers play .webm (VP8); an .mp4 (MPEG-4 Part 2) is for other programs. These two are written under
    another name, their frames counted, and copied: a film is whole, or not there."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps, self.pictures, self.writer, self.count = path, fps, [], None, 0
        # WebM is Matroska with another name in its header, which `close` puts there: OpenCV complains about WebM.
        self.codec, container = {".webm": ("VP80", ".mkv"), ".mp4": ("mp4v", ".mp4")}.get(path.suffix, ("", ""))
        self.beside = path.with_name(f".{path.name}{container}")
        write(self.beside, b"")  # says before anything is played if there can be no file

    def show(self, panels: list[tuple]) -> None:
        picture, self.count = np.ascontiguousarray(paint(panels, 448 if self.codec else 256)[..., ::-1]), self.count + 1
        if not self.codec:
            return self.pictures.append(picture)
        if not self.writer:
            self.size, code = picture.shape[1::-1], cv2.VideoWriter_fourcc(*self.codec)
            self.writer = cv2.VideoWriter(str(self.beside), code, self.fps, self.size)
        self.writer.write(cv2.resize(picture, self.size))  # a key may change the number of panels

    def close(self) -> Path:
        """Raises IrisError if the file is not whole."""
        try:
            if self.writer:
                self.writer.release()
                if sum(iter(cv2.VideoCapture(str(self.beside)).grab, False)) != self.count:
                    raise IrisError(f"can't write {self.path} whole: is the disk full?")
                write(self.path, self.beside.read_bytes().replace(b"matroska", b"webm\0\0\0\0", 1))
            elif self.pictures:
                times = np.round(np.arange(self.count + 1) * 100 / self.fps) * 10  # ms; a GIF counts in units of 10
                animation = cv2.Animation()
                animation.frames, animation.durations = self.pictures, np.diff(times).astype(np.int32)
                _, content = cv2.imencodeanimation(self.path.suffix, animation, [cv2.IMWRITE_GIF_QUALITY, 1])
                write(self.path, content.tobytes())
        finally:
            self.beside.unlink(missing_ok=True)
        print(f"{self.path}: {self.count} frames", flush=True)
        return self.path


# --- Skip on first reading: the page ----------------------------------------------------------------------------------
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>IRIS</title><link rel=icon href="data:,">
<meta name=viewport content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --main: light-dark(#0b62c4, #62a8ff); --soft: light-dark(#57606a, #9aa4b0);
  --text: light-dark(#1c2128, #e6e9ee); --card: light-dark(#fff, #191d23); --line: light-dark(#d0d5dc, #2f363f) }
* { box-sizing: border-box; margin: 0 }
body { display: grid; gap: 8px; padding: 8px 12px; height: 100dvh; overflow: hidden; color: var(--text);
  grid: "head head" auto "main side" minmax(0, 1fr) "main pad" auto "bar bar" auto / minmax(0, 1fr) 312px;
  font: 15px/1.3 system-ui, sans-serif; background: light-dark(#eef0f3, #0f1216) }
header { grid-area: head; display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 16px }
h1 { font-size: 18px } #notice { color: light-dark(#b34700, #ffb454) } #about, #hint, h2, dt { color: var(--soft) }
/* A pixel of a picture, whose height is --pixels of them, takes a whole number of the screen's pixels. */
main { grid-area: main; container-type: size; display: flex; flex-wrap: wrap; place-content: center; gap: 0 16px }
figure { position: relative; margin-top: 26px; aspect-ratio: var(--ratio); height: max(var(--pixels),
  round(down, min(100cqh - 26px, (100cqw - 32px) / var(--ratios)), var(--pixels))) }
figcaption { position: absolute; bottom: 100%; width: 100%; overflow: hidden; white-space: nowrap; font-weight: bold }
img, .over { position: absolute; width: 100%; height: 100%; image-rendering: pixelated }
.over { display: grid; grid: auto-flow 1fr / repeat(var(--side), 1fr) }
.over p { grid-area: 1 / 1 / 9 / -1; padding: 9%; background: var(--card) }
.over b { border: 1px solid #fff4; overflow: hidden; color: #fff; text-shadow: 0 0 3px #000 }
.over .on { border: 3px solid #ffd60a; background: #ffd60a30 }
aside { grid-area: side; display: flex; flex-direction: column; gap: 8px; overflow-y: auto }
section, dl, button, a, #pad b { padding: 6px 8px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; color: var(--text); font-size: 14px; white-space: nowrap }
h2, #shares p { display: flex; justify-content: space-between; font-size: 14px }
h2 b, dd { color: var(--text); font-weight: bold }
dl { display: grid; grid-template-columns: repeat(2, auto 1fr); gap: 2px 6px }
#shares p { padding: 0 4px; line-height: 1.25; background: linear-gradient(#4a98ff66 0 0) 0 / var(--share) no-repeat }
svg { display: block; width: 100%; height: min(48px, 5vh); fill: none; stroke: var(--main); stroke-width: 2 }
nav { grid-area: bar; display: flex; flex-wrap: wrap; gap: 6px; justify-content: center; align-items: center }
[aria-pressed=true], #pad .on { background: var(--main); color: light-dark(#fff, #0f1216) }
#pad { grid-area: pad; display: flex; justify-content: space-between; touch-action: none; user-select: none }
#pad b { display: grid; place-items: center } #cross { display: grid; grid: repeat(3, 42px) / repeat(3, 42px) }
@media not (pointer: coarse) { #pad { display: none } nav button::before { content: attr(value) " "; opacity: 0.7 } }
@media (max-width: 800px) and (orientation: portrait) {
  body { grid: "head" auto "main" 1fr "side" auto "pad" auto "bar" auto / minmax(0, 1fr); gap: 5px; padding: 5px }
  aside { display: grid; grid: auto / 1fr 1fr; gap: 5px } #policy { max-height: 98px; overflow-y: auto }
  dl { grid-column: 1 / 3; grid-template-columns: repeat(3, auto 1fr) } .over b { color: #0000; text-shadow: none }
  nav button { padding: 4px 6px; flex: 1 } #about, #hint, #Reward, #traces:not(:has(#Value)) { display: none }
}
</style>
<header><h1 id=title>IRIS</h1> <span id=about></span> <b id=notice role=status>Connecting</b></header>
<main id=main></main> <aside><dl id=facts></dl> <section id=policy><h2>Policy</h2><div id=shares></div></section>
<section id=traces></section> <section id=recorded hidden><h2>Recording <a id=download download>download</a></h2>
<video id=clip controls preload=auto width=100% height=120></video></section></aside>
<div id=pad><div id=cross></div> <b id=space>FIRE</b></div> <nav id=bar><span id=hint>arrows, WASD, space</span></nav>
<script>
const el = (id) => document.getElementById(id), tab = Math.random().toString(36), held = new Set();
let latest = null, tokensShown = false, buttons = {}, sent = Promise.resolve();
const figure = "<figure><figcaption></figcaption><img alt=''><div class=over></div></figure>";
el("cross").innerHTML = ["up left", "up", "up right", "left", "", "right", "down left", "down", "down right"]
  .map((keys, i) => `<b id="${keys}">${"◤▲◥◀·▶◣▼◢"[i]}</b>`).join("");

// --- What the server sends
function show(message) {
  latest = message;
  const {place, who, names, action, paused, recording, trouble, policy, traces, drift, file, end, panels} = message;
  const where = {game: "the game", dream: "the dream", both: "game and dream"}[place];
  const notices = [paused && "paused", recording && "recording", end && "the end", trouble].filter(Boolean);
  const texts = {title: `IRIS: ${message.game}, ${where}`, about: message.about, notice: notices.join(" · ")};
  for (const id in texts) el(id).textContent = texts[id];
  const facts = {Step: message.step, Return: message.return, Action: names[action] ?? "-", Reward: message.reward,
    Speed: message.fps.toFixed(0), Plays: who};
  el("facts").innerHTML = Object.entries(facts).map(([name, fact]) => `<dt>${name}<dd>${fact}`).join("");
  el("policy").hidden = !policy;
  el("shares").innerHTML = (policy ?? []).map((share, i) => `<p
    style="--share: ${100 * share}%">${names[i]}<span>${Math.round(100 * share)}%</span></p>`).join("");
  el("traces").innerHTML = trace("Value", message.value?.toFixed(2), traces[0])
    + trace("Reward", message.reward, traces[1])
    + trace("Error", drift && `${drift[1].toFixed(3)}, step ${drift[0]}`, traces[2]);
  el("recorded").hidden = !file;
  if (file && !el("clip").src.endsWith(file)) el("clip").src = el("download").href = file;
  el("main").style = `--ratios: ${panels.reduce((sum, panel) => sum + panel.width / panel.height, 0)}`;
  if (el("main").children.length != panels.length) el("main").innerHTML = figure.repeat(panels.length);
  panels.forEach((panel, i) => {
    const frame = el("main").children[i], [title, image, over] = frame.children, note = message.notes[panel.title];
    title.textContent = panel.title;
    image.src = panel.png;
    over.innerHTML = note ? `<p>${note}</p>` : tokensShown ? panel.tokens.join("") : "";
    frame.style = `--pixels: ${panel.height / devicePixelRatio}px; --ratio: ${panel.width} / ${panel.height};
      --side: ${Math.sqrt(panel.tokens.length)}`;
  });
  const labels = {m: who == "you" ? "agent" : "take over", enter: "next game", j: "back", e: "one step",
    t: {game: "into the dream", dream: "back to game", both: "dream anew"}[place], ".": paused ? "resume" : "pause",
    ",": recording ? "stop" : "record", g: "tokens", "-": "slower", "+": "faster", f: "full screen", q: "quit"};
  const on = {".": paused, ",": recording, g: tokensShown, f: document.fullscreenElement, t: place == "dream"};
  for (const key of message.keys)
    Object.assign(buttons[key] ??= el("bar").appendChild(document.createElement("button")),
      {value: key, textContent: labels[key], ariaPressed: !!on[key]});
}
function trace(title, text, values = []) {
  const low = Math.min(0, ...values), high = Math.max(low + 0.01, ...values);
  const points = values.map((value, i) => `${i},${37 - 34 * (value - low) / (high - low)}`).join(" ");
  return text == null ? "" : `<div id=${title}><h2>${title}<b>${text}</b></h2><svg viewBox="0 0 100 40"
    preserveAspectRatio=none><polyline vector-effect=non-scaling-stroke points="${points}" /></svg></div>`;
}
const events = new EventSource("/pictures");  // connects again by itself
events.onmessage = (event) => show(JSON.parse(event.data));
events.onerror = () => el("notice").textContent = "No connection: iris_play.py has stopped, or the line is broken";

// --- What the player does. A message waits for the one before, so that they can't change their order on the way.
const send = (pressed) => sent = sent.then(() => fetch("/keys?" + new URLSearchParams({tab, pressed,
  held: [...held].join(" ")}), {method: "POST", keepalive: true})).catch(() => {});
setInterval(() => held.size && send(""), 300);  // "still held": without it, a key is let go
function hold(name, on) {  // the name of a key, or of a part of the cross
  if (on == held.has(name)) return;
  on ? held.add(name) : held.delete(name);
  el(name)?.classList.toggle("on", on);
  send(on ? name : "");
}
function press(key) {
  if (key == "g") tokensShown = !tokensShown;
  else if (key == "f") document.fullscreenElement ? document.exitFullscreen() : document.body.requestFullscreen();
  else send(key);
  show(latest);
}
const nameOf = (event) => event.key.toLowerCase().replace("arrow", "").replace(" ", "space");
onkeydown = (event) => {
  const key = nameOf(event), isAction = /^(left|right|up|down|space|[wasd0-9])$/.test(key);
  const onButton = document.activeElement.matches("button, a, video") && ["enter", "space"].includes(key);
  if (event.ctrlKey || event.metaKey || event.altKey || onButton || !(isAction || latest.keys.includes(key))) return;
  event.preventDefault();
  if (!event.repeat) isAction ? hold(key, true) : press(key);
};
onkeyup = (event) => hold(nameOf(event), false);
onblur = () => held.forEach((name) => hold(name, false));
el("pad").ontouchstart = ({target}) => hold(target.id, true);
el("pad").ontouchend = el("pad").ontouchcancel = ({target}) => hold(target.id, false);
el("bar").onmousedown = (event) => event.preventDefault();  // Enter and space stay with the game, not with the button
el("bar").onclick = ({target}) => target.value && press(target.value);
</script>"""


class Page:
    """The page in the browser. The server pushes a message for each picture, and a tab tells which keys are held. Any
    site that you visit can send requests to 127.0.0.1: other origins and other names (DNS rebinding) are refused."""

    def __init__(self, host: str, port: int, **fixed):
        """Serves at the first free port from `port` on, and waits for the first visitor. Raises IrisError."""
        self.fixed, self.message, self.number, self.changed = fixed, "{}", 0, threading.Condition()
        self.tabs: dict[str, tuple[float, list[str]]] = {}  # time of its latest message, keys held
        self.pressed, self.recorded, self.visited, listener, free = [], None, threading.Event(), None, port
        while not listener:
            try:
                listener = socket.create_server((host, free), backlog=256)
            except (OSError, OverflowError) as error:
                if "in use" not in str(error):
                    raise IrisError(f"can't serve at {host}:{free} ({error}): choose another --host, --port") from error
                free += 1
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)  # a slow line leaves pictures out
        free, name = listener.getsockname()[1], socket.gethostname().lower()
        self.ours = {host.lower(), name, "localhost"}
        handler = type("Handler", (WSGIRequestHandler,), {"timeout": 10, "log": lambda *_: None})  # drops half requests
        server = make_server(host, free, self.respond, True, request_handler=handler, fd=listener.fileno())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://{name if host == '0.0.0.0' else host}:{free}"
        taken = f" (port {port} is taken)" if port not in (0, free) else ""
        print(f"Open {address} in a browser{taken}. From elsewhere: ssh -L {free}:127.0.0.1:{free} {name}", flush=True)
        if {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & {*os.environ} or sys.platform != "linux":
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        self.visited.wait()

    @Request.application
    def respond(self, request: Request) -> Response:
        path, origin, name = request.path, f"http://{request.host}", request.host.lower().partition(":")[0]
        by_site = request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and path != "/"
        is_ours = name in self.ours or re.fullmatch(r"[\d.]+", name)  # an address of digits can't be rebound
        if not is_ours or by_site or request.headers.get("Origin", origin) != origin:
            return Response("This page answers requests of its own only.", 403)
        if path == "/":
            return Response(PAGE, mimetype="text/html", headers={"X-Frame-Options": "DENY"})
        if path == "/pictures":
            return Response(self.messages(), mimetype="text/event-stream")
        if self.recorded and path == f"/{self.recorded.name}":
            return send_file(self.recorded, request.environ)
        if path != "/keys" or request.method != "POST":
            return Response("There is nothing here.", 404)
        tab, pressed, held = (request.args[name] for name in ("tab", "pressed", "held"))  # or werkzeug answers 400
        with self.changed:
            self.tabs[tab] = time.perf_counter(), held.split()
            self.pressed += pressed.split()
        return Response(status=204)

    def messages(self) -> Iterator[str]:
        """The newest message, as soon as there is another; after 5 seconds the same, which fails if the tab is gone."""
        number = 0
        self.visited.set()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.number > number, timeout=5 if number else None)
                number, message = self.number, self.message
            yield f"data: {message}\n\n"

    def show(self, panels: list[tuple], status: dict) -> None:
        pictures = []
        for title, picture, moment in panels:
            png = base64.b64encode(cv2.imencode(".png", picture[..., ::-1])[1]).decode()
            now, before = ([] if x is None else x[0].tolist() for x in (moment.tokens, moment.before))
            cells = [f"<b class={'on' * (new != old)}>{new}</b>" for new, old in zip(now, before or now)]
            pictures.append({"title": title, "png": f"data:image/png;base64,{png}", "height": len(picture),
                             "width": picture.shape[1], "tokens": cells})  # fmt: skip
        status |= {"panels": pictures, "file": self.recorded.name if self.recorded else ""}
        with self.changed:
            self.message, self.number = json.dumps(self.fixed | status), self.number + 1
            self.changed.notify_all()

    def read(self, deadline: float) -> tuple[list[str], list[str]]:
        """Waits -> keys pressed since the last call, and keys held now. A tab that is silent may have been closed."""
        time.sleep(max(0.0, deadline - time.perf_counter()))
        with self.changed:
            self.tabs = {tab: state for tab, state in self.tabs.items() if time.perf_counter() - state[0] < 1.5}
            pressed, self.pressed, held = self.pressed, [], [key for _, keys in self.tabs.values() for key in keys]
        return pressed, held + [key for key in pressed if key not in held]


# --- Skip on first reading: recorded episodes, files, start-up --------------------------------------------------------
class Recorded:
    """Recorded episodes as an environment: a seed is the number of an episode, and the actions are those recorded."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("t*/*.npz")) + sorted(folder.glob("imagination/*.npz"))  # test, train, dreams
        if not self.paths:
            raise IrisError(f"there are no recorded episodes in {folder.resolve()}: evaluations record some")

    def reset(self, seed: int) -> tuple[np.ndarray, dict]:
        path = self.paths[seed % len(self.paths)]
        try:
            with np.load(path) as file:
                frames, actions, rewards = file["frames"], file["actions"], file["rewards"]
        except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
            raise IrisError(f"{path} can't be read ({error}): move it away") from error
        self.title, self.screen = f"{path.parent.name}/{path.stem}", frames[0]
        self.coming = [*zip([*frames[1:], frames[-1]], actions, rewards)][::-1]  # no frame is kept after the last step
        return self.screen, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.screen, action, reward = self.coming.pop()
        return self.screen, reward, not self.coming, False, {"recorded": int(action)}


def go_back(world: World) -> None:
    """Ten steps back in a recorded episode; from its first frame, to the episode before."""
    step = world.real.step - 10
    world.seed -= 1 if world.real.step else 2
    world.reset()
    for _ in range(step):
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
    if name := args.pretrained:
        make_env(f"{name}NoFrameskip-v4").close()  # says what was meant if there is no such game
        path, url = Path(torch.hub.get_dir(), "checkpoints/iris", f"{name}.pt"), PRETRAINED_URL.format(name)
        try:
            if not zipfile.is_zipfile(path):  # a download that was cut short is fetched again
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise IrisError(f"can't fetch it ({error}): put {path.name} (from {url}) into {path.parent}") from error
        return path
    if args.checkpoint or args.run_dir:
        return iris_train.checkpoint_path(args.checkpoint or args.run_dir)
    game = game_name(args.env_id).lower() or "*"
    models = sorted(MODELS.glob(f"{game}.pt"), key=lambda path: path.stem == "breakout")  # Breakout is the last
    runs = sorted(Path("runs").glob(re.sub("[/:]", "-", args.env_id) + "*/checkpoint.pt"), key=os.path.getmtime)
    if not runs and not models and not args.human:
        raise IrisError("no run under runs/: train one (iris_train.py), or name --checkpoint FILE or --pretrained GAME")
    return [None, *models, *runs][-1]


def check(args: Args) -> None:
    """Raises IrisError for arguments that no mode can have, before anything is loaded."""
    numbers, suffix = (args.evaluate, args.steps, args.seed, args.port), Path(args.video).suffix
    for wrong, text in (
        (args.agent and not args.world_model, "--agent needs --world-model"),
        (args.json and (not args.evaluate or os.path.isdir(args.json)), "--json needs --evaluate, and no folder"),
        (args.video and (args.human or args.evaluate), "--video shows the agent: leave out --human and --evaluate"),
        (args.video and (suffix not in (".webm", ".mp4", ".gif", ".webp") or os.path.isdir(args.video)),
         f"--video {args.video}: it has to end in .webm, .mp4, .gif or .webp, and to be no folder"),
        (suffix in (".gif", ".webp") and (args.steps > 1000 or args.fps > 50), "over 1,000 steps or 50 fps: use .webm"),
        (not 0.5 <= args.fps <= 1000, f"--fps {args.fps} is not from 0.5 to 1,000"),
        (not (args.temperature >= 0 <= min(numbers) and max(numbers) < 2**31), "a number is negative, or too large"),
        (not args.host, "--host is empty, which would be any address: say 0.0.0.0 if that is meant"),
    ):  # fmt: skip
        if wrong:
            raise IrisError(text)


def main(args: Args) -> None:
    """Plays. Raises IrisError for a user's errors."""
    check(args)
    checkpoint, agent, settings, about, notes = find_checkpoint(args), None, iris_train.Args(), "no models", {}
    if checkpoint:
        content, settings = iris_train.read_checkpoint(checkpoint)
        agent, _ = iris_train.load_agent(checkpoint)
        epoch = content.get("epoch", settings.epochs)  # published ones are from the end
        starts = {"The agent's view": settings.tokenizer_from, "The dream": settings.world_model_from,
                  "The policy": settings.actor_critic_from}  # fmt: skip
        notes = {what: f"{what} is trained from epoch {n} on" for what, n in starts.items() if epoch < n}
        about = ". ".join([f"models of {os.path.relpath(checkpoint)}, epoch {epoch}", *notes.values()])
    settings.env_id, settings.device = args.env_id or settings.env_id, args.device
    settings.precision = settings.precision.replace("auto", "fp32")  # nothing is trained, so nothing to measure
    device, bf16 = iris_train.choose_device(settings)
    torch.manual_seed(args.seed)
    env = make_env(settings.env_id, max_frames=settings.test_max_frames)
    names = list(getattr(env.unwrapped, "get_action_meanings", lambda: map(str, range(env.action_space.n)))())
    if agent and len(names) != (known := agent.world_model.num_actions):
        raise IrisError(f"{checkpoint} knows {known} actions, and {settings.env_id} has {len(names)}: see --env-id")
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        agent = agent and agent.to(device)
        if args.evaluate:
            return evaluate(agent, settings, args, device, checkpoint)
        place = "dream" if args.world_model else "both" if args.compare else "game"
        world = World(env, agent, device, args.seed, place, all_views=args.reconstruction or args.episodes)
        if args.episodes:
            world.env, world.seed = Recorded(checkpoint.parent / "media" / "episodes"), 0
            world.commands["j"] = lambda: go_back(world)
        film = Video(Path(args.video), args.fps) if args.video else None
        page = None if film else Page(args.host, args.port, game=game_name(settings.env_id), about=about, notes=notes)
        person = args.human or (args.world_model and not args.agent and not film)
        play(world, agent, page, film, names, args, "you" if person else "recorded" if args.episodes else "agent")


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
