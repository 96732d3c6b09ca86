"""A device folder's state as Prometheus metrics, for node_exporter's textfile collector.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4)
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilodelta.device.folder.status import Status

Labels = Mapping[str, str]


def metrics(status: Status) -> str:
    """Return a status as lines of Prometheus' text format.

    Example:
        >>> print(metrics(status("device/")))  # doctest: +SKIP
        # HELP kilodelta_serving_version Version of the fine-tune that is served; 0 for the base.
        # TYPE kilodelta_serving_version gauge
        kilodelta_serving_version 7
        ...
    """
    return "".join(f"{line}\n" for line in _lines(status))


def _lines(status: Status) -> Iterator[str]:
    state, bundle = status.state, status.bundle
    yield from _gauge(
        "info",
        "What the device folder is.",
        {"mode": bundle.mode, "dtype": bundle.dtype, "runtime": bundle.runtime},
        1,
    )
    yield from _gauge(
        "serving_info",
        "Digest of the .kd file that is served; empty for the base.",
        {"delta": state.serving.delta},
        1,
    )
    version = "Version of the fine-tune that is served; 0 for the base."
    yield from _gauge("serving_version", version, {}, state.serving.version)
    yield from _gauge("highest_version", "Highest version that was ever served.", {}, state.highest)
    yield from _gauge(
        "rollbacks_left", "Fine-tunes that a rollback can go back to.", {}, len(state.before)
    )
    yield from _gauge(
        "unfinished", "1 while a command is at work, or after one was killed.", {},
        int(status.unfinished),
    )  # fmt: skip
    yield from _gauge(
        "checked", "1 where every byte was read and is as it was written.", {}, int(status.checked)
    )
    yield from _many(
        "bytes", "Bytes on the disk.", "part", {k: float(n) for k, n in status.nbytes.items()}
    )
    yield from _many(
        "last_event_timestamp_seconds",
        "When the journal's newest entry of an event was written.",
        "event",
        {str(e["event"]): _seconds(e.get("at")) for e in status.history},
    )
    events = [str(entry["event"]) for entry in status.history]
    counts = {name: float(events.count(name)) for name in dict.fromkeys(events)}
    yield from _many("journal_entries", "Entries of the journal by event.", "event", counts)


def _gauge(name: str, text: str, labels: Labels, value: float) -> Iterator[str]:
    yield from _head(name, text)
    yield _sample(name, labels, value)


def _many(name: str, text: str, label: str, values: Mapping[str, float]) -> Iterator[str]:
    if values:
        yield from _head(name, text)
    for key, value in values.items():
        yield _sample(name, {label: key}, value)


def _head(name: str, text: str) -> Iterator[str]:
    yield f"# HELP kilodelta_{name} {text}"
    yield f"# TYPE kilodelta_{name} gauge"


def _sample(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    number = str(int(value)) if value == int(value) else repr(value)
    return f"kilodelta_{name}{{{inner}}} {number}" if inner else f"kilodelta_{name} {number}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _seconds(at: object) -> float:
    """Seconds since 1970 of a journal's time; 0 where it is none."""
    try:
        return float(calendar.timegm(time.strptime(str(at), "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0
