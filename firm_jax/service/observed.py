"""What the service tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from firm_jax.service.fixed import Shape

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Observed:
    """The metrics of one service, in a registry of their own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"firm_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets, *labels: str) -> Histogram:
            return Histogram(f"firm_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests by path and status.", "path", "status")
        self.request_seconds = histogram("request_seconds", "From the headers to the answer.", SECONDS, "path")
        self.items = counter("items", "Questions to /v1/score by criterion and status.", "axis", "status")
        self.unreadable = counter("unreadable_answers", "Answers without a score, by what is wrong.", "axis", "reason")
        self.scores = histogram("score", "Scores, of several the lowest.", (1, 2, 3, 4, 5), "axis")
        self.remembered = counter("remembered_answers", "Questions that were answered from memory.")
        self.waited = histogram("queue_seconds", "From a question's arrival to its batch.", SECONDS)
        self.rows = histogram("batch_rows", "Questions in a batch.", (1, 2, 4, 8, 16, 32, 64, 128))
        self.first_chunk = histogram("prefill_seconds", "Reading a batch and writing the first tokens.", SECONDS)
        self.device_seconds = counter("device_seconds", "In which batches were read and answered.")
        self.tokens = counter("generated_tokens", "Written in answers.")
        self.failed_batches = counter("failed_batches", "Batches that the device refused.")
        self.shapes = Gauge("firm_shapes", "Shapes of batches met, each compiled once.", registry=registry)
        self.queue = Gauge("firm_queue", "Questions that wait for a batch.", registry=registry)
        self.ready = Gauge("firm_ready", "1 while the canary is answered as it was at first.", registry=registry)
        self._shapes: set[Shape] = set()

    def batch(self, shape: Shape, rows: int, seconds: float) -> None:
        """A batch has been read, and its first tokens written."""
        self.rows.observe(rows)
        self.first_chunk.observe(seconds)
        self._shapes.add(shape)
        self.shapes.set(len(self._shapes))
