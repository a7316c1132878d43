"""`search` and `open`: a collection of documents, searched by BM25 here or by an endpoint elsewhere (http_search.py).

The index is bm25s's (sparse matrix, numpy alone; rank-bm25 scores every document in Python for each query and had its
last release in 2022). Words are told apart here and ties go to the earlier document, so results are the same
everywhere. A `Corpus` is dear and shared by all trajectories; the tools over it are cheap.
"""

from __future__ import annotations

import asyncio
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from conf.errors import UserError, nearest
from data.files import ROW_SUFFIXES, find_files
from data.rows import BadRows, read_rows
from rl.tools.tool import Tool, ToolError

MAX_RESULTS = 10
MAX_QUERY = 1000  # characters that are looked at
SNIPPET = 240  # characters
PAGE = 4000  # characters of a document in one call of `open`
FEW = 1000  # documents among whose names the nearest is sought
# Letters of scripts without spaces stand for themselves, the others make words.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)


@dataclass(frozen=True)
class Document:
    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Hit:
    id: str
    title: str
    snippet: str


class Source(Protocol):
    """Where the two tools look. ToolError: what the model is to read of a failure."""

    async def find(self, query: str, num_results: int) -> list[Hit]:
        """The best first, at most `num_results`."""

    async def document(self, name: str) -> Document: ...


class Corpus:
    """Documents and their index. UserError: none, or two with one id."""

    def __init__(self, documents: Iterable[Document]) -> None:
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG

        self.documents = list(documents)
        self.by_id = {document.id: document for document in self.documents}
        if not self.documents:
            raise UserError("the corpus has no documents")
        if len(self.by_id) < len(self.documents):
            seen: set[str] = set()
            twice = next(d.id for d in self.documents if d.id in seen or seen.add(d.id))  # type: ignore[func-returns-value]
            raise UserError(f"two documents of the corpus have the id {twice!r}: give each its own")
        self.by_title: dict[str, Document] = {}
        for document in self.documents:
            self.by_title.setdefault(document.title.casefold(), document)
        self.vocabulary: dict[str, int] = {}
        ids = []
        for document in self.documents:
            found = words(f"{document.title}\n{document.text}")
            ids.append([self.vocabulary.setdefault(word, len(self.vocabulary)) for word in found])
        self.index = bm25s.BM25()  # Lucene's variant, k1 = 1.5, b = 0.75
        if self.vocabulary:
            self.index.index((ids, self.vocabulary), create_empty_token=False, show_progress=False)

    @classmethod
    def read(cls, path: str, key: str = "rl.tools.corpus") -> Corpus:
        """Rows {"id", "title", "text"} of a file, a glob or a folder. UserError names the file and the line."""
        bad = _NoneBad(0)
        documents = []
        for file in find_files(path, key=key, suffixes=ROW_SUFFIXES):
            for origin, row in read_rows(file, ("id", "title", "text"), bad):
                name = row.get("id")
                if isinstance(name, int) and not isinstance(name, bool):
                    name = str(name)
                title, text = row.get("title", ""), row.get("text")
                if not (isinstance(name, str) and isinstance(title, str) and isinstance(text, str)):
                    raise UserError(f'{origin}: a document needs "id", "title" and "text", all of them text')
                documents.append(Document(name, title, text))
        if not documents:
            raise UserError(f"{key}={path} holds no rows")
        return cls(documents)

    def ranked(self, query: str, num_results: int) -> list[Document]:
        """Documents with at least one word of the query, by score and then by their place in the corpus."""
        import numpy

        ids = [self.vocabulary[word] for word in words(query[:MAX_QUERY]) if word in self.vocabulary]
        if not ids:
            return []
        scores = self.index.get_scores_from_ids(ids)
        order = numpy.argsort(-scores, kind="stable")[:num_results]
        return [self.documents[i] for i in order if scores[i] > 0]

    async def find(self, query: str, num_results: int) -> list[Hit]:
        wanted = set(words(query[:MAX_QUERY]))
        found = await asyncio.to_thread(self.ranked, query, num_results)
        return [Hit(document.id, document.title, snippet(document.text, wanted)) for document in found]

    async def document(self, name: str) -> Document:
        document = self.by_id.get(name) or self.by_title.get(name.casefold())
        if document is None:
            few = [known.id for known in self.documents] if len(self.documents) <= FEW else []
            near = nearest(name[:100], few) if few else ""
            hint = near if near.startswith("did you mean") else "take the id in brackets of a search result"
            raise ToolError(f"there is no document {name[:100]!r}: {hint}")
        return document


class _NoneBad(BadRows):
    """A corpus that lacks a document would be another corpus."""

    def report(self, origin: str, reason: str) -> None:
        raise UserError(f"{origin}: {reason}: mend that row of the corpus")


def words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def snippet(text: str, wanted: set[str]) -> str:
    """The stretch of SNIPPET characters around the first of the wanted words, in one line."""
    flat = " ".join(text.split())
    first = next((match.start() for match in WORD.finditer(flat) if match.group().casefold() in wanted), 0)
    start = max(0, min(first - SNIPPET // 4, len(flat) - SNIPPET))
    part = flat[start : start + SNIPPET]
    return ("..." if start else "") + part + ("..." if start + SNIPPET < len(flat) else "")


class Search(Tool):
    """Stateless. Titles, ids and snippets, as text."""

    name = "search"
    description = "Searches the documents for words. Gives titles, ids in brackets, and snippets, the best first."

    def __init__(self, source: Source, num_results: int = 5) -> None:
        """`num_results`: where a call names none."""
        self.source, self.num_results = source, num_results
        number = {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS, "description": f"{num_results} if left out."}
        self.parameters: dict[str, Any] = {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "Words to look for."}, "num_results": number},
            "required": ["query"],
        }

    async def call(self, query: str, num_results: int | None = None) -> str:
        wanted = self.num_results if num_results is None else int(num_results)  # 5.0 is an integer to JSON schema
        return shown(await self.source.find(query, wanted))


class Open(Tool):
    """Stateless. A document's text, PAGE characters at a time."""

    name = "open"
    description = "Shows the text of a document of the search results."
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {
            "document": {"type": "string", "description": "Its id, or its exact title."},
            "page": {"type": "integer", "minimum": 1, "description": "For long documents; 1 if left out."},
        },
        "required": ["document"],
    }

    def __init__(self, source: Source) -> None:
        self.source = source

    async def call(self, document: str, page: int = 1) -> str:
        found = await self.source.document(document)
        pages, page = max(1, -(-len(found.text) // PAGE)), int(page)
        if page > pages:
            raise ToolError(f"[{found.id}] has {pages} page{'s' if pages > 1 else ''}, there is no page {page}")
        place = f", page {page} of {pages}" if pages > 1 else ""
        return f"{found.title} [{found.id}]{place}\n{found.text[(page - 1) * PAGE : page * PAGE]}"


def shown(hits: Sequence[Hit]) -> str:
    if not hits:
        return "No document matches."
    return "\n".join(f"{i}. {hit.title} [{hit.id}]\n   {hit.snippet}" for i, hit in enumerate(hits, 1))
