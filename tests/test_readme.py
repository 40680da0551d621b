"""The README's commands are commands that the programs take."""

import re
import shlex
from pathlib import Path

import pytest

from reelm.scripts.common import check, quoted

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python scripts/(\w+)\.py([^`\n#]*)", TEXT)))


def test_there_are_commands_for_each_program():
    assert {name for name, _ in COMMANDS} >= {"generate", "train", "cli", "evaluate"}


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_its_settings_exist(name, arguments):
    words = shlex.split(arguments)
    if name == "cli":  # not a Hydra program
        assert (ROOT / words[words.index("--config") + 1]).is_file()
    else:
        texts = ("prompt", "audio") if name == "generate" else ()  # elsewhere audio is a group of settings
        check(name, [quoted(word, texts) for word in words])


def test_its_files_exist():
    for path in re.findall(r"\((docs/[^)]+)\)|`(docs/[\w./]+|[\w]+/[\w/]+\.py)`", TEXT):
        assert (ROOT / (path[0] or path[1])).exists(), path
