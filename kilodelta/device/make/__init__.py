"""Make device folders and releases, on a build machine with torch."""
