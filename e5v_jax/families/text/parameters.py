"""The parameters of a text-only model: the decoder's rows."""

from e5v_jax.families.text.config import TextModelConfig
from e5v_jax.nn.decoder import TEXT_SECTIONS, decoder_parameters
from e5v_jax.nn.parameters import ParameterTable


def parameters(config: TextModelConfig) -> ParameterTable:
    """The rows of ``AutoModelForCausalLM``."""
    rows = tuple(decoder_parameters(config.text))
    # without a prefix: trained on AutoModel, as embedding models are
    return ParameterTable(rows, TEXT_SECTIONS, ("model.", ""), adapter_task="CAUSAL_LM")
