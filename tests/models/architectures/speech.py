"""Encoders of sounds."""

from __future__ import annotations

from typing import Any

from tests.models.architectures.architecture import WIDTH, Architecture, sound

_SPEECH: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8],
    "conv_kernel": [5, 3],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
    "num_codevectors_per_group": 4,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
}


def _speech(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    sizes = ((1, 8), (2, 13), (3, 20))
    return Architecture(name, model, config, {**_SPEECH, **options}, sound, sizes, quick)


ROWS: tuple[Architecture, ...] = (
    _speech("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", quick=True),
    _speech("hubert", "HubertForCTC", "HubertConfig"),
    _speech("wavlm", "WavLMForCTC", "WavLMConfig"),
    _speech("unispeech", "UniSpeechForCTC", "UniSpeechConfig", num_ctc_classes=12),
    _speech("data2vec-audio", "Data2VecAudioForCTC", "Data2VecAudioConfig"),
)
