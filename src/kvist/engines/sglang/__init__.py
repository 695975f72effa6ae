"""SGLang: snapshot, fork and check out the paged KV cache of an unmodified SGLang server.

Two parts, in the processes where SGLang runs them:

* beside the scheduler, in its own process and thread: which request holds which pages (`scheduler`), what a request
  takes from a snapshot (`arriving`), and the pages themselves, which `kvist.engines.paged` moves;
* the routes, in the API process: `kvist.server.sglang`.

Both come in through SGLang's own plugins (`hooks`). What else reaches into SGLang is in `internals`, with the version
that it was run on. Importing this package imports no SGLang.
"""
