"""Search and open over documents held here."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from data.calls import ToolCall
from rl.tools.runner import CallLimits, CallRecord, ToolBox
from rl.tools.search import PAGE, SNIPPET, Corpus, Document, Open, Search, words
from rl.tools.tool import ToolError

DOCUMENTS = [
    Document("d1", "Mera Tolin", "Mera Tolin was born in Vasco. She founded the mill."),
    Document("d2", "Vasco", "Vasco is a town on the river Une. Its mayor is Odo Brandt."),
    Document("d3", "Odo Brandt", "Odo Brandt was born in Linz."),
    Document("d4", "Rivers", "The river Une is long."),
    Document("d5", "Empty", ""),
]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(DOCUMENTS)


def found(corpus: Corpus, query: str, num_results: int = 10) -> list[str]:
    return [document.id for document in corpus.ranked(query, num_results)]


def test_the_best_come_first_and_others_not_at_all(corpus: Corpus) -> None:
    assert found(corpus, "Where was Mera Tolin born?") == ["d1", "d3"]
    assert found(corpus, "VASCO mayor") == ["d2", "d1"]
    assert found(corpus, "the river Une", 1) == ["d4"]
    assert found(corpus, "empty") == ["d5"]
    assert found(corpus, "zebra") == found(corpus, "") == found(corpus, "?!") == []


def test_ties_go_to_the_earlier_document() -> None:
    texts = ["red fish", "blue fish", "red fish", "red fish", "green cat"] * 20
    corpus = Corpus(Document(str(i), "", text) for i, text in enumerate(texts))
    red = [str(i) for i, text in enumerate(texts) if text == "red fish"]
    assert found(corpus, "red", 60) == red
    assert found(corpus, "red fish", 5) == red[:5]


def test_words_are_those_of_any_script() -> None:
    assert words("Élan VITAL, don't 3x") == ["élan", "vital", "don", "t", "3x"]
    assert words("東京タワー 2 서울") == ["東", "京", "タ", "ワ", "ー", "2", "서", "울"]
    corpus = Corpus([Document("a", "東京", "首都"), Document("b", "大阪", "商都")])
    assert found(corpus, "東京は") == ["a"]


def test_what_search_shows(corpus: Corpus) -> None:
    shown = asyncio.run(Search(corpus).call("river Une", 2))
    assert shown == "1. Rivers [d4]\n   The river Une is long.\n2. Vasco [d2]\n   " + DOCUMENTS[1].text
    assert asyncio.run(Search(corpus).call("zebra")) == "No document matches."


def test_a_snippet_shows_the_word_that_was_found() -> None:
    text = "start " + "filler " * 200 + "needle " + "filler " * 200
    (hit,) = asyncio.run(Corpus([Document("a", "A", text)]).find("needle", 1))
    assert "needle" in hit.snippet
    assert hit.snippet.startswith("...") and hit.snippet.endswith("...") and len(hit.snippet) == SNIPPET + 6


def test_open_by_id_and_by_title(corpus: Corpus) -> None:
    assert asyncio.run(Open(corpus).call("d3")) == "Odo Brandt [d3]\nOdo Brandt was born in Linz."
    assert asyncio.run(Open(corpus).call("odo brandt")) == asyncio.run(Open(corpus).call("d3"))
    assert asyncio.run(Open(corpus).call("d5")) == "Empty [d5]\n"
    with pytest.raises(ToolError, match="there is no document 'd33': did you mean d3"):
        asyncio.run(Open(corpus).call("d33"))
    with pytest.raises(ToolError, match="take the id in brackets"):
        asyncio.run(Open(corpus).call("something else"))


def test_long_documents_have_pages() -> None:
    text = "".join(str(i % 10) for i in range(2 * PAGE + 1))
    tool = Open(Corpus([Document("a", "A", text)]))
    pages = [asyncio.run(tool.call("a", page)) for page in (1, 2, 3)]
    assert [page.split("\n")[0] for page in pages] == [f"A [a], page {i} of 3" for i in (1, 2, 3)]
    assert "".join(page.split("\n", 1)[1] for page in pages) == text
    with pytest.raises(ToolError, match=r"\[a\] has 3 pages, there is no page 4"):
        asyncio.run(tool.call("a", 4))


def test_the_schema_bounds_the_results(corpus: Corpus) -> None:
    async def go() -> list[CallRecord]:
        box = ToolBox([Search(corpus), Open(corpus)], CallLimits())
        arguments = [{"query": "born", "num_results": n} for n in (0, 11, 1.0, True)]
        return await box.run(
            [*(ToolCall("search", a) for a in arguments), ToolCall("open", {"document": "d1", "page": 10**300})]
        )

    records = asyncio.run(go())
    assert [record.error for record in records] == [True, True, False, True, True]


def test_64_trajectories_share_an_index(corpus: Corpus) -> None:
    async def go() -> list[str]:
        return await asyncio.gather(*(Search(corpus).call(f"Vasco {i}") for i in range(64)))

    assert set(asyncio.run(go())) == {asyncio.run(Search(corpus).call("Vasco"))}


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec=None, categories=None), max_size=60), st.integers(1, 10))
def test_any_query_is_answered(query: str, num_results: int) -> None:
    shared = Corpus(DOCUMENTS) if not CACHE else CACHE[0]
    CACHE[:] = [shared]
    assert isinstance(asyncio.run(Search(shared).call(query, num_results)), str)
    with pytest.raises(ToolError):
        asyncio.run(Open(shared).call(f"no such {query}"))


CACHE: list[Corpus] = []


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_corpus_is_read_from_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {"id": "a", "title": "A", "text": "alpha"}, {"id": 7, "text": "beta", "more": 1})
    corpus = Corpus.read(path)
    assert corpus.documents == [Document("a", "A", "alpha"), Document("7", "", "beta")]
    assert found(corpus, "beta") == ["7"]
    assert Corpus.read(str(tmp_path)).documents == corpus.documents


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (['{"id": "a"'], r"c\.jsonl:1: not JSON .*: mend that row"),
        ([{"id": "a", "text": "x"}, [1]], r"c\.jsonl:2: a list, not an object: mend that row"),
        ([{"id": "a"}], r'c\.jsonl:1: a document needs "id", "title" and "text"'),
        ([{"id": True, "text": "x"}], r'c\.jsonl:1: a document needs "id"'),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "two documents of the corpus have the id 'a'"),
        ([""], r"c\.jsonl holds no rows"),
    ],
)
def test_a_bad_corpus_is_named(tmp_path: Path, rows: list[object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Corpus.read(write(tmp_path / "c.jsonl", *rows))


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rl.tools.corpus=.*missing.jsonl matches no file"):
        Corpus.read(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="the corpus has no documents"):
        Corpus([])
