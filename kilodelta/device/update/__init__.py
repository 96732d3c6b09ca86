"""Change what a device serves: admit a file, apply it, roll it back; nothing changes by halves."""
