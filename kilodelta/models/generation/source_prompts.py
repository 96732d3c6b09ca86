"""Read what an encoder-decoder is to write of: texts, images, sounds or arrays, one row each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kilodelta.errors import InputError
from kilodelta.models.generation.prompts import Prompt
from kilodelta.models.inputs.check import require_inputs
from kilodelta.models.inputs.read import read_inputs, tokenize
from kilodelta.models.inputs.sources import ChatSource, TextSource, open_source
from kilodelta.models.loaded import Batch, LoadedModel
from kilodelta.models.media.batches import source_rows, start_token
from kilodelta.models.media.records import RecordSource


def read_sources(
    spec: str | Path,
    loaded: LoadedModel,
    *,
    end: Sequence[int],
    field: str = "text",
    limit: int | None = None,
) -> list[Prompt]:
    """Read rows in their order, each with the tokens that every text of the decoder begins with.

    Args:
        spec: what `kilodelta.models.read_inputs` takes; targets and decoder inputs are ignored.
        loaded: an encoder-decoder.
        end: the tokens that end a text.
        field: the key of a plain text in a record.
        limit: read at most so many.

    Raises:
        InputError: the inputs cannot be read, hold conversations, are not what the encoder reads,
            or the model does not say how a text begins.
    """
    ids = text_prefix(loaded, end)
    rows = _rows(spec, loaded, field, limit)
    prompts = []
    for place, source in rows:
        require_inputs(source, loaded, place)
        prompts.append(Prompt(place=place, ids=ids, source=source))
    if not prompts:
        raise InputError(f"{spec} holds no inputs", fix="give at least one")
    return prompts


def text_prefix(loaded: LoadedModel, end: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that every text of a decoder begins with: its start, and the tokenizer's.

    Whisper's tokenizer puts language and task there, BART's the beginning of a sentence.

    Args:
        loaded: an encoder-decoder.
        end: the tokens that end a text.

    Raises:
        InputError: the model does not say with which token a text begins.
    """
    start = start_token(loaded)
    framed = [] if loaded.tokenizer is None else loaded.tokenizer(text_target="")["input_ids"]
    ids = [int(n) for n in framed]
    while ids and ids[-1] in (*end, loaded.tokenizer.eos_token_id):
        ids.pop()
    return tuple(ids) if ids[:1] == [start] else (start, *ids)


def _rows(
    spec: str | Path, loaded: LoadedModel, field: str, limit: int | None
) -> Iterator[tuple[str, Batch]]:
    source = open_source(spec, field=field, limit=limit)
    if isinstance(source, ChatSource):
        raise InputError(
            f"{spec} holds conversations, and {type(loaded.module).__name__} is an encoder-decoder",
            fix="give what its encoder reads: texts, sounds, images or arrays",
        )
    if isinstance(source, RecordSource):
        yield from source_rows(source, loaded)
    elif isinstance(source, TextSource):
        for number, text in enumerate(source.texts, 1):
            yield f"{spec}:{number}", tokenize(loaded, [text])
    else:
        for number, batch in enumerate(read_inputs(source, loaded, batch_size=1), 1):
            named = {n: t for n, t in batch.items() if not n.startswith("decoder_")}
            for row in range(len(next(iter(named.values())))):
                yield f"{spec}:{number}", {n: t[row : row + 1] for n, t in named.items()}
