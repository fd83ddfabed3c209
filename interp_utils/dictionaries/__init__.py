"""Dictionaries of sparse latents: a target equal to the input makes an autoencoder, another one a transcoder."""

from interp_utils.dictionaries.config import TrainConfig
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.dictionaries.train import train, train_small

__all__ = ["Dictionary", "TrainConfig", "train", "train_small"]
