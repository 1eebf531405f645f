"""
The paper's comparison of methods, on real speech. docs/results/index.md describes it.

Three commands: `speech` prepares recordings, `compare` trains and measures runs, `report` makes tables and figures.
"""
