"""Models side by side: every number against one had by hand or in another way, and the words of the report."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from align import bootstrap, evaluate, measure, seeds, tables
from align.bootstrap import Interval, cluster_sums, mean_intervals, ratio_intervals
from align.models.load import load_scalar_model
from align.types import Sequences
from tools.e2e import report

PROMPTS = [
    {"prompt": "w5 w6", "kind": "counted", "references": ["w20 w21", "w22", "w23 w24 w25"]},
    {"prompt": "w7", "kind": "counted", "references": ["w26"]},
    {"prompt": "w8 w9 w10 w11", "kind": "other"},
    {"prompt": "w12 w13", "kind": "counted"},
    {"prompt": "w14", "kind": "counted"},
]
DEMONSTRATIONS = [
    {"prompt": "w5 w6", "response": "w30 w31 w32"},
    {"prompt": "w5 w6", "response": "w33"},
    {"prompt": "w9", "response": "w34 w35"},
]
COMPARISONS = [
    {"prompt": "w5", "responses": ["w20", "w21 w22 w23", "w24 w25"], "scores": [1, 2, 3], "labeler": "ann"},
    {"prompt": "w6", "responses": ["w26", "w27 w28"], "scores": [2, 1], "labeler": "bob"},
]


class Words:
    """Counts words; in rows of the kind "counted" only."""

    better = {"words": "lower"}  # noqa: RUF012

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], responses: Sequence[str], finished: Sequence[bool]
    ) -> dict[str, list[float | None]]:
        pairs = zip(rows, responses, strict=True)
        return {"words": [float(len(text.split())) if row["kind"] == "counted" else None for row, text in pairs]}


class Shy(Words):
    """Announces more than it measures."""

    better = {"words": "lower", "letters": "higher"}  # noqa: RUF012


def configuration(folder: Path) -> dict[str, Any]:
    sampler = {"_target_": "align.rollout.sampler.DecodeSampler", "max_new_tokens": 12}
    return {
        "run_dir": str(folder / "run"),
        "seed": 1,
        "models": {"A": str(folder / "a"), "twin": str(folder / "a"), "B": str(folder / "b")},
        "reference": "A",
        "reward": {"_target_": "align.models.load.load_scalar_model", "path": str(folder / "a")},
        "prompts": PROMPTS,
        "max_prompt_tokens": 8,
        "max_response_tokens": 8,
        "samplers": {"greedy": {**sampler, "temperature": 0.0}, "sampled": {**sampler, "temperature": 1.0}},
        "metrics": {"words": {"_target_": "test_evaluate.Words"}},
        "win_by": "words",
        "human_text": DEMONSTRATIONS,
        "plain_text": [{"text": "w40 w41 w42"}, {"text": "w43 w44"}],
        "comparisons": {"people": COMPARISONS},
        "batch": 2,
        "micro_batch_tokens": 24,
        "resamples": 200,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models that often end their answers."""
    path = tmp_path_factory.mktemp("evaluate")
    for name, seed in {"a": 1, "b": 2}.items():
        tiny.llama(seed=seed, hidden_size=16, initializer_range=0.1).save_pretrained(path / name)
        tiny.tokenizer().save_pretrained(path / name)
    return path


def run(folder: Path, config: dict[str, Any], *overrides: str) -> int:
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    return evaluate.main([str(folder / "config.yaml"), *overrides])


class Output:
    """What a run wrote."""

    def __init__(self, folder: Path) -> None:
        self.results = json.loads((folder / "results.json").read_text())
        self.texts = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
        with open(folder / "table.csv", newline="") as file:
            self.table = list(csv.DictReader(file))
        self.means = {(row["model"], row["sampler"], row["metric"]): float(row["mean"]) for row in self.table}

    def of(self, model: str, sampler: str) -> Iterator[dict[str, Any]]:
        return (row for row in self.texts if (row["model"], row["sampler"]) == (model, sampler))


