"""Training on pairs and triplets, as the loop needs it: the paper's."""

from flax import nnx

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.data.pairs import TrainingPairs
from e5v_jax.encode.encoder import Encoder
from e5v_jax.train.checkpoint import STSB_DEV
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.export import export
from e5v_jax.train.feed import load_data
from e5v_jax.train.setup import Training, set_up
from e5v_jax.train.task import Task
from e5v_jax.train.validation import Validation


def _load_data(cfg: TrainConfig) -> TrainingPairs:
    return load_data(cfg.data)


def _make_validation(cfg: TrainConfig, training: Training) -> Validation | None:
    if cfg.evaluation.data is None:
        return None
    encoder = Encoder(training.graphdef, training.processor, training.runtime)
    return Validation(cfg.evaluation.data, encoder, stride=cfg.evaluation.stride)


def _export(cfg: TrainConfig, trained: nnx.State, base: ConvertedFolder) -> None:
    export(cfg.output, cfg.lora, trained, base)


TASK = Task("triplets", STSB_DEV, _load_data, set_up, _make_validation, _export)
