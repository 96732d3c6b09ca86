"""Import other tools' adapters: Hugging Face PEFT and the official NOLA code.

`importing.py` is the front; `peft/` and `official_nola/` read one tool's files each and give a
`Draft`, of which `merging/build.py` makes a proved delta.
"""