@pytest.fixture(scope="module")
def output(folder: Path) -> Output:
    assert run(folder, configuration(folder)) == 0
    return Output(folder / "run")


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def nats(folder: Path, name: str, prompt: list[int], response: list[int]) -> float:
    """−Σ log π of a response, from transformers' own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return -float(logprobs[torch.arange(len(response)), torch.tensor(response)].sum())


def test_every_model_and_sampler_answers_every_prompt_in_order(output: Output) -> None:
    for model in ("A", "twin", "B"):
        for sampler in ("greedy", "sampled"):
            rows = list(output.of(model, sampler))
            assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
            assert all("references" not in row for row in rows)
    assert [row["response"] for row in output.of("A", "sampled")] != [
        row["response"] for row in output.of("B", "sampled")
    ]


def test_a_metric_counts_only_where_it_applies(output: Output) -> None:
    for row in output.texts:
        assert ("words" in row["numbers"]) == (row["kind"] == "counted")
        if row["kind"] == "counted":
            assert row["numbers"]["words"] == len(row["response"].split())
    counted = [row["numbers"]["words"] for row in output.of("B", "sampled") if row["kind"] == "counted"]
    assert output.means["B", "sampled", "words"] == pytest.approx(sum(counted) / 4)
    line = next(
        row for row in output.table if (row["model"], row["sampler"], row["metric"]) == ("B", "sampled", "words")
    )
    assert line["n"] == "4" and float(line["low"]) <= float(line["mean"]) <= float(line["high"])


def test_length_counts_eos_and_finished_is_its_share(output: Output) -> None:
    rows = list(output.of("B", "sampled"))
    assert any(row["finished"] for row in rows)
    for row in rows:
        assert row["numbers"]["length"] == 12 or row["finished"]
        assert len(row["response"].split()) <= row["numbers"]["length"] - row["finished"]
    assert output.means["B", "sampled", "finished"] == pytest.approx(sum(row["finished"] for row in rows) / 5)


def test_kl_to_the_reference_is_exactly_zero_for_the_same_model(output: Output) -> None:
    assert all(row["numbers"]["kl"] == 0.0 for name in ("A", "twin") for row in output.of(name, "sampled"))
    assert all("kl" not in row["numbers"] for row in output.texts if row["sampler"] == "greedy")
    assert all("kl" not in row["numbers"] for row in output.of("people", "sampled"))


def test_kl_is_the_log_ratio_of_the_sampled_text(folder: Path, output: Output) -> None:
    plain = [
        row
        for row in output.of("B", "sampled")
        if row["numbers"]["length"] == len(row["response"].split()) + row["finished"]
    ]
    assert plain
    for row in plain:
        prompt, response = ids_of(row["prompt"]), ids_of(row["response"]) + [tiny.EOS] * row["finished"]
        expected = nats(folder, "a", prompt, response) - nats(folder, "b", prompt, response)
        assert row["numbers"]["kl"] == pytest.approx(expected, abs=1e-4)


def test_wins_compare_texts_on_the_same_prompt_and_ties_count_half(output: Output) -> None:
    opponents = {row["prompt"]: row for row in output.of("A", "sampled")}
    values = []
    for row in (row for row in output.of("B", "sampled") if row["kind"] == "counted"):
        own, other = row["numbers"]["words"], opponents[row["prompt"]]["numbers"]["words"]
        values.append(1.0 if own < other else 0.5 if own == other else 0.0)
        assert row["numbers"]["win"] == values[-1]
    assert output.means["B", "sampled", "win"] == pytest.approx(sum(values) / 4)
    assert output.means["twin", "greedy", "win"] == 0.5
    assert ("A", "greedy", "win") not in output.means


def test_people_are_one_reference_a_prompt(output: Output) -> None:
    for sampler in ("greedy", "sampled"):
        rows = list(output.of("people", sampler))
        assert [row["prompt"] for row in rows] == ["w5 w6", "w7"]
        for row, source in zip(rows, PROMPTS[:2], strict=True):
            assert row["response"] in source["references"]
            assert row["numbers"]["length"] == len(row["response"].split()) + 1
        assert {"reward", "words", "win"} <= rows[0]["numbers"].keys()


def test_which_reference_depends_on_the_seed_alone() -> None:
    rows = tuple({"references": [f"w{i}" for i in range(3, 30)]} for _ in range(8))
    prompts = tiny.prompts([2] * 8)
    prompts = type(prompts)(prompts.ids, prompts.lengths, rows)
    drawn = [measure.people_wrote(tiny.tokenizer(), prompts, 8, seed) for seed in (0, 0, 1)]
    texts = [found.responses for found in drawn if found is not None]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 2


def test_an_overlong_reference_is_cut_and_not_finished() -> None:
    prompts = tiny.prompts([3])
    prompts = type(prompts)(prompts.ids, prompts.lengths, ({"references": ["w3 w4 w5 w6"]},))
    found = measure.people_wrote(tiny.tokenizer(), prompts, 3, 0)
    assert found is not None and found.completions.ids[0].tolist() == [*prompts.ids[0].tolist(), 3, 4, 5]
    assert found.completions.response_lengths.tolist() == [3] and not found.completions.finished.any()


def test_rewards_are_the_reward_models(folder: Path, output: Output) -> None:
    row = next(output.of("people", "greedy"))
    reward = load_scalar_model(str(folder / "a")).eval()
    ids = torch.tensor([ids_of(row["prompt"]) + ids_of(row["response"]) + [tiny.EOS]])
    with torch.no_grad():
        hidden = reward.hf.base_model(ids).last_hidden_state[0, -1]
        assert row["numbers"]["reward"] == pytest.approx(float(reward.hf.score(hidden)), abs=1e-5)


def test_losses_are_nats_a_token_of_all_texts_together(folder: Path, output: Output) -> None:
    asked = [(ids_of(row["prompt"]), [*ids_of(row["response"]), tiny.EOS]) for row in DEMONSTRATIONS]
    expected = {name: sum(nats(folder, name, *pair) for pair in asked) / 9 for name in ("a", "b")}
    assert output.means["A", "", "loss/human_text"] == pytest.approx(expected["a"], abs=1e-5)
    assert output.means["B", "", "loss/human_text"] == pytest.approx(expected["b"], abs=1e-5)
    assert output.means["B", "", "loss/human_text/above"] == pytest.approx(expected["b"] - expected["a"], abs=1e-5)
    assert output.means["twin", "", "loss/human_text/above"] == 0.0
    texts = [([40], [41, 42, tiny.EOS]), ([43], [44, tiny.EOS])]
    plain = sum(nats(folder, "a", *pair) for pair in texts) / 5
    assert output.means["A", "", "loss/plain_text"] == pytest.approx(plain, abs=1e-5)


def test_agreement_is_counted_over_pairs(folder: Path, output: Output) -> None:
    reward = load_scalar_model(str(folder / "a")).eval()

    def score(prompt: str, response: str) -> float:
        with torch.no_grad():
            hidden = reward.hf.base_model(torch.tensor([ids_of(prompt) + ids_of(response) + [tiny.EOS]]))
            return float(reward.hf.score(hidden.last_hidden_state[0, -1]))

    first, second = ([score(row["prompt"], text) for text in row["responses"]] for row in COMPARISONS)
    hits = [first[1] > first[0], first[2] > first[0], first[2] > first[1], second[0] > second[1]]
    assert output.means["reward model", "", "agreement/people"] == pytest.approx(sum(hits) / 4)
    assert output.means["longer is better", "", "agreement/people"] == pytest.approx(2 / 4)
    assert output.results["agreement"]["people"]["accuracy"] == pytest.approx(sum(hits) / 4)
    assert output.results["agreement"]["people"]["accuracy/bob"] == float(hits[3])


def test_the_same_configuration_writes_the_same_files(folder: Path, output: Output) -> None:
    assert run(folder, configuration(folder), f"run_dir={folder / 'again'}") == 0
    for name in ("table.csv", "table.md", "texts.jsonl", "results.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "run" / name).read_bytes()


def test_everything_but_models_prompts_and_samplers_may_be_left_out(
    folder: Path, output: Output, capsys: pytest.CaptureFixture[str]
) -> None:
    left = ("reward", "metrics", "win_by", "human_text", "plain_text", "comparisons")
    config = {key: value for key, value in configuration(folder).items() if key not in left}
    assert run(folder, {**config, "run_dir": str(folder / "bare"), "limit": 2}) == 0
    assert {row["metric"] for row in Output(folder / "bare").table} == {"kl", "length", "finished"}
    assert "2 prompts, temperature 1" in capsys.readouterr().out


def test_mistakes_are_reported_together_with_exit_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**configuration(folder), "run_dir": str(folder / "never"), "reference": "C", "batch": 0, "reward": None}
    config["models"]["people"] = str(folder / "nowhere" / "x")
    config["samplers"]["greedy"]["temprature"] = 1
    assert run(folder, config) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and not (folder / "never").exists()
    for part in (
        "reference: got 'C', expected one of the models: A, twin, B",
        "batch: got 0",
        "models.people: the name stands for",
        "x does not exist",
        "samplers.greedy.temprature",
        "comparisons: given without a reward model",
    ):
        assert part in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["win_by=letters"], "win_by: got 'letters', expected one of reward, words"),
        (["metrics.words._target_=test_evaluate.Shy"], "its `better` names ['letters', 'words']"),
        (["max_prompt_tokens=1", "prompts=[{prompt: w5 w6}]"], "no usable prompt"),
    ],
)
def test_what_cannot_work_ends_with_a_reason(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert run(folder, configuration(folder), f"run_dir={folder / 'refused'}", "overwrite=true", *overrides) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_earlier_evaluation_is_kept_unless_told(folder: Path, output: Output) -> None:
    assert run(folder, configuration(folder)) == 2
    assert (folder / "run" / "table.csv").exists()


def test_models_must_share_their_vocabulary(folder: Path, tmp_path: Path) -> None:
    other = tiny.tokenizer()
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"models\.B: its tokenizer's vocabulary is not that of A"):
        measure.shared_tokenizer({"A": str(folder / "a"), "B": str(tmp_path)}, "A")


def test_two_metrics_may_not_share_a_name() -> None:
    with pytest.raises(ValueError, match="two metrics are called 'words'"):
        measure.directions([Words(), Words()], None, rewarded=False)
    assert measure.directions([Words()], "reward", rewarded=True)["words"] == "lower"
    with pytest.raises(ValueError, match="win_by: got 'reward'"):
        measure.directions([Words()], "reward", rewarded=False)


def test_wins_with_ties_and_missing_numbers() -> None:
    own, other = torch.tensor([1.0, 2.0, 3.0, float("nan"), 0.0]), torch.tensor([2.0, 2.0, 1.0, 1.0, float("nan")])
    for better, expected in {"lower": [1.0, 0.5, 0.0], "higher": [0.0, 0.5, 1.0]}.items():
        found = measure.wins(own, other, better)
        assert found[:3].tolist() == expected and found[3:].isnan().all()


def test_the_bootstrap_interval_of_a_normal_mean_has_its_known_width() -> None:
    values = torch.randn(400, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3.0
    found = [item for item in mean_intervals(values, 2000, torch.Generator().manual_seed(0)) if item is not None]
    widths = [item.high - item.low for item in found]
    assert sum(widths) / 50 == pytest.approx(2 * 1.96 / 20, rel=0.03)
    covered = sum(item.low <= 3.0 <= item.high for item in found)
    assert 43 <= covered <= 50  # of 50 intervals, 47.5 on average, with a standard deviation of 1.5
    assert found[0].mean == pytest.approx(float(values[:, 0].mean())) and found[0].n == 400


def test_the_bootstrap_of_two_prompts_is_known_exactly() -> None:
    values = torch.tensor([[0.0, 5.0, float("nan")], [1.0, 5.0, float("nan")]])
    both, constant, nothing = mean_intervals(values, 1000, torch.Generator().manual_seed(0))
    assert both == Interval(0.5, 0.0, 1.0, 2)  # means 0, 0.5 and 1 come with chances 1/4, 1/2 and 1/4
    assert constant == Interval(5.0, 5.0, 5.0, 2)
    assert nothing is None


def test_ratios_resample_pairs() -> None:
    below = torch.tensor([[1.0], [2.0], [7.0]])
    (exact,) = ratio_intervals(0.5 * below, below, 500, torch.Generator().manual_seed(0))
    assert (exact.mean, exact.low, exact.high, exact.n) == (0.5, 0.5, 0.5, 10)
    (weighted,) = ratio_intervals(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [3.0]]), 9, torch.Generator())
    assert weighted.mean == 1.0


def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(37, 2, generator=torch.Generator().manual_seed(1))
    whole = mean_intervals(values, 100, torch.Generator().manual_seed(0))
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 100)
    assert mean_intervals(values, 100, torch.Generator().manual_seed(0)) == whole


def test_clusters_are_summed_by_key() -> None:
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    assert cluster_sums(values, ["x", "y", "x"]).tolist() == [[5.0, 50.0], [2.0, 20.0]]
    demonstrations = tiny_demonstrations()
    assert len(set(measure.prompt_keys(demonstrations))) == 2


def tiny_demonstrations() -> Sequences:
    ids = torch.tensor([[5, 6, 30, 2], [5, 6, 33, 2], [9, 34, 35, 2]])
    mask = torch.tensor([[False, False, True, True], [False, False, True, True], [False, True, True, True]])
    return Sequences(ids, torch.tensor([4, 4, 4]), mask)


@pytest.mark.parametrize(
    ("half_width", "shown"), [(0.3, "1.0 ± 0.3"), (0.14, "1.00 ± 0.14"), (2.0, "1 ± 2"), (0.0004, "1.000 ± 0.000")]
)
def test_a_number_is_printed_with_the_digits_it_is_worth(half_width: float, shown: str) -> None:
    interval = Interval(1.0, 1.0 - half_width, 1.0 + half_width, 9)
    assert interval.shown(interval.decimals) == shown


def test_tables_put_metrics_in_rows_and_models_in_columns() -> None:
    findings = [
        measure.Finding("A", "s", "x", Interval(1.0, 0.5, 1.5, 3)),
        measure.Finding("B", "s", "x", Interval(2.0, 1.5, 2.5, 3)),
        measure.Finding("B", "s", "y", Interval(7.0, 7.0, 7.0, 3)),
    ]
    side = tables.side_by_side("title", findings, {"y": "why", "x": "ex"})
    assert side.columns == ["A", "B"]
    assert side.rows == [("why", ["", "7.00 ± 0.00"]), ("ex", ["1.0 ± 0.5", "2.0 ± 0.5"])]


def fact_evaluation(errors: dict[str, list[float]]) -> report.Evaluation:
    """An evaluation with these missing or wrong facts, prompt by prompt, and wins against SFT."""
    found, texts = {}, {}
    for name, values in errors.items():
        own, sft = torch.tensor(values), torch.tensor(errors["SFT"])
        columns = torch.stack([own, measure.wins(own, sft, "lower")], dim=1)
        both = mean_intervals(columns, 500, seeds.generator(0, "test"))
        for metric, value in zip(("missing_or_wrong", "win"), both, strict=True):
            assert value is not None
            found["greedy", name, metric] = value
        wins = columns[:, 1].tolist()
        texts["greedy", name] = {
            str(i): {"missing_or_wrong": error, "win": win}
            for i, (error, win) in enumerate(zip(values, wins, strict=True))
        }
    return report.Evaluation("SFT", {"greedy": 0.0}, found, texts, "")


def test_the_report_compares_errors_on_the_same_prompts() -> None:
    evaluation = fact_evaluation({"SFT": [2.0, 4.0, 2.0], "PPO-ptx": [1.0, 2.0, 1.0]})
    fewer = report.fewer_errors(evaluation, "greedy", "PPO-ptx")
    assert fewer == Interval(0.5, 0.5, 0.5, 3)
    text = report.about_errors(evaluation, "greedy", "PPO-ptx")
    assert "50% fewer" in text and "2.67 → 1.33" in text and text.endswith("met.")
    assert "wins 100% of pairs" in report.about_wins(evaluation, "greedy", "PPO-ptx")


def test_the_report_calls_a_missed_target_missed() -> None:
    errors = {"SFT": [2.0, 5.0, 3.0, 0.0], "PPO-ptx": [2.0, 3.0, 3.0, 0.0], "PPO": [4.0, 6.0, 4.0, 1.0]}
    evaluation = fact_evaluation(errors)
    text = report.about_errors(evaluation, "greedy", "PPO-ptx")
    assert "20% fewer" in text and text.endswith("**missed**.")
    wins = report.about_wins(evaluation, "greedy", "PPO-ptx")
    assert "62% of pairs" in wins and "100% of the 25% that are no tie" in wins and wins.endswith("**missed**.")
    other = report.about_errors(evaluation, "greedy", "PPO")
    assert "50% more" in other and "arget" not in other
