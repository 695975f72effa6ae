"""kvist inside the API server of an engine that is not ours: the snapshot routes, and requests that go on from one.

An adapter gives a `client.Engine`, through which calls reach the engine, and a `dialect.Dialect`: what its routes and
bodies are called. From these are made:

* `snapshots`: captured, committed and checked out; `api` has the routes;
* `resume`: middleware for requests that name a snapshot;
* `gate`: middleware that asks who is there.

Knows ASGI and a repository. Imports no engine; the calls' other end is `kvist.engines.paged.answers`.
"""
