"""Say what a `.kd` file holds: manifest, methods, coefficients, and the delta that they make.

The contract is `docs/format.md`; this package is that document in code and needs no torch.
`methods/` holds the exact methods, `foreign/` other tools' float bases.
"""
