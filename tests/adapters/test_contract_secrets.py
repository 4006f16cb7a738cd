"""One contract for all hosts: a token or a password shows nowhere, however it was given."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import pprint
import traceback

import pytest
from haystack import Pipeline
from haystack.utils import Secret
from langchain_core.load import dumps
from llama_index.core.schema import BaseComponent
from pydantic import BaseModel
from rich.console import Console
from tools.hosts import HOSTS, Host

from kalm_integrations import haystack, langchain
from kalm_integrations.errors import SettingsError
from kalm_integrations.testing import FakeReranker

TOKEN = "hf_sentinelOfNobody"


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


@pytest.fixture(params=["reranker", "encoder"])
def make(request, host):
    """Makes a component, of each kind."""
    return getattr(host, request.param)


def refusals(caught: pytest.ExceptionInfo) -> str:
    """All that an error shows: its message, those that caused it, and the traceback."""
    shown, error = [], caught.value
    while error is not None:
        shown += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    return "\n".join([*shown, *traceback.format_exception(caught.value)])


@pytest.mark.parametrize(
    "settings",
    [
        {"model_kwargs": {"token": TOKEN}},
        {"model_kwargs": {"token": TOKEN, "cache_bytes": -1}},
        {"model_kwargs": [("token", TOKEN)]},
        {"model_kwargs": f"token={TOKEN}"},
        {"model_kwargs": {"tokens": {"token": TOKEN}}},
        {"model_kwargs": {"payload_store": f"redis://user:{TOKEN}@host/0"}},
        {"model_kwargs": {"prefix_store": f"postgresql://user:{TOKEN}@host/0"}},
    ],
    ids=["token", "two problems", "pairs", "text", "nested", "payload_store", "prefix_store"],
)
def test_settings_that_hold_a_secret_are_refused_without_showing_it(make, settings):
    with pytest.raises(SettingsError) as caught:
        make(**settings)
    assert TOKEN not in refusals(caught)


def test_a_token_is_no_setting_and_the_message_says_where_it_belongs(host, make):
    """LangChain and LlamaIndex leave it to the hub's own places, Haystack has a parameter that takes a Secret."""
    with pytest.raises(SettingsError) as caught:
        make(model_kwargs={"token": TOKEN})
    remedy = "got token; give them directly" if host.name == "haystack" else r"HF_TOKEN or log in by `hf auth login`, or pass"
    caught.match(f"model_kwargs must .*{remedy}")
    assert TOKEN not in refusals(caught)
    if host.name != "haystack":
        with pytest.raises(SettingsError, match="hold no token") as caught:
            make(token=TOKEN)
        assert TOKEN not in refusals(caught)
    component = make()
    with pytest.raises(SettingsError) as caught:
        component.model_kwargs = {"token": TOKEN}
    assert TOKEN not in refusals(caught)
    assert component.model_kwargs == {}


def test_a_token_that_is_slipped_in_after_the_check_travels_nowhere(host, make):
    """Nobody is told that a dictionary was changed in place; what uses it looks again."""
    component = make()
    component.model_kwargs["token"] = TOKEN
    assert TOKEN not in shown_by(component)
    for travel in (pickle.dumps, copy.deepcopy, lambda component: component.reranker):
        with pytest.raises(SettingsError, match="model_kwargs must hold no token") as caught:
            travel(component)
        assert TOKEN not in refusals(caught)
    if host.name == "haystack":
        with pytest.raises(SettingsError, match="model_kwargs must hold no token"):
            host.dump(component)
    else:
        assert TOKEN not in str(host.dump(component))


def test_a_reranker_that_was_opened_with_a_token_keeps_it_to_itself(host, make, make_reranker):
    """That is how to give a token to a component of any host."""
    reranker = make_reranker(token=TOKEN)
    component = make(model=reranker)
    assert component.reranker is reranker
    assert TOKEN not in shown_by(component) + shown_by(reranker) + repr(vars(reranker))
    assert TOKEN.encode() not in pickle.dumps(reranker)
    if host.name != "haystack":
        assert TOKEN not in str(host.dump(component))


def test_a_store_with_a_password_shows_nowhere(host, make):
    class Payloads(dict):
        def __repr__(self) -> str:
            return f"redis://user:{TOKEN}@host"

    component = make(model_kwargs={"payload_store": Payloads()})
    assert TOKEN not in shown_by(component)
    with pytest.raises(SettingsError, match="payload_store must be the folder") as caught:
        pickle.dumps(component)
    assert TOKEN not in refusals(caught)


