"""Commands that answer people."""

from pathlib import Path
from typing import Annotated

import typer

from relook.cli.command import App
from relook.cli.options import Adapter, Bits, Device, Dtype, Tower, Version, input_argument, input_option

app = App("Serve")


@app.command()
def serve(
    models: Annotated[
        list[Path], input_argument("Model folders or output folders of training runs; requests choose by name.")
    ],
    base: Annotated[Path | None, input_option("Another model to compare with, served beside it.")] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Serve the model with its change switched off beside it.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[str, typer.Option(envvar="RELOOK_API_KEY", help="Key that clients must send.")] = "",
    slots: Annotated[int, typer.Option(help="Answers at the same time.", min=1)] = 16,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are refused (429).", min=0)] = 128,
    max_length: Annotated[
        int, typer.Option(help="Positions of prompt and answer; 0: the language model's own.", min=0)
    ] = 0,
    cache_gb: Annotated[
        float, typer.Option(help="Memory for keys and values of all slots of a model; 0: half of what is free.", min=0)
    ] = 0.0,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to the end of its answer.", min=0.1)] = 300.0,
    stop_timeout: Annotated[int, typer.Option(help="Seconds for running answers once the server stops.", min=0)] = 30,
    max_image_mb: Annotated[float, typer.Option(help="Largest image file.", min=0.001)] = 20.0,
    max_body_mb: Annotated[float, typer.Option(help="Largest request.", min=0.001)] = 50.0,
    max_images: Annotated[int, typer.Option(help="Most images of a conversation.", min=0)] = 16,
    allow_http: Annotated[
        bool, typer.Option("--allow-http", help="Fetch http(s) image URLs, of public hosts.")
    ] = False,
    media_root: Annotated[Path | None, input_option("Folder below which file: URLs may lie.")] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name under which clients reach the server, besides localhost; may be repeated."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A site whose pages may use the API, as https://a.example, or * for any; may be repeated."),
    ] = None,
    page: Annotated[
        bool | None, typer.Option("--page/--no-page", help="A page for people at /; there where gradio is installed.")
    ] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Compile everything before taking requests (GPUs).")] = False,
    version: Version = "",
    adapter: Adapter = None,
    vision_tower: Tower = None,
    dtype: Dtype = "float32",
    bits: Bits = 16,
    device: Device = "",
) -> None:
    """Serve models over HTTP, as OpenAI's chat API does."""
    from relook.serve import check_installed

    check_installed()
    from relook.generate.request import EngineLimits
    from relook.model.load import LoadOptions
    from relook.serve import page as pages
    from relook.serve import server as run
    from relook.serve.api import ServerLimits
    from relook.serve.media import ImageSources

    sources = ImageSources(int(max_image_mb * 1e6), allow_http, media_root)
    if page:
        pages.check_gradio_installed()
    loading = LoadOptions(adapter, vision_tower, dtype, bits, device)
    run.serve(
        run.ServeOptions(
            host, port, stop_timeout, version, pages.installed() if page is None else page, warm, adapter or models[0]
        ),
        EngineLimits(slots, queue, max_length, cache_gb, seconds=timeout),
        ServerLimits(
            api_key,
            sources,
            max_images,
            int(max_body_mb * 1e6),
            hosts=frozenset(allow_host or ()),
            origins=tuple(cors_origin or ()),
        ),
        lambda: run.load_models(models, loading, base, with_base),
    )


@app.command()
def chat(
    model: Annotated[Path, input_argument("A model folder, or the output folder of a training run.")],
    base: Annotated[Path | None, input_option("What /base asks; else the model without its change.")] = None,
    image: Annotated[Path | None, input_option("The picture to talk about; /image FILE shows another.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0, max=2)] = 0.0,
    top_p: Annotated[float, typer.Option(help="The smallest set of tokens that is as likely.", min=0, max=1)] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "--max-new-tokens", help="Longest answer.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    version: Version = "",
    adapter: Adapter = None,
    vision_tower: Tower = None,
    dtype: Dtype = "float32",
    bits: Bits = 16,
    device: Device = "",
) -> None:
    """Talk with a model about a picture.

    /base asks again without what was trained.
    """
    from relook.serve import check_installed

    check_installed()
    from relook.generate.request import Request
    from relook.model.load import LoadOptions
    from relook.serve.terminal import converse

    settings = Request((), (), max_tokens, temperature, top_p, seed)
    converse(model, LoadOptions(adapter, vision_tower, dtype, bits, device), base, image, settings, version)
