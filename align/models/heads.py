"""The scalar head: a language model's trunk with a projection to one number, used for rewards and for values.

It stays a Hugging Face sequence classifier with one label, so what is saved loads in plain transformers. The constant
that centres the reward (InstructGPT, section 3.5) is kept in the model's config as `reward_bias`, because such
classifiers have no bias term of their own; transformers ignores it, which shifts all rewards alike.
"""

import contextlib
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel


class ScalarModel(nn.Module):
    """One number a position: the reward of the text so far, or the value of the state.

    Attributes:
        hf: The transformers model, `...ForSequenceClassification` with one label.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """The model's own adapter in use, where it shares a trunk with others (`align.models.trunk`)."""
        return contextlib.nullcontext()

    @property
    def head(self) -> nn.Linear:
        """The projection from a hidden state to one number."""
        assert isinstance(self.hf.score, nn.Linear)
        return self.hf.score

    @property
    def bias(self) -> float:
        """The constant subtracted from every output: the mean reward of the labelers' demonstrations."""
        return float(getattr(self.hf.config, "reward_bias", 0.0))

    @bias.setter
    def bias(self, value: float) -> None:
        self.hf.config.reward_bias = float(value)


Network = PreTrainedModel | ScalarModel


def inner(network: Network) -> PreTrainedModel:
    """The transformers model of a network."""
    return network.hf if isinstance(network, ScalarModel) else network


def initialise_head(head: nn.Linear, generator: torch.Generator) -> Float[Tensor, "one d"]:
    """Weights from N(0, 1/(d+1)), bias 0 (lm-human-preferences; N+ Implementation Details, RM-2).

    Returns:
        The weights, for a head that is made without.
    """
    drawn = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(drawn)
        if head.bias is not None:
            head.bias.zero_()
    return drawn
