"""Find which axes of a model's inputs may vary, by asking the model, and name them.

A declared axis that the model does not take is worse than a fixed one. So the module itself is run
at other sizes: an axis varies if it computes then, and axes that it only takes together, such as
those of token ids and their mask, share one name. What the exported graph makes of it is tried
afterwards (`trial.py`).

=====================  ==========================================================================
 `batch`                the first axis of every input
 `sequence`             tokens of the main input, its mask and its like
 `decoder_sequence`     tokens of `decoder_input_ids`
 `NAME_sequence`        tokens of a further input NAME that need not be as long
 `time`                 the axis of a float input that varies, such as samples or frames of sound
 `NAME_INDEX`           any further axis that varies
 `height`, `width`      of images, where `--profile` names them; `frames` of videos likewise
=====================  ==========================================================================
"""

from __future__ import annotations

from kilodelta.export.onnx.axes.search import vary as vary
from kilodelta.export.onnx.axes.sizes import LONGEST as LONGEST
from kilodelta.export.onnx.axes.variation import AxisGroup as AxisGroup
from kilodelta.export.onnx.axes.variation import Place as Place
from kilodelta.export.onnx.axes.variation import Variation as Variation
from kilodelta.export.onnx.axes.variation import resize as resize

__all__ = ["LONGEST", "AxisGroup", "Place", "Variation", "resize", "vary"]
