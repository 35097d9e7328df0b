# SPDX-License-Identifier: Apache-2.0
"""Words on the terminal are a comfort: where they can no longer be said, the run goes on in silence."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Forgiving:
    """A text stream whose reader may leave (``| head -1``, a closed terminal): what follows goes nowhere."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream: TextIO = io.StringIO() if stream is None else stream  # None: closed before we started
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")  # an ASCII terminal has no ±

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError):
            self.leave()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.leave()

    def leave(self) -> None:
        """Python's own recipe: whoever writes there later, the interpreter's end among them, meets no error."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            self.stream = io.StringIO()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """``sys.stdout`` and ``sys.stderr`` inside."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Forgiving(stream) for stream in before)  # type: ignore[assignment]  # as a TextIO
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
