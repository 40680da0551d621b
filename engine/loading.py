"""Where models of any kind are found and loaded."""

from __future__ import annotations

from pathlib import Path

from reelm.engine import outside, store
from reelm.engine.video_diffusion import VideoDiffusion
from reelm.engine.video_lm import VideoLM
from reelm.engine.video_model import VideoModel
from reelm.tokenizers.tokenizer import VideoTokenizer

BOX = Path(__file__).resolve().parents[1] / "pretrained"


def find(name: str | Path) -> Path:
    """The folder of a model of the box ("zoetrope"), or the folder that the name is."""
    folder = Path(name)
    if not folder.is_dir() and (BOX / str(name)).is_dir():
        folder = BOX / str(name)
    if not folder.is_dir():
        boxed = sorted(path.name for path in BOX.iterdir() if path.is_dir()) if BOX.is_dir() else []
        raise FileNotFoundError(f"no model {name}: give a folder or one of the box: {', '.join(boxed) or '(empty)'}")
    return folder


def load(name: str | Path) -> VideoModel:
    """A model from the box by its name ("zoetrope"), or from a folder, which tells its kind by the part in it."""
    folder = find(name)
    if not (folder / "config.json").is_file() and (folder / "tokenizer").is_dir():
        raise ValueError(
            f"model={name} is a tokenizer alone, which makes no clips; give a model with lm/ or diffusion/"
        )
    kind = VideoDiffusion if (folder / VideoDiffusion.part).is_dir() else VideoLM
    return kind.from_pretrained(folder)


def load_tokenizer(name: str, trust: bool = False) -> tuple[VideoTokenizer, Path]:
    """The tokenizer of a model of the box, of a model's folder, or of its own folder, which may be one from outside
    (`outside.load`); and that folder. trust: TorchScript programs."""
    folder = store.part_of(find(name), "tokenizer")
    model = outside.load(folder, trust)
    if not isinstance(model, VideoTokenizer):
        raise ValueError(f"model={name} holds a {type(model).__name__}, which is no video tokenizer")
    return model, folder
