"""vLLM: snapshot, fork and check out the paged KV cache of an unmodified `vllm serve`.

Three parts, in the processes where vLLM runs them:

* the connector (`connector`), which vLLM builds twice: beside the scheduler (`scheduler`: which blocks are whose, what
  a request may take) and in every worker (`worker`: pages between the cache, host memory and the store);
* a general plugin (`plugin`), through which the API process reaches both;
* the routes, in the API process: `kvist.server.vllm`.

What any engine with a paged cache needs is in `kvist.engines.paged` and `kvist.server.live`. What touches vLLM beyond
its published connector interface is in `internals`, with the versions that it was run on. Importing this package
imports no vLLM.
"""
