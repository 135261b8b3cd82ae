"""All cases. An operator's cases are in `<operator>_cases.py`; this file only collects them."""

from fnmatch import fnmatchcase

from . import (
    aswl_cases,
    dirichlet_cases,
    gsm_cases,
    masked_sgd_cases,
    sdprun_cases,
    select_cases,
    switch_cases,
)
from .case import Case


def all_cases() -> dict[str, Case]:
    modules = (
        select_cases,
        gsm_cases,
        sdprun_cases,
        masked_sgd_cases,
        aswl_cases,
        dirichlet_cases,
        switch_cases,
    )
    definitions = [module.definitions() for module in modules]
    return {case.name: case for cases in definitions for case in cases}


def matching(pattern: str | None, device: str) -> list[Case]:
    """Cases whose name matches a glob; without one, those that are not the tiny smoke test."""
    return [
        case
        for name, case in all_cases().items()
        if device in case.devices
        and (fnmatchcase(name, pattern) if pattern else case.label != "tiny")
    ]
