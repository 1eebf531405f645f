"""
Benchmarks: cost of training (`train.py`), time of inference (`infer.py`), invented words (`silence.py`), the paper's
comparison (`comparison/`).

Run them from the root of the repository, as modules: `python -m benchmarks.train`. They are not installed.
"""
