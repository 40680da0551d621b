"""reelm, a video language model: `reelm.load("zoetrope").generate("a red star moves left")`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reelm.data.clip import Clip
    from reelm.engine.loading import load
    from reelm.engine.video_lm import VideoLM

__version__ = "0.1.0"
__all__ = ["Clip", "VideoLM", "load"]

_HOMES = {"Clip": "reelm.data.clip", "VideoLM": "reelm.engine.video_lm", "load": "reelm.engine.loading"}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import reelm` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'reelm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
