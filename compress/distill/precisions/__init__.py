"""Train and measure for the precisions in which a file will be applied (`compress --for`).

`wishes` says what may be asked for; `opened` opens a quantised base; `grids` quantises a float one
as a device would hold it; `ways` lets a student train through the roundings, and `fidelity` merges
exactly and measures each. Nothing but `wishes` is imported without torch.
"""
