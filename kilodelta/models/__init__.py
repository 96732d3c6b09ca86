"""Opening the models that compress, export and verify work on: weights, inputs and outputs.

Everything here needs torch, and Hugging Face folders need transformers (`pip install
'kilodelta[hf]'`).
"""

from kilodelta.models.example import example as example
from kilodelta.models.fill import fill as fill
from kilodelta.models.heads import Pooling as Pooling
from kilodelta.models.heads import View as View
from kilodelta.models.heads import counted as counted
from kilodelta.models.heads import outputs as outputs
from kilodelta.models.inputs import Batch as Batch
from kilodelta.models.inputs import check_spec as check_spec
from kilodelta.models.inputs import read_inputs as read_inputs
from kilodelta.models.inputs import read_texts as read_texts
from kilodelta.models.inputs import tokenize as tokenize
from kilodelta.models.load import locate as locate
from kilodelta.models.load import open_model as open_model
from kilodelta.models.loaded import LoadedModel as LoadedModel

__all__ = [
    "Batch",
    "LoadedModel",
    "Pooling",
    "View",
    "check_spec",
    "counted",
    "example",
    "fill",
    "locate",
    "open_model",
    "outputs",
    "read_inputs",
    "read_texts",
    "tokenize",
]
