"""The Lightning command line over the same parts: `python scripts/cli.py fit --config conf/cli/tokenizer.yaml`.

Models are named by `class_path`, so anybody's LightningModule over `reelm.data.module.Batch` trains in the same way.
Every flag is explained by `python scripts/cli.py fit --help`.
"""

import sys
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from reelm.data.module import ClipData
from reelm.engine.callbacks import EMA, LAST, Checkpoint, Draws, Export, FiniteLoss, Progress, was_terminated
from reelm.engine.errors import one_line_errors
from reelm.engine.fit import SIGTERM_STATUS


class Program(LightningCLI):
    def init_parser(self, **options: Any) -> LightningArgumentParser:
        parser = super().init_parser(**options)
        parser.error = _wrong_option  # instead of printing every option there is
        return parser

    def before_fit(self) -> None:
        checkpoint = Path(self.config.fit.export.folder) / LAST
        if checkpoint.is_file() and not self.config.fit.ckpt_path:
            raise FileExistsError(
                f"{checkpoint} exists; continue it with --ckpt_path={checkpoint} or choose another --export.folder"
            )

    def after_fit(self) -> None:
        if was_terminated(self.trainer):
            sys.exit(SIGTERM_STATUS)

    def add_arguments_to_parser(self, parser) -> None:
        # in the order in which they act: what is exported are the averaged weights, what is saved comes last
        parser.add_lightning_class_args(FiniteLoss, "finite_loss")
        parser.add_lightning_class_args(Draws, "draws")
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(Progress, "progress")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"export.folder": "outputs/cli"})
        parser.link_arguments("export.folder", "checkpoint.folder")


def _wrong_option(message: str, *_: Any) -> NoReturn:
    raise ValueError(f"{message.partition('Given value type')[0].strip()}; --help explains the options")


def _cause(error: ValueError) -> str:
    """The mistake itself, out of all that jsonargparse says of a part that could not be built."""
    for line in str(error).partition("Errors:")[2].splitlines():
        if line.strip() and not line.rstrip().endswith(":"):  # what ends so says where, until a line says what
            return line.strip().removeprefix("- ")
    return str(error)


@one_line_errors
def main(args: ArgsType = None) -> None:
    try:
        Program(
            L.LightningModule,
            ClipData,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"enable_checkpointing": False, "use_distributed_sampler": False},
            args=args,
        )
    except ValueError as error:
        raise ValueError(_cause(error)) from error


if __name__ == "__main__":
    main()
