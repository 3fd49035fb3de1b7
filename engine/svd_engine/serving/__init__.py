"""Videos as jobs: submitted, watched, previewed, cancelled, fetched.  Fronts make requests of it.

one_video.py  one video, watched: the part that every front shares
watch.py      progress and previews of it
preview.py    latents to small pictures, by a linear map fitted to the request's own photograph
encode.py     frames to the content of a file
jobs.py       a queue with a limit and a deadline, and the thread that makes one video after the other
triton/       a front with the queue of its server
"""
