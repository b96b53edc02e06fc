"""Signals inside what may be dropped, and inside what is done as a whole."""

import os
import signal

import pytest

from align import interrupt


def send() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_waits_for_what_is_done_as_a_whole() -> None:
    done = []
    with interrupt.listening():
        with pytest.raises(interrupt.Interrupted), interrupt.interruptible():
            with interrupt.held():
                send()
                done.append(1)
            done.append(2)
        assert done == [1] and interrupt.received() == "SIGUSR1"
    with interrupt.listening():
        with pytest.raises(interrupt.Interrupted), interrupt.interruptible():
            send()
            done.append(3)
        with interrupt.held():  # outside of what may be dropped
            send()
        assert done == [1]


def test_an_error_inside_is_not_replaced() -> None:
    with interrupt.listening(), pytest.raises(ValueError, match="own"), interrupt.interruptible(), interrupt.held():
        send()
        raise ValueError("own")
