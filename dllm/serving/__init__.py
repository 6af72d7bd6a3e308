"""Answering many at once: one loop over everything that is asked of a model, and the HTTP server around it.

engine         requests in, events out: answers, infills, edits and scores share the model  (no HTTP)
schemas        what requests and answers look like
models         a model that is served: its id, its defaults, what it can do
asking         from the engine's thread to the server's loop
answers        texts as whole answers or as streams of chunks
app            the paths
guard          who may ask, how much, how long; connection: clients that stall
errors         errors in the shape of OpenAI's
documentation  the OpenAPI document and a page of it; page: the page at `/`
metrics        what is counted
run            the process: it listens, and stops when it is told to
"""
