"""See whether a Ray cluster has what tasks need: Ray would wait for ever for it, and in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kilodelta.errors import InputError, require
from kilodelta.fleet.task import Task, memory_of

Amounts = Mapping[str, float]

SHOWN = 3
"""Tasks that are named with one thing that is missing."""


@dataclass(frozen=True, kw_only=True)
class Lack:
    """Something that tasks need and no machine of the cluster has.

    Attributes:
        resource: Ray's name, such as `CPU`, `memory` or `sm87`.
        needed: the most that a task needs.
        most: the most that one machine has, of those that have what else is needed.
        tasks: names of the tasks that cannot run.
    """

    resource: str
    needed: float
    most: float
    tasks: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(self.tasks[:SHOWN])
        more = f" and {len(self.tasks) - SHOWN} more" if len(self.tasks) > SHOWN else ""
        verb = "needs" if len(self.tasks) == 1 else "need"
        return (
            f"{names}{more} {verb} {self.needed:g} of {self.resource!r}, and the nearest machine "
            f"of the cluster has {self.most:g}"
        )


def needs_of(task: Task, cpus: int = 1) -> dict[str, float]:
    """Return what a machine must have for a task, by Ray's names; the fleet's file comes first.

    Example:
        >>> task = Task(id="0", kind="merge", name="t/m", place="x", key={}, params={},
        ...             resources={"sm87": 1})
        >>> needs_of(task, cpus=2)
        {'CPU': 2.0, 'memory': 209715200.0, 'sm87': 1.0}
    """
    own = {name: float(amount) for name, amount in task.resources.items()}
    return {"CPU": float(cpus), "memory": float(memory_of(task)), **own}


def options_of(task: Task, cpus: int = 1) -> dict[str, Any]:
    """Return the options of a Ray task: its own names for some resources, and all others."""
    needs = needs_of(task, cpus)
    own = {key: needs.pop(name) for name, key in _OPTIONS.items() if name in needs}
    return {**own, "memory": int(own["memory"]), "name": task.name, "resources": needs}


_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


def lacks(tasks: Iterable[Task], machines: Sequence[Amounts], cpus: int = 1) -> tuple[Lack, ...]:
    """Return what no machine has of what tasks need; nothing where all can run.

    Args:
        tasks: to run.
        machines: the resources of each, by Ray's names.
        cpus: of one task.
    """
    rows: dict[str, list[tuple[float, float, str]]] = {}
    for task in tasks:
        needs = needs_of(task, cpus)
        for name, most in _missing(needs, machines).items():
            rows.setdefault(name, []).append((needs[name], most, task.name))
    return tuple(
        Lack(
            resource=name,
            needed=max(needed for needed, _, _ in found),
            most=max(most for _, most, _ in found),
            tasks=tuple(task for _, _, task in found),
        )
        for name, found in rows.items()
    )


def _missing(needs: Amounts, machines: Sequence[Amounts]) -> dict[str, float]:
    """Return what the machine lacks that comes nearest, and how much it has of that."""

    def short(machine: Amounts) -> dict[str, float]:
        held = {name: machine.get(name, 0.0) for name in needs}
        return {name: amount for name, amount in held.items() if amount < needs[name]}

    def distance(missing: Amounts) -> tuple[int, int]:
        # A machine with the device is nearer than one with more cores.
        return len(missing.keys() - _OPTIONS.keys()), len(missing)

    every = [short(machine) for machine in machines] or [short({})]
    return min(every, key=distance)


def require_resources(tasks: Iterable[Task], machines: Sequence[Amounts], cpus: int = 1) -> None:
    """Refuse tasks that would wait for ever.

    Args:
        tasks: to run.
        machines: the resources of each, by Ray's names.
        cpus: of one task.

    Raises:
        InputError: naming tasks and resources.
    """
    missing = lacks(tasks, machines, cpus)
    if missing:
        raise InputError(
            "this cluster cannot do all: " + "; ".join(map(str, missing)),
            fix="start a machine with it (ray start --resources='{\"NAME\": 1}'), or take it out "
            "of the target's resources",
        )


def machines_of(ray: Any) -> list[dict[str, float]]:
    """Return the resources of each machine of a cluster that is alive."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Yield `ray`, connected to a cluster, or to one that is started here and ends with the block.

    Args:
        address: of the cluster (`auto`, `ray://host:10001`); None starts one on this machine. A
            connection that the caller has made already is used, and stays.

    Raises:
        InputError: no cluster answers at the address.
        MissingPackageError: ray is not installed.
    """
    import os

    require("ray", extra="ray", why="run on a Ray cluster")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    try:
        ray.init(address=address, **({"logging_level": "error"} if address else options))
    except (ConnectionError, ValueError, RuntimeError) as problem:
        raise InputError(
            f"no Ray cluster at {address}: {str(problem).splitlines()[0]:.300}",
            fix="start one (ray start --head), or give its address",
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()
