"""A LlamaIndex response synthesizer that reads the retrieved nodes as chunks, most of them compressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refrag.integrations.answering import Answerer
from refrag.model.inputs import Passage

try:
    from llama_index.core.base.response.schema import RESPONSE_TYPE
    from llama_index.core.llms import MockLLM
    from llama_index.core.prompts.mixin import PromptDictType
    from llama_index.core.response_synthesizers import BaseSynthesizer
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryType
    from llama_index.core.types import RESPONSE_TEXT_TYPE
except ImportError as error:
    raise ImportError(f"{__name__} needs LlamaIndex: pip install 'refrag-kernels[llamaindex]'") from error


class RefragSynthesizer(BaseSynthesizer):
    """Answers a query from nodes, each of which becomes a passage.

    LlamaIndex's base class provides the response object, source nodes, metadata, events, and the response if there are
    no nodes.

    Parameters
    ----------
    answerer : Answerer
        The model and the settings of the prompt, including its template.
    streaming : bool
        Whether to stream responses.
    metadata_mode : MetadataMode
        Which metadata to put before a passage. Use NONE if the answerer has a store, which identifies passages by their
        text alone.
    **options
        ``callback_manager`` and ``empty_response``, as for any synthesizer.

    Examples
    --------
    >>> from llama_index.core.schema import NodeWithScore, TextNode
    >>> synthesizer = RefragSynthesizer(Answerer.from_pretrained(max_new_tokens=8))
    >>> nodes = [NodeWithScore(node=TextNode(id_="orla", text="The bridge of Orla was built in 1871."), score=0.9)]
    >>> response = synthesizer.synthesize("When was the bridge built?", nodes)
    >>> isinstance(response.response, str), response.source_nodes[0].node_id
    (True, 'orla')

    With a retriever: ``RetrieverQueryEngine(retriever, response_synthesizer=synthesizer)``.
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        streaming: bool = False,
        metadata_mode: MetadataMode = MetadataMode.LLM,
        **options: Any,
    ) -> None:
        # Without an LLM, the base class would make an OpenAI client; this one is never called.
        super().__init__(llm=MockLLM(), streaming=streaming, **options)
        self._answerer = answerer
        self._metadata_mode = metadata_mode

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer as the base class does, with the nodes' ids as the passages' ids."""
        return super().synthesize(
            query, nodes, additional_source_nodes, passages=self._passages(nodes), **response_kwargs
        )

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer as ``synthesize`` does, with the model in a thread."""
        return await super().asynthesize(
            query, nodes, additional_source_nodes, passages=self._passages(nodes), **response_kwargs
        )

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        passages: Sequence[Passage] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """Answer from texts, or from ``passages`` if they are given."""
        passages = [Passage(text) for text in text_chunks] if passages is None else passages
        if self._streaming:
            return (piece for piece in self._answerer.stream(query_str, passages))
        return self._answerer.answer(query_str, passages)

    async def aget_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        passages: Sequence[Passage] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """Answer as ``get_response`` does, with the model in a thread."""
        passages = [Passage(text) for text in text_chunks] if passages is None else passages
        if self._streaming:
            return self._answerer.astream(query_str, passages)
        return await self._answerer.aanswer(query_str, passages)

    def _passages(self, nodes: Sequence[NodeWithScore]) -> list[Passage]:
        return [Passage(one.node.get_content(metadata_mode=self._metadata_mode), one.node.node_id) for one in nodes]

    def _get_prompts(self) -> PromptDictType:
        return {}  # the template is the answerer's

    def _update_prompts(self, prompts: PromptDictType) -> None:
        if prompts:
            raise ValueError(f"prompts: got {sorted(prompts)}, needs none: the template is the Answerer's")
