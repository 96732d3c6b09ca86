"""Define the commands, one file a family; `kilodelta.cli` gathers them. No logic lives here."""
