"""Calibration and evaluation data: whatever users have, as a sequence of feeds that fit the model.

    .npz, .npy            arrays by input name; for a model with one input also one array of any name
    folder of either      in order of file name
    folder of images      or of a subfolder `images`; a Preprocess turns pixels into numbers
    Python objects        a dict of arrays, one array, an iterable of feeds or arrays (kept), a callable returning one

A *sample* is what one run of the model is fed. Where the inputs share their leading axis, each row is a sample of
batch 1, or each B rows are if the model's batch is fixed at B (an incomplete tail is dropped). An array without the
batch axis is one row. Arrays that do not share a leading length are one sample as they are. Samples may differ in shape
from one to the next.

Names, types, ranks and dimensions are checked on opening; values and pixels when a sample is made. Samples are made on
demand: one file is held at a time, and a .npy is mapped, not read. An iterable, given or returned, must end, for it is
read before a limit picks.
"""

from onnxcomp.data.inputs import InputSpec
from onnxcomp.data.samples import Data, open_data
from onnxcomp.data.sources import Feed
from onnxcomp.preprocess import Preprocess

__all__ = ["Data", "Feed", "InputSpec", "Preprocess", "open_data"]
