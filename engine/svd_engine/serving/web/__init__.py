"""A web page before the job service: a picture in, a video that plays there out.  Gradio draws it."""
