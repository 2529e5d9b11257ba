"""Reading and writing checkpoints: the released two-tower layout, and single-tower models made into two towers."""

from twotower.checkpoints.hf import load_model, load_tokenizer, released_shapes, resolve, save
from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.checkpoints.hf.tensor_writer import write_tensors
from twotower.checkpoints.initialise import init
from twotower.checkpoints.llama2c import read_pieces
from twotower.checkpoints.vocabulary import merge_closure

__all__ = [
    "TensorSpec",
    "init",
    "load_model",
    "load_tokenizer",
    "merge_closure",
    "read_pieces",
    "released_shapes",
    "resolve",
    "save",
    "write_tensors",
]
