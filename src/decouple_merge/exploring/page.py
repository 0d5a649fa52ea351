"""The local page of a run, with a slider for each merging weight; the adapter to gradio."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from jaxtyping import UInt8
from torch import Tensor

from ..errors import UserError
from ..searching.strategies import Weights
from .estimate import SearchKnowledge
from .explorer import METHODS, NUM_IMAGES, Explorer

# Small images are shown by whole pixels, about so wide.
SHOWN_WIDTH = 128
CSS = "footer { display: none !important } .strip img { image-rendering: pixelated; width: 100% }"


def open_page(explorer: Explorer, out: Path) -> gr.Blocks:
    """Make the page; nothing runs until it is launched.

    Args:
        out: the folder that a merge is exported to, where the page isn't told another.
    """
    knowledge = SearchKnowledge(explorer.run.trials, explorer.config)
    search, best = explorer.config.search, explorer.best
    low, high = min(search.low, *best), max(search.high, *best)
    has_own = search.method in METHODS
    start = [search.method if has_own else METHODS[0], explorer.density]
    # Fitted before somebody waits for it.
    knowledge.estimate(best)
    with gr.Blocks(title=f"{explorer.run.folder.resolve().name}: merging weights", analytics_enabled=False) as page:
        gr.Markdown(f"# {explorer.run.folder.resolve().name}\n{_introduction(explorer)}")
        with gr.Row():
            with gr.Column(min_width=280):
                sliders = [
                    gr.Slider(low, high, round(w, 3), step=0.001, label=f"weight of {name}")
                    for name, w in zip(explorer.names, best, strict=True)
                ]
                method = gr.Radio(METHODS, value=start[0], label="method")
                density = gr.Slider(0.05, 1.0, start[1], step=0.01, label="density, the share that ties keeps")
                with gr.Row():
                    # The page merges by no other method.
                    reset = gr.Button("The run's own merge", visible=has_own)
                    zero = gr.Button("All weights 0")
            with gr.Column(scale=2, min_width=320):
                distance = gr.Markdown(elem_id="distance")
                merged = _strip("This merge")
                _strip("Pretrained", lambda: _picture(explorer.pretrained))
                _strip("Ensemble of the experts", lambda: _picture(explorer.ensemble))
        with gr.Row():
            folder = gr.Textbox(str(out), label="folder", scale=3)
            export = gr.Button("Export this merge", scale=1)
        said = gr.Markdown(elem_id="exported")

        _connect(explorer, knowledge, page, [method, density, *sliders], (merged, distance))
        reset.click(lambda: [*start, *(round(w, 3) for w in best)], outputs=[method, density, *sliders])
        zero.click(lambda: [0.0] * len(best), outputs=sliders)
        written = partial(_write, explorer)
        once: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "merge"}
        export.click(written, [folder, method, density, *sliders], said, **once)
    return page


def _connect(
    explorer: Explorer, knowledge: SearchKnowledge, page: gr.Blocks, inputs: list[Any], outputs: tuple[Any, Any]
) -> None:
    """Answer every change of a control, and the opening of the page."""

    def answer(method: str, density: float, *weights: float) -> tuple[Any, str]:
        chosen = tuple(map(float, weights))
        images = _said(lambda: explorer.draw(chosen, method, density))
        return _picture(images), describe(knowledge, chosen, method, density)

    # Of the places that a slider passes while an answer is made, only the last has one.
    shared: dict[str, Any] = {"inputs": inputs, "outputs": list(outputs), "show_progress": "minimal"}
    page.load(answer, **shared)
    for control in inputs:
        control.change(answer, trigger_mode="always_last", concurrency_limit=1, concurrency_id="merge", **shared)


def _write(explorer: Explorer, folder: str, method: str, density: float, *weights: float) -> str:
    """Export a merge; returns what the page says of it."""
    lines = _said(lambda: list(explorer.export(tuple(map(float, weights)), method, density, Path(folder))))
    return "\n\n".join([f"Written: {folder}", *(line for line in lines if isinstance(line, str))])


def launch(page: gr.Blocks, host: str, port: int | None, *, wait: bool = True) -> str:
    """Serve the page until it is interrupted; returns its address.

    Args:
        port: the first free one from 7860 on where not given.
        wait: or else come back at once, while the page is served.

    Raises:
        UserError: the address is taken or isn't this machine's.
    """
    # Fonts of this machine: the default theme asks a server for its own.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=not wait, share=False, theme=theme, css=CSS,
            ssr_mode=False, mcp_server=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--host {host} --port {port} can't be served on ({error}); give another, or none") from error
    return url


def describe(knowledge: SearchKnowledge, weights: Weights, method: str, density: float) -> str:
    """Say what the search knows of a merge's distance, or what it makes one expect."""
    metric = knowledge.metric
    if knowledge.is_tuned:
        return f"**{metric}**: not known; the search chose settings of the merge with the weights."
    if not knowledge.trials:
        return f"**{metric}**: nothing was searched yet."
    if not knowledge.knows(method, density):
        is_single = knowledge.method == "ties" and knowledge.density is not None
        own = knowledge.method + (f" at density {knowledge.density:g}" if is_single else "")
        return f"**{metric}**: not known; the search merged by {own}."
    if known := knowledge.known(weights):
        said = "; ".join(f"{value:.4g} on {num:,} images ({level})" for level, (value, num) in known.items())
        return f"**{metric}**: measured by the search, {said}."
    estimate, first = knowledge.estimate(weights), knowledge.screened[0]
    if estimate is None:
        return f"**{metric}**: not measured here, and too few candidates were for an estimate."
    return (
        f"**{metric}**: not measured here. The Gaussian process of {len(knowledge.screened)} candidates expects "
        f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g}) on {first['num_images']:,} images."
    )


def _introduction(explorer: Explorer) -> str:
    sampler = explorer.config.sample.sampler or "the base's own sampler"
    return (
        f"Seeds {explorer.seeds.start} to {explorer.seeds.stop - 1}, {explorer.num_steps} steps of {sampler}. "
        "Weights are those of the experts, each of its range of timesteps."
    )


def _strip(title: str, draw: Callable[[], Any] | None = None) -> gr.Image:
    gr.Markdown(f"### {title}")
    alt = f"{NUM_IMAGES} images: {title}"
    return gr.Image(draw, show_label=False, format="png", interactive=False, elem_classes="strip", alt_text=alt)


def _picture(images: UInt8[Tensor, "n c h w"]) -> Any:
    """Put images beside each other, four a row: uint8 [h, w, 3] of numpy."""
    factor = max(1, SHOWN_WIDTH // images.shape[-1])
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    colour = large.expand(-1, 3, -1, -1) if large.shape[1] == 1 else large[:, :3]
    _, _, height, width = colour.shape
    return colour.reshape(2, 4, 3, height, width).permute(0, 3, 1, 4, 2).reshape(2 * height, 4 * width, 3).numpy()


def _said(do: Callable[[], Any]) -> Any:
    """Do something; what a user can mend is said on the page."""
    try:
        return do()
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
