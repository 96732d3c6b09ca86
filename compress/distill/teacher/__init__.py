"""Ask the tuned model once: what it puts out for every input, kept in memory or on disk.

`ask` computes and serves the outputs, `top_k` shortens distributions over a vocabulary, `store`
keeps rows in memory or in a folder that budgets, methods and resumed runs share, and `swap` lets
one module in memory be the base and the tuned model in turn.
"""
