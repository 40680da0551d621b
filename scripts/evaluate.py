"""Measure a model: `python scripts/evaluate.py suite=zoetrope`."""

import json
from pathlib import Path

from omegaconf import DictConfig

from reelm.data.writing import whole_file
from reelm.engine.evaluation import evaluate, judge_tokenizer
from reelm.engine.video_lm import load
from reelm.scripts.common import program


@program("evaluate")
def main(cfg: DictConfig) -> None:
    if cfg.suite != "zoetrope":
        raise ValueError(f"suite={cfg.suite} is unknown; there is zoetrope")
    output = Path(cfg.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    model = load(cfg.model)
    tasks = list(cfg.tasks) if cfg.tasks else None
    for task in tasks or ():
        model.task(task)
    results = {"model": str(cfg.model), "tokenizer": judge_tokenizer(model)}
    print("tokenizer", {name: round(value, 4) for name, value in results["tokenizer"].items()})
    sheets = Path(cfg.sheets) if cfg.sheets else None
    results |= evaluate(model, tasks, tuple(cfg.splits), cfg.clips, cfg.batch, sheets)
    with whole_file(output) as part:
        part.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
