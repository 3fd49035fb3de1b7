"""The sampling loop's parts as pure functions.  Knows no images, networks or backends.

registry.py         the one table of samplers, schedules and guiders by name
samplers.py         loops over denoise(x, sigma)
schedules.py        noise levels
guiders.py          guidance scales by frame
presets.py          settings that others recommend
preconditioning.py  EDM scalings
"""
