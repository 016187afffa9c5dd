"""A custom scoring function for `Router.custom-router`."""

from dynamo.kv_router.messages import Candidate, RouteRequest


def score(request: RouteRequest, candidate: Candidate) -> float:
    assert request.prompt_tokens > 0
    return candidate.worker
