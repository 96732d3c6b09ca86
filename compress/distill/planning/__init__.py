"""Say what a compression will take before it begins, and compress at several budgets.

`estimate` measures two training steps and counts what they keep; `memory` reads what the machine
has; `curve` compresses at each budget with one cache of the teacher's outputs, and `picture` draws
size against fidelity; `plan` is all of it in one call.
"""
