"""Share one compression among processes that torchrun has started.

`ranks` is the one place that knows which process this is and how values travel between them, and
does nothing where there is one; `launch` joins the processes; `shards` divides the frozen base
among them (FSDP2). What is computed by which of them is decided where it is computed.
"""
