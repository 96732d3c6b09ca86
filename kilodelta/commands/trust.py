"""Make a team's keys, publish its releases on a mirror, and let devices trust and pull them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_dry_run, with_spinner

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
@with_spinner
@with_dry_run
def keygen(name: str, as_json: bool) -> Callable[[], None]:
    """Make NAME.key and NAME.pub (Ed25519, for devices) and NAME.p256.key and NAME.p256.pub (for
    model_signing).

    Private keys are encrypted with the password in KILODELTA_KEY_PASSWORD, if it is set. Keep them
    off every device; devices get NAME.pub.
    """
    from kilodelta.trust.keys import keygen

    made = keygen(name, password=key_password())
    if as_json:
        return lambda: terminal.print_json(made.to_json())
    return lambda: terminal.print_facts(
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
@with_spinner
@with_dry_run
def publish(
    files: tuple[str, ...], repository: str, key: str, days: int, as_json: bool
) -> Callable[[], None]:
    """Add signed releases (FILE.kd with FILE.kd.sig beside it) to a mirror's repository.

    Without FILES the timestamp is renewed: do that at least once within --days. Any web server can
    serve the folder. Devices that pin its first root refuse other bytes, older ones, mixtures, and
    a mirror that stands still.
    """
    from kilodelta.trust.tuf_repository import publish

    made = publish(files, repository, key=key, password=key_password(), days=days)
    if as_json:
        return lambda: terminal.print_json(made.to_json())
    return lambda: terminal.print_facts(
        [
            ("repository", f"{made.repository}, version {made.version}"),
            ("targets", str(len(made.targets))),
            ("expires", made.expires),
            ("root", f"{made.root}: give this to devices"),
        ]
    )


@click.command(
    cls=Command,
    short_help="Change the keys that a device pins; a pinned one signs it.",
    examples=[
        "kilodelta trust device/ --add new.pub --by team.key",
        "kilodelta trust device/ --remove old.pub --by team.key -o change.json",
        "kilodelta trust device/ --signed change.json",
        "kilodelta trust device/ --reset-version 7 --by team.key",
    ],
)
@click.argument("folder", type=click.Path())
@click.option("--add", multiple=True, type=click.Path(), help="Public key to pin; repeat.")
@click.option("--remove", multiple=True, type=click.Path(), help="Key to pin no longer; repeat.")
@click.option("--threshold", type=click.IntRange(1), help="How many keys must sign from now on.")
@click.option(
    "--reset-version",
    type=click.IntRange(0),
    help="What the highest version counts as, after one that was far too high.",
)
@click.option("--by", multiple=True, type=click.Path(), help="Private key of a pinned one; repeat.")
@click.option("--signed", type=click.Path(), help="Apply a change that -o wrote.")
@click.option("-o", "--out", type=click.Path(), help="Write the signed change here instead.")
@as_json
@with_spinner
@with_dry_run
def trust(folder: str, as_json: bool, **given: Any) -> Callable[[], None]:
    """Change the keys that a device FOLDER pins, signed by enough of those that it pins now.

    Private keys stay off devices: make the change on a copy of the folder with -o, and apply the
    file on each device with --signed.
    """
    from kilodelta.device import trust

    done = trust(folder, password=key_password(), **given)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    pins = done.pins
    return lambda: terminal.print_facts(
        [
            ("keys", f"{pins.threshold} of {len(pins.keys)} must sign"),
            *(("", key.keyid) for key in pins.keys),
            ("highest version", done.highest),
            *((("written", str(done.written)),) if done.written else ()),
        ]
    )


@click.command(
    cls=Command,
    short_help="Fetch the newest release for a device from a mirror.",
    examples=[
        "kilodelta pull device/ https://models.example.org/repo",
        "kilodelta pull device/ https://models.example.org/repo --apply",
    ],
)
@click.argument("folder", type=click.Path())
@click.argument("url")
@click.option("--root", type=click.Path(), help="The mirror's 1.root.json, if none is pinned.")
@click.option("--apply", "and_apply", is_flag=True, help="Apply what was fetched.")
@as_json
@with_spinner
def pull(
    folder: str, url: str, root: str | None, and_apply: bool, as_json: bool
) -> Callable[[], None]:
    """Fetch the newest release for a device FOLDER from the mirror at URL.

    The mirror's metadata are checked by the TUF reference client: other bytes, older releases,
    mixtures, and a mirror that stands still are refused.
    """
    from kilodelta.device import apply, pull

    got = pull(folder, url, root=root)
    if got is None:
        done: dict[str, Any] = {"path": None, "version": None, "fetched": False, "note": ""}
        shown = [("release", "none for this device")]
    else:
        done = got.to_json()
        state = "fetched" if got.fetched else "here already"
        shown = [("release", f"{got.path}, version {got.version}, {state}")]
        if got.note:
            terminal.print_warning(got.note)
        if and_apply:
            applied = apply(folder, got.path)
            done["applied"] = applied.to_json()
            shown.append(("serving", f"version {applied.state.serving.version}"))
    if as_json:
        return lambda: terminal.print_json(done)
    return lambda: terminal.print_facts(shown)
