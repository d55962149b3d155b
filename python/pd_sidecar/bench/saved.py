"""Saves the measurements of a run as JSON, and reads them again."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from pd_sidecar.bench.samples import Goals, Result, Sample
from pd_sidecar.bench.workload import BadInputError

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1
FIELDS = {field.name for field in fields(Sample)}


def document(about: dict[str, str], goals: Goals, results: list[Result], *, interrupted: bool) -> dict[str, Any]:
    """Returns all that is known about a run. The times of samples are in seconds, those of figures in milliseconds."""
    return {
        "version": VERSION,
        "about": about,
        "goals": asdict(goals),
        "interrupted": interrupted,
        "servers": [
            {
                "name": result.name,
                "url": result.url,
                "figures": result.summary(goals),
                "samples": [asdict(sample) for sample in result.samples],
            }
            for result in results
        ],
    }


def read(path: Path) -> tuple[dict[str, str], Goals, list[Result]]:
    """Reads what `document` returned. Raises `BadInputError`."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["version"] != VERSION:
            raise BadInputError(f"{path}: `version` is {saved['version']!r}, this program reads {VERSION}")
        results = []
        for server in saved["servers"]:
            samples = [
                Sample(**{key: value for key, value in each.items() if key in FIELDS}) for each in server["samples"]
            ]
            figures = server["figures"]
            results.append(
                Result(
                    server["name"], server["url"], samples, figures["seconds"], figures["unfinished"],
                    figures["transfers"],
                )
            )  # fmt: skip
        return saved["about"], Goals(**saved["goals"]), results
    except BadInputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInputError(f"{path}: no file that `pd-bench run --json` has written: {error!r}") from error
