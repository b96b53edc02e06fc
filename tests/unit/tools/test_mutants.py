"""The list of mutants is up to date: each can be applied to the formulas as they are. `tools/mutants.py` runs them."""

from pathlib import Path

import pytest

from tools.mutants import ROOT, Mutant, mutated, read_mutants


def test_every_mutant_applies_and_changes_its_file() -> None:
    mutants = read_mutants()
    assert len(mutants) == len(set(mutants)) > 200
    for mutant in mutants:
        source = (ROOT / mutant.file).read_text()
        assert mutated(mutant, source) != source
        assert (ROOT / mutant.tests).is_dir()


def test_every_formula_has_a_mutant() -> None:
    """Each function of the formulas, from its `def` to the next, contains the original of a mutant."""
    mutants = read_mutants()
    for path in (ROOT / "align" / "formulas").glob("*.py"):
        file = str(path.relative_to(ROOT))
        originals = [mutant.original for mutant in mutants if mutant.file == file]
        for function in path.read_text().split("\ndef ")[1:]:
            name = function.split("(")[0]
            assert any(original in function for original in originals), f"{file}: no mutant for {name}"


def test_a_stale_or_ambiguous_original_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exactly once, found it 0 times"):
        mutated(Mutant("f.py", "a + b", "a - b"), "a * b")
    with pytest.raises(ValueError, match="exactly once, found it 2 times"):
        mutated(Mutant("f.py", "a", "b"), "a + a")
    listing = tmp_path / "list.txt"
    listing.write_text("a => b\n")
    with pytest.raises(ValueError, match=r"list.txt:1: expected '\[file\]' or"):
        read_mutants(listing)
