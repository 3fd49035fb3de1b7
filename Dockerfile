# A Triton server whose Python can run svd-engine on a GPU; docs/triton.md says how to use it.
FROM nvcr.io/nvidia/tritonserver:26.03-py3
# This Python is the image's alone, whatever the distribution's mark on it says
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1
COPY . /src
RUN pip install '/src[cuda]'
