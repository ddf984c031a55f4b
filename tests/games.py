"""Small gymnasium games that the tests put in place of Atari; `tests.games:Name-v0` style ids import this file."""
import gymnasium as gym
import numpy as np


class Counter(gym.Env):
    """Shows how many steps the episode has had; ends after a random number of them (3 to 9), drawn from its seed."""

    observation_space = gym.spaces.Box(0, 255, (32, 48, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.length = 0, int(self.np_random.integers(3, 10))
        return self.image(), {}

    def image(self):
        return np.full((32, 48, 3), 20 * self.count, np.uint8)

    def step(self, action):
        self.count += 1
        return self.image(), float(action), self.count == self.length, False, {}


class Grey(Counter):
    observation_space = gym.spaces.Box(0, 255, (32, 48), np.uint8)

    def image(self):
        return super().image()[..., 0]


class Vector(Counter):
    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)


class Continuous(Counter):
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


class Forgetful(Counter):
    """Does not repeat itself from its seed: it shows noise, and no two noises are alike."""

    def image(self):
        return np.random.default_rng().integers(256, size=(32, 48, 3), dtype=np.uint8)


class Faulty(Counter):
    """Does something wrong in its third step."""

    def __init__(self, fault=""):
        self.fault = fault

    def step(self, action):
        image, reward, *rest = super().step(action)
        if self.count == 3:
            match self.fault:
                case "nan" | "1e300" | "word":
                    reward = self.fault if self.fault == "word" else float(self.fault)
                case "none":
                    reward = None
                case "floats":
                    image = image.astype(np.float32)
                case "shape":
                    image = image[:16]
                case "four":
                    return image, reward, False, {}
                case "error":
                    raise OSError(28, "No space left on device")
                case "exit":
                    raise SystemExit(0)
        return image, reward, *rest


class Broken(Counter):
    def __init__(self):
        1 / 0


for _game in (Broken, Counter, Grey, Vector, Continuous, Forgetful):
    gym.register(f"{_game.__name__}-v0", entry_point=_game)
FAULTS = {  # fault -> what is said of it
    "nan": "the reward is nan", "1e300": r"the reward is 1e\+300", "word": "could not convert string", "none": "TypeError",
    "floats": r"the image is \(32, 48, 3\) of float32", "shape": r"the image is \(16, 48, 3\) of uint8",
    "four": "step gave 4 values|not enough values", "error": "OSError.*No space left on device", "exit": "SystemExit",
}  # fmt: skip
for _fault in FAULTS:
    gym.register(f"Faulty-{_fault}-v0", entry_point=Faulty, kwargs={"fault": _fault})
