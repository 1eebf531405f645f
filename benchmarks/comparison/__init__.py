"""
The paper's comparison of methods, on real speech. docs/results/index.md describes it.

Three commands: `speech` prepares recordings, `compare` trains and measures runs, `report` makes tables and figures.

The published numbers were scored after transformers' `BasicTextNormalizer`. `error_rates` now normalizes otherwise,
which changes one Belarusian word of their references.
"""
