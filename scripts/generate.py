"""Make a clip: `python scripts/generate.py prompt="a red star moves left"`."""

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from reelm.engine.generation import Inputs, Job, run_job
from reelm.scripts.common import program


@program("generate", words=("prompt", "image", "last", "video", "mask", "output", "model"))
def main(cfg: DictConfig) -> None:
    inputs = Inputs(cfg.prompt, cfg.image, cfg.last, cfg.video, cfg.mask, cfg.keep, cfg.start)
    task = cfg.task.get("name", "mixture") if cfg.get("task") else None
    job = Job(cfg.model, task, inputs, cfg.output, cfg.seconds, cfg.frames, cfg.samples, cfg.seed, cfg.keep_known)
    settings = OmegaConf.to_container(cfg, resolve=True)
    own = {name: value for name, value in settings["sampler"].items() if value is not None}
    run_job(job, instantiate(cfg.sampler) if "_target_" in own else own, settings)


if __name__ == "__main__":
    main()
