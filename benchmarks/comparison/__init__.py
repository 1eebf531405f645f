"""The paper's comparison of methods on real speech: its data, runs, results, tables and figures."""
