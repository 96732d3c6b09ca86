"""Kill commands, fill their disks, and run two at once: `python -m tests.faults`.

After each fault the result is the old one or the new one, never a mixture; the same command then
works, and leaves nothing but its result. `scenes.py` holds one row per command, `harness.py` the
three kinds of fault.
"""
