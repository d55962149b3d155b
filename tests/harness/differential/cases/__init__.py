"""The cases of the differential suite, one file for each kind of endpoint."""

from harness.differential.case import Case
from harness.differential.cases import bodies, chats, completions, messages, passed, responses, routes

CASES: tuple[Case, ...] = (
    *completions.CASES,
    *chats.CASES,
    *responses.CASES,
    *messages.CASES,
    *passed.CASES,
    *bodies.CASES,
    *routes.CASES,
)
