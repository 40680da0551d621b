"""Train a tokenizer or a language model: `python scripts/train.py stage=tokenizer`, `python scripts/train.py task=t2v`."""

import sys
from pathlib import Path

import hydra
import lightning
from hydra.utils import instantiate
from omegaconf import DictConfig

from reelm.engine import fit
from reelm.engine.errors import one_line_errors


@hydra.main(version_base=None, config_path="pkg://reelm.conf", config_name="train")
@one_line_errors
def main(cfg: DictConfig) -> float | None:
    lightning.seed_everything(cfg.seed, verbose=False)
    output = Path(cfg.output)
    data, module = instantiate(cfg.data), instantiate(cfg.stage)
    if cfg.trainer.precision == "auto":
        cfg.trainer.precision = fit.best_precision()
    trainer = instantiate(
        cfg.trainer,
        callbacks=fit.callbacks(output, cfg.ema, cfg.save_minutes, cfg.save_steps),
        logger=fit.loggers(output),
        default_root_dir=str(output),
    )
    status = fit.run(trainer, module, data, output, cfg.resume)
    if status:
        sys.exit(status)
    metric = trainer.callback_metrics.get(module.metric)  # what a sweep optimises
    return None if metric is None else float(metric)


if __name__ == "__main__":
    main()
