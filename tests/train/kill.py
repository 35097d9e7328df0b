# SPDX-License-Identifier: Apache-2.0
"""kill -9 a small training at random moments and let it go on: what must never be lost. `make kill` does it 50 times.

After each kill the checkpoint is readable and no more than one save interval behind the log; in the end weights,
optimizer and losses are those of an undisturbed run, bit for bit, and so is the exported file. Then the same with a
disk that is full and with a run folder that cannot be written.
"""

import argparse
import ctypes
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive the fork below

import torch  # noqa: E402

from train import pretrain  # noqa: E402
from train.run_folder import CHECKPOINT, ENCODER, LOG, read_log  # noqa: E402

EPOCHS, STEPS_PER_EPOCH = 10, 2
SAVE_EVERY = 1
OPTIONS = [
    *("--subset", "0.05", "--batch-size", "32", "--epochs", str(EPOCHS), "--projector", "16", "--device", "cpu"),
    *("--save-every", str(SAVE_EVERY), "--log-every", "1", "--no-evaluate", "--knn-every", "0", "--warmup-epochs", "1"),
]


def start(run: Path, *more: str, before: Callable[[], object] = lambda: None) -> int:
    """The script in a process of its own, forked off here, where everything is imported and nothing has run."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(run.with_suffix(".txt"), "a")  # noqa: SIM115  (until the process ends)
        before()
        code = pretrain.run([*OPTIONS, *more, "--resume", "auto", "--output", str(run)])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(run: Path, *more: str) -> None:
    if (code := end(start(run, *more))) != 0:
        sys.exit(f"kill.py: it ended with code {code}: {run.with_suffix('.txt').read_text()[-2000:]}")


def saved(run: Path) -> dict[str, Any] | None:
    """The checkpoint, which is readable if it is there; None before the first."""
    path = run / CHECKPOINT
    return torch.load(path, weights_only=True) if path.exists() else None


def logged(run: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_log(run / LOG) if entry["event"] == "train"] if (run / LOG).exists() else []


def assert_at_most_an_interval_is_lost(run: Path) -> int:
    """The step from which the run goes on."""
    checkpoint, log = saved(run), logged(run)
    step = 0 if checkpoint is None else int(checkpoint["step"])
    last = log[-1]["step"] if log else 0
    assert last - step <= SAVE_EVERY * STEPS_PER_EPOCH, f"logged up to step {last}, saved up to step {step}"
    return step


def assert_same_bits(run: Path, undisturbed: Path) -> None:
    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return [tensor for inner in values for tensor in tensors(inner)]

    ours, theirs = saved(run), saved(undisturbed)
    assert ours is not None and theirs is not None
    assert ours["step"] == theirs["step"] == EPOCHS * STEPS_PER_EPOCH
    for part in ("backbone", "projector", "objective", "optimizer"):
        pairs = list(zip(tensors(ours[part]), tensors(theirs[part]), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs), f"{part} differs"
        assert pairs or part == "objective"
    assert (run / ENCODER).read_bytes() == (undisturbed / ENCODER).read_bytes()
    losses = [[(entry["step"], entry["loss"]) for entry in logged(folder)] for folder in (run, undisturbed)]
    assert losses[0] == losses[1] and len(losses[0]) == EPOCHS * STEPS_PER_EPOCH
    assert not list(run.glob("*.tmp")), "a kill left what nobody cleared away"


def kill_at_random(run: Path, kills: int, seconds: float, seed: int) -> list[int]:
    """The steps from which the run went on. Where it ends before its kills have come, it starts again."""
    moments, steps = random.Random(seed), []
    while len(steps) < kills:
        pid = start(run)
        # Most of an attempt is its start, and progress is what is at stake: at times it gets further than that.
        time.sleep(moments.uniform(0, seconds) * moments.choice((0.1, 0.3, 0.5)))
        os.kill(pid, signal.SIGKILL)
        if end(pid) == 0:  # it had come to its end
            shutil.rmtree(run)
            continue
        steps.append(assert_at_most_an_interval_is_lost(run))
    return steps


def disk_is_full(run: Path) -> None:
    """Files end where the checkpoint is half written, as on a disk that is full: one line, and the old one is there."""
    size = (run / CHECKPOINT).stat().st_size // 2
    step = assert_at_most_an_interval_is_lost(run)
    code = end(start(run, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))))
    assert code == 2, f"exit code {code}"
    said = run.with_suffix(".txt").read_text().splitlines()[-1]
    assert said.startswith("pretrain.py: cannot save the checkpoint") and "the previous one is intact" in said, said
    assert assert_at_most_an_interval_is_lost(run) == step


def folder_cannot_be_written(run: Path) -> None:
    """Neither a start nor a save finds it writable: one line each, and nothing is changed."""
    files = {path: path.read_bytes() for path in run.iterdir()}

    def take_the_right_away() -> None:
        run.chmod(0o555)
        version_and_process, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(version_and_process, none) == 0  # else no mode stops root

    code = end(start(run, before=take_the_right_away))
    run.chmod(0o755)
    said = run.with_suffix(".txt").read_text().splitlines()[-1]
    assert said == f"pretrain.py: cannot use the run folder {run}: Permission denied", said
    assert code == 2, f"exit code {code}"
    assert {path: path.read_bytes() for path in run.iterdir()} == files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        undisturbed, run = folder / "undisturbed", folder / "run"
        began = time.perf_counter()
        finish(undisturbed)
        seconds = time.perf_counter() - began
        finish(run, "--limit-steps", "4")
        disk_is_full(run)
        folder_cannot_be_written(run)
        print("a full disk and a folder that cannot be written: told, and nothing lost", flush=True)
        steps = kill_at_random(run, args.kills, seconds, args.seed)
        print(f"killed {len(steps)} times; went on after steps {' '.join(map(str, steps))}", flush=True)
        finish(run)
        assert_same_bits(run, undisturbed)
    print("in the end the bits of the undisturbed run")


if __name__ == "__main__":
    main()
