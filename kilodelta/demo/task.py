"""A classification task made of docstrings: which field of programming is this sentence about?

Nothing in it depends on chance: texts are split and chosen by their own hashes, so a text that
two versions of a package share is on the same side of the split in both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from kilodelta.demo.docstrings import paragraphs
from kilodelta.progress import Event, Progress, silent

TOPICS: Mapping[str, str] = MappingProxyType(
    {
        "asyncio": "asynchronous programming",
        "email": "electronic mail",
        "huggingface_hub": "repositories of models",
        "networkx": "graph theory",
        "numba": "compilers",
        "numpy": "arrays of numbers",
        "rich": "text in a terminal",
        "sympy.combinatorics": "permutations and groups",
        "sympy.geometry": "points and curves",
        "sympy.physics": "mechanics and quantum physics",
        "torch.distributed": "training on several machines",
        "torch.nn": "neural network layers",
    }
)
"""A module whose docstrings are read, and the class that they belong to, in plain words."""

WORDS = (4, 40)
"""The fewest and the most words of a text."""
_TEST_SHARE = 5  # one text in five
_NICKNAMES = {"hugging", "pytorch"}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts and the number of the class of each."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, kw_only=True)
class DemoTask:
    """A training and a test set without a text in common; `names` are the classes."""

    names: tuple[str, ...]
    train: Texts
    test: Texts


def make_task(
    topics: Mapping[str, str] = TOPICS, *, each: int = 300, progress: Progress = silent
) -> DemoTask:
    """Read the docstrings of some modules into a training and a test set.

    A text is left out where it is doubled, names any of the modules, or is too short or long.

    Args:
        topics: module to class, in plain words.
        each: the most texts per class.
        progress: called at each module.

    Raises:
        MissingPackageError: a package is not installed.
    """
    found = []
    for done, module in enumerate(topics, 1):
        found.append({_plain(text): text for text in paragraphs(module)})
        progress(Event(stage="task", done=done, total=len(topics), unit="packages"))
    counts = Counter(plain for texts in found for plain in texts)
    named = _names(topics)
    kept = [
        _chosen([t for p, t in texts.items() if counts[p] == 1 and _is_fit(t, named)], each)
        for texts in found
    ]
    return DemoTask(
        names=tuple(topics.values()),
        train=_texts(kept, test=False),
        test=_texts(kept, test=True),
    )


def save(task: DemoTask, folder: Path) -> tuple[Path, Path, Path]:
    """Write `train.jsonl`, `test.jsonl` and `labels.txt`."""
    places = folder / "train.jsonl", folder / "test.jsonl", folder / "labels.txt"
    for place, part in zip(places[:2], (task.train, task.test), strict=True):
        rows = zip(part.texts, part.labels, strict=True)
        lines = (json.dumps({"text": t, "label": task.names[n]}) + "\n" for t, n in rows)
        place.write_text("".join(lines), encoding="utf-8")
    places[2].write_text("".join(f"{name}\n" for name in task.names), encoding="utf-8")
    return places


def _plain(text: str) -> str:
    """Reduce a text to what counts when two are compared: its letters."""
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def _names(topics: Iterable[str]) -> re.Pattern[str]:
    """Match words that begin with any module's name: they would give the class away."""
    parts = {part for module in topics for part in module.split(".")} | _NICKNAMES
    return re.compile(rf"\b({'|'.join(sorted(parts))})", re.IGNORECASE)


def _is_fit(text: str, named: re.Pattern[str]) -> bool:
    return WORDS[0] <= len(text.split()) <= WORDS[1] and named.search(text) is None


def _chosen(texts: Iterable[str], each: int) -> list[str]:
    return sorted(texts, key=_hash)[:each]


def _hash(text: str) -> bytes:
    return hashlib.sha256(_plain(text).encode()).digest()


def _texts(kept: Sequence[Sequence[str]], *, test: bool) -> Texts:
    pairs = [
        (text, label)
        for label, texts in enumerate(kept)
        for text in texts
        if (_hash(text)[-1] % _TEST_SHARE == 0) is test
    ]
    return Texts(texts=tuple(t for t, _ in pairs), labels=tuple(n for _, n in pairs))
