"""The benchmark's arithmetic by hand, its line to the workers, its tables, and the work that all contenders share."""

import gc
import io
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.bootstrap import Interval
from tools.benchmark import command, flops, goals, growth, ours, page, plain, plain_ppo, results, venvs, work, worker
from tools.benchmark.kinds import BFLOAT16, FLOAT32, KINDS
from tools.benchmark.protocol import BenchmarkError, Turn, peak_bytes, tail

TINY = work.SIZES["tiny"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> work.Work:
    """The tiny work, written."""
    return work.write(tmp_path_factory.mktemp("work"), TINY)


# Numbers.


def test_a_ratio_is_that_of_medians() -> None:
    """Medians 4 and 2: 2, whatever the outliers."""
    found = results.ratio_of_medians([4.0, 4.0, 100.0], [2.0, 2.0, 0.1])
    assert found.mean == 2.0
    assert found.low <= 2.0 <= found.high and found.n == 3


def test_the_interval_of_a_ratio_is_that_of_paired_turns() -> None:
    """Every turn is twice as fast, though turns differ by a factor of a hundred: no resample says anything else."""
    slow = [1.0, 10.0, 100.0, 3.0]
    found = results.ratio_of_medians([2.0 * value for value in slow], slow)
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_interval_reaches_as_far_as_resampled_medians_do() -> None:
    """Of three turns 1, 2, 9 a resample has the median 1 or 9 in 7 of 27 cases each, beyond 2.5 % on both sides."""
    found = results.ratio_of_medians([1.0, 2.0, 9.0], [1.0, 1.0, 1.0])
    assert (found.mean, found.low, found.high) == (2.0, 1.0, 9.0)


def test_two_turns_have_no_interval() -> None:
    found = results.ratio_of_medians([4.0, 8.0], [2.0, 2.0])
    assert found == Interval(3.0, 3.0, 3.0, 2)


def test_operations_of_a_hand_count() -> None:
    """Hidden 2, inner 3, one layer, vocabulary 5: 4·4 + 3·6 = 34 weights a token, 68 operations, 8 a pair attended."""
    size = work.resized(TINY, hidden=2, inner=3, layers=1, vocab=5)
    assert flops.causal(3) == 6 and flops.causal(2, before=3) == 9
    assert flops.trunk(size, tokens=3, attended=6) == 3 * 68 + 6 * 8
    assert flops.head(size, 2) == 2 * 2 * 5 * 2
    assert flops.sft(size, [(1, 2)]) == 3 * (252 + 40)
    # A prompt of 3 tokens once, answers of 2 and 1 behind it: 6 tokens, 6 + 9 + 4 pairs.
    assert flops.reward(size, [(3, [2, 1])]) == 3 * (6 * 68 + 19 * 8)
    assert flops.ppo_update(size, [(1, 2)], epochs=4) == 3 * 4 * (2 * 252 + 40)


def test_operations_grow_with_layers() -> None:
    one, two = (flops.trunk(work.resized(TINY, layers=layers), 5, 15) for layers in (1, 2))
    assert two == 2 * one


def test_every_kind_has_its_operations(made: work.Work) -> None:
    for name, kind in KINDS.items():
        if kind.limited:
            assert flops.of(name, made) > 0


# The work.


def test_lengths_have_their_quantiles_and_bounds() -> None:
    """Four values of a lognormal with median e and sigma 1 stand at its 12.5, 37.5, 62.5 and 87.5 % quantiles."""
    draw = work.random.Random(0)
    found = sorted(work.Spread(2.71828, 1, 1000, sigma=1.0).lengths(4, draw))
    assert found == [round(2.71828 ** (1 + z)) for z in (-1.1503, -0.3186, 0.3186, 1.1503)]
    assert set(work.Spread(50, 40, 60, sigma=3.0).lengths(9, draw)) == {40, 50, 60}


def test_the_policy_answers_as_long_as_the_prompt_asks(made: work.Work) -> None:
    """By transformers' generate and by our sampler: every response ends where its prompt's last token says."""
    wanted = [work.response_length(prompt, TINY) for prompt in made.prompts]
    assert len(set(wanted)) > 4
    prompts = plain_ppo.left_padded(made.prompts)
    policy = AutoModelForCausalLM.from_pretrained(made.policy)
    ids = plain_ppo.generated(policy, prompts, TINY.response.high)[:, prompts.shape[1] :]
    assert (ids != work.PAD).sum(1).tolist() == wanted
    assert ours.prepare("rollout", "decode", made, FLOAT32)().units == sum(wanted)


def test_a_size_that_cannot_count_down_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least as many hidden"):
        work.write(tmp_path, work.resized(TINY, hidden=8))


def test_the_work_is_read_as_it_was_written(made: work.Work) -> None:
    assert work.Work.read(made.folder) == made


@pytest.mark.parametrize("kind", KINDS)
def test_ours_and_the_plain_loop_do_the_same_amount(kind: str, made: work.Work) -> None:
    setting = next(item for item in KINDS[kind].contenders if item.name == "ours").settings[0]
    own, other = ours.prepare(kind, setting, made, FLOAT32)(), plain.prepare(kind, "", made, FLOAT32)()
    assert own.units == other.units > 0
    assert set(own.phases) == set(other.phases)
    if kind == "ppo":
        assert sum(own.phases.values()) == pytest.approx(own.seconds)


def test_both_losses_of_the_plain_loop_are_ours(made: work.Work) -> None:
    """Pairs are put the right way round: the better answer of scores 0, 2, 1 beats both others."""
    better, worse = plain.ordered_pairs([[0, 2, 1]])
    assert sorted(zip(better[0].tolist(), worse[0].tolist(), strict=True)) == [(1, 0), (1, 2), (2, 0)]


def test_a_value_and_a_policy_at_their_start_have_the_loss_of_their_errors() -> None:
    """Ratio 1: the policy loss is minus the mean advantage; the value loss half the weighted mean square."""
    one = torch.zeros(1, 2)
    episodes = plain_ppo.Episodes(
        ids=torch.zeros(1, 3, dtype=torch.long), prompt=1, mask=torch.tensor([[True, True]]), logprobs=one,
        values=one, advantages=torch.tensor([[1.0, 3.0]]), returns=torch.tensor([[2.0, 0.0]]),
    )  # fmt: skip
    assert float(plain_ppo.objective(one, one, episodes)) == pytest.approx(-2.0 + 0.5 * work.VALUE_COEF * 2.0)


def test_growing_changes_one_thing_at_a_time() -> None:
    axes = growth.axes(work.SIZES["15m"])
    assert list(axes["vocabulary"]) == [1024, 8192, 32768, 65536]
    assert {point["examples"] * length for length, point in axes["tokens an example"].items()} == {2048}
    assert ours.grow(TINY, FLOAT32, examples=2, vocab=64).units > 0


# The line to a worker.


def test_a_worker_answers_each_request_with_one_line(made: work.Work) -> None:
    shared = {"module": "tools.benchmark.plain", "setting": "", "work": str(made.folder), "threads": 1}
    shared["precision"] = FLOAT32
    requests = [{"do": "prepare", "kind": "sft", **shared}, {"do": "turn", "arguments": {}}, {"do": "end"}]
    answers = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    prepared, measured, ended = (json.loads(line) for line in answers.getvalue().splitlines())
    assert prepared["versions"]["torch"] and ended["memory"] >= prepared["memory"] > 0
    turn = Turn(**measured)
    assert turn.units == sum(len(row["prompt"]) + len(row["response"]) for row in made.demonstrations)
    assert turn.rate == turn.units / turn.seconds


def test_a_worker_collects_a_turns_garbage(made: work.Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would count as the next turn's memory."""
    left: list[weakref.ref[torch.nn.Module]] = []

    def turn() -> Turn:
        cycle = torch.nn.Module()
        cycle.hook = lambda: cycle  # type: ignore[assignment]
        left.append(weakref.ref(cycle))
        return Turn(1.0, 1)

    monkeypatch.setattr(plain, "prepare", lambda *_: turn)
    shared = {"module": "tools.benchmark.plain", "setting": "", "work": str(made.folder), "threads": 1}
    requests = [{"do": "prepare", "kind": "sft", "precision": FLOAT32, **shared}, {"do": "turn", "arguments": {}}]
    gc.disable()
    try:
        worker.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), io.StringIO())
    finally:
        gc.enable()
    assert left[0]() is None


