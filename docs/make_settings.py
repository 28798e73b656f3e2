"""Write docs/settings.md from Config: python docs/make_settings.py."""

import re
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_pvs  # noqa: E402

HEAD = """\
# Settings

Written by `python docs/make_settings.py` from `Config`, at the top of `train_pvs.py`.

Edit a value there, or give it as a flag: `BATCH_SIZE` is `--batch-size`. A flag wins over a recipe,
a recipe over an edit. A run prints what differs from the published values. It warns where a recipe
overrides an edit. A number may stand for three equal ones, a list for a tuple, `None` for an empty
text. A setting of your own is one more line in a group, in capitals: a number, a text, True or
False, or a fixed count of one kind of these. It becomes a flag by itself.
"""


def settings_page():
    """Return the text of docs/settings.md."""
    source = (ROOT / "train_pvs.py").read_text()
    comments = dict(re.findall(r"^    ([A-Z]\w+)\b.*?  # (.*)$", source, re.M))
    parts = [HEAD]
    for group in reversed(train_pvs.Config.__bases__[:-1]):
        parts.append(f"## {group.__name__}\n\n{group.__doc__}\n")
        lines = ["| field | default | meaning |", "| --- | --- | --- |"]
        for field in fields(group):
            default = train_pvs.words(field.default) if field.default != "" else ""
            shown = f"`{default}`" if default else ""
            lines.append(f"| `{field.name}` | {shown} | {comments.get(field.name, '')} |")
        parts.append("\n".join(lines) + "\n")
    parts.append("## Recipes\n\nEach is a set of flags, chosen with `--recipe`.\n")
    lines = ["| recipe | flags |", "| --- | --- |"]
    none = "none: the defaults; where the published script differs: [published.md](published.md)"
    recipes = train_pvs.RECIPES.items()
    lines += [f"| `{name}` | {f'`{flags}`' if flags else none} |" for name, flags in recipes]
    return "\n".join([*parts, "\n".join(lines) + "\n"])


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(settings_page())
