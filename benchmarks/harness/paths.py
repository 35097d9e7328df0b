# SPDX-License-Identifier: Apache-2.0
"""Where things are. Imports nothing, so that a report needs neither torch nor a built mio_ext."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"  #: committed
SCRATCH = ROOT / "build" / "benchmarks"  #: ignored by git
