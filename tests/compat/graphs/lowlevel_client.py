"""A client of the low-level runtime: what it finds goes out as lines of text."""

import asyncio
import sys

import uvloop

from dynamo.runtime import DistributedRuntime, dynamo_worker

STATIC = sys.argv[1:] == ["static"]


async def joined(stream):
    return "".join([item.data() async for item in stream])


@dynamo_worker(static=STATIC)
async def worker(runtime: DistributedRuntime):
    endpoint = runtime.namespace("low-level").component("backend").endpoint("generate")
    client = await endpoint.client()
    ids = await client.wait_for_endpoints()
    print("ids", *ids)
    print("generate", await joined(await client.generate('{"data": "abc"}')))
    if STATIC:
        print("static", await joined(await client.static({"data": "abc"})))
        return
    assert client.instance_ids() == client.endpoint_ids() == ids == await client.wait_for_instances()
    print("random", await joined(await client.random({"data": "abc"})))
    print("round_robin", await joined(await client.round_robin({"data": "abc"})))
    print("direct", await joined(await client.direct({"data": "abc"}, ids[0])))
    print("raw", [item async for item in await client.random({"data": "ab"}, annotated=False)])
    async for item in await client.random({"data": "a"}):
        print("item", item.event(), item.id(), item.comments(), item.is_error())
    got = []
    try:
        async for item in await client.random({"data": "ab!c"}):
            got.append(item.data())
    except ValueError as error:
        print("error", got, error)
    for call in (client.direct({"data": "a"}, 12345), client.random({"text": "a"}), client.static({"data": "a"})):
        try:
            await joined(await call)
        except Exception as error:
            print("error", error)
    absent = await runtime.namespace("low-level").component("absent").endpoint("generate").client()
    try:
        await absent.random({})
    except Exception as error:
        print("error", error)


uvloop.install()
asyncio.run(worker())
