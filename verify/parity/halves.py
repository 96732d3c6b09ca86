"""Take the encoder and the decoder that an encoder-decoder was exported as for one model again.

Together they put out what the whole model does: `logits` and `encoder_last_hidden_state`. So they
are compared on the whole model's inputs, the encoder's output handed on as a device would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kilodelta.errors import KiloDeltaError
from kilodelta.export.manifest.facts import Artefact, Port
from kilodelta.export.seq2seq.halves import is_decoder, is_encoder
from kilodelta.models.generation.seq2seq import DECODER, ENCODED, ENCODER_MASK
from kilodelta.verify.parity.fitting import MASK
from kilodelta.verify.runners.runner import Arrays, Batch, Runner

ENCODER_OUTPUT = "encoder_last_hidden_state"
"""What transformers calls the encoder's output among those of the whole model."""


@dataclass(frozen=True, kw_only=True)
class Halves(Artefact):
    """Two artefacts as one: its files are the encoder's, and the decoder stands beside."""

    encoder: Artefact
    decoder: Artefact

    @property
    def file(self) -> str:
        """The names of both files."""
        return f"{self.encoder.file} + {self.decoder.file}"


def joined(exported: Sequence[Artefact]) -> tuple[Artefact, ...]:
    """Return the artefacts, each encoder joined with the decoder of its kind and precision.

    Args:
        exported: of one folder, in their order.
    """
    encoders = {(a.kind, a.dtype): a for a in exported if is_encoder(a.outputs)}
    decoders = {(a.kind, a.dtype): a for a in exported if is_decoder(a.inputs)}
    one: list[Artefact] = []
    for artefact in exported:
        key = artefact.kind, artefact.dtype
        if artefact is encoders.get(key) and key in decoders:
            one.append(_join(artefact, decoders[key]))
        elif artefact is not decoders.get(key) or key not in encoders:
            one.append(artefact)
    return tuple(one)


def _join(encoder: Artefact, decoder: Artefact) -> Halves:
    ids = next(port for port in decoder.inputs if port.name == DECODER)
    logits = next(port for port in decoder.outputs if port.name == "logits")
    return Halves(
        kind=encoder.kind,
        dtype=encoder.dtype,
        files=encoder.files,
        inputs=(*encoder.inputs, ids),
        # Their names are those of the whole model.
        outputs=(logits, _renamed(encoder)),
        profile={**encoder.profile, DECODER: decoder.profile[DECODER]},
        engine=encoder.engine,
        encoder=encoder,
        decoder=decoder,
    )


def _renamed(encoder: Artefact) -> Port:
    hidden = next(port for port in encoder.outputs if port.name == ENCODED)
    return replace(hidden, name=ENCODER_OUTPUT)


class HalvesRunner:
    """Runs an encoder, and a decoder without a cache on what it puts out.

    Args:
        encoder: runs the one.
        decoder: runs the other, in the same engine.
    """

    def __init__(self, encoder: Runner, decoder: Runner) -> None:
        self._encoder, self._decoder = encoder, decoder
        self.name = encoder.name

    def available(self) -> KiloDeltaError | None:
        """Return None if both work here; see `Runner`."""
        missing = self._encoder.available()
        return self._decoder.available() if missing is None else missing

    def run(self, batch: Batch) -> Arrays:
        """Compute `logits` and `encoder_last_hidden_state`; see `Runner`."""
        hidden = self._encoder.run(batch)[ENCODED]
        given = {DECODER: batch[DECODER], ENCODED: hidden}
        if MASK in batch:
            given[ENCODER_MASK] = batch[MASK]
        return {"logits": self._decoder.run(given)["logits"], ENCODER_OUTPUT: hidden}
