"""See what a tokenizer keeps of a clip: `python scripts/reconstruct.py video=clip.mp4`."""

from omegaconf import DictConfig, OmegaConf

from reelm.engine.comparison import Comparison, run
from reelm.scripts.common import program


@program("reconstruct", words=("video", "model", "output", "audio_model", "lpips", "lpips_linear"))
def main(cfg: DictConfig) -> None:
    config = OmegaConf.to_container(cfg, resolve=True)
    run(
        Comparison(**{name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}),
        config,
    )


if __name__ == "__main__":
    main()
