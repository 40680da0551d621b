"""Measure a model: `python scripts/evaluate.py suite=zoetrope`."""

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from reelm.data.writing import whole_file
from reelm.engine.evaluation import zoetrope_suite
from reelm.engine.reconstruction import Reconstructions
from reelm.scripts.common import program


@program("evaluate", words=("lpips", "lpips_linear"))
def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    model, suite = settings.pop("model"), settings.pop("suite")
    output = Path(settings.pop("output") or f"outputs/evaluation/{suite}.json")
    sheets = settings.pop("sheets")
    sheets = Path(sheets) if sheets else None
    output.parent.mkdir(parents=True, exist_ok=True)
    if suite == "zoetrope":
        results = zoetrope_suite(model, sheets=sheets, **settings)
    else:
        results = Reconstructions(**settings).judge(model, sheets=sheets)
    with whole_file(output) as part:
        part.write_text(json.dumps({"model": str(model), **results}, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
