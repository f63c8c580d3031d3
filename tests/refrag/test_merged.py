"""A model with low-rank adapters is saved merged, and computes the same after loading."""

import pytest
import torch
from refrag import RefragForCausalLM
from refrag.adapters import TrainableSpec, prepare
from refrag.model.merged import merged_state
from torch import nn

from tests.refrag import tiny
from tests.support.accuracy import relative_error


@pytest.mark.parametrize("encoder", ["lora", "all"])
def test_a_model_prepared_for_lora_is_itself_when_loaded(encoder, tmp_path):
    model = prepare(tiny.refrag(), TrainableSpec(train_encoder=encoder, train_decoder="lora", rank=2))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    model.eval()
    prompt, names = tiny.prompt(tiny.MIXED), list(model.state_dict())
    wanted = model(prompt=prompt).logits
    model.save_pretrained(tmp_path)
    loaded, about = RefragForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert relative_error(loaded(prompt=prompt).logits, wanted) < 1e-5
    assert relative_error(tiny.refrag()(prompt=prompt).logits, wanted) > 0.1
    # The saved model itself is unchanged.
    assert list(model.state_dict()) == names and torch.equal(model(prompt=prompt).logits, wanted)


def test_a_model_without_adapters_is_saved_unchanged():
    assert merged_state(tiny.refrag()) is None


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path):
    class Prompted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

    model = tiny.refrag()
    model.decoder.model.layers[1].mlp.up_proj = Prompted(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="decoder.model.layers.1.mlp.up_proj: has an adapter .* a Prompted"):
        model.save_pretrained(tmp_path)
