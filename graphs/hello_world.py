"""Three services and a curl: no model, no GPU.

dynamo serve graphs.hello_world:Frontend -f configs/hello_world.yaml
curl localhost:8000/generate -H "Content-Type: application/json" -d '{"text": "test"}'
"""

from components.hello_world import Backend, Frontend, Middle

Frontend.link(Middle).link(Backend)
