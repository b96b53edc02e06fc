"""The benchmark's command, with three contenders in processes of their own, on the smallest work."""

import json
from pathlib import Path

from tools.benchmark import command


def test_a_benchmark_measures_contenders_in_turns(tmp_path: Path) -> None:
    folders = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    chosen = ["--size", "tiny", "--only", "sft", "--against", "plain", "--turns", "2", "--threads", "1"]
    assert command.main([*folders, *chosen, "--precision", "float32,bfloat16"]) == 0
    found = json.loads((tmp_path / "out" / "performance.json").read_text())
    kind = found["kinds"]["sft"]
    assert not kind["left_out"]
    precisions = {name: contender["precision"] for name, contender in kind["contenders"].items()}
    assert precisions == {"ours": "float32", "ours, bf16": "bfloat16", "plain loop": "float32"}
    assert found["made"]["precisions"] == ["float32", "bfloat16"]
    assert set(kind["limits"]) == {"blocks", "head", "blocks, bfloat16", "head, bfloat16"}
    assert set(found["limits"]) == {*kind["limits"], "copy"}
    for contender in kind["contenders"].values():
        assert len(contender["turns"]) == 2 and all(turn["seconds"] > 0 for turn in contender["turns"])
        assert contender["peak"] >= contender["base"] > 0
    assert all(len(rates) == 2 and min(rates) > 0 for rates in kind["limits"].values())
    assert "| SFT | ours |" in (tmp_path / "out" / "performance.md").read_text()
    assert (tmp_path / "out" / "performance.png").exists()
