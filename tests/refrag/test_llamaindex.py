"""The response synthesizer in LlamaIndex's own query engine."""

import asyncio

import pytest
from refrag import Passage

from tests.refrag import small_answerer

pytest.importorskip("llama_index.core")

from llama_index.core import QueryBundle, Settings
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from refrag.integrations.llamaindex import RefragSynthesizer

pytestmark = pytest.mark.integrations
QUESTION = "When was the bridge built?"
NODES = [
    NodeWithScore(node=TextNode(id_="bridge", text="The bridge of Orla was built in 1871.", metadata={"page": 3})),
    NodeWithScore(node=TextNode(id_="tower", text="The tower has four bells.")),
]


class Retriever(BaseRetriever):
    """Always finds the same two nodes."""

    def _retrieve(self, query_bundle: QueryBundle):
        return NODES


@pytest.fixture(scope="module")
def answerer():
    return small_answerer.answerer()


@pytest.fixture(scope="module")
def expected(answerer):
    return answerer.answer(
        QUESTION, [Passage("page: 3\n\nThe bridge of Orla was built in 1871."), Passage("The tower has four bells.")]
    )


def test_in_a_query_engine(answerer, expected):
    engine = RetrieverQueryEngine(Retriever(), response_synthesizer=RefragSynthesizer(answerer))
    response = engine.query(QUESTION)
    assert response.response == expected
    assert [source.node_id for source in response.source_nodes] == ["bridge", "tower"]
    assert response.metadata == {"bridge": {"page": 3}, "tower": {}}
    assert asyncio.run(engine.aquery(QUESTION)).response == expected


def test_no_llm_is_made(answerer):
    # Without an API key, the default LLM would raise an error.
    RefragSynthesizer(answerer)
    assert Settings._llm is None


def test_streams(answerer, expected):
    synthesizer = RefragSynthesizer(answerer, streaming=True)
    response = synthesizer.synthesize(QUESTION, NODES)
    assert isinstance(response, StreamingResponse) and response.source_nodes == NODES
    pieces = list(response.response_gen)
    assert "".join(pieces) == expected and len(pieces) > 1

    async def streamed():
        response = await synthesizer.asynthesize(QUESTION, NODES)
        assert isinstance(response, AsyncStreamingResponse)
        return [piece async for piece in response.async_response_gen()]

    assert asyncio.run(streamed()) == pieces


def test_ids_and_metadata_of_nodes(answerer, monkeypatch):
    asked = []
    monkeypatch.setattr(answerer, "answer", lambda question, passages: asked.append(passages) or "")
    RefragSynthesizer(answerer, metadata_mode=MetadataMode.NONE).synthesize(QUESTION, NODES)
    assert asked == [[Passage(one.node.text, one.node_id) for one in NODES]]


def test_texts_alone(answerer):
    texts = ["The bridge of Orla was built in 1871."]
    answer = answerer.answer(QUESTION, [Passage(texts[0])])
    assert RefragSynthesizer(answerer).get_response(QUESTION, texts) == answer


def test_no_nodes_are_llamaindex_s_own_case(answerer):
    assert RefragSynthesizer(answerer, empty_response="Nothing.").synthesize(QUESTION, []).response == "Nothing."


def test_prompts_are_the_answerer_s(answerer):
    synthesizer = RefragSynthesizer(answerer)
    assert synthesizer.get_prompts() == {}
    with pytest.raises(ValueError, match="prompts: got .'text_qa_template'., needs none"):
        synthesizer.update_prompts({"text_qa_template": "x"})
