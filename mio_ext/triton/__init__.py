# SPDX-License-Identifier: Apache-2.0
"""The Triton backend; pairwise_bce.py is its host side. `import triton` in here is the package of that name."""
