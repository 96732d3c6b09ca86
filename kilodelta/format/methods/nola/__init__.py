"""NOLA: a low-rank delta whose two factors are sums of seeded random sign matrices."""
