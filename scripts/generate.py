"""Make a clip: `python scripts/generate.py prompt="a red star moves left"`."""

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from reelm.engine.inputs import Inputs
from reelm.engine.job import Job, run_job
from reelm.scripts.common import program


@program("generate", words=("prompt", "image", "last", "video", "mask", "audio", "output", "model", "tokens"))
def main(cfg: DictConfig) -> None:
    inputs = Inputs(cfg.prompt or "", cfg.image, cfg.last, cfg.video, cfg.mask, cfg.keep, cfg.start, cfg.audio)
    task = cfg.task.get("name", "mixture") if cfg.get("task") else None
    settings = OmegaConf.to_container(cfg, resolve=True)
    job = Job(
        cfg.model, task, inputs, cfg.output, cfg.seconds, cfg.frames, cfg.samples, cfg.seed, cfg.keep_known,
        cfg.dtype, cfg.compile, cfg.tokens, settings["size"], cfg.fps, settings["chain"] or (),
        settings["actions"], cfg.stages,
    )  # fmt: skip
    sampling = instantiate(cfg.sampler, _convert_="all")
    if isinstance(sampling, dict):  # changes of the model's own way
        sampling = {name: value for name, value in sampling.items() if value is not None}
    run_job(job, sampling, settings)


if __name__ == "__main__":
    main()
