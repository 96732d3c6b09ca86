"""`kilodelta keygen` and `kilodelta publish`: a team's keys, and the mirror of its releases."""

from __future__ import annotations

import os

import click

from kilodelta import terminal
from kilodelta.commands.shared import Command, as_json

PASSWORD = "KILODELTA_KEY_PASSWORD"
"""The environment variable that holds the password of encrypted keys: never an option, because
other users of a machine can read a command line."""


def key_password() -> bytes | None:
    """Return the password of encrypted keys from the environment, or None."""
    return os.environ.get(PASSWORD, "").encode("utf-8") or None


@click.command(
    cls=Command,
    short_help="Make the keys that sign a team's releases.",
    examples=["kilodelta keygen team"],
)
@click.argument("name", type=click.Path())
@as_json
def keygen(name: str, as_json: bool) -> None:
    """Make NAME.key and NAME.pub (Ed25519, for devices) and NAME.p256.key and NAME.p256.pub (for
    model_signing).

    Private keys are encrypted with the password in KILODELTA_KEY_PASSWORD, if it is set. Keep them
    off every device; devices get NAME.pub.
    """
    from kilodelta.trust.keys import keygen

    made = keygen(name, password=key_password())
    if as_json:
        terminal.print_json(made.to_json())
        return
    terminal.print_facts(
        [
            ("private", f"{made.private}, {made.p256_private}"),
            ("public", f"{made.public}, {made.p256_public}"),
            ("key id", made.keyid),
            ("encrypted", "yes" if key_password() else f"no: set {PASSWORD} to encrypt them"),
        ]
    )


@click.command(
    cls=Command,
    short_help="Publish signed releases in a static TUF repository.",
    examples=[
        "kilodelta publish task-7.kd --repository repo/ --key team.key",
        "kilodelta publish --repository repo/ --key team.key",
    ],
)
@click.argument("files", nargs=-1, type=click.Path())
@click.option(
    "--repository", required=True, type=click.Path(), help="The folder; made where there is none."
)
@click.option("--key", required=True, type=click.Path(), help="NAME.key of kilodelta keygen.")
@click.option(
    "--days", default=30, type=click.IntRange(1, 365), help="Until the timestamp expires."
)
@as_json
def publish(files: tuple[str, ...], repository: str, key: str, days: int, as_json: bool) -> None:
    """Add signed releases (FILE.kd with FILE.kd.sig beside it) to a mirror's repository.

    Without FILES the timestamp is renewed: do that at least once within --days. Any web server can
    serve the folder. Devices that pin its first root refuse other bytes, older ones, mixtures, and
    a mirror that stands still.
    """
    from kilodelta.trust.tuf_repository import publish

    made = publish(files, repository, key=key, password=key_password(), days=days)
    if as_json:
        terminal.print_json(made.to_json())
        return
    terminal.print_facts(
        [
            ("repository", f"{made.repository}, version {made.version}"),
            ("targets", str(len(made.targets))),
            ("expires", made.expires),
            ("root", f"{made.root}: give this to devices"),
        ]
    )
