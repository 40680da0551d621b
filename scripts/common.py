"""What the programs share: a mistake in the settings is one line, said before anything is built or written."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reelm.engine.errors import MISTAKES, first_line, one_line_errors

CONFIGS = "reelm.conf"
TEXT = "text"  # where free text stands whose name is that of a group too
SWEPT = ("train",)  # what -m runs several times: the results of other programs would be written one over the other
QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1).)*\1""", re.DOTALL)
ALSO_NULL = {  # what may be null although it is not in the file, by program
    "reconstruct": ("memory",),
    "benchmark": ("model",),
}
ALSO_WORDS = ("trainer.devices", "trainer.num_nodes")  # numbers that may be "auto"


def program(config: str, words: Sequence[str] = ()) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """`hydra.main` over `conf/<config>.yaml`, with settings checked first and mistakes as one line and exit status 2.

    words: settings that are free text, such as a prompt: they may hold commas, brackets and quotes. With
    `REELM_TRACEBACK=1` errors show where they came from.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(task)
        @one_line_errors
        def run(cfg: DictConfig) -> Any:
            for word in words:
                if isinstance(cfg[word], DictConfig):
                    cfg[word] = cfg[word][TEXT]
            try:
                return task(cfg)
            except (HydraException, OmegaConfBaseException) as error:
                raise ValueError(reason(error)) from error

        start = hydra.main(version_base=None, config_path=f"pkg://{CONFIGS}", config_name=config)(run)

        @functools.wraps(task)
        def main() -> Any:
            if os.environ.get("REELM_TRACEBACK"):
                os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            sys.argv[1:] = [quoted(argument, words) for argument in sys.argv[1:]]
            one_line_errors(check)(config, sys.argv[1:])
            return start()

        return main

    return decorate


def output_of(cfg: DictConfig) -> Path:
    """The folder `output` of a run; the jobs of a multirun have numbered folders in it."""
    job = HydraConfig.get()
    return Path(cfg.output) / str(job.job.num) if job.mode == RunMode.MULTIRUN else Path(cfg.output)


def quoted(argument: str, words: Sequence[str]) -> str:
    """An argument whose free text cannot be mistaken for Hydra's grammar."""
    key, equals, value = argument.partition("=")
    if not equals or key not in words or value == "null" or value.startswith(f"{{{TEXT}:"):
        return argument
    if not QUOTED.fullmatch(value):
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes count only before a quote
        escaped = re.sub(r"(\\+)$", r"\1\1", escaped).replace("${", r"\${")
        value = f"'{escaped}'"
    if (resources.files(CONFIGS) / key).is_dir():  # or Hydra looks for a file of this group
        value = f"{{{TEXT}:{value}}}"
    return f"{key}={value}"


def check(config: str, arguments: Sequence[str]) -> None:
    """Raises ValueError, of one line, where the arguments do not fit the config."""
    parser = get_args_parser()
    parser.error = _wrong_option  # instead of printing the usage
    args, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; settings are written name=value, --help shows them")
    if args.help or args.hydra_help or args.shell_completion or args.experimental_rerun or args.config_path:
        return
    config = args.config_name or config
    texts = list(args.overrides)
    if args.config_dir:
        texts.append(f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]")
    try:
        overrides = OverridesParser.create().parse_overrides(texts)
    except OverrideParseException as error:
        raise ValueError(f"cannot read {error.override!r}: {_remedy(error.override, args.overrides)}") from error
    several = [o for o in overrides if o.is_sweep_override()]
    if several and not args.multirun:
        key = several[0].get_key_element()
        each = "add -m to run each of them" if config in SWEPT else "call the program once for each of them"
        raise ValueError(f"{key} has several values: {each}, or write {key}=[...] for a list")
    if args.multirun and config not in SWEPT:
        raise ValueError(f"-m is for train, whose runs have folders of their own; call {config} once for each")
    for override in overrides:
        if override.is_delete() and "." not in override.key_or_group:
            name = override.key_or_group
            raise ValueError(f"~{name}: no setting can be taken away; give {name} another value (--help shows all)")
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIGS, version_base=None):
        groups = set(GlobalHydra.instance().config_loader().list_groups(""))
        jobs = list(_jobs(overrides))
        for job in jobs:
            _check_job(config, job, groups)
        if args.multirun:  # Hydra asks for the folder of all jobs, which names a choice, before it has one of them
            HydraConfig.instance().set_config(compose(config, jobs[0], return_hydra_config=True))


def _remedy(wrong: str, texts: Sequence[str]) -> str:
    """What to do about an argument that is no setting, among all arguments."""
    if "=" in wrong:
        return "text with spaces or special signs needs quotes"
    at = texts.index(wrong)
    if not at:  # else it can be the second word of what is no longer a whole value
        return "write name=value"
    stop = next((i for i in range(at, len(texts)) if "=" in texts[i]), len(texts))
    whole = " ".join(texts[at - 1 : stop]).replace("'", "")
    return f"write name=value; a value with spaces needs quotes, such as '{whole}'"


