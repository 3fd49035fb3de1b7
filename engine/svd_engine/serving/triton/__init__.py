"""What a Triton server's Python backend runs; `svd_export.triton` writes the repositories that name it.

inputs.py     a request's inputs: names, Triton's types, limits, and the arguments of a call they become
metrics.py    requests by outcome, milliseconds by stage
model.py      TritonPythonModel: Triton's requests in, its responses and errors out
"""
