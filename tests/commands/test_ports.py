"""What `export` prints of a graph's inputs and outputs."""

from __future__ import annotations

from kilodelta.commands.export.ports import describe_ports
from kilodelta.export.manifest.facts import Port


def _port(name: str, *shape: int | str) -> Port:
    return Port(name=name, dtype="float32", shape=shape)


def test_layers_of_a_cache_are_one_entry_and_other_ports_keep_their_order() -> None:
    cache = [
        _port(f"present.{n}.{part}", "batch", 3) for n in range(30) for part in ("key", "value")
    ]
    shown = describe_ports([_port("logits", "batch", 9), *cache, _port("x.1", 2)])
    assert shown == "logits [batch, 9], present.0..29.key/value [batch, 3], x.1 [2]"


def test_decoder_and_encoder_parts_of_equal_shape_are_named() -> None:
    cache = [_port(f"past.{n}.{p}.key", 1) for n in range(2) for p in ("decoder", "encoder")]
    assert describe_ports(cache) == "past.0..1.decoder.key/encoder.key [1]"


def test_layers_of_other_shapes_are_other_entries() -> None:
    ports = [_port(f"past.{n}.key", 4 if n < 2 else 8) for n in range(4)]
    assert describe_ports(ports) == "past.0..1.key [4], past.2..3.key [8]"


def test_what_is_no_run_of_layers_is_written_out() -> None:
    for names in (["p.0.key"], ["p.0.key", "p.2.key"], ["p.0.key", "p.1.key", "p.0.value"]):
        shown = describe_ports([_port(name, 5) for name in names])
        assert shown == ", ".join(f"{name} [5]" for name in names)


def test_nothing_is_shown_of_no_ports() -> None:
    assert describe_ports([]) == ""
