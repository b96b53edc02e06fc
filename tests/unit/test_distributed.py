import sys
import threading
import time

import pytest
import torch

from align import distributed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what threads do")
def test_a_thread_that_computes_is_waited_for() -> None:
    begun = threading.Event()
    left: list[int] = [40]

    def compute() -> None:
        square = torch.ones(512, 512)
        while left[0]:
            square @ square  # without the GIL, and in need of it after
            left[0] -= 1
            begun.set()

    thread = threading.Thread(target=compute)
    thread.start()
    begun.wait()
    distributed.threads_at_rest()
    assert left == [0]
    thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what threads do")
def test_a_thread_that_waits_is_not_waited_for() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    began = time.monotonic()
    distributed.threads_at_rest(seconds=60.0)
    assert time.monotonic() - began < 30.0
    end.set()
    thread.join()
