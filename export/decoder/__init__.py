"""Export causal language models with their cache, in the layout of ONNX Runtime GenAI.

`template.py` makes the graph: one for prompts and single steps, the cache as plain inputs and
outputs. `trial.py` runs it both ways before it is called done. `genai.py` writes
`genai_config.json` and the tokenizer's files beside it.
"""
