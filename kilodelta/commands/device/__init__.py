"""Gather the commands for devices: make a folder for them, serve fine-tunes from it, compute."""

from kilodelta.commands.device.compute import run as run
from kilodelta.commands.device.make import bundle as bundle
from kilodelta.commands.device.make import release as release
from kilodelta.commands.device.serve import apply as apply
from kilodelta.commands.device.serve import rollback as rollback
from kilodelta.commands.device.serve import status as status

__all__ = ["apply", "bundle", "release", "rollback", "run", "status"]
