"""The page: what stands where, and what each button does."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from svd_engine.engine import VideoEngine
from svd_engine.errors import OutputError, SvdEngineError
from svd_engine.serving.jobs import Job, JobService
from svd_engine.serving.web import controls, status
from svd_engine.serving.web.models import describe
from svd_engine.serving.web.visit import Visit, other_formats, remove_cut_uploads
from svd_engine.values import one_of

LOOK_SECONDS = 0.2
EXAMPLE = Path(__file__).parents[2] / "assets" / "coffee.png"
CACHE_SECONDS = (3600, 86_400)  # how often old uploads are removed, and how old they are then
CSS = Path(__file__).with_name("page.css")
DOWNLOADS = {"mp4": "MP4", "webp": "WebP", "gif": "GIF", "zip": "Frames"}
EMPTY = status.done("Your video will be here.")


class Page:
    """Blocks of Gradio over `models`, whose videos `service` makes; results lie in `folder` meanwhile."""

    def __init__(self, models: Mapping[str, VideoEngine], service: JobService, folder: Path) -> None:
        self.models, self.service, self.folder = models, service, folder
        self.visits: dict[str, Visit] = {}  # by Gradio's name of a page that is open
        with gr.Blocks(
            title="svd-engine", analytics_enabled=False, delete_cache=CACHE_SECONDS
        ) as self.blocks:
            gr.Markdown("# svd-engine\nA photograph in, a short video out.")
            with gr.Row():
                with gr.Column(min_width=300):
                    self._ask()
                with gr.Column(min_width=300):
                    self._answer()
            self._connect()

    def _ask(self) -> None:
        name, engine = next(iter(self.models.items()))
        self.photograph = gr.Image(
            type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Photograph", height=280,
            elem_id="photograph",
        )  # fmt: skip
        gr.Examples([[str(EXAMPLE)]], self.photograph, label="Or take this one")
        self.model = gr.Dropdown(
            list(self.models), value=name, label="Model", info=describe(engine), elem_id="model"
        )
        self.seed = controls.seed_control()
        made = {}
        for parameter in controls.SHOWN:
            if parameter.name in controls.FIRST:
                made[parameter.name] = controls.control(parameter, engine)
        with gr.Accordion("More settings: size, sampler, schedule, guidance", open=False):
            for parameter in controls.SHOWN:
                if parameter.name not in controls.FIRST:
                    made[parameter.name] = controls.control(parameter, engine)
        self.settings = [made[parameter.name] for parameter in controls.SHOWN]

    def _answer(self) -> None:
        self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Row():
            self.again = gr.Button("Again with another seed", elem_id="again", scale=2, min_width=200)
            self.stop = gr.Button("Cancel", interactive=False, elem_id="cancel", min_width=80)
        self.status = gr.HTML(EMPTY, elem_id="status")
        with gr.Column(visible=False) as self.result:
            self.video = gr.Video(
                label="Video", autoplay=True, loop=True, interactive=False, elem_id="video", buttons=[]
            )
            with gr.Row():
                self.downloads = {
                    kind: gr.DownloadButton(
                        name, size="sm", interactive=False, elem_id=f"download-{kind}", min_width=70
                    )
                    for kind, name in DOWNLOADS.items()
                }
            with gr.Accordion("Report: backend, milliseconds, memory", open=False):
                self.report = gr.JSON(show_label=False, elem_id="report")
        self.gallery = gr.Gallery(
            label="Videos of this visit", columns=4, fit_columns=False, object_fit="contain", height="auto",
            interactive=False, visible=False, elem_id="gallery", buttons=[],
        )  # fmt: skip

    def _connect(self) -> None:
        inputs = [self.model, self.photograph, self.seed, *self.settings]
        outputs = [
            self.status, self.stop, self.result, self.video, *self.downloads.values(), self.report,
            self.gallery,
        ]  # fmt: skip
        # Values come as the browser sent them, and are checked by the request's list, in its words.
        making: dict[str, Any] = {
            "fn": self._generate, "inputs": inputs, "outputs": outputs, "preprocess": False,
            "show_progress": "hidden", "concurrency_limit": None, "scroll_to_output": True,
            "api_visibility": "private",
        }  # fmt: skip
        aside: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.generate.click(**making)
        self.again.click(_another_seed, None, self.seed, **aside).then(**making)
        self.stop.click(self._cancel, None, None, **aside)
        self.model.change(self._choose, self.model, [self.model, *self.settings], preprocess=False, **aside)
        self.blocks.unload(self._leave)

    async def _generate(
        self, request: gr.Request, name: object, photograph: Any, seed: object, *values: object
    ) -> AsyncIterator[dict[Any, Any]]:
        visit = self._visit(request)
        try:
            job = self._submit(visit, name, photograph, seed, values)
        except SvdEngineError as error:
            if visit.job is not None and not visit.job.status.ended:
                gr.Warning(status.in_words(error))  # beside its progress
            else:
                yield {self.status: status.failed(error)}
            return
        yield self._cleared()
        try:
            await asyncio.to_thread(remove_cut_uploads, self.folder)
            shown = status.JobStatus(job)
            while not job.status.ended:
                if (news := await asyncio.to_thread(shown.news)) is not None:
                    yield {self.status: news}
                await asyncio.sleep(LOOK_SECONDS)
            async for update in self._finished(visit, job, f"{Path(str(name)).name}-seed-{job.request.seed}"):
                yield update
        except OutputError as error:
            if not visit.ended:
                yield {self.status: status.failed(error), self.stop: gr.update(interactive=False)}
        finally:
            job.cancel()  # the page was closed; nothing after the job's end

    def _submit(
        self, visit: Visit, name: object, photograph: Any, seed: object, values: tuple[object, ...]
    ) -> Job:
        """Raises SvdEngineError.  Gradio has checked that the photograph is an upload of its own."""
        engine = self._engine(name)
        path = Path(photograph["path"]) if photograph else None
        return visit.submit(
            self.service, engine, path, controls.read_seed(seed), controls.arguments(engine, values)
        )

    async def _finished(self, visit: Visit, job: Job, name: str) -> AsyncIterator[dict[Any, Any]]:
        """The video first, then what takes longer to write.  Raises OutputError."""
        idle = {self.stop: gr.update(interactive=False)}
        try:
            output = await asyncio.to_thread(job.result)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                raise
            yield {self.status: status.failed(error), **idle}
            return
        mp4 = await asyncio.to_thread(visit.keep, output, name)
        seconds = output.report.total_ms / 1000
        yield {
            self.status: status.done(f"Done in {seconds:.1f} s, seed {job.request.seed}"),
            self.result: gr.update(visible=True),
            self.video: str(mp4),
            self.downloads["mp4"]: gr.update(value=str(mp4), interactive=True),
            self.report: output.report.model_dump(mode="json"),
            self.gallery: gr.update(value=list(visit.videos), visible=True),
            **idle,
        }
        files = await asyncio.to_thread(other_formats, output, mp4)
        yield {
            self.downloads[kind]: gr.update(value=str(path), interactive=True)
            for kind, path in files.items()
            if path is not None
        }

    def _cleared(self) -> dict[Any, Any]:
        off = gr.update(value=None, interactive=False)
        return {
            self.stop: gr.update(interactive=True), self.result: gr.update(visible=False), self.video: None,
            self.report: None, **dict.fromkeys(self.downloads.values(), off),
        }  # fmt: skip

    async def _cancel(self, request: gr.Request) -> None:
        self._visit(request).cancel()

    async def _leave(self, request: gr.Request) -> None:
        visit = self.visits.pop(request.session_hash, None)
        if visit is not None:
            await asyncio.to_thread(visit.end)
        await asyncio.to_thread(remove_cut_uploads, self.folder)

    async def _choose(self, name: object) -> list[Any]:
        """The model's own values in place of the last one's."""
        engine = self._engine(name)
        values = [controls.reset(parameter, engine) for parameter in controls.SHOWN]
        return [gr.update(info=describe(engine)), *values]

    def _engine(self, name: object) -> VideoEngine:
        """Raises SettingsError."""
        return self.models[one_of("model", name, tuple(self.models))]

    def _visit(self, request: gr.Request) -> Visit:
        visit = Visit(self.folder / secrets.token_urlsafe(16))
        return self.visits.setdefault(request.session_hash, visit)


async def _another_seed() -> str:
    return str(secrets.randbelow(2**32))
