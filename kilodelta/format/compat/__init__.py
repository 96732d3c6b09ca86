"""Compatibility forms: other tools' float bases, one file each, and this table.

docs/format.md, section 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kilodelta.format.compat.base import Compat as Compat
from kilodelta.format.compat.official_nola import OfficialNola as OfficialNola
from kilodelta.format.compat.peft_randlora import PeftRandLora as PeftRandLora
from kilodelta.format.compat.peft_unilora import PeftUniLora as PeftUniLora
from kilodelta.format.compat.peft_vera import PeftVera as PeftVera

COMPAT: Mapping[str, type[Compat]] = MappingProxyType(
    {form.name: form for form in (PeftRandLora, PeftVera, PeftUniLora, OfficialNola)}
)
