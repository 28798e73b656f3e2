"""README says what the script does."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import train_pvs

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("field", fields(train_pvs.Config), ids=lambda field: field.name)
def test_settings_table_has_the_default(field):
    default = field.default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    row = re.search(rf"^\| `{field.name}` \| (.*?) \| \S.* \|$", README, re.MULTILINE)
    assert row, f"{field.name} is not in README's table"
    assert row[1].strip("`") == shown


def test_pictures_that_it_shows_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert (Path(__file__).parents[1] / picture).is_file(), picture


def test_settings_table_has_the_words_of_the_script():
    source = Path(train_pvs.__file__).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^    ([A-Z_]+): \w+ = .*?  # (.*)$", source, re.MULTILINE))
    assert set(comments) == {field.name for field in fields(train_pvs.Config)}
    for name, words in comments.items():
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(words)} \|$", README, re.MULTILINE), name
