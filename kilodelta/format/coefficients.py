"""Old names of `packing` and `quantise`, until the last import has moved."""

from kilodelta.format.packing import BITS as BITS
from kilodelta.format.packing import Group as Group
from kilodelta.format.packing import Ints as Ints
from kilodelta.format.packing import group_size as group_size
from kilodelta.format.packing import groups_size as groups_size
from kilodelta.format.packing import largest as largest
from kilodelta.format.packing import pack as pack
from kilodelta.format.packing import packed_size as packed_size
from kilodelta.format.packing import storage as storage
from kilodelta.format.packing import unpack as unpack
from kilodelta.format.quantise import Floats as Floats
from kilodelta.format.quantise import Quantised as Quantised
from kilodelta.format.quantise import Scale as Scale
from kilodelta.format.quantise import quantise as quantise
from kilodelta.format.quantise import scale_above as scale_above
from kilodelta.format.quantise import scale_near as scale_near