def test_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert peak_bytes(3) == 3072
    monkeypatch.setattr("sys.platform", "darwin")
    assert peak_bytes(3) == 3


def test_the_end_of_a_log_is_shown(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(map(str, range(20))))
    assert tail(tmp_path / "log").split() == [str(number) for number in range(12, 20)]


def test_an_environment_that_pip_cannot_make_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venvs.sys, "executable", "false")
    with pytest.raises(BenchmarkError, match=r"trl==0: .*exit code 1(.|\n)*--against plain"):
        venvs.python(tmp_path, "trl==0")


# Tables.


def contender(seconds: list[float], units: float = 60.0, **more: Any) -> dict[str, Any]:
    """What a run keeps of a contender."""
    turns = [{"seconds": taken, "units": units, "phases": {}} for taken in seconds]
    return {"setting": "", "trials": {}, "turns": turns, "base": 1e6, "peak": 11e6, "versions": {}, "flops": 40, **more}


@pytest.fixture
def found() -> dict[str, Any]:
    """A run of SFT: ours takes 2 s a turn, TRL 6 s; 40 operations in 2 s of a machine that makes 25 a second."""
    contenders = {
        "ours": contender([2.0, 2.0, 2.0]),
        "TRL": contender([6.0, 6.0, 6.0], setting="packed", trials={"packed": 10.0}),
    }
    kind = {
        "contenders": contenders,
        "left_out": {"plain loop": "why not\nmore"},
        "limits": {"blocks": [25.0] * 3, "head": [20.0] * 3},
    }  # fmt: skip
    made = {
        "date": "2025-01-01", "commit": "abc", "cpu": "A CPU", "cores": 2, "threads": 2, "versions": {"torch": "2"}
    }  # fmt: skip
    growth = {"vocabulary": {"sizes": [8, 16], "rates": [[1000.0, 3000.0], [500.0]]}}
    limits = {"blocks": [2e9], "head": [1e9], "copy": [3e9]}
    return {
        "made": made, "kinds": {"sft": kind}, "limits": limits, "growth": growth, "failed": {},
        "scaling": {"1": [100.0] * 3, "2": [190.0] * 3},
    }  # fmt: skip


