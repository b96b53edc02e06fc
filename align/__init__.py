"""Aligning language models with people's intentions: SFT, reward model and PPO (InstructGPT, arXiv:2203.02155)."""

import gc
import sys

if sys.argv[:1] == ["-m"]:
    # `python -m align.fit` is about to import a million objects of torch, transformers and Lightning, and would look
    # through them for garbage again and again, for a fifth of its start. `align.cli` has it begin again.
    gc.disable()
