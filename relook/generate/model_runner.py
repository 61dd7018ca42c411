"""The device's side of answering: flat passes of a model over a pool of keys and values.

Reading prompts (`prefill`) and growing answers (`step`) are the same walk: embed, decoder layers, post decoder,
lm_head, choose. A step works on tensors that stay in place and changes them itself, so that a CUDA graph replays it
and the host never waits for a token before it launches the next step.

Shape letters: N positions of a pass or rows of a step, T texts of a prefill, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from relook.console import status
from relook.data.images import row_count, stack
from relook.generate.attention import (
    ATTENTION_NAME,
    KVPool,
    PassView,
    PoolShape,
    attend,
    current,
    has_flash,
    has_kernels,
    without_cudnn_attention,
)
from relook.generate.dense_attention import DenseReads
from relook.generate.passes import AnyReads, Prefill, StepState, copy_to_device
from relook.generate.prefill_graph import PrefillGraph, graph_length
from relook.generate.sampling import choose_tokens, token_logprobs
from relook.generate.shared_projections import share_projections
from relook.model.families import image_features, language_model, position_rows, sees_ahead
from relook.model.load import LoadedModel
from relook.model.post_decoder import PostDecoder

LAYER_VARIANTS = 64  # that dynamo may compile of layers' code: two for each kind of layer of each model
CELLS_MULTIPLE = 8192  # of a pool that a GPU keeps for the next questions
TOWER_IMAGES = (1, 2, 4, 8)  # of a graph of the vision tower; launching more takes the host no longer than the device
POOL_SHARE = 0.7  # of a GPU's free memory; the rest is for the vision tower and for the states of a pass
PRE_NORM = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}  # Llama's layers, and those like them

Result = TypeVar("Result")
Encoded = tuple[Sequence[Tensor], Sequence[Tensor | None]]  # projected features by image, and what is read of it


def run_layer(layer: Any, hidden: Tensor, angles: Any) -> Tensor:
    """Run one of transformers' decoder layers over flat positions, (1, N, D)."""
    output = layer(hidden, attention_mask=None, position_embeddings=angles, use_cache=False)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _run_last_layer(layer: Any, hidden: Tensor, angles: Any, selected: Tensor) -> Tensor:
    """Run a decoder layer whose output is read at some positions only, (1, T, D): the others need no MLP."""
    normed = layer.input_layernorm(hidden)
    mixed = layer.self_attn(normed, attention_mask=None, position_embeddings=angles)[0]
    states: Tensor = hidden[:, selected] + mixed[:, selected]
    output: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return output


def _with_pool_attention(layers: Sequence[Any]) -> list[Any]:
    """Return the same layers, with the same weights and adapters, whose attention is the pool's.

    transformers' layers look their attention function up in their config, which the whole model shares: with a config
    of their own, whatever else runs the model meanwhile keeps its attention.
    """
    configs: dict[int, Any] = {}  # by the identity of the layers' own
    same = []
    for layer in layers:
        children = dict(layer._modules)
        for name, child in children.items():
            if (config := getattr(child, "config", None)) is not None:
                copied = configs.setdefault(id(config), copy.copy(config))
                copied._attn_implementation = ATTENTION_NAME
                children[name] = copy.copy(child)
                children[name].config = copied
        same.append(copy.copy(layer))
        same[-1]._modules = children
    return same


def position_bytes(loaded: LoadedModel) -> int:
    """Return the bytes that one position of a text takes in all of a model's pools."""
    return sum(shape.nbytes(loaded.core.dtype) for shape in PoolShape.of(loaded).values())


