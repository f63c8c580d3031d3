"""A Haystack component that answers a query from documents."""

from __future__ import annotations

from typing import Any

from refrag import deprecated
from refrag.integrations.answering import TEMPLATE, Answerer
from refrag.model.inputs import Passage

try:
    from haystack import Document, GeneratedAnswer, component, default_from_dict, default_to_dict
    from haystack.dataclasses import ComponentInfo, StreamingCallbackT, StreamingChunk, select_streaming_callback
    from haystack.utils import deserialize_callable, serialize_callable
except ImportError as error:
    raise ImportError(f"{__name__} needs Haystack: pip install 'refrag-kernels[haystack]'") from error


@component
class RefragGenerator:
    """Answers a query from documents, each of which becomes a passage.

    It replaces the prompt builder, the generator and the answer builder of a pipeline.

    Parameters
    ----------
    model : str, optional
        Folder of a saved model and processor, or of a training stage; the demo's model by default. ``warm_up`` or the
        first run loads it.
    k : int, optional
    chunker, template, selector, expand, expand_count, max_new_tokens : optional
        See ``Answerer`` and its ``from_pretrained``.
    generation_kwargs : dict, optional
        Further arguments of the model's ``generate``.
    streaming_callback : callable, optional
        Called with each ``StreamingChunk``.
    answerer : Answerer, optional
        Replaces all parameters but ``streaming_callback``; such a component can't be saved.

    Raises
    ------
    ValueError
        If both a model and an answerer are given.

    Examples
    --------
    >>> generator = RefragGenerator(max_new_tokens=8)
    >>> document = Document(content="The bridge of Orla was built in 1871.", meta={"file": "orla.txt"})
    >>> answer = generator.run("When was the bridge built?", [document])["answers"][0]
    >>> isinstance(answer.data, str), answer.documents[0].meta
    (True, {'file': 'orla.txt'})
    """

    @deprecated.renamed_keyword("chooser", "selector")
    def __init__(
        self,
        model: str | None = None,
        *,
        k: int | None = None,
        chunker: str = "fixed",
        template: str = TEMPLATE,
        selector: str | None = None,
        expand: float | None = None,
        expand_count: int | None = None,
        max_new_tokens: int = 256,
        generation_kwargs: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
        answerer: Answerer | None = None,
    ) -> None:
        if answerer is not None and model is not None:
            raise ValueError(f"model: got {model!r} with an answerer, needs one of the two")
        self.model = model
        self.options: dict[str, Any] = {
            "k": k, "chunker": chunker, "template": template, "selector": selector, "expand": expand,
            "expand_count": expand_count, "max_new_tokens": max_new_tokens,
        }  # fmt: skip
        self.generation_kwargs = generation_kwargs or {}
        self.streaming_callback = streaming_callback
        self._given = answerer
        self._answerer = answerer

    def warm_up(self) -> None:
        """Load the model, once."""
        if self._answerer is None:
            self._answerer = Answerer.from_pretrained(self.model, **self.options, **self.generation_kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Serialize the component for a pipeline's file.

        Haystack loads such a file with ``Pipeline.load(..., allowed_modules=["refrag.integrations.haystack"])``.

        Raises
        ------
        ValueError
            If the component was created with an answerer.
        """
        if self._given is not None:
            raise ValueError("answerer: can't be saved, needs a component created with a model's folder")
        callback = self.streaming_callback
        return default_to_dict(
            self,
            model=self.model,
            **self.options,
            generation_kwargs=self.generation_kwargs,
            streaming_callback=None if callback is None else serialize_callable(callback),
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RefragGenerator:
        """Create a component from the result of ``to_dict``."""
        parameters = dict(data.get("init_parameters", {}))
        if "chooser" in parameters:  # in files that were written before the parameter was renamed
            parameters["selector"] = parameters.pop("chooser")
        if parameters.get("streaming_callback") is not None:
            parameters["streaming_callback"] = deserialize_callable(parameters["streaming_callback"])
        return default_from_dict(cls, {**data, "init_parameters": parameters})

    @component.output_types(answers=list[GeneratedAnswer])
    def run(
        self, query: str, documents: list[Document], streaming_callback: StreamingCallbackT | None = None
    ) -> dict[str, list[GeneratedAnswer]]:
        """Answer a query.

        Parameters
        ----------
        query : str
        documents : list of Document
            Documents with text; their ids become the passages' ids.
        streaming_callback : callable, optional
            Replaces the component's own callback.

        Returns
        -------
        dict
            "answers": one GeneratedAnswer, with the documents.

        Raises
        ------
        ValueError
            As ``Answerer.prompt``.
        """
        answerer = self._ready()
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=False)
        if callback is None:
            return self._answers(query, documents, answerer.answer(query, _passages(documents)))
        text = ""
        for piece in answerer.stream(query, _passages(documents)):
            callback(self._chunk(piece, start=not text))
            text += piece
        return self._answers(query, documents, text)

    @component.output_types(answers=list[GeneratedAnswer])
    async def run_async(
        self, query: str, documents: list[Document], streaming_callback: StreamingCallbackT | None = None
    ) -> dict[str, list[GeneratedAnswer]]:
        """Like ``run``, but run the model in a thread; a callback must be async."""
        answerer = self._ready()
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=True)
        text = ""
        async for piece in answerer.astream(query, _passages(documents)):
            if callback is not None:
                await callback(self._chunk(piece, start=not text))
            text += piece
        return self._answers(query, documents, text)

    def _ready(self) -> Answerer:
        self.warm_up()
        assert self._answerer is not None
        return self._answerer

    def _chunk(self, piece: str, start: bool) -> StreamingChunk:
        info = ComponentInfo.from_component(self)
        return StreamingChunk(content=piece, component_info=info, index=0, start=start)

    @staticmethod
    def _answers(query: str, documents: list[Document], text: str) -> dict[str, list[GeneratedAnswer]]:
        return {"answers": [GeneratedAnswer(data=text, query=query, documents=documents)]}


def _passages(documents: list[Document]) -> list[Passage]:
    return [Passage(document.content or "", document.id) for document in documents]
