"""Aligning language models with people's intentions: SFT, reward model and PPO (InstructGPT, arXiv:2203.02155)."""

import gc
import sys
from itertools import pairwise

if sys.argv[:1] == ["-m"] and ("-m", "align") in [(one, two.partition(".")[0]) for one, two in pairwise(sys.orig_argv)]:
    # `python -m align.fit` is about to import half a million objects of torch, transformers and Lightning, and would
    # look through them for garbage again and again, for a fifth of its start. `align.cli` has it begin again.
    gc.disable()
