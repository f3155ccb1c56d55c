"""How many tokens a model has, and how many it came with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def checkpoint_directory(recorded: str | None) -> Path | None:
    """A directory for what a config records: itself, or its snapshot in the local cache. Never the network."""
    if not recorded:
        return None
    if Path(recorded).is_dir():
        return Path(recorded)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(recorded, local_files_only=True))
    except Exception:  # not a name, not cached, or no hub library: there is nothing at hand
        return None


def original_vocabulary(model: Any) -> int | None:
    """How many tokens the checkpoint that ``model`` was loaded from has; None where it is not at hand.

    The model's own config tells no more: ``resize_token_embeddings`` writes the new number there.
    """
    config = getattr(model, "config", None)
    directory = checkpoint_directory(getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None))
    file = None if directory is None else directory / "config.json"
    if file is None or not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    held = [values, *(values[key] for key in ("text_config", "decoder", "llm_config") if key in values)]
    return next((int(v["vocab_size"]) for v in held if isinstance(v, dict) and v.get("vocab_size")), None)
