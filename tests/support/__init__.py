"""What tests share: small models, deltas, adapters and files, built on the spot."""
