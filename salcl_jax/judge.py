"""What every task of the evaluation shares: the network under judgement, its baselines, photos, features.

A *subject* is what is judged: the trained network, the same network untrained, or raw pixels.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from salcl_jax import feature_cache, frozen
from salcl_jax.data.sources import Source, open_source
from salcl_jax.evaluators import features
from salcl_jax.guidance import branch
from salcl_jax.models.network import Network
from salcl_jax.types import HostBatch, TrainState

Columns = dict[str, np.ndarray]
_FORMAT = 2  # raise when the same key would give other features


class Subject(NamedTuple):
    """A network to judge, or raw pixels in its place (state None)."""

    name: str  # trained | untrained | pixels
    state: TrainState | None
    digest: str  # of the judged branch's weights; '' must not be cached


@dataclasses.dataclass(frozen=True)
class Judge:
    """Opens photos once, and computes features once per subject and set. All processes call it alike."""

    network: Network
    config: Any
    mesh: Mesh
    cache: str | None = None  # folder of cached features
    watch: Callable[[Iterator, int, str], Iterator] = lambda batches, count, label: batches  # progress
    kept: dict[tuple, Any] = dataclasses.field(default_factory=dict)  # what a picture needs later
    opened: dict[str, Source] = dataclasses.field(default_factory=dict)
    compiled: dict[tuple, Callable] = dataclasses.field(default_factory=dict)
    unread: dict[str, int] = dataclasses.field(default_factory=dict)  # digest -> photos that cannot be used

    def subject(self, name: str, state: TrainState | None) -> Subject:
        """A subject whose features may be cached."""
        if state is None:
            return Subject(name, None, "pixels")
        trees = [tree["encoder"] for tree in branch(state, self.config.eval.branch)]
        return Subject(name, state, feature_cache.digest(jax.device_get(trees)))

    def source(self, part: str, where: str = "") -> Source:
        """Photos of `tasks.<part>`, e.g. 'classify.train'; `where` chooses rows of its labels file."""
        if (part, where) not in self.opened:
            spec = _field(self.config.tasks, part).to_dict()
            spec["data_dir"] = spec["data_dir"] or self.config.data.train.data_dir
            spec["where"] = ",".join(filter(None, (spec["where"], where)))
            self.opened[part, where] = open_source(spec)
        return self.opened[part, where]

    def batches(self, source: Source, label: str, **fields) -> Iterator[HostBatch]:
        """Every photo once, with progress; fields as of `frozen.batches`. Counts the unusable ones."""
        c = self.config.tasks
        found = frozen.batches(
            source, self.config, batch_size=self.batch_size, limit=c.limit, max_boxes=c.max_boxes, **fields
        )
        steps = -(-self.count(source) // self.batch_size)
        return self.watch(self._counted(source, found), steps, label)

    @property
    def batch_size(self) -> int:
        """Photos of a batch."""
        return frozen.divisible(self.config.eval.batch_size, self.mesh)

    def count(self, source: Source) -> int:
        """How many photos of a source a task looks at, usable or not."""
        return min(len(source), self.config.tasks.limit or len(source))

    def _counted(self, source: Source, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
        lost = 0
        for batch in batches:
            lost += int(np.sum(batch["skipped"][~batch["mask"]]))
            yield batch
        self._note(source, lost)

    def _note(self, source: Source, lost: int) -> None:
        digest = source.digest()  # subsets are made anew at each evaluation: sources as keys would pile up
        if lost and not self.unread.get(digest) and jax.process_index() == 0:
            few = f"{lost:,} of {self.count(source):,} photos cannot be used and count in no figure"
            print(f"warning: {source.name}: {few}; check the files", file=sys.stderr, flush=True)
        self.unread[digest] = lost

    def features(
        self,
        subject: Subject,
        source: Source,
        levels: Sequence[str] = ("pooled",),
        on: str = "image",
        view: str | None = None,
    ) -> Columns:
        """Columns of `evaluators.features.columns` for these photos; raw pixels have one level, 'pooled'.

        view: None is `tasks.view`.
        """
        c = self.config.tasks
        view = view or c.view
        key = {"levels": sorted(levels), "on": on, "view": view, "size": self.config.eval.size}
        if subject.state is None:
            key |= {"levels": ["pooled"], "size": c.pixels}
        columns = partial(features.columns, on=on, view=view)
        compute = partial(self._columns, subject, tuple(sorted(levels)))
        label = f"{subject.name}: features of {len(source):,} photos"
        return self._cached(
            subject, source, key, lambda: columns(compute, self.batches(source, label))
        )

    def dense(self, subject: Subject, source: Source) -> Columns:
        """Columns 'features' [n, h, w, d] and 'masks' uint8 [n, s, s] of photos with masks."""
        c = self.config.tasks.segmentation
        key = {"dense": c.size, "stages": [] if subject.state is None else list(c.stages)}

        def compute() -> Columns:
            run = self.compile(
                ("dense", subject.state is None),
                lambda: frozen.make_dense_pixels(c.size)
                if subject.state is None
                else frozen.make_dense(self.network, self.config, size=c.size, stages=c.stages),
            )
            rows: dict[str, list] = {"features": [], "masks": []}
            label = f"{subject.name}: features of the locations of {len(source):,} photos"
            for batch in self.batches(source, label, masks=True):
                found = run(subject.state, batch["image"])  # all processes, whatever the batch holds
                rows["features"].append(np.asarray(found, np.float32)[batch["mask"]])
                rows["masks"].append(batch["masks"][batch["mask"]])
            return {name: np.concatenate(parts) for name, parts in rows.items()}

        return self._cached(subject, source, key, compute)

    def compile(self, key: tuple, make: Callable[[], Callable]) -> Callable:
        """A function of (trees, *arrays) on all devices, compiled once under this key."""
        return self._once(key, lambda: frozen.on_devices(make(), self.mesh))

    def _once(self, key: tuple, make: Callable[[], Callable]) -> Callable:
        if key not in self.compiled:
            self.compiled[key] = make()
        return self.compiled[key]

    def maps_fn(self) -> Callable:
        """Function (state, images) -> (maps, Rois), compiled once."""
        return self._once(("maps",), lambda: frozen.make_maps_fn(self.network, self.config, self.mesh))

    def windows_fn(self) -> Callable:
        """Function ((state, number of a batch), images, boxes, aspect) -> windows by kind, compiled once."""
        return self._once(("windows",), lambda: frozen.make_windows_fn(self.network, self.config, self.mesh))

    def _columns(self, subject: Subject, levels: tuple[str, ...], images, boxes) -> dict[str, np.ndarray]:
        if subject.state is None:
            run = self.compile(("pixels",), lambda: frozen.make_pixels(self.config.tasks.pixels))
        else:
            run = self.compile(levels, lambda: frozen.make_features(self.network, self.config, levels))
        return run(subject.state, images, boxes)

    def _cached(
        self, subject: Subject, source: Source, key: dict, compute: Callable[[], Columns]
    ) -> Columns:
        c = self.config
        data = {name: c.data[name] for name in ("canvas", "min_side", "max_pixels")}
        model = {} if subject.state is None else c.model.to_dict()
        key = {
            "format": _FORMAT, "weights": subject.digest, "model": model, "data": source.digest(),
            "limit": c.tasks.limit, "max_boxes": c.tasks.max_boxes, **data, **key,
        }  # fmt: skip

        def with_unread() -> Columns:
            return compute() | {"unread": np.array([self.unread[source.digest()]], np.int32)}

        found = dict(feature_cache.cached(self.cache if subject.digest else None, key, with_unread))
        self._note(source, int(found.pop("unread")[0]))
        return found


def shared_classes(train: Source, test: Source) -> tuple[str, ...]:
    """Names of the classes of both sources; ValueError where a number means two classes.

    Sources without names, or with numbers for names, go with any; one may know the first classes only.
    """
    names = train.class_names, test.class_names
    spoken = [known for known in names if known and known != tuple(map(str, range(len(known))))]
    if len(spoken) == 2:
        odd = next((i for i, (a, b) in enumerate(zip(*spoken, strict=False)) if a != b), None)
        if odd is not None:
            raise ValueError(
                f"{train.name} and {test.name} number their classes differently: class {odd} is "
                f"{spoken[0][odd]!r} and {spoken[1][odd]!r}; use one list of classes for both"
            )
    return max([*spoken, *names], key=len)


def subset(source: Source, rows: np.ndarray) -> Source:
    """The photos of a source at these rows, in their order."""
    read, digest, place = source.read, source.digest, source.place

    def of_rows() -> str:
        return hashlib.sha256(digest().encode() + np.asarray(rows, np.int64).tobytes()).hexdigest()

    return dataclasses.replace(
        source, size=len(rows), read=lambda i: read(int(rows[i])), digest=of_rows,
        place=lambda i: place(int(rows[i])),
    )  # fmt: skip


def _field(c: Any, name: str) -> Any:
    for part in name.split("."):
        c = c[part]
    return c
