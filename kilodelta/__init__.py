"""kilodelta."""
