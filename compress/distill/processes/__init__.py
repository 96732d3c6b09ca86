"""Share one compression among processes that torchrun has started.

`ranks` is the one place that knows which process this is and how values travel between them, and
does nothing where there is one. `launch` joins the processes, `settle` chooses their devices and
whether they share the base, and `shards` divides its frozen blocks among them (FSDP2). What each
of them computes is decided where it is computed.
"""
