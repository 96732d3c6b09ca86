"""Compatibility forms: other tools' float bases, one file for each, and this table.

docs/format.md, section 9. A form keeps every bit of an adapter that another tool trained. Its
result can be proved, but it has no exact integer update.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kilodelta.format.foreign.base import Compat as Compat
from kilodelta.format.foreign.official_nola import OfficialNola as OfficialNola
from kilodelta.format.foreign.peft_randlora import PeftRandLora as PeftRandLora
from kilodelta.format.foreign.peft_unilora import PeftUniLora as PeftUniLora
from kilodelta.format.foreign.peft_vera import PeftVera as PeftVera

COMPAT: Mapping[str, type[Compat]] = MappingProxyType(
    {form.name: form for form in (PeftRandLora, PeftVera, PeftUniLora, OfficialNola)}
)
