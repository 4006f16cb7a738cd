"""Long passages in windows: all of them is read, the best window scores, and short passages keep what they have."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tools import plain_format
from tools.holding import Held
from tools.parity import Parity

from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core import writing
from kalm_integrations.core.passages.windows import Window
from kalm_integrations.core.settings import CODEC_NAMES
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from kalm_integrations.errors import QueueFullError, SettingsError, StaleEncodingError

MakeReranker = Callable[..., KalmReranker]

LIMIT = 64
QUERY = "What do otters eat?"
ANSWER = "Otters live on fish, crabs and frogs."
OTHER = "The Rhine rises in the Swiss Alps and flows north. " * 12
TEXTS = [ANSWER, "Lift and drag of a wing.", f"{ANSWER} {OTHER}", OTHER + ANSWER, f"{OTHER}{ANSWER} {OTHER}"]
LONG = TEXTS[2:]
SETTINGS = {"max_passage_tokens": LIMIT, "long_passages": "windows"}
CUT = {"max_passage_tokens": LIMIT, "long_passages": "cut"}


@pytest.fixture
def reranker(make_reranker: MakeReranker) -> KalmReranker:
    return make_reranker(**SETTINGS)


@pytest.fixture
def cutting(make_reranker: MakeReranker) -> KalmReranker:
    return make_reranker(**CUT)


@pytest.fixture(scope="module")
def pico() -> KalmReranker:
    return KalmReranker.from_pretrained("pico", **SETTINGS)


def stored(reranker: KalmReranker, texts: list[str]) -> list[Passage]:
    return [Passage(t, m[ENCODING_KEY]) for t, m in zip(texts, reranker.encode_to_metadata(texts), strict=True)]


def window_texts(encoding: EncodedPassage, text: str) -> list[str]:
    return [text[window.start : window.end] for window in encoding.windows or ()]


# --- scores


def test_a_passage_scores_as_its_best_window_would_alone(reranker, cutting, tiny_checkpoint: Path):
    """By the cutting reranker, and by the reference implementation."""
    oracle = Parity(tiny_checkpoint, max_passage_tokens=LIMIT)
    ranking = reranker.rank(QUERY, TEXTS)
    by_index = {place.index: place for place in ranking}
    encodings = reranker.encode_passages(TEXTS)
    assert [encoding.windows is None for encoding in encodings] == [True, True, False, False, False]
    for index, (text, encoding) in enumerate(zip(TEXTS, encodings, strict=True)):
        parts = window_texts(encoding, text) or [text]
        alone = cutting.score(QUERY, parts)
        best = alone.index(max(alone))
        assert by_index[index].score == pytest.approx(alone[best], abs=1e-6)
        assert max(oracle.reference_scores(QUERY, parts)) == pytest.approx(by_index[index].score, abs=1e-5)
        if encoding.windows is not None:
            assert by_index[index].window == encoding.windows[best][:2]
        else:
            assert by_index[index].window is None


def test_an_answer_behind_the_limit_is_found(pico):
    cutting = KalmReranker.from_pretrained("pico", **CUT)
    texts = [OTHER, OTHER + ANSWER, OTHER + "The Danube rises in the Black Forest."]
    assert len(set(cutting.score(QUERY, texts))) == 1
    best, *_ = ranking = pico.rank(QUERY, texts)
    assert best.index == 1
    assert best.window is not None
    assert ANSWER in texts[1][slice(*best.window)]
    assert best.score > 10 * ranking[1].score
    assert best.to_dict()["window"] == best.window
    assert "window" not in pico.rank(QUERY, [ANSWER])[0].to_dict()


def test_sentences_are_those_of_the_best_window(pico):
    text = f"{OTHER}😀{ANSWER} {OTHER}"
    # The halves of a pair, as JSON in UTF-16 has them, are two characters.
    as_halves = text.replace("😀", "\ud83d\ude00")
    for given in (text, as_halves):
        [place] = pico.rank(QUERY, [given], spans=1)
        assert place.window is not None
        assert place.spans
        start, end = place.window
        assert all(start <= span.start < span.end <= end for span in place.spans)
        assert given[place.spans[0].start : place.spans[0].end].endswith(ANSWER)
        assert len(given[start:end].split()) > 20
    assert [span.score for span in pico.highlight(QUERY, as_halves)] == [span.score for span in pico.highlight(QUERY, text)]


def test_all_windows_of_all_passages_are_scored_in_one_job_and_their_prefix_states_are_kept(reranker, monkeypatch):
    encodings = reranker.encode_passages(TEXTS)
    n_windows = sum(len(encoding.windows or [None]) for encoding in encodings)
    jobs: list[int] = []
    scorer = reranker._ranker.scorer
    run = scorer._run
    monkeypatch.setattr(scorer, "_run", lambda work, rows, *more: jobs.append(len(rows)) or run(work, rows, *more))
    first = reranker.score(QUERY, encodings)
    assert jobs == [n_windows]
    assert (reranker.stats.prefix_misses, reranker.stats.passages_scored) == (n_windows, len(TEXTS))
    assert reranker.score(QUERY, encodings) == pytest.approx(first, abs=1e-6)
    assert reranker.stats.prefix_hits == n_windows


def test_prefix_states_of_windows_can_be_prepared_and_kept_on_disk(make_reranker, tmp_path: Path):
    first = make_reranker(**SETTINGS, prefix_store=tmp_path / "prefixes")
    passages = stored(first, TEXTS)
    n_windows = sum(len(encoding.windows or [None]) for encoding in first.encode_passages(TEXTS))
    first.prepare(passages)
    second = make_reranker(**SETTINGS, prefix_store=tmp_path / "prefixes")
    assert second.score(QUERY, passages) == pytest.approx(first.score(QUERY, passages), abs=1e-6)
    assert (second.stats.prefix_store_hits, second.stats.prefix_misses) == (n_windows, 0)


def test_coroutines_and_many_queries_give_the_same(reranker, make_reranker):
    expected = make_reranker(**SETTINGS).score(QUERY, TEXTS)
    assert asyncio.run(reranker.ascore(QUERY, TEXTS)) == pytest.approx(expected, abs=1e-6)
    rankings = reranker.rank_many([QUERY, "rivers?"], [TEXTS, LONG])
    assert sorted(place.score for place in rankings[0]) == pytest.approx(sorted(expected), abs=1e-6)
    assert all(place.window for place in rankings[1])


def test_ties_go_to_the_first_window(reranker):
    [encoding] = reranker.encode_passages(LONG[:1])
    windows = (Window(3, 9, 8), Window(5, 11, 8), Window(7, 30, 8))
    equal = replace(encoding, states=torch.ones(6, encoding.states.shape[1]), n_tokens=24, windows=windows)
    assert reranker.rank(QUERY, [equal])[0].window == (3, 9)


# --- what is stored


def test_short_passages_keep_their_encodings_and_long_ones_are_made_anew_once(reranker, cutting, make_reranker):
    assert reranker.fingerprint == cutting.fingerprint
    assert (reranker.fingerprints[0], len(reranker.fingerprints), len(cutting.fingerprints)) == (cutting.fingerprint, 2, 1)
    cut, whole = stored(cutting, TEXTS), stored(reranker, TEXTS)
    assert [a.encoding == b.encoding for a, b in zip(cut, whole, strict=True)] == [True, True, False, False, False]
    for reader, passages in ((make_reranker(**SETTINGS), cut), (make_reranker(**CUT), whole)):
        assert list(reader.read(passages)) == ["stored", "stored", "stale", "stale", "stale"]
        ranking = reader.rank(QUERY, passages)
        assert (reader.stats.stale, reader.stats.passages_encoded) == (3, 3)
        assert set(ranking.made) == {2, 3, 4}
        wanted = whole if reader.fingerprints == reranker.fingerprints else cut
        assert [ranking.made[index][ENCODING_KEY] for index in (2, 3, 4)] == [wanted[index].encoding for index in (2, 3, 4)]
        assert list(reader.read(wanted)) == ["stored"] * 5


def test_a_passage_that_just_fits_says_so(reranker, cutting):
    tokenizer = reranker.runtime.tokenizer(allow_special_tokens=False)
    words = ["one"] * 200
    n_words = next(n for n in range(200) if len(tokenizer.passages([f"<Document>: {' '.join(words[:n])}"])[0]) == LIMIT)
    text = " ".join(words[:n_words])
    [fitting] = reranker.encode_passages([text])
    assert fitting.windows == ((0, len(text), LIMIT),)
    assert torch.equal(fitting.states, cutting.encode_passages([text])[0].states)
    assert reranker.rank(QUERY, [text])[0].window is None
    assert (reranker.stats.windowed, reranker.stats.truncated) == (0, 0)
    # What a cutting reranker stored of it cannot be told from what it has cut.
    assert list(reranker.read(stored(cutting, [text]))) == ["stale"]
    with pytest.raises(StaleEncodingError, match="must be in windows"):
        reranker.score(QUERY, cutting.encode_passages([text]))


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("ratio", [1, 4, 32])
def test_a_passage_scores_the_same_before_and_after_it_was_stored(make_reranker, codec, ratio):
    settings = {**SETTINGS, "storage_codec": codec, "compression_ratio": ratio}
    first = make_reranker(**settings)
    expected = first.score(QUERY, TEXTS)
    passages = stored(first, TEXTS)
    second = make_reranker(**settings)
    assert second.score(QUERY, passages) == expected
    assert second.stats.passages_encoded == 0
    rows = first.encode_to_metadata(TEXTS)
    assert [row[FINGERPRINT_KEY] for row in rows] == [first.fingerprint] * 2 + [first.fingerprints[1]] * 3


def test_a_finer_encoding_is_pooled_window_by_window(make_reranker):
    fine = make_reranker(**SETTINGS, compression_ratio=2)
    coarse = make_reranker(**SETTINGS, compression_ratio=16)
    assert coarse.score(QUERY, stored(fine, TEXTS)) == pytest.approx(coarse.score(QUERY, TEXTS), abs=1e-5)


def test_max_inline_bytes_chooses_a_ratio_for_all_windows_of_a_passage(make_reranker):
    settings = {**SETTINGS, "max_inline_bytes": 2000, "storage_codec": "rot4"}
    rows = make_reranker(**settings).encode_to_metadata(LONG)
    encodings = [EncodedPassage.from_metadata(row[ENCODING_KEY]) for row in rows]
    assert all(len(row[ENCODING_KEY]) <= 2000 for row in rows)
    assert all(encoding.compression_ratio > 4 and len(encoding.windows or ()) > 1 for encoding in encodings)
    # At the next finer ratio it would not fit.
    [whole] = make_reranker(**{**settings, "max_inline_bytes": None}).encode_passages(LONG[:1])
    assert whole.pool(encodings[0].compression_ratio // 2).metadata_length() > 2000


@pytest.mark.parametrize("mode", ["reference", "auto"])
def test_both_modes_share_a_payload_store_and_find_their_own_by_text(make_reranker, tmp_path: Path, mode):
    more = {"payload_store": tmp_path / "store", "storage_mode": mode, "write_through": True}
    modes = [CUT, SETTINGS]
    writers = [make_reranker(**settings, **more) for settings in modes]
    expected = [writer.score(QUERY, TEXTS) for writer in writers]
    rows = [stored(writer, TEXTS) for writer in writers]
    assert all(writer.flush(20) for writer in writers)
    assert writers[1].stats.passages_encoded == 5 - 2
    for settings, scores, passages in zip(modes, expected, rows, strict=True):
        by_text = make_reranker(**settings, payload_store=tmp_path / "store")
        assert list(by_text.read(TEXTS)) == ["found"] * 5
        assert by_text.score(QUERY, TEXTS) == pytest.approx(scores, abs=1e-6)
        assert by_text.stats.corrupt == 0
        by_value = make_reranker(**settings, payload_store=tmp_path / "store")
        assert list(by_value.read(passages)) == ["stored"] * 5
        assert by_value.score(QUERY, passages) == pytest.approx(scores, abs=1e-6)


def test_a_reading_of_the_other_mode_is_refused(reranker, cutting):
    with pytest.raises(SettingsError, match="read the passages again"):
        reranker.rank(QUERY, cutting.read(TEXTS))


def test_windows_that_reach_beyond_the_text_fail_no_query(reranker):
    """Whoever can write to a store can forge a table with a right checksum."""
    text = f"{OTHER}\ud83d\ude00{ANSWER}"
    [row] = reranker.encode_to_metadata([text])
    fields, _ = plain_format.read(row[ENCODING_KEY])
    payload = plain_format.read_base64(row[ENCODING_KEY].split(".")[2])
    windows = [[start + 10_000, end + 10_000, n] for start, end, n in fields.pop("windows")]
    table = plain_format.write_table(windows)
    fields.pop("x")
    forged = plain_format.write_inline(fields, table + payload[len(table) :])
    passages = [Passage(text, forged), TEXTS[0]]
    assert list(reranker.read(passages)) == ["stored", "missing"]
    ranking = reranker.rank(QUERY, passages, spans=2)
    [odd] = [place for place in ranking if place.index == 0]
    assert (odd.window, odd.spans) == ((len(text), len(text)), ())


def test_a_damaged_table_is_made_anew_and_counted(reranker, make_reranker):
    [passage] = stored(reranker, LONG[:1])
    value = passage.encoding or ""
    header, body = value.split(".")[1:]
    for place in range(0, 60, 7):
        changed = f"kalm1.{header}.{body[:place]}{'B' if body[place] == 'A' else 'A'}{body[place + 1 :]}"
        reader = make_reranker(**SETTINGS, cache_bytes=0)
        assert reader.score(QUERY, [Passage(LONG[0], changed)]) == pytest.approx(reranker.score(QUERY, LONG[:1]), abs=1e-6)
        assert (reader.stats.corrupt, reader.stats.passages_encoded) == (1, 1)


# --- bounds


def test_what_is_behind_the_last_window_is_counted_and_said_once(make_reranker, caplog):
    reranker = make_reranker(**SETTINGS, max_windows=3)
    encodings = reranker.encode_passages(TEXTS)
    assert [len(encoding.windows or ()) for encoding in encodings] == [0, 0, 3, 3, 3]
    assert (reranker.stats.truncated, reranker.stats.windowed) == (3, 3)
    reranker.encode_passages([OTHER])
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 5 passages are longer than max_windows=3 of 64 tokens and were cut (counted in stats.truncated)"
    ]
    assert len(set(reranker.score(QUERY, [OTHER, OTHER + ANSWER]))) == 1
    other = make_reranker(**SETTINGS, max_windows=4)
    assert list(other.read(stored(reranker, TEXTS))) == ["stored", "stored", "stale", "stale", "stale"]


def test_a_huge_text_is_one_passage_among_others(make_reranker):
    reranker = make_reranker(**SETTINGS, max_windows=5)
    texts = ["x" * 16_000_000, ANSWER, "word " * 3_200_000]
    assert len(reranker.score(QUERY, texts)) == 3
    assert (reranker.stats.truncated, reranker.stats.windowed) == (2, 2)
    assert [len(encoding.windows or ()) for encoding in reranker.encode_passages(texts)] == [5, 0, 5]


@pytest.mark.parametrize(("settings", "n_windows"), [({}, 64), ({"max_windows": 7}, 7), ({"max_passage_tokens": 2**15}, 4)])
def test_there_are_as_many_windows_as_the_format_can_hold(make_reranker, settings, n_windows):
    reranker = make_reranker(**{"long_passages": "windows", **settings})
    assert reranker.max_tokens_read == n_windows * reranker.max_passage_tokens <= 2**17


def test_windows_too_small_to_hold_anything_are_not_made(make_reranker):
    reranker = make_reranker(max_passage_tokens=16, long_passages="windows")
    assert reranker.max_tokens_read == 16
    assert [encoding.windows for encoding in reranker.encode_passages(TEXTS)] == [None] * 5
    assert reranker.stats.truncated == 5
    assert len(reranker.fingerprints) == 1


@pytest.mark.parametrize("settings", [{"long_passages": "split"}, {"max_windows": 0}, {"max_windows": 1.5}])
def test_settings_out_of_range_are_refused(make_reranker, settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        make_reranker(**settings)


async def test_windows_count_in_the_queue(make_reranker):
    """How many a request has is known when its turn comes; it is refused then, if there are too many."""
    reranker = make_reranker(**SETTINGS, max_queued_pairs=12)
    right = reranker.score(QUERY, LONG[:1])
    [encoding] = reranker.encode_passages(LONG[:1])
    assert 6 < len(encoding.windows or ()) <= 12
    with Held(reranker):
        waiting = [asyncio.create_task(reranker.ascore(QUERY, LONG[:1])) for _ in range(2)]
        while reranker.runtime.engine.n_queued < 3:
            await asyncio.sleep(0.01)
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert answers[0] == pytest.approx(right, abs=1e-6)
    assert isinstance(answers[1], QueueFullError)
    assert await reranker.ascore(QUERY, LONG[:1]) == pytest.approx(right, abs=1e-6)


def test_memory_keeps_passages_and_no_windows_and_many_callers_encode_each_once(make_reranker):
    reranker = make_reranker(**SETTINGS)
    scores: list[list[float]] = []
    threads = [threading.Thread(target=lambda: scores.append(reranker.score(QUERY, TEXTS))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [pytest.approx(scores[0], abs=1e-6)] * 6
    assert len(reranker._ranker.reader.cache) == len(TEXTS)
    assert reranker.stats.passages_encoded + reranker.stats.cache_hits == 6 * len(TEXTS)


def test_bulk_work_holds_the_windows_of_a_part_only_and_its_bar_counts_passages(make_reranker, monkeypatch):
    monkeypatch.setattr(writing, "BULK_CHARACTERS", 2 * len(LONG[0]))
    told: list[int] = []
    encode = writing.Writer._encode_bulk

    def spy(self, some, report):
        return encode(self, some, lambda n: told.append(n) or report(n))

    monkeypatch.setattr(writing.Writer, "_encode_bulk", spy)
    texts = [f"{index} {text}" for index, text in enumerate(LONG * 3)]
    reranker = make_reranker(**SETTINGS)
    encodings = reranker.encode_passages(texts)
    assert sum(told) == len(texts)
    assert len(told) >= 9 // 2
    assert [encoding.text_hash for encoding in encodings] == [reranker._ranker.reader.key(text) for text in texts]


def test_bulk_work_is_cut_by_passages_and_by_characters():
    texts = [(index, "x" * length) for index, length in enumerate([3, writing.BULK_CHARACTERS, 5, 5])]
    assert [list(part) for part in writing._slices(texts)] == [[0], [1], [2, 3]]
    many = [(index, "") for index in range(writing.BULK_SLICE + 1)]
    assert [len(part) for part in writing._slices(many)] == [writing.BULK_SLICE, 1]
    assert list(writing._slices([])) == []
