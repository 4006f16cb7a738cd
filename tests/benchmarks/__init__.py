"""What the reranker costs beside the reference and its peers: `python -m benchmarks --help`, from tests/.

| module | what it does |
|---|---|
| plan.py | what is measured: rows as data, for a CPU, for a GPU, and at toy size |
| workload.py | the checkpoint, and texts of exact token counts |
| rows.py | the work of each row, and the runner that interleaves them |
| reference.py, peers.py | the reference with pooled states, and models of other shapes |
| floor.py | the seconds that cannot be avoided, at the rate of this machine's matrix products |
| curves.py, storage.py, memory.py | growth, bytes and read time of encodings, peak memory |
| steps.py, ways.py | gain of each step of the decoder: `python -m benchmarks.steps` |
| ingest.py | passages from texts to metadata, against the floor: `python -m benchmarks.ingest` |
| ingest_page.py | its section |
| windows.py | what the encoder saves by blocks of queries: `python -m benchmarks.windows` |
| helpers.py | what idle helper threads of the caller cost: `python -m benchmarks.helpers` |
| helpers_page.py | its section |
| stacks.py | layers of a real shape with random weights, for these two |
| trials.py | options and tables that these two share |
| stores.py, store_kinds.py, stores_page.py | bytes and milliseconds in real stores: `python -m benchmarks.stores` |
| mep_ablation.py | what training on pooled states is worth: `python -m benchmarks.mep_ablation TRAIN TEST` |
| export_dtype.py | what bfloat16 leaves of a fine-tune: `python -m benchmarks.export_dtype FOLDER` |
| fine_tuning.py | recipes of fine-tuning for code search: `python -m benchmarks.fine_tuning CODE SQUAD_DEV` |
| fine_tuning_page.py | their tables: `python -m benchmarks.fine_tuning_page` |
| spans.py, span_cases.py | which sentence answers, and what can be left out: `python -m benchmarks.spans` |
| span_cost.py | what that costs a query: `python -m benchmarks.span_cost` |
| batches.py | speed and memory of a GPU by batch size: `python -m benchmarks.batches` |
| spans_page.py | tables of the last three: `python -m benchmarks.spans_page` |
| long_passages.py | cut, windows or one long pass: `python -m benchmarks.long_passages FOLDER` |
| long_passages_page.py | its tables: `python -m benchmarks.long_passages_page` |
| machine.py | what the figures depend on |
| render.py, bars.py, plots.py, tables.py, page.md | results to docs/benchmarks.md |
"""
