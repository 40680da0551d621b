"""Make tokens of clips: `python scripts/encode.py data=folder data.root=my_clips`, then train with `data=tokens`."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from reelm.engine.encoding import Encoding, encode
from reelm.engine.loading import load_tokenizer
from reelm.scripts.common import program


@program("encode", words=("model", "output"))
def main(cfg: DictConfig) -> None:
    data, tokenizer = instantiate(cfg.data), load_tokenizer(cfg.model, cfg.trust)[0]
    jobs = [
        Encoding(
            source=getattr(data, split),
            tokenizer=tokenizer,
            folder=Path(cfg.output) / split,
            about=OmegaConf.to_container(cfg.data[split], resolve=True),
            shard_clips=cfg.shard_clips,
            batch_size=cfg.batch_size,
            passes=cfg.passes if split == "train" else 1,
        )
        for split in ("train", "validation")
    ]
    encode(jobs, cfg.workers, cfg.backend)


if __name__ == "__main__":
    main()
