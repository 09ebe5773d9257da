"""What Prometheus reads at ``/metrics``."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from e5v_jax.serve.observer import BatchReport, Observer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = tuple(32 * 2**power for power in range(11))


class Metrics(Observer):
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        """All at zero."""
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "e5v_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "e5v_request_seconds",
            "From the request's head to the answer's end.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue = _histogram("e5v_queue_seconds", "An item's wait for the device.", registry)
        self._tokenise = _histogram("e5v_tokenize_seconds", "Tokenising of a request.", registry)
        self._decode = _histogram("e5v_decode_seconds", "Resizing of an image.", registry)
        self._device = _histogram("e5v_device_seconds", "A batch on the device.", registry)
        self._items = Histogram(
            "e5v_batch_items", "Items of a batch.", buckets=_COUNTS, registry=registry
        )
        self._tokens = Histogram(
            "e5v_batch_tokens",
            "Tokens of a batch, without padding.",
            buckets=_TOKENS,
            registry=registry,
        )
        self._padding = Counter(
            "e5v_padding_tokens", "Positions that were computed for nothing.", registry=registry
        )

    def watch(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read whenever somebody asks."""
        Gauge(name, about, registry=self.registry).set_function(read)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def tokenised(self, seconds: float) -> None:
        """See :meth:`Observer.tokenised`."""
        self._tokenise.observe(seconds)

    def decoded(self, seconds: float) -> None:
        """See :meth:`Observer.decoded`."""
        self._decode.observe(seconds)

    def ran(self, batch: BatchReport) -> None:
        """See :meth:`Observer.ran`."""
        for seconds in batch.queue_seconds:
            self._queue.observe(seconds)
        self._device.observe(batch.device_seconds)
        self._items.observe(batch.items)
        self._tokens.observe(batch.tokens)
        self._padding.inc(batch.positions - batch.tokens)

    def print(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


def _histogram(name: str, about: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, about, buckets=_SECONDS, registry=registry)
