"""The Runnable in LangChain's own chains."""

import asyncio

import pytest
from refrag import Passage

from tests.refrag import small_answerer

pytest.importorskip("langchain_core")

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.runnables import RunnableGenerator, RunnableLambda, RunnablePassthrough
from refrag.integrations.langchain import RefragChain

pytestmark = pytest.mark.integrations
QUESTION = "When was the bridge built?"
DOCUMENTS = [
    Document("The bridge of Orla was built in 1871.", id="bridge", metadata={"page": 3}),
    Document("The tower has four bells."),
]
ASKED = {"question": QUESTION, "documents": DOCUMENTS}


@pytest.fixture(scope="module")
def answerer():
    return small_answerer.answerer()


@pytest.fixture(scope="module")
def expected(answerer):
    return answerer.answer(QUESTION, [Passage(document.page_content) for document in DOCUMENTS])


class Trace(BaseCallbackHandler):
    """Records the start and end of runs."""

    def __init__(self):
        self.seen = []

    def on_chain_start(self, serialized, inputs, *, name=None, **kwargs):
        self.seen.append(("start", name))

    def on_chain_end(self, outputs, **kwargs):
        self.seen.append(("end", outputs))

    def on_chain_error(self, error, **kwargs):
        self.seen.append(("error", type(error)))


def test_as_a_runnable(answerer, expected):
    chain, trace = RefragChain(answerer), Trace()
    assert chain.invoke(ASKED, config={"callbacks": [trace]}) == expected
    assert trace.seen == [("start", "RefragChain"), ("end", expected)]
    assert chain.batch([ASKED, {**ASKED, "documents": []}])[0] == expected
    assert asyncio.run(chain.ainvoke(ASKED)) == expected
    assert (chain | str.upper).invoke(ASKED) == expected.upper()
    assert chain.OutputType is str


def test_streams(answerer, expected):
    chain, trace = RefragChain(answerer), Trace()
    pieces = list(chain.stream(ASKED, config={"callbacks": [trace]}))
    assert "".join(pieces) == expected and len(pieces) > 1
    assert trace.seen == [("start", "RefragChain"), ("end", expected)]
    # A later step that supports streaming also gets the pieces.
    assert list((chain | RunnableGenerator(shout)).stream(ASKED)) == [piece.upper() for piece in pieces]

    async def streamed():
        return [piece async for piece in chain.astream(ASKED)]

    assert asyncio.run(streamed()) == pieces


def shout(pieces):
    for piece in pieces:
        yield piece.upper()


def test_where_stuffed_documents_stand(answerer, expected):
    # As combined by create_retrieval_chain.
    chain = RefragChain(answerer, question_key="input", documents_key="context")
    rag = RunnablePassthrough.assign(context=RunnableLambda(lambda asked: DOCUMENTS)).assign(answer=chain)
    result = rag.invoke({"input": QUESTION})
    assert result == {"input": QUESTION, "context": DOCUMENTS, "answer": expected}


def test_ids_of_documents(answerer, monkeypatch):
    asked = []
    monkeypatch.setattr(answerer, "answer", lambda question, passages: asked.append(passages) or "")
    RefragChain(answerer).invoke(ASKED)
    assert [passage.id for passage in asked[0]] == ["bridge", None]


def test_refuses(answerer):
    chain, trace = RefragChain(answerer), Trace()
    with pytest.raises(ValueError, match="input: got the keys .'question'., needs 'documents' too"):
        chain.invoke({"question": QUESTION}, config={"callbacks": [trace]})
    assert trace.seen[1:] == [("error", ValueError)]
    with pytest.raises(TypeError, match="documents: item 1: got str, needs a Document"):
        chain.invoke({**ASKED, "documents": [DOCUMENTS[0], "text"]})
    with pytest.raises(TypeError, match="input: got str, needs a dict"):
        list(chain.stream(QUESTION))
