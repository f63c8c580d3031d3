"""Names of the previous release still work: modules, their contents, and pickles that refer to them."""

import ast
import importlib
import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import refrag
import torch
from refrag import AllChunks, ChunkStore, NoChunks, PassageEncoder, RefragProcessor, deprecated
from refrag.adapters import TrainableSpec
from refrag.corpus import build
from refrag.integrations.answering import Answerer
from refrag.training.config_files import write_config
from refrag.training.options import RolloutOptions
from refrag.training.perplexity import write_tables

from tests.refrag import small_answerer
from tests.refrag.store_writer import FINGERPRINT

# A name from each module of b88c934 that has moved.
MODULES = {
    "acceptance": "FamilyError", "attention": "AttentionPlans", "caution": "caution", "chat": "render_chat",
    "choosers": "AllChunks", "chunking": "FixedChunks", "config": "RefragConfig", "corpus": "python_reference",
    "data.build": "build_corpus", "demo": "Models", "encode_job": "EncodeJob", "encoder": "TextEmbedder",
    "expansion": "expanded_chunks", "feed_forward": "fuse_feed_forward", "inference_linear": "use_inference_linears",
    "inspection": "PromptCounts", "model": "RefragForCausalLM", "passage_cache": "PassageCache",
    "passage_encoder": "PassageEncoder", "policy": "ExpansionPolicy", "processor": "RefragProcessor",
    "prompt": "Passage", "retrieval": "Retriever", "shard": "StoreError", "sources": "slices",
    "state": "GenerationState", "store": "ChunkStore", "timing": "CpuPressure", "training.curriculum": "PAPER_TABLE",
    "training.documents": "Documents", "training.expansion": "group_advantage", "training.parts": "start_projector",
    "training.recipe": "run_stage",
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), MODULES.items())
def test_names_of_moved_modules(module, name):
    sys.modules.pop(f"refrag.{module}", None) if f"{module}" in deprecated._MODULES else None
    with pytest.warns(DeprecationWarning, match=f"refrag.{module}") as caught:
        old = getattr(importlib.import_module(f"refrag.{module}"), name)
    assert caught[0].filename != deprecated.__file__
    assert getattr(old, "__module__", "refrag.training") != f"refrag.{module}"
    with pytest.raises(AttributeError):
        importlib.import_module(f"refrag.{module}").no_such_name  # noqa: B018


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("refrag", "CosineChooser", "CosineSelector"),
        ("refrag", "ChunkRecipe", "Fingerprint"),
        ("refrag.choosers", "Chooser", "Selector"),
        ("refrag.recipe", "ChunkRecipe", "Fingerprint"),
        ("refrag.adapters", "Trained", "TrainableSpec"),
        ("refrag.training.parts", "Parts", "ModelBundle"),
        ("refrag.timing", "Track", None),
    ],
)
def test_renamed_classes(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated .*use refrag[.].*{new or 'Progress'} instead"):
        found = getattr(importlib.import_module(module), old)
    assert new is None or found.__name__ == new


def test_the_warning_names_the_line():
    code = "import warnings; warnings.simplefilter('error')\nfrom refrag.prompt import Passage"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path()})
    assert "use refrag.model.inputs instead" in done.stderr, done.stderr
    code = "from refrag import CosineChooser\nfrom refrag.prompt import Passage"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path()})
    assert "<string>:2: DeprecationWarning" in done.stderr, done.stderr


