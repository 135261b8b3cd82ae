"""All cases. An operator's cases are in `<operator>_cases.py`; this file only collects them."""

from fnmatch import fnmatchcase

from . import gsm_cases, sdprun_cases, select_cases
from .case import Case


def all_cases() -> dict[str, Case]:
    definitions = [m.definitions() for m in (select_cases, gsm_cases, sdprun_cases)]
    return {case.name: case for cases in definitions for case in cases}


def matching(pattern: str | None, device: str) -> list[Case]:
    """Cases whose name matches a glob; without one, those that are not the tiny smoke test."""
    return [
        case
        for name, case in all_cases().items()
        if device in case.devices
        and (fnmatchcase(name, pattern) if pattern else case.label != "tiny")
    ]
