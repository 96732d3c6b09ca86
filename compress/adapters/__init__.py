"""Importing other tools' adapters: one file a source, one front (`bring`)."""
