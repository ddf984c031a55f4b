"""Catch: the smallest game that needs everything a world model has to know, for learning within a coffee break.

A ball falls from a random column of an 8x8 board, a row a step; the paddle along the bottom moves left, stays, or moves
right. When the ball has reached the bottom row the episode ends: +1 if the paddle is under it, -1 if not. Moving at
random earns about -0.75; whoever sees the ball and plans seven steps ahead always catches it.

    python iris_train.py --env-id tests.catch:Catch-v0 --preset catch
"""
import gymnasium as gym
import numpy as np

SIZE, CELL = 8, 8  # cells of the board, and pixels of a cell, in either direction


class Catch(gym.Env):
    """Observations (64, 64, 3) uint8; actions 0 left, 1 stay, 2 right; an episode has 7 steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    observation_space = gym.spaces.Box(0, 255, (SIZE * CELL, SIZE * CELL, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, int(self.np_random.integers(SIZE)), SIZE // 2
        return self.render(), {}

    def step(self, action: int):
        self.row += 1
        self.paddle = min(max(self.paddle + int(action) - 1, 0), SIZE - 1)
        end = self.row == SIZE - 1
        reward = (1.0 if self.paddle == self.column else -1.0) if end else 0.0
        return self.render(), reward, end, False, {}

    def get_action_meanings(self) -> list[str]:
        """As Atari games have it; `iris_play.py` finds the keys for an action by its name."""
        return ["LEFT", "NOOP", "RIGHT"]

    def render(self) -> np.ndarray:
        board = np.full((SIZE, SIZE, 3), (20, 20, 40), np.uint8)
        board[-1, self.paddle] = (90, 200, 90)
        board[self.row, self.column] = (240, 120, 60)
        return board.repeat(CELL, axis=0).repeat(CELL, axis=1)


gym.register("Catch-v0", entry_point=Catch)
