"""The worker: obeys lines of JSON on its standard input; see `tools.benchmark.protocol`.

Started by the benchmark in the environment of a contender. What libraries print goes to the log, since the standard
output belongs to the answers.
"""

import gc
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from tools.benchmark.kinds import CPU, CUDA
from tools.benchmark.protocol import Turn, peak_bytes
from tools.benchmark.work import Work

PACKAGES = ("torch", "transformers", "lightning", "trl", "accelerate")

Job = Callable[..., Turn]
"""What a contender's `prepare(kind, setting, work, precision)` returns: does the work once and measures it."""


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers every request until there are no more.

    `prepare` names module, kind, setting, work and precision; the answer has versions, and the bytes of memory in use
    before any model was there. `turn` measures; `end` tells the most memory that was ever in use.
    """
    job: Job | None = None
    device = CPU
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any]
        if request["do"] == "prepare":
            torch.set_num_threads(request["threads"])
            torch.manual_seed(0)
            module = importlib.import_module(request["module"])
            work = Work.read(Path(request["work"]))
            device = work.device
            answer = {"memory": _peak(device), "versions": _versions()}
            job = module.prepare(request["kind"], request["setting"], work, request["precision"])
        elif request["do"] == "turn":
            assert job is not None, "nothing was prepared"
            answer = job(**request["arguments"]).asdict()
            gc.collect()  # what a turn's trainer has left in cycles would count as the next turn's memory
        else:
            answer = {"memory": _peak(device)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _peak(device: str) -> int:
    """Of this process; on a GPU, of its tensors."""
    if device == CUDA:
        return torch.cuda.max_memory_allocated()
    return peak_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _versions() -> dict[str, str]:
    installed = {item.metadata["Name"].lower(): item.version for item in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def main() -> None:
    """Keeps the standard output for the answers and sends everything else to the log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
