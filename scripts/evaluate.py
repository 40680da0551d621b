"""Measure a model: `python scripts/evaluate.py suite=zoetrope`."""

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from reelm.data.writing import check_output, whole_file
from reelm.engine.evaluation import Zoetropes
from reelm.engine.reconstruction import Reconstructions
from reelm.engine.sweep import Sweep
from reelm.scripts.common import program

SUITES = {"zoetrope": Zoetropes, "reconstruction": Reconstructions, "sweep": Sweep}


@program("evaluate", words=("lpips", "lpips_linear"))
def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    if cfg.suite not in SUITES:
        raise ValueError(f"suite={cfg.suite} is unknown; choose from {', '.join(SUITES)}")
    suite = SUITES[cfg.suite](**{name: settings[name] for name in SUITES[cfg.suite].__match_args__})
    output = check_output(cfg.output or f"outputs/evaluation/{cfg.suite}.json", (".json",))
    if cfg.sheets:
        Path(cfg.sheets).mkdir(parents=True, exist_ok=True)
    results = suite.judge(cfg.model, sheets=Path(cfg.sheets) if cfg.sheets else None)
    with whole_file(output) as part:
        part.write_text(json.dumps({"model": str(cfg.model), **results}, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
