"""Old names of `cpu` and `proof`, until the last import has moved."""

from kilodelta.files.tensor import Bytes as Bytes
from kilodelta.merging.cpu import LARGE as LARGE
from kilodelta.merging.cpu import Source as Source
from kilodelta.merging.cpu import merged as merged
from kilodelta.merging.proof import target_digests as target_digests
