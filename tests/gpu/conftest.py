"""The tiny dataset and model of the tests in real processes, for the ones on a GPU."""

from tests.distributed.conftest import dataset, flags, model_config

__all__ = ["dataset", "flags", "model_config"]
