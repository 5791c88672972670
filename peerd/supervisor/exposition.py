"""Writes metrics in Prometheus' text format, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/. One pass over a list of families; the
supervisor serves nothing else meanwhile, so the text of the labels is kept: 5,000 samples take 2 ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Samples = Iterable[tuple[str, float]]  # Labels, as label_pairs() writes them, and the value


class Family(NamedTuple):
    """A metric, with a value for each set of labels. Names of counters end in ``_total``."""

    name: str
    help: str
    samples: Samples
    """Of a histogram: with the suffix of the name before the labels; see histogram_samples()."""

    is_histogram: bool = False


def label_pairs(**labels: str) -> str:
    """Such as ``{peer="localhost:5001"}``; no labels are an empty text."""
    if not labels:
        return ""
    escaped = {name: _escaped(value).replace('"', r"\"") for name, value in labels.items()}
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"


def histogram_samples(
    labels: str, upper_bounds: tuple[float, ...], counts: Sequence[int], total: float | None
) -> Samples:
    """Samples of one histogram. ``counts``: one per bound and one for what is above the last.

    ``total`` is the sum of all observations. Without it neither sum nor count are written.
    """
    # Each bucket of Prometheus includes those below it.
    samples: list[tuple[str, float]]
    samples = list(zip(_buckets(labels, upper_bounds), accumulate(counts), strict=True))
    if total is not None:
        samples += [(f"_count{labels}", sum(counts)), (f"_sum{labels}", total)]
    return samples


@cache
def with_label(labels: str, name: str, value: str) -> str:
    """Labels from label_pairs() and one more."""
    pair = label_pairs(**{name: value})
    return f"{labels[:-1]},{pair[1:]}" if labels else pair


@cache
def _buckets(labels: str, upper_bounds: tuple[float, ...]) -> list[str]:
    bounds = (*map(str, upper_bounds), "+Inf")
    return [f"_bucket{with_label(labels, 'le', bound)}" for bound in bounds]


def render(families: Iterable[Family]) -> bytes:
    parts = []
    for name, explanation, samples, is_histogram in families:
        kind = "counter" if name.endswith("_total") else "histogram" if is_histogram else "gauge"
        parts.append(f"# HELP {name} {_escaped(explanation)}\n# TYPE {name} {kind}\n")
        parts += [f"{name}{labels} {value}\n" for labels, value in samples]
    return "".join(parts).encode()


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")