def _wrong_option(message: str) -> None:
    raise ValueError(f"{message}; settings are written name=value, --help shows them")


def _jobs(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Overrides of single jobs that between them have each value of each sweep."""
    values = [_single(override) for override in overrides]
    yield [each[0] for each in values]
    for place, each in enumerate(values):
        for value in each[1:]:
            yield [value if i == place else other[0] for i, other in enumerate(values)]


def _single(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _check_job(config: str, texts: list[str], groups: set[str]) -> None:
    overrides = OverridesParser.create().parse_overrides(texts)
    for override in overrides:
        if override.key_or_group in groups and override.type is not None and override.value() is None:
            names = GlobalHydra.instance().config_loader().get_group_options(override.key_or_group)
            raise ValueError(
                f"{override.key_or_group} cannot be null; leave it out (choose from {', '.join(sorted(names))})"
            )
    try:
        cfg = compose(config, texts)
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if not error.options:
            raise ValueError(reason(error)) from error
        names = sorted(error.options)
        raise ValueError(
            f"unknown {group or 'config'} {name!r}{_near(name, names)} (choose from {', '.join(names)})"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        found = re.search(r"Could not (?:override|delete from config\.) '([^'@]+)", str(error))
        if not found:
            raise ValueError(reason(error)) from error
        others = groups - {found[1]}  # a group that another program has is no setting of this one
        settings = _base(config, texts, others)
        raise ValueError(f"no setting {found[1]}{_near(found[1], [*others, *settings])}") from error
    missing = [name for name, value in _flat(OmegaConf.to_container(cfg)) if value == "???"]
    if missing:
        raise ValueError(f"{missing[0]} is not set; give {missing[0]}=...")
    plain = [o for o in overrides if o.type is not None and not o.is_delete()]
    if plain:
        settings = _base(config, texts, groups)
        for override in plain:
            if override.key_or_group in settings and override.key_or_group not in groups:
                key, value = override.key_or_group, override.value()
                if config not in SWEPT and "." not in key and key not in ALSO_NULL.get(config, ()):
                    _check_kind(key, settings[key], value)
                _check_value(key, settings[key], value)


def _base(config: str, texts: Iterable[str], groups: set[str]) -> dict[str, Any]:
    """Settings and their values as they stand in the files, with the groups that are chosen."""
    chosen = [text for text in texts if text.lstrip("+~").split("=")[0].split("@")[0] in groups]
    return dict(_flat(OmegaConf.to_container(compose(config, chosen))))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        yield prefix + str(name), value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")


def _check_kind(key: str, old: Any, new: Any) -> None:
    """The new value is null only where the one in the file is, and a whole number where that is written as such."""
    if new is None and old not in (None, ""):
        raise ValueError(f"{key} cannot be null; leave it out, or give a value such as {old}")
    if type(old) is int and isinstance(new, float):
        raise ValueError(f"{key} is a whole number such as {old}; got {new!r}")


def _check_value(key: str, old: Any, new: Any) -> None:
    """The new value is of the kind of the one in the file, where a file's value says what is meant."""
    new = new.text if isinstance(new, QuotedString) else new
    if new is None or old is None or key in ALSO_WORDS or (isinstance(new, str) and "${" in new):
        return
    if isinstance(old, dict) and not isinstance(new, dict):
        names = [name for name in old if not name.startswith("_")]
        raise ValueError(f"{key} holds several settings; give one of {key}.{{{', '.join(names)}}}")
    if isinstance(old, list) and not isinstance(new, list):
        raise ValueError(f"{key} is a list such as {old}; got {new!r}".replace("'", ""))
    if isinstance(old, bool):
        if not isinstance(new, bool):
            raise ValueError(f"{key} is true or false; got {new!r}")
    elif isinstance(old, (int, float)) and isinstance(new, (str, bool)):
        raise ValueError(f"{key} is a number such as {old}; got {new!r}")


def _near(word: str, words: Sequence[str]) -> str:
    """'; did you mean ...?' where a word is close to the wrong one, or is the last part of a dotted one."""
    same = [w for w in words if w.rpartition(".")[2] == word.rpartition(".")[2] and w != word]
    close = same[:1] or difflib.get_close_matches(word, words, 1)
    return f"; did you mean {close[0]}?" if close else ""


def reason(error: Exception) -> str:
    """One line for what Hydra or OmegaConf raise: what the wrapped mistake says, or where it happened and what."""
    if isinstance(error, InstantiationException):
        key, cause = re.search(r"full_key: (\S+)", str(error)), error.__cause__
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, MISTAKES):
            return first_line(cause)
        text = str(error) if cause is None or "locating" in str(error) else str(cause)
        text = text.split(", set env var")[0].splitlines()[0]
        return f"{key[1]}: {text}" if key else text
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if error.__cause__ is not None:
        text += f" ({str(error.__cause__).splitlines()[0]})"
    return text
