# SPDX-License-Identifier: Apache-2.0
"""How a run ends that does not end well."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: shown without a traceback, exit code 2."""


class Interrupted(Exception):
    """A signal ended the run; (its number, what was saved)."""
