"""The component in Haystack's own pipelines."""

import asyncio

import pytest
from refrag import Passage

from tests.refrag import small_answerer

pytest.importorskip("haystack")

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.document_stores.in_memory import InMemoryDocumentStore
from refrag.integrations.haystack import RefragGenerator

pytestmark = pytest.mark.integrations
QUESTION = "When was the bridge built?"
DOCUMENTS = [
    Document(content="The bridge of Orla was built in 1871.", id="bridge", meta={"page": 3}),
    Document(content="The tower has four bells.", id="tower"),
]
heard = []


def hear(chunk):
    heard.append(chunk)


async def hear_async(chunk):
    heard.append(chunk)


@pytest.fixture(scope="module")
def answerer():
    return small_answerer.answerer()


@pytest.fixture(scope="module")
def expected(answerer):
    return answerer.answer(QUESTION, [Passage(document.content) for document in DOCUMENTS])


def test_in_a_pipeline(answerer):
    store = InMemoryDocumentStore()
    store.write_documents(DOCUMENTS)
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=1))
    pipeline.add_component("generator", RefragGenerator(answerer=answerer))
    pipeline.connect("retriever.documents", "generator.documents")
    result = pipeline.run({"retriever": {"query": QUESTION}, "generator": {"query": QUESTION}})
    (answer,) = result["generator"]["answers"]
    assert answer.data == answerer.answer(QUESTION, [Passage(DOCUMENTS[0].content)])
    assert answer.query == QUESTION and [one.id for one in answer.documents] == ["bridge"]
    assert answer.documents[0].meta == {"page": 3}


def test_streams(answerer, expected):
    heard.clear()
    (answer,) = RefragGenerator(answerer=answerer).run(QUESTION, DOCUMENTS, hear)["answers"]
    assert answer.data == expected == "".join(chunk.content for chunk in heard)
    assert len(heard) > 1 and [chunk.start for chunk in heard] == [True] + [False] * (len(heard) - 1)
    assert heard[0].component_info.type.endswith("RefragGenerator")


def test_async(answerer, expected):
    heard.clear()
    generator = RefragGenerator(answerer=answerer, streaming_callback=hear_async)
    (answer,) = asyncio.run(generator.run_async(QUESTION, DOCUMENTS))["answers"]
    assert answer.data == expected == "".join(chunk.content for chunk in heard)


def test_is_written_and_read(answerer, expected, tmp_path):
    answerer.model.save_pretrained(tmp_path)
    answerer.processor.save_pretrained(tmp_path)
    pipeline = Pipeline()
    component = RefragGenerator(
        str(tmp_path), max_new_tokens=32, generation_kwargs={"do_sample": False}, streaming_callback=hear
    )
    pipeline.add_component("generator", component)
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["refrag.integrations.haystack", __name__])
    heard.clear()
    (answer,) = again.run({"generator": {"query": QUESTION, "documents": DOCUMENTS}})["generator"]["answers"]
    assert answer.data == expected and len(heard) > 1
    assert again.get_component("generator").to_dict() == component.to_dict()


def test_ids_of_documents(answerer, monkeypatch):
    asked = []
    monkeypatch.setattr(answerer, "answer", lambda question, passages: asked.append(passages) or "")
    RefragGenerator(answerer=answerer).run(QUESTION, DOCUMENTS)
    assert asked == [[Passage(one.content, one.id) for one in DOCUMENTS]]


def test_refuses(answerer):
    with pytest.raises(ValueError, match="model: got 'folder' with an answerer"):
        RefragGenerator("folder", answerer=answerer)
    with pytest.raises(ValueError, match="answerer: can't be written"):
        RefragGenerator(answerer=answerer).to_dict()
    with pytest.raises(ValueError, match="passage 'blob' of prompt 0: has no text"):
        RefragGenerator(answerer=answerer).run(QUESTION, [Document(id="blob")])
