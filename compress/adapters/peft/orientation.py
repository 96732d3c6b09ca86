"""Which of the base's weights are stored (in, out), as GPT-2's Conv1D does."""

from __future__ import annotations

from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.compress.adapters.peft.sites import AdapterSite


def is_transposed(adapter: Adapter, site: AdapterSite, out: int | None = None) -> bool:
    """Return whether a site's weight is stored (in, out).

    Args:
        adapter: the adapter.
        site: one of its sites.
        out: the module's outputs, where a tensor of the adapter tells them. That settles it for a
            weight that is not square; the model's code, its kind, or last the configuration does
            for others.
    """
    shape = adapter.base.info(site.tensor).shape
    if len(shape) != 2 or site.is_parameter:
        return False
    if out is not None and shape[0] != shape[1]:
        return out == shape[1]
    return adapter.architecture.is_conv1d(site.name, adapter.option("fan_in_fan_out", bool, False))
