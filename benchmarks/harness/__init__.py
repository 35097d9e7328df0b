# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share.

contenders: who is compared. plan: which cases, in which order, and what need not be tried. machine: the facts of this
one, memory, and where data go. floor and gpu_rates: what it could do at best. machine_code: how a kernel's is read.
tables: data files, their cases, and how a figure is written. report_*: tables in Markdown. plots: the pictures.
"""
