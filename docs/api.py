# SPDX-License-Identifier: Apache-2.0
"""`python docs/api.py` writes docs/api.md, every public name with its signature and docstring; --check compares."""

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # mio_ext as it stands here, installed or not

import mio_ext.encoder  # noqa: E402

PAGE = Path(__file__).with_name("api.md")
#: Modules that are public as such; __all__ says what they offer.
MODULES = (mio_ext, mio_ext.distributed, mio_ext.reference, mio_ext.analysis, mio_ext.encoder)
HEAD = """# Every public name

Made from the docstrings by `python docs/api.py`; do not edit. Equation numbers are those of
[reference.py](../mio_ext/reference.py) and [theory.md](theory.md).

On the command line: `python -m mio_ext` says what is built, what can run and what `backend="auto"` takes, and why;
`python -m mio_ext check` tries the fused backends on this machine, each in a process of its own, and keeps the result.
"""


def plain(text: str) -> str:
    """reStructuredText's roles and literals as Markdown's."""
    text = re.sub(r":\w+:`~?\.?([\w.]+)`", r"`\1`", text)
    return text.replace("``", "`").replace("::\n", ":\n")


def entry(name: str, thing: Any) -> str:
    """One name: signature, docstring, and a class's fields or methods that have something to say."""
    lines = [f"### `{name}`", ""]
    fields = getattr(thing, "_fields", None)
    if callable(thing) and not fields:
        lines += ["```python", f"{name.rsplit('.', 1)[-1]}{pretty(inspect.signature(thing))}", "```", ""]
    lines += ["```text", plain(inspect.getdoc(thing) or ""), "```"]
    if fields:
        lines += ["", "Fields: " + ", ".join(f"`{field}`" for field in fields) + "."]
    return "\n".join(lines)


def pretty(signature: inspect.Signature) -> str:
    """The signature, a parameter a line where it is long. Annotations are text already."""
    parts: list[str] = []
    star = False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts, star = [*parts, "*"], True
        annotation = "" if p.annotation is p.empty else f": {p.annotation}"
        default = getattr(p.default, "__qualname__", None) or repr(p.default)  # a function by name, not by address
        parts.append(f"{p.name}{annotation}" + ("" if p.default is p.empty else f" = {default}"))
    returns = "" if signature.return_annotation in (signature.empty, "None") else f" -> {signature.return_annotation}"
    line = f"({', '.join(parts)}){returns}"
    return line if len(line) <= 90 else "(\n    " + ",\n    ".join(parts) + f",\n){returns}"


def page() -> str:
    parts = [HEAD]
    for module in MODULES:
        parts += [f"## {module.__name__}", "", plain((module.__doc__ or "").split("\n\n")[0]), ""]
        things = {name: getattr(module, name) for name in module.__all__}
        parts += [f"{entry(f'{module.__name__}.{n}', t)}\n" for n, t in things.items() if not inspect.ismodule(t)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not what it would be")
    args = parser.parse_args()
    text = page()
    if not args.check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit("docs/api.md is not what the docstrings say; run: python docs/api.py")


if __name__ == "__main__":
    main()
