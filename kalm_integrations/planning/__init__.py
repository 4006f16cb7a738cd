"""What a collection takes before it is encoded: bytes in metadata, stores and memory, and seconds.

* `shapes`: the widths of a checkpoint, without its weights. `arithmetic`: the multiply-adds of encoder and decoder.
* `reading`: what is read of a passage that is longer than the limit.
* `sizes`: characters and bytes, by the format's own functions. `speed`: seconds, by measured rates.
* `measured.json`: what the benchmarks found of stores and rates; they write it, so that no figure is typed by hand.
* `plans`: all of it for one collection.
"""
