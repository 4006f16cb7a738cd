# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: encode, store, query, inspect
#
# Open this file in Jupyter with the jupytext extension, or make an `.ipynb` of it: `jupytext --to ipynb quickstart.py`.
#
# `pico` is built in and there to try things out. For production write `nano` or a larger one.

# %%
from kalm_integrations import KalmReranker

reranker = KalmReranker.from_pretrained("pico")
passages = {
    "football": "The Panthers defense gave up just 308 points in 2015, ranking sixth in the league.",
    "otters": "Otters live on fish, crabs and frogs, and hunt mostly at dusk.",
    "rhine": "The Rhine rises in the Swiss Alps and flows into the North Sea near Rotterdam.",
    "warsaw": "The flora of the city of Warsaw is rich in species, as three natural regions meet there.",
}

# %% [markdown]
# ## Encode
#
# Once per passage, at ingest. For each there are two strings to store as metadata: the encoding, and its short fingerprint.

# %%
metadata = reranker.encode_to_metadata(list(passages.values()))
{key: value[:60] for key, value in metadata[0].items()}

# %% [markdown]
# ## Store
#
# Any store that keeps strings will do. Here it is a file of JSON lines; with LangChain, LlamaIndex and Haystack the adapters
# put the same strings into the metadata of your documents.

# %%
import json
from pathlib import Path

store = Path("passages.jsonl")
with store.open("w", encoding="utf-8") as file:
    for (name, text), encoded in zip(passages.items(), metadata, strict=True):
        file.write(json.dumps({"id": name, "text": text, **encoded}) + "\n")
print(f"{store.stat().st_size:,} bytes for {len(passages)} passages")

# %% [markdown]
# ## Query
#
# As after a restart: a new reranker, whose memory is empty. The encodings come from the store, and nothing is encoded.

# %%
from kalm_integrations import Passage

rows = [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines()]
candidates = [Passage(row["text"], row["kalm_encoding"]) for row in rows]

restarted = KalmReranker.from_pretrained("pico")
for place in restarted.rank("Where does the Rhine end?", candidates):
    print(f"{place.score:.3f}  {rows[place.index]['id']}")

# %%
assert restarted.stats.passages_encoded == 0
restarted.stats

# %% [markdown]
# A text that changed after it was encoded is noticed, and encoded again on the spot:

# %%
edited = [Passage(candidates[0].text + " They lost the final.", candidates[0].encoding), *candidates[1:]]
restarted.rank("Who lost the final?", edited)
assert (restarted.stats.stale, restarted.stats.passages_encoded) == (1, 1)

# %% [markdown]
# ## Inspect
#
# What does the string hold, and how long would it be at other ratios and in other codecs?

# %%
from kalm_integrations import EncodedPassage

encoding = EncodedPassage.from_metadata(rows[0]["kalm_encoding"])
print(
    f"{encoding.n_tokens} tokens, {encoding.compression_ratio} to a state: {tuple(encoding.states.shape)} in {encoding.codec}"
)

# %%
for codec in ("fp16", "rot4", "rot2"):
    for ratio in (4, 8, 16):
        [written] = KalmReranker.from_pretrained("pico", compression_ratio=ratio, storage_codec=codec).encode_to_metadata(
            [rows[0]["text"]]
        )
        print(f"{codec}  ratio {ratio:2}  {len(written['kalm_encoding']):6,} characters")

# %% [markdown]
# A finer encoding serves a coarser request, so the choice can be made anew at any time. How to make it is in the
# documentation, under "Encodings".
