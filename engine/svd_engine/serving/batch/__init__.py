"""A folder or a list of pictures to videos, with what is done kept between runs.

items.py       pictures and the settings of each: from a folder, a CSV file or JSON lines
records.py     the folder of results: what is whole there, the record of each video, the table
making.py      one video of a batch: the part that every way to run shares
in_process.py  one after the other, here
on_ray.py      on the workers of a Ray cluster, which schedules and retries
"""
