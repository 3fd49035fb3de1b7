"""What a Triton server's Python backend runs; `svd_export.triton` writes the repositories that name it.

inputs.py     a request's inputs: names, Triton's types, limits, and the arguments of a call they become
watch.py      stops a generation between two calls of networks; shows intermediate results
preview.py    latents to small pictures, by a linear map fitted to the request's own photograph
service.py    one engine that makes one video after the other; knows no Triton
metrics.py    requests by outcome, milliseconds by stage
model.py      TritonPythonModel: Triton's requests in, its responses and errors out
"""
