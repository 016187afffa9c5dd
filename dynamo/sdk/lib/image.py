"""`DYNAMO_IMAGE`: the container image of services that name none."""

import os

DYNAMO_IMAGE = os.environ.get("DYNAMO_IMAGE") or "dynamo:latest-vllm"
