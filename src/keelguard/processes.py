"""What the processes of a launcher share: one of them writes, the others wait for it and read.

`accelerate launch` runs the same command in every process; without a launcher there is one, and nothing waits.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from keelguard.errors import FailureError, UsageError
from keelguard.runs import open_run

_PATIENCE = timedelta(days=30)
"""How long a process waits for the others: the main one may judge, or measure, for hours."""

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""What a launcher tells a process by its environment."""


def process() -> int:
    """The number of this process; the main one is 0."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes run this command together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that measures and writes."""
    return process() == 0


def barrier() -> None:
    """Wait for all processes; their group exists from here on.

    Raises:
        FailureError: one of them has ended.
    """
    if processes() > 1:
        import torch.distributed as dist

        with _explained():
            dist.barrier(group=_group())


def from_main(value: Any) -> Any:
    """What the main process gives, in every process; the others' own value is not read.

    Raises:
        FailureError: the main process has ended.
    """
    if processes() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    with _explained():
        dist.broadcast_object_list(box, src=0, group=_group())
    return box[0]


@contextmanager
def main_first() -> Iterator[None]:
    """A block that the others enter when the main process is through it; where it fails there, they end too.

    Raises:
        UsageError, FailureError: in the others, as in the main process.
    """
    if not is_main():
        if code := from_main(None):
            kind = UsageError if code == UsageError.exit_code else FailureError
            raise kind(f"process {process()} ends with the main process, whose message says why")
        yield
        return
    try:
        yield
    except Exception as error:
        with suppress(FailureError):
            from_main(getattr(error, "exit_code", FailureError.exit_code))
        raise
    from_main(0)


@contextmanager
def open_shared_run(out: Path, command: str, settings: dict[str, Any]) -> Iterator[None]:
    """Open a run folder, which belongs to the main process; the others find it there.

    Raises:
        UsageError, FailureError: as `open_run`, in every process.
    """
    with ExitStack() as stack:
        with main_first():
            if is_main():
                stack.enter_context(open_run(out, command, settings))
                # What a killed process left half-written is nobody's: the lock is ours.
                for stale in (*out.glob(".*.tmp"), *out.glob(".*.old"), *out.glob("*/.*.tmp")):
                    if stale.is_dir():
                        shutil.rmtree(stale, ignore_errors=True)
                    else:
                        stale.unlink(missing_ok=True)
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Let what trains in the block take this process for the only one, so that it does not wait for the others."""
    if processes() == 1:
        yield
        return
    from accelerate.state import AcceleratorState

    hidden = {name: os.environ.pop(name) for name in _LAUNCHERS if name in os.environ}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.update(hidden)
        AcceleratorState._reset_state(reset_partial_state=True)


_groups: dict[Any, Any] = {}


def _group() -> Any:
    """A group of all processes over the network alone: NCCL's would give up after minutes, and hold the GPUs."""
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"))
    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _groups[world]


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FailureError(
            "another process of this launch has ended; its message says why, and the same command goes on where it was"
        ) from error
