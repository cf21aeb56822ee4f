"""How many programs this process compiled: a step that compiles again and again is slow without an error."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"  # also told where the cache on disk has the program


class Compilations:
    """Inside the context, counts the programs that were compiled, or read from the cache."""

    def __init__(self):
        self._count = 0

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def take(self) -> int:
        """The number since the last call."""
        count, self._count = self._count, 0
        return count

    def _listen(self, event: str, *_, **__) -> None:
        self._count += event == _EVENT
