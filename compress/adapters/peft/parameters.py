"""`target_parameters`: LoRA on bare parameters, such as the experts that one module holds stacked.

PEFT wraps the module once for every parameter, in the order in which the module holds them; the
last wrapper is the outermost, and its keys are those without `base_layer`. As in PEFT 0.21's
`_inject_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator

from kilodelta.compress.adapters.architecture import AdaptedArchitecture
from kilodelta.compress.adapters.peft.config import AdapterConfig
from kilodelta.compress.adapters.placing import Place


def targeted_parameters(
    path: str, place: Place, architecture: AdaptedArchitecture, config: AdapterConfig
) -> tuple[str, ...]:
    """Return the parameters of a module that PEFT adapts, innermost wrapper first.

    Args:
        path: the module, as the adapter's keys have it.
        place: where in the base it lies.
        architecture: the base.
        config: the adapter's configuration.

    Returns:
        names in the model, such as `model.layers.0.mlp.experts.down_proj`. Without a configuration
        of the base nothing tells the order of several, so they come in name order.

    Raises:
        InputError: `target_parameters` is no list of texts.
    """
    targets = frozenset(config.texts("target_parameters"))
    model_path = place.to_model(path)
    if not targets or model_path is None:
        return ()
    return tuple(
        f"{model_path}.{leaf}"
        for leaf in _leaves(model_path, architecture)
        if _is_named(f"{path}.{leaf}", targets)
    )


def missing_parameters(
    held: frozenset[str], place: Place, architecture: AdaptedArchitecture, config: AdapterConfig
) -> Iterator[str]:
    """Yield the parameters that PEFT adapts in this base, but the adapter has nothing for.

    Args:
        held: those that it has, by their names in the model.
        place: where in the base its modules lie.
        architecture: the base.
        config: the adapter's configuration.

    Raises:
        InputError: `target_parameters` is no list of texts.
    """
    targets = frozenset(config.texts("target_parameters"))
    for name in _all_parameters(architecture) if targets else ():
        own = place.to_adapter(name)
        is_wanted = own is not None and _is_named(own, targets)
        if is_wanted and name not in held and architecture.has(name):
            yield name


def _is_named(name: str, targets: frozenset[str]) -> bool:
    return name in targets or any(name.endswith(f".{target}") for target in targets)


def _leaves(path: str, architecture: AdaptedArchitecture) -> list[str]:
    layer = architecture.layer(path)
    if layer is not None:
        return [name for name, _ in layer.named_parameters(recurse=False)]
    front = f"{path}."
    leaves = (name.removeprefix(front) for name in architecture.names if name.startswith(front))
    return sorted(leaf for leaf in leaves if "." not in leaf)


def _all_parameters(architecture: AdaptedArchitecture) -> Iterator[str]:
    if architecture.module is None:
        yield from architecture.names
        return
    for path, layer in architecture.module.named_modules():
        if path:  # PEFT wraps no parameter of the whole model
            yield from (f"{path}.{name}" for name, _ in layer.named_parameters(recurse=False))
