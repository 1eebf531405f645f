"""
The second round of the comparison: three folds, packed windows of 30 s. docs/results/index.md describes it.

Three commands: `speech` prepares recordings, `run` trains and measures, `report` makes tables and a figure. Runs,
their training and their store are those of `benchmarks.comparison`.
"""
