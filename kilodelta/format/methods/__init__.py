"""The methods: one file each, and this table."""

from __future__ import annotations

from types import MappingProxyType

from kilodelta.format.methods.base import Coefficients as Coefficients
from kilodelta.format.methods.base import Method as Method
from kilodelta.format.methods.lora import Lora as Lora
from kilodelta.format.methods.nola import Nola as Nola
from kilodelta.format.methods.randlora import RandLora as RandLora
from kilodelta.format.methods.unilora import UniLora as UniLora
from kilodelta.format.methods.vera import Vera as Vera

METHODS = MappingProxyType({m.name: m for m in (Nola, RandLora, Lora, Vera, UniLora)})
