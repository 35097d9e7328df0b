# SPDX-License-Identifier: Apache-2.0
"""Stands for the package where a file of it is run: `python benchmarks/loss.py` has this folder on its path, and not
the repository, so that `import benchmarks` finds this file. It makes itself the package, and the repository importable.
"""

import sys
from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
sys.path.append(str(Path(__file__).resolve().parents[1]))
