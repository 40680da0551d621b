"""Train a tokenizer or a language model: `python scripts/train.py stage=tokenizer`, `... train.py task=t2v`."""

import sys

import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from reelm.engine import fit
from reelm.scripts.common import output_of, program

EXTRAS = ("adversary", "reward")  # by default none; that of another stage would not be heeded


@program("train")
def main(cfg: DictConfig) -> float | None:
    used = OmegaConf.to_container(cfg.stage).values()
    for name in EXTRAS:
        if cfg[name] is not None and f"${{{name}}}" not in used:
            stage = HydraConfig.get().runtime.choices.stage
            raise ValueError(f"stage={stage} learns without {name}; leave {name}=... out")
    lightning.seed_everything(cfg.seed, verbose=False)
    output = output_of(cfg)
    fit.check_output(output, cfg.resume)
    data, module = instantiate(cfg.data), instantiate(cfg.stage)
    if cfg.init and not cfg.resume:
        module.start_from(cfg.init)
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