def test_rooms_find_their_own_modules_without_a_warning():
    code = (
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "from refrag.model import inputs, modeling, token_encoder\n"
        "from refrag.store import store\n"
        "from refrag.demo import demo, corpus\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path()})
    assert "refrag" not in done.stderr.rpartition("Traceback")[2], done.stderr


def test_pickles_name_old_modules():
    old = pickle.dumps(refrag.Passage("It rained.", "weather"), protocol=0).replace(
        b"refrag.model.inputs", b"refrag.prompt"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert pickle.loads(old) == refrag.Passage("It rained.", "weather")


def test_every_old_name_leads_somewhere():
    for module in deprecated._MODULES.values():
        assert importlib.util.find_spec(f"refrag.{module}"), module
    for name in deprecated._NAMES.values():
        module, _, name = name.rpartition(".")
        assert hasattr(importlib.import_module(module), name)


def test_type_checkers_see_the_table():
    tree = ast.parse(Path(refrag.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    assert seen == refrag._MODULE_OF


@pytest.fixture(scope="module")
def parts():
    return small_answerer.parts()


def test_chooser_of_the_processor(parts):
    processor = parts[1]
    prompt = ["Read: ", refrag.Passage("The bridge of Orla was built in 1871.")]
    with pytest.warns(DeprecationWarning, match=r"__call__\(chooser=\) is .*__call__\(selector=\) instead") as caught:
        old = processor(prompt, chooser=AllChunks())
    assert caught[0].filename == __file__
    assert old.expanded == processor(prompt, selector=AllChunks()).expanded != frozenset()
    with pytest.raises(TypeError, match="chooser: got it together with selector"):
        processor(prompt, chooser=AllChunks(), selector=AllChunks())
    assert {"selector", "chooser"} & set(inspect.signature(RefragProcessor.__call__).parameters) == {"selector"}


def test_chooser_of_an_answerer(parts, tmp_path):
    with pytest.warns(DeprecationWarning, match=r"Answerer.__init__\(selector=\) instead") as caught:
        answerer = Answerer(*parts, chooser="everything")
    assert caught[0].filename == __file__ and isinstance(answerer.selector, AllChunks)
    with pytest.warns(DeprecationWarning, match="Answerer.chooser is .* use Answerer.selector instead") as caught:
        assert answerer.chooser is answerer.selector
    assert caught[0].filename == __file__
    for part in parts:
        part.save_pretrained(tmp_path)
    with pytest.warns(DeprecationWarning, match=r"from_pretrained\(selector=\) instead"):
        answerer = Answerer.from_pretrained(tmp_path, chooser="nothing")
    assert isinstance(answerer.selector, NoChunks)


def test_chooser_of_the_haystack_component():
    pytest.importorskip("haystack")
    from refrag.integrations.haystack import RefragGenerator

    with pytest.warns(DeprecationWarning, match=r"RefragGenerator.__init__\(selector=\) instead"):
        component = RefragGenerator(chooser="random")
    written = component.to_dict()
    assert written["init_parameters"]["selector"] == "random"
    written["init_parameters"]["chooser"] = written["init_parameters"].pop("selector")
    with warnings.catch_warnings():  # a pipeline's file isn't code, so it loads without a warning
        warnings.simplefilter("error")
        assert RefragGenerator.from_dict(written).to_dict() == component.to_dict()


def test_chooser_of_a_request(parts):
    from refrag.integrations.vllm.passages import GivenPassage
    from refrag.integrations.vllm.reading import read_passages

    given, width = [GivenPassage("The bridge of Orla was built in 1871.")], parts[0].config.chunk_width
    with pytest.warns(DeprecationWarning, match="'chooser' is .* use 'selector' instead"):
        (old,) = read_passages(given, parts[1], width, {"chooser": "everything"})
    (new,) = read_passages(given, parts[1], width, {"selector": "everything"})
    assert old.token_ids == new.token_ids and not any(old.is_slot)
    with pytest.raises(ValueError, match="chooser: got it together with selector"):
        read_passages(given, parts[1], width, {"chooser": "everything", "selector": "everything"})


def test_recipe_of_a_store_and_an_encoder(parts, tmp_path):
    with pytest.warns(DeprecationWarning, match=r"ChunkStore.create\(fingerprint=\) instead"):
        store = ChunkStore.create(tmp_path, recipe=FINGERPRINT, dtype=torch.float16)
    with pytest.warns(DeprecationWarning, match=r"ChunkStore.open\(fingerprint=\) instead"):
        assert ChunkStore.open(tmp_path, recipe=FINGERPRINT).dtype == torch.float16
    with pytest.warns(DeprecationWarning, match=r"ChunkStore.require\(fingerprint=\) instead"):
        store.require(recipe=FINGERPRINT)
    with pytest.warns(DeprecationWarning, match="ChunkStore.recipe is .* use ChunkStore.fingerprint instead") as caught:
        assert store.recipe == store.fingerprint == FINGERPRINT
    assert caught[0].filename == __file__
    encoder = PassageEncoder.from_model(*parts)
    with pytest.warns(DeprecationWarning, match="PassageEncoder.recipe is .* use PassageEncoder.fingerprint instead"):
        assert encoder.recipe == encoder.fingerprint


def path():
    return ":".join(sys.path)


def test_fields_of_a_trainable_spec():
    with pytest.warns(DeprecationWarning, match="encoder=.*train_encoder=") as caught:
        spec = TrainableSpec(encoder="lora", train_decoder="all")
    assert [warning.filename for warning in caught] == [__file__]
    assert spec == TrainableSpec("lora", "all", 32)
    with pytest.warns(DeprecationWarning, match=r"TrainableSpec.decoder is .* use TrainableSpec.train_decoder instead"):
        assert spec.decoder == "all"
    with pytest.raises(TypeError, match="encoder: got it together with train_encoder"):
        TrainableSpec(encoder="lora", train_encoder="all")


def test_output_of_functions_that_write_a_folder(tmp_path):
    with pytest.warns(DeprecationWarning, match=r"write_config\(output=\) is .*write_config\(folder=\) instead"):
        write_config(RolloutOptions(), output=tmp_path)
    assert (tmp_path / "options.toml").is_file()
    with pytest.warns(DeprecationWarning, match=r"whole_folder\(folder=\) instead"):
        with build.whole_folder(output=tmp_path / "new"):
            pass
    assert (tmp_path / "new").is_dir()
    for function in (build.build_corpus, write_tables):
        with pytest.raises(TypeError, match="output: got it together with folder"):
            function(output=tmp_path, folder=tmp_path)
