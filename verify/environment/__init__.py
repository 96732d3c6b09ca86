"""Say what this machine can do, and the command that installs what it lacks."""
