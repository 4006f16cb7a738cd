"""What the reranker costs beside the reference and its peers: `python -m benchmarks --help`, from tests/.

| module | what it does |
|---|---|
| plan.py | what is measured: rows as data, for a CPU, for a GPU, and at toy size |
| workload.py | the checkpoint, and texts of exact token counts |
| rows.py | the work of each row, and the runner that interleaves them |
| reference.py, peers.py | the reference with pooled states, and models of other shapes |
| floor.py | the arithmetic that cannot be avoided, and the rate of this machine's matrix products |
| curves.py, storage.py, memory.py | growth, bytes and read time of encodings, peak memory |
| steps.py, ways.py | gain of each step of the decoder: `python -m benchmarks.steps` |
| windows.py | what the encoder saves by blocks of queries: `python -m benchmarks.windows` |
| stacks.py | layers of a real shape with random weights, for these two and int8.py |
| int8.py, early_exit.py | what was tried and left out: `python -m benchmarks.int8 FOLDER`, `… early_exit FOLDER …` |
| trials.py | options and tables that steps.py, windows.py, int8.py and early_exit.py share |
| machine.py | what the figures depend on |
| render.py, bars.py, plots.py, tables.py, page.md | results to docs/benchmarks.md |
"""
