"""Judge whether an artefact computes what the merged model does, against a float64 reference.

`traits.py` and `plan.py` find out what the model and this machine can do, `cases.py` and
`fitting.py` bring real inputs to the shapes, `reference.py` computes them, `gate.py` says how far
off is too far, `judge.py` and `bench.py` run every artefact; `bisect.py` names the layer that is
off. `metrics.py`, `gate.py` and `cases.py` are numpy alone: devices use them.
"""
