"""Measure speed beside what the machine can do at most: `python scripts/benchmark.py suite=zoetrope`."""

from pathlib import Path

import lightning
from hydra.utils import instantiate
from omegaconf import DictConfig

from reelm.engine import benchmark_decode, benchmark_gpu, benchmark_train, tokenizer_benchmark
from reelm.engine.benchmark import SUITES, Settings, random_model, run
from reelm.engine.loading import load
from reelm.engine.tokenizer_benchmark import Peers
from reelm.scripts.common import program


@program("benchmark")
def main(cfg: DictConfig) -> None:
    if cfg.suite not in SUITES:
        raise ValueError(f"suite={cfg.suite} is unknown; choose from {', '.join(SUITES)}")
    lightning.seed_everything(cfg.seed, verbose=False)
    settings = Settings(cfg.suite, cfg.rounds, cfg.threads, cfg.batch, cfg.quick)
    if cfg.suite == "tokenizer":
        peers = Peers(
            tuple(cfg.peers), tuple(cfg.sizes), cfg.large, tuple(cfg.dtypes), Path(cfg.peers_folder), cfg.memory
        )
        models = {"default": instantiate(cfg.tokenizer), "paper": instantiate(cfg.paper)}
        tokenizer_benchmark.run(models, peers, settings, Path(cfg.output))
        return
    if cfg.suite == "gpu":
        benchmark_gpu.run(settings, Path(cfg.output))
        return
    data = instantiate(cfg.data)
    try:
        model, weights = (load(cfg.model), "trained") if cfg.model else (None, "random")
    except FileNotFoundError as error:
        if cfg.model != "zoetrope":
            raise
        print(f"{error}: measuring the configs with random weights")
        model, weights = None, "random"
    if model is None:
        model = random_model(data.train, instantiate(cfg.tokenizer), instantiate(cfg.lm), instantiate(cfg.head))
    about = {"model": cfg.model, "weights": weights}
    if cfg.suite == "decode":
        larger = instantiate(cfg.lm if cfg.quick else cfg.larger)
        benchmark_decode.run(model, larger, settings, cfg.clips, Path(cfg.output), about)
    elif cfg.suite == "train":
        benchmark_train.run(model, data, instantiate(cfg.task), settings, Path(cfg.output), about)
    else:
        run(model, data, settings, Path(cfg.output), about)


if __name__ == "__main__":
    main()
