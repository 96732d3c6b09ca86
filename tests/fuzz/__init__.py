"""Feed damaged files to every reader that commands use: `python -m tests.fuzz`.

A reader may succeed or raise a `KiloDeltaError`; any other exception, more than five seconds of
processor time, or more memory than 64 MB and four times the input is a fault of ours. Each surface
is one row of a table in `surfaces/`; `mutations.py` and `containers.py` say how inputs are damaged;
`harness.py` runs and measures. Every input follows from surface, seed and number alone.
"""