def test_tables_say_what_was_found(found: dict[str, Any]) -> None:
    shown = page.tables(found)
    assert "commit abc: A CPU, 2 threads of 2 cores, float32; torch 2." in shown
    assert "| SFT | ours | 30 tokens/s | 3.00 × TRL | 80% | 10 |" in shown
    assert "|  | TRL (packed) | 10 tokens/s |  | 27% | 10 |" in shown
    assert "The machine: in float32 2 GFLOP/s in products of the blocks' shape, 1 in those" in shown
    assert "in bfloat16" not in shown and "output matrix; copies move 3.0 GB/s" in shown
    assert (
        "SFT in float32 with one thread a process: 100 tokens/s by one process, 190 by two: 1.90 ×, of 2 at best"
        in shown
    )
    assert "| SFT in float32, tokens/s at |" in shown and "| vocabulary | 8: 2,000 | 16: 500 |" in shown
    assert "Left out: plain loop at SFT: why not\n" in shown


def test_a_share_is_that_of_the_limit_in_the_contenders_own_precision(found: dict[str, Any]) -> None:
    """40 operations in 1 s of a machine that makes 80 a second in bfloat16, in which the other product is slower."""
    kind = found["kinds"]["sft"]
    kind["contenders"]["ours, bf16"] = contender([1.0, 1.0, 1.0], precision=BFLOAT16)
    kind["limits"] |= {"blocks, bfloat16": [80.0] * 3, "head, bfloat16": [50.0] * 3}
    found["limits"] |= {"blocks, bfloat16": [8e9], "head, bfloat16": [5e9]}
    found["made"]["precisions"] = [FLOAT32, BFLOAT16]
    found["growth"]["vocabulary"]["precision"] = found["scaling"]["precision"] = BFLOAT16
    shown = page.tables(found)
    assert "2 cores, float32 and bfloat16; torch" in shown
    assert "|  | ours, bf16 | 60 tokens/s | 6.00 × TRL | 50% | 10 |" in shown
    assert "| SFT | ours | 30 tokens/s | 3.00 × TRL | 80% | 10 |" in shown
    assert "in bfloat16 8 GFLOP/s in products of the blocks' shape, 5 in those of the output matrix; copies" in shown
    assert "| SFT in bfloat16, tokens/s at |" in shown and "SFT in bfloat16 with one thread a process" in shown


