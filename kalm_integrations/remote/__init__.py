"""A reranker that runs elsewhere: `kalm serve` has the model, and here is its client. Without torch.

* `protocol`: what both say to each other. `address`: where a service is, and the key to it.
* `conversation`: one request, with its time, retries and errors; `connections` carries it out, for threads and for coroutines.
* `reading`: what a passage's metadata is worth, seen from here. `scoring`: what is asked, and what of it is sent.
* `reranker`: puts it together.
"""
