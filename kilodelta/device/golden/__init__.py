"""Hold inputs and the outputs they must give, and judge a fine-tune by them before it is served.

`golden` are the values, of a bundle or of a `.kd` file; `reference` computes them in float64 on a
build machine; `base_outputs` are this device's own for its base; `probe` compares all of them.
"""