def test_speeds_are_compared_with_the_kinds_baseline_or_the_loop() -> None:
    every = {"ours": contender([1.0]), "plain loop": contender([4.0]), "ours, by generate": contender([3.0])}
    kind = {"contenders": {**every, "TRL": contender([2.0])}}
    assert {name: found.mean for name, found in results.speedups("sft", kind).items()} == {
        "ours": 2.0, "plain loop": 0.5, "ours, by generate": pytest.approx(2 / 3)
    }  # fmt: skip
    assert results.baseline("rollout", kind) == "ours, by generate"
    assert results.speedups("rollout", kind)["ours"].mean == 3.0
    assert results.baseline("sft", {"contenders": every}) == "plain loop"
    assert results.speedups("sft", {"contenders": every})["ours"].mean == 4.0
    assert results.speedups("sft", {"contenders": {"ours": contender([1.0])}}) == {}


def test_goals_have_a_table(found: dict[str, Any]) -> None:
    """Ours is 2 and 8 times as fast as TRL, whose bfloat16 is the faster one of the reward model, with half the memory.

    Shares: 40 operations in 2 s of 25 a second, and in 0.5 s of 200 a second.
    """
    contenders = {
        "ours": contender([2.0] * 3, base=1e6, peak=5e6),
        "ours, bf16": contender([0.5] * 3, precision=BFLOAT16),
        "TRL": contender([4.0] * 3, base=1e6, peak=11e6),
        "TRL, bf16": contender([0.25, 2.5, 3.0], precision=BFLOAT16),
    }
    limits = {"blocks": [25.0] * 3, "head": [20.0] * 3, "blocks, bfloat16": [200.0] * 3, "head, bfloat16": [50.0] * 3}
    kind = {"contenders": contenders, "left_out": {}, "limits": limits}
    found["kinds"] = {"ppo": kind, "reward4": kind, "reward9": {**kind, "contenders": {"ours": contenders["ours"]}}}
    lines = [line for line in page.tables(found).splitlines() if "at least" in line or "at most" in line]
    assert lines == [
        "| PPO, four networks, same precision | ours | TRL | at least 5 × | 2.00 × |",
        "| PPO, four networks, same precision | ours, bf16 | TRL, bf16 | at least 5 × | **5.00 × [0.50, 6.00]** |",
        "| PPO, memory | ours | TRL | at most 0.5 × | **0.40 ×** |",
        "| reward model, 4 answers, same precision | ours | TRL | at least 8 × | 2.00 × |",
        "| reward model, 4 answers, each at its best precision | ours, bf16 | TRL, bf16 | at least 14 × "
        "| 5.00 × [0.50, 6.00] |",
        "| PPO's update, share of the matrix limit | ours |  | at least 60% | **80%** |",
        "| PPO's update, share of the matrix limit | ours, bf16 |  | at least 60% | 40% |",
        "| reward model, 4 answers, share of the matrix limit | ours |  | at least 60% | **80%** |",
        "| reward model, 4 answers, share of the matrix limit | ours, bf16 |  | at least 60% | 40% |",
    ]
    contenders["TRL"] = contender([1.0] * 3, base=1e6, peak=5e6)
    shown = page.tables(found)
    assert "best precision | ours, bf16 | TRL | at least 14 × | 2.00 × |" in shown
    assert "| PPO, memory | ours | TRL | at most 0.5 × | 1.00 × |" in shown


def test_goals_name_contenders_that_exist() -> None:
    for goal in goals.GOALS:
        assert {goal.ours, *goal.against} <= {item.name for item in KINDS[goal.kind].contenders}
        assert (goal.about in (goals.SHARE, goals.MFU)) == (not goal.against)


