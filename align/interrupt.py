"""SIGTERM and SIGUSR1: Slurm and spot machines announce with them that a process will be killed soon.

A signal is acted upon at once where nothing is half done (inside `interruptible`, which long computations enter), and
otherwise when the optimizer step at hand is complete. Knows signals; what is saved then is the checkpoints' business.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

AGAIN = 75
"""The exit code that means "start me again": EX_TEMPFAIL of sysexits.h."""


class Interrupted(Exception):
    """A signal asked the run to end. The state is that after the last complete optimizer step."""


class _State:
    """Of this process: signal handlers are process-wide, so there is one."""

    received: str | None = None
    depth = 0
    listening = False


def received() -> str | None:
    """The name of the signal that asked this process to end, if any did."""
    return _State.received


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside the block, signals end the run in good order. To be entered in the main thread."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _State.received, _State.depth, _State.listening = None, 0, True
    take_over()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.received, _State.depth, _State.listening = None, 0, False


def take_over() -> None:
    """Puts this package's handlers back in place, inside `listening`; elsewhere it does nothing."""
    for number in SIGNALS if _State.listening else ():
        signal.signal(number, _handle)


@contextlib.contextmanager
def interruptible(alone: bool = True) -> Iterator[None]:
    """A computation whose results nobody keeps unless the block is left well, so it may be dropped at any moment.

    Args:
        alone: False where nothing may be dropped: other processes wait for this one to come to the same point.

    Raises:
        Interrupted: By the first signal inside the block, or on entry after one.
    """
    if not alone:
        yield
        return
    _State.depth += 1
    try:
        if _State.received is not None:
            raise Interrupted(_State.received)
        yield
    finally:
        _State.depth -= 1


@contextlib.contextmanager
def held() -> Iterator[None]:
    """What is inside is done as a whole, also inside `interruptible`: a signal is acted upon behind it.

    Raises:
        Interrupted: A signal came meanwhile.
    """
    depth, before = _State.depth, _State.received
    _State.depth = 0
    try:
        yield
    finally:
        _State.depth = depth
    if depth > 0 and before is None and _State.received is not None:
        raise Interrupted(_State.received)


def _handle(number: int, frame: FrameType | None) -> None:
    first = _State.received is None
    _State.received = signal.Signals(number).name
    if first and _State.depth > 0:
        raise Interrupted(_State.received)
