"""Two annotations for constructor arguments that name something on disk or on a hub.

They are plain strings at run time. The configuration check (`align.config.check`) recognises them in a signature and
reports what does not exist before anything is loaded.
"""

from typing import Annotated

DATA = "data file, folder or hub name"
MODEL = "model folder or hub name"

DataPath = Annotated[str, DATA]
"""A `.jsonl` or `.jsonl.gz` file, a folder or hub name of a Hugging Face dataset."""

ModelPath = Annotated[str, MODEL]
"""A folder with a Hugging Face model or tokenizer, or its name on the hub."""
