"""Writing on a GPU: one step for all rows, recorded once as a CUDA graph and replayed.

Asked operation by operation, a GPU waits for Python: a step of a model of 24 blocks is about a thousand operations,
which take longer to ask for than to do. A recording asks for all of them at once. For that nothing may depend on
what was written: all is kept in memory that stays where it is (`align.models.fixed`), rows that have finished go on
without effect, and only every few steps the host looks who has, and lets waiting prompts take their places.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from align.models import decode
from align.models.fixed import FixedSlots
from align.rollout.draws import draw
from align.types import Prompts

BETWEEN = 8
"""Steps between two looks at who has finished."""

REFILLED = 1 / 8
"""Of all rows: as many have to be free before waiting prompts are computed."""

CACHE = 0.3
"""Of a GPU's memory: keys and values may take so much of it; fewer rows are written at a time where they would not fit.

Of all of it and not of what is free, so that a run that goes on writes as many at a time as before.
"""

FEWEST = 8
"""Rows are halved when half of them would do, but not below this number."""


@dataclass(frozen=True)
class Written:
    """Responses that are being written, one of each prompt."""

    tokens: Int[Tensor, "responses limit"]
    logprobs: Float[Tensor, "responses limit"]
    lengths: Int[Tensor, " responses"]
    finished: Bool[Tensor, " responses"]

    @classmethod
    def start(cls, count: int, limit: int, device: torch.device) -> "Written":
        """Nothing of so many responses."""
        return cls(
            tokens=torch.zeros(count, limit, dtype=torch.long, device=device),
            logprobs=torch.zeros(count, limit, device=device),
            lengths=torch.zeros(count, dtype=torch.long, device=device),
            finished=torch.zeros(count, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True)
class Rows:
    """What is being written in which row. Nothing in here is ever replaced, only written to.

    Attributes:
        slots: Keys and values.
        response: Which one each row writes.
        token: The last of each, which is the next to be put in.
    """

    slots: FixedSlots
    response: Int[Tensor, " rows"]
    token: Int[Tensor, " rows"]

    def begin(self, policy: PreTrainedModel, prompts: Prompts, rows: list[int], responses: range) -> None:
        """Lets rows write the responses to these prompts, of which all but the last token is computed at once."""
        device = self.token.device
        which, where = torch.tensor(responses, device=device), torch.tensor(rows, device=device)
        lengths = prompts.lengths[which]
        self.response[where] = which
        self.token[where] = prompts.ids[which].gather(1, lengths[:, None] - 1)[:, 0]
        self.slots.lengths[where] = lengths.int() - 1
        self.slots.growing[where] = 1
        decode.fill(policy, prompts.ids[which], lengths - 1, self.slots, where)

    def only(self, rows: list[int]) -> "Rows":
        """These rows in memory of their own; this is of no more use then."""
        return Rows(self.slots.only(rows), self.response[rows], self.token[rows])


def write(
    policy: PreTrainedModel,
    prompts: Prompts,
    points: Float[Tensor, "batch limit"],
    stops: Int[Tensor, " stops"],
    *,
    temperature: float,
    rows: int,
) -> Written:
    """Answers prompts, so many at a time.

    Args:
        policy: For which `decode.able` says yes to `FixedSlots`.
        prompts: Those with the longest prompts first.
        points: See `draws.draw`, of each token.
        stops: Tokens that end a response.
        temperature: See `Sampler`.
        rows: Prompts answered at a time, if their keys and values fit.
    """
    count, limit = points.shape
    room = prompts.lengths.cpu() + limit  # enough for later ones as well, which are no longer
    found = Written.start(count, limit, points.device)
    begun = min(rows, _that_fit(policy, room, points.device))
    own = Rows(
        FixedSlots(room[:begun], points.device),
        torch.zeros(begun, dtype=torch.long, device=points.device),
        torch.zeros(begun, dtype=torch.long, device=points.device),
    )
    own.begin(policy, prompts, list(range(begun)), range(begun))
    step = _recorded(policy, own, found, points, stops, temperature)
    while True:
        for _ in range(BETWEEN):
            step()
        growing = own.slots.growing.tolist()  # here the host waits
        free = [row for row, grows in enumerate(growing) if not grows]
        going, waiting = len(growing) - len(free), count - begun
        if not going + waiting:
            return found
        if waiting and len(free) >= min(waiting, REFILLED * len(growing)):
            new = range(begun, begun + min(waiting, len(free)))
            own.begin(policy, prompts, free[: len(new)], new)
            begun = new.stop
        elif not waiting and (fewer := _fewer(len(growing), going)) < len(growing):
            staying = [row for row, grows in enumerate(growing) if grows]
            del step  # the recording, and the memory it computes in
            own = own.only((staying + free)[:fewer])
            step = _recorded(policy, own, found, points, stops, temperature)


def _that_fit(policy: PreTrainedModel, room: Int[Tensor, " rows"], device: torch.device) -> int:
    """How many of the rows that have room for so many tokens; at least one."""
    if device.type != "cuda":
        return len(room)
    most = CACHE * torch.cuda.get_device_properties(device).total_memory
    return max(1, int((room.cumsum(0) * decode.bytes_a_token(policy, device) <= most).sum()))


def _fewer(rows: int, going: int) -> int:
    """Rows halved as long as those that are still being written have room."""
    while rows // 2 >= max(going, FEWEST):
        rows //= 2
    return rows


def _recorded(
    policy: PreTrainedModel,
    rows: Rows,
    found: Written,
    points: Float[Tensor, "responses limit"],
    stops: Int[Tensor, " stops"],
    temperature: float,
) -> Callable[[], None]:
    """A step of these rows; on a GPU recorded, for which one is made."""

    def step() -> None:
        logits = decode.next_logits(policy, rows.token, rows.slots).float()
        _put(rows, found, logits, points, stops, temperature)

    if rows.token.device.type != "cuda":
        return step
    return _replayed(step, rows.token.device)


def _replayed(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    aside = _aside(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        step()  # counts as any other; libraries and compilers get ready in it
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):  # other threads may load data
        step()
    return graph.replay


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all recordings: libraries keep memory for every stream that they see."""
    return torch.cuda.Stream(device)


def _put(
    rows: Rows,
    found: Written,
    logits: Float[Tensor, "rows vocab"],
    points: Float[Tensor, "responses limit"],
    stops: Int[Tensor, " stops"],
    temperature: float,
) -> None:
    """Draws each row's next token and writes it down where a response is being written; asks nothing of the GPU."""
    growing, limit = rows.slots.growing.bool(), found.tokens.shape[1]
    length = found.lengths[rows.response]
    place = rows.response, length.clamp_max(limit - 1)
    token, logprobs = draw(logits, temperature, points[place])
    ends = growing & (token[:, None] == stops).any(1)
    found.tokens.index_put_(place, torch.where(growing, token, found.tokens[place]))
    found.logprobs.index_put_(place, torch.where(growing, logprobs, found.logprobs[place]))
    found.lengths.index_put_((rows.response,), length + growing)
    found.finished.index_put_((rows.response,), found.finished[rows.response] | ends)
    rows.token.copy_(token)
    rows.slots.growing.copy_(growing & ~ends & (length + 1 < limit))