class ModelRunner:
    """A model and its pools.

    Args:
        cells: positions that the pool holds for all texts.
        banned: token ids that are never chosen, and further ones that are not chosen first.
        compiled: compile the decoder layers and replay steps as CUDA graphs (GPUs only).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cells: int,
        banned: tuple[Sequence[int], Sequence[int]] = ((), ()),
        compiled: bool = True,
    ) -> None:
        self.loaded, self.core = loaded, loaded.core
        self.device: torch.device = self.core.lm_head.weight.device
        self.post_decoder: PostDecoder | None = getattr(self.core.model, "post_decoder", None)
        self.language_model = language_model(self.core.model)
        by_kind = "layer_type" in inspect.signature(self.language_model.rotary_emb.forward).parameters
        layers = self.language_model.layers
        self.layer_kinds = self.language_model.config.layer_types if by_kind else [""] * len(layers)
        self.sees_ahead = sees_ahead(self.core.config)
        self.has_mrope = hasattr(self.core.model, "get_rope_index")
        like = self.core.get_input_embeddings().weight.new_empty(0, dtype=self.core.dtype)
        shapes = PoolShape.of(loaded)
        self.pool = KVPool(shapes["text"], cells, like)
        # The post decoder's self-attention reads the same extents; its image side has a pool of its own.
        self.self_pool = KVPool(shapes["self"], cells, like) if "self" in shapes else None
        self.image_pool = KVPool(shapes["image"], cells * shapes["image"].cells, like) if "image" in shapes else None
        head_sizes = {shape.head_size for shape in shapes.values()}
        self.banned_ids, self.requested_cells = banned, cells
        self.banned = [torch.tensor(list(ids), dtype=torch.long, device=self.device) for ids in banned]
        self.has_kernel = has_kernels(head_sizes, like)
        self.flash = self.has_kernel and has_flash(like) and not self.sees_ahead
        self.compiled = compiled and self.has_kernel
        self._open: StepState | None = None  # whose keys and values are not in the pool yet
        self._run_layer = run_layer
        if self.compiled:
            # On disk, so that the next run finds what this one compiled.
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "relook" / "compiled"))
            share_projections(self.language_model.layers)
            torch._dynamo.config.recompile_limit = max(LAYER_VARIANTS, torch._dynamo.config.recompile_limit)
            # Compiled twice: for a single position, and for any number of them.
            self._run_layer = torch.compile(run_layer, fullgraph=True, dynamic=True)
        self.layers = _with_pool_attention(self.language_model.layers)
        self._compiling: float | None = None  # when the first compilation began
        self._graphs: dict[Any, tuple[StepState, torch.cuda.CUDAGraph]] = {}
        self._tower_graphs: dict[Any, tuple[Tensor, Encoded, torch.cuda.CUDAGraph]] = {}
        self._records_tower = True
        self._prefill_graphs: dict[int, PrefillGraph] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self.compiled else None

    @staticmethod
    def of(loaded: LoadedModel, cells: int, minimum: int, banned: tuple[Sequence[int], Sequence[int]]) -> ModelRunner:
        """Return a model's runner with so many cells, or as many as fit the free memory of its GPU.

        On a GPU a model keeps its runner: graphs are not recorded again for each set of questions.

        Args:
            minimum: cells that are needed in any case.
        """
        runner = loaded.runner
        if isinstance(runner, ModelRunner) and runner.banned_ids == banned:
            if runner.requested_cells >= cells and runner.pool.cells >= minimum:
                return runner
            cells = max(cells, runner.requested_cells)
        loaded.runner = runner = None  # before the next one takes memory
        requested, device = cells, loaded.core.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(device)[0]
            # Rounded up, so that questions a little longer find their room there.
            cells = -(-cells // CELLS_MULTIPLE) * CELLS_MULTIPLE
            cells = max(minimum, min(cells, int(POOL_SHARE * free) // position_bytes(loaded)))
        new = ModelRunner(loaded, cells, banned)
        new.requested_cells = max(requested, new.pool.cells)
        if new.compiled:
            loaded.runner = new
        return new

    # --- images

    @without_cudnn_attention
    @torch.inference_mode()
    def encode_images(self, inputs: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor | None]]:
        """Return each image's projected features (P, D) and what the post decoder reads of it, (M, V) or None.

        What the first layers add at image positions (`position_rows`) lies beside the projected features, (P, n * D).

        Args:
            inputs: what the image processor made of each image (`ImageLoader.inputs`).
        """
        # Copied one by one and stacked on the device: on the host that would take longer than the vision tower does.
        batch = stack([{name: copy_to_device(value, self.device) for name, value in image.items()} for image in inputs])
        image_rows = [row_count(image["pixel_values"]) for image in inputs]
        projected, read = self._replay_tower(batch, image_rows) or self._encode(batch, image_rows)
        # Copies: a view would keep the features of the whole batch in memory.
        return [
            (rows.clone(), None if features is None else features.clone())
            for rows, features in zip(projected[: len(inputs)], read[: len(inputs)], strict=True)
        ]

    def _encode(self, batch: dict[str, Tensor], image_rows: Sequence[int]) -> Encoded:
        """Run the vision tower over a batch of images that have so many rows of pixel_values each."""
        dtype = self.core.dtype
        batch = {
            name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype) for name, tensor in batch.items()
        }
        outputs = self.core.model.get_image_features(**batch, return_dict=True)
        features = getattr(outputs, "vision_features", None)
        read = image_features(features, image_rows) if features else [None] * len(image_rows)
        return [rows.to(dtype) for rows in position_rows(outputs, image_rows)], read

    def _replay_tower(self, batch: dict[str, Tensor], image_rows: Sequence[int]) -> Encoded | None:
        """Run the vision tower over a few images as one CUDA graph, padded to the next number of `TOWER_IMAGES`.

        Launched one by one, its kernels take the host several times as long as the device, and prompts wait for that.
        None where it does not serve: for many images, which keep a device busy, and for models whose images are no
        single row of pixels each.
        """
        count = next((number for number in TOWER_IMAGES if number >= len(image_rows)), 0)
        if (
            not (self.compiled and self._records_tower and count)
            or batch.keys() != {"pixel_values"}
            or any(n > 1 for n in image_rows)
        ):
            return None
        pixels = batch["pixel_values"]
        key = count, pixels.shape[1:]
        if key not in self._tower_graphs:
            static = pixels.new_zeros(count, *pixels.shape[1:])
            try:
                graph, encoded = self._record(lambda: self._encode({"pixel_values": static}, [1] * count))
            except Exception as error:
                self._records_tower = False
                status(
                    f"The vision tower cannot be recorded ({_reason(error)}); it runs without, slower.", style="yellow"
                )
                return None
            self._tower_graphs[key] = static, encoded, graph
        static, encoded, graph = self._tower_graphs[key]
        static[: len(pixels)].copy_(pixels)
        graph.replay()
        return encoded

    def staged(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return an image's inputs in pinned memory where the model is on a GPU, from which copies do not block."""
        if self.device.type != "cuda":
            return inputs
        return {name: tensor.pin_memory() for name, tensor in inputs.items()}

    @torch.inference_mode()
    def store_image_context(self, features: Sequence[Tensor], first: int) -> None:
        """Write the post decoder's image keys and values of one text's images into its pool, from a place on."""
        assert self.post_decoder is not None
        assert self.image_pool is not None
        context = self.post_decoder.image_context(list(features), [len(features)])
        assert context is not None
        for kv, keys, values in zip(self.image_pool.layers, context.keys, context.values, strict=True):
            cells = slice(first, first + keys.shape[2])
            for stored, new in zip(kv, (keys, values), strict=True):
                stored[cells] = new[0].transpose(0, 1)

    # --- passes

    @torch.inference_mode()
    def prefill(self, batch: Prefill) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Read new positions and choose the token after each of `last`.

        Returns:
            The tokens, (T,), -1 where logits are not finite, and `token_logprobs` of them if they are wanted.
        """
        self.write_back()
        if self.compiled and self._compiling is None:
            status("Compiling the model's layers (half a minute at most; they are kept on disk).", style="dim")
            self._compiling = time.perf_counter()
        try:
            states = self._read_prompts(batch)
        except Exception as error:
            if self._run_layer is run_layer:
                raise
            self._fall_back(error)
            states = self._read_prompts(batch)
        logits = self.core.lm_head(states)
        chosen = choose_tokens(logits, [ids for ids in self.banned if len(ids)], batch.sampling, first=True)
        return chosen, None if batch.top < 0 else token_logprobs(logits, chosen, batch.top)

    def _read_prompts(self, batch: Prefill) -> Tensor:
        """Return the states that predict the next tokens, (T, D)."""
        embeds = self.core.get_input_embeddings()(batch.ids)
        deep: list[Tensor] = []
        if batch.image_rows:
            # Image features take the positions of the placeholders, in order.
            placeholder = (batch.ids == self.core.config.image_token_id)[:, None]
            rows, *added = torch.cat(batch.image_rows).to(embeds.dtype).split(embeds.shape[-1], dim=-1)
            embeds = embeds.masked_scatter(placeholder, rows)
            deep = [torch.zeros_like(embeds).masked_scatter(placeholder, layer) for layer in added]
        view = PassView(batch.cells, batch.reads, is_step=False)
        length = graph_length(batch) if self.compiled and not deep else None
        if length is None:
            states = self._trunk(embeds, batch.positions, view, batch.last if self.self_pool is None else None, deep)
        else:
            states = self.prefill_graph(length).read(embeds, batch)
        states = self._post_decode(states, view, batch.image)
        return states if self.self_pool is None else states[batch.last]

    @torch.inference_mode()
    def prefill_graph(self, length: int) -> PrefillGraph:
        """Return the graph that reads up to so many positions, recorded when it is first wanted."""
        if length not in self._prefill_graphs:
            embeds = self.core.get_input_embeddings().weight.new_zeros(length, self.language_model.config.hidden_size)
            positions = torch.zeros((3, length) if self.has_mrope else length, dtype=torch.int32, device=self.device)
            ends_selected = self.self_pool is None
            self._prefill_graphs[length] = PrefillGraph(
                self._trunk, self._record, embeds, positions, self.pool.cells, ends_selected
            )
        return self._prefill_graphs[length]

    @torch.inference_mode()
    def step(self, state: StepState) -> None:
        """Append one token to every row: `state.tokens` holds it afterwards."""
        if not self.compiled:
            if self._open is not state:
                self.write_back()
                self._open = state
            self._step(state)
            return None
        key = _graph_key(state)
        if key not in self._graphs:
            try:
                graph = self._capture(state)
            except Exception as error:
                self._fall_back(error)
                return self.step(state)
            if not self._graphs and self._compiling is not None:
                torch.cuda.synchronize()
                status(f"Compiled in {time.perf_counter() - self._compiling:.0f} s.", style="dim")
            self._graphs[key] = state, graph
        owner, graph = self._graphs[key]
        assert owner is state, "rows are placed by `place` before they are stepped"
        graph.replay()
        return None

    def write_back(self) -> None:
        """Bring the keys and values of the steps since the last pass into the pool."""
        if self._open is not None and isinstance(self._open.reads, DenseReads):
            self._open.reads.write_back()
        self._open = None

    @torch.inference_mode()
    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of neighbouring cells."""
        self.write_back()
        for pool in (self.pool, self.self_pool):
            for side in itertools.chain.from_iterable(pool.layers if pool is not None else ()):
                side[target : target + count] = side[source : source + count]

    @torch.inference_mode()
    def place(self, state: StepState) -> StepState:
        """Return the state whose tensors the graph of this shape works on, set to the given one."""
        stored = self._graphs.get(_graph_key(state)) if self.compiled else None
        if stored is None:
            return state
        target = stored[0]
        target.tokens.copy_(state.tokens, non_blocking=True)
        target.ints.copy_(state.ints, non_blocking=True)
        if state.sampling is not None and target.sampling is not None:
            target.sampling.copy_(state.sampling)
        return target

    def _step(self, state: StepState) -> None:
        positions, cells, count, _ = state.counters
        view = PassView(cells.long(), state.reads, is_step=True)
        embeds = self.core.get_input_embeddings()(state.tokens.clamp(min=0))  # -1 where logits were not finite
        states = self._post_decode(self._trunk(embeds, positions, view), view, state.image)
        logits = self.core.lm_head(states)
        banned = [self.banned[0]] if len(self.banned[0]) else []
        chosen = choose_tokens(logits, banned, state.sampling, count=count)
        state.tokens.copy_(chosen)
        if state.logprobs is not None:
            for stored, new in zip(
                state.logprobs, token_logprobs(logits, chosen, state.logprobs[1].shape[1]), strict=True
            ):
                stored.copy_(new)
        state.counters.add_(state.moves)
        if isinstance(state.reads, DenseReads):
            state.reads.advance()

    def _fall_back(self, error: Exception) -> None:
        """Go on without compiled layers and graphs, and say so, once: nothing is tried again."""
        self.compiled, self._graphs, self._prefill_graphs = False, {}, {}
        self._run_layer = run_layer
        status(
            f"This model cannot be compiled ({_reason(error)}); it answers without, several times slower.",
            style="yellow",
        )

    def _trunk(
        self,
        embeds_ND: Tensor,
        positions_N: Tensor,
        view: PassView,
        selected: Tensor | None = None,
        deep: Sequence[Tensor] = (),
    ) -> Tensor:
        """Run the language model over flat positions; return the last hidden states, (N, D), or the `selected` ones.

        Args:
            deep: what is added to the states after each of the first layers, (N, D).
        """
        model = self.language_model
        hidden = embeds_ND[None]
        if self.has_mrope:  # (N,) or (3, N): of text, the numbers of time, row and column are one
            positions_N = positions_N.expand(3, -1)
        # (1, N) or (3, 1, N); Gemma's kinds of layers have angles of their own.
        angles = {
            kind: model.rotary_emb(
                hidden, position_ids=positions_N.unsqueeze(-2), **({"layer_type": kind} if kind else {})
            )
            for kind in dict.fromkeys(self.layer_kinds)
        }
        current.view = view
        *layers, last = zip(self.layers, self.pool.layers, (angles[kind] for kind in self.layer_kinds), strict=True)
        for (layer, current.kv, turned), added in itertools.zip_longest(layers, deep):
            hidden = self._run_layer(layer, hidden, turned)
            hidden = hidden if added is None else hidden + added
        # Of a prompt the last layer's keys and values are needed everywhere, its output only where a token is chosen.
        layer, current.kv, turned = last
        if selected is None or {name for name, _ in layer.named_children()} != PRE_NORM:
            hidden = self._run_layer(layer, hidden, turned)
            hidden = hidden if selected is None else hidden[:, selected]
        else:
            hidden = _run_last_layer(layer, hidden, turned, selected)
        normed: Tensor = model.norm(hidden)[0]
        return normed

    def _post_decode(self, states_ND: Tensor, view: PassView, image: AnyReads | None) -> Tensor:
        """Run the post decoder over flat positions, whose image side lies in its pool."""
        blocks: Any = self.post_decoder.blocks if self.post_decoder is not None else ()
        for index, block in enumerate(blocks):
            if block.self_attention is not None:
                # As in a decoder layer: its own keys and values of all positions, in the cells of the same extents.
                assert self.self_pool is not None
                attention, normed = block.self_attention, block.self_norm(states_ND)
                query, key, value = (
                    projection(normed).unflatten(-1, (attention.num_heads, -1))
                    for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                kv = self.self_pool.layers[index]
                mixed = attend(query, kv, view, query.shape[-1] ** -0.5, (key, value))
                states_ND = states_ND + attention.o_proj(mixed.flatten(1))
            if block.cross_attention is not None and image is not None:
                # The image's keys and values were written once, by `store_image_context`.
                assert self.image_pool is not None
                attention = block.cross_attention
                query = attention.q_proj(block.cross_norm(states_ND)).unflatten(-1, (attention.num_heads, -1))
                looking = PassView(view.cells, image, view.is_step)
                mixed = attend(query, self.image_pool.layers[index], looking, query.shape[-1] ** -0.5)
                states_ND = states_ND + attention.o_proj(mixed.flatten(1))
            states_ND = states_ND + block.mlp(block.mlp_norm(states_ND))
        return states_ND

    # --- CUDA graphs

    def _capture(self, state: StepState) -> torch.cuda.CUDAGraph:
        """Record a step on these tensors. Warm-up and capture run without any text in the rows, and change nothing."""
        before = state.tokens.clone(), state.ints.clone()
        # Without moves, counters stay as they are; all rows write into the pool's last cell, which is no text's.
        state.moves.zero_()
        state.counters[1].fill_(self.pool.cells)
        try:
            graph, _ = self._record(lambda: self._step(state))
        finally:
            state.tokens.copy_(before[0])
            state.ints.copy_(before[1])
        return graph

    def _record(self, work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Record what some work launches; return the graph, and the work's result, whose tensors each replay fills."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # compiles, and lets libraries take their workspaces
        torch.cuda.current_stream().wait_stream(side)
        # Other threads go on meanwhile, pinning memory for images: "thread_local" lets them.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
            result = work()
        return graph, result


def _graph_key(state: StepState) -> tuple[Any, ...]:
    """Return what a graph is good for: shapes, and which parts there are; never what is in a tensor."""
    parts = tuple(
        (reads.max_queries, reads.pieces)
        for part in (state.reads, state.image)
        for reads in (part if isinstance(part, list) else ())
    )
    counts = tuple(len(part) if isinstance(part, list) else 0 for part in (state.reads, state.image))
    top = None if state.logprobs is None else state.logprobs[1].shape[1]
    return state.rows, counts, parts, top, None if state.sampling is None else state.sampling.key


def _reason(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
