"""What every adapter to an engine with a paged KV cache shares: pages in and out, captures, loads, matching, calls.

An adapter says where its engine keeps pages (`pages`) and which requests hold which (`plans`); what it then asks for is
done here, beside the engine's own work:

* one rank's pages between the cache, host memory and the store: `mover`, over `pages`, `staging`, `capturing`,
  `fetching`, `saving` and `arrivals`;
* what a request may take from a snapshot, or from the durable prefix cache: `matching`, `checkouts`, `index`;
* what requests are called, and what pins the weights: `requests`, `pinning`;
* chunks that a cache tier of another project hands over to be kept: `chunks`, `pins`, `options`;
* the calls of the API process: `answers`, whose other end is `kvist.server.live`.

Knows tensors, pages, block hashes and a repository. Imports no engine.
"""
