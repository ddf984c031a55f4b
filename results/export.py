"""Makes a small model of a run's checkpoint: arguments and weights in float16, without optimisers and replay. The pixel
statistics stay float32: in a Breakout run, rounding these changed 16% of all tokens, and rounding the weights none.

    python results/export.py runs/... results/models/breakout.pt

`iris_train.load_agent`, `iris_play.py --checkpoint` and `iris_train.py --init-from` read it like any other checkpoint.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from iris_train import IrisError, read_checkpoint, write_file


@dataclass
class Options:
    """Writes a run's agent as a file of a few megabytes."""

    run: tyro.conf.Positional[Path]  # A run's folder, or its checkpoint
    model: tyro.conf.Positional[Path]  # The file to write


def main(options: Options) -> None:
    checkpoint, _ = read_checkpoint(options.run)
    kept = {key: checkpoint[key] for key in ("format", "args", "num_actions", "epoch")}
    kept["args"] = kept["args"] | {"run_dir": "", "init_from": "", "resume": ""}  # paths of this machine
    exact = (".mean", ".std")
    weights = {k: w.half() if w.is_floating_point() and not k.endswith(exact) else w for k, w in checkpoint["agent"].items()}
    write_file(options.model, lambda file: torch.save(kept | {"agent": weights}, file))
    size = options.model.stat().st_size / 1e6
    print(f"{options.model}: {kept['args']['env_id']}, epoch {kept['epoch']}, {size:.1f} MB")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (IrisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
