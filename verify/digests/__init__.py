"""Prove by digests: the base is the one named, the file is whole, every result is as promised."""
