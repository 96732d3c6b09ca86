"""Keep a device folder: its bundle, its state, its journal and its lock."""
