"""The order of the quickstart's stages: what was stopped goes on where it was."""

import atexit
import sys
from pathlib import Path

import pytest

from tools.e2e import quickstart
from tools.e2e.quickstart import Command

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


@pytest.fixture(autouse=True, params=[False, pytest.param(True, marks=ON_LINUX)], ids=["started", "forked"])
def forks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to run a stage."""
    monkeypatch.setattr(quickstart, "FORKS", request.param)


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages that take no time: one that works, one that needs a file."""
    monkeypatch.chdir(tmp_path)
    works = Command(("timeit", "-n1", "-r1", "open('first', 'a').write('x')"))
    needs = Command(("json.tool", "needed.json", "done.json"))
    monkeypatch.setattr(quickstart, "STAGES", (("works", (works,)), ("needs a file", (needs,))))
    return tmp_path


def test_a_stage_that_failed_is_where_the_same_command_continues(
    stages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart.main([]) != 0
    assert "stage 2 ended with exit code" in capsys.readouterr().err
    (stages / "needed.json").write_text("{}")
    assert quickstart.main([]) == 0
    assert "continues with stage 2 of 2" in capsys.readouterr().out
    assert (stages / "done.json").exists() and (stages / "first").read_text() == "x"


def test_when_all_is_done_it_begins_again(stages: Path) -> None:
    (stages / "needed.json").write_text("{}")
    assert quickstart.main([]) == 0 == quickstart.main([])
    assert (stages / "first").read_text() == "xx"


def test_anew_and_start_say_where_to_begin(stages: Path) -> None:
    assert quickstart.main([]) != 0 and quickstart.main(["--anew"]) != 0
    assert (stages / "first").read_text() == "xx"
    (stages / "needed.json").write_text("{}")
    assert quickstart.main(["--start", "2"]) == 0
    assert (stages / "first").read_text() == "xx"


@pytest.mark.parametrize(("overwrite", "expected"), [(True, [True, True]), (False, [False, True])])
def test_only_a_stage_that_continues_keeps_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], overwrite: bool, expected: list[bool]
) -> None:
    # In their places, two modules that start at once and refuse the same words with the same code.
    monkeypatch.setattr(quickstart, "FIT", "tarfile")
    monkeypatch.setattr(quickstart, "EVALUATE", "zipfile")
    commands = (Command((quickstart.FIT, "no.yaml")), Command((quickstart.EVALUATE, "no.yaml")))
    assert quickstart._run(commands, overwrite=overwrite) == 2
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert [line.endswith("overwrite=true") for line in shown] == expected


def test_a_command_has_its_own_log_threads_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tells.py").write_text(
        "import atexit, os, sys, torch\n"
        "def main():\n"
        "    atexit.register(print, 'end')\n"
        "    print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], torch.get_num_threads(), flush=True)\n"
        "    print('mistake', file=sys.stderr, flush=True)\n"
        "    return 3\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    cleaned = tmp_path / "cleaned"
    atexit.register(cleaned.touch)  # of this process, not of those it forks
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(quickstart.os, "cpu_count", lambda: 2)
    logs = [tmp_path / "logs" / name for name in ("one", "two")]
    commands = tuple(Command(("tells", log.name), log=str(log)) for log in logs)
    assert quickstart._run(commands, overwrite=True) == 3
    for log in logs:
        assert sorted(log.read_text().splitlines()) == sorted([f"['{log.name}'] 1 1", "mistake", "end"])
    assert quickstart._run(commands[:1], overwrite=True) == 3
    assert sorted(logs[0].read_text().splitlines()) == sorted(["['one'] 2 2", "mistake", "end"])
    atexit.unregister(cleaned.touch)
    assert not cleaned.exists()
