"""A critic as a service over HTTP: `firm-jax serve`. Needs the extra `serve`, which nothing else here imports.

app        routes, statuses, one error form
guard      what is refused before it is read: no token, too large, too much at once, while draining
protocol   the JSON of requests and answers
judging    from a request to prompts, from generations to answers
engine     the bounded queue, and the one thread that owns the devices
fixed      answers in batches of few shapes, each independent of the others in its batch
server     the process: load, listen, drain
"""