def test_phases_have_a_table_of_their_own(found: dict[str, Any]) -> None:
    turns = [{"seconds": 6.0, "units": 3, "phases": {"rollout": 1.0, "scoring": 2.0, "update": 4.0}}]
    own = found["kinds"]["sft"]["contenders"]["ours"]
    found["kinds"] = {
        "ppo": {**found["kinds"]["sft"], "contenders": {"ours": {**own, "turns": turns}}, "limits": {"head": [20.0]}}
    }
    shown = page.tables(found)
    assert "| goals |" in shown and shown.index("| goals |") > shown.index("| PPO, seconds a rollout |")
    assert "| PPO, seconds a rollout | rollout | scoring | update |" in shown and "| ours | 1 | 2 | 4 |" in shown
    assert "| PPO | ours | 0.5 episodes/s |  | 50% | 10 |" in shown  # 40 operations in the update's 4 s


@pytest.mark.parametrize(
    ("value", "shown"), [(0.12345, "0.123"), (1.5, "1.5"), (99.96, "100"), (123.4, "123"), (12345.6, "12,300")]
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert page.significant(value) == shown


def test_a_page_keeps_what_stands_around_the_tables(tmp_path: Path, found: dict[str, Any]) -> None:
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nbehind\n")
    page.write(path, found)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("behind\n") and "old" not in text and "30 tokens/s" in text
    path.write_text("no place for them")
    with pytest.raises(BenchmarkError, match="expected both"):
        page.write(path, found)


def test_a_run_of_one_kind_keeps_what_others_measured_on_the_same_machine(
    tmp_path: Path, found: dict[str, Any]
) -> None:
    now = {**found["made"], "gpu": "", "size": "15m", "commit": "def", "date": "2025-02-02", "precisions": [FLOAT32]}
    assert command.kept(tmp_path / "performance.json", now, ["ppo"]) == {}
    kinds = {**found["kinds"], "ppo": found["kinds"]["sft"]}
    before = {**found, "kinds": kinds, "made": {**found["made"], "size": "15m"}}
    before["earlier"] = {"sft": {"date": "2024-12-31", "commit": "old"}}
    (tmp_path / "performance.json").write_text(json.dumps(before))
    kept = command.kept(tmp_path / "performance.json", now, ["ppo"])
    assert kept["kinds"] == found["kinds"] and kept["growth"] == found["growth"] and "limits" not in kept
    mine, old = {"date": "2025-01-01", "commit": "abc"}, {"date": "2024-12-31", "commit": "old"}
    assert kept["earlier"] == {"sft": old, "growth": mine, "scaling": mine}
    assert command.kept(tmp_path / "performance.json", now, ["growth", "scaling", "sft"])["earlier"] == {"ppo": mine}
    for changed in (
        {"cpu": "another"},
        {"gpu": "one"},
        {"threads": 1},
        {"size": "tiny"},
        {"precisions": [FLOAT32, BFLOAT16]},
    ):
        assert command.kept(tmp_path / "performance.json", {**now, **changed}, ["ppo"]) == {}
    shown = page.tables({**found, "made": now, **kept})
    assert "2025-02-02, commit def: A CPU" in shown
    assert "Of 2024-12-31, commit old: SFT. Of 2025-01-01, commit abc: growth; scaling.\n" in shown


def test_a_network_of_which_half_learns_needs_half(made: work.Work) -> None:
    whole, half, head = (flops.ppo_update(TINY, [(3, 2)], 2, networks) for networks in (2, 1, 0))
    assert whole - half == half - head == 3 * 2 * flops.trunk(TINY, 5, 15)


def test_a_run_can_be_reported_again(tmp_path: Path, found: dict[str, Any]) -> None:
    (tmp_path / "performance.json").write_text(json.dumps(found))
    assert command.main(["--report-only", "--out", str(tmp_path)]) == 1  # something had been left out
    assert "30 tokens/s" in (tmp_path / "performance.md").read_text()
    assert (tmp_path / "performance.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--only", "sft,grpo"], "--only: got 'sft,grpo', expected names of sft, reward4"),
        (["--against", ""], "--against: got '', expected names of plain, trl"),
        (["--precision", "bfloat16,int8"], "--precision: got 'bfloat16,int8', expected names of float32, bfloat16"),
        (["--report-only"], "performance.json is not there; run without it first"),
    ],
)
def test_mistakes_are_told(arguments: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*arguments, "--out", str(tmp_path / "none")]) == 2
    assert what in " ".join(capsys.readouterr().err.split())
