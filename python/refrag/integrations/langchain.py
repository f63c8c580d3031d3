"""A LangChain Runnable that answers a question from documents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from refrag.integrations.answering import Answerer
from refrag.model.inputs import Passage

try:
    from langchain_core.documents import Document
    from langchain_core.runnables import Runnable, RunnableConfig
except ImportError as error:
    raise ImportError(f"{__name__} needs LangChain: pip install 'refrag-kernels[langchain]'") from error


class RefragChain(Runnable[dict[str, Any], str]):
    """Takes a dict with a question and documents, each of which becomes a passage, and returns the answer.

    Other keys are ignored. Like every Runnable, it has invoke, batch, stream and their async variants. With
    question_key="input" and documents_key="context", it replaces ``create_stuff_documents_chain``, for example in
    ``create_retrieval_chain``.

    Parameters
    ----------
    answerer : Answerer
        The model and the settings of the prompt, including its template.
    question_key, documents_key : str
        Keys of the question and the documents in the dict.
    name : str
        Name in traces.

    Examples
    --------
    >>> from langchain_core.runnables import RunnableLambda, RunnablePassthrough
    >>> chain = RefragChain(Answerer.from_pretrained(max_new_tokens=8))
    >>> find = RunnableLambda(lambda asked: [Document("The bridge of Orla was built in 1871.", id="orla")])
    >>> rag = RunnablePassthrough.assign(documents=find).assign(answer=chain)
    >>> result = rag.invoke({"question": "When was the bridge built?"})
    >>> isinstance(result["answer"], str), result["documents"][0].id
    (True, 'orla')
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        question_key: str = "question",
        documents_key: str = "documents",
        name: str = "RefragChain",
    ) -> None:
        self.answerer = answerer
        self.question_key = question_key
        self.documents_key = documents_key
        self.name = name

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> str:
        """Return the answer.

        Raises
        ------
        ValueError
            If a key is missing, or as ``Answerer.prompt``.
        TypeError
            If an item is not a Document.
        """
        return self._call_with_config(
            lambda asked: self.answerer.answer(*self._question_and_passages(asked)), input, config
        )

    async def ainvoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> str:
        """Answer as ``invoke`` does, with the model in a thread."""

        async def answer(asked: dict[str, Any]) -> str:
            return await self.answerer.aanswer(*self._question_and_passages(asked))

        return await self._acall_with_config(answer, input, config)

    def stream(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[str]:
        """Yield the answer as it is generated."""

        def pieces(inputs: Iterator[dict[str, Any]]) -> Iterator[str]:
            for asked in inputs:
                yield from self.answerer.stream(*self._question_and_passages(asked))

        yield from self._transform_stream_with_config(iter([input]), pieces, config)

    async def astream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[str]:
        """Answer as ``stream`` does, with the model in a thread."""

        async def inputs() -> AsyncIterator[dict[str, Any]]:
            yield input

        async def pieces(given: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
            async for asked in given:
                async for piece in self.answerer.astream(*self._question_and_passages(asked)):
                    yield piece

        async for piece in self._atransform_stream_with_config(inputs(), pieces, config):
            yield piece

    def _question_and_passages(self, asked: dict[str, Any]) -> tuple[str, list[Passage]]:
        if not isinstance(asked, dict):
            raise TypeError(f"input: got {type(asked).__name__}, needs a dict")
        for key in (self.question_key, self.documents_key):
            if key not in asked:
                raise ValueError(f"input: got the keys {sorted(asked)}, needs {key!r}, too")
        documents = asked[self.documents_key]
        for index, document in enumerate(documents):
            if not isinstance(document, Document):
                raise TypeError(f"{self.documents_key}: item {index}: got {type(document).__name__}, needs a Document")
        return asked[self.question_key], [Passage(document.page_content, document.id) for document in documents]