def test_a_write_back_shows_no_arguments(host):
    component = host.reranker(model=FakeReranker(), write_back=functools.partial(lambda _, token: None, token=TOKEN))
    assert TOKEN not in shown_by(component)
    component.model = "pico"
    with pytest.raises(SettingsError, match=r"write_back must be a function .* but got partial") as caught:
        pickle.dumps(component)
    assert TOKEN not in refusals(caught)


def test_the_retriever_of_langchain_shows_no_token():
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore

    base = InMemoryVectorStore(DeterministicFakeEmbedding(size=4)).as_retriever()
    with pytest.raises(SettingsError, match="model_kwargs must hold no token") as caught:
        langchain.KalmRetriever(base_retriever=base, reranker={"model_kwargs": {"token": TOKEN}})
    assert TOKEN not in refusals(caught)
    with pytest.raises(SettingsError) as caught:
        langchain.KalmRetriever(base_retriever={"token": TOKEN}, reranker=[{"token": TOKEN}])
    assert TOKEN not in refusals(caught)
    assert TOKEN not in dumps(langchain.KalmRetriever(base_retriever=base))


class TestHaystack:
    """It has a parameter for the token."""

    @pytest.mark.parametrize("kind", [haystack.KalmRanker, haystack.KalmDocumentEncoder])
    @pytest.mark.parametrize("token", [TOKEN, Secret.from_token(TOKEN)], ids=["str", "Secret"])
    def test_a_plain_token_works_here_and_travels_nowhere(self, kind, token, tiny_checkpoint):
        component = kind(model=tiny_checkpoint, token=token)
        component.warm_up()
        assert TOKEN not in shown_by(component) + repr(component._fields)
        assert copy.deepcopy(component).token == Secret.from_token(TOKEN)
        pipeline = Pipeline()
        pipeline.add_component("component", component)
        for travel in (kind.to_dict, pickle.dumps, lambda _: pipeline.dumps()):
            with pytest.raises(SettingsError, match="token must name an environment variable") as caught:
                travel(component)
            assert TOKEN not in refusals(caught)

    @pytest.mark.parametrize("token", [TOKEN.encode(), [TOKEN], {"token": TOKEN}], ids=["bytes", "list", "dict"])
    def test_what_is_no_secret_is_refused_by_its_type(self, token):
        with pytest.raises(SettingsError, match="token: Input should be an instance of Secret, but got") as caught:
            haystack.KalmRanker(token=token)
        assert TOKEN not in refusals(caught)

    @pytest.mark.parametrize("end", ["\n", " ", "\u00e9"], ids=["newline", "space", "accent"])
    def test_a_token_that_http_would_refuse_is_refused_before_without_showing_it(self, monkeypatch, end):
        """A secret that was read from a file may end with a newline."""
        monkeypatch.setenv("MY_TOKEN", TOKEN + end)
        ranker = haystack.KalmRanker(token=Secret.from_env_var("MY_TOKEN"))
        with pytest.raises(SettingsError, match="token must be of printable ASCII characters without spaces") as caught:
            ranker.warm_up()
        assert TOKEN not in refusals(caught)

    def test_an_environment_variable_is_written_as_its_name(self, monkeypatch):
        monkeypatch.setenv("MY_TOKEN", TOKEN)
        ranker = haystack.KalmRanker(token=Secret.from_env_var("MY_TOKEN"))
        assert "MY_TOKEN" in json.dumps(ranker.to_dict())
        assert TOKEN not in json.dumps(ranker.to_dict()) + str(pickle.dumps(ranker)) + shown_by(ranker)


def shown_by(component: object) -> str:
    """Everything that an object shows of itself without being asked for a setting."""
    screen = io.StringIO()
    Console(file=screen, width=1000).print(component)
    shown = [repr(component), str(component), f"{component}", pprint.pformat(component), screen.getvalue(), dumps(component)]
    if isinstance(component, BaseModel):
        shown += [str(component.model_dump()), component.model_dump_json()]
    if isinstance(component, BaseComponent):
        shown += [str(component.to_dict()), component.to_json()]
    return "\n".join(shown)
