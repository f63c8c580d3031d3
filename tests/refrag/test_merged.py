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
def test_a_model_with_lora_computes_the_same_after_loading(encoder, tmp_path):
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


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_that_were_trained_whole_are_saved_under_their_own_names(names, disabled, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.refrag()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.3)
    for module in model.modules():
        if disabled and isinstance(module, (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper)):
            module.enable_adapters(False)
    model.eval()
    prompt = tiny.prompt(tiny.MIXED)
    wanted = model(prompt=prompt).logits
    model.save_pretrained(tmp_path)
    loaded, about = RefragForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert relative_error(loaded(prompt=prompt).logits, wanted) < 1e-5


def test_an_adapter_on_one_of_two_tied_weights_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.refrag("gemma")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"]), model)
    model.decoder.lm_head.lora_B["default"].weight.data.normal_(0, 0.3)
    with pytest.raises(ValueError, match="decoder.lm_head.weight: has an adapter, but the config ties it to decoder"):
        model.save_pretrained(tmp_path)
