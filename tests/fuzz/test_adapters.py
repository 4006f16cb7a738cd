"""The adapters with values of all kinds, as the core is held to it in test_api: settings, documents, queries, arguments."""

from __future__ import annotations

import random

import pytest
from llama_index.core.schema import QueryBundle
from tools.fuzzing import rounds
from tools.hosts import HOSTS, Host
from tools.oddities import MAKERS, foreign, random_value

from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.hosting.fields import RerankFields
from kalm_integrations.testing import FakeReranker

QUERY = "which otter"
ARGUMENTS = {"langchain": ("top_n", "instruction"), "llama_index": (), "haystack": ("top_k", "score_threshold", "instruction")}
"""What a host's call takes beside documents and query."""
OWN = {
    "langchain": ("first_stage_score_key",),
    "llama_index": ("keep_retrieval_score", "metadata_mode"),
    "haystack": ("token", "document_store", "fetch_encodings", "meta_fields_to_embed", "embedding_separator"),
}
SETTINGS = tuple(name for name in RerankFields.model_fields if name != "write_back")


def settings_of(host: Host) -> tuple[str, ...]:
    return (*SETTINGS, host.top, *OWN[host.name])


def documents(host: Host) -> list[object]:
    return [host.retrieved(host.document(str(n), text, {"n": n}), 0.5) for n, text in enumerate(["otters", "crabs"])]


def ask(host: Host, component: object, query: object, given: object, **arguments: object) -> object:
    if host.name == "langchain":
        return component.compress_documents(given, query, **arguments)
    if host.name == "llama_index":
        return component.postprocess_nodes(given, QueryBundle(query))
    return component.run(query, given, **arguments)


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request):
    return request.param


def test_any_setting_is_taken_or_refused_with_a_message(host):
    def use(name, value):
        # What is given as model is asked for at the first call; opening a checkpoint is fuzzed in test_api.
        given = {"model": FakeReranker(), name: value} if name not in SETTINGS[:12] else {name: value}
        component = host.reranker(**given)
        if "model" in given and name != "model":
            ask(host, component, QUERY, documents(host))

    calls = (
        (f"{name}={kind}", lambda name=name, make=make: use(name, make()))
        for name in settings_of(host)
        for kind, make in MAKERS.items()
    )
    assert foreign(calls) == []


def test_any_assignment_is_taken_or_refused_with_a_message(host):
    def assign(name, value):
        component = host.reranker(model=FakeReranker())
        setattr(component, name, value)

    calls = (
        (f"{name}={kind}", lambda name=name, make=make: assign(name, make()))
        for name in settings_of(host)
        for kind, make in MAKERS.items()
    )
    assert foreign(calls) == []


def test_any_argument_is_taken_or_refused_with_a_message(host):
    component = host.reranker(model=FakeReranker())

    def encodings(value):
        return [host.document("1", "otters", {ENCODING_KEY: value}), *documents(host)]

    calls = {
        "query": lambda value: ask(host, component, value, documents(host)),
        "documents": lambda value: ask(host, component, QUERY, value),
        "[document]": lambda value: ask(host, component, QUERY, [value]),
        **{
            name: lambda value, name=name: ask(host, component, QUERY, documents(host), **{name: value})
            for name in ARGUMENTS[host.name]
        },
    }
    rows = (
        (f"{name}={kind}", lambda call=call, make=make: call(make()))
        for name, call in calls.items()
        for kind, make in MAKERS.items()
    )
    assert foreign(rows) == []


def test_any_metadata_under_our_key_is_a_miss(host):
    """It may be anything that the host's own document takes."""
    reranker = FakeReranker()
    component = host.reranker(model=reranker)
    plain = host.use(component, QUERY, documents(host))
    for make in MAKERS.values():
        given = [host.document(str(n), text, {"n": n, ENCODING_KEY: make()}) for n, text in enumerate(["otters", "crabs"])]
        ranked = host.use(component, QUERY, given)
        assert [(host.key(d), host.score(d)) for d in ranked] == [(host.key(d), host.score(d)) for d in plain]
    assert reranker.stats.metadata_hits == 0


def test_settings_and_arguments_of_any_kind_together(host):
    names = [name for name in settings_of(host) if name != "document_store"]

    def one(source):
        settings = {name: random_value(source) for name in source.sample(names, source.randrange(4))}
        if source.random() < 0.7:
            settings["model"] = FakeReranker()
            settings = {name: value for name, value in settings.items() if name not in SETTINGS[1:12]}
        component = host.reranker(**settings)
        if isinstance(settings.get("model"), FakeReranker):
            arguments = {name: random_value(source) for name in ARGUMENTS[host.name] if source.random() < 0.3}
            query = random_value(source) if source.random() < 0.3 else QUERY
            ask(host, component, query, random_value(source) if source.random() < 0.3 else documents(host), **arguments)

    calls = ((f"round {n}", lambda n=n: one(random.Random(n))) for n in range(rounds(300)))
    assert foreign(calls) == []
